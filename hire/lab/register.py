"""The register: which figures there are, what each asks, which claims it bears on; and the profiles to run them at."""

import functools

import yaml

from hire.lab.paths import FIGURES, NOTEBOOKS

PROFILES = ("smoke", "cpu", "tpu")


@functools.cache
def load(name: str) -> dict:
    """A YAML file of figures/, such as register, claims or targets."""
    return yaml.safe_load((FIGURES / f"{name}.yaml").read_text())


def ready() -> list[dict]:
    """The figures whose notebook exists, in order."""
    return [entry for entry in load("register")["figures"] if (NOTEBOOKS / f"{entry['name']}.ipynb").exists()]


def register(number: str) -> dict:
    """The figure of that number, such as "02". Raises ValueError, listing those that are ready, for any other."""
    found = [entry for entry in ready() if entry["name"].startswith(f"{number}_")]
    if not found:
        known = ", ".join(entry["name"][:2] for entry in ready())
        raise ValueError(f"figure {number!r}: expected one of {known}")
    return found[0]


def parameters(profile: str) -> dict[str, dict]:
    """Notebook parameters of a profile, by the notebook's name. Raises ValueError for an unknown profile."""
    if profile not in PROFILES:
        raise ValueError(f"profile {profile!r}: expected one of {', '.join(PROFILES)}")
    return yaml.safe_load((NOTEBOOKS / f"profiles/{profile}.yaml").read_text()) or {}

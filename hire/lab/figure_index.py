"""The register of figures, and the profiles to run them at.

The register lists each figure with its question and the claims that it concerns.
"""

import functools

import yaml

from hire.lab.paths import FIGURES, NOTEBOOKS

PROFILES = ("smoke", "cpu", "tpu")


@functools.cache
def load(name: str) -> dict:
    """Read a YAML file of figures/, such as register, claims or targets."""
    return yaml.safe_load((FIGURES / f"{name}.yaml").read_text())


def ready() -> list[dict]:
    """Return the register entries whose notebook exists, in order."""
    return [
        entry
        for entry in load("register")["figures"]
        if (NOTEBOOKS / f"{entry['name']}.ipynb").exists()
    ]


def register(number: str) -> dict:
    """Return the register entry of a figure.

    Args:
        number: Number of the figure, such as "02".

    Raises:
        ValueError: No figure with this number has a notebook. The message lists those that have
            one.
    """
    entries = [entry for entry in ready() if entry["name"].startswith(f"{number}_")]
    if not entries:
        numbers = ", ".join(entry["name"][:2] for entry in ready())
        raise ValueError(f"figure {number!r}: expected one of {numbers}")
    return entries[0]


def parameters(profile: str) -> dict[str, dict]:
    """Read the notebook parameters of a profile.

    Args:
        profile: One of PROFILES.

    Returns:
        Parameters by the notebook's name.

    Raises:
        ValueError: The profile is unknown.
    """
    if profile not in PROFILES:
        raise ValueError(f"profile {profile!r}: expected one of {', '.join(PROFILES)}")
    return yaml.safe_load((NOTEBOOKS / f"profiles/{profile}.yaml").read_text()) or {}

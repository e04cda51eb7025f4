"""The index of figures, and the profiles that set the sizes of their notebooks.

The index lists each figure with its question and the claims that it concerns.
"""

import functools
import os
from types import SimpleNamespace

import jax
import yaml

from hire.lab.paths import FIGURES, NOTEBOOKS

PROFILES = ("smoke", "cpu", "tpu")
# Only runs of this profile, with its own sizes, write to figures/ and data/records/.
COMMITTED_PROFILE = "cpu"
# Environment variable with the profile that `auto` stands for; tests set it to smoke.
PROFILE_VARIABLE = "HIRE_PROFILE"


@functools.cache
def load(name: str) -> dict:
    """Read a YAML file of figures/, such as index, claims or targets."""
    return yaml.safe_load((FIGURES / f"{name}.yaml").read_text())


def claim_limits(claim: str) -> dict[str, float]:
    """Return the numbers of a claim's criterion, by name.

    Args:
        claim: Id of the claim in figures/claims.yaml.
    """
    by_id = {entry["id"]: entry["limits"] for entry in load("claims")["claims"]}
    return by_id[claim]


def figures_with_notebook() -> list[dict]:
    """Return the index entries whose notebook exists, in order."""
    return [
        entry
        for entry in load("index")["figures"]
        if (NOTEBOOKS / f"{entry['name']}.ipynb").exists()
    ]


def figure_entry(number: str) -> dict:
    """Return the index entry of a figure.

    Args:
        number: Number of the figure, such as "02".

    Raises:
        ValueError: No figure with this number has a notebook. The message lists those that have
            one.
    """
    entries = [entry for entry in figures_with_notebook() if entry["name"].startswith(f"{number}_")]
    if not entries:
        numbers = ", ".join(entry["name"][:2] for entry in figures_with_notebook())
        raise ValueError(f"figure {number!r}: expected one of {numbers}")
    return entries[0]


def resolve_profile(profile: str) -> str:
    """Return the profile to run at.

    Args:
        profile: One of PROFILES, or "auto": the value of HIRE_PROFILE if it is set, otherwise
            "tpu" on a TPU and "cpu" elsewhere.

    Raises:
        ValueError: The profile is unknown.
        RuntimeError: The profile is "tpu" and there is no TPU.
    """
    backend = jax.default_backend()
    if profile == "auto":
        profile = os.environ.get(PROFILE_VARIABLE) or ("tpu" if backend == "tpu" else "cpu")
    if profile not in PROFILES:
        raise ValueError(f"profile {profile!r}: expected auto or one of {', '.join(PROFILES)}")
    if profile == "tpu" and backend != "tpu":
        raise RuntimeError(
            f"profile 'tpu' but jax runs on {backend}; choose a TPU runtime or profile 'cpu'"
        )
    return profile


def sizes_by_notebook(profile: str) -> dict[str, dict]:
    """Read the sizes that a profile gives to each notebook.

    Args:
        profile: One of PROFILES.

    Raises:
        ValueError: The profile is unknown.
    """
    if profile not in PROFILES:
        raise ValueError(f"profile {profile!r}: expected one of {', '.join(PROFILES)}")
    return yaml.safe_load((NOTEBOOKS / f"profiles/{profile}.yaml").read_text())


def settings(name: str, profile: str, overrides: dict) -> SimpleNamespace:
    """Return the sizes of a notebook as attributes.

    Args:
        name: Name of the notebook, such as "02_recall".
        profile: One of PROFILES.
        overrides: Sizes to take instead of those of the profile.

    Raises:
        ValueError: The profile is unknown or has no size of such a name.
    """
    sizes = sizes_by_notebook(profile)[name]
    for size in overrides:
        if size not in sizes:
            raise ValueError(
                f"{name} has no parameter {size!r}: expected one of {', '.join(sizes)}"
            )
    return SimpleNamespace(**sizes | overrides)

"""One run of a notebook: where its records and figures go, and what it says of the machine."""

import resource

import jax
from IPython.display import Image, display
from matplotlib.figure import Figure

from hire.lab import figures, records
from hire.lab.paths import FIGURES, OUT, RECORDS
from hire.lab.register import PROFILES, register


class Run:
    """`Run("02", profile)` at the top of a notebook. The smoke profile writes below out/, so that a toy never replaces evidence.

    Raises ValueError for an unknown figure or profile, RuntimeError when the tpu profile finds no TPU.
    """

    def __init__(self, number: str, profile: str):
        if profile not in PROFILES:
            raise ValueError(f"profile {profile!r}: expected one of {', '.join(PROFILES)}")
        self.entry = register(number)
        self.profile = profile
        self.name = self.entry["name"]
        self.machine = records.machine()
        if profile == "tpu" and jax.default_backend() != "tpu":
            raise RuntimeError(f"profile 'tpu' but jax runs on {jax.default_backend()}; choose a TPU runtime or profile 'cpu'")
        toy = profile == "smoke"
        self.records = OUT / profile / "records" if toy else RECORDS
        self.figures = OUT / profile / "figures" if toy else FIGURES
        print(f"figure {number}, profile {profile}, {self.machine['device']}, jax {self.machine['versions']['jax']}")

    def record(self, id: str, *, kind: str = "measured", **facts) -> dict:
        """Write a record (see records.write) of this notebook's topic, with the most gigabytes held until now, and return it."""
        held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9  # Linux counts in KiB
        facts |= dict(command=f"make figure-{self.name[:2]}", peak_memory=held)
        return records.write(self.records, self.name, id, kind=kind, **facts)

    def figure(self, figure: Figure, *, kind: str, weights: str, series: dict, finding: str, tolerance: dict) -> None:
        """Save the figure and the tree of series that it plots, and show it. `tolerance` is relative, by series, with a default."""
        toy = "SMOKE PROFILE: toy model, no result. " if self.profile == "smoke" else ""
        note = f"{toy}{figures.KIND_TEXT[kind].format(device=self.machine['device'])}; {weights}."
        facts = dict(profile=self.profile, kind=kind, weights=weights, machine=self.machine, commit=records.commit())
        facts |= dict(series=figures.flat(series), tolerance=tolerance)
        figures.save(figure, self.figures, self.name, note=note, finding=finding, **facts)
        figures.plt.close(figure)
        display(Image(self.figures / f"{self.name}.png"))
        print(finding)

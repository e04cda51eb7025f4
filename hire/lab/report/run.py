"""One run of a notebook: its output folders, its records and figures, and its machine."""

import resource

import jax
from IPython.display import Image, display
from matplotlib.figure import Figure

from hire.lab import records
from hire.lab.figure_index import PROFILES, register
from hire.lab.paths import FIGURES, OUT, RECORDS
from hire.lab.report import plots


class Run:
    """The run of a notebook: call `Run("02", profile)` in its first cell.

    The smoke profile writes below out/, so a toy model never replaces evidence.

    Raises:
        ValueError: If the figure or the profile is unknown.
        RuntimeError: If the profile is tpu and there is no TPU.
    """

    def __init__(self, number: str, profile: str):
        if profile not in PROFILES:
            raise ValueError(f"profile {profile!r}: expected one of {', '.join(PROFILES)}")
        self.entry = register(number)
        self.profile = profile
        self.name = self.entry["name"]
        self.machine = records.machine()
        if profile == "tpu" and jax.default_backend() != "tpu":
            raise RuntimeError(
                f"profile 'tpu' but jax runs on {jax.default_backend()}; choose a TPU runtime or "
                "profile 'cpu'"
            )
        toy = profile == "smoke"
        self.records = OUT / profile / "records" if toy else RECORDS
        self.figures = OUT / profile / "figures" if toy else FIGURES
        print(
            f"figure {number}, profile {profile}, {self.machine['device']}, jax "
            f"{self.machine['versions']['jax']}"
        )

    def record(self, id: str, *, kind: str = "measured", **facts) -> dict:
        """Write a record of this notebook's topic (see `records.write`).

        The record also states the peak memory of the process so far, in gigabytes.

        Args:
            id: Id of the record.
            kind: Kind of evidence.
            facts: Further arguments of `records.write`.

        Returns:
            The record.
        """
        # On Linux the unit of ru_maxrss is KiB.
        peak_gigabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        facts |= dict(command=f"make figure-{self.name[:2]}", peak_memory=peak_gigabytes)
        return records.write(self.records, self.name, id, kind=kind, **facts)

    def figure(
        self,
        figure: Figure,
        *,
        kind: str,
        weights: str,
        series: dict,
        finding: str,
        tolerance: dict,
    ) -> None:
        """Save the figure with the series that it plots, and show it.

        Args:
            figure: Figure to save.
            kind: Kind of evidence, a key of `plots.KIND_TEXT`.
            weights: Description of the weights, for the note.
            series: Tree of the plotted series.
            finding: Finding of the figure in one sentence.
            tolerance: Relative tolerance by series, with a "default".
        """
        toy = "SMOKE PROFILE: toy model, no result. " if self.profile == "smoke" else ""
        note = f"{toy}{plots.KIND_TEXT[kind].format(device=self.machine['device'])}; {weights}."
        metadata = dict(
            profile=self.profile,
            kind=kind,
            weights=weights,
            machine=self.machine,
            commit=records.commit(),
        )
        metadata |= dict(series=plots.flat(series), tolerance=tolerance)
        plots.save(figure, self.figures, self.name, note=note, finding=finding, **metadata)
        plots.plt.close(figure)
        display(Image(self.figures / f"{self.name}.png"))
        print(finding)

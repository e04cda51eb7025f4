"""One run of a figure's notebook: its sizes, and where its figure and records go.

A notebook starts a study, computes a `Result` and publishes it. Only a run of the committed profile
with that profile's sizes writes to figures/ and data/records/; any other run writes below out/.
"""

import dataclasses
import resource
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import jax
import matplotlib.pyplot as plt
from IPython.display import Image, display
from matplotlib.figure import Figure

from hire.lab import records
from hire.lab.figure_index import (
    COMMITTED_PROFILE,
    figure_entry,
    resolve_profile,
    settings,
    sizes_by_notebook,
)
from hire.lab.paths import FIGURES, OUT, RECORDS, ROOT
from hire.lab.studies import figure_files

KIND_TEXT = {
    "measured": "Measured on {device}",
    "compiler-estimate": "Estimated by the TPU's own compiler, not measured on a TPU",
    "simulated": "Arithmetic on published figures, not measured",
    "published": "Published values",
}


@dataclasses.dataclass(frozen=True)
class Claim:
    """What one record contributes to a claim of the paper.

    Attributes:
        value: The number that was obtained.
        unit: Unit of the value, such as "x, whole step" or "recall@32".
        quality: Recall, loss or another measure of quality that goes with the value, with the
            weights.
        setting: Model and sizes.
        supports: Whether the value meets the claim's criterion (figures/claims.yaml).
        low: Lower end of the value's 95 % interval, or of its range.
        high: Upper end.
        device: The device that the value is about, where it is not the one that the record was made
            on, such as "TPU v5e" for a compiler estimate.
    """

    value: float
    unit: str
    quality: str
    setting: str
    supports: bool
    low: float | None = None
    high: float | None = None
    device: str | None = None


@dataclasses.dataclass(frozen=True)
class Record:
    """A record to write; see `records.write` for the fields.

    Attributes:
        id: Id of the record, `<topic>/<model>`.
        weights: Which weights the results come from.
        setting: Settings of the run.
        results: Results of the run.
        kind: One of `records.KINDS`.
        durations: Raw seconds by timed function.
        claims: Contribution to each claim, by the claim's id.
    """

    id: str
    weights: str
    setting: dict
    results: dict
    kind: str = "measured"
    durations: dict = dataclasses.field(default_factory=dict)
    claims: dict[str, Claim] = dataclasses.field(default_factory=dict)


class Result(ABC):
    """What a study computed. Each study has a dataclass of this kind.

    Attributes:
        weights: Description of the weights, for the figure's note.
        kind: Kind of the figure's evidence, a key of KIND_TEXT.
        tolerance: Relative tolerance by series, with a "default"; see `figure_files.differences`.
    """

    weights: str
    kind: ClassVar[str] = "measured"
    tolerance: ClassVar[Mapping[str, float]] = {"default": 0.02}

    @abstractmethod
    def finding(self) -> str:
        """State what was found in one or two sentences."""

    @abstractmethod
    def series(self) -> dict:
        """Return the plotted series, as a tree of dicts."""

    @abstractmethod
    def records(self) -> list[Record]:
        """Return the records to write."""

    @abstractmethod
    def plot(self) -> Figure:
        """Draw the figure."""


class Study:
    """The run of one figure's notebook.

    Args:
        number: Number of the figure, such as "02".
        namespace: `globals()` of the notebook. `profile` and the sizes of the parameters cell are
            read from it; a size that is None is the profile's.

    Attributes:
        name: Name of the figure, such as "02_recall".
        profile: The profile, one of `figure_index.PROFILES`.
        settings: Sizes of the run, as attributes.
        is_evidence: Whether `publish` writes to figures/ and data/records/.

    Raises:
        ValueError: The figure or the profile is unknown.
        RuntimeError: The profile is "tpu" and there is no TPU.
    """

    def __init__(self, number: str, namespace: Mapping[str, Any]):
        self.name = figure_entry(number)["name"]
        self.profile = resolve_profile(namespace["profile"])
        sizes = sizes_by_notebook(self.profile)[self.name]
        changed = {
            size: namespace[size]
            for size, value in sizes.items()
            if namespace.get(size) is not None and namespace[size] != value
        }
        self.settings = settings(self.name, self.profile, changed)
        self.is_evidence = (
            self.profile == COMMITTED_PROFILE
            and not changed
            and jax.default_backend() == COMMITTED_PROFILE
        )
        folder = OUT / (f"{self.profile}-changed" if changed else self.profile)
        self.figures = FIGURES if self.is_evidence else folder / "figures"
        self.records = RECORDS if self.is_evidence else folder / "records"
        machine = records.machine()
        print(
            f"notebook {number}, profile {self.profile}, {machine['device']}, "
            f"jax {machine['versions']['jax']}"
        )
        if changed:
            print("sizes that differ from the profile's:", ", ".join(changed))

    def publish(self, result: Result) -> None:
        """Save the figure with its series, write the records, and show figure and finding.

        Args:
            result: Result of the study.
        """
        figure = result.plot()
        toy = "SMOKE PROFILE: toy model, no result. " if self.profile == "smoke" else ""
        kind_text = KIND_TEXT[result.kind].format(device=records.machine()["device"])
        figure_files.save(
            figure,
            self.figures,
            self.name,
            note=f"{toy}{kind_text}; {result.weights}.",
            finding=result.finding(),
            profile=self.profile,
            kind=result.kind,
            weights=result.weights,
            machine=records.machine(),
            commit=records.commit(),
            series=figure_files.flatten(result.series()),
            tolerance=dict(result.tolerance),
        )
        plt.close(figure)
        for record in result.records():
            self._write(record)
        display(Image(self.figures / f"{self.name}.png"))
        print(result.finding())
        if not self.is_evidence:
            print(
                f"Written to {shortened(self.figures.parent)}, not to figures/ and data/records/: "
                f"those hold runs of the profile {COMMITTED_PROFILE!r} with its own sizes."
            )

    def _write(self, record: Record) -> None:
        """Write one record, with the peak memory of this process so far in gigabytes."""
        # On Linux the unit of ru_maxrss is KiB.
        peak_gigabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        number = self.name[:2]
        claims = {
            claim: dataclasses.asdict(contribution) | dict(figure=number)
            for claim, contribution in record.claims.items()
        }
        optional_fields: dict = dict(durations=record.durations, claims=claims)
        records.write(
            self.records,
            self.name,
            record.id,
            kind=record.kind,
            weights=record.weights,
            setting=record.setting,
            results=record.results,
            **{name: facts for name, facts in optional_fields.items() if facts},
            command=f"make figure-{number}",
            peak_memory=peak_gigabytes,
        )


def shortened(path: Path) -> str:
    """Return a path relative to the repository where it lies in it."""
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)

"""Figure 07: what each operation would take on a TPU v5e, estimated by the TPU's own compiler."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import pandas
from matplotlib.figure import Figure

from hire.lab import records
from hire.lab.figure_index import claim_limits, load
from hire.lab.studies import plots
from hire.lab.studies.study import Claim, Record, Result
from hire.lab.tpu import bundle_parser, compiler, programs

DEVICE = "TPU v5e, by its compiler"
# The programs that the figure compares with the fastest dense form, by layer. "xla" is XLA's
# program, "pallas" are our kernels.
SOFTMAX_VARIANTS = ("LR bf16 xla", "LR int8 pallas", "LR int8 xla", "Q int4 pallas", "Q int4 xla")
FFN_VARIANTS = tuple(
    sorted(
        f"{fractions} {implementation}"
        for fractions, *_ in programs.FFNS
        for implementation in ("xla", "pallas")
    )
)
# Layers, named by their width. The wide softmax has records at two batch sizes only.
WIDE_SOFTMAX, SOFTMAX, FFN = "softmax 2048", "softmax 1536", "FFN 1536"
WIDE_SOFTMAX_BATCHES = (1, 8)
VARIANTS = {WIDE_SOFTMAX: SOFTMAX_VARIANTS, SOFTMAX: SOFTMAX_VARIANTS, FFN: FFN_VARIANTS}
RECOMMENDED = {WIDE_SOFTMAX: "LR int8 pallas", SOFTMAX: "LR int8 pallas", FFN: "5 % of 10 % pallas"}
# Eight of ten published times lie between these quantiles.
QUANTILES = (0.1, 0.9)
# Other microseconds that the first bytes of a kernel may take; `bundle_parser.LATENCY` is assumed.
OTHER_LATENCIES = (0.4, 1.5)
# Record and field of each quality that is measured on other weights, in figures 03 and 06.
RECALL_FIELD = ("softmax/gemma3_270m", "results.recall.mean")
LOSS_FIELD = ("ffn", "results.five.mean")


@dataclasses.dataclass(frozen=True)
class Estimates:
    """Estimates of the TPU's compiler, one per program.

    Attributes:
        programs: Results and setting of the record of each program, by the program's name. See
            `programs.estimated` for the fields.
    """

    programs: Mapping[str, dict]

    @classmethod
    def read(cls) -> "Estimates":
        """Read the records that `make v5e` writes."""
        entries = records.read(topic="v5e")
        return cls({entry["id"]: entry["results"] | entry["setting"] for entry in entries})

    def microseconds(self, name: str) -> float:
        """Return the estimated time of a program."""
        return 1e6 * self.programs[name]["seconds"]

    def byte_bound(self, name: str) -> float:
        """Return the microseconds that a program's bytes take at HBM bandwidth."""
        return 1e6 * self.programs[name]["floor"]

    def fastest_dense(self, layer: str, batch: int) -> float:
        """Return the microseconds of the fastest dense form of a layer.

        Args:
            layer: A key of VARIANTS.
            batch: Number of queries.
        """
        return min(self.microseconds(f"{layer}, {form}, b {batch}") for form in programs.DENSE)

    def layer_programs(self) -> list[str]:
        """Return the names of all programs of a layer or a kernel."""
        return [name for name in self.programs if name.startswith(("softmax", "FFN", "kernel"))]

    def partly_parsed(self) -> list[str]:
        """Return the layers and kernels with an operation whose schedule could not be parsed."""
        return [name for name in self.layer_programs() if self.programs[name]["unparsed"]]

    def operation_table(self, name: str) -> pandas.DataFrame:
        """Return the operations of a program that take more than 1 % of its time."""
        table = pandas.DataFrame(self.programs[name]["operations"])
        return table.rename(columns={"us": "us, estimated"}).round(1)


@dataclasses.dataclass(frozen=True)
class Validation:
    """Times on a v5e that others published, with our estimates of the same programs.

    All times are in microseconds, by program.

    Attributes:
        published: Published times.
        estimated: Estimates. No published time was used to make them.
        byte_bounds: Times of the bytes at HBM bandwidth.
    """

    published: dict[str, float]
    estimated: dict[str, float]
    byte_bounds: dict[str, float]

    @property
    def ratios(self) -> np.ndarray:
        """Published time over estimate of each program (n,)."""
        return np.array([time / self.estimated[name] for name, time in self.published.items()])

    @property
    def median_error(self) -> float:
        """Median distance of the estimates from the published times, relative to these."""
        return float(np.median(np.abs(1 / self.ratios - 1)))

    @property
    def interval(self) -> tuple[float, float]:
        """Ratios that eight of ten published times lie between."""
        low, high = (float(ratio) for ratio in np.quantile(self.ratios, QUANTILES))
        return low, high

    def table(self) -> pandas.DataFrame:
        """Return published and estimated microseconds, one row per program."""
        lines = {
            name: {
                "us, published": f"{time:,.0f}",
                "us, estimated": f"{self.estimated[name]:,.0f}",
                "difference": f"{self.estimated[name] / time - 1:+.0%}",
                "us, byte bound": f"{self.byte_bounds[name]:,.0f}",
            }
            for name, time in self.published.items()
        }
        return pandas.DataFrame.from_dict(lines, orient="index")


def validate(estimates: Estimates) -> Validation:
    """Compare the estimates with the published times of figures/published.yaml.

    Args:
        estimates: The estimates.
    """
    published = {entry["id"]: entry["us"] for entry in load("published")["figures"]}
    return Validation(
        published=published,
        estimated={name: estimates.microseconds(f"published: {name}") for name in published},
        byte_bounds={name: estimates.byte_bound(f"published: {name}") for name in published},
    )


def recompile(names: Sequence[str], estimates: Estimates) -> pandas.DataFrame:
    """Estimate programs with the compiler of this machine and compare with their records.

    Without a compiler a message says so, and the table is empty.

    Args:
        names: Names of programs, see `programs.headline`.
        estimates: The estimates on record.

    Raises:
        RuntimeError: The compiler refuses a program.
    """
    try:
        version = compiler.compiler_version()
    except ModuleNotFoundError as missing:
        print(f"{missing}: the committed records are shown")
        return pandas.DataFrame()
    headline = programs.headline() if names else {}
    lines = {}
    for name in names:
        program = headline[name]
        estimate = compiler.estimate(
            program.function, program.weights, program.x, donated=program.donated
        )
        lines[name] = {
            "us, here": round(1e6 * estimate["seconds"], 1),
            "compiler here": version,
            "us, on record": round(estimates.microseconds(name), 1),
            "compiler of the record": estimates.programs[name]["compiler"],
        }
    return pandas.DataFrame.from_dict(lines, orient="index")


def layer_times(
    estimates: Estimates, batches: Sequence[int]
) -> dict[str, dict[int, dict[str, float]]]:
    """Return the estimated time of each layer in every variant.

    Args:
        estimates: The estimates.
        batches: Batch sizes of the layers of width 1536.

    Returns:
        Layer -> batch -> variant -> microseconds. "dense" is the fastest dense form.
    """
    return {
        layer: {
            batch: {"dense": estimates.fastest_dense(layer, batch)}
            | {name: estimates.microseconds(f"{layer}, {name}, b {batch}") for name in variants}
            for batch in (WIDE_SOFTMAX_BATCHES if layer == WIDE_SOFTMAX else batches)
        }
        for layer, variants in VARIANTS.items()
    }


def speedup_table(times: Mapping[str, Mapping[int, Mapping[str, float]]]) -> pandas.DataFrame:
    """Return the time of the fastest dense form and the speed-up of each variant over it.

    Args:
        times: From `layer_times`.
    """
    lines = {}
    for layer, by_batch in times.items():
        for name in ("dense", *VARIANTS[layer]):
            lines[layer, name] = {
                f"batch {batch}": f"{layer_time[name]:.0f} us, "
                f"{layer_time['dense'] / layer_time[name]:.1f}x"
                for batch, layer_time in by_batch.items()
            }
    batches = sorted({batch for by_batch in times.values() for batch in by_batch})
    table = pandas.DataFrame.from_dict(lines, orient="index")
    return table.reindex(columns=[f"batch {batch}" for batch in batches]).fillna("")


def kernel_microseconds(estimates: Estimates, name: str) -> float:
    """Return the time of a TPU kernel without the operations around it.

    Args:
        estimates: The estimates.
        name: A key of `programs.KERNEL_TARGETS`.
    """
    parts = estimates.programs[f"kernel {name}"]["operations"]
    return max(part["us"] for part in parts if part["kind"] == "custom-call")


def kernel_over_byte_bound(estimates: Estimates) -> dict[str, float]:
    """Return each TPU kernel's time over that of the bytes that it must read."""
    return {
        name: kernel_microseconds(estimates, name) / estimates.byte_bound(f"kernel {name}")
        for name in programs.KERNEL_TARGETS
    }


def kernel_table(estimates: Estimates) -> pandas.DataFrame:
    """Return time over byte bound of each TPU kernel, its target, and how latency changes it.

    Args:
        estimates: The estimates.
    """
    assumed = 1e6 * bundle_parser.LATENCY
    ratios = kernel_over_byte_bound(estimates)
    lines = {}
    for name, target in programs.KERNEL_TARGETS.items():
        time, bound = kernel_microseconds(estimates, name), estimates.byte_bound(f"kernel {name}")
        lines[f"kernel {name}"] = {
            "us, estimated": f"{time:.1f}",
            "over byte bound": f"{ratios[name]:.2f}",
            "target, at most": target,
        } | {
            f"with {latency} us of latency": f"{(time - assumed + latency) / bound:.2f}"
            for latency in OTHER_LATENCIES
        }
    return pandas.DataFrame.from_dict(lines, orient="index")


def predict(estimates: Estimates, validation: Validation) -> dict[str, dict[str, float]]:
    """Predict the time of every layer and kernel on a chip.

    Args:
        estimates: The estimates.
        validation: Comparison with published times, for the interval.

    Returns:
        Program -> `us`, and `low` and `high`: where eight of ten published times lay.
    """
    low, high = validation.interval
    times = {name: estimates.microseconds(name) for name in estimates.layer_programs()}
    return {name: dict(us=time, low=low * time, high=high * time) for name, time in times.items()}


def time_on_chip(names: Sequence[str]) -> dict[str, list[float]]:
    """Time programs on this machine's TPU.

    Args:
        names: Names of programs, see `programs.headline`.

    Returns:
        Raw seconds by program.
    """
    headline = programs.headline() if names else {}
    return {name: programs.time_program(headline[name]) for name in names}


def prediction_table(
    predicted: Mapping[str, Mapping[str, float]], durations: Mapping[str, Sequence[float]]
) -> pandas.DataFrame:
    """Return measured and predicted microseconds of the recommended or the timed programs.

    Args:
        predicted: From `predict`.
        durations: Raw seconds by program. If there are none, the table has the predictions of the
            recommended programs at batch 1.
    """
    names = list(durations) or [f"{layer}, {name}, b 1" for layer, name in RECOMMENDED.items()]
    lines = {}
    for name in names:
        times = predicted[name]
        seconds = durations.get(name)
        lines[name] = {
            "us, predicted": f"{times['us']:.1f} ({times['low']:.1f} to {times['high']:.1f})",
            "us, measured": f"{1e6 * np.median(seconds):.1f}" if seconds else "not measured",
        }
    return pandas.DataFrame.from_dict(lines, orient="index")


@dataclasses.dataclass(frozen=True)
class TransferredQuality:
    """Quality of the searches, measured on other weights than the shapes here.

    Attributes:
        recall: recall@32 of HiRE-Softmax, from figure 03.
        loss: Relative loss of HiRE-FFN with 5 % of the groups, from figure 06.
    """

    recall: float
    loss: float

    @classmethod
    def read(cls) -> "TransferredQuality":
        """Read the committed records of figures 03 and 06."""
        by_id = {entry["id"]: entry for entry in records.read()}
        recall, loss = (
            records.value(by_id[record], field) for record, field in (RECALL_FIELD, LOSS_FIELD)
        )
        return cls(recall, loss)

    def recall_text(self) -> str:
        """State the recall and where it comes from."""
        return f"recall@32 {self.recall:.3f}, transferred from {RECALL_FIELD[0]}"

    def loss_text(self) -> str:
        """State the relative loss and where it comes from."""
        return f"{self.loss:+.2%} loss by the FFNs, transferred from figure 06"


@dataclasses.dataclass(frozen=True)
class V5eResult(Result):
    """Result of figure 07.

    Attributes:
        estimates: The estimates.
        validation: Comparison with published times.
        times: From `layer_times`.
        predicted: From `predict`.
        durations: From `time_on_chip`.
        quality: Recall and loss of the searches.
        weights: Description of the weights.
    """

    kind: ClassVar[str] = "compiler-estimate"
    tolerance: ClassVar[Mapping[str, float]] = {"default": 0.05}

    estimates: Estimates
    validation: Validation
    times: dict[str, dict[int, dict[str, float]]]
    predicted: dict[str, dict[str, float]]
    durations: dict[str, list[float]]
    quality: TransferredQuality
    weights: str = "shapes alone, no weights"

    def speedup(self, layer: str, batch: int) -> float:
        """Return how many times as fast as dense the recommended variant of a layer is."""
        times = self.times[layer][batch]
        return times["dense"] / times[RECOMMENDED[layer]]

    @property
    def step_speedup(self) -> float:
        """Times as fast as dense a decode step of paper_1b with both searches is, at batch 1."""
        dense, searched = (
            self.estimates.microseconds(f"step paper_1b, {variant}, b 1")
            for variant in ("dense", "both")
        )
        return dense / searched

    @property
    def measured(self) -> dict[str, float]:
        """Median microseconds of the programs that were timed."""
        return {name: 1e6 * float(np.median(values)) for name, values in self.durations.items()}

    def finding(self) -> str:
        """State the estimated speed-ups and how far to trust them."""
        softmax = self.times[WIDE_SOFTMAX][1]
        chip = "" if self.durations else " No chip was used."
        return (
            "The TPU's own compiler estimates that HiRE-Softmax with int8 factors takes "
            f"{softmax[RECOMMENDED[WIDE_SOFTMAX]]:.0f} us on a v5e and the dense one "
            f"{softmax['dense']:.0f}: {self.speedup(WIDE_SOFTMAX, 1):.1f}x at batch 1, "
            f"{self.speedup(WIDE_SOFTMAX, 8):.1f}x at 8 (recall {self.quality.recall:.3f}). The "
            f"FFN with 5 % of its groups out of 10 % is {self.speedup(FFN, 1):.1f}x as fast "
            f"({self.quality.loss:+.2%} loss). Both qualities are transferred. Against "
            f"{len(self.validation.published)} published times the median error is "
            f"{self.validation.median_error:.0%}.{chip}"
        )

    def series(self) -> dict:
        """Return the comparison with published times, the layers' times and the kernels'."""
        return {
            "published over estimated": self.validation.ratios.tolist(),
            "us": {
                f"{layer} {batch}": by_variant
                for layer, by_batch in self.times.items()
                for batch, by_variant in by_batch.items()
            },
            "kernel over byte bound": kernel_over_byte_bound(self.estimates),
        }

    def records(self) -> list[Record]:
        """Return the record of the estimates and, if programs were timed, of their times."""
        return [self._estimate_record(), *([self._chip_record()] if self.durations else [])]

    def _softmax_claim(self, value: float) -> Claim:
        return Claim(
            value=value,
            unit="x, softmax alone",
            quality=self.quality.recall_text(),
            setting="width 2048, batch 1, bfloat16 rows",
            supports=value > claim_limits("softmax-speedup")["speedup"],
        )

    def _estimate_record(self) -> Record:
        softmax = self._softmax_claim(self.speedup(WIDE_SOFTMAX, 1))
        step = Claim(
            value=self.step_speedup,
            unit="x, whole decode step of one billion parameters",
            quality=f"{self.quality.recall_text()}; {self.quality.loss_text()}",
            setting="batch 1, cache 512, 5 % of 10 % of groups",
            supports=self.step_speedup > claim_limits("end-to-end-speedup")["speedup"],
            device=DEVICE,
        )
        low, high = self.validation.interval
        return Record(
            id="v5e",
            kind=self.kind,
            weights=self.weights,
            setting=dict(published_times=len(self.validation.published)),
            results=dict(
                median_error=self.validation.median_error,
                published_over_estimated=dict(low=low, high=high),
                speedups={
                    batch: self.speedup(WIDE_SOFTMAX, batch) for batch in WIDE_SOFTMAX_BATCHES
                },
                ffn_speedup=self.speedup(FFN, 1),
                step_speedup=self.step_speedup,
                kernel_over_byte_bound=kernel_over_byte_bound(self.estimates),
                predicted=self.predicted,
            ),
            claims={
                "softmax-speedup": dataclasses.replace(softmax, device=DEVICE),
                "end-to-end-speedup": step,
            },
        )

    def _chip_record(self) -> Record:
        """Return the record that turns a compiler estimate in the scorecard into a measurement."""
        measured = self.measured
        dense_times = [
            time
            for name, time in measured.items()
            if name.startswith(f"{WIDE_SOFTMAX}, dense") and name.endswith("b 1")
        ]
        hire_time = measured.get(f"{WIDE_SOFTMAX}, {RECOMMENDED[WIDE_SOFTMAX]}, b 1")
        claims = {}
        if dense_times and hire_time:
            claims["softmax-speedup"] = self._softmax_claim(min(dense_times) / hire_time)
        return Record(
            id="v5e-measured",
            weights="random",
            setting={},
            results=measured,
            durations=self.durations,
            claims=claims,
        )

    def plot(self) -> Figure:
        """Draw the comparison with published times, the softmax by operation, and both layers."""
        figure, axes = plots.new_figure(2, 2, height=4)
        self._plot_validation(axes[0, 0])
        self._plot_operations(axes[0, 1])
        self._plot_layer(axes[1, 0], SOFTMAX)
        self._plot_layer(axes[1, 1], FFN)
        return figure

    def _plot_validation(self, axis) -> None:
        measured, validation = self.measured, self.validation
        plots.estimated_against_published(
            axis,
            validation.published | measured,
            validation.estimated | {name: self.estimates.microseconds(name) for name in measured},
            validation.byte_bounds | {name: self.estimates.byte_bound(name) for name in measured},
            f"published: median error {validation.median_error:.0%}; dashes: byte bound",
            title="Estimates against times on a v5e",
        )

    def _plot_operations(self, axis) -> None:
        bars, notes = {}, {}
        for batch in reversed(WIDE_SOFTMAX_BATCHES):
            for variant in ("LR int8 pallas", "LR int8 xla"):
                times, bar = self.times[WIDE_SOFTMAX][batch], f"{variant}, b {batch}"
                bars[bar] = self.estimates.programs[f"{WIDE_SOFTMAX}, {bar}"]["operations"]
                notes[bar] = f"{times['dense'] / times[variant]:.1f}x as fast as dense"
        title = "Softmax 262144 x 2048, by operation"
        plots.operation_bars(axis, bars, notes, xlabel="us, estimated", title=title)

    def _plot_layer(self, axis, layer: str) -> None:
        by_batch, recommended = self.times[layer], RECOMMENDED[layer]
        lines = {
            name: [times[name] / 1e6 for times in by_batch.values()]
            for name in (*VARIANTS[layer], "dense")
        }
        line_colors = (plots.PALETTE[i] for i in (0, 2, 1, 3, 4, 9))
        colors = dict(zip(VARIANTS[layer], line_colors, strict=False)) | {"dense": plots.GRAY}
        bound = f"byte bound, {recommended.removesuffix(' pallas')}"
        lines[bound] = [
            self.estimates.byte_bound(f"{layer}, {recommended}, b {batch}") / 1e6
            for batch in by_batch
        ]
        plots.latency_lines(
            axis,
            list(by_batch),
            lines,
            colors | {bound: "0.7"},
            hollow=[bound],
            unit="us",
            ylabel="us, estimated",
            title=f"Width 1536: {layer.split()[0]}",
        )
        # The lines end in the middle of the axes; the legend is beside them.
        axis.set(xlim=(0.9, 250), ylim=(0.6e6 * min(lines[bound]), None))
        axis.legend(frameon=False, fontsize=8, loc="center right")

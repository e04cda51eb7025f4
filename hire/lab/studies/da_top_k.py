"""Figure 09: recall, bytes and latency of DA-TOP-k over devices."""

import dataclasses
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pandas
from matplotlib.figure import Figure

import hire
from hire.distributed import RowSharding, per_device_k
from hire.lab import records
from hire.lab.data import hidden_state_cache, model_states
from hire.lab.data.model_states import States
from hire.lab.data.text import documents
from hire.lab.figure_index import (
    COMMITTED_PROFILE,
    PROFILE_VARIABLE,
    claim_limits,
    sizes_by_notebook,
)
from hire.lab.metrics import group_sparsity, search_recall
from hire.lab.metrics.intervals import relative_loss
from hire.lab.metrics.model_quality import losses
from hire.lab.studies import multiprocess, plots, tables
from hire.lab.studies.study import Claim, Record, Result
from hire.lab.timing import layer_timing
from hire.lab.tpu import multichip, programs
from hire.lab.training import trainer
from hire.models import Decoder, TextModel
from hire.ops.top_k import TopK, expected_recall, floor_fraction
from hire.timing import medians, speedups
from hire.types import Indices, Queries

NOTEBOOK = "09_da_top_k"
# Name of the mesh axis over which rows are sharded.
AXIS = "chips"
# Sizes of the searched FFN layers; k and k' are fractions of a layer's groups.
GROUP_SIZE = 8
FFN_K_FRACTION = 0.05
FFN_CANDIDATES_FRACTION = 0.1
FFN_RANKS = {"toy": 16, "shipped": 96}
# The FFN layers are evaluated with the first values of `oversample_sigmas`.
FFN_SIGMAS_EVALUATED = 2
# The slice and the batch sizes that the finding states.
SLICE, SLICE_CHIPS = "2x2", 4
ESTIMATED_BATCHES = (1, 8)
# Field of a record in data/records/v5e.jsonl: bytes that arrive at a chip.
DELIVERED_BYTES_FIELD = "bytes_sent"


def request_cpu_devices(namespace: Mapping[str, Any]) -> None:
    """Let JAX split this machine into as many CPU devices as the notebook's sizes say.

    Call it before the first computation: JAX reads the setting when it starts. On a TPU it has no
    effect.

    Args:
        namespace: `globals()` of the notebook, with `profile` and `devices`.

    Raises:
        ValueError: The profile is unknown.
        RuntimeError: JAX has started with another number of CPU devices.
    """
    profile = namespace["profile"]
    if profile == "auto":
        profile = os.environ.get(PROFILE_VARIABLE) or COMMITTED_PROFILE
    count = namespace["devices"] or sizes_by_notebook(profile)[NOTEBOOK]["devices"]
    flag = f"--xla_force_host_platform_device_count={count}"
    flags = os.environ.get("XLA_FLAGS", "")
    if flag not in flags.split():
        os.environ["XLA_FLAGS"] = f"{flags} {flag}"
    if jax.default_backend() == "cpu" and jax.device_count() != count:
        os.environ["XLA_FLAGS"] = flags
        raise RuntimeError(
            f"JAX has started with {jax.device_count()} CPU devices, not {count}: restart the "
            "kernel and run all cells"
        )


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Hidden states of real text and a trained sparse model; no document is in two of the sets.

    Attributes:
        weights: Description of the weights of the model whose softmax is searched.
        calibration: Hidden states that factors are fitted to: speeches and commentary.
        unseen: Hidden states of a novel, to evaluate on.
        unseen_top: True top-k of `unseen`.
        trained: Model with sparse FFN layers.
    """

    weights: str
    calibration: States
    unseen: States
    unseen_top: TopK
    trained: TextModel


def load_inputs(subject: TextModel, settings: SimpleNamespace) -> Inputs:
    """Load the trained sparse model and compute the hidden states that the study needs.

    Args:
        subject: Model whose softmax is searched.
        settings: Sizes of the notebook.
    """
    trained = trainer.trained_model("ladder", toy=settings.models == "toy")
    # Positions early in a window have little context; calibration leaves out the first four.
    calibration = hidden_state_cache.cached_states(
        subject, documents("calibration")[::2], 128, settings.calibration_windows, skip=4
    )
    novel = documents("evaluation", ["novel"])[: settings.evaluation_documents]
    unseen = hidden_state_cache.cached_states(subject, novel)
    return Inputs(
        weights=subject.weights_precision,
        calibration=calibration,
        unseen=unseen,
        unseen_top=hidden_state_cache.true_top_tokens(subject, unseen.hidden, settings.k),
        trained=trained,
    )


def sigmas_name(oversample_sigmas: float) -> str:
    """Return the name of a value of `RowSharding.oversample_sigmas`, such as "3 sigmas"."""
    return f"{oversample_sigmas} sigma" if oversample_sigmas == 1 else f"{oversample_sigmas} sigmas"


def share_recall(
    top: Indices, num_rows: int, oversample_sigmas: Sequence[float]
) -> dict[float, dict[int, dict[str, float]]]:
    """Simulate the recall of exact scores over devices that return only their share of the top-k.

    Args:
        top: Indices `(n, k)` of the true top-k.
        num_rows: Number of rows.
        oversample_sigmas: Values of `RowSharding.oversample_sigmas`.

    Returns:
        Oversampling -> number of devices -> recalls as from `share_recall_of`. The numbers of
        devices are the powers of two up to 256 that leave k rows to every device.
    """
    indices = np.asarray(top)
    device_counts = [2**power for power in range(1, 9) if 2**power * indices.shape[1] <= num_rows]
    return {
        sigmas: {
            devices: share_recall_of(indices, num_rows, devices, sigmas)
            for devices in device_counts
        }
        for sigmas in oversample_sigmas
    }


def share_recall_of(
    top: Indices, num_rows: int, devices: int, oversample_sigmas: float
) -> dict[str, float]:
    """Simulate the recall of exact scores for one number of devices.

    Args:
        top: Indices `(n, k)` of the true top-k.
        num_rows: Number of rows.
        devices: Number of devices.
        oversample_sigmas: Value of `RowSharding.oversample_sigmas`.

    Returns:
        Recalls by order of the rows: "contiguous", "interleaved", "shuffled" (rows in random
        order), and "expected" (the expectation for a random order).
    """
    k = top.shape[1]
    per_device = per_device_k(k, devices, oversample_sigmas)
    shuffled = np.random.default_rng(0).permutation(num_rows)[top]
    device_by_order = {
        "contiguous": top // math.ceil(num_rows / devices),
        "interleaved": top % devices,
        "shuffled": shuffled % devices,
    }
    recalls = {}
    for order, device in device_by_order.items():
        counts = np.zeros((len(top), devices), int)
        np.add.at(counts, (np.arange(len(top))[:, None], device), 1)
        recalls[order] = float(np.minimum(counts, per_device).sum(1).mean() / k)
    expected = expected_recall(num_rows, k, buckets=devices, per_bucket=per_device)
    return recalls | {"expected": expected}


def share_table(recalls: Mapping[float, Mapping[int, Mapping[str, float]]]) -> pandas.DataFrame:
    """Return the result of `share_recall` as a table, one column per number of devices."""
    by_devices = next(iter(recalls.values()))
    orders = next(iter(by_devices.values()))
    rows = {
        f"{sigmas_name(sigmas)}, {order}": [recall[order] for recall in of_sigmas.values()]
        for sigmas, of_sigmas in recalls.items()
        for order in orders
    }
    return tables.series_table(rows, [f"{devices} devices" for devices in by_devices])


def judge(
    softmax: hire.HireSoftmax, inputs: Inputs, settings: SimpleNamespace
) -> dict[str, dict[str, dict]]:
    """Measure the recall of a softmax on one device and sharded over the mesh.

    Args:
        softmax: Softmax on one device.
        inputs: Hidden states; every n-th of the unseen ones is evaluated on.
        settings: Sizes of the notebook.

    Returns:
        "one device" or "<order>, <sigmas> sigmas" -> `recall` and `top1`, see
        `search_recall.judge`. The order is "contiguous" or "interleaved".
    """
    states, top = jax.tree.map(
        lambda part: part[:: settings.eval_stride], (inputs.unseen, inputs.unseen_top)
    )
    judged = {"one device": search_recall.judge(softmax, states, top)}
    for order in ("contiguous", "interleaved"):
        sharded = softmax.sharded(RowSharding(AXIS, interleaved=order == "interleaved"))
        axis = RowSharding.of(sharded.axis or "")
        for sigmas in (*settings.oversample_sigmas, math.inf):
            variant = dataclasses.replace(
                sharded, axis=dataclasses.replace(axis, oversample_sigmas=sigmas)
            )
            name = f"{order}, {sigmas_name(sigmas)}"
            judged[name] = search_recall.judge(variant, states, top)
    return judged


@dataclasses.dataclass(frozen=True)
class Timing:
    """Measurements of the variants of `multichip.variants` on the devices of this machine.

    Attributes:
        devices: Number of devices.
        durations: Batch size -> variant -> raw durations in seconds.
        delivered_bytes: Batch size -> variant -> bytes that the collectives of the compiled program
            deliver to each device.
    """

    devices: int
    durations: dict[int, dict[str, list[float]]]
    delivered_bytes: dict[int, dict[str, float]]

    def speedups(self) -> dict[int, dict[str, float]]:
        """Return speed-ups over "HiRE gathered" by batch size and variant."""
        return {
            batch: speedups(durations, "HiRE gathered")
            for batch, durations in self.durations.items()
        }

    def table(self) -> pandas.DataFrame:
        """Return one row per variant: time and bytes at each batch size."""
        columns = {}
        for batch, durations in self.durations.items():
            columns[f"ms, batch {batch}"] = {
                variant: f"{1e3 * seconds:.2f}" for variant, seconds in medians(durations).items()
            }
            columns[f"bytes delivered, batch {batch}"] = {
                variant: f"{nbytes:,.0f}" for variant, nbytes in self.delivered_bytes[batch].items()
            }
        return pandas.DataFrame(columns)


def time_batches(sharded: hire.HireSoftmax, hidden: Queries, settings: SimpleNamespace) -> Timing:
    """Time every variant at every batch size.

    Args:
        sharded: Softmax, sharded over the mesh.
        hidden: Hidden states `(n, d)` to draw queries from.
        settings: Sizes of the notebook.
    """
    variants = list(multichip.variants(sharded))
    durations, delivered_bytes = {}, {}
    for batch in settings.batches:
        queries = layer_timing.slices(hidden, batch, settings.repeats)
        times = multichip.time_variants(sharded, variants, queries)
        durations[batch], delivered_bytes[batch] = times.durations, times.delivered_bytes
    return Timing(jax.device_count(), durations, delivered_bytes)


def searched_ffns(model: Decoder, windows: np.ndarray, rank: int) -> list[hire.HireFFN]:
    """Fit the search of every FFN layer to the layer's inputs on text.

    Args:
        model: Trained sparse model.
        windows: Windows `(w, t)` of text to fit to.
        rank: Rank of the estimators.
    """
    inputs = group_sparsity.ffn_inputs(model, windows)
    ffns = []
    for ffn, x in zip(group_sparsity.layers_of(model), inputs, strict=True):
        up, down = ffn.up[...], ffn.down[...]
        num_groups = len(up) // GROUP_SIZE
        calibration = x.reshape(-1, x.shape[-1])
        searched = hire.HireFFN(
            up,
            down,
            hire.LowRank.fit(up, rank, calibration=calibration, bits=8),
            group_size=GROUP_SIZE,
            k=floor_fraction(FFN_K_FRACTION, num_groups),
            candidates=floor_fraction(FFN_CANDIDATES_FRACTION, num_groups),
        )
        ffns.append(searched)
    return ffns


def sharded_ffn_loss(
    trained: TextModel, settings: SimpleNamespace
) -> dict[str, dict[str, dict[str, float]]]:
    """Compare the loss of sharded FFN layers with that of the same layers on one device.

    Args:
        trained: Trained sparse model.
        settings: Sizes of the notebook.

    Returns:
        Oversampling, such as "0 sigmas" -> `relative_loss` -> interval over documents, see
        `intervals.relative_loss`.
    """
    count = settings.ffn_windows
    calibration, _ = model_states.windows(
        trained, documents("calibration"), settings.length, 2, limit=count
    )
    novel, names = model_states.windows(
        trained, documents("evaluation", ["novel"]), settings.length, limit=2 * count
    )
    usage = group_sparsity.sets_kept(trained.model, calibration).mean((1, 2))
    model = group_sparsity.most_used_first(trained.model, usage)
    ffns = searched_ffns(model, calibration, FFN_RANKS[settings.models])
    baseline = document_losses(hire.convert(model, ffn=ffns), novel, names)
    loss_by_sigmas = {}
    for sigmas in settings.oversample_sigmas[:FFN_SIGMAS_EVALUATED]:
        sharded = [ffn.sharded(RowSharding(AXIS, sigmas)) for ffn in ffns]
        sharded_losses = document_losses(hire.convert(model, ffn=sharded), novel, names)
        loss_by_sigmas[sigmas_name(sigmas)] = dict(
            relative_loss=relative_loss(sharded_losses, baseline)
        )
    return loss_by_sigmas


def document_losses(model: Decoder, windows: np.ndarray, names: np.ndarray) -> np.ndarray:
    """Return the summed next-token loss of each document, in nats.

    Args:
        model: The model.
        windows: Windows `(w, t)` of text.
        names: Document `(w,)` of each window.
    """
    states = model_states.collect(model, windows, names)
    _, document = np.unique(states.documents, return_inverse=True)
    return np.bincount(document, losses(model, states))


def launch_processes(process_counts: Iterable[int]) -> dict[int, dict[str, Any]]:
    """Run DA-TOP-k on several processes, for each number of them, and print a table of each run.

    Args:
        process_counts: Numbers of processes; each process has one device.

    Returns:
        Results of `multiprocess.launch` by number of processes.
    """
    results = {}
    for count in process_counts:
        results[count] = multiprocess.launch(count)
        print(multiprocess.table(results[count]))
    return results


@dataclasses.dataclass(frozen=True)
class Estimates:
    """Estimates of the TPU's compiler for slices of a v5e, as committed in data/records.

    Attributes:
        results: Program -> batch size -> slice, such as "2x2" -> results of the record. Programs
            are the keys of `multichip.NAMES`.
    """

    results: dict[str, dict[int, dict[str, dict]]]

    def values(self, program: str, batch: int, field: str) -> dict[str, float]:
        """Return one field of a program's records by slice.

        Args:
            program: Name of the program.
            batch: Batch size.
            field: "seconds", "floor" (seconds that the bytes to read take at HBM bandwidth) or
                DELIVERED_BYTES_FIELD.
        """
        return {
            slice_name: record[field] for slice_name, record in self.results[program][batch].items()
        }

    def speedup(self, program: str, base: str, batch: int) -> dict[str, float]:
        """Return the speed-up of a program over another one by slice."""
        base_seconds = self.values(base, batch, "seconds")
        seconds = self.values(program, batch, "seconds")
        return {
            slice_name: base_seconds[slice_name] / seconds[slice_name] for slice_name in seconds
        }

    def table(self) -> pandas.DataFrame:
        """Return estimated microseconds, one row per program and batch size."""
        rows = {}
        for program, by_batch in self.results.items():
            for batch in by_batch:
                seconds = self.values(program, batch, "seconds").values()
                rows[f"{program}, batch {batch}"] = [f"{1e6 * value:.0f}" for value in seconds]
        columns = [f"us, {chips} chips" for chips in multichip.CHIPS.values()]
        return pandas.DataFrame.from_dict(rows, orient="index", columns=columns)


def load_estimates() -> Estimates:
    """Read the committed estimates of all programs."""
    results = {record["id"]: record["results"] for record in records.read(topic="v5e")}
    slices = [topology.removeprefix("v5e:") for topology in multichip.CHIPS]
    return Estimates(
        {
            program: {
                batch: {
                    slice_name: results[f"softmax on {slice_name}, {program}, b {batch}"]
                    for slice_name in slices
                }
                for batch in ESTIMATED_BATCHES
            }
            for program in multichip.NAMES
        }
    )


@dataclasses.dataclass(frozen=True)
class DaTopKResult(Result):
    """Result of figure 09.

    Attributes:
        settings: Sizes of the notebook.
        model_weights: Description of the weights of the model whose softmax is searched.
        recalls: From `share_recall`.
        judged: From `judge`.
        timing: From `time_batches`.
        ffn_loss: From `sharded_ffn_loss`.
        processes: From `launch_processes`.
        estimates: From `load_estimates`.
        weights: `model_weights`, with a note that the numbers for a v5e are estimates.
    """

    settings: SimpleNamespace
    model_weights: str
    recalls: dict[float, dict[int, dict[str, float]]]
    judged: dict[str, dict[str, dict]]
    timing: Timing
    ffn_loss: dict[str, dict[str, dict[str, float]]]
    processes: dict[int, dict[str, Any]]
    estimates: Estimates = dataclasses.field(default_factory=load_estimates)
    weights: str = dataclasses.field(init=False)
    tolerance = {"default": 0.05}

    def __post_init__(self):
        note = f"{self.model_weights}; times and bytes on a v5e are estimates by the TPU's compiler"
        object.__setattr__(self, "weights", note)

    def estimated_speedups(self) -> dict[int, dict[str, dict[str, float]]]:
        """Return the estimated speed-ups of "HiRE DA": batch size -> baseline -> slice."""
        return {
            batch: {
                base: self.estimates.speedup("HiRE DA", base, batch)
                for base in ("HiRE gathered", "HiRE compiler")
            }
            for batch in ESTIMATED_BATCHES
        }

    def sharded_recall(self) -> float:
        """Return the recall on all devices, with interleaved rows and the most oversampling."""
        sigmas = self.settings.oversample_sigmas[-1]
        return self.judged[f"interleaved, {sigmas_name(sigmas)}"]["recall"]["mean"]

    def one_device_recall(self) -> float:
        """Return the recall on one device."""
        return self.judged["one device"]["recall"]["mean"]

    def finding(self) -> str:
        """State the estimated speed-ups and bytes on four chips, and recall on several devices."""
        one, eight = (
            self.estimated_speedups()[batch]["HiRE gathered"][SLICE] for batch in ESTIMATED_BATCHES
        )
        nbytes, gathered_bytes = (
            self.estimates.values(program, 1, DELIVERED_BYTES_FIELD)[SLICE]
            for program in ("HiRE DA", "HiRE gathered")
        )
        return (
            f"By the estimate of the TPU's compiler, DA-TOP-k on {SLICE_CHIPS} v5e chips makes "
            f"HiRE-Softmax {one:.1f}x as fast as gathering all scores at batch 1, and {eight:.1f}x "
            f"at batch 8. {nbytes:,.0f} bytes of a query reach a chip, not {gathered_bytes:,.0f}. "
            f"Recall is {self.sharded_recall():.4f} on {self.timing.devices} devices with "
            f"interleaved rows, and {self.one_device_recall():.4f} on one device. "
            "Nothing was measured on a v5e."
        )

    def series(self) -> dict:
        """Return the simulated recalls and the estimated speed-ups."""
        recalls = {str(sigmas): of_sigmas for sigmas, of_sigmas in self.recalls.items()}
        return dict(share_recall=recalls, speedup=self.estimated_speedups())

    def records(self) -> list[Record]:
        """Return the record of what was measured here, and that of the estimates."""
        settings = self.settings
        measured = Record(
            id="da-top-k",
            weights=self.model_weights,
            setting=dict(
                k=settings.k,
                rank=settings.rank,
                candidates=settings.candidates,
                devices=self.timing.devices,
            ),
            results=dict(
                quality=self.judged,
                ffn_loss=self.ffn_loss,
                delivered_bytes=self.timing.delivered_bytes,
                speedups=self.timing.speedups(),
                share_recall=self.series()["share_recall"],
                processes=self.processes,
            ),
            durations=self.timing.durations,
        )
        dense_speedups = {
            batch: self.estimates.speedup("dense DA", "dense compiler", batch)
            for batch in ESTIMATED_BATCHES
        }
        estimated = Record(
            id="da-top-k-v5e",
            kind="compiler-estimate",
            weights="shapes alone, no weights",
            setting=dict(k=programs.TOP_K, candidates=programs.CANDIDATES),
            results=dict(speedups=self.estimated_speedups(), dense_speedups=dense_speedups),
            claims={"da-top-k": self._claim()},
        )
        return [measured, estimated]

    def _claim(self) -> Claim:
        speedup = self.estimated_speedups()[1]["HiRE gathered"][SLICE]
        return Claim(
            value=speedup,
            unit="x, HiRE-Softmax with DA-TOP-k over gathered scores",
            quality=f"recall@{self.settings.k} {self.sharded_recall():.4f} on "
            f"{self.timing.devices} devices, {self.one_device_recall():.4f} on one, "
            f"{self.model_weights}",
            setting=f"softmax {programs.VOCABULARY} x {multichip.WIDTH}, batch 1, v5e {SLICE}",
            supports=speedup > claim_limits("da-top-k")["speedup"],
            device=f"TPU v5e {SLICE}, by its compiler",
        )

    def plot(self) -> Figure:
        """Draw the bytes of a query, the recall of shares, and bytes and time over v5e chips."""
        figure, axes = plots.new_figure(2, 2, height=4)
        self._plot_bytes_sent(axes[0, 0])
        self._plot_share_recall(axes[0, 1])
        self._plot_bytes_by_chips(axes[1, 0])
        self._plot_time_by_chips(axes[1, 1])
        return figure

    def _plot_bytes_sent(self, axis) -> None:
        nbytes = {
            program: self.estimates.values(program, 1, DELIVERED_BYTES_FIELD)[SLICE]
            for program in ("HiRE gathered", "HiRE DA")
        }
        variants = {
            "HiRE, gathered": ("every score", nbytes["HiRE gathered"]),
            "DA-TOP-k": ("its share of the top-k", nbytes["HiRE DA"]),
        }
        plots.bytes_sent_by_chip(
            axis, SLICE_CHIPS, variants, title="What a chip sends for one query, as compiled"
        )

    def _plot_share_recall(self, axis) -> None:
        color_by_order = {
            "contiguous": plots.RED,
            "interleaved": plots.BLUE,
            "expected": plots.GRAY,
        }
        sigmas_values = self.settings.oversample_sigmas
        lines, colors = {}, {}
        for sigmas in (sigmas_values[0], sigmas_values[-1]):
            by_devices = self.recalls[sigmas]
            for order, color in color_by_order.items():
                name = f"{order}, {sigmas_name(sigmas)}"
                lines[name] = (list(by_devices), [recall[order] for recall in by_devices.values()])
                colors[name] = color
        plots.share_lines(
            axis,
            lines,
            colors,
            ticks=list(self.recalls[sigmas_values[0]]),
            xlabel="devices",
            ylabel="recall of exact top-k",
            title="Recall of shares of the exact top-k",
            xlim=(1.8, 2500),
            ylim=(0, 1.15),
        )

    def _plot_bytes_by_chips(self, axis) -> None:
        colors = self._program_colors()
        lines = {
            program: list(self.estimates.values(program, 1, DELIVERED_BYTES_FIELD).values())
            for program in colors
        }
        plots.chip_lines(
            axis,
            list(multichip.CHIPS.values()),
            lines,
            colors,
            ylabel="bytes that arrive at a chip",
            title="Bytes of a query, by the compiled programs",
        )

    def _plot_time_by_chips(self, axis) -> None:
        colors = self._program_colors()
        lines = {program: self._microseconds(program, "seconds") for program in colors}
        lines["HBM bound"] = self._microseconds("HiRE DA", "floor")
        plots.chip_lines(
            axis,
            list(multichip.CHIPS.values()),
            lines,
            colors | {"HBM bound": plots.GRAY},
            ylabel="us, estimated by the compiler",
            title=f"Softmax {programs.VOCABULARY} x {multichip.WIDTH}, batch 1: estimates",
        )

    def _microseconds(self, program: str, field: str) -> list[float]:
        return [1e6 * seconds for seconds in self.estimates.values(program, 1, field).values()]

    def _program_colors(self) -> dict[str, str]:
        return {
            "HiRE gathered": plots.RED,
            "HiRE compiler": plots.ORANGE,
            "HiRE DA": plots.BLUE,
            "HiRE DA pallas": plots.GREEN,
        }

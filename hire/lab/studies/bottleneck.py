"""Figure 01: where the bytes and the time of a decode step go."""

import dataclasses
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pandas
from flax import nnx
from matplotlib.figure import Figure

from hire import timing
from hire.lab.data import model_states
from hire.lab.data.text import documents
from hire.lab.figure_index import claim_limits
from hire.lab.metrics import model_quality, numpy_decoder
from hire.lab.studies import plots
from hire.lab.studies.study import Claim, Record, Result
from hire.lab.timing import decode_step, roofline
from hire.models import Decoder, DecoderConfig, TextModel, generate, load, preset
from hire.models.weights import gguf_names
from hire.types import Queries

# Gemma 3, and our choice of a shape for the paper's model of one billion parameters.
SHAPES = ("gemma3_270m", "gemma3_1b", "paper_1b")
# Text that the model is compared with its reference on.
REFERENCE_KINDS = ("novel", "speech")
REFERENCE_DOCUMENT_STRIDE = 5
REFERENCE_WINDOW = 128
# So many greedy tokens are compared, after so many of a text.
GREEDY_TOKENS, GREEDY_PROMPT = 100, 16
PARTS = {"softmax": decode_step.softmax, "ffn": decode_step.ffn, "attention": decode_step.attention}
FLOAT32_BYTES, BFLOAT16_BYTES = 4, 2
# The lower bounds for a v5e are computed at these sizes.
V5E_BATCHES = tuple(2**power for power in range(12))
V5E_CACHE_LENGTH = 512
# The lowest batch at which a v5e needs longer for arithmetic than for reading bfloat16 weights.
V5E_COMPUTE_BOUND_BATCH = roofline.compute_bound_from(roofline.V5E, itemsize=BFLOAT16_BYTES)
# Criteria of the claims memory-bound and softmax-share, see figures/claims.yaml.
MEMORY_BOUND_TIME = claim_limits("memory-bound")["time_fraction"]
SOFTMAX_SHARE = claim_limits("softmax-share")["bytes_fraction"]


def shapes() -> dict[str, DecoderConfig]:
    """Return the shapes that are compared, by name."""
    return {name: preset(name) for name in SHAPES}


def weight_count(shape: DecoderConfig) -> int:
    """Count the weights of a decoder without allocating them."""
    model = nnx.eval_shape(lambda: Decoder(shape, rngs=nnx.Rngs(0)))
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def softmax_share(shape: DecoderConfig) -> float:
    """Return the softmax's share of the weights, which a step at batch 1 reads once."""
    counts = shape.parameters()
    return counts["softmax"] / sum(counts.values())


def size_table(shapes: Mapping[str, DecoderConfig]) -> pandas.DataFrame:
    """Return the weights of each shape, their bytes in bfloat16 and each part's share.

    Args:
        shapes: Shapes by name.
    """
    lines = {}
    for name, shape in shapes.items():
        count = weight_count(shape)
        nbytes = BFLOAT16_BYTES * count
        lines[name] = {
            "weights": f"{count:,}",
            "GB in bfloat16": f"{nbytes / 1e9:.2f}",
            f"fits a {roofline.V5E.name}": nbytes < roofline.V5E.memory,
        } | {
            part: f"{weights / count:.0%}"
            for part, weights in shape.parameters().items()
            if part != "norms"
        }
    return pandas.DataFrame.from_dict(lines, orient="index")


@dataclasses.dataclass(frozen=True)
class ReferenceCheck:
    """Perplexity of the JAX model and of the reference in numpy, on the same windows.

    Attributes:
        weights: Description of the weights.
        perplexity: Perplexity of the JAX model.
        reference_perplexity: Perplexity of the reference.
        tokens: Number of tokens that both predicted.
        documents: Number of documents that they come from.
        same_greedy_tokens: How many of GREEDY_TOKENS tokens that the JAX model writes the reference
            picks, too.
    """

    weights: str
    perplexity: float
    reference_perplexity: float
    tokens: int
    documents: int
    same_greedy_tokens: int

    @property
    def relative_difference(self) -> float:
        """Distance of the two perplexities, relative to the reference's."""
        return abs(self.perplexity / self.reference_perplexity - 1)

    def cells(self) -> dict[str, str | int]:
        """Return the comparison as the cells of a table."""
        return dict(
            perplexity=f"{self.perplexity:.3f}",
            reference=f"{self.reference_perplexity:.3f}",
            difference=f"{self.relative_difference:.1e}",
            tokens=self.tokens,
            documents=self.documents,
        ) | {f"same of {GREEDY_TOKENS} greedy tokens": self.same_greedy_tokens}


def compare_with_reference(subject: TextModel, document_count: int) -> ReferenceCheck:
    """Compare the model with the numpy reference: its perplexity on text, and greedy text.

    Args:
        subject: The model.
        document_count: Number of documents; one window of each is read.
    """
    texts = documents("evaluation", list(REFERENCE_KINDS))[::REFERENCE_DOCUMENT_STRIDE]
    tokens, names = model_states.windows(subject, texts[:document_count], REFERENCE_WINDOW)
    states = model_states.collect(subject.model, tokens, names, skip=0)
    weight, config = gguf_names(subject.model).__getitem__, subject.model.config
    losses = model_quality.losses(subject.model, states)
    reference_losses = [numpy_decoder.losses(window, weight, config) for window in tokens]
    prompt = tokens[0, :GREEDY_PROMPT]
    greedy_tokens = np.asarray(generate(subject.model, prompt, new_tokens=GREEDY_TOKENS))
    hidden = numpy_decoder.hidden_states(greedy_tokens[:-1], weight, config)[GREEDY_PROMPT - 1 :]
    picked = numpy_decoder.logits(hidden, weight, config).argmax(axis=1)
    return ReferenceCheck(
        weights=subject.weights_precision,
        perplexity=float(np.exp(np.mean(losses))),
        reference_perplexity=float(np.exp(np.mean(np.concatenate(reference_losses)))),
        tokens=len(losses),
        documents=len(names),
        same_greedy_tokens=int(np.sum(picked == greedy_tokens[GREEDY_PROMPT:])),
    )


def compare_with_references(
    subject: TextModel, settings: SimpleNamespace
) -> dict[str, ReferenceCheck]:
    """Compare the model of the figure and those of other families with the numpy reference.

    Args:
        subject: The model of the figure.
        settings: Sizes of the notebook.

    Returns:
        The comparison by model.
    """
    subjects = {settings.model_name: subject}
    return {
        name: compare_with_reference(subjects.get(name) or load(name), settings.reference_documents)
        for name in [settings.model_name, *settings.other_models]
    }


def reference_table(references: Mapping[str, ReferenceCheck]) -> pandas.DataFrame:
    """Return the comparisons as a table, one row for each model."""
    rows = {name: reference.cells() for name, reference in references.items()}
    return pandas.DataFrame.from_dict(rows, orient="index")


@dataclasses.dataclass(frozen=True)
class PartTimes:
    """Times and bytes of a decode step at batch 1 and of its parts, in float32.

    Attributes:
        config: Shape of the model.
        cache_length: Length of the key/value cache in tokens.
        durations: Raw seconds of `step`, of each part alone and of `stream`, which reads one large
            array. They were timed in turn.
        stream_bytes: Bytes that `stream` reads.
        sittings: Number of sittings, from each of which equally many durations are.
    """

    config: DecoderConfig
    cache_length: int
    durations: dict[str, list[float]]
    stream_bytes: int
    sittings: int

    @property
    def seconds(self) -> dict[str, float]:
        """Median seconds by function."""
        return timing.medians(self.durations)

    @property
    def bandwidth(self) -> float:
        """Bandwidth of this machine's memory in bytes/s."""
        return self.stream_bytes / self.seconds["stream"]

    @property
    def part_bytes(self) -> dict[str, float]:
        """Bytes that a step reads, by part of `roofline.step_work`."""
        work = roofline.step_work(
            self.config, batch=1, cache=self.cache_length, itemsize=FLOAT32_BYTES
        )
        return {part: nbytes for part, (nbytes, _) in work.items()}

    @property
    def step_bytes(self) -> float:
        """Bytes that a step reads."""
        return sum(self.part_bytes.values())

    @property
    def bytes_fraction(self) -> dict[str, float]:
        """Each part's share of the step's bytes. `rest` is the norms and the cache."""
        shares = {part: self.part_bytes[part] / self.step_bytes for part in PARTS}
        return shares | {"rest": 1 - sum(shares.values())}

    @property
    def time_fraction(self) -> dict[str, float]:
        """Each part's share of the step's time, as it takes alone.

        `rest` is what the parts do not explain: norms, dispatch, selection of the token.
        """
        shares = {part: self.seconds[part] / self.seconds["step"] for part in PARTS}
        return shares | {"rest": max(0.0, 1 - sum(shares.values()))}

    @property
    def reading_share(self) -> float:
        """Time of reading the step's bytes at this bandwidth, as a share of the step's time."""
        return self.step_bytes / self.bandwidth / self.seconds["step"]

    @property
    def reading_share_range(self) -> tuple[float, float]:
        """Lowest and highest `reading_share` of the sittings."""
        reads = self.step_bytes / self.stream_bytes
        low, high = timing.speedup_range(self.durations, "step", "stream", self.sittings)
        return reads * low, reads * high

    def table(self) -> pandas.DataFrame:
        """Return milliseconds and shares of time and bytes, one row per part."""
        lines = {
            part: {
                "ms, median": f"{1e3 * share * self.seconds['step']:.2f}",
                "share of the time": f"{share:.1%}",
                "share of the bytes": f"{self.bytes_fraction[part]:.1%}",
            }
            for part, share in self.time_fraction.items()
        }
        return pandas.DataFrame.from_dict(lines, orient="index")


def random_queries(width: int, count: int) -> list[Queries]:
    """Return random hidden states (1, width) to time with, always the same."""
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=(1, width)), jnp.float32) for _ in range(count)]


def time_step(
    steps: decode_step.StepForms, config: DecoderConfig, settings: SimpleNamespace
) -> tuple[PartTimes, dict[int, list[float]]]:
    """Time a decode step, its parts alone and a read of one large array, then steps of batches.

    Args:
        steps: The model's step as functions to time.
        config: Shape of the model.
        settings: Sizes of the notebook.

    Returns:
        The step at batch 1 with its parts, in turn with the read; raw seconds of the step by batch
        size. Equally many are from each sitting.
    """
    queries = random_queries(config.width, settings.repeats)
    stream, stream_bytes = timing.stream_form(settings.stream_bytes)
    parts = {name: steps.part(function) for name, function in PARTS.items()}
    functions = {"step": steps.complete_step(), **parts, "stream": stream}
    comparisons: dict = {"parts": (functions, queries)}
    for batch in settings.batches:
        forms = {"step": steps.complete_step(batch)}
        comparisons[batch] = forms, queries[: settings.batch_repeats]
    durations = timing.in_sittings(comparisons, settings.sittings)
    return (
        PartTimes(
            config, settings.cache_length, durations["parts"], stream_bytes, settings.sittings
        ),
        {batch: durations[batch]["step"] for batch in settings.batches},
    )


def byte_bound_seconds(parts: PartTimes, batches: Sequence[int]) -> list[float]:
    """Return the seconds that reading a step's bytes takes on this machine, by batch size."""
    this_machine = roofline.Chip("this machine", parts.bandwidth, float("inf"), 0.0)
    return roofline.step_seconds(
        parts.config, batches, this_machine, cache=parts.cache_length, itemsize=FLOAT32_BYTES
    )


def batch_table(
    parts: PartTimes, durations_by_batch: Mapping[int, Sequence[float]]
) -> pandas.DataFrame:
    """Return the time of a step and of reading its bytes, one row per batch size.

    Args:
        parts: The step at batch 1, for the bandwidth and the bytes.
        durations_by_batch: Raw seconds of the step by batch size.
    """
    bounds = byte_bound_seconds(parts, list(durations_by_batch))
    lines = {}
    for (batch, durations), bound in zip(durations_by_batch.items(), bounds, strict=True):
        median = float(np.median(durations))
        lines[batch] = {
            "ms, median": f"{1e3 * median:.2f}",
            "range of the calls": f"{1e3 * min(durations):.2f} to {1e3 * max(durations):.2f}",
            "ms for its bytes": f"{1e3 * bound:.2f}",
            "step over bytes": f"{median / bound:.2f}x",
            "ms per token": f"{1e3 * median / batch:.2f}",
        }
    table = pandas.DataFrame.from_dict(lines, orient="index")
    return table.rename_axis(index="batch")


def v5e_step_seconds(shapes: Mapping[str, DecoderConfig]) -> dict[str, list[float]]:
    """Return the lower bound of a decode step on a v5e in bfloat16, at each of V5E_BATCHES.

    Args:
        shapes: Shapes by name.

    Returns:
        Seconds by name of the shape.
    """
    return {
        name: roofline.step_seconds(
            shape, V5E_BATCHES, roofline.V5E, cache=V5E_CACHE_LENGTH, itemsize=BFLOAT16_BYTES
        )
        for name, shape in shapes.items()
    }


@dataclasses.dataclass(frozen=True)
class BottleneckResult(Result):
    """Result of figure 01.

    Attributes:
        settings: Sizes of the notebook.
        weights: Description of the weights.
        references: Comparisons with the numpy reference, by model.
        parts: The decode step at batch 1 and its parts.
        durations_by_batch: Raw seconds of the step by batch size.
        v5e_seconds: From `v5e_step_seconds`.
    """

    tolerance: ClassVar[Mapping[str, float]] = {
        "default": 1e-6,
        "share of time": 1.0,
        "step over byte bound": 0.4,
        "ms by batch": 1.0,
    }

    settings: SimpleNamespace
    weights: str
    references: dict[str, ReferenceCheck]
    parts: PartTimes
    durations_by_batch: dict[int, list[float]]
    v5e_seconds: dict[str, list[float]]

    @property
    def step_seconds(self) -> list[float]:
        """Median seconds of the step, by batch size."""
        return [float(np.median(durations)) for durations in self.durations_by_batch.values()]

    def finding(self) -> str:
        """State how far a step is from its byte bound, and the softmax's share of it."""
        return (
            f"At batch 1 a decode step of {self.settings.model_name} takes "
            f"{1 / self.parts.reading_share:.2f}x the time of reading its bytes. The softmax is "
            f"{self.parts.bytes_fraction['softmax']:.0%} of the bytes and "
            f"{self.parts.time_fraction['softmax']:.0%} of the time. On a v5e, reading the weights "
            f"takes longer than computing with them below a batch of {V5E_COMPUTE_BOUND_BATCH}."
        )

    def series(self) -> dict:
        """Return shares by part, times by batch size and the bounds for a v5e."""
        return {
            "share of bytes": list(self.parts.bytes_fraction.values()),
            "share of time": list(self.parts.time_fraction.values()),
            "step over byte bound": [1 / self.parts.reading_share],
            "ms by batch": milliseconds(self.step_seconds),
        } | {f"v5e ms {name}": milliseconds(values) for name, values in self.v5e_seconds.items()}

    def records(self) -> list[Record]:
        """Return the records of the references, of the measured step and of the paper's shape."""
        references = [self._reference_record(*item) for item in self.references.items()]
        return [*references, self._step_record(), paper_shape_record()]

    def _reference_record(self, name: str, reference: ReferenceCheck) -> Record:
        return Record(
            id=f"perplexity/{name}",
            weights=reference.weights,
            setting=dict(kinds=list(REFERENCE_KINDS), window=REFERENCE_WINDOW),
            results=dict(
                perplexity=reference.perplexity,
                reference_perplexity=reference.reference_perplexity,
                relative_difference=reference.relative_difference,
                tokens=reference.tokens,
                documents=reference.documents,
                greedy_tokens=GREEDY_TOKENS,
                same_greedy_tokens=reference.same_greedy_tokens,
            ),
        )

    def _step_record(self) -> Record:
        settings, parts = self.settings, self.parts
        setting = f"{settings.model_name}, batch 1, float32"
        low, high = parts.reading_share_range
        memory_bound = Claim(
            value=parts.reading_share,
            low=low,
            high=high,
            unit="share of the step's time that reading its bytes takes",
            quality=f"the exact model, {self.weights}",
            setting=setting,
            supports=parts.reading_share >= MEMORY_BOUND_TIME,
        )
        softmax = parts.bytes_fraction["softmax"]
        share = Claim(
            value=softmax,
            unit="share of the step's bytes",
            quality=f"{parts.time_fraction['softmax']:.0%} of the measured time, {self.weights}",
            setting=setting,
            supports=softmax >= SOFTMAX_SHARE,
        )
        by_batch = {
            f"step at batch {batch}": durations
            for batch, durations in self.durations_by_batch.items()
        }
        return Record(
            id=f"bottleneck/{settings.model_name}",
            weights=self.weights,
            setting=dict(
                batch=1,
                batches=settings.batches,
                cache_length=settings.cache_length,
                dtype="float32",
            ),
            results=dict(
                step_over_byte_bound=1 / parts.reading_share,
                bandwidth=parts.bandwidth,
                bytes_fraction=parts.bytes_fraction,
                time_fraction=parts.time_fraction,
                step_seconds=self.step_seconds,
                sittings=parts.sittings,
            ),
            durations=parts.durations | by_batch,
            claims={"memory-bound": memory_bound, "softmax-share": share},
        )

    def plot(self) -> Figure:
        """Draw the shares of a step, its time by batch size, and the bounds for a v5e."""
        figure, axes = plots.new_figure(1, 3, height=3.9)
        self._plot_shares(axes[0, 0])
        self._plot_batches(axes[0, 1])
        self._plot_v5e(axes[0, 2])
        return figure

    def _plot_shares(self, axis) -> None:
        plots.share_bars(
            axis,
            {"time\n(measured)": self.parts.time_fraction, "bytes": self.parts.bytes_fraction},
            xlabel="share of one decode step, batch 1",
            title=f"A step of {self.settings.model_name}",
        )

    def _plot_batches(self, axis) -> None:
        batches = list(self.durations_by_batch)
        measured = milliseconds(self.step_seconds)
        bounds = milliseconds(byte_bound_seconds(self.parts, batches))
        plots.draw_line(axis, batches, measured, plots.RED)
        ranges = timing.sitting_ranges(self.durations_by_batch, self.parts.sittings)
        low, high = np.transpose(list(ranges.values()))
        axis.fill_between(batches, 1e3 * low, 1e3 * high, color=plots.RED, alpha=0.2, lw=0)
        plots.draw_line(axis, batches, bounds, "0.4", marker="", linestyle="--")
        # Left of its line at the top, and above its line where that is flat.
        first, last = batches[0], batches[-1]
        plots.label(axis, last, measured[-1], "measured", plots.RED, offset=(-12, 0), ha="right")
        plots.label(axis, first, bounds[0], "bytes / bandwidth", "0.4", offset=(4, 22))
        axis.set(
            ylabel="ms a step", title="On this machine, with the range\nof the sittings' medians"
        )
        plots.batch_axes(axis, batches)

    def _plot_v5e(self, axis) -> None:
        for color, (name, values) in zip(plots.PALETTE, self.v5e_seconds.items(), strict=False):
            plots.draw_line(axis, V5E_BATCHES, milliseconds(values), color, marker="")
            # The two large shapes have nearly the same line: their labels are above and below it.
            height = 8 if name == "paper_1b" else -9
            plots.label(axis, 1, 1e3 * values[0], name, color, offset=(0, height))
        axis.set(xscale="log", yscale="log")
        axis.set_ylim(bottom=0.4)
        axis.axvline(V5E_COMPUTE_BOUND_BATCH, color="0.4", ls=":")
        text = f"arithmetic-bound\nfrom batch {V5E_COMPUTE_BOUND_BATCH}"
        plots.label(axis, V5E_COMPUTE_BOUND_BATCH, 0.7, text, "0.4")
        axis.set(
            xlabel="batch",
            ylabel="ms a step, at least (not measured)",
            title="v5e, bfloat16 (arithmetic)",
        )


def paper_shape_record() -> Record:
    """Return the record of the softmax's share of the paper_1b shape's bytes: arithmetic alone."""
    share = softmax_share(preset("paper_1b"))
    claim = Claim(
        value=share,
        unit="share of the step's bytes",
        quality="arithmetic on the shape, no weights",
        setting="paper_1b, weights without the key/value cache",
        supports=share >= SOFTMAX_SHARE,
    )
    return Record(
        id="shape/paper_1b",
        kind="simulated",
        weights="shape only",
        setting={},
        results=dict(softmax_share=share),
        claims={"softmax-share": claim},
    )


def milliseconds(seconds: Sequence[float]) -> list[float]:
    """Convert seconds to milliseconds."""
    return [1e3 * value for value in seconds]

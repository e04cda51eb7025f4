"""Figure 08, the ablation: the parts of HiRE added to one model in turn.

Each variant is judged and timed on a model that was trained here, and timed on a model of one
billion parameters. The module also computes the map of expected speed-ups over model shapes.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import ClassVar

import jax
import numpy as np
import pandas
from matplotlib.figure import Figure

import hire
from hire.lab import records
from hire.lab.data import model_states
from hire.lab.data.model_states import States
from hire.lab.data.text import documents
from hire.lab.figure_index import claim_limits
from hire.lab.metrics import group_sparsity, search_recall
from hire.lab.metrics.intervals import relative_loss
from hire.lab.metrics.model_quality import losses
from hire.lab.studies import ablation_map, plots
from hire.lab.studies.ablation_timing import (
    Alternatives,
    Durations,
    LargeRun,
    setting_name,
    speedup_text,
    step_bytes,
    time_variants,
)
from hire.lab.studies.ablation_variants import (
    BOTH,
    DENSE,
    FFN_ALONE,
    SHARED,
    SOFTMAX,
    WIDER,
    VariantSizes,
    ffns_of,
    softmax_of,
    without_selection,
)
from hire.lab.studies.study import Claim, Record, Result
from hire.lab.studies.tables import percent
from hire.lab.training import trainer
from hire.models import Decoder, TextModel
from hire.ops.top_k import TopK
from hire.timing import speedup_range, speedups
from hire.tuning import true_top_k
from hire.types import Rows

PROMPT_TOKENS = 16
# Criterion of the claim additive: measured over expected speed-up.
ADDITIVE_SHARE = claim_limits("additive")["fraction"]


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    """The model that was trained here, with the text to fit to and to judge on.

    Attributes:
        subject: The model with its tokenizer. The most used groups of each layer come first.
        sizes: Sizes of its variants.
        calibration: Windows (w, t) of speeches and commentary, to fit to.
        hidden: Hidden states (n, d) of these windows.
        evaluation: Windows (w, t) of a novel, to judge on, and the document (w,) of each window.
    """

    subject: TextModel
    sizes: VariantSizes
    calibration: np.ndarray
    hidden: np.ndarray
    evaluation: tuple[np.ndarray, np.ndarray]

    @property
    def model(self) -> Decoder:
        """The dense model."""
        return self.subject.model

    @property
    def rows(self) -> Rows:
        """Rows (v, d) of the LM head."""
        return self.model.head_rows()

    @property
    def ffn_counts(self) -> dict[str, int]:
        """Arguments `k` and `candidates` of HireFFN, in groups."""
        return self.sizes.ffn_counts(self.model.config)

    @property
    def prompt(self) -> np.ndarray:
        """The first tokens of the novel."""
        return self.evaluation[0][0, :PROMPT_TOKENS]

    def layers(self) -> Iterator[tuple[Rows, Rows, np.ndarray]]:
        """Yield `up` (f, d), `down` (f, d) and the inputs (n, d) of each FFN.

        The inputs are those of the calibration windows.
        """
        inputs = group_sparsity.ffn_inputs(self.model, self.calibration)
        for ffn, x in zip(group_sparsity.layers_of(self.model), inputs, strict=True):
            yield ffn.up[...], ffn.down[...], x.reshape(-1, x.shape[-1])

    def text(self, tokens: Sequence[int] | np.ndarray | jax.Array) -> str:
        """Return tokens (t,) as text."""
        return self.subject.tokenizer.decode(np.asarray(tokens).tolist())


def load_trained(settings: SimpleNamespace) -> TrainedModel:
    """Load the trained model and its texts: speeches and commentary to fit to, a novel to judge on.

    Args:
        settings: Sizes of the notebook.
    """
    subject = trainer.trained_model("ladder", toy=settings.models == "toy")
    length, limit = settings.length, settings.windows
    calibration, _ = model_states.windows(subject, documents("calibration"), length, 2, limit=limit)
    evaluation = model_states.windows(
        subject, documents("evaluation", ["novel"]), length // 2, limit=limit
    )
    softmax_rank, softmax_bits = settings.softmax_factors
    sizes = VariantSizes(
        k=settings.k,
        candidates=settings.candidates,
        softmax_rank=softmax_rank,
        softmax_bits=softmax_bits,
        ffn_rank=settings.ffn_rank,
        shared_batch=settings.shared_batch,
    )
    return prepare(subject, sizes, calibration, evaluation)


def prepare(
    subject: TextModel,
    sizes: VariantSizes,
    calibration: np.ndarray,
    evaluation: tuple[np.ndarray, np.ndarray],
) -> TrainedModel:
    """Order the groups of a trained model and collect its hidden states.

    The groups that the calibration windows use most come first, which changes no output.

    Args:
        subject: The model with its tokenizer.
        sizes: Sizes of its variants.
        calibration: Windows (w, t) to fit to.
        evaluation: Windows (w, t) to judge on, and the document (w,) of each window.
    """
    usage = group_sparsity.sets_kept(subject.model, calibration).mean((1, 2))
    ordered = group_sparsity.most_used_first(subject.model, usage)
    states = model_states.collect(ordered, calibration, np.arange(len(calibration)))
    return TrainedModel(
        subject=dataclasses.replace(subject, model=ordered),
        sizes=sizes,
        calibration=calibration,
        hidden=states.hidden,
        evaluation=evaluation,
    )


def judge(
    subject: TextModel,
    variants: Mapping[str, Decoder],
    windows: np.ndarray,
    window_documents: np.ndarray,
    k: int,
) -> dict[str, dict]:
    """Measure the `quality` of each variant on text, with the loss relative to the first variant.

    Args:
        subject: Model with its tokenizer.
        variants: Variants by name; the first one must be dense.
        windows: Windows `(w, t)` of text.
        window_documents: Document `(w,)` of each window.
        k: Number of top tokens.
    """
    results: dict[str, dict] = {}
    cached: dict[str, tuple[States, TopK]] = {}
    for name, variant in variants.items():
        # A searched softmax changes no hidden state, so all variants with dense FFNs share them.
        key = name if ffns_of(variant) else DENSE
        if key not in cached:
            states = model_states.collect(variant, windows, window_documents)
            cached[key] = states, true_top_k(variant.head_rows(), states.hidden, k)
        baseline = next(iter(results.values()))["nats"] if results else None
        subject_variant = dataclasses.replace(subject, model=variant)
        results[name] = quality(subject_variant, *cached[key], baseline)
    return results


def quality(
    subject: TextModel, states: States, true_top: TopK, baseline_nats: Sequence[float] | None = None
) -> dict:
    """Measure the quality of a model on the states of documents.

    Args:
        subject: Model with its tokenizer.
        states: Hidden states of the documents and their next tokens.
        true_top: Exact top-k tokens of the states: values and indices `(n, k)`.
        baseline_nats: Nats by document of the baseline. Default: the model itself.

    Returns:
        A dict with the keys `recall` and `top1` (recall of the exact top-k and of the top-1, as
        from `mean_with_interval`), `bits_per_byte` (with the estimated normaliser where the softmax
        is searched), `accuracy` (share of next tokens predicted), `nats` (by document), `n` (number
        of states) and `relative_loss` (against the baseline, see `intervals.relative_loss`).
    """
    softmax = softmax_of(subject.model)
    if softmax is None:
        nats, predictions = losses(subject.model, states), true_top.indices[:, 0]
        count = dict(n=len(nats), documents=len(np.unique(states.documents)))
        exact = dict(mean=1.0, low=1.0, high=1.0) | count
        rates = dict(recall=exact, top1=exact)
    else:
        top = search_recall.search_all(softmax, states.hidden)
        nats, predictions = estimated_losses(softmax, states), top.indices[:, 0]
        rates = search_recall.judge(top, states, true_top)
    text = subject.tokenizer.decode(states.targets.tolist())
    _, document = np.unique(states.documents, return_inverse=True)
    by_document = np.bincount(document, nats)
    return rates | dict(
        bits_per_byte=float(nats.sum() / np.log(2) / len(text.encode())),
        accuracy=float(np.mean(predictions == states.targets)),
        nats=by_document.tolist(),
        n=len(nats),
        relative_loss=relative_loss(
            by_document, by_document if baseline_nats is None else baseline_nats
        ),
    )


def estimated_losses(softmax: hire.HireSoftmax, states: States) -> np.ndarray:
    """Return the next-token loss at each state, by the estimated normaliser and exact logits.

    Args:
        softmax: Softmax with an estimator.
        states: Hidden states `(n, d)` and their next tokens.

    Returns:
        -log p `(n,)` in nats.
    """
    targets = states.targets[:, None]
    log_probabilities = model_states.in_batches(
        softmax.log_probabilities, states.hidden, 128, targets
    )
    return -log_probabilities[:, 0]


@dataclasses.dataclass(frozen=True)
class TrainedRun:
    """What was measured on the variants of the trained model.

    Attributes:
        sizes: Sizes of the variants.
        weights: Description of the weights.
        judged: From `judge`.
        durations: Batch size -> variant -> seconds of each step.
        megabytes: Bytes that a step at batch 1 reads, in MB, by variant.
        sittings: Number of sittings, from each of which equally many durations are.
    """

    sizes: VariantSizes
    weights: str
    judged: dict[str, dict]
    durations: dict[int, Durations]
    megabytes: dict[str, float]
    sittings: int

    @property
    def speedups(self) -> dict[int, dict[str, float]]:
        """Speed-up over dense by batch size and variant."""
        return {batch: speedups(durations) for batch, durations in self.durations.items()}

    def table(self) -> pandas.DataFrame:
        """Return quality with 95 % intervals, bytes and speed with its range, by variant."""
        lines = {}
        for name, judged in self.judged.items():
            lines[name] = {
                "recall": percent(judged["recall"]),
                "loss against dense": percent(judged["relative_loss"], 2),
                "bits per byte": f"{judged['bits_per_byte']:.4f}",
                "next tokens": f"{judged['accuracy']:.1%}",
                "MB per step": f"{self.megabytes[name]:.1f}",
                "speed-up": speedup_text(self.durations[1], name, self.sittings),
            }
        return pandas.DataFrame.from_dict(lines, orient="index")


def measure_trained(
    trained: TrainedModel, variants: Mapping[str, Decoder], settings: SimpleNamespace
) -> TrainedRun:
    """Judge the variants of the trained model, then time them.

    Dense is timed without the selection that the model was trained with.

    Args:
        trained: The trained model.
        variants: Its variants by name.
        settings: Sizes of the notebook.
    """
    judged = judge(trained.subject, variants, *trained.evaluation, settings.k)
    timed = {**variants, DENSE: without_selection(variants[DENSE])}
    batched = {name: timed[name] for name in (DENSE, BOTH, SHARED)}
    sizes = settings.cache_length, settings.k, settings.repeats, settings.sittings
    durations = time_variants({1: timed, settings.shared_batch: batched}, *sizes)
    context = settings.cache_length // 2
    return TrainedRun(
        sizes=trained.sizes,
        weights=trained.subject.weights_precision,
        judged=judged,
        durations=durations,
        megabytes={
            name: sum(step_bytes(variant, 1, context).values()) / 1e6
            for name, variant in variants.items()
        },
        sittings=settings.sittings,
    )


def value_table(values: dict, decimals: int = 2) -> pandas.DataFrame:
    """Return numbers as a table.

    Args:
        values: Row -> column -> number.
        decimals: Decimals of each number.
    """
    return pandas.DataFrame.from_dict(values, orient="index").round(decimals)


def transferred_ffn_losses() -> dict[str, dict[str, float]]:
    """Return the loss of trained models with searched FFNs, from the record of figure 06.

    Returns:
        FFN_ALONE (5 % of the groups out of 10 %) and WIDER -> mean loss over the model's own, with
        its interval.
    """
    by_id = {entry["id"]: entry["results"] for entry in records.read(topic="06_ffn")}
    return {FFN_ALONE: by_id["ffn"]["five"], WIDER: by_id["ffn"]["chosen"]}


@dataclasses.dataclass(frozen=True)
class AblationResult(Result):
    """Result of figure 08.

    Attributes:
        settings: Sizes of the notebook.
        trained: Quality and times of the trained model's variants.
        large: Times of the large model's variants.
        alternatives: Times of what a user could take instead.
        part_shares: From `part_shares`, for the large model.
        v5e: From `v5e_speedups`.
        weights: Description of the weights.
    """

    tolerance: ClassVar[Mapping[str, float]] = {
        "default": 0.35,
        "byte_shares": 0.01,
        "loss": 0.02,
        "v5e": 0.05,
    }

    settings: SimpleNamespace
    trained: TrainedRun
    large: LargeRun
    alternatives: Alternatives
    part_shares: dict[str, dict[str, float]]
    v5e: dict[int, dict[str, float]]
    weights: str = dataclasses.field(init=False)

    def __post_init__(self):
        weights = (
            f"{self.trained.weights}; {self.large.name}: random, quality transferred from trained "
            "models; hatched: compiler estimate"
        )
        object.__setattr__(self, "weights", weights)

    @property
    def single_durations(self) -> Durations:
        """Seconds of the large model's variants at batch 1."""
        return self.large.durations[1, self.settings.cache_length]

    @property
    def single(self) -> dict[str, float]:
        """Speed-ups of the large model's variants at batch 1."""
        return speedups(self.single_durations)

    @property
    def expected(self) -> float:
        """Speed-up of the large model with both parts searched if the two savings add up."""
        return ablation_map.additive_speedup(self.single[SOFTMAX], self.single[FFN_ALONE])

    @property
    def byte_shares(self) -> dict[str, tuple[float, float]]:
        """Shares of softmax and FFN in the bytes of a dense step, by model on the map."""
        return {
            name: ablation_map.byte_shares(config)
            for name, config in ablation_map.known_shapes().items()
        }

    def quality_text(self, name: str) -> str:
        """Return recall and loss of a variant of the trained model, such as "recall 0.997, …"."""
        judged = self.trained.judged[name]
        loss = judged["relative_loss"]["mean"]
        return f"recall {judged['recall']['mean']:.3f}, loss {loss:+.2%}"

    def finding(self) -> str:
        """State the speed-ups of the parts and of both, and whether the savings add."""
        single, batch = self.single, self.settings.shared_batch
        shared_speedup = self.large.speedups[batch, self.settings.cache_length][SHARED]
        ffn_loss = transferred_ffn_losses()[FFN_ALONE]["mean"]
        return (
            f"{self.large.name}, whole decode step at batch 1 against dense: softmax searched "
            f"{single[SOFTMAX]:.2f}x ({self.quality_text(SOFTMAX)}), FFNs searched "
            f"{single[FFN_ALONE]:.2f}x (loss {ffn_loss:+.2%}), both "
            f"{single[BOTH]:.2f}x ({self.quality_text(BOTH)}); "
            f"{self.expected:.2f}x is expected if the savings add. Batch {batch} with one shared "
            f"selection: {shared_speedup:.2f}x ({self.quality_text(SHARED)}). The weights are "
            "random; recall and loss are those of trained models. Int8 rows everywhere: HiRE is "
            f"{self.alternatives.int8_speedup:.2f}x dense. The model trained here, with both: "
            f"{self.trained.speedups[1][BOTH]:.2f}x at batch 1, "
            f"{self.trained.speedups[batch][BOTH]:.2f}x at {batch} ({self.quality_text(BOTH)})."
        )

    def series(self) -> dict:
        """Return speed-ups, losses of the trained model, and the shares of bytes on the map."""
        return dict(
            trained_speedups=self.trained.speedups,
            byte_shares=self.byte_shares,
            v5e=self.v5e,
            loss={
                name: judged["relative_loss"]["mean"]
                for name, judged in self.trained.judged.items()
            },
            speedups={
                setting_name(*setting): values for setting, values in self.large.speedups.items()
            },
        )

    def records(self) -> list[Record]:
        """Return the record of both models."""
        results = self.series() | dict(
            judged=self.trained.judged,
            additive_speedup=self.expected,
            points=self.large.points,
            part_shares=self.part_shares,
            bytes_fraction=self.large.bytes_fraction,
            bandwidth=self.large.bandwidth,
            alternatives=self.alternatives.speedups,
            int8_speedup=self.alternatives.int8_speedup,
            sittings=self.settings.sittings,
            speedup_ranges={
                setting_name(*setting): ranges
                for setting, ranges in self.large.speedup_ranges().items()
            },
        )
        large_durations = {
            setting_name(*setting): durations for setting, durations in self.large.durations.items()
        }
        record = Record(
            id="ladder",
            weights=self.weights,
            setting=dict(
                trained=dataclasses.asdict(self.trained.sizes),
                large=dataclasses.asdict(self.large.sizes),
            ),
            results=results,
            durations=dict(
                trained=self.trained.durations,
                alternatives=self.alternatives.durations,
                large=large_durations,
            ),
            claims=self._claims(),
        )
        return [record]

    def _claims(self) -> dict[str, Claim]:
        measured, expected = self.single[BOTH], self.expected
        low, high = speedup_range(self.single_durations, BOTH, DENSE, self.settings.sittings)
        loss = self.trained.judged[BOTH]["relative_loss"]["mean"]
        quality = (
            f"loss {loss:+.2%} in the trained model, transferred; recall of tokens transferred "
            "from figure 03"
        )
        end_to_end = Claim(
            value=measured,
            low=low,
            high=high,
            unit="x, whole decode step",
            quality=quality,
            setting=f"{self.large.name}, batch 1, 5 % of 10 %",
            supports=measured > claim_limits("end-to-end-speedup")["speedup"],
        )
        additive = dataclasses.replace(
            end_to_end,
            quality=f"{expected:.2f}x expected if the savings add; {quality}",
            supports=measured > ADDITIVE_SHARE * expected,
        )
        return {"end-to-end-speedup": end_to_end, "additive": additive}

    def plot(self) -> Figure:
        """Draw the variants of both models, the map, time against bytes, batches and parts."""
        figure, axes = plots.new_figure(3, 2)
        self._plot_trained(axes[0, 0])
        self._plot_large(axes[0, 1])
        self._plot_map(axes[1, 0])
        self._plot_floor(axes[1, 1])
        self._plot_batches(axes[2, 0])
        plots.share_bars(
            axes[2, 1], self.part_shares, title="Where a step goes, batch 1, parts alone"
        )
        return figure

    @property
    def _colors(self) -> dict[str, str]:
        return {DENSE: plots.GRAY, BOTH: plots.BLUE, SHARED: plots.GREEN}

    def _plot_trained(self, axis) -> None:
        variants = self.trained.judged
        plots.variant_bars(
            axis,
            {name: self.trained.speedups[1][name] for name in variants},
            plots.BLUE,
            notes={name: f", {self.quality_text(name)}" for name in variants},
            title="A model trained here, batch 1",
        )

    def _plot_large(self, axis) -> None:
        values = self.single
        notes = {name: f", {self.quality_text(name)}" for name in self.trained.judged}
        for name, loss in transferred_ffn_losses().items():
            notes[name] = f", FFNs' loss {loss['mean']:+.2%}"
        if "both" in self.v5e[1]:
            estimate = "v5e (estimate), both"
            values = values | {estimate: self.v5e[1]["both"]}
            notes[estimate] = notes[BOTH]
        plots.variant_bars(
            axis,
            values,
            plots.BLUE,
            notes=notes,
            hollow=True,
            marks=list(ablation_map.published_speedups().values()),
            title=f"{self.large.name}, random, batch 1",
        )

    def _plot_map(self, axis) -> None:
        published, bytes_fraction = ablation_map.published_speedups(), self.large.bytes_fraction
        softmax, ffn, combined = (f"{speedup:g}x" for speedup in published.values())
        plots.speed_map(
            axis,
            lambda softmax, ffn: ablation_map.speedup_by_bytes(softmax, ffn, bytes_fraction),
            self.byte_shares,
            (
                ablation_map.share_of_speedup(published["softmax"], bytes_fraction["softmax"]),
                ablation_map.share_of_speedup(published["ffn"], bytes_fraction["ffn"]),
            ),
            f"the paper's {softmax}, {ffn} and {combined},\nif its search read as little as ours",
            title="By bytes: who gains how much",
        )

    def _plot_floor(self, axis) -> None:
        plots.time_against_floor(
            axis,
            list(self.large.points.values()),
            self._colors,
            title="Are bytes a proxy for time?",
        )

    def _plot_batches(self, axis) -> None:
        cache_length, batches = self.settings.cache_length, self.settings.batches
        lines = {}
        for name in self._colors:
            seconds = [
                self.large.durations[batch, cache_length].get(name, [np.nan]) for batch in batches
            ]
            lines[name] = [float(np.median(durations)) for durations in seconds]
        plots.latency_lines(
            axis,
            batches,
            lines,
            self._colors,
            hollow=[BOTH, SHARED],
            title=f"{self.large.name}: whole step",
        )

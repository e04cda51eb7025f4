"""Figure 03: how much faster HiRE-Softmax is, and at which quality."""

import dataclasses
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import ClassVar

import jax
import numpy as np
import pandas
from matplotlib.figure import Figure

import hire
from hire.lab.data import hidden_state_cache
from hire.lab.data.model_states import States
from hire.lab.data.text import documents
from hire.lab.figure_index import claim_limits
from hire.lab.metrics import model_quality, search_recall
from hire.lab.metrics.intervals import mean_with_interval, points
from hire.lab.rivals.approximate_top_k import INT8
from hire.lab.studies import plots, tables
from hire.lab.studies.study import Claim, Record, Result
from hire.lab.timing import layer_timing
from hire.models import Decoder, TextModel
from hire.ops.batches import batches
from hire.ops.row_products import row_scores
from hire.ops.top_k import TopK
from hire.search import top_k_at
from hire.timing import in_sittings, interleaved, medians, speedup_range
from hire.types import AnyArray, Array, Float, Int, Rows
from hire.types import Queries as HiddenStates

# Name of the chosen setting in times. Other settings are named by `setting_name`.
HIRE = "HiRE"
# The same search with exact rows of 8 bits, and with XLA's operations instead of the CPU kernels.
HIRE_INT8, HIRE_XLA = "HiRE, int8 rows", "HiRE, XLA"
# The beginnings of two documents are continued.
PROMPTS, PROMPT_TOKENS = 2, 24
# Losses need a sum over the vocabulary, so they are computed at every third position.
DISTRIBUTION_STRIDE = 3
LOSS_BATCH = 128
# Larger batches have fewer repeats, but at least so many.
MIN_SOFTMAX_REPEATS, MIN_STEP_REPEATS = 15, 3
# Criteria of the claim softmax-speedup, see figures/claims.yaml.
CLAIM_SPEEDUP, CLAIM_RECALL = (
    claim_limits("softmax-speedup")[name] for name in ("speedup", "recall")
)


@dataclasses.dataclass(frozen=True)
class Queries:
    """Hidden states of real text; no document is in two of the sets.

    Attributes:
        calibration: Hidden states (n, d) that factors are fitted to: speeches and commentary.
        unseen: Hidden states of a novel, to evaluate on, with their next tokens and documents.
        unseen_top: True top-k of `unseen`.
        prompts: The first tokens of some documents of the novel.
    """

    calibration: np.ndarray
    unseen: States
    unseen_top: TopK
    prompts: list[np.ndarray]


def load_queries(subject: TextModel, settings: SimpleNamespace) -> Queries:
    """Compute the hidden states of the texts that the study needs.

    Args:
        subject: The model.
        settings: Sizes of the notebook.
    """
    novel = documents("evaluation", ["novel"])[: settings.evaluation_documents]
    # Positions early in a window have little context; calibration leaves out the first four.
    calibration = hidden_state_cache.cached_states(
        subject, documents("calibration")[::2], 128, settings.calibration_windows, skip=4
    )
    unseen = hidden_state_cache.cached_states(subject, novel)
    return Queries(
        calibration=calibration.hidden,
        unseen=unseen,
        unseen_top=hidden_state_cache.true_top_tokens(subject, unseen.hidden, settings.k),
        prompts=[subject.tokens(text.text, PROMPT_TOKENS) for text in novel[:PROMPTS]],
    )


def setting_name(rank: int, bits: int, candidates: int) -> str:
    """Return the name of a setting, such as "LR 128 int8 k'=2048"."""
    return f"LR {rank} int{bits} k'={candidates}"


def chosen_name(settings: SimpleNamespace) -> str:
    """Return the name of the chosen setting."""
    return setting_name(settings.chosen_rank, settings.chosen_bits, settings.chosen_candidates)


def fit_variants(
    rows: Rows, chosen: hire.HireSoftmax, calibration: np.ndarray, settings: SimpleNamespace
) -> dict[str, hire.HireSoftmax]:
    """Build the softmax of every rank, precision and number of candidates that is compared.

    Args:
        rows: Rows (v, d) of the LM head.
        chosen: The softmax of the chosen setting. It is one of the results.
        calibration: Hidden states (n, d) that factors are fitted to.
        settings: Sizes of the notebook.

    Returns:
        The softmaxes by `setting_name`, and the chosen one with exact rows of 8 bits by HIRE_INT8.

    Raises:
        ValueError: The chosen setting is not among those that are compared.
    """
    estimators = {
        (rank, bits): chosen.estimator
        if (rank, bits) == (settings.chosen_rank, settings.chosen_bits)
        else hire.LowRank.fit(rows, rank, calibration=calibration, bits=bits)
        for bits in settings.bits
        for rank in settings.ranks
    }
    variants = {
        setting_name(rank, bits, candidates): hire.HireSoftmax(
            rows, estimator, settings.k, candidates
        )
        for candidates in settings.candidates
        for (rank, bits), estimator in estimators.items()
    }
    if chosen_name(settings) not in variants:
        raise ValueError(
            f"chosen setting {chosen_name(settings)}: expected one of {', '.join(variants)}"
        )
    return variants | {chosen_name(settings): chosen, HIRE_INT8: int8_search(rows, chosen)}


def judge_variants(
    rows: Rows, variants: Mapping[str, hire.HireSoftmax], queries: Queries, stride: int
) -> dict[str, dict[str, dict]]:
    """Measure recall and top-1 of every setting, and of int8 rows without low-rank factors.

    Args:
        rows: Rows (v, d) of the LM head.
        variants: Softmaxes by name.
        queries: Queries; the unseen set is evaluated on.
        stride: Evaluate on every `stride`-th position.

    Returns:
        Name -> `recall` and `top1`, see `search_recall.judge`. The last name is INT8.
    """
    k = queries.unseen_top.indices.shape[1]
    # Rescoring k candidates does not change which tokens int8 rows find.
    int8_rows = hire.HireSoftmax(rows, hire.Quantized.fit(rows, bits=8), k, k)
    states, top = jax.tree.map(lambda part: part[::stride], (queries.unseen, queries.unseen_top))
    return {
        name: search_recall.judge(softmax, states, top)
        for name, softmax in [*variants.items(), (INT8, int8_rows)]
    }


@dataclasses.dataclass(frozen=True)
class Quality:
    """Quality of the chosen softmax on unseen text.

    Intervals are dicts with `mean`, `low`, `high`, `documents` and `n`. All attributes but the
    first two come from every third position.

    Attributes:
        recall: Interval of the recall of the top-k.
        top1: Interval of the rate at which the true top-1 is among the results.
        agreement: Interval of the rate at which the top-1 is the same.
        variation: Interval of the total variation between sampling from the results and from the
            exact top-k.
        variation_99: 99th percentile of the total variation.
        perplexity: Exact perplexity.
        perplexity_difference: Interval of the relative difference of the perplexity with the
            estimated normalizer.
        loss_error: Interval of the absolute error of a loss, in nats.
        two_stderr_coverage: Interval of the fraction of losses with an error below two of the
            standard errors that the softmax states.
    """

    recall: dict
    top1: dict
    agreement: dict
    variation: dict
    variation_99: float
    perplexity: float
    perplexity_difference: dict
    loss_error: dict
    two_stderr_coverage: dict

    def table(self) -> pandas.DataFrame:
        """Return the quality as a table, one row per measure."""
        column = "mean (95 % interval)"
        shares = {
            "recall of the top-k": self.recall,
            "top-1 found": self.top1,
            "top-1 the same": self.agreement,
            "total variation of sampling": self.variation,
            "perplexity, relative difference": self.perplexity_difference,
            "losses with an error below 2 standard errors": self.two_stderr_coverage,
        }
        rows = {name: {column: interval} for name, interval in shares.items()}
        table = tables.interval_table(rows, decimals=2)
        error = self.loss_error
        table.loc["error of a loss, nats"] = {
            column: f"{error['mean']:.4f} ({error['low']:.4f} to {error['high']:.4f})",
            "n": error["n"],
            "documents": error["documents"],
        }
        return table


def judge_quality(softmax: hire.HireSoftmax, model: Decoder, queries: Queries) -> Quality:
    """Measure recall, sampling and perplexity of a softmax on unseen text.

    Args:
        softmax: The softmax. It searches one query at a time, by the same program that is timed.
        model: The decoder, for exact losses.
        queries: Queries; the unseen set is evaluated on.
    """
    results = search_recall.search_all(softmax, queries.unseen.hidden, batch=1)
    rates = search_recall.judge(results, queries.unseen, queries.unseen_top)
    results, states, top = jax.tree.map(
        lambda part: part[::DISTRIBUTION_STRIDE], (results, queries.unseen, queries.unseen_top)
    )
    variation = model_quality.total_variation(results, top)
    same_top1 = results.indices[:, 0] == top.indices[:, 0]
    exact_losses = model_quality.losses(model, states)
    estimated_losses, stderr = losses_with_stderr(softmax, states)
    errors = np.abs(estimated_losses - exact_losses)
    zeros = np.zeros(len(errors))
    difference = points(estimated_losses, exact_losses, states.documents)
    ends = {end: float(np.expm1(difference[end])) for end in ("mean", "low", "high")}
    return Quality(
        recall=rates["recall"],
        top1=rates["top1"],
        agreement=mean_with_interval(same_top1, states.documents),
        variation=points(variation, zeros, states.documents),
        variation_99=float(np.quantile(variation, 0.99)),
        perplexity=float(np.exp(exact_losses.mean())),
        perplexity_difference=difference | ends,
        loss_error=points(errors, zeros, states.documents),
        two_stderr_coverage=mean_with_interval(errors < 2 * stderr, states.documents),
    )


def losses_with_stderr(softmax: hire.HireSoftmax, states: States) -> tuple[np.ndarray, np.ndarray]:
    """Compute losses with the estimated normalizer, and the standard errors stated for them.

    Args:
        softmax: The softmax.
        states: Hidden states with their next tokens.

    Returns:
        Losses (n,) and standard errors (n,) in nats.
    """
    losses, stderr = [], []
    for hidden, targets in zip(
        batches(states.hidden, LOSS_BATCH),
        batches(states.targets[:, None], LOSS_BATCH),
        strict=True,
    ):
        output = softmax.top_k_with_normalizer(hidden)
        losses.append(output.log_normalizer - softmax.exact_logits(hidden, targets)[:, 0])
        stderr.append(output.normalizer_stderr)
    return np.concatenate(losses), np.concatenate(stderr)


def continuations(
    models: Sequence[Decoder], prompt: np.ndarray, settings: SimpleNamespace
) -> list[Int[Array, " t"]]:
    """Return the greedy continuation of a prompt by each model, with the prompt: tokens (t,)."""
    sizes = dict(new_tokens=settings.new_tokens, cache_length=settings.cache_length)
    return [hire.generate(model, prompt, **sizes) for model in models]


def side_by_side(subject: TextModel, dense: Int[Array, " t"], searched: Int[Array, " t"]) -> str:
    """Compare two greedy continuations of a prompt.

    Args:
        subject: The dense model with its tokenizer.
        dense: Tokens (t,) of the prompt with its continuation by the dense model.
        searched: The same by the converted model.

    Returns:
        The dense text. Where the continuations differ, also both from that token on, with the
        dense model's logit of each one's first token.
    """
    continuations = {"dense": np.asarray(dense), HIRE: np.asarray(searched)}
    first = 0 if subject.first_token is None else 1
    text = repr(subject.tokenizer.decode(dense[first:].tolist()))
    differing = np.flatnonzero(continuations["dense"] != continuations[HIRE])
    if not len(differing):
        return f"{text}\n    HiRE writes the same tokens"
    position = int(differing[0])
    hidden, _ = subject.model.prefill(dense[None, :position])
    logits = subject.model.logits(hidden[:, -1])[0]
    lines = [text]
    for name, tokens in continuations.items():
        continuation = subject.tokenizer.decode(tokens[position:].tolist())
        lines.append(
            f"    from token {position} on, {name}: {continuation!r}, "
            f"dense logit {logits[tokens[position]]:.3f}"
        )
    return "\n".join(lines)


def exact_output(
    rows: Rows, hidden: HiddenStates, k: int
) -> tuple[Int[AnyArray, "b k"], Float[Array, " b"]]:
    """Return the true top-k indices (b, k) and log normalizers (b,) of hidden states (b, d)."""
    logits = row_scores(hidden, rows)
    return hire.exact_top_k(logits, k).indices, jax.nn.logsumexp(logits, axis=1)


@dataclasses.dataclass(frozen=True)
class Times:
    """Raw durations in seconds.

    Attributes:
        softmax: Batch size -> name -> durations, see `layer_timing.time_softmax`. At the first
            batch size, each compared setting has durations, too.
        step: Batch size -> "dense" and HIRE -> durations of a decode step.
        stages: Stage -> durations, see `time_stages`.
        stage_bytes: Stage -> bytes of weights that it must read.
        row_bytes: Bytes of the rows, which are the bytes that "stream" reads.
        search_bytes: HIRE or HIRE_INT8 -> batch size -> bytes of weights that it must read.
        sittings: Number of sittings, from each of which equally many durations are.
    """

    softmax: dict[int, dict[str, list[float]]]
    step: dict[int, dict[str, list[float]]]
    stages: dict[str, list[float]]
    stage_bytes: dict[str, int]
    row_bytes: int
    search_bytes: dict[str, dict[int, int]]
    sittings: int

    @property
    def first_batch(self) -> int:
        """The first batch size."""
        return next(iter(self.softmax))

    @property
    def softmax_medians(self) -> dict[str, float]:
        """Median seconds of each softmax at the first batch size."""
        return medians(self.softmax[self.first_batch])

    @property
    def dense_median(self) -> float:
        """Median seconds of the fastest dense softmax at the first batch size."""
        return self.softmax_medians[layer_timing.fastest_dense(self.softmax[self.first_batch])]

    @property
    def bandwidth_fraction(self) -> float:
        """Bandwidth of the fastest dense softmax, relative to that of "stream"."""
        return self.softmax_medians["stream"] / self.dense_median

    @property
    def softmax_speedups(self) -> dict[int, float]:
        """Speed-up of the chosen softmax over the fastest dense one, by batch size."""
        return layer_timing.speedups_by_batch(self.softmax, HIRE)

    @property
    def step_speedups(self) -> dict[int, float]:
        """Speed-up of a decode step with the chosen softmax, by batch size."""
        return layer_timing.speedups_by_batch(self.step, HIRE)

    def variant_speedup(self, name: str) -> float:
        """Return the speed-up of a softmax over the fastest dense one, at the first batch size."""
        return self.dense_median / self.softmax_medians[name]

    def speedup_ranges(self, timed: dict[int, dict[str, list[float]]]) -> dict[int, list[float]]:
        """Return the lowest and the highest speed-up of the sittings, by batch size."""
        return {
            batch: list(
                speedup_range(durations, HIRE, layer_timing.fastest_dense(durations), self.sittings)
            )
            for batch, durations in timed.items()
        }

    def floors(self, name: str) -> dict[int, float]:
        """Return the seconds that a search's bytes take at stream bandwidth, by batch size."""
        return {
            batch: medians(durations)["stream"] * self.search_bytes[name][batch] / self.row_bytes
            for batch, durations in self.softmax.items()
        }

    def floor_ratios(self) -> dict[int, float]:
        """Return the chosen softmax's time over that of reading its bytes, by batch size."""
        floors = self.floors(HIRE)
        return {
            batch: medians(durations)[HIRE] / floors[batch]
            for batch, durations in self.softmax.items()
        }

    def int8_search_speedups(self) -> dict[int, float]:
        """Return the speed-up of the search with int8 rows over dense int8 rows, by batch size."""
        return layer_timing.speedups_by_batch(self.softmax, HIRE_INT8, INT8)

    def xla_speedups(self) -> dict[int, float]:
        """Return the speed-up of XLA's form of the search over the fastest dense form."""
        return layer_timing.speedups_by_batch(self.softmax, HIRE_XLA)

    def stage_floors(self) -> dict[str, float]:
        """Return the seconds that reading each stage's weights takes at stream bandwidth."""
        seconds_per_byte = self.softmax_medians["stream"] / self.row_bytes
        return {stage: nbytes * seconds_per_byte for stage, nbytes in self.stage_bytes.items()}

    def table(self) -> pandas.DataFrame:
        """Return medians and speed-ups over the fastest dense form, one row per function."""
        columns: dict[str, dict] = {}
        for batch in self.softmax:
            cells = columns[f"batch {batch}"] = {}
            for part, timed in (("softmax", self.softmax[batch]), ("step", self.step[batch])):
                seconds, dense = medians(timed), layer_timing.fastest_dense(timed)
                for name, value in seconds.items():
                    speedup = seconds[dense] / value
                    cells[f"{part}: {name}"] = f"{1e3 * value:.2f} ms, {speedup:.2f}x"
        return pandas.DataFrame(columns).fillna("")


def int8_search(rows: Rows, chosen: hire.HireSoftmax) -> hire.HireSoftmax:
    """Return the chosen search with exact rows of 8 bits, of which it returns the scores."""
    return dataclasses.replace(chosen, rows=hire.Quantized.fit(rows, bits=8))


def time_all(
    rows: Rows,
    variants: Mapping[str, hire.HireSoftmax],
    dense: Decoder,
    converted: Decoder,
    queries: Queries,
    settings: SimpleNamespace,
) -> Times:
    """Time softmaxes, decode steps and the stages of one search.

    At every batch size, all softmaxes take turns in one run, so that a slow spell of the machine
    does not affect one of them alone.

    Args:
        rows: Rows (v, d) of the LM head.
        variants: The compared softmaxes by name. The chosen one is timed at every batch size, the
            others at the first.
        dense: The dense decoder.
        converted: The decoder with the chosen softmax.
        queries: Queries; calls take new hidden states of the unseen set.
        settings: Sizes of the notebook.
    """
    hidden, k = queries.unseen.hidden, settings.k
    chosen = variants[chosen_name(settings)]
    searches = {
        HIRE: chosen,
        HIRE_INT8: variants[HIRE_INT8],
        HIRE_XLA: dataclasses.replace(chosen, implementation="xla"),
    }
    comparisons: dict[tuple[str, int], tuple[dict, Sequence]] = {}
    for batch in settings.batches:
        compared = dict(variants) if batch == settings.batches[0] else {}
        forms = layer_timing.softmax_forms(rows, searches | compared, k)
        repeats = min(settings.repeats, max(MIN_SOFTMAX_REPEATS, settings.repeats // batch))
        comparisons["softmax", batch] = forms, layer_timing.slices(hidden, batch, repeats)
    for batch in settings.batches:
        forms = layer_timing.step_forms(dense, converted, k, batch, settings.cache_length)
        repeats = max(settings.step_repeats // batch, MIN_STEP_REPEATS * settings.sittings)
        comparisons["step", batch] = forms, layer_timing.slices(hidden, 1, repeats)
    durations = in_sittings(comparisons, settings.sittings)
    return Times(
        softmax={batch: durations["softmax", batch] for batch in settings.batches},
        step={batch: durations["step", batch] for batch in settings.batches},
        stages=time_stages(rows, chosen, hidden, settings.repeats),
        stage_bytes=stage_bytes(chosen),
        row_bytes=rows.nbytes,
        search_bytes={
            name: {batch: softmax.bytes_read(batch) for batch in settings.batches}
            for name, softmax in searches.items()
        },
        sittings=settings.sittings,
    )


def time_stages(
    rows: Rows, softmax: hire.HireSoftmax, hidden: np.ndarray, repeats: int
) -> dict[str, list[float]]:
    """Time each stage of a search at batch 1, on the output of the stage before.

    Args:
        rows: Rows (v, d) of the LM head.
        softmax: The search.
        hidden: Hidden states (n, d).
        repeats: Timed calls of each stage.

    Returns:
        Raw durations in seconds: "nominate" (scores of all rows by the estimator, and the best k'),
            "rescore" (exact scores of these, and the best k) and "complete search", which is one
            program.
    """
    nominate = jax.jit(lambda estimator, x: estimator.nominate(x, softmax.candidates))
    rescore = jax.jit(lambda x, rows, candidates: top_k_at(x, rows, candidates, softmax.k, "auto"))
    inputs = [(x, nominate(softmax.estimator, x)) for x in layer_timing.slices(hidden, 1, repeats)]
    forms = {
        "nominate": lambda stage: nominate(softmax.estimator, stage[0]),
        "rescore": lambda stage: rescore(stage[0], rows, stage[1]),
        "complete search": lambda stage: softmax(stage[0]),
    }
    return interleaved(forms, inputs, repeats)


def stage_bytes(softmax: hire.HireSoftmax) -> dict[str, int]:
    """Return the bytes of weights that the stages of a search at batch 1 must read."""
    estimator_bytes = softmax.estimator.bytes_read(softmax.candidates)
    return {
        "nominate": estimator_bytes,
        "rescore": softmax.bytes_read() - estimator_bytes,
        "complete search": softmax.bytes_read(),
    }


@dataclasses.dataclass(frozen=True)
class SoftmaxResult(Result):
    """Result of figure 03.

    Attributes:
        settings: Sizes of the notebook.
        weights: Description of the weights.
        calibration_queries: Number of queries that the factors were fitted to.
        variant_quality: From `judge_variants`.
        quality: Quality of the chosen setting.
        times: Times.
    """

    settings: SimpleNamespace
    weights: str
    calibration_queries: int
    variant_quality: dict[str, dict[str, dict]]
    quality: Quality
    times: Times

    # Speed-ups change with the state of the machine.
    tolerance: ClassVar[Mapping[str, float]] = {"default": 0.35, "recall": 0.02}

    @property
    def chosen(self) -> str:
        """Name of the chosen setting."""
        return chosen_name(self.settings)

    @property
    def int8_recall(self) -> float:
        """Recall of int8 rows without low-rank factors."""
        return self.variant_quality[INT8]["recall"]["mean"]

    def quality_text(self) -> str:
        """State the quality of the chosen setting."""
        quality = self.quality
        return (
            f"recall@{self.settings.k} {quality.recall['mean']:.3f}, "
            f"top-1 found {quality.top1['mean']:.4f}, "
            f"perplexity {quality.perplexity_difference['mean']:+.2%}"
        )

    def finding(self) -> str:
        """State time, speed-up and quality of the chosen setting, and those of int8 rows."""
        times = self.times
        first, last = self.settings.batches[0], self.settings.batches[-1]
        softmax_speedups, step_speedups = times.softmax_speedups, times.step_speedups
        return (
            f"HiRE-Softmax ({self.chosen}) takes {times.softmax_medians[HIRE] * 1e3:.1f} ms, "
            f"the fastest dense form {times.dense_median * 1e3:.1f}: "
            f"{softmax_speedups[first]:.1f}x at batch {first}, "
            f"{softmax_speedups[last]:.1f}x at {last}; the whole step {step_speedups[first]:.2f}x. "
            f"On unseen text: {self.quality_text()}. "
            f"Dense int8 rows reach {times.variant_speedup(INT8):.1f}x "
            f"at recall {self.int8_recall:.3f}."
        )

    def series(self) -> dict:
        """Return speed-ups by batch size, and the recall of every compared setting."""
        return {
            "softmax speed-up": list(self.times.softmax_speedups.values()),
            "step speed-up": list(self.times.step_speedups.values()),
            "recall": [
                rates["recall"]["mean"]
                for name, rates in self.variant_quality.items()
                if name not in (INT8, HIRE_INT8)
            ],
        }

    def records(self) -> list[Record]:
        """Return the record of the chosen setting."""
        settings, quality, times = self.settings, self.quality, self.times
        speedup = times.step_speedups[times.first_batch]
        low, high = times.speedup_ranges(times.step)[times.first_batch]
        claim = Claim(
            value=speedup,
            low=low,
            high=high,
            unit="x, whole decode step",
            quality=f"{self.quality_text()}, {self.weights}",
            setting=f"{self.chosen}, {settings.model_name}",
            supports=speedup > CLAIM_SPEEDUP and quality.recall["low"] >= CLAIM_RECALL,
        )
        record = Record(
            id=f"softmax/{settings.model_name}",
            weights=self.weights,
            setting=dict(
                k=settings.k,
                rank=settings.chosen_rank,
                candidates=settings.chosen_candidates,
                bits=settings.chosen_bits,
                cache_length=settings.cache_length,
                calibration_queries=self.calibration_queries,
            ),
            results=dict(
                recall=quality.recall,
                top1=quality.top1,
                agreement=quality.agreement["mean"],
                variation=quality.variation["mean"],
                variation_99=quality.variation_99,
                perplexity=quality.perplexity,
                perplexity_difference=quality.perplexity_difference["mean"],
                perplexity_error=abs(quality.perplexity_difference["mean"]),
                loss_error=quality.loss_error["mean"],
                two_stderr_coverage=quality.two_stderr_coverage["mean"],
                bandwidth_fraction=times.bandwidth_fraction,
                int8_speedup=times.variant_speedup(INT8),
                softmax_speedups=times.softmax_speedups,
                step_speedups=times.step_speedups,
                softmax_speedup_ranges=times.speedup_ranges(times.softmax),
                step_speedup_ranges=times.speedup_ranges(times.step),
                floor_ratios=times.floor_ratios(),
                int8_search_speedups=times.int8_search_speedups(),
                int8_search_recall=self.variant_quality[HIRE_INT8]["recall"],
                xla_speedups=times.xla_speedups(),
                sittings=times.sittings,
                stage_seconds=medians(times.stages),
            ),
            durations=dict(softmax=times.softmax, step=times.step, stages=times.stages),
            claims={"softmax-speedup": claim},
        )
        return [record]

    def plot(self) -> Figure:
        """Draw recall against speed, latency of softmax and step, and the stages of a search."""
        figure, axes = plots.new_figure(2, 2)
        self._plot_recall_and_speed(axes[0, 0])
        self._plot_softmax_latency(axes[0, 1])
        self._plot_step_latency(axes[1, 0])
        plots.stage_bars(axes[1, 1], medians(self.times.stages), self.times.stage_floors())
        return figure

    def _plot_recall_and_speed(self, axis) -> None:
        settings = self.settings
        lines: dict[str, dict[str, tuple[float, float]]] = {}
        for candidates in settings.candidates:
            for bits in settings.bits:
                lines[f"k' = {candidates}, int{bits}"] = {
                    f"LR {rank}": self._speed_and_recall(setting_name(rank, bits, candidates))
                    for rank in settings.ranks
                }
        lines[INT8] = {"": self._speed_and_recall(INT8)}
        recalls = [recall for line in lines.values() for _, recall in line.values()]
        plots.quality_speed(
            axis,
            lines,
            lowest=0.95 if min(recalls) >= 0.95 else 0.2,
            star=(
                f"k' = {settings.chosen_candidates}, int{settings.chosen_bits}",
                f"LR {settings.chosen_rank}",
            ),
        )
        axis.set_title(f"Recall@{settings.k} against speed, batch {self.times.first_batch}")

    def _speed_and_recall(self, name: str) -> tuple[float, float]:
        recall = self.variant_quality[name]["recall"]["mean"]
        return self.times.variant_speedup(name), recall

    def _plot_softmax_latency(self, axis) -> None:
        recalls = {
            HIRE: self.quality.recall["mean"],
            HIRE_XLA: self.quality.recall["mean"],
            HIRE_INT8: self.variant_quality[HIRE_INT8]["recall"]["mean"],
            INT8: self.int8_recall,
        }
        colors = {
            INT8: plots.GREEN,
            HIRE_XLA: plots.ORANGE,
            HIRE_INT8: plots.GREEN,
            HIRE: plots.BLUE,
            "fastest dense": plots.GRAY,
        }
        labels = {name: f"{name}: {recall:.3f}" for name, recall in recalls.items()}
        lines = layer_timing.over_batches(self.times.softmax, (INT8, HIRE_XLA, HIRE_INT8, HIRE))
        plots.latency_lines(
            axis,
            self.settings.batches,
            {labels.get(name, name): seconds for name, seconds in lines.items()},
            {labels.get(name, name): color for name, color in colors.items()},
            hollow=(labels[HIRE_INT8],),
            floors={labels[HIRE]: list(self.times.floors(HIRE).values())},
            title="Softmax, with recall (dotted: HiRE's bytes)",
        )
        # Room for the legend.
        axis.set_ylim(top=6 * axis.get_ylim()[1])

    def _plot_step_latency(self, axis) -> None:
        colors = {"dense": plots.GRAY, HIRE: plots.BLUE}
        lines = {
            name: [medians(durations)[name] for durations in self.times.step.values()]
            for name in colors
        }
        plots.latency_lines(axis, self.settings.batches, lines, colors, title="Whole decode step")

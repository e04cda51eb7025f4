"""Figure 03: how much faster HiRE-Softmax is, and at which quality."""

import dataclasses
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import ClassVar

import jax
import numpy as np
import pandas
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import hire
from hire.lab.data.evaluation_text import evaluation_text
from hire.lab.data.model_states import States
from hire.lab.figure_index import claim_limits
from hire.lab.metrics import model_quality, search_recall
from hire.lab.metrics.intervals import mean_with_interval, points
from hire.lab.rivals.approximate_top_k import INT8
from hire.lab.studies import plots, tables
from hire.lab.studies.model_queries import NOVEL, ModelQueries, kind_label
from hire.lab.studies.study import Claim, Record, Result
from hire.lab.timing import layer_timing
from hire.models import Decoder, TextModel
from hire.ops.batches import batches
from hire.ops.row_products import row_scores
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


def prompts(queries: ModelQueries) -> list[np.ndarray]:
    """Return the first tokens of some documents of the novel."""
    novel = evaluation_text(NOVEL, PROMPTS)
    return [queries.subject.tokens(text.text, PROMPT_TOKENS) for text in novel]


def setting_name(rank: int, bits: int, candidates: int) -> str:
    """Return the name of a setting, such as "LR 128 int8 k'=2048"."""
    return f"LR {rank} int{bits} k'={candidates}"


def chosen_name(queries: ModelQueries, settings: SimpleNamespace) -> str:
    """Return the name of a model's chosen setting."""
    return setting_name(*settings.chosen[queries.name])


def fit_variants(
    queries: ModelQueries, chosen: hire.HireSoftmax, settings: SimpleNamespace
) -> dict[str, hire.HireSoftmax]:
    """Build the softmax of every rank, precision and number of candidates that is compared.

    Args:
        queries: The model and its queries.
        chosen: The softmax of the chosen setting. It is one of the results.
        settings: Sizes of the notebook.

    Returns:
        The softmaxes by `setting_name`, and the chosen one with exact rows of 8 bits by HIRE_INT8.

    Raises:
        ValueError: The chosen setting is not among those that are compared.
    """
    rows, chosen_factors = queries.rows, tuple(settings.chosen[queries.name][:2])
    estimators = {
        (rank, bits): chosen.estimator
        if (rank, bits) == chosen_factors
        else hire.LowRank.fit(rows, rank, calibration=queries.calibration.hidden, bits=bits)
        for bits in settings.bits
        for rank in settings.ranks[queries.name]
    }
    variants = {
        setting_name(rank, bits, candidates): hire.HireSoftmax(
            rows, estimator, settings.k, candidates
        )
        for candidates in settings.candidates
        for (rank, bits), estimator in estimators.items()
    }
    name = chosen_name(queries, settings)
    if name not in variants:
        raise ValueError(f"chosen setting {name}: expected one of {', '.join(variants)}")
    return variants | {name: chosen, HIRE_INT8: int8_search(rows, chosen)}


def judge_variants(
    queries: ModelQueries, variants: Mapping[str, hire.HireSoftmax], stride: int
) -> dict[str, dict[str, dict]]:
    """Measure recall and top-1 of every setting, and of int8 rows without low-rank factors.

    Args:
        queries: The model and its queries; the novel's are evaluated on.
        variants: Softmaxes by name.
        stride: Evaluate on every `stride`-th position.

    Returns:
        Name -> `recall` and `top1`, see `search_recall.judge`. The last name is INT8.
    """
    k = queries.unseen_top.indices.shape[1]
    # Rescoring k candidates does not change which tokens int8 rows find.
    int8_rows = hire.HireSoftmax(queries.rows, hire.Quantized.fit(queries.rows, bits=8), k, k)
    states, top = queries.every_nth(stride)
    return {
        name: search_recall.judge(softmax, states, top)
        for name, softmax in [*variants.items(), (INT8, int8_rows)]
    }


@dataclasses.dataclass(frozen=True)
class Quality:
    """Quality of the chosen softmax on unseen text.

    Intervals are dicts with `mean`, `low`, `high`, `documents` and `n`. All attributes but the
    first three come from every third position of the novel.

    Attributes:
        by_kind: Kind of text -> intervals of `recall` and `top1`, see `search_recall.judge`.
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

    by_kind: dict[str, dict[str, dict]]
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
        others = {
            f"recall of the top-k, {kind_label(kind)}": rates["recall"]
            for kind, rates in self.by_kind.items()
            if kind != NOVEL
        }
        shares = others | {
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


def judge_quality(queries: ModelQueries, softmax: hire.HireSoftmax) -> Quality:
    """Measure recall, sampling and perplexity of a softmax on unseen text.

    Args:
        queries: The model and its queries.
        softmax: The softmax. On the novel it searches one query at a time, by the same program that
            is timed.
    """
    results = search_recall.search_all(softmax, queries.unseen.hidden, batch=1)
    rates = search_recall.judge(results, queries.unseen, queries.unseen_top)
    by_kind = {
        kind: search_recall.judge(softmax, states, queries.true_top[kind])
        for kind, states in queries.evaluation.items()
        if kind != NOVEL
    }
    results = jax.tree.map(lambda part: part[::DISTRIBUTION_STRIDE], results)
    states, top = queries.every_nth(DISTRIBUTION_STRIDE)
    variation = model_quality.total_variation(results, top)
    same_top1 = results.indices[:, 0] == top.indices[:, 0]
    exact_losses = model_quality.losses(queries.subject.model, states)
    estimated_losses, stderr = losses_with_stderr(softmax, states)
    errors = np.abs(estimated_losses - exact_losses)
    zeros = np.zeros(len(errors))
    difference = points(estimated_losses, exact_losses, states.documents)
    ends = {end: float(np.expm1(difference[end])) for end in ("mean", "low", "high")}
    return Quality(
        by_kind={NOVEL: rates} | by_kind,
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


def compared_texts(queries: ModelQueries, converted: Decoder, settings: SimpleNamespace) -> str:
    """Return the greedy continuations of two prompts, dense and searched, see `side_by_side`."""
    models = queries.subject.model, converted
    return "\n".join(
        side_by_side(queries.subject, *continuations(models, prompt, settings))
        for prompt in prompts(queries)
    )


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
    queries: ModelQueries,
    variants: Mapping[str, hire.HireSoftmax],
    converted: Decoder,
    settings: SimpleNamespace,
) -> Times:
    """Time softmaxes, decode steps and the stages of one search.

    At every batch size, all softmaxes take turns in one run, so that a slow spell of the machine
    does not affect one of them alone.

    Args:
        queries: The model and its queries; calls take new hidden states of the novel.
        variants: The compared softmaxes by name. The chosen one is timed at every batch size, the
            others at the first.
        converted: The decoder with the chosen softmax.
        settings: Sizes of the notebook.
    """
    rows, hidden, k = queries.rows, queries.unseen.hidden, settings.k
    chosen = variants[chosen_name(queries, settings)]
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
        forms = layer_timing.step_forms(
            queries.subject.model, converted, k, batch, settings.cache_length
        )
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
class ModelSoftmax:
    """Speed and quality of the searches of one model.

    Attributes:
        weights: Description of the weights.
        chosen: Name of the chosen setting.
        calibration_queries: Number of queries that the factors were fitted to.
        variant_quality: From `judge_variants`.
        quality: Quality of the chosen setting.
        times: Times.
    """

    weights: str
    chosen: str
    calibration_queries: int
    variant_quality: dict[str, dict[str, dict]]
    quality: Quality
    times: Times

    @property
    def recalls(self) -> dict[str, float]:
        """Recall by the name of a timed softmax."""
        return {
            HIRE: self.quality.recall["mean"],
            HIRE_XLA: self.quality.recall["mean"],
            HIRE_INT8: self.variant_quality[HIRE_INT8]["recall"]["mean"],
            INT8: self.variant_quality[INT8]["recall"]["mean"],
        }

    def quality_text(self, k: int) -> str:
        """State the quality of the chosen setting."""
        quality = self.quality
        return (
            f"recall@{k} {quality.recall['mean']:.3f}, "
            f"top-1 found {quality.top1['mean']:.4f}, "
            f"perplexity {quality.perplexity_difference['mean']:+.2%}"
        )

    def speed_and_recall(self) -> dict[str, tuple[float, float]]:
        """Return the speed-up at the first batch size and the recall of every setting."""
        return {
            name: (self.times.variant_speedup(name), rates["recall"]["mean"])
            for name, rates in self.variant_quality.items()
            if name != HIRE_INT8
        }


def results_by_model(
    queries: Mapping[str, ModelQueries],
    variant_quality: Mapping[str, dict[str, dict[str, dict]]],
    quality: Mapping[str, Quality],
    times: Mapping[str, Times],
    settings: SimpleNamespace,
) -> dict[str, ModelSoftmax]:
    """Return what was measured of each model, by its name."""
    return {
        name: ModelSoftmax(
            model.subject.weights_precision,
            chosen_name(model, settings),
            len(model.calibration.hidden),
            variant_quality[name],
            quality[name],
            times[name],
        )
        for name, model in queries.items()
    }


def checks(queries: Mapping[str, ModelQueries]) -> dict[str, bool]:
    """Check statements about a search with every row a candidate, of every model.

    Args:
        queries: Each model with its queries.

    Returns:
        Whether each statement is true of every model.
    """
    same_tokens, same_normalizer = [], []
    for model in queries.values():
        x, rows = model.unseen.hidden[:8], model.rows[:512]
        complete = hire.HireSoftmax(rows, hire.Quantized.fit(rows, bits=4), 32, len(rows))
        top, log_normalizer, _ = complete.top_k_with_normalizer(x)
        true_tokens, true_normalizer = exact_output(rows, x, 32)
        same_tokens.append(bool((top.indices == true_tokens).all()))
        same_normalizer.append(bool(abs(log_normalizer - true_normalizer).max() < 1e-4))
    return {
        "with every row a candidate, tokens are exact": all(same_tokens),
        "so is the normalizer": all(same_normalizer),
    }


@dataclasses.dataclass(frozen=True)
class SoftmaxResult(Result):
    """Result of figure 03.

    Attributes:
        settings: Sizes of the notebook.
        models: Speed and quality by model. The first one is the paper's setting: a very large
            vocabulary.
        weights: Description of the weights of all models.
    """

    settings: SimpleNamespace
    models: dict[str, ModelSoftmax]
    weights: str = dataclasses.field(init=False)

    # Speed-ups change with the state of the machine.
    tolerance: ClassVar[Mapping[str, float]] = {"default": 0.35, "recall": 0.02}

    def __post_init__(self):
        weights = dict.fromkeys(model.weights for model in self.models.values())
        object.__setattr__(self, "weights", "; ".join(weights))

    def finding(self) -> str:
        """State speed-up and quality of the chosen settings, and those of int8 rows."""
        sentences, first, last = [], self.settings.batches[0], self.settings.batches[-1]
        for name, model in self.models.items():
            times, softmax, step = (
                model.times,
                model.times.softmax_speedups,
                model.times.step_speedups,
            )
            sentences.append(
                f"{name}: HiRE-Softmax ({model.chosen}) is {softmax[first]:.1f}x as fast as the "
                f"fastest dense form at batch {first} and {softmax[last]:.1f}x at {last}, a whole "
                f"step {step[first]:.2f}x and {step[last]:.2f}x. On a novel: "
                f"{model.quality_text(self.settings.k)}. Dense int8 rows reach "
                f"{times.variant_speedup(INT8):.1f}x at recall {model.recalls[INT8]:.3f}."
            )
        return " ".join(sentences)

    def series(self) -> dict:
        """Return speed-ups by batch size, and the recall of every setting and kind of text."""
        return {
            name: {
                "softmax speed-up": list(model.times.softmax_speedups.values()),
                "step speed-up": list(model.times.step_speedups.values()),
                "recall": {
                    **{
                        setting: recall for setting, (_, recall) in model.speed_and_recall().items()
                    },
                    **{
                        kind_label(kind): rates["recall"]["mean"]
                        for kind, rates in model.quality.by_kind.items()
                    },
                },
            }
            for name, model in self.models.items()
        }

    def records(self) -> list[Record]:
        """Return one record for each model. The first one's supports the claim."""
        records = [self._record(name, model) for name, model in self.models.items()]
        name, model = next(iter(self.models.items()))
        times, recall = model.times, model.quality.recall
        speedup = times.step_speedups[times.first_batch]
        low, high = times.speedup_ranges(times.step)[times.first_batch]
        claim = Claim(
            value=speedup,
            low=low,
            high=high,
            unit="x, whole decode step",
            quality=f"{model.quality_text(self.settings.k)}, {model.weights}",
            setting=f"{model.chosen}, {name}",
            supports=speedup > CLAIM_SPEEDUP and recall["low"] >= CLAIM_RECALL,
        )
        return [dataclasses.replace(records[0], claims={"softmax-speedup": claim}), *records[1:]]

    def _record(self, name: str, model: ModelSoftmax) -> Record:
        settings, quality, times = self.settings, model.quality, model.times
        rank, bits, candidates = settings.chosen[name]
        return Record(
            id=f"softmax/{name}",
            weights=model.weights,
            setting=dict(
                k=settings.k,
                rank=rank,
                candidates=candidates,
                bits=bits,
                cache_length=settings.cache_length,
                calibration_queries=model.calibration_queries,
            ),
            results=dict(
                recall=quality.recall,
                top1=quality.top1,
                recall_by_kind={kind: rates["recall"] for kind, rates in quality.by_kind.items()},
                top1_by_kind={kind: rates["top1"] for kind, rates in quality.by_kind.items()},
                bytes_fraction=times.search_bytes[HIRE][times.first_batch] / times.row_bytes,
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
                int8_search_recall=model.variant_quality[HIRE_INT8]["recall"],
                xla_speedups=times.xla_speedups(),
                sittings=times.sittings,
                stage_seconds=medians(times.stages),
            ),
            durations=dict(softmax=times.softmax, step=times.step, stages=times.stages),
        )

    def plot(self) -> Figure:
        """Draw speed-ups by batch size, recall against speed, and recall by kind of text."""
        figure, axes = plots.new_figure(1, 3, height=4.4)
        self._plot_speedups(axes[0, 0])
        self._plot_recall_and_speed(axes[0, 1])
        plots.recall_by_kind(
            axes[0, 2],
            {
                f"{name}, {model.chosen}": {
                    kind_label(kind): rates["recall"]
                    for kind, rates in model.quality.by_kind.items()
                }
                for name, model in self.models.items()
            },
            plots.PALETTE[: len(self.models)],
            title="Recall by kind of text",
        )
        return figure

    def _plot_speedups(self, axis: Axes) -> None:
        lines = {}
        for name, model in self.models.items():
            times = model.times
            lines[f"{name}, softmax"] = times.softmax_speedups, times.speedup_ranges(times.softmax)
            lines[f"{name}, whole step"] = times.step_speedups, times.speedup_ranges(times.step)
        plots.speedup_lines(axis, lines, title="Speed-up over the fastest dense form")

    def _plot_recall_and_speed(self, axis: Axes) -> None:
        points = {}
        for name, model in self.models.items():
            settings = model.speed_and_recall()
            points |= {
                f"{name}, factors of {bits} bits": {
                    setting: point
                    for setting, point in settings.items()
                    if f"int{bits}" in setting and setting != INT8
                }
                for bits in self.settings.bits
            }
            points[f"{name}, {INT8}"] = {INT8: settings[INT8]}
        chosen = [model.speed_and_recall()[model.chosen] for model in self.models.values()]
        plots.quality_speed(
            axis,
            points,
            chosen,
            title=f"Recall@{self.settings.k} and speed, batch {self.settings.batches[0]}",
        )

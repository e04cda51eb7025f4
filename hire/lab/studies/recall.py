"""Figure 02: how much must be read to find the top tokens."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pandas
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import hire
from hire.estimators.base import Estimator
from hire.lab.data.model_states import States
from hire.lab.figure_index import claim_limits
from hire.lab.metrics import search_recall
from hire.lab.studies import plots, tables
from hire.lab.studies.model_queries import NOVEL, ModelQueries, kind_label
from hire.lab.studies.study import Claim, Record, Result
from hire.ops.row_products import row_scores
from hire.tuning import BOUNDS, candidates_needed, true_top_k
from hire.types import Rows

QUERIES_OF_CURVES, QUERIES_OF_TWO_STAGES = 440, 128
# Promises of these recalls are made from so many draws of documents, with this confidence.
PROMISE_RECALLS, PROMISE_DRAWS, PROMISE_CONFIDENCE = (0.95, 0.98, 0.99), 20, 0.95
# Families of estimators, each of which is one frontier in the figure.
COLORS = {
    "LR plain": plots.GRAY,
    "LR fitted int8": plots.GREEN,
    "LR fitted int4": plots.BLUE,
    "Q int4": plots.PINK,
    "Q int4 fitted": plots.ORANGE,
    "Q int8": plots.RED,
}


def fit_estimators(queries: ModelQueries, ranks: Sequence[int]) -> dict[str, Estimator]:
    """Fit the paper's two estimators in every variant that the figure compares.

    Args:
        queries: The model and its queries; the calibration set is fitted to.
        ranks: Ranks of the low-rank estimators.
    """
    rows, calibration = queries.rows, queries.calibration.hidden
    estimators: dict[str, Estimator] = {
        "Q int8": hire.Quantized.fit(rows, bits=8),
        "Q int4": hire.Quantized.fit(rows, bits=4),
        "Q int4 fitted": hire.Quantized.fit(rows, bits=4, calibration=calibration),
    }
    for rank in ranks:
        estimators[f"LR plain, rank {rank}"] = hire.LowRank.fit(rows, rank)
        for bits in (8, 4):
            estimators[f"LR fitted int{bits}, rank {rank}"] = hire.LowRank.fit(
                rows, rank, calibration=calibration, bits=bits
            )
    return estimators


def curves(queries: ModelQueries, settings: SimpleNamespace) -> dict[str, dict[str, list[float]]]:
    """Evaluate every estimator at every k' on the novel.

    Args:
        queries: The model and its queries.
        settings: Sizes of the notebook.

    Returns:
        Result of `search_recall.curve` by estimator.
    """
    states, top = queries.every_nth(max(1, len(queries.unseen.hidden) // QUERIES_OF_CURVES))
    estimators = fit_estimators(queries, settings.ranks)
    return {
        name: search_recall.curve(queries.rows, estimator, states.hidden, top, settings.candidates)
        for name, estimator in estimators.items()
    }


def judge(
    softmaxes: Mapping[str, hire.HireSoftmax], queries: ModelQueries
) -> dict[str, dict[str, dict[str, dict]]]:
    """Measure recall and top-1 of searches by kind of text, with intervals over documents.

    Args:
        softmaxes: Searches by name.
        queries: The model and its queries.

    Returns:
        Search -> kind of text -> `recall` and `top1`, see `search_recall.judge`.
    """
    return {
        name: {
            kind: search_recall.judge(softmax, states, queries.true_top[kind])
            for kind, states in queries.evaluation.items()
        }
        for name, softmax in softmaxes.items()
    }


def promises(
    rows: Rows, estimator: Estimator, text: States, settings: SimpleNamespace
) -> dict[str, dict[str, float | None]]:
    """Compare the k' that a bound chooses on few documents with the smallest that does on all.

    Args:
        rows: Rows (m, d).
        estimator: The estimator.
        text: Queries that k' is chosen on.
        settings: Sizes of the notebook. `promise_documents` documents are drawn at a time.

    Returns:
        "<bound>, recall <target>" -> `candidates`: median k' over the draws, or None if the
        documents are too few to promise the recall in half of them; `smallest`: the smallest k'
        with that recall on all documents; `ratio` of the two; `kept`: share of the draws whose k'
        reaches the recall on the documents that were not drawn.
    """
    k = settings.k
    true_indices = true_top_k(rows, text.hidden, k).indices
    needed = candidates_needed(estimator, text.hidden, true_indices)
    _, group = np.unique(text.documents, return_inverse=True)
    sizes = np.unique(np.geomspace(k, estimator.max_candidates, 200).astype(int))
    # Recall of each document (sizes, documents).
    recall = np.stack(
        [np.bincount(group, (needed <= size).mean(1)) / np.bincount(group) for size in sizes]
    )
    draws = [
        np.random.default_rng(seed).permutation(recall.shape[1]) < settings.promise_documents
        for seed in range(PROMISE_DRAWS)
    ]
    results = {}
    for target in PROMISE_RECALLS:
        smallest = int(sizes[np.argmax(recall.mean(1) >= target)])
        for name, bound in BOUNDS.items():
            chosen = [first_size(recall[:, drawn], target, bound) for drawn in draws]
            candidates = float(np.median([np.inf if i is None else sizes[i] for i in chosen]))
            kept = [
                i is not None and recall[i, ~drawn].mean() >= target
                for i, drawn in zip(chosen, draws, strict=True)
            ]
            is_promised = bool(np.isfinite(candidates))
            results[f"{name}, recall {target:.0%}"] = dict(
                candidates=candidates if is_promised else None,
                smallest=smallest,
                ratio=candidates / smallest if is_promised else None,
                kept=float(np.mean(kept)) if is_promised else None,
            )
    return results


def first_size(
    recall: np.ndarray, target: float, bound: Callable[[np.ndarray, float], float]
) -> int | None:
    """Return the first row of recall (sizes, documents) whose lower bound reaches a target."""
    low, high = 0, len(recall) - 1
    if bound(recall[high], PROMISE_CONFIDENCE) < target:
        return None
    while low < high:
        middle = (low + high) // 2
        if bound(recall[middle], PROMISE_CONFIDENCE) >= target:
            high = middle
        else:
            low = middle + 1
    return low


def curve_table(
    curves: Mapping[str, Mapping[str, dict[str, list[float]]]], settings: SimpleNamespace
) -> pandas.DataFrame:
    """Return the recall of every model's estimators at every k', one row each."""
    return tables.by_model(
        {
            model: tables.curve_table(by_estimator, settings.candidates, "recall")
            for model, by_estimator in curves.items()
        }
    )


def two_stage_recall(queries: ModelQueries, settings: SimpleNamespace) -> dict[str, list[float]]:
    """Compare the bucketed top-k with its published formulas, on exact logits of real rows.

    Args:
        queries: The model and its queries; a part of the novel's is used.
        settings: Sizes of the notebook.

    Returns:
        See `search_recall.two_stage`.
    """
    hidden = queries.unseen.hidden
    logits = jnp.matmul(hidden[:: max(1, len(hidden) // QUERIES_OF_TWO_STAGES)], queries.rows.T)
    return search_recall.two_stage(logits, settings.k, settings.bucket_counts)


def checks(
    queries: Mapping[str, ModelQueries],
    curves: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]],
) -> dict[str, bool]:
    """Check statements about searches of every model.

    Args:
        queries: Each model with its queries.
        curves: From `curves`, for each model.

    Returns:
        Whether each statement is true of every model.
    """

    def is_exact(x: np.ndarray, rows: Rows) -> bool:
        every_row = hire.HireSoftmax(rows, hire.Quantized.fit(rows, bits=4), 32, len(rows))
        true_indices = hire.exact_top_k(row_scores(x, rows), 32).indices
        return bool((every_row(x).indices == true_indices).all())

    return {
        "with every row a candidate, the search is exact": all(
            is_exact(model.unseen.hidden[:8], model.rows[:512]) for model in queries.values()
        ),
        "int8 finds at least as much as int4": all(
            int8 >= int4
            for curve in curves.values()
            for int8, int4 in zip(curve["Q int8"]["recall"], curve["Q int4"]["recall"], strict=True)
        ),
    }


@dataclasses.dataclass(frozen=True)
class ModelRecall:
    """Recall of searches of one model.

    Attributes:
        weights: Description of the weights.
        curves: From `curves`.
        candidates: k' by search. The first search is the recommended one.
        bytes_fractions: Bytes that a query reads, as a share of the float32 rows, by search.
        judged: From `judge`.
        promises: From `promises`, for the recommended search.
        calibration_queries: Number of queries that the factors were fitted to.
    """

    weights: str
    curves: dict[str, dict[str, list[float]]]
    candidates: dict[str, int]
    bytes_fractions: dict[str, float]
    judged: dict[str, dict[str, dict[str, dict]]]
    promises: dict[str, dict[str, float | None]]
    calibration_queries: int

    @classmethod
    def of(
        cls,
        queries: ModelQueries,
        curves: dict[str, dict[str, list[float]]],
        softmaxes: Mapping[str, hire.HireSoftmax],
        text: States,
        settings: SimpleNamespace,
    ) -> "ModelRecall":
        """Judge the searches of a model, of which the first is the recommended one."""
        size, recommended = 4 * queries.rows.size, next(iter(softmaxes.values()))
        return cls(
            queries.subject.weights_precision,
            curves,
            {name: softmax.candidates for name, softmax in softmaxes.items()},
            {name: softmax.bytes_read() / size for name, softmax in softmaxes.items()},
            judge(softmaxes, queries),
            promises(queries.rows, recommended.estimator, text, settings),
            len(queries.calibration.hidden),
        )

    @property
    def recommended(self) -> str:
        """Name of the recommended search."""
        return next(iter(self.judged))

    @property
    def quality(self) -> dict[str, dict]:
        """Recall and top-1 of the recommended search on the novel."""
        return self.judged[self.recommended][NOVEL]

    def table(self) -> pandas.DataFrame:
        """Return recall and top-1 of every search on every kind of text, one row each."""
        rows, shares = {}, []
        for estimator, kinds in self.judged.items():
            for kind, rates in kinds.items():
                name = f"{estimator}, k' = {self.candidates[estimator]}: {kind_label(kind)}"
                rows[name] = rates
                shares.append(f"{self.bytes_fractions[estimator]:.1%}")
        table = tables.interval_table(rows, decimals=2)
        table.insert(0, "bytes read", shares)
        return table

    def promise_table(self) -> pandas.DataFrame:
        """Return the promises of the recommended search, one row each."""
        return pandas.DataFrame.from_dict(self.promises, orient="index").astype(float).round(2)


@dataclasses.dataclass(frozen=True)
class RecallResult(Result):
    """Result of figure 02.

    Attributes:
        settings: Sizes of the notebook.
        models: Recall by model. The first one is the paper's setting: a very large vocabulary.
        stages: From `two_stage_recall`, of the first model.
        weights: Description of the weights of all models.
    """

    settings: SimpleNamespace
    models: dict[str, ModelRecall]
    stages: dict[str, list[float]]
    weights: str = dataclasses.field(init=False)

    def __post_init__(self):
        weights = dict.fromkeys(model.weights for model in self.models.values())
        object.__setattr__(self, "weights", "; ".join(weights))

    def finding(self) -> str:
        """State recall and bytes of the recommended searches, and where they do not hold."""
        sentences = []
        for name, model in self.models.items():
            estimator, rates = model.recommended, model.quality
            sentences.append(
                f"{name}: {estimator} with k' = {model.candidates[estimator]} has recall@"
                f"{self.settings.k} {rates['recall']['mean']:.1%} (at least "
                f"{rates['recall']['low']:.1%}) on a novel, finds the top-1 token "
                f"{rates['top1']['mean']:.2%} of the time, and reads "
                f"{model.bytes_fractions[estimator]:.1%} of the float32 bytes."
            )
        if "python" in self.settings.other_kinds:
            by_model = [
                ", ".join(
                    f"{estimator} {kinds['python']['recall']['mean']:.1%}"
                    for estimator, kinds in model.judged.items()
                )
                for model in self.models.values()
            ]
            sentences.append(f"On Python source, of which nothing saw any: {'; '.join(by_model)}.")
        return " ".join(sentences)

    def series(self) -> dict:
        """Return curves and recall by kind of text of every model, and the two stages."""
        by_model = {
            name: dict(
                curves=model.curves,
                recall={
                    estimator: [rates["recall"]["mean"] for rates in kinds.values()]
                    for estimator, kinds in model.judged.items()
                },
            )
            for name, model in self.models.items()
        }
        return by_model | dict(stages=self.stages)

    def records(self) -> list[Record]:
        """Return one record for each model."""
        return [self._record(name, model) for name, model in self.models.items()]

    def _record(self, name: str, model: ModelRecall) -> Record:
        settings, estimator = self.settings, model.recommended
        recall, top1 = model.quality["recall"], model.quality["top1"]
        candidates, fraction = model.candidates[estimator], model.bytes_fractions[estimator]
        claim = Claim(
            value=recall["mean"],
            low=recall["low"],
            high=recall["high"],
            unit=f"recall@{settings.k}",
            quality=f"top-1 found {top1['mean']:.2%}, {fraction:.1%} of the float32 "
            f"bytes read, {model.weights}",
            setting=f"{estimator}, k' = {candidates}, {name}",
            supports=recall["low"] >= claim_limits("estimator")["recall"],
        )
        return Record(
            id=f"recall/{name}",
            weights=model.weights,
            setting=dict(
                estimator=estimator,
                k=settings.k,
                candidates=candidates,
                target_recall=settings.target_recall,
                calibration_queries=model.calibration_queries,
                promise_documents=settings.promise_documents,
            ),
            results=dict(
                recall=recall,
                top1=top1,
                bytes_fraction=fraction,
                by_search={
                    estimator: dict(
                        candidates=model.candidates[estimator],
                        bytes_fraction=model.bytes_fractions[estimator],
                        by_kind=kinds,
                    )
                    for estimator, kinds in model.judged.items()
                },
                promises=model.promises,
            ),
            claims={"estimator": claim, "lr-and-q": claim},
        )

    def plot(self) -> Figure:
        """Draw recall against bytes for each model, and recall by kind of text."""
        figure, axes = plots.new_figure(1, len(self.models) + 1, height=4.8)
        for axis, (name, model) in zip(axes[0], self.models.items(), strict=False):
            plots.family_frontiers(axis, families(model.curves), COLORS)
            fraction = model.bytes_fractions[model.recommended]
            plots.vertical_interval(axis, fraction, model.quality["recall"], label="recommended")
            axis.set(ylabel=f"recall@{self.settings.k}", title=f"{name}, on a novel")
        axes[0, 0].legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(0, -0.17))
        self._plot_kinds(axes[0, -1])
        return figure

    def _plot_kinds(self, axis: Axes) -> None:
        searches, colors, hollow = {}, [], []
        for index, (name, model) in enumerate(self.models.items()):
            for color, (estimator, kinds) in zip(
                (plots.BLUE, plots.ORANGE, plots.RED), model.judged.items(), strict=True
            ):
                label = f"{name}, {estimator}, {model.bytes_fractions[estimator]:.0%} of the bytes"
                searches[label] = {
                    kind_label(kind): rates["recall"] for kind, rates in kinds.items()
                }
                colors.append(color)
                hollow += [label] * (index > 0)
        plots.recall_by_kind(axis, searches, colors, hollow=hollow, title="By kind of text")


def families(
    curves: Mapping[str, Mapping[str, Sequence[float]]],
) -> dict[str, list[tuple[float, float]]]:
    """Return (bytes, recall) of all estimators of each family."""
    points: dict[str, list[tuple[float, float]]] = {}
    for name, curve in curves.items():
        family = name.partition(", rank")[0]
        pairs = zip(curve["bytes"], curve["recall"], strict=True)
        points.setdefault(family, []).extend(pairs)
    return points

"""Figure 02: how much must be read to find the top tokens."""

import dataclasses
from collections.abc import Mapping, Sequence
from types import SimpleNamespace

import jax
import jax.numpy as jnp
from matplotlib.figure import Figure

import hire
from hire.estimators.base import Estimator
from hire.lab.data import hidden_state_cache
from hire.lab.data.model_states import States
from hire.lab.data.text import documents
from hire.lab.figure_index import claim_limits
from hire.lab.metrics import search_recall
from hire.lab.studies import plots
from hire.lab.studies.study import Claim, Record, Result
from hire.models import TextModel
from hire.ops.top_k import TopK
from hire.tuning import Choice, true_top_k
from hire.types import Rows

# Evaluation text beside the novel. Neither calibration nor the choice of k' saw the Spanish text.
OTHER_KINDS = ("speech", "commentary", "scripture_es")
DOCUMENTS_OF_OTHER_KINDS = 12
QUERIES_OF_TWO_STAGES = 128


@dataclasses.dataclass(frozen=True)
class Queries:
    """Hidden states of real text; no document is in two of the sets.

    Attributes:
        calibration: Queries that factors are fitted to: speeches and commentary.
        choice: Queries that k' is chosen on.
        unseen: Queries of a novel, to evaluate on.
        unseen_top: True top-k of `unseen`.
        other_kinds: Queries of further kinds of text, to evaluate on.
    """

    calibration: States
    choice: States
    unseen: States
    unseen_top: TopK
    other_kinds: Mapping[str, States]


def load_queries(subject: TextModel, settings: SimpleNamespace) -> Queries:
    """Compute the hidden states of the texts that the study needs.

    Args:
        subject: The model.
        settings: Sizes of the notebook.
    """
    states = hidden_state_cache.cached_states
    novel = documents("evaluation", ["novel"])[: settings.evaluation_documents]
    unseen = states(subject, novel)
    return Queries(
        # Positions early in a window have little context; calibration leaves out the first four.
        calibration=states(
            subject, documents("calibration")[::2], 128, settings.calibration_windows, skip=4
        ),
        choice=states(subject, documents("train")[:: settings.choice_document_stride], 28),
        unseen=unseen,
        unseen_top=hidden_state_cache.true_top_tokens(subject, unseen.hidden, settings.k),
        other_kinds={
            kind: states(subject, documents("evaluation", [kind])[:DOCUMENTS_OF_OTHER_KINDS])
            for kind in OTHER_KINDS
        },
    )


def fit_estimators(rows: Rows, queries: Queries, ranks: Sequence[int]) -> dict[str, Estimator]:
    """Fit the paper's two estimators in every variant that the figure compares.

    Args:
        rows: Rows (m, d).
        queries: Queries; the calibration set is fitted to.
        ranks: Ranks of the low-rank estimators. The middle one also gets int4 factors.
    """
    calibration = queries.calibration.hidden
    estimators: dict[str, Estimator] = {
        "Q int8": hire.Quantized.fit(rows, bits=8),
        "Q int4": hire.Quantized.fit(rows, bits=4),
    }
    for rank in ranks:
        fit = hire.LowRank.fit
        estimators[f"LR {rank} plain"] = fit(rows, rank)
        estimators[f"LR {rank} fitted"] = fit(rows, rank, calibration=calibration)
        estimators[f"LR {rank} fitted int8"] = fit(rows, rank, calibration=calibration, bits=8)
    rank = middle(ranks)
    estimators[f"LR {rank} fitted int4"] = hire.LowRank.fit(
        rows, rank, calibration=calibration, bits=4
    )
    return estimators


def curves(
    rows: Rows,
    estimators: Mapping[str, Estimator],
    queries: Queries,
    candidates: Sequence[int],
    stride: int = 1,
) -> dict[str, dict[str, list[float]]]:
    """Evaluate every estimator at every k' (see `search_recall.curve`).

    Args:
        rows: Rows (m, d).
        estimators: Estimators by name.
        queries: Queries; the unseen set is evaluated on.
        candidates: Numbers of candidates k'.
        stride: Evaluate on every `stride`-th position.
    """
    hidden, top = jax.tree.map(
        lambda part: part[::stride], (queries.unseen.hidden, queries.unseen_top)
    )
    return {
        name: search_recall.curve(rows, estimator, hidden, top, candidates)
        for name, estimator in estimators.items()
    }


def judge(softmax: hire.HireSoftmax, queries: Queries, rows: Rows) -> dict[str, dict[str, dict]]:
    """Measure recall and top-1 of a search by kind of text, with intervals over documents.

    Args:
        softmax: The search.
        queries: Queries.
        rows: Rows (m, d) of the search.

    Returns:
        Kind of text -> `recall` and `top1`, see `search_recall.judge`.
    """
    judged = {"novel": search_recall.judge(softmax, queries.unseen, queries.unseen_top)}
    for kind, states in queries.other_kinds.items():
        top = true_top_k(rows, states.hidden, softmax.k)
        judged[kind] = search_recall.judge(softmax, states, top)
    return judged


def two_stage_recall(
    rows: Rows, queries: Queries, k: int, bucket_counts: Sequence[int]
) -> dict[str, list[float]]:
    """Compare the bucketed top-k with its published formulas, on exact logits of real rows.

    Args:
        rows: Rows (m, d).
        queries: Queries; a part of the unseen set is used.
        k: Number of results.
        bucket_counts: Numbers of buckets.

    Returns:
        See `search_recall.two_stage`.
    """
    hidden = queries.unseen.hidden
    stride = max(1, len(hidden) // QUERIES_OF_TWO_STAGES)
    return search_recall.two_stage(jnp.matmul(hidden[::stride], rows.T), k, bucket_counts)


def middle(ranks: Sequence[int]) -> int:
    """Return the rank that the figure shows in every precision."""
    return ranks[len(ranks) // 2]


@dataclasses.dataclass(frozen=True)
class RecallResult(Result):
    """Result of figure 02.

    Attributes:
        settings: Sizes of the notebook.
        weights: Description of the weights.
        curves: From `curves`.
        choice: The number of candidates that was chosen for the target recall.
        judged: From `judge`, for the chosen setting.
        bytes_fraction: Bytes that the chosen setting reads, as a share of the float32 rows.
        stages: From `two_stage_recall`.
        calibration_queries: Number of queries that the factors were fitted to.
    """

    settings: SimpleNamespace
    weights: str
    curves: dict[str, dict[str, list[float]]]
    choice: Choice
    judged: dict[str, dict[str, dict]]
    bytes_fraction: float
    stages: dict[str, list[float]]
    calibration_queries: int

    @property
    def estimator(self) -> str:
        """Name of the chosen estimator."""
        return f"LR {self.settings.chosen_rank} fitted int8"

    def finding(self) -> str:
        """State recall of the chosen setting, and what fitting changes."""
        k, candidates = self.settings.k, self.settings.candidates
        recall, top1 = self.judged["novel"]["recall"], self.judged["novel"]["top1"]
        rank, position = middle(self.settings.ranks), len(candidates) - 3
        plain, fitted = (
            self.curves[f"LR {rank} {variant}"]["recall"][position]
            for variant in ("plain", "fitted int8")
        )
        return (
            f"{self.estimator} with k' = {self.choice.candidates} has recall@{k} "
            f"{recall['mean']:.1%} (at least {recall['low']:.1%}) and finds the top-1 token "
            f"{top1['mean']:.2%} of the time, on unseen text, and reads "
            f"{self.bytes_fraction:.1%} of the float32 bytes. At k' = {candidates[position]} "
            f"plain SVD of rank {rank} has recall {plain:.1%}; factors fitted to calibration text "
            f"in int8 have {fitted:.1%}."
        )

    def series(self) -> dict:
        """Return recall, top-1, probability mass and bytes by estimator, and the two stages."""
        by_estimator = {
            f"{name} {quality}": values
            for name, curve in self.curves.items()
            for quality, values in curve.items()
        }
        return by_estimator | self.stages

    def records(self) -> list[Record]:
        """Return the record of the chosen setting."""
        settings = self.settings
        recall, top1 = self.judged["novel"]["recall"], self.judged["novel"]["top1"]
        claim = Claim(
            value=recall["mean"],
            low=recall["low"],
            high=recall["high"],
            unit=f"recall@{settings.k}",
            quality=f"top-1 found {top1['mean']:.2%}, {self.bytes_fraction:.1%} of the float32 "
            f"bytes read, {self.weights}",
            setting=f"{self.estimator}, k' = {self.choice.candidates}, {settings.model_name}",
            supports=recall["low"] >= claim_limits("estimator")["recall"],
        )
        record = Record(
            id=f"recall/{settings.model_name}",
            weights=self.weights,
            setting=dict(
                estimator=self.estimator,
                k=settings.k,
                candidates=self.choice.candidates,
                target_recall=settings.target_recall,
                calibration_queries=self.calibration_queries,
            ),
            results=dict(
                recall=recall, top1=top1, bytes_fraction=self.bytes_fraction, by_kind=self.judged
            ),
            claims={"estimator": claim, "lr-and-q": claim},
        )
        return [record]

    def plot(self) -> Figure:
        """Draw recall and top-1 over k', the frontier of recall and bytes, and the two stages."""
        figure, axes = plots.new_figure(2, 2)
        self._plot_candidates(axes[0, 0], "recall", f"recall@{self.settings.k}")
        self._plot_candidates(axes[1, 0], "top1", "top-1 found")
        self._plot_frontier(axes[0, 1])
        self._plot_two_stages(axes[1, 1])
        return figure

    def _plot_candidates(self, axis, quality: str, label: str) -> None:
        rank = middle(self.settings.ranks)
        colors = {
            f"LR {rank} plain": plots.GRAY,
            f"LR {rank} fitted int4": plots.PINK,
            f"LR {rank} fitted int8": plots.GREEN,
            "Q int4": plots.ORANGE,
            "Q int8": plots.RED,
        }
        lines = {name: self.curves[name][quality] for name in colors}
        plots.recall_lines(
            axis,
            self.settings.candidates,
            lines,
            colors,
            xlabel="candidates k'",
            ylabel=label,
            title=f"{label[0].upper()}{label[1:]} against candidates",
        )

    def _plot_frontier(self, axis) -> None:
        colors = {
            "LR plain": plots.GRAY,
            "LR fitted": plots.BLUE,
            "LR fitted int8": plots.GREEN,
            "LR fitted int4": plots.PINK,
            "Q int4": plots.ORANGE,
            "Q int8": plots.RED,
        }
        plots.frontier(axis, self.curves, colors)
        axis.plot(
            self.bytes_fraction,
            plots.miss_rate(self.judged["novel"]["recall"]["mean"]),
            "*",
            ms=15,
            color="black",
            label=f"chosen: {self.estimator}, k' {self.choice.candidates}",
        )
        axis.set(ylabel="recall", title="Recall against bytes: LR and Q on one frontier")
        axis.legend(
            frameon=False, fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.17)
        )

    def _plot_two_stages(self, axis) -> None:
        bucket_counts = self.settings.bucket_counts
        lines = {
            "best 1 of each bucket": self.stages["formula 1"],
            "best 2 of each bucket": self.stages["formula 2"],
            "TPU-KNN": self.stages["formula TPU-KNN"],
        }
        colors = dict(zip(lines, (plots.BLUE, plots.GREEN, plots.GRAY), strict=True))
        plots.recall_lines(
            axis, bucket_counts, lines, colors, xlabel="buckets", ylabel=f"recall@{self.settings.k}"
        )
        for per_bucket, color in ((1, plots.BLUE), (2, plots.GREEN)):
            measured = plots.miss_rate(self.stages[f"measured {per_bucket}"])
            axis.plot(bucket_counts, measured, "D", ms=7, mfc="none", color=color)
        axis.set_title("Two-stage top-k: published lines, measured ◇", fontsize=10)

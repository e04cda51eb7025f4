"""What fitting an estimator needs: calibration queries, ridge and kinds of text (`make fits`)."""

import numpy as np

import hire
from hire.estimators.base import Estimator
from hire.estimators.exact_rows import ExactRowsEstimator
from hire.lab import records
from hire.lab.data import hidden_state_cache
from hire.lab.data.text import documents
from hire.lab.paths import RECORDS
from hire.models import load
from hire.tuning import candidates_needed, true_top_k
from hire.types import Queries

EVALUATION_KINDS = ("novel", "speech", "commentary", "scripture_es")
CALIBRATION_KINDS = ("speech", "commentary", "scripture")
# Candidates at which the two fits of int4 rows are compared: they need few.
INT4_CANDIDATES = 64


class FitEvaluation:
    """Recall of estimators of Gemma's LM head on four kinds of text.

    Args:
        k: Size of the top-k.

    Attributes:
        gemma: The model.
        rows: Rows `(v, d)` of the LM head.
        hidden: Queries `(n, d)` by kind of text.
    """

    def __init__(self, k: int):
        self.gemma = load("gemma3_270m")
        self.rows = self.gemma.model.head_rows()
        self.hidden: dict[str, np.ndarray] = {}
        for kind in EVALUATION_KINDS:
            texts = documents("evaluation", [kind])[:60]
            windows_per_document = max(1, 60 // len(texts))
            self.hidden[kind] = hidden_state_cache.cached_states(
                self.gemma, texts, 60, windows_per_document, skip=40
            ).hidden
        self._true_indices = {
            kind: np.asarray(true_top_k(self.rows, hidden, k).indices)
            for kind, hidden in self.hidden.items()
        }

    def recall(self, estimator: Estimator, candidates: int, kind: str = "novel") -> float:
        """Return the recall of an estimator on one kind of text.

        Args:
            estimator: The estimator.
            candidates: Number of candidates (k').
            kind: Kind of text.
        """
        needed = candidates_needed(estimator, self.hidden[kind], self._true_indices[kind])
        return float(np.mean(needed <= candidates))


def judge_fits(rank: int = 112, candidates: int = 2048, k: int = 32) -> None:
    """Measure what calibration needs and write the record.

    The record states the recall of LR int8 on Gemma by the number of calibration queries and by the
    ridge, on a novel. It also states the recall by the kind of text for calibration and for
    evaluation, at about the same number of queries for each kind.

    Args:
        rank: Rank of the low-rank estimator.
        candidates: Number of candidates (k').
        k: Size of the top-k.
    """
    evaluation = FitEvaluation(k)
    gemma, rows = evaluation.gemma, evaluation.rows
    calibration = hidden_state_cache.cached_states(
        gemma, documents("calibration"), 128, 3, skip=4
    ).hidden

    def fit(queries: Queries, ridge: float = 1e-3) -> hire.LowRank:
        return hire.LowRank.fit(rows, rank, calibration=queries, bits=8, ridge=ridge)

    def recall(estimator: Estimator, kind: str = "novel") -> float:
        return evaluation.recall(estimator, candidates, kind)

    results: dict = dict(
        by_count={}, by_ridge={}, calibration_queries=len(calibration), exact_rows={}
    )
    for count in (500, 1000, 2000, 4000, 8000, 16000):
        if count < len(calibration):
            subset = calibration[:: len(calibration) // count][:count]
            results["by_count"][str(count)] = recall(fit(subset))
    for ridge in (1e-5, 1e-3, 1e-1, 1.0):
        results["by_ridge"][f"{ridge:g}"] = recall(fit(calibration, ridge))
    low_rank = fit(calibration)
    for count in (512, 2048):
        with_exact_rows = ExactRowsEstimator.fit(
            rows, low_rank, count, calibration=calibration[::16]
        )
        results["exact_rows"][str(count)] = recall(with_exact_rows)
    int4_estimators = dict(
        rows=hire.Quantized.fit(rows, 4),
        scores=hire.Quantized.fit(rows, 4, calibration=calibration),
    )
    results["int4_fitted_to"] = {
        name: evaluation.recall(estimator, INT4_CANDIDATES)
        for name, estimator in int4_estimators.items()
    }
    for kind in CALIBRATION_KINDS:
        texts = documents("train", [kind])[:30]
        queries = hidden_state_cache.cached_states(gemma, texts, 128, 2, skip=4).hidden
        estimator = fit(queries)
        by_kind = {other: recall(estimator, other) for other in EVALUATION_KINDS}
        results[f"fitted to {kind}"] = by_kind | dict(queries=len(queries))
        print(kind, results[f"fitted to {kind}"], flush=True)
    setting = dict(
        rank=rank,
        candidates=candidates,
        k=k,
        bits=8,
        evaluation_queries={kind: len(hidden) for kind, hidden in evaluation.hidden.items()},
    )
    records.write(
        RECORDS,
        "fits",
        "fits",
        kind="measured",
        weights=gemma.weights_precision,
        setting=setting,
        results=results,
        command="make fits",
    )

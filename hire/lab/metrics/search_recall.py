"""Recall of a search on hidden states."""

from collections.abc import Sequence

import numpy as np

from hire.estimators.base import Estimator
from hire.lab.data.model_states import States, in_batches
from hire.lab.metrics.intervals import mean_with_interval
from hire.layers.softmax import HireSoftmax
from hire.ops.top_k import TopK, bucketed_top_k, expected_recall, expected_recall_top1, recall
from hire.tuning import candidates_needed
from hire.types import Array, Float, Queries, Rows


def curve(
    rows: Rows, estimator: Estimator, hidden: Queries, true_top: TopK, candidates: Sequence[int]
) -> dict[str, list[float]]:
    """Evaluate an estimator at every number of candidates, against the true top-k.

    Args:
        rows: Rows (m, d).
        estimator: The estimator.
        hidden: Queries (n, d).
        true_top: True top-k (n, k) of the queries.
        candidates: Numbers of candidates k'.

    Returns:
        One list per key, with a value for each k'.
        `recall`: recall of the top-k.
        `top1`: recall of the top-1.
        `mass`: fraction of the true top-k's probability that falls on the retrieved rows.
        `bytes`: bytes read, as a fraction of float32 rows.
    """
    k = true_top.indices.shape[1]
    hits = candidates_needed(estimator, hidden, true_top.indices)[:, :, None] <= np.asarray(
        candidates
    )
    probabilities = np.exp(true_top.values - true_top.values.max(1, keepdims=True))
    probabilities /= probabilities.sum(1, keepdims=True)
    return dict(
        recall=hits.mean((0, 1)).tolist(),
        top1=hits[:, 0].mean(0).tolist(),
        mass=(hits * probabilities[:, :, None]).sum(1).mean(0).tolist(),
        bytes=[
            HireSoftmax(rows, estimator, k, count).bytes_read() / (4 * rows.size)
            for count in candidates
        ],
    )


def search_all(softmax: HireSoftmax, hidden: Queries, batch: int = 128) -> TopK:
    """Return the results of the search for many queries (n, d), as numpy arrays."""
    return in_batches(softmax, hidden, batch)


def judge(
    softmax: HireSoftmax | TopK, states: States, true_top: TopK, batch: int = 128
) -> dict[str, dict]:
    """Measure recall on the indices that the search itself returns.

    Args:
        softmax: The search, or the results (n, k) that it has returned.
        states: Hidden states with their documents.
        true_top: True top-k (n, k) of the states.
        batch: Queries per call of the search.

    Returns:
        `recall` and `top1` (recall of the top-1), each as from `mean_with_interval`.
    """
    results = softmax if isinstance(softmax, TopK) else search_all(softmax, states.hidden, batch)
    hits = np.stack(
        [
            np.isin(true_indices, indices)
            for true_indices, indices in zip(true_top.indices, results.indices, strict=True)
        ]
    )
    return dict(
        recall=mean_with_interval(hits.mean(1), states.documents),
        top1=mean_with_interval(hits[:, 0], states.documents),
    )


def two_stage(
    logits: Float[Array, "b m"], k: int, buckets: Sequence[int]
) -> dict[str, list[float]]:
    """Compare the recall of the bucketed top-k with its published formulas.

    Args:
        logits: Logits (b, m).
        k: Number of results.
        buckets: Numbers of buckets.

    Returns:
        One list per key, with a value for each number of buckets: "measured 1" and "measured 2"
        (one or two rows per bucket), "formula 1", "formula 2" and "formula TPU-KNN".
    """
    rows = logits.shape[1]
    curves = {"formula TPU-KNN": [expected_recall_top1(k, buckets=count) for count in buckets]}
    for per_bucket in (1, 2):
        results = [
            bucketed_top_k(logits, k, buckets=count, per_bucket=per_bucket).indices
            for count in buckets
        ]
        curves[f"measured {per_bucket}"] = [
            float(recall(indices, logits, k).mean()) for indices in results
        ]
        curves[f"formula {per_bucket}"] = [
            expected_recall(rows, k, buckets=count, per_bucket=per_bucket) for count in buckets
        ]
    return curves

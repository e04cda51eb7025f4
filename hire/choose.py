"""How many candidates does a recall take: the smallest k' that a sample of queries supports."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from statistics import NormalDist

import jax
import numpy as np

from hire.axes import AnyArray, Array, Float, Int, Queries, Rows
from hire.estimators import Estimator, row_scores
from hire.search import check_fitted, check_search, most_pooled, pool
from hire.topk import TopK, exact_top_k

BATCH = 256  # queries scored at once: 256 x 262,144 float32 scores are 268 MB


@dataclass(frozen=True)
class Choice:
    """k' and what supports it: the mean recall seen and its lower bound, 0 to 1, over so many queries."""

    candidates: int
    recall: float
    bound: float
    queries: int


def choose_candidates(
    rows: Rows,
    estimator: Estimator,
    queries: Queries,
    *,
    k: int,
    recall: float,
    confidence: float = 0.95,
    documents: Sequence | np.ndarray | None = None,
) -> Choice:
    """The smallest k' whose recall@k on the given queries (n, d) has a lower bound, at `confidence`, of at least `recall`.

    The bound is `mean_bound`'s, over documents when the document of each query is given: neighbouring positions of
    one text are alike, and n of them say less than n texts.

    Raises ValueError when recall or confidence is not strictly between 0 and 1, when shapes do not fit, or when the queries are
    too few to support that recall even if none is missed.
    """
    check_search(rows, estimator, k, k)
    check_fitted(rows, estimator)
    for name, value in dict(recall=recall, confidence=confidence).items():
        if not 0 < value < 1:
            raise ValueError(f"{name} = {value!r}: expected a number between 0 and 1, neither included")
    if queries.ndim != 2 or queries.shape[1] != rows.shape[1] or not len(queries):
        raise ValueError(f"queries of shape {queries.shape}: expected (n, {rows.shape[1]}) with n of at least 1")
    best_possible = mean_bound(np.ones(len(queries)), documents, confidence)
    if best_possible < recall:
        raise ValueError(
            f"{len(queries)} queries: too few, since with no miss at all they prove a recall of {best_possible:.4f}, not {recall}"
        )
    depths = candidates_needed(estimator, queries, true_top_k(rows, queries, k).indices)

    def bound(candidates: int) -> float:
        return mean_bound(np.mean(depths <= candidates, axis=1), documents, confidence)

    low, high = k, rows.shape[0]  # the recall seen grows with k', so a bisection finds the smallest
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if bound(middle) >= recall else (middle + 1, high)
    return Choice(low, float(np.mean(depths <= low)), bound(low), len(queries))


@partial(jax.jit, static_argnames="k")
def dense_top_k(rows: Rows, x: Queries, k: int) -> TopK:
    """The exact top-k (b, k) of queries (b, d), from the scores of every row."""
    return exact_top_k(row_scores(x, rows), k)


def true_top_k(rows: Rows, queries: Queries, k: int) -> TopK:
    """dense_top_k of many queries (n, d), in numpy, from scores that are never all held at once."""
    parts = [jax.device_get(dense_top_k(rows, batch, k)) for batch in batches(queries)]
    return TopK(*(np.concatenate(part) for part in zip(*parts, strict=True)))


@jax.jit
def estimated_scores(estimator: Estimator, x: Queries) -> tuple[Float[Array, "b m"], Float[Array, "b m"]]:
    """Estimated scores of every row, and of the pool alone."""
    scores = estimator.scores(x)
    return scores, pool(scores)


def candidates_needed(estimator: Estimator, queries: Queries, best: Int[AnyArray, "n k"]) -> np.ndarray:
    """The k' (n, k) from which on each of the true rows `best` (n, k) of each query is among the candidates of the search.

    Its share at or below k' is the recall at k', for every k' at once. Rows that tie with a true one in the estimate count as
    before it, and so do the few that only the search by buckets leaves out, just below where it ends: never too much is counted.
    """
    needed, most = [], most_pooled(estimator.shape[0])
    for batch, rows in zip(batches(queries), batches(best), strict=True):
        for scores, pooled, true in zip(*map(np.asarray, estimated_scores(estimator, batch)), rows, strict=True):
            near, far = depths(pooled, true), depths(scores, true)
            needed.append(np.where((near <= most) & (far <= most + 1), near, np.maximum(far, most + 1)))
    return np.stack(needed)


def depths(scores: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """How many scores (m,) are at least that of each of the rows (k,)."""
    floors = scores[rows]
    # Only what scores above the worst of the rows needs sorting: a few hundred of 262,144.
    above = np.sort(scores[scores >= floors.min()])
    return len(above) - np.searchsorted(above, floors)


def batches(queries, size: int = BATCH):
    """Slices of at most `size` queries."""
    return [queries[start : start + size] for start in range(0, len(queries), size)]


def mean_bound(values: np.ndarray, documents: Sequence | np.ndarray | None = None, confidence: float = 0.95) -> float:
    """One-sided lower confidence bound of the mean of values (n,) in [0, 1].

    Wilson's score bound at the effective number of values: p (1 - p) over the squared standard error, which is
    taken over documents when they are given (n labels), so that it counts how alike the values of one document are. When every
    value is 1, as when none is, the effective number is n, the limit of ever rarer, unrelated misses. Approximate (it rests on the
    normal distribution of a mean over documents), so give it dozens of documents.

    Raises ValueError when documents are not one label a value, or are fewer than two.
    """
    values = np.asarray(values, np.float64)
    labels = np.arange(len(values)) if documents is None else np.asarray(documents)
    if labels.shape != values.shape:
        raise ValueError(f"{len(labels)} document labels: expected one for each of the {len(values)} values")
    _, group = np.unique(labels, return_inverse=True)
    groups, n, mean = group.max() + 1, len(values), values.mean()
    if groups < 2:
        raise ValueError(f"{n} values of 1 document: expected at least 2 documents, whose differences give the bound")
    residuals = np.bincount(group, values - mean)
    variance = groups / (groups - 1) * np.sum(residuals**2) / n**2
    effective = min(n, mean * (1 - mean) / variance) if variance > 0 else n
    z = NormalDist().inv_cdf(confidence)
    centre = mean + z**2 / (2 * effective)
    spread = z * np.sqrt(mean * (1 - mean) / effective + z**2 / (4 * effective**2))
    return float((centre - spread) / (1 + z**2 / effective))

"""How many candidates does a recall take, and of which copy: the smallest k' that a sample of queries supports."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from hire.axes import AnyArray, Array, Float, Int, Queries, Rows
from hire.estimators import Estimator, check_finite, row_nbytes, row_scores
from hire.search import Cascade, check_fitted, check_search, most_pooled, on_device, pool
from hire.topk import TopK, exact_top_k

BATCH = 256  # queries scored at once: 256 x 262,144 float32 scores are 268 MB


@dataclass(frozen=True)
class Choice:
    """k' and what supports it: the mean recall of the documents and its lower bound for fresh ones, 0 to 1; how many queries of how
    many documents.
    """

    candidates: int
    recall: float
    bound: float
    queries: int
    documents: int


@dataclass(frozen=True)
class Tuned:
    """The cheapest estimator, by name, its choice of k', and what every one of them takes: name -> choice and cost."""

    name: str
    estimator: Estimator
    choice: Choice
    every: dict[str, tuple[Choice, float]]


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
    """The smallest k' whose mean recall@k on fresh documents is at least `recall`, at that confidence: see fresh_bound.

    rows (m, d) and a sample of queries (n, d), with the document of each: neighbouring positions of one text are alike, and n of
    them say less than n texts. Without `documents` each query is one. The promise is for documents that are drawn as these were, so
    give it every kind of text that it is to hold for. Our choice: the paper names none.

    Queries are as the search will see them: hidden states after the final norm, for a softmax.

    Raises ValueError when recall or confidence is not strictly between 0 and 1, when shapes do not fit, for a query that is not
    finite, or when the documents are too few to support that recall even if nothing is missed; it says how many are needed.
    """
    return tune(rows, {"": estimator}, queries, k=k, recall=recall, confidence=confidence, documents=documents).choice


def tune(
    rows: Rows,
    estimators: Mapping[str, Estimator],
    queries: Queries,
    *,
    k: int,
    recall: float,
    confidence: float = 0.95,
    documents: Sequence | np.ndarray | None = None,
    cost: Callable[[Estimator, int], float] | None = None,
) -> Tuned:
    """The cheapest of some estimators with the k' that it takes for a recall: choose_candidates of each, at a confidence that
    covers the choice among them.

    `cost` of an estimator and k' is the bytes that a query reads, unless another is given, such as seconds that were measured.
    Arguments and errors as of choose_candidates, and ValueError for a cost that is not finite. Our choice: the paper names none.
    """
    for name, value in dict(recall=recall, confidence=confidence).items():
        if not 0 < value < 1:
            raise ValueError(f"{name} = {value!r}: expected a number between 0 and 1, neither included")
    if not estimators:
        raise ValueError("estimators = {}: expected at least one")
    rows = on_device(rows)
    for estimator in estimators.values():
        k, _ = check_search(rows, estimator, k, k)
        check_fitted(rows, estimator)
    if queries.ndim != 2 or queries.shape[1] != rows.shape[1] or not len(queries):
        raise ValueError(f"queries of shape {queries.shape}: expected (n, {rows.shape[1]}) with n of at least 1")
    check_finite("queries", queries)
    each = 1 - (1 - confidence) / len(estimators)  # all bounds hold together, so the one that is taken does
    count = len(means(np.ones(len(queries)), documents))
    if fresh_bound(np.ones(count), each) < recall:
        raise ValueError(
            f"{len(queries)} queries of {count} documents: too few to promise a recall of {recall} at confidence {confidence}: "
            f"expected at least {documents_needed(recall, each)} documents"
        )
    best = true_top_k(rows, queries, k).indices

    def chosen(estimator: Estimator) -> Choice:
        depths = candidates_needed(estimator, queries, best)

        def found(candidates: int) -> np.ndarray:
            return means(np.mean(depths <= candidates, axis=1), documents)

        most = estimator.kept[-1] if isinstance(estimator, Cascade) else rows.shape[0]
        if (reached := fresh_bound(found(most), each)) < recall:
            raise ValueError(f"a cascade that keeps {most}: promises a recall of {reached:.4f} at most, not {recall}; keep more")
        low, high = k, most  # the recall seen grows with k', so a bisection finds the smallest
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if fresh_bound(found(middle), each) >= recall else (middle + 1, high)
        return Choice(low, float(found(low).mean()), fresh_bound(found(low), each), len(queries), count)

    def read(estimator: Estimator, candidates: int) -> int:
        return estimator.bytes_read(candidates) + candidates * row_nbytes(rows, rows.shape[1])

    choices = {name: chosen(estimator) for name, estimator in estimators.items()}
    every = {name: (choice, float((cost or read)(estimators[name], choice.candidates))) for name, choice in choices.items()}
    for name, (_, value) in every.items():
        if not math.isfinite(value):
            raise ValueError(f"cost of {name!r} = {value}: expected a finite number")
    name = min(every, key=lambda name: every[name][1])
    return Tuned(name, estimators[name], choices[name], every)


def means(values: np.ndarray, documents: Sequence | np.ndarray | None) -> np.ndarray:
    """The mean of the values (n,) of each document. Raises ValueError when documents are not one label a value."""
    _, group = labelled(values, documents)
    return np.bincount(group, values) / np.bincount(group)


def labelled(values: np.ndarray, documents: Sequence | np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """The documents that there are, and the place among them of each value's (n,). Raises ValueError when they are not one label a
    value, or when a value is not finite.
    """
    if not np.isfinite(values).all():
        raise ValueError(f"value {int(np.argmin(np.isfinite(values)))} of {len(values)} is not finite: expected finite values")
    labels = np.arange(len(values)) if documents is None else np.asarray(documents)
    if labels.shape != values.shape:
        raise ValueError(f"{len(labels)} document labels: expected one for each of the {len(values)} values")
    return np.unique(labels, return_inverse=True)


STAKES = np.asarray([0.5, 0.8, 0.98])  # high ones win most where values are near 1, as recall is


def fresh_bound(values: np.ndarray, confidence: float) -> float:
    """Lower confidence bound of the mean that values in [0, 1] (n,) were drawn from independently, whatever their distribution.

    By betting (Waudby-Smith and Ramdas, arXiv 2010.09686): who stakes a share of a capital on every value being above a mean that
    is true gains nothing on average, so a mean at which three gamblers with fixed stakes end with 1 / (1 - confidence) times what
    they had, or more, is false (Ville). Every smaller mean is then false as well. Raises ValueError for a value that is not in
    [0, 1].
    """

    if not ((values >= 0) & (values <= 1)).all():
        raise ValueError(f"values from {np.min(values)} to {np.max(values)}: expected numbers from 0 to 1")

    def refuted(mean: float) -> bool:
        logs = np.log1p(np.outer(STAKES, values / mean - 1)).sum(1)
        return bool(np.logaddexp.reduce(logs) - math.log(len(STAKES)) >= -math.log(1 - confidence))

    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


def documents_needed(recall: float, confidence: float) -> int:
    """So many documents support a recall when nothing is missed in any; with misses it takes more."""
    low, high = 1, 2**24
    while low < high:
        middle = (low + high) // 2
        log = np.logaddexp.reduce(middle * np.log1p(STAKES * (1 / recall - 1))) - math.log(len(STAKES))
        low, high = (low, middle) if log >= -math.log(1 - confidence) else (middle + 1, high)
    return low


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
    """Estimated scores of every row that can be nominated, and of those that the search by buckets sees alone."""
    if isinstance(estimator, Cascade):  # which takes no buckets of what its last one sees
        *_, (chosen, better) = estimator.levels(x)
        scores = jnp.full((len(x), estimator.shape[0]), -jnp.inf).at[jnp.arange(len(x))[:, None], chosen].set(better)
        return scores, scores
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
            some = np.flatnonzero(scores >= scores[true].min())  # only they are to be sorted: a few hundred of 262,144
            near = np.where(pooled[true] > -np.inf, depths(pooled[some], pooled[true]), len(scores))
            far = depths(scores[some], scores[true])
            needed.append(np.where((near <= most) & (far <= most + 1), near, np.maximum(far, most + 1)))
    return np.stack(needed)


def depths(scores: np.ndarray, floors: np.ndarray) -> np.ndarray:
    """How many scores (m,) are at least each of the floors (k,)."""
    return len(scores) - np.searchsorted(np.sort(scores), floors)


def batches(queries, size: int = BATCH):
    """Slices of at most `size` queries."""
    return [queries[start : start + size] for start in range(0, len(queries), size)]

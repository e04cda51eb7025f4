"""Choose the number of candidates and the estimator for a target recall."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from hire.estimators.base import Estimator, check_fitted, check_search, to_device
from hire.ops.batches import batches
from hire.ops.checks import check_finite, check_range
from hire.ops.nomination import mask_bucket_losers, max_bucketed_candidates
from hire.ops.row_products import row_nbytes, row_scores
from hire.ops.top_k import TopK, exact_top_k
from hire.search import search_queries
from hire.timing import interleaved, medians
from hire.types import AnyArray, Array, Float, Int, Queries, Rows

# Name of the product with all rows among the answers of `tune`.
DENSE = "dense"
# Calls of each search that `tune` times.
TIMED_CALLS = 15


@dataclass(frozen=True)
class Choice:
    """A number of candidates and the evidence for it.

    Attributes:
        candidates: Number of candidates (k').
        recall: Mean recall over the sampled documents, 0 to 1.
        bound: Lower confidence bound of the mean recall on fresh documents, 0 to 1.
        queries: Number of sampled queries.
        documents: Number of documents that the queries come from.
        method: How the bound was computed: "betting" or "bootstrap".
        documents_to_halve: Number of documents, instead of `documents`, with which half of the
            candidates would do if they were like these. None if no number would.
    """

    candidates: int
    recall: float
    bound: float
    queries: int
    documents: int
    method: str = "betting"
    documents_to_halve: int | None = None


@dataclass(frozen=True)
class Tuned:
    """The cheapest estimator and the results of all estimators.

    Attributes:
        name: Name of the cheapest estimator, or DENSE.
        estimator: The cheapest estimator. None for DENSE: no search is faster than all rows.
        choice: Its number of candidates.
        choices: Choice and cost of every estimator, by name.
    """

    name: str
    estimator: Estimator | None
    choice: Choice
    choices: dict[str, tuple[Choice, float]]


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
    """Choose the smallest k' that reaches a target recall on fresh documents.

    The mean recall@k on fresh documents is at least `recall`, at the given confidence: see
    `betting_lower_bound`. Neighbouring positions of one text are alike, so n of them say less than
    n texts. The bound holds for documents drawn as the sample was, so include every kind of text
    that you will search. Our choice: the paper names no method.

    Args:
        rows: Rows `(m, d)`.
        estimator: Estimator of these rows.
        queries: A sample of queries `(n, d)`, as the search will see them. For a softmax these are
            hidden states after the final norm.
        k: Number of rows that the search returns.
        recall: Target recall, strictly between 0 and 1.
        confidence: Confidence of the bound, strictly between 0 and 1.
        documents: Document label of each query `(n,)`. By default each query is a document.

    Returns:
        The number of candidates and the evidence for it.

    Raises:
        ValueError: If recall or confidence is not strictly between 0 and 1, if shapes do not fit,
            if a query is not finite, if the estimator cannot nominate enough candidates for the
            recall, or if the documents are too few to support the recall even when every true row
            is nominated. The message then says how many documents are needed.
    """
    return tune(
        rows,
        {"": estimator},
        queries,
        k=k,
        recall=recall,
        confidence=confidence,
        documents=documents,
    ).choice


def tune(
    rows: Rows,
    estimators: Mapping[str, Estimator],
    queries: Queries,
    *,
    k: int,
    recall: float,
    confidence: float = 0.95,
    documents: Sequence | np.ndarray | None = None,
    batch: int | None = None,
    cost: Callable[[Estimator, int], float] | None = None,
    bound: str = "betting",
    bias: Float[AnyArray, " m"] | None = None,
) -> Tuned:
    """Choose the cheapest estimator and its k' for a target recall.

    Runs the method of `choose_candidates` on every estimator. The confidence also covers the choice
    among the estimators. Our choice: the paper names no method.

    Args:
        rows: Rows `(m, d)`.
        estimators: Estimators of these rows, by name.
        queries: A sample of queries `(n, d)`, as in `choose_candidates`.
        k: Number of rows that the search returns.
        recall: Target recall, strictly between 0 and 1.
        confidence: Confidence of all bounds together, strictly between 0 and 1.
        documents: Document label of each query `(n,)`. By default each query is a document.
        batch: Queries of a call. With it the cost is the median seconds of a call on this device,
            and the product with all rows is an answer too, named DENSE. So the answer was never
            slower than that when it was timed; keep the machine idle meanwhile.
        cost: Cost of an estimator with k' candidates. By default the bytes that one query reads.
        bound: "betting" promises the recall for any distribution of documents, see
            `betting_lower_bound`. "bootstrap" is cheaper and only approximate: it assumes that the
            sampled documents show all that there is, see `bootstrap_lower_bound`.
        bias: Bias of each row `(m,)`, which is added to its scores, or None.

    Returns:
        The cheapest estimator, its number of candidates, and the results of all estimators.

    Raises:
        ValueError: As `choose_candidates`, and if `estimators` is empty or names one DENSE, if an
            estimator cannot nominate enough candidates for the recall, if `batch` is below 1 or
            given with a cost, or if a cost is not finite.
    """
    check_costs(estimators, len(queries), batch, cost)
    for name, value in dict(recall=recall, confidence=confidence).items():
        if not 0 < value < 1:
            raise ValueError(
                f"{name} = {value!r}: expected a number between 0 and 1, neither included"
            )
    rows = to_device(rows)
    for estimator in estimators.values():
        k, _ = check_search(rows, estimator, k, k)
        check_fitted(rows, estimator)
    if bound not in BOUNDS:
        raise ValueError(f"bound = {bound!r}: expected one of {', '.join(BOUNDS)}")
    lower_bound = BOUNDS[bound]
    if queries.ndim != 2 or queries.shape[1] != rows.shape[1] or not len(queries):
        raise ValueError(
            f"queries of shape {queries.shape}: expected (n, {rows.shape[1]}) with n of at least 1"
        )
    check_finite("queries", queries)
    # All bounds hold together, so the bound of the cheapest estimator holds too.
    bound_confidence = 1 - (1 - confidence) / len(estimators)
    num_documents = len(document_means(np.ones(len(queries)), documents))
    if lower_bound(np.ones(num_documents), bound_confidence) < recall:
        raise ValueError(
            f"{len(queries)} queries of {num_documents} documents: too few to promise a "
            f"recall of {recall} at confidence {confidence}: "
            f"expected at least {documents_needed(recall, bound_confidence)} documents"
        )
    true_indices = true_top_k(rows, queries, k, bias).indices

    def chosen(estimator: Estimator) -> Choice:
        needed = candidates_needed(estimator, queries, true_indices, bias)

        def recall_by_document(candidates: int) -> np.ndarray:
            return document_means(np.mean(needed <= candidates, axis=1), documents)

        max_candidates = estimator.max_candidates
        if (value := lower_bound(recall_by_document(max_candidates), bound_confidence)) < recall:
            raise ValueError(
                f"an estimator that nominates at most {max_candidates} rows: its recall is at "
                f"least {value:.4f}, and {recall} is asked for; increase its stage sizes or lower "
                "recall"
            )
        # The sample recall grows with k', so bisection gives the smallest sufficient k'.
        low, high = k, max_candidates
        while low < high:
            middle = (low + high) // 2
            low, high = (
                (low, middle)
                if lower_bound(recall_by_document(middle), bound_confidence) >= recall
                else (middle + 1, high)
            )
        return Choice(
            low,
            float(recall_by_document(low).mean()),
            lower_bound(recall_by_document(low), bound_confidence),
            len(queries),
            num_documents,
            bound,
            documents_for(recall_by_document(low // 2), recall, bound_confidence),
        )

    def read(estimator: Estimator, candidates: int) -> int:
        return estimator.bytes_read(candidates) + candidates * row_nbytes(rows, rows.shape[1])

    choices = {name: chosen(estimator) for name, estimator in estimators.items()}
    if batch is None:
        costs = {
            name: float((cost or read)(estimators[name], choice.candidates))
            for name, choice in choices.items()
        }
    else:
        costs = measured_costs(rows, estimators, choices, queries, k, batch)
        choices[DENSE] = Choice(rows.shape[0], 1.0, 1.0, len(queries), num_documents)
    name = cheapest(costs)
    results = {name: (choice, costs[name]) for name, choice in choices.items()}
    return Tuned(name, estimators.get(name), choices[name], results)


def check_costs(
    estimators: Mapping[str, Estimator], queries: int, batch: int | None, cost: Callable | None
) -> None:
    """Check that there are estimators, and one way to tell their cost.

    Raises:
        ValueError: If there is no estimator, if `batch` is not in 1..queries or is given with a
            cost, or if `batch` is given and an estimator is named DENSE.
    """
    if not estimators:
        raise ValueError("estimators = {}: expected at least one")
    if batch is None:
        return
    check_range("batch", batch, 1, queries, "the number of queries")
    if cost is not None:
        raise ValueError(f"batch = {batch} and a cost: expected one of them")
    if DENSE in estimators:
        raise ValueError(f"an estimator named {DENSE!r}: expected another name")


def cheapest(costs: Mapping[str, float]) -> str:
    """Return the name with the lowest cost.

    Raises:
        ValueError: If a cost is not finite.
    """
    for name, value in costs.items():
        if not math.isfinite(value):
            raise ValueError(f"cost of {name!r} = {value}: expected a finite number")
    return min(costs, key=lambda name: costs[name])


def measured_costs(
    rows: Rows,
    estimators: Mapping[str, Estimator],
    choices: Mapping[str, Choice],
    queries: Queries,
    k: int,
    batch: int,
) -> dict[str, float]:
    """Return the median seconds of a call of every search, and of the product with all rows.

    All take turns, with cold caches, see `hire.timing.interleaved`.

    Args:
        rows: Rows `(m, d)`.
        estimators: Estimators of these rows, by name.
        choices: Number of candidates of each estimator.
        queries: Queries `(n, d)`; calls take new ones.
        k: Number of rows that the search returns.
        batch: Queries of a call.

    Returns:
        Seconds by name; DENSE is the product with all rows.
    """
    search_form = jax.jit(search_queries, static_argnames=("k", "candidates"))
    forms: dict[str, Callable] = {DENSE: lambda x: dense_top_k(rows, x, k)}
    for name, estimator in estimators.items():
        forms[name] = partial(
            lambda x, estimator, count: search_form(x, rows, estimator, k=k, candidates=count),
            estimator=estimator,
            count=choices[name].candidates,
        )
    order = np.random.default_rng(0).permutation(len(queries))
    calls = [
        jnp.asarray(queries[np.take(order, range(i * batch, (i + 1) * batch), mode="wrap")])
        for i in range(TIMED_CALLS)
    ]
    return medians(interleaved(forms, calls, TIMED_CALLS))


def document_means(values: np.ndarray, documents: Sequence | np.ndarray | None) -> np.ndarray:
    """Average values within each document.

    Args:
        values: Values `(n,)`.
        documents: Document label of each value `(n,)`. By default each value is a document.

    Returns:
        The mean value of each document.

    Raises:
        ValueError: If the number of labels differs from the number of values, or if a value is not
            finite.
    """
    _, group = labelled(values, documents)
    return np.bincount(group, values) / np.bincount(group)


def labelled(
    values: np.ndarray, documents: Sequence | np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the distinct documents and the document index of each value.

    Args:
        values: Values `(n,)`.
        documents: Document label of each value `(n,)`. By default each value is a document.

    Returns:
        The distinct labels, and for each value `(n,)` the index of its label among them.

    Raises:
        ValueError: If the number of labels differs from the number of values, or if a value is not
            finite.
    """
    if not np.isfinite(values).all():
        raise ValueError(
            f"value {int(np.argmin(np.isfinite(values)))} of {len(values)} is not finite: expected "
            "finite values"
        )
    labels = np.arange(len(values)) if documents is None else np.asarray(documents)
    if labels.shape != values.shape:
        raise ValueError(
            f"{len(labels)} document labels: expected one for each of the {len(values)} values"
        )
    return np.unique(labels, return_inverse=True)


# Stakes of the three gamblers, and their shares of the capital at the start. High stakes win most
# when values are near 1, as recall is.
BETS, CAPITAL = np.asarray([0.5, 0.8, 0.98]), np.asarray([0.05, 0.15, 0.8])


def betting_lower_bound(values: np.ndarray, confidence: float) -> float:
    """Return a lower confidence bound of the mean of independent values in [0, 1].

    The bound holds for any distribution. It uses betting (Waudby-Smith and Ramdas, arXiv
    2010.09686): a gambler stakes a share of the capital on every value being above a hypothetical
    mean. If that mean is true, the gambler gains nothing on average. Three gamblers with shares of
    one capital bet fixed stakes. If the capital grows to at least 1 / (1 - confidence) times its
    start, the hypothetical mean is refuted (Ville's inequality), and so is every smaller mean.

    Args:
        values: Values `(n,)` in [0, 1], drawn independently.
        confidence: Confidence of the bound.

    Returns:
        The lower bound of the mean, 0 to 1.

    Raises:
        ValueError: If a value is not in [0, 1].
    """

    if not ((values >= 0) & (values <= 1)).all():
        raise ValueError(
            f"values from {np.min(values)} to {np.max(values)}: expected numbers from 0 to 1"
        )

    def refuted(mean: float) -> bool:
        log_capital = np.log(CAPITAL) + np.log1p(np.outer(BETS, values / mean - 1)).sum(1)
        return bool(np.logaddexp.reduce(log_capital) >= -math.log(1 - confidence))

    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


def bootstrap_lower_bound(values: np.ndarray, confidence: float) -> float:
    """Return an approximate lower confidence bound of the mean of independent values.

    It is the quantile of the means of 2000 samples with replacement. It cannot know of values that
    the sample does not show: a rare document with a low recall, for one.

    Args:
        values: Values `(n,)`.
        confidence: Confidence of the bound.

    Returns:
        The lower bound of the mean.
    """
    draws = np.random.default_rng(0).integers(len(values), size=(2000, len(values)))
    return float(np.quantile(np.asarray(values)[draws].mean(axis=1), 1 - confidence))


BOUNDS = {"betting": betting_lower_bound, "bootstrap": bootstrap_lower_bound}


def documents_for(values: np.ndarray, recall: float, confidence: float) -> int | None:
    """Return how many documents like the given ones would support a recall, by betting.

    Args:
        values: Recall of each document `(n,)`.
        recall: Target recall.
        confidence: Confidence of the bound.

    Returns:
        The number of documents. None if no number would: their own mean recall is too low.
    """
    growth = np.log1p(np.outer(BETS, values / recall - 1)).mean(axis=1)
    targets = -np.log(CAPITAL) - math.log(1 - confidence)
    counts = [target / gain for target, gain in zip(targets, growth, strict=True) if gain > 0]
    return math.ceil(min(counts)) if counts else None


def documents_needed(recall: float, confidence: float) -> int:
    """Return the number of documents that support a recall when every true row is nominated.

    With misses more documents are needed.

    Args:
        recall: Target recall, 0 to 1.
        confidence: Confidence of the bound.

    Returns:
        The smallest sufficient number of documents.
    """
    low, high = 1, 2**24
    while low < high:
        middle = (low + high) // 2
        log_capital = np.logaddexp.reduce(
            np.log(CAPITAL) + middle * np.log1p(BETS * (1 / recall - 1))
        )
        low, high = (
            (low, middle) if log_capital >= -math.log(1 - confidence) else (middle + 1, high)
        )
    return low


@partial(jax.jit, static_argnames="k")
def dense_top_k(rows: Rows, x: Queries, k: int, bias: Float[AnyArray, " m"] | None = None) -> TopK:
    """Return the exact top-k of queries from the scores of all rows.

    Args:
        rows: Rows `(m, d)`.
        x: Queries `(b, d)`.
        k: Number of rows to return for each query.
        bias: Bias of each row `(m,)`, or None.

    Returns:
        The scores `(b, k)` and the row indices `(b, k)`.
    """
    scores = row_scores(x, rows)
    return exact_top_k(scores if bias is None else scores + jnp.asarray(bias)[None], k)


def true_top_k(
    rows: Rows, queries: Queries, k: int, bias: Float[AnyArray, " m"] | None = None
) -> TopK:
    """Return the exact top-k of many queries, in NumPy.

    Works in batches, so that the scores of all queries are never in memory together.

    Args:
        rows: Rows `(m, d)`.
        queries: Queries `(n, d)`.
        k: Number of rows to return for each query.
        bias: Bias of each row `(m,)`, or None.

    Returns:
        The scores `(n, k)` and the row indices `(n, k)`.
    """
    batch_results = [
        jax.device_get(dense_top_k(rows, batch, k, bias)) for batch in batches(queries)
    ]
    return TopK(*(np.concatenate(arrays) for arrays in zip(*batch_results, strict=True)))


@jax.jit
def estimated_scores(
    estimator: Estimator, x: Queries, bias: Float[AnyArray, " m"] | None = None
) -> tuple[Float[Array, "b m"], Float[Array, "b m"]]:
    """Return the estimated scores of all rows that the estimator can nominate.

    Args:
        estimator: The estimator.
        x: Queries `(b, d)`.
        bias: Bias of each row `(m,)`, or None.

    Returns:
        The scores `(b, m)`, and the same scores `(b, m)` with -inf for the rows that the bucketed
        search does not see. Rows that the estimator cannot nominate have -inf in both.
    """
    # An estimator that cannot nominate all rows nominates exactly the best of those that it can.
    if estimator.max_candidates < estimator.shape[0]:
        indices = estimator.nominate(x, estimator.max_candidates)
        candidate_scores = estimator.scores_at(x, indices)
        scores = (
            jnp.full((len(x), estimator.shape[0]), -jnp.inf)
            .at[jnp.arange(len(x))[:, None], indices]
            .set(candidate_scores)
        )
        return scores, scores
    scores = estimator.scores(x)
    if bias is not None:
        scores = scores + jnp.asarray(bias)[None]
    return scores, mask_bucket_losers(scores)


def candidates_needed(
    estimator: Estimator,
    queries: Queries,
    true_indices: Int[AnyArray, "n k"],
    bias: Float[AnyArray, " m"] | None = None,
) -> np.ndarray:
    """Return the smallest k' at which the search nominates each true row.

    The share of entries `<= k'` is the recall at k', for all k' together. The result never
    overstates the recall. A row that ties with a true row in the estimate ranks before it. Just
    below the largest k' of the bucketed search, rows that only this search leaves out also rank
    before it.

    Args:
        estimator: The estimator.
        queries: Queries `(n, d)`.
        true_indices: Indices of the true top-k rows `(n, k)`.
        bias: Bias of each row `(m,)`, or None. An estimator that cannot nominate all rows ignores
            it.

    Returns:
        For each true row the smallest k' `(n, k)` from which on it is a candidate.
    """
    needed, max_bucketed = [], max_bucketed_candidates(estimator.shape[0])
    for batch, batch_indices in zip(batches(queries), batches(true_indices), strict=True):
        for scores, pooled, true_indices in zip(
            *map(np.asarray, estimated_scores(estimator, batch, bias)), batch_indices, strict=True
        ):
            # Sort only the scores that matter for the ranks: a few hundred of 262,144.
            contenders = np.flatnonzero(scores >= scores[true_indices].min())
            bucketed_rank = np.where(
                pooled[true_indices] > -np.inf,
                rank_of_true(pooled[contenders], pooled[true_indices]),
                len(scores),
            )
            full_rank = rank_of_true(scores[contenders], scores[true_indices])
            needed.append(
                np.where(
                    (bucketed_rank <= max_bucketed) & (full_rank <= max_bucketed + 1),
                    bucketed_rank,
                    np.maximum(full_rank, max_bucketed + 1),
                )
            )
    return np.stack(needed)


def rank_of_true(scores: np.ndarray, floors: np.ndarray) -> np.ndarray:
    """Count the scores that are at least as large as each floor.

    Args:
        scores: Scores `(m,)`.
        floors: Floors `(k,)`.

    Returns:
        The counts `(k,)`.
    """
    return len(scores) - np.searchsorted(np.sort(scores), floors)

"""The algorithm of HiRE: predict with a small copy, then compute exactly what was predicted."""

import jax.numpy as jnp
from jax.core import Tracer

from hire.axes import Array, Float, Indices, Queries, Rows, Scores
from hire.estimators import Estimator, fingerprint, row_scores_at
from hire.topk import TopK, bucket_keys, bucket_winners, bucketed_indices, check_count, exact_top_k

DEPTH, PER_BUCKET = 64, 2  # the best two of every 64 rows are the pool of a k' that is at most half of it


def nominate(scores: Scores, candidates: int) -> Indices:
    """The `candidates` (k') best rows (*b, k') by estimated scores (*b, m), best first.

    Few of many rows are taken from the best of each bucket: a row is missed only where two better ones share its bucket, and
    there is no top-k of all rows, which would take longer than their scores.
    """
    rows = scores.shape[-1]
    if candidates <= most_pooled(rows):
        return bucketed_indices(scores, candidates, -(-rows // DEPTH), PER_BUCKET)
    return exact_top_k(scores, candidates).indices


def most_pooled(rows: int) -> int:
    """The largest k' that `nominate` takes from the buckets."""
    return rows // DEPTH


def pool(scores: Float[Array, "b m"]) -> Float[Array, "b m"]:
    """The scores of the rows that are among the best of their bucket; -inf for the others, which `nominate` may not see."""
    keys, _ = bucket_keys(scores, -(-scores.shape[-1] // DEPTH))
    inside = keys >= jnp.expand_dims(bucket_winners(keys, PER_BUCKET)[-1], -2)
    return jnp.where(inside.reshape(len(scores), -1)[:, : scores.shape[-1]], scores, -jnp.inf)


def high_recall_top_k(x: Queries, rows: Rows, estimator: Estimator, *, k: int, candidates: int) -> TopK:
    """The k best rows (m, d) for each query (b, d), of the `candidates` (k') that the estimator puts first.

    The returned float32 values (b, k) are exact scores; the indices (b, k) are the true top-k whenever all of them are
    among the candidates. Reads the estimator and k' rows instead of m (PAPER claim estimator).

    Raises ValueError when 1 <= k <= candidates <= m does not hold or shapes do not fit.
    """
    check_search(rows, estimator, k, candidates)
    _, chosen, exact = nominated(x, rows, estimator, candidates)
    return best_of(chosen, exact, k)


def nominated(
    x: Queries, rows: Rows, estimator: Estimator, candidates: int
) -> tuple[Float[Array, "b m"], Indices, Float[Array, "b c"]]:
    """Estimated scores of all rows, the candidates, and the candidates' exact scores: all that one search computes."""
    if x.ndim != 2 or x.shape[1] != rows.shape[1]:
        raise ValueError(f"queries of shape {x.shape}: expected (b, {rows.shape[1]}), the width of the rows")
    estimated = estimator.scores(x)
    chosen = nominate(estimated, candidates)
    return estimated, chosen, row_scores_at(x, rows, chosen)


def best_of(chosen: Indices, exact: Float[Array, "b c"], k: int) -> TopK:
    """The k best of the candidates by their exact scores."""
    best = exact_top_k(exact, k)
    return TopK(best.values, jnp.take_along_axis(chosen, best.indices, axis=-1))


def check_search(rows: Rows, estimator: Estimator, k: int, candidates: int) -> None:
    """Raise ValueError unless the estimator is of rows of this shape and 1 <= k <= candidates <= m."""
    if rows.ndim != 2:
        raise ValueError(f"rows of shape {rows.shape}: expected (m, d)")
    if tuple(estimator.shape) != tuple(rows.shape):
        raise ValueError(f"estimator of rows {tuple(estimator.shape)}: expected {tuple(rows.shape)}, as the rows are")
    check_count("k", k, 1, rows.shape[0], "the number of rows")
    check_count("candidates", candidates, k, rows.shape[0], "from k to the number of rows")


def check_fitted(rows: Rows, estimator: Estimator) -> None:
    """Raise ValueError when the estimator was fitted to other rows of that shape. Reads all rows; inside jax.jit it cannot tell."""
    known = estimator.fingerprint
    if not (isinstance(rows, Tracer) or isinstance(known, Tracer)) and fingerprint(rows) != known:
        raise ValueError(f"estimator of other rows {tuple(rows.shape)}: expected one fitted to these; fit it again")

"""The algorithm of HiRE: predict with a small copy, then compute exactly what was predicted."""

import jax.numpy as jnp

from hire.axes import Queries, Rows
from hire.estimators import Estimator, row_scores_at
from hire.topk import TopK, check_count, exact_top_k


def high_recall_top_k(x: Queries, rows: Rows, estimator: Estimator, *, k: int, candidates: int) -> TopK:
    """The k best rows (m, d) for each query (b, d), of the `candidates` (k') that the estimator puts first.

    The returned float32 values (b, k) are exact scores; the indices (b, k) are the true top-k whenever all of them are
    among the candidates. Reads the estimator and k' rows instead of m (PAPER claim estimator).

    Raises ValueError when 1 <= k <= candidates <= m does not hold or shapes do not fit.
    """
    check_search(rows, estimator, k, candidates)
    if x.ndim != 2 or x.shape[1] != rows.shape[1]:
        raise ValueError(f"queries of shape {x.shape}: expected (b, {rows.shape[1]}), the width of the rows")
    chosen = exact_top_k(estimator.scores(x), candidates).indices
    best = exact_top_k(row_scores_at(x, rows, chosen), k)
    return TopK(best.values, jnp.take_along_axis(chosen, best.indices, axis=-1))


def check_search(rows: Rows, estimator: Estimator, k: int, candidates: int) -> None:
    """Raise ValueError unless the estimator is of these rows and 1 <= k <= candidates <= m."""
    if rows.ndim != 2:
        raise ValueError(f"rows of shape {rows.shape}: expected (m, d)")
    if tuple(estimator.shape) != tuple(rows.shape):
        raise ValueError(f"estimator of rows {tuple(estimator.shape)}: expected {tuple(rows.shape)}, as the rows are")
    check_count("k", k, 1, rows.shape[0], "the number of rows")
    check_count("candidates", candidates, k, rows.shape[0], "from k to the number of rows")

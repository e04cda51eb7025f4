"""The search: nominate candidates, rescore them exactly, take the top-k."""

from hire.estimators.base import (
    Estimator,
    check_fitted,
    check_queries,
    check_search,
    map_leading_axes,
)
from hire.estimators.quantized import Quantized
from hire.ops import cpu as cpu_kernels
from hire.ops.implementation import check_implementation, dispatch
from hire.ops.row_products import cpu_row_kernel, row_scores_at
from hire.ops.top_k import TopK, top_k_with_indices
from hire.types import Array, Blocks, Float, Indices, Queries, Rows, States


def high_recall_top_k(
    x: States,
    rows: Rows | Blocks | Quantized,
    estimator: Estimator,
    *,
    k: int,
    candidates: int,
    implementation: str = "auto",
) -> TopK:
    """Return the top-k rows of each query among the candidates that the estimator nominates.

    The search reads the estimator and k' rows instead of all m rows (PAPER claim estimator). The
    indices are the true top-k whenever the candidates contain the true top-k. Queries and rows are
    multiplied in float32, or in their 16-bit float type when both have the same one. NumPy rows
    are sent to the device at every call, so pass jax arrays.

    Args:
        x: Queries `(b, d)`, or one query `(d,)`.
        rows: Rows `(m, d)`, the same rows in `hire.ops.tpu.row_scores.blocks`, or `Quantized` rows.
        estimator: Estimator of these rows.
        k: Number of rows to return for each query.
        candidates: Number of candidates (k').
        implementation: "auto", "xla", "pallas" (the TPU kernels) or "cpu" (the CPU kernels).
            "auto" uses the kernels of the platform for the parts that they support. The TPU kernels
            support quantized estimators and rows in blocks, which a TPU can fetch one by one. The
            CPU kernels support quantized estimators, and rows in float32, bfloat16 or quantized;
            they need numba. The others force that implementation; there is no fallback.

    Returns:
        The exact float32 scores `(b, k)` and the row indices `(b, k)`. Of equal scores among the
        candidates the lower index comes first.

    Raises:
        ValueError: If `1 <= k <= candidates <= m` does not hold, if shapes do not fit, if the
            estimator was fitted to other rows (not checked inside `jax.jit`), or if kernels are
            forced on inputs that they do not support or where they cannot run.
    """
    k, candidates = check_search(rows, estimator, k, candidates)
    check_fitted(rows, estimator)
    check_queries(x, estimator)
    check_implementation(implementation)
    if implementation == "pallas" and len(rows.shape) == 2:
        raise ValueError(
            "implementation = 'pallas': expected rows in hire.ops.tpu.row_scores.blocks, not "
            f"{tuple(rows.shape)}"
        )
    return map_leading_axes(
        lambda x: search_queries(x, rows, estimator, k, candidates, implementation), x
    )


def search_queries(
    x: Queries,
    rows: Rows | Blocks | Quantized,
    estimator: Estimator,
    k: int,
    candidates: int,
    implementation: str = "auto",
) -> TopK:
    """Run `high_recall_top_k` on queries `(b, d)` without checking the arguments.

    Args:
        x: Queries `(b, d)`.
        rows: Rows, as in `high_recall_top_k`.
        estimator: Estimator of these rows.
        k: Number of rows to return for each query.
        candidates: Number of candidates (k').
        implementation: "auto", "xla", "pallas" or "cpu".

    Returns:
        The exact float32 scores `(b, k)` and the row indices `(b, k)`.
    """
    indices = estimator.nominate(x, candidates, implementation=implementation)
    return top_k_at(x, rows, indices, k, implementation)


def top_k_at(
    x: Queries, rows: Rows | Blocks | Quantized, indices: Indices, k: int, implementation: str
) -> TopK:
    """Return the best k of the rows at given indices, by their exact scores.

    Args:
        x: Queries `(b, d)`.
        rows: Rows, as in `high_recall_top_k`.
        indices: Row indices `(b, c)`.
        k: Number of rows to return for each query.
        implementation: "auto", "xla", "pallas" or "cpu".

    Returns:
        The scores `(b, k)` and the row indices `(b, k)`, best first.
    """

    def in_two_steps(x: Queries, rows: Rows | Blocks | Quantized, indices: Indices) -> TopK:
        by_kernel = implementation if len(rows.shape) == 3 else "xla"
        return rerank(indices, row_scores_at(x, rows, indices, implementation=by_kernel), k)

    def cpu_kernel(x: Queries, rows: Rows | Quantized, indices: Indices) -> TopK:
        return cpu_kernels.load("row_scores").top_k_at(x, rows, indices, k)

    if len(rows.shape) == 3:
        return in_two_steps(x, rows, indices)
    kernel = cpu_row_kernel(rows) and cpu_kernel
    forced = "xla" if implementation == "pallas" else implementation
    return dispatch(forced, in_two_steps, x, rows, indices, cpu=kernel)


def rerank(chosen: Indices, exact: Float[Array, "b c"], k: int) -> TopK:
    """Return the top-k candidates by their exact scores.

    Args:
        chosen: Row indices of the candidates `(b, c)`.
        exact: Exact scores of the candidates `(b, c)`.
        k: Number of candidates to return for each query.

    Returns:
        The scores `(b, k)` and the row indices `(b, k)`, best first. Of equal scores the lower
        row index comes first.
    """
    return top_k_with_indices(exact, chosen, k)

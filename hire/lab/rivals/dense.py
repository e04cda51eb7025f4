"""Dense implementations of the top-k. The fastest one is the baseline of every speed-up."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from hire.ops import cpu as cpu_kernels
from hire.ops.row_products import blocked_scores, row_scores
from hire.ops.top_k import exact_top_k
from hire.types import Array, Float, Queries, Rows


def padded(rows: Rows, x: Queries) -> Float[Array, "b m"]:
    """Return the scores of all rows, with the batch padded to a multiple of 16 queries."""
    return (jnp.pad(x, ((0, -len(x) % 16), (0, 0))) @ rows.T)[: len(x)]


def cpu_kernel(rows: Rows, x: Queries) -> Float[Array, "b m"]:
    """Return the scores of all rows from the CPU kernel, or XLA's where it cannot run."""
    return row_scores(x, rows, "cpu" if cpu_kernels.is_available() else "xla")


# Six implementations of the scores of all rows for queries (b, d). HiRE is compared with the
# fastest one.
DENSE: dict[str, Callable] = {
    "dense x @ W.T": lambda rows, x: x @ rows.T,
    "dense W @ x": lambda rows, x: (rows @ x[0])[None] if len(x) == 1 else (rows @ x.T).T,
    "dense multiply-reduce": lambda rows, x: (
        jnp.sum(rows * x, 1)[None] if len(x) == 1 else row_scores(x, rows, "xla")
    ),
    "dense in pieces": lambda rows, x: x @ rows.T if len(x) == 1 else blocked_scores(x, rows),
    "dense padded to 16": padded,
    "dense CPU kernel": cpu_kernel,
}


def dense_forms(rows: Rows, k: int) -> dict[str, Callable]:
    """Return the exact top-k over the scores of all rows, in every dense implementation.

    Args:
        rows: Rows (m, d).
        k: Number of results.

    Returns:
        Functions of queries (b, d), by the names of DENSE.
    """

    def form(scores: Callable) -> Callable:
        compiled = jax.jit(lambda rows, x: exact_top_k(scores(rows, x), k))
        return lambda x: compiled(rows, x)

    return {name: form(scores) for name, scores in DENSE.items()}

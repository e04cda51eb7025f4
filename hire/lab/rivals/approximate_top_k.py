"""Approximate top-k of other libraries, next to the dense implementations."""

from collections.abc import Callable

import jax

import hire
from hire.lab.rivals.dense import dense_forms
from hire.ops import cpu as cpu_kernels
from hire.ops.row_products import row_scores
from hire.types import Array, Float, Queries, Rows

INT8 = "dense int8 rows"


APPROX = "lax.approx_max_k"


def rivals(rows: Rows, k: int) -> dict[str, Callable]:
    """Return the dense implementations and the approximate alternatives of a user.

    The alternatives are jax.lax.approx_max_k on dense logits, and int8 rows without rescoring by
    exact rows.

    Args:
        rows: Rows (m, d).
        k: Number of results.

    Returns:
        Functions of queries (b, d), by name: those of `dense_forms`, APPROX and INT8.
    """
    approximate = jax.jit(lambda rows, x: jax.lax.approx_max_k(row_scores(x, rows), k))
    small = hire.Quantized.fit(rows, 8)
    quantized = jax.jit(lambda small, x: hire.exact_top_k(int8_scores(small, x), k))
    return dense_forms(rows, k) | {
        APPROX: lambda x: approximate(rows, x),
        INT8: lambda x: quantized(small, x),
    }


def int8_scores(rows: hire.Quantized, x: Queries) -> Float[Array, "b m"]:
    """Return the scores of all int8 rows in the fastest form.

    For several queries on a CPU that is the kernel that sums integers.
    """
    if len(x) == 1 or not cpu_kernels.is_available():
        return rows.scores(x)
    return cpu_kernels.load("row_scores").scores(x, rows, round_to_int16=True)

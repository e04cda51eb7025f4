"""Certified search: for each query, say whether its top-k is proved to be the true one.

Not in the paper. A row's score is its estimate plus an error: the product of the query and the
part of the row that the estimator leaves out. This error is at most the product of their lengths
(Cauchy and Schwarz). Every fitted estimator carries these bounds: see
`hire.estimators.error_bounds`. The candidates are the rows with the highest upper bounds. If the
lowest of the k exact scores exceeds the upper bound of every other row, the answer is proved.
The bounds count every rounding and every cast. Numbers that are not finite and normal prove
nothing.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hire.estimators.base import check_fitted, check_queries, check_search, map_leading_axes
from hire.estimators.error_bounds import UNDERFLOW, exact_score_error, length
from hire.estimators.low_rank import LowRank
from hire.estimators.quantized import Quantized
from hire.ops.row_products import row_scores
from hire.ops.top_k import TopK, exact_top_k
from hire.types import AnyArray, Array, Bool, Float, Indices, Queries, Rows, Scores, States

# Largest power of two to divide by: its inverse is a normal number with room to spare.
LARGEST = 2.0**100
# Least largest entry of a query: below it, entries that a CPU flushes to 0 may matter.
SMALLEST = 2.0**-90
# Queries searched at once. With 262,144 rows their estimates take 17 MB, plus the candidates'
# rows of each query twice.
QUERIES_PER_STEP = 16


class Certified(NamedTuple):
    """A top-k and, for each query, whether it is proved to be the true top-k.

    Attributes:
        top: Scores and row indices `(*b, k)`.
        proved: Whether the top-k of each query `(*b,)` is proved.
    """

    top: TopK
    proved: Bool[Array, "*b"]


def pairwise_dot(x: Queries, rows: Float[Array, "b c d"]) -> Float[Array, "b c"]:
    """Return the scores of each query with its candidates' rows, summed pairwise.

    Each step adds one half of the terms to the other half. The sum thus has about log2(d) roundings
    instead of d.

    Args:
        x: Queries `(b, d)`.
        rows: Rows of each query's candidates `(b, c, d)`.

    Returns:
        Float32 scores `(b, c)`.
    """
    terms = rows * x[:, None]
    while terms.shape[-1] > 1:
        half = -(-terms.shape[-1] // 2)
        second_half = terms[..., half:]
        terms = terms[..., :half] + jnp.pad(
            second_half, ((0, 0), (0, 0), (0, half - second_half.shape[-1]))
        )
    return terms[..., 0]


def top_upper_bounds(upper: Scores, candidates: int) -> tuple[Indices, Float[Array, " b"]]:
    """Return the candidates with the highest upper bounds, and the highest bound of the other rows.

    The k' + 1 highest rows lie in the k' + 1 blocks with the highest maxima, so only these blocks
    are searched. A bound that is not finite counts as infinite.

    Args:
        upper: Upper bound of the score of every row `(b, m)`.
        candidates: Number of candidates (k').

    Returns:
        The row indices of the candidates `(b, k')`, and the highest upper bound of all other rows
        `(b,)`.
    """
    b, m = upper.shape
    num_top, block_size = min(candidates + 1, m), math.isqrt(m // candidates)
    bounds = jnp.where(jnp.isfinite(upper), upper, jnp.inf).astype(jnp.float32)
    blocks = jnp.pad(bounds, ((0, 0), (0, -m % block_size)), constant_values=-jnp.inf).reshape(
        b, -1, block_size
    )
    top_blocks = exact_top_k(jnp.max(blocks, axis=-1), min(num_top, blocks.shape[1])).indices
    top = exact_top_k(
        jnp.take_along_axis(blocks, top_blocks[..., None], axis=1).reshape(b, -1), num_top
    )
    indices = (
        jnp.take_along_axis(top_blocks, top.indices // block_size, axis=1) * block_size
        + top.indices % block_size
    )
    other_bound = top.values[:, candidates] if candidates < m else jnp.full(b, -jnp.inf)
    return indices[:, :candidates], jnp.asarray(other_bound)


def scaled_queries(
    x: Queries,
) -> tuple[Float[Array, "b d"], Float[Array, "b 1"], Bool[Array, " b"]]:
    """Divide queries by a power of two so that their largest entries are at least 1.

    A query keeps its values if its largest entry is not finite or is below SMALLEST.

    Args:
        x: Queries `(b, d)`.

    Returns:
        The scaled queries `(b, d)` in float32, the power of two `(b, 1)`, and whether each query
        could be scaled `(b,)`.
    """
    wide = jnp.asarray(x if x.dtype == jnp.float64 else x.astype(jnp.float32))
    largest = jnp.max(jnp.abs(wide), axis=1, keepdims=True).astype(jnp.float32)
    exponent_bits = jax.lax.bitcast_convert_type(largest, jnp.int32) & jnp.int32(0x7F800000)
    power = jax.lax.bitcast_convert_type(exponent_bits, jnp.float32)
    usable = jnp.isfinite(largest) & (largest >= SMALLEST)
    power = jnp.where(usable, jnp.minimum(power, LARGEST), 1.0)
    return (wide / power.astype(wide.dtype)).astype(jnp.float32), power, usable[:, 0]


def certified_top_k(
    x: States,
    rows: Rows,
    estimator: LowRank | Quantized,
    *,
    k: int,
    candidates: int,
    dense_fallback: bool = False,
) -> Certified:
    """Search as `high_recall_top_k`, in plain JAX, and prove the top-k where possible.

    A proof says that no missing row scores above a returned row. It concerns real numbers: the
    product of query and row as given, whatever their types. It relies on IEEE float32 products, as
    a CPU computes them. A TPU multiplies at its highest precision; that error has not been measured
    here. A query is never proved if it has a value that is not finite, or no value of at least
    2^-90. Int8 rows prove most answers; 4 bits and low rank prove almost none. Not in the paper.

    Memory: the search takes 16 queries at once. It needs 16 m float32 numbers, and the rows of the
    candidates of 16 queries twice: 70 MB for 262,144 rows of 640 entries and k' = 512, for any
    number of queries.

    Args:
        x: Queries `(b, d)` or `(*b, d)`.
        rows: Rows `(m, d)`.
        estimator: Fitted estimator of these rows. Its `fit` computes the error bounds.
        k: Number of rows to return for each query.
        candidates: Number of candidates (k').
        dense_fallback: Whether to search all rows for queries without a proof. The answer then
            always equals that of dense float32 scores. All rows are read if any query has no proof.

    Returns:
        The top-k and whether it is proved, for each query.

    Raises:
        ValueError: As `high_recall_top_k`, and for an estimator without error bounds.
    """
    k, candidates = check_search(rows, estimator, k, candidates)
    check_fitted(rows, estimator)
    check_queries(x, estimator)
    if getattr(estimator, "error_bounds", None) is None:
        raise ValueError(
            f"{type(estimator).__name__} without error bounds: expected one that LowRank.fit or "
            "Quantized.fit made"
        )

    def proved(x: Queries) -> Certified:
        if len(x) <= QUERIES_PER_STEP:
            return certified(x, jnp.asarray(rows), estimator, k, candidates)
        batches = jnp.pad(x, ((0, -len(x) % QUERIES_PER_STEP), (0, 0))).reshape(
            -1, QUERIES_PER_STEP, x.shape[1]
        )
        result = jax.lax.map(
            lambda queries: certified(queries, jnp.asarray(rows), estimator, k, candidates), batches
        )
        return jax.tree.map(lambda part: part.reshape(-1, *part.shape[2:])[: len(x)], result)

    def prove_batch(x: Queries) -> Certified:
        result = proved(x)
        if not dense_fallback:
            return result

        def dense() -> TopK:
            dense_top = exact_top_k(row_scores(x, rows), k)
            return jax.tree.map(
                lambda one, other: jnp.where(result.proved[:, None], one, other),
                result.top,
                dense_top,
            )

        return Certified(
            jax.lax.cond(jnp.all(result.proved), lambda: result.top, dense), result.proved
        )

    with jax.default_matmul_precision("highest"):
        return map_leading_axes(prove_batch, jnp.asarray(x))


def certified(
    x: Queries, rows: AnyArray, estimator: LowRank | Quantized, k: int, candidates: int
) -> Certified:
    """Run `certified_top_k` on a few queries, without the dense fallback.

    Args:
        x: Queries `(b, d)`.
        rows: Rows `(m, d)`.
        estimator: Estimator with error bounds.
        k: Number of rows to return for each query.
        candidates: Number of candidates (k').

    Returns:
        The top-k and whether it is proved, for each query.
    """
    width = rows.shape[1]
    bounds = estimator.error_bounds
    assert bounds is not None
    scaled, power, usable = scaled_queries(x)
    query_length = length(scaled)
    indices, other_bound = top_upper_bounds(
        estimator.scores(scaled) + query_length[:, None] * bounds[None], candidates
    )
    candidate_rows = rows[indices].astype(jnp.float32)
    scores = pairwise_dot(scaled, candidate_rows)
    max_row_length = jnp.max(length(candidate_rows), axis=1)
    score_error = query_length * (
        (1 + 16 / 2**24) * exact_score_error(width) * max_row_length
        + UNDERFLOW * width * (1 + max_row_length)
    )
    top = exact_top_k(scores, min(k + 1, candidates))
    lower_bound = top.values[:, k - 1] - score_error
    if candidates > k:
        other_bound = jnp.maximum(other_bound, top.values[:, k] + score_error)
    finite = usable & jnp.all(jnp.isfinite(scores), axis=1) & jnp.isfinite(score_error)
    top = TopK(top.values[:, :k] * power, jnp.take_along_axis(indices, top.indices[:, :k], axis=1))
    return Certified(top, finite & (lower_bound >= other_bound))

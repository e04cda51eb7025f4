"""Certified search: for each query, say whether its top-k is proved to be the true one.

Not in the paper. A row's score is its estimate plus an error: the product of the query and the
part of the row that the estimator leaves out. This error is at most the product of their lengths
(Cauchy and Schwarz). Every fitted estimator carries these bounds: see
`hire.estimators.error_bounds`. The candidates are the rows with the highest upper bounds. If the
lowest of the k exact scores exceeds the upper bound of every other row, the answer is proved.
The bounds count every rounding and every cast. Numbers that are not finite and normal prove
nothing.

An LM head may make a logit of a score with a bias, a soft cap, penalties and a mask. None of them
lets a logit fall where its score rises, so bounds of scores become bounds of logits: see
`hire.layers.logit_bounds`.
"""

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from hire.estimators.base import (
    Estimator,
    check_fitted,
    check_queries,
    check_search,
    map_leading_axes,
)
from hire.estimators.error_bounds import UNDERFLOW, exact_score_error, length
from hire.estimators.low_rank import LowRank
from hire.estimators.quantized import Quantized
from hire.ops.row_products import row_scores
from hire.ops.top_k import TopK, exact_top_k, top_k_positions
from hire.types import AnyArray, Array, Bool, Float, Indices, Int, Queries, Rows, Scores, States

# Largest power of two to divide by: its inverse is a normal number with room to spare.
LARGEST = 2.0**100
# Least largest entry of a query: below it, entries that a CPU flushes to 0 may matter.
SMALLEST = 2.0**-90
# Queries searched at once. With 262,144 rows their estimates take 17 MB, plus the candidates'
# rows of each query twice.
QUERIES_PER_STEP = 16
# Bound of a row that does not count, below the bounds of all rows that do.
EXCLUDED, LOWEST_BOUND = -(2.0 - 2.0**-23) * 2.0**127, -(2.0**127)
# What a rounding may lose of a number that is not normal, with room to spare.
SMALLEST_ERROR = 2.0**-100


class Certified(NamedTuple):
    """A top-k and, for each query, whether it is proved to be the true top-k.

    Attributes:
        top: Scores and row indices `(*b, k)`.
        proved: Whether the top-k of each query `(*b,)` is proved.
    """

    top: TopK
    proved: Bool[Array, "*b"]


@runtime_checkable
class ScoreToLogit(Protocol):
    """What makes logits of the scores of rows, for a few queries.

    A logit of a row must not fall where its score rises.
    """

    def at(self, indices: Indices) -> "ScoreToLogit":
        """Return the same for the rows at indices `(b, c)`."""
        ...

    @property
    def allowed(self) -> Bool[Array, "_ n"] | None:
        """Which rows count, for each query or for all; None for all rows."""
        ...

    def logits(self, scores: Float[Array, "b n"], direction: int) -> Float[Array, "b n"]:
        """Return the logits of scores, as if all rows counted.

        Args:
            scores: Scores `(b, n)`.
            direction: 1 for upper bounds, -1 for lower bounds; 0 for logits as a head computes
                them. A bound that is not finite must be inf, or -inf for a lower one.
        """
        ...


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


def widened(
    values: Float[Array, "b n"], error: Float[Array, "b n"], direction: int
) -> Float[Array, "b n"]:
    """Return bounds of numbers: the numbers and their errors added, or subtracted.

    Args:
        values: Rounded numbers `(b, n)`.
        error: Twice what the numbers may be off by, or more `(b, n)`.
        direction: 1 for upper bounds, -1 for lower bounds; 0 returns the numbers.

    Returns:
        The bounds. One that is not finite becomes inf, or -inf for a lower one.
    """
    if direction == 0:
        return values
    bounds = values + direction * (error + SMALLEST_ERROR)
    return jnp.where(jnp.isfinite(bounds), bounds, direction * jnp.inf)


def top_upper_bounds(
    upper: Scores, candidates: int, allowed: Bool[Array, "_ m"] | None = None
) -> tuple[Indices, Float[Array, " b"]]:
    """Return the candidates with the highest upper bounds, and the highest bound of the other rows.

    The k' + 1 highest rows lie in the k' + 1 blocks with the highest maxima, so only these blocks
    are searched. A bound that is not finite counts as infinite.

    Args:
        upper: Upper bound of the score of every row `(b, m)`.
        candidates: Number of candidates (k').
        allowed: Which rows count, for each query or for all; None for all rows. The others are
            candidates only where fewer than k' rows count.

    Returns:
        The row indices of the candidates `(b, k')`, and the highest upper bound of all other rows
        `(b,)`; -inf if no other row counts.
    """
    b, m = upper.shape
    num_top, block_size = min(candidates + 1, m), math.isqrt(m // candidates)
    bounds = jnp.where(jnp.isfinite(upper), upper, jnp.inf).astype(jnp.float32)
    if allowed is not None:
        bounds = jnp.where(allowed, jnp.maximum(bounds, LOWEST_BOUND), EXCLUDED)
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
    if allowed is not None:
        other_bound = jnp.where(other_bound > EXCLUDED, other_bound, -jnp.inf)
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
    here. `HireSoftmax.certified` proves the same of logits with a bias, a soft cap, a mask and
    penalties. A query is never proved if it has a value that is not finite, or no value of at least
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
    check_error_bounds(estimator)
    return prove_top_k(x, jnp.asarray(rows), estimator, k, candidates, dense_fallback)


def check_error_bounds(estimator: Estimator) -> LowRank | Quantized:
    """Return an estimator that knows its error bounds.

    Args:
        estimator: The estimator.

    Raises:
        ValueError: If it has no error bounds.
    """
    if isinstance(estimator, LowRank | Quantized) and estimator.error_bounds is not None:
        return estimator
    raise ValueError(
        f"{type(estimator).__name__} without error bounds: expected one that LowRank.fit or "
        "Quantized.fit made"
    )


def prove_top_k(
    x: States,
    rows: Array,
    estimator: LowRank | Quantized,
    k: int,
    candidates: int,
    dense_fallback: bool,
    logits_for: Callable[[Int[Array, " b"]], ScoreToLogit] | None = None,
) -> Certified:
    """Run `certified_top_k` without its checks, on the logits that scores become.

    Args:
        x: Queries `(*b, d)`.
        rows: Rows `(m, d)`.
        estimator: Estimator with error bounds.
        k: Number of rows to return for each query.
        candidates: Number of candidates (k').
        dense_fallback: As in `certified_top_k`.
        logits_for: Function of the numbers of some queries, counted over all leading axes. It
            returns what makes logits of their scores. None ranks the rows by their scores.

    Returns:
        The top-k and whether it is proved, for each query.
    """

    def proved(x: Queries, numbers: Int[Array, " b"]) -> Certified:
        to_logits = None if logits_for is None else logits_for(numbers)
        return certified(x, rows, estimator, k, candidates, to_logits)

    def proved_in_steps(x: Queries, numbers: Int[Array, " b"]) -> Certified:
        if len(x) <= QUERIES_PER_STEP:
            return proved(x, numbers)
        padding = -len(x) % QUERIES_PER_STEP
        x_batches = jnp.pad(x, ((0, padding), (0, 0))).reshape(-1, QUERIES_PER_STEP, x.shape[1])
        number_batches = jnp.pad(numbers, (0, padding)).reshape(-1, QUERIES_PER_STEP)
        result = jax.lax.map(lambda batch: proved(*batch), (x_batches, number_batches))
        return jax.tree.map(lambda part: part.reshape(-1, *part.shape[2:])[: len(x)], result)

    def dense_top_k(x: Queries, numbers: Int[Array, " b"]) -> TopK:
        logits = row_scores(x, rows)
        if logits_for is not None:
            to_logits = logits_for(numbers)
            logits = to_logits.logits(logits, 0)
            if to_logits.allowed is not None:
                logits = jnp.where(to_logits.allowed, logits, -jnp.inf)
        return exact_top_k(logits, k)

    def prove_batch(x: Queries) -> Certified:
        numbers = jnp.arange(len(x), dtype=jnp.int32)
        result = proved_in_steps(x, numbers)
        if not dense_fallback:
            return result

        def dense() -> TopK:
            return jax.tree.map(
                lambda one, other: jnp.where(result.proved[:, None], one, other),
                result.top,
                dense_top_k(x, numbers),
            )

        return Certified(
            jax.lax.cond(jnp.all(result.proved), lambda: result.top, dense), result.proved
        )

    with jax.default_matmul_precision("highest"):
        return map_leading_axes(prove_batch, jnp.asarray(x))


def certified(
    x: Queries,
    rows: AnyArray,
    estimator: LowRank | Quantized,
    k: int,
    candidates: int,
    to_logits: ScoreToLogit | None = None,
) -> Certified:
    """Run `prove_top_k` on a few queries, without the dense fallback.

    Args:
        x: Queries `(b, d)`.
        rows: Rows `(m, d)`.
        estimator: Estimator with error bounds.
        k: Number of rows to return for each query.
        candidates: Number of candidates (k').
        to_logits: What makes logits of scores. None ranks the rows by their scores.

    Returns:
        The top-k and whether it is proved, for each query.
    """
    bounds = estimator.error_bounds
    assert bounds is not None
    scaled, power, usable = scaled_queries(x)
    query_length = length(scaled)
    upper = estimator.scores(scaled) + query_length[:, None] * bounds[None]
    allowed = None
    if to_logits is not None:
        upper, allowed = unscaled_logits(upper, power, to_logits, 1), to_logits.allowed
    indices, other_bound = top_upper_bounds(upper, candidates, allowed)
    candidate_rows = rows[indices].astype(jnp.float32)
    is_allowed = jnp.ones(indices.shape, bool)
    if to_logits is not None:
        to_logits = to_logits.at(indices)
        if to_logits.allowed is not None:
            is_allowed = jnp.broadcast_to(to_logits.allowed, indices.shape)
            # The rows that do not count may hold anything.
            candidate_rows = jnp.where(is_allowed[..., None], candidate_rows, 0)
    scores = pairwise_dot(scaled, candidate_rows)
    score_error = candidate_error(query_length, candidate_rows)
    lower, upper = scores - score_error[:, None], scores + score_error[:, None]
    logits, unscale = scores, power
    if to_logits is not None:
        lower, logits, upper = (
            unscaled_logits(bound, power, to_logits, direction)
            for bound, direction in ((lower, -1), (scores, 0), (upper, 1))
        )
        logits, unscale = jnp.where(is_allowed, logits, -jnp.inf), jnp.ones_like(power)
    positions = top_k_positions(logits, jnp.asarray(indices), k)
    queries = jnp.arange(len(x), dtype=jnp.int32)[:, None]
    is_top = jnp.zeros(indices.shape, bool).at[queries, positions].set(True)
    lower_bound = jnp.min(jnp.where(is_top & is_allowed, lower, jnp.inf), axis=1)
    missing_bound = jnp.max(jnp.where(~is_top & is_allowed, upper, -jnp.inf), axis=1)
    is_finite = jnp.all((jnp.isfinite(scores) & jnp.isfinite(logits)) | ~is_allowed, axis=1)
    proved = usable & is_finite & jnp.isfinite(score_error)
    proved &= lower_bound >= jnp.maximum(other_bound, missing_bound)
    values, indices = (jnp.take_along_axis(part, positions, axis=1) for part in (logits, indices))
    return Certified(TopK(values * unscale, indices), proved)


def unscaled_logits(
    scores: Float[Array, "b n"], power: Float[Array, "b 1"], to_logits: ScoreToLogit, direction: int
) -> Float[Array, "b n"]:
    """Return the logits of scores of scaled queries, or bounds of them.

    Args:
        scores: Scores of scaled queries `(b, n)`, or bounds of them.
        power: What the queries were divided by `(b, 1)`, see `scaled_queries`.
        to_logits: What makes logits of scores.
        direction: As in `ScoreToLogit.logits`.
    """
    unscaled = scores * power
    return to_logits.logits(widened(unscaled, 2.0**-21 * jnp.abs(unscaled), direction), direction)


def candidate_error(
    query_length: Float[Array, " b"], candidate_rows: Float[Array, "b c d"]
) -> Float[Array, " b"]:
    """Return the largest error of `pairwise_dot`, and of adding it, for the rows of each query.

    Args:
        query_length: Lengths of the scaled queries `(b,)`, rounded up.
        candidate_rows: Rows of each query's candidates `(b, c, d)`.
    """
    width = candidate_rows.shape[-1]
    max_row_length = jnp.max(length(candidate_rows), axis=1)
    return query_length * (
        (1 + 16 / 2**24) * exact_score_error(width) * max_row_length
        + UNDERFLOW * width * (1 + max_row_length)
    )

"""Proof that nothing was missed: a search that tells of each query whether its answer is certain to be the true top-k.

Not in the paper. A row's score is its estimate plus the query's product with what the copy leaves out of the row, at most the
product of their lengths (Cauchy and Schwarz): `hire.estimators.error_bounds`, which every fitted copy carries. Candidates are the
rows that can reach highest. Where even the lowest of the k exact scores is above what any other row can reach, the answer is
proved. Every rounding and every cast is counted in, and nothing is proved by numbers that are not finite and normal.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hire.axes import AnyArray, Array, Bool, Float, Indices, Queries, Rows, Scores, States
from hire.estimators import UNDERFLOW, LowRank, Quantized, exact_rounding, length, row_scores
from hire.search import check_fitted, check_queries, check_search, for_any_lead
from hire.topk import TopK, exact_top_k

LARGEST = 2.0**100  # of the powers of two whose inverse is a normal number with room to spare
SMALLEST = 2.0**-90  # of a query's largest entry: below, the entries that a CPU takes for 0 may matter
TOGETHER = 16  # queries that are searched at once: of 262,144 rows they take 17 MB for estimates, and 2 candidates' rows each


class Certified(NamedTuple):
    """A top-k, and of each query (b,) whether it is proved to be the true one."""

    top: TopK
    proved: Bool[Array, "*b"]


def pairwise_dot(x: Queries, rows: Float[Array, "b c d"]) -> Float[Array, "b c"]:
    """Scores of each query's own rows, float32, added up half to half: with some log2(d) roundings instead of d."""
    terms = rows * x[:, None]
    while terms.shape[-1] > 1:
        half = -(-terms.shape[-1] // 2)
        rest = terms[..., half:]
        terms = terms[..., :half] + jnp.pad(rest, ((0, 0), (0, 0), (0, half - rest.shape[-1])))
    return terms[..., 0]


def top_upper_bounds(upper: Scores, candidates: int) -> tuple[Indices, Float[Array, " b"]]:
    """The rows (b, k') that reach highest by their upper bounds (b, m), and what the others (b,) reach at most.

    So many rows and the next one lie in as many blocks, those whose own best reach highest: only they are searched. A bound that is
    not finite counts as infinite.
    """
    b, m = upper.shape
    wanted, depth = min(candidates + 1, m), math.isqrt(m // candidates)
    real = jnp.where(jnp.isfinite(upper), upper, jnp.inf).astype(jnp.float32)
    blocks = jnp.pad(real, ((0, 0), (0, -m % depth)), constant_values=-jnp.inf).reshape(b, -1, depth)
    first = exact_top_k(jnp.max(blocks, axis=-1), min(wanted, blocks.shape[1])).indices
    best = exact_top_k(jnp.take_along_axis(blocks, first[..., None], axis=1).reshape(b, -1), wanted)
    chosen = jnp.take_along_axis(first, best.indices // depth, axis=1) * depth + best.indices % depth
    others = best.values[:, candidates] if candidates < m else jnp.full(b, -jnp.inf)
    return chosen[:, :candidates], jnp.asarray(others)


def scaled_queries(x: Queries) -> tuple[Float[Array, "b d"], Float[Array, "b 1"], Bool[Array, " b"]]:
    """Queries (b, d) in float32 over a power of two (b, 1), so that their largest entries are at least 1; that power; and whether
    it is so. A query whose largest entry is not finite, or below SMALLEST, stays as it is.
    """
    wide = jnp.asarray(x if x.dtype == jnp.float64 else x.astype(jnp.float32))
    largest = jnp.max(jnp.abs(wide), axis=1, keepdims=True).astype(jnp.float32)
    exponent_alone = jax.lax.bitcast_convert_type(largest, jnp.int32) & jnp.int32(0x7F800000)
    power = jax.lax.bitcast_convert_type(exponent_alone, jnp.float32)
    usable = jnp.isfinite(largest) & (largest >= SMALLEST)
    power = jnp.where(usable, jnp.minimum(power, LARGEST), 1.0)
    return (wide / power.astype(wide.dtype)).astype(jnp.float32), power, usable[:, 0]


def certified_top_k(
    x: States, rows: Rows, estimator: LowRank | Quantized, *, k: int, candidates: int, dense_fallback: bool = False
) -> Certified:
    """`high_recall_top_k` (plain JAX), with a proof where there is one: then no row that is missing scores above one that is there.

    x (b, d), or (*b, d), rows (m, d); the error bounds are the estimator's own, so it must be fitted, not put together by hand.
    Int8 rows prove most answers, 4 bits and low rank next to none. With `dense_fallback` the queries without a proof are searched
    in all rows: the answer is then always what dense float32 scores give, and reads all rows when any query lacks its proof. A
    proof is about real numbers: the product of query and row as they are given, whatever their types. It counts on products in
    IEEE float32, as a CPU computes them; a TPU multiplies at its highest precision, whose error nobody has measured here. A query
    that holds a value that is not finite, or none of at least 2^-90, is never proved.

    Memory: 16 queries are searched at once, which takes 16 m float32 numbers and as many rows as they have candidates, twice: 70 MB
    for 262,144 rows of 640 entries and k' = 512, whatever the number of queries. Not in the paper.

    Raises ValueError as high_recall_top_k does, and for an estimator without error bounds.
    """
    k, candidates = check_search(rows, estimator, k, candidates)
    check_fitted(rows, estimator)
    check_queries(x, estimator)
    if getattr(estimator, "error_bounds", None) is None:
        raise ValueError(f"{type(estimator).__name__} without error bounds: expected one that LowRank.fit or Quantized.fit made")

    def proved(x: Queries) -> Certified:
        if len(x) <= TOGETHER:
            return certified(x, jnp.asarray(rows), estimator, k, candidates)
        batches = jnp.pad(x, ((0, -len(x) % TOGETHER), (0, 0))).reshape(-1, TOGETHER, x.shape[1])
        found = jax.lax.map(lambda some: certified(some, jnp.asarray(rows), estimator, k, candidates), batches)
        return jax.tree.map(lambda part: part.reshape(-1, *part.shape[2:])[: len(x)], found)

    def search(x: Queries) -> Certified:
        found = proved(x)
        if not dense_fallback:
            return found

        def dense() -> TopK:
            every = exact_top_k(row_scores(x, rows), k)
            return jax.tree.map(lambda one, other: jnp.where(found.proved[:, None], one, other), found.top, every)

        return Certified(jax.lax.cond(jnp.all(found.proved), lambda: found.top, dense), found.proved)

    with jax.default_matmul_precision("highest"):
        return for_any_lead(search, jnp.asarray(x))


def certified(x: Queries, rows: AnyArray, estimator: LowRank | Quantized, k: int, candidates: int) -> Certified:
    """`certified_top_k` of a few queries (b, d), without a fallback."""
    width = rows.shape[1]
    bounds = estimator.error_bounds
    assert bounds is not None
    scaled, power, usable = scaled_queries(x)
    size = length(scaled)
    chosen, others = top_upper_bounds(estimator.scores(scaled) + size[:, None] * bounds[None], candidates)
    own = rows[chosen].astype(jnp.float32)
    scores = pairwise_dot(scaled, own)
    longest = jnp.max(length(own), axis=1)
    error = size * ((1 + 16 / 2**24) * exact_rounding(width) * longest + UNDERFLOW * width * (1 + longest))
    best = exact_top_k(scores, min(k + 1, candidates))
    lowest = best.values[:, k - 1] - error
    if candidates > k:
        others = jnp.maximum(others, best.values[:, k] + error)
    finite = usable & jnp.all(jnp.isfinite(scores), axis=1) & jnp.isfinite(error)
    top = TopK(best.values[:, :k] * power, jnp.take_along_axis(chosen, best.indices[:, :k], axis=1))
    return Certified(top, finite & (lowest >= others))

"""Proof that nothing was missed: a search that tells of each query whether its answer is certain to be the true top-k.

Not in the paper. A row's score is its estimate plus the query's product with what the copy leaves out of the row, at most the
product of their lengths (Cauchy and Schwarz). Candidates are the rows that can reach highest. Where even the lowest of the k exact
scores is above what any other row can reach, the answer is proved. The rounding of float32 is counted in.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hire.axes import Array, Bool, Float, Indices, Queries, Rows, Scores
from hire.estimators import LowRank, Quantized, row_scores, unpack
from hire.search import check_queries, check_search
from hire.topk import TopK, exact_top_k

SAFE = 1 + 1e-4  # lengths are themselves computed in float32
ORDER = 2.0**-24  # of one rounding


class Certified(NamedTuple):
    """A top-k, and of each query (b,) whether it is proved to be the true one."""

    top: TopK
    proved: Bool[Array, " b"]


def margins(rows: Rows, estimator: LowRank | Quantized) -> Float[Array, " m"]:
    """How far each row's estimated score may lie from its own, rounding included, for a query of length 1: stored beside the copy.

    rows (m, d) and a copy of them. Raises ValueError when the copy is of rows of another shape.
    """
    check_search(rows, estimator, 1, 1)
    return computed_margins(rows, estimator)


@jax.jit
def computed_margins(rows: Rows, estimator: LowRank | Quantized) -> Float[Array, " m"]:
    rows, length = jnp.asarray(rows, jnp.float32), partial(jnp.linalg.norm, axis=1)
    if isinstance(estimator, LowRank):
        factors, projection = plain(estimator.factors), plain(estimator.projection)
        rebuilt = jnp.matmul(factors, projection, precision="highest")
        reach = length(factors) * jnp.linalg.norm(projection)  # of the sums that an estimate is made of
    else:
        rebuilt = plain(estimator)
        reach = length(rebuilt)
    # A sum of n products, in any order, is off by n / 2^24 of the lengths of both sides at most. An estimate is two such sums of up
    # to d, what was rebuilt a third; the rest is for scales and comparisons.
    return SAFE * (length(rows - rebuilt) + ORDER * (3 * rows.shape[1] + 32) * reach + rounding(rows.shape[1]) * length(rows))


def plain(part: Rows | Quantized) -> Float[Array, "m d"]:
    if isinstance(part, Quantized):
        return unpack(part.codes, part.bits, part.width) * part.scale[:, None]
    return jnp.asarray(part, jnp.float32)


def rounding(d: int) -> float:
    """What scores_by_halves errs at most, for a row and a query of length 1: of halves added to halves it is a rounding a step."""
    return SAFE * ORDER * (math.ceil(math.log2(d)) + 4)


def scores_by_halves(x: Queries, rows: Float[Array, "b c d"]) -> Float[Array, "b c"]:
    """Scores of each query's own rows, float32, added up half to half: with some log2(d) roundings instead of d."""
    terms = rows * x[:, None].astype(jnp.float32)
    while terms.shape[-1] > 1:
        half = -(-terms.shape[-1] // 2)
        rest = terms[..., half:]
        terms = terms[..., :half] + jnp.pad(rest, ((0, 0), (0, 0), (0, half - rest.shape[-1])))
    return terms[..., 0]


def nominated(reached: Scores, candidates: int) -> tuple[Indices, Float[Array, " b"]]:
    """The rows (b, k') that reach highest, and what the others (b,) reach at most.

    So many rows and the next one lie in as many blocks, those whose own best reach highest: only they are searched.
    """
    b, m = reached.shape
    wanted, depth = min(candidates + 1, m), math.isqrt(m // candidates)
    real = jnp.maximum(reached.astype(jnp.float32), jnp.finfo(jnp.float32).min)  # above what fills the last block
    blocks = jnp.pad(real, ((0, 0), (0, -m % depth)), constant_values=-jnp.inf).reshape(b, -1, depth)
    first = exact_top_k(jnp.max(blocks, axis=-1), min(wanted, blocks.shape[1])).indices
    best = exact_top_k(jnp.take_along_axis(blocks, first[..., None], axis=1).reshape(b, -1), wanted)
    chosen = jnp.take_along_axis(first, best.indices // depth, axis=1) * depth + best.indices % depth
    others = best.values[:, candidates] if candidates < m else jnp.full(b, -jnp.inf)
    return chosen[:, :candidates], jnp.asarray(others)


def certified_top_k(
    x: Queries,
    rows: Rows,
    estimator: LowRank | Quantized,
    margin: Float[Array, " m"],
    *,
    k: int,
    candidates: int,
    always: bool = False,
) -> Certified:
    """`high_recall_top_k` (plain JAX), with a proof where there is one: then no row that is missing scores above one that is there.

    x (b, d), rows (m, d); `margin` is hire.certify.margins(rows, estimator). With `always` the queries without a proof are
    searched in all rows: the answer is then always what dense float32 scores give, and reads all rows when any query lacks its
    proof. Queries count in the rows' type. On a TPU it multiplies at the highest precision, since a proof counts on float32. Not in
    the paper.

    Raises ValueError as high_recall_top_k does.
    """
    check_search(rows, estimator, k, candidates)
    check_queries(x, estimator)
    with jax.default_matmul_precision("highest"):
        x = x.astype(rows.dtype)
        size = SAFE * jnp.sqrt(jnp.sum(x.astype(jnp.float32) ** 2, axis=1))
        chosen, others = nominated(estimator.scores(x) + size[:, None] * margin[None], candidates)
        own = jnp.asarray(rows)[chosen].astype(jnp.float32)
        scores = scores_by_halves(x, own)
        spread = size * rounding(rows.shape[1]) * SAFE * jnp.sqrt(jnp.max(jnp.sum(own**2, axis=-1), axis=1))
        best = exact_top_k(scores, min(k + 1, candidates))
        if candidates > k:
            others = jnp.maximum(others, best.values[:, k] + spread)
        proved = jnp.asarray(best.values[:, k - 1] - spread >= others)
        top = TopK(best.values[:, :k], jnp.take_along_axis(chosen, best.indices[:, :k], axis=1))
        if not always:
            return Certified(top, proved)

        def dense() -> TopK:
            return jax.tree.map(lambda one, other: jnp.where(proved[:, None], one, other), top, exact_top_k(row_scores(x, rows), k))

        return Certified(jax.lax.cond(jnp.all(proved), lambda: top, dense), proved)

"""Proof that nothing was missed: a search that tells of each query whether its answer is certain to be the true top-k.

Not in the paper. A row's score is its estimate plus the query's product with what the copy leaves out of the row, at most the
product of their lengths (Cauchy and Schwarz). Candidates are the rows that can reach highest. Where even the lowest of the k exact
scores is above what any other row can reach, the answer is proved. The rounding of float32 is counted in.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hire.axes import Array, Bool, Float, Indices, Queries, Rows
from hire.estimators import LowRank, Quantized, row_scores, unpack
from hire.search import check_queries, check_search, nominate
from hire.topk import TopK, exact_top_k

SAFE = 1 + 1e-4  # lengths are themselves computed in float32


class Certified(NamedTuple):
    """A top-k, and of each query (b,) whether it is proved to be the true one."""

    top: TopK
    proved: Bool[Array, " b"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Margin:
    """How far the scores of rows may lie from what is computed, for a query of length 1, each (m,): `estimate` of the copy's
    scores, `exact` of the rows' own, which are only rounded.
    """

    estimate: Float[Array, " m"]
    exact: Float[Array, " m"]

    @classmethod
    def of(cls, rows: Rows, estimator: LowRank | Quantized) -> "Margin":
        """Of rows (m, d) and a copy of them. Raises ValueError when the copy is of rows of another shape."""
        check_search(rows, estimator, 1, 1)
        return cls(*margins(rows, estimator))

    @property
    def nbytes(self) -> int:
        return self.estimate.nbytes + self.exact.nbytes


@jax.jit
def margins(rows: Rows, estimator: LowRank | Quantized) -> tuple[Float[Array, " m"], Float[Array, " m"]]:
    rows, length = jnp.asarray(rows, jnp.float32), partial(jnp.linalg.norm, axis=1)
    if isinstance(estimator, LowRank):
        factors, projection = plain(estimator.factors), plain(estimator.projection)
        rebuilt = jnp.matmul(factors, projection, precision="highest")
        reach = length(factors) * jnp.linalg.norm(projection)  # of the sums that an estimate is made of
    else:
        rebuilt = plain(estimator)
        reach = length(rebuilt)
    # A sum of n products, in any order, is off by n / 2^24 of the lengths of both sides at most. An estimate is two such sums of up
    # to d, what was rebuilt a third; the rest is for scales and comparisons. Of halves added to halves n is the number of steps.
    order, d = 2.0**-24, rows.shape[1]
    exact = SAFE * order * (math.ceil(math.log2(d)) + 4) * length(rows)
    return SAFE * (length(rows - rebuilt) + order * (3 * d + 32) * reach) + exact, exact


def plain(part: Rows | Quantized) -> Float[Array, "m d"]:
    if isinstance(part, Quantized):
        return unpack(part.codes, part.bits, part.width) * part.scale[:, None]
    return jnp.asarray(part, jnp.float32)


def scores_by_halves(x: Queries, rows: Rows, chosen: Indices) -> Float[Array, "b c"]:
    """Exact scores of the rows at indices (b, c), float32, added up half to half: with some log2(d) roundings instead of d."""
    terms = jnp.asarray(rows)[chosen].astype(jnp.float32) * x[:, None].astype(jnp.float32)
    while terms.shape[-1] > 1:
        half = -(-terms.shape[-1] // 2)
        rest = terms[..., half:]
        terms = terms[..., :half] + jnp.pad(rest, ((0, 0), (0, 0), (0, half - rest.shape[-1])))
    return terms[..., 0]


def certified_top_k(
    x: Queries, rows: Rows, estimator: LowRank | Quantized, margin: Margin, *, k: int, candidates: int, always: bool = False
) -> Certified:
    """`high_recall_top_k` (plain JAX), with a proof where there is one: then no row that is missing scores above one that is there.

    x (b, d), rows (m, d); `margin` is Margin.of(rows, estimator). With `always` the queries without a proof are searched in all
    rows: the answer is then always what dense float32 scores give, and reads all rows when any query lacks its proof. Queries count
    in the rows' type. On a TPU it multiplies at the highest precision, since a proof counts on float32.

    Raises ValueError as high_recall_top_k does.
    """
    check_search(rows, estimator, k, candidates)
    check_queries(x, estimator)
    with jax.default_matmul_precision("highest"):
        x = x.astype(rows.dtype)
        size = SAFE * jnp.sqrt(jnp.sum(x.astype(jnp.float32) ** 2, axis=1, keepdims=True))
        reached = estimator.scores(x) + size * margin.estimate[None]
        chosen = nominate(reached, candidates, per_bucket=4)  # a row that is missed now and then would cost a proof
        scores, spread = scores_by_halves(x, rows, chosen), size * margin.exact[chosen]
        best = exact_top_k(scores, k).indices
        mine = jnp.zeros(scores.shape, bool).at[jnp.arange(len(x))[:, None], best].set(True)
        lowest = jnp.min(jnp.where(mine, scores - spread, jnp.inf), axis=1)
        beaten = jnp.max(jnp.where(mine, -jnp.inf, scores + spread), axis=1)
        reached = reached.at[jnp.arange(len(x))[:, None], chosen].set(-jnp.inf)
        proved = lowest >= jnp.maximum(beaten, jnp.max(reached, axis=1))
        top = TopK(jnp.take_along_axis(scores, best, axis=1), jnp.take_along_axis(chosen, best, axis=1))
        if not always:
            return Certified(top, proved)

        def dense() -> TopK:
            return jax.tree.map(lambda one, other: jnp.where(proved[:, None], one, other), top, exact_top_k(row_scores(x, rows), k))

        return Certified(jax.lax.cond(jnp.all(proved), lambda: top, dense), proved)

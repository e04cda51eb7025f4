"""The algorithm of HiRE: predict with a small copy, then compute exactly what was predicted."""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import field
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from hire.axes import AnyArray, Array, Blocks, Fingerprint, Float, Indices, Queries, Rows, Scores, States
from hire.estimators import (
    Estimator,
    OncePerArray,
    Quantized,
    fingerprint,
    known_fingerprint,
    projected,
    quantized_part,
    row_scores_at,
    same_rows,
)
from hire.kernels import scores as score_kernel
from hire.kernels.form import by_form, check_form
from hire.kernels.keys import best_winners, bucket_keys, bucket_winners
from hire.pytrees import pytree
from hire.topk import TopK, bucketed_indices, check_count, exact_top_k

DEPTH, PER_BUCKET = 64, 2  # the best two of every 64 rows are the pool of a k' that is at most half of it
PER_BUCKET_OF_MANY = 4  # where a better copy still tells them apart


def nominate(scores: Scores, candidates: int, per_bucket: int = PER_BUCKET) -> Indices:
    """The `candidates` (k') best rows (*b, k') by estimated scores (*b, m), in no order.

    Few of many rows are taken from the best `per_bucket` of each bucket: a row is missed only where so many better ones share its
    bucket, and there is no top-k of all rows, which would take longer than their scores.
    """
    rows = scores.shape[-1]
    if candidates <= most_pooled(rows, per_bucket):
        return bucketed_indices(scores, candidates, buckets_of(rows), per_bucket)
    return exact_top_k(scores, candidates).indices


def foremost(x: Queries, estimator: Estimator, candidates: int, form: str = "auto", per_bucket: int = PER_BUCKET) -> Indices:
    """`nominate` by the estimator's scores of queries (b, d); of a quantized copy a kernel takes both (see `by_form`)."""
    if isinstance(estimator, Cascade):
        *_, (chosen, better) = estimator.levels(x, form)
        return jnp.take_along_axis(chosen, exact_top_k(better, candidates).indices, axis=1)
    rows, buckets = estimator.shape[0], buckets_of(estimator.shape[0])

    def plain(x: Queries, estimator: Estimator) -> Array:
        return jnp.asarray(nominate(estimator.scores(x), candidates, per_bucket))

    copy = quantized_part(estimator)
    if copy is None or candidates > most_pooled(rows, per_bucket) or not score_kernel.takes(buckets):
        if form == "kernel":
            raise ValueError(
                f"form = 'kernel': expected a quantized copy, k' up to {most_pooled(rows, per_bucket)} and whole tiles of buckets"
            )
        return plain(x, estimator)

    def kernel(x: Queries, estimator: Estimator) -> Array:
        copy = quantized_part(estimator)
        assert copy is not None
        how = dict(bits=copy.bits, buckets=buckets, per_bucket=per_bucket)
        winners = score_kernel.winners(projected(x, estimator), copy.codes, copy.scale, **how)
        return jnp.asarray(best_winners(list(winners), candidates, -(-rows // buckets)))

    return by_form(form, plain, kernel, x, estimator)


@pytree
class Cascade:
    """Estimators of the same rows, each better and dearer than the one before: the i-th nominates its kept[i] best to the next.

    An Estimator itself, so that every search takes it. Our choice: the paper names low rank and quantization, not one after the
    other. Raises ValueError unless there is one number kept for each but the last, falling, and all were fitted to the same rows.
    """

    estimators: tuple[Estimator, ...]
    kept: tuple[int, ...] = field(metadata=dict(static=True))

    def __post_init__(self):
        shapes = {tuple(each.shape) for each in self.estimators}
        if len(shapes) > 1:
            raise ValueError(f"estimators of rows {', '.join(map(str, sorted(shapes)))}: expected all to be of the same")
        [(m, _)] = shapes or [(0, 0)]
        counts = tuple(check_count("kept", count, 1, m, "the number of rows") for count in self.kept)
        if not 0 < len(counts) == len(self.estimators) - 1 or list(counts) != sorted(counts, reverse=True):
            raise ValueError(f"kept = {counts} of {len(self.estimators)} estimators: expected falling numbers, one less")
        object.__setattr__(self, "kept", counts)
        for one, other in pairwise(self.estimators):
            check_same_rows(one.fingerprint, other.fingerprint, f"estimators of rows {(m, _)}")

    @property
    def shape(self) -> tuple[int, int]:
        return self.estimators[0].shape

    @property
    def nbytes(self) -> int:
        return sum(each.nbytes for each in self.estimators)

    @property
    def fingerprint(self) -> Fingerprint | None:
        return self.estimators[0].fingerprint

    def bytes_read(self, candidates: int) -> int:
        later = (count * each.nbytes // self.shape[0] for count, each in zip(self.kept, self.estimators[1:], strict=True))
        return self.estimators[0].bytes_read(self.kept[0]) + sum(later)

    def levels(self, x: Queries, form: str = "auto") -> Iterator[tuple[Indices, Float[Array, "b c"]]]:
        """What each estimator but the first is handed, in no order, and its own scores of that."""
        chosen = foremost(x, self.estimators[0], self.kept[0], form, PER_BUCKET_OF_MANY)
        for each, count in zip(self.estimators[1:], (*self.kept[1:], None), strict=True):
            better = each.scores_at(x, chosen)
            yield chosen, better
            if count is not None:
                chosen = jnp.take_along_axis(chosen, exact_top_k(better, count).indices, axis=1)

    def scores(self, x: Queries) -> Float[Array, "b m"]:
        """Of each row by the last estimator that sees it. The rows that one does not see are moved together, by what the lower half
        of those that it sees lacked before in the sum of their exponentials: as HireSoftmax.words corrects a tail.
        """
        scores = self.estimators[0].scores(x)
        for chosen, better in self.levels(x):
            lacked, _ = log_ratio(*ranked(better, jnp.take_along_axis(scores, chosen, axis=1), chosen.shape[1] // 2))
            scores = (scores + lacked[:, None]).at[jnp.arange(len(x))[:, None], chosen].set(better)
        return scores

    def scores_at(self, x: Queries, indices: Indices) -> Float[Array, "b c"]:
        return self.estimators[-1].scores_at(x, indices)


def ranked(
    exact: Float[Array, "b c"], guessed: Float[Array, "b c"], first: int, last: int | None = None
) -> tuple[Float[Array, "b n"], Float[Array, "b n"]]:
    """Both scores of the candidates that rank from `first` to `last` by what was guessed, best first. Their lower half, which was
    picked like any row beyond them, tells what exact scores make of those.
    """
    order = exact_top_k(guessed, last or guessed.shape[1]).indices[:, first:]
    return jnp.take_along_axis(exact, order, axis=1), jnp.take_along_axis(guessed, order, axis=1)


def log_ratio(exact: Float[Array, "b c"], guessed: Float[Array, "b c"]) -> tuple[Float[Array, " b"], Float[Array, " b"]]:
    """Log of the sum of exp(exact) over that of exp(guessed), and its sampling error, the rows being a weighted sample."""
    weights = jax.nn.softmax(guessed, axis=1)
    ratio = jax.nn.logsumexp(exact, axis=1) - jax.nn.logsumexp(guessed, axis=1)
    counts = guessed > -jnp.inf  # what fills a shard up has no weight, and -inf less -inf is no number
    apart = jnp.where(counts, jnp.expm1(jnp.where(counts, exact - guessed, 0.0) - ratio[:, None]), 0.0)
    return ratio, jnp.sqrt(jnp.sum((weights * apart) ** 2, axis=1))


def buckets_of(rows: int) -> int:
    """The buckets that `nominate` puts so many rows in."""
    return -(-rows // DEPTH)


def most_pooled(rows: int, per_bucket: int = PER_BUCKET) -> int:
    """The largest k' that `nominate` takes from the buckets: half of what they keep."""
    return rows // DEPTH * per_bucket // 2


def pool(scores: Float[Array, "b m"]) -> Float[Array, "b m"]:
    """The scores of the rows that are among the best of their bucket; -inf for the others, which `nominate` may not see."""
    keys = bucket_keys(scores, buckets_of(scores.shape[-1]))
    inside = keys >= jnp.expand_dims(bucket_winners(keys, PER_BUCKET)[-1], -2)
    return jnp.where(inside.reshape(len(scores), -1)[:, : scores.shape[-1]], scores, -jnp.inf)


def high_recall_top_k(
    x: States, rows: Rows | Blocks | Quantized, estimator: Estimator, *, k: int, candidates: int, form: str = "auto"
) -> TopK:
    """The k best rows (m, d) for each query (b, d), or for one (d,), of the `candidates` (k') that the estimator puts first.

    The returned float32 values (b, k) are exact scores; the indices (b, k) are the true top-k whenever all of them are
    among the candidates. Reads the estimator and k' rows instead of m (PAPER claim estimator). Queries and rows meet in float32, or
    in their 16-bit float type when they share one. Rows in numpy are sent to the device at every call: give it jax arrays.

    `form` is "plain" JAX, the TPU "kernel"s or, by default, "auto": those on a TPU, for the parts that they take. They take rows
    in hire.kernels.rows.blocks, which a TPU can fetch one by one, and quantized copies; named, they never become something else.
    Raises ValueError when 1 <= k <= candidates <= m does not hold, shapes do not fit, the estimator was fitted to other rows (which
    inside jax.jit nobody can tell), or a kernel that is named does not take them.
    """
    k, candidates = check_search(rows, estimator, k, candidates)
    check_fitted(rows, estimator)
    check_queries(x, estimator)
    check_form(form)
    if form == "kernel" and len(rows.shape) == 2:
        raise ValueError(f"form = 'kernel': expected rows in hire.kernels.rows.blocks, not {tuple(rows.shape)}")
    return for_any_lead(lambda x: top_k_of(x, rows, estimator, k, candidates, form), x)


def top_k_of(
    x: Queries, rows: Rows | Blocks | Quantized, estimator: Estimator, k: int, candidates: int, form: str = "auto"
) -> TopK:
    """`high_recall_top_k` of queries (b, d), of which all is known to fit."""
    chosen = foremost(x, estimator, candidates, form)
    return best_of(chosen, row_scores_at(x, rows, chosen, form=form), k)


def check_queries(x: States, estimator: Estimator) -> None:
    """Raise ValueError unless queries are (*b, d)."""
    if x.ndim < 1 or x.shape[-1] != estimator.shape[1]:
        turned = " (are rows stored (d, v)? pass rows.T)" if x.ndim and x.shape[-1] == estimator.shape[0] else ""
        raise ValueError(f"queries of shape {x.shape}: expected (b, {estimator.shape[1]}), the width of the rows{turned}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"queries of type {x.dtype}: expected a float type")


def for_any_lead(function: Callable[[Queries], Any], x: States) -> Any:
    """What a function of queries (b, d) gives for queries (*b, d): arrays (b, …) become (*b, …)."""
    lead = x.shape[:-1]
    if 0 in lead:
        shapes = jax.eval_shape(function, jax.ShapeDtypeStruct((1, x.shape[-1]), x.dtype))
        return jax.tree.map(lambda part: jnp.zeros((*lead, *part.shape[1:]), part.dtype), shapes)
    if x.ndim == 2:
        return function(x)
    return jax.tree.map(lambda part: part.reshape(*lead, *part.shape[1:]), function(jnp.asarray(x).reshape(-1, x.shape[-1])))


def best_of(chosen: Indices, exact: Float[Array, "b c"], k: int) -> TopK:
    """The k best of the candidates by their exact scores."""
    best = exact_top_k(exact, k)
    return TopK(best.values, jnp.take_along_axis(chosen, best.indices, axis=-1))


def check_search(rows: Rows | Blocks | Quantized, estimator: Estimator, k: int, candidates: int) -> tuple[int, int]:
    """k and candidates as ints. Raise ValueError unless the estimator is of rows of this shape and 1 <= k <= candidates <= m."""
    if len(rows.shape) not in (2, 3):
        raise ValueError(f"rows of shape {rows.shape}: expected (m, d), or hire.kernels.rows.blocks of them")
    width = math.prod(rows.shape[1:])
    if len(rows.shape) == 3:  # blocks are filled up
        width = min(width, estimator.shape[1])
    if tuple(estimator.shape) != (rows.shape[0], width):
        raise ValueError(f"estimator of rows {tuple(estimator.shape)}: expected {tuple(rows.shape)}, as the rows are")
    k = check_count("k", k, 1, rows.shape[0], "the number of rows")
    candidates = check_count("candidates", candidates, k, rows.shape[0], "from k to the number of rows")
    if isinstance(estimator, Cascade):
        check_count("candidates", candidates, k, estimator.kept[-1], "from k to what the last of the cascade sees")
    return k, candidates


def check_fitted(rows: Rows | Blocks | Quantized, estimator: Estimator) -> None:
    """Raise ValueError when the estimator was fitted to other rows of that shape. Reads all rows, of a jax array once in its life;
    inside jax.jit it cannot tell.
    """
    known = estimator.fingerprint
    if known is None or isinstance(known, Tracer) or isinstance(rows, Tracer):
        return
    if isinstance(rows, Quantized):
        own = rows.fingerprint
    else:
        with jax.ensure_compile_time_eval():
            own = known_fingerprint(rows) if rows.ndim == 2 else block_fingerprint(estimator.shape[1])(rows)
    check_same_rows(own, known, f"estimator of other rows {tuple(rows.shape)}")


@functools.cache
def block_fingerprint(width: int) -> OncePerArray:
    """`fingerprint` of the rows of this width that blocks hold."""
    return OncePerArray(lambda blocks: fingerprint(blocks.reshape(len(blocks), -1)[:, :width]))


def check_same_rows(one: Fingerprint | None, other: Fingerprint | None, what: str) -> None:
    """Raise ValueError when two fingerprints are known, and of other rows."""
    if one is None or other is None or isinstance(one, Tracer) or isinstance(other, Tracer):
        return
    if not same_rows(one, other):
        raise ValueError(f"{what}: expected one fitted to these; fit it again")


def on_device(rows: AnyArray | Quantized) -> Any:
    """Rows as a jax array: those of numpy are sent to the device once, here."""
    return rows if isinstance(rows, Quantized) else jnp.asarray(rows)

"""Top-k of scores, exact and in two stages, and the recall of an approximate answer."""

import math
import operator
from typing import NamedTuple, SupportsIndex

import jax
import jax.numpy as jnp

from hire.axes import AnyArray, Array, Float, Indices, Int, Scores
from hire.kernels.keys import best_winners, bucket_keys, bucket_winners, kth_key, ordered


class TopK(NamedTuple):
    """The k best scores of each query, float32 (*b, k), best first, and the numbers of their rows, int32 (*b, k)."""

    values: Float[AnyArray, "*b k"]
    indices: Int[AnyArray, "*b k"]


def check_count(name: str, value: SupportsIndex, low: int, high: int, of: str) -> int:
    """The value as an int. Raise ValueError, naming it, unless it is a whole number (also one of numpy) from low to high."""
    try:
        count = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        count = None
    if count is None or not low <= count <= high:
        raise ValueError(f"{name} = {value!r}: expected a whole number from {low} to {high} ({of})")
    return count


def at_most(share: float, count: int) -> int:
    """The largest number that is no more than a share of count."""
    return int(share * count + 1e-6)


def exact_top_k(scores: Scores, k: int) -> TopK:
    """The k largest of each row of scores (*b, m): float32 values (*b, k), best first, and int32 indices (*b, k).

    Of equal scores the lower index comes first. Raises ValueError when k is not in 1..m.
    """
    k = check_count("k", k, 1, scores.shape[-1], "the number of rows")
    # On a CPU XLA's top-k is about a hundred times slower on bfloat16 than on float32; and where it sees only a part of what comes
    # out used, it sorts all rows, thirty times slower. Beyond the barrier it sees nothing. (Values first, it would take the pair
    # for the top-k itself, and fail to spread that over devices.)
    values, indices = jax.lax.top_k(scores.astype(jnp.float32), k)
    indices, values = jax.lax.optimization_barrier((indices, values))
    return TopK(values, indices)


def bucketed_top_k(scores: Scores, k: int, *, buckets: int, per_bucket: int = 1) -> TopK:
    """Approximate top-k in two stages: the best `per_bucket` of each bucket, then the k best of those.

    Row i is in bucket i mod `buckets`: neighbouring rows, which are often alike, fall in different buckets, and
    the first stage reduces over whole vectors. `expected_recall` says what to expect of it; per_bucket = 1 is
    TPU-KNN (arXiv 2206.14286), more is the generalized form (arXiv 2506.04165). Rows are picked by their scores with the last
    ceil(log2(rows of a bucket)) bits cut off, so one of two that agree in the bits before may stand for the other.

    scores (*b, m) -> float32 values and int32 indices (*b, k). Raises ValueError when k is not in 1..m, buckets not in
    1..m, per_bucket not within a bucket, or when the buckets together keep fewer than k.
    """
    rows = scores.shape[-1]
    k = check_count("k", k, 1, rows, "the number of rows")
    buckets = check_count("buckets", buckets, 1, rows, "the number of rows")
    per_bucket = check_count("per_bucket", per_bucket, 1, -(-rows // buckets), "the rows of a bucket")
    kept = min(per_bucket * buckets, rows)
    check_count("k", k, 1, kept, f"what {buckets} buckets keep at {per_bucket} each")
    indices = bucketed_indices(scores, k, buckets, per_bucket)
    best = exact_top_k(jnp.take_along_axis(scores, indices, axis=-1), k)
    return TopK(best.values, jnp.take_along_axis(indices, best.indices, axis=-1))


def bucketed_indices(scores: Scores, k: int, buckets: int, per_bucket: int) -> Indices:
    """The indices (*b, k) of bucketed_top_k alone, in no order."""
    winners = bucket_winners(bucket_keys(jnp.asarray(scores), buckets), per_bucket)
    return best_winners(winners, k, -(-scores.shape[-1] // buckets))


def group_scores(activations: Float[AnyArray, "*b f"], group_size: int, reduce: str = "sum") -> Float[Array, "*b m"]:
    """Score (*b, m) of every group of `group_size` consecutive neurons: the sum (or the "max") of their activations' magnitudes.

    The one definition, for exact activations (*b, f) and for estimated ones, in training and at inference. Our choice: the paper
    has groups (PAPER claim group-sparsity) but, as far as we know it, names no score of them.
    Raises ValueError when group_size does not divide f, or for another reduction.
    """
    neurons = activations.shape[-1]
    if neurons % group_size:
        raise ValueError(f"group_size = {group_size}: expected a divisor of the {neurons} neurons")
    if reduce not in REDUCTIONS:
        raise ValueError(f"reduce = {reduce!r}: expected one of {', '.join(REDUCTIONS)}")
    groups = jnp.abs(activations).reshape(*activations.shape[:-1], neurons // group_size, group_size)
    return REDUCTIONS[reduce](groups, axis=-1)


REDUCTIONS = {"sum": jnp.sum, "max": jnp.max}


def keep_groups(activations: Float[Array, "*b f"], scores: Float[Array, "*b m"], k: int) -> Float[Array, "*b f"]:
    """The activations (*b, f) of the k groups with the best scores (*b, m), 0 for the others (all that tie with the k-th stay)."""
    last = kth_score(jax.lax.stop_gradient(scores), k)
    groups = activations.reshape(*scores.shape, -1)
    # A NaN is below nothing: what is no number stays one.
    return jnp.where(~(scores < last)[..., None], groups, 0).reshape(activations.shape)


def kth_score(scores: Scores, k: int) -> Float[Array, "*b 1"]:
    """The k-th largest of each row of scores (*b, m), float32 (*b, 1). Raises ValueError when k is not in 1..m."""
    k = check_count("k", k, 1, scores.shape[-1], "the number of rows")
    found = kth_key(ordered(jax.lax.bitcast_convert_type(scores.astype(jnp.float32), jnp.int32)), k)
    return jax.lax.bitcast_convert_type(ordered(found), jnp.float32)


def expected_recall(rows: int, k: int, *, buckets: int, per_bucket: int = 1) -> float:
    """Expected recall of `bucketed_top_k` when the true top-k lie in random buckets of equal size, from 0 to 1.

    arXiv 2506.04165: 1 - (B/K) sum over r > K' of (r - K') C(K, r) C(N-K, N/B-r) / C(N, N/B), with N rows, B buckets,
    K' per bucket. Raises ValueError when k is not in 1..rows or the buckets do not divide the rows.
    """
    k = check_count("k", k, 1, rows, "the number of rows")
    if rows % buckets:
        raise ValueError(f"buckets = {buckets}: expected a divisor of the {rows} rows")
    depth = rows // buckets

    def log_choose(n: int, r: int) -> float:
        return math.lgamma(n + 1) - math.lgamma(r + 1) - math.lgamma(n - r + 1)

    lost = 0.0
    for r in range(max(per_bucket + 1, depth - (rows - k)), min(k, depth) + 1):
        log_share = log_choose(k, r) + log_choose(rows - k, depth - r) - log_choose(rows, depth)
        lost += (r - per_bucket) * math.exp(log_share)
    return 1.0 - buckets / k * lost


def expected_recall_top1(k: int, *, buckets: int) -> float:
    """The simpler published form for one per bucket, ((M-1)/M)^(K-1) with M buckets (TPU-KNN, arXiv 2206.14286).

    It is the chance that a true row has its bucket to itself, so it lies a little below `expected_recall`, which also
    counts the best of several rows that share one.
    """
    return ((buckets - 1) / buckets) ** (k - 1)


def recall(indices: Indices, scores: Scores, k: int) -> Float[Array, "*b"]:
    """Share, 0 to 1, of the true top-k of the exact scores (*b, m) that is among indices (*b, c).

    Ties count by value: among rows equal to the k-th score any will do, but no more of them than the top-k holds.
    An index given twice counts once, and one that is no row (below 0, or m and more) does not count. The result is (*b,), NaN for
    queries whose scores hold a NaN: then there is no true top-k. Raises ValueError when k is not in 1..m.
    """
    rows = scores.shape[-1]
    k = check_count("k", k, 1, rows, "the number of rows")
    indices, scores = jnp.sort(jnp.asarray(indices), axis=-1), jnp.asarray(scores).astype(jnp.float32)
    repeated = jnp.concatenate([jnp.zeros_like(indices[..., :1], bool), indices[..., 1:] == indices[..., :-1]], axis=-1)
    counts = ~repeated & (indices >= 0) & (indices < rows)
    found = jnp.take_along_axis(scores, jnp.clip(indices, 0, rows - 1), axis=-1)
    best = exact_top_k(scores, k).values
    last = best[..., -1:]
    above = jnp.sum(counts & (found > last), axis=-1)
    tied = jnp.minimum(jnp.sum(counts & (found == last), axis=-1), jnp.sum(best == last, axis=-1))
    known = ~jnp.any(jnp.isnan(scores), axis=-1)
    return jnp.where(known, (above + tied).astype(jnp.float32) / k, jnp.nan)

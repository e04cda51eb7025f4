"""Top-k of scores, exact and in two stages, and the recall of an approximate answer."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hire.axes import AnyArray, Array, Float, Indices, Int, Scores


class TopK(NamedTuple):
    """The k best scores of each query, best first, and the rows that they belong to."""

    values: Float[AnyArray, "*b k"]
    indices: Int[AnyArray, "*b k"]


def check_count(name: str, value: int, low: int, high: int, of: str) -> None:
    """Raise ValueError, naming the value, unless it is a whole number from low to high."""
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{name} = {value!r}: expected a whole number from {low} to {high} ({of})")


def exact_top_k(scores: Scores, k: int) -> TopK:
    """The k largest of each row of scores (*b, m): float32 values (*b, k), best first, and int32 indices (*b, k).

    Of equal scores the lower index comes first. Raises ValueError when k is not in 1..m.
    """
    check_count("k", k, 1, scores.shape[-1], "the number of rows")
    # XLA's top-k is about a hundred times slower on bfloat16 than on float32 on a CPU.
    return TopK(*jax.lax.top_k(scores.astype(jnp.float32), k))


def bucketed_top_k(scores: Scores, k: int, *, buckets: int, per_bucket: int = 1) -> TopK:
    """Approximate top-k in two stages: the best `per_bucket` of each bucket, then the k best of those.

    Row i is in bucket i mod `buckets`: neighbouring rows, which are often alike, fall in different buckets, and
    the first stage reduces over whole vectors. `expected_recall` says what to expect of it; per_bucket = 1 is
    TPU-KNN (arXiv 2206.14286), more is the generalized form (arXiv 2506.04165).

    scores (*b, m) -> float32 values and int32 indices (*b, k). Raises ValueError when k is not in 1..m, buckets not in
    1..m, per_bucket not within a bucket, or when the buckets together keep fewer than k.
    """
    rows = scores.shape[-1]
    check_count("k", k, 1, rows, "the number of rows")
    check_count("buckets", buckets, 1, rows, "the number of rows")
    depth = -(-rows // buckets)
    check_count("per_bucket", per_bucket, 1, depth, "the rows of a bucket")
    kept = min(per_bucket * buckets, rows)
    check_count("k", k, 1, kept, f"what {buckets} buckets keep at {per_bucket} each")

    # Padding sits in the last row of the ragged buckets, behind every real score, -inf included.
    padding = [(0, 0)] * (scores.ndim - 1) + [(0, depth * buckets - rows)]
    padded = jnp.pad(scores.astype(jnp.float32), padding, constant_values=-jnp.inf)
    by_bucket = padded.reshape(*scores.shape[:-1], depth, buckets)
    if per_bucket == 1:
        place = jnp.argmax(by_bucket, axis=-2, keepdims=True)
        best = jnp.max(by_bucket, axis=-2, keepdims=True)
    else:
        best, place = (jnp.swapaxes(part, -1, -2) for part in exact_top_k(jnp.swapaxes(by_bucket, -1, -2), per_bucket))
    lanes = jax.lax.broadcasted_iota(place.dtype, place.shape, place.ndim - 1)
    indices = place * buckets + lanes
    flat = (*scores.shape[:-1], per_bucket * buckets)
    values, places = exact_top_k(best.reshape(flat), k)
    return TopK(values, jnp.take_along_axis(indices.reshape(flat), places, axis=-1).astype(jnp.int32))


def expected_recall(rows: int, k: int, *, buckets: int, per_bucket: int = 1) -> float:
    """Expected recall of `bucketed_top_k` when the true top-k lie in random buckets of equal size, from 0 to 1.

    arXiv 2506.04165: 1 - (B/K) sum over r > K' of (r - K') C(K, r) C(N-K, N/B-r) / C(N, N/B), with N rows, B buckets,
    K' per bucket. Raises ValueError when the buckets do not divide the rows.
    """
    check_count("k", k, 1, rows, "the number of rows")
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
    An index given twice counts once. Raises ValueError when k is not in 1..m.
    """
    check_count("k", k, 1, scores.shape[-1], "the number of rows")
    ordered = jnp.sort(indices, axis=-1)
    repeated = jnp.concatenate([jnp.zeros_like(ordered[..., :1], bool), ordered[..., 1:] == ordered[..., :-1]], axis=-1)
    found = jnp.where(repeated, -jnp.inf, jnp.take_along_axis(scores, ordered, axis=-1).astype(jnp.float32))
    best = exact_top_k(scores, k).values
    last = best[..., -1:]
    above = jnp.sum(found > last, axis=-1)
    tied = jnp.minimum(jnp.sum(found == last, axis=-1), jnp.sum(best == last, axis=-1))
    return (above + tied) / k

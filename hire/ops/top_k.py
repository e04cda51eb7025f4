"""Exact and two-stage top-k of scores, and the recall of an approximate top-k."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hire.ops.checks import check_range
from hire.ops.implementation import by_platform
from hire.ops.sortable import (
    best_of_buckets,
    kth_largest_int,
    pack_buckets,
    sortable_bits,
    top_k_of_buckets,
)
from hire.types import AnyArray, Array, Float, Indices, Int, Scores


class TopK(NamedTuple):
    """The k best scores of each query and the indices of their rows, best first.

    Attributes:
        values: Scores, float32 `(*b, k)`.
        indices: Row indices, int32 `(*b, k)`.
    """

    values: Float[AnyArray, "*b k"]
    indices: Int[AnyArray, "*b k"]


def floor_fraction(share: float, count: int) -> int:
    """Return the largest integer that is at most `share` of `count`."""
    return int(share * count + 1e-6)


def exact_top_k(scores: Scores, k: int) -> TopK:
    """Return the k largest scores of each query and their indices.

    Args:
        scores: Scores `(*b, m)`.
        k: Number of scores to return.

    Returns:
        Values, float32 `(*b, k)`, and indices, int32 `(*b, k)`, best first. Of equal scores the
        lower index comes first.

    Raises:
        ValueError: If k is not in 1..m.
    """
    k = check_range("k", k, 1, scores.shape[-1], "the number of rows")
    # On a CPU XLA's top-k is about a hundred times slower on bfloat16 than on float32. If XLA sees
    # that only a part of the result is used, it sorts all rows, which is thirty times slower. The
    # barrier hides the use. It takes the indices first: with the values first, XLA would mistake
    # the pair for the top-k itself and fail to partition it over devices.
    values, indices = jax.lax.top_k(scores.astype(jnp.float32), k)
    indices, values = jax.lax.optimization_barrier((indices, values))
    return TopK(values, indices)


def top_k_with_indices(
    scores: Float[AnyArray, "*b c"], indices: Int[AnyArray, "*b c"], k: int
) -> TopK:
    """Return the k best of some rows, whose indices are in any order.

    Args:
        scores: Scores of the rows `(*b, c)`.
        indices: Indices of the rows `(*b, c)`.
        k: Number of rows to return, at most c.

    Returns:
        The scores, float32 `(*b, k)`, and the row indices, int32 `(*b, k)`, best first. Of equal
        scores the lower row index comes first, as in `jax.lax.top_k` of all rows.
    """
    scores = jnp.asarray(scores).astype(jnp.float32)
    indices = jnp.asarray(indices).astype(jnp.int32)
    positions = top_k_positions(jax.lax.stop_gradient(scores), indices, k)
    return TopK(*(jnp.take_along_axis(part, positions, axis=-1) for part in (scores, indices)))


def top_k_positions(
    scores: Float[Array, "*b c"], indices: Int[Array, "*b c"], k: int
) -> Int[Array, "*b k"]:
    """Return the positions `(*b, k)` of what `top_k_with_indices` returns."""
    keys = sortable_bits(jax.lax.bitcast_convert_type(scores, jnp.int32))

    def selected() -> Indices:
        """Select several times, which a CPU does faster than one sort by score and index."""
        # A float that is the larger, the lower the index. The scores above the k-th come first.
        by_index = jnp.maximum(LARGEST_INDEX_KEY - indices, SMALLEST_INDEX_KEY)
        threshold = kth_of_sorted(exact_top_k(scores, k).values)
        by_tie = jnp.where(keys > threshold, ABOVE_KEY, by_index)
        by_tie = jax.lax.bitcast_convert_type(by_tie, jnp.float32)
        positions = exact_top_k(jnp.where(keys < threshold, -jnp.inf, by_tie), k).indices
        # These are the right rows. They are put in the order of their indices, then of scores.
        for key in (jax.lax.bitcast_convert_type(by_index, jnp.float32), scores):
            order = exact_top_k(jnp.take_along_axis(key, positions, axis=-1), k).indices
            positions = jnp.take_along_axis(positions, order, axis=-1)
        return positions

    def in_one_sort() -> Indices:
        positions = jax.lax.broadcasted_iota(jnp.int32, keys.shape, keys.ndim - 1)
        return jax.lax.sort((~keys, indices, positions), num_keys=2)[2][..., :k]

    return by_platform(selected, in_one_sort)


# Bits of positive floats, which sort like integers.
ABOVE_KEY, LARGEST_INDEX_KEY, SMALLEST_INDEX_KEY = 0x7F000000, 0x7E800000, 0x00800000


def kth_of_sorted(values: Float[AnyArray, "*b k"]) -> Int[Array, "*b 1"]:
    """Return the last of some sorted scores, as a sortable integer."""
    return sortable_bits(jax.lax.bitcast_convert_type(jnp.asarray(values)[..., -1:], jnp.int32))


def bucketed_top_k(scores: Scores, k: int, *, buckets: int, per_bucket: int = 1) -> TopK:
    """Return an approximate top-k in two stages.

    The first stage keeps the best `per_bucket` rows of each bucket. The second stage takes the k
    best of those. `per_bucket=1` is TPU-KNN (arXiv 2206.14286); more is the generalized form (arXiv
    2506.04165). `expected_recall` gives the recall to expect.

    Row i is in bucket i mod `buckets`. So neighbouring rows, which are often alike, are in
    different buckets, and the first stage reduces over full vectors. The search compares scores
    without their last ceil(log2(rows of a bucket)) bits. Of two rows with equal remaining bits it
    may take the wrong one.

    Args:
        scores: Scores `(*b, m)`.
        k: Number of rows to return.
        buckets: Number of buckets.
        per_bucket: Rows that each bucket keeps.

    Returns:
        Values, float32 `(*b, k)`, and indices, int32 `(*b, k)`, best first.

    Raises:
        ValueError: If k or `buckets` is not in 1..m, if `per_bucket` exceeds the rows of a bucket
            or is below 1, or if all buckets together keep fewer than k rows.
    """
    num_rows = scores.shape[-1]
    k = check_range("k", k, 1, num_rows, "the number of rows")
    buckets = check_range("buckets", buckets, 1, num_rows, "the number of rows")
    per_bucket = check_range(
        "per_bucket", per_bucket, 1, -(-num_rows // buckets), "the rows of a bucket"
    )
    num_winners = min(per_bucket * buckets, num_rows)
    check_range("k", k, 1, num_winners, f"what {buckets} buckets keep at {per_bucket} each")
    indices = bucketed_indices(scores, k, buckets, per_bucket)
    return top_k_with_indices(jnp.take_along_axis(scores, indices, axis=-1), indices, k)


def bucketed_indices(scores: Scores, k: int, buckets: int, per_bucket: int) -> Indices:
    """Return only the indices of `bucketed_top_k`, without its checks.

    Args:
        scores: Scores `(*b, m)`.
        k: Number of rows to return.
        buckets: Number of buckets.
        per_bucket: Rows that each bucket keeps.

    Returns:
        Row indices `(*b, k)`, in no order.
    """
    bucket_maxima = best_of_buckets(pack_buckets(jnp.asarray(scores), buckets), per_bucket)
    return top_k_of_buckets(bucket_maxima, k, -(-scores.shape[-1] // buckets))


def group_scores(
    activations: Float[AnyArray, "*b f"], group_size: int, reduce: str = "sum"
) -> Float[Array, "*b m"]:
    """Return the score of every group of consecutive neurons.

    The score is the sum (or the maximum) of the magnitudes of the activations. Exact and estimated
    activations, training and inference all use this one definition. Our choice: the paper has
    groups (PAPER claim group-sparsity) but, as far as we know, it does not define their score.

    Args:
        activations: Activations `(*b, f)`, exact or estimated.
        group_size: Neurons of a group.
        reduce: "sum" or "max".

    Returns:
        Scores of the groups `(*b, m)`.

    Raises:
        ValueError: If `group_size` does not divide f, or if `reduce` is unknown.
    """
    num_neurons = activations.shape[-1]
    if num_neurons % group_size:
        raise ValueError(
            f"group_size = {group_size}: expected a divisor of the {num_neurons} neurons"
        )
    if reduce not in REDUCTIONS:
        raise ValueError(f"reduce = {reduce!r}: expected one of {', '.join(REDUCTIONS)}")
    groups = jnp.abs(activations).reshape(
        *activations.shape[:-1], num_neurons // group_size, group_size
    )
    return REDUCTIONS[reduce](groups, axis=-1)


REDUCTIONS = {"sum": jnp.sum, "max": jnp.max}


def mask_top_groups(
    activations: Float[Array, "*b f"], scores: Float[Array, "*b m"], k: int
) -> Float[Array, "*b f"]:
    """Keep the activations of the k groups with the best scores and set the others to 0.

    Groups that tie with the k-th stay, too.

    Args:
        activations: Activations `(*b, f)`.
        scores: Scores of the groups `(*b, m)`.
        k: Number of groups to keep.

    Returns:
        The masked activations `(*b, f)`.

    Raises:
        ValueError: If k is not in 1..m.
    """
    threshold = kth_largest(jax.lax.stop_gradient(scores), k)
    groups = activations.reshape(*scores.shape, -1)
    # Negated, because `scores >= threshold` would set a group with a NaN score to 0.
    return jnp.where(~(scores < threshold)[..., None], groups, 0).reshape(activations.shape)


def kth_largest(scores: Scores, k: int) -> Float[Array, "*b 1"]:
    """Return the k-th largest score of each query.

    Args:
        scores: Scores `(*b, m)`.
        k: Rank, from 1.

    Returns:
        The k-th largest scores, float32 `(*b, 1)`.

    Raises:
        ValueError: If k is not in 1..m.
    """
    k = check_range("k", k, 1, scores.shape[-1], "the number of rows")
    kth = kth_largest_int(
        sortable_bits(jax.lax.bitcast_convert_type(scores.astype(jnp.float32), jnp.int32)), k
    )
    return jax.lax.bitcast_convert_type(sortable_bits(kth), jnp.float32)


def expected_recall(rows: int, k: int, *, buckets: int, per_bucket: int = 1) -> float:
    """Return the expected recall of `bucketed_top_k` for a true top-k in random buckets.

    With N rows, B buckets of equal size and K' rows per bucket, arXiv 2506.04165 gives
    1 - (B/K) sum over r > K' of (r - K') C(K, r) C(N-K, N/B-r) / C(N, N/B).

    Args:
        rows: Number of rows, N.
        k: Number of rows that the search returns, K.
        buckets: Number of buckets, B.
        per_bucket: Rows that each bucket keeps, K'.

    Returns:
        The expected recall, from 0 to 1.

    Raises:
        ValueError: If k is not in 1..rows, or if `buckets` does not divide `rows`.
    """
    k = check_range("k", k, 1, rows, "the number of rows")
    if rows % buckets:
        raise ValueError(f"buckets = {buckets}: expected a divisor of the {rows} rows")
    depth = rows // buckets

    def log_choose(n: int, r: int) -> float:
        return math.lgamma(n + 1) - math.lgamma(r + 1) - math.lgamma(n - r + 1)

    expected_losses = 0.0
    for r in range(max(per_bucket + 1, depth - (rows - k)), min(k, depth) + 1):
        log_share = log_choose(k, r) + log_choose(rows - k, depth - r) - log_choose(rows, depth)
        expected_losses += (r - per_bucket) * math.exp(log_share)
    return 1.0 - buckets / k * expected_losses


def expected_recall_top1(k: int, *, buckets: int) -> float:
    """Return the simpler published form of `expected_recall` for one row per bucket.

    With M buckets it is ((M-1)/M)^(K-1) (TPU-KNN, arXiv 2206.14286): the probability that no other
    true row shares the bucket of a true row. It is a little below `expected_recall`, which also
    counts the best of several true rows in one bucket.

    Args:
        k: Number of rows that the search returns, K.
        buckets: Number of buckets, M.

    Returns:
        The expected recall, from 0 to 1.
    """
    return ((buckets - 1) / buckets) ** (k - 1)


def recall(indices: Indices, scores: Scores, k: int) -> Float[Array, "*b"]:
    """Return the share of the true top-k that is among the given indices.

    Ties count by value: any row equal to the k-th score counts, but no more of them than the top-k
    contains. A repeated index counts once. An index outside 0..m-1 does not count.

    Args:
        indices: Row indices `(*b, c)`.
        scores: Exact scores `(*b, m)`.
        k: Size of the true top-k.

    Returns:
        Recall `(*b,)`, from 0 to 1. It is NaN for a query with a NaN among its scores, because it
        has no true top-k.

    Raises:
        ValueError: If k is not in 1..m.
    """
    num_rows = scores.shape[-1]
    k = check_range("k", k, 1, num_rows, "the number of rows")
    indices, scores = (
        jnp.sort(jnp.asarray(indices), axis=-1),
        jnp.asarray(scores).astype(jnp.float32),
    )
    repeated = jnp.concatenate(
        [jnp.zeros_like(indices[..., :1], bool), indices[..., 1:] == indices[..., :-1]], axis=-1
    )
    is_valid = ~repeated & (indices >= 0) & (indices < num_rows)
    candidate_scores = jnp.take_along_axis(scores, jnp.clip(indices, 0, num_rows - 1), axis=-1)
    top_scores = exact_top_k(scores, k).values
    threshold = top_scores[..., -1:]
    above = jnp.sum(is_valid & (candidate_scores > threshold), axis=-1)
    tied = jnp.minimum(
        jnp.sum(is_valid & (candidate_scores == threshold), axis=-1),
        jnp.sum(top_scores == threshold, axis=-1),
    )
    has_top_k = ~jnp.any(jnp.isnan(scores), axis=-1)
    return jnp.where(has_top_k, (above + tied).astype(jnp.float32) / k, jnp.nan)

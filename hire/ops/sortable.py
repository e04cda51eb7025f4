"""Scores packed with their index into sortable integers.

The two-stage top-k compares these integers, both in plain JAX and in the TPU kernel.
"""

import jax
import jax.numpy as jnp

from hire.ops.implementation import by_platform
from hire.types import Array, Float, Int

# Smaller than the packed integer of every score.
EMPTY = -(2**31)


def pack_score_index(
    scores: Float[Array, "*b w"], positions: Int[Array, "*b w"] | Int[Array, ""] | int, cut: int
) -> Int[Array, "*b w"]:
    """Pack scores and positions into integers that sort like the scores.

    The last bits, those of the mask `cut`, contain `cut` minus the position. So one vectorized
    maximum yields score and position together; an argmax takes ten times as long. Infinities become
    the largest or smallest finite float.

    Args:
        scores: Scores `(*b, w)`.
        positions: Positions `(*b, w)`, or one position for all scores.
        cut: Mask of the bits for the position, see `index_mask`.

    Returns:
        Packed integers, int32 `(*b, w)`.
    """
    limits = jnp.finfo(jnp.float32)
    bits = jax.lax.bitcast_convert_type(
        jnp.clip(scores.astype(jnp.float32), limits.min, limits.max), jnp.int32
    )
    return (sortable_bits(bits) & ~cut) | (cut - positions)


def sortable_bits(bits: Int[Array, "*b w"]) -> Int[Array, "*b w"]:
    """Map the bits of floats to integers that sort like the floats.

    A second call returns the original bits.

    Args:
        bits: Bits of float32 numbers, int32 `(*b, w)`.

    Returns:
        Sortable integers, int32 `(*b, w)`.
    """
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def index_mask(depth: int) -> int:
    """Return the mask of the bits that store a position in a bucket of `depth` rows."""
    return 2 ** (depth - 1).bit_length() - 1


def pack_buckets(scores: Float[Array, "*b m"], buckets: int) -> Int[Array, "*b depth buckets"]:
    """Pack every score with its position in its bucket.

    Row i is at position i // buckets of bucket i mod buckets.

    Args:
        scores: Scores `(*b, m)`.
        buckets: Number of buckets.

    Returns:
        Packed integers `(*b, depth, buckets)`, `EMPTY` where a bucket has no row.
    """
    num_rows = scores.shape[-1]
    depth = -(-num_rows // buckets)
    positions = jax.lax.broadcasted_iota(jnp.int32, scores.shape, scores.ndim - 1) // buckets
    padding = [(0, 0)] * (scores.ndim - 1) + [(0, depth * buckets - num_rows)]
    packed = jnp.pad(
        pack_score_index(jnp.asarray(scores), positions, index_mask(depth)),
        padding,
        constant_values=EMPTY,
    )
    return packed.reshape(*scores.shape[:-1], depth, buckets)


def best_of_buckets(
    keys: Int[Array, "*b depth buckets"], per_bucket: int
) -> list[Int[Array, "*b buckets"]]:
    """Return the largest packed integer of every bucket, the second largest, and so on.

    Args:
        keys: Packed integers `(*b, depth, buckets)`, see `pack_buckets`.
        per_bucket: Number of winners of each bucket.

    Returns:
        A list of `per_bucket` arrays `(*b, buckets)`, the largest first.
    """
    maxima = [jnp.max(keys, axis=-2)]
    # The integers of a bucket differ, so the ones below the last winner are all but the winners.
    while len(maxima) < per_bucket:
        last = jnp.expand_dims(maxima[-1], -2)
        maxima.append(jnp.max(jnp.where(keys < last, keys, EMPTY), axis=-2))
    return maxima


def top_k_of_buckets(
    maxima: list[Int[Array, "*b buckets"]], k: int, depth: int
) -> Int[Array, "*b k"]:
    """Return the indices of the k best rows among the winners of all buckets.

    Args:
        maxima: Winners of the buckets, see `best_of_buckets`.
        k: Number of rows to return.
        depth: Rows of a bucket.

    Returns:
        Row indices `(*b, k)`, in no order.
    """
    buckets, mask, pooled = (
        maxima[0].shape[-1],
        index_mask(depth),
        jnp.concatenate(maxima, axis=-1),
    )
    top, indices = top_k_packed(pooled, k)
    return (mask - (top & mask)) * buckets + indices % buckets


def top_k_packed(keys: Int[Array, "*b m"], k: int) -> tuple[Int[Array, "*b k"], Int[Array, "*b k"]]:
    """Return the k largest integers and their indices.

    Args:
        keys: Sortable integers, int32 `(*b, m)`.
        k: Number of integers to return.

    Returns:
        The integers `(*b, k)` and their indices `(*b, k)`, in no order. Of equal integers the one
        with the lower index is taken.
    """

    def counted() -> tuple[Array, Array]:
        """Select by a threshold and a count: half of the time of a sort on a CPU."""
        threshold = kth_largest_int(keys, k)
        above, tied = keys > threshold, keys == threshold
        ties_needed = k - jnp.sum(above, axis=-1, keepdims=True)
        is_top = above | (tied & (jnp.cumsum(tied, axis=-1) <= ties_needed))
        positions = jnp.where(is_top, jnp.cumsum(is_top, axis=-1) - 1, k)
        iota = jax.lax.broadcasted_iota(jnp.int32, positions.shape, positions.ndim - 1)
        unfilled = jnp.zeros((*positions.shape[:-1], k), jnp.int32)
        indices = jnp.put_along_axis(unfilled, positions, iota, axis=-1, inplace=False, mode="drop")
        return jnp.take_along_axis(keys, indices, axis=-1), indices

    def sorted_floats() -> tuple[Array, Array]:
        """Sort as floats: a TPU sorts floats, and gathers slowly."""
        floats = jax.lax.bitcast_convert_type(sortable_bits(keys), jnp.float32)
        values, indices = jax.lax.top_k(jnp.where(keys == EMPTY, -jnp.inf, floats), k)
        return sortable_bits(jax.lax.bitcast_convert_type(values, jnp.int32)), indices

    return by_platform(counted, sorted_floats)


def kth_largest_int(keys: Int[Array, "*b m"], k: int) -> Int[Array, "*b 1"]:
    """Return the k-th largest integer of each row.

    The search sets one bit at a time, from the sign bit down, and counts the larger integers. Where
    only the threshold is needed, as in training, these 32 passes cost a fraction of a sort.

    Args:
        keys: Integers, int32 `(*b, m)`.
        k: Rank, from 1.

    Returns:
        The k-th largest integers, int32 `(*b, 1)`.
    """

    # The sign bit comes first: added to the smallest integer it gives 0.
    def set_bit(step, prefix):
        threshold = prefix + jnp.left_shift(1, 31 - step)
        return jnp.where(jnp.sum(keys >= threshold, axis=-1, keepdims=True) >= k, threshold, prefix)

    return jax.lax.fori_loop(0, 32, set_bit, jnp.full_like(keys[..., :1], -(2**31)))

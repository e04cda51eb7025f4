"""Scores as whole numbers that carry their place: what the two-stage top-k compares, in plain JAX and in the kernel."""

import jax
import jax.numpy as jnp

from hire.axes import Array, Float, Int
from hire.kernels.form import by_platform

EMPTY = -(2**31)  # below the key of every score


def keys(scores: Float[Array, "*b w"], places: Int[Array, "*b w"] | Int[Array, ""] | int, cut: int) -> Int[Array, "*b w"]:
    """Integers in the order of the scores, whose last bits, those of the mask `cut`, count places down from `cut`.

    So a vectorized maximum yields value and place together, where an argmax takes ten times as long. Infinities become the
    outermost floats.
    """
    ends = jnp.finfo(jnp.float32)
    bits = jax.lax.bitcast_convert_type(jnp.clip(scores.astype(jnp.float32), ends.min, ends.max), jnp.int32)
    return (ordered(bits) & ~cut) | (cut - places)


def ordered(bits: Int[Array, "*b w"]) -> Int[Array, "*b w"]:
    """The bits of floats as integers of the same order; applied twice, the bits again."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def mask(depth: int) -> int:
    """The bits that hold a place in a bucket of `depth` rows."""
    return 2 ** (depth - 1).bit_length() - 1


def bucket_keys(scores: Float[Array, "*b m"], buckets: int) -> Int[Array, "*b depth buckets"]:
    """The key of every score, by bucket."""
    rows = scores.shape[-1]
    depth = -(-rows // buckets)
    place = jax.lax.broadcasted_iota(jnp.int32, scores.shape, scores.ndim - 1) // buckets
    padding = [(0, 0)] * (scores.ndim - 1) + [(0, depth * buckets - rows)]
    found = jnp.pad(keys(jnp.asarray(scores), place, mask(depth)), padding, constant_values=EMPTY)
    return found.reshape(*scores.shape[:-1], depth, buckets)


def bucket_winners(keys: Int[Array, "*b depth buckets"], per_bucket: int) -> list[Int[Array, "*b buckets"]]:
    """The largest key of every bucket, the second largest, and so on."""
    winners = [jnp.max(keys, axis=-2)]
    while len(winners) < per_bucket:  # keys of a bucket differ, so what is below the last winner leaves out just the winners
        last = jnp.expand_dims(winners[-1], -2)
        winners.append(jnp.max(jnp.where(keys < last, keys, EMPTY), axis=-2))
    return winners


def best_winners(winners: list[Int[Array, "*b buckets"]], k: int, depth: int) -> Int[Array, "*b k"]:
    """The rows (*b, k) of the k best of the winners of buckets of `depth` rows, in no order."""
    buckets, cut, pool = winners[0].shape[-1], mask(depth), jnp.concatenate(winners, axis=-1)
    found, best = best_set(pool, k)
    return (cut - (found & cut)) * buckets + best % buckets


def best_set(keys: Int[Array, "*b m"], k: int) -> tuple[Int[Array, "*b k"], Int[Array, "*b k"]]:
    """The k largest keys (*b, k) and their indices, in no order; of equal ones the lower."""

    def counted() -> tuple[Array, Array]:
        """On a CPU a threshold and a count take half of the time of a sort."""
        last = kth_key(keys, k)
        above, tied = keys > last, keys == last
        room = k - jnp.sum(above, axis=-1, keepdims=True)
        chosen = above | (tied & (jnp.cumsum(tied, axis=-1) <= room))
        place = jnp.where(chosen, jnp.cumsum(chosen, axis=-1) - 1, k)
        index = jax.lax.broadcasted_iota(jnp.int32, place.shape, place.ndim - 1)
        slots = jnp.zeros((*place.shape[:-1], k), jnp.int32)
        found = jnp.put_along_axis(slots, place, index, axis=-1, inplace=False, mode="drop")
        return jnp.take_along_axis(keys, found, axis=-1), found

    def sorted_floats() -> tuple[Array, Array]:
        """A TPU sorts floats, and gathers slowly."""
        floats = jax.lax.bitcast_convert_type(ordered(keys), jnp.float32)
        values, found = jax.lax.top_k(jnp.where(keys == EMPTY, -jnp.inf, floats), k)
        return ordered(jax.lax.bitcast_convert_type(values, jnp.int32)), found

    return by_platform(counted, sorted_floats)


def kth_key(keys: Int[Array, "*b m"], k: int) -> Int[Array, "*b 1"]:
    """The k-th largest of each row of int32 keys.

    Found bit by bit, from the sign down, by counting: where only the threshold is wanted, as in training, 32 passes over the keys
    cost a fraction of a sort.
    """

    def settle(step, found):  # adding the sign's bit to the smallest number gives 0, and so on down
        trial = found + jnp.left_shift(1, 31 - step)
        return jnp.where(jnp.sum(keys >= trial, axis=-1, keepdims=True) >= k, trial, found)

    return jax.lax.fori_loop(0, 32, settle, jnp.full_like(keys[..., :1], -(2**31)))

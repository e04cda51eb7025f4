"""Scores as whole numbers that carry their place: what the two-stage top-k compares, in plain JAX and in the kernel."""

import jax
import jax.numpy as jnp

from hire.axes import Array, Float, Int

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

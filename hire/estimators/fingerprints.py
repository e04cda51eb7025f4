"""Fingerprints: which rows an estimator was fitted to."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from hire.ops.array_cache import ArrayCache
from hire.ops.matmul import HALF_TYPES
from hire.types import Blocks, Fingerprint, Rows

PRECISIONS = (jnp.float32, jnp.bfloat16, jnp.float16)


def precision_index(dtype: Any) -> int:
    """Return the index of a type in `PRECISIONS`.

    Types other than 16-bit floats count as float32, in which they are multiplied with queries.
    """
    return PRECISIONS.index(dtype) if dtype in HALF_TYPES else 0


def fingerprint(rows: Rows | Blocks) -> Fingerprint:
    """Return the fingerprint of rows.

    It stores the type of the rows and, for each type in `PRECISIONS`, a 64-bit checksum of all
    entries rounded to that type. So the same rows in another of these types are recognised, see
    `same_rows`.

    Args:
        rows: Rows `(m, d)`, or their blocks.

    Returns:
        Seven uint32 numbers: the index of the type in `PRECISIONS`, then two numbers for each
        checksum.
    """
    return checksums(rows, precision_index(rows.dtype))


@functools.partial(jax.jit, static_argnames="precision")
def checksums(rows: Rows | Blocks, precision: int) -> Fingerprint:
    """Return the fingerprint of rows with a type of index `precision`, see `fingerprint`."""
    run_length = next(size for size in range(32, 0, -1) if rows.shape[-1] % size == 0)
    position_hash = jax.lax.iota(jnp.uint32, rows.size).reshape(
        *rows.shape[:-1], -1, run_length
    ) * jnp.uint32(0x9E3779B9)
    rows_f32 = jnp.asarray(rows).astype(jnp.float32).reshape(position_hash.shape)
    values = [jnp.full((), precision, jnp.uint32)]
    for dtype in PRECISIONS:
        uint_type = jnp.uint32 if dtype == jnp.float32 else jnp.uint16
        bits = jax.lax.bitcast_convert_type(rows_f32.astype(dtype), uint_type).astype(jnp.uint32)
        mixed = (bits ^ position_hash) * jnp.uint32(0x85EBCA6B)
        mixed = (mixed ^ jax.lax.shift_right_logical(mixed, jnp.uint32(13))) * jnp.uint32(
            0xC2B2AE35
        )
        # Sum short runs first: for longer ones XLA writes the summands to memory. Sums of integers
        # do not depend on the order.
        remixed = (mixed ^ jax.lax.shift_right_logical(mixed, jnp.uint32(16))) * jnp.uint32(
            0x27D4EB2F
        )
        sums = [jnp.sum(part, axis=-1, dtype=jnp.uint32) for part in (mixed, remixed)]
        values += [jnp.sum(part, dtype=jnp.uint32) for part in jax.lax.optimization_barrier(sums)]
    return jnp.stack(values)


def same_rows(one: Fingerprint, other: Fingerprint) -> bool:
    """Return whether two fingerprints are of the same rows.

    One of them may be of the rows rounded to a 16-bit type.

    Args:
        one: A fingerprint.
        other: Another fingerprint.

    Returns:
        True if the rows are the same. False for a bfloat16 and a float16 fingerprint.
    """
    # numpy arrays work inside jax.jit, too, where to index a jax array would be traced.
    one, other = np.asarray(one), np.asarray(other)
    first, second = int(one[0]), int(other[0])
    if first and second and first != second:  # bfloat16 and float16 cannot be compared
        return False
    offset = 1 + 2 * max(first, second)
    return np.array_equal(one[offset : offset + 2], other[offset : offset + 2])


cached_fingerprint = ArrayCache(fingerprint)


@functools.cache
def block_fingerprint(width: int) -> ArrayCache:
    """Return a cached function that computes the `fingerprint` of rows in blocks.

    Args:
        width: Entries of a row, without padding.

    Returns:
        The cached function of blocks.
    """
    return ArrayCache(lambda blocks: fingerprint(blocks.reshape(len(blocks), -1)[:, :width]))


def check_same_rows(one: Fingerprint | None, other: Fingerprint | None, what: str) -> None:
    """Check that two fingerprints are of the same rows.

    An unknown fingerprint passes: None, or a tracer inside `jax.jit`.

    Args:
        one: A fingerprint or None.
        other: A fingerprint or None.
        what: Start of the error message.

    Raises:
        ValueError: If both fingerprints are known and their rows differ.
    """
    if one is None or other is None or isinstance(one, Tracer) or isinstance(other, Tracer):
        return
    if not same_rows(one, other):
        raise ValueError(f"{what}: expected one fitted to these; fit it again")

"""Quantization of rows to 8 or 4 bits: rounding, packing and unpacking."""

import functools
from dataclasses import field, replace

import jax
import jax.numpy as jnp
import numpy as np

from hire.pytrees import pytree
from hire.types import AnyArray, Array, Codes, Float, Rows


def unpack_codes(codes: Codes, bits: int, width: int) -> Float[Array, "... d"]:
    """Convert codes to float32 integers.

    Args:
        codes: Codes `(..., width)` at 8 bits, `(..., ceil(width / 2))` at 4 bits.
        bits: 8 or 4.
        width: Entries of a row.

    Returns:
        The codes as float32 integers `(..., width)`.
    """
    if bits == 8:
        return codes.astype(jnp.float32)
    return jnp.concatenate(unpack_nibbles(codes), axis=-1)[..., :width].astype(jnp.float32)


def unpack_nibbles(codes: Codes) -> tuple[Codes, Codes]:
    """Split every byte into its two int8 numbers.

    Column j shares a byte with column j + half, so that each half is one contiguous run.

    Args:
        codes: Packed 4-bit codes `(..., half)`.

    Returns:
        The columns of the first half and of the second half, int8 `(..., half)` each.
    """
    signed = jax.lax.bitcast_convert_type(codes, jnp.int8)
    low = jax.lax.shift_right_arithmetic(jax.lax.shift_left(signed, jnp.int8(4)), jnp.int8(4))
    return low, jax.lax.shift_right_arithmetic(signed, jnp.int8(4))


# Fractions of a row's largest entry that the highest of the 15 steps may represent (4 bits).
CLIP_FRACTIONS = tuple(1 - 0.05 * step for step in range(9))


# As one program it allocates nothing as large as the rows.
@functools.partial(jax.jit, static_argnames="bits")
def quantize_rows(
    rows: Rows, bits: int, query_root: Float[AnyArray, "d d"] | None = None
) -> tuple[Codes, Float[Array, " m"]]:
    """Round rows to codes and compute their scales.

    At 4 bits it tries several scales for each row and takes the one with the least squared error.
    With `query_root` it then takes the scale with which these codes have the least error in scores.

    Args:
        rows: Rows `(m, d)`.
        bits: 8 or 4.
        query_root: A root `(d, d)` of the second moment of the queries, or None.

    Returns:
        The codes, int8 `(m, d)` at 8 bits or uint8 `(m, ceil(d / 2))` at 4 bits, and the scales,
        float32 `(m,)`.
    """
    steps, width = 2 ** (bits - 1) - 1, rows.shape[1]
    rows_f32 = rows.astype(jnp.float32)
    size = jnp.abs(rows_f32)
    largest = jnp.max(size, axis=-1)
    # If a step would be no normal number, a CPU would treat it as 0. Such a row becomes 0.
    full_scale = jnp.where(largest / steps >= jnp.finfo(jnp.float32).tiny, largest, 1.0) / steps

    def error(scale: Float[Array, " m"]) -> Float[Array, " m"]:
        # Without signs this is one pass on a CPU.
        residual = size - jnp.minimum(jnp.round(size / scale[:, None]), steps) * scale[:, None]
        return jnp.sum(residual**2, axis=-1)

    scale, min_error = full_scale, error(full_scale)
    # At 4 bits a few large entries would leave only one or two steps for the others.
    for fraction in CLIP_FRACTIONS[1:] if bits == 4 else ():
        clip_error = error(fraction * full_scale)
        scale, min_error = (
            jnp.where(clip_error < min_error, fraction * full_scale, scale),
            jnp.minimum(clip_error, min_error),
        )
    codes = jnp.clip(jnp.round(rows_f32 / scale[:, None]), -steps, steps)
    if query_root is not None:
        projected = codes @ query_root
        size = jnp.sum(projected**2, axis=-1)
        refit_scale = jnp.sum(projected * (rows_f32 @ query_root), axis=-1) / jnp.where(
            size > 0, size, 1.0
        )
        usable = (
            (size > 0)
            & jnp.isfinite(refit_scale)
            & (jnp.abs(refit_scale) >= jnp.finfo(jnp.float32).tiny)
        )
        scale = jnp.where(usable, refit_scale, scale)
    codes = codes.astype(jnp.int8)
    if bits == 8:
        return codes, scale
    low, high = jnp.split(jnp.pad(codes, ((0, 0), (0, width % 2))), 2, axis=1)
    packed = (low & jnp.int8(15)) | jax.lax.shift_left(high, jnp.int8(4))
    return jax.lax.bitcast_convert_type(packed, jnp.uint8), scale


@pytree
class QuantizedRows:
    """Rows `(m, d)` as integers of 8 or 4 bits times one float32 scale per row.

    Attributes:
        codes: Codes `(m, d)` at 8 bits; at 4 bits two entries share a byte.
        scale: Scale of each row `(m,)`.
        bits: 8 or 4.
        width: Entries of a row, d.
    """

    codes: Codes
    scale: Float[Array, " m"]
    bits: int = field(metadata=dict(static=True))
    width: int = field(metadata=dict(static=True))

    @property
    def shape(self) -> tuple[int, int]:
        """Shape `(m, d)` of the rows."""
        return self.codes.shape[0], self.width

    @property
    def dtype(self) -> np.dtype:
        """Type of the dequantized rows: float32."""
        return np.dtype(np.float32)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales, which is all that a search reads."""
        return self.codes.nbytes + self.scale.nbytes

    def __getitem__(self, selection: slice) -> "QuantizedRows":
        """Return a slice of the rows."""
        return replace(self, codes=self.codes[selection], scale=self.scale[selection])


def storage_of(rows: Rows | QuantizedRows) -> str:
    """Return how rows are stored: the name of their type, or "int8" or "int4" if quantized."""
    return f"int{rows.bits}" if isinstance(rows, QuantizedRows) else str(rows.dtype)


def dequantize(part: AnyArray | QuantizedRows) -> Float[Array, "_ _"]:
    """Convert a matrix or quantized rows to float32.

    Args:
        part: A matrix, or quantized rows.

    Returns:
        The matrix, or the one that codes and scales represent, in float32.
    """
    if isinstance(part, QuantizedRows):
        return unpack_codes(part.codes, part.bits, part.width) * part.scale[:, None]
    return jnp.asarray(part).astype(jnp.float32)


def quantize(rows: Rows, bits: int) -> QuantizedRows:
    """Round rows to 8 or 4 bits, see `quantize_rows`.

    Args:
        rows: Rows `(m, d)`.
        bits: 8 or 4.

    Returns:
        The quantized rows.
    """
    codes, scale = quantize_rows(rows, bits)
    return QuantizedRows(codes, scale, bits, rows.shape[1])

"""Checks of counts and arrays that all operations share."""

import operator
from typing import SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from hire.ops.array_cache import ArrayCache
from hire.types import Array, Float, Rows


def check_range(name: str, value: SupportsIndex, low: int, high: int, of: str) -> int:
    """Check that a value is an integer in a range.

    Args:
        name: Name of the value for the error message.
        value: An integer of Python or numpy. A bool is not an integer here.
        low: Smallest allowed value.
        high: Largest allowed value.
        of: Description of the range for the error message.

    Returns:
        The value as an int.

    Raises:
        ValueError: If the value is not an integer from `low` to `high`.
    """
    try:
        count = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        count = None
    if count is None or not low <= count <= high:
        raise ValueError(f"{name} = {value!r}: expected a whole number from {low} to {high} ({of})")
    return count


def check_bits(bits: int) -> None:
    """Check the number of bits of a quantized entry.

    Raises:
        ValueError: If `bits` is neither 4 nor 8.
    """
    if bits not in (4, 8):
        raise ValueError(f"bits = {bits!r}: expected 4 or 8")


def check_finite(name: str, rows: Rows) -> None:
    """Check that all entries of the rows are finite.

    Inside `jax.jit` the values are unknown, so the check does nothing.

    Args:
        name: Name of the rows for the error message.
        rows: Rows `(m, d)`.

    Raises:
        ValueError: If an entry is not finite. The message names the first such row.
    """
    if isinstance(rows, Tracer):
        return
    finite = np.isfinite(cached_row_max(rows))
    if not finite.all():
        raise ValueError(
            f"{name}: row {int(np.argmin(finite))} holds a value that is not finite: expected "
            "finite rows"
        )


@jax.jit
def row_max_abs(rows: Rows) -> Float[Array, " m"]:
    """Return the largest magnitude in each row, float32 `(m,)`.

    The result is inf for a row with an entry that is not finite. Such entries are replaced first,
    because a maximum on a CPU may skip a NaN.

    Args:
        rows: Rows `(m, d)`.

    Returns:
        The largest magnitudes, float32 `(m,)`.
    """
    rows_f32 = rows.astype(jnp.float32)
    return jnp.max(jnp.where(jnp.isfinite(rows_f32), jnp.abs(rows_f32), jnp.inf), axis=-1)


@ArrayCache
def cached_row_max(rows: Rows) -> np.ndarray:
    """Return `row_max_abs` as a numpy array, computed once for each jax array."""
    with jax.ensure_compile_time_eval():
        return np.asarray(row_max_abs(rows))

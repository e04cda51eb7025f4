"""Queries in 16 bits, in the order in which the integer kernels read them."""

from typing import NamedTuple

import jax.numpy as jnp

from hire.ops.cpu.dots import LANES_16, integer_lanes
from hire.ops.quantization import QuantizedRows
from hire.types import Array, Float, Int, Queries

# Columns that one step of a kernel reads at 8 and at 4 bits, at least.
COLUMNS_PER_STEP = {8: LANES_16[0], 4: 4 * LANES_16[0]}
# A wider row would leave a query fewer than 11 bits.
MAX_WIDTH = 8192


class RoundedQueries(NamedTuple):
    """Queries as integers times a step.

    Attributes:
        integers: The integers, int32 `(b, d)`.
        step: The step of each query, float32 `(b,)`.
        planes: The integers in the order of the kernel, int16 `(b, _)`.
        storage: Storage of the rows for the kernel, see `hire.ops.cpu.dots`.
    """

    integers: Int[Array, "b d"]
    step: Float[Array, " b"]
    planes: Int[Array, "b _"]
    storage: str


def is_supported(rows: QuantizedRows) -> bool:
    """Whether the integer kernels support rows of this width."""
    return COLUMNS_PER_STEP[rows.bits] <= rows.width <= MAX_WIDTH


def lanes_for(rows: QuantizedRows) -> int:
    """Return the entries of the widest vectors that read no more of a row twice than others do."""
    items, items_per_lane = rows.codes.shape[1], 1 if rows.bits == 8 else 2

    def items_read(lanes: int) -> int:
        return -(-items // (lanes * items_per_lane)) * lanes * items_per_lane

    return max(lanes for lanes in LANES_16 if items_read(lanes) == items_read(LANES_16[0]))


def round_queries(x: Queries, rows: QuantizedRows) -> RoundedQueries:
    """Round queries to integers of up to 16 bits.

    The sum of d products with codes fits in 32 bits: the largest integer is at most
    (2^31 - 1) / (d * 127), and at most 32767. An entry is off by at most half a step, and
    by the rounding of the division: 0.505 steps. So a score is off by at most that times the sum of
    the row's magnitudes.

    Args:
        x: Queries `(b, d)`.
        rows: Quantized rows `(m, d)` that they will meet.

    Returns:
        The rounded queries.
    """
    x = jnp.asarray(x).astype(jnp.float32)
    largest_code = 2 ** (rows.bits - 1) - 1
    most = min(32767, (2**31 - 1) // (rows.width * (largest_code + 1)))
    largest = jnp.max(jnp.abs(x), axis=1)
    step = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1.0) / most
    integers = jnp.clip(jnp.round(x / step[:, None]), -most, most).astype(jnp.int32)
    order = order_8_bits if rows.bits == 8 else order_4_bits
    storage = f"int{rows.bits}_by_{lanes_for(rows)}_int16"
    planes = order(integers, integer_lanes(storage)).astype(jnp.int16)
    return RoundedQueries(integers, step, planes, storage)


def steps_of(halves: Int[Array, "b h"], size: int) -> Int[Array, "b _ size"]:
    """Split columns into steps. The last one ends with the row and is 0 where others have been."""
    rest = halves.shape[1] % size
    complete, last = halves[:, : halves.shape[1] - rest], halves[:, halves.shape[1] - rest :]
    if rest:
        last = jnp.pad(last, ((0, 0), (size - rest, 0)))
    return jnp.concatenate([complete, last], axis=1).reshape(len(halves), -1, size)


def order_8_bits(integers: Int[Array, "b d"], lanes: int) -> Int[Array, "b _"]:
    """Order queries for codes of 8 bits: the columns, and those of the last step again."""
    return steps_of(integers, lanes).reshape(len(integers), -1)


def order_4_bits(integers: Int[Array, "b d"], lanes: int) -> Int[Array, "b _"]:
    """Order queries for codes of 4 bits.

    A step reads as many pairs of bytes as there are lanes, that is four columns each: of the lower
    byte the first and the second half's, then of the upper byte.
    """
    b, d = integers.shape
    padded = jnp.pad(integers, ((0, 0), (0, d % 2)))
    halves = jnp.split(padded, 2, axis=1)
    pairs = [steps_of(half, 2 * lanes).reshape(b, -1, lanes, 2) for half in halves]
    # (b, steps, lanes, 2 bytes, 2 halves) -> a plane of lanes for each byte and half
    stacked = jnp.stack(pairs, axis=-1)
    return stacked.transpose(0, 1, 3, 4, 2).reshape(b, -1)

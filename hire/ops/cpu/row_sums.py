"""Weighted sums of all rows, as one kernel for a CPU.

The rows are read once for all queries and not copied. The reference is
`hire.ops.row_products.plain_row_sum`.
"""

from collections.abc import Callable
from functools import cache

import jax.numpy as jnp

from hire.ops.cpu import ffi
from hire.ops.cpu.dots import ITEM_BYTES, ROWS_OF_SUM, add_floats, add_rows
from hire.ops.cpu.numba_functions import function
from hire.ops.cpu.row_scores import TYPE_OF_CODES, TYPE_OF_ROWS, kernel_operands
from hire.ops.quantization import QuantizedRows, storage_of
from hire.types import Array, Float, Rows

# Threads add rows to sums of their own. So many sums share the work of a call; fewer if they hold
# many queries, since all sums are written and read once more.
PARTS, MIN_PARTS = 8, 4
# Columns of a few rows that are added to the sums of all queries while they are in cache.
COLUMNS_PER_TILE = 512
# Buffers of the kernel. PART_SUMS is scratch.
WEIGHTS, ROWS = range(2)
OUT, PART_SUMS = range(2)


def num_parts(batch: int) -> int:
    """Return the number of sums that share the work of a call."""
    return max(MIN_PARTS, PARTS // max(1, batch))


def sums(weights: Float[Array, "b m"], rows: Rows | QuantizedRows) -> Float[Array, "b d"]:
    """Return the weighted sums of all rows.

    Args:
        weights: Weights `(b, m)`, used as float32.
        rows: Rows `(m, d)` of float32 or bfloat16, or quantized rows.

    Returns:
        Sums, float32 `(b, d)`.
    """
    storage, (entries, scale) = storage_of(rows), kernel_operands(rows)
    weights = jnp.asarray(weights).astype(jnp.float32)
    if storage in TYPE_OF_CODES:
        weights = weights * scale[None]
    width = entries.shape[1] * (2 if storage == "int4" else 1)
    out, _ = kernel(storage)(
        weights,
        entries,
        results=[(len(weights), width), (num_parts(len(weights)), len(weights), width)],
    )
    return out[:, : rows.shape[1]]


@cache
def kernel(storage: str) -> ffi.Kernel:
    """Return the kernel for a storage of the rows."""
    add, item_bytes = add_rows(storage), ITEM_BYTES[storage]
    columns_per_item = 2 if storage == "int4" else 1

    @function
    def fits(frame):
        weights, rows = ffi.argument(frame, WEIGHTS), ffi.argument(frame, ROWS)
        out, parts = ffi.result(frame, OUT), ffi.result(frame, PART_SUMS)
        return (
            ffi.size(weights, 1) == ffi.size(rows, 0)
            and ffi.size(out, 0) == ffi.size(weights, 0)
            and ffi.size(out, 1) == columns_per_item * ffi.size(rows, 1)
            and ffi.size(parts, 0) > 0
            and ffi.size(parts, 1) == ffi.size(out, 0)
            and ffi.size(parts, 2) == ffi.size(out, 1)
        )

    @function
    def add_tile(frame, part, row, count, first, items):
        """Add a tile of columns of a few rows to the sums of all queries."""
        weights, rows = ffi.argument(frame, WEIGHTS), ffi.argument(frame, ROWS)
        b, m, columns = ffi.size(weights, 0), ffi.size(rows, 0), ffi.size(ffi.result(frame, OUT), 1)
        stride = ffi.size(rows, 1) * item_bytes
        for query in range(b):
            add(
                ffi.data(rows) + row * stride + first * item_bytes,
                stride,
                count,
                items,
                ffi.data(weights) + 4 * (query * m + row),
                ffi.data(ffi.result(frame, PART_SUMS)) + 4 * ((part * b + query) * columns + first),
                4 * ffi.size(rows, 1),
                ROWS_OF_SUM * stride if query == 0 else 0,
            )

    @function
    def add_part(frame, start, stop):
        rows, part_sums = ffi.argument(frame, ROWS), ffi.floats_3d(ffi.result(frame, PART_SUMS))
        m, items, parts = ffi.size(rows, 0), ffi.size(rows, 1), part_sums.shape[0]
        for part in range(start, stop):
            part_sums[part] = 0
            last_row = m * (part + 1) // parts
            for row in range(m * part // parts, last_row, ROWS_OF_SUM):
                count = min(ROWS_OF_SUM, last_row - row)
                for first in range(0, items, COLUMNS_PER_TILE):
                    add_tile(frame, part, row, count, first, min(COLUMNS_PER_TILE, items - first))

    return ffi.Kernel(
        f"hire_row_sums_{storage}",
        [("float32", 2), (TYPE_OF_ROWS[storage], 2)],
        [("float32", 2), ("float32", 3)],
        fits,
        [ffi.parallel_loop(count_parts, add_part), parts_loop(OUT, PART_SUMS)],
    )


@function
def count_parts(frame):
    """Return the number of parts of the rows."""
    return ffi.size(ffi.result(frame, PART_SUMS), 0)


def parts_loop(out: int, part_sums: int) -> Callable:
    """Return the loop that adds the sums of all parts.

    Args:
        out: Place among the results of the sums `(b, d)`.
        part_sums: Place among the results of the sums of each part `(parts, b, d)`.
    """

    @function
    def num_tiles(frame):
        return -(-ffi.size(ffi.result(frame, out), 1) // COLUMNS_PER_TILE)

    @function
    def add_parts(frame, start, stop):
        total = ffi.floats_2d(ffi.result(frame, out))
        b, columns = total.shape
        sums, parts = ffi.result(frame, part_sums), ffi.size(ffi.result(frame, part_sums), 0)
        first = start * COLUMNS_PER_TILE
        count = min(stop * COLUMNS_PER_TILE, columns) - first
        for query in range(b):
            total[query, first : first + count] = 0
            target = ffi.data(ffi.result(frame, out)) + 4 * (query * columns + first)
            for part in range(parts):
                source = ffi.data(sums) + 4 * ((part * b + query) * columns + first)
                add_floats(source, target, count)

    return ffi.parallel_loop(num_tiles, add_parts)

"""Products of queries with all rows, or with the rows at given indices, as kernels for a CPU.

The second kernel gathers, multiplies and selects in one call: no row is copied. The references are
`hire.ops.row_products.row_scores` and `row_scores_at`, followed by `exact_top_k`.
"""

from functools import cache

import jax.numpy as jnp

from hire.ops.cpu import ffi
from hire.ops.cpu.dots import ITEM_BYTES, bytes_ahead, is_integer, score_rows, score_rows_at
from hire.ops.cpu.numba_functions import function
from hire.ops.cpu.queries import round_queries
from hire.ops.cpu.selection import sort_best
from hire.ops.quantization import QuantizedRows, storage_of
from hire.ops.top_k import TopK
from hire.types import Array, Float, Indices, Queries, Rows

# Rows that a thread scores for all queries before it goes on.
ROWS_PER_TILE = 64
# Candidates that a thread scores before it looks for more work.
CANDIDATES_PER_TILE = 32
TYPE_OF_CODES = {"int8": "int8", "int4": "uint8"}


def is_supported(rows: Rows | QuantizedRows) -> bool:
    """Whether the kernels support rows of this type, for float32 queries."""
    is_known = isinstance(rows, QuantizedRows) or storage_of(rows) in ("float32", "bfloat16")
    return len(rows.shape) == 2 and min(rows.shape) > 0 and is_known


TYPE_OF_ROWS = TYPE_OF_CODES | {"float32": "float32", "bfloat16": "bfloat16"}


def pad_query(x: Queries, rows: Rows | QuantizedRows) -> Float[Array, "b _"]:
    """Return float32 queries with as many columns as the codes have."""
    x = jnp.asarray(x).astype(jnp.float32)
    return jnp.pad(x, ((0, 0), (0, 1))) if storage_of(rows) == "int4" and x.shape[1] % 2 else x


def kernel_operands(rows: Rows | QuantizedRows) -> tuple[Array, Array]:
    """Return what the kernels read: entries or codes, and scales (none for rows of floats)."""
    if isinstance(rows, QuantizedRows):
        return rows.codes, rows.scale
    return jnp.asarray(rows), jnp.zeros(0, jnp.float32)


def scores(
    x: Queries, rows: Rows | QuantizedRows, *, round_to_int16: bool = False
) -> Float[Array, "b m"]:
    """Return the scores of all rows. They are read once for all queries.

    Args:
        x: Queries `(b, d)`, used as float32.
        rows: Rows `(m, d)` of float32 or bfloat16, or quantized rows.
        round_to_int16: Whether `round_queries` rounds queries that meet quantized rows, so that the
            sums are of integers.

    Returns:
        Scores, float32 `(b, m)`.
    """
    storage, entries_and_scale = storage_of(rows), kernel_operands(rows)
    if not round_to_int16:
        [products] = scores_kernel(storage)(
            pad_query(x, rows), *entries_and_scale, results=[(len(x), rows.shape[0])]
        )
        return products
    rounded_queries = round_queries(x, rows)
    [products] = scores_kernel(rounded_queries.storage)(
        rounded_queries.planes, *entries_and_scale, results=[(len(x), rows.shape[0])]
    )
    return products * rounded_queries.step[:, None]


@cache
def scores_kernel(storage: str) -> ffi.Kernel:
    """Return the kernel of `scores` for a storage."""
    name, query_type = storage.partition("_by_")[0], "float32"
    if is_integer(storage):
        query_type = "int16"
    query_bytes = 2 if is_integer(storage) else 4
    read_rows = ffi.array_reader(ffi.DTYPES[TYPE_OF_ROWS[name]][1], 2)
    score, item_bytes, is_scaled = score_rows(storage), ITEM_BYTES[storage], name in TYPE_OF_CODES

    @function
    def fits(frame):
        x, rows, scale = ffi.argument(frame, 0), ffi.argument(frame, 1), ffi.argument(frame, 2)
        out = ffi.result(frame, 0)
        return (
            ffi.size(scale, 0) == (ffi.size(rows, 0) if is_scaled else 0)
            and ffi.size(out, 0) == ffi.size(x, 0)
            and ffi.size(out, 1) == ffi.size(rows, 0)
        )

    @function
    def num_tiles(frame):
        return -(-ffi.size(ffi.argument(frame, 1), 0) // ROWS_PER_TILE)

    @function
    def score_tiles(frame, start, stop):
        x, rows = ffi.argument(frame, 0), ffi.argument(frame, 1)
        m, items = read_rows(rows).shape
        b, columns = ffi.size(x, 0), ffi.size(x, 1)
        scale, out = ffi.floats_1d(ffi.argument(frame, 2)), ffi.floats_2d(ffi.result(frame, 0))
        out_address, row_bytes = ffi.data(ffi.result(frame, 0)), items * item_bytes
        for tile in range(start, stop):
            first = tile * ROWS_PER_TILE
            count = min(ROWS_PER_TILE, m - first)
            score(
                ffi.data(rows) + first * row_bytes,
                row_bytes,
                count,
                items,
                ffi.data(x),
                columns * query_bytes,
                b,
                out_address + 4 * first,
                4 * m,
                bytes_ahead(row_bytes),
            )
            if is_scaled:
                for query in range(b):
                    for row in range(first, first + count):
                        out[query, row] *= scale[row]

    return ffi.Kernel(
        f"hire_scores_{storage}",
        [(query_type, 2), (TYPE_OF_ROWS[name], 2), ("float32", 1)],
        [("float32", 2)],
        fits,
        [ffi.parallel_loop(num_tiles, score_tiles)],
    )


def scores_at(x: Queries, rows: Rows | QuantizedRows, indices: Indices) -> Float[Array, "b c"]:
    """Return the scores of the rows at given indices.

    Args:
        x: Queries `(b, d)`, used as float32.
        rows: Rows `(m, d)` of float32 or bfloat16, or quantized rows.
        indices: Indices `(b, c)`. One beyond the rows stands for the nearest row, a negative one
            counts from the end.

    Returns:
        Scores, float32 `(b, c)`.
    """
    return scores_and_top_k(x, rows, indices, 0)[0]


def top_k_at(x: Queries, rows: Rows | QuantizedRows, indices: Indices, k: int) -> TopK:
    """Return the best k of the rows at given indices.

    Args:
        x: Queries `(b, d)`, used as float32.
        rows: Rows `(m, d)`, as in `scores_at`.
        indices: Indices `(b, c)`.
        k: Number of rows to return, at most c.

    Returns:
        The scores, float32 `(b, k)`, and the indices, int32 `(b, k)`, best first. Of equal scores
        the one with the lower index comes first.
    """
    _, values, top_indices, _ = scores_and_top_k(x, rows, indices, k)
    return TopK(values, top_indices)


def scores_and_top_k(
    x: Queries, rows: Rows | QuantizedRows, indices: Indices, k: int
) -> list[Array]:
    """Return the scores at indices `(b, c)`, the best k, their indices, and scratch."""
    (b, c), storage = indices.shape, storage_of(rows)
    return search_kernel(storage)(
        pad_query(x, rows),
        *kernel_operands(rows),
        jnp.asarray(indices).astype(jnp.int32),
        results=[(b, c), (b, k), (b, k), (b, k)],
    )


@cache
def search_kernel(storage: str) -> ffi.Kernel:
    """Return the kernel of `scores_at` and `top_k_at` for a storage."""
    read_rows = ffi.array_reader(ffi.DTYPES[TYPE_OF_ROWS[storage]][1], 2)
    score, item_bytes = score_rows_at(storage), ITEM_BYTES[storage]
    is_scaled = storage in TYPE_OF_CODES

    @function
    def fits(frame):
        x, rows, scale = ffi.argument(frame, 0), ffi.argument(frame, 1), ffi.argument(frame, 2)
        indices, out = ffi.argument(frame, 3), ffi.result(frame, 0)
        k = ffi.size(ffi.result(frame, 1), 1)
        matches = ffi.size(scale, 0) == (ffi.size(rows, 0) if is_scaled else 0)
        for buffer in (indices, out, ffi.result(frame, 1), ffi.result(frame, 2)):
            matches = matches and ffi.size(buffer, 0) == ffi.size(x, 0)
        matches = matches and ffi.size(ffi.result(frame, 3), 0) == ffi.size(x, 0)
        for place in (2, 3):
            matches = matches and ffi.size(ffi.result(frame, place), 1) == k
        return (
            matches
            and ffi.size(out, 1) == ffi.size(indices, 1)
            and k <= ffi.size(out, 1)
            and ffi.size(rows, 0) > 0
        )

    @function
    def num_tiles(frame):
        indices = ffi.argument(frame, 3)
        return ffi.size(indices, 0) * -(-ffi.size(indices, 1) // CANDIDATES_PER_TILE)

    @function
    def score_tiles(frame, start, stop):
        x, rows = ffi.argument(frame, 0), ffi.argument(frame, 1)
        m, items = read_rows(rows).shape
        columns = ffi.size(x, 1)
        scale, indices = ffi.floats_1d(ffi.argument(frame, 2)), ffi.ints_2d(ffi.argument(frame, 3))
        out = ffi.floats_2d(ffi.result(frame, 0))
        c = indices.shape[1]
        tiles = -(-c // CANDIDATES_PER_TILE)
        for tile in range(start, stop):
            query, first = tile // tiles, tile % tiles * CANDIDATES_PER_TILE
            last = min(first + CANDIDATES_PER_TILE, c)
            score(
                ffi.data(rows),
                items * item_bytes,
                m,
                items,
                indices[query],
                first,
                last,
                ffi.data(x) + 4 * query * columns,
                ffi.data(ffi.result(frame, 0)) + 4 * query * c,
            )
            if is_scaled:
                for place in range(first, last):
                    index = indices[query, place]
                    index = index + m if index < 0 else index
                    out[query, place] *= scale[min(max(index, 0), m - 1)]

    @function
    def num_queries(frame):
        return ffi.size(ffi.argument(frame, 0), 0) if ffi.size(ffi.result(frame, 1), 1) else 0

    @function
    def select(frame, start, stop):
        indices, scores = ffi.ints_2d(ffi.argument(frame, 3)), ffi.ints_2d(ffi.result(frame, 0))
        values, top_indices = ffi.ints_2d(ffi.result(frame, 1)), ffi.ints_2d(ffi.result(frame, 2))
        keys = ffi.ints_2d(ffi.result(frame, 3))
        for query in range(start, stop):
            sort_best(scores[query], indices[query], values[query], top_indices[query], keys[query])

    return ffi.Kernel(
        f"hire_search_{storage}",
        [("float32", 2), (TYPE_OF_ROWS[storage], 2), ("float32", 1), ("int32", 2)],
        [("float32", 2), ("float32", 2), ("int32", 2), ("int32", 2)],
        fits,
        [ffi.parallel_loop(num_tiles, score_tiles), ffi.parallel_loop(num_queries, select)],
    )

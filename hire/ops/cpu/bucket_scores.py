"""Nomination from quantized rows, as one kernel for a CPU.

Scores of the rows and the first stage of the two-stage top-k run in one pass: a thread scores the
rows of some buckets and keeps the best of each, so the scores stay in its cache. The second stage
selects the candidates among the maxima. The reference is
`hire.ops.nomination.nominate_from_scores` of `scores_reference`.
"""

from collections.abc import Callable
from functools import cache

import jax.numpy as jnp
import numpy as np
from numba import carray

from hire.ops.cpu import ffi
from hire.ops.cpu.dots import ITEM_BYTES, bytes_ahead, score_rows
from hire.ops.cpu.numba_functions import function
from hire.ops.cpu.queries import round_queries
from hire.ops.cpu.selection import DIGITS, keep_maxima, kth_largest
from hire.ops.quantization import QuantizedRows, unpack_codes
from hire.ops.sortable import EMPTY
from hire.types import Array, Float, Indices, Queries

# Buckets whose rows are scored together. Their rows of one position are one long read: each start
# of another one costs about a microsecond.
MIN_BUCKETS_PER_TILE, MAX_BUCKETS_PER_TILE = 256, 2048
TILES_PER_THREAD = 2
# Buffers of the kernel. SCORES and COUNTS are scratch.
QUERIES, CODES, SCALE = range(3)
INDICES, MAXIMA, SCORES, COUNTS = range(4)


def scores_reference(x: Queries, rows: QuantizedRows) -> Float[Array, "b m"]:
    """Return the scores of all rows in plain JAX, up to a positive factor per query.

    Args:
        x: Queries `(b, d)`.
        rows: Quantized rows `(m, d)`.

    Returns:
        Scores, float32 `(b, m)`, of the queries that `round_queries` rounds.
    """
    integers = round_queries(x, rows).integers
    codes = unpack_codes(rows.codes, rows.bits, rows.width).astype(jnp.int32)
    return (integers @ codes.T).astype(jnp.float32) * rows.scale[None]


def nominate(
    x: Queries, rows: QuantizedRows, candidates: int, *, buckets: int, per_bucket: int
) -> Indices:
    """Nominate the rows with the best scores among the best of every bucket.

    Args:
        x: Queries `(b, d)`.
        rows: Quantized rows `(m, d)`; `hire.ops.cpu.queries.is_supported` says which.
        candidates: Number of candidates, k', at most `buckets * per_bucket`.
        buckets: Number of buckets; row i is in bucket i mod `buckets`.
        per_bucket: Rows that each bucket keeps.

    Returns:
        Row indices, int32 `(b, k')`, in no order.
    """
    queries = round_queries(x, rows)
    b = len(queries.planes)
    indices, *_ = kernel(queries.storage)(
        queries.planes,
        rows.codes,
        rows.scale,
        results=[(b, candidates), (b, per_bucket, buckets), (b, buckets), (b, DIGITS)],
    )
    return indices


@cache
def kernel(storage: str) -> ffi.Kernel:
    """Return the kernel for a storage of the rows."""
    codes = "int8" if storage.startswith("int8") else "uint8"
    return ffi.Kernel(
        f"hire_nominate_{storage}",
        [("int16", 2), (codes, 2), ("float32", 1)],
        [("int32", 2), ("int32", 3), ("float32", 2), ("int32", 2)],
        fits,
        [score_loop(storage), ffi.parallel_loop(num_queries, select)],
    )


@function
def fits(frame):
    """Check the shapes of the kernel's buffers."""
    b, rows = ffi.size(ffi.argument(frame, QUERIES), 0), ffi.size(ffi.argument(frame, CODES), 0)
    maxima, indices = ffi.result(frame, MAXIMA), ffi.result(frame, INDICES)
    scores, counts = ffi.result(frame, SCORES), ffi.result(frame, COUNTS)
    buckets = ffi.size(maxima, 2)
    matches = ffi.size(ffi.argument(frame, SCALE), 0) == rows
    for buffer in (maxima, indices, scores, counts):
        matches = matches and ffi.size(buffer, 0) == b
    matches = matches and 0 < buckets <= rows and ffi.size(scores, 1) == buckets
    matches = matches and ffi.size(counts, 1) == DIGITS
    return matches and 0 < ffi.size(indices, 1) <= buckets * ffi.size(maxima, 1)


@function
def position_bits(frame):
    """Return the mask of a key's bits that hold the position, `hire.ops.sortable.index_mask`."""
    rows, buckets = (
        ffi.size(ffi.argument(frame, CODES), 0),
        ffi.size(ffi.result(frame, MAXIMA), 2),
    )
    mask = 1
    while mask * buckets < rows:
        mask *= 2
    return np.int32(mask - 1)


@function
def buckets_per_tile(frame):
    """Return the number of buckets of a tile."""
    buckets = ffi.size(ffi.result(frame, MAXIMA), 2)
    even_share = -(-buckets // (TILES_PER_THREAD * ffi.num_threads(frame)))
    return min(max(even_share, MIN_BUCKETS_PER_TILE), MAX_BUCKETS_PER_TILE)


@function
def num_tiles(frame):
    """Return the number of tiles of buckets."""
    return -(-ffi.size(ffi.result(frame, MAXIMA), 2) // buckets_per_tile(frame))


def score_loop(storage: str) -> Callable:
    """Return the loop that scores rows and keeps the best of each bucket."""
    score, item_bytes = score_rows(storage), ITEM_BYTES[storage]

    @function
    def score_tiles(frame, start, stop):
        queries, codes = ffi.argument(frame, QUERIES), ffi.argument(frame, CODES)
        maxima = ffi.ints_3d(ffi.result(frame, MAXIMA))
        scores_address = ffi.data(ffi.result(frame, SCORES))
        b, per_bucket, buckets = maxima.shape
        m, items = ffi.size(codes, 0), ffi.size(codes, 1)
        mask, tile_size = position_bits(frame), buckets_per_tile(frame)
        for tile in range(start, stop):
            first = tile * tile_size
            last = min(first + tile_size, buckets)
            for query in range(b):
                for rank in range(per_bucket):
                    for bucket in range(first, last):
                        maxima[query, rank, bucket] = EMPTY
            position = 0
            while position * buckets + first < m:
                row = position * buckets + first
                count = min(last - first, m - row)
                score(
                    ffi.data(codes) + row * items * item_bytes,
                    items * item_bytes,
                    count,
                    items,
                    ffi.data(queries),
                    2 * ffi.size(queries, 1),
                    b,
                    scores_address + 4 * first,
                    4 * buckets,
                    bytes_ahead(items * item_bytes),
                )
                for query in range(b):
                    keep_maxima(
                        scores_address + 4 * (query * buckets + first),
                        ffi.data(ffi.argument(frame, SCALE)) + 4 * row,
                        count,
                        ffi.data(ffi.result(frame, MAXIMA))
                        + 4 * (query * per_bucket * buckets + first),
                        4 * buckets,
                        per_bucket,
                        np.int32(mask - position),
                        np.int32(~mask),
                    )
                position += 1

    return ffi.parallel_loop(num_tiles, score_tiles)


@function
def num_queries(frame):
    """Return the number of queries."""
    return ffi.size(ffi.argument(frame, QUERIES), 0)


@function
def select(frame, start, stop):
    """Select the candidates of some queries among the maxima of all buckets."""
    all_indices = ffi.ints_2d(ffi.result(frame, INDICES))
    maxima, counts = ffi.result(frame, MAXIMA), ffi.ints_2d(ffi.result(frame, COUNTS))
    mask, buckets = position_bits(frame), ffi.size(maxima, 2)
    num_keys = ffi.size(maxima, 1) * buckets
    k = all_indices.shape[1]
    for query in range(start, stop):
        address = ffi.data(maxima) + 4 * query * num_keys
        keys = carray(ffi.as_int32(address), (num_keys,))
        threshold, above = kth_largest(keys, k, counts[query])
        ties, filled = k - above, 0
        for i in range(len(keys)):
            key = keys[i]
            if key < threshold:
                continue
            if key == threshold:
                if ties == 0:
                    continue
                ties -= 1
            # A bucket with fewer rows than maxima leaves EMPTY, which stands for its first row.
            position = mask - (key & mask) if key != EMPTY else 0
            all_indices[query, filled] = position * buckets + i % buckets
            filled += 1

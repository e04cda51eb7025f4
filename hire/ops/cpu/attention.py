"""Attention of one new token of each text over a cache, as one kernel for a CPU.

The positions of a text are split into parts, which threads take up: a part has the largest score,
the sum of the exponentials and the weighted sum of its values. Then the parts of a text are added
(arXiv 2112.05682). Positions outside the mask are not read. The reference is
`hire.models.attention.attend`.
"""

import math
from collections.abc import Callable
from functools import cache

import jax.numpy as jnp
import numpy as np

from hire.ops.cpu import ffi
from hire.ops.cpu.dots import ITEM_BYTES, add_rows, bytes_ahead, score_rows
from hire.ops.cpu.exponentials import exponentials
from hire.ops.cpu.numba_functions import function
from hire.types import Array, Bool, Float

# Positions of a part, and positions of which the values are added for all heads while in cache.
POSITIONS_PER_PART, POSITIONS_PER_BLOCK = 128, 8
STORAGES = ("float32", "bfloat16")
# Buffers of the kernel. All results but OUT are scratch.
QUERIES, KEYS, VALUES, MASK, NEW_KEYS, NEW_VALUES = range(6)
OUT, SCORES, PART_SUMS, PART_MAXIMA, PART_TOTALS = range(5)


def is_supported(keys: Float[Array, "b s n e"], values: Float[Array, "b s n e"]) -> bool:
    """Whether the kernel supports a cache of this type."""
    return str(keys.dtype) in STORAGES and keys.dtype == values.dtype and min(keys.shape) > 0


def attend(
    queries: Float[Array, "b h e"],
    keys: Float[Array, "b s n e"],
    values: Float[Array, "b s n e"],
    mask: Bool[Array, " s"],
    new_keys: Float[Array, "b n e"],
    new_values: Float[Array, "b n e"],
) -> Float[Array, "b h e"]:
    """Return the attention of one token of each text to the cached tokens and to itself.

    Args:
        queries: Queries `(b, h, e)`, used as float32. Consecutive heads share a key/value head.
        keys: Cached keys `(b, s, n, e)`, float32 or bfloat16.
        values: Cached values `(b, s, n, e)`, stored as the keys.
        mask: Positions of the cache that take part `(s,)`.
        new_keys: Keys of the tokens themselves `(b, n, e)`, used as float32.
        new_values: Values of the tokens themselves `(b, n, e)`, used as float32.

    Returns:
        The attention output, float32 `(b, h, e)`.
    """
    (b, h, e), (_, s, n, _) = queries.shape, keys.shape
    parts = -(-s // POSITIONS_PER_PART)
    out, *_ = kernel(str(keys.dtype))(
        queries.astype(jnp.float32) * np.float32(1 / math.sqrt(e)),
        keys.reshape(b, s, n * e),
        values.reshape(b, s, n * e),
        mask.astype(jnp.int32),
        new_keys.astype(jnp.float32),
        new_values.astype(jnp.float32),
        results=[(b, h, e), (b, h, s + 1), (b * parts, h, e), (b, parts, h), (b, parts, h)],
    )
    return out


@cache
def kernel(storage: str) -> ffi.Kernel:
    """Return the kernel for a storage of the cache."""
    floats = ("float32", 3)
    return ffi.Kernel(
        f"hire_attention_{storage}",
        [floats, (storage, 3), (storage, 3), ("int32", 1), floats, floats],
        [floats] * 5,
        fits,
        [part_loop(storage), ffi.parallel_loop(num_texts_and_heads, add_parts)],
    )


@function
def fits(frame):
    """Check the shapes of the kernel's buffers."""
    queries, keys, values = (
        ffi.argument(frame, QUERIES),
        ffi.argument(frame, KEYS),
        ffi.argument(frame, VALUES),
    )
    new_keys, out = ffi.argument(frame, NEW_KEYS), ffi.result(frame, OUT)
    b, h, e = ffi.size(queries, 0), ffi.size(queries, 1), ffi.size(queries, 2)
    s, n, parts = ffi.size(keys, 1), ffi.size(new_keys, 1), num_parts(frame)
    matches = e > 0 and n > 0 and h % n == 0 and s > 0 and parts > 0
    matches = matches and ffi.size(keys, 0) == b and ffi.size(keys, 2) == n * e
    matches = matches and ffi.size(ffi.argument(frame, MASK), 0) == s
    for axis in range(3):
        matches = matches and ffi.size(values, axis) == ffi.size(keys, axis)
        matches = matches and ffi.size(out, axis) == ffi.size(queries, axis)
        new_values = ffi.argument(frame, NEW_VALUES)
        matches = matches and ffi.size(new_values, axis) == ffi.size(new_keys, axis)
    matches = matches and ffi.size(new_keys, 0) == b and ffi.size(new_keys, 2) == e
    scores, sums = ffi.result(frame, SCORES), ffi.result(frame, PART_SUMS)
    matches = matches and ffi.size(scores, 0) == b and ffi.size(scores, 1) == h
    matches = matches and ffi.size(scores, 2) == s + 1
    matches = matches and ffi.size(sums, 0) == b * parts
    matches = matches and ffi.size(sums, 1) == h and ffi.size(sums, 2) == e
    for index in (PART_MAXIMA, PART_TOTALS):
        part = ffi.result(frame, index)
        matches = matches and ffi.size(part, 0) == b and ffi.size(part, 1) == parts
        matches = matches and ffi.size(part, 2) == h
    return matches


@function
def num_parts(frame):
    """Return the number of parts of a text."""
    return ffi.size(ffi.result(frame, PART_MAXIMA), 1)


@function
def num_units(frame):
    """Return the number of parts of all texts and key/value heads."""
    new_keys = ffi.argument(frame, NEW_KEYS)
    return ffi.size(new_keys, 0) * ffi.size(new_keys, 1) * num_parts(frame)


@function
def num_texts_and_heads(frame):
    """Return the number of texts times key/value heads."""
    new_keys = ffi.argument(frame, NEW_KEYS)
    return ffi.size(new_keys, 0) * ffi.size(new_keys, 1)


@function
def takes_part(mask, start, stop):
    """Whether a position of a range is in the mask."""
    count = 0
    for position in range(start, stop):
        count += mask[position]
    return count > 0


@function
def largest(values):
    """Return the largest value. NaN is passed over."""
    result = np.float32(-np.inf)
    for value in values:
        result = value if value > result else result
    return result


def part_loop(storage: str) -> Callable:
    """Return the loop that attends to the parts of all texts."""
    score, add, item_bytes = score_rows(storage), add_rows(storage), ITEM_BYTES[storage]

    @function
    def score_part(frame, text, head, first, last):
        """Write the scores of the positions of a part, -inf for those outside the mask."""
        queries, keys = ffi.argument(frame, QUERIES), ffi.argument(frame, KEYS)
        mask, scores = ffi.ints_1d(ffi.argument(frame, MASK)), ffi.result(frame, SCORES)
        h, e, s = ffi.size(queries, 1), ffi.size(queries, 2), ffi.size(keys, 1)
        stride = ffi.size(keys, 2) * item_bytes
        group = h * e // ffi.size(keys, 2)
        first_head, all_scores = head * group, ffi.floats_3d(scores)
        for start in range(first, last, POSITIONS_PER_BLOCK):
            count = min(POSITIONS_PER_BLOCK, last - start)
            if takes_part(mask, start, start + count):
                score(
                    ffi.data(keys) + (text * s + start) * stride + head * e * item_bytes,
                    stride,
                    count,
                    e,
                    ffi.data(queries) + 4 * (text * h + first_head) * e,
                    4 * e,
                    group,
                    ffi.data(scores) + 4 * ((text * h + first_head) * (s + 1) + start),
                    4 * (s + 1),
                    bytes_ahead(stride) if start + count + POSITIONS_PER_BLOCK < last else 0,
                )
            for query in range(first_head, first_head + group):
                for i in range(start, start + count):
                    if mask[i] == 0:
                        all_scores[text, query, i] = -np.inf

    @function
    def add_values(frame, text, head, first, last, unit):
        """Add the values of the positions of a part, by the weights among the scores."""
        queries, values = ffi.argument(frame, QUERIES), ffi.argument(frame, VALUES)
        mask, scores = ffi.ints_1d(ffi.argument(frame, MASK)), ffi.result(frame, SCORES)
        h, e, s = ffi.size(queries, 1), ffi.size(queries, 2), ffi.size(values, 1)
        stride = ffi.size(values, 2) * item_bytes
        group = h * e // ffi.size(values, 2)
        for start in range(first, last, POSITIONS_PER_BLOCK):
            count = min(POSITIONS_PER_BLOCK, last - start)
            if takes_part(mask, start, start + count):
                for query in range(head * group, (head + 1) * group):
                    add(
                        ffi.data(values) + (text * s + start) * stride + head * e * item_bytes,
                        stride,
                        count,
                        e,
                        ffi.data(scores) + 4 * ((text * h + query) * (s + 1) + start),
                        ffi.data(ffi.result(frame, PART_SUMS)) + 4 * (unit * h + query) * e,
                        0,
                        POSITIONS_PER_BLOCK * stride if query == head * group else 0,
                    )

    @function
    def attend_to_parts(frame, start, stop):
        parts, n = num_parts(frame), ffi.size(ffi.argument(frame, NEW_KEYS), 1)
        s, h = ffi.size(ffi.argument(frame, KEYS), 1), ffi.size(ffi.argument(frame, QUERIES), 1)
        scores, sums = (
            ffi.floats_3d(ffi.result(frame, SCORES)),
            ffi.floats_3d(ffi.result(frame, PART_SUMS)),
        )
        maxima, totals = (
            ffi.floats_3d(ffi.result(frame, PART_MAXIMA)),
            ffi.floats_3d(ffi.result(frame, PART_TOTALS)),
        )
        for unit in range(start, stop):
            text, part, head = unit // (n * parts), unit // n % parts, unit % n
            first, last = s * part // parts, s * (part + 1) // parts
            score_part(frame, text, head, first, last)
            for query in range(head * (h // n), (head + 1) * (h // n)):
                weights = scores[text, query, first:last]
                maximum = largest(weights)
                maxima[text, part, query] = maximum
                sums[text * parts + part, query] = 0
                totals[text, part, query] = exponentials(
                    ffi.data(ffi.result(frame, SCORES))
                    + 4 * ((text * h + query) * (s + 1) + first),
                    last - first,
                    maximum if maximum > -np.inf else np.float32(0),
                )
            add_values(frame, text, head, first, last, text * parts + part)

    return ffi.parallel_loop(num_units, attend_to_parts)


@function
def score_new_token(frame, text, query, head):
    """Return the score of a token's own key."""
    queries = ffi.floats_3d(ffi.argument(frame, QUERIES))
    new_keys = ffi.floats_3d(ffi.argument(frame, NEW_KEYS))
    total = np.float32(0)
    for i in range(queries.shape[2]):
        total += queries[text, query, i] * new_keys[text, head, i]
    return total


@function
def add_parts(frame, start, stop):
    """Add the parts of some texts and key/value heads, and the tokens themselves."""
    out, sums = (ffi.floats_3d(ffi.result(frame, OUT)), ffi.floats_3d(ffi.result(frame, PART_SUMS)))
    maxima, totals = (
        ffi.floats_3d(ffi.result(frame, PART_MAXIMA)),
        ffi.floats_3d(ffi.result(frame, PART_TOTALS)),
    )
    new_values = ffi.floats_3d(ffi.argument(frame, NEW_VALUES))
    parts, n, group = maxima.shape[1], new_values.shape[1], out.shape[1] // new_values.shape[1]
    for unit in range(start, stop):
        text, head = unit // n, unit % n
        for query in range(head * group, (head + 1) * group):
            new_score = score_new_token(frame, text, query, head)
            maximum = max(new_score, largest(maxima[text, :, query]))
            factor = np.float32(math.exp(new_score - maximum))
            total = factor
            for i in range(out.shape[2]):
                out[text, query, i] = factor * new_values[text, head, i]
            for part in range(parts):
                if maxima[text, part, query] == -np.inf:
                    continue
                factor = np.float32(math.exp(maxima[text, part, query] - maximum))
                total += factor * totals[text, part, query]
                for i in range(out.shape[2]):
                    out[text, query, i] += factor * sums[text * parts + part, query, i]
            for i in range(out.shape[2]):
                out[text, query, i] /= total

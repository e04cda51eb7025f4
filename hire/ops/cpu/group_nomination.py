"""Nomination of the groups of a feed-forward layer, as one kernel for a CPU.

The references are `hire.ops.nomination.nominate_from_scores`, after
`hire.layers.ffn.HireFFN.pool_scores` where queries share their candidates. XLA's selection takes
several times as long as its work.
"""

from functools import cache

import jax.numpy as jnp
import numpy as np

from hire.ops.cpu import ffi
from hire.ops.cpu.numba_functions import function
from hire.ops.cpu.selection import DIGITS, kth_largest
from hire.types import Array, Float, Indices

# Buffers of the kernel. POOLED and COUNTS are scratch.
SCORES, OPTIONS = range(2)
INDICES, POOLED, COUNTS = range(3)
# Bits of the largest finite float, and all bits but the sign.
LARGEST, MAGNITUDE = np.int32(0x7F7FFFFF), np.int32(0x7FFFFFFF)


def nominate(
    scores: Float[Array, "b m"], candidates: int, *, k: int, share: bool, num_static: int = 0
) -> Indices:
    """Nominate the groups with the best estimated scores, after the static groups.

    Args:
        scores: Estimated scores of the groups after the static ones `(b, m)`, not negative. NaN
            counts as the largest score.
        candidates: Number of groups to nominate, k', at most m.
        k: Number of groups that a query keeps, by which shared scores are scaled.
        share: Whether all queries share their candidates: those with the largest score over the
            queries, each query's relative to its k-th largest. A query with a score that is not
            finite does not take part.
        num_static: Number of static groups.

    Returns:
        Indices of groups, int32 `(b, num_static + k')`, or `(1, num_static + k')` if shared: the
        static groups, then the candidates in no order.
    """
    calls = 1 if share else len(scores)
    indices, *_ = kernel()(
        scores.astype(jnp.float32),
        jnp.asarray([k, num_static], jnp.int32),
        results=[(calls, num_static + candidates), (calls, scores.shape[1]), (calls, DIGITS)],
    )
    return indices


@cache
def kernel() -> ffi.Kernel:
    """Return the kernel."""
    return ffi.Kernel(
        "hire_nominate_groups",
        [("float32", 2), ("int32", 1)],
        [("int32", 2), ("float32", 2), ("int32", 2)],
        fits,
        [ffi.parallel_loop(num_calls, select)],
    )


@function
def fits(frame):
    """Check the shapes of the kernel's buffers."""
    scores, options = ffi.argument(frame, SCORES), ffi.ints_1d(ffi.argument(frame, OPTIONS))
    b, m, calls = ffi.size(scores, 0), ffi.size(scores, 1), num_calls(frame)
    matches = len(options) == 2 and (calls == b or calls == 1) and b > 0
    for result in (POOLED, COUNTS):
        matches = matches and ffi.size(ffi.result(frame, result), 0) == calls
    matches = matches and ffi.size(ffi.result(frame, POOLED), 1) == m
    matches = matches and ffi.size(ffi.result(frame, COUNTS), 1) == DIGITS
    candidates = ffi.size(ffi.result(frame, INDICES), 1) - options[1]
    return matches and 0 < options[0] <= m and 0 <= options[1] and 0 < candidates <= m


@function
def num_calls(frame):
    """Return the number of selections."""
    return ffi.size(ffi.result(frame, INDICES), 0)


@function
def pool_scores(frame, call, queries):
    """Write the largest relative score of each group over the queries of a call."""
    scores, bits = (
        ffi.floats_2d(ffi.argument(frame, SCORES)),
        ffi.ints_2d(ffi.argument(frame, SCORES)),
    )
    pooled, counts = (
        ffi.floats_2d(ffi.result(frame, POOLED))[call],
        ffi.ints_2d(ffi.result(frame, COUNTS))[call],
    )
    k = ffi.ints_1d(ffi.argument(frame, OPTIONS))[0]
    pooled[:] = 0
    for query in range(call * queries, (call + 1) * queries):
        is_finite = True
        for group in range(len(pooled)):
            is_finite = is_finite and (bits[query, group] & MAGNITUDE) <= LARGEST
        if not is_finite:
            continue
        threshold, _ = kth_largest(bits[query], k, counts)
        kth_value = np.float32(1)
        for group in range(len(pooled)):
            if bits[query, group] == threshold and threshold > 0:
                kth_value = scores[query, group]
        for group in range(len(pooled)):
            pooled[group] = max(pooled[group], scores[query, group] / kth_value)


@function
def select(frame, start, stop):
    """Write the static groups and the candidates of some calls."""
    bits, all_indices = (
        ffi.ints_2d(ffi.argument(frame, SCORES)),
        ffi.ints_2d(ffi.result(frame, INDICES)),
    )
    num_static = ffi.ints_1d(ffi.argument(frame, OPTIONS))[1]
    queries = bits.shape[0] // all_indices.shape[0]
    for call in range(start, stop):
        keys, indices = ffi.ints_2d(ffi.result(frame, POOLED))[call], all_indices[call]
        if queries > 1:
            pool_scores(frame, call, queries)
        else:
            for group in range(len(keys)):
                keys[group] = bits[call, group] & MAGNITUDE
        count = len(indices) - num_static
        threshold, above = kth_largest(keys, count, ffi.ints_2d(ffi.result(frame, COUNTS))[call])
        for group in range(num_static):
            indices[group] = group
        ties, filled = count - above, num_static
        for group in range(len(keys)):
            if keys[group] > threshold or (keys[group] == threshold and ties > 0):
                ties -= keys[group] == threshold
                indices[filled] = num_static + group
                filled += 1

"""Selection of the largest numbers, as numba functions that kernels share."""

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from hire.ops.cpu.dots import FLOAT, INT32, INT64, for_vectors, in_all_lanes, load, splat, vector
from hire.ops.cpu.numba_functions import function

# Bits of the digits that `kth_largest` counts, of many and of few integers.
DIGIT_BITS, SHORT_DIGIT_BITS = 11, 8
DIGITS = 2**DIGIT_BITS


@function
def sortable(bits):
    """Map the bits of floats to integers that sort like the floats, and back."""
    return np.int32(bits ^ np.int32(np.int32(bits >> np.int32(31)) & np.int32(0x7FFFFFFF)))


@intrinsic
def keep_maxima(
    typing_context, scores, scale, count, maxima, rank_stride, ranks, position, kept_bits
):
    """Let the scores of one row of each bucket compete with the maxima so far.

    Scores are packed as by `hire.ops.sortable.pack_score_index`; infinity stays what it is.

    Args:
        scores: Address of the scores, as float32.
        scale: Address of their scales.
        count: Number of buckets.
        maxima: Address of the packed maxima of the first rank.
        rank_stride: Bytes from the maxima of one rank to those of the next.
        ranks: Number of ranks.
        position: What the last bits of these rows' keys are.
        kept_bits: Mask of the other bits.
    """

    def generate(context, builder, signature, arguments):
        scores, scale, count, maxima, rank_stride, ranks, position, kept_bits = arguments

        def compete(bucket: ir.Value, lanes: int) -> None:
            at = builder.mul(bucket, INT64(4))
            floats, ints = vector(FLOAT, lanes), vector(INT32, lanes)
            score, factor = (load(builder, builder.add(x, at), floats) for x in (scores, scale))
            bits = builder.bitcast(builder.fmul(score, factor), ints)
            sign = builder.ashr(bits, splat(ints, 31))
            sorts = builder.xor(bits, builder.and_(sign, splat(ints, 0x7FFFFFFF)))
            position_lanes, mask = (in_all_lanes(builder, x, lanes) for x in (position, kept_bits))
            packed = builder.or_(builder.and_(sorts, mask), position_lanes)
            key = cgutils.alloca_once_value(builder, packed)
            with cgutils.for_range(builder, ranks, intp=INT64) as rank:
                place = builder.add(maxima, builder.mul(rank.index, rank_stride))
                pointer = builder.inttoptr(builder.add(place, at), ints.as_pointer())
                leader, challenger = builder.load(pointer, align=4), builder.load(key)
                is_better = builder.icmp_signed(">", challenger, leader)
                builder.store(builder.select(is_better, challenger, leader), pointer, align=4)
                builder.store(builder.select(is_better, leader, challenger), key)

        for_vectors(builder, count, compete)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6, types.int32, types.int32), generate


@function
def kth_largest(keys, k, counts):
    """Return the k-th largest of some integers, and how many are larger.

    It counts the integers by their first bits, those of the right ones by the next bits, and so on:
    a few passes instead of a sort. Few integers are counted by fewer bits at a time.

    Args:
        keys: Integers, int32 `(m,)`.
        k: Rank, from 1.
        counts: Scratch, int32 `(DIGITS,)`.

    Returns:
        The k-th largest integer, and the number of larger ones.
    """
    prefix, known, above = np.uint32(0), np.uint32(0), 0
    digit_bits = DIGIT_BITS if len(keys) > DIGITS else SHORT_DIGIT_BITS
    shift = 32
    while shift > 0:
        width = min(digit_bits, shift)
        shift -= width
        largest_digit = (1 << width) - 1
        for digit in range(largest_digit + 1):
            counts[digit] = 0
        for i in range(len(keys)):
            key = np.uint32(keys[i]) ^ np.uint32(0x80000000)
            if (key & known) == prefix:
                counts[(key >> np.uint32(shift)) & np.uint32(largest_digit)] += 1
        digit = largest_digit
        while above + counts[digit] < k:
            above += counts[digit]
            digit -= 1
        prefix |= np.uint32(digit) << np.uint32(shift)
        known |= np.uint32(largest_digit) << np.uint32(shift)
    return np.int32(prefix ^ np.uint32(0x80000000)), above


@function
def sort_best(scores, indices, best_scores, best_indices, best_keys):
    """Write the largest scores and their indices, leader first; of equal scores the lower index.

    A heap holds the leader scores so far with the worst at its root. Most scores are compared with
    the root alone.

    Args:
        scores: Scores `(c,)`, of which the bits are integers of numpy's int32.
        indices: Index of each score, int32 `(c,)`.
        best_scores: Where the k largest scores go, as their bits, int32 `(k,)`.
        best_indices: Where their indices go, int32 `(k,)`.
        best_keys: Scratch, int32 `(k,)`.
    """
    k = len(best_indices)
    for position in range(len(scores)):
        key, index = sortable(scores[position]), indices[position]
        if position < k:
            place = position
            while place > 0:
                parent = (place - 1) // 2
                if not is_worse(key, index, best_keys[parent], best_indices[parent]):
                    break
                best_keys[place], best_indices[place] = best_keys[parent], best_indices[parent]
                place = parent
            best_keys[place], best_indices[place] = key, index
        elif is_worse(best_keys[0], best_indices[0], key, index):
            sift_down(best_keys, best_indices, k, key, index)
    for end in range(k - 1, 0, -1):
        worst_key, worst_index = best_keys[0], best_indices[0]
        key, index = best_keys[end], best_indices[end]
        sift_down(best_keys, best_indices, end, key, index)
        best_keys[end], best_indices[end] = worst_key, worst_index
    for place in range(k):
        best_scores[place] = sortable(best_keys[place])


@function
def is_worse(key, index, other_key, other_index):
    """Whether an entry is worse than another: smaller, or equal with a higher index."""
    return key < other_key or (key == other_key and index > other_index)


@function
def sift_down(keys, indices, count, key, index):
    """Put an entry at the root of a heap and let it sink below the entries that are worse."""
    place = 0
    while True:
        child = 2 * place + 1
        if child >= count:
            break
        other = child + 1
        if other < count and is_worse(keys[other], indices[other], keys[child], indices[child]):
            child = other
        if not is_worse(keys[child], indices[child], key, index):
            break
        keys[place], indices[place] = keys[child], indices[child]
        place = child
    keys[place], indices[place] = key, index

"""The chosen groups of a feed-forward layer, as one kernel for a CPU.

It gathers the rows of `up` (and `gate`), multiplies, activates, keeps the best groups and adds
their rows of `down`. No row is copied. The reference is `reference`, in plain JAX.
"""

import math
from collections.abc import Callable
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np

from hire.ops.activations import GATED_ACTIVATIONS, activate
from hire.ops.cpu import ffi, row_scores
from hire.ops.cpu.dots import ITEM_BYTES, add_rows, score_rows
from hire.ops.cpu.numba_functions import function
from hire.ops.cpu.row_scores import TYPE_OF_CODES, TYPE_OF_ROWS, kernel_operands, pad_query
from hire.ops.cpu.row_sums import COLUMNS_PER_TILE, num_parts, parts_loop
from hire.ops.cpu.selection import DIGITS, kth_largest
from hire.ops.quantization import QuantizedRows, storage_of
from hire.types import Array, Float, Indices, Queries, Rows

# Key of a group that a query does not keep. Keys are the bits of scores, which are not negative.
DROPPED = -1
ALWAYS_KEPT = 2**31 - 1


def is_supported(*matrices: Rows | QuantizedRows) -> bool:
    """Whether the kernel supports a layer with these matrices: all are stored alike."""
    storages = {storage_of(matrix) for matrix in matrices}
    return len(storages) == 1 and all(map(row_scores.is_supported, matrices))


def ffn(
    x: Queries,
    up: Rows | QuantizedRows,
    down: Rows | QuantizedRows,
    groups: Indices,
    *,
    group: int,
    k: int,
    gate: Rows | QuantizedRows | None = None,
    num_static: int = 0,
    activation: str = "relu",
) -> Float[Array, "b d"]:
    """Return the output of a layer from the best k of the given groups of each query.

    Args:
        x: Queries `(b, d)`, used as float32.
        up: Up projection `(f, d)` of float32 or bfloat16, or quantized.
        down: Down projection `(f, d)`, stored as `up`.
        groups: Groups `(b, c)`, or `(1, c)` for all queries. Of groups with equal scores all stay
            if they are shared, else the first ones.
        group: Rows of a group.
        k: Groups that each query keeps, at most c.
        gate: Gate projection `(f, d)`, stored as `up`, or None.
        num_static: Number of groups, the first ones of `groups`, that every query keeps.
        activation: As in `hire.ops.activations.activate`.

    Returns:
        Outputs, float32 `(b, d)`.
    """
    (calls, c), b, d = groups.shape, len(x), up.shape[1]
    padded = pad_query(x, up)
    width = padded.shape[1]
    matrices = [
        part
        for matrix in (up, down, gate)
        if matrix is not None
        for part in kernel_operands(matrix)
    ]
    keeps_ties = calls == 1 and b > 1
    out, *_ = kernel(storage_of(up), activation)(
        padded,
        jnp.asarray(groups).astype(jnp.int32),
        jnp.asarray([k, num_static, keeps_ties], jnp.int32),
        *matrices,
        results=[
            (b, width),
            (b, c, group),
            (b, c, group) if gate is not None else (0, 0, 0),
            (b, c),
            (b, DIGITS),
            (num_parts(b), b, width),
        ],
    )
    return out[:, :d]


def reference(
    x: Queries,
    up: Float[Array, "f d"],
    down: Float[Array, "f d"],
    groups: Indices,
    *,
    group: int,
    k: int,
    gate: Float[Array, "f d"] | None = None,
    num_static: int = 0,
    activation: str = "relu",
) -> Float[Array, "b d"]:
    """Return `ffn` in plain JAX, for rows of floats: one query after the other."""

    def one(x: Float[Array, " d"], groups: Indices) -> Float[Array, " d"]:
        rows = (groups[:, None] * group + jnp.arange(group)[None]).reshape(-1)
        active = activate(up[rows] @ x, None if gate is None else gate[rows] @ x, activation)
        scores = jnp.abs(active).reshape(-1, group).sum(1).at[:num_static].set(jnp.inf)
        kept = jnp.zeros(len(groups), bool).at[jax.lax.top_k(scores, k)[1]].set(True)
        return jnp.where(jnp.repeat(kept, group), active, 0.0) @ down[rows]

    return jax.vmap(one)(x, jnp.broadcast_to(groups, (len(x), groups.shape[1])))


@function
def gelu_tanh(value):
    """Return tanh GELU."""
    inner = np.float32(math.sqrt(2 / math.pi)) * (value + np.float32(0.044715) * value**3)
    return np.float32(0.5) * value * (np.float32(1) + np.float32(math.tanh(inner)))


@function
def silu(value):
    """Return SiLU, `value * sigmoid(value)`."""
    return value / (np.float32(1) + np.float32(math.exp(-value)))


ACTIVATION_OF_GATE = {"gelu_tanh": gelu_tanh, "silu": silu}


# Buffers of the kernel. All results but OUT are scratch; without a gate there is nothing in GATES.
X, GROUPS, OPTIONS, UP, UP_SCALE, DOWN, DOWN_SCALE, GATE, GATE_SCALE = range(9)
OUT, ACTIVE, GATES, KEYS, COUNTS, SUMS = range(6)


@cache
def kernel(storage: str, activation: str) -> ffi.Kernel:
    """Return the kernel for a storage of the matrices and an activation."""
    matrix = [(TYPE_OF_ROWS[storage], 2), ("float32", 1)]
    num_matrices = 3 if activation in GATED_ACTIVATIONS else 2
    return ffi.Kernel(
        f"hire_group_ffn_{activation}_{storage}",
        [("float32", 2), ("int32", 2), ("int32", 1), *num_matrices * matrix],
        [
            ("float32", 2),
            ("float32", 3),
            ("float32", 3),
            ("float32", 2),
            ("int32", 2),
            ("float32", 3),
        ],
        shape_check(storage, num_matrices),
        [
            activation_loop(storage, activation),
            ffi.parallel_loop(num_queries, keep),
            sum_loop(storage),
            parts_loop(OUT, SUMS),
        ],
    )


def shape_check(storage: str, num_matrices: int) -> Callable:
    """Return the function that checks the shapes of the kernel's buffers."""
    columns_per_item = 2 if storage == "int4" else 1
    is_scaled, is_gated = storage in TYPE_OF_CODES, num_matrices == 3

    @function
    def matrices_fit(frame):
        f, items = ffi.size(ffi.argument(frame, UP), 0), ffi.size(ffi.argument(frame, UP), 1)
        matches = f > 0
        for index in range(UP, UP + 2 * num_matrices, 2):
            rows, scale = ffi.argument(frame, index), ffi.argument(frame, index + 1)
            matches = matches and ffi.size(rows, 0) == f and ffi.size(rows, 1) == items
            matches = matches and ffi.size(scale, 0) == (f if is_scaled else 0)
        return matches and ffi.size(ffi.argument(frame, X), 1) == columns_per_item * items

    @function
    def scratch_fits(frame):
        b, columns = ffi.size(ffi.argument(frame, X), 0), ffi.size(ffi.argument(frame, X), 1)
        active, sums = ffi.result(frame, ACTIVE), ffi.result(frame, SUMS)
        matches = ffi.size(sums, 0) > 0 and ffi.size(sums, 1) == b and ffi.size(sums, 2) == columns
        for index in (OUT, ACTIVE, KEYS, COUNTS):
            matches = matches and ffi.size(ffi.result(frame, index), 0) == b
        if is_gated:
            for axis in range(3):
                gates = ffi.result(frame, GATES)
                matches = matches and ffi.size(gates, axis) == ffi.size(active, axis)
        matches = matches and ffi.size(ffi.result(frame, KEYS), 1) == ffi.size(active, 1)
        matches = matches and ffi.size(ffi.result(frame, COUNTS), 1) == DIGITS
        return matches and ffi.size(ffi.result(frame, OUT), 1) == columns

    @function
    def fits(frame):
        groups, active = ffi.argument(frame, GROUPS), ffi.result(frame, ACTIVE)
        b, f = ffi.size(ffi.argument(frame, X), 0), ffi.size(ffi.argument(frame, UP), 0)
        calls, c, group = ffi.size(groups, 0), ffi.size(active, 1), ffi.size(active, 2)
        options = ffi.ints_1d(ffi.argument(frame, OPTIONS))
        return (
            matrices_fit(frame)
            and scratch_fits(frame)
            and (calls == 1 or calls == b)
            and c == ffi.size(groups, 1)
            and group > 0
            and f % group == 0
            and len(options) == 3
            and 0 <= options[1] <= options[0] <= c
            and 0 < options[0]
        )

    return fits


@function
def first_row(frame, call, place):
    """Return the first row of a group. An index beyond the groups stands for the nearest one."""
    groups = ffi.ints_2d(ffi.argument(frame, GROUPS))
    group = ffi.size(ffi.result(frame, ACTIVE), 2)
    count = ffi.size(ffi.argument(frame, UP), 0) // group
    return min(max(groups[call, place], 0), count - 1) * group


@function
def queries_per_call(frame):
    """Return the number of queries that share a selection of groups."""
    return ffi.size(ffi.argument(frame, X), 0) // ffi.size(ffi.argument(frame, GROUPS), 0)


@function
def num_places(frame):
    """Return the number of groups of all calls."""
    groups = ffi.argument(frame, GROUPS)
    return ffi.size(groups, 0) * ffi.size(groups, 1)


def activation_loop(storage: str, activation: str) -> Callable:
    """Return the loop that computes the activations and the scores of the given groups."""
    score, item_bytes, is_scaled = (
        score_rows(storage),
        ITEM_BYTES[storage],
        storage in TYPE_OF_CODES,
    )
    is_gated = activation in GATED_ACTIVATIONS
    activation_of_gate = ACTIVATION_OF_GATE.get(activation, gelu_tanh)

    @function
    def multiply(frame, matrix, out, call, place, row):
        """Write the products of a group's rows with the queries of a call."""
        x, rows, scale = (
            ffi.argument(frame, X),
            ffi.argument(frame, matrix),
            ffi.argument(frame, matrix + 1),
        )
        items, columns, queries = ffi.size(rows, 1), ffi.size(x, 1), queries_per_call(frame)
        c, group = ffi.size(out, 1), ffi.size(out, 2)
        stride, first = items * item_bytes, call * queries
        next_row = first_row(frame, call, min(place + 1, c - 1))
        score(
            ffi.data(rows) + row * stride,
            stride,
            group,
            items,
            ffi.data(x) + 4 * first * columns,
            4 * columns,
            queries,
            ffi.data(out) + 4 * (first * c + place) * group,
            4 * c * group,
            (next_row - row) * stride,
        )
        if is_scaled:
            products, factors = ffi.floats_3d(out), ffi.floats_1d(scale)
            for query in range(first, first + queries):
                for i in range(group):
                    products[query, place, i] *= factors[row + i]

    @function
    def activate_groups(frame, start, stop):
        out, gates = ffi.result(frame, ACTIVE), ffi.result(frame, GATES)
        active, gate = ffi.floats_3d(out), ffi.floats_3d(gates)
        scores = ffi.floats_2d(ffi.result(frame, KEYS))
        c, queries = active.shape[1], queries_per_call(frame)
        for unit in range(start, stop):
            call, place = unit // c, unit % c
            row = first_row(frame, call, place)
            multiply(frame, UP, out, call, place, row)
            if is_gated:
                multiply(frame, GATE, gates, call, place, row)
            for query in range(call * queries, (call + 1) * queries):
                total = np.float32(0)
                for i in range(active.shape[2]):
                    value = active[query, place, i]
                    if is_gated:
                        value = activation_of_gate(gate[query, place, i]) * value
                    elif value < 0:
                        value = np.float32(0)
                    active[query, place, i] = value
                    total += abs(value)
                scores[query, place] = total

    return ffi.parallel_loop(num_places, activate_groups)


@function
def num_queries(frame):
    """Return the number of queries."""
    return ffi.size(ffi.argument(frame, X), 0)


@function
def keep(frame, start, stop):
    """Mark the groups that some queries do not keep."""
    options = ffi.ints_1d(ffi.argument(frame, OPTIONS))
    k, num_static, keeps_ties = options[0], options[1], options[2]
    all_keys, counts = ffi.ints_2d(ffi.result(frame, KEYS)), ffi.ints_2d(ffi.result(frame, COUNTS))
    for query in range(start, stop):
        keys = all_keys[query]
        for place in range(len(keys)):
            # Without the sign NaN is the largest.
            key = np.int32(keys[place] & np.int32(0x7FFFFFFF))
            keys[place] = ALWAYS_KEPT if place < num_static else key
        threshold, above = kth_largest(keys, k, counts[query])
        ties = len(keys) if keeps_ties else k - above
        for place in range(len(keys)):
            if keys[place] == threshold:
                ties -= 1
            if keys[place] < threshold or (keys[place] == threshold and ties < 0):
                keys[place] = DROPPED


@function
def num_sums(frame):
    """Return the number of sums of all calls."""
    return ffi.size(ffi.argument(frame, GROUPS), 0) * ffi.size(ffi.result(frame, SUMS), 0)


@function
def clear(sums, part, first_query, last_query):
    """Set the sums of some queries to zero."""
    for query in range(first_query, last_query):
        for column in range(sums.shape[2]):
            sums[part, query, column] = 0


@function
def scale_activations(frame, place, row, first_query, last_query):
    """Multiply the activations of a group by the scales of its rows of `down`."""
    active = ffi.floats_3d(ffi.result(frame, ACTIVE))
    scale = ffi.floats_1d(ffi.argument(frame, DOWN_SCALE))
    for query in range(first_query, last_query):
        for i in range(active.shape[2]):
            active[query, place, i] *= scale[row + i]


@function
def next_kept(frame, place, last, first_query, last_query):
    """Return the first place from one on whose group some query keeps, or the last one."""
    keys = ffi.ints_2d(ffi.result(frame, KEYS))
    while place < last:
        for query in range(first_query, last_query):
            if keys[query, place] != DROPPED:
                return place
        place += 1
    return last


def sum_loop(storage: str) -> Callable:
    """Return the loop that adds the rows of `down`, each part of the groups to sums of its own."""
    add, item_bytes, is_scaled = add_rows(storage), ITEM_BYTES[storage], storage in TYPE_OF_CODES

    @function
    def add_group(frame, part, place, row, next_row, first_query, last_query):
        down, active = ffi.argument(frame, DOWN), ffi.result(frame, ACTIVE)
        keys, sums = ffi.ints_2d(ffi.result(frame, KEYS)), ffi.result(frame, SUMS)
        b, c, group = ffi.size(active, 0), ffi.size(active, 1), ffi.size(active, 2)
        items, columns = ffi.size(down, 1), ffi.size(sums, 2)
        stride = items * item_bytes
        # One query reads each row as one stream. Several read a tile of all rows while in cache.
        is_alone = last_query - first_query == 1
        rows, tile_items = (1, items) if is_alone else (group, COLUMNS_PER_TILE)
        for first_of_rows in range(0, group, rows):
            for first in range(0, items, tile_items):
                count, at = min(tile_items, items - first), first * item_bytes
                ahead = (next_row - row) * stride
                for query in range(first_query, last_query):
                    if keys[query, place] != DROPPED:
                        weights = (query * c + place) * group + first_of_rows
                        add(
                            ffi.data(down) + (row + first_of_rows) * stride + at,
                            stride,
                            rows,
                            count,
                            ffi.data(active) + 4 * weights,
                            ffi.data(sums) + 4 * ((part * b + query) * columns + first),
                            4 * items,
                            ahead,
                        )
                        ahead = 0

    @function
    def add_parts(frame, start, stop):
        sums, queries = ffi.floats_3d(ffi.result(frame, SUMS)), queries_per_call(frame)
        parts, c = sums.shape[0], ffi.size(ffi.argument(frame, GROUPS), 1)
        for unit in range(start, stop):
            call, part = unit // parts, unit % parts
            first_query, last_query = call * queries, (call + 1) * queries
            clear(sums, part, first_query, last_query)
            last = c * (part + 1) // parts
            place = next_kept(frame, c * part // parts, last, first_query, last_query)
            while place < last:
                row = first_row(frame, call, place)
                next_place = next_kept(frame, place + 1, last, first_query, last_query)
                next_row = first_row(frame, call, min(next_place, last - 1))
                if is_scaled:
                    scale_activations(frame, place, row, first_query, last_query)
                add_group(frame, part, place, row, next_row, first_query, last_query)
                place = next_place

    return ffi.parallel_loop(num_sums, add_parts)

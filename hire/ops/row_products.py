"""Products of queries with all rows or with the rows at given indices."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from hire.ops import cpu as cpu_kernels
from hire.ops.implementation import by_platform, dispatch
from hire.ops.matmul import matmul_f32
from hire.ops.quantization import QuantizedRows, storage_of, unpack_codes, unpack_nibbles
from hire.ops.tpu import row_scores as row_kernel
from hire.types import AnyArray, Array, Blocks, Codes, Float, Indices, Int, Queries, Rows

# Largest batch for which a CPU reads the rows once by multiply-and-reduce. For larger batches XLA's
# matrix product is faster.
MAX_MULTIPLY_REDUCE_BATCH = 16


# An older XLA writes all products to memory, which is fifty times slower.
FUSES_MULTIPLY_REDUCE = jax.__version_info__ >= (0, 10, 2)


# Number of partial sums of rows for one query on a CPU. This is faster than one product, because
# XLA would also fuse the computation of the weights into that product.
NUM_PARTIAL_SUMS = 16


# Entries that a CPU multiplies with several queries at a time. They take 8 MB and stay in its last
# cache.
BLOCK_ENTRIES = 2**21


# Largest batch for which a CPU runs one query after the other outside a loop, on all cores.
MAX_UNROLLED_BATCH = 4


# Largest batch for which a CPU does not write quantized rows to memory as floats. Beyond it, one
# large product pays for the write.
MAX_BLOCKED_BATCH = 64


# Rows that a CPU gathers at a time for several queries. They stay in cache between the gather and
# the product.
GATHER_CHUNK_ROWS = 512


# Storages of rows for which XLA's product with one query is as fast as the CPU kernel, if there are
# more rows than so many.
FAST_FOR_ONE_QUERY, MAX_SLOW_ROWS = ("float32", "bfloat16"), 1024


def row_scores(
    x: Queries, rows: Rows | QuantizedRows, implementation: str = "auto"
) -> Float[Array, "b m"]:
    """Return the exact scores of all rows.

    `matmul_f32` says in which type queries and rows are multiplied. On a CPU this runs the fastest
    code for the batch size (`make bench` times the others).

    Args:
        x: Queries `(b, d)`.
        rows: Rows `(m, d)`, or quantized rows.
        implementation: "auto", "xla" or "cpu". "auto" runs the CPU kernel on a CPU for up to
            `MAX_MULTIPLY_REDUCE_BATCH` queries, except where XLA is as fast.

    Returns:
        Scores, float32 `(b, m)`.
    """
    kernel = cpu_row_kernel(rows)
    if implementation == "auto" and not is_kernel_faster(rows, len(x)):
        kernel = None
    return dispatch(implementation, plain_scores, x, rows, cpu=kernel and kernel.scores)


def is_kernel_faster(rows: Rows | QuantizedRows, batch: int) -> bool:
    """Whether the CPU kernel reads all rows faster than XLA does."""
    is_fast_in_xla = storage_of(rows) in FAST_FOR_ONE_QUERY and rows.shape[0] > MAX_SLOW_ROWS
    return 0 < batch <= MAX_MULTIPLY_REDUCE_BATCH and not (batch == 1 and is_fast_in_xla)


def cpu_row_kernel(rows: Rows | Blocks | QuantizedRows) -> Any:
    """Return `hire.ops.cpu.row_scores`, or None where it does not support the rows."""
    if not cpu_kernels.is_available():
        return None
    kernel = cpu_kernels.load("row_scores")
    return kernel if kernel.is_supported(rows) else None


def plain_scores(x: Queries, rows: Rows | QuantizedRows) -> Float[Array, "b m"]:
    """Return `row_scores` in plain JAX."""
    if isinstance(rows, QuantizedRows):
        return quantized_scores(x, rows)

    def dot() -> Float[Array, "b m"]:
        # For one query XLA fuses a cast of the rows into this product. It would copy the rows
        # before any other form of the product.
        return matmul_f32(x, rows.T)

    return (
        by_platform(lambda: multiply_reduce_scores(x, rows), dot)
        if 1 < len(x) <= MAX_MULTIPLY_REDUCE_BATCH
        else dot()
    )


def quantized_scores(x: Queries, rows: QuantizedRows) -> Float[Array, "b m"]:
    """Return the scores of all quantized rows.

    Args:
        x: Queries `(b, d)`.
        rows: Quantized rows `(m, d)`.

    Returns:
        Scores, float32 `(b, m)`.
    """
    x, (b, d) = x.astype(jnp.float32), (len(x), rows.width)

    def all_columns(x: Queries) -> Float[Array, "_ m"]:
        return plain_scores(x, unpack_codes(rows.codes, rows.bits, d))

    def one(x: Queries) -> Float[Array, "1 m"]:
        """Score the rows for one query.

        XLA converts codes to floats as it reads them, but it writes concatenated halves to memory.
        So 4-bit codes need one product for each half.
        """
        if rows.bits == 8:
            return all_columns(x)
        halves = zip(
            jnp.split(jnp.pad(x, ((0, 0), (0, d % 2))), 2, axis=1),
            unpack_nibbles(rows.codes),
            strict=True,
        )
        low, high = jax.lax.optimization_barrier(
            [matmul_f32(x_half, codes.astype(jnp.float32).T) for x_half, codes in halves]
        )
        return low + high

    def parts() -> Float[Array, "b m"]:
        if 1 <= b <= MAX_UNROLLED_BATCH:
            return jnp.concatenate([one(x[i : i + 1]) for i in range(b)])
        if rows.bits == 8 and b <= MAX_MULTIPLY_REDUCE_BATCH:
            return multiply_reduce_scores(x, rows.codes)
        return blocked_scores(x, rows.codes, lambda codes: unpack_codes(codes, rows.bits, d))

    return (
        by_platform(parts, lambda: all_columns(x)) if b <= MAX_BLOCKED_BATCH else all_columns(x)
    ) * rows.scale[None]


def multiply_reduce_scores(x: Queries, rows: Rows | Codes) -> Float[Array, "b m"]:
    """Score rows for 2 to `MAX_MULTIPLY_REDUCE_BATCH` queries on a CPU.

    Args:
        x: Queries `(b, d)`.
        rows: Rows `(m, d)`, or their 8-bit codes.

    Returns:
        Scores, float32 `(b, m)`.
    """
    if not FUSES_MULTIPLY_REDUCE:
        return blocked_scores(x, rows, lambda part: part.astype(jnp.float32))
    # For two matrices and the same queries XLA would write the queries to memory, once for every
    # row. That is a hundred times slower.
    x, rows = jax.lax.optimization_barrier((x, rows))
    return jnp.sum(rows[:, None].astype(jnp.float32) * x[None].astype(jnp.float32), axis=-1).T


def blocked_scores(
    x: Queries, rows: Rows | Codes, floats: Callable[..., Array] = jnp.asarray
) -> Float[Array, "b m"]:
    """Score rows block by block, so that each block stays in cache.

    XLA's matrix product would first write quantized rows to memory as floats.

    Args:
        x: Queries `(b, d)`.
        rows: Rows, or codes of rows `(m, _)`.
        floats: Function that converts a block of `rows` to rows `(n, d)`.

    Returns:
        Scores, float32 `(b, m)`.
    """
    m, d = len(rows), x.shape[1]
    block_rows = next(
        size for size in range(min(m, max(1, BLOCK_ENTRIES // d)), 0, -1) if m % size == 0
    )
    if block_rows < min(m, 64):
        return matmul_f32(x, floats(rows).T)
    products = jax.lax.map(
        lambda part: matmul_f32(floats(part), x.T), rows.reshape(-1, block_rows, rows.shape[1])
    )
    return products.reshape(m, len(x)).T


def row_scores_at(
    x: Queries,
    rows: Rows | Blocks | QuantizedRows,
    indices: Indices,
    group: int = 1,
    implementation: str = "auto",
) -> Float[Array, "b _"]:
    """Return the exact scores of the rows at given indices and read only those rows.

    The kernel takes single rows in `hire.ops.tpu.row_scores.blocks`.

    Args:
        x: Queries `(b, d)`.
        rows: Rows `(m, d)`, blocks, or quantized rows.
        indices: Indices `(b, c)` of rows, or of groups of rows.
        group: Number of consecutive rows in a group. A group is read as one.
        implementation: "auto", "xla", "pallas" or "cpu", see `dispatch`.

    Returns:
        Scores, float32 `(b, c * group)`.
    """
    if not isinstance(rows, QuantizedRows) and rows.ndim == 3:

        def plain(x: Queries, rows: Blocks, indices: Indices) -> Float[Array, "b _"]:
            return row_scores_at(x, rows.reshape(len(rows), -1)[:, : x.shape[1]], indices, group)

        return dispatch(implementation, plain, x, rows, indices, tpu=row_kernel.scores)

    def gathered(x: Queries, rows: Rows | QuantizedRows, indices: Indices) -> Float[Array, "b _"]:
        return map_queries(
            lambda x, indices: shared_scores_at(x[None], rows, indices, group)[0], x, indices
        )

    def in_place(x: Queries, rows: Rows | QuantizedRows, indices: Indices) -> Float[Array, "b _"]:
        return cpu_kernels.load("row_scores").scores_at(x, rows, rows_of_groups(indices, group))

    kernel = cpu_row_kernel(rows) and in_place
    return dispatch(implementation, gathered, jnp.asarray(x), rows, indices, cpu=kernel)


def rows_of_groups(groups: Indices, group: int) -> Int[Array, "*b _"]:
    """Return the indices of the rows in groups of consecutive rows.

    Args:
        groups: Group indices `(*b, c)`.
        group: Number of rows in a group.

    Returns:
        The row indices `(*b, c * group)`.
    """
    first = jnp.asarray(groups) * group
    return jnp.add.outer(first, jnp.arange(group, dtype=first.dtype)).reshape(*first.shape[:-1], -1)


def shared_scores_at(
    x: Queries, rows: Rows | QuantizedRows, indices: Int[AnyArray, " c"], group: int = 1
) -> Float[Array, "b _"]:
    """Return `row_scores_at` for indices that all queries share, and read their rows once.

    Args:
        x: Queries `(b, d)`.
        rows: Rows `(m, d)`, or quantized rows.
        indices: Indices `(c,)` of rows, or of groups of rows.
        group: Number of consecutive rows in a group.

    Returns:
        Scores, float32 `(b, c * group)`.
    """
    x = jnp.asarray(x)

    def in_one_product() -> Float[Array, "b _"]:
        return matmul_f32(x, gather_rows(rows, indices, group).T)

    def in_chunks() -> Float[Array, "b _"]:
        chunk_products = jax.lax.map(
            lambda part: matmul_f32(gather_rows(rows, part, group), x.T),
            split_chunks(indices, max(1, GATHER_CHUNK_ROWS // group)),
        )
        return chunk_products.reshape(-1, len(x)).T[:, : indices.size * group]

    # One query needs no loop: outside a loop XLA gathers on all cores.
    products = in_one_product() if len(x) == 1 else by_platform(in_chunks, in_one_product)
    return products * row_scales(rows, indices, group)


def map_queries(function: Callable, *parts: AnyArray) -> Array:
    """Map a function over the queries of a batch.

    All queries run at once, except on a CPU: one query after the other makes use of its caches.

    Args:
        function: Function of the parts of one query.
        *parts: Arrays `(b, ...)`.

    Returns:
        The results `(b, ...)`.
    """
    b = len(parts[0])

    def one_by_one() -> Array:
        return (
            jax.lax.map(lambda one: function(*one), parts) if b > MAX_UNROLLED_BATCH else unrolled()
        )

    def unrolled() -> Array:
        return jnp.stack([function(*(part[i] for part in parts)) for i in range(b)])

    return unrolled() if b == 1 else by_platform(one_by_one, lambda: jax.vmap(function)(*parts))


def gather_rows(
    rows: Rows | QuantizedRows, indices: Int[AnyArray, " c"], group: int
) -> Float[Array, "_ d"]:
    """Gather groups of rows, without the scales of quantized rows.

    Multiply the products with these rows by their `row_scales`.

    Args:
        rows: Rows `(m, d)`, or quantized rows.
        indices: Indices `(c,)` of groups.
        group: Number of consecutive rows in a group.

    Returns:
        The rows `(c * group, d)`.
    """
    if isinstance(rows, QuantizedRows):
        return unpack_codes(gather_groups(rows.codes, indices, group), rows.bits, rows.width)
    return gather_groups(jnp.asarray(rows), indices, group)


def row_scales(
    rows: Rows | QuantizedRows, indices: Int[AnyArray, " c"], group: int
) -> Float[Array, "1 _"] | float:
    """Return the scales of the rows that `gather_rows` returns.

    They stay out of the product: a CPU would otherwise write the scaled rows to memory first.

    Args:
        rows: Rows `(m, d)`, or quantized rows.
        indices: Indices `(c,)` of groups.
        group: Number of consecutive rows in a group.

    Returns:
        Scales `(1, c * group)`, or 1.0 for rows that are not quantized.
    """
    return (
        rows.scale.reshape(-1, group)[indices].reshape(1, -1)
        if isinstance(rows, QuantizedRows)
        else 1.0
    )


def gather_groups(rows: Array, indices: Int[AnyArray, " c"], group: int) -> Array:
    """Gather groups of consecutive rows: rows `(m, d)` and indices `(c,)` give `(c * group, d)`."""
    return rows.reshape(-1, group, rows.shape[1])[indices].reshape(-1, rows.shape[1])


def row_nbytes(rows: Rows | Blocks | QuantizedRows, width: int) -> int:
    """Return the bytes of one row.

    Args:
        rows: Rows, blocks, or quantized rows.
        width: Entries of a row, without the padding of blocks.

    Returns:
        The bytes of one row.
    """
    return (
        rows.nbytes // rows.shape[0]
        if isinstance(rows, QuantizedRows)
        else width * rows.dtype.itemsize
    )


def split_chunks(values: AnyArray, size: int) -> AnyArray:
    """Split values `(c,)` into chunks `(_, size)` and pad the last one with zeros."""
    return jnp.pad(values, (0, -len(values) % size)).reshape(-1, size)


def weighted_row_sum(
    weights: Float[AnyArray, "*b m"], rows: Rows | QuantizedRows, implementation: str = "auto"
) -> Float[Array, "*b d"]:
    """Return the weighted sums of all rows.

    Args:
        weights: Weights `(*b, m)`.
        rows: Rows `(m, d)`, or quantized rows.
        implementation: "auto", "xla" or "cpu". "auto" runs the CPU kernel on a CPU for up to
            `MAX_MULTIPLY_REDUCE_BATCH` sums, except where XLA is as fast.

    Returns:
        Sums, float32 `(*b, d)`.
    """
    *batch, m = jnp.shape(weights)
    num_sums = math.prod(batch)

    def in_kernel(weights: Float[Array, "*b m"], rows: Rows | QuantizedRows) -> Array:
        kernel = cpu_kernels.load("row_sums")
        return kernel.sums(weights.reshape(num_sums, m), rows).reshape(*batch, -1)

    is_chosen = implementation == "cpu" or is_kernel_faster(rows, num_sums)
    kernel = in_kernel if is_chosen and cpu_row_kernel(rows) else None
    return dispatch(implementation, plain_row_sum, jnp.asarray(weights), rows, cpu=kernel)


def plain_row_sum(
    weights: Float[Array, "*b m"], rows: Rows | QuantizedRows
) -> Float[Array, "*b d"]:
    """Return `weighted_row_sum` in plain JAX."""
    if isinstance(rows, QuantizedRows):
        weights = weights * jnp.expand_dims(rows.scale, range(weights.ndim - 1))
        rows = unpack_codes(rows.codes, rows.bits, rows.width)
    m, d = rows.shape
    if math.prod(weights.shape[:-1]) != 1 or m % NUM_PARTIAL_SUMS:
        return matmul_f32(weights, rows)

    def split() -> Float[Array, "*b d"]:
        partial_sums = matmul_f32(
            weights.reshape(NUM_PARTIAL_SUMS, -1),
            rows.reshape(NUM_PARTIAL_SUMS, -1, d),
            "pm,pmd->pd",
        )
        return partial_sums.sum(0).reshape(*weights.shape[:-1], d)

    return by_platform(split, lambda: matmul_f32(weights, rows))


def weighted_row_sum_at(
    weights: Float[AnyArray, "b _"], rows: Rows | QuantizedRows, indices: Indices, group: int = 1
) -> Float[Array, "b d"]:
    """Return the weighted sums of the rows at given indices and read only those rows.

    Args:
        weights: Weights `(b, c * group)`.
        rows: Rows `(m, d)`, or quantized rows.
        indices: Indices `(b, c)` of rows, or of groups of rows.
        group: Number of consecutive rows in a group.

    Returns:
        Sums, float32 `(b, d)`.
    """
    return map_queries(
        lambda weights, indices: shared_sums_at(weights[None], rows, indices, group)[0],
        weights,
        indices,
    )


def shared_sums_at(
    weights: Float[AnyArray, "b _"],
    rows: Rows | QuantizedRows,
    indices: Int[AnyArray, " c"],
    group: int = 1,
) -> Float[Array, "b d"]:
    """Return `weighted_row_sum_at` for indices that all queries share, and read their rows once.

    Args:
        weights: Weights `(b, c * group)`.
        rows: Rows `(m, d)`, or quantized rows.
        indices: Indices `(c,)` of rows, or of groups of rows.
        group: Number of consecutive rows in a group.

    Returns:
        Sums, float32 `(b, d)`.
    """
    weights = jnp.asarray(weights) * row_scales(rows, indices, group)

    def in_one_product() -> Float[Array, "b d"]:
        return matmul_f32(weights, gather_rows(rows, indices, group))

    def in_chunks() -> Float[Array, "b d"]:
        chunk_indices = split_chunks(indices, max(1, GATHER_CHUNK_ROWS // group))
        padded_weights = jnp.pad(
            weights, ((0, 0), (0, chunk_indices.size * group - weights.shape[1]))
        )
        chunk_weights = padded_weights.reshape(len(weights), len(chunk_indices), -1).swapaxes(0, 1)
        # Sum after the loop. Inside the loop XLA would fuse the product into the sum, which takes
        # three times as long.
        return jax.lax.map(
            lambda part: matmul_f32(part[0], gather_rows(rows, part[1], group)),
            (chunk_weights, chunk_indices),
        ).sum(0)

    return in_one_product() if len(weights) == 1 else by_platform(in_chunks, in_one_product)

"""A ReLU FFN over selected groups of neurons, as one Pallas TPU kernel.

The kernel reads both matrices group by group, with many transfers at a time. A group of 8 rows is
one tile of HBM, so it is one contiguous transfer. The reference is `ffn_reference`.

The kernel can keep only the k best of the selected groups. It then still reads `down` for the
others and sets their neurons to 0. To wait for the final selection before the first transfer of
`down` would take longer than to read these bytes.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from hire.types import AnyArray, Array, Float, Int, Rows

# Largest number of rows in a chunk: the width of the matrix unit.
MAX_CHUNK_ROWS = 128
# Chunks in VMEM. While the kernel computes with one chunk, the next three (1.2 MB at a width of
# 1536) are in transfer.
NUM_BUFFERS = 4


def ffn_reference(
    x: Float[AnyArray, "b n d"],
    up: Rows,
    down: Rows,
    groups: Int[AnyArray, "b c"],
    *,
    k: int,
    group: int = 8,
) -> Float[Array, "b n d"]:
    """Return the result of `ffn`, in plain JAX.

    Args:
        x: Queries `(b, n, d)`: b calls of n queries each.
        up: Rows `(f, d)` of the first matrix.
        down: Rows `(f, d)` of the second matrix.
        groups: Indices of the groups of each call `(b, c)`.
        k: Groups that each query keeps.
        group: Rows of a group.

    Returns:
        The output, float32 `(b, n, d)`.
    """

    def one(x, groups):
        row_indices = (groups[:, None] * group + jnp.arange(group)[None]).reshape(-1)
        active = jnp.maximum(
            jnp.matmul(x, up[row_indices].T, preferred_element_type=jnp.float32), 0
        )
        sums = jnp.sum(active.reshape(len(x), -1, group), axis=-1)
        threshold = jnp.sort(sums, axis=-1)[:, -k, None]
        active = jnp.where(jnp.repeat(sums >= threshold, group, axis=1), active, 0)
        return jnp.matmul(
            active.astype(down.dtype), down[row_indices], preferred_element_type=jnp.float32
        )

    return jax.lax.map(lambda part: one(*part), (x, groups))


def kernel(
    groups,
    x,
    up,
    down,
    out,
    active,
    buffers,
    semaphores,
    *,
    group: int,
    count: int,
    groups_per_chunk: int,
    k: int,
):
    """Compute the output of one call.

    Args:
        groups: Indices of the groups of all calls `(b, steps * groups_per_chunk)`, in SMEM.
        x: Queries of this call `(1, n, d)`, in VMEM.
        up: First matrix `(f, d)`, in HBM.
        down: Second matrix `(f, d)`, in HBM.
        out: Output of this call `(1, n, d)`, in VMEM.
        active: Activations `(steps, n, rows)`, in VMEM.
        buffers: Buffers for chunks of rows `(NUM_BUFFERS, rows, d)`, in VMEM.
        semaphores: A DMA semaphore for each buffer.
        group: Rows of a group.
        count: Groups of a call, without padding.
        groups_per_chunk: Groups of a chunk.
        k: Groups that each query keeps.
    """
    call, (steps, _, chunk_rows) = pl.program_id(0), active.shape

    def chunk(i):
        return buffers.at[i % NUM_BUFFERS], semaphores.at[i % NUM_BUFFERS]

    def fetch(i):
        matrix = up if i < steps else down
        buffer, semaphore = chunk(i)
        for j in range(groups_per_chunk):
            source = pl.ds(
                pl.multiple_of(groups[call, i % steps * groups_per_chunk + j] * group, group), group
            )
            pltpu.make_async_copy(
                matrix.at[source], buffer.at[pl.ds(j * group, group)], semaphore
            ).start()

    def arrive(i):
        buffer, semaphore = chunk(i)
        # Waits for as many bytes as one chunk has.
        pltpu.make_async_copy(up.at[pl.ds(0, chunk_rows)], buffer, semaphore).wait()
        if i + NUM_BUFFERS < 2 * steps:
            pending.append(i + NUM_BUFFERS)
        return buffer[...]

    pending = []
    for i in range(min(NUM_BUFFERS, 2 * steps)):
        fetch(i)
    for i in range(steps):
        rows = arrive(i)
        products = jax.lax.dot_general(
            x[0], rows, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
        )
        while pending:
            fetch(pending.pop())
        neuron_indices = i * chunk_rows + jax.lax.broadcasted_iota(jnp.int32, products.shape, 1)
        # Neurons beyond are padding of the last chunk.
        active[i] = jnp.where(neuron_indices < count * group, jnp.maximum(products, 0), 0)
    if k < count:
        keep_best(active, k, group)
    out[...] = jnp.zeros_like(out)
    for i in range(steps):
        rows = arrive(steps + i)
        out[0] += jnp.dot(active[i].astype(rows.dtype), rows, preferred_element_type=jnp.float32)
        while pending:
            fetch(pending.pop())


def keep_best(active, k: int, group: int) -> None:
    """Set the activations to 0 outside the k groups with the largest sums.

    The k-th largest sum is computed bit by bit, as in `hire.ops.sortable.kth_largest_int`.

    Args:
        active: Activations `(steps, n, rows)`, changed in place.
        k: Groups to keep.
        group: Rows of a group.
    """
    steps, n, chunk_rows = active.shape
    row_groups, column_groups = (
        jax.lax.div(
            jax.lax.broadcasted_iota(jnp.int32, (chunk_rows, chunk_rows), axis), jnp.int32(group)
        )
        for axis in (0, 1)
    )
    same_group = jnp.where(row_groups == column_groups, 1.0, 0.0).astype(jnp.bfloat16)

    def sums(rest):
        total = jnp.zeros_like(rest)
        # The matrix unit multiplies bfloat16 numbers. Three of them represent one float32 number.
        for _ in range(3):
            high_part = rest.astype(jnp.bfloat16)
            total, rest = (
                total + jnp.dot(high_part, same_group, preferred_element_type=jnp.float32),
                rest - high_part.astype(jnp.float32),
            )
        return total

    # The sums are not negative, so their bits have the same order.
    sum_bits = [jax.lax.bitcast_convert_type(sums(active[i]), jnp.int32) for i in range(steps)]

    def set_bit(step, prefix):
        threshold = prefix | jax.lax.shift_left(1, 30 - step)
        count = sum(
            jnp.sum(jnp.where(bits >= threshold, 1.0, 0.0), axis=1, keepdims=True)
            for bits in sum_bits
        )
        return jnp.where(count >= k * group, threshold, prefix)

    kth_sum = jax.lax.fori_loop(0, 31, set_bit, jnp.zeros((n, 1), jnp.int32))
    for i, bits in enumerate(sum_bits):
        active[i] = jnp.where(bits >= kth_sum, active[i], 0)


def is_supported(group: int) -> bool:
    """Return whether a group of `group` rows is made of complete HBM tiles and divides a chunk."""
    return group % 8 == 0 and MAX_CHUNK_ROWS % group == 0


@functools.partial(jax.jit, static_argnames=("k", "group", "interpret"))
def ffn(
    x: Float[AnyArray, "b n d"],
    up: Rows,
    down: Rows,
    groups: Int[AnyArray, "b c"],
    *,
    k: int,
    group: int = 8,
    interpret=False,
) -> Float[Array, "b n d"]:
    """Return the output of the FFN over the selected groups.

    The n queries of a call share their groups. Each query keeps the k groups with the largest sums
    of activations. A repeated group counts twice.

    Args:
        x: Queries `(b, n, d)`: b calls of n queries each.
        up: Rows `(f, d)` of the first matrix.
        down: Rows `(f, d)` of the second matrix.
        groups: Indices of the groups of each call `(b, c)`.
        k: Groups that each query keeps.
        group: Rows of a group.
        interpret: Run the kernel without a TPU, see `pallas_call`.

    Returns:
        The output, float32 `(b, n, d)`.

    Raises:
        ValueError: If `group` is not 8, 16, 32, 64 or 128.
    """
    if not is_supported(group):
        raise ValueError(
            f"group = {group}: expected 8, 16, 32, 64 or {MAX_CHUNK_ROWS}, whole tiles of HBM"
        )
    (b, n, d), count = x.shape, groups.shape[1]
    steps = -(-count * group // MAX_CHUNK_ROWS)
    chunk_groups = -(-count // steps)
    x_padded = jnp.pad(x.astype(up.dtype), ((0, 0), (0, -n % (32 // up.dtype.itemsize)), (0, 0)))
    groups_padded = jnp.pad(groups.astype(jnp.int32), ((0, 0), (0, steps * chunk_groups - count)))
    block_shape, chunk_rows, hbm_spec = (
        (1, *x_padded.shape[1:]),
        chunk_groups * group,
        pl.BlockSpec(memory_space=pl.ANY),
    )
    vmem_spec = pl.BlockSpec(block_shape, lambda i, *_: (i, 0, 0))
    call = pl.pallas_call(
        functools.partial(kernel, group=group, count=count, groups_per_chunk=chunk_groups, k=k),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(b,),
            in_specs=[vmem_spec, hbm_spec, hbm_spec],
            out_specs=vmem_spec,
            scratch_shapes=[
                pltpu.VMEM((steps, x_padded.shape[1], chunk_rows), jnp.float32),
                pltpu.VMEM((NUM_BUFFERS, chunk_rows, d), up.dtype),
                pltpu.SemaphoreType.DMA((NUM_BUFFERS,)),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(x_padded.shape, jnp.float32),
        # The addresses come from the selection, so they are in range. To check one takes longer
        # than the rest of the work for its transfer.
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",), disable_bounds_checks=True
        ),
        interpret=interpret,
    )
    return call(groups_padded, x_padded, up, down)[:, :n]

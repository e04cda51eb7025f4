"""Exact scores of single rows in HBM, as one Pallas TPU kernel with many transfers at a time.

This is the rescoring step of the search. The reference is `scores_reference`. In a matrix `(m, d)`
a TPU interleaves 8 or 16 rows in a tile and cannot fetch one row without the others. So the kernel
reads rows from `blocks`, where each row fills complete tiles.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from hire.types import Array, Blocks, Float, Indices, Queries, Rows

# Rows of a chunk. The kernel waits for all their transfers together.
CHUNK_ROWS = 128
# Chunks in VMEM. While the kernel computes with one chunk, the next two (1 MB at a width of 2048 in
# bfloat16) are in transfer.
NUM_BUFFERS = 3


def scores_reference(x: Queries, blocks: Blocks, indices: Indices) -> Float[Array, "b c"]:
    """Return the result of `scores`, in plain JAX.

    Args:
        x: Queries `(b, d)`.
        blocks: Rows in `blocks`, `(m, s, 128)`.
        indices: Row indices `(b, c)`.

    Returns:
        Scores, float32 `(b, c)`.
    """
    rows = blocks[indices].reshape(*indices.shape, -1)[..., : x.shape[1]]
    return jnp.einsum("bd,bcd->bc", x.astype(jnp.float32), rows.astype(jnp.float32))


def blocks(rows: Rows) -> Blocks:
    """Convert rows to the layout that the kernel reads.

    Each row is padded with zeros to complete tiles: to a multiple of 2048 entries in bfloat16 and
    of 1024 in float32.

    Args:
        rows: Rows `(m, d)`.

    Returns:
        Blocks `(m, s, 128)`.
    """
    m, d = rows.shape
    tile = 128 * 32 // rows.dtype.itemsize
    return jnp.asarray(jnp.pad(rows, ((0, 0), (0, -d % tile)))).reshape(m, -1, 128)


def kernel(indices, x, blocks, out, buffers, semaphores, *, per_query: int):
    """Compute the scores of all listed rows.

    Args:
        indices: Row indices `(steps * CHUNK,)`, in SMEM.
        x: Queries `(b, s, 128)`, in VMEM.
        blocks: Rows `(m, s, 128)`, in HBM.
        out: Scores `(steps, CHUNK)`, in VMEM.
        buffers: Buffers for chunks of rows `(NUM_BUFFERS, CHUNK, s, 128)`, in VMEM.
        semaphores: A DMA semaphore for each buffer.
        per_query: Chunks of a query.
    """
    steps = out.shape[0]

    def fetch(step):
        slot = jax.lax.rem(step, NUM_BUFFERS)
        for i in range(CHUNK_ROWS):
            row = blocks.at[indices[step * CHUNK_ROWS + i]]
            pltpu.make_async_copy(row, buffers.at[slot, i], semaphores.at[slot]).start()

    def compute(step):
        slot = jax.lax.rem(step, NUM_BUFFERS)
        # Waits for as many bytes as one chunk has.
        pltpu.make_async_copy(
            blocks.at[pl.ds(0, CHUNK_ROWS)], buffers.at[slot], semaphores.at[slot]
        ).wait()
        products = buffers[slot].astype(jnp.float32) * x[jax.lax.div(step, per_query)][None]
        out[pl.ds(step, 1)] = jnp.sum(jnp.sum(products, axis=1), axis=1)[None]

    def steady(step, _):
        fetch(step + ahead)
        compute(step)

    ahead = min(NUM_BUFFERS - 1, steps)
    for step in range(ahead):
        fetch(step)
    jax.lax.fori_loop(0, steps - ahead, steady, None)
    for step in range(steps - ahead, steps):
        compute(step)


@functools.partial(jax.jit, static_argnames=("interpret",))
def scores(x: Queries, blocks: Blocks, indices: Indices, *, interpret=False) -> Float[Array, "b c"]:
    """Return the exact scores of the rows at given indices and read only those rows.

    It reads a row once for each time that the row is listed.

    Args:
        x: Queries `(b, d)`.
        blocks: Rows in `blocks`, `(m, s, 128)`.
        indices: Row indices `(b, c)`.
        interpret: Run the kernel without a TPU, see `pallas_call`.

    Returns:
        Scores, float32 `(b, c)`.
    """
    (b, c), (_, s, lanes) = indices.shape, blocks.shape
    per_query = -(-c // CHUNK_ROWS)
    x = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, s * lanes - x.shape[1]))).reshape(b, s, lanes)
    indices_padded = jnp.pad(
        indices.astype(jnp.int32), ((0, 0), (0, per_query * CHUNK_ROWS - c))
    ).reshape(-1)
    call = pl.pallas_call(
        functools.partial(kernel, per_query=per_query),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            in_specs=[pl.BlockSpec(memory_space=pltpu.VMEM), pl.BlockSpec(memory_space=pl.ANY)],
            out_specs=pl.BlockSpec(memory_space=pltpu.VMEM),
            scratch_shapes=[
                pltpu.VMEM((NUM_BUFFERS, CHUNK_ROWS, s, lanes), blocks.dtype),
                pltpu.SemaphoreType.DMA((NUM_BUFFERS,)),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((b * per_query, CHUNK_ROWS), jnp.float32),
        # The indices come from the selection, so they are in range. To check one takes longer than
        # the rest of the request for its row.
        compiler_params=pltpu.CompilerParams(disable_bounds_checks=True),
        interpret=interpret,
    )
    return call(indices_padded, x, blocks).reshape(b, -1)[:, :c]

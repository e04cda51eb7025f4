"""Exact scores of single rows picked out of HBM (the exact step of the search), as one Pallas TPU kernel: many transfers at a time.

The reference is `scores_reference`. In a matrix (m, d) a TPU interleaves 8 or 16 rows in a tile, and cannot fetch one without the
others; rows are taken from `blocks`, where each is whole tiles of its own.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from hire.axes import Array, Blocks, Float, Indices, Queries, Rows

CHUNK = 128  # rows whose transfers are awaited together
HELD = 3  # chunks in VMEM: while one is computed with, the next two (1 MB at a width of 2048 in bfloat16) are on their way


def scores_reference(x: Queries, blocks: Blocks, indices: Indices) -> Float[Array, "b c"]:
    """What `scores` computes, in plain JAX."""
    rows = blocks[indices].reshape(*indices.shape, -1)[..., : x.shape[1]]
    return jnp.einsum("bd,bcd->bc", x.astype(jnp.float32), rows.astype(jnp.float32))


def blocks(rows: Rows) -> Blocks:
    """Rows (m, d) as the kernel takes them, (m, s, 128), filled up with zeros to whole tiles: to a multiple of 2048 entries in
    bfloat16, of 1024 in float32.
    """
    m, d = rows.shape
    tile = 128 * 32 // rows.dtype.itemsize
    return jnp.asarray(jnp.pad(rows, ((0, 0), (0, -d % tile)))).reshape(m, -1, 128)


def kernel(indices, x, blocks, out, held, arrived, *, per_query: int):
    """indices (steps * CHUNK,) in SMEM; x (b, s, 128) and out (steps, CHUNK) in VMEM; blocks in HBM; held (HELD, CHUNK, s, 128)."""
    steps = out.shape[0]

    def fetch(step):
        place = jax.lax.rem(step, HELD)
        for i in range(CHUNK):
            row = blocks.at[indices[step * CHUNK + i]]
            pltpu.make_async_copy(row, held.at[place, i], arrived.at[place]).start()

    def compute(step):
        place = jax.lax.rem(step, HELD)
        pltpu.make_async_copy(blocks.at[pl.ds(0, CHUNK)], held.at[place], arrived.at[place]).wait()  # for as many bytes
        products = held[place].astype(jnp.float32) * x[jax.lax.div(step, per_query)][None]
        out[pl.ds(step, 1)] = jnp.sum(jnp.sum(products, axis=1), axis=1)[None]

    def steady(step, _):
        fetch(step + ahead)
        compute(step)

    ahead = min(HELD - 1, steps)
    for step in range(ahead):
        fetch(step)
    jax.lax.fori_loop(0, steps - ahead, steady, None)
    for step in range(steps - ahead, steps):
        compute(step)


@functools.partial(jax.jit, static_argnames=("interpret",))
def scores(x: Queries, blocks: Blocks, indices: Indices, *, interpret=False) -> Float[Array, "b c"]:
    """Exact scores (b, c), float32, of queries (b, d) and the rows at indices (b, c) of `blocks`.

    Only those rows are read, each as often as it is named. `interpret` runs it without a TPU (see pallas_call).
    """
    (b, c), (_, s, lanes) = indices.shape, blocks.shape
    per_query = -(-c // CHUNK)
    x = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, s * lanes - x.shape[1]))).reshape(b, s, lanes)
    listed = jnp.pad(indices.astype(jnp.int32), ((0, 0), (0, per_query * CHUNK - c))).reshape(-1)
    call = pl.pallas_call(
        functools.partial(kernel, per_query=per_query),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            in_specs=[pl.BlockSpec(memory_space=pltpu.VMEM), pl.BlockSpec(memory_space=pl.ANY)],
            out_specs=pl.BlockSpec(memory_space=pltpu.VMEM),
            scratch_shapes=[pltpu.VMEM((HELD, CHUNK, s, lanes), blocks.dtype), pltpu.SemaphoreType.DMA((HELD,))],
        ),
        out_shape=jax.ShapeDtypeStruct((b * per_query, CHUNK), jnp.float32),
        # The indices are a selection's own, so they are in range; checking each takes longer than the rest of asking for its row.
        compiler_params=pltpu.CompilerParams(disable_bounds_checks=True),
        interpret=interpret,
    )
    return call(listed, x, blocks).reshape(b, -1)[:, :c]

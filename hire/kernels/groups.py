"""A ReLU FFN of chosen groups of neurons alone, as one Pallas TPU kernel: both matrices are read group by group, many at a time.

The reference is `ffn_reference`: the products of queries with the rows of `up` in the groups, ReLU, times the same rows of `down`.
A group of 8 rows is one tile of HBM, so one contiguous transfer.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from hire.axes import AnyArray, Array, Float, Int, Queries, Rows

TALL = 128  # rows of a chunk, at most: as many as the matrix unit is wide
HELD = 3  # chunks in VMEM: while one is computed with, the next two (of 0.8 MB at a width of 1536) are on their way


def ffn_reference(x: Queries, up: Rows, down: Rows, groups: Int[AnyArray, " c"], *, group: int = 8) -> Float[Array, "b d"]:
    """What `ffn` computes, in plain JAX."""
    rows = (groups[:, None] * group + jnp.arange(group)[None]).reshape(-1)
    active = jnp.maximum(jnp.matmul(x, up[rows].T, preferred_element_type=jnp.float32), 0)
    return jnp.matmul(active.astype(down.dtype), down[rows], preferred_element_type=jnp.float32)


def kernel(groups, x, up, down, out, ups, downs, arrived, *, group: int, count: int, each: int):
    """groups (steps * each,) in SMEM; x and out in VMEM; up and down in HBM; ups and downs (HELD, each * group, d) hold chunks."""
    steps = -(-count // each)

    def transfers(step, act):
        place = jax.lax.rem(step, HELD)
        for i in range(each):
            source = pl.ds(pl.multiple_of(groups[step * each + i] * group, group), group)
            for matrix, chunks in ((up, ups), (down, downs)):
                act(pltpu.make_async_copy(matrix.at[source], chunks.at[place, pl.ds(i * group, group)], arrived.at[place]))

    def compute(step):
        transfers(step, lambda copy: copy.wait())
        place = jax.lax.rem(step, HELD)
        products = jax.lax.dot_general(x[...], ups[place], (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        neuron = step * each * group + jax.lax.broadcasted_iota(jnp.int32, products.shape, 1)
        active = jnp.where(neuron < count * group, jnp.maximum(products, 0), 0)  # beyond are groups that fill the last chunk
        out[...] += jnp.dot(active.astype(downs.dtype), downs[place], preferred_element_type=jnp.float32)

    def steady(step, _):
        transfers(step + ahead, lambda copy: copy.start())
        compute(step)

    out[...] = jnp.zeros_like(out)
    ahead = min(HELD - 1, steps)
    for step in range(ahead):
        transfers(step, lambda copy: copy.start())
    jax.lax.fori_loop(0, steps - ahead, steady, None)
    for step in range(steps - ahead, steps):
        compute(step)


@functools.partial(jax.jit, static_argnames=("group", "interpret"))
def ffn(x: Queries, up: Rows, down: Rows, groups: Int[AnyArray, " c"], *, group: int = 8, interpret=False) -> Float[Array, "b d"]:
    """The layer's output (b, d), float32, for x (b, d) over up and down (f, d), from the neurons in groups (c,) alone.

    A group given twice counts twice. `interpret` runs it without a TPU (see pallas_call). Raises ValueError when a group is no
    multiple of 8 rows.
    """
    if group % 8:
        raise ValueError(f"group = {group}: expected a multiple of 8, the rows of a tile of HBM")
    (b, d), count = x.shape, len(groups)
    steps = -(-count * group // TALL)
    each = -(-count // steps)
    padded = jnp.pad(x, ((0, -b % (32 // x.dtype.itemsize)), (0, 0)))
    listed = jnp.pad(groups.astype(jnp.int32), (0, steps * each - count))
    held, anywhere, near = (HELD, each * group, d), pl.BlockSpec(memory_space=pl.ANY), pl.BlockSpec(memory_space=pltpu.VMEM)
    spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        in_specs=[near, anywhere, anywhere],
        out_specs=near,
        scratch_shapes=[pltpu.VMEM(held, up.dtype), pltpu.VMEM(held, down.dtype), pltpu.SemaphoreType.DMA((HELD,))],
    )
    call = pl.pallas_call(
        functools.partial(kernel, group=group, count=count, each=each),
        grid_spec=spec,
        out_shape=jax.ShapeDtypeStruct(padded.shape, jnp.float32),
        interpret=interpret,
    )
    return call(listed, padded, up, down)[:b]

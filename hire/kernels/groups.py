"""A ReLU FFN of chosen groups of neurons, as one Pallas TPU kernel: both matrices are read group by group, many at a time.

The reference is `ffn_reference`. A group of 8 rows is one tile of HBM, so one contiguous transfer. The best of the groups that were
chosen may be kept alone: `down` is then read for the others too and their neurons are set to 0, since waiting for a selection
before the first transfer of `down` would take longer than these bytes.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from hire.axes import AnyArray, Array, Float, Int, Rows

TALL = 128  # rows of a chunk, at most: as many as the matrix unit is wide
HELD = 4  # chunks in VMEM: while one is computed with, the next three (1.2 MB at a width of 1536) are on their way


def ffn_reference(
    x: Float[AnyArray, "b n d"], up: Rows, down: Rows, groups: Int[AnyArray, "b c"], *, k: int, group: int = 8
) -> Float[Array, "b n d"]:
    """What `ffn` computes, in plain JAX."""

    def one(x, groups):
        rows = (groups[:, None] * group + jnp.arange(group)[None]).reshape(-1)
        active = jnp.maximum(jnp.matmul(x, up[rows].T, preferred_element_type=jnp.float32), 0)
        sums = jnp.sum(active.reshape(len(x), -1, group), axis=-1)
        last = jnp.sort(sums, axis=-1)[:, -k, None]
        active = jnp.where(jnp.repeat(sums >= last, group, axis=1), active, 0)
        return jnp.matmul(active.astype(down.dtype), down[rows], preferred_element_type=jnp.float32)

    return jax.lax.map(lambda part: one(*part), (x, groups))


def kernel(groups, x, up, down, out, active, held, arrived, *, group: int, count: int, each: int, k: int):
    """groups (b, steps * each) in SMEM; x and out (1, n, d), of a call, and active (steps, n, rows) in VMEM; up and down in HBM."""
    call, (steps, _, tall) = pl.program_id(0), active.shape

    def chunk(i):
        return held.at[i % HELD], arrived.at[i % HELD]

    def fetch(i):
        matrix = up if i < steps else down
        into, done = chunk(i)
        for j in range(each):
            source = pl.ds(pl.multiple_of(groups[call, i % steps * each + j] * group, group), group)
            pltpu.make_async_copy(matrix.at[source], into.at[pl.ds(j * group, group)], done).start()

    def arrive(i):
        into, done = chunk(i)
        pltpu.make_async_copy(up.at[pl.ds(0, tall)], into, done).wait()  # for as many bytes
        if i + HELD < 2 * steps:
            late.append(i + HELD)
        return into[...]

    late = []
    for i in range(min(HELD, 2 * steps)):
        fetch(i)
    for i in range(steps):
        rows = arrive(i)
        products = jax.lax.dot_general(x[0], rows, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        while late:
            fetch(late.pop())
        neuron = i * tall + jax.lax.broadcasted_iota(jnp.int32, products.shape, 1)
        active[i] = jnp.where(neuron < count * group, jnp.maximum(products, 0), 0)  # beyond are groups that fill the last chunk
    if k < count:
        keep_best(active, k, group)
    out[...] = jnp.zeros_like(out)
    for i in range(steps):
        rows = arrive(steps + i)
        out[0] += jnp.dot(active[i].astype(rows.dtype), rows, preferred_element_type=jnp.float32)
        while late:
            fetch(late.pop())


def keep_best(active, k: int, group: int) -> None:
    """Set to 0 what is not in the k groups with the largest sums: their k-th is found bit by bit, as in `hire.topk.kth_score`."""
    steps, n, tall = active.shape
    one, other = (jax.lax.div(jax.lax.broadcasted_iota(jnp.int32, (tall, tall), axis), jnp.int32(group)) for axis in (0, 1))
    same = jnp.where(one == other, 1.0, 0.0).astype(jnp.bfloat16)

    def sums(rest):
        total = jnp.zeros_like(rest)
        for _ in range(3):  # the matrix unit takes bfloat16: three of them are a float32
            part = rest.astype(jnp.bfloat16)
            total, rest = total + jnp.dot(part, same, preferred_element_type=jnp.float32), rest - part.astype(jnp.float32)
        return total

    keys = [jax.lax.bitcast_convert_type(sums(active[i]), jnp.int32) for i in range(steps)]  # sums are not negative: in their order

    def settle(step, found):
        trial = found | jax.lax.shift_left(1, 30 - step)
        above = sum(jnp.sum(jnp.where(key >= trial, 1.0, 0.0), axis=1, keepdims=True) for key in keys)
        return jnp.where(above >= k * group, trial, found)

    last = jax.lax.fori_loop(0, 31, settle, jnp.zeros((n, 1), jnp.int32))
    for i, key in enumerate(keys):
        active[i] = jnp.where(key >= last, active[i], 0)


def takes(group: int) -> bool:
    """Whether a group of so many rows is whole tiles of HBM, and chunks are whole groups."""
    return group % 8 == 0 and TALL % group == 0


@functools.partial(jax.jit, static_argnames=("k", "group", "interpret"))
def ffn(
    x: Float[AnyArray, "b n d"], up: Rows, down: Rows, groups: Int[AnyArray, "b c"], *, k: int, group: int = 8, interpret=False
) -> Float[Array, "b n d"]:
    """The layer's output (b, n, d), float32, over up and down (f, d): of b calls of n queries x (b, n, d) that share groups (b, c).

    Each query keeps the k groups of the largest sums of activations among its call's c. A group given twice counts twice.
    `interpret` runs it without a TPU (see pallas_call). Raises ValueError for a group of other than 8, 16, 32, 64 or 128 rows.
    """
    if not takes(group):
        raise ValueError(f"group = {group}: expected 8, 16, 32, 64 or {TALL}, whole tiles of HBM")
    (b, n, d), count = x.shape, groups.shape[1]
    steps = -(-count * group // TALL)
    each = -(-count // steps)
    padded = jnp.pad(x.astype(up.dtype), ((0, 0), (0, -n % (32 // up.dtype.itemsize)), (0, 0)))
    listed = jnp.pad(groups.astype(jnp.int32), ((0, 0), (0, steps * each - count)))
    block, tall, anywhere = (1, *padded.shape[1:]), each * group, pl.BlockSpec(memory_space=pl.ANY)
    near = pl.BlockSpec(block, lambda i, *_: (i, 0, 0))
    call = pl.pallas_call(
        functools.partial(kernel, group=group, count=count, each=each, k=k),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(b,),
            in_specs=[near, anywhere, anywhere],
            out_specs=near,
            scratch_shapes=[
                pltpu.VMEM((steps, padded.shape[1], tall), jnp.float32),
                pltpu.VMEM((HELD, tall, d), up.dtype),
                pltpu.SemaphoreType.DMA((HELD,)),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(padded.shape, jnp.float32),
        # The addresses are the selection's own, so they are in range; checking each takes longer than the transfer's other work.
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), disable_bounds_checks=True),
        interpret=interpret,
    )
    return call(listed, padded, up, down)[:, :n]

"""Estimated scores of all rows from a quantized copy, and the best rows of every bucket by them, as one Pallas TPU kernel.

It is the first stage of the two-stage top-k, fused with the product that makes the scores: these never travel to HBM, only the
winners do. The reference is `scores_reference` and then `hire.kernels.keys.bucket_winners`.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from hire.axes import AnyArray, Array, Codes, Float, Int, Queries
from hire.kernels.keys import EMPTY, keys, mask

SUBLANES = 8  # queries are filled up to so many, or the product would not run on the matrix unit
BLOCK = 2**21  # bytes of codes in a transfer, about: large beside what a step costs, small beside VMEM
PART = 1024  # rows that are widened and multiplied at a time


def scores_reference(x: Queries, codes: Codes, scale: Float[AnyArray, " m"], *, bits: int) -> Float[Array, "b m"]:
    """The scores of which `winners` keeps the best, in plain JAX."""
    signed = jax.lax.bitcast_convert_type(codes, jnp.int8).astype(jnp.int32)
    if bits == 4:
        signed = jnp.concatenate([((signed & 15) ^ 8) - 8, signed >> 4], axis=1)
    return jnp.matmul(x, signed.astype(jnp.float32).T, precision="highest") * scale[None]


def pieces(codes: Codes, bits: int) -> list[Codes]:
    """What the products are taken of: the codes, or (4 bits) the lower halves of the bytes plus 8, and the bytes plus 8."""
    if bits == 8:
        return [codes]
    words = pltpu.bitcast(codes, jnp.int32) ^ 0x08080808  # whole words: this matrix unit's neighbour has no arithmetic of bytes
    return [pltpu.bitcast(part, jnp.int8) for part in (words & 0x0F0F0F0F, words)]


def kernel(queries, bias, codes, scale, out, *, bits: int, rows: int, layers: int, cut: int):
    """queries (1 or 2, b, r), bias (b, 1), codes (layers * buckets, _) and scale (1, layers * buckets) of a step, and out: VMEM."""
    step, (per_bucket, _, buckets) = pl.program_id(0), out.shape

    @pl.when(step == 0)
    def begin():
        out[...] = jnp.full_like(out, EMPTY)

    part = min(PART, buckets)
    for first in range(0, layers * buckets, part):
        inside, place = pl.ds(first, part), step * layers + first // buckets
        products = bias[...]
        for i, piece in enumerate(pieces(codes[inside], bits)):
            sides = queries[i], piece.astype(queries.dtype)
            products += jax.lax.dot_general(*sides, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        key = keys(products * scale[:, inside], place, cut)
        row = step * layers * buckets + first + jax.lax.broadcasted_iota(jnp.int32, key.shape, 1)
        key = jnp.where(row < rows, key, EMPTY)
        for rank in range(per_bucket):
            best = out[rank, :, pl.ds(first % buckets, part)]
            out[rank, :, pl.ds(first % buckets, part)] = jnp.maximum(best, key)
            key = jnp.minimum(best, key)


def takes(buckets: int) -> bool:
    """Whether so many buckets are whole tiles."""
    return buckets in (128, 256, 512) or buckets % PART == 0


@functools.partial(jax.jit, static_argnames=("bits", "buckets", "per_bucket", "interpret"))
def winners(
    x: Queries, codes: Codes, scale: Float[AnyArray, " m"], *, bits: int, buckets: int, per_bucket: int, interpret=False
) -> Int[Array, "w b n"]:
    """Keys (per_bucket, b, buckets) of the best rows of every bucket for queries (b, r); row i is in bucket i mod buckets.

    codes (m, r) of 8 bits, or (m, r / 2) with two of 4 bits in a byte, and scale (m,) are those of `hire.Quantized`; for keys see
    `hire.kernels.keys`. Queries are rounded to bfloat16. `interpret` runs it without a TPU (see pallas_call). Raises ValueError
    when buckets are no multiple of 128, or of 1024 and more than that.
    """
    if not takes(buckets):
        raise ValueError(f"buckets = {buckets}: expected 128, 256, 512, or a multiple of {PART}")
    (b, _), (m, width) = x.shape, codes.shape
    depth = -(-m // buckets)
    x, bias = jnp.pad(x, ((0, -b % SUBLANES), (0, 0))).astype(jnp.float32), jnp.zeros((b + -b % SUBLANES, 1), jnp.float32)
    queries = [x]
    if bits == 4:  # a byte is 16 high + low, where low is the lower half plus 8
        low, high = x[:, :width], jnp.pad(x[:, width:], ((0, 0), (0, 2 * width - x.shape[1]))) / 16
        queries, bias = [low - high, high], -8 * jnp.sum(low, axis=1, keepdims=True)
    layers = min(depth, max(1, BLOCK // (width * buckets)))
    queries = jnp.stack(queries).astype(jnp.bfloat16)
    shape = (per_bucket, len(x), buckets)
    call = pl.pallas_call(
        functools.partial(kernel, bits=bits, rows=m, layers=layers, cut=mask(depth)),
        grid=(-(-depth // layers),),
        in_specs=[
            pl.BlockSpec(queries.shape, lambda i: (0, 0, 0)),
            pl.BlockSpec(bias.shape, lambda i: (0, 0)),
            pl.BlockSpec((layers * buckets, width), lambda i: (i, 0)),
            pl.BlockSpec((1, layers * buckets), lambda i: (0, i)),
        ],
        out_specs=pl.BlockSpec(shape, lambda i: (0, 0, 0)),
        out_shape=jax.ShapeDtypeStruct(shape, jnp.int32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        interpret=interpret,
    )
    return call(queries, bias, codes, scale[None])[:, :b]

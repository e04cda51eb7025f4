"""Scores of quantized rows and the best rows of every bucket, as one Pallas TPU kernel.

The kernel is the first stage of the two-stage top-k, fused with the product that computes the
scores. The scores never go to HBM, only the winners do. The reference is `scores_reference`,
followed by `hire.ops.sortable.best_of_buckets`.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from hire.ops.sortable import EMPTY, index_mask, pack_score_index
from hire.types import AnyArray, Array, Codes, Float, Int, Queries

# Queries are padded to a multiple of 8. Otherwise the product would not run on the matrix unit.
SUBLANES = 8
# Approximate bytes of codes in a transfer: many compared with the cost of a step, few compared with
# VMEM.
BLOCK = 2**21
# Rows that are converted and multiplied at a time.
PART = 1024


def scores_reference(
    x: Queries, codes: Codes, scale: Float[AnyArray, " m"], *, bits: int
) -> Float[Array, "b m"]:
    """Return the scores of all rows in plain JAX; `bucket_top_k` keeps the best of them.

    Args:
        x: Queries `(b, r)`.
        codes: Codes `(m, r)` at 8 bits, or `(m, r / 2)` at 4 bits.
        scale: Scales of the rows `(m,)`.
        bits: 8 or 4.

    Returns:
        Scores, float32 `(b, m)`.
    """
    signed = jax.lax.bitcast_convert_type(codes, jnp.int8).astype(jnp.int32)
    if bits == 4:
        signed = jnp.concatenate([((signed & 15) ^ 8) - 8, signed >> 4], axis=1)
    return jnp.matmul(x, signed.astype(jnp.float32).T, precision="highest") * scale[None]


def pieces(codes: Codes, bits: int) -> list[Codes]:
    """Return the right operands of the products.

    Args:
        codes: A block of codes.
        bits: 8 or 4.

    Returns:
        The codes at 8 bits. At 4 bits the lower halves of the bytes plus 8, and the bytes plus 8.
    """
    if bits == 8:
        return [codes]
    # 32-bit integers, because the vector unit has no arithmetic on bytes.
    packed = pltpu.bitcast(codes, jnp.int32) ^ 0x08080808
    return [pltpu.bitcast(operand, jnp.int8) for operand in (packed & 0x0F0F0F0F, packed)]


def kernel(queries, bias, codes, scale, out, *, bits: int, rows: int, layers: int, cut: int):
    """Update the winners of every bucket with the rows of one step.

    All arguments are in VMEM.

    Args:
        queries: One or two arrays of queries, `(1 or 2, b, r)`.
        bias: First summand of the products `(b, 1)`.
        codes: Codes of this step's rows `(layers * buckets, _)`.
        scale: Scales of this step's rows `(1, layers * buckets)`.
        out: Packed winners `(per_bucket, b, buckets)`.
        bits: 8 or 4.
        rows: Number of rows, m.
        layers: Rows of each bucket in one step.
        cut: Mask of the position, see `index_mask`.
    """
    step, (per_bucket, _, buckets) = pl.program_id(0), out.shape

    @pl.when(step == 0)
    def begin():
        out[...] = jnp.full_like(out, EMPTY)

    chunk_size = min(PART, buckets)
    for first in range(0, layers * buckets, chunk_size):
        chunk, position = pl.ds(first, chunk_size), step * layers + first // buckets
        products = bias[...]
        for i, rhs in enumerate(pieces(codes[chunk], bits)):
            operands = queries[i], rhs.astype(queries.dtype)
            products += jax.lax.dot_general(
                *operands, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
            )
        packed = pack_score_index(products * scale[:, chunk], position, cut)
        row_indices = (
            step * layers * buckets + first + jax.lax.broadcasted_iota(jnp.int32, packed.shape, 1)
        )
        packed = jnp.where(row_indices < rows, packed, EMPTY)
        for rank in range(per_bucket):
            bucket_maxima = out[rank, :, pl.ds(first % buckets, chunk_size)]
            out[rank, :, pl.ds(first % buckets, chunk_size)] = jnp.maximum(bucket_maxima, packed)
            packed = jnp.minimum(bucket_maxima, packed)


def is_supported(buckets: int) -> bool:
    """Return whether this number of buckets is made of complete tiles."""
    return buckets in (128, 256, 512) or buckets % PART == 0


@functools.partial(jax.jit, static_argnames=("bits", "buckets", "per_bucket", "interpret"))
def bucket_top_k(
    x: Queries,
    codes: Codes,
    scale: Float[AnyArray, " m"],
    *,
    bits: int,
    buckets: int,
    per_bucket: int,
    interpret=False,
) -> Int[Array, "w b n"]:
    """Return the best rows of every bucket for each query.

    Row i is in bucket i mod `buckets`. Queries are rounded to bfloat16.

    Args:
        x: Queries `(b, r)`.
        codes: Codes of `hire.Quantized`: `(m, r)` at 8 bits, or `(m, r / 2)` at 4 bits, two in a
            byte.
        scale: Scales of `hire.Quantized` `(m,)`.
        bits: 8 or 4.
        buckets: Number of buckets.
        per_bucket: Rows that each bucket keeps.
        interpret: Run the kernel without a TPU, see `pallas_call`.

    Returns:
        Packed integers `(per_bucket, b, buckets)`, see `hire.ops.sortable`.

    Raises:
        ValueError: If `buckets` is neither 128, 256 or 512 nor a multiple of 1024.
    """
    if not is_supported(buckets):
        raise ValueError(f"buckets = {buckets}: expected 128, 256, 512, or a multiple of {PART}")
    (b, _), (m, width) = x.shape, codes.shape
    depth = -(-m // buckets)
    x, bias = (
        jnp.pad(x, ((0, -b % SUBLANES), (0, 0))).astype(jnp.float32),
        jnp.zeros((b + -b % SUBLANES, 1), jnp.float32),
    )
    queries = [x]
    if bits == 4:  # a byte of `pieces` is 16 high + low, where low is the lower half plus 8
        low, high = x[:, :width], jnp.pad(x[:, width:], ((0, 0), (0, 2 * width - x.shape[1]))) / 16
        queries, bias = [low - high, high], -8 * jnp.sum(low, axis=1, keepdims=True)
    layers = min(depth, max(1, BLOCK // (width * buckets)))
    queries = jnp.stack(queries).astype(jnp.bfloat16)
    shape = (per_bucket, len(x), buckets)
    call = pl.pallas_call(
        functools.partial(kernel, bits=bits, rows=m, layers=layers, cut=index_mask(depth)),
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

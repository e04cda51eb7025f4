"""Programs that others measured on a TPU v5e, listed in figures/published.yaml.

They validate the estimates. None of these published times was used to build the estimate.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from hire.lab.tpu.programs import Program, decode_step, nbytes
from hire.models import DecoderConfig
from hire.types import AnyArray, Array

# The shapes of Llama 3 8B with 16 of its 32 layers. Our decoder ties the embedding, normalises
# queries and keys, and uses GELU where Llama uses SiLU. A step still reads the same bytes and
# computes the same products.
LLAMA = DecoderConfig(
    vocabulary=128256,
    width=4096,
    layers=16,
    heads=32,
    kv_heads=8,
    head_width=128,
    ffn_width=14336,
    global_every=1,
)


def shaped(*shape: int, dtype=jnp.bfloat16) -> jax.ShapeDtypeStruct:
    """Return a shape in bfloat16, unless `dtype` says otherwise."""
    return jax.ShapeDtypeStruct(shape, dtype)


def of(
    function: Callable[..., Array], *arguments: jax.ShapeDtypeStruct, reads: int | None = None
) -> Program:
    """Wrap a function of arrays as a program.

    Args:
        function: Function of arrays.
        arguments: shapes; the first one becomes x.
        reads: Bytes that a call must move. Default: all arguments and the result.
    """
    moved_bytes = nbytes([*arguments, *jax.tree.leaves(jax.eval_shape(function, *arguments))])
    return Program(
        lambda rest, x: function(x, *rest),
        list(arguments[1:]),
        arguments[0],
        moved_bytes if reads is None else reads,
    )


def matmul(m: int, k: int, n: int) -> Program:
    """Build the matrix product `(m, k)` @ `(k, n)`."""
    return of(jnp.matmul, shaped(m, k), shaped(k, n))


def masked_softmax(scores: AnyArray) -> Array:
    """Return the causally masked softmax of attention scores (…, queries, keys)."""
    future = jnp.arange(scores.shape[-1])[None] > jnp.arange(scores.shape[-2])[:, None]
    return jax.nn.softmax(
        scores.astype(jnp.float32) * 128**-0.5 + jnp.where(future, -jnp.inf, 0.0), -1
    ).astype(scores.dtype)


def normed(x: AnyArray, scale: AnyArray) -> Array:
    """Return the RMS norm of x, computed in float32, times `scale`."""
    x_f32 = x.astype(jnp.float32)
    return jnp.asarray(
        (x_f32 * jax.lax.rsqrt(jnp.mean(x_f32 * x_f32, -1, keepdims=True) + 1e-5)).astype(x.dtype)
        * scale
    )


def programs() -> dict[str, Program]:
    """Return all programs by the names of their records."""
    return {f"published: {name}": make() for name, make in PROGRAMS.items()}


PROGRAMS: dict[str, Callable[[], Program]] = {
    "product 4096": lambda: matmul(4096, 4096, 4096),
    "product 8192": lambda: matmul(8192, 8192, 8192),
    "product long": lambda: matmul(256, 65536, 256),
    "product batch 256": lambda: matmul(256, 8192, 8192),
    "product batch 32": lambda: matmul(32, 8192, 8192),
    "softmax rows, batch 1": lambda: matmul(1, 4096, 128256),
    "FFN rows, batch 1": lambda: matmul(1, 4096, 14336),
    "attention scores": lambda: of(
        lambda a, b: jnp.einsum("bmk,bkn->bmn", a, b), shaped(256, 4, 128), shaped(256, 128, 2048)
    ),
    "masked softmax": lambda: of(masked_softmax, shaped(8, 4, 2048, 2048)),
    "norm": lambda: of(normed, shaped(2048, 4096), shaped(4096)),
    "argmax": lambda: of(lambda x: jnp.argmax(x, -1), shaped(32, 128256)),
    "sum of 4 GiB": lambda: of(lambda x: jnp.sum(x, dtype=jnp.float32), shaped(2**21, 1024)),
    "add of 1 GiB": lambda: of(jnp.add, shaped(2**19, 1024), shaped(2**19, 1024)),
    "SiLU of 64 MiB": lambda: of(jax.nn.silu, shaped(2**15, 1024)),
    "gather of 2048 rows": lambda: of(
        lambda at, rows: rows[at],
        shaped(2048, dtype=jnp.int32),
        shaped(128256, 4096),
        reads=2 * 2048 * 4096 * 2,
    ),
    "exact top-64": lambda: of(lambda x: jax.lax.top_k(x, 64)[1], shaped(32, 201088)),
    "decode step, batch 1": lambda: decode_step(LLAMA, 1, 2048),
    "decode step, batch 8": lambda: decode_step(LLAMA, 8, 2048),
}

"""Random arguments of the kernels for tests and, as shapes (`jax.eval_shape`), for estimates.

Indices are unsorted, and some repeat.
"""

import jax
import jax.numpy as jnp

from hire.types import Array


def of_rows(
    *, b: int, c: int, m: int, d: int, dtype=jnp.bfloat16, seed: int = 0
) -> tuple[Array, ...]:
    """Return x, blocks and indices for `row_scores.scores`.

    Their shapes are `(b, d)`, `(m, d / 128, 128)` and `(b, c)`.
    """
    keys = jax.random.split(jax.random.key(seed), 3)
    blocks = jax.random.normal(keys[1], (m, d // 128, 128), dtype)
    return (
        jax.random.normal(keys[0], (b, d), dtype),
        blocks,
        jax.random.randint(keys[2], (b, c), 0, m),
    )


def of_groups(
    *, b: int, n: int, c: int, f: int, d: int, group: int = 8, dtype=jnp.bfloat16, seed: int = 0
) -> tuple[Array, ...]:
    """Return x, up, down and groups for `group_ffn.ffn`.

    Their shapes are `(b, n, d)`, `(f, d)`, `(f, d)` and `(b, c)`.
    """
    keys = jax.random.split(jax.random.key(seed), 4)
    up, down = (jax.random.normal(key, (f, d), dtype) / d**0.5 for key in keys[1:3])
    return (
        jax.random.normal(keys[0], (b, n, d), dtype),
        up,
        down,
        jax.random.randint(keys[3], (b, c), 0, f // group),
    )


def of_scores(*, b: int, m: int, d: int, bits: int, seed: int = 0) -> tuple[Array, ...]:
    """Return x, codes and scales for `bucket_scores.bucket_top_k`.

    Their shapes are `(b, d)`, `(m, d)` at 8 bits or `(m, d / 2)` at 4 bits, and `(m,)`.
    """
    keys = jax.random.split(jax.random.key(seed), 3)
    codes = jax.random.randint(keys[1], (m, d * bits // 8), 0, 256).astype(jnp.uint8)
    scale = jax.random.uniform(keys[2], (m,), minval=0.5)
    return (
        jax.random.normal(keys[0], (b, d)),
        jax.lax.bitcast_convert_type(codes, jnp.int8) if bits == 8 else codes,
        scale,
    )

"""Random arguments of the kernels, for tests and measurements.

Indices are unsorted, and some repeat.
"""

import jax
import jax.numpy as jnp

from hire.ops.quantization import QuantizedRows, quantize
from hire.types import Array, Rows


def stored_rows(storage: str, *, m: int, d: int, seed: int = 0) -> Rows | QuantizedRows:
    """Return rows `(m, d)` in "float32", "bfloat16", "int8" or "int4"."""
    rows = jax.random.normal(jax.random.key(seed), (m, d), jnp.float32)
    if storage in ("int8", "int4"):
        return quantize(rows, int(storage.removeprefix("int")))
    return rows.astype(storage)


def of_rows(
    storage: str, *, b: int, c: int, m: int, d: int, seed: int = 0
) -> tuple[Array, Rows | QuantizedRows, Array]:
    """Return x `(b, d)`, rows `(m, d)` and indices `(b, c)`."""
    keys = jax.random.split(jax.random.key(seed), 2)
    return (
        jax.random.normal(keys[0], (b, d), jnp.float32),
        stored_rows(storage, m=m, d=d, seed=seed + 1),
        jax.random.randint(keys[1], (b, c), 0, m),
    )


def of_groups(
    storage: str, *, b: int, calls: int, c: int, groups: int, group: int, d: int, seed: int = 0
) -> tuple[Array, Rows | QuantizedRows, Rows | QuantizedRows, Rows | QuantizedRows, Array]:
    """Return x `(b, d)`, up, down and gate `(f, d)`, and indices `(calls, c)` for `group_ffn`.

    No index repeats within a call: the same group twice would tie with itself.
    """
    keys = jax.random.split(jax.random.key(seed), 1 + calls)
    chosen = [jax.random.permutation(key, groups)[:c] for key in keys[1:]]
    matrices = [
        stored_rows(storage, m=groups * group, d=d, seed=seed + place) for place in range(3)
    ]
    up, down, gate = matrices
    return jax.random.normal(keys[0], (b, d), jnp.float32), up, down, gate, jnp.stack(chosen)


def of_attention(
    storage: str, *, b: int, h: int, n: int, s: int, e: int, seed: int = 0
) -> tuple[Array, ...]:
    """Return queries, keys, values, new keys and values, and the mask, for `attention.attend`."""
    shapes = [(b, h, e), (b, s, n, e), (b, s, n, e), (b, n, e), (b, n, e)]
    keys = jax.random.split(jax.random.key(seed), 6)
    queries, *cache, new_keys, new_values = (
        jax.random.normal(key, shape) for key, shape in zip(keys[:5], shapes, strict=True)
    )
    mask = jax.random.uniform(keys[5], (s,)) < 0.7
    return queries, *(part.astype(storage) for part in cache), new_keys, new_values, mask

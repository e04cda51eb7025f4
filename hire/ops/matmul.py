"""Matrix products with float32 accumulation."""

import jax.numpy as jnp

from hire.ops.implementation import by_platform
from hire.types import AnyArray, Array, Float

HALF_TYPES = (jnp.bfloat16, jnp.float16)


def matmul_f32(
    one: AnyArray, other: AnyArray, pattern: str | None = None, precision: str | None = None
) -> Float[Array, "..."]:
    """Multiply two arrays and sums in float32.

    Two operands of the same 16-bit float type are multiplied in that type. All others are
    multiplied as float32. No operand is ever rounded to the type of the other.

    A CPU converts 16-bit operands to float32, too. For one query XLA fuses that cast into the
    product, which is then faster than XLA's bfloat16 product; the XLA of jax 0.7 has no bfloat16
    product.

    Args:
        one: Left operand.
        other: Right operand.
        pattern: An einsum pattern. None computes `one @ other`.
        precision: Precision of the product, as in `jnp.matmul`.

    Returns:
        The product, float32.
    """

    def multiply(one: AnyArray, other: AnyArray) -> Float[Array, "..."]:
        if pattern is None:
            return jnp.matmul(one, other, precision=precision, preferred_element_type=jnp.float32)
        return jnp.einsum(
            pattern, one, other, precision=precision, preferred_element_type=jnp.float32
        )

    if one.dtype == other.dtype and one.dtype in HALF_TYPES:
        return by_platform(
            lambda: multiply(one.astype(jnp.float32), other.astype(jnp.float32)),
            lambda: multiply(one, other),
        )
    return multiply(one.astype(jnp.float32), other.astype(jnp.float32))

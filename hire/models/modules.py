"""Small modules and weight matrices of the decoder."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from hire.models.sharding import partition_spec, with_auto_axes
from hire.ops.row_products import row_scores, weighted_row_sum
from hire.types import Array, Float, Rows

module_list = getattr(nnx, "List", list)  # flax before 0.12 has no nnx.List; it tracks plain lists


class RMSNorm(nnx.Module):
    """Root-mean-square norm: x / rms(x) * scale.

    Attributes:
        scale: The complete factor, `(width,)`. Files that store the factor minus one are converted
            when they are loaded.
        epsilon: Number that is added to the mean square.
    """

    def __init__(self, width: int, dtype, epsilon: float = 1e-6):
        self.scale = nnx.Param(jnp.ones((width,), dtype))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        exact = x.astype(jnp.float32)
        mean_square = jnp.mean(exact**2, axis=-1, keepdims=True)
        scale = jnp.expand_dims(self.scale[...].astype(jnp.float32), range(x.ndim - 1))
        return (exact * jax.lax.rsqrt(mean_square + self.epsilon) * scale).astype(x.dtype)


@functools.cache
def normal_initializer(
    shape: tuple[int, int], fan_in: int, dtype, lies: P | None
) -> Callable[[jax.Array], Rows]:
    # One program per matrix needs memory for four such matrices. One program for the entire model
    # would need it for all matrices at once. On a mesh this holds for the rows on each device.
    """Returns a compiled function that initializes one matrix from a PRNG key.

    Args:
        shape: Shape of the matrix.
        fan_in: The elements are normal with variance 1 / fan_in.
        dtype: Type of the elements.
        lies: Sharding of the matrix on the mesh, or None without a mesh.
    """

    def draw(key: jax.Array) -> Rows:
        return jax.random.normal(key, shape, dtype) * jnp.asarray(fan_in**-0.5, dtype)

    out_sharding = P() if lies is None else lies
    return jax.jit(
        lambda key: with_auto_axes(draw, key, out_sharding=out_sharding), out_shardings=lies
    )


def matrix(rngs: nnx.Rngs, rows: int, columns: int, fan_in: int, dtype) -> nnx.Param:
    """Creates a weight with normal elements of variance 1 / fan_in.

    Args:
        rngs: Random number generators.
        rows: Number of rows.
        columns: Number of columns.
        fan_in: Number of inputs that each output sums.
        dtype: Type of the elements.

    Returns:
        The weight, `(rows, columns)`. If there is a mesh, the weight is sharded over it.
    """
    return nnx.Param(
        normal_initializer((rows, columns), fan_in, dtype, partition_spec(rows, columns))(
            rngs.params()
        )
    )


def linear(
    x: Float[Array, "*b d"], weight: nnx.Param, bias: nnx.Param | None = None
) -> Float[Array, "*b f"]:
    """Multiplies inputs by every row of a weight.

    Args:
        x: Inputs, `(*b, d)`.
        weight: Weight, `(f, d)`.
        bias: Number to add to each product, `(f,)`. None adds nothing.

    Returns:
        The products, `(*b, f)`, in the type of `x`.
    """
    products = row_scores(x.reshape(-1, x.shape[-1]), weight[...])
    if bias is not None:
        products = products + bias[...].astype(products.dtype)[None]
    return products.reshape(*x.shape[:-1], weight.shape[0]).astype(x.dtype)


def mix(shares: Float[Array, "*b f"], weight: nnx.Param) -> Float[Array, "*b d"]:
    """Sums the rows of a weight, each times its share.

    Args:
        shares: Factor of each row, `(*b, f)`.
        weight: Weight, `(f, d)`.

    Returns:
        The sums, `(*b, d)`, in the type of `shares`.
    """
    return weighted_row_sum(shares, weight[...]).astype(shares.dtype)

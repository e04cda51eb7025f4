"""Bounds on the error of estimated scores, for proofs that an answer is exact."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from hire.ops.quantization import QuantizedRows, dequantize
from hire.types import AnyArray, Array, Float, Rows

UNIT_ROUNDOFF = 2.0**-24  # of float32


# Larger than what a sum of up to 2^20 products loses where terms are below the smallest normal
# number.
UNDERFLOW = 2.0**-112


# Bounds are computed for rows with this many entries at a time: 256 MB for a low-rank estimator.
BOUNDS_AT_ONCE = 2**26


def length(vectors: Float[Array, "*b d"]) -> Float[Array, "*b"]:
    """Return upper bounds on the lengths of vectors.

    The vectors are first scaled by their largest entry, so that no square overflows or underflows.

    Args:
        vectors: Vectors `(*b, d)`.

    Returns:
        Lengths `(*b,)`, never below the true lengths.
    """
    [size] = largest_entries(vectors)
    [squared] = scaled_squares([size], vectors)
    return length_of_square(squared, size, vectors.shape[-1])


# Largest entries and sums are separate programs: fused with the code that uses them, they take XLA
# 20 times as long.
@jax.jit
def largest_entries(*arrays: Float[Array, "..."]) -> list[Float[Array, "..."]]:
    """Return the largest magnitude in each vector.

    The magnitudes are clipped to a range in which the inverse is a normal number, because XLA
    multiplies by the inverse even where the code divides.

    Args:
        *arrays: Arrays of vectors `(..., d)`.

    Returns:
        One array of magnitudes (...) for each argument.
    """
    return [jnp.clip(jnp.max(jnp.abs(vectors), axis=-1), 2.0**-100, 2.0**100) for vectors in arrays]


@jax.jit
def scaled_squares(
    sizes: list[Float[Array, "..."]], *arrays: Float[Array, "..."]
) -> list[Float[Array, "..."]]:
    """Return the squared lengths of vectors after division by their sizes.

    Args:
        sizes: Sizes of the vectors, see `largest_entries`.
        *arrays: Arrays of vectors `(..., d)`.

    Returns:
        One array of squared lengths (...) for each argument.
    """
    inverses = jax.lax.optimization_barrier([1 / size for size in sizes])
    return [
        jnp.sum((vectors * inverse[..., None]) ** 2, axis=-1)
        for vectors, inverse in zip(arrays, inverses, strict=True)
    ]


def length_of_square(
    squared: Float[Array, "*b"], size: Float[Array, "*b"], width: int
) -> Float[Array, "*b"]:
    """Return the lengths of vectors from their scaled squares, rounded up.

    Args:
        squared: Squared lengths `(*b,)`, see `scaled_squares`.
        size: Sizes `(*b,)` by which the vectors were divided.
        width: Entries of a vector.

    Returns:
        Lengths `(*b,)`.
    """
    return jnp.sqrt(squared) * size * jnp.float32(1 + (width + 16) * UNIT_ROUNDOFF)


@jax.jit
def largest_of_copy(
    rows: Rows, rebuilt: Rows | QuantizedRows, *parts: AnyArray | QuantizedRows
) -> list[Float[Array, "_"]]:
    """Return `largest_entries` of the `vectors_of_copy`."""
    return largest_entries(*vectors_of_copy(rows, rebuilt, *parts))


@jax.jit
def squares_of_copy(
    sizes: list[Float[Array, "_"]],
    rows: Rows,
    rebuilt: Rows | QuantizedRows,
    *parts: AnyArray | QuantizedRows,
) -> list[Float[Array, "_"]]:
    """Return `scaled_squares` of the `vectors_of_copy`."""
    return scaled_squares(sizes, *vectors_of_copy(rows, rebuilt, *parts))


def vectors_of_copy(
    rows: Rows, rebuilt: Rows | QuantizedRows, *parts: AnyArray | QuantizedRows
) -> list[Float[Array, "_ _"]]:
    """Return the vectors that enter the error bounds.

    Args:
        rows: Rows `(m, d)`.
        rebuilt: The rows as the estimator represents them `(m, d)`.
        *parts: The matrices from which the estimator computes a score.

    Returns:
        The difference of `rows` and `rebuilt`, then `rebuilt`, `rows` and the parts, all in
        float32.
    """
    exact, estimate = dequantize(rows), dequantize(rebuilt)
    return [exact - estimate, estimate, exact, *map(dequantize, parts)]


def error_bounds(
    rows: Rows, parts_of: Callable[[slice], tuple[AnyArray | QuantizedRows, ...]]
) -> Float[Array, " m"]:
    """Return how far the estimated score of each row may be from its exact score.

    The bounds include all rounding. They are valid for a query of length 1 if its largest entry,
    after scaling, is 1 or more. A bound is inf where it is not known to be finite.

    An exact score is the estimate plus the query's product with the row's residual, the part that
    the estimator leaves out. That product is at most the product of both lengths (Cauchy and
    Schwarz). Estimates are float32 sums of products of float32 numbers, whatever the types of the
    parts.

    Args:
        rows: Rows `(m, d)`.
        parts_of: Function of a slice of n rows. It returns these rows as the estimator represents
            them `(n, d)`. For a low-rank estimator it also returns the factors `(n, r)` and the
            projection `(r, d)` that the scores are computed from.

    Returns:
        Error bounds, float32 `(m,)`.
    """
    block_rows = max(1, BOUNDS_AT_ONCE // rows.shape[1])
    blocks = [slice(start, start + block_rows) for start in range(0, len(rows), block_rows)]
    bounds = [part_bounds(rows[block], *parts_of(block)) for block in blocks]
    return bounds[0] if len(bounds) == 1 else jnp.concatenate(bounds)


def part_bounds(
    rows: Rows, rebuilt: AnyArray | QuantizedRows, *parts: AnyArray | QuantizedRows
) -> Float[Array, " m"]:
    """Return the `error_bounds` of a part of the rows."""
    rows = jnp.asarray(rows)
    sizes = largest_of_copy(rows, rebuilt, *parts)
    squares = squares_of_copy(sizes, rows, rebuilt, *parts)
    widths = (rows.shape[1],) * 3 + tuple([part.shape[1] for part in parts])
    return bounds_of_squares(squares, sizes, widths)


@functools.partial(jax.jit, static_argnames="widths")
def bounds_of_squares(
    squares: list[Float[Array, "_"]], sizes: list[Float[Array, "_"]], widths: tuple[int, ...]
) -> Float[Array, " m"]:
    """Compute error bounds from the lengths of the `vectors_of_copy`.

    Args:
        squares: Scaled squares of the vectors.
        sizes: Largest entries of the vectors.
        widths: Entries of each vector.

    Returns:
        Error bounds, float32 `(m,)`.
    """
    residual_length, estimate_length, row_length, *part_lengths = map(
        length_of_square, squares, sizes, widths
    )
    width, projection_length = widths[0], jnp.float32(1.0)
    if part_lengths:  # a low-rank estimate sums products of vectors with these lengths
        estimate_length, projection_length = part_lengths[0], length(part_lengths[1])
    # A sum of n products, in any order, is off by at most n / 2^24 times the product of the lengths
    # of both vectors. An estimate takes two such sums of up to d products. The rebuilt rows take a
    # third. The rest is for scales, comparisons and the lengths.
    rounding = UNIT_ROUNDOFF * (3 * width + 40) * estimate_length * projection_length
    bounds = (1 + 16 * UNIT_ROUNDOFF) * (
        residual_length + rounding + exact_score_error(width) * row_length
    )
    bounds += UNDERFLOW * width * (1 + estimate_length) * (1 + projection_length)
    return jnp.where(jnp.isfinite(bounds), bounds, jnp.inf)


@jax.jit
def product_of_parts(
    factors: AnyArray | QuantizedRows, projection: AnyArray | QuantizedRows
) -> Float[Array, "m d"]:
    """Return factors `(m, r)` @ projection `(r, d)` in float32."""
    return jnp.matmul(dequantize(factors), dequantize(projection), precision="highest")


def exact_score_error(width: int) -> float:
    """Return the largest error of `hire.certify.pairwise_dot` for a row and a query of length 1.

    The pairwise sum rounds once in each step. A row or a query in float64 adds one rounding each.

    Args:
        width: Entries of a row, d.

    Returns:
        The largest error.
    """
    return UNIT_ROUNDOFF * (math.ceil(math.log2(width)) + 8)

"""Linear algebra of fitting: second moments of queries and leading directions."""

import math
from collections.abc import Iterable

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from hire.ops.array_cache import ArrayCache
from hire.ops.checks import cached_row_max
from hire.ops.matmul import matmul_f32
from hire.types import AnyArray, Queries, Rows


def scale_near_one(rows: Rows) -> tuple[Rows, int]:
    """Scale rows by a power of two if their squares may not be normal numbers.

    Args:
        rows: Rows `(m, d)`.

    Returns:
        The rows times `2 ** -exponent`, and `exponent`. It is 0 for rows that need no scaling.
    """
    if isinstance(rows, Tracer):
        return rows, 0
    largest = float(cached_row_max(rows).max())
    exponent = math.frexp(largest)[1]
    if abs(exponent) <= 30 or not 0 < largest < math.inf:
        return rows, 0
    factors = 2.0 ** -(exponent // 2), 2.0 ** -(exponent - exponent // 2)
    return jnp.asarray(rows).astype(jnp.float32) * jnp.float32(factors[0]) * jnp.float32(
        factors[1]
    ), exponent


def regularized_second_moment(
    calibration: Queries | Iterable[Queries] | None, shape: tuple[int, int], ridge: float = 1e-3
) -> np.ndarray:
    """Return the second moment of queries, scaled to a mean variance of 1, plus a ridge.

    Args:
        calibration: Queries `(n, d)`, or an iterable of batches of them. None stands for equal
            variance in every direction.
        shape: Shape `(m, d)` of the rows.
        ridge: Share of the mean variance to add to the diagonal.

    Returns:
        The second moment, float64 `(d, d)`.

    Raises:
        ValueError: If `ridge` is negative or not finite, if all queries are zero, or as in
            `second_moment`.
    """
    d = shape[1]
    if not 0 <= ridge < math.inf:
        raise ValueError(f"ridge = {ridge!r}: expected a finite number of at least 0")
    moment = np.eye(d) if calibration is None else second_moment(calibration, shape)
    if not np.trace(moment) > 0:
        raise ValueError(
            "calibration holds nothing but zeros: expected queries as the search will see them"
        )
    return moment / np.trace(moment) * d + ridge * np.eye(d)


def leading_directions(rows: Rows, covariance: np.ndarray, rank: int) -> np.ndarray:
    """Return the directions of queries that explain most of their scores.

    Args:
        rows: Rows `(m, d)`.
        covariance: Second moment of the queries `(d, d)`.
        rank: Number of directions, r.

    Returns:
        Directions `(r, d)`, each of variance 1.
    """
    # Solve the d x d problem in float64. With G = rowsᵀ rows and covariance = L Lᵀ, the right
    # singular vectors of rows @ L are the eigenvectors of Lᵀ G L. So the (m, d) matrix is only
    # multiplied.
    lower = np.linalg.cholesky(covariance)
    _, vectors = np.linalg.eigh(lower.T @ cached_gram_matrix(rows) @ lower)
    return np.linalg.solve(lower.T, vectors[:, ::-1][:, :rank]).T


def gram_matrix(rows: Rows) -> np.ndarray:
    """Return rowsᵀ rows `(d, d)` in float64."""
    return np.asarray(matmul_f32(rows, rows, "md,me->de", precision="highest"), np.float64)


# The Gram matrix takes most of the time of a fit, and many estimators are fitted to the same rows.
cached_gram_matrix = ArrayCache(gram_matrix)


def random_directions(d: int, rank: int) -> np.ndarray:
    """Return random orthonormal directions `(d, r)`, the same at every call."""
    return np.linalg.qr(np.random.default_rng(0).normal(size=(d, rank)))[0]


def second_moment(queries: Queries | Iterable[Queries], shape: tuple[int, int]) -> np.ndarray:
    """Return the second moment E[x xᵀ] of queries.

    Args:
        queries: Queries `(n, d)`, or an iterable of batches of them.
        shape: Shape `(m, d)` of the rows.

    Returns:
        The second moment, float64 `(d, d)`.

    Raises:
        ValueError: If a batch is not `(n, d)`, if there are no queries, or if a query is not
            finite.
    """
    (m, width), total, count = shape, None, 0
    for batch in [queries] if isinstance(queries, AnyArray) else queries:
        if batch.ndim != 2 or batch.shape[1] != width:
            hint = (
                " (rows stored (d, v)? pass rows.T)"
                if batch.ndim == 2 and batch.shape[1] == m
                else ""
            )
            raise ValueError(
                f"calibration of shape {batch.shape}: expected (n, {width}), the width of rows "
                f"{(m, width)}{hint}"
            )
        batch_f64 = np.asarray(batch, np.float64)
        total = batch_f64.T @ batch_f64 + (0 if total is None else total)
        count += len(batch_f64)
    if total is None or not count:
        raise ValueError("calibration has 0 queries: expected at least one")
    if not np.isfinite(total).all():
        raise ValueError("calibration holds a value that is not finite: expected finite queries")
    return total / count

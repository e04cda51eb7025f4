"""Estimates of the log-sum-exp over all rows from the exact scores of some rows."""

import jax
import jax.numpy as jnp

from hire.ops.top_k import exact_top_k
from hire.types import Array, Float


def take_ranks(
    exact: Float[Array, "b c"], guessed: Float[Array, "b c"], first: int, last: int | None = None
) -> tuple[Float[Array, "b n"], Float[Array, "b n"]]:
    """Select candidates by the rank of their estimated scores.

    The lower half of the candidates was nominated just like the rows beyond them. So its exact
    scores show how far the estimates of those rows are off.

    Args:
        exact: Exact scores of the candidates `(b, c)`.
        guessed: Estimated scores of the candidates `(b, c)`.
        first: First rank to select, from 0.
        last: Rank after the last one to select. None selects all from `first`.

    Returns:
        The exact and the estimated scores of the selected candidates, `(b, n)` each, ordered by
        estimated score, best first.
    """
    order = exact_top_k(guessed, last or guessed.shape[1]).indices[:, first:]
    return jnp.take_along_axis(exact, order, axis=1), jnp.take_along_axis(guessed, order, axis=1)


def log_sum_exp(scores: Float[Array, "b n"]) -> Float[Array, " b"]:
    """Return the log of the sum of the exponentials of each query's scores, `(b,)`.

    A query whose scores are all -inf has the result -inf, with a gradient of 0: that of
    jax.nn.logsumexp is NaN.

    Args:
        scores: Scores `(b, n)`.
    """
    is_empty = jnp.all(scores == -jnp.inf, axis=1)
    log_sum = jax.nn.logsumexp(jnp.where(is_empty[:, None], 0.0, scores), axis=1)
    return jnp.where(is_empty, -jnp.inf, log_sum)


def logsumexp_correction(
    exact: Float[Array, "b c"], guessed: Float[Array, "b c"]
) -> tuple[Float[Array, " b"], Float[Array, " b"]]:
    """Estimate the log-ratio of the exact to the estimated sum of exponentials.

    The rows count as a weighted sample.

    Args:
        exact: Exact scores `(b, c)`.
        guessed: Estimated scores `(b, c)`. -inf marks padding.

    Returns:
        The log of sum(exp(exact)) / sum(exp(guessed)), `(b,)`, and its sampling error, `(b,)`.
        Both are 0 for a query with padding only.
    """
    # Padding of a shard has no weight, and -inf minus -inf would be NaN.
    is_valid = guessed > -jnp.inf
    has_rows = is_valid.any(axis=1, keepdims=True)
    exact, guessed = jnp.where(has_rows, exact, 0.0), jnp.where(has_rows, guessed, 0.0)
    weights = jax.nn.softmax(guessed, axis=1)
    correction = jax.nn.logsumexp(exact, axis=1) - jax.nn.logsumexp(guessed, axis=1)
    relative_errors = jnp.where(
        is_valid, jnp.expm1(jnp.where(is_valid, exact - guessed, 0.0) - correction[:, None]), 0.0
    )
    return correction, jnp.sqrt(jnp.sum((weights * relative_errors) ** 2, axis=1))

"""Soft caps of scores, as in Gemma 2."""

import jax.numpy as jnp

from hire.types import Array, Float


def cap_softly(scores: Float[Array, "*n"], cap: float) -> Float[Array, "*n"]:
    """Return `cap * tanh(scores / cap)`, which keeps the order of the scores.

    Args:
        scores: Scores `(*n)`.
        cap: The limit of the results' size. 0 returns the scores as they are.
    """
    if not cap:
        return scores
    limit = jnp.asarray(cap, scores.dtype)
    return limit * jnp.tanh(scores / limit)

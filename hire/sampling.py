"""Sample the next token from the top-k: greedy, temperature, top-k and top-p."""

from functools import partial
from typing import SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from hire.ops.checks import check_range
from hire.ops.top_k import TopK
from hire.types import AnyArray, Array, Float, Int, PRNGKey

# One number for all queries, or one (b,) per query.
Setting = Float[AnyArray, "*b"] | float | int


def sampling_probabilities(
    top: TopK,
    *,
    temperature: Setting = 1.0,
    top_k: SupportsIndex | None = None,
    top_p: Setting = 1.0,
) -> Float[Array, "b k"]:
    """Return the probability with which each token of a top-k is sampled.

    The order is that of most libraries: divide the logits by the temperature, restrict them to the
    best `top_k`, then to the smallest set of best tokens with a probability of at least `top_p`,
    and normalise. Tokens outside `top` have probability 0.

    Args:
        top: Logits and token indices `(b, k)`, best first.
        temperature: One number, or one `(b,)` per query; may be traced. 0 is greedy.
        top_k: Number of best tokens to sample from. By default all of `top`.
        top_p: Probability of the smallest set of best tokens to sample from: one number, or one
            `(b,)` per query; may be traced. 1 selects all tokens.

    Returns:
        The probabilities `(b, k)`, which sum to 1 for each query. A query has no distribution if
        its best logit is -inf or if a logit is NaN: its probabilities are NaN.

    Raises:
        ValueError: If the temperature is negative or not finite, if top_k is not in 1..k, or if
            top_p is not in (0, 1]. Traced values are not checked.
    """
    num_tokens = check_sampling(top.values.shape[-1], temperature, top_k, top_p)
    return probabilities(top.values, column(temperature), column(top_p), top_k=num_tokens)


def sample(
    top: TopK,
    key: PRNGKey,
    *,
    temperature: Setting = 1.0,
    top_k: SupportsIndex | None = None,
    top_p: Setting = 1.0,
) -> Int[Array, " b"]:
    """Sample one token for each query with `sampling_probabilities`.

    Args:
        top: Logits and token indices `(b, k)`, best first.
        key: PRNG key.
        temperature: As in `sampling_probabilities`.
        top_k: As in `sampling_probabilities`.
        top_p: As in `sampling_probabilities`.

    Returns:
        The token `(b,)` of each query; -1 for a query without a distribution.

    Raises:
        ValueError: As `sampling_probabilities`.
    """
    num_tokens = check_sampling(top.values.shape[-1], temperature, top_k, top_p)
    return draw(top, key, column(temperature), column(top_p), top_k=num_tokens)


def column(setting: Setting) -> Float[Array, "*b 1"]:
    """Return a setting as a column that broadcasts against logits `(b, k)`."""
    return jnp.asarray(setting, jnp.float32)[..., None]


def check_sampling(
    k: int, temperature: Setting, top_k: SupportsIndex | None, top_p: Setting
) -> int:
    """Check the sampling settings.

    Args:
        k: Number of tokens in the top-k.
        temperature: As in `sampling_probabilities`.
        top_k: As in `sampling_probabilities`.
        top_p: As in `sampling_probabilities`.

    Returns:
        The number of best tokens to sample from.

    Raises:
        ValueError: If no token can be sampled with these settings.
    """
    if (
        not isinstance(temperature, Tracer)
        and not (np.isfinite(temperature) & (np.asarray(temperature) >= 0)).all()
    ):
        raise ValueError(
            f"temperature = {temperature!r}: expected a finite number of at least 0 (0 is greedy)"
        )
    if (
        not isinstance(top_p, Tracer)
        and not ((np.asarray(top_p) > 0) & (np.asarray(top_p) <= 1)).all()
    ):
        raise ValueError(f"top_p = {top_p!r}: expected a number above 0 and at most 1")
    return (
        k
        if top_k is None
        else check_range("top_k", top_k, 1, k, "the tokens that the softmax returns")
    )


@partial(jax.jit, static_argnames="top_k")
def probabilities(
    values: Float[AnyArray, "b k"],
    temperature: Float[Array, "*b 1"],
    top_p: Float[Array, "*b 1"],
    *,
    top_k: int,
) -> Float[Array, "b k"]:
    """Compute `sampling_probabilities` without checking the settings.

    Args:
        values: Logits `(b, k)`, best first.
        temperature: Temperature as a column.
        top_p: Probability of the smallest set of best tokens, as a column.
        top_k: Number of best tokens to sample from.

    Returns:
        The probabilities `(b, k)`.
    """
    values, rank = jnp.asarray(values).astype(jnp.float32), jnp.arange(values.shape[-1])[None]
    temperature, top_p = (
        jnp.broadcast_to(setting, (len(values), 1)) for setting in (temperature, top_p)
    )
    logits = jnp.where(rank < top_k, values, -jnp.inf)
    max_logit = jnp.max(logits, axis=-1, keepdims=True)
    # At temperature 0 the best token gets all probability, without a division by 0.
    greedy = jnp.where(rank < 1, 0.0, -jnp.inf)
    scaled = jnp.where(
        temperature > 0, (logits - max_logit) / jnp.where(temperature > 0, temperature, 1.0), greedy
    )
    probs = jax.nn.softmax(scaled, axis=-1)
    # Probability of all better tokens: 0 for the best token, which is thus always selected.
    better_mass = jnp.cumsum(probs, axis=-1) - probs
    nucleus = jnp.where((better_mass < top_p) | (top_p >= 1), probs, 0.0)
    is_valid = jnp.isfinite(max_logit) & ~jnp.any(jnp.isnan(logits), axis=-1, keepdims=True)
    return jnp.where(is_valid, nucleus / jnp.sum(nucleus, axis=-1, keepdims=True), jnp.nan)


@partial(jax.jit, static_argnames="top_k")
def draw(
    top: TopK,
    key: PRNGKey,
    temperature: Float[Array, "*b 1"],
    top_p: Float[Array, "*b 1"],
    *,
    top_k: int,
) -> Int[Array, " b"]:
    """Run `sample` without checking the settings.

    Args:
        top: Logits and token indices `(b, k)`, best first.
        key: PRNG key.
        temperature: Temperature as a column.
        top_p: Probability of the smallest set of best tokens, as a column.
        top_k: Number of best tokens to sample from.

    Returns:
        The token `(b,)` of each query; -1 for a query without a distribution.
    """
    probs = probabilities(top.values, temperature, top_p, top_k=top_k)
    position = jax.random.categorical(key, jnp.log(probs), axis=-1)
    tokens = jnp.take_along_axis(jnp.asarray(top.indices), position[:, None], axis=-1)[:, 0]
    return jnp.where(jnp.isnan(probs[:, 0]), -1, tokens)

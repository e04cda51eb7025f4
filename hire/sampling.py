"""Sample the next token from the top-k: greedy, temperature, top-k, top-p and min-p."""

from typing import Any, NamedTuple, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from hire.ops.checks import check_range
from hire.ops.top_k import TopK
from hire.types import AnyArray, Array, Float, Int, PRNGKey

# One number for all queries, or one (b,) per query.
Setting = Float[AnyArray, "*b"] | float | int
WholeSetting = Int[AnyArray, "*b"] | SupportsIndex


class SamplingSettings(NamedTuple):
    """Settings of all queries as columns that broadcast against logits `(b, k)`.

    Attributes:
        temperature: Temperature.
        top_k: Number of best tokens to sample from.
        top_p: Probability of the smallest set of best tokens to sample from.
        min_p: Least probability of a token, as a share of the best token's.
    """

    temperature: Float[Array, "*b 1"]
    top_k: Int[Array, "*b 1"]
    top_p: Float[Array, "*b 1"]
    min_p: Float[Array, "*b 1"]


def sampling_probabilities(
    top: TopK,
    *,
    temperature: Setting = 1.0,
    top_k: WholeSetting | None = None,
    top_p: Setting = 1.0,
    min_p: Setting = 0.0,
) -> Float[Array, "b k"]:
    """Return the probability with which each token of a top-k is sampled.

    The order is that of most libraries: divide the logits by the temperature, restrict them to the
    best `top_k`, then to the smallest set of best tokens with a probability of at least `top_p`,
    then to tokens with at least `min_p` times the probability of the best one, and normalise.
    Tokens outside `top` have probability 0.

    Each setting is one number, or one `(b,)` per query, and may be traced.

    Args:
        top: Logits and token indices `(b, k)`, best first.
        temperature: Divisor of the logits. 0 is greedy.
        top_k: Number of best tokens to sample from. By default all of `top`.
        top_p: Probability of the smallest set of best tokens to sample from. 1 selects all tokens.
        min_p: Least probability of a token, as a share of the best token's. 0 selects all tokens.

    Returns:
        The probabilities `(b, k)`, which sum to 1 for each query. A query has no distribution if
        its best logit is -inf or if a logit is NaN: its probabilities are NaN.

    Raises:
        ValueError: If the temperature is negative or not finite, if top_k is not in 1..k, if top_p
            is not in (0, 1], or if min_p is not in [0, 1]. Traced values are not checked.
    """
    settings = check_sampling(top.values.shape[-1], temperature, top_k, top_p, min_p)
    return probabilities(top.values, settings)


def sample(
    top: TopK,
    key: PRNGKey,
    *,
    temperature: Setting = 1.0,
    top_k: WholeSetting | None = None,
    top_p: Setting = 1.0,
    min_p: Setting = 0.0,
) -> Int[Array, " b"]:
    """Sample one token for each query with `sampling_probabilities`.

    Args:
        top: Logits and token indices `(b, k)`, best first.
        key: PRNG key.
        temperature: As in `sampling_probabilities`.
        top_k: As in `sampling_probabilities`.
        top_p: As in `sampling_probabilities`.
        min_p: As in `sampling_probabilities`.

    Returns:
        The token `(b,)` of each query; -1 for a query without a distribution.

    Raises:
        ValueError: As `sampling_probabilities`.
    """
    settings = check_sampling(top.values.shape[-1], temperature, top_k, top_p, min_p)
    return draw(top, key, settings)


def check_sampling(
    k: int, temperature: Setting, top_k: WholeSetting | None, top_p: Setting, min_p: Setting
) -> SamplingSettings:
    """Check the sampling settings.

    Args:
        k: Number of tokens in the top-k.
        temperature: As in `sampling_probabilities`.
        top_k: As in `sampling_probabilities`.
        top_p: As in `sampling_probabilities`.
        min_p: As in `sampling_probabilities`.

    Returns:
        The settings.

    Raises:
        ValueError: If no token can be sampled with these settings.
    """
    expected = {
        "temperature": (temperature, "a finite number of at least 0 (0 is greedy)"),
        "top_p": (top_p, "a number above 0 and at most 1"),
        "min_p": (min_p, "a number from 0 to 1"),
    }
    is_valid = {
        "temperature": lambda value: np.isfinite(value) & (value >= 0),
        "top_p": lambda value: (value > 0) & (value <= 1),
        "min_p": lambda value: (value >= 0) & (value <= 1),
    }
    for name, (value, what) in expected.items():
        if not isinstance(value, Tracer) and not is_valid[name](np.asarray(value)).all():
            raise ValueError(f"{name} = {value!r}: expected {what}")
    return SamplingSettings(
        column(temperature, jnp.float32),
        column(check_top_k(k, top_k), jnp.int32),
        column(top_p, jnp.float32),
        column(min_p, jnp.float32),
    )


def check_top_k(k: int, top_k: WholeSetting | None) -> Any:
    """Return the numbers of best tokens to sample from.

    Args:
        k: Number of tokens in the top-k.
        top_k: As in `sampling_probabilities`.

    Raises:
        ValueError: If a number is not in 1..k or not whole.
    """
    if top_k is None:
        return k
    if isinstance(top_k, Tracer):
        return top_k
    what = "the tokens that the softmax returns"
    if not isinstance(top_k, jax.Array | np.ndarray) or top_k.ndim == 0:
        return check_range("top_k", top_k, 1, k, what)
    for number in np.asarray(top_k).reshape(-1):
        check_range("top_k", number, 1, k, what)
    return top_k


def column(setting: Any, dtype: Any) -> Array:
    """Return a setting as a column that broadcasts against logits `(b, k)`."""
    return jnp.asarray(setting).astype(dtype)[..., None]


@jax.jit
def probabilities(
    values: Float[AnyArray, "b k"], settings: SamplingSettings
) -> Float[Array, "b k"]:
    """Compute `sampling_probabilities` without checking the settings.

    Args:
        values: Logits `(b, k)`, best first.
        settings: Settings.

    Returns:
        The probabilities `(b, k)`.
    """
    values = jnp.asarray(values).astype(jnp.float32)
    rank = jnp.arange(values.shape[-1], dtype=jnp.int32)[None]
    temperature, top_k, top_p, min_p = (
        jnp.broadcast_to(setting, (len(values), 1)) for setting in settings
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
    is_selected = (better_mass < top_p) | (top_p >= 1)
    is_selected &= probs >= min_p * jnp.max(probs, axis=-1, keepdims=True)
    selected = jnp.where(is_selected, probs, 0.0)
    is_valid = jnp.isfinite(max_logit) & ~jnp.any(jnp.isnan(logits), axis=-1, keepdims=True)
    return jnp.where(is_valid, selected / jnp.sum(selected, axis=-1, keepdims=True), jnp.nan)


@jax.jit
def draw(top: TopK, key: PRNGKey, settings: SamplingSettings) -> Int[Array, " b"]:
    """Run `sample` without checking the settings.

    Args:
        top: Logits and token indices `(b, k)`, best first.
        key: PRNG key.
        settings: Settings.

    Returns:
        The token `(b,)` of each query; -1 for a query without a distribution.
    """
    probs = probabilities(top.values, settings)
    position = jax.random.categorical(key, jnp.log(probs), axis=-1)
    tokens = jnp.take_along_axis(jnp.asarray(top.indices), position[:, None], axis=-1)[:, 0]
    return jnp.where(jnp.isnan(probs[:, 0]), -1, tokens)

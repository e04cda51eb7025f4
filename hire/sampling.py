"""The next word from the best ones: greedy, by temperature, top-k and top-p."""

import math
from functools import partial

import jax
import jax.numpy as jnp

from hire.axes import AnyArray, Array, Float, Int, Key
from hire.topk import TopK, check_count

Scalar = Float[Array, ""] | float


def sampling_probabilities(
    top: TopK, *, temperature: float = 1.0, top_k: int | None = None, top_p: float = 1.0
) -> Float[Array, "b k"]:
    """The probability (b, k) with which each of the words in `top` (b, k) is drawn; the words outside it are never drawn.

    As in most libraries: logits over the temperature, then the best `top_k` (all of `top` by default), then of these
    the fewest best whose probability reaches `top_p`, and what is left sums to 1. Temperature 0 is greedy.

    Raises ValueError when temperature is negative or not finite, top_k not in 1..k, or top_p not in (0, 1].
    """
    check_sampling(top.values.shape[-1], temperature, top_k, top_p)
    return probabilities(top.values, temperature, top_p, top_k=top_k or top.values.shape[-1])


def sample(top: TopK, key: Key, *, temperature: float = 1.0, top_k: int | None = None, top_p: float = 1.0) -> Int[Array, " b"]:
    """A word (b,) for each query, drawn with `sampling_probabilities`. Raises ValueError as that does."""
    check_sampling(top.values.shape[-1], temperature, top_k, top_p)
    return draw(top, key, temperature, top_p, top_k=top_k or top.values.shape[-1])


def check_sampling(k: int, temperature: float, top_k: int | None, top_p: float) -> None:
    """Raise ValueError for settings that no words can be drawn with."""
    if not (temperature >= 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature = {temperature!r}: expected a finite number of at least 0 (0 is greedy)")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p = {top_p!r}: expected a number above 0 and at most 1")
    if top_k is not None:
        check_count("top_k", top_k, 1, k, "the words that the softmax finds")


@partial(jax.jit, static_argnames="top_k")
def probabilities(values: Float[AnyArray, "b k"], temperature: Scalar, top_p: Scalar, *, top_k: int) -> Float[Array, "b k"]:
    logits = jnp.where(jnp.arange(values.shape[-1]) < top_k, values, -jnp.inf)
    # At temperature 0 the best word stands alone, without a division by it.
    greedy = jnp.where(jnp.arange(values.shape[-1]) < 1, 0.0, -jnp.inf)
    sharpened = jnp.where(temperature > 0, (logits - logits[:, :1]) / jnp.where(temperature > 0, temperature, 1.0), greedy)
    shares = jax.nn.softmax(sharpened, axis=-1)
    before = jnp.cumsum(shares, axis=-1) - shares  # what better words hold; the best word always stays
    kept = jnp.where(before < top_p, shares, 0.0)
    return kept / jnp.sum(kept, axis=-1, keepdims=True)


@partial(jax.jit, static_argnames="top_k")
def draw(top: TopK, key: Key, temperature: Scalar, top_p: Scalar, *, top_k: int) -> Int[Array, " b"]:
    shares = probabilities(top.values, temperature, top_p, top_k=top_k)
    place = jax.random.categorical(key, jnp.log(shares), axis=-1)
    return jnp.take_along_axis(top.indices, place[:, None], axis=-1)[:, 0]

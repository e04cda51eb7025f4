"""The next word from the best ones: greedy, by temperature, top-k and top-p."""

from functools import partial
from typing import SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from hire.axes import AnyArray, Array, Float, Int, Key
from hire.topk import TopK, check_count

Setting = Float[AnyArray, "*b"] | float | int  # one for all queries, or one (b,) each


def sampling_probabilities(
    top: TopK, *, temperature: Setting = 1.0, top_k: SupportsIndex | None = None, top_p: Setting = 1.0
) -> Float[Array, "b k"]:
    """The probability (b, k) with which each of the words in `top` (b, k) is drawn; the words outside it are never drawn.

    As in most libraries: logits over the temperature, then the best `top_k` (all of `top` by default), then of these
    the fewest best whose probability reaches `top_p` (all at 1), and what is left sums to 1. Temperature 0 is greedy. Temperature
    and top_p are numbers, or one (b,) for each query, and may be traced.

    A query whose best score is -inf or that has a NaN among its scores has no distribution: its probabilities are NaN.

    Raises ValueError when temperature is negative or not finite, top_k not in 1..k, or top_p not in (0, 1]; of traced values it
    cannot tell.
    """
    most = check_sampling(top.values.shape[-1], temperature, top_k, top_p)
    return probabilities(top.values, column(temperature), column(top_p), top_k=most)


def sample(
    top: TopK, key: Key, *, temperature: Setting = 1.0, top_k: SupportsIndex | None = None, top_p: Setting = 1.0
) -> Int[Array, " b"]:
    """A word (b,) for each query, drawn with `sampling_probabilities`; -1 where there is no distribution. Raises ValueError as that
    does.
    """
    most = check_sampling(top.values.shape[-1], temperature, top_k, top_p)
    return draw(top, key, column(temperature), column(top_p), top_k=most)


def column(setting: Setting) -> Float[Array, "*b 1"]:
    """A setting as it meets scores (b, k)."""
    return jnp.asarray(setting, jnp.float32)[..., None]


def check_sampling(k: int, temperature: Setting, top_k: SupportsIndex | None, top_p: Setting) -> int:
    """How many of the k best words may be drawn. Raise ValueError for settings that no words can be drawn with."""
    if not isinstance(temperature, Tracer) and not (np.isfinite(temperature) & (np.asarray(temperature) >= 0)).all():
        raise ValueError(f"temperature = {temperature!r}: expected a finite number of at least 0 (0 is greedy)")
    if not isinstance(top_p, Tracer) and not ((np.asarray(top_p) > 0) & (np.asarray(top_p) <= 1)).all():
        raise ValueError(f"top_p = {top_p!r}: expected a number above 0 and at most 1")
    return k if top_k is None else check_count("top_k", top_k, 1, k, "the words that the softmax finds")


@partial(jax.jit, static_argnames="top_k")
def probabilities(
    values: Float[AnyArray, "b k"], temperature: Float[Array, "*b 1"], top_p: Float[Array, "*b 1"], *, top_k: int
) -> Float[Array, "b k"]:
    values, rank = jnp.asarray(values).astype(jnp.float32), jnp.arange(values.shape[-1])[None]
    temperature, top_p = (jnp.broadcast_to(setting, (len(values), 1)) for setting in (temperature, top_p))
    logits = jnp.where(rank < top_k, values, -jnp.inf)
    best = jnp.max(logits, axis=-1, keepdims=True)
    # At temperature 0 the best word stands alone, without a division by it.
    greedy = jnp.where(rank < 1, 0.0, -jnp.inf)
    sharpened = jnp.where(temperature > 0, (logits - best) / jnp.where(temperature > 0, temperature, 1.0), greedy)
    shares = jax.nn.softmax(sharpened, axis=-1)
    before = jnp.cumsum(shares, axis=-1) - shares  # what better words hold; the best word always stays
    kept = jnp.where((before < top_p) | (top_p >= 1), shares, 0.0)
    known = jnp.isfinite(best) & ~jnp.any(jnp.isnan(logits), axis=-1, keepdims=True)
    return jnp.where(known, kept / jnp.sum(kept, axis=-1, keepdims=True), jnp.nan)


@partial(jax.jit, static_argnames="top_k")
def draw(top: TopK, key: Key, temperature: Float[Array, "*b 1"], top_p: Float[Array, "*b 1"], *, top_k: int) -> Int[Array, " b"]:
    shares = probabilities(top.values, temperature, top_p, top_k=top_k)
    place = jax.random.categorical(key, jnp.log(shares), axis=-1)
    words = jnp.take_along_axis(jnp.asarray(top.indices), place[:, None], axis=-1)[:, 0]
    return jnp.where(jnp.isnan(shares[:, 0]), -1, words)

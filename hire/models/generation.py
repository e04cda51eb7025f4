"""Decoding: a whole prompt at once, then one compiled step a token."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from hire.axes import Array, Float, Int, Tokens
from hire.models.decoder import Cache, Decoder

# A decode step takes the model's arrays, split from it once, through jax.jit: nnx.jit looks at every weight at every call.


@partial(jax.jit, static_argnames=("graph", "slots"))
def prefill(graph: nnx.GraphDef, state: nnx.State, tokens: Tokens, slots: int) -> tuple[Float[Array, "b v"], Cache]:
    """Logits after the last token of texts (b, t), and their cache of so many slots."""
    model = nnx.merge(graph, state)
    hidden, cache = model.prefill(tokens, slots)
    return model.logits(hidden[:, -1]), cache


@partial(jax.jit, static_argnames="graph", donate_argnames="cache")
def step(graph: nnx.GraphDef, state: nnx.State, token: Int[Array, " b"], cache: Cache) -> tuple[Float[Array, "b v"], Cache]:
    """Logits after one more token (b,), and the cache with it; the cache given is used up."""
    model = nnx.merge(graph, state)
    hidden, cache = model.step(token, cache)
    return model.logits(hidden), cache


def generate(model: Decoder, tokens: Tokens, *, new_tokens: int) -> Int[Array, "b written"]:
    """The prompts (b, t), all of one length, each followed by its most likely continuation: (b, t + new_tokens).

    Raises ValueError when new_tokens is not at least 1 or the result would not fit the model's context.
    """
    length = tokens.shape[1] + new_tokens
    if new_tokens < 1 or length > model.config.context:
        raise ValueError(
            f"new_tokens = {new_tokens} after {tokens.shape[1]}: expected at least 1 and at most {model.config.context} in all"
        )
    graph, state = nnx.split(model)
    logits, cache = prefill(graph, state, tokens, length)
    written = [jnp.argmax(logits, axis=-1).astype(tokens.dtype)]
    while len(written) < new_tokens:
        logits, cache = step(graph, state, written[-1], cache)
        written.append(jnp.argmax(logits, axis=-1).astype(tokens.dtype))
    return jnp.concatenate([tokens, jnp.stack(written, axis=1)], axis=1)

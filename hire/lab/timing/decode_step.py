"""A decode step and its parts as functions to time, over batches."""

from collections.abc import Callable
from threading import Lock

import jax
import jax.numpy as jnp
import numpy as np

from hire.models import Cache, Decoder
from hire.models.generation import SplitModel, step

# Lets one decode step run at a time. `interleaved` compiles two functions at a time, but decode
# steps share a cache, and those of a large model need much memory.
ALONE = Lock()


def softmax(model: Decoder, x, cache: Cache):
    """Run the LM head alone: the best token of hidden states x."""
    return model.top_tokens(x, 1)


def ffn(model: Decoder, x, cache: Cache):
    """Run the FFNs of all blocks alone."""
    for block in model.blocks:
        x = x + block.ffn(block.ffn_norm(x))
    return x


def attention(model: Decoder, x, cache: Cache):
    """Run the attention of all blocks alone."""
    for block, keys, values in zip(model.blocks, cache.keys, cache.values, strict=True):
        x = (
            x
            + block.attention.step(
                block.attention_norm(x), keys, values, jnp.asarray(cache.length)
            )[0]
        )
    return x


class StepForms:
    """Functions that run a decode step or a part of it, for timing.

    The decode step ends in the k best tokens. Each function takes hidden states (1, d). The cache
    counts as half full. Several instances of one model can share the cache of a text (`cache`): it
    contains zeros, which are read like anything else.

    Args:
        model: The decoder.
        cache_length: Length of the cache in tokens.
        k: Number of tokens that the step returns.
        cache: Cache of one text; a new one by default.
    """

    def __init__(self, model: Decoder, cache_length: int, k: int = 1, cache: Cache | None = None):
        self.model = SplitModel.of(model)
        self.k, self.vocabulary = k, model.config.vocabulary
        self.text_cache = self.empty(cache_length) if cache is None else cache

    def empty(self, cache_length: int) -> Cache:
        """Return a cache for one text, with its first half counted as filled.

        Nothing is compiled to create it.
        """

        def text(model: SplitModel, token: jax.Array) -> tuple:
            cache = model.merge().prefill(token, cache_length)[1]
            return cache.keys, cache.values

        shapes = jax.eval_shape(text, self.model, jax.ShapeDtypeStruct((1, 1), jnp.int32))
        keys, values = jax.tree.map(lambda part: jnp.zeros(part.shape, part.dtype), shapes)
        return Cache(keys, values, cache_length // 2, cache_length)

    def part(self, function: Callable) -> Callable:
        """Return a function to time: softmax, ffn or attention alone, with the model's weights."""
        compiled = jax.jit(lambda model, x, cache: function(model.merge(), x, cache))
        return lambda x: compiled(self.model, x, self.text_cache)

    def batch_cache(self, batch: int) -> list[Cache]:
        """Return the cache of a batch of texts that are equal so far.

        It is in a list, which keeps the cache from one step to the next.
        """
        return [
            jax.tree.map(
                lambda part: jnp.repeat(part, batch, 0) if jnp.ndim(part) else part, self.text_cache
            )
        ]

    def complete_step(self, batch: int = 1, cache: list[Cache] | None = None) -> Callable:
        """Return a function to time: the complete decode step of a batch.

        The texts of the batch continue with different tokens. Each call writes a token into the
        cache.

        Args:
            batch: Number of texts.
            cache: Cache in a list, which several functions can share; a new one by default.
        """
        # A prime spreads the tokens over the vocabulary. Otherwise a search would read the same
        # rows for all texts.
        offsets = 7919 * np.arange(batch)
        caches = self.batch_cache(batch) if cache is None else cache

        def form(x):
            tokens = 3 + (np.argmax(x) + offsets) % (self.vocabulary - 3)
            with ALONE:
                top, caches[0] = step(self.model, tokens.astype(np.int32), caches[0], self.k)
            return top

        return form

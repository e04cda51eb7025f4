"""One decode step taken apart: the whole of it and its parts as forms to be timed, over batches."""

from collections.abc import Callable
from threading import Lock

import jax
import jax.numpy as jnp
import numpy as np

from hire.lab.timing import interleaved
from hire.models import Cache, Decoder
from hire.models.generation import Split, step

ALONE = Lock()  # of a step: forms are compiled two at a time, but these share a cache and, of a large model, take much memory


def softmax(model: Decoder, x, cache: Cache):
    return model.best(x, 1)


def ffn(model: Decoder, x, cache: Cache):
    for block in model.blocks:
        x = x + block.ffn(block.ffn_norm(x))
    return x


def attention(model: Decoder, x, cache: Cache):
    for block, keys, values in zip(model.blocks, cache.keys, cache.values, strict=True):
        x = x + block.attention.step(block.attention_norm(x), keys, values, jnp.asarray(cache.length))[0]
    return x


class StepForms:
    """Forms of one decode step at batch 1, each called with hidden states (1, d), on a cache that counts as half full.

    A step ends in the k best words. Forms of one model can share what is `held` of a text: zeros, read like anything else.
    """

    def __init__(self, model: Decoder, slots: int, k: int = 1, held: Cache | None = None):
        self.model = Split.of(model)
        self.k, self.words = k, model.config.vocabulary
        self.held = self.empty(slots) if held is None else held

    def empty(self, slots: int) -> Cache:
        """A cache for one text, whose first half counts as filled: nothing is compiled to make it."""

        def text(model: Split, word: jax.Array) -> tuple:
            cache = model.merge().prefill(word, slots)[1]
            return cache.keys, cache.values

        shapes = jax.eval_shape(text, self.model, jax.ShapeDtypeStruct((1, 1), jnp.int32))
        keys, values = jax.tree.map(lambda part: jnp.zeros(part.shape, part.dtype), shapes)
        return Cache(keys, values, slots // 2, slots)

    def part(self, function: Callable) -> Callable:
        """softmax, ffn or attention alone, with the model's own weights."""
        compiled = jax.jit(lambda model, x, cache: function(model.merge(), x, cache))
        return lambda x: compiled(self.model, x, self.held)

    def cache(self, batch: int) -> list[Cache]:
        """The cache of a batch of texts that were the same until now, in a list that holds it from one step to the next."""
        return [jax.tree.map(lambda part: jnp.repeat(part, batch, 0) if jnp.ndim(part) else part, self.held)]

    def whole(self, batch: int = 1, cache: list[Cache] | None = None) -> Callable:
        """The step itself, for a batch of texts that go on with different words. Each call writes a token into the cache: its
        own, or one that forms share.
        """
        apart = 7919 * np.arange(batch)  # a prime: words all over the vocabulary, or a search would read the same rows for all
        held = self.cache(batch) if cache is None else cache

        def form(x):
            words = 3 + (np.argmax(x) + apart) % (self.words - 3)
            with ALONE:
                top, held[0] = step(self.model, words.astype(np.int32), held[0], self.k)
            return top

        return form

    def over_batches(self, batches: list[int], queries: list, repeats: int) -> dict[int, list[float]]:
        """Seconds of each step at each batch, one batch after the other: interleaved they would need every cache at once."""
        return {batch: interleaved({"step": self.whole(batch)}, queries, repeats)["step"] for batch in batches}

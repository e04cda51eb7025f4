"""One decode step taken apart: the whole of it and its parts as forms to be timed, over batches."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from hire.lab.timing import interleaved
from hire.models import Cache, Decoder
from hire.models.generation import Split, prefill, step


def softmax(model: Decoder, x, cache: Cache):
    return model.logits(x)


def ffn(model: Decoder, x, cache: Cache):
    for block in model.blocks:
        x = x + block.ffn(block.ffn_norm(x))
    return x


def attention(model: Decoder, x, cache: Cache):
    for block, keys, values in zip(model.blocks, cache.keys, cache.values, strict=True):
        x = x + block.attention.step(block.attention_norm(x), keys, values, jnp.asarray(cache.length))[0]
    return x


class StepForms:
    """Forms of one decode step at batch 1, each called with hidden states (1, d), on a cache half full of random words.

    A step ends in the k best words.
    """

    def __init__(self, model: Decoder, slots: int, k: int = 1):
        self.model = Split.of(model)
        self.k = k
        words = np.random.default_rng(0).integers(3, model.config.vocabulary, (1, slots // 2))
        self.held = prefill(self.model, jnp.asarray(words, jnp.int32), slots, k)[1]

    def part(self, function: Callable) -> Callable:
        """softmax, ffn or attention alone, with the model's own weights."""
        compiled = jax.jit(lambda model, x, cache: function(model.merge(), x, cache))
        return lambda x: compiled(self.model, x, self.held)

    def whole(self, batch: int = 1) -> Callable:
        """The step itself, for a batch of the same text; each call writes a word into a cache of its own."""
        cache = jax.tree.map(lambda part: jnp.repeat(part, batch, 0) if jnp.ndim(part) else part, self.held)

        def form(x):
            nonlocal cache
            word = np.full((batch,), 3 + np.argmax(x) % 99, np.int32)
            top, cache = step(self.model, word, cache, self.k)
            return top

        return form

    def over_batches(self, batches: list[int], queries: list, repeats: int) -> dict[int, list[float]]:
        """Seconds of each step at each batch, one batch after the other: interleaved they would need every cache at once."""
        return {batch: interleaved({"step": self.whole(batch)}, queries, repeats)["step"] for batch in batches}

"""Decoding: a whole prompt at once, then a step a token, each in two compiled programs: up to the hidden state, and its words.

So models that search for words in different ways, or not at all, share the larger one.
"""

from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import jax
import jax.numpy as jnp
from flax import nnx

from hire.axes import AnyArray, Array, Blocks, Float, Hidden, Int, Rows, Tokens
from hire.models.decoder import Cache, Decoder, WordSearch, best_words
from hire.sampling import check_sampling, sample
from hire.topk import TopK


class Rest:
    """What a model is beside its arrays. flax hashes this anew at every call, which takes as long as a layer: here it is kept."""

    def __init__(self, graph: nnx.GraphDef, form: Hashable):
        self.parts = graph, form
        self.hash = hash(self.parts)

    def __hash__(self) -> int:
        return self.hash

    def __eq__(self, other) -> bool:
        return self is other or (isinstance(other, Rest) and self.parts == other.parts)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Split:
    """A model as a compiled step takes it: its arrays, split from the rest once. (nnx.jit looks at every weight at every call.)"""

    arrays: list[jax.Array]
    rest: Rest = field(metadata=dict(static=True))

    @classmethod
    def of(cls, model: Decoder) -> "Split":
        graph, state = nnx.split(model)
        arrays, form = jax.tree.flatten(state)
        return cls(arrays, Rest(graph, form))

    def merge(self) -> Decoder:
        graph, form = self.rest.parts
        return nnx.merge(graph, jax.tree.unflatten(form, self.arrays))

    @cached_property
    def trunk(self) -> "Split":
        """The model without its search for words, unless that has laid out the embedding."""
        trunk = self.merge()
        if trunk.softmax is None or trunk.laid is not None:
            return self
        trunk.softmax = None
        return Split.of(trunk)

    @cached_property
    def words(self) -> tuple[WordSearch | None, Rows | Blocks]:
        """What finds the words of a hidden state."""
        model = self.merge()
        return model.softmax, model.embedding[...]


def prefill(model: Split, tokens: Tokens, slots: int, k: int) -> tuple[TopK, Cache]:
    """The k best words (b, k) after texts (b, t), and their cache of so many slots."""
    hidden, cache = compiled_prefill(model.trunk, tokens, slots)
    return compiled_words(*model.words, hidden[:, -1], k), replace(cache, length=tokens.shape[1])


def step(model: Split, token: Int[AnyArray, " b"], cache: Cache, k: int) -> tuple[TopK, Cache]:
    """The k best words (b, k) after one more token (b,), and the cache with it; the cache given is used up.

    Raises ValueError when its slots are full.
    """
    cache.check_room()
    hidden, after = compiled_step(model.trunk, token, cache)
    return compiled_words(*model.words, hidden, k), replace(after, length=cache.length + 1)


@partial(jax.jit, static_argnames="slots")
def compiled_prefill(trunk: Split, tokens: Tokens, slots: int) -> tuple[Hidden, Cache]:
    return trunk.merge().prefill(tokens, slots)


@partial(jax.jit, donate_argnames="cache")
def compiled_step(trunk: Split, token: Int[AnyArray, " b"], cache: Cache) -> tuple[Float[Array, "b d"], Cache]:
    return trunk.merge().step(token, cache)


compiled_words = jax.jit(best_words, static_argnames="k")


def generate(
    model: Decoder,
    tokens: Tokens,
    *,
    new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 0,
    slots: int | None = None,
) -> Int[Array, "b written"]:
    """The prompts (b, t), all of one length, each followed by a continuation: (b, t + new_tokens).

    Greedy at temperature 0, else drawn from the `top_k` best words (see hire.sample; 32 by default, or what a converted model
    finds if that is less). `slots` is the length of the cache in tokens (what is needed by default). The model is dense or what
    hire.convert made of it.

    Raises ValueError when new_tokens is not at least 1, when prompt and continuation fit neither slots nor context, when the
    sampling settings cannot be, or when a converted model finds fewer than top_k words.
    """
    length = tokens.shape[1] + new_tokens
    room = length if slots is None else slots
    if new_tokens < 1 or not length <= room <= model.config.context:
        raise ValueError(
            f"new_tokens = {new_tokens} after {tokens.shape[1]} in a cache of {room}: expected at least 1, all within the cache, "
            f"and that within the context of {model.config.context}"
        )
    check_sampling(model.words_found, temperature, top_k, top_p)
    k = 1 if temperature == 0 else top_k or min(32, model.words_found)
    parts = Split.of(model)
    draw = partial(sample, temperature=temperature, top_k=k, top_p=top_p)
    keys = jax.random.split(jax.random.key(seed), new_tokens)
    top, cache = prefill(parts, tokens, room, k)
    written = [draw(top, keys[0])]
    while len(written) < new_tokens:
        top, cache = step(parts, written[-1], cache, k)
        written.append(draw(top, keys[len(written)]))
    return jnp.concatenate([tokens, jnp.stack(written, axis=1).astype(tokens.dtype)], axis=1)

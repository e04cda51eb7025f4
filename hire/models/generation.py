"""Decoding: a whole prompt at once, then a step a token, each in two compiled programs: up to the hidden state, and its words.

So models that search for words in different ways, or not at all, share the larger one.
"""

import operator
from collections.abc import Hashable
from dataclasses import field, replace
from functools import cached_property, partial
from typing import Any, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer

from hire.axes import AnyArray, Array, Blocks, Float, Hidden, Int, Rows, Tokens
from hire.models.decoder import Cache, Decoder, WordSearch, best_words, check_tokens
from hire.pytrees import pytree
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


@pytree
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
    return best_words(*model.words, hidden[:, -1], k), replace(cache, length=tokens.shape[1])


def step(model: Split, token: Int[AnyArray, " b"], cache: Cache, k: int) -> tuple[TopK, Cache]:
    """The k best words (b, k) after one more token (b,), and the cache with it; the cache given is used up.

    Raises ValueError when its slots are full.
    """
    cache.check_room()
    hidden, after = compiled_step(model.trunk, token, cache)
    return best_words(*model.words, hidden, k), replace(after, length=cache.length + 1)


@partial(jax.jit, static_argnames="slots")
def compiled_prefill(trunk: Split, tokens: Tokens, slots: int) -> tuple[Hidden, Cache]:
    return trunk.merge().prefill(tokens, slots)


@partial(jax.jit, donate_argnames="cache")
def compiled_step(trunk: Split, token: Int[AnyArray, " b"], cache: Cache) -> tuple[Float[Array, "b d"], Cache]:
    return trunk.merge().step(token, cache)


def generate(
    model: Decoder,
    tokens: Any,
    *,
    new_tokens: SupportsIndex,
    temperature: Any = 0.0,
    top_k: SupportsIndex | None = None,
    top_p: Any = 1.0,
    seed: SupportsIndex = 0,
    slots: SupportsIndex | None = None,
) -> Int[Array, "*b written"]:
    """The prompts (b, t), all of one length, each followed by a continuation: int32 (b, t + new_tokens).

    Prompts are ids in an array of whole numbers or in lists; of one prompt (t,) it is (t + new_tokens,). Greedy at temperature 0,
    else drawn from the `top_k` best words (see hire.sample; 32 by default, or what a converted model finds if that is less).
    `slots` is the length of the cache in tokens (what is needed by default). The model is dense or what hire.convert made of it.

    Raises ValueError when prompts are not whole numbers (b, t) or hold an id that is not in the vocabulary, when new_tokens is not
    at least 1, when prompt and continuation fit neither slots nor context, when the sampling settings cannot be, or when a
    converted model finds fewer than top_k words.
    """
    prompts = as_prompts(tokens, model.config.vocabulary)
    batch, t = prompts.shape[:-1], prompts.shape[-1]
    new_tokens = whole("new_tokens", new_tokens)
    seed = whole("seed", seed)
    room = t + new_tokens if slots is None else whole("slots", slots)
    if new_tokens < 1 or not t + new_tokens <= room <= model.config.context:
        raise ValueError(
            f"new_tokens = {new_tokens} after {t} in a cache of {room}: expected at least 1, all within the cache, "
            f"and that within the context of {model.config.context}"
        )
    k = None if top_k is None else whole("top_k", top_k)
    check_sampling(model.words_found, temperature, k, top_p)
    if is_zero(temperature):
        k = 1
    elif k is None:
        k = min(32, model.words_found)
    if 0 in batch:
        return jnp.zeros((*batch, t + new_tokens), jnp.int32)
    texts = prompts.reshape(-1, t)
    parts = Split.of(model)
    draw = partial(sample, temperature=temperature, top_k=k, top_p=top_p)
    keys = jax.random.split(jax.random.key(seed), new_tokens)
    top, cache = prefill(parts, texts, room, k)
    written = [draw(top, keys[0])]
    while len(written) < new_tokens:
        top, cache = step(parts, written[-1], cache, k)
        written.append(draw(top, keys[len(written)]))
    found = jnp.concatenate([texts, jnp.stack(written, axis=1).astype(jnp.int32)], axis=1)
    return found.reshape(*batch, -1)


def whole(name: str, value: Any) -> int:
    """A whole number as an int, numpy's too. Raises ValueError, naming it, for anything else."""
    try:
        if not isinstance(value, bool | np.bool):
            return operator.index(value)
    except TypeError:
        pass
    raise ValueError(f"{name} = {value!r}: expected a whole number")


def is_zero(temperature: Any) -> bool:
    """Whether a temperature is known to be 0 for every prompt."""
    return not isinstance(temperature, Tracer) and np.ndim(temperature) == 0 and temperature == 0


def as_prompts(tokens: Any, vocabulary: int) -> Int[AnyArray, "*b t"]:
    """Token ids (b, t) or (t,) as int32. Raises ValueError unless they are that, at least one a prompt, in the vocabulary."""
    try:
        ids = tokens if isinstance(tokens, jax.Array) else np.asarray(tokens)
    except ValueError:
        lengths = sorted({np.size(prompt) for prompt in tokens})
        raise ValueError(f"prompts of {lengths} tokens: expected one length; generate them one by one") from None
    if ids.ndim not in (1, 2) or ids.shape[-1] == 0:
        raise ValueError(f"prompts of shape {ids.shape}: expected (b, t) or (t,), with at least one token each")
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"prompts of {ids.dtype}: expected whole numbers, the ids of tokens")
    check_tokens(ids, vocabulary)
    return ids.astype(jnp.int32)

"""Text generation: prefill of the prompt, then one decode step per token.

Each of these runs two compiled programs: the backbone, which computes the hidden state, and the LM
head, which computes the best tokens. Models with different LM heads thus share the backbone, which
is the larger program.
"""

import operator
from collections.abc import Hashable, Iterator
from dataclasses import field, replace
from functools import cached_property, partial
from typing import Any, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer

from hire.layers.logit_adjustments import LogitAdjustments, Penalties, checked_adjustments
from hire.models.cache import Cache
from hire.models.decoder import Decoder, check_tokens
from hire.models.lm_head import LMHeadSearch, top_tokens
from hire.ops.checks import check_range
from hire.ops.top_k import TopK
from hire.pytrees import pytree
from hire.sampling import check_sampling, sample
from hire.types import AnyArray, Array, Blocks, Float, Hidden, Int, Rows, Tokens


class StaticDef:
    """The part of a model that is not arrays, with a cached hash.

    flax computes this hash at every call, which takes as long as a layer.

    Attributes:
        parts: The graph definition and the tree structure of the state.
        hash: The hash of `parts`.
    """

    def __init__(self, graph: nnx.GraphDef, form: Hashable):
        self.parts = graph, form
        self.hash = hash(self.parts)

    def __hash__(self) -> int:
        return self.hash

    def __eq__(self, other) -> bool:
        return self is other or (isinstance(other, StaticDef) and self.parts == other.parts)


@pytree
class SplitModel:
    """A model split into arrays and a static part, as compiled functions take it.

    The split happens once; nnx.jit inspects every weight at every call.

    Attributes:
        arrays: The arrays of the model.
        rest: The static part.
    """

    arrays: list[jax.Array]
    rest: StaticDef = field(metadata=dict(static=True))

    @classmethod
    def of(cls, model: Decoder) -> "SplitModel":
        """Splits a model."""
        graph, state = nnx.split(model)
        arrays, treedef = jax.tree.flatten(state)
        return cls(arrays, StaticDef(graph, treedef))

    def merge(self) -> Decoder:
        """Rebuilds the model."""
        graph, treedef = self.rest.parts
        return nnx.merge(graph, jax.tree.unflatten(treedef, self.arrays))

    @cached_property
    def backbone(self) -> "SplitModel":
        """The model without the search of its LM head.

        If that search determines the layout of the rows, the backbone is the complete model.
        """
        model = self.merge()
        if model.softmax is None or model.row_sharding is not None:
            return self
        model.softmax = None
        return SplitModel.of(model)

    @cached_property
    def lm_head(self) -> tuple[LMHeadSearch | None, Rows | Blocks, float]:
        """The search of the LM head, or None for a dense one, its rows and its soft cap."""
        model = self.merge()
        return model.softmax, model.head[...], model.config.logit_soft_cap


def prefill(
    model: SplitModel,
    tokens: Tokens,
    cache_length: int,
    k: int,
    adjustments: LogitAdjustments | None = None,
) -> tuple[TopK, Cache]:
    """Runs prefill and returns the best next tokens.

    Args:
        model: The split model.
        tokens: Token ids, `(b, t)`.
        cache_length: Cache length, in tokens.
        k: Number of tokens to return per text.
        adjustments: Adjustments of the logits, or None.

    Returns:
        The k best tokens `(b, k)` after each text, and the cache.
    """
    hidden, cache = hidden_of_prompts(model, tokens, cache_length, tokens.shape[1])
    return top_tokens(*model.lm_head, hidden, k, adjustments), cache


def step(
    model: SplitModel,
    token: Int[AnyArray, " b"],
    cache: Cache,
    k: int,
    adjustments: LogitAdjustments | None = None,
) -> tuple[TopK, Cache]:
    """Runs one decode step and returns the best next tokens.

    Args:
        model: The split model.
        token: Token ids, `(b,)`.
        cache: The cache of the tokens before. Its arrays are donated, so it cannot be used again.
        k: Number of tokens to return per text.
        adjustments: Adjustments of the logits, or None.

    Returns:
        The k best tokens `(b, k)`, and the cache with the new token.

    Raises:
        ValueError: When the cache is full.
    """
    hidden, cache = next_hidden(model, token, cache)
    return top_tokens(*model.lm_head, hidden, k, adjustments), cache


def next_hidden(
    model: SplitModel, token: Int[AnyArray, " b"], cache: Cache
) -> tuple[Float[Array, "b d"], Cache]:
    """Runs the backbone of one decode step, without the LM head.

    Args:
        model: The split model.
        token: Token ids, `(b,)`.
        cache: As in `step`.

    Returns:
        The hidden states, `(b, d)`, and the cache with the new token.

    Raises:
        ValueError: When the cache is full.
    """
    cache.check_room()
    hidden, new_cache = compiled_step(model.backbone, token, cache)
    return hidden, replace(new_cache, length=cache.length + 1)


@partial(jax.jit, static_argnames="cache_length")
def compiled_prefill(
    backbone: SplitModel, tokens: Tokens, cache_length: int
) -> tuple[Hidden, Cache]:
    """Runs Decoder.prefill as one compiled program."""
    return backbone.merge().prefill(tokens, cache_length)


@partial(jax.jit, donate_argnames="cache")
def compiled_step(
    backbone: SplitModel, token: Int[AnyArray, " b"], cache: Cache
) -> tuple[Float[Array, "b d"], Cache]:
    """Runs Decoder.step as one compiled program, which donates the cache."""
    return backbone.merge().step(token, cache)


def generate(
    model: Decoder,
    tokens: Any,
    *,
    new_tokens: SupportsIndex,
    temperature: Any = 0.0,
    top_k: Any = None,
    top_p: Any = 1.0,
    min_p: Any = 0.0,
    mask: Any = None,
    logit_bias: Any = None,
    repetition_penalty: Any = 1.0,
    presence_penalty: Any = 0.0,
    frequency_penalty: Any = 0.0,
    seed: SupportsIndex = 0,
    cache_length: SupportsIndex | None = None,
) -> Int[Array, "*b written"]:
    """Generates a continuation of each prompt.

    Args:
        model: A dense model, or one that hire.convert returned.
        tokens: The prompts: token ids `(b, t)`, or `(t,)` for one prompt, in an array of integers
            or in lists. All prompts have the same length.
        new_tokens: Number of tokens to generate, at least 1.
        temperature: 0 decodes greedily. Other values sample, see hire.sample.
        top_k: Number of best tokens from which to sample. The default is 32, or what a converted
            model returns if that is less.
        top_p: See hire.sample.
        min_p: See hire.sample. Like the temperature, `top_k` and `top_p`, it is one number, or one
            `(b,)` per prompt.
        mask: Tokens that may be generated, `(v,)` or `(b, v)`. None allows all.
        logit_bias: Numbers to add to the logits, `(v,)` or `(b, v)`; -inf forbids a token.
        repetition_penalty: Penalty on the tokens of prompt and continuation, see hire.Penalties.
        presence_penalty: As `repetition_penalty`.
        frequency_penalty: As `repetition_penalty`.
        seed: Seed of the sampling.
        cache_length: Cache length, in tokens. The default is `t + new_tokens`.

    Returns:
        The prompts with their continuations: int32 `(b, t + new_tokens)`, or `(t + new_tokens,)`
        for one prompt.

    Raises:
        ValueError: When the prompts are not integers `(b, t)` or contain an id outside the
            vocabulary.
        ValueError: When `new_tokens` is less than 1, prompt and continuation do not fit into the
            cache, or the cache is longer than the context.
        ValueError: When a sampling setting, a mask, a bias or a penalty is invalid, or a converted
            model returns fewer than `top_k` tokens.
    """
    prompts = as_prompts(tokens, model.config.vocabulary)
    generated = stream_tokens(
        model,
        prompts,
        new_tokens=new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        mask=mask,
        logit_bias=logit_bias,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        seed=seed,
        cache_length=cache_length,
    )
    continuations = jnp.stack(list(generated), axis=-1).astype(jnp.int32)
    return jnp.concatenate([prompts, continuations], axis=-1)


def stream_tokens(
    model: Decoder,
    tokens: Any,
    *,
    new_tokens: SupportsIndex,
    temperature: Any = 0.0,
    top_k: Any = None,
    top_p: Any = 1.0,
    min_p: Any = 0.0,
    mask: Any = None,
    logit_bias: Any = None,
    repetition_penalty: Any = 1.0,
    presence_penalty: Any = 0.0,
    frequency_penalty: Any = 0.0,
    seed: SupportsIndex = 0,
    cache_length: SupportsIndex | None = None,
    prefill_length: SupportsIndex | None = None,
) -> Iterator[Int[Array, "*b"]]:
    """Generates the tokens of `generate` one by one, so that the caller can stop early.

    Args:
        model: As in `generate`.
        tokens: As in `generate`: `(b, t)` or `(t,)`.
        new_tokens: The largest number of tokens to generate, at least 1.
        temperature: As in `generate`, like the settings up to `cache_length`.
        top_k: See `generate`.
        top_p: See `generate`.
        min_p: See `generate`.
        mask: See `generate`.
        logit_bias: See `generate`.
        repetition_penalty: See `generate`.
        presence_penalty: See `generate`.
        frequency_penalty: See `generate`.
        seed: See `generate`.
        cache_length: See `generate`.
        prefill_length: Number of prompt tokens that prefill takes; decode steps take the others.
            Prefill compiles one program per length, so a few lengths keep the programs few. The
            default is t.

    Returns:
        An iterator over the next token of each prompt, int32 `(b,)`, or `()` for one prompt.

    Raises:
        ValueError: As `generate`, at the call and not at the first token. Also when
            `prefill_length` is not in 1..t.
    """
    prompts = as_prompts(tokens, model.config.vocabulary)
    batch_shape, t = prompts.shape[:-1], prompts.shape[-1]
    new_tokens = check_integer("new_tokens", new_tokens)
    if prefill_length is not None:
        check_range("prefill_length", prefill_length, 1, t, "the tokens of a prompt")
    num_prefilled = t if prefill_length is None else operator.index(prefill_length)
    seed = check_integer("seed", seed)
    room = t + new_tokens if cache_length is None else check_integer("cache_length", cache_length)
    if new_tokens < 1 or not t + new_tokens <= room <= model.config.context:
        raise ValueError(
            f"new_tokens = {new_tokens} after {t} in a cache of {room}: expected at least "
            "1, all within the cache, "
            f"and that within the context of {model.config.context}"
        )
    if top_k is None:
        top_k = min(32, model.max_top_k)
    check_sampling(model.max_top_k, temperature, top_k, top_p, min_p)
    if is_zero(temperature):
        top_k = 1
    k = int(np.max(top_k))  # the tokens that the LM head returns
    adjustments = checked_adjustments(model.config.vocabulary, mask, logit_bias)
    penalties = repetition_penalty, presence_penalty, frequency_penalty
    Penalties(jnp.zeros((1, 1), jnp.int32), *penalties)  # checks them
    is_penalized = any(
        isinstance(value, Tracer) or np.any(np.asarray(value) != neutral)
        for value, neutral in zip(penalties, (1, 0, 0), strict=True)
    )
    texts = prompts.reshape(-1, t)
    split_model = SplitModel.of(model)
    draw = partial(sample, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    keys = jax.random.split(jax.random.key(seed), new_tokens)
    # The penalised tokens, with room for the continuations: -1 is no token.
    penalized_tokens = (
        jnp.pad(texts, ((0, 0), (0, room - t)), constant_values=-1) if is_penalized else None
    )

    def changes() -> LogitAdjustments | None:
        if penalized_tokens is not None:
            return replace(adjustments, penalties=Penalties(penalized_tokens, *penalties))
        return None if adjustments.is_empty else adjustments

    def steps() -> Iterator[Int[Array, "*b"]]:
        nonlocal penalized_tokens
        hidden, cache = hidden_of_prompts(split_model, texts, room, num_prefilled)
        for place, key in enumerate(keys, t):
            top = top_tokens(*split_model.lm_head, hidden, k, changes())
            token = draw(top, key).astype(jnp.int32)
            yield token.reshape(batch_shape)
            if place + 1 == t + new_tokens:
                return
            if penalized_tokens is not None:
                penalized_tokens = penalized_tokens.at[:, place].set(token)
            hidden, cache = next_hidden(split_model, token, cache)

    if 0 in batch_shape:
        return iter([jnp.zeros(batch_shape, jnp.int32)] * new_tokens)
    return steps()


def hidden_of_prompts(
    model: SplitModel, tokens: Tokens, cache_length: int, prefill_length: int
) -> tuple[Float[Array, "b d"], Cache]:
    """Returns the hidden states after the last token of each prompt.

    Args:
        model: The split model.
        tokens: Token ids, `(b, t)`.
        cache_length: Cache length, in tokens.
        prefill_length: Number of tokens that prefill takes; decode steps take the others.

    Returns:
        The hidden states, `(b, d)`, and the cache.
    """
    prefilled, cache = compiled_prefill(model.backbone, tokens[:, :prefill_length], cache_length)
    hidden, cache = prefilled[:, -1], replace(cache, length=prefill_length)
    for place in range(prefill_length, tokens.shape[1]):
        hidden, cache = next_hidden(model, tokens[:, place], cache)
    return hidden, cache


def check_integer(name: str, value: Any) -> int:
    """Returns an integer, also one of NumPy, as an int.

    Raises:
        ValueError: When the value is not an integer. The message gives `name`.
    """
    try:
        if not isinstance(value, bool | np.bool):
            return operator.index(value)
    except TypeError:
        pass
    raise ValueError(f"{name} = {value!r}: expected a whole number")


def is_zero(temperature: Any) -> bool:
    """Returns whether the temperature is known to be 0 for every prompt."""
    return not isinstance(temperature, Tracer) and np.ndim(temperature) == 0 and temperature == 0


def as_prompts(tokens: Any, vocabulary: int) -> Int[AnyArray, "*b t"]:
    """Returns prompts as int32 arrays.

    Args:
        tokens: Token ids, `(b, t)` or `(t,)`.
        vocabulary: Number of tokens in the vocabulary.

    Returns:
        The ids, int32, in the same shape.

    Raises:
        ValueError: When the prompts have another shape or no tokens, are not integers, or contain
            an id outside the vocabulary.
    """
    try:
        ids = tokens if isinstance(tokens, jax.Array) else np.asarray(tokens)
    except ValueError:
        lengths = sorted({np.size(prompt) for prompt in tokens})
        raise ValueError(
            f"prompts of {lengths} tokens: expected one length; generate them one by one"
        ) from None
    if ids.ndim not in (1, 2) or ids.shape[-1] == 0:
        raise ValueError(
            f"prompts of shape {ids.shape}: expected (b, t) or (t,), with at least one token each"
        )
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"prompts of {ids.dtype}: expected whole numbers, the ids of tokens")
    check_tokens(ids, vocabulary)
    return ids.astype(jnp.int32)

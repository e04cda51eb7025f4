"""The decoder in Flax NNX: prefill of a text, then one token per decode step."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from hire.distributed import RowSharding
from hire.estimators.base import map_leading_axes
from hire.models.attention import Attention
from hire.models.cache import Cache
from hire.models.config import DecoderConfig
from hire.models.lm_head import TiedSoftmax, plain_rows, top_tokens
from hire.models.modules import RMSNorm, linear, matrix, mix, module_list
from hire.models.sharding import has_explicit_axes, partition_spec, with_auto_axes
from hire.ops.activations import activate
from hire.ops.checks import check_range
from hire.ops.row_products import row_scores
from hire.ops.soft_cap import cap_softly
from hire.ops.top_k import TopK, group_scores, mask_top_groups
from hire.types import AnyArray, Array, Float, Hidden, Int, States, Tokens


def check_tokens(tokens: Any, vocabulary: int) -> None:
    """Checks that token ids are in the vocabulary.

    Inside jit the ids are unknown, so the check passes.

    Args:
        tokens: Array of token ids.
        vocabulary: Number of tokens in the vocabulary.

    Raises:
        ValueError: When an id is not in 0..vocabulary - 1. The message names the id.
    """
    if isinstance(tokens, Tracer) or not tokens.size:
        return
    ids = np.asarray(tokens)  # inside jit, jnp would trace even a constant
    for token in (int(ids.min()), int(ids.max())):
        if not 0 <= token < vocabulary:
            raise ValueError(
                f"token {token}: expected ids from 0 to {vocabulary - 1}, the model's vocabulary"
            )


class FFN(nnx.Module):
    """Feed-forward layer: activation(gate x) * up x, or ReLU(up x), times down.

    A sparse FFN keeps the groups of neurons with the best scores. A router scores the groups as
    experts; the sigmoid of its score multiplies the output of the group.

    Attributes:
        gate: Weight `(neurons, width)`, or None for ReLU.
        up: Weight `(neurons, width)`.
        down: Weight `(neurons, width)`.
        router: Weight `(groups, width)`, or None.
        activation: "relu", or "gelu_tanh" or "silu" of the gate.
        group_size: Number of neurons in a group.
        kept: Number of groups that the FFN keeps.
    """

    def __init__(self, config: DecoderConfig, layer: int, dtype, rngs: nnx.Rngs):
        shape = config.ffn_width, config.width
        self.group_size, self.kept = config.group_size, config.groups_kept(layer)
        self.activation = config.ffn_activation
        self.gate = matrix(rngs, *shape, config.width, dtype) if config.gated else None
        self.up = matrix(rngs, *shape, config.width, dtype)
        self.down = matrix(rngs, *shape, config.ffn_width, dtype)
        self.router = (
            matrix(rngs, config.groups, config.width, config.width, dtype)
            if config.routed
            else None
        )

    def activations(self, x: Float[Array, "*b d"]) -> Float[Array, "*b f"]:
        """Computes the activation of every neuron, before any group is dropped.

        Args:
            x: Hidden states, `(*b, d)`.

        Returns:
            The activations, `(*b, f)`.
        """
        gate = None if self.gate is None else linear(x, self.gate)
        return activate(linear(x, self.up), gate, self.activation)

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        active = self.activations(x)
        if self.router is not None:
            scores = linear(x, self.router)
            active = mask_top_groups(
                active * jnp.repeat(jax.nn.sigmoid(scores), self.group_size, axis=-1),
                scores,
                self.kept,
            )
        elif self.kept * self.group_size < active.shape[-1]:
            active = mask_top_groups(active, group_scores(active, self.group_size), self.kept)
        return mix(active, self.down)


class Block(nnx.Module):
    """A layer of the decoder: attention, then an FFN.

    A norm precedes each of the two, and the output of each is added to its input. In Gemma a second
    norm follows each of the two, before that sum.

    Attributes:
        attention: The attention, dense or searched.
        ffn: The FFN, dense or searched. It returns zeros if the configuration omits it.
        attention_norm: Norm before the attention.
        post_attention_norm: Norm after the attention, or None.
        ffn_norm: Norm before the FFN.
        post_ffn_norm: Norm after the FFN, or None.
    """

    def __init__(self, config: DecoderConfig, layer: int, dtype, rngs: nnx.Rngs):
        # Wide types: convert installs searches here, and the lab installs functions that record.
        self.attention: Any = Attention(config, layer, dtype, rngs)
        self.ffn: Callable[[jax.Array], jax.Array] = (
            FFN(config, layer, dtype, rngs) if config.ffn_width else jnp.zeros_like
        )
        norm = functools.partial(RMSNorm, config.width, dtype, config.norm_epsilon)
        self.attention_norm = norm()
        self.post_attention_norm = norm() if config.post_norms else None
        self.ffn_norm = norm()
        self.post_ffn_norm = norm() if config.post_norms else None

    def __call__(self, x, attention, *cache):
        """Applies the layer, with a given method of its attention.

        Args:
            x: Hidden states, `(b, t, d)` in prefill or `(b, d)` in a decode step.
            attention: The method of the attention: that of prefill or that of a decode step.
            *cache: Arguments of the method after the hidden states.

        Returns:
            The new hidden states, and the keys and values that the method returns.
        """
        output, keys, values = attention(self.attention_norm(x), *cache)
        x = x + (output if self.post_attention_norm is None else self.post_attention_norm(output))
        output = self.ffn(self.ffn_norm(x))
        x = x + (output if self.post_ffn_norm is None else self.post_ffn_norm(output))
        return x, keys, values


class Decoder(nnx.Module):
    """Decoder-only language model of the Gemma, Llama or Qwen family.

    `Decoder(config, rngs=nnx.Rngs(0))` has random weights, normal with variance 1 / fan-in; biases
    are 0. hire.models.load loads trained weights.

    Under jax.set_mesh(mesh) the rows of every matrix are sharded over the devices of the mesh, and
    are initialized without gathering them. The computation treats the axes of the mesh as Auto.

    Args:
        config: The configuration.
        rngs: Random number generators for the weights.
        dtype: Type of the weights.

    Attributes:
        config: The configuration.
        embedding: Input embedding: a matrix `(v, d)`. If it is tied, it is the LM head too, and may
            be blocks of rows after a conversion.
        untied_head: Rows of the LM head, a matrix `(v, d)` or blocks of rows after a conversion.
            None if the embedding is tied.
        blocks: The layers.
        norm: The final norm.
        softmax: The search over the rows of the LM head, or None for a dense LM head.
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32):
        self.config = config
        self.embedding = matrix(rngs, config.vocabulary, config.width, config.width, dtype)
        self.untied_head = (
            None
            if config.tied
            else matrix(rngs, config.vocabulary, config.width, config.width, dtype)
        )
        self.blocks = module_list(
            [Block(config, layer, dtype, rngs) for layer in range(config.layers)]
        )
        self.norm = RMSNorm(config.width, dtype, config.norm_epsilon)
        # hire.convert sets a softmax that searches the LM head and does not read all of it.
        self.softmax: TiedSoftmax | None = nnx.data(None)

    def embed(self, tokens: Int[AnyArray, "*b"]) -> Float[Array, "*b d"]:
        """Looks up the embeddings of tokens, scaled as the configuration states.

        Args:
            tokens: Token ids, `(*b)`.

        Returns:
            The hidden states before the first layer, `(*b, d)`.
        """
        indices = jnp.asarray(tokens).astype(jnp.int32)
        if self.config.tied:
            indices = self.storage_index(indices)
        rows = self.embedding[...][indices]  # the embedding is a matrix, or blocks of rows
        stored_width = math.prod(rows.shape[indices.ndim :])
        rows = rows.reshape(*indices.shape, stored_width)[..., : self.config.width]
        if not self.config.scaled_embedding:
            return rows
        return rows * jnp.asarray(self.config.width**0.5, rows.dtype)

    @property
    def head(self) -> nnx.Param:
        """The weight of the LM head: the embedding, or `untied_head`."""
        return self.embedding if self.untied_head is None else self.untied_head

    @property
    def row_sharding(self) -> RowSharding | None:
        """The sharding of the LM head that a softmax over several devices needs, or None."""
        return self.softmax.layout if isinstance(self.softmax, TiedSoftmax) else None

    def storage_index(self, tokens: Int[AnyArray, "*b"]) -> Int[AnyArray, "*b"]:
        """Returns the index in the array of the LM head of the row of each token."""
        return (
            tokens
            if self.row_sharding is None
            else self.row_sharding.storage_index(tokens, self.head.shape[0])
        )

    def head_rows(self) -> Float[Array, "v d"]:
        """Returns the LM head with one row per token, in the order of the tokens.

        Returns:
            The rows, `(v, d)`. They are the array of the model itself, or a new array if a
            conversion has stored the rows in blocks or over devices.

        Raises:
            ValueError: When the rows are sharded over devices that no mesh of jax.set_mesh has.
        """
        rows, config = self.head[...], self.config
        if rows.ndim == 2 and self.row_sharding is None:
            return rows
        sharding = partition_spec(config.vocabulary, config.width)
        reorder = functools.partial(
            plain_rows, layout=self.row_sharding, vocabulary=config.vocabulary, width=config.width
        )
        out_sharding = P() if sharding is None else sharding
        call = functools.partial(with_auto_axes, reorder, out_sharding=out_sharding)
        return jax.jit(call, out_shardings=sharding)(rows)

    def method(self, function: Callable, *arrays: Any) -> Any:
        """Calls `function(self, *arrays)`, also on a mesh with Explicit axes.

        On such a mesh the weights and the arrays are all passed as arguments.
        """
        if not has_explicit_axes():
            return function(self, *arrays)
        graph, state = nnx.split(self)
        return with_auto_axes(
            lambda state, *arrays: function(nnx.merge(graph, state), *arrays), state, *arrays
        )

    def prefill(self, tokens: Tokens, cache_length: int | None = None) -> tuple[Hidden, Cache]:
        """Computes the hidden states of texts and fills a cache with them.

        Args:
            tokens: Token ids, `(b, t)`.
            cache_length: Cache length, in tokens. None means `t`.

        Returns:
            The hidden states `(b, t, d)` after every token, and the cache.

        Raises:
            ValueError: When the text is longer than the cache or the cache is longer than the
                context of the model, or for a token id outside the vocabulary. Inside jit the ids
                are unknown and not checked.
        """
        t = tokens.shape[1]
        room = t if cache_length is None else cache_length
        if not 1 <= t <= room <= self.config.context:
            raise ValueError(
                f"{t} tokens and cache_length {room}: expected 1 <= tokens <= cache_length <= "
                f"{self.config.context}, the context"
            )
        check_tokens(tokens, self.config.vocabulary)

        def prefill(model: Decoder, tokens: Tokens) -> tuple[Hidden, tuple, tuple]:
            x, keys, values = model.embed(tokens), [], []
            for block in model.blocks:
                attention = block.attention
                x, key, value = block(x, attention.prefill, min(room, attention.window))
                keys.append(key)
                values.append(value)
            return model.norm(x), tuple(keys), tuple(values)

        hidden, keys, values = self.method(prefill, tokens)
        return hidden, Cache(keys, values, t, room)

    def step(self, token: Int[AnyArray, " b"], cache: Cache) -> tuple[Float[Array, "b d"], Cache]:
        """Computes the hidden state after one more token.

        Args:
            token: Token ids, `(b,)`.
            cache: The cache of the tokens before.

        Returns:
            The hidden state `(b, d)`, and the cache with the new token.

        Raises:
            ValueError: When the cache is full.
        """
        cache.check_room()

        def step(model: Decoder, token: Int[AnyArray, " b"], keys, values, length: Int[Array, ""]):
            x, new_keys, new_values = model.embed(token), [], []
            for block, *cache_entry in zip(model.blocks, keys, values, strict=True):
                x, key, value = block(x, block.attention.step, *cache_entry, length)
                new_keys.append(key)
                new_values.append(value)
            return model.norm(x), tuple(new_keys), tuple(new_values)

        length = jnp.asarray(cache.length, jnp.int32)
        hidden, keys, values = self.method(step, token, cache.keys, cache.values, length)
        return hidden, Cache(keys, values, cache.length + 1, cache.cache_length)

    @property
    def max_top_k(self) -> int:
        """The largest `k` of `best`.

        This is the size of the vocabulary, or the `k` of a converted model's softmax.
        """
        return self.config.vocabulary if self.softmax is None else self.softmax.k

    def top_tokens(self, hidden: States, k: int) -> TopK:
        """Returns the k best tokens by exact logits.

        A converted model searches for them.

        Args:
            hidden: Hidden states, `(b, d)` or `(*b, d)`.
            k: Number of tokens, at most `max_top_k`.

        Returns:
            The logits and the tokens, both `(b, k)` or `(*b, k)`.

        Raises:
            ValueError: When k is not in 1..max_top_k.
        """
        check_range("k", k, 1, self.max_top_k, "the tokens that the softmax returns")
        return top_tokens(self.softmax, self.head[...], self.config.logit_soft_cap, hidden, k)

    def logits(self, hidden: Float[AnyArray, "*b d"]) -> Float[Array, "*b v"]:
        """Computes the exact logits of hidden states.

        Args:
            hidden: Hidden states, `(*b, d)`.

        Returns:
            The logits, float32 `(*b, v)`.
        """

        def logits(model: Decoder, hidden: Float[AnyArray, "*b d"]) -> Float[Array, "*b v"]:
            config, rows = model.config, model.head[...].reshape(model.head.shape[0], -1)
            # Blocks pad each row with zeros.
            padding = (0, 0), (0, rows.shape[1] - config.width)
            scores = map_leading_axes(lambda x: row_scores(jnp.pad(x, padding), rows), hidden)
            if model.row_sharding is not None:
                tokens = jnp.arange(config.vocabulary, dtype=jnp.int32)
                scores = scores[..., model.storage_index(tokens)]
            return cap_softly(scores, config.logit_soft_cap)

        return self.method(logits, hidden)

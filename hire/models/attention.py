"""Attention in prefill, and in decode steps over a key/value cache."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hire.models.config import DecoderConfig
from hire.models.modules import RMSNorm, linear, matrix, mix
from hire.ops import cpu as cpu_kernels
from hire.ops.implementation import dispatch
from hire.ops.matmul import matmul_f32
from hire.ops.soft_cap import cap_softly
from hire.types import Array, Bool, Float, Hidden, Int

KeysOrValues = Float[Array, "b s n e"]


QUERY_BLOCK = 512  # queries per block in the prefill of a long text


def rotate(
    x: Float[Array, "b t h e"],
    positions: Int[Array, " t"],
    base: float,
    factors: Sequence[float] = (),
) -> Float[Array, "b t h e"]:
    """Applies rotary position embeddings (arXiv 2104.09864).

    The first half of each head vector is rotated against the second half.

    Args:
        x: Queries or keys, `(b, t, h, e)`.
        positions: Token positions, `(t,)`.
        base: Base of the rotary frequencies.
        factors: Divisors of the frequencies, `(e / 2,)`, from the highest frequency to the lowest.
            Empty means that none is scaled.

    Returns:
        The rotated vectors, `(b, t, h, e)`, in the type of `x`.
    """
    half = x.shape[-1] // 2
    frequencies = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if factors:
        frequencies = frequencies / jnp.asarray(factors, jnp.float32)
    angles = jnp.outer(positions.astype(jnp.float32), frequencies)
    cos, sin = jnp.cos(angles)[None, :, None, :], jnp.sin(angles)[None, :, None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    ).astype(x.dtype)


# keys, values, and a mask that is True where a query attends to a key
Part = tuple[Float[Array, "b _ n e"], Float[Array, "b _ n e"], Bool[Array, "t _"]]


def attend(
    queries: Float[Array, "b t h e"], *parts: Part, soft_cap: float = 0.0
) -> Float[Array, "b t h e"]:
    """Computes softmax attention over several parts of keys, values and masks.

    One softmax covers all parts, but keys and values are not concatenated into one array.
    Consecutive query heads share one key/value head.

    Args:
        queries: Queries, `(b, t, h, e)`.
        *parts: Keys `(b, s, n, e)`, values `(b, s, n, e)` and a mask `(t, s)`. The parts may differ
            in `s`.
        soft_cap: Scores s become `soft_cap * tanh(s / soft_cap)`. 0 means none.

    Returns:
        The attention output, `(b, t, h, e)`, in the type of `queries`.
    """
    b, t, heads, e = queries.shape
    kv_heads = parts[0][0].shape[2]
    grouped = queries.reshape(b, t, kv_heads, heads // kv_heads, e)
    scores = [
        jnp.where(
            mask[None, None, None],
            cap_softly(attention_scores(grouped, keys) * e**-0.5, soft_cap),
            -jnp.inf,
        )
        for keys, _, mask in parts
    ]
    weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1).astype(parts[0][1].dtype)
    ends = np.cumsum([mask.shape[1] for *_, mask in parts])[:-1]
    part_weights = jnp.split(weights, ends, axis=-1)
    output = functools.reduce(
        jnp.add,
        [
            weighted_values(part_weight, values)
            for part_weight, (_, values, _) in zip(part_weights, parts, strict=True)
        ],
    )
    return output.astype(queries.dtype).reshape(b, t, heads, e)


def attend_to_cache(
    queries: Float[Array, "b 1 h e"],
    keys: KeysOrValues,
    values: KeysOrValues,
    mask: Bool[Array, "1 s"],
    key: Float[Array, "b 1 n e"],
    value: Float[Array, "b 1 n e"],
    soft_cap: float = 0.0,
) -> Float[Array, "b 1 h e"]:
    """Computes softmax attention of one token of each text to the cached tokens and to itself.

    Args:
        queries: Queries, `(b, 1, h, e)`.
        keys: Cached keys, `(b, s, n, e)`.
        values: Cached values, `(b, s, n, e)`.
        mask: True where the tokens attend to the cache, `(1, s)`.
        key: Keys of the tokens themselves, `(b, 1, n, e)`.
        value: Values of the tokens themselves, `(b, 1, n, e)`.
        soft_cap: As in `attend`.

    Returns:
        The attention output, `(b, 1, h, e)`, in the type of `queries`.
    """

    def plain(queries, keys, values, mask, key, value):
        own_part = key, value, jnp.ones((1, 1), bool)
        return attend(queries, (keys, values, mask), own_part, soft_cap=soft_cap)

    def in_kernel(queries, keys, values, mask, key, value):
        attend_once = cpu_kernels.load("attention").attend
        output = attend_once(queries[:, 0], keys, values, mask[0], key[:, 0], value[:, 0])
        return output[:, None].astype(queries.dtype)

    is_supported = (
        not soft_cap
        and cpu_kernels.is_available()
        and cpu_kernels.load("attention").is_supported(keys, values)
    )
    arguments = queries, keys, values, mask, key, value
    return dispatch("auto", plain, *arguments, cpu=in_kernel if is_supported else None)


def attention_scores(
    queries: Float[Array, "b t n g e"], keys: KeysOrValues
) -> Float[Array, "b n g t s"]:
    """Computes unscaled attention scores in float32.

    Args:
        queries: Queries, `(b, t, n, g, e)`, where `g` query heads share each of `n` key/value
            heads.
        keys: Keys, `(b, s, n, e)`.

    Returns:
        The scores, `(b, n, g, t, s)`.
    """
    if queries.shape[1:3] != (1, 1):
        return matmul_f32(queries, keys, "btnge,bsne->bngts")
    # One token, one key/value head: on a CPU XLA transposes the keys unless they are the first
    # operand. For a single text, one product per head is fastest.
    head_queries, keys = queries[:, 0, 0], keys[:, :, 0]
    if len(head_queries) > 1:
        return jnp.swapaxes(matmul_f32(keys, head_queries, "bse,bge->bsg"), 1, 2)[:, None, :, None]
    return jnp.stack([matmul_f32(keys[0], query) for query in head_queries[0]])[None, None, :, None]


def weighted_values(
    weights: Float[Array, "b n g t s"], values: KeysOrValues
) -> Float[Array, "b t n g e"]:
    """Sums the values by their attention weights in float32.

    Args:
        weights: Attention weights, `(b, n, g, t, s)`.
        values: Values, `(b, s, n, e)`.

    Returns:
        The weighted sums, `(b, t, n, g, e)`.
    """
    if (weights.shape[1], weights.shape[3]) != (1, 1):
        return matmul_f32(weights, values, "bngts,bsne->btnge")
    head_weights, values = weights[:, 0, :, 0], values[:, :, 0]
    if len(head_weights) > 1:
        return matmul_f32(head_weights, values, "bgs,bse->bge")[:, None, None]
    return jnp.stack([matmul_f32(text_weights, values[0]) for text_weights in head_weights[0]])[
        None, None, None
    ]


class Attention(nnx.Module):
    """Grouped-query attention.

    A global layer attends to the whole context, a local layer to a window of it.

    Attributes:
        heads: Number of query heads.
        kv_heads: Number of key/value heads.
        head_width: Elements per head.
        window: Number of positions to which a token attends, in tokens. In a global layer this is
            the context.
        base: Base of the rotary frequencies.
        rope_factors: Divisors of the rotary frequencies.
        query_factor: Factor of the queries: the scale of the scores over `head_width ** -0.5`.
        soft_cap: Soft cap of the scores. 0 means none.
        query: Weight `(heads * head_width, width)`.
        key: Weight `(kv_heads * head_width, width)`.
        value: Weight `(kv_heads * head_width, width)`.
        output: Weight `(heads * head_width, width)`.
        query_bias: Bias `(heads * head_width,)`, or None.
        key_bias: Bias `(kv_heads * head_width,)`, or None.
        value_bias: Bias `(kv_heads * head_width,)`, or None.
        query_norm: Norm of each query head, or None.
        key_norm: Norm of each key head, or None.
    """

    def __init__(self, config: DecoderConfig, layer: int, dtype, rngs: nnx.Rngs):
        d, e = config.width, config.head_width
        self.heads, self.kv_heads, self.head_width = config.heads, config.kv_heads, e
        self.window = config.context if config.is_global(layer) else config.window
        self.base = config.rope_base if config.is_global(layer) else config.local_rope_base
        self.rope_factors = config.rope_factors if config.is_global(layer) else ()
        self.query_factor = config.score_scale * e**0.5
        self.soft_cap = config.attention_soft_cap
        self.query = matrix(rngs, config.heads * e, d, d, dtype)
        self.key = matrix(rngs, config.kv_heads * e, d, d, dtype)
        self.value = matrix(rngs, config.kv_heads * e, d, d, dtype)
        self.output = matrix(rngs, config.heads * e, d, config.heads * e, dtype)

        def bias(heads: int) -> nnx.Param | None:
            return nnx.Param(jnp.zeros((heads * e,), dtype)) if config.qkv_bias else None

        self.query_bias, self.key_bias = bias(config.heads), bias(config.kv_heads)
        self.value_bias = bias(config.kv_heads)
        self.query_norm = RMSNorm(e, dtype, config.norm_epsilon) if config.qk_norm else None
        self.key_norm = RMSNorm(e, dtype, config.norm_epsilon) if config.qk_norm else None

    def project(self, x: Hidden, positions: Int[Array, " t"]):
        """Projects hidden states to queries, keys and values.

        Args:
            x: Normalized hidden states, `(b, t, d)`.
            positions: Token positions, `(t,)`.

        Returns:
            Queries `(b, t, h, e)`, keys `(b, t, n, e)` and values `(b, t, n, e)`.
        """
        b, t, _ = x.shape
        queries, keys, values = (
            linear(x, weight, bias).reshape(b, t, heads, self.head_width)
            for weight, bias, heads in (
                (self.query, self.query_bias, self.heads),
                (self.key, self.key_bias, self.kv_heads),
                (self.value, self.value_bias, self.kv_heads),
            )
        )
        if self.query_norm is not None and self.key_norm is not None:
            queries, keys = self.query_norm(queries), self.key_norm(keys)
        if self.query_factor != 1:
            queries = queries * jnp.asarray(self.query_factor, queries.dtype)
        queries, keys = (
            rotate(part, positions, self.base, self.rope_factors) for part in (queries, keys)
        )
        return queries, keys, values

    def prefill(self, x: Hidden, cache_length: int):
        """Computes attention within texts that start at position 0.

        Args:
            x: Normalized hidden states, `(b, t, d)`.
            cache_length: Cache length of this layer, in tokens.

        Returns:
            The output `(b, t, d)`, and the keys and the values for the cache, each
            `(b, cache_length, n, e)`.
        """
        b, t, _ = x.shape
        queries, keys, values = self.project(x, jnp.arange(t, dtype=jnp.int32))
        output = self.causal(queries, keys, values)
        return (
            mix(output.reshape(b, t, self.heads * self.head_width), self.output),
            self.cache_entries(keys, cache_length),
            self.cache_entries(values, cache_length),
        )

    def causal(
        self,
        queries: Float[Array, "b t h e"],
        keys: Float[Array, "b t n e"],
        values: Float[Array, "b t n e"],
    ) -> Float[Array, "b t h e"]:
        """Computes attention of every position to its window.

        Queries of a long text are processed in blocks. Each block reads only the span of keys that
        its queries can see. The scores of all queries, 1 GB for 4 heads and 8K tokens, are thus
        never in memory at once.

        Args:
            queries: Queries, `(b, t, h, e)`.
            keys: Keys, `(b, t, n, e)`.
            values: Values, `(b, t, n, e)`.

        Returns:
            The attention output, `(b, t, h, e)`.
        """
        b, t, *head_shape = queries.shape
        size = min(t, QUERY_BLOCK)
        span = min(t, size + self.window)

        def block(
            start: Int[Array, ""], queries: Float[Array, "b _ h e"]
        ) -> Float[Array, "b _ h e"]:
            span_start = jnp.clip(start + size - span, 0, t - span)
            kv = [
                jax.lax.dynamic_slice_in_dim(part, span_start, span, axis=1)
                for part in (keys, values)
            ]
            # Padding in the last block sees the same keys as the last token.
            positions = jnp.minimum(start + jnp.arange(size, dtype=jnp.int32), t - 1)
            distance = positions[:, None] - (span_start + jnp.arange(span, dtype=jnp.int32))[None]
            is_visible = (distance >= 0) & (distance < self.window)
            return attend(queries, (kv[0], kv[1], is_visible), soft_cap=self.soft_cap)

        if size == t:
            return block(jnp.int32(0), queries)
        num_blocks = -(-t // size)
        blocks = (
            jnp.pad(queries, ((0, 0), (0, -t % size), (0, 0), (0, 0)))
            .reshape(b, num_blocks, size, *head_shape)
            .swapaxes(0, 1)
        )
        starts = jnp.arange(0, t, size, dtype=jnp.int32)
        output = jax.lax.map(lambda part: block(*part), (starts, blocks))
        return output.swapaxes(0, 1).reshape(b, num_blocks * size, *head_shape)[:, :t]

    def cache_entries(self, entries: Float[Array, "b t n e"], cache_length: int) -> KeysOrValues:
        """Arranges keys or values as a ring buffer.

        Position p goes to index p mod `cache_length`. Only the last `cache_length` positions
        remain.

        Args:
            entries: Keys or values, `(b, t, n, e)`.
            cache_length: Cache length, in tokens.

        Returns:
            The cache, `(b, cache_length, n, e)`.
        """
        t = entries.shape[1]
        if t <= cache_length:
            return jnp.pad(entries, ((0, 0), (0, cache_length - t), (0, 0), (0, 0)))
        return jnp.roll(entries[:, t - cache_length :], t % cache_length, axis=1)

    def step(
        self,
        x: Float[Array, "b d"],
        keys: KeysOrValues,
        values: KeysOrValues,
        length: Int[Array, ""],
    ):
        """Computes attention of one token and writes the token to the cache.

        The cached tokens and the new token are two parts of the attention, because XLA copies a
        cache that is read after it is written.

        Args:
            x: Normalized hidden states of the new token, `(b, d)`.
            keys: Cached keys, `(b, s, n, e)`.
            values: Cached values, `(b, s, n, e)`.
            length: Number of cached tokens, which is the position of the new token.

        Returns:
            The output `(b, d)`, and the updated keys and values.
        """
        queries, key, value = self.project(x[:, None], length[None])
        mask = self.attention_mask(keys.shape[1], length)
        output = attend_to_cache(queries, keys, values, mask, key, value, self.soft_cap)
        key, value = ordered_after(output, key), ordered_after(output, value)
        return (
            mix(output.reshape(x.shape[0], self.heads * self.head_width), self.output),
            write_slot(keys, key, length),
            write_slot(values, value, length),
        )

    def attention_mask(self, cache_length: int, length: Int[Array, ""]) -> Bool[Array, "1 s"]:
        """Marks the cache indices to which the token at position `length` attends.

        Args:
            cache_length: Cache length, in tokens.
            length: Number of cached tokens.

        Returns:
            The mask, `(1, cache_length)`.
        """
        slot = jnp.arange(cache_length, dtype=jnp.int32)
        # The position at each cache index; negative where the index is empty.
        positions = length - 1 - (length % cache_length - 1 - slot) % cache_length
        return ((positions >= 0) & (length - positions < self.window))[None]


def ordered_after(read: Array, entry: Float[Array, "b 1 n e"]) -> Float[Array, "b 1 n e"]:
    """Makes a cache entry depend on a result that was computed from the cache.

    XLA then sees that the read ends before the write, and copies nothing.

    Args:
        read: A result that was computed from the cache.
        entry: The entry to write, `(b, 1, n, e)`.

    Returns:
        The entry, unchanged in value.
    """
    if not read.size:
        return entry
    first = read.reshape(-1)[0]
    # 0 * inf is NaN. Without jnp.where, an overflow in one text would reach the keys of all texts.
    return entry + jnp.where(jnp.isfinite(first), 0 * first, jnp.zeros_like(first))


def write_slot(cache: Array, entry: Array, length: Int[Array, ""]) -> Array:
    """Writes the entry of one position into a ring-buffer cache.

    Args:
        cache: Keys, values or their encodings, `(b, s, …)`.
        entry: The entry to write, `(b, 1, …)`.
        length: Position of the entry.

    Returns:
        The updated cache, `(b, s, …)`.
    """
    return jax.lax.dynamic_update_slice_in_dim(cache, entry, length % cache.shape[1], axis=1)

"""The decoder, in Flax NNX: one forward pass over a whole text (prefill) and one token at a time (step).

Weights are (out, in), so that an output is one contiguous row; the FFN's second matrix is stored as the first, one row per neuron,
so that a group of neurons is one contiguous read in every matrix. Norms, positions and softmax are computed in float32.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from hire.axes import AnyArray, Array, Float, Hidden, Int, Mask, Tokens
from hire.models.config import DecoderConfig

module_list = getattr(nnx, "List", list)  # flax before 0.12 tracks plain lists and has no nnx.List

KeysOrValues = Float[Array, "b s n e"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """Keys and values of every layer, and how many tokens they hold. A local layer keeps its window only, as a ring."""

    keys: tuple[Float[Array, "b _ n e"], ...]
    values: tuple[Float[Array, "b _ n e"], ...]
    length: Int[Array, ""]


class RMSNorm(nnx.Module):
    """x / rms(x) * scale. The scale is the whole factor; files that store it minus one are converted when loaded."""

    def __init__(self, width: int, dtype):
        self.scale = nnx.Param(jnp.ones((width,), dtype))

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        exact = x.astype(jnp.float32)
        mean_square = jnp.mean(exact**2, axis=-1, keepdims=True)
        scale = jnp.expand_dims(self.scale[...].astype(jnp.float32), range(x.ndim - 1))
        return (exact * jax.lax.rsqrt(mean_square + 1e-6) * scale).astype(x.dtype)


def matrix(rngs: nnx.Rngs, rows: int, columns: int, fan_in: int, dtype) -> nnx.Param:
    """A (rows, columns) weight, normal with variance 1 / fan_in."""
    return nnx.Param(jax.random.normal(rngs.params(), (rows, columns), dtype) * jnp.asarray(fan_in**-0.5, dtype))


def linear(x: Float[Array, "*b d"], weight: nnx.Param) -> Float[Array, "*b f"]:
    return jnp.matmul(x, weight[...].T, preferred_element_type=jnp.float32).astype(x.dtype)


def rotate(x: Float[Array, "b t h e"], positions: Int[Array, " t"], base: float) -> Float[Array, "b t h e"]:
    """Rotary positions, halves rotated against each other (arXiv 2104.09864)."""
    half = x.shape[-1] // 2
    speeds = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = jnp.outer(positions.astype(jnp.float32), speeds)
    cos, sin = jnp.cos(angles)[None, :, None, :], jnp.sin(angles)[None, :, None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def attend(queries: Float[Array, "b t h e"], keys: KeysOrValues, values: KeysOrValues, mask: Mask) -> Float[Array, "b t h e"]:
    """Softmax attention of grouped query heads: consecutive query heads share a key/value head."""
    b, t, heads, e = queries.shape
    grouped = queries.reshape(b, t, keys.shape[2], -1, e)
    scores = jnp.einsum("btnge,bsne->bngts", grouped, keys, preferred_element_type=jnp.float32) * e**-0.5
    weights = jax.nn.softmax(jnp.where(mask[None, None, None], scores, -jnp.inf), axis=-1).astype(values.dtype)
    mixed = jnp.einsum("bngts,bsne->btnge", weights, values, preferred_element_type=jnp.float32)
    return mixed.astype(queries.dtype).reshape(b, t, heads, e)


class Attention(nnx.Module):
    """Grouped-query attention with normed queries and keys, over the whole context or a window of it."""

    def __init__(self, config: DecoderConfig, layer: int, dtype, rngs: nnx.Rngs):
        d, e = config.width, config.head_width
        self.heads, self.kv_heads, self.head_width = config.heads, config.kv_heads, e
        self.window = config.context if config.is_global(layer) else config.window
        self.base = config.rope_base if config.is_global(layer) else config.local_rope_base
        self.query = matrix(rngs, config.heads * e, d, d, dtype)
        self.key = matrix(rngs, config.kv_heads * e, d, d, dtype)
        self.value = matrix(rngs, config.kv_heads * e, d, d, dtype)
        self.output = matrix(rngs, d, config.heads * e, config.heads * e, dtype)
        self.query_norm = RMSNorm(e, dtype)
        self.key_norm = RMSNorm(e, dtype)

    def project(self, x: Hidden, positions: Int[Array, " t"]):
        """Queries (b, t, h, e), keys and values (b, t, n, e) of positions (t,)."""
        b, t, _ = x.shape
        queries, keys, values = (
            linear(x, weight).reshape(b, t, -1, self.head_width) for weight in (self.query, self.key, self.value)
        )
        queries = rotate(self.query_norm(queries), positions, self.base)
        return queries, rotate(self.key_norm(keys), positions, self.base), values

    def whole(self, x: Hidden, slots: int):
        """Attention within a text that starts at position 0; also keys and values as a cache of so many slots holds them."""
        b, t, _ = x.shape
        positions = jnp.arange(t)
        queries, keys, values = self.project(x, positions)
        age = positions[:, None] - positions[None, :]
        mixed = attend(queries, keys, values, (age >= 0) & (age < self.window))
        return linear(mixed.reshape(b, t, -1), self.output), self.stored(keys, slots), self.stored(values, slots)

    def stored(self, entries: Float[Array, "b t n e"], slots: int) -> KeysOrValues:
        """Position p in slot p mod `slots`; only the last `slots` positions are kept."""
        t = entries.shape[1]
        if t <= slots:
            return jnp.pad(entries, ((0, 0), (0, slots - t), (0, 0), (0, 0)))
        return jnp.roll(entries[:, t - slots :], t % slots, axis=1)

    def step(self, x: Float[Array, "b d"], keys: KeysOrValues, values: KeysOrValues, length: Int[Array, ""]):
        """Attention of the token at position `length`, which is first written into the cache."""
        queries, key, value = self.project(x[:, None], length[None])
        slots = keys.shape[1]
        slot = length % slots
        keys = jax.lax.dynamic_update_slice_in_dim(keys, key, slot, axis=1)
        values = jax.lax.dynamic_update_slice_in_dim(values, value, slot, axis=1)
        held = length - (length - jnp.arange(slots)) % slots  # the position that each slot holds, negative if none yet
        mixed = attend(queries, keys, values, ((held >= 0) & (length - held < self.window))[None])
        return linear(mixed.reshape(x.shape[0], -1), self.output), keys, values


class FFN(nnx.Module):
    """GELU(gate x) * up x, or ReLU(up x), times down; all three (neurons, width)."""

    def __init__(self, config: DecoderConfig, dtype, rngs: nnx.Rngs):
        shape = config.ffn_width, config.width
        self.gate = matrix(rngs, *shape, config.width, dtype) if config.gated else None
        self.up = matrix(rngs, *shape, config.width, dtype)
        self.down = matrix(rngs, *shape, config.ffn_width, dtype)

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        up = linear(x, self.up)
        active = jax.nn.relu(up) if self.gate is None else jax.nn.gelu(linear(x, self.gate), approximate=True) * up
        return jnp.matmul(active, self.down[...], preferred_element_type=jnp.float32).astype(x.dtype)


class Block(nnx.Module):
    """Attention, then FFN, each between two norms and added to its input."""

    def __init__(self, config: DecoderConfig, layer: int, dtype, rngs: nnx.Rngs):
        self.attention = Attention(config, layer, dtype, rngs)
        self.ffn = FFN(config, dtype, rngs)
        self.attention_norm = RMSNorm(config.width, dtype)
        self.post_attention_norm = RMSNorm(config.width, dtype)
        self.ffn_norm = RMSNorm(config.width, dtype)
        self.post_ffn_norm = RMSNorm(config.width, dtype)

    def __call__(self, x, attention, *cache):
        """The block with either way of attention: x (*b, d), and what that way of attention returns beside its output."""
        mixed, keys, values = attention(self.attention_norm(x), *cache)
        x = x + self.post_attention_norm(mixed)
        return x + self.post_ffn_norm(self.ffn(self.ffn_norm(x))), keys, values


class Decoder(nnx.Module):
    """The language model. `Decoder(config, rngs=nnx.Rngs(0))` has random weights; hire.models.load_gemma has real ones."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, dtype=jnp.float32):
        self.config = config
        self.embedding = matrix(rngs, config.vocabulary, config.width, config.width, dtype)
        self.blocks = module_list([Block(config, layer, dtype, rngs) for layer in range(config.layers)])
        self.norm = RMSNorm(config.width, dtype)

    def embed(self, tokens: Int[AnyArray, "*b"]) -> Float[Array, "*b d"]:
        rows = self.embedding[...][tokens]
        return rows * jnp.asarray(self.config.width**0.5, rows.dtype)

    def prefill(self, tokens: Tokens, slots: int | None = None) -> tuple[Hidden, Cache]:
        """Hidden states (b, t, d) after every token of texts (b, t), and a cache for contexts of up to `slots` tokens.

        Raises ValueError when the text does not fit the slots (its own length by default) or those the model's context.
        """
        t = tokens.shape[1]
        room: int = t if slots is None else slots
        if not 1 <= t <= room <= self.config.context:
            raise ValueError(
                f"{t} tokens and {room} cache slots: expected 1 <= tokens <= slots <= {self.config.context}, the context"
            )
        x, keys, values = self.embed(tokens), [], []
        for block in self.blocks:
            x, key, value = block(x, block.attention.whole, min(room, block.attention.window))
            keys.append(key)
            values.append(value)
        return self.norm(x), Cache(tuple(keys), tuple(values), jnp.asarray(t, jnp.int32))

    def step(self, token: Int[Array, " b"], cache: Cache) -> tuple[Float[Array, "b d"], Cache]:
        """Hidden state (b, d) after one more token (b,), and the cache with it. The caller keeps to the cache's slots."""
        x, keys, values = self.embed(token), [], []
        for block, *held in zip(self.blocks, cache.keys, cache.values, strict=True):
            x, key, value = block(x, block.attention.step, *held, cache.length)
            keys.append(key)
            values.append(value)
        return self.norm(x), Cache(tuple(keys), tuple(values), cache.length + 1)

    def logits(self, hidden: Float[AnyArray, "*b d"]) -> Float[Array, "*b v"]:
        """Exact logits, float32, of hidden states."""
        return jnp.matmul(hidden, self.embedding[...].T, preferred_element_type=jnp.float32)

"""The decoder, in Flax NNX: one forward pass over a whole text (prefill) and one token at a time (step).

Weights are (out, in), so that an output is one contiguous row. The last ones of attention and FFN are (in, out): a neuron
has one contiguous row in every matrix of the FFN. Norms, positions and softmax are computed in float32.
"""

import functools
from collections.abc import Callable
from dataclasses import field
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from hire.axes import AnyArray, Array, Blocks, Bool, Float, Hidden, Int, Queries, Rows, Tokens
from hire.distributed import Axis
from hire.estimators import Estimator, Quantized, product, row_scores, row_sums
from hire.ffn import activate
from hire.models.config import DecoderConfig
from hire.pytrees import pytree
from hire.softmax import HireSoftmax
from hire.topk import TopK, check_count, exact_top_k, group_scores, keep_groups

module_list = getattr(nnx, "List", list)  # flax before 0.12 tracks plain lists and has no nnx.List

KeysOrValues = Float[Array, "b s n e"]
BLOCK = 512  # queries of a long text that attend at a time


@runtime_checkable
class WordSearch(Protocol):
    """What a model may have to find its words by: a pytree that is lent the rows of the embedding at every call."""

    def over(self, rows: Rows | Blocks) -> Callable[[Queries], TopK]: ...


@pytree
class TiedSoftmax:
    """A HireSoftmax less its rows, which the model lends at every call: its embedding stays the one copy of them.

    Quantized rows are its own.
    """

    estimator: Estimator
    rows: Quantized | None
    k: int = field(metadata=dict(static=True))
    candidates: int = field(metadata=dict(static=True))
    form: str = field(metadata=dict(static=True), default="auto")
    axis: str | Axis | None = field(metadata=dict(static=True), default=None)

    def over(self, rows: Rows | Blocks) -> HireSoftmax:
        own = rows if self.rows is None else self.rows
        return HireSoftmax(own, self.estimator, self.k, self.candidates, form=self.form, axis=self.axis)

    @property
    def layout(self) -> Axis | None:
        """How the rows of the embedding lie over devices; None where they lie in their own order."""
        return Axis.of(self.axis) if self.rows is None and self.axis is not None else None


@functools.partial(jax.jit, static_argnames="k")
def best_words(softmax: WordSearch | None, rows: Rows | Blocks, hidden: Float[Array, "b d"], k: int) -> TopK:
    """The k best words (b, k) by exact logits: of all rows, or of those that a search finds.

    Compiled, since a softmax that is built of arrays validates its rows, which reads all of them.
    """

    def best(softmax: WordSearch | None, rows: Rows | Blocks, hidden: Float[Array, "b d"]) -> TopK:
        if softmax is None:
            return exact_top_k(row_scores(hidden, rows), k)
        return TopK(*(part[:, :k] for part in softmax.over(rows)(hidden)))

    return with_auto_axes(best, softmax, rows, hidden)


def plain_rows(rows: Rows | Blocks, layout: Axis | None, vocabulary: int, width: int) -> Float[Array, "v _"]:
    """The rows (v, d) in the order of their tokens, of an embedding in blocks, over devices or both.

    Raises ValueError when the rows lie over an axis that no mesh of jax.set_mesh has.
    """
    if layout is not None:
        rows = rows[layout.stored(jnp.arange(vocabulary, dtype=jnp.int32), len(rows))]
    return jnp.asarray(rows).reshape(vocabulary, -1)[:, :width]


def has_explicit_axes() -> bool:
    """Whether the mesh of jax.set_mesh has axes on which every operation must name its sharding."""
    return AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types


def with_auto_axes(function: Callable, *arrays: Any, out_sharding: P = P()) -> Any:
    """function(*arrays), of pytrees, where the compiler chooses how intermediate arrays lie.

    That is so anyway, but on a mesh with Explicit axes (the default of jax.make_mesh since 0.9);
    there the results lie as out_sharding says, by default whole on every device.
    """
    if not has_explicit_axes():
        return function(*arrays)
    leaves, tree = jax.tree.flatten(arrays)
    call = jax.sharding.auto_axes(lambda *leaves: function(*tree.unflatten(leaves)), out_sharding=out_sharding)
    if jax.__version_info__ < (0, 10):  # jax 0.7 chooses shardings outside jit that do not divide
        call = jax.jit(call)
    return call(*leaves)


def check_tokens(tokens: Any, vocabulary: int) -> None:
    """Raise ValueError, naming it, for a token id outside 0..vocabulary - 1 (inside jit none can be seen)."""
    if isinstance(tokens, Tracer) or not tokens.size:
        return
    ids = np.asarray(tokens)  # jnp would trace it inside jit, even of a constant
    for token in (int(ids.min()), int(ids.max())):
        if not 0 <= token < vocabulary:
            raise ValueError(f"token {token}: expected ids from 0 to {vocabulary - 1}, the model's vocabulary")


@pytree
class Cache:
    """Keys and values (b, slots, n, e) of every layer, and how many slots hold a token. A local layer has slots for its
    window only, as a ring; one that is searched keeps its keys as hire.models.keys.Keys.
    """

    keys: tuple[Any, ...]
    values: tuple[Float[Array, "b _ n e"], ...]
    length: Int[Array, ""] | int  # a plain int between steps, so that no check has to wait for the device
    slots: int = field(metadata=dict(static=True))

    def check_room(self) -> None:
        """Raise ValueError when the slots are full (inside a compiled function nobody can tell)."""
        if not isinstance(self.length, Tracer) and self.length >= self.slots:
            raise ValueError(f"the cache's {self.slots} slots are full: expected room for one more token; prefill with more slots")


class RMSNorm(nnx.Module):
    """x / rms(x) * scale. The scale is the whole factor; files that store it minus one are converted when loaded."""

    def __init__(self, width: int, dtype):
        self.scale = nnx.Param(jnp.ones((width,), dtype))

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        exact = x.astype(jnp.float32)
        mean_square = jnp.mean(exact**2, axis=-1, keepdims=True)
        scale = jnp.expand_dims(self.scale[...].astype(jnp.float32), range(x.ndim - 1))
        return (exact * jax.lax.rsqrt(mean_square + 1e-6) * scale).astype(x.dtype)


def spread(rows: int, columns: int = 0) -> P | None:
    """Where a weight lies: the rows of a matrix go over all devices of the mesh that jax.set_mesh has set. Where they do not divide
    them, and of a vector, which has no columns, each device holds all. None without a mesh.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return None
    return P(mesh.axis_names, None) if columns and rows % mesh.size == 0 else P()


@functools.cache
def drawing(shape: tuple[int, int], fan_in: int, dtype, lies: P | None) -> Callable[[jax.Array], Rows]:
    # One matrix, one program, which holds it and three like it; of a whole model in one program XLA would hold them all. On a mesh
    # that is so for each device's own rows.
    def draw(key: jax.Array) -> Rows:
        return jax.random.normal(key, shape, dtype) * jnp.asarray(fan_in**-0.5, dtype)

    out = P() if lies is None else lies
    return jax.jit(lambda key: with_auto_axes(draw, key, out_sharding=out), out_shardings=lies)


def matrix(rngs: nnx.Rngs, rows: int, columns: int, fan_in: int, dtype) -> nnx.Param:
    """A (rows, columns) weight, normal with variance 1 / fan_in, spread over the mesh where there is one."""
    return nnx.Param(drawing((rows, columns), fan_in, dtype, spread(rows, columns))(rngs.params()))


def linear(x: Float[Array, "*b d"], weight: nnx.Param) -> Float[Array, "*b f"]:
    """x with every row of a weight (f, d)."""
    return row_scores(x.reshape(-1, x.shape[-1]), weight[...]).reshape(*x.shape[:-1], -1).astype(x.dtype)


def mix(shares: Float[Array, "*b f"], weight: nnx.Param) -> Float[Array, "*b d"]:
    """The rows of a weight (f, d), each times its share, summed."""
    return row_sums(shares, weight[...]).astype(shares.dtype)


def rotate(x: Float[Array, "b t h e"], positions: Int[Array, " t"], base: float) -> Float[Array, "b t h e"]:
    """Rotary positions, halves rotated against each other (arXiv 2104.09864)."""
    half = x.shape[-1] // 2
    speeds = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = jnp.outer(positions.astype(jnp.float32), speeds)
    cos, sin = jnp.cos(angles)[None, :, None, :], jnp.sin(angles)[None, :, None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


Part = tuple[Float[Array, "b _ n e"], Float[Array, "b _ n e"], Bool[Array, "t _"]]  # keys, values and who sees them


def attend(queries: Float[Array, "b t h e"], *parts: Part) -> Float[Array, "b t h e"]:
    """Softmax attention of grouped query heads (consecutive ones share a key/value head) over parts of keys, values and a mask.

    The parts count as one, without being put into one array.
    """
    b, t, heads, e = queries.shape
    grouped = queries.reshape(b, t, parts[0][0].shape[2], -1, e)
    scores = [jnp.where(mask[None, None, None], products(grouped, keys) * e**-0.5, -jnp.inf) for keys, _, mask in parts]
    weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1).astype(parts[0][1].dtype)
    ends = np.cumsum([mask.shape[1] for *_, mask in parts])[:-1]
    shares = jnp.split(weights, ends, axis=-1)
    mixed = functools.reduce(jnp.add, [mixture(share, values) for share, (_, values, _) in zip(shares, parts, strict=True)])
    return mixed.astype(queries.dtype).reshape(b, t, heads, e)


def products(queries: Float[Array, "b t n g e"], keys: KeysOrValues) -> Float[Array, "b n g t s"]:
    if queries.shape[1:3] != (1, 1):
        return product(queries, keys, "btnge,bsne->bngts")
    # One token, one key/value head: for a CPU XLA turns the keys over, unless they come first; one text is fastest head by head.
    texts, keys = queries[:, 0, 0], keys[:, :, 0]
    if len(texts) > 1:
        return jnp.swapaxes(product(keys, texts, "bse,bge->bsg"), 1, 2)[:, None, :, None]
    return jnp.stack([product(keys[0], query) for query in texts[0]])[None, None, :, None]


def mixture(weights: Float[Array, "b n g t s"], values: KeysOrValues) -> Float[Array, "b t n g e"]:
    if (weights.shape[1], weights.shape[3]) != (1, 1):
        return product(weights, values, "bngts,bsne->btnge")
    shares, values = weights[:, 0, :, 0], values[:, :, 0]
    if len(shares) > 1:
        return product(shares, values, "bgs,bse->bge")[:, None, None]
    return jnp.stack([product(share, values[0]) for share in shares[0]])[None, None, None]


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
        self.output = matrix(rngs, config.heads * e, d, config.heads * e, dtype)
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
        queries, keys, values = self.project(x, jnp.arange(t, dtype=jnp.int32))
        mixed = self.causal(queries, keys, values)
        return mix(mixed.reshape(b, t, -1), self.output), self.stored(keys, slots), self.stored(values, slots)

    def causal(
        self, queries: Float[Array, "b t h e"], keys: Float[Array, "b t n e"], values: Float[Array, "b t n e"]
    ) -> Float[Array, "b t h e"]:
        """Every position attends to its window. Queries of a long text go block by block, each over the span of keys that it can
        see: the scores of all, 1 GB for 4 heads of 8K tokens, are never held.
        """
        b, t, *each = queries.shape
        size = min(t, BLOCK)
        span = min(t, size + self.window)

        def block(start: Int[Array, ""], queries: Float[Array, "b _ h e"]) -> Float[Array, "b _ h e"]:
            first = jnp.clip(start + size - span, 0, t - span)
            near = [jax.lax.dynamic_slice_in_dim(part, first, span, axis=1) for part in (keys, values)]
            # What fills the last block up sees what the last token does.
            positions = jnp.minimum(start + jnp.arange(size, dtype=jnp.int32), t - 1)
            age = positions[:, None] - (first + jnp.arange(span, dtype=jnp.int32))[None]
            return attend(queries, (near[0], near[1], (age >= 0) & (age < self.window)))

        if size == t:
            return block(jnp.int32(0), queries)
        blocks = jnp.pad(queries, ((0, 0), (0, -t % size), (0, 0), (0, 0))).reshape(b, -1, size, *each).swapaxes(0, 1)
        starts = jnp.arange(0, t, size, dtype=jnp.int32)
        mixed = jax.lax.map(lambda part: block(*part), (starts, blocks))
        return mixed.swapaxes(0, 1).reshape(b, -1, *each)[:, :t]

    def stored(self, entries: Float[Array, "b t n e"], slots: int) -> KeysOrValues:
        """Position p in slot p mod `slots`; only the last `slots` positions are kept."""
        t = entries.shape[1]
        if t <= slots:
            return jnp.pad(entries, ((0, 0), (0, slots - t), (0, 0), (0, 0)))
        return jnp.roll(entries[:, t - slots :], t % slots, axis=1)

    def step(self, x: Float[Array, "b d"], keys: KeysOrValues, values: KeysOrValues, length: Int[Array, ""]):
        """Attention of the token at position `length`, which is then written into the cache.

        It attends to what the cache held and to itself as two parts: XLA copies a cache that is read after writing.
        """
        queries, key, value = self.project(x[:, None], length[None])
        mixed = attend(queries, (keys, values, self.seen(keys.shape[1], length)), (key, value, jnp.ones((1, 1), bool)))
        key, value = after(mixed, key), after(mixed, value)
        return mix(mixed.reshape(x.shape[0], -1), self.output), written(keys, key, length), written(values, value, length)

    def seen(self, slots: int, length: Int[Array, ""]) -> Bool[Array, "1 s"]:
        """Which of so many slots hold a position that the token at position `length` attends to."""
        slot = jnp.arange(slots, dtype=jnp.int32)
        held = length - 1 - (length % slots - 1 - slot) % slots  # each slot's position, or below 0
        return ((held >= 0) & (length - held < self.window))[None]


def after(read: Array, entry: Float[Array, "b 1 n e"]) -> Float[Array, "b 1 n e"]:
    """An entry that depends on what was read, so that XLA sees the reading end before it is written, and copies nothing."""
    first = read.reshape(-1)[0]
    # 0 * inf is NaN: without the choice one text's overflow would reach the keys of all others.
    return entry + jnp.where(jnp.isfinite(first), 0 * first, jnp.zeros_like(first))


def written(cache: Array, entry: Array, length: Int[Array, ""]) -> Array:
    """A cache (b, s, …) with the entry (b, 1, …) of position `length` in its slot."""
    return jax.lax.dynamic_update_slice_in_dim(cache, entry, length % cache.shape[1], axis=1)


class FFN(nnx.Module):
    """GELU(gate x) * up x, or ReLU(up x), times down; all three (neurons, width). A sparse one keeps the best groups of neurons.

    A router (groups, width), where there is one, scores the groups as experts, whose output is weighted by the sigmoid of that.
    """

    def __init__(self, config: DecoderConfig, layer: int, dtype, rngs: nnx.Rngs):
        shape = config.ffn_width, config.width
        self.group_size, self.kept = config.group_size, config.groups_kept(layer)
        self.gate = matrix(rngs, *shape, config.width, dtype) if config.gated else None
        self.up = matrix(rngs, *shape, config.width, dtype)
        self.down = matrix(rngs, *shape, config.ffn_width, dtype)
        self.router = matrix(rngs, config.groups, config.width, config.width, dtype) if config.routed else None

    def activations(self, x: Float[Array, "*b d"]) -> Float[Array, "*b f"]:
        """What each neuron passes on, before any is dropped."""
        return activate(linear(x, self.up), None if self.gate is None else linear(x, self.gate))

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        active = self.activations(x)
        if self.router is not None:
            scores = linear(x, self.router)
            active = keep_groups(active * jnp.repeat(jax.nn.sigmoid(scores), self.group_size, axis=-1), scores, self.kept)
        elif self.kept * self.group_size < active.shape[-1]:
            active = keep_groups(active, group_scores(active, self.group_size), self.kept)
        return mix(active, self.down)


class Block(nnx.Module):
    """Attention, then FFN, each between two norms and added to its input."""

    def __init__(self, config: DecoderConfig, layer: int, dtype, rngs: nnx.Rngs):
        # convert puts a search in their place, and the lab what it wants to look at
        self.attention: Any = Attention(config, layer, dtype, rngs)
        self.ffn: Callable[[jax.Array], jax.Array] = FFN(config, layer, dtype, rngs) if config.ffn_width else jnp.zeros_like
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
    """The language model, in Gemma 3's form. `Decoder(config, rngs=nnx.Rngs(0))` has random weights of type `dtype`, normal with
    variance 1 / fan-in; hire.models.load_gemma has real ones.

    Under jax.set_mesh(mesh) the rows of every matrix lie over the mesh's devices (whose axes are Auto), drawn where they lie.
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, dtype=jnp.float32):
        self.config = config
        self.embedding = matrix(rngs, config.vocabulary, config.width, config.width, dtype)
        self.blocks = module_list([Block(config, layer, dtype, rngs) for layer in range(config.layers)])
        self.norm = RMSNorm(config.width, dtype)
        self.softmax: TiedSoftmax | None = nnx.data(None)  # of hire.convert: searches the embedding instead of reading all of it

    def embed(self, tokens: Int[AnyArray, "*b"]) -> Float[Array, "*b d"]:
        where = self.stored(jnp.asarray(tokens).astype(jnp.int32))
        rows = self.embedding[...][where]  # of a matrix, or of blocks of rows
        rows = rows.reshape(*tokens.shape, -1)[..., : self.config.width]
        return rows * jnp.asarray(self.config.width**0.5, rows.dtype)

    @property
    def laid(self) -> Axis | None:
        """How the rows of the embedding lie where a softmax over several devices has put them."""
        return self.softmax.layout if isinstance(self.softmax, TiedSoftmax) else None

    def stored(self, words: Int[AnyArray, "*b"]) -> Int[AnyArray, "*b"]:
        """Where the embedding has the rows of words."""
        return words if self.laid is None else self.laid.stored(words, self.embedding.shape[0])

    def token_embeddings(self) -> Float[Array, "v d"]:
        """The embedding (v, d), one row a token, in the order of the tokens.

        This is the array itself, or a new one where a conversion has put the rows into blocks or
        over devices. Raises ValueError when those devices are not of a mesh of jax.set_mesh.
        """
        rows, config = self.embedding[...], self.config
        if rows.ndim == 2 and self.laid is None:
            return rows
        lies = spread(config.vocabulary, config.width)
        plain = functools.partial(plain_rows, layout=self.laid, vocabulary=config.vocabulary, width=config.width)
        out = P() if lies is None else lies
        call = functools.partial(with_auto_axes, plain, out_sharding=out)
        return jax.jit(call, out_shardings=lies)(rows)

    def method(self, function: Callable, *arrays: Any) -> Any:
        """function(self, *arrays), also on a mesh with Explicit axes, where all are arguments."""
        if not has_explicit_axes():
            return function(self, *arrays)
        graph, state = nnx.split(self)
        return with_auto_axes(lambda state, *arrays: function(nnx.merge(graph, state), *arrays), state, *arrays)

    def prefill(self, tokens: Tokens, slots: int | None = None) -> tuple[Hidden, Cache]:
        """Hidden states (b, t, d) after every token of texts (b, t), and a cache for contexts of up to `slots` tokens.

        Raises ValueError when the text does not fit the slots (its own length by default) or those the model's context, and for
        a token id that is not in the vocabulary (inside jit none can be seen).
        """
        t = tokens.shape[1]
        room: int = t if slots is None else slots
        if not 1 <= t <= room <= self.config.context:
            raise ValueError(
                f"{t} tokens and {room} cache slots: expected 1 <= tokens <= slots <= {self.config.context}, the context"
            )
        check_tokens(tokens, self.config.vocabulary)

        def prefill(model: Decoder, tokens: Tokens) -> tuple[Hidden, tuple, tuple]:
            x, keys, values = model.embed(tokens), [], []
            for block in model.blocks:
                attention = block.attention
                x, key, value = block(x, attention.whole, min(room, attention.window))
                keys.append(key)
                values.append(value)
            return model.norm(x), tuple(keys), tuple(values)

        hidden, keys, values = self.method(prefill, tokens)
        return hidden, Cache(keys, values, t, room)

    def step(self, token: Int[AnyArray, " b"], cache: Cache) -> tuple[Float[Array, "b d"], Cache]:
        """Hidden state (b, d) after one more token (b,), and the cache with it. Raises ValueError when its slots are full."""
        cache.check_room()

        def step(model: Decoder, token: Int[AnyArray, " b"], keys, values, length: Int[Array, ""]):
            x, new_keys, new_values = model.embed(token), [], []
            for block, *held in zip(model.blocks, keys, values, strict=True):
                x, key, value = block(x, block.attention.step, *held, length)
                new_keys.append(key)
                new_values.append(value)
            return model.norm(x), tuple(new_keys), tuple(new_values)

        length = jnp.asarray(cache.length, jnp.int32)
        hidden, keys, values = self.method(step, token, cache.keys, cache.values, length)
        return hidden, Cache(keys, values, cache.length + 1, cache.slots)

    @property
    def words_found(self) -> int:
        """How many best words `best` can tell: all of them, or the k of a converted model's softmax."""
        return self.config.vocabulary if self.softmax is None else self.softmax.k

    def best(self, hidden: Float[Array, "b d"], k: int) -> TopK:
        """The k best words (b, k), k at most `words_found`, by exact logits; a converted model searches for them.

        Raises ValueError for another k.
        """
        check_count("k", k, 1, self.words_found, "the words that the softmax finds")
        return best_words(self.softmax, self.embedding[...], hidden, k)

    def logits(self, hidden: Float[AnyArray, "*b d"]) -> Float[Array, "*b v"]:
        """Exact logits, float32, of hidden states."""

        def logits(model: Decoder, hidden: Float[AnyArray, "*b d"]) -> Float[Array, "*b v"]:
            config, x = model.config, hidden.reshape(-1, model.config.width)
            rows = model.embedding[...].reshape(model.embedding.shape[0], -1)
            # Blocks are filled up with zeros.
            scores = row_scores(jnp.pad(x, ((0, 0), (0, rows.shape[1] - config.width))), rows)
            if model.laid is not None:
                scores = scores[:, model.stored(jnp.arange(config.vocabulary, dtype=jnp.int32))]
            return scores.reshape(*hidden.shape[:-1], -1)

        return self.method(logits, hidden)

"""A dense model in its HiRE form: the same weights, searched instead of read."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.core import Tracer

from hire.axes import Array, Blocks, Float, Rows
from hire.distributed import Axis
from hire.estimators import Quantized
from hire.ffn import HireFFN
from hire.models.decoder import Decoder, TiedSoftmax, plain_rows, with_auto_axes
from hire.models.keys import KeySearch, SearchedAttention
from hire.search import check_fitted, check_search
from hire.softmax import HireSoftmax
from hire.topk import check_count


class SearchedFFN(nnx.Module):
    """A HireFFN in the place of a layer's FFN. A step searches; a whole text, which reads every neuron anyway, is masked."""

    def __init__(self, ffn: HireFFN, together: int):
        self.ffn, self.together = nnx.data(ffn), together

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        if x.ndim == 2:
            return self.ffn(x).astype(x.dtype)
        if x.shape[1] % self.together:
            raise ValueError(f"{x.shape[1]} tokens, {self.together} together: expected a multiple")
        return self.ffn.masked(x.reshape(-1, x.shape[-1]), self.together).reshape(x.shape).astype(x.dtype)


def convert(
    model: Decoder,
    *,
    softmax: HireSoftmax | None = None,
    ffn: Sequence[HireFFN] | None = None,
    keys: Mapping[int, KeySearch] | None = None,
    together: int | None = None,
) -> Decoder:
    """The model with its softmax searched by `softmax` (dense for None), its FFNs, one a layer, by `ffn`, and in every step the
    keys of the layers that `keys` names, which attend to the whole context (both as is for None).

    Rows of the softmax that lie in blocks or over devices become the embedding of the new model; any other softmax, and None,
    brings it back into one row a token, in their order. In prefill every `together` consecutive tokens of a text are one call of
    a shared FFN, as when they are verified together (as is for None; 1 for FFNs that are dense until now). The other weights are
    the given model's, not copies.

    Raises ValueError when the softmax was fitted to other rows than this model's embedding, or lies over the axis of another mesh
    than that of jax.set_mesh; when the FFNs are not one a layer, of its width, with a gate where the model has one, and without
    a router; when `together` is less than 1 or no layer is searched that it could be of; for a search of keys of another layer
    or width. Prefill does when a text is no multiple of `together` tokens.
    """
    converted = nnx.merge(*nnx.split(model))
    embedding = model.embedding[...]
    converted.softmax = None
    if softmax is None:
        rows = model.token_embeddings()
    else:
        rows = embedding_for(model, softmax)
        converted.softmax = nnx.data(
            TiedSoftmax(
                softmax.estimator,
                softmax.rows if isinstance(softmax.rows, Quantized) else None,
                softmax.k,
                softmax.candidates,
                form=softmax.form,
                axis=softmax.axis,
            )
        )
    if rows is not embedding:
        converted.embedding = nnx.Param(rows)
    if ffn is not None:
        check_ffns(model, ffn)
    search_ffns(converted, ffn, together)
    for layer, search in ({} if keys is None else keys).items():
        if layer not in model.config.global_layers:
            raise ValueError(
                f"keys of layer {layer}: expected one of {model.config.global_layers}, the layers that attend to the whole context"
            )
        if search.width != model.config.head_width:
            raise ValueError(
                f"keys of width {search.width}: expected {model.config.head_width}, that of the model's heads; fit again"
            )
        block = converted.blocks[layer]
        dense = block.attention.dense if isinstance(block.attention, SearchedAttention) else block.attention
        block.attention = SearchedAttention(dense, search)
    return converted


def embedding_for(model: Decoder, softmax: HireSoftmax) -> Rows | Blocks:
    """The embedding that a model has with a softmax. Raises ValueError for one of other rows."""
    rows, layout = softmax.rows, None if softmax.axis is None else Axis.of(softmax.axis)
    if isinstance(rows, Quantized):
        plain = model.token_embeddings()
        check_fitted(plain, rows)
        return plain
    if rows is model.embedding[...] and layout == model.laid:
        return rows  # as they are already
    plain = model.token_embeddings()
    if rows.ndim == 2 and layout is None:
        check_search(plain, softmax.estimator, softmax.k, softmax.candidates)
        check_fitted(plain, softmax.estimator)
        return plain
    check_same(rows, layout, plain)
    return jnp.asarray(rows)


def check_same(rows: Rows | Blocks, layout: Axis | None, plain: Float[Array, "v _"]) -> None:
    """Raise ValueError unless rows in blocks or over devices are those of the embedding `plain` (inside jit by shape alone)."""
    (vocabulary, width), told = plain.shape, f"rows {tuple(rows.shape)} of {rows.dtype}"
    expected = f"expected those of the model's embedding {plain.shape} of {plain.dtype}"
    held = len(rows) if layout is None else layout.total(len(rows) // layout.size)
    fits = rows.size // len(rows) >= width if rows.ndim == 3 else rows.shape[1] == width
    if held != vocabulary or not fits or rows.dtype != plain.dtype:
        raise ValueError(f"a softmax of {told}: {expected}")
    if isinstance(rows, Tracer) or isinstance(plain, Tracer):
        return

    @jax.jit
    def same(rows: Rows | Blocks, plain: Float[Array, "v _"]) -> Array:
        def compare(rows: Rows | Blocks, plain: Float[Array, "v _"]) -> Array:
            theirs = plain_rows(rows, layout, vocabulary, width)
            return jnp.array_equal(theirs, plain, equal_nan=True)

        return with_auto_axes(compare, rows, plain)

    if not same(rows, plain):
        raise ValueError(f"a softmax of other {told}: {expected}; fit it again")


def check_ffns(model: Decoder, ffn: Sequence[HireFFN]) -> None:
    """Raise ValueError unless these may stand for the model's layers."""
    config = model.config
    widths = [part.up.shape[1] for part in ffn]
    if widths != [config.width] * config.layers:
        raise ValueError(f"FFNs of widths {widths}: expected {config.layers}, one a layer, of width {config.width}")
    gated = [part.gate is not None for part in ffn]
    if gated != [config.gated] * config.layers:
        raise ValueError(f"FFNs with gates {gated}: expected {config.gated} for each layer, as in the model")
    if config.routed:
        raise ValueError("routed = True: expected a model without a router, which HireFFN does not have")


def search_ffns(converted: Decoder, ffn: Sequence[HireFFN] | None, together: int | None) -> None:
    """Put searched FFNs into the layers, or set how many tokens are one call of those that are there."""
    if together is not None:
        check_count("together", together, 1, 2**31 - 1, "tokens of a text")
    known = [block.ffn if isinstance(block.ffn, SearchedFFN) else None for block in converted.blocks]
    if ffn is None and together is not None and together > 1 and all(old is None for old in known):
        raise ValueError(f"together = {together}: expected searched FFNs, whose calls these tokens share; give `ffn`")
    layers = [None if old is None else old.ffn for old in known] if ffn is None else list(ffn)
    for block, old, layer in zip(converted.blocks, known, layers, strict=True):
        if layer is not None:
            before = 1 if old is None else old.together
            block.ffn = SearchedFFN(layer, before if together is None else together)

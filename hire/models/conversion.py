"""Conversion of a dense model to HiRE: the same weights, searched rather than read in full."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.core import Tracer

from hire.distributed import RowSharding
from hire.estimators.base import check_fitted, check_search
from hire.estimators.quantized import Quantized
from hire.layers.ffn import HireFFN
from hire.layers.softmax import HireSoftmax
from hire.models.decoder import Decoder
from hire.models.kv_search import KeySearch, SearchedAttention
from hire.models.lm_head import TiedSoftmax, plain_rows
from hire.models.sharding import with_auto_axes
from hire.ops.checks import check_range
from hire.types import Array, Blocks, Float, Rows


class SearchedFFN(nnx.Module):
    """The FFN of a layer, computed by a HireFFN.

    A decode step searches. Prefill computes all neurons and masks them, since a text reads every
    neuron anyway.

    Attributes:
        ffn: The search over the neurons.
        tokens_per_selection: Number of consecutive tokens that form one call of a shared FFN in
            prefill.
    """

    def __init__(self, ffn: HireFFN, tokens_per_selection: int):
        self.ffn, self.tokens_per_selection = nnx.data(ffn), tokens_per_selection

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        if x.ndim == 2:
            return self.ffn(x).astype(x.dtype)
        if x.shape[1] % self.tokens_per_selection:
            raise ValueError(
                f"{x.shape[1]} tokens: expected a multiple of {self.tokens_per_selection}, the "
                "tokens per selection"
            )
        return self.ffn.dense_reference(x, self.tokens_per_selection).astype(x.dtype)


def convert(
    model: Decoder,
    *,
    softmax: HireSoftmax | None = None,
    ffn: Sequence[HireFFN] | None = None,
    kv_search: Mapping[int, KeySearch] | None = None,
    tokens_per_selection: int | None = None,
) -> Decoder:
    """Returns a model that searches its softmax, its FFNs or its attention keys.

    If the rows of `softmax` are stored in blocks or sharded over devices, they become the LM head
    of the new model, and its embedding if that is tied. With any other softmax, and with None, the
    new LM head has one row per token, in the order of the tokens. The new model shares all other
    weights with `model`; they are not duplicated.

    Args:
        model: The model to convert.
        softmax: The search for the softmax. None makes the softmax dense.
        ffn: One search per layer for the FFNs. None leaves the FFNs as they are.
        kv_search: The search for the attention keys in every decode step, by layer. Each layer must
            attend to the whole context. None leaves the attention as it is.
        tokens_per_selection: Number of consecutive tokens of a text that form one call of a shared
            FFN in prefill, as when they are verified together. None leaves the number as it is; it
            is 1 for FFNs that were dense.

    Returns:
        The converted model. Its prefill raises ValueError when the length of a text is not a
        multiple of `tokens_per_selection`.

    Raises:
        ValueError: When `softmax` was fitted to other rows than the LM head of the model, has
            another soft cap, has a bias, or is sharded over an axis that the mesh of jax.set_mesh
            does not have.
        ValueError: When `ffn` does not have one FFN per layer, an FFN has another width than the
            model, only one of the two has a gate, or the model has a router.
        ValueError: When `tokens_per_selection` is less than 1, or more than 1 without a searched
            FFN.
        ValueError: When `kv_search` names a layer that does not attend to the whole context, a
            search was fitted to keys of another width, or the attention has a soft cap.
    """
    converted = nnx.merge(*nnx.split(model))
    converted.softmax = None
    if softmax is None:
        rows = model.head_rows()
    else:
        rows = head_for(model, softmax)
        converted.softmax = nnx.data(
            TiedSoftmax(
                softmax.estimator,
                softmax.rows if isinstance(softmax.rows, Quantized) else None,
                softmax.k,
                softmax.candidates,
                implementation=softmax.implementation,
                axis=softmax.axis,
                soft_cap=softmax.soft_cap,
            )
        )
    if rows is not model.head[...]:
        setattr(converted, "embedding" if model.config.tied else "untied_head", nnx.Param(rows))
    if ffn is not None:
        check_ffns(model, ffn)
    search_ffns(converted, ffn, tokens_per_selection)
    for layer, key_search in ({} if kv_search is None else kv_search).items():
        if layer not in model.config.global_layers:
            raise ValueError(
                f"keys of layer {layer}: expected one of {model.config.global_layers}, the layers "
                "that attend to the whole context"
            )
        if model.config.attention_soft_cap:
            raise ValueError(
                f"attention_soft_cap = {model.config.attention_soft_cap}: expected attention "
                "without a soft cap, which the search of keys does not support"
            )
        if key_search.width != model.config.head_width:
            raise ValueError(
                f"keys of width {key_search.width}: expected {model.config.head_width}, that "
                "of the model's heads; fit again"
            )
        block = converted.blocks[layer]
        dense = (
            block.attention.dense
            if isinstance(block.attention, SearchedAttention)
            else block.attention
        )
        block.attention = SearchedAttention(dense, key_search)
    return converted


def head_for(model: Decoder, softmax: HireSoftmax) -> Rows | Blocks:
    """Returns the LM head that a model needs for a softmax.

    Args:
        model: The model.
        softmax: The softmax that will search the rows.

    Returns:
        The rows, one per token or in the layout of the softmax.

    Raises:
        ValueError: When the softmax has other rows or another soft cap than the model, or a bias.
    """
    rows, layout = softmax.rows, None if softmax.axis is None else RowSharding.of(softmax.axis)
    if softmax.bias is not None:
        raise ValueError("a softmax with a bias: expected none, as in the model's LM head")
    if softmax.soft_cap != model.config.logit_soft_cap:
        raise ValueError(
            f"a softmax with soft_cap = {softmax.soft_cap}: expected "
            f"{model.config.logit_soft_cap}, that of the model's logits"
        )
    if isinstance(rows, Quantized):
        head_rows = model.head_rows()
        check_fitted(head_rows, rows)
        return head_rows
    if rows is model.head[...] and layout == model.row_sharding:
        return rows  # the model already stores these rows
    head_rows = model.head_rows()
    if rows.ndim == 2 and layout is None:
        check_search(head_rows, softmax.estimator, softmax.k, softmax.candidates)
        check_fitted(head_rows, softmax.estimator)
        return head_rows
    check_same(rows, layout, head_rows)
    return jnp.asarray(rows)


def check_same(rows: Rows | Blocks, layout: RowSharding | None, plain: Float[Array, "v _"]) -> None:
    """Checks that softmax rows in blocks or over devices equal the LM head.

    Inside jit the check compares only shapes and types.

    Args:
        rows: The rows of the softmax.
        layout: Their sharding, or None on a single device.
        plain: The LM head, `(v, d)`, in the order of the tokens.

    Raises:
        ValueError: When the rows differ.
    """
    (vocabulary, width), description = plain.shape, f"rows {tuple(rows.shape)} of {rows.dtype}"
    expected = f"expected those of the model's LM head {plain.shape} of {plain.dtype}"
    num_rows = len(rows) if layout is None else layout.total_rows(len(rows) // layout.size)
    fits = rows.size // len(rows) >= width if rows.ndim == 3 else rows.shape[1] == width
    if num_rows != vocabulary or not fits or rows.dtype != plain.dtype:
        raise ValueError(f"a softmax of {description}: {expected}")
    if isinstance(rows, Tracer) or isinstance(plain, Tracer):
        return

    @jax.jit
    def same(rows: Rows | Blocks, plain: Float[Array, "v _"]) -> Array:
        def compare(rows: Rows | Blocks, plain: Float[Array, "v _"]) -> Array:
            softmax_rows = plain_rows(rows, layout, vocabulary, width)
            return jnp.array_equal(softmax_rows, plain, equal_nan=True)

        return with_auto_axes(compare, rows, plain)

    if not same(rows, plain):
        raise ValueError(f"a softmax of other {description}: {expected}; fit it again")


def check_ffns(model: Decoder, ffn: Sequence[HireFFN]) -> None:
    """Checks that the FFNs can replace those of the model.

    Raises:
        ValueError: When their number, widths or gates differ from the model, or the model has a
            router.
    """
    config = model.config
    widths = [part.up.shape[1] for part in ffn]
    if widths != [config.width] * config.layers:
        raise ValueError(
            f"FFNs of widths {widths}: expected {config.layers}, one a layer, of width "
            f"{config.width}"
        )
    gated = [part.gate is not None for part in ffn]
    if gated != [config.gated] * config.layers:
        raise ValueError(
            f"FFNs with gates {gated}: expected {config.gated} for each layer, as in the model"
        )
    activations = {str(part.activation) for part in ffn}
    if activations != {config.ffn_activation}:
        raise ValueError(
            f"FFNs with activation {', '.join(sorted(activations))}: expected "
            f"{config.ffn_activation}, as in the model"
        )
    if config.routed:
        raise ValueError(
            "routed = True: expected a model without a router, which HireFFN does not have"
        )


def search_ffns(
    converted: Decoder, ffn: Sequence[HireFFN] | None, tokens_per_selection: int | None
) -> None:
    """Installs searched FFNs, or sets `tokens_per_selection` of those that are installed.

    Args:
        converted: The model, which is changed in place.
        ffn: One search per layer. None leaves the FFNs as they are.
        tokens_per_selection: Number of tokens per call of a shared FFN in prefill. None leaves it
            as it is.

    Raises:
        ValueError: When `tokens_per_selection` is less than 1, or more than 1 without a searched
            FFN.
    """
    if tokens_per_selection is not None:
        check_range("tokens_per_selection", tokens_per_selection, 1, 2**31 - 1, "tokens of a text")
    searched = [
        block.ffn if isinstance(block.ffn, SearchedFFN) else None for block in converted.blocks
    ]
    if (
        ffn is None
        and tokens_per_selection is not None
        and tokens_per_selection > 1
        and all(old is None for old in searched)
    ):
        raise ValueError(
            f"tokens_per_selection = {tokens_per_selection}: expected searched FFNs, whose "
            "calls these tokens share; give `ffn`"
        )
    ffns = [None if old is None else old.ffn for old in searched] if ffn is None else list(ffn)
    for block, old, hire_ffn in zip(converted.blocks, searched, ffns, strict=True):
        if hire_ffn is not None:
            old_count = 1 if old is None else old.tokens_per_selection
            block.ffn = SearchedFFN(
                hire_ffn, old_count if tokens_per_selection is None else tokens_per_selection
            )

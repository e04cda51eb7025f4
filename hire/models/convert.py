"""A dense model in its HiRE form: the same weights, searched instead of read."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from flax import nnx

from hire.axes import Array, Float
from hire.distributed import Axis
from hire.estimators import Quantized
from hire.ffn import HireFFN
from hire.models.decoder import Decoder, TiedSoftmax
from hire.models.keys import KeySearch, SearchedAttention
from hire.softmax import HireSoftmax


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
    together: int = 1,
) -> Decoder:
    """The model with its softmax searched by `softmax` (dense for None), its FFNs, one a layer, by `ffn`, and in every step the
    keys of the layers that `keys` names, which attend to the whole context (both as is for None).

    In prefill every `together` consecutive tokens of a text are one call of a shared FFN, as when they are verified together. The
    other weights are the given model's, not copies. Raises ValueError when the softmax was fitted to other rows than this model's
    embedding, when the FFNs are not one a layer, of its width, or for a search of keys of another layer or width; prefill does when
    a text is no multiple of `together` tokens.
    """
    converted = nnx.merge(*nnx.split(model))
    converted.softmax = None
    if softmax is not None:
        own = softmax.rows if isinstance(softmax.rows, Quantized) else None
        rows = model.embedding[...]
        if softmax.axis and own is None and softmax.rows is not rows:  # they may have been dealt out or filled up
            rows = Axis.of(softmax.axis).put(rows)
            converted.embedding = nnx.Param(softmax.rows)
        replace(softmax, rows=rows)  # refuses an estimator of other rows
        converted.softmax = nnx.data(TiedSoftmax(softmax.estimator, own, softmax.k, softmax.candidates, softmax.axis))
    if ffn is not None:
        widths = [part.up.shape[1] for part in ffn]
        if widths != [model.config.width] * model.config.layers:
            raise ValueError(f"FFNs of widths {widths}: expected {model.config.layers}, one a layer, of width {model.config.width}")
        for block, searched in zip(converted.blocks, ffn, strict=True):
            block.ffn = SearchedFFN(searched, together)
    for layer, search in (keys or {}).items():
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

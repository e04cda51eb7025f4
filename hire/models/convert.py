"""A dense model in its HiRE form: the same weights, searched instead of read."""

from dataclasses import replace

from flax import nnx

from hire.models.decoder import Decoder, TiedSoftmax
from hire.softmax import HireSoftmax


def convert(model: Decoder, *, softmax: HireSoftmax | None) -> Decoder:
    """The model with its softmax searched by `softmax`, or dense again for None; its weights are the given model's, not copies.

    Raises ValueError when the softmax was fitted to rows other than this model's embedding.
    """
    converted = nnx.merge(*nnx.split(model))
    converted.softmax = None
    if softmax is not None:
        replace(softmax, rows=model.embedding[...])  # refuses an estimator of other rows
        converted.softmax = nnx.data(TiedSoftmax(softmax.estimator, softmax.k, softmax.candidates))
    return converted

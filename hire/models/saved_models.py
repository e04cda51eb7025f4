"""Descriptions of models, converted or not, for `hire.save` and `hire.load`."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from hire import saving
from hire.layers.ffn import HireFFN
from hire.models.config import DecoderConfig
from hire.models.conversion import SearchedFFN, convert
from hire.models.decoder import Decoder
from hire.models.kv_search import SearchedAttention
from hire.models.lm_head import TiedSoftmax
from hire.models.weights import expected_shapes, fill
from hire.ops.quantization import dequantize

FFN_MATRICES = ("gate", "up", "down")


def describe(model: Any, arrays: dict[str, jax.Array]) -> dict[str, Any]:
    """Describe a model and collect its arrays.

    Args:
        model: The model, converted or not.
        arrays: The arrays by name, which are extended.

    Returns:
        The description: the configuration, the search of the softmax and those of the FFNs.

    Raises:
        ValueError: When it is no model of this package, or one that cannot be saved: sharded over
            devices, with searched keys, or with another search of its LM head.
    """
    if not isinstance(model, Decoder):
        raise ValueError(
            f"a {type(model).__name__}: expected an estimator, a search or a model of hire.models"
        )
    if model.row_sharding is not None:
        raise ValueError("a model over several devices: expected one that is not sharded yet")
    softmax = None
    if model.softmax is not None:
        if not isinstance(model.softmax, TiedSoftmax):
            raise ValueError(
                f"an LM head searched by {type(model.softmax).__name__}: expected a HireSoftmax"
            )
        complete = model.softmax.with_rows(model.head_rows())
        softmax = saving.described(complete, "softmax", arrays)
    ffns = []
    for layer, block in enumerate(model.blocks):
        if isinstance(block.attention, SearchedAttention):
            raise ValueError(
                f"layer {layer} searches its keys: expected the dense attention; convert the "
                "loaded model again with kv_search="
            )
        if isinstance(block.ffn, SearchedFFN):
            searched = saving.described(block.ffn.ffn, f"ffn.{layer}", arrays)
            ffns.append(dict(ffn=searched, tokens=block.ffn.tokens_per_selection))
    for name, array in plain_weights(model).items():
        arrays[f"weights.{name}"] = array
    return dict(model=asdict(model.config), softmax=softmax, ffns=ffns)


def plain_weights(model: Decoder) -> dict[str, jax.Array]:
    """Returns the weights outside the searches, by their names in this package."""
    arrays = {}
    for path, value in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        name = ".".join(map(str, path))
        if name in expected_shapes(model.config):
            arrays[name] = value[...]
    head = "embedding" if model.config.tied else "untied_head"
    return arrays | {head: model.head_rows()}


def rebuild(path: Path, description: dict[str, Any], arrays: dict[str, Any]) -> Decoder:
    """Builds a model from its description.

    Args:
        path: Path of the file, for error messages.
        description: What `describe` returned.
        arrays: The arrays by name.

    Returns:
        The model, with its conversions.

    Raises:
        ValueError: When the parts do not fit together.
    """
    try:
        config = DecoderConfig.from_json(description["model"])
        weights = {
            name.removeprefix("weights."): array
            for name, array in arrays.items()
            if name.startswith("weights.")
        }
        searches = [saving.built(path, part["ffn"], arrays, None) for part in description["ffns"]]
        for layer, ffn in enumerate(searches):
            weights |= ffn_weights(layer, ffn, config)
        if {name: array.shape for name, array in weights.items()} != expected_shapes(config):
            raise ValueError("its weights do not fit its configuration")
        model = fill(config, weights, weights["norm.scale"].dtype)
        softmax = None
        if description["softmax"] is not None:
            rows = model.head[...]
            softmax = saving.built(path, description["softmax"], arrays, rows)
        if softmax is None and not searches:
            return model
        tokens = {part["tokens"] for part in description["ffns"]}
        return convert(
            model,
            softmax=softmax,
            ffn=searches or None,
            tokens_per_selection=tokens.pop() if tokens else None,
        )
    except (KeyError, TypeError, ValueError) as error:
        if str(error).startswith(str(path)):
            raise
        raise saving.damaged(path, error) from None


def ffn_weights(layer: int, ffn: HireFFN, config: DecoderConfig) -> dict[str, Any]:
    """Returns the weights of the dense FFN that a search has replaced.

    The dense layer of quantized matrices is not known. Their dequantized rows take its place.
    """
    weights = {}
    for name in FFN_MATRICES:
        matrix = getattr(ffn, name)
        if matrix is not None:
            weights[f"blocks.{layer}.ffn.{name}"] = dequantize(matrix)
    return weights

"""The weights of a decoder by name: in this package, in a GGUF and in Hugging Face files."""

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tokenizers import Tokenizer

from hire.models.config import DecoderConfig
from hire.models.decoder import Decoder
from hire.types import AnyArray

# Name in this package: name in a GGUF, name in Hugging Face files. `{}` is the layer number.
NAMES = {
    "embedding": ("token_embd.weight", "model.embed_tokens.weight"),
    "untied_head": ("output.weight", "lm_head.weight"),
    "norm.scale": ("output_norm.weight", "model.norm.weight"),
    "blocks.{}.attention.query": (
        "blk.{}.attn_q.weight",
        "model.layers.{}.self_attn.q_proj.weight",
    ),
    "blocks.{}.attention.key": ("blk.{}.attn_k.weight", "model.layers.{}.self_attn.k_proj.weight"),
    "blocks.{}.attention.value": (
        "blk.{}.attn_v.weight",
        "model.layers.{}.self_attn.v_proj.weight",
    ),
    "blocks.{}.attention.output": (
        "blk.{}.attn_output.weight",
        "model.layers.{}.self_attn.o_proj.weight",
    ),
    "blocks.{}.attention.query_bias": (
        "blk.{}.attn_q.bias",
        "model.layers.{}.self_attn.q_proj.bias",
    ),
    "blocks.{}.attention.key_bias": ("blk.{}.attn_k.bias", "model.layers.{}.self_attn.k_proj.bias"),
    "blocks.{}.attention.value_bias": (
        "blk.{}.attn_v.bias",
        "model.layers.{}.self_attn.v_proj.bias",
    ),
    "blocks.{}.attention.query_norm.scale": (
        "blk.{}.attn_q_norm.weight",
        "model.layers.{}.self_attn.q_norm.weight",
    ),
    "blocks.{}.attention.key_norm.scale": (
        "blk.{}.attn_k_norm.weight",
        "model.layers.{}.self_attn.k_norm.weight",
    ),
    "blocks.{}.ffn.gate": ("blk.{}.ffn_gate.weight", "model.layers.{}.mlp.gate_proj.weight"),
    "blocks.{}.ffn.up": ("blk.{}.ffn_up.weight", "model.layers.{}.mlp.up_proj.weight"),
    "blocks.{}.ffn.down": ("blk.{}.ffn_down.weight", "model.layers.{}.mlp.down_proj.weight"),
    "blocks.{}.attention_norm.scale": (
        "blk.{}.attn_norm.weight",
        "model.layers.{}.input_layernorm.weight",
    ),
    "blocks.{}.post_attention_norm.scale": (
        "blk.{}.post_attention_norm.weight",
        "model.layers.{}.post_attention_layernorm.weight",
    ),
    "blocks.{}.ffn_norm.scale": (
        "blk.{}.ffn_norm.weight",
        "model.layers.{}.pre_feedforward_layernorm.weight",
    ),
    "blocks.{}.post_ffn_norm.scale": (
        "blk.{}.post_ffw_norm.weight",
        "model.layers.{}.post_feedforward_layernorm.weight",
    ),
}
# In Hugging Face files of a model without norms after the attention, the norm before the FFN has
# the name that is that of a norm after the attention in the others.
FFN_NORM_WITHOUT_POST_NORMS = "model.layers.{}.post_attention_layernorm.weight"
TRANSPOSED = ("attention.output", "ffn.down")  # (out, in) in the files, (in, out) in this package


class FileContents(NamedTuple):
    """What a loader reads from the file or the folder of a model.

    Attributes:
        config: The configuration that the file states.
        arrays: The weights, by their names in this package.
        tokenizer: The tokenizer.
        first_token: Token that begins every text, or None.
        end_tokens: Tokens any of which ends a text.
        weights_precision: The precision in which the file stores the weights.
    """

    config: DecoderConfig
    arrays: dict[str, np.ndarray]
    tokenizer: Tokenizer
    first_token: int | None
    end_tokens: tuple[int, ...]
    weights_precision: str


def expected_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every weight, by its name in this package.

    The shapes come from a model that is built without memory for its weights.
    """
    return dict(_expected_shapes(config))


@functools.cache
def _expected_shapes(config: DecoderConfig) -> tuple[tuple[str, tuple[int, ...]], ...]:
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return tuple((".".join(map(str, path)), value.shape) for path, value in flat)


def named(config: DecoderConfig, column: int) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Lists the names and shapes of all weights.

    Args:
        config: The configuration.
        column: 0 for the names in a GGUF, 1 for those in Hugging Face files.

    Yields:
        The name in this package, the name in the file, and the shape in this package.
    """
    for weight_name, shape in expected_shapes(config).items():
        layer = next((part for part in weight_name.split(".") if part.isdigit()), "")
        generic = weight_name.replace(f"blocks.{layer}.", "blocks.{}.") if layer else weight_name
        name = NAMES[generic][column]
        if column == 1 and generic == "blocks.{}.ffn_norm.scale" and not config.post_norms:
            name = FFN_NORM_WITHOUT_POST_NORMS
        yield weight_name, name.format(layer), shape


def fill(config: DecoderConfig, arrays: Mapping[str, AnyArray], dtype) -> Decoder:
    """Builds a decoder from arrays.

    Args:
        config: The configuration.
        arrays: The weights, by their names in this package.
        dtype: Type of the new weights.

    Returns:
        The decoder.
    """
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(model)
    flat = nnx.to_flat_state(state)
    filled = [
        (path, value.replace(jnp.asarray(arrays[".".join(map(str, path))], dtype)))
        for path, value in flat
    ]
    return nnx.merge(graph, nnx.from_flat_state(filled))


def named_arrays(model: Decoder) -> dict[str, jax.Array]:
    """Returns the weights of a model, by their names in this package.

    The rows of the LM head are in the order of the tokens, whatever their layout in the model.

    Args:
        model: The model.

    Returns:
        The weights.

    Raises:
        ValueError: When a conversion has replaced layers of the model.
    """
    arrays = {
        ".".join(map(str, path)): value[...]
        for path, value in nnx.to_flat_state(nnx.state(model, nnx.Param))
    }
    if differing := sorted(arrays.keys() ^ expected_shapes(model.config).keys()):
        raise ValueError(
            f"a converted model, which differs in {differing[0]}: expected the model that it was "
            "made of"
        )
    head = "embedding" if model.config.tied else "untied_head"
    return arrays | {head: model.head_rows()}


def gguf_names(model: Decoder) -> dict[str, np.ndarray]:
    """Returns the weights of a model under the names and in the layout of a GGUF.

    The NumPy reference takes them in this form. Queries and keys are not permuted, as those in
    files of Llama are.

    Args:
        model: The model.

    Returns:
        The weights.
    """
    arrays = {weight_name: np.asarray(array) for weight_name, array in named_arrays(model).items()}
    names = {weight_name: tensor_name for weight_name, tensor_name, _ in named(model.config, 0)}
    return {
        names[weight_name]: array.T if weight_name.endswith(TRANSPOSED) else array
        for weight_name, array in arrays.items()
    }


def check_names(path: Path, names: Iterable[str], expected: Sequence[str]) -> None:
    """Checks the names of the tensors in a file.

    Args:
        path: Path of the file, for error messages.
        names: The names in the file.
        expected: The names that the decoder needs.

    Raises:
        ValueError: When a tensor is missing, or the decoder would not use one.
    """
    missing, unknown = set(expected) - set(names), set(names) - set(expected)
    if missing:
        first = next(name for name in expected if name in missing)
        raise ValueError(
            f"{path}: no tensor {first}: expected one, as its metadata says; fetch it again"
        )
    if unknown:
        raise ValueError(
            f"{path}: tensor {min(unknown)} is not supported; expected a file without it"
        )


def check_shape(path: Path, ours: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Checks the shape of a weight.

    Raises:
        ValueError: When the shape is not the one that the metadata implies.
    """
    if shape != expected:
        raise ValueError(
            f"{path}: {ours} has shape {shape}: expected {expected}, as its metadata says"
        )


def checked(path: Path, ours: str, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Checks an array from a file and returns it in the layout of this package.

    Args:
        path: Path of the file, for error messages.
        ours: Name of the weight in this package.
        array: The array in the layout of the file.
        shape: The expected shape in this package.

    Returns:
        The array, transposed if the layouts differ.

    Raises:
        ValueError: When the shape differs from the metadata, or a value is not finite.
    """
    if ours.endswith(TRANSPOSED):
        array = array.T
    check_shape(path, ours, array.shape, shape)
    if not np.isfinite(array.sum(dtype=np.float32)):
        raise ValueError(f"{path}: {ours} holds values that are not finite; fetch the file again")
    return np.ascontiguousarray(array)

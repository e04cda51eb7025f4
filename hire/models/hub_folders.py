"""Models in folders of Hugging Face files: safetensors, config.json and tokenizer.json."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from hire import storage
from hire.models.config import DecoderConfig
from hire.models.families import GEMMAS, Metadata, folder_config, folder_end_tokens
from hire.models.tokenizer import first_token_of, read_tokenizer
from hire.models.weights import FileContents, check_names, checked, named

MAX_CONFIG_BYTES = 2**20


def read_folder(folder: Path, check_config: Callable[[DecoderConfig], None]) -> FileContents:
    """Reads a folder of Hugging Face files.

    The norms of Gemma are stored minus one there.

    Args:
        folder: Path of the folder. It contains .safetensors files, a config.json and a
            tokenizer.json, and a generation_config.json if the model has one.
        check_config: Function that raises when the model is too large to be built. It is called
            before any tensor is read.

    Returns:
        The contents, with weights as float32 or as they are stored.

    Raises:
        ValueError: When a file is damaged or missing, contradicts another, or states something
            about its model that the decoder does not honour.
    """
    files, tokenizer_path = sorted(folder.glob("*.safetensors")), folder / "tokenizer.json"
    config_path = folder / "config.json"
    if not files or not tokenizer_path.exists() or not config_path.exists():
        raise ValueError(
            f"{folder}: expected .safetensors files, a config.json and a tokenizer.json in it"
        )
    fields = read_config(config_path)
    family, config = folder_config(config_path, fields)
    generation_path = folder / "generation_config.json"
    generation = read_config(generation_path) if generation_path.exists() else {}
    end_tokens = folder_end_tokens(
        family,
        Metadata(generation_path, generation),
        Metadata(config_path, fields),
        config.vocabulary,
    )
    check_config(config)
    tokenizer = read_tokenizer(tokenizer_path)
    check_tokenizer(tokenizer_path, tokenizer, config)
    tensors = FolderTensors(files)
    names = {
        weight_name: (tensor_name, shape) for weight_name, tensor_name, shape in named(config, 1)
    }
    if config.tied and "lm_head.weight" in tensors.file_of:
        tensors.require_same("lm_head.weight", names["embedding"][0])
    check_names(folder, tensors.file_of, [tensor_name for tensor_name, _ in names.values()])
    arrays, dtypes = {}, set()
    for weight_name, (tensor_name, shape) in names.items():
        array = tensors.read(tensor_name)
        dtypes.add(str(array.dtype))
        if family in GEMMAS and weight_name.endswith("scale"):
            array = array.astype(np.float32) + 1
        arrays[weight_name] = checked(tensors.file_of[tensor_name], weight_name, array, shape)
    first_token = first_token_of(tokenizer)
    if first_token is None and family in GEMMAS:
        first_token = tokenizer.token_to_id("<bos>")
    precision = f"{'/'.join(sorted(dtypes))} weights"
    return FileContents(config, arrays, tokenizer, first_token, end_tokens, precision)


def read_config(path: Path) -> dict[str, Any]:
    """Returns the fields of a config.json. Those of a text model within it are at the top.

    Raises:
        ValueError: When the file is not one. The message names it.
    """
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ValueError(f"{path.stat().st_size} bytes")
        fields = json.loads(path.read_text())
        if "text_config" in fields:
            outer = {key: fields.get(key) for key in ("model_type", "eos_token_id")}
            stated = {key: value for key, value in outer.items() if value is not None}
            fields = fields["text_config"] | stated
        if not isinstance(fields, dict):
            raise ValueError(f"a {type(fields).__name__}")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: no model's configuration ({error}); fetch it again") from None
    return fields


class FolderTensors:
    """The tensors of all .safetensors files of a folder.

    Attributes:
        file_of: Path of the file of each tensor.
    """

    def __init__(self, files: list[Path]):
        from safetensors import safe_open

        self.file_of: dict[str, Path] = {}
        for file in files:
            try:
                with safe_open(file, framework="flax") as tensors:
                    self.file_of |= dict.fromkeys(tensors.keys(), file)
            except Exception as error:  # safetensors raises many types
                raise ValueError(
                    f"{file}: a .safetensors file is not whole ({storage.reason_of(error)}); "
                    "fetch it again"
                ) from None

    def read(self, name: str) -> np.ndarray:
        """Returns a tensor.

        Raises:
            ValueError: When it cannot be read or is not of floats.
        """
        from safetensors import safe_open

        file = self.file_of[name]
        try:
            with safe_open(file, framework="flax") as tensors:
                array = np.asarray(tensors.get_tensor(name))
        except Exception as error:
            raise ValueError(
                f"{file}: {name} cannot be read ({storage.reason_of(error)}); fetch it again"
            ) from None
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{file}: {name} of type {array.dtype}: expected floats")
        return array

    def require_same(self, name: str, other: str) -> None:
        """Forgets a tensor that is stored twice.

        Raises:
            ValueError: When the two tensors differ.
        """
        if other in self.file_of and not np.array_equal(self.read(name), self.read(other)):
            raise ValueError(
                f"{self.file_of[name]}: {name} is another matrix than {other}, but config.json "
                "says tie_word_embeddings; fetch it again"
            )
        del self.file_of[name]


def check_tokenizer(path: Path, tokenizer: Tokenizer, config: DecoderConfig) -> None:
    """Checks that a tokenizer fits the vocabulary of a configuration.

    A few added tokens, such as those of Gemma for images, may exceed the vocabulary.

    Args:
        path: Path of the tokenizer, for error messages.
        tokenizer: The tokenizer.
        config: The configuration.

    Raises:
        ValueError: When the tokenizer is for another vocabulary.
    """
    size = tokenizer.get_vocab_size(with_added_tokens=False)
    if size > config.vocabulary:
        raise ValueError(
            f"{path}: {size} tokens, expected at most {config.vocabulary}; is it another model's?"
        )

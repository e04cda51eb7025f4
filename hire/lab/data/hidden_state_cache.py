"""Results that several notebooks compute from the same text and weights.

They are computed once and kept in the cache folder.
"""

import concurrent.futures
import functools
import hashlib
import os
import zipfile
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from hire import storage
from hire.lab.data.model_states import States, collect, windows
from hire.lab.data.text import Document
from hire.lab.paths import ROOT
from hire.models import Decoder, TextModel
from hire.ops.array_cache import ArrayCache
from hire.ops.top_k import TopK
from hire.storage import cache_folder
from hire.tuning import true_top_k
from hire.types import AnyArray


@functools.cache
def code() -> str:
    """Return the SHA-256 of the package: of the name and the content of every file."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "hire").rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(ROOT)} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def environment() -> tuple[str, ...]:
    """Return the versions and settings that also decide the numbers that XLA computes."""
    return (
        jax.__version__,
        version("jaxlib"),
        os.environ.get("XLA_FLAGS", ""),
        jax.default_backend(),
    )


def forget() -> None:
    """Remove all cached results, so that they are computed again."""
    # Scratch names begin with a dot: files that another process is writing now stay.
    storage.clear(*(cache_folder() / "hidden_states").glob("[!.]*"))


def cached(make: Callable[[np.ndarray], list], items: np.ndarray, *made_of) -> list[np.ndarray]:
    """Return `make(items)`, and compute only the items that are not cached.

    A cached result is reused only for the same item, code, environment and `made_of`. Processes
    that call this at the same time lose no result. When the cached file is damaged, one printed
    line names it and all results are computed again.

    Args:
        make: Function that maps items (n, …) to a list of arrays (n, …), each item independently.
        items: Items (n, …).
        *made_of: Everything else that the results depend on.

    Returns:
        The arrays (n, …) of `make`.

    Raises:
        OSError: The file cannot be written.
    """
    key = repr((made_of, items.shape[1:], items.dtype.str, environment()))
    path = cache_folder() / "hidden_states" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz"
    keys = [hashlib.sha256(np.ascontiguousarray(item).tobytes()).hexdigest() for item in items]
    if path.parent.exists():
        storage.tidy(path.parent)
    cached_arrays = known_arrays(path)
    missing = np.asarray([key not in cached_arrays for key in keys], bool)
    if missing.any():
        arrays = [np.asarray(array) for array in make(items[missing])]
        new_arrays = dict(
            zip(np.asarray(keys)[missing].tolist(), zip(*arrays, strict=True), strict=True)
        )
        with storage.replacing(path, storage.sidecar(path)) as [scratch, record]:
            # Read again: another process may have added results in the meantime.
            cached_arrays = known_arrays(path, report=True) | new_arrays
            with scratch.open("wb") as file:
                np.savez(
                    file,
                    np.asarray(list(cached_arrays)),
                    *(np.stack(column) for column in zip(*cached_arrays.values(), strict=True)),
                )
            record.write_bytes(
                storage.checksums({path.name: storage.digest(scratch)}, dict(code=code()))
            )
    return [np.stack(column) for column in zip(*(cached_arrays[key] for key in keys), strict=True)]


def known_arrays(path: Path, *, report: bool = False) -> dict[str, tuple]:
    """Read the cached arrays of a file.

    Args:
        path: The cached file.
        report: Print one line when the file is damaged.

    Returns:
        The arrays by the SHA-256 of their item. Empty when the file is missing, damaged or was
        written by other code.
    """
    try:
        metadata = storage.verified([path])
        if metadata is None or metadata.get("code") != code():
            return {}
        with np.load(path) as file:
            keys, *arrays = file.values()
        return dict(zip(keys.tolist(), zip(*arrays, strict=True), strict=True))
    except (ValueError, OSError, KeyError, EOFError, zipfile.BadZipFile) as error:
        if report:
            print(
                f"{path.name}: the cached hidden states are damaged, made again "
                f"({storage.reason_of(error)})",
                flush=True,
            )
        return {}


@ArrayCache
def array_digest(array: AnyArray) -> str:
    """Return the SHA-256 of an array's type, shape and values."""
    values = np.ascontiguousarray(np.asarray(array))
    digest = hashlib.sha256(f"{values.dtype} {values.shape} ".encode())
    digest.update(values.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def model_digest(model: Decoder) -> str:
    """Return the SHA-256 of all arrays of a model, with their paths in it."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(nnx.state(model))
    with concurrent.futures.ThreadPoolExecutor() as threads:
        digests = list(threads.map(array_digest, [array for _, array in leaves]))
    lines = [
        f"{jax.tree_util.keystr(path)} {digest}"
        for (path, _), digest in zip(leaves, digests, strict=True)
    ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def weights(subject: TextModel) -> tuple:
    """Return what identifies the weights of a model: precision, configuration and digest."""
    return subject.weights_precision, subject.model.config, model_digest(subject.model)


def cached_states(
    subject: TextModel,
    texts: Sequence[Document],
    length: int = 60,
    windows_per_document: int = 1,
    *,
    skip: int = 20,
) -> States:
    """Return the hidden states of a model on texts, cached.

    The model must be as it was loaded. The states are those of hire.lab.data.model_states.collect
    on the windows of hire.lab.data.model_states.windows.

    Args:
        subject: The model, as loaded.
        texts: Documents.
        length: Tokens of a window.
        windows_per_document: Number of windows per document, at most.
        skip: Positions at the beginning of each window that are left out.
    """
    tokens, names = windows(subject, texts, length, windows_per_document)

    def make(tokens: np.ndarray) -> list:
        return [
            collect(subject.model, tokens, tokens[:, 0], skip=0).hidden.reshape(
                *tokens[:, 1:].shape, -1
            )
        ]

    hidden = cached(make, tokens, "states", *weights(subject))[0][:, skip:]
    return States(
        hidden.reshape(-1, hidden.shape[-1]),
        tokens[:, skip + 1 :].reshape(-1),
        np.repeat(names, hidden.shape[1]),
    )


def true_top_tokens(subject: TextModel, hidden: np.ndarray, k: int) -> TopK:
    """Return hire.tuning.true_top_k of hidden states (n, d) over the vocabulary, cached.

    The model must be as it was loaded.
    """
    rows = subject.model.head_rows()
    return TopK(
        *cached(
            lambda hidden: [*true_top_k(rows, hidden, k)],
            hidden,
            "true top tokens",
            k,
            *weights(subject),
        )
    )

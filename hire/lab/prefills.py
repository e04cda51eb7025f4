"""What several notebooks make of the same text by the same weights: made once, and kept between them in the cache folder."""

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

from hire.axes import AnyArray
from hire.choose import true_top_k
from hire.estimators import OncePerArray
from hire.lab.evaluation import States, collect, windows
from hire.lab.paths import ROOT
from hire.lab.text import Document
from hire.models import Decoder, TextModel, storage
from hire.models.weights import cache_folder
from hire.topk import TopK


@functools.cache
def code() -> str:
    """A digest of the package: of every file's name and content."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "hire").rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(ROOT)} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def environment() -> tuple[str, ...]:
    """What else decides the numbers that XLA computes."""
    return jax.__version__, version("jaxlib"), os.environ.get("XLA_FLAGS", ""), jax.default_backend()


def forget() -> None:
    """Let all be made anew."""
    storage.clear(*(cache_folder() / "prefills").glob("[!.]*"))  # not what another process is writing now


def once(make: Callable[[np.ndarray], list], items: np.ndarray, *made_of) -> list[np.ndarray]:
    """The arrays (n, …) that `make` makes of items (n, …), each by itself: it is given those alone that it was not given before, by
    the same code, in the same environment and with the same of all that they are `made_of`.

    Processes that do so at the same time lose nothing. A damaged file is named in one line and made again. Raises OSError when
    it cannot be written.
    """
    key = repr((made_of, items.shape[1:], items.dtype.str, environment()))
    path = cache_folder() / "prefills" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz"
    keys = [hashlib.sha256(np.ascontiguousarray(item).tobytes()).hexdigest() for item in items]
    if path.parent.exists():
        storage.tidy(path.parent)
    known = known_arrays(path)
    new = np.asarray([key not in known for key in keys], bool)
    if new.any():
        made = [np.asarray(array) for array in make(items[new])]
        fresh = dict(zip(np.asarray(keys)[new].tolist(), zip(*made, strict=True), strict=True))
        with storage.replacing(path, storage.sidecar(path)) as [scratch, record]:
            known = known_arrays(path, report=True) | fresh  # another process may have added to it in the meantime
            with scratch.open("wb") as file:
                np.savez(file, np.asarray(list(known)), *(np.stack(column) for column in zip(*known.values(), strict=True)))
            record.write_bytes(storage.checksums({path.name: storage.digest(scratch)}, dict(code=code())))
    return [np.stack(column) for column in zip(*(known[key] for key in keys), strict=True)]


def known_arrays(path: Path, *, report: bool = False) -> dict[str, tuple]:
    """Item -> its arrays, as this code kept them in a file; none when it is missing or damaged, which a printed line can say."""
    try:
        metadata = storage.verified([path])
        if metadata is None or metadata.get("code") != code():
            return {}
        with np.load(path) as file:
            keys, *arrays = file.values()
        return dict(zip(keys.tolist(), zip(*arrays, strict=True), strict=True))
    except (ValueError, OSError, KeyError, EOFError, zipfile.BadZipFile) as error:
        if report:
            print(f"{path.name}: the cached hidden states are damaged, made again ({storage.reason_of(error)})", flush=True)
        return {}


@OncePerArray
def array_digest(array: AnyArray) -> str:
    """SHA-256 of an array's type, shape and values."""
    values = np.ascontiguousarray(np.asarray(array))
    digest = hashlib.sha256(f"{values.dtype} {values.shape} ".encode())
    digest.update(values.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def model_digest(model: Decoder) -> str:
    """SHA-256 of all arrays of a model, with their places in it."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(nnx.state(model))
    with concurrent.futures.ThreadPoolExecutor() as threads:
        digests = list(threads.map(array_digest, [array for _, array in leaves]))
    told = [f"{jax.tree_util.keystr(path)} {digest}" for (path, _), digest in zip(leaves, digests, strict=True)]
    return hashlib.sha256("\n".join(told).encode()).hexdigest()


def weights(subject: TextModel) -> tuple:
    return subject.stored, subject.model.config, model_digest(subject.model)


def states(subject: TextModel, texts: Sequence[Document], length: int = 60, each: int = 1, *, skip: int = 20) -> States:
    """evaluation.collect of evaluation.windows of texts, for a model as it was loaded."""
    tokens, names = windows(subject, texts, length, each)

    def make(tokens: np.ndarray) -> list:
        return [collect(subject.model, tokens, tokens[:, 0], skip=0).hidden.reshape(*tokens[:, 1:].shape, -1)]

    hidden = once(make, tokens, "states", *weights(subject))[0][:, skip:]
    return States(hidden.reshape(-1, hidden.shape[-1]), tokens[:, skip + 1 :].reshape(-1), np.repeat(names, hidden.shape[1]))


def best_words(subject: TextModel, hidden: np.ndarray, k: int) -> TopK:
    """true_top_k of hidden states (n, d) of such a model."""
    rows = subject.model.token_embeddings()
    return TopK(*once(lambda hidden: [*true_top_k(rows, hidden, k)], hidden, "words", k, *weights(subject)))

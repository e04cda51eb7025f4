"""What several notebooks make of the same text by the same weights: made once, and kept between them in the cache folder."""

import functools
import hashlib
import os
import shutil
from collections.abc import Callable, Sequence

import numpy as np

from hire.choose import true_top_k
from hire.estimators import fingerprint
from hire.lab.evaluation import States, collect, windows
from hire.lab.paths import ROOT
from hire.lab.text import Document
from hire.models import TextModel
from hire.models.weights import cache_folder
from hire.topk import TopK


@functools.cache
def code() -> str:
    """A digest of the package."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted((ROOT / "hire").rglob("*.py")))).hexdigest()


def forget() -> None:
    """Let all be made anew."""
    shutil.rmtree(cache_folder() / "prefills", ignore_errors=True)


def once(make: Callable[[np.ndarray], list], items: np.ndarray, *made_of) -> list[np.ndarray]:
    """The arrays (n, …) that `make` makes of items (n, …), each by itself: it is given those alone that it was not given before, by
    the same code and with the same of all that they are `made_of`.
    """
    name = hashlib.sha256(repr((made_of, items.shape[1:])).encode()).hexdigest()[:16]
    path = cache_folder() / "prefills" / f"{name}.npz"
    keys = np.asarray([hashlib.sha256(item.tobytes()).hexdigest() for item in items])
    by, *known = map(np.asarray, np.load(path).values() if path.exists() else [""])
    place = {key: index for index, key in enumerate(known[0])} if known and by == code() else {}
    new = np.asarray([key not in place for key in keys])
    if new.any():
        made = [keys[new], *make(items[new])]
        known = [np.concatenate(pair) for pair in zip(known, made, strict=True)] if place else made
        place = {key: index for index, key in enumerate(known[0])}
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.npz")
        np.savez(part, code(), *known)
        part.replace(path)
    places = np.asarray([place[key] for key in keys])
    return [array[places] for array in known[1:]]


def weights(subject: TextModel) -> tuple:
    return subject.stored, subject.model.config, int(fingerprint(subject.model.embedding[...]))


def states(subject: TextModel, texts: Sequence[Document], length: int = 60, each: int = 1, *, skip: int = 20) -> States:
    """evaluation.collect of evaluation.windows of texts, for a model as it was loaded."""
    tokens, names = windows(subject, texts, length, each)

    def make(tokens: np.ndarray) -> list:
        return [collect(subject.model, tokens, tokens[:, 0], skip=0).hidden.reshape(*tokens[:, 1:].shape, -1)]

    hidden = once(make, tokens, "states", *weights(subject))[0][:, skip:]
    return States(hidden.reshape(-1, hidden.shape[-1]), tokens[:, skip + 1 :].reshape(-1), np.repeat(names, hidden.shape[1]))


def best_words(subject: TextModel, hidden: np.ndarray, k: int) -> TopK:
    """true_top_k of hidden states (n, d) of such a model."""
    rows = subject.model.embedding[...]
    return TopK(*once(lambda hidden: [*true_top_k(rows, hidden, k)], hidden, "words", k, *weights(subject)))

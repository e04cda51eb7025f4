"""Real text: the committed public-domain corpus, and data sets from the Hugging Face hub."""

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import ModuleType

from hire.lab.paths import TEXT

SPLITS = ("train", "calibration", "evaluation")
KINDS = ("speech", "novel", "scripture", "commentary", "scripture_es")


@dataclass(frozen=True)
class Document:
    """One text, entirely in one split."""

    name: str
    kind: str
    text: str


def beginnings(texts: Sequence[Document], size: int) -> list[Document]:
    """Return the documents, each cut to its first `size` characters."""
    return [replace(text, text=text.text[:size]) for text in texts]


def documents(
    split: str,
    kinds: Sequence[str] | None = None,
    *,
    source: str | None = None,
    config: str | None = None,
) -> list[Document]:
    """Return the documents of a split, in a fixed order.

    Args:
        split: Without `source` one of SPLITS; the committed corpus is split by document.
        kinds: Kinds of documents, each one of KINDS; all kinds by default.
        source: Data set of the Hugging Face hub with a `text` column, such as
            "Salesforce/wikitext". Its rows become the documents, and its name becomes their kind.
            The committed corpus (data/text/README.md) by default.
        config: Configuration of the data set, such as "wikitext-2-raw-v1".

    Raises:
        ValueError: The split or a kind does not exist, or a committed file is damaged.
        ConnectionError: The hub cannot be reached.
    """
    if source is not None:
        try:
            rows = hub_library().load_dataset(source, config, split=split)
        except Exception as error:
            reason = (
                str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            )
            raise ConnectionError(
                f"data set {source!r} ({config}, {split}) could not be loaded: {reason}; without a "
                "network use the "
                f"committed corpus, documents({SPLITS[-1]!r})"
            ) from None
        return [
            Document(f"{source} {index}", source, text) for index, text in enumerate(rows["text"])
        ]
    if split not in SPLITS:
        raise ValueError(f"split {split!r}: expected one of {', '.join(SPLITS)}")
    for kind in kinds or ():
        if kind not in KINDS:
            raise ValueError(f"kind {kind!r}: expected one of {', '.join(KINDS)}")
    return [
        document
        for document in committed_documents(split)
        if kinds is None or document.kind in kinds
    ]


@functools.cache
def committed_documents(split: str) -> list[Document]:
    """Return the documents of a split of the committed corpus, verified by data/text/SHA256SUMS.

    Raises:
        ValueError: The file is missing or differs from the committed one. The message names it.
    """
    path = TEXT / f"{split}.parquet"
    try:
        lines = (TEXT / "SHA256SUMS").read_text().splitlines()
        content = path.read_bytes()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path}: cannot be read with its SHA256SUMS ({error}); restore both with git"
        ) from None
    if f"{hashlib.sha256(content).hexdigest()}  {path.name}" not in lines:
        raise ValueError(
            f"{path}: not the file that SHA256SUMS beside it states; restore both with git"
        )
    rows = hub_library().load_dataset(
        "parquet", data_files=str(path), split="train", streaming=True
    )
    return [Document(row["document"], row["kind"], row["text"]) for row in rows]


def hub_library() -> ModuleType:
    """Return the library `datasets`. Importing it takes two seconds, so it is imported late."""
    import datasets

    datasets.disable_progress_bars()
    return datasets

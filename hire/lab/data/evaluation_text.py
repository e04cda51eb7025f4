"""Evaluation text by kind: the committed corpus, Python source, and questions with answers."""

import sysconfig
from collections.abc import Callable, Mapping
from pathlib import Path

from hire.lab.data.questions import questions
from hire.lab.data.text import Document, documents

# Modules of at least so many bytes; smaller ones are mostly comments.
SMALLEST_MODULE = 8000
# Question sets whose texts are long enough for a window of 60 tokens.
DIALOGUE_SETS = ("local_reclor", "local_logiqa")


def evaluation_text(kind: str, count: int) -> list[Document]:
    """Return evaluation documents of one kind, in a fixed order.

    Calibration texts are speeches and commentary. Those of other kinds tell how an estimator does
    on text that it was not fitted to.

    Args:
        kind: "novel", "speech", "commentary", "scripture_es" (Spanish), "python" (source of
            the standard library) or "dialogue" (a question and its answer, as in a chat).
        count: Number of documents, at most.

    Raises:
        ValueError: The kind does not exist.
        ConnectionError: The question sets could not be downloaded from PyPI.
    """
    if kind in OTHER_KINDS:
        return OTHER_KINDS[kind](count)
    return documents("evaluation", [kind])[:count]


def python_source(count: int) -> list[Document]:
    """Return the second halves of modules of this Python's standard library, evenly chosen."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    paths = [path for path in folder.glob("*.py") if path.stat().st_size >= SMALLEST_MODULE]
    sources = []
    for path in sorted(paths)[:: max(1, len(paths) // count)][:count]:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        sources.append(Document(path.name, "python", "".join(lines[len(lines) // 2 :])))
    return sources


def dialogues(count: int) -> list[Document]:
    """Return multiple-choice questions, each with its right answer, in turn from each set."""
    dialogues = []
    for index in range(count):
        name = DIALOGUE_SETS[index % len(DIALOGUE_SETS)]
        question = questions(name)[index // len(DIALOGUE_SETS)]
        choices = question["choices"]
        text = "\n".join(
            [f"User: {question['question']}", *choices, f"Assistant: {choices[question['gold']]}"]
        )
        dialogues.append(Document(f"{name} {index}", "dialogue", text))
    return dialogues


OTHER_KINDS: Mapping[str, Callable[[int], list[Document]]] = {
    "python": python_source,
    "dialogue": dialogues,
}

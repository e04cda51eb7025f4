"""Budgets of size and of time: lines of code by room, minutes by make target."""

import ast
import io
import json
import subprocess
import time
import tokenize
from pathlib import Path

from hire.lab.paths import ROOT

ROOMS = {  # room -> (files, lines)
    "algorithm": ("hire/*.py", 1230),  # 1,200 before rows that are kept exactly, and scales that are chosen for the scores
    "models": ("hire/models/*.py", 900),
    "kernels": ("hire/kernels/*.py", 700),
    # 1,600 before training, the lab of TPU programs (550 lines), the ladder, several chips (270), quality (430), what lies beyond
    # the paper (270), and what takes minutes off `make figures` came to it: what notebooks keep for each other (40), and questions
    # apart from lm-eval, which takes two seconds to import (20)
    "lab": ("hire/lab/*.py", 3515),
    "tests": ("tests/*.py", 4000),
}
FILE, NOTEBOOK = 300, 120


def code_lines(source: str) -> int:
    """Lines that hold code: no blanks, comments or docstrings."""
    silent = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in silent:
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines)


def notebook_lines(path: Path) -> int:
    """Lines of a notebook's code cells."""
    cells = json.loads(path.read_text())["cells"]
    return sum(code_lines("".join(cell["source"])) for cell in cells if cell["cell_type"] == "code")


def size() -> tuple[str, bool]:
    """The table of lines against budgets, and whether all are kept."""
    lines, good = [], True
    for room, (pattern, most) in ROOMS.items():
        counts = {path: code_lines(path.read_text()) for path in sorted(ROOT.glob(pattern))}
        total, longest = sum(counts.values()), max(counts, key=lambda path: counts[path], default=None)
        kept = total <= most and (longest is None or counts[longest] <= FILE)
        good = good and kept
        note = f"longest {longest.name} {counts[longest]} of {FILE}" if longest else "empty yet"
        lines.append(f"{room:10} {total:5} of {most:5}   {note}{'' if kept else '   OVER'}")
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        count = notebook_lines(path)
        good = good and count <= NOTEBOOK
        lines.append(f"{path.stem:14} {count:4} of {NOTEBOOK}{'' if count <= NOTEBOOK else '   OVER'}")
    return "\n".join(lines), good


def timed(targets: list[str]) -> int:
    """Run `make TARGET …` and, when it succeeds, keep its minutes as a record. Returns make's exit status.

    `env` cannot remove the environment that this runs in: its minutes are those that the last set-up left in its stamp.
    """
    from hire.lab import pages, records

    start = time.monotonic()
    status = subprocess.run(["make", *targets], cwd=ROOT).returncode
    seconds = time.monotonic() - start if targets != ["env"] else float((ROOT / ".venv/.ready").read_text())
    if status == 0:
        command = "make " + " ".join(targets)
        results = dict(minutes=round(seconds / 60, 2))
        records.write(
            records.RECORDS, "budgets", command, kind="measured", weights="-", setting={}, results=results, command=command
        )
        pages.write_pages()  # they quote these minutes, and a test wants them up to date
        print(f"{command}: {seconds / 60:.1f} minutes")
    return status

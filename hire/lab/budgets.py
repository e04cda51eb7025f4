"""Budgets of time: minutes by make target."""

import ast
import io
import subprocess
import time
import tokenize

from hire.lab.paths import ROOT


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

"""Evidence, one JSON line each: what was obtained, of which kind, by which code, where, from which weights.

A kind is `measured`, `compiler-estimate`, `simulated` (arithmetic on published or assumed figures) or `published`. A record has an
id; a newer one of the same id takes its line, and git keeps the older.
"""

import datetime
import functools
import hashlib
import json
import os
import platform
import subprocess
from functools import reduce
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from hire.lab.paths import NOTEBOOKS, RECORDS, ROOT
from hire.models import storage

KINDS = ("measured", "compiler-estimate", "simulated", "published")
# What a record may state. A checksum alone would not notice that its own name is damaged.
FIELDS = {"id", "kind", "weights", "setting", "results", "durations", "claims", "command", "peak_memory"}
FIELDS |= {"date", "commit", "machine", "sha256"}


@functools.cache
def commit() -> str:
    """The commit that this process began at, "-dirty" when code differs from it or is not in it, "unknown"
    outside git.

    What a run itself writes (figures, records, pages, the notebooks' text) is not code, or every second figure would be dirty.
    """

    def git(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)

    def cells(text: str) -> list[str]:
        return ["".join(cell["source"]) for cell in json.loads(text or '{"cells": []}')["cells"] if cell["cell_type"] == "code"]

    found = git("rev-parse", "--short", "HEAD").stdout.strip()
    changed = git("diff", "--quiet", "HEAD", "--", "hire", "notebooks/profiles", "constraints.txt").returncode
    new = git("ls-files", "--others", "--exclude-standard", "--", "hire", "notebooks", "constraints.txt").stdout
    changed |= bool(new.strip())
    for path in NOTEBOOKS.glob("*.ipynb"):
        changed |= cells(git("show", f"HEAD:notebooks/{path.name}").stdout) != cells(path.read_text())
    return f"{found}{'-dirty' if changed else ''}" if found else "unknown"


@functools.cache
def machine() -> dict:
    """Device, cores and versions, as a record states them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    processor = platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    device = jax.devices()[0]
    name = f"CPU, {cores} cores, {processor}" if device.platform == "cpu" else device.device_kind
    packages = ("jax", "jaxlib", "flax", "numpy")
    versions = {"python": platform.python_version()} | {package: version(package) for package in packages}
    return dict(device=name, versions=versions, xla_flags=os.environ.get("XLA_FLAGS", ""))


def write(
    folder: Path, topic: str, id: str, *, kind: str, weights: str, setting: dict, results: dict, append: bool = False, **more
) -> dict:
    """Put a record into folder/topic.jsonl in place of the one with its id (or after it, with append), and return it.

    `more` may hold `durations` (raw seconds by form), `claims` (see scorecard.py), `command` and `peak_memory`. Raises ValueError
    for an unknown kind or field, and when the file is damaged, OSError when it cannot be written. The file is written whole and
    renamed; processes that write at the same time lose nothing.
    """
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r}: expected one of {', '.join(KINDS)}")
    for field in set(more) - FIELDS:
        raise ValueError(f"field {field!r}: expected one of {', '.join(sorted(FIELDS))}")
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    record: dict = dict(id=id, kind=kind, weights=weights, setting=setting, results=results, **more)
    record |= dict(date=now, commit=commit(), machine=machine())
    path = folder / f"{topic}.jsonl"
    with storage.replacing(path) as [scratch]:  # under a lock, so that no record of another process is lost
        kept = [old for old in read(folder, topic) if append or old["id"] != id]
        lines = [line_of(entry) for entry in sorted([*kept, record], key=lambda entry: entry["id"])]
        scratch.write_text("\n".join(lines) + "\n")
    return record


def line_of(record: dict) -> str:
    """A record as a line of its file: JSON that ends in a SHA-256 of what comes before."""
    text = json.dumps(record)
    return f'{text[:-1]}, "sha256": "{hashlib.sha256(text.encode()).hexdigest()}"}}'


def read(folder: Path = RECORDS, topic: str = "*") -> list[dict]:
    """All records of a folder, or of one topic.

    Raises ValueError, naming file and line, for one that is no JSON, or that is not as it was written. Files of before there were
    checksums have none in any line.
    """
    records = []
    for path in sorted(folder.glob(f"{topic}.jsonl")):
        try:
            lines = path.read_text().removesuffix("\n").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: cannot be read ({error}); restore the file with git") from None
        found = [entry_of(path, number, line) for number, line in enumerate(lines, 1)]
        checked = any("sha256" in entry for entry in found)
        for number, (entry, line) in enumerate(zip(found, lines, strict=True), 1):
            unknown = set(entry) - FIELDS
            known = entry.pop("sha256", None)
            if unknown or (checked and (known is None or line_of(entry) != line)):
                raise ValueError(f"{path}:{number}: not as it was written; restore the file with git")
        records += found
    return records


def entry_of(path: Path, number: int, line: str) -> dict:
    try:
        entry = json.loads(line)
        if not isinstance(entry, dict) or not isinstance(entry.get("id"), str):
            raise ValueError("no id")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}:{number}: not a record ({error}); restore the file with git") from None
    return entry


def value(record: dict, field: str) -> Any:
    """What a record has at a field such as results.recall.low or, in a list, results.seconds.0. Raises ValueError for another."""
    try:
        return reduce(lambda part, key: part[int(key) if isinstance(part, list) else key], field.split("."), record)
    except (KeyError, IndexError, TypeError, ValueError):
        raise ValueError(f"record {record['id']!r} has no {field!r}; name a field that it has") from None

"""Evidence as records, one JSON line each.

A record states the result, its kind, and the code, machine and weights that it comes from. A kind
is `measured`, `compiler-estimate`, `simulated` (arithmetic on published or assumed numbers) or
`published`. Each record has an id. A newer record replaces the one with the same id; git keeps the
older one.
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

from hire import storage
from hire.lab.paths import NOTEBOOKS, RECORDS, ROOT

KINDS = ("measured", "compiler-estimate", "simulated", "published")
# Fields that a record may have. They are checked because a checksum alone would not reveal damage
# to the name of its own field.
FIELDS = {
    "id",
    "kind",
    "weights",
    "setting",
    "results",
    "durations",
    "claims",
    "command",
    "peak_memory",
}
FIELDS |= {"date", "commit", "machine", "format", "sha256"}
# Version of the field names below `setting`, `results` and `claims`. Version 2 has plain names and
# numeric claims; data/records/migrate.py changes records of version 1, which do not say so.
FORMAT = 2


@functools.cache
def commit() -> str:
    """Return the commit that this process started from.

    Files that a run itself writes (figures, records, pages, the text of notebooks) do not count as
    code. Otherwise every second figure would be dirty.

    Returns:
        The short commit hash. It ends in "-dirty" when code differs from the commit or is
        untracked. "unknown" outside git.
    """

    def git(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)

    def cells(text: str) -> list[str]:
        return [
            "".join(cell["source"])
            for cell in json.loads(text or '{"cells": []}')["cells"]
            if cell["cell_type"] == "code"
        ]

    commit_hash = git("rev-parse", "--short", "HEAD").stdout.strip()
    changed = git(
        "diff", "--quiet", "HEAD", "--", "hire", "notebooks/profiles", "constraints.txt"
    ).returncode
    untracked = git(
        "ls-files", "--others", "--exclude-standard", "--", "hire", "notebooks", "constraints.txt"
    ).stdout
    changed |= bool(untracked.strip())
    for path in NOTEBOOKS.glob("*.ipynb"):
        changed |= cells(git("show", f"HEAD:notebooks/{path.name}").stdout) != cells(
            path.read_text()
        )
    return f"{commit_hash}{'-dirty' if changed else ''}" if commit_hash else "unknown"


@functools.cache
def machine() -> dict:
    """Describe this machine for a record.

    Returns:
        `device` (name of the device; on a CPU with its cores), `versions` (Python and packages) and
        `xla_flags`.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    processor = platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        pass
    device = jax.devices()[0]
    name = f"CPU, {cores} cores, {processor}" if device.platform == "cpu" else device.device_kind
    packages = ("jax", "jaxlib", "flax", "numpy")
    versions = {"python": platform.python_version()} | {
        package: version(package) for package in packages
    }
    return dict(device=name, versions=versions, xla_flags=os.environ.get("XLA_FLAGS", ""))


def write(
    folder: Path,
    topic: str,
    id: str,
    *,
    kind: str,
    weights: str,
    setting: dict,
    results: dict,
    append: bool = False,
    **more,
) -> dict:
    """Write a record into folder/topic.jsonl and return it.

    The record replaces the one with the same id; with `append` it comes after it. The file is
    written completely and then renamed. Processes that write at the same time lose no record.

    Args:
        folder: Folder of the records.
        topic: Name of the file, without its suffix.
        id: Id of the record.
        kind: One of KINDS.
        weights: Which weights the results come from.
        setting: Settings of the run.
        results: Results of the run.
        append: Keep an older record with the same id.
        **more: Optional fields: `durations` (raw seconds, by timed function), `claims` (see
            hire.lab.report.scorecard), `command` and `peak_memory`.

    Raises:
        ValueError: The kind or a field is unknown, or the file is damaged.
        OSError: The file cannot be written.
    """
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r}: expected one of {', '.join(KINDS)}")
    for field in set(more) - FIELDS:
        raise ValueError(f"field {field!r}: expected one of {', '.join(sorted(FIELDS))}")
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    record: dict = dict(id=id, kind=kind, weights=weights, setting=setting, results=results, **more)
    record |= dict(date=now, commit=commit(), machine=machine(), format=FORMAT)
    path = folder / f"{topic}.jsonl"
    # The file is read and written under one lock, so no record of another process is lost.
    with storage.replacing(path) as [scratch]:
        old_records = [old for old in read(folder, topic) if append or old["id"] != id]
        lines = [
            line_of(entry)
            for entry in sorted([*old_records, record], key=lambda entry: entry["id"])
        ]
        scratch.write_text("\n".join(lines) + "\n")
    return record


def line_of(record: dict) -> str:
    """Format a record as one line of JSON that ends in the SHA-256 of the text before it."""
    text = json.dumps(record)
    return f'{text[:-1]}, "sha256": "{hashlib.sha256(text.encode()).hexdigest()}"}}'


def read(folder: Path = RECORDS, topic: str = "*") -> list[dict]:
    """Read all records of a folder, or of one topic.

    Raises:
        ValueError: A line is not JSON, differs from what was written, or has the names of another
            version. The message names file and line.
    """
    records = []
    for path in sorted(folder.glob(f"{topic}.jsonl")):
        try:
            lines = path.read_text().removesuffix("\n").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{path}: cannot be read ({error}); restore the file with git"
            ) from None
        records += [entry_of(path, number, line) for number, line in enumerate(lines, 1)]
    return records


def entry_of(path: Path, number: int, line: str) -> dict:
    """Parse one line of a file of records.

    Raises:
        ValueError: The line is not a record, differs from what was written, or has the names of
            another version. The message names file and line.
    """
    place = f"{path}:{number}"
    try:
        entry = json.loads(line)
        if not isinstance(entry, dict) or not isinstance(entry.get("id"), str):
            raise ValueError("no id")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: not a record ({error}); restore the file with git") from None
    if entry.get("format", 1) == 1:
        raise ValueError(
            f"{place}: a record with the names of format 1: expected {FORMAT}; run "
            "python data/records/migrate.py"
        )
    checksum = entry.pop("sha256", None)
    if set(entry) - FIELDS or checksum is None or line_of(entry) != line:
        raise ValueError(f"{place}: not as it was written; restore the file with git")
    return entry


def value(record: dict, field: str) -> Any:
    """Return one field of a record.

    Args:
        record: The record.
        field: Path of the field, such as results.recall.low or, in a list, results.seconds.0.

    Raises:
        ValueError: The record has no such field.
    """
    try:
        return reduce(
            lambda part, key: part[int(key) if isinstance(part, list) else key],
            field.split("."),
            record,
        )
    except (KeyError, IndexError, TypeError, ValueError):
        raise ValueError(
            f"record {record['id']!r} has no {field!r}; name a field that it has"
        ) from None

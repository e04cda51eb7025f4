"""Change the names in records of format 1 to those of format 2.

    python data/records/migrate.py [FOLDER]

Only names change: values, dates, commits and machines stay. The values of claims were texts. That
of `make questions` becomes the number that the record has among its results; other claims are left
out, since `make figures` makes their records again. Records of format 2 stay as they are. A file is
replaced only when every line of it was read.
"""

import hashlib
import json
import os
import re
import sys
import tempfile
from pathlib import Path

FORMAT = 2
# By topic: old key -> new key, wherever it occurs in setting, results or durations.
KEYS = {
    "bench": {"there": "old_commit", "here": "new_commit"},
    "fits": {
        "judged": "evaluation_queries",
        "every": "calibration_queries",
        "outliers": "exact_rows",
        "scales chosen for": "int4_fitted_to",
    },
    "keys": {
        "new": "new_tokens",
        "lost": "loss_difference",
        "bytes": "bytes_fraction",
        "bytes bfloat16": "bytes_fraction_bfloat16",
        "kept": "attention_fraction_read",
    },
    "proofs": {"wrong_fallbacks": "wrong_with_fallback", "queries_a_set": "queries_per_set"},
    "questions": {
        "headline": "softmax_setting",
        "limit": "questions_per_task",
        "accuracy": "accuracy_difference",
        "failed": "failed_tasks",
    },
    "training": {"rate": "learning_rate", "scored": "summary", "curve": "training_loss"},
    "v5e": {
        "holes": "unparsed",
        "moving": "transfer_seconds",
        "sent": "bytes_sent",
        "parts": "operations",
    },
}
TOPICS = {"keys": "kv_search"}
# By topic: patterns in an id and their replacements.
IDS = {
    "keys": ((r"^keys/contexts$", "kv_search/gemma3_270m"),),
    "v5e": (
        (r"^((?!published|kernel).*) plain\b", r"\1 xla"),
        (r"^((?!kernel).*) kernels\b", r"\1 pallas"),
    ),
}


def renamed(value: object, keys: dict[str, str]) -> object:
    """Return JSON data with its keys renamed."""
    if isinstance(value, dict):
        return {keys.get(key, key): renamed(part, keys) for key, part in value.items()}
    if isinstance(value, list):
        return [renamed(part, keys) for part in value]
    return value


def migrated(line: str, topic: str) -> str:
    """Return one line of a file of records in format 2.

    Raises:
        ValueError: The line differs from its checksum.
    """
    record = json.loads(line)
    checksum = record.pop("sha256", None)
    text = json.dumps(record)
    if checksum is not None and hashlib.sha256(text.encode()).hexdigest() != checksum:
        raise ValueError("not as it was written; restore the file with git")
    if record.get("format", 1) == 1:
        for part in ("setting", "results", "durations"):
            if part in record:
                record[part] = renamed(record[part], KEYS.get(topic, {}))
        claims = record.pop("claims", {})
        if topic == "questions" and "quality" in claims:
            interval = record["results"]["accuracy_difference"]
            numbers = dict(value=interval["mean"], low=interval["low"], high=interval["high"])
            record["claims"] = {"quality": claims["quality"] | numbers | dict(device=None)}
        for pattern, replacement in IDS.get(topic, ()):
            record["id"] = re.sub(pattern, replacement, record["id"])
        record["format"] = FORMAT
    text = json.dumps(record)
    return f'{text[:-1]}, "sha256": "{hashlib.sha256(text.encode()).hexdigest()}"}}'


def migrate(folder: Path) -> None:
    """Change all files of a folder.

    Raises:
        ValueError: A line cannot be read; the message names file and line.
    """
    for path in sorted(folder.glob("*.jsonl")):
        lines = []
        for number, line in enumerate(path.read_text().removesuffix("\n").split("\n"), 1):
            try:
                lines.append(migrated(line, path.stem))
            except ValueError as error:
                raise ValueError(f"{path}:{number}: {error}") from None
        target = path.with_stem(TOPICS.get(path.stem, path.stem))
        with tempfile.NamedTemporaryFile("w", dir=folder, delete=False) as scratch:
            scratch.write("\n".join(lines) + "\n")
        os.replace(scratch.name, target)
        if target != path:
            path.unlink()
        print(f"{target.name}: {len(lines)} records")


if __name__ == "__main__":
    try:
        migrate(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
    except ValueError as error:
        sys.exit(f"error: {error}")

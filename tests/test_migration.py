"""data/records/migrate.py, which changes the names in records of format 1."""

import hashlib
import json
import runpy

import pytest

from hire.lab import records
from hire.lab.paths import RECORDS

migrate = runpy.run_path(str(RECORDS / "migrate.py"))["migrate"]


def old_line(**record):
    """A record as the first release wrote it."""
    fields = dict(kind="measured", weights="none", setting={}, commit="0", machine={}, date="d")
    text = json.dumps(dict(id=record.pop("id"), **fields | record))
    return f'{text[:-1]}, "sha256": "{hashlib.sha256(text.encode()).hexdigest()}"}}\n'


def test_names_change_and_values_stay(tmp_path):
    results = {"8192 tokens": {"dense": {"loss": 2.5}, "LR": {"lost": {"mean": 0.25}, "kept": 0.5}}}
    (tmp_path / "keys.jsonl").write_text(old_line(id="keys/contexts", results=results))
    (tmp_path / "v5e.jsonl").write_text(
        old_line(id="softmax 2048, LR int8 plain, b 1", results=dict(moving=1.5, holes=[]))
        + old_line(id="kernel rows", results=dict(sent=3))
    )
    migrate(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kv_search.jsonl", "v5e.jsonl"]
    (context,) = records.read(tmp_path, "kv_search")
    assert context["id"] == "kv_search/gemma3_270m"
    assert context["results"]["8192 tokens"]["LR"] == {
        "loss_difference": {"mean": 0.25},
        "attention_fraction_read": 0.5,
    }
    program, kernel = records.read(tmp_path, "v5e")
    assert program["id"] == "softmax 2048, LR int8 xla, b 1" and kernel["id"] == "kernel rows"
    assert program["results"] == dict(transfer_seconds=1.5, unparsed=[])
    assert kernel["results"] == dict(bytes_sent=3)
    before = (tmp_path / "v5e.jsonl").read_text()
    migrate(tmp_path)
    assert (tmp_path / "v5e.jsonl").read_text() == before


def test_a_damaged_record_is_not_migrated(tmp_path):
    path = tmp_path / "v5e.jsonl"
    path.write_text(old_line(id="a", results=dict(sent=3)).replace("3", "4"))
    before = path.read_text()
    with pytest.raises(ValueError, match=r"v5e\.jsonl:1"):
        migrate(tmp_path)
    assert path.read_text() == before

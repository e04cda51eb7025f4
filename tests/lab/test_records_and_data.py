"""The lab: text, records, timing, figures, scorecard, targets."""

import dataclasses
import json
import re
import subprocess
import sys

import jsonschema
import matplotlib
import nbformat
import numpy as np
import pytest
import yaml

from hire import timing
from hire.lab import figure_index, records
from hire.lab.data import model_states
from hire.lab.data.text import KINDS, SPLITS, documents
from hire.lab.metrics import model_quality
from hire.lab.report import pages, scorecard
from hire.lab.rivals import dense
from hire.lab.studies import figure_files, plots, study
from hire.lab.studies.study import Claim, Record, Result, Study
from hire.lab.timing import commits, decode_step, roofline
from hire.models import load, preset

matplotlib.use("Agg")


def test_no_document_is_in_two_splits_and_all_kinds_are_there():
    names = {split: {document.name for document in documents(split)} for split in SPLITS}
    assert (
        not names["train"] & names["evaluation"] and not names["calibration"] & names["evaluation"]
    )
    assert not names["train"] & names["calibration"]
    years = {
        split: {name[:4] for name in names[split] if name[:2] in ("17", "18", "19", "20")}
        for split in SPLITS
    }
    assert (
        not years["train"] & years["evaluation"] and not years["calibration"] & years["evaluation"]
    )
    assert {document.kind for split in SPLITS for document in documents(split)} == set(KINDS)
    assert {document.kind for document in documents("evaluation", ["novel"])} == {"novel"}
    assert "Call me Ishmael." in documents("evaluation", ["novel"])[0].text
    assert not any(
        "<" in document.text for document in documents("train", ["scripture"])[:20]
    )  # no markup left


@pytest.mark.parametrize(
    "call, error, value",
    [
        (lambda: documents("test"), ValueError, "'test'"),
        (lambda: documents("train", ["poem"]), ValueError, "'poem'"),
        (lambda: figure_index.figure_entry("99"), ValueError, "'99'"),
        (lambda: figure_index.sizes_by_notebook("gpu"), ValueError, "'gpu'"),
        (lambda: Study("01", dict(profile="fast")), ValueError, "'fast'"),
        (lambda: Study("01", dict(profile="tpu")), RuntimeError, "'tpu'.*cpu"),
        (lambda: figure_index.settings("02_recall", "cpu", dict(rnak=8)), ValueError, "'rnak'"),
        (lambda: timing.interleaved({}, [1], 2), ValueError, "1 .* 2"),
    ],
)
def test_bad_names_are_named(call, error, value):
    with pytest.raises(error, match=value):
        call()


def test_the_hub_out_of_reach_is_one_line(monkeypatch):
    def offline(*_, **__):
        raise OSError("Couldn't reach the hub\nTraceback and more")

    monkeypatch.setattr("datasets.load_dataset", offline)
    with pytest.raises(ConnectionError, match="'a/b'.*Couldn't reach the hub") as error:
        documents("test", source="a/b")
    assert "\n" not in str(error.value)


def test_windows_start_with_bos_and_states_keep_their_documents():
    subject = load("tiny")
    texts = documents("evaluation", ["speech"])[:3]
    tokens, names = model_states.windows(subject, texts, 32, windows_per_document=2)
    assert tokens.shape == (6, 32) and (tokens[:, 0] == 2).all()
    assert subject.tokenizer.decode(tokens[0, 1:].tolist()) == texts[0].text[:31]
    first, _ = model_states.windows(subject, texts, 32, windows_per_document=2, limit=3)
    assert first.tolist() == tokens[:3].tolist()
    states = model_states.collect(subject.model, tokens, names, skip=4)
    assert states.hidden.shape == (6 * 27, 64)
    hidden = subject.model.prefill(tokens)[0]
    np.testing.assert_allclose(states.hidden.reshape(6, 27, 64), hidden[:, 4:-1], atol=1e-5)
    assert states.targets.reshape(6, 27)[2].tolist() == tokens[2, 5:].tolist()
    assert states.documents.reshape(6, 27)[2].tolist() == [texts[1].name] * 27
    losses = model_quality.losses(subject.model, states)
    logits = np.asarray(subject.model.logits(states.hidden), np.float64)
    expected = np.log(np.exp(logits).sum(1)) - logits[np.arange(len(logits)), states.targets]
    np.testing.assert_allclose(losses, expected, atol=1e-4)
    with pytest.raises(ValueError, match="1000000"):
        model_states.windows(subject, texts, 10**6)


def test_two_commits_are_compared_in_turns(monkeypatch, tmp_path):
    """Round 0 is not counted; then the new commit takes 3/2 and 1/2 of the old one's time."""
    seconds = dict(old_commit=iter([9.0, 2.0, 4.0]), new_commit=iter([9.0, 3.0, 2.0]))
    order = []

    def benchmark(checkout):
        assert (checkout / "hire/__init__.py").is_file()
        order.append(checkout.name)
        return {"softmax/1": next(seconds[checkout.name])}

    monkeypatch.setattr(commits, "benchmark", benchmark)
    monkeypatch.setattr(commits, "ROUNDS", 2)
    monkeypatch.setattr(records, "RECORDS", tmp_path)
    commits.compare_commits("HEAD")
    assert order == ["old_commit", "new_commit", "new_commit", "old_commit"] + order[:2]
    (record,) = records.read(tmp_path, "bench")
    assert record["results"]["ratios"]["softmax/1"] == dict(median=1.0, low=0.5, high=1.5)
    assert record["results"]["worst"] == 1.0
    head = commits.git("rev-parse", "--short", "HEAD").stdout.strip()
    assert record["setting"] == dict(old_commit=head, new_commit=head, rounds=2)
    assert record["command"] == f"make bench-against COMMIT={head}"
    assert "hire-commits-" not in commits.git("worktree", "list").stdout
    with pytest.raises(ValueError, match="nowhere"):
        commits.compare_commits("nowhere")


def test_a_step_is_timed_whole_and_in_parts():
    subject = load("tiny")
    steps = decode_step.StepForms(subject.model, 32)
    hidden = np.ones((1, 64), np.float32)
    best, logits = steps.part(decode_step.softmax)(hidden), np.asarray(subject.model.logits(hidden))
    assert best.indices.tolist() == [[logits.argmax()]]
    np.testing.assert_allclose(best.values, [[logits.max()]], rtol=1e-5)
    top = steps.complete_step(3)(hidden)
    assert (
        top.indices.shape == (3, 1) and len(set(top.values[:, 0].tolist())) == 3
    )  # each text continues with another token


def test_functions_are_timed_in_turn_each_with_a_new_query_and_cold_caches(monkeypatch):
    calls = []
    monkeypatch.setattr(
        timing, "stream_form", lambda nbytes: (lambda _: calls.append(nbytes), nbytes)
    )
    functions = {name: lambda query, name=name: calls.append((name, query)) for name in "ab"}
    durations = timing.interleaved(functions, [1, 2, 3], 3)
    # A first call of each. Then turns: no two functions take the same query, and other memory is
    # read before each call.
    assert calls[:2] == [("a", 1), ("b", 1)] and calls[2::2] == [timing.bytes_for_cold_caches()] * 6
    assert calls[3::2] == [("a", 1), ("b", 2), ("a", 2), ("b", 3), ("a", 3), ("b", 1)]
    assert all(len(seconds) == 3 for seconds in durations.values())


def test_more_is_read_than_the_last_level_caches_hold(tmp_path):
    assert timing.bytes_for_cold_caches(tmp_path / "none") == 2**28
    # Two processors share one cache of 200 MiB, a third has its own.
    for cpu, shared in enumerate(["0-1", "0-1", "2"]):
        cache = tmp_path / f"cpu{cpu}" / "cache" / "index3"
        cache.mkdir(parents=True)
        (cache / "size").write_text("204800K\n")
        (cache / "shared_cpu_list").write_text(f"{shared}\n")
    assert timing.bytes_for_cold_caches(tmp_path) == 2 * 2 * 200 * 2**20


def test_the_range_is_that_of_the_sittings_by_hand(monkeypatch):
    durations = {"dense": [4.0, 4.0, 9.0, 6.0, 6.0, 6.0], "HiRE": [2.0, 2.0, 2.0, 2.0, 1.0, 2.0]}
    assert timing.speedup_range(durations, "HiRE", "dense", 2) == (2.0, 3.0)
    assert timing.speedup_range(durations, "HiRE", "dense", 1) == (3.0, 3.0)
    slept = []
    monkeypatch.setattr(timing.time, "sleep", slept.append)
    calls = {name: [] for name in "ab"}
    comparisons = {name: ({"form": calls[name].append}, [1, 2, 3, 4, 5]) for name in "ab"}
    found = timing.in_sittings(comparisons, 2)
    assert [len(found[name]["form"]) for name in "ab"] == [4, 4]
    # The first call of each sitting compiles and is not counted.
    assert calls == {name: [1, 1, 2, 3, 3, 4] for name in "ab"}
    assert len(slept) == 1 and 0 < slept[0] <= timing.SITTING_GAP
    with pytest.raises(ValueError, match="5 queries for 6 sittings"):
        timing.in_sittings(comparisons, 6)


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_every_dense_form_is_the_exact_top_k(batch):
    rng = np.random.default_rng(0)
    rows, x = (rng.normal(size=shape).astype(np.float32) for shape in ((300, 8), (batch, 8)))
    best = np.argsort(-(x @ rows.T))[:, :5]
    functions = dense.dense_forms(rows, 5)
    assert len(functions) == 6
    for name, function in functions.items():
        assert (np.asarray(function(x).indices) == best).all(), name


def test_the_roofline_by_hand():
    # One layer less any doubt: v5e at bf16 turns where 2 b / 197e12 = 2 / 819e9, at b = 240.5.
    assert roofline.compute_bound_from(roofline.V5E, itemsize=2) == 241
    work = roofline.step_work(preset("gemma3_270m"), batch=2, cache=1000, itemsize=4)
    assert work["softmax"] == (262144 * 640 * 4, 2 * 2 * 262144 * 640)
    assert (
        work["cache"][0] == 2 * 2 * (3 * 1000 + 15 * 512) * 256 * 4
    )  # three layers see all, fifteen the last 512
    chip = roofline.Chip("toy", bandwidth=1e9, peak=float("inf"), memory=0.0)
    total = sum(nbytes for nbytes, _ in work.values())
    assert roofline.step_seconds(preset("gemma3_270m"), [2], chip, cache=1000, itemsize=4) == [
        pytest.approx(total / 1e9)
    ]


def test_a_commit_is_dirty_when_code_differs(tmp_path, monkeypatch):
    for name, folder in (("ROOT", ""), ("NOTEBOOKS", "notebooks")):
        monkeypatch.setattr(records, name, tmp_path / folder)
    (tmp_path / "notebooks").mkdir()
    book = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_markdown_cell("text"), nbformat.v4.new_code_cell("x = 1")]
    )

    def differs(cell: int, source: str) -> bool:
        book.cells[cell].source = source
        nbformat.write(book, tmp_path / "notebooks/01.ipynb")
        return records.commit.__wrapped__().endswith("-dirty")

    assert records.commit.__wrapped__() == "unknown"  # outside git
    nbformat.write(book, tmp_path / "notebooks/01.ipynb")
    for command in ("init -q", "add -A", "-c user.name=a -c user.email=a@b commit -qm first"):
        subprocess.run(["git", *command.split()], cwd=tmp_path, check=True)
    assert not differs(0, "what a run writes")
    assert differs(1, "x = 2") and not differs(1, "x = 1")
    for new in (
        "hire/new.py",
        "hire/lab/new.py",
        "notebooks/profiles/new.yaml",
        "notebooks/12_new.ipynb",
        "constraints.txt",
    ):
        (tmp_path / new).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / new).write_text('{"cells": []}')
        assert records.commit.__wrapped__().endswith("-dirty"), new
        (tmp_path / new).unlink()
    for new in (
        "figures/new.png",
        "data/records/new.jsonl",
        "out/new.py",
    ):  # what a run writes is no code
        (tmp_path / new).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / new).touch()
    assert not differs(1, "x = 1")


def test_a_record_replaces_the_one_with_its_id(tmp_path):
    facts = dict(kind="measured", weights="none", setting={})
    records.write(tmp_path, "topic", "b", results=dict(x=1), **facts)
    records.write(tmp_path, "topic", "a", results=dict(x=2), **facts)
    records.write(tmp_path, "topic", "b", results=dict(x=3), durations=dict(step=[0.1]), **facts)
    kept = records.read(tmp_path)
    assert [(entry["id"], entry["results"]["x"]) for entry in kept] == [("a", 2), ("b", 3)]
    assert {"commit", "date", "machine"} <= set(kept[0]) and "CPU" in kept[0]["machine"]["device"]
    with pytest.raises(ValueError, match="guessed"):
        records.write(tmp_path, "topic", "c", results={}, **(facts | dict(kind="guessed")))
    path = tmp_path / "topic.jsonl"
    path.write_text(path.read_text() + '{"id": \n')
    with pytest.raises(ValueError, match=r"topic\.jsonl:3"):
        records.read(tmp_path)


WRITE = """
import sys
from pathlib import Path
from hire.lab import records
records.machine, records.commit = dict, lambda: "0000000"
facts = dict(kind="measured", weights="none", setting={})
for number in range(200):
    id = f"{sys.argv[2]}/{number:03}"
    records.write(Path(sys.argv[1]), "topic", id, results=dict(x=number), **facts)
"""


def test_two_processes_that_write_records_lose_none(tmp_path, record_property):
    processes = [
        subprocess.Popen([sys.executable, "-c", WRITE, str(tmp_path), name]) for name in "ab"
    ]
    assert [process.wait() for process in processes] == [0, 0]
    kept = [entry["id"] for entry in records.read(tmp_path)]
    assert kept == [f"{name}/{number:03}" for name in "ab" for number in range(200)]
    record_property("kept", len(kept))  # to `make robustness`
    assert [path.name for path in tmp_path.iterdir()] == ["topic.jsonl"]


def test_a_record_that_is_not_as_written_is_refused(tmp_path):
    facts = dict(kind="measured", weights="none", setting={})
    for name in "ab":
        records.write(tmp_path, "topic", name, results=dict(x=name), **facts)
    assert [entry["results"]["x"] for entry in records.read(tmp_path)] == ["a", "b"]
    path = tmp_path / "topic.jsonl"
    written = path.read_text()
    path.write_text(written.replace('"x": "a"', '"x": "c"'))
    with pytest.raises(ValueError, match=r"topic\.jsonl:1"):
        records.read(tmp_path)
    path.write_text(written.replace(', "format": 2', "", 1))
    with pytest.raises(ValueError, match=r"topic\.jsonl:1.*migrate\.py"):
        records.read(tmp_path)
    with pytest.raises(ValueError, match="colour"):
        records.write(tmp_path, "other", "b", results=dict(x=2), colour="red", **facts)


def test_series_are_compared_within_their_tolerance():
    old = dict(series=dict(recall=[0.9, 1.0], ms=[1.0], gone=[1]))
    new = dict(
        series=dict(recall=[0.91, 1.0], ms=[1.4], come=[1]), tolerance=dict(default=0.02, ms=0.5)
    )
    assert figure_files.differences(old, new) == ["come", "gone"]
    assert figure_files.differences(old, new | dict(tolerance=dict(default=0.001, ms=0.5))) == [
        "come",
        "gone",
        "recall",
    ]


@pytest.mark.parametrize(
    "obtained, expected",
    [
        ([], "not tested"),
        ([("simulated", "CPU", True)], "not tested"),
        ([("measured", "CPU, 2 cores", True)], "effect shown on another device"),
        ([("measured", "CPU, 2 cores", False)], "not reproduced"),
        (
            [("measured", "CPU", True), ("compiler-estimate", "TPU v5e", True)],
            "consistent by compiler estimate",
        ),
        (
            [("compiler-estimate", "TPU v5e", True), ("measured", "TPU v5 lite", True)],
            "reproduced on TPU (measured)",
        ),
        ([("published", "TPU v5e", True)], "not tested"),
    ],
)
def test_only_a_measurement_on_a_tpu_reproduces(obtained, expected):
    rows = [
        dict(kind=kind, device=device, supports=supports) for kind, device, supports in obtained
    ]
    assert scorecard.verdict(rows) == expected


def test_the_scorecard_follows_its_schema():
    rows = scorecard.scorecard()
    schema = json.loads((figure_index.FIGURES / "scorecard.schema.json").read_text())
    jsonschema.validate(rows, schema)
    assert json.loads((figure_index.FIGURES / "scorecard.json").read_text()) == rows
    assert len({row["claim"] for row in rows}) == len(rows) == 13
    for row in rows:
        assert re.search(r"\d|half", row["criterion"])
        assert row["met"] == any(entry["supports"] for entry in row["obtained"])
        for entry in row["obtained"]:
            bounds = [value for value in (entry["low"], entry["high"]) if value is not None]
            assert bounds in ([], sorted(bounds)) and len(bounds) in (0, 2)
            assert not bounds or bounds[0] <= entry["value"] <= bounds[1]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate([rows[0] | dict(obtained=[])], schema)


@dataclasses.dataclass(frozen=True)
class ToyResult(Result):
    """One number, as a result of figure 01."""

    number: float
    weights: str = "none"
    tolerance = {"default": 0.1}

    def finding(self):
        return f"The number is {self.number}."

    def series(self):
        return {"number": [self.number]}

    def records(self):
        claim = Claim(self.number, "numbers", "exact", "toy", supports=True, low=0.0, high=9.0)
        return [Record("toy", "none", {}, dict(x=self.number), claims={"memory-bound": claim})]

    def plot(self):
        figure, axes = plots.new_figure(1, 1)
        plots.draw_line(axes[0, 0], [0, 1], [0, self.number], plots.BLUE)
        return figure


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Folders of the test for figures, records and everything below out/."""
    monkeypatch.setattr(study, "OUT", tmp_path / "out")
    monkeypatch.setattr(study, "FIGURES", tmp_path / "figures")
    monkeypatch.setattr(study, "RECORDS", tmp_path / "records")
    return tmp_path


@pytest.mark.parametrize(
    "profile, sizes, folder",
    [
        ("cpu", {}, ""),
        ("cpu", dict(new_tokens=None), ""),
        ("cpu", dict(new_tokens=3), "out/cpu-changed/"),
        ("smoke", {}, "out/smoke/"),
    ],
)
def test_only_the_committed_profile_writes_evidence(folders, capsys, profile, sizes, folder):
    run = Study("01", dict(profile=profile) | sizes)
    assert run.settings.new_tokens == (
        sizes.get("new_tokens") or figure_index.sizes_by_notebook(profile)[run.name]["new_tokens"]
    )
    run.publish(ToyResult(4.0))
    made = {path.relative_to(folders).as_posix() for path in folders.rglob("*.*")}
    figure, record = f"{folder}figures/01_bottleneck", f"{folder}records/01_bottleneck.jsonl"
    assert made == {f"{figure}.png", f"{figure}.json", record}
    (entry,) = records.read((folders / record).parent)
    assert (
        entry["claims"]["memory-bound"] | dict(value=4.0, figure="01", device=None)
        == (entry["claims"]["memory-bound"])
    )
    assert ("not to figures/" in capsys.readouterr().out) == bool(folder)


@pytest.mark.parametrize(
    "chosen, environment, backend, expected",
    [
        ("auto", None, "cpu", "cpu"),
        ("auto", None, "tpu", "tpu"),
        ("auto", "smoke", "tpu", "smoke"),
        ("cpu", "smoke", "tpu", "cpu"),
        ("tpu", "smoke", "tpu", "tpu"),
    ],
)
def test_auto_takes_the_profile_of_the_machine(monkeypatch, chosen, environment, backend, expected):
    monkeypatch.setattr(figure_index.jax, "default_backend", lambda: backend)
    monkeypatch.delenv(figure_index.PROFILE_VARIABLE, raising=False)
    if environment:
        monkeypatch.setenv(figure_index.PROFILE_VARIABLE, environment)
    assert figure_index.resolve_profile(chosen) == expected


def test_evidence_of_another_device_stays_out_of_the_committed_folders(folders, monkeypatch):
    monkeypatch.setattr(figure_index.jax, "default_backend", lambda: "tpu")
    assert not Study("01", dict(profile="cpu")).is_evidence
    assert not Study("01", dict(profile="tpu")).is_evidence


def test_a_target_is_met_missed_or_without_a_record(monkeypatch):
    targets = [
        dict(id="a", what="w", record="r", field="results.x.low", at_least=0.5),
        dict(id="b", what="w", record="r", field="results.x.low", at_most=0.5),
        dict(id="c", what="w", record="none", field="results.x", at_most=1),
    ]
    monkeypatch.setattr(scorecard, "load", lambda name: {"targets": targets})
    monkeypatch.setattr(
        records, "read", lambda: [dict(id="r", commit="0000000", results=dict(x=dict(low=0.7)))]
    )
    table, good = scorecard.verify()
    assert [line.split()[-1] for line in table.split("\n")[:1]] == ["met"] and not good
    assert "NOT MET: no reason stated" in table and "no record" in table
    assert "1 records made at 0000000, such as r; changed since: not in this history" in table
    for target in targets:
        target["reason"] = "too slow here"
    assert scorecard.verify()[1]


def test_answers_take_their_numbers_from_records(monkeypatch):
    question = dict(
        question="How much?",
        answer="Of {r|results.x.1|.1%}, not {none|results.y|.2f}.",
        notebooks=["01", "99"],
    )
    monkeypatch.setattr(pages, "load", lambda name: {"questions": [question]})
    monkeypatch.setattr(records, "read", lambda: [dict(id="r", results=dict(x=[1, 0.25]))])
    name = figure_index.figure_entry("01")["name"]
    answer = "Of 25.0%, not *not measured yet*."
    assert pages.answers() == [dict(question="How much?", answer=answer, notebooks=[name])]
    question["answer"] = "{r|results.x.7|.1f}"
    with pytest.raises(ValueError, match=r"'r'.*'results\.x\.7'"):
        pages.answers()


def test_the_ten_questions_are_answered_from_notebooks_of_the_index():
    questions = figure_index.load("questions")["questions"]
    assert len(questions) == 10
    for entry in questions:
        assert set(entry["notebooks"]) <= {
            figure["name"][:2] for figure in figure_index.load("index")["figures"]
        }
        assert "|" in entry["answer"]


def test_claims_of_the_index_exist_and_every_figure_has_its_number():
    entries = figure_index.load("index")["figures"]
    claims = {claim["id"] for claim in figure_index.load("claims")["claims"]}
    assert [entry["name"][:2] for entry in entries] == [f"{number:02}" for number in range(12)]
    assert [entry["name"] for entry in entries if not entry.get("figure", True)] == [
        "00_playground"
    ]
    assert claims >= {claim for entry in entries for claim in entry["claims"]}
    assert len(claims) == 13


def test_evidence_in_the_repository_is_whole():
    committed = records.read()
    # `make bench` appends, every other record takes the place of the one before
    names = [
        (entry["id"], entry["date"] if entry["command"] == "make bench" else "")
        for entry in committed
    ]
    assert len(set(names)) == len(names)
    for entry in committed:
        assert {
            "id",
            "kind",
            "weights",
            "setting",
            "results",
            "date",
            "commit",
            "machine",
            "command",
        } <= set(entry)
    for path in figure_index.FIGURES.glob("*_*.json"):
        shown = json.loads(path.read_text())
        assert shown["profile"] != "smoke" and shown["series"] and shown["finding"]
        pixels = plots.plt.imread(path.with_suffix(".png"))
        assert pixels.shape[1] >= 900 and (pixels[..., 3:] == 1).all(), (
            f"{path.stem}: expected README width, opaque for dark mode"
        )
    assert yaml.safe_load((figure_index.FIGURES / "targets.yaml").read_text())["targets"]

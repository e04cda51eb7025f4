"""Texts of every kind, and what figure 02 makes of a model's hidden states."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

import hire
from hire.lab.data import evaluation_text
from hire.lab.data.model_states import States
from hire.lab.studies import recall


def test_python_source_is_the_second_half_of_each_module():
    import pathlib
    import sysconfig

    texts = evaluation_text.evaluation_text("python", 10)
    folder = pathlib.Path(sysconfig.get_paths()["stdlib"])
    assert len(texts) == 10 == len({text.name for text in texts})
    for text in texts:
        source = (folder / text.name).read_text(encoding="utf-8", errors="replace")
        assert text.kind == "python" and source.endswith(text.text)
        assert 0 <= 2 * text.text.count("\n") - source.count("\n") <= 2
    assert texts == evaluation_text.evaluation_text("python", 10)


def test_a_dialogue_has_the_question_its_choices_and_the_right_answer(monkeypatch):
    sets = {
        name: [dict(question=f"{name} {i}?", choices=["yes", "no"], gold=i % 2) for i in range(3)]
        for name in evaluation_text.DIALOGUE_SETS
    }
    monkeypatch.setattr(evaluation_text, "questions", sets.__getitem__)
    first, second, third = evaluation_text.evaluation_text("dialogue", 3)
    assert first.text == "User: local_reclor 0?\nyes\nno\nAssistant: yes"
    assert second.text == "User: local_logiqa 0?\nyes\nno\nAssistant: yes"
    assert third.text == "User: local_reclor 1?\nyes\nno\nAssistant: no"


def test_other_kinds_are_those_of_the_corpus_or_refused():
    novel = evaluation_text.evaluation_text("novel", 2)
    assert [text.kind for text in novel] == ["novel"] * 2
    with pytest.raises(ValueError, match="poem"):
        evaluation_text.evaluation_text("poem", 2)


@pytest.fixture
def exact_estimator(rng):
    """Rows, an estimator that finds every row, and 150 documents of two queries."""
    rows = rng.normal(size=(64, 16)).astype(np.float32)
    x = rng.normal(size=(300, 16)).astype(np.float32)
    text = States(x, np.zeros(300, np.int32), np.repeat(np.arange(150), 2))
    return rows, hire.LowRank.fit(rows, 16), text


def test_promises_of_an_exact_estimator_need_no_more_candidates(exact_estimator):
    rows, estimator, text = exact_estimator
    settings = SimpleNamespace(k=4, promise_documents=100)
    promised = recall.promises(rows, estimator, text, settings)
    for name in ("betting, recall 95%", "bootstrap, recall 95%", "bootstrap, recall 99%"):
        assert promised[name] == dict(candidates=4.0, smallest=4, ratio=1.0, kept=1.0)
    # A hundred documents cannot promise 0.99 for every distribution: documents_needed(0.99, 0.95)
    # is more than 300.
    assert hire.tuning.documents_needed(0.99, 0.95) > 300
    assert promised["betting, recall 99%"]["candidates"] is None
    assert promised["betting, recall 99%"]["ratio"] is None


def test_promises_of_a_rough_estimator_cost_more_than_the_recall_needs(exact_estimator):
    rows, _, text = exact_estimator
    estimator = hire.LowRank.fit(rows, 10)
    settings = SimpleNamespace(k=4, promise_documents=100)
    promised = recall.promises(rows, estimator, text, settings)
    betting, bootstrap = (promised[f"{name}, recall 95%"] for name in ("betting", "bootstrap"))
    assert betting["smallest"] == bootstrap["smallest"] > 4
    assert betting["ratio"] > bootstrap["ratio"] >= 1
    assert betting["kept"] == 1


def test_a_family_is_all_its_ranks():
    curves = {
        "Q int8": dict(bytes=[0.2, 0.3], recall=[0.8, 0.9]),
        "LR plain, rank 8": dict(bytes=[0.1], recall=[0.5]),
        "LR plain, rank 16": dict(bytes=[0.15], recall=[0.6]),
    }
    assert recall.families(curves) == {
        "Q int8": [(0.2, 0.8), (0.3, 0.9)],
        "LR plain": [(0.1, 0.5), (0.15, 0.6)],
    }


def test_a_result_names_the_weights_of_all_models():
    empty = recall.ModelRecall("a", {}, {}, {}, {}, {}, 0)
    models = {"one": empty, "two": dataclasses.replace(empty, weights="b"), "three": empty}
    assert recall.RecallResult(SimpleNamespace(), models, {}).weights == "a; b"

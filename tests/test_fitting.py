"""Fitting and judging the search of an LM head, on rows whose answer is known."""

import jax.numpy as jnp
import numpy as np
import pytest

import hire
from hire.fitting import true_tokens
from hire.tuning import betting_lower_bound, bootstrap_lower_bound, documents_for


@pytest.fixture(scope="module")
def head():
    """Rows and states of 300 documents: states of one document are alike, most of a few kinds."""
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(16, 64)) * np.geomspace(8, 0.2, 16)[:, None]
    rows = jnp.asarray(rng.normal(size=(4000, 64)) / 8, jnp.float32)
    topics = rng.normal(size=(300, 16))
    documents = np.repeat(np.arange(300), 5)
    states = (topics[documents] + 0.5 * rng.normal(size=(1500, 16))) @ mixing
    return rows, states.astype(np.float32), documents


def test_it_chooses_what_reads_least_and_keeps_its_promise(head):
    rows, states, documents = head
    seen, unseen = documents < 250, documents >= 250
    fitted = hire.fit_softmax(
        rows, states[seen], documents=documents[seen], k=8, recall=0.95, bound="bootstrap"
    )
    costs = {name: cost for name, (_, cost) in fitted.tuned.choices.items()}
    assert fitted.tuned.name == min(costs, key=costs.get) and fitted.bytes_fraction < 0.3
    assert {name.split()[0] for name in costs} == {"Q", "LR"} and len(costs) >= 4
    judged = hire.evaluate(fitted.softmax, states[unseen], documents=documents[unseen])
    assert judged.recall.low <= judged.recall.mean <= judged.recall.high
    assert judged.recall.high >= 0.95 and (judged.queries, judged.documents) == (250, 50)
    assert judged.bytes_fraction == pytest.approx(fitted.bytes_fraction)
    summary = fitted.summary()
    assert fitted.tuned.name in summary.splitlines()[-1] and len(summary.splitlines()) > 4


def test_evaluation_by_hand():
    rows = jnp.asarray([[4.0], [3.0], [2.0], [1.0]])
    # The estimator ranks the rows the other way round: of the best two it nominates none or one.
    wrong = hire.Quantized.fit(rows, 8)
    wrong = type(wrong)(-wrong.codes, wrong.scale, 8, 1)
    for candidates, recall in ((2, 0.0), (3, 0.5), (4, 1.0)):
        softmax = hire.HireSoftmax(rows, wrong, k=2, candidates=candidates)
        judged = hire.evaluate(softmax, np.ones((6, 1), np.float32), documents=[0, 0, 1, 1, 2, 2])
        assert judged.recall == (recall, recall, recall)
        assert judged.top1 == ((1.0,) * 3 if candidates == 4 else (0.0,) * 3)
        assert (judged.queries, judged.documents) == (6, 3)


def test_a_bias_is_part_of_fit_and_judgement(head):
    rows, states, documents = head
    bias = jnp.asarray(np.random.default_rng(1).normal(size=4000) * 3, jnp.float32)
    fitted = hire.fit_softmax(
        rows, states, documents=documents, k=8, recall=0.9, bound="bootstrap", bias=bias
    )
    logits = states[:20] @ np.asarray(rows).T + np.asarray(bias)
    true = np.asarray(true_tokens(fitted.softmax, states[:20]))
    assert (np.sort(true) == np.sort(np.argsort(-logits, axis=1)[:, :8])).all()
    assert hire.evaluate(fitted.softmax, states, documents=documents).recall.mean >= 0.88


def test_it_says_when_nothing_is_saved(head):
    rows, states, documents = head
    with pytest.warns(UserWarning, match="reads .* of the rows' bytes"):  # 32 of 60 rows
        hire.fit_softmax(rows[:60], states, documents=documents, recall=0.9, bound="bootstrap")


def test_bounds_by_hand():
    values = np.asarray([1.0] * 97 + [0.5] * 3)
    low = bootstrap_lower_bound(values, 0.95)
    # The mean is 0.985 with a standard error of 0.0085.
    assert 0.965 < low < 0.98 and betting_lower_bound(values, 0.95) < low
    assert bootstrap_lower_bound(np.ones(5), 0.95) == 1.0
    needed = documents_for(values, 0.95, 0.95)
    assert betting_lower_bound(np.tile(values, -(-needed // 100)), 0.95) >= 0.95
    assert betting_lower_bound(np.tile(values, needed // 100 // 2 or 1), 0.95) < 0.95
    assert documents_for(values, 0.99, 0.95) is None


def test_what_cannot_be_fitted_is_named(head, unchecked):
    rows, states, documents = head
    with pytest.raises(ValueError, match="rows.T"):
        hire.fit_softmax(rows.T, states, documents=documents)
    with pytest.raises(ValueError, match="1 documents"):
        hire.fit_softmax(rows, states, documents=np.zeros(1500, int))
    with pytest.raises(ValueError, match="finite"):
        hire.fit_softmax(rows, np.where(states == states[3, 3], np.nan, states))
    with pytest.raises(ValueError, match="bound = 'hoeffding'"):
        hire.fit_softmax(rows, states, documents=documents, bound="hoeffding")
    softmax = hire.HireSoftmax(rows, hire.Quantized.fit(rows, 8), k=4, candidates=64)
    with pytest.raises(ValueError, match="finite"):
        hire.evaluate(softmax, np.full((2, 64), np.nan, np.float32))

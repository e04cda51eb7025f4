"""What the lab says of sparse layers: their sets, their search, and the dense layers that they are
timed against.
"""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hire
from hire.lab.data import model_states
from hire.lab.data.text import beginnings, documents
from hire.lab.metrics import group_sparsity, model_quality
from hire.lab.paths import CHECKPOINTS, ROOT
from hire.lab.studies import trained_sparsity
from hire.lab.timing import layer_timing
from hire.lab.training import plans, trainer
from hire.models import TextModel
from hire.models.tokenizer import byte_tokenizer
from hire.timing import interleaved


@pytest.fixture(scope="module")
def studied():
    with jax.numpy_dtype_promotion("standard"):  # optax promotes types by itself
        texts = beginnings(documents("evaluation", plans.KINDS)[::40], 400)
        return trained_sparsity.Studied.of("groups8", texts, toy=True, length=32, count=8)


def int8(layer, rows):
    return hire.Quantized.fit(rows, 8)


def test_the_sets_are_those_that_the_model_keeps(studied, rng):
    model, config = studied.model, studied.model.config
    windows = rng.integers(3, 500, (3, 16)).astype(np.int32)
    sets = group_sparsity.sets_kept(model, windows)
    assert sets.shape == (2, 3, 16, config.groups) and sets.sum(-1).max() == config.groups_kept(0)
    ffn, x = model.blocks[1].ffn, jnp.asarray(group_sparsity.ffn_inputs(model, windows)[1][2])
    alone = hire.group_scores(ffn.activations(x), 8)
    order = np.argsort(-np.asarray(alone), axis=1)[:, : config.groups_kept(0)]
    assert all(sets[1, 2, token, groups].all() for token, groups in enumerate(order))
    silenced = (
        jnp.where(jnp.repeat(jnp.asarray(sets[1, 2]), 8, axis=1), ffn.activations(x), 0)
        @ ffn.down[...]
    )
    np.testing.assert_allclose(ffn(x), silenced, atol=1e-4)


def test_unions_and_lags_by_hand():
    sets = np.zeros((1, 1, 4, 4), bool)
    sets[0, 0, [0, 1, 2, 3], [0, 0, 1, 2]] = True
    assert group_sparsity.unions(sets, [1, 2, 3, 4]) == [0.25, 0.375, 0.5, 0.75]
    assert group_sparsity.predicted_by_earlier(sets, [1, 2]) == [pytest.approx(1 / 3), 0.0]


def states(subject, windows, ffns=None, **options):
    model = subject.model if ffns is None else hire.convert(subject.model, ffn=ffns, **options)
    return model_states.hidden_states(model)(windows)


def test_with_every_group_a_candidate_nothing_is_lost(studied, rng):
    subject, windows = studied.subject, rng.integers(3, 500, (3, 16)).astype(np.int32)
    exact, complete = states(subject, windows), studied.searched(int8, 1.0)
    np.testing.assert_allclose(states(subject, windows, complete), exact, atol=1e-4)
    shared = studied.searched(int8, 1.0, share_selection=True)
    np.testing.assert_allclose(
        states(subject, windows, shared, tokens_per_selection=8), exact, atol=1e-4
    )
    few = studied.searched(studied.low_rank(4), 0.1)
    assert np.abs(states(subject, windows, few) - exact).max() > 0.1
    judged = studied.loss_difference(complete)
    assert judged["mean"] == pytest.approx(0.0, abs=1e-6) and judged["documents"] == len(
        studied.texts
    )
    assert (
        studied.loss_difference(few)["bytes"] == group_sparsity.bytes_share(few) < judged["bytes"]
    )


def test_a_shared_selection_serves_different_texts(studied, rng):
    one = rng.integers(3, 500, (1, 16)).astype(np.int32)
    shared = studied.searched(int8, 0.1, share_selection=True)
    alone = hire.convert(studied.model, ffn=studied.searched(int8, 0.1))
    across = hire.convert(studied.model, ffn=shared, tokens_per_selection=4)
    for block in across.blocks:
        block.ffn = trained_sparsity.Across(block.ffn)
    same, other = (
        np.repeat(one, 4, axis=0),
        np.concatenate([one, rng.integers(3, 500, (3, 16))]).astype(np.int32),
    )
    expected = model_states.hidden_states(alone)(one)[
        0
    ]  # four texts that are one want what one wants
    np.testing.assert_allclose(
        model_states.hidden_states(across)(same), np.repeat(expected[None], 4, axis=0), atol=1e-4
    )
    assert np.abs(model_states.hidden_states(across)(other)[0] - expected).max() > 0.1
    judged = studied.loss_difference(shared, tokens_per_selection=4, across=True)
    assert judged["mean"] != studied.loss_difference(shared, tokens_per_selection=4)["mean"]


def test_recall_grows_with_candidates_and_bits(studied):
    coarse, fine = (
        studied.curve(studied.low_rank(4), [0.1, 0.3, 1.0]),
        studied.curve(int8, [0.1, 0.3, 1.0]),
    )
    low, middle, high = coarse["recall"]
    assert low < middle < high == 1.0 and fine["recall"][0] > 0.9 > low
    assert coarse["bytes"] < fine["bytes"] and np.all(np.diff(fine["bytes"]) > 0)


@pytest.mark.parametrize("batch", [1, 3])
def test_every_timed_layer_is_the_same_layer(rng, batch):
    shares = {
        "all": (1.0, 1.0, 0.0, False),
        "common": (1.0, 0.75, 0.25, False),
        "shared": (1.0, 1.0, 0.0, True),
    }
    searched = layer_timing.random_ffns(2, 256, 32, 8, shares)
    x = rng.normal(size=(batch, 32)).astype(np.float32)
    expected = x
    for layer in searched["all"]:
        expected = expected + np.maximum(expected @ np.asarray(layer.up).T, 0) @ np.asarray(
            layer.down
        )
        expected = expected / np.sqrt(np.mean(expected**2, axis=1, keepdims=True))
    functions = layer_timing.dense_ffns(searched["all"])
    functions |= {
        name: layer_timing.through(lambda ffn, x: ffn(x), ffns) for name, ffns in searched.items()
    }
    for name, function in functions.items():
        np.testing.assert_allclose(function(x), expected, atol=1e-3, err_msg=name)
    timed = interleaved(layer_timing.ffn_forms(searched), [x] * 3, 3)
    assert {len(seconds) for seconds in timed.values()} == {3} and "stream" in timed
    lines = layer_timing.over_batches({batch: timed}, shares)
    assert lines["fastest dense"][0] == pytest.approx(
        lines["all"][0] * layer_timing.speedups_by_batch({batch: timed}, "all")[batch]
    )


def test_a_gated_model_is_searched_by_its_gate(tiny):
    subject, texts = (
        TextModel(tiny, byte_tokenizer(), "random weights"),
        beginnings(documents("evaluation", ["novel"])[:1], 300),
    )
    exact = model_quality.score_documents(subject, texts).nats
    for both in (None, int8):
        complete = group_sparsity.searched(
            subject.model, int8, kept_fraction=1.0, candidates=1.0, group_size=8, up_copy=both
        )
        np.testing.assert_allclose(
            trained_sparsity.scores_with(subject, texts, complete).nats, exact, rtol=1e-5
        )
    some = group_sparsity.searched(
        subject.model, int8, kept_fraction=0.25, candidates=0.5, group_size=8
    )
    assert np.abs(trained_sparsity.scores_with(subject, texts, some).nats / exact - 1).max() > 1e-4


def trained(name):
    there = (CHECKPOINTS / f"{name}.safetensors").exists()
    return pytest.param(
        name, marks=pytest.mark.skipif(not there, reason=f"{name} is still to be trained")
    )


@pytest.mark.parametrize("name", [trained(name) for name in plans.SHIPPED])
def test_a_shipped_model_is_what_its_record_says(name):
    path = CHECKPOINTS / f"{name}.safetensors"
    subject = trainer.trained_model(name)
    config = subject.model.config
    assert config == plans.MODELS[name]
    assert (
        path.stat().st_size <= 2 * sum(config.parameters().values()) + 45 * config.vocabulary
    )  # bfloat16, and a tokenizer
    results = trainer.outcomes([name])[name]
    scores = model_quality.score_documents(subject, trainer.texts_judged()[:2])
    np.testing.assert_allclose(scores.nats, results["nats"][:2], rtol=1e-3)


@pytest.mark.parametrize("name", [trained("groups8")])
def test_the_readme_searches_a_shipped_model(monkeypatch, name):
    _, _, code, _ = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    monkeypatch.chdir(ROOT)
    given = dict(hire=hire)
    exec(code, given)
    subject, texts = trainer.trained_model(name), trainer.texts_judged()[-2:]
    exact, searched = (
        model_quality.score_documents(replace(subject, model=given[name]), texts).summary()["loss"]
        for name in ("sparse", "fast")
    )
    assert searched == pytest.approx(exact, rel=0.01)

"""The functions of notebook 00, on a tiny model."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

import hire
from hire.lab.studies import playground
from hire.models import load

K, CANDIDATES = 8, 16


@pytest.fixture(scope="module")
def subject():
    return load("tiny")


@pytest.fixture(scope="module")
def hidden(subject):
    return playground.sentence_states(subject, "A cat and a dog.")


@pytest.fixture(scope="module")
def softmax(subject, hidden):
    rows = subject.model.head_rows()
    estimator = hire.LowRank.fit(rows, 8, calibration=hidden, bits=8)
    return hire.HireSoftmax(rows, estimator, K, CANDIDATES)


def test_the_states_are_those_of_each_token(subject, hidden):
    tokens = subject.tokens("A cat and a dog.")
    assert hidden.shape == (len(tokens), subject.model.config.width)
    with pytest.raises(ValueError, match="''"):
        playground.sentence_states(replace(subject, first_token=None), "")


def test_missed_tokens_are_those_that_are_not_returned(subject, softmax, hidden):
    best = playground.best_tokens(subject, softmax, hidden[-1])
    exact = np.asarray(hidden[-1] @ np.asarray(softmax.rows).T)
    tokens = np.argsort(-exact)[:K]
    returned = np.isin(tokens, np.asarray(softmax(hidden[-1:]).indices[0]))
    assert 0 < returned.sum() < K  # some are missed, some are not
    assert (best["search"] == "returned").tolist() == returned.tolist()
    assert (best["rank by the estimate"] <= CANDIDATES).tolist() == returned.tolist()
    np.testing.assert_allclose(best["exact logit"], exact[tokens], atol=0.01)
    needed = int(best["rank by the estimate"].max())
    more = hire.HireSoftmax(softmax.rows, softmax.estimator, K, needed)
    assert set(np.asarray(more(hidden[-1:]).indices[0])) == set(tokens)
    line = playground.missed_line(best, softmax)
    assert f"{(~returned).sum()} of the {K}" in line and f"{needed} candidates" in line


def test_more_candidates_find_more_and_read_more(softmax, hidden):
    table = playground.judge_candidates(softmax, {"low rank": softmax.estimator}, hidden)
    assert table.index.tolist() == [32, 64, 128, 256, 512]  # the vocabulary has 512 tokens
    recalls, shares = (
        table[f"low rank: {column}"].str.rstrip("%").astype(float) for column in ("recall", "bytes")
    )
    assert recalls.is_monotonic_increasing and recalls.iloc[-1] == 100
    assert shares.is_monotonic_increasing


def test_the_first_difference_is_marked_once(subject):
    prompt = subject.tokens("A cat")
    dense, other = (
        np.concatenate([prompt, subject.tokens(text)[1:]]) for text in ("abcdefg", "abcdeXg")
    )
    texts = {"dense": jnp.asarray(dense), "same": dense, "other": other}
    table = playground.side_by_side(subject, prompt, texts)
    assert table.index.tolist() == [1, 6]
    assert table["dense"].tolist() == table["same"].tolist() == ["abcde", "fg"]
    assert table["other"].tolist() == ["abcde", "▶X◀g"]
    same, different = playground.difference_lines(prompt, texts).split("\n")
    assert "same 7 tokens" in same and "token 6 " in different


def test_bytes_are_those_of_the_parts(subject, softmax):
    table = playground.bytes_table(subject, softmax)
    head = subject.model.head_rows().nbytes
    assert table.loc["dense", "LM head"] == f"{head / 1e6:.1f} MB"
    assert table.loc["searched", "share of the LM head"] == f"{softmax.bytes_read() / head:.1%}"
    assert len(set(table["other layers"])) == 1

"""Heads as they are: bias, soft cap, masks, logit biases and penalties, by hand and against all
rows.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hire
from hire.distributed import RowSharding
from hire.layers.logit_adjustments import count_tokens

V, D = 400, 12


def by_hand(logits, mask=None, bias=None, tokens=None, repetition=1.0, presence=0.0, frequency=0.0):
    """The logits of one query after all adjustments, token by token."""
    result = np.asarray(logits, np.float64).copy()
    for token in set([] if tokens is None else tokens) - {-1}:
        value = result[token]
        value = value / repetition if value > 0 else value * repetition
        result[token] = value - presence - frequency * list(tokens).count(token)
    if bias is not None:
        result = result + bias
    if mask is not None:
        result = np.where(mask, result, -np.inf)
    return result


def test_penalties_by_hand():
    # rows 0 to 3 have the logits 4, 2, -1, 3; token 0 occurs twice, token 2 once
    softmax = hire.HireSoftmax(
        jnp.asarray([[4.0], [2.0], [-1.0], [3.0]]),
        hire.Quantized.fit(jnp.asarray([[4.0], [2.0], [-1.0], [3.0]]), 8),
        k=4,
        candidates=4,
    )
    seen = jnp.asarray([[0, 2, 0, -1]])
    top = softmax(jnp.ones((1, 1)), penalties=hire.Penalties(seen, 2.0, 0.5, 0.25))
    # 4 / 2 - 0.5 - 2 * 0.25 = 1 and -1 * 2 - 0.5 - 0.25 = -2.75
    assert top.indices.tolist() == [[3, 1, 0, 2]]
    assert top.values.tolist() == [[3.0, 2.0, 1.0, -2.75]]
    rewarded = softmax(jnp.ones((1, 1)), penalties=hire.Penalties(seen, presence=-3.0))
    assert rewarded.indices.tolist() == [[0, 3, 1, 2]] and rewarded.values[0, 0] == 7.0


def test_tokens_are_counted_by_hand():
    tokens, is_first, counts = count_tokens(jnp.asarray([[7, -1, 3, 7, 7, -1]]))
    assert tokens.tolist() == [[-1, -1, 3, 7, 7, 7]]
    assert is_first.tolist() == [[False, False, True, True, False, False]]
    assert counts.tolist()[0][2:] == [1, 3, 3, 3]


@pytest.fixture(scope="module")
def head():
    rng = np.random.default_rng(3)
    rows = jnp.asarray(rng.normal(size=(V, D)), jnp.float32)
    return rows, jnp.asarray(rng.normal(size=V), jnp.float32)


@settings(max_examples=25)
@given(
    b=st.sampled_from([1, 3]),
    has_bias=st.booleans(),
    soft_cap=st.sampled_from([0.0, 2.0]),
    allowed=st.sampled_from([None, 7, 60, V - 5]),
    has_logit_bias=st.booleans(),
    num_seen=st.sampled_from([0, 1, 30]),
    repetition=st.sampled_from([1.0, 1.3, 0.5]),
    presence=st.sampled_from([0.0, 1.5, -2.0]),
    shards=st.sampled_from([0, 4]),
    seed=st.integers(0, 2**31),
)
def test_candidates_values_and_normaliser_are_those_of_all_rows(
    head, b, has_bias, soft_cap, allowed, has_logit_bias, num_seen, repetition, presence, shards,
    seed,
):  # fmt: skip
    rng, (rows, bias) = np.random.default_rng(seed), head
    x = jnp.asarray(rng.normal(size=(b, D)), jnp.float32)
    k = 5
    softmax = hire.HireSoftmax(
        rows,
        hire.Quantized.fit(rows, 8),
        k=k,
        candidates=64,
        bias=bias if has_bias else None,
        soft_cap=soft_cap,
    )
    logits = np.asarray(x @ rows.T, np.float64) + (np.asarray(bias) if has_bias else 0)
    logits = soft_cap * np.tanh(logits / soft_cap) if soft_cap else logits
    given_, expected = {}, dict(repetition=repetition, presence=presence, frequency=0.1)
    per_query = [dict() for _ in range(b)]
    if allowed is not None:
        mask = np.zeros((b, V), bool)
        for row in mask:  # a contiguous range and single tokens: buckets would lose them
            row[rng.permutation(V)[:allowed]] = True
        given_["mask"] = jnp.asarray(mask)
        for query in range(b):
            per_query[query]["mask"] = mask[query]
    if has_logit_bias:
        added = rng.normal(size=V).astype(np.float32) * 3
        given_["logit_bias"] = jnp.asarray(added)
        for query in range(b):
            per_query[query]["bias"] = added
    if num_seen:
        seen = rng.integers(-1, V, (b, num_seen))
        given_["penalties"] = hire.Penalties(jnp.asarray(seen), **expected)
        for query in range(b):
            per_query[query] |= dict(tokens=seen[query].tolist(), **expected)
    exact = np.stack([by_hand(logits[query], **per_query[query]) for query in range(b)])

    def check(softmax):
        top = softmax(x, **given_)
        result = softmax.top_k_with_normalizer(x, **given_)
        order = np.argsort(-exact, axis=1)[:, :k]
        np.testing.assert_allclose(top.values, np.take_along_axis(exact, order, axis=1), atol=1e-4)
        found = np.take_along_axis(exact, np.asarray(top.indices), axis=1)
        np.testing.assert_allclose(top.values, found, atol=1e-4)
        np.testing.assert_allclose(result.top.values, top.values, atol=1e-4)
        total = np.log(np.exp(exact).sum(axis=1))
        np.testing.assert_allclose(result.log_normalizer, total, atol=2e-2)

    if shards:
        with jax.set_mesh(jax.make_mesh((shards,), ("chips",))):
            check(softmax.sharded(RowSharding("chips", float("inf"), interleaved=bool(seed % 2))))
    else:
        check(softmax)


def test_padding_of_penalised_tokens_takes_no_token_from_the_normaliser():
    rows = jnp.asarray([[1.0], [1.1], [1.2], [1.05]])
    softmax = hire.HireSoftmax(rows, hire.Quantized.fit(rows, 8), k=1, candidates=1)
    penalties = hire.Penalties(jnp.asarray([[-1, 99]]), 2.0)
    result = softmax.top_k_with_normalizer(jnp.ones((1, 1)), penalties=penalties)
    expected = np.log(np.exp(np.asarray(rows, np.float64)).sum())
    assert result.log_normalizer[0] == pytest.approx(expected, abs=1e-2)
    assert result.top.indices.tolist() == [[2]]


def test_log_probabilities_after_a_mask_sum_to_one(head):
    rows, bias = head
    softmax = hire.HireSoftmax(
        rows, hire.Quantized.fit(rows, 8), k=5, candidates=V, bias=bias, soft_cap=4.0
    )
    mask = jnp.arange(V) % 3 == 0
    every = jnp.arange(V)[None]
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, D)), jnp.float32)
    logs = softmax.log_probabilities(x, every, mask=mask)
    assert (logs[0][~mask] == -jnp.inf).all()
    assert jnp.exp(logs).sum() == pytest.approx(1, abs=1e-4)


def test_leading_axes_share_or_have_their_adjustments(head):
    rows, _ = head
    softmax = hire.HireSoftmax(rows, hire.Quantized.fit(rows, 8), k=3, candidates=64)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 3, D)), jnp.float32)
    mask = jnp.asarray(rng.random((2, 3, V)) < 0.5)
    seen = jnp.asarray(rng.integers(0, V, (2, 3, 9)))
    top = softmax(x, mask=mask, penalties=hire.Penalties(seen, jnp.full((2, 3), 1.5)))
    for place in np.ndindex(2, 3):
        alone = softmax(x[place], mask=mask[place], penalties=hire.Penalties(seen[place], 1.5))
        assert top.indices[place].tolist() == alone.indices.tolist()
        np.testing.assert_allclose(top.values[place], alone.values, rtol=1e-6)
    assert softmax(x[:0], mask=mask[0, 0]).indices.shape == (0, 3, 3)


def test_adjustments_may_be_traced(head):
    rows, _ = head
    softmax = hire.HireSoftmax(rows, hire.Quantized.fit(rows, 8), k=3, candidates=64)
    x = jnp.ones((1, D))

    @jax.jit
    def call(softmax, x, mask, repetition):
        penalties = hire.Penalties(jnp.asarray([[1, 2]]), repetition)
        return softmax(x, mask=mask, penalties=penalties)

    mask = jnp.arange(V) < 50
    assert (call(softmax, x, mask, 1.5).indices < 50).all()
    slope = jax.grad(lambda x: softmax(x, mask=mask).values.sum())(x)
    best = softmax(x, mask=mask).indices[0]
    np.testing.assert_allclose(slope[0], rows[best].sum(0), rtol=1e-4)


def test_adjustments_that_cannot_be_are_refused(head, unchecked):
    rows, bias = head
    softmax = hire.HireSoftmax(rows, hire.Quantized.fit(rows, 8), k=3, candidates=64)
    x = jnp.ones((2, D))
    for name, value in {"mask": jnp.zeros(V, bool), "logit_bias": jnp.full(V, jnp.nan)}.items():
        with pytest.raises(ValueError, match=name):
            softmax(x, **{name: value})
    with pytest.raises(ValueError, match="mask of shape"):
        softmax(x, mask=jnp.ones(V - 1, bool))
    with pytest.raises(ValueError, match="mask of type"):
        softmax(x, mask=jnp.ones(V))
    with pytest.raises(ValueError, match="logit_bias of type"):
        softmax(x, logit_bias=jnp.ones(V, int))
    for setting in (dict(repetition=0.0), dict(repetition=-1.0), dict(presence=jnp.inf)):
        (name,) = setting
        with pytest.raises(ValueError, match=name):
            hire.Penalties(jnp.asarray([[1]]), **setting)
    with pytest.raises(ValueError, match="integers"):
        hire.Penalties(jnp.asarray([[1.0]]))
    for wrong in (bias[:-1], bias.astype(int), bias.at[3].set(jnp.nan)):
        with pytest.raises(ValueError, match="bias"):
            dataclasses.replace(softmax, bias=wrong)
    with pytest.raises(ValueError, match="soft_cap = -1"):
        dataclasses.replace(softmax, soft_cap=-1.0)
    with pytest.raises(ValueError, match="implementation = 'cpu'"):
        dataclasses.replace(softmax, implementation="cpu", bias=bias)(x)

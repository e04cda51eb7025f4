"""A certificate is never wrong: against float64, on rows made to deceive it; and what it grants on real weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import hire
from hire.certify import certified_top_k, top_upper_bounds as nominated

AS_SHIPPED = dict(xla_backend_optimization_level=3, xla_cpu_use_fusion_emitters=True)  # a proof is about how sums are rounded


def search(x, rows, copy, k, candidates, **how):
    prove = jax.jit(lambda *parts: certified_top_k(*parts, k=k, candidates=candidates, **how), compiler_options=AS_SHIPPED)
    return prove(x, rows, copy)


def true_scores(x, rows) -> np.ndarray:
    return np.asarray(x, np.float64) @ np.asarray(rows, np.float64).T


def holds(found, x, rows, k) -> np.ndarray:
    """Whether no missing row scores above one that is there, in float64."""
    scores = true_scores(x, rows)
    there = np.zeros(scores.shape, bool)
    np.put_along_axis(there, np.asarray(found.top.indices), True, axis=1)
    return np.where(there, scores, np.inf).min(1) >= np.where(there, -np.inf, scores).max(1)


def test_by_hand():
    rows = jnp.asarray([[4.0, 0.0], [3.0, 1.0], [1.0, 2.6], [0.0, 1.0]])
    copy = hire.Quantized.fit(rows, 4)  # steps of 1/7 of a row's largest: (3, 1) is kept as 3, 6/7 and (1, 2.6) as 7.8/7, 2.6
    np.testing.assert_allclose(copy.error_bounds, [0, 1 / 7, 0.8 / 7, 0], atol=1e-4)
    found = search(jnp.asarray([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]), rows, copy, 1, 1)
    # 4 against 3 + 1/7; 2.6 against 1; 4, 4 and 3.6: a tie that the estimates cannot settle
    assert found.proved.tolist() == [True, True, False]
    assert found.top.indices[:2].tolist() == [[0], [2]]


@given(st.integers(0, 10**6), st.sampled_from(["near", "duplicates", "outliers", "huge", "tiny"]), st.sampled_from([4, 8, "rank"]))
def test_a_certificate_is_never_wrong(seed, trap, kind):
    rng = np.random.default_rng(seed)
    m, d, k = 192, 24, 4
    rows = rng.normal(size=(m, d))
    if trap == "near":  # rows that differ by about as much as a copy leaves out, or less
        rows = rng.normal(size=(1, d)) + rng.normal(size=(m, d)) * 10.0 ** rng.uniform(-7, -1, (m, 1))
    if trap == "duplicates":
        rows = rows[rng.integers(0, m // 4, m)]
    if trap == "outliers":
        rows[rng.integers(0, m, 20), rng.integers(0, d, 20)] *= 1e4
    rows = jnp.asarray(rows * dict(huge=1e8, tiny=1e-8).get(trap, 1.0), jnp.float32)
    copy = hire.LowRank.fit(rows, 20, bits=8) if kind == "rank" else hire.Quantized.fit(rows, kind)
    x = jnp.asarray(rng.normal(size=(16, d)), jnp.float32)
    found = search(x, rows, copy, k, 32)
    assert np.all(holds(found, x, rows, k) | ~np.asarray(found.proved))


@given(st.integers(1, 700), st.integers(1, 700), st.sampled_from(["normal", "equal", "infinite"]), st.integers(0, 10**6))
def test_no_other_row_reaches_above_what_is_said(m, candidates, kind, seed):
    """Of whichever rows are nominated, in whatever blocks they lie; with every row nominated there is no other."""
    candidates = min(m, candidates)
    reached = np.random.default_rng(seed).normal(size=(3, m)).astype(np.float32)
    if kind != "normal":
        reached[:, ::2] = 1.0 if kind == "equal" else -np.inf
    chosen, others = map(np.asarray, nominated(jnp.asarray(reached), candidates))
    assert all(len(set(row)) == candidates for row in chosen.tolist())
    np.put_along_axis(reached, chosen, -np.inf, 1)
    assert (reached.max(1) <= others).all()
    if candidates == m:
        assert (others == -np.inf).all()


def test_most_are_granted_where_scores_lie_apart(rng):
    rows = jnp.asarray(rng.normal(size=(4096, 64)) * rng.uniform(0.1, 3, (4096, 1)), jnp.float32)
    x = jnp.asarray(rng.normal(size=(64, 64)), jnp.float32)
    found = search(x, rows, hire.Quantized.fit(rows, 8), 4, 64)
    assert found.proved.mean() > 0.9 and holds(found, x, rows, 4).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_with_the_fallback_it_is_always_the_dense_answer(rng, dtype):
    rows = jnp.asarray(rng.normal(size=(512, 16)), dtype)
    x = jnp.asarray(rng.normal(size=(8, 16)), dtype)
    found = search(x, rows, hire.LowRank.fit(rows, 2), 4, 8, dense_fallback=True)
    assert not found.proved.all()  # so little of the rows proves little
    assert hire.recall(found.top.indices, true_scores(x, rows).astype(np.float32), 4).min() == 1


def test_queries_that_are_no_numbers_prove_nothing(rng):
    rows = jnp.asarray(rng.normal(size=(64, 8)), jnp.float32)
    x = jnp.asarray([[np.nan] * 8, [np.inf] * 8], jnp.float32)
    assert not search(x, rows, hire.Quantized.fit(rows, 8), 2, 8).proved.any()

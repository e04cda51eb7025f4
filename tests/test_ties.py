"""Ties at the k-th place: of equal scores the lower index comes first, as in jax.lax.top_k."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hire
from hire.distributed import RowSharding
from hire.layers.logit_adjustments import adjust_all, checked_adjustments
from hire.ops.soft_cap import cap_softly
from hire.ops.top_k import top_k_with_indices
from hire.search import rerank

SEEDS = st.integers(0, 2**31)


def repeated_rows(rng, m: int, d: int = 4) -> jax.Array:
    """Rows of small integers, each several times: their scores are exact, and many are equal."""
    distinct = rng.integers(-3, 4, (max(1, m // 6), d))
    return jnp.asarray(distinct[rng.integers(0, len(distinct), m)], jnp.float32)


def integer_queries(rng, b: int, d: int = 4) -> jax.Array:
    return jnp.asarray(rng.integers(-2, 3, (b, d)), jnp.float32)


def check_same(top: hire.TopK, scores: jax.Array, k: int):
    expected_values, expected = jax.lax.top_k(scores, k)
    np.testing.assert_array_equal(top.indices, expected)
    np.testing.assert_allclose(top.values, expected_values, rtol=1e-6)


@given(st.integers(1, 300), st.sampled_from([(), (1,), (3,)]), SEEDS, st.data())
def test_of_scores_in_any_order(c, batch, seed, data):
    rng = np.random.default_rng(seed)
    k = data.draw(st.integers(1, c))
    values = np.asarray([-math.inf, -1.0, -0.0, 0.0, 1.0, math.inf], np.float32)
    scores = values[rng.integers(0, 6, (*batch, c))]
    indices = rng.permuted(np.broadcast_to(np.arange(c, dtype=np.int32), (*batch, c)), axis=-1)
    ordered = np.empty_like(scores)
    np.put_along_axis(ordered, indices, scores, axis=-1)
    check_same(hire.exact_top_k(jnp.asarray(ordered), k), jnp.asarray(ordered), k)
    check_same(top_k_with_indices(scores, indices, k), jnp.asarray(ordered), k)


def test_of_scores_that_are_no_numbers():
    scores = jnp.asarray([[1.0, jnp.nan, 1.0, jnp.inf, jnp.nan, -jnp.inf]])
    top = rerank(jnp.asarray([[5, 4, 3, 2, 1, 0]]), scores, 6)
    assert top.indices.tolist() == [[1, 4, 2, 3, 5, 0]]


def test_of_the_largest_index():
    """A softmax ranks what is no token there."""
    top = rerank(jnp.asarray([[2**31 - 1, 7, 2**31 - 1, 3]]), jnp.zeros((1, 4)), 3)
    assert top.indices.tolist() == [[3, 7, 2**31 - 1]]


@settings(max_examples=4)
@given(st.integers(6, 200), st.sampled_from([1, 3, 20]), st.sampled_from([8, 4, "rank"]), SEEDS)
@pytest.mark.parametrize("implementation", ["auto", "xla"])
def test_of_a_search_whose_candidates_are_all_rows(implementation, m, b, kind, seed):
    rng = np.random.default_rng(seed)
    rows, x = repeated_rows(rng, m), integer_queries(rng, b)
    estimator = hire.LowRank.fit(rows, 2) if kind == "rank" else hire.Quantized.fit(rows, kind)
    k = int(rng.integers(1, m + 1))
    top = hire.high_recall_top_k(
        x, rows, estimator, k=k, candidates=m, implementation=implementation
    )
    check_same(top, x @ rows.T, k)


@settings(max_examples=4)
@given(SEEDS)
@pytest.mark.parametrize("implementation", ["auto", "xla"])
def test_of_a_search_whose_candidates_come_from_buckets(implementation, seed):
    rng = np.random.default_rng(seed)
    rows, x = repeated_rows(rng, 1280, 16), integer_queries(rng, 3, 16)
    estimator = hire.Quantized.fit(rows, 8)
    top = hire.high_recall_top_k(
        x, rows, estimator, k=9, candidates=20, implementation=implementation
    )
    # Which rows of equal estimates become candidates is not promised; their order is.
    scores = np.asarray(x @ rows.T)
    np.testing.assert_array_equal(top.values, np.take_along_axis(scores, top.indices, axis=1))
    steps, indices = np.diff(top.values, axis=1), np.asarray(top.indices)
    assert (steps <= 0).all() and (steps == 0).any()
    assert (np.diff(indices, axis=1)[steps == 0] > 0).all()


@settings(max_examples=7)
@given(
    m=st.sampled_from([7, 60, 200]),
    has_bias=st.booleans(),
    soft_cap=st.sampled_from([0.0, 0.01, 8.0]),
    allowed=st.sampled_from([None, 2, 30]),
    has_logit_bias=st.booleans(),
    num_seen=st.sampled_from([0, 1, 40]),
    shards=st.sampled_from([0, 0, 4]),
    seed=SEEDS,
)
def test_of_a_softmax_whose_candidates_are_all_rows(
    m, has_bias, soft_cap, allowed, has_logit_bias, num_seen, shards, seed
):
    """Fewer than k tokens may be allowed: the other places are those of lax.top_k, too."""
    rng, b = np.random.default_rng(seed), 2
    rows, x, k = repeated_rows(rng, m), integer_queries(rng, 2), 5
    bias = jnp.asarray(rng.integers(-1, 2, m), jnp.float32) if has_bias else None
    softmax = hire.HireSoftmax(
        rows, hire.Quantized.fit(rows, 8), k=k, candidates=m, bias=bias, soft_cap=soft_cap
    )
    changes = {}
    if allowed is not None:
        mask = np.stack([rng.permutation(m) < allowed for _ in range(b)])
        changes["mask"] = jnp.asarray(mask)
    if has_logit_bias:
        changes["logit_bias"] = jnp.asarray(rng.integers(-1, 2, m), jnp.float32)
    if num_seen:
        seen = jnp.asarray(rng.integers(-1, m + 2, (b, num_seen)), jnp.int32)
        changes["penalties"] = hire.Penalties(seen, 2.0, 1.0)
    logits = x @ rows.T if bias is None else x @ rows.T + bias[None]
    adjustments = checked_adjustments(m, **changes).flattened((b,))
    logits = adjust_all(cap_softly(logits, soft_cap), adjustments)
    if shards:
        with jax.set_mesh(jax.make_mesh((shards,), ("chips",))):
            axis = RowSharding("chips", math.inf, interleaved=bool(seed % 2))
            softmax = softmax.sharded(axis)
            tops = softmax(x, **changes), softmax.top_k_with_normalizer(x, **changes).top
    else:
        tops = softmax(x, **changes), softmax.top_k_with_normalizer(x, **changes).top
    for top in tops:
        check_same(top, logits, k)


@settings(max_examples=3)
@given(st.integers(24, 90), st.booleans(), SEEDS)
def test_of_rows_over_devices(m, interleaved, seed):
    rng = np.random.default_rng(seed)
    rows, x = repeated_rows(rng, m), integer_queries(rng, 3)
    softmax = hire.HireSoftmax(rows, hire.Quantized.fit(rows, 8), k=5, candidates=m)
    with jax.set_mesh(jax.make_mesh((4,), ("chips",))):
        top = softmax.sharded(RowSharding("chips", math.inf, interleaved))(x)
    check_same(top, x @ rows.T, 5)

"""A certificate is never wrong: against float64, on rows made to deceive it; and what it grants on
real weights.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import hire
from hire.certify import certified_top_k, scaled_queries, top_upper_bounds
from hire.lab.studies import adversary

AS_SHIPPED = dict(
    xla_backend_optimization_level=3, xla_cpu_use_fusion_emitters=True
)  # a proof is about how sums are rounded


def search(x, rows, estimator, k, candidates, **how):
    prove = jax.jit(
        lambda *parts: certified_top_k(*parts, k=k, candidates=candidates, **how),
        compiler_options=AS_SHIPPED,
    )
    return prove(x, rows, estimator)


def true_scores(x, rows) -> np.ndarray:
    return np.asarray(x, np.float64) @ np.asarray(rows, np.float64).T


def holds(result, x, rows, k) -> np.ndarray:
    """Whether no missing row scores above one that is there, in float64."""
    scores = true_scores(x, rows)
    there = np.zeros(scores.shape, bool)
    np.put_along_axis(there, np.asarray(result.top.indices), True, axis=1)
    return np.where(there, scores, np.inf).min(1) >= np.where(there, -np.inf, scores).max(1)


def test_by_hand():
    rows = jnp.asarray([[4.0, 0.0], [3.0, 1.0], [1.0, 2.6], [0.0, 1.0]])
    estimator = hire.Quantized.fit(
        rows, 4
    )  # steps of 1/7 of a row's largest: (3, 1) is kept as 3, 6/7 and (1, 2.6) as 7.8/7, 2.6
    np.testing.assert_allclose(estimator.error_bounds, [0, 1 / 7, 0.8 / 7, 0], atol=1e-4)
    result = search(jnp.asarray([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]), rows, estimator, 1, 1)
    # 4 against 3 + 1/7; 2.6 against 1; 4, 4 and 3.6: a tie that the estimates cannot settle
    assert result.proved.tolist() == [True, True, False]
    assert result.top.indices[:2].tolist() == [[0], [2]]


@given(
    st.integers(0, 10**6),
    st.sampled_from(["near", "duplicates", "outliers", "huge", "tiny"]),
    st.sampled_from([4, 8, "rank"]),
)
def test_a_certificate_is_never_wrong(seed, trap, kind):
    rng = np.random.default_rng(seed)
    m, d, k = 192, 24, 4
    rows = rng.normal(size=(m, d))
    if trap == "near":  # rows that differ by about the error of an estimator, or less
        rows = rng.normal(size=(1, d)) + rng.normal(size=(m, d)) * 10.0 ** rng.uniform(
            -7, -1, (m, 1)
        )
    if trap == "duplicates":
        rows = rows[rng.integers(0, m // 4, m)]
    if trap == "outliers":
        rows[rng.integers(0, m, 20), rng.integers(0, d, 20)] *= 1e4
    rows = jnp.asarray(rows * dict(huge=1e8, tiny=1e-8).get(trap, 1.0), jnp.float32)
    estimator = (
        hire.LowRank.fit(rows, 20, bits=8) if kind == "rank" else hire.Quantized.fit(rows, kind)
    )
    x = jnp.asarray(rng.normal(size=(16, d)), jnp.float32)
    result = search(x, rows, estimator, k, 32)
    assert np.all(holds(result, x, rows, k) | ~np.asarray(result.proved))


@given(
    st.integers(1, 700),
    st.integers(1, 700),
    st.sampled_from(["normal", "equal", "infinite"]),
    st.integers(0, 10**6),
)
def test_no_other_row_exceeds_the_bound(m, candidates, kind, seed):
    """For any nominated rows and any block size; with every row nominated there is no other."""
    candidates = min(m, candidates)
    reached = np.random.default_rng(seed).normal(size=(3, m)).astype(np.float32)
    if kind != "normal":
        reached[:, ::2] = 1.0 if kind == "equal" else -np.inf
    chosen, others = map(np.asarray, top_upper_bounds(jnp.asarray(reached), candidates))
    assert all(len(set(row)) == candidates for row in chosen.tolist())
    np.put_along_axis(reached, chosen, -np.inf, 1)
    assert (reached.max(1) <= others).all()
    if candidates == m:
        assert (others == -np.inf).all()


def test_most_are_granted_where_scores_lie_apart(rng):
    rows = jnp.asarray(rng.normal(size=(4096, 64)) * rng.uniform(0.1, 3, (4096, 1)), jnp.float32)
    x = jnp.asarray(rng.normal(size=(64, 64)), jnp.float32)
    result = search(x, rows, hire.Quantized.fit(rows, 8), 4, 64)
    assert result.proved.mean() > 0.9 and holds(result, x, rows, 4).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_with_the_fallback_it_is_always_the_dense_answer(rng, dtype):
    rows = jnp.asarray(rng.normal(size=(512, 16)), dtype)
    x = jnp.asarray(rng.normal(size=(8, 16)), dtype)
    result = search(x, rows, hire.LowRank.fit(rows, 2), 4, 8, dense_fallback=True)
    assert not result.proved.all()  # so little of the rows proves little
    assert hire.recall(result.top.indices, true_scores(x, rows).astype(np.float32), 4).min() == 1


def test_queries_that_are_no_numbers_prove_nothing(rng):
    rows = jnp.asarray(rng.normal(size=(64, 8)), jnp.float32)
    x = jnp.asarray([[np.nan] * 8, [np.inf] * 8], jnp.float32)
    assert not search(x, rows, hire.Quantized.fit(rows, 8), 2, 8).proved.any()


def test_a_projected_query_is_not_rounded_unnoticed(rng):
    """Factors of 16 bits: the query's products with the projection once were rounded to their type,
    which no bound knew of.
    """
    for dtype in (jnp.bfloat16, jnp.float16):
        rows = jnp.asarray(rng.normal(size=(1, 16)) + rng.normal(size=(256, 16)) * 0.02, dtype)
        x = jnp.asarray(rng.normal(size=(512, 16)), jnp.float32)
        result = search(x, rows, hire.LowRank.fit(rows, 16), 1, 4)
        assert result.proved.mean() > 0.2
        assert np.all(holds(result, x, rows, 1) | ~np.asarray(result.proved))


def test_queries_whose_squares_are_no_normal_numbers():
    """A length once came out as 0, and with it every bound."""
    rows = jnp.asarray([[-1.42, 0.26, -0.57], [-1.03, -1.04, 0.27]])
    estimator = hire.Quantized.fit(rows, 4)
    for scale in (1e-19, 1e-30, 1e-38, 1e19, 1e30, 3e38):  # the last one's length is no float32
        result = search(jnp.full((1, 3), scale), rows, estimator, 1, 1)
        assert result.proved.tolist() == [False] or result.top.indices.tolist() == [[0]], scale
    assert search(jnp.full((1, 3), 1e-19), rows, estimator, 1, 2).top.indices.tolist() == [[0]]


def test_scaling_a_query_changes_no_proof(rng):
    rows = jnp.asarray(rng.normal(size=(512, 24)), jnp.float32)
    estimator = hire.Quantized.fit(rows, 4)
    x = jnp.asarray(rng.normal(size=(40, 24)), jnp.float32)
    plain = search(x, rows, estimator, 2, 4)
    assert plain.proved.any() and not plain.proved.all()
    for exponent in (-80, -20, 20, 100):
        result = search(x * 2.0**exponent, rows, estimator, 2, 4)
        np.testing.assert_array_equal(result.proved, plain.proved)
        np.testing.assert_array_equal(result.top.indices, plain.top.indices)
        np.testing.assert_allclose(
            result.top.values, plain.top.values * np.float32(2.0) ** exponent, rtol=1e-6
        )


def test_scaled_queries_by_hand():
    x = jnp.asarray(
        [[3.0, -5.0], [0.0, 0.0], [2.0**-95, 0.0], [jnp.inf, 1.0], [1.0, jnp.nan], [2.0**120, 1.0]]
    )
    scaled, power, usable = scaled_queries(x)
    assert usable.tolist() == [True, False, False, False, False, True]
    assert power[:, 0].tolist() == [4.0, 1.0, 1.0, 1.0, 1.0, 2.0**100]
    assert scaled[0].tolist() == [0.75, -1.25] and scaled[5].tolist() == [2.0**20, 2.0**-100]


def test_a_query_of_zeros_has_an_answer_and_no_proof(rng):
    rows = jnp.asarray(rng.normal(size=(64, 8)), jnp.float32)
    result = search(jnp.zeros((1, 8)), rows, hire.Quantized.fit(rows, 8), 2, 8)
    assert result.top.values.tolist() == [[0.0, 0.0]] and not result.proved.any()


def test_bounds_hold_for_rows_of_any_scale_and_type(rng):
    """Against float64: no estimate is off by more than its bound says, for a query of length 1."""
    x = rng.normal(size=(64, 24))
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    for dtype, scales in (
        (jnp.float32, (1e-30, 1.0, 1e30)),
        (jnp.bfloat16, (1e-30, 1.0, 1e30)),
        (jnp.float16, (1e-3, 1.0, 1e3)),
    ):
        for scale in scales:
            rows = jnp.asarray(rng.normal(size=(100, 24)) * scale, jnp.float32).astype(dtype)
            estimators = [hire.LowRank.fit(rows, 10, bits=bits) for bits in (None, 8, 4)]
            estimators += [hire.Quantized.fit(rows, bits) for bits in (8, 4)]
            for estimator in estimators:
                exact = x.astype(np.float64) @ np.asarray(rows, np.float64).T
                off = np.abs(np.asarray(estimator.scores(jnp.asarray(x)), np.float64) - exact).max(
                    0
                )
                assert (off <= np.asarray(estimator.error_bounds, np.float64)).all()
                assert (
                    np.asarray(estimator.error_bounds)
                    < 3 * np.linalg.norm(np.asarray(rows, np.float64), axis=1) + 1e-25
                ).all()


def test_rows_that_are_not_finite_have_infinite_bounds(rng):
    rows = jnp.asarray(rng.normal(size=(64, 8)), jnp.float32)
    estimator = hire.Quantized.fit(rows, 8)
    broken = rows.at[3, 0].set(jnp.inf).at[5, 1].set(jnp.nan)
    bounds = np.asarray(estimator.with_error_bounds(broken).error_bounds)
    assert (
        np.flatnonzero(~np.isfinite(bounds)).tolist() == [3, 5] and (bounds[[3, 5]] == np.inf).all()
    )
    x = jnp.asarray(rng.normal(size=(20, 8)), jnp.float32)
    assert not search(
        x, broken, replace(estimator, error_bounds=jnp.asarray(bounds), fingerprint=None), 2, 8
    ).proved.any()


def test_an_estimator_without_bounds_or_of_other_rows_proves_nothing(rng):
    rows = jnp.asarray(rng.normal(size=(64, 8)), jnp.float32)
    estimator = hire.Quantized.fit(rows, 8)
    with pytest.raises(ValueError, match="Quantized"):
        certified_top_k(rows[:2], rows, replace(estimator, error_bounds=None), k=1, candidates=4)
    with pytest.raises(ValueError, match=r"\(64, 8\)"):
        certified_top_k(rows[:2], rows + 1, estimator, k=1, candidates=4)


def test_memory_of_many_queries_is_that_of_a_few():
    rows, x = jnp.zeros((20_000, 64)), jnp.zeros((256, 64))
    estimator = hire.Quantized.fit(rows, 8)
    prove = jax.jit(
        lambda x, rows, estimator: certified_top_k(x, rows, estimator, k=4, candidates=128)
    )

    def used(queries: int) -> int:
        return (
            prove.lower(x[:queries], rows, estimator).compile().memory_analysis().temp_size_in_bytes
        )

    assert used(256) < 2 * used(32)
    assert used(256) < 4 * 16 * (4 * len(rows) + 2 * 4 * 128 * 64)


def test_an_adversary_finds_no_wrong_proof():
    """A few of the attacks of `make certify-adversary`, all with random queries."""
    output = adversary.attack_proofs(12 * adversary.QUERIES, seed=7, batch=1)
    assert output["all"]["wrong"] == 0 and output["all"].get("wrong_with_fallback", 0) == 0
    assert output["all"]["proved"] > 0.1 * output["all"]["queries"]
    assert set(adversary.TYPES) <= set(output)


def test_an_adversary_would_see_a_wrong_proof(rng):
    rows, x = rng.normal(size=(64, 12)), rng.normal(size=(8, 12))
    worst = np.argsort(x @ rows.T, axis=1)[:, :2].astype(np.int32)
    result = hire.certify.Certified(
        hire.TopK(np.zeros((8, 2), np.float32), worst), np.arange(8) % 2 == 0
    )
    np.testing.assert_array_equal(adversary.wrong_proofs(result, x, rows), result.proved)
    assert adversary.wrong_fallbacks(result, x, rows).all()

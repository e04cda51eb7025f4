"""Sampling from the top tokens, by hand, and the normalizer that estimates all others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hire
from hire.lab.metrics.model_quality import total_variation
from hire.layers.softmax import logsumexp_correction


def top_of(*probabilities):
    """A top-k whose softmax has these probabilities, over tokens 10, 11, …"""
    values = jnp.log(jnp.asarray([probabilities], jnp.float32)) + 3.0
    return hire.TopK(values, 10 + jnp.arange(len(probabilities), dtype=jnp.int32)[None])


@pytest.mark.parametrize(
    "settings, expected",
    [
        (dict(), [0.5, 0.3, 0.2]),
        (dict(temperature=0.0), [1, 0, 0]),
        (dict(temperature=0.5), [25 / 38, 9 / 38, 4 / 38]),  # squares of 5, 3, 2
        (dict(top_k=2), [5 / 8, 3 / 8, 0]),
        (dict(top_p=0.8), [5 / 8, 3 / 8, 0]),  # the two best reach 0.8
        (dict(top_p=0.81), [0.5, 0.3, 0.2]),
        (dict(top_p=1e-9), [1, 0, 0]),
        (dict(top_k=2, top_p=0.6), [1, 0, 0]),  # of the two best, 5/8 is enough
        (dict(min_p=0.5), [5 / 8, 3 / 8, 0]),  # half of 0.5 is more than 0.2
        (dict(min_p=0.39), [0.5, 0.3, 0.2]),
        (dict(min_p=1.0), [1, 0, 0]),
        # The square roots of the probabilities: all are at least half of the largest.
        (
            dict(min_p=0.5, temperature=2.0),
            np.sqrt([0.5, 0.3, 0.2]) / np.sqrt([0.5, 0.3, 0.2]).sum(),
        ),
    ],
)
def test_probabilities_by_hand(settings, expected):
    result = hire.sampling_probabilities(top_of(0.5, 0.3, 0.2), **settings)
    np.testing.assert_allclose(result[0], expected, atol=1e-6)


def test_tokens_are_drawn_as_often_as_their_probability_says():
    top = jax.tree.map(lambda part: jnp.repeat(part, 20000, 0), top_of(0.5, 0.3, 0.2))
    result = np.asarray(hire.sample(top, jax.random.key(0)))
    np.testing.assert_allclose(
        [np.mean(result == token) for token in (10, 11, 12)], [0.5, 0.3, 0.2], atol=0.015
    )
    assert set(np.asarray(hire.sample(top, jax.random.key(0), temperature=0.0)).tolist()) == {10}


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(temperature=-0.1), "-0.1"),
        (dict(temperature=float("nan")), "temperature.*nan"),
        (dict(temperature=float("inf")), "temperature.*inf"),
        (dict(top_p=0.0), "top_p.*0.0"),
        (dict(top_p=1.1), "top_p.*1.1"),
        (dict(top_p=float("nan")), "top_p.*nan"),
        (dict(min_p=-0.1), "min_p.*-0.1"),
        (dict(min_p=1.5), "min_p.*1.5"),
        (dict(top_k=0), "top_k.*0"),
        (dict(top_k=np.asarray([1, 4])), "top_k.*4"),
        (dict(top_k=4), "top_k.*4"),
    ],
)
def test_settings_that_draw_nothing_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        hire.sample(top_of(0.5, 0.3, 0.2), jax.random.key(0), **settings)


def test_top_p_of_one_drops_no_token():
    """Also where the sum of the better tokens rounds to 1 in float32."""
    values = jnp.concatenate([jnp.zeros(1), jnp.full(100, -18.0)])[None]
    result = hire.sampling_probabilities(hire.TopK(values, jnp.arange(101, dtype=jnp.int32)[None]))
    assert int((result > 0).sum()) == 101


def test_without_a_distribution_nothing_is_drawn():
    values = jnp.asarray([[-jnp.inf, -jnp.inf], [1.0, jnp.nan], [2.0, -jnp.inf]])
    top = hire.TopK(values, jnp.asarray([[7, 8]] * 3, jnp.int32))
    for settings in (dict(), dict(temperature=0.0), dict(top_p=0.5)):
        result = hire.sampling_probabilities(top, **settings)
        assert jnp.isnan(result).all(1).tolist() == [True, True, False] and result[2].tolist() == [
            1.0,
            0.0,
        ]
        assert hire.sample(top, jax.random.key(0), **settings).tolist() == [-1, -1, 7]


def test_settings_may_be_traced_or_each_query_its_own():
    top = jax.tree.map(lambda part: jnp.repeat(part, 3, 0), top_of(0.5, 0.3, 0.2))
    result = hire.sampling_probabilities(
        top, temperature=jnp.asarray([0.0, 0.5, 1.0]), top_p=np.asarray([1.0, 1.0, 0.8])
    )
    np.testing.assert_allclose(
        result, [[1, 0, 0], [25 / 38, 9 / 38, 4 / 38], [5 / 8, 3 / 8, 0]], atol=1e-6
    )
    result = hire.sampling_probabilities(
        top, top_k=jnp.asarray([1, 2, 3]), min_p=jnp.asarray([0.0, 0.0, 0.5])
    )
    np.testing.assert_allclose(result, [[1, 0, 0], [5 / 8, 3 / 8, 0], [5 / 8, 3 / 8, 0]], atol=1e-6)
    traced = jax.jit(lambda top_k: hire.sampling_probabilities(top, top_k=top_k))(2)
    np.testing.assert_allclose(traced[0], [5 / 8, 3 / 8, 0], atol=1e-6)
    traced = jax.jit(lambda temperature: hire.sampling_probabilities(top, temperature=temperature))(
        0.5
    )
    np.testing.assert_allclose(traced[0], [25 / 38, 9 / 38, 4 / 38], atol=1e-6)
    with pytest.raises(ValueError, match="-1"):
        hire.sampling_probabilities(top, temperature=np.asarray([1.0, -1.0, 1.0]))


def test_total_variation_by_hand():
    # Tokens 10 and 12 are in both, with 0.5 against 0.6 and 0.2 against 0.4; 11 is only in one.
    one, other = (
        top_of(0.5, 0.3, 0.2),
        hire.TopK(jnp.log(jnp.asarray([[0.6, 0.4]])), jnp.asarray([[10, 12]])),
    )
    np.testing.assert_allclose(total_variation(one, other), [(0.1 + 0.2 + 0.3) / 2], atol=1e-6)
    np.testing.assert_allclose(total_variation(one, one), [0.0], atol=1e-6)


@pytest.fixture
def wide(rng):
    """A softmax whose logits vary as a model's do, with an estimator that errs, and queries."""
    rows = jnp.asarray(rng.normal(size=(8000, 24)) * np.linspace(0.9, 0.3, 24), jnp.float32)
    softmax = hire.HireSoftmax(rows, hire.LowRank.fit(rows, 14, bits=8), k=8, candidates=400)
    return softmax, jnp.asarray(rng.normal(size=(300, 24)), jnp.float32)


def test_the_normaliser_is_corrected_and_its_error_is_what_it_says(wide):
    softmax, queries = wide
    true = np.asarray(jax.nn.logsumexp(queries @ softmax.rows.T, axis=1))
    estimated = np.asarray(jax.nn.logsumexp(softmax.estimator.scores(queries), axis=1))
    result = softmax.top_k_with_normalizer(queries)
    off, error = np.asarray(result.log_normalizer) - true, np.asarray(result.normalizer_stderr)
    assert abs(np.mean(estimated - true)) > 0.1  # what the estimator alone would say
    assert abs(off.mean()) < 0.02 and np.sqrt(np.mean(off**2)) < 0.1
    assert (
        0.5 < np.sqrt(np.mean(off**2) / np.mean(error**2)) < 2
        and np.mean(np.abs(off) < 2 * error) > 0.85
    )
    assert (result.top.indices == softmax(queries).indices).all()


def test_a_ratio_by_hand():
    # exp(guessed) is 1 and 3, exp(exact) 2 and 3: 5/4 in all; by row the ratios are 2 and 1,
    # weighted 1/4 and 3/4.
    ratio, error = logsumexp_correction(
        jnp.log(jnp.asarray([[2.0, 3.0]])), jnp.log(jnp.asarray([[1.0, 3.0]]))
    )
    assert float(ratio[0]) == pytest.approx(np.log(5 / 4))
    assert float(error[0]) == pytest.approx(np.hypot((2 / 1.25 - 1) / 4, (1 / 1.25 - 1) * 3 / 4))


@pytest.mark.parametrize("vocabulary", [1, 2, 3, 500])
def test_with_every_row_a_candidate_the_normaliser_is_exact(rng, vocabulary):
    rows, queries = (jnp.asarray(rng.normal(size=(n, 6)), jnp.float32) for n in (vocabulary, 5))
    every = hire.HireSoftmax(rows, hire.Quantized.fit(rows, 4), 1, vocabulary)
    logits = queries @ rows.T
    np.testing.assert_allclose(
        every.top_k_with_normalizer(queries).log_normalizer,
        jax.nn.logsumexp(logits, axis=1),
        atol=1e-5,
    )
    np.testing.assert_allclose(
        every.top_k_with_normalizer(queries).normalizer_stderr, 0.0, atol=1e-6
    )
    some = jnp.asarray(rng.integers(0, vocabulary, (5, 3)))
    expected = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=1), some, axis=1)
    np.testing.assert_allclose(every.log_probabilities(queries, some), expected, atol=1e-4)


def test_an_estimator_of_other_rows_is_refused_and_one_in_another_precision_is_not(rng):
    rows, others = (jnp.asarray(rng.normal(size=(300, 8)), jnp.float32) for _ in range(2))
    for estimator in (
        hire.LowRank.fit(rows, 4),
        hire.LowRank.fit(rows, 4, bits=8),
        hire.Quantized.fit(rows, 4),
    ):
        hire.HireSoftmax(rows.astype(jnp.bfloat16), estimator, 4, 20)
        for wrong in (others, rows[::-1], rows.at[7, 3].add(0.5)):
            with pytest.raises(ValueError, match=r"\(300, 8\)"):
                hire.HireSoftmax(wrong, estimator, 4, 20)

"""Estimators: what they store, how near their scores are, and what fitting improves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hire
from hire.ops.quantization import unpack_codes
from hire.ops.row_products import blocked_scores, row_scores, weighted_row_sum


def correlated(rng, m=400, d=24, n=500):
    """Rows and queries that each vary mostly along a few directions, but not the same ones."""
    rows = rng.normal(size=(m, d)) * np.geomspace(1, 0.1, d)
    queries = rng.normal(size=(n, d)) * np.geomspace(0.05, 3, d)
    return jnp.asarray(rows, jnp.float32), jnp.asarray(queries, jnp.float32)


def test_quantized_by_hand():
    rows = jnp.asarray([[7.0, -3.4, 0.6], [0.0, 0.0, 0.0]])
    four = hire.Quantized.fit(
        rows, 4
    )  # scale 1: codes 7, -3, 1; two to a byte, column j with column j + 2
    assert unpack_codes(four.codes, 4, 3).tolist() == [[7.0, -3.0, 1.0], [0.0, 0.0, 0.0]]
    assert four.codes.tolist() == [[0x17, 0x0D], [0, 0]]
    assert four.scores(jnp.asarray([[1.0, 1.0, 1.0]])).tolist() == [[5.0, 0.0]]
    eight = hire.Quantized.fit(rows, 8)  # steps of 7 / 127: -3.4 is 61.7 of them, 0.6 is 10.9
    assert eight.codes.tolist() == [[127, -62, 11], [0, 0, 0]]


@settings(max_examples=12)
@given(
    st.sampled_from([307, 300, 4096, 2**17]),
    st.sampled_from([6, 9]),
    st.sampled_from([1, 2, 16, 17]),
    st.sampled_from([None, 4, 8]),
)
def test_every_method_of_scores_is_the_product(m, d, b, bits):
    """In pieces or, where none fits (307), at once, of floats and of codes."""
    rng = np.random.default_rng(m + b)
    rows, x = (jnp.asarray(rng.normal(size=(n, d)), jnp.float32) for n in (m, b))
    if bits is None:
        result, expected = (
            [row_scores(x, rows), blocked_scores(x, rows)],
            np.asarray(x) @ np.asarray(rows).T,
        )
    else:
        estimator = hire.Quantized.fit(rows, bits)
        result = [estimator.scores(x)]
        expected = (
            np.asarray(x)
            @ (
                np.asarray(unpack_codes(estimator.codes, bits, d))
                * np.asarray(estimator.scale)[:, None]
            ).T
        )
    for scores in result:
        np.testing.assert_allclose(scores, expected, atol=1e-4)


def test_scores_of_two_matrices_write_nothing_large(rng):
    rows, x = jnp.zeros((2, 512, 256)), jnp.zeros((8, 256))
    both = (
        jax.jit(lambda x, one, other: (row_scores(x, one), row_scores(x, other)))
        .lower(x, *rows)
        .compile()
    )
    assert (
        both.memory_analysis().temp_size_in_bytes < rows[0].nbytes
    )  # XLA would write the queries, once for every row


def test_bytes_by_hand():
    rows = jnp.ones((10, 7))
    assert hire.Quantized.fit(rows, 8).nbytes == 10 * 7 + 4 * 10
    assert hire.Quantized.fit(rows, 4).nbytes == 10 * 4 + 4 * 10  # seven columns take four bytes
    assert hire.LowRank.fit(rows, 3).nbytes == 4 * (10 * 3 + 3 * 7)
    assert (
        hire.LowRank.fit(rows, 3, bits=8).nbytes == 10 * 3 + 4 * 10 + 3 * 7 + 4 * 3
    )  # each with its scales
    assert hire.LowRank.fit(rows.astype(jnp.bfloat16), 3).nbytes == 2 * 10 * 3 + 4 * 3 * 7
    assert hire.Quantized.fit(rows, 8).bytes_read(5) == 10 * 7 + 4 * 10


@given(
    st.sampled_from([1, 40]),
    st.sampled_from([1, 2, 33]),
    st.sampled_from([4, 8]),
    st.integers(0, 2**31),
)
def test_quantized_errs_no_more_than_rounding(m, d, bits, seed):
    rng = np.random.default_rng(seed)
    rows = jnp.asarray(rng.normal(size=(m, d)) * np.exp(rng.normal(size=(m, 1))), jnp.float32)
    estimator = hire.Quantized.fit(rows, bits)
    restored = unpack_codes(estimator.codes, bits, d) * estimator.scale[:, None]
    if bits == 8:
        assert np.all(np.abs(restored - rows) <= 0.5001 * estimator.scale[:, None])
    else:  # its steps may end below the largest entry, where the others gain by it
        step = np.maximum(np.abs(rows).max(1, keepdims=True), 1e-30) / 7
        assert np.all(
            np.sum((restored - rows) ** 2, 1)
            <= 1.001 * np.sum((np.round(rows / step) * step - rows) ** 2, 1) + 1e-12
        )
    assert estimator.shape == (m, d)
    for x in (
        rng.normal(size=(2, 1, d)),
        rng.normal(size=(1, 7, d)),
    ):  # one query and several take different ways
        np.testing.assert_allclose(
            estimator.scores(jnp.asarray(x[0], jnp.float32)),
            x[0] @ restored.T,
            rtol=1e-4,
            atol=1e-4,
        )


@given(
    st.sampled_from([(1,), (3,), (1, 1), (2, 1)]),
    st.sampled_from([1, 16, 48, 50]),
    st.integers(0, 2**31),
)
def test_sums_of_weighted_rows_in_any_split(lead, m, seed):
    rng = np.random.default_rng(seed)
    weights, rows = (
        rng.normal(size=(*lead, m)).astype(np.float32),
        rng.normal(size=(m, 5)).astype(np.float32),
    )
    np.testing.assert_allclose(weighted_row_sum(weights, rows), weights @ rows, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("make", ["LR", "LR8", "LR4", "Q8", "Q4"])
def test_scores_at_are_the_scores_of_those_rows(rng, make, dtype):
    rows, queries = correlated(rng)
    rows = rows.astype(dtype)
    bits = int(make[-1]) if make[-1].isdigit() else None
    estimator = (
        hire.Quantized.fit(rows, bits) if make[0] == "Q" else hire.LowRank.fit(rows, 8, bits=bits)
    )
    indices = jnp.asarray(rng.integers(0, len(rows), (5, 7)))
    all_scores = jax.jit(lambda estimator, x: estimator.scores(x))(estimator, queries[:5])
    some = jax.jit(lambda estimator, x, i: estimator.scores_at(x, i))(
        estimator, queries[:5], indices
    )
    np.testing.assert_allclose(
        some, np.take_along_axis(np.asarray(all_scores), indices, 1), rtol=1e-3, atol=1e-3
    )
    assert isinstance(estimator, hire.Estimator)


def test_plain_low_rank_is_the_svd(rng):
    rows, queries = correlated(rng)
    u, s, vt = np.linalg.svd(np.asarray(rows, np.float64), full_matrices=False)
    expected = np.asarray(queries) @ (u[:, :6] * s[:6] @ vt[:6]).T
    np.testing.assert_allclose(hire.LowRank.fit(rows, 6).scores(queries), expected, atol=2e-3)


def test_full_rank_is_exact(rng):
    rows, queries = correlated(rng)
    np.testing.assert_allclose(
        hire.LowRank.fit(rows, 24, calibration=queries).scores(queries), queries @ rows.T, atol=2e-3
    )


def test_fitting_lowers_the_error_of_scores_and_is_the_best_of_its_rank(rng):
    rows, queries = correlated(rng)
    exact = np.asarray(queries @ rows.T, np.float64)

    def error(estimator):
        return float(np.mean((np.asarray(estimator.scores(queries)) - exact) ** 2))

    fitted = error(hire.LowRank.fit(rows, 6, calibration=queries, ridge=1e-9))
    assert fitted < 0.5 * error(hire.LowRank.fit(rows, 6))
    # No rank-6 matrix of scores comes nearer than the truncated SVD of the scores themselves
    # (Eckart-Young).
    singular = np.linalg.svd(exact, compute_uv=False)
    assert fitted == pytest.approx(np.sum(singular[6:] ** 2) / exact.size, rel=1e-2)


def test_a_row_with_a_large_entry_keeps_the_others_at_4_bits(rng):
    rows = jnp.asarray(rng.normal(size=(80, 64)), jnp.float32).at[:, 0].set(8.0)
    queries = (
        jnp.asarray(rng.normal(size=(100, 64)), jnp.float32).at[:, 0].set(0.0)
    )  # which never ask for it

    def error(estimator):
        return float(
            np.mean((np.asarray(estimator.scores(queries)) - np.asarray(queries @ rows.T)) ** 2)
        )

    plain = jnp.round(rows / (8 / 7)) * (8 / 7)
    turned = error(hire.LowRank.fit(rows, 64, bits=4, directions="random"))
    assert turned < 0.5 * np.mean((np.asarray(queries @ (rows - plain).T)) ** 2)
    assert error(hire.LowRank.fit(rows, 64, bits=4)) < 0.5 * np.mean(
        (np.asarray(queries @ (rows - plain).T)) ** 2
    )


def test_other_directions_by_hand(rng):
    rows, queries = correlated(rng)
    first = hire.LowRank.fit(rows, 5, directions="first")
    np.testing.assert_allclose(first.scores(queries), queries[:, :5] @ rows[:, :5].T, atol=1e-4)
    # Of two entries that are always equal the second is known by the first: its share of the row is
    # counted with it.
    pair = jnp.asarray([[1.0, 2.0], [3.0, -1.0]])
    known = hire.LowRank.fit(
        pair, 1, calibration=jnp.asarray([[1.0, 1.0], [-2.0, -2.0]]), directions="first", ridge=1e-9
    )
    np.testing.assert_allclose(known.scores(jnp.asarray([[1.0, 1.0]])), [[3.0, 2.0]], atol=1e-4)


def test_leading_directions_err_least(rng):
    rows, queries = correlated(rng)
    exact = np.asarray(queries @ rows.T)
    estimators = {
        way: hire.LowRank.fit(rows, 8, calibration=queries, directions=way)
        for way in ("leading", "first", "random")
    }
    errors = {
        way: float(np.mean((np.asarray(estimator.scores(queries)) - exact) ** 2))
        for way, estimator in estimators.items()
    }
    assert errors["leading"] < min(errors["first"], errors["random"])


def test_calibration_may_come_in_batches(rng):
    rows, queries = correlated(rng)
    all_scores = hire.LowRank.fit(rows, 6, calibration=queries)
    parts = hire.LowRank.fit(rows, 6, calibration=iter([queries[:100], queries[100:]]))
    np.testing.assert_allclose(
        parts.scores(queries), all_scores.scores(queries), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda rows: hire.Quantized.fit(rows, 3), "bits = 3: expected 4 or 8"),
        (lambda rows: hire.LowRank.fit(rows, 0), "rank = 0: expected a whole number from 1 to 24"),
        (lambda rows: hire.LowRank.fit(rows, 25), "rank = 25"),
        (lambda rows: hire.LowRank.fit(rows, 4, bits=16), "bits = 16"),
        (
            lambda rows: hire.LowRank.fit(rows, 4, directions="last"),
            "directions = 'last': expected leading, first or random",
        ),
        (
            lambda rows: hire.LowRank.fit(rows, 4, calibration=rows[:, :5]),
            r"calibration of shape \(400, 5\): expected \(n, 24\)",
        ),
        (lambda rows: hire.LowRank.fit(rows, 4, calibration=[]), "calibration has 0 queries"),
        (lambda rows: hire.LowRank.fit(rows, 4, calibration=rows * jnp.nan), "not finite"),
    ],
)
def test_bad_fits_are_named(unchecked, rng, call, message):
    with pytest.raises(ValueError, match=message):
        call(correlated(rng)[0])


@pytest.mark.parametrize("bits", [4, 8])
def test_scales_chosen_for_scores_err_less_in_the_scores_of_such_queries(rng, bits):
    rows = jnp.asarray(rng.normal(size=(200, 12)), jnp.float32)
    queries = jnp.asarray(
        rng.normal(size=(400, 12)) * np.asarray([9.0] * 2 + [0.1] * 10), jnp.float32
    )

    def error(estimator):
        return float(jnp.mean((estimator.scores(queries) - queries @ rows.T) ** 2))

    plain, ours = (
        hire.Quantized.fit(rows, bits),
        hire.Quantized.fit(rows, bits, calibration=queries),
    )
    assert (plain.codes == ours.codes).all()
    assert error(ours) < 0.9 * error(plain)
    empty = hire.Quantized.fit(jnp.zeros((3, 12)), bits, calibration=queries)
    assert (empty.scores(queries) == 0).all()
    with pytest.raises(ValueError, match=r"calibration of shape \(4, 5\): expected \(n, 12\)"):
        hire.Quantized.fit(rows, bits, calibration=iter([np.ones((4, 5))]))

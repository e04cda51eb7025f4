"""JAX as users use it, and inputs at the edges: transformations, types, meshes, empty batches,
values that are not finite.
"""

import dataclasses
import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import hire
from hire.estimators.exact_rows import ExactRowsEstimator
from hire.estimators.fingerprints import cached_fingerprint, fingerprint, same_rows
from hire.lab.studies.adversary import with_64_bits
from hire.ops.row_products import row_scores, weighted_row_sum
from hire.ops.tpu.row_scores import blocks

ROWS, WIDTH, K, CANDIDATES = 9000, 128, 4, 64  # so many rows that a TPU's kernels would take them


@pytest.fixture(scope="module")
def given():
    rng = np.random.default_rng(0)
    rows, x = (jnp.asarray(rng.normal(size=(n, WIDTH)), jnp.float32) for n in (ROWS, 3))
    return rows, x, hire.LowRank.fit(rows, 96, bits=8), hire.Quantized.fit(rows, 8)


@pytest.fixture(scope="module")
def softmax(given):
    rows, _, _, quantized = given
    return hire.HireSoftmax(rows, quantized, K, CANDIDATES)


@pytest.fixture(scope="module")
def layers():
    rng = np.random.default_rng(1)
    up, down = (jnp.asarray(rng.normal(size=(512, WIDTH)), jnp.float32) for _ in range(2))
    estimator = hire.LowRank.fit(up, 64, bits=8)
    how = dict(k=4, candidates=8)
    return {
        "plain": hire.HireFFN(up, down, estimator, **how),
        "shared": hire.HireFFN(up, down, estimator, **how, share_selection=True),
        "gated": hire.HireFFN(up, down, estimator, gate=up, activation="silu", **how),
    }


def test_pytrees_are_checked_when_users_build_them_and_never_by_jax(softmax, given):
    rows, x, estimator, _ = given
    expected = softmax(x)
    shapes = jax.eval_shape(lambda: softmax)
    assert shapes.rows.shape == (ROWS, WIDTH) and shapes.k == K
    two = jax.tree.map(lambda *parts: jnp.stack(parts), estimator, estimator)
    scores = jax.vmap(lambda estimator: estimator.scores(x))(two)
    np.testing.assert_allclose(scores[1], estimator.scores(x), rtol=1e-5, atol=1e-4)
    again = jax.tree.map(lambda part: part, softmax)
    np.testing.assert_array_equal(again(x).indices, expected.indices)
    with pytest.raises(ValueError, match="9001"):
        dataclasses.replace(softmax, candidates=9001)


def test_mapping_over_a_softmax_reads_no_rows(softmax, monkeypatch):
    def fail(*_):
        raise AssertionError("rows were read")

    monkeypatch.setattr("hire.estimators.base.check_fitted", fail)
    monkeypatch.setattr("hire.layers.softmax.check_fitted", fail)
    jax.tree.map(lambda part: part, softmax)
    jax.jit(lambda softmax: softmax.rows[0])(softmax)


def test_a_softmax_may_be_built_and_changed_inside_a_trace(softmax, given):
    rows, x, _, estimator = given
    expected = softmax(x)
    ways = {
        "traced rows": jax.jit(lambda rows, x: hire.HireSoftmax(rows, estimator, K, CANDIDATES)(x))(
            rows, x
        ),
        "rows of the program": jax.jit(
            lambda x: hire.HireSoftmax(rows, estimator, K, CANDIDATES)(x)
        )(x),
        "rows of numpy": jax.jit(
            lambda x: hire.HireSoftmax(np.asarray(rows), estimator, K, CANDIDATES)(x)
        )(x),
        "changed": jax.jit(lambda softmax, x: dataclasses.replace(softmax, k=K)(x))(softmax, x),
        "changed outside": jax.jit(lambda x: dataclasses.replace(softmax, k=K)(x))(x),
    }
    for name, result in ways.items():
        np.testing.assert_array_equal(result.indices, expected.indices, err_msg=name)
    others = rows + 1
    with pytest.raises(
        ValueError, match="9000"
    ):  # rows that the program has as constants are known while it is traced
        jax.jit(lambda x: hire.HireSoftmax(others, estimator, K, CANDIDATES)(x))(x)


def test_gradients_of_values_are_the_selected_rows(softmax, given):
    rows, x, _, quantized = given
    in_blocks = hire.HireSoftmax(blocks(rows), quantized, K, CANDIDATES)
    for search in (
        softmax,
        in_blocks,
    ):  # of blocks a TPU would take a kernel, which has no derivative
        result = search(x).indices
        slope = jax.grad(lambda x, search=search: search(x).values.sum())(x)
        np.testing.assert_allclose(slope, rows[result].sum(1), rtol=1e-5, atol=1e-5)
    slope = jax.grad(
        lambda rows: hire.high_recall_top_k(
            x[:1], rows, quantized, k=K, candidates=CANDIDATES
        ).values.sum()
    )(rows)
    result = np.unique(np.flatnonzero(np.abs(slope).sum(1)))
    np.testing.assert_array_equal(result, np.sort(softmax(x[:1]).indices[0]))


def test_gradients_of_the_normalizer_are_near_the_dense_one(given):
    rows, x, _, _ = given
    softmax = hire.HireSoftmax(rows, hire.Quantized.fit(rows, 8), K, 2000)
    slope = jax.grad(lambda x: softmax.top_k_with_normalizer(x).log_normalizer.sum())(x)
    dense = jax.grad(lambda x: jax.nn.logsumexp(x @ rows.T, axis=1).sum())(x)
    np.testing.assert_allclose(slope, dense, atol=0.1)


@pytest.mark.parametrize("name", ["plain", "shared", "gated"])
def test_layers_have_gradients_and_map_over_queries(layers, given, name):
    layer, x = layers[name], given[1]
    slope = jax.grad(lambda x: layer(x).sum())(x)
    reference = jax.grad(lambda x: layer.dense_reference(x, tokens_per_selection=3).sum())(x)
    np.testing.assert_allclose(slope, reference, rtol=1e-3, atol=1e-2)
    weights = jax.grad(lambda down: dataclasses.replace(layer, down=down)(x).sum())(layer.down)
    assert float(jnp.abs(weights).sum()) > 0
    one_by_one = jax.vmap(lambda one: layer(one[None])[0])(x)
    np.testing.assert_allclose(one_by_one[0], layer(x[:1])[0], rtol=1e-4, atol=1e-3)


def test_queries_may_have_any_leading_axes(softmax, layers, given):
    rows, x, _, quantized = given
    expected = softmax(x)
    np.testing.assert_array_equal(softmax(x[0]).indices, expected.indices[0])
    np.testing.assert_array_equal(softmax(x[None]).indices, expected.indices[None])
    assert softmax.top_k_with_normalizer(x[0]).log_normalizer.shape == ()
    assert (
        hire.certified_top_k(x[0], rows, quantized, k=K, candidates=CANDIDATES).proved.shape == ()
    )
    np.testing.assert_allclose(
        layers["plain"](x[0]), layers["plain"](x[:1])[0], rtol=1e-5, atol=1e-4
    )


def test_an_empty_batch_gives_empty_answers(softmax, layers, given):
    rows, x, _, quantized = given
    none = x[:0]
    assert softmax(none).indices.shape == (0, K) and softmax(none).indices.dtype == jnp.int32
    assert softmax.top_k_with_normalizer(none).log_normalizer.shape == (0,)
    for candidates in (CANDIDATES, 8000):
        assert hire.high_recall_top_k(
            none, rows, quantized, k=K, candidates=candidates
        ).values.shape == (0, K)
    assert hire.certified_top_k(
        none, rows, quantized, k=K, candidates=CANDIDATES, dense_fallback=True
    ).proved.shape == (0,)
    for layer in layers.values():
        assert layer(none).shape == (0, WIDTH)


def test_counts_of_numpy_are_counts(unchecked, softmax, given):
    rows, x, estimator, quantized = given
    result = hire.HireSoftmax(rows, quantized, np.int64(K), np.int32(CANDIDATES))
    assert (type(result.k), type(result.candidates)) == (int, int)
    np.testing.assert_array_equal(result(x).indices, softmax(x).indices)
    assert hire.Cascade((estimator, quantized), (np.int64(200),)).stage_sizes == (200,)
    for bad in (True, 4.0, "4", np.float32(4)):
        with pytest.raises(ValueError, match=str(bad)):
            hire.HireSoftmax(rows, estimator, bad, CANDIDATES)


def test_with_64_bits(softmax, layers, given):
    rows, x, estimator, _ = given
    expected = softmax(x)
    outputs = {name: layer(x) for name, layer in layers.items()}
    with with_64_bits():
        wide, queries = (
            jnp.asarray(np.asarray(rows, np.float64)),
            jnp.asarray(np.asarray(x, np.float64)),
        )
        assert wide.dtype == jnp.float64
        quantized = hire.Quantized.fit(wide, 8)
        result = hire.high_recall_top_k(queries, wide, quantized, k=K, candidates=CANDIDATES)
        np.testing.assert_array_equal(result.indices, expected.indices)
        assert result.values.dtype == jnp.float32
        cascade = hire.Cascade((hire.LowRank.fit(wide, 64, bits=8), quantized), (200,))
        assert (
            hire.HireSoftmax(wide, cascade, K, CANDIDATES)
            .top_k_with_normalizer(queries)
            .log_normalizer.dtype
            == jnp.float32
        )
        proof = hire.certified_top_k(
            queries, wide, quantized, k=K, candidates=CANDIDATES, dense_fallback=True
        )
        np.testing.assert_array_equal(proof.top.indices, expected.indices)
        assert (
            hire.HireSoftmax(blocks(rows), estimator, K, CANDIDATES)(x).indices.dtype == jnp.int32
        )
        for name, layer in layers.items():
            np.testing.assert_allclose(layer(x), outputs[name], rtol=1e-4, atol=1e-3)
        assert hire.sample(result, jax.random.key(0), temperature=0.5, top_p=0.9).shape == (3,)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_meshes_of_either_kind(softmax, layers, given, kind):
    rows, x, _, quantized = given
    expected = softmax(x)
    every_group = dataclasses.replace(layers["plain"], k=64, candidates=64)
    output = every_group(x)
    proof = hire.certified_top_k(x, rows, quantized, k=K, candidates=CANDIDATES)
    with jax.set_mesh(jax.make_mesh((4,), ("rows",), (kind,))):
        np.testing.assert_array_equal(softmax(x).indices, expected.indices)
        sharded = softmax.sharded("rows")
        assert hire.recall(sharded(x).indices, x @ rows.T, K).min() == 1
        np.testing.assert_array_equal(
            sharded.top_k_with_normalizer(x).top.indices, sharded(x).indices
        )
        np.testing.assert_allclose(every_group.sharded("rows")(x), output, rtol=1e-4, atol=1e-2)
        again = hire.certified_top_k(x, rows, quantized, k=K, candidates=CANDIDATES)
        np.testing.assert_array_equal(again.proved, proof.proved)
        with pytest.raises(ValueError, match="'rows'"):
            sharded.sharded("rows")
        with pytest.raises(ValueError, match="'rows'"):
            layers["plain"].sharded("rows").sharded("rows")


def test_queries_and_rows_meet_in_their_common_type(unchecked):
    whole = jnp.asarray([[112, 0], [0, 7]], jnp.int8)
    x = jnp.asarray([[0.4, 0.4]])
    assert row_scores(x, whole).tolist() == [[pytest.approx(44.8), pytest.approx(2.8)]]
    several = row_scores(jnp.concatenate([x, 2 * x]), whole)
    np.testing.assert_allclose(several, [[44.8, 2.8], [89.6, 5.6]], rtol=1e-6)
    sums = weighted_row_sum(jnp.asarray([[0.5, 1.0], [1.0, 0.0]]), whole)
    assert sums.tolist() == [[56.0, 7.0], [112.0, 0.0]]
    half = jnp.asarray([[2.0, 0.5]], jnp.float16)
    assert row_scores(jnp.asarray([[1e5, 2.0]]), half).tolist() == [[200001.0]]  # 1e5 is no float16
    fine = jnp.asarray([[1 + 2.0**-10, 1.0]])  # which bfloat16 rounds to 1
    assert row_scores(fine, jnp.asarray([[1.0, -1.0]], jnp.bfloat16)).tolist() == [[2.0**-10]]
    eighth = jnp.asarray([[1.5, 0.875]], jnp.float8_e4m3fn)
    assert row_scores(fine, eighth).tolist() == [
        [pytest.approx(1.5 * (1 + 2.0**-10) + 0.875, rel=1e-7)]
    ]
    several = jnp.concatenate([fine] * 3)
    assert (
        row_scores(several, eighth).tolist()
        == [[pytest.approx(1.5 * (1 + 2.0**-10) + 0.875, rel=1e-7)]] * 3
    )
    with pytest.raises(ValueError, match="int32"):
        hire.high_recall_top_k(
            jnp.asarray([[1, 2]]), half, hire.Quantized.fit(half, 8), k=1, candidates=1
        )


def test_projected_queries_keep_their_precision():
    rng = np.random.default_rng(2)
    rows = jnp.asarray(rng.normal(size=(50, 8)), jnp.bfloat16)
    estimator = hire.LowRank.fit(rows, 8)
    x = rng.normal(size=(20, 8)).astype(np.float32)
    exact = (x.astype(np.float64) @ np.asarray(estimator.projection, np.float64).T) @ np.asarray(
        estimator.factors, np.float64
    ).T
    np.testing.assert_allclose(estimator.scores(jnp.asarray(x)), exact, rtol=1e-5, atol=1e-5)


def test_the_same_rows_in_another_precision_and_no_others():
    rng = np.random.default_rng(3)
    rows = jnp.asarray(rng.normal(size=(40, 24)), jnp.float32)
    original = fingerprint(rows)
    for dtype in (jnp.bfloat16, jnp.float16):
        assert same_rows(original, fingerprint(rows.astype(dtype))) and same_rows(
            fingerprint(rows.astype(dtype)), original
        )
    for others in (
        rows * (1 + 2.0**-10),
        rows.at[3, 5].add(2.0**-20),
        rows[::-1],
        rows.at[0, 0].set(-rows[0, 0]),
        rows[:, ::-1],
    ):
        assert not same_rows(original, fingerprint(others))
    assert not same_rows(
        fingerprint(rows.astype(jnp.bfloat16)), fingerprint(rows.astype(jnp.float16))
    )
    with pytest.raises(ValueError, match=r"\(40, 24\)"):
        hire.high_recall_top_k(
            rows[:2], rows * (1 + 2.0**-10), hire.Quantized.fit(rows, 8), k=1, candidates=2
        )


def test_what_is_kept_of_an_array_goes_with_it():
    rows = jnp.ones((30, 4)) * 3
    place = id(rows)
    cached_fingerprint(rows)
    assert cached_fingerprint.known[place][0]() is rows
    del rows
    gc.collect()
    assert place not in cached_fingerprint.known
    changing = np.ones((30, 4), np.float32)
    first = np.asarray(cached_fingerprint(changing))
    changing[0, 0] = 2
    assert not same_rows(first, cached_fingerprint(changing))


def test_values_that_are_not_finite_are_refused_by_fits(given):
    rows, x, estimator, quantized = given
    states = np.random.default_rng(4).normal(size=(200, WIDTH)).astype(np.float32)
    for bad in (np.nan, np.inf, -np.inf):
        broken = rows.at[17, 3].set(bad)
        for fit in (
            lambda rows: hire.LowRank.fit(rows, 8),
            lambda rows: hire.Quantized.fit(rows, 8),
        ):
            with pytest.raises(ValueError, match="row 17"):
                fit(broken)
        with pytest.raises(ValueError, match="row 17"):
            ExactRowsEstimator.fit(broken, hire.Quantized.fit(rows, 8), 2, calibration=x)
        asked = states.copy()
        asked[17, 3] = bad
        with pytest.raises(ValueError, match="row 17"):
            hire.choose_candidates(rows, estimator, asked, k=K, recall=0.5)
        with pytest.raises(ValueError, match="'LR'"):
            hire.tune(
                rows,
                {"LR": estimator, "Q": quantized},
                states,
                k=K,
                recall=0.5,
                cost=lambda estimator, _: bad if estimator is not quantized else 1,
            )


def test_recall_of_queries_without_a_top_k_is_no_number():
    scores = jnp.asarray([[1.0, jnp.nan, 3.0], [1.0, 2.0, 3.0]])
    result = hire.recall(jnp.asarray([[0, 2], [1, 2]]), scores, 2)
    assert bool(jnp.isnan(result[0])) and result[1] == 1


def test_recall_counts_an_index_once_and_none_that_is_no_row():
    scores = jnp.asarray([[1.0, -jnp.inf, -jnp.inf, 0.5]])
    assert hire.recall(jnp.asarray([[1, 1]]), scores, 4).tolist() == [
        0.25
    ]  # one of the two that tie at -inf
    assert hire.recall(jnp.asarray([[0, -1]]), scores, 2).tolist() == [0.5]
    assert hire.recall(jnp.asarray([[0, 4]]), scores, 2).tolist() == [0.5]
    assert hire.recall(jnp.asarray([[0, 3]]), scores, 2).tolist() == [1.0]


def test_a_call_and_the_normalizer_use_one_search(given):
    """Also of a cascade, whose first estimator drops rows that its scores of all rows would
    nominate.
    """
    rows, x, low_rank, quantized = given
    states = jnp.asarray(np.random.default_rng(5).normal(size=(64, WIDTH)), jnp.float32)
    for estimator in (
        low_rank,
        quantized,
        hire.Cascade((hire.LowRank.fit(rows, 16, bits=4), quantized), (300,)),
    ):
        softmax = hire.HireSoftmax(rows, estimator, 32, 100)
        np.testing.assert_array_equal(
            softmax(states).indices, softmax.top_k_with_normalizer(states).top.indices
        )


def test_a_cascade_with_estimators_of_other_rows_is_refused(given):
    rows, _, estimator, _ = given
    with pytest.raises(ValueError, match="9000"):
        hire.Cascade((estimator, hire.Quantized.fit(rows + 1, 8)), (200,))


def test_a_transposed_head_is_refused_before_anything_is_built(unchecked):
    with pytest.raises(ValueError, match=r"\(576, 49152\).*rows\.T"):
        hire.LowRank.fit(jnp.zeros((576, 49152), jnp.bfloat16), 64)
    with pytest.raises(ValueError, match=r"\(128, 400\).*rows\.T"):
        hire.LowRank.fit(jnp.ones((128, 400)), 8, calibration=np.ones((5, 128), np.float32))
    quantized = hire.Quantized.fit(jnp.ones((16, 300)), 8)
    with pytest.raises(ValueError, match=r"\(2, 16\).*rows\.T"):
        hire.high_recall_top_k(jnp.ones((2, 16)), jnp.ones((16, 300)), quantized, k=1, candidates=2)


def test_rows_of_numpy_are_sent_to_the_device_once(given):
    rows, x, estimator, _ = given
    softmax = hire.HireSoftmax(np.asarray(rows), estimator, K, CANDIDATES)
    assert isinstance(softmax.rows, jax.Array)
    up = np.asarray(rows[:512])
    layer = hire.HireFFN(up, up, hire.Quantized.fit(up, 8), k=2, candidates=4)
    assert isinstance(layer.up, jax.Array) and isinstance(layer.down, jax.Array)


def test_one_query_that_is_not_finite_leaves_the_others_of_a_shared_selection_alone(layers, given):
    x = given[1]
    for bad in (jnp.nan, jnp.inf):
        result = layers["shared"](x.at[1].set(bad))
        alone = layers["shared"](x[jnp.asarray([0, 2])])
        np.testing.assert_allclose(result[jnp.asarray([0, 2])], alone, rtol=1e-4, atol=1e-3)
        assert not bool(jnp.isfinite(result[1]).any())


def test_an_activation_that_is_not_supported_is_refused(layers):
    gated = layers["gated"]
    for activation in (None, "relu", "gelu"):
        with pytest.raises(ValueError, match="'gelu_tanh' or 'silu'"):
            dataclasses.replace(gated, activation=activation)
    with pytest.raises(ValueError, match="'gelu_tanh'"):
        dataclasses.replace(layers["plain"], activation="gelu_tanh")
    assert dataclasses.replace(gated, activation="gelu_tanh").activation == "gelu_tanh"


def test_rows_of_any_scale_are_fitted():
    rng = np.random.default_rng(6)
    rows, x = rng.normal(size=(200, 16)), rng.normal(size=(5, 16)).astype(np.float32)
    for scale in (1e-33, 1e-20, 1.0, 1e20, 1e36):
        scaled = jnp.asarray(rows * scale, jnp.float32)
        for estimator in (
            hire.LowRank.fit(scaled, 16),
            hire.LowRank.fit(scaled, 16, bits=8),
            hire.Quantized.fit(scaled, 8),
        ):
            result = np.asarray(estimator.scores(jnp.asarray(x)), np.float64) / scale
            np.testing.assert_allclose(result, x @ rows.T, atol=0.2)

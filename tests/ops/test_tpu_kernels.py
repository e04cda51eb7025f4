"""Pallas TPU kernels against their references, in TPU interpret mode, which also finds races and
reads out of bounds.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

import hire
from hire.ops.sortable import EMPTY, index_mask, pack_buckets, sortable_bits
from hire.ops.tpu import bucket_scores, example_arguments, group_ffn, row_scores

blocked = row_scores.blocks
INTERPRET = pltpu.InterpretParams(detect_races=True)
TYPES = st.sampled_from([jnp.float32, jnp.bfloat16])
SEEDS = st.integers(0, 2**31)
QUICK = [
    Phase.generate
]  # interpreted kernels take seconds: a failing example is shown as it was drawn


def close(result, expected, tolerance):
    assert result.shape == expected.shape and result.dtype == jnp.float32
    np.testing.assert_allclose(
        result, expected, atol=tolerance * float(jnp.abs(expected).max()) + 1e-6
    )


def test_the_ffn_reference_by_hand():
    x, up = (
        jnp.asarray([[[1.0, 2.0]]]),
        jnp.arange(16.0)[:, None] * jnp.asarray([[1.0, -1.0]]),
    )  # neuron i gives -i: silent
    up = (
        up.at[8].set(jnp.asarray([3.0, 1.0])).at[3].set(jnp.asarray([0.0, 2.0]))
    )  # neurons 8 and 3 give 5 and 4
    down = jnp.ones((16, 2)).at[8].set(jnp.asarray([10.0, 0.0]))
    layer = x, up, down
    assert group_ffn.ffn_reference(*layer, jnp.asarray([[1]]), k=1).tolist() == [[[50.0, 0.0]]]
    assert group_ffn.ffn_reference(*layer, jnp.asarray([[1, 0]]), k=2).tolist() == [[[54.0, 4.0]]]
    assert group_ffn.ffn_reference(*layer, jnp.asarray([[0, 1]]), k=1).tolist() == [
        [[50.0, 0.0]]
    ]  # the better of the two


@settings(max_examples=6, phases=QUICK)
@given(
    TYPES,
    st.sampled_from([(1, 1), (1, 17), (3, 1), (2, 3)]),
    st.sampled_from([8, 32]),
    st.sampled_from([1, 5, 17, 40]),
    SEEDS,
    st.data(),
)
def test_the_ffn_kernel_is_its_reference(dtype, calls, group, count, seed, data):
    layer = example_arguments.of_groups(
        b=calls[0], n=calls[1], c=count, f=512, d=128, group=group, dtype=dtype, seed=seed
    )
    k = data.draw(st.integers(1, count))
    if k < count:  # a group named twice, as it may be when all are kept, ties with itself
        named = [
            np.random.default_rng(seed).permutation(512 // group)[:count] for _ in range(calls[0])
        ]
        layer, k = (*layer[:3], jnp.asarray(named)), min(k, len(named[0]))
    how = dict(k=k, group=group)
    close(
        group_ffn.ffn(*layer, **how, interpret=INTERPRET),
        group_ffn.ffn_reference(*layer, **how),
        2e-5,
    )


@settings(max_examples=3, phases=QUICK)
@given(
    TYPES,
    st.sampled_from([1, 2]),
    st.sampled_from([1, 128, 150]),
    st.sampled_from([1024, 2048]),
    SEEDS,
)
def test_the_kernel_of_rows_is_its_reference(dtype, batch, count, width, seed):
    picked = example_arguments.of_rows(b=batch, c=count, m=512, d=width, dtype=dtype, seed=seed)
    close(
        row_scores.scores(*picked, interpret=INTERPRET), row_scores.scores_reference(*picked), 1e-5
    )


@settings(max_examples=5, phases=QUICK)
@given(
    st.sampled_from([4, 8]),
    st.sampled_from([1, 5, 16]),
    st.sampled_from([700, 2048, 3000]),
    st.sampled_from([128, 256]),
    st.sampled_from([128, 1024]),
    st.integers(1, 3),
    SEEDS,
)
def test_the_kernel_of_scores_keeps_the_best_of_every_bucket(
    bits, batch, count, width, buckets, per_bucket, seed
):
    x, codes, scale = example_arguments.of_scores(b=batch, m=count, d=width, bits=bits, seed=seed)
    x = x.astype(jnp.bfloat16).astype(jnp.float32)  # as the kernel rounds it
    result = bucket_scores.bucket_top_k(
        x, codes, scale, bits=bits, buckets=buckets, per_bucket=per_bucket, interpret=INTERPRET
    )
    exact = bucket_scores.scores_reference(x, codes, scale, bits=bits)
    keys, cut = pack_buckets(exact, buckets), index_mask(-(-count // buckets))
    places, values = (
        cut - (result & cut),
        jax.lax.bitcast_convert_type(sortable_bits(result & ~cut), jnp.float32),
    )
    expected = jnp.sort(
        jnp.where(
            keys == EMPTY,
            -jnp.inf,
            jax.lax.bitcast_convert_type(sortable_bits(keys & ~cut), jnp.float32),
        ),
        axis=1,
    )
    for rank in range(min(per_bucket, keys.shape[1])):
        filled = np.asarray(expected[:, -1 - rank] > -jnp.inf)
        assert (np.asarray(result[rank] != EMPTY) == filled).all()
        rounding = 0.02 * float(
            jnp.abs(exact).max()
        )  # of the key's lowest bits and, at 4 bits, of the split queries
        np.testing.assert_allclose(
            np.asarray(values[rank])[filled],
            np.asarray(expected[:, -1 - rank])[filled],
            atol=rounding,
        )
        row = np.minimum(np.asarray(places[rank]) * buckets + np.arange(buckets), count - 1)
        named = np.take_along_axis(np.asarray(exact), row, axis=1)
        np.testing.assert_allclose(named[filled], np.asarray(values[rank])[filled], atol=rounding)


@pytest.fixture
def interpreted(monkeypatch):
    for module, name in (
        (row_scores, "scores"),
        (bucket_scores, "bucket_top_k"),
        (group_ffn, "ffn"),
    ):
        monkeypatch.setattr(module, name, partial(getattr(module, name), interpret=INTERPRET))


def test_the_softmax_is_the_same_by_its_kernels(interpreted):
    rng = np.random.default_rng(0)
    row_scores = jnp.asarray(
        rng.normal(size=(8192, 1000)) @ np.diag(np.arange(1, 1001) ** -0.5), jnp.float32
    )  # not whole tiles
    x = jnp.asarray(rng.normal(size=(2, 1000)), jnp.bfloat16)
    estimator = hire.LowRank.fit(row_scores, 512, bits=8)
    how = dict(k=8, candidates=128)
    plain = hire.HireSoftmax(row_scores, estimator, **how, implementation="xla")(x)
    blocks = blocked(row_scores)
    assert blocks.shape == (8192, 8, 128)
    assert (
        hire.HireSoftmax(blocks, estimator, **how, implementation="xla")(x).indices.tolist()
        == plain.indices.tolist()
    )
    result = hire.HireSoftmax(blocks, estimator, **how, implementation="pallas")(x)
    assert result.indices.tolist() == plain.indices.tolist()
    np.testing.assert_allclose(result.values, plain.values, rtol=1e-5)


@pytest.mark.parametrize("how", [dict(), dict(static_groups=2), dict(share_selection=True)])
def test_the_layer_is_the_same_by_its_kernel(interpreted, how):
    rng = np.random.default_rng(1)
    up, down = (jnp.asarray(rng.normal(size=(512, 128)), jnp.float32) for _ in range(2))
    x, common = jnp.asarray(rng.normal(size=(3, 128)), jnp.float32), how.get("static_groups", 0)
    layer = hire.HireFFN(
        up, down, hire.Quantized.fit(up[8 * common :], 8), k=6, candidates=16, **how
    )
    result, expected = (
        dataclasses.replace(layer, implementation=implementation)(x)
        for implementation in ("pallas", "xla")
    )
    np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-3)


def test_a_named_implementation_runs_or_is_refused():
    row_scores = jnp.ones((8192, 128))
    blocks = blocked(row_scores)
    estimators = hire.Quantized.fit(row_scores, 8), hire.LowRank.fit(row_scores, 8)
    search = partial(hire.high_recall_top_k, jnp.ones((1, 128)), k=1)
    with pytest.raises(
        ValueError, match="implementation = 'fast': expected one of auto, xla, pallas"
    ):
        hire.HireSoftmax(row_scores, estimators[0], k=1, candidates=8, implementation="fast")
    with pytest.raises(
        ValueError, match=r"expected rows in hire.ops.tpu.row_scores.blocks, not \(8192, 128\)"
    ):
        search(row_scores, estimators[0], candidates=8, implementation="pallas")
    refused = (
        (estimators[0], 129, "k' up to 128"),
        (estimators[1], 8, "expected a quantized estimator"),
    )
    for estimator, candidates, message in refused:
        with pytest.raises(ValueError, match=message):
            search(blocks, estimator, candidates=candidates, implementation="pallas")
    with pytest.raises(ValueError, match="groups of 8 to 128 rows, not 4"):
        hire.HireFFN(row_scores, row_scores, estimators[0], group_size=4, implementation="pallas")
    with pytest.raises(ValueError, match="[Ii]nterpret"):  # no TPU here
        search(blocks, estimators[0], candidates=8, implementation="pallas")


def test_what_the_kernels_do_not_take():
    with pytest.raises(ValueError, match="group = 4: expected 8, 16"):
        group_ffn.ffn(
            *example_arguments.of_groups(b=1, n=1, c=2, f=64, d=128, group=4), k=1, group=4
        )
    with pytest.raises(ValueError, match="buckets = 1500: expected 128"):
        bucket_scores.bucket_top_k(
            *example_arguments.of_scores(b=1, m=3000, d=128, bits=8),
            bits=8,
            buckets=1500,
            per_bucket=1,
        )

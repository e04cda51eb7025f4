"""DA-TOP-k over four devices of one process: against one device, by hand, and by what its compiled
program sends.
"""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import hire
from hire.distributed import RowSharding
from hire.estimators.exact_rows import ExactRowsEstimator
from hire.lab.data.model_states import hidden_states
from hire.lab.paths import ROOT
from hire.lab.tpu.bundle_parser import bytes_sent
from hire.layers.ffn import HireFFN
from hire.models import Decoder, preset
from hire.ops.top_k import expected_recall

FULL = math.inf


def mesh(*sizes: int):
    return jax.make_mesh(sizes, ("chips", "texts")[: len(sizes)], (AxisType.Auto,) * len(sizes))


def softmax_of(rng, m: int, d: int, k: int, candidates: int, bits=8, **how) -> hire.HireSoftmax:
    rows = jnp.asarray(rng.normal(size=(m, d)), jnp.float32)
    return hire.HireSoftmax(rows, hire.Quantized.fit(rows, bits), k=k, candidates=candidates, **how)


def same(ours: hire.TopK, theirs: hire.TopK):
    np.testing.assert_allclose(ours.values, theirs.values, rtol=1e-5, atol=1e-5)
    assert ours.indices.tolist() == theirs.indices.tolist()


def test_counts_per_device_by_hand():
    with jax.set_mesh(mesh(4)):
        # 32 of 4 devices: 8 each, give or take sqrt(8 * 3/4) = 2.449
        assert [
            RowSharding("chips", oversample_sigmas).per_device_count(32, 1000)
            for oversample_sigmas in (0, 1, 3, FULL)
        ] == [8, 11, 16, 32]
        assert (
            RowSharding("chips", 3).per_device_count(1, 1000) == 1
            and RowSharding("chips", 3).per_device_count(32, 10) == 10
        )
        interleaved = RowSharding("chips", interleaved=True, num_rows=10)
        assert np.array(interleaved.shard_rows(jnp.arange(10) + 1)).tolist() == [
            1,
            5,
            9,
            2,
            6,
            10,
            3,
            7,
            0,
            4,
            8,
            0,
        ]
        assert interleaved.storage_index(jnp.arange(10), 12).tolist() == [
            0,
            3,
            6,
            9,
            1,
            4,
            7,
            10,
            2,
            5,
        ]
        assert np.array(interleaved.shard_rows(jnp.arange(16), 2)).tolist() == [
            0,
            1,
            8,
            9,
            2,
            3,
            10,
            11,
            4,
            5,
            12,
            13,
            6,
            7,
            14,
            15,
        ]


@settings(max_examples=5)
@given(st.integers(8, 200), st.integers(1, 5), st.booleans(), st.data())
def test_with_full_slack_the_answer_is_that_of_one_device(m, b, interleaved, data):
    k = data.draw(st.integers(1, max(1, m // 4 - 3)))
    rng = np.random.default_rng(m)
    alone = softmax_of(rng, m, 8, k, m)  # all are candidates
    x = jnp.asarray(rng.normal(size=(b, 8)), jnp.float32)
    with jax.set_mesh(mesh(4)):
        on_devices = alone.sharded(RowSharding("chips", FULL, interleaved))
        assert (
            len(on_devices.rows.sharding.device_set) == 4
            and on_devices.rows.shape[0] == -(-m // 4) * 4
        )
        same(on_devices(x), alone(x))
        result, reference = on_devices.top_k_with_normalizer(x), alone.top_k_with_normalizer(x)
        same(result.top, reference.top)
        np.testing.assert_allclose(result.log_normalizer, reference.log_normalizer, rtol=1e-5)
        some = jnp.asarray(rng.integers(0, m, (b, 3)), jnp.int32)
        np.testing.assert_allclose(
            on_devices.exact_logits(x, some), alone.exact_logits(x, some), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("m", [9, 13])
def test_a_device_of_padding_alone_leaves_the_normalizer_finite(m):
    # Four devices hold 3, 3, 3 and 0 rows of 9, and 4, 4, 4 and 1 of 13.
    rng = np.random.default_rng(m)
    alone = softmax_of(rng, m, 8, 1, m)
    x = jnp.asarray(rng.normal(size=(2, 8)), jnp.float32)
    logits = np.asarray(x, np.float64) @ np.asarray(alone.rows, np.float64).T
    with jax.set_mesh(mesh(4)):
        result = alone.sharded(RowSharding("chips", FULL)).top_k_with_normalizer(x)
    np.testing.assert_allclose(result.log_normalizer, np.log(np.exp(logits).sum(axis=1)), rtol=1e-5)
    # All rows are candidates: nothing is estimated.
    np.testing.assert_allclose(result.normalizer_stderr, 0.0, atol=1e-6)


def test_padding_is_never_selected():
    rows = jnp.full((9, 2), -1.0)  # every real score is below the 0 of padding
    alone = hire.HireSoftmax(rows, hire.Quantized.fit(rows, 8), k=1, candidates=9)
    x = jnp.ones((2, 2))
    for interleaved in (False, True):
        with jax.set_mesh(mesh(2)):
            on_devices = alone.sharded(RowSharding("chips", FULL, interleaved))
            assert on_devices.rows.shape[0] == 10 and on_devices(x).values.tolist() == [[-2.0]] * 2
            assert (
                on_devices(x).indices.max() < 9
                and on_devices.top_k_with_normalizer(x).top.indices.max() < 9
            )
            np.testing.assert_allclose(
                on_devices.top_k_with_normalizer(x).log_normalizer, -2 + math.log(9), rtol=1e-6
            )


def test_recall_with_oversampling_is_the_expected_one():
    rng = np.random.default_rng(0)
    m, k, queries = 4096, 32, 400
    rows = jnp.asarray(rng.normal(size=(m, 32)), jnp.float32)
    x = jnp.asarray(rng.normal(size=(queries, 32)), jnp.float32)
    alone = hire.HireSoftmax(rows, hire.Quantized.fit(rows, 8), k=k, candidates=m // 2)
    with jax.set_mesh(mesh(4)):
        for oversample_sigmas, sent in ((0, 8), (1, 11)):
            axis = RowSharding("chips", oversample_sigmas)
            assert axis.per_device_count(k, m) == sent
            result = hire.recall(alone.sharded(axis)(x).indices, x @ rows.T, k)
            output = expected_recall(m, k, buckets=4, per_bucket=sent)
            assert abs(result.mean() - output) < 4 * result.std() / queries**0.5 + 1e-3, (
                result.mean(),
                output,
            )


def compiled(layer, x) -> str:
    leaves, tree = jax.tree.flatten(layer)
    return jax.jit(lambda leaves, x: tree.unflatten(leaves)(x)).lower(leaves, x).compile().as_text()


@pytest.mark.parametrize("oversample_sigmas", [0, 3, FULL])
def test_what_travels_does_not_depend_on_the_vocabulary(rng, oversample_sigmas):
    k, b, moved = 16, 3, set()
    for m in (1024, 4096):
        with jax.set_mesh(mesh(4)):
            axis = RowSharding("chips", oversample_sigmas)
            on_devices = softmax_of(rng, m, 8, k, 64).sharded(axis)
            x = jnp.zeros((b, 8))
            moved.add(bytes_sent(compiled(on_devices, x)))
            assert moved == {4 * axis.per_device_count(k, m) * 8 * b}
    assert max(moved) <= 4 * k * 8 * b


def test_the_count_of_bytes_would_see_scores_that_travel(rng):
    with jax.set_mesh(mesh(4)):
        rows = RowSharding("chips").shard_rows(jnp.zeros((1024, 8)))

        def gathered(rows, x):
            return jax.lax.all_gather(x @ rows.T, "chips", axis=1, tiled=True)

        whole = jax.shard_map(gathered, in_specs=(P("chips"), P()), out_specs=P(), check_vma=False)
        assert (
            bytes_sent(jax.jit(whole).lower(rows, jnp.zeros((3, 8))).compile().as_text())
            == 1024 * 3 * 4
        )


@settings(max_examples=6)
@given(
    st.sampled_from([(8, 64), (4, 36), (8, 56)]),
    st.sampled_from([0, 4]),
    st.booleans(),
    st.booleans(),
)
def test_a_layer_is_the_sum_of_its_shards(shape, common, gated, shared):
    group, groups = shape
    rng = np.random.default_rng(0)
    up, down, gate = (
        jnp.asarray(rng.normal(size=(group * groups, 16)), jnp.float32) for _ in range(3)
    )
    estimator = hire.LowRank.fit((gate if gated else up)[group * common :], 8, bits=8)
    more = dict(
        gate=gate if gated else None,
        activation="silu" if gated else None,
        group_size=group,
        static_groups=common,
        share_selection=shared,
    )
    layer = HireFFN(up, down, estimator, k=12, candidates=groups - common, **more)
    x = jnp.asarray(rng.normal(size=(3, 16)), jnp.float32)
    with jax.set_mesh(mesh(4)):
        on_devices = layer.sharded(RowSharding("chips", 0))
        shares = np.zeros((3, 16), np.float32)
        for chip in range(
            4
        ):  # each device keeps its 3 best groups of every fourth one, static groups included
            owned = np.arange(groups * group).reshape(-1, 4, group)[:, chip].reshape(-1)
            parts = [
                part if part is None else part[owned]
                for part in (up, down, gate if gated else None)
            ]
            first = common // 4
            exact = hire.Quantized.fit((parts[2] if gated else parts[0])[first * group :], 8)
            how = more | dict(gate=parts[2], static_groups=first)
            shares += HireFFN(
                parts[0], parts[1], exact, k=3, candidates=groups // 4 - first, **how
            )(x)
        np.testing.assert_allclose(on_devices(x), shares, rtol=2e-4, atol=2e-4)
        np.testing.assert_allclose(
            jax.jit(HireFFN.dense_reference, static_argnames="tokens_per_selection")(
                on_devices, x, 3
            ),
            shares,
            rtol=2e-4,
            atol=2e-4,
        )


def test_groups_that_do_not_divide_are_filled_up(rng):
    up, down = (jnp.asarray(rng.normal(size=(8 * 10, 16)), jnp.float32) for _ in range(2))
    layer = HireFFN(up, down, hire.Quantized.fit(up, 8), k=10, candidates=10)
    x = jnp.asarray(rng.normal(size=(2, 16)), jnp.float32)
    with jax.set_mesh(mesh(4)):
        on_devices = layer.sharded("chips")
        assert on_devices.up.shape[0] == 96
        np.testing.assert_allclose(on_devices(x), layer(x), rtol=2e-4, atol=2e-4)


def test_only_the_sum_of_a_layer_travels(rng):
    up, down = (jnp.asarray(rng.normal(size=(512, 16)), jnp.float32) for _ in range(2))
    layer = HireFFN(up, down, hire.LowRank.fit(up, 8, bits=8), k=4, candidates=8)
    with jax.set_mesh(mesh(4)):
        assert bytes_sent(compiled(layer.sharded("chips"), jnp.zeros((3, 16)))) == 3 * 16 * 4


def test_a_model_generates_the_same_tokens_on_four_devices(rng):
    config = preset(
        "tiny",
        layers=1,
        vocabulary=510,
        heads=2,
        kv_heads=1,
        head_width=32,
        gated=False,
        ffn_width=256,
    )
    model = Decoder(config, rngs=nnx.Rngs(0))
    softmax = hire.HireSoftmax(
        model.embedding[...],
        hire.LowRank.fit(model.embedding[...], 32, bits=8),
        k=8,
        candidates=510,
    )
    layers = [
        HireFFN(ffn.up[...], ffn.down[...], hire.Quantized.fit(ffn.up[...], 8), k=32, candidates=32)
        for ffn in (block.ffn for block in model.blocks)
    ]
    tokens = jnp.asarray(rng.integers(3, 510, (2, 5)), jnp.int32)
    result = hire.generate(model, tokens, new_tokens=4)
    with jax.set_mesh(mesh(4)):
        axis = RowSharding("chips", interleaved=True)
        on_devices = hire.convert(
            model, softmax=softmax.sharded(axis), ffn=[layer.sharded("chips") for layer in layers]
        )
        assert hire.generate(on_devices, tokens, new_tokens=4).tolist() == result.tolist()
        hidden = hidden_states(on_devices)(tokens)
        np.testing.assert_allclose(
            on_devices.logits(hidden),
            model.logits(hidden_states(model)(tokens)),
            rtol=1e-3,
            atol=1e-3,
        )


def test_a_model_refuses_rows_of_another_model(rng):
    config = preset("tiny", layers=1, vocabulary=64)
    model, other = (Decoder(config, rngs=nnx.Rngs(seed)) for seed in (0, 1))
    softmax = hire.HireSoftmax(
        model.embedding[...], hire.Quantized.fit(model.embedding[...], 8), k=4, candidates=64
    )
    small = hire.Quantized.fit(model.embedding[...], 8)
    tokens = jnp.asarray(rng.integers(3, 64, (2, 5)), jnp.int32)
    with jax.set_mesh(mesh(4)):
        interleaved = RowSharding("chips", interleaved=True)
        with pytest.raises(ValueError, match="64"):
            hire.convert(other, softmax=softmax.sharded(interleaved))
        # Quantized rows are interleaved; the embedding, in which tokens are looked up, stays.
        searched = hire.convert(
            model, softmax=hire.HireSoftmax(small, small, k=4, candidates=64).sharded(interleaved)
        )
        hidden = hidden_states(searched)(tokens)
        np.testing.assert_allclose(hidden, hidden_states(model)(tokens), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(
            searched.logits(hidden), model.logits(hidden), rtol=1e-4, atol=1e-4
        )


def test_the_readme_runs_over_devices(rng):
    *_, code = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    softmax = softmax_of(rng, 64, 8, 4, 64)
    given = dict(
        jax=jax,
        mesh=mesh(4),
        softmax=softmax,
        hidden=jnp.asarray(rng.normal(size=(3, 8)), jnp.float32),
    )
    exec(code, given)
    same(given["top"], softmax(given["hidden"]))


def test_another_axis_may_hold_the_texts(rng):
    alone = softmax_of(rng, 64, 8, 4, 64)
    x = jnp.asarray(rng.normal(size=(6, 8)), jnp.float32)
    with jax.set_mesh(mesh(2, 2)):
        same(alone.sharded(RowSharding("chips", FULL))(x), alone(x))


def test_bad_input_is_refused_in_one_line(rng):
    alone = softmax_of(rng, 40, 8, 20, 30)
    x = jnp.zeros((1, 8))
    with pytest.raises(ValueError, match="chips"):
        alone.sharded("chips")
    with jax.set_mesh(mesh(4)):
        with pytest.raises(ValueError, match="rows.*chips"):
            alone.sharded("rows")
        with pytest.raises(ValueError, match="k = 20"):
            alone.sharded("chips")(x)
        ragged = softmax_of(rng, 42, 8, 2, 30, axis="chips")
        with pytest.raises(ValueError, match="42.*4"):
            ragged(x)
        up = jnp.asarray(rng.normal(size=(64, 8)), jnp.float32)
        with pytest.raises(ValueError, match="static_groups = 2"):
            HireFFN(
                up, up, hire.Quantized.fit(up[16:], 8), k=4, candidates=6, static_groups=2
            ).sharded("chips")
        rows = jnp.asarray(rng.normal(size=(64, 8)), jnp.float32)
        some = ExactRowsEstimator.fit(rows, hire.Quantized.fit(rows, 8), 2, calibration=rows)
        with pytest.raises(ValueError, match="ExactRowsEstimator"):
            hire.HireSoftmax(rows, some, k=2, candidates=4).sharded("chips")

"""HiRE-FFN: grouped top-k by hand, the searched layer against all neurons, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import hire
from hire.lab.data.model_states import hidden_states
from hire.layers.ffn import order_by_usage
from hire.models import Decoder, preset
from hire.models.decoder import FFN
from hire.ops.activations import ACTIVATIONS
from hire.ops.top_k import kth_largest, mask_top_groups

# Compiled whole: drawn shapes would compile every operation anew.
called = jax.jit(lambda ffn, x: ffn(x))
masked = jax.jit(hire.HireFFN.dense_reference, static_argnames="tokens_per_selection")


def test_groups_are_scored_and_kept_by_hand():
    active = jnp.asarray([[1.0, 2.0, 0.0, -4.0, 0.5, 0.5], [0.0, 0.0, 0.0, 0.0, 0.0, 1.0]])
    assert hire.group_scores(active, 2).tolist() == [[3.0, 4.0, 1.0], [0.0, 0.0, 1.0]]
    assert hire.group_scores(active, 3, "max").tolist() == [[2.0, 4.0], [0.0, 1.0]]
    kept = mask_top_groups(active, hire.group_scores(active, 2), 2)
    assert kept.tolist() == [[1.0, 2.0, 0.0, -4.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0, 1.0]]


@given(
    scores=st.lists(
        st.floats(-3, 3, width=32) | st.sampled_from([0.0, 1.0, np.inf, -np.inf]),
        min_size=1,
        max_size=9,
    ),
    data=st.data(),
)
def test_the_kth_score_is_that_of_a_sort(scores, data):
    k = data.draw(st.integers(1, len(scores)))
    assert kth_largest(jnp.asarray([scores]), k).tolist() == [[sorted(scores)[-k]]]


def test_dropped_groups_get_no_gradient():
    active = jnp.asarray([1.0, 2.0, 5.0, 0.0])
    slope = jax.grad(lambda a: jnp.sum(mask_top_groups(a, hire.group_scores(a, 2), 1) ** 2))(active)
    assert slope.tolist() == [0.0, 0.0, 10.0, 0.0]


def layer(rng, groups, group_size, d, gated):
    """Random matrices of a layer: up, down, gate."""
    parts = [jnp.asarray(rng.normal(size=(groups * group_size, d)), jnp.float32) for _ in range(3)]
    return parts[0], parts[1], parts[2] if gated else None


def by_hand(x, up, down, gate, group_size, k, activation):
    """The layer in numpy, one query and group after the other, when every group is a candidate and
    none is common.
    """
    out = np.zeros_like(x)
    for row, query in enumerate(x):
        first = up @ query
        if gate is None:
            active = np.maximum(first, 0)
        else:
            z = gate @ query
            if activation == "silu":
                active = z / (1 + np.exp(-z)) * first
            else:
                active = 0.5 * z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3))) * first
        scores = np.abs(active).reshape(-1, group_size).sum(1)
        for group in np.argsort(-scores, kind="stable")[:k]:
            members = slice(group * group_size, (group + 1) * group_size)
            out[row] += active[members] @ down[members]
    return out


shapes = dict(
    b=st.sampled_from([1, 2, 5]),
    groups=st.sampled_from([3, 20, 150]),
    group_size=st.sampled_from([1, 4, 8, 150]),
    activation=st.sampled_from(ACTIVATIONS),
    share=st.floats(0.01, 0.9),
    seed=st.integers(0, 2**31),
)


@given(**shapes, shared=st.booleans())
def test_with_every_group_a_candidate_it_is_the_layer_in_numpy(
    b, groups, group_size, activation, share, seed, shared
):
    rng = np.random.default_rng(seed)
    up, down, gate = layer(rng, groups, group_size, 6, activation != "relu")
    x = jnp.asarray(rng.normal(size=(b, 6)), jnp.float32)
    k = max(1, int(share * groups))
    estimator = hire.Quantized.fit(up if gate is None else gate, 8)
    ffn = hire.HireFFN(
        up,
        down,
        estimator,
        gate,
        group_size=group_size,
        k=k,
        candidates=groups,
        share_selection=shared,
        activation=activation,
    )
    x, up, down = map(np.asarray, (x, up, down))
    gate = None if gate is None else np.asarray(gate)
    expected = by_hand(x, up, down, gate, group_size, k, activation)
    # Up to 11,250 float32 terms are summed in another order.
    rounding = 1e-3 + 1e-5 * np.abs(expected).max()
    x = jnp.asarray(x)
    np.testing.assert_allclose(called(ffn, x), expected, atol=rounding)
    np.testing.assert_allclose(masked(ffn, x, b), expected, atol=rounding)


@given(
    **shapes,
    shared=st.booleans(),
    common=st.floats(0, 0.9),
    both=st.booleans(),
    spare=st.sampled_from([4, 999]),
)
def test_the_fast_paths_are_the_masked_layer(
    b, groups, group_size, activation, share, seed, shared, common, both, spare
):
    rng = np.random.default_rng(seed)
    up, down, gate = layer(rng, groups, group_size, 6, activation != "relu")
    x = jnp.asarray(rng.normal(size=(b, 6)), jnp.float32)
    k = max(1, int(share * groups))
    first = int(common * (k - 1))
    candidates = min(groups - first, k - first + groups // spare)
    beyond = slice(first * group_size, None)
    estimator = hire.LowRank.fit(
        (up if gate is None else gate)[beyond], min(4, len(up[beyond])), bits=8
    )
    second = hire.Quantized.fit(up[beyond], 8) if activation != "relu" and both else None
    settings = dict(
        group_size=group_size,
        k=k,
        candidates=candidates,
        static_groups=first,
        share_selection=shared,
        activation=activation,
    )
    ffn = hire.HireFFN(up, down, estimator, gate, second, **settings)
    np.testing.assert_allclose(called(ffn, x), masked(ffn, x, b), rtol=2e-5, atol=1e-3)


def test_it_keeps_what_training_keeps(rng):
    config = preset("tiny", gated=False, ffn_width=128, group_size=8, kept=0.25, sparse_layers=(1,))
    trained = FFN(config, 1, jnp.float32, nnx.Rngs(0))
    x = jnp.asarray(rng.normal(size=(3, 64)), jnp.float32)
    up, down = trained.up[...], trained.down[...]
    ffn = hire.HireFFN(up, down, hire.Quantized.fit(up, 8), group_size=8, k=4, candidates=16)
    np.testing.assert_allclose(ffn(x), trained(x), atol=1e-5)
    dense = FFN(config, 0, jnp.float32, nnx.Rngs(0))
    np.testing.assert_allclose(dense(x), jax.nn.relu(x @ up.T) @ down, atol=1e-5)


def test_the_common_path_is_always_in(rng):
    up, down, _ = layer(rng, 20, 4, 6, False)
    order = order_by_usage(jnp.arange(20.0), 4)  # the last groups are used most
    assert order[:8].tolist() == [76, 77, 78, 79, 72, 73, 74, 75]
    up, down = up[order], down[order]
    ffn = hire.HireFFN(
        up, down, hire.Quantized.fit(up[8:], 8), group_size=4, k=3, candidates=18, static_groups=2
    )
    x = jnp.asarray(rng.normal(size=(2, 6)), jnp.float32)
    active = jax.nn.relu(x @ up.T)
    others = mask_top_groups(active[:, 8:], hire.group_scores(active[:, 8:], 4), 1)
    np.testing.assert_allclose(ffn(x), active[:, :8] @ down[:8] + others @ down[8:], atol=1e-4)


@settings(max_examples=8)
@given(**shapes, shared=st.booleans(), common=st.booleans(), bits=st.sampled_from([4, 8]))
def test_quantized_matrices_are_the_floats_that_they_stand_for(
    b, groups, group_size, activation, share, seed, shared, common, bits
):
    rng = np.random.default_rng(seed)
    parts = layer(rng, groups, group_size, 6, activation != "relu")
    x, k = jnp.asarray(rng.normal(size=(b, 6)), jnp.float32), max(1, int(share * groups))
    small = [part if part is None else hire.Quantized.fit(part, bits) for part in parts]
    floats = [None if part is None else jnp.asarray(by_hand_unpacked(part)) for part in small]
    first = int(common and k > 1)
    how = dict(
        group_size=group_size,
        k=k,
        candidates=groups - first,
        static_groups=first,
        share_selection=shared,
        activation=activation,
    )
    result, expected = (
        hire.HireFFN(
            up,
            down,
            hire.Quantized.fit((up_rows if gate is None else gate_rows)[first * group_size :], 8),
            gate,
            **how,
        )
        for (up, down, gate), (up_rows, _, gate_rows) in ((small, parts), (floats, floats))
    )
    np.testing.assert_allclose(result(x), expected(x), atol=2e-3)
    np.testing.assert_allclose(masked(result, x, b), masked(expected, x, b), atol=2e-3)
    assert result.bytes_read() < expected.bytes_read()


def by_hand_unpacked(rows):
    """The float rows of a Quantized, in numpy: two's complement of 8 bits, or of 4 bits with column
    j beside column j + half.
    """
    codes = np.asarray(rows.codes).astype(np.int64)
    if rows.bits == 4:
        codes = np.concatenate([codes & 15, codes >> 4], axis=1)
        codes = np.where(codes > 7, codes - 16, codes)[:, : rows.width]
    return (codes * np.asarray(rows.scale, np.float64)[:, None]).astype(np.float32)


def test_bytes_by_hand(rng):
    up, down, gate = layer(rng, 10, 2, 8, True)
    estimator = hire.Quantized.fit(up[4:], 8)  # 16 neurons of 8 bytes and a scale of 4 bytes
    settings = dict(group_size=2, k=3, candidates=5, static_groups=2)
    row = 2 * 8 * 4  # one group in one matrix
    assert hire.HireFFN(up, down, estimator, **settings).bytes_read() == 16 * 12 + row * (
        2 * 2 + 5 + 1
    )
    assert hire.HireFFN(
        up, down, estimator, share_selection=True, **settings
    ).bytes_read() == 16 * 12 + row * (2 * 2 + 5 + 5)
    gates = hire.Quantized.fit(gate[4:], 8)
    gated = hire.HireFFN(up, down, gates, gate, estimator, **settings, activation="silu")
    assert gated.bytes_read() == 2 * 16 * 12 + row * (3 * 2 + 2 * 5 + 1)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(group_size=3), "group_size = 3: expected a divisor of the 40 neurons"),
        (dict(k=0), "k = 0: expected a whole number from 1 to 10"),
        (dict(k=3, candidates=2), r"candidates = 2: expected a whole number from 3 to 10"),
        (
            dict(k=3, candidates=4, static_groups=3),
            r"static_groups = 3: expected a whole number from 0 to 2 \(less than k",
        ),
        (
            dict(k=3, candidates=4, static_groups=1),
            r"estimator of rows \(40, 6\): expected \(36, 6\), as the rows are",
        ),
        (
            dict(estimator=hire.Quantized.fit(jnp.ones((40, 6)), 8)),
            r"estimator of other rows \(40, 6\)",
        ),
        (
            dict(up_estimator=hire.Quantized.fit(jnp.ones((40, 6)), 8)),
            "up_estimator without a gate",
        ),
        (dict(gate=jnp.ones((40, 6))), "activation = None: expected 'gelu_tanh' or 'silu'"),
        (dict(gate=jnp.ones((40, 6)), activation="relu"), "activation = 'relu'"),
        (dict(activation="silu"), "activation = 'silu': expected 'relu'"),
        (dict(down=jnp.ones((4, 6))), r"down of shape \(4, 6\): expected \(40, 6\), as up is"),
    ],
)
def test_settings_that_cannot_be_are_refused(unchecked, rng, settings, message):
    up, down, _ = layer(rng, 10, 4, 6, False)
    given = (
        dict(up=up, down=down, estimator=hire.Quantized.fit(up, 8), group_size=4, k=2, candidates=4)
        | settings
    )
    with pytest.raises(ValueError, match=message):
        hire.HireFFN(**given)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(group_size=7), "group_size = 7: expected a divisor of ffn_width = 128"),
        (
            dict(group_size=8, kept=0.01),
            "kept = 0.01: expected a share, at most 1, that leaves one of 16 groups or more",
        ),
        (dict(kept=1.5), "kept = 1.5: expected a share"),
        (dict(sparse_layers=(1, 9)), r"sparse_layers = \(1, 9\): expected layers from 0 to 1"),
    ],
)
def test_a_sparse_model_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        preset("tiny", **changes)


def test_shared_candidates_are_what_any_query_would_keep():
    """The second query's scores are small, yet its two best groups come before the middling ones of
    both, unlike in a sum.
    """
    up = jnp.eye(6)
    x = jnp.asarray([[9.0, 8.0, 5.0, 5.0, 0.0, 0.0], [0.0, 0.0, 0.3, 0.3, 0.5, 0.6]])
    ffn = hire.HireFFN(
        up, up, hire.LowRank.fit(up, 6), group_size=1, k=2, candidates=4, share_selection=True
    )
    assert sorted(ffn.nominate_groups(x)[0].tolist()) == [0, 1, 4, 5]
    pooled = ffn.pool_scores(jnp.asarray(x))
    np.testing.assert_allclose(pooled, [9 / 8, 1, 5 / 8, 5 / 8, 1, 6 / 5], rtol=1e-5)


@pytest.mark.parametrize("shared", [False, True])
def test_a_converted_model_steps_as_it_reads(rng, shared):
    """One text at a time a step has one query, and so has a call of prefill: shared or not, both
    are the trained model.
    """
    config = preset("tiny", vocabulary=300, gated=False, group_size=8, kept=0.25)
    model = Decoder(config, rngs=nnx.Rngs(0))
    ffns = []
    for block in model.blocks:
        up, down = block.ffn.up[...], block.ffn.down[...]
        ffns.append(
            hire.HireFFN(
                up,
                down,
                hire.Quantized.fit(up, 8),
                group_size=8,
                k=4,
                candidates=16,
                share_selection=shared,
            )
        )
    fast = hire.convert(model, ffn=ffns)
    tokens = jnp.asarray(rng.integers(3, 300, (1, 12)), jnp.int32)
    whole = hidden_states(model)(tokens)
    np.testing.assert_allclose(hidden_states(fast)(tokens), whole, atol=2e-4)
    _, cache = fast.prefill(tokens[:, :11], 12)
    np.testing.assert_allclose(fast.step(tokens[:, 11], cache)[0], whole[:, 11], atol=2e-4)
    with pytest.raises(ValueError, match="12 tokens: expected a multiple of 5"):
        hire.convert(model, ffn=ffns, tokens_per_selection=5).prefill(tokens)
    with pytest.raises(
        ValueError, match=r"FFNs of widths \[64\]: expected 2, one a layer, of width 64"
    ):
        hire.convert(model, ffn=ffns[:1])

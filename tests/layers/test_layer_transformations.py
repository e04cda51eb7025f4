"""JAX transformations of every head and layer: the top-k is a mask, so values and gradients are
those of the dense computation at the selected rows.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import hire
from hire.distributed import RowSharding
from hire.lab.studies.adversary import with_64_bits
from hire.ops.implementation import IMPLEMENTATIONS

V, D, K, CANDIDATES = 300, 16, 4, 64
IN_USE = [name for name in IMPLEMENTATIONS if name in ("auto", "xla")]  # "cpu" needs its kernels
CLOSE = dict(rtol=1e-4, atol=1e-4)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


ROWS, BIAS, X = normal(0, V, D), normal(1, V), normal(2, 2, 3, D)
QUANTIZED = hire.Quantized.fit(ROWS, 8)
ALLOWED = normal(3, V) > 0
FEW = jnp.arange(V) % 40 == 0  # fewer than half the candidates: no tail, and no corrections
SEEN = jnp.asarray(np.random.default_rng(4).integers(-1, V, (2, 3, 20)))

# A head: its own fields, and what its calls change.
HEADS = {
    "plain": ({}, {}),
    "bias": (dict(bias=BIAS), {}),
    "soft cap": (dict(soft_cap=3.0), {}),
    "mask": ({}, dict(mask=ALLOWED)),
    "few allowed": ({}, dict(mask=FEW)),
    "logit bias": ({}, dict(logit_bias=normal(5, V))),
    "penalties": ({}, dict(penalties=hire.Penalties(SEEN, 1.4, 0.5, 0.25))),
    "all": (
        dict(bias=BIAS, soft_cap=3.0),
        dict(mask=ALLOWED, logit_bias=normal(5, V), penalties=hire.Penalties(SEEN, 1.4, 0.5, 0.25)),
    ),
}


@pytest.fixture(params=list(HEADS))
def head(request):
    """A softmax with its changes, and the dense function of the same logits."""
    fields, changes = HEADS[request.param]
    softmax = hire.HireSoftmax(ROWS, QUANTIZED, K, CANDIDATES, **fields)
    return softmax, changes, partial(dense_logits, soft_cap=softmax.soft_cap, changes=changes)


def dense_logits(x, rows, bias, soft_cap, changes):
    """The logits of all tokens, in the order of their adjustments, for states `(2, 3, d)`."""
    logits = jnp.einsum("...d,vd->...v", x, rows)
    logits = logits if bias is None else logits + bias[None, None]
    logits = soft_cap * jnp.tanh(logits / soft_cap) if soft_cap else logits
    penalties = changes.get("penalties")
    if penalties is not None:
        counts = jnp.sum(jax.nn.one_hot(penalties.tokens, V), axis=-2)  # -1 is no token
        new = jnp.where(logits > 0, logits / penalties.repetition, logits * penalties.repetition)
        new = new - penalties.presence - penalties.frequency * counts
        logits = jnp.where(counts > 0, new, logits)
    if "logit_bias" in changes:
        logits = logits + changes["logit_bias"][None, None]
    if "mask" in changes:
        logits = jnp.where(changes["mask"][None, None], logits, -jnp.inf)
    return logits


def loss(values):
    """A loss in which every value has another weight."""
    weights = 1 + jnp.arange(values.shape[-1], dtype=jnp.float32)
    return jnp.sum(jnp.sin(values) * jnp.broadcast_to(weights, values.shape))


def assert_same(ours, theirs, **closeness):
    """The same pytrees of finite numbers."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert np.isfinite(one).all()
        np.testing.assert_allclose(one, other, **CLOSE | closeness)


@pytest.mark.parametrize("implementation", IN_USE)
def test_gradients_of_heads_are_those_of_the_masked_dense_head(head, implementation):
    softmax, changes, dense = head
    softmax = dataclasses.replace(softmax, implementation=implementation)
    top = softmax(X, **changes)
    every = dense(X, ROWS, softmax.bias)
    np.testing.assert_allclose(top.values, jax.lax.top_k(every, K)[0], **CLOSE)

    def ours(x, rows, bias):
        return loss(dataclasses.replace(softmax, rows=rows, bias=bias)(x, **changes).values)

    def theirs(x, rows, bias):
        selected = jnp.take_along_axis(dense(x, rows, bias), top.indices, axis=-1)
        return loss(selected)

    arguments = (X, ROWS, softmax.bias)
    expected = jax.jit(jax.grad(theirs, (0, 1, 2)))(*arguments)
    slopes = jax.jit(jax.grad(jax.checkpoint(ours), (0, 1, 2)))(*arguments)
    assert_same(slopes, expected)
    others = np.setdiff1d(np.arange(V), np.unique(top.indices))
    assert not slopes[1][others].any()
    assert np.abs(slopes[0]).sum(axis=-1).min() > 0


def test_normalizers_of_heads_have_the_gradients_of_all_rows(head):
    """With every token among the candidates, or nearly: the estimates of a tail have errors."""
    softmax, changes, dense = head

    def ours(x, rows, bias, candidates):
        searched = dataclasses.replace(softmax, rows=rows, bias=bias, candidates=candidates)
        result = searched.top_k_with_normalizer(x, **changes)
        return jnp.sum(result.log_normalizer) + jnp.sum(result.normalizer_stderr)

    def theirs(x, rows, bias):
        return jnp.sum(jax.nn.logsumexp(dense(x, rows, bias), axis=-1))

    expected = jax.jit(jax.grad(theirs, (0, 1, 2)))(X, ROWS, softmax.bias)
    for candidates, atol in ((V, 1e-4), (CANDIDATES, 0.05)):
        slopes = jax.jit(jax.grad(ours, (0, 1, 2)), static_argnums=3)(
            X, ROWS, softmax.bias, candidates
        )
        assert_same(slopes[:1], expected[:1], rtol=1e-3, atol=atol)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(slopes))
        if candidates == V:
            assert_same(slopes, expected, rtol=1e-3)


def test_heads_over_devices_have_the_same_gradients(head):
    softmax, changes, dense = head
    top = softmax(X, **changes)

    def theirs(x, rows, bias):
        every = dense(x, rows, bias)
        selected = jnp.take_along_axis(every, top.indices, axis=-1)
        return loss(selected) + jnp.sum(jax.nn.logsumexp(every, axis=-1))

    def ours(x, rows, bias, sharded):
        result = dataclasses.replace(sharded, rows=rows, bias=bias).top_k_with_normalizer(
            x, **changes
        )
        total = jnp.sum(result.log_normalizer) + jnp.sum(result.normalizer_stderr)
        return loss(result.top.values) + total

    def of_values(x, sharded):
        return loss(sharded(x, **changes).values)

    expected = jax.jit(jax.grad(theirs, (0, 1, 2)))(X, ROWS, softmax.bias)
    alone = jax.jit(jax.grad(of_values))(X, softmax)
    with jax.set_mesh(jax.make_mesh((4,), ("chips",), (AxisType.Explicit,))):
        sharded = dataclasses.replace(softmax, candidates=V).sharded(
            RowSharding("chips", float("inf"))
        )
        assert sharded(X, **changes).indices.tolist() == top.indices.tolist()
        assert_same(jax.jit(jax.grad(of_values))(X, sharded), alone)
        slopes = jax.jit(jax.grad(ours, (0, 1, 2)))(X, sharded.rows, sharded.bias, sharded)
        assert_same(slopes, expected, rtol=1e-3, atol=1e-3)


def test_heads_are_mapped_scanned_and_built_inside_a_trace(head, monkeypatch):
    softmax, changes, _ = head
    top = softmax(X, **changes)
    penalties = changes.get("penalties")

    def call(softmax, x, seen):
        new = (
            {} if penalties is None else dict(penalties=dataclasses.replace(penalties, tokens=seen))
        )
        return softmax(x, **changes | new)

    def rebuilt(softmax, x, seen):
        return call(dataclasses.replace(softmax, rows=softmax.rows + 0), x, seen)

    def scanned(softmax, x, seen):
        return jax.lax.scan(lambda count, part: (count, call(softmax, *part)), 0, (x, seen))[1]

    two = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), softmax)
    ways = {
        "argument": (jax.jit(call), softmax),
        "built in a trace": (jax.jit(rebuilt), softmax),
        "vmap": (jax.vmap(call, (None, 0, 0)), softmax),
        "vmap of queries": (jax.vmap(jax.vmap(call, (None, 0, 0)), (None, 0, 0)), softmax),
        "vmap of softmaxes": (jax.vmap(call), two),
        "scan": (jax.jit(scanned), softmax),
        "remat": (jax.jit(jax.checkpoint(call)), softmax),
    }
    monkeypatch.setattr("hire.estimators.base.check_same_rows", None)  # no rows are read
    for name, (way, argument) in ways.items():
        result = way(argument, X, SEEN)
        assert result.indices.tolist() == top.indices.tolist(), name
        np.testing.assert_allclose(result.values, top.values, **CLOSE, err_msg=name)


def test_states_of_texts_are_states(head):
    """States `(b, t, d)` are those of `(b * t, d)`; one `(d,)` is a batch without its axis."""
    softmax, changes, dense = head
    top = softmax(X, **changes)
    without_penalties = {name: part for name, part in changes.items() if name != "penalties"}
    logits = softmax.exact_logits(X, top.indices)
    every = dense_logits(X, ROWS, softmax.bias, softmax.soft_cap, {})
    np.testing.assert_allclose(logits, jnp.take_along_axis(every, top.indices, axis=-1), **CLOSE)
    logs = softmax.log_probabilities(X, top.indices, **without_penalties)
    flat = softmax.log_probabilities(
        X.reshape(6, D), top.indices.reshape(6, K), **without_penalties
    )
    np.testing.assert_allclose(logs.reshape(6, K), flat, **CLOSE)
    normalizer = softmax.top_k_with_normalizer(X, **changes)
    assert normalizer.log_normalizer.shape == normalizer.normalizer_stderr.shape == (2, 3)
    alone = softmax.log_probabilities(X[1, 2], top.indices[1, 2], **without_penalties)
    np.testing.assert_allclose(alone, logs[1, 2], **CLOSE)
    none, no_tokens = X[:, :0], top.indices[:, :0]
    assert softmax(none, **without_penalties).indices.shape == (2, 0, K)
    assert softmax.exact_logits(none, no_tokens).shape == (2, 0, K)
    assert softmax.log_probabilities(none, no_tokens, **without_penalties).shape == (2, 0, K)


def test_heads_in_other_types(head, unchecked):
    softmax, changes, _ = head
    top = softmax(X, **changes)
    counted = dataclasses.replace(softmax, k=np.int64(K), candidates=np.int32(CANDIDATES))
    assert counted(X, **changes).indices.tolist() == top.indices.tolist()
    in_numpy = jax.tree.map(np.asarray, changes)
    assert softmax(np.asarray(X), **in_numpy).indices.tolist() == top.indices.tolist()
    half = dataclasses.replace(softmax, rows=ROWS.astype(jnp.bfloat16))
    slope = jax.grad(lambda x: jnp.sum(half(x, **changes).values))(X.astype(jnp.bfloat16))
    assert slope.dtype == jnp.bfloat16 and np.isfinite(slope.astype(jnp.float32)).all()
    with with_64_bits():
        result = softmax(jnp.asarray(np.asarray(X, np.float64)), **changes)
        assert (result.values.dtype, result.indices.dtype) == (jnp.float32, jnp.int32)
        assert result.indices.tolist() == top.indices.tolist()


def test_a_query_that_is_not_finite_leaves_the_others_of_a_head_alone(head):
    softmax, changes, _ = head
    top = softmax.top_k_with_normalizer(X, **changes)
    for bad in (jnp.nan, jnp.inf):
        broken = X.at[1, 1].set(bad)
        result = softmax.top_k_with_normalizer(broken, **changes)
        slope = jax.grad(lambda x: jnp.sum(softmax(x, **changes).values))(broken)
        for ours, theirs in zip(jax.tree.leaves(result), jax.tree.leaves(top), strict=True):
            np.testing.assert_allclose(ours[0], theirs[0], **CLOSE)
            np.testing.assert_allclose(ours[1, ::2], theirs[1, ::2], **CLOSE)
        assert np.isfinite(slope[0]).all() and np.isfinite(slope[1, ::2]).all()


F, GROUP, GROUPS = 96, 4, 24
MATRICES = dict(
    zip(("up", "down", "gate"), (normal(seed, F, D) for seed in (6, 7, 8)), strict=True)
)
COUNTS = dict(group_size=GROUP, k=6, candidates=12)
LAYERS = {
    "plain": dict(COUNTS),
    "silu": dict(COUNTS, activation="silu"),
    "gelu": dict(COUNTS, activation="gelu_tanh"),
    "static": dict(COUNTS, static_groups=2),
    "shared": dict(COUNTS, activation="silu", share_selection=True),
    "two estimators": dict(COUNTS, activation="gelu_tanh", up_estimator=True),
    "every group": dict(COUNTS, activation="silu", k=GROUPS, candidates=GROUPS),
}


@pytest.fixture(params=list(LAYERS))
def layer(request):
    fields = dict(LAYERS[request.param])
    is_gated = "activation" in fields
    static_rows = fields.get("static_groups", 0) * GROUP
    estimated = MATRICES["gate" if is_gated else "up"][static_rows:]
    if fields.pop("up_estimator", False):
        fields["up_estimator"] = hire.Quantized.fit(MATRICES["up"], 8)
    return hire.HireFFN(
        MATRICES["up"],
        MATRICES["down"],
        hire.Quantized.fit(estimated, 8),
        MATRICES["gate"] if is_gated else None,
        **fields,
    )


def activations(layer, x, up, gate):
    """The activations `(b, f)` of all neurons."""
    if gate is None:
        return jnp.maximum(x @ up.T, 0)
    activation = dict(silu=jax.nn.silu, gelu_tanh=jax.nn.gelu)[layer.activation]
    return activation(x @ gate.T) * (x @ up.T)


def selected_neurons(layer, x):
    """The neurons `(b, f)` of the static groups and the best nominated groups by exact score."""
    active = activations(layer, x, layer.up, layer.gate)
    scores = np.abs(active).reshape(len(x), GROUPS, GROUP).sum(axis=2)
    nominated = np.broadcast_to(layer.nominate_groups(x), (len(x), layer.candidates))
    result = np.zeros((len(x), GROUPS), bool)
    for query, candidates in enumerate(nominated):
        best = sorted(candidates, key=lambda group, query=query: -scores[query, group])
        result[query, best[: layer.k - layer.static_groups]] = True
    result[:, : layer.static_groups] = True
    return jnp.asarray(np.repeat(result, GROUP, axis=1))


@pytest.mark.parametrize("implementation", IN_USE)
def test_gradients_of_layers_are_those_of_the_masked_dense_layer(layer, implementation):
    layer = dataclasses.replace(layer, implementation=implementation)
    x = X.reshape(6, D)
    mask = selected_neurons(layer, x)

    def ours(x, up, down, gate):
        new = dataclasses.replace(layer, up=up, down=down, gate=gate)
        return loss(new(x.reshape(2, 3, D)) / 10)

    def theirs(x, up, down, gate):
        output = jnp.where(mask, activations(layer, x, up, gate), 0) @ down
        return loss(output.reshape(2, 3, D) / 10)

    arguments = x, layer.up, layer.down, layer.gate
    expected = jax.jit(jax.value_and_grad(theirs, (0, 1, 2, 3)))(*arguments)
    slopes = jax.jit(jax.value_and_grad(jax.checkpoint(ours), (0, 1, 2, 3)))(*arguments)
    assert_same(slopes, expected, rtol=1e-3, atol=1e-3)
    unread = ~mask.any(axis=0)
    assert not expected[1][2][unread].any() and np.abs(expected[1][2]).sum() > 0


def test_stacked_layers_are_scanned(layer):
    x = X.reshape(6, D)
    layers = [dataclasses.replace(layer, down=factor * layer.down) for factor in (0.01, 0.02, 0.03)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)

    def in_a_loop(x, layers):
        for layer in layers:
            x = x + layer(x)
        return x

    @jax.checkpoint
    def body(x, layer):
        return x + layer(x), None

    def in_a_scan(x, stacked):
        return jax.lax.scan(body, x, stacked)[0]

    def loss_and_slope(function, layers):
        return jax.jit(jax.value_and_grad(lambda x: loss(function(x, layers))))(x)

    ours, theirs = loss_and_slope(in_a_scan, stacked), loss_and_slope(in_a_loop, layers)
    assert_same(ours, theirs, rtol=1e-3)
    outputs = jax.vmap(lambda layer: layer(x))(stacked)
    np.testing.assert_allclose(outputs[1], layers[1](x), **CLOSE)


def test_states_of_texts_are_queries_of_a_layer(layer):
    flat = X.reshape(6, D)
    np.testing.assert_allclose(layer(X), layer(flat).reshape(2, 3, D), **CLOSE)
    count = 3 if layer.share_selection else 1
    reference = layer.dense_reference(flat, count)
    np.testing.assert_allclose(layer.dense_reference(X, count), reference.reshape(2, 3, D), **CLOSE)
    np.testing.assert_allclose(layer.dense_reference(flat[0]), layer(flat[0]), **CLOSE)
    assert layer(X[:, :0]).shape == layer.dense_reference(X[:, :0], count).shape == (2, 0, D)

"""JAX transformations of models of every family, dense and converted, against the dense model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from model_files import CONFIGS, searches_of

import hire
from hire.lab.studies.adversary import with_64_bits
from hire.models import Decoder
from hire.models.generation import SplitModel

CLOSE = dict(rtol=1e-3, atol=2e-4)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(3, 300, (2, 20)), jnp.int32)
LENGTH = 24  # of the cache; Gemma's local layers keep 16 tokens of it


def random_model(config):
    """A model whose norms and biases are random, too."""
    model = Decoder(config, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(1)

    def vary(leaf):
        if leaf.ndim > 1:
            return leaf
        return leaf + jnp.asarray(rng.normal(size=leaf.shape) / 4, leaf.dtype)

    nnx.update(model, jax.tree.map(vary, nnx.state(model, nnx.Param)))
    return model


def converted(model):
    """The model with a searched softmax, and searched FFNs with every group."""
    softmax, ffns = searches_of(model, candidates=100)
    return hire.convert(model, softmax=softmax, ffn=ffns)


@pytest.fixture(scope="module", params=list(CONFIGS))
def dense(request):
    return random_model(CONFIGS[request.param])


@pytest.fixture(scope="module")
def searched(dense):
    return converted(dense)


@pytest.fixture(scope="module", params=["dense", "searched"])
def model(request, dense, searched):
    return dict(dense=dense, searched=searched)[request.param]


@pytest.fixture(scope="module")
def expected(dense):
    """What the dense model answers after every token: hidden states, logits and best tokens."""
    hidden, _ = jax.jit(lambda split: split.merge().prefill(TOKENS))(SplitModel.of(dense))
    logits = dense.logits(hidden)
    return hidden, logits, hire.exact_top_k(logits, 4)


@pytest.fixture(scope="module")
def written(dense):
    return hire.generate(dense, TOKENS, new_tokens=4).tolist()


def decode(model, tokens):
    """The hidden states and the best tokens after the last token, by a decode step."""
    _, cache = model.prefill(tokens[:, :-1], LENGTH)
    hidden, cache = model.step(tokens[:, -1], cache)
    return hidden, model.top_tokens(hidden, 4)


def assert_decoded(result, expected):
    hidden, _, top = expected
    np.testing.assert_allclose(result[0], hidden[:, -1], **CLOSE)
    np.testing.assert_allclose(result[1].values, top.values[:, -1], **CLOSE)
    assert result[1].indices.tolist() == top.indices[:, -1].tolist()


def test_a_decode_step_is_compiled_and_mapped_over_texts_and_models(model, expected):
    split = SplitModel.of(model)

    def call(split, tokens):
        return decode(split.merge(), tokens)

    def of_one_text(split, text):
        return jax.tree.map(lambda leaf: leaf[0], call(split, text[None]))

    assert_decoded(jax.jit(call)(split, TOKENS), expected)
    two = jax.tree.map(lambda leaf: jnp.stack([jnp.zeros_like(leaf), leaf]), split)
    of_both = jax.jit(jax.vmap(jax.vmap(of_one_text, (None, 0)), (0, None)))(two, TOKENS)
    assert_decoded(jax.tree.map(lambda leaf: leaf[1], of_both), expected)


def test_decode_steps_in_a_scan_write_what_generate_writes(model, written):
    @jax.jit
    def write(split, tokens):
        model = split.merge()
        hidden, cache = model.prefill(tokens, LENGTH)

        def step(carry, _):
            hidden, cache = carry
            token = model.top_tokens(hidden, 1).indices[:, 0]
            return model.step(token, cache), token

        return jax.lax.scan(step, (hidden[:, -1], cache), None, length=4)[1].T

    new = write(SplitModel.of(model), TOKENS)
    assert jnp.concatenate([TOKENS, new], axis=1).tolist() == written
    assert hire.generate(model, TOKENS, new_tokens=4).tolist() == written


def top_loss(top):
    return jnp.sum(jnp.sin(top.values) * jnp.asarray([[1.0, 2.0, 3.0, 4.0]]))


def gradients(model, function):
    """The gradients of a loss of `function(model)` with respect to all parameters, by name."""
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params):
        return top_loss(function(nnx.merge(graph, params, rest)))

    slopes = jax.jit(jax.grad(loss))(params)
    return {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(slopes)
    }


@pytest.fixture(scope="module")
def slopes(dense):
    return gradients(dense, lambda model: model.top_tokens(model.prefill(TOKENS)[0][:, -1], 4))


def test_parameters_have_the_gradients_of_the_dense_prefill(model, slopes):
    """Also through the kernels of a decode step that is computed again for its gradient (remat),
    the search of the head and searched FFNs.
    """
    ours = gradients(model, nnx.remat(lambda model: decode(model, TOKENS)[1]))
    assert len(ours) >= len(slopes) - 3 * model.config.layers  # a searched FFN has no parameters
    for name, slope in ours.items():
        assert np.isfinite(slope).all() and np.abs(slope).sum() > 0, name
        np.testing.assert_allclose(slope, slopes[name], rtol=1e-3, atol=2e-3, err_msg=name)


def by_period(model):
    """The blocks that differ from each other, each stacked with those of its kind."""
    period = model.config.global_every
    graphs, stacks = [], []
    for place in range(period):
        parts = [nnx.split(block) for block in model.blocks[place::period]]
        assert all(graph == parts[0][0] for graph, _ in parts)
        graphs.append(parts[0][0])
        stacks.append(
            jax.tree.map(lambda *leaves: jnp.stack(leaves), *(state for _, state in parts))
        )
    return graphs, stacks


def test_stacked_blocks_are_scanned(dense):
    """As models are written that compile one layer: parameters and caches have a first axis."""
    config = dataclasses.replace(dense.config, layers=2 * dense.config.global_every)
    deep = converted(random_model(config))
    graphs, stacks = by_period(deep)
    x = deep.embed(TOKENS)
    token = deep.embed(TOKENS[:, 0])

    def prefill(x, states):
        caches = []
        for graph, state in zip(graphs, states, strict=True):
            block = nnx.merge(graph, state)
            room = min(LENGTH, block.attention.window)
            x, *cache = block(x, block.attention.prefill, room)
            caches.append(cache)
        return x, caches

    def step(x, states_and_caches):
        caches = []
        for graph, state, cache in zip(graphs, *states_and_caches, strict=True):
            block = nnx.merge(graph, state)
            x, *cache = block(x, block.attention.step, *cache, jnp.int32(TOKENS.shape[1]))
            caches.append(cache)
        return x, caches

    def scanned(x, token, stacks):
        x, caches = jax.lax.scan(jax.checkpoint(prefill), x, stacks)
        return x, jax.lax.scan(jax.checkpoint(step), token, (stacks, caches))[0]

    def looped(x, token, stacks):
        states = [jax.tree.map(lambda leaf, i=i: leaf[i], stacks) for i in range(2)]
        caches = []
        for state in states:
            x, cache = prefill(x, state)
            caches.append(cache)
        for state, cache in zip(states, caches, strict=True):
            token, _ = step(token, (state, cache))
        return x, token

    def outputs_and_slopes(function):
        def loss(x, token):
            outputs = function(x, token, stacks)
            return sum(jnp.sum(jnp.sin(part)) for part in outputs), outputs

        (_, outputs), slopes = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(x, token)
        return [*outputs, *slopes]

    ours, theirs = outputs_and_slopes(scanned), outputs_and_slopes(looped)
    for one, other in zip(ours, theirs, strict=True):
        assert np.isfinite(one).all() and np.abs(one).sum() > 0
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-3)


def test_a_donated_cache_is_deleted_and_changes_no_answer(model, expected):
    split = SplitModel.of(model)
    _, cache = jax.jit(lambda split: split.merge().prefill(TOKENS[:, :17], LENGTH))(split)

    def step(split, token, cache):
        return split.merge().step(token, cache)

    compiled = jax.jit(step, donate_argnums=2)
    for place in range(17, 20):
        before = jax.tree.leaves((cache.keys, cache.values))
        hidden, cache = compiled(split, TOKENS[:, place], cache)
        np.testing.assert_allclose(hidden, expected[0][:, place], **CLOSE)
        assert all(leaf.is_deleted() for leaf in before)


def test_states_of_texts_have_best_tokens(model, expected):
    hidden, logits, top = expected
    np.testing.assert_allclose(model.logits(hidden), logits, **CLOSE)
    assert model.top_tokens(hidden, 4).indices.tolist() == top.indices.tolist()
    np.testing.assert_allclose(model.top_tokens(hidden, 3).values, top.values[..., :3], **CLOSE)
    assert model.top_tokens(hidden[0, 0], 2).indices.tolist() == top.indices[0, 0, :2].tolist()


def test_an_empty_batch_gives_empty_answers(searched):
    none, cache = searched.prefill(TOKENS[:0], LENGTH)
    assert none.shape == (0, 20, 64)
    after, cache = searched.step(TOKENS[:0, 0], cache)
    assert after.shape == (0, 64) and {len(part) for part in cache.keys + cache.values} == {0}
    assert searched.logits(none).shape == (0, 20, 300)
    assert searched.top_tokens(after, 4).indices.shape == (0, 4)
    assert hire.generate(searched, TOKENS[:0], new_tokens=4).shape == (0, 24)


def test_searched_models_answer_the_same_with_64_bits_and_on_a_mesh(searched, written):
    with with_64_bits():
        assert (
            hire.generate(searched, np.asarray(TOKENS, np.int64), new_tokens=4).tolist() == written
        )
    with jax.set_mesh(jax.make_mesh((4,), ("rows",), (AxisType.Explicit,))):
        assert hire.generate(searched, TOKENS, new_tokens=4).tolist() == written


def test_a_text_that_is_not_finite_leaves_the_others_alone(searched, expected):
    split = SplitModel.of(searched)
    broken_text = jnp.asarray(TOKENS).at[0].set(7)

    @jax.jit
    def call(split, tokens):
        model = split.merge()
        rows = model.embedding[...].at[7].set(jnp.inf)
        model.embedding = nnx.Param(rows)
        _, cache = model.prefill(tokens[:, :-1], LENGTH)
        return model.step(tokens[:, -1], cache)[0]

    assert not (TOKENS[1] == 7).any()
    hidden = call(split, broken_text)
    assert not np.isfinite(hidden[0]).any()
    np.testing.assert_allclose(hidden[1], expected[0][1, -1], **CLOSE)


def test_a_softmax_with_a_bias_is_no_head_of_a_model(dense):
    softmax = hire.HireSoftmax(
        dense.head_rows(),
        hire.Quantized.fit(dense.head_rows(), 8),
        k=4,
        candidates=100,
        bias=jnp.ones(300),
        soft_cap=dense.config.logit_soft_cap,
    )
    with pytest.raises(ValueError, match="bias"):
        hire.convert(dense, softmax=softmax)

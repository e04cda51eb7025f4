"""Attention that searches its keys: by hand, against dense attention, while the cache grows, and on
the lab's path.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

import hire
from hire.models import Decoder, preset
from hire.models.attention import Attention
from hire.models.generation import SplitModel, compiled_step, prefill, step
from hire.models.kv_search import KeySearch, LowRankEncoder, SearchedAttention


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def fitted(candidates, rank=16, width=16):
    keys, values, queries = normal(90, width), normal(90, width, seed=2), normal(60, width, seed=1)
    return KeySearch.fit(keys, values, queries, (rank, min(rank, width)), candidates=candidates)


def texts(rng, batch, length):
    return jnp.asarray(rng.integers(3, 300, (batch, length)), jnp.int32)


@functools.cache
def toy(kv_heads=2):
    return Decoder(preset("tiny", vocabulary=300, kv_heads=kv_heads), rngs=nnx.Rngs(0))


def test_two_keys_by_hand():
    # A key's weight is 3 ** (first entry) * 2 ** (second entry). The estimator of the keys (1, 1)
    # and (0, 1) reads the first entry alone, that of the values the second. The one candidate has
    # the weight 6 where the estimate is 3, so the other key's estimate of 1 becomes 2, its true
    # weight. The new token has the weight 1 and the value 0: (6 (1, 0) + 2 (0, 1)) / 9. The third
    # position of the cache is empty and must not count.
    first, second = (
        LowRankEncoder(jnp.eye(2)[None, place], jnp.eye(2)[:, place, None]) for place in (0, 1)
    )
    search = KeySearch(first, second, 1)
    rows, values = (
        jnp.asarray([[1.0, 1.0], [0.0, 1.0], [9.0, 9.0]]),
        jnp.asarray([[1.0, 0.0], [4.0, 1.0], [7.0, 7.0]]),
    )
    keys = jax.tree.map(
        lambda part: part[0, :, 0], search.encode(rows[None, :, None], values[None, :, None])
    )
    x = 2**0.5 * jnp.log(jnp.asarray([[3.0, 2.0]]))
    nothing = jnp.zeros(2)
    chosen, estimated = search.nominate(x, keys, jnp.asarray(2))
    assert chosen.tolist() == [0]
    np.testing.assert_allclose(jnp.exp(estimated), [[3.0, 1.0, 0.0]], atol=1e-5)
    np.testing.assert_allclose(
        search.attend(x, keys, values, nothing, nothing, jnp.asarray(2)),
        [[6 / 9, 2 / 9]],
        atol=1e-6,
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_query_that_is_not_finite_leaves_the_other_heads_their_keys(bad):
    search, rows = fitted(8), normal(40, 16, seed=3)
    keys = jax.tree.map(
        lambda part: part[0, :, 0], search.encode(rows[None, :, None], rows[None, :, None])
    )
    x, length = normal(3, 16, seed=4), jnp.asarray(40)
    expected, _ = search.nominate(x[:2], keys, length)
    chosen, _ = search.nominate(x.at[2, 5].set(bad), keys, length)
    assert chosen.tolist() == expected.tolist()
    ours = search.attend(x.at[2, 5].set(bad), keys, rows, rows[0], rows[0], length)
    np.testing.assert_allclose(
        ours[:2], search.attend(x[:2], keys, rows, rows[0], rows[0], length), atol=1e-5
    )


def test_keys_and_values_of_different_widths_are_refused():
    wide, narrow = fitted(4), fitted(4, rank=8, width=8)
    with pytest.raises(ValueError, match=r"\(16, 8\)"):
        KeySearch(wide.keys, narrow.values, 4)


def test_a_full_rank_estimate_is_the_score_and_a_lower_one_spends_its_rank_on_the_queries():
    keys, queries = (
        normal(90, 16),
        normal(60, 16, seed=1) * jnp.asarray([10.0] * 4 + [0.1] * 12)[None],
    )
    off = []
    for rank in (4, 16):
        estimator = LowRankEncoder.fit(keys, rank, queries)
        estimated = (queries @ estimator.projection.T) @ (keys @ estimator.mixing).T
        off.append(
            float(jnp.abs(estimated - queries @ keys.T).mean() / jnp.abs(queries @ keys.T).mean())
        )
    assert off[0] < 0.05 and off[1] < 1e-5


@functools.cache
def steps(heads, kv_heads, cache_length=24):
    """One step by dense and by searched attention, every key a candidate, after `length` of the
    tokens x.
    """
    config = preset("tiny", layers=1, global_every=1, heads=heads, kv_heads=kv_heads)
    dense = Attention(config, 0, jnp.float32, nnx.Rngs(0))
    searched = SearchedAttention(dense, fitted(cache_length, rank=5))

    @jax.jit
    def both(x, token, length):
        _, keys, values = dense.prefill(x, cache_length)
        # Entries from `length` on count for nothing.
        filled = jnp.where((jnp.arange(cache_length) < length)[None, :, None, None], values, 0)
        theirs, ours = (
            dense.step(token, keys, values, length),
            searched.step(token, searched.key_search.encode(keys, filled), values, length),
        )
        return (*theirs, ours[0], ours[1].rows, ours[2])

    return both


@given(st.sampled_from([(1, 1), (4, 1), (4, 2)]), st.integers(1, 23), st.integers(0, 99))
def test_with_every_key_a_candidate_a_step_is_dense_attention(heads, length, seed):
    parts = steps(*heads)(
        normal(2, 24, 64, seed=seed), normal(2, 64, seed=seed + 1), jnp.asarray(length)
    )
    for ours, theirs in zip(parts[3:], parts[:3], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_a_cache_that_grows_is_that_of_the_whole_text(rng):
    model = SplitModel.of(hire.convert(toy(), kv_search={1: fitted(24)}))
    tokens = texts(rng, 2, 24)
    _, complete = prefill(model, tokens, 32, 4)
    _, cache = prefill(model, tokens[:, :18], 32, 4)
    for position in range(18, 24):  # no more keys than candidates: exact
        _, cache = step(model, tokens[:, position], cache, 4)
    for ours, theirs in zip(
        jax.tree.leaves(cache.keys[1]), jax.tree.leaves(complete.keys[1]), strict=True
    ):
        np.testing.assert_allclose(
            ours.astype(jnp.float32),
            theirs.astype(jnp.float32),
            atol=1 if ours.dtype == jnp.int8 else 1e-4,
        )


def test_generation_is_dense_while_all_keys_are_candidates(rng):
    tokens = texts(rng, 2, 30)
    model = hire.convert(toy(), kv_search={1: fitted(64)})
    assert (
        hire.generate(model, tokens, new_tokens=8) == hire.generate(toy(), tokens, new_tokens=8)
    ).all()
    again = (
        hire.convert(model, kv_search={1: fitted(24)}).blocks[1].attention
    )  # in place of the other search
    assert isinstance(again.dense, Attention) and again.key_search.candidates == 24


def test_a_step_is_given_its_cache_to_keep(unchecked, rng):
    model = hire.convert(toy(1), kv_search={1: fitted(16)})
    parts = SplitModel.of(model)
    _, cache = prefill(parts, texts(rng, 1, 8), 400, 4)
    compiled = compiled_step.lower(parts, jnp.zeros((1,), jnp.int32), cache).compile()
    assert compiled.memory_analysis().alias_size_in_bytes >= sum(
        leaf.nbytes for leaf in jax.tree.leaves((cache.keys, cache.values))
    )
    program = compiled.as_text()
    entry = program[program.index("ENTRY") :]
    copied = [
        np.prod([int(n) for n in shape.split(",")])
        for shape in re.findall(r"= \w+\[([\d,]+)\]\S* copy\(", entry)
    ]
    assert max(copied, default=0) < 400 * 16


def test_bytes_by_hand():
    attention = hire.convert(toy(), kv_search={1: fitted(32, rank=8)}).blocks[1].attention
    # Two heads of 100 keys and values: 8 codes and a scale each, 32 of them exactly; projections
    # and mixings.
    assert (
        attention.bytes_read(100) == 2 * (2 * 100 * (8 + 4) + 2 * 32 * 16 * 4) + 2 * 2 * 8 * 16 * 4
    )
    assert (
        attention.bytes_read(100, itemsize=2)
        == 2 * (2 * 100 * (8 + 4) + 2 * 32 * 16 * 2) + 2 * 2 * 8 * 16 * 4
    )


@pytest.mark.parametrize("length, window", [(8, 16), (37, 16), (37, 3), (48, 512)])
def test_a_long_text_attends_block_by_block_as_at_once(monkeypatch, length, window):
    attention = Attention(preset("tiny", window=window), 0, jnp.float32, nnx.Rngs(0))
    parts = (
        normal(2, length, 4, 16),
        normal(2, length, 2, 16, seed=1),
        normal(2, length, 2, 16, seed=2),
    )
    expected = attention.causal(*parts)
    monkeypatch.setattr("hire.models.attention.QUERY_BLOCK", 8)
    np.testing.assert_allclose(attention.causal(*parts), expected, atol=1e-5)


@pytest.mark.parametrize(
    "call, value",
    [
        (lambda: fitted(0), "candidates = 0"),
        (lambda: fitted(4, rank=17), "rank = 17"),
        (
            lambda: KeySearch.fit(
                normal(20, 16), normal(20, 16), normal(9, 8), (4, 4), candidates=4
            ),
            r"\(9, 8\)",
        ),
        (lambda: hire.convert(toy(), kv_search={0: fitted(4)}), "layer 0"),
        (lambda: hire.convert(toy(), kv_search={1: fitted(4, 8, width=8)}), "width 8"),
    ],
)
def test_a_search_that_cannot_be_is_refused(unchecked, call, value):
    with pytest.raises(ValueError, match=value):
        call()


def test_the_study_measures_the_loss_of_a_search_and_of_the_latest_tokens(rng):
    from hire.lab.studies.kv_search import study
    from hire.models import TextModel
    from hire.models.tokenizer import byte_tokenizer

    windows, subject = (
        np.asarray(texts(rng, 3, 120)),
        TextModel(toy(1), byte_tokenizer(), "random weights"),
    )
    (output,) = study(
        subject, windows[:1], windows[1:], {120: [(16, 8, 120), (16, 8, 20)]}, 8
    ).values()
    complete, partial = output["LR 16, 8 k'=120"], output["LR 16, 8 k'=20"]
    assert (
        abs(complete["loss_difference"]["mean"]) < 1e-5
        and complete["attention_fraction_read"] == pytest.approx(1.0, abs=1e-5)
        and complete["recall"] == 1.0
    )
    assert (
        0 < partial["attention_fraction_read"] < 1
        and partial["recall"] < 1
        and partial["bytes_fraction"] < complete["bytes_fraction"]
    )
    assert output["latest"]["loss_difference"]["n"] == 16

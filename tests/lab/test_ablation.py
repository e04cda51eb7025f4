"""The ablation: every variant against the model itself, its bytes by hand, the alternatives beside
it, and memory that is too small.
"""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import hire
from hire.lab.data import model_states
from hire.lab.data.model_states import hidden_states
from hire.lab.data.text import beginnings, documents
from hire.lab.metrics import group_sparsity
from hire.lab.studies import ablation, ablation_map, ablation_timing, ablation_variants
from hire.lab.studies.ablation_variants import BOTH, DENSE, SHARED, STATIC
from hire.lab.tpu import programs
from hire.models import Decoder, TextModel, loading, preset
from hire.models.generation import SplitModel
from hire.models.tokenizer import byte_tokenizer
from hire.ops.tpu.row_scores import blocks
from hire.tuning import true_top_k

VOCABULARY, K_FRACTION = 512, 0.25


@pytest.fixture(scope="module")
def model():
    config = preset(
        "tiny", vocabulary=VOCABULARY, gated=False, group_size=8, kept=K_FRACTION, kv_heads=1
    )
    return Decoder(config, rngs=nnx.Rngs(0))


def sizes(**changes):
    everything_a_candidate = dict(
        k=4,
        candidates=VOCABULARY,
        softmax_rank=16,
        ffn_rank=16,
        ffn_k_fraction=K_FRACTION,
        ffn_candidates_fraction=1.0,
        static_fraction=0.125,
        shared_candidates_fraction=1.0,
    )
    return ablation_variants.VariantSizes(**everything_a_candidate | changes)


def variants_of(model, **changes):
    return ablation_variants.build_untrained(model, sizes(**changes))


def test_with_everything_a_candidate_every_variant_is_the_model(model, rng):
    tokens = jnp.asarray(rng.integers(3, VOCABULARY, (2, 16)), jnp.int32)
    variants = variants_of(model, static_fraction=0.0, shared_batch=4)
    hidden = hidden_states(model)(tokens)
    top = model.top_tokens(hidden[:, -1], 4)
    assert list(variants) == [
        "dense", "LR softmax", "Q softmax", "LR fitted",
        "+ sparse FFN", "+ static groups", "+ shared selection",
    ]  # fmt: skip
    for name, variant in variants.items():
        np.testing.assert_allclose(hidden_states(variant)(tokens), hidden, atol=2e-4, err_msg=name)
        assert variant.top_tokens(hidden[:, -1], 4).indices.tolist() == top.indices.tolist(), name
    static = variants_of(model, ffn_candidates_fraction=0.25)[STATIC]
    # Static groups take the place of groups that would be in the top-k.
    assert np.abs(hidden_states(static)(tokens) - hidden).max() > 1e-3


def test_static_groups_have_the_estimator_of_the_other_groups(model):
    variants = variants_of(model)
    for ffn, static_ffn in zip(
        ablation_variants.ffns_of(variants[BOTH]),
        ablation_variants.ffns_of(variants[STATIC]),
        strict=True,
    ):
        assert static_ffn.static_groups == 2 and static_ffn.candidates == 14  # of 16 groups
        x = np.ones((1, 64), np.float32)
        np.testing.assert_array_equal(
            static_ffn.estimator.scores(x), ffn.estimator.scores(x)[:, 16:]
        )
        np.testing.assert_array_equal(
            static_ffn.estimator.error_bounds, ffn.estimator.error_bounds[16:]
        )


def test_the_most_used_groups_come_first_and_change_nothing(model, rng):
    tokens, usage = (
        jnp.asarray(rng.integers(3, VOCABULARY, (1, 9)), jnp.int32),
        rng.uniform(size=(2, 16)),
    )
    ordered = group_sparsity.most_used_first(model, usage)
    np.testing.assert_allclose(
        hidden_states(ordered)(tokens), hidden_states(model)(tokens), atol=2e-4
    )
    first = int(np.argmax(usage[1]))
    assert (
        ordered.blocks[1].ffn.up[...][:8] == model.blocks[1].ffn.up[...][8 * first : 8 * first + 8]
    ).all()


def test_bytes_of_a_step_by_hand(model):
    counts, entry = model.config.parameters(), 4
    cache = 2 * 2 * 10 * 16 * entry  # keys and values of two layers, ten positions, one head of 16
    dense = ablation_timing.step_bytes(model, 1, 10)
    assert dense == {part: entry * count for part, count in counts.items()} | dict(cache=cache)
    variant = variants_of(model, candidates=32, ffn_candidates_fraction=0.5)[BOTH]
    softmax = VOCABULARY * (16 + 4) + 16 * (64 + 4)  # int8 factors and projection, and their scales
    row = 64 * entry
    estimators, groups = 2 * (128 * (16 + 4) + 16 * (64 + 4)), 2 * 8 * row
    for batch in (1, 3):
        nbytes = ablation_timing.step_bytes(variant, batch, 10)
        assert nbytes["softmax"] == softmax + batch * 32 * row
        assert nbytes["ffn"] == estimators + batch * groups * (8 + 4)
        assert nbytes["attention"] == dense["attention"] and nbytes["cache"] == batch * cache
    shared = variants_of(model, shared_candidates_fraction=0.5)[SHARED]
    assert ablation_timing.step_bytes(shared, 3, 10)["ffn"] == estimators + groups * (8 + 8)


def text_windows(subject):
    texts = beginnings(documents("evaluation", ["novel"])[:2], 400)
    return np.stack([subject.tokens(text.text, 32) for text in texts]), np.asarray(["one", "two"])


def test_quality_of_a_variant_on_text(model):
    subject = TextModel(model, byte_tokenizer(), "random weights")
    windows, names = text_windows(subject)

    def states_and_top(model):
        states = model_states.collect(model, windows, names)
        return states, true_top_k(model.embedding[...], states.hidden, 4)

    dense = ablation.quality(subject, *states_and_top(model))
    assert dense["recall"]["low"] == dense["top1"]["low"] == 1.0
    assert dense["n"] == 60 and len(dense["nats"]) == 2
    exact = -jax.nn.log_softmax(model.logits(model.prefill(windows)[0])[:, 1:-1])
    nats = np.take_along_axis(np.asarray(exact), windows[:, 2:, None], axis=2).sum((1, 2))
    np.testing.assert_allclose(dense["nats"], nats, rtol=1e-5)
    variant = variants_of(model, static_fraction=0.0)[BOTH]
    searched = ablation.quality(
        TextModel(variant, subject.tokenizer, ""), *states_and_top(variant), dense["nats"]
    )
    assert searched["recall"]["mean"] == 1.0 and searched["accuracy"] == dense["accuracy"]
    assert searched["relative_loss"]["mean"] == pytest.approx(0.0, abs=1e-5)


def test_a_trained_model_is_fitted_and_judged(model):
    subject = TextModel(model, byte_tokenizer(), "random weights")
    windows, names = text_windows(subject)
    trained = ablation.prepare(
        subject, sizes(static_fraction=0.0, ffn_candidates_fraction=0.5), windows, (windows, names)
    )
    estimator = hire.LowRank.fit(trained.rows, 16, calibration=trained.hidden, bits=8)
    softmax = hire.HireSoftmax(trained.rows, estimator, 4, VOCABULARY)
    ffns = []
    for up, down, inputs in trained.layers():
        assert inputs.shape == (2 * 32, 64)
        estimator = hire.LowRank.fit(up, 16, calibration=inputs, bits=8)
        ffns.append(hire.HireFFN(up, down, estimator, **trained.ffn_counts))
    variants = ablation_variants.build(trained.model, softmax, ffns, trained.sizes)
    judged = ablation.judge(
        trained.subject, {name: variants[name] for name in (DENSE, BOTH)}, *trained.evaluation, 4
    )
    states = model_states.collect(model, windows, names)
    unordered = ablation.quality(
        subject, states, true_top_k(model.embedding[...], states.hidden, 4)
    )
    # The order of the groups changes nothing.
    assert judged[DENSE]["bits_per_byte"] == pytest.approx(unordered["bits_per_byte"], rel=1e-5)
    assert judged[DENSE]["relative_loss"]["mean"] == 0.0
    assert judged[BOTH]["relative_loss"]["mean"] != 0.0
    assert trained.text(trained.prompt) in trained.text(windows[0])


def test_dense_rows_of_fewer_bytes(model, rng):
    token, tokens = (
        jnp.asarray([7], jnp.int32),
        jnp.asarray(rng.integers(3, VOCABULARY, (1, 8)), jnp.int32),
    )

    @jax.jit
    def compiled(split):
        model = split.merge()
        hidden, _ = model.step(token, model.prefill(tokens, 12)[1])
        return hidden.astype(jnp.float32), model.top_tokens(hidden, 4)

    def next_tokens(model):
        return compiled(SplitModel.of(model))

    dense = ablation_variants.without_selection(model)
    hidden, top = next_tokens(dense)
    x = jnp.asarray(rng.normal(size=(3, 64)), jnp.float32)
    up, down = (part[...] for part in (model.blocks[0].ffn.up, model.blocks[0].ffn.down))
    np.testing.assert_allclose(dense.blocks[0].ffn(x), jax.nn.relu(x @ up.T) @ down, atol=1e-4)
    for shrink in (ablation_variants.to_bfloat16, ablation_variants.to_int8):
        small = ablation_variants.with_small_rows(dense, 4, shrink)
        small_hidden, small_top = next_tokens(small)
        assert np.abs(small_hidden - hidden).max() < 0.1 * np.abs(hidden).max()
        assert top.indices[0, 0] in small_top.indices[0]
    searched = variants_of(model)[BOTH]
    on_int8 = ablation_variants.with_int8_rows(searched)
    difference = np.abs(next_tokens(on_int8)[0] - next_tokens(searched)[0]).max()
    assert difference < 0.1 * np.abs(hidden).max()
    assert isinstance(on_int8.softmax.rows, hire.Quantized)
    assert sum(ablation_timing.step_bytes(on_int8, 1, 8).values()) < sum(
        ablation_timing.step_bytes(searched, 1, 8).values()
    )


def test_variants_are_timed_in_turn_and_set_against_their_bytes(model):
    variants = {DENSE: model, BOTH: variants_of(model)[BOTH]}
    durations = ablation_timing.time_variants({3: variants}, 16, 4, 2, 1, nothing=lambda x: x)[3]
    assert {name: len(seconds) for name, seconds in durations.items()} == {
        DENSE: 2,
        BOTH: 2,
        "nothing": 2,
    }
    points = ablation_timing.points(variants, {(3, 16): {DENSE: [0.1, 0.3, 0.2], BOTH: [0.1]}}, 1e6)
    floor = sum(ablation_timing.step_bytes(model, 3, 8).values()) / 1e6
    assert points["b3 cache16"][DENSE] == dict(
        floor=floor, seconds=0.2, time_over_floor=pytest.approx(0.2 / floor)
    )
    settings = SimpleNamespace(cache_length=16, k=4, repeats=2)
    shares = ablation_timing.part_shares(variants, settings)
    nbytes = ablation_timing.step_bytes(model, 1, 8)
    assert shares["dense, bytes"]["softmax"] == pytest.approx(
        nbytes["softmax"] / sum(nbytes.values())
    )
    assert all(min(share.values()) > 0 for share in shares.values())
    assert sum(shares["+ sparse FFN, time"].values()) == pytest.approx(1)


def test_a_speedup_has_the_range_of_its_rounds():
    durations = {DENSE: [3.0, 4.0, 2.0], BOTH: [1.0, 2.0, 2.0]}
    assert ablation_timing.speedup_text(durations, BOTH, 3) == "1.50x (1.00 to 3.00)"
    assert ablation_timing.speedup_text(durations, BOTH, 1) == "1.50x (1.50 to 1.50)"


def test_other_fractions_with_the_same_estimators(model, rng):
    tokens = jnp.asarray(rng.integers(3, VOCABULARY, (2, 16)), jnp.int32)
    narrow = variants_of(
        model, static_fraction=0.0, ffn_k_fraction=0.125, ffn_candidates_fraction=0.25
    )[BOTH]
    wide = ablation_variants.with_shares(narrow, K_FRACTION, 1.0)
    wide_ffns, narrow_ffns = ablation_variants.ffns_of(wide), ablation_variants.ffns_of(narrow)
    assert [(ffn.k, ffn.candidates) for ffn in wide_ffns] == [(4, 16)] * 2  # of 16 groups
    assert wide_ffns[0].estimator.nbytes == narrow_ffns[0].estimator.nbytes
    np.testing.assert_allclose(hidden_states(wide)(tokens), hidden_states(model)(tokens), atol=2e-4)
    assert np.abs(hidden_states(narrow)(tokens) - hidden_states(model)(tokens)).max() > 1e-3
    shared = variants_of(model, shared_batch=4)[SHARED]
    for changed in (
        ablation_variants.with_shares(shared, K_FRACTION, 1.0),
        ablation_variants.with_int8_rows(shared),
    ):
        assert [block.ffn.tokens_per_selection for block in changed.blocks] == [4, 4]


def test_a_model_over_blocks_has_the_same_variants_and_alternatives(model, rng):
    tokens = jnp.asarray(rng.integers(3, VOCABULARY, (2, 16)), jnp.int32)
    rows = model.embedding[...]
    softmax = hire.HireSoftmax(blocks(rows), hire.Quantized.fit(rows, 8), 4, VOCABULARY)
    blocked = hire.convert(model, softmax=softmax)
    hidden = hidden_states(model)(tokens)
    to_int8 = ablation_variants.to_int8
    small = ablation_variants.with_small_rows(model, 4, to_int8)
    for other in (
        ablation_variants.with_small_rows(blocked, 4, to_int8),
        ablation_variants.with_int8_rows(blocked),
    ):
        assert other.embedding.shape == (VOCABULARY, 64)
        assert other.softmax.rows.shape == (VOCABULARY, 64)
        np.testing.assert_array_equal(other.embed(tokens), small.embed(tokens))
    variants = variants_of(blocked)
    assert list(variants) == list(variants_of(model))
    np.testing.assert_allclose(hidden_states(variants[DENSE])(tokens), hidden, atol=1e-5)


def test_too_little_memory_offers_half_of_it(monkeypatch, capsys):
    monkeypatch.setattr(
        loading.psutil, "virtual_memory", lambda: type("Memory", (), dict(available=6e9))()
    )
    with pytest.raises(MemoryError, match="paper_1b.*8.1 GB.*6.0 GB.*paper_half"):
        ablation_variants.random_model("paper_1b")
    monkeypatch.setattr(
        loading.psutil, "virtual_memory", lambda: type("Memory", (), dict(available=1e9))()
    )
    name, small = ablation_variants.model_that_fits("paper_1b")
    assert name == "small" and small.config == preset("small")
    assert "going on with paper_half" in capsys.readouterr().out


def test_the_map_by_hand():
    published = ablation_map.published_speedups()
    assert published == dict(softmax=1.22, ffn=1.16, both=1.47)
    expected = ablation_map.additive_speedup(published["softmax"], published["ffn"])
    assert expected == pytest.approx(published["both"], abs=0.005)
    by_bytes = ablation_map.speedup_by_bytes(0.4, 0.4, dict(softmax=0.0, ffn=0.5))
    assert by_bytes == pytest.approx(1 / 0.4)  # 1 - 0.4 - 0.2
    share = ablation_map.share_of_speedup(by_bytes, 0.5)
    only_ffn = ablation_map.speedup_by_bytes(0.0, share, dict(softmax=1.0, ffn=0.5))
    assert only_ffn == pytest.approx(by_bytes)
    softmax, ffn = ablation_map.byte_shares(preset("paper_1b"))
    counts = preset("paper_1b").parameters()
    billions = {
        name: sum(shape.parameters().values()) / 1e9
        for name, shape in ablation_map.known_shapes().items()
    }
    assert billions["Llama 3.2 1B"] == pytest.approx(1.2358, abs=1e-3)
    assert billions["gemma3_1b"] == pytest.approx(1.0, abs=1e-3)
    assert 0.35 < softmax < 0.42
    assert softmax / ffn == pytest.approx(counts["softmax"] / counts["ffn"])


def test_a_searched_step_reads_what_its_classes_say():
    config = preset("small", vocabulary=8192, group_size=8)
    reads = {
        name: programs.decode_step(config, 2, 64, how).reads for name, how in programs.STEPS.items()
    }
    width, neurons, layers = config.width, config.ffn_width, config.layers
    softmax = 8192 * (128 + 4) + 128 * (width + 4) + 4 * 3 + 2 * 2048 * width * 2
    assert reads["softmax"] - reads["dense"] == pytest.approx(softmax - 8192 * width * 2, abs=1e3)
    k, candidates = 12, 25  # 5 % and 10 % of 256
    estimator = neurons * (width // 4 + 4) + width // 4 * (width + 4)
    ffn = layers * (estimator + 2 * (k + candidates) * 8 * width * 2)
    assert reads["FFN"] - reads["dense"] == pytest.approx(
        ffn - layers * 2 * neurons * width * 2, abs=1e3
    )
    assert reads["both"] - reads["FFN"] == pytest.approx(reads["softmax"] - reads["dense"], abs=1e3)

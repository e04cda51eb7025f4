"""The ladder: every rung against the model itself, its bytes by hand, what is held beside it, and
memory that is too small.
"""

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
from hire.lab.studies import ablation
from hire.lab.tpu import programs
from hire.models import Decoder, TextModel, preset, weights
from hire.models.generation import SplitModel
from hire.models.tokenizer import byte_tokenizer
from hire.ops.tpu.row_scores import blocks
from hire.tuning import true_top_k

WORDS, KEPT = 512, 0.25


@pytest.fixture(scope="module")
def model():
    config = preset("tiny", vocabulary=WORDS, gated=False, group_size=8, kept=KEPT, kv_heads=1)
    return Decoder(config, rngs=nnx.Rngs(0))


def parts(**changes):
    whole = dict(
        k=4,
        candidates=WORDS,
        rank=16,
        ffn_rank=16,
        kept=KEPT,
        nominated=1.0,
        common=0.125,
        shared=1.0,
    )
    return ablation.Ladder(**whole | changes)


def test_with_everything_a_candidate_every_rung_is_the_model(model, rng):
    tokens = jnp.asarray(rng.integers(3, WORDS, (2, 16)), jnp.int32)
    rungs = parts(common=0.0).variants(model, together=4)
    own = hidden_states(model)(tokens)
    best = model.best(own[:, -1], 4)
    assert list(rungs) == [
        "dense", "LR softmax", "Q softmax", "LR fitted int8",
        "+ sparse FFN", "+ common path", "+ shared selection",
    ]  # fmt: skip
    for name, rung in rungs.items():
        np.testing.assert_allclose(hidden_states(rung)(tokens), own, atol=2e-4, err_msg=name)
        assert rung.best(own[:, -1], 4).indices.tolist() == best.indices.tolist(), name
    apart = hidden_states(parts(nominated=0.25).variants(model)["+ common path"])(tokens)
    assert (
        np.abs(apart - own).max() > 1e-3
    )  # a path that is always computed takes the place of groups that would be kept


def test_the_most_used_groups_come_first_and_change_nothing(model, rng):
    tokens, usage = (
        jnp.asarray(rng.integers(3, WORDS, (1, 9)), jnp.int32),
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
    dense = ablation.step_bytes(model, 1, 10)
    assert dense == {part: entry * count for part, count in counts.items()} | dict(cache=cache)
    rung = parts(candidates=32, nominated=0.5).variants(model)["+ sparse FFN"]
    softmax = WORDS * (16 + 4) + 16 * (64 + 4)  # int8 factors and projection with their scales
    row = 64 * entry
    copies, groups = 2 * (128 * (16 + 4) + 16 * (64 + 4)), 2 * 8 * row
    for batch in (1, 3):
        found = ablation.step_bytes(rung, batch, 10)
        assert found["softmax"] == softmax + batch * 32 * row
        assert found["ffn"] == copies + batch * groups * (8 + 4)
        assert found["attention"] == dense["attention"] and found["cache"] == batch * cache
    shared = parts(shared=0.5).variants(model)["+ shared selection"]
    assert ablation.step_bytes(shared, 3, 10)["ffn"] == copies + groups * (8 + 8)


def test_what_a_rung_says_of_text(model):
    subject = TextModel(model, byte_tokenizer(), "random weights")
    texts = beginnings(documents("evaluation", ["novel"])[:2], 400)
    windows = np.stack([subject.tokens(text.text, 32) for text in texts])
    names = np.asarray(["one", "two"])

    def states_and_best(model):
        states = model_states.collect(model, windows, names)
        return states, true_top_k(model.embedding[...], states.hidden, 4)

    own = ablation.quality(subject, *states_and_best(model))
    assert own["recall"] == own["top1"] == 1.0 and own["n"] == 60 and len(own["nats"]) == 2
    exact = -jax.nn.log_softmax(model.logits(model.prefill(windows)[0])[:, 1:-1])
    nats = np.take_along_axis(np.asarray(exact), windows[:, 2:, None], axis=2).sum((1, 2))
    np.testing.assert_allclose(own["nats"], nats, rtol=1e-5)
    rung = parts(common=0.0).variants(model)["+ sparse FFN"]
    searched = ablation.quality(
        TextModel(rung, subject.tokenizer, ""), *states_and_best(rung), own["nats"]
    )
    assert searched["recall"] == 1.0 and searched["accuracy"] == own["accuracy"]
    assert searched["over"]["mean"] == pytest.approx(0.0, abs=1e-5)
    subject_rungs = parts(common=0.0, nominated=0.5).fitted(model, windows, together=2)
    told = ablation.judged(
        subject,
        {name: subject_rungs[name] for name in ("dense", "+ sparse FFN")},
        windows,
        names,
        4,
    )
    assert told["dense"]["bits_per_byte"] == pytest.approx(
        own["bits_per_byte"], rel=1e-5
    )  # ordered, and the same
    assert told["dense"]["over"]["mean"] == 0.0 and told["+ sparse FFN"]["over"]["mean"] != 0.0


def test_what_a_user_would_pick_instead(model, rng):
    token, tokens = (
        jnp.asarray([7], jnp.int32),
        jnp.asarray(rng.integers(3, WORDS, (1, 8)), jnp.int32),
    )

    @jax.jit
    def compiled(split):
        model = split.merge()
        hidden, _ = model.step(token, model.prefill(tokens, 12)[1])
        return hidden.astype(jnp.float32), model.best(hidden, 4)

    def next_words(model):
        return compiled(SplitModel.of(model))

    dense = ablation.unselected(model)
    hidden, best = next_words(dense)
    x = jnp.asarray(rng.normal(size=(3, 64)), jnp.float32)
    up, down = (part[...] for part in (model.blocks[0].ffn.up, model.blocks[0].ffn.down))
    np.testing.assert_allclose(dense.blocks[0].ffn(x), jax.nn.relu(x @ up.T) @ down, atol=1e-4)
    for other in (
        ablation.in_small_rows(dense, 4, small) for small in (ablation.bfloat16, ablation.int8)
    ):
        near, found = next_words(other)
        assert np.abs(near - hidden).max() < 0.1 * np.abs(hidden).max()
        assert best.indices[0, 0] in found.indices[0]
    searched = parts().variants(model)["+ sparse FFN"]
    small = ablation.on_int8(searched)
    assert np.abs(next_words(small)[0] - next_words(searched)[0]).max() < 0.1 * np.abs(hidden).max()
    assert isinstance(small.softmax.rows, hire.Quantized)
    assert sum(ablation.step_bytes(small, 1, 8).values()) < sum(
        ablation.step_bytes(searched, 1, 8).values()
    )


def test_rungs_are_timed_in_turn_and_set_against_their_bytes(model):
    rungs = {"dense": model, "both": parts().variants(model)["+ sparse FFN"]}
    timed = ablation.time_variants(rungs, 3, 16, 4, 2, nothing=lambda x: x)
    assert {name: len(seconds) for name, seconds in timed.items()} == dict(
        dense=2, both=2, nothing=2
    )
    found = ablation.points(rungs, {(3, 16): dict(dense=[0.1, 0.3, 0.2], both=[0.1])}, 1e6)
    floor = sum(ablation.step_bytes(model, 3, 8).values()) / 1e6
    assert found["b3 cache16"]["dense"] == dict(
        floor=floor, seconds=0.2, over=pytest.approx(0.2 / floor)
    )
    shares = ablation.spent(rungs, 16, 4, 2)
    nbytes = ablation.step_bytes(model, 1, 8)
    assert shares["dense, bytes"]["softmax"] == pytest.approx(
        nbytes["softmax"] / sum(nbytes.values())
    )
    assert all(min(share.values()) > 0 for share in shares.values()) and sum(
        shares["both, time"].values()
    ) == pytest.approx(1)


def test_other_shares_by_the_same_copies(model, rng):
    tokens = jnp.asarray(rng.integers(3, WORDS, (2, 16)), jnp.int32)
    narrow = parts(common=0.0, kept=0.125, nominated=0.25).variants(model)["+ sparse FFN"]
    wide = ablation.with_shares(narrow, KEPT, 1.0)
    assert [(ffn.k, ffn.candidates) for ffn in ablation.ffns_of(wide)] == [
        (4, 16)
    ] * 2  # of 16 groups
    assert (
        ablation.ffns_of(wide)[0].estimator.nbytes == ablation.ffns_of(narrow)[0].estimator.nbytes
    )
    np.testing.assert_allclose(hidden_states(wide)(tokens), hidden_states(model)(tokens), atol=2e-4)
    assert np.abs(hidden_states(narrow)(tokens) - hidden_states(model)(tokens)).max() > 1e-3
    together = parts().variants(model, together=4)["+ shared selection"]
    for changed in (ablation.with_shares(together, KEPT, 1.0), ablation.on_int8(together)):
        assert [block.ffn.together for block in changed.blocks] == [4, 4]


def test_a_model_over_blocks_has_the_same_rungs_and_rivals(model, rng):
    tokens = jnp.asarray(rng.integers(3, WORDS, (2, 16)), jnp.int32)
    rows = model.embedding[...]
    softmax = hire.HireSoftmax(blocks(rows), hire.Quantized.fit(rows, 8), 4, WORDS)
    blocked = hire.convert(model, softmax=softmax)
    own = hidden_states(model)(tokens)
    for other in (ablation.in_small_rows(blocked, 4, ablation.int8), ablation.on_int8(blocked)):
        assert other.embedding.shape == (WORDS, 64) and other.softmax.rows.shape == (WORDS, 64)
        near = ablation.in_small_rows(model, 4, ablation.int8)
        np.testing.assert_array_equal(other.embed(tokens), near.embed(tokens))
    assert list(parts().variants(blocked)) == list(parts().variants(model))
    np.testing.assert_allclose(
        hidden_states(parts().variants(blocked)["dense"])(tokens), own, atol=1e-5
    )


def test_too_little_memory_offers_half_of_it(monkeypatch, capsys):
    monkeypatch.setattr(
        weights.psutil, "virtual_memory", lambda: type("Memory", (), dict(available=6e9))()
    )
    with pytest.raises(MemoryError, match="paper_1b.*8.1 GB.*6.0 GB.*paper_half"):
        ablation.random_model("paper_1b")
    monkeypatch.setattr(
        weights.psutil, "virtual_memory", lambda: type("Memory", (), dict(available=1e9))()
    )
    name, found = ablation.model_that_fits("paper_1b")
    assert name == "small" and found.config == preset("small")
    assert "going on with paper_half" in capsys.readouterr().out


def test_the_map_by_hand():
    assert ablation.published_speedups() == [1.22, 1.16, 1.47]
    assert ablation.speed_of(0.4, 0.4, (0.0, 0.5)) == pytest.approx(1 / 0.4)  # 1 - 0.4 - 0.2
    softmax, ffn = ablation.shares(preset("paper_1b"))
    counts = preset("paper_1b").parameters()
    sizes = {
        name: sum(shape.parameters().values()) / 1e9
        for name, shape in ablation.known_shapes().items()
    }
    assert sizes["Llama 3.2 1B"] == pytest.approx(1.2358, abs=1e-3) and sizes[
        "gemma3_1b"
    ] == pytest.approx(1.0, abs=1e-3)
    assert 0.35 < softmax < 0.42 and softmax / ffn == pytest.approx(
        counts["softmax"] / counts["ffn"]
    )


def test_a_searched_step_reads_what_its_classes_say():
    config = preset("small", vocabulary=8192, group_size=8)
    reads = {
        name: programs.decode_step(config, 2, 64, how).reads for name, how in programs.STEPS.items()
    }
    width, neurons, layers = config.width, config.ffn_width, config.layers
    softmax = 8192 * (128 + 4) + 128 * (width + 4) + 4 * 3 + 2 * 2048 * width * 2
    assert reads["softmax"] - reads["dense"] == pytest.approx(softmax - 8192 * width * 2, abs=1e3)
    kept, candidates = 12, 25  # 5 % and 10 % of 256
    copy = neurons * (width // 4 + 4) + width // 4 * (width + 4)
    ffn = layers * (copy + 2 * (kept + candidates) * 8 * width * 2)
    assert reads["FFN"] - reads["dense"] == pytest.approx(
        ffn - layers * 2 * neurons * width * 2, abs=1e3
    )
    assert reads["both"] - reads["FFN"] == pytest.approx(reads["softmax"] - reads["dense"], abs=1e3)

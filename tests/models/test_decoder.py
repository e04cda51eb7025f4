"""The decoder against plain numpy, its cache step by step, and its files: read, refused, made
again.
"""

import dataclasses
import importlib
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from model_files import gemma3_fields, gemma3_metadata, hub_names, write_folder, write_gguf

import hire
from hire.lab.metrics import numpy_decoder
from hire.models import Decoder, convert, generate, load, preset
from hire.models.generation import SplitModel, compiled_step, prefill, step, stream_tokens
from hire.models.kv_search import KeySearch
from hire.models.lm_head import top_tokens
from hire.models.tokenizer import byte_tokenizer
from hire.models.weights import gguf_names
from hire.ops.implementation import IMPLEMENTATIONS
from hire.ops.tpu.row_scores import blocks


def texts(rng, batch, length, vocabulary=300):
    return jnp.asarray(rng.integers(3, vocabulary, (batch, length)), jnp.int32)


def test_hidden_states_are_those_of_the_numpy_reference(tiny, rng):
    tokens = texts(rng, 2, 40)  # windows of 16: the local layers no longer see the beginning
    ours, _ = tiny.prefill(tokens)
    for text, hidden in zip(np.asarray(tokens), ours, strict=True):
        theirs = numpy_decoder.hidden_states(text, gguf_names(tiny).__getitem__, tiny.config)
        np.testing.assert_allclose(hidden, theirs, atol=2e-4)


def by_word(top):
    """Logits of every token in vocabulary order, from a top-k of all of them."""
    return np.take_along_axis(np.asarray(top.values), np.argsort(top.indices, axis=1), axis=1)


def test_the_reference_by_hand():
    # norm of (3, 4): rms is sqrt(12.5). A quarter turn takes the pair (1, 0) to (0, 1).
    np.testing.assert_allclose(
        numpy_decoder.norm(np.asarray([3.0, 4.0]), 2.0),
        np.asarray([6.0, 8.0]) / np.sqrt(12.5),
        rtol=1e-6,
    )
    turned = numpy_decoder.rotary(np.asarray([[[1.0, 0.0]], [[1.0, 0.0]]]), 1.0)
    np.testing.assert_allclose(turned[1, 0], [np.cos(1), np.sin(1)], atol=1e-12)
    assert numpy_decoder.gelu(np.asarray(1.0)) == pytest.approx(0.841192, abs=1e-6)


@pytest.mark.parametrize(
    "gated, start, batch, kv_heads", [(True, 1, 2, 2), (False, 9, 1, 1), (True, 30, 2, 1)]
)
def test_decoding_a_token_at_a_time_is_the_prefill(rng, gated, start, batch, kv_heads):
    configured = preset("tiny", vocabulary=300, gated=gated, kv_heads=kv_heads)
    model = Decoder(configured, rngs=nnx.Rngs(1))
    parts = SplitModel.of(model)
    tokens = texts(rng, batch, 44)
    whole = model.logits(model.prefill(tokens)[0])
    top, cache = prefill(parts, tokens[:, :start], 44, 300)
    np.testing.assert_allclose(by_word(top), whole[:, start - 1], atol=2e-4)
    for position in range(start, 44):
        top, cache = step(parts, tokens[:, position], cache, 300)
        np.testing.assert_allclose(by_word(top), whole[:, position], atol=2e-4)
    assert cache.length == 44
    with pytest.raises(ValueError, match="44"):
        step(parts, tokens[:, 0], cache, 300)
    assert {keys.shape[1] for keys in cache.keys} == {16, 44}  # local layers keep their window only


@pytest.mark.parametrize("searched", [False, True])
def test_a_step_copies_neither_weights_nor_cache(unchecked, rng, searched):
    model = Decoder(preset("tiny", vocabulary=3000, kv_heads=1, window=64), rngs=nnx.Rngs(0))
    model = convert(model, softmax=softmax_of(model)) if searched else model
    parts = SplitModel.of(model)
    _, cache = prefill(parts, texts(rng, 1, 8), 100, 4)
    compiled = compiled_step.lower(parts.backbone, jnp.zeros((1,), jnp.int32), cache).compile()
    cache_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves((cache.keys, cache.values)))
    assert (
        compiled.memory_analysis().alias_size_in_bytes >= cache_bytes
    )  # every key and value is donated to its successor
    best = top_tokens.lower(*parts.lm_head, jnp.zeros((1, 64)), 4).compile()
    entries = "".join(text[text.index("ENTRY") :] for text in (compiled.as_text(), best.as_text()))
    copied = [
        np.prod([int(n) for n in shape.split(",")])
        for shape in re.findall(r"= \w+\[([\d,]+)\]\S* copy\(", entries)
    ]
    assert max(copied, default=0) < 64 * 16  # less than the keys of the shortest cache
    before = cache.keys[0]
    step(parts, jnp.zeros((1,), jnp.int32), cache, 4)
    assert before.is_deleted()


def softmax_of(model, candidates=1000, **more):
    rows = model.embedding[...]
    return hire.HireSoftmax(
        rows, hire.LowRank.fit(rows, 60, bits=8), k=8, candidates=candidates, **more
    )


def test_a_converted_model_writes_the_same_text_with_the_same_weights(rng):
    dense = Decoder(preset("tiny", vocabulary=3000), rngs=nnx.Rngs(0))
    fast = hire.convert(dense, softmax=softmax_of(dense))
    assert (
        SplitModel.of(fast).backbone.rest == SplitModel.of(dense).rest
    )  # one compiled program, up to the tokens
    tokens = texts(rng, 2, 5)
    for sampling in (
        dict(),
        dict(temperature=0.7, top_k=8, seed=1),
        dict(temperature=1.0, top_k=8, top_p=0.5, seed=2),
    ):
        written = hire.generate(dense, tokens, new_tokens=6, **sampling)
        assert (hire.generate(fast, tokens, new_tokens=6, **sampling) == written).all()
    assert (
        fast.embedding[...].unsafe_buffer_pointer() == dense.embedding[...].unsafe_buffer_pointer()
    )
    assert dense.softmax is None
    assert convert(fast, softmax=None).softmax is None
    arrays = [leaf for leaf in jax.tree.leaves(nnx.state(fast)) if leaf.size >= 3000 * 64]
    assert len(arrays) == 1  # the embedding, once


def test_a_softmax_of_another_model_is_refused():
    one, other = (
        Decoder(preset("tiny", vocabulary=300, layers=1), rngs=nnx.Rngs(seed)) for seed in (0, 1)
    )
    rows = one.embedding[...]
    for softmax in (
        softmax_of(one, candidates=20),
        dataclasses.replace(softmax_of(one, candidates=20), rows=blocks(rows)),
        dataclasses.replace(softmax_of(one, candidates=20), rows=hire.Quantized.fit(rows, 8)),
    ):
        with pytest.raises(ValueError, match="300"):
            convert(other, softmax=softmax)
        convert(one, softmax=softmax)
    narrow = blocks(rows.astype(jnp.bfloat16))
    with pytest.raises(ValueError, match="bfloat16"):
        convert(one, softmax=dataclasses.replace(softmax, rows=narrow))
    nearly = blocks(rows.at[299, 63].multiply(1 + 2**-10))
    with pytest.raises(ValueError, match="300"):
        convert(one, softmax=dataclasses.replace(softmax_of(one, candidates=20), rows=nearly))


def same_model(ours, theirs, tokens, atol=0.0):
    """The same hidden states, logits and best tokens."""
    hidden, _ = theirs.prefill(tokens)
    np.testing.assert_allclose(ours.prefill(tokens)[0], hidden, atol=atol)
    np.testing.assert_allclose(ours.logits(hidden), theirs.logits(hidden), atol=1e-4)
    best = ours.top_tokens(hidden[:, -1], 8).indices.tolist()
    assert best == theirs.top_tokens(hidden[:, -1], 8).indices.tolist()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_every_implementation_survives_a_conversion(tiny, implementation):
    softmax = softmax_of(tiny, candidates=300, implementation=implementation)
    converted = convert(tiny, softmax=softmax)
    assert converted.softmax.with_rows(tiny.embedding[...]).implementation == implementation
    again = convert(converted, softmax=converted.softmax.with_rows(converted.embedding[...]))
    assert again.softmax.implementation == implementation


@pytest.mark.parametrize("is_quantized", [False, True])
def test_rows_in_blocks_become_the_embedding_and_convert_back(tiny, rng, is_quantized):
    tokens, rows = texts(rng, 2, 20), blocks(tiny.embedding[...])
    softmax = dataclasses.replace(softmax_of(tiny, candidates=300), rows=rows)
    converted = convert(tiny, softmax=softmax)
    assert converted.embedding[...] is rows and tiny.embedding[...].ndim == 2
    same_model(converted, tiny, tokens)
    assert (
        hire.generate(converted, tokens, new_tokens=3).tolist()
        == hire.generate(tiny, tokens, new_tokens=3).tolist()
    )
    assert convert(converted, softmax=softmax).embedding[...] is rows
    other = softmax_of(tiny, candidates=300)
    if is_quantized:
        other = dataclasses.replace(other, rows=hire.Quantized.fit(tiny.embedding[...], 8))
    for back in (convert(converted), convert(converted, softmax=other)):
        assert (back.embedding[...] == tiny.embedding[...]).all()
        np.testing.assert_array_equal(back.prefill(tokens)[0], tiny.prefill(tokens)[0])
    assert convert(convert(converted)).softmax is None


def ffns_of(model, **more):
    result = []
    for block in model.blocks:
        up, down, gate = (getattr(block.ffn, name)[...] for name in ("up", "down", "gate"))
        result.append(
            hire.HireFFN(
                up,
                down,
                hire.Quantized.fit(gate, 8),
                gate,
                k=4,
                candidates=8,
                activation="gelu_tanh",
                **more,
            )
        )
    return result


def test_tokens_that_share_a_call_are_kept_or_refused(tiny):
    ffns = ffns_of(tiny, share_selection=True)
    searched = convert(tiny, ffn=ffns, tokens_per_selection=4)
    for kept in (
        convert(searched),
        convert(searched, softmax=softmax_of(tiny, 300)),
        convert(searched, ffn=ffns),
    ):
        assert [block.ffn.tokens_per_selection for block in kept.blocks] == [4, 4]
    assert convert(searched, tokens_per_selection=2).blocks[0].ffn.tokens_per_selection == 2
    assert convert(tiny, ffn=ffns).blocks[0].ffn.tokens_per_selection == 1
    for model, count in ((tiny, 4), (searched, 0)):
        with pytest.raises(ValueError, match=f"tokens_per_selection = {count}"):
            convert(model, tokens_per_selection=count)


def test_ffns_of_another_kind_are_refused(tiny):
    ffns = ffns_of(tiny)
    with pytest.raises(ValueError, match="False, True"):
        up, down = ffns[0].up, ffns[0].down
        convert(
            tiny,
            ffn=[hire.HireFFN(up, down, hire.Quantized.fit(up, 8), k=4, candidates=8), ffns[1]],
        )
    with pytest.raises(ValueError, match="64"):
        convert(tiny, ffn=ffns[:1])
    routed = Decoder(
        preset("tiny", vocabulary=300, group_size=8, kept=0.5, routed=True), rngs=nnx.Rngs(0)
    )
    with pytest.raises(ValueError, match="routed = True"):
        convert(routed, ffn=ffns)


def test_parts_of_a_model_are_mapped_and_stacked_as_pytrees(tiny, rng):
    """JAX builds them around shapes and placeholders, which nothing validates."""
    converted = convert(tiny, softmax=softmax_of(tiny, 300))
    _, cache = prefill(SplitModel.of(converted), texts(rng, 2, 5), 9, 4)
    for part in (converted.softmax, cache, SplitModel.of(converted)):
        shapes = jax.eval_shape(lambda part: part, part)
        for made in (
            shapes,
            jax.tree.map(lambda leaf: None, part),
            jax.tree.map(lambda leaf: object(), part),
        ):
            assert type(made) is type(part)
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), part, part)
        assert [leaf.shape[0] for leaf in jax.tree.leaves(stacked)] == [2] * len(
            jax.tree.leaves(part)
        )


def test_generation_takes_the_likeliest_token(tiny, rng):
    tokens = texts(rng, 2, 5)
    written = generate(tiny, tokens, new_tokens=3)
    assert (written[:, :5] == tokens).all()
    logits = tiny.logits(tiny.prefill(written)[0][:, 4:7])
    assert (jnp.argmax(logits, axis=-1) == written[:, 5:]).all()


def test_sampling_draws_with_the_seed_among_the_best(tiny, rng):
    tokens = texts(rng, 1, 5)
    drawn = [
        generate(tiny, tokens, new_tokens=4, temperature=5.0, top_k=3, seed=seed)[0, 5:].tolist()
        for seed in range(6)
    ]
    assert len(set(map(tuple, drawn))) > 1
    assert (
        drawn[0]
        == generate(tiny, tokens, new_tokens=4, temperature=5.0, top_k=3, seed=0)[0, 5:].tolist()
    )
    best = hire.exact_top_k(tiny.logits(tiny.prefill(tokens)[0][:, -1]), 3).indices[0].tolist()
    assert {tokens[0] for tokens in drawn} <= set(best)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        dict(temperature=3.0, top_k=9, seed=4),
        dict(temperature=3.0, repetition_penalty=2.0, presence_penalty=0.5, cache_length=64),
    ],
)
@pytest.mark.parametrize("prefill_length", [None, 1, 4, 7])
def test_a_stream_gives_the_tokens_of_generate(tiny, rng, settings, prefill_length):
    tokens = texts(rng, 2, 7)
    written = generate(tiny, tokens, new_tokens=6, **settings)
    stream = stream_tokens(tiny, tokens, new_tokens=6, prefill_length=prefill_length, **settings)
    parts = [next(stream) for _ in range(6)]
    assert next(stream, None) is None
    assert all(part.shape == (2,) and part.dtype == jnp.int32 for part in parts)
    assert np.stack(parts, axis=1).tolist() == written[:, 7:].tolist()
    one = list(stream_tokens(tiny, tokens[0], new_tokens=2))
    assert [part.shape for part in one] == [(), ()]


@pytest.mark.parametrize("length", [0, 8, True])
def test_a_stream_is_checked_at_the_call(tiny, rng, length):
    with pytest.raises(ValueError, match=f"prefill_length = {length}"):
        stream_tokens(tiny, texts(rng, 1, 7), new_tokens=2, prefill_length=length)
    with pytest.raises(ValueError, match="new_tokens = 0"):
        stream_tokens(tiny, texts(rng, 1, 7), new_tokens=0)


def test_bfloat16_runs_in_bfloat16_and_stays_near(rng):
    configured = preset("tiny", vocabulary=300)
    half = Decoder(configured, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
    graph, state = nnx.split(half)
    tokens = texts(rng, 1, 20)
    compiled = jax.jit(lambda state, tokens: nnx.merge(graph, state).prefill(tokens))
    hidden, cache = compiled(state, tokens)
    assert hidden.dtype == cache.keys[0].dtype == jnp.bfloat16
    exact, _ = compiled(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), state), tokens)
    assert jnp.mean(jnp.abs(hidden.astype(jnp.float32) - exact)) < 0.05


@pytest.mark.parametrize(
    "name, millions",
    [("gemma3_270m", 268.098176), ("gemma3_1b", 999.885952), ("paper_1b", 1012.30592)],
)
def test_presets_have_the_sizes_they_name(name, millions):
    model = nnx.eval_shape(lambda: Decoder(preset(name), rngs=nnx.Rngs(0)))
    count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    assert count == sum(preset(name).parameters().values()) == round(millions * 1e6)


@pytest.mark.parametrize(
    "call, value",
    [
        (lambda: preset("gemma4"), "gemma4"),
        (lambda: preset("tiny", heads=3), "heads = 3"),
        (lambda: preset("tiny", layers=0), "layers = 0"),
        (lambda: preset("tiny", head_width=3), "head_width = 3"),
        (lambda: preset("tiny", layers=2.5), "2.5"),
        (lambda: preset("tiny", layers=True), "True"),
        (lambda: preset("tiny", layers=np.int64(0)), "0"),
        (lambda: preset("tiny", rope_base=float("nan")), "nan"),
        (lambda: preset("tiny", kept=float("nan")), "nan"),
        (lambda: preset("tiny", sparse_layers=(2,)), "2"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(unchecked, call, value):
    with pytest.raises(ValueError, match=value):
        call()


def test_numpys_whole_numbers_are_sizes(unchecked):
    config = preset("tiny", vocabulary=np.int64(300), layers=np.int8(2))
    assert config == preset("tiny", vocabulary=300) and json.dumps(dataclasses.asdict(config))


def test_a_text_that_does_not_fit_is_refused(tiny, rng):
    with pytest.raises(ValueError, match="9 .* 8"):
        tiny.prefill(texts(rng, 1, 9), 8)


@pytest.mark.parametrize(
    "settings, value",
    [
        (dict(new_tokens=0), "new_tokens = 0"),
        (dict(new_tokens=504), "504 .* 512"),
        (dict(new_tokens=3, cache_length=11), "3 .* 11"),
        (dict(new_tokens=3, temperature=-1.0), "-1.0"),
        (dict(new_tokens=3, temperature=1.0, top_k=301), "301"),
        (dict(new_tokens=3, temperature=1.0, top_p=0.0), "0.0"),
    ],
)
def test_a_generation_that_cannot_be_is_refused(tiny, rng, settings, value):
    with pytest.raises(ValueError, match=value):
        generate(tiny, texts(rng, 1, 9), **settings)


@pytest.mark.parametrize("searched", [False, True])
def test_a_text_that_overflows_leaves_the_others_of_its_batch_alone(tiny, rng, searched):
    broken = nnx.merge(*nnx.split(tiny))
    broken.embedding = nnx.Param(tiny.embedding[...].at[7].set(jnp.nan))
    if searched:
        keys, values, queries = (
            jnp.asarray(rng.normal(size=(40, 16)), jnp.float32) for _ in range(3)
        )
        broken = convert(
            broken, kv_search={1: KeySearch.fit(keys, values, queries, (8, 8), candidates=4)}
        )
    tokens = jnp.asarray([[7] * 9, [3, 4, 5, 6, 8, 9, 10, 11, 12]], jnp.int32)
    parts = SplitModel.of(broken)
    (_, both), (_, alone) = (prefill(parts, part, 12, 4) for part in (tokens, tokens[1:]))
    for token in (20, 21):
        result, both = step(parts, jnp.full((2,), token), both, 4)
        single, alone = step(parts, jnp.full((1,), token), alone, 4)
        assert np.isfinite(result.values[1, 1:]).all()  # the token itself has no finite logit
        np.testing.assert_allclose(result.values[1:], single.values, atol=1e-5)


PROMPT = [3, 200, 299, 7, 256]


@pytest.mark.parametrize(
    "prompts",
    [
        [PROMPT],
        PROMPT,
        np.asarray([PROMPT], np.uint16),
        np.asarray([PROMPT], np.uint64),
        np.asarray([PROMPT], np.int16),
        np.asarray(PROMPT),
        jnp.asarray([PROMPT], jnp.uint16),
    ],
    ids=lambda prompts: f"{type(prompts).__name__} {getattr(prompts, 'dtype', '')}",
)
def test_prompts_of_any_whole_numbers_give_the_same_ids(prompts):
    """Ids beyond 255 and 65535 do not wrap, whatever type the prompt had."""
    model = Decoder(preset("tiny", vocabulary=300), rngs=nnx.Rngs(0))
    expected = generate(model, jnp.asarray([PROMPT], jnp.int32), new_tokens=4)
    written = generate(
        model, prompts, new_tokens=np.int64(4), cache_length=np.int32(9), seed=np.int64(3)
    )
    assert written.dtype == jnp.int32
    assert written.tolist() == (expected[0] if np.ndim(prompts) == 1 else expected).tolist()


def test_ids_that_do_not_fit_a_prompts_type_are_written(monkeypatch):
    model = Decoder(preset("tiny", vocabulary=70000, layers=1), rngs=nnx.Rngs(0))
    best = hire.TopK(jnp.zeros((1, 1)), jnp.full((1, 1), 69999, jnp.int32))
    monkeypatch.setattr("hire.models.generation.top_tokens", lambda *_: best)
    assert generate(model, np.asarray([[1, 2]], np.uint16), new_tokens=2).tolist() == [
        [1, 2, 69999, 69999]
    ]


def test_no_prompts_give_no_texts(tiny):
    written = generate(tiny, np.zeros((0, 5), np.int64), new_tokens=3)
    assert written.shape == (0, 8) and written.dtype == jnp.int32


@pytest.mark.parametrize(
    "prompts, value",
    [
        ([[3, 300]], "300"),
        ([[3, -1]], "-1"),
        (np.asarray([[2**40]]), str(2**40)),
        (jnp.asarray([[3, 300]]), "300"),
        ([[3.0, 4.0]], "float64"),
        ([[True, False]], "bool"),
        ([[1, 2], [3]], r"\[1, 2\]"),
        (np.zeros((2, 0), int), r"\(2, 0\)"),
        (np.zeros((2, 2, 2), int), r"\(2, 2, 2\)"),
        (7, r"\(\)"),
    ],
)
def test_prompts_that_are_no_ids_are_refused(tiny, prompts, value):
    with pytest.raises(ValueError, match=value):
        generate(tiny, prompts, new_tokens=2)


def test_ids_beyond_the_vocabulary_have_no_hidden_state(tiny):
    with pytest.raises(ValueError, match="300"):
        tiny.prefill(jnp.asarray([[3, 300]]))
    with pytest.raises(ValueError, match="301"):
        tiny.top_tokens(jnp.zeros((1, 64)), 301)


def bits64():
    """jax.enable_x64(True), which jax 0.7 has elsewhere."""
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(True)
    return importlib.import_module("jax.experimental").enable_x64()


def test_with_64_bit_numbers_on_it_writes_the_same(tiny, rng):
    prompts = np.asarray(texts(rng, 2, 20))
    hidden = tiny.prefill(prompts)[0]
    converted = convert(tiny, softmax=softmax_of(tiny, 300))
    expected = [
        generate(model, prompts, new_tokens=4, temperature=0.5, top_k=8).tolist()
        for model in (tiny, converted)
    ]
    with bits64():
        made = Decoder(tiny.config, rngs=nnx.Rngs(0))
        for model in (tiny, made):
            after, cache = model.prefill(np.asarray(prompts, np.int64), 24)
            np.testing.assert_allclose(after, hidden, atol=1e-5)
            model.step(jnp.asarray([1, 2]), cache)
            assert model.top_tokens(after[:, -1], 3).indices.shape == (2, 3)
        result = [
            generate(model, prompts, new_tokens=4, temperature=0.5, top_k=8).tolist()
            for model in (tiny, converted)
        ]
    assert result == expected


# Files. A tiny model is written in both formats with the writers of the reference
# libraries, and must come back the same.


@pytest.fixture
def files(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("HIRE_CACHE", str(tmp_path / "cache"))
    arrays = gguf_names(tiny)
    return (
        write_gguf(tmp_path / "tiny.gguf", arrays, gemma3_metadata(tiny.config)),
        write_folder(tmp_path / "tensors", hub_names(arrays), gemma3_fields(tiny.config)),
    )


def test_both_formats_give_the_model_back(files, tiny, rng):
    tokens = texts(rng, 1, 12)
    expected = tiny.prefill(tokens)[0]
    for source, stored in zip(files, ("ALL_F32 weights", "float32 weights"), strict=True):
        loaded = load(source)
        np.testing.assert_allclose(loaded.model.prefill(tokens)[0], expected, atol=1e-5)
        assert loaded.weights_precision == stored
        assert loaded.tokens(" abc\n\n\u00e9").tolist() == [2, 264, 267, 260, 4 + 0xC3, 4 + 0xA9]
    assert load(files[0], dtype=jnp.bfloat16).model.embedding[...].dtype == jnp.bfloat16


def test_a_damaged_cache_is_made_again(files, tmp_path, capsys):
    first = load(files[0]).model.embedding[...]
    (cached,) = (tmp_path / "cache").glob("*.safetensors")
    damaged = bytearray(cached.read_bytes())
    damaged[-5] ^= 0xFF
    cached.write_bytes(damaged)
    assert (load(files[0]).model.embedding[...] == first).all()
    assert "the cached copy is damaged, made again" in capsys.readouterr().out
    (checksums,) = (tmp_path / "cache").glob("*.sha256.json")
    assert (
        json.loads(checksums.read_text())["covers"]["metadata"]["weights_precision"]
        == "ALL_F32 weights"
    )


def test_an_interrupted_unpacking_leaves_nothing_that_passes_for_whole(
    files, tmp_path, monkeypatch
):
    def full_disk(*_):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("safetensors.numpy.save_file", full_disk)
        with pytest.raises(OSError, match="No space left"):
            load(files[0])
    assert not list((tmp_path / "cache").iterdir())
    load(files[0])


@pytest.mark.parametrize("keep", [10, 5000, -3000])
def test_a_truncated_gguf_is_named(files, keep):
    files[0].write_bytes(files[0].read_bytes()[:keep])
    with pytest.raises(ValueError, match="tiny.gguf"):
        load(files[0])


def test_truncated_tensors_are_named(files):
    file = files[1] / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="tensors"):
        load(files[1])


def test_files_that_are_not_there_are_named(files):
    with pytest.raises(ValueError, match="tokenizer.json"):
        load(files[1] / "tokenizer.json")
    (files[1] / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="tokenizer.json"):
        load(files[1])


def test_too_little_memory_is_said_before_anything_is_built(files, monkeypatch):
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("memory", (), dict(available=2**18)))
    with pytest.raises(MemoryError, match="gemma3_1b.*8.0 GB.*0.0 GB"):
        load("gemma3_1b")
    for source in files:
        with pytest.raises(MemoryError, match=source.name):
            load(source)


def test_bytes_are_read_one_by_one():
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode("h\u00e9!").ids
    assert len(ids) == 4 and min(ids) >= 4 and max(ids) < 260
    assert tokenizer.decode(ids) == "h\u00e9!"

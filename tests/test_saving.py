"""What is saved comes back in another process; damaged files and other rows are refused."""

import dataclasses
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import hire
from hire.estimators.exact_rows import ExactRowsEstimator
from hire.models import Decoder, convert, preset


@pytest.fixture(scope="module")
def rows():
    return jnp.asarray(np.random.default_rng(5).normal(size=(700, 24)), jnp.float32)


def estimators(rows):
    states = np.random.default_rng(1).normal(size=(200, 24)).astype(np.float32)
    low_rank = hire.LowRank.fit(rows, 8, calibration=states, bits=8)
    return {
        "floats": hire.LowRank.fit(rows, 8),
        "16 bits": hire.LowRank.fit(rows.astype(jnp.bfloat16), 8),
        "int8": low_rank,
        "int4": hire.Quantized.fit(rows, 4),
        "cascade": hire.Cascade((low_rank, hire.Quantized.fit(rows, 8)), (300,)),
        "exact rows": ExactRowsEstimator.fit(rows, low_rank, 20, calibration=states),
    }


def leaves(thing):
    return [(leaf.dtype, leaf.shape, np.asarray(leaf).tobytes()) for leaf in jax.tree.leaves(thing)]


@pytest.mark.parametrize("name", ["floats", "16 bits", "int8", "int4", "cascade", "exact rows"])
def test_an_estimator_comes_back_with_every_bit(rows, tmp_path, name):
    estimator = estimators(rows)[name]
    own = rows.astype(jnp.bfloat16) if name == "16 bits" else rows
    hire.save(tmp_path / "a.safetensors", estimator)
    for loaded in (
        hire.load(tmp_path / "a.safetensors"),
        hire.load(str(tmp_path / "a.safetensors"), rows=own),
    ):
        assert type(loaded) is type(estimator) and leaves(loaded) == leaves(estimator)
        assert jax.tree.structure(loaded) == jax.tree.structure(estimator)
    for other in (own.at[3, 4].add(1), own[:-1]):
        with pytest.raises(ValueError, match="a.safetensors"):
            hire.load(tmp_path / "a.safetensors", rows=other)


def test_a_search_finds_the_same_in_another_process(rows, tmp_path):
    softmax = hire.HireSoftmax(
        rows,
        estimators(rows)["int8"],
        k=7,
        candidates=90,
        bias=jnp.linspace(-1, 1, 700),
        soft_cap=20.0,
    )
    path = tmp_path / "softmax.safetensors"
    hire.save(path, softmax)
    assert path.stat().st_size < rows.nbytes  # the rows are not in it
    x = np.random.default_rng(2).normal(size=(5, 24)).astype(np.float32)
    np.save(tmp_path / "rows.npy", rows), np.save(tmp_path / "x.npy", x)
    script = (
        "import sys, json, numpy as np, hire\n"
        "softmax = hire.load(sys.argv[1], rows=np.load(sys.argv[2]))\n"
        "top = softmax(np.load(sys.argv[3]))\n"
        "print(json.dumps([top.indices.tolist(), top.values.tolist()]))"
    )
    paths = [str(path), str(tmp_path / "rows.npy"), str(tmp_path / "x.npy")]
    command = [sys.executable, "-W", "ignore", "-c", script, *paths]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    top, (indices, values) = softmax(x), json.loads(output)
    assert indices == top.indices.tolist()
    np.testing.assert_allclose(values, top.values, rtol=1e-6)
    with pytest.raises(ValueError, match="rows="):
        hire.load(path)
    with pytest.raises(ValueError, match="other rows"):
        hire.load(path, rows=rows.at[0, 0].add(1))
    quantized = dataclasses.replace(softmax, rows=hire.Quantized.fit(rows, 8))
    hire.save(path, quantized)  # quantized rows are in the file
    assert hire.load(path)(x).indices.tolist() == quantized(x).indices.tolist()


@pytest.mark.parametrize("gated, tied", [(True, True), (True, False), (False, True)])
def test_a_converted_model_comes_back(tmp_path, rng, gated, tied):
    config = preset("tiny", vocabulary=300, gated=gated, tied=tied, logit_soft_cap=4.0)
    model = Decoder(config, rngs=nnx.Rngs(0))
    head = model.head_rows()
    softmax = hire.HireSoftmax(head, hire.Quantized.fit(head, 8), k=4, candidates=64, soft_cap=4.0)
    ffns = []
    for block in model.blocks:
        gate = block.ffn.gate[...] if gated else None
        up, down = block.ffn.up[...], block.ffn.down[...]
        estimator = hire.Quantized.fit(up if gate is None else gate, 8)
        ffns.append(
            hire.HireFFN(
                up, down, estimator, gate, k=4, candidates=8, activation=config.ffn_activation
            )
        )
    tokens = jnp.asarray(rng.integers(3, 300, (2, 8)), jnp.int32)
    path = tmp_path / "model.safetensors"
    for converted in (
        model,
        convert(model, softmax=softmax),
        convert(model, softmax=softmax, ffn=ffns, tokens_per_selection=2),
    ):
        hire.save(path, converted)
        loaded = hire.load(path)
        assert loaded.config == config
        expected = hire.generate(converted, tokens, new_tokens=6)
        assert hire.generate(loaded, tokens, new_tokens=6).tolist() == expected.tolist()
        assert convert(loaded).head_rows().tolist() == head.tolist()
        kinds = [type(block.ffn).__name__ for block in converted.blocks]
        assert [type(block.ffn).__name__ for block in loaded.blocks] == kinds


def test_every_damage_is_one_line_that_names_the_file(rows, tmp_path):
    path = tmp_path / "a.safetensors"
    hire.save(path, estimators(rows)["int8"])
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    for place in [0, 1, 7, 8, 9, len(whole) - 1, *rng.integers(0, len(whole), 30)]:
        flipped = bytes([whole[place] ^ (1 << int(rng.integers(8)))])
        for damaged in (whole[:place], whole[:place] + flipped + whole[place + 1 :]):
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match="a.safetensors") as error:
                hire.load(path)
            assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match="nothing.safetensors"):
        hire.load(tmp_path / "nothing.safetensors")


def test_what_cannot_be_saved_is_named(rows, tmp_path):
    path = tmp_path / "a.safetensors"
    for thing, name in ((rows, "Array"), ({}, "dict"), (object(), "object")):
        with pytest.raises(ValueError, match=name):
            hire.save(path, thing)
    softmax = hire.HireSoftmax(rows, hire.Quantized.fit(rows, 8), k=4, candidates=64)
    with jax.set_mesh(jax.make_mesh((4,), ("chips",))):
        with pytest.raises(ValueError, match="sharded"):
            hire.save(path, softmax.sharded("chips"))
    assert not list(tmp_path.iterdir())

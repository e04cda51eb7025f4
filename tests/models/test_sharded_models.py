"""Sharded models are initialised, saved and restored without gathering them, and generate the
same tokens on any number of devices.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

import hire
from hire.distributed import RowSharding
from hire.models import Decoder, preset
from hire.models.checkpoints import load_sharded, save_sharded
from hire.models.generation import SplitModel
from hire.models.modules import normal_initializer
from hire.models.sharding import partition_spec
from hire.models.weights import named_arrays
from hire.ops.tpu.row_scores import blocks

CONFIG = preset(
    "tiny", vocabulary=512, heads=2, kv_heads=1, head_width=15 * 2
)  # 30 rows of keys: not over 4 devices


FULL = float("inf")


def mesh(*sizes: int, kind: AxisType = AxisType.Auto):
    return jax.make_mesh(sizes, ("rows", "more")[: len(sizes)], (kind,) * len(sizes))


@pytest.fixture(scope="module")
def alone():
    return Decoder(CONFIG, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def four():
    with jax.set_mesh(mesh(4)):
        return Decoder(CONFIG, rngs=nnx.Rngs(0))


def same(ours: Decoder, theirs: Decoder):
    for name, array in named_arrays(ours).items():
        np.testing.assert_allclose(
            array, named_arrays(theirs)[name], rtol=1e-5, atol=1e-7, err_msg=name
        )


def test_every_device_initializes_its_shard_of_the_same_model(alone, four):
    rows = four.embedding[...]
    assert [shard.data.shape for shard in rows.addressable_shards] == [(128, 64)] * 4
    assert four.blocks[0].attention.key[...].sharding.is_fully_replicated
    same(four, alone)


def test_initialization_takes_memory_for_one_shard():
    def used(where: object) -> int:
        output = (
            normal_initializer((4096, 512), 512, jnp.float32, where)
            .lower(jax.random.key(0))
            .compile()
            .memory_analysis()
        )
        return output.output_size_in_bytes + output.temp_size_in_bytes

    whole = used(partition_spec(4096, 512))
    with jax.set_mesh(mesh(4)):
        assert 4 * used(partition_spec(4096, 512)) < 1.05 * whole


def test_it_generates_the_same_tokens(alone, four, rng):
    tokens = jnp.asarray(rng.integers(3, 512, (2, 5)), jnp.int32)
    with jax.set_mesh(mesh(4)):
        generated = hire.generate(four, tokens, new_tokens=8)
    assert generated.tolist() == hire.generate(alone, tokens, new_tokens=8).tolist()


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("storage", ["plain", "interleaved", "blocks", "quantized"])
def test_a_sharded_softmax_leaves_no_trace_after_converting_back(storage, kind, rng):
    """510 rows over 4 devices are padded to 512, and interleaved; converting back restores 510."""
    plain = Decoder(preset("tiny", vocabulary=510), rngs=nnx.Rngs(0))
    rows, tokens = plain.embedding[...], jnp.asarray(rng.integers(0, 510, (2, 9)), jnp.int32)
    alone = hire.HireSoftmax(rows, hire.LowRank.fit(rows, 60, bits=8), k=8, candidates=510)
    hidden, written = plain.prefill(tokens)[0], hire.generate(plain, tokens, new_tokens=5)
    stored_rows = dict(blocks=blocks, quantized=lambda rows: hire.Quantized.fit(rows, 8)).get(
        storage, jnp.asarray
    )(rows)
    with jax.set_mesh(mesh(4, kind=kind)):
        softmax = replace(alone, rows=stored_rows).sharded(
            RowSharding("rows", FULL, interleaved=storage != "plain")
        )
        sharded = hire.convert(plain, softmax=softmax)
        assert sharded.softmax.with_rows(sharded.embedding[...]).axis == softmax.axis
        np.testing.assert_allclose(sharded.prefill(tokens)[0], hidden, atol=1e-5)
        np.testing.assert_allclose(sharded.logits(hidden), plain.logits(hidden), atol=1e-4)
        if storage != "quantized":  # rounded rows have other logits
            assert sharded.embedding.shape[0] == 512
            assert hire.generate(sharded, tokens, new_tokens=5).tolist() == written.tolist()
        again = hire.convert(sharded, softmax=sharded.softmax.with_rows(sharded.embedding[...]))
        assert again.embedding[...] is sharded.embedding[...]
        for back in (
            hire.convert(sharded),
            hire.convert(sharded, softmax=alone),
            hire.convert(again),
        ):
            assert back.embedding.shape == (510, 64)
            np.testing.assert_array_equal(back.embedding[...], rows)
            np.testing.assert_allclose(back.prefill(tokens)[0], hidden, atol=1e-5)
            assert hire.generate(back, tokens, new_tokens=5).tolist() == written.tolist()
        other = Decoder(preset("tiny", vocabulary=510), rngs=nnx.Rngs(1))
        with pytest.raises(ValueError, match="510"):
            hire.convert(other, softmax=softmax)


@pytest.mark.parametrize("sizes", [(4,), (2, 2)])
def test_explicit_axes_generate_the_same_tokens(alone, rng, sizes):
    """jax.make_mesh makes Explicit axes where nothing else is asked for."""
    tokens = jnp.asarray(rng.integers(3, 512, (2, 5)), jnp.int32)
    with jax.set_mesh(mesh(*sizes, kind=AxisType.Explicit)):
        model = Decoder(CONFIG, rngs=nnx.Rngs(0))
        assert [shard.data.shape for shard in model.embedding[...].addressable_shards] == [
            (128, 64)
        ] * 4
        same(model, alone)
        for sampling in (dict(), dict(temperature=0.7, top_k=8, seed=1)):
            generated = hire.generate(model, tokens, new_tokens=8, **sampling)
            assert (
                generated.tolist()
                == hire.generate(alone, tokens, new_tokens=8, **sampling).tolist()
            )
        hidden, cache = model.prefill(tokens, 6)
        after, _ = jax.jit(lambda model, token, cache: model.merge().step(token, cache))(
            SplitModel.of(model), tokens[:, 0], cache
        )
        np.testing.assert_allclose(
            model.logits(after), jnp.squeeze(model.logits(after[:, None]), 1), atol=1e-5
        )


@pytest.mark.parametrize("sizes", [(), (2, 2)])
def test_it_is_loaded_on_other_devices_than_it_was_saved_on(four, sizes, tmp_path):
    save_sharded(tmp_path / "model", four)
    if not sizes:
        loaded = load_sharded(tmp_path / "model", CONFIG)
        assert len(loaded.embedding[...].devices()) == 1
    else:
        with jax.set_mesh(mesh(*sizes)):
            loaded = load_sharded(tmp_path / "model", CONFIG)
        assert [shard.data.shape for shard in loaded.embedding[...].addressable_shards] == [
            (128, 64)
        ] * 4
    same(loaded, four)


def test_a_model_loaded_on_a_mesh_runs_there(alone, four, tmp_path, rng):
    tokens = jnp.asarray(rng.integers(3, 512, (2, 5)), jnp.int32)
    save_sharded(str(tmp_path / "model"), four)
    with jax.set_mesh(mesh(4)):
        loaded = load_sharded(str(tmp_path / "model"), CONFIG)
        assert {len(array.devices()) for array in named_arrays(loaded).values()} == {
            4
        }  # norms, too, which every device holds
        hidden = jax.jit(lambda tokens: loaded.prefill(tokens)[0])(tokens)
        generated = hire.generate(loaded, tokens, new_tokens=4)
    np.testing.assert_allclose(hidden, alone.prefill(tokens)[0], atol=1e-5)
    assert generated.tolist() == hire.generate(alone, tokens, new_tokens=4).tolist()


def test_the_float_type_is_kept(tmp_path):
    save_sharded(tmp_path / "model", Decoder(CONFIG, rngs=nnx.Rngs(0), dtype=jnp.bfloat16))
    assert load_sharded(tmp_path / "model").embedding[...].dtype == jnp.bfloat16


def test_what_cannot_be_loaded_is_refused(alone, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    with pytest.raises(FileNotFoundError, match="model"):
        load_sharded(folder)
    save_sharded(folder, alone)
    with pytest.raises(FileExistsError, match="model"):
        save_sharded(folder, alone)
    with pytest.raises(ValueError, match="width"):
        load_sharded(folder, preset("tiny", heads=2, kv_heads=1, head_width=30, width=32))
    part = next(iter(sorted(folder.glob("weights/**/d/*"))))
    whole = part.read_bytes()
    for damaged in (whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1])):
        part.write_bytes(damaged)
        with pytest.raises(ValueError, match="model"):
            load_sharded(folder)
    monkeypatch.setattr(
        "orbax.checkpoint.Checkpointer.save",
        lambda *_: (_ for _ in ()).throw(OSError("No space left on device")),
    )
    with pytest.raises(OSError, match="other.*No space left on device"):
        save_sharded(tmp_path / "other", alone)

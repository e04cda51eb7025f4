"""A model spread over devices: drawn, saved and loaded where its parts lie, and the same words on any number of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

import hire
from hire.models import Decoder, preset
from hire.models.checkpoints import load_sharded, save_sharded
from hire.models.decoder import drawing, spread
from hire.models.weights import named_arrays

CONFIG = preset("tiny", vocabulary=512, heads=2, kv_heads=1, head_width=15 * 2)  # 30 rows of keys: not over 4 devices


def mesh(*sizes: int):
    return jax.make_mesh(sizes, ("rows", "more")[: len(sizes)], (AxisType.Auto,) * len(sizes))


@pytest.fixture(scope="module")
def alone():
    return Decoder(CONFIG, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def four():
    with jax.set_mesh(mesh(4)):
        return Decoder(CONFIG, rngs=nnx.Rngs(0))


def same(ours: Decoder, theirs: Decoder):
    for name, array in named_arrays(ours).items():
        np.testing.assert_allclose(array, named_arrays(theirs)[name], rtol=1e-5, atol=1e-7, err_msg=name)


def test_every_device_draws_its_own_rows_of_the_same_model(alone, four):
    rows = four.embedding[...]
    assert [shard.data.shape for shard in rows.addressable_shards] == [(128, 64)] * 4
    assert four.blocks[0].attention.key[...].sharding.is_fully_replicated
    same(four, alone)


def test_drawing_takes_memory_for_its_own_rows_alone():
    def used(where: object) -> int:
        told = drawing((4096, 512), 512, jnp.float32, where).lower(jax.random.key(0)).compile().memory_analysis()
        return told.output_size_in_bytes + told.temp_size_in_bytes

    whole = used(spread(4096, 512))
    with jax.set_mesh(mesh(4)):
        assert 4 * used(spread(4096, 512)) < 1.05 * whole


def test_it_writes_the_same_words(alone, four, rng):
    tokens = jnp.asarray(rng.integers(3, 512, (2, 5)), jnp.int32)
    with jax.set_mesh(mesh(4)):
        words = hire.generate(four, tokens, new_tokens=8)
    assert words.tolist() == hire.generate(alone, tokens, new_tokens=8).tolist()


@pytest.mark.parametrize("sizes", [(), (2, 2)])
def test_it_is_loaded_on_other_devices_than_it_was_saved_on(four, sizes, tmp_path):
    save_sharded(tmp_path / "model", four)
    if not sizes:
        loaded = load_sharded(tmp_path / "model", CONFIG)
        assert len(loaded.embedding[...].devices()) == 1
    else:
        with jax.set_mesh(mesh(*sizes)):
            loaded = load_sharded(tmp_path / "model", CONFIG)
        assert [shard.data.shape for shard in loaded.embedding[...].addressable_shards] == [(128, 64)] * 4
    same(loaded, four)


def test_a_model_loaded_on_a_mesh_runs_there(alone, four, tmp_path, rng):
    tokens = jnp.asarray(rng.integers(3, 512, (2, 5)), jnp.int32)
    save_sharded(str(tmp_path / "model"), four)
    with jax.set_mesh(mesh(4)):
        loaded = load_sharded(str(tmp_path / "model"), CONFIG)
        assert {len(array.devices()) for array in named_arrays(loaded).values()} == {4}  # norms, too, which every device holds
        hidden = jax.jit(lambda tokens: loaded.prefill(tokens)[0])(tokens)
        words = hire.generate(loaded, tokens, new_tokens=4)
    np.testing.assert_allclose(hidden, alone.prefill(tokens)[0], atol=1e-5)
    assert words.tolist() == hire.generate(alone, tokens, new_tokens=4).tolist()


def test_its_own_float_type_is_kept(tmp_path):
    save_sharded(tmp_path / "model", Decoder(CONFIG, rngs=nnx.Rngs(0), dtype=jnp.bfloat16))
    assert load_sharded(tmp_path / "model").embedding[...].dtype == jnp.bfloat16


def test_what_cannot_be_loaded_is_refused(alone, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    with pytest.raises(FileNotFoundError, match="no such folder; expected one that save_sharded wrote"):
        load_sharded(folder)
    save_sharded(folder, alone)
    with pytest.raises(FileExistsError, match="is there already; name a new folder"):
        save_sharded(folder, alone)
    with pytest.raises(ValueError, match="a model of another width; expected the configuration that was asked for"):
        load_sharded(folder, preset("tiny", heads=2, kv_heads=1, head_width=30, width=32))
    part = next(iter(sorted(folder.glob("weights/**/d/*"))))
    whole = part.read_bytes()
    for damaged in (whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1])):
        part.write_bytes(damaged)
        with pytest.raises(ValueError, match="its contents are not those that were saved; save it again"):
            load_sharded(folder)
    monkeypatch.setattr("orbax.checkpoint.Checkpointer.save", lambda *_: (_ for _ in ()).throw(OSError("No space left on device")))
    with pytest.raises(OSError, match=r"could not be written \(No space left on device\): free some space"):
        save_sharded(tmp_path / "other", alone)

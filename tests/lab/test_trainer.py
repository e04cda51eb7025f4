"""Training: batches, real kills, a disk that is full; the files of trained models."""

import hashlib
import os
import signal
import subprocess
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

from hire import storage
from hire.lab.data.text import documents
from hire.lab.metrics import intervals, model_quality
from hire.lab.training import plans, trainer
from hire.lab.training.baselines import baselines, kneser_ney
from hire.models import Decoder, TextModel, preset
from hire.models.checkpoints import load_checkpoint, save_checkpoint
from hire.models.tokenizer import byte_tokenizer

PLAN = plans.plan_of("groups8", toy=True)
TOY = replace(
    PLAN, config=replace(PLAN.config, layers=1), density_warmup=0.5
)  # five programs are compiled, one a stage
RUN = """
import sys
from dataclasses import replace
from pathlib import Path
from hire.lab.training import trainer
sys.path.insert(0, {tests!r})
from test_trainer import TOY
if len(sys.argv) > 2:  # no file may grow beyond so many bytes: writes fail as on a full disk
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
trainer.train(TOY, "toy", save_every=2, folder=Path(sys.argv[1]))
"""


def start(*arguments):
    code = RUN.format(tests=os.path.dirname(__file__))
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def killed_at(text, folder):
    """Start the toy's run and kill it once it prints `text`."""
    with start(folder) as process:
        for line in process.stdout:
            if text in line:
                process.send_signal(signal.SIGKILL)
                break
        process.wait()
        assert process.returncode == -signal.SIGKILL, process.stderr.read()


@pytest.fixture(autouse=True, scope="module")
def as_outside():
    """optax promotes types by itself."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The losses and weights of the toy's run without an end before its end."""
    trained = trainer.train(TOY, "toy", save_every=50, folder=tmp_path_factory.mktemp("whole"))
    return trained.losses, jax.tree.map(np.asarray, nnx.state(trained.model))


def test_every_window_is_seen_once_an_epoch():
    tokens, plan = np.arange(100, 100 + 70), replace(TOY, length=10, batch=3)
    epoch = np.concatenate([trainer.batch_at(tokens, plan, step) for step in (0, 1)])
    assert (epoch[:, 0] == plans.BOS).all()
    assert (
        len({tuple(window) for window in epoch[:, 1:]}) == 6
    )  # of seven: the last, incomplete batch waits for the next order
    assert {window[1] % 10 for window in epoch} == {0}
    again, other = (
        trainer.batch_at(tokens, plan, 1),
        trainer.batch_at(tokens, replace(plan, seed=1), 1),
    )
    assert (again == epoch[3:]).all() and (other != again).any()
    assert (trainer.batch_at(tokens, plan, 2) != epoch[:3]).any()


def test_the_loss_falls(uninterrupted):
    losses, _ = uninterrupted
    assert np.isfinite(losses).all()
    assert losses[0] == pytest.approx(np.log(512), abs=1.0)
    assert losses[-3:].mean() < losses[:3].mean() - 0.1


def test_a_run_that_was_killed_and_ran_out_of_disk_goes_on_to_the_same_losses(
    uninterrupted, tmp_path, monkeypatch
):
    killed_at("step 2 of 12", tmp_path)
    with start(tmp_path, 2000) as process:
        _, errors = process.communicate()
    assert process.returncode == 1
    last = errors.strip().splitlines()[-1]
    assert last.startswith("RuntimeError") and "step" in last and str(tmp_path) in last, errors
    kept = trainer.Resumable(next(tmp_path.glob("toy-*"))).manager.latest_step()
    assert kept in (2, 4)
    steps, batch_at = [], trainer.batch_at
    monkeypatch.setattr(
        trainer,
        "batch_at",
        lambda tokens, plan, step: steps.append(step) or batch_at(tokens, plan, step),
    )
    resumed = trainer.train(TOY, "toy", save_every=50, folder=tmp_path)  # once there is room
    assert steps == list(range(kept, 12))  # from its last checkpoint, not from the beginning
    assert np.isfinite(resumed.seconds).all()
    losses, weights = uninterrupted
    np.testing.assert_allclose(resumed.losses, losses, rtol=1e-5)
    for ours, theirs in zip(
        jax.tree.leaves(nnx.state(resumed.model)), jax.tree.leaves(weights), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_two_processes_do_not_train_in_one_folder(tmp_path):
    folder = tmp_path / f"toy-{hashlib.sha256(repr(TOY).encode()).hexdigest()[:8]}"
    with storage.locked(folder), pytest.raises(TimeoutError, match=folder.name):
        trainer.train(TOY, "toy", folder=tmp_path)


def test_a_schedule_is_dense_at_first_and_sparser_in_stages():
    plan = replace(TOY, config=replace(TOY.config, kept=0.0625), density_warmup=0.5)
    expected = [1.0, 1.0, 0.5, 0.25, 0.25, 0.125] + [0.0625] * 6
    assert [plan.config_at(step).kept for step in range(12)] == pytest.approx(expected)
    assert {replace(TOY, density_warmup=0.0).config_at(step).kept for step in range(12)} == {
        TOY.config.kept
    }


def test_variants_have_names():
    assert plans.plan_of("short-groups8@2") == replace(
        plans.plan_of("groups8"), tokens=plans.SHORT, seed=2
    )
    assert plans.plan_of("dense").config.groups == 2048
    assert [plans.plan_of(name).density_warmup for name in ("dense", "topk", "groups8-abrupt")] == [
        0.0,
        0.5,
        0.0,
    ]
    assert all(plans.plan_of(name, toy=True).steps == 12 for name in plans.MODELS)
    with pytest.raises(ValueError, match="groups9"):
        plans.plan_of("groups9")


def test_outcomes_are_records_or_toys():
    toys = trainer.outcomes(["dense", "short-none@1"], toy=True)
    assert all(
        toy["summary"]["all"]["loss"] > 4 and len(toy["training_loss"]) == 12
        for toy in toys.values()
    )
    assert toys["dense"]["summary"].keys() == {"speech", "commentary", "novel", "all"}
    counted = trainer.outcomes(["baselines"], toy=True)["baselines"]["all"]
    assert counted["5-gram"] < counted["1-gram"] < 16
    with pytest.raises(FileNotFoundError, match="short-none@9"):
        trainer.outcomes(["short-none@9"])


@pytest.fixture
def saved(tmp_path):
    model = Decoder(
        preset("tiny", layers=1, gated=False, group_size=8, kept=0.25, sparse_layers=(0,)),
        rngs=nnx.Rngs(0),
    )
    save_checkpoint(tmp_path / "toy.safetensors", model, byte_tokenizer())
    return model, tmp_path / "toy.safetensors"


def test_a_checkpoint_gives_the_model_back(saved):
    model, path = saved
    loaded = load_checkpoint(path, model.config)
    assert loaded.model.config == model.config
    for ours, theirs in zip(
        jax.tree.leaves(nnx.state(loaded.model)), jax.tree.leaves(nnx.state(model)), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs.astype(jnp.bfloat16).astype(jnp.float32))
    assert loaded.tokenizer.encode("ab").ids == byte_tokenizer().encode("ab").ids
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


SAVE = """
import resource, sys
from pathlib import Path
from hire.models.checkpoints import load_checkpoint, save_checkpoint
path = Path(sys.argv[1])
subject = load_checkpoint(path)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
save_checkpoint(path, subject.model, subject.tokenizer)
"""


def test_a_full_disk_leaves_the_last_model(saved):
    model, path = saved
    whole = path.read_bytes()
    output = subprocess.run(
        [sys.executable, "-c", SAVE, str(path), str(len(whole) // 2)],
        capture_output=True,
        text=True,
    )
    assert output.returncode == 1
    last = output.stderr.strip().splitlines()[-1]
    assert last.startswith("OSError") and "toy.safetensors" in last, output.stderr
    assert path.read_bytes() == whole and list(path.parent.iterdir()) == [path]


def test_a_checkpoint_that_is_not_whole_is_refused(saved):
    model, path = saved
    whole = path.read_bytes()
    for damaged in (
        whole[: len(whole) // 2],
        b"",
        whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:],
    ):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="toy.safetensors") as error:
            load_checkpoint(path)
        assert "\n" not in str(error.value)
    path.write_bytes(whole.replace(b'\\"kept\\": 0.25', b'\\"kept\\": 0.75'))
    with pytest.raises(ValueError, match="toy.safetensors"):
        load_checkpoint(path)
    path.write_bytes(whole)
    with pytest.raises(ValueError, match="toy.safetensors.*kept, layers"):
        load_checkpoint(path, replace(model.config, kept=0.5, layers=2, sparse_layers=(0,)))
    with pytest.raises(FileNotFoundError, match="nothing.safetensors"):
        load_checkpoint(path.with_stem("nothing"))


def test_every_token_of_a_document_is_scored_once(saved):
    model, _ = saved
    subject = TextModel(model, byte_tokenizer(), "random weights")
    texts = documents("evaluation", ["speech"])[:2]
    short = [
        replace(text, text=text.text[:length]) for text, length in zip(texts, (70, 32), strict=True)
    ]
    scores = model_quality.score_documents(subject, short, length=32)
    assert scores.tokens.tolist() == [70, 32] and scores.bytes.tolist() == [70, 32]
    ids = np.asarray(byte_tokenizer().encode(short[0].text).ids)
    expected = 0.0
    for at in range(0, 70, 32):
        part = ids[at : at + 32]
        logits = model.logits(
            model.prefill(np.concatenate([[2], part[:-1]])[None].astype(np.int32))[0]
        )[0]
        expected -= float(
            np.sum(np.asarray(jax.nn.log_softmax(logits))[np.arange(len(part)), part])
        )
    assert scores.nats[0] == pytest.approx(expected, rel=1e-4)
    summary = scores.summary()
    assert summary["bits_per_byte"] == pytest.approx(summary["loss"] / np.log(2))


def test_losses_over_others_by_hand():
    over = intervals.relative_loss([11.0, 20.0, 30.0], [10.0, 20.0, 30.0])
    assert over["mean"] == pytest.approx(1 / 60) and over["documents"] == 3
    assert over["low"] == 0.0 and over["high"] == pytest.approx(
        0.1
    )  # the first document is drawn three times in 1 of 27, or never


def test_kneser_ney_by_hand():
    # Tokens 1 2 1 2 1 3 with order 2. Bigrams (0 starts): 01 12 21 12 21 13. Once: 01, 13; twice:
    # 12, 21. Discount 2 / (2 + 4) = 1/3. Continuations: 1 after {0, 2} = 2, 2 after {1} = 1, 3
    # after {1} = 1: 4, 3 kinds; discount 1/2. p1(3) = (1 - 1/2)/4 + (1/2)(3)/4 (1/8) = 0.125 +
    # 0.046875; p(3 | 1) = (1 - 1/3)/3 + (1/3)(2)/3 p1(3).
    nats = kneser_ney(np.asarray([1, 2, 1, 2, 1, 3]), np.asarray([1, 3]), 8, 2)
    assert np.exp(-nats[1]) == pytest.approx(2 / 9 + 2 / 9 * 0.171875)
    every = np.asarray(
        [
            np.exp(-kneser_ney(np.asarray([1, 2, 1, 2, 1, 3]), np.asarray([1, last]), 8, 2)[1])
            for last in range(8)
        ]
    )
    assert every.sum() == pytest.approx(1.0)


def test_baselines_take_each_document_by_itself():
    tokenizer = byte_tokenizer()
    train = np.asarray(tokenizer.encode(documents("train")[0].text[:20000]).ids)
    texts = [
        replace(text, text=text.text[:1000]) for text in documents("evaluation", ["novel"])[:2]
    ]
    alone, together = (
        [baselines(tokenizer, train, [text]) for text in texts],
        baselines(tokenizer, train, texts),
    )
    sizes = [len(text.text.encode()) for text in texts]
    for order in ("1-gram", "5-gram"):
        assert together[order] == pytest.approx(
            np.average([result[order] for result in alone], weights=sizes)
        )
    assert together["5-gram"] < together["1-gram"] < 8


def test_a_sharded_model_is_trained_and_saved():
    # two key/value heads on four devices: XLA lays what is theirs over half of them
    with jax.set_mesh(jax.make_mesh((4,), ("chips",), (AxisType.Auto,), devices=jax.devices()[:4])):
        assert np.isfinite(trainer.train_toy("ladder").losses).all()

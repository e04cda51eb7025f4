"""Training that resumes from its last checkpoint."""

import functools
import hashlib
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax.contrib
from flax import nnx
from jax.flatten_util import ravel_pytree
from tokenizers import Tokenizer

from hire import storage
from hire.lab import records
from hire.lab.data.text import Document, beginnings, documents
from hire.lab.metrics.model_quality import score_documents
from hire.lab.paths import CHECKPOINTS
from hire.lab.training.baselines import baselines
from hire.lab.training.plans import BOS, KINDS, SHIPPED, SMALL, Plan, plan_of
from hire.models import Decoder, TextModel
from hire.models.checkpoints import (
    check_folder,
    load_checkpoint,
    save_checkpoint,
    write_folder_checksums,
)
from hire.models.tokenizer import train_tokenizer
from hire.storage import cache_folder
from hire.types import Array, Float, Tokens


@functools.cache
def corpus(vocabulary: int, count: int | None = None) -> tuple[Tokenizer, np.ndarray]:
    """Train a tokenizer on the training split and tokenize the split.

    Args:
        vocabulary: Size of the vocabulary.
        count: Number of documents; all by default.

    Returns:
        The tokenizer, and the tokens of all documents in one array.
    """
    texts = [document.text for document in documents("train")[:count]]
    tokenizer = train_tokenizer(texts, vocabulary)
    ids = [text.ids for text in tokenizer.encode_batch_fast(texts)]
    return tokenizer, np.concatenate([np.asarray(text, np.int32) for text in ids])


def batch_at(tokens: np.ndarray, plan: Plan, step: int) -> Tokens:
    """Return the windows (batch, length + 1) of a training step, <bos> first.

    Every epoch uses each window of the corpus once, in an order that depends on the seed.
    """
    spans = len(tokens) // plan.length
    epoch, index = divmod(step, spans // plan.batch)
    order = np.random.default_rng([plan.seed, epoch]).permutation(spans)
    indices = order[index * plan.batch : (index + 1) * plan.batch]
    windows = tokens[: spans * plan.length].reshape(spans, plan.length)[indices]
    return np.concatenate([np.full((plan.batch, 1), BOS, np.int32), windows], axis=1)


def mean_loss(graph: nnx.GraphDef, state: nnx.State, windows: Tokens) -> Float[Array, ""]:
    """Return the mean -log p, in nats, of every token of the windows but the first."""
    model = nnx.merge(graph, state)
    logits = model.logits(model.prefill(windows[:, :-1])[0])
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]))


def optimizer(plan: Plan) -> optax.GradientTransformation:
    """Return the optimizer of a plan.

    Muon updates the matrices of attention and FFN; Adam updates embedding and norms. All updates
    have the size of Adam's (arXiv 2502.16982).
    """
    rising = optax.linear_schedule(0.0, plan.learning_rate, plan.warmup_steps)
    falling = optax.linear_schedule(plan.learning_rate, 0.0, plan.steps - plan.warmup_steps)
    schedule = optax.join_schedules([rising, falling], [plan.warmup_steps])

    def orthogonal(path, leaf):
        return (
            optax.contrib.MuonDimensionNumbers()
            if leaf.ndim == 2 and "embedding" not in jax.tree_util.keystr(path)
            else None
        )

    muon = optax.contrib.muon(
        schedule,
        ns_steps=4,
        consistent_rms=0.2,
        weight_decay=plan.decay,
        adam_b2=0.95,
        muon_weight_dimension_numbers=functools.partial(
            jax.tree_util.tree_map_with_path, orthogonal
        ),
    )
    return optax.chain(optax.clip_by_global_norm(1.0), muon)


@functools.partial(jax.jit, static_argnames=("graph", "plan"), donate_argnames=("state", "moments"))
def update(
    graph: nnx.GraphDef, plan: Plan, state: nnx.State, moments: optax.OptState, windows: Tokens
):
    """Run one training step. Return the loss before it, and the new state and optimizer state."""
    loss, gradient = jax.value_and_grad(functools.partial(mean_loss, graph), argnums=0)(
        state, windows
    )
    updates, moments = optimizer(plan).update(gradient, moments, state)
    return loss, optax.apply_updates(state, updates), moments


@dataclass(frozen=True)
class Trained:
    """A trained model with its tokenizer.

    Attributes:
        model: The model.
        tokenizer: The tokenizer.
        losses: Loss of every step in nats.
        seconds: Duration of every step in seconds.
    """

    model: Decoder
    tokenizer: Tokenizer
    losses: np.ndarray
    seconds: np.ndarray

    @property
    def subject(self) -> TextModel:
        return TextModel(self.model, self.tokenizer, "trained here")


def beginning(plan: Plan) -> tuple[Decoder, nnx.State, optax.OptState]:
    """Return the initial model of a plan, its state and the initial state of the optimizer."""
    model = Decoder(plan.config, rngs=nnx.Rngs(plan.seed))
    state = nnx.state(model, nnx.Param)
    return model, state, optimizer(plan).init(state)


def step_form(plan: Plan) -> Callable:
    """Return a function that runs one training step, to be timed by `interleaved`.

    It takes the number of the step, and each call continues from the one before.
    """
    tokens = corpus(plan.config.vocabulary, plan.documents)[1]
    model, state, moments = beginning(plan)
    graph = nnx.graphdef(model)

    def form(step: int) -> jax.Array:
        nonlocal state, moments
        loss, state, moments = update(graph, plan, state, moments, batch_at(tokens, plan, step))
        return loss

    return form


def train(plan: Plan, name: str, *, save_every: int = 50, folder: Path | None = None) -> Trained:
    """Train a model, starting from its last checkpoint if there is one.

    Args:
        plan: The plan.
        name: Name of the run, for its folder and its messages.
        save_every: Steps between checkpoints.
        folder: Folder of all runs; below the user's cache folder by default.

    Raises:
        RuntimeError: A checkpoint cannot be written. The one before is intact.
        TimeoutError: Another process trains by the same plan in the same folder.
    """
    run_folder = (
        folder or cache_folder() / "training"
    ) / f"{name}-{hashlib.sha256(repr(plan).encode()).hexdigest()[:8]}"
    with storage.locked(run_folder, wait=False):
        return train_in(run_folder, plan, name, save_every)


def train_in(run_folder: Path, plan: Plan, name: str, save_every: int) -> Trained:
    """Run `train` in a folder; the caller has its lock."""
    tokenizer, tokens = corpus(plan.config.vocabulary, plan.documents)
    model, state, moments = beginning(plan)
    configs = set(map(plan.config_at, range(plan.steps)))
    graphs = {config: nnx.graphdef(Decoder(config, rngs=nnx.Rngs(0))) for config in configs}
    checkpoints = Resumable(run_folder)
    first_step, (state, moments, history) = checkpoints.restore(
        (state, moments, jnp.full((2, plan.steps), jnp.nan))
    )
    history = np.array(history)  # losses and seconds of every step
    for step in range(first_step, plan.steps):
        start = time.perf_counter()
        loss, state, moments = update(
            graphs[plan.config_at(step)], plan, state, moments, batch_at(tokens, plan, step)
        )
        history[0, step] = loss  # blocks until the step has finished
        history[1, step] = time.perf_counter() - start
        done = step + 1
        if done % save_every == 0 or done == plan.steps:
            checkpoints.save(done, (state, moments, jnp.asarray(history)))
            recent_loss, seconds = np.mean(
                history[:, max(first_step, done - save_every) : done], axis=1
            )
            tokens_per_second, minutes = (
                plan.batch * plan.length / seconds,
                (plan.steps - done) * seconds / 60,
            )
            print(
                f"{name}: step {done} of {plan.steps}, loss {recent_loss:.4f}, "
                f"{tokens_per_second:.0f} tokens/s, {minutes:.1f} min left",
                flush=True,
            )
    nnx.update(model, state)
    return Trained(model, tokenizer, *history)


def results(trained: Trained, texts: Sequence[Document]) -> dict:
    """Evaluate a trained model.

    Args:
        trained: The model.
        texts: Documents for the evaluation.

    Returns:
        What a record of the training contains.
        `summary`: summary of the scores by kind of text, and of "all".
        `nats`: loss of each document, in nats.
        `training_loss`: training loss in 50 means.
        `minutes`: training time.
    """
    scores = score_documents(trained.subject, texts)
    kinds = np.asarray([text.kind for text in texts])
    return dict(
        summary={kind: scores.of(kinds == kind).summary() for kind in sorted(set(kinds))}
        | dict(all=scores.summary()),
        nats=np.round(scores.nats, 2).tolist(),
        training_loss=[
            float(np.mean(part))
            for part in np.array_split(trained.losses, min(50, len(trained.losses)))
        ],
        minutes=float(np.nanmedian(trained.seconds) * len(trained.seconds) / 60),
    )


def texts_judged() -> list[Document]:
    """Return the first 6000 characters of every evaluation document.

    These are 262,000 tokens; their evaluation takes a minute.
    """
    return beginnings(documents("evaluation", KINDS), 6000)


def train_variant(variant: str) -> None:
    """Train a variant, evaluate it and write the results as a record.

    A variant of SHIPPED is also saved as a checkpoint. "baselines" evaluates the baselines of the
    variants.
    """
    # Called first and cached: the record names the commit that the training started from.
    records.commit()
    if variant == "baselines":
        return write_baselines()
    plan = plan_of(variant)
    trained = train(plan, variant)
    if variant in SHIPPED:
        path = CHECKPOINTS / f"{variant}.safetensors"
        save_checkpoint(path, trained.model, trained.tokenizer)
        # Evaluate the model that is shipped.
        trained = replace(trained, model=load_checkpoint(path).model)
    record = records.write(
        records.RECORDS,
        "training",
        f"training/{variant}",
        kind="measured",
        weights="trained here",
        setting=asdict(plan)
        | dict(variant=variant, parameters=sum(plan.config.parameters().values())),
        results=results(trained, texts_judged()),
        command=f"make train VARIANT={variant}",
    )
    for kind, summary in record["results"]["summary"].items():
        print(
            f"{variant}: {kind} {summary['bits_per_byte']:.4f} bits a byte, "
            f"{summary['accuracy']:.1%} of the tokens guessed"
        )


def write_baselines() -> None:
    """Evaluate the baselines on the evaluation texts and write a record.

    The baselines are n-grams on the same tokens and a compressor.
    """
    tokenizer, tokens = corpus(SMALL.vocabulary)
    texts = texts_judged()
    texts_by_kind = {kind: [text for text in texts if text.kind == kind] for kind in KINDS} | dict(
        all=texts
    )
    record = records.write(
        records.RECORDS,
        "training",
        "training/baselines",
        kind="measured",
        weights="n-grams counted here",
        setting=dict(tokens=len(tokens), vocabulary=SMALL.vocabulary),
        results={
            kind: baselines(tokenizer, tokens, texts) for kind, texts in texts_by_kind.items()
        },
        command="make train VARIANT=baselines",
    )
    for kind, scores in record["results"].items():
        print(f"{kind}:", *(f"{name} {bits:.4f}" for name, bits in scores.items()), "bits a byte")


def outcomes(variants: Sequence[str], *, toy: bool = False) -> dict[str, dict]:
    """Return the results of variants from their committed records.

    Args:
        variants: The variants.
        toy: Train toys of the variants now, and return their results.

    Raises:
        FileNotFoundError: A variant has no record. The message states the command that creates it.
    """
    if toy:
        return {name: toy_results(name.removeprefix("short-")) for name in variants}
    by_id = {record["id"]: record["results"] for record in records.read(topic="training")}
    for name in variants:
        if f"training/{name}" not in by_id:
            raise FileNotFoundError(
                f"no record of training {name}: `make train VARIANT={name}` makes it"
            )
    return {name: by_id[f"training/{name}"] for name in variants}


def trained_model(variant: str, *, toy: bool = False) -> TextModel:
    """Return a shipped model; with `toy`, train a toy of its kind now."""
    return (
        train_toy(variant).subject
        if toy
        else load_checkpoint(CHECKPOINTS / f"{variant}.safetensors")
    )


@functools.cache
def train_toy(variant: str) -> Trained:
    """Train the toy of a variant in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        return train(plan_of(variant, toy=True), variant, folder=Path(folder))


@functools.cache
def toy_results(variant: str) -> dict:
    """Return the results of the toy of a variant, on every 40th evaluation text."""
    texts = texts_judged()[::40]
    if variant == "baselines":
        plan = plan_of("dense", toy=True)
        return dict(all=baselines(*corpus(plan.config.vocabulary, plan.documents), texts))
    return results(train_toy(variant), texts)


def flattened(tree):
    """Return a tree as one vector, and the function that restores the tree.

    The tree goes through the host: jax 0.7 cannot flatten everything that XLA distributes over a
    mesh.
    """
    return ravel_pytree(jax.device_get(tree))


class Resumable:
    """Checkpoints of one run in a folder, the last two of them, written by Orbax.

    One process at a time may use the folder. Every checkpoint contains the checksums of all its
    files, which are written last. Incomplete files of a killed run are removed.
    """

    def __init__(self, folder: Path):
        import orbax.checkpoint as ocp

        self.ocp, self.folder = ocp, folder.absolute()
        self.folder.mkdir(parents=True, exist_ok=True)
        for entry in self.folder.iterdir():
            if not entry.name.isdigit():  # a temporary name of Orbax, or no checkpoint of the run
                storage.clear(entry)
        self.remove_damaged()
        options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
        self.manager = ocp.CheckpointManager(self.folder, options=options)

    def steps(self) -> list[int]:
        """Return the steps that have a checkpoint, the last one first."""
        return sorted(
            (int(entry.name) for entry in self.folder.iterdir() if entry.name.isdigit()),
            reverse=True,
        )

    def remove_damaged(self) -> None:
        """Remove damaged checkpoints.

        One printed line for each states where the run continues.
        """
        intact, damaged = [], {}
        for step in self.steps():
            try:
                check_folder(self.folder / str(step))
                intact.append(step)
            except ValueError as error:
                damaged[step] = storage.reason_of(error)
        for step, reason in damaged.items():
            outcome = (
                f"that of step {intact[0]} is used"
                if intact
                else "no other is whole, so training begins anew"
            )
            print(f"the checkpoint of step {step} is damaged, {outcome} ({reason})", flush=True)
            storage.clear(self.folder / str(step))

    def restore(self, tree):
        """Restore the last intact checkpoint.

        Args:
            tree: Initial values, which also define the shapes.

        Returns:
            The step of the checkpoint and its values; 0 and `tree` where there is no checkpoint.

        Raises:
            RuntimeError: Orbax cannot read a checkpoint although its files match their checksums.
        """
        step = self.manager.latest_step()
        if step is None:
            return 0, tree
        flat, unravel = flattened(tree)
        try:
            restored = self.manager.restore(
                step, args=self.ocp.args.StandardRestore({"flat": flat})
            )["flat"]
        except Exception as error:  # Orbax raises many types
            raise RuntimeError(
                f"{self.folder / str(step)} cannot be read ({storage.reason_of(error)}); remove it "
                "to go on from the one before"
            ) from None
        return step, unravel(restored)

    def save(self, step: int, tree) -> None:
        """Write a checkpoint of the tree as one vector.

        With many arrays, Orbax would go on to write the others after one of them has failed.

        Raises:
            RuntimeError: The checkpoint cannot be written. The one before is intact.
        """
        try:
            self.manager.save(step, args=self.ocp.args.StandardSave({"flat": flattened(tree)[0]}))
            write_folder_checksums(self.folder / str(step))
        except Exception as error:
            previous = next((saved_step for saved_step in self.steps() if saved_step != step), None)
            reason = storage.reason_of(error)
            raise RuntimeError(
                f"the checkpoint of step {step} could not be written ({reason}); that of step "
                f"{previous} is intact: "
                f"free some space below {self.folder} and run it again"
            ) from None

"""Training decoders on the committed text, dense or group-sparse; a run that is killed goes on where it last saved.

Batches depend on the seed and the step alone, so models of one seed see the same text in the same order, resumed or not.
"""

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
import optax
import optax.contrib
from flax import nnx
from jax.flatten_util import ravel_pytree
from tokenizers import Tokenizer

from hire.axes import Array, Float, Tokens
from hire.lab import records
from hire.lab.evaluation import score_documents
from hire.lab.ngram import baselines
from hire.lab.paths import CHECKPOINTS
from hire.lab.text import Document, beginnings, documents
from hire.models import Decoder, DecoderConfig, TextModel, preset, storage
from hire.models.checkpoints import check_folder, load_checkpoint, save_checkpoint, write_folder_checksums
from hire.models.tokenizer import train_tokenizer
from hire.models.weights import cache_folder

BOS = 2


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A model and how it is trained: on `tokens` tokens, in steps of `batch` windows of `length` tokens.

    The rate rises over the first `warmup` share of the steps and falls in a line to 0.
    In the first `easing` share of the steps the FFNs keep more: all groups, then kept^(1/4), kept^(2/4), kept^(3/4) of them for as
    many steps each. `documents` takes that many of the training split, for a toy.
    """

    config: DecoderConfig
    tokens: int
    batch: int = 16
    length: int = 256
    rate: float = 1e-2
    warmup: float = 0.04
    decay: float = 0.1
    seed: int = 0
    easing: float = 0.0
    documents: int | None = None

    @property
    def steps(self) -> int:
        return self.tokens // (self.batch * self.length)

    @property
    def warmup_steps(self) -> int:
        return int(self.warmup * self.steps)

    def config_at(self, step: int) -> DecoderConfig:
        """The configuration that is trained at a step: dense at first, and sparser in stages, where the schedule says so."""
        stage = min(4, int(4 * step / (self.easing * self.steps))) if self.easing else 4
        return replace(self.config, kept=self.config.kept ** (stage / 4))


LONG, LADDER, SHORT = 5_500_000, 2_400_000, 900_000  # tokens: about 50, 50 (with 32K words) and 8 minutes on two cores
# The long ones, whose models are committed: 13 MB each, and 29 MB for the ladder's, of which the embedding of 32K words is 17.
SHIPPED = ("dense", "groups8", "groups8-5", "ladder")
KINDS = ("speech", "commentary", "novel")  # what models are evaluated on: more of what they were trained on, and a novel unlike it

SMALL = preset("small")
MODELS = {
    "dense": SMALL,
    "groups8": replace(SMALL, group_size=8, kept=0.1),
    "groups8-5": replace(SMALL, group_size=8, kept=0.05),
    "groups8-20": replace(SMALL, group_size=8, kept=0.2),
    "groups8-abrupt": replace(SMALL, group_size=8, kept=0.1),  # without the easing that the other sparse ones have
    "topk": replace(SMALL, kept=0.1),
    **{f"groups{size}": replace(SMALL, group_size=size, kept=0.1) for size in (4, 16, 32)},
    "none": replace(SMALL, ffn_width=0),
    "narrow": replace(SMALL, ffn_width=200),  # as many neurons as groups8 keeps
    "experts": replace(SMALL, group_size=8, kept=0.1, routed=True),
    "ladder": replace(SMALL, group_size=8, kept=0.05, vocabulary=32768),  # whose softmax is worth a search, too
}


def plan_of(variant: str, *, toy: bool = False) -> Plan:
    """The plan of a variant: a model of MODELS for LONG tokens, the ladder's for LADDER; after "short-" for SHORT ones; "@1" at the
    end is seed 1.

    With `toy`, a model of the same kind for a dozen steps, which takes seconds and shows nothing. Raises ValueError, listing the
    models, for another name.
    """
    name, _, seed = variant.removeprefix("short-").partition("@")
    if name not in MODELS or not (seed.isdigit() or not seed):
        raise ValueError(f"variant {variant!r}: expected one of {', '.join(MODELS)}, perhaps short- before and @seed behind it")
    config, seeded = MODELS[name], int(seed or 0)
    if toy:
        sparse = dict(group_size=config.group_size, kept=config.kept, routed=config.routed, ffn_width=config.ffn_width // 4)
        config = preset("tiny", gated=False, **sparse)
        return Plan(config=config, tokens=12 * 4 * 32, batch=4, length=32, documents=2, seed=seeded)
    easing = 0.5 if config.kept < 1 and not name.endswith("-abrupt") else 0.0
    tokens = SHORT if variant.startswith("short-") else LADDER if name == "ladder" else LONG
    return Plan(config=config, tokens=tokens, seed=seeded, easing=easing)


@functools.cache
def corpus(vocabulary: int, count: int | None = None) -> tuple[Tokenizer, np.ndarray]:
    """A tokenizer trained on the training split, or its first `count` documents, and their tokens one after the other."""
    texts = [document.text for document in documents("train")[:count]]
    tokenizer = train_tokenizer(texts, vocabulary)
    ids = [text.ids for text in tokenizer.encode_batch_fast(texts)]
    return tokenizer, np.concatenate([np.asarray(text, np.int32) for text in ids])


def batch_at(tokens: np.ndarray, plan: Plan, step: int) -> Tokens:
    """The windows (batch, length + 1) of a step, <bos> first: every window of the corpus once an epoch, in the seed's order."""
    spans = len(tokens) // plan.length
    epoch, place = divmod(step, spans // plan.batch)
    order = np.random.default_rng([plan.seed, epoch]).permutation(spans)
    chosen = order[place * plan.batch : (place + 1) * plan.batch]
    windows = tokens[: spans * plan.length].reshape(spans, plan.length)[chosen]
    return np.concatenate([np.full((plan.batch, 1), BOS, np.int32), windows], axis=1)


def mean_loss(graph: nnx.GraphDef, state: nnx.State, windows: Tokens) -> Float[Array, ""]:
    """Mean of -log p, in nats, of every token of the windows but the first."""
    model = nnx.merge(graph, state)
    logits = model.logits(model.prefill(windows[:, :-1])[0])
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]))


def optimizer(plan: Plan) -> optax.GradientTransformation:
    """Muon for the matrices of attention and FFN, Adam for embedding and norms, all updates of Adam's size (arXiv 2502.16982)."""
    rising = optax.linear_schedule(0.0, plan.rate, plan.warmup_steps)
    falling = optax.linear_schedule(plan.rate, 0.0, plan.steps - plan.warmup_steps)
    schedule = optax.join_schedules([rising, falling], [plan.warmup_steps])

    def orthogonal(path, leaf):
        return optax.contrib.MuonDimensionNumbers() if leaf.ndim == 2 and "embedding" not in jax.tree_util.keystr(path) else None

    muon = optax.contrib.muon(
        schedule,
        ns_steps=4,
        consistent_rms=0.2,
        weight_decay=plan.decay,
        adam_b2=0.95,
        muon_weight_dimension_numbers=functools.partial(jax.tree_util.tree_map_with_path, orthogonal),
    )
    return optax.chain(optax.clip_by_global_norm(1.0), muon)


@functools.partial(jax.jit, static_argnames=("graph", "plan"), donate_argnames=("state", "moments"))
def update(graph: nnx.GraphDef, plan: Plan, state: nnx.State, moments: optax.OptState, windows: Tokens):
    """One step: the loss before it, and state and optimizer state after it."""
    loss, slope = jax.value_and_grad(functools.partial(mean_loss, graph), argnums=0)(state, windows)
    changes, moments = optimizer(plan).update(slope, moments, state)
    return loss, optax.apply_updates(state, changes), moments


@dataclass(frozen=True)
class Trained:
    """A trained model with its tokenizer, and of every step the loss in nats and the seconds."""

    model: Decoder
    tokenizer: Tokenizer
    losses: np.ndarray
    seconds: np.ndarray

    @property
    def subject(self) -> TextModel:
        return TextModel(self.model, self.tokenizer, "trained here")


def beginning(plan: Plan) -> tuple[Decoder, nnx.State, optax.OptState]:
    """The model of a plan before its first step, and its state and the optimizer's."""
    model = Decoder(plan.config, rngs=nnx.Rngs(plan.seed))
    state = nnx.state(model, nnx.Param)
    return model, state, optimizer(plan).init(state)


def step_form(plan: Plan) -> Callable:
    """Training by a plan as a form to be timed (timing.interleaved): called with a step's number, it goes one step further."""
    tokens = corpus(plan.config.vocabulary, plan.documents)[1]
    model, state, moments = beginning(plan)
    graph = nnx.graphdef(model)

    def form(step: int) -> jax.Array:
        nonlocal state, moments
        loss, state, moments = update(graph, plan, state, moments, batch_at(tokens, plan, step))
        return loss

    return form


def train(plan: Plan, name: str, *, save_every: int = 50, folder: Path | None = None) -> Trained:
    """Train by a plan, from its last checkpoint below `folder` (the user's cache folder by default) if it has one.

    Raises RuntimeError when a checkpoint cannot be written; the one before is then intact. Raises TimeoutError when another process
    trains by the same plan in the same folder.
    """
    run_folder = (folder or cache_folder() / "training") / f"{name}-{hashlib.sha256(repr(plan).encode()).hexdigest()[:8]}"
    with storage.locked(run_folder, wait=False):
        return train_in(run_folder, plan, name, save_every)


def train_in(run_folder: Path, plan: Plan, name: str, save_every: int) -> Trained:
    """train, in a folder whose lock is held."""
    tokenizer, tokens = corpus(plan.config.vocabulary, plan.documents)
    model, state, moments = beginning(plan)
    configs = set(map(plan.config_at, range(plan.steps)))
    graphs = {config: nnx.graphdef(Decoder(config, rngs=nnx.Rngs(0))) for config in configs}
    kept = Resumable(run_folder)
    begin, (state, moments, told) = kept.restore((state, moments, jnp.full((2, plan.steps), jnp.nan)))
    told = np.array(told)  # losses, seconds
    for step in range(begin, plan.steps):
        start = time.perf_counter()
        loss, state, moments = update(graphs[plan.config_at(step)], plan, state, moments, batch_at(tokens, plan, step))
        told[0, step] = loss  # waits for the step
        told[1, step] = time.perf_counter() - start
        done = step + 1
        if done % save_every == 0 or done == plan.steps:
            kept.save(done, (state, moments, jnp.asarray(told)))
            recent, seconds = np.mean(told[:, max(begin, done - save_every) : done], axis=1)
            pace, left = plan.batch * plan.length / seconds, (plan.steps - done) * seconds / 60
            print(f"{name}: step {done} of {plan.steps}, loss {recent:.4f}, {pace:.0f} tokens/s, {left:.1f} min left", flush=True)
    nnx.update(model, state)
    return Trained(model, tokenizer, *told)


def results(trained: Trained, texts: Sequence[Document]) -> dict:
    """What came of a training, as a record states it: losses on texts, by kind and by document; of training, in 50 means; times."""
    scores = score_documents(trained.subject, texts)
    kinds = np.asarray([text.kind for text in texts])
    return dict(
        scored={kind: scores.of(kinds == kind).summary() for kind in sorted(set(kinds))} | dict(all=scores.summary()),
        nats=np.round(scores.nats, 2).tolist(),
        curve=[float(np.mean(part)) for part in np.array_split(trained.losses, min(50, len(trained.losses)))],
        minutes=float(np.nanmedian(trained.seconds) * len(trained.seconds) / 60),
    )


def texts_judged() -> list[Document]:
    """The first 6000 characters of every evaluation document: 262,000 tokens, which take a minute."""
    return beginnings(documents("evaluation", KINDS), 6000)


def train_variant(variant: str) -> None:
    """Train a variant, evaluate it, and keep the outcome as a record; a shipped one also as a checkpoint.

    The variant "baselines" is what they are held against.
    """
    records.commit()  # what the record names is the code that began the training
    if variant == "baselines":
        return write_baselines()
    plan = plan_of(variant)
    trained = train(plan, variant)
    if variant in SHIPPED:
        path = CHECKPOINTS / f"{variant}.safetensors"
        save_checkpoint(path, trained.model, trained.tokenizer)
        trained = replace(trained, model=load_checkpoint(path).model)  # what is evaluated is what is shipped
    record = records.write(
        records.RECORDS,
        "training",
        f"training/{variant}",
        kind="measured",
        weights="trained here",
        setting=asdict(plan) | dict(variant=variant, parameters=sum(plan.config.parameters().values())),
        results=results(trained, texts_judged()),
        command=f"make train VARIANT={variant}",
    )
    for kind, scored in record["results"]["scored"].items():
        print(f"{variant}: {kind} {scored['bits_per_byte']:.4f} bits a byte, {scored['accuracy']:.1%} of the tokens guessed")


def write_baselines() -> None:
    """Keep what n-grams on the same tokens and a compressor reach on the evaluation texts, as a record."""
    tokenizer, tokens = corpus(SMALL.vocabulary)
    texts = texts_judged()
    asked = {kind: [text for text in texts if text.kind == kind] for kind in KINDS} | dict(all=texts)
    record = records.write(
        records.RECORDS,
        "training",
        "training/baselines",
        kind="measured",
        weights="n-grams counted here",
        setting=dict(tokens=len(tokens), vocabulary=SMALL.vocabulary),
        results={kind: baselines(tokenizer, tokens, texts) for kind, texts in asked.items()},
        command="make train VARIANT=baselines",
    )
    for kind, reached in record["results"].items():
        print(f"{kind}:", *(f"{name} {bits:.4f}" for name, bits in reached.items()), "bits a byte")


def outcomes(variants: Sequence[str], *, toy: bool = False) -> dict[str, dict]:
    """The results of variants, from their committed records; with `toy`, of toys that are trained here and now.

    Raises FileNotFoundError, with the command that makes it, for a variant that has no record.
    """
    if toy:
        return {name: toy_results(name.removeprefix("short-")) for name in variants}
    known = {record["id"]: record["results"] for record in records.read(topic="training")}
    for name in variants:
        if f"training/{name}" not in known:
            raise FileNotFoundError(f"no record of training {name}: `make train VARIANT={name}` makes it")
    return {name: known[f"training/{name}"] for name in variants}


def trained_model(variant: str, *, toy: bool = False) -> TextModel:
    """A shipped model; with `toy`, a toy of its kind that is trained here and now."""
    return train_toy(variant).subject if toy else load_checkpoint(CHECKPOINTS / f"{variant}.safetensors")


@functools.cache
def train_toy(variant: str) -> Trained:
    with tempfile.TemporaryDirectory() as folder:
        return train(plan_of(variant, toy=True), variant, folder=Path(folder))


@functools.cache
def toy_results(variant: str) -> dict:
    texts = texts_judged()[::40]
    if variant == "baselines":
        plan = plan_of("dense", toy=True)
        return dict(all=baselines(*corpus(plan.config.vocabulary, plan.documents), texts))
    return results(train_toy(variant), texts)


def flattened(tree):
    """The tree as one vector, and the way back. By way of the host: jax 0.7 flattens not all that XLA lays over a mesh."""
    return ravel_pytree(jax.device_get(tree))


class Resumable:
    """A folder of checkpoints of one run, the last two of them, in Orbax. One process at a time may use it.

    Every checkpoint carries the digests of all its files, written last. What a killed run left half-written is removed.
    """

    def __init__(self, folder: Path):
        import orbax.checkpoint as ocp

        self.ocp, self.folder = ocp, folder.absolute()
        self.folder.mkdir(parents=True, exist_ok=True)
        for entry in self.folder.iterdir():
            if not entry.name.isdigit():  # a name that Orbax writes under, or nothing of ours
                storage.clear(entry)
        self.remove_damaged()
        options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
        self.manager = ocp.CheckpointManager(self.folder, options=options)

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, the last one first."""
        return sorted((int(entry.name) for entry in self.folder.iterdir() if entry.name.isdigit()), reverse=True)

    def remove_damaged(self) -> None:
        """Remove checkpoints that are not whole, and name each in a line that says where the run goes on."""
        sound, damaged = [], {}
        for step in self.steps():
            try:
                check_folder(self.folder / str(step))
                sound.append(step)
            except ValueError as error:
                damaged[step] = storage.reason_of(error)
        for step, reason in damaged.items():
            before = f"that of step {sound[0]} is used" if sound else "no other is whole, so training begins anew"
            print(f"the checkpoint of step {step} is damaged, {before} ({reason})", flush=True)
            storage.clear(self.folder / str(step))

    def restore(self, tree):
        """The step of the last whole checkpoint and what it holds, or 0 and the tree as given, which also says the shapes.

        Raises RuntimeError when Orbax cannot read a checkpoint whose files are all as they were written.
        """
        step = self.manager.latest_step()
        if step is None:
            return 0, tree
        flat, unravel = flattened(tree)
        try:
            restored = self.manager.restore(step, args=self.ocp.args.StandardRestore({"flat": flat}))["flat"]
        except Exception as error:  # of many kinds
            raise RuntimeError(
                f"{self.folder / str(step)} cannot be read ({storage.reason_of(error)}); remove it to go on from the one before"
            ) from None
        return step, unravel(restored)

    def save(self, step: int, tree) -> None:
        """Write the tree as one vector: of many arrays Orbax would go on to write the others after one has failed."""
        try:
            self.manager.save(step, args=self.ocp.args.StandardSave({"flat": flattened(tree)[0]}))
            write_folder_checksums(self.folder / str(step))
        except Exception as error:
            before = next((kept for kept in self.steps() if kept != step), None)
            reason = storage.reason_of(error)
            raise RuntimeError(
                f"the checkpoint of step {step} could not be written ({reason}); that of step {before} is intact: "
                f"free some space below {self.folder} and run it again"
            ) from None

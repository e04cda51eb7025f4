"""The ladder: the parts of HiRE added to one model in turn, each judged and timed; and the map of where speed-ups lie."""

import ctypes
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import hire
from hire.axes import Array, Float, Queries, Rows
from hire.choose import true_top_k
from hire.estimators import Estimator, fingerprint, row_scores
from hire.ffn import activate
from hire.lab import decode
from hire.lab.evaluation import States, collect, found_by, in_batches, judge, losses, over
from hire.lab.register import load
from hire.lab.roofline import step_work
from hire.lab.sparsity import ffn_inputs, layers_of, most_used_first, searched, sets_kept
from hire.lab.timing import interleaved, medians
from hire.models import Decoder, DecoderConfig, TextModel, preset
from hire.models.convert import SearchedFFN
from hire.models.decoder import FFN
from hire.models.weights import require_memory
from hire.pytrees import pytree
from hire.topk import TopK, at_most, exact_top_k

GROUP = 8


@dataclass(frozen=True, kw_only=True)
class Ladder:
    """What is added to a model: k, k' and rank of the softmax; rank of the layers' copies, and shares of a layer's groups of 8:
    those kept, candidates (the common path among them), the common path, and the candidates that a batch shares.
    """

    k: int = 32
    candidates: int = 2048
    rank: int = 128
    ffn_rank: int = 384
    kept: float = 0.05
    nominated: float = 0.1
    common: float = 0.02
    shared: float = 0.25

    def rungs(
        self, model: Decoder, hidden: Queries | None = None, inputs: Sequence[np.ndarray] | None = None, together: int = 8
    ) -> dict[str, Decoder]:
        """The model with one part more at each rung, the last one with one selection for so many tokens.

        Copies are fitted to hidden states and to the layers' `inputs`; without them, as for random weights, of which no direction
        says more than another, they keep random ones. The common path are the first groups (see sparsity.most_used_first).
        """
        rows, fit = model.token_embeddings(), hire.LowRank.fit
        if hidden is None:
            fit = functools.partial(fit, directions="random")
        copies = {
            "LR softmax": lambda: fit(rows, self.rank),
            "Q softmax": lambda: hire.Quantized.fit(rows, 8),
            "LR fitted int8": lambda: fit(rows, self.rank, calibration=hidden, bits=8),
        }
        found = {"dense": model}
        softmax = None
        for name, copy in copies.items():
            softmax = hire.HireSoftmax(rows, copy(), self.k, self.candidates)
            found[name] = hire.convert(model, softmax=softmax)
        fitted = {}

        def copy_of(layer: int, beyond: Rows) -> Estimator:
            """Of all neurons, fitted once, the part beyond the common path."""
            up = layers_of(model)[layer].up[...]
            if layer not in fitted:
                fitted_to = None if inputs is None else inputs[layer]
                fitted[layer] = fit(up, self.ffn_rank, calibration=fitted_to, bits=8)
            whole = fitted[layer]
            return replace(whole, factors=whole.factors[len(up) - len(beyond) :], fingerprint=fingerprint(beyond))

        layers = functools.partial(searched, model, copy_of, kept=self.kept, group_size=GROUP)
        ffns = {
            "+ sparse FFN": layers(candidates=self.nominated),
            "+ common path": layers(candidates=self.nominated - self.common, common=self.common),
            "+ shared selection": layers(candidates=self.shared, shared=True),
        }
        for name, ffn in ffns.items():
            found[name] = hire.convert(model, softmax=softmax, ffn=ffn, together=together if "shared" in name else 1)
        return found

    def fitted(self, model: Decoder, seen: np.ndarray, together: int = 8) -> dict[str, Decoder]:
        """The rungs of a trained model, its most used groups first and its copies fitted to windows (w, t) of text."""
        ordered = most_used_first(model, sets_kept(model, seen).mean((1, 2)))
        inputs = [x.reshape(-1, x.shape[-1]) for x in ffn_inputs(ordered, seen)]
        return self.rungs(ordered, collect(ordered, seen, np.arange(len(seen))).hidden, inputs, together)


def with_shares(rung: Decoder, kept: float, nominated: float) -> Decoder:
    """A searched model by the same copies, with other shares of the groups: those kept, and candidates."""
    groups = rung.config.ffn_width // GROUP
    counts = dict(k=at_most(kept, groups), candidates=at_most(nominated, groups))
    return hire.convert(rung, softmax=softmax_of(rung), ffn=[replace(ffn, **counts) for ffn in ffns_of(rung)])


def ffns_of(model: Decoder) -> list[hire.HireFFN]:
    """What searches a model's layers: nothing where they are dense."""
    return [block.ffn.ffn for block in model.blocks if isinstance(block.ffn, SearchedFFN)]


def softmax_of(model: Decoder) -> hire.HireSoftmax | None:
    """What searches a model's words, or None where nothing does."""
    return None if model.softmax is None else model.softmax.over(model.embedding[...])


def quality(subject: TextModel, states: States, best: TopK, own: Sequence[float] | None = None) -> dict:
    """What a model says of states of documents, of which it is given the exact k best words (n, k): recall of them, and top-1 kept;
    bits a byte, with the normaliser that its softmax estimates, and next words guessed; nats by document, over `own` (or itself).
    """
    softmax, rates, first = softmax_of(subject.model), {}, best.indices[:, 0]
    if softmax is None:
        nats = losses(subject.model, states)
    else:
        found = found_by(softmax, states.hidden)
        rates = {name: rate["mean"] for name, rate in judge(found, states, best).items()}
        first, nats = found.indices[:, 0], estimated_losses(softmax, states)
    text = subject.tokenizer.decode(states.targets.tolist())
    _, document = np.unique(states.documents, return_inverse=True)
    by_document = np.bincount(document, nats)
    told = dict(bits_per_byte=float(nats.sum() / np.log(2) / len(text.encode())), accuracy=float(np.mean(first == states.targets)))
    told |= dict(nats=by_document.tolist(), n=len(nats), over=over(by_document, by_document if own is None else own))
    return dict(recall=1.0, top1=1.0) | rates | told


def judged(subject: TextModel, rungs: dict[str, Decoder], windows: np.ndarray, names: np.ndarray, k: int) -> dict[str, dict]:
    """What every rung says of windows (w, t) of text (see quality), its losses over those of the first, which is dense."""
    told: dict[str, dict] = {}
    known: dict[str, tuple[States, TopK]] = {}
    for name, rung in rungs.items():
        key = name if ffns_of(rung) else "dense"  # a search for words changes no hidden state
        if key not in known:
            states = collect(rung, windows, names)
            known[key] = states, true_top_k(rung.token_embeddings(), states.hidden, k)
        own = next(iter(told.values()))["nats"] if told else None
        told[name] = quality(replace(subject, model=rung), *known[key], own)
    return told


def estimated_losses(softmax: hire.HireSoftmax, states: States) -> np.ndarray:
    """-log p (n,) of the token that followed each state, in nats, by exact logits and the estimated normaliser."""
    return -in_batches(softmax.log_probabilities, states.hidden, 128, states.targets[:, None])[:, 0]


def step_bytes(model: Decoder, batch: int, cache: int) -> dict[str, float]:
    """Bytes by part that one decode step of a batch must read, each text at a context of `cache` tokens."""
    itemsize, softmax = model.embedding[...].dtype.itemsize, softmax_of(model)
    parts = {name: nbytes for name, (nbytes, _) in step_work(model.config, batch=batch, cache=cache, itemsize=itemsize).items()}
    if softmax is not None:
        parts["softmax"] = float(softmax.bytes_for(batch))
    layers = ffns_of(model)
    return parts | (dict(ffn=float(sum(ffn.bytes_for(batch) for ffn in layers))) if layers else {})


def timed_rungs(
    rungs: dict[str, Decoder], batch: int, slots: int, k: int, repeats: int, *, keep: bool = False, **forms: Callable
) -> dict[str, list[float]]:
    """Seconds of a whole decode step of every rung, in turn, on a cache that is half full at first; and of other forms beside them.

    Rungs of one float type write into one cache. Their programs are forgotten then, unless `keep` says that some are timed again.
    Raises ValueError when the cache is too short for all of their steps.
    """
    first = next(iter(rungs.values()))
    queries = list(np.random.default_rng(0).normal(size=(repeats, 1, first.config.width)).astype(np.float32))
    texts, caches, steps = {}, {}, {}
    for name, model in rungs.items():
        kind = model.embedding[...].dtype
        made = decode.StepForms(model, slots, k, texts.get(kind))
        texts[kind] = made.held
        if kind not in caches:
            caches[kind] = made.cache(batch)
        steps[name] = made.whole(batch, caches[kind])
    durations = interleaved(steps | forms, queries, repeats)
    give_back(programs=not keep)
    return durations


def give_back(programs: bool) -> None:
    """Return to the system what is free, compiled programs with it: of a step of one billion parameters half a gigabyte."""
    if programs:
        jax.clear_caches()
    getattr(ctypes.CDLL(None), "malloc_trim", int)(0)  # of glibc, which keeps it otherwise


def points(
    rungs: dict[str, Decoder], timings: dict[tuple[int, int], dict[str, list[float]]], rate: float
) -> dict[str, dict[str, dict[str, float]]]:
    """Of all that was timed, by (batch, cache): median seconds; the floor, which is the bytes that must be read over `rate` in
    bytes/s; and how many times the floor it took.
    """
    found = {}
    for (batch, cache), durations in timings.items():
        floors = {name: sum(step_bytes(rungs[name], batch, cache // 2).values()) / rate for name in durations}
        told = {name: dict(floor=floors[name], seconds=took, over=took / floors[name]) for name, took in medians(durations).items()}
        found[f"b{batch} cache{cache}"] = told
    return found


def spent(rungs: dict[str, Decoder], slots: int, k: int, repeats: int) -> dict[str, dict[str, float]]:
    """What softmax, FFN and attention take of their time together, each alone, and of the bytes that a step must read. FFN and
    attention are timed in 5 of the layers, which are alike.
    """
    shares, parts = {}, dict(softmax=decode.softmax, ffn=decode.ffn, attention=decode.attention)
    width = next(iter(rungs.values())).config.width
    draws = list(np.random.default_rng(1).normal(size=(repeats, 1, width)).astype(np.float32))
    for name, model in rungs.items():
        few, nbytes = nnx.merge(*nnx.split(model)), step_bytes(model, 1, slots // 2)
        few.blocks = few.blocks[:5]
        forms, layers = decode.StepForms(few, slots, k), len(model.blocks) / len(few.blocks)
        found = medians(interleaved({part: forms.part(function) for part, function in parts.items()}, draws, repeats))
        found = {part: took * (1 if part == "softmax" else layers) for part, took in found.items()}
        shares[f"{name}, time"] = {part: took / sum(found.values()) for part, took in found.items()}
        shares[f"{name}, bytes"] = {part: nbytes[part] / sum(nbytes.values()) for part in parts}
    return shares


def unselected(model: Decoder) -> Decoder:
    """A sparse model without its selection: what a dense step of it takes at least."""
    graph = nnx.graphdef(Decoder(replace(model.config, kept=1.0), rngs=nnx.Rngs(0)))
    return nnx.merge(graph, nnx.state(model))


@pytree
class SmallSoftmax:
    """The best words by rows of fewer bytes, all of them read: in the place of a model's search."""

    rows: hire.Quantized | Float[Array, "v d"]
    k: int = field(metadata=dict(static=True))

    def over(self, rows: Rows) -> Callable[[Queries], TopK]:
        return lambda hidden: exact_top_k(row_scores(hidden, self.rows), self.k)


class SmallFFN(nnx.Module):
    """A ReLU layer by rows of fewer bytes, all of them read. `down` is turned to (d, f): XLA sums along rows of small types, in
    parts, many times as fast on a CPU as across them.
    """

    def __init__(self, ffn: FFN, small: Callable):
        self.up, self.down = nnx.data(small(ffn.up[...])), nnx.data(small(ffn.down[...].T))

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        active = activate(row_scores(x.reshape(-1, x.shape[-1]), self.up))
        if len(active) > 1:
            return row_scores(active, self.down).reshape(x.shape)
        codes, scale = (self.down.codes, self.down.scale) if isinstance(self.down, hire.Quantized) else (self.down, 1.0)
        parts = jnp.sum((codes.astype(jnp.float32) * active).reshape(len(codes), 16, -1), axis=2)
        return (parts.sum(1) * scale).reshape(x.shape)


def int8(rows: Rows | hire.Quantized) -> hire.Quantized:
    return rows if isinstance(rows, hire.Quantized) else hire.Quantized.fit(rows, 8)


def bfloat16(rows: Rows) -> Rows:
    return rows.astype(jnp.bfloat16)


def in_small_rows(model: Decoder, k: int, small: Callable) -> Decoder:
    """What a user would pick instead: the dense model with the rows of softmax and FFN as `small` makes them, and nothing exact."""
    dense = hire.convert(model)
    setattr(dense, "softmax", nnx.data(SmallSoftmax(small(model.token_embeddings()), k)))
    for block, ffn in zip(dense.blocks, layers_of(model), strict=True):
        block.ffn = SmallFFN(ffn, small)
    return dense


def on_int8(model: Decoder) -> Decoder:
    """A searched model whose exact rows are int8 ones, too."""
    softmax = softmax_of(model)
    if softmax is not None:
        softmax = replace(softmax, rows=int8(model.token_embeddings()))
    ffns = []
    for ffn in ffns_of(model):
        gate = None if ffn.gate is None else int8(ffn.gate)
        ffns.append(replace(ffn, up=int8(ffn.up), down=int8(ffn.down), gate=gate))
    return hire.convert(model, softmax=softmax, ffn=ffns if ffns else None)


SMALLER = {"paper_1b": "paper_half", "paper_half": "small"}


def model_that_fits(name: str) -> tuple[str, Decoder]:
    """A model of that preset with random weights, or, where there is too little memory for it, of the next smaller one."""
    while True:
        try:
            return name, random_model(name)
        except MemoryError as error:
            if name not in SMALLER:
                raise
            print(f"{error}: going on with {SMALLER[name]}")
            name = SMALLER[name]


def random_model(name: str) -> Decoder:
    """A model of a preset with random weights. Raises MemoryError where it, copies and one rival do not fit, before it begins."""
    config = preset(name)
    require_memory(name, 2 * 4 * sum(config.parameters().values()), SMALLER.get(name))
    return Decoder(config, rngs=nnx.Rngs(0))


def shares(config: DecoderConfig, cache: int = 512) -> tuple[float, float]:
    """The shares of softmax and FFN in the bytes of a dense decode step of one text."""
    work = {part: nbytes for part, (nbytes, _) in step_work(config, batch=1, cache=cache, itemsize=2).items()}
    return work["softmax"] / sum(work.values()), work["ffn"] / sum(work.values())


def known_shapes() -> dict[str, DecoderConfig]:
    """Models on the map: our presets, and those of figures/models.yaml."""
    shapes = {name: preset(name) for name in ("paper_1b", "gemma3_270m", "gemma3_1b")}
    for model in load("models")["models"]:
        sizes = {key: value for key, value in model.items() if key not in ("name", "source")}
        shapes[model["name"]] = DecoderConfig(**sizes, global_every=1)
    return shapes


def published_speedups() -> list[float]:
    """What the paper reports for the softmax, the layers and both."""
    return [float(claim["published"].rstrip("x")) for claim in load("claims")["claims"] if claim["id"].endswith("-speedup")]


def speed_of(softmax, ffn, left: Sequence[float]):
    """How many times as fast a step is by its bytes, with these shares of softmax and FFN, of each of which a part is left."""
    return 1 / (1 - softmax * (1 - left[0]) - ffn * (1 - left[1]))

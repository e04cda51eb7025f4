"""The ablation: add the parts of HiRE to one model in turn, and judge and time each variant.

The module also computes the map of expected speed-ups over model shapes.
"""

import ctypes
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import hire
from hire.estimators.base import Estimator
from hire.estimators.fingerprints import fingerprint
from hire.lab.data.model_states import States, collect, in_batches
from hire.lab.figure_index import load
from hire.lab.metrics.group_sparsity import (
    ffn_inputs,
    layers_of,
    most_used_first,
    searched,
    sets_kept,
)
from hire.lab.metrics.intervals import relative_loss
from hire.lab.metrics.model_quality import losses
from hire.lab.metrics.search_recall import judge, search_all
from hire.lab.timing import decode_step
from hire.lab.timing.interleaved import interleaved, medians
from hire.lab.timing.roofline import step_work
from hire.layers.ffn import activate
from hire.models import Decoder, DecoderConfig, TextModel, preset
from hire.models.conversion import SearchedFFN
from hire.models.decoder import FFN
from hire.models.weights import require_memory
from hire.ops.row_products import row_scores
from hire.ops.top_k import TopK, exact_top_k, floor_fraction
from hire.pytrees import pytree
from hire.tuning import true_top_k
from hire.types import Array, Float, Queries, Rows

GROUP = 8


@dataclass(frozen=True, kw_only=True)
class Ladder:
    """The sizes of all variants.

    All shares are fractions of a layer's groups of 8 neurons.

    Attributes:
        k: Size of the top-k of the softmax.
        candidates: Candidates (k') of the softmax.
        rank: Rank of the softmax estimators.
        ffn_rank: Rank of the FFN estimators.
        kept: Share of the groups in the top-k of the FFN.
        nominated: Share of the groups that are candidates, static groups included.
        common: Share of the groups that are static groups.
        shared: Share of the groups that are candidates when a batch shares one selection.
    """

    k: int = 32
    candidates: int = 2048
    rank: int = 128
    ffn_rank: int = 384
    kept: float = 0.05
    nominated: float = 0.1
    common: float = 0.02
    shared: float = 0.25

    def variants(
        self,
        model: Decoder,
        hidden: Queries | None = None,
        inputs: Sequence[np.ndarray] | None = None,
        together: int = 8,
    ) -> dict[str, Decoder]:
        """Create the variants of a model; each goes one step further than the one before.

        The estimators are fitted to hidden states and to the inputs of the FFNs. Without these, the
        low-rank estimators use random directions: for random weights no direction is better than
        another. The static groups are the first groups (see `group_sparsity.most_used_first`).

        Args:
            model: Dense model.
            hidden: Hidden states `(n, d)` to fit the softmax estimators to.
            inputs: Inputs `(n, d)` of each FFN to fit its estimator to.
            together: Number of tokens that share one selection in the last variant.

        Returns:
            A dict from the variant's name to the model. The first one is "dense".
        """
        rows, fit = model.token_embeddings(), hire.LowRank.fit
        if hidden is None:
            fit = functools.partial(fit, directions="random")
        estimator_fits = {
            "LR softmax": lambda: fit(rows, self.rank),
            "Q softmax": lambda: hire.Quantized.fit(rows, 8),
            "LR fitted int8": lambda: fit(rows, self.rank, calibration=hidden, bits=8),
        }
        models = {"dense": model}
        softmax = None
        for name, fit_estimator in estimator_fits.items():
            softmax = hire.HireSoftmax(rows, fit_estimator(), self.k, self.candidates)
            models[name] = hire.convert(model, softmax=softmax)
        estimators = {}

        def copy_of(layer: int, beyond: Rows) -> Estimator:
            """Return the estimator of the rows `beyond` the static groups.

            The estimator is fitted once per layer, to all neurons; its last factors are the ones
            returned.
            """
            up = layers_of(model)[layer].up[...]
            if layer not in estimators:
                calibration = None if inputs is None else inputs[layer]
                estimators[layer] = fit(up, self.ffn_rank, calibration=calibration, bits=8)
            estimator = estimators[layer]
            return replace(
                estimator,
                factors=estimator.factors[len(up) - len(beyond) :],
                fingerprint=fingerprint(beyond),
            )

        search_layers = functools.partial(
            searched, model, copy_of, kept=self.kept, group_size=GROUP
        )
        ffns = {
            "+ sparse FFN": search_layers(candidates=self.nominated),
            "+ common path": search_layers(
                candidates=self.nominated - self.common, common=self.common
            ),
            "+ shared selection": search_layers(candidates=self.shared, shared=True),
        }
        for name, ffn in ffns.items():
            models[name] = hire.convert(
                model, softmax=softmax, ffn=ffn, together=together if "shared" in name else 1
            )
        return models

    def fitted(self, model: Decoder, seen: np.ndarray, together: int = 8) -> dict[str, Decoder]:
        """Create the variants of a trained model.

        The most used groups of each layer come first. The estimators are fitted to the model's
        states on the text.

        Args:
            model: Trained sparse model.
            seen: Windows `(w, t)` of text.
            together: Number of tokens that share one selection in the last variant.
        """
        ordered_model = most_used_first(model, sets_kept(model, seen).mean((1, 2)))
        inputs = [x.reshape(-1, x.shape[-1]) for x in ffn_inputs(ordered_model, seen)]
        return self.variants(
            ordered_model,
            collect(ordered_model, seen, np.arange(len(seen))).hidden,
            inputs,
            together,
        )


def with_shares(rung: Decoder, kept: float, nominated: float) -> Decoder:
    """Return a searched model with the same estimators and other sizes of the FFN search.

    Args:
        rung: Searched model.
        kept: Share of the groups in the top-k.
        nominated: Share of the groups that are candidates.
    """
    groups = rung.config.ffn_width // GROUP
    counts = dict(k=floor_fraction(kept, groups), candidates=floor_fraction(nominated, groups))
    return hire.convert(
        rung, softmax=softmax_of(rung), ffn=[replace(ffn, **counts) for ffn in ffns_of(rung)]
    )


def ffns_of(model: Decoder) -> list[hire.HireFFN]:
    """Return the HiRE layers of a model; the list is empty if its FFNs are dense."""
    return [block.ffn.ffn for block in model.blocks if isinstance(block.ffn, SearchedFFN)]


def softmax_of(model: Decoder) -> hire.HireSoftmax | None:
    """Return the HireSoftmax of a model, or None if its softmax is dense."""
    return None if model.softmax is None else model.softmax.with_rows(model.embedding[...])


def quality(
    subject: TextModel, states: States, best: TopK, own: Sequence[float] | None = None
) -> dict:
    """Measure the quality of a model on the states of documents.

    Args:
        subject: Model with its tokenizer.
        states: Hidden states of the documents and their next tokens.
        best: Exact top-k tokens of the states: values and indices `(n, k)`.
        own: Nats by document of the baseline. Default: the model itself.

    Returns:
        A dict with the keys `recall` and `top1` (recall of the exact top-k and of the top-1),
        `bits_per_byte` (with the estimated normaliser where the softmax is searched), `accuracy`
        (share of next tokens predicted), `nats` (by document), `n` (number of states) and `over`
        (`relative_loss` against the baseline).
    """
    softmax, rates, predictions = softmax_of(subject.model), {}, best.indices[:, 0]
    if softmax is None:
        nats = losses(subject.model, states)
    else:
        top_k = search_all(softmax, states.hidden)
        rates = {name: rate["mean"] for name, rate in judge(top_k, states, best).items()}
        predictions, nats = top_k.indices[:, 0], estimated_losses(softmax, states)
    text = subject.tokenizer.decode(states.targets.tolist())
    _, document = np.unique(states.documents, return_inverse=True)
    by_document = np.bincount(document, nats)
    metrics = dict(
        bits_per_byte=float(nats.sum() / np.log(2) / len(text.encode())),
        accuracy=float(np.mean(predictions == states.targets)),
    )
    metrics |= dict(
        nats=by_document.tolist(),
        n=len(nats),
        over=relative_loss(by_document, by_document if own is None else own),
    )
    return dict(recall=1.0, top1=1.0) | rates | metrics


def judged(
    subject: TextModel, rungs: dict[str, Decoder], windows: np.ndarray, names: np.ndarray, k: int
) -> dict[str, dict]:
    """Measure the `quality` of each variant on text, with the loss relative to the first variant.

    Args:
        subject: Model with its tokenizer.
        rungs: Variants by name; the first one must be dense.
        windows: Windows `(w, t)` of text.
        names: Document `(w,)` of each window.
        k: Number of top tokens.
    """
    results: dict[str, dict] = {}
    cached: dict[str, tuple[States, TopK]] = {}
    for name, variant in rungs.items():
        # A searched softmax changes no hidden state, so all variants with dense FFNs share them.
        key = name if ffns_of(variant) else "dense"
        if key not in cached:
            states = collect(variant, windows, names)
            cached[key] = states, true_top_k(variant.token_embeddings(), states.hidden, k)
        baseline = next(iter(results.values()))["nats"] if results else None
        results[name] = quality(replace(subject, model=variant), *cached[key], baseline)
    return results


def estimated_losses(softmax: hire.HireSoftmax, states: States) -> np.ndarray:
    """Return the next-token loss at each state, by the estimated normaliser and exact logits.

    Args:
        softmax: Softmax with an estimator.
        states: Hidden states `(n, d)` and their next tokens.

    Returns:
        -log p `(n,)` in nats.
    """
    return -in_batches(softmax.log_probabilities, states.hidden, 128, states.targets[:, None])[:, 0]


def step_bytes(model: Decoder, batch: int, cache: int) -> dict[str, float]:
    """Return the bytes that one decode step must read, by part.

    Args:
        model: Dense or searched model.
        batch: Number of texts.
        cache: Context of each text, in tokens.
    """
    itemsize, softmax = model.embedding[...].dtype.itemsize, softmax_of(model)
    parts = {
        name: nbytes
        for name, (nbytes, _) in step_work(
            model.config, batch=batch, cache=cache, itemsize=itemsize
        ).items()
    }
    if softmax is not None:
        parts["softmax"] = float(softmax.bytes_for(batch))
    layers = ffns_of(model)
    return parts | (dict(ffn=float(sum(ffn.bytes_for(batch) for ffn in layers))) if layers else {})


def time_variants(
    rungs: dict[str, Decoder],
    batch: int,
    slots: int,
    k: int,
    repeats: int,
    *,
    keep: bool = False,
    **forms: Callable,
) -> dict[str, list[float]]:
    """Time a decode step of each variant, interleaved, on a cache that is half full at first.

    Variants of one float type write into one cache.

    Args:
        rungs: Variants by name.
        batch: Number of texts.
        slots: Length of the key/value cache, in tokens.
        k: Number of top tokens.
        repeats: Number of timed steps of each variant.
        keep: Keep the compiled programs because the caller times some variants again.
        forms: Other functions to time next to the variants.

    Returns:
        Seconds of each step, by name.

    Raises:
        ValueError: If the cache is too short for all steps.
    """
    first_model = next(iter(rungs.values()))
    queries = list(
        np.random.default_rng(0)
        .normal(size=(repeats, 1, first_model.config.width))
        .astype(np.float32)
    )
    text_caches, caches, steps = {}, {}, {}
    for name, model in rungs.items():
        dtype = model.embedding[...].dtype
        step_forms = decode_step.StepForms(model, slots, k, text_caches.get(dtype))
        text_caches[dtype] = step_forms.held
        if dtype not in caches:
            caches[dtype] = step_forms.cache(batch)
        steps[name] = step_forms.whole(batch, caches[dtype])
    durations = interleaved(steps | forms, queries, repeats)
    release_memory(programs=not keep)
    return durations


def release_memory(programs: bool) -> None:
    """Return free memory to the system.

    Args:
        programs: Also drop compiled programs. The program of a decode step of one billion
            parameters takes half a gigabyte.
    """
    if programs:
        jax.clear_caches()
    # glibc keeps freed memory until malloc_trim; other C libraries lack the function.
    getattr(ctypes.CDLL(None), "malloc_trim", int)(0)


def points(
    rungs: dict[str, Decoder], timings: dict[tuple[int, int], dict[str, list[float]]], rate: float
) -> dict[str, dict[str, dict[str, float]]]:
    """Compare measured times with the memory-bound floor.

    Args:
        rungs: Variants by name.
        timings: Seconds of each variant, by (batch, cache length).
        rate: Memory bandwidth in bytes/s.

    Returns:
        A nested dict: "b<batch> cache<length>" -> variant -> `floor` (seconds that the bytes to
        read take at `rate`), `seconds` (median) and `over` (seconds / floor).
    """
    results = {}
    for (batch, cache), durations in timings.items():
        floors = {
            name: sum(step_bytes(rungs[name], batch, cache // 2).values()) / rate
            for name in durations
        }
        by_variant = {
            name: dict(floor=floors[name], seconds=seconds, over=seconds / floors[name])
            for name, seconds in medians(durations).items()
        }
        results[f"b{batch} cache{cache}"] = by_variant
    return results


def spent(
    rungs: dict[str, Decoder], slots: int, k: int, repeats: int
) -> dict[str, dict[str, float]]:
    """Measure the shares of softmax, FFN and attention in the time and the bytes of a decode step.

    Each part is timed alone; the three time shares sum to 1. The byte shares are relative to all
    bytes that the step must read. FFN and attention are timed in 5 of the layers, which are alike.

    Args:
        rungs: Variants by name.
        slots: Length of the key/value cache, in tokens.
        k: Number of top tokens.
        repeats: Number of timed calls.

    Returns:
        A dict from "<variant>, time" and "<variant>, bytes" to the share of each part.
    """
    fractions, parts = (
        {},
        dict(softmax=decode_step.softmax, ffn=decode_step.ffn, attention=decode_step.attention),
    )
    width = next(iter(rungs.values())).config.width
    queries = list(np.random.default_rng(1).normal(size=(repeats, 1, width)).astype(np.float32))
    for name, model in rungs.items():
        shallow_model, nbytes = nnx.merge(*nnx.split(model)), step_bytes(model, 1, slots // 2)
        shallow_model.blocks = shallow_model.blocks[:5]
        step_forms, layer_ratio = (
            decode_step.StepForms(shallow_model, slots, k),
            len(model.blocks) / len(shallow_model.blocks),
        )
        durations = medians(
            interleaved(
                {part: step_forms.part(function) for part, function in parts.items()},
                queries,
                repeats,
            )
        )
        durations = {
            part: duration * (1 if part == "softmax" else layer_ratio)
            for part, duration in durations.items()
        }
        fractions[f"{name}, time"] = {
            part: duration / sum(durations.values()) for part, duration in durations.items()
        }
        fractions[f"{name}, bytes"] = {part: nbytes[part] / sum(nbytes.values()) for part in parts}
    return fractions


def unselected(model: Decoder) -> Decoder:
    """Return a sparse model without its selection.

    Its time is a lower bound on the model's dense step.
    """
    graph = nnx.graphdef(Decoder(replace(model.config, kept=1.0), rngs=nnx.Rngs(0)))
    return nnx.merge(graph, nnx.state(model))


@pytree
class SmallSoftmax:
    """Dense softmax over rows of fewer bytes, in place of a model's search; it reads all rows."""

    rows: hire.Quantized | Float[Array, "v d"]
    k: int = field(metadata=dict(static=True))

    def with_rows(self, rows: Rows) -> Callable[[Queries], TopK]:
        return lambda hidden: exact_top_k(row_scores(hidden, self.rows), self.k)


class SmallFFN(nnx.Module):
    """Dense ReLU layer over rows of fewer bytes; it reads all rows.

    `down` is transposed to `(d, f)`. On a CPU, XLA sums along rows of small types, in parts, many
    times as fast as across them.
    """

    def __init__(self, ffn: FFN, small: Callable):
        self.up, self.down = nnx.data(small(ffn.up[...])), nnx.data(small(ffn.down[...].T))

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        active = activate(row_scores(x.reshape(-1, x.shape[-1]), self.up))
        if len(active) > 1:
            return row_scores(active, self.down).reshape(x.shape)
        codes, scale = (
            (self.down.codes, self.down.scale)
            if isinstance(self.down, hire.Quantized)
            else (self.down, 1.0)
        )
        partial_sums = jnp.sum(
            (codes.astype(jnp.float32) * active).reshape(len(codes), 16, -1), axis=2
        )
        return (partial_sums.sum(1) * scale).reshape(x.shape)


def int8(rows: Rows | hire.Quantized) -> hire.Quantized:
    """Return int8 rows."""
    return rows if isinstance(rows, hire.Quantized) else hire.Quantized.fit(rows, 8)


def bfloat16(rows: Rows) -> Rows:
    """Return rows in bfloat16."""
    return rows.astype(jnp.bfloat16)


def in_small_rows(model: Decoder, k: int, small: Callable) -> Decoder:
    """Return the dense model with smaller rows in softmax and FFN; no result of these is exact.

    This is the alternative that a user would pick.

    Args:
        model: Dense model.
        k: Number of top tokens.
        small: Function that converts rows.
    """
    dense = hire.convert(model)
    setattr(dense, "softmax", nnx.data(SmallSoftmax(small(model.token_embeddings()), k)))
    for block, ffn in zip(dense.blocks, layers_of(model), strict=True):
        block.ffn = SmallFFN(ffn, small)
    return dense


def on_int8(model: Decoder) -> Decoder:
    """Return a searched model with its exact rows in int8, too."""
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
    """Create the preset `name` with random weights, or the next smaller one if memory is too small.

    Returns:
        A tuple (name of the preset, model).
    """
    while True:
        try:
            return name, random_model(name)
        except MemoryError as error:
            if name not in SMALLER:
                raise
            print(f"{error}: going on with {SMALLER[name]}")
            name = SMALLER[name]


def random_model(name: str) -> Decoder:
    """Create a model of a preset with random weights.

    Raises:
        MemoryError: If the model, its estimators and one rival do not fit in memory. This is
            checked before the model is created.
    """
    config = preset(name)
    require_memory(name, 2 * 4 * sum(config.parameters().values()), SMALLER.get(name))
    return Decoder(config, rngs=nnx.Rngs(0))


def shares(config: DecoderConfig, cache: int = 512) -> tuple[float, float]:
    """Return the shares of softmax and FFN in the bytes of a dense decode step of one text."""
    work = {
        part: nbytes
        for part, (nbytes, _) in step_work(config, batch=1, cache=cache, itemsize=2).items()
    }
    return work["softmax"] / sum(work.values()), work["ffn"] / sum(work.values())


def known_shapes() -> dict[str, DecoderConfig]:
    """Return the models on the map: our presets and those of figures/models.yaml."""
    shapes = {name: preset(name) for name in ("paper_1b", "gemma3_270m", "gemma3_1b")}
    for model in load("models")["models"]:
        sizes = {key: value for key, value in model.items() if key not in ("name", "source")}
        shapes[model["name"]] = DecoderConfig(**sizes, global_every=1)
    return shapes


def published_speedups() -> list[float]:
    """Return the speed-ups that the paper reports for the softmax, the FFN and both."""
    return [
        float(claim["published"].rstrip("x"))
        for claim in load("claims")["claims"]
        if claim["id"].endswith("-speedup")
    ]


def speed_of(softmax, ffn, left: Sequence[float]):
    """Return the speed-up of a decode step by its bytes.

    Args:
        softmax: Share of the softmax in the bytes of the dense step.
        ffn: Share of the FFN in these bytes.
        left: Fractions of the softmax bytes and of the FFN bytes that HiRE still reads.
    """
    return 1 / (1 - softmax * (1 - left[0]) - ffn * (1 - left[1]))

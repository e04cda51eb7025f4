"""What a group-sparse FFN does on text: which groups each token keeps, and the layers that search for them."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import hire
from hire.axes import Array, Bool, Float, Queries, Rows, Tokens
from hire.choose import batches
from hire.estimators import Estimator
from hire.ffn import common_first
from hire.lab.evaluation import Scores, in_batches, over, score_documents, windows
from hire.lab.text import Document, documents
from hire.lab.training import trained_model
from hire.models import Decoder, TextModel
from hire.models.decoder import FFN
from hire.topk import at_most


@partial(jax.jit, static_argnames="graph")
def layer_inputs(graph: nnx.GraphDef, state: nnx.State, tokens: Tokens) -> list[Float[Array, "b t d"]]:
    """What the FFN of every layer is given for texts (b, t)."""
    model, seen = nnx.merge(graph, state), []

    def tapped(ffn: Callable) -> Callable:
        return lambda x: seen.append(x) or ffn(x)

    for block in model.blocks:
        block.ffn = tapped(block.ffn)
    model.prefill(tokens)
    return seen


def ffn_inputs(model: Decoder, windows: np.ndarray, batch: int = 16) -> list[np.ndarray]:
    """What the FFN of every layer is given for windows (w, t): an array (w, t, d) a layer."""
    graph, state = nnx.split(model)
    return in_batches(partial(layer_inputs, graph, state), windows, batch)


@partial(jax.jit, static_argnames=("group_size", "k"))
def groups_kept(up: Float[Array, "f d"], x: Queries, group_size: int, k: int) -> Bool[Array, "b m"]:
    """Which groups of a ReLU layer each query keeps: the k best, less those that are 0."""
    scores = hire.group_scores(jax.nn.relu(x @ up.T), group_size)
    return (scores >= hire.exact_top_k(scores, k).values[..., -1:]) & (scores > 0)


def layers_of(model: Decoder) -> list[FFN]:
    """The FFNs of a model that is as it was trained."""
    return [block.ffn for block in model.blocks if isinstance(block.ffn, FFN)]


def sets_kept(model: Decoder, windows: np.ndarray) -> np.ndarray:
    """Which groups of every layer each token of windows (w, t) keeps: (layers, w, t, m), bool."""
    w, t = windows.shape
    layers = zip(layers_of(model), ffn_inputs(model, windows), strict=True)
    kept = [groups_kept(ffn.up[...], x.reshape(w * t, -1), ffn.group_size, ffn.kept) for ffn, x in layers]
    return np.stack([np.asarray(layer).reshape(w, t, -1) for layer in kept])


def unions(sets: np.ndarray, counts: Sequence[int]) -> list[float]:
    """Share of the groups that so many consecutive tokens of sets (layers, w, t, m) keep together, on average."""
    shares = []
    for count in counts:
        runs = sets[:, :, : sets.shape[2] // count * count]
        shares.append(float(runs.reshape(*runs.shape[:2], -1, count, runs.shape[-1]).any(3).mean()))
    return shares


def predicted_by_earlier(sets: np.ndarray, lags: Sequence[int]) -> list[float]:
    """Share of what the tokens of sets (layers, w, t, m) keep that was also kept so many tokens earlier."""
    return [float((sets[:, :, lag:] & sets[:, :, :-lag]).sum() / sets[:, :, lag:].sum()) for lag in lags]


def group_recall(ffn: hire.HireFFN, x: Queries, candidates: Sequence[int]) -> list[float]:
    """Share of the k best groups of queries (n, d) that the estimator of a layer without common path puts among the first k'."""
    kept = np.concatenate([np.asarray(groups_kept(ffn.up, part, ffn.group_size, ffn.k)) for part in batches(x)])
    estimated = np.concatenate([np.asarray(ffn.estimated(part)) for part in batches(x)])
    depth = np.argsort(np.argsort(-estimated, axis=1), axis=1)[kept]
    return [float(np.mean(depth < count)) for count in candidates]


def most_used_first(model: Decoder, usage: np.ndarray) -> Decoder:
    """The same model with the neurons of every layer in another order: the most used groups, by `usage` (layers, m), come first."""
    ordered = nnx.merge(*nnx.split(model))
    for ffn, used in zip(layers_of(ordered), usage, strict=True):
        order = common_first(jnp.asarray(used), ffn.group_size)
        for name in ("up", "down") if ffn.gate is None else ("up", "down", "gate"):
            setattr(ffn, name, nnx.Param(getattr(ffn, name)[...][order]))
    return ordered


def searched(
    model: Decoder,
    copy: Callable[[int, Rows], Estimator],
    *,
    kept: float,
    candidates: float,
    common: float = 0.0,
    shared: bool = False,
    group_size: int | None = None,
    up_copy: Callable[[int, Rows], Estimator] | None = None,
) -> list[hire.HireFFN]:
    """The search of every layer of a model: kept, candidates and common path (its first groups) as shares of the groups.

    `copy(layer, rows)` makes the estimator of the neurons beyond the common path, of the gate where there is one; `up_copy` another
    one of `up`.
    """
    layers = []
    for layer, ffn in enumerate(layers_of(model)):
        size = group_size or ffn.group_size
        up, down, gate = ffn.up[...], ffn.down[...], None if ffn.gate is None else ffn.gate[...]
        k, first, count = (at_most(share, len(up) // size) for share in (kept, common, candidates))
        beyond = slice(first * size, None)
        copies = copy(layer, (up if gate is None else gate)[beyond]), gate, None if up_copy is None else up_copy(layer, up[beyond])
        layers.append(hire.HireFFN(up, down, *copies, group_size=size, k=k, candidates=count, common=first, shared=shared))
    return layers


class Across(nnx.Module):
    """A searched layer whose shared calls are tokens at one place of different texts, as of requests that are decoded together."""

    def __init__(self, searched: Callable):
        self.searched = searched

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        return self.searched(x.swapaxes(0, 1)).swapaxes(0, 1)


def scores_with(
    subject: TextModel, texts: Sequence[Document], ffns: Sequence[hire.HireFFN], together: int = 1, across: bool = False
) -> Scores:
    """The model's scores on texts with its FFNs searched, every `together` tokens in one call: following ones or (across) of
    different texts.
    """
    model = hire.convert(subject.model, ffn=ffns, together=together)
    for block in model.blocks if across else ():
        block.ffn = Across(block.ffn)
    return score_documents(replace(subject, model=model), texts, batch=2 * together if across else None)


def untrained(subject: TextModel, texts: Sequence[Document], kept: Sequence[float]) -> dict[str, list[float]]:
    """Loss of a gated model that was not trained for it over its own, relative, at shares of its neurons kept: the best by exact
    activations, one by one or in groups of 8, and groups among twice as many candidates, by int8 copies of the gate or of both.
    """
    own = score_documents(subject, texts).nats

    def copy(layer: int, rows: Rows) -> Estimator:
        return hire.Quantized.fit(rows, 8)

    def lost(share: float, factor: float, **how) -> float:
        ffns = searched(subject.model, copy, kept=share, candidates=min(1.0, factor * share), **how)
        return over(scores_with(subject, texts, ffns).nats, own)["mean"]

    every = 1 / min(kept)
    ways = {"best neurons": (every, dict(group_size=1)), "best groups of 8": (every, dict(group_size=8))}
    ways |= {"by the gate": (2, dict(group_size=8)), "by both": (2, dict(group_size=8, up_copy=copy))}
    return {name: [lost(share, factor, **how) for share in kept] for name, (factor, how) in ways.items()}


class Studied:
    """A trained sparse model with what its layers are given: by windows (w, t) that copies are fitted to, and by others."""

    def __init__(self, subject: TextModel, fitted_to: np.ndarray, judged_on: np.ndarray, texts: Sequence[Document]):
        self.model = most_used_first(subject.model, sets_kept(subject.model, fitted_to).mean((1, 2)))
        self.subject, self.texts = replace(subject, model=self.model), texts
        self.fitted_to, self.unseen = (
            [x.reshape(-1, x.shape[-1]) for x in ffn_inputs(self.model, windows)] for windows in (fitted_to, judged_on)
        )
        self.own = score_documents(subject, texts)

    @classmethod
    def of(cls, variant: str, texts: Sequence[Document], *, toy: bool, length: int, count: int) -> "Studied":
        """A model trained here, its copies fitted to `count` windows of calibration text, judged on as many of a novel."""
        subject = trained_model(variant, toy=toy)
        kinds = documents("calibration"), documents("evaluation", ["novel"])
        seen, novel = (windows(subject, texts, length, 2)[0][:count] for texts in kinds)
        return cls(subject, seen, novel, texts)

    def low_rank(self, rank: int, *, fitted: bool = True) -> Callable[[int, Rows], Estimator]:
        """A copy for `searched`: int8 factors, fitted to what the layer is given."""
        known = {}

        def copy(layer: int, rows: Rows) -> Estimator:
            if (layer, len(rows)) not in known:
                seen = self.fitted_to[layer] if fitted else None
                known[layer, len(rows)] = hire.LowRank.fit(rows, rank, calibration=seen, bits=8)
            return known[layer, len(rows)]

        return copy

    def searched(self, copy: Callable[[int, Rows], Estimator], candidates: float, **settings) -> list[hire.HireFFN]:
        """Its layers, searched for as many groups as it was trained to keep."""
        return searched(self.model, copy, kept=self.model.config.kept, candidates=candidates, **settings)

    def curve(self, copy: Callable[[int, Rows], Estimator], candidates: Sequence[float]) -> dict[str, list[float]]:
        """At so many candidates (shares of all groups): the share of the groups kept that are among them, mean of the layers, and
        the bytes read as a share of the dense layers'.
        """
        counts, ffns = [at_most(share, self.model.config.groups) for share in candidates], self.searched(copy, 1.0)
        found = np.mean([group_recall(ffn, x, counts) for ffn, x in zip(ffns, self.unseen, strict=True)], axis=0)
        return dict(recall=found.tolist(), bytes=[bytes_share([replace(ffn, candidates=c) for ffn in ffns]) for c in counts])

    def judged(self, ffns: Sequence[hire.HireFFN], **together) -> dict:
        """The loss over the model's own (evaluation.over), and the bytes read as a share of the dense layers'."""
        return over(scores_with(self.subject, self.texts, ffns, **together).nats, self.own.nats) | dict(bytes=bytes_share(ffns))


def bytes_share(ffns: Sequence[hire.HireFFN]) -> float:
    """Bytes that searched ReLU layers read for a query, as a share of the dense layers'."""
    return sum(ffn.bytes_read for ffn in ffns) / sum(2 * ffn.up.nbytes for ffn in ffns)

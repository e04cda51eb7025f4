"""What a group-sparse FFN does on text: which groups each token keeps, and the layers that search for them."""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import hire
from hire.axes import Array, Bool, Float, Queries, Tokens
from hire.estimators import Estimator
from hire.ffn import common_first
from hire.lab.evaluation import in_batches
from hire.models import Decoder
from hire.models.decoder import FFN


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


def sets_kept(model: Decoder, windows: np.ndarray) -> np.ndarray:
    """Which groups of every layer each token of windows (w, t) keeps: (layers, w, t, m), bool."""
    w, t = windows.shape
    layers = zip(model.blocks, ffn_inputs(model, windows), strict=True)
    kept = [groups_kept(block.ffn.up[...], x.reshape(w * t, -1), block.ffn.group_size, block.ffn.kept) for block, x in layers]
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


def searched_ffn(
    ffn: FFN, usage: np.ndarray, copy: Callable[[jax.Array], Estimator], *, candidates: int, common: int = 0, shared: bool = False
) -> hire.HireFFN:
    """The search of a trained layer: its most used groups first, and a copy made of the neurons beyond the common path."""
    size = ffn.group_size
    order = common_first(jnp.asarray(usage), size)
    up, down = ffn.up[...][order], ffn.down[...][order]
    estimator = copy(up[common * size :])
    return hire.HireFFN(up, down, estimator, group_size=size, k=ffn.kept, candidates=candidates, common=common, shared=shared)

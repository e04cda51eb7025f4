"""Which groups of neurons a token keeps, and layers that search for these groups."""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import hire
from hire.estimators.base import Estimator
from hire.lab.data.model_states import in_batches
from hire.layers.ffn import order_by_usage
from hire.models import Decoder
from hire.models.decoder import FFN
from hire.ops.batches import batches
from hire.ops.top_k import floor_fraction
from hire.types import Array, Bool, Float, Queries, Rows, Tokens


@partial(jax.jit, static_argnames="graph")
def layer_inputs(
    graph: nnx.GraphDef, state: nnx.State, tokens: Tokens
) -> list[Float[Array, "b t d"]]:
    """Return the FFN input (b, t, d) of every layer for texts (b, t)."""
    model, inputs = nnx.merge(graph, state), []

    def tapped(ffn: Callable) -> Callable:
        return lambda x: inputs.append(x) or ffn(x)

    for block in model.blocks:
        block.ffn = tapped(block.ffn)
    model.prefill(tokens)
    return inputs


def ffn_inputs(model: Decoder, windows: np.ndarray, batch: int = 16) -> list[np.ndarray]:
    """Return the FFN input of every layer for windows (w, t): one array (w, t, d) per layer."""
    graph, state = nnx.split(model)
    return in_batches(partial(layer_inputs, graph, state), windows, batch)


@partial(jax.jit, static_argnames=("group_size", "k"))
def groups_kept(up: Float[Array, "f d"], x: Queries, group_size: int, k: int) -> Bool[Array, "b m"]:
    """Return which groups of a ReLU layer each query keeps.

    It keeps the k groups with the best scores, without those with score 0.
    """
    scores = hire.group_scores(jax.nn.relu(x @ up.T), group_size)
    return (scores >= hire.exact_top_k(scores, k).values[..., -1:]) & (scores > 0)


def layers_of(model: Decoder) -> list[FFN]:
    """Return the FFNs of an unconverted model."""
    return [block.ffn for block in model.blocks if isinstance(block.ffn, FFN)]


def sets_kept(model: Decoder, windows: np.ndarray) -> np.ndarray:
    """Return which groups of every layer each token keeps.

    Args:
        model: The decoder.
        windows: Windows of tokens (w, t).

    Returns:
        Boolean array (layers, w, t, m).
    """
    w, t = windows.shape
    layers = zip(layers_of(model), ffn_inputs(model, windows), strict=True)
    masks = [
        groups_kept(ffn.up[...], x.reshape(w * t, -1), ffn.group_size, ffn.kept)
        for ffn, x in layers
    ]
    return np.stack([np.asarray(mask).reshape(w, t, -1) for mask in masks])


def unions(sets: np.ndarray, counts: Sequence[int]) -> list[float]:
    """Return the mean fraction of groups that runs of consecutive tokens keep together.

    Args:
        sets: Kept groups (layers, w, t, m).
        counts: Numbers of consecutive tokens.

    Returns:
        One fraction per count.
    """
    fractions = []
    for count in counts:
        runs = sets[:, :, : sets.shape[2] // count * count]
        fractions.append(
            float(runs.reshape(*runs.shape[:2], -1, count, runs.shape[-1]).any(3).mean())
        )
    return fractions


def predicted_by_earlier(sets: np.ndarray, lags: Sequence[int]) -> list[float]:
    """Return the fraction of kept groups that an earlier token also kept.

    Args:
        sets: Kept groups (layers, w, t, m).
        lags: Distances to the earlier token.

    Returns:
        One fraction per lag.
    """
    return [
        float((sets[:, :, lag:] & sets[:, :, :-lag]).sum() / sets[:, :, lag:].sum()) for lag in lags
    ]


def group_recall(ffn: hire.HireFFN, x: Queries, candidates: Sequence[int]) -> list[float]:
    """Return the recall of the kept groups among the first k' groups by estimated score.

    Args:
        ffn: A searched layer without static groups.
        x: Queries (n, d).
        candidates: Numbers of candidates k'.

    Returns:
        One recall per k'.
    """
    mask = np.concatenate(
        [np.asarray(groups_kept(ffn.up, part, ffn.group_size, ffn.k)) for part in batches(x)]
    )
    estimates = np.concatenate(
        [np.asarray(ffn.estimated_group_scores(part)) for part in batches(x)]
    )
    ranks = np.argsort(np.argsort(-estimates, axis=1), axis=1)[mask]
    return [float(np.mean(ranks < count)) for count in candidates]


def most_used_first(model: Decoder, usage: np.ndarray) -> Decoder:
    """Return the same model with the neurons of every layer reordered, most used groups first.

    Args:
        model: The decoder.
        usage: Usage (layers, m) of each group.
    """
    ordered = nnx.merge(*nnx.split(model))
    for ffn, layer_usage in zip(layers_of(ordered), usage, strict=True):
        order = order_by_usage(jnp.asarray(layer_usage), ffn.group_size)
        for name in ("up", "down") if ffn.gate is None else ("up", "down", "gate"):
            setattr(ffn, name, nnx.Param(getattr(ffn, name)[...][order]))
    return ordered


def searched(
    model: Decoder,
    fit_estimator: Callable[[int, Rows], Estimator],
    *,
    kept_fraction: float,
    candidates: float,
    static_fraction: float = 0.0,
    share_selection: bool = False,
    group_size: int | None = None,
    up_copy: Callable[[int, Rows], Estimator] | None = None,
) -> list[hire.HireFFN]:
    """Create the search of every FFN of a model.

    Args:
        model: The decoder.
        fit_estimator: Function of (layer, rows) that fits the estimator of the neurons outside the
            static groups: of `gate` in a gated layer, of `up` otherwise.
        kept_fraction: Fraction of the groups that is kept.
        candidates: Fraction of the groups that is nominated.
        static_fraction: Fraction of the groups that is static; these are the first groups.
        share_selection: Whether one selection serves a batch.
        group_size: Neurons of a group; that of the model by default.
        up_copy: Function of (layer, rows) that fits another estimator, of `up`.
    """
    layers = []
    for layer, ffn in enumerate(layers_of(model)):
        size = group_size or ffn.group_size
        up, down, gate = ffn.up[...], ffn.down[...], None if ffn.gate is None else ffn.gate[...]
        k, static_groups, count = (
            floor_fraction(fraction, len(up) // size)
            for fraction in (kept_fraction, static_fraction, candidates)
        )
        non_static = slice(static_groups * size, None)
        layer_args = (
            fit_estimator(layer, (up if gate is None else gate)[non_static]),
            gate,
            None if up_copy is None else up_copy(layer, up[non_static]),
        )
        layers.append(
            hire.HireFFN(
                up,
                down,
                *layer_args,
                group_size=size,
                k=k,
                candidates=count,
                static_groups=static_groups,
                share_selection=share_selection,
                activation=model.config.ffn_activation,
            )
        )
    return layers


def bytes_share(ffns: Sequence[hire.HireFFN]) -> float:
    """Return the bytes that searched ReLU layers read per query, as a fraction of dense."""
    return sum(ffn.bytes_read() for ffn in ffns) / sum(2 * ffn.up.nbytes for ffn in ffns)

"""Latency of softmax and FFN layers, dense and HiRE."""

from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

import hire
from hire.lab.rivals.approximate_top_k import INT8, rivals
from hire.lab.rivals.dense import DENSE
from hire.lab.timing.decode_step import StepForms
from hire.layers.ffn import HireFFN
from hire.layers.softmax import HireSoftmax
from hire.models import Decoder
from hire.ops.row_products import row_scores, row_scores_at, weighted_row_sum
from hire.ops.top_k import floor_fraction
from hire.timing import interleaved, medians, speedups, stream_form
from hire.types import Queries, Rows


def slices(hidden: Queries, batch: int, repeats: int) -> list[np.ndarray]:
    """Return `repeats` batches of hidden states, each drawn anew."""
    order = np.random.default_rng(0).permutation(len(hidden))
    return [
        np.array(hidden[np.take(order, range(i * batch, (i + 1) * batch), mode="wrap")])
        for i in range(repeats)
    ]


def fastest_dense(durations: dict[str, list[float]]) -> str:
    """Return the name of the dense implementation with the smallest median."""
    median_seconds = medians(durations)
    return min(
        (name for name in median_seconds if name.startswith("dense") and name != INT8),
        key=lambda name: median_seconds[name],
    )


def softmax_forms(rows: Rows, searched: dict[str, HireSoftmax], k: int) -> dict[str, Callable]:
    """Return functions that compute the top-k tokens of a batch.

    Args:
        rows: Rows (v, d) of the LM head.
        searched: HiRE softmaxes, by name.
        k: Number of tokens that are returned.

    Returns:
        Functions by name: each function of `rivals`, "stream" (a read of as many bytes as the rows
            have) and each HiRE softmax.
    """
    stream, _ = stream_form(rows.nbytes)
    return rivals(rows, k) | {"stream": stream} | searched


def time_softmax(
    rows: Rows, searched: dict[str, HireSoftmax], hidden: Queries, k: int, batch: int, repeats: int
) -> dict[str, list[float]]:
    """Return raw durations of `softmax_forms` in seconds, for batches of hidden states (n, d)."""
    return interleaved(softmax_forms(rows, searched, k), slices(hidden, batch, repeats), repeats)


def step_forms(
    dense: Decoder, searched: Decoder, k: int, batch: int, cache_length: int
) -> dict[str, Callable]:
    """Return functions that run a complete decode step: "dense" and "HiRE".

    The two models share the arrays of their weights.
    """
    return {
        name: StepForms(model, cache_length, k).complete_step(batch)
        for name, model in (("dense", dense), ("HiRE", searched))
    }


def time_steps(
    dense: Decoder,
    searched: Decoder,
    hidden: Queries,
    k: int,
    batch: int,
    cache_length: int,
    repeats: int,
) -> dict[str, list[float]]:
    """Return raw durations of `step_forms` in seconds."""
    forms = step_forms(dense, searched, k, batch, cache_length)
    return interleaved(forms, slices(hidden, 1, repeats), repeats)


def random_ffns(
    count: int, neurons: int, width: int, rank: int, shares: dict[str, tuple]
) -> dict[str, list[HireFFN]]:
    """Create ReLU layers with random weights and their HiRE searches, in groups of 8 neurons.

    Random weights run at the speed of trained ones.

    Args:
        count: Number of layers.
        neurons: Neurons of a layer.
        width: Width of the hidden state.
        rank: Rank of the low-rank estimators.
        shares: Settings by name: three fractions of the groups (kept, candidates, static groups),
            and whether one selection serves a batch. A shared selection uses int8 rows as the
            estimator, the others low-rank factors.

    Returns:
        `count` searched layers for each setting, by name.
    """
    searched, groups = {name: [] for name in shares}, neurons // 8
    for key in jax.random.split(jax.random.key(0), count):
        up, down = (jax.random.normal(part, (neurons, width)) for part in jax.random.split(key))
        estimators = {}
        for name, (*fractions, is_shared) in shares.items():
            k, candidates, static_groups = (floor_fraction(part, groups) for part in fractions)
            if (static_groups, is_shared) not in estimators:
                non_static = up[8 * static_groups :]
                estimator = (
                    hire.Quantized.fit(non_static, 8)
                    if is_shared
                    else hire.LowRank.fit(non_static, rank, bits=8, directions="random")
                )
                estimators[static_groups, is_shared] = estimator
            ffn = HireFFN(
                up,
                down,
                estimators[static_groups, is_shared],
                k=k,
                candidates=candidates,
                static_groups=static_groups,
                share_selection=is_shared,
            )
            searched[name].append(ffn)
    return searched


def gather_forms(
    rows: Rows, size: int, share: float, repeats: int
) -> tuple[dict[str, Callable], list]:
    """Return functions that read a fraction of the rows in random groups, or all rows.

    Args:
        rows: Rows (m, d).
        size: Rows of a group.
        share: Fraction of the groups that is read.
        repeats: Number of random selections.

    Returns:
        "gather", the exact scores of the groups, and "stream", a read of all rows; and the
            selections, which they take.
    """
    rng, dot = np.random.default_rng(0), jax.jit(row_scores_at, static_argnames="group")
    x, groups = jnp.ones((1, rows.shape[1]), jnp.float32), len(rows) // size
    draws = [
        rng.permutation(groups)[None, : floor_fraction(share, groups)].astype(np.int32)
        for _ in range(repeats)
    ]
    stream, _ = stream_form(rows.nbytes)
    return {"gather": lambda chosen: dot(x, rows, chosen, group=size), "stream": stream}, draws


def through(layer: Callable, layers: Sequence) -> Callable:
    """Return a function that sends queries through all layers in one compiled program.

    As in a decode step, the output of each layer is added to its input.
    """

    @jax.jit
    def run(layers, x):
        for weights in layers:
            x = x + layer(weights, x)
            x = x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True))
        return x

    return lambda x: run(layers, x)


def dense_ffns(layers: Sequence[HireFFN]) -> dict[str, Callable]:
    """Return functions that run the same ReLU layers dense, in every implementation.

    The implementations of DENSE serve both products, with `down` transposed to (d, f). "dense rows
    in parts" uses the fastest products for `down` as it is stored, (f, d).
    """
    transposed = [(layer.up, jnp.asarray(layer.down).T.copy()) for layer in layers]
    untransposed = [(layer.up, layer.down) for layer in layers]

    def form(scores: Callable, add: Callable, layers: Sequence) -> Callable:
        return through(
            lambda weights, x: add(jax.nn.relu(scores(weights[0], x)), weights[1]), layers
        )

    forms = {
        name: form(scores, lambda active, down: scores(down, active), transposed)
        for name, scores in DENSE.items()
    }
    return forms | {
        "dense rows in parts": form(
            lambda rows, x: row_scores(x, rows), weighted_row_sum, untransposed
        )
    }


def ffn_forms(searched: dict[str, Sequence[HireFFN]]) -> dict[str, Callable]:
    """Return functions that send a batch of queries through ReLU layers.

    Args:
        searched: Searched layers, by name; equally many of each.

    Returns:
        Functions by name: each dense implementation, "stream" (a read of as many bytes as the
            layers have) and each search.
    """
    layers = next(iter(searched.values()))
    stream, _ = stream_form(len(layers) * 2 * layers[0].up.nbytes)
    forms = dense_ffns(layers) | {"stream": stream}
    return forms | {name: through(lambda ffn, x: ffn(x), ffns) for name, ffns in searched.items()}


def per_layer(durations: dict[str, list[float]], layers: int) -> dict[str, list[float]]:
    """Return durations divided by the number of layers."""
    return {name: [value / layers for value in seconds] for name, seconds in durations.items()}


def speedups_by_batch(
    timed: dict[int, dict[str, list[float]]], name: str = "HiRE", base: str | None = None
) -> dict[int, float]:
    """Return the speed-up of one function at each batch size, by medians.

    Args:
        timed: Raw durations by batch size and name.
        name: The function.
        base: The baseline; the fastest dense implementation by default.
    """
    return {
        batch: speedups(forms, base or fastest_dense(forms))[name] for batch, forms in timed.items()
    }


def over_batches(
    timed: dict[int, dict[str, list[float]]], names: Iterable[str]
) -> dict[str, list[float]]:
    """Return the median seconds at every batch size.

    Args:
        timed: Raw durations by batch size and name.
        names: Functions to include.

    Returns:
        Medians by name, with those of the "fastest dense" implementation.
    """
    median_seconds = {batch: medians(forms) for batch, forms in timed.items()}
    curves = {name: [by_name[name] for by_name in median_seconds.values()] for name in names}
    return curves | {
        "fastest dense": [
            median_seconds[batch][fastest_dense(forms)] for batch, forms in timed.items()
        ]
    }


def table(what: str, timed: dict[int, dict[str, list[float]]]) -> str:
    """Format durations as a table, one line per function and batch size.

    A line shows the median in milliseconds, and how many times as fast as the fastest dense
    implementation the function is.
    """
    lines = []
    for batch, durations in timed.items():
        median_seconds, dense = medians(durations), fastest_dense(durations)
        lines.append(f"{what}, batch {batch}")
        lines += [
            f"{'':8}{name:26}{seconds * 1e3:9.2f} ms{median_seconds[dense] / seconds:9.2f}x"
            for name, seconds in median_seconds.items()
        ]
    return "\n".join(lines)

"""A softmax over several chips: DA-TOP-k and the variants that it is compared with.

Each variant exists as a function to time and as a program to estimate.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from hire import HireFFN, HireSoftmax, TopK, da_top_k, exact_top_k, high_recall_top_k
from hire.distributed import RowSharding, all_gather_top_k, per_device_k
from hire.lab import records
from hire.lab.data.model_states import States, collect
from hire.lab.metrics.intervals import relative_loss
from hire.lab.metrics.model_quality import losses
from hire.lab.metrics.search_recall import judge
from hire.lab.timing.interleaved import interleaved
from hire.lab.tpu import bundle_parser
from hire.lab.tpu.programs import CANDIDATES, COPIES, KEPT, RANK, WORDS, Program, nbytes, skeleton
from hire.models import Decoder, convert
from hire.ops.nomination import nominate_from_scores
from hire.ops.row_products import row_scores
from hire.ops.top_k import expected_recall
from hire.ops.tpu import row_scores as row_kernel
from hire.search import rerank
from hire.types import Indices, Queries

# Takes the rows and the estimator of one device's shard; runs inside jax.shard_map.
Form = Callable[[dict[str, Any], Queries], TopK]


def on_devices(softmax: HireSoftmax) -> dict[str, Form]:
    """Return what each device computes with its shard of a softmax that has an axis.

    There are two variants for the dense softmax, which scores every row exactly, and two for HiRE.
    With DA, each device returns its local best rows. With "gathered", each device gathers the
    scores of all devices. "HiRE gathered" gives the same answers as HiRE on one device: every
    device nominates the same candidates from all scores and rescores those in its shard.

    Args:
        softmax: Sharded softmax; its `axis` must be set.

    Returns:
        A dict with the keys "dense DA", "dense gathered", "HiRE DA" and "HiRE gathered".
    """
    axis, k, candidates = RowSharding.of(softmax.axis or ""), softmax.k, softmax.candidates

    def gathered(scores: jax.Array) -> jax.Array:
        all_scores = jax.lax.all_gather(scores, axis.name)  # (s, b, m/s)
        return jnp.moveaxis(all_scores, 0, 2 if axis.interleaved else 1).reshape(
            scores.shape[0], -1
        )

    def dense(own: dict[str, Any], x: Queries) -> TopK:
        best = exact_top_k(
            row_scores(x, own["rows"]), axis.per_device_count(k, own["rows"].shape[0])
        )
        return all_gather_top_k(best, axis, own["rows"].shape[0], best.indices.shape[1], k)

    def dense_gathered(own: dict[str, Any], x: Queries) -> TopK:
        return exact_top_k(gathered(row_scores(x, own["rows"])), k)

    def search(own: dict[str, Any], x: Queries) -> TopK:
        return da_top_k(
            x, **own, k=k, candidates=candidates, axis=axis, implementation=softmax.implementation
        )

    def search_gathered(own: dict[str, Any], x: Queries) -> TopK:
        nominated = nominate_from_scores(gathered(own["estimator"].scores(x)), candidates)
        return rerank(nominated, softmax._sharded_exact_logits(own, x, nominated), k)

    return {
        "dense DA": dense,
        "dense gathered": dense_gathered,
        "HiRE DA": search,
        "HiRE gathered": search_gathered,
    }


def forms(softmax: HireSoftmax) -> dict[str, Callable[[HireSoftmax, Queries], TopK]]:
    """Return the functions of `on_devices` under jax.shard_map, and two compiler variants.

    The "compiler" variants are the single-device programs with sharded rows; XLA partitions them.

    Returns:
        A dict from name to a function of (softmax, x), with the keys of `on_devices` plus "dense
        compiler" and "HiRE compiler".
    """
    axis = RowSharding.of(softmax.axis or "")
    options = dict(k=softmax.k, candidates=softmax.candidates)
    functions: dict[str, Callable] = {
        name: lambda softmax, x, form=form: axis.shard_map(form, softmax.sharded_parts, x)
        for name, form in on_devices(softmax).items()
    }
    functions["dense compiler"] = lambda softmax, x: exact_top_k(
        row_scores(x, softmax.rows), softmax.k
    )
    functions["HiRE compiler"] = lambda softmax, x: high_recall_top_k(
        x, softmax.rows, softmax.estimator, **options, implementation="xla"
    )
    return functions


CHIPS = {"v5e:2x2": 4, "v5e:4x4": 16, "v5e:8x8": 64, "v5e:16x16": 256}
WIDTH = 2_048
NAMES = (
    "dense gathered",
    "dense compiler",
    "dense DA",
    "HiRE gathered",
    "HiRE compiler",
    "HiRE DA",
    "HiRE DA kernels",
)


def program(name: str, topology: str, batch: int) -> Program:
    """Build one program of NAMES for a topology, with its bfloat16 rows sharded over all chips.

    Args:
        name: One of NAMES.
        topology: One of CHIPS.
        batch: Number of queries.
    """
    kernels = name.endswith("kernels")

    def make() -> HireSoftmax:
        rows = jnp.zeros((WORDS, WIDTH), jnp.bfloat16)
        estimator = COPIES["LR int8"](WORDS, WIDTH, RANK)
        # With few rows per chip, the kernels support only a part of the search: hence "auto".
        implementation = "auto" if kernels else "xla"
        rows = row_kernel.blocks(rows) if kernels else rows
        softmax = HireSoftmax(
            rows,
            estimator,
            k=KEPT,
            candidates=CANDIDATES,
            implementation=implementation,
            axis="chips",
        )
        specs.extend(RowSharding("chips").partition_specs(softmax))
        return softmax

    def function(arrays: list[jax.Array], x: Queries) -> TopK:
        softmax = rebuild(arrays)
        return forms(softmax)[name.removesuffix(" kernels")](softmax, x)

    specs: list[P] = []
    arrays, rebuild = skeleton(make)
    chips = CHIPS[topology]
    reads = (
        nbytes(arrays[1:]) / chips + batch * CANDIDATES / chips * WIDTH * 2
        if "HiRE" in name
        else nbytes(arrays[:1]) / chips
    )
    x = jax.ShapeDtypeStruct((batch, WIDTH), jnp.bfloat16)
    return Program(function, arrays, x, math.ceil(reads), topology=topology, specs=(*specs, P()))


def programs() -> dict[str, Program]:
    """Return all programs by the names of their records."""
    return {
        f"softmax on {topology.removeprefix('v5e:')}, {name}, b {b}": program(name, topology, b)
        for topology in CHIPS
        for b in (1, 8)
        for name in NAMES
    }


def estimates() -> dict[str, dict[int, dict[str, dict]]]:
    """Read the committed estimates of all programs.

    Returns:
        A nested dict: name -> batch -> slice -> results of the record.
    """
    results = {record["id"]: record["results"] for record in records.read(topic="v5e")}
    sizes = [topology.removeprefix("v5e:") for topology in CHIPS]
    return {
        name: {
            b: {size: results[f"softmax on {size}, {name}, b {b}"] for size in sizes}
            for b in (1, 8)
        }
        for name in NAMES
    }


def compiled(
    softmax: HireSoftmax, names: Sequence[str], x: Queries
) -> dict[str, jax.stages.Compiled]:
    """Compile the named variants for queries with the shape of x `(b, d)`."""
    return {name: jax.jit(forms(softmax)[name]).lower(softmax, x).compile() for name in names}


def time_forms(
    softmax: HireSoftmax, names: Sequence[str], queries: Sequence[Queries]
) -> tuple[dict, dict[str, float], TopK]:
    """Time the named variants on this machine's devices.

    Args:
        softmax: Sharded softmax.
        names: Keys of `forms`.
        queries: One batch `(b, d)` per repetition.

    Returns:
        A tuple (seconds of each call by name, bytes that the collectives deliver to each device by
        name, top-k of the first variant for all queries).
    """
    executables = compiled(softmax, names, queries[0])
    calls = {name: lambda x, run=run: run(softmax, x) for name, run in executables.items()}
    seconds = interleaved(calls, queries, len(queries))
    results = [calls[names[0]](x) for x in queries]
    delivered_bytes = {
        name: bundle_parser.sent(run.as_text() or "") for name, run in executables.items()
    }
    return (
        seconds,
        delivered_bytes,
        TopK(*(np.concatenate(arrays) for arrays in zip(*results, strict=True))),
    )


def judge_shares(
    softmax: HireSoftmax, states: States, best: TopK, slacks: Sequence[float]
) -> dict[str, dict]:
    """Measure recall of a softmax on one device and sharded over the mesh.

    Args:
        softmax: Softmax on one device.
        states: Hidden states of text.
        best: True top-k of these states.
        slacks: Values of `oversample_sigmas`.

    Returns:
        A dict from "one device" and "<order>, slack <value>" to the rates of `search_recall.judge`.
        The order is "own order" for contiguous rows and "dealt" for interleaved rows.
    """
    results = {"one device": judge(softmax, states, best)}
    for order in ("own order", "dealt"):
        sharded = softmax.sharded(RowSharding("chips", interleaved=order == "dealt"))
        for slack in slacks:
            variant = replace(
                sharded, axis=replace(RowSharding.of(sharded.axis or ""), oversample_sigmas=slack)
            )
            results[f"{order}, slack {slack}"] = judge(variant, states, best)
    return results


def layers_apart(
    model: Decoder, ffns: Sequence[HireFFN], windows: tuple, slacks: Sequence[float]
) -> dict[float, dict]:
    """Compare the loss of sharded FFN layers with the loss of the same layers on one device.

    Args:
        model: Dense model.
        ffns: HiRE layers of the model.
        windows: The further arguments of `model_states.collect`: windows of text and their
            documents.
        slacks: Values of `oversample_sigmas`.

    Returns:
        A dict from slack to the `relative_loss` of the sharded layers.
    """

    def nats(ffns: Sequence[HireFFN]) -> np.ndarray:
        searched_model = convert(model, ffn=ffns)
        states = collect(searched_model, *windows)
        return np.bincount(
            np.unique(states.documents, return_inverse=True)[1], losses(searched_model, states)
        )

    baseline = nats(ffns)
    return {
        slack: relative_loss(
            nats([ffn.sharded(RowSharding("chips", slack)) for ffn in ffns]), baseline
        )
        for slack in slacks
    }


def kept_by_shares(best: Indices, rows: int, chips: int, slack: float) -> dict[str, float]:
    """Simulate the recall of the true top-k when each chip returns its share (see RowSharding).

    Args:
        best: Indices `(n, k)` of the true top-k.
        rows: Number of rows.
        chips: Number of chips.
        slack: Value of `oversample_sigmas`.

    Returns:
        A dict of recalls: "own order" (contiguous rows), "dealt" (interleaved rows), "shuffled"
        (rows in random order) and "expected" (the expectation for a random distribution of the
        rows).
    """
    k = best.shape[1]
    per_device = per_device_k(k, chips, slack)
    shuffled = np.random.default_rng(0).permutation(rows)[best]
    recalls = {}
    for name, chip_ids in {
        "own order": best // -(-rows // chips),
        "dealt": best % chips,
        "shuffled": shuffled % chips,
    }.items():
        counts = np.zeros((len(best), chips), int)
        np.add.at(counts, (np.arange(len(best))[:, None], chip_ids), 1)
        recalls[name] = float(np.minimum(counts, per_device).sum(1).mean() / k)
    return recalls | {"expected": expected_recall(rows, k, buckets=chips, per_bucket=per_device)}

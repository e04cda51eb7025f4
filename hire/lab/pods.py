"""A softmax over several chips, in the forms that DA-TOP-k is compared with: as functions to time, and as programs to estimate."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from hire import HireFFN, HireSoftmax, TopK, da_top_k, exact_top_k, high_recall_top_k
from hire.axes import Indices, Queries
from hire.distributed import Axis, fair_share, merged
from hire.estimators import row_scores
from hire.kernels import rows as row_kernel
from hire.lab import records, schedules
from hire.lab.evaluation import States, collect, judge, losses, over
from hire.lab.programs import CANDIDATES, COPIES, KEPT, RANK, WORDS, Program, nbytes, skeleton
from hire.lab.timing import interleaved
from hire.models import Decoder, convert
from hire.search import best_of, nominate
from hire.topk import expected_recall

Form = Callable[[dict[str, Any], Queries], TopK]  # of a device's own rows and estimator, inside jax.shard_map


def on_devices(softmax: HireSoftmax) -> dict[str, Form]:
    """What every device does with its part of a softmax that has an axis: `DA` gives its own best, `gathered` all of its scores.

    For the dense softmax, which scores every row exactly, and for the search, whose gathered form is HiRE as on one device: from
    the scores of all, every device nominates the same candidates, and scores those that it holds.
    """
    axis, k, candidates = Axis.of(softmax.axis or ""), softmax.k, softmax.candidates

    def gathered(scores: jax.Array) -> jax.Array:
        found = jax.lax.all_gather(scores, axis.name)  # (s, b, m/s)
        return jnp.moveaxis(found, 0, 2 if axis.dealt else 1).reshape(scores.shape[0], -1)

    def dense(own: dict[str, Any], x: Queries) -> TopK:
        best = exact_top_k(row_scores(x, own["rows"]), axis.share(k, own["rows"].shape[0]))
        return merged(best, axis, own["rows"].shape[0], best.indices.shape[1], k)

    def dense_gathered(own: dict[str, Any], x: Queries) -> TopK:
        return exact_top_k(gathered(row_scores(x, own["rows"])), k)

    def search(own: dict[str, Any], x: Queries) -> TopK:
        return da_top_k(x, **own, k=k, candidates=candidates, axis=axis, form=softmax.form)

    def search_gathered(own: dict[str, Any], x: Queries) -> TopK:
        chosen = nominate(gathered(own["estimator"].scores(x)), candidates)
        return best_of(chosen, softmax.logits_of_own(own, x, chosen), k)

    return {"dense DA": dense, "dense gathered": dense_gathered, "HiRE DA": search, "HiRE gathered": search_gathered}


def forms(softmax: HireSoftmax) -> dict[str, Callable[[HireSoftmax, Queries], TopK]]:
    """The two forms of either softmax, and `compiler`: what XLA makes of the program for one device when its rows are sharded."""
    axis = Axis.of(softmax.axis or "")
    how = dict(k=softmax.k, candidates=softmax.candidates)
    found: dict[str, Callable] = {
        name: lambda softmax, x, form=form: axis.mapped(form, softmax.parts, x) for name, form in on_devices(softmax).items()
    }
    found["dense compiler"] = lambda softmax, x: exact_top_k(row_scores(x, softmax.rows), softmax.k)
    found["HiRE compiler"] = lambda softmax, x: high_recall_top_k(x, softmax.rows, softmax.estimator, **how, form="plain")
    return found


CHIPS = {"v5e:2x2": 4, "v5e:4x4": 16, "v5e:8x8": 64, "v5e:16x16": 256}
WIDTH = 2_048
NAMES = ("dense gathered", "dense compiler", "dense DA", "HiRE gathered", "HiRE compiler", "HiRE DA", "HiRE DA kernels")


def program(name: str, topology: str, batch: int) -> Program:
    """One of NAMES on a topology, its rows in bfloat16 spread over all chips."""
    kernels = name.endswith("kernels")

    def make() -> HireSoftmax:
        rows = jnp.zeros((WORDS, WIDTH), jnp.bfloat16)
        copy = COPIES["LR int8"](WORDS, WIDTH, RANK)
        form = "auto" if kernels else "plain"  # of few rows a chip the kernels take a part
        rows = row_kernel.blocks(rows) if kernels else rows
        softmax = HireSoftmax(rows, copy, k=KEPT, candidates=CANDIDATES, form=form, axis="chips")
        places.extend(Axis("chips").specs(softmax))
        return softmax

    def function(arrays: list[jax.Array], x: Queries) -> TopK:
        softmax = whole(arrays)
        return forms(softmax)[name.removesuffix(" kernels")](softmax, x)

    places: list[P] = []
    arrays, whole = skeleton(make)
    chips = CHIPS[topology]
    reads = nbytes(arrays[1:]) / chips + batch * CANDIDATES / chips * WIDTH * 2 if "HiRE" in name else nbytes(arrays[:1]) / chips
    x = jax.ShapeDtypeStruct((batch, WIDTH), jnp.bfloat16)
    return Program(function, arrays, x, math.ceil(reads), topology=topology, specs=(*places, P()))


def programs() -> dict[str, Program]:
    """All of them, by the names of their records."""
    return {
        f"softmax on {topology.removeprefix('v5e:')}, {name}, b {b}": program(name, topology, b)
        for topology in CHIPS
        for b in (1, 8)
        for name in NAMES
    }


def estimates() -> dict[str, dict[int, dict[str, dict]]]:
    """What the committed records say of them: name -> batch -> slice -> results."""
    kept = {record["id"]: record["results"] for record in records.read(topic="v5e")}
    sizes = [topology.removeprefix("v5e:") for topology in CHIPS]
    return {name: {b: {size: kept[f"softmax on {size}, {name}, b {b}"] for size in sizes} for b in (1, 8)} for name in NAMES}


def compiled(softmax: HireSoftmax, names: Sequence[str], x: Queries) -> dict[str, jax.stages.Compiled]:
    """Some of the forms as programs for queries like x (b, d)."""
    return {name: jax.jit(forms(softmax)[name]).lower(softmax, x).compile() for name in names}


def time_forms(softmax: HireSoftmax, names: Sequence[str], queries: Sequence[Queries]) -> tuple[dict, dict[str, float], TopK]:
    """On this machine's devices: seconds of some forms, with a query at each repetition; the bytes that their collectives leave on
    every device; and what the first of them finds for all queries.
    """
    programs = compiled(softmax, names, queries[0])
    calls = {name: lambda x, run=run: run(softmax, x) for name, run in programs.items()}
    seconds = interleaved(calls, queries, len(queries))
    found = [calls[names[0]](x) for x in queries]
    sent = {name: schedules.sent(run.as_text() or "") for name, run in programs.items()}
    return seconds, sent, TopK(*(np.concatenate(parts) for parts in zip(*found, strict=True)))


def judge_shares(softmax: HireSoftmax, states: States, best: TopK, slacks: Sequence[float]) -> dict[str, dict]:
    """Recall and the like (see evaluation.judge) of a softmax on one device, and on those of the mesh by order and slack."""
    judged = {"one device": judge(softmax, states, best)}
    for order in ("own order", "dealt"):
        spread = softmax.sharded(Axis("chips", dealt=order == "dealt"))
        for slack in slacks:
            form = replace(spread, axis=replace(Axis.of(spread.axis or ""), slack=slack))
            judged[f"{order}, slack {slack}"] = judge(form, states, best)
    return judged


def layers_apart(model: Decoder, ffns: Sequence[HireFFN], windows: tuple, slacks: Sequence[float]) -> dict[float, dict]:
    """By slack: how far the loss of windows of text lies over that of the same searched layers on one device."""

    def nats(ffns: Sequence[HireFFN]) -> np.ndarray:
        searched = convert(model, ffn=ffns)
        states = collect(searched, *windows)
        return np.bincount(np.unique(states.documents, return_inverse=True)[1], losses(searched, states))

    alone = nats(ffns)
    return {slack: over(nats([ffn.sharded(Axis("chips", slack)) for ffn in ffns]), alone) for slack in slacks}


def kept_by_shares(best: Indices, rows: int, chips: int, slack: float) -> dict[str, float]:
    """Recall of the true top-k (n, k) when each of so many chips gives its share (see Axis): with the rows in their own order,
    dealt, shuffled, and what a fair deal is expected to give.
    """
    k = best.shape[1]
    own = fair_share(k, chips, slack)
    shuffled = np.random.default_rng(0).permutation(rows)[best]
    found = {}
    for name, chip in {"own order": best // -(-rows // chips), "dealt": best % chips, "shuffled": shuffled % chips}.items():
        counts = np.zeros((len(best), chips), int)
        np.add.at(counts, (np.arange(len(best))[:, None], chip), 1)
        found[name] = float(np.minimum(counts, own).sum(1).mean() / k)
    return found | {"expected": expected_recall(rows, k, buckets=chips, per_bucket=own)}

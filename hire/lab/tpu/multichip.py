"""A softmax over several chips: DA-TOP-k and the variants that it is compared with.

Each variant exists as a function to time and as a program to estimate.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from hire import HireSoftmax, TopK, da_top_k, exact_top_k, high_recall_top_k
from hire.distributed import RowSharding, all_gather_top_k
from hire.lab.tpu import bundle_parser
from hire.lab.tpu.programs import (
    CANDIDATES,
    ESTIMATORS,
    RANK,
    TOP_K,
    VOCABULARY,
    Program,
    nbytes,
    skeleton,
)
from hire.ops.nomination import nominate_from_scores
from hire.ops.row_products import row_scores
from hire.ops.tpu import row_scores as row_kernel
from hire.search import rerank
from hire.timing import interleaved
from hire.types import Queries

# Takes the rows and the estimator of one device's shard; runs inside jax.shard_map.
ShardFunction = Callable[[dict[str, Any], Queries], TopK]


class VariantTimes(NamedTuple):
    """Measurements of the variants at one batch size.

    Attributes:
        durations: Raw durations in seconds, by variant.
        delivered_bytes: Bytes that the collectives deliver to each device, by variant.
        top: Top-k of the first variant for all queries, as numpy arrays.
    """

    durations: dict[str, list[float]]
    delivered_bytes: dict[str, float]
    top: TopK


def on_devices(softmax: HireSoftmax) -> dict[str, ShardFunction]:
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

    def dense(shard: dict[str, Any], x: Queries) -> TopK:
        shard_size = shard["rows"].shape[0]
        shard_top = exact_top_k(row_scores(x, shard["rows"]), axis.per_device_count(k, shard_size))
        return all_gather_top_k(shard_top, axis, shard_size, shard_top.indices.shape[1], k)

    def dense_gathered(shard: dict[str, Any], x: Queries) -> TopK:
        return exact_top_k(gathered(row_scores(x, shard["rows"])), k)

    def search_shard(shard: dict[str, Any], x: Queries) -> TopK:
        return da_top_k(
            x,
            shard["rows"],
            shard["estimator"],
            k=k,
            candidates=candidates,
            axis=axis,
            implementation=softmax.implementation,
        )

    def search_gathered(shard: dict[str, Any], x: Queries) -> TopK:
        candidate_indices = nominate_from_scores(gathered(shard["estimator"].scores(x)), candidates)
        return rerank(
            candidate_indices, softmax._sharded_exact_scores(shard, x, candidate_indices), k
        )

    return {
        "dense DA": dense,
        "dense gathered": dense_gathered,
        "HiRE DA": search_shard,
        "HiRE gathered": search_gathered,
    }


def variants(softmax: HireSoftmax) -> dict[str, Callable[[HireSoftmax, Queries], TopK]]:
    """Return the functions of `on_devices` under jax.shard_map, and two compiler variants.

    The "compiler" variants are the single-device programs with sharded rows; XLA partitions them.

    Returns:
        A dict from name to a function of (softmax, x), with the keys of `on_devices` plus "dense
        compiler" and "HiRE compiler".
    """
    axis = RowSharding.of(softmax.axis or "")
    options = dict(k=softmax.k, candidates=softmax.candidates)
    functions: dict[str, Callable] = {
        name: lambda softmax, x, function=function: axis.shard_map(
            function, softmax.sharded_parts, x
        )
        for name, function in on_devices(softmax).items()
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
    "HiRE DA pallas",
)


def program(name: str, topology: str, batch: int) -> Program:
    """Build one program of NAMES for a topology, with its bfloat16 rows sharded over all chips.

    Args:
        name: One of NAMES.
        topology: One of CHIPS.
        batch: Number of queries.
    """
    kernels = name.endswith("pallas")

    def make() -> HireSoftmax:
        rows = jnp.zeros((VOCABULARY, WIDTH), jnp.bfloat16)
        estimator = ESTIMATORS["LR int8"](VOCABULARY, WIDTH, RANK)
        # With few rows per chip, the kernels support only a part of the search: hence "auto".
        implementation = "auto" if kernels else "xla"
        rows = row_kernel.blocks(rows) if kernels else rows
        softmax = HireSoftmax(
            rows,
            estimator,
            k=TOP_K,
            candidates=CANDIDATES,
            implementation=implementation,
            axis="chips",
        )
        specs.extend(RowSharding("chips").partition_specs(softmax))
        return softmax

    def function(arrays: list[jax.Array], x: Queries) -> TopK:
        softmax = rebuild(arrays)
        return variants(softmax)[name.removesuffix(" pallas")](softmax, x)

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


def compiled(
    softmax: HireSoftmax, names: Sequence[str], x: Queries
) -> dict[str, jax.stages.Compiled]:
    """Compile the named variants for queries with the shape of x `(b, d)`."""
    return {name: jax.jit(variants(softmax)[name]).lower(softmax, x).compile() for name in names}


def time_variants(
    softmax: HireSoftmax, names: Sequence[str], queries: Sequence[Queries]
) -> VariantTimes:
    """Time the named variants on this machine's devices, in turn.

    Args:
        softmax: Sharded softmax.
        names: Keys of `variants`.
        queries: One batch `(b, d)` per repetition.
    """
    executables = compiled(softmax, names, queries[0])
    calls = {
        name: lambda x, executable=executable: executable(softmax, x)
        for name, executable in executables.items()
    }
    durations = interleaved(calls, queries, len(queries))
    results = [calls[names[0]](x) for x in queries]
    delivered_bytes = {
        name: bundle_parser.bytes_sent(executable.as_text() or "")
        for name, executable in executables.items()
    }
    top = TopK(*(np.concatenate(arrays) for arrays in zip(*results, strict=True)))
    return VariantTimes(durations, delivered_bytes, top)

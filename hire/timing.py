"""Wall-clock time on this machine: interleaved calls, raw durations."""

import gc
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

ComparisonKey = TypeVar("ComparisonKey", bound=Hashable)

# Seconds from the start of a sitting to the start of the next, at least.
SITTING_GAP = 60.0


def bytes_for_cold_caches(cpus: Path = Path("/sys/devices/system/cpu")) -> int:
    """Return how many bytes to read before a timed call: twice the last-level caches' size.

    Args:
        cpus: Folder in which Linux describes the processors.

    Returns:
        256 MiB at least, and where no cache is described.
    """
    sizes = {}
    for cache in cpus.glob("cpu[0-9]*/cache/index3"):
        kibibytes = (cache / "size").read_text().strip().removesuffix("K")
        sizes[(cache / "shared_cpu_list").read_text()] = int(kibibytes) * 1024
    return max(2**28, 2 * sum(sizes.values()))


def interleaved(
    forms: dict[str, Callable], queries: Sequence, repeats: int
) -> dict[str, list[float]]:
    """Time functions in turn and return every duration.

    A first call compiles each function and is not counted. Two functions compile at a time where
    they share no collectives. Turns make a slow spell of the machine affect all functions alike, so
    compare medians and trust ratios. Within a turn the functions take different queries. Before
    each call other memory is read, untimed, so that no function finds in a cache what the previous
    one left there.

    Args:
        forms: Functions of one query, by name.
        queries: Queries; every repetition takes a new one.
        repeats: Timed calls of each function.

    Returns:
        Raw durations in seconds, by name.

    Raises:
        ValueError: There are fewer queries than repeats.
    """
    if len(queries) < repeats:
        raise ValueError(
            f"{len(queries)} queries for {repeats} repeats: expected a new one at every repetition"
        )
    durations = {name: [] for name in forms}
    # Several processes call a function together: one would wait for this read of another, and the
    # wait would be timed.
    alone = jax.process_count() == 1
    read_memory = stream_form(bytes_for_cold_caches())[0] if alone else lambda _: None
    # XLA compiles a program on one core.
    with ThreadPoolExecutor(2 if jax.device_count() == 1 else 1) as pool:
        list(pool.map(lambda form: jax.block_until_ready(form(queries[0])), forms.values()))
    gc.disable()
    try:
        for turn in range(repeats):
            for index, (name, form) in enumerate(forms.items()):
                query = queries[(turn + index) % repeats]
                jax.block_until_ready(read_memory(query))
                start = time.perf_counter()
                jax.block_until_ready(form(query))
                durations[name].append(time.perf_counter() - start)
    finally:
        gc.enable()
    return durations


def in_sittings(
    comparisons: Mapping[ComparisonKey, tuple[dict[str, Callable], Sequence]], sittings: int
) -> dict[ComparisonKey, dict[str, list[float]]]:
    """Time several groups of functions in sittings, so that one state of the machine is not all.

    Each sitting times every comparison once, see `interleaved`, with its share of the queries.

    Args:
        comparisons: Functions by name, and their queries, by any key.
        sittings: Number of sittings.

    Returns:
        Raw durations in seconds by key and name, equally many from each sitting, in order.

    Raises:
        ValueError: There are fewer queries than sittings.
    """
    durations: dict[ComparisonKey, dict[str, list[float]]] = {key: {} for key in comparisons}
    for sitting in range(sittings):
        start = time.monotonic()
        for key, (forms, queries) in comparisons.items():
            repeats = len(queries) // sittings
            if not repeats:
                raise ValueError(f"{len(queries)} queries for {sittings} sittings: expected more")
            share = queries[sitting * repeats : (sitting + 1) * repeats]
            for name, seconds in interleaved(forms, share, repeats).items():
                durations[key].setdefault(name, []).extend(seconds)
        if sitting + 1 < sittings:
            time.sleep(max(0.0, start + SITTING_GAP - time.monotonic()))
    return durations


def speedup_range(
    durations: Mapping[str, Sequence[float]], name: str, base: str, sittings: int
) -> tuple[float, float]:
    """Return the lowest and the highest speed-up of the sittings and of all calls together.

    Args:
        durations: Raw durations by name, see `in_sittings`.
        name: The function.
        base: The baseline.
        sittings: Number of sittings.

    Returns:
        The lowest and the highest ratio of medians.
    """
    pooled_ratio = float(np.median(durations[base]) / np.median(durations[name]))
    ratios = [pooled_ratio] + [
        float(np.median(slow) / np.median(fast))
        for slow, fast in zip(
            np.array_split(durations[base], sittings),
            np.array_split(durations[name], sittings),
            strict=True,
        )
    ]
    return min(ratios), max(ratios)


def sitting_ranges(
    durations: Mapping[ComparisonKey, Sequence[float]], sittings: int
) -> dict[ComparisonKey, tuple[float, float]]:
    """Return the lowest and the highest median seconds of the sittings, see `in_sittings`.

    Args:
        durations: Raw durations by any key, equally many from each sitting, in order.
        sittings: Number of sittings.

    Returns:
        The lowest and the highest median by key.
    """
    by_sitting = {
        key: [float(np.median(share)) for share in np.array_split(seconds, sittings)]
        for key, seconds in durations.items()
    }
    return {key: (min(values), max(values)) for key, values in by_sitting.items()}


def medians(durations: dict[str, list[float]]) -> dict[str, float]:
    """Return the median seconds of each function."""
    return {name: float(np.median(seconds)) for name, seconds in durations.items()}


def speedups(durations: dict[str, list[float]], base: str = "dense") -> dict[str, float]:
    """Return how many times as fast as `base` each function is, by medians."""
    median_seconds = medians(durations)
    return {name: median_seconds[base] / seconds for name, seconds in median_seconds.items()}


def stream_form(nbytes: int = 2**30) -> tuple[Callable, int]:
    """Return a function that reads an array once, to time the memory bandwidth of the machine.

    Args:
        nbytes: Size of the array in bytes.

    Returns:
        The function, which sums the array, and the bytes that it reads.
    """
    return read_form(jax.jit(lambda: jnp.ones((nbytes // 4,), jnp.float32))())


def read_form(array: jax.Array) -> tuple[Callable, int]:
    """Return a function that reads an array once, as `stream_form` does.

    Args:
        array: The array, much larger than the caches.

    Returns:
        The function, which sums the array, and the bytes that it reads.
    """
    add = jax.jit(jnp.sum)
    return lambda _: add(array), array.nbytes

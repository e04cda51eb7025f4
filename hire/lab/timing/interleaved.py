"""Wall-clock time on this machine: interleaved calls, raw durations."""

import gc
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

# Bytes that are read before a timed call: several times the last-level cache of a CPU.
COLD = 2**28


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
    read_memory = stream_form(COLD)[0] if jax.process_count() == 1 else lambda _: None
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
    array = jax.jit(lambda: jnp.ones((nbytes // 4,), jnp.float32))()
    add = jax.jit(jnp.sum)
    return lambda _: add(array), array.nbytes

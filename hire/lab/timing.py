"""Wall-clock time on this machine: forms interleaved, raw durations kept."""

import gc
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np


def interleaved(forms: dict[str, Callable], queries: Sequence, repeats: int) -> dict[str, list[float]]:
    """Seconds of each call of every form, taken in turn: form(query), a new query at every repetition.

    The forms are compiled by a first call that is not counted. Turns make a slow spell of the machine hit all forms alike, so
    compare medians and trust ratios. Raises ValueError when there are fewer queries than repeats.
    """
    if len(queries) < repeats:
        raise ValueError(f"{len(queries)} queries for {repeats} repeats: expected a new one at every repetition")
    durations = {name: [] for name in forms}
    for form in forms.values():
        jax.block_until_ready(form(queries[0]))
    gc.disable()
    try:
        for query in queries[:repeats]:
            for name, form in forms.items():
                start = time.perf_counter()
                jax.block_until_ready(form(query))
                durations[name].append(time.perf_counter() - start)
    finally:
        gc.enable()
    return durations


def medians(durations: dict[str, list[float]]) -> dict[str, float]:
    """Median seconds of each form."""
    return {name: float(np.median(seconds)) for name, seconds in durations.items()}


def stream_form(nbytes: int = 2**30) -> tuple[Callable, int]:
    """A form that reads an array once (its sum), and the bytes that it reads: the machine's bandwidth, timed like any other."""
    array = jax.jit(lambda: jnp.ones((nbytes // 4,), jnp.float32))()
    add = jax.jit(jnp.sum)
    return lambda _: add(array), array.nbytes

"""Wall-clock time on this machine: forms interleaved, raw durations kept."""

import gc
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

from hire.axes import Array, Float, Queries, Rows
from hire.estimators import in_pieces, row_scores
from hire.topk import exact_top_k

COLD = 2**28  # bytes that are read before a call is timed: several times the last cache of a CPU


def interleaved(forms: dict[str, Callable], queries: Sequence, repeats: int) -> dict[str, list[float]]:
    """Seconds of each call of every form, taken in turn: form(query), a new query at every repetition.

    The forms are compiled by a first call that is not counted, two at a time where they share no collectives. Turns make a slow
    spell of the machine hit all forms alike, so compare medians and trust ratios. Within a turn the forms take different queries,
    and before each call something else is read, not timed: a form finds in no cache what the one before it has left there. Raises
    ValueError when there are fewer queries than repeats.
    """
    if len(queries) < repeats:
        raise ValueError(f"{len(queries)} queries for {repeats} repeats: expected a new one at every repetition")
    durations = {name: [] for name in forms}
    # Of several processes that call together one would wait, timed, for what another reads.
    read_other = stream_form(COLD)[0] if jax.process_count() == 1 else lambda _: None
    with ThreadPoolExecutor(2 if jax.device_count() == 1 else 1) as pool:  # XLA compiles a program on one core
        list(pool.map(lambda form: jax.block_until_ready(form(queries[0])), forms.values()))
    gc.disable()
    try:
        for turn in range(repeats):
            for place, (name, form) in enumerate(forms.items()):
                query = queries[(turn + place) % repeats]
                jax.block_until_ready(read_other(query))
                start = time.perf_counter()
                jax.block_until_ready(form(query))
                durations[name].append(time.perf_counter() - start)
    finally:
        gc.enable()
    return durations


def medians(durations: dict[str, list[float]]) -> dict[str, float]:
    """Median seconds of each form."""
    return {name: float(np.median(seconds)) for name, seconds in durations.items()}


def gains(durations: dict[str, list[float]], base: str = "dense") -> dict[str, float]:
    """How many times as fast as `base` each form is, by medians."""
    middle = medians(durations)
    return {name: middle[base] / seconds for name, seconds in middle.items()}


def padded(rows: Rows, x: Queries) -> Float[Array, "b m"]:
    return (jnp.pad(x, ((0, -len(x) % 16), (0, 0))) @ rows.T)[: len(x)]


# Every row's score for queries (b, d), in five forms: the fastest of them is what HiRE is compared with.
DENSE: dict[str, Callable] = {
    "dense x @ W.T": lambda rows, x: x @ rows.T,
    "dense W @ x": lambda rows, x: (rows @ x[0])[None] if len(x) == 1 else (rows @ x.T).T,
    "dense multiply-reduce": lambda rows, x: jnp.sum(rows * x, 1)[None] if len(x) == 1 else row_scores(x, rows),
    "dense in pieces": lambda rows, x: x @ rows.T if len(x) == 1 else in_pieces(x, rows),
    "dense padded to 16": padded,
}


def dense_forms(rows: Rows, k: int) -> dict[str, Callable]:
    """The exact top-k of every row's score for queries (b, d), in every dense form."""

    def form(scores: Callable) -> Callable:
        compiled = jax.jit(lambda rows, x: exact_top_k(scores(rows, x), k))
        return lambda x: compiled(rows, x)

    return {name: form(scores) for name, scores in DENSE.items()}


def stream_form(nbytes: int = 2**30) -> tuple[Callable, int]:
    """A form that reads an array once (its sum), and the bytes that it reads: the machine's bandwidth, timed like any other."""
    array = jax.jit(lambda: jnp.ones((nbytes // 4,), jnp.float32))()
    add = jax.jit(jnp.sum)
    return lambda _: add(array), array.nbytes

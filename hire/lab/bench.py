"""Latency of the softmax and of the whole decode step, dense and searched, side by side; `make bench` prints it as a table."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import hire
from hire.axes import Queries, Rows
from hire.choose import true_top_k
from hire.estimators import row_scores, row_scores_at, row_sums
from hire.ffn import HireFFN, activate
from hire.lab import prefills, records
from hire.lab.decode import StepForms
from hire.lab.evaluation import judge
from hire.lab.text import documents
from hire.lab.timing import DENSE, dense_forms, gains, interleaved, medians, stream_form
from hire.models import Decoder, load_gemma
from hire.search import nominate
from hire.softmax import HireSoftmax
from hire.topk import at_most

INT8 = "dense int8 rows"
APPROX = "lax.approx_max_k"


def slices(hidden: Queries, batch: int, repeats: int) -> list[np.ndarray]:
    """So many batches of hidden states, drawn anew for each repetition."""
    order = np.random.default_rng(0).permutation(len(hidden))
    return [np.array(hidden[np.take(order, range(i * batch, (i + 1) * batch), mode="wrap")]) for i in range(repeats)]


def rivals(rows: Rows, k: int) -> dict[str, Callable]:
    """The dense forms, and what else a user would pick: approximate top-k of dense logits, and rows in int8 without exact ones."""
    approximate = jax.jit(lambda rows, x: jax.lax.approx_max_k(row_scores(x, rows), k))
    small = hire.Quantized.fit(rows, 8)
    quantized = jax.jit(lambda small, x: hire.exact_top_k(small.scores(x), k))
    return dense_forms(rows, k) | {APPROX: lambda x: approximate(rows, x), INT8: lambda x: quantized(small, x)}


def fastest_dense(durations: dict[str, list[float]]) -> str:
    """The name of the dense form with the smallest median."""
    middle = medians(durations)
    return min((name for name in middle if name.startswith("dense") and name != INT8), key=lambda name: middle[name])


def stages(softmax: HireSoftmax, hidden: Queries, repeats: int) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds of each stage of a search at batch 1, on what the stage before makes, and the weight bytes that it must read."""
    estimate = jax.jit(lambda estimator, x: estimator.scores(x))
    pick = jax.jit(nominate, static_argnames="candidates")
    dot = jax.jit(row_scores_at)
    last = jax.jit(hire.exact_top_k, static_argnames="k")
    queries = slices(hidden, 1, repeats)
    inputs = []
    for x in queries:
        scores = estimate(softmax.estimator, x)
        chosen = pick(scores, candidates=softmax.candidates)
        inputs.append((x, scores, chosen, dot(x, softmax.rows, chosen)))
    forms = {
        "estimated scores": lambda parts: estimate(softmax.estimator, parts[0]),
        "candidates": lambda parts: pick(parts[1], candidates=softmax.candidates),
        "exact scores": lambda parts: dot(parts[0], softmax.rows, parts[2]),
        "top-k of them": lambda parts: last(parts[3], k=softmax.k),
        "whole": lambda parts: softmax(parts[0]),
    }
    copy = softmax.estimator.bytes_read(softmax.candidates)
    nbytes = {"estimated scores": copy, "exact scores": softmax.bytes_read - copy, "whole": softmax.bytes_read}
    return interleaved(forms, inputs, repeats), nbytes


def time_softmax(
    rows: Rows, searched: dict[str, HireSoftmax], hidden: Queries, k: int, batch: int, repeats: int
) -> dict[str, list[float]]:
    """Seconds of the softmax of a batch: the rivals, the machine's stream of as many bytes, and each search."""
    stream, _ = stream_form(rows.nbytes)
    forms = rivals(rows, k) | {"stream": stream} | searched
    return interleaved(forms, slices(hidden, batch, repeats), repeats)


def time_steps(
    dense: Decoder, searched: Decoder, hidden: Queries, k: int, batch: int, slots: int, repeats: int
) -> dict[str, list[float]]:
    """Seconds of a whole decode step of both models, whose weights are the same arrays."""
    forms = {"dense": StepForms(dense, slots, k).whole(batch), "HiRE": StepForms(searched, slots, k).whole(batch)}
    return interleaved(forms, slices(hidden, 1, repeats), repeats)


def random_ffns(count: int, neurons: int, width: int, rank: int, shares: dict[str, tuple]) -> dict[str, list[HireFFN]]:
    """So many ReLU layers of random weights, whose speed is that of trained ones, in groups of 8, each searched in every setting:
    shares of the groups (kept, candidates, common path), and whether one selection serves a batch, by int8 rows instead of factors.
    """
    searched, groups = {name: [] for name in shares}, neurons // 8
    for key in jax.random.split(jax.random.key(0), count):
        up, down = (jax.random.normal(part, (neurons, width)) for part in jax.random.split(key))
        copies = {}
        for name, (*parts, shared) in shares.items():
            k, candidates, common = (at_most(part, groups) for part in parts)
            if (common, shared) not in copies:
                beyond = up[8 * common :]
                fit = hire.Quantized.fit(beyond, 8) if shared else hire.LowRank.fit(beyond, rank, bits=8, directions="random")
                copies[common, shared] = fit
            ffn = HireFFN(up, down, copies[common, shared], k=k, candidates=candidates, common=common, shared=shared)
            searched[name].append(ffn)
    return searched


def time_gathers(rows: Rows, sizes: Sequence[int], share: float, repeats: int) -> dict[int, dict[str, list[float]]]:
    """By group size: seconds of the exact scores of a share of rows in random groups, and of the machine's stream of all rows."""
    rng, dot = np.random.default_rng(0), jax.jit(row_scores_at, static_argnames="group")
    x = jnp.ones((1, rows.shape[1]), jnp.float32)
    stream, _ = stream_form(rows.nbytes)
    timed = {}
    for size in sizes:
        groups = len(rows) // size
        draws = [rng.permutation(groups)[None, : at_most(share, groups)].astype(np.int32) for _ in range(repeats)]
        forms = {"gather": lambda chosen, size=size: dot(x, rows, chosen, group=size), "stream": stream}
        timed[size] = interleaved(forms, draws, repeats)
    return timed


def through(layer: Callable, layers: Sequence) -> Callable:
    """A form that sends queries through all layers in one compiled program, as a decode step does, each added to its input."""

    @jax.jit
    def run(layers, x):
        for weights in layers:
            x = x + layer(weights, x)
            x = x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True))
        return x

    return lambda x: run(layers, x)


def dense_ffns(layers: Sequence[HireFFN]) -> dict[str, Callable]:
    """The same ReLU layers dense: every form for both products, over `down` turned to (d, f); and the fastest with it as it is."""
    turned = [(layer.up, jnp.asarray(layer.down).T.copy()) for layer in layers]
    kept = [(layer.up, layer.down) for layer in layers]

    def form(scores: Callable, add: Callable, layers: Sequence) -> Callable:
        return through(lambda weights, x: add(activate(scores(weights[0], x)), weights[1]), layers)

    forms = {name: form(scores, lambda active, down: scores(down, active), turned) for name, scores in DENSE.items()}
    return forms | {"dense rows in parts": form(lambda rows, x: row_scores(x, rows), row_sums, kept)}


def time_ffns(searched: dict[str, Sequence[HireFFN]], queries: Sequence[Queries], repeats: int) -> dict[str, list[float]]:
    """Seconds a layer that batches of queries take through ReLU layers: dense, the machine's stream of as many bytes, searched."""
    layers = next(iter(searched.values()))
    stream, _ = stream_form(len(layers) * 2 * layers[0].up.nbytes)
    forms = dense_ffns(layers) | {"stream": stream}
    forms |= {name: through(lambda ffn, x: ffn(x), ffns) for name, ffns in searched.items()}
    durations = interleaved(forms, queries, repeats)
    return {name: [value / len(layers) for value in seconds] for name, seconds in durations.items()}


def speedups(timed: dict[int, dict[str, list[float]]], name: str = "HiRE", base: str | None = None) -> dict[int, float]:
    """By batch: the median of a base form, or of the fastest dense one, over that of one form."""
    return {batch: gains(forms, base or fastest_dense(forms))[name] for batch, forms in timed.items()}


def over_batches(timed: dict[int, dict[str, list[float]]], names: Iterable[str]) -> dict[str, list[float]]:
    """Median seconds at every batch: of some forms, and of the fastest dense one."""
    middle = {batch: medians(forms) for batch, forms in timed.items()}
    lines = {name: [by_name[name] for by_name in middle.values()] for name in names}
    return lines | {"fastest dense": [middle[batch][fastest_dense(forms)] for batch, forms in timed.items()]}


def table(what: str, timed: dict[int, dict[str, list[float]]]) -> str:
    """A line a form and batch: median milliseconds, and how many times as fast as the fastest dense form."""
    lines = []
    for batch, durations in timed.items():
        middle, dense = medians(durations), fastest_dense(durations)
        lines.append(f"{what}, batch {batch}")
        lines += [f"{'':8}{name:26}{seconds * 1e3:9.2f} ms{middle[dense] / seconds:9.2f}x" for name, seconds in middle.items()]
    return "\n".join(lines)


def bench(k: int = 32, rank: int = 128, candidates: int = 2048) -> None:
    """Print the table for Gemma 3 270M at batch 1 and 8, and append records with the raw durations."""
    gemma = load_gemma()
    rows = gemma.model.token_embeddings()
    fitted_to = prefills.states(gemma, documents("calibration")[::2], 128, 3, skip=4)
    unseen = prefills.states(gemma, documents("evaluation", ["novel"])[:60])
    softmax = HireSoftmax(rows, hire.LowRank.fit(rows, rank, calibration=fitted_to.hidden, bits=8), k, candidates)
    quality = judge(softmax, unseen, true_top_k(rows, unseen.hidden, k))
    recall, top1 = (rate["mean"] for rate in quality.values())
    print(f"Gemma 3 270M ({gemma.stored}), {records.machine()['device']}; k = {k}, LR {rank} int8 fitted, k' = {candidates}")
    print(f"recall@{k} {recall:.4f}, top-1 kept {top1:.4f} over {len(unseen.hidden)} positions of unseen text")
    setting = dict(k=k, rank=rank, candidates=candidates)
    for batch in (1, 8):
        timed = {"softmax": time_softmax(rows, {"HiRE": softmax}, unseen.hidden, k, batch, 20)}
        timed["step"] = time_steps(gemma.model, hire.convert(gemma.model, softmax=softmax), unseen.hidden, k, batch, 512, 10)
        for what, durations in timed.items():
            print(table(what, {batch: durations}), flush=True)
            speedup = speedups({batch: durations})[batch]
            results = dict(medians=medians(durations), speedup=speedup, dense=fastest_dense(durations), quality=quality)
            facts: dict[str, Any] = dict(setting=setting | dict(batch=batch), results=results, durations=durations)
            facts |= dict(kind="measured", weights=gemma.stored, append=True, command="make bench")
            records.write(records.RECORDS, "bench", f"bench/{what}/{batch}", **facts)

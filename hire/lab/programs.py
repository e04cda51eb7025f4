"""Programs whose time on a TPU v5e is estimated, predicted and, where there is a chip, measured: shapes alone, until they run.

Each is a function of weights and of queries x (b, d), so that it can be timed in a loop over queries.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from hire import HireFFN, HireSoftmax, LowRank, Quantized
from hire.axes import AnyArray, Array, Queries, Tokens
from hire.estimators import Estimator
from hire.ffn import activate
from hire.kernels import arguments
from hire.kernels import groups as group_kernel
from hire.kernels import rows as row_kernel
from hire.kernels import scores as score_kernel
from hire.lab import records, schedules, timing, tpu
from hire.lab.paths import RECORDS
from hire.lab.sparsity import searched
from hire.models import Decoder, DecoderConfig, convert, preset
from hire.models.generation import Split, compiled_prefill, step
from hire.topk import at_most, exact_top_k

WORDS, KEPT, CANDIDATES, RANK = 262_144, 32, 2_048, 128  # of the softmaxes; k, k' and rank
DENSE = {name: form for name, form in timing.DENSE.items() if name != "dense in pieces"}  # which on a TPU is x @ W.T
NEURONS = 6_144  # of the FFN of the 1B size, whose width is 1536


@dataclass(frozen=True)
class Program:
    """function(weights, x) of pytrees of shapes, where x holds the queries; `reads` are the bytes that a call must move."""

    function: Callable
    weights: Any
    x: Any
    reads: int
    donated: tuple[int, ...] = ()  # 1 where x is written over
    topology: str = "v5e:2x2"
    specs: tuple[P, ...] = ()  # where the arrays of both lie over the axis "chips" of all its chips; none: all on one chip


def skeleton(make: Callable[[], object]) -> tuple[list[jax.ShapeDtypeStruct], Callable[[Sequence], Any]]:
    """The shapes of the arrays of what `make` would make, and what puts such arrays together."""
    made = []

    def arrays() -> list[Array]:
        leaves, tree = jax.tree.flatten(make())
        made.append(tree)
        return leaves

    return jax.eval_shape(arrays), lambda leaves: made[0].unflatten(leaves)


def nbytes(shapes: Sequence[jax.ShapeDtypeStruct]) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in shapes)


def quantized(m: int, d: int, bits: int) -> Quantized:
    codes = jnp.zeros((m, d * bits // 8), jnp.int8 if bits == 8 else jnp.uint8)
    return Quantized(codes, jnp.zeros(m), None, bits, d)


def low_rank(m: int, d: int, rank: int, bits: int | None) -> LowRank:
    if bits is None:
        return LowRank(jnp.zeros((rank, d)), jnp.zeros((m, rank), jnp.bfloat16), None)
    return LowRank(quantized(rank, d, 8), quantized(m, rank, bits), None)


COPIES: dict[str, Callable[[int, int, int], Estimator]] = {
    "LR bf16": lambda m, d, rank: low_rank(m, d, rank, None),
    "Q int4": lambda m, d, rank: quantized(m, d, 4),
    "LR int8": lambda m, d, rank: low_rank(m, d, rank, 8),
}


def dense_softmax(width: int, batch: int, form: str, words: int = WORDS) -> Program:
    """Every word's logit in one of the dense forms, and their exact top-k."""
    rows, x = (jax.ShapeDtypeStruct((count, width), jnp.bfloat16) for count in (words, batch))
    return Program(lambda rows, x: exact_top_k(DENSE[form](rows, x), KEPT), rows, x, rows.size * 2)


def hire_softmax(width: int, batch: int, copy: str, form: str, words: int = WORDS, candidates: int = CANDIDATES) -> Program:
    """HireSoftmax in plain JAX, or by kernels from rows in blocks."""

    def make() -> HireSoftmax:
        estimator = COPIES[copy](words, width, RANK)
        rows = jnp.zeros((words, width), jnp.bfloat16)
        rows = rows if form == "plain" else row_kernel.blocks(rows)
        return HireSoftmax(rows, estimator, k=KEPT, candidates=candidates, form=form)

    arrays, whole = skeleton(make)
    reads = nbytes(arrays[1:]) + batch * candidates * width * 2
    return Program(lambda arrays, x: whole(arrays)(x), arrays, jax.ShapeDtypeStruct((batch, width), jnp.bfloat16), reads)


def dense_ffn(width: int, batch: int, form: str, neurons: int = NEURONS) -> Program:
    """A ReLU layer of which all is computed, the up products in one of the dense forms."""

    def function(matrices: tuple[Array, Array], x: Queries) -> Array:
        return activate(DENSE[form](matrices[0], x)).astype(x.dtype) @ matrices[1]

    matrix = jax.ShapeDtypeStruct((neurons, width), jnp.bfloat16)
    return Program(function, (matrix, matrix), jax.ShapeDtypeStruct((batch, width), jnp.bfloat16), 4 * matrix.size)


def hire_ffn(
    width: int, batch: int, form: str, kept: float, candidates: float, *, shared: bool = False, neurons: int = NEURONS
) -> Program:
    """HireFFN with int8 factors of a quarter of the width."""
    k, count = (at_most(share, neurons // 8) for share in (kept, candidates))

    def make() -> HireFFN:
        up, down = (jnp.zeros((neurons, width), jnp.bfloat16) for _ in range(2))
        return HireFFN(up, down, low_rank(neurons, width, width // 4, 8), k=k, candidates=count, shared=shared, form=form)

    arrays, whole = skeleton(make)
    calls, row = 1 if shared else batch, 8 * width * 2
    last = count if shared else k
    reads = nbytes(arrays) - 4 * neurons * width + calls * (count + last) * row
    return Program(lambda arrays, x: whole(arrays)(x), arrays, jax.ShapeDtypeStruct((batch, width), jnp.bfloat16), reads)


FFNS = (("5 % of 10 %", 0.05, 0.1, False), ("10 % of 20 %", 0.1, 0.2, False), ("10 % of 40 % shared", 0.1, 0.4, True))
BATCHES = (1, 4, 8, 16)


def softmaxes(width: int, b: int) -> dict[str, Program]:
    """The softmaxes of a width at a batch, by name: dense in every form, HiRE in plain JAX and by kernels."""
    found = {form: dense_softmax(width, b, form) for form in DENSE}
    found |= {f"{copy} plain": hire_softmax(width, b, copy, "plain") for copy in COPIES}
    return found | {f"{copy} kernels": hire_softmax(width, b, copy, "kernel") for copy in COPIES if copy != "LR bf16"}


def ffns(width: int, b: int) -> dict[str, Program]:
    """The FFNs of a width at a batch, by name."""
    found = {form: dense_ffn(width, b, form) for form in DENSE}
    for name, kept, candidates, shared in FFNS:
        found[f"{name} plain"] = hire_ffn(width, b, "plain", kept, candidates, shared=shared)
        found[f"{name} kernels"] = hire_ffn(width, b, "kernel", kept, candidates, shared=shared)
    return found


STEPS = {"dense": (False, 0.0, False), "softmax": (True, 0.0, False), "FFN": (False, 0.1, False), "both": (True, 0.1, False)}
STEPS["both shared"] = (True, 0.25, True)  # whether the softmax is searched, candidates of the FFN that keeps 5 %, whether shared


def decode_step(config: DecoderConfig, batch: int, slots: int, parts: tuple[bool, float, bool] = STEPS["dense"]) -> Program:
    """One token of each text through the whole decoder in bfloat16, dense or searched, to its best word; x is (token, cache)."""
    by_search, candidates, shared = parts
    unread = []  # bytes of weights that a step leaves alone

    def make() -> Split:
        model = Decoder(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
        softmax, ffns, (neurons, width) = None, None, (config.ffn_width, config.width)
        if by_search:
            rows = row_kernel.blocks(model.token_embeddings())
            softmax = HireSoftmax(rows, COPIES["LR int8"](config.vocabulary, width, RANK), k=KEPT, candidates=CANDIDATES)
            unread.append(rows.nbytes + softmax.estimator.nbytes - softmax.bytes_for(batch))
        if candidates:
            ffns = searched(
                model,
                lambda *_: low_rank(neurons, width, width // 4, 8),
                kept=0.05,
                candidates=candidates,
                shared=shared,
                group_size=8,
            )
            unread.extend(2 * ffn.up.nbytes + ffn.estimator.nbytes - ffn.bytes_for(batch) for ffn in ffns)
        return Split.of(convert(model, softmax=softmax, ffn=ffns))

    arrays, whole = skeleton(make)
    prompt = jax.ShapeDtypeStruct((batch, 1), jnp.int32)
    forms = []

    def empty(arrays: list[Array], prompt: Tokens) -> list[Array]:
        leaves, form = jax.tree.flatten(compiled_prefill(whole(arrays).trunk, prompt, slots)[1])
        forms.append(form)
        return leaves

    cache = jax.eval_shape(empty, arrays, prompt)

    def function(arrays: list[Array], x: tuple) -> Any:
        return step(whole(arrays), x[0], forms[0].unflatten(x[1]), 1)

    token = jax.ShapeDtypeStruct((batch,), jnp.int32)
    return Program(function, arrays, (token, cache), nbytes(arrays) + nbytes(cache) - sum(unread), donated=(1,))


def steps() -> dict[str, Program]:
    """Whole decode steps of the 1B shape at a cache of 512."""
    names = [(name, b) for b in (1, 8) for name in STEPS if b > 1 or not STEPS[name][2]]
    return {f"step paper_1b, {name}, b {b}": decode_step(preset("paper_1b"), b, 512, STEPS[name]) for name, b in names}


KERNEL_TARGETS = {"rows": 1.5, "scores int8": 1.5, "scores int4": 2.0, "groups": 1.5}  # over the HBM time of what each must read


def kernels() -> dict[str, Program]:
    """The kernels alone, at the sizes of the headline: name -> program whose first argument is x."""
    first_stage = dict(buckets=WORDS // 64, per_bucket=2)

    def of(kernel: Callable, how: dict, draw: Callable[..., tuple], reads: int, **sizes: int) -> Program:
        x, *rest = jax.eval_shape(partial(draw, **sizes))
        return Program(lambda rest, x: kernel(x, *rest, **how), rest, x, reads)

    rows, codes, k = 8 * CANDIDATES * 2048 * 2, 4 * WORDS, at_most(0.05, NEURONS // 8)
    int8, int4 = first_stage | dict(bits=8), first_stage | dict(bits=4)
    return {
        "rows": of(row_kernel.scores, {}, arguments.of_rows, rows, b=8, c=CANDIDATES, m=WORDS, d=2048),
        "scores int8": of(score_kernel.winners, int8, arguments.of_scores, codes + WORDS * RANK, b=8, m=WORDS, d=RANK, bits=8),
        "scores int4": of(score_kernel.winners, int4, arguments.of_scores, codes + WORDS * 1024, b=8, m=WORDS, d=2048, bits=4),
        "groups": of(group_kernel.ffn, dict(k=k), arguments.of_groups, 2 * k * 8 * 1536 * 2, b=1, n=8, c=k, f=NEURONS, d=1536),
    }


def headline() -> dict[str, Program]:
    """The programs that the v5e figure shows, by name: what, form, batch."""
    found = {f"kernel {name}": program for name, program in kernels().items()}
    found |= {f"softmax 2048, {name}, b {b}": program for b in (1, 8) for name, program in softmaxes(2048, b).items()}
    for b in BATCHES:
        for what, programs in (("softmax", softmaxes(1536, b)), ("FFN", ffns(1536, b))):
            found |= {f"{what} 1536, {name}, b {b}": program for name, program in programs.items()}
    return found


def estimated(name: str, program: Program, **more) -> dict:
    """The record of a program's estimate for a v5e (see tpu.estimate), which is compiled unless the cache knows it."""
    found = tpu.estimate(
        program.function, program.weights, program.x, topology=program.topology, donated=program.donated, specs=program.specs
    )
    parts = [dict(name=each["name"], kind=each["kind"], us=1e6 * each["seconds"]) for each in found["operations"]]
    results = {key: found[key] for key in ("seconds", "moving", "holes", "memory")}
    results["floor"] = program.reads / schedules.BANDWIDTH
    results["sent"] = found["sent"]
    # Transfers that were waited for: each adds schedules.LATENCY, which is assumed.
    results["waits"] = sum(each["waits"] for each in found["operations"] if each["kind"] != "prefetch") / schedules.LATENCY
    results["parts"] = [part for part in parts if part["us"] > 0.01e6 * found["seconds"]]
    setting = dict(topology=found["topology"], compiler=found["compiler"])
    weights = "none, shapes alone"
    return records.write(
        RECORDS, "v5e", name, kind="compiler-estimate", weights=weights, setting=setting, results=results | more, command="make v5e"
    )


def estimate_all(programs: dict[str, Program]) -> None:
    """Estimate programs, and keep the records. One that is refused is named, and the others still follow."""
    for name, program in programs.items():
        try:
            found = estimated(name, program)["results"]
            print(f"{name}: {1e6 * found['seconds']:.1f} us, HBM bound {1e6 * found['floor']:.1f} us", flush=True)
        except RuntimeError as error:
            print(f"{name}: {error}", flush=True)


def filled(shapes: object, seed: int = 0) -> object:
    """Random arrays of these shapes, on the device: floats normal, whole numbers of all values."""

    def one(key: Array, shape: jax.ShapeDtypeStruct) -> AnyArray:
        if jnp.issubdtype(shape.dtype, jnp.floating):
            return jax.random.normal(key, shape.shape, shape.dtype)
        return jax.random.bits(key, shape.shape, jnp.dtype(f"uint{8 * shape.dtype.itemsize}")).view(shape.dtype)

    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return jax.tree.unflatten(tree, [jax.jit(one, static_argnums=1)(key, leaf) for key, leaf in zip(keys, leaves, strict=True)])


def time_program(program: Program, loops: int = 32, repeats: int = 7) -> list[float]:
    """Seconds of one call on this machine's device, `repeats` times: a loop over 2 * loops queries less one over loops of them.

    So the time to start a program and to fetch its answer drops out.
    """
    weights = filled(program.weights)
    run = jax.jit(lambda weights, xs: jax.lax.map(lambda x: program.function(weights, x), xs))
    draws = [filled(jax.ShapeDtypeStruct((count, *program.x.shape), program.x.dtype), count) for count in (loops, 2 * loops)]
    for xs in draws:
        jax.block_until_ready(run(weights, xs))

    def seconds(xs: object) -> float:
        start = time.perf_counter()
        jax.block_until_ready(run(weights, xs))
        return time.perf_counter() - start

    few, many = draws
    return [(seconds(many) - seconds(few)) / loops for _ in range(repeats)]

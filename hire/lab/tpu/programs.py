"""Programs whose time on a TPU v5e is estimated, predicted and, on a chip, measured.

They contain only shapes until they run.

Each program is a function of weights and of queries x `(b, d)`, so that it can be timed in a loop
over queries.
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
from hire.estimators.base import Estimator
from hire.lab import records
from hire.lab.metrics.group_sparsity import searched
from hire.lab.paths import RECORDS
from hire.lab.rivals import dense
from hire.lab.tpu import bundle_parser, compiler
from hire.models import Decoder, DecoderConfig, convert, preset
from hire.models.generation import SplitModel, compiled_prefill, step
from hire.ops.top_k import exact_top_k, floor_fraction
from hire.ops.tpu import bucket_scores as score_kernel
from hire.ops.tpu import example_arguments
from hire.ops.tpu import group_ffn as group_kernel
from hire.ops.tpu import row_scores as row_kernel
from hire.types import AnyArray, Array, Queries, Tokens

# Sizes of the softmax programs: vocabulary, k, k' and rank.
VOCABULARY, TOP_K, CANDIDATES, RANK = 262_144, 32, 2_048, 128
# On a TPU "dense in pieces" is the same as x @ W.T, and no CPU kernel runs there.
NOT_FOR_TPU = ("dense in pieces", "dense CPU kernel")
DENSE = {name: form for name, form in dense.DENSE.items() if name not in NOT_FOR_TPU}
NEURONS = 6_144  # FFN of the 1B size, at a width of 1536


@dataclass(frozen=True)
class Program:
    """function(weights, x) with its arguments as pytrees of shapes.

    Attributes:
        function: Function to compile.
        weights: Shapes of the weights.
        x: Shapes of the queries, with any state that the function needs besides weights.
        reads: Bytes that one call must move.
        donated: (1,) where the program may overwrite x.
        topology: Slice to compile for.
        specs: Partition specs of the arrays in `weights` and `x` over the axis "chips" of all
            chips. Empty: all arrays are on one chip.
    """

    function: Callable
    weights: Any
    x: Any
    reads: int
    donated: tuple[int, ...] = ()
    topology: str = "v5e:2x2"
    specs: tuple[P, ...] = ()


def skeleton(
    make: Callable[[], object],
) -> tuple[list[jax.ShapeDtypeStruct], Callable[[Sequence], Any]]:
    """Trace `make` without allocating its arrays.

    Returns:
        A tuple (shapes of the arrays in the result of `make`, function that rebuilds the result
        from such arrays).
    """
    structures = []

    def arrays() -> list[Array]:
        leaves, tree = jax.tree.flatten(make())
        structures.append(tree)
        return leaves

    return jax.eval_shape(arrays), lambda leaves: structures[0].unflatten(leaves)


def nbytes(shapes: Sequence[jax.ShapeDtypeStruct]) -> int:
    """Return the bytes of arrays with these shapes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in shapes)


def quantized(m: int, d: int, bits: int) -> Quantized:
    """Return a Quantized estimator of zeros for rows `(m, d)`."""
    codes = jnp.zeros((m, d * bits // 8), jnp.int8 if bits == 8 else jnp.uint8)
    return Quantized(codes, jnp.zeros(m), bits, d)


def low_rank(m: int, d: int, rank: int, bits: int | None) -> LowRank:
    """Return a LowRank estimator of zeros for rows `(m, d)`; bits of None give bfloat16 factors."""
    if bits is None:
        return LowRank(jnp.zeros((rank, d)), jnp.zeros((m, rank), jnp.bfloat16), None)
    return LowRank(quantized(rank, d, 8), quantized(m, rank, bits), None)


ESTIMATORS: dict[str, Callable[[int, int, int], Estimator]] = {
    "LR bf16": lambda m, d, rank: low_rank(m, d, rank, None),
    "Q int4": lambda m, d, rank: quantized(m, d, 4),
    "LR int8": lambda m, d, rank: low_rank(m, d, rank, 8),
}


def dense_softmax(width: int, batch: int, form: str, vocabulary: int = VOCABULARY) -> Program:
    """Build a dense softmax: all logits by one of the DENSE forms, then the exact top-k."""
    rows, x = (jax.ShapeDtypeStruct((count, width), jnp.bfloat16) for count in (vocabulary, batch))
    return Program(lambda rows, x: exact_top_k(DENSE[form](rows, x), TOP_K), rows, x, rows.size * 2)


def hire_softmax(
    width: int,
    batch: int,
    estimator_name: str,
    implementation: str,
    vocabulary: int = VOCABULARY,
    candidates: int = CANDIDATES,
) -> Program:
    """Build a HireSoftmax in plain JAX ("xla") or with the TPU kernels and blocked rows."""

    def make() -> HireSoftmax:
        estimator = ESTIMATORS[estimator_name](vocabulary, width, RANK)
        rows = jnp.zeros((vocabulary, width), jnp.bfloat16)
        rows = rows if implementation == "xla" else row_kernel.blocks(rows)
        return HireSoftmax(
            rows, estimator, k=TOP_K, candidates=candidates, implementation=implementation
        )

    arrays, rebuild = skeleton(make)
    reads = nbytes(arrays[1:]) + batch * candidates * width * 2
    return Program(
        lambda arrays, x: rebuild(arrays)(x),
        arrays,
        jax.ShapeDtypeStruct((batch, width), jnp.bfloat16),
        reads,
    )


def dense_ffn(width: int, batch: int, form: str, neurons: int = NEURONS) -> Program:
    """Build a dense ReLU layer; one of the DENSE forms computes the up projection."""

    def function(matrices: tuple[Array, Array], x: Queries) -> Array:
        return jax.nn.relu(DENSE[form](matrices[0], x)).astype(x.dtype) @ matrices[1]

    matrix = jax.ShapeDtypeStruct((neurons, width), jnp.bfloat16)
    return Program(
        function,
        (matrix, matrix),
        jax.ShapeDtypeStruct((batch, width), jnp.bfloat16),
        4 * matrix.size,
    )


def hire_ffn(
    width: int,
    batch: int,
    implementation: str,
    k_fraction: float,
    candidates: float,
    *,
    share_selection: bool = False,
    neurons: int = NEURONS,
) -> Program:
    """Build a HireFFN with int8 low-rank factors of a quarter of the width.

    Args:
        width: Width of the model.
        batch: Number of queries.
        implementation: "xla" or "pallas".
        k_fraction: k as a share of the groups.
        candidates: k' as a share of the groups.
        share_selection: Whether the batch shares one selection.
        neurons: Number of neurons.
    """
    k, count = (floor_fraction(share, neurons // 8) for share in (k_fraction, candidates))

    def make() -> HireFFN:
        up, down = (jnp.zeros((neurons, width), jnp.bfloat16) for _ in range(2))
        return HireFFN(
            up,
            down,
            low_rank(neurons, width, width // 4, 8),
            k=k,
            candidates=count,
            share_selection=share_selection,
            implementation=implementation,
        )

    arrays, rebuild = skeleton(make)
    selections, group_bytes = 1 if share_selection else batch, 8 * width * 2
    down_groups = count if share_selection else k
    reads = nbytes(arrays) - 4 * neurons * width + selections * (count + down_groups) * group_bytes
    return Program(
        lambda arrays, x: rebuild(arrays)(x),
        arrays,
        jax.ShapeDtypeStruct((batch, width), jnp.bfloat16),
        reads,
    )


FFNS = (
    ("5 % of 10 %", 0.05, 0.1, False),
    ("10 % of 20 %", 0.1, 0.2, False),
    ("10 % of 40 % shared", 0.1, 0.4, True),
)
BATCHES = (1, 4, 8, 16)


def softmaxes(width: int, b: int) -> dict[str, Program]:
    """Return the softmax programs of a width at batch `b`, by name.

    They are the dense softmax in each form, and HiRE in plain JAX and with the TPU kernels.
    """
    programs = {form: dense_softmax(width, b, form) for form in DENSE}
    programs |= {
        f"{estimator_name} xla": hire_softmax(width, b, estimator_name, "xla")
        for estimator_name in ESTIMATORS
    }
    return programs | {
        f"{estimator_name} pallas": hire_softmax(width, b, estimator_name, "pallas")
        for estimator_name in ESTIMATORS
        if estimator_name != "LR bf16"
    }


def ffns(width: int, b: int) -> dict[str, Program]:
    """Return the FFN programs of a width at batch `b`, by name."""
    programs = {form: dense_ffn(width, b, form) for form in DENSE}
    for name, k_fraction, candidates, share_selection in FFNS:
        programs[f"{name} xla"] = hire_ffn(
            width, b, "xla", k_fraction, candidates, share_selection=share_selection
        )
        programs[f"{name} pallas"] = hire_ffn(
            width, b, "pallas", k_fraction, candidates, share_selection=share_selection
        )
    return programs


# Whether HiRE searches the softmax, the candidates of an FFN with k at 5 % of the groups, and
# whether the batch shares one selection.
STEPS = {
    "dense": (False, 0.0, False),
    "softmax": (True, 0.0, False),
    "FFN": (False, 0.1, False),
    "both": (True, 0.1, False),
}
STEPS["both shared"] = (True, 0.25, True)


def decode_step(
    config: DecoderConfig,
    batch: int,
    cache_length: int,
    parts: tuple[bool, float, bool] = STEPS["dense"],
) -> Program:
    """Build a decode step of the whole decoder in bfloat16, up to the best token of each text.

    Args:
        config: Shape of the decoder.
        batch: Number of texts; each decodes one token.
        cache_length: Length of the key/value cache, in tokens.
        parts: One value of STEPS: whether HiRE searches the softmax, the candidates of the FFN as a
            share of the groups (0: dense), and whether the batch shares one selection.

    Returns:
        A program with x = (token, cache).
    """
    search_softmax, candidates, share_selection = parts
    unread_bytes = []  # bytes of weights that a step does not read

    def make() -> SplitModel:
        model = Decoder(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
        softmax, ffn_layers, (neurons, width) = None, None, (config.ffn_width, config.width)
        if search_softmax:
            rows = row_kernel.blocks(model.head_rows())
            softmax = HireSoftmax(
                rows,
                ESTIMATORS["LR int8"](config.vocabulary, width, RANK),
                k=TOP_K,
                candidates=CANDIDATES,
            )
            unread_bytes.append(rows.nbytes + softmax.estimator.nbytes - softmax.bytes_read(batch))
        if candidates:
            ffn_layers = searched(
                model,
                lambda *_: low_rank(neurons, width, width // 4, 8),
                kept_fraction=0.05,
                candidates=candidates,
                share_selection=share_selection,
                group_size=8,
            )
            unread_bytes.extend(
                2 * ffn.up.nbytes + ffn.estimator.nbytes - ffn.bytes_read(batch)
                for ffn in ffn_layers
            )
        return SplitModel.of(convert(model, softmax=softmax, ffn=ffn_layers))

    arrays, rebuild = skeleton(make)
    prompt = jax.ShapeDtypeStruct((batch, 1), jnp.int32)
    structures = []

    def empty(arrays: list[Array], prompt: Tokens) -> list[Array]:
        leaves, structure = jax.tree.flatten(
            compiled_prefill(rebuild(arrays).backbone, prompt, cache_length)[1]
        )
        structures.append(structure)
        return leaves

    cache = jax.eval_shape(empty, arrays, prompt)

    def function(arrays: list[Array], x: tuple) -> Any:
        return step(rebuild(arrays), x[0], structures[0].unflatten(x[1]), 1)

    token = jax.ShapeDtypeStruct((batch,), jnp.int32)
    return Program(
        function,
        arrays,
        (token, cache),
        nbytes(arrays) + nbytes(cache) - sum(unread_bytes),
        donated=(1,),
    )


def steps() -> dict[str, Program]:
    """Return the decode steps of the 1B shape at a cache length of 512, by record name."""
    names = [(name, b) for b in (1, 8) for name in STEPS if b > 1 or not STEPS[name][2]]
    return {
        f"step paper_1b, {name}, b {b}": decode_step(preset("paper_1b"), b, 512, STEPS[name])
        for name, b in names
    }


# Target time of each kernel as a multiple of the HBM time of the bytes that it must read.
KERNEL_TARGETS = {"rows": 1.5, "scores int8": 1.5, "scores int4": 2.0, "groups": 1.5}


def kernels() -> dict[str, Program]:
    """Return the TPU kernels alone, at the sizes of the headline, by name.

    Returns:
        A dict from name to a program that passes x to the kernel as its first argument.
    """
    first_stage = dict(buckets=VOCABULARY // 64, per_bucket=2)

    def of(
        kernel: Callable, how: dict, draw: Callable[..., tuple], reads: int, **sizes: int
    ) -> Program:
        x, *rest = jax.eval_shape(partial(draw, **sizes))
        return Program(lambda rest, x: kernel(x, *rest, **how), rest, x, reads)

    row_bytes, scale_bytes, k = (
        8 * CANDIDATES * 2048 * 2,
        4 * VOCABULARY,
        floor_fraction(0.05, NEURONS // 8),
    )
    int8_options, int4_options = first_stage | dict(bits=8), first_stage | dict(bits=4)
    return {
        "rows": of(
            row_kernel.scores,
            {},
            example_arguments.of_rows,
            row_bytes,
            b=8,
            c=CANDIDATES,
            m=VOCABULARY,
            d=2048,
        ),
        "scores int8": of(
            score_kernel.bucket_top_k,
            int8_options,
            example_arguments.of_scores,
            scale_bytes + VOCABULARY * RANK,
            b=8,
            m=VOCABULARY,
            d=RANK,
            bits=8,
        ),
        "scores int4": of(
            score_kernel.bucket_top_k,
            int4_options,
            example_arguments.of_scores,
            scale_bytes + VOCABULARY * 1024,
            b=8,
            m=VOCABULARY,
            d=2048,
            bits=4,
        ),
        "groups": of(
            group_kernel.ffn,
            dict(k=k),
            example_arguments.of_groups,
            2 * k * 8 * 1536 * 2,
            b=1,
            n=8,
            c=k,
            f=NEURONS,
            d=1536,
        ),
    }


def headline() -> dict[str, Program]:
    """Return the programs of the v5e figure.

    Returns:
        A dict from the name, which states layer, variant and batch, to the program.
    """
    all_programs = {f"kernel {name}": program for name, program in kernels().items()}
    all_programs |= {
        f"softmax 2048, {name}, b {b}": program
        for b in (1, 8)
        for name, program in softmaxes(2048, b).items()
    }
    for b in BATCHES:
        for layer, programs in (("softmax", softmaxes(1536, b)), ("FFN", ffns(1536, b))):
            all_programs |= {
                f"{layer} 1536, {name}, b {b}": program for name, program in programs.items()
            }
    return all_programs


def estimated(name: str, program: Program, **more) -> dict:
    """Estimate a program for a v5e and write its record.

    `compiler.estimate` compiles the program unless its cache has the estimate.

    Args:
        name: Id of the record.
        program: Program to estimate.
        more: Further results for the record.

    Returns:
        The record. Its results have the keys `seconds`, `transfer_seconds`, `unparsed`, `memory`,
        `floor` (seconds that the bytes to read take at HBM bandwidth), `bytes_sent`, `waits`
        (number of transfers that the program waits for) and `operations` (operations above 1 % of
        the time, in microseconds).
    """
    estimate = compiler.estimate(
        program.function,
        program.weights,
        program.x,
        topology=program.topology,
        donated=program.donated,
        specs=program.specs,
    )
    parts = [
        dict(name=operation["name"], kind=operation["kind"], us=1e6 * operation["seconds"])
        for operation in estimate["operations"]
    ]
    results = {key: estimate[key] for key in ("seconds", "transfer_seconds", "unparsed", "memory")}
    results["floor"] = program.reads / bundle_parser.BANDWIDTH
    results["bytes_sent"] = estimate["bytes_sent"]
    # The number of transfers that the program waits for: each adds bundle_parser.LATENCY, which is
    # assumed.
    results["waits"] = (
        sum(
            operation["wait_seconds"]
            for operation in estimate["operations"]
            if operation["kind"] != "prefetch"
        )
        / bundle_parser.LATENCY
    )
    results["operations"] = [part for part in parts if part["us"] > 0.01e6 * estimate["seconds"]]
    setting = dict(topology=estimate["topology"], compiler=estimate["compiler"])
    weights = "none, shapes alone"
    return records.write(
        RECORDS,
        "v5e",
        name,
        kind="compiler-estimate",
        weights=weights,
        setting=setting,
        results=results | more,
        command="make v5e",
    )


def estimate_all(programs: dict[str, Program]) -> None:
    """Estimate programs and write their records.

    A refused program prints its error and does not stop the others.
    """
    for name, program in programs.items():
        try:
            results = estimated(name, program)["results"]
            print(
                f"{name}: {1e6 * results['seconds']:.1f} us, "
                f"HBM bound {1e6 * results['floor']:.1f} us",
                flush=True,
            )
        except RuntimeError as error:
            print(f"{name}: {error}", flush=True)


def random_arrays(shapes: object, seed: int = 0) -> object:
    """Return random arrays of these shapes on the device.

    Floats are normal; integers are uniform over all values of their type.
    """

    def one(key: Array, shape: jax.ShapeDtypeStruct) -> AnyArray:
        if jnp.issubdtype(shape.dtype, jnp.floating):
            return jax.random.normal(key, shape.shape, shape.dtype)
        return jax.random.bits(key, shape.shape, jnp.dtype(f"uint{8 * shape.dtype.itemsize}")).view(
            shape.dtype
        )

    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return jax.tree.unflatten(
        tree,
        [jax.jit(one, static_argnums=1)(key, leaf) for key, leaf in zip(keys, leaves, strict=True)],
    )


def time_program(program: Program, loops: int = 32, repeats: int = 7) -> list[float]:
    """Measure the time of one call on this machine's device.

    Each value is the time of a loop over 2 * loops queries minus the time of a loop over `loops`
    queries, divided by `loops`. The time to start a program and to fetch its result cancels.

    Args:
        program: Program to time.
        loops: Number of queries in the short loop.
        repeats: Number of measurements.

    Returns:
        Seconds of one call, `repeats` values.
    """
    weights = random_arrays(program.weights)
    run = jax.jit(lambda weights, xs: jax.lax.map(lambda x: program.function(weights, x), xs))
    query_sets = [
        random_arrays(jax.ShapeDtypeStruct((count, *program.x.shape), program.x.dtype), count)
        for count in (loops, 2 * loops)
    ]
    for xs in query_sets:
        jax.block_until_ready(run(weights, xs))

    def seconds(xs: object) -> float:
        start = time.perf_counter()
        jax.block_until_ready(run(weights, xs))
        return time.perf_counter() - start

    short_loop, long_loop = query_sets
    return [(seconds(long_loop) - seconds(short_loop)) / loops for _ in range(repeats)]

"""Times and bytes of decode steps of figure 08's variants."""

import ctypes
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace

import jax
import numpy as np
import pandas
from flax import nnx

import hire
from hire.lab.studies.ablation_variants import (
    BOTH,
    DENSE,
    FFN_ALONE,
    SHARED,
    WIDER,
    WIDER_SHARES,
    VariantSizes,
    build_untrained,
    ffns_of,
    model_that_fits,
    softmax_of,
    to_bfloat16,
    to_int8,
    with_int8_rows,
    with_shares,
    with_small_rows,
)
from hire.lab.timing import decode_step
from hire.lab.timing.roofline import step_work
from hire.models import Decoder
from hire.timing import (
    in_sittings,
    interleaved,
    medians,
    read_form,
    speedup_range,
    speedups,
    stream_form,
)

# Bytes of the array that is read to measure the memory bandwidth.
# A smaller array lies in the caches of some processors.
MIN_STREAM_BYTES = 2**28
# Layers in which the parts of a step are timed alone; all layers are alike.
TIMED_LAYERS = 5
# What a user could take instead of HiRE, and HiRE with the exact rows of one of them.
BFLOAT16_ROWS, INT8_ROWS = "dense bfloat16 rows", "dense int8 rows"
HIRE_INT8_ROWS = "HiRE on int8 rows"
PARTS = {"softmax": decode_step.softmax, "ffn": decode_step.ffn, "attention": decode_step.attention}
# Seconds of each step or function, by name.
Durations = dict[str, list[float]]


def step_bytes(model: Decoder, batch: int, context: int) -> dict[str, float]:
    """Return the bytes that one decode step must read, by part.

    Args:
        model: Dense or searched model.
        batch: Number of texts.
        context: Context of each text, in tokens.
    """
    itemsize, softmax = model.embedding[...].dtype.itemsize, softmax_of(model)
    work = step_work(model.config, batch=batch, cache=context, itemsize=itemsize)
    part_bytes = {part: nbytes for part, (nbytes, _) in work.items()}
    if softmax is not None:
        part_bytes["softmax"] = float(softmax.bytes_read(batch))
    ffns = ffns_of(model)
    if ffns:
        part_bytes["ffn"] = float(sum(ffn.bytes_read(batch) for ffn in ffns))
    return part_bytes


def random_queries(width: int, count: int, seed: int) -> list[np.ndarray]:
    """Return random hidden states (1, width) to time with, always the same for one seed."""
    queries = np.random.default_rng(seed).normal(size=(count, 1, width))
    return list(queries.astype(np.float32))


def time_variants(
    variants: Mapping[int, Mapping[str, Decoder]],
    cache_length: int,
    k: int,
    repeats: int,
    sittings: int,
    *,
    keep_programs: bool = False,
    **functions: Callable,
) -> dict[int, Durations]:
    """Time a decode step of each variant at several batches, on a cache that is half full at first.

    The variants of one batch take turns; those of one float type write into one cache.

    Args:
        variants: Number of texts -> variants by name, DENSE among them.
        cache_length: Length of the key/value cache, in tokens.
        k: Number of top tokens.
        repeats: Number of timed steps of each variant.
        sittings: Number of sittings, over which the steps are split.
        keep_programs: Keep the compiled programs because the caller times some variants again.
        functions: Other functions to time next to the variants of the first batch.

    Returns:
        Number of texts -> seconds of each step by name.

    Raises:
        ValueError: If the cache is too short for all steps.
    """
    text_caches, comparisons = {}, {}
    for batch, models in variants.items():
        caches, steps = {}, {}
        for name, model in models.items():
            dtype = model.embedding[...].dtype
            step_forms = decode_step.StepForms(model, cache_length, k, text_caches.get(dtype))
            text_caches[dtype] = step_forms.text_cache
            if dtype not in caches:
                caches[dtype] = step_forms.batch_cache(batch)
            steps[name] = step_forms.complete_step(batch, caches[dtype])
        others = {} if comparisons else functions
        queries = random_queries(models[DENSE].config.width, repeats, seed=0)
        comparisons[batch] = steps | others, queries
    durations = in_sittings(comparisons, sittings)
    release_memory(programs=not keep_programs)
    return durations


def release_memory(programs: bool) -> None:
    """Return free memory to the system.

    Args:
        programs: Also drop compiled programs. The program of a decode step of one billion
            parameters takes half a gigabyte.
    """
    if programs:
        jax.clear_caches()
    # glibc keeps freed memory until malloc_trim; other C libraries lack the function.
    getattr(ctypes.CDLL(None), "malloc_trim", int)(0)


def speedup_text(durations: Durations, name: str, sittings: int) -> str:
    """Format the speed-up over dense with the range of the sittings, such as "1.41x (1.3 to 1.6)".

    Args:
        durations: Seconds by variant, equally many from each sitting.
        name: The variant.
        sittings: Number of sittings.
    """
    low, high = speedup_range(durations, name, DENSE, sittings)
    return f"{speedups(durations)[name]:.2f}x ({low:.2f} to {high:.2f})"


def points(
    variants: Mapping[str, Decoder],
    durations: Mapping[tuple[int, int], Durations],
    bandwidth: float,
) -> dict[str, dict[str, dict[str, float]]]:
    """Compare measured times with the memory-bound floor.

    Args:
        variants: Variants by name.
        durations: Seconds of each variant, by (batch, cache length).
        bandwidth: Memory bandwidth in bytes/s.

    Returns:
        A nested dict: "b<batch> cache<length>" -> variant -> `floor` (seconds that the bytes to
        read take at the bandwidth), `seconds` (median) and `time_over_floor`.
    """
    results = {}
    for (batch, cache_length), seconds_by_variant in durations.items():
        by_variant = {}
        for name, seconds in medians(seconds_by_variant).items():
            floor = sum(step_bytes(variants[name], batch, cache_length // 2).values()) / bandwidth
            by_variant[name] = dict(floor=floor, seconds=seconds, time_over_floor=seconds / floor)
        results[setting_name(batch, cache_length)] = by_variant
    return results


def setting_name(batch: int, cache_length: int) -> str:
    """Return the name of a setting in records and series, such as "b1 cache512"."""
    return f"b{batch} cache{cache_length}"


@dataclass(frozen=True)
class LargeRun:
    """What was measured on the variants of the large model with random weights.

    Attributes:
        name: Preset of the model.
        sizes: Sizes of the variants.
        variants: The variants DENSE and BOTH, to time further.
        durations: (batch, cache length) -> variant -> seconds of each step. The first setting is
            that of the claims.
        bandwidth: Memory bandwidth of this machine in bytes/s.
        points: From `points`.
        part_bytes: Bytes that a step of DENSE and of BOTH reads at batch 1, by part.
        sittings: Number of sittings, from each of which equally many durations are.
    """

    name: str
    sizes: VariantSizes
    variants: dict[str, Decoder]
    durations: dict[tuple[int, int], Durations]
    bandwidth: float
    points: dict[str, dict[str, dict[str, float]]]
    part_bytes: dict[str, dict[str, float]]
    sittings: int

    @property
    def weight_count(self) -> int:
        """Number of weights of the dense model."""
        return sum(self.variants[DENSE].config.parameters().values())

    @property
    def bytes_fraction(self) -> dict[str, float]:
        """Fractions of the softmax bytes and of the FFN bytes that HiRE still reads."""
        dense, searched = self.part_bytes[DENSE], self.part_bytes[BOTH]
        return {part: searched[part] / dense[part] for part in ("softmax", "ffn")}

    @property
    def dense_bytes(self) -> float:
        """Bytes that a dense step reads at batch 1."""
        return sum(self.part_bytes[DENSE].values())

    @property
    def searched_bytes(self) -> float:
        """Bytes that a step of the variant BOTH reads at batch 1."""
        return sum(self.part_bytes[BOTH].values())

    @property
    def speedups(self) -> dict[tuple[int, int], dict[str, float]]:
        """Speed-up over dense by (batch, cache length) and variant."""
        return {setting: speedups(durations) for setting, durations in self.durations.items()}

    def speedup_ranges(self) -> dict[tuple[int, int], dict[str, tuple[float, float]]]:
        """Return the lowest and the highest speed-up of the sittings, as in `speedups`."""
        return {
            setting: {
                name: speedup_range(durations, name, DENSE, self.sittings) for name in durations
            }
            for setting, durations in self.durations.items()
        }

    def table(self) -> pandas.DataFrame:
        """Return time, speed-up with its range and time over the floor, by setting and variant."""
        lines = []
        for (batch, cache_length), durations in self.durations.items():
            for name, point in self.points[setting_name(batch, cache_length)].items():
                line = {
                    "batch": batch,
                    "cache": cache_length,
                    "variant": name,
                    "ms, median": f"{1e3 * point['seconds']:.1f}",
                    "speed-up": speedup_text(durations, name, self.sittings),
                    "time over floor": f"{point['time_over_floor']:.2f}",
                }
                lines.append(line)
        return pandas.DataFrame(lines).set_index(["batch", "cache", "variant"])


def measure_large(settings: SimpleNamespace) -> LargeRun:
    """Build the large model with its variants, and time them at each batch and cache length.

    When the function returns, it releases all variants but DENSE and BOTH.

    Args:
        settings: Sizes of the notebook.

    Raises:
        MemoryError: If no preset fits in memory.
    """
    name, model = model_that_fits(settings.large_model)
    softmax_rank, softmax_bits = settings.large_softmax_factors
    sizes = VariantSizes(
        k=settings.k,
        candidates=settings.large_candidates,
        softmax_rank=softmax_rank,
        softmax_bits=softmax_bits,
        ffn_rank=settings.large_ffn_rank,
        shared_batch=settings.shared_batch,
    )
    variants = build_untrained(model, sizes)
    variants[FFN_ALONE] = hire.convert(variants[BOTH])
    variants[WIDER] = with_shares(variants[BOTH], *WIDER_SHARES)
    durations, bandwidth = time_large(variants, settings)
    pair = {name: variants[name] for name in (DENSE, BOTH)}
    context = settings.cache_length // 2
    return LargeRun(
        name=name,
        sizes=sizes,
        variants=pair,
        durations=durations,
        bandwidth=bandwidth,
        points=points(variants, durations, bandwidth),
        part_bytes={name: step_bytes(variant, 1, context) for name, variant in pair.items()},
        sittings=settings.sittings,
    )


def time_large(
    variants: Mapping[str, Decoder], settings: SimpleNamespace
) -> tuple[dict[tuple[int, int], Durations], float]:
    """Time the variants of the large model, and the memory bandwidth in turn with them.

    Args:
        variants: Variants by name.
        settings: Sizes of the notebook.

    Returns:
        A tuple: (batch, cache length) -> variant -> seconds of each step; the bandwidth in bytes/s.
    """
    sizes = settings.k, settings.repeats, settings.sittings
    # One text has nothing to share.
    single = {name: variant for name, variant in variants.items() if name != SHARED}
    batched = {name: variants[name] for name in (DENSE, BOTH, SHARED)}
    pair = {name: variants[name] for name in (DENSE, BOTH)}
    # A large model's own rows: another array of this size would count in the peak memory.
    rows = variants[DENSE].embedding[...]
    is_large = rows.nbytes >= MIN_STREAM_BYTES
    stream, stream_bytes = read_form(rows) if is_large else stream_form(MIN_STREAM_BYTES)
    compared = {batch: batched if batch > 1 else single for batch in settings.batches}
    by_batch = time_variants(compared, settings.cache_length, *sizes, stream=stream)
    bandwidth = float(stream_bytes / np.median(by_batch[settings.batches[0]].pop("stream")))
    durations = {(batch, settings.cache_length): timed for batch, timed in by_batch.items()}
    for long_length in settings.long_cache_lengths:
        durations[1, long_length] = time_variants({1: pair}, long_length, *sizes)[1]
    return durations, bandwidth


@dataclass(frozen=True)
class Alternatives:
    """Times of what a user could take instead of HiRE, each beside dense.

    Attributes:
        durations: Alternative -> (DENSE and the alternative) -> seconds of each step.
        sittings: Number of sittings, from each of which equally many durations are.
    """

    durations: dict[str, Durations]
    sittings: int

    @property
    def int8_speedup(self) -> float:
        """Speed-up of HiRE on int8 rows over dense int8 rows."""
        return self.speedups[HIRE_INT8_ROWS] / self.speedups[INT8_ROWS]

    @property
    def speedups(self) -> dict[str, float]:
        """Speed-up over dense by alternative."""
        return {name: speedups(durations)[name] for name, durations in self.durations.items()}

    def table(self) -> pandas.DataFrame:
        """Return the speed-up of each alternative with its range."""
        lines = {
            name: {"speed-up": speedup_text(durations, name, self.sittings)}
            for name, durations in self.durations.items()
        }
        return pandas.DataFrame.from_dict(lines, orient="index")


def time_alternatives(variants: Mapping[str, Decoder], settings: SimpleNamespace) -> Alternatives:
    """Time a step with rows of fewer bytes, dense and searched, beside the dense step.

    The two of int8 rows take turns.

    Args:
        variants: The variants DENSE and BOTH.
        settings: Sizes of the notebook.
    """
    dense, searched, k = variants[DENSE], variants[BOTH], settings.k
    sizes = settings.cache_length, k, settings.repeats, settings.sittings

    def time_beside_dense(**models: Decoder) -> Durations:
        return time_variants({1: {DENSE: dense, **models}}, *sizes, keep_programs=True)[1]

    in_bfloat16 = time_beside_dense(**{BFLOAT16_ROWS: with_small_rows(dense, k, to_bfloat16)})
    in_int8 = time_beside_dense(
        **{INT8_ROWS: with_small_rows(dense, k, to_int8), HIRE_INT8_ROWS: with_int8_rows(searched)}
    )
    durations = {BFLOAT16_ROWS: in_bfloat16} | {
        name: {DENSE: in_int8[DENSE], name: in_int8[name]} for name in (INT8_ROWS, HIRE_INT8_ROWS)
    }
    return Alternatives(durations, settings.sittings)


def part_shares(
    variants: Mapping[str, Decoder], settings: SimpleNamespace
) -> dict[str, dict[str, float]]:
    """Measure the shares of softmax, FFN and attention in the time and the bytes of a decode step.

    Each part is timed alone; the three time shares sum to 1. The byte shares are relative to all
    bytes that the step must read. FFN and attention are timed in TIMED_LAYERS of the layers.

    Args:
        variants: Variants by name.
        settings: Sizes of the notebook.

    Returns:
        A dict from "<variant>, time" and "<variant>, bytes" to the share of each part.
    """
    shares = {}
    width = next(iter(variants.values())).config.width
    queries = random_queries(width, settings.repeats, seed=1)
    for name, model in variants.items():
        shallow_model = nnx.merge(*nnx.split(model))
        shallow_model.blocks = shallow_model.blocks[:TIMED_LAYERS]
        layer_ratio = len(model.blocks) / len(shallow_model.blocks)
        step_forms = decode_step.StepForms(shallow_model, settings.cache_length, settings.k)
        functions = {part: step_forms.part(function) for part, function in PARTS.items()}
        seconds = medians(interleaved(functions, queries, settings.repeats))
        seconds = {
            part: median * (1 if part == "softmax" else layer_ratio)
            for part, median in seconds.items()
        }
        nbytes = step_bytes(model, 1, settings.cache_length // 2)
        shares[f"{name}, time"] = {
            part: median / sum(seconds.values()) for part, median in seconds.items()
        }
        shares[f"{name}, bytes"] = {part: nbytes[part] / sum(nbytes.values()) for part in PARTS}
    return shares

"""Lower bounds on a decode step: bytes over bandwidth, operations over peak rate."""

from collections.abc import Iterable
from dataclasses import dataclass

from hire.models.config import DecoderConfig


@dataclass(frozen=True)
class Chip:
    """Published or measured limits of a chip.

    Attributes:
        name: Name of the chip.
        bandwidth: Memory bandwidth in bytes/s.
        peak: Peak rate in floating-point operations/s.
        memory: Size of the memory in bytes.
    """

    name: str
    bandwidth: float
    peak: float
    memory: float


# Published by Google: 819 GB/s, 197 TFLOP/s in bfloat16, 16 GB of HBM.
V5E = Chip("TPU v5e", 819e9, 197e12, 16e9)


def step_work(
    config: DecoderConfig, *, batch: int, cache: int, itemsize: int
) -> dict[str, tuple[float, float]]:
    """Return the bytes and operations of one decode step.

    The weights are read once per batch; keys and values are read once per text. A weight costs two
    operations per token.

    Args:
        config: Configuration of the model.
        batch: Number of texts.
        cache: Context of each text in tokens.
        itemsize: Bytes of a weight and of a cache entry.

    Returns:
        (bytes, operations) by part: the parts of `config.parameters()` and "cache".
    """
    work = {
        part: (float(count * itemsize), 2.0 * batch * count)
        for part, count in config.parameters().items()
    }
    spans = [
        cache if config.is_global(layer) else min(cache, config.window)
        for layer in range(config.layers)
    ]
    kv_elements = batch * sum(spans) * config.head_width
    work["cache"] = (
        2.0 * kv_elements * config.kv_heads * itemsize,
        4.0 * kv_elements * config.heads,
    )
    return work


def step_seconds(
    config: DecoderConfig, batches: Iterable[int], chip: Chip, *, cache: int, itemsize: int
) -> list[float]:
    """Return the lower bound in seconds of a decode step at each batch size.

    A part takes its bytes over the bandwidth or its operations over the peak rate, whichever is
    longer. The parts add up.

    Args:
        config: Configuration of the model.
        batches: Batch sizes.
        chip: The chip.
        cache: Context of each text in tokens.
        itemsize: Bytes of a weight and of a cache entry.
    """
    steps = [step_work(config, batch=batch, cache=cache, itemsize=itemsize) for batch in batches]
    return [
        sum(max(nbytes / chip.bandwidth, work / chip.peak) for nbytes, work in step.values())
        for step in steps
    ]


def compute_bound_from(chip: Chip, *, itemsize: int) -> int:
    """Return the batch size from which arithmetic takes longer than reading the weights.

    It is the same for every model.
    """
    return -(-int(chip.peak * itemsize) // int(2 * chip.bandwidth))

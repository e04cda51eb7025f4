"""The least that a decode step can take: bytes over bandwidth, operations over peak rate."""

from collections.abc import Iterable
from dataclasses import dataclass

from hire.models.config import DecoderConfig


@dataclass(frozen=True)
class Chip:
    """Published or measured limits: memory bytes/s, floating-point operations/s, bytes of memory."""

    name: str
    bandwidth: float
    peak: float
    memory: float


# Published by Google: 819 GB/s, 197 TFLOP/s in bfloat16, 16 GB of HBM.
V5E = Chip("TPU v5e", 819e9, 197e12, 16e9)


def step_work(config: DecoderConfig, *, batch: int, cache: int, itemsize: int) -> dict[str, tuple[float, float]]:
    """(bytes, operations) by part of one decode step of a batch, each at a context of `cache` tokens.

    Weights are read once whatever the batch; keys and values once for each of it. A weight costs two operations a token.
    """
    work = {part: (float(count * itemsize), 2.0 * batch * count) for part, count in config.parameters().items()}
    spans = [cache if config.is_global(layer) else min(cache, config.window) for layer in range(config.layers)]
    held = batch * sum(spans) * config.head_width
    work["cache"] = (2.0 * held * config.kv_heads * itemsize, 4.0 * held * config.heads)
    return work


def step_seconds(config: DecoderConfig, batches: Iterable[int], chip: Chip, *, cache: int, itemsize: int) -> list[float]:
    """The bound at each batch: a part takes its bytes over the bandwidth or its operations over the peak, whichever is longer."""
    steps = [step_work(config, batch=batch, cache=cache, itemsize=itemsize) for batch in batches]
    return [sum(max(nbytes / chip.bandwidth, work / chip.peak) for nbytes, work in step.values()) for step in steps]


def compute_bound_from(chip: Chip, *, itemsize: int) -> int:
    """The batch from which on the weights' arithmetic takes longer than reading them, whatever the model."""
    return -(-int(chip.peak * itemsize) // int(2 * chip.bandwidth))

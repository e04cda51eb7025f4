"""Speed-ups that figure 08 compares its measurements with.

They are published ones, estimates of the v5e's compiler, and arithmetic on the bytes of a step.
"""

from collections.abc import Mapping

from hire.lab import records
from hire.lab.figure_index import load
from hire.lab.timing.roofline import step_work
from hire.models import DecoderConfig, preset

V5E_BATCHES = (1, 8)
V5E_VARIANTS = ("dense", "softmax", "FFN", "both", "both shared")
# Claims that publish the speed-up of the softmax, of the FFN and of both.
PUBLISHED = {"softmax": "softmax-speedup", "ffn": "ffn-speedup", "both": "end-to-end-speedup"}


def v5e_speedups() -> dict[int, dict[str, float]]:
    """Return the speed-ups of a paper_1b step on a v5e, as its compiler estimates them.

    The records of topic v5e contain the estimates. A variant without a record is left out.

    Returns:
        Batch size -> variant -> speed-up over dense.
    """
    seconds = {entry["id"]: entry["results"]["seconds"] for entry in records.read(topic="v5e")}
    speeds = {}
    for batch in V5E_BATCHES:
        by_variant = {
            name: seconds.get(f"step paper_1b, {name}, b {batch}") for name in V5E_VARIANTS
        }
        speeds[batch] = {
            name: by_variant["dense"] / estimate
            for name, estimate in by_variant.items()
            if estimate
        }
    return speeds


def byte_shares(config: DecoderConfig, context: int = 512) -> tuple[float, float]:
    """Return the shares of softmax and FFN in the bytes of a dense decode step of one text.

    Args:
        config: Shape of the model.
        context: Context of the text, in tokens.
    """
    work = step_work(config, batch=1, cache=context, itemsize=2)
    total = sum(nbytes for nbytes, _ in work.values())
    return work["softmax"][0] / total, work["ffn"][0] / total


def known_shapes() -> dict[str, DecoderConfig]:
    """Return the models on the map: our presets and those of figures/models.yaml."""
    shapes = {name: preset(name) for name in ("paper_1b", "gemma3_270m", "gemma3_1b")}
    for model in load("models")["models"]:
        sizes = {key: value for key, value in model.items() if key not in ("name", "source")}
        shapes[model["name"]] = DecoderConfig(**sizes, global_every=1)
    return shapes


def published_speedups() -> dict[str, float]:
    """Return the speed-ups that the paper reports for `softmax`, `ffn` and `both`."""
    published = {claim["id"]: claim["published"] for claim in load("claims")["claims"]}
    return {part: float(published[claim].rstrip("x")) for part, claim in PUBLISHED.items()}


def speedup_by_bytes(softmax, ffn, bytes_fraction: Mapping[str, float]):
    """Return the speed-up of a decode step by its bytes.

    Args:
        softmax: Share of the softmax in the bytes of the dense step, a number or an array.
        ffn: Share of the FFN in these bytes.
        bytes_fraction: Fractions of the `softmax` bytes and of the `ffn` bytes that HiRE reads.
    """
    saved_softmax = softmax * (1 - bytes_fraction["softmax"])
    saved_ffn = ffn * (1 - bytes_fraction["ffn"])
    return 1 / (1 - saved_softmax - saved_ffn)


def share_of_speedup(speedup: float, bytes_fraction: float) -> float:
    """Return the share of a step's bytes that a part must have for a speed-up.

    Args:
        speedup: Speed-up of the step when this part alone is searched.
        bytes_fraction: Fraction of the part's bytes that the search reads.
    """
    return (1 - 1 / speedup) / (1 - bytes_fraction)


def additive_speedup(softmax: float, ffn: float) -> float:
    """Return the speed-up of a step with both parts searched if the two savings of time add up.

    Args:
        softmax: Speed-up with the softmax searched.
        ffn: Speed-up with the FFNs searched.
    """
    return 1 / (1 / softmax + 1 / ffn - 1)

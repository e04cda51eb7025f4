"""Configurations of the decoder.

They are the published ones, a one-billion-parameter shape of our choice, and a small one for tests.
"""

import math
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from hire.ops.top_k import floor_fraction


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """Configuration of a decoder-only transformer with the architecture of Gemma 3.

    Input and output embeddings are tied.

    Attributes:
        vocabulary: Number of tokens in the vocabulary.
        width: Elements of a hidden state.
        layers: Number of layers.
        heads: Number of query heads, a multiple of `kv_heads`.
        kv_heads: Number of key/value heads.
        head_width: Elements per head, an even number.
        ffn_width: Number of neurons in an FFN. 0 omits the FFN.
        gated: True for a gated FFN: tanh GELU of one matrix product times another. False for the
            plain ReLU FFN, from which sparse training starts.
        group_size: Number of consecutive neurons in a group, a divisor of `ffn_width`.
        kept: Fraction of the groups that a sparse FFN keeps, at most. It keeps the groups with the
            best scores (see hire.group_scores). 1 means dense.
        sparse_layers: The layers with a sparse FFN. None means all layers.
        routed: True if a learned router scores the groups, as experts, in place of
            hire.group_scores.
        window: Number of last positions to which a local layer attends, in tokens.
        global_every: Every n-th layer is global: it attends to the whole context. The others are
            local.
        rope_base: Base of the rotary frequencies in global layers.
        local_rope_base: Base of the rotary frequencies in local layers.
        context: Longest text, in tokens.

    Raises:
        ValueError: When no model can have these sizes.
    """

    vocabulary: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    ffn_width: int
    gated: bool = True
    group_size: int = 1
    kept: float = 1.0
    sparse_layers: tuple[int, ...] | None = None
    routed: bool = False
    window: int = 512
    global_every: int = 6
    rope_base: float = 1e6
    local_rope_base: float = 1e4
    context: int = 32768

    def __post_init__(self):
        for field in fields(self):
            name, value = field.name, getattr(self, field.name)
            if field.type is int:
                minimum = 0 if name == "ffn_width" else 1
                if isinstance(value, bool) or not isinstance(value, int | np.integer):
                    raise ValueError(f"{name} = {value!r}: expected a whole number")
                if value < minimum:
                    raise ValueError(f"{name} = {value}: expected at least {minimum}")
                # NumPy integers become int: a configuration is hashed and saved as JSON.
                object.__setattr__(self, name, int(value))
            elif field.type is float and not 0 < value < math.inf:
                raise ValueError(f"{name} = {value}: expected a finite number above 0")
        if self.heads % self.kv_heads:
            raise ValueError(
                f"heads = {self.heads}: expected a multiple of kv_heads = {self.kv_heads}"
            )
        if self.head_width % 2:
            raise ValueError(
                f"head_width = {self.head_width}: expected an even number, which rotary positions "
                "need"
            )
        if self.ffn_width % self.group_size:
            raise ValueError(
                f"group_size = {self.group_size}: expected a divisor of ffn_width = "
                f"{self.ffn_width}"
            )
        if not 0 < self.kept <= 1 or (
            self.ffn_width and floor_fraction(self.kept, self.groups) < 1
        ):
            raise ValueError(
                f"kept = {self.kept}: expected a share, at most 1, that leaves one of "
                f"{self.groups} groups or more"
            )
        if self.sparse_layers is not None and not set(self.sparse_layers) <= set(
            range(self.layers)
        ):
            raise ValueError(
                f"sparse_layers = {self.sparse_layers}: expected layers from 0 to {self.layers - 1}"
            )

    def is_global(self, layer: int) -> bool:
        """Returns whether a layer attends to the whole context."""
        return (layer + 1) % self.global_every == 0

    @property
    def global_layers(self) -> list[int]:
        """The layers that attend to the whole context."""
        return [layer for layer in range(self.layers) if self.is_global(layer)]

    @property
    def groups(self) -> int:
        """Number of neuron groups in an FFN."""
        return self.ffn_width // self.group_size

    def groups_kept(self, layer: int) -> int:
        """Returns the number of groups that the FFN of a layer keeps: all groups if it is dense."""
        sparse = self.sparse_layers is None or layer in self.sparse_layers
        return floor_fraction(self.kept, self.groups) if sparse else self.groups

    def parameters(self) -> dict[str, int]:
        """Counts the weights of each part of the model.

        Returns:
            Number of weights by part. They sum to the number of the model. The embedding counts
            once, as the softmax to which it is tied.
        """
        d, e = self.width, self.head_width
        attention = 2 * d * e * (self.heads + self.kv_heads)
        ffn = (3 if self.gated else 2) * d * self.ffn_width + (
            d * self.groups if self.routed else 0
        )
        return {
            "softmax": self.vocabulary * d,
            "ffn": self.layers * ffn,
            "attention": self.layers * attention,
            "norms": self.layers * (4 * d + 2 * e) + d,
        }


# Our choice: small enough to train on two cores, with 256 groups of 8 neurons per layer.
SMALL = DecoderConfig(
    vocabulary=4096,
    width=256,
    layers=4,
    heads=4,
    kv_heads=4,
    head_width=64,
    ffn_width=2048,
    gated=False,
    window=256,
    global_every=2,
    context=512,
)

PRESETS = {
    # Published by Google. The sizes are those in the metadata of the weights.
    "gemma3_270m": DecoderConfig(
        vocabulary=262144, width=640, layers=18, heads=4, kv_heads=1, head_width=256, ffn_width=2048
    ),
    "gemma3_1b": DecoderConfig(
        vocabulary=262144,
        width=1152,
        layers=26,
        heads=4,
        kv_heads=1,
        head_width=256,
        ffn_width=6912,
    ),
    # Our choice. The paper states one billion parameters and no other size. Its softmax share
    # implies a vocabulary of 256K tokens (PAPER claim softmax-share). Training with top-k starts
    # from a plain FFN.
    "paper_1b": DecoderConfig(
        vocabulary=262144,
        width=1536,
        layers=25,
        heads=6,
        kv_heads=1,
        head_width=256,
        ffn_width=6144,
        gated=False,
    ),
    # Half of paper_1b: half as many layers of the same shape, and half the vocabulary.
    "paper_half": DecoderConfig(
        vocabulary=131072,
        width=1536,
        layers=12,
        heads=6,
        kv_heads=1,
        head_width=256,
        ffn_width=6144,
        gated=False,
    ),
    "small": SMALL,
    # A small model of the same architecture, for tests and the smoke profile.
    "tiny": replace(
        SMALL,
        vocabulary=512,
        width=64,
        layers=2,
        kv_heads=2,
        head_width=16,
        ffn_width=128,
        gated=True,
        window=16,
    ),
}


def preset(name: str, **changes: Any) -> DecoderConfig:
    """Returns a named configuration.

    Args:
        name: A key of `PRESETS`.
        **changes: Fields to replace, with their new values.

    Returns:
        The configuration.

    Raises:
        ValueError: When the name is unknown, with a list of the names, or when no model can have
            the changed sizes.
    """
    if name not in PRESETS:
        raise ValueError(f"preset {name!r}: expected one of {', '.join(PRESETS)}")
    return replace(PRESETS[name], **changes)

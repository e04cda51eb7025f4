"""Configurations of the decoder: published ones, the one-billion shape of our choice, and a toy for tests."""

import math
from dataclasses import dataclass, fields, replace

import numpy as np

from hire.topk import at_most


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """A decoder-only transformer in Gemma 3's form: sizes in elements, window and context in tokens.

    Every `global_every`-th layer attends to the whole context, the others to the last `window` positions. The FFN is
    gated (tanh GELU of one matrix times another) or, with gated=False, the plain ReLU one that sparse training
    starts from; ffn_width = 0 leaves it out. Input and output embeddings are tied.

    With kept < 1 an FFN keeps, of its groups of `group_size` consecutive neurons, at most that share, with the best scores (see
    hire.group_scores), in all layers or in `sparse_layers` alone. With routed=True a learned router scores the groups instead, as
    experts. Raises ValueError for sizes that no model has.
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
        for each in fields(self):
            name, value = each.name, getattr(self, each.name)
            if each.type is int:
                least = 0 if name == "ffn_width" else 1
                if isinstance(value, bool) or not isinstance(value, int | np.integer):
                    raise ValueError(f"{name} = {value!r}: expected a whole number")
                if value < least:
                    raise ValueError(f"{name} = {value}: expected at least {least}")
                object.__setattr__(self, name, int(value))  # of numpy's, too: a config is hashed and written as JSON
            elif each.type is float and not 0 < value < math.inf:
                raise ValueError(f"{name} = {value}: expected a finite number above 0")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads = {self.heads}: expected a multiple of kv_heads = {self.kv_heads}")
        if self.head_width % 2:
            raise ValueError(f"head_width = {self.head_width}: expected an even number, which rotary positions need")
        if self.ffn_width % self.group_size:
            raise ValueError(f"group_size = {self.group_size}: expected a divisor of ffn_width = {self.ffn_width}")
        if not 0 < self.kept <= 1 or (self.ffn_width and at_most(self.kept, self.groups) < 1):
            raise ValueError(f"kept = {self.kept}: expected a share, at most 1, that leaves one of {self.groups} groups or more")
        if self.sparse_layers is not None and not set(self.sparse_layers) <= set(range(self.layers)):
            raise ValueError(f"sparse_layers = {self.sparse_layers}: expected layers from 0 to {self.layers - 1}")

    def is_global(self, layer: int) -> bool:
        """Whether that layer attends to the whole context."""
        return (layer + 1) % self.global_every == 0

    @property
    def global_layers(self) -> list[int]:
        """The layers that attend to the whole context."""
        return [layer for layer in range(self.layers) if self.is_global(layer)]

    @property
    def groups(self) -> int:
        """Groups of neurons in an FFN."""
        return self.ffn_width // self.group_size

    def groups_kept(self, layer: int) -> int:
        """Groups that the FFN of that layer keeps: all of them where it is dense."""
        sparse = self.sparse_layers is None or layer in self.sparse_layers
        return at_most(self.kept, self.groups) if sparse else self.groups

    def parameters(self) -> dict[str, int]:
        """Number of weights by part; they add up to the model's. The embedding counts once, as the softmax that it is tied to."""
        d, e = self.width, self.head_width
        attention = 2 * d * e * (self.heads + self.kv_heads)
        ffn = (3 if self.gated else 2) * d * self.ffn_width + (d * self.groups if self.routed else 0)
        return {
            "softmax": self.vocabulary * d,
            "ffn": self.layers * ffn,
            "attention": self.layers * attention,
            "norms": self.layers * (4 * d + 2 * e) + d,
        }


# Our choice: small enough to be trained on two cores, with 256 groups of 8 neurons a layer.
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
    # Published by Google; sizes as in the weights' own metadata.
    "gemma3_270m": DecoderConfig(vocabulary=262144, width=640, layers=18, heads=4, kv_heads=1, head_width=256, ffn_width=2048),
    "gemma3_1b": DecoderConfig(vocabulary=262144, width=1152, layers=26, heads=4, kv_heads=1, head_width=256, ffn_width=6912),
    # Our choice. The paper says one billion parameters and no more; 256K words is the setting that its softmax share
    # implies (PAPER claim softmax-share), and a plain FFN is what training with top-k starts from.
    "paper_1b": DecoderConfig(
        vocabulary=262144, width=1536, layers=25, heads=6, kv_heads=1, head_width=256, ffn_width=6144, gated=False
    ),
    # Half of it: the same layers, half of them, under half of the words.
    "paper_half": DecoderConfig(
        vocabulary=131072, width=1536, layers=12, heads=6, kv_heads=1, head_width=256, ffn_width=6144, gated=False
    ),
    "small": SMALL,
    # A toy in the same form, for tests and the smoke profile.
    "tiny": replace(SMALL, vocabulary=512, width=64, layers=2, kv_heads=2, head_width=16, ffn_width=128, gated=True, window=16),
}


def preset(name: str, **changes) -> DecoderConfig:
    """The named configuration, with changes to its fields. Raises ValueError, listing the names, for one that does not exist."""
    if name not in PRESETS:
        raise ValueError(f"preset {name!r}: expected one of {', '.join(PRESETS)}")
    return replace(PRESETS[name], **changes)

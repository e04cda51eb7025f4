"""Configurations of the decoder: published ones, the one-billion shape of our choice, and a toy for tests."""

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """A decoder-only transformer in Gemma 3's form: sizes in elements, window and context in tokens.

    Every `global_every`-th layer attends to the whole context, the others to the last `window` positions. The FFN is
    gated (tanh GELU of one matrix times another) or, with gated=False, the plain ReLU one that sparse training
    starts from. Input and output embeddings are tied. Raises ValueError for sizes that no model has.
    """

    vocabulary: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    ffn_width: int
    gated: bool = True
    window: int = 512
    global_every: int = 6
    rope_base: float = 1e6
    local_rope_base: float = 1e4
    context: int = 32768

    def __post_init__(self):
        sizes = {name: getattr(self, name) for name in self.__slots__ if isinstance(getattr(self, name), int)}
        for name, value in sizes.items():
            if name != "gated" and value < 1:
                raise ValueError(f"{name} = {value}: expected at least 1")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads = {self.heads}: expected a multiple of kv_heads = {self.kv_heads}")
        if self.head_width % 2:
            raise ValueError(f"head_width = {self.head_width}: expected an even number, which rotary positions need")

    def is_global(self, layer: int) -> bool:
        """Whether that layer attends to the whole context."""
        return (layer + 1) % self.global_every == 0

    def parameters(self) -> dict[str, int]:
        """Number of weights by part; they add up to the model's. The embedding counts once, as the softmax that it is tied to."""
        d, e = self.width, self.head_width
        attention = 2 * d * e * (self.heads + self.kv_heads)
        ffn = (3 if self.gated else 2) * d * self.ffn_width
        return {
            "softmax": self.vocabulary * d,
            "ffn": self.layers * ffn,
            "attention": self.layers * attention,
            "norms": self.layers * (4 * d + 2 * e) + d,
        }


PRESETS = {
    # Published by Google; sizes as in the weights' own metadata.
    "gemma3_270m": DecoderConfig(vocabulary=262144, width=640, layers=18, heads=4, kv_heads=1, head_width=256, ffn_width=2048),
    "gemma3_1b": DecoderConfig(vocabulary=262144, width=1152, layers=26, heads=4, kv_heads=1, head_width=256, ffn_width=6912),
    # Our choice. The paper says one billion parameters and no more; 256K words is the setting that its softmax share
    # implies (PAPER claim softmax-share), and a plain FFN is what training with top-k starts from.
    "paper_1b": DecoderConfig(
        vocabulary=262144, width=1536, layers=25, heads=6, kv_heads=1, head_width=256, ffn_width=6144, gated=False
    ),
    # A toy in the same form, for tests and the smoke profile.
    "tiny": DecoderConfig(
        vocabulary=512, width=64, layers=6, heads=4, kv_heads=2, head_width=16, ffn_width=128, window=16, context=512
    ),
}


def preset(name: str, **changes) -> DecoderConfig:
    """The named configuration, with changes to its fields. Raises ValueError, listing the names, for one that does not exist."""
    if name not in PRESETS:
        raise ValueError(f"preset {name!r}: expected one of {', '.join(PRESETS)}")
    return replace(PRESETS[name], **changes)

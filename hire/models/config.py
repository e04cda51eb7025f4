"""Configurations of the decoder.

They are the published ones, a one-billion-parameter shape of our choice, and a small one for tests.
hire.models.families derives a configuration from the metadata of a file.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from hire.ops.activations import GATED_ACTIVATIONS, check_activation
from hire.ops.top_k import floor_fraction


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """Configuration of a decoder-only transformer.

    It covers Gemma 2 and 3, Llama 2 and 3, Qwen 2.5 and 3, and models of their form. The defaults
    are those of Gemma 3.

    Attributes:
        vocabulary: Number of tokens in the vocabulary.
        width: Elements of a hidden state.
        layers: Number of layers.
        heads: Number of query heads, a multiple of `kv_heads`.
        kv_heads: Number of key/value heads.
        head_width: Elements per head, an even number.
        ffn_width: Number of neurons in an FFN. 0 omits the FFN.
        gated: True for a gated FFN: the activation of one matrix product times another. False for
            the plain FFN, from which sparse training starts.
        activation: "gelu_tanh" or "silu" with a gate, "relu" without. None means "gelu_tanh" or
            "relu".
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
        rope_factors: Divisors of the rotary frequencies in global layers, `head_width / 2` of them,
            from the highest frequency to the lowest. Empty means that none is scaled.
        tied: Whether the embedding is the LM head too.
        scaled_embedding: Whether embeddings are multiplied by the square root of `width`.
        post_norms: Whether norms follow the attention and the FFN, besides the norms before them.
        qk_norm: Whether the vectors of queries and keys are normalized.
        qkv_bias: Whether biases are added to queries, keys and values.
        norm_epsilon: Number that norms add to the mean square.
        attention_scale: Factor of the attention scores. None means `head_width ** -0.5`.
        attention_soft_cap: Attention scores s become `cap * tanh(s / cap)`. 0 means none.
        logit_soft_cap: Logits become `cap * tanh(logit / cap)`. 0 means none.

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
    activation: str | None = None
    rope_factors: tuple[float, ...] = ()
    tied: bool = True
    scaled_embedding: bool = True
    post_norms: bool = True
    qk_norm: bool = True
    qkv_bias: bool = False
    norm_epsilon: float = 1e-6
    attention_scale: float | None = None
    attention_soft_cap: float = 0.0
    logit_soft_cap: float = 0.0

    @classmethod
    def from_json(cls, metadata: Mapping[str, Any]) -> "DecoderConfig":
        """Returns the configuration whose fields were saved as JSON, which has no tuples.

        Raises:
            TypeError: When a field is unknown or missing.
            ValueError: When no model can have these sizes.
        """
        fields: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in metadata.items()
        }
        return cls(**fields)

    def __post_init__(self):
        self._check_numbers()
        self._check_shapes()
        if self.activation is not None:
            check_activation(self.activation, self.gated)
        self._check_rope_factors()
        if self.attention_scale is not None and not 0 < self.attention_scale < math.inf:
            raise ValueError(
                f"attention_scale = {self.attention_scale}: expected a finite number above 0"
            )

    def _check_numbers(self) -> None:
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
            elif name.endswith("soft_cap"):
                if not 0 <= value < math.inf:
                    raise ValueError(f"{name} = {value}: expected a finite number, 0 for none")
            elif field.type is float and not 0 < value < math.inf:
                raise ValueError(f"{name} = {value}: expected a finite number above 0")

    def _check_shapes(self) -> None:
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

    def _check_rope_factors(self) -> None:
        if len(self.rope_factors) not in (0, self.head_width // 2):
            raise ValueError(
                f"{len(self.rope_factors)} rope_factors: expected {self.head_width // 2}, one a "
                "rotary frequency"
            )
        if not all(0 < factor < math.inf for factor in self.rope_factors):
            raise ValueError(f"rope_factors = {self.rope_factors}: expected finite numbers above 0")

    @property
    def ffn_activation(self) -> str:
        """The activation of an FFN, see `activation`."""
        if self.activation is not None:
            return self.activation
        return GATED_ACTIVATIONS[0] if self.gated else "relu"

    @property
    def score_scale(self) -> float:
        """The factor of the attention scores, see `attention_scale`."""
        return self.head_width**-0.5 if self.attention_scale is None else self.attention_scale

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
            Number of weights by part. They sum to the number of the model. An embedding that is
            tied counts once, as the softmax.
        """
        d, e = self.width, self.head_width
        heads = self.heads + 2 * self.kv_heads
        attention = 2 * d * e * (self.heads + self.kv_heads) + (heads * e if self.qkv_bias else 0)
        ffn = (3 if self.gated else 2) * d * self.ffn_width + (
            d * self.groups if self.routed else 0
        )
        norms = (4 if self.post_norms else 2) * d + (2 * e if self.qk_norm else 0)
        return {
            "softmax": self.vocabulary * d,
            **({} if self.tied else {"embedding": self.vocabulary * d}),
            "ffn": self.layers * ffn,
            "attention": self.layers * attention,
            "norms": self.layers * norms + d,
        }


# What Llama and Qwen share, in contrast to Gemma 3. Every layer attends to the whole context.
LLAMA: dict[str, Any] = dict(
    activation="silu", global_every=1, scaled_embedding=False, post_norms=False, qk_norm=False
)


def llama3_rope_factors(
    head_width: int,
    base: float,
    *,
    factor: float | int,
    low_freq_factor: float | int,
    high_freq_factor: float | int,
    original_context: int,
) -> tuple[float, ...]:
    """Returns the divisors of rotary frequencies by the rule of Llama 3.1 (Meta, July 2024).

    A frequency whose wavelength is longer than `original_context / low_freq_factor` is divided by
    `factor`. One that is shorter than `original_context / high_freq_factor` stays. Between them
    the frequency is interpolated, linearly in `original_context / wavelength`.

    Args:
        head_width: Elements per head.
        base: Base of the rotary frequencies.
        factor: The largest divisor.
        low_freq_factor: See above.
        high_freq_factor: See above; more than `low_freq_factor`.
        original_context: Longest text before the frequencies were scaled, in tokens.
    """
    frequencies = base ** (-np.arange(head_width // 2) * 2 / head_width)
    periods = original_context * frequencies / (2 * math.pi)
    kept = np.clip((periods - low_freq_factor) / (high_freq_factor - low_freq_factor), 0, 1)
    return tuple((1 / (kept + (1 - kept) / factor)).tolist())


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
    # Published by Hugging Face, Meta and Alibaba. The sizes are those of their config.json.
    "smollm2_135m": DecoderConfig(
        vocabulary=49152,
        width=576,
        layers=30,
        heads=9,
        kv_heads=3,
        head_width=64,
        ffn_width=1536,
        rope_base=1e5,
        context=8192,
        norm_epsilon=1e-5,
        **LLAMA,
    ),
    "llama3.2_1b": DecoderConfig(
        vocabulary=128256,
        width=2048,
        layers=16,
        heads=32,
        kv_heads=8,
        head_width=64,
        ffn_width=8192,
        rope_base=5e5,
        rope_factors=llama3_rope_factors(
            64, 5e5, factor=32, low_freq_factor=1, high_freq_factor=4, original_context=8192
        ),
        context=131072,
        norm_epsilon=1e-5,
        **LLAMA,
    ),
    "qwen2.5_0.5b": DecoderConfig(
        vocabulary=151936,
        width=896,
        layers=24,
        heads=14,
        kv_heads=2,
        head_width=64,
        ffn_width=4864,
        rope_base=1e6,
        qkv_bias=True,
        **LLAMA,
    ),
    "qwen2.5_1.5b": DecoderConfig(
        vocabulary=151936,
        width=1536,
        layers=28,
        heads=12,
        kv_heads=2,
        head_width=128,
        ffn_width=8960,
        rope_base=1e6,
        context=131072,
        qkv_bias=True,
        **LLAMA,
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

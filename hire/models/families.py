"""Model families: the configuration that the metadata of a file states.

Every value in a file is honoured or refused by name. The names and the meaning of GGUF keys are
those of llama.cpp, and the names and defaults of fields in a config.json those of transformers.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hire.models.config import LLAMA, DecoderConfig, llama3_rope_factors

# What the families share and in which they differ, by the architecture that a GGUF states.
GEMMA2 = dict(global_every=2, qk_norm=False)
FAMILIES: dict[str, dict[str, Any]] = {
    "gemma2": GEMMA2,
    "gemma3": {},
    "llama": LLAMA,
    "qwen2": LLAMA | dict(qkv_bias=True),
    "qwen3": LLAMA | dict(qk_norm=True),
}
GEMMAS = ("gemma2", "gemma3")
# The largest models of these families scale attention scores by the width over the heads. A GGUF
# does not say so; llama.cpp tells them by their number of layers.
LAYERS_OF_27B = {"gemma2": 46, "gemma3": 62}

# The family of each `model_type` of a config.json.
FAMILY_OF_MODEL_TYPE = {
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "gemma3": "gemma3",
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
}

# What transformers assumes where a config.json states nothing. Sizes of a model have to be stated.
GEMMA_FIELDS = dict(
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=256,
    tie_word_embeddings=True,
    hidden_activation="gelu_pytorch_tanh",
    query_pre_attn_scalar=256,
    sliding_window=4096,
    eos_token_id=1,
)
DEFAULT_FIELDS: dict[str, dict[str, Any]] = {
    "gemma2": GEMMA_FIELDS
    | dict(
        max_position_embeddings=8192,
        final_logit_softcapping=30.0,
        attn_logit_softcapping=50.0,
        sliding_window_pattern=2,
    ),
    "gemma3": GEMMA_FIELDS
    | dict(
        max_position_embeddings=131072,
        rope_theta=1e6,
        rope_local_base_freq=1e4,
        sliding_window_pattern=6,
    ),
    "llama": dict(max_position_embeddings=2048, eos_token_id=2),
    "qwen2": dict(max_position_embeddings=32768),
    "qwen3": dict(max_position_embeddings=32768, head_dim=128),
}
ACTIVATION_NAMES = {"gelu_pytorch_tanh": "gelu_tanh", "silu": "silu"}


class Metadata:
    """Metadata of a file, each value of which is taken once, or expected to be a given one.

    Attributes:
        path: Path of the file, for error messages.
        values: The values by key.
        defaults: What a key means that the file does not state.
        used: Keys that were taken or expected.
    """

    def __init__(
        self, path: Path, values: Mapping[str, Any], defaults: Mapping[str, Any] | None = None
    ):
        self.path, self.values, self.defaults = path, values, defaults or {}
        self.used: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        """Returns a value, or what the file means if it states none."""
        self.used.add(key)
        value = self.values.get(key)
        return self.defaults.get(key, default) if value is None else value

    def number(self, key: str, default: float | int | None = None) -> float:
        """Returns a finite number of at least 0.

        Raises:
            ValueError: When the value is none, or is missing and has no default.
        """
        value = self.get(key, default)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not 0 <= value < math.inf:
            raise self.refused(key, value, "a number of at least 0")
        return float(value)

    def integer(self, key: str, default: int | None = None) -> int:
        """Returns a whole number of at least 1.

        Raises:
            ValueError: When the value is none, or is missing and has no default.
        """
        value = self.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.refused(key, value, "a whole number of at least 1")
        return value

    def expect(self, expected: Mapping[str, Any]) -> None:
        """Checks that values, where the file states them, are the only ones that are supported.

        Raises:
            ValueError: When one is another. The message names the key and the value.
        """
        for key, value in expected.items():
            self.used.add(key)
            stated = self.values.get(key)
            if stated is not None and not same(stated, value):
                raise self.refused(key, stated, f"{value!r}, all that is supported")

    def refused(self, key: str, value: Any, expected: str) -> ValueError:
        """Returns the error for a value that cannot be honoured."""
        stated = "is missing" if value is None else f"= {value!r}"
        return ValueError(f"{self.path}: {key} {stated}: expected {expected}")

    def refuse_others(self) -> None:
        """Checks that every key was taken or expected.

        Raises:
            ValueError: When one was not. The message names it.
        """
        for key in self.values.keys() - self.used:
            raise self.refused(key, self.values[key], "a file without it; it is not supported")


def same(value: Any, expected: Any) -> bool:
    """Returns whether two values are equal; numbers may differ by the rounding of float32."""
    if isinstance(value, int | float) and isinstance(expected, int | float):
        return math.isclose(value, expected, rel_tol=1e-6)
    return type(value) is type(expected) and value == expected


def family_of(path: Path, architecture: Any, families: Mapping[str, str]) -> str:
    """Returns the family of an architecture.

    Args:
        path: Path of the file, for the error message.
        architecture: The architecture that the file states.
        families: The families by architecture.

    Raises:
        ValueError: When the architecture is not supported. The message names it.
    """
    if not isinstance(architecture, str) or architecture not in families:
        raise ValueError(
            f"{path}: architecture {architecture!r} is not supported so far; expected one of "
            f"{', '.join(families)}"
        )
    return families[architecture]


def gguf_config(
    path: Path,
    values: Mapping[str, Any],
    *,
    vocabulary: int,
    tied: bool,
    rope_factors: Sequence[float] = (),
) -> DecoderConfig:
    """Returns the configuration that the metadata of a GGUF states.

    Args:
        path: Path of the GGUF, for error messages.
        values: The metadata, by key.
        vocabulary: Number of rows of the embedding.
        tied: Whether the embedding is the LM head too.
        rope_factors: Divisors of the rotary frequencies, from the tensor `rope_freqs.weight`.

    Returns:
        The configuration.

    Raises:
        ValueError: When the architecture is not supported, or a value is missing, contradictory, or
            one that the decoder does not honour. The message names the key and the value.
    """
    family = family_of(path, values.get("general.architecture"), {name: name for name in FAMILIES})
    prefix = f"{family}."
    stated = {key: value for key, value in values.items() if key.startswith(prefix)}
    metadata = Metadata(path, {key.removeprefix(prefix): stated[key] for key in stated})
    width, layers = metadata.integer("embedding_length"), metadata.integer("block_count")
    heads = metadata.integer("attention.head_count")
    head_width = metadata.integer("attention.key_length", width // heads)
    sizes = dict(
        vocabulary=vocabulary,
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=metadata.integer("attention.head_count_kv", heads),
        head_width=head_width,
        ffn_width=metadata.integer("feed_forward_length"),
        context=metadata.integer("context_length"),
        norm_epsilon=metadata.number("attention.layer_norm_rms_epsilon"),
        rope_base=metadata.number("rope.freq_base", None if family == "gemma3" else 1e4),
    )
    is_27b = layers == LAYERS_OF_27B.get(family)
    default_scale = (width / heads if is_27b else head_width) ** -0.5
    scale = metadata.number("attention.scale", default_scale)
    settings = FAMILIES[family] | sizes
    settings |= dict(
        tied=tied,
        attention_scale=None if same(scale, head_width**-0.5) else scale,
        attention_soft_cap=first_number(
            metadata, ("attn_logit_softcapping", "attention.logit_softcapping")
        ),
        logit_soft_cap=metadata.number("final_logit_softcapping", 0),
        rope_factors=gguf_rope_factors(metadata, head_width, rope_factors),
    )
    if family in GEMMAS:
        settings |= gguf_windows(metadata, family, layers)
        if family == "gemma2":  # all layers have one base, and no scaling
            settings["local_rope_base"] = settings["rope_base"]
            metadata.expect({"rope.scaling.factor": 1, "rope.scale_linear": 1})
    else:
        metadata.expect({"attention.sliding_window": settings["context"]})
    metadata.expect(
        {
            "vocab_size": vocabulary,
            "attention.value_length": head_width,
            "attention.causal": True,
            "rope.dimension_count": head_width,
            "rope.dimension_count_swa": head_width,
            "attention.key_length_swa": head_width,
            "attention.value_length_swa": head_width,
            "expert_count": 0,
            "expert_used_count": 0,
            "use_parallel_residual": False,
        }
    )
    metadata.refuse_others()
    return configured(path, settings)


def first_number(metadata: Metadata, keys: Sequence[str]) -> float:
    """Returns the number of the first key that the file states, or 0."""
    numbers = [metadata.number(key, 0) for key in keys]
    return next(filter(None, numbers), 0.0)


def gguf_rope_factors(
    metadata: Metadata, head_width: int, tensor: Sequence[float]
) -> tuple[float, ...]:
    """Returns the divisors of the rotary frequencies: those of the tensor, or the linear one."""
    scaling = metadata.get("rope.scaling.type", "none")
    if scaling not in ("none", "linear"):
        raise metadata.refused("rope.scaling.type", scaling, "none or linear")
    keys = ("rope.scaling.factor", "rope.scale_linear")
    factor = first_number(metadata, keys) or 1.0
    # These only describe how the model was trained.
    for key in ("rope.scaling.original_context_length", "rope.scaling.finetuned"):
        metadata.get(key)
    if tensor:
        if factor != 1:
            raise metadata.refused(keys[0], factor, "1 beside the tensor rope_freqs.weight")
        return tuple(tensor)
    return () if factor == 1 else (factor,) * (head_width // 2)


def gguf_windows(metadata: Metadata, family: str, layers: int) -> dict[str, Any]:
    """Returns the settings of local and global layers of a Gemma."""
    period = FAMILIES[family].get("global_every", 6)
    pattern = metadata.get("attention.sliding_window_pattern", period)
    if isinstance(pattern, list):  # one value per layer: True for a local layer
        period = period_of([bool(part) for part in pattern], layers) or 0
    elif isinstance(pattern, int):
        period = int(pattern)
    if period < 1:
        raise metadata.refused(
            "attention.sliding_window_pattern", pattern, "every n-th layer to be global"
        )
    return dict(
        global_every=period,
        window=metadata.integer("attention.sliding_window"),
        local_rope_base=metadata.number("rope.freq_base_swa", 1e4),
    )


def period_of(is_local: Sequence[bool], layers: int) -> int | None:
    """Returns n if every n-th layer, and no other, is global; None if there is no such n."""
    if len(is_local) != layers:
        return None
    period = is_local.index(False) + 1 if False in is_local else layers + 1
    expected = [(layer + 1) % period != 0 for layer in range(layers)]
    return period if list(is_local) == expected else None


def folder_config(path: Path, fields: Mapping[str, Any]) -> tuple[str, DecoderConfig]:
    """Returns the configuration that a config.json states.

    Args:
        path: Path of the config.json, for error messages.
        fields: Its fields.

    Returns:
        The family and the configuration.

    Raises:
        ValueError: When the architecture is not supported, or a field is missing, contradictory, or
            one that the decoder does not honour. The message names the field and the value.
    """
    family = family_of(path, fields.get("model_type"), FAMILY_OF_MODEL_TYPE)
    metadata = Metadata(path, fields, DEFAULT_FIELDS[family])
    is_gemma = family in GEMMAS
    width, heads = metadata.integer("hidden_size"), metadata.integer("num_attention_heads")
    head_width = metadata.integer("head_dim", width // heads)
    layers = metadata.integer("num_hidden_layers")
    settings = FAMILIES[family] | dict(
        vocabulary=metadata.integer("vocab_size"),
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=metadata.integer("num_key_value_heads", heads),
        head_width=head_width,
        ffn_width=metadata.integer("intermediate_size"),
        context=metadata.integer("max_position_embeddings"),
        norm_epsilon=metadata.number("rms_norm_eps", 1e-6),
        tied=bool(metadata.get("tie_word_embeddings", False)),
        activation=folder_activation(metadata, is_gemma),
    )
    settings |= folder_ropes(metadata, family, head_width)
    if is_gemma:
        scale = metadata.integer("query_pre_attn_scalar") ** -0.5
        settings |= dict(
            attention_scale=None if same(scale, head_width**-0.5) else scale,
            attention_soft_cap=metadata.number("attn_logit_softcapping", 0),
            logit_soft_cap=metadata.number("final_logit_softcapping", 0),
            window=metadata.integer("sliding_window"),
            global_every=folder_global_every(metadata, layers),
        )
    else:
        metadata.expect({"layer_types": ["full_attention"] * layers, "use_sliding_window": False})
        metadata.expect({"attn_logit_softcapping": 0, "final_logit_softcapping": 0})
    metadata.expect(
        {
            "attention_bias": family == "qwen2",
            "mlp_bias": False,
            "use_bidirectional_attention": False,
            "partial_rotary_factor": 1.0,
            "pretraining_tp": 1,
            "quantization_config": {},
        }
    )
    return family, configured(path, settings)


def folder_end_tokens(
    family: str, generation: Metadata, config: Metadata, vocabulary: int
) -> tuple[int, ...]:
    """Returns the tokens any of which ends a text, () if the files of a folder state none.

    As in transformers, what a generation_config.json states comes before a config.json.

    Args:
        family: The family of the model.
        generation: The fields of the generation_config.json, none if there is no such file.
        config: The fields of the config.json.
        vocabulary: Number of tokens in the vocabulary.

    Raises:
        ValueError: When a value is neither a token nor a list of tokens. The message names the file
            and the value.
    """
    key = "eos_token_id"
    metadata = config if generation.get(key) is None else generation
    stated = metadata.get(key, DEFAULT_FIELDS[family].get(key, []))
    tokens = stated if isinstance(stated, list) else [stated]
    for token in tokens:
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocabulary:
            raise metadata.refused(key, stated, f"tokens from 0 to {vocabulary - 1}")
    return tuple(dict.fromkeys(tokens))


def folder_activation(metadata: Metadata, is_gemma: bool) -> str | None:
    """Returns the activation that a config.json states. None is the one of Gemma.

    Files of Gemma may state an older `hidden_act` too, which transformers does not read.
    """
    key = "hidden_activation" if is_gemma else "hidden_act"
    name = metadata.get(key, "silu")
    if name not in ACTIVATION_NAMES:
        raise metadata.refused(key, name, " or ".join(ACTIVATION_NAMES))
    return None if ACTIVATION_NAMES[name] == "gelu_tanh" else ACTIVATION_NAMES[name]


def folder_global_every(metadata: Metadata, layers: int) -> int:
    """Returns n where every n-th layer is global."""
    types = metadata.get("layer_types")
    if types is not None:
        names = {"sliding_attention": True, "full_attention": False}
        known = isinstance(types, list) and all(name in names for name in types)
        period = period_of([names[name] for name in types], layers) if known else None
        if period is None:
            raise metadata.refused("layer_types", types, "every n-th layer to be full_attention")
        return period
    old_key = "_sliding_window_pattern"
    key = old_key if metadata.get(old_key) is not None else "sliding_window_pattern"
    return metadata.integer(key)


def folder_ropes(metadata: Metadata, family: str, head_width: int) -> dict[str, Any]:
    """Returns the settings of rotary positions that a config.json states.

    Older files state `rope_theta` and `rope_scaling`. Newer ones state `rope_parameters`, for all
    layers or by type of layer.
    """
    ropes = rope_dictionary(metadata, "rope_parameters")
    by_type = {name: value for name, value in ropes.items() if isinstance(value, dict)}
    rope = by_type.get("full_attention", {}) if by_type else ropes
    rope = rope_dictionary(metadata, "rope_scaling") | rope
    base = Metadata(metadata.path, rope).number("rope_theta", metadata.number("rope_theta", 1e4))
    result: dict[str, Any] = dict(
        rope_base=base, rope_factors=folder_rope_factors(metadata, rope, head_width, base)
    )
    if family in GEMMAS:
        local = by_type.get("sliding_attention", {})
        local_type = local.get("rope_type", "default")
        if local_type != "default":
            raise metadata.refused(
                "rope_parameters.sliding_attention.rope_type", local_type, "default"
            )
        default = metadata.number("rope_local_base_freq", base)
        result["local_rope_base"] = Metadata(metadata.path, local).number("rope_theta", default)
    return result


def rope_dictionary(metadata: Metadata, key: str) -> dict[str, Any]:
    """Returns the settings of rotary positions under a key, {} if there are none."""
    value = metadata.get(key, {})
    if not isinstance(value, dict):
        raise metadata.refused(key, value, "an object or null")
    return value


def folder_rope_factors(
    metadata: Metadata, rope: Mapping[str, Any], head_width: int, base: float
) -> tuple[float, ...]:
    """Returns the divisors of the rotary frequencies that a config.json states."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    scaling = Metadata(metadata.path, rope)
    if kind in (None, "default"):
        return ()
    if kind == "linear":
        return (scaling.number("factor"),) * (head_width // 2)
    if kind == "llama3":
        return llama3_rope_factors(
            head_width,
            base,
            factor=scaling.number("factor"),
            low_freq_factor=scaling.number("low_freq_factor"),
            high_freq_factor=scaling.number("high_freq_factor"),
            original_context=scaling.integer("original_max_position_embeddings"),
        )
    raise metadata.refused("rope_type", kind, "default, linear or llama3")


def configured(path: Path, settings: Mapping[str, Any]) -> DecoderConfig:
    """Returns a configuration.

    Raises:
        ValueError: When no model can have these settings. The message names the file.
    """
    try:
        return DecoderConfig(**settings)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; its metadata contradicts itself") from None

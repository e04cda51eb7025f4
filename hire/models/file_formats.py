"""Checks of the metadata in weight files, before the loader trusts it.

The header of a GGUF is checked against the size of the file. The metadata of GGUF and Hugging Face
files is checked against the configuration into which they are loaded.
"""

import json
import math
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from hire.models.config import DecoderConfig

ARCHITECTURE = "gemma3"
NORM_EPSILON = 1e-6  # as in hire.models.modules.RMSNorm
MAX_ENTRIES = 2**16  # keys or tensors in a file; Gemma 3 27B has about 800 tensors
MAX_VALUES = 2**22  # in all arrays of a header; a vocabulary of 262,144 tokens needs 786,432
MAX_KEY_BYTES = 2**16
MAX_NESTING = 4
MAX_CONFIG_BYTES = 2**20
STRING, ARRAY = 8, 9
# by GGUF's number of a type
SCALAR_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


class HeaderReader:
    """Reads numbers and strings of a file in order.

    A read beyond the end of the file raises ValueError.

    Attributes:
        file: The open file.
        size: Size of the file, in bytes.
    """

    def __init__(self, file: BinaryIO, size: int):
        self.file, self.size = file, size

    @property
    def remaining(self) -> int:
        """Number of bytes from the current position to the end of the file."""
        return self.size - self.file.tell()

    def take(self, nbytes: int) -> bytes:
        """Reads `nbytes` bytes."""
        if nbytes > self.remaining:
            raise ValueError(
                f"{nbytes} bytes stated at byte {self.file.tell()}, where {self.remaining} are left"
            )
        return self.file.read(nbytes)

    def number(self, form: str) -> int:
        """Reads one number in a format of the struct module."""
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def count(self, form: str, item_bytes: int, most: int) -> int:
        """Reads a number of items that must fit into the rest of the file.

        Args:
            form: Format of the number, as in the struct module.
            item_bytes: Smallest size of an item, in bytes.
            most: Largest number allowed.

        Returns:
            The number of items.

        Raises:
            ValueError: When the number exceeds `most`, or the items do not fit into the rest of the
                file.
        """
        count = self.number(form)
        if count > most or count * item_bytes > self.remaining:
            raise ValueError(
                f"a count of {count} at byte {self.file.tell()}, where {self.remaining} bytes "
                "are left"
            )
        return count

    def skip(self, nbytes: int) -> None:
        """Skips `nbytes` bytes."""
        if nbytes > self.remaining:
            raise ValueError(
                f"{nbytes} bytes stated at byte {self.file.tell()}, where {self.remaining} are left"
            )
        self.file.seek(nbytes, 1)

    def key(self) -> str:
        """Reads a key: its length in bytes, then its text."""
        return self.take(self.count("<Q", 1, MAX_KEY_BYTES)).decode()

    def skip_value(self, kind: int, values: int, depth: int = 0) -> int:
        """Skips one value.

        Args:
            kind: Type of the value, as a number of GGUF.
            values: Number of array values read before.
            depth: Number of arrays around the value.

        Returns:
            Number of array values read so far.

        Raises:
            ValueError: When the type is unknown, arrays are nested too deeply, or the value does
                not fit into the rest of the file.
        """
        if kind in SCALAR_BYTES:
            self.skip(SCALAR_BYTES[kind])
        elif kind == STRING:
            self.skip(self.number("<Q"))
        elif kind == ARRAY and depth < MAX_NESTING:
            item_type = self.number("<I")
            item_bytes = SCALAR_BYTES.get(item_type) or (8 if item_type == STRING else 12)
            count = self.count("<Q", item_bytes, MAX_VALUES - values)
            values += count
            if item_type in SCALAR_BYTES:
                self.skip(count * item_bytes)
            else:
                for _ in range(count):
                    values = self.skip_value(item_type, values, depth + 1)
        else:
            raise ValueError(f"a value of the unknown type {kind} at byte {self.file.tell()}")
        return values


def check_gguf_header(path: Path) -> None:
    """Checks every count, length and offset in the header of a GGUF against the size of the file.

    Time and memory depend on the bytes in the file, not on the numbers that the header states.

    Args:
        path: Path of the GGUF.

    Raises:
        ValueError: When the header does not fit the file. The message names the file.
    """
    import gguf

    try:
        with path.open("rb") as file:
            reader = HeaderReader(file, path.stat().st_size)
            if reader.take(4) != b"GGUF":
                raise ValueError("it does not begin with GGUF")
            if (version := reader.number("<I")) not in (2, 3):
                raise ValueError(f"GGUF version {version}, expected 2 or 3, little-endian")
            tensors = reader.count("<Q", 24, MAX_ENTRIES)
            keys, values, alignment = reader.count("<Q", 13, MAX_ENTRIES), 0, 32
            for _ in range(keys):
                key, kind = reader.key(), reader.number("<I")
                if key == "general.alignment":
                    if kind != 4:
                        raise ValueError(f"general.alignment of type {kind}, expected 4")
                    alignment = reader.number("<I")
                else:
                    values = reader.skip_value(kind, values)
            if alignment < 1 or alignment & (alignment - 1) or alignment > 2**20:
                raise ValueError(
                    f"general.alignment = {alignment}, expected a power of two up to {2**20}"
                )
            ends = []
            for _ in range(tensors):
                name, dimensions = reader.key(), reader.number("<I")
                if dimensions > 4:
                    raise ValueError(
                        f"tensor {name} of {dimensions} dimensions, expected at most 4"
                    )
                shape = [reader.number("<Q") for _ in range(dimensions)]
                kind, offset = reader.number("<I"), reader.number("<Q")
                block, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
                if shape and shape[0] % block:
                    raise ValueError(f"tensor {name} of shape {shape}, expected blocks of {block}")
                ends.append((name, offset + math.prod(shape) // block * nbytes))
            data_start = -(-file.tell() // alignment) * alignment
            for name, end in ends:
                if data_start + end > reader.size:
                    raise ValueError(
                        f"tensor {name} ends at byte {data_start + end} of {reader.size}"
                    )
    except (ValueError, KeyError, struct.error) as error:  # a UnicodeDecodeError is a ValueError
        raise ValueError(f"{path}: not a whole GGUF file ({error}); fetch it again") from None


def check_architecture(
    path: Path, architecture: object, supported: tuple[str, ...] = (ARCHITECTURE,)
) -> None:
    """Checks that a file has a supported architecture.

    Args:
        path: Path of the file, for the error message.
        architecture: The architecture that the file states.
        supported: The supported architectures.

    Raises:
        ValueError: When the architecture is not supported. The message names it.
    """
    if architecture not in supported:
        raise ValueError(
            f"{path}: architecture {architecture!r}: only {supported[0]} is supported so far"
        )


def check_gguf_metadata(path: Path, metadata: Mapping[str, Any], config: DecoderConfig) -> None:
    """Checks the metadata of a GGUF against a configuration.

    A key that the file does not state is assumed to agree with the configuration.

    Args:
        path: Path of the GGUF, for error messages.
        metadata: The metadata, by key.
        config: The configuration.

    Raises:
        ValueError: When the decoder would not honour a value. The message names the key and the
            value.
    """
    check_architecture(path, metadata.get("general.architecture"))
    pattern = metadata.get(f"{ARCHITECTURE}.attention.sliding_window_pattern")
    if isinstance(pattern, list):  # one value per layer: True for a local layer
        expected_pattern: Any = [not config.is_global(layer) for layer in range(config.layers)]
        pattern = [bool(part) for part in pattern]
    else:
        expected_pattern = config.global_every
    expected = {
        "embedding_length": config.width,
        "block_count": config.layers,
        "feed_forward_length": config.ffn_width,
        "vocab_size": config.vocabulary,
        "attention.head_count": config.heads,
        "attention.head_count_kv": config.kv_heads,
        "attention.key_length": config.head_width,
        "attention.value_length": config.head_width,
        "attention.layer_norm_rms_epsilon": NORM_EPSILON,
        "attention.sliding_window": config.window,
        "attention.scale": config.head_width**-0.5,
        "attention.causal": True,
        "attention.logit_softcapping": 0,
        "attn_logit_softcapping": 0,
        "final_logit_softcapping": 0,
        "rope.dimension_count": config.head_width,
        "rope.freq_base": config.rope_base,
        "rope.freq_base_swa": config.local_rope_base,
        "rope.scaling.type": "none",
        "rope.scaling.factor": 1,
        "rope.scale_linear": 1,
        "expert_count": 0,
    }
    values = {key: metadata.get(f"{ARCHITECTURE}.{key}") for key in expected}
    values["attention.sliding_window_pattern"], expected["attention.sliding_window_pattern"] = (
        pattern,
        expected_pattern,
    )
    values["tokenizer.ggml.model"], expected["tokenizer.ggml.model"] = (
        metadata.get("tokenizer.ggml.model"),
        "llama",
    )
    compare(path, values, expected)


def compare(path: Path, stated: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Compares stated values with the expected ones.

    Args:
        path: Path of the file, for the error message.
        stated: The stated values by key. None means that the file does not state the value.
        expected: The expected values by key.

    Raises:
        ValueError: When a stated value is not the expected one. The message names the first such
            key.
    """
    for key, value in stated.items():
        if value is not None and not same(value, expected[key]):
            raise ValueError(
                f"{path}: {key} = {value!r}: expected {expected[key]!r}; is it another model?"
            )


def same(value: Any, expected: Any) -> bool:
    """Returns whether two values are equal; numbers may differ by the rounding of float32."""
    if isinstance(value, int | float) and isinstance(expected, int | float):
        return math.isclose(value, expected, rel_tol=1e-6)
    return type(value) is type(expected) and value == expected


def check_folder_config(path: Path, config: DecoderConfig) -> None:
    """Checks the config.json of a Hugging Face folder against a configuration.

    A field that the file does not state is assumed to agree with the configuration.

    Args:
        path: Path of the config.json.
        config: The configuration.

    Raises:
        ValueError: When the decoder would not honour a value, or the file is not JSON. The message
            names the file, the field and the value.
    """
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ValueError(f"{path.stat().st_size} bytes")
        fields = json.loads(path.read_text())
        fields = (
            fields["text_config"] | dict(model_type=fields["model_type"])
            if "text_config" in fields
            else fields
        )
        if not isinstance(fields, dict):
            raise ValueError(f"a {type(fields).__name__}")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: no model's configuration ({error}); fetch it again") from None
    check_architecture(path, fields.get("model_type"), (ARCHITECTURE, f"{ARCHITECTURE}_text"))
    layers = [
        "full_attention" if config.is_global(layer) else "sliding_attention"
        for layer in range(config.layers)
    ]
    expected: dict[str, Any] = dict(
        vocab_size=config.vocabulary,
        hidden_size=config.width,
        num_hidden_layers=config.layers,
        intermediate_size=config.ffn_width,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.head_width,
        rms_norm_eps=NORM_EPSILON,
        sliding_window=config.window,
        sliding_window_pattern=config.global_every,
        _sliding_window_pattern=config.global_every,
        layer_types=layers,
        query_pre_attn_scalar=config.head_width,
        rope_theta=config.rope_base,
        rope_local_base_freq=config.local_rope_base,
        attn_logit_softcapping=0,
        final_logit_softcapping=0,
        hidden_activation="gelu_pytorch_tanh",
        hidden_act="gelu_pytorch_tanh",
        attention_bias=False,
        tie_word_embeddings=True,
        use_bidirectional_attention=False,
    )
    compare(path, {key: fields.get(key) for key in expected}, expected)
    for name, value in ropes(fields):
        rope_type = (
            value.get("rope_type", value.get("type", "default"))
            if isinstance(value, dict)
            else value
        )
        if rope_type not in (None, "default") or (
            isinstance(value, dict) and not same(value.get("factor", 1), 1)
        ):
            raise ValueError(
                f"{path}: {name} = {value!r}: expected none, scaled rotary positions are not "
                "supported so far"
            )
        base = config.local_rope_base if "sliding" in name else config.rope_base
        if isinstance(value, dict):
            compare(
                path, {f"{name}.rope_theta": value.get("rope_theta")}, {f"{name}.rope_theta": base}
            )


def ropes(metadata: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Lists the settings of rotary positions: one for all layers, or one per type of layer.

    Args:
        metadata: The fields of a config.json.

    Yields:
        The name and the value of each setting.
    """
    for name in ("rope_scaling", "rope_parameters"):
        value = metadata.get(name)
        if (
            isinstance(value, dict)
            and value
            and all(isinstance(part, dict) for part in value.values())
        ):
            yield from ((f"{name}.{part}", settings) for part, settings in value.items())
        elif value is not None:
            yield name, value

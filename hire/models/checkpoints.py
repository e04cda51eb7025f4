"""A trained model in one file: weights in bfloat16, configuration and tokenizer, sealed by a checksum."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from hire.models.config import DecoderConfig
from hire.models.decoder import Decoder
from hire.models.weights import TextModel, expected_shapes, fill, named_arrays


def save_checkpoint(path: Path, model: Decoder, tokenizer: Tokenizer) -> None:
    """Write the model to a .safetensors file, whole or not at all.

    Raises OSError when it cannot be written; a file that was there before is then still whole.
    """
    from safetensors import SafetensorError
    from safetensors.flax import save_file

    arrays = {name: array.astype(jnp.bfloat16) for name, array in named_arrays(model).items()}
    facts = dict(config=json.dumps(asdict(model.config)), tokenizer=tokenizer.to_str())
    facts["sha256"] = seal(arrays, facts)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".partial")
    try:
        save_file(arrays, scratch, metadata=facts)
        scratch.replace(path)
    except SafetensorError as error:
        raise OSError(f"{path} could not be written ({error}): free some space and run it again") from None
    finally:
        scratch.unlink(missing_ok=True)


def load_checkpoint(path: Path, config: DecoderConfig | None = None, *, dtype=jnp.float32) -> TextModel:
    """The model and tokenizer in a file that save_checkpoint wrote.

    Raises FileNotFoundError when there is none, ValueError when it is cut off, altered, or of another configuration than `config`.
    """
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; `make train VARIANT={path.stem}` makes a trained model")
    try:
        with safe_open(path, framework="flax") as file:
            facts = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole checkpoint ({error}); restore it with git") from None
    if facts.pop("sha256", None) != seal(arrays, facts):
        raise ValueError(f"{path}: its contents are not those that were saved; restore it with git")
    stored = json.loads(facts["config"])
    found = DecoderConfig(**stored | dict(sparse_layers=stored["sparse_layers"] and tuple(stored["sparse_layers"])))
    if config is not None and found != config:
        differing = {name for name in asdict(found) if getattr(found, name) != getattr(config, name)}
        raise ValueError(
            f"{path}: a model of another {', '.join(sorted(differing))}; expected the configuration that was asked for"
        )
    if {name: array.shape for name, array in arrays.items()} != expected_shapes(found):
        raise ValueError(f"{path}: its weights do not fit its own configuration; restore it with git")
    return TextModel(fill(found, arrays, dtype), Tokenizer.from_str(facts["tokenizer"]), f"trained here, bfloat16 ({path.stem})")


def seal(arrays: dict, facts: dict[str, str]) -> str:
    """sha256 of all weights, with their names and shapes, and of configuration and tokenizer."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name in sorted(arrays):
        array = np.asarray(arrays[name])
        digest.update(f"{name} {array.shape} {array.dtype}".encode() + array.tobytes())
    return digest.hexdigest()

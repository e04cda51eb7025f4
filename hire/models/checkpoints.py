"""A trained model in one file: weights in bfloat16, configuration and tokenizer, sealed by a checksum. And a model of any size in
a folder, each device's part of it written and read where it lies.
"""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from hire.models.config import DecoderConfig
from hire.models.decoder import Decoder, spread
from hire.models.weights import TextModel, digest, expected_shapes, fill, named_arrays


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
    found = configured(path, json.loads(facts["config"]), config)
    if {name: array.shape for name, array in arrays.items()} != expected_shapes(found):
        raise ValueError(f"{path}: its weights do not fit its own configuration; restore it with git")
    return TextModel(fill(found, arrays, dtype), Tokenizer.from_str(facts["tokenizer"]), f"trained here, bfloat16 ({path.stem})")


def configured(path: Path, stored: dict[str, Any], config: DecoderConfig | None) -> DecoderConfig:
    """The configuration that a checkpoint states. Raises ValueError when it is not the `config` that was asked for."""
    known: dict[str, Any] = stored | dict(sparse_layers=stored["sparse_layers"] and tuple(stored["sparse_layers"]))
    found = DecoderConfig(**known)
    if config is not None and found != config:
        differing = {name for name in asdict(found) if getattr(found, name) != getattr(config, name)}
        raise ValueError(
            f"{path}: a model of another {', '.join(sorted(differing))}; expected the configuration that was asked for"
        )
    return found


def save_sharded(folder: Path, model: Decoder) -> None:
    """Write a model's weights, in their own type, and its configuration to a new folder by Orbax: whole or not at all, no array in
    one piece unless it lies so.

    Raises FileExistsError when the folder is there already, OSError when it cannot be written.
    """
    if folder.exists():
        raise FileExistsError(f"{folder}: is there already; name a new folder")
    import orbax.checkpoint as ocp

    facts = dict(config=asdict(model.config), dtype=model.embedding[...].dtype.name)
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as writer:
            parts = dict(facts=ocp.args.JsonSave(facts), weights=ocp.args.StandardSave(named_arrays(model)))
            writer.save(folder.absolute(), ocp.args.Composite(**parts))
        (folder / SEAL).write_text(json.dumps(digests(folder)))  # last: a folder without it is not whole
    except Exception as error:  # of many kinds, some of which say nothing
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise OSError(f"{folder} could not be written ({reason}): free some space and run it again") from None


def load_sharded(folder: Path, config: DecoderConfig | None = None) -> Decoder:
    """The model in a folder that save_sharded wrote, on the mesh that jax.set_mesh has set, wherever it lay before.

    Raises FileNotFoundError when there is none, ValueError when it is cut off, altered, or of another configuration than
    `config`.
    """
    if not folder.exists():
        raise FileNotFoundError(f"{folder}: no such folder; expected one that save_sharded wrote")
    import orbax.checkpoint as ocp

    sealed = json.loads((folder / SEAL).read_text()) if (folder / SEAL).exists() else None
    if sealed != digests(folder):  # before Orbax reads, which after a failure goes on to read the other arrays
        raise ValueError(f"{folder}: its contents are not those that were saved; save it again")
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:

        def read(**parts):
            return reader.restore(folder.absolute(), ocp.args.Composite(**parts))

        facts = read(facts=ocp.args.JsonRestore())["facts"]
        found = configured(folder, facts["config"], config)
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        wanted = {
            name: jax.ShapeDtypeStruct(shape, facts["dtype"], sharding=spread(*shape) or here)
            for name, shape in expected_shapes(found).items()
        }
        weights = read(weights=ocp.args.StandardRestore(wanted))["weights"]
    return fill(found, weights, facts["dtype"])


SEAL = "seal.json"


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file below a folder, but of the seal itself."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SEAL)
    return {str(path.relative_to(folder)): digest(path) for path in files}


def seal(arrays: dict, facts: dict[str, str]) -> str:
    """sha256 of all weights, with their names and shapes, and of configuration and tokenizer."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name in sorted(arrays):
        array = np.asarray(arrays[name])
        digest.update(f"{name} {array.shape} {array.dtype}".encode() + array.tobytes())
    return digest.hexdigest()

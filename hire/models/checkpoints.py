"""A trained model in one file: weights in bfloat16, configuration and tokenizer, with a checksum of all of it. And a model of any
size in a folder, each device's part of it written and read where it lies.
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

from hire.models import storage
from hire.models.config import DecoderConfig
from hire.models.decoder import Decoder, spread
from hire.models.tokenizer import whole_texts
from hire.models.weights import TextModel, check_dtype, expected_shapes, fill, named_arrays

CHECKSUMS = "seal.json"  # in the folder of a sharded model


def save_checkpoint(path: str | Path, model: Decoder, tokenizer: Tokenizer) -> None:
    """Write the model to a .safetensors file, whole or not at all.

    Raises OSError when it cannot be written; a file that was there before is then still whole.
    """
    from safetensors import SafetensorError
    from safetensors.flax import save_file

    path = Path(path)
    arrays = {name: array.astype(jnp.bfloat16) for name, array in named_arrays(model).items()}
    facts = dict(config=json.dumps(asdict(model.config)), tokenizer=tokenizer.to_str())
    facts["sha256"] = checksum(arrays, facts)
    with storage.replacing(path) as [scratch]:
        try:
            save_file(arrays, scratch, metadata=facts)
        except SafetensorError as error:
            raise OSError(storage.reason_of(error)) from None


def load_checkpoint(path: str | Path, config: DecoderConfig | None = None, *, dtype=jnp.float32) -> TextModel:
    """The model and tokenizer in a file that save_checkpoint wrote.

    Raises FileNotFoundError when there is none, ValueError when it is cut off, altered, or of another configuration than `config`,
    or for another type than float32 or bfloat16.
    """
    from safetensors import safe_open

    path = Path(path)
    check_dtype(dtype)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; `make train VARIANT={path.stem}` makes a trained model")
    try:
        with safe_open(path, framework="flax") as file:
            facts = dict(file.metadata() or {})
            arrays = {name: file.get_tensor(name) for name in file.keys()}
    except Exception as error:  # of many kinds, for a header that is not one
        raise ValueError(f"{path}: not a whole checkpoint ({storage.reason_of(error)}); restore it with git") from None
    if facts.pop("sha256", None) != checksum(arrays, facts):
        raise ValueError(f"{path}: its contents are not those that were saved; restore it with git")
    try:
        stored = json.loads(facts["config"])
        tokenizer = whole_texts(Tokenizer.from_str(facts["tokenizer"]))
    except Exception as error:  # the tokenizer's library raises plain ones
        raise ValueError(f"{path}: not a checkpoint of this package ({storage.reason_of(error)})") from None
    found = configured(path, stored, config)
    if {name: array.shape for name, array in arrays.items()} != expected_shapes(found):
        raise ValueError(f"{path}: its weights do not fit its own configuration; restore it with git")
    return TextModel(fill(found, arrays, dtype), tokenizer, f"trained here, bfloat16 ({path.stem})")


def configured(path: Path, stored: Any, config: DecoderConfig | None) -> DecoderConfig:
    """The configuration that a checkpoint states. Raises ValueError when it states none, or not the `config` that was asked for."""
    try:
        layers = stored["sparse_layers"]
        known: dict[str, Any] = stored | dict(sparse_layers=None if layers is None else tuple(layers))
        found = DecoderConfig(**known)
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{path}: its configuration is none of this package ({storage.reason_of(error)})") from None
    if config is not None and found != config:
        differing = {name for name in asdict(found) if getattr(found, name) != getattr(config, name)}
        raise ValueError(
            f"{path}: a model of another {', '.join(sorted(differing))}; expected the configuration that was asked for"
        )
    return found


def save_sharded(folder: str | Path, model: Decoder) -> None:
    """Write a model's weights, in their own type, and its configuration to a new folder by Orbax: whole or not at all, no array in
    one piece unless it lies so.

    Raises FileExistsError when the folder is there already, OSError when it cannot be written.
    """
    folder = Path(folder)
    import orbax.checkpoint as ocp

    facts = dict(config=asdict(model.config), dtype=model.embedding[...].dtype.name)
    with storage.replacing(folder) as [scratch]:
        if folder.exists():
            raise FileExistsError(f"{folder}: is there already; name a new folder")
        try:
            with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as writer:
                parts = dict(facts=ocp.args.JsonSave(facts), weights=ocp.args.StandardSave(named_arrays(model)))
                writer.save(scratch.absolute(), ocp.args.Composite(**parts))
            write_folder_checksums(scratch)
        except Exception as error:  # of many kinds, some of which say nothing
            raise OSError(f"{folder} could not be written ({storage.reason_of(error)}): free some space and run it again") from None


def load_sharded(folder: str | Path, config: DecoderConfig | None = None) -> Decoder:
    """The model in a folder that save_sharded wrote, on the mesh that jax.set_mesh has set, wherever it lay before.

    Raises FileNotFoundError when there is none, ValueError when it is cut off, altered, or of another configuration than
    `config`.
    """
    folder = Path(folder)
    if not folder.exists():
        raise FileNotFoundError(f"{folder}: no such folder; expected one that save_sharded wrote")
    import orbax.checkpoint as ocp

    check_folder(folder)  # before Orbax reads, which after a failure goes on to read the other arrays
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:

        def read(**parts):
            try:
                return reader.restore(folder.absolute(), ocp.args.Composite(**parts))
            except Exception as error:  # of many kinds
                raise ValueError(f"{folder}: cannot be read ({storage.reason_of(error)}); save it again") from None

        facts = read(facts=ocp.args.JsonRestore())["facts"]
        if not isinstance(facts, dict) or not {"config", "dtype"} <= set(facts):
            raise ValueError(f"{folder}: no sharded model of this package; save it again")
        found = configured(folder, facts["config"], config)
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        wanted = {}
        for name, shape in expected_shapes(found).items():
            spec = spread(*shape)  # an empty one, for what every device holds, is false as a bool
            wanted[name] = jax.ShapeDtypeStruct(shape, facts["dtype"], sharding=here if spec is None else spec)
        weights = read(weights=ocp.args.StandardRestore(wanted))["weights"]
    return fill(found, weights, facts["dtype"])


def folder_digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, but of the list of them itself."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / CHECKSUMS)
    return {str(path.relative_to(folder)): storage.digest(path) for path in files}


def write_folder_checksums(folder: Path) -> None:
    """Write the list of digests of a folder, last of all: without it, or with half of it, the folder is not whole."""
    (folder / CHECKSUMS).write_text(json.dumps(folder_digests(folder)))


def check_folder(folder: Path) -> None:
    """Raise ValueError, which names the folder, when a file below it is not as it was when its digests were written."""
    try:
        known = json.loads((folder / CHECKSUMS).read_bytes())
        whole = isinstance(known, dict) and known == folder_digests(folder)
    except (OSError, ValueError, RecursionError):
        whole = False
    if not whole:
        raise ValueError(f"{folder}: its contents are not those that were saved; save it again")


def checksum(arrays: dict, facts: dict[str, str]) -> str:
    """SHA-256 of all weights, with their names and shapes, and of configuration and tokenizer."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name in sorted(arrays):
        array = np.asarray(arrays[name])
        digest.update(f"{name} {array.shape} {array.dtype}".encode() + array.tobytes())
    return digest.hexdigest()

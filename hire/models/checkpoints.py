"""Checkpoints: a file for a trained model, and a folder for a sharded model of any size.

The file stores the weights in bfloat16, the configuration, the tokenizer, and a checksum of all
three. Each device saves and restores its shard of the folder; no weight is gathered.
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

from hire import storage
from hire.models.config import DecoderConfig
from hire.models.decoder import Decoder
from hire.models.loading import TextModel, check_dtype
from hire.models.sharding import partition_spec
from hire.models.tokenizer import whole_texts
from hire.models.weights import expected_shapes, fill, named_arrays

CHECKSUMS = "seal.json"  # the checksum file in the folder of a sharded model


def save_checkpoint(path: str | Path, model: Decoder, tokenizer: Tokenizer) -> None:
    """Writes a model to a .safetensors file.

    The write is atomic: if it fails, an earlier file at this path stays intact.

    Args:
        path: Path of the file.
        model: The model. Its weights are saved in bfloat16.
        tokenizer: The tokenizer of the model.

    Raises:
        OSError: When the file cannot be written.
        ValueError: When a conversion has replaced layers of the model.
    """
    from safetensors import SafetensorError
    from safetensors.flax import save_file

    path = Path(path)
    arrays = {name: array.astype(jnp.bfloat16) for name, array in named_arrays(model).items()}
    metadata = dict(config=json.dumps(asdict(model.config)), tokenizer=tokenizer.to_str())
    metadata["sha256"] = checksum(arrays, metadata)
    with storage.replacing(path) as [scratch]:
        try:
            save_file(arrays, scratch, metadata=metadata)
        except SafetensorError as error:
            raise OSError(storage.reason_of(error)) from None


def load_checkpoint(
    path: str | Path, config: DecoderConfig | None = None, *, dtype=jnp.float32
) -> TextModel:
    """Loads the model and the tokenizer from a file that `save_checkpoint` wrote.

    Args:
        path: Path of the file.
        config: The expected configuration. None accepts any configuration.
        dtype: Type of the loaded weights: float32 or bfloat16.

    Returns:
        The model with its tokenizer.

    Raises:
        FileNotFoundError: When the file does not exist.
        ValueError: When the file is truncated, altered, or of another configuration than `config`,
            or when `dtype` is neither float32 nor bfloat16.
    """
    from safetensors import safe_open

    path = Path(path)
    check_dtype(dtype)
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: no such file; `make train VARIANT={path.stem}` makes a trained model"
        )
    try:
        with safe_open(path, framework="flax") as file:
            metadata = dict(file.metadata() or {})
            arrays = {name: file.get_tensor(name) for name in file.keys()}
    except Exception as error:  # safetensors raises many types for an invalid header
        raise ValueError(
            f"{path}: not a whole checkpoint ({storage.reason_of(error)}); restore it with git"
        ) from None
    if metadata.pop("sha256", None) != checksum(arrays, metadata):
        raise ValueError(f"{path}: its contents are not those that were saved; restore it with git")
    try:
        fields = json.loads(metadata["config"])
        tokenizer = whole_texts(Tokenizer.from_str(metadata["tokenizer"]))
    except Exception as error:  # the tokenizers library raises plain Exception
        raise ValueError(
            f"{path}: not a checkpoint of this package ({storage.reason_of(error)})"
        ) from None
    file_config = configured(path, fields, config)
    if {name: array.shape for name, array in arrays.items()} != expected_shapes(file_config):
        raise ValueError(
            f"{path}: its weights do not fit its own configuration; restore it with git"
        )
    return TextModel(
        fill(file_config, arrays, dtype), tokenizer, f"trained here, bfloat16 ({path.stem})"
    )


def configured(path: Path, metadata: Any, config: DecoderConfig | None) -> DecoderConfig:
    """Returns the configuration that a checkpoint states.

    Args:
        path: Path of the checkpoint, for error messages.
        metadata: The configuration as read from JSON.
        config: The expected configuration. None accepts any configuration.

    Returns:
        The configuration.

    Raises:
        ValueError: When the checkpoint states no valid configuration, or another one than `config`.
    """
    try:
        file_config = DecoderConfig.from_json(metadata)
    except (TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{path}: its configuration is none of this package ({storage.reason_of(error)})"
        ) from None
    if config is not None and file_config != config:
        differing = {
            name
            for name in asdict(file_config)
            if getattr(file_config, name) != getattr(config, name)
        }
        raise ValueError(
            f"{path}: a model of another {', '.join(sorted(differing))}; expected the "
            "configuration that was asked for"
        )
    return file_config


def save_sharded(folder: str | Path, model: Decoder) -> None:
    """Writes the weights and the configuration of a model to a new folder, with Orbax.

    The weights keep their type. The write is atomic. A sharded array is saved shard by shard.

    Args:
        folder: Path of the new folder.
        model: The model.

    Raises:
        FileExistsError: When the folder already exists.
        OSError: When the folder cannot be written.
        ValueError: When a conversion has replaced layers of the model.
    """
    folder = Path(folder)
    import orbax.checkpoint as ocp

    metadata = dict(config=asdict(model.config), dtype=model.embedding[...].dtype.name)
    with storage.replacing(folder) as [scratch]:
        if folder.exists():
            raise FileExistsError(f"{folder}: is there already; name a new folder")
        try:
            with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as writer:
                parts = dict(
                    facts=ocp.args.JsonSave(metadata),
                    weights=ocp.args.StandardSave(named_arrays(model)),
                )
                writer.save(scratch.absolute(), ocp.args.Composite(**parts))
            write_folder_checksums(scratch)
        except Exception as error:  # Orbax raises many types, some without a message
            raise OSError(
                f"{folder} could not be written ({storage.reason_of(error)}): free some space and "
                "run it again"
            ) from None


def load_sharded(folder: str | Path, config: DecoderConfig | None = None) -> Decoder:
    """Loads the model from a folder that `save_sharded` wrote.

    The weights are restored to the mesh that jax.set_mesh has set, whatever their sharding was when
    they were saved.

    Args:
        folder: Path of the folder.
        config: The expected configuration. None accepts any configuration.

    Returns:
        The model, in the type in which it was saved.

    Raises:
        FileNotFoundError: When the folder does not exist.
        ValueError: When the folder is truncated, altered, or of another configuration than
            `config`.
    """
    folder = Path(folder)
    if not folder.exists():
        raise FileNotFoundError(f"{folder}: no such folder; expected one that save_sharded wrote")
    import orbax.checkpoint as ocp

    # Check before Orbax reads: after a failure Orbax continues to read the other arrays.
    check_folder(folder)
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:

        def read(**parts):
            try:
                return reader.restore(folder.absolute(), ocp.args.Composite(**parts))
            except Exception as error:  # Orbax raises many types
                raise ValueError(
                    f"{folder}: cannot be read ({storage.reason_of(error)}); save it again"
                ) from None

        metadata = read(facts=ocp.args.JsonRestore())["facts"]
        if not isinstance(metadata, dict) or not {"config", "dtype"} <= set(metadata):
            raise ValueError(f"{folder}: no sharded model of this package; save it again")
        file_config = configured(folder, metadata["config"], config)
        single_device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        abstract_arrays = {}
        for name, shape in expected_shapes(file_config).items():
            spec = partition_spec(*shape)
            # P(), for a replicated array, is false as a bool: compare with None.
            abstract_arrays[name] = jax.ShapeDtypeStruct(
                shape, metadata["dtype"], sharding=single_device if spec is None else spec
            )
        weights = read(weights=ocp.args.StandardRestore(abstract_arrays))["weights"]
    return fill(file_config, weights, metadata["dtype"])


def folder_digests(folder: Path) -> dict[str, str]:
    """Computes the SHA-256 of every file below a folder, except the checksum file.

    Returns:
        Hexadecimal digests by relative path.
    """
    files = sorted(
        path for path in folder.rglob("*") if path.is_file() and path != folder / CHECKSUMS
    )
    return {str(path.relative_to(folder)): storage.digest(path) for path in files}


def write_folder_checksums(folder: Path) -> None:
    """Writes the checksum file of a folder.

    This is the last write: a folder without a complete checksum file counts as incomplete.
    """
    (folder / CHECKSUMS).write_text(json.dumps(folder_digests(folder)))


def check_folder(folder: Path) -> None:
    """Checks every file below a folder against the checksum file.

    Raises:
        ValueError: When a file differs from its checksum. The message names the folder.
    """
    try:
        digests = json.loads((folder / CHECKSUMS).read_bytes())
        intact = isinstance(digests, dict) and digests == folder_digests(folder)
    except (OSError, ValueError, RecursionError):
        intact = False
    if not intact:
        raise ValueError(f"{folder}: its contents are not those that were saved; save it again")


def checksum(arrays: dict, facts: dict[str, str]) -> str:
    """Computes the SHA-256 of all weights and metadata.

    Args:
        arrays: Weights by name. The checksum covers names, shapes and types, too.
        facts: Metadata: the configuration and the tokenizer.

    Returns:
        The hexadecimal digest.
    """
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name in sorted(arrays):
        array = np.asarray(arrays[name])
        digest.update(f"{name} {array.shape} {array.dtype}".encode() + array.tobytes())
    return digest.hexdigest()

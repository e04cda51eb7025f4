"""Saving and loading of estimators, searches and converted models.

A file is a .safetensors: its arrays, and a description of the object in its metadata, with the
SHA-256 of both. The rows of a matrix that the caller has anyway are not saved. They are passed to
`load`, which checks that they are the same ones.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from hire.estimators.base import Estimator, check_fitted, check_search
from hire.estimators.cascade import Cascade
from hire.estimators.exact_rows import ExactRowsEstimator
from hire.estimators.low_rank import LowRank
from hire.estimators.quantized import Quantized
from hire.layers.ffn import HireFFN
from hire.layers.softmax import HireSoftmax
from hire.ops.quantization import QuantizedRows
from hire.types import Blocks, Rows

FORMAT = 1
CLASSES: dict[str, type] = {
    kind.__name__: kind
    for kind in (
        LowRank,
        Quantized,
        QuantizedRows,
        Cascade,
        ExactRowsEstimator,
        HireSoftmax,
        HireFFN,
    )
}
# Matrices that `load` is given, by class and field. Quantized ones are saved.
GIVEN = {("HireSoftmax", "rows")}


def save(path: str | Path, thing: Any) -> None:
    """Save an estimator, a search or a converted model.

    The write is atomic. The rows of a softmax are not saved, unless they are quantized.

    Args:
        path: Path of the file, which is replaced if it exists.
        thing: A `LowRank`, `Quantized`, `Cascade`, `HireSoftmax` or `HireFFN`, or a model of
            `hire.models`, converted or not.

    Raises:
        ValueError: If the thing is none of these, is sharded over devices, or is traced.
        OSError: If the file cannot be written.
    """
    arrays: dict[str, jax.Array] = {}
    if type(thing).__name__ in CLASSES:
        description = described(thing, "", arrays)
    else:
        description = model_part("describe")(thing, arrays)
    write(Path(path), description, arrays)


def load(path: str | Path, *, rows: Rows | Blocks | None = None) -> Any:
    """Load what `save` wrote.

    Args:
        path: Path of the file.
        rows: The rows that an estimator was fitted to, or over which a softmax searches. A softmax
            needs them, unless its rows are quantized. For an estimator they are optional, and
            checked.

    Returns:
        The estimator, search or model.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file is damaged or none of this package, if rows are missing, or if they
            are other rows than the ones that the estimator was fitted to.
    """
    path = Path(path)
    description, arrays = read(path)
    if "model" in description:
        return model_part("rebuild")(path, description, arrays)
    thing = built(path, description, arrays, rows)
    if rows is not None and isinstance(thing, Estimator):
        try:
            check_search(rows, thing, 1, 1)
            check_fitted(rows, thing)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    return thing


def model_part(name: str) -> Callable:
    """Return a function of `hire.models.saved_models`, which needs Flax."""
    import importlib

    try:
        return getattr(importlib.import_module("hire.models.saved_models"), name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"a model needs {error.name}: pip install 'hire[models]'", name=error.name
        ) from None


def described(value: Any, name: str, arrays: dict[str, jax.Array]) -> Any:
    """Describe a value as JSON and collect its arrays.

    Args:
        value: None, a bool, number or text, a list or tuple, an array, or an object of `CLASSES`.
        name: Name of the value's arrays.
        arrays: The arrays by name, which are extended.

    Raises:
        ValueError: If the value is another one.
    """
    if isinstance(value, float):
        return {"float": repr(value)}
    if value is None or isinstance(value, bool | int | str):
        return {"value": value}
    if isinstance(value, list | tuple):
        parts = [described(part, f"{name}.{index}", arrays) for index, part in enumerate(value)]
        return {"tuple": parts}
    if isinstance(value, Tracer):
        raise ValueError(f"{name or 'the thing'} is traced: expected arrays outside jit")
    if isinstance(value, jax.Array | np.ndarray):
        arrays[name] = jnp.asarray(value)
        return {"array": name}
    kind = type(value).__name__
    if CLASSES.get(kind) is not type(value):
        raise ValueError(
            f"{name or 'the thing'} of type {kind}: expected one of {', '.join(CLASSES)}, or a "
            "model of hire.models; a sharded search is saved before it is sharded"
        )
    fields = {}
    for field in value.__dataclass_fields__:
        part = getattr(value, field)
        if (kind, field) in GIVEN and not isinstance(part, QuantizedRows):
            fields[field] = {"given": True}
        else:
            fields[field] = described(part, f"{name}.{field}".lstrip("."), arrays)
    return {"class": kind, "fields": fields}


def built(path: Path, description: Any, arrays: dict[str, Any], rows: Any) -> Any:
    """Build a value from its description.

    Args:
        path: Path of the file, for error messages.
        description: What `described` returned.
        arrays: The arrays by name.
        rows: The rows that the caller gives, or None.

    Raises:
        ValueError: If the description is none, if rows are missing, or if they are other rows.
    """
    try:
        if "value" in description:
            return description["value"]
        if "float" in description:
            return float(description["float"])
        if "tuple" in description:
            return tuple(built(path, part, arrays, rows) for part in description["tuple"])
        if "array" in description:
            return jnp.asarray(arrays[description["array"]])
        if "given" in description:
            if rows is None:
                raise ValueError("its rows are not in the file: pass rows=")
            return rows
        kind = CLASSES[description["class"]]
        fields = {
            name: built(path, part, arrays, rows) for name, part in description["fields"].items()
        }
    except (KeyError, TypeError) as error:
        raise damaged(path, error) from None
    try:
        return kind(**fields)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def damaged(path: Path, error: Exception) -> ValueError:
    """Return the error for a file that cannot be read."""
    from hire import storage

    reason = f"{type(error).__name__}: {storage.reason_of(error)}"
    return ValueError(f"{path}: not a file of hire.save, or damaged ({reason}); save it again")


def digest(description: str, arrays: dict[str, Any]) -> str:
    """Return the SHA-256 of a description and its arrays, in hexadecimal."""
    result = hashlib.sha256(description.encode())
    for name in sorted(arrays):
        array = np.asarray(arrays[name])
        result.update(f"{name} {array.shape} {array.dtype}".encode() + array.tobytes())
    return result.hexdigest()


def write(path: Path, description: Any, arrays: dict[str, jax.Array]) -> None:
    """Write a description and its arrays to a file.

    Raises:
        OSError: If the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.flax import save_file

    from hire import storage

    text = json.dumps(description, sort_keys=True)
    metadata = dict(hire=str(FORMAT), description=text, sha256=digest(text, arrays))
    with storage.replacing(path) as [scratch]:
        try:
            save_file(dict(arrays), scratch, metadata=metadata)  # it changes the dict
        except SafetensorError as error:
            raise OSError(storage.reason_of(error)) from None


def read(path: Path) -> tuple[Any, dict[str, Any]]:
    """Read a description and its arrays from a file.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file is damaged or none of this package.
    """
    from safetensors import safe_open

    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; expected one that hire.save wrote")
    try:
        with safe_open(path, framework="flax") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}
        version, text = metadata["hire"], metadata["description"]
        if digest(text, arrays) != metadata["sha256"]:
            raise ValueError("its SHA-256 is another")
        description = json.loads(text)
    except Exception as error:  # safetensors raises many types
        raise damaged(path, error) from None
    if version != str(FORMAT):
        raise ValueError(
            f"{path}: format {version}, expected {FORMAT}; load it with the version that wrote it"
        )
    return description, arrays

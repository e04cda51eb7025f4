"""Sharding of a model's arrays over the devices of a mesh."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P


def has_explicit_axes() -> bool:
    """Returns whether the mesh of jax.set_mesh has Explicit axes.

    On Explicit axes every operation must name its sharding.
    """
    return AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types


def with_auto_axes(function: Callable, *arrays: Any, out_sharding: P = P()) -> Any:
    """Calls `function(*arrays)` and lets the compiler shard intermediate arrays.

    JAX does this by default, except on a mesh with Explicit axes, which jax.make_mesh creates by
    default since jax 0.9.

    Args:
        function: The function to call.
        *arrays: Its arguments, which are pytrees.
        out_sharding: Sharding of the results on a mesh with Explicit axes. By default every device
            stores all of them.

    Returns:
        The results of the function.
    """
    if not has_explicit_axes():
        return function(*arrays)
    leaves, tree = jax.tree.flatten(arrays)
    call = jax.sharding.auto_axes(
        lambda *leaves: function(*tree.unflatten(leaves)), out_sharding=out_sharding
    )
    # Outside jit, jax 0.7 chooses shardings that do not divide the array.
    if jax.__version_info__ < (0, 10):
        call = jax.jit(call)
    return call(*leaves)


def partition_spec(rows: int, columns: int = 0) -> P | None:
    """Returns the sharding of a weight over the mesh that jax.set_mesh has set.

    The rows of a matrix are sharded over all devices. If the number of devices does not divide
    them, or if the weight is a vector, every device stores all of it.

    Args:
        rows: Number of rows, or length of a vector.
        columns: Number of columns. 0 means a vector.

    Returns:
        The sharding, or None without a mesh.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return None
    return P(mesh.axis_names, None) if columns and rows % mesh.size == 0 else P()

"""DA-TOP-k: top-k of rows that are sharded over devices.

Each device searches its shard; only values and indices travel. Rows are JAX arrays, sharded over an
axis of the mesh that `jax.set_mesh` has set.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from hire.estimators.base import Estimator
from hire.estimators.fingerprints import fingerprint
from hire.estimators.quantized import Quantized
from hire.ops.checks import check_range
from hire.ops.top_k import TopK
from hire.search import high_recall_top_k, rerank
from hire.types import Array, Blocks, Float, Indices, Int, Queries, Rows


def per_device_k(count: int, devices: int, oversample_sigmas: float | int) -> int:
    """Return how many of `count` rows each device contributes.

    This is an even share plus `oversample_sigmas` standard deviations of a random assignment of
    rows to devices, at most `count`.

    Args:
        count: Number of rows that all devices together must return.
        devices: Number of devices.
        oversample_sigmas: Oversampling in standard deviations; `math.inf` gives `count`.

    Returns:
        The number of rows that each device contributes.
    """
    if oversample_sigmas == math.inf:
        return count
    return min(
        count,
        math.ceil(
            count / devices + oversample_sigmas * math.sqrt(count / devices * (1 - 1 / devices))
        ),
    )


@dataclass(frozen=True)
class RowSharding:
    """How rows are sharded over one axis of the mesh, and how much each device oversamples.

    Attributes:
        name: Name of the mesh axis.
        oversample_sigmas: What a device contributes beyond an even share, in standard deviations of
            a random assignment. With `math.inf` each device contributes as many rows as the answer
            has, and no row that a device has selected is lost.
        interleaved: Whether device i of s has rows i, i + s, i + 2 s and so on (interleaved), or
            m/s rows from i m/s on (contiguous).
        num_rows: Number of rows without padding. Indices `>= num_rows` are padding and are never
            selected. None means that there is no padding.
    """

    name: str
    oversample_sigmas: float | int = 3.0
    interleaved: bool = False
    num_rows: int | None = None

    @classmethod
    def of(cls, axis: "str | RowSharding") -> "RowSharding":
        """Return the sharding for an axis name, or the sharding that was passed."""
        return cls(axis) if isinstance(axis, str) else axis

    @property
    def size(self) -> int:
        """Number of devices of the axis.

        Raises:
            ValueError: If no mesh is set, or if the mesh has no such axis.
        """
        mesh = jax.sharding.get_abstract_mesh()
        if self.name not in mesh.axis_names:
            expected = (
                f"one of {', '.join(mesh.axis_names)}, the axes of the mesh"
                if mesh.axis_names
                else "it within jax.set_mesh"
            )
            raise ValueError(f"axis = {self.name!r}: expected {expected}")
        return mesh.shape[self.name]

    def per_device_count(self, count: int, most: int) -> int:
        """Return how many of `count` rows a device contributes.

        Args:
            count: Number of rows that all devices together must return.
            most: Number of rows that the device can contribute.

        Returns:
            The number of rows that the device contributes.
        """
        return min(per_device_k(count, self.size, self.oversample_sigmas), most)

    def padded_device_count(self, count: int, shard_size: int) -> int:
        """Return how many rows a device searches for, padding included.

        This is its contribution plus the number of padding rows that may be among them.

        Args:
            count: Number of rows that all devices together must return.
            shard_size: Number of rows of the shard.

        Returns:
            The number of rows that the device searches for.
        """
        return min(
            self.per_device_count(count, shard_size)
            + self.size * shard_size
            - self.total_rows(shard_size),
            shard_size,
        )

    def storage_index(self, rows: Indices, total: int) -> Indices:
        """Return the positions of rows in the array that `shard_rows` has made.

        Args:
            rows: Row indices `(*b, c)`.
            total: Number of rows of that array.

        Returns:
            The positions `(*b, c)`.
        """
        return (
            rows % self.size * (total // self.size) + rows // self.size
            if self.interleaved
            else rows
        )

    def total_rows(self, shard_size: int) -> int:
        """Return the number of rows without padding.

        Args:
            shard_size: Number of rows of each shard.

        Returns:
            The number of rows on all devices, without padding.
        """
        return self.size * shard_size if self.num_rows is None else self.num_rows

    def global_index(self, shard_indices: Indices, shard_size: int) -> Indices:
        """Return the global indices of rows of this device's shard. Call it inside `jax.shard_map`.

        Args:
            shard_indices: Row indices within the shard `(*b, c)`.
            shard_size: Number of rows of the shard.

        Returns:
            The indices among all rows `(*b, c)`.
        """
        device = jax.lax.axis_index(self.name)
        return (
            shard_indices * self.size + device
            if self.interleaved
            else shard_indices + device * shard_size
        )

    def shard_rows(self, rows: Array, group: int = 1) -> Array:
        """Pad rows with zeros and put them on the devices, interleaved or contiguous.

        Args:
            rows: Rows `(m, ...)`.
            group: Number of consecutive rows that stay together.

        Returns:
            The padded rows, sharded over the axis.
        """
        num_devices, row_shape = self.size, rows.shape[1:]
        padding = -len(rows) % (num_devices * group)
        if padding:
            rows = jnp.concatenate([rows, jnp.zeros((padding, *row_shape), rows.dtype)])
        if self.interleaved:
            rows = (
                rows.reshape(-1, num_devices, group, *row_shape)
                .swapaxes(0, 1)
                .reshape(-1, *row_shape)
            )
        return jax.device_put(rows, P(self.name))

    def shard_pytree(self, part: Any, group: int = 1) -> Any:
        """Shard rows, or the arrays of an estimator that have one entry per row.

        The other arrays of an estimator are replicated on every device.

        Args:
            part: Rows or an estimator.
            group: Number of consecutive rows that stay together.

        Returns:
            The same pytree on the devices.
        """
        leaves, tree = jax.tree.flatten(part)
        placed = [
            jax.device_put(leaf, P()) if spec == P() else self.shard_rows(leaf, group)
            for leaf, spec in zip(leaves, self.partition_specs(part), strict=True)
        ]
        return tree.unflatten(placed)

    def partition_specs(self, part: Any) -> list[P]:
        """Return the partition spec of each array of rows or of an estimator.

        All arrays are sharded by rows, except scalars, fingerprints and projections.

        Args:
            part: Rows or an estimator.

        Returns:
            One spec for each leaf of the pytree.
        """
        paths, _ = jax.tree_util.tree_flatten_with_path(part)
        leaf_info = [
            (jnp.ndim(leaf), {getattr(key, "name", "") for key in path}) for path, leaf in paths
        ]
        return [
            P(self.name) if dims and not names & {"projection", "fingerprint"} else P()
            for dims, names in leaf_info
        ]

    def shard_map(self, function: Callable, parts: dict[str, Any], *arrays: Any) -> Any:
        """Run `function(parts, *arrays)` on every device, with its shard of the parts.

        Args:
            function: Function of the shards and the replicated arrays. It returns the same result
                on every device.
            parts: Rows and estimators by name; each device gets its shard of them.
            *arrays: Arrays that every device gets in full.

        Returns:
            The result of the function.

        Raises:
            ValueError: If the number of rows is not a multiple of the number of devices.
        """
        for name, part in parts.items():
            if part is not None and part.shape[0] % self.size:
                raise ValueError(
                    f"{name} of {part.shape[0]} rows over {self.size} devices: expected a "
                    "multiple; `sharded` fills them up"
                )
        leaves, tree = jax.tree.flatten(parts)

        def on_one_device(leaves: list[Array], *arrays: Any) -> Any:
            return function(tree.unflatten(leaves), *arrays)

        specs = self.partition_specs(parts), *(P() for _ in arrays)
        return jax.shard_map(
            on_one_device, in_specs=specs, out_specs=P(), axis_names={self.name}, check_vma=False
        )(leaves, *arrays)


def da_top_k(
    x: Queries,
    rows: Rows | Blocks | Quantized,
    estimator: Estimator,
    *,
    k: int,
    candidates: int,
    axis: str | RowSharding,
    implementation: str = "auto",
) -> TopK:
    """Run `high_recall_top_k` on sharded rows (DA-TOP-k). Call it inside `jax.shard_map`.

    Each device nominates and scores its share of the candidates and contributes its share of the k
    rows, as `axis` says. At most s k values and indices per query travel, 8 bytes for each pair,
    for any number of rows (PAPER claim da-top-k). `expected_recall`, with the devices as its
    buckets, gives the loss from contributing fewer than k rows.

    Args:
        x: Queries `(b, d)`, the same on every device.
        rows: This device's shard of the rows: `(m/s, d)`, in blocks, or `Quantized` rows.
        estimator: Estimator of this shard.
        k: Number of rows to return for each query, among all rows.
        candidates: Number of candidates (k'), among all rows.
        axis: Name of the mesh axis, or a `RowSharding`.
        implementation: "auto", "xla" or "pallas", as in `high_recall_top_k`.

    Returns:
        The exact scores `(b, k)` and the global row indices `(b, k)`, the same on every device.

    Raises:
        ValueError: If k exceeds the number of rows of the smallest shard, if the mesh has no such
            axis, and as `high_recall_top_k`.
    """
    axis, shard_size = RowSharding.of(axis), rows.shape[0]
    num_padding = axis.size * shard_size - axis.total_rows(shard_size)
    k = check_range("k", k, 1, shard_size - num_padding, "the rows of the smallest shard")
    candidates = check_range(
        "candidates", candidates, k, axis.total_rows(shard_size), "from k to the number of rows"
    )
    shard_top = high_recall_top_k(
        x,
        rows,
        estimator,
        k=axis.padded_device_count(k, shard_size),
        candidates=axis.padded_device_count(candidates, shard_size),
        implementation=implementation,
    )
    return all_gather_top_k(shard_top, axis, shard_size, axis.per_device_count(k, shard_size), k)


def all_gather_top_k(
    shard_top: TopK, axis: RowSharding, shard_size: int, shard_k: int, k: int
) -> TopK:
    """Merge the results of all shards into one top-k. Call it inside `jax.shard_map`.

    Args:
        shard_top: Top-k of this device's shard, with indices within the shard.
        axis: How the rows are sharded.
        shard_size: Number of rows of the shard.
        shard_k: Number of rows that each device contributes.
        k: Number of rows to return for each query.

    Returns:
        The scores `(b, k)` and the global row indices `(b, k)`.
    """
    indices = axis.global_index(shard_top.indices, shard_size)
    if axis.num_rows is not None:
        shard_top = rerank(
            indices, jnp.where(indices < axis.num_rows, shard_top.values, -jnp.inf), shard_k
        )
        indices = shard_top.indices
    values, indices = all_gather_pairs(
        shard_top.values[:, :shard_k], indices[:, :shard_k].astype(jnp.int32), axis.name
    )
    return rerank(indices, values, k)


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def all_gather_pairs(
    values: Float[Array, "b k"], indices: Int[Array, "b k"], axis_name: str
) -> tuple[Float[Array, "b _"], Int[Array, "b _"]]:
    """Gather the values and indices of all devices along their last axis.

    They travel in one array of integers: one collective, since its time is nearly all latency.
    Integers have no derivative; that of the values is to gather their tangents.

    Args:
        values: Values of this device, float32 `(b, k)`.
        indices: Indices of this device, int32 `(b, k)`.
        axis_name: Name of the mesh axis.

    Returns:
        The values and the indices of all devices, `(b, k)` times the number of devices.
    """
    packed = jnp.stack([jax.lax.bitcast_convert_type(values, jnp.int32), indices])
    gathered = jax.lax.all_gather(packed, axis_name, axis=2, tiled=True)
    return jax.lax.bitcast_convert_type(gathered[0], jnp.float32), gathered[1]


@all_gather_pairs.defjvp
def all_gather_pairs_jvp(axis_name: str, primals: tuple, tangents: tuple) -> tuple:
    """Return `all_gather_pairs` and its tangents."""
    values, indices = all_gather_pairs(*primals, axis_name)
    value_tangents = jax.lax.all_gather(tangents[0], axis_name, axis=1, tiled=True)
    return (values, indices), (value_tangents, np.zeros(indices.shape, jax.dtypes.float0))


def with_fingerprint_of(estimator: Any, rows: Rows | Blocks | Quantized) -> Any:
    """Return the estimator with the fingerprint of the sharded rows.

    Args:
        estimator: Sharded estimator.
        rows: Rows in their sharded order.

    Returns:
        The estimator with its new fingerprint. With `Quantized` rows it is returned as it is, since
        rows and estimator both keep their fingerprints.

    Raises:
        ValueError: If the estimator has no `with_fingerprint`, such as one that stores some of the
            rows.
    """
    if not hasattr(estimator, "with_fingerprint"):
        raise ValueError(
            f"{type(estimator).__name__} over several devices: expected LowRank or Quantized, "
            "which can be parted"
        )
    # Quantized rows keep their fingerprint, and so does their estimator.
    if isinstance(rows, Quantized):
        return estimator
    return estimator.with_fingerprint(
        fingerprint(rows.reshape(len(rows), -1)[:, : estimator.shape[1]])
    )

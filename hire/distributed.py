"""DA-TOP-k: the top-k of rows that lie on several devices. Each finds its own, and only values and indices travel.

On JAX's own engine: rows are arrays sharded over an axis of the mesh that jax.set_mesh has set.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from hire.axes import Array, Blocks, Indices, Queries, Rows
from hire.estimators import Estimator, Quantized, fingerprint
from hire.outliers import Outliers
from hire.search import Cascade, best_of, high_recall_top_k
from hire.topk import TopK, check_count


def fair_share(count: int, devices: int, slack: float | int) -> int:
    """What each of so many devices gives of `count`: an even share and `slack` standard deviations of a fair deal, at most all."""
    if slack == math.inf:
        return count
    return min(count, math.ceil(count / devices + slack * math.sqrt(count / devices * (1 - 1 / devices))))


@dataclass(frozen=True)
class Axis:
    """How rows lie over the axis `name` of the mesh, and how much more than its share of an answer a device gives.

    Device i of s holds rows i m/s and on, or, `dealt` like cards, rows i, i + s, i + 2 s and so on. `slack` is in standard
    deviations of what a fair deal would give a device: with math.inf each gives as much as is asked of all, and nothing is missed
    that it has found. Rows from number `rows` on fill the last device up and are never picked (None: there are none).
    """

    name: str
    slack: float | int = 3.0
    dealt: bool = False
    rows: int | None = None

    @classmethod
    def of(cls, axis: "str | Axis") -> "Axis":
        return cls(axis) if isinstance(axis, str) else axis

    @property
    def size(self) -> int:
        """Devices of the axis. Raises ValueError without a mesh, or when it has no such axis."""
        mesh = jax.sharding.get_abstract_mesh()
        if self.name not in mesh.axis_names:
            known = f"one of {', '.join(mesh.axis_names)}, the axes of the mesh" if mesh.axis_names else "it within jax.set_mesh"
            raise ValueError(f"axis = {self.name!r}: expected {known}")
        return mesh.shape[self.name]

    def share(self, count: int, most: int) -> int:
        """How many of `count` a device gives that holds `most`."""
        return min(fair_share(count, self.size, self.slack), most)

    def with_filling(self, count: int, held: int) -> int:
        """How many of `count` a device looks for that holds `held`: its share, and what may be filling among them."""
        return min(self.share(count, held) + self.size * held - self.total(held), held)

    def stored(self, rows: Indices, total: int) -> Indices:
        """Where rows lie in the array of all, of so many, by their numbers: `laid` has moved them."""
        return rows % self.size * (total // self.size) + rows // self.size if self.dealt else rows

    def total(self, held: int) -> int:
        """How many rows there are, filling left out, when every device holds so many."""
        return self.size * held if self.rows is None else self.rows

    def whole(self, own: Indices, held: int) -> Indices:
        """The numbers among all rows of a device's own rows, of which it holds so many. Inside jax.shard_map."""
        place = jax.lax.axis_index(self.name)
        return own * self.size + place if self.dealt else own + place * held

    def laid(self, rows: Array, group: int = 1) -> Array:
        """Rows (m, …) filled up with zeros and put on the devices, dealt or not, in groups of so many that stay together."""
        s, each = self.size, rows.shape[1:]
        filling = -len(rows) % (s * group)
        if filling:
            rows = jnp.concatenate([rows, jnp.zeros((filling, *each), rows.dtype)])
        if self.dealt:
            rows = rows.reshape(-1, s, group, *each).swapaxes(0, 1).reshape(-1, *each)
        return jax.device_put(rows, P(self.name))

    def put(self, part: Any, group: int = 1) -> Any:
        """`laid` of rows, or of what an estimator holds of every row; the rest of it goes to every device."""
        leaves, tree = jax.tree.flatten(part)
        placed = [
            jax.device_put(leaf, P()) if spec == P() else self.laid(leaf, group)
            for leaf, spec in zip(leaves, self.specs(part), strict=True)
        ]
        return tree.unflatten(placed)

    def specs(self, part: Any) -> list[P]:
        """Where the arrays of rows, or of an estimator, lie: all by rows, but scalars, fingerprints and projections."""
        paths, _ = jax.tree_util.tree_flatten_with_path(part)
        told = [(jnp.ndim(leaf), {getattr(key, "name", "") for key in path}) for path, leaf in paths]
        return [P(self.name) if dims and not names & {"projection", "fingerprint"} else P() for dims, names in told]

    def mapped(self, function: Callable, parts: dict[str, Any], *arrays: Any) -> Any:
        """function(parts, *arrays) on every device, with its own rows of the parts and all of the arrays; it gives all the same.

        Raises ValueError when the devices cannot hold equally many rows.
        """
        for name, part in parts.items():
            if part is not None and part.shape[0] % self.size:
                raise ValueError(
                    f"{name} of {part.shape[0]} rows over {self.size} devices: expected a multiple; `sharded` fills them up"
                )
        leaves, tree = jax.tree.flatten(parts)

        def own(leaves: list[Array], *arrays: Any) -> Any:
            return function(tree.unflatten(leaves), *arrays)

        specs = self.specs(parts), *(P() for _ in arrays)
        return jax.shard_map(own, in_specs=specs, out_specs=P(), axis_names={self.name}, check_vma=False)(leaves, *arrays)


def da_top_k(
    x: Queries,
    rows: Rows | Blocks | Quantized,
    estimator: Estimator,
    *,
    k: int,
    candidates: int,
    axis: str | Axis,
    form: str = "auto",
) -> TopK:
    """DA-TOP-k, inside jax.shard_map: `high_recall_top_k` of rows of which this device holds (m/s, d), the same on every device.

    x (b, d) are the same queries everywhere, k and candidates (k') are of all rows, indices (b, k) their numbers among them. Each
    device nominates and scores its share of the candidates and gives its share of the k, as Axis says: at most s k values and
    indices a query, 8 bytes each, travel, whatever the number of rows (PAPER claim da-top-k). `expected_recall`, with the devices
    as its buckets, says what is lost by giving less than k.

    Raises ValueError when k is more than the smallest shard holds, for an axis that is not of the mesh, and as high_recall_top_k.
    """
    axis, held = Axis.of(axis), rows.shape[0]
    empty = axis.size * held - axis.total(held)
    k = check_count("k", k, 1, held - empty, "the rows of the smallest shard")
    candidates = check_count("candidates", candidates, k, axis.total(held), "from k to the number of rows")
    own = high_recall_top_k(
        x, rows, estimator, k=axis.with_filling(k, held), candidates=axis.with_filling(candidates, held), form=form
    )
    return merged(own, axis, held, axis.share(k, held), k)


def merged(own: TopK, axis: Axis, held: int, own_k: int, k: int) -> TopK:
    """The k best of what every device found among its own rows, of which it gives its own_k best. Inside jax.shard_map."""
    indices = axis.whole(own.indices, held)
    if axis.rows is not None:
        own = best_of(indices, jnp.where(indices < axis.rows, own.values, -jnp.inf), own_k)
        indices = own.indices
    # One array, so that there is one collective: what it takes is nearly all latency.
    bits = jax.lax.bitcast_convert_type(own.values[:, :own_k], jnp.int32)
    travels = jnp.stack([bits, indices[:, :own_k].astype(jnp.int32)])
    found = jax.lax.all_gather(travels, axis.name, axis=2, tiled=True)
    return best_of(found[1], jax.lax.bitcast_convert_type(found[0], jnp.float32), k)


def told_again(estimator: Any, rows: Rows | Blocks | Quantized) -> Any:
    """The estimator with the fingerprint of the rows as they lie now. Raises ValueError for one that keeps some of all rows."""
    if isinstance(estimator, Cascade | Outliers):
        raise ValueError(f"{type(estimator).__name__} over several devices: expected LowRank or Quantized, which can be parted")
    if isinstance(rows, Quantized):  # which keep theirs, as it does
        return estimator
    flat = rows.reshape(len(rows), -1)[:, : estimator.shape[1]]
    return replace(estimator, fingerprint=fingerprint(flat))

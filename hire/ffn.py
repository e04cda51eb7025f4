"""HiRE-FFN: of the groups of neurons in a feed-forward layer, those that score best, found without reading the others."""

from collections.abc import Callable
from dataclasses import field, replace
from typing import Any

import jax
import jax.numpy as jnp

from hire.axes import AnyArray, Array, Float, Indices, Int, Queries, Rows, States
from hire.distributed import Axis, fair_share, told_again
from hire.estimators import (
    Estimator,
    Quantized,
    row_nbytes,
    row_scores,
    row_scores_at,
    row_sums,
    row_sums_at,
    scores_among,
    sums_among,
)
from hire.kernels import groups as group_kernel
from hire.kernels.form import by_form, check_form
from hire.pytrees import pytree
from hire.search import check_fitted, check_queries, check_search, for_any_lead, nominate, on_device
from hire.topk import check_count, exact_top_k, group_scores, keep_groups, kth_score


def activate(up: Float[Array, "*b f"], gate: Float[Array, "*b f"] | None = None) -> Float[Array, "*b f"]:
    """What neurons pass on: ReLU of the up products, or (gated) tanh GELU of the gate products times them."""
    return jax.nn.relu(up) if gate is None else jax.nn.gelu(gate, approximate=True) * up


ACTIVATIONS = ("auto", "relu", "gelu_tanh")


@pytree
class HireFFN:
    """HiRE-FFN: a feed-forward layer over `up`, `down` and perhaps `gate`, each (f, d), that keeps k of its groups of `group_size`
    neurons (PAPER claims ffn-speedup, group-sparsity and overlap; how groups are scored and selections shared is our choice).

    The first `common` groups are the common path (static overlap): always computed, never predicted. Of the others the estimator
    nominates `candidates` (k'), their exact activations are computed, the k - common best are kept, and `down` is read for those.
    The estimator is of the neurons beyond the common path: of `up`, or of `gate` where there is one; with `up_estimator` a gated
    layer is predicted from both. With `shared` the queries of a call are tokens that are alike (dynamic overlap): candidates are
    nominated once, from their `pooled` estimated scores, and read once in both matrices; each query keeps its own best among them.
    `form` is "plain" JAX, the TPU "kernel", which takes layers without gate and groups of 8 to 128, or "auto", that one on a TPU.
    The matrices may be Quantized, too, in plain JAX. The activation is "relu" without a gate and "gelu_tanh", of the gate, with one
    ("auto"): name the one that your model has, and a layer that is not supported (SwiGLU's "silu") is refused instead of computed
    wrongly.

    With an `axis`, whose mesh jax.set_mesh has set, the groups lie over several devices, as `sharded` deals them. Each keeps an
    even share of the k, of its share of the candidates, and nothing travels but the sum of their outputs; of the common path each
    has an equal part before its others.

    Raises ValueError when group_size does not divide f, when 0 <= common < k <= common + candidates <= groups does not hold, when
    shapes do not fit, for an estimator of other rows, for an up_estimator of a layer without gate, for another activation, or for a
    kernel that does not take the layer.
    """

    up: Rows | Quantized
    down: Rows | Quantized
    estimator: Estimator
    gate: Rows | Quantized | None = None
    up_estimator: Estimator | None = None
    group_size: int = field(metadata=dict(static=True), default=8)
    k: int = field(metadata=dict(static=True), default=1)
    candidates: int = field(metadata=dict(static=True), default=1)
    common: int = field(metadata=dict(static=True), default=0)
    shared: bool = field(metadata=dict(static=True), default=False)
    form: str = field(metadata=dict(static=True), default="auto")
    axis: str | Axis | None = field(metadata=dict(static=True), default=None)
    activation: str = field(metadata=dict(static=True), default="auto")

    def __post_init__(self):
        neurons, width = self.up.shape
        for name in ("group_size", "k", "candidates", "common"):
            object.__setattr__(self, name, check_count(name, getattr(self, name), 0, neurons, "the number of neurons"))
        check_count("group_size", self.group_size, 1, neurons, "the number of neurons")
        supported = "relu" if self.gate is None else "gelu_tanh"
        if self.activation not in ("auto", supported):
            raise ValueError(
                f"activation = {self.activation!r}: expected {supported!r}, all that a layer "
                f"{'without' if self.gate is None else 'with'} a gate is supported with so far"
            )
        if neurons % self.group_size:
            raise ValueError(f"group_size = {self.group_size}: expected a divisor of the {neurons} neurons")
        for name in ("down", "gate"):
            part = getattr(self, name)
            if part is not None and part.shape != self.up.shape:
                turned = "; a down projection stored (d, f) is passed as down.T" if part.shape == (width, neurons) else ""
                raise ValueError(f"{name} of shape {tuple(part.shape)}: expected {(neurons, width)}, as up is{turned}")
        for name in ("up", "down", "gate"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, on_device(getattr(self, name)))
        groups = neurons // self.group_size
        check_count("k", self.k, 1, groups, "the number of groups")
        check_count("common", self.common, 0, self.k - 1, "less than k, the groups that are kept")
        least, most = self.k - self.common, groups - self.common
        check_count("candidates", self.candidates, least, most, "from k - common to the groups beyond common")
        if self.gate is None and self.up_estimator is not None:
            raise ValueError("up_estimator without a gate: expected one estimator, of up")
        check_form(self.form)
        if self.form == "kernel" and not self.kernel_takes:
            raise ValueError(f"form = 'kernel': expected a layer without gate, and groups of 8 to 128 rows, not {self.group_size}")
        first = self.up if self.gate is None else self.gate
        for rows, copy in ((first, self.estimator), (self.up, self.up_estimator)):
            if copy is not None:
                beyond = rows[self.common * self.group_size :] if self.common else rows
                check_search(beyond, copy, 1, 1)
                if not (self.common and (self.axis is not None or isinstance(rows, Quantized))):  # which tell their rows as a whole
                    check_fitted(beyond, copy)

    def sharded(self, axis: str | Axis) -> "HireFFN":
        """The same with its groups dealt to the devices of an axis of the mesh. Raises ValueError if the common path cannot be, and
        for a layer that is sharded already.
        """
        if self.axis is not None:
            raise ValueError(f"layer over the axis {Axis.of(self.axis).name!r}: expected one that is not sharded yet")
        axis = replace(Axis.of(axis), dealt=True)
        if self.common % axis.size:
            raise ValueError(f"common = {self.common}: expected a multiple of {axis.size}, the devices of {axis.name!r}")
        matrices = {name: getattr(self, name) for name in ("up", "down", "gate")}
        laid: dict[str, Any] = {name: part if part is None else axis.put(part, self.group_size) for name, part in matrices.items()}
        for name, rows in (("estimator", "up" if self.gate is None else "gate"), ("up_estimator", "up")):
            copy = getattr(self, name)
            laid[name] = None if copy is None else told_again(axis.put(copy, self.group_size), laid[rows])
        return replace(self, **laid, axis=axis)

    def on_devices(self, x: Queries, method: Callable[["HireFFN", Queries], jax.Array]) -> jax.Array:
        """The sum over the devices of the axis of what a layer of each one's own groups gives."""
        axis = Axis.of(self.axis or "")

        def own(parts: dict[str, Any], x: Queries) -> jax.Array:
            groups, common = parts["up"].shape[0] // self.group_size, self.common // axis.size
            k = fair_share(self.k - self.common, axis.size, 0)  # a model that was trained to keep k has no use for more
            candidates = axis.share(self.candidates, groups - common)
            how: dict[str, Any] = dict(group_size=self.group_size, shared=self.shared, form=self.form)
            layer = HireFFN(**parts, k=k + common, candidates=candidates, common=common, **how)
            return jax.lax.psum(method(layer, x), axis.name)

        return axis.mapped(own, {name: getattr(self, name) for name in ("up", "down", "estimator", "gate", "up_estimator")}, x)

    @jax.jit
    def __call__(self, x: States) -> Float[Array, "*b d"]:
        """The layer's output (b, d), float32, for queries (b, d), or (*b, d) for (*b, d). Raises ValueError for another width."""
        check_queries(x, self.estimator)
        if self.axis is not None:
            return for_any_lead(lambda x: self.on_devices(x, HireFFN.__call__), x)

        def plain(layer: "HireFFN", x: Queries) -> Float[Array, "b d"]:
            return layer.spread(x) if layer.shared else layer.search(x)

        form = self.form if self.kernel_takes else "plain"
        return for_any_lead(lambda x: by_form(form, plain, HireFFN.at_once, self, x), x)

    @property
    def kernel_takes(self) -> bool:
        plain = self.gate is None and not isinstance(self.up, Quantized) and group_kernel.takes(self.group_size)
        return plain and self.up.dtype in (jnp.float32, jnp.bfloat16)

    def estimated(self, x: Queries) -> Float[Array, "b m"]:
        """Estimated score of every group beyond the common path."""
        first = self.estimator.scores(x)
        if self.gate is None:
            active = activate(first)
        else:
            active = activate(jnp.ones_like(first) if self.up_estimator is None else self.up_estimator.scores(x), first)
        return group_scores(active, self.group_size)

    def chosen(self, x: Queries) -> Indices:
        """The candidates (b, c), or with `shared` those (1, c) of all queries, by number in the whole layer."""
        estimated = self.estimated(x)
        if self.shared:
            estimated = self.pooled(estimated)[None]
        return nominate(estimated, self.candidates) + self.common

    def pooled(self, estimated: Float[Array, "*n b m"]) -> Float[Array, "*n m"]:
        """One score a group for queries that share candidates: the largest of theirs, each as a multiple of its query's k-th.

        So what any of them would keep comes before what none would, and the candidates come near the union of their own. A sum puts
        groups first that are middling for all.
        """
        last = kth_score(estimated, self.k - self.common)
        shares = estimated / jnp.where(last > 0, last, 1.0)
        known = jnp.all(jnp.isfinite(estimated), axis=-1, keepdims=True)  # a query that is not finite has no say for the others
        return jnp.max(jnp.where(known, shares, 0.0), axis=-2)

    def active(self, scores: Callable[[Rows | Quantized], jax.Array]) -> Float[Array, "*b f"]:
        """What the neurons pass on whose products with the queries `scores` takes from a matrix."""
        return activate(scores(self.up), None if self.gate is None else scores(self.gate))

    def search(self, x: Queries) -> Float[Array, "b d"]:
        """Every query with candidates of its own."""
        chosen = self.chosen(x)
        active = self.active(lambda rows: row_scores_at(x, rows, chosen, self.group_size))
        best = exact_top_k(group_scores(active, self.group_size), self.k - self.common).indices
        kept = jnp.take_along_axis(active, members(best, self.group_size), axis=1)
        groups = jnp.take_along_axis(chosen, best, axis=1)
        return row_sums_at(kept, self.down, groups, self.group_size) + self.common_path(x)

    def spread(self, x: Queries) -> Float[Array, "b d"]:
        """All queries with the same candidates."""
        chosen = self.chosen(x)[0]
        active = self.active(lambda rows: scores_among(x, rows, chosen, self.group_size))
        kept = keep_groups(active, group_scores(active, self.group_size), self.k - self.common)
        return sums_among(kept, self.down, chosen, self.group_size) + self.common_path(x)

    def at_once(self, x: Queries) -> Float[Array, "b d"]:
        """Both, by the kernel."""
        calls = x[None] if self.shared else x[:, None]
        how = dict(k=self.k - self.common, group=self.group_size)
        return group_kernel.ffn(calls, self.up, self.down, self.chosen(x), **how).reshape(x.shape) + self.common_path(x)

    def common_path(self, x: Queries) -> Float[Array, "b d"]:
        """What the groups of the common path add."""
        if not self.common:
            return jnp.zeros((len(x), self.down.shape[1]), jnp.float32)
        first = slice(self.common * self.group_size)
        return row_sums(self.active(lambda rows: row_scores(x, rows[first])), self.down[first])

    def masked(self, x: Queries, together: int = 1) -> Float[Array, "b d"]:
        """The same output from all neurons, the unread ones set to 0: the reference, and the faster way for many queries at once.

        With `shared`, every `together` queries are one call.
        """
        if self.axis is not None:
            return self.on_devices(x, lambda layer, x: layer.masked(x, together))
        active = self.active(lambda rows: row_scores(x, rows))
        scores = group_scores(active, self.group_size)[:, self.common :]
        if self.candidates < scores.shape[1]:
            estimated = self.estimated(x)
            if self.shared:
                calls = estimated.reshape(-1, together, estimated.shape[1])
                estimated = jnp.repeat(self.pooled(calls), together, axis=0)
            chosen, rows = nominate(estimated, self.candidates), jnp.arange(len(x))[:, None]
            scores = jnp.full_like(scores, -1.0).at[rows, chosen].set(jnp.take_along_axis(scores, chosen, axis=1))
        split = self.common * self.group_size
        beyond = keep_groups(active[:, split:], scores, self.k - self.common)
        return row_sums(jnp.concatenate([active[:, :split], beyond], axis=1), self.down)

    @property
    def bytes_read(self) -> int:
        """Bytes of weights that one call for one query reads, or a shared one for all: the estimators, the common path, the
        candidates, `down` of those kept (shared: of all candidates).
        """
        return self.bytes_for(1)

    def bytes_for(self, queries: int) -> int:
        """Bytes that a call for so many reads: the candidates are each query's own, unless they are shared."""
        copies = sum(copy.bytes_read(self.candidates) for copy in (self.estimator, self.up_estimator) if copy is not None)
        row = row_nbytes(self.up, self.up.shape[1]) * self.group_size
        before = 1 if self.gate is None else 2
        own = before * self.candidates + (self.candidates if self.shared else self.k - self.common)
        return copies + row * ((before + 1) * self.common + (1 if self.shared else queries) * own)


def common_first(usage: Float[AnyArray, " m"], group_size: int) -> Int[Array, " f"]:
    """The order of neurons (f,) that puts the most used groups (m,) first."""
    return members(jnp.argsort(-usage, stable=True), group_size)


def members(groups: Indices, group_size: int) -> Int[Array, "*b _"]:
    """The neurons (*b, c * group_size) of groups (*b, c)."""
    first = jnp.asarray(groups) * group_size
    return jnp.add.outer(first, jnp.arange(group_size, dtype=first.dtype)).reshape(*first.shape[:-1], -1)

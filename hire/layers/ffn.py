"""HiRE-FFN: a feed-forward layer that computes only its top-k groups of neurons.

The groups outside the candidates are not read.
"""

from collections.abc import Callable
from dataclasses import field, replace
from typing import Any

import jax
import jax.numpy as jnp

from hire.distributed import RowSharding, per_device_k, with_fingerprint_of
from hire.estimators.base import (
    Estimator,
    check_fitted,
    check_queries,
    check_search,
    map_leading_axes,
    nomination_scores,
    to_device,
)
from hire.estimators.quantized import Quantized
from hire.ops import cpu as cpu_kernels
from hire.ops.activations import activate, check_activation
from hire.ops.checks import check_range
from hire.ops.implementation import check_implementation, dispatch
from hire.ops.nomination import nominate_from_scores
from hire.ops.row_products import (
    row_nbytes,
    row_scores,
    row_scores_at,
    rows_of_groups,
    shared_scores_at,
    shared_sums_at,
    weighted_row_sum,
    weighted_row_sum_at,
)
from hire.ops.top_k import exact_top_k, group_scores, kth_largest, mask_top_groups
from hire.ops.tpu import group_ffn as group_kernel
from hire.pytrees import pytree
from hire.types import AnyArray, Array, Float, Indices, Int, Queries, Rows, States


@pytree
class HireFFN:
    """HiRE-FFN: a feed-forward layer that computes the top-k of its groups of neurons.

    A group is `group_size` consecutive neurons. The static groups (static overlap) come first: they
    are always computed and never predicted. The estimator nominates candidates among the other
    groups. The layer computes the exact activations of the candidates, selects the best
    `k - static_groups` of them, and reads `down` for these. PAPER claims ffn-speedup,
    group-sparsity and overlap; how groups are scored and selections are shared is our choice.

    With `share_selection` the queries of a call are similar tokens (dynamic overlap). The
    candidates are then nominated once, from the pooled estimated scores of all queries, and read
    once in both matrices. Each query still selects its best groups among them.

    With an `axis` the groups are sharded over devices: see `sharded`. `jax.set_mesh` must have set
    its mesh. Each device selects an even share of the k groups among its share of the candidates,
    and has an equal share of the static groups before its other groups. Only the sum of the
    outputs travels.

    Attributes:
        up: Up projection `(f, d)`: an array, or `Quantized` rows (not for the TPU kernel).
        down: Down projection `(f, d)`, as `up`.
        estimator: Estimator of the neurons after the static groups: of `gate` if the layer has one,
            else of `up`.
        gate: Gate projection `(f, d)`, as `up`. None for a layer without gate.
        up_estimator: Second estimator of a gated layer, of `up`. With it, `gate` and `up` are both
            predicted.
        group_size: Number of neurons in a group.
        k: Number of groups to compute for each query, static groups included.
        candidates: Number of groups that the estimator nominates (k').
        static_groups: Number of static groups.
        share_selection: Whether all queries of a call share one selection of candidates.
        implementation: "auto", "xla", "pallas" (the TPU kernel) or "cpu" (the CPU kernel). The TPU
            kernel supports layers without gate and groups of 8 to 128 neurons; the CPU kernel
            supports matrices that are all float32, all bfloat16, or all quantized to the same bits.
            "auto" uses the kernel of the platform if it supports the layer.
        axis: Mesh axis over which the groups are sharded. None for one device.
        activation: "relu" without a gate. A gated layer must name the activation of its gate:
            "gelu_tanh" as in Gemma, or "silu" as in Llama and Qwen.

    Raises:
        ValueError: If group_size does not divide f, if `0 <= static_groups < k <= static_groups +
            candidates <= groups` does not hold, if shapes do not fit, if an estimator was fitted to
            other rows, if a layer without gate has an up_estimator, if the activation is missing or
            not supported, or if "pallas" is forced on a layer that the kernel does not support.
    """

    up: Rows | Quantized
    down: Rows | Quantized
    estimator: Estimator
    gate: Rows | Quantized | None = None
    up_estimator: Estimator | None = None
    group_size: int = field(metadata=dict(static=True), default=8)
    k: int = field(metadata=dict(static=True), default=1)
    candidates: int = field(metadata=dict(static=True), default=1)
    static_groups: int = field(metadata=dict(static=True), default=0)
    share_selection: bool = field(metadata=dict(static=True), default=False)
    implementation: str = field(metadata=dict(static=True), default="auto")
    axis: str | RowSharding | None = field(metadata=dict(static=True), default=None)
    activation: str | None = field(metadata=dict(static=True), default=None)

    def __post_init__(self):
        num_neurons, width = self.up.shape
        for name in ("group_size", "k", "candidates", "static_groups"):
            object.__setattr__(
                self,
                name,
                check_range(name, getattr(self, name), 0, num_neurons, "the number of neurons"),
            )
        check_range("group_size", self.group_size, 1, num_neurons, "the number of neurons")
        activation = check_activation(self.activation, self.gate is not None)
        object.__setattr__(self, "activation", activation)
        if num_neurons % self.group_size:
            raise ValueError(
                f"group_size = {self.group_size}: expected a divisor of the {num_neurons} neurons"
            )
        for name in ("down", "gate"):
            matrix = getattr(self, name)
            if matrix is not None and matrix.shape != self.up.shape:
                hint = (
                    "; a down projection stored (d, f) is passed as down.T"
                    if matrix.shape == (width, num_neurons)
                    else ""
                )
                raise ValueError(
                    f"{name} of shape {tuple(matrix.shape)}: expected {(num_neurons, width)}, "
                    f"as up is{hint}"
                )
        for name in ("up", "down", "gate"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, to_device(getattr(self, name)))
        num_groups = num_neurons // self.group_size
        check_range("k", self.k, 1, num_groups, "the number of groups")
        check_range(
            "static_groups",
            self.static_groups,
            0,
            self.k - 1,
            "less than k, the groups that are kept",
        )
        min_candidates, max_candidates = (
            self.k - self.static_groups,
            num_groups - self.static_groups,
        )
        check_range(
            "candidates",
            self.candidates,
            min_candidates,
            max_candidates,
            "from k - static_groups to the groups beyond the static ones",
        )
        if self.gate is None and self.up_estimator is not None:
            raise ValueError("up_estimator without a gate: expected one estimator, of up")
        check_implementation(self.implementation)
        if self.implementation == "pallas" and not self.is_pallas_supported:
            raise ValueError(
                "implementation = 'pallas': expected a layer without gate, and groups of 8 to 128 "
                "rows, not "
                f"{self.group_size}"
            )
        if self.implementation == "cpu" and not self.is_cpu_supported:
            types = ", ".join(str(getattr(self, name).dtype) for name in ("up", "down"))
            raise ValueError(
                "implementation = 'cpu': expected matrices that are all float32, all bfloat16 or "
                f"all quantized alike, not {types}"
            )
        predicted = self.up if self.gate is None else self.gate
        for rows, estimator in ((predicted, self.estimator), (self.up, self.up_estimator)):
            if estimator is not None:
                dynamic_rows = (
                    rows[self.static_groups * self.group_size :] if self.static_groups else rows
                )
                check_search(dynamic_rows, estimator, 1, 1)
                # The fingerprint of a sharded or Quantized matrix covers all its rows. The rows
                # after the static groups cannot be checked alone.
                if not (
                    self.static_groups and (self.axis is not None or isinstance(rows, Quantized))
                ):
                    check_fitted(dynamic_rows, estimator)

    def sharded(self, axis: str | RowSharding) -> "HireFFN":
        """Return the same layer with its groups interleaved over the devices of a mesh axis.

        Args:
            axis: Name of the mesh axis, or a `RowSharding`.

        Returns:
            The sharded layer.

        Raises:
            ValueError: If the number of static groups is not a multiple of the number of devices,
                or if the layer is already sharded.
        """
        if self.axis is not None:
            raise ValueError(
                f"layer over the axis {RowSharding.of(self.axis).name!r}: expected one that is not "
                "sharded yet"
            )
        axis = replace(RowSharding.of(axis), interleaved=True)
        if self.static_groups % axis.size:
            raise ValueError(
                f"static_groups = {self.static_groups}: expected a multiple of {axis.size}, "
                f"the devices of {axis.name!r}"
            )
        matrices = {name: getattr(self, name) for name in ("up", "down", "gate")}
        parts: dict[str, Any] = {
            name: matrix if matrix is None else axis.shard_pytree(matrix, self.group_size)
            for name, matrix in matrices.items()
        }
        for name, matrix_name in (
            ("estimator", "up" if self.gate is None else "gate"),
            ("up_estimator", "up"),
        ):
            estimator = getattr(self, name)
            parts[name] = (
                None
                if estimator is None
                else with_fingerprint_of(
                    axis.shard_pytree(estimator, self.group_size), parts[matrix_name]
                )
            )
        return replace(self, **parts, axis=axis)

    def on_devices(
        self, x: Queries, method: Callable[["HireFFN", Queries], jax.Array]
    ) -> jax.Array:
        """Run a method on each device's shard and sum the results.

        Args:
            x: Queries `(b, d)`, the same on every device.
            method: Function of a layer (this device's groups) and the queries.

        Returns:
            The sum over all devices.
        """
        axis = RowSharding.of(self.axis or "")

        def on_one_device(parts: dict[str, Any], x: Queries) -> jax.Array:
            num_groups, static_groups = (
                parts["up"].shape[0] // self.group_size,
                self.static_groups // axis.size,
            )
            # No oversampling: a model trained with k groups has no use for more.
            k = per_device_k(self.k - self.static_groups, axis.size, 0)
            candidates = axis.per_device_count(self.candidates, num_groups - static_groups)
            options: dict[str, Any] = dict(
                group_size=self.group_size,
                share_selection=self.share_selection,
                implementation=self.implementation,
                activation=self.activation,
            )
            layer = HireFFN(
                **parts,
                k=k + static_groups,
                candidates=candidates,
                static_groups=static_groups,
                **options,
            )
            return jax.lax.psum(method(layer, x), axis.name)

        return axis.shard_map(
            on_one_device,
            {
                name: getattr(self, name)
                for name in ("up", "down", "estimator", "gate", "up_estimator")
            },
            x,
        )

    @jax.jit
    def __call__(self, x: States) -> Float[Array, "*b d"]:
        """Return the layer's output.

        Args:
            x: Queries `(b, d)` or `(*b, d)`.

        Returns:
            Float32 outputs of the same shape.

        Raises:
            ValueError: If the queries have another width.
        """
        check_queries(x, self.estimator)
        if self.axis is not None:
            return map_leading_axes(lambda x: self.on_devices(x, HireFFN.__call__), x)

        def plain(layer: "HireFFN", x: Queries) -> Float[Array, "b d"]:
            return (
                layer._forward_shared(x) if layer.share_selection else layer._forward_per_query(x)
            )

        kernels = dict(
            tpu=HireFFN._forward_pallas if self.is_pallas_supported else None,
            cpu=HireFFN._forward_cpu if self.is_cpu_supported else None,
        )
        return map_leading_axes(
            lambda x: dispatch(self.implementation, plain, self, x, **kernels), x
        )

    @property
    def is_cpu_supported(self) -> bool:
        """Whether the CPU kernel runs here and supports this layer."""
        matrices = [self.up, self.down] + ([] if self.gate is None else [self.gate])
        return cpu_kernels.is_available() and cpu_kernels.load("group_ffn").is_supported(*matrices)

    @property
    def is_pallas_supported(self) -> bool:
        """Whether the TPU kernel supports this layer."""
        fits_kernel = (
            self.gate is None
            and not isinstance(self.up, Quantized)
            and group_kernel.is_supported(self.group_size)
        )
        return fits_kernel and self.up.dtype in (jnp.float32, jnp.bfloat16)

    def estimated_group_scores(self, x: Queries) -> Float[Array, "b m"]:
        """Return the estimated scores of all groups after the static groups.

        Args:
            x: Queries `(b, d)`.

        Returns:
            The estimated scores `(b, m)`.
        """
        estimated = nomination_scores(self.estimator, x)
        if self.gate is None:
            active = activate(estimated, None, "relu")
        else:
            up = (
                jnp.ones_like(estimated)
                if self.up_estimator is None
                else nomination_scores(self.up_estimator, x)
            )
            active = activate(up, estimated, self.activation or "")
        return group_scores(active, self.group_size)

    def nominate_groups(self, x: Queries) -> Indices:
        """Nominate candidates and return their group indices in the full layer.

        Args:
            x: Queries `(b, d)`.

        Returns:
            The candidates `(b, c)` of each query. With `share_selection`, the candidates `(1, c)`
            of all queries.
        """
        estimated = self.estimated_group_scores(x)
        if self.share_selection:
            estimated = self.pool_scores(estimated)[None]
        return nominate_from_scores(estimated, self.candidates) + self.static_groups

    def pool_scores(self, estimated: Float[Array, "*n b m"]) -> Float[Array, "*n m"]:
        """Pool the estimated scores of queries that share candidates.

        The pooled score of a group is the maximum over the queries. Each query's scores are first
        divided by its k-th largest score. Groups that some query would select therefore come before
        groups that none would select, and the candidates come near the union of the queries' top
        groups. A sum would put groups first that score moderately for all queries.

        Args:
            estimated: Estimated scores of the queries `(*n, b, m)`.

        Returns:
            The pooled scores `(*n, m)`.
        """
        kth_value = kth_largest(estimated, self.k - self.static_groups)
        relative = estimated / jnp.where(kth_value > 0, kth_value, 1.0)
        # A query with scores that are not finite does not affect the other queries.
        is_finite = jnp.all(jnp.isfinite(estimated), axis=-1, keepdims=True)
        return jnp.max(jnp.where(is_finite, relative, 0.0), axis=-2)

    def activations(self, scores: Callable[[Rows | Quantized], jax.Array]) -> Float[Array, "*b f"]:
        """Return the activations of the neurons that `scores` multiplies with the queries.

        Args:
            scores: Function that returns the products of the queries and some rows of a matrix.

        Returns:
            The activations `(*b, f)`.
        """
        gate = None if self.gate is None else scores(self.gate)
        return activate(scores(self.up), gate, self.activation or "")

    def _forward_per_query(self, x: Queries) -> Float[Array, "b d"]:
        """Compute the output `(b, d)` with separate candidates for each query."""
        candidates = self.nominate_groups(x)
        active = self.activations(lambda rows: row_scores_at(x, rows, candidates, self.group_size))
        top = exact_top_k(
            group_scores(active, self.group_size), self.k - self.static_groups
        ).indices
        top_activations = jnp.take_along_axis(active, rows_of_groups(top, self.group_size), axis=1)
        top_groups = jnp.take_along_axis(candidates, top, axis=1)
        return weighted_row_sum_at(
            top_activations, self.down, top_groups, self.group_size
        ) + self.static_path(x)

    def _forward_shared(self, x: Queries) -> Float[Array, "b d"]:
        """Compute the output `(b, d)` with the same candidates for all queries."""
        candidates = self.nominate_groups(x)[0]
        active = self.activations(
            lambda rows: shared_scores_at(x, rows, candidates, self.group_size)
        )
        top_activations = mask_top_groups(
            active, group_scores(active, self.group_size), self.k - self.static_groups
        )
        return shared_sums_at(
            top_activations, self.down, candidates, self.group_size
        ) + self.static_path(x)

    def _forward_pallas(self, x: Queries) -> Float[Array, "b d"]:
        """Compute the output `(b, d)` with the kernel, with shared or separate candidates."""
        calls = x[None] if self.share_selection else x[:, None]
        options = dict(k=self.k - self.static_groups, group=self.group_size)
        return group_kernel.ffn(
            calls, self.up, self.down, self.nominate_groups(x), **options
        ).reshape(x.shape) + self.static_path(x)

    def _forward_cpu(self, x: Queries) -> Float[Array, "b d"]:
        """Compute the output `(b, d)` with the CPU kernel, with shared or separate candidates."""
        groups = cpu_kernels.load("group_nomination").nominate(
            self.estimated_group_scores(x),
            self.candidates,
            k=self.k - self.static_groups,
            share=self.share_selection,
            num_static=self.static_groups,
        )
        return cpu_kernels.load("group_ffn").ffn(
            x,
            self.up,
            self.down,
            groups,
            group=self.group_size,
            k=self.k,
            gate=self.gate,
            num_static=self.static_groups,
            activation=self.activation,
        )

    def static_path(self, x: Queries) -> Float[Array, "b d"]:
        """Return the contribution of the static groups to the output.

        Args:
            x: Queries `(b, d)`.

        Returns:
            The contribution `(b, d)`, float32.
        """
        if not self.static_groups:
            return jnp.zeros((len(x), self.down.shape[1]), jnp.float32)
        static_rows = slice(self.static_groups * self.group_size)
        return weighted_row_sum(
            self.activations(lambda rows: row_scores(x, rows[static_rows])), self.down[static_rows]
        )

    def dense_reference(self, x: States, tokens_per_selection: int = 1) -> Float[Array, "*b d"]:
        """Compute the same output from all neurons, with the unselected activations set to 0.

        This is the reference. It is also faster for many queries at once.

        Args:
            x: Queries `(b, d)` or `(*b, d)`.
            tokens_per_selection: Number of consecutive queries that form one call with
                `share_selection`.

        Returns:
            Float32 outputs of the same shape.
        """
        if not x.size:
            return jnp.zeros(x.shape, jnp.float32)
        queries = jnp.asarray(x).reshape(-1, x.shape[-1])
        return self._dense_reference(queries, tokens_per_selection).reshape(x.shape)

    def _dense_reference(self, x: Queries, tokens_per_selection: int) -> Float[Array, "b d"]:
        """Run `dense_reference` on queries with one leading axis."""
        if self.axis is not None:
            return self.on_devices(
                x, lambda layer, x: layer.dense_reference(x, tokens_per_selection)
            )
        active = self.activations(lambda rows: row_scores(x, rows))
        scores = group_scores(active, self.group_size)[:, self.static_groups :]
        if self.candidates < scores.shape[1]:
            estimated = self.estimated_group_scores(x)
            if self.share_selection:
                calls = estimated.reshape(-1, tokens_per_selection, estimated.shape[1])
                estimated = jnp.repeat(self.pool_scores(calls), tokens_per_selection, axis=0)
            candidates, rows = (
                nominate_from_scores(estimated, self.candidates),
                jnp.arange(len(x))[:, None],
            )
            scores = (
                jnp.full_like(scores, -1.0)
                .at[rows, candidates]
                .set(jnp.take_along_axis(scores, candidates, axis=1))
            )
        num_static = self.static_groups * self.group_size
        dynamic = mask_top_groups(active[:, num_static:], scores, self.k - self.static_groups)
        return weighted_row_sum(
            jnp.concatenate([active[:, :num_static], dynamic], axis=1), self.down
        )

    def bytes_read(self, batch: int = 1) -> int:
        """Return the bytes of weights that one call reads.

        They are the estimators, the static groups, the candidates, and `down` of the selected
        groups (with `share_selection`: of all candidates). Each query reads its candidates; with
        `share_selection` they are read once for all queries.

        Args:
            batch: Number of queries in the call.

        Returns:
            The number of bytes.
        """
        estimator_bytes = sum(
            estimator.bytes_read(self.candidates)
            for estimator in (self.estimator, self.up_estimator)
            if estimator is not None
        )
        group_bytes = row_nbytes(self.up, self.up.shape[1]) * self.group_size
        num_inputs = 1 if self.gate is None else 2
        groups_per_query = num_inputs * self.candidates + (
            self.candidates if self.share_selection else self.k - self.static_groups
        )
        return estimator_bytes + group_bytes * (
            (num_inputs + 1) * self.static_groups
            + (1 if self.share_selection else batch) * groups_per_query
        )


def order_by_usage(usage: Float[AnyArray, " m"], group_size: int) -> Int[Array, " f"]:
    """Return an order of the neurons that puts the most used groups first.

    Args:
        usage: Usage of each group `(m,)`.
        group_size: Number of neurons in a group.

    Returns:
        The neuron indices `(f,)` in the new order.
    """
    return rows_of_groups(jnp.argsort(-usage, stable=True), group_size)

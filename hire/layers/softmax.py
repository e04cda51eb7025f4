"""HiRE-Softmax: the top-k tokens of a vocabulary and their probabilities.

Most rows of the LM head are not read.
"""

from dataclasses import field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hire.distributed import RowSharding, all_gather_top_k, da_top_k, with_fingerprint_of
from hire.estimators.base import (
    Estimator,
    check_fitted,
    check_queries,
    check_search,
    map_leading_axes,
    to_device,
)
from hire.estimators.quantized import Quantized
from hire.ops.implementation import check_implementation
from hire.ops.normalizer import logsumexp_correction, take_ranks
from hire.ops.row_products import row_nbytes, row_scores_at
from hire.ops.top_k import TopK
from hire.pytrees import pytree
from hire.search import high_recall_top_k, rerank
from hire.types import AnyArray, Array, Blocks, Bool, Float, Int, Queries, Rows, States


class TopKWithNormalizer(NamedTuple):
    """The top-k tokens of each query and the estimated normaliser.

    The log-probabilities are `top.values - log_normalizer[:, None]`, in nats.

    Attributes:
        top: Logits and token indices `(b, k)`.
        log_normalizer: Log of the sum of exponentials over the vocabulary `(b,)`, in nats.
        normalizer_stderr: Expected standard error of `log_normalizer` `(b,)`: see
            `HireSoftmax.top_k_with_normalizer`.
    """

    top: TopK
    log_normalizer: Float[Array, " b"]
    normalizer_stderr: Float[Array, " b"]


@pytree
class HireSoftmax:
    """HiRE-Softmax: the top-k logits of an LM head (PAPER claim softmax-speedup).

    `softmax(hidden)` is already compiled. Inside another compiled function pass the softmax as an
    argument: `jax.jit(softmax)` would store the rows as constants in the program.

    With an `axis` the rows are sharded over devices (see `sharded`) and DA-TOP-k searches them.
    `jax.set_mesh` must have set its mesh. Nothing else changes.

    Attributes:
        rows: Rows `(v, d)` of the LM head, tied or not. JAX arrays are used without a copy; NumPy
            arrays are sent to the device once, when the softmax is built. With `Quantized` rows
            "exact" means the logits of those rows. On a TPU pass
            `hire.ops.tpu.row_scores.blocks` of the rows and quantize the estimator, so that the
            kernels can run.
        estimator: Estimator of the rows.
        k: Number of tokens to return for each query.
        candidates: Number of candidates (k').
        implementation: "auto", "xla" or "pallas", as in `high_recall_top_k`.
        axis: Mesh axis over which the rows are sharded. None for one device.

    Raises:
        ValueError: If `1 <= k <= candidates <= v` does not hold, if the estimator was fitted to
            other rows, or if the implementation does not exist.
    """

    rows: Rows | Blocks | Quantized
    estimator: Estimator
    k: int = field(metadata=dict(static=True))
    candidates: int = field(metadata=dict(static=True))
    implementation: str = field(metadata=dict(static=True), default="auto")
    axis: str | RowSharding | None = field(metadata=dict(static=True), default=None)

    def __post_init__(self):
        k, candidates = check_search(self.rows, self.estimator, self.k, self.candidates)
        check_implementation(self.implementation)
        object.__setattr__(self, "rows", to_device(self.rows))
        object.__setattr__(self, "k", k)
        object.__setattr__(self, "candidates", candidates)
        check_fitted(self.rows, self.estimator)

    def sharded(self, axis: str | RowSharding) -> "HireSoftmax":
        """Return the same softmax with its rows sharded over a mesh axis, as `RowSharding` says.

        The rows are padded if their number is not a multiple of the number of devices.

        Args:
            axis: Name of the mesh axis, or a `RowSharding`.

        Returns:
            The sharded softmax.

        Raises:
            ValueError: If the softmax is already sharded.
        """
        if self.axis is not None:
            raise ValueError(
                f"softmax over the axis {RowSharding.of(self.axis).name!r}: expected one that is "
                "not "
                "sharded yet"
            )
        axis, v = RowSharding.of(axis), self.rows.shape[0]
        axis = replace(axis, num_rows=v if v % axis.size else None)
        rows = axis.shard_pytree(self.rows)
        return replace(
            self,
            rows=rows,
            estimator=with_fingerprint_of(axis.shard_pytree(self.estimator), rows),
            axis=axis,
        )

    @jax.jit
    def __call__(self, hidden: States) -> TopK:
        """Return the top-k tokens of hidden states.

        Args:
            hidden: Hidden states `(b, d)` or `(*b, d)`, after the model's final norm.

        Returns:
            The logits and token indices `(b, k)`.

        Raises:
            ValueError: If the hidden states have another width.
        """
        check_queries(hidden, self.estimator)
        options: dict[str, Any] = dict(
            k=self.k, candidates=self.candidates, implementation=self.implementation
        )
        if self.axis is None:
            return high_recall_top_k(hidden, self.rows, self.estimator, **options)
        axis = RowSharding.of(self.axis)
        return map_leading_axes(
            lambda x: axis.shard_map(
                lambda shard, x: da_top_k(x, **shard, **options, axis=axis), self.sharded_parts, x
            ),
            hidden,
        )

    @property
    def sharded_parts(self) -> dict[str, Any]:
        """The parts that are sharded over an axis."""
        return dict(rows=self.rows, estimator=self.estimator)

    @jax.jit
    def top_k_with_normalizer(self, hidden: States) -> TopKWithNormalizer:
        """Return the top-k tokens and the estimated log of the sum over the vocabulary.

        The candidates count with their exact logits. The other tokens (the tail) count with their
        estimated logits plus a correction, because errors that cancel in a logit do not cancel in
        a sum of exponentials. The lower half of the candidates gives the correction for each query:
        the estimator selected them like rows of the tail, but their exact logits are known.

        The standard error is the tail's share of the probability times the error of the correction.
        This error combines the sampling error and the drift from the quarter of the candidates
        above. Our choice: the paper names no normaliser.

        Args:
            hidden: Hidden states `(b, d)`.

        Returns:
            The top-k tokens, which equal those of a call, and the log normaliser in nats.

        Raises:
            ValueError: If the hidden states have another width.
        """
        check_queries(hidden, self.estimator)
        if self.axis is None:
            return map_leading_axes(self._top_k_with_normalizer, hidden)
        axis = RowSharding.of(self.axis)
        return map_leading_axes(
            lambda x: axis.shard_map(self._sharded_top_k_with_normalizer, self.sharded_parts, x),
            hidden,
        )

    def _sharded_top_k_with_normalizer(
        self, shard: dict[str, Any], hidden: Queries
    ) -> TopKWithNormalizer:
        """Run `top_k_with_normalizer` on one device of the axis.

        Each device estimates the sum over its shard, from the same candidates as `da_top_k`.
        """
        axis, shard_size = RowSharding.of(self.axis or ""), shard["rows"].shape[0]
        k, candidates = (
            axis.padded_device_count(count, shard_size) for count in (self.k, self.candidates)
        )
        is_real = jnp.asarray(
            axis.global_index(jnp.arange(shard_size), shard_size) < axis.total_rows(shard_size)
        )
        shard_result = HireSoftmax(
            **shard, k=k, candidates=candidates, implementation=self.implementation
        )._top_k_with_normalizer(hidden, is_real)
        log_sums, errors = jax.lax.all_gather(
            jnp.stack([shard_result.log_normalizer, shard_result.normalizer_stderr]),
            axis.name,
            axis=1,
        )
        log_normalizer = jax.nn.logsumexp(log_sums, axis=0)
        top = all_gather_top_k(
            shard_result.top, axis, shard_size, axis.per_device_count(self.k, shard_size), self.k
        )
        return TopKWithNormalizer(
            top,
            log_normalizer,
            jnp.linalg.norm(jnp.exp(log_sums - log_normalizer[None]) * errors, axis=0),
        )

    def _top_k_with_normalizer(
        self, hidden: Queries, real: Bool[Array, " m"] | None = None
    ) -> TopKWithNormalizer:
        """Run `top_k_with_normalizer` on rows of which only the `real` ones count.

        The other rows are padding. By default all rows count.
        """
        candidates = self.estimator.nominate(
            hidden, self.candidates, implementation=self.implementation
        )
        estimated, exact = self.estimator.scores(hidden), self.exact_logits(hidden, candidates)
        if real is not None:
            estimated, exact = (
                jnp.where(real[None], estimated, -jnp.inf),
                jnp.where(real[candidates], exact, -jnp.inf),
            )
        guessed = jnp.take_along_axis(estimated, candidates, axis=1)
        half = self.candidates // 2
        correction, sampling_error = logsumexp_correction(*take_ranks(exact, guessed, half))
        upper_correction, _ = logsumexp_correction(
            *take_ranks(exact, guessed, half // 2, max(half, 1))
        )
        tail_scores = estimated.at[jnp.arange(len(hidden))[:, None], candidates].set(-jnp.inf)
        log_tail = jax.nn.logsumexp(tail_scores, axis=1) + correction
        log_normalizer = jnp.logaddexp(jax.nn.logsumexp(exact, axis=1), log_tail)
        # A shard of padding only has no tail, and -inf minus -inf would be NaN.
        has_tail = log_tail > -jnp.inf
        tail_share = jnp.where(
            has_tail, jnp.exp(log_tail - jnp.where(has_tail, log_normalizer, 0)), 0
        )
        return TopKWithNormalizer(
            rerank(candidates, exact, self.k),
            log_normalizer,
            tail_share * jnp.hypot(sampling_error, correction - upper_correction),
        )

    @jax.jit
    def exact_logits(self, hidden: Queries, tokens: Int[AnyArray, "b n"]) -> Float[Array, "b n"]:
        """Return the exact logits of tokens. Only the rows of these tokens are read.

        Args:
            hidden: Hidden states `(b, d)`.
            tokens: Token indices `(b, n)`.

        Returns:
            The exact logits `(b, n)`.

        Raises:
            ValueError: If the hidden states have another width.
        """
        check_queries(hidden, self.estimator)
        if self.axis is not None:
            return RowSharding.of(self.axis).shard_map(
                self._sharded_exact_logits, self.sharded_parts, hidden, tokens
            )
        return row_scores_at(hidden, self.rows, tokens, implementation=self.implementation)

    def _sharded_exact_logits(
        self, shard: dict[str, Any], hidden: Queries, tokens: Int[AnyArray, "b n"]
    ) -> Float[Array, "b n"]:
        """Run `exact_logits` on one device of the axis.

        The device has the rows of some tokens only; the sum over all devices has all tokens.
        """
        axis, shard_size = RowSharding.of(self.axis or ""), shard["rows"].shape[0]
        position = (
            axis.storage_index(tokens, axis.size * shard_size)
            - jax.lax.axis_index(axis.name) * shard_size
        )
        scores = row_scores_at(
            hidden,
            shard["rows"],
            jnp.clip(position, 0, shard_size - 1),
            implementation=self.implementation,
        )
        return jax.lax.psum(
            jnp.where((position >= 0) & (position < shard_size), scores, 0.0), axis.name
        )

    @jax.jit
    def log_probabilities(
        self, hidden: Queries, tokens: Int[AnyArray, "b n"]
    ) -> Float[Array, "b n"]:
        """Return the log-probabilities of tokens: exact logits minus the estimated normaliser.

        Args:
            hidden: Hidden states `(b, d)`.
            tokens: Token indices `(b, n)`.

        Returns:
            The log-probabilities `(b, n)`, in nats.

        Raises:
            ValueError: If the hidden states have another width.
        """
        return (
            self.exact_logits(hidden, tokens)
            - self.top_k_with_normalizer(hidden).log_normalizer[:, None]
        )

    def bytes_read(self, batch: int = 1) -> int:
        """Return the bytes of weights that one call reads, summed over all devices.

        They are the estimator, which all queries of a call share, and the exact rows of each
        query's candidates.

        Args:
            batch: Number of queries in the call.

        Returns:
            The number of bytes.
        """
        exact_bytes = self.candidates * row_nbytes(self.rows, self.estimator.shape[1])
        return self.estimator.bytes_read(self.candidates) + batch * exact_bytes

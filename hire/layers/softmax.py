"""HiRE-Softmax: the top-k tokens of a vocabulary and their probabilities.

Most rows of the LM head are not read.
"""

import functools
import math
from dataclasses import field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from hire.certify import Certified, check_error_bounds, prove_top_k
from hire.distributed import RowSharding, all_gather_top_k, da_top_k, with_fingerprint_of
from hire.estimators.base import (
    Estimator,
    check_fitted,
    check_queries,
    check_search,
    map_leading_axes,
    nomination_scores,
    to_device,
)
from hire.estimators.low_rank import LowRank
from hire.estimators.quantized import Quantized
from hire.layers.logit_adjustments import (
    LogitAdjustments,
    Penalties,
    checked_adjustments,
    count_tokens,
    penalized,
)
from hire.layers.logit_bounds import LARGEST_FACTOR, AdjustedLogits
from hire.ops.implementation import check_implementation
from hire.ops.nomination import nominate_from_scores
from hire.ops.normalizer import log_sum_exp, logsumexp_correction, take_ranks
from hire.ops.row_products import row_nbytes, row_scores_at
from hire.ops.soft_cap import cap_softly
from hire.ops.top_k import TopK, exact_top_k
from hire.pytrees import pytree
from hire.search import high_recall_top_k, rerank
from hire.types import AnyArray, Array, Blocks, Bool, Float, Indices, Int, Queries, Rows, States


class TopKWithNormalizer(NamedTuple):
    """The top-k tokens of each query and the estimated normaliser.

    The log-probabilities are `top.values - log_normalizer[:, None]`, in nats.

    Attributes:
        top: Logits and token indices `(b, k)`.
        log_normalizer: Log of the sum of exponentials over the vocabulary `(b,)`, in nats.
        normalizer_stderr: Expected standard error of `log_normalizer` `(b,)`: see
            `HireSoftmax.top_k_with_normalizer`. It has no gradient.
    """

    top: TopK
    log_normalizer: Float[Array, " b"]
    normalizer_stderr: Float[Array, " b"]


# Beyond every vocabulary: it is ranked behind all tokens with the logit -inf.
NO_TOKEN = 2**31 - 1


class AdjustedCandidates(NamedTuple):
    """Candidates and their exact logits after adjustments.

    Attributes:
        tokens: Token indices `(b, n)`: the nominated ones, then the penalised ones; `NO_TOKEN` for
            a repetition or padding.
        logits: Exact logits `(b, n)`; -inf for a token that is not allowed, and for `NO_TOKEN`.
        num_nominated: Number of tokens that the estimator has nominated.
    """

    tokens: Indices
    logits: Float[Array, "b n"]
    num_nominated: int


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
        bias: Bias of the LM head `(v,)`, which is added to the scores of the rows, or None.
        soft_cap: Logits become `soft_cap * tanh(logit / soft_cap)`, as in Gemma 2. 0 means none.

    Raises:
        ValueError: If `1 <= k <= candidates <= v` does not hold, if the estimator was fitted to
            other rows, if the implementation does not exist, if the bias is not one finite float a
            row, or if the soft cap is not a finite number of at least 0.
    """

    rows: Rows | Blocks | Quantized
    estimator: Estimator
    k: int = field(metadata=dict(static=True))
    candidates: int = field(metadata=dict(static=True))
    implementation: str = field(metadata=dict(static=True), default="auto")
    axis: str | RowSharding | None = field(metadata=dict(static=True), default=None)
    bias: Float[AnyArray, " v"] | None = None
    soft_cap: float = field(metadata=dict(static=True), default=0.0)

    def __post_init__(self):
        k, candidates = check_search(self.rows, self.estimator, self.k, self.candidates)
        check_implementation(self.implementation)
        if not 0 <= self.soft_cap < math.inf:
            raise ValueError(f"soft_cap = {self.soft_cap}: expected a finite number, 0 for none")
        if self.bias is not None:
            object.__setattr__(self, "bias", self._checked_bias(self.bias))
        object.__setattr__(self, "rows", to_device(self.rows))
        object.__setattr__(self, "k", k)
        object.__setattr__(self, "candidates", candidates)
        check_fitted(self.rows, self.estimator)

    def _checked_bias(self, bias: Float[AnyArray, " v"]) -> Float[Array, " v"]:
        """Return the bias as float32, or raise ValueError."""
        if bias.shape != self.rows.shape[:1] or not jnp.issubdtype(bias.dtype, jnp.floating):
            raise ValueError(
                f"bias of shape {bias.shape} and type {bias.dtype}: expected floats "
                f"({self.rows.shape[0]},), one a row"
            )
        # Inside jit, jnp would trace even a constant.
        with jax.ensure_compile_time_eval():
            if not isinstance(bias, Tracer) and not jnp.isfinite(bias).all():
                raise ValueError(
                    "bias: it holds a number that is not finite; pass mask= to forbid a token"
                )
        return jnp.asarray(bias).astype(jnp.float32)

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
            bias=None if self.bias is None else axis.shard_pytree(self.bias),
            estimator=with_fingerprint_of(axis.shard_pytree(self.estimator), rows),
            axis=axis,
        )

    def __call__(
        self,
        hidden: States,
        *,
        mask: Bool[AnyArray, "... v"] | None = None,
        logit_bias: Float[AnyArray, "... v"] | None = None,
        penalties: Penalties | None = None,
    ) -> TopK:
        """Return the top-k tokens of hidden states.

        The candidates are chosen by the estimated logits after all adjustments. A mask or a bias
        costs a pass over the estimated logits of the vocabulary, a mask also an exact selection
        among them: the allowed tokens of a mask may share their buckets.

        Args:
            hidden: Hidden states `(b, d)` or `(*b, d)`, after the model's final norm.
            mask: Tokens that are allowed `(v,)`, or `(*b, v)` for each query. Others get the logit
                -inf. If fewer than k tokens are allowed, the last ones of the answer have it too.
            logit_bias: Numbers to add to the logits `(v,)` or `(*b, v)`; -inf forbids a token.
            penalties: Penalties on the tokens of a text so far, which act on the model's logits.

        Returns:
            The logits and token indices `(b, k)`. Of equal logits among the candidates the lower
            token comes first.

        Raises:
            ValueError: If the hidden states have another width, if an adjustment does not fit (see
                `hire.layers.logit_adjustments`), or if a kernel is forced with a bias or a mask.
        """
        return self._top_k(hidden, self._adjustments(hidden, mask, logit_bias, penalties))

    def _adjustments(
        self, hidden: States, mask: Any, logit_bias: Any, penalties: Penalties | None
    ) -> LogitAdjustments:
        """Return the checked adjustments, with one leading axis."""
        check_queries(hidden, self.estimator)
        vocabulary = self.rows.shape[0]
        if self.axis is not None:
            axis = RowSharding.of(self.axis)
            vocabulary = axis.total_rows(vocabulary // axis.size)
        adjustments = checked_adjustments(vocabulary, mask, logit_bias, penalties)
        if self.implementation in ("pallas", "cpu") and (
            self.bias is not None or adjustments.offsets() is not None
        ):
            raise ValueError(
                f"implementation = {self.implementation!r}: expected no bias and no mask, which "
                "the kernels do not support"
            )
        lead = hidden.shape[:-1]
        return LogitAdjustments() if 0 in lead else adjustments.flattened(lead)

    @jax.jit
    def _top_k(self, hidden: States, adjustments: LogitAdjustments) -> TopK:
        """Run `__call__` with adjustments of one leading axis."""
        options: dict[str, Any] = dict(
            k=self.k, candidates=self.candidates, implementation=self.implementation
        )
        # A soft cap makes ties. Only what ranks the capped logits puts them in order.
        is_plain = self.bias is None and adjustments.is_empty and not self.soft_cap
        if self.axis is None:
            if is_plain:
                return high_recall_top_k(hidden, self.rows, self.estimator, **options)
            return map_leading_axes(lambda x: self._adjusted_top_k(x, adjustments), hidden)
        axis, parts = RowSharding.of(self.axis), self.sharded_parts
        if is_plain:
            parts = dict(rows=self.rows, estimator=self.estimator)
            return map_leading_axes(
                lambda x: axis.shard_map(
                    lambda shard, x: da_top_k(x, **shard, **options, axis=axis), parts, x
                ),
                hidden,
            )
        return map_leading_axes(
            lambda x: axis.shard_map(self._sharded_top_k, parts, x, adjustments), hidden
        )

    @property
    def sharded_parts(self) -> dict[str, Any]:
        """The parts that are sharded over an axis."""
        return dict(rows=self.rows, estimator=self.estimator, bias=self.bias)

    def _adjusted_top_k(
        self,
        hidden: Queries,
        adjustments: LogitAdjustments,
        is_real: Bool[Array, " m"] | None = None,
    ) -> TopK:
        """Return the top-k after adjustments, of rows that are all on one device.

        Only the real rows count; the others are padding. By default all rows are real.
        """
        return self._best_of(self._candidates(hidden, adjustments, is_real))

    def _best_of(self, candidates: "AdjustedCandidates") -> TopK:
        """Return the top-k of candidates. Logits that are NaN may be below those of `NO_TOKEN`."""
        top = rerank(candidates.tokens, candidates.logits, self.k)
        return TopK(top.values, jnp.minimum(top.indices, self.rows.shape[0] - 1))

    def _candidates(
        self, hidden: Queries, adjustments: LogitAdjustments, is_real: Bool[Array, " m"] | None
    ) -> "AdjustedCandidates":
        """Nominate candidates by adjusted logits, and return their exact adjusted logits.

        The penalised tokens of a text are known: all of them are candidates, besides k' others.
        """
        penalties, offsets = adjustments.penalties, adjustments.offsets()
        num_penalized = 0 if penalties is None else penalties.tokens.shape[1]
        count = min(self.candidates + num_penalized, self.estimator.max_candidates)
        tokens = self._nominate(hidden, count, offsets, is_exact=adjustments.mask is not None)
        logits = self._local_logits(hidden, tokens)
        if is_real is not None:
            logits = jnp.where(is_real[tokens], logits, -jnp.inf)
        counts_once = jnp.ones(tokens.shape, bool)
        if penalties is not None:
            penalized_tokens, is_first, counts = count_tokens(penalties.tokens)
            is_first &= penalized_tokens < self.rows.shape[0]
            penalized_tokens = jnp.clip(penalized_tokens, 0, self.rows.shape[0] - 1)
            queries = jnp.arange(len(hidden), dtype=jnp.int32)[:, None]
            is_penalized = jnp.zeros((len(hidden), self.rows.shape[0]), bool)
            is_penalized = is_penalized.at[queries, penalized_tokens].max(is_first)
            new = penalized(self._local_logits(hidden, penalized_tokens), counts, penalties)
            # Each of these tokens counts once: among the penalised ones.
            is_other = ~jnp.take_along_axis(is_penalized, tokens, axis=1)
            counts_once = jnp.concatenate([is_other, is_first], axis=1)
            tokens = jnp.concatenate([tokens, penalized_tokens], axis=1)
            logits = jnp.concatenate([logits, new], axis=1)
        if offsets is not None:
            wide = jnp.broadcast_to(offsets, (len(hidden), offsets.shape[1]))
            logits = logits + jnp.take_along_axis(wide, tokens, axis=1)
        return AdjustedCandidates(
            jnp.where(counts_once, tokens, NO_TOKEN),
            jnp.where(counts_once, logits, -jnp.inf),
            count,
        )

    def _nominate(
        self, hidden: Queries, count: int, offsets: Float[Array, "_ v"] | None, *, is_exact: bool
    ) -> Indices:
        """Nominate `count` candidates by their estimated logits.

        Args:
            hidden: Queries `(b, d)`.
            count: Number of candidates.
            offsets: What is added to the logits of all rows, or None.
            is_exact: Whether the candidates are exactly the best rows by their estimates. Buckets
                may miss a few others; those of a mask may miss nearly all.
        """
        if self.bias is None and offsets is None:
            return self.estimator.nominate(hidden, count, implementation=self.implementation)
        scores = nomination_scores(self.estimator, hidden)
        if self.bias is not None:
            scores = scores + self.bias[None]
        if offsets is not None:
            scores = cap_softly(scores, self.soft_cap) + offsets
        if is_exact:
            return exact_top_k(scores, count).indices
        return nominate_from_scores(scores, count)

    def _local_logits(self, hidden: Queries, tokens: Int[AnyArray, "b n"]) -> Float[Array, "b n"]:
        """Return the model's logits of tokens whose rows are all on one device."""
        scores = row_scores_at(hidden, self.rows, tokens, implementation=self.implementation)
        if self.bias is not None:
            scores = scores + self.bias[tokens]
        return cap_softly(jnp.asarray(scores), self.soft_cap)

    def top_k_with_normalizer(
        self,
        hidden: States,
        *,
        mask: Bool[AnyArray, "... v"] | None = None,
        logit_bias: Float[AnyArray, "... v"] | None = None,
        penalties: Penalties | None = None,
    ) -> TopKWithNormalizer:
        """Return the top-k tokens and the estimated log of the sum over the vocabulary.

        The candidates count with their exact logits. The other tokens (the tail) count with their
        estimated logits plus a correction, because errors that cancel in a logit do not cancel in
        a sum of exponentials. The lower half of the candidates gives the correction for each query:
        the estimator selected them like rows of the tail, but their exact logits are known.

        The standard error is the tail's share of the probability times the error of the correction.
        This error combines the sampling error and the drift from the quarter of the candidates
        above. Our choice: the paper names no normaliser.

        Args:
            hidden: Hidden states `(b, d)` or `(*b, d)`.
            mask: As in a call. A token that is not allowed has no share of the sum.
            logit_bias: As in a call.
            penalties: As in a call.

        Returns:
            The top-k tokens, which equal those of a call, and the log normaliser in nats.

        Raises:
            ValueError: As a call.
        """
        adjustments = self._adjustments(hidden, mask, logit_bias, penalties)
        return self._normalized_top_k(hidden, adjustments)

    @jax.jit
    def _normalized_top_k(
        self, hidden: States, adjustments: LogitAdjustments
    ) -> TopKWithNormalizer:
        """Run `top_k_with_normalizer` with adjustments of one leading axis."""
        if self.axis is None:
            return map_leading_axes(lambda x: self._top_k_with_normalizer(x, adjustments), hidden)
        axis, parts = RowSharding.of(self.axis), self.sharded_parts
        return map_leading_axes(
            lambda x: axis.shard_map(self._sharded_top_k_with_normalizer, parts, x, adjustments),
            hidden,
        )

    def _shard(
        self, shard: dict[str, Any], adjustments: LogitAdjustments
    ) -> tuple["HireSoftmax", LogitAdjustments, Bool[Array, " m"]]:
        """Return the softmax of this device's shard, its adjustments, and its real rows.

        The other rows are padding. The softmax has as many candidates as `da_top_k`.
        """
        axis, shard_size = RowSharding.of(self.axis or ""), shard["rows"].shape[0]
        k, candidates = (
            axis.padded_device_count(count, shard_size) for count in (self.k, self.candidates)
        )
        owned = jnp.asarray(axis.global_index(jnp.arange(shard_size, dtype=jnp.int32), shard_size))
        is_real = owned < axis.total_rows(shard_size)
        softmax = HireSoftmax(
            **shard,
            k=k,
            candidates=candidates,
            implementation=self.implementation,
            soft_cap=self.soft_cap,
        )
        columns = jnp.minimum(owned, axis.total_rows(shard_size) - 1)
        local = {
            name: None if array is None else jnp.asarray(array)[..., columns]
            for name, array in (("mask", adjustments.mask), ("bias", adjustments.bias))
        }
        penalties = adjustments.penalties
        if penalties is not None:
            place, is_local = self._place_on_device(penalties.tokens, shard_size)
            place = jnp.where(is_local & (penalties.tokens >= 0), place, -1)
            penalties = replace(penalties, tokens=place)
        return softmax, LogitAdjustments(**local, penalties=penalties), is_real

    def _place_on_device(
        self, tokens: Int[AnyArray, "*b n"], shard_size: int
    ) -> tuple[Int[Array, "*b n"], Bool[Array, "*b n"]]:
        """Return the places of tokens in this device's shard, and whether they are in it."""
        axis = RowSharding.of(self.axis or "")
        place = (
            axis.storage_index(jnp.asarray(tokens), axis.size * shard_size)
            - jax.lax.axis_index(axis.name) * shard_size
        )
        is_local = jnp.asarray((place >= 0) & (place < shard_size))
        return jnp.clip(place, 0, shard_size - 1), is_local

    def _sharded_top_k(
        self, shard: dict[str, Any], hidden: Queries, adjustments: LogitAdjustments
    ) -> TopK:
        """Run `_adjusted_top_k` on one device of the axis."""
        softmax, local, is_real = self._shard(shard, adjustments)
        return self._gathered(softmax._adjusted_top_k(hidden, local, is_real), len(is_real))

    def _gathered(self, shard_top: TopK, shard_size: int) -> TopK:
        """Merge the top-k of all devices."""
        axis = RowSharding.of(self.axis or "")
        shard_k = axis.per_device_count(self.k, shard_size)
        return all_gather_top_k(shard_top, axis, shard_size, shard_k, self.k)

    def _sharded_top_k_with_normalizer(
        self, shard: dict[str, Any], hidden: Queries, adjustments: LogitAdjustments
    ) -> TopKWithNormalizer:
        """Run `top_k_with_normalizer` on one device of the axis.

        Each device estimates the sum over its shard.
        """
        axis = RowSharding.of(self.axis or "")
        softmax, local, is_real = self._shard(shard, adjustments)
        shard_result = softmax._top_k_with_normalizer(hidden, local, is_real)
        log_sums, errors = jax.lax.all_gather(
            jnp.stack([shard_result.log_normalizer, shard_result.normalizer_stderr]),
            axis.name,
            axis=1,
        )
        log_normalizer = log_sum_exp(log_sums.T)
        normalizer_stderr = jnp.linalg.norm(
            jnp.exp(log_sums - log_normalizer[None]) * errors, axis=0
        )
        return TopKWithNormalizer(
            self._gathered(shard_result.top, len(is_real)),
            log_normalizer,
            jax.lax.stop_gradient(normalizer_stderr),
        )

    def _top_k_with_normalizer(
        self,
        hidden: Queries,
        adjustments: LogitAdjustments,
        is_real: Bool[Array, " m"] | None = None,
    ) -> TopKWithNormalizer:
        """Run `top_k_with_normalizer` on rows of which only the real ones count."""
        candidates = self._candidates(hidden, adjustments, is_real)
        offsets = adjustments.offsets()
        estimated = self.estimator.scores(hidden)
        if self.bias is not None:
            estimated = estimated + self.bias[None]
        estimated = cap_softly(estimated, self.soft_cap)
        if offsets is not None:
            estimated = estimated + offsets
        if is_real is not None:
            estimated = jnp.where(is_real[None], estimated, -jnp.inf)
        # The candidates that the estimator has nominated, without those that are penalised.
        exact, nominated_tokens = (
            candidates.logits[:, : candidates.num_nominated],
            candidates.tokens[:, : candidates.num_nominated],
        )
        guessed = jnp.where(
            exact > -jnp.inf, jnp.take_along_axis(estimated, nominated_tokens, axis=1), -jnp.inf
        )
        half = candidates.num_nominated // 2
        correction, sampling_error = logsumexp_correction(*take_ranks(exact, guessed, half))
        upper_correction, _ = logsumexp_correction(
            *take_ranks(exact, guessed, half // 2, max(half, 1))
        )
        queries = jnp.arange(len(hidden), dtype=jnp.int32)[:, None]
        tail_scores = estimated.at[queries, candidates.tokens].set(-jnp.inf)
        log_tail = log_sum_exp(tail_scores) + correction
        log_candidates = log_sum_exp(candidates.logits)
        log_normalizer = log_sum_exp(jnp.stack([log_candidates, log_tail], axis=1))
        # A shard of padding only has no tail, and -inf minus -inf would be NaN.
        has_tail = log_tail > -jnp.inf
        tail_share = jnp.where(
            has_tail, jnp.exp(log_tail - jnp.where(has_tail, log_normalizer, 0)), 0
        )
        normalizer_stderr = tail_share * jnp.hypot(sampling_error, correction - upper_correction)
        # The gradient of a root is infinite at 0: without errors, or without a tail.
        return TopKWithNormalizer(
            self._best_of(candidates), log_normalizer, jax.lax.stop_gradient(normalizer_stderr)
        )

    def certified(
        self,
        hidden: States,
        *,
        mask: Bool[AnyArray, "... v"] | None = None,
        logit_bias: Float[AnyArray, "... v"] | None = None,
        penalties: Penalties | None = None,
        dense_fallback: bool = False,
    ) -> Certified:
        """Return the top-k tokens of hidden states and, for each query, whether they are proved.

        This is `hire.certified_top_k` for logits after all adjustments. The candidates are the
        allowed tokens with the highest upper bounds; a bias, a penalty or a logit bias shifts the
        bound of its token. A token that is not allowed is no candidate and hinders no proof.

        A proof says that no missing token has a higher logit than a returned one. It concerns real
        numbers: the rows, the hidden states and the bias as they are stored, and adjustments in
        float32. It holds for the set of tokens; two tokens of the answer may be in the wrong order
        where their logits differ by a rounding. A returned logit is off by no more than the
        rounding of its sum of products and of its adjustments. It relies on a tanh with a relative
        error below 2^-20 where a soft cap meets penalties or a logit bias.

        A soft cap alone changes no order of real numbers. Answers are then ranked by the logits
        before the cap, since many of them may be one float32 number after it. So where a call
        takes the lowest of equal logits, a proved answer has the tokens with the higher real ones.

        If fewer than k tokens are allowed, a proof says that all of them are there. The last
        places of the answer have the logit -inf, and their tokens mean nothing.

        Args:
            hidden: Hidden states `(b, d)` or `(*b, d)`.
            mask: As in a call.
            logit_bias: As in a call.
            penalties: As in a call.
            dense_fallback: Whether to compute all logits for queries without a proof, see
                `hire.certified_top_k`.

        Returns:
            The top-k `(*b, k)` and whether it is proved `(*b,)`. The logits are sums in pairs
            (`hire.certify.pairwise_dot`), so the last bits may differ from those of a call.

        Raises:
            ValueError: As a call; for rows that are sharded, in blocks or quantized; for an
                estimator without error bounds; for a soft cap beyond 2^-20 to 2^20. Repetition
                penalties beyond these numbers are not proved.
        """
        self._provable_parts()
        adjustments = self._adjustments(hidden, mask, logit_bias, penalties)
        return self._certified(hidden, adjustments, dense_fallback)

    def _provable_parts(self) -> tuple[Array, LowRank | Quantized]:
        """Return the rows and the estimator, or raise ValueError for what no proof covers."""
        if self.axis is not None:
            raise ValueError("a proof over sharded rows: expected rows on one device")
        if isinstance(self.rows, Quantized) or len(self.rows.shape) != 2:
            raise ValueError(
                "a proof over quantized rows or blocks: expected rows (v, d) of floats"
            )
        if self.soft_cap and not 1 / LARGEST_FACTOR <= self.soft_cap <= LARGEST_FACTOR:
            raise ValueError(f"soft_cap = {self.soft_cap}: a proof expects one from 2^-20 to 2^20")
        return jnp.asarray(self.rows), check_error_bounds(self.estimator)

    @functools.partial(jax.jit, static_argnames="dense_fallback")
    def _certified(
        self, hidden: States, adjustments: LogitAdjustments, dense_fallback: bool
    ) -> Certified:
        """Run `certified` with adjustments of one leading axis."""
        rows, estimator = self._provable_parts()
        bias = None if self.bias is None else jnp.asarray(self.bias)
        is_cap_last = adjustments.bias is None and adjustments.penalties is None

        def logits_for(queries: Int[Array, " b"]) -> AdjustedLogits:
            soft_cap = 0.0 if is_cap_last else self.soft_cap
            return AdjustedLogits.of(bias, soft_cap, adjustments, queries, len(rows))

        result = prove_top_k(
            hidden,
            rows,
            estimator,
            self.k,
            self.candidates,
            dense_fallback,
            None if bias is None and adjustments.is_empty else logits_for,
        )
        if not is_cap_last:
            return result
        values = jnp.asarray(result.top.values)
        capped = jnp.where(values == -jnp.inf, values, cap_softly(values, self.soft_cap))
        return Certified(TopK(capped, result.top.indices), result.proved)

    @jax.jit
    def exact_logits(self, hidden: States, tokens: Int[AnyArray, "*b n"]) -> Float[Array, "*b n"]:
        """Return the model's exact logits of tokens. Only the rows of these tokens are read.

        Args:
            hidden: Hidden states `(b, d)` or `(*b, d)`.
            tokens: Token indices `(b, n)` or `(*b, n)`.

        Returns:
            The exact logits `(b, n)`, without adjustments.

        Raises:
            ValueError: If the hidden states have another width.
        """
        check_queries(hidden, self.estimator)
        return map_leading_axes(self._exact_logits, hidden, tokens)

    def _exact_logits(self, hidden: Queries, tokens: Int[AnyArray, "b n"]) -> Float[Array, "b n"]:
        """Run `exact_logits` on hidden states with one leading axis."""
        if self.axis is None:
            return self._local_logits(hidden, tokens)
        scores = RowSharding.of(self.axis).shard_map(
            self._sharded_exact_scores, self.sharded_parts, hidden, tokens
        )
        return cap_softly(jnp.asarray(scores), self.soft_cap)

    def _sharded_exact_scores(
        self, shard: dict[str, Any], hidden: Queries, tokens: Int[AnyArray, "b n"]
    ) -> Float[Array, "b n"]:
        """Return the exact logits, before a soft cap, of tokens on one device of the axis.

        The device has the rows of some tokens only; the sum over all devices has all tokens.
        """
        place, is_local = self._place_on_device(tokens, shard["rows"].shape[0])
        scores = row_scores_at(hidden, shard["rows"], place, implementation=self.implementation)
        if shard["bias"] is not None:
            scores = scores + shard["bias"][place]
        axis_name = RowSharding.of(self.axis or "").name
        return jax.lax.psum(jnp.where(is_local, scores, 0.0), axis_name)

    def log_probabilities(
        self,
        hidden: States,
        tokens: Int[AnyArray, "*b n"],
        *,
        mask: Bool[AnyArray, "... v"] | None = None,
        logit_bias: Float[AnyArray, "... v"] | None = None,
    ) -> Float[Array, "*b n"]:
        """Return the log-probabilities of tokens: exact logits minus the estimated normaliser.

        Args:
            hidden: Hidden states `(b, d)` or `(*b, d)`.
            tokens: Token indices `(b, n)` or `(*b, n)`.
            mask: As in a call.
            logit_bias: As in a call.

        Returns:
            The log-probabilities `(b, n)`, in nats.

        Raises:
            ValueError: As a call.
        """
        adjustments = self._adjustments(hidden, mask, logit_bias, None)
        return map_leading_axes(
            lambda x, tokens: self._log_probabilities(x, tokens, adjustments), hidden, tokens
        )

    def _log_probabilities(
        self, hidden: Queries, tokens: Int[AnyArray, "b n"], adjustments: LogitAdjustments
    ) -> Float[Array, "b n"]:
        """Run `log_probabilities` on hidden states with one leading axis."""
        logits, offsets = self.exact_logits(hidden, tokens), adjustments.offsets()
        if offsets is not None:
            wide = jnp.broadcast_to(offsets, (len(logits), offsets.shape[1]))
            logits = logits + jnp.take_along_axis(wide, jnp.asarray(tokens), axis=1)
        return logits - self._normalized_top_k(hidden, adjustments).log_normalizer[:, None]

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

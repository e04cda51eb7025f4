"""Bounds of logits from bounds of scores, for proofs about an LM head.

A logit is its score plus a bias, then capped, penalised and shifted by a logit bias. No step lets a
logit fall where its score rises. So a bound of the score becomes a bound of the logit, if every
step widens it by more than its rounding.
"""

from dataclasses import field, replace
from typing import Any

import jax.numpy as jnp

from hire.certify import widened
from hire.layers.logit_adjustments import LogitAdjustments, Penalties, penalized
from hire.ops.soft_cap import cap_softly
from hire.pytrees import pytree
from hire.types import Array, Bool, Float, Indices, Int

# Twice what a step may be off by, as a share of its numbers: up to four roundings.
STEP_ERROR = 2.0**-21
# The same for a soft cap. XLA computes tanh with a relative error below 2^-20: a test compares it
# with float64.
CAP_ERROR = 2.0**-18
# Soft caps and repetition penalties from 1 / LARGEST_FACTOR to LARGEST_FACTOR: beyond them, what
# underflows in between may matter.
LARGEST_FACTOR = 2.0**20


@pytree
class AdjustedLogits:
    """What makes logits of the scores of rows, for a few queries: a `hire.certify.ScoreToLogit`.

    Each array has one row for each query, or one row for all.

    Attributes:
        bias: Bias of the LM head `(_, n)`, or None.
        counts: How often each token has occurred in the text so far `(b, n)`, or None.
        offsets: Numbers to add to the logits `(_, n)`, or None; -inf for a token that is not
            allowed.
        penalties: Penalties on the tokens that have occurred, or None. Their tokens are not read.
        soft_cap: Soft cap of the logits; 0 means none.
    """

    bias: Float[Array, "_ n"] | None
    counts: Int[Array, "b n"] | None
    offsets: Float[Array, "_ n"] | None
    penalties: Penalties | None
    soft_cap: float = field(metadata=dict(static=True), default=0.0)

    @classmethod
    def of(
        cls,
        bias: Float[Array, " v"] | None,
        soft_cap: float,
        adjustments: LogitAdjustments,
        queries: Int[Array, " b"],
        vocabulary: int,
    ) -> "AdjustedLogits":
        """Return the adjustments of some queries.

        Args:
            bias: Bias of the LM head `(v,)`, or None.
            soft_cap: Soft cap of the logits; 0 means none.
            adjustments: Adjustments with one leading axis.
            queries: Numbers of the queries.
            vocabulary: Number of tokens in the vocabulary, v.
        """

        def of_queries(array: Any, trailing: int) -> Any:
            return array if jnp.ndim(array) == trailing else jnp.asarray(array)[queries]

        mask, logit_bias = (
            None if array is None else of_queries(array, 1)
            for array in (adjustments.mask, adjustments.bias)
        )
        penalties, counts = adjustments.penalties, None
        if penalties is not None:
            settings = (
                of_queries(setting, 0)
                for setting in (penalties.repetition, penalties.presence, penalties.frequency)
            )
            penalties = Penalties(jnp.asarray(penalties.tokens)[queries], *settings)
            is_token = penalties.tokens >= 0
            columns = jnp.where(is_token, penalties.tokens, vocabulary).astype(jnp.int32)
            counts = jnp.zeros((len(queries), vocabulary), jnp.int32)
            numbers = jnp.arange(len(queries), dtype=jnp.int32)[:, None]
            counts = counts.at[numbers, columns].add(1, mode="drop")
        return cls(
            None if bias is None else bias[None],
            counts,
            LogitAdjustments(mask, logit_bias).offsets(),
            penalties,
            soft_cap,
        )

    @property
    def allowed(self) -> Bool[Array, "_ n"] | None:
        """Which tokens are allowed, for each query or for all; None for all tokens."""
        return None if self.offsets is None else self.offsets != -jnp.inf

    def at(self, indices: Indices) -> "AdjustedLogits":
        """Return the adjustments of the tokens at indices `(b, c)`."""

        def of_tokens(array: Array | None) -> Array | None:
            if array is None:
                return None
            return jnp.take_along_axis(
                jnp.broadcast_to(array, (len(indices), array.shape[1])), indices, axis=1
            )

        return replace(
            self,
            bias=of_tokens(self.bias),
            counts=of_tokens(self.counts),
            offsets=of_tokens(self.offsets),
        )

    def logits(self, scores: Float[Array, "b n"], direction: int) -> Float[Array, "b n"]:
        """Return the logits of scores, or bounds of them, as if all tokens were allowed.

        Args:
            scores: Scores `(b, n)`, or bounds of them.
            direction: 1 for upper bounds, -1 for lower bounds, 0 for the logits.
        """
        logits = scores
        if self.bias is not None:
            error = STEP_ERROR * (jnp.abs(logits) + jnp.abs(self.bias))
            logits = widened(logits + self.bias, error, direction)
        if self.soft_cap:
            logits = cap_softly(logits, self.soft_cap)
            logits = widened(logits, CAP_ERROR * jnp.abs(logits), direction)
        if self.penalties is not None and self.counts is not None:
            logits = self._penalized(logits, self.counts, self.penalties, direction)
        if self.offsets is not None:
            offsets = jnp.where(self.offsets != -jnp.inf, self.offsets, 0)
            error = STEP_ERROR * (jnp.abs(logits) + jnp.abs(offsets))
            logits = widened(logits + offsets, error, direction)
        return logits

    def _penalized(
        self,
        logits: Float[Array, "b n"],
        counts: Int[Array, "b n"],
        penalties: Penalties,
        direction: int,
    ) -> Float[Array, "b n"]:
        """Return the logits of all tokens after the penalties, or bounds of them."""
        new = penalized(logits, counts, penalties)
        if direction:
            repetition, presence, frequency = (
                jnp.reshape(jnp.asarray(setting, jnp.float32), (-1, 1))
                for setting in (penalties.repetition, penalties.presence, penalties.frequency)
            )
            size = jnp.abs(jnp.where(logits > 0, logits / repetition, logits * repetition))
            size += jnp.abs(presence) + jnp.abs(frequency) * counts.astype(jnp.float32)
            is_usable = (repetition >= 1 / LARGEST_FACTOR) & (repetition <= LARGEST_FACTOR)
            new = widened(jnp.where(is_usable, new, jnp.nan), STEP_ERROR * size, direction)
        return jnp.where(counts > 0, new, logits)

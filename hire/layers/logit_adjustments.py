"""What a request changes about the logits of an LM head: penalties, biases and masks.

They act in this order: the penalties on the model's logits, then the biases, then the mask.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from hire.pytrees import pytree
from hire.types import AnyArray, Array, Bool, Float, Int

# One number for all queries, or one (b,) per query.
Setting = Float[AnyArray, "..."] | float | int


@pytree
class Penalties:
    """Penalties on the tokens of a text so far.

    A logit l of such a token becomes `l / repetition` if it is positive and `l * repetition` if
    not (arXiv 1909.05858), less `presence`, less `frequency` times the token's count.

    Attributes:
        tokens: Tokens of each text so far `(b, n)`. A negative one is padding.
        repetition: Repetition penalty, above 0: one number, or one `(b,)` per query. 1 is none.
        presence: Presence penalty, as `repetition`. 0 is none.
        frequency: Frequency penalty, as `repetition`. 0 is none.

    Raises:
        ValueError: If the tokens are not integers `(*b, n)`, if `repetition` is not a finite number
            above 0, or if another penalty is not finite. Traced values are not checked.
    """

    tokens: Int[AnyArray, "... n"]
    repetition: Setting = 1.0
    presence: Setting = 0.0
    frequency: Setting = 0.0

    def __post_init__(self):
        tokens = self.tokens
        if jnp.ndim(tokens) < 1 or not jnp.issubdtype(jnp.asarray(tokens).dtype, jnp.integer):
            raise ValueError(
                f"penalised tokens of shape {jnp.shape(tokens)} and type "
                f"{jnp.asarray(tokens).dtype}: expected integers (b, n)"
            )
        for name in ("repetition", "presence", "frequency"):
            value = getattr(self, name)
            if isinstance(value, Tracer):
                continue
            numbers = np.asarray(value, np.float64)
            if not np.isfinite(numbers).all() or (name == "repetition" and (numbers <= 0).any()):
                expected = "finite numbers above 0" if name == "repetition" else "finite numbers"
                raise ValueError(f"{name} = {value}: expected {expected}")


@pytree
class LogitAdjustments:
    """What a call changes about the logits.

    Attributes:
        mask: Tokens that are allowed `(*b, v)` or `(v,)`, or None for all.
        bias: Numbers to add to the logits `(*b, v)` or `(v,)`, or None.
        penalties: Penalties, or None.
    """

    mask: Bool[AnyArray, "... v"] | None = None
    bias: Float[AnyArray, "... v"] | None = None
    penalties: Penalties | None = None

    @property
    def is_empty(self) -> bool:
        """Whether no logit changes."""
        return self.mask is None and self.bias is None and self.penalties is None

    def offsets(self) -> Float[Array, "b v"] | None:
        """Return what is added to the logits: the bias, and -inf for a token that is not allowed.

        The first axis has one entry if all queries share it. None if nothing is added.
        """
        if self.mask is None and self.bias is None:
            return None
        bias = jnp.zeros((), jnp.float32) if self.bias is None else jnp.asarray(self.bias)
        offsets = bias.astype(jnp.float32)
        if self.mask is not None:
            mask = jnp.asarray(self.mask)
            rank = max(mask.ndim, offsets.ndim)
            mask, offsets = (
                jnp.expand_dims(part, range(rank - part.ndim)) for part in (mask, offsets)
            )
            offsets = jnp.where(mask, offsets, -jnp.inf)
        return jnp.atleast_2d(offsets)

    def flattened(self, lead: tuple[int, ...]) -> "LogitAdjustments":
        """Return the adjustments with the leading axes of the queries as one axis.

        Args:
            lead: Sizes of the leading axes.
        """

        def flat(array: Any, trailing: int) -> Any:
            if array is None or jnp.ndim(array) <= trailing:
                return array
            wide = jnp.broadcast_to(array, (*lead, *array.shape[array.ndim - trailing :]))
            return wide.reshape(math.prod(lead), *wide.shape[len(lead) :])

        penalties = self.penalties
        if penalties is not None:
            tokens = jnp.asarray(penalties.tokens)
            tokens = jnp.broadcast_to(tokens, (*lead, tokens.shape[-1]))
            penalties = Penalties(
                tokens.reshape(math.prod(lead), -1),
                flat(penalties.repetition, 0),
                flat(penalties.presence, 0),
                flat(penalties.frequency, 0),
            )
        return LogitAdjustments(flat(self.mask, 1), flat(self.bias, 1), penalties)


def checked_adjustments(
    vocabulary: int, mask: Any = None, logit_bias: Any = None, penalties: Penalties | None = None
) -> LogitAdjustments:
    """Return the adjustments of a call.

    Args:
        vocabulary: Number of tokens in the vocabulary, v.
        mask: As in `LogitAdjustments`.
        logit_bias: Its bias.
        penalties: As in `LogitAdjustments`.

    Raises:
        ValueError: If the mask is not of booleans or the bias not of floats, one of them is not
            `(*b, v)`, the mask allows a query no token, or a bias is NaN. Values inside jit are not
            checked.
    """
    for name, array, kind in (("mask", mask, jnp.bool_), ("logit_bias", logit_bias, jnp.floating)):
        if array is None:
            continue
        if jnp.ndim(array) < 1 or jnp.shape(array)[-1] != vocabulary:
            raise ValueError(
                f"{name} of shape {jnp.shape(array)}: expected (v,) or (b, v) with v = {vocabulary}"
            )
        if not jnp.issubdtype(jnp.asarray(array).dtype, kind):
            raise ValueError(
                f"{name} of type {jnp.asarray(array).dtype}: expected "
                f"{'booleans, true for allowed tokens' if name == 'mask' else 'floats'}"
            )
    # Inside jit, jnp would trace even a constant.
    with jax.ensure_compile_time_eval():
        if mask is not None and not isinstance(mask, Tracer) and not jnp.any(mask, axis=-1).all():
            raise ValueError("mask: a query has no allowed token; expected one or more")
        if (
            logit_bias is not None
            and not isinstance(logit_bias, Tracer)
            and jnp.isnan(logit_bias).any()
        ):
            raise ValueError(
                "logit_bias: it holds NaN; expected numbers, or -inf to forbid a token"
            )
    return LogitAdjustments(mask, logit_bias, penalties)


def count_tokens(
    tokens: Int[AnyArray, "b n"],
) -> tuple[Int[Array, "b n"], Bool[Array, "b n"], Int[Array, "b n"]]:
    """Count the tokens of texts.

    Args:
        tokens: Tokens `(b, n)`; a negative one is padding.

    Returns:
        The tokens in order, `(b, n)`; whether each is the first of its kind and no padding; and how
        often it occurs.
    """
    ordered = jnp.sort(jnp.asarray(tokens).astype(jnp.int32), axis=1)
    before = jnp.concatenate([jnp.full((len(ordered), 1), -1, jnp.int32), ordered[:, :-1]], axis=1)
    is_first = (ordered != before) & (ordered >= 0)

    def counts(row: Int[Array, " n"]) -> Int[Array, " n"]:
        first, last = (jnp.searchsorted(row, row, side=side) for side in ("left", "right"))
        return last - first

    return ordered, is_first, jax.vmap(counts)(ordered)


def penalized(
    logits: Float[Array, "b n"], counts: Int[Array, "b n"], penalties: Penalties
) -> Float[Array, "b n"]:
    """Return the logits of tokens that have occurred, after the penalties.

    Args:
        logits: The model's logits `(b, n)`.
        counts: How often each token has occurred `(b, n)`, at least once.
        penalties: The penalties.
    """
    repetition, presence, frequency = (
        jnp.reshape(jnp.asarray(setting, jnp.float32), (-1, 1))
        for setting in (penalties.repetition, penalties.presence, penalties.frequency)
    )
    scaled = jnp.where(logits > 0, logits / repetition, logits * repetition)
    return scaled - presence - frequency * counts.astype(jnp.float32)


def adjust_all(logits: Float[Array, "b v"], adjustments: LogitAdjustments) -> Float[Array, "b v"]:
    """Return the logits of all tokens after the adjustments.

    Args:
        logits: The model's logits `(b, v)`.
        adjustments: The adjustments of `(b, …)` queries.
    """
    if adjustments.penalties is not None:
        tokens, is_first, counts = count_tokens(adjustments.penalties.tokens)
        queries = jnp.arange(len(logits), dtype=jnp.int32)[:, None]
        # Padding and repetitions are written beyond the vocabulary, that is, nowhere.
        columns = jnp.where(is_first, tokens, logits.shape[1])
        penalized_logits = jnp.take_along_axis(
            logits, jnp.clip(tokens, 0, logits.shape[1] - 1), axis=1
        )
        new = penalized(penalized_logits, counts, adjustments.penalties)
        logits = logits.at[queries, columns].set(new, mode="drop")
    offsets = adjustments.offsets()
    return logits if offsets is None else logits + offsets

"""The LM head of a decoder: dense, or a search over its rows."""

import functools
from collections.abc import Callable
from dataclasses import field
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from hire.distributed import RowSharding
from hire.estimators.base import Estimator, map_leading_axes
from hire.estimators.quantized import Quantized
from hire.layers.logit_adjustments import LogitAdjustments, adjust_all
from hire.layers.softmax import HireSoftmax
from hire.models.sharding import with_auto_axes
from hire.ops.row_products import row_scores
from hire.ops.soft_cap import cap_softly
from hire.ops.top_k import TopK, exact_top_k
from hire.pytrees import pytree
from hire.types import Array, Blocks, Float, Rows, States


@runtime_checkable
class LMHeadSearch(Protocol):
    """Protocol for the search of an LM head.

    An implementation is a pytree. It receives the rows of the LM head at every call.
    """

    def with_rows(self, rows: Rows | Blocks) -> Callable[..., TopK]:
        """Returns a function that maps hidden states to the best tokens among these rows.

        It may take `mask`, `logit_bias` and `penalties`, as HireSoftmax does.
        """
        ...


@pytree
class TiedSoftmax:
    """A HireSoftmax without its rows, which the model passes at every call.

    The LM head of the model, often its embedding, thus remains the only array of the rows.
    Quantized rows are stored here.

    Attributes:
        estimator: The estimator that nominates candidates.
        rows: Quantized rows, or None to search the LM head of the model.
        k: Number of tokens in an answer.
        candidates: Number of candidates.
        implementation: As in HireSoftmax.
        axis: Mesh axis or sharding of the rows, or None on a single device.
        soft_cap: As in HireSoftmax.
    """

    estimator: Estimator
    rows: Quantized | None
    k: int = field(metadata=dict(static=True))
    candidates: int = field(metadata=dict(static=True))
    implementation: str = field(metadata=dict(static=True), default="auto")
    axis: str | RowSharding | None = field(metadata=dict(static=True), default=None)
    soft_cap: float = field(metadata=dict(static=True), default=0.0)

    def with_rows(self, rows: Rows | Blocks) -> HireSoftmax:
        """Returns the softmax over these rows, or over the quantized ones if there are any."""
        search_rows = rows if self.rows is None else self.rows
        return HireSoftmax(
            search_rows,
            self.estimator,
            self.k,
            self.candidates,
            implementation=self.implementation,
            axis=self.axis,
            soft_cap=self.soft_cap,
        )

    @property
    def layout(self) -> RowSharding | None:
        """The sharding of the LM head's rows; None if they are in the order of the tokens."""
        return RowSharding.of(self.axis) if self.rows is None and self.axis is not None else None


@functools.partial(jax.jit, static_argnames=("k", "soft_cap"))
def top_tokens(
    softmax: LMHeadSearch | None,
    rows: Rows | Blocks,
    soft_cap: float,
    hidden: States,
    k: int,
    adjustments: LogitAdjustments | None = None,
) -> TopK:
    """Returns the k best tokens by exact logits.

    The function is compiled because a softmax that is built from arrays validates its rows, which
    reads all of them.

    Args:
        softmax: The search, or None to score all rows.
        rows: The rows of the LM head.
        soft_cap: Soft cap of the logits of a dense LM head. 0 means none. A search has its own.
        hidden: Hidden states, `(b, d)` or `(*b, d)`.
        k: Number of tokens.
        adjustments: Adjustments of the logits, with one leading axis, or None.

    Returns:
        The logits and the tokens, both `(b, k)` or `(*b, k)`.
    """

    def top_tokens(
        softmax: LMHeadSearch | None,
        rows: Rows | Blocks,
        hidden: Float[Array, "b d"],
        adjustments: LogitAdjustments | None,
    ) -> TopK:
        if softmax is None:
            logits = cap_softly(row_scores(hidden, rows), soft_cap)
            return exact_top_k(
                logits if adjustments is None else adjust_all(logits, adjustments), k
            )
        changes = {}
        if adjustments is not None:
            changes = dict(
                mask=adjustments.mask, logit_bias=adjustments.bias, penalties=adjustments.penalties
            )
        return TopK(*(part[:, :k] for part in softmax.with_rows(rows)(hidden, **changes)))

    def call(
        softmax: LMHeadSearch | None,
        rows: Rows | Blocks,
        hidden: States,
        adjustments: LogitAdjustments | None,
    ) -> TopK:
        return map_leading_axes(lambda x: top_tokens(softmax, rows, x, adjustments), hidden)

    return with_auto_axes(call, softmax, rows, hidden, adjustments)


def plain_rows(
    rows: Rows | Blocks, layout: RowSharding | None, vocabulary: int, width: int
) -> Float[Array, "v _"]:
    """Returns the rows of an LM head in the order of the tokens.

    Args:
        rows: Rows in blocks, over devices, or both.
        layout: The sharding of the rows, or None on a single device.
        vocabulary: Number of tokens in the vocabulary.
        width: Elements of a row.

    Returns:
        The rows, `(v, d)`.

    Raises:
        ValueError: When the rows are sharded over an axis that no mesh of jax.set_mesh has.
    """
    if layout is not None:
        rows = rows[layout.storage_index(jnp.arange(vocabulary, dtype=jnp.int32), len(rows))]
    return jnp.asarray(rows).reshape(vocabulary, -1)[:, :width]

"""The LM head of a decoder: dense, or a search over the rows of the embedding."""

import functools
from collections.abc import Callable
from dataclasses import field
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from hire.distributed import RowSharding
from hire.estimators.base import Estimator
from hire.estimators.quantized import Quantized
from hire.layers.softmax import HireSoftmax
from hire.models.sharding import with_auto_axes
from hire.ops.row_products import row_scores
from hire.ops.top_k import TopK, exact_top_k
from hire.pytrees import pytree
from hire.types import Array, Blocks, Float, Queries, Rows


@runtime_checkable
class LMHeadSearch(Protocol):
    """Protocol for the search of an LM head.

    An implementation is a pytree. It receives the rows of the embedding at every call.
    """

    def with_rows(self, rows: Rows | Blocks) -> Callable[[Queries], TopK]:
        """Returns a function that maps hidden states to the best tokens among these rows."""
        ...


@pytree
class TiedSoftmax:
    """A HireSoftmax without its rows, which the model passes at every call.

    The embedding of the model thus remains the only array of the rows. Quantized rows are stored
    here.

    Attributes:
        estimator: The estimator that nominates candidates.
        rows: Quantized rows, or None to search the embedding.
        k: Number of tokens in an answer.
        candidates: Number of candidates.
        implementation: As in HireSoftmax.
        axis: Mesh axis or sharding of the rows, or None on a single device.
    """

    estimator: Estimator
    rows: Quantized | None
    k: int = field(metadata=dict(static=True))
    candidates: int = field(metadata=dict(static=True))
    implementation: str = field(metadata=dict(static=True), default="auto")
    axis: str | RowSharding | None = field(metadata=dict(static=True), default=None)

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
        )

    @property
    def layout(self) -> RowSharding | None:
        """The sharding of the embedding rows; None if they are in the order of the tokens."""
        return RowSharding.of(self.axis) if self.rows is None and self.axis is not None else None


@functools.partial(jax.jit, static_argnames="k")
def top_tokens(
    softmax: LMHeadSearch | None, rows: Rows | Blocks, hidden: Float[Array, "b d"], k: int
) -> TopK:
    """Returns the k best tokens by exact logits.

    The function is compiled because a softmax that is built from arrays validates its rows, which
    reads all of them.

    Args:
        softmax: The search, or None to score all rows.
        rows: The rows of the embedding.
        hidden: Hidden states, `(b, d)`.
        k: Number of tokens.

    Returns:
        The logits and the tokens, both `(b, k)`.
    """

    def top_tokens(
        softmax: LMHeadSearch | None, rows: Rows | Blocks, hidden: Float[Array, "b d"]
    ) -> TopK:
        if softmax is None:
            return exact_top_k(row_scores(hidden, rows), k)
        return TopK(*(part[:, :k] for part in softmax.with_rows(rows)(hidden)))

    return with_auto_axes(top_tokens, softmax, rows, hidden)


def plain_rows(
    rows: Rows | Blocks, layout: RowSharding | None, vocabulary: int, width: int
) -> Float[Array, "v _"]:
    """Returns the rows of an embedding in the order of the tokens.

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

"""The protocol of an estimator and the checks of its callers."""

import math
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.core import Tracer

from hire.estimators.fingerprints import block_fingerprint, cached_fingerprint, check_same_rows
from hire.ops.checks import check_range
from hire.ops.nomination import PER_BUCKET, nominate_from_scores
from hire.ops.quantization import QuantizedRows
from hire.types import AnyArray, Array, Blocks, Fingerprint, Float, Indices, Queries, Rows, States

Candidates = Float[Array, "b c"]


@runtime_checkable
class Estimator(Protocol):
    """Interface of an estimator: any pytree with these members is one."""

    @property
    def shape(self) -> tuple[int, int]:
        """Shape `(m, d)` of the rows that the estimator represents."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes that the estimator stores."""
        ...

    @property
    def fingerprint(self) -> Fingerprint | None:
        """The `fingerprint` of the rows that the estimator was fitted to.

        It is None where nobody knows it, for example for rows that still grow.
        """
        ...

    def bytes_read(self, candidates: int) -> int:
        """Return the bytes of the estimator that one nomination reads.

        The exact rows do not count.

        Args:
            candidates: Number of candidates, k'.

        Returns:
            The number of bytes.
        """
        ...

    @property
    def max_candidates(self) -> int:
        """The largest number of candidates that the estimator can nominate, at most m."""
        ...

    def nominate(
        self,
        x: Queries,
        candidates: int,
        *,
        implementation: str = "auto",
        per_bucket: int = PER_BUCKET,
    ) -> Indices:
        """Nominate the rows with the best estimated scores.

        Only the estimator is read, never the exact rows. A small number of candidates comes from
        the best `per_bucket` rows of each bucket, see `hire.ops.nomination`.

        Args:
            x: Queries `(b, d)`.
            candidates: Number of candidates, k'.
            implementation: "auto", "xla", "pallas" or "cpu".
            per_bucket: Rows that each bucket keeps.

        Returns:
            Row indices `(b, k')`, in no order.
        """
        ...

    def scores(self, x: Queries) -> Float[Array, "b m"]:
        """Return the estimated scores of all rows.

        Args:
            x: Queries `(b, d)`.

        Returns:
            Scores `(b, m)`.
        """
        ...

    def scores_at(self, x: Queries, indices: Indices) -> Candidates:
        """Return the estimated scores of the rows at given indices only.

        Args:
            x: Queries `(b, d)`.
            indices: Row indices `(b, c)`.

        Returns:
            Scores `(b, c)`.
        """
        ...


def nominate_by_scores(
    x: Queries,
    estimator: Estimator,
    candidates: int,
    *,
    implementation: str = "auto",
    per_bucket: int = PER_BUCKET,
) -> Indices:
    """Nominate from the estimated scores of all rows, for an estimator without a kernel.

    Args:
        x: Queries `(b, d)`.
        estimator: The estimator.
        candidates: Number of candidates, k'.
        implementation: "auto" or "xla".
        per_bucket: Rows that each bucket keeps.

    Returns:
        Row indices `(b, k')`, in no order.

    Raises:
        ValueError: If `implementation` is "pallas" or "cpu".
    """
    if implementation in ("pallas", "cpu"):
        raise ValueError(
            f"implementation = {implementation!r}: expected a quantized estimator, not "
            f"{type(estimator).__name__} in "
            "floats"
        )
    return nominate_from_scores(estimator.scores(x), candidates, per_bucket)


def nomination_scores(estimator: Estimator, x: Queries) -> Float[Array, "b m"]:
    """Return estimated scores of all rows that are only compared with each other.

    They are `estimator.nomination_scores(x)` if the estimator has that method, else
    `estimator.scores(x)`. The method may round the queries.

    Args:
        estimator: The estimator.
        x: Queries `(b, d)`.

    Returns:
        Scores `(b, m)`.
    """
    return getattr(estimator, "nomination_scores", estimator.scores)(x)


def check_queries(x: States, estimator: Estimator) -> None:
    """Check the shape and the type of queries.

    Args:
        x: Queries `(*b, d)`.
        estimator: Estimator of the rows to search.

    Raises:
        ValueError: If the queries are not `(*b, d)` or not of a float type.
    """
    if x.ndim < 1 or x.shape[-1] != estimator.shape[1]:
        hint = (
            " (are rows stored (d, v)? pass rows.T)"
            if x.ndim and x.shape[-1] == estimator.shape[0]
            else ""
        )
        raise ValueError(
            f"queries of shape {x.shape}: expected (b, {estimator.shape[1]}), the width of the "
            f"rows{hint}"
        )
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"queries of type {x.dtype}: expected a float type")


def map_leading_axes(function: Callable[..., Any], x: States, *others: AnyArray) -> Any:
    """Apply a function of queries `(b, d)` to queries with any number of leading axes.

    Args:
        function: Function of queries `(b, d)`, and of the others `(b, n)`, with results `(b, ...)`.
        x: Queries `(*b, d)`.
        *others: Arrays `(*b, n)`.

    Returns:
        The results, with arrays `(*b, ...)`.
    """
    lead, arrays = x.shape[:-1], (x, *others)
    if 0 in lead:
        one_query = [jax.ShapeDtypeStruct((1, part.shape[-1]), part.dtype) for part in arrays]
        shapes = jax.eval_shape(function, *one_query)
        return jax.tree.map(lambda part: jnp.zeros((*lead, *part.shape[1:]), part.dtype), shapes)
    if x.ndim == 2:
        return function(*arrays)
    return jax.tree.map(
        lambda part: part.reshape(*lead, *part.shape[1:]),
        function(*(jnp.asarray(part).reshape(-1, part.shape[-1]) for part in arrays)),
    )


def check_search(
    rows: Rows | Blocks | QuantizedRows, estimator: Estimator, k: int, candidates: int
) -> tuple[int, int]:
    """Check that rows, estimator and counts fit together.

    Args:
        rows: Rows `(m, d)`, their blocks, or quantized rows.
        estimator: Estimator of these rows.
        k: Number of rows that the search returns.
        candidates: Number of candidates, k'.

    Returns:
        `k` and `candidates` as ints.

    Raises:
        ValueError: If the estimator represents rows of another shape, if
            `1 <= k <= candidates <= m` does not hold, or if the estimator cannot nominate that many
            candidates.
    """
    if len(rows.shape) not in (2, 3):
        raise ValueError(
            f"rows of shape {rows.shape}: expected (m, d), or hire.ops.tpu.row_scores.blocks of "
            "them"
        )
    width = math.prod(rows.shape[1:])
    if len(rows.shape) == 3:  # blocks are padded
        width = min(width, estimator.shape[1])
    if tuple(estimator.shape) != (rows.shape[0], width):
        raise ValueError(
            f"estimator of rows {tuple(estimator.shape)}: expected {tuple(rows.shape)}, as the "
            "rows are"
        )
    k = check_range("k", k, 1, rows.shape[0], "the number of rows")
    candidates = check_range(
        "candidates", candidates, k, rows.shape[0], "from k to the number of rows"
    )
    check_range(
        "candidates",
        candidates,
        k,
        estimator.max_candidates,
        "from k to what the estimator can nominate",
    )
    return k, candidates


def check_fitted(rows: Rows | Blocks | QuantizedRows, estimator: Estimator) -> None:
    """Check that the estimator was fitted to these rows.

    The check reads all rows. It reads each jax array only once. Inside `jax.jit` it does nothing,
    because the values are unknown.

    Args:
        rows: Rows `(m, d)`, their blocks, or quantized rows.
        estimator: Estimator with rows of the same shape.

    Raises:
        ValueError: If the estimator was fitted to other rows.
    """
    fitted_fingerprint = estimator.fingerprint
    if (
        fitted_fingerprint is None
        or isinstance(fitted_fingerprint, Tracer)
        or isinstance(rows, Tracer)
    ):
        return
    if isinstance(rows, QuantizedRows):
        rows_fingerprint = getattr(rows, "fingerprint", None)
    else:
        with jax.ensure_compile_time_eval():
            rows_fingerprint = (
                cached_fingerprint(rows)
                if rows.ndim == 2
                else block_fingerprint(estimator.shape[1])(rows)
            )
    check_same_rows(
        rows_fingerprint, fitted_fingerprint, f"estimator of other rows {tuple(rows.shape)}"
    )


def to_device(rows: AnyArray | QuantizedRows) -> Any:
    """Return rows as a jax array, so that numpy rows are sent to the device only once."""
    return rows if isinstance(rows, QuantizedRows) else jnp.asarray(rows)

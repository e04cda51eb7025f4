"""An estimator with exact scores for the rows that it would estimate worst."""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from hire.estimators.base import Estimator, check_fitted, check_search, nominate_by_scores
from hire.ops.batches import batches
from hire.ops.checks import check_finite, check_range
from hire.ops.nomination import PER_BUCKET
from hire.ops.row_products import row_scores
from hire.pytrees import pytree
from hire.types import AnyArray, Array, Fingerprint, Float, Indices, Int, Queries, Rows


@pytree
class ExactRowsEstimator:
    """An estimator of rows `(m, d)` that scores some rows exactly. It is an `Estimator`.

    Attributes:
        estimator: The estimator of all rows.
        exact_indices: Indices of the exact rows `(o,)`, in increasing order.
        rows: The exact rows `(o, d)`.
    """

    estimator: Estimator
    exact_indices: Int[Array, " o"]
    rows: Float[Array, "o d"]

    @classmethod
    def fit(
        cls,
        rows: Rows,
        estimator: Estimator,
        count: int,
        *,
        calibration: Queries | Iterable[Queries],
    ) -> "ExactRowsEstimator":
        """Add the rows with the largest estimation error to an estimator as exact rows.

        The error of a row is its squared error, summed over the calibration queries. The fit reads
        all rows for every query. Our choice: the paper has no exact rows.

        Args:
            rows: Rows `(m, d)`.
            estimator: Estimator of these rows.
            count: Number of exact rows.
            calibration: Queries `(n, d)`, or an iterable of batches of them.

        Returns:
            The fitted estimator.

        Raises:
            ValueError: If `count` is not in 1..m, if the estimator was fitted to other rows, if
                rows or queries are not finite, or if there are no queries.
        """
        check_search(rows, estimator, 1, 1)
        check_finite("rows", rows)
        check_fitted(rows, estimator)
        count = check_range("count", count, 1, rows.shape[0], "the number of rows")
        query_batches = (
            batches(calibration, 64) if isinstance(calibration, AnyArray) else calibration
        )
        errors = sum(
            np.asarray(squared_errors(rows, estimator, batch), np.float64)
            for batch in query_batches
        )
        if np.ndim(errors) == 0:
            raise ValueError("calibration has 0 queries: expected at least one")
        if not np.isfinite(errors).all():
            raise ValueError(
                "calibration holds a value that is not finite: expected finite queries"
            )
        indices = np.sort(np.argsort(-np.asarray(errors), kind="stable")[:count])
        return cls(estimator, jnp.asarray(indices, jnp.int32), jnp.asarray(rows)[indices])

    @property
    def shape(self) -> tuple[int, int]:
        """Shape `(m, d)` of the rows."""
        return self.estimator.shape

    @property
    def nbytes(self) -> int:
        """Bytes of the estimator, of the exact rows and of their indices."""
        return self.estimator.nbytes + self.exact_indices.nbytes + self.rows.nbytes

    @property
    def fingerprint(self) -> Fingerprint | None:
        """The fingerprint of the rows, from the estimator."""
        return self.estimator.fingerprint

    def bytes_read(self, candidates: int) -> int:
        """Return the bytes that one nomination reads, all exact rows included."""
        return self.estimator.bytes_read(candidates) + self.nbytes - self.estimator.nbytes

    @property
    def max_candidates(self) -> int:
        """The largest number of candidates of the estimator."""
        return self.estimator.max_candidates

    def nominate(
        self,
        x: Queries,
        candidates: int,
        *,
        implementation: str = "auto",
        per_bucket: int = PER_BUCKET,
    ) -> Indices:
        """Nominate the rows with the best estimated scores, see `Estimator.nominate`."""
        return nominate_by_scores(
            x, self, candidates, implementation=implementation, per_bucket=per_bucket
        )

    def scores(self, x: Queries) -> Float[Array, "b m"]:
        """Return the scores of all rows `(b, m)`, exact for the exact rows."""
        return self.estimator.scores(x).at[:, self.exact_indices].set(row_scores(x, self.rows))

    def scores_at(self, x: Queries, indices: Indices) -> Float[Array, "b c"]:
        """Return the scores of the rows at indices `(b, c)`, exact for the exact rows."""
        positions = jnp.minimum(
            jnp.searchsorted(self.exact_indices, indices), len(self.exact_indices) - 1
        )
        exact = jnp.take_along_axis(row_scores(x, self.rows), positions, axis=1)
        return jnp.where(
            self.exact_indices[positions] == indices, exact, self.estimator.scores_at(x, indices)
        )


@jax.jit
def squared_errors(rows: Rows, estimator: Estimator, x: Queries) -> Float[Array, " m"]:
    """Return the squared error of each row's estimated score, summed over the queries.

    Args:
        rows: Rows `(m, d)`.
        estimator: Estimator of these rows.
        x: Queries `(b, d)`.

    Returns:
        Sums of squared errors `(m,)`.
    """
    return jnp.sum((estimator.scores(x) - row_scores(x, rows)) ** 2, axis=0)

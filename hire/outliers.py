"""Rows that a copy tells badly, kept beside it as they are."""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from hire.axes import AnyArray, Array, Fingerprint, Float, Indices, Int, Queries, Rows
from hire.choose import batches
from hire.estimators import Estimator, check_finite, row_scores
from hire.pytrees import pytree
from hire.search import check_fitted, check_search
from hire.topk import check_count


@pytree
class Outliers:
    """An estimator of rows (m, d), of which some, at `places` (o,), rising, are scored exactly. An Estimator itself."""

    estimator: Estimator
    places: Int[Array, " o"]
    rows: Float[Array, "o d"]

    @classmethod
    def fit(cls, rows: Rows, estimator: Estimator, count: int, *, calibration: Queries | Iterable[Queries]) -> "Outliers":
        """Keep the `count` rows (of m, d) whose estimated scores err most, squared and in all, over queries (n, d) or batches of
        them. Our choice: the paper has none. Reads all rows for every query. Raises ValueError when count is not in 1..m, for an
        estimator of other rows, for rows or queries that are not finite, or without queries.
        """
        check_search(rows, estimator, 1, 1)
        check_finite("rows", rows)
        check_fitted(rows, estimator)
        count = check_count("count", count, 1, rows.shape[0], "the number of rows")
        some = batches(calibration, 64) if isinstance(calibration, AnyArray) else calibration
        error = sum(np.asarray(squared_errors(rows, estimator, batch), np.float64) for batch in some)
        if np.ndim(error) == 0:
            raise ValueError("calibration has 0 queries: expected at least one")
        if not np.isfinite(error).all():
            raise ValueError("calibration holds a value that is not finite: expected finite queries")
        places = np.sort(np.argsort(-np.asarray(error), kind="stable")[:count])
        return cls(estimator, jnp.asarray(places, jnp.int32), jnp.asarray(rows)[places])

    @property
    def shape(self) -> tuple[int, int]:
        return self.estimator.shape

    @property
    def nbytes(self) -> int:
        return self.estimator.nbytes + self.places.nbytes + self.rows.nbytes

    @property
    def fingerprint(self) -> Fingerprint | None:
        return self.estimator.fingerprint

    def bytes_read(self, candidates: int) -> int:
        return self.estimator.bytes_read(candidates) + self.nbytes - self.estimator.nbytes

    def scores(self, x: Queries) -> Float[Array, "b m"]:
        return self.estimator.scores(x).at[:, self.places].set(row_scores(x, self.rows))

    def scores_at(self, x: Queries, indices: Indices) -> Float[Array, "b c"]:
        found = jnp.minimum(jnp.searchsorted(self.places, indices), len(self.places) - 1)
        exact = jnp.take_along_axis(row_scores(x, self.rows), found, axis=1)
        return jnp.where(self.places[found] == indices, exact, self.estimator.scores_at(x, indices))


@jax.jit
def squared_errors(rows: Rows, estimator: Estimator, x: Queries) -> Float[Array, " m"]:
    """Sum over queries (b, d) of how far each row's estimated score lies from its own, squared."""
    return jnp.sum((estimator.scores(x) - row_scores(x, rows)) ** 2, axis=0)

"""HiRE-Q: rows in 8 or 4 bits."""

from collections.abc import Iterable
from dataclasses import replace

import jax.numpy as jnp
import numpy as np

from hire.estimators.error_bounds import error_bounds
from hire.estimators.fingerprints import cached_fingerprint
from hire.estimators.fitting import regularized_second_moment
from hire.ops import cpu as cpu_kernels
from hire.ops.checks import check_bits, check_finite
from hire.ops.implementation import dispatch
from hire.ops.nomination import (
    PER_BUCKET,
    max_bucketed_candidates,
    nominate_from_scores,
    num_buckets,
)
from hire.ops.quantization import QuantizedRows, quantize_rows
from hire.ops.row_products import MAX_MULTIPLY_REDUCE_BATCH, plain_scores, row_scores, row_scores_at
from hire.ops.sortable import top_k_of_buckets
from hire.ops.tpu import bucket_scores
from hire.pytrees import pytree
from hire.types import Array, Fingerprint, Float, Indices, Queries, Rows


@pytree
class Quantized(QuantizedRows):
    """HiRE-Q: every row as integers of 8 or 4 bits times one float32 scale per row.

    Only proofs read `error_bounds`. They take 4 bytes per row, which `nbytes` does not count. Where
    they are None, nothing can be proved.

    Attributes:
        fingerprint: Fingerprint of the rows, or None.
        error_bounds: Error bounds `(m,)`, see `hire.estimators.error_bounds`, or None.
    """

    fingerprint: Fingerprint | None = None
    error_bounds: Float[Array, " m"] | None = None

    @classmethod
    def fit(
        cls, rows: Rows, bits: int, *, calibration: Queries | Iterable[Queries] | None = None
    ) -> "Quantized":
        """Round each row to the nearest of 2^bits - 1 even steps.

        The highest step is the row's largest entry. At 4 bits it is the value with the least total
        error. With calibration queries the scales minimise the error of scores instead of entries.

        Rotate rows that have a few large entries first: `LowRank.fit` at full rank with
        `directions="random"`. PAPER claim lr-and-q; the scales are our choice.

        Args:
            rows: Rows `(m, d)`.
            bits: 8 (one byte per entry) or 4 (two entries in a byte).
            calibration: Queries `(n, d)`, or an iterable of batches of them.

        Returns:
            The fitted estimator with its error bounds.

        Raises:
            ValueError: If `bits` is neither 8 nor 4, if rows or calibration are not finite, or if
                there are no calibration queries, if all of them are zero or their width is not d.
        """
        check_bits(bits)
        check_finite("rows", rows)
        root = (
            None
            if calibration is None
            else np.linalg.cholesky(
                regularized_second_moment(calibration, (rows.shape[0], rows.shape[1]))
            )
        )
        codes, scale = quantize_rows(
            rows, bits, None if root is None else jnp.asarray(root, jnp.float32)
        )
        estimator = cls(codes, scale, bits, rows.shape[1], cached_fingerprint(rows))
        return estimator.with_error_bounds(rows)

    def with_error_bounds(self, rows: Rows) -> "Quantized":
        """Return this estimator with its error bounds.

        Args:
            rows: The rows `(m, d)` that it was fitted to.

        Returns:
            The estimator with error bounds.
        """
        return replace(self, error_bounds=error_bounds(rows, lambda selection: (self[selection],)))

    def with_fingerprint(self, fingerprint: Fingerprint) -> "Quantized":
        """Return this estimator with the fingerprint of the same rows in another order."""
        return replace(self, fingerprint=fingerprint)

    def __getitem__(self, selection: slice) -> "Quantized":
        """Return a slice of the rows with the fingerprint of all rows."""
        bounds = None if self.error_bounds is None else self.error_bounds[selection]
        return replace(
            self, codes=self.codes[selection], scale=self.scale[selection], error_bounds=bounds
        )

    def bytes_read(self, candidates: int) -> int:
        """Return the bytes that a nomination reads: `nbytes`, for any number of candidates."""
        return self.nbytes

    @property
    def max_candidates(self) -> int:
        """The number of rows, m."""
        return self.shape[0]

    def nominate(
        self,
        x: Queries,
        candidates: int,
        *,
        implementation: str = "auto",
        per_bucket: int = PER_BUCKET,
    ) -> Indices:
        """Nominate the rows with the best estimated scores, see `Estimator.nominate`."""
        return nominate_quantized(
            x, self, candidates, implementation=implementation, per_bucket=per_bucket
        )

    def scores(self, x: Queries) -> Float[Array, "b m"]:
        """Return the estimated scores of all rows `(b, m)`."""
        return row_scores(x, self)

    def nomination_scores(self, x: Queries) -> Float[Array, "b m"]:
        """Return the estimated scores `(b, m)` with queries rounded as in `rounded_scores`."""
        return rounded_scores(x, self)

    def scores_at(self, x: Queries, indices: Indices) -> Float[Array, "b c"]:
        """Return the estimated scores of the rows at indices `(b, c)`."""
        return row_scores_at(x, self, indices)


def rounded_scores(x: Queries, rows: QuantizedRows) -> Float[Array, "b m"]:
    """Return the scores of all quantized rows, on a CPU with queries rounded to 16 bits.

    See `hire.ops.cpu.queries.round_queries` for the error. Proofs take `row_scores`.

    Args:
        x: Queries `(b, d)`.
        rows: Quantized rows `(m, d)`.

    Returns:
        Scores, float32 `(b, m)`.
    """

    def cpu(x: Queries, rows: QuantizedRows) -> Array:
        return cpu_kernels.load("row_scores").scores(x, rows, round_to_int16=True)

    is_chosen = is_cpu_supported(rows) and len(x) <= MAX_MULTIPLY_REDUCE_BATCH
    return dispatch("auto", plain_scores, x, rows, cpu=cpu if is_chosen else None)


def nominate_quantized(
    x: Queries, rows: QuantizedRows, candidates: int, *, implementation: str, per_bucket: int
) -> Indices:
    """Nominate the quantized rows with the best scores.

    The kernels compute products and buckets in one pass, see `dispatch`. The CPU kernel rounds the
    queries to 16 bits, see `hire.ops.cpu.queries.round_queries`.

    Args:
        x: Queries `(b, d)`.
        rows: Quantized rows `(m, d)`.
        candidates: Number of candidates, k'.
        implementation: "auto", "xla", "pallas" or "cpu".
        per_bucket: Rows that each bucket keeps.

    Returns:
        Row indices `(b, k')`, in no order.

    Raises:
        ValueError: If a kernel is forced and `candidates` exceeds `max_bucketed_candidates`, if
            "pallas" is forced and the buckets are not complete tiles, or if "cpu" is forced and the
            width is not supported.
    """
    m = rows.shape[0]
    options = dict(buckets=num_buckets(m), per_bucket=per_bucket)
    is_bucketed = candidates <= max_bucketed_candidates(m, per_bucket)
    if implementation in ("pallas", "cpu") and not is_bucketed:
        raise ValueError(
            f"implementation = {implementation!r}: expected k' up to "
            f"{max_bucketed_candidates(m, per_bucket)}, not {candidates}"
        )

    def plain(x: Queries, rows: QuantizedRows) -> Array:
        return jnp.asarray(nominate_from_scores(plain_scores(x, rows), candidates, per_bucket))

    def tpu(x: Queries, rows: QuantizedRows) -> Array:
        bucket_maxima = bucket_scores.bucket_top_k(
            x, rows.codes, rows.scale, bits=rows.bits, **options
        )
        depth = -(-m // options["buckets"])
        return jnp.asarray(top_k_of_buckets(list(bucket_maxima), candidates, depth))

    def cpu(x: Queries, rows: QuantizedRows) -> Array:
        return cpu_kernels.load("bucket_scores").nominate(x, rows, candidates, **options)

    return dispatch(
        implementation,
        plain,
        x,
        rows,
        tpu=tpu if is_bucketed and bucket_scores.is_supported(options["buckets"]) else None,
        cpu=cpu if is_bucketed and is_cpu_supported(rows) else None,
    )


def is_cpu_supported(rows: QuantizedRows) -> bool:
    """Whether the CPU kernel runs here and supports rows of this width."""
    return cpu_kernels.is_available() and cpu_kernels.load("queries").is_supported(rows)

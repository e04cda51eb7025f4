"""Nomination of candidates: the rows with the best estimated scores."""

import jax.numpy as jnp

from hire.ops.sortable import best_of_buckets, pack_buckets
from hire.ops.top_k import bucketed_indices, exact_top_k
from hire.types import Array, Float, Indices, Scores

# The best two of every 64 rows compete. A search takes its k' candidates from them if k' is at most
# half of their number.
ROWS_PER_BUCKET, PER_BUCKET = 64, 2


# A cascade keeps more rows per bucket, because a better estimator still separates them.
PER_BUCKET_OF_CASCADE = 4


def nominate_from_scores(scores: Scores, candidates: int, per_bucket: int = PER_BUCKET) -> Indices:
    """Return the indices of the `candidates` rows with the best estimated scores.

    If `candidates` is at most `max_bucketed_candidates`, only the best `per_bucket` rows of each
    bucket compete. A row is then missed only if `per_bucket` better rows share its bucket. This
    avoids a top-k of all rows, which would take longer than computing their scores.

    Args:
        scores: Estimated scores `(*b, m)`.
        candidates: Number of candidates, k' in the paper.
        per_bucket: Rows that each bucket keeps.

    Returns:
        Indices `(*b, k')`, in no order.
    """
    num_rows = scores.shape[-1]
    if candidates <= max_bucketed_candidates(num_rows, per_bucket):
        return bucketed_indices(scores, candidates, num_buckets(num_rows), per_bucket)
    return exact_top_k(scores, candidates).indices


def num_buckets(rows: int) -> int:
    """Return the number of buckets that `nominate_from_scores` uses for `rows` rows."""
    return -(-rows // ROWS_PER_BUCKET)


def max_bucketed_candidates(rows: int, per_bucket: int = PER_BUCKET) -> int:
    """Return the largest k' that `nominate_from_scores` takes from buckets.

    It is half of the rows that the buckets keep.

    Args:
        rows: Number of rows, m.
        per_bucket: Rows that each bucket keeps.

    Returns:
        The largest number of candidates.
    """
    return rows // ROWS_PER_BUCKET * per_bucket // 2


def mask_bucket_losers(scores: Float[Array, "b m"]) -> Float[Array, "b m"]:
    """Mask the scores of rows that are not among the best `PER_BUCKET` of their bucket.

    `nominate_from_scores` may not see the masked rows.

    Args:
        scores: Scores `(b, m)`.

    Returns:
        Scores `(b, m)`, -inf for the masked rows.
    """
    packed = pack_buckets(scores, num_buckets(scores.shape[-1]))
    is_winner = packed >= jnp.expand_dims(best_of_buckets(packed, PER_BUCKET)[-1], -2)
    return jnp.where(is_winner.reshape(len(scores), -1)[:, : scores.shape[-1]], scores, -jnp.inf)

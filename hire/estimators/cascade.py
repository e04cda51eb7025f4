"""Estimators in sequence, each more accurate than the one before."""

from collections.abc import Iterator
from dataclasses import field
from itertools import pairwise

import jax.numpy as jnp

from hire.estimators.base import Estimator
from hire.estimators.fingerprints import check_same_rows
from hire.ops.checks import check_range
from hire.ops.nomination import PER_BUCKET, PER_BUCKET_OF_CASCADE
from hire.ops.normalizer import logsumexp_correction, take_ranks
from hire.ops.top_k import exact_top_k
from hire.pytrees import pytree
from hire.types import Array, Fingerprint, Float, Indices, Queries


@pytree
class Cascade:
    """A sequence of estimators, each more accurate and more expensive than the one before.

    All estimators represent the same rows. Stage i nominates its `stage_sizes[i]` best rows to the
    next stage. A cascade is an `Estimator`, so every search accepts it. Our choice: the paper names
    low rank and quantization, but not in sequence.

    Attributes:
        estimators: The estimators, at least two.
        stage_sizes: Number of rows that each estimator but the last nominates, in decreasing order.

    Raises:
        ValueError: If `stage_sizes` does not have one entry fewer than `estimators`, if it
            increases, if an entry is not in 1..m, or if the estimators were fitted to different
            rows.
    """

    estimators: tuple[Estimator, ...]
    stage_sizes: tuple[int, ...] = field(metadata=dict(static=True))

    def __post_init__(self):
        shapes = {tuple(estimator.shape) for estimator in self.estimators}
        if len(shapes) > 1:
            raise ValueError(
                f"estimators of rows {', '.join(map(str, sorted(shapes)))}: expected all to be of "
                "the same"
            )
        [(m, d)] = shapes or [(0, 0)]
        counts = tuple(
            check_range("stage_sizes", count, 1, m, "the number of rows")
            for count in self.stage_sizes
        )
        if not 0 < len(counts) == len(self.estimators) - 1 or list(counts) != sorted(
            counts, reverse=True
        ):
            raise ValueError(
                f"stage_sizes = {counts} of {len(self.estimators)} estimators: expected falling "
                "numbers, "
                "one less"
            )
        object.__setattr__(self, "stage_sizes", counts)
        for first, second in pairwise(self.estimators):
            check_same_rows(first.fingerprint, second.fingerprint, f"estimators of rows {(m, d)}")

    @property
    def shape(self) -> tuple[int, int]:
        """Shape `(m, d)` of the rows."""
        return self.estimators[0].shape

    @property
    def nbytes(self) -> int:
        """Bytes of all estimators."""
        return sum(estimator.nbytes for estimator in self.estimators)

    @property
    def fingerprint(self) -> Fingerprint | None:
        """The fingerprint of the rows, from the first estimator."""
        return self.estimators[0].fingerprint

    def bytes_read(self, candidates: int) -> int:
        """Return the bytes that one nomination reads of all estimators.

        The first estimator is read as for `stage_sizes[0]` candidates, each later one only at the
        rows that it receives.

        Args:
            candidates: Number of candidates; it does not change the result.

        Returns:
            The number of bytes.
        """
        later_bytes = (
            count * estimator.nbytes // self.shape[0]
            for count, estimator in zip(self.stage_sizes, self.estimators[1:], strict=True)
        )
        return self.estimators[0].bytes_read(self.stage_sizes[0]) + sum(later_bytes)

    @property
    def max_candidates(self) -> int:
        """The last entry of `stage_sizes`."""
        return self.stage_sizes[-1]

    def nominate(
        self,
        x: Queries,
        candidates: int,
        *,
        implementation: str = "auto",
        per_bucket: int = PER_BUCKET,
    ) -> Indices:
        """Nominate by the scores of the last estimator, see `Estimator.nominate`."""
        *_, (indices, scores) = self.iter_stages(x, implementation)
        return jnp.take_along_axis(indices, exact_top_k(scores, candidates).indices, axis=1)

    def iter_stages(
        self, x: Queries, implementation: str = "auto"
    ) -> Iterator[tuple[Indices, Float[Array, "b c"]]]:
        """Run the stages and yield the candidates and scores of each but the first.

        Args:
            x: Queries `(b, d)`.
            implementation: "auto", "xla" or "pallas", for the first estimator.

        Yields:
            The rows that the stage receives `(b, c)`, in no order, and its scores of them `(b, c)`.
        """
        indices = self.estimators[0].nominate(
            x, self.stage_sizes[0], implementation=implementation, per_bucket=PER_BUCKET_OF_CASCADE
        )
        for estimator, count in zip(
            self.estimators[1:], (*self.stage_sizes[1:], None), strict=True
        ):
            scores = estimator.scores_at(x, indices)
            yield indices, scores
            if count is not None:
                indices = jnp.take_along_axis(indices, exact_top_k(scores, count).indices, axis=1)

    def scores(self, x: Queries) -> Float[Array, "b m"]:
        """Return the score of each row from the last estimator that scores it.

        Rows that a stage does not receive share one correction, as the tail in
        `HireSoftmax.top_k_with_normalizer`. The correction is the `logsumexp_correction` of the
        lower half of the candidates: the log-ratio of the sums of their exponentials with the
        stage's scores and with the scores before.

        Args:
            x: Queries `(b, d)`.

        Returns:
            Scores `(b, m)`.
        """
        scores = self.estimators[0].scores(x)
        for indices, refined in self.iter_stages(x):
            correction, _ = logsumexp_correction(
                *take_ranks(
                    refined, jnp.take_along_axis(scores, indices, axis=1), indices.shape[1] // 2
                )
            )
            scores = (
                (scores + correction[:, None]).at[jnp.arange(len(x))[:, None], indices].set(refined)
            )
        return scores

    def scores_at(self, x: Queries, indices: Indices) -> Float[Array, "b c"]:
        """Return the scores of the last estimator for the rows at indices `(b, c)`."""
        return self.estimators[-1].scores_at(x, indices)

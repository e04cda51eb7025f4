"""Means with confidence intervals over documents."""

from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

from hire.tuning import labelled


def relative_loss(ours: np.ndarray | Sequence[float], theirs: np.ndarray | Sequence[float]) -> dict:
    """Return the relative difference of two total losses on the same documents.

    The 95 % confidence interval is a bootstrap over documents: 2000 draws of n documents, with
    replacement.

    Args:
        ours: Loss of each document (n,) in nats.
        theirs: Loss of each document (n,) in nats, of the baseline.

    Returns:
        For a record: `mean`, `low`, `high` and `documents` (n).
    """
    return ratio(np.asarray(ours) - np.asarray(theirs), np.asarray(theirs))


def points(
    ours: np.ndarray | Sequence[float],
    theirs: np.ndarray | Sequence[float],
    documents: np.ndarray | None = None,
) -> dict:
    """Return the mean of `ours - theirs` with its 95 % confidence interval over documents.

    Args:
        ours: Values (n,) of tokens or questions.
        theirs: Values (n,) of the same tokens or questions.
        documents: Document of each value (n,). By default each value counts as one document.

    Returns:
        For a record: `mean`, `low`, `high`, `documents` and `n`.
    """
    differences = np.asarray(ours, np.float64) - np.asarray(theirs, np.float64)
    _, groups = np.unique(
        np.arange(len(differences)) if documents is None else documents, return_inverse=True
    )
    return ratio(np.bincount(groups, differences), np.bincount(groups)) | dict(n=len(differences))


def ratio(parts: np.ndarray, wholes: np.ndarray) -> dict:
    """Return the ratio of two sums over documents, with its 95 % bootstrap interval.

    Args:
        parts: Numerator of each document (n,).
        wholes: Denominator of each document (n,).

    Returns:
        `mean` (the ratio of the sums), `low`, `high` and `documents` (n).
    """
    draws = np.random.default_rng(0).integers(len(parts), size=(2000, len(parts)))
    low, high = np.quantile(parts[draws].sum(1) / wholes[draws].sum(1), [0.025, 0.975])
    return dict(
        mean=float(parts.sum() / wholes.sum()),
        low=float(low),
        high=float(high),
        documents=len(parts),
    )


def mean_bound(
    values: np.ndarray, documents: Sequence | np.ndarray | None = None, confidence: float = 0.95
) -> float:
    """Return a one-sided lower confidence bound of the mean of values in [0, 1].

    It is Wilson's score bound at the effective number of values: p (1 - p) over the squared
    standard error. With documents the standard error is taken over documents, so that it accounts
    for the similarity of the values of one document. When all values are 1, or all are 0, the
    effective number is n: the limit of ever rarer, unrelated misses.

    The bound is approximate, because it assumes that a mean over documents is normally distributed.
    Use dozens of documents.

    Args:
        values: Values (n,) in [0, 1].
        documents: Document of each value (n,).
        confidence: Confidence of the bound.

    Raises:
        ValueError: `documents` does not have one label per value, or there are fewer than two
            documents.
    """
    values = np.asarray(values, np.float64)
    _, group = labelled(values, documents)
    groups, n, mean = group.max() + 1, len(values), values.mean()
    if groups < 2:
        raise ValueError(
            f"{n} values of 1 document: expected at least 2 documents, whose differences give the "
            "bound"
        )
    residuals = np.bincount(group, values - mean)
    variance = groups / (groups - 1) * np.sum(residuals**2) / n**2
    effective = min(n, mean * (1 - mean) / variance) if variance > 0 else n
    z = NormalDist().inv_cdf(confidence)
    centre = mean + z**2 / (2 * effective)
    half_width = z * np.sqrt(mean * (1 - mean) / effective + z**2 / (4 * effective**2))
    return float((centre - half_width) / (1 + z**2 / effective))


def mean_with_interval(values: np.ndarray, documents: np.ndarray) -> dict:
    """Return the mean of values in [0, 1] with its 95 % confidence interval over documents.

    Args:
        values: Values (n,) in [0, 1].
        documents: Document of each value (n,).

    Returns:
        For a record: `mean`, `low`, `high`, `n` and `documents` (their number).
    """
    low, high = mean_bound(values, documents, 0.975), 1 - mean_bound(1 - values, documents, 0.975)
    return dict(
        mean=float(np.mean(values)),
        low=low,
        high=high,
        n=len(values),
        documents=len(np.unique(documents)),
    )

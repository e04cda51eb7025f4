"""Fit the search of an LM head to hidden states, and judge it on others."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hire.estimators.base import Estimator
from hire.estimators.low_rank import LowRank
from hire.estimators.quantized import Quantized
from hire.layers.softmax import HireSoftmax
from hire.ops.batches import batches
from hire.ops.checks import check_finite, check_range
from hire.ops.row_products import row_scores
from hire.ops.soft_cap import cap_softly
from hire.ops.top_k import TopK, exact_top_k
from hire.tuning import DENSE, Tuned, labelled, tune
from hire.types import AnyArray, Array, Float, Queries, Rows

# Ranks of the low-rank estimators, as shares of the width. Kernels read ranks in multiples of 32.
RANK_SHARES, RANK_STEP = (1 / 5, 1 / 4), 32
# A search that reads more than this share of the rows is hardly worth its estimator.
WORTHWHILE_BYTES = 0.5


class Interval(NamedTuple):
    """A mean with its 95 % confidence interval, a bootstrap over documents.

    Attributes:
        mean: The mean.
        low: Lower end of the interval.
        high: Upper end of the interval.
    """

    mean: float
    low: float
    high: float


class SoftmaxQuality(NamedTuple):
    """How well a search does on hidden states.

    Attributes:
        recall: Share of the true top-k that the search returns.
        top1: Share of states whose best token the search returns first.
        bytes_fraction: Bytes that one query reads, as a share of all rows.
        queries: Number of states.
        documents: Number of documents that they come from.
    """

    recall: Interval
    top1: Interval
    bytes_fraction: float
    queries: int
    documents: int


@dataclass(frozen=True)
class FittedSoftmax:
    """The search that `fit_softmax` has chosen, and the evidence for it.

    Attributes:
        softmax: The search. None if the product with all rows was faster than every search.
        tuned: Number of candidates, recall and cost of every estimator.
        bytes_fraction: Bytes that one query reads, as a share of all rows.
    """

    softmax: HireSoftmax | None
    tuned: Tuned
    bytes_fraction: float

    def summary(self) -> str:
        """Return one line for each estimator, and the choice."""
        unit = "s" if DENSE in self.tuned.choices else "bytes"
        lines = [
            f"{name}: k' = {choice.candidates}, recall {choice.recall:.4f} (at least "
            f"{choice.bound:.4f}), {cost:.4g} {unit} a call"
            for name, (choice, cost) in self.tuned.choices.items()
        ]
        return "\n".join(
            [*lines, f"chosen: {self.tuned.name}, {self.bytes_fraction:.1%} of the bytes"]
        )


def default_estimators(rows: Rows, states: Queries) -> dict[str, Estimator]:
    """Return the estimators that `fit_softmax` compares by default, by name.

    Args:
        rows: Rows `(v, d)`.
        states: Calibration states `(n, d)`.
    """
    width = rows.shape[1]
    ranks = {max(RANK_STEP, round(share * width / RANK_STEP) * RANK_STEP) for share in RANK_SHARES}
    estimators: dict[str, Estimator] = {
        f"Q int{bits}": Quantized.fit(rows, bits, calibration=states if bits == 4 else None)
        for bits in (8, 4)
    }
    for rank in sorted(rank for rank in ranks if rank < width):
        for bits in (8, 4):
            estimators[f"LR {rank} int{bits}"] = LowRank.fit(
                rows, rank, calibration=states, bits=bits
            )
    return estimators


def fit_softmax(
    rows: Rows,
    states: Queries,
    *,
    documents: Sequence | np.ndarray | None = None,
    k: int = 32,
    recall: float = 0.98,
    confidence: float = 0.95,
    bound: str = "betting",
    batch: int | None = None,
    bias: Float[AnyArray, " v"] | None = None,
    soft_cap: float = 0.0,
) -> FittedSoftmax:
    """Choose and fit the search of an LM head.

    Half of the documents fit the estimators, the other half choose among them and their number of
    candidates, see `hire.tune`. Our choice: the paper names no method.

    Args:
        rows: Rows `(v, d)` of the LM head, tied or not.
        states: Hidden states `(n, d)` of the text that you will search, after the final norm: some
            10,000 of hundreds of documents. Include every kind of text.
        documents: Document label of each state `(n,)`. By default each state is a document, which
            promises too much where states of one text are alike.
        k: Number of tokens that the search returns.
        recall: Target recall, strictly between 0 and 1.
        confidence: Confidence of the bound, strictly between 0 and 1.
        bound: "betting" or "bootstrap", as in `hire.tune`.
        batch: Queries of a call. With it the cost is the measured time of a call on this device,
            and the product with all rows is an answer too. Without it the cost is bytes.
        bias: Bias of the LM head `(v,)`, or None.
        soft_cap: Soft cap of the logits. 0 means none.

    Returns:
        The search and the evidence for it. A warning says when it saves little.

    Raises:
        ValueError: If shapes do not fit, if rows or states are not finite, or as `hire.tune`: above
            all if there are too few documents to promise the recall.
    """
    if states.ndim != 2 or states.shape[1] != rows.shape[1]:
        is_transposed = states.shape[1:] == rows.shape[:1]
        hint = "; rows stored (d, v) are passed as rows.T" if is_transposed else ""
        raise ValueError(
            f"states of shape {states.shape}: expected (n, {rows.shape[1]}), the width of the "
            f"rows{hint}"
        )
    check_finite("states", states)
    labels, group = labelled(np.ones(len(states)), documents)
    if len(labels) < 2:
        raise ValueError(
            f"{len(labels)} documents: expected two or more, to fit to some and choose on others"
        )
    order = np.random.default_rng(0).permutation(len(labels))
    is_fitted_to = np.isin(group, order[: len(labels) // 2])
    estimators = default_estimators(rows, states[is_fitted_to])
    tuned = tune(
        rows,
        estimators,
        states[~is_fitted_to],
        k=k,
        recall=recall,
        confidence=confidence,
        documents=group[~is_fitted_to],
        batch=batch,
        bound=bound,
        bias=bias,
    )
    if tuned.estimator is None:
        warnings.warn(
            f"the product with all rows is faster than every search at batch {batch}: nothing is "
            "saved",
            stacklevel=2,
        )
        return FittedSoftmax(None, tuned, 1.0)
    softmax = HireSoftmax(
        rows, tuned.estimator, k, tuned.choice.candidates, bias=bias, soft_cap=soft_cap
    )
    fraction = softmax.bytes_read() / softmax.rows.nbytes
    if fraction > WORTHWHILE_BYTES:
        warnings.warn(
            f"the search reads {fraction:.0%} of the rows' bytes: k' = {tuned.choice.candidates} "
            f"of {rows.shape[0]} rows. Are the states those after the final norm, and enough?",
            stacklevel=2,
        )
    return FittedSoftmax(softmax, tuned, fraction)


def evaluate(
    softmax: HireSoftmax, states: Queries, *, documents: Sequence | np.ndarray | None = None
) -> SoftmaxQuality:
    """Judge a search on hidden states that it was not fitted to.

    Args:
        softmax: The search, on one device.
        states: Hidden states `(n, d)`.
        documents: Document label of each state `(n,)`. By default each state is a document.

    Returns:
        Recall and top-1 with intervals over documents, and the bytes that one query reads.

    Raises:
        ValueError: If the search is sharded, or the states are not finite or of another width.
    """
    if softmax.axis is not None:
        raise ValueError("a sharded softmax: expected one on a single device")
    check_range("states", len(states), 1, 2**31 - 1, "their number")
    check_finite("states", states)
    labels, group = labelled(np.ones(len(states)), documents)
    hits, firsts = [], []
    for batch in batches(states):
        true = jax.device_get(true_tokens(softmax, batch))
        returned = jax.device_get(softmax(batch).indices)
        for true_tokens_, tokens in zip(true, returned, strict=True):
            hits.append(np.isin(true_tokens_, tokens).mean())
            firsts.append(true_tokens_[0] == tokens[0])
    return SoftmaxQuality(
        interval(np.asarray(hits), group),
        interval(np.asarray(firsts, float), group),
        softmax.bytes_read() / softmax.rows.nbytes,
        len(states),
        len(labels),
    )


@jax.jit
def true_tokens(softmax: HireSoftmax, states: Queries) -> Array:
    """Return the tokens of the exact top-k `(b, k)`."""
    scores = row_scores(states, softmax.rows)
    if softmax.bias is not None:
        scores = scores + softmax.bias[None]
    top: TopK = exact_top_k(cap_softly(scores, softmax.soft_cap), softmax.k)
    return jnp.asarray(top.indices)


def interval(values: np.ndarray, group: np.ndarray) -> Interval:
    """Return the mean of values with its 95 % bootstrap interval over documents.

    Args:
        values: Values `(n,)`.
        group: Index of the document of each value `(n,)`.
    """
    sums, counts = np.bincount(group, values), np.bincount(group)
    draws = np.random.default_rng(0).integers(len(sums), size=(2000, len(sums)))
    low, high = np.quantile(sums[draws].sum(1) / counts[draws].sum(1), [0.025, 0.975])
    return Interval(float(values.mean()), float(low), float(high))

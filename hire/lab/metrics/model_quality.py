"""Loss and agreement of a model's tokens, dense and searched."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hire.estimators.cascade import Cascade
from hire.estimators.low_rank import LowRank
from hire.estimators.quantized import Quantized
from hire.lab.data.model_states import States, hidden_states, in_batches, windows_per_pass
from hire.lab.data.text import Document
from hire.lab.metrics.intervals import mean_with_interval, points, relative_loss
from hire.layers.softmax import HireSoftmax
from hire.models import Decoder, TextModel
from hire.ops.row_products import row_scores
from hire.ops.soft_cap import cap_softly
from hire.ops.top_k import TopK, exact_top_k
from hire.sampling import sampling_probabilities
from hire.types import AnyArray, Array, Bool, Float, Int, Queries, Rows, Tokens


class Scores(NamedTuple):
    """Scores of each document (n,).

    In a model whose texts have no first token, the first token of a document has no context. It is
    not predicted and does not count, except that its bytes do.

    Attributes:
        nats: Sum of -log p of the document's tokens, in nats.
        hits: Number of tokens predicted correctly.
        tokens: Number of tokens that are predicted.
        bytes: Number of bytes of the document.
    """

    nats: np.ndarray
    hits: np.ndarray
    tokens: np.ndarray
    bytes: np.ndarray

    def of(self, chosen: np.ndarray) -> "Scores":
        """Return the scores of a subset of the documents."""
        return Scores(*(part[chosen] for part in self))

    def summary(self) -> dict[str, float]:
        """Summarize all documents as one text.

        Returns:
            `loss` (nats per token), `perplexity`, `accuracy` (fraction of tokens predicted
            correctly), `bits_per_byte` and `tokens` (number of tokens).
        """
        nats, hits, tokens, size = (float(part.sum()) for part in self)
        means = dict(
            loss=nats / tokens, perplexity=float(np.exp(nats / tokens)), accuracy=hits / tokens
        )
        return means | dict(bits_per_byte=nats / np.log(2) / size, tokens=int(tokens))


@jax.jit
def nll_and_correct(
    logits: Float[Array, "b t v"], targets: Tokens
) -> tuple[Float[Array, "b t"], Float[Array, "b t"]]:
    """Return -log p in nats of every target, and whether it has the highest logit.

    Args:
        logits: Logits (b, t, v).
        targets: Tokens (b, t).

    Returns:
        Two arrays (b, t).
    """
    return nll(logits, targets), (jnp.argmax(logits, axis=-1) == targets).astype(jnp.float32)


def score_documents(
    subject: TextModel, texts: Sequence[Document], length: int = 256, batch: int | None = None
) -> Scores:
    """Score every token of every document once, in adjacent windows.

    The context of a window's first token is the token that begins every text, such as <bos>. In a
    model whose texts have no first token, it is the token before it in the document; the first
    token of the document is not scored.

    Windows at the beginning of documents come first, so that the windows of a batch belong to
    different documents. The last window of a document is padded with its tokens; the padding does
    not count.

    Args:
        subject: The model with its tokenizer.
        texts: Documents.
        length: Tokens that a window scores.
        batch: Windows per forward pass; `windows_per_pass` by default.

    Raises:
        ValueError: No document has a token to score.
    """
    model, prefill = subject.model, hidden_states(subject.model)
    first = [] if subject.first_token is None else [subject.first_token]
    encoded = [
        [*first, *ids.ids]
        for ids in subject.tokenizer.encode_batch(
            [text.text for text in texts], add_special_tokens=False
        )
    ]
    starts = sorted(
        (start, index) for index, ids in enumerate(encoded) for start in range(1, len(ids), length)
    )
    if not starts:
        raise ValueError(f"{len(texts)} documents: expected at least one token to score in them")
    spans = [(index, encoded[index][start : start + length]) for start, index in starts]
    windows = np.zeros((len(spans), length + 1), np.int32)
    windows[:, 0] = first or [encoded[index][start - 1] for start, index in starts]
    for window, (_, ids) in zip(windows, spans, strict=True):
        window[1:] = np.resize(ids, length)
    is_token = np.arange(length)[None] < np.asarray([len(ids) for _, ids in spans])[:, None]
    size = batch or windows_per_pass(len(windows), length)
    scored = in_batches(
        lambda tokens: nll_and_correct(model.logits(prefill(tokens[:, :-1])), tokens[:, 1:]),
        windows,
        size,
    )
    owners = [index for index, _ in spans]
    nats, hits = (
        np.bincount(owners, np.where(is_token, part, 0).sum(1, dtype=np.float64), len(texts))
        for part in scored
    )
    return Scores(
        nats,
        hits,
        np.asarray([max(0, len(ids) - 1) for ids in encoded]),
        np.asarray([len(text.text.encode()) for text in texts]),
    )


@partial(jax.jit, static_argnames="soft_cap")
def loss(
    rows: Rows, hidden: Queries, targets: Int[AnyArray, " b"], soft_cap: float = 0.0
) -> Float[Array, " b"]:
    """Return -log p (b,) in nats of each target after hidden states (b, d)."""
    return nll(cap_softly(row_scores(hidden, rows), soft_cap), targets)


def nll(logits: Float[Array, "*b v"], targets: Int[AnyArray, "*b"]) -> Float[Array, "*b"]:
    """Return -log p (*b,) in nats of each target from its logits."""
    return (
        jax.nn.logsumexp(logits, axis=-1)
        - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    )


def losses(model: Decoder, states: States) -> np.ndarray:
    """Return -log p (n,) in nats of the token after each state, from exact logits."""
    return in_batches(
        partial(loss, model.head_rows(), soft_cap=model.config.logit_soft_cap),
        states.hidden,
        min(256, len(states.hidden)),
        states.targets,
    )


def total_variation(one: TopK, other: TopK, **sampling) -> np.ndarray:
    """Return the total variation between sampling from two top-k results.

    It is half the sum of |p - q| over all tokens.

    Args:
        one: Top-k (n, k) of the queries.
        other: Another top-k (n, k) of the same queries.
        **sampling: Settings of hire.sampling.sampling_probabilities.

    Returns:
        Total variation (n,).
    """
    probabilities = [np.asarray(sampling_probabilities(top, **sampling)) for top in (one, other)]
    variations = []
    for p, p_tokens, q, q_tokens in zip(
        probabilities[0],
        np.asarray(one.indices),
        probabilities[1],
        np.asarray(other.indices),
        strict=True,
    ):
        all_tokens, positions = np.unique(np.concatenate([p_tokens, q_tokens]), return_inverse=True)
        variations.append(
            0.5 * np.abs(np.bincount(positions, np.concatenate([p, -q]), len(all_tokens))).sum()
        )
    return np.asarray(variations)


class HeadOutputs(NamedTuple):
    """Output of the LM head for the tokens (n,) that followed.

    Attributes:
        nats: -log p of the token, in nats.
        hits: Whether the token is the top-1.
        outside: Whether the token is not among the candidates.
        best: The k best tokens (n, k).
    """

    nats: Float[AnyArray, " n"]
    hits: Bool[AnyArray, " n"]
    outside: Bool[AnyArray, " n"]
    true_top: TopK


@partial(jax.jit, static_argnames=("k", "soft_cap"))
def head_outputs_of_batch(
    softmax: HireSoftmax | Rows,
    hidden: Queries,
    targets: Int[AnyArray, " b"],
    k: int,
    soft_cap: float,
) -> HeadOutputs:
    """Evaluate a softmax on the tokens that followed hidden states.

    Args:
        softmax: The search, or the rows of a dense softmax.
        hidden: Hidden states (b, d).
        targets: The token that followed each state (b,).
        k: Number of best tokens.
        soft_cap: Soft cap of the logits of a dense softmax. A search has its own.
    """
    if isinstance(softmax, HireSoftmax):
        # All candidates, best first.
        results = replace(softmax, k=softmax.candidates).top_k_with_normalizer(hidden)
        nats = results.log_normalizer - softmax.exact_logits(hidden, targets[:, None])[:, 0]
        top, outside = results.top, jnp.all(results.top.indices != targets[:, None], axis=1)
    else:
        logits = cap_softly(row_scores(hidden, softmax), soft_cap)
        nats, top, outside = (
            nll(logits, targets),
            exact_top_k(logits, k),
            jnp.zeros(targets.shape, bool),
        )
    return HeadOutputs(
        nats, top.indices[:, 0] == targets, outside, TopK(top.values[:, :k], top.indices[:, :k])
    )


def head_outputs(
    softmax: HireSoftmax | Rows,
    states: States,
    k: int = 1,
    batch: int = 128,
    *,
    soft_cap: float = 0.0,
) -> HeadOutputs:
    """Evaluate a softmax on the tokens that followed states, in batches.

    Args:
        softmax: The search, or the rows of a dense softmax.
        states: Hidden states with their next tokens.
        k: Number of best tokens.
        batch: Hidden states per call.
        soft_cap: Soft cap of the logits of a dense softmax. A search has its own.

    Returns:
        The outputs for all states, as numpy arrays.
    """
    return in_batches(
        lambda *arrays: head_outputs_of_batch(softmax, *arrays, k=k, soft_cap=soft_cap),
        states.hidden,
        batch,
        states.targets,
    )


def scores_of(outputs: HeadOutputs, states: States, texts: Sequence[Document]) -> Scores:
    """Sum the outputs for the states of `document_states` by document."""
    nats, hits, tokens = (
        np.bincount(states.documents, part, len(texts))
        for part in (outputs.nats, outputs.hits, np.ones(len(outputs.nats)))
    )
    return Scores(nats, hits, tokens, np.asarray([len(text.text.encode()) for text in texts]))


def against(ours: HeadOutputs, exact: HeadOutputs, documents: np.ndarray) -> dict:
    """Compare a search with the exact softmax on the same tokens.

    Args:
        ours: Outputs of the search (n,).
        exact: Outputs of the exact softmax (n,).
        documents: Document of each token (n,).

    Returns:
        `loss`: relative difference of the loss, as from `relative_loss`.
        `variation`: total variation between sampling from both, as from `points`.
        `recall`, `agreement`, `outside`: recall of the k best tokens, rate at which the top-1 is
            the same, and rate of next tokens outside the candidates, each as from
            `mean_with_interval`.
    """
    _, owners = np.unique(documents, return_inverse=True)
    hits = np.stack(
        [np.isin(*pair) for pair in zip(exact.true_top.indices, ours.true_top.indices, strict=True)]
    )
    rates = dict(
        recall=hits.mean(1),
        agreement=ours.true_top.indices[:, 0] == exact.true_top.indices[:, 0],
        outside=ours.outside,
    )
    variation = total_variation(ours.true_top, exact.true_top)
    return dict(
        loss=relative_loss(
            *(np.bincount(owners, part.nats.astype(np.float64)) for part in (ours, exact))
        ),
        variation=points(variation, np.zeros(len(variation)), documents),
        **{
            name: mean_with_interval(np.asarray(values, np.float64), documents)
            for name, values in rates.items()
        },
    )


def softmaxes_of(
    rows: Rows, calibration: Queries, k: int, settings: Sequence[Sequence[int]]
) -> dict[str, HireSoftmax]:
    """Fit HiRE softmaxes with an int8 low-rank estimator.

    Args:
        rows: Rows (v, d) of the LM head.
        calibration: Hidden states that the estimator is fitted to.
        k: Number of tokens that are returned.
        settings: (rank, k') for a low-rank estimator. (rank, k', stage size) for a cascade: the
            low-rank estimator passes that many candidates on to int8 rows.

    Returns:
        The softmaxes by name.
    """
    softmaxes = {}
    for rank, candidates, *stage_sizes in settings:
        low_rank = LowRank.fit(rows, rank, calibration=calibration, bits=8)
        name = f"LR {rank} k'={candidates}" + "".join(f" of {size}" for size in stage_sizes)
        estimator = (
            Cascade((low_rank, Quantized.fit(rows, 8)), tuple(stage_sizes))
            if stage_sizes
            else low_rank
        )
        softmaxes[name] = HireSoftmax(rows, estimator, k, candidates)
    return softmaxes

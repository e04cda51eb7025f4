"""What a model makes of real text: hidden states by document, losses, and the quality of a search over them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hire.axes import AnyArray, Array, Float, Hidden, Int, Queries, Rows, Tokens
from hire.choose import batches, candidates_needed, mean_bound
from hire.estimators import Estimator, row_scores
from hire.lab.text import Document
from hire.models import Decoder, TextModel, generate
from hire.sampling import sampling_probabilities
from hire.softmax import HireSoftmax
from hire.topk import TopK, bucketed_top_k, expected_recall, expected_recall_top1, recall


@dataclass(frozen=True)
class States:
    """Hidden states (n, d), the token that followed each (n,), and the document that each comes from (n,)."""

    hidden: np.ndarray
    targets: np.ndarray
    documents: np.ndarray


def windows(subject: TextModel, texts: Sequence[Document], length: int, each: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Up to `each` windows of `length` tokens from every document, evenly spread, <bos> first: (w, length), and names (w,).

    Documents shorter than that are left out; raises ValueError when none is long enough.
    """
    tokens, names = [], []
    for text in texts:
        ids = subject.tokens(text.text)
        spans = min(each, (len(ids) - 1) // (length - 1))
        for span in range(spans):
            start = 1 + span * ((len(ids) - 1) // spans)
            tokens.append(np.concatenate([ids[:1], ids[start : start + length - 1]]))
            names.append(text.name)
    if not tokens:
        raise ValueError(f"{len(texts)} documents: none has {length} tokens")
    return np.stack(tokens), np.asarray(names)


@dataclass(frozen=True)
class Scores:
    """Of each document (n,): the sum of -log p of its tokens in nats, tokens guessed right, all tokens, bytes."""

    nats: np.ndarray
    hits: np.ndarray
    tokens: np.ndarray
    bytes: np.ndarray

    def of(self, chosen: np.ndarray) -> "Scores":
        """Those of some documents."""
        return Scores(*(getattr(self, part.name)[chosen] for part in fields(self)))

    def summary(self) -> dict[str, float]:
        """Loss in nats a token, bits a byte, and the share of tokens guessed right, over all documents as one text."""
        nats, hits, tokens, size = (float(part.sum()) for part in (self.nats, self.hits, self.tokens, self.bytes))
        return dict(loss=nats / tokens, bits_per_byte=nats / np.log(2) / size, accuracy=hits / tokens, tokens=int(tokens))


@partial(jax.jit, static_argnames="graph")
def window_scores(graph: nnx.GraphDef, state: nnx.State, tokens: Tokens) -> tuple[Float[Array, "b _"], Float[Array, "b _"]]:
    """-log p of every token of windows (b, t) but the first, and whether it was the likeliest, each (b, t - 1)."""
    model = nnx.merge(graph, state)
    logits = model.logits(model.prefill(tokens[:, :-1])[0])
    return surprise(logits, tokens[:, 1:]), (jnp.argmax(logits, axis=-1) == tokens[:, 1:]).astype(jnp.float32)


def score_documents(subject: TextModel, texts: Sequence[Document], length: int = 256, batch: int = 16) -> Scores:
    """Every token of every document, predicted once: windows of `length` tokens side by side, each after <bos> alone.

    Beginnings come first, so that windows of one batch are of different documents; a last window is filled up with its own tokens
    again, which count for nothing.
    """
    graph, state = nnx.split(subject.model)
    encoded = [ids.ids for ids in subject.tokenizer.encode_batch([text.text for text in texts], add_special_tokens=False)]
    starts = sorted((start, index) for index, ids in enumerate(encoded) for start in range(0, len(ids), length))
    spans = [(index, encoded[index][start : start + length]) for start, index in starts]
    windows = np.zeros((len(spans), length + 1), np.int32)
    windows[:, 0] = subject.tokens("")[0]
    for window, (_, ids) in zip(windows, spans, strict=True):
        window[1:] = np.resize(ids, length)
    real = np.arange(length)[None] < np.asarray([len(ids) for _, ids in spans])[:, None]
    scored = in_batches(partial(window_scores, graph, state), windows, batch)
    owner = [index for index, _ in spans]
    nats, hits = (np.bincount(owner, np.where(real, part, 0).sum(1, dtype=np.float64), len(texts)) for part in scored)
    return Scores(nats, hits, np.asarray(list(map(len, encoded))), np.asarray([len(text.text.encode()) for text in texts]))


def over(ours: np.ndarray | Sequence[float], theirs: np.ndarray | Sequence[float]) -> dict:
    """How far losses (n,), nats of each document, lie over others of the same documents in all: relative, with its 95 % interval
    over documents (2000 draws of n of them, with replacement), as a record states it.
    """
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    drawn = np.random.default_rng(0).integers(len(ours), size=(2000, len(ours)))
    low, high = np.quantile(ours[drawn].sum(1) / theirs[drawn].sum(1) - 1, [0.025, 0.975])
    return dict(mean=float(ours.sum() / theirs.sum() - 1), low=float(low), high=float(high), documents=len(ours))


def in_batches(function: Callable, values: AnyArray, batch: int):
    """What a compiled function returns for values (n, …), in numpy; it is called with batches of one size, so it compiles once."""
    padded = np.concatenate([values, values[:1].repeat(-len(values) % batch, 0)])
    parts = [jax.device_get(function(part)) for part in batches(padded, batch)]
    return jax.tree.map(lambda *pieces: np.concatenate(pieces)[: len(values)], *parts)


@partial(jax.jit, static_argnames="graph")
def hidden_states(graph: nnx.GraphDef, state: nnx.State, tokens: Tokens) -> Hidden:
    """Hidden states (b, t, d) of texts (b, t)."""
    return nnx.merge(graph, state).prefill(tokens)[0]


def collect(model: Decoder, tokens: np.ndarray, names: np.ndarray, *, skip: int = 1, batch: int = 16) -> States:
    """Hidden states of windows (w, t) from position `skip` on, all but the last position, whose next token is not known."""
    graph, state = nnx.split(model)
    hidden = in_batches(partial(hidden_states, graph, state), tokens, batch)[:, skip:-1]
    count = hidden.shape[1]
    return States(hidden.reshape(-1, hidden.shape[-1]), tokens[:, skip + 1 :].reshape(-1), np.repeat(names, count))


@jax.jit
def loss(rows: Rows, hidden: Queries, targets: Int[AnyArray, " b"]) -> Float[Array, " b"]:
    """-log p (b,) of each target, in nats."""
    return surprise(row_scores(hidden, rows), targets)


def surprise(logits: Float[Array, "*b v"], targets: Int[AnyArray, "*b"]) -> Float[Array, "*b"]:
    """-log p (*b,) of each target, in nats."""
    return jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]


def losses(model: Decoder, states: States) -> np.ndarray:
    """-log p (n,) of the token that followed each state, in nats, from exact logits."""
    rows = model.embedding[...]
    pairs = zip(batches(states.hidden), batches(states.targets), strict=True)
    return np.concatenate([np.asarray(loss(rows, *pair)) for pair in pairs])


def total_variation(one: TopK, other: TopK, **sampling) -> np.ndarray:
    """Half the sum over all words of |p - q| (n,), for the distributions that two top-k (n, k) of the same queries sample from."""
    shares = [np.asarray(sampling_probabilities(top, **sampling)) for top in (one, other)]
    apart = []
    for p, words, q, others in zip(shares[0], np.asarray(one.indices), shares[1], np.asarray(other.indices), strict=True):
        every, places = np.unique(np.concatenate([words, others]), return_inverse=True)
        apart.append(0.5 * np.abs(np.bincount(places, np.concatenate([p, -q]), len(every))).sum())
    return np.asarray(apart)


def rate(values: np.ndarray, documents: np.ndarray) -> dict:
    """Mean of values (n,) in [0, 1] with its 95 % interval over documents, as a record states it."""
    low, high = mean_bound(values, documents, 0.975), 1 - mean_bound(1 - values, documents, 0.975)
    return dict(mean=float(np.mean(values)), low=low, high=high, n=len(values), documents=len(np.unique(documents)))


def curve(rows: Rows, estimator: Estimator, hidden: Queries, best: TopK, candidates: Sequence[int]) -> dict[str, list[float]]:
    """An estimator at every k' of `candidates`, against the true top-k of the queries: recall, top-1 kept, the probability kept
    (the share of the true top-k's probability that lies on those found), and the bytes read as a share of float32 rows.
    """
    k = best.indices.shape[1]
    found = candidates_needed(estimator, hidden, best.indices)[:, :, None] <= np.asarray(candidates)
    shares = np.exp(best.values - best.values.max(1, keepdims=True))
    shares /= shares.sum(1, keepdims=True)
    return dict(
        recall=found.mean((0, 1)).tolist(),
        top1=found[:, 0].mean(0).tolist(),
        mass=(found * shares[:, :, None]).sum(1).mean(0).tolist(),
        bytes=[HireSoftmax(rows, estimator, k, count).bytes_read / (4 * rows.size) for count in candidates],
    )


def found_by(softmax: HireSoftmax, hidden: Queries, batch: int = 64) -> TopK:
    """What the search returns for many queries (n, d), in numpy."""
    return in_batches(softmax, hidden, batch)


def judge(softmax: HireSoftmax, states: States, best: TopK, batch: int = 64) -> dict[str, dict]:
    """Rates of recall and of top-1 kept over states, on the indices that the search itself returns."""
    found = found_by(softmax, states.hidden, batch).indices
    hits = np.stack([np.isin(true, got) for true, got in zip(best.indices, found, strict=True)])
    return dict(recall=rate(hits.mean(1), states.documents), top1=rate(hits[:, 0], states.documents))


def distribution(softmax: HireSoftmax, model: Decoder, states: States, best: TopK) -> dict[str, float]:
    """What the search does to sampling and to perplexity over states, against exact logits.

    top-1 agreement; total variation between sampling from what is found and from the exact top-k, its mean and 99th percentile;
    exact perplexity, and how far the one with the estimated normaliser is from it (relative); the mean absolute error of a loss in
    nats, and the share of losses within two of the errors that the softmax states.
    """
    found = found_by(softmax, states.hidden)
    apart = total_variation(found, best)
    exact, estimated, stated = losses(model, states), [], []
    for hidden, targets in zip(batches(states.hidden, 64), batches(states.targets[:, None], 64), strict=True):
        words = softmax.words(hidden)
        estimated.append(words.log_normalizer - softmax.exact_logits(hidden, targets)[:, 0])
        stated.append(words.error)
    estimated, stated = np.concatenate(estimated), np.concatenate(stated)
    off = np.abs(estimated - exact)
    return dict(
        agreement=float(np.mean(found.indices[:, 0] == best.indices[:, 0])),
        variation=float(apart.mean()),
        variation_99=float(np.quantile(apart, 0.99)),
        perplexity=float(np.exp(exact.mean())),
        perplexity_off=float(np.expm1(estimated.mean() - exact.mean())),
        nats_off=float(off.mean()),
        within_two_errors=float(np.mean(off < 2 * stated)),
    )


def side_by_side(subject: TextModel, other: Decoder, text: str, prompt: int, new_tokens: int) -> str:
    """Greedy continuations of a text's first tokens by a model and another form of it, and what each wanted where they part."""
    tokens = jnp.asarray(subject.tokens(text, prompt))[None]
    lines = [np.asarray(generate(form, tokens, new_tokens=new_tokens))[0] for form in (subject.model, other)]
    told = [repr(subject.tokenizer.decode(lines[0][1:].tolist()))]
    parted = np.flatnonzero(lines[0] != lines[1])
    if not len(parted):
        return f"{told[0]}\n    the same, word for word"
    at = int(parted[0])
    logits = subject.model.logits(subject.model.prefill(jnp.asarray(lines[0][None, :at]))[0][:, -1])[0]
    for name, line in zip(("dense", "HiRE"), lines, strict=True):
        told.append(
            f"    from word {at} on, {name}: {subject.tokenizer.decode(line[at:].tolist())!r}, dense logit {logits[line[at]]:.3f}"
        )
    return "\n".join(told)


def two_stage(logits: Float[Array, "b m"], k: int, buckets: Sequence[int]) -> dict[str, list[float]]:
    """Recall of the bucketed top-k of logits at each number of buckets, one or two per bucket, beside its published formulas."""
    rows = logits.shape[1]
    lines = {"formula TPU-KNN": [expected_recall_top1(k, buckets=count) for count in buckets]}
    for each in (1, 2):
        found = [bucketed_top_k(logits, k, buckets=count, per_bucket=each).indices for count in buckets]
        lines[f"measured {each}"] = [float(recall(indices, logits, k).mean()) for indices in found]
        lines[f"formula {each}"] = [expected_recall(rows, k, buckets=count, per_bucket=each) for count in buckets]
    return lines

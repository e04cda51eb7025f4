"""What a model makes of real text: hidden states by document, losses, and the quality of a search over them."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial, reduce
from statistics import NormalDist
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hire.axes import AnyArray, Array, Bool, Float, Hidden, Int, Queries, Rows, Tokens
from hire.choose import batches, candidates_needed, labelled
from hire.estimators import Estimator, LowRank, Quantized, row_scores
from hire.ffn import HireFFN
from hire.lab.text import Document
from hire.models import Decoder, TextModel, convert, generate
from hire.sampling import sampling_probabilities
from hire.search import Cascade
from hire.softmax import HireSoftmax
from hire.topk import TopK, bucketed_top_k, exact_top_k, expected_recall, expected_recall_top1, recall


class States(NamedTuple):
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
        ids = subject.tokens(text.text if each > 1 else text.text[: 32 * length])  # the first window of a book takes little of it
        spans = min(each, (len(ids) - 1) // (length - 1))
        for span in range(spans):
            start = 1 + span * ((len(ids) - 1) // spans)
            tokens.append(np.concatenate([ids[:1], ids[start : start + length - 1]]))
            names.append(text.name)
    if not tokens:
        raise ValueError(f"{len(texts)} documents: none has {length} tokens")
    return np.stack(tokens), np.asarray(names)


class Scores(NamedTuple):
    """Of each document (n,): the sum of -log p of its tokens in nats, tokens guessed right, all tokens, bytes."""

    nats: np.ndarray
    hits: np.ndarray
    tokens: np.ndarray
    bytes: np.ndarray

    def of(self, chosen: np.ndarray) -> "Scores":
        """Those of some documents."""
        return Scores(*(part[chosen] for part in self))

    def summary(self) -> dict[str, float]:
        """Loss in nats a token and perplexity, bits a byte, the share of tokens guessed right, over all documents as one text."""
        nats, hits, tokens, size = (float(part.sum()) for part in self)
        each = dict(loss=nats / tokens, perplexity=float(np.exp(nats / tokens)), accuracy=hits / tokens)
        return each | dict(bits_per_byte=nats / np.log(2) / size, tokens=int(tokens))


@jax.jit
def guessed(logits: Float[Array, "b t v"], targets: Tokens) -> tuple[Float[Array, "b t"], Float[Array, "b t"]]:
    """-log p of every target (b, t), and whether it was the likeliest, each (b, t)."""
    return surprise(logits, targets), (jnp.argmax(logits, axis=-1) == targets).astype(jnp.float32)


TOGETHER = 1024  # tokens of texts that are computed at once: with more the activations of a layer leave a CPU's caches


def at_once(windows: int, length: int) -> int:
    """How many of so many windows of `length` tokens are computed at once."""
    return min(windows, max(1, TOGETHER // length))


def score_documents(subject: TextModel, texts: Sequence[Document], length: int = 256, batch: int | None = None) -> Scores:
    """Every token of every document, predicted once: windows of `length` tokens side by side (`batch` at once), each after <bos>
    alone.

    Beginnings come first, so that windows of one batch are of different documents; a last window is filled up with its own tokens
    again, which count for nothing.
    """
    model, prefill = subject.model, hidden_states(subject.model)
    encoded = [ids.ids for ids in subject.tokenizer.encode_batch([text.text for text in texts], add_special_tokens=False)]
    starts = sorted((start, index) for index, ids in enumerate(encoded) for start in range(0, len(ids), length))
    spans = [(index, encoded[index][start : start + length]) for start, index in starts]
    windows = np.zeros((len(spans), length + 1), np.int32)
    windows[:, 0] = subject.tokens("")[0]
    for window, (_, ids) in zip(windows, spans, strict=True):
        window[1:] = np.resize(ids, length)
    real = np.arange(length)[None] < np.asarray([len(ids) for _, ids in spans])[:, None]
    size = batch or at_once(len(windows), length)
    scored = in_batches(lambda tokens: guessed(model.logits(prefill(tokens[:, :-1])), tokens[:, 1:]), windows, size)
    owner = [index for index, _ in spans]
    nats, hits = (np.bincount(owner, np.where(real, part, 0).sum(1, dtype=np.float64), len(texts)) for part in scored)
    return Scores(nats, hits, np.asarray(list(map(len, encoded))), np.asarray([len(text.text.encode()) for text in texts]))


def over(ours: np.ndarray | Sequence[float], theirs: np.ndarray | Sequence[float]) -> dict:
    """How far losses (n,), nats of each document, lie over others of the same documents in all: relative, with its 95 % interval
    over documents (2000 draws of n of them, with replacement), as a record states it.
    """
    return ratio(np.asarray(ours) - np.asarray(theirs), np.asarray(theirs))


def points(ours: np.ndarray | Sequence[float], theirs: np.ndarray | Sequence[float], documents: np.ndarray | None = None) -> dict:
    """Mean of ours - theirs (n,), values of the same tokens or questions, with its 95 % interval over their documents (n,), as a
    record states it. Without documents each question is one.
    """
    apart = np.asarray(ours, np.float64) - np.asarray(theirs, np.float64)
    _, owner = np.unique(np.arange(len(apart)) if documents is None else documents, return_inverse=True)
    return ratio(np.bincount(owner, apart), np.bincount(owner)) | dict(n=len(apart))


def ratio(parts: np.ndarray, wholes: np.ndarray) -> dict:
    """Sum of parts (n,) over that of wholes (n,), those of each document, with its 95 % bootstrap interval over documents."""
    drawn = np.random.default_rng(0).integers(len(parts), size=(2000, len(parts)))
    low, high = np.quantile(parts[drawn].sum(1) / wholes[drawn].sum(1), [0.025, 0.975])
    return dict(mean=float(parts.sum() / wholes.sum()), low=float(low), high=float(high), documents=len(parts))


def in_batches(function: Callable, values: AnyArray, batch: int, *more: AnyArray):
    """What a compiled function returns for values (n, …), and more of them, in numpy; it is called with batches of one size, so it
    compiles once.
    """
    filled = [np.concatenate([part, part[:1].repeat(-len(part) % batch, 0)]) for part in (values, *more)]
    parts = [jax.device_get(function(*each)) for each in zip(*(batches(part, batch) for part in filled), strict=True)]
    return jax.tree.map(lambda *pieces: np.concatenate(pieces)[: len(values)], *parts)


@partial(jax.jit, static_argnames="graph")
def passed(graph: nnx.GraphDef, state: nnx.State, x: Hidden) -> Hidden:
    """What a block makes of texts (b, t, d)."""
    block = nnx.merge(graph, state)
    return block(x, block.attention.whole, x.shape[1])[0]


def hidden_states(model: Decoder) -> Callable[[AnyArray], Hidden]:
    """Texts (b, t) -> hidden states (b, t, d), as Decoder.prefill. It goes block by block, so that one of each kind is compiled."""
    blocks = [nnx.split(block) for block in model.blocks]

    def prefilled(tokens: AnyArray) -> Hidden:
        return model.norm(reduce(lambda x, block: passed(*block, x), blocks, model.embed(tokens)))

    return prefilled


def collect(model: Decoder, tokens: np.ndarray, names: np.ndarray, *, skip: int = 1) -> States:
    """Hidden states of windows (w, t) from position `skip` on, all but the last position, whose next token is not known."""
    hidden = in_batches(hidden_states(model), tokens, at_once(*tokens.shape))[:, skip:-1]
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
    return in_batches(partial(loss, model.token_embeddings()), states.hidden, min(256, len(states.hidden)), states.targets)


def total_variation(one: TopK, other: TopK, **sampling) -> np.ndarray:
    """Half the sum over all words of |p - q| (n,), for the distributions that two top-k (n, k) of the same queries sample from."""
    shares = [np.asarray(sampling_probabilities(top, **sampling)) for top in (one, other)]
    apart = []
    for p, words, q, others in zip(shares[0], np.asarray(one.indices), shares[1], np.asarray(other.indices), strict=True):
        every, places = np.unique(np.concatenate([words, others]), return_inverse=True)
        apart.append(0.5 * np.abs(np.bincount(places, np.concatenate([p, -q]), len(every))).sum())
    return np.asarray(apart)


class Asked(NamedTuple):
    """Tokens (t,) from <bos> on, of which the last `wanted` are to be predicted, each from all before it."""

    tokens: np.ndarray
    wanted: int


def continuation(subject: TextModel, context: str, text: str) -> Asked:
    """A text to be predicted after a context: the tokens of both, less as many as the context alone has."""
    tokens = subject.tokens(context + text)
    return Asked(tokens, len(tokens) - len(subject.tokens(context)))


def sliding(tokens: np.ndarray, length: int, stride: int) -> list[Asked]:
    """Every token (t,) after <bos> asked for once: those of a first window of `length`, then the last `stride` of windows that
    reach back as far. Each window begins with <bos>. Raises ValueError when 1 <= stride <= length does not hold.
    """
    if not 1 <= stride <= length:
        raise ValueError(f"stride = {stride}: expected 1 <= stride <= length = {length}")
    asked, done = [], 1
    while done < len(tokens):
        end = min(len(tokens), done + (length if done == 1 else stride))
        asked.append(Asked(np.concatenate([tokens[:1], tokens[max(1, end - length) : end]]), end - done))
        done = end
    return asked


def filled_length(count: int, context: int) -> int:
    """The length that so many tokens are filled up to: a power of two or three quarters of one, so that a few programs do."""
    power = max(32, 1 << (count - 1).bit_length())
    return min(context, power * 3 // 4 if count <= power * 3 // 4 else power)


def states_of(model: Decoder, asked: Sequence[Asked]) -> States:
    """The hidden states that the tokens asked for are predicted from, in their order; those tokens; and the place in `asked` that
    each comes from. Texts of similar length are computed together.

    Raises ValueError, naming the place, when there is nothing to predict or more text than the model's context.
    """
    prefill, context, hidden = hidden_states(model), model.config.context, {}
    for place, (tokens, wanted) in enumerate(asked):
        if not 1 <= wanted < len(tokens) <= context + 1:
            raise ValueError(
                f"text {place}: {wanted} of {len(tokens)} tokens to predict: expected at least 1, after <bos>, and at most the "
                f"context of {context} before the last"
            )
    fed = [len(tokens) - 1 for tokens, _ in asked]  # the last one is only predicted
    left = sorted(range(len(asked)), key=lambda place: -fed[place])
    while left:
        length = filled_length(fed[left[0]], context)
        size = at_once(len(left), length)
        some, left = left[:size], left[size:]
        window = np.zeros((size, length), np.int32)
        for row, place in zip(window, some, strict=False):
            row[: fed[place]] = asked[place].tokens[:-1]
        for row, place in zip(np.asarray(prefill(window)), some, strict=False):
            hidden[place] = row[fed[place] - asked[place].wanted : fed[place]]
    targets, counts = [tokens[-wanted:] for tokens, wanted in asked], [wanted for _, wanted in asked]
    every = np.concatenate([hidden[place] for place in range(len(asked))])
    return States(every, np.concatenate(targets), np.repeat(np.arange(len(asked)), counts))


def document_states(subject: TextModel, texts: Sequence[Document], length: int = 256, stride: int = 128) -> States:
    """The state that every token of every document is predicted from (see sliding); documents are told by their place in `texts`.

    Raises ValueError, naming the document, for one without text, and unless 1 <= stride <= length <= the model's context.
    """
    asked, context = [], subject.model.config.context
    if length > context:
        raise ValueError(f"length = {length}: expected at most {context}, the model's context")
    for place, text in enumerate(texts):
        if not text.text:
            raise ValueError(f"document {text.name!r}: expected text, it is empty")
        asked += [(place, each) for each in sliding(subject.tokens(text.text), length, stride)]
    states = states_of(subject.model, [each for _, each in asked])
    return states._replace(documents=np.asarray([place for place, _ in asked])[states.documents])


class Told(NamedTuple):
    """What a softmax says of tokens (n,): -log p in nats; whether it is the likeliest; whether it lies outside the candidates; and
    the k best words (n, k).
    """

    nats: Float[AnyArray, " n"]
    hits: Bool[AnyArray, " n"]
    outside: Bool[AnyArray, " n"]
    best: TopK


@partial(jax.jit, static_argnames="k")
def words_told(softmax: HireSoftmax | Rows, hidden: Queries, targets: Int[AnyArray, " b"], k: int) -> Told:
    """What a softmax, searched or dense over rows, says of the tokens (b,) that followed hidden states (b, d)."""
    if isinstance(softmax, HireSoftmax):
        every = replace(softmax, k=softmax.candidates).words(hidden)  # all that is looked at, best first
        nats = every.log_normalizer - softmax.exact_logits(hidden, targets[:, None])[:, 0]
        best, outside = every.top, jnp.all(every.top.indices != targets[:, None], axis=1)
    else:
        logits = row_scores(hidden, softmax)
        nats, best, outside = surprise(logits, targets), exact_top_k(logits, k), jnp.zeros(targets.shape, bool)
    return Told(nats, best.indices[:, 0] == targets, outside, TopK(best.values[:, :k], best.indices[:, :k]))


def told(softmax: HireSoftmax | Rows, states: States, k: int = 1, batch: int = 128) -> Told:
    """What a softmax, searched or dense over rows, says of the tokens that followed states, in numpy."""
    return in_batches(lambda *some: words_told(softmax, *some, k=k), states.hidden, batch, states.targets)


def scores_of(told: Told, states: States, texts: Sequence[Document]) -> Scores:
    """What was told of document_states, by document."""
    nats, hits, tokens = (
        np.bincount(states.documents, part, len(texts)) for part in (told.nats, told.hits, np.ones(len(told.nats)))
    )
    return Scores(nats, hits, tokens, np.asarray([len(text.text.encode()) for text in texts]))


def against(ours: Told, exact: Told, documents: np.ndarray) -> dict:
    """What a search changes: of tokens (n,) of documents (n,), the loss over the exact softmax's (relative), recall of its k best
    words, how often the first is the same, the total variation between sampling from both, and next words outside the candidates.
    """
    _, owner = np.unique(documents, return_inverse=True)
    found = np.stack([np.isin(*pair) for pair in zip(exact.best.indices, ours.best.indices, strict=True)])
    kept = dict(recall=found.mean(1), agreement=ours.best.indices[:, 0] == exact.best.indices[:, 0], outside=ours.outside)
    apart = total_variation(ours.best, exact.best)
    return dict(
        loss=over(*(np.bincount(owner, part.nats.astype(np.float64)) for part in (ours, exact))),
        variation=points(apart, np.zeros(len(apart)), documents),
        **{name: rate(np.asarray(values, np.float64), documents) for name, values in kept.items()},
    )


def softmaxes_of(rows: Rows, seen: Queries, k: int, settings: Sequence[Sequence[int]]) -> dict[str, HireSoftmax]:
    """Softmaxes by name: each by an int8 low-rank copy (its rank, k') that is fitted to the hidden states that were `seen`, or by a
    cascade of one and int8 rows (rank, k', what it keeps for those).
    """
    found = {}
    for rank, candidates, *kept in settings:
        copy = LowRank.fit(rows, rank, calibration=seen, bits=8)
        name = f"LR {rank} k'={candidates}" + "".join(f" of {most}" for most in kept)
        estimator = Cascade((copy, Quantized.fit(rows, 8)), tuple(kept)) if kept else copy
        found[name] = HireSoftmax(rows, estimator, k, candidates)
    return found


def in_every_form(rows: Rows, seen: Queries, rank: int, k: int, candidates: int) -> dict[str, HireSoftmax]:
    """A softmax searched by a low-rank copy, a 4-bit one, and an int8 low-rank one fitted to the hidden states that were `seen`."""
    copies = {"LR": LowRank.fit(rows, rank), "Q": Quantized.fit(rows, 4)}
    copies["LR fitted int8"] = LowRank.fit(rows, rank, calibration=seen, bits=8)
    return {f"{name} k'={candidates}": HireSoftmax(rows, copy, k, candidates) for name, copy in copies.items()}


def stated(found: dict) -> str:
    """What `against` found, in a line."""
    parts = (f"{name} {found[name]['mean']:.4f}" for name in ("recall", "agreement", "variation", "outside"))
    return "loss {mean:+.3%} ({low:+.3%} to {high:+.3%})".format(**found["loss"]) + f", {', '.join(parts)}"


def compared(
    subject: TextModel,
    ffns: dict[str, Sequence[HireFFN] | None],
    softmaxes: dict[str, HireSoftmax | None],
    texts: Sequence[Document],
    k: int,
    **windows: int,
) -> tuple[dict[str, float], dict[str, dict]]:
    """The summary of a model on texts, and what its every form changes (see against), "ffn, softmax" by "ffn, softmax": None is
    as the model has it. One prefill serves all softmaxes. `windows` as for document_states.
    """
    rows, own, found = subject.model.token_embeddings(), document_states(subject, texts, **windows), {}
    exact = told(rows, own, k)
    for layers, ffn in ffns.items():
        model = subject.model if ffn is None else convert(subject.model, ffn=ffn)
        states = own if ffn is None else document_states(replace(subject, model=model), texts, **windows)
        for words, softmax in softmaxes.items():
            if (ffn, softmax) != (None, None):
                ours = told(rows if softmax is None else softmax, states, k)
                found[f"{layers}, {words}"] = against(ours, exact, own.documents)
    return scores_of(exact, own, texts).summary(), found


def mean_bound(values: np.ndarray, documents: Sequence | np.ndarray | None = None, confidence: float = 0.95) -> float:
    """One-sided lower confidence bound of the mean of values (n,) in [0, 1].

    Wilson's score bound at the effective number of values: p (1 - p) over the squared standard error, which is
    taken over documents when they are given (n labels), so that it counts how alike the values of one document are. When every
    value is 1, as when none is, the effective number is n, the limit of ever rarer, unrelated misses. Approximate (it rests on the
    normal distribution of a mean over documents), so give it dozens of documents.

    Raises ValueError when documents are not one label a value, or are fewer than two.
    """
    values = np.asarray(values, np.float64)
    _, group = labelled(values, documents)
    groups, n, mean = group.max() + 1, len(values), values.mean()
    if groups < 2:
        raise ValueError(f"{n} values of 1 document: expected at least 2 documents, whose differences give the bound")
    residuals = np.bincount(group, values - mean)
    variance = groups / (groups - 1) * np.sum(residuals**2) / n**2
    effective = min(n, mean * (1 - mean) / variance) if variance > 0 else n
    z = NormalDist().inv_cdf(confidence)
    centre = mean + z**2 / (2 * effective)
    spread = z * np.sqrt(mean * (1 - mean) / effective + z**2 / (4 * effective**2))
    return float((centre - spread) / (1 + z**2 / effective))


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


def found_by(softmax: HireSoftmax, hidden: Queries, batch: int = 128) -> TopK:
    """What the search returns for many queries (n, d), in numpy."""
    return in_batches(softmax, hidden, batch)


def judge(search: HireSoftmax | TopK, states: States, best: TopK, batch: int = 128) -> dict[str, dict]:
    """Rates of recall and of top-1 kept over states, on the indices that the search itself returns, or that it has returned."""
    found = search if isinstance(search, TopK) else found_by(search, states.hidden, batch)
    hits = np.stack([np.isin(true, got) for true, got in zip(best.indices, found.indices, strict=True)])
    return dict(recall=rate(hits.mean(1), states.documents), top1=rate(hits[:, 0], states.documents))


def distribution(softmax: HireSoftmax, model: Decoder, found: TopK, states: States, best: TopK) -> dict[str, float]:
    """What the search, and what it has found, does to sampling and to perplexity over states, against exact logits.

    top-1 agreement; total variation between sampling from what is found and from the exact top-k, its mean and 99th percentile;
    exact perplexity, and how far the one with the estimated normaliser is from it (relative); the mean absolute error of a loss in
    nats, and the share of losses within two of the errors that the softmax states.
    """
    apart = total_variation(found, best)
    exact, estimated, stated = losses(model, states), [], []
    for hidden, targets in zip(batches(states.hidden, 128), batches(states.targets[:, None], 128), strict=True):
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


def side_by_side(subject: TextModel, other: Decoder, text: str, prompt: int, new_tokens: int, slots: int) -> str:
    """Greedy continuations of a text's first tokens by a model and another form of it, and what each wanted where they part; with a
    cache of so many slots, for whose length steps may be compiled already.
    """
    tokens = jnp.asarray(subject.tokens(text, prompt))[None]
    lines = [np.asarray(generate(form, tokens, new_tokens=new_tokens, slots=slots))[0] for form in (subject.model, other)]
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

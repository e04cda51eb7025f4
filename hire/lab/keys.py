"""Keys as rows on real text: what attention that searches loses at long contexts, and what it reads."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import hire
from hire.axes import Array, Bool, Float, Int, Queries, Tokens
from hire.estimators import product, row_scores
from hire.lab import records
from hire.lab.evaluation import States, losses, points, windows
from hire.lab.paths import RECORDS
from hire.lab.text import Document, documents
from hire.models import Cache, Decoder, TextModel, load_gemma
from hire.models.keys import Keys, KeySearch, SearchedAttention

K = 64  # best keys of every head that the search should find
SINKS = 4  # first tokens that a window of the latest keeps too: without them attention falls apart (arXiv 2309.17453)


def long_windows(subject: TextModel, split: str, kinds: Sequence[str], length: int, each: int) -> np.ndarray:
    """`each` stretches of so many tokens (w, length) from all documents of every kind, one after the other, evenly spread."""
    joined = [Document(kind, kind, "\n\n".join(text.text for text in documents(split, [kind]))) for kind in kinds]
    return windows(subject, joined, length, each)[0]


@partial(jax.jit, static_argnames="graph")
def projections(graph: nnx.GraphDef, state: nnx.State, tokens: Tokens) -> list[tuple[Array, Array, Array]]:
    """Queries (b, t, h, e), keys and values (b, t, n, e) of every layer for texts (b, t)."""
    model, seen = nnx.merge(graph, state), []

    def tapped(project: Callable) -> Callable:
        return lambda *x: seen.append(project(*x)) or seen[-1]

    for block in model.blocks:
        block.attention.project = tapped(block.attention.project)
    model.prefill(tokens)
    return seen


def seen_by(model: Decoder, windows: np.ndarray, layers: Sequence[int], parts: slice) -> list[tuple[np.ndarray, ...]]:
    """Some parts of the `projections` of some layers for windows (w, t), computed one after the other, in numpy."""
    every = []
    for window in windows:
        seen = projections(*nnx.split(model), window[None])
        every.append([jax.device_get(seen[layer][parts]) for layer in layers])
    return [tuple(map(np.concatenate, zip(*layer, strict=True))) for layer in zip(*every, strict=True)]


def fitted(model: Decoder, windows: np.ndarray) -> Callable[..., dict[int, KeySearch]]:
    """ranks, candidates -> the search of every layer of the whole context, fitted to what it projects of windows (w, t)."""
    layers = model.config.global_layers
    seen = [[part.reshape(-1, part.shape[-1]) for part in layer] for layer in seen_by(model, windows, layers, slice(3))]

    def searches(ranks: Sequence[int], candidates: int) -> dict[int, KeySearch]:
        parts = zip(layers, seen, strict=True)
        return {layer: KeySearch.fit(k, v, queries, ranks, candidates=candidates) for layer, (queries, k, v) in parts}

    return searches


def cache_of(model: Decoder, seen: list[tuple[np.ndarray, ...]], length: int, slots: int) -> Cache:
    """The cache that prefill makes of the first `length` tokens of texts whose keys and values were seen."""
    attentions = [block.attention for block in model.blocks]
    held = [
        [attention.stored(jnp.asarray(part[:, :length]), min(slots, attention.window)) for part in both]
        for attention, both in zip(attentions, seen, strict=True)
    ]
    keys, values = zip(*held, strict=True)
    return Cache(keys, values, jnp.asarray(length, jnp.int32), slots)


def quality(
    search: KeySearch, k: int, x: Queries, keys: Keys, key: Float[Array, " e"], length: Int[Array, ""]
) -> tuple[Float[Array, " g"], Float[Array, " g"]]:
    """Of one head's search: recall of the true k best keys, and the share of the attention weight on what is read exactly."""
    chosen, _ = search.found(x, keys, length)
    scores = jnp.where(jnp.arange(len(keys.rows))[None] < length, product(keys.rows, x.T).T, -jnp.inf)
    own, scale = row_scores(x, key[None]), search.width**-0.5
    every, some = (jax.nn.logsumexp(jnp.concatenate([part, own], axis=1) * scale, axis=1) for part in (scores, scores[:, chosen]))
    inside = jnp.zeros(len(keys.rows)).at[chosen].set(1.0)
    return inside[hire.exact_top_k(scores, k).indices].mean(1), jnp.exp(some - every)


@partial(jax.jit, static_argnames=("graph", "latest"))
def decoded(graph: nnx.GraphDef, state: nnx.State, cache: Cache, tokens: Tokens, latest: int = 0) -> tuple[Array, list]:
    """Hidden states (t, b, d) after every token of texts (b, t) that go on from a cache, and the `quality` of each searched layer.
    With `latest` the other layers of the whole context see so many tokens alone, and the SINKS.
    """
    model, found = nnx.merge(graph, state), []

    def judged(attention: SearchedAttention, step: Callable) -> Callable:
        def judging(x, keys: Keys, values, length):
            queries, key, _ = attention.dense.project(x[:, None], length[None])
            one = jax.vmap(jax.vmap(partial(quality, attention.search, K), (0, 1, 0, None)), (0, 0, 0, None))
            found.append(one(attention.grouped(queries), keys, key[:, 0], length))
            return step(x, keys, values, length)

        return judging

    def recent(slots: int, length: Int[Array, ""]) -> Bool[Array, "1 s"]:
        places = jnp.arange(slots)
        return ((places < length) & ((places < SINKS) | (length - places <= latest)))[None]

    for layer, block in enumerate(model.blocks):
        if isinstance(block.attention, SearchedAttention):
            block.attention.step = judged(block.attention, block.attention.step)
        elif latest and model.config.is_global(layer):
            block.attention.seen = recent

    def step(cache: Cache, token: Int[Array, " b"]):
        found.clear()
        hidden, cache = model.step(token, cache)
        return cache, (hidden, list(found))

    return jax.lax.scan(step, cache, jnp.asarray(tokens.T))[1]


def study(
    subject: TextModel, fitted_to: np.ndarray, texts: np.ndarray, settings: Mapping[int, Sequence[Sequence[int]]], new: int
) -> dict[int, dict[str, dict]]:
    """At every context of `settings`, what searches of its (rank of keys, of values, candidates), and the latest tokens alone at
    the bytes of the first of them, lose in nats (see `points`) at the last `new` tokens of that context of texts (w, t), fed one a
    step.
    """
    model, searches, found = subject.model, fitted(subject.model, fitted_to), {}
    seen = seen_by(model, texts[:, :-new], range(model.config.layers), slice(1, 3))
    owner = np.repeat(np.arange(len(texts)), new)
    for context, tried in settings.items():
        start = context - new - 1
        cache, tokens = cache_of(model, seen, start, context), texts[:, start:context]

        def nats(form: Decoder, cache: Cache, latest: int = 0) -> tuple[np.ndarray, list]:
            hidden, judged = jax.device_get(decoded(*nnx.split(form), cache, tokens[:, :-1], latest))
            states = States(hidden.swapaxes(0, 1).reshape(-1, hidden.shape[-1]), tokens[:, 1:].reshape(-1), owner)
            return losses(model, states), judged

        exact, _ = nats(model, cache)
        told: dict[str, dict] = {"dense": dict(loss=float(exact.mean()))}
        for *ranks, candidates in tried:
            search, keys = searches(ranks, candidates), list(cache.keys)
            form = hire.convert(model, keys=search)
            for layer, each in search.items():
                keys[layer] = each.copied(keys[layer], cache.values[layer])
            ours, judged = nats(form, replace(cache, keys=tuple(keys)))
            recall, kept = np.mean(judged, axis=(0, 2, 3, 4, 5)).tolist()
            judgement = shares(form, context) | dict(recall=recall, kept=kept)
            told[f"LR {ranks[0]}, {ranks[1]} k'={candidates}"] = against(ours, exact, owner) | judgement
        latest = int(context * next(part["bytes"] for part in told.values() if "bytes" in part))
        told["latest"] = against(nats(model, cache, latest - SINKS)[0], exact, owner) | dict(bytes=latest / context)
        print(*(f"{context} tokens, {name}: {part}" for name, part in told.items()), sep="\n", flush=True)
        found[context] = told
    return found


def against(ours: np.ndarray, exact: np.ndarray, owner: np.ndarray) -> dict:
    """Nats a token over the exact ones, paired, with their interval over texts, and what that makes of the perplexity."""
    lost = points(ours, exact, owner)
    return dict(lost=lost, perplexity=float(np.exp(lost["mean"])))


def shares(model: Decoder, context: int) -> dict[str, float]:
    """Bytes that a searched layer reads a step as a share of all its keys and values, in float32 and in bfloat16."""
    attention = next(block.attention for block in model.blocks if isinstance(block.attention, SearchedAttention))
    entries = 2 * context * attention.dense.kv_heads * attention.dense.head_width
    return {name: attention.bytes_read(context, size) / (size * entries) for name, size in (("bytes", 4), ("bytes bfloat16", 2))}


def toy(subject: TextModel) -> dict[str, dict]:
    """A `study` of a context of 64 tokens, by what is not fitted to anything else."""
    windows = long_windows(subject, "evaluation", ["novel"], 64, 2)
    return {f"{context} tokens": told for context, told in study(subject, windows, windows, {64: [(8, 8, 16)]}, 8).items()}


def prices(by_context: dict[str, dict]) -> dict[str, dict]:
    """What each search of a `study` adds to the perplexity (mean, low, high), and the bytes that it reads, by context and name."""
    named = {f"{context}: {name}": each for context, told in by_context.items() for name, each in told.items() if "lost" in each}
    relative = {
        name: {part: float(np.expm1(each["lost"][part])) for part in ("mean", "low", "high")} for name, each in named.items()
    }
    return {name: each | dict(bytes=named[name]["bytes"]) for name, each in relative.items()}


def judge_keys(length: int = 8192, each: int = 4, new: int = 128) -> None:
    """Gemma 3 270M, the keys of its three layers of the whole context searched, at contexts from 1K to 8K tokens, as a record."""
    gemma, kinds = load_gemma(), ["speech", "novel", "commentary"]
    fitted_to = long_windows(gemma, "calibration", ["speech", "commentary"], length, 1)
    settings = {context: [(96, 64, context * 3 // 64)] for context in (length // 8, length // 4, length // 2, length)}
    settings[length] += [(64, 32, length // 16), (96, 64, length // 8)]
    found = study(gemma, fitted_to, long_windows(gemma, "evaluation", kinds, length, each), settings, new)
    setting = dict(length=length, texts=each * len(kinds), new=new, k=K, sinks=SINKS, layers=gemma.model.config.global_layers)
    results = {f"{context} tokens": told for context, told in found.items()}
    facts: dict = dict(weights=gemma.stored, setting=setting, results=results, command="make keys")
    records.write(RECORDS, "keys", "keys/contexts", kind="measured", **facts)

"""Key/value search on real text: its loss at long contexts and the bytes that it reads."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import hire
from hire.lab import records
from hire.lab.data.model_states import States, windows
from hire.lab.data.text import Document, documents
from hire.lab.metrics.intervals import points
from hire.lab.metrics.model_quality import losses
from hire.lab.paths import RECORDS
from hire.models import Cache, Decoder, TextModel, load
from hire.models.kv_search import KeySearch, SearchableKeyCache, SearchedAttention
from hire.ops.matmul import matmul_f32
from hire.ops.row_products import row_scores
from hire.types import Array, Bool, Float, Int, Queries, Tokens

K = 64  # keys of each head in the reference top-k
# First tokens that a window of latest tokens also includes: without them attention breaks down
# (arXiv 2309.17453).
SINKS = 4


def long_windows(
    subject: TextModel, split: str, kinds: Sequence[str], length: int, windows_per_document: int
) -> np.ndarray:
    """Return long stretches of text, evenly spaced over all documents of each kind, joined.

    Args:
        subject: Model with its tokenizer.
        split: Split of the documents.
        kinds: Kinds of documents.
        length: Tokens of each stretch.
        windows_per_document: Number of stretches of each kind.

    Returns:
        Tokens `(w, length)`.
    """
    joined = [
        Document(kind, kind, "\n\n".join(text.text for text in documents(split, [kind])))
        for kind in kinds
    ]
    return windows(subject, joined, length, windows_per_document)[0]


@partial(jax.jit, static_argnames="graph")
def projections(
    graph: nnx.GraphDef, state: nnx.State, tokens: Tokens
) -> list[tuple[Array, Array, Array]]:
    """Return the attention projections of every layer for texts `(b, t)`.

    Returns:
        For each layer queries `(b, t, h, e)`, keys `(b, t, n, e)` and values `(b, t, n, e)`.
    """
    model, projected = nnx.merge(graph, state), []

    def tapped(project: Callable) -> Callable:
        return lambda *x: projected.append(project(*x)) or projected[-1]

    for block in model.blocks:
        block.attention.project = tapped(block.attention.project)
    model.prefill(tokens)
    return projected


def seen_by(
    model: Decoder, windows: np.ndarray, layers: Sequence[int], parts: slice
) -> list[tuple[np.ndarray, ...]]:
    """Return parts of the `projections` of some layers, in numpy, one window at a time.

    Args:
        model: Dense model.
        windows: Windows `(w, t)` of text.
        layers: Indices of the layers.
        parts: Slice of (queries, keys, values).
    """
    by_window = []
    for window in windows:
        projected = projections(*nnx.split(model), window[None])
        by_window.append([jax.device_get(projected[layer][parts]) for layer in layers])
    return [
        tuple(map(np.concatenate, zip(*layer, strict=True)))
        for layer in zip(*by_window, strict=True)
    ]


def fitted(model: Decoder, windows: np.ndarray) -> Callable[..., dict[int, KeySearch]]:
    """Return a function that fits the key/value search of every global layer.

    Args:
        model: Dense model.
        windows: Windows `(w, t)` of text to fit to.

    Returns:
        A function (ranks, candidates) -> a dict from layer to its fitted search. The ranks are
        those of keys and values.
    """
    layers = model.config.global_layers
    projected = [
        [part.reshape(-1, part.shape[-1]) for part in layer]
        for layer in seen_by(model, windows, layers, slice(3))
    ]

    def searches(ranks: Sequence[int], candidates: int) -> dict[int, KeySearch]:
        pairs = zip(layers, projected, strict=True)
        return {
            layer: KeySearch.fit(k, v, queries, ranks, candidates=candidates)
            for layer, (queries, k, v) in pairs
        }

    return searches


def cache_of(
    model: Decoder, keys_and_values: list[tuple[np.ndarray, ...]], length: int, cache_length: int
) -> Cache:
    """Return the cache that prefill creates for the first `length` tokens of texts.

    Args:
        model: Dense model.
        keys_and_values: Keys and values of every layer, from `seen_by`.
        length: Number of tokens.
        cache_length: Length of the key/value cache, in tokens.
    """
    attentions = [block.attention for block in model.blocks]
    layer_entries = [
        [
            attention.cache_entries(
                jnp.asarray(part[:, :length]), min(cache_length, attention.window)
            )
            for part in layer
        ]
        for attention, layer in zip(attentions, keys_and_values, strict=True)
    ]
    keys, values = zip(*layer_entries, strict=True)
    return Cache(keys, values, jnp.asarray(length, jnp.int32), cache_length)


def quality(
    key_search: KeySearch,
    k: int,
    x: Queries,
    keys: SearchableKeyCache,
    key: Float[Array, " e"],
    length: Int[Array, ""],
) -> tuple[Float[Array, " g"], Float[Array, " g"]]:
    """Measure the key/value search of one head.

    Args:
        key_search: The search of the layer.
        k: Number of best keys in the reference.
        x: Queries of the heads that share the keys.
        keys: Cached keys of the head.
        key: Key `(e,)` of the current token.
        length: Number of cached tokens.

    Returns:
        A tuple, both for each query `(g,)`: recall of the true top-k keys, and the share of the
        attention weight on keys that are read exactly.
    """
    candidates, _ = key_search.nominate(x, keys, length)
    scores = jnp.where(
        jnp.arange(len(keys.rows))[None] < length, matmul_f32(keys.rows, x.T).T, -jnp.inf
    )
    current_score, scale = row_scores(x, key[None]), key_search.width**-0.5
    log_total, log_read = (
        jax.nn.logsumexp(jnp.concatenate([part, current_score], axis=1) * scale, axis=1)
        for part in (scores, scores[:, candidates])
    )
    is_candidate = jnp.zeros(len(keys.rows)).at[candidates].set(1.0)
    return is_candidate[hire.exact_top_k(scores, k).indices].mean(1), jnp.exp(log_read - log_total)


@partial(jax.jit, static_argnames=("graph", "latest"))
def decoded(
    graph: nnx.GraphDef, state: nnx.State, cache: Cache, tokens: Tokens, latest: int = 0
) -> tuple[Array, list]:
    """Decode given tokens after a cache, one per step, and judge each searched layer.

    Args:
        graph: Graph of the model.
        state: State of the model.
        cache: Cache of the preceding tokens.
        tokens: Tokens `(b, t)` that follow.
        latest: If not 0, the global layers without search attend only to this many latest tokens
            and to the first SINKS tokens.

    Returns:
        A tuple (hidden states `(t, b, d)` after each token, `quality` of each searched layer).
    """
    model, layer_results = nnx.merge(graph, state), []

    def judged(attention: SearchedAttention, step: Callable) -> Callable:
        def judging(x, keys: SearchableKeyCache, values, length):
            queries, key, _ = attention.dense.project(x[:, None], length[None])
            judge_heads = jax.vmap(
                jax.vmap(partial(quality, attention.key_search, K), (0, 1, 0, None)),
                (0, 0, 0, None),
            )
            layer_results.append(judge_heads(attention.grouped(queries), keys, key[:, 0], length))
            return step(x, keys, values, length)

        return judging

    def recent(cache_length: int, length: Int[Array, ""]) -> Bool[Array, "1 s"]:
        positions = jnp.arange(cache_length)
        return ((positions < length) & ((positions < SINKS) | (length - positions <= latest)))[None]

    for layer, block in enumerate(model.blocks):
        if isinstance(block.attention, SearchedAttention):
            block.attention.step = judged(block.attention, block.attention.step)
        elif latest and model.config.is_global(layer):
            block.attention.attention_mask = recent

    def step(cache: Cache, token: Int[Array, " b"]):
        layer_results.clear()
        hidden, cache = model.step(token, cache)
        return cache, (hidden, list(layer_results))

    return jax.lax.scan(step, cache, jnp.asarray(tokens.T))[1]


def study(
    subject: TextModel,
    fitted_to: np.ndarray,
    texts: np.ndarray,
    settings: Mapping[int, Sequence[Sequence[int]]],
    new_tokens: int,
) -> dict[int, dict[str, dict]]:
    """Measure the loss of key/value search at each context of `settings`.

    The baseline is exact attention. Attention to only the latest tokens is also measured, at the
    bytes of the first search. The loss covers the last `new_tokens` tokens of each context, fed one
    per step.

    Args:
        subject: Model with its tokenizer.
        fitted_to: Windows `(w, t)` of text to fit to.
        texts: Windows `(w, t)` of text to judge on.
        settings: Searches to try at each context, each as (rank of keys, rank of values,
            candidates).
        new_tokens: Number of tokens to judge.

    Returns:
        A nested dict: context -> "dense", the search's name or "latest" -> results. The results of
        a search are those of `against` and `shares`, `recall`, and `attention_fraction_read` (share
        of the attention weight that is read exactly).
    """
    model, searches, results = subject.model, fitted(subject.model, fitted_to), {}
    projected = seen_by(model, texts[:, :-new_tokens], range(model.config.layers), slice(1, 3))
    text_ids = np.repeat(np.arange(len(texts)), new_tokens)
    for context, search_settings in settings.items():
        start = context - new_tokens - 1
        cache, tokens = cache_of(model, projected, start, context), texts[:, start:context]

        def nats(form: Decoder, cache: Cache, latest: int = 0) -> tuple[np.ndarray, list]:
            hidden, layer_results = jax.device_get(
                decoded(*nnx.split(form), cache, tokens[:, :-1], latest)
            )
            states = States(
                hidden.swapaxes(0, 1).reshape(-1, hidden.shape[-1]),
                tokens[:, 1:].reshape(-1),
                text_ids,
            )
            return losses(model, states), layer_results

        exact_nats, _ = nats(model, cache)
        by_search: dict[str, dict] = {"dense": dict(loss=float(exact_nats.mean()))}
        for *ranks, candidates in search_settings:
            key_searches, keys = searches(ranks, candidates), list(cache.keys)
            form = hire.convert(model, kv_search=key_searches)
            for layer, layer_search in key_searches.items():
                keys[layer] = layer_search.encode(keys[layer], cache.values[layer])
            searched_nats, layer_results = nats(form, replace(cache, keys=tuple(keys)))
            recall, weight_read = np.mean(layer_results, axis=(0, 2, 3, 4, 5)).tolist()
            metrics = shares(form, context) | dict(
                recall=recall, attention_fraction_read=weight_read
            )
            by_search[f"LR {ranks[0]}, {ranks[1]} k'={candidates}"] = (
                against(searched_nats, exact_nats, text_ids) | metrics
            )
        latest = int(
            context
            * next(
                result["bytes_fraction"]
                for result in by_search.values()
                if "bytes_fraction" in result
            )
        )
        by_search["latest"] = against(
            nats(model, cache, latest - SINKS)[0], exact_nats, text_ids
        ) | dict(bytes_fraction=latest / context)
        print(
            *(f"{context} tokens, {name}: {result}" for name, result in by_search.items()),
            sep="\n",
            flush=True,
        )
        results[context] = by_search
    return results


def against(ours: np.ndarray, exact: np.ndarray, owner: np.ndarray) -> dict:
    """Compare losses with the exact ones.

    Returns:
        A dict with the keys `loss_difference` (paired difference in nats per token, with its
        interval over texts) and `perplexity` (ratio of the perplexities).
    """
    difference = points(ours, exact, owner)
    return dict(loss_difference=difference, perplexity=float(np.exp(difference["mean"])))


def shares(model: Decoder, context: int) -> dict[str, float]:
    """Return the bytes that a searched layer reads per step, as a share of its keys and values.

    Returns:
        A dict with the keys "bytes_fraction" (of float32) and "bytes_fraction_bfloat16".
    """
    attention = next(
        block.attention for block in model.blocks if isinstance(block.attention, SearchedAttention)
    )
    entries = 2 * context * attention.dense.kv_heads * attention.dense.head_width
    return {
        name: attention.bytes_read(context, itemsize) / (itemsize * entries)
        for name, itemsize in (("bytes_fraction", 4), ("bytes_fraction_bfloat16", 2))
    }


def toy(subject: TextModel) -> dict[str, dict]:
    """Run a `study` at a context of 64 tokens; search and evaluation use the same text."""
    tokens = long_windows(subject, "evaluation", ["novel"], 64, 2)
    return {
        f"{context} tokens": results
        for context, results in study(subject, tokens, tokens, {64: [(8, 8, 16)]}, 8).items()
    }


def perplexity_increases(by_context: dict[str, dict]) -> dict[str, dict[str, float]]:
    """Return how much each search of a `study` increases the perplexity, and what it reads.

    Args:
        by_context: Result of `study`, by the context's name.

    Returns:
        A dict from "<context>: <name>" to `mean`, `low` and `high` of the relative increase, and
        `bytes_fraction`.
    """
    increases = {}
    for context, results in by_context.items():
        for name, result in results.items():
            if "loss_difference" in result:
                increase = {
                    statistic: float(np.expm1(result["loss_difference"][statistic]))
                    for statistic in ("mean", "low", "high")
                }
                increases[f"{context}: {name}"] = increase | dict(
                    bytes_fraction=result["bytes_fraction"]
                )
    return increases


def judge_kv_search(
    length: int = 8192, windows_per_document: int = 4, new_tokens: int = 128
) -> None:
    """Measure key/value search in the three global layers of Gemma 3 270M and write the record.

    Args:
        length: Longest context in tokens. The contexts are 1/8, 1/4, 1/2 and all of it: 1K to 8K
            tokens by default.
        windows_per_document: Number of texts of each kind.
        new_tokens: Number of tokens to judge in each context.
    """
    gemma, kinds = load("gemma3_270m"), ["speech", "novel", "commentary"]
    calibration = long_windows(gemma, "calibration", ["speech", "commentary"], length, 1)
    settings = {
        context: [(96, 64, context * 3 // 64)]
        for context in (length // 8, length // 4, length // 2, length)
    }
    settings[length] += [(64, 32, length // 16), (96, 64, length // 8)]
    by_context = study(
        gemma,
        calibration,
        long_windows(gemma, "evaluation", kinds, length, windows_per_document),
        settings,
        new_tokens,
    )
    setting = dict(
        length=length,
        texts=windows_per_document * len(kinds),
        new_tokens=new_tokens,
        k=K,
        sinks=SINKS,
        layers=gemma.model.config.global_layers,
    )
    results = {f"{context} tokens": by_search for context, by_search in by_context.items()}
    record: dict = dict(
        weights=gemma.weights_precision, setting=setting, results=results, command="make kv-search"
    )
    records.write(RECORDS, "kv_search", "kv_search/gemma3_270m", kind="measured", **record)

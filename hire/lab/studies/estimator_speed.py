"""Recall, bytes and speed of estimators and of cascades of them, for figure 11."""

import dataclasses
from collections.abc import Mapping, Sequence
from types import SimpleNamespace

import pandas

import hire
from hire.estimators.base import Estimator
from hire.lab.metrics import search_recall
from hire.lab.rivals.approximate_top_k import INT8
from hire.lab.studies import tables
from hire.lab.studies.query_sets import QuerySets
from hire.lab.timing.layer_timing import fastest_dense, time_softmax
from hire.timing import speedups
from hire.types import Queries, Rows


def fit_estimators(rows: Rows, calibration: Queries, ranks: Sequence[int]) -> dict[str, Estimator]:
    """Fit estimators of every kind to the rows.

    Args:
        rows: Rows `(m, d)`.
        calibration: Queries `(n, d)` that estimators are fitted to.
        ranks: Ranks of the low-rank estimators. The middle one is also fitted without calibration.

    Returns:
        Estimators by name. "Q rotated int4" has 4 bits per entry after a random rotation: no large
        entry then spoils a row.
    """
    fit = hire.LowRank.fit
    estimators: dict[str, Estimator] = {}
    for bits in (8, 4):
        for rank in ranks:
            name = f"LR {rank} int{bits}"
            estimators[name] = fit(rows, rank, calibration=calibration, bits=bits)
    rank = ranks[len(ranks) // 2]
    for name, directions in dict(SVD="leading", first="first", random="random").items():
        estimators[f"{name} {rank} int8"] = fit(rows, rank, bits=8, directions=directions)
    for bits in (8, 4):
        estimators[f"Q int{bits}"] = hire.Quantized.fit(rows, bits)
    estimators["Q rotated int4"] = fit(rows, rows.shape[1], bits=4, directions="random")
    return estimators


@dataclasses.dataclass(frozen=True)
class SearchMeasurements:
    """Recall, bytes and speed of softmax searches.

    Attributes:
        curves: Recall and bytes at every k', by estimator (see `search_recall.curve`).
        judged: `recall` and `top1` of each cascade on all unseen text, with their intervals.
        bytes_fraction: Bytes that each cascade reads, as a fraction of the float32 rows.
        recalls: Recall of each timed search.
        speedups: Speed-up of each timed search over the fastest dense form at batch 1.
        seconds: Raw durations of all functions that were timed together.
    """

    curves: dict[str, dict[str, list[float]]]
    judged: dict[str, dict[str, dict]]
    bytes_fraction: dict[str, float]
    recalls: dict[str, float]
    speedups: dict[str, float]
    seconds: dict[str, list[float]]

    def table(self) -> pandas.DataFrame:
        """Return the cascades' recall, bytes and speed-up as a table."""
        table = tables.interval_table(self.judged, decimals=2)
        table["bytes read"] = [f"{fraction:.2%}" for fraction in self.bytes_fraction.values()]
        table["speed-up"] = [f"{self.speedups[name]:.1f}x" for name in self.judged]
        return table


def measure_searches(
    rows: Rows,
    estimators: Mapping[str, Estimator],
    cascades: Mapping[str, hire.HireSoftmax],
    queries: QuerySets,
    settings: SimpleNamespace,
) -> SearchMeasurements:
    """Measure recall over k' of every estimator, and the speed of cascades and estimators.

    Each estimator is timed at the smallest k' that reaches the notebook's `timed_recall`. Cascades
    are evaluated on all unseen text at batch 1: by the same program that is timed.

    Args:
        rows: Rows `(m, d)`.
        estimators: Estimators by name, from `fit_estimators`.
        cascades: Searches with cascades, by name.
        queries: Queries.
        settings: Sizes of the notebook.
    """
    sample, sample_top = queries.curve_sample(settings)

    def curve(estimator: Estimator, candidates: Sequence[int]) -> dict[str, list[float]]:
        return search_recall.curve(rows, estimator, sample.hidden, sample_top, candidates)

    curves = {name: curve(estimator, settings.candidates) for name, estimator in estimators.items()}
    searches, recalls = searches_at_recall(rows, estimators, curves, settings)
    timed = {**cascades, **searches}
    seconds = time_softmax(rows, timed, queries.unseen.hidden, settings.k, 1, settings.repeats)
    all_speedups = speedups(seconds, fastest_dense(seconds))
    judged = {
        name: search_recall.judge(softmax, queries.unseen, queries.unseen_top, 1)
        for name, softmax in cascades.items()
    }
    recalls |= {name: qualities["recall"]["mean"] for name, qualities in judged.items()}
    # Dense int8 rows return the top-k of their own scores: k candidates.
    recalls[INT8] = curve(estimators["Q int8"], [settings.k])["recall"][0]
    return SearchMeasurements(
        curves=curves,
        judged=judged,
        bytes_fraction={
            name: softmax.bytes_read() / (4 * rows.size) for name, softmax in cascades.items()
        },
        recalls=recalls,
        speedups={name: all_speedups[name] for name in (*timed, INT8)},
        seconds=seconds,
    )


def searches_at_recall(
    rows: Rows,
    estimators: Mapping[str, Estimator],
    curves: Mapping[str, Mapping[str, Sequence[float]]],
    settings: SimpleNamespace,
) -> tuple[dict[str, hire.HireSoftmax], dict[str, float]]:
    """Build a search with each estimator that reaches `timed_recall`, at its smallest k'.

    Args:
        rows: Rows `(m, d)`.
        estimators: Estimators by name.
        curves: Result of `search_recall.curve` by name.
        settings: Sizes of the notebook.

    Returns:
        A tuple (searches, their recalls), by "<estimator> k'=<k'>".
    """
    searches, recalls = {}, {}
    for name, curve in curves.items():
        for count, recall in zip(settings.candidates, curve["recall"], strict=True):
            if recall >= settings.timed_recall:
                label = f"{name} k'={count}"
                searches[label] = hire.HireSoftmax(rows, estimators[name], settings.k, count)
                recalls[label] = recall
                break
    return searches, recalls

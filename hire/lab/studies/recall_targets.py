"""Estimators chosen for a target recall: their cost, and their recall on other text (figure 11)."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from types import SimpleNamespace

import pandas

import hire
from hire.estimators.base import Estimator
from hire.lab.data.model_states import States
from hire.lab.metrics import search_recall
from hire.lab.rivals.dense import dense_forms
from hire.lab.studies import tables
from hire.lab.studies.query_sets import QuerySets
from hire.lab.timing.layer_timing import fastest_dense, slices
from hire.timing import interleaved, speedups
from hire.tuning import Tuned, true_top_k
from hire.types import Rows


def offered_estimators(estimators: Mapping[str, Estimator]) -> dict[str, Estimator]:
    """Return the estimators that `hire.tune` chooses from: the largest LR int8, and 4 bits.

    Args:
        estimators: Estimators from `estimator_speed.fit_estimators`.
    """
    *_, low_rank = (name for name in estimators if re.fullmatch(r"LR \d+ int8", name))
    return {name: estimators[name] for name in (low_rank, "Q int4", "Q rotated int4")}


def share_of_dense(
    rows: Rows, queries: QuerySets, settings: SimpleNamespace
) -> Callable[[Estimator, int], float]:
    """Return a cost function for `hire.tune`.

    The cost is the search time at batch 1 as a share of the fastest dense form's: a ratio of
    medians over interleaved calls, a third of the notebook's `repeats`. Each call of the cost
    function measures again, so keep the machine idle.

    Args:
        rows: Rows `(m, d)`.
        queries: Queries.
        settings: Sizes of the notebook.
    """
    repeats = max(3, settings.repeats // 3)
    dense, batches = dense_forms(rows, settings.k), slices(queries.unseen.hidden, 1, repeats)

    def share(estimator: Estimator, candidates: int) -> float:
        softmax = hire.HireSoftmax(rows, estimator, settings.k, candidates)
        seconds = interleaved(dense | {"search": softmax}, batches, repeats)
        return 1 / speedups(seconds, fastest_dense(seconds))["search"]

    return share


@dataclasses.dataclass(frozen=True)
class TargetRecall:
    """Choices of k' for a target recall, and the recall on text of kinds that were not seen.

    Attributes:
        tuned: Result of `hire.tune`.
        recalls: Recall with its interval, by "<estimator>, <kind of text>".
    """

    tuned: Tuned
    recalls: dict[str, dict]

    def table(self) -> pandas.DataFrame:
        """Return choice and recall of each estimator on each kind of text as a table."""
        table = tables.interval_table(
            {name: {"recall": recall} for name, recall in self.recalls.items()}
        )
        choices = [self.tuned.choices[name.rpartition(", ")[0]] for name in self.recalls]
        table.insert(0, "k'", [choice.candidates for choice, _ in choices])
        table.insert(1, "share of the dense time", [f"{share:.0%}" for _, share in choices])
        return table


def check_target(
    rows: Rows,
    tuned: Tuned,
    estimators: Mapping[str, Estimator],
    other_kinds: Mapping[str, States],
    k: int,
) -> TargetRecall:
    """Measure the recall of each tuned estimator on each kind of text, at the k' chosen for it.

    Args:
        rows: Rows `(m, d)`.
        tuned: Result of `hire.tune`.
        estimators: Estimators by name.
        other_kinds: Queries by kind of text.
        k: Size of the top-k.
    """
    true_tops = {kind: true_top_k(rows, states.hidden, k) for kind, states in other_kinds.items()}
    recalls = {}
    for name, (choice, _) in tuned.choices.items():
        softmax = hire.HireSoftmax(rows, estimators[name], k, choice.candidates)
        for kind, states in other_kinds.items():
            judged = search_recall.judge(softmax, states, true_tops[kind])
            recalls[f"{name}, {kind}"] = judged["recall"]
    return TargetRecall(tuned, recalls)

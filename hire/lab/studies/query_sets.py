"""The queries of figure 11: hidden states of text, and rows of another kind with their queries."""

import dataclasses
from collections.abc import Mapping
from types import SimpleNamespace

import jax

from hire.lab.data.model_states import States
from hire.ops.top_k import TopK
from hire.tuning import true_top_k
from hire.types import Queries, Rows


@dataclasses.dataclass(frozen=True)
class VectorRows:
    """Rows of another kind than an LM head's, with their queries.

    Attributes:
        name: Name of the rows: "glove" for word vectors, "random" for a toy.
        rows: Rows `(m, d)`.
        calibration: Queries `(n, d)` that estimators are fitted to.
        unseen: Queries to evaluate on.
        unseen_top: True top-k of `unseen`.
    """

    name: str
    rows: Rows
    calibration: Queries
    unseen: States
    unseen_top: TopK

    @classmethod
    def with_true_top(
        cls, name: str, rows: Rows, calibration: Queries, unseen: States, k: int
    ) -> "VectorRows":
        """Compute the true top-k of the queries to evaluate on.

        Args:
            name: Name of the rows.
            rows: Rows `(m, d)`.
            calibration: Queries `(n, d)` that estimators are fitted to.
            unseen: Queries to evaluate on.
            k: Size of the top-k.
        """
        return cls(name, rows, calibration, unseen, true_top_k(rows, unseen.hidden, k))


@dataclasses.dataclass(frozen=True)
class QuerySets:
    """Queries of every part of the study; calibration, choice and unseen share no document.

    Attributes:
        weights: Description of the weights that computed the hidden states.
        calibration: Hidden states `(n, d)` that estimators are fitted to: speeches, commentary and
            scripture.
        choice: Hidden states that k' is chosen on: other documents of these kinds.
        unseen: Hidden states of a novel, to evaluate on.
        unseen_top: True top-k of `unseen`.
        other_kinds: Hidden states of text that neither factors nor k' have seen, by kind.
        vectors: Rows of another kind, with their queries.
    """

    weights: str
    calibration: Queries
    choice: States
    unseen: States
    unseen_top: TopK
    other_kinds: Mapping[str, States]
    vectors: VectorRows

    def every_nth(self, stride: int) -> tuple[States, TopK]:
        """Return every `stride`-th query of `unseen`, with its true top-k."""
        return jax.tree.map(lambda part: part[::stride], (self.unseen, self.unseen_top))

    def curve_sample(self, settings: SimpleNamespace) -> tuple[States, TopK]:
        """Return the queries that curves are evaluated on, with their true top-k.

        Args:
            settings: Sizes of the notebook.
        """
        return self.every_nth(len(self.unseen.hidden) // settings.curve_positions)

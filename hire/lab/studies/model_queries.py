"""Models with hidden states of real text: the queries of figures 02 and 03."""

import dataclasses
from collections.abc import Mapping
from types import SimpleNamespace

import jax

import hire
from hire.lab.data import hidden_state_cache
from hire.lab.data.evaluation_text import evaluation_text
from hire.lab.data.model_states import States
from hire.lab.data.text import documents
from hire.models import TextModel, load
from hire.ops.top_k import TopK
from hire.types import Rows

# The kind of text that searches are judged on first. Nothing was fitted to a novel.
NOVEL = "novel"
DOCUMENTS_OF_OTHER_KINDS = 48
LABELS = {"scripture_es": "Spanish", "python": "Python source", "dialogue": "dialogue"}


def kind_label(kind: str) -> str:
    """Return the name of a kind of text in tables and figures."""
    return LABELS.get(kind, kind)


@dataclasses.dataclass(frozen=True)
class ModelQueries:
    """A model and its hidden states of real text; no document is in two of the sets.

    Attributes:
        name: Name of the model.
        subject: The model with its tokenizer.
        rows: Rows (v, d) of its LM head.
        calibration: Queries that factors are fitted to: speeches and commentary.
        evaluation: Queries to evaluate on, by kind of text.
        true_top: True top-k of each kind's queries.
    """

    name: str
    subject: TextModel
    rows: Rows
    calibration: States
    evaluation: Mapping[str, States]
    true_top: Mapping[str, TopK]

    @property
    def unseen(self) -> States:
        """Hidden states of the novel."""
        return self.evaluation[NOVEL]

    @property
    def unseen_top(self) -> TopK:
        """True top-k of `unseen`."""
        return self.true_top[NOVEL]

    def every_nth(self, stride: int) -> tuple[States, TopK]:
        """Return every `stride`-th query of `unseen`, with its true top-k."""
        return jax.tree.map(lambda part: part[::stride], (self.unseen, self.unseen_top))

    def first_tokens(self, softmax: hire.HireSoftmax) -> str:
        """Return the eight best tokens at the first position of the novel, as text."""
        tokens = softmax(self.unseen.hidden[:1]).indices[0, :8].tolist()
        return ", ".join(repr(self.subject.tokenizer.decode([token])) for token in tokens)


def load_queries(model_name: str, settings: SimpleNamespace) -> ModelQueries:
    """Load a model and compute the hidden states of the texts that the study needs.

    Args:
        model_name: Name of the model.
        settings: Sizes of the notebook.
    """
    subject, states = load(model_name), hidden_state_cache.cached_states
    counts = {NOVEL: settings.evaluation_documents}
    counts |= dict.fromkeys(settings.other_kinds, DOCUMENTS_OF_OTHER_KINDS)
    evaluation = {kind: states(subject, evaluation_text(kind, counts[kind])) for kind in counts}
    return ModelQueries(
        model_name,
        subject,
        subject.model.head_rows(),
        # Positions early in a window have little context; calibration leaves out the first four.
        calibration=states(
            subject, documents("calibration")[::2], 128, settings.calibration_windows, skip=4
        ),
        evaluation=evaluation,
        true_top={
            kind: hidden_state_cache.true_top_tokens(subject, queries.hidden, settings.k)
            for kind, queries in evaluation.items()
        },
    )


def choice_states(queries: ModelQueries, stride: int) -> States:
    """Return the hidden states that k' is chosen on, of documents in no other set.

    They are of speeches, commentary and scripture.

    Args:
        queries: The model.
        stride: Every `stride`-th document is used.
    """
    return hidden_state_cache.cached_states(queries.subject, documents("train")[::stride], 28)

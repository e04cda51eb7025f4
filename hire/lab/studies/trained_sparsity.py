"""Group-sparse FFNs of trained models, judged on text."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from flax import nnx

import hire
from hire.estimators.base import Estimator
from hire.lab.data.model_states import windows
from hire.lab.data.text import Document, documents
from hire.lab.metrics.group_sparsity import (
    bytes_share,
    ffn_inputs,
    group_recall,
    most_used_first,
    searched,
    sets_kept,
)
from hire.lab.metrics.intervals import relative_loss
from hire.lab.metrics.model_quality import Scores, score_documents
from hire.lab.training.trainer import trained_model
from hire.models import TextModel
from hire.ops.top_k import floor_fraction
from hire.types import Array, Float, Rows


class Across(nnx.Module):
    """A searched layer that shares one selection over tokens of different texts.

    The tokens are at the same position of their texts, as in requests that are decoded together.
    """

    def __init__(self, searched: Callable):
        self.searched = searched

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        return self.searched(x.swapaxes(0, 1)).swapaxes(0, 1)


def scores_with(
    subject: TextModel,
    texts: Sequence[Document],
    ffns: Sequence[hire.HireFFN],
    tokens_per_selection: int = 1,
    across: bool = False,
) -> Scores:
    """Score texts with the FFNs of a model searched.

    Args:
        subject: Model with its tokenizer.
        texts: Documents.
        ffns: One HireFFN per layer.
        tokens_per_selection: Number of tokens in one call; they share a selection where `ffns` do.
        across: Whether these tokens come from different texts instead of following each other.
    """
    model = hire.convert(subject.model, ffn=ffns, tokens_per_selection=tokens_per_selection)
    for block in model.blocks if across else ():
        block.ffn = Across(block.ffn)
    return score_documents(
        replace(subject, model=model), texts, batch=2 * tokens_per_selection if across else None
    )


class Studied:
    """A trained sparse model with the inputs of its FFNs.

    The most used groups of each layer come first.

    Args:
        subject: Trained sparse model with its tokenizer.
        fitted_to: Windows `(w, t)` of text that the estimators are fitted to.
        judged_on: Windows `(w, t)` of text that the estimators are judged on.
        texts: Documents for the loss.
    """

    def __init__(
        self,
        subject: TextModel,
        fitted_to: np.ndarray,
        judged_on: np.ndarray,
        texts: Sequence[Document],
    ):
        self.model = most_used_first(
            subject.model, sets_kept(subject.model, fitted_to).mean((1, 2))
        )
        self.subject, self.texts = replace(subject, model=self.model), texts
        self.fitted_to, self.unseen = (
            [x.reshape(-1, x.shape[-1]) for x in ffn_inputs(self.model, windows)]
            for windows in (fitted_to, judged_on)
        )
        self.exact_scores = score_documents(subject, texts)

    @classmethod
    def of(
        cls, variant: str, texts: Sequence[Document], *, toy: bool, length: int, count: int
    ) -> "Studied":
        """Load a model that this project trains.

        Args:
            variant: Name of the trained model.
            texts: Documents for the loss.
            toy: Whether to load the toy model.
            length: Tokens of each window.
            count: Number of windows of calibration text to fit to, and of a novel to judge on.
        """
        subject = trained_model(variant, toy=toy)
        splits = documents("calibration"), documents("evaluation", ["novel"])
        calibration, evaluation = (
            windows(subject, texts, length, 2, limit=count)[0] for texts in splits
        )
        return cls(subject, calibration, evaluation, texts)

    def low_rank(self, rank: int, *, fitted: bool = True) -> Callable[[int, Rows], Estimator]:
        """Return the estimator function that `searched` takes, with int8 low-rank factors.

        Args:
            rank: Rank of the factors.
            fitted: Whether to fit the estimators to the inputs of the layer.
        """
        estimators = {}

        def fit_estimator(layer: int, rows: Rows) -> Estimator:
            if (layer, len(rows)) not in estimators:
                calibration = self.fitted_to[layer] if fitted else None
                estimators[layer, len(rows)] = hire.LowRank.fit(
                    rows, rank, calibration=calibration, bits=8
                )
            return estimators[layer, len(rows)]

        return fit_estimator

    def searched(
        self, fit_estimator: Callable[[int, Rows], Estimator], candidates: float, **settings
    ) -> list[hire.HireFFN]:
        """Return the searched layers of the model, with the k that it was trained with.

        Args:
            fit_estimator: Function (layer, rows) that fits an estimator.
            candidates: Candidates as a share of the groups.
            settings: Further arguments of `group_sparsity.searched`.
        """
        return searched(
            self.model,
            fit_estimator,
            kept_fraction=self.model.config.kept,
            candidates=candidates,
            **settings,
        )

    def curve(
        self, fit_estimator: Callable[[int, Rows], Estimator], candidates: Sequence[float]
    ) -> dict[str, list[float]]:
        """Measure recall and bytes at several numbers of candidates.

        Args:
            fit_estimator: Function (layer, rows) that fits an estimator.
            candidates: Candidates as shares of all groups.

        Returns:
            A dict with the keys `recall` (share of the top-k groups among the candidates, mean over
            layers) and `bytes` (bytes read as a share of the dense layers'), each with one value
            per entry of `candidates`.
        """
        counts, ffns = (
            [floor_fraction(share, self.model.config.groups) for share in candidates],
            self.searched(fit_estimator, 1.0),
        )
        recalls = np.mean(
            [group_recall(ffn, x, counts) for ffn, x in zip(ffns, self.unseen, strict=True)], axis=0
        )
        return dict(
            recall=recalls.tolist(),
            bytes=[
                bytes_share([replace(ffn, candidates=count) for ffn in ffns]) for count in counts
            ],
        )

    def loss_difference(self, ffns: Sequence[hire.HireFFN], **options) -> dict:
        """Measure searched layers on the model's texts.

        Args:
            ffns: One HireFFN per layer.
            options: Further arguments of `scores_with`.

        Returns:
            The `relative_loss` against the model's unchanged FFNs, with the key `bytes`: bytes read
            as a share of the dense layers'.
        """
        return relative_loss(
            scores_with(self.subject, self.texts, ffns, **options).nats, self.exact_scores.nats
        ) | dict(bytes=bytes_share(ffns))

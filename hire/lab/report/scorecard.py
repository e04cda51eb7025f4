"""The scorecard of claims and the targets of the project.

Both are read from records and never typed by hand.
"""

import json
import subprocess

from hire import storage
from hire.lab import records
from hire.lab.figure_index import load
from hire.lab.paths import FIGURES, ROOT
from hire.lab.report.templates import render

VERDICTS = (
    "reproduced on TPU (measured)",
    "consistent by compiler estimate",
    "effect shown on another device",
    "not reproduced",
    "not tested",
)


def verdict(obtained: list[dict]) -> str:
    """Return the verdict on the evidence for one claim.

    Only a measurement on a TPU reproduces a claim. Arithmetic alone tests nothing. Each study
    decides `supports` by the claim's limits.
    """
    supporting = [row for row in obtained if row["supports"]]
    if any(row["kind"] == "measured" and "TPU" in row["device"] for row in supporting):
        return VERDICTS[0]
    if any(row["kind"] == "compiler-estimate" for row in supporting):
        return VERDICTS[1]
    if any(row["kind"] == "measured" for row in supporting):
        return VERDICTS[2]
    return VERDICTS[3] if any(not row["supports"] for row in obtained) else VERDICTS[4]


def scorecard() -> list[dict]:
    """Return one row per claim, as figures/scorecard.schema.json describes it."""
    evidence = records.read()
    rows = []
    for claim in load("claims")["claims"]:
        obtained = [
            contribution(entry, entry["claims"][claim["id"]])
            for entry in evidence
            if claim["id"] in entry.get("claims", {})
        ]
        met = any(entry["supports"] for entry in obtained) if obtained else None
        row = dict(
            claim=claim["id"],
            text=claim["claim"],
            published=claim["published"],
            mark=claim["mark"],
            criterion=claim["criterion"].format(**claim["limits"]),
            met=met,
            verdict=verdict(obtained),
            obtained=obtained,
        )
        rows.append(row)
    return rows


def contribution(record: dict, claim: dict) -> dict:
    """Return what a record contributes to a claim, with where it comes from."""
    return dict(
        value=claim["value"],
        unit=claim["unit"],
        low=claim["low"],
        high=claim["high"],
        kind=record["kind"],
        device=claim["device"] or record["machine"]["device"],
        quality=claim["quality"],
        setting=claim["setting"],
        figure=claim["figure"],
        weights=record["weights"],
        record=record["id"],
        supports=claim["supports"],
    )


def number_with_range(entry: dict) -> str:
    """Format an obtained value with its unit and, where there is one, its range."""
    low, high = entry["low"], entry["high"]
    bounds = "" if low is None or high is None else f" ({low:.3g} to {high:.3g})"
    return f"{entry['value']:.3g}{bounds} {entry['unit']}"


def scorecard_markdown() -> str:
    """Return the scorecard as a Markdown table."""
    return render("scorecard.md.j2", rows=scorecard(), number_with_range=number_with_range)


def write_scorecard() -> None:
    """Write figures/scorecard.json, the scorecard for programs."""
    with storage.replacing(FIGURES / "scorecard.json") as [scratch]:
        scratch.write_text(json.dumps(scorecard(), indent=1, ensure_ascii=False) + "\n")


def outdated() -> list[str]:
    """Return a line for each commit with records whose measured code has changed since.

    The measured code is hire without hire/lab.
    """
    ids_by_commit: dict[str, list[str]] = {}
    for entry in records.read():
        ids_by_commit.setdefault(entry["commit"].removesuffix("-dirty"), []).append(entry["id"])
    lines = []
    for commit, ids in ids_by_commit.items():
        paths = ("hire", ":!hire/lab")
        diff = subprocess.run(
            ["git", "diff", "--name-only", commit, "--", *paths],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        changed = "not in this history" if diff.returncode else ", ".join(diff.stdout.split())[:120]
        if changed:
            lines.append(
                f"{len(ids)} records made at {commit}, such as {ids[0]}; changed since: {changed}"
            )
    return lines


def verify() -> tuple[str, bool]:
    """Check every target against its record.

    Returns:
        A tuple (one line per target: obtained value, threshold, met or not; whether every target is
        met or states a reason). The text also has the lines of `outdated`.
    """
    evidence = {entry["id"]: entry for entry in records.read()}
    lines, all_met = [], True
    for target in load("targets")["targets"]:
        entry = evidence.get(target["record"])
        value = None if entry is None else records.value(entry, target["field"])
        at_least = "at_least" in target
        threshold = target["at_least" if at_least else "at_most"]
        met = value is not None and (value >= threshold if at_least else value <= threshold)
        all_met = all_met and (met or "reason" in target)
        value_text = "no record" if value is None else f"{value:.4g}"
        status = "met" if met else f"NOT MET: {target.get('reason', 'no reason stated')}"
        lines.append(
            f"{target['id']:24} {target['what']:76} {value_text:>9} {'≥' if at_least else '≤'} "
            f"{threshold:<6g} {status}"
        )
    return "\n".join(lines + outdated()), all_met

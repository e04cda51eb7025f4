"""Speed of `make bench` at another commit and at HEAD, in turns, as a record."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from hire.lab import records
from hire.lab.paths import ROOT

ROUNDS = 5


def compare_commits(commit: str) -> None:
    """Run the benchmark at a commit and at HEAD, ROUNDS times in turns, and write a record.

    Each commit runs in its worktree, with a separate cache folder.

    Args:
        commit: The other commit.

    Raises:
        ValueError: `commit` is not a commit of this repository.
        RuntimeError: A benchmark fails.
    """
    process = git("rev-parse", "--verify", "--short", f"{commit}^{{commit}}")
    if process.returncode:
        raise ValueError(
            f"COMMIT = {commit!r}: expected a commit of this repository, such as HEAD~1"
        )
    commits = {
        "old_commit": process.stdout.strip(),
        "new_commit": git("rev-parse", "--short", "HEAD").stdout.strip(),
    }
    with tempfile.TemporaryDirectory(prefix="hire-commits-") as folder:
        checkouts = {side: Path(folder) / side for side in commits}
        try:
            for side, name in commits.items():
                git("worktree", "add", "--detach", str(checkouts[side]), name, check=True)
            timed: list[dict] = []
            # The first round fills the caches and is not counted.
            for turn in range(ROUNDS + 1):
                order = list(checkouts)[:: -1 if turn % 2 else 1]
                timed.append({side: benchmark(checkouts[side]) for side in order})
                print(f"round {turn} of {ROUNDS}", flush=True)
        finally:
            for checkout in checkouts.values():
                git("worktree", "remove", "--force", str(checkout))
    results = compared(timed[1:])
    for name, ratio in results["ratios"].items():
        print(
            f"{name:10} {ratio['median']:.3f} times as long ({ratio['low']:.3f} to "
            f"{ratio['high']:.3f})"
        )
    records.write(
        records.RECORDS,
        "bench",
        "bench/versions",
        kind="measured",
        weights="Q4_K_M weights",
        setting=commits | dict(rounds=ROUNDS),
        results=results,
        durations={side: [turn[side] for turn in timed[1:]] for side in commits},
        command=f"make bench-against COMMIT={commits['old_commit']}",
    )


def git(*arguments: str, check: bool = False) -> subprocess.CompletedProcess:
    """Run git in the repository."""
    return subprocess.run(
        ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=check
    )


def benchmark(root: Path) -> dict[str, float]:
    """Run `make bench` once in a checkout.

    Returns:
        Median seconds of HiRE by benchmark, such as "softmax/1", from the newest records.

    Raises:
        RuntimeError: The benchmark fails.
    """
    environment = os.environ | dict(PYTHONPATH=str(root), HIRE_CACHE=str(root / "cache"))
    status = subprocess.run(
        [sys.executable, "-m", "hire.lab", "bench"],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
    )
    if status.returncode:
        raise RuntimeError(
            f"make bench failed in {root.name}: {status.stderr.strip().splitlines()[-1:]}"
        )
    # `records.read` refuses the record format of an old commit; the fields read here are the same.
    lines = (root / "data/records/bench.jsonl").read_text().splitlines()
    results = {entry["id"]: entry["results"] for entry in map(json.loads, lines)}
    return {
        id.removeprefix("bench/"): result["medians"]["HiRE"]
        for id, result in results.items()
        if "medians" in result
    }


def compared(timed: list[dict[str, dict[str, float]]]) -> dict:
    """Compare durations of two commits.

    Args:
        timed: One dict per round: durations by side ("new_commit", "old_commit") and benchmark.

    Returns:
        `ratios`: by benchmark, `median`, `low` and `high` over rounds of the seconds of the new
            commit over those of the old one.
        `worst`: the largest of the medians.
    """
    ratios = {}
    for name in timed[0]["new_commit"]:
        by_round = np.asarray(
            [turn["new_commit"][name] / turn["old_commit"][name] for turn in timed]
        )
        ratios[name] = dict(
            median=float(np.median(by_round)), low=float(by_round.min()), high=float(by_round.max())
        )
    return dict(ratios=ratios, worst=max(ratio["median"] for ratio in ratios.values()))

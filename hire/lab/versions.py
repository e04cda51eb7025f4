"""The speed of `make bench` at another commit and at this one, in turns, as a record."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from hire.lab import records
from hire.lab.paths import RECORDS, ROOT

ROUNDS = 5


def compare_versions(commit: str) -> None:
    """Run the benchmark at a commit and at HEAD, ROUNDS times in turns, each in a worktree and with a cache folder of its own.

    Raises ValueError for a commit that is none, RuntimeError when a benchmark fails.
    """
    found = git("rev-parse", "--verify", "--short", f"{commit}^{{commit}}")
    if found.returncode:
        raise ValueError(f"COMMIT = {commit!r}: expected a commit of this repository, such as HEAD~1")
    names = {"there": found.stdout.strip(), "here": git("rev-parse", "--short", "HEAD").stdout.strip()}
    with tempfile.TemporaryDirectory(prefix="hire-versions-") as folder:
        places = {side: Path(folder) / side for side in names}
        try:
            for side, name in names.items():
                git("worktree", "add", "--detach", str(places[side]), name, check=True)
            timed: list[dict] = []
            for turn in range(ROUNDS + 1):  # the first fills the caches and is not counted
                order = list(places)[:: -1 if turn % 2 else 1]
                timed.append({side: benchmark(places[side]) for side in order})
                print(f"round {turn} of {ROUNDS}", flush=True)
        finally:
            for place in places.values():
                git("worktree", "remove", "--force", str(place))
    results = compared(timed[1:])
    for name, ratio in results["ratios"].items():
        print(f"{name:10} {ratio['median']:.3f} times as long ({ratio['low']:.3f} to {ratio['high']:.3f})")
    records.write(
        RECORDS,
        "bench",
        "bench/versions",
        kind="measured",
        weights="Q4_K_M weights",
        setting=names | dict(rounds=ROUNDS),
        results=results,
        durations={side: [turn[side] for turn in timed[1:]] for side in names},
        command=f"make bench-against COMMIT={names['there']}",
    )


def git(*arguments: str, check: bool = False) -> subprocess.CompletedProcess:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=check)


def benchmark(root: Path) -> dict[str, float]:
    """Median seconds of the search by benchmark, such as "softmax/1", from the newest records of one run of `make bench`."""
    environment = os.environ | dict(PYTHONPATH=str(root), HIRE_CACHE=str(root / "cache"))
    status = subprocess.run([sys.executable, "-m", "hire.lab", "bench"], cwd=root, env=environment, capture_output=True, text=True)
    if status.returncode:
        raise RuntimeError(f"make bench failed in {root.name}: {status.stderr.strip().splitlines()[-1:]}")
    found = {entry["id"]: entry["results"] for entry in records.read(root / "data/records", "bench")}
    return {id.removeprefix("bench/"): told["medians"]["HiRE"] for id, told in found.items() if "medians" in told}


def compared(timed: list[dict[str, dict[str, float]]]) -> dict:
    """By benchmark, how many times as long it takes here as there: over rounds the median, the least and the most; and the worst
    of the medians.
    """
    ratios = {}
    for name in timed[0]["here"]:
        found = np.asarray([turn["here"][name] / turn["there"][name] for turn in timed])
        ratios[name] = dict(median=float(np.median(found)), low=float(found.min()), high=float(found.max()))
    return dict(ratios=ratios, worst=max(ratio["median"] for ratio in ratios.values()))

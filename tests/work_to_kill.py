"""What tests/test_kills.py kills. Imports take seconds, so they are made once: every run is a fork
of this process.

Reads lines of JSON (what to run, in which folder, how many rounds, after how many seconds to kill
it, if at all) and answers each with an exit status.
"""

import json
import os
import signal
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path

import jax
import matplotlib
import numpy as np

matplotlib.use("Agg")

from hire.lab import records
from hire.lab.studies import figure_files, plots
from hire.lab.training import plans, trainer
from hire.models import gguf_files

PLAN = plans.plan_of("groups8", toy=True)


def unpack(folder: Path, rounds: int) -> None:
    for _ in range(rounds):
        gguf_files.read_gguf_once(folder.parent / "source.gguf", lambda config: None)
        if rounds > 1:  # unpack it again, so that there always is something to kill
            for path in folder.glob("*.safetensors"):
                path.write_bytes(b"")


def write(folder: Path, rounds: int) -> None:
    """A figure and records of eight names."""
    records.machine, records.commit = dict, lambda: "0000000"
    for _ in range(rounds):
        for name in "abcdefgh":
            records.write(
                folder,
                "topic",
                name,
                kind="measured",
                weights="none",
                setting={},
                results=dict(x=[name] * 2000),
            )
        drawn = plots.plt.figure(figsize=(2, 2))
        figure_files.save(
            drawn,
            folder,
            "01_toy",
            note="a note",
            finding="found",
            series=dict(x=[1.0]),
            tolerance={},
        )
        plots.plt.close(drawn)


def train(folder: Path, rounds: int) -> None:
    jax.config.update("jax_compilation_cache_dir", str(folder.parent / "programs"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    trained = trainer.train(
        replace(PLAN, config=replace(PLAN.config, layers=1)), "toy", save_every=1, folder=folder
    )
    np.save(folder.parent / "losses.npy", trained.losses)


if __name__ == "__main__":
    print("ready", flush=True)
    for line in sys.stdin:
        name, folder, rounds, delay = json.loads(line)
        child = os.fork()
        if child == 0:
            os.environ["HIRE_CACHE"] = folder
            status = 1
            try:
                sys.stdout = sys.stderr  # the lines of the work are not answers
                dict(unpack=unpack, write=write, train=train)[name](Path(folder), rounds)
                status = 0
            except BaseException:
                traceback.print_exc()
            os._exit(status)
        if delay is not None:
            time.sleep(delay)
            os.kill(
                child, signal.SIGKILL
            )  # one that has ended keeps its number until it is waited for
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)

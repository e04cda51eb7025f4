"""Budgets of time: minutes by make target."""

import subprocess
import time

from hire.lab.paths import ROOT


def timed(targets: list[str]) -> int:
    """Run `make TARGET …` and, when it succeeds, keep its minutes as a record. Returns make's exit status.

    `env` cannot remove the environment that this runs in: its minutes are those that the last set-up left in its stamp.
    """
    from hire.lab import pages, records

    start = time.monotonic()
    status = subprocess.run(["make", *targets], cwd=ROOT).returncode
    seconds = time.monotonic() - start if targets != ["env"] else float((ROOT / ".venv/.ready").read_text())
    if status == 0:
        command = "make " + " ".join(targets)
        results = dict(minutes=round(seconds / 60, 2))
        records.write(
            records.RECORDS, "budgets", command, kind="measured", weights="-", setting={}, results=results, command=command
        )
        pages.write_pages()  # they quote these minutes, and a test wants them up to date
        print(f"{command}: {seconds / 60:.1f} minutes")
    return status

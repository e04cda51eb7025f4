"""Time budgets: minutes by make target."""

import subprocess
import time

from hire.lab.paths import ROOT


def timed(targets: list[str]) -> int:
    """Run `make TARGET …` and, on success, write its minutes to a record.

    `make env` cannot remove the environment that this function runs in. Its minutes are therefore
    those of the last set-up, read from its stamp file.

    Returns:
        The exit status of make.
    """
    from hire.lab import records
    from hire.lab.report import pages

    start = time.monotonic()
    status = subprocess.run(["make", *targets], cwd=ROOT).returncode
    seconds = (
        time.monotonic() - start
        if targets != ["env"]
        else float((ROOT / ".venv/.ready").read_text())
    )
    if status == 0:
        command = "make " + " ".join(targets)
        results = dict(minutes=round(seconds / 60, 2))
        records.write(
            records.RECORDS,
            "budgets",
            command,
            kind="measured",
            weights="-",
            setting={},
            results=results,
            command=command,
        )
        pages.write_pages()  # the pages quote these minutes, and a test compares them
        print(f"{command}: {seconds / 60:.1f} minutes")
    return status

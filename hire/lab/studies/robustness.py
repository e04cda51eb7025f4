"""make robustness: the tests of damaged files, concurrent writers and killed runs, as one record.

Each run is killed twenty times.
"""

import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree

from hire.lab import records
from hire.lab.paths import RECORDS, ROOT

TESTS = (
    "test_damage.py",
    "test_kills.py",
    "lab/test_records_and_data.py::test_two_processes_that_write_records_lose_none",
)
KILLS = 20


def judge_robustness() -> None:
    """Run TESTS and write the numbers of damages, kills and records that they counted.

    Raises:
        RuntimeError: If a test failed. No record is written then.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            f"--junitxml={report}",
            *(f"tests/{test}" for test in TESTS),
        ]
        status = subprocess.run(
            command, cwd=ROOT, env=os.environ | dict(HIRE_KILLS=str(KILLS))
        ).returncode
        if status:
            raise RuntimeError(
                f"a test of robustness failed (pytest's exit status {status}): no record is written"
            )
        counts = counted(report)
    results = dict(
        files=sum(len(numbers) for numbers in counts["damages"].values()),
        least_damages=min(min(numbers) for numbers in counts["damages"].values()),
        least_kills=min(min(numbers) for numbers in counts["kills"].values()),
        records_kept=sum(sum(numbers) for numbers in counts["kept"].values()),
        tests=counts,
    )
    for name in ("files", "least_damages", "least_kills", "records_kept"):
        print(f"{name:14} {results[name]}")
    setting = dict(tests=TESTS, kills=KILLS)
    records.write(
        RECORDS,
        "robustness",
        "robustness",
        kind="measured",
        weights="toys",
        setting=setting,
        results=results,
        command="make robustness",
    )


def counted(report: Path) -> dict[str, dict[str, list[int]]]:
    """Read what the tests reported with record_property.

    Args:
        report: pytest's JUnit file.

    Returns:
        A nested dict: property -> test -> numbers.
    """
    properties: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for case in ElementTree.parse(report).iter("testcase"):
        for entry in case.iter("property"):
            properties[entry.attrib["name"]][case.attrib["name"]].append(int(entry.attrib["value"]))
    return {name: dict(tests) for name, tests in properties.items()}

"""Real kills at random moments of training, unpacking weights, and writing a figure and records:
the next run gives what an undisturbed one gives, and nothing is left behind. HIRE_KILLS=20 kills
each of them twenty times.
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from model_files import gemma3_metadata, write_gguf

from hire.lab import records
from hire.models.weights import gguf_names

KILLS = int(os.environ.get("HIRE_KILLS", 3))
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the work is forked")


@pytest.fixture(scope="module")
def server():
    """Runs work by name in a folder, which may be killed after a delay; gives the exit status."""
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("work_to_kill.py"))]
    environment = os.environ | dict(JAX_PLATFORMS="cpu")
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdin and process.stdout and process.stdout.readline() == "ready\n"

        def run(name: str, folder: Path, rounds: int = 1, kill_after: float | None = None) -> int:
            process.stdin.write(json.dumps([name, str(folder), rounds, kill_after]) + "\n")
            process.stdin.flush()
            return int(process.stdout.readline())

        yield run
        process.stdin.close()


@pytest.fixture
def kill_at_random(server, record_property):
    """Kills work KILLS times after random delays, then lets it end undisturbed. A run that ends
    before it is killed begins anew.
    """

    def kill(name: str, folder: Path, most: float, rounds: int) -> None:
        rng, killed = np.random.default_rng(KILLS), 0
        while killed < KILLS:
            status = server(name, folder, rounds, kill_after=rng.uniform(0.02, most))
            assert status in (-signal.SIGKILL, 0)
            killed += status == -signal.SIGKILL
            if status == 0:
                shutil.rmtree(folder)
                folder.mkdir()
        record_property("kills", killed)  # to `make robustness`
        assert server(name, folder) == 0

    return kill


def digests(folder: Path) -> dict[str, str]:
    """Every file below a folder, hidden ones included, and its digest."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


@pytest.fixture
def folders(tmp_path):
    for name in ("undisturbed", "killed"):
        (tmp_path / name).mkdir()
    return tmp_path / "undisturbed", tmp_path / "killed"


def test_kills_while_weights_are_unpacked(server, kill_at_random, folders, tmp_path, tiny):
    write_gguf(tmp_path / "source.gguf", gguf_names(tiny), gemma3_metadata(tiny.config))
    expected, result = folders
    assert server("unpack", expected) == 0
    kill_at_random("unpack", result, 2.0, rounds=10**6)
    assert digests(result) == digests(expected) and len(digests(result)) == 3


def test_kills_while_a_figure_and_records_are_written(server, kill_at_random, folders):
    expected, result = folders
    assert server("write", expected) == 0
    kill_at_random("write", result, 1.5, rounds=10**6)
    assert list(digests(result)) == list(digests(expected))
    assert {name: digest for name, digest in digests(result).items() if "topic" not in name} == {
        name: digest for name, digest in digests(expected).items() if "topic" not in name
    }
    assert [entry["results"]["x"] for entry in records.read(result)] == [
        [name] * 2000 for name in "abcdefgh"
    ]  # dates differ


def test_kills_while_a_model_is_trained(server, kill_at_random, folders, tmp_path):
    expected, result = folders
    assert server("train", expected) == 0
    losses = np.load(tmp_path / "losses.npy")
    assert np.isfinite(losses).all() and len(losses) == 12
    (tmp_path / "losses.npy").unlink()
    kill_at_random("train", result, 2.0, rounds=1)
    np.testing.assert_allclose(np.load(tmp_path / "losses.npy"), losses, rtol=1e-5)

    def names(folder: Path) -> set[str]:  # Orbax names its data files at random
        return {name.partition("/d/")[0] for name in digests(folder)}

    assert names(result) == names(expected)

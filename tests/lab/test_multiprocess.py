"""DA-TOP-k on real processes.

The tests check what the processes find together, and how they end when one is killed, differs or
does not start.
"""

import signal
import socket
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

import hire
from hire.lab.__main__ import main
from hire.lab.studies import multiprocess
from hire.lab.studies.multiprocess import (
    HOST,
    Setup,
    compare_with_exact,
    free_port,
    launch,
    start,
    table,
)

SMALL = dict(k=8, num_rows=1024, candidates=64)
MINUTE = 60


def ends(worker: subprocess.Popen) -> tuple[int, list[str]]:
    """Status and lines of a worker started by hand, which ends within a minute."""
    try:
        line = worker.communicate(timeout=MINUTE)[1]
        return worker.returncode, line.splitlines()
    finally:
        worker.kill()


@pytest.fixture
def occupied_port():
    """A port that something else listens at."""
    with socket.socket() as other:
        other.bind((HOST, 0))
        other.listen()
        yield other.getsockname()[1]


def test_three_processes_find_the_tokens_of_one(tmp_path):
    result = launch(3, setup=Setup(**SMALL, repeats=4), folder=tmp_path)
    assert result["devices"] == result["processes"] == 3
    for batch, measured in result["batches"].items():
        assert measured["same_top_k"] == 1 and measured["compared_positions"] > 0.5
        delivered_bytes = measured["delivered_bytes"]
        assert delivered_bytes["HiRE DA"] == 3 * 8 * 8 * int(batch)
        # All scores with those of the padding, and the exact scores of the candidates.
        assert delivered_bytes["HiRE gathered"] == (1026 + 64) * 4 * int(batch)
    assert len(table(result).splitlines()) == 4 and " 1.000 " in table(result)


@pytest.mark.parametrize("count, victim", [(2, 0), (3, 2)])
def test_when_one_is_killed_the_others_end_by_themselves(count, victim, tmp_path):
    port = free_port()
    workers = [
        start(number, count, port, Setup(**SMALL, repeats=20_000), tmp_path)
        for number in range(count)
    ]
    logs = [tmp_path / f"process-{number}.log" for number in range(count)]
    until = time.monotonic() + MINUTE
    while (
        not all(log.exists() and "measuring" in log.read_text() for log in logs)
        and time.monotonic() < until
    ):
        time.sleep(0.1)
    workers[victim].kill()
    killed = time.monotonic()
    endings = [ends(worker) for worker in workers]
    seconds = time.monotonic() - killed
    print(f"after process {victim} the others ended in {seconds:.1f} s: {endings}")
    assert endings[victim] == (-signal.SIGKILL, [])
    # A collective fails with a line; jax aborts without one.
    allowed = ((multiprocess.LOST_STATUS, 1), (-signal.SIGABRT, 0), (1, 0))
    for status, lines in endings[:victim] + endings[victim + 1 :]:
        assert (status, len(lines)) in allowed, endings


def test_a_launch_says_which_process_was_killed(tmp_path, monkeypatch):
    def and_kill(number: int, *how):
        worker = start(number, *how)
        if number == 1:
            worker.kill()
        return worker

    monkeypatch.setattr(multiprocess, "start", and_kill)
    line = r"^process 1 of 2 ended by signal 9 in mid-run: the others were stopped; run it again$"
    with pytest.raises(RuntimeError, match=line):
        launch(2, setup=Setup(**SMALL), folder=tmp_path)


def test_processes_that_differ_refuse_at_once(tmp_path):
    port = free_port()
    workers = [
        start(number, 2, port, Setup(**SMALL | dict(k=8 - number)), tmp_path) for number in range(2)
    ]
    line = "error: process 1 has k = 7, process 0 has k = 8: start all with the same"
    assert [ends(worker) for worker in workers] == [(1, [line])] * 2


def test_a_process_waits_for_another_only_so_long(tmp_path, occupied_port):
    setup = Setup(**SMALL, connect_seconds=3)
    ports = dict(
        alone=(0, free_port()),
        without_the_first=(1, free_port()),
        at_a_foreign_port=(1, occupied_port),
    )
    for name in ports:
        (tmp_path / name).mkdir()
    workers = {
        name: start(number, 2, port, setup, tmp_path / name)
        for name, (number, port) in ports.items()
    }
    for name, worker in workers.items():
        status, (line,) = ends(worker)
        assert status == 1 and line.startswith(
            f"error: waited 3 s at port {ports[name][1]} on {HOST} for all of 2 processes"
        )


def test_a_port_in_use_is_refused_in_one_line(tmp_path, occupied_port, capsys):
    line = f"error: port {occupied_port} on {HOST} is in use: "
    assert main(["distributed", "--port", str(occupied_port)]) == 1
    assert capsys.readouterr().err.startswith(line)
    status, (error,) = ends(start(0, 2, occupied_port, Setup(**SMALL), tmp_path))
    assert status == 1 and error.startswith(line)


def test_a_launch_hands_on_what_stopped_a_process(tmp_path):
    with pytest.raises(RuntimeError, match="k = 9"):
        launch(1, setup=Setup(k=9, num_rows=4, candidates=4), folder=tmp_path)
    with pytest.raises(ValueError, match="processes = 0"):
        launch(0, folder=Path("nowhere"))


def test_a_comparison_by_hand():
    exact = hire.TopK(
        np.array([[3.0, 2.0, 1.0], [2.00001, 2.0, 1.0]]), np.array([[5, 6, 7], [5, 6, 7]])
    )
    # Those of the second query may come out in either order.
    same = compare_with_exact(np.array([[5, 6], [6, 5]]), exact)
    assert same == dict(same_top_k=1.0, compared_positions=0.5)
    swapped = compare_with_exact(np.array([[6, 5], [5, 6]]), exact)
    assert swapped == dict(same_top_k=0.5, compared_positions=0.5)

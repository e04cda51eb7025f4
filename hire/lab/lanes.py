"""Notebooks that run beside each other: who measures time has the machine to itself, and the others stand still meanwhile."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import filelock
import psutil

from hire.models.weights import cache_folder

RUNNER = "HIRE_RUNNER"  # in the environment of a notebook that has others beside it: the process that runs them all
LARGEST = 8e9  # bytes that the largest notebook takes


def count(profile: str) -> int:
    """How many notebooks run at a time: two where there is memory for both, but on a TPU, which one process has at a time, one."""
    room = {"smoke": 1e9, "cpu": LARGEST}.get(profile)
    return 2 if room and psutil.virtual_memory().total > 2.5 * room else 1


@contextlib.contextmanager
def pool(profile: str) -> Iterator[ThreadPoolExecutor]:
    """Threads to run notebooks in, which measure alone, unless they are toys."""
    with ThreadPoolExecutor(count(profile)) as threads:
        if profile != "smoke":
            os.environ[RUNNER] = str(os.getpid())
        try:
            yield threads
        finally:
            os.environ.pop(RUNNER, None)


def measuring() -> filelock.BaseFileLock:
    """What is held by who measures, of all on this machine."""
    path = cache_folder() / "measuring.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    return filelock.FileLock(path)


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """The machine to itself, after others that measure have ended: what else the runner of this notebook runs is stopped meanwhile.

    Without a runner nothing else is waited for, or stopped.
    """
    runner = os.environ.get(RUNNER)
    if runner is None:
        yield
        return
    me = psutil.Process()
    with measuring():
        own = {me, *me.parents(), *me.children(recursive=True)}
        others = [process for process in psutil.Process(int(runner)).children(recursive=True) if process not in own]
        try:
            signal(others, "suspend")
            yield
        finally:
            signal(others, "resume")


def go_on() -> None:
    """Let all go on that this process has started: who stopped them may have died."""
    signal(psutil.Process().children(recursive=True), "resume")


def signal(processes: Sequence[psutil.Process], what: str) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error):  # it has ended
            getattr(process, what)()

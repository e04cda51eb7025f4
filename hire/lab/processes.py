"""DA-TOP-k on several real processes of this machine, which jax.distributed joins: each holds the rows of its own device.

`launch` starts them and hands on what they measured. Whatever goes wrong, all end within a minute, with one line that says why;
what XLA itself has to say is in a log for each process. By hand, each with its number and all with the same port:
`JAX_PLATFORMS=cpu python -m hire.lab.processes NUMBER PROCESSES PORT FOLDER '{"k": 32}'`, the last a Setup.
"""

import contextlib
import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType

import hire
from hire.axes import Int
from hire.distributed import Axis
from hire.lab.paths import CHECKPOINTS, OUT, ROOT
from hire.lab.pods import time_forms
from hire.lab.timing import medians
from hire.topk import TopK, exact_top_k

HOST, BATCHES, RESULT = "127.0.0.1", (1, 8), "result.json"
FORMS = "HiRE DA", "HiRE gathered"  # see hire.lab.pods
HEARTBEAT = 15  # seconds without a sign of life after which jax takes a process for lost, and ends the others
LOST = 2  # status of a process that ends because another did
CLEAR = 1e-4  # of a score: what is nearer to its neighbour may come out in either order


@dataclass(frozen=True)
class Setup:
    """What all processes must have alike: the search (see HireSoftmax and Axis), by int8 copies of the first `words` rows of the
    ladder's checkpoint; timed repetitions; and seconds of patience with a process that does not come.
    """

    k: int = 32
    candidates: int = 2048
    slack: float = math.inf
    words: int = 32768
    repeats: int = 30
    patience: int = 30


def launch(processes: int, *, port: int = 0, setup: Setup = Setup(), folder: Path = OUT / "processes") -> dict[str, Any]:
    """Run DA-TOP-k on so many processes of one CPU device each, which meet at a port of this machine (0: a free one).

    Returns what `measured` did; that and the logs stay in the folder. Raises OSError when the port is in use, RuntimeError
    when a process ended before its time, ValueError for fewer than one.
    """
    if processes < 1:
        raise ValueError(f"processes = {processes}: expected at least 1")
    port, workers = free_port(port), []
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as ends:
        for number in range(processes):
            workers.append(ends.enter_context(start(number, processes, port, setup, folder)))
            ends.callback(workers[-1].kill)
        watch(workers)
        return json.loads((folder / RESULT).read_text())


def free_port(port: int = 0) -> int:
    """The port, or for 0 one that is free. Raises OSError when it is in use: jax would crash on it."""
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what a run before has just left is free
        try:
            trial.bind((HOST, port))
        except (OSError, OverflowError) as error:
            raise OSError(f"port {port} on {HOST} is in use: name another, or none for a free one ({error})") from None
        return trial.getsockname()[1]


def start(number: int, processes: int, port: int, setup: Setup, folder: Path) -> subprocess.Popen[str]:
    """One worker on one CPU device; its line of error, if any, is in the pipe."""
    flags = " ".join(flag for flag in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in flag)
    arguments = *map(str, (number, processes, port)), str(folder.absolute()), json.dumps(asdict(setup))
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    command = [sys.executable, "-m", "hire.lab.processes", *arguments]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


def watch(workers: list[subprocess.Popen[str]]) -> None:
    """Wait until all have ended well. Raises RuntimeError as soon as one has not, about the one that began it."""
    while None in (codes := [worker.poll() for worker in workers]) and not any(codes):
        time.sleep(0.1)
    bad = {number: code for number, code in enumerate(codes) if code}
    lines = {number: workers[number].communicate()[1].removeprefix("error: ").strip().rpartition("\n")[2] for number in bad}

    def lost_another(number: int) -> bool:
        """Whether it ended because another did: with LOST, or aborted by jax, which in jax 0.7 means status 1 without a line."""
        return bad[number] in (LOST, -signal.SIGABRT) or (bad[number] > 0 and not lines[number])

    if bad:
        number = min(bad, key=lambda number: (lost_another(number), bad[number]))
        line = f": {lines[number] or 'another no longer answers; run it again'}"
        if bad[number] < 0 and not lost_another(number):
            line = f" ended by signal {-bad[number]} in mid-run: the others were stopped; run it again"
        raise RuntimeError(f"process {number} of {len(workers)}{line}")


def work(number: int, processes: int, port: int, folder: Path, setup: Setup) -> None:
    """One worker, from its start to its end. It leaves by os._exit after an error: an orderly end would wait for the others."""
    terminal = os.dup(2)

    def leave(line: object, status: int = 1) -> None:
        os.write(terminal, f"error: {line}".partition("\n")[0].encode() + b"\n")
        os._exit(status)

    with (folder / f"process-{number}.log").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    try:
        join(number, processes, port, setup.patience, leave)
        found = measured(setup)
        if number == 0:
            (folder / RESULT).write_text(json.dumps(found))
        jax.distributed.shutdown()
    except Exception as error:
        traceback.print_exc()
        lost = isinstance(error, jax.errors.JaxRuntimeError)
        leave(f"process {number} of {processes} has lost another: {error}" if lost else error, LOST if lost else 1)


def join(number: int, processes: int, port: int, patience: int, leave: Callable[[str], None]) -> None:
    """Meet the others at the port. `leave` with a line when one does not come in time, before jax aborts for it."""
    if number == 0:
        free_port(port)
    line = f"waited {patience} s at port {port} on {HOST} for all of {processes} processes in vain: start every one, with one port"
    timer = threading.Timer(patience, leave, [line])
    timer.start()
    jax.distributed.initialize(
        f"{HOST}:{port}",
        processes,
        number,
        coordinator_bind_address=f"{HOST}:{port}",
        initialization_timeout=2 * patience + 5,
        heartbeat_timeout_seconds=HEARTBEAT,
    )
    timer.cancel()


def agree(**own: Any) -> None:
    """Raise ValueError, the same on every process, unless all have the same: they would wait for each other in vain."""
    text = json.dumps(own).ljust(1024).encode()  # of one size, since all must gather arrays of one shape
    told = np.asarray(multihost_utils.process_allgather(np.frombuffer(text, np.uint8))).reshape(-1, len(text))
    setups = [json.loads(bytes(row)) for row in told]
    for number, other in enumerate(setups):
        for name in own:
            if other[name] != setups[0][name]:
                jax.distributed.shutdown()  # together: the end of process 0 would cut off the others' line
                values = f"process {number} has {name} = {other[name]}, process 0 has {name} = {setups[0][name]}"
                raise ValueError(f"{values}: start all with the same")


def measured(setup: Setup) -> dict[str, Any]:
    """The search on all devices: their number and, by batch, `same`, the share of queries whose words are exactly the best ones
    wherever rounding cannot have swapped them, and `clear`, the share of such places; bytes that travel and median seconds of
    both FORMS. Raises ValueError when the processes differ.
    """
    from safetensors import safe_open

    path, batches = CHECKPOINTS / "ladder.safetensors", {}
    agree(**asdict(setup), jax=jax.__version__, weights=zlib.crc32(path.read_bytes()))
    with safe_open(path, framework="flax") as file:
        rows = file.get_slice("embedding")[: setup.words].astype(np.float32)
    alone = hire.HireSoftmax(rows, hire.Quantized.fit(rows, 8), k=setup.k, candidates=setup.candidates)
    with jax.set_mesh(jax.make_mesh((jax.device_count(),), ("chips",), (AxisType.Auto,))):
        spread = alone.sharded(Axis("chips", setup.slack, dealt=True))
        for batch in BATCHES:
            queries = np.random.default_rng(batch).normal(size=(setup.repeats, batch, rows.shape[1])).astype(np.float32)
            print("measuring", flush=True)  # in the log: who watches it knows that the processes have met
            seconds, nbytes, found = time_forms(spread, FORMS, list(queries))
            best = exact_top_k(queries.reshape(-1, rows.shape[1]) @ rows.T, setup.k + 1)
            batches[str(batch)] = dict(nbytes=nbytes, seconds=medians(seconds)) | shares(np.asarray(found.indices), best)
    return dict(devices=jax.device_count(), processes=jax.process_count(), setup=asdict(setup), batches=batches)


def shares(indices: Int[np.ndarray, "n k"], best: TopK) -> dict[str, float]:
    """`same` and `clear` of `measured`, of the words that were found for n queries, whose k + 1 best are given."""
    values = np.asarray(best.values)
    apart = -np.diff(values, prepend=math.inf) > CLEAR * np.abs(values)
    clear = apart[:, :-1] & apart[:, 1:]
    same = np.all((indices == np.asarray(best.indices)[:, :-1]) | ~clear, axis=1)
    return dict(same=float(same.mean()), clear=float(clear.mean()))


def table(found: dict[str, Any]) -> str:
    """What `launch` found, for people."""
    names = "".join(f"{form:>15}" for form in FORMS)
    lines = [f"{'':22}{'bytes that travel':>30}{'ms':>30}", f"devices  batch    same{names}{names}"]
    for batch, told in found["batches"].items():
        sent = "".join(f"{told['nbytes'][form]:15,.0f}" for form in FORMS)
        ms = "".join(f"{1e3 * told['seconds'][form]:15.1f}" for form in FORMS)
        lines.append(f"{found['devices']:7}{batch:>7}{told['same']:8.3f}{sent}{ms}")
    return "\n".join(lines)


if __name__ == "__main__":
    number, processes, port = map(int, sys.argv[1:4])
    work(number, processes, port, Path(sys.argv[4]), Setup(**json.loads(sys.argv[5])))

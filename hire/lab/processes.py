"""DA-TOP-k on several real processes, each with the rows of its own devices, that jax.distributed joins on this machine.

`launch` starts them and hands on what process 0 measured; each of them is `python -m hire.lab.processes --process I …`. Whatever
goes wrong, all end within a minute, with one line that says why; what XLA itself has to say is in a log for each process.
"""

import argparse
import inspect
import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
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
from hire.axes import Float, Int, Queries
from hire.distributed import Axis
from hire.lab.paths import CHECKPOINTS, OUT, ROOT
from hire.lab.schedules import sent
from hire.lab.timing import interleaved, medians
from hire.search import best_of, nominate
from hire.topk import TopK, exact_top_k

HOST, BATCHES = "127.0.0.1", (1, 8)
HEARTBEAT = 15  # seconds without a sign of life after which a process counts as lost, and jax ends the others
GRACE = 45  # seconds that the others have to end by themselves
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

    Returns what `measured` of process 0 did; that and the logs stay in the folder. Raises OSError when the port is in use,
    RuntimeError when a process ended before its time, ValueError for fewer than one.
    """
    if processes < 1:
        raise ValueError(f"processes = {processes}: expected at least 1")
    port, result = free_port(port), folder / "result.json"
    folder.mkdir(parents=True, exist_ok=True)
    workers = []
    try:
        for number in range(processes):
            workers.append(start(number, processes, port, setup, folder / f"process-{number}.log", result))
        watch(workers, folder)
        return json.loads(result.read_text())
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()


def free_port(port: int = 0) -> int:
    """The port, or for 0 one that is free. Raises OSError when it is in use, which jax would find out by a crash."""
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what a run before has just left is free
        try:
            trial.bind((HOST, port))
        except OSError as error:
            raise OSError(f"port {port} on {HOST} is in use: name another, or none for a free one ({error.strerror})") from None
        return trial.getsockname()[1]


def start(number: int, processes: int, port: int, setup: Setup, log: Path, result: Path) -> subprocess.Popen:
    """One worker on one CPU device; its line of error, if any, is in the pipe."""
    flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in flag]
    places = dict(process=number, processes=processes, port=port, setup=json.dumps(asdict(setup)), log=log, result=result)
    options = [f"--{name}={value}" for name, value in places.items()]
    command = [sys.executable, "-m", "hire.lab.processes", *options]
    environment = os.environ | dict(JAX_PLATFORMS="cpu", XLA_FLAGS=" ".join(flags))
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


def watch(workers: list[subprocess.Popen], folder: Path) -> None:
    """Wait until all have ended. Raises RuntimeError about the one that began it when some did so badly."""
    while None in (codes := [worker.poll() for worker in workers]) and not any(codes):
        time.sleep(0.1)
    bad = {number: code for number, code in enumerate(codes) if code}
    if not bad:
        return
    deadline = time.monotonic() + GRACE
    while None in [worker.poll() for worker in workers] and time.monotonic() < deadline:
        time.sleep(0.1)
    # An abort, or a status of LOST, is of one that lost another; a signal says more than a status.
    first = min(bad, key=lambda number: math.inf if bad[number] == -signal.SIGABRT else bad[number])
    if bad[first] < 0:
        how = f"ended by signal {-bad[first]} in mid-run: the others were stopped; run it again"
    else:
        how = workers[first].communicate()[1].strip().removeprefix("error: ") or f"ended with status {bad[first]}"
        how += f" (more in {folder / f'process-{first}.log'})"
    raise RuntimeError(f"process {first} of {len(workers)} {how}")


LOST = 2  # status of a process that a collective has failed


def main(arguments: list[str] | None = None) -> None:
    """One worker. It leaves by os._exit after an error: an orderly end would wait for the others."""
    parser = argparse.ArgumentParser(prog="python -m hire.lab.processes", description=main.__doc__)
    for name in ("process", "processes", "port"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--setup", type=lambda text: Setup(**json.loads(text)), default=Setup(), help="JSON, see Setup")
    parser.add_argument("--log", type=Path, help="takes what XLA prints")
    parser.add_argument("--result", type=Path, help="JSON, written by process 0")
    chosen = parser.parse_args(arguments)
    terminal = os.dup(2)

    def leave(line: object, status: int = 1) -> None:
        first = str(line).strip().partition("\n")[0]
        os.write(terminal, f"error: {first}\n".encode())
        os._exit(status)

    if chosen.log:
        with chosen.log.open("w") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
    try:
        join(chosen.process, chosen.processes, chosen.port, chosen.setup.patience, leave)
        found = measured(chosen.setup)
        if chosen.result and chosen.process == 0:
            chosen.result.write_text(json.dumps(found))
        jax.distributed.shutdown()
    except jax.errors.JaxRuntimeError as error:
        leave(f"process {chosen.process} of {chosen.processes} has lost another: {error}", LOST)
    except (ValueError, RuntimeError, OSError) as error:
        leave(error)


def join(process: int, processes: int, port: int, patience: int, leave: Callable) -> None:
    """Meet the other processes at a port. When one does not come, `leave` with a line: jax itself would abort."""
    if process == 0:
        free_port(port)
    limits = dict(initialization_timeout=2 * patience, heartbeat_timeout_seconds=HEARTBEAT, shutdown_timeout_seconds=patience)
    known = inspect.signature(jax.distributed.initialize).parameters  # jax 0.7 has no limit of the last
    limits = {name: seconds for name, seconds in limits.items() if name in known}
    line = f"process {process} has waited {patience} s for the other {processes - 1} at port {port} on {HOST}: start all of them"
    timer = threading.Timer(patience, leave, [line])
    timer.start()
    address = f"{HOST}:{port}"
    jax.distributed.initialize(address, processes, process, coordinator_bind_address=address, **limits)
    timer.cancel()


def agree(**own: Any) -> None:
    """Raise ValueError, the same on every process, unless all have the same: they would wait for each other in vain."""
    text = json.dumps(own).ljust(1024).encode()
    told = multihost_utils.process_allgather(np.frombuffer(text, np.uint8))
    first, *others = [json.loads(bytes(row)) for row in np.asarray(told).reshape(-1, len(text))]
    for number, other in enumerate(others, 1):
        for name, value in other.items():
            if value != first[name]:
                jax.distributed.shutdown()  # together: the end of process 0 would cut off the others' line
                raise ValueError(f"process {number} has {name} = {value}, process 0 has {first[name]}: start all with the same")


def measured(setup: Setup) -> dict[str, Any]:
    """The search on all devices: their number, `clear`, the share of places that rounding cannot have swapped, and by batch the
    share of queries whose words in those are exactly the best, bytes that travel and median seconds, each of DA-TOP-k and of
    gathering all scores.
    """
    from hire.models.checkpoints import load_checkpoint

    rows = load_checkpoint(CHECKPOINTS / "ladder.safetensors").model.embedding[...][: setup.words]
    agree(**asdict(setup), jax=jax.__version__, rows=zlib.crc32(np.asarray(rows).tobytes()))
    alone = hire.HireSoftmax(rows, hire.Quantized.fit(rows, 8), k=setup.k, candidates=setup.candidates)
    found = dict(devices=jax.device_count(), processes=jax.process_count(), setup=asdict(setup), batches={})
    with jax.set_mesh(jax.make_mesh((jax.device_count(),), ("chips",), (AxisType.Auto,))):
        spread = alone.sharded(Axis("chips", setup.slack, dealt=True))
    for batch in BATCHES:
        queries = np.random.default_rng(batch).normal(size=(setup.repeats, batch, rows.shape[1])).astype(np.float32)
        told, indices = compared(spread, queries)
        same, clear = shares(indices, exact_top_k(queries.reshape(-1, rows.shape[1]) @ rows.T, setup.k + 1))
        found["batches"][str(batch)] = told | dict(same=same, clear=clear)
    return found


def compared(spread: hire.HireSoftmax, queries: Float[np.ndarray, "n b d"]) -> tuple[dict, Int[np.ndarray, "_ k"]]:
    """Bytes and median seconds of both forms, and the words that DA-TOP-k found."""
    with jax.set_mesh(spread.rows.sharding.mesh):
        forms = {"da": hire.HireSoftmax.__call__, "gathered": jax.jit(gathered)}
        programs = {name: form.lower(spread, queries[0]).compile() for name, form in forms.items()}
        print("measuring", flush=True)  # in the log: who watches it knows that the processes have met
        calls = {name: lambda x, run=run: run(spread, x) for name, run in programs.items()}
        seconds = medians(interleaved(calls, queries, len(queries)))
        indices = np.concatenate([np.asarray(calls["da"](x).indices) for x in queries])
    return dict(nbytes={name: sent(run.as_text()) for name, run in programs.items()}, seconds=seconds), indices


def gathered(softmax: hire.HireSoftmax, x: Queries) -> TopK:
    """The same search when every device gathers the estimated scores of all rows, which are dealt, before it nominates."""
    axis = Axis.of(softmax.axis or "")

    def on_each(own: dict[str, Any], x: Queries) -> TopK:
        scores = jax.lax.all_gather(own["estimator"].scores(x), axis.name, axis=2).reshape(len(x), -1)
        chosen = nominate(scores[:, : axis.total(len(own["rows"]))], softmax.candidates)
        return best_of(chosen, softmax.logits_of_own(own, x, chosen), softmax.k)

    return axis.mapped(on_each, softmax.parts, x)


def shares(indices: Int[np.ndarray, "n k"], best: TopK) -> tuple[float, float]:
    """Of queries whose words are the best of all, of which k + 1 are given, and of places apart from both their neighbours."""
    values = np.asarray(best.values)
    apart = -np.diff(values, prepend=math.inf) > CLEAR * np.abs(values)
    clear = apart[:, :-1] & apart[:, 1:]
    return float(np.mean(np.all((indices == np.asarray(best.indices)[:, :-1]) | ~clear, axis=1))), float(np.mean(clear))


def table(found: dict[str, Any]) -> str:
    """What `launch` found, for people."""
    lines = [f"{'devices':>7}{'batch':>7}{'same':>8}{'bytes that travel, gathered':>30}{'DA-TOP-k':>10}{'ms, gathered':>14}{'DA-TOP-k':>10}"]
    for batch, told in found["batches"].items():
        nbytes, seconds = told["nbytes"], told["seconds"]
        line = f"{found['devices']:7}{batch:>7}{told['same']:8.3f}{nbytes['gathered']:30,.0f}{nbytes['da']:10,.0f}"
        lines.append(f"{line}{seconds['gathered'] * 1e3:14.2f}{seconds['da'] * 1e3:10.2f}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

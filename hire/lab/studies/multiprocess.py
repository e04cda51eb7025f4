"""DA-TOP-k on several processes of this machine, joined by jax.distributed.

Each process has the shard of its one device. `launch` starts the processes and returns their
measurements. After any error all processes end within a minute, with one line that states the
reason. The output of XLA is in one log per process.

To start the processes by hand, run this for each NUMBER with the same PORT. The last argument is a
Setup:

    export JAX_PLATFORMS=cpu
    python -m hire.lab.studies.multiprocess NUMBER PROCESSES PORT FOLDER '{"k": 32}'
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
from hire.distributed import RowSharding
from hire.lab.paths import CHECKPOINTS, OUT, ROOT
from hire.lab.timing.interleaved import medians
from hire.lab.tpu.multichip import time_forms
from hire.ops.top_k import TopK, exact_top_k
from hire.types import Int

HOST, BATCHES, RESULT = "127.0.0.1", (1, 8), "result.json"
FORMS = "HiRE DA", "HiRE gathered"  # keys of hire.lab.tpu.multichip.forms
# Seconds without a heartbeat after which jax considers a process lost and ends the others.
HEARTBEAT = 15
LOST = 2  # exit status of a process that ends because another one did
CLEAR = 1e-4  # relative difference of two scores; rounding may swap closer ones


@dataclass(frozen=True)
class Setup:
    """Settings that must be equal in all processes.

    The rows are the first `words` embeddings of the ladder's checkpoint, with an int8 estimator.

    Attributes:
        k: Size of the top-k (see HireSoftmax).
        candidates: Number of candidates (see HireSoftmax).
        slack: Oversampling of each device (see RowSharding.oversample_sigmas).
        words: Number of rows.
        repeats: Number of timed repetitions.
        patience: Seconds to wait for a process that does not connect.
    """

    k: int = 32
    candidates: int = 2048
    slack: float = math.inf
    words: int = 32768
    repeats: int = 30
    patience: int = 30


def launch(
    processes: int, *, port: int = 0, setup: Setup = Setup(), folder: Path = OUT / "processes"
) -> dict[str, Any]:
    """Run DA-TOP-k on several processes of one CPU device each.

    Args:
        processes: Number of processes.
        port: Port of this machine where the processes meet; 0 takes a free one.
        setup: Settings of all processes.
        folder: Folder for the result and the logs.

    Returns:
        The result of `measured`.

    Raises:
        OSError: If the port is in use.
        RuntimeError: If a process ended early.
        ValueError: If `processes` is below 1.
    """
    if processes < 1:
        raise ValueError(f"processes = {processes}: expected at least 1")
    port, workers = free_port(port), []
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        for number in range(processes):
            workers.append(stack.enter_context(start(number, processes, port, setup, folder)))
            stack.callback(workers[-1].kill)
        watch(workers)
        return json.loads((folder / RESULT).read_text())


def free_port(port: int = 0) -> int:
    """Return the port, or a free one for 0.

    jax would crash on a port that is in use.

    Raises:
        OSError: If the port is in use.
    """
    with socket.socket() as probe:
        # A port that an earlier run has just released counts as free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except (OSError, OverflowError) as error:
            raise OSError(
                f"port {port} on {HOST} is in use: name another, or none for a free one ({error})"
            ) from None
        return probe.getsockname()[1]


def start(
    number: int, processes: int, port: int, setup: Setup, folder: Path
) -> subprocess.Popen[str]:
    """Start one worker on one CPU device; its error line, if any, goes to the stderr pipe."""
    flags = " ".join(
        flag for flag in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in flag
    )
    arguments = (
        *map(str, (number, processes, port)),
        str(folder.absolute()),
        json.dumps(asdict(setup)),
    )
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    command = [sys.executable, "-m", "hire.lab.studies.multiprocess", *arguments]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


def watch(workers: list[subprocess.Popen[str]]) -> None:
    """Wait until all workers have succeeded.

    Raises:
        RuntimeError: If a worker failed. The message names the worker that failed first; this
            function does not wait for the others.
    """
    while None in (codes := [worker.poll() for worker in workers]) and not any(codes):
        time.sleep(0.1)
    failed = {number: code for number, code in enumerate(codes) if code}
    error_lines = {
        number: workers[number].communicate()[1].removeprefix("error: ").strip().rpartition("\n")[2]
        for number in failed
    }

    def lost_another(number: int) -> bool:
        """Return whether this worker ended because another one did.

        Its status is then LOST, or jax aborted it. In jax 0.7 an abort gives status 1 without an
        error line.
        """
        return failed[number] in (LOST, -signal.SIGABRT) or (
            failed[number] > 0 and not error_lines[number]
        )

    if failed:
        number = min(failed, key=lambda number: (lost_another(number), failed[number]))
        message = f": {error_lines[number] or 'another no longer answers; run it again'}"
        if failed[number] < 0 and not lost_another(number):
            message = (
                f" ended by signal {-failed[number]} in mid-run: the others were stopped; "
                "run it again"
            )
        raise RuntimeError(f"process {number} of {len(workers)}{message}")


def work(number: int, processes: int, port: int, folder: Path, setup: Setup) -> None:
    """Run one worker from start to end.

    After an error the worker leaves by os._exit: an orderly exit would wait for the others.
    """
    stderr_fd = os.dup(2)

    def leave(line: object, status: int = 1) -> None:
        os.write(stderr_fd, f"error: {line}".partition("\n")[0].encode() + b"\n")
        os._exit(status)

    with (folder / f"process-{number}.log").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    try:
        join(number, processes, port, setup.patience, leave)
        results = measured(setup)
        if number == 0:
            (folder / RESULT).write_text(json.dumps(results))
        jax.distributed.shutdown()
    except Exception as error:
        traceback.print_exc()
        disconnected = isinstance(error, jax.errors.JaxRuntimeError)
        leave(
            f"process {number} of {processes} has lost another: {error}" if disconnected else error,
            LOST if disconnected else 1,
        )


def join(
    number: int, processes: int, port: int, patience: int, leave: Callable[[str], None]
) -> None:
    """Join the other processes at the port.

    Args:
        number: Number of this process.
        processes: Number of processes.
        port: Port where the processes meet.
        patience: Seconds to wait.
        leave: Called with an error line if a process does not connect in time, before jax aborts.
    """
    if number == 0:
        free_port(port)
    message = (
        f"waited {patience} s at port {port} on {HOST} for all of {processes} processes in vain: "
        "start every one, with one port"
    )
    timer = threading.Timer(patience, leave, [message])
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
    """Check that all processes have the same values.

    Processes with different values would wait for each other forever.

    Raises:
        ValueError: If a value differs. All processes raise the same error.
    """
    # Padded to one size, because all processes must gather arrays of one shape.
    payload = json.dumps(own).ljust(1024).encode()
    gathered = np.asarray(
        multihost_utils.process_allgather(np.frombuffer(payload, np.uint8))
    ).reshape(-1, len(payload))
    setups = [json.loads(bytes(row)) for row in gathered]
    for number, setup in enumerate(setups):
        for name in own:
            if setup[name] != setups[0][name]:
                # All shut down together: the exit of process 0 would cut off the others' line.
                jax.distributed.shutdown()
                mismatch = (
                    f"process {number} has {name} = {setup[name]}, "
                    f"process 0 has {name} = {setups[0][name]}"
                )
                raise ValueError(f"{mismatch}: start all with the same")


def measured(setup: Setup) -> dict[str, Any]:
    """Measure the search on the devices of all processes.

    Returns:
        A dict with the keys `devices`, `processes`, `setup` and `batches`. `batches` has for each
        batch `same` and `clear` (see `shares`), and for each of FORMS `nbytes` (bytes that its
        collectives deliver to each device) and `seconds` (median).

    Raises:
        ValueError: If the processes have different settings, jax versions or weights.
    """
    from safetensors import safe_open

    path, batches = CHECKPOINTS / "ladder.safetensors", {}
    agree(**asdict(setup), jax=jax.__version__, weights=zlib.crc32(path.read_bytes()))
    with safe_open(path, framework="flax") as file:
        rows = file.get_slice("embedding")[: setup.words].astype(np.float32)
    softmax = hire.HireSoftmax(
        rows, hire.Quantized.fit(rows, 8), k=setup.k, candidates=setup.candidates
    )
    with jax.set_mesh(jax.make_mesh((jax.device_count(),), ("chips",), (AxisType.Auto,))):
        sharded = softmax.sharded(RowSharding("chips", setup.slack, interleaved=True))
        for batch in BATCHES:
            queries = (
                np.random.default_rng(batch)
                .normal(size=(setup.repeats, batch, rows.shape[1]))
                .astype(np.float32)
            )
            # For readers of the log: the processes have connected.
            print("measuring", flush=True)
            seconds, nbytes, top_k = time_forms(sharded, FORMS, list(queries))
            best = exact_top_k(queries.reshape(-1, rows.shape[1]) @ rows.T, setup.k + 1)
            batches[str(batch)] = dict(nbytes=nbytes, seconds=medians(seconds)) | shares(
                np.asarray(top_k.indices), best
            )
    return dict(
        devices=jax.device_count(),
        processes=jax.process_count(),
        setup=asdict(setup),
        batches=batches,
    )


def shares(indices: Int[np.ndarray, "n k"], best: TopK) -> dict[str, float]:
    """Compare the tokens of a search with the exact top-k.

    A position is clear if its score differs from the neighbouring scores by more than rounding can
    swap (CLEAR).

    Args:
        indices: Indices `(n, k)` from the search.
        best: Exact top k + 1 of the same queries.

    Returns:
        A dict with the keys `same` (share of queries with the exact tokens at all clear positions)
        and `clear` (share of clear positions).
    """
    values = np.asarray(best.values)
    separated = -np.diff(values, prepend=math.inf) > CLEAR * np.abs(values)
    clear = separated[:, :-1] & separated[:, 1:]
    same = np.all((indices == np.asarray(best.indices)[:, :-1]) | ~clear, axis=1)
    return dict(same=float(same.mean()), clear=float(clear.mean()))


def table(found: dict[str, Any]) -> str:
    """Format the result of `launch` as a table."""
    headings = "".join(f"{form:>15}" for form in FORMS)
    lines = [
        f"{'':22}{'bytes that travel':>30}{'ms':>30}",
        f"devices  batch    same{headings}{headings}",
    ]
    for batch, results in found["batches"].items():
        sent_bytes = "".join(f"{results['nbytes'][form]:15,.0f}" for form in FORMS)
        ms = "".join(f"{1e3 * results['seconds'][form]:15.1f}" for form in FORMS)
        lines.append(f"{found['devices']:7}{batch:>7}{results['same']:8.3f}{sent_bytes}{ms}")
    return "\n".join(lines)


if __name__ == "__main__":
    number, processes, port = map(int, sys.argv[1:4])
    work(number, processes, port, Path(sys.argv[4]), Setup(**json.loads(sys.argv[5])))

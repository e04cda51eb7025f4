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
from hire.lab.tpu.multichip import time_variants
from hire.ops.top_k import TopK, exact_top_k
from hire.timing import medians
from hire.types import Int, Rows

HOST = "127.0.0.1"
BATCHES = (1, 8)
VARIANTS = ("HiRE DA", "HiRE gathered")  # keys of hire.lab.tpu.multichip.variants
RESULT_FILE = "result.json"
# Seconds without a heartbeat after which jax considers a process lost and ends the others.
HEARTBEAT_SECONDS = 15
LOST_STATUS = 2  # exit status of a process that ends because another one did
# Relative difference between two scores below which rounding may swap them.
ROUNDING_GAP = 1e-4


@dataclass(frozen=True)
class Setup:
    """Settings that must be equal in all processes.

    The rows are the first `num_rows` embeddings of the ladder's checkpoint, with an int8 estimator.

    Attributes:
        k: Size of the top-k (see HireSoftmax).
        candidates: Number of candidates (see HireSoftmax).
        oversample_sigmas: Oversampling of each device (see RowSharding).
        num_rows: Number of rows.
        repeats: Number of timed repetitions.
        connect_seconds: Seconds to wait for a process that does not connect.
    """

    k: int = 32
    candidates: int = 2048
    oversample_sigmas: float = math.inf
    num_rows: int = 32768
    repeats: int = 30
    connect_seconds: int = 30


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
        The result of `measure`.

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
        return json.loads((folder / RESULT_FILE).read_text())


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

        Its status is then LOST_STATUS, or jax aborted it. In jax 0.7 an abort gives status 1
        without an error line.
        """
        return failed[number] in (LOST_STATUS, -signal.SIGABRT) or (
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
        join(number, processes, port, setup.connect_seconds, leave)
        results = measure(setup)
        if number == 0:
            (folder / RESULT_FILE).write_text(json.dumps(results))
        jax.distributed.shutdown()
    except Exception as error:
        traceback.print_exc()
        disconnected = isinstance(error, jax.errors.JaxRuntimeError)
        leave(
            f"process {number} of {processes} has lost another: {error}" if disconnected else error,
            LOST_STATUS if disconnected else 1,
        )


def join(
    number: int, processes: int, port: int, connect_seconds: int, leave: Callable[[str], None]
) -> None:
    """Join the other processes at the port.

    Args:
        number: Number of this process.
        processes: Number of processes.
        port: Port where the processes meet.
        connect_seconds: Seconds to wait.
        leave: Called with an error line if a process does not connect in time, before jax aborts.
    """
    if number == 0:
        free_port(port)
    message = (
        f"waited {connect_seconds} s at port {port} on {HOST} for all of {processes} processes "
        "in vain: start every one, with one port"
    )
    timer = threading.Timer(connect_seconds, leave, [message])
    timer.start()
    jax.distributed.initialize(
        f"{HOST}:{port}",
        processes,
        number,
        coordinator_bind_address=f"{HOST}:{port}",
        initialization_timeout=2 * connect_seconds + 5,
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
    )
    timer.cancel()


def check_equal(**values: Any) -> None:
    """Check that all processes have the same values.

    Processes with different values would wait for each other forever.

    Raises:
        ValueError: If a value differs. All processes raise the same error.
    """
    # Padded to one size, because all processes must gather arrays of one shape.
    payload = json.dumps(values).ljust(1024).encode()
    gathered = np.asarray(
        multihost_utils.process_allgather(np.frombuffer(payload, np.uint8))
    ).reshape(-1, len(payload))
    by_process = [json.loads(bytes(row)) for row in gathered]
    for number, of_process in enumerate(by_process):
        for name, first_value in by_process[0].items():
            if of_process[name] != first_value:
                # All shut down together: the exit of process 0 would cut off the others' line.
                jax.distributed.shutdown()
                raise ValueError(
                    f"process {number} has {name} = {of_process[name]}, "
                    f"process 0 has {name} = {first_value}: start all with the same"
                )


def measure(setup: Setup) -> dict[str, Any]:
    """Measure the search on the devices of all processes.

    Returns:
        A dict with the keys `devices`, `processes`, `setup` and `batches`. `batches` has for each
        batch size the keys of `compare_with_exact`, and by variant (VARIANTS) `delivered_bytes`
        (bytes that its collectives deliver to each device) and `seconds` (median).

    Raises:
        ValueError: If the processes have different settings, jax versions or weights.
    """
    from safetensors import safe_open

    path = CHECKPOINTS / "ladder.safetensors"
    check_equal(**asdict(setup), jax=jax.__version__, weights=zlib.crc32(path.read_bytes()))
    with safe_open(path, framework="flax") as file:
        rows = file.get_slice("embedding")[: setup.num_rows].astype(np.float32)
    softmax = hire.HireSoftmax(
        rows, hire.Quantized.fit(rows, 8), k=setup.k, candidates=setup.candidates
    )
    with jax.set_mesh(jax.make_mesh((jax.device_count(),), ("chips",), (AxisType.Auto,))):
        sharded = softmax.sharded(RowSharding("chips", setup.oversample_sigmas, interleaved=True))
        batches = {
            str(batch): measure_batch(sharded, rows, batch, setup.repeats) for batch in BATCHES
        }
    return dict(
        devices=jax.device_count(),
        processes=jax.process_count(),
        setup=asdict(setup),
        batches=batches,
    )


def measure_batch(
    sharded: hire.HireSoftmax, rows: Rows, batch: int, repeats: int
) -> dict[str, Any]:
    """Measure the search at one batch size, on random queries.

    Args:
        sharded: Softmax, sharded over the devices of all processes.
        rows: All rows.
        batch: Queries per call.
        repeats: Number of timed repetitions.

    Returns:
        The entry of `batches` in the result of `measure`.
    """
    queries = (
        np.random.default_rng(batch).normal(size=(repeats, batch, rows.shape[1])).astype(np.float32)
    )
    # For readers of the log: the processes have connected.
    print("measuring", flush=True)
    times = time_variants(sharded, VARIANTS, list(queries))
    exact = exact_top_k(queries.reshape(-1, rows.shape[1]) @ rows.T, sharded.k + 1)
    measured = dict(delivered_bytes=times.delivered_bytes, seconds=medians(times.durations))
    return measured | compare_with_exact(np.asarray(times.top.indices), exact)


def compare_with_exact(indices: Int[np.ndarray, "n k"], exact: TopK) -> dict[str, float]:
    """Compare the tokens of a search with the exact top-k.

    Only positions are compared whose score differs from the neighbouring scores by more than
    rounding can swap (ROUNDING_GAP).

    Args:
        indices: Indices `(n, k)` from the search.
        exact: Exact top k + 1 of the same queries.

    Returns:
        A dict with the keys `same_top_k` (fraction of queries with the exact tokens at all compared
        positions) and `compared_positions` (fraction of positions that are compared).
    """
    values = np.asarray(exact.values)
    separated = -np.diff(values, prepend=math.inf) > ROUNDING_GAP * np.abs(values)
    compared = separated[:, :-1] & separated[:, 1:]
    same = np.all((indices == np.asarray(exact.indices)[:, :-1]) | ~compared, axis=1)
    return dict(same_top_k=float(same.mean()), compared_positions=float(compared.mean()))


def table(result: dict[str, Any]) -> str:
    """Format the result of `launch` as a table."""
    headings = "".join(f"{variant:>15}" for variant in VARIANTS)
    lines = [
        f"{'':22}{'bytes delivered':>30}{'ms':>30}",
        f"devices  batch    same{headings}{headings}",
    ]
    for batch, measured in result["batches"].items():
        nbytes = "".join(f"{measured['delivered_bytes'][variant]:15,.0f}" for variant in VARIANTS)
        ms = "".join(f"{1e3 * measured['seconds'][variant]:15.1f}" for variant in VARIANTS)
        lines.append(f"{result['devices']:7}{batch:>7}{measured['same_top_k']:8.3f}{nbytes}{ms}")
    return "\n".join(lines)


if __name__ == "__main__":
    number, processes, port = map(int, sys.argv[1:4])
    work(number, processes, port, Path(sys.argv[4]), Setup(**json.loads(sys.argv[5])))

"""Estimates of TPU v5e time by the TPU's own compiler, which runs without a TPU.

All results are compiler estimates. A child process compiles, so the caller's jax keeps its devices.
`bundle_parser` reads the compiler's output.
"""

import functools
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import jax
from jax import export
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from hire import storage
from hire.lab.tpu import bundle_parser
from hire.storage import cache_folder

# Outside site-packages: otherwise jax would look for a TPU in every process.
COMPILER = Path(sys.prefix) / "libtpu"
# A cached estimate is valid as long as these source files do not change.
READERS = [Path(__file__), Path(__file__).with_name("bundle_parser.py")]


def estimate(
    function: Callable,
    *arguments,
    topology: str = "v5e:2x2",
    limit: float = 600.0,
    donated: Sequence[int] = (),
    specs: Sequence[P] = (),
) -> dict:
    """Estimate the time of function(*arguments) on one chip of a topology.

    The result is a compiler estimate in the form that a record states. It is cached in the user's
    cache folder by program, topology and compiler version. A damaged cache file is computed again.

    Args:
        function: Function to compile.
        arguments: Pytrees of arrays or of jax.ShapeDtypeStruct.
        topology: Slice to compile for, such as "v5e:2x2".
        limit: Seconds that the child process may take.
        donated: Positions of the arguments that the program may overwrite.
        specs: One partition spec per array. They shard the arrays over the axis "chips" of all
            chips, and the result is replicated on each chip. Empty: all arrays are on one chip.

    Returns:
        A dict with the keys of `compiled`, plus `topology` and `compiler` (the compiler's version).

    Raises:
        ModuleNotFoundError: If libtpu is not installed.
        RuntimeError: If the topology is unknown, the program does not fit in HBM or does not
            compile, or the compiler gives no answer in time. The message states the compiler's
            reason.
    """
    leaves, tree = jax.tree.flatten(arguments)

    def flat(*leaves):
        return jax.tree.leaves(function(*jax.tree.unflatten(tree, leaves)))

    if specs:
        mesh = AbstractMesh(
            (math.prod(bundle_parser.sides(topology)),), ("chips",), axis_types=(AxisType.Auto,)
        )
        with jax.sharding.use_abstract_mesh(mesh):
            in_shardings, out_shardings = (
                tuple(NamedSharding(mesh, spec) for spec in specs),
                NamedSharding(mesh, P()),
            )
            program = export.export(
                jax.jit(flat, in_shardings=in_shardings, out_shardings=out_shardings),
                platforms=["tpu"],
            )(*leaves)
    else:
        program = export.export(jax.jit(flat), platforms=["tpu"])(*leaves)
    compiler = compiler_version()
    sizes = [len(jax.tree.leaves(argument)) for argument in arguments]
    donated_leaves = [leaf for i in donated for leaf in range(sum(sizes[:i]), sum(sizes[: i + 1]))]
    key_parts = (
        program.mlir_module(),
        topology,
        compiler,
        str(donated_leaves),
        *(path.read_text() for path in READERS),
    )
    key = hashlib.sha256("".join(key_parts).encode()).hexdigest()[:16]
    cache_path = cache_folder() / "tpu" / f"{key}.json"
    storage.cached(
        [cache_path],
        functools.partial(write_estimate, program, topology, compiler, limit, donated_leaves),
    )
    return json.loads(cache_path.read_text())


def write_estimate(
    program: export.Exported,
    topology: str,
    compiler: str,
    limit: float,
    given: Sequence[int],
    parts: list[Path],
):
    """Compile a program and write its estimate to the one path in `parts`.

    Raises:
        RuntimeError: As in `estimate`.
    """
    with tempfile.TemporaryDirectory() as folder:
        results = compiled(Path(folder), bytes(program.serialize()), topology, limit, given)
    parts[0].write_text(json.dumps(results | dict(topology=topology, compiler=compiler)))


def compiler_version() -> str:
    """Return the name and version of the installed compiler.

    Raises:
        ModuleNotFoundError: If libtpu is not installed.
    """
    packages = importlib.metadata.distributions(name="libtpu", path=[str(COMPILER), *sys.path])
    for package in packages:
        return f"libtpu {package.version}"
    raise ModuleNotFoundError(
        "libtpu is not installed: `make env`, or `pip install 'hire[tpu-compiler]'` (Linux on "
        "x86-64)"
    )


def install() -> None:
    """Install the libtpu version that this jax requires into COMPILER.

    The compiler runs only on Linux on x86-64; elsewhere this prints a message and installs nothing.
    """
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        print(
            f"the TPU compiler needs Linux on x86-64, this is {sys.platform} on "
            f"{platform.machine()}: committed estimates are shown"
        )
        return
    requirement = next(
        line.partition(";")[0].strip()
        for line in importlib.metadata.requires("jax") or ()
        if line.startswith("libtpu")
    )
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "-q",
            "--no-deps",
            "--target",
            str(COMPILER),
            requirement,
        ],
        check=True,
    )


def compiled(
    folder: Path, program: bytes, topology: str, limit: float, donated: Sequence[int] = ()
) -> dict:
    """Compile a serialized program in a child process and read the scheduled program.

    Args:
        folder: Folder for the program, the dumps and the outputs of the child process.
        program: Serialized jax.export program.
        topology: Slice to compile for.
        limit: Seconds that the child process may take.
        donated: Positions of the flat arguments that the program may overwrite.

    Returns:
        A dict with the keys `seconds` (estimated time), `transfer_seconds` (seconds of all
        transfers at full bandwidth), `operations` (one dict per operation), `unparsed` (what could
        not be parsed), `memory` (bytes by kind) and `bytes_sent` (bytes that collectives deliver to
        each device).

    Raises:
        RuntimeError: If the compiler refuses the program or gives no answer in time.
    """
    (folder / "program").write_bytes(program)
    dump_flags = (
        f"--xla_jf_dump_to={folder}/llo --xla_jf_dump_llo_text=true "
        "--xla_jf_dump_llo_pass_label_regex=final_bundles"
    )
    tpu_environment = dict(
        TPU_ACCELERATOR_TYPE="v5litepod-4",
        TPU_WORKER_HOSTNAMES="localhost",
        TPU_SKIP_MDS_QUERY="1",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    )
    python_path = os.pathsep.join(filter(None, [str(COMPILER), os.environ.get("PYTHONPATH")]))
    environment = (
        os.environ
        | tpu_environment
        | dict(
            JAX_PLATFORMS="cpu", LIBTPU_INIT_ARGS=dump_flags, XLA_FLAGS="", PYTHONPATH=python_path
        )
    )
    command = [
        sys.executable,
        "-m",
        "hire.lab.tpu.compiler",
        str(folder),
        topology,
        json.dumps(donated),
    ]
    try:
        process = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=limit
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(
            f"the TPU compiler gave no answer in {limit:g} s for {topology}; its process is gone"
        ) from None
    if not (folder / "memory").exists():
        error_lines = [
            line
            for line in process.stderr.strip().splitlines()
            if "Error" in line or "error" in line
        ] or ["no reason given"]
        raise RuntimeError(
            f"the TPU compiler refused the program for {topology}: {error_lines[-1].strip()[:300]}"
        )
    bundles = {}
    for path in (folder / "llo").glob("*-final_bundles.txt"):
        if "schedule-analysis" not in path.name:
            name = re.sub(r"^\d+-(.*)-\d+-final_bundles.txt$", r"\1", path.name)
            bundles[name] = bundle_parser.schedule(path.read_text())
    hlo = (folder / "hlo").read_text()
    operations = bundle_parser.operations(hlo, bundles, bundle_parser.sides(topology))
    total_seconds, transfer_seconds = (
        sum(operation.seconds for operation in operations),
        sum(operation.transfer_seconds for operation in operations),
    )
    unparsed = [
        f"{operation.name}: {part}" for operation in operations for part in operation.unparsed
    ]
    entries = [asdict(operation) | dict(seconds=operation.seconds) for operation in operations]
    memory = json.loads((folder / "memory").read_text())
    bytes_sent = bundle_parser.bytes_sent(hlo)
    return dict(
        seconds=max(total_seconds, transfer_seconds),
        transfer_seconds=transfer_seconds,
        operations=entries,
        unparsed=unparsed,
        memory=memory,
        bytes_sent=bytes_sent,
    )


def child(folder: Path, topology: str, donated: Sequence[int]) -> None:
    """Compile the program in `folder` without a TPU and write its HLO and memory use there."""
    from jax.experimental import topologies

    exported = export.deserialize(bytearray((folder / "program").read_bytes()))
    topology_desc = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    in_shardings = out_shardings = jax.sharding.SingleDeviceSharding(topology_desc.devices[0])
    if exported.nr_devices > 1:
        mesh = topologies.make_mesh(topology_desc, (exported.nr_devices,), ("chips",))
        in_shardings, out_shardings = (
            exported.in_shardings_jax(mesh),
            list(exported.out_shardings_jax(mesh)),
        )
    shapes = [jax.ShapeDtypeStruct(value.shape, value.dtype) for value in exported.in_avals]
    program = (
        jax.jit(
            exported.call,
            in_shardings=in_shardings,
            out_shardings=out_shardings,
            donate_argnums=donated,
        )
        .lower(*shapes)
        .compile()
    )
    (folder / "hlo").write_text(program.as_text() or "")
    memory = program.memory_analysis()
    kinds = ("argument", "output", "temp", "alias", "generated_code")
    (folder / "memory").write_text(
        json.dumps({kind: getattr(memory, f"{kind}_size_in_bytes") for kind in kinds})
    )


if __name__ == "__main__":
    child(Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]))

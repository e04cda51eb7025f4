"""What a program would take on a TPU v5e, by the TPU's own compiler, which runs without a TPU. All of it is a compiler estimate.

A child process compiles, so that the caller's jax keeps its devices; schedules.py reads what comes of it.
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

from hire.lab import schedules
from hire.models import storage
from hire.models.weights import cache_folder

COMPILER = Path(sys.prefix) / "libtpu"  # not among the packages, or jax would look for a TPU in every process
READERS = [Path(__file__), Path(__file__).with_name("schedules.py")]  # an estimate is kept for as long as these stay


def estimate(
    function: Callable,
    *arguments,
    topology: str = "v5e:2x2",
    limit: float = 600.0,
    donated: Sequence[int] = (),
    specs: Sequence[P] = (),
) -> dict:
    """What function(*arguments) would take on one chip of a topology: a compiler estimate, as a record states it.

    The arguments are pytrees of arrays or of jax.ShapeDtypeStruct; those that are `donated`, by place, may be written over. With
    `specs`, one an array, they lie over the axis "chips" of all chips, and what every chip gets is the same. A child
    process compiles, for at most `limit` seconds; what it found is kept in the user's cache folder, by program, topology and
    compiler, and found again when the file there is damaged.

    Raises ModuleNotFoundError without libtpu, and RuntimeError, with the compiler's reason, for an unknown topology, a
    program that does not fit in HBM or does not compile, or no answer in time.
    """
    leaves, tree = jax.tree.flatten(arguments)

    def flat(*leaves):
        return jax.tree.leaves(function(*jax.tree.unflatten(tree, leaves)))

    if specs:
        mesh = AbstractMesh((math.prod(schedules.sides(topology)),), ("chips",), axis_types=(AxisType.Auto,))
        with jax.sharding.use_abstract_mesh(mesh):
            gets, gives = tuple(NamedSharding(mesh, spec) for spec in specs), NamedSharding(mesh, P())
            program = export.export(jax.jit(flat, in_shardings=gets, out_shardings=gives), platforms=["tpu"])(*leaves)
    else:
        program = export.export(jax.jit(flat), platforms=["tpu"])(*leaves)
    compiler = compiler_version()
    sizes = [len(jax.tree.leaves(argument)) for argument in arguments]
    given = [leaf for i in donated for leaf in range(sum(sizes[:i]), sum(sizes[: i + 1]))]
    told = program.mlir_module(), topology, compiler, str(given), *(path.read_text() for path in READERS)
    key = hashlib.sha256("".join(told).encode()).hexdigest()[:16]
    kept = cache_folder() / "tpu" / f"{key}.json"
    storage.cached([kept], functools.partial(write_estimate, program, topology, compiler, limit, given))
    return json.loads(kept.read_text())


def write_estimate(program: export.Exported, topology: str, compiler: str, limit: float, given: Sequence[int], parts: list[Path]):
    """Compile a program and write what would come of it to the one path in `parts`. Raises RuntimeError as `estimate` does."""
    with tempfile.TemporaryDirectory() as folder:
        found = compiled(Path(folder), bytes(program.serialize()), topology, limit, given)
    parts[0].write_text(json.dumps(found | dict(topology=topology, compiler=compiler)))


def compiler_version() -> str:
    found = importlib.metadata.distributions(name="libtpu", path=[str(COMPILER), *sys.path])
    for package in found:
        return f"libtpu {package.version}"
    raise ModuleNotFoundError("libtpu is not installed: `make env`, or `pip install 'hire[tpu-compiler]'` (Linux on x86-64)")


def install() -> None:
    """Put the compiler that this jax asks for beside its packages (COMPILER); only on Linux on x86-64, where it runs."""
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        print(
            f"the TPU compiler needs Linux on x86-64, this is {sys.platform} on {platform.machine()}: committed estimates are shown"
        )
        return
    wanted = next(each.partition(";")[0].strip() for each in importlib.metadata.requires("jax") or () if each.startswith("libtpu"))
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(COMPILER), wanted], check=True)


def compiled(folder: Path, program: bytes, topology: str, limit: float, donated: Sequence[int] = ()) -> dict:
    """Compile a serialized program in a child process that leaves the scheduled program in `folder`, and read it."""
    (folder / "program").write_bytes(program)
    dumps = f"--xla_jf_dump_to={folder}/llo --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=final_bundles"
    chips = dict(
        TPU_ACCELERATOR_TYPE="v5litepod-4", TPU_WORKER_HOSTNAMES="localhost", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1"
    )
    places = os.pathsep.join(filter(None, [str(COMPILER), os.environ.get("PYTHONPATH")]))
    environment = os.environ | chips | dict(JAX_PLATFORMS="cpu", LIBTPU_INIT_ARGS=dumps, XLA_FLAGS="", PYTHONPATH=places)
    command = [sys.executable, "-m", "hire.lab.tpu", str(folder), topology, json.dumps(donated)]
    try:
        told = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"the TPU compiler gave no answer in {limit:g} s for {topology}; its process is gone") from None
    if not (folder / "memory").exists():
        last = [line for line in told.stderr.strip().splitlines() if "Error" in line or "error" in line] or ["no reason given"]
        raise RuntimeError(f"the TPU compiler refused the program for {topology}: {last[-1].strip()[:300]}")
    bundles = {}
    for path in (folder / "llo").glob("*-final_bundles.txt"):
        if "schedule-analysis" not in path.name:
            name = re.sub(r"^\d+-(.*)-\d+-final_bundles.txt$", r"\1", path.name)
            bundles[name] = schedules.schedule(path.read_text())
    hlo = (folder / "hlo").read_text()
    found = schedules.operations(hlo, bundles, schedules.sides(topology))
    total, moved = sum(each.seconds for each in found), sum(each.moving for each in found)
    holes = [f"{each.name}: {hole}" for each in found for hole in each.holes]
    parts = [asdict(each) | dict(seconds=each.seconds) for each in found]
    memory = json.loads((folder / "memory").read_text())
    sent = schedules.sent(hlo)
    return dict(seconds=max(total, moved), moving=moved, operations=parts, holes=holes, memory=memory, sent=sent)


def child(folder: Path, topology: str, donated: Sequence[int]) -> None:
    """Compile what is in a folder, on a machine without a TPU, and leave the program and its memory there."""
    from jax.experimental import topologies

    exported = export.deserialize(bytearray((folder / "program").read_bytes()))
    pod = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    gets = gives = jax.sharding.SingleDeviceSharding(pod.devices[0])
    if exported.nr_devices > 1:
        mesh = topologies.make_mesh(pod, (exported.nr_devices,), ("chips",))
        gets, gives = exported.in_shardings_jax(mesh), list(exported.out_shardings_jax(mesh))
    shapes = [jax.ShapeDtypeStruct(value.shape, value.dtype) for value in exported.in_avals]
    program = jax.jit(exported.call, in_shardings=gets, out_shardings=gives, donate_argnums=donated).lower(*shapes).compile()
    (folder / "hlo").write_text(program.as_text() or "")
    memory = program.memory_analysis()
    parts = ("argument", "output", "temp", "alias", "generated_code")
    (folder / "memory").write_text(json.dumps({part: getattr(memory, f"{part}_size_in_bytes") for part in parts}))


if __name__ == "__main__":
    child(Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]))

"""What a program would take on a TPU v5e, by the TPU's own compiler, which runs without a TPU. All of it is a compiler estimate.

The compiler's own totals have holes (operations that it does not know, prefetches that it does not count), so nothing is taken from
them. What is read is the scheduled program of every operation: its VLIW bundles, one a cycle, times the trips of the loops around
them, and the bytes of its transfers between HBM and VMEM.
"""

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
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import jax
from jax import export

from hire.models.weights import cache_folder

BANDWIDTH, CLOCK, HBM, LINK = 819e9, 1.5e9, 16e9, 50e9  # of a v5e chip: bytes/s, cycles/s, bytes, bytes/s of one of four links
LATENCY = 0.75e-6  # seconds from asking for a transfer to its arrival, assumed
GRANULE = 32  # bytes; transfers are counted in these
COMPILER = Path(sys.prefix) / "libtpu"  # not among the packages, or jax would look for a TPU in every process


@dataclass(frozen=True)
class Operation:
    """One operation of a compiled program, all its executions together."""

    name: str
    kind: str  # opcode of the HLO; "prefetch" or "collective"
    times: int = 1
    cycles: float = 0.0
    nbytes: float = 0.0  # to and from HBM, or between chips
    waits: float = 0.0  # seconds
    holes: tuple[str, ...] = ()

    @property
    def moving(self) -> float:
        """Seconds that its bytes take at full bandwidth."""
        return self.nbytes / (LINK if self.kind == "collective" else BANDWIDTH)

    @property
    def seconds(self) -> float:
        """The larger of computing and moving, and what it waits; of a prefetch the waiting alone, it moves beside the others."""
        return self.waits if self.kind == "prefetch" else max(self.cycles / CLOCK, self.moving) + self.waits


ROW = re.compile(r"^\s*(?:0x[0-9a-f]+|\d+)\s*(?:LH|LB|LE|PB|PF|CT)?\s*:(?:\s*>)*\s*\{(.*)")


JUMP = r"sbr\.rel (?:\(!?(%p\w+)\) )?target (?:= \$region(\d+)|bundleno = (\d+))"  # the latter before libtpu 0.0.40 or so
Schedule = tuple[float, float, tuple[str, ...]]


def schedule(text: str) -> Schedule:
    """Cycles, bytes moved to and from HBM, and what could not be read, of one operation's scheduled bundles."""
    rows = []
    for line in text.splitlines():
        found = ROW.match(line)
        if found:
            rows.append(found[1])
        elif rows:
            rows[-1] += line
    begins = {region: i for i, row in enumerate(rows) for region in re.findall(r"Start(?:/End empty)? region (\d+)", row)}
    limits = dict(re.findall(r"(%p\w+) = scmp\.ge\.s32\.totalorder (?:\(.*?\), )?%\w+, ([%\w]+)", "\n".join(rows)))
    trips, holes = [1.0] * len(rows), []
    for end, row in enumerate(rows):
        for predicate, region, number in re.findall(JUMP, row):
            begin = int(number) if number else begins.get(region, end + 1)
            if begin <= end:  # a jump back: a loop
                limit = limits.get(predicate, "unknown")
                if not limit.isdigit():
                    holes.append(f"a loop of {end - begin} bundles counted once")
                for i in range(begin, min(end + 5, len(rows))):  # with what is issued while it jumps
                    trips[i] *= int(limit) if limit.isdigit() else 1
    moved = 0.0
    for times, row in zip(trips, rows, strict=True):
        for kind, granules in re.findall(r"(?:^|;;)\s+%\d+ = dma\.(\w+) .*?/\*size_in_granules=\*/([%\w]+)", row):
            if not granules.isdigit():
                holes.append(f"a transfer {kind} of unknown size")
            elif "hbm" in kind:
                moved += times * int(granules) * GRANULE
    return sum(trips), moved, tuple(holes)


FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "partition-id", "after-all"}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


PARTIAL = {"gather", "scatter", "slice", "dynamic-slice", "dynamic-update-slice", "custom-call"}  # may move a part of an array


def arrays(shape: str) -> list[str]:
    """The arrays of an HLO shape, each with its layout."""
    return re.findall(r"\w+\[[^\]]*\](?:\{[^}]*\})?", shape)


def array_bytes(shape: str) -> list[float]:
    """Bytes of every array in an HLO shape that is not a scalar, tiles not filled up."""
    arrays = re.findall(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]+)\]", shape)
    return [int(bits or 8) / 8 * math.prod(map(int, sizes.split(","))) for _, bits, sizes in arrays]


def computations(hlo: str) -> dict[str, list[tuple[str, str, str, str]]]:
    """The instructions (name, shape, opcode, rest of the line) of every computation of a compiled program, the entry as ENTRY."""
    found, inside = {}, None
    for line in hlo.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line)
        if head:
            inside = found.setdefault("ENTRY" if head[1] else head[2], [])
        instruction = re.match(r"\s+(?:ROOT )?%([\w.-]+) = (.*?) ([a-z][a-z0-9-]*)\((.*)", line)
        if instruction and inside is not None:
            inside.append((instruction[1], instruction[2], instruction[3], instruction[4]))
    return found


def operations(hlo: str, schedules: dict[str, Schedule]) -> list[Operation]:
    """Every operation of a compiled program, in order, with its schedule (see `schedule`) and how often it runs.

    A prefetch moves while operations compute; what is left of it when it is waited for is its time. The compiler leaves one
    schedule for operations that are alike, and those of scalars in the control program, whose bundles come first.
    """
    parts = computations(hlo)
    places = {name: {op: shape for op, shape, *_ in rows} for name, rows in parts.items()}

    def operands(name: str, rest: str) -> list[str]:
        return [places[name].get(operand, "") for operand in re.findall(r"%([\w.-]+)", rest.partition("), ")[0])]

    def likeness(name: str, shape: str, opcode: str, rest: str) -> tuple:
        called = re.search(r"calls=%([\w.-]+)", rest)
        body = [part for _, *row in parts.get(called[1] if called else "", []) for part in row[:2]]
        return opcode, shape, *operands(name, rest), *body

    twins = {likeness(name, *row): schedules[op] for name, rows in parts.items() for op, *row in rows if op in schedules}

    def inside(name: str, times: int) -> list[Operation]:
        done, pending = [], {}
        for op, shape, opcode, rest in parts.get(name, []):
            found = []
            if opcode == "while":
                trips = re.search(r'known_trip_count":\{"n":"(\d+)"', rest)
                found = [] if trips else [Operation(op, opcode, times, holes=("a loop of unknown trips, counted once",))]
                for part in re.findall(r"(?:body|condition)=%([\w.-]+)", rest):
                    found += inside(part, times * int(trips[1] if trips else 1))
            elif opcode in ("call", "conditional"):
                branches = [inside(part, times) for part in re.findall(r"%([\w.-]+)", rest) if part in parts]
                found = max(branches, key=lambda branch: sum(each.seconds for each in branch), default=[])
            elif opcode.removesuffix("-start") in COLLECTIVES:
                found = [Operation(op, "collective", times, nbytes=times * sum(array_bytes(shape)), waits=times * LATENCY)]
            elif op in schedules or likeness(name, shape, opcode, rest) in twins:
                cycles, nbytes, holes = schedules.get(op) or twins[likeness(name, shape, opcode, rest)]
                uneven = []  # what moves in pieces of unknown sizes: counted whole
                if any(re.search("(hbm_to_vmem|general) of unknown", hole) for hole in holes):
                    uneven += operands(name, rest)
                if any(re.search("(vmem_to_hbm|general) of unknown", hole) for hole in holes):
                    uneven += arrays(shape)
                if opcode == "fusion" and not PARTIAL & set(likeness(name, shape, opcode, rest)):
                    uneven = [*operands(name, rest), *arrays(shape)]  # moves all of them, whatever its schedule shows
                least = sum(sum(array_bytes(part)) for part in uneven if "S(" not in part)
                holes += ("fewer bytes in its schedule than it must move",) if nbytes < 0.9 * least else ()
                nbytes = max(nbytes, least)
                waits = times * LATENCY if nbytes else 0.0
                found = [Operation(op, opcode, times, times * cycles, times * nbytes, waits, holes)]
            elif opcode in ("copy-start", "slice-start"):  # of a whole array or a slice of it
                pending[op] = Operation(op, "prefetch", times, nbytes=times * min(array_bytes(shape)))
            elif opcode in ("copy-done", "slice-done"):
                started = pending.pop(re.findall(r"%([\w.-]+)", rest)[0])
                found = [replace(started, waits=max(0.0, started.moving - started.waits))]
            elif not array_bytes(re.sub(r"\w+\[\]", "", shape)):
                continue  # a scalar's
            elif opcode not in FREE and not opcode.endswith("-done") and "ConcatBitcast" not in rest:
                found = [Operation(op, opcode, times, holes=("no schedule of it",))]
            idle = sum(each.seconds - each.moving for each in found if each.kind != "prefetch")
            for prefetch, started in pending.items():  # the first one that was asked for gets what the memory has to spare
                share = min(idle, max(0.0, started.moving - started.waits))
                pending[prefetch], idle = replace(started, waits=started.waits + share), idle - share
            done += found
        return done

    control = [Operation("control", "control", 1, schedules["TLP"][0])] if "TLP" in schedules else []
    return control + inside("ENTRY", 1)


def estimate(function: Callable, *arguments, topology: str = "v5e:2x2", limit: float = 600.0, donated: Sequence[int] = ()) -> dict:
    """What function(*arguments) would take on one chip of a topology: a compiler estimate, as a record states it.

    The arguments are pytrees of arrays or of jax.ShapeDtypeStruct; those that are `donated`, by place, may be written over. A child
    process compiles, for at most `limit` seconds; what it found is kept in the user's cache folder, by program, topology and
    compiler. Raises ModuleNotFoundError without libtpu, and RuntimeError, with the compiler's reason, for an unknown topology, a
    program that does not fit in HBM or does not compile, or no answer in time.
    """
    leaves, tree = jax.tree.flatten(arguments)
    flat = jax.jit(lambda *leaves: jax.tree.leaves(function(*jax.tree.unflatten(tree, leaves))))
    program = export.export(flat, platforms=["tpu"])(*leaves)
    compiler = compiler_version()
    sizes = [len(jax.tree.leaves(argument)) for argument in arguments]
    given = [leaf for i in donated for leaf in range(sum(sizes[:i]), sum(sizes[: i + 1]))]
    told = program.mlir_module(), topology, compiler, str(given), Path(__file__).read_text()  # no places of the source are in it
    key = hashlib.sha256("".join(told).encode()).hexdigest()[:16]
    kept = cache_folder() / "tpu" / f"{key}.json"
    if not kept.exists():
        with tempfile.TemporaryDirectory() as folder:
            found = compiled(Path(folder), bytes(program.serialize()), topology, limit, given)
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.with_suffix(".partial").write_text(json.dumps(found | dict(topology=topology, compiler=compiler)))
        kept.with_suffix(".partial").replace(kept)
    return json.loads(kept.read_text())


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
    schedules = {}
    for path in (folder / "llo").glob("*-final_bundles.txt"):
        if "schedule-analysis" not in path.name:
            name = re.sub(r"^\d+-(.*)-\d+-final_bundles.txt$", r"\1", path.name)
            schedules[name] = schedule(path.read_text())
    found = operations((folder / "hlo").read_text(), schedules)
    total, moved = sum(each.seconds for each in found), sum(each.moving for each in found)
    holes = [f"{each.name}: {hole}" for each in found for hole in each.holes]
    parts = [asdict(each) | dict(seconds=each.seconds) for each in found]
    memory = json.loads((folder / "memory").read_text())
    return dict(seconds=max(total, moved), moving=moved, operations=parts, holes=holes, memory=memory)


def child(folder: Path, topology: str, donated: Sequence[int]) -> None:
    """Compile what is in a folder, on a machine without a TPU, and leave the program and its memory there."""
    from jax.experimental import topologies

    exported = export.deserialize(bytearray((folder / "program").read_bytes()))
    chip = jax.sharding.SingleDeviceSharding(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0])
    shapes = [jax.ShapeDtypeStruct(value.shape, value.dtype) for value in exported.in_avals]
    program = jax.jit(exported.call, in_shardings=chip, out_shardings=chip, donate_argnums=donated).lower(*shapes).compile()
    (folder / "hlo").write_text(program.as_text() or "")
    memory = program.memory_analysis()
    parts = ("argument", "output", "temp", "alias", "generated_code")
    (folder / "memory").write_text(json.dumps({part: getattr(memory, f"{part}_size_in_bytes") for part in parts}))


if __name__ == "__main__":
    child(Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]))

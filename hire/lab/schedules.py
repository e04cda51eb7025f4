"""What the TPU compiler left of a program, read: the scheduled instructions of every operation, and the bytes that each moves.

The compiler's own totals have holes (operations that it does not know, prefetches that it does not count), so nothing is taken from
them. Counted are the VLIW bundles of every operation, one a cycle, times the trips of the loops around them, and its transfers
between HBM and VMEM.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

BANDWIDTH, CLOCK, HBM, LINK = 819e9, 1.5e9, 16e9, 50e9  # of a v5e chip: bytes/s, cycles/s, bytes, bytes/s of one of four links
LATENCY = 0.75e-6  # seconds from asking for a transfer to its arrival, assumed
HOP = 1e-6  # seconds from one chip to the next, assumed
GRANULE = 32  # bytes; transfers are counted in these


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
    links: int = 0  # of a collective: by how many of a chip's links its bytes come

    @property
    def moving(self) -> float:
        """Seconds that its bytes take at full bandwidth."""
        return self.nbytes / (self.links * LINK or BANDWIDTH)

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


class Instruction(NamedTuple):
    """A line of a compiled program; `rest` is what follows the opcode and its bracket."""

    name: str
    shape: str
    opcode: str
    rest: str


def computations(hlo: str) -> dict[str, list[Instruction]]:
    """The instructions of every computation of a compiled program, the entry as ENTRY."""
    found, inside = {}, None
    for line in hlo.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line)
        if head:
            inside = found.setdefault("ENTRY" if head[1] else head[2], [])
        instruction = re.match(r"\s+(?:ROOT )?%([\w.-]+) = (.*?) ([a-z][a-z0-9-]*)\((.*)", line)
        if instruction and inside is not None:
            inside.append(Instruction(*instruction.groups()))
    return found


def sent(hlo: str) -> float:
    """Bytes that the collectives of a compiled program leave on every device."""
    rows = [row for rows in computations(hlo).values() for row in rows]
    return sum((collected(row) for row in rows if row.opcode.removesuffix("-start") in COLLECTIVES), 0.0)


def collected(row: Instruction) -> float:
    """Bytes of a collective's result; one that is started names its operands, too."""
    found = array_bytes(row.shape)
    return sum(found) if row.opcode in COLLECTIVES or row.opcode.startswith("all-reduce") else max(found)


def sides(topology: str) -> list[int]:
    """Chips along each side of a slice, such as "v5e:4x4"."""
    return [int(side) for side in topology.partition(":")[2].split("x")]


def network(sides: Sequence[int]) -> tuple[int, int]:
    """Links by which a chip in a corner gets what others send, and hops to the farthest. A side of 16 chips closes to a ring."""
    rings = [side == 16 for side in sides]
    links = sum((1 + ring) * (side > 1) for side, ring in zip(sides, rings, strict=True))
    return max(1, links), sum(side // 2 if ring else side - 1 for side, ring in zip(sides, rings, strict=True))


def operations(hlo: str, schedules: dict[str, Schedule], sides: Sequence[int] = (2, 2)) -> list[Operation]:
    """Every operation of a compiled program, in order, with its schedule (see `schedule`) and how often it runs.

    A prefetch moves while operations compute; what is left of it when it is waited for is its time. What runs on scalars is in the
    control program, whose bundles come first.
    """
    control = [Operation("control", "control", 1, schedules["TLP"][0])] if "TLP" in schedules else []
    return control + Reader(computations(hlo), schedules, sides).inside("ENTRY", 1)


class Reader:
    """The computations of a program with their schedules, of which the compiler leaves one for all operations that are alike."""

    def __init__(self, parts: dict[str, list[Instruction]], schedules: dict[str, Schedule], sides: Sequence[int]):
        self.parts, self.schedules, self.sides = parts, schedules, sides
        self.shapes = {name: {row.name: row.shape for row in rows} for name, rows in parts.items()}
        rows = [(name, row) for name, rows in parts.items() for row in rows if row.name in schedules]
        self.twins = {self.likeness(name, row): schedules[row.name] for name, row in rows}

    def operands(self, place: str, row: Instruction) -> list[str]:
        """Shapes of what an instruction of the computation `place` takes."""
        return [self.shapes[place].get(name, "") for name in re.findall(r"%([\w.-]+)", row.rest.partition("), ")[0])]

    def body(self, row: Instruction) -> list[tuple[str, str]]:
        """Shape and opcode of everything in the computation that an instruction calls."""
        called = re.search(r"calls=%([\w.-]+)", row.rest)
        return [(part.shape, part.opcode) for part in self.parts.get(called[1] if called else "", [])]

    def likeness(self, place: str, row: Instruction) -> tuple:
        return row.opcode, row.shape, *self.operands(place, row), *self.body(row)

    def inside(self, place: str, times: int) -> list[Operation]:
        """The operations of one computation, run so often."""
        done, pending = [], {}
        for row in self.parts.get(place, []):
            found = []
            if row.opcode in ("copy-start", "slice-start"):  # of a whole array or a slice of it
                pending[row.name] = Operation(row.name, "prefetch", times, nbytes=times * min(array_bytes(row.shape)))
            elif row.opcode in ("copy-done", "slice-done"):
                started = pending.pop(re.findall(r"%([\w.-]+)", row.rest)[0])
                found = [replace(started, waits=max(0.0, started.moving - started.waits))]
            else:
                found = self.of(place, row, times)
            idle = sum(each.seconds - each.moving for each in found if each.kind != "prefetch")
            for prefetch, started in pending.items():  # the first one that was asked for gets what the memory has to spare
                share = min(idle, max(0.0, started.moving - started.waits))
                pending[prefetch], idle = replace(started, waits=started.waits + share), idle - share
            done += found
        return done

    def of(self, place: str, row: Instruction, times: int) -> list[Operation]:
        """What one instruction that is no prefetch amounts to."""
        if row.opcode == "while":
            trips = re.search(r'known_trip_count":\{"n":"(\d+)"', row.rest)
            unknown = Operation(row.name, row.opcode, times, holes=("a loop of unknown trips, counted once",))
            parts = re.findall(r"(?:body|condition)=%([\w.-]+)", row.rest)
            runs = [self.inside(part, times * int(trips[1] if trips else 1)) for part in parts]
            return sum(runs, [] if trips else [unknown])
        if row.opcode in ("call", "conditional"):
            branches = [self.inside(part, times) for part in re.findall(r"%([\w.-]+)", row.rest) if part in self.parts]
            return max(branches, key=lambda branch: sum(each.seconds for each in branch), default=[])
        if row.opcode.removesuffix("-start") in COLLECTIVES:
            return [self.collective(row, times)]
        known = self.schedules.get(row.name) or self.twins.get(self.likeness(place, row))
        if known:
            return [self.scheduled(place, row, times, *known)]
        scalar = not array_bytes(re.sub(r"\w+\[\]", "", row.shape))
        if scalar or row.opcode in FREE or row.opcode.endswith("-done") or "ConcatBitcast" in row.rest:
            return []
        return [Operation(row.name, row.opcode, times, holes=("no schedule of it",))]

    def collective(self, row: Instruction, times: int) -> Operation:
        """What a corner chip gets from the others, and the hops that it comes by: there and back where something is summed."""
        (links, hops), chips = network(self.sides), math.prod(self.sides)
        both = 2 if row.opcode.startswith("all-reduce") else 1
        gets = both * collected(row) * (chips - 1) / chips
        return Operation(row.name, "collective", times, nbytes=times * gets, waits=times * both * hops * HOP, links=links)

    def scheduled(
        self, place: str, row: Instruction, times: int, cycles: float, nbytes: float, holes: tuple[str, ...]
    ) -> Operation:
        """An operation by its schedule, and by the arrays in HBM that it must move where the schedule does not show their bytes."""
        whole = row.opcode == "fusion" and not PARTIAL & {opcode for _, opcode in self.body(row)}
        takes, gives = (
            whole or any(re.search(f"({way}|general) of unknown", hole) for hole in holes) for way in ("hbm_to_vmem", "vmem_to_hbm")
        )
        moved = (self.operands(place, row) if takes else []) + (arrays(row.shape) if gives else [])
        least = sum(sum(array_bytes(part)) for part in moved if "S(" not in part)
        if nbytes < 0.9 * least:
            holes = (*holes, "fewer bytes in its schedule than it must move")
        nbytes = max(nbytes, least)
        waits = times * LATENCY if nbytes else 0.0
        return Operation(row.name, row.opcode, times, times * cycles, times * nbytes, waits, holes)

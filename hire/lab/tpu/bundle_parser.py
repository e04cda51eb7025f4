"""Parser of the TPU compiler's output: scheduled bundles and moved bytes of each operation.

The compiler's own totals miss operations that it does not know and prefetches that it does not
count, so this module uses none of them. The compute time of an operation is its number of VLIW
bundles, at one bundle a cycle, times the trip counts of the enclosing loops. Its memory time comes
from its transfers between HBM and VMEM.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

# v5e chip: HBM bandwidth (bytes/s), clock (cycles/s), HBM size (bytes), and the bandwidth of one of
# its four links (bytes/s).
BANDWIDTH, CLOCK, HBM, LINK = (819e9, 1.5e9, 16e9, 50e9)
LATENCY = 0.75e-6  # seconds from the request of a transfer to its arrival (assumed)
HOP = 1e-6  # seconds from one chip to the next (assumed)
GRANULE = 32  # bytes; the schedule counts transfers in granules


@dataclass(frozen=True)
class Operation:
    """One operation of a compiled program, with all of its executions summed.

    Attributes:
        name: Name of the HLO instruction.
        kind: HLO opcode, or "prefetch", "collective" or "control".
        times: Number of executions.
        cycles: Scheduled bundles, at one bundle a cycle.
        nbytes: Bytes moved to and from HBM, or between chips for a collective.
        wait_seconds: Seconds of waiting.
        holes: Parts of the schedule that the reader could not parse.
        links: For a collective, the number of the chip's links that carry its bytes; otherwise 0.
    """

    name: str
    kind: str
    times: int = 1
    cycles: float = 0.0
    nbytes: float = 0.0
    wait_seconds: float = 0.0
    unparsed: tuple[str, ...] = ()
    links: int = 0

    @property
    def transfer_seconds(self) -> float:
        """Seconds that the bytes take at full bandwidth."""
        return self.nbytes / (self.links * LINK or BANDWIDTH)

    @property
    def seconds(self) -> float:
        """Time of the operation, in seconds.

        This is the larger of compute time and transfer time, plus the wait. A prefetch overlaps
        with other operations, so only its wait counts.
        """
        return (
            self.wait_seconds
            if self.kind == "prefetch"
            else max(self.cycles / CLOCK, self.transfer_seconds) + self.wait_seconds
        )


ROW = re.compile(r"^\s*(?:0x[0-9a-f]+|\d+)\s*(?:LH|LB|LE|PB|PF|CT)?\s*:(?:\s*>)*\s*\{(.*)")


# libtpu before about 0.0.40 writes the second form, with bundleno.
JUMP = r"sbr\.rel (?:\(!?(%p\w+)\) )?target (?:= \$region(\d+)|bundleno = (\d+))"
Schedule = tuple[float, float, tuple[str, ...]]


def schedule(text: str) -> Schedule:
    """Parse the scheduled bundles of one operation.

    Args:
        text: One dump of the compiler's final bundles.

    Returns:
        A tuple (cycles, bytes moved to and from HBM, descriptions of what could not be parsed).
    """
    rows = []
    for line in text.splitlines():
        match = ROW.match(line)
        if match:
            rows.append(match[1])
        elif rows:
            rows[-1] += line
    region_starts = {
        region: i
        for i, row in enumerate(rows)
        for region in re.findall(r"Start(?:/End empty)? region (\d+)", row)
    }
    limits = dict(
        re.findall(
            r"(%p\w+) = scmp\.ge\.s32\.totalorder (?:\(.*?\), )?%\w+, ([%\w]+)", "\n".join(rows)
        )
    )
    trips, unparsed = [1.0] * len(rows), []
    for end, row in enumerate(rows):
        for predicate, region, number in re.findall(JUMP, row):
            begin = int(number) if number else region_starts.get(region, end + 1)
            if begin <= end:  # a backward jump closes a loop
                limit = limits.get(predicate, "unknown")
                if not limit.isdigit():
                    unparsed.append(f"a loop of {end - begin} bundles counted once")
                # The loop includes the bundles that the chip issues while it jumps.
                for i in range(begin, min(end + 5, len(rows))):
                    trips[i] *= int(limit) if limit.isdigit() else 1
    moved_bytes = 0.0
    for times, row in zip(trips, rows, strict=True):
        for kind, granules in re.findall(
            r"(?:^|;;)\s+%\d+ = dma\.(\w+) .*?/\*size_in_granules=\*/([%\w]+)", row
        ):
            if not granules.isdigit():
                unparsed.append(f"a transfer {kind} of unknown size")
            elif "hbm" in kind:
                moved_bytes += times * int(granules) * GRANULE
    return sum(trips), moved_bytes, tuple(unparsed)


FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "partition-id",
    "after-all",
}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


# Operations that may move only a part of an array.
PARTIAL = {"gather", "scatter", "slice", "dynamic-slice", "dynamic-update-slice", "custom-call"}


def arrays(shape: str) -> list[str]:
    """Split an HLO shape into its arrays, each with its layout."""
    return re.findall(r"\w+\[[^\]]*\](?:\{[^}]*\})?", shape)


def array_bytes(shape: str) -> list[float]:
    """Return the bytes of each array in an HLO shape, without scalars and without tile padding."""
    matches = re.findall(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]+)\]", shape)
    return [
        int(bits or 8) / 8 * math.prod(map(int, sizes.split(","))) for _, bits, sizes in matches
    ]


class Instruction(NamedTuple):
    """One line of a compiled program; `rest` is the text after the opcode and its "("."""

    name: str
    shape: str
    opcode: str
    rest: str


def computations(hlo: str) -> dict[str, list[Instruction]]:
    """Return the instructions of each computation of a compiled program; the entry is "ENTRY"."""
    bodies, current = {}, None
    for line in hlo.splitlines():
        header = re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line)
        if header:
            current = bodies.setdefault("ENTRY" if header[1] else header[2], [])
        instruction = re.match(r"\s+(?:ROOT )?%([\w.-]+) = (.*?) ([a-z][a-z0-9-]*)\((.*)", line)
        if instruction and current is not None:
            current.append(Instruction(*instruction.groups()))
    return bodies


def bytes_sent(hlo: str) -> float:
    """Return the bytes that the collectives of a compiled program deliver to each device."""
    rows = [row for rows in computations(hlo).values() for row in rows]
    return sum(
        (collected(row) for row in rows if row.opcode.removesuffix("-start") in COLLECTIVES), 0.0
    )


def collected(row: Instruction) -> float:
    """Return the bytes of a collective's result.

    The shape of a "-start" instruction lists the operands as well, so the largest array counts
    there.
    """
    sizes = array_bytes(row.shape)
    return (
        sum(sizes)
        if row.opcode in COLLECTIVES or row.opcode.startswith("all-reduce")
        else max(sizes)
    )


def sides(topology: str) -> list[int]:
    """Return the number of chips along each side of a slice such as "v5e:4x4"."""
    return [int(side) for side in topology.partition(":")[2].split("x")]


def network(sides: Sequence[int]) -> tuple[int, int]:
    """Describe how data reaches a chip in the corner of a slice.

    A side of 16 chips closes to a ring.

    Args:
        sides: Number of chips along each side.

    Returns:
        A tuple (links into the corner chip, hops to the farthest chip).
    """
    rings = [side == 16 for side in sides]
    links = sum((1 + ring) * (side > 1) for side, ring in zip(sides, rings, strict=True))
    return max(1, links), sum(
        side // 2 if ring else side - 1 for side, ring in zip(sides, rings, strict=True)
    )


def operations(
    hlo: str, schedules: dict[str, Schedule], sides: Sequence[int] = (2, 2)
) -> list[Operation]:
    """List the operations of a compiled program in order, with schedules and execution counts.

    A prefetch overlaps with compute. Its time is the part of the transfer that is still missing
    when the program waits for it. Scalar operations run in the control program. Its bundles come
    first in the list.

    Args:
        hlo: Text of the compiled program.
        schedules: Result of `schedule` by operation name.
        sides: Number of chips along each side of the slice.

    Returns:
        The operations. An instruction without cost, such as a bitcast, gives none.
    """
    control = (
        [Operation("control", "control", 1, schedules["TLP"][0])] if "TLP" in schedules else []
    )
    return control + Reader(computations(hlo), schedules, sides).inside("ENTRY", 1)


class Reader:
    """The computations of a program, joined with their schedules.

    The compiler dumps one schedule for all operations that are alike.
    """

    def __init__(
        self,
        parts: dict[str, list[Instruction]],
        schedules: dict[str, Schedule],
        sides: Sequence[int],
    ):
        self.parts, self.schedules, self.sides = parts, schedules, sides
        self.shapes = {name: {row.name: row.shape for row in rows} for name, rows in parts.items()}
        rows = [
            (name, row) for name, rows in parts.items() for row in rows if row.name in schedules
        ]
        self.twins = {self.likeness(name, row): schedules[row.name] for name, row in rows}

    def operands(self, place: str, row: Instruction) -> list[str]:
        """Return the shapes of the operands of an instruction in the computation `place`."""
        return [
            self.shapes[place].get(name, "")
            for name in re.findall(r"%([\w.-]+)", row.rest.partition("), ")[0])
        ]

    def body(self, row: Instruction) -> list[tuple[str, str]]:
        """Return the shape and opcode of each instruction in the called computation."""
        called = re.search(r"calls=%([\w.-]+)", row.rest)
        return [
            (part.shape, part.opcode) for part in self.parts.get(called[1] if called else "", [])
        ]

    def likeness(self, place: str, row: Instruction) -> tuple:
        """Return a key that is equal for operations that share one schedule."""
        return row.opcode, row.shape, *self.operands(place, row), *self.body(row)

    def inside(self, place: str, times: int) -> list[Operation]:
        """List the operations of the computation `place`, which runs `times` times."""
        ops, pending = [], {}
        for row in self.parts.get(place, []):
            row_ops = []
            if row.opcode in ("copy-start", "slice-start"):  # moves an array or a slice of it
                pending[row.name] = Operation(
                    row.name, "prefetch", times, nbytes=times * min(array_bytes(row.shape))
                )
            elif row.opcode in ("copy-done", "slice-done"):
                started = pending.pop(re.findall(r"%([\w.-]+)", row.rest)[0])
                row_ops = [
                    replace(
                        started,
                        wait_seconds=max(0.0, started.transfer_seconds - started.wait_seconds),
                    )
                ]
            else:
                row_ops = self.of(place, row, times)
            idle_seconds = sum(
                op.seconds - op.transfer_seconds for op in row_ops if op.kind != "prefetch"
            )
            # The oldest pending prefetch gets the spare memory bandwidth first.
            for prefetch, started in pending.items():
                overlap = min(
                    idle_seconds, max(0.0, started.transfer_seconds - started.wait_seconds)
                )
                pending[prefetch], idle_seconds = (
                    replace(started, wait_seconds=started.wait_seconds + overlap),
                    idle_seconds - overlap,
                )
            ops += row_ops
        return ops

    def of(self, place: str, row: Instruction, times: int) -> list[Operation]:
        """Return the operations that one instruction stands for, if it is not a prefetch."""
        if row.opcode == "while":
            trips = re.search(r'known_trip_count":\{"n":"(\d+)"', row.rest)
            unknown_trips = Operation(
                row.name, row.opcode, times, unparsed=("a loop of unknown trips, counted once",)
            )
            parts = re.findall(r"(?:body|condition)=%([\w.-]+)", row.rest)
            body_ops = [self.inside(part, times * int(trips[1] if trips else 1)) for part in parts]
            return sum(body_ops, [] if trips else [unknown_trips])
        if row.opcode in ("call", "conditional"):
            branches = [
                self.inside(part, times)
                for part in re.findall(r"%([\w.-]+)", row.rest)
                if part in self.parts
            ]
            return max(branches, key=lambda branch: sum(op.seconds for op in branch), default=[])
        if row.opcode.removesuffix("-start") in COLLECTIVES:
            return [self.collective(row, times)]
        row_schedule = self.schedules.get(row.name) or self.twins.get(self.likeness(place, row))
        if row_schedule:
            return [self.scheduled(place, row, times, *row_schedule)]
        scalar = not array_bytes(re.sub(r"\w+\[\]", "", row.shape))
        if (
            scalar
            or row.opcode in FREE
            or row.opcode.endswith("-done")
            or "ConcatBitcast" in row.rest
        ):
            return []
        return [Operation(row.name, row.opcode, times, unparsed=("no schedule of it",))]

    def collective(self, row: Instruction, times: int) -> Operation:
        """Return the bytes that a corner chip receives in a collective, and their hops.

        An all-reduce counts twice: its data travels there and back.
        """
        (links, hops), chips = network(self.sides), math.prod(self.sides)
        passes = 2 if row.opcode.startswith("all-reduce") else 1
        received_bytes = passes * collected(row) * (chips - 1) / chips
        return Operation(
            row.name,
            "collective",
            times,
            nbytes=times * received_bytes,
            wait_seconds=times * passes * hops * HOP,
            links=links,
        )

    def scheduled(
        self,
        place: str,
        row: Instruction,
        times: int,
        cycles: float,
        nbytes: float,
        unparsed: tuple[str, ...],
    ) -> Operation:
        """Return an operation with the cycles and bytes of its schedule.

        Where the schedule does not show the bytes, the arrays in HBM that the operation must move
        give a lower bound.
        """
        moves_all = row.opcode == "fusion" and not PARTIAL & {
            opcode for _, opcode in self.body(row)
        }
        reads_hbm, writes_hbm = (
            moves_all
            or any(re.search(f"({direction}|general) of unknown", part) for part in unparsed)
            for direction in ("hbm_to_vmem", "vmem_to_hbm")
        )
        moved_shapes = (self.operands(place, row) if reads_hbm else []) + (
            arrays(row.shape) if writes_hbm else []
        )
        least_bytes = sum(sum(array_bytes(shape)) for shape in moved_shapes if "S(" not in shape)
        if nbytes < 0.9 * least_bytes:
            unparsed = (*unparsed, "fewer bytes in its schedule than it must move")
        nbytes = max(nbytes, least_bytes)
        wait_seconds = times * LATENCY if nbytes else 0.0
        return Operation(
            row.name, row.opcode, times, times * cycles, times * nbytes, wait_seconds, unparsed
        )

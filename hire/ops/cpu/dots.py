"""Dot products of stored rows with queries, as vector instructions.

numba would leave the choice of instructions to LLVM, which reads codes of 8 bits at half and codes
of 4 bits at a tenth of what these do. The instructions are LLVM's portable vector operations, 32
bytes at a time, except for the sum of products of neighbouring 16-bit integers on x86.

A storage is how rows lie in memory and what they meet:

    float32, bfloat16    float32 queries
    int8, int4           codes, float32 queries: as exact as `hire.ops.row_products`
    int8_by_16_int16 …   codes, 16 or 32 queries' entries of 16 bits from `round_queries` at a time:
    int4_by_32_int16     integer sums, which are exact
"""

from collections.abc import Callable, Sequence

import llvmlite.binding
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from hire.ops.cpu.numba_functions import function

INT8, INT16, INT32, INT64, FLOAT = *map(ir.IntType, (8, 16, 32, 64)), ir.FloatType()
# Floats are added in any order. NaN and infinity keep their meaning.
ANY_ORDER = ("reassoc", "contract", "nsz")
FEATURES = {name for name, has in llvmlite.binding.get_host_cpu_features().items() if has}
HAS_AVX2, HAS_AVX512 = "avx2" in FEATURES, "avx512f" in FEATURES
HAS_VNNI = {"avx512vl", "avx512vnni"} <= FEATURES
# Entries of a vector of floats.
LANES = 16 if HAS_AVX512 else 8
# Entries of a vector of 16-bit integers: a row's width decides which one is used.
LANES_16 = (16, 32) if HAS_VNNI else (16,)
# Bytes of a cache line.
LINE = 64
# Bytes between a row that is read and the one that is fetched meanwhile, at least.
AHEAD = 4096

STORAGES = ("float32", "bfloat16", "int8", "int4") + tuple(
    f"int{bits}_by_{lanes}_int16" for bits in (8, 4) for lanes in LANES_16
)
# Bytes of an entry of a row; of a pair of entries for codes of 4 bits.
ITEM_BYTES = dict.fromkeys(STORAGES, 1) | {"float32": 4, "bfloat16": 2}


def is_integer(storage: str) -> bool:
    """Whether a storage sums integers."""
    return storage.endswith("int16")


def integer_lanes(storage: str) -> int:
    """Return the entries of a vector of 16-bit integers that meets a storage."""
    return int(storage.split("_")[2])


def splat(type: ir.VectorType, value: int | float) -> ir.Constant:
    """Return a vector with the same number in all lanes."""
    return ir.Constant(type, [value] * type.count)


def in_all_lanes(builder: ir.IRBuilder, value: ir.Value, lanes: int) -> ir.Value:
    """Return a vector with a value in all lanes."""
    empty = ir.Constant(vector(value.type, lanes), ir.Undefined)
    first = builder.insert_element(empty, value, INT32(0))
    return builder.shuffle_vector(first, empty, splat(vector(INT32, lanes), 0))


def vector(element: ir.Type, lanes: int) -> ir.VectorType:
    """Return the type of a vector."""
    return ir.VectorType(element, lanes)


def load(
    builder: ir.IRBuilder, address: ir.Value, type: ir.Type, mask: ir.Value | None = None
) -> ir.Value:
    """Load a vector or a number from any address. Lanes outside the mask are 0 and not read."""
    pointer = builder.inttoptr(address, type.as_pointer())
    if mask is None:
        return builder.load(pointer, align=1)
    name = f"llvm.masked.load.v{type.count}{type.element.intrinsic_name}.p0"
    signature = ir.FunctionType(type, [pointer.type, INT32, mask.type, type])
    function = cgutils.get_or_insert_function(builder.module, signature, name)
    return builder.call(function, [pointer, INT32(1), mask, splat(type, 0)])


def for_vectors(builder: ir.IRBuilder, count: ir.Value, body: Callable) -> None:
    """Build `body(item, lanes)` for the items of each vector, then for those that are left."""
    complete = builder.and_(count, INT64(-LANES))
    vectors, rest = (INT64(0), complete, INT64(LANES)), (complete, count, INT64(1))
    for lanes, steps in ((LANES, vectors), (1, rest)):
        with cgutils.for_range_slice(builder, *steps, inc=True) as (item, _):
            body(item, lanes)


def first_lanes(builder: ir.IRBuilder, count: ir.Value, lanes: int) -> ir.Value:
    """Return the mask of the first `count` lanes of a vector."""
    numbers = ir.Constant(vector(INT64, lanes), list(range(lanes)))
    return builder.icmp_signed("<", numbers, in_all_lanes(builder, count, lanes))


def to_floats(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """Convert a vector of integers to floats."""
    return builder.sitofp(value, vector(FLOAT, value.type.count))


def load_row(
    builder: ir.IRBuilder,
    storage: str,
    address: ir.Value,
    mask: ir.Value | None = None,
    lanes: int = LANES,
) -> list[ir.Value]:
    """Load the next entries of a row, as the vectors that meet the vectors of a query.

    Only those that meet floats may be masked, see `load`. Codes of 4 bits give two vectors of
    floats (the first and the second half of the row), or four of integers in the order of
    `round_queries`.
    """
    if storage == "float32":
        return [load(builder, address, vector(FLOAT, lanes), mask)]
    if storage == "bfloat16":
        wide = vector(INT32, lanes)
        bits = builder.zext(load(builder, address, vector(INT16, lanes), mask), wide)
        return [builder.bitcast(builder.shl(bits, splat(wide, 16)), vector(FLOAT, lanes))]
    if is_integer(storage) and storage.startswith("int8"):
        codes = load(builder, address, vector(INT8, integer_lanes(storage)))
        return [builder.sext(codes, vector(INT16, integer_lanes(storage)))]
    if is_integer(storage):
        codes = load(builder, address, vector(INT16, integer_lanes(storage)))
        ups = (splat(codes.type, 16 - 4 * digit - 4) for digit in range(4))
        down = splat(codes.type, 12)
        return [builder.ashr(builder.shl(codes, up), down) for up in ups]
    wide = vector(INT32, lanes)
    codes = builder.sext(load(builder, address, vector(INT8, lanes), mask), wide)
    if storage == "int8":
        return [to_floats(builder, codes)]
    low = builder.ashr(builder.shl(codes, splat(wide, 28)), splat(wide, 28))
    return [to_floats(builder, low), to_floats(builder, builder.ashr(codes, splat(wide, 4)))]


def multiply_add(builder: ir.IRBuilder, row: ir.Value, query: ir.Value, total: ir.Value):
    """Add products to a total; products of neighbouring 16-bit integers go to the same lane."""
    if total.type.element == FLOAT:
        name = f"llvm.fma.v{total.type.count}f32"
        fma = ir.FunctionType(total.type, [total.type] * 3)
        function = cgutils.get_or_insert_function(builder.module, fma, name)
        return builder.call(function, [row, query, total])
    if HAS_VNNI:
        sums = ir.FunctionType(total.type, [total.type] * 3)
        name = f"llvm.x86.avx512.vpdpwssd.{32 * total.type.count}"
        function = cgutils.get_or_insert_function(builder.module, sums, name)
        pairs = [builder.bitcast(part, total.type) for part in (row, query)]
        return builder.call(function, [total, *pairs])
    if HAS_AVX2:
        pairs = ir.FunctionType(total.type, [row.type, query.type])
        name = "llvm.x86.avx2.pmadd.wd"
        function = cgutils.get_or_insert_function(builder.module, pairs, name)
        return builder.add(total, builder.call(function, [row, query]))
    wide = vector(INT32, row.type.count)
    products = builder.mul(builder.sext(row, wide), builder.sext(query, wide))
    return builder.add(total, sum_of_pairs(builder, products, products, total.type.count))


def add(builder: ir.IRBuilder, one: ir.Value, other: ir.Value) -> ir.Value:
    """Add two vectors or numbers."""
    element = getattr(one.type, "element", one.type)
    return builder.fadd(one, other, ANY_ORDER) if element == FLOAT else builder.add(one, other)


def sum_of_pairs(builder: ir.IRBuilder, one: ir.Value, other: ir.Value, lanes: int) -> ir.Value:
    """Add neighbouring lanes of two vectors in a row; take the first `lanes` sums."""
    even, odd = (
        ir.Constant(vector(INT32, lanes), list(range(first, 2 * lanes, 2))) for first in (0, 1)
    )
    return add(
        builder, builder.shuffle_vector(one, other, even), builder.shuffle_vector(one, other, odd)
    )


def sums_of_lanes(builder: ir.IRBuilder, totals: list[ir.Value]) -> list[ir.Value]:
    """Return the sums of the lanes of some vectors, in order, as vectors of up to as many lanes.

    Several vectors share the additions.
    """
    lanes = totals[0].type.count
    count = max(size for size in (1, 2, 4, 8, 16) if size <= min(len(totals), lanes))
    part, others = totals[:count], totals[count:]
    while len(part) > 1:
        pairs = zip(part[::2], part[1::2], strict=True)
        part = [sum_of_pairs(builder, one, other, lanes) for one, other in pairs]
    [sums] = part
    while lanes > count:
        lanes //= 2
        sums = sum_of_pairs(builder, sums, sums, lanes)
    return [sums] + (sums_of_lanes(builder, others) if others else [])


def prefetch_line(builder: ir.IRBuilder, address: ir.Value) -> None:
    """Ask for the cache line at an address, to read it and keep it."""
    pointer_type = INT8.as_pointer()
    signature = ir.FunctionType(ir.VoidType(), [pointer_type, INT32, INT32, INT32])
    prefetch = cgutils.get_or_insert_function(builder.module, signature, "llvm.prefetch.p0")
    pointer = builder.inttoptr(address, pointer_type)
    builder.call(prefetch, [pointer, INT32(0), INT32(2), INT32(1)])


class Tile:
    """The products of a few rows with a few queries: each vector loaded is used several times.

    Args:
        builder: Builder of the function.
        storage: Storage of the rows.
        rows: Addresses of the rows.
        later: Addresses of rows that are read soon, which are fetched into the cache meanwhile.
        share: Bytes of a later row that are fetched, in 65536ths of those that are read.
        queries: Addresses of the queries.
        items: Entries of a row; bytes of a row for codes of 4 bits.
    """

    def __init__(
        self,
        builder: ir.IRBuilder,
        storage: str,
        rows: Sequence[ir.Value],
        later: Sequence[ir.Value],
        share: ir.Value,
        queries: Sequence[ir.Value],
        items: ir.Value,
    ):
        self.builder, self.storage, self.share = builder, storage, share
        self.rows, self.later, self.queries, self.items = rows, later, queries, items
        total = vector(FLOAT, LANES)
        if is_integer(storage):  # two neighbouring products go to one lane
            total = vector(INT32, integer_lanes(storage) // 2)
        self.totals = [
            cgutils.alloca_once_value(builder, splat(total, 0))
            for _ in range(len(rows) * len(queries))
        ]

    def step(
        self, item: ir.Value, query_offsets: Sequence[ir.Value], mask: ir.Value | None = None
    ) -> None:
        """Add the products of the entries from `item` on.

        Args:
            item: First entry of the row.
            query_offsets: Bytes from a query's address to each vector that the row's ones meet.
            mask: Lanes that take part; all without it.
        """
        builder = self.builder
        at = builder.mul(item, INT64(ITEM_BYTES[self.storage]))
        rows = [load_row(builder, self.storage, builder.add(row, at), mask) for row in self.rows]
        element = vector(FLOAT, LANES)
        if is_integer(self.storage):
            element = vector(INT16, integer_lanes(self.storage))
        totals = iter(self.totals)
        for query in self.queries:
            parts = [load(builder, builder.add(query, at), element, mask) for at in query_offsets]
            for row in rows:
                total = next(totals)
                value = builder.load(total)
                for row_part, query_part in zip(row, parts, strict=True):
                    value = multiply_add(builder, row_part, query_part, value)
                builder.store(value, total)

    def fetch(self, item: ir.Value) -> None:
        """Ask for the cache line of a later row that is as far from its start as an item.

        With a share of less than 1 it is as much less far.
        """
        builder = self.builder
        at = builder.mul(item, INT64(ITEM_BYTES[self.storage]))
        at = builder.lshr(builder.mul(at, self.share), INT64(16))
        for row in self.later:
            prefetch_line(builder, builder.add(row, at))

    def steps(self, step_items: int, offsets: Callable) -> ir.Value:
        """Add the products of all complete steps, a cache line of each row at a time.

        Args:
            step_items: Entries of a row that a step reads.
            offsets: Function from an item to the `query_offsets` of its step.

        Returns:
            The number of items that the steps have covered.
        """
        builder = self.builder
        line_items = max(LINE // ITEM_BYTES[self.storage], step_items)
        lines, complete = (
            builder.and_(self.items, INT64(-count)) for count in (line_items, step_items)
        )
        slices = (INT64(0), lines, INT64(line_items)), (lines, complete, INT64(step_items))
        with cgutils.for_range_slice(builder, *slices[0], inc=True) as (first, _):
            self.fetch(first)
            for step in range(0, line_items, step_items):
                item = builder.add(first, INT64(step))
                self.step(item, offsets(item))
        with builder.if_then(builder.icmp_signed("!=", lines, self.items)):
            self.fetch(lines)
        with cgutils.for_range_slice(builder, *slices[1], inc=True) as (item, _):
            self.step(item, offsets(item))
        return complete

    def add_integers(self) -> None:
        """Add the products with queries of `round_queries`.

        The last step ends with the row. It meets a part of the query that is 0 where the step
        before has been.
        """
        builder = self.builder
        planes = 4 if self.storage.startswith("int4") else 1
        lanes = integer_lanes(self.storage)
        step_items = 2 * lanes if planes == 4 else lanes

        def offsets(item: ir.Value) -> list[ir.Value]:
            first = builder.mul(item, INT64(2 * planes * lanes // step_items))
            return [builder.add(first, INT64(2 * lanes * plane)) for plane in range(planes)]

        complete = self.steps(step_items, offsets)
        with builder.if_then(builder.icmp_signed("!=", complete, self.items)):
            self.step(builder.sub(self.items, INT64(step_items)), offsets(complete))

    def add_floats(self) -> None:
        """Add the products with float queries."""
        builder = self.builder
        planes = 2 if self.storage == "int4" else 1

        def offsets(item: ir.Value) -> list[ir.Value]:
            second = builder.add(item, self.items)
            return [builder.mul(first, INT64(4)) for first in (item, second)][:planes]

        complete = self.steps(LANES, offsets)
        with builder.if_then(builder.icmp_signed("!=", complete, self.items)):
            mask = first_lanes(builder, builder.sub(self.items, complete), LANES)
            self.step(complete, offsets(complete), mask)

    def products(self) -> list[ir.Value]:
        """Return the products as float32, query by query, in vectors."""
        builder = self.builder
        if is_integer(self.storage):
            self.add_integers()
        else:
            self.add_floats()
        sums = sums_of_lanes(builder, [builder.load(total) for total in self.totals])
        return [to_floats(builder, part) for part in sums] if is_integer(self.storage) else sums


def dot_tile(storage: str, num_rows: int, num_queries: int) -> Callable:
    """Return an intrinsic that writes the products of a few rows with a few queries as float32.

    Its arguments are the addresses of the rows and of rows that are read soon (two tuples), the
    share of the latter that is fetched as in `Tile`, the address of the first query, the bytes from
    one query to the next, the entries of a row (its bytes for codes of 4 bits), the address of the
    first product, and the bytes from one query's products to the next one's. The products of
    consecutive rows lie side by side.
    """

    @intrinsic
    def tile(typing_context, rows, later, share, query, query_stride, items, out, out_stride):
        def generate(context, builder, signature, arguments):
            rows, later, share, query, query_stride, items, out, out_stride = arguments
            queries, outs = (
                [builder.add(first, builder.mul(stride, INT64(i))) for i in range(num_queries)]
                for first, stride in ((query, query_stride), (out, out_stride))
            )
            addresses, later = (cgutils.unpack_tuple(builder, part) for part in (rows, later))
            tile = Tile(builder, storage, addresses, later, share, queries, items)
            remaining = iter(outs)
            for products in tile.products():
                for first in range(0, products.type.count, num_rows):
                    lanes = ir.Constant(
                        vector(INT32, num_rows), list(range(first, first + num_rows))
                    )
                    part = builder.shuffle_vector(products, products, lanes)
                    pointer = builder.inttoptr(next(remaining), part.type.as_pointer())
                    builder.store(part, pointer, align=1)
            return context.get_dummy_value()

        addresses = types.UniTuple(types.int64, num_rows)
        return types.void(addresses, addresses, *[types.int64] * 6), generate

    return tile


# Rows of a tile for one query. Wide rows are read one after the other, as one stream; narrow ones
# share the sums of their lanes.
NARROW_ROWS, MAX_NARROW = 2, 512
# Queries and rows of a tile for several queries. Their sums fill half of the vector registers.
QUERIES, ROWS_FOR_SEVERAL = 4, 4 if HAS_AVX512 else 2
# All of a later row, see `Tile`.
WHOLE = 2**16
# Rows that are gathered at once, and rows from one that is gathered to one that is fetched.
GATHERED_ROWS, GATHERED_AHEAD = 4, 8


def score_rows(storage: str) -> Callable:
    """Return a numba function that writes the products of consecutive rows with all queries.

    Its arguments are the address of the first row, the bytes of a row, the number of rows, the
    entries of a row (its bytes for codes of 4 bits), the address of the first query, the bytes of a
    query, the number of queries, where to write as in `dot_tile`, and the bytes from a row that is
    read to the one that is fetched meanwhile.
    """
    narrow_rows, one_row = dot_tile(storage, NARROW_ROWS, 1), dot_tile(storage, 1, 1)
    rows_by_four = dot_tile(storage, ROWS_FOR_SEVERAL, QUERIES)
    one_by_four = dot_tile(storage, 1, QUERIES)

    @function
    def for_one(first, stride, count, items, query, out, ahead):
        done = 0
        while stride <= MAX_NARROW and done + NARROW_ROWS <= count:
            at = first + done * stride
            rows, later = two_from(at, stride), two_from(at + ahead, stride)
            narrow_rows(rows, later, WHOLE, query, 0, items, out + 4 * done, 0)
            done += NARROW_ROWS
        while done < count:
            at = first + done * stride
            one_row((at,), (at + ahead,), WHOLE, query, 0, items, out + 4 * done, 0)
            done += 1

    @function
    def score(first, stride, count, items, query, query_stride, queries, out, out_stride, ahead):
        several = queries // QUERIES * QUERIES if queries > 1 else 0
        # Each pass over a row fetches its share of a later one, so that memory is never idle.
        passes = max(several // QUERIES, 1)
        share, row = WHOLE // passes, 0
        while several and row < count:
            at = first + row * stride
            complete = row + ROWS_FOR_SEVERAL <= count
            for q in range(0, several, QUERIES):
                place = out + q * out_stride + 4 * row
                x = query + q * query_stride
                next = at + ahead + stride * (q // QUERIES) // passes
                if complete:
                    rows, later = several_from(at, stride), several_from(next, stride)
                    rows_by_four(rows, later, share, x, query_stride, items, place, out_stride)
                else:
                    one_by_four((at,), (next,), share, x, query_stride, items, place, out_stride)
            row += ROWS_FOR_SEVERAL if complete else 1
        for q in range(several, queries):
            x, place = query + q * query_stride, out + q * out_stride
            # Once fetched is enough: later queries ask for the row that they read.
            for_one(first, stride, count, items, x, place, ahead if q == 0 else 0)

    return score


@function
def bytes_ahead(stride):
    """Return the bytes from a row that is read to the one that is fetched, in a long read."""
    return max(AHEAD, 4 * stride)


@function
def two_from(first, stride):
    """Return the addresses of two consecutive rows."""
    return first, first + stride


@function
def four_from(first, stride):
    """Return the addresses of four consecutive rows."""
    return first, first + stride, first + 2 * stride, first + 3 * stride


several_from = {2: two_from, 4: four_from}[ROWS_FOR_SEVERAL]


def score_rows_at(storage: str) -> Callable:
    """Return a numba function that writes the products of rows at given indices with one query.

    Its arguments are the address of the first row, the bytes of a row, the number of all rows, the
    entries of a row, all indices, the range of the places among them that it takes, the address of
    the query, and the address of the product of the first index. An index beyond the rows stands
    for the nearest row; a negative one counts from the end, as in `jnp.take`.
    """
    four_rows, one_row = dot_tile(storage, GATHERED_ROWS, 1), dot_tile(storage, 1, 1)

    @function
    def address(first, stride, num_rows, indices, place):
        index = indices[min(place, len(indices) - 1)]
        wrapped = index + num_rows if index < 0 else index
        return first + min(max(wrapped, 0), num_rows - 1) * stride

    @function
    def four_addresses(first, stride, num_rows, indices, place):
        return (
            address(first, stride, num_rows, indices, place),
            address(first, stride, num_rows, indices, place + 1),
            address(first, stride, num_rows, indices, place + 2),
            address(first, stride, num_rows, indices, place + 3),
        )

    @function
    def score(first, stride, num_rows, items, indices, start, stop, query, out):
        place = start
        while place + GATHERED_ROWS <= stop:
            rows = four_addresses(first, stride, num_rows, indices, place)
            later = four_addresses(first, stride, num_rows, indices, place + GATHERED_AHEAD)
            four_rows(rows, later, WHOLE, query, 0, items, out + 4 * place, 0)
            place += GATHERED_ROWS
        while place < stop:
            row = address(first, stride, num_rows, indices, place)
            one_row((row,), (row,), WHOLE, query, 0, items, out + 4 * place, 0)
            place += 1

    return score


@intrinsic
def add_floats(typing_context, source, target, count):
    """Add floats to others."""

    def generate(context, builder, signature, arguments):
        source, target, count = arguments

        def add_vector(item: ir.Value, lanes: int) -> None:
            at = builder.mul(item, INT64(4))
            parts = [
                load(builder, builder.add(address, at), vector(FLOAT, lanes))
                for address in (source, target)
            ]
            pointer = builder.inttoptr(builder.add(target, at), parts[0].type.as_pointer())
            builder.store(builder.fadd(*parts), pointer, align=4)

        for_vectors(builder, count, add_vector)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), generate


def sum_tile(storage: str, num_rows: int) -> Callable:
    """Return an intrinsic that adds a few weighted rows to a sum.

    Its arguments are the address of the first row, the bytes of a row, the number of columns to add
    (bytes for codes of 4 bits), the address of the weights, the address of the sum, the bytes from
    the sum of the first half of a row to that of the second, for codes of 4 bits, and the bytes
    from a row that is read to the one that is fetched meanwhile.
    """

    @intrinsic
    def tile(typing_context, first, stride, items, weights, out, second_half, ahead):
        def generate(context, builder, signature, arguments):
            first, stride, items, weights, out, second_half, ahead = arguments
            rows = [builder.add(first, builder.mul(stride, INT64(r))) for r in range(num_rows)]
            factors = [
                load(builder, builder.add(weights, INT64(4 * r)), FLOAT) for r in range(num_rows)
            ]

            def add_columns(item: ir.Value, lanes: int) -> None:
                at = builder.mul(item, INT64(ITEM_BYTES[storage]))
                parts = [
                    load_row(builder, storage, builder.add(row, at), lanes=lanes) for row in rows
                ]
                place = builder.add(out, builder.mul(item, INT64(4)))
                for half, address in enumerate((place, builder.add(place, second_half))):
                    if half == len(parts[0]):
                        break
                    pointer = builder.inttoptr(address, vector(FLOAT, lanes).as_pointer())
                    value = builder.load(pointer, align=4)
                    for part, factor in zip(parts, factors, strict=True):
                        factor_lanes = in_all_lanes(builder, factor, lanes)
                        value = multiply_add(builder, part[half], factor_lanes, value)
                    builder.store(value, pointer, align=4)

            for_vectors(builder, items, add_columns)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7), generate

    return tile


# Rows that are added at a time: one load and store of the sum for all of them.
ROWS_OF_SUM = 8


def add_rows(storage: str) -> Callable:
    """Return a numba function that adds consecutive weighted rows to a sum.

    Its arguments are those of `sum_tile`, with the number of rows before the number of columns.
    """
    eight_rows, one_row = sum_tile(storage, ROWS_OF_SUM), sum_tile(storage, 1)

    @function
    def add(first, stride, count, items, weights, out, second_half, ahead):
        done = 0
        while done + ROWS_OF_SUM <= count:
            at = first + done * stride
            eight_rows(at, stride, items, weights + 4 * done, out, second_half, ahead)
            done += ROWS_OF_SUM
        while done < count:
            at = first + done * stride
            one_row(at, stride, items, weights + 4 * done, out, second_half, ahead)
            done += 1

    return add

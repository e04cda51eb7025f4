"""Bridge from XLA's typed FFI to numba kernels, with threads from XLA's own pool.

XLA passes a handler one pointer: its call frame, C structs of 8-byte words, which
`jax.ffi.include_dir()` documents in xla/ffi/api/c_api.h. A numba function reads it, so the user
needs no compiler and the handler needs no Python while it runs.

    frame:   0 size  1 extension  2 api  3 context  4 stage
             5..9 arguments: size, extension, count, types, pointers
             10..14 results, likewise
    buffer:  0 size  1 extension  2 dtype  3 data  4 rank  5 dimensions
    api:     6 Error_Create  17 ThreadPool_Schedule  18 ThreadPool_NumThreads

At registration XLA asks for metadata: an extension of type 1, whose word 3 points at {size, {size,
extension, int32 major, int32 minor}, int32 traits, ...}. The answer is version 0.1, the oldest one
that the supported versions of jax know.
"""

import ctypes
from collections.abc import Callable, Sequence
from functools import cached_property
from threading import Lock
from typing import Any

import jax
from llvmlite import ir
from numba import carray, types
from numba.core import cgutils, typing
from numba.extending import intrinsic

from hire.ops.cpu.numba_functions import function, inlined
from hire.ops.cpu.programs import Program, load_program

WORD = ir.IntType(64)
INVALID_ARGUMENT, RESOURCE_EXHAUSTED = 3, 8
# XLA's names of types, and how a kernel sees them. numba has no bfloat16: a kernel gets its bits.
DTYPES = {
    "int8": (2, types.int8),
    "int16": (3, types.int16),
    "int32": (4, types.int32),
    "uint8": (6, types.uint8),
    "float32": (11, types.float32),
    "bfloat16": (16, types.uint16),
}
# Two threads may ask for the same program, which is registered only once.
ONE_AT_A_TIME = Lock()
# Chunks of work per thread. More than one, so that a thread that is late does less.
CHUNKS_PER_THREAD = 4


def pointer_to(dtype: types.Type) -> Callable:
    """Return an intrinsic that converts an address to a pointer to `dtype`."""

    @intrinsic
    def cast(typing_context, address):
        def generate(context, builder, signature, arguments):
            return builder.inttoptr(arguments[0], context.get_value_type(types.CPointer(dtype)))

        return types.CPointer(dtype)(types.int64), generate

    return cast


def word_pointer(builder: ir.IRBuilder, address: ir.Value, index: ir.Value) -> ir.Value:
    """Return a pointer to the word `index` after an address."""
    return builder.gep(builder.inttoptr(address, WORD.as_pointer()), [index])


@intrinsic
def word(typing_context, address, index):
    """Return the word at an index after an address."""

    def generate(context, builder, signature, arguments):
        return builder.load(word_pointer(builder, *arguments))

    return types.int64(types.int64, types.int64), generate


@intrinsic
def set_word(typing_context, address, index, value):
    """Set the word at an index after an address."""

    def generate(context, builder, signature, arguments):
        builder.store(arguments[2], word_pointer(builder, *arguments[:2]))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@intrinsic
def add_to_word(typing_context, address, index, value):
    """Add to a word that threads share and return what it was before."""

    def generate(context, builder, signature, arguments):
        pointer = word_pointer(builder, *arguments[:2])
        return builder.atomic_rmw("add", pointer, arguments[2], "seq_cst")

    return types.int64(types.int64, types.int64, types.int64), generate


def call_c(builder: ir.IRBuilder, name: str, result: ir.Type, *arguments: ir.Value) -> ir.Value:
    """Call a function of the C library."""
    function_type = ir.FunctionType(result, [argument.type for argument in arguments])
    function = cgutils.get_or_insert_function(builder.module, function_type, name)
    return builder.call(function, arguments)


@intrinsic
def allocate(typing_context, count):
    """Allocate words and return their address, or 0 if there is no memory."""

    def generate(context, builder, signature, arguments):
        return call_c(builder, "calloc", WORD, arguments[0], WORD(8))

    return types.int64(types.int64), generate


@intrinsic
def release(typing_context, address):
    """Free what `allocate` returned."""

    def generate(context, builder, signature, arguments):
        call_c(builder, "free", ir.VoidType(), arguments[0])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic
def let_others_run(typing_context):
    """Offer the processor to another thread."""

    def generate(context, builder, signature, arguments):
        return call_c(builder, "sched_yield", ir.IntType(32))

    return types.int32(), generate


@intrinsic
def call_address(typing_context, address, argument):
    """Call a C function of one pointer."""

    def generate(context, builder, signature, arguments):
        function_type = ir.FunctionType(WORD, [WORD])
        function = builder.inttoptr(arguments[0], function_type.as_pointer())
        return builder.call(function, [arguments[1]])

    return types.int64(types.int64, types.int64), generate


@intrinsic
def address_of_text(typing_context, text):
    """Return the address of a literal text."""

    def generate(context, builder, signature, arguments):
        constant = context.insert_const_string(builder.module, text.literal_value)
        return builder.ptrtoint(constant, WORD)

    if isinstance(text, types.StringLiteral):
        return types.int64(text), generate
    return None


def address_of_task(task: Callable) -> Callable:
    """Return an intrinsic for the address of a C function that runs `task(address)`.

    The function is part of the program that uses it, so both are kept on disk together.
    """
    signature = typing.signature(types.none, types.int64)

    @intrinsic
    def address(typing_context):
        def generate(context, builder, _, arguments):
            task.compile((types.int64,))
            compiled = task.overloads[(types.int64,)]
            context.active_code_library.add_linking_library(compiled.library)
            name = f"{compiled.fndesc.mangled_name}_task"
            function_type = ir.FunctionType(ir.VoidType(), [WORD])
            function = builder.module.globals.get(name)
            if function is None:
                function = ir.Function(builder.module, function_type, name)
                function.linkage = "internal"
                inner = ir.IRBuilder(function.append_basic_block())
                context.call_internal_no_propagate(inner, compiled.fndesc, signature, function.args)
                inner.ret_void()
            return builder.ptrtoint(function, WORD)

        return types.int64(), generate

    return address


@function
def argument(frame, index):
    """Return the address of an argument buffer."""
    return word(word(frame, 9), index)


@function
def result(frame, index):
    """Return the address of a result buffer."""
    return word(word(frame, 14), index)


@function
def size(buffer, axis):
    """Return the size of a buffer along an axis."""
    return word(word(buffer, 5), axis)


@function
def data(buffer):
    """Return the address of a buffer's first entry."""
    return word(buffer, 3)


def array_reader(dtype: types.Type, rank: int) -> Callable:
    """Return a function that views a buffer as an array of a type and rank."""
    cast = pointer_to(dtype)
    if rank == 1:
        return function(lambda buffer: carray(cast(data(buffer)), (size(buffer, 0),)))
    if rank == 2:
        shape = function(lambda buffer: (size(buffer, 0), size(buffer, 1)))
    else:
        shape = function(lambda buffer: (size(buffer, 0), size(buffer, 1), size(buffer, 2)))
    return function(lambda buffer: carray(cast(data(buffer)), shape(buffer)))


floats_1d, floats_2d, floats_3d = (array_reader(types.float32, rank) for rank in (1, 2, 3))
ints_1d, ints_2d, ints_3d = (array_reader(types.int32, rank) for rank in (1, 2, 3))
as_int32 = pointer_to(types.int32)


@function
def answers_metadata(frame):
    """Answer XLA's request for metadata, if the call is one."""
    extension = word(frame, 1)
    if extension == 0 or carray(as_int32(extension + 8), (1,))[0] != 1:
        return False
    metadata = word(extension, 3)
    version = carray(as_int32(metadata + 24), (2,))
    version[0], version[1] = 0, 1
    carray(as_int32(metadata + 32), (1,))[0] = 0
    return True


@function
def num_threads(frame):
    """Return the number of threads in XLA's pool, at least 1."""
    count = allocate(1)
    call = allocate(4)
    if count == 0 or call == 0:
        return 1
    set_word(call, 0, 32)
    set_word(call, 2, word(frame, 3))
    set_word(call, 3, count)
    error = call_address(word(word(frame, 2), 18), call)
    threads = word(count, 0) if error == 0 else 1
    release(count)
    release(call)
    return max(threads, 1)


# Words of the state of a parallel loop, which its tasks share.
NEXT, DONE, CHUNKS, OWNERS, FRAME, STATE_WORDS = 0, 1, 2, 3, 4, 5


def parallel_loop(count: Callable, body: Callable) -> Callable:
    """Return a function `run(frame, threads)` that runs `body` for chunks of work on XLA's threads.

    Each thread takes the next chunk until none is left, the caller too. So the loop ends even if
    the pool never runs a task: the caller only waits for chunks that another thread has begun. A
    task that starts late finds no chunk; the last task to end frees the state.

    Args:
        count: numba function of the frame that returns the number of units of work.
        body: numba function of the frame and a range `start, stop` of the units.

    Returns:
        A numba function that returns False if there is no memory for the state.
    """

    @function
    def task(state):
        chunks = word(state, CHUNKS)
        while True:
            chunk = add_to_word(state, NEXT, 1)
            if chunk >= chunks:
                break
            frame = word(state, FRAME)
            units = count(frame)
            body(frame, units * chunk // chunks, units * (chunk + 1) // chunks)
            add_to_word(state, DONE, 1)
        leave(state)

    task_address = address_of_task(task)

    @inlined
    def run(frame, threads):
        units = count(frame)
        if units == 0:
            return True
        state, call = allocate(STATE_WORDS), allocate(5)
        if state == 0 or call == 0:
            return False
        chunks = min(units, threads * CHUNKS_PER_THREAD) if threads > 1 else 1
        helpers = min(threads, chunks) - 1
        set_word(state, CHUNKS, chunks)
        # The caller is an owner twice: of its own task, and to wait for the others.
        set_word(state, OWNERS, helpers + 2)
        set_word(state, FRAME, frame)
        set_word(call, 0, 40)
        set_word(call, 2, word(frame, 3))
        set_word(call, 3, task_address())
        set_word(call, 4, state)
        for _ in range(helpers):
            if call_address(word(word(frame, 2), 17), call) != 0:
                leave(state)
        release(call)
        call_address(task_address(), state)
        while add_to_word(state, DONE, 0) < chunks:
            let_others_run()
        leave(state)
        return True

    return run


@function
def leave(state):
    """Give up a loop's state; its last owner frees it."""
    if add_to_word(state, OWNERS, -1) == 1:
        release(state)


def in_order(loops: Sequence[Callable]) -> Callable:
    """Return a numba function that runs parallel loops one after the other."""
    first, *others = loops
    if not others:
        return first
    rest = in_order(others)
    return inlined(lambda frame, threads: first(frame, threads) and rest(frame, threads))


def error_maker(code: int, message: str) -> Callable:
    """Return a numba function that creates an error of XLA and returns its address."""

    @function
    def create(frame):
        call = allocate(4)
        if call == 0:
            return 0
        set_word(call, 0, 32)
        set_word(call, 2, address_of_text(message))
        set_word(call, 3, code)
        error = call_address(word(word(frame, 2), 6), call)
        release(call)
        return error

    return create


def signature_check(arguments: Sequence[tuple[str, int]], results: Sequence) -> Callable:
    """Return a numba function that checks types and ranks of all buffers."""
    expected = tuple((DTYPES[dtype][0], rank) for dtype, rank in (*arguments, *results))
    inputs, outputs = len(arguments), len(results)

    @function
    def check(frame):
        if word(frame, 7) != inputs or word(frame, 12) != outputs:
            return False
        for index in range(inputs + outputs):
            buffer = argument(frame, index) if index < inputs else result(frame, index - inputs)
            dtype, rank = expected[index]
            if (word(buffer, 2) & 0xFFFFFFFF) != dtype or word(buffer, 4) != rank:
                return False
        return True

    return check


class Kernel:
    """A numba program that XLA runs inside a compiled function.

    It is compiled, or read from disk, when it is first used.

    Attributes:
        name: Name of the FFI target.
        arguments: Type and rank of each argument, types as in `DTYPES`.
        results: Type and rank of each result.
        fits: numba function of the frame that checks the shapes of the buffers.
        loops: Parallel loops, see `parallel_loop`; they run one after the other.
    """

    def __init__(
        self,
        name: str,
        arguments: Sequence[tuple[str, int]],
        results: Sequence[tuple[str, int]],
        fits: Callable,
        loops: Sequence[Callable],
    ):
        self.name, self.arguments, self.results = name, arguments, results
        self.fits, self.loops = fits, loops

    def python_handler(self) -> Callable:
        """Return the handler as a numba function of the frame."""
        has_signature, fits = signature_check(self.arguments, self.results), self.fits
        run = in_order(self.loops)
        refuse = error_maker(INVALID_ARGUMENT, f"{self.name}: buffers of other types or shapes")
        fail = error_maker(RESOURCE_EXHAUSTED, f"{self.name}: no memory for the threads' state")

        def handler(frame):
            if answers_metadata(frame):
                return 0
            if not (has_signature(frame) and fits(frame)):
                return refuse(frame)
            if not run(frame, num_threads(frame)):
                return fail(frame)
            return 0

        return function(handler)

    @property
    def program(self) -> Program:
        """The compiled handler, known to XLA. It stays as long as the process."""
        with ONE_AT_A_TIME:
            return self.loaded_program

    @cached_property
    def loaded_program(self) -> Program:
        """The same, for one thread at a time."""
        program = load_program(self.name, self.python_handler)
        make = ctypes.pythonapi.PyCapsule_New
        make.restype = ctypes.py_object
        make.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        capsule = make(program.address, None, None)
        jax.ffi.register_ffi_target(self.name, capsule, platform="cpu", api_version=1)
        return program

    def __call__(self, *arguments: Any, results: Sequence[tuple[int, ...]]) -> list[jax.Array]:
        """Call the kernel inside or outside a compiled function.

        Args:
            *arguments: Arrays of the types and ranks of `arguments`.
            results: Shape of each result.

        Returns:
            The results.
        """
        # XLA must know the program before it compiles a call.
        assert self.program.address
        shapes = [
            jax.ShapeDtypeStruct(shape, dtype)
            for shape, (dtype, _) in zip(results, self.results, strict=True)
        ]
        return jax.ffi.ffi_call(self.name, shapes, vmap_method="sequential")(*arguments)

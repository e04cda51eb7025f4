"""Calls of CPU kernels on buffers that lie between guard pages, for tests.

A read or write beyond a buffer ends the process. XLA is not involved: the call frame is built here,
as xla/ffi/api/c_api.h says.
"""

import ctypes
import mmap

import numpy as np

PAGE = mmap.PAGESIZE
PROT_NONE, PROT_READ, PROT_READ_WRITE = 0, 1, 3
XLA_TYPES = {"int8": 2, "int16": 3, "int32": 4, "uint8": 6, "float32": 11, "bfloat16": 16}
libc = ctypes.CDLL(None, use_errno=True)
ONE_POINTER = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)
WORDS = ctypes.POINTER(ctypes.c_int64)


def protect(address: int, size: int, protection: int) -> None:
    """Set the protection of pages."""
    pages = ctypes.c_void_p(address), ctypes.c_size_t(size)
    if libc.mprotect(*pages, protection):
        raise OSError(ctypes.get_errno(), "mprotect")


class Guarded:
    """A copy of an array, with a page before and after it that must not be touched.

    Args:
        array: The array.
        at_end: Whether the array ends at the page after it; else it starts at the page before it.
        is_read_only: Whether a write ends the process, too.
    """

    def __init__(self, array: np.ndarray, at_end: bool, is_read_only: bool):
        size = max(1, -(-array.nbytes // PAGE)) * PAGE
        self.memory = mmap.mmap(-1, size + 2 * PAGE)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        offset = PAGE + (size - array.nbytes if at_end else 0)
        self.address = start + offset
        self.array = np.frombuffer(self.memory, array.dtype, array.size, offset).reshape(
            array.shape
        )
        self.array[...] = array
        if is_read_only:
            protect(start + PAGE, size, PROT_READ)
        protect(start, PAGE, PROT_NONE)
        protect(start + PAGE + size, PAGE, PROT_NONE)
        self.start, self.size = start, size + 2 * PAGE

    def free(self) -> None:
        """Let the memory be reused."""
        protect(self.start, self.size, PROT_READ_WRITE)


def words(*values: int) -> ctypes.Array:
    """Return an array of 8-byte words."""
    return (ctypes.c_int64 * len(values))(*values)


class Frame:
    """A call frame with a pool of `threads` threads, which runs a task at once.

    Attributes:
        errors: Messages of the errors that the kernel created.
    """

    def __init__(
        self, arguments: list[tuple[str, Guarded]], results: list[tuple[str, Guarded]], threads: int
    ):
        self.kept, self.errors = [], []

        def create_error(call):
            self.errors.append(ctypes.string_at(ctypes.cast(call, WORDS)[2]).decode())
            return 1

        def schedule(call):
            call = ctypes.cast(call, WORDS)
            ctypes.CFUNCTYPE(None, ctypes.c_void_p)(call[3])(call[4])

        def count_threads(call):
            ctypes.cast(ctypes.cast(call, WORDS)[3], WORDS)[0] = threads

        functions = {6: create_error, 17: schedule, 18: count_threads}
        api = words(*[0] * 20)
        for place, function in functions.items():
            callback = ONE_POINTER(function)
            api[place] = ctypes.cast(callback, ctypes.c_void_p).value
            self.kept.append(callback)
        lists = []
        for buffers in (arguments, results):
            pointers = words(*[self.buffer(dtype, guarded) for dtype, guarded in buffers], 0)
            lists += [len(buffers), 0, ctypes.addressof(pointers)]
            self.kept.append(pointers)
        self.words = words(
            0, 0, ctypes.addressof(api), 0, 3, 0, 0, *lists[:3], 0, 0, *lists[3:], 0, 0
        )
        self.kept.append(api)

    def buffer(self, dtype: str, guarded: Guarded) -> int:
        """Return the address of a buffer's description."""
        dimensions = words(*guarded.array.shape, 0)
        rank = guarded.array.ndim
        description = words(
            0, 0, XLA_TYPES[dtype], guarded.address, rank, ctypes.addressof(dimensions)
        )
        self.kept += [dimensions, description]
        return ctypes.addressof(description)


def guarded_call(
    kernel,
    arguments: list[np.ndarray],
    shapes: list[tuple[int, ...]],
    *,
    at_end: bool,
    threads: int,
) -> list[np.ndarray]:
    """Call a kernel on guarded buffers.

    Args:
        kernel: A `hire.ops.cpu.ffi.Kernel`.
        arguments: Its arguments; bfloat16 as 16-bit integers.
        shapes: Shapes of its results.
        at_end: Whether buffers end, or start, at a guard page.
        threads: Threads of the pool.

    Returns:
        The results.

    Raises:
        ValueError: If the kernel refuses the buffers.
    """
    inputs = [Guarded(array, at_end, True) for array in arguments]
    outputs = []
    for shape, (dtype, _) in zip(shapes, kernel.results, strict=True):
        outputs.append(Guarded(np.full(shape, 77, dtype), at_end, False))
    names = [dtype for dtype, _ in kernel.arguments], [dtype for dtype, _ in kernel.results]
    frame = Frame(
        list(zip(names[0], inputs, strict=True)), list(zip(names[1], outputs, strict=True)), threads
    )
    handler = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p)(kernel.program.address)
    error = handler(ctypes.addressof(frame.words))
    results = [output.array.copy() for output in outputs]
    for guarded in inputs + outputs:
        guarded.free()
    if error:
        raise ValueError(frame.errors[-1])
    return results

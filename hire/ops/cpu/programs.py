"""Programs of kernels as object code, which is kept on disk.

numba's own cache is not used: its symbols are numbered by the process that compiled them, so two
programs from two processes may take each other's functions. Here a program has one symbol for
others and an engine of its own.
"""

import dataclasses
import hashlib
import os
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import llvmlite
import llvmlite.binding as llvm
import numba
from llvmlite import ir
from numba import types
from numba.core.compiler_lock import global_compiler_lock
from numba.core.registry import cpu_target

WORD = ir.IntType(64)
# Where programs find the functions of C that they call.
LIBRARIES = ("libc.so.6", "libm.so.6")
# Bytes of the digest before the object code of a file.
DIGEST_BYTES = 32


@dataclasses.dataclass(frozen=True)
class Program:
    """A program in memory.

    Attributes:
        address: Address of its C function, from int64 to int64.
        engine: What holds its memory.
        was_on_disk: Whether it was read from disk.
    """

    address: int
    engine: llvm.ExecutionEngine
    was_on_disk: bool


def load_program(name: str, make_function: Callable) -> Program:
    """Load a program from disk, or compile it and keep it there.

    A damaged file is compiled anew. A folder that cannot be written is no error.

    Args:
        name: Name of the program and of its C function.
        make_function: Function that returns a numba function from int64 to int64. It is called only
            to compile.

    Returns:
        The program.
    """
    path = folder() / f"{name}-{key()}.o"
    code = read(path)
    was_on_disk = code is not None
    if code is None:
        code = object_code(name, make_function())
        write(path, code)
    for library in LIBRARIES:
        llvm.load_library_permanently(library)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), target_machine())
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    return Program(engine.get_function_address(name), engine, was_on_disk)


def target_machine() -> llvm.TargetMachine:
    """Return a new compiler for this processor. An engine owns the one that it gets."""
    options = dict(opt=3, reloc="pic", codemodel="jitdefault")
    return llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), **options
    )


# Read when the kernels are imported: a process that runs while the sources change compiles the old
# ones, and must not keep them under the name of the new ones.
SOURCES = [source.read_bytes() for source in sorted(Path(__file__).parent.glob("*.py"))]


@cache
def key() -> str:
    """Return what programs depend on, as a digest: sources, versions and the processor."""
    digest = hashlib.sha256(b"".join(SOURCES))
    versions = (numba.__version__, llvmlite.__version__, llvm.get_host_cpu_name())
    for text in (*versions, llvm.get_host_cpu_features().flatten()):
        digest.update(text.encode())
    return digest.hexdigest()[:16]


@cache
def folder() -> Path:
    """Return the folder of the programs: next to the sources, or the user's where it is not
    writable.
    """
    beside = Path(__file__).parent
    if os.access(beside, os.W_OK):
        return beside / "__pycache__"
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "hire" / "kernels"


def read(path: Path) -> bytes | None:
    """Return the object code of a file, or None if there is none or it is damaged."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, code = content[:DIGEST_BYTES], content[DIGEST_BYTES:]
    return code if digest == hashlib.sha256(code).digest() else None


def write(path: Path, code: bytes) -> None:
    """Write object code with its digest, at once or not at all."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(hashlib.sha256(code).digest() + code)
        os.replace(file.name, path)
    except OSError:
        return


@global_compiler_lock
def object_code(name: str, function: Callable) -> bytes:
    """Compile a numba function from int64 to int64.

    Args:
        name: Name of the C function.
        function: The numba function.

    Returns:
        Object code with the C function as its only symbol for others.
    """
    signature = types.int64(types.int64)
    function.compile(signature)
    compiled, context = function.overloads[signature.args], cpu_target.target_context
    library = context.codegen().create_library(name)
    module = library.create_ir_module(name)
    c_function = ir.Function(module, ir.FunctionType(WORD, [WORD]), name)
    builder = ir.IRBuilder(c_function.append_basic_block())
    _, value = context.call_internal_no_propagate(
        builder, compiled.fndesc, signature, c_function.args
    )
    builder.ret(value)
    library.add_ir_module(module)
    library.add_linking_library(compiled.library)
    library.finalize()
    program = llvm.parse_assembly(library.get_llvm_str())
    for symbol in (*program.functions, *program.global_variables):
        if not symbol.is_declaration and symbol.name != name:
            symbol.linkage = "internal"
    return target_machine().emit_object(program)

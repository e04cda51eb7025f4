"""Kernels for a CPU: numba programs that run inside compiled functions, see `hire.ops.cpu.ffi`.

Only this module is imported where numba is missing.
"""

import importlib
import platform
import sys
import warnings
from functools import cache
from types import ModuleType

# The systems on which the kernels have been seen to work. Elsewhere XLA's form runs.
SEEN_TO_WORK = ("linux", "x86_64")


@cache
def problem() -> str | None:
    """Return in one line why the kernels cannot run here, or None."""
    system = (sys.platform, platform.machine())
    if system != SEEN_TO_WORK:
        return f"expected {' '.join(SEEN_TO_WORK)}, not {' '.join(system)}"
    try:
        importlib.import_module("hire.ops.cpu.ffi")
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name in ("numba", "llvmlite"):
            return f"{error.name} is not installed: pip install 'hire[cpu]'"
        return f"numba does not work: {' '.join(str(error).split())}"
    return None


@cache
def is_available() -> bool:
    """Whether the kernels run here. Warns if numba is installed but broken."""
    reason = problem()
    if reason is not None and reason.startswith("numba does not work"):
        warnings.warn(f"XLA's form runs instead of the CPU kernels: {reason}", stacklevel=2)
    return reason is None


def load(name: str) -> ModuleType:
    """Import a module of kernels, which imports numba."""
    return importlib.import_module(f"hire.ops.cpu.{name}")

"""How the functions of kernels are compiled."""

import inspect
from collections.abc import Callable
from typing import Any

from numba import njit

# Only other compiled functions call them: they need no wrapper for Python. Division by zero gives
# what numpy gives: a kernel raises no exception, since XLA could not see it.
OPTIONS: Any = dict(error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)


def function(python_function: Callable) -> Callable:
    """Compile a function for other compiled functions, without the type checks of a test run."""
    return njit(**OPTIONS)(inspect.unwrap(python_function))


def inlined(python_function: Callable) -> Callable:
    """Compile a function as a part of each function that calls it.

    numba compiles what a function calls once more with the function. This compiles it only there.
    """
    return njit(inline="always", **OPTIONS)(inspect.unwrap(python_function))

"""Cache of a function's result for each array, which lasts as long as the array."""

import weakref
from collections.abc import Callable
from typing import Any

import jax
from jax.core import Tracer

from hire.types import AnyArray


class ArrayCache:
    """Caches a function of an array for as long as the array exists.

    Only concrete jax arrays are cached. Numpy arrays may change and tracers hold no values, so the
    function runs again for them.

    Args:
        function: Function of one array.
    """

    def __init__(self, function: Callable[[AnyArray], Any]):
        self.function = function
        self.known: dict[int, tuple[weakref.ref, Any]] = {}

    def __call__(self, array: AnyArray) -> Any:
        """Return `function(array)`, from the cache if possible."""
        if not isinstance(array, jax.Array) or isinstance(array, Tracer):
            return self.function(array)
        key = id(array)
        reference, value = self.known.get(key, (None, None))
        if reference is None or reference() is not array:
            value = self.function(array)
            self.known[key] = weakref.ref(array, lambda _: self.known.pop(key, None)), value
        return value

"""The key/value cache of a decoder."""

from dataclasses import field
from typing import Any

from jax.core import Tracer

from hire.pytrees import pytree
from hire.types import Array, Float, Int


@pytree
class Cache:
    """Keys and values of every layer, and the number of cached tokens.

    A local layer caches only its window, as a ring buffer.

    Attributes:
        keys: One entry per layer: keys `(b, s, n, e)`, where `s` is the cache length of the layer.
            A searched layer stores a hire.models.kv_search.SearchableKeyCache.
        values: One entry per layer: values `(b, s, n, e)`.
        length: Number of cached tokens. It is a Python int between steps, so that no check waits
            for the device.
        cache_length: The largest number of tokens in the cache.
    """

    keys: tuple[Any, ...]
    values: tuple[Float[Array, "b _ n e"], ...]
    length: Int[Array, ""] | int
    cache_length: int = field(metadata=dict(static=True))

    def check_room(self) -> None:
        """Checks that the cache has room for one more token.

        Inside a compiled function the number of cached tokens is unknown, so the check passes.

        Raises:
            ValueError: When the cache is full.
        """
        if not isinstance(self.length, Tracer) and self.length >= self.cache_length:
            raise ValueError(
                f"the cache of length {self.cache_length} is full: expected room for one more "
                "token; prefill with a larger cache_length"
            )

"""Attention that searches: the keys of a layer are the rows, and its cache grows by one a step.

An int8 low-rank copy of the keys estimates what weight each has. The candidates, which the heads that share the keys choose
together, are weighed exactly; all other keys keep their estimated weight, put on the mean of the values. The paper names no such
use: it is ours.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hire.axes import Array, Float, Hidden, Indices, Int, Int8, Queries, Rows
from hire.estimators import LowRank, Quantized, product, rounded, row_scores, row_sums
from hire.models.decoder import Attention, KeysOrValues, after, mix, written
from hire.search import nominate
from hire.topk import check_count


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Keys:
    """Cached keys (b, s, n, e) of a searched layer, or (s, e) of one text and head; the factors of each; the sum of all values."""

    # Any, since jax 0.7 builds it around placeholders when it maps over heads.
    rows: Float[Array, "*s e"] | Any
    codes: Int8[Array, "*s r"] | Any
    scale: Float[Array, "*s"] | Any
    total: Float[Array, "*one e"] | Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class KeySearch:
    """How a layer searches its keys: (x @ projection.T) @ (key @ mixing) estimates the score of a key for a query x.

    Raises ValueError when built with fewer than 1 candidates.
    """

    projection: Float[Array, "r e"]
    mixing: Float[Array, "e r"]
    candidates: int = field(metadata=dict(static=True))

    def __post_init__(self):
        check_count("candidates", self.candidates, 1, 2**31 - 1, "keys of one layer")

    @classmethod
    def fit(cls, keys: Rows, queries: Queries, rank: int, *, candidates: int) -> "KeySearch":
        """The search of keys like `keys` (m, e) for queries like `queries` (n, e), both with their rotary positions.

        Raises ValueError when rank is not in 1..min(m, e), when the queries do not fit the keys, or as when built.
        """
        copy = LowRank.fit(keys, rank, calibration=queries)
        # The factors are linear in the keys: what makes them of these makes them of keys to come.
        mixing, *_ = np.linalg.lstsq(np.asarray(keys, np.float64), np.asarray(copy.factors, np.float64))
        return cls(jnp.asarray(copy.projection), jnp.asarray(mixing, jnp.float32), candidates)

    @property
    def width(self) -> int:
        return self.mixing.shape[0]

    def copied(self, keys: KeysOrValues, values: KeysOrValues) -> Keys:
        """Keys (b, s, n, e) with their copy, and the sum of their values."""
        factors = product(keys.astype(jnp.float32), self.mixing, "bsne,er->bsnr")
        codes, scale = rounded(factors.reshape(-1, factors.shape[-1]), 8)
        total = jnp.sum(values.astype(jnp.float32), axis=1, keepdims=True)
        return Keys(keys, codes.reshape(factors.shape), scale.reshape(factors.shape[:-1]), total)

    def found(self, x: Queries, keys: Keys, length: Int[Array, ""]) -> tuple[Indices, Float[Array, "g 1"]]:
        """The candidates (c,) among the first `length` keys of one head for the queries (g, e) that share it: those that get most
        weight from all of them. And the logarithm of the weight (g, 1) that all other keys get together.
        """
        none = jnp.uint32(0)  # no fingerprint: the rows grow
        copy = LowRank(self.projection, Quantized(keys.codes, keys.scale, none, 8, len(self.projection)), none)
        held = jnp.arange(len(keys.rows))[None] < length
        estimated = jnp.where(held, copy.scores(x) * self.width**-0.5, -jnp.inf)
        together = jax.nn.logsumexp(jax.nn.log_softmax(estimated, axis=1), axis=0)
        chosen = nominate(together, min(self.candidates, len(keys.rows)))
        return chosen, jax.nn.logsumexp(estimated.at[:, chosen].set(-jnp.inf), axis=1, keepdims=True)

    def exact(self, x: Queries, keys: Keys, chosen: Indices, length: Int[Array, ""]) -> Float[Array, "g c"]:
        """The logarithms of the weights of the keys that are chosen; -inf for slots that hold none."""
        return jnp.where(chosen[None] < length, row_scores(x, keys.rows[chosen]) * self.width**-0.5, -jnp.inf)

    def attend(
        self, x: Queries, keys: Keys, values: Rows, key: Float[Array, " e"], value: Float[Array, " e"], length: Int[Array, ""]
    ) -> Float[Array, "g e"]:
        """Attention (g, e) of queries (g, e) to the keys of one head, and to their own token's."""
        chosen, others = self.found(x, keys, length)
        own = row_scores(x, key[None]) * self.width**-0.5
        weights = jax.nn.softmax(jnp.concatenate([self.exact(x, keys, chosen, length), own, others], axis=1), axis=1)
        beside = jnp.concatenate([value.astype(jnp.float32)[None], keys.total / length.astype(jnp.float32)])
        return row_sums(weights[:, :-2].astype(values.dtype), values[chosen]) + weights[:, -2:] @ beside


class SearchedAttention(nnx.Module):
    """A layer's attention, its keys searched in every step. A whole text, whose queries read every key anyway, is as it was."""

    def __init__(self, dense: Attention, search: KeySearch):
        self.dense, self.search = dense, nnx.data(search)

    @property
    def window(self) -> int:
        return self.dense.window

    def whole(self, x: Hidden, slots: int):
        mixed, keys, values = self.dense.whole(x, slots)
        return mixed, self.search.copied(keys, values), values

    def step(self, x: Float[Array, "b d"], keys: Keys, values: KeysOrValues, length: Int[Array, ""]):
        """As Attention.step, which it equals while there are no more keys than candidates."""
        queries, key, value = self.dense.project(x[:, None], length[None])
        heads = jax.vmap(jax.vmap(self.search.attend, (0, 1, 1, 0, 0, None)), (0, 0, 0, 0, 0, None))
        mixed = heads(self.grouped(queries), keys, values, key[:, 0], value[:, 0], length).astype(x.dtype)
        key, value = after(mixed, key), after(mixed, value)
        new = self.search.copied(key, value)
        rows, codes, scale = (written(getattr(keys, part), getattr(new, part), length) for part in ("rows", "codes", "scale"))
        grown = replace(keys, rows=rows, codes=codes, scale=scale, total=keys.total + new.total)
        return mix(mixed.reshape(x.shape[0], -1), self.dense.output), grown, written(values, value, length)

    def grouped(self, queries: Float[Array, "b 1 h e"]) -> Float[Array, "b n g e"]:
        """The queries of heads that share keys side by side."""
        return queries.reshape(len(queries), self.dense.kv_heads, -1, self.dense.head_width)

    def bytes_read(self, length: int, itemsize: int = 4) -> int:
        """Bytes that a step of one text reads for its keys and values, of so many bytes an entry, when `length` are cached."""
        search, n, entry = self.search, self.dense.kv_heads, self.dense.head_width * itemsize
        copy = length * n * (len(search.projection) + 4) + search.projection.nbytes + search.mixing.nbytes  # a float32 scale a key
        return copy + 4 * n * search.width + 2 * n * min(search.candidates, length) * entry

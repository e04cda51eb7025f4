"""Attention that searches: the keys of a layer are the rows, and its cache grows by one a step.

An int8 low-rank copy of the keys estimates what weight each has. The candidates, which the heads that share the keys choose
together, are weighed exactly; all other keys keep their estimated weight, put on an int8 low-rank copy of their values. The paper
names no such use: it is ours.
"""

from collections.abc import Sequence
from dataclasses import field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hire.axes import AnyArray, Array, Float, Hidden, Indices, Int, Int8, Queries, Rows
from hire.estimators import LowRank, Quantized, product, rounded, row_scores, row_sums
from hire.models.decoder import Attention, KeysOrValues, after, mix, written
from hire.pytrees import pytree
from hire.search import log_ratio, nominate
from hire.topk import check_count, exact_top_k


@pytree
class Copied:
    """Int8 factors of cached keys or values (b, s, n, r) and their scales, or (s, r) of one text and head."""

    # Any, since jax 0.7 builds it around placeholders when it maps over heads.
    codes: Int8[Array, "*s r"] | Any
    scale: Float[Array, "*s"] | Any


@pytree
class Keys:
    """Cached keys (b, s, n, e) of a searched layer, or (s, e) of one text and head; the copies of them and of their values."""

    rows: Float[Array, "*s e"] | Any
    keys: Copied
    values: Copied


@pytree
class Growing:
    """A low-rank copy of rows that are still to come: a row is about (row @ mixing) @ projection."""

    projection: Float[Array, "r e"]
    mixing: Float[Array, "e r"]

    @classmethod
    def fit(cls, rows: Rows, rank: int, queries: Queries | None = None) -> "Growing":
        """The copy of rows like `rows` (m, e), for queries like `queries` (n, e). Raises ValueError as LowRank.fit does."""
        copy = LowRank.fit(rows, rank, calibration=queries)
        # The factors are linear in the rows: what makes them of these makes them of rows to come.
        mixing, *_ = np.linalg.lstsq(np.asarray(rows, np.float64), np.asarray(copy.factors, np.float64))
        return cls(jnp.asarray(copy.projection), jnp.asarray(mixing, jnp.float32))

    def copied(self, rows: KeysOrValues) -> Copied:
        """The int8 factors of rows (b, s, n, e)."""
        factors = product(rows.astype(jnp.float32), self.mixing, "bsne,er->bsnr")
        codes, scale = rounded(factors.reshape(-1, factors.shape[-1]), 8)
        return Copied(codes.reshape(factors.shape), scale.reshape(factors.shape[:-1]))

    def copy(self, held: Copied) -> LowRank:
        """The estimator of the rows (s, e) that one head holds."""
        none = None  # no fingerprint: the rows grow
        return LowRank(self.projection, Quantized(held.codes, held.scale, none, 8, len(self.projection)), none)

    def sums(self, weights: Float[AnyArray, "g s"], held: Copied) -> Float[Array, "g e"]:
        """Sums of the rows (s, e), as the copy has them, times their weights."""
        return row_sums(weights, self.copy(held).factors) @ self.projection


@pytree
class KeySearch:
    """How a layer searches its keys. Raises ValueError when built with fewer than 1 candidates, or with
    keys and values of different widths.
    """

    keys: Growing
    values: Growing
    candidates: int = field(metadata=dict(static=True))

    def __post_init__(self):
        check_count("candidates", self.candidates, 1, 2**31 - 1, "keys of one layer")
        widths = self.keys.mixing.shape[0], self.values.mixing.shape[0]
        if widths[0] != widths[1]:
            raise ValueError(f"keys and values of widths {widths}: expected the same")

    @classmethod
    def fit(cls, keys: Rows, values: Rows, queries: Queries, ranks: Sequence[int], *, candidates: int) -> "KeySearch":
        """The search of keys and values like these (m, e) for queries like these (n, e), both with their rotary positions, by
        copies of two ranks, of keys and of values.

        Raises ValueError when a rank is not in 1..min(m, e), when the queries do not fit the keys, or as when built.
        """
        return cls(Growing.fit(keys, ranks[0], queries), Growing.fit(values, ranks[1]), candidates)

    @property
    def width(self) -> int:
        return self.keys.mixing.shape[0]

    def copied(self, keys: KeysOrValues, values: KeysOrValues) -> Keys:
        """Keys (b, s, n, e) with the copies of them and of their values."""
        return Keys(keys, self.keys.copied(keys), self.values.copied(values))

    def found(self, x: Queries, keys: Keys, length: Int[Array, ""]) -> tuple[Indices, Float[Array, "g s"]]:
        """The candidates (c,) among the first `length` keys of one head for the queries (g, e) that share it: those that get most
        weight from all of them, best first. And the logarithms of the weights (g, s) that all keys are estimated to have.
        """
        held = jnp.arange(len(keys.rows), dtype=jnp.int32)[None] < length
        estimated = jnp.where(held, self.keys.copy(keys.keys).scores(x) * self.width**-0.5, -jnp.inf)
        weights = jax.nn.log_softmax(estimated, axis=1)
        # A head whose query is not finite chooses nothing, and the others choose as without it.
        weights = jnp.where(jnp.isnan(weights), -jnp.inf, weights)
        together = jax.nn.logsumexp(weights, axis=0)
        chosen = nominate(together, min(self.candidates, len(keys.rows)))
        return chosen[exact_top_k(together[chosen], len(chosen)).indices], estimated

    def exact(self, x: Queries, keys: Keys, chosen: Indices, length: Int[Array, ""]) -> Float[Array, "g c"]:
        """The logarithms of the weights of the keys that are chosen; -inf for slots that hold none."""
        return jnp.where(chosen[None] < length, row_scores(x, keys.rows[chosen]) * self.width**-0.5, -jnp.inf)

    def attend(
        self, x: Queries, keys: Keys, values: Rows, key: Float[Array, " e"], value: Float[Array, " e"], length: Int[Array, ""]
    ) -> Float[Array, "g e"]:
        """Attention (g, e) of queries (g, e) to the keys of one head, and to their own token's."""
        chosen, estimated = self.found(x, keys, length)
        exact, own, half = self.exact(x, keys, chosen, length), row_scores(x, key[None]) * self.width**-0.5, len(chosen) // 2
        # Errors of scores do not cancel in a sum of weights. What they make of it is told by the candidates nearest to the others.
        lacked, _ = log_ratio(exact[:, half:], estimated[:, chosen[half:]])
        others = estimated.at[:, chosen].set(-jnp.inf) + jnp.nan_to_num(lacked)[:, None]
        logits = jnp.concatenate([exact, own, others], axis=1)
        read, its, told = jnp.split(jax.nn.softmax(logits, axis=1), [len(chosen), len(chosen) + 1], axis=1)
        known = row_sums(read.astype(values.dtype), values[chosen]) + its * value.astype(jnp.float32)[None]
        return known + self.values.sums(told, keys.values)


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
        grown = jax.tree.map(partial(written, length=length), keys, self.search.copied(key, value))
        return mix(mixed.reshape(x.shape[0], -1), self.dense.output), grown, written(values, value, length)

    def grouped(self, queries: Float[Array, "b 1 h e"]) -> Float[Array, "b n g e"]:
        """The queries of heads that share keys side by side."""
        return queries.reshape(len(queries), self.dense.kv_heads, -1, self.dense.head_width)

    def bytes_read(self, length: int, itemsize: int = 4) -> int:
        """Bytes that a step of one text reads for its keys and values, of so many bytes an entry, when `length` are cached."""
        search, n, entry = self.search, self.dense.kv_heads, self.dense.head_width * itemsize
        copies = 0
        for part in (search.keys, search.values):  # a float32 scale a key, and a value
            copies += length * n * (len(part.projection) + 4) + part.projection.nbytes + part.mixing.nbytes
        return copies + 2 * n * min(search.candidates, length) * entry

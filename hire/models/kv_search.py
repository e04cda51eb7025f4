"""Attention that searches the key/value cache, which grows by one token per decode step.

The keys of a layer are the rows of the search. An int8 low-rank estimator of the keys estimates the
attention weight of every key. The heads that share the keys nominate candidates together. The
candidates get exact weights. All other keys keep their estimated weights, which multiply an int8
low-rank approximation of their values. The paper does not describe this use; it is ours.
"""

from collections.abc import Sequence
from dataclasses import field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hire.estimators.low_rank import LowRank
from hire.models.attention import Attention, KeysOrValues, ordered_after, write_slot
from hire.models.modules import mix
from hire.ops.checks import check_range
from hire.ops.matmul import matmul_f32
from hire.ops.nomination import nominate_from_scores
from hire.ops.normalizer import logsumexp_correction
from hire.ops.quantization import QuantizedRows, quantize_rows
from hire.ops.row_products import row_scores, weighted_row_sum
from hire.ops.top_k import exact_top_k
from hire.pytrees import pytree
from hire.types import AnyArray, Array, Float, Hidden, Indices, Int, Int8, Queries, Rows


@pytree
class EncodedRows:
    """Int8 low-rank factors of cached keys or values, with their scales.

    Attributes:
        codes: Int8 factors, `(b, s, n, r)`, or `(s, r)` for one text and head.
        scale: Scale of each row, `(b, s, n)`, or `(s,)` for one text and head.
    """

    # Any: jax 0.7 builds this class around placeholders when it maps over heads.
    codes: Int8[Array, "*s r"] | Any
    scale: Float[Array, "*s"] | Any


@pytree
class SearchableKeyCache:
    """Cached keys of a searched layer, with the encoded keys and values.

    Attributes:
        rows: The keys, `(b, s, n, e)`, or `(s, e)` for one text and head.
        keys: The encoded keys.
        values: The encoded values.
    """

    rows: Float[Array, "*s e"] | Any
    keys: EncodedRows
    values: EncodedRows


@pytree
class LowRankEncoder:
    """Low-rank encoder for rows that are not known yet.

    It approximates a row by `(row @ mixing) @ projection`.

    Attributes:
        projection: `(r, e)`.
        mixing: `(e, r)`.
    """

    projection: Float[Array, "r e"]
    mixing: Float[Array, "e r"]

    @classmethod
    def fit(cls, rows: Rows, rank: int, queries: Queries | None = None) -> "LowRankEncoder":
        """Fits an encoder for rows that resemble the given ones.

        Args:
            rows: Sample of rows, `(m, e)`.
            rank: Rank of the encoder.
            queries: Sample of queries, `(n, e)`, as the calibration of LowRank.fit.

        Returns:
            The encoder.

        Raises:
            ValueError: As LowRank.fit does.
        """
        estimator = LowRank.fit(rows, rank, calibration=queries)
        # The factors are linear in the rows, so the map that yields them encodes later rows, too.
        mixing, *_ = np.linalg.lstsq(
            np.asarray(rows, np.float64), np.asarray(estimator.factors, np.float64)
        )
        return cls(jnp.asarray(estimator.projection), jnp.asarray(mixing, jnp.float32))

    def encode(self, rows: KeysOrValues) -> EncodedRows:
        """Encodes rows as int8 factors.

        Args:
            rows: Keys or values, `(b, s, n, e)`.

        Returns:
            The encoded rows.
        """
        factors = matmul_f32(rows.astype(jnp.float32), self.mixing, "bsne,er->bsnr")
        codes, scale = quantize_rows(factors.reshape(-1, factors.shape[-1]), 8)
        return EncodedRows(codes.reshape(factors.shape), scale.reshape(factors.shape[:-1]))

    def estimator(self, encoded: EncodedRows) -> LowRank:
        """Returns the estimator of the encoded rows of one head.

        Args:
            encoded: The encoded rows of one text and head.

        Returns:
            The estimator of the rows `(s, e)`.
        """
        fingerprint = None  # because the rows grow
        return LowRank(
            self.projection,
            QuantizedRows(encoded.codes, encoded.scale, 8, len(self.projection)),
            fingerprint,
        )

    def sums(self, weights: Float[AnyArray, "g s"], encoded: EncodedRows) -> Float[Array, "g e"]:
        """Sums the approximated rows, each times its weight.

        Args:
            weights: Weights, `(g, s)`.
            encoded: The encoded rows of one text and head.

        Returns:
            The sums, `(g, e)`.
        """
        return weighted_row_sum(weights, self.estimator(encoded).factors) @ self.projection


@pytree
class KeySearch:
    """The key search of one layer.

    Attributes:
        keys: Encoder of the keys.
        values: Encoder of the values.
        candidates: Number of keys with exact weights, per key/value head.

    Raises:
        ValueError: When `candidates` is less than 1, or keys and values have different widths.
    """

    keys: LowRankEncoder
    values: LowRankEncoder
    candidates: int = field(metadata=dict(static=True))

    def __post_init__(self):
        check_range("candidates", self.candidates, 1, 2**31 - 1, "keys of one layer")
        widths = self.keys.mixing.shape[0], self.values.mixing.shape[0]
        if widths[0] != widths[1]:
            raise ValueError(f"keys and values of widths {widths}: expected the same")

    @classmethod
    def fit(
        cls, keys: Rows, values: Rows, queries: Queries, ranks: Sequence[int], *, candidates: int
    ) -> "KeySearch":
        """Fits the search for keys, values and queries that resemble the given ones.

        Args:
            keys: Sample of keys, `(m, e)`, with rotary positions.
            values: Sample of values, `(m, e)`.
            queries: Sample of queries, `(n, e)`, with rotary positions.
            ranks: Rank of the key encoder and rank of the value encoder.
            candidates: Number of keys with exact weights, per key/value head.

        Returns:
            The search.

        Raises:
            ValueError: When a rank is not in 1..min(m, e), the queries do not fit the keys,
                `candidates` is less than 1, or keys and values have different widths.
        """
        return cls(
            LowRankEncoder.fit(keys, ranks[0], queries),
            LowRankEncoder.fit(values, ranks[1]),
            candidates,
        )

    @property
    def width(self) -> int:
        """Elements of a key."""
        return self.keys.mixing.shape[0]

    def encode(self, keys: KeysOrValues, values: KeysOrValues) -> SearchableKeyCache:
        """Encodes keys and values for the search.

        Args:
            keys: Keys, `(b, s, n, e)`.
            values: Values, `(b, s, n, e)`.

        Returns:
            The keys, the encoded keys and the encoded values.
        """
        return SearchableKeyCache(keys, self.keys.encode(keys), self.values.encode(values))

    def nominate(
        self, x: Queries, keys: SearchableKeyCache, length: Int[Array, ""]
    ) -> tuple[Indices, Float[Array, "g s"]]:
        """Nominates candidates among the first `length` keys of one head.

        The candidates are the keys with the largest sum of estimated weights over the queries.

        Args:
            x: The queries that share the head, `(g, e)`.
            keys: The cached keys of the head.
            length: Number of cached tokens.

        Returns:
            Indices of the candidates `(c,)`, best first, and the logarithms of the estimated
            weights of all keys `(g, s)`, before normalization.
        """
        attention_mask = jnp.arange(len(keys.rows), dtype=jnp.int32)[None] < length
        estimated = jnp.where(
            attention_mask, self.keys.estimator(keys.keys).scores(x) * self.width**-0.5, -jnp.inf
        )
        log_weights = jax.nn.log_softmax(estimated, axis=1)
        # A head with a non-finite query nominates nothing. It does not affect the other heads.
        log_weights = jnp.where(jnp.isnan(log_weights), -jnp.inf, log_weights)
        log_totals = jax.nn.logsumexp(log_weights, axis=0)
        candidates = nominate_from_scores(log_totals, min(self.candidates, len(keys.rows)))
        return candidates[exact_top_k(log_totals[candidates], len(candidates)).indices], estimated

    def exact_scores(
        self, x: Queries, keys: SearchableKeyCache, chosen: Indices, length: Int[Array, ""]
    ) -> Float[Array, "g c"]:
        """Computes the logarithms of the weights of the candidates, before normalization.

        Args:
            x: Queries, `(g, e)`.
            keys: The cached keys of the head.
            chosen: Indices of the candidates, `(c,)`.
            length: Number of cached tokens.

        Returns:
            The logarithms, `(g, c)`; -inf for an index that stores no key.
        """
        return jnp.where(
            chosen[None] < length, row_scores(x, keys.rows[chosen]) * self.width**-0.5, -jnp.inf
        )

    def attend(
        self,
        x: Queries,
        keys: SearchableKeyCache,
        values: Rows,
        key: Float[Array, " e"],
        value: Float[Array, " e"],
        length: Int[Array, ""],
    ) -> Float[Array, "g e"]:
        """Computes attention to the cached keys of one head and to the new token.

        Args:
            x: Queries of the new token, `(g, e)`.
            keys: The cached keys of the head.
            values: The cached values of the head, `(s, e)`.
            key: Key of the new token, `(e,)`.
            value: Value of the new token, `(e,)`.
            length: Number of cached tokens.

        Returns:
            The attention output, `(g, e)`.
        """
        candidates, estimated = self.nominate(x, keys, length)
        exact, new_score, half = (
            self.exact_scores(x, keys, candidates, length),
            row_scores(x, key[None]) * self.width**-0.5,
            len(candidates) // 2,
        )
        # Errors of scores do not cancel in a sum of weights. The candidates nearest to the other
        # keys show how far the errors change that sum.
        correction, _ = logsumexp_correction(exact[:, half:], estimated[:, candidates[half:]])
        corrected = estimated.at[:, candidates].set(-jnp.inf) + correction[:, None]
        logits = jnp.concatenate([exact, new_score, corrected], axis=1)
        exact_weights, new_weight, estimated_weights = jnp.split(
            jax.nn.softmax(logits, axis=1), [len(candidates), len(candidates) + 1], axis=1
        )
        exact_output = (
            weighted_row_sum(exact_weights.astype(values.dtype), values[candidates])
            + new_weight * value.astype(jnp.float32)[None]
        )
        return exact_output + self.values.sums(estimated_weights, keys.values)


class SearchedAttention(nnx.Module):
    """The attention of a layer that searches its keys in every decode step.

    Prefill is unchanged, since its queries read every key anyway.

    Attributes:
        dense: The dense attention.
        key_search: The search over the keys.
    """

    def __init__(self, dense: Attention, key_search: KeySearch):
        self.dense, self.key_search = dense, nnx.data(key_search)

    @property
    def window(self) -> int:
        """Number of positions to which a token attends, in tokens."""
        return self.dense.window

    def prefill(self, x: Hidden, cache_length: int):
        """Runs the prefill of the dense attention and encodes its keys and values.

        Args:
            x: Normalized hidden states, `(b, t, d)`.
            cache_length: Cache length of this layer, in tokens.

        Returns:
            The output `(b, t, d)`, the searchable keys, and the values `(b, cache_length, n, e)`.
        """
        output, keys, values = self.dense.prefill(x, cache_length)
        return output, self.key_search.encode(keys, values), values

    def step(
        self,
        x: Float[Array, "b d"],
        keys: SearchableKeyCache,
        values: KeysOrValues,
        length: Int[Array, ""],
    ):
        """Computes attention of one token with the search and writes the token to the cache.

        The output equals that of Attention.step while there are no more keys than candidates.

        Args:
            x: Normalized hidden states of the new token, `(b, d)`.
            keys: The searchable keys.
            values: Cached values, `(b, s, n, e)`.
            length: Number of cached tokens, which is the position of the new token.

        Returns:
            The output `(b, d)`, and the updated keys and values.
        """
        queries, key, value = self.dense.project(x[:, None], length[None])
        attend_heads = jax.vmap(
            jax.vmap(self.key_search.attend, (0, 1, 1, 0, 0, None)), (0, 0, 0, 0, 0, None)
        )
        output = attend_heads(
            self.grouped(queries), keys, values, key[:, 0], value[:, 0], length
        ).astype(x.dtype)
        key, value = ordered_after(output, key), ordered_after(output, value)
        new_keys = jax.tree.map(
            partial(write_slot, length=length), keys, self.key_search.encode(key, value)
        )
        return (
            mix(output.reshape(x.shape[0], -1), self.dense.output),
            new_keys,
            write_slot(values, value, length),
        )

    def grouped(self, queries: Float[Array, "b 1 h e"]) -> Float[Array, "b n g e"]:
        """Groups the queries of the heads that share keys.

        Args:
            queries: Queries, `(b, 1, h, e)`.

        Returns:
            The grouped queries, `(b, n, g, e)`.
        """
        return queries.reshape(len(queries), self.dense.kv_heads, -1, self.dense.head_width)

    def bytes_read(self, length: int, itemsize: int = 4) -> int:
        """Counts the bytes of keys and values that a decode step reads for one text.

        Args:
            length: Number of cached tokens.
            itemsize: Bytes per entry of keys and values.

        Returns:
            Number of bytes.
        """
        n, entry_bytes = self.dense.kv_heads, self.dense.head_width * itemsize
        encoded_bytes = 0
        for encoder in (
            self.key_search.keys,
            self.key_search.values,
        ):  # one float32 scale per key and per value
            encoded_bytes += (
                length * n * (len(encoder.projection) + 4)
                + encoder.projection.nbytes
                + encoder.mixing.nbytes
            )
        return encoded_bytes + 2 * n * min(self.key_search.candidates, length) * entry_bytes

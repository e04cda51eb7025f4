"""Small copies of the rows that predict their scores: low rank (HiRE-LR) and quantized (HiRE-Q).

The paper names the two and leaves rank, bits and fitting open (PAPER claim lr-and-q), so these are our choices. They
multiply: the factors of a low-rank copy may themselves be quantized.
"""

import functools
import math
import weakref
from collections.abc import Callable, Iterable
from dataclasses import field, replace
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from hire.axes import AnyArray, Array, Blocks, Codes, Fingerprint, Float, Indices, Int, Queries, Rows
from hire.kernels import rows as row_kernel
from hire.kernels.form import by_form, by_platform
from hire.pytrees import pytree
from hire.topk import check_count

Candidates = Float[Array, "b c"]


@runtime_checkable
class Estimator(Protocol):
    """What the search asks of a copy: any pytree with these is an estimator."""

    @property
    def shape(self) -> tuple[int, int]:
        """(m, d) of the rows that it stands for."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes that it stores."""
        ...

    @property
    def fingerprint(self) -> Fingerprint | None:
        """`fingerprint` of the rows that it was fitted to; None where nobody knows, as of rows that still grow."""
        ...

    def bytes_read(self, candidates: int) -> int:
        """Bytes of itself that it reads to nominate so many candidates (the exact rows are not in it)."""
        ...

    def scores(self, x: Queries) -> Float[Array, "b m"]:
        """Estimated score of every row."""
        ...

    def scores_at(self, x: Queries, indices: Indices) -> Candidates:
        """Estimated scores of the rows at indices (b, c) alone."""
        ...


HALF_TYPES = (jnp.bfloat16, jnp.float16)
THIN = 16  # queries up to which a CPU reads the rows once by multiply-and-reduce; beyond it XLA's matrix product is faster
REDUCES = jax.__version_info__ >= (0, 10, 2)  # an older XLA writes all those products to memory: fifty times as slow
SPLIT = 16  # parts in which a CPU sums rows for one query: faster than one product, into which XLA also fuses what made the weights
PIECE = 2**21  # entries that a CPU multiplies with several queries at a time, so that they stay in its last cache: 8 MB
FEW = 4  # queries up to which a CPU takes one after the other outside a loop, on all cores
MANY = 64  # queries beyond which writing quantized rows to memory as floats, for one large product, pays on a CPU
CHUNK = 512  # rows gathered at a time for several queries on a CPU: they stay in cache between the gather and the product


def product(one: AnyArray, other: AnyArray, pattern: str | None = None, precision: str | None = None) -> Float[Array, "..."]:
    """one @ other, or their einsum by a pattern, summed in float32.

    Two operands of one 16-bit float type are multiplied as they are, all others as float32: none is ever rounded to the type of
    the other. A CPU takes 16-bit operands as float32, too: for one query XLA fuses that cast into the product, which is then
    faster than its own product of bfloat16, and the XLA of jax 0.7 has none.
    """

    def multiply(one: AnyArray, other: AnyArray) -> Float[Array, "..."]:
        if pattern is None:
            return jnp.matmul(one, other, precision=precision, preferred_element_type=jnp.float32)
        return jnp.einsum(pattern, one, other, precision=precision, preferred_element_type=jnp.float32)

    if one.dtype == other.dtype and one.dtype in HALF_TYPES:
        return by_platform(lambda: multiply(one.astype(jnp.float32), other.astype(jnp.float32)), lambda: multiply(one, other))
    return multiply(one.astype(jnp.float32), other.astype(jnp.float32))


def check_bits(bits: int) -> None:
    """Raise ValueError unless bits is 4 or 8."""
    if bits not in (4, 8):
        raise ValueError(f"bits = {bits!r}: expected 4 or 8")


class OncePerArray:
    """A function of an array that is kept for as long as the array lives. numpy's arrays may change, so theirs is not kept."""

    def __init__(self, function: Callable[[AnyArray], Any]):
        self.function = function
        self.known: dict[int, tuple[weakref.ref, Any]] = {}

    def __call__(self, array: AnyArray) -> Any:
        if not isinstance(array, jax.Array) or isinstance(array, Tracer):
            return self.function(array)
        key = id(array)
        reference, value = self.known.get(key, (None, None))
        if reference is None or reference() is not array:
            value = self.function(array)
            self.known[key] = weakref.ref(array, lambda _: self.known.pop(key, None)), value
        return value


PRECISIONS = (jnp.float32, jnp.bfloat16, jnp.float16)


def precision_of(dtype: Any) -> int:
    """The place in PRECISIONS of a type. Types other than 16-bit floats meet queries as float32."""
    return PRECISIONS.index(dtype) if dtype in HALF_TYPES else 0


def fingerprint(rows: Rows | Blocks) -> Fingerprint:
    """Which rows these are: their type (its place in PRECISIONS), then for each of PRECISIONS a checksum of 64 bits of all entries
    rounded to it. So a copy of rows in another of these types is known as the same rows (see `same_rows`).
    """
    return checksums(rows, precision_of(rows.dtype))


@functools.partial(jax.jit, static_argnames="precision")
def checksums(rows: Rows | Blocks, precision: int) -> Fingerprint:
    run = next(size for size in range(32, 0, -1) if rows.shape[-1] % size == 0)
    place = jax.lax.iota(jnp.uint32, rows.size).reshape(*rows.shape[:-1], -1, run) * jnp.uint32(0x9E3779B9)
    exact = jnp.asarray(rows).astype(jnp.float32).reshape(place.shape)
    words = [jnp.full((), precision, jnp.uint32)]
    for dtype in PRECISIONS:
        whole = jnp.uint32 if dtype == jnp.float32 else jnp.uint16
        bits = jax.lax.bitcast_convert_type(exact.astype(dtype), whole).astype(jnp.uint32)
        mixed = (bits ^ place) * jnp.uint32(0x85EBCA6B)
        mixed = (mixed ^ jax.lax.shift_right_logical(mixed, jnp.uint32(13))) * jnp.uint32(0xC2B2AE35)
        # In short runs first: of longer ones XLA writes out what it is to add. Whole numbers give the same in any order.
        again = (mixed ^ jax.lax.shift_right_logical(mixed, jnp.uint32(16))) * jnp.uint32(0x27D4EB2F)
        sums = [jnp.sum(part, axis=-1, dtype=jnp.uint32) for part in (mixed, again)]
        words += [jnp.sum(part, dtype=jnp.uint32) for part in jax.lax.optimization_barrier(sums)]
    return jnp.stack(words)


def same_rows(one: Fingerprint, other: Fingerprint) -> bool:
    """Whether two fingerprints are of the same rows, of which one may be a copy of the other in 16 bits."""
    one, other = np.asarray(one), np.asarray(other)  # also within jax.jit, where to take one word of a jax array is traced
    first, second = int(one[0]), int(other[0])
    if first and second and first != second:  # a bfloat16 and a float16 copy: nobody can tell
        return False
    word = 1 + 2 * max(first, second)
    return np.array_equal(one[word : word + 2], other[word : word + 2])


known_fingerprint = OncePerArray(fingerprint)


def check_finite(name: str, rows: Rows) -> None:
    """Raise ValueError, naming the first row, unless all entries of rows (m, d) are finite. Inside jax.jit it cannot tell."""
    if isinstance(rows, Tracer):
        return
    finite = np.isfinite(known_largest(rows))
    if not finite.all():
        raise ValueError(f"{name}: row {int(np.argmin(finite))} holds a value that is not finite: expected finite rows")


@jax.jit
def largest_of_rows(rows: Rows) -> Float[Array, " m"]:
    """The size of each row's largest entry, inf for a row that is not finite: a CPU's maximum may pass over a NaN."""
    exact = rows.astype(jnp.float32)
    return jnp.max(jnp.where(jnp.isfinite(exact), jnp.abs(exact), jnp.inf), axis=-1)


@OncePerArray
def known_largest(rows: Rows) -> np.ndarray:
    with jax.ensure_compile_time_eval():
        return np.asarray(largest_of_rows(rows))


def unpack(codes: Codes, bits: int, width: int) -> Float[Array, "... d"]:
    """Codes (..., width at 8 bits, half of it at 4) as float32 whole numbers (..., width)."""
    if bits == 8:
        return codes.astype(jnp.float32)
    return jnp.concatenate(halves(codes), axis=-1)[..., :width].astype(jnp.float32)


def halves(codes: Codes) -> tuple[Codes, Codes]:
    """The two int8 numbers of every byte: column j shares one with column j + half, so that each half is one contiguous run."""
    signed = jax.lax.bitcast_convert_type(codes, jnp.int8)
    low = jax.lax.shift_right_arithmetic(jax.lax.shift_left(signed, jnp.int8(4)), jnp.int8(4))
    return low, jax.lax.shift_right_arithmetic(signed, jnp.int8(4))


CLIPPED = tuple(1 - 0.05 * step for step in range(9))  # of a row's largest entry, what the highest of 15 steps may stand for


@functools.partial(jax.jit, static_argnames="bits")  # one program, which holds nothing as large as the rows beside them
def rounded(rows: Rows, bits: int, spread: Float[AnyArray, "d d"] | None = None) -> tuple[Codes, Float[Array, " m"]]:
    """The codes of rows (m, d) and their scales (m,): of several scales for 4 bits, the one with the least squared error; then,
    with the `spread` of queries, a root of their second moment, the one with which these codes err least in scores.
    """
    steps, width = 2 ** (bits - 1) - 1, rows.shape[1]
    exact = rows.astype(jnp.float32)
    size = jnp.abs(exact)
    largest = jnp.max(size, axis=-1)
    # A row of which a step would not be a normal number, which a CPU takes for 0, is kept as 0.
    whole = jnp.where(largest / steps >= jnp.finfo(jnp.float32).tiny, largest, 1.0) / steps

    def error(scale: Float[Array, " m"]) -> Float[Array, " m"]:
        rest = size - jnp.minimum(jnp.round(size / scale[:, None]), steps) * scale[:, None]  # without signs it is one pass on a CPU
        return jnp.sum(rest**2, axis=-1)

    scale, least = whole, error(whole)
    for share in CLIPPED[1:] if bits == 4 else ():  # where a few large entries would leave the others one or two steps
        tried = error(share * whole)
        scale, least = jnp.where(tried < least, share * whole, scale), jnp.minimum(tried, least)
    codes = jnp.clip(jnp.round(exact / scale[:, None]), -steps, steps)
    if spread is not None:
        told = codes @ spread
        size = jnp.sum(told**2, axis=-1)
        better = jnp.sum(told * (exact @ spread), axis=-1) / jnp.where(size > 0, size, 1.0)
        usable = (size > 0) & jnp.isfinite(better) & (jnp.abs(better) >= jnp.finfo(jnp.float32).tiny)
        scale = jnp.where(usable, better, scale)
    codes = codes.astype(jnp.int8)
    if bits == 8:
        return codes, scale
    low, high = jnp.split(jnp.pad(codes, ((0, 0), (0, width % 2))), 2, axis=1)
    packed = (low & jnp.int8(15)) | jax.lax.shift_left(high, jnp.int8(4))
    return jax.lax.bitcast_convert_type(packed, jnp.uint8), scale


@pytree
class Quantized:
    """HiRE-Q: every row as whole numbers of 8 or 4 bits times one float32 scale of its own.

    `error_bounds`, which only proofs read: see `error_bounds`. Where they are None, nothing can be proved.
    """

    codes: Codes
    scale: Float[Array, " m"]
    fingerprint: Fingerprint | None
    bits: int = field(metadata=dict(static=True))
    width: int = field(metadata=dict(static=True))
    error_bounds: Float[Array, " m"] | None = None

    @classmethod
    def fit(cls, rows: Rows, bits: int, *, calibration: Queries | Iterable[Queries] | None = None) -> "Quantized":
        """Round each of rows (m, d) to the nearest of 2^bits - 1 even steps, up to its largest entry or, at 4 bits, up to what errs
        least in all.

        bits is 8 (one byte an entry) or 4 (two entries packed in a byte). With calibration (queries (n, d), or an iterator of
        batches of them) scales are chosen for the scores of such queries instead of the entries. PAPER claim lr-and-q; scales are
        our choice. Rows with a few large entries are better turned first: LowRank.fit at full rank, with directions="random".
        Raises ValueError for other bits, for rows or calibration that are not finite, and for calibration of another width.
        """
        check_bits(bits)
        check_finite("rows", rows)
        known = None if calibration is None else np.linalg.cholesky(covariance_of(calibration, (rows.shape[0], rows.shape[1])))
        codes, scale = rounded(rows, bits, None if known is None else jnp.asarray(known, jnp.float32))
        copy = cls(codes, scale, known_fingerprint(rows), bits, rows.shape[1])
        return replace(copy, error_bounds=error_bounds(rows, copy))

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.width

    @property
    def dtype(self) -> np.dtype:
        """Of the rows that it stands for, unpacked."""
        return np.dtype(np.float32)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales: all that a search reads. Error bounds, which only proofs read, are 4 bytes a row more."""
        return self.codes.nbytes + self.scale.nbytes

    def __getitem__(self, some: slice) -> "Quantized":
        """Some of the rows, which keep the fingerprint of all."""
        bounds = None if self.error_bounds is None else self.error_bounds[some]
        return replace(self, codes=self.codes[some], scale=self.scale[some], error_bounds=bounds)

    def bytes_read(self, candidates: int) -> int:
        return self.nbytes

    def scores(self, x: Queries) -> Float[Array, "b m"]:
        x, (b, d) = x.astype(jnp.float32), (len(x), self.width)

        def whole(x: Queries) -> Float[Array, "_ m"]:
            return row_scores(x, unpack(self.codes, self.bits, d))

        def one(x: Queries) -> Float[Array, "1 m"]:
            """For one query XLA turns codes into floats as it reads, but not what it puts together of halves: it writes those."""
            if self.bits == 8:
                return whole(x)
            both = zip(jnp.split(jnp.pad(x, ((0, 0), (0, d % 2))), 2, axis=1), halves(self.codes), strict=True)
            low, high = jax.lax.optimization_barrier([product(part, codes.astype(jnp.float32).T) for part, codes in both])
            return low + high

        def parts() -> Float[Array, "b m"]:
            if 1 <= b <= FEW:
                return jnp.concatenate([one(x[i : i + 1]) for i in range(b)])
            if self.bits == 8 and b <= THIN:
                return in_one_pass(x, self.codes)
            return in_pieces(x, self.codes, lambda codes: unpack(codes, self.bits, d))

        return (by_platform(parts, lambda: whole(x)) if b <= MANY else whole(x)) * self.scale[None]

    def scores_at(self, x: Queries, indices: Indices) -> Candidates:
        return row_scores_at(x, self, indices)


def row_scores(x: Queries, rows: Rows | Quantized) -> Float[Array, "b m"]:
    """Exact scores of every row, float32: queries (b, d) against rows (m, d), which meet as `product` says.

    The form is the fastest one on a CPU at that batch (`make bench` times the others).
    """
    if isinstance(rows, Quantized):
        return rows.scores(x)

    def dot() -> Float[Array, "b m"]:
        return product(x, rows.T)  # for one query XLA fuses a cast of the rows into this form, and copies them first in the others

    return by_platform(lambda: in_one_pass(x, rows), dot) if 1 < len(x) <= THIN else dot()


def in_one_pass(x: Queries, rows: Rows | Codes) -> Float[Array, "b m"]:
    """Scores of rows (m, d), also of 8-bit codes, for 2 to THIN queries on a CPU."""
    if not REDUCES:
        return in_pieces(x, rows, lambda part: part.astype(jnp.float32))
    # For two matrices and the same queries XLA would write these out, once for every row: a hundred times as slow.
    x, rows = jax.lax.optimization_barrier((x, rows))
    return jnp.sum(rows[:, None].astype(jnp.float32) * x[None].astype(jnp.float32), axis=-1).T


def in_pieces(x: Queries, rows: Rows | Codes, floats: Callable[..., Array] = jnp.asarray) -> Float[Array, "b m"]:
    """Scores of rows (m, _), a piece after the other that stays in cache; `floats` makes rows (_, d) of a piece of them.

    XLA's own product writes quantized rows to memory as floats first.
    """
    m, d = len(rows), x.shape[1]
    piece = next(size for size in range(min(m, max(1, PIECE // d)), 0, -1) if m % size == 0)
    if piece < min(m, 64):
        return product(x, floats(rows).T)
    products = jax.lax.map(lambda part: product(floats(part), x.T), rows.reshape(-1, piece, rows.shape[1]))
    return products.reshape(m, len(x)).T


def row_scores_at(
    x: Queries, rows: Rows | Blocks | Quantized, indices: Indices, group: int = 1, form: str = "auto"
) -> Float[Array, "b _"]:
    """Exact scores (b, c * group), float32, of the rows at indices (b, c): only those rows are read.

    With `group`, indices are of groups of so many consecutive rows, which are read as one. A kernel takes single rows, in
    hire.kernels.rows.blocks; `form` as in `by_form`.
    """
    if not isinstance(rows, Quantized) and rows.ndim == 3:

        def plain(x: Queries, rows: Blocks, indices: Indices) -> Float[Array, "b _"]:
            return row_scores_at(x, rows.reshape(len(rows), -1)[:, : x.shape[1]], indices, group)

        return by_form(form, plain, row_kernel.scores, x, rows, indices)
    return each(lambda x, indices: scores_among(x[None], rows, indices, group)[0], x, indices)


def scores_among(x: Queries, rows: Rows | Quantized, indices: Int[AnyArray, " c"], group: int = 1) -> Float[Array, "b _"]:
    """row_scores_at of the same indices (c,) for all queries: their rows are read once."""
    x = jnp.asarray(x)

    def whole() -> Float[Array, "b _"]:
        return product(x, taken(rows, indices, group).T)

    def in_chunks() -> Float[Array, "b _"]:
        parts = jax.lax.map(lambda part: product(taken(rows, part, group), x.T), chunks(indices, max(1, CHUNK // group)))
        return parts.reshape(-1, len(x)).T[:, : indices.size * group]

    found = whole() if len(x) == 1 else by_platform(in_chunks, whole)  # outside a loop XLA gathers on all cores
    return found * scales(rows, indices, group)


def each(function: Callable, *parts: AnyArray) -> Array:
    """A function of every query's part of arrays (b, …): of all at once or, on a CPU with its caches, of one after the other."""
    b = len(parts[0])

    def one_by_one() -> Array:
        return jax.lax.map(lambda one: function(*one), parts) if b > FEW else unrolled()

    def unrolled() -> Array:
        return jnp.stack([function(*(part[i] for part in parts)) for i in range(b)])

    return unrolled() if b == 1 else by_platform(one_by_one, lambda: jax.vmap(function)(*parts))


def taken(rows: Rows | Quantized, indices: Int[AnyArray, " c"], group: int) -> Float[Array, "_ d"]:
    """The rows (c * group, d) of the groups at indices (c,), to be multiplied by their `scales`."""
    if isinstance(rows, Quantized):
        return unpack(groups_at(rows.codes, indices, group), rows.bits, rows.width)
    return groups_at(jnp.asarray(rows), indices, group)


def scales(rows: Rows | Quantized, indices: Int[AnyArray, " c"], group: int) -> Float[Array, "1 _"] | float:
    """Of the rows that are `taken`: kept out of the product, before which a CPU would write scaled rows to memory."""
    return rows.scale.reshape(-1, group)[indices].reshape(1, -1) if isinstance(rows, Quantized) else 1.0


def groups_at(rows: Array, indices: Int[AnyArray, " c"], group: int) -> Array:
    return rows.reshape(-1, group, rows.shape[1])[indices].reshape(-1, rows.shape[1])


def row_nbytes(rows: Rows | Blocks | Quantized, width: int) -> int:
    """Bytes of one row (of so many entries, whatever a block is filled up with)."""
    return rows.nbytes // rows.shape[0] if isinstance(rows, Quantized) else width * rows.dtype.itemsize


def chunks(values: AnyArray, size: int) -> AnyArray:
    """values (c,) in pieces (_, size) of which the last is filled up with zeros."""
    return jnp.pad(values, (0, -len(values) % size)).reshape(-1, size)


def row_sums(weights: Float[AnyArray, "*b m"], rows: Rows | Quantized) -> Float[Array, "*b d"]:
    """Sums, float32, of all rows (m, d) times their weights (*b, m)."""
    if isinstance(rows, Quantized):
        weights = weights * jnp.expand_dims(rows.scale, range(weights.ndim - 1))
        rows = unpack(rows.codes, rows.bits, rows.width)
    m, d = rows.shape
    if math.prod(weights.shape[:-1]) > 1 or m % SPLIT:
        return product(weights, rows)

    def split() -> Float[Array, "*b d"]:
        parts = product(weights.reshape(SPLIT, -1), rows.reshape(SPLIT, -1, d), "pm,pmd->pd")
        return parts.sum(0).reshape(*weights.shape[:-1], d)

    return by_platform(split, lambda: product(weights, rows))


def row_sums_at(weights: Float[AnyArray, "b _"], rows: Rows | Quantized, indices: Indices, group: int = 1) -> Float[Array, "b d"]:
    """Sums, float32, of the rows at indices (b, c) times their weights (b, c * group): only those rows are read."""
    return each(lambda weights, indices: sums_among(weights[None], rows, indices, group)[0], weights, indices)


def sums_among(
    weights: Float[AnyArray, "b _"], rows: Rows | Quantized, indices: Int[AnyArray, " c"], group: int = 1
) -> Float[Array, "b d"]:
    """row_sums_at of the same indices (c,) for all weights (b, c * group): their rows are read once."""
    weights = jnp.asarray(weights) * scales(rows, indices, group)

    def whole() -> Float[Array, "b d"]:
        return product(weights, taken(rows, indices, group))

    def in_chunks() -> Float[Array, "b d"]:
        places = chunks(indices, max(1, CHUNK // group))
        shares = jnp.pad(weights, ((0, 0), (0, places.size * group - weights.shape[1])))
        pieces = shares.reshape(len(weights), len(places), -1).swapaxes(0, 1)
        # Added within the loop, the product would be fused into the sum and take three times as long.
        return jax.lax.map(lambda part: product(part[0], taken(rows, part[1], group)), (pieces, places)).sum(0)

    return whole() if len(weights) == 1 else by_platform(in_chunks, whole)


@pytree
class LowRank:
    """HiRE-LR: rows ≈ factors (m, r) @ projection (r, d); both plain or quantized.

    `error_bounds`, which only proofs read: see `error_bounds`. Low rank proves next to nothing: what it leaves out of a row is far
    larger than the distance of the k-th score from the next. Quantized rows of 8 bits prove most answers.
    """

    projection: Float[Array, "r d"] | Quantized
    factors: Float[Array, "m r"] | Quantized
    fingerprint: Fingerprint | None
    error_bounds: Float[Array, " m"] | None = None

    @classmethod
    def fit(
        cls,
        rows: Rows,
        rank: int,
        *,
        calibration: Queries | Iterable[Queries] | None = None,
        bits: int | None = None,
        ridge: float = 1e-3,
        directions: str = "leading",
    ) -> "LowRank":
        """The rank-r copy of rows (m, d) with the least squared error of scores.

        With calibration (queries (n, d), or an iterator of batches of them) the error is averaged over those queries:
        for C = E[x xᵀ] = L Lᵀ it keeps the leading directions of rows @ L, and so spends its rank where queries
        really lie. Without, C is the identity and this is the plain SVD. `ridge` adds that share of C's mean
        variance to its diagonal, so that a direction no calibration query took is not dropped altogether.
        bits = 8 or 4 quantizes the factors, and the projection to 8 bits; None keeps the factors in the type of the rows. Factors
        of 4 bits are turned by a random rotation first, or the few large ones of a row would take all its steps.

        Other `directions` of queries may be kept: the "first" r entries (as in Spark Transformer, arXiv 2506.06644) or "random"
        ones; the factors are the best for those. PAPER claims estimator and lr-and-q; the fit is our choice.

        Give it queries as the search will see them: hidden states after the final norm, for a softmax. Without calibration a copy
        of a trained embedding needs many times as many candidates for the same recall. More queries help up to about 20 a column:
        at a width of 576, 10,000 give recall 0.994, 500 give 0.989 and 100 give 0.971 (SmolLM2-135M).

        Raises ValueError when rank is not in 1..min(m, d), bits or directions do not exist, rows or calibration are not finite, the
        calibration is not of the rows' width, or rows are stored (d, v), as Flax stores a head.
        """
        m, d = rows.shape
        if d > MOST_COLUMNS and d > m:
            raise ValueError(f"rows of shape {(m, d)}: expected (v, d), a row a token; are they stored (d, v)? pass rows.T")
        rank = check_count("rank", rank, 1, min(m, d), "the smaller side of the rows")
        if bits is not None:
            check_bits(bits)
        check_finite("rows", rows)
        covariance = covariance_of(calibration, (m, d), ridge)
        ways = dict(leading=leading_directions, first=lambda *_: np.eye(rank, d), random=lambda *_: orthonormal(d, rank).T)
        if directions not in ways:
            raise ValueError(f"directions = {directions!r}: expected leading, first or random")
        known, given = known_fingerprint(rows), rows
        rows, exponent = near_one(rows)
        kept = ways[directions](rows, covariance, rank)
        if bits == 4:
            kept = orthonormal(rank, rank).T @ kept  # turned over, or at full rank it would undo "random"
        kept = kept * 2.0 ** -np.frexp(np.abs(kept).max())[1]  # the factors take the rest
        # Of queries known by P x alone, E[x | P x] = C Pᵀ (P C Pᵀ)⁻¹ P x is the best guess, so these are the best factors for P.
        mixing = np.linalg.solve(kept @ covariance @ kept.T, kept @ covariance).T
        projection, factors = jnp.asarray(kept, jnp.float32), product(rows, jnp.asarray(mixing, jnp.float32), "md,dr->mr")
        factors = factors * jnp.float32(2.0 ** (exponent // 2)) * jnp.float32(2.0 ** (exponent - exponent // 2))
        if bits is None:
            copy = cls(projection, factors.astype(given.dtype if given.dtype in HALF_TYPES else jnp.float32), known)
            check_finite(f"factors in the rows' type {given.dtype}", jnp.asarray(copy.factors))
        else:
            copy = cls(quantized(projection, 8), quantized(factors, bits), known)
        return replace(copy, error_bounds=error_bounds(given, copy))

    @property
    def shape(self) -> tuple[int, int]:
        return self.factors.shape[0], self.projection.shape[1]

    @property
    def nbytes(self) -> int:
        return self.factors.nbytes + self.projection.nbytes

    def bytes_read(self, candidates: int) -> int:
        return self.nbytes

    def scores(self, x: Queries) -> Float[Array, "b m"]:
        return row_scores(row_scores(x, self.projection), self.factors)

    def scores_at(self, x: Queries, indices: Indices) -> Candidates:
        return row_scores_at(row_scores(x, self.projection), self.factors, indices)


MOST_COLUMNS = 4096  # of a matrix with more columns than rows: any more, and it is a vocabulary turned over


def quantized(rows: Rows, bits: int) -> Quantized:
    """A part of an estimator in fewer bits: without a fingerprint or bounds of its own."""
    codes, scale = rounded(rows, bits)
    return Quantized(codes, scale, None, bits, rows.shape[1])


def near_one(rows: Rows) -> tuple[Rows, int]:
    """Rows times a power of two, and that power's exponent with the sign turned, where their squares may not be normal numbers."""
    if isinstance(rows, Tracer):
        return rows, 0
    largest = float(known_largest(rows).max())
    exponent = math.frexp(largest)[1]
    if abs(exponent) <= 30 or not 0 < largest < math.inf:
        return rows, 0
    half = 2.0 ** -(exponent // 2), 2.0 ** -(exponent - exponent // 2)
    return jnp.asarray(rows).astype(jnp.float32) * jnp.float32(half[0]) * jnp.float32(half[1]), exponent


def covariance_of(calibration: Queries | Iterable[Queries] | None, shape: tuple[int, int], ridge: float = 1e-3) -> np.ndarray:
    """The second moment (d, d) of queries of rows of shape (m, d), with that share of its mean variance added to its diagonal;
    without queries the same for every direction. Raises ValueError as second_moment, and for a ridge that leaves it singular.
    """
    d = shape[1]
    if not 0 <= ridge < math.inf:
        raise ValueError(f"ridge = {ridge!r}: expected a finite number of at least 0")
    found = np.eye(d) if calibration is None else second_moment(calibration, shape)
    if not np.trace(found) > 0:
        raise ValueError("calibration holds nothing but zeros: expected queries as the search will see them")
    return found / np.trace(found) * d + ridge * np.eye(d)


def leading_directions(rows: Rows, covariance: np.ndarray, rank: int) -> np.ndarray:
    """The directions (r, d) of queries of this second moment (d, d) that say most of their scores, each of variance 1."""
    # The d x d problem in float64: with G = rowsᵀ rows, the right singular vectors of rows @ L are the
    # eigenvectors of Lᵀ G L, and the (m, d) matrix itself is only multiplied.
    lower = np.linalg.cholesky(covariance)
    _, vectors = np.linalg.eigh(lower.T @ gram(rows) @ lower)
    return np.linalg.solve(lower.T, vectors[:, ::-1][:, :rank]).T


def product_with_itself(rows: Rows) -> np.ndarray:
    return np.asarray(product(rows, rows, "md,me->de", precision="highest"), np.float64)


gram = OncePerArray(product_with_itself)  # rowsᵀ rows (d, d) in float64: most of what a fit takes, and many are fitted to one


def orthonormal(d: int, rank: int) -> np.ndarray:
    """Random directions (d, r), always the same, of length 1 and at right angles."""
    return np.linalg.qr(np.random.default_rng(0).normal(size=(d, rank)))[0]


def quantized_part(estimator: Estimator) -> Quantized | None:
    """The quantized rows whose product with `projected` queries the estimator's scores are, or None where it has none."""
    rows = estimator.factors if isinstance(estimator, LowRank) else estimator
    return rows if isinstance(rows, Quantized) else None


def projected(x: Queries, estimator: Estimator) -> Float[AnyArray, "b _"]:
    """The queries (b, d) as the estimator's rows take them: (b, r) where it is of low rank."""
    return row_scores(x, estimator.projection) if isinstance(estimator, LowRank) else x


def second_moment(queries: Queries | Iterable[Queries], shape: tuple[int, int]) -> np.ndarray:
    """E[x xᵀ] (d, d) in float64 over queries (n, d), of rows of shape (m, d), or an iterator of batches of them.

    Raises ValueError when a batch is not (n, d), or when there are no queries or one that is not finite.
    """
    (m, width), total, count = shape, None, 0
    for batch in [queries] if isinstance(queries, AnyArray) else queries:
        if batch.ndim != 2 or batch.shape[1] != width:
            turned = " (rows stored (d, v)? pass rows.T)" if batch.ndim == 2 and batch.shape[1] == m else ""
            raise ValueError(f"calibration of shape {batch.shape}: expected (n, {width}), the width of rows {(m, width)}{turned}")
        exact = np.asarray(batch, np.float64)
        total = exact.T @ exact + (0 if total is None else total)
        count += len(exact)
    if total is None or not count:
        raise ValueError("calibration has 0 queries: expected at least one")
    if not np.isfinite(total).all():
        raise ValueError("calibration holds a value that is not finite: expected finite queries")
    return total / count


UNIT_ROUNDOFF = 2.0**-24  # of float32
UNDERFLOW = 2.0**-112  # above what sums of products of up to 2^20 terms lose where terms are below the smallest normal number
BOUNDS_AT_ONCE = 2**26  # entries of the rows whose bounds are computed together: 256 MB where they are of low rank


def length(vectors: Float[Array, "*b d"]) -> Float[Array, "*b"]:
    """Their lengths, no less than they are: of vectors scaled by their largest entry, so that no square over- or underflows."""
    [size] = largest_entries(vectors)
    [squared] = scaled_squares([size], vectors)
    return length_of_square(squared, size, vectors.shape[-1])


# Programs of their own: fused with what is made of them, XLA takes 20 times as long for largest entries and sums.
@jax.jit
def largest_entries(*some: Float[Array, "..."]) -> list[Float[Array, "..."]]:
    """Of each vector, within the numbers whose inverse is a normal number: by it XLA multiplies also where it is told to divide."""
    return [jnp.clip(jnp.max(jnp.abs(vectors), axis=-1), 2.0**-100, 2.0**100) for vectors in some]


@jax.jit
def scaled_squares(sizes: list[Float[Array, "..."]], *some: Float[Array, "..."]) -> list[Float[Array, "..."]]:
    """The squared lengths of vectors over their sizes."""
    inverses = jax.lax.optimization_barrier([1 / size for size in sizes])
    return [jnp.sum((vectors * inverse[..., None]) ** 2, axis=-1) for vectors, inverse in zip(some, inverses, strict=True)]


def length_of_square(squared: Float[Array, "*b"], size: Float[Array, "*b"], width: int) -> Float[Array, "*b"]:
    """The lengths, rounded up, of vectors of so many entries whose scaled square it is."""
    return jnp.sqrt(squared) * size * jnp.float32(1 + (width + 16) * UNIT_ROUNDOFF)


@jax.jit
def largest_of_copy(rows: Rows, rebuilt: Rows | Quantized, *parts: AnyArray | Quantized) -> list[Float[Array, "_"]]:
    return largest_entries(*vectors_of_copy(rows, rebuilt, *parts))


@jax.jit
def squares_of_copy(
    sizes: list[Float[Array, "_"]], rows: Rows, rebuilt: Rows | Quantized, *parts: AnyArray | Quantized
) -> list[Float[Array, "_"]]:
    return scaled_squares(sizes, *vectors_of_copy(rows, rebuilt, *parts))


def vectors_of_copy(rows: Rows, rebuilt: Rows | Quantized, *parts: AnyArray | Quantized) -> list[Float[Array, "_ _"]]:
    """What a copy leaves out of rows (m, d), the copy, the rows, and the parts that an estimate is made of."""
    exact, copy = floats(rows), floats(rebuilt)
    return [exact - copy, copy, exact, *map(floats, parts)]


def error_bounds(rows: Rows, estimator: "LowRank | Quantized") -> Float[Array, " m"]:
    """How far each row's estimated score may lie from its own, all rounding included, for a query of length 1 whose largest entry,
    after scaling, is 1 or more: inf where that is not known to be finite.

    A score is the estimate plus the query's product with what the copy leaves out of the row, at most the product of their lengths
    (Cauchy and Schwarz). Estimates are sums in float32 of products of float32 numbers, whatever the types of the parts.
    """
    size = max(1, BOUNDS_AT_ONCE // rows.shape[1])
    parts = [part_bounds(rows[at : at + size], part_of(estimator, slice(at, at + size))) for at in range(0, len(rows), size)]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts)


def part_of(estimator: "LowRank | Quantized", some: slice) -> "LowRank | Quantized":
    return estimator[some] if isinstance(estimator, Quantized) else replace(estimator, factors=estimator.factors[some])


def part_bounds(rows: Rows, estimator: "LowRank | Quantized") -> Float[Array, " m"]:
    """`error_bounds` of a few rows."""
    rows, parts = jnp.asarray(rows), []
    rebuilt: Array | Quantized
    if isinstance(estimator, LowRank):
        rebuilt, parts = product_of_parts(estimator), [estimator.factors, estimator.projection]
    else:
        rebuilt = estimator
    sizes = largest_of_copy(rows, rebuilt, *parts)
    squares = squares_of_copy(sizes, rows, rebuilt, *parts)
    widths = (rows.shape[1],) * 3 + tuple([part.shape[1] for part in parts])
    return bounds_of_squares(squares, sizes, widths)


@functools.partial(jax.jit, static_argnames="widths")
def bounds_of_squares(
    squares: list[Float[Array, "_"]], sizes: list[Float[Array, "_"]], widths: tuple[int, ...]
) -> Float[Array, " m"]:
    """Error bounds by the scaled squares of `vectors_of_copy`, their largest entries and their widths."""
    left_out, own, whole, *parts = map(length_of_square, squares, sizes, widths)
    width, span = widths[0], jnp.float32(1.0)
    if parts:  # an estimate is made of sums of products of these lengths
        own, span = parts[0], length(parts[1])
    # A sum of n products, in any order, is off by n / 2^24 of the lengths of both sides at most. An estimate is two such sums of up
    # to d, what was rebuilt a third; the rest is for scales, comparisons and the lengths.
    summed = UNIT_ROUNDOFF * (3 * width + 40) * own * span
    bounds = (1 + 16 * UNIT_ROUNDOFF) * (left_out + summed + exact_rounding(width) * whole)
    bounds += UNDERFLOW * width * (1 + own) * (1 + span)
    return jnp.where(jnp.isfinite(bounds), bounds, jnp.inf)


@jax.jit
def product_of_parts(estimator: "LowRank") -> Float[Array, "m d"]:
    return jnp.matmul(floats(estimator.factors), floats(estimator.projection), precision="highest")


def floats(part: AnyArray | Quantized) -> Float[Array, "_ _"]:
    """A matrix, or the one that codes and scales stand for, in float32."""
    if isinstance(part, Quantized):
        return unpack(part.codes, part.bits, part.width) * part.scale[:, None]
    return jnp.asarray(part).astype(jnp.float32)


def exact_rounding(width: int) -> float:
    """What `hire.certify.pairwise_dot` errs at most, for a row and a query of length 1: of halves added to halves it is a rounding
    a step, and one each where row or query come in float64.
    """
    return UNIT_ROUNDOFF * (math.ceil(math.log2(width)) + 8)

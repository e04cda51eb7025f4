"""Small copies of the rows that predict their scores: low rank (HiRE-LR) and quantized (HiRE-Q).

The paper names the two and leaves rank, bits and fitting open (PAPER claim lr-and-q), so these are our choices. They
multiply: the factors of a low-rank copy may themselves be quantized.
"""

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from hire.axes import AnyArray, Array, Blocks, Codes, Float, Indices, Int, Queries, Rows, UInt32
from hire.kernels import rows as row_kernel
from hire.kernels.form import by_form, by_platform
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
    def fingerprint(self) -> UInt32[Array, ""]:
        """`fingerprint` of the rows that it was fitted to."""
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


THIN = 16  # queries up to which a CPU reads the rows once by multiply-and-reduce; beyond it XLA's matrix product is faster
REDUCES = jax.__version_info__ >= (0, 10, 2)  # an older XLA writes all those products to memory: fifty times as slow
SPLIT = 16  # parts in which a CPU sums rows for one query: faster than one product, into which XLA also fuses what made the weights
PIECE = 2**21  # entries that a CPU multiplies with several queries at a time, so that they stay in its last cache: 8 MB
FEW = 4  # queries up to which a CPU takes one after the other outside a loop, on all cores
MANY = 64  # queries beyond which writing quantized rows to memory as floats, for one large product, pays on a CPU
CHUNK = 512  # rows gathered at a time for several queries on a CPU: they stay in cache between the gather and the product


def product(one: AnyArray, other: AnyArray, pattern: str | None = None, precision: str | None = None) -> Float[Array, "..."]:
    """one @ other, or their einsum by a pattern, summed in float32.

    A CPU takes 16-bit operands as float32: for one query XLA fuses that cast into the product, which is then faster than its own
    product of bfloat16, and the XLA of jax 0.7 has none.
    """

    def multiply(one: AnyArray, other: AnyArray) -> Float[Array, "..."]:
        if pattern is None:
            return jnp.matmul(one, other, precision=precision, preferred_element_type=jnp.float32)
        return jnp.einsum(pattern, one, other, precision=precision, preferred_element_type=jnp.float32)

    if one.dtype == other.dtype == jnp.float32:
        return multiply(one, other)
    return by_platform(lambda: multiply(one.astype(jnp.float32), other.astype(jnp.float32)), lambda: multiply(one, other))


def check_bits(bits: int) -> None:
    """Raise ValueError unless bits is 4 or 8."""
    if bits not in (4, 8):
        raise ValueError(f"bits = {bits!r}: expected 4 or 8")


@jax.jit
def fingerprint(rows: Rows) -> UInt32[Array, ""]:
    """A checksum of rows (m, d) rounded to bfloat16, so that a copy of them in another precision is still taken for them."""
    run = next(size for size in range(32, 0, -1) if rows.shape[-1] % size == 0)
    rows = rows.reshape(*rows.shape[:-1], -1, run)  # summed in short runs first: of longer ones XLA writes out what it is to add
    bits = jax.lax.bitcast_convert_type(rows.astype(jnp.bfloat16), jnp.uint16).astype(jnp.uint32)
    place = jax.lax.iota(jnp.uint32, rows.size).reshape(rows.shape)
    parts = jax.lax.optimization_barrier(jnp.sum(bits * (2 * place + 1), axis=-1, dtype=jnp.uint32))
    return jnp.sum(parts, dtype=jnp.uint32)  # whole numbers modulo 2^32: the same in any order of summation


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
    whole = jnp.where(largest > 0, largest, 1.0) / steps

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
        scale = jnp.where(size > 0, jnp.sum(told * (exact @ spread), axis=-1) / size, scale)
    codes = codes.astype(jnp.int8)
    if bits == 8:
        return codes, scale
    low, high = jnp.split(jnp.pad(codes, ((0, 0), (0, width % 2))), 2, axis=1)
    packed = (low & jnp.int8(15)) | jax.lax.shift_left(high, jnp.int8(4))
    return jax.lax.bitcast_convert_type(packed, jnp.uint8), scale


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Quantized:
    """HiRE-Q: every row as whole numbers of 8 or 4 bits times one float32 scale of its own."""

    codes: Codes
    scale: Float[Array, " m"]
    fingerprint: UInt32[Array, ""]
    bits: int = field(metadata=dict(static=True))
    width: int = field(metadata=dict(static=True))

    @classmethod
    def fit(cls, rows: Rows, bits: int, *, calibration: Queries | Iterable[Queries] | None = None) -> "Quantized":
        """Round each of rows (m, d) to the nearest of 2^bits - 1 even steps, up to its largest entry or, at 4 bits, up to what errs
        least in all.

        bits is 8 (one byte an entry) or 4 (two entries packed in a byte). With calibration (queries (n, d), or an iterator of
        batches of them) scales are chosen for the scores of such queries instead of the entries. PAPER claim lr-and-q; scales are
        our choice. Rows with a few large entries are better turned first: LowRank.fit at full rank, with directions="random".
        Raises ValueError for other bits, and for calibration of another width.
        """
        check_bits(bits)
        known = None if calibration is None else np.linalg.cholesky(covariance_of(calibration, rows.shape[1]))
        codes, scale = rounded(rows, bits, None if known is None else jnp.asarray(known, jnp.float32))
        return cls(codes, scale, fingerprint(rows), bits, rows.shape[1])

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.width

    @property
    def dtype(self) -> np.dtype:
        """Of the rows that it stands for, unpacked."""
        return np.dtype(np.float32)

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scale.nbytes

    def __getitem__(self, some: slice) -> "Quantized":
        """Some of the rows, which keep the fingerprint of all."""
        return replace(self, codes=self.codes[some], scale=self.scale[some])

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
            if b <= FEW:
                return jnp.concatenate([one(x[i : i + 1]) for i in range(b)])
            if self.bits == 8 and b <= THIN:
                return in_one_pass(x, self.codes)
            return in_pieces(x, self.codes, lambda codes: unpack(codes, self.bits, d))

        return (by_platform(parts, lambda: whole(x)) if b <= MANY else whole(x)) * self.scale[None]

    def scores_at(self, x: Queries, indices: Indices) -> Candidates:
        return row_scores_at(x, self, indices)


def row_scores(x: Queries, rows: Rows | Quantized) -> Float[Array, "b m"]:
    """Exact scores of every row, float32: queries (b, d) against rows (m, d) in their own type.

    The form is the fastest one on a CPU at that batch (`make bench` times the others).
    """
    if isinstance(rows, Quantized):
        return rows.scores(x)
    x = x.astype(rows.dtype)

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
        flat = rows.reshape(len(rows), -1)[:, : x.shape[1]]
        return by_form(form, lambda: row_scores_at(x, flat, indices, group), lambda: row_kernel.scores(x, rows, indices))
    return each(lambda x, indices: scores_among(x[None], rows, indices, group)[0], x, indices)


def scores_among(x: Queries, rows: Rows | Quantized, indices: Int[AnyArray, " c"], group: int = 1) -> Float[Array, "b _"]:
    """row_scores_at of the same indices (c,) for all queries: their rows are read once."""
    x = x.astype(rows.dtype)

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


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class LowRank:
    """HiRE-LR: rows ≈ factors (m, r) @ projection (r, d); both plain or quantized."""

    projection: Float[Array, "r d"] | Quantized
    factors: Float[Array, "m r"] | Quantized
    fingerprint: UInt32[Array, ""]

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

        Raises ValueError when rank is not in 1..min(m, d), bits or directions do not exist, or the calibration is not of the rows'
        width.
        """
        m, d = rows.shape
        check_count("rank", rank, 1, min(m, d), "the smaller side of the rows")
        if bits is not None:
            check_bits(bits)
        covariance = covariance_of(calibration, d, ridge)
        ways = dict(leading=leading_directions, first=lambda *_: np.eye(rank, d), random=lambda *_: orthonormal(d, rank).T)
        if directions not in ways:
            raise ValueError(f"directions = {directions!r}: expected leading, first or random")
        kept = ways[directions](rows, covariance, rank)
        if bits == 4:
            kept = orthonormal(rank, rank).T @ kept  # turned over, or at full rank it would undo "random"
        # Of queries known by P x alone, E[x | P x] = C Pᵀ (P C Pᵀ)⁻¹ P x is the best guess, so these are the best factors for P.
        mixing = np.linalg.solve(kept @ covariance @ kept.T, kept @ covariance).T
        projection, factors = jnp.asarray(kept, jnp.float32), product(rows, jnp.asarray(mixing, jnp.float32), "md,dr->mr")
        if bits is None:
            return cls(projection, factors.astype(rows.dtype), fingerprint(rows))
        return cls(Quantized.fit(projection, 8), Quantized.fit(factors, bits), fingerprint(rows))

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


def covariance_of(calibration: Queries | Iterable[Queries] | None, d: int, ridge: float = 1e-3) -> np.ndarray:
    """The second moment (d, d) of queries, with that share of its mean variance added to its diagonal; without queries the same for
    every direction.
    """
    found = np.eye(d) if calibration is None else second_moment(calibration, d)
    return found + ridge * np.trace(found) / d * np.eye(d)


def leading_directions(rows: Rows, covariance: np.ndarray, rank: int) -> np.ndarray:
    """The directions (r, d) of queries of this second moment (d, d) that say most of their scores, each of variance 1."""
    # The d x d problem in float64: with G = rowsᵀ rows, the right singular vectors of rows @ L are the
    # eigenvectors of Lᵀ G L, and the (m, d) matrix itself is only multiplied.
    lower = np.linalg.cholesky(covariance)
    _, vectors = np.linalg.eigh(lower.T @ gram(rows) @ lower)
    return np.linalg.solve(lower.T, vectors[:, ::-1][:, :rank]).T


GRAMS: dict[tuple, np.ndarray] = {}  # of the rows that were fitted to last: rank, text and bits are tried one after the other


def gram(rows: Rows) -> np.ndarray:
    """rowsᵀ rows (d, d) in float64: most of what a fit takes."""
    key = rows.shape, rows.dtype, int(fingerprint(rows))
    found = GRAMS.get(key)
    if found is None:  # another thread may fit to other rows meanwhile
        found = np.asarray(product(rows, rows, "md,me->de", precision="highest"), np.float64)
        GRAMS.clear()
        GRAMS[key] = found
    return found


def orthonormal(d: int, rank: int) -> np.ndarray:
    """Random directions (d, r), always the same, of length 1 and at right angles."""
    return np.linalg.qr(np.random.default_rng(0).normal(size=(d, rank)))[0]


def quantized_product(x: Queries, estimator: Estimator) -> tuple[Float[AnyArray, "b _"], Quantized] | None:
    """The queries and the quantized rows whose product the estimator's scores are, or None where its rows are not quantized."""
    if isinstance(estimator, LowRank) and isinstance(estimator.factors, Quantized):
        return row_scores(x, estimator.projection), estimator.factors
    return (x, estimator) if isinstance(estimator, Quantized) else None


def second_moment(queries: Queries | Iterable[Queries], width: int) -> np.ndarray:
    """E[x xᵀ] (d, d) in float64 over queries (n, d) or an iterator of batches of them.

    Raises ValueError when a batch is not (n, width), or when there are no queries or one that is not finite.
    """
    total, count = np.zeros((width, width)), 0
    for batch in [queries] if isinstance(queries, AnyArray) else queries:
        if batch.ndim != 2 or batch.shape[1] != width:
            raise ValueError(f"calibration of shape {batch.shape}: expected (n, {width}), the width of the rows")
        exact = np.asarray(batch, np.float64)
        total += exact.T @ exact
        count += len(exact)
    if not count:
        raise ValueError("calibration has 0 queries: expected at least one")
    if not np.isfinite(total).all():
        raise ValueError("calibration holds a value that is not finite: expected finite queries")
    return total / count

"""An attack on proofs: rows and queries drawn to make `hire.certified_top_k` prove a wrong answer.

Wider arithmetic judges the answers.
"""

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from importlib import import_module

import jax
import jax.numpy as jnp
import numpy as np

import hire
from hire.certify import Certified
from hire.estimators.low_rank import LowRank
from hire.estimators.quantized import Quantized
from hire.lab import records
from hire.lab.paths import RECORDS

ROWS, WIDTH, QUERIES = 64, 12, 256  # of one attack
ASKED = ((1, 1), (4, 8), (3, ROWS))  # k and k'
TRAPS = (
    "normal",
    "near",
    "ulp",
    "duplicates",
    "ties",
    "outliers",
    "tiny entries",
    "mixed scales",
    "not finite",
)
TYPES = ("float32", "bfloat16", "float16", "float64")
ESTIMATORS = tuple(itertools.product(("LR", "Q"), (None, 8, 4)))[:3] + (("Q", 8), ("Q", 4))
WAYS = ("jit", "vmap", "fallback", "eager")
# Scales are drawn from 10^-e to 10^e.
EXPONENTS = dict(float32=30, bfloat16=30, float16=3, float64=30)


def with_64_bits(enabled: bool = True) -> AbstractContextManager:
    """Return the jax.enable_x64 context; jax before 0.8 has it in jax.experimental."""
    return (
        jax.enable_x64(enabled)
        if hasattr(jax, "enable_x64")
        else import_module("jax.experimental").enable_x64(enabled)
    )


@dataclass(frozen=True)
class Attack:
    """One set of rows and queries, and the search that is attacked with it.

    Attributes:
        trap: One of TRAPS.
        dtype: One of TYPES.
        estimator: Kind of estimator and its bits, one of ESTIMATORS.
        way: One of WAYS.
        asked: The pair (k, k'), one of ASKED.
        rank: Rank of a low-rank estimator.
    """

    trap: str
    dtype: str
    estimator: tuple[str, int | None]
    way: str
    asked: tuple[int, int]
    rank: int


def attacks(rng: np.random.Generator, batch: int) -> Iterator[Attack]:
    """Generate attacks without end.

    The generator cycles through all pairs of type and estimator; all else is random.

    Args:
        rng: Random generator.
        batch: Number of successive attacks that share one compiled program.
    """
    for estimator_kind, dtype in itertools.cycle(itertools.product(ESTIMATORS, TYPES)):
        way, k_and_candidates, rank = (
            rng.choice(WAYS, p=[0.44, 0.27, 0.27, 0.02]),
            ASKED[rng.integers(len(ASKED))],
            rng.integers(1, WIDTH + 1),
        )
        for trap in rng.choice(TRAPS, batch):
            yield Attack(trap, dtype, estimator_kind, way, k_and_candidates, int(rank))


def drawn_rows(rng: np.random.Generator, attack: Attack) -> np.ndarray:
    """Draw rows `(m, d)` in float64, not yet rounded to the attack's type."""
    rows = rng.normal(size=(ROWS, WIDTH))
    if attack.trap == "near":  # rows that differ by the estimator's error or less
        rows = rng.normal(size=(1, WIDTH)) + rows * 10.0 ** rng.uniform(-8, -1, (ROWS, 1))
    if attack.trap == "ulp":  # one row, with entries up to two units in the last place apart
        step = {"float32": 2.0**-23, "bfloat16": 2.0**-7, "float16": 2.0**-10, "float64": 2.0**-52}[
            attack.dtype
        ]
        rows = np.abs(rows[:1]) * (1 + step * rng.integers(-2, 3, (ROWS, WIDTH)))
    if attack.trap == "duplicates":
        rows = rows[rng.integers(0, ROWS // 4, ROWS)]
    if attack.trap == "ties":  # integers
        rows = rng.integers(-2, 3, (ROWS, WIDTH)).astype(np.float64)
    if attack.trap == "outliers":
        rows[rng.integers(0, ROWS, 8), rng.integers(0, WIDTH, 8)] *= 10.0 ** rng.uniform(1, 4)
    if attack.trap == "tiny entries":  # some are subnormal
        rows *= 10.0 ** rng.uniform(-44, 0, rows.shape)
    if attack.trap == "mixed scales":
        rows *= 10.0 ** rng.uniform(-EXPONENTS[attack.dtype], EXPONENTS[attack.dtype], (ROWS, 1))
    return rows * 10.0 ** rng.uniform(-EXPONENTS[attack.dtype], EXPONENTS[attack.dtype])


def drawn_queries(rng: np.random.Generator, attack: Attack, rows: np.ndarray) -> np.ndarray:
    """Draw queries `(b, d)` in float64.

    A query is random, along a row, along the difference of two rows, or has entries of every
    magnitude.
    """
    queries = rng.normal(size=(QUERIES, WIDTH))
    first_rows, second_rows = rows[rng.integers(0, ROWS, (2, QUERIES))]
    largest_norm = np.linalg.norm(rows, axis=1).max() or 1.0
    kinds = rng.integers(0, 4, QUERIES)[:, None]
    differences = (first_rows - second_rows) / (
        np.abs(first_rows - second_rows).max(1, keepdims=True) + 1e-300
    )
    mixed_magnitudes = queries * 10.0 ** rng.uniform(-40, 0, queries.shape)
    queries = np.select(
        [kinds == 1, kinds == 2, kinds == 3],
        [first_rows / largest_norm, differences, mixed_magnitudes],
        queries,
    )
    queries *= 10.0 ** rng.uniform(-EXPONENTS[attack.dtype], EXPONENTS[attack.dtype], (QUERIES, 1))
    if attack.trap == "not finite":
        queries[rng.integers(0, QUERIES, 8), rng.integers(0, WIDTH, 8)] = rng.choice(
            [np.nan, np.inf, -np.inf], 8
        )
    if attack.trap == "ties":
        queries = np.where(rng.random((QUERIES, 1)) < 0.3, 0.0, np.round(queries))
    return queries


@functools.cache
def searched(way: str, k: int, candidates: int) -> Callable[..., Certified]:
    """Return the search in one of WAYS, compiled as users compile it."""
    prove = functools.partial(
        hire.certified_top_k, k=k, candidates=candidates, dense_fallback=way == "fallback"
    )
    if way == "vmap":  # one query at a time
        return jax.jit(
            lambda x, rows, estimator: jax.vmap(lambda one: prove(one, rows, estimator))(x)
        )
    return prove if way == "eager" else jax.jit(prove)


def fitted(rows: jax.Array, attack: Attack) -> LowRank | Quantized:
    """Return the attack's estimator of the rows."""
    kind, bits = attack.estimator
    if kind == "LR":
        return hire.LowRank.fit(rows, attack.rank, bits=bits)
    assert bits is not None
    return hire.Quantized.fit(rows, bits)


def wrong_proofs(certified: Certified, x: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return for each query `(b,)` whether its proof is wrong.

    A proof is wrong unless its top-k has k distinct rows, no other row scores higher (within
    rounding), and query and scores are finite. The scores are computed in np.longdouble. Its
    mantissa of 64 bits represents every product of float32 numbers exactly.
    """
    wide_x, wide_rows = x.astype(np.longdouble), rows.astype(np.longdouble)
    with np.errstate(all="ignore"):
        scores = wide_x @ wide_rows.T
        rounding = 2.0**-60 * (np.abs(wide_x) @ np.abs(wide_rows).T).max(1)
    in_top_k = np.zeros(scores.shape, bool)
    np.put_along_axis(in_top_k, np.asarray(certified.top.indices), True, axis=1)
    lowest_returned, highest_missed = (
        np.where(in_top_k, scores, np.inf).min(1),
        np.where(in_top_k, -np.inf, scores).max(1),
    )
    finite = np.isfinite(wide_x).all(1) & np.isfinite(scores).all(1)
    with np.errstate(invalid="ignore"):
        correct = lowest_returned >= highest_missed - rounding
    distinct = in_top_k.sum(1) == certified.top.indices.shape[1]
    return np.asarray(certified.proved) & ~(finite & distinct & correct)


def wrong_fallbacks(certified: Certified, x: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return for each query `(b,)` whether a missing row scores above a returned row.

    Only a difference above the error of dense float32 scores counts.
    """
    wide_x, wide_rows = x.astype(np.longdouble), rows.astype(np.longdouble)
    with np.errstate(all="ignore"):
        scores = wide_x @ wide_rows.T
        magnitudes = np.abs(wide_x) @ np.abs(wide_rows).T
    in_range = (
        (magnitudes.max(1) < 1e37) & (np.abs(wide_x).max(1) > 1e-30) & (magnitudes.min(1) > 1e-25)
    )
    in_top_k = np.zeros(scores.shape, bool)
    np.put_along_axis(in_top_k, np.asarray(certified.top.indices), True, axis=1)
    lowest_returned, highest_missed = (
        np.where(in_top_k, scores, np.inf).min(1),
        np.where(in_top_k, -np.inf, scores).max(1),
    )
    with np.errstate(invalid="ignore"):
        return in_range & (
            lowest_returned < highest_missed - 4 * WIDTH * 2.0**-24 * magnitudes.max(1)
        )


def attack_once(rng: np.random.Generator, attack: Attack) -> dict[str, int]:
    """Run one attack and count its outcomes.

    Returns:
        A dict with the keys `queries`, `proved`, `wrong` (wrong proofs) and, with the dense
        fallback and finite numbers, `wrong_with_fallback`; or `refused` alone, if the estimator
        refuses the rows.
    """
    dtype = jnp.dtype(attack.dtype)
    with np.errstate(over="ignore"):
        exact_rows = drawn_rows(rng, attack)
        if not np.isfinite(
            exact_rows.astype(np.float32 if dtype == np.float64 else dtype).astype(np.float64)
        ).all():
            exact_rows = exact_rows / np.abs(exact_rows).max()
        queries = drawn_queries(rng, attack, exact_rows)
        rows, x = exact_rows.astype(dtype), queries.astype(dtype)
    try:
        estimator = fitted(jnp.asarray(rows), attack)
    except ValueError:  # the factors overflow float16
        return dict(refused=QUERIES)
    # A fit refuses such rows, so they replace the rows after the fit, with recomputed error bounds.
    if attack.trap == "not finite":
        rows = rows.copy()
        rows[rng.integers(0, ROWS, 2), rng.integers(0, WIDTH, 2)] = rng.choice(
            [np.nan, np.inf, -np.inf], 2
        ).astype(dtype)
        estimator = replace(estimator.with_error_bounds(jnp.asarray(rows)), fingerprint=None)
    certified = jax.device_get(
        searched(attack.way, *attack.asked)(jnp.asarray(x), jnp.asarray(rows), estimator)
    )
    wrong = wrong_proofs(certified, x.astype(np.float64), rows.astype(np.float64))
    counts = dict(queries=QUERIES, proved=int(certified.proved.sum()), wrong=int(wrong.sum()))
    if attack.way == "fallback" and attack.trap != "not finite":
        counts["wrong_with_fallback"] = int(
            wrong_fallbacks(certified, x.astype(np.float64), rows.astype(np.float64)).sum()
        )
    return counts


def attack_proofs(count: int, seed: int = 0, batch: int = 16) -> dict[str, dict[str, int]]:
    """Attack until `count` queries were searched.

    Args:
        count: Number of queries.
        seed: Seed of the random generator.
        batch: Number of successive attacks that share one compiled program.

    Returns:
        Counts of `attack_once` in total ("all") and by trap, type, estimator, way and rank.
    """
    rng, totals = np.random.default_rng(seed), {"all": Counter()}
    for number, attack in enumerate(attacks(rng, batch), 1):
        with with_64_bits(attack.dtype == "float64"):
            outcomes = attack_once(rng, attack)
        kind, bits = attack.estimator
        estimator_name = f"{kind} {'in the type of the rows' if bits is None else f'int{bits}'}"
        for part in (
            "all",
            attack.trap,
            attack.dtype,
            estimator_name,
            attack.way,
            f"rank {attack.rank}" if kind == "LR" else "full rank",
        ):
            totals.setdefault(part, Counter()).update(outcomes)
        if totals["all"]["queries"] >= count:
            return {part: dict(counts) for part, counts in totals.items()}
        # A process cannot map thousands of compiled programs.
        if number % (20 * batch) == 0:
            jax.clear_caches()
            print(
                f"{totals['all']['queries']:,} of {count:,} queries, "
                f"{totals['all']['wrong']} wrong",
                flush=True,
            )
    raise AssertionError("attacks have no end")


def certify_adversary(count: int = 1_000_000) -> None:
    """Attack the proofs with a million queries and write the record."""
    totals = attack_proofs(count)
    for part, counts in totals.items():
        print(f"{part:26}", *(f"{name} {value}" for name, value in counts.items()))
    setting = dict(
        rows=ROWS,
        width=WIDTH,
        queries_per_set=QUERIES,
        k_and_candidates=ASKED,
        ranks=f"1 to {WIDTH}",
    )
    setting |= dict(exponents=EXPONENTS)
    records.write(
        RECORDS,
        "proofs",
        "proofs/adversary",
        kind="measured",
        weights="rows and queries drawn to deceive",
        setting=setting,
        results=totals["all"] | dict(parts=totals),
        command="make certify-adversary",
    )

"""Proofs under attack: rows and queries drawn to make `hire.certified_top_k` prove a wrong answer, judged by wider arithmetic."""

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
from hire.estimators import LowRank, Quantized, error_bounds
from hire.lab import records
from hire.lab.paths import RECORDS

ROWS, WIDTH, QUERIES = 64, 12, 256  # of a set
ASKED = ((1, 1), (4, 8), (3, ROWS))  # k and k'
TRAPS = ("normal", "near", "ulp", "duplicates", "ties", "outliers", "tiny entries", "mixed scales", "not finite")
TYPES = ("float32", "bfloat16", "float16", "float64")
COPIES = tuple(itertools.product(("LR", "Q"), (None, 8, 4)))[:3] + (("Q", 8), ("Q", 4))
WAYS = ("jit", "vmap", "fallback", "eager")
EXPONENTS = dict(float32=30, bfloat16=30, float16=3, float64=30)  # scales are drawn from 10^-e to 10^e


def with_64_bits(enabled: bool = True) -> AbstractContextManager:
    """jax.enable_x64, which jax before 0.8 has elsewhere."""
    return jax.enable_x64(enabled) if hasattr(jax, "enable_x64") else import_module("jax.experimental").enable_x64(enabled)


@dataclass(frozen=True)
class Attack:
    """A set of rows and queries, and how they are searched."""

    trap: str
    dtype: str
    copy: tuple[str, int | None]
    way: str
    asked: tuple[int, int]
    rank: int


def attacks(rng: np.random.Generator, together: int) -> Iterator[Attack]:
    """Attacks without an end: every type with every copy in turn, all else drawn. So many in a row share a program."""
    for copy, dtype in itertools.cycle(itertools.product(COPIES, TYPES)):
        way, asked, rank = rng.choice(WAYS, p=[0.44, 0.27, 0.27, 0.02]), ASKED[rng.integers(len(ASKED))], rng.integers(1, WIDTH + 1)
        for trap in rng.choice(TRAPS, together):
            yield Attack(trap, dtype, copy, way, asked, int(rank))


def drawn_rows(rng: np.random.Generator, attack: Attack) -> np.ndarray:
    """Rows (m, d) in float64, of which the attack's type is still to be taken."""
    rows = rng.normal(size=(ROWS, WIDTH))
    if attack.trap == "near":  # rows that differ by about as much as a copy leaves out, or less
        rows = rng.normal(size=(1, WIDTH)) + rows * 10.0 ** rng.uniform(-8, -1, (ROWS, 1))
    if attack.trap == "ulp":  # one row and its neighbours in the type
        step = {"float32": 2.0**-23, "bfloat16": 2.0**-7, "float16": 2.0**-10, "float64": 2.0**-52}[attack.dtype]
        rows = np.abs(rows[:1]) * (1 + step * rng.integers(-2, 3, (ROWS, WIDTH)))
    if attack.trap == "duplicates":
        rows = rows[rng.integers(0, ROWS // 4, ROWS)]
    if attack.trap == "ties":  # whole numbers
        rows = rng.integers(-2, 3, (ROWS, WIDTH)).astype(np.float64)
    if attack.trap == "outliers":
        rows[rng.integers(0, ROWS, 8), rng.integers(0, WIDTH, 8)] *= 10.0 ** rng.uniform(1, 4)
    if attack.trap == "tiny entries":  # some of which are not normal numbers
        rows *= 10.0 ** rng.uniform(-44, 0, rows.shape)
    if attack.trap == "mixed scales":
        rows *= 10.0 ** rng.uniform(-EXPONENTS[attack.dtype], EXPONENTS[attack.dtype], (ROWS, 1))
    return rows * 10.0 ** rng.uniform(-EXPONENTS[attack.dtype], EXPONENTS[attack.dtype])


def drawn_queries(rng: np.random.Generator, attack: Attack, rows: np.ndarray) -> np.ndarray:
    """Queries (b, d) in float64: at random, along rows, across the difference of two rows, or with entries of every size."""
    queries = rng.normal(size=(QUERIES, WIDTH))
    one, other = rows[rng.integers(0, ROWS, (2, QUERIES))]
    size = np.linalg.norm(rows, axis=1).max() or 1.0
    kinds = rng.integers(0, 4, QUERIES)[:, None]
    apart = (one - other) / (np.abs(one - other).max(1, keepdims=True) + 1e-300)
    spread = queries * 10.0 ** rng.uniform(-40, 0, queries.shape)
    queries = np.select([kinds == 1, kinds == 2, kinds == 3], [one / size, apart, spread], queries)
    queries *= 10.0 ** rng.uniform(-EXPONENTS[attack.dtype], EXPONENTS[attack.dtype], (QUERIES, 1))
    if attack.trap == "not finite":
        queries[rng.integers(0, QUERIES, 8), rng.integers(0, WIDTH, 8)] = rng.choice([np.nan, np.inf, -np.inf], 8)
    if attack.trap == "ties":
        queries = np.where(rng.random((QUERIES, 1)) < 0.3, 0.0, np.round(queries))
    return queries


@functools.cache
def searched(way: str, k: int, candidates: int) -> Callable[..., Certified]:
    """The search in one of WAYS, compiled as users compile it."""
    prove = functools.partial(hire.certified_top_k, k=k, candidates=candidates, dense_fallback=way == "fallback")
    if way == "vmap":  # each query by itself
        return jax.jit(lambda x, rows, copy: jax.vmap(lambda one: prove(one, rows, copy))(x))
    return prove if way == "eager" else jax.jit(prove)


def fitted(rows: jax.Array, attack: Attack) -> LowRank | Quantized:
    kind, bits = attack.copy
    if kind == "LR":
        return hire.LowRank.fit(rows, attack.rank, bits=bits)
    assert bits is not None
    return hire.Quantized.fit(rows, bits)


def wrong_proofs(found: Certified, x: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Of each query (b,), whether it is proved and yet a missing row scores above one that is there, or no such thing is known.

    In np.longdouble, whose mantissa of 64 bits holds every product of float32 numbers exactly.
    """
    wide, entries = x.astype(np.longdouble), rows.astype(np.longdouble)
    with np.errstate(all="ignore"):
        scores = wide @ entries.T
        slack = 2.0**-60 * (np.abs(wide) @ np.abs(entries).T).max(1)
    there = np.zeros(scores.shape, bool)
    np.put_along_axis(there, np.asarray(found.top.indices), True, axis=1)
    lowest, missed = np.where(there, scores, np.inf).min(1), np.where(there, -np.inf, scores).max(1)
    known = np.isfinite(wide).all(1) & np.isfinite(scores).all(1)
    with np.errstate(invalid="ignore"):
        right = lowest >= missed - slack
    distinct = there.sum(1) == found.top.indices.shape[1]
    return np.asarray(found.proved) & ~(known & distinct & right)


def wrong_fallbacks(found: Certified, x: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Of each query (b,), whether a missing row scores above one that is there by more than dense float32 scores may err."""
    wide, entries = x.astype(np.longdouble), rows.astype(np.longdouble)
    with np.errstate(all="ignore"):
        scores = wide @ entries.T
        sizes = np.abs(wide) @ np.abs(entries).T
    usual = (sizes.max(1) < 1e37) & (np.abs(wide).max(1) > 1e-30) & (sizes.min(1) > 1e-25)
    there = np.zeros(scores.shape, bool)
    np.put_along_axis(there, np.asarray(found.top.indices), True, axis=1)
    lowest, missed = np.where(there, scores, np.inf).min(1), np.where(there, -np.inf, scores).max(1)
    with np.errstate(invalid="ignore"):
        return usual & (lowest < missed - 4 * WIDTH * 2.0**-24 * sizes.max(1))


def attack_once(rng: np.random.Generator, attack: Attack) -> dict[str, int]:
    """How many queries were searched, proved, wrongly proved, and wrong with the dense fallback."""
    dtype = jnp.dtype(attack.dtype)
    with np.errstate(over="ignore"):
        exact = drawn_rows(rng, attack)
        if not np.isfinite(exact.astype(np.float32 if dtype == np.float64 else dtype).astype(np.float64)).all():
            exact = exact / np.abs(exact).max()
        queries = drawn_queries(rng, attack, exact)
        rows, x = exact.astype(dtype), queries.astype(dtype)
    try:
        copy = fitted(jnp.asarray(rows), attack)
    except ValueError:  # factors that do not fit into float16
        return dict(refused=QUERIES)
    if attack.trap == "not finite":  # rows that a fit refuses, with the bounds that they would have
        rows = rows.copy()
        rows[rng.integers(0, ROWS, 2), rng.integers(0, WIDTH, 2)] = rng.choice([np.nan, np.inf, -np.inf], 2).astype(dtype)
        copy = replace(copy, error_bounds=error_bounds(jnp.asarray(rows), copy), fingerprint=None)
    found = jax.device_get(searched(attack.way, *attack.asked)(jnp.asarray(x), jnp.asarray(rows), copy))
    wrong = wrong_proofs(found, x.astype(np.float64), rows.astype(np.float64))
    told = dict(queries=QUERIES, proved=int(found.proved.sum()), wrong=int(wrong.sum()))
    if attack.way == "fallback" and attack.trap != "not finite":
        told["wrong_fallbacks"] = int(wrong_fallbacks(found, x.astype(np.float64), rows.astype(np.float64)).sum())
    return told


def attack_proofs(count: int, seed: int = 0, together: int = 16) -> dict[str, dict[str, int]]:
    """Attack until so many queries were searched. What came of it in all, and by trap, type, copy and way."""
    rng, told = np.random.default_rng(seed), {"all": Counter()}
    for number, attack in enumerate(attacks(rng, together), 1):
        with with_64_bits(attack.dtype == "float64"):
            found = attack_once(rng, attack)
        kind, bits = attack.copy
        copy = f"{kind} {'in the type of the rows' if bits is None else f'int{bits}'}"
        for part in ("all", attack.trap, attack.dtype, copy, attack.way, f"rank {attack.rank}" if kind == "LR" else "full rank"):
            told.setdefault(part, Counter()).update(found)
        if told["all"]["queries"] >= count:
            return {part: dict(counts) for part, counts in told.items()}
        if number % (20 * together) == 0:  # thousands of compiled programs are more than a process may map
            jax.clear_caches()
            print(f"{told['all']['queries']:,} of {count:,} queries, {told['all']['wrong']} wrong", flush=True)
    raise AssertionError("attacks have no end")


def certify_adversary(count: int = 1_000_000) -> None:
    """Attack proofs with a million queries and keep the outcome as a record."""
    told = attack_proofs(count)
    for part, counts in told.items():
        print(f"{part:26}", *(f"{name} {value}" for name, value in counts.items()))
    setting = dict(rows=ROWS, width=WIDTH, queries_a_set=QUERIES, k_and_candidates=ASKED, ranks=f"1 to {WIDTH}")
    setting |= dict(exponents=EXPONENTS)
    records.write(
        RECORDS,
        "proofs",
        "proofs/adversary",
        kind="measured",
        weights="rows and queries drawn to deceive",
        setting=setting,
        results=told["all"] | dict(parts=told),
        command="make certify-adversary",
    )

"""Proved answers: how many there are, what they cost, and how many rows a proof must score."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pandas

import hire
from hire.certify import Certified
from hire.estimators.fitting import random_directions
from hire.estimators.low_rank import LowRank
from hire.estimators.quantized import Quantized
from hire.lab.data.model_states import States, in_batches
from hire.lab.metrics.intervals import mean_with_interval
from hire.lab.rivals.approximate_top_k import INT8, rivals
from hire.lab.studies import tables
from hire.lab.studies.query_sets import QuerySets
from hire.lab.timing.layer_timing import fastest_dense, slices
from hire.ops.top_k import TopK
from hire.timing import interleaved, speedups
from hire.tuning import true_top_k
from hire.types import AnyArray, Array, Float, Int, Queries, Rows

# Bits per entry whose proofs are simulated; one bit is 3.1 % of the float32 bytes.
PROOF_BITS = (5, 6, 8)
# All queries would take minutes: every n-th is proved, and every n-th of a curve's is counted.
PROOF_STRIDE = 5
COUNT_STRIDE = 4
# Queries per call of the certified search where it is evaluated; timed calls have one query.
EVALUATION_BATCH = 32
# Largest relative difference at which two float32 scores count as the same.
SAME_SCORE = 1e-5


@partial(jax.jit, static_argnames=("k", "candidates"))
def certified_search(
    x: Queries, rows: Rows, estimator: LowRank | Quantized, k: int, candidates: int
) -> Certified:
    """Run `hire.certified_top_k` with the dense fallback, compiled."""
    return hire.certified_top_k(x, rows, estimator, k=k, candidates=candidates, dense_fallback=True)


def measure_proofs(
    rows: Rows,
    estimator: LowRank | Quantized,
    states: States,
    true_top: TopK,
    candidates: int,
    repeats: int = 0,
) -> dict:
    """Measure how many answers are proved, and at what cost.

    Args:
        rows: Rows `(m, d)`.
        estimator: Estimator of the rows.
        states: Queries with their documents.
        true_top: True top-k `(n, k)` of the queries.
        candidates: Number of candidates (k').
        repeats: Number of timed calls; 0 skips the timing.

    Returns:
        A dict with the keys `proved` (rate of proved answers, with its interval), `wrong` (number
        of answers, proved or from the dense fallback, whose exact scores are not those of the true
        top-k), `bytes_fraction` and `bytes_fraction_with_fallback` (bytes that a query reads, as a
        fraction of the float32 rows). With `repeats` also `speedups` (over the fastest dense form
        at batch 1; "proved" is the certified search with its fallback) and `seconds`.
    """
    true_scores = np.asarray(true_top.values)
    k = true_scores.shape[1]
    certify = partial(certified_search, rows=rows, estimator=estimator, k=k, candidates=candidates)
    certified = in_batches(certify, states.hidden, EVALUATION_BATCH)
    errors = np.abs(certified.top.values - true_scores).max(1)
    wrong = errors > SAME_SCORE * np.abs(true_scores).max(1)
    # A proof also reads one float32 error bound per row.
    estimator_bytes = estimator.bytes_read(candidates) + 4 * len(rows)
    bytes_fraction = estimator_bytes / (4 * rows.size) + candidates / len(rows)
    results = dict(
        proved=mean_with_interval(certified.proved.astype(float), states.documents),
        wrong=int(wrong.sum()),
        bytes_fraction=bytes_fraction,
        bytes_fraction_with_fallback=bytes_fraction + float(1 - certified.proved.mean()),
    )
    if not repeats:
        return results
    forms = rivals(rows, k) | {"proved": certify}
    seconds = interleaved(forms, slices(states.hidden, 1, repeats), repeats)
    return results | dict(speedups=speedups(seconds, fastest_dense(seconds)), seconds=seconds)


def prove_nearly_equal_rows(rows: Rows, states: States) -> dict:
    """Try to prove answers among rows that differ in their last bits: no proof is possible.

    Args:
        rows: Rows `(m, d)`. The first one is repeated 64 times, scaled by 1 to 1 + 1e-6.
        states: Queries with their documents.

    Returns:
        See `measure_proofs`, without timing.
    """
    scales = np.linspace(1, 1 + 1e-6, 64, dtype=np.float32)
    similar_rows = np.asarray(rows[:1]) * scales[:, None]
    true_top = true_top_k(similar_rows, states.hidden, 4)
    return measure_proofs(similar_rows, hire.Quantized.fit(similar_rows, 8), states, true_top, 16)


def count_rows_to_score(
    rows: Rows, hidden: Queries, true_scores: Float[AnyArray, "b k"], bits: Sequence[int]
) -> dict[str, np.ndarray]:
    """Count the rows that a proof must score, for other numbers of bits per entry.

    A proof must score each row whose upper bound reaches the k-th true score. This is a simulation:
    the library's estimators pack 4 or 8 bits.

    Args:
        rows: Rows `(m, d)`.
        hidden: Queries `(n, d)`.
        true_scores: True top-k scores `(n, k)`.
        bits: Numbers of bits per entry.

    Returns:
        A dict from "<bits> bits" (rows as they are) and "<bits> bits rotated" (after a random
        rotation) to the counts `(n,)`.
    """
    rotation = jnp.asarray(random_directions(rows.shape[1], rows.shape[1]), jnp.float32)
    inputs = {"": (rows, hidden), " rotated": (rows @ rotation, hidden @ rotation)}
    counts = {}
    for num_bits in bits:
        for suffix, (input_rows, input_hidden) in inputs.items():
            row_counts = count_upper_bounds(
                input_rows, input_hidden, true_scores[:, -1:], 2 ** (num_bits - 1) - 1
            )
            counts[f"{num_bits} bits{suffix}"] = np.asarray(row_counts)
    return counts


@partial(jax.jit, static_argnames="steps")
def count_upper_bounds(
    rows: Rows, x: Queries, threshold: Float[AnyArray, "b 1"], steps: int
) -> Int[Array, " b"]:
    """Count the rows whose upper bound reaches a threshold.

    The upper bound is the score of the quantized row plus the length of the row's quantization
    error times the length of the query.

    Args:
        rows: Rows `(m, d)`.
        x: Queries `(b, d)`.
        threshold: Score that a bound must reach, for each query.
        steps: Quantization steps from 0 to a row's largest entry.
    """
    scale = jnp.max(jnp.abs(rows), axis=1, keepdims=True) / steps
    dequantized = jnp.round(rows / scale) * scale
    query_lengths = jnp.linalg.norm(x, axis=1, keepdims=True)
    error_lengths = jnp.linalg.norm(rows - dequantized, axis=1)[None]
    return jnp.sum(x @ dequantized.T + query_lengths * error_lengths >= threshold, axis=1)


@dataclasses.dataclass(frozen=True)
class ProofMeasurements:
    """Proofs by int8 rows, and how many rows a proof must score at other numbers of bits.

    Attributes:
        by_rows: Result of `measure_proofs` for the LM head and for rows of another kind, by name.
        rows_to_score: Result of `count_rows_to_score` for the LM head.
    """

    by_rows: dict[str, dict]
    rows_to_score: dict[str, np.ndarray]

    @property
    def wrong(self) -> int:
        """Number of wrong answers, proved or from the dense fallback."""
        return sum(results["wrong"] for results in self.by_rows.values())

    def table(self) -> pandas.DataFrame:
        """Return the proofs as a table, one line per set of rows."""
        proved = {name: {"proved": results["proved"]} for name, results in self.by_rows.items()}
        table = tables.interval_table(proved)
        table["wrong"] = [results["wrong"] for results in self.by_rows.values()]
        for column, form in {"speed-up with fallback": "proved", f"speed-up, {INT8}": INT8}.items():
            table[column] = [
                f"{results['speedups'][form]:.2f}x" for results in self.by_rows.values()
            ]
        return table


def prove_answers(
    rows: Rows, estimator: Quantized, queries: QuerySets, settings: SimpleNamespace
) -> ProofMeasurements:
    """Prove answers of the LM head and of other rows by int8 rows, and simulate other bits.

    Args:
        rows: Rows `(m, d)` of the LM head.
        estimator: These rows in 8 bits.
        queries: Queries.
        settings: Sizes of the notebook.
    """
    candidates, vectors = settings.proof_candidates, queries.vectors
    states, true_top = queries.every_nth(PROOF_STRIDE)
    of_head = measure_proofs(
        rows, estimator, states, true_top, candidates["tokens"], settings.repeats
    )
    of_vectors = measure_proofs(
        vectors.rows,
        hire.Quantized.fit(vectors.rows, 8),
        vectors.unseen,
        vectors.unseen_top,
        candidates["vectors"],
        settings.repeats,
    )
    sample, sample_top = queries.curve_sample(settings)
    rows_to_score = count_rows_to_score(
        rows, sample.hidden[::COUNT_STRIDE], sample_top.values[::COUNT_STRIDE], PROOF_BITS
    )
    return ProofMeasurements(
        {settings.model_name: of_head, vectors.name: of_vectors}, rows_to_score
    )

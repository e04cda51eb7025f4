"""make bench: latency of the softmax and of the decode step."""

from typing import Any

import hire
from hire.lab import records
from hire.lab.data import hidden_state_cache
from hire.lab.data.text import documents
from hire.lab.metrics.search_recall import judge
from hire.lab.timing.layer_timing import (
    fastest_dense,
    speedups_by_batch,
    table,
    time_softmax,
    time_steps,
)
from hire.layers.softmax import HireSoftmax
from hire.models import load
from hire.timing import medians
from hire.tuning import true_top_k


def bench(k: int = 32, rank: int = 128, candidates: int = 2048) -> None:
    """Print the table for Gemma 3 270M at batch 1 and 8, and append records with the raw durations.

    Args:
        k: Number of top tokens.
        rank: Rank of the int8 low-rank estimator.
        candidates: Number of candidates (k').
    """
    gemma = load("gemma3_270m")
    rows = gemma.model.head_rows()
    calibration = hidden_state_cache.cached_states(
        gemma, documents("calibration")[::2], 128, 3, skip=4
    )
    evaluation = hidden_state_cache.cached_states(gemma, documents("evaluation", ["novel"])[:60])
    softmax = HireSoftmax(
        rows, hire.LowRank.fit(rows, rank, calibration=calibration.hidden, bits=8), k, candidates
    )
    quality = judge(softmax, evaluation, true_top_k(rows, evaluation.hidden, k))
    recall, top1 = (interval["mean"] for interval in quality.values())
    print(
        f"Gemma 3 270M ({gemma.weights_precision}), {records.machine()['device']}; k = {k}, LR "
        f"{rank} int8 "
        f"fitted, k' = {candidates}"
    )
    print(
        f"recall@{k} {recall:.4f}, top-1 kept {top1:.4f} over {len(evaluation.hidden)} positions "
        "of unseen text"
    )
    setting = dict(k=k, rank=rank, candidates=candidates)
    for batch in (1, 8):
        timings = {
            "softmax": time_softmax(rows, {"HiRE": softmax}, evaluation.hidden, k, batch, 20)
        }
        timings["step"] = time_steps(
            gemma.model,
            hire.convert(gemma.model, softmax=softmax),
            evaluation.hidden,
            k,
            batch,
            512,
            10,
        )
        for part, durations in timings.items():
            print(table(part, {batch: durations}), flush=True)
            speedup = speedups_by_batch({batch: durations})[batch]
            results = dict(
                medians=medians(durations),
                speedup=speedup,
                dense=fastest_dense(durations),
                quality=quality,
            )
            record: dict[str, Any] = dict(
                setting=setting | dict(batch=batch), results=results, durations=durations
            )
            record |= dict(
                kind="measured", weights=gemma.weights_precision, append=True, command="make bench"
            )
            records.write(records.RECORDS, "bench", f"bench/{part}/{batch}", **record)

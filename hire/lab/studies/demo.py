"""make demo: dense against HiRE on the softmax of Gemma 3 270M, in one table."""

import numpy as np

import hire
from hire.lab.data import hidden_state_cache
from hire.lab.data.text import documents
from hire.lab.metrics.search_recall import judge
from hire.lab.rivals.dense import dense_forms
from hire.models import load
from hire.timing import interleaved, medians
from hire.tuning import true_top_k

K, CANDIDATES, REPEATS = 32, 2048, 15


def demo() -> None:
    """Print recall, bytes read and time of each softmax on hidden states of a novel.

    The estimators are fitted to speeches and commentary.
    """
    gemma = load("gemma3_270m")
    rows = gemma.model.head_rows()
    calibration = hidden_state_cache.cached_states(
        gemma, documents("calibration")[::2], 128, skip=4
    )
    evaluation = hidden_state_cache.cached_states(
        gemma, documents("evaluation", ["novel"])[:16], 32, skip=12
    )
    true_top = true_top_k(rows, evaluation.hidden, K)
    estimators = {
        "HiRE-Q, int8": hire.Quantized.fit(rows, 8),
        "HiRE-LR, rank 128, fitted, int8": hire.LowRank.fit(
            rows, 128, calibration=calibration.hidden, bits=8
        ),
    }
    searches = {
        name: hire.HireSoftmax(rows, estimator, K, CANDIDATES)
        for name, estimator in estimators.items()
    }
    forms = dense_forms(rows, K)
    rng = np.random.default_rng(0)
    positions = rng.permutation(len(evaluation.hidden))[:REPEATS]
    seconds = medians(
        interleaved(forms | searches, [evaluation.hidden[i : i + 1] for i in positions], REPEATS)
    )
    dense = min(forms, key=lambda name: seconds[name])
    print(
        f"Gemma 3 270M ({gemma.weights_precision}), softmax over {rows.shape[0]:,} tokens, batch 1"
    )
    print(
        f"recall over {len(evaluation.hidden)} positions; "
        f"dense is the fastest of {len(forms)} forms"
    )
    print(f"{'':34}{'recall@32':>10}{'top-1 kept':>12}{'bytes read':>12}{'ms':>8}{'speed':>8}")
    for name in (dense, *searches):
        bytes_fraction, recall, top1 = 1.0, 1.0, 1.0  # dense is the reference for recall
        if name in searches:
            bytes_fraction = searches[name].bytes_read() / rows.nbytes
            recall, top1 = (
                interval["mean"]
                for interval in judge(searches[name], evaluation, true_top).values()
            )
        ratio = seconds[dense] / seconds[name]
        print(
            f"{name:34}{recall:10.3f}{top1:12.3f}{bytes_fraction:12.1%}"
            f"{seconds[name] * 1e3:8.1f}{ratio:7.1f}x"
        )

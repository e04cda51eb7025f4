"""The first minute: dense against HiRE on the softmax of Gemma 3 270M, in one table."""

import numpy as np

import hire
from hire.choose import true_top_k
from hire.lab import prefills
from hire.lab.evaluation import judge
from hire.lab.text import documents
from hire.lab.timing import dense_forms, interleaved, medians
from hire.models import load_gemma

K, CANDIDATES, REPEATS = 32, 2048, 15


def demo() -> None:
    """Print recall, bytes and time of each form on hidden states of a novel, after fitting on speeches and commentary."""
    gemma = load_gemma()
    rows = gemma.model.token_embeddings()
    fitted_to = prefills.states(gemma, documents("calibration")[::2], 128, skip=4)
    unseen = prefills.states(gemma, documents("evaluation", ["novel"])[:16], 32, skip=12)
    best = true_top_k(rows, unseen.hidden, K)
    estimators = {
        "HiRE-Q, int8": hire.Quantized.fit(rows, 8),
        "HiRE-LR, rank 128, fitted, int8": hire.LowRank.fit(rows, 128, calibration=fitted_to.hidden, bits=8),
    }
    searched = {name: hire.HireSoftmax(rows, estimator, K, CANDIDATES) for name, estimator in estimators.items()}
    forms = dense_forms(rows, K)
    rng = np.random.default_rng(0)
    order = rng.permutation(len(unseen.hidden))[:REPEATS]
    seconds = medians(interleaved(forms | searched, [unseen.hidden[i : i + 1] for i in order], REPEATS))
    dense = min(forms, key=lambda name: seconds[name])
    print(f"Gemma 3 270M ({gemma.stored}), softmax of {rows.shape[0]:,} words, batch 1")
    print(f"recall over {len(unseen.hidden)} positions; dense is the fastest of {len(forms)} forms")
    print(f"{'':34}{'recall@32':>10}{'top-1 kept':>12}{'bytes read':>12}{'ms':>8}{'speed':>8}")
    for name in (dense, *searched):
        share, recall, first = 1.0, 1.0, 1.0  # dense is what recall is measured against
        if name in searched:
            share = searched[name].bytes_read / rows.nbytes
            recall, first = (rate["mean"] for rate in judge(searched[name], unseen, best).values())
        ratio = seconds[dense] / seconds[name]
        print(f"{name:34}{recall:10.3f}{first:12.3f}{share:12.1%}{seconds[name] * 1e3:8.1f}{ratio:7.1f}x")

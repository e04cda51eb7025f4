"""The first minute: dense against HiRE on the softmax of Gemma 3 270M, in one table."""

import jax
import numpy as np

import hire
from hire.choose import true_top_k
from hire.estimators import row_scores
from hire.lab.evaluation import collect, windows
from hire.lab.text import documents
from hire.lab.timing import interleaved, medians
from hire.models import load_gemma

K, CANDIDATES, REPEATS = 32, 2048, 15


def demo() -> None:
    """Print recall, bytes and time of each form on hidden states of a novel, after fitting on speeches and commentary."""
    gemma = load_gemma()
    rows = gemma.model.embedding[...]
    fitted_to = collect(gemma.model, *windows(gemma, documents("calibration"), 96))
    unseen = collect(gemma.model, *windows(gemma, documents("evaluation", ["novel"])[:32], 32), skip=12)
    best = true_top_k(rows, unseen.hidden, K)
    forms = {"dense float32, exact": jax.jit(lambda rows, x: hire.exact_top_k(row_scores(x, rows), K))}
    searched = {
        "HiRE-Q, int8": hire.Quantized.fit(rows, 8),
        "HiRE-LR, rank 128, fitted, int8": hire.LowRank.fit(rows, 128, calibration=fitted_to.hidden, bits=8),
    }
    searched = {name: hire.HireSoftmax(rows, estimator, K, CANDIDATES) for name, estimator in searched.items()}
    calls = {name: lambda x, form=form: form(rows, x) for name, form in forms.items()} | searched
    rng = np.random.default_rng(0)
    order = rng.permutation(len(unseen.hidden))[:REPEATS]
    seconds = medians(interleaved(calls, [unseen.hidden[i : i + 1] for i in order], REPEATS))
    dense = next(iter(seconds))
    print(f"Gemma 3 270M ({gemma.stored}), softmax of {rows.shape[0]:,} words, batch 1; recall over {len(unseen.hidden)} positions")
    print(f"{'':34}{'recall@32':>10}{'top-1 kept':>12}{'bytes read':>12}{'ms':>8}{'speed':>8}")
    for name, call in calls.items():
        found = [np.asarray(call(unseen.hidden[i : i + 16]).indices) for i in range(0, len(unseen.hidden), 16)]
        found = np.concatenate(found)
        recall = np.mean([np.isin(true, got).mean() for true, got in zip(best.indices, found, strict=True)])
        first = np.mean(best.indices[:, 0] == found[:, 0])
        share = searched[name].bytes_read / rows.nbytes if name in searched else 1.0
        ratio = seconds[dense] / seconds[name]
        print(f"{name:34}{recall:10.3f}{first:12.3f}{share:12.1%}{seconds[name] * 1e3:8.1f}{ratio:7.1f}x")

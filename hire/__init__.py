"""HiRE: High Recall Approximate Top-k Estimation (arXiv 2402.09360), in JAX.

Predict with a small copy which rows score best, compute only those exactly:

    estimator = hire.LowRank.fit(rows, rank=128, calibration=queries, bits=8)
    top = hire.high_recall_top_k(x, rows, estimator, k=32, candidates=2048)
"""

from hire.choose import choose_candidates
from hire.estimators import Estimator, LowRank, Quantized
from hire.search import high_recall_top_k
from hire.softmax import HireSoftmax
from hire.topk import TopK, bucketed_top_k, exact_top_k, expected_recall, recall

__all__ = [
    "Estimator",
    "HireSoftmax",
    "LowRank",
    "Quantized",
    "TopK",
    "bucketed_top_k",
    "choose_candidates",
    "exact_top_k",
    "expected_recall",
    "high_recall_top_k",
    "recall",
]

"""HiRE: High Recall Approximate Top-k Estimation (arXiv 2402.09360), in JAX.

Predict with a small copy which rows score best, compute only those exactly:

    estimator = hire.LowRank.fit(rows, rank=128, calibration=queries, bits=8)
    top = hire.high_recall_top_k(x, rows, estimator, k=32, candidates=2048)
"""

from typing import TYPE_CHECKING

from hire.certify import certified_top_k
from hire.choose import choose_candidates, tune
from hire.distributed import da_top_k
from hire.estimators import Estimator, LowRank, Quantized
from hire.ffn import HireFFN
from hire.sampling import sample, sampling_probabilities
from hire.search import Cascade, high_recall_top_k
from hire.softmax import HireSoftmax
from hire.topk import TopK, bucketed_top_k, exact_top_k, group_scores, recall

if TYPE_CHECKING:
    from hire.models import convert, generate

__all__ = [
    "Cascade",
    "Estimator",
    "HireFFN",
    "HireSoftmax",
    "LowRank",
    "Quantized",
    "TopK",
    "bucketed_top_k",
    "certified_top_k",
    "choose_candidates",
    "convert",
    "da_top_k",
    "exact_top_k",
    "generate",
    "group_scores",
    "high_recall_top_k",
    "recall",
    "sample",
    "sampling_probabilities",
    "tune",
]


def __getattr__(name: str):
    """convert and generate come with the models, whose Flax the algorithm alone does not need: imported at first use."""
    if name in ("convert", "generate"):
        import importlib

        try:
            return getattr(importlib.import_module("hire.models"), name)
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(f"hire.{name} needs {error.name}: pip install 'hire[models]'", name=error.name) from None
    raise AttributeError(f"module 'hire' has no attribute {name!r}")

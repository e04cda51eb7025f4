"""HiRE: High Recall Approximate Top-k Estimation (arXiv 2402.09360), in JAX.

A small estimator nominates the rows with the best scores. Only these rows are scored exactly:

    estimator = hire.LowRank.fit(rows, rank=128, calibration=queries, bits=8)
    top = hire.high_recall_top_k(x, rows, estimator, k=32, candidates=2048)
"""

from typing import TYPE_CHECKING

from hire.certify import certified_top_k
from hire.distributed import da_top_k
from hire.estimators.base import Estimator
from hire.estimators.cascade import Cascade
from hire.estimators.low_rank import LowRank
from hire.estimators.quantized import Quantized
from hire.fitting import evaluate, fit_softmax
from hire.layers.ffn import HireFFN
from hire.layers.logit_adjustments import Penalties
from hire.layers.softmax import HireSoftmax
from hire.ops.top_k import TopK, bucketed_top_k, exact_top_k, group_scores, recall
from hire.sampling import sample, sampling_probabilities
from hire.saving import load, save
from hire.search import high_recall_top_k
from hire.tuning import choose_candidates, tune

if TYPE_CHECKING:
    from hire.models import convert, generate

__version__ = "0.2.0"

__all__ = [
    "Cascade",
    "Estimator",
    "HireFFN",
    "HireSoftmax",
    "LowRank",
    "Penalties",
    "Quantized",
    "TopK",
    "bucketed_top_k",
    "certified_top_k",
    "choose_candidates",
    "convert",
    "da_top_k",
    "evaluate",
    "exact_top_k",
    "fit_softmax",
    "generate",
    "group_scores",
    "high_recall_top_k",
    "load",
    "recall",
    "sample",
    "sampling_probabilities",
    "save",
    "tune",
]


def __getattr__(name: str):
    """Import `convert` and `generate` from `hire.models` at first use.

    The models need Flax; the algorithm alone does not.

    Args:
        name: Name of the module attribute.

    Returns:
        The function `convert` or `generate`.

    Raises:
        ModuleNotFoundError: If a package that `hire.models` needs is not installed.
        AttributeError: If the module has no such attribute.
    """
    if name in ("convert", "generate"):
        import importlib

        try:
            return getattr(importlib.import_module("hire.models"), name)
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"hire.{name} needs {error.name}: pip install 'hire[models]'", name=error.name
            ) from None
    raise AttributeError(f"module 'hire' has no attribute {name!r}")

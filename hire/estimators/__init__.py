"""Estimators: small compressed forms of the rows that predict their scores.

The paper names low rank (HiRE-LR) and quantization (HiRE-Q). It leaves rank, bits and fitting open
(PAPER claim lr-and-q), so these are our choices.
"""

from hire.estimators.base import Estimator, nominate_by_scores
from hire.estimators.cascade import Cascade
from hire.estimators.exact_rows import ExactRowsEstimator
from hire.estimators.fingerprints import fingerprint
from hire.estimators.low_rank import LowRank
from hire.estimators.quantized import Quantized

__all__ = [
    "Cascade",
    "Estimator",
    "LowRank",
    "ExactRowsEstimator",
    "Quantized",
    "fingerprint",
    "nominate_by_scores",
]

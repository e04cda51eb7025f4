"""HiRE-Softmax: the best words of a vocabulary without reading most of it."""

from dataclasses import dataclass, field

import jax

from hire.axes import Queries, Rows
from hire.estimators import Estimator
from hire.search import check_search, high_recall_top_k
from hire.topk import TopK


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class HireSoftmax:
    """Top-k logits of the words whose embeddings are `rows` (v, d), tied or not: the rows are held, never copied.

    `softmax(hidden)` maps hidden states (b, d) to the values and indices (b, k) of the k best words. It is compiled
    already; inside another compiled function pass it as an argument, since jax.jit(softmax) would bake the rows into the
    program as constants. Raises ValueError when built with 1 <= k <= candidates <= v not holding, or with an estimator
    of other rows.
    """

    rows: Rows
    estimator: Estimator
    k: int = field(metadata=dict(static=True))
    candidates: int = field(metadata=dict(static=True))

    def __post_init__(self):
        if hasattr(self.rows, "ndim"):  # jax also builds it around placeholders that are no arrays
            check_search(self.rows, self.estimator, self.k, self.candidates)

    @jax.jit
    def __call__(self, hidden: Queries) -> TopK:
        return high_recall_top_k(hidden, self.rows, self.estimator, k=self.k, candidates=self.candidates)

    @property
    def bytes_read(self) -> int:
        """Bytes of weights that one query reads: the estimator and the candidates' exact rows."""
        width = self.rows.shape[1]
        return self.estimator.bytes_read(self.candidates) + self.candidates * width * self.rows.dtype.itemsize

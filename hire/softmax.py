"""HiRE-Softmax: the best words of a vocabulary, and their probabilities, without reading most of it."""

from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hire.axes import AnyArray, Array, Blocks, Float, Int, Queries, Rows
from hire.estimators import Estimator, Quantized, check_form, row_nbytes, row_scores_at
from hire.search import best_of, check_fitted, check_queries, check_search, high_recall_top_k, nominate
from hire.topk import TopK


class Words(NamedTuple):
    """The k best words of each query and the estimated normaliser: log p = top.values - log_normalizer[:, None], in nats.

    `error` is the standard error of log_normalizer to expect, see HireSoftmax.words.
    """

    top: TopK
    log_normalizer: Float[Array, " b"]
    error: Float[Array, " b"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class HireSoftmax:
    """Top-k logits of the words whose embeddings are `rows` (v, d), tied or not: the rows are held, never copied.

    Rows may also be Quantized ones: "exact" then means the logits that those give.

    On a TPU give them in hire.kernels.rows.blocks and quantize the copy, for its kernels; `form` as in `high_recall_top_k`.

    `softmax(hidden)` maps hidden states (b, d) to the values and indices (b, k) of the k best words. It is compiled
    already; inside another compiled function pass it as an argument, since jax.jit(softmax) would bake the rows into the
    program as constants. Raises ValueError when built with 1 <= k <= candidates <= v not holding, or with an estimator
    of other rows.
    """

    rows: Rows | Blocks | Quantized
    estimator: Estimator
    k: int = field(metadata=dict(static=True))
    candidates: int = field(metadata=dict(static=True))
    form: str = field(metadata=dict(static=True), default="auto")

    def __post_init__(self):
        if isinstance(getattr(self.rows, "codes", self.rows), AnyArray):  # jax also builds it around placeholders and shapes
            check_search(self.rows, self.estimator, self.k, self.candidates)
            check_fitted(self.rows, self.estimator)
            check_form(self.form)

    @jax.jit
    def __call__(self, hidden: Queries) -> TopK:
        return high_recall_top_k(hidden, self.rows, self.estimator, k=self.k, candidates=self.candidates, form=self.form)

    @jax.jit
    def words(self, hidden: Queries) -> Words:
        """The k best words of hidden states (b, d), and the log of the sum over the whole vocabulary, estimated.

        The candidates count with their exact logits, the tail with the estimator's times a correction, since errors that cancel in
        a logit do not in a sum of exponentials. The lower half of the candidates, which the estimator picked like any row of the
        tail but whose exact logits are known, tells the correction for each query. Its error is the tail's share of the probability
        times its sampling error and its drift from the quarter of the candidates above. Our choice: the paper names no normaliser.
        """
        check_queries(hidden, self.estimator)
        estimated = self.estimator.scores(hidden)
        chosen = nominate(estimated, self.candidates)
        exact = self.exact_logits(hidden, chosen)
        guessed = jnp.take_along_axis(estimated, chosen, axis=1)
        half = self.candidates // 2  # candidates come best first
        correction, scatter = log_ratio(exact[:, half:], guessed[:, half:])
        above, _ = log_ratio(exact[:, half // 2 : max(half, 1)], guessed[:, half // 2 : max(half, 1)])
        rest = estimated.at[jnp.arange(len(hidden))[:, None], chosen].set(-jnp.inf)
        tail = jax.nn.logsumexp(rest, axis=1) + correction
        whole = jnp.logaddexp(jax.nn.logsumexp(exact, axis=1), tail)
        return Words(best_of(chosen, exact, self.k), whole, jnp.exp(tail - whole) * jnp.hypot(scatter, correction - above))

    @jax.jit
    def exact_logits(self, hidden: Queries, words: Int[AnyArray, "b n"]) -> Float[Array, "b n"]:
        """Exact logits of words (b, n) after hidden states (b, d): their rows alone are read."""
        return row_scores_at(hidden, self.rows, words, form=self.form)

    @jax.jit
    def log_probabilities(self, hidden: Queries, words: Int[AnyArray, "b n"]) -> Float[Array, "b n"]:
        """Log-probabilities, in nats, of words (b, n) after hidden states (b, d): exact logits less the estimated normaliser."""
        return self.exact_logits(hidden, words) - self.words(hidden).log_normalizer[:, None]

    @property
    def bytes_read(self) -> int:
        """Bytes of weights that one query reads: the estimator and the candidates' exact rows."""
        return self.bytes_for(1)

    def bytes_for(self, queries: int) -> int:
        """Bytes that so many read together, which share the estimator."""
        exact = self.candidates * row_nbytes(self.rows, self.estimator.shape[1])
        return self.estimator.bytes_read(self.candidates) + queries * exact


def log_ratio(exact: Float[Array, "b c"], guessed: Float[Array, "b c"]) -> tuple[Float[Array, " b"], Float[Array, " b"]]:
    """Log of the sum of exp(exact) over that of exp(guessed), and its sampling error, the rows being a weighted sample."""
    weights = jax.nn.softmax(guessed, axis=1)
    ratio = jax.nn.logsumexp(exact, axis=1) - jax.nn.logsumexp(guessed, axis=1)
    apart = jnp.expm1(exact - guessed - ratio[:, None])
    return ratio, jnp.sqrt(jnp.sum((weights * apart) ** 2, axis=1))

"""HiRE-Softmax: the best words of a vocabulary, and their probabilities, without reading most of it."""

from dataclasses import field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hire.axes import AnyArray, Array, Blocks, Bool, Float, Int, Queries, Rows, States
from hire.distributed import Axis, da_top_k, merged, told_again
from hire.estimators import Estimator, Quantized, row_nbytes, row_scores_at
from hire.kernels.form import check_form
from hire.pytrees import pytree
from hire.search import (
    best_of,
    check_fitted,
    check_queries,
    check_search,
    for_any_lead,
    foremost,
    high_recall_top_k,
    log_ratio,
    on_device,
    ranked,
)
from hire.topk import TopK


class Words(NamedTuple):
    """The k best words of each query and the estimated normaliser: log p = top.values - log_normalizer[:, None], in nats.

    `error` is the standard error of log_normalizer to expect, see HireSoftmax.words.
    """

    top: TopK
    log_normalizer: Float[Array, " b"]
    error: Float[Array, " b"]


@pytree
class HireSoftmax:
    """HiRE-Softmax (PAPER claim softmax-speedup): top-k logits of the words whose embeddings are `rows` (v, d), tied or not.
    Rows that are jax arrays are held, never copied; those of numpy are sent to the device once, here.

    Rows may also be Quantized ones: "exact" then means the logits that those give.

    On a TPU give them in hire.kernels.rows.blocks and quantize the copy, for its kernels; `form` as in `high_recall_top_k`.

    `softmax(hidden)` maps hidden states (b, d), or (*b, d), after the model's final norm, to the values and indices (b, k) of the
    k best words. It is compiled already; inside another compiled function pass it as an argument, since jax.jit(softmax) would
    bake the rows into the program as constants. With an `axis`, whose mesh jax.set_mesh has set, the rows lie over several
    devices, as `sharded` puts them, and DA-TOP-k searches; all else reads the same. Raises ValueError when built with
    1 <= k <= candidates <= v not holding, with an estimator of other rows or for another form, and when called with hidden states
    of another width.
    """

    rows: Rows | Blocks | Quantized
    estimator: Estimator
    k: int = field(metadata=dict(static=True))
    candidates: int = field(metadata=dict(static=True))
    form: str = field(metadata=dict(static=True), default="auto")
    axis: str | Axis | None = field(metadata=dict(static=True), default=None)

    def __post_init__(self):
        k, candidates = check_search(self.rows, self.estimator, self.k, self.candidates)
        check_form(self.form)
        object.__setattr__(self, "rows", on_device(self.rows))
        object.__setattr__(self, "k", k)
        object.__setattr__(self, "candidates", candidates)
        check_fitted(self.rows, self.estimator)

    def sharded(self, axis: str | Axis) -> "HireSoftmax":
        """The same with its rows on the devices of an axis of the mesh, as Axis says, filled up where they do not divide.

        Raises ValueError when it is sharded already.
        """
        if self.axis is not None:
            raise ValueError(f"softmax over the axis {Axis.of(self.axis).name!r}: expected one that is not sharded yet")
        axis, v = Axis.of(axis), self.rows.shape[0]
        axis = replace(axis, rows=v if v % axis.size else None)
        rows = axis.put(self.rows)
        return replace(self, rows=rows, estimator=told_again(axis.put(self.estimator), rows), axis=axis)

    @jax.jit
    def __call__(self, hidden: States) -> TopK:
        check_queries(hidden, self.estimator)
        how: dict[str, Any] = dict(k=self.k, candidates=self.candidates, form=self.form)
        if self.axis is None:
            return high_recall_top_k(hidden, self.rows, self.estimator, **how)
        axis = Axis.of(self.axis)
        return for_any_lead(lambda x: axis.mapped(lambda own, x: da_top_k(x, **own, **how, axis=axis), self.parts, x), hidden)

    @property
    def parts(self) -> dict[str, Any]:
        """What lies on the devices of an axis."""
        return dict(rows=self.rows, estimator=self.estimator)

    @jax.jit
    def words(self, hidden: States) -> Words:
        """The k best words of hidden states (b, d), the same as a call finds, and the log, in nats, of the sum over the whole
        vocabulary, estimated.

        The candidates count with their exact logits, the tail with the estimator's times a correction, since errors that cancel in
        a logit do not in a sum of exponentials. The lower half of the candidates, which the estimator picked like any row of the
        tail but whose exact logits are known, tells the correction for each query. Its error is the tail's share of the probability
        times its sampling error and its drift from the quarter of the candidates above. Our choice: the paper names no normaliser.
        """
        check_queries(hidden, self.estimator)
        if self.axis is None:
            return for_any_lead(self.words_of, hidden)
        axis = Axis.of(self.axis)
        return for_any_lead(lambda x: axis.mapped(self.words_of_all, self.parts, x), hidden)

    def words_of_all(self, own: dict[str, Any], hidden: Queries) -> Words:
        """`words` on every device of the axis: each estimates the sum over its own, from the candidates that da_top_k has."""
        axis, held = Axis.of(self.axis or ""), own["rows"].shape[0]
        k, candidates = (axis.with_filling(count, held) for count in (self.k, self.candidates))
        real = jnp.asarray(axis.whole(jnp.arange(held), held) < axis.total(held))
        found = HireSoftmax(**own, k=k, candidates=candidates, form=self.form).words_of(hidden, real)
        sums, errors = jax.lax.all_gather(jnp.stack([found.log_normalizer, found.error]), axis.name, axis=1)
        whole = jax.nn.logsumexp(sums, axis=0)
        top = merged(found.top, axis, held, axis.share(self.k, held), self.k)
        return Words(top, whole, jnp.linalg.norm(jnp.exp(sums - whole[None]) * errors, axis=0))

    def words_of(self, hidden: Queries, real: Bool[Array, " m"] | None = None) -> Words:
        """`words` of rows of which some are `real`, the others filling (all are by default)."""
        chosen = foremost(hidden, self.estimator, self.candidates, self.form)
        estimated, exact = self.estimator.scores(hidden), self.exact_logits(hidden, chosen)
        if real is not None:
            estimated, exact = jnp.where(real[None], estimated, -jnp.inf), jnp.where(real[chosen], exact, -jnp.inf)
        guessed = jnp.take_along_axis(estimated, chosen, axis=1)
        half = self.candidates // 2
        correction, scatter = log_ratio(*ranked(exact, guessed, half))
        above, _ = log_ratio(*ranked(exact, guessed, half // 2, max(half, 1)))
        rest = estimated.at[jnp.arange(len(hidden))[:, None], chosen].set(-jnp.inf)
        tail = jax.nn.logsumexp(rest, axis=1) + correction
        whole = jnp.logaddexp(jax.nn.logsumexp(exact, axis=1), tail)
        return Words(best_of(chosen, exact, self.k), whole, jnp.exp(tail - whole) * jnp.hypot(scatter, correction - above))

    @jax.jit
    def exact_logits(self, hidden: Queries, words: Int[AnyArray, "b n"]) -> Float[Array, "b n"]:
        """Exact logits of words (b, n) after hidden states (b, d): their rows alone are read."""
        check_queries(hidden, self.estimator)
        if self.axis is not None:
            return Axis.of(self.axis).mapped(self.logits_of_own, self.parts, hidden, words)
        return row_scores_at(hidden, self.rows, words, form=self.form)

    def logits_of_own(self, own: dict[str, Any], hidden: Queries, words: Int[AnyArray, "b n"]) -> Float[Array, "b n"]:
        """`exact_logits` on every device of the axis, which has the rows of some words."""
        axis, held = Axis.of(self.axis or ""), own["rows"].shape[0]
        place = axis.stored(words, axis.size * held) - jax.lax.axis_index(axis.name) * held
        scores = row_scores_at(hidden, own["rows"], jnp.clip(place, 0, held - 1), form=self.form)
        return jax.lax.psum(jnp.where((place >= 0) & (place < held), scores, 0.0), axis.name)

    @jax.jit
    def log_probabilities(self, hidden: Queries, words: Int[AnyArray, "b n"]) -> Float[Array, "b n"]:
        """Log-probabilities, in nats, of words (b, n) after hidden states (b, d): exact logits less the estimated normaliser."""
        return self.exact_logits(hidden, words) - self.words(hidden).log_normalizer[:, None]

    @property
    def bytes_read(self) -> int:
        """Bytes of weights that one query reads: the estimator and the candidates' exact rows."""
        return self.bytes_for(1)

    def bytes_for(self, queries: int) -> int:
        """Bytes that so many read together, which share the estimator; on all devices of an axis."""
        exact = self.candidates * row_nbytes(self.rows, self.estimator.shape[1])
        return self.estimator.bytes_read(self.candidates) + queries * exact

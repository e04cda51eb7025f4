"""The models of figure 08: a dense decoder with the parts of HiRE added one after the other.

The module also builds what a user could take instead: dense models with rows of fewer bytes.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx

import hire
from hire.estimators.fingerprints import fingerprint
from hire.lab.metrics.group_sparsity import layers_of
from hire.models import Decoder, DecoderConfig, preset
from hire.models.conversion import SearchedFFN
from hire.models.decoder import FFN
from hire.models.loading import require_memory
from hire.ops.row_products import row_scores
from hire.ops.top_k import TopK, exact_top_k, floor_fraction
from hire.pytrees import pytree
from hire.types import Array, Float, Queries, Rows

# Names of the variants, each with one part more than the one before.
DENSE = "dense"
LR_SOFTMAX = "LR softmax"
Q_SOFTMAX = "Q softmax"
SOFTMAX = "LR fitted"
BOTH = "+ sparse FFN"
STATIC = "+ static groups"
SHARED = "+ shared selection"
# Further variants of the large model, which are timed beside these.
FFN_ALONE = "FFN alone"
WIDER = "10 % of 20 %"

GROUP_SIZE = 8
# Share of the groups in the top-k of an FFN, and share that are candidates, of the variant WIDER.
WIDER_SHARES = (0.1, 0.2)

# Preset to take where the memory is too small for a preset.
SMALLER = {"paper_1b": "paper_half", "paper_half": "small"}


@dataclass(frozen=True, kw_only=True)
class VariantSizes:
    """The sizes of all variants of one model.

    Fractions are those of a layer's groups of 8 neurons.

    Attributes:
        k: Size of the top-k of the softmax.
        candidates: Candidates (k') of the softmax.
        softmax_rank: Rank of the softmax estimators.
        softmax_bits: Bits of the fitted factors of the softmax.
        ffn_rank: Rank of the FFN estimators.
        ffn_k_fraction: Fraction of the groups in the top-k of an FFN, static groups included.
        ffn_candidates_fraction: Fraction of the groups that are candidates, static groups included.
        static_fraction: Fraction of the groups that are static groups.
        shared_candidates_fraction: Fraction of the groups that are candidates when a batch shares
            one selection.
        shared_batch: Number of tokens that share one selection.
    """

    k: int = 32
    candidates: int = 2048
    softmax_rank: int = 128
    softmax_bits: int = 8
    ffn_rank: int = 384
    ffn_k_fraction: float = 0.05
    ffn_candidates_fraction: float = 0.1
    static_fraction: float = 0.02
    shared_candidates_fraction: float = 0.25
    shared_batch: int = 8

    def ffn_counts(self, config: DecoderConfig) -> dict[str, Any]:
        """Return the arguments `k` and `candidates` of HireFFN, in groups.

        Args:
            config: Shape of the model.
        """
        return ffn_counts(config, self.ffn_k_fraction, self.ffn_candidates_fraction)


def ffn_counts(
    config: DecoderConfig, k_fraction: float, candidates_fraction: float
) -> dict[str, Any]:
    """Return the arguments `k` and `candidates` of HireFFN, in groups.

    Args:
        config: Shape of the model.
        k_fraction: Fraction of the groups in the top-k.
        candidates_fraction: Fraction of the groups that are candidates.
    """
    groups = config.ffn_width // GROUP_SIZE
    return dict(
        k=floor_fraction(k_fraction, groups), candidates=floor_fraction(candidates_fraction, groups)
    )


def build(
    model: Decoder,
    softmax: hire.HireSoftmax,
    ffns: Sequence[hire.HireFFN],
    sizes: VariantSizes,
    directions: str = "leading",
) -> dict[str, Decoder]:
    """Create the variants of a model; each goes one step further than the one before.

    Args:
        model: Dense model. Its first groups become the static groups (see
            `group_sparsity.most_used_first`).
        softmax: Search of the softmax, with fitted factors of few bits.
        ffns: Search of each FFN, without static groups.
        sizes: Sizes of the variants.
        directions: Directions of the plain low-rank estimator, see `LowRank.fit`.

    Returns:
        The models by name. The first one is DENSE.
    """
    rows, groups = model.head_rows(), model.config.ffn_width // GROUP_SIZE
    first_estimators = {
        LR_SOFTMAX: hire.LowRank.fit(rows, sizes.softmax_rank, directions=directions),
        Q_SOFTMAX: hire.Quantized.fit(rows, 8),
    }
    variants = {DENSE: model}
    for name, estimator in first_estimators.items():
        first_softmax = hire.HireSoftmax(rows, estimator, sizes.k, sizes.candidates)
        variants[name] = hire.convert(model, softmax=first_softmax)
    variants[SOFTMAX] = hire.convert(model, softmax=softmax)
    variants[BOTH] = hire.convert(model, softmax=softmax, ffn=ffns, tokens_per_selection=1)
    static_groups = floor_fraction(sizes.static_fraction, groups)
    candidates = floor_fraction(sizes.ffn_candidates_fraction - sizes.static_fraction, groups)
    static_ffns = [with_static_groups(ffn, static_groups, candidates) for ffn in ffns]
    variants[STATIC] = hire.convert(model, softmax=softmax, ffn=static_ffns, tokens_per_selection=1)
    shared_candidates = floor_fraction(sizes.shared_candidates_fraction, groups)
    shared_ffns = [replace(ffn, candidates=shared_candidates, share_selection=True) for ffn in ffns]
    variants[SHARED] = hire.convert(
        model, softmax=softmax, ffn=shared_ffns, tokens_per_selection=sizes.shared_batch
    )
    return variants


def build_untrained(model: Decoder, sizes: VariantSizes) -> dict[str, Decoder]:
    """Create the variants of a model with random weights (see `build`).

    All low-rank estimators use random directions: for random weights no direction is better than
    another.

    Args:
        model: Dense model.
        sizes: Sizes of the variants.
    """
    fit = functools.partial(hire.LowRank.fit, directions="random")
    rows = model.head_rows()
    estimator = fit(rows, sizes.softmax_rank, bits=sizes.softmax_bits)
    softmax = hire.HireSoftmax(rows, estimator, sizes.k, sizes.candidates)
    ffns = []
    for layer in layers_of(model):
        up, down = layer.up[...], layer.down[...]
        estimator = fit(up, sizes.ffn_rank, bits=8)
        ffns.append(hire.HireFFN(up, down, estimator, **sizes.ffn_counts(model.config)))
    return build(model, softmax, ffns, sizes, directions="random")


def with_static_groups(ffn: hire.HireFFN, static_groups: int, candidates: int) -> hire.HireFFN:
    """Return a layer with static groups and the same estimator of its other groups.

    The estimator stays the one that was fitted to all neurons. Its factors of the neurons outside
    the static groups are taken.

    Args:
        ffn: Layer without static groups and with a low-rank estimator.
        static_groups: Number of static groups; these are the first groups.
        candidates: Number of candidates among the other groups.
    """
    first_neuron = static_groups * ffn.group_size
    estimator = cast(hire.LowRank, ffn.estimator)
    bounds = estimator.error_bounds
    estimator = replace(
        estimator,
        factors=estimator.factors[first_neuron:],
        fingerprint=fingerprint(cast(Rows, ffn.up)[first_neuron:]),
        error_bounds=None if bounds is None else bounds[first_neuron:],
    )
    return replace(ffn, estimator=estimator, static_groups=static_groups, candidates=candidates)


def with_shares(variant: Decoder, k_fraction: float, candidates_fraction: float) -> Decoder:
    """Return a searched model with the same estimators and other sizes of the FFN search.

    Args:
        variant: Searched model.
        k_fraction: Fraction of the groups in the top-k.
        candidates_fraction: Fraction of the groups that are candidates.
    """
    counts = ffn_counts(variant.config, k_fraction, candidates_fraction)
    ffns = [replace(ffn, **counts) for ffn in ffns_of(variant)]
    return hire.convert(variant, softmax=softmax_of(variant), ffn=ffns)


def ffns_of(model: Decoder) -> list[hire.HireFFN]:
    """Return the HiRE layers of a model; the list is empty if its FFNs are dense."""
    return [block.ffn.ffn for block in model.blocks if isinstance(block.ffn, SearchedFFN)]


def softmax_of(model: Decoder) -> hire.HireSoftmax | None:
    """Return the HireSoftmax of a model, or None if its softmax is dense."""
    return None if model.softmax is None else model.softmax.with_rows(model.embedding[...])


def without_selection(model: Decoder) -> Decoder:
    """Return a model that was trained sparse with all of its neurons active.

    It is the dense model to time against: the selection of training would only add to its time.
    """
    graph = nnx.graphdef(Decoder(replace(model.config, kept=1.0), rngs=nnx.Rngs(0)))
    return nnx.merge(graph, nnx.state(model))


@pytree
class SmallSoftmax:
    """Dense softmax over rows of fewer bytes, in place of a model's search; it reads all rows.

    Attributes:
        rows: Rows (v, d), quantized or of a small float type.
        k: Number of tokens in an answer.
    """

    rows: hire.Quantized | Float[Array, "v d"]
    k: int = field(metadata=dict(static=True))

    def with_rows(self, rows: Rows) -> Callable[[Queries], TopK]:
        """Return the function from hidden states to the best tokens; `rows` are not read."""
        return lambda hidden: exact_top_k(row_scores(hidden, self.rows), self.k)


class SmallFFN(nnx.Module):
    """Dense ReLU layer over rows of fewer bytes; it reads all rows.

    `down` is transposed to `(d, f)`. On a CPU, XLA sums along rows of small types, in parts, many
    times as fast as across them.

    Args:
        ffn: The layer.
        shrink: Function that converts rows.
    """

    def __init__(self, ffn: FFN, shrink: Callable):
        self.up, self.down = nnx.data(shrink(ffn.up[...])), nnx.data(shrink(ffn.down[...].T))

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        active = jax.nn.relu(row_scores(x.reshape(-1, x.shape[-1]), self.up))
        if len(active) > 1:
            return row_scores(active, self.down).reshape(x.shape)
        if isinstance(self.down, hire.Quantized):
            entries, scale = self.down.codes, self.down.scale
        else:
            entries, scale = self.down, 1.0
        products = entries.astype(jnp.float32) * active
        partial_sums = jnp.sum(products.reshape(len(entries), 16, -1), axis=2)
        return (partial_sums.sum(1) * scale).reshape(x.shape)


def to_int8(rows: Rows | hire.Quantized) -> hire.Quantized:
    """Return int8 rows."""
    return rows if isinstance(rows, hire.Quantized) else hire.Quantized.fit(rows, 8)


def to_bfloat16(rows: Rows) -> Rows:
    """Return rows in bfloat16."""
    return rows.astype(jnp.bfloat16)


def with_small_rows(model: Decoder, k: int, shrink: Callable) -> Decoder:
    """Return the dense model with smaller rows in softmax and FFN; no result of these is exact.

    This is the alternative that a user would pick.

    Args:
        model: Dense model.
        k: Number of top tokens.
        shrink: Function that converts rows.
    """
    small = hire.convert(model)
    # The decoder declares the search of hire.convert only.
    setattr(small, "softmax", nnx.data(SmallSoftmax(shrink(model.head_rows()), k)))
    for block, ffn in zip(small.blocks, layers_of(model), strict=True):
        block.ffn = SmallFFN(ffn, shrink)
    return small


def with_int8_rows(model: Decoder) -> Decoder:
    """Return a searched model with its exact rows in int8, too."""
    softmax = softmax_of(model)
    if softmax is not None:
        softmax = replace(softmax, rows=to_int8(model.head_rows()))
    ffns = []
    for ffn in ffns_of(model):
        gate = None if ffn.gate is None else to_int8(ffn.gate)
        ffns.append(replace(ffn, up=to_int8(ffn.up), down=to_int8(ffn.down), gate=gate))
    return hire.convert(model, softmax=softmax, ffn=ffns if ffns else None)


def model_that_fits(name: str) -> tuple[str, Decoder]:
    """Create the preset `name` with random weights, or the next smaller one if memory is too small.

    Args:
        name: Name of a preset.

    Returns:
        A tuple (name of the preset, model).

    Raises:
        MemoryError: If even the smallest of these presets does not fit.
    """
    while True:
        try:
            return name, random_model(name)
        except MemoryError as error:
            if name not in SMALLER:
                raise
            print(f"{error}: going on with {SMALLER[name]}")
            name = SMALLER[name]


def random_model(name: str) -> Decoder:
    """Create a model of a preset with random weights.

    Args:
        name: Name of the preset.

    Raises:
        MemoryError: If the model, its estimators and one alternative do not fit in memory. This is
            checked before the model is created.
    """
    config = preset(name)
    require_memory(name, 2 * 4 * sum(config.parameters().values()), SMALLER.get(name))
    return Decoder(config, rngs=nnx.Rngs(0))

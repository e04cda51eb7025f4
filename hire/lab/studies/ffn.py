"""Figure 06: how fast HiRE-FFN is, and the loss that it costs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import cast

import numpy as np
import pandas
from matplotlib.figure import Figure

import hire
from hire.estimators.base import Estimator
from hire.lab.data.text import Document, beginnings, documents
from hire.lab.figure_index import claim_limits
from hire.lab.metrics import group_sparsity
from hire.lab.metrics.intervals import relative_loss
from hire.lab.metrics.model_quality import score_documents
from hire.lab.studies import plots, tables
from hire.lab.studies.study import Claim, Record, Result
from hire.lab.studies.trained_sparsity import Studied, scores_with
from hire.lab.timing import layer_timing
from hire.lab.training import plans
from hire.models import load, preset
from hire.ops.top_k import floor_fraction
from hire.timing import in_sittings, medians, speedup_range
from hire.types import Queries, Rows

# Fits an estimator to the rows of a layer; the arguments are the layer's number and its rows.
EstimatorFunction = Callable[[int, Rows], Estimator]
# Raw seconds: batch size (or group size) -> function -> one duration per turn.
Durations = dict[int, dict[str, list[float]]]

# Share of the groups that are static in the variant with static groups.
STATIC_FRACTION = 0.05
# Largest relative loss that counts as none (figures/claims.yaml).
LOSS_LIMIT = claim_limits("ffn-speedup")["relative_loss"]
# Share of the rows that the gather benchmark reads.
GATHERED_FRACTION = 0.1
# Documents of a novel that the model without sparse training is evaluated on.
NOVEL_DOCUMENTS = 2
# Names of variants, in the series and in the figure.
STATIC, FIVE_PERCENT, SHARED = "static groups", "5 % kept", "shared selection"
# Colours of the variants, in their order.
LINE_COLORS = [plots.PALETTE[index] for index in (0, 2, 1, 3, 4, 6, 9, 5)]


@dataclass(frozen=True)
class TrainedModels:
    """The two models that were trained with a sparse FFN, and what searches their layers.

    Attributes:
        ten_percent: Model that keeps 10 % of its groups of 8 neurons.
        five_percent: Model that keeps 5 % of them.
        fits: Estimators for `ten_percent` by name: int8, int4, and low rank, plain and fitted.
        five_percent_fit: Estimator for `five_percent`: low rank, fitted.
        candidates: Number of groups that the recommended setting nominates.
        weights: Description of the weights.
    """

    ten_percent: Studied
    five_percent: Studied
    fits: dict[str, EstimatorFunction]
    five_percent_fit: EstimatorFunction
    candidates: int
    weights: str


def fitted_name(rank: int) -> str:
    """Return the name of the low-rank estimator that is fitted to calibration text."""
    return f"LR {rank} fitted"


def setting_name(kept_fraction: float, candidates: float) -> str:
    """Return the name of a setting, such as "10 % of 20 %".

    Args:
        kept_fraction: Share of the groups in the top-k.
        candidates: Share of the groups that are nominated.
    """
    return f"{100 * kept_fraction:.0f} % of {100 * candidates:.0f} %"


def check_sizes(settings: SimpleNamespace) -> None:
    """Check the sizes that depend on each other, before anything is computed.

    Args:
        settings: Sizes of the notebook.

    Raises:
        ValueError: The loss or the speed of a setting in the finding would not be measured.
    """
    if settings.chosen_candidates not in settings.candidates[-2:]:
        raise ValueError(
            f"chosen_candidates = {settings.chosen_candidates}: expected one of the last two of "
            f"candidates, {settings.candidates[-2:]}"
        )
    for batch in (1, settings.tokens_per_selection):
        if batch not in settings.batches:
            raise ValueError(
                f"batches = {settings.batches}: expected 1 and tokens_per_selection "
                f"({settings.tokens_per_selection}) among them"
            )


def load_trained(settings: SimpleNamespace) -> TrainedModels:
    """Load the trained models, with the inputs of their layers and their losses.

    Args:
        settings: Sizes of the notebook.

    Raises:
        ValueError: The sizes do not fit together.
    """
    check_sizes(settings)
    every_document = documents("evaluation", plans.KINDS)
    texts = beginnings(every_document[:: settings.document_stride], settings.document_characters)

    def studied(variant: str) -> Studied:
        return Studied.of(
            variant,
            texts,
            toy=settings.models == "toy",
            length=settings.length,
            count=settings.windows,
        )

    ten_percent, five_percent = studied("groups8"), studied("groups8-5")
    rank = settings.rank
    return TrainedModels(
        ten_percent=ten_percent,
        five_percent=five_percent,
        fits={
            "Q int8": lambda layer, rows: hire.Quantized.fit(rows, 8),
            "Q int4": lambda layer, rows: hire.Quantized.fit(rows, 4),
            f"LR {rank} plain": ten_percent.low_rank(rank, fitted=False),
            fitted_name(rank): ten_percent.low_rank(rank),
        },
        five_percent_fit=five_percent.low_rank(rank),
        candidates=floor_fraction(settings.chosen_candidates, ten_percent.model.config.groups),
        weights=f"{ten_percent.subject.weights_precision}; {settings.large_model}: random",
    )


def recall_curves(
    trained: TrainedModels, settings: SimpleNamespace
) -> dict[str, dict[str, list[float]]]:
    """Measure which share of the top-k groups each estimator nominates.

    Args:
        trained: The trained models; the one that keeps 10 % is measured.
        settings: Sizes of the notebook.

    Returns:
        Estimator -> `recall` and `bytes` (share of the dense layers' bytes), with one value per
        number of candidates.
    """
    return {
        name: trained.ten_percent.curve(fit, settings.candidates)
        for name, fit in trained.fits.items()
    }


def recall_table(
    curves: Mapping[str, Mapping[str, Sequence[float]]], candidates: Sequence[float]
) -> pandas.DataFrame:
    """Return recall and bytes as a table, one row per estimator.

    Args:
        curves: From `recall_curves`.
        candidates: Candidates as shares of the groups.
    """
    cells = {
        name: [
            f"{recall:.4f} ({size:.1%} of the bytes)"
            for recall, size in zip(curve["recall"], curve["bytes"], strict=True)
        ]
        for name, curve in curves.items()
    }
    columns = [f"k' {share:.0%} of the groups" for share in candidates]
    return pandas.DataFrame.from_dict(cells, orient="index", columns=columns)


def relative_losses(
    trained: TrainedModels, searched: Sequence[hire.HireFFN], settings: SimpleNamespace
) -> dict[str, dict[float, dict]]:
    """Measure the loss of the trained models with searched layers, against their own layers.

    Args:
        trained: The trained models.
        searched: Layers of `trained.ten_percent` with the recommended setting.
        settings: Sizes of the notebook.

    Returns:
        Variant -> candidates as a share of the groups -> `mean`, `low`, `high` and `documents` of
        the relative loss, and `bytes_fraction`: bytes read as a share of the dense layers'.
        The variants are the estimators; half of the kept groups static; the model that keeps 5 %;
        and one int8 selection for several tokens of it, of one text or of different texts.
    """
    ten, five = trained.ten_percent, trained.five_percent
    fitted, count = fitted_name(settings.rank), settings.tokens_per_selection

    def layers(name: str, share: float) -> Sequence[hire.HireFFN]:
        if (name, share) == (fitted, settings.chosen_candidates):
            return searched
        return ten.searched(trained.fits[name], share)

    def with_static_groups(share: float) -> list[hire.HireFFN]:
        return ten.searched(trained.fits[fitted], share, static_fraction=STATIC_FRACTION)

    def five_percent_loss(share: float) -> dict:
        return _loss(five, five.searched(trained.five_percent_fit, share))

    def shared_losses(across: bool) -> dict[float, dict]:
        return {
            share: _loss(
                five, shared_layers(trained, share), tokens_per_selection=count, across=across
            )
            for share in settings.shared_candidates
        }

    widest = settings.candidates[-2:]
    # Static groups are no candidates: with them, as many groups fewer are nominated.
    fewer = [round(share - STATIC_FRACTION, 2) for share in widest]
    losses = {
        name: {share: _loss(ten, layers(name, share)) for share in widest} for name in trained.fits
    }
    losses[STATIC] = {share: _loss(ten, with_static_groups(share)) for share in fewer}
    losses[FIVE_PERCENT] = {share: five_percent_loss(share) for share in settings.candidates[:2]}
    losses[f"{count} consecutive tokens"] = shared_losses(across=False)
    losses[f"{count} texts"] = shared_losses(across=True)
    return losses


def _loss(model: Studied, ffns: Sequence[hire.HireFFN], **options) -> dict:
    """Return the relative loss of a model with searched layers, and the share of bytes read."""
    judged = model.loss_difference(ffns, **options)
    return {name if name != "bytes" else "bytes_fraction": part for name, part in judged.items()}


def shared_layers(trained: TrainedModels, share: float) -> list[hire.HireFFN]:
    """Return layers of the model that keeps 5 % in which all queries of a call share candidates.

    Args:
        trained: The trained models.
        share: Candidates as a share of the groups. int8 rows nominate them.
    """
    return trained.five_percent.searched(trained.fits["Q int8"], share, share_selection=True)


def shared_candidates_needed(
    losses: Mapping[str, Mapping[float, Mapping]], settings: SimpleNamespace
) -> float:
    """Return the smallest share of candidates at which different texts can share a selection.

    Args:
        losses: From `relative_losses`.
        settings: Sizes of the notebook.

    Returns:
        The smallest of `shared_candidates` with a loss of at most LOSS_LIMIT, or the largest one.
    """
    by_share = losses[f"{settings.tokens_per_selection} texts"]
    return min(
        (share for share, loss in by_share.items() if loss["mean"] <= LOSS_LIMIT),
        default=max(settings.shared_candidates),
    )


def loss_table(losses: Mapping[str, Mapping[float, Mapping]]) -> pandas.DataFrame:
    """Return losses with their intervals as a table, one row per variant and share of candidates.

    Args:
        losses: From `relative_losses`.
    """
    by_row = {
        f"{name}, k' {share:.0%} of the groups": loss
        for name, by_share in losses.items()
        for share, loss in by_share.items()
    }
    table = tables.interval_table(
        {row: {"loss over its own": loss} for row, loss in by_row.items()}, decimals=2
    )
    table["bytes read"] = [f"{loss['bytes_fraction']:.1%}" for loss in by_row.values()]
    return table


@dataclass(frozen=True)
class Timings:
    """Raw seconds per layer.

    Attributes:
        large: Random layers of the large model, by batch size and function.
        trained: The trained layers, by batch size and function.
        gathers: Exact scores of a tenth of the rows, by group size: "gather" and "stream".
        large_names: Settings of the large layers.
        trained_names: Settings of the trained layers.
        sittings: Number of sittings, from each of which equally many durations are.
    """

    large: Durations
    trained: Durations
    gathers: Durations
    large_names: tuple[str, ...]
    trained_names: tuple[str, ...]
    sittings: int

    def speedup_range(self, durations: dict[str, list[float]], name: str) -> tuple[float, float]:
        """Return the lowest and the highest speed-up of the sittings over dense."""
        dense = layer_timing.fastest_dense(durations)
        return speedup_range(durations, name, dense, self.sittings)

    def speedup_ranges(self) -> dict[str, dict[str, dict[int, list[float]]]]:
        """Return the lowest and the highest of `speedups` in any sitting, nested alike."""
        nested = {
            "large": (self.large, self.large_names),
            "trained": (self.trained, self.trained_names),
        }
        return {
            kind: {
                name: {
                    batch: list(self.speedup_range(forms, name)) for batch, forms in timed.items()
                }
                for name in names
            }
            for kind, (timed, names) in nested.items()
        }

    def speedups(self) -> dict[str, dict[str, dict[int, float]]]:
        """Return speed-ups over the fastest dense implementation, by medians.

        Returns:
            "large" or "trained" -> setting -> batch size -> speed-up.
        """
        return {
            "large": {
                name: layer_timing.speedups_by_batch(self.large, name) for name in self.large_names
            },
            "trained": {
                name: layer_timing.speedups_by_batch(self.trained, name)
                for name in self.trained_names
            },
        }

    def bandwidth_fractions(self) -> list[float]:
        """Return the bandwidth of gathered rows as a share of a stream's, one per group size."""
        speedups = layer_timing.speedups_by_batch(self.gathers, "gather", "stream")
        return [GATHERED_FRACTION * speedup for speedup in speedups.values()]


def time_layers(
    trained: TrainedModels,
    searched: Sequence[hire.HireFFN],
    losses: Mapping[str, Mapping[float, Mapping]],
    settings: SimpleNamespace,
) -> Timings:
    """Time searched and dense layers, and reads of random groups of rows.

    Queries go through one layer after the other. All functions of a batch size take turns.

    Args:
        trained: The trained models.
        searched: Layers of `trained.ten_percent` with the recommended setting.
        losses: From `relative_losses`; they set how many candidates a shared selection needs.
        settings: Sizes of the notebook.
    """
    shared_share = shared_candidates_needed(losses, settings)
    recommended = setting_name(0.1, settings.chosen_candidates)
    config = preset(settings.large_model)
    # Kept groups, candidates and static groups as shares, and whether one selection is shared.
    shares = {
        setting_name(0.05, settings.candidates[0]): (0.05, settings.candidates[0], 0, False),
        recommended: (0.1, settings.chosen_candidates, 0, False),
        STATIC: (0.1, 0.15, STATIC_FRACTION, False),
        SHARED: (0.05, shared_share, 0, True),
    }
    large: dict[str, Sequence[hire.HireFFN]] = {}
    large |= layer_timing.random_ffns(
        settings.large_layers,
        config.ffn_width,
        config.width,
        settings.rank * config.width // trained.ten_percent.model.config.width,
        shares,
    )
    small: dict[str, Sequence[hire.HireFFN]] = {
        recommended: searched,
        SHARED: shared_layers(trained, shared_share),
    }
    repeats = settings.repeats

    def random_queries(batch: int) -> list[Queries]:
        shape = (repeats, batch, config.width)
        return list(np.random.default_rng(batch).normal(size=shape).astype(np.float32))

    def trained_queries(batch: int) -> list[np.ndarray]:
        return layer_timing.slices(trained.ten_percent.unseen[0], batch, repeats)

    comparisons: dict[tuple[str, int], tuple[dict, Sequence]] = {}
    for name, layers, queries in (
        ("large", large, random_queries),
        ("trained", small, trained_queries),
    ):
        forms = layer_timing.ffn_forms(layers)
        for batch in settings.batches:
            comparisons[name, batch] = forms, queries(batch)
    for size in settings.group_sizes:
        rows = cast(Rows, large[SHARED][0].up)
        comparisons["gathers", size] = layer_timing.gather_forms(
            rows, size, GATHERED_FRACTION, repeats
        )
    durations = in_sittings(comparisons, settings.sittings)
    counts = {"large": settings.large_layers, "trained": len(searched), "gathers": 1}

    def timed(name: str) -> Durations:
        return {
            size: layer_timing.per_layer(seconds, counts[name])
            for (kind, size), seconds in durations.items()
            if kind == name
        }

    return Timings(
        large=timed("large"),
        trained=timed("trained"),
        gathers=timed("gathers"),
        large_names=tuple(shares),
        trained_names=tuple(small),
        sittings=settings.sittings,
    )


def speedup_table(timings: Timings) -> pandas.DataFrame:
    """Return times per layer as a table, one row per function and one column per batch size.

    A cell has the median, and the speed-up over the fastest dense implementation with the range of
    the sittings.

    Args:
        timings: From `time_layers`.
    """

    def cell(durations: dict[str, list[float]], name: str) -> str:
        median_seconds = medians(durations)
        speedup = median_seconds[layer_timing.fastest_dense(durations)] / median_seconds[name]
        low, high = timings.speedup_range(durations, name)
        milliseconds = 1e3 * median_seconds[name]
        return f"{milliseconds:.2f} ms, {speedup:.2f}x ({low:.2f} to {high:.2f})"

    rows = {
        f"{model}: {name}": {
            f"batch {batch}": cell(durations, name) for batch, durations in timed.items()
        }
        for model, timed in (("large", timings.large), ("trained", timings.trained))
        for name in next(iter(timed.values()))
    }
    return pandas.DataFrame.from_dict(rows, orient="index")


def untrained_losses(settings: SimpleNamespace) -> dict[str, list[float]]:
    """Measure the relative loss of searched gated layers that were not trained for sparsity.

    The baseline is the same model with dense layers.

    Args:
        settings: Sizes of the notebook.

    Returns:
        The mean relative loss at each share of `gated_fractions`, by selection: "best neurons" and
        "best groups of 8" by exact activations; "by the gate" and "by both" for groups of 8 among
        twice as many candidates, nominated by an int8 estimator of the gate, or by int8 estimators
        of gate and up projection.
    """
    subject = load(settings.gated_model)
    texts: Sequence[Document] = beginnings(
        documents("evaluation", ["novel"])[:NOVEL_DOCUMENTS], settings.document_characters // 5
    )
    dense_nats = score_documents(subject, texts).nats

    def fit_int8(layer: int, rows: Rows) -> Estimator:
        return hire.Quantized.fit(rows, 8)

    def mean_loss(kept_fraction: float, candidates_per_kept: float, **options) -> float:
        candidates = min(1.0, candidates_per_kept * kept_fraction)
        ffns = group_sparsity.searched(
            subject.model, fit_int8, kept_fraction=kept_fraction, candidates=candidates, **options
        )
        return relative_loss(scores_with(subject, texts, ffns).nats, dense_nats)["mean"]

    # With this factor every group is a candidate at every share, so that activations are exact.
    all_groups = 1 / min(settings.gated_fractions)
    selections = {
        "best neurons": (all_groups, dict(group_size=1)),
        "best groups of 8": (all_groups, dict(group_size=8)),
        "by the gate": (2, dict(group_size=8)),
        "by both": (2, dict(group_size=8, up_copy=fit_int8)),
    }
    return {
        name: [mean_loss(kept, candidates_per_kept, **options) for kept in settings.gated_fractions]
        for name, (candidates_per_kept, options) in selections.items()
    }


def agree(first: Queries, second: Queries) -> bool:
    """Return whether two outputs are the same, up to 0.001 in every value.

    Args:
        first: Outputs (b, d).
        second: Outputs (b, d).
    """
    return bool(np.abs(np.asarray(first) - np.asarray(second)).max() < 1e-3)


@dataclass(frozen=True)
class FFNResult(Result):
    """Result of figure 06.

    Attributes:
        settings: Sizes of the notebook.
        weights: Description of the weights.
        curves: From `recall_curves`.
        losses: From `relative_losses`.
        timings: From `time_layers`.
        untrained: From `untrained_losses`.
    """

    settings: SimpleNamespace
    weights: str
    curves: dict[str, dict[str, list[float]]]
    losses: dict[str, dict[float, dict]]
    timings: Timings
    untrained: dict[str, list[float]]

    tolerance = {"recall": 0.02, "loss": 0.02, "untrained": 0.02, "default": 0.35}

    @property
    def recommended_loss(self) -> dict:
        """Loss of the recommended setting: fitted low-rank factors, the chosen candidates."""
        return self.losses[fitted_name(self.settings.rank)][self.settings.chosen_candidates]

    @property
    def five_percent_loss(self) -> dict:
        """Loss of the model that keeps 5 %, with the fewest candidates."""
        return self.losses[FIVE_PERCENT][self.settings.candidates[0]]

    @property
    def shared_candidates(self) -> float:
        """Candidates of the timed shared selection, as a share of the groups."""
        return shared_candidates_needed(self.losses, self.settings)

    @property
    def shared_loss(self) -> dict:
        """Loss of a shared selection for different texts."""
        return self.losses[f"{self.settings.tokens_per_selection} texts"][self.shared_candidates]

    @property
    def layer_size(self) -> str:
        """Neurons and width of the large layers, such as "6144 x 1536"."""
        config = preset(self.settings.large_model)
        return f"{config.ffn_width} x {config.width}"

    @property
    def recommended(self) -> str:
        """Name of the recommended setting, such as "10 % of 20 %"."""
        return setting_name(0.1, self.settings.chosen_candidates)

    def finding(self) -> str:
        """State loss and speed of the recommended setting, and those of three others."""
        settings, speedups = self.settings, self.timings.speedups()["large"]
        fewest = setting_name(0.05, settings.candidates[0])
        count = settings.tokens_per_selection
        loss, five_percent, shared_selection = (
            self.recommended_loss,
            self.five_percent_loss,
            self.shared_loss,
        )
        return (
            f"With 10 % of the groups out of {settings.chosen_candidates:.0%} candidates the "
            f"trained model reads {loss['bytes_fraction']:.0%} of the layers' bytes at "
            f"{loss['mean']:+.2%} loss. A layer of {self.layer_size} is then "
            f"{speedups[self.recommended][1]:.1f}x as fast as dense, {speedups[fewest][1]:.1f}x "
            f"with {fewest} ({five_percent['mean']:+.2%}), and {speedups[SHARED][count]:.1f}x with "
            f"one selection of {self.shared_candidates:.0%} by int8 rows for {count} texts "
            f"({shared_selection['mean']:+.2%}); its weights are random, and the losses are "
            f"transferred from the trained models. {settings.gated_model}, not trained for "
            f"sparsity, has {self.untrained['best neurons'][0]:+.1%} loss with the best "
            f"{settings.gated_fractions[0]:.0%} of its neurons."
        )

    def series(self) -> dict:
        """Return recall, losses, speed-ups and the bandwidth of gathered rows."""
        return dict(
            recall={
                name: dict(recall=curve["recall"], bytes_fraction=curve["bytes"])
                for name, curve in self.curves.items()
            },
            loss=self.losses,
            speedups=self.timings.speedups(),
            untrained=self.untrained,
            bandwidth_fraction=self.timings.bandwidth_fractions(),
        )

    def records(self) -> list[Record]:
        """Return the record of the speed-ups and losses."""
        settings, loss = self.settings, self.recommended_loss
        config = preset(settings.large_model)
        speedup = self.timings.speedups()["large"][self.recommended][1]
        low, high = self.timings.speedup_range(self.timings.large[1], self.recommended)
        claim = Claim(
            value=speedup,
            low=low,
            high=high,
            unit="x, one layer",
            quality=f"loss {loss['mean']:+.2%} over its own, transferred from the trained model",
            setting=f"10 % of {settings.chosen_candidates:.0%}, {self.layer_size}",
            supports=bool(
                speedup > claim_limits("ffn-speedup")["speedup"] and loss["mean"] <= LOSS_LIMIT
            ),
        )
        record = Record(
            id="ffn",
            weights=self.weights,
            setting=dict(rank=settings.rank, neurons=config.ffn_width, width=config.width),
            results=self.series()
            | dict(
                chosen=loss,
                five=self.five_percent_loss,  # notebook 08 reads it by this name
                shared_selection=self.shared_loss,
                shared_candidates=self.shared_candidates,
                speedup_ranges=self.timings.speedup_ranges(),
                sittings=self.timings.sittings,
            ),
            durations=dict(
                large=self.timings.large, trained=self.timings.trained, gathers=self.timings.gathers
            ),
            claims={"ffn-speedup": claim},
        )
        return [record]

    def plot(self) -> Figure:
        """Draw recall and loss against bytes, latencies, gathers, and the untrained model."""
        figure, axes = plots.new_figure(3, 2)
        self._plot_recall(axes[0, 0])
        self._plot_losses(axes[0, 1])
        self._plot_large(axes[1, 0])
        self._plot_trained(axes[1, 1])
        self._plot_gathers(axes[2, 0])
        self._plot_untrained(axes[2, 1])
        return figure

    @property
    def _colors(self) -> dict[str, str]:
        """Colour of each variant of `losses`; the first four are the estimators."""
        return dict(zip(self.losses, LINE_COLORS, strict=False))

    def _plot_recall(self, axis) -> None:
        rank, candidates = self.settings.rank, self.settings.candidates
        fitted = fitted_name(rank)
        colors = {name.replace(f" {rank}", ""): color for name, color in self._colors.items()}
        plots.frontier(axis, self.curves, colors)
        curve = self.curves[fitted]
        for end in (0, -1):
            plots.label(
                axis,
                curve["bytes"][end],
                float(plots.miss_rate(curve["recall"][end])),
                f"k' {candidates[end]:.0%}",
                self._colors[fitted],
                offset=(8, 0),
            )
        axis.legend(frameon=False, fontsize=9)
        axis.set(
            xlabel="bytes read, share of the dense layer",
            ylabel="recall of the groups kept",
            xlim=(None, 0.5),
            title="Trained: are the right groups candidates?",
        )

    def _plot_losses(self, axis) -> None:
        plots.horizontal_line(axis, LOSS_LIMIT, f"{100 * LOSS_LIMIT:g} %", plots.GRAY)
        lines = {
            name: (
                [loss["bytes_fraction"] for loss in by_share.values()],
                [loss["mean"] for loss in by_share.values()],
            )
            for name, by_share in self.losses.items()
        }
        plots.share_lines(
            axis,
            lines,
            self._colors,
            decimals=1,
            across=True,
            xlim=(0, 0.85),
            xlabel="bytes read, share of the dense layer",
            ylabel="loss over its own",
            title="Trained: the loss of the search",
        )

    def _plot_large(self, axis) -> None:
        title = f"One layer of {self.layer_size}, random"
        names = self.timings.large_names
        self._plot_latency(axis, self.timings.large, names, title, hollow=names)

    def _plot_trained(self, axis) -> None:
        self._plot_latency(
            axis, self.timings.trained, self.timings.trained_names, "One layer as trained"
        )

    def _plot_latency(
        self, axis, timed: Durations, names: Sequence[str], title: str, hollow: Sequence[str] = ()
    ) -> None:
        lines = layer_timing.over_batches(timed, names)
        colors = dict(zip(lines, [*LINE_COLORS[: len(names)], plots.GRAY], strict=True))
        plots.latency_lines(axis, self.settings.batches, lines, colors, hollow=hollow, title=title)

    def _plot_gathers(self, axis) -> None:
        group_sizes = self.settings.group_sizes
        plots.share_lines(
            axis,
            {"": (group_sizes, self.timings.bandwidth_fractions())},
            {"": plots.BLUE},
            ticks=group_sizes,
            xlabel="neurons in a group",
            ylabel="bandwidth, share of the stream's",
            ylim=(0, None),
            title="Exact scores of a tenth of random rows",
        )

    def _plot_untrained(self, axis) -> None:
        fractions = self.settings.gated_fractions
        plots.share_lines(
            axis,
            {name: (fractions, losses) for name, losses in self.untrained.items()},
            dict(zip(self.untrained, LINE_COLORS, strict=False)),
            decimals=0 if np.max(list(self.untrained.values())) > 0.05 else 2,
            across=True,
            xlim=(0, 1.6 * max(fractions)),
            xlabel="share of the neurons kept",
            ylabel="loss over dense",
            title=f"{self.settings.gated_model}, never trained for it",
        )

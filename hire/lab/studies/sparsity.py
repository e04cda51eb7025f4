"""Figure 04: what training with group top-k costs in loss."""

import dataclasses
from collections.abc import Mapping
from types import SimpleNamespace

import numpy as np
import pandas
from matplotlib.figure import Figure

from hire.lab.figure_index import claim_limits
from hire.lab.metrics import intervals
from hire.lab.studies import plots, tables
from hire.lab.studies.study import Claim, Record, Result
from hire.lab.training import plans, trainer
from hire.timing import interleaved, medians

# Variants with a long training. The figure compares the sparse ones with the dense one.
LONG_VARIANTS = ("dense", "groups8", "groups8-5")
SECONDS_PER_HOUR = 3600


@dataclasses.dataclass(frozen=True)
class Trainings:
    """Results of the trainings that the figure compares.

    Attributes:
        long: Results of the long trainings by variant, see `trainer.results`.
        short: Results of the short trainings. A name that ends in "@1" has seed 1.
        baselines: Bits per byte of n-grams and a compressor on the same evaluation text.
        million_tokens: Training tokens in millions, of "long" and "short".
        weights: Description of the weights.
    """

    long: Mapping[str, dict]
    short: Mapping[str, dict]
    baselines: Mapping[str, float]
    million_tokens: Mapping[str, float]
    weights: str

    @property
    def accuracy(self) -> dict[str, float]:
        """Share of the next tokens that each model of a long training predicts correctly."""
        return {name: outcome["summary"]["all"]["accuracy"] for name, outcome in self.long.items()}

    @property
    def bits_ratio_to_5_gram(self) -> float:
        """Bits per byte of the dense model after its long training, as a share of the 5-gram's."""
        return self.long["dense"]["summary"]["all"]["bits_per_byte"] / self.baselines["5-gram"]


def is_toy(settings: SimpleNamespace) -> bool:
    """Return whether toys are trained now, and no records are read."""
    return settings.models == "toy"


def short_variants(settings: SimpleNamespace) -> list[str]:
    """Return the variants with a short training: the seeded ones, then those compared with them.

    Args:
        settings: Sizes of the notebook.
    """
    seeded = [
        f"{name}{suffix}" for suffix in settings.seed_suffixes for name in ("dense", "groups8")
    ]
    compared = [
        *settings.variants_by_fraction,
        *settings.variants_by_group_size,
        *settings.control_variants,
        *settings.router_variants,
    ]
    return list(dict.fromkeys([*seeded, *compared]))


def load_trainings(settings: SimpleNamespace) -> Trainings:
    """Return the results of the committed trainings, or train toys and return theirs.

    Args:
        settings: Sizes of the notebook.

    Raises:
        FileNotFoundError: A training has no record.
    """
    toy = is_toy(settings)
    long = trainer.outcomes(LONG_VARIANTS, toy=toy)
    short = {
        name: trainer.outcomes([f"short-{name}"], toy=toy)[f"short-{name}"]
        for name in short_variants(settings)
    }
    return Trainings(
        long=long,
        short=short,
        baselines=trainer.outcomes(["baselines"], toy=toy)["baselines"]["all"],
        million_tokens={
            "long": plans.plan_of("dense", toy=toy).tokens / 1e6,
            "short": plans.plan_of("short-dense", toy=toy).tokens / 1e6,
        },
        weights="toys" if toy else "models trained here, losses from their committed records",
    )


def dense_of_same_seed(name: str) -> str:
    """Return the name of the dense variant that has the same seed, such as dense@1 of groups8@1."""
    _, at, seed = name.partition("@")
    return f"dense{at}{seed}"


def losses_relative_to_dense(outcomes: Mapping[str, dict]) -> dict[str, dict]:
    """Compare the evaluation loss of each model with the dense one of the same seed.

    Args:
        outcomes: Results by variant, see `trainer.results`.

    Returns:
        Variant -> relative loss with its 95 % interval, see `intervals.relative_loss`.
    """
    return {
        name: intervals.relative_loss(outcome["nats"], outcomes[dense_of_same_seed(name)]["nats"])
        for name, outcome in outcomes.items()
    }


def loss_table(trainings: Trainings) -> pandas.DataFrame:
    """Return one row per training and baseline: its quality, and its loss relative to dense.

    The relative loss of all text has its 95 % interval over documents; those of each kind of text
    have none.

    Args:
        trainings: The trainings.
    """
    lines = {}
    for length, outcomes in (("long", trainings.long), ("short", trainings.short)):
        relative_losses = losses_relative_to_dense(outcomes)
        for name, outcome in outcomes.items():
            summary = outcome["summary"]
            dense_summary = outcomes[dense_of_same_seed(name)]["summary"]
            cells = {
                "bits per byte": f"{summary['all']['bits_per_byte']:.4f}",
                "top-1 accuracy": f"{summary['all']['accuracy']:.1%}",
                "relative loss": tables.percent(relative_losses[name], decimals=2),
            }
            for kind in plans.KINDS:
                relative_loss = summary[kind]["loss"] / dense_summary[kind]["loss"] - 1
                cells[kind] = f"{relative_loss:+.1%}"
            lines[f"{name}, {length}"] = cells
    for name, bits in trainings.baselines.items():
        lines[name] = {"bits per byte": f"{bits:.4f}"}
    return pandas.DataFrame.from_dict(lines, orient="index").fillna("")


def time_training_steps(settings: SimpleNamespace) -> dict[str, list[float]]:
    """Time a training step of each variant in turn, on the same text.

    Args:
        settings: Sizes of the notebook.

    Returns:
        Seconds of each step, by variant.
    """
    toy = is_toy(settings)
    steps = {
        name: trainer.step_form(plans.plan_of(name, toy=toy)) for name in settings.timed_variants
    }
    return interleaved(steps, range(settings.step_repeats), settings.step_repeats)


def tokens_per_step(settings: SimpleNamespace) -> int:
    """Return the tokens of one training step."""
    plan = plans.plan_of("dense", toy=is_toy(settings))
    return plan.batch * plan.length


def energy(durations: dict[str, list[float]], settings: SimpleNamespace) -> dict[str, float]:
    """Return the watt-hours of a million training tokens at the assumed power.

    Args:
        durations: Seconds by variant, from `time_training_steps`.
        settings: Sizes of the notebook.
    """
    steps = 1e6 / tokens_per_step(settings)
    return {
        name: settings.assumed_watts * seconds * steps / SECONDS_PER_HOUR
        for name, seconds in medians(durations).items()
    }


def step_table(durations: dict[str, list[float]], settings: SimpleNamespace) -> pandas.DataFrame:
    """Return one row per variant: the time of a training step and the assumed energy.

    Args:
        durations: Seconds by variant, from `time_training_steps`.
        settings: Sizes of the notebook.
    """
    median_seconds = medians(durations)
    watt_hours = energy(durations, settings)
    lines = {
        name: {
            "ms per step, median": f"{seconds * 1e3:.0f}",
            "range": f"{min(durations[name]) * 1e3:.0f} to {max(durations[name]) * 1e3:.0f}",
            "times dense": f"{seconds / median_seconds['dense']:.2f}",
            f"Wh per million tokens at {settings.assumed_watts} W": f"{watt_hours[name]:.1f}",
        }
        for name, seconds in median_seconds.items()
    }
    return pandas.DataFrame.from_dict(lines, orient="index")


@dataclasses.dataclass(frozen=True)
class SparsityResult(Result):
    """Result of figure 04.

    Attributes:
        settings: Sizes of the notebook.
        weights: Description of the weights.
        trainings: The trainings that are compared.
        durations: Seconds of each training step by variant, from `time_training_steps`.
    """

    settings: SimpleNamespace
    weights: str
    trainings: Trainings
    durations: dict[str, list[float]]

    tolerance = {"default": 1e-3, "step_time_ratio": 0.35}

    @property
    def long(self) -> dict[str, dict]:
        """Losses relative to dense after the long trainings, by variant."""
        return losses_relative_to_dense(self.trainings.long)

    @property
    def short(self) -> dict[str, dict]:
        """Losses relative to dense after the short trainings, by variant."""
        return losses_relative_to_dense(self.trainings.short)

    @property
    def loss_by_seed(self) -> list[float]:
        """Relative loss of groups of 8 after the short training, by seed."""
        short = self.short
        return [short[f"groups8{suffix}"]["mean"] for suffix in self.settings.seed_suffixes]

    @property
    def step_seconds(self) -> dict[str, float]:
        """Median seconds of a training step by variant."""
        return medians(self.durations)

    @property
    def step_time_ratio(self) -> dict[str, float]:
        """Time of a training step by variant, as a multiple of dense."""
        step_seconds = self.step_seconds
        return {name: seconds / step_seconds["dense"] for name, seconds in step_seconds.items()}

    @property
    def training_loss(self) -> dict[str, np.ndarray]:
        """Training loss relative to dense over the long training, by sparse variant.

        The first part of the training is left out.
        """
        outcomes = self.trainings.long
        return {
            name: np.divide(outcomes[name]["training_loss"], outcomes["dense"]["training_loss"])[1:]
            - 1
            for name in LONG_VARIANTS[1:]
        }

    def finding(self) -> str:
        """State the loss over dense after both trainings, and the time of a training step."""
        million_tokens, long, loss_by_seed = (
            self.trainings.million_tokens,
            self.long,
            self.loss_by_seed,
        )
        tenth, twentieth = long["groups8"], long["groups8-5"]
        return (
            f"After {million_tokens['long']:.3g} M tokens the loss of groups of 8 is "
            f"{tenth['mean']:+.1%} ({tenth['low']:+.1%} to {tenth['high']:+.1%}) from dense with "
            f"10 % of the neurons kept, {twentieth['mean']:+.1%} with 5 %; after "
            f"{million_tokens['short']:.3g} M it was {min(loss_by_seed):+.1%} to "
            f"{max(loss_by_seed):+.1%} (seeds: {len(loss_by_seed)}, 10 %). A training step takes "
            f"{self.step_time_ratio['groups8']:.2f}x as long."
        )

    def series(self) -> dict:
        """Return the losses relative to dense, and the times of a training step."""
        return dict(
            long=self.long,
            short=self.short,
            training={name: losses.tolist() for name, losses in self.training_loss.items()},
            loss_by_seed=self.loss_by_seed,
            step_time_ratio=list(self.step_time_ratio.values()),
        )

    def records(self) -> list[Record]:
        """Return the record of the losses, and the simulated one of the energy."""
        short = self.short
        best_control = min(short[name]["mean"] for name in self.settings.control_variants)
        losses = Record(
            id="sparsity",
            weights=self.weights,
            setting=dict(million_tokens=dict(self.trainings.million_tokens)),
            results=dict(
                relative_loss=dict(short=short, long=self.long, by_seed=self.loss_by_seed),
                accuracy=self.trainings.accuracy,
                step_time_ratio=self.step_time_ratio["groups8"],
                best_control_excess_loss=best_control - short["groups8"]["mean"],
                bits_ratio_to_5_gram=self.trainings.bits_ratio_to_5_gram,
            ),
            durations=self.durations,
            claims={
                "ffn-fraction": self._claim("ffn-fraction", "groups8-5", "5 %"),
                "group-sparsity": self._claim("group-sparsity", "groups8", "10 %"),
            },
        )
        energy_record = Record(
            id="training-energy",
            kind="simulated",
            weights=self.weights,
            setting=dict(assumed_watts=self.settings.assumed_watts, unit="Wh per million tokens"),
            results=energy(self.durations, self.settings),
        )
        return [losses, energy_record]

    def _claim(self, claim: str, name: str, kept_text: str) -> Claim:
        """Return what the long training of a variant contributes to a claim."""
        loss, accuracy = self.long[name], self.trainings.accuracy
        return Claim(
            value=loss["mean"],
            low=loss["low"],
            high=loss["high"],
            unit="relative loss, against dense",
            quality=f"top-1 accuracy {accuracy[name]:.1%}, dense {accuracy['dense']:.1%}; "
            f"{self.weights}",
            setting=f"groups of 8, {kept_text} kept",
            supports=loss["mean"] <= claim_limits(claim)["relative_loss"],
        )

    def plot(self) -> Figure:
        """Draw the loss over fraction, group size and training, and the time of a step."""
        figure, axes = plots.new_figure(2, 2)
        self._plot_fraction(axes[0, 0])
        self._plot_group_size(axes[0, 1])
        self._plot_training(axes[1, 0])
        self._plot_step_times(axes[1, 1])
        return figure

    def _plot_fraction(self, axis) -> None:
        million_tokens, short = self.trainings.million_tokens, self.short
        lines = {}
        for length, losses in (("short", short), ("long", self.long)):
            points = sorted(
                (plans.MODELS[name].kept, losses[name]["mean"])
                for name in self.settings.variants_by_fraction
                if name in losses
            )
            lines[f"{length}: {million_tokens[length]:.3g} M tokens"] = tuple(
                zip(*points, strict=True)
            )
        controls = {"none": "no FFN", "narrow": "dense FFN of 10 % of the width"}
        for name, text in controls.items():
            if name in short:
                text = f"{text}, {million_tokens['short']:.3g} M tokens"
                plots.horizontal_line(axis, short[name]["mean"], text, plots.RED)
        plots.share_lines(
            axis,
            lines,
            dict(zip(lines, (plots.BLUE, plots.GREEN), strict=True)),
            ticks=[0.05, 0.1, 0.2],
            decimals=1,
            xlim=(0.045, 0.5),
            xlabel="share of the groups that is kept",
            ylabel="relative loss",
            title="Loss against the fraction, groups of 8",
        )

    def _plot_group_size(self, axis) -> None:
        settings, short, loss_by_seed = self.settings, self.short, self.loss_by_seed
        sizes = [plans.MODELS[name].group_size for name in settings.variants_by_group_size]
        axis.plot([8] * len(loss_by_seed), loss_by_seed, "o", ms=9, mfc="none", color=plots.BLUE)
        plots.label(
            axis,
            8,
            max(loss_by_seed),
            f"seeds: {len(loss_by_seed)}",
            plots.BLUE,
            offset=(0, 12),
            ha="center",
        )
        for name in settings.router_variants:
            loss = short[name]["mean"]
            axis.plot(8, loss, "D", ms=5, color=plots.ORANGE)
            plots.label(axis, 8, loss, f"{name}: a learned router", plots.ORANGE, offset=(24, 0))
        losses = [short[name]["mean"] for name in settings.variants_by_group_size]
        plots.share_lines(
            axis,
            {"top-k of groups": (sizes, losses)},
            {"top-k of groups": plots.BLUE},
            ticks=sizes,
            decimals=1,
            xlim=(min(sizes) * 0.8, max(sizes) * 4),
            xlabel="neurons in a group",
            ylabel="relative loss",
            title=f"Loss against group size, {self.trainings.million_tokens['short']:.3g} M tokens",
        )

    def _plot_training(self, axis) -> None:
        million_tokens, losses = self.trainings.million_tokens["long"], self.training_loss
        lines = {}
        for name, text in (("groups8", "10 % kept"), ("groups8-5", "5 % kept")):
            # Each value is the mean of one part of the training; the curve starts at the second.
            part_ends = np.linspace(0, 1, len(losses[name]) + 2)[2:]
            lines[text] = (million_tokens * part_ends, losses[name])
        density_warmup = plans.plan_of("groups8").density_warmup
        for stage in (1, 2, 3, 4):
            stage_end = density_warmup * stage / 4 * million_tokens
            axis.axvline(stage_end, color=plots.GRAY, lw=1, ls=":")
        axis.axhline(0, color=plots.GRAY, lw=1)
        plots.share_lines(
            axis,
            lines,
            dict(zip(lines, (plots.BLUE, plots.GREEN), strict=True)),
            decimals=1,
            xlim=(0, million_tokens * 1.2),
            xlabel="million tokens (dotted: fewer groups are kept from here on)",
            ylabel="relative training loss",
            title="Loss during training",
        )

    def _plot_step_times(self, axis) -> None:
        settings, step_seconds = self.settings, self.step_seconds
        watt_hours = energy(self.durations, settings)
        plots.draw_bars(
            axis, {name: 1e3 * seconds for name, seconds in step_seconds.items()}, plots.BLUE
        )
        for row, (name, ratio) in enumerate(self.step_time_ratio.items()):
            if name == "dense":
                axis.patches[row].set_facecolor(plots.GRAY)
            text = f"{ratio:.2f}x, {watt_hours[name]:.0f} Wh"
            plots.label(axis, 1e3 * step_seconds[name], row, text, "0.2")
        axis.set(
            xlim=(0, 1.4e3 * max(step_seconds.values())),
            xlabel=f"ms per step of {tokens_per_step(settings)} tokens; Wh per million tokens at "
            f"an assumed {settings.assumed_watts} W",
            ylabel="",
            title="What the top-k adds to a training step",
        )
        axis.xaxis.label.set_fontsize(9)

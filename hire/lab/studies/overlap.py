"""Figure 05: which groups fire for most tokens, and which groups tokens share."""

import dataclasses
from collections.abc import Mapping, Sequence
from types import SimpleNamespace

import numpy as np
import pandas
from matplotlib.figure import Figure

from hire.lab.data import model_states
from hire.lab.data.text import documents
from hire.lab.figure_index import claim_limits
from hire.lab.metrics import group_sparsity, intervals
from hire.lab.studies import plots, tables
from hire.lab.studies.study import Claim, Record, Result
from hire.models import Decoder, DecoderConfig, TextModel
from hire.types import AnyArray, Int

# Numbers of static groups in the curve of the static overlap, from none to half of the groups.
STATIC_SIZES = 33


@dataclasses.dataclass(frozen=True)
class Windows:
    """Windows of tokens (w, t).

    Attributes:
        calibration: Calibration text, which decides which groups are used most.
        novel: A novel, one window per document. Everything else is counted on it.
    """

    calibration: np.ndarray
    novel: np.ndarray


def load_windows(subject: TextModel, settings: SimpleNamespace) -> Windows:
    """Cut the windows of both texts.

    Args:
        subject: The model, for its tokenizer.
        settings: Sizes of the notebook.
    """
    length, limit = settings.length, settings.windows
    calibration, _ = model_states.windows(subject, documents("calibration"), length, 2, limit=limit)
    novel, _ = model_states.windows(
        subject, documents("evaluation", ["novel"]), length, limit=limit
    )
    return Windows(calibration, novel)


def token_table(
    subject: TextModel, tokens: np.ndarray, kept_groups: np.ndarray
) -> pandas.DataFrame:
    """Return one row per token: which groups of a layer it keeps.

    Args:
        subject: The model, for its tokenizer.
        tokens: Tokens (t,).
        kept_groups: Which groups each token keeps (t, m), in one layer.
    """
    lines = []
    for position, token in enumerate(tokens):
        num_shared = int((kept_groups[position] & kept_groups[max(0, position - 1)]).sum())
        first_groups = np.flatnonzero(kept_groups[position])[:8]
        lines.append(
            {
                "token": subject.tokenizer.decode([int(token)], skip_special_tokens=False),
                "groups": ", ".join(map(str, first_groups)) + " …",
                "number of groups": int(kept_groups[position].sum()),
                "shared with the token before": num_shared if position else None,
            }
        )
    return pandas.DataFrame(lines).astype({"shared with the token before": "Int64"})


@dataclasses.dataclass(frozen=True)
class StaticOverlap:
    """How much of what tokens keep lies in the groups that are used most.

    Attributes:
        kept_fraction: Share of the groups that a token keeps, at most.
        firing_rates: Model -> share of the tokens that each group fires for (layers, m), the
            highest first. A group fires for a token that keeps it.
        sizes: Numbers of static groups (s,).
        coverage: Model -> share of the kept groups that are static groups (layers, s).
        size_index: Index in `sizes` of half of the groups that a token keeps.
        intervals: Model -> mean coverage over the layers at that size, with its 95 % interval
            over documents.
    """

    kept_fraction: float
    firing_rates: dict[str, np.ndarray]
    sizes: np.ndarray
    coverage: dict[str, np.ndarray]
    size_index: int
    intervals: dict[str, dict]

    @property
    def group_count(self) -> int:
        """Number of groups in a layer."""
        return next(iter(self.firing_rates.values())).shape[1]

    @property
    def static_fraction(self) -> float:
        """Share of the groups that are static, at the size of the intervals."""
        return float(self.sizes[self.size_index] / self.group_count)


def firing_rates(kept_groups: np.ndarray) -> np.ndarray:
    """Return the share of the tokens that each group fires for.

    Args:
        kept_groups: Kept groups (layers, w, t, m), see `group_sparsity.sets_kept`.

    Returns:
        Shares (layers, m).
    """
    return kept_groups.mean((1, 2))


def static_overlap(
    config: DecoderConfig,
    kept_groups: Mapping[str, np.ndarray],
    calibration_groups: Mapping[str, np.ndarray],
) -> StaticOverlap:
    """Count how many of the kept groups are among those used most on calibration text.

    Args:
        config: Configuration of the models.
        kept_groups: Model -> kept groups (layers, w, t, m) on the text that is counted on.
        calibration_groups: The same on calibration text, which orders the groups.
    """
    k = config.groups_kept(0)
    sizes = np.unique(np.linspace(0, config.groups // 2, STATIC_SIZES).astype(int))
    size_index = int(np.argmin(np.abs(sizes - k / 2)))
    rates, coverage, coverage_intervals = {}, {}, {}
    for name, groups in kept_groups.items():
        order = np.argsort(-firing_rates(calibration_groups[name]), axis=1)
        rates[name] = np.sort(firing_rates(groups), axis=1)[:, ::-1]
        coverage[name] = static_coverage(firing_rates(groups), order, sizes)
        coverage_intervals[name] = coverage_interval(groups, order[:, : sizes[size_index]])
    return StaticOverlap(k / config.groups, rates, sizes, coverage, size_index, coverage_intervals)


def static_coverage(rates: np.ndarray, order: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Return the share of the kept groups that are static groups, for each number of them.

    Args:
        rates: Share of the tokens that each group fires for (layers, m).
        order: Groups (layers, m), most used first.
        sizes: Numbers of static groups (s,).

    Returns:
        Shares (layers, s).
    """
    ordered = np.take_along_axis(rates, order, axis=1)
    shares = [ordered[:, :size].sum(1) / ordered.sum(1) for size in sizes]
    return np.stack(shares, axis=1)


def coverage_interval(kept_groups: np.ndarray, static_groups: np.ndarray) -> dict:
    """Return the mean coverage over the layers, with its 95 % interval over windows.

    Args:
        kept_groups: Kept groups (layers, w, t, m).
        static_groups: Static groups (layers, s) of each layer.

    Returns:
        See `intervals.ratio`.
    """
    layers, windows = kept_groups.shape[:2]
    kept_by_window = kept_groups.sum(2)
    static = np.take_along_axis(kept_by_window, static_groups[:, None], axis=2).sum(2)
    # Kept groups of an average window. Every layer has the same weight.
    mean_kept = kept_by_window.sum((1, 2))[:, None] / windows
    return intervals.ratio((static / mean_kept).sum(0) / layers, np.ones(windows))


@dataclasses.dataclass(frozen=True)
class DynamicOverlap:
    """Which groups tokens share.

    Attributes:
        counts: Kind of tokens -> numbers of tokens that share one selection.
        unions: Kind of tokens -> share of the groups in the union of what these tokens keep.
        predicted_by_earlier: Model -> share of a token's groups that an earlier token kept, by lag.
        predicted_by_any_token: The same for any other token, in the trained model.
        firing_fraction: Share of the groups that a token keeps, in the trained model. A group with
            score 0 is not kept.
    """

    counts: dict[str, Sequence[int]]
    unions: dict[str, list[float]]
    predicted_by_earlier: dict[str, list[float]]
    predicted_by_any_token: float
    firing_fraction: float

    def random_unions(self, counts: Sequence[int]) -> np.ndarray:
        """Return the unions that random selections of the same size would have.

        Args:
            counts: Numbers of tokens (n,).

        Returns:
            Shares of the groups (n,).
        """
        return 1 - (1 - self.firing_fraction) ** np.asarray(counts)

    def union_table(self) -> pandas.DataFrame:
        """Return the unions as a table, one row per kind of tokens."""
        counts = next(iter(self.counts.values()))
        rows = {
            kind: dict(zip(self.counts[kind], unions, strict=True))
            for kind, unions in self.unions.items()
        }
        rows["random selections"] = dict(zip(counts, self.random_unions(counts), strict=True))
        table = pandas.DataFrame.from_dict(rows, orient="index", columns=None)
        return table.rename_axis(columns="tokens").map(
            lambda share: "" if np.isnan(share) else f"{share:.1%}"
        )


def dynamic_overlap(
    model: Decoder,
    kept_groups: Mapping[str, np.ndarray],
    samples: Sequence[Int[AnyArray, "n t"]],
    settings: SimpleNamespace,
) -> DynamicOverlap:
    """Count the groups that tokens share.

    Tokens of different texts and of samples are compared at the same position.

    Args:
        model: The trained model.
        kept_groups: Model ("trained" and "untrained") -> kept groups (layers, w, t, m).
        samples: Continuations of each prompt (samples, t), prompt included.
        settings: Sizes of the notebook.
    """
    trained = kept_groups["trained"]
    counts = {
        "following tokens": settings.token_counts,
        "different texts": [count for count in settings.token_counts if count <= settings.windows],
        "samples of one prompt": settings.sample_counts,
    }
    groups = {
        # Position 0 is <bos> in every window.
        "following tokens": trained[:, :, 1:],
        "different texts": trained.swapaxes(1, 2)[:, 1:],
        "samples of one prompt": groups_of_samples(model, samples, settings.new_tokens),
    }
    rates = firing_rates(trained)
    return DynamicOverlap(
        counts=counts,
        unions={kind: group_sparsity.unions(groups[kind], counts[kind]) for kind in counts},
        predicted_by_earlier={
            name: group_sparsity.predicted_by_earlier(groups, settings.lags)
            for name, groups in kept_groups.items()
        },
        predicted_by_any_token=float(np.mean((rates**2).sum(1) / rates.sum(1))),
        firing_fraction=float(trained.mean()),
    )


def repeated_prompts(texts: Windows, settings: SimpleNamespace) -> np.ndarray:
    """Return the beginning of windows of the novel, each as often as it has samples.

    Args:
        texts: The windows.
        settings: Sizes of the notebook.

    Returns:
        Tokens (prompts, samples, t).
    """
    prompts = texts.novel[: settings.prompts, : settings.length - settings.new_tokens]
    return np.repeat(prompts[:, None], max(settings.sample_counts), axis=1)


def groups_of_samples(
    model: Decoder, samples: Sequence[Int[AnyArray, "n t"]], new_tokens: int
) -> np.ndarray:
    """Return which groups the generated tokens keep, by position.

    The last token is left out: no step has read it.

    Args:
        model: The trained model.
        samples: Continuations of each prompt (samples, t), prompt included.
        new_tokens: Number of generated tokens.

    Returns:
        Kept groups (layers, positions of all prompts, samples, m).
    """
    parts = [
        group_sparsity.sets_kept(model, np.asarray(tokens))[:, :, -new_tokens:-1].swapaxes(1, 2)
        for tokens in samples
    ]
    return np.concatenate(parts, axis=1)


def overlap_table(
    static: StaticOverlap, kept_groups: Mapping[str, np.ndarray], shared_tokens: int
) -> pandas.DataFrame:
    """Return static and dynamic overlap of each model, with 95 % intervals over documents.

    Args:
        static: The static overlap.
        kept_groups: Model -> kept groups (layers, w, t, m).
        shared_tokens: Number of following tokens that share one selection.
    """
    static_count = static.sizes[static.size_index]
    rows = {
        name: {
            f"in {static_count} static of {static.group_count} groups": static.intervals[name],
            "kept by the token before": earlier_interval(groups),
            f"union of {shared_tokens} tokens": union_interval(groups[:, :, 1:], shared_tokens),
        }
        for name, groups in kept_groups.items()
    }
    return tables.interval_table(rows)


def earlier_interval(kept_groups: np.ndarray) -> dict:
    """Return the share of kept groups that the token before kept, with its 95 % interval.

    Args:
        kept_groups: Kept groups (layers, w, t, m).

    Returns:
        See `intervals.ratio`; the interval is over windows.
    """
    later, earlier = kept_groups[:, :, 1:], kept_groups[:, :, :-1]
    return intervals.ratio((later & earlier).sum((0, 2, 3)), later.sum((0, 2, 3)))


def union_interval(kept_groups: np.ndarray, count: int) -> dict:
    """Return the union of what following tokens keep, with its 95 % interval.

    Args:
        kept_groups: Kept groups (layers, w, t, m).
        count: Number of following tokens.

    Returns:
        See `intervals.ratio`; the interval is over windows.
    """
    windows = kept_groups.shape[1]
    unions = [
        group_sparsity.unions(kept_groups[:, window : window + 1], [count])[0]
        for window in range(windows)
    ]
    return intervals.ratio(np.asarray(unions), np.ones(windows))


@dataclasses.dataclass(frozen=True)
class OverlapResult(Result):
    """Result of figure 05.

    Attributes:
        settings: Sizes of the notebook.
        weights: Description of the weights.
        static: From `static_overlap`.
        dynamic: From `dynamic_overlap`.
    """

    settings: SimpleNamespace
    weights: str
    static: StaticOverlap
    dynamic: DynamicOverlap

    tolerance = {"default": 0.1}

    @property
    def shared_tokens(self) -> int:
        """Number of tokens for which the finding states the union."""
        return self.settings.token_counts[-2]

    @property
    def shared_union(self) -> float:
        """Union of what so many following tokens keep, as a share of the groups."""
        position = list(self.settings.token_counts).index(self.shared_tokens)
        return self.dynamic.unions["following tokens"][position]

    def finding(self) -> str:
        """State what static groups cover, what tokens need together, and what predicts a token."""
        static, dynamic = self.static, self.dynamic
        (random_union,) = dynamic.random_unions([self.shared_tokens])
        return (
            f"In the trained model static groups, {static.static_fraction:.0%} of all groups, hold "
            f"{static.intervals['trained']['mean']:.0%} of what tokens keep, in the untrained one "
            f"{static.intervals['untrained']['mean']:.0%}. {self.shared_tokens} following tokens "
            f"need {self.shared_union:.0%} of the groups together, random selections "
            f"{random_union:.0%}. A token shares {dynamic.predicted_by_earlier['trained'][0]:.0%} "
            f"of its groups with the token before and {dynamic.predicted_by_any_token:.0%} with "
            "any other token."
        )

    def series(self) -> dict:
        """Return coverage, firing rates (means of the layers), unions and predicted shares."""
        return {
            "coverage": layer_means(self.static.coverage),
            "firing rate": layer_means(self.static.firing_rates),
            "union": self.dynamic.unions,
            "predicted by earlier": self.dynamic.predicted_by_earlier,
        }

    def records(self) -> list[Record]:
        """Return the record of the overlap."""
        static, dynamic = self.static, self.dynamic
        coverage = static.intervals["trained"]
        claim = Claim(
            value=coverage["mean"],
            low=coverage["low"],
            high=coverage["high"],
            unit=f"of what tokens keep, in static groups ({static.static_fraction:.0%} of all)",
            quality=f"union of {self.shared_tokens} tokens {self.shared_union:.0%} of the groups; "
            f"{self.weights}",
            setting="groups of 8, 10 % kept",
            supports=self._supports(),
        )
        record = Record(
            id="overlap",
            weights=self.weights,
            setting=dict(kept_fraction=static.kept_fraction, length=self.settings.length),
            results=dict(
                static_fraction=static.static_fraction,
                static_coverage=coverage,
                static_coverage_untrained=static.intervals["untrained"],
                union_fraction=self.shared_union,
                predicted_by_earlier=dynamic.predicted_by_earlier["trained"],
                predicted_by_any_token=dynamic.predicted_by_any_token,
                firing_fraction=dynamic.firing_fraction,
            ),
            claims={"overlap": claim},
        )
        return [record]

    def _supports(self) -> bool:
        """Return whether both overlaps meet the claim's criterion (figures/claims.yaml)."""
        static, dynamic = self.static, self.dynamic
        trained, untrained = (static.intervals[name]["mean"] for name in ("trained", "untrained"))
        is_static = trained > max(
            untrained, claim_limits("overlap")["coverage_ratio"] * static.static_fraction
        )
        unions = {
            kind: dict(zip(dynamic.counts[kind], dynamic.unions[kind], strict=True))
            for kind in ("following tokens", "different texts")
        }
        count = dynamic.counts["different texts"][-1]
        is_dynamic = unions["following tokens"][count] < unions["different texts"][count]
        return bool(is_static and is_dynamic)

    def plot(self) -> Figure:
        """Draw firing rates, static overlap, dynamic overlap and what an earlier token predicts."""
        figure, axes = plots.new_figure(2, 2)
        self._plot_firing_rates(axes[0, 0])
        self._plot_static_overlap(axes[0, 1])
        self._plot_dynamic_overlap(axes[1, 0])
        self._plot_earlier_token(axes[1, 1])
        return figure

    def _plot_firing_rates(self, axis) -> None:
        group_count = self.static.group_count
        ranks = np.arange(1, group_count + 1) / group_count
        plots.share_lines(
            axis,
            {name: (ranks, rates.mean(0)) for name, rates in self.static.firing_rates.items()},
            {"trained": plots.BLUE, "untrained": plots.GRAY},
            across=True,
            xlim=(0, 1.25),
            ylim=(-0.03, 1),
            xticks=np.linspace(0, 1, 6),
            xlabel="groups, most used first",
            ylabel="share of tokens it fires for",
            title="How often each group fires, mean of the layers",
        )

    def _plot_static_overlap(self, axis) -> None:
        sizes = self.static.sizes / self.static.group_count
        lines: dict[str, tuple] = {
            name: (sizes, shares.mean(0)) for name, shares in self.static.coverage.items()
        }
        lines["any groups"] = ([0, 0.5], [0, 0.5])
        plots.share_lines(
            axis,
            lines,
            {"trained": plots.BLUE, "untrained": plots.GRAY, "any groups": plots.PINK},
            across=True,
            xlim=(0, 0.64),
            ylim=(0, 1),
            xlabel="static groups, share of all groups",
            ylabel="share of the kept groups",
            title="Static overlap: what static groups cover",
        )

    def _plot_dynamic_overlap(self, axis) -> None:
        token_counts, dynamic = self.settings.token_counts, self.dynamic
        lines: dict[str, tuple] = {
            kind: (dynamic.counts[kind], unions) for kind, unions in dynamic.unions.items()
        }
        colors = dict(zip(lines, (plots.BLUE, plots.ORANGE, plots.GREEN), strict=True))
        lines["random selections"] = (token_counts, dynamic.random_unions(token_counts))
        plots.share_lines(
            axis,
            lines,
            colors | {"random selections": plots.GRAY},
            ticks=token_counts,
            xlim=(0.9, token_counts[-1] * 5),
            ylim=(0, 1.15),
            xlabel="tokens that share one selection",
            ylabel="union, share of all groups",
            title="Dynamic overlap: what tokens need together",
        )

    def _plot_earlier_token(self, axis) -> None:
        lags, dynamic = self.settings.lags, self.dynamic
        lines = {name: (lags, shares) for name, shares in dynamic.predicted_by_earlier.items()}
        lines["any other token"] = (lags, [dynamic.predicted_by_any_token] * len(lags))
        plots.share_lines(
            axis,
            lines,
            {"trained": plots.BLUE, "untrained": plots.GRAY, "any other token": plots.PINK},
            ticks=lags,
            xlim=(0.9, lags[-1] * 5),
            ylim=(0, 1),
            xlabel="distance to the earlier token, in tokens",
            ylabel="share of the groups kept before",
            title="What an earlier token predicts",
        )


def layer_means(by_name: Mapping[str, np.ndarray]) -> dict[str, list[float]]:
    """Return the means over the layers of arrays (layers, n), by name."""
    return {name: values.mean(0).tolist() for name, values in by_name.items()}

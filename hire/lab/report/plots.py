"""Plots of the figures: one style, one save function, and a comparison of two figures' series."""

import itertools
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import matplotlib.ticker
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hire.lab.paths import FIGURES
from hire.models import storage

KIND_TEXT = {
    "measured": "Measured on {device}",
    "compiler-estimate": "Estimated by the TPU's own compiler, not measured on a TPU",
    "simulated": "Arithmetic on published figures, not measured",
    "published": "Published values",
}
STYLE = matplotlib.rc_params_from_file(FIGURES / "hire.mplstyle", use_default_template=False)
PALETTE = STYLE["axes.prop_cycle"].by_key()["color"]


def new_figure(rows: int, columns: int, *, height: float = 3.6) -> tuple[Figure, np.ndarray]:
    """Create a figure of README width in the common style: colour-blind safe, white, no frame.

    Args:
        rows: Rows of panels.
        columns: Columns of panels.
        height: Height of each row in inches.
    """
    matplotlib.use("Agg", force=False)
    plt.rcParams |= STYLE
    return plt.subplots(
        rows, columns, figsize=(11, height * rows), layout="constrained", squeeze=False
    )


def recall_axis(axis: Axes, lowest: float = 0.5) -> None:
    """Set up a recall axis that stretches towards 1, where the differences matter.

    Plot values from `missed` on it.

    Args:
        axis: Axes to set up.
        lowest: Lowest recall to show.
    """
    ticks = [
        recall
        for recall in (0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9995, 0.9999)
        if recall >= lowest
    ]
    axis.set_yscale("log")
    axis.set_ylim(1.1 * (1 - lowest), 0.8 * (1 - ticks[-1]))
    axis.set_yticks(
        [1 - recall for recall in ticks],
        [f"{recall:g}" for recall in ticks[:-1]] + [f"≥ {ticks[-1]:g}"],
    )
    axis.minorticks_off()


def missed(recall: Sequence[float] | np.ndarray | float) -> np.ndarray:
    """Return 1 - recall, as `recall_axis` requires; the last tick stands for all higher recalls."""
    return np.maximum(1 - np.asarray(recall), 1e-4)


def label(
    axis: Axes,
    x: float,
    y: float,
    text: str,
    color,
    *,
    offset: tuple[float, float] = (5, 0),
    ha="left",
) -> None:
    """Put a label beside a point of a line, in the line's colour.

    The offset is in typographic points.
    """
    axis.annotate(
        text,
        (x, y),
        color=color,
        xytext=offset,
        textcoords="offset points",
        va="center",
        ha=ha,
        fontsize=9,
    )


def recall_lines(
    axis: Axes, x: Sequence[float], lines: dict[str, Sequence[float]], colors: dict, **titles
) -> None:
    """Plot recall over k' or another doubling axis, with one labelled line each."""
    ends = {}
    for name, values in lines.items():
        missing = missed(values)
        axis.plot(x, missing, "o-", ms=3, color=colors[name])
        # The last point that is still visible.
        last_visible = max([i for i, value in enumerate(missing) if value > 2e-4], default=0)
        ends[name] = (x[last_visible], missing[last_visible])
    axis.set_xscale("log", base=2)
    axis.set(xlim=(x[0] * 0.9, x[-1] * 6), xticks=x, xticklabels=x, **titles)
    axis.tick_params(axis="x", labelsize=8)
    recall_axis(axis)
    labels_apart(axis, ends, colors)


def bytes_axis(axis: Axes, lowest: float) -> None:
    """Set up a logarithmic axis of byte shares from `lowest` to 1."""
    ticks = [tick for tick in (0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 1) if tick > 0.8 * lowest]
    axis.set_xscale("log")
    axis.set_xticks(ticks, [f"{tick:.0%}" for tick in ticks])
    axis.set_xlabel("bytes read, share of the float32 rows")


def frontier(axis: Axes, curves: dict[str, dict], colors: dict | None = None, **titles) -> None:
    """Plot recall against bytes read, with one line per curve whose recall exceeds 0.5.

    Args:
        axis: Axes to plot on.
        curves: Results of `search_recall.curve` by name. The rank in the name picks the line style;
            the name without the rank picks the colour.
        colors: Colour by name without the rank. Default: the palette in order.
        titles: Settings of the axes. If there are any, a legend is added below.
    """
    curves = {name: curve for name, curve in curves.items() if max(curve["recall"]) > 0.5}
    families, ranks = (
        {name: re.sub(r" \d+", "", name) for name in curves},
        {name: re.findall(r" (\d+)", name) for name in curves},
    )
    colors = colors or dict(zip(dict.fromkeys(families.values()), PALETTE, strict=False))
    all_ranks = sorted({int(rank) for curve_ranks in ranks.values() for rank in curve_ranks})
    styles = dict(zip(all_ranks[::-1], itertools.cycle(("-", "--", ":", "-."))))
    for name, curve in curves.items():
        style = styles[int(ranks[name][0])] if ranks[name] else "-"
        axis.plot(curve["bytes"], missed(curve["recall"]), style, color=colors[families[name]])
    legend = {family: dict(color=colors[family]) for family in families.values()}
    legend |= {
        f"rank {rank}": dict(color="0.4", ls=styles[rank])
        for rank in all_ranks
        if len(all_ranks) > 1
    }
    for name, options in legend.items():
        axis.plot([], [], label=name, **options)
    bytes_axis(axis, min(min(curve["bytes"]) for curve in curves.values()))
    recall_axis(axis)
    if titles:
        axis.set(**titles)
        axis.legend(
            frameon=False, fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.15)
        )


def share_bars(axis: Axes, bars: dict[str, dict[str, float]], **titles) -> None:
    """Draw one stacked bar per name, the first at the bottom.

    The parts are shares of 1; each large part has its label inside.
    """
    for row, parts in enumerate(bars.values()):
        start = 0.0
        for color, (name, share) in zip(PALETTE, parts.items(), strict=False):
            axis.barh(row, share, left=start, color=color, edgecolor="white")
            if share > 0.1:
                text = axis.text(
                    start + share / 2,
                    row,
                    f"{name}\n{share:.0%}",
                    ha="center",
                    va="center",
                    color="white",
                    fontsize=8,
                )
                text.set_rotation(90 if share < 0.15 else 0)
            start += share
    # Parts that are timed alone may sum to more than 1.
    longest = max(sum(parts.values()) for parts in bars.values())
    axis.set(yticks=range(len(bars)), yticklabels=bars, xlim=(0, max(1.0, longest)), **titles)
    axis.xaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1))


def quality_speed(
    axis: Axes,
    lines: dict[str, dict[str, tuple[float, float]]],
    *,
    lowest: float,
    star: tuple[str, str],
) -> None:
    """Plot recall against speed-up.

    Args:
        axis: Axes to plot on.
        lines: Line -> label -> (speed-up, recall).
        lowest: Lowest recall to show.
        star: (line, label) of the recommended point, drawn as a star.
    """
    # Neighbouring lines have their labels on different sides.
    sides = [((-5, -7), "right"), ((5, 7), "left")]
    for index, (color, (name, points)) in enumerate(zip(PALETTE, lines.items(), strict=False)):
        speeds, recalls = zip(*points.values(), strict=True)
        axis.plot(speeds, missed(recalls), "o-", ms=5, color=color, label=name)
        for text, (speed, recall) in points.items():
            offset, side = sides[index % 2]
            label(axis, speed, float(missed(recall)), text, color, offset=offset, ha=side)
    speed, recall = lines[star[0]][star[1]]
    axis.plot(
        speed, missed(recall), "*", ms=15, color="black", label=f"recommended: {star[1]}, {star[0]}"
    )
    axis.set(xlabel="speed-up over the fastest dense form", ylabel="recall", xlim=(0, None))
    axis.legend(frameon=False, fontsize=8, loc="upper left")
    recall_axis(axis, lowest)


def latency_lines(
    axis: Axes,
    batches: Sequence[int],
    lines: dict[str, Sequence[float]],
    colors: dict,
    *,
    hollow: Sequence[str] = (),
    unit: str = "ms",
    **titles,
) -> None:
    """Plot latency over batch sizes that double, both axes logarithmic.

    Args:
        axis: Axes to plot on.
        batches: Batch sizes.
        lines: Seconds by name.
        colors: Colour by name.
        hollow: Names of the lines with hollow markers: their quality is transferred from another
            model.
        unit: Unit to show, "ms" or "us".
        titles: Settings of the axes.
    """
    for name, values in lines.items():
        line, fill = ("o--", "white") if name in hollow else ("o-", colors[name])
        axis.plot(
            batches,
            np.multiply(values, dict(ms=1e3, us=1e6)[unit]),
            line,
            ms=4,
            color=colors[name],
            mfc=fill,
            label=name,
        )
    batch_axes(axis, batches)
    axis.set(**dict(ylabel=f"{unit}, median") | titles)
    axis.legend(frameon=False, fontsize=9)


def batch_axes(axis: Axes, batches: Sequence[int]) -> None:
    """Set both axes to doublings with plain numbers: batch sizes on x, times on y."""
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    axis.yaxis.set_major_formatter(matplotlib.ticker.StrMethodFormatter("{x:g}"))
    axis.set(xticks=batches, xticklabels=batches, xlabel="batch")
    axis.minorticks_off()


def share_lines(
    axis: Axes,
    lines: dict[str, tuple],
    colors: dict,
    *,
    ticks: Sequence = (),
    decimals: int = 0,
    across: bool = False,
    **titles,
) -> None:
    """Plot shares over x, each line labelled at its end.

    Args:
        axis: Axes to plot on.
        lines: Name -> (x, shares).
        colors: Colour by name.
        ticks: Ticks of a doubling x axis. Default: a linear axis.
        decimals: Decimals of the percentages.
        across: Whether x is a share, too.
        titles: Settings of the axes.
    """
    for name, (x, shares) in lines.items():
        axis.plot(x, shares, "o-" if len(x) < 20 else "-", ms=4, color=colors[name])
    if ticks:
        axis.set_xscale("log", base=2)
        axis.set(xticks=ticks, xticklabels=ticks)
    axis.minorticks_off()
    axis.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1, decimals=decimals))
    if across:
        axis.xaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1, decimals=0))
    axis.set(**titles)
    axis.autoscale_view()
    labels_apart(axis, {name: (x[-1], shares[-1]) for name, (x, shares) in lines.items()}, colors)


def labels_apart(axis: Axes, points: dict[str, tuple[float, float]], colors: dict) -> None:
    """Put a label beside each point, moved up where it would overlap another label.

    The limits of the axes must be final.
    """
    heights = {
        name: axis.transData.transform(point)[1] * 72 / axis.figure.dpi
        for name, point in points.items()
    }
    lowest_free = -np.inf  # lowest free height above all labels so far, in typographic points
    for name, height in sorted(heights.items(), key=lambda each: each[1]):
        label(axis, *points[name], name, colors[name], offset=(7, max(0, lowest_free - height)))
        lowest_free = max(height, lowest_free) + 11


def rule(axis: Axes, value: float, name: str, color) -> None:
    """Draw a labelled horizontal line."""
    axis.axhline(value, color=color, ls="--", lw=1)
    axis.annotate(
        name,
        (0.98, value),
        (0, 6),
        axis.get_yaxis_transform(),
        "offset points",
        ha="right",
        color=color,
        fontsize=9,
    )


def stage_bars(axis: Axes, seconds: dict[str, float], floors: dict[str, float]) -> None:
    """Draw the milliseconds of each stage, with the memory-bound floor inside each bar.

    The floor is the time that the stage's weight bytes take at the machine's bandwidth.
    """
    blue, gray = PALETTE[0], "0.25"
    names = list(seconds)[::-1]
    axis.barh(
        names, [seconds[name] * 1e3 for name in names], color=blue, height=0.6, label="measured"
    )
    axis.barh(
        names,
        [floors.get(name, 0) * 1e3 for name in names],
        color=gray,
        height=0.2,
        label="reading its weights at stream bandwidth",
    )
    axis.set(xlabel="ms at batch 1, median", title="Stages of one search")
    axis.legend(frameon=False, fontsize=8, loc="center right", bbox_to_anchor=(1.0, 0.4))


def beside(
    axis: Axes,
    told: dict[str, float],
    found: dict[str, float],
    floors: dict[str, float],
    note: str,
    **titles,
) -> None:
    """Plot estimated over published times, both in microseconds, with the line of equality.

    Dashes mark the floor. Points that differ by more than a quarter have their names.

    Args:
        axis: Axes to plot on.
        told: Published times.
        found: Estimated times.
        floors: memory-bound floors.
        note: Text in the upper left corner.
        titles: Settings of the axes.
    """
    blue, gray = PALETTE[0], "0.5"
    limits = [0.5 * min(told.values()), 2 * max(told.values())]
    axis.plot(limits, limits, color=gray, lw=1)
    for name, value in told.items():
        axis.plot(value, found[name], "o", color=blue, ms=5)
        axis.plot(value, floors[name], "_", color=gray, ms=9)
        if abs(found[name] / value - 1) > 0.25:
            label(axis, value, found[name], name, blue)
    axis.annotate(note, (0.03, 0.93), xycoords="axes fraction", fontsize=9, color="0.3")
    axis.set(xscale="log", yscale="log", xlabel="us, published", ylabel="us, estimated", **titles)


def who_sends(axis: Axes, chips: int, what: dict[str, tuple[str, float]], **titles) -> None:
    """Draw what each chip sends to all others during a search, one variant above the other.

    The width of an arrow is the logarithm of its bytes.

    Args:
        axis: Axes to draw on.
        chips: Number of chips.
        what: Variant -> (what is sent, bytes that arrive).
        titles: Settings of the axes.
    """
    gray, *colors = (PALETTE[i] for i in (7, 3, 0))
    for row, (color, (name, (content, nbytes))) in enumerate(
        zip(colors, what.items(), strict=True)
    ):
        top = 2.4 * (len(what) - row)
        axis.text(
            -0.45,
            top + 0.4,
            f"{name}: {content}, {nbytes:,.0f} bytes arrive",
            color=color,
            fontsize=9,
            weight="bold",
        )
        axis.barh(top - 1.4, chips - 0.1, left=-0.45, height=0.35, color="white", edgecolor=gray)
        axis.text(
            chips / 2 - 0.5,
            top - 1.4,
            "every chip: the k best of these",
            ha="center",
            va="center",
            fontsize=8,
        )
        for chip in range(chips):
            axis.barh(top, 0.9, left=chip - 0.45, height=0.45, color="white", edgecolor=gray)
            axis.text(chip, top, f"chip {chip}'s rows", ha="center", va="center", fontsize=8)
            arrow_style = dict(arrowstyle="-|>", color=color, lw=max(0.5, np.log10(nbytes) - 2))
            axis.annotate("", (chip, top - 1.2), (chip, top - 0.25), arrowprops=arrow_style)
    axis.set(xlim=(-0.5, chips - 0.5), ylim=(0.6, 2.4 * len(what) + 0.9), **titles)
    axis.axis("off")


def chip_lines(
    axis: Axes, chips: Sequence[int], lines: dict[str, Sequence[float]], colors: dict, **titles
) -> None:
    """Plot values over numbers of chips, both axes logarithmic, each line labelled at its end."""
    for name, values in lines.items():
        axis.plot(chips, values, "o-", ms=4, color=colors[name])
    axis.set(
        xscale="log",
        yscale="log",
        xticks=chips,
        xticklabels=chips,
        xlim=(3.5, 2500),
        xlabel="v5e chips",
        **titles,
    )
    axis.minorticks_off()
    labels_apart(axis, {name: (chips[-1], values[-1]) for name, values in lines.items()}, colors)


PARTS = {
    "sort": "sorting",
    "custom-call": "our kernels",
    "gather": "XLA's gathers",
    "rest": "products and the rest",
}


def part_bars(axis: Axes, bars: dict[str, list[dict]], notes: dict[str, str], **titles) -> None:
    """Draw one bar per program: the microseconds of its operations by kind, and a note after it.

    Args:
        axis: Axes to draw on.
        bars: Program -> `parts` of its record (see `programs.estimated`).
        notes: Note by program.
        titles: Settings of the axes.
    """
    colors = dict(zip(PARTS, (PALETTE[i] for i in (1, 2, 3, 0)), strict=True))
    longest = 0.0
    for row, (name, parts) in enumerate(bars.items()):
        sums = dict.fromkeys(PARTS, 0.0)
        for part in parts:
            kind = "gather" if "gather" in part["name"] else part["kind"]
            sums[kind if kind in PARTS else "rest"] += part["us"]
        start = 0.0
        for kind, width in sums.items():
            axis.barh(
                row, width, left=start, color=colors[kind], label=None if row else PARTS[kind]
            )
            start += width
        label(axis, start, row, notes[name], "0.2")
        longest = max(longest, start)
    axis.set(yticks=range(len(bars)), yticklabels=bars, xlim=(0, 1.6 * longest), **titles)
    axis.legend(frameon=False, fontsize=8, loc="lower right")


def rung_bars(
    axis: Axes,
    values: dict[str, float],
    color,
    *,
    notes: dict | None = None,
    hollow: bool = False,
    marks: Sequence = (),
    **titles,
) -> None:
    """Draw the speed-up of each variant, the first at the top.

    Args:
        axis: Axes to draw on.
        values: speed-up by variant. Names with "estimate" are hatched.
        color: Colour of the bars.
        notes: Note after the number, by variant.
        hollow: Whether the bars are hollow: their quality is transferred.
        marks: speed-ups that the paper reports, drawn as dotted lines.
        titles: Settings of the axes.
    """
    for row, (name, value) in enumerate(values.items()):
        hatch = "///" if "estimate" in name else None
        axis.barh(
            row, value, color="white" if hollow else color, edgecolor=color, height=0.7, hatch=hatch
        )
        label(axis, max(value, 1.0), row, f"{value:.2f}x{(notes or {}).get(name, '')}", "0.2")
    axis.axvline(1, color="0.5", lw=1)
    for mark in marks:
        axis.axvline(mark, color=PALETTE[3], lw=1, ls=":")
    options = dict(
        xlim=(0, 2.0 * max(values.values())),
        xlabel="times as fast as dense" + (" (dotted: the paper's)" if marks else ""),
    )
    axis.set(yticks=range(len(values)), yticklabels=values, **options | titles)
    axis.invert_yaxis()


def against_floor(axis: Axes, points: Sequence[dict[str, dict]], colors: dict, **titles) -> None:
    """Plot measured time over the memory-bound floor, with the line of equality.

    Args:
        axis: Axes to plot on.
        points: Points by variant, from `ablation.points`.
        colors: Colour by variant.
        titles: Settings of the axes.
    """
    for name, color in colors.items():
        variant_points = [
            (1e3 * point[name]["floor"], 1e3 * point[name]["seconds"])
            for point in points
            if name in point
        ]
        axis.plot(*np.transpose(variant_points), "o", color=color, ms=5, label=name)
    limits = np.array(axis.get_xlim() + axis.get_ylim())[[0, 3]]
    axis.plot(limits, limits, color="0.5", lw=1)
    axis.legend(frameon=False, fontsize=9)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_formatter(matplotlib.ticker.StrMethodFormatter("{x:g}"))
    axis.set(xlabel="ms that the bytes take at stream bandwidth", ylabel="ms, median", **titles)


def speed_map(
    axis: Axes,
    speed: Callable,
    placed: dict[str, tuple[float, float]],
    told: tuple[float, float],
    **titles,
) -> None:
    """Plot lines of equal speed-up over the byte shares of softmax and FFN.

    Args:
        axis: Axes to plot on.
        speed: Function (softmax share, FFN share) -> speed-up.
        placed: Shares by model.
        told: Shares at which the reported speed-ups would be, drawn as a star.
        titles: Settings of the axes.
    """
    gray, red, blue = (PALETTE[i] for i in (7, 3, 0))
    grid = np.linspace(0, 1, 101)
    # The two shares cannot sum to more than 1.
    speedups = np.where(grid[None] + grid[:, None] < 1, speed(grid[None], grid[:, None]), np.nan)
    contours = axis.contour(
        grid, grid, speedups, levels=[1.1, 1.47, 2, 3, 5], colors=[gray], linewidths=1
    )
    axis.clabel(contours, fmt="%gx", fontsize=8)
    axis.plot(*np.transpose(list(placed.values())), "o", color=blue, ms=5)
    axis.plot(*told, "*", color=red, ms=13)
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_formatter(matplotlib.ticker.PercentFormatter(1, decimals=0))
    axis.set(
        xlabel="softmax, share of the bytes of a step",
        ylabel="FFN, share",
        xlim=(0, 0.9),
        ylim=(0, 0.9),
        **titles,
    )
    labels_apart(axis, placed, dict.fromkeys(placed, blue))
    label(
        axis,
        *told,
        "the paper's 1.22x, 1.16x and 1.47x,\nif its search read as little as ours",
        red,
        offset=(9, 0),
    )


def speed_bars(axis: Axes, speeds: dict[str, float], recalls: dict[str, float], **titles) -> None:
    """Draw one bar per speed-up over the fastest dense form, with its recall, the first on top."""
    axis.barh(range(len(speeds)), list(speeds.values()), color=PALETTE[0])
    for row, (name, speed) in enumerate(speeds.items()):
        label(axis, max(speed, 1), row, f"{speed:.1f}x, recall {recalls[name]:.4f}", "0.2")
    axis.axvline(1, color="0.6", lw=1)
    axis.set(
        yticks=range(len(speeds)),
        yticklabels=speeds,
        xlabel="times as fast as the fastest dense form",
        **titles,
    )
    axis.set_xlim(0, 1.6 * max(speeds.values()))
    axis.tick_params(axis="y", labelsize=8)
    axis.invert_yaxis()


def intervals(axis: Axes, rows: dict[str, dict[str, float]], at: float = 0.0, **titles) -> None:
    """Plot shares with their 95 % intervals (mean, low, high), the first at the top.

    A vertical line at `at` marks the reference value.
    """
    for row, (name, interval) in enumerate(rows.items()):
        axis.plot([interval["low"], interval["high"]], [row, row], color=PALETTE[0])
        axis.plot(interval["mean"], row, "o", ms=4, color=PALETTE[0])
    axis.axvline(at, color="0.6", lw=1)
    axis.set(yticks=range(len(rows)), yticklabels=rows, **titles)
    axis.tick_params(axis="y", labelsize=8)
    axis.invert_yaxis()
    axis.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(6))
    axis.xaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1))


def prices(
    axis: Axes, recall: Sequence[float], shares: dict[str, Sequence[float]], **titles
) -> None:
    """Plot the cost of missed rows: shares against recall, both axes logarithmic."""
    for color, (name, values) in zip(PALETTE, shares.items(), strict=False):
        axis.plot(missed(recall), np.maximum(np.abs(values), 1e-5), "o", color=color, label=name)
    axis.set(
        xscale="log",
        yscale="log",
        xlabel="share of the true top-k missed",
        ylabel="share (of loss: its size)",
        **titles,
    )
    axis.legend(frameon=False)


def save(figure: Figure, folder: Path, name: str, *, note: str, **facts) -> None:
    """Save folder/name.png with a note, and folder/name.json with the facts.

    Args:
        figure: Figure to save.
        folder: Folder of both files.
        name: Name of the figure.
        note: What was measured and where.
        facts: Series, finding and other facts for the JSON file.
    """
    figure.supxlabel(note, fontsize=8, color="0.35", x=0.01, ha="left")
    with storage.replacing(folder / f"{name}.png", folder / f"{name}.json") as (picture, series):
        figure.savefig(picture, format="png", dpi=120, metadata={"Software": None})
        series.write_text(json.dumps(dict(figure=name, **facts), indent=1) + "\n")


def flat(tree: object, name: str = "") -> dict:
    """Return a tree of series as one dict; a name joins the keys of the path with blanks.

    Dicts are branches; everything else is a series.
    """
    if not isinstance(tree, dict):
        return {name: tree}
    return {
        path: series
        for key, part in tree.items()
        for path, series in flat(part, f"{name} {key}".strip()).items()
    }


def differences(old: dict, new: dict) -> list[str]:
    """Return the names of the series that differ between the facts of two figures.

    A series differs if only one figure has it, or if values differ by more than the tolerance in
    `new`. The tolerance is relative; near 0, a tenth of it counts as absolute. It is looked up by
    the series' name, then by the first word of the name.
    """
    differing = sorted(set(old["series"]) ^ set(new["series"]))
    for name in sorted(set(old["series"]) & set(new["series"])):
        old_values, new_values = (
            np.asarray(figure["series"][name], np.float64) for figure in (old, new)
        )
        tolerance = new["tolerance"].get(
            name, new["tolerance"].get(name.partition(" ")[0], new["tolerance"]["default"])
        )
        if old_values.shape != new_values.shape or not np.allclose(
            old_values, new_values, rtol=tolerance, atol=0.1 * tolerance
        ):
            differing.append(name)
    return differing

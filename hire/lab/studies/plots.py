"""The panels that figures are made of, in one style."""

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import matplotlib.ticker
import numpy as np
import seaborn
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

# Colours that colour-blind readers can tell apart.
PALETTE = seaborn.color_palette("colorblind").as_hex()
BLUE, ORANGE, GREEN, RED, PINK = PALETTE[:5]
GRAY = PALETTE[7]


# Sizes in points, for a figure of README width.
STYLE = {
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.labelsize": 10.2,
    "font.size": 10.2,
    "legend.fontsize": 9.4,
    "xtick.labelsize": 9.4,
    "ytick.labelsize": 9.4,
    "font.family": "DejaVu Sans",
}


def new_figure(rows: int, columns: int, *, height: float = 3.6) -> tuple[Figure, np.ndarray]:
    """Create a figure of README width in the common style: white, no frame.

    Args:
        rows: Rows of panels.
        columns: Columns of panels.
        height: Height of each row in inches.
    """
    matplotlib.use("Agg", force=False)
    seaborn.set_theme(style="ticks", palette="colorblind", rc=STYLE)
    figure, axes = plt.subplots(
        rows, columns, figsize=(11, height * rows), layout="constrained", squeeze=False
    )
    seaborn.despine(figure)
    return figure, axes


def draw_line(
    axis: Axes, x: ArrayLike, y: ArrayLike, color: str, *, marker: str = "o", **options
) -> None:
    """Draw one line through points in their order.

    Args:
        axis: Axes to draw on.
        x: Coordinates (n,).
        y: Coordinates (n,).
        color: Colour of line and markers.
        marker: Marker of each point; "" draws none.
        options: Further options of `seaborn.lineplot`, such as `label` and `markersize`.
    """
    defaults: dict[str, Any] = dict(markersize=5, markeredgewidth=0, linestyle="-", legend=False)
    seaborn.lineplot(
        x=np.asarray(x, float),
        y=np.asarray(y, float),
        ax=axis,
        color=color,
        marker=marker,
        estimator=None,
        sort=False,
        **defaults | options,
    )


def draw_points(
    axis: Axes, x: ArrayLike, y: ArrayLike, color: str, *, marker: str = "o", size=6, **options
) -> None:
    """Draw points.

    Args:
        axis: Axes to draw on.
        x: Coordinates (n,).
        y: Coordinates (n,).
        color: Colour of the points.
        marker: Marker of each point.
        size: Diameter of a marker in typographic points.
        options: Further options of `seaborn.scatterplot`, such as `label`.
    """
    seaborn.scatterplot(
        x=np.atleast_1d(x),
        y=np.atleast_1d(y),
        ax=axis,
        color=color,
        marker=marker,
        s=size**2,
        linewidth=1 if marker == "_" else 0,
        legend=False,
        **options,
    )


def draw_bars(axis: Axes, widths: Mapping[str, float], color: str, **options) -> None:
    """Draw one horizontal bar per name, the first at the top.

    Args:
        axis: Axes to draw on.
        widths: Width by name.
        color: Colour of the bars.
        options: Further options of `seaborn.barplot`, such as `label`.
    """
    seaborn.barplot(
        x=list(widths.values()),
        y=list(widths),
        orient="h",
        ax=axis,
        color=color,
        saturation=1,
        legend=False,
        **options,
    )


def recall_axis(axis: Axes, lowest: float = 0.5) -> None:
    """Set up a recall axis that stretches towards 1, where the differences matter.

    Plot values from `miss_rate` on it.

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


def miss_rate(recall: Sequence[float] | np.ndarray | float) -> np.ndarray:
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


def bytes_axis(axis: Axes, lowest: float) -> None:
    """Set up a logarithmic axis of byte shares from `lowest` to 1."""
    ticks = [tick for tick in (0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 1) if tick > 0.8 * lowest]
    axis.set_xscale("log")
    axis.set_xticks(ticks, [f"{tick:.0%}" for tick in ticks])
    axis.set_xlabel("bytes read, share of the float32 rows")


def frontier(
    axis: Axes, curves: Mapping[str, dict], colors: Mapping | None = None, **titles
) -> None:
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
        draw_line(
            axis,
            curve["bytes"],
            miss_rate(curve["recall"]),
            colors[families[name]],
            marker="",
            linestyle=style,
        )
    legend: dict[str, dict[str, Any]] = {
        family: dict(color=colors[family]) for family in families.values()
    }
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


def family_frontiers(
    axis: Axes, families: Mapping[str, Sequence[tuple[float, float]]], colors: Mapping
) -> None:
    """Plot the best recall of each family of estimators against the bytes that are read.

    Args:
        axis: Axes to plot on.
        families: (bytes, recall) of every estimator and number of candidates, by family. A point
            counts if no other point of its family has fewer bytes and as much recall.
        colors: Colour by family.
    """
    for name, points in families.items():
        envelope: list[tuple[float, float]] = []
        for nbytes, recall in sorted(points):
            if not envelope or recall > envelope[-1][1]:
                envelope.append((nbytes, recall))
        nbytes, recalls = zip(*envelope, strict=True)
        draw_line(axis, nbytes, miss_rate(recalls), colors[name], markersize=4, label=name)
    bytes_axis(axis, min(nbytes for points in families.values() for nbytes, _ in points))
    recall_axis(axis)


def vertical_interval(axis: Axes, x: float, interval: Mapping[str, float], label: str) -> None:
    """Draw a recall with its interval as a star with a bar, on a `recall_axis`."""
    ends = miss_rate([interval["low"], interval["high"]])
    draw_line(axis, [x, x], ends, "black", marker="", zorder=3)
    draw_points(
        axis, x, miss_rate(interval["mean"]), "black", marker="*", size=13, zorder=4, label=label
    )


def recall_by_kind(
    axis: Axes,
    searches: Mapping[str, Mapping[str, Mapping[str, float]]],
    colors: Sequence[str],
    *,
    hollow: Sequence[str] = (),
    **titles,
) -> None:
    """Plot the recall of several searches on several kinds of text, with intervals.

    Args:
        axis: Axes to plot on.
        searches: Search -> kind of text -> `mean`, `low` and `high`.
        colors: Colour of each search.
        hollow: Names of the searches with hollow markers.
        titles: Settings of the axes.
    """
    kinds = list(next(iter(searches.values())))
    step = 0.8 / len(searches)
    for index, (color, (name, by_kind)) in enumerate(zip(colors, searches.items(), strict=True)):
        is_hollow = name in hollow
        for row, kind in enumerate(kinds):
            y = row + step * (index - (len(searches) - 1) / 2)
            interval = by_kind[kind]
            ends = miss_rate([interval["low"], interval["high"]])
            draw_line(axis, ends, [y, y], color, marker="", linestyle=":" if is_hollow else "-")
            draw_line(
                axis,
                miss_rate([interval["mean"]]),
                [y],
                color,
                markerfacecolor="white" if is_hollow else color,
                markeredgecolor=color,
                markeredgewidth=1.2,
                label=name if row == 0 else None,
            )
    axis.hlines(np.arange(len(kinds) - 1) + 0.5, 1, 1e-5, color="0.9", lw=0.8, zorder=0)
    lowest = min(interval["low"] for by_kind in searches.values() for interval in by_kind.values())
    ticks = [tick for tick in (0.5, 0.8, 0.95, 0.99, 0.998) if tick >= lowest - 0.1]
    axis.set_xscale("log")
    axis.set_xlim(1.1 * max(1 - lowest, 1 - ticks[0]), 0.7e-4)
    axis.set_xticks([*(1 - tick for tick in ticks), 1e-4], [*map(str, ticks), "≥ 0.9999"])
    axis.minorticks_off()
    axis.set(yticks=range(len(kinds)), yticklabels=kinds, xlabel="recall", **titles)
    axis.invert_yaxis()
    axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(-0.3, -0.17))


def share_bars(axis: Axes, bars: Mapping[str, dict[str, float]], **titles) -> None:
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
    points: Mapping[str, Mapping[str, tuple[float, float]]],
    recommended: Sequence[tuple[float, float]],
    **titles,
) -> None:
    """Plot recall against speed-up.

    Args:
        axis: Axes to plot on.
        points: Group -> setting -> (speed-up, recall).
        recommended: The recommended points, drawn as stars.
        titles: Settings of the axes.
    """
    for color, (name, settings) in zip(PALETTE, points.items(), strict=False):
        speeds, recalls = zip(*settings.values(), strict=True)
        draw_points(axis, speeds, miss_rate(recalls), color, label=name)
    speeds, recalls = zip(*recommended, strict=True)
    draw_points(
        axis,
        speeds,
        miss_rate(recalls),
        "black",
        marker="*",
        size=12,
        zorder=3,
        label="recommended",
    )
    axis.axvline(1, color="0.6", lw=1)
    lowest = min(recall for settings in points.values() for _, recall in settings.values())
    axis.set(xlabel="speed-up over the fastest dense form", ylabel="recall", xlim=(0, None))
    axis.set(**titles)
    recall_axis(axis, 0.95 if lowest > 0.95 else 0.2)
    axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(0, -0.17))


def speedup_lines(
    axis: Axes,
    lines: Mapping[str, tuple[Mapping[int, float], Mapping[int, Sequence[float]]]],
    **titles,
) -> None:
    """Plot speed-ups over batch sizes that double, with their ranges and the line of no speed-up.

    Args:
        axis: Axes to plot on.
        lines: Speed-up and its (lowest, highest) by batch size, by name.
        titles: Settings of the axes.
    """
    for color, (name, (values, ranges)) in zip(PALETTE, lines.items(), strict=False):
        draw_line(axis, list(values), list(values.values()), color, label=name)
        for batch, ends in ranges.items():
            draw_line(axis, [batch, batch], ends, color, marker="_", linewidth=1)
    axis.axhline(1, color="0.6", lw=1)
    batches = list(next(iter(lines.values()))[0])
    batch_axes(axis, batches)
    axis.set(ylabel="speed-up", **titles)
    axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(0, -0.17))


def latency_lines(
    axis: Axes,
    batches: Sequence[int],
    lines: Mapping[str, Sequence[float]],
    colors: Mapping,
    *,
    hollow: Sequence[str] = (),
    floors: Mapping[str, Sequence[float]] | None = None,
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
        floors: Seconds that reading its bytes takes, by name of a line. Drawn dotted.
        unit: Unit to show, "ms" or "us".
        titles: Settings of the axes.
    """
    factor = dict(ms=1e3, us=1e6)[unit]
    for name, values in (floors or {}).items():
        axis.plot(batches, np.multiply(values, factor), color=colors[name], linestyle=":", lw=1)
    for name, values in lines.items():
        is_hollow = name in hollow
        draw_line(
            axis,
            batches,
            np.multiply(values, factor),
            colors[name],
            label=name,
            linestyle="--" if is_hollow else "-",
            markerfacecolor="white" if is_hollow else colors[name],
            markeredgecolor=colors[name],
            markeredgewidth=1,
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
    lines: Mapping[str, tuple],
    colors: Mapping,
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
        draw_line(axis, x, shares, colors[name], marker="o" if len(x) < 20 else "")
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


def labels_apart(axis: Axes, points: Mapping[str, tuple[float, float]], colors: Mapping) -> None:
    """Put a label beside each point, moved up where it would overlap another label.

    The limits of the axes must be final.
    """
    heights = {
        name: axis.transData.transform(point)[1] * 72 / axis.figure.dpi
        for name, point in points.items()
    }
    lowest_free = -np.inf  # lowest free height above all labels so far, in typographic points
    for name, height in sorted(heights.items(), key=lambda item: item[1]):
        label(axis, *points[name], name, colors[name], offset=(7, max(0, lowest_free - height)))
        lowest_free = max(height, lowest_free) + 11


def horizontal_line(axis: Axes, value: float, name: str, color) -> None:
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


def stage_bars(axis: Axes, seconds: Mapping[str, float], floors: Mapping[str, float]) -> None:
    """Draw the milliseconds of each stage, with the memory-bound floor inside each bar.

    The floor is the time that the stage's weight bytes take at the machine's bandwidth.
    """
    draw_bars(
        axis,
        {name: 1e3 * value for name, value in seconds.items()},
        BLUE,
        width=0.6,
        label="measured",
    )
    draw_bars(
        axis,
        {name: 1e3 * floors.get(name, 0) for name in seconds},
        "0.25",
        width=0.2,
        label="reading its weights at stream bandwidth",
    )
    axis.set(xlabel="ms at batch 1, median", title="Stages of one search")
    axis.legend(frameon=False, fontsize=8, loc="center right", bbox_to_anchor=(1.0, 0.4))


def estimated_against_published(
    axis: Axes,
    published: Mapping[str, float],
    estimated: Mapping[str, float],
    floors: Mapping[str, float],
    note: str,
    **titles,
) -> None:
    """Plot estimated over published times, both in microseconds, with the line of equality.

    Dashes mark the floor. Points that differ by more than a quarter have their names.

    Args:
        axis: Axes to plot on.
        published: Published times.
        estimated: Estimated times.
        floors: memory-bound floors.
        note: Text in the upper left corner.
        titles: Settings of the axes.
    """
    limits = [0.5 * min(published.values()), 2 * max(published.values())]
    draw_line(axis, limits, limits, "0.5", marker="", linewidth=1)
    for name, value in published.items():
        draw_points(axis, value, estimated[name], BLUE)
        draw_points(axis, value, floors[name], "0.5", marker="_", size=9)
        if abs(estimated[name] / value - 1) > 0.25:
            label(axis, value, estimated[name], name, BLUE)
    axis.annotate(note, (0.03, 0.93), xycoords="axes fraction", fontsize=9, color="0.3")
    axis.set(xscale="log", yscale="log", xlabel="us, published", ylabel="us, estimated", **titles)


def bytes_sent_by_chip(
    axis: Axes, chips: int, what: Mapping[str, tuple[str, float]], **titles
) -> None:
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
    axis: Axes,
    chips: Sequence[int],
    lines: Mapping[str, Sequence[float]],
    colors: Mapping,
    **titles,
) -> None:
    """Plot values over numbers of chips, both axes logarithmic, each line labelled at its end."""
    for name, values in lines.items():
        draw_line(axis, chips, values, colors[name])
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


def operation_bars(
    axis: Axes, bars: Mapping[str, list[dict]], notes: Mapping[str, str], **titles
) -> None:
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


def variant_bars(
    axis: Axes,
    values: Mapping[str, float],
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
    draw_bars(axis, values, "white" if hollow else color, edgecolor=color, width=0.7)
    bars = axis.patches[-len(values) :]
    for row, (bar, (name, value)) in enumerate(zip(bars, values.items(), strict=True)):
        bar.set_hatch("///" if "estimate" in name else "")
        label(axis, max(value, 1.0), row, f"{value:.2f}x{(notes or {}).get(name, '')}", "0.2")
    axis.axvline(1, color="0.5", lw=1)
    for mark in marks:
        axis.axvline(mark, color=PALETTE[3], lw=1, ls=":")
    options = dict(
        xlim=(0, 2.0 * max(values.values())),
        xlabel="times as fast as dense" + (" (dotted: the paper's)" if marks else ""),
    )
    axis.set(**options | titles)


def time_against_floor(
    axis: Axes, points: Sequence[dict[str, dict]], colors: Mapping, **titles
) -> None:
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
        floors, seconds = np.transpose(variant_points)
        draw_points(axis, floors, seconds, color, label=name)
    limits = np.array(axis.get_xlim() + axis.get_ylim())[[0, 3]]
    draw_line(axis, limits, limits, "0.5", marker="", linewidth=1)
    axis.legend(frameon=False, fontsize=9)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_formatter(matplotlib.ticker.StrMethodFormatter("{x:g}"))
    axis.set(xlabel="ms that the bytes take at stream bandwidth", ylabel="ms, median", **titles)


def speed_map(
    axis: Axes,
    speed: Callable,
    placed: Mapping[str, tuple[float, float]],
    reported: tuple[float, float],
    reported_label: str,
    **titles,
) -> None:
    """Plot lines of equal speed-up over the byte shares of softmax and FFN.

    Args:
        axis: Axes to plot on.
        speed: Function (softmax share, FFN share) -> speed-up.
        placed: Shares by model.
        reported: Shares at which the reported speed-ups would be, drawn as a star.
        reported_label: Label of the star.
        titles: Settings of the axes.
    """
    grid = np.linspace(0, 1, 101)
    # The two shares cannot sum to more than 1.
    speedups = np.where(grid[None] + grid[:, None] < 1, speed(grid[None], grid[:, None]), np.nan)
    contours = axis.contour(
        grid, grid, speedups, levels=[1.1, 1.47, 2, 3, 5], colors=[GRAY], linewidths=1
    )
    axis.clabel(contours, fmt="%gx", fontsize=8)
    softmax_shares, ffn_shares = np.transpose(list(placed.values()))
    draw_points(axis, softmax_shares, ffn_shares, BLUE)
    draw_points(axis, *reported, RED, marker="*", size=13)
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_formatter(matplotlib.ticker.PercentFormatter(1, decimals=0))
    axis.set(
        xlabel="softmax, share of the bytes of a step",
        ylabel="FFN, share",
        xlim=(0, 0.9),
        ylim=(0, 0.9),
        **titles,
    )
    labels_apart(axis, placed, dict.fromkeys(placed, BLUE))
    label(axis, *reported, reported_label, RED, offset=(9, 0))


def speed_bars(
    axis: Axes, speeds: Mapping[str, float], recalls: Mapping[str, float], **titles
) -> None:
    """Draw one bar per speed-up over the fastest dense form, with its recall, the first on top."""
    draw_bars(axis, speeds, BLUE)
    for row, (name, speed) in enumerate(speeds.items()):
        label(axis, max(speed, 1), row, f"{speed:.1f}x, recall {recalls[name]:.4f}", "0.2")
    axis.axvline(1, color="0.6", lw=1)
    axis.set(xlabel="times as fast as the fastest dense form", **titles)
    axis.set_xlim(0, 1.6 * max(speeds.values()))
    axis.tick_params(axis="y", labelsize=8)


def interval_rows(
    axis: Axes, rows: Mapping[str, dict[str, float]], at: float = 0.0, **titles
) -> None:
    """Plot shares with their 95 % intervals (mean, low, high), the first at the top.

    A vertical line at `at` marks the reference value.
    """
    for row, (name, interval) in enumerate(rows.items()):
        draw_line(axis, [interval["low"], interval["high"]], [row, row], BLUE, marker="")
        draw_points(axis, interval["mean"], row, BLUE)
    axis.axvline(at, color="0.6", lw=1)
    axis.set(yticks=range(len(rows)), yticklabels=rows, **titles)
    axis.tick_params(axis="y", labelsize=8)
    axis.invert_yaxis()
    axis.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(6))
    axis.xaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1))


def cost_of_misses(
    axis: Axes, recall: Sequence[float], shares: Mapping[str, Sequence[float]], **titles
) -> None:
    """Plot the cost of missed rows: shares against recall, both axes logarithmic."""
    for color, (name, values) in zip(PALETTE, shares.items(), strict=False):
        draw_points(axis, miss_rate(recall), np.maximum(np.abs(values), 1e-5), color, label=name)
    axis.set(
        xscale="log",
        yscale="log",
        xlabel="share of the true top-k missed",
        ylabel="share (of loss: its size)",
        **titles,
    )
    axis.legend(frameon=False)

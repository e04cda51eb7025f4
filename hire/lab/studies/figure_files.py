"""The files of a figure: its picture, and the series that it plots with their tolerances."""

import json
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from hire import storage


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


def flatten(tree: object, name: str = "") -> dict:
    """Return a tree of series as one dict; a name joins the keys of the path with blanks.

    Dicts are branches; everything else is a series.
    """
    if not isinstance(tree, dict):
        return {name: tree}
    return {
        path: series
        for key, part in tree.items()
        for path, series in flatten(part, f"{name} {key}".strip()).items()
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

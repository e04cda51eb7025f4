"""Tables that notebooks show: values with their 95 % intervals."""

from collections.abc import Mapping, Sequence

import pandas


def percent(interval: Mapping[str, float], decimals: int = 1) -> str:
    """Format a share with its interval, such as "99.1 % (98.8 to 99.4)".

    Args:
        interval: `mean`, `low` and `high` as shares of 1.
        decimals: Decimals of each number.
    """
    mean, low, high = (f"{100 * interval[name]:.{decimals}f}" for name in ("mean", "low", "high"))
    return f"{mean} % ({low} to {high})"


def interval_table(
    rows: Mapping[str, Mapping[str, Mapping[str, float]]], decimals: int = 1
) -> pandas.DataFrame:
    """Return a table of shares with their intervals, one row per name.

    Args:
        rows: Row -> column -> `mean`, `low` and `high`, and optionally `n` and `documents`. The
            last two become columns of their own.
        decimals: Decimals of each percentage.
    """
    lines = {}
    for name, columns in rows.items():
        cells: dict = {column: percent(value, decimals) for column, value in columns.items()}
        counts = next(iter(columns.values()))
        cells |= {count: counts[count] for count in ("n", "documents") if count in counts}
        lines[name] = cells
    return pandas.DataFrame.from_dict(lines, orient="index")


def curve_table(
    curves: Mapping[str, Mapping[str, Sequence[float]]], columns: Sequence, quality: str
) -> pandas.DataFrame:
    """Return one quality of several curves as a table, one row per curve.

    Args:
        curves: Curve -> quality -> values.
        columns: Name of each value's column.
        quality: The quality to show, such as "recall".
    """
    return series_table({name: curve[quality] for name, curve in curves.items()}, columns)


def series_table(
    series: Mapping[str, Sequence[float]], columns: Sequence, decimals: int = 4
) -> pandas.DataFrame:
    """Return series as a table, one row per series."""
    table = pandas.DataFrame.from_dict(dict(series), orient="index", columns=list(columns))
    return table.round(decimals)


def by_model(tables: Mapping[str, pandas.DataFrame]) -> pandas.DataFrame:
    """Return the tables of several models as one, with the model's name before each row."""
    return pandas.concat(dict(tables))

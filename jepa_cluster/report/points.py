"""Groups of trials: those of a setting, the seeds of a point, and the table of points.

In: rows of trials. Out: rows by what they share, and means over seeds with intervals.
"""

from __future__ import annotations

import itertools

import numpy as np

from jepa_cluster import labels
from jepa_cluster.report import power_law
from jepa_cluster.results import tables
from jepa_cluster.results.tables import Row, Rows

# columns that the mean of a point's seeds does not have
TRIAL_COLUMNS = ("trial", "seed", "state", "cause", "code", "attempts", "trunk", "dropped")


def group_by(
    rows: Rows,
    *columns: str,
) -> dict[str, list[Row]]:
    """Group rows by their cells of some columns, in the order of their first row."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        cells = map(str, map(row.get, columns))
        groups.setdefault(" ".join(cells), []).append(row)
    return groups


def group_by_point(rows: Rows) -> dict[str, list[Row]]:
    """Group the seeds of each point, by the point's label."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(point_label(row), []).append(row)
    return groups


def point_label(row: Row) -> str:
    """Return the label of a trial without its seed."""
    *words, _ = str(row["label"]).split()
    return " ".join(words) or labels.ALL


def point_table(trials: Rows) -> list[Row]:
    """Return one row per point: means over its finished trials, in the order of `trials`.

    n: number of trials. low/<metric>, high/<metric>, from two seeds on: Student's interval
    (power_law.LEVEL) of that mean.
    """
    done = [row for row in trials if row["state"] == "done"]
    return list(map(_mean_row, group_by_point(done).values()))


def _mean_row(rows: Rows) -> Row:
    """Return the row of a point from those of its finished trials."""
    point: Row = {}
    metrics: list[str] = []
    for key in dict.fromkeys(itertools.chain(*rows)):
        cells = tables.column(rows, key)
        if key == "parameters":
            continue
        if isinstance(cells[0], float):
            metrics.append(key)
        elif key not in TRIAL_COLUMNS and key in rows[0]:
            point[key] = cells[0]
    point["label"] = point_label(rows[0])
    point["parameters"] = rows[0]["parameters"]
    point["n"] = len(rows)
    for metric in metrics:
        mean = power_law.mean(tables.column(rows, metric))
        point[metric] = mean.value
        if np.isfinite(mean.low):
            point[f"low/{metric}"] = mean.low
            point[f"high/{metric}"] = mean.high
    return point


def mean_of(
    rows: Rows,
    metric: str,
) -> float:
    """Return the mean of a column."""
    return float(np.mean(tables.column(rows, metric)))

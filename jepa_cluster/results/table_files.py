"""Tables as files: CSV and Parquet, with intervals as numbers."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from jepa_cluster import labels
from jepa_cluster.errors import JepaError
from jepa_cluster.results.tables import Row, Rows, SweepResults


def with_numbers(
    sweep: SweepResults,
    table: Rows,
) -> list[Row]:
    """Return rows whose axes are also numbers: <axis>.value, or .low, .mid and .high."""
    numbered: list[Row] = []
    for row in table:
        wider = dict(row)
        for axis in sweep.axes:
            for part, number in labels.numbers_of(str(row.get(axis, ""))).items():
                wider[f"{axis}.{part}"] = number
        numbered.append(wider)
    return numbered


def to_csv(
    table: Sequence[Mapping[str, object]],
) -> str:
    """Write a table as CSV. Columns are those of all rows; a cell that a row lacks is empty."""
    columns: dict[str, None] = {}
    for row in table:
        columns.update(dict.fromkeys(row))
    out = io.StringIO()
    writer = csv.DictWriter(out, list(columns), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return out.getvalue()


def write(
    table: Sequence[Mapping[str, object]],
    path: Path,
) -> None:
    """Write a table as CSV, or as Parquet to a .parquet file. Raises JepaError, OSError."""
    if path.suffix != ".parquet":
        path.write_text(to_csv(table))
        return
    try:
        import pandas
    except ImportError as e:
        hint = "pip install 'jepa-cluster[track]', or .csv"
        raise JepaError("Parquet needs pandas and pyarrow", hint=hint) from e
    pandas.DataFrame(table).to_parquet(path)

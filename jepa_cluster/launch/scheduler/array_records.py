"""The records of the arrays that Slurm accepted: sweeps/*/arrays/*.json.

In: a root. Out: the arrays of all its sweeps, oldest first. Slurm is not asked.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import cast

from jepa_cluster.errors import TrialError
from jepa_cluster.records import ArrayIntent, ArrayRecord, SweepArray
from jepa_cluster.trial.directory import Root
from jepa_cluster.trial.files import read_json

DAY = 86_400  # seconds; clocks may be apart, and an hour comes twice in autumn


def read(root: Root, sweep: str = "*") -> list[SweepArray]:
    """Return the arrays that Slurm accepted, of all sweeps or of one, oldest first."""
    return read_with_torn(root, sweep)[0]


def read_with_torn(root: Root, sweep: str = "*") -> tuple[list[SweepArray], list[Path]]:
    """Return the arrays, and the records that a crash of the machine has torn.

    The next `jepa submit` of the user who submitted such an array writes its record again.
    """
    found: list[SweepArray] = []
    torn: list[Path] = []
    for path in (root.path / "sweeps").glob(f"{sweep}/arrays/*.json"):
        try:
            record = cast("ArrayRecord | None", read_json(path))
        except TrialError:
            torn.append(path)
            continue
        if record:
            found.append({**record, "sweep": path.parents[1].name})
    return sorted(found, key=lambda record: record["submitted"]), torn


def arrays_of(arrays: Iterable[SweepArray], names: set[str]) -> list[SweepArray]:
    """Return the arrays that name at least one of these trials."""
    return [array for array in arrays if not names.isdisjoint(array["trials"])]


def before_submission(arrays: Iterable[ArrayIntent]) -> str:
    """Return a time a day before the first of these was submitted, as sacct takes it."""
    first = min(array["submitted"] for array in arrays) / 1000 - DAY
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(max(first, 0)))

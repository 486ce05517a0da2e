"""What accounting bills for trials: process-seconds by `sacct -D`.

In: a root and names of trials. Out: seconds per trial. It changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

from jepa_cluster.errors import JepaError
from jepa_cluster.launch.scheduler import array_records, slurm
from jepa_cluster.launch.scheduler.array_records import arrays_of, before_submission
from jepa_cluster.trial.directory import Root
from jepa_cluster.trial.usage import process_seconds


def billed_seconds(root: Root, names: Iterable[str]) -> dict[str, float] | None:
    """Return process-seconds per trial or canary by `sacct -D`, whichever sweep submitted it.

    None without accounting. Attempts on this machine count by their own records.
    """
    wanted = set(names)
    arrays = arrays_of(array_records.read(root), wanted)
    if not arrays:
        return None
    try:
        tasks = slurm.sacct((array["name"] for array in arrays), before_submission(arrays))
    except JepaError:
        tasks = None
    if tasks is None:
        return None
    total: dict[str, float] = {}
    for name in wanted:
        trial = root.trial(name)
        total[name] = process_seconds(trial, trial.attempts(), kind="local")
    by_name = {array["name"]: array for array in arrays}
    for task in tasks:
        array, index = by_name[task.name], task.index or 0
        name = array["trials"][index] if task.job == array["job"] else ""
        if name in total:
            total[name] += task.seconds * array["nodes"] * array["procs_per_node"]
    return total

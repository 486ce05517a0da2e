"""Rows of squeue and sacct made by hand, over the files of a root; fixtures of tests/pure."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import fake_trials

from jepa_cluster.errors import LaunchError
from jepa_cluster.launch.scheduler import facts, slurm
from jepa_cluster.launch.scheduler.slurm import Task
from jepa_cluster.sweep.points import RETRIES
from jepa_cluster.trial.directory import Root, TrialDir
from jepa_cluster.trial.files import read_json, write_json
from jepa_cluster.trial.status import TrialStatus

DOWN = LaunchError("slurm_persist_conn_open: failed to open persistent connection")
Ask = Callable[..., list[TrialStatus]]


@pytest.fixture
def trials(tmp_path: Path) -> list[TrialDir]:
    """Three trials of a sweep, which array 7 was given a day ago."""
    root = Root(tmp_path)
    trials = fake_trials.sweep(root, "s", scales=fake_trials.SCALES[:1])
    plan = read_json(root.sweep("s").plan)
    write_json(root.sweep("s").plan, {**(plan or {}), "retries": {**RETRIES, "killed": 1}})
    add_array(trials, "7")
    return trials


def add_array(trials: list[TrialDir], job: str, age: float = 86_400, **more: Any) -> None:
    folder = trials[0].root.sweep("s")
    folder.arrays.mkdir(exist_ok=True)
    record = {
        "name": f"jepa.s.A.{job}",
        "trials": [trial.name for trial in trials],
        "job": job,
        "submitted": int((time.time() - age) * 1000),
        "nodes": 1,
        "procs_per_node": 1,
    }
    write_json(folder.array(f"jepa.s.A.{job}"), {**record, **more})


@pytest.fixture
def ask(trials: list[TrialDir], monkeypatch: pytest.MonkeyPatch) -> Ask:
    """Return the states of the trials when squeue and sacct print these rows."""

    def run(squeue: Any = (), sacct: Any = ()) -> list[TrialStatus]:
        def answer(rows: Any) -> Any:
            def program(*_: object) -> Any:
                if isinstance(rows, Exception):
                    raise rows
                return rows if rows is None else list(rows)

            return program

        monkeypatch.setattr(slurm, "squeue", answer(squeue))
        monkeypatch.setattr(slurm, "sacct", answer(sacct))
        found = facts.query_status(trials[0].root, [trial.name for trial in trials])
        return [found.trials[trial.name] for trial in trials]

    return run


def task(index: int | None, state: str, job: str = "7", **more: Any) -> Task:
    return Task(job, index, f"jepa.s.A.{job}", state, **more)


def run(index: int, state: str, hour: int) -> Task:
    """A row of sacct of a run of the job, from that hour of a day to the next hour."""
    start, end = f"2026-03-01T{hour:02d}:00:00", f"2026-03-01T{hour + 1:02d}:00:00"
    if state == "PENDING":
        start = end = "Unknown"
    return task(index, state, start=start, end="Unknown" if state == "RUNNING" else end)


def states(found: list[TrialStatus]) -> list[str]:
    return [status.state for status in found]


def begin(trial: TrialDir, job: str = "7", **more: Any) -> None:
    trial.claim({"started": 1, "array_job_id": job, "job_id": job, **more})


def begin_run(trial: TrialDir, index: int, hour: int, restart: int = 0) -> None:
    """Open an attempt of a run of the job, a minute after that hour."""
    started = int(1000 * time.mktime((2026, 3, 1, hour, 1, 0, 0, 0, -1)))
    begin(
        trial,
        kind="slurm",
        array_task_id=str(index),
        restart_count=str(restart),
        started=started,
    )

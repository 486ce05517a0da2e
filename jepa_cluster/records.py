"""The JSON documents that processes exchange through the filesystem, as types, and the names of Slurm jobs.

docs/trial-directory.md says who writes and who reads which file. The keys are spelled here and nowhere else.
A key that is `NotRequired` is read with `get`.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NotRequired, Required, TypedDict

_InClass = TypedDict("_InClass", {"class": str})  # `class` is no name in Python


class ClassRecord(_InClass):
    """A resource class: trials that can share an array. minutes: time limit of a job."""

    nodes: int
    procs_per_node: int
    minutes: int


class PlannedTrial(_InClass):
    """One trial of plan.json. hours: estimated; world: processes; begins: step of the trunk where a branch begins."""

    name: str
    id: str
    label: str
    point: dict[str, Any]
    seed: int
    world: int
    steps: int
    hours: float
    trunk: str | None
    begins: int


class SweepPlan(TypedDict):
    """plan.json: the trials and classes that `jepa submit` made of a sweep file. submitted: Unix ms."""

    sweep: str
    question: str
    expect: str
    axes: list[str]
    code: str
    profile: str
    kind: str
    unit: str
    submitted: int
    limits: dict[str, Any]
    retries: dict[str, int]
    classes: list[ClassRecord]
    trials: list[PlannedTrial]


class ArrayRecord(ClassRecord):
    """arrays/NAME.json, and intents/NAME.json, which has no `job` yet.

    trials: names by array index. parallel: tasks that may run at a time; 0: none before other arrays have ended.
    held: trials that Slurm holds. branches: trial -> its trunk and the step that the trunk must commit first.
    succeeds: the job that this one continues.
    """

    name: str
    trials: list[str]
    parallel: int
    submitted: int
    code: str
    job: NotRequired[str]
    canary: NotRequired[str]
    held: NotRequired[list[str]]
    branches: NotRequired[dict[str, tuple[str, int]]]
    succeeds: NotRequired[str]


class AttemptRecord(TypedDict, total=False):
    """attempts/NNNN.json: one allocation that worked on a trial. Times are Unix ms.

    A record without `cause` is open. A record that cannot be read holds only `attempt`.
    """

    attempt: Required[int]
    launch: str
    kind: str
    job: str
    job_id: str
    array_job_id: str
    array_task_id: str
    restart_count: str
    job_nodelist: str
    job_partition: str
    host: str
    pid: int
    world: int
    code: str
    package: str
    argv: list[str]
    versions: dict[str, str]
    address: str
    started: int
    start_step: int
    end_step: int
    trunk: str
    lost_steps: int
    seconds: dict[str, float]
    goodput: float
    pace: Any
    ended: int
    cause: str
    exit: int
    error: str
    failed_saves: dict[str, Any]
    node: str
    excluded: list[str]
    exclude_refused: str
    forgiven: bool
    halved: int


@dataclass(frozen=True)
class JobName:
    """The name of a Slurm job: `jepa.SWEEP.CLASS.UNIQUE`. The unique part finds a job whose id was lost."""

    sweep: str
    letter: str
    unique: str

    def __str__(self) -> str:
        return f"jepa.{self.sweep}.{self.letter}.{self.unique}"

    @classmethod
    def new(cls, sweep: str, letter: str) -> JobName:
        return cls(sweep, letter, uuid.uuid4().hex[:8])

    @classmethod
    def parse(cls, name: str) -> JobName | None:
        """Return the parts of a name; None for a job that is none of ours."""
        match = re.fullmatch(r"jepa\.(.+)\.([^.]+)\.([0-9a-f]{8})", name)
        return cls(match[1], match[2], match[3]) if match else None

    @classmethod
    def of_this_job(cls, env: Mapping[str, str]) -> JobName | None:
        """Return the name of the Slurm job that runs this process."""
        return cls.parse(env.get("SLURM_JOB_NAME", ""))

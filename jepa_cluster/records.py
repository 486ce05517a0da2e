"""Types of the JSON documents that processes exchange by files.

docs/trial-directory.md says who writes and who reads which file. The keys are spelled here and
nowhere else. A key that is `NotRequired` is read with `get`.
"""

from __future__ import annotations

from typing import Any, NotRequired, Required, TypedDict

_InClass = TypedDict("_InClass", {"class": str})  # `class` is no name in Python

# Keys that the first versions of plan.json did not have.
PLAN_DEFAULTS = {
    "question": "",
    "expect": "",
    "expect_best": {},
    "claims": [],
    "axes": [],
    "code": "",
    "profile": "",
    "kind": "",
    "unit": "GPU-h",
    "submitted": 0,
    "limits": {},
    "retries": {},
    "classes": [],
    "dropped": [],
}
PLANNED_DEFAULTS = {"trunk": None, "begins": 0, "world": 1, "hours": 0.0, "class": "A"}


class ClassRecord(_InClass):
    """A resource class: trials that can share an array. minutes: time limit of a job."""

    nodes: int
    procs_per_node: int
    minutes: int


class _PlannedTrial(_InClass):
    name: str
    id: str
    label: str
    point: dict[str, Any]
    seed: int
    world: int
    steps: int
    hours: float
    begins: int


class PlannedTrial(_PlannedTrial):
    """One trial of plan.json.

    hours: estimated; world: processes; begins: step of the trunk where a branch begins.
    """

    trunk: str | None


class ClaimRecord(TypedDict):
    """A claim of a sweep file: `sweep.points.Claim`.

    finished: its trials that had finished when it was submitted.
    """

    claim: str
    metric: str
    lower: dict[str, Any]
    than: dict[str, Any]
    by: float
    finished: int


class SweepPlan(TypedDict):
    """plan.json: the trials and classes that `jepa submit` made of a sweep file.

    expect_best: setting -> a trend or a level. submitted: Unix ms. dropped: trials of earlier
    versions of the file whose jobs are not over.
    """

    sweep: str
    question: str
    expect: str
    expect_best: dict[str, Any]
    claims: list[ClaimRecord]
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
    dropped: list[PlannedTrial]


class ArrayIntent(ClassRecord):
    """intents/NAME.json: an array that is about to be submitted.

    trials: names by array index. parallel: tasks that may run at a time; 0: none before other
    arrays have ended. held: trials that Slurm holds. branches: trial -> its trunk and the step that
    the trunk must commit first. succeeds: the job that this one continues. resumed: the user
    started the trials by `jepa resume` or `jepa retry`, so earlier failures do not count.
    """

    name: str
    trials: list[str]
    parallel: int
    submitted: int
    code: str
    canary: NotRequired[str]
    held: NotRequired[list[str]]
    branches: NotRequired[dict[str, tuple[str, int]]]
    succeeds: NotRequired[str]
    resumed: NotRequired[bool]


class ArrayRecord(ArrayIntent):
    """arrays/NAME.json: an array that Slurm accepted. job: its id."""

    job: str


class SweepArray(ArrayRecord):
    """The record of an array together with the name of its sweep."""

    sweep: str


class CanaryRequest(_InClass):
    """canary.json: what the class of a canary costs without a measurement.

    about: label of the canary's trial. hours: of that trial. cost: of the class, in `unit`; others:
    of the rest of the sweep. limit: `limits.gpu_hours` of the sweep. t: Unix ms of the submission.
    """

    about: str
    hours: float
    cost: float
    others: float
    limit: float | None
    unit: str
    t: int


class QueueEntry(TypedDict):
    """local/queue/*.json and local/running/*.json: a trial in the local queue.

    Times are Unix ms.

    code: snapshot. trunk, begins: of a branch. after: the canary that holds the trial. used:
    retries by budget. A running entry has: launch, slots, and pids, which holds the process id and
    kernel start time of each rank.
    """

    trial: str
    code: str
    world: int
    python: str
    environment: dict[str, str]
    retries: dict[str, int]
    trunk: NotRequired[str]
    begins: NotRequired[int]
    after: NotRequired[str]
    used: NotRequired[dict[str, int]]
    launch: NotRequired[str]
    slots: NotRequired[list[str]]
    pids: NotRequired[list[tuple[int, int]]]


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
    save_seconds: float
    pace: Any
    ended: int
    cause: str
    exit: int
    slurm_state: str
    error: str
    failed_saves: dict[str, Any]
    node: str
    excluded: list[str]
    exclude_refused: str
    forgiven: bool
    halved: int


class CanaryRow(CanaryRequest):
    """A canary in the document of `jepa status`.

    measured_hours: of one trial of the class. holds: trials that wait.
    """

    name: str
    state: str
    job: str
    step: int
    steps: int
    measured_hours: float | None
    gpu_hours: float
    holds: int


class StatusRow(PlannedTrial):
    """A trial in the document of `jepa status`.

    held: it waits for something that only the user can change. cause: why its retry budget is used
    up, or ''. slurm_state: Slurm's word for the end of its job, or ''. code: of its attempts.
    gpu_hours: of all attempts; probe: the newest probe error.
    """

    index: int
    state: str
    held: bool
    cause: str
    note: str
    slurm_state: str
    job: str
    attempts: int
    code: str
    canary: str
    step: int
    loss: float | None
    probe: float | None
    gpu_hours: float


class StatusDocument(TypedDict):
    """What `jepa status --json` prints of a sweep.

    counts: trials by state. cost_by: the source of gpu_hours. remaining: GPU-hours of trials that
    are not finished. stopped_cost: GPU-hours that the stopped ones would need. problem: why Slurm
    was not asked, else ''.
    """

    sweep: str
    question: str
    counts: dict[str, int]
    gpu_hours: float
    cost_by: str
    unit: str
    remaining: float
    stopped_cost: float
    limit: float | None
    problem: str
    canaries: list[CanaryRow]
    trials: list[StatusRow]


class PlanRow(_PlannedTrial):
    """A trial in the document of `jepa plan`. trunk: the index of a branch's trunk."""

    index: int
    state: str
    action: str
    trunk: int | None


class PlanClass(ClassRecord):
    """A class in the document of `jepa plan`.

    hours: of one trial; spread, gpu_spread: the errors of the estimates. save_seconds: the longest
    save of such trials, 0 if none was measured. grace_seconds: that a preempted job has for its
    last one; grace: the same in words. kept: checkpoints of all its trials at most.
    lanes: ranks up to which data.order=block reads whole blocks; None with another order.
    """

    models: list[str]
    trials: int
    hours: float
    spread: float
    gpu_hours: float
    gpu_spread: float
    basis: str
    save_seconds: float
    grace_seconds: float
    grace: str
    kept: int
    lanes: int | None


class PlanData(TypedDict):
    """A data set that trials of a plan read. labels: of its images. probes: labels they predict."""

    root: str
    digest: str
    train: int
    val: int
    labels: list[str]
    classes: int
    probes: list[str]


class FinishedCost(TypedDict):
    """GPU-hours of the trials that are done: by the estimate of the last submit, and in fact."""

    planned: float
    took: float


class PlanDocument(TypedDict):
    """What `jepa plan --json` prints.

    actions: trials by action. gpu_hours: of the trials to start; in_progress_cost: of those that
    are queued or running; spent: of all attempts so far. starts: class -> estimated start. dropped:
    active trials that are no longer wanted. checkpoint_bytes: of the largest trial;
    kept_bytes: of all checkpoints that the trials keep; free_bytes: on the disk of the root;
    quota_bytes: that the user's quota leaves there, None without one.
    """

    sweep: str
    question: str
    expect: str
    kind: str
    unit: str
    actions: dict[str, int]
    classes: list[PlanClass]
    data: list[PlanData]
    gpu_hours: float
    in_progress_cost: float
    spent: float
    finished: FinishedCost
    limit: float | None
    arrays: int
    starts: dict[str, str]
    code: str
    problem: str
    dropped: list[str]
    checkpoint_bytes: int
    kept_bytes: int
    free_bytes: int
    quota_bytes: int | None
    trials: list[PlanRow]


class BatchScript(TypedDict):
    """A script in the document of `jepa submit --dry-run`."""

    title: str
    name: str
    trials: list[str]
    script: str


class LocalCommand(TypedDict):
    """What the local queue would start for a trial: one process per rank."""

    processes: int
    command: str


class RankCommands(TypedDict):
    """What `jepa repro --json` prints of a trial. commands: one per rank."""

    trial: str
    code: str
    versions: dict[str, str]
    commands: list[str]

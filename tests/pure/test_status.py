"""The table that decides the state of a trial: cases per row, on facts made by hand.

A case names the row, the facts, the state, what `submit` does, the status of the MLflow run, and a
part of the note. No file, no scheduler.
"""

from dataclasses import replace

import pytest

from jepa_cluster.trial.status import (
    IN_PROGRESS,
    NO_ANSWER,
    NO_ROW,
    NOT_ASKED,
    OVER,
    STATES,
    SlurmAnswer,
    TrialFacts,
    TrialStatus,
    status_from,
)

JOB = TrialFacts(job="7_1")
TRIED = replace(JOB, attempts=2, has_attempt=True, has_begun=True)
STOP = {"stopped": True, "stopped_by": "stopped by jepa cancel, 03 Mar 14:05"}
BEATS = {"heartbeat": True}


def row(state: str, **more: object) -> SlurmAnswer:
    return replace(SlurmAnswer(state=state), **more)  # pyright: ignore


def gone(facts: TrialFacts, squeue: str = "", sacct: str = "", **more: object) -> TrialFacts:
    """The facts with the words of squeue and sacct; '' is no row."""
    answers = {
        "squeue": row(squeue) if squeue else NO_ROW,
        "sacct": row(sacct) if sacct else NO_ROW,
    }
    return replace(facts, **answers, **more)  # pyright: ignore


def live(facts: TrialFacts, state: str, reason: str = "", **more: object) -> TrialFacts:
    held = reason.startswith("held")
    begin_time = reason.startswith("starts again")
    answer = row(state, reason=reason, held=held, begin_time=begin_time)
    return replace(facts, squeue=answer, **more)  # pyright: ignore


SILENT = replace(TRIED, squeue=NO_ANSWER, sacct=NOT_ASKED)
NO_SACCT = replace(TRIED, sacct=NO_ANSWER)
FILES = replace(JOB, squeue=NOT_ASKED)
USED_UP = {"exhausted": "node 6 times", "cause": "node"}
CASES: list[tuple[int, TrialFacts, str, str, str, str]] = [
    (1, replace(TRIED, done=True, failed=True), "done", "done", "FINISHED", ""),
    (2, replace(TRIED, failed=True, error="a bug"), "failed", "leave", "FAILED", "a bug"),
    (3, TrialFacts(local="running"), "running", "keep", "RUNNING", "starting"),
    (3, replace(TRIED, local="running", **STOP), "running", "keep", "RUNNING", "stopping"),
    *((3, live(TRIED, word, "on n1"), "running", "keep", "RUNNING", "on n1") for word in (
        "RUNNING", "CONFIGURING", "SIGNALING", "COMPLETING", "SUSPENDED", "STOPPED", "RESIZING",
        "STAGE_OUT",
    )),
    (3, live(JOB, "RUNNING", "on n1"), "running", "keep", "RUNNING", "starting on n1"),
    (3, live(TRIED, "RUNNING", "on n1", **STOP), "running", "keep", "RUNNING", "n1; stopping"),
    (4, live(TRIED, "PENDING", "Priority", **STOP), "stopped", "leave", "KILLED", "still waits"),
    (4, TrialFacts(local="queued", **STOP), "stopped", "leave", "KILLED", "still waits"),
    (5, live(TRIED, "PENDING", "starts again at 20:09"), "requeued", "keep", "SCHEDULED", "20:09"),
    (6, live(TRIED, "PENDING", "held by a user"), "queued", "keep", "SCHEDULED", "held"),
    (7, live(JOB, "PENDING", "starts again at 20:09"), "queued", "keep", "SCHEDULED", "20:09"),
    (7, live(JOB, "PENDING", "held", is_ours=True), "queued", "keep", "SCHEDULED", "held"),
    (7, TrialFacts(local="queued"), "queued", "keep", "SCHEDULED", "waits for a slot"),
    (8, replace(FILES, attempts=1, **BEATS, **STOP), "running", "keep", "RUNNING", ""),
    (8, replace(FILES, **STOP), "stopped", "leave", "KILLED", ""),
    (8, replace(FILES, attempts=1, **USED_UP), "failed", "leave", "FAILED", ""),
    (8, replace(FILES, attempts=1), "interrupted", "resume", "SCHEDULED", ""),
    (8, FILES, "queued", "keep", "SCHEDULED", ""),
    (8, replace(FILES, job=""), "new", "submit", "SCHEDULED", ""),
    (9, gone(TRIED, "NODE_FAIL", **STOP), "stopped", "leave", "KILLED", "03 Mar 14:05: jepa res"),
    (9, replace(SILENT, **STOP), "stopped", "leave", "KILLED", "by jepa cancel"),
    (10, gone(TRIED, "NODE_FAIL", **USED_UP), "failed", "leave", "FAILED", "node 6 times"),
    (11, SILENT, "unknown", "refuse", "", "does not answer"),
    (11, replace(SILENT, **BEATS), "running", "refuse", "RUNNING", "does not answer"),
    (12, TrialFacts(), "new", "submit", "SCHEDULED", ""),
    (12, TrialFacts(attempts=1), "interrupted", "resume", "SCHEDULED", ""),
    (12, TrialFacts(attempts=1, **BEATS), "unknown", "keep", "", "by hand"),
    (13, NO_SACCT, "unknown", "refuse", "", "does not answer"),
    (13, replace(NO_SACCT, **BEATS), "running", "refuse", "RUNNING", "does not answer"),
    *((14, gone(TRIED, sacct=word), "unknown", "keep", "", "accounting knows a job") for word in (
        "PENDING", "RUNNING", "REQUEUED", "SUSPENDED",
    )),
    (14, gone(TRIED, sacct="RUNNING", silent=True), "interrupted", "resume", "SCHEDULED",
     "sacctmgr show runawayjobs"),
    (15, gone(TRIED, "COMPLETED", "CANCELLED by eve"), "stopped", "leave", "KILLED", "by eve"),
    (15, gone(JOB, sacct="CANCELLED by eve"), "stopped", "leave", "KILLED", "by eve: jepa resume"),
    (15, gone(TRIED, "CANCELLED"), "stopped", "leave", "KILLED", "by a user: jepa resume"),
    (15, gone(TRIED, "CANCELLED", "RUNNING", **BEATS), "stopped", "leave", "KILLED", "by a user"),
    (15, replace(gone(TRIED, "CANCELLED"), sacct=NO_ANSWER), "stopped", "leave", "KILLED", "by"),
    (16, gone(TRIED, **BEATS), "unknown", "keep", "", "another cluster?"),
    (17, gone(JOB), "stopped", "leave", "KILLED", "left the queue before it began"),
    *((18, gone(TRIED, word), "interrupted", "resume", "SCHEDULED", f"Slurm: {word}") for word in (
        "FAILED", "TIMEOUT", "OUT_OF_MEMORY", "NODE_FAIL", "BOOT_FAIL", "PREEMPTED", "DEADLINE",
        "COMPLETED",
    )),
    (18, gone(TRIED, sacct="CANCELLED"), "interrupted", "resume", "SCHEDULED", "CANCELLED"),
    (18, gone(TRIED, "CANCELLED", "CANCELLED"), "interrupted", "resume", "SCHEDULED", "CANCELLED"),
    (18, gone(TRIED, "FAILED", "RUNNING"), "interrupted", "resume", "SCHEDULED", "FAILED"),
    (18, gone(JOB, "FAILED"), "interrupted", "resume", "SCHEDULED", "FAILED"),
    (18, gone(TRIED), "interrupted", "resume", "SCHEDULED", "left Slurm's queue"),
]  # fmt: skip


def action(status: TrialStatus) -> str:
    return "refuse" if status.refuses else status.rule.submit


@pytest.mark.parametrize(("number", "facts", "state", "submit", "mlflow", "note"), CASES)
def test_the_first_row_that_holds_decides(
    number: int, facts: TrialFacts, state: str, submit: str, mlflow: str, note: str
):
    status = status_from(facts)
    assert status.state == state
    assert action(status) == submit
    assert status.rule.mlflow == mlflow
    assert note in status.note
    assert bool(status.note) == bool(note)
    assert status.held == (number == 6)
    markers = {10: "FAILED", 15: "STOP", 17: "STOP"}
    assert status.marker == markers.get(number, "")
    assert status.attempts == facts.attempts


def test_each_row_of_the_table_has_a_case():
    assert {number for number, *_ in CASES} == set(range(1, 19))


def test_a_status_names_the_job_that_may_be_cancelled_and_the_canary():
    waits = live(replace(JOB, canary="canary.x"), "PENDING", "Dependency")
    assert status_from(waits).job == "7_1"
    assert status_from(waits).canary == "canary.x"
    assert status_from(live(TRIED, "PENDING", **STOP)).job == "7_1"
    assert status_from(TrialFacts(local="queued", canary="canary.y")).canary == "canary.y"
    assert not status_from(replace(TRIED, local="running")).job


def test_a_used_up_budget_names_the_cause():
    assert status_from(gone(TRIED, "NODE_FAIL", **USED_UP)).cause == "node"


def test_a_state_is_in_progress_or_over_or_neither():
    assert set(IN_PROGRESS) == {"queued", "requeued", "running"}
    assert set(OVER) == {"stopped", "failed", "done"}
    assert set(STATES) - {*IN_PROGRESS, *OVER} == {"new", "interrupted", "unknown"}

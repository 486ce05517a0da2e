"""The table that decides the state of a trial: one case per row, no file, no scheduler."""

from dataclasses import replace

import pytest

from jepa_cluster.trial.status import SlurmFacts, TrialFacts, status_from

TRIED = TrialFacts(attempts=2)
STOPPED = TrialFacts(
    stopped=True,
    stopped_by="stopped by jepa cancel, 03 Mar 14:05",
    attempts=2,
)
PENDING = SlurmFacts(
    state="queued",
    reason="waits for free nodes",
    job="7_1",
    canary="canary.x",
)
RUNNING = SlurmFacts(
    state="running",
    reason="on n1",
    job="7_1",
)
LOST = SlurmFacts(ended="NODE_FAIL", job="7_1")


@pytest.mark.parametrize(
    ("facts", "state", "note"),
    [
        (TrialFacts(done=True, failed=True), "done", ""),
        (TrialFacts(failed=True, error="a bug", local="running"), "failed", "a bug"),
        (TrialFacts(local="running"), "running", "starting"),
        (replace(TRIED, local="running"), "running", ""),
        (replace(STOPPED, local="running"), "running", "stopping"),
        (replace(STOPPED, local="queued"), "stopped", "jepa resume"),
        (TrialFacts(local="queued"), "queued", "waits for a slot"),
        (replace(TRIED, slurm=SlurmFacts(answers=False)), "unknown", "Slurm does not answer"),
        (replace(STOPPED, slurm=SlurmFacts(answers=False)), "unknown", "Slurm does not answer"),
        (replace(TRIED, heartbeat=True, slurm=SlurmFacts(answers=False)), "running", "does not"),
        (replace(TRIED, slurm=PENDING), "queued", "waits for free nodes"),
        (replace(STOPPED, slurm=PENDING), "queued", "waits for free nodes"),
        (replace(TRIED, slurm=RUNNING), "running", "on n1"),
        (TrialFacts(slurm=RUNNING), "running", "starting on n1"),
        (replace(STOPPED, slurm=LOST), "stopped", "by jepa cancel, 03 Mar 14:05: jepa resume"),
        (replace(TRIED, slurm=SlurmFacts(ended="CANCELLED by 7")), "stopped", "cancelled by 7 in"),
        (replace(TRIED, slurm=LOST), "interrupted", "Slurm: NODE_FAIL"),
        (replace(TRIED, slurm=SlurmFacts()), "interrupted", "left Slurm's queue"),
        (replace(TRIED, slurm=replace(LOST, exhausted="node 6 times")), "failed", "node 6 times"),
        (TRIED, "interrupted", ""),
        (TrialFacts(), "new", ""),
    ],
)
def test_the_first_row_that_holds_decides(facts: TrialFacts, state: str, note: str):
    status = status_from(facts)
    assert status.state == state
    assert note in status.note
    assert bool(status.note) == bool(note)
    assert status.attempts == facts.attempts


def test_a_status_names_the_job_and_the_canary_that_it_comes_from():
    status = status_from(replace(TRIED, slurm=PENDING))
    assert status.job == "7_1"
    assert status.canary == "canary.x"
    assert status_from(replace(TRIED, slurm=LOST)).job == "7_1"
    assert status_from(TrialFacts(local="queued", canary="canary.y")).canary == "canary.y"


@pytest.mark.parametrize(
    ("facts", "state"),
    [
        (TrialFacts(done=True), "done"),
        (TrialFacts(failed=True, attempts=1, last_cause="error"), "failed"),
        (TrialFacts(), "queued"),
        (TrialFacts(stopped=True), "queued"),
        (replace(STOPPED, last_cause=""), "running"),
        (replace(STOPPED, last_cause="preempted"), "stopped"),
        (replace(TRIED, last_cause="stopped"), "stopped"),
        (replace(TRIED, last_cause="preempted"), "requeued"),
    ],
)
def test_without_a_scheduler_the_newest_attempt_decides(facts: TrialFacts, state: str):
    assert status_from(facts, files_only=True).state == state

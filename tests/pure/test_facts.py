"""The facts about trials: rows of squeue and sacct made by hand, over the files of a root."""

import os
import time

import pytest
from support.slurm_rows import DOWN, Ask, add_array, begin, states, task

from jepa_cluster.launch.scheduler import facts, local, slurm
from jepa_cluster.launch.scheduler.slurm import Task
from jepa_cluster.launch.submit import submit
from jepa_cluster.results import tables
from jepa_cluster.trial import file_facts
from jepa_cluster.trial.directory import TrialDir
from jepa_cluster.trial.files import read_json, write_json


def test_a_row_without_an_index_is_about_the_tasks_that_have_no_row(ask: Ask):
    """squeue prints one row when waiting tasks were cancelled together."""
    found = ask([task(None, "CANCELLED"), task(2, "RUNNING", node="n1")])
    assert states(found) == ["stopped", "stopped", "running"]
    assert found[0].marker == "STOP"


def test_a_row_of_another_job_with_this_name_or_id_does_not_count(ask: Ask):
    """Slurm may begin to count anew."""
    other = Task("7", 0, "jepa.other.A.1", "RUNNING")
    assert states(ask([other, task(1, "RUNNING", job="6")])) == ["stopped"] * 3


def test_only_the_newest_array_of_a_trial_speaks(trials: list[TrialDir], ask: Ask):
    """Its older job was cancelled; the newer one is lost, waits, or has ended otherwise."""
    add_array(trials[:1], "8", age=60, resumed=True)
    older = [task(0, "CANCELLED"), task(1, "CANCELLED")]
    found = ask([*older, task(None, "PENDING", job="8")])
    assert states(found)[:2] == ["queued", "stopped"]
    found = ask(older, [task(0, "CANCELLED by 0"), task(None, "NODE_FAIL", job="8")])
    assert states(found)[:2] == ["interrupted", "stopped"]


def test_a_task_that_left_no_trace_is_stopped_and_one_that_began_is_interrupted(
    trials: list[TrialDir], ask: Ask
):
    """Without accounting, after MinJobAge. A log that is older than the array does not count."""
    begin(trials[0])
    for job, age in (("7_1", 0.0), ("7_2", 3e5)):
        log = trials[0].root.sweep("s").jobs / f"{job}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        log.touch()
        os.utime(log, (time.time() - age,) * 2)
    assert states(ask(sacct=None)) == ["interrupted", "interrupted", "stopped"]


def test_the_last_row_of_accounting_counts_and_names_who_cancelled(
    trials: list[TrialDir], ask: Ask
):
    begin(trials[0])
    rows = [task(0, "NODE_FAIL"), task(0, "CANCELLED by 0", end="2026-03-01T20:09:00")]
    found = ask(sacct=[*rows, task(1, "CANCELLED"), task(2, "TIMEOUT")])
    assert states(found) == ["stopped", "interrupted", "interrupted"]
    assert found[0].note == "cancelled in Slurm by root, 01 Mar 20:09: jepa resume"


def test_a_trial_is_never_interrupted_while_accounting_is_late_or_down(
    trials: list[TrialDir], ask: Ask
):
    for trial in trials:
        begin(trial)
    found = ask(sacct=DOWN)
    assert states(found) == ["unknown"] * 3
    assert all(status.refuses for status in found)
    late = [task(index, "RUNNING") for index in range(2)]
    trials[1].heartbeat.touch()
    found = ask(sacct=[*late, task(2, "PENDING")])
    assert states(found) == ["interrupted", "unknown", "interrupted"]
    assert "runawayjobs" in found[0].note


def test_accounting_is_not_missed_where_a_marker_or_squeue_decides(
    trials: list[TrialDir], monkeypatch: pytest.MonkeyPatch
):
    """Then a submit of the other trials is not refused."""
    trials[0].stop.touch()
    write_json(trials[1].failed, {"error": "a bug"})
    begin(trials[2])

    def down(*_: object) -> None:
        raise DOWN

    monkeypatch.setattr(slurm, "squeue", lambda names: [task(2, "NODE_FAIL")])
    monkeypatch.setattr(slurm, "sacct", down)
    found = facts.query_status(trials[0].root, [trial.name for trial in trials])
    assert list(found.states.values()) == ["stopped", "failed", "interrupted"]
    assert not found.problem


def test_a_fresh_heartbeat_without_a_job_keeps_the_trial(trials: list[TrialDir], ask: Ask):
    begin(trials[0])
    trials[0].heartbeat.touch()
    assert ask()[0].state == "unknown"
    trials[0].amend(1, {"ended": 2, "cause": "preempted"})
    assert ask()[0].state == "interrupted"


def test_the_age_of_a_heartbeat_is_by_the_clock_of_the_file_server(
    trials: list[TrialDir], monkeypatch: pytest.MonkeyPatch
):
    """This machine is an hour behind."""
    begin(trials[0])
    trials[0].heartbeat.touch()
    real = time.time
    file_facts.clock_offset.cache_clear()
    monkeypatch.setattr(time, "time", lambda: real() - 3600)
    assert abs(file_facts.seconds_silent(trials[0])) < 60
    file_facts.clock_offset.cache_clear()


def test_jobs_that_slurm_hides_from_other_users_are_unknown(
    trials: list[TrialDir], ask: Ask, monkeypatch: pytest.MonkeyPatch
):
    """Unless a row is seen, or the array is one's own."""
    folder = trials[0].root.sweep("s")
    folder.intents.mkdir()
    folder.intent("jepa.s.A.7").touch()
    monkeypatch.setattr(slurm, "hides_jobs", lambda: True)
    assert states(ask()) == ["stopped"] * 3
    monkeypatch.setattr(os, "getuid", lambda: 4711)
    found = facts.query_status(trials[0].root, [trials[0].name])
    assert found.problem == facts.HIDDEN
    assert found.states[trials[0].name] == "unknown"
    assert states(ask([task(0, "CANCELLED")]))[0] == "stopped"


def test_a_used_up_budget_counts_tasks_that_ended_without_an_attempt(
    trials: list[TrialDir], ask: Ask
):
    """retries.killed is 1. `jepa resume` and `jepa retry` begin anew."""
    for job, age in (("8", 120), ("9", 60)):
        add_array(trials[:1], job, age)
    found = ask(sacct=[task(None, "FAILED", job="9")])
    assert found[0].state == "failed"
    assert found[0].note == "unknown 3 times, retries.killed allows 1"
    assert found[0].marker == "FAILED"
    unheard = ask(DOWN)[0]  # the job may wait for its next start
    assert (unheard.state, unheard.marker, unheard.refuses) == ("unknown", "", True)
    add_array(trials[:1], "9", age=60, resumed=True)
    assert ask(sacct=[task(None, "FAILED", job="9")])[0].state == "interrupted"


def test_an_open_attempt_does_not_count_while_slurm_does_not_answer(
    trials: list[TrialDir], ask: Ask
):
    """It may run: its heartbeat may not reach this machine."""
    begin(trials[0], "5")
    begin(trials[0])
    assert ask()[0].state == "failed"
    assert ask(DOWN)[0].state == "unknown"


def test_a_requeued_task_names_the_time_of_its_start(trials: list[TrialDir], ask: Ask):
    """A task that never began is queued, although it waits for its BeginTime too."""
    begin(trials[0])
    today = time.strftime("%Y-%m-%dT23:59:58")
    waits = [task(index, "PENDING", reason="BeginTime", start=today) for index in range(2)]
    found = ask([*waits, task(2, "PENDING", reason="JobHeldUser")])
    assert states(found) == ["requeued", "queued", "queued"]
    assert found[0].note == "starts again at 23:59"
    assert found[2].held
    assert found[2].note == "held by a user: scontrol release 7_2"


def test_a_trial_that_no_job_was_submitted_for_is_new_for_readers_of_files_too(
    trials: list[TrialDir], ask: Ask
):
    """Slurm accepted one array of two; a third trial waits in the local queue."""
    root = trials[0].root
    sweep = root.sweep("s")
    sweep.array("jepa.s.A.7").unlink()
    add_array(trials[:1], "8")
    queue = local.queue_folder(root)
    queue.mkdir(parents=True)
    write_json(queue / f"1-{0:015d}-{0:05d}-{trials[2].name}.json", {"trial": trials[2].name})
    expected = ["queued", "new", "queued"]
    assert states(ask([task(0, "PENDING", "8")])) == expected
    assert [trial.state for trial in tables.load(root, "s").trials] == expected


def test_a_torn_record_is_named_and_the_next_submit_writes_it_again(
    trials: list[TrialDir], ask: Ask
):
    """The states of the other arrays stay readable."""
    root = trials[0].root
    folder = root.sweep("s")
    torn = folder.array("jepa.s.A.7")
    folder.intents.mkdir()
    record = read_json(torn) or {}
    write_json(folder.intent(torn.stem), {**record, "job": ""})
    torn.write_text(torn.read_text()[:20])
    add_array(trials[:1], "8", age=0)
    assert states(ask([task(0, "RUNNING", "8", node="n1")])) == ["running", "new", "new"]
    snapshot = facts.query_status(root, [trials[0].name])
    assert snapshot.problem.startswith("sweeps/s/arrays/jepa.s.A.7.json cannot be read")
    ask([task(1, "RUNNING", "7")])
    submit.adopt_orphans(root)
    assert read_json(torn) == record


def test_a_queue_entry_that_is_withdrawn_while_it_is_released_does_no_harm(
    trials: list[TrialDir],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The runner looks for entries behind canaries, and a user cancels one."""
    root = trials[0].root
    local.create_folders(root)
    held = local.queue_folder(root) / f"2-000000000000001-00000-{trials[0].name}.json"
    write_json(held, {"trial": trials[0].name, "after": trials[1].name})
    write_json(trials[1].done, {})
    monkeypatch.setattr(local, "held_entries", lambda root: [held])
    succeeded = TrialDir.succeeded

    def withdraw(trial: TrialDir) -> bool:
        held.unlink(missing_ok=True)
        return succeeded(trial)

    monkeypatch.setattr(TrialDir, "succeeded", withdraw)
    local.release_held(root)
    assert not local.waiting_entries(root)

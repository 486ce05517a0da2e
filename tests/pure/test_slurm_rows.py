"""How rows of squeue and sacct are read. Slurm itself: tests/slurm."""

import calendar
import time
from pathlib import Path
from typing import Any

import pytest

from jepa_cluster.errors import LaunchError, QueueFull, SchedulerDown
from jepa_cluster.launch.scheduler import array_records, facts, slurm
from jepa_cluster.launch.scheduler.slurm import Task


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Output per program; a program without one refuses."""
    outputs: dict[str, str] = {}

    def run(*words: str) -> str:
        if words[0] not in outputs:
            raise LaunchError(f"{words[0]}: refused")
        return outputs[words[0]]

    monkeypatch.setattr(slurm, "run_program", run)
    monkeypatch.setattr(slurm.shutil, "which", lambda name: name)  # pyright: ignore
    return outputs


def test_a_row_of_squeue_is_a_task_and_a_torn_one_is_left_out(answers: dict[str, str]):
    answers["squeue"] = (
        "7_1|jepa.x.A.1|PENDING|Dependency|||N/A|afterok:5(unfulfilled)\n"
        "8|jepa.x.B.2|RUNNING|None|n1|2026-03-01T03:40:00|2026-03-01T04:40:00|(null)\n7_2|jepa\n"
    )
    first, second = slurm.squeue(["jepa.x.A.1"])
    assert first.id == "7_1"
    assert first.index == 1
    assert first.dependency == "afterok:5(unfulfilled)"
    assert second.id == "8"
    assert second.index is None
    assert second.node == "n1"
    assert second.end == "2026-03-01T04:40:00"
    assert slurm.squeue([]) == []


@pytest.mark.parametrize(
    ("job_id", "indices"),
    [
        ("7", [None]),
        ("7_3", [3]),
        ("7_[0-2]", [0, 1, 2]),
        ("7_[0,2-3,9%2]", [0, 2, 3, 9]),
        ("7_[0,2-3,...]", [None]),
    ],
)
def test_the_tasks_of_an_array_in_one_row_are_separated(
    job_id: str, indices: list[int | None], answers: dict[str, str]
):
    """A list that is cut off means all tasks that have no row of their own."""
    answers["squeue"] = f"{job_id}|a|PENDING|Priority|||N/A|(null)\n"
    answers["sacct"] = f"{job_id}|a|CANCELLED by 0|None|||2026-03-01T03:40:00|0\n"
    assert [task.index for task in slurm.squeue(["a"])] == indices
    assert [task.index for task in slurm.sacct(["a"], "") or []] == indices


def test_a_row_of_sacct_has_seconds(answers: dict[str, str]):
    answers["sacct"] = (
        "7_0|a|CANCELLED by 1000|None|n1|2026-03-01T03:40:00|2026-03-01T03:41:30|90\n"
        "7_4|a|RUNNING|None|n1|Unknown|Unknown|\n"
    )
    (task,) = slurm.sacct(["a"], "2026-03-01") or []
    assert task.id == "7_0"
    assert task.state == "CANCELLED by 1000"
    assert task.seconds == 90


def test_no_accounting_is_not_the_same_as_no_answer_of_it(
    answers: dict[str, str], monkeypatch: pytest.MonkeyPatch
):
    with pytest.raises(LaunchError):
        slurm.sacct(["a"], "2026-03-01")

    def run(*words: str) -> str:
        raise LaunchError("sacct: Slurm accounting storage is disabled")

    monkeypatch.setattr(slurm, "run_program", run)
    assert slurm.sacct(["a"], "2026-03-01") is None


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ("RUNNING", "running"),
        ("COMPLETING", "running"),
        ("RESIZING", "running"),
        ("PENDING", "queued"),
        ("REQUEUE_HOLD", "queued"),
        ("COMPLETED", None),
        ("CANCELLED", None),
    ],
)
def test_a_task_is_queued_or_running_or_has_ended(state: str, expected: str | None):
    assert facts.state_of(Task("7", 0, "a", state)) == expected


@pytest.mark.parametrize(
    ("reason", "text", "held"),
    [
        ("(Priority)", "waits for its turn", False),
        ("ReqNodeNotAvail, UnavailableNodes:n1", "its nodes are down", False),
        ("ReqNodeNotAvail, Reserved for maintenance", "maintenance", False),
        ("AssocGrpGRES", "quota is in use", False),
        ("AssocGrpGRESMinutes", "budget of the account is spent", True),
        ("QOSGrpCPUMinutesLimit", "budget of the account is spent", True),
        ("JobHeldUser", "scontrol release", True),
        ("(job requeued in held state)", "scontrol release", True),
        ("(launch failed requeued held)", "scontrol release", True),
        ("DependencyNeverSatisfied", "jepa cancel", True),
        ("Dependency", "waits for another job", False),
        ("PartitionTimeLimit", "lower time", True),
        ("BadConstraints", "correct the profile", True),
        ("InvalidAccount", "correct the profile", True),
        ("(SomethingNew)", "(SomethingNew)", False),
    ],
)
def test_a_reason_is_explained_and_says_whether_time_cures_it(reason: str, text: str, held: bool):
    found = slurm.explain_reason(reason)
    assert text in found.text
    assert found.held == held


def test_a_maintenance_is_named_by_its_end(answers: dict[str, str]):
    answers["scontrol"] = (
        "ReservationName=a StartTime=2096-03-01T03:00:00 EndTime=2096-03-01T04:00:00 Flags=SPEC\n"
        "ReservationName=b StartTime=2096-03-01T05:00:00 EndTime=2096-03-01T20:24:00 Flags=MAINT\n"
    )
    text = slurm.maintenance()
    assert text.startswith("maintenance until 01 Mar 20:24, from 01 Mar 05:00")
    assert "a shorter time would start now" in text


def test_a_program_that_cannot_reach_slurm_is_not_one_that_refuses():
    with pytest.raises(SchedulerDown, match="not installed"):
        slurm.run_program("no-such-program-of-slurm")
    with pytest.raises(LaunchError) as refused:
        slurm.run_program("sh", "-c", "echo Invalid job id >&2; exit 1")
    assert not isinstance(refused.value, SchedulerDown)
    assert "Invalid job id" in refused.value.what
    with pytest.raises(SchedulerDown):
        slurm.run_program("sh", "-c", "echo Unable to contact slurm controller >&2; exit 1")


def test_only_nodes_that_may_run_jobs_are_usable(answers: dict[str, str]):
    answers["sinfo"] = "n1|idle\nn2|mixed~\nn3|down*\nn4|drained\nn5|allocated#\n"
    assert slurm.usable_nodes("gpu") == {"n1", "n2", "n5"}


def test_thousands_of_names_are_asked_for_in_batches(monkeypatch: pytest.MonkeyPatch):
    """The kernel refuses an argument of more than 128 KiB."""
    asked: list[str] = []

    def run(*words: str) -> str:
        assert all(len(word) < 100_000 for word in words)
        asked.extend(word for line in words for word in line.split(",") if "jepa." in word)
        return ""

    monkeypatch.setattr(slurm, "run_program", run)
    monkeypatch.setattr(slurm.shutil, "which", lambda name: name)  # pyright: ignore
    names = [f"jepa.{'a-long-name-of-a-sweep' * 8}.A.{number:08x}" for number in range(5000)]
    assert slurm.squeue(names) == slurm.sacct(names, "now") == []
    slurm.signal(names)
    assert asked == names * 3


def test_jobs_of_all_users_and_partitions_are_asked_for(monkeypatch: pytest.MonkeyPatch):
    """Without -a sacct answers a colleague with nothing: a running trial would start twice."""
    asked: list[tuple[str, ...]] = []

    def run(*words: str) -> str:
        asked.append(words)
        return ""

    monkeypatch.setattr(slurm, "run_program", run)
    monkeypatch.setattr(slurm.shutil, "which", lambda name: name)  # pyright: ignore
    slurm.squeue(["a"])
    slurm.sacct(["a"], "now")
    assert [words[0] for words in asked] == ["squeue", "sacct"]
    assert all("-a" in words for words in asked)


def test_an_sbatch_that_waits_for_a_full_queue_is_no_silent_controller(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """It retries for two minutes after this message."""
    sbatch = tmp_path / "sbatch"
    text = "Slurm temporarily unable to accept job, sleeping and retrying"
    sbatch.write_text(f"#!/bin/sh\necho 'sbatch: error: {text}' >&2\nexec sleep 60\n")
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(slurm, "TIMEOUT", 0.5)
    with pytest.raises(QueueFull, match="MaxJobCount"):
        slurm.run_program("sbatch")


@pytest.mark.parametrize("zone", ["UTC", "Europe/Berlin"])
def test_accounting_is_asked_from_a_day_before_the_submission(
    zone: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Clocks may be apart, and an hour is repeated when summer time ends."""
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        repeated = calendar.timegm((2026, 10, 25, 1, 30, 0)) * 1000
        arrays: list[Any] = [{"submitted": repeated}, {"submitted": repeated + 5}]
        first: list[Any] = [{"submitted": 0}]
        assert array_records.before_submission(arrays)[:10] == "2026-10-24"
        assert array_records.before_submission(first)[:4] in ("1969", "1970")
    finally:
        monkeypatch.undo()
        time.tzset()

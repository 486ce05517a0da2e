"""How rows of squeue and sacct are read. Slurm itself: tests/slurm."""

from pathlib import Path

import pytest

from jepa_cluster.errors import LaunchError, QueueFull, SchedulerDown
from jepa_cluster.launch.scheduler import facts, slurm
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
        "7_1|jepa.x.A.1|PENDING|Dependency|||afterok:5(unfulfilled)\n"
        "8|jepa.x.B.2|RUNNING|None|n1|2026-03-01T03:40:00|(null)\n7_2|jepa\n"
    )
    first, second = slurm.squeue(["jepa.x.A.1"])
    assert first.id == "7_1"
    assert first.index == 1
    assert first.dependency == "afterok:5(unfulfilled)"
    assert second.id == "8"
    assert second.index is None
    assert second.node == "n1"
    assert slurm.squeue([]) == []


def test_a_row_of_sacct_has_seconds_and_a_waiting_array_is_left_out(answers: dict[str, str]):
    assert slurm.sacct(["a"], "2026-03-01") is None, "without accounting"
    answers["sacct"] = (
        "7_0|a|CANCELLED by 1000|None|n1|2026-03-01T03:40:00|90\n"
        "7_[1-3]|a|PENDING|None||Unknown|0\n7_4|a|RUNNING|None|n1|Unknown|\n"
    )
    (task,) = slurm.sacct(["a"], "2026-03-01") or []
    assert task.id == "7_0"
    assert task.state == "CANCELLED by 1000"
    assert task.seconds == 90


@pytest.mark.parametrize(
    ("state", "reason", "expected"),
    [
        ("RUNNING", "None", "running"),
        ("COMPLETING", "None", "running"),
        ("PENDING", "Resources", "queued"),
        ("PENDING", "BeginTime", "requeued"),
        ("REQUEUE_HOLD", "(launch failed requeued held)", "queued"),
        ("COMPLETED", "None", None),
        ("CANCELLED", "None", None),
    ],
)
def test_a_task_is_queued_requeued_or_running_or_has_ended(
    state: str, reason: str, expected: str | None
):
    assert facts.state_of(Task("7", 0, "a", state, reason)) == expected


def test_a_reason_is_explained_and_an_unknown_one_shown_as_it_is():
    assert slurm.explain_reason("(Priority)") == "waits for its turn"
    assert slurm.explain_reason("ReqNodeNotAvail, UnavailableNodes:n1").startswith("its nodes")
    assert slurm.explain_reason("(SomethingNew)") == "(SomethingNew)"


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

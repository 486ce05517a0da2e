"""The markers and ends of attempts that only Slurm knows, and who writes them."""

import os
from pathlib import Path

import pytest
from support.slurm_rows import DOWN, Ask, begin, begin_run, run, states, task

from jepa_cluster import cli
from jepa_cluster.launch.scheduler import slurm
from jepa_cluster.launch.scheduler.slurm import Task
from jepa_cluster.launch.submit import lost_attempts
from jepa_cluster.launch.submit.end_recorder import EndRecorder
from jepa_cluster.trial import attempts, file_lock
from jepa_cluster.trial.directory import TrialDir
from jepa_cluster.trial.files import write_json


def test_what_only_slurm_knows_is_written_once(trials: list[TrialDir], ask: Ask):
    """`watch` and `submit` do it, so that it is still known when Slurm has forgotten the job."""
    begin(trials[1])
    rows = [task(0, "CANCELLED by 0"), task(1, "FAILED"), task(2, "CANCELLED")]
    assert states(ask(sacct=rows)) == ["stopped", "interrupted", "interrupted"]
    EndRecorder(trials[0].root).record(["s"])
    assert trials[0].stop.read_text() == "cancelled in Slurm by root\n"
    assert not trials[1].stop.exists()
    assert states(ask(sacct=None)) == ["stopped", "interrupted", "stopped"]


ENDS_BY_SLURM = {  # word of the run: cause and error in the record
    "NODE_FAIL": ("node", "Slurm says NODE_FAIL"),
    "OUT_OF_MEMORY": ("host_oom", "Slurm says OUT_OF_MEMORY"),
    "FAILED": ("killed", "the attempt's record has no end; Slurm says FAILED"),
    "REQUEUED": ("preempted", "Slurm says REQUEUED"),
}
NEXT_RUNS = ("PENDING", "RUNNING", "COMPLETED")


@pytest.mark.parametrize("next_run", ["", *NEXT_RUNS])
@pytest.mark.parametrize("word", ENDS_BY_SLURM)
def test_an_end_without_a_rank_left_is_written_by_what_slurm_says_of_that_run(
    trials: list[TrialDir], ask: Ask, word: str, next_run: str
):
    """Whatever became of the job. A second call changes nothing, and `status` writes nothing."""
    trial = trials[0]
    begin_run(trial, 0, 1)
    if word != "FAILED":  # of a save that failed: no reason for what Slurm has seen
        trial.logs(1).mkdir(parents=True)
        (trial.logs(1) / "rank0.err").write_text("step 5: No space left on device")
    queue = [task(index, "RUNNING") for index in (1, 2)]
    rows = [run(0, word, 1)]
    if next_run or word == "REQUEUED":
        rows.append(run(0, next_run or "PENDING", 2))
        queue.append(rows[-1])
    if next_run in ("RUNNING", "COMPLETED"):
        begin_run(trial, 0, 2, restart=1)
        trial.heartbeat.touch()
    if next_run == "COMPLETED":
        trial.end_attempt(2, {"cause": "done", "ended": 2})
        write_json(trial.done, {"step": 12})
    ask(queue, rows)
    assert "cause" not in trial.attempts()[0]
    for _ in range(2):
        EndRecorder(trial.root).record(["s"])
        record = trial.attempts()[0]
        written = (record["cause"], record["error"])
        assert written == ENDS_BY_SLURM[word]
        assert record["slurm_state"] == word
    assert trial.open_attempts() == ([2] if next_run == "RUNNING" else [])


def test_the_end_of_an_attempt_stays_open_while_a_rank_may_write_it(
    trials: list[TrialDir], ask: Ask
):
    """It runs; its node is lost, but its heart beats; sacct does not answer; it has just begun."""
    for index, trial in enumerate(trials):
        begin_run(trial, index, 1)
    trials[1].heartbeat.touch()
    begin_run(trials[2], 2, 2, restart=1)
    queue = [task(0, "RUNNING"), task(1, "PENDING"), task(2, "RUNNING")]
    rows = [run(0, "RUNNING", 1), run(1, "NODE_FAIL", 1), run(1, "PENDING", 2)]
    rows.append(run(2, "NODE_FAIL", 1))
    for sacct in (DOWN, rows):
        ask(queue, sacct)
        EndRecorder(trials[0].root).record(["s"])
        assert [trial.open_attempts()[:2] for trial in trials[:2]] == [[1], [1]]
        assert trials[2].open_attempts() == ([1, 2] if sacct is DOWN else [2])
    os.utime(trials[1].heartbeat, (0, 0))
    EndRecorder(trials[0].root).record(["s"])
    assert trials[1].attempts()[0]["cause"] == "node"
    before = ask(queue, None)[0]
    begin_run(trials[0], 0, 2, restart=1)
    lost_attempts.write_ends(trials[0].root, {trials[0].name: before})
    assert 2 in trials[0].open_attempts()


def test_the_end_of_an_attempt_is_that_of_its_own_run_when_slurm_has_purged_earlier_ones(
    trials: list[TrialDir], ask: Ask
):
    """The row of the first run is gone; the third one runs."""
    for restart in range(3):
        begin_run(trials[0], 0, 1 + restart, restart)
    ask([task(0, "RUNNING")], [run(0, "OUT_OF_MEMORY", 2), run(0, "RUNNING", 3)])
    EndRecorder(trials[0].root).record(["s"])
    causes = [record.get("cause") for record in trials[0].attempts()]
    assert causes == ["unknown", "host_oom", None]


def test_a_trial_that_is_known_to_be_closed_costs_no_listing_and_an_undecided_one_no_lock(
    trials: list[TrialDir], ask: Ask, monkeypatch: pytest.MonkeyPatch
):
    """Also after a resume: then the marker is another one."""
    done, undecided, stopped = trials
    for index, trial in enumerate(trials):
        begin_run(trial, index, 1)
        if trial is not undecided:
            trial.end_attempt(1, {"cause": "done", "ended": 2})
    write_json(done.done, {"step": 12})
    stopped.stop.touch()
    undecided.heartbeat.touch()
    ask([task(1, "PENDING")], [run(1, "NODE_FAIL", 1), run(1, "PENDING", 2)])
    listed: list[Path] = []
    locked: list[Path] = []
    names_in, acquire = attempts.names_in, file_lock.acquire

    def list_names(folder: Path) -> list[str]:
        listed.append(folder.parent)
        return names_in(folder)

    def lock(path: Path, timeout: float) -> object:
        locked.append(path)
        return acquire(path, timeout)

    monkeypatch.setattr(attempts, "names_in", list_names)
    monkeypatch.setattr(file_lock, "acquire", lock)
    recorder = EndRecorder(done.root)
    recorder.record(["s"])
    assert {done.path, stopped.path} <= set(listed)
    listed.clear()
    recorder.record(["s"])
    assert set(listed) == {undecided.path}
    assert not locked
    stopped.stop.unlink()
    begin_run(stopped, 2, 2, restart=1)
    stopped.stop.touch()
    os.utime(stopped.stop, (5, 5))
    os.utime(undecided.heartbeat, (0, 0))
    rows = [run(1, "NODE_FAIL", 1), run(2, "TIMEOUT", 1), run(2, "OUT_OF_MEMORY", 2)]
    ask([task(1, "PENDING")], rows)
    recorder.record(["s"])
    assert len(locked) == 1
    assert undecided.attempts()[0].get("cause") == "node"
    assert stopped.attempts()[1].get("cause") == "host_oom"


def test_ends_in_folders_of_another_user_take_no_lock(
    trials: list[TrialDir], ask: Ask, monkeypatch: pytest.MonkeyPatch
):
    """They stay open, at each poll."""
    begin_run(trials[0], 0, 1)
    ask([task(1, "RUNNING")], [run(0, "NODE_FAIL", 1), task(2, "CANCELLED by 0")])
    closed = {trials[0].path / "attempts", trials[2].path}
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path not in closed and access(path, mode))
    locked: list[Path] = []
    monkeypatch.setattr(file_lock, "acquire", lambda path, timeout: locked.append(path))
    EndRecorder(trials[0].root).record(["s"])
    assert not locked
    assert trials[0].open_attempts() == [1]


def test_the_run_of_an_attempt_is_counted_while_slurm_has_all_rows(
    trials: list[TrialDir], ask: Ask
):
    """The clock of the node was an hour behind. A run that has not begun has no attempt."""
    begin_run(trials[0], 0, 0, restart=0)
    begin_run(trials[0], 0, 1, restart=1)
    rows = [run(0, "OUT_OF_MEMORY", 1), run(0, "NODE_FAIL", 2), run(0, "PENDING", 3)]
    ask([rows[-1]], rows)
    EndRecorder(trials[0].root).record(["s"])
    causes = [record.get("cause") for record in trials[0].attempts()]
    assert causes == ["host_oom", "node"]


def test_a_later_run_is_not_that_of_an_attempt_whose_rows_are_purged(
    trials: list[TrialDir], ask: Ask
):
    """The run that Slurm still knows made no attempt."""
    begin_run(trials[0], 0, 0, restart=0)
    rows = [run(0, "NODE_FAIL", 20), run(0, "PENDING", 22)]
    ask([rows[-1]], rows)
    EndRecorder(trials[0].root).record(["s"])
    assert trials[0].attempts()[0].get("cause") == "unknown"


def test_without_accounting_the_end_of_an_attempt_that_another_followed_is_unknown(
    trials: list[TrialDir], ask: Ask
):
    for restart in ("0", "1"):
        begin(trials[0], kind="slurm", array_task_id="0", restart_count=restart)
    begin(trials[1], kind="slurm", array_task_id="1")
    ask([task(0, "RUNNING"), task(1, "OUT_OF_MEMORY"), task(2, "RUNNING")], None)
    EndRecorder(trials[0].root).record(["s"])
    assert [record.get("cause") for record in trials[0].attempts()] == ["unknown", None]
    assert trials[1].attempts()[0]["cause"] == "host_oom"


RESULTS = (
    "export s",
    "report s",
    "scaling s --offline",
    "scaling next s --gpu-hours 1",
    "sync s",
)


@pytest.mark.usefixtures("ask")
@pytest.mark.parametrize("command", RESULTS)
def test_every_results_command_asks_slurm_once_and_records_ends(
    trials: list[TrialDir], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: str
):
    asked: list[object] = []

    def squeue(names: object) -> list[Task]:
        asked.append(names)
        return [task(0, state), task(1, "RUNNING"), task(2, "RUNNING")]

    monkeypatch.setattr(slurm, "squeue", squeue)
    monkeypatch.setattr(slurm, "sacct", lambda *_: [])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)
    words = [*command.split(), "--root", str(trials[0].root.path)]
    state = "RUNNING"
    cli.main(words)
    assert len(asked) == 1
    state = "CANCELLED"
    cli.main(words)
    assert trials[0].stop.exists()

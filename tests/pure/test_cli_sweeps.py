"""The commands on a sweep: plan, submit, status, why, logs and export."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from support.submitted_sweep import SWEEP, Submitted

from jepa_cluster import cli
from jepa_cluster.cli import terminal
from jepa_cluster.launch.cluster import profile
from jepa_cluster.launch.scheduler import local, slurm
from jepa_cluster.launch.submit import documents, plan, quota
from jepa_cluster.records import QueueEntry
from jepa_cluster.results import tables
from jepa_cluster.trial.directory import Root, TrialDir
from jepa_cluster.trial.files import user_name, write_json
from jepa_cluster.trial.spool import now_ms
from jepa_cluster.trial.usage import process_seconds

Document = Callable[..., Any]
Capture = pytest.CaptureFixture[str]


def test_plan_changes_no_file_and_exits_with_3_if_there_is_work(folder: Path, capsys: Capture):
    before = sorted(folder.rglob("*"))
    assert cli.main(["plan", "ask.yaml", "--points"]) == 3
    out = capsys.readouterr().out
    assert "4 trials: 4 new" in out
    assert "4/4 configs valid" in out
    assert "FLOPs at 30% MFU" in out
    assert sorted(folder.rglob("*")) == before


def test_plan_and_submit_take_a_selection_of_the_trials(
    folder: Path,
    document: Document,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The plan has all trials. A later submit starts those that were left alone."""
    monkeypatch.setattr(local, "enqueue", lambda root, entries, *_: queued.extend(entries))
    queued: list[QueueEntry] = []
    some = document("plan", "ask.yaml", "targets=2", "model=vit_s")
    assert (some["actions"]["new"], some["actions"]["left alone"]) == (1, 3)
    assert some["gpu_hours"] < document("plan", "ask.yaml")["gpu_hours"]
    cli.main(["submit", "ask.yaml", "targets=2", "model=vit_s", "--yes"])
    assert [entry["trial"][:16] for entry in queued] == ["vit_s-targets2-s"]
    assert len(Root(folder / "root").sweep("ask").planned()) == 4
    cli.main(["submit", "ask", "targets=4", "--yes"])
    assert len({entry["trial"] for entry in queued}) == 3
    assert cli.main(["plan", "ask.yaml", "targets=3"]) == 78


def test_submit_refuses_a_plan_over_its_limit(folder: Path, capsys: Capture):
    """The error has the line of the limit, and nothing starts."""
    (folder / "ask.yaml").write_text(SWEEP.replace("gpu_hours: 100", "gpu_hours: 0.001"))
    assert cli.main(["submit", "ask.yaml", "--yes"]) == 78
    assert "ask.yaml:9" in capsys.readouterr().err
    assert not (folder / "root" / "sweeps").exists()


def test_plan_says_that_submit_will_refuse_a_plan_over_its_limit(folder: Path, capsys: Capture):
    """A machine without GPUs costs no GPU-hours."""
    (folder / "ask.yaml").write_text(SWEEP.replace("gpu_hours: 100", "gpu_hours: 0.001"))
    assert cli.main(["plan", "ask.yaml"]) == 3
    out = capsys.readouterr().out
    assert "of 0.001 process-h (over the limit: submit will refuse)" in out
    assert "GPU-h" not in out


def test_plan_refuses_masks_that_cannot_leave_k_patches(folder: Path, capsys: Capture):
    sweep = SWEEP.replace("model.depth=2]", "model.depth=2, mask.context_keep=35]")
    (folder / "ask.yaml").write_text(sweep)
    assert cli.main(["plan", "ask.yaml", "--root", str(folder / "root")]) != 0
    assert "mask.context_keep=35: only" in capsys.readouterr().err


def test_submit_starts_nothing_without_a_confirmation(folder: Path, capsys: Capture):
    """There is no terminal and no --yes."""
    assert cli.main(["submit", "ask.yaml"]) == 78
    assert "add --yes" in capsys.readouterr().err
    assert not (folder / "root" / "trials").exists()


def run_attempt(trial: TrialDir, cause: str, error: str = "") -> None:
    """Write an attempt of an hour up to step 7, whose last line of metrics is torn."""
    begun = {
        "launch": "x",
        "world": 2,
        "host": "n1",
        "started": 0,
        "start_step": 0,
    }
    ended = {
        "ended": 3_600_000,
        "end_step": 7,
        "cause": cause,
        "error": error,
    }
    number = trial.claim(begun)
    trial.amend(number, ended)
    lines = '{"settled":-1}\n{"step":7,"t":1,"loss":0.5}\n{"step":8,"t":1,"lo'
    trial.metrics(number).write_text(lines)


def fail(trial: TrialDir, error: str) -> None:
    failure = {
        "cause": "error",
        "error": error,
        "attempt": 1,
        "t": 1,
    }
    write_json(trial.failed, failure)


@pytest.fixture
def ended(submitted: Submitted) -> Submitted:
    """Let one trial be done, one failed, one stopped; the fourth is new."""
    done, failed, stopped, _ = submitted.trials
    run_attempt(done, "done")
    write_json(done.done, {"step": 40, "t": 1, "metrics": {"probe/class_error": 0.25}})
    run_attempt(failed, "error", "CUDA out of memory")
    fail(failed, "CUDA out of memory")
    run_attempt(stopped, "preempted")
    stopped.stop.touch()
    return submitted


@pytest.mark.usefixtures("ended")
def test_status_shows_state_step_metrics_and_hours_from_the_files(document: Document):
    done, failed, stopped, new = document("status", "ask")["trials"]
    assert done["state"] == "done"
    assert done["step"] == 40
    assert done["probe"] == 0.25
    assert failed["state"] == "failed"
    assert failed["step"] == 7
    assert failed["loss"] == 0.5
    assert failed["gpu_hours"] == 2.0
    assert stopped["state"] == "stopped"
    assert stopped["step"] == 7
    assert new["state"] == "new"
    assert new["step"] == 0


@pytest.mark.usefixtures("ended")
def test_why_shows_the_cause_and_the_next_command(document: Document, capsys: Capture):
    (why,) = document("why", "ask", "state=failed")
    assert why["cause"] == "gpu_oom"
    assert why["hint"].startswith("jepa retry ask 1")
    assert cli.main(["why", "ask"]) == 0
    assert "CUDA out of memory" in capsys.readouterr().out


@pytest.mark.usefixtures("ended")
def test_status_without_a_sweep_counts_the_states_of_all_sweeps(capsys: Capture):
    assert cli.main(["status"]) == 0
    assert "1 new · 1 stopped · 1 failed · 1 done" in capsys.readouterr().out


@pytest.mark.usefixtures("ended")
def test_plan_takes_the_name_of_a_submitted_sweep():
    """One trial is new."""
    assert cli.main(["plan", "ask"]) == 3


def write_open_attempts(trial: TrialDir) -> None:
    """Write two attempts of two ranks without an end: one began 2 hours ago, one an hour ago.

    The last row of the first is half an hour younger than its begin.
    """
    for hours in (2, 1):
        started = now_ms() - hours * 3_600_000
        number = trial.claim({"launch": "x", "world": 2, "started": started})
        trial.metrics(number).touch()
    os.utime(trial.metrics(1), (0, time.time() - 5_400))


def test_status_counts_running_attempts_and_shows_why_a_trial_is_stopped(
    submitted: Submitted, document: Document, capsys: Capture, monkeypatch: pytest.MonkeyPatch
):
    """The last attempt of a running trial counts up to now."""
    running, stopped, starting, _ = submitted.trials
    write_open_attempts(running)
    stopped.stop.write_text("stopped by jepa cancel\n")
    task = local.QueuedTrial("running")
    queue = {running.name: task, starting.name: task}
    monkeypatch.setattr(local, "list_trials", lambda root: queue)

    seconds = process_seconds(running, running.attempts(), running=True)
    assert round(seconds) == 2 * (1_800 + 3_600)
    status = document("status", "ask")
    rows = status["trials"]
    assert round(rows[0]["gpu_hours"], 2) == 3.0
    assert rows[1]["note"].startswith("stopped by jepa cancel, ")
    assert status["stopped_cost"] > 0
    assert rows[2]["note"] == "starting"
    assert cli.main(["logs", "ask", "0"]) == 0
    assert "rank 0 of attempt 2 wrote nothing" in capsys.readouterr().out


def test_an_attempt_that_was_killed_counts_up_to_its_last_row(submitted: Submitted):
    """Tables and `jepa status` have the same hours."""
    trial = submitted.trials[0]
    write_open_attempts(trial)
    os.utime(trial.metrics(2), (0, time.time() - 900))
    assert round(process_seconds(trial, trial.attempts())) == 2 * (1_800 + 2_700)
    results = tables.load(submitted.root, "ask")
    assert round(results.trials[0].gpu_hours, 2) == 2.5


def test_a_submitted_sweep_keeps_its_profile_in_a_shell_that_names_none(
    submitted: Submitted, folder: Path, document: Document, monkeypatch: pytest.MonkeyPatch
):
    """By its name or its file, so that a login node does not train what belongs on a cluster."""
    mine = folder / "mine.yaml"
    mine.write_text("kind: slurm\nprocs_per_node: 2\ntime: 1h\npeak_tflops: 1\n")
    plan = submitted.root.sweep("ask").plan
    write_json(plan, {**json.loads(plan.read_text()), "profile": str(mine)})
    for sweep in ("ask", "ask.yaml"):
        assert document("plan", sweep)["kind"] == "slurm"
    assert document("plan", "ask.yaml", "--cluster", "local")["kind"] == "local"
    monkeypatch.setenv("JEPA_CLUSTER", "local")
    assert document("plan", "ask")["kind"] == "slurm"
    assert document("plan", "ask.yaml")["kind"] == "local"


def test_a_cancelled_trial_names_the_user_who_cancelled_it(
    submitted: Submitted, document: Document
):
    document("cancel", "ask", "2", "--yes")
    note = document("status", "ask")["trials"][2]["note"]
    assert note.startswith(f"stopped by {user_name(os.getuid())} (jepa cancel), ")


def test_why_shows_trials_with_the_same_cause_together(submitted: Submitted, capsys: Capture):
    """One command retries all of them."""
    for trial in submitted.trials[1:]:
        fail(trial, "a bug")
    assert cli.main(["why", "ask"]) == 0
    out = capsys.readouterr().out
    assert "3 trials: 1 2 3  failed" in out
    assert out.count("a bug") == 1
    assert "jepa retry ask 1 2 3" in out
    assert "0 vit_ti targets=2 s0  new" in out


@pytest.fixture
def logged(submitted: Submitted) -> TrialDir:
    """Let rank 0 of trial 2 have a log of two lines."""
    trial = submitted.trials[2]
    number = trial.claim({"launch": "x", "world": 1, "started": 0})
    logs = trial.logs(number)
    logs.mkdir(parents=True)
    (logs / "rank0.out").write_text("one\ntwo\n")
    return trial


def test_logs_prints_the_last_lines_of_each_file(logged: TrialDir, document: Document):
    found = document("logs", "ask", "2", "-n", "1")
    assert list(found["files"].values()) == [["two"]]
    assert found["attempt"] == logged.newest_attempt()


@pytest.mark.usefixtures("logged")
def test_logs_that_are_followed_have_no_document(capsys: Capture):
    assert cli.main(["logs", "ask", "2", "--json", "--follow"]) == 78
    assert "no end" in capsys.readouterr().err


@pytest.mark.usefixtures("submitted")
def test_export_writes_the_table_to_a_file_or_to_stdout(folder: Path, capsys: Capture):
    assert cli.main(["export", "ask", "--out", "t.csv"]) == 0
    assert capsys.readouterr().out == "4 rows -> t.csv\n"
    assert cli.main(["export", "ask"]) == 0
    assert capsys.readouterr().out == (folder / "t.csv").read_text()


def test_plan_says_that_a_save_does_not_fit_into_the_grace_time(
    submitted: Submitted, capsys: Capture
):
    """The attempt that measured it still runs."""
    trial = submitted.trials[0]
    runtime = trial.read_config().runtime
    world = runtime.nodes * runtime.procs_per_node
    number = trial.claim({"started": 1, "world": world})
    trial.amend(number, {"start_step": 0, "save_seconds": 60.0})
    cli.main(["plan", "ask.yaml"])
    assert "a save took" not in capsys.readouterr().out
    trial.amend(number, {"save_seconds": 95.0})
    cli.main(["plan", "ask.yaml"])
    out = " ".join(capsys.readouterr().out.split())
    assert out.count("a save took 95 s, a preempted job has 60 s (runtime.grace_seconds)") == 1
    assert "lower runtime.checkpoint_minutes" in out


PARTITION = "PartitionName=low Default=YES GraceTime=20 Hidden=NO PreemptMode=REQUEUE"
CONFIG = "PreemptType = preempt/partition_prio\nKillWait = 10 sec"


def test_plan_compares_a_save_with_the_grace_time_of_slurm(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    """A trial counts on 60 s, the partition gives 20. One class has been measured."""
    (folder / "mine.yaml").write_text("{kind: slurm, partition: low, time: 1h}")
    answers = {"partition": PARTITION, "config": CONFIG}
    monkeypatch.setattr(slurm, "run_program", lambda *words: answers.get(words[2], ""))
    monkeypatch.setattr(slurm, "estimated_start", lambda options: "")
    root = Root(folder / "root")
    sweep = documents.find_sweep(root, "ask.yaml")
    made = plan.make_plan(sweep, profile.load_profile(folder / "mine.yaml"), root)
    measured = next(name for name in made.trials if name.startswith("vit_s"))
    trial = root.trial(measured)
    trial.create(made.trials[measured].config)
    trial.amend(trial.claim({"started": 1, "world": 1}), {"save_seconds": 21.5})
    made = plan.make_plan(sweep, made.profile, root)
    text = printed(documents.plan_document(made))
    words = "a preempted job has 20 s (GraceTime of partition low)"
    assert f"no save of class A was measured, {words}" in text
    assert f"! class B: a save took 21.5 s, {words}: unsaved work is lost" in text


def test_plan_shows_the_checkpoints_of_the_sweep_beside_disk_and_quota(
    submitted: Submitted, monkeypatch: pytest.MonkeyPatch
):
    """Each of four trials keeps as many as runtime.keep_checkpoints."""
    monkeypatch.setattr(quota, "bytes_left", lambda folder: 3_000_000)
    kept = submitted.trials[0].read_config().runtime.keep_checkpoints
    sweep = documents.find_sweep(submitted.root, "ask")
    made = plan.make_plan(sweep, profile.load_profile(), submitted.root)
    text = printed(documents.plan_document(made))
    assert f"at most {4 * kept} checkpoints kept, " in text
    assert "free, quota leaves 3 MB" in text
    monkeypatch.setattr(quota, "bytes_left", lambda folder: None)
    assert "quota" not in printed(documents.plan_document(made))


def printed(document: Any) -> str:
    """Return the text of a plan, as one line."""
    console = Console(width=400, file=io.StringIO())
    console.print(terminal.plan(document))
    return " ".join(console.file.getvalue().split())


def test_plan_says_that_ranks_share_blocks(folder: Path, capsys: Capture):
    """640 images are 10 blocks in 2 lanes; 4 ranks read them."""
    sweep = SWEEP.replace("optim.batch=32", "optim.batch=32, data.order=block")
    text = sweep.replace("{time: 30m}", "{procs_per_node: 4, time: 30m}")
    (folder / "ask.yaml").write_text(text)
    cli.main(["plan", "ask.yaml"])
    out = " ".join(capsys.readouterr().out.split())
    assert out.count("4 ranks read 2 blocks of images in turn") == 1


LOCK_ROOT = """
import os, sys
from pathlib import Path
from jepa_cluster.launch.submit import submit
from jepa_cluster.trial.directory import Root

if os.getuid() == 0:
    os.setuid(65534)
submit.locked(Root(Path(sys.argv[1]))).__enter__()
"""


def test_a_root_that_the_user_may_not_write_is_one_error():
    """The hint is how to share the root."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o555)
        command = [sys.executable, "-c", LOCK_ROOT, folder]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "LaunchError: you may not write below this root" in done.stderr
    assert "chmod -R g+ws" in done.stderr

"""The local launcher: a queue of files, one detached runner, real processes and real signals."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jepa_cluster.launch.scheduler import facts, local
from jepa_cluster.trial.directory import Root
from jepa_cluster.trial.files import read_json

STUB = Path(__file__).parents[1] / "support" / "stub_job.py"


@pytest.fixture
def root(tmp_path: Path):
    package = tmp_path / "code" / "stub" / "jepa_cluster"
    for folder in (package, package / "launch", package / "launch" / "worker"):
        folder.mkdir(parents=True)
        (folder / "__init__.py").touch()
    (package / "launch" / "worker" / "main.py").write_text(STUB.read_text())
    root = Root(tmp_path)
    yield root
    pids = [p for f in (root.local / "running").glob("*.json") for p, _ in (read_json(f) or {}).get("pids", [])]
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    wait(lambda: not local.list_trials(root))


def start(
    root: Root, *names: str, stub: str = "", world: int = 1, slots: int = 2, branch: Any = None, **retries: int
) -> None:
    for name in names:
        (root.trials / name / "attempts").mkdir(parents=True, exist_ok=True)
    entry = {"code": "stub", "python": sys.executable, "environment": {"STUB": stub}, "retries": retries}
    entry |= branch or {}
    local.enqueue(root, [{**entry, "trial": n, "world": world} for n in names], slots)


def wait(until: Callable[[], object], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.02)


def state(root: Root, name: str) -> str:
    return facts.query_status(root, [name]).states[name]


def runner_pids(root: Root) -> list[int]:
    done = subprocess.run(["ps", "-wweo", "pid,args"], capture_output=True, text=True, check=True)
    return [int(x.split()[0]) for x in done.stdout.splitlines() if f"scheduler.local_runner {root.path}" in x]


def test_trials_run_to_their_end_and_the_runner_leaves(root: Root):
    """Three trials of two ranks on two slots: one at a time, in order, in an environment of their own."""
    os.environ["SLURM_CPU_BIND"] = "leaked"
    try:
        start(root, "a", "b", "c", world=2)
    finally:
        del os.environ["SLURM_CPU_BIND"]
    wait(lambda: all(state(root, n) == "done" for n in "abc"))
    wait(lambda: not local.list_trials(root))
    seen = {n: json.loads((root.trials / n / "seen.jsonl").read_text()) for n in "abc"}
    ended = {n: float((root.trials / n / "ended").read_text()) for n in "abc"}
    assert seen["b"]["t"] > ended["a"] and seen["c"]["t"] > ended["b"]
    env = seen["a"]["env"]
    assert (env["RANK"], env["WORLD_SIZE"], env["LOCAL_WORLD_SIZE"], env["MASTER_ADDR"]) == ("0", "2", "2", "127.0.0.1")
    assert "SLURM_CPU_BIND" not in env and seen["a"]["cwd"] == str(root.code / "stub")
    wait(lambda: not runner_pids(root))


def test_a_requeued_trial_saves_itself_and_comes_back_before_the_others(root: Root):
    """USR2 reaches every rank; exit code 75 puts the trial at the head of the queue, free of charge."""
    start(root, "a", "b", stub="wait", world=2)
    wait(lambda: state(root, "a") == "running" and facts.query_status(root, ["a"]).trials["a"].attempts)
    assert local.signal_trials(root, ["a", "b"], signal.SIGUSR2) == ["a"]
    wait(lambda: state(root, "a") == "done")
    wait(lambda: state(root, "b") == "running" and facts.query_status(root, ["b"]).trials["b"].attempts)
    local.signal_trials(root, ["b"], signal.SIGUSR2)
    wait(lambda: state(root, "b") == "done")
    first = read_json(root.trial("a").attempt(1)) or {}
    assert first["cause"] == "preempted" and first["exit"] == 75


def test_a_killed_rank_takes_its_trial_down_once_and_it_runs_again(root: Root):
    """The signal counts, not the noise it makes in the other rank; the second attempt finishes."""
    start(root, "a", stub="kill", world=2, killed=1)
    wait(lambda: state(root, "a") == "done")
    assert (read_json(root.trial("a").attempt(1)) or {})["cause"] == "killed"


@pytest.mark.parametrize(("code", "cause"), [(1, "error"), (78, "config")])
def test_a_user_error_is_not_tried_again(root: Root, code: int, cause: str):
    """FAILED.json says why, and there was one attempt."""
    start(root, "a", stub=f"exit {code}")
    wait(lambda: state(root, "a") == "failed")
    assert (read_json(root.trial("a").failed) or {})["cause"] == cause
    assert root.trial("a").newest_attempt() == 1


def test_a_spent_budget_ends_in_failed(root: Root):
    """No endless loop over a hang."""
    start(root, "a", stub="exit 76", hang=0)
    wait(lambda: state(root, "a") == "failed")
    assert "0 tries" in (read_json(root.trial("a").failed) or {})["error"]


def test_a_killed_runner_loses_nothing(root: Root):
    """kill -9 of the runner: its trials run on, and the next runner takes note of how they end."""
    start(root, "a", "b", stub="wait", world=2)
    wait(lambda: state(root, "a") == "running" and facts.query_status(root, ["a"]).trials["a"].attempts)
    (pid,) = runner_pids(root)
    os.kill(pid, signal.SIGKILL)
    wait(lambda: not runner_pids(root))
    assert state(root, "a") == "running" and state(root, "b") == "queued"
    local.start_runner(root)
    wait(lambda: runner_pids(root))
    local.signal_trials(root, ["a"], signal.SIGUSR2)
    wait(lambda: state(root, "a") == "done")
    wait(lambda: state(root, "b") == "running" and facts.query_status(root, ["b"]).trials["b"].attempts)
    local.signal_trials(root, ["b"], signal.SIGUSR2)
    wait(lambda: state(root, "b") == "done")


def test_ending_the_runner_saves_the_trials_and_keeps_them_queued(root: Root):
    """TERM, as at a shutdown: checkpoints are asked for, entries stay."""
    start(root, "a", stub="wait", world=2)
    wait(lambda: state(root, "a") == "running" and facts.query_status(root, ["a"]).trials["a"].attempts)
    (pid,) = runner_pids(root)
    os.kill(pid, signal.SIGTERM)
    wait(lambda: not runner_pids(root))
    assert state(root, "a") == "queued"
    local.start_runner(root)
    wait(lambda: state(root, "a") == "done")


def test_a_withdrawn_or_stopped_trial_never_starts(root: Root):
    """Cancelling what waits, and STOP, both hold."""
    start(root, "a", stub="wait", slots=1)
    wait(lambda: state(root, "a") == "running" and facts.query_status(root, ["a"]).trials["a"].attempts)
    start(root, "b", "c", slots=1)
    assert local.dequeue(root, ["b"]) == ["b"]
    root.trial("c").stop.touch()
    local.signal_trials(root, ["a"], signal.SIGUSR2)
    wait(lambda: state(root, "a") == "done" and not local.list_trials(root))
    assert state(root, "b") == "new" and state(root, "c") == "stopped"
    assert not root.trial("b").newest_attempt() and not root.trial("c").newest_attempt()


def test_a_branch_waits_for_its_trunk_and_no_longer(root: Root):
    """It starts when the step at which they part is saved; without a trunk at work, at once."""
    start(root, "trunk", stub="wait", slots=2)
    start(root, "branch", "twin", branch={"trunk": "trunk", "begins": 8})
    start(root, "next")
    wait(lambda: state(root, "next") == "done")  # nobody queues behind a branch that waits
    assert state(root, "branch") == "queued" and state(root, "trunk") == "running"
    root.trial("trunk").checkpoint(8).mkdir(parents=True)
    wait(lambda: state(root, "branch") == state(root, "twin") == "done")
    assert state(root, "trunk") == "running"
    local.signal_trials(root, ["trunk"], signal.SIGUSR2)
    start(root, "late", branch={"trunk": "nobody", "begins": 8})
    wait(lambda: state(root, "trunk") == state(root, "late") == "done")


def test_what_waits_for_a_canary_starts_when_that_has_succeeded_and_not_before(root: Root):
    """The runner releases it; with a canary that fails it stays, and the runner leaves."""
    shared = {"code": "stub", "python": sys.executable, "retries": {}, "world": 1}
    for canary, words, name in (("canary.x.A.1", "stop_after", "a"), ("canary.x.B.2", "exit 1", "b")):
        for path in (root.trial(canary).path, root.trial(name).path):
            (path / "attempts").mkdir(parents=True)
        root.trial(canary).canary.write_text("{}")
        entries = [{**shared, "trial": canary, "environment": {"STUB": words}}]
        local.enqueue(root, [*entries, {**shared, "trial": name, "environment": {}, "after": canary}], 2)
    seen = facts.query_status(root, ["a", "b"])
    assert {s.canary for s in seen.trials.values()} >= {"canary.x.B.2"}
    wait(lambda: state(root, "a") == "done")
    (attempt,) = root.trial("canary.x.A.1").attempts()
    assert facts.query_status(root, ["canary.x.A.1"]).trials["canary.x.A.1"].state == "done"
    assert (attempt["cause"], attempt["exit"]) == ("stopped", 0)
    started = json.loads((root.trial("a").path / "seen.jsonl").read_text())["t"]
    assert started > (root.trial("canary.x.A.1").path / "ended").stat().st_mtime
    wait(lambda: root.trial("canary.x.B.2").failed.exists() and not runner_pids(root))
    held = facts.query_status(root, ["b"]).trials["b"]
    assert held.state == "queued" and held.note.startswith("held: its canary failed")
    assert local.dequeue(root, ["b"]) == ["b"]
    start(root, "b")
    wait(lambda: state(root, "b") == "done")

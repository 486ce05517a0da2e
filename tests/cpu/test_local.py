"""The local launcher: a queue of files, one detached runner, real processes and real signals."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.fake_trials import config

from jepa_cluster.errors import ExitCode, LaunchError
from jepa_cluster.launch.ops import single_trial
from jepa_cluster.launch.scheduler import facts, local
from jepa_cluster.launch.scheduler.fork_server import ForkServer
from jepa_cluster.launch.submit import code_snapshot
from jepa_cluster.trial.directory import Root, TrialDir
from jepa_cluster.trial.files import read_json, write_json

STUB = Path(__file__).parents[1] / "support" / "stub_job.py"


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Root]:
    """A root whose code is a package with a stub of the job; kills the ranks that are left."""
    package = tmp_path / "code" / "stub" / "jepa_cluster"
    for folder in (package, package / "launch", package / "launch" / "worker"):
        folder.mkdir(parents=True)
        (folder / "__init__.py").touch()
    (package / "launch" / "worker" / "main.py").write_text(STUB.read_text())
    root = Root(tmp_path)
    yield root
    for entry in (root.local / "running").glob("*.json"):
        for pid, _ in (read_json(entry) or {}).get("pids", []):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
    wait(lambda: not local.list_trials(root))


def start(
    root: Root,
    *names: str,
    stub: str = "",
    world: int = 1,
    slots: int = 2,
    branch: Any = None,
    **retries: int,
) -> None:
    """Enqueue trials whose ranks do what `stub` says."""
    entries = []
    for name in names:
        (root.trials / name / "attempts").mkdir(parents=True, exist_ok=True)
        entry = {
            "code": "stub",
            "python": sys.executable,
            "environment": {"STUB": stub},
            "retries": retries,
            "trial": name,
            "world": world,
        }
        entries.append(entry | (branch or {}))
    local.enqueue(root, entries, slots)


def wait(until: Callable[[], object], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.02)


def state(root: Root, name: str) -> str:
    return facts.query_status(root, [name]).states[name]


def wait_for_state(root: Root, wanted: str, *names: str) -> None:
    for name in names:
        wait(lambda name=name: state(root, name) == wanted)


def wait_for_attempt(root: Root, name: str) -> None:
    """Wait until the trial runs and its rank 0 has opened an attempt."""

    def running() -> bool:
        status = facts.query_status(root, [name])
        return status.states[name] == "running" and bool(status.trials[name].attempts)

    wait(running)


def finish(root: Root, name: str) -> None:
    """Signal the trial's ranks, which then save and end."""
    local.signal_trials(root, [name], signal.SIGUSR2)
    wait_for_state(root, "done", name)


def runner_pids(root: Root) -> list[int]:
    done = subprocess.run(["ps", "-wweo", "pid,args"], capture_output=True, text=True, check=True)
    runner = f"scheduler.local_runner {root.path}"
    lines = [line for line in done.stdout.splitlines() if runner in line]
    return [int(line.split()[0]) for line in lines]


def signal_runner(root: Root, number: signal.Signals) -> None:
    (pid,) = runner_pids(root)
    os.kill(pid, number)
    wait(lambda: not runner_pids(root))


def seen_by(root: Root, name: str) -> dict[str, Any]:
    """Return the start time, folder and environment that the stub's rank 0 had."""
    return json.loads((root.trials / name / "seen.jsonl").read_text())


def test_trials_run_to_their_end_and_the_runner_leaves(root: Root):
    """Three trials of two ranks on two slots run one at a time, in a clean environment."""
    os.environ["SLURM_CPU_BIND"] = "leaked"
    try:
        start(root, "a", "b", "c", world=2)
    finally:
        del os.environ["SLURM_CPU_BIND"]
    wait_for_state(root, "done", "a", "b", "c")
    wait(lambda: not local.list_trials(root))
    for first, second in (("a", "b"), ("b", "c")):
        ended = float((root.trials / first / "ended").read_text())
        assert seen_by(root, second)["t"] > ended
    seen = seen_by(root, "a")
    environment = seen["env"]
    assert environment["RANK"] == "0"
    assert environment["WORLD_SIZE"] == "2"
    assert environment["LOCAL_WORLD_SIZE"] == "2"
    assert environment["MASTER_ADDR"] == "127.0.0.1"
    assert "SLURM_CPU_BIND" not in environment
    assert seen["cwd"] == str(root.code / "stub")
    wait(lambda: not runner_pids(root))


def test_a_requeued_trial_saves_itself_and_comes_back_before_the_others(root: Root):
    """USR2 reaches every rank; exit code 75 puts the trial at the head of the queue."""
    start(root, "a", "b", stub="wait", world=2)
    wait_for_attempt(root, "a")
    assert local.signal_trials(root, ["a", "b"], signal.SIGUSR2) == ["a"]
    wait_for_state(root, "done", "a")
    wait_for_attempt(root, "b")
    finish(root, "b")
    first = root.trial("a").read_attempt(1)
    assert first.get("cause") == "preempted"
    assert first.get("exit") == 75


def test_a_killed_rank_ends_its_trial_once_and_it_runs_again(root: Root):
    """The signal is the cause, not the error in the other rank; the second attempt finishes."""
    start(root, "a", stub="kill", world=2, killed=1)
    wait_for_state(root, "done", "a")
    first = root.trial("a").read_attempt(1)
    assert first.get("cause") == "killed"


@pytest.mark.parametrize(("code", "cause"), [(1, "error"), (78, "config")])
def test_a_user_error_is_not_tried_again(root: Root, code: int, cause: str):
    """FAILED.json has the cause, and there was one attempt."""
    start(root, "a", stub=f"exit {code}")
    wait_for_state(root, "failed", "a")
    failure = read_json(root.trial("a").failed) or {}
    assert failure["cause"] == cause
    assert root.trial("a").newest_attempt() == 1


def test_a_spent_budget_ends_in_failed(root: Root):
    """A trial that hangs is not started again without end."""
    start(root, "a", stub="exit 76", hang=0)
    wait_for_state(root, "failed", "a")
    failure = read_json(root.trial("a").failed) or {}
    assert "0 tries" in failure["error"]


def test_a_trial_that_cannot_be_claimed_fails_with_its_reason(root: Root):
    """The ranks end without an attempt, and the next starts do, too."""
    start(root, "a", stub="no_claim", node=1)
    wait_for_state(root, "failed", "a")
    failure = read_json(root.trial("a").failed) or {}
    assert failure["cause"] == "infrastructure"
    assert "Disk quota exceeded (1 tries used)" in failure["error"]


def test_a_killed_runner_loses_nothing(root: Root):
    """After kill -9 of the runner its trials run on, and the next runner records their ends."""
    start(root, "a", "b", stub="wait", world=2)
    wait_for_attempt(root, "a")
    signal_runner(root, signal.SIGKILL)
    assert state(root, "a") == "running"
    assert state(root, "b") == "queued"
    local.start_runner(root)
    wait(lambda: runner_pids(root))
    finish(root, "a")
    wait_for_attempt(root, "b")
    finish(root, "b")


def test_a_runner_killed_between_two_ranks_leaves_no_half_started_trial(root: Root):
    """The next runner ends the rank that waits for the other one, and starts both."""
    alone = subprocess.Popen(["sleep", "600"], start_new_session=True)
    (root.trials / "a" / "attempts").mkdir(parents=True)
    entry = {
        "code": "stub",
        "python": sys.executable,
        "environment": {},
        "retries": {},
        "trial": "a",
        "world": 2,
        "launch": "local-earlier",
        "pids": [[alone.pid, local.start_time(alone.pid)]],
    }
    local.create_folders(root)
    write_json(root.local / "machine.json", {"slots": 2})
    write_json(root.local / "running" / "a.json", entry)
    local.start_runner(root)
    assert alone.wait(20) == -signal.SIGKILL
    wait_for_state(root, "done", "a")


def test_ending_the_runner_saves_the_trials_and_keeps_them_queued(root: Root):
    """After TERM, as at a shutdown, trials save a checkpoint and entries stay."""
    start(root, "a", stub="wait", world=2)
    wait_for_attempt(root, "a")
    signal_runner(root, signal.SIGTERM)
    assert state(root, "a") == "queued"
    local.start_runner(root)
    wait_for_state(root, "done", "a")


def test_ending_the_runner_saves_the_trials_while_another_one_starts(root: Root):
    """A server that imports torch for long does not delay the signal to the trials that run."""
    start(root, "a", stub="wait")
    wait_for_attempt(root, "a")
    python = root.path / "slow-python"
    python.write_text(
        f"#!/bin/sh\nuntil [ -e {root.path}/go ]; do sleep 0.1; done\nexec {sys.executable} $*\n"
    )
    python.chmod(0o755)
    start(root, "b", branch={"python": str(python)})
    wait((root.local / "running" / "b.json").exists)
    entry = read_json(root.local / "running" / "a.json") or {}
    ((pid, _),) = entry["pids"]
    wait(lambda: len(runner_pids(root)) == 1)  # another one leaves at once
    os.kill(runner_pids(root)[0], signal.SIGTERM)
    wait(lambda: not Path(f"/proc/{pid}").exists())
    (root.path / "go").touch()
    wait(lambda: not runner_pids(root))
    assert state(root, "a") == "queued"
    local.start_runner(root)
    wait_for_state(root, "done", "a", "b")


def test_a_server_that_prints_something_else_is_an_error_and_no_hang(tmp_path: Path):
    """The reader of its replies ends, and so does the wait for the process id."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho hello\ncat >/dev/null\n")
    python.chmod(0o755)
    server = ForkServer(str(python), tmp_path, {})
    with pytest.raises(LaunchError, match="has ended"):
        server.spawn(tmp_path, {}, tmp_path / "log")
    wait(lambda: not server.alive)
    server.close()


def test_a_withdrawn_or_stopped_trial_never_starts(root: Root):
    """A trial that was removed from the queue and one with a STOP file have no attempt."""
    start(root, "a", stub="wait", slots=1)
    wait_for_attempt(root, "a")
    start(root, "b", "c", slots=1)
    assert local.dequeue(root, ["b"]) == ["b"]
    root.trial("c").stop.touch()
    finish(root, "a")
    wait(lambda: not local.list_trials(root))
    assert state(root, "b") == "new"
    assert state(root, "c") == "stopped"
    assert not root.trial("b").newest_attempt()
    assert not root.trial("c").newest_attempt()


def test_a_branch_waits_for_its_trunk_and_no_longer(root: Root):
    """It starts when its first step is saved; without a running trunk, at once."""
    start(root, "trunk", stub="wait", slots=2)
    start(root, "branch", "twin", branch={"trunk": "trunk", "begins": 8})
    start(root, "next")
    wait_for_state(root, "done", "next")  # a branch that waits does not block the queue
    assert state(root, "branch") == "queued"
    assert state(root, "trunk") == "running"
    root.trial("trunk").checkpoint(8).mkdir(parents=True)
    wait_for_state(root, "done", "branch", "twin")
    assert state(root, "trunk") == "running"
    local.signal_trials(root, ["trunk"], signal.SIGUSR2)
    start(root, "late", branch={"trunk": "nobody", "begins": 8})
    wait_for_state(root, "done", "trunk", "late")


def start_behind_canary(root: Root, canary: str, stub: str, name: str) -> None:
    """Enqueue a canary that does what `stub` says, and a trial that waits for it."""
    for trial in (canary, name):
        (root.trial(trial).path / "attempts").mkdir(parents=True)
    root.trial(canary).canary.write_text("{}")
    shared = {
        "code": "stub",
        "python": sys.executable,
        "retries": {},
        "world": 1,
    }
    first = {
        **shared,
        "trial": canary,
        "environment": {"STUB": stub},
    }
    second = {
        **shared,
        "trial": name,
        "environment": {},
        "after": canary,
    }
    local.enqueue(root, [first, second], 2)


def test_a_trial_behind_a_canary_starts_only_when_that_has_succeeded(root: Root):
    """The runner releases it; behind a canary that fails it stays, and the runner leaves."""
    passes = "canary.x.A.1"
    fails = "canary.x.B.2"
    start_behind_canary(root, passes, "stop_after", "a")
    start_behind_canary(root, fails, "exit 1", "b")
    waiting = facts.query_status(root, ["a", "b"]).trials.values()
    assert fails in {trial.canary for trial in waiting}

    wait_for_state(root, "done", "a")
    (attempt,) = root.trial(passes).attempts()
    assert facts.query_status(root, [passes]).trials[passes].state == "done"
    assert attempt["cause"] == "stopped"
    assert attempt["exit"] == 0
    ended = (root.trial(passes).path / "ended").stat().st_mtime
    assert seen_by(root, "a")["t"] > ended

    wait(lambda: root.trial(fails).failed.exists())
    wait(lambda: not runner_pids(root))
    held = facts.query_status(root, ["b"]).trials["b"]
    assert held.state == "queued"
    assert held.note.startswith("held: its canary failed")
    assert local.dequeue(root, ["b"]) == ["b"]
    start(root, "b")
    wait_for_state(root, "done", "b")


@pytest.fixture
def run_attempt(
    root: Root,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[str, int], tuple[TrialDir, list[int], list[str]]]:
    """Run the ranks of `jepa train` with a stub -> the trial, their codes, and what was printed."""
    settings = config("vit_a", (0.15, 0.2), 0, 60)
    trial = root.trial_of(settings)
    trial.create(settings)
    trial.attempt(1).parent.mkdir()
    monkeypatch.setattr(single_trial, "KILL_DELAY", 0.5)
    monkeypatch.setattr(code_snapshot, "source", lambda: root.code / "stub")

    def run(stub: str, world: int) -> tuple[TrialDir, list[int], list[str]]:
        monkeypatch.setenv("STUB", stub)
        lines: list[str] = []
        with single_trial.local_launcher(world, lines.append) as launch:
            return trial, launch(trial), lines

    return run


def test_ranks_that_wait_for_a_rank_that_has_ended_are_killed(run_attempt: Any) -> None:
    """Rank 0 opened no attempt. Its reason is printed."""
    _, codes, lines = run_attempt("no_claim", 3)
    assert codes == [ExitCode.HANG] * 3
    assert lines == ["job: [Errno 122] Disk quota exceeded"]


def test_the_attempt_of_ranks_that_were_killed_gets_an_end(run_attempt: Any) -> None:
    """Rank 1 has failed; rank 0 waits for it where no signal is noticed."""
    trial, codes, lines = run_attempt("blocked", 2)
    assert codes == [ExitCode.HANG, ExitCode.ERROR]
    (attempt,) = trial.attempts()
    assert "ended" in attempt
    assert attempt["cause"] == "error"
    assert any("not UTF-8" in line for line in lines)

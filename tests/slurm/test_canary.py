"""Canaries, the limit of GPUs in flight, chained jobs and cost: stub trials and accounting."""

import json
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from processes import signal_all
from support.login_node import (
    SMALL,
    TINY,
    LoginNode,
    assert_ended,
    causes,
    every_step_once,
    orders,
    stub_sweep,
)
from testcluster import Cluster

from jepa_cluster.trial.directory import TrialDir

pytestmark = pytest.mark.timeout(900)

CLASSES = """\
seeds: [0, 1, 2, 3]
resources:
  - {when: seed > 1, nodes: 2, procs_per_node: 2, time: 10m}
  - {nodes: 1, procs_per_node: 1, time: 10m}
"""
PAIR_AND_SINGLES = """\
seeds: [0, 1, 2, 3, 4, 5, 6, 7]
resources:
  - {when: seed < 2, nodes: 2, procs_per_node: 1, time: 9m}
  - {nodes: 1, procs_per_node: 1, time: 9m}
limits: {gpus_in_flight: 4}
"""


@pytest.fixture(scope="module")
def own_cluster(slurm: None) -> Iterator[Cluster]:
    with Cluster(nodes=2, cpus=16, accounting=True) as cluster:
        yield cluster


@pytest.fixture
def login(own_cluster: Cluster, tmp_path: Path) -> Iterator[LoginNode]:
    found = LoginNode(own_cluster, tmp_path, stub=True)
    orders(found, seconds=0.1)
    yield found
    own_cluster.clean()
    found.assert_no_overlap()


def changed_profile(login: LoginNode, old: str, new: str) -> str:
    """A copy of the cluster's profile with another text -> its path."""
    profile = login.folder / "changed.yaml"
    profile.write_text(login.cluster.profile.read_text().replace(old, new))
    return str(profile)


def canary(login: LoginNode, sweep: str, letter: str) -> Any:
    """The last canary of a class, in `jepa status`."""
    canaries = login.status(sweep)["canaries"]
    return next(found for found in canaries if found["class"] == letter)


def canary_dir(login: LoginNode, sweep: str, letter: str) -> TrialDir:
    return login.root.trial(canary(login, sweep, letter)["name"])


def wait_canary(login: LoginNode, sweep: str, letter: str, state: str) -> None:
    """Wait until the canary of a class is in this state."""
    what = f"the canary of class {letter} is {state}"
    login.wait(lambda: canary(login, sweep, letter)["state"] == state, what)


def test_a_canary_that_succeeds_starts_its_class_and_one_that_fails_holds_it(
    login: LoginNode,
) -> None:
    """Two classes: the measured cost replaces the estimate, `why` shows the cause.

    retry, cancel and resume work.
    """
    orders(login, seconds=0.1, **{"2": "error"})
    login.sweep("classes", (*TINY, "optim.steps=60"), CLASSES)
    small, small_too, big, big_too = login.submit(login.folder / "classes.yaml", "--canary")
    assert len(login.arrays("classes")) == 4, "a canary and the rest, twice"
    login.wait_done([small, small_too])
    passed = canary(login, "classes", "A")
    directory = canary_dir(login, "classes", "A")
    assert passed["state"] == "done"
    assert passed["step"] == 40
    assert not directory.done.exists()
    (attempt,) = directory.attempts()
    assert attempt["cause"] == "stopped"
    assert attempt["exit"] == 0
    assert attempt["end_step"] == 40
    assert small.attempts()[0]["started"] > attempt["ended"]
    # The estimate comes from FLOPs, the measurement from the clock.
    assert 60 * 0.1 / 3600 < passed["measured_hours"] < passed["hours"]
    plan = json.loads(login.jepa("plan", "classes", "--json", check=False))
    basis = {found["class"]: found["basis"] for found in plan["classes"]}
    assert basis["A"].startswith("measured")
    wait_canary(login, "classes", "B", "failed")
    assert not big.attempts()
    assert not big_too.attempts()
    (why,) = json.loads(login.jepa("why", "classes", "seed=3", "--json"))
    assert "held" in why["means"]
    assert "a bug of the user's" in why["evidence"]
    assert "jepa retry classes" in why["hint"]
    assert "nothing to do" in login.jepa("submit", "classes", "--yes")
    login.jepa("retry", "classes", "--yes")
    login.wait(
        lambda: len(canary_dir(login, "classes", "B").attempts()) == 2,
        "the canary of B has run again",
    )
    wait_canary(login, "classes", "B", "failed")
    orders(login, seconds=0.1)
    login.jepa("cancel", "classes", "seed=3", "--yes")
    login.jepa("retry", "classes", "--yes")
    login.wait_done([big])
    assert causes(canary_dir(login, "classes", "B")) == ["error", "error", "stopped"]
    assert every_step_once(big, 60)
    assert not big_too.attempts()
    assert login.states("classes")[big_too.name] == "stopped"
    login.jepa("resume", "classes", "seed=3", "--yes")
    login.wait_done([big_too])


def test_a_later_submit_does_not_depend_on_a_canary_that_was_lost(login: LoginNode) -> None:
    """`afterok` on a failed job can never be fulfilled, so a new canary runs first."""
    orders(login, seconds=0.05, hold=5)
    body = f"seeds: [0, 1]\nresources:\n  - {SMALL}"
    file = login.sweep("lost", (*TINY, "optim.steps=60"), body)
    trials = login.submit(file, "--canary")
    directory = canary_dir(login, "lost", "A")
    login.wait_step(directory, 5)
    lost = canary(login, "lost", "A")["job"]
    signal_all(signal.SIGKILL, login.ranks(job=lost))
    wait_canary(login, "lost", "A", "interrupted")
    assert not any(trial.attempts() for trial in trials)
    login.release()
    login.jepa("retry", "lost", "--yes")
    login.wait_done(trials)
    jobs = [array["job"] for array in login.arrays("lost") if directory.name in array["trials"]]
    assert jobs[0] == lost
    assert len(jobs) == 2
    script = login.script("lost", login.arrays("lost")[-1]["job"])
    assert f"afterok:{jobs[1]}" in script
    assert f"afterok:{lost}" not in script


def test_a_class_that_would_exceed_the_budget_does_not_start(login: LoginNode) -> None:
    """The estimate is within the limit; steps are a hundred times slower, so the canary fails."""
    orders(login, seconds=0.5)
    fast = changed_profile(login, "peak_tflops: 0.05", "peak_tflops: 500\nstart_seconds: 0")
    file = stub_sweep(login, "dear", seeds=3, more="limits: {gpu_hours: 0.001}")
    trials = login.submit(file, "--canary", "--cluster", fast)
    wait_canary(login, "dear", "A", "failed")
    for why in json.loads(login.jepa("why", "dear", "--json")):
        assert "more than its limit of 0.001" in why["evidence"]
    assert not any(trial.attempts() for trial in trials)
    login.jepa("cancel", "dear", "--yes")
    assert set(login.states("dear").values()) == {"stopped"}
    resumed = login.jepa("resume", "dear", "--yes", "--cluster", fast, check=False)
    assert "started" not in resumed, "the measured cost is too high"
    assert not any(trial.attempts() for trial in trials), "the measured cost is too high"


def test_the_gpu_limit_always_holds_and_unused_gpus_go_to_the_other_array(
    login: LoginNode,
) -> None:
    """Four processes: a pair and two singles; when the pairs are done, the singles get all four."""
    orders(login, seconds=0.1, **dict.fromkeys("234567", "slow"))
    trials = login.submit(login.sweep("share", TINY, PAIR_AND_SINGLES))
    most = 0
    singles = 0
    over = threading.Event()

    def sample() -> None:
        nonlocal most, singles
        while not over.wait(0.1):
            used = running_cpus(login)
            most = max(most, sum(used.values()))
            singles = max(singles, used["A"])

    def throttles() -> dict[str, int]:
        return {array["class"]: array["parallel"] for array in login.arrays("share")}

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        assert len(login.arrays("share")) == 2
        assert throttles() == {"A": 2, "B": 1}
        login.wait_done(trials[:2])
        login.wait(lambda: singles == 4, "the singles have all four")
        login.jepa("throttle", "share", "1")
        assert throttles()["A"] == 1
        login.jepa("cancel", "share", "--yes", "--now")
    finally:
        over.set()
        thread.join()
    assert most == 4


def running_cpus(login: LoginNode) -> Counter[str]:
    """CPUs of the running jobs of the sweep `share`, by resource class."""
    words = ("squeue", "-h", "-r", "-t", "running", "-o", "%j %C")
    used: Counter[str] = Counter()
    for row in login.cluster.run(*words, check=False).splitlines():
        if row.startswith("jepa.share"):
            name, cpus = row.split()
            used[name.split(".")[2]] += int(cpus)
    return used


def test_without_scontrol_a_chained_job_resumes_unless_the_job_was_cancelled(
    login: LoginNode,
) -> None:
    """The nodes' PATH has everything but scontrol.

    After USR2 the trial is saved and another job finishes it; after scancel no job follows.
    """
    profile = login.profile_without_scontrol()
    orders(login, seconds=0.3)
    file = stub_sweep(login, "chained", seeds=3)
    once, twice, cancelled = login.submit(file, "--cluster", profile)
    for trial in (once, twice, cancelled):
        login.wait_step(trial, 2)
    login.send_usr2(login.job("chained", once), login.job("chained", twice))
    login.scancel(login.job("chained", cancelled))
    login.wait_step(twice, 5, attempt=2)
    login.send_usr2(login.job("chained", twice))
    login.wait_done([once, twice])
    assert_ended(login, once, ["preempted", "done"])
    assert_ended(login, twice, ["preempted", "preempted", "done"])
    login.wait(lambda: not login.cluster.run("squeue", "-h"), "nothing is left in the queue")
    assert len(cancelled.attempts()) == 1
    assert login.states("chained")[cancelled.name] == "stopped"
    assert "nothing to do" in login.jepa("submit", str(file), "--yes", "--cluster", profile)


def test_our_own_records_and_sacct_agree_on_the_cost_of_all_attempts(login: LoginNode) -> None:
    """A preempted attempt costs too; our records lack only the time before and after Python."""
    orders(login, seconds=0.3)
    file = stub_sweep(login, "bill", "{nodes: 2, procs_per_node: 1, time: 10m}")
    (trial,) = login.submit(file)
    login.wait_step(trial, 10)
    login.send_usr2(login.job("bill", trial))
    login.wait_done([trial])
    login.wait(lambda: not login.cluster.run("squeue", "-h"), "the job has ended")
    ours = login.status("bill")["gpu_hours"]
    rounded = 2 * 2 * 1 / 3600  # Slurm counts whole seconds: two attempts of two processes

    def recorded() -> bool:
        return login.status("bill", "--billed")["gpu_hours"] >= ours - rounded

    login.wait(recorded, "slurmdbd has both attempts", 30)
    theirs = login.status("bill", "--billed")
    assert theirs["cost_by"] == "sacct"
    assert len(trial.attempts()) == 2
    # two attempts of two processes, 15 s around each on a busy machine
    around = 2 * 2 * 15 / 3600
    assert ours > 0
    assert -rounded <= theirs["gpu_hours"] - ours < around
    login.cluster.stop_accounting()
    try:
        without = login.status("bill", "--billed")
        assert without["cost_by"] == "attempt records"
        assert without["gpu_hours"] == ours
    finally:
        login.cluster.start_accounting()
        time.sleep(0.1)

"""Canaries, the cap on GPUs in flight, successors and the bill: a private Slurm with accounting, stub trials."""

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from processes import signal_all
from support.login_node import SMALL, TINY, LoginNode, causes, every_step_once, orders, stub_sweep
from testcluster import Cluster

from jepa_cluster.trial.directory import TrialDir

pytestmark = pytest.mark.timeout(900)

CLASSES = """\
seeds: [0, 1, 2, 3]
resources:
  - {when: seed > 1, nodes: 2, procs_per_node: 2, time: 10m}
  - {nodes: 1, procs_per_node: 1, time: 10m}
"""


@pytest.fixture(scope="module")
def own_cluster(slurm: None) -> Iterator[Cluster]:
    with Cluster(nodes=2, cpus=16, accounting=True) as c:
        yield c


@pytest.fixture
def login(own_cluster: Cluster, tmp_path: Path) -> Iterator[LoginNode]:
    found = LoginNode(own_cluster, tmp_path, stub=True)
    orders(found, seconds=0.1)
    yield found
    own_cluster.clean()
    assert not (found.root.path / "twice").exists(), "two attempts of one trial trained at the same time"


def status(login: LoginNode, sweep: str, *words: str) -> Any:
    return json.loads(login.jepa("status", sweep, "--json", *words))


def canary(login: LoginNode, sweep: str, letter: str) -> Any:
    """The last canary of a class, in `jepa status`."""
    return next(c for c in status(login, sweep)["canaries"] if c["class"] == letter)


def canary_dir(login: LoginNode, sweep: str, letter: str) -> TrialDir:
    return login.root.trial(canary(login, sweep, letter)["name"])


def test_a_canary_starts_its_class_when_it_succeeds_and_one_that_fails_holds_it(login: LoginNode) -> None:
    """Two classes. What was measured replaces the price; `why` shows the cause; retry, cancel and resume work."""
    orders(login, seconds=0.1, **{"2": "error"})
    login.sweep("birds", (*TINY, "optim.steps=60"), CLASSES)
    small, small_too, big, big_too = login.submit(login.folder / "birds.yaml", "--canary")
    assert len(login.arrays("birds")) == 4, "a canary and the rest, twice"
    login.wait_done([small, small_too])
    passed, directory = canary(login, "birds", "A"), canary_dir(login, "birds", "A")
    assert passed["state"] == "done" and passed["step"] == 40 and not directory.done.exists()
    assert [(a["cause"], a["exit"], a["end_step"]) for a in directory.attempts()] == [("stopped", 0, 40)]
    assert small.attempts()[0]["started"] > directory.attempts()[0]["ended"]
    assert 60 * 0.1 / 3600 < passed["measured_hours"] < passed["hours"], "priced by FLOPs before, by the clock now"
    plan = json.loads(login.jepa("plan", "birds", "--json", check=False))
    assert {c["class"]: c["basis"] for c in plan["classes"]}["A"].startswith("measured")
    login.wait(lambda: canary(login, "birds", "B")["state"] == "failed", "the canary of B has failed")
    assert not big.attempts() and not big_too.attempts()
    (why,) = json.loads(login.jepa("why", "birds", "seed=3", "--json"))
    assert "held" in why["means"] and "a bug of the user's" in why["evidence"] and "jepa retry birds" in why["hint"]
    assert "nothing to do" in login.jepa("submit", "birds", "--yes")
    login.jepa("retry", "birds", "--yes")
    login.wait(lambda: len(canary_dir(login, "birds", "B").attempts()) == 2, "the canary of B has run again")
    login.wait(lambda: canary(login, "birds", "B")["state"] == "failed", "the canary of B has failed again")
    orders(login, seconds=0.1)
    login.jepa("cancel", "birds", "seed=3", "--yes")
    login.jepa("retry", "birds", "--yes")
    login.wait_done([big])
    assert causes(canary_dir(login, "birds", "B")) == ["error", "error", "stopped"]
    assert every_step_once(big, 60) and not big_too.attempts()
    assert login.states("birds")[big_too.name] == "stopped"
    login.jepa("resume", "birds", "seed=3", "--yes")
    login.wait_done([big_too])


def test_a_later_submit_does_not_depend_on_a_canary_that_was_lost(login: LoginNode) -> None:
    """Its job has failed, so `afterok` on that job can never be fulfilled: a new canary comes first."""
    orders(login, seconds=0.05, hold=5)
    file = login.sweep("lost", (*TINY, "optim.steps=60"), f"seeds: [0, 1]\nresources:\n  - {SMALL}")
    trials = login.submit(file, "--canary")
    directory = canary_dir(login, "lost", "A")
    login.wait_step(directory, 5)
    lost = canary(login, "lost", "A")["job"]
    signal_all(signal.SIGKILL, login.ranks(job=lost))
    login.wait(lambda: canary(login, "lost", "A")["state"] == "interrupted", "the canary is lost")
    assert not any(trial.attempts() for trial in trials)
    login.release()
    login.jepa("retry", "lost", "--yes")
    login.wait_done(trials)
    jobs = [array["job"] for array in login.arrays("lost") if directory.name in array["trials"]]
    assert jobs[0] == lost and len(jobs) == 2
    last = login.arrays("lost")[-1]["job"]
    script = (login.root.sweep("lost").path / "jobs" / last / f"{last}_submission.sh").read_text()
    assert f"afterok:{jobs[1]}" in script and f"afterok:{lost}" not in script


def test_a_class_that_would_exceed_the_budget_does_not_start(login: LoginNode) -> None:
    """The limit allows the price by FLOPs; a step takes a hundred times as long, so the canary's own job fails."""
    orders(login, seconds=0.5)
    profile = login.cluster.profile.read_text().replace("peak_tflops: 0.05", "peak_tflops: 500\nstart_seconds: 0")
    (login.folder / "fast.yaml").write_text(profile)
    file = stub_sweep(login, "dear", seeds=3, more="limits: {gpu_hours: 0.001}")
    trials = login.submit(file, "--canary", "--cluster", str(login.folder / "fast.yaml"))
    login.wait(lambda: canary(login, "dear", "A")["state"] == "failed", "the canary has ended")
    why = json.loads(login.jepa("why", "dear", "--json"))
    assert all("more than its limit of 0.001" in w["evidence"] for w in why)
    assert not any(t.attempts() for t in trials)
    login.jepa("cancel", "dear", "--yes")
    assert set(login.states("dear").values()) == {"stopped"}
    without = login.jepa("resume", "dear", "--yes", "--cluster", str(login.folder / "fast.yaml"), check=False)
    assert "started" not in without and not any(t.attempts() for t in trials), "the measured price is too high"


def test_the_cap_holds_at_every_moment_and_what_one_array_leaves_free_goes_to_the_other(login: LoginNode) -> None:
    """Four processes: a pair and two singles; when the pairs are done, the singles get all four."""
    orders(login, seconds=0.1, **{str(s): "slow" for s in range(2, 8)})
    body = "seeds: [0, 1, 2, 3, 4, 5, 6, 7]\nresources:\n  - {when: seed < 2, nodes: 2, procs_per_node: 1, time: 9m}\n"
    file = login.sweep(
        "share", TINY, f"{body}  - {{nodes: 1, procs_per_node: 1, time: 9m}}\nlimits: {{gpus_in_flight: 4}}"
    )
    trials = login.submit(file)
    most, singles, over = 0, 0, threading.Event()

    def watch() -> None:
        nonlocal most, singles
        while not over.wait(0.1):
            rows = login.cluster.run("squeue", "-h", "-r", "-t", "running", "-o", "%j %C", check=False).split("\n")
            used = [(row.split(".")[2], int(row.split()[1])) for row in rows if row.startswith("jepa.share")]
            most = max(most, sum(n for _, n in used))
            singles = max(singles, sum(n for letter, n in used if letter == "A"))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        shares = [(a["class"], a["parallel"]) for a in login.arrays("share")]
        assert sorted(shares) == [("A", 2), ("B", 1)]
        login.wait_done(trials[:2])
        login.wait(lambda: singles == 4, "the singles have all of it")
        login.jepa("throttle", "share", "1")
        assert [a["parallel"] for a in login.arrays("share") if a["class"] == "A"] == [1]
        login.jepa("cancel", "share", "--yes", "--now")
    finally:
        over.set()
        thread.join()
    assert most == 4


def test_without_scontrol_on_the_nodes_a_successor_goes_on_and_none_rises_from_a_cancelled_job(
    login: LoginNode,
) -> None:
    """The nodes' PATH has everything but scontrol. USR2: saved, and another job finishes. scancel: nothing follows."""
    folder = login.folder / "bin"
    folder.mkdir()
    for place in ("/usr/bin", "/bin"):
        for program in os.scandir(place):
            if program.name != "scontrol" and not (folder / program.name).is_symlink():
                (folder / program.name).symlink_to(program.path)
    profile = login.cluster.profile.read_text().replace("environment: {", f"environment: {{PATH: {folder}, ")
    (login.folder / "poor.yaml").write_text(profile)
    orders(login, seconds=0.3)
    file = stub_sweep(login, "heirs", seeds=3)
    told, twice, cancelled = login.submit(file, "--cluster", str(login.folder / "poor.yaml"))
    for trial in (told, twice, cancelled):
        login.wait_step(trial, 2)
    login.cluster.run("scancel", "-s", "USR2", login.job("heirs", told), login.job("heirs", twice))
    login.cluster.run("scancel", login.job("heirs", cancelled))
    login.wait_step(twice, 5, attempt=2)
    login.cluster.run("scancel", "-s", "USR2", login.job("heirs", twice))
    login.wait_done([told, twice])
    assert causes(told) == ["preempted", "done"] and causes(twice) == ["preempted", "preempted", "done"]
    assert every_step_once(told) and every_step_once(twice), login.evidence()
    login.wait(lambda: not login.cluster.run("squeue", "-h"), "nothing is left in the queue")
    assert len(cancelled.attempts()) == 1 and login.states("heirs")[cancelled.name] == "stopped"
    assert "nothing to do" in login.jepa("submit", str(file), "--yes", "--cluster", str(login.folder / "poor.yaml"))


def test_our_own_records_and_sacct_agree_on_the_cost_of_all_attempts(login: LoginNode) -> None:
    """A preempted attempt is paid for too; ours lack only what comes before Python and after it."""
    orders(login, seconds=0.3)
    file = stub_sweep(login, "bill", "{nodes: 2, procs_per_node: 1, time: 10m}")
    (trial,) = login.submit(file)
    login.wait_step(trial, 10)
    login.cluster.run("scancel", "-s", "USR2", login.job("bill", trial))
    login.wait_done([trial])
    login.wait(lambda: not login.cluster.run("squeue", "-h"), "the job has ended")
    ours = status(login, "bill")["gpu_hours"]
    rounded = 2 * 2 * 1 / 3600  # Slurm pays in whole seconds: two attempts of two processes
    login.wait(lambda: status(login, "bill", "--billed")["gpu_hours"] >= ours - rounded, "slurmdbd has heard of it", 30)
    theirs = status(login, "bill", "--billed")
    assert theirs["cost_by"] == "sacct" and len(trial.attempts()) == 2
    around = 2 * 2 * 15 / 3600  # two attempts of two processes, 15 s around each on a busy machine
    assert ours > 0 and -rounded <= theirs["gpu_hours"] - ours < around
    login.cluster.stop_accounting()
    try:
        without = status(login, "bill", "--billed")
        assert without["cost_by"] == "attempt records" and without["gpu_hours"] == ours
    finally:
        login.cluster.start_accounting()
        time.sleep(0.1)

"""What happens around a submission: stub trials, real Slurm, the real command line."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.login_node import (
    SMALL,
    STEPS,
    TINY,
    LoginNode,
    assert_ended,
    causes,
    every_step_once,
    orders,
    stub_sweep,
)
from testcluster import Cluster, ClusterError

from jepa_cluster.launch.worker import chained_job
from jepa_cluster.trial.directory import TrialDir


@pytest.fixture
def login(cluster: Cluster, tmp_path: Path) -> Iterator[LoginNode]:
    """A login node whose trials are stubs of 30 steps that wait at the fifth."""
    found = LoginNode(cluster, tmp_path, stub=True)
    orders(found, hold=5)
    yield found
    found.assert_no_overlap()


def submit_in_python(login: LoginNode, file: Path, patch: str, check: bool = True) -> None:
    """Run `jepa submit` in a process of its own after this patch of its modules."""
    command = f"{patch}; from jepa_cluster import cli; cli.main(['submit', '{file}', '--yes'])"
    words = (sys.executable, "-c", command)
    login.cluster.run(*words, check=check, cwd=login.folder, env=login.environment())


@pytest.mark.parametrize("moment", ["sbatch.submit", "_record"])
def test_a_crash_while_submitting_neither_duplicates_nor_loses_trials(
    login: LoginNode, moment: str
) -> None:
    """The submitter dies before sbatch, or between sbatch and its record.

    The next submit repairs it.
    """
    file = stub_sweep(login, "crash", seeds=2)
    before = login.cluster.jobs()
    patch = "import os, jepa_cluster.launch.submit.submit as s"
    patch += f"; s.{moment} = lambda *a, **k: os._exit(9)"
    submit_in_python(login, file, patch, check=False)
    trials = login.submit(file)
    login.release()
    login.wait_done(trials)
    for trial in trials:
        assert_ended(login, trial, ["done"])
    assert len(login.arrays("crash")) == 1
    assert len(login.cluster.jobs()) - len(before) == 2


def test_each_rank_may_use_all_cores_that_the_profile_names(
    cluster_with_affinity: Cluster, tmp_path: Path
) -> None:
    """Slurm binds tasks to cores. The chained job of a trial is bound in the same way."""
    login = LoginNode(cluster_with_affinity, tmp_path, stub=True)
    orders(login, hold=5)
    text = login.cluster.profile.read_text()
    profile = tmp_path / "two-cores.yaml"
    profile.write_text(text.replace("cpus_per_proc: 1", "cpus_per_proc: 2"))
    (trial,) = login.submit(stub_sweep(login, "bound"), "--cluster", str(profile))
    login.wait_step(trial, 5)
    (rank,) = login.ranks()
    assert os.sched_getaffinity(rank) == {0, 1}
    script = login.script("bound", login.job("bound", trial))
    chained = chained_job.script_text(script, "jepa.bound.A.2", "12")
    assert "--cpus-per-task=2 " in chained[chained.index("srun ") :]
    login.release()
    login.wait_done([trial])


def test_two_people_submitting_one_sweep_submit_every_trial_once(login: LoginNode) -> None:
    """Both submit at the same moment; a third submit finds nothing to do."""
    file = stub_sweep(login, "rush", seeds=3)
    words = [sys.executable, "-m", "jepa_cluster", "submit", str(file), "--yes"]
    environment = {**login.cluster.env, **login.environment()}
    both = [subprocess.Popen(words, cwd=login.folder, env=environment) for _ in range(2)]
    assert [p.wait() for p in both] == [0, 0]
    assert "nothing to do" in login.jepa("submit", str(file), "--yes")
    (array,) = login.arrays("rush")
    trials = login.trials("rush")
    assert array["trials"] == [trial.name for trial in trials]
    login.release()
    login.wait_done(trials)
    for trial in trials:
        assert causes(trial) == ["done"]


def test_a_sweep_longer_than_an_array_may_be_is_cut(login: LoginNode) -> None:
    """MaxArraySize=3 limits the index: five trials are arrays of three and two, and all run."""
    login.cluster.reconfigure(max_array=3)
    try:
        trials = login.submit(stub_sweep(login, "wide", seeds=5))
        sizes = [len(array["trials"]) for array in login.arrays("wide")]
        assert sorted(sizes) == [2, 3]
        login.release()
        login.wait_done(trials)
        for trial in trials:
            assert causes(trial) == ["done"]
    finally:
        login.cluster.clean()
        login.cluster.reconfigure(max_array=1001)


@pytest.mark.slow
def test_a_job_that_dies_before_python_is_started_three_times_and_shown(login: LoginNode) -> None:
    """The profile names an interpreter that does not exist. `jepa retry` counts from the start."""
    profile = login.folder / "wrong.yaml"
    profile.write_text(f"{login.cluster.profile.read_text()}python: /no/python\n")
    file = stub_sweep(login, "wrong-python")
    (trial,) = login.submit(file, "--cluster", str(profile))

    def state() -> str:
        return login.states(file.stem)[trial.name]

    for _ in range(2):
        login.wait(lambda: state() == "interrupted", "the job is lost")
        login.submit(file, "--cluster", str(profile))
    login.wait(lambda: state() == "failed", "the third job is lost too")
    assert "nothing to do" in login.jepa("submit", str(file), "--yes", "--cluster", str(profile))
    document = login.jepa("why", file.stem, "--json")
    (shown,) = json.loads(document)
    assert "/no/python" in shown["evidence"]
    assert shown["rule"] == "retries.start is used up"
    assert not trial.attempts()
    login.release()
    login.jepa("retry", file.stem, "--yes", "--cluster", str(login.cluster.profile), check=False)
    login.submit(file, "--cluster", str(login.cluster.profile))
    login.wait_done([trial])


@pytest.mark.slow
def test_what_the_user_may_not_submit_yet_waits_for_the_next_submit(
    cluster_with_limits: Cluster, tmp_path: Path
) -> None:
    """MaxSubmitJobs=5 counts the tasks of arrays."""
    cluster = cluster_with_limits
    login = LoginNode(cluster, tmp_path, stub=True)
    orders(login, hold=5)
    file = stub_sweep(login, "many", seeds=8)
    document = login.jepa("doctor", "--json", check=False)
    checks = json.loads(document)
    (limit,) = [check for check in checks if check["what"] == "MaxSubmitJobs"]
    assert limit["found"] == "5, 0 of them used"
    assert "3 trials more than Slurm accepts" in login.jepa("submit", str(file), "--yes")
    trials = login.trials("many")
    states = login.states("many")
    assert [states[trial.name] for trial in trials[5:]] == ["new"] * 3
    assert sum(len(array["trials"]) for array in login.arrays("many")) == 5
    assert not list(login.root.sweep("many").intents.glob("*.void"))
    with pytest.raises(ClusterError, match="nothing was submitted: sbatch"):
        login.submit(file)
    login.release()
    login.wait_done(trials[:5])
    login.wait(lambda: not cluster.run("squeue", "-h"), "the queue is empty")
    login.submit(file)
    login.wait_done(trials)
    for trial in trials:
        assert causes(trial) == ["done"]


def test_an_index_cancelled_while_all_of_its_array_waits_stays_cancelled(login: LoginNode) -> None:
    """Slurm keeps no record of it; the tasks that still wait show that it never ran."""
    file = stub_sweep(login, "unbegun", seeds=3)
    login.drain()
    first, *others = login.submit(file)
    login.scancel(login.job("unbegun", first))
    expected = dict.fromkeys([trial.name for trial in others], "queued")
    assert login.states("unbegun") == {first.name: "stopped", **expected}
    assert "nothing to do" in login.jepa("submit", str(file), "--yes")
    login.jepa("resume", "unbegun", "state=stopped", "--yes")
    login.undrain()
    login.release()
    login.wait_done([first, *others])


def fork_sweep(login: LoginNode, name: str, steps: str, more: str = "") -> Path:
    """A sweep of a trunk and its cool-down branches, which end at these steps."""
    body = f"fork: {{at: [{steps}]}}\n{more}\nresources:\n  - {SMALL}"
    return login.sweep(name, (*TINY, "optim=wsd"), body)


def assert_started_after(branch: TrialDir, trunk: TrialDir, step: int) -> None:
    """The branch started after the trunk had saved this step."""
    saved = trunk.checkpoint(step).stat().st_ctime * 1000
    assert branch.attempts()[0]["started"] > saved


def test_cool_down_branches_start_when_their_trunk_has_saved_their_step(login: LoginNode) -> None:
    """Rank 0 of the trunk releases each branch when its checkpoint is committed.

    Their array is held; a branch also waits for a trunk that is in the queue already.
    """
    orders(login, seconds=0.2, hold=25)
    fork = fork_sweep(login, "fork", f"10, 20, {STEPS}")
    login.drain()
    early, late, trunk = login.submit(fork)
    for _ in range(2):
        job = login.job("fork", early)
        assert login.pending_reason(job) == "JobHeldUser"
        rows = {row["name"]: row for row in login.status("fork")["trials"]}
        assert rows[early.name]["note"] == "waits for its trunk"
        login.scancel(job)
        login.wait(lambda: login.states("fork")[early.name] == "stopped", "the branch is cancelled")
        login.jepa("resume", "fork", "0", "--yes")
    assert set(login.states("fork").values()) == {"queued"}
    login.undrain()
    login.wait_done([early, late])
    assert not trunk.done.exists()
    assert login.states("fork")[trunk.name] == "running"
    login.release()
    login.wait_done([trunk])
    assert_started_after(early, trunk, 9)
    assert_started_after(late, trunk, 18)


def test_the_next_submit_releases_branches_whose_trunk_could_not_or_failed(
    login: LoginNode,
) -> None:
    """Nodes lack scontrol when the trunk saves its milestone, and have it when the trunk fails."""
    profile = login.profile_without_scontrol()
    orders(login, seconds=0.05, hold=12)
    file = fork_sweep(login, "orphans", f"10, 20, {STEPS}")
    early, late, trunk = login.submit(file, "--cluster", profile)
    login.wait_step(trunk, 12)
    assert trunk.checkpoint(9).exists()
    assert login.states("orphans")[early.name] == "queued"
    assert "nothing to do" in login.jepa("submit", str(file), "--yes", "--cluster", profile)
    login.wait_done([early])
    assert not late.attempts()
    orders(login, seconds=0.05, hold=12, **{"0": "error"})
    (login.folder / "bin/scontrol").symlink_to("/usr/bin/scontrol")
    login.send_usr2(login.job("orphans", trunk))
    login.wait(late.failed.exists, "the branch has run, with the error of its trunk")
    assert causes(trunk) == ["preempted", "error"]
    assert late.attempts()[0]["started"] >= trunk.attempts()[1]["started"]


def test_the_next_submit_releases_branches_whose_trunk_was_stopped(
    login: LoginNode,
) -> None:
    """The trunk left neither DONE.json, nor FAILED.json, nor the checkpoint of their step."""
    orders(login, seconds=0.05, hold=5)
    file = fork_sweep(login, "ended", f"10, {STEPS}")
    branch, trunk = login.submit(file)
    login.wait_step(trunk, 5)
    login.scancel(login.job("ended", trunk))
    login.wait(lambda: login.states("ended")[trunk.name] == "stopped", "the trunk is stopped")
    assert not trunk.done.exists()
    assert not trunk.failed.exists()
    assert login.pending_reason(login.job("ended", branch)) == "JobHeldUser"
    login.release()
    assert "nothing to do" in login.jepa("submit", str(file), "--yes")
    login.wait_done([branch])
    assert every_step_once(branch, 10)
    assert len(login.arrays("ended")) == 2
    assert login.states("ended")[trunk.name] == "stopped"


def test_a_cap_on_gpus_does_not_release_branches_before_their_trunk(login: LoginNode) -> None:
    """A new limit releases no branch that waits for a trunk."""
    orders(login, seconds=0.05, hold=5)
    more = "seeds: [0, 1]\nlimits: {gpus_in_flight: 2}"
    trials = login.submit(fork_sweep(login, "capped", f"20, {STEPS}", more))
    trunks = [t for t in trials if t.read_config().recipe.optim.steps == STEPS]
    branches = [t for t in trials if t not in trunks]
    for trunk in trunks:
        login.wait_step(trunk, 5)
    login.jepa("throttle", "capped", "3")
    for branch in branches:
        assert login.pending_reason(login.job("capped", branch)) == "JobHeldUser"
    login.jepa("throttle", "capped", "1")
    login.release()
    login.wait_done(trials)
    for branch in branches:
        trunk = login.root.trial(branch.read_config().runtime.fork_from or "")
        assert_started_after(branch, trunk, 18)


CLASSES = """\
seeds: [0, 1, 2]
resources:
  - {when: seed == 2, nodes: 2, procs_per_node: 2, time: 10m}
  - {nodes: 1, procs_per_node: 1, time: 10m}
"""


def test_a_dry_run_shows_every_script_exactly_with_canaries_and_dependents(
    login: LoginNode,
) -> None:
    """Nothing is written or started; the submitted scripts differ only in the text in <>."""
    file = login.sweep("dry", TINY, CLASSES)
    before = login.cluster.jobs()
    shown = json.loads(login.jepa("submit", str(file), "--dry-run", "--canary", "--json"))
    assert [script["title"] for script in shown] == [
        "the canary of class A, 1 trial",
        "class A, 2 trials",
        "the canary of class B, 1 trial",
        "class B, 1 trial",
    ]
    assert "--dependency='afterok:<job of script 1>'" in shown[1]["script"]
    assert "--dependency='afterok:<job of script 3>'" in shown[3]["script"]
    text = login.jepa("submit", str(file), "--dry-run", "--canary")
    assert "# script 1 of 4: the canary of class A, 1 trial\n#!/bin/bash\n" in text
    assert "--array=0-1%2" in text
    assert login.cluster.jobs() == before
    for folder in ("trials", "canaries", "sweeps", "code"):
        assert not (login.root.path / folder).exists()
    login.submit(file, "--canary")

    def order(array: dict[str, Any]) -> tuple[str, bool]:
        return array["class"], not array["trials"][0].startswith("canary")

    submitted = sorted(login.arrays("dry"), key=order)
    canary_of = {"A": 1, "B": 3}
    for dry, real in zip(shown, submitted, strict=True):
        canary = canary_of[real["class"]]
        job = submitted[canary - 1]["job"]
        expected = dry["script"].replace(dry["name"], real["name"])
        expected = expected.replace(f"<job of script {canary}>", job)
        script = login.script("dry", real["job"])
        assert script.replace("'", "") == expected.replace("'", "")


def test_no_script_names_a_wckey_unless_the_profile_does(login: LoginNode) -> None:
    """submitit would send its own, which clusters that keep a list of them refuse."""
    file = stub_sweep(login, "key")
    profile = login.folder / "keyed.yaml"
    profile.write_text(f"{login.cluster.profile.read_text()}sbatch: {{wckey: lab}}\n")

    def dry_run(*words: str) -> str:
        (shown,) = json.loads(login.jepa("submit", str(file), "--dry-run", "--json", *words))
        return shown["script"]

    assert "--wckey" not in dry_run()
    keyed = dry_run("--cluster", str(profile))
    assert keyed.count("--wckey") == 1
    assert "\n#SBATCH --wckey=lab\n" in keyed


def test_a_sweep_of_one_trial_is_a_plain_job_and_every_command_finds_it(login: LoginNode) -> None:
    """No --array, no index: status, requeue, cancel, scancel, resume and submit all find it."""
    file = stub_sweep(login, "single")
    (trial,) = login.submit(file)
    job = login.job("single", trial)
    assert job.isdigit()
    assert "--array" not in login.script("single", job)
    login.wait_step(trial, 5)
    (row,) = login.status("single")["trials"]
    assert row["state"] == "running"
    assert row["job"] == job
    assert "nothing to do" in login.jepa("submit", str(file), "--yes")
    login.jepa("requeue", "single", "--yes")
    login.wait(lambda: causes(trial) == ["preempted"], "it has saved")
    waiting = ("requeued", "queued")
    login.wait(lambda: login.states("single")[trial.name] in waiting, "it waits again")
    login.jepa("cancel", "single", "--yes")
    login.wait(lambda: login.states("single") == {trial.name: "stopped"}, "it is stopped")
    login.jepa("resume", "single", "--yes")
    again = login.job("single", trial)
    assert again.isdigit()
    assert again != job
    login.wait_step(trial, 5, attempt=2)
    login.scancel(again)
    login.wait(lambda: login.states("single") == {trial.name: "stopped"}, "a scancel stops it too")
    login.release()
    login.jepa("resume", "single", "--yes")
    login.wait_done([trial])
    assert causes(trial)[-1] == "done", login.evidence()
    assert every_step_once(trial), login.evidence()

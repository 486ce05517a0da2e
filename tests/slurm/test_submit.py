"""What people do around a submission, with stubs in place of the trainer: real Slurm, the real command line."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.login_node import SMALL, STEPS, TINY, LoginNode, causes, every_step_once, orders, stub_sweep
from testcluster import Cluster


@pytest.fixture
def login(cluster: Cluster, tmp_path: Path) -> Iterator[LoginNode]:
    """A login whose trials are stubs of 30 steps that wait at the fifth."""
    found = LoginNode(cluster, tmp_path, stub=True)
    orders(found, hold=5)
    yield found
    assert not (found.root.path / "twice").exists(), "two attempts of one trial trained at the same time"


@pytest.mark.parametrize("moment", ["sbatch.submit", "_record"])
def test_a_crash_while_submitting_neither_doubles_nor_orphans(login: LoginNode, moment: str) -> None:
    """The submitter dies before sbatch, or after it and before its record; the next submit puts it right."""
    file, before = stub_sweep(login, "crash", seeds=2), login.cluster.jobs()
    dying = f"import os, jepa_cluster.launch.submit.submit as s; s.{moment} = lambda *a, **k: os._exit(9)"
    command = f"{dying}; from jepa_cluster import cli; cli.main(['submit', '{file}', '--yes'])"
    login.cluster.run(sys.executable, "-c", command, check=False, cwd=login.folder, env=login.environment())
    trials = login.submit(file)
    login.release()
    login.wait_done(trials)
    assert all(causes(t) == ["done"] and every_step_once(t) for t in trials), login.evidence()
    assert len(login.arrays("crash")) == 1 and len(login.cluster.jobs()) - len(before) == 2


def test_a_job_that_starts_before_its_submitter_has_made_its_folder_is_not_lost(login: LoginNode) -> None:
    """On an idle cluster Slurm may be faster than the process that has called sbatch, and it makes no folders."""
    file = stub_sweep(login, "quick")
    slow = "import time, submitit.core.utils as u; move = u.JobPaths.move_temporary_file"
    late = "u.JobPaths.move_temporary_file = lambda *a, **k: (time.sleep(3), move(*a, **k))"
    command = f"{slow}; {late}; from jepa_cluster import cli; cli.main(['submit', '{file}', '--yes'])"
    login.cluster.run(sys.executable, "-c", command, cwd=login.folder, env=login.environment())
    login.release()
    (trial,) = login.trials("quick")
    login.wait(lambda: not login.cluster.run("squeue", "-h"), "the job has ended")
    assert causes(trial) == ["done"], login.evidence()


def test_two_people_submitting_one_sweep_hand_every_trial_over_once(login: LoginNode) -> None:
    """Both at the same moment; a third submit finds nothing to do."""
    file = stub_sweep(login, "rush", seeds=3)
    words = [sys.executable, "-m", "jepa_cluster", "submit", str(file), "--yes"]
    environment = {**login.cluster.env, **login.environment()}
    both = [subprocess.Popen(words, cwd=login.folder, env=environment) for _ in range(2)]
    assert [p.wait() for p in both] == [0, 0]
    assert "nothing to do" in login.jepa("submit", str(file), "--yes")
    (array,) = login.arrays("rush")
    trials = login.trials("rush")
    assert array["trials"] == [t.name for t in trials]
    login.release()
    login.wait_done(trials)
    assert all(causes(t) == ["done"] for t in trials)


def test_a_sweep_longer_than_an_array_may_be_is_cut(login: LoginNode) -> None:
    """MaxArraySize=3, which limits the index: five trials are arrays of three and two, and all run."""
    login.cluster.reconfigure(max_array=3)
    try:
        trials = login.submit(stub_sweep(login, "wide", seeds=5))
        assert sorted(len(a["trials"]) for a in login.arrays("wide")) == [2, 3]
        login.release()
        login.wait_done(trials)
        assert all(causes(t) == ["done"] for t in trials)
    finally:
        login.cluster.clean()
        login.cluster.reconfigure(max_array=1001)


def test_an_index_cancelled_while_all_of_its_array_waits_stays_cancelled(login: LoginNode) -> None:
    """Slurm keeps no line of it, with or without accounting; its waiting neighbours tell that it never ran."""
    file = stub_sweep(login, "unbegun", seeds=3)
    login.cluster.run("scontrol", "update", "nodename=n[1-2]", "state=drain", "reason=test")
    first, *others = login.submit(file)
    login.cluster.run("scancel", login.job("unbegun", first))
    assert login.states("unbegun") == {first.name: "stopped", **{t.name: "queued" for t in others}}
    assert "nothing to do" in login.jepa("submit", str(file), "--yes")
    login.jepa("resume", "unbegun", "state=stopped", "--yes")
    login.cluster.run("scontrol", "update", "nodename=n[1-2]", "state=resume")
    login.release()
    login.wait_done([first, *others])


def test_cool_down_branches_start_when_their_trunk_has_saved_their_step(login: LoginNode) -> None:
    """Their array is held; a trunk that is in the queue already is waited for, too. Rank 0 of the trunk releases them
    once the checkpoint is committed, long before the trunk ends, and one by one."""
    orders(login, seconds=0.2, hold=25)
    fork = login.sweep("fork", (*TINY, "optim=wsd"), f"fork: {{at: [10, 20, {STEPS}]}}\nresources:\n  - {SMALL}")
    login.cluster.run("scontrol", "update", "nodename=n[1-2]", "state=drain", "reason=test")
    early, late, trunk = login.submit(fork)
    for _ in range(2):
        job = login.job("fork", early)
        assert login.cluster.run("squeue", "-h", "-o", "%r", "-j", job).strip() == "JobHeldUser"
        rows = {t["name"]: t for t in json.loads(login.jepa("status", "fork", "--json"))["trials"]}
        assert rows[early.name]["note"] == "waits for its trunk"
        login.cluster.run("scancel", job)
        login.wait(lambda: login.states("fork")[early.name] == "stopped", "the branch is cancelled")
        login.jepa("resume", "fork", "0", "--yes")
    assert set(login.states("fork").values()) == {"queued"}
    login.cluster.run("scontrol", "update", "nodename=n[1-2]", "state=resume")
    login.wait_done([early, late])
    assert not trunk.done.exists() and login.states("fork")[trunk.name] == "running"
    login.release()
    login.wait_done([trunk])
    for branch, begins in ((early, 9), (late, 18)):
        assert branch.attempts()[0]["started"] > trunk.checkpoint(begins).stat().st_ctime * 1000


def test_branches_are_released_by_the_next_submit_where_their_trunk_could_not_and_when_it_fails(
    login: LoginNode,
) -> None:
    """Nodes have no scontrol when the trunk saves its first milestone; they have it when the trunk fails."""
    folder = login.folder / "bin"
    folder.mkdir()
    for program in (program for place in ("/usr/bin", "/bin") for program in Path(place).iterdir()):
        if program.name != "scontrol" and not (folder / program.name).is_symlink():
            (folder / program.name).symlink_to(program)
    profile, text = login.folder / "poor.yaml", login.cluster.profile.read_text()
    profile.write_text(text.replace("environment: {", f"environment: {{PATH: {folder}, "))
    orders(login, seconds=0.05, hold=12)
    body = f"fork: {{at: [10, 20, {STEPS}]}}\nresources:\n  - {SMALL}"
    file = login.sweep("orphans", (*TINY, "optim=wsd"), body)
    early, late, trunk = login.submit(file, "--cluster", str(profile))
    login.wait_step(trunk, 12)
    assert trunk.checkpoint(9).exists() and login.states("orphans")[early.name] == "queued"
    assert "nothing to do" in login.jepa("submit", str(file), "--yes", "--cluster", str(profile))
    login.wait_done([early])
    assert not late.attempts()
    orders(login, seconds=0.05, hold=12, **{"0": "error"})
    (folder / "scontrol").symlink_to("/usr/bin/scontrol")
    login.cluster.run("scancel", "-s", "USR2", login.job("orphans", trunk))
    login.wait(late.failed.exists, "the branch has run, with the error of its trunk")
    assert causes(trunk) == ["preempted", "error"]
    assert late.attempts()[0]["started"] >= trunk.attempts()[1]["started"]


def test_branches_are_released_by_the_next_submit_when_their_trunk_was_stopped(login: LoginNode) -> None:
    """The trunk left neither DONE.json nor FAILED.json, and not the checkpoint where they begin."""
    orders(login, seconds=0.05, hold=5)
    body = f"fork: {{at: [10, {STEPS}]}}\nresources:\n  - {SMALL}"
    file = login.sweep("ended", (*TINY, "optim=wsd"), body)
    branch, trunk = login.submit(file)
    login.wait_step(trunk, 5)
    login.cluster.run("scancel", login.job("ended", trunk))
    login.wait(lambda: login.states("ended")[trunk.name] == "stopped", "the trunk is stopped")
    assert not trunk.done.exists() and not trunk.failed.exists()
    assert "JobHeldUser" in login.cluster.run("squeue", "-h", "-o", "%r", "-j", login.job("ended", branch))
    login.release()
    assert "nothing to do" in login.jepa("submit", str(file), "--yes")
    login.wait_done([branch])
    assert every_step_once(branch, 10) and len(login.arrays("ended")) == 2
    assert login.states("ended")[trunk.name] == "stopped"


def test_a_cap_on_gpus_does_not_release_branches_before_their_trunk(login: LoginNode) -> None:
    """A new cap changes nothing about what waits for a trunk; with one GPU the branches follow the trunks."""
    orders(login, seconds=0.05, hold=5)
    body = f"fork: {{at: [20, {STEPS}]}}\nseeds: [0, 1]\nlimits: {{gpus_in_flight: 2}}\nresources:\n  - {SMALL}"
    trials = login.submit(login.sweep("capped", (*TINY, "optim=wsd"), body))
    trunks = [t for t in trials if t.read_config().recipe.optim.steps == STEPS]
    branches = [t for t in trials if t not in trunks]
    for trunk in trunks:
        login.wait_step(trunk, 5)
    login.jepa("throttle", "capped", "3")
    for branch in branches:
        assert "JobHeldUser" in login.cluster.run("squeue", "-h", "-o", "%r", "-j", login.job("capped", branch))
    login.jepa("throttle", "capped", "1")
    login.release()
    login.wait_done(trials)
    for branch in branches:
        trunk = login.root.trial(branch.read_config().runtime.fork_from or "")
        assert branch.attempts()[0]["started"] > trunk.checkpoint(18).stat().st_ctime * 1000


CLASSES = """\
seeds: [0, 1, 2]
resources:
  - {when: seed == 2, nodes: 2, procs_per_node: 2, time: 10m}
  - {nodes: 1, procs_per_node: 1, time: 10m}
"""


def test_a_dry_run_shows_every_script_to_the_letter_canaries_and_what_waits_for_them_too(login: LoginNode) -> None:
    """Nothing is written or started; what is then submitted differs only in what stood in <>."""
    file = login.sweep("dry", TINY, CLASSES)
    before = login.cluster.jobs()
    shown = json.loads(login.jepa("submit", str(file), "--dry-run", "--canary", "--json"))
    assert [s["title"] for s in shown] == [
        "the canary of class A, 1 trial", "class A, 2 trials", "the canary of class B, 1 trial", "class B, 1 trial",
    ]  # fmt: skip
    assert "--dependency='afterok:<job of script 1>'" in shown[1]["script"]
    assert "--dependency='afterok:<job of script 3>'" in shown[3]["script"]
    text = login.jepa("submit", str(file), "--dry-run", "--canary")
    assert "# script 1 of 4: the canary of class A, 1 trial\n#!/bin/bash\n" in text and "--array=0-1%2" in text
    assert login.cluster.jobs() == before
    assert not any((login.root.path / folder).exists() for folder in ("trials", "canaries", "sweeps", "code"))
    login.submit(file, "--canary")
    handed = sorted(login.arrays("dry"), key=lambda a: (a["class"], not a["trials"][0].startswith("canary")))
    for dry, real in zip(shown, handed, strict=True):
        place = 1 if real["class"] == "A" else 3
        expected = dry["script"].replace(f"'{dry['name']}'", real["name"])
        expected = expected.replace(f"'afterok:<job of script {place}>'", f"afterok:{handed[place - 1]['job']}")
        job = login.root.sweep("dry").jobs / real["job"]
        assert (job / f"{real['job']}_submission.sh").read_text().strip() == expected.strip()


def test_no_script_names_a_wckey_unless_the_profile_does(login: LoginNode) -> None:
    """submitit would send its own, which clusters that keep a list of them refuse."""
    file, profile = stub_sweep(login, "key"), login.folder / "keyed.yaml"
    profile.write_text(f"{login.cluster.profile.read_text()}sbatch: {{wckey: lab}}\n")
    plain = json.loads(login.jepa("submit", str(file), "--dry-run", "--json"))[0]["script"]
    keyed = json.loads(login.jepa("submit", str(file), "--dry-run", "--json", "--cluster", str(profile)))[0]["script"]
    assert "--wckey" not in plain
    assert [line for line in keyed.splitlines() if "--wckey" in line] == ["#SBATCH --wckey=lab"]


def test_a_sweep_of_one_trial_is_a_plain_job_and_every_verb_knows_it(login: LoginNode) -> None:
    """No --array, no index: status, requeue, cancel, scancel, resume and submit find it all the same."""
    file = stub_sweep(login, "single")
    (trial,) = login.submit(file)
    job = login.job("single", trial)
    script = (login.root.sweep("single").jobs / job / f"{job}_submission.sh").read_text()
    assert job.isdigit() and "--array" not in script
    login.wait_step(trial, 5)
    (row,) = json.loads(login.jepa("status", "single", "--json"))["trials"]
    assert (row["state"], row["job"]) == ("running", job)
    assert "nothing to do" in login.jepa("submit", str(file), "--yes")
    login.jepa("requeue", "single", "--yes")
    login.wait(lambda: causes(trial) == ["preempted"], "it has saved")
    login.wait(lambda: login.states("single")[trial.name] in ("cooling", "queued"), "it waits again")
    login.jepa("cancel", "single", "--yes")
    login.wait(lambda: login.states("single") == {trial.name: "stopped"}, "it is stopped")
    login.jepa("resume", "single", "--yes")
    again = login.job("single", trial)
    assert again.isdigit() and again != job
    login.wait_step(trial, 5, attempt=2)
    login.cluster.run("scancel", again)
    login.wait(lambda: login.states("single") == {trial.name: "stopped"}, "a scancel stops it too")
    login.release()
    login.jepa("resume", "single", "--yes")
    login.wait_done([trial])
    assert causes(trial)[-1] == "done" and every_step_once(trial), login.evidence()

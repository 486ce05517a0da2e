"""Faults that take Slurm a while to notice, each on a private cluster of its own, all at once in the background.

A function here is the body of the test of the same name in test_slow_faults.py, but for `real_sweep` and
`array_faults`, whose ends test_sweep.py and test_array_faults.py look at. conftest starts those that were selected.
"""

import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from processes import signal_all
from support.login_node import (
    PATIENCE,
    SMALL,
    STEPS,
    TINY,
    LoginNode,
    causes,
    every_step_once,
    leaked,
    orders,
    stub_sweep,
)
from testcluster import Cluster

from jepa_cluster.trial.directory import TrialDir

REAL_STEPS = 100
REAL = (
    "model=vit_ti", "model.patch=8", "model.image=48", "model.depth=2", "model.heads=2", "model.mlp_ratio=2.0",
    "predictor.width=16", "predictor.depth=2", "predictor.heads=2", "mask.targets=2", "data=synthetic",
    f"optim.steps={REAL_STEPS}", "optim.warmup_steps=4", "optim.batch=16", "optim.precision=fp32",
    "probe.images=100", "probe.test_images=64", "runtime.log_every=1", "runtime.compile=false",
    "runtime.checkpoint_minutes=0.01",
)  # fmt: skip
AXES = """\
grid:
  model.width: [32, 48]
resources:
  - {when: model.width == 32, nodes: 2, procs_per_node: 2, time: 20m}
  - {nodes: 2, procs_per_node: 1, time: 20m}
"""
HELD_SAVES = """

_write_file = Disk.write_file


def _write_when_let(self, path, *arguments):
    trial = path.parents[2]
    while path.name == MANIFEST and (trial / "hold").exists() and any(trial.glob("checkpoints/step-*")):
        time.sleep(0.05)
    return _write_file(self, path, *arguments)


Disk.write_file = _write_when_let
"""  # a save that follows the first one stops before its manifest while the trial holds a file `hold`
ARRAY_FAULTS = {"2": "hang", "3": "error", "4": "gpu_oom", "5": "host_oom"}  # by seed
HOLD = 5  # step at which stub trials wait until their fault has come


def real_sweep(cluster: Cluster, folder: Path) -> LoginNode:
    """Two real trials, over two nodes × two tasks and × one: one told USR2, one killed in the middle of a save and
    requeued by an administrator, while conf/ and the code they were submitted from are edited; until both are done.
    """
    login = LoginNode(cluster, folder, stub=False)
    with (login.clone / "jepa_cluster/training/checkpoint_files.py").open("a") as module:
        module.write(HELD_SAVES)
    file = login.sweep("real_sweep", REAL, AXES)
    warned, requeued = login.submit(file)
    (requeued.path / "hold").touch()
    assert "nothing to do" in login.jepa("submit", str(file), "--yes")
    (login.clone / "jepa_cluster/training/train.py").write_text("raise SystemExit('edited while trials were queued')\n")
    (login.clone / "conf/model/vit_ti.yaml").write_text("model: {name: edited}\n")
    login.wait(lambda: half_there(requeued), "it has saved once, and a second checkpoint is half there")
    job = login.job("real_sweep", requeued)
    there = [p.name for p in requeued.checkpoints.iterdir()]
    (requeued.path / "half.json").write_text(json.dumps({"there": there, "committed": requeued.committed()}))
    signal_all(signal.SIGKILL, login.ranks(job=job))
    (requeued.path / "hold").unlink()
    login.wait(lambda: cluster.jobs()[job] == "FAILED", "Slurm has seen it end")
    cluster.run("scontrol", "requeue", job)
    login.wait_step(warned, 10)
    cluster.run("scancel", "-s", "USR2", login.job("real_sweep", warned), check=False)
    login.wait_done([warned, requeued])
    return login


def half_there(trial: TrialDir) -> bool:
    """Whether a save after the first has written every file but its manifest, and waits."""
    ranks = len(trial.attempts()) and trial.attempts()[0]["world"]
    return bool(trial.committed()) and len(list(trial.checkpoints.glob(".step-*/shard-*"))) == ranks > 0


@dataclass
class ArrayFaults:
    """The sweep whose trials each met a fate of their own. status, why: as told when all had come to rest."""

    login: LoginNode
    trials: dict[str, TrialDir]
    status: dict[str, dict[str, Any]]
    why: dict[str, dict[str, Any]]


def array_faults(cluster: Cluster, folder: Path) -> ArrayFaults:
    """Twelve stub trials of one array, submitted from a shell inside an allocation; faults while they hold; a
    restarted controller in between."""
    login = LoginNode(cluster, folder, stub=True)
    orders(login, hold=HOLD, late=True, **ARRAY_FAULTS)
    names = ("calm", "usr2", "hang", "error", "gpu_oom", "host_oom", "requeued", "cancelled", "racing", "stopped",
             "again", "pending")  # fmt: skip
    file = stub_sweep(login, "array_faults", seeds=len(names), more="limits: {gpus_in_flight: 11}")
    trials = dict(zip(names, login.submit(file, **leaked()), strict=True))
    job = {name: login.job("array_faults", trial) for name, trial in trials.items()}
    for name in ("calm", "usr2", "requeued", "cancelled", "racing", "stopped", "again"):
        login.wait_step(trials[name], HOLD)
    cluster.run("scancel", job["pending"])  # first of all: it waits for the first of the others to end
    login.jepa("cancel", "array_faults", "seed=9", "--yes")
    cluster.run("scancel", "-s", "USR2", job["usr2"], job["again"])
    cluster.run("scontrol", "requeue", job["requeued"])
    cluster.run("scancel", job["cancelled"])
    cluster.run("scancel", "-s", "USR2", job["racing"])
    cluster.run("scancel", job["racing"])
    cluster.restart_controller()
    login.release()
    login.wait_done([trials[n] for n in ("calm", "usr2", "hang", "requeued", "again")])
    wrong = trials["gpu_oom"]
    login.wait(
        lambda: wrong.done.exists() or login.states("array_faults")[wrong.name] == "failed", "it got by, or gave up"
    )
    if not wrong.done.exists():
        login.jepa("retry", "array_faults", "seed=4", "--yes")
    login.wait_done([wrong])
    login.wait(lambda: not cluster.run("squeue", "-h"), "nothing is left in the queue")
    assert "nothing to do" in login.jepa("submit", str(file), "--yes")
    rows = json.loads(login.jepa("status", "array_faults", "--json"))["trials"]
    told = json.loads(login.jepa("why", "array_faults", "--json"))
    return ArrayFaults(
        login,
        trials,
        dict(zip(names, rows, strict=True)),
        {names[d["index"]]: d for d in told},
    )


def a_trial_longer_than_its_time_limit_pauses_and_goes_on(cluster: Cluster, folder: Path) -> None:
    """USR2 ahead of the limit of one minute, checkpoint, requeue, done in the next allocation."""
    login = LoginNode(cluster, folder, stub=True)
    orders(login, hold=HOLD)
    profile = cluster.profile.read_text().replace("signal_seconds: 30", "signal_seconds: 45")
    (folder / "short.yaml").write_text(profile)
    file = stub_sweep(login, "long", "{nodes: 1, procs_per_node: 2, time: 1m}")
    (trial,) = login.submit(file, "--cluster", str(folder / "short.yaml"))
    login.wait(lambda: causes(trial)[:1] == ["preempted"], "Slurm has warned it of its limit")
    login.release()
    login.wait_done([trial])
    assert set(causes(trial)[:-1]) == {"preempted"} and every_step_once(trial), login.evidence()


def a_power_cut_costs_only_the_unsaved_steps(cluster: Cluster, folder: Path) -> None:
    """The node of rank 0 and of the batch script goes dark; Slurm notices and requeues; the trial ends well."""
    login = LoginNode(cluster, folder, stub=True)
    orders(login, hold=HOLD)
    (trial,) = login.submit(stub_sweep(login, "dark", "{nodes: 2, procs_per_node: 1, time: 10m}"))
    login.wait_step(trial, HOLD)
    cluster.power_cut("n1")
    login.wait(lambda: cluster.node_states()["n1"].startswith("down"), "Slurm misses n1")
    assert login.states("dark") != {trial.name: "done"}
    cluster.boot("n1")
    login.release()
    login.wait_done([trial])
    assert causes(trial) == [None, "done"] and every_step_once(trial), login.evidence()


def a_frozen_node_is_replaced_and_does_no_harm_when_it_thaws(cluster: Cluster, folder: Path) -> None:
    """The node hangs with the trial on it and comes back while the next attempt works: the fence holds.

    The old srun thaws too, and now and then Slurm lets it cancel "its" step, which is the new attempt's by then. Such a
    trial is interrupted, and submitting again is what a person, or cron, does about it.
    """
    login = LoginNode(cluster, folder, stub=True)
    orders(login, hold=HOLD)
    (trial,) = login.submit(stub_sweep(login, "ice", "{nodes: 1, procs_per_node: 1, time: 10m}"))
    login.wait_step(trial, HOLD)
    cluster.freeze("n1")
    (trial.path / "alone").unlink()  # the frozen process cannot give its lock back, and it trains nothing meanwhile
    login.wait_step(trial, HOLD, attempt=2)
    cluster.thaw("n1")
    login.release()

    def finished() -> bool:
        if login.states("ice")[trial.name] == "interrupted":
            login.submit(login.folder / "ice.yaml")
        return trial.done.exists()

    login.wait(finished, "the trial is done")
    login.wait_done([trial])
    assert every_step_once(trial) and causes(trial)[-1] == "done", login.evidence()


def slurmd_alone_dies_and_the_trial_is_neither_lost_nor_doubled(cluster: Cluster, folder: Path) -> None:
    """The tasks run on behind Slurm's back while it gives the node up and starts the job again on the other one."""
    login = LoginNode(cluster, folder, stub=True)
    orders(login, hold=HOLD)
    (trial,) = login.submit(stub_sweep(login, "deaf"))
    login.wait_step(trial, HOLD)
    cluster.kill_slurmd("n1")
    (trial.path / "alone").unlink()  # two attempts will live at once: the fence, not a lock, keeps the older one out
    login.wait_step(trial, HOLD, attempt=2)
    login.release()
    login.wait_done([trial])
    login.wait(lambda: len(login.ranks()) == 0, "the older attempt has gone too")
    assert causes(trial)[1] == "done" and every_step_once(trial), login.evidence()


def hosts(trial: TrialDir) -> list[str]:
    """The nodes of each attempt."""
    return [record["job_nodelist"] for record in trial.attempts()]


def a_node_that_breaks_its_trials_is_left_out_when_they_run_again(cluster: Cluster, folder: Path) -> None:
    """n1 fails whatever begins there: each trial comes back without it, and after two faults `submit` leaves it out."""
    login = LoginNode(cluster, folder, stub=True)
    orders(login, broken="n1")
    trials = login.submit(stub_sweep(login, "broken", seeds=2))
    login.wait_done(trials)
    assert list(map(hosts, trials)) == [["n1", "n2"]] * 2, login.evidence()
    for trial in trials:
        record = trial.attempts()[0]
        assert (record["cause"], record["node"], record["excluded"]) == ("error", "n1", ["n1"])
        assert every_step_once(trial)
    assert json.loads(login.jepa("nodes", "--json"))["n1"]["score"] > 1.9
    assert len(login.arrays("broken")) == 1
    file = login.sweep("later", TINY, f"seeds: [9]\nresources:\n  - {SMALL}\n")
    (later,) = json.loads(login.jepa("submit", str(file), "--dry-run", "--json"))
    assert "#SBATCH --exclude=n1\n" in later["script"], "the ledger counts for what is submitted"


def a_trial_that_saved_while_the_controller_was_down_goes_back_to_the_queue_later(
    cluster: Cluster, folder: Path
) -> None:
    """USR2 with nobody there to take the requeue; `jepa status` says that Slurm does not answer, and loses nothing."""
    login = LoginNode(cluster, folder, stub=True)
    orders(login, hold=HOLD)
    (trial,) = login.submit(stub_sweep(login, "alone"))
    login.wait_step(trial, HOLD)
    cluster.stop_controller()
    signal_all(signal.SIGUSR2, login.ranks("n1"))
    login.wait(lambda: causes(trial) == ["preempted"], "it has saved")
    status = json.loads(login.jepa("status", "alone", "--json"))
    assert status["problem"] and status["trials"][0]["state"] in ("running", "unknown"), status
    checks = json.loads(login.jepa("doctor", "--json", check=False))
    assert [c["hint"] for c in checks if c["what"] == "Slurm answers"] != [""], checks
    login.release()
    cluster.start_controller()
    login.wait_done([trial])
    assert causes(trial) == ["preempted", "done"] and every_step_once(trial), login.evidence()


def with_accounting_a_cancelled_trial_stays_cancelled_until_somebody_resumes_it(cluster: Cluster, folder: Path) -> None:
    """scancel of a running and of a pending index: stopped in the status, left alone by submit, taken up by resume;
    slurmdbd goes down meanwhile, and a sweep that is submitted then runs all the same."""
    login = LoginNode(cluster, folder, stub=True)
    orders(login, hold=HOLD)
    file = stub_sweep(login, "word", seeds=2, more="limits: {gpus_in_flight: 1}")
    running, pending = login.submit(file)
    login.wait_step(running, HOLD)
    cluster.run("scancel", login.job("word", pending), login.job("word", running))
    login.wait(lambda: set(login.states("word").values()) == {"stopped"}, "status says stopped")
    assert "nothing to do" in login.jepa("submit", str(file), "--yes")
    login.release()
    cluster.stop_accounting()
    assert set(login.states("word").values()) <= {"stopped", "unknown"}, "slurmdbd is down: not forgotten"
    other = login.submit(login.sweep("blind", TINY, f"seeds: [7]\nresources:\n  - {SMALL}\n"))
    login.wait_done(other)
    assert set(login.states("blind").values()) == {"done"}
    cluster.start_accounting()
    login.jepa("resume", "word", "--yes")
    login.wait_done([running, pending])
    assert every_step_once(running) and every_step_once(pending), login.evidence()


def requeue_is_disabled_and_the_trial_goes_on_all_the_same(cluster: Cluster, folder: Path) -> None:
    """JobRequeue=0: our jobs ask for it themselves. An administrator takes even that away: what was saved while
    Slurm refuses is found interrupted, and `jepa submit`, as from cron, takes it up."""
    cluster.reconfigure(requeue=False)
    login = LoginNode(cluster, folder, stub=True)
    orders(login, hold=HOLD)
    file = stub_sweep(login, "refused")
    (trial,) = login.submit(file)
    login.wait_step(trial, HOLD)
    cluster.run("scancel", "-s", "USR2", login.job("refused", trial))
    login.wait(lambda: trial.newest_attempt() == 2, "it is requeued because it asked for it")
    login.wait(lambda: cluster.jobs()[login.job("refused", trial)] == "RUNNING", "Slurm says so too")
    cluster.run("scontrol", "update", f"jobid={login.job('refused', trial)}", "requeue=0")
    cluster.run("scancel", "-s", "USR2", login.job("refused", trial))
    login.wait(lambda: causes(trial) == ["preempted", "preempted"], "it has saved again")
    login.release()

    def finished() -> bool:
        if login.states("refused")[trial.name] == "interrupted":
            login.submit(file)
        return trial.done.exists()

    login.wait(finished, "the trial is done")
    login.wait_done([trial])
    assert causes(trial) == ["preempted", "preempted", "done"] and every_step_once(trial), login.evidence()


def a_multirun_trains_into_trial_directories_resumes_after_a_requeue_and_fails_as_a_job(
    cluster: Cluster, folder: Path
) -> None:
    """Hydra's own command line; three seeds: one undisturbed, one sent back by USR2, one with a bug."""
    login = LoginNode(cluster, folder, stub=True)
    orders(login, hold=HOLD, **{"2": "error"})
    launcher = ("-m", "hydra/launcher=slurm", "hydra.launcher.partition=low", "hydra.launcher.timeout_min=10")
    words = [sys.executable, "-m", "jepa_cluster", *launcher, *TINY, "seed=0,1,2", "runtime.compile=false"]
    environment = {**cluster.env, **login.environment()}
    person = subprocess.Popen(words, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    begun = lambda: len(list(login.root.trials.glob("*-s*/attempts/*.json"))) >= 3  # noqa: E731
    login.wait(lambda: begun() or person.poll() is not None, "three trials have begun")
    assert begun(), person.communicate()[0].decode()
    found = {
        int(p.name.rsplit("-s", 1)[1].split("-")[0]): login.root.trial(p.name) for p in login.root.trials.glob("*-s*")
    }
    login.wait_step(found[1], HOLD)
    second = next(job for job in cluster.jobs() if job.endswith("_1"))
    cluster.run("scancel", "-s", "USR2", second)
    login.wait(lambda: causes(found[1])[:1] == ["preempted"], "it has saved")
    login.release()
    login.wait_done([found[0], found[1]])
    login.wait(lambda: person.poll() is not None, "the launcher has seen all jobs end")
    out = person.communicate()[0].decode()
    assert causes(found[1]) == ["preempted", "done"] and every_step_once(found[1]), login.evidence()
    assert causes(found[2]) == ["error"] and found[2].failed.exists()
    assert person.returncode != 0, out  # one of its jobs failed, and Hydra says so
    states = cluster.jobs()
    assert {states[job] for job in states if job.endswith("_2")} == {"FAILED"}, states
    assert {states[job] for job in states if not job.endswith("_2")} == {"COMPLETED"}, states
    after = login.sweep("after", (*TINY, "runtime.compile=false"), f"seeds: [0, 1]\nresources:\n  - {SMALL}\n")
    plan = json.loads(login.jepa("plan", str(after), "--json"))
    names = {t["name"]: t["action"] for t in plan["trials"]}
    assert names == {found[0].name: "done", found[1].name: "done"}, "a sweep of the same settings means the same trials"


def preemption_by_term_alone_saves_and_comes_back(cluster: Cluster, folder: Path) -> None:
    """A stock cluster: TERM, the grace period, KILL."""
    pushed(cluster, folder)


def preemption_that_sends_the_user_signal_first_saves_and_comes_back(cluster: Cluster, folder: Path) -> None:
    """A cluster with preempt_send_user_signal: USR2 first."""
    cluster.reconfigure(preempt_user_signal=True)
    pushed(cluster, folder)


def pushed(cluster: Cluster, folder: Path) -> None:
    login = LoginNode(cluster, folder, stub=True)
    orders(login, hold=HOLD)
    (trial,) = login.submit(stub_sweep(login, "pushed", "{nodes: 2, procs_per_node: 2, time: 10m}"))
    login.wait_step(trial, HOLD)
    cluster.run("sbatch", "-p", "high", "-N2", "-c16", "--wrap", "sleep 2", cwd=folder)
    login.wait(lambda: causes(trial)[:1] == ["preempted"], "it has made room")
    login.release()
    login.wait_done([trial])
    assert causes(trial) == ["preempted", "done"] and every_step_once(trial), login.evidence()


def a_sweep_under_random_faults_ends_complete(cluster: Cluster, folder: Path, faults: int = 9) -> None:
    """Signals, requeues, kill -9, power cuts, a restarted controller, drawn from a seed; `jepa submit` as from cron."""
    stress(LoginNode(cluster, folder, stub=True), seeds=max(4, faults // 2), faults=faults)


def stress(login: LoginNode, seeds: int, faults: int, seconds: float = 0.5) -> Counter[str]:
    """A sweep of stub trials, and faults drawn from a seed while it runs, until it is complete -> what happened.

    AssertionError when a step is lost or doubled, or when two attempts of a trial trained at the same time.
    """
    dice, done = random.Random(faults), Counter[str]()
    orders(login, seconds=seconds)
    file = stub_sweep(login, "stress", seeds=seeds, more=f"retries: {dict.fromkeys(BUDGETS, 1000)}")
    trials = login.submit(file)

    def complete() -> bool:
        """As from cron, and an administrator who brings nodes back."""
        for node, state in login.cluster.node_states().items():
            if state.startswith(("down", "drain")):
                login.cluster.run("scontrol", "update", f"nodename={node}", "state=resume", check=False)
        login.jepa("submit", str(file), "--yes", check=False)
        return all(trial.done.exists() for trial in trials)

    while done.total() < faults and not all(trial.done.exists() for trial in trials):
        time.sleep(dice.uniform(1, 4))
        fault = strike(login, dice)
        done += Counter([fault] if fault else [])
        if not fault:  # perhaps nothing runs because all that is left waits for somebody to submit it
            complete()

    login.wait(complete, "the sweep is complete", PATIENCE + 5 * seeds)
    login.wait_done(trials)
    assert all(every_step_once(trial) for trial in trials), login.evidence()
    assert not (login.root.path / "twice").exists(), "two attempts of one trial trained at the same time"
    done["trials"], done["attempts"] = len(trials), sum(len(t.attempts()) for t in trials)
    done["trainings"] = sum((t.path / "trained").read_text().count("\n") for t in trials)
    return done


ASKED = f"""\
question: Does it come back?
base: [model=vit_ti, data=synthetic, optim.epochs=null, optim.steps={STEPS}, optim.warmup_epochs=null,
       optim.warmup_steps=2, optim.batch=8]
grid: {{model: [vit_ti, vit_s]}}
seeds: [0, 1, 2]
resources:
  - {{when: model == 'vit_s', nodes: 2, procs_per_node: 2, time: 2h}}
  - {{nodes: 1, procs_per_node: 2, time: 1h}}
limits: {{gpu_hours: 100, gpus_in_flight: 6}}
"""


def transcripts(cluster: Cluster, folder: Path) -> dict[str, str]:
    """What a person types and sees: command -> output, with this machine's paths taken out. `ask.yaml` -> the file."""
    login = LoginNode(cluster, folder, stub=True)
    orders(login, hold=HOLD, **{"0": "error"})
    (folder / "ask.yaml").write_text(ASKED)
    paths = {str(login.root.path): "$JEPA_ROOT", str(login.clone): "~/jepa-cluster", str(folder): "~"}
    paths |= {sys.executable: "python", str(Path(sys.executable).parents[1]): "~/jepa-cluster/.venv"}
    told = {"ask.yaml": ASKED}

    def type_(*words: str) -> str:
        out = login.jepa(*words, check=False)
        for path, name in paths.items():
            out = out.replace(path, name)
        told[f"jepa {' '.join(words)}"] = "\n".join(line.rstrip() for line in out.splitlines()).strip("\n") + "\n"
        return out

    type_("doctor", "--node")
    type_("plan", "ask.yaml")
    type_("submit", "ask.yaml", "--yes")
    small, large = login.trials("ask")[:3], login.trials("ask")[3:]
    for trial in (small[1], large[1]):
        login.wait_step(trial, HOLD)
    login.wait(lambda: type_("status", "ask").count("held back") == 2, "the last of each class waits for its turn")
    type_("why", "ask", "model=vit_ti", "seed=0")
    return told


BUDGETS = ("timeout", "node", "hang", "killed")


def strike(login: LoginNode, dice: random.Random) -> str:
    """One fault -> its name; '' when there was nothing to strike."""
    cluster = login.cluster
    node = dice.choice(cluster.nodes)
    fault = dice.choice(["USR2", "TERM", "requeue", "kill", "power cut", "controller"])
    running = [job for job, state in cluster.jobs().items() if state == "RUNNING"]
    victims = login.ranks(node)
    if fault in ("USR2", "TERM") and running:
        cluster.run("scancel", "-s", fault, dice.choice(running), check=False)
    elif fault == "requeue" and running:
        cluster.run("scontrol", "requeue", dice.choice(running), check=False)
    elif fault == "kill" and victims:
        signal_all(signal.SIGKILL, [dice.choice(victims)])
    elif fault == "power cut" and victims:
        cluster.power_cut(node)
        cluster.boot(node)
    elif fault == "controller" and running:
        cluster.restart_controller()
    else:
        return ""
    return fault

"""Faults that take Slurm a while to notice, each on a private cluster of its own, all at once in the background.

A function here is the body of the test of the same name in test_waiting.py, but for `night` and `fates`, whose ends
test_sweep.py and test_fates.py look at. conftest starts those that were selected.
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

from desk import PATIENCE, SMALL, STEPS, TINY, Desk, causes, every_step_once, leaked, orders, stub_sweep
from processes import signal_all
from testcluster import Cluster

from jepa_cluster.trial.directory import TrialDir

NIGHT_STEPS = 100
REAL = (
    "model=vit_ti", "model.patch=8", "model.image=48", "model.depth=2", "model.heads=2", "model.mlp_ratio=2.0",
    "predictor.width=16", "predictor.depth=2", "predictor.heads=2", "mask.targets=2", "data=synthetic",
    f"optim.steps={NIGHT_STEPS}", "optim.warmup_steps=4", "optim.batch=16", "optim.precision=fp32",
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
FATES = {"2": "hang", "3": "error", "4": "gpu_oom", "5": "host_oom"}  # by seed
HOLD = 5  # step at which stub trials wait until their fault has come


def night(cluster: Cluster, folder: Path) -> Desk:
    """Two real trials, over two nodes × two tasks and × one: one told USR2, one killed in the middle of a save and
    requeued by an administrator, while conf/ and the code they were submitted from are edited; until both are done.
    """
    desk = Desk(cluster, folder, stub=False)
    with (desk.clone / "jepa_cluster/training/checkpoint_files.py").open("a") as module:
        module.write(HELD_SAVES)
    file = desk.sweep("night", REAL, AXES)
    warned, requeued = desk.submit(file)
    (requeued.path / "hold").touch()
    assert "nothing to do" in desk.jepa("submit", str(file), "--yes")
    (desk.clone / "jepa_cluster/training/train.py").write_text("raise SystemExit('edited while trials were queued')\n")
    (desk.clone / "conf/model/vit_ti.yaml").write_text("model: {name: edited}\n")
    desk.wait(lambda: half_there(requeued), "it has saved once, and a second checkpoint is half there")
    job = desk.job("night", requeued)
    there = [p.name for p in requeued.checkpoints.iterdir()]
    (requeued.path / "half.json").write_text(json.dumps({"there": there, "committed": requeued.committed()}))
    signal_all(signal.SIGKILL, desk.ranks(job=job))
    (requeued.path / "hold").unlink()
    desk.wait(lambda: cluster.jobs()[job] == "FAILED", "Slurm has seen it end")
    cluster.run("scontrol", "requeue", job)
    desk.wait_step(warned, 10)
    cluster.run("scancel", "-s", "USR2", desk.job("night", warned), check=False)
    desk.wait_done([warned, requeued])
    return desk


def half_there(trial: TrialDir) -> bool:
    """Whether a save after the first has written every file but its manifest, and waits."""
    ranks = len(trial.attempts()) and trial.attempts()[0]["world"]
    return bool(trial.committed()) and len(list(trial.checkpoints.glob(".step-*/shard-*"))) == ranks > 0


@dataclass
class Fates:
    """The sweep whose trials each met a fate of their own. status, why: as told when all had come to rest."""

    desk: Desk
    trials: dict[str, TrialDir]
    status: dict[str, dict[str, Any]]
    why: dict[str, dict[str, Any]]


def fates(cluster: Cluster, folder: Path) -> Fates:
    """Twelve stub trials of one array, submitted from a shell inside an allocation; faults while they hold; a
    restarted controller in between."""
    desk = Desk(cluster, folder, stub=True)
    orders(desk, hold=HOLD, late=True, **FATES)
    names = ("calm", "usr2", "hang", "error", "gpu_oom", "host_oom", "requeued", "cancelled", "racing", "stopped",
             "again", "pending")  # fmt: skip
    file = stub_sweep(desk, "fates", seeds=len(names), more="limits: {gpus_in_flight: 11}")
    trials = dict(zip(names, desk.submit(file, **leaked()), strict=True))
    job = {name: desk.job("fates", trial) for name, trial in trials.items()}
    for name in ("calm", "usr2", "requeued", "cancelled", "racing", "stopped", "again"):
        desk.wait_step(trials[name], HOLD)
    cluster.run("scancel", job["pending"])  # first of all: it waits for the first of the others to end
    desk.jepa("cancel", "fates", "seed=9", "--yes")
    cluster.run("scancel", "-s", "USR2", job["usr2"], job["again"])
    cluster.run("scontrol", "requeue", job["requeued"])
    cluster.run("scancel", job["cancelled"])
    cluster.run("scancel", "-s", "USR2", job["racing"])
    cluster.run("scancel", job["racing"])
    cluster.restart_controller()
    desk.release()
    desk.wait_done([trials[n] for n in ("calm", "usr2", "hang", "requeued", "again")])
    wrong = trials["gpu_oom"]
    desk.wait(lambda: wrong.done.exists() or desk.states("fates")[wrong.name] == "failed", "it got by, or gave up")
    if not wrong.done.exists():
        desk.jepa("retry", "fates", "seed=4", "--yes")
    desk.wait_done([wrong])
    desk.wait(lambda: not cluster.run("squeue", "-h"), "nothing is left in the queue")
    assert "nothing to do" in desk.jepa("submit", str(file), "--yes")
    rows = json.loads(desk.jepa("status", "fates", "--json"))["trials"]
    told = json.loads(desk.jepa("why", "fates", "--json"))
    return Fates(
        desk,
        trials,
        dict(zip(names, rows, strict=True)),
        {names[d["index"]]: d for d in told},
    )


def a_trial_longer_than_its_time_limit_pauses_and_goes_on(cluster: Cluster, folder: Path) -> None:
    """USR2 ahead of the limit of one minute, checkpoint, requeue, done in the next allocation."""
    desk = Desk(cluster, folder, stub=True)
    orders(desk, hold=HOLD)
    profile = cluster.profile.read_text().replace("signal_seconds: 30", "signal_seconds: 45")
    (folder / "short.yaml").write_text(profile)
    file = stub_sweep(desk, "long", "{nodes: 1, procs_per_node: 2, time: 1m}")
    (trial,) = desk.submit(file, "--cluster", str(folder / "short.yaml"))
    desk.wait(lambda: causes(trial)[:1] == ["preempted"], "Slurm has warned it of its limit")
    desk.release()
    desk.wait_done([trial])
    assert set(causes(trial)[:-1]) == {"preempted"} and every_step_once(trial), desk.evidence()


def a_power_cut_costs_only_the_unsaved_steps(cluster: Cluster, folder: Path) -> None:
    """The node of rank 0 and of the batch script goes dark; Slurm notices and requeues; the trial ends well."""
    desk = Desk(cluster, folder, stub=True)
    orders(desk, hold=HOLD)
    (trial,) = desk.submit(stub_sweep(desk, "dark", "{nodes: 2, procs_per_node: 1, time: 10m}"))
    desk.wait_step(trial, HOLD)
    cluster.power_cut("n1")
    desk.wait(lambda: cluster.node_states()["n1"].startswith("down"), "Slurm misses n1")
    assert desk.states("dark") != {trial.name: "done"}
    cluster.boot("n1")
    desk.release()
    desk.wait_done([trial])
    assert causes(trial) == [None, "done"] and every_step_once(trial), desk.evidence()


def a_frozen_node_is_replaced_and_does_no_harm_when_it_thaws(cluster: Cluster, folder: Path) -> None:
    """The node hangs with the trial on it and comes back while the next attempt works: the fence holds.

    The old srun thaws too, and now and then Slurm lets it cancel "its" step, which is the new attempt's by then. Such a
    trial is interrupted, and submitting again is what a person, or cron, does about it.
    """
    desk = Desk(cluster, folder, stub=True)
    orders(desk, hold=HOLD)
    (trial,) = desk.submit(stub_sweep(desk, "ice", "{nodes: 1, procs_per_node: 1, time: 10m}"))
    desk.wait_step(trial, HOLD)
    cluster.freeze("n1")
    (trial.path / "alone").unlink()  # the frozen process cannot give its lock back, and it trains nothing meanwhile
    desk.wait_step(trial, HOLD, attempt=2)
    cluster.thaw("n1")
    desk.release()

    def finished() -> bool:
        if desk.states("ice")[trial.name] == "interrupted":
            desk.submit(desk.folder / "ice.yaml")
        return trial.done.exists()

    desk.wait(finished, "the trial is done")
    desk.wait_done([trial])
    assert every_step_once(trial) and causes(trial)[-1] == "done", desk.evidence()


def slurmd_alone_dies_and_the_trial_is_neither_lost_nor_doubled(cluster: Cluster, folder: Path) -> None:
    """The tasks run on behind Slurm's back while it gives the node up and starts the job again on the other one."""
    desk = Desk(cluster, folder, stub=True)
    orders(desk, hold=HOLD)
    (trial,) = desk.submit(stub_sweep(desk, "deaf"))
    desk.wait_step(trial, HOLD)
    cluster.kill_slurmd("n1")
    (trial.path / "alone").unlink()  # two attempts will live at once: the fence, not a lock, keeps the older one out
    desk.wait_step(trial, HOLD, attempt=2)
    desk.release()
    desk.wait_done([trial])
    desk.wait(lambda: len(desk.ranks()) == 0, "the older attempt has gone too")
    assert causes(trial)[1] == "done" and every_step_once(trial), desk.evidence()


def hosts(trial: TrialDir) -> list[str]:
    """The nodes of each attempt."""
    return [record["job_nodelist"] for record in trial.attempts()]


def a_node_that_breaks_its_trials_is_left_out_when_they_run_again(cluster: Cluster, folder: Path) -> None:
    """n1 fails whatever begins there: each trial comes back without it, and after two faults `submit` leaves it out."""
    desk = Desk(cluster, folder, stub=True)
    orders(desk, broken="n1")
    trials = desk.submit(stub_sweep(desk, "broken", seeds=2))
    desk.wait_done(trials)
    assert list(map(hosts, trials)) == [["n1", "n2"]] * 2, desk.evidence()
    for trial in trials:
        record = trial.attempts()[0]
        assert (record["cause"], record["node"], record["excluded"]) == ("error", "n1", ["n1"])
        assert every_step_once(trial)
    assert json.loads(desk.jepa("nodes", "--json"))["n1"]["score"] > 1.9
    assert len(desk.arrays("broken")) == 1
    file = desk.sweep("later", TINY, f"seeds: [9]\nresources:\n  - {SMALL}\n")
    (later,) = json.loads(desk.jepa("submit", str(file), "--dry-run", "--json"))
    assert "#SBATCH --exclude=n1\n" in later["script"], "the ledger counts for what is submitted"


def a_trial_that_saved_while_the_controller_was_down_goes_back_to_the_queue_later(
    cluster: Cluster, folder: Path
) -> None:
    """USR2 with nobody there to take the requeue; `jepa status` says that Slurm does not answer, and loses nothing."""
    desk = Desk(cluster, folder, stub=True)
    orders(desk, hold=HOLD)
    (trial,) = desk.submit(stub_sweep(desk, "alone"))
    desk.wait_step(trial, HOLD)
    cluster.stop_controller()
    signal_all(signal.SIGUSR2, desk.ranks("n1"))
    desk.wait(lambda: causes(trial) == ["preempted"], "it has saved")
    status = json.loads(desk.jepa("status", "alone", "--json"))
    assert status["problem"] and status["trials"][0]["state"] in ("running", "unknown"), status
    checks = json.loads(desk.jepa("doctor", "--json", check=False))
    assert [c["now"] for c in checks if c["what"] == "Slurm answers"] != [""], checks
    desk.release()
    cluster.start_controller()
    desk.wait_done([trial])
    assert causes(trial) == ["preempted", "done"] and every_step_once(trial), desk.evidence()


def with_accounting_a_cancelled_trial_stays_cancelled_until_somebody_resumes_it(cluster: Cluster, folder: Path) -> None:
    """scancel of a running and of a pending index: stopped in the status, left alone by submit, taken up by resume;
    slurmdbd goes down meanwhile, and a sweep that is submitted then runs all the same."""
    desk = Desk(cluster, folder, stub=True)
    orders(desk, hold=HOLD)
    file = stub_sweep(desk, "word", seeds=2, more="limits: {gpus_in_flight: 1}")
    running, pending = desk.submit(file)
    desk.wait_step(running, HOLD)
    cluster.run("scancel", desk.job("word", pending), desk.job("word", running))
    desk.wait(lambda: set(desk.states("word").values()) == {"stopped"}, "status says stopped")
    assert "nothing to do" in desk.jepa("submit", str(file), "--yes")
    desk.release()
    cluster.stop_accounting()
    assert set(desk.states("word").values()) <= {"stopped", "unknown"}, "slurmdbd is down: not forgotten"
    other = desk.submit(desk.sweep("blind", TINY, f"seeds: [7]\nresources:\n  - {SMALL}\n"))
    desk.wait_done(other)
    assert set(desk.states("blind").values()) == {"done"}
    cluster.start_accounting()
    desk.jepa("resume", "word", "--yes")
    desk.wait_done([running, pending])
    assert every_step_once(running) and every_step_once(pending), desk.evidence()


def requeue_is_disabled_and_the_trial_goes_on_all_the_same(cluster: Cluster, folder: Path) -> None:
    """JobRequeue=0: our jobs ask for it themselves. An administrator takes even that away: what was saved while
    Slurm refuses is found interrupted, and `jepa submit`, as from cron, takes it up."""
    cluster.reconfigure(requeue=False)
    desk = Desk(cluster, folder, stub=True)
    orders(desk, hold=HOLD)
    file = stub_sweep(desk, "refused")
    (trial,) = desk.submit(file)
    desk.wait_step(trial, HOLD)
    cluster.run("scancel", "-s", "USR2", desk.job("refused", trial))
    desk.wait(lambda: trial.newest_attempt() == 2, "it is requeued because it asked for it")
    desk.wait(lambda: cluster.jobs()[desk.job("refused", trial)] == "RUNNING", "Slurm says so too")
    cluster.run("scontrol", "update", f"jobid={desk.job('refused', trial)}", "requeue=0")
    cluster.run("scancel", "-s", "USR2", desk.job("refused", trial))
    desk.wait(lambda: causes(trial) == ["preempted", "preempted"], "it has saved again")
    desk.release()

    def finished() -> bool:
        if desk.states("refused")[trial.name] == "interrupted":
            desk.submit(file)
        return trial.done.exists()

    desk.wait(finished, "the trial is done")
    desk.wait_done([trial])
    assert causes(trial) == ["preempted", "preempted", "done"] and every_step_once(trial), desk.evidence()


def a_multirun_trains_into_trial_directories_resumes_after_a_requeue_and_fails_as_a_job(
    cluster: Cluster, folder: Path
) -> None:
    """Hydra's own command line; three seeds: one undisturbed, one sent back by USR2, one with a bug."""
    desk = Desk(cluster, folder, stub=True)
    orders(desk, hold=HOLD, **{"2": "error"})
    launcher = ("-m", "hydra/launcher=slurm", "hydra.launcher.partition=low", "hydra.launcher.timeout_min=10")
    words = [sys.executable, "-m", "jepa_cluster", *launcher, *TINY, "seed=0,1,2", "runtime.compile=false"]
    environment = {**cluster.env, **desk.environment()}
    person = subprocess.Popen(words, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    begun = lambda: len(list(desk.root.trials.glob("*-s*/attempts/*.json"))) >= 3  # noqa: E731
    desk.wait(lambda: begun() or person.poll() is not None, "three trials have begun")
    assert begun(), person.communicate()[0].decode()
    found = {
        int(p.name.rsplit("-s", 1)[1].split("-")[0]): desk.root.trial(p.name) for p in desk.root.trials.glob("*-s*")
    }
    desk.wait_step(found[1], HOLD)
    second = next(job for job in cluster.jobs() if job.endswith("_1"))
    cluster.run("scancel", "-s", "USR2", second)
    desk.wait(lambda: causes(found[1])[:1] == ["preempted"], "it has saved")
    desk.release()
    desk.wait_done([found[0], found[1]])
    desk.wait(lambda: person.poll() is not None, "the launcher has seen all jobs end")
    out = person.communicate()[0].decode()
    assert causes(found[1]) == ["preempted", "done"] and every_step_once(found[1]), desk.evidence()
    assert causes(found[2]) == ["error"] and found[2].failed.exists()
    assert person.returncode != 0, out  # one of its jobs failed, and Hydra says so
    states = cluster.jobs()
    assert {states[job] for job in states if job.endswith("_2")} == {"FAILED"}, states
    assert {states[job] for job in states if not job.endswith("_2")} == {"COMPLETED"}, states
    after = desk.sweep("after", (*TINY, "runtime.compile=false"), f"seeds: [0, 1]\nresources:\n  - {SMALL}\n")
    plan = json.loads(desk.jepa("plan", str(after), "--json"))
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
    desk = Desk(cluster, folder, stub=True)
    orders(desk, hold=HOLD)
    (trial,) = desk.submit(stub_sweep(desk, "pushed", "{nodes: 2, procs_per_node: 2, time: 10m}"))
    desk.wait_step(trial, HOLD)
    cluster.run("sbatch", "-p", "high", "-N2", "-c16", "--wrap", "sleep 2", cwd=folder)
    desk.wait(lambda: causes(trial)[:1] == ["preempted"], "it has made room")
    desk.release()
    desk.wait_done([trial])
    assert causes(trial) == ["preempted", "done"] and every_step_once(trial), desk.evidence()


def a_sweep_under_random_faults_ends_complete(cluster: Cluster, folder: Path, faults: int = 9) -> None:
    """Signals, requeues, kill -9, power cuts, a restarted controller, drawn from a seed; `jepa submit` as from cron."""
    storm(Desk(cluster, folder, stub=True), seeds=max(4, faults // 2), faults=faults)


def storm(desk: Desk, seeds: int, faults: int, seconds: float = 0.5) -> Counter[str]:
    """A sweep of stub trials, and faults drawn from a seed while it runs, until it is complete -> what happened.

    AssertionError when a step is lost or doubled, or when two attempts of a trial trained at the same time.
    """
    dice, done = random.Random(faults), Counter[str]()
    orders(desk, seconds=seconds)
    file = stub_sweep(desk, "storm", seeds=seeds, more=f"retries: {dict.fromkeys(BUDGETS, 1000)}")
    trials = desk.submit(file)

    def complete() -> bool:
        """As from cron, and an administrator who brings nodes back."""
        for node, state in desk.cluster.node_states().items():
            if state.startswith(("down", "drain")):
                desk.cluster.run("scontrol", "update", f"nodename={node}", "state=resume", check=False)
        desk.jepa("submit", str(file), "--yes", check=False)
        return all(trial.done.exists() for trial in trials)

    while done.total() < faults and not all(trial.done.exists() for trial in trials):
        time.sleep(dice.uniform(1, 4))
        fault = strike(desk, dice)
        done += Counter([fault] if fault else [])
        if not fault:  # perhaps nothing runs because all that is left waits for somebody to submit it
            complete()

    desk.wait(complete, "the sweep is complete", PATIENCE + 5 * seeds)
    desk.wait_done(trials)
    assert all(every_step_once(trial) for trial in trials), desk.evidence()
    assert not (desk.root.path / "twice").exists(), "two attempts of one trial trained at the same time"
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
    desk = Desk(cluster, folder, stub=True)
    orders(desk, hold=HOLD, **{"0": "error"})
    (folder / "ask.yaml").write_text(ASKED)
    paths = {str(desk.root.path): "$JEPA_ROOT", str(desk.clone): "~/jepa-cluster", str(folder): "~"}
    paths |= {sys.executable: "python", str(Path(sys.executable).parents[1]): "~/jepa-cluster/.venv"}
    told = {"ask.yaml": ASKED}

    def type_(*words: str) -> str:
        out = desk.jepa(*words, check=False)
        for path, name in paths.items():
            out = out.replace(path, name)
        told[f"jepa {' '.join(words)}"] = "\n".join(line.rstrip() for line in out.splitlines()).strip("\n") + "\n"
        return out

    type_("doctor", "--node")
    type_("plan", "ask.yaml")
    type_("submit", "ask.yaml", "--yes")
    small, large = desk.trials("ask")[:3], desk.trials("ask")[3:]
    for trial in (small[1], large[1]):
        desk.wait_step(trial, HOLD)
    desk.wait(lambda: type_("status", "ask").count("held back") == 2, "the last of each class waits for its turn")
    type_("why", "ask", "model=vit_ti", "seed=0")
    return told


BUDGETS = ("timeout", "node", "hang", "killed")


def strike(desk: Desk, dice: random.Random) -> str:
    """One fault -> its name; '' when there was nothing to strike."""
    cluster = desk.cluster
    node = dice.choice(cluster.nodes)
    fault = dice.choice(["USR2", "TERM", "requeue", "kill", "power cut", "controller"])
    running = [job for job, state in cluster.jobs().items() if state == "RUNNING"]
    victims = desk.ranks(node)
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

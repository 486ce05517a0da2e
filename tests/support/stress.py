"""Random faults on a private Slurm while a sweep of stub trials runs."""

import random
import signal
import time
from collections import Counter
from pathlib import Path

from processes import signal_all
from support.login_node import PATIENCE, LoginNode, every_step_once, orders, stub_sweep
from testcluster import Cluster

RETRIES = dict.fromkeys(("timeout", "node", "hang", "killed"), 1000)
FAULTS = ["USR2", "TERM", "requeue", "kill", "power cut", "controller"]


def a_sweep_under_random_faults_ends_complete(
    cluster: Cluster, folder: Path, faults: int = 9
) -> None:
    """Signals, requeues, kill -9, power cuts, restarts of the controller, drawn from a seed."""
    stress(LoginNode(cluster, folder, stub=True), seeds=max(4, faults // 2), faults=faults)


def stress(login: LoginNode, seeds: int, faults: int, seconds: float = 0.5) -> Counter[str]:
    """Run a sweep of stub trials under random faults until it is complete; count the faults.

    AssertionError when a step is lost or doubled, or when two attempts of a trial trained at the
    same time.
    """
    dice = random.Random(faults)
    done = Counter[str]()
    orders(login, seconds=seconds)
    file = stub_sweep(login, "stress", seeds=seeds, more=f"retries: {RETRIES}")
    trials = login.submit(file)

    def all_done() -> bool:
        return all(trial.done.exists() for trial in trials)

    def repair() -> bool:
        """Resume nodes as an administrator would, and submit as cron would."""
        for node, state in login.cluster.node_states().items():
            if state.startswith(("down", "drain")):
                resume = ("scontrol", "update", f"nodename={node}", "state=resume")
                login.cluster.run(*resume, check=False)
        login.jepa("submit", str(file), "--yes", check=False)
        return all_done()

    while done.total() < faults and not all_done():
        time.sleep(dice.uniform(1, 4))
        fault = strike(login, dice)
        if fault:
            done[fault] += 1
        else:  # perhaps nothing runs because the rest must be submitted again
            repair()

    login.wait(repair, "the sweep is complete", PATIENCE + 5 * seeds)
    login.wait_done(trials)
    for trial in trials:
        assert every_step_once(trial), login.evidence()
        done["trials"] += 1
        done["attempts"] += len(trial.attempts())
        done["trainings"] += (trial.path / "trained").read_text().count("\n")
    login.assert_no_overlap()
    return done


def strike(login: LoginNode, dice: random.Random) -> str:
    """Make one fault and return its name; '' when no process was there for it."""
    cluster = login.cluster
    node = dice.choice(cluster.nodes)
    fault = dice.choice(FAULTS)
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

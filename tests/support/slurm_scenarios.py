"""Scenarios whose end several tests look at, each on a private cluster of its own.

test_sweep.py, test_array_faults.py and test_transcripts.py look at them. conftest.py runs those
that were selected in the background. node_scenarios.py and requeue_scenarios.py have the others.
"""

import json
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from processes import signal_all
from support.login_node import (
    HOLD,
    STEPS,
    LoginNode,
    leaked,
    orders,
    stub_sweep,
)
from testcluster import Cluster

from jepa_cluster.trial.directory import TrialDir

REAL_STEPS = 100
REAL = (
    "model=vit_ti",
    "model.patch=8",
    "model.image=48",
    "model.depth=2",
    "model.heads=2",
    "model.mlp_ratio=2.0",
    "predictor.width=16",
    "predictor.depth=2",
    "predictor.heads=2",
    "mask.targets=2",
    "data=synthetic",
    f"optim.steps={REAL_STEPS}",
    "optim.warmup_steps=4",
    "optim.batch=16",
    "optim.precision=fp32",
    "probe.images=100",
    "probe.test_images=64",
    "runtime.log_every=1",
    "runtime.compile=false",
    "runtime.checkpoint_minutes=0.01",
)
AXES = """\
grid:
  model.width: [32, 48]
resources:
  - {when: model.width == 32, nodes: 2, procs_per_node: 2, time: 20m}
  - {nodes: 2, procs_per_node: 1, time: 20m}
"""
# A save after the first one stops before its manifest while the trial holds a file `hold`.
HELD_SAVES = """

_write_file = Disk.write_file


def _write_when_let(self, path, *arguments):
    trial = path.parents[2]
    while path.name == MANIFEST and (trial / "hold").exists():
        if not any(trial.glob("checkpoints/step-*")):
            break
        time.sleep(0.05)
    return _write_file(self, path, *arguments)


Disk.write_file = _write_when_let
"""
ARRAY_FAULTS = {"2": "hang", "3": "error", "4": "gpu_oom", "5": "host_oom"}  # by seed
ARRAY_TRIALS = (  # by seed
    "calm",
    "usr2",
    "hang",
    "error",
    "gpu_oom",
    "host_oom",
    "requeued",
    "cancelled",
    "racing",
    "stopped",
    "again",
    "pending",
)


def real_sweep(cluster: Cluster, folder: Path) -> LoginNode:
    """Two real trials over two nodes, of two tasks per node and of one, until both are done.

    One gets USR2. One is killed in the middle of a save and requeued by an administrator. Meanwhile
    conf/ and the code they were submitted from are edited.
    """
    login = LoginNode(cluster, folder, stub=False)
    with (login.clone / "jepa_cluster/training/checkpoint_files.py").open("a") as module:
        module.write(HELD_SAVES)
    file = login.sweep("real_sweep", REAL, AXES)
    warned, requeued = login.submit(file)
    (requeued.path / "hold").touch()
    assert "nothing to do" in login.jepa("submit", str(file), "--yes")
    edited = "raise SystemExit('edited while trials were queued')\n"
    (login.clone / "jepa_cluster/training/train.py").write_text(edited)
    (login.clone / "conf/model/vit_ti.yaml").write_text("model: {name: edited}\n")
    login.wait(lambda: half_saved(requeued), "a second checkpoint is half written")
    job = login.job("real_sweep", requeued)
    there = [path.name for path in requeued.checkpoints.iterdir()]
    half = {"there": there, "committed": requeued.committed()}
    (requeued.path / "half.json").write_text(json.dumps(half))
    signal_all(signal.SIGKILL, login.ranks(job=job))
    (requeued.path / "hold").unlink()
    login.wait(lambda: cluster.jobs()[job] == "FAILED", "Slurm reports its end")
    cluster.run("scontrol", "requeue", job)
    login.wait_step(warned, 10)
    cluster.run("scancel", "-s", "USR2", login.job("real_sweep", warned), check=False)
    login.wait_done([warned, requeued])
    return login


def half_saved(trial: TrialDir) -> bool:
    """Whether a save after the first has written every file but its manifest, and waits."""
    if not trial.committed():
        return False
    written = list(trial.checkpoints.glob(".step-*/shard-*"))
    return len(written) == trial.attempts()[0]["world"]


@dataclass
class ArrayFaults:
    """A sweep with a fault per trial. status, why: when all trials had ended."""

    login: LoginNode
    trials: dict[str, TrialDir]
    status: dict[str, dict[str, Any]]
    why: dict[str, dict[str, Any]]


def array_faults(cluster: Cluster, folder: Path) -> ArrayFaults:
    """Twelve stub trials of one array, with their faults and a restart of the controller.

    They are submitted from a shell inside an allocation.
    """
    login = LoginNode(cluster, folder, stub=True)
    orders(login, hold=HOLD, late=True, **ARRAY_FAULTS)
    limits = "limits: {gpus_in_flight: 11}"
    file = stub_sweep(login, "array_faults", seeds=len(ARRAY_TRIALS), more=limits)
    trials = dict(zip(ARRAY_TRIALS, login.submit(file, **leaked()), strict=True))
    job = {name: login.job("array_faults", trial) for name, trial in trials.items()}
    for name in ("calm", "usr2", "requeued", "cancelled", "racing", "stopped", "again"):
        login.wait_step(trials[name], HOLD)
    # The pending one comes first: it starts when the first of the others ends.
    cluster.run("scancel", job["pending"])
    login.jepa("cancel", "array_faults", "seed=9", "--yes")
    login.send_usr2(job["usr2"], job["again"])
    cluster.run("scontrol", "requeue", job["requeued"])
    cluster.run("scancel", job["cancelled"])
    login.send_usr2(job["racing"])
    cluster.run("scancel", job["racing"])
    cluster.restart_controller()
    login.release()
    login.wait_done([trials[n] for n in ("calm", "usr2", "hang", "requeued", "again")])
    gpu_oom = trials["gpu_oom"]

    def ended() -> bool:
        return gpu_oom.done.exists() or login.states("array_faults")[gpu_oom.name] == "failed"

    login.wait(ended, "the trial with the full GPU is done or failed")
    if not gpu_oom.done.exists():
        login.jepa("retry", "array_faults", "seed=4", "--yes")
    login.wait_done([gpu_oom])
    login.wait(lambda: not cluster.run("squeue", "-h"), "nothing is left in the queue")
    assert "nothing to do" in login.jepa("submit", str(file), "--yes")
    rows = login.status("array_faults")["trials"]
    status = dict(zip(ARRAY_TRIALS, rows, strict=True))
    why: dict[str, dict[str, Any]] = {}
    for answer in json.loads(login.jepa("why", "array_faults", "--json")):
        why[ARRAY_TRIALS[answer["index"]]] = answer
    return ArrayFaults(login, trials, status, why)


ASKED = f"""\
question: Does it come back?
base: [model=vit_ti, data=synthetic, optim.epochs=null, optim.steps={STEPS},
       optim.warmup_epochs=null, optim.warmup_steps=2, optim.batch=8]
grid: {{model: [vit_ti, vit_s]}}
seeds: [0, 1, 2]
resources:
  - {{when: model == 'vit_s', nodes: 2, procs_per_node: 2, time: 2h}}
  - {{nodes: 1, procs_per_node: 2, time: 1h}}
limits: {{gpu_hours: 100, gpus_in_flight: 6}}
"""


def transcripts(cluster: Cluster, folder: Path) -> dict[str, str]:
    """The commands of a user: command -> output, without this machine's paths.

    `ask.yaml` -> the file.
    """
    login = LoginNode(cluster, folder, stub=True)
    orders(login, hold=HOLD, **{"0": "error"})
    (folder / "ask.yaml").write_text(ASKED)
    paths = {
        str(login.root.path): "$JEPA_ROOT",
        str(login.clone): "~/jepa-cluster",
        str(folder): "~",
        sys.executable: "python",
        str(Path(sys.executable).parents[1]): "~/jepa-cluster/.venv",
    }
    outputs = {"ask.yaml": ASKED}

    def enter(*words: str) -> str:
        output = login.jepa(*words, check=False)
        for path, name in paths.items():
            output = output.replace(path, name)
        lines = [line.rstrip() for line in output.splitlines()]
        outputs[f"jepa {' '.join(words)}"] = "\n".join(lines).strip("\n") + "\n"
        return output

    enter("doctor", "--node")
    enter("plan", "ask.yaml")
    enter("submit", "ask.yaml", "--yes")
    trials = login.trials("ask")
    for trial in (trials[1], trials[4]):
        login.wait_step(trial, HOLD)
    login.wait(
        lambda: enter("status", "ask").count("held back") == 2,
        "the last trial of each class is held back",
    )
    enter("why", "ask", "model=vit_ti", "seed=0")
    return outputs

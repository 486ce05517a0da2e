"""A person at a login node: a clone of the code, a root, a cluster profile, and the `jepa` command."""

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from processes import read_proc
from testcluster import Cluster

from jepa_cluster.trial import spool
from jepa_cluster.trial.directory import Root, TrialDir
from jepa_cluster.trial.files import write_json

REPOSITORY = Path(__file__).parents[2]
STUBS = {  # what stands in for the modules of training/ that import torch
    "train": (Path(__file__).parent / "stub_train.py").read_text(),
    "distributed": "def final_barrier() -> None: ...\ndef drain_messages() -> None: ...\n",
    "step_metrics": "StepMetrics = dict\n",
    "probe": "def only_probes(row): return {}\n",
}

STEPS = 30
PATIENCE = 400  # s that anything may take on a slow, busy machine before it counts as lost
TINY = (
    "model=vit_ti", "data=synthetic", "optim.epochs=null", f"optim.steps={STEPS}", "optim.warmup_epochs=null",
    "optim.warmup_steps=2", "optim.batch=8",
)  # fmt: skip
SMALL = "{nodes: 1, procs_per_node: 1, time: 10m}"


class LoginNode:
    """stub: trials run stub_train.py instead of training with torch; all that leads there is the product."""

    def __init__(self, cluster: Cluster, folder: Path, stub: bool) -> None:
        self.cluster, self.folder = cluster, folder
        self.root, self.clone, self.data = Root(folder / "root"), folder / "clone", folder / "data"
        for part in ("jepa_cluster", "conf"):
            shutil.copytree(REPOSITORY / part, self.clone / part, ignore=shutil.ignore_patterns("__pycache__"))
        if stub:
            for name, text in STUBS.items():
                (self.clone / f"jepa_cluster/training/{name}.py").write_text(text)
            split = self.data / "train"
            split.mkdir(parents=True)
            empty: dict[str, Any] = {"shards": [], "labels": ["class"], "classes": [], "report": {}}
            write_json(split / "manifest.json", {"version": 1, "digest": "0" * 16, "images": 1000, **empty})

    def environment(self, **more: str) -> dict[str, str]:
        names = {"JEPA_ROOT": self.root.path, "JEPA_CLUSTER": self.cluster.profile, "PYTHONPATH": self.clone}
        return {**{k: str(v) for k, v in names.items()}, "JEPA_DATA": str(self.data), "COLUMNS": "200", **more}

    def jepa(self, *words: str, check: bool = True, **more: str) -> str:
        """The console script, from this login's clone -> stdout."""
        command = (sys.executable, "-m", "jepa_cluster", *words)
        return self.cluster.run(*command, check=check, cwd=self.folder, env=self.environment(**more))

    def sweep(self, name: str, base: Iterable[str], body: str) -> Path:
        """Write a sweep file of tiny trials; body: its axes and resources, as YAML."""
        lines = "".join(f"  - {b}\n" for b in base)
        path = self.folder / f"{name}.yaml"
        path.write_text(f"question: Does it come back?\nbase:\n{lines}{body}\n")
        return path

    def submit(self, sweep: Path, *words: str, **more: str) -> list[TrialDir]:
        """jepa submit --yes -> the sweep's trials, in its order."""
        self.jepa("submit", str(sweep), "--yes", *words, **more)
        return self.trials(sweep.stem)

    def trials(self, sweep: str) -> list[TrialDir]:
        plan = json.loads((self.root.sweep(sweep).plan).read_text())
        return [self.root.trial(t["name"]) for t in plan["trials"]]

    def arrays(self, sweep: str) -> list[dict[str, Any]]:
        """Records of what was handed to Slurm, oldest first."""
        found = [json.loads(p.read_text()) for p in (self.root.sweep(sweep).arrays).glob("*.json")]
        return sorted(found, key=lambda record: record["submitted"])

    def job(self, sweep: str, trial: TrialDir) -> str:
        """Slurm's id of the newest job that was given this trial: '12_3'."""
        record = next(r for r in reversed(self.arrays(sweep)) if trial.name in r["trials"])
        many = len(record["trials"]) > 1
        return f"{record['job']}_{record['trials'].index(trial.name)}" if many else record["job"]

    def states(self, sweep: str) -> dict[str, str]:
        """`jepa status --json`: trial -> state."""
        return {t["name"]: t["state"] for t in json.loads(self.jepa("status", sweep, "--json"))["trials"]}

    def release(self) -> None:
        """Stub trials that wait at the step of `orders(hold=...)` go on, in this attempt and in those to come."""
        (self.root.path / "go").touch()

    def ranks(self, node: str = "", job: str = "") -> list[int]:
        """Pids of trials' ranks, of all nodes and jobs or of one."""
        found: list[int] = []
        for pid in [p for n in ([node] if node else self.cluster.nodes) for p in self.cluster.members(n)]:
            words, environment = read_proc(pid, "cmdline"), read_proc(pid, "environ")
            if any(b"submitit" in w for w in words) and (not job or f"SLURM_JOB_ID={job}".encode() in environment):
                found.append(pid)
        return found

    def wait(self, ready: Callable[[], object], what: str, seconds: float = PATIENCE) -> None:
        """Until it is so; else AssertionError with all that the cluster and the trials say."""
        deadline = time.monotonic() + seconds
        while True:
            asked = time.monotonic()
            if ready():
                return
            now = time.monotonic()
            assert now < deadline, f"waited {seconds:g} s in vain until {what}\n{self.evidence()}"
            time.sleep(max(0.2, 2 * (now - asked)))  # a question may be a command that costs a second of CPU time

    def wait_step(self, trial: TrialDir, step: int, attempt: int = 1, seconds: float = PATIENCE) -> None:
        """Until this attempt, or a later one, has logged this step."""

        def reached() -> bool:
            rows = spool.read(trial).rows
            return trial.newest_attempt() >= attempt and bool(rows) and rows[-1].step >= step

        self.wait(reached, f"{trial.name} logs step {step} in attempt {attempt}", seconds)

    def wait_done(self, trials: Iterable[TrialDir], seconds: float = PATIENCE) -> None:
        """Until DONE.json is there; the attempt's record is closed a moment after it, unless a fault comes between."""
        trials = list(trials)
        self.wait(lambda: all(t.done.exists() for t in trials), "all trials are done", seconds)
        patience = time.monotonic() + 60
        while not all(causes(t)[-1] for t in trials) and time.monotonic() < patience:
            time.sleep(0.1)

    def evidence(self) -> str:
        """What a person would look at: the queue, attempt records, and the ends of all logs, Slurm's too."""
        parts = [
            self.cluster.run("squeue", "-r", "-t", "all", check=False),
            self.cluster.run("sinfo", "-N", check=False),
        ]
        for trial in sorted(self.root.trials.glob("*")) if self.root.trials.exists() else []:
            files = [
                *sorted(trial.glob("attempts/*.json")),
                *sorted(trial.glob("*.json")),
                *sorted(trial.glob("logs/*/*")),
            ]
            parts += [
                f"--- {f.relative_to(self.root.path)}\n{f.read_text()[-1500:]}" for f in files if f.stat().st_size
            ]
        for log in sorted(self.root.path.glob("sweeps/*/jobs/**/*.[loe]*")):
            parts.append(f"--- {log.relative_to(self.root.path)}\n{log.read_text()[-1500:]}")
        for log in sorted((self.cluster.dir / "log").glob("[ns]*.log")):
            parts.append(f"--- {log.name}\n{log.read_text(errors='replace')[-1500:]}")
        return "\n".join(parts)


def orders(login: LoginNode, seconds: float = 0.02, **what: object) -> None:
    """What stub trials do: seconds a step, `hold`: the step at which they wait for `release`, by seed what goes wrong.

    A fault is made while its trial holds, so it comes at the same moment on a fast machine and on a slow one.
    """
    login.root.path.mkdir(exist_ok=True)
    (login.root.path / "stub.json").write_text(json.dumps({"seconds": seconds, **what}))


def stub_sweep(login: LoginNode, name: str, resources: str = SMALL, seeds: int = 1, more: str = "") -> Path:
    """A sweep over seeds, of trials of 30 steps."""
    return login.sweep(name, TINY, f"seeds: {list(range(seeds))}\nresources:\n  - {resources}\n{more}")


def every_step_once(trial: TrialDir, steps: int = STEPS) -> bool:
    """The merged history holds each of 1..steps once (and perhaps the probe of step 0), all of it settled."""
    history = spool.read(trial)
    seen = [row.step for row in history.rows if row.step > 0]
    return seen == list(range(1, steps + 1)) and history.settled >= steps and not history.damaged


def causes(trial: TrialDir) -> list[str | None]:
    """How each attempt ended."""
    return [record.get("cause") for record in trial.attempts()]


def leaked() -> dict[str, str]:
    """What a shell inside an allocation carries, and what ruins a job that inherits it."""
    return {
        "SLURM_JOB_ID": "1", "SLURM_NTASKS": "7", "SLURM_NNODES": "7", "SLURM_PROCID": "5", "SLURM_CPU_BIND": "quiet",
        "SLURM_MEM_PER_CPU": "1", "SBATCH_PARTITION": "nowhere", "SBATCH_EXPORT": "NONE", "RANK": "3",
        "WORLD_SIZE": "9", "MASTER_ADDR": "192.0.2.1", "MASTER_PORT": "1", "JEPA_LAUNCH": "stale",
    }  # fmt: skip

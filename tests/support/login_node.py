"""A login node: a clone of the code, a root, a cluster profile, and the `jepa` command."""

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
STUBS = {  # replace the modules of training/ that import torch
    "train": (Path(__file__).parent / "stub_train.py").read_text(),
    "distributed": "def final_barrier() -> None: ...\ndef drain_messages() -> None: ...\n",
    "step_metrics": "StepMetrics = dict\n",
}

STEPS = 30
HOLD = 5  # step at which stub trials wait until their fault has come
PATIENCE = 400  # s that anything may take on a slow, busy machine before it counts as lost
TINY = (
    "model=vit_ti",
    "data=synthetic",
    "optim.epochs=null",
    f"optim.steps={STEPS}",
    "optim.warmup_epochs=null",
    "optim.warmup_steps=2",
    "optim.batch=8",
)
SMALL = "{nodes: 1, procs_per_node: 1, time: 10m}"


class LoginNode:
    """The commands of a user.

    stub: trials run stub_train.py instead of training with torch; all other code is the product's.
    """

    def __init__(self, cluster: Cluster, folder: Path, stub: bool) -> None:
        self.cluster = cluster
        self.folder = folder
        self.root = Root(folder / "root")
        self.clone = folder / "clone"
        self.data = folder / "data"
        unwanted = shutil.ignore_patterns("__pycache__")
        for part in ("jepa_cluster", "conf"):
            shutil.copytree(REPOSITORY / part, self.clone / part, ignore=unwanted)
        if stub:
            self._replace_trainer()

    def _replace_trainer(self) -> None:
        """Put the stubs into the clone, and an empty data set beside it."""
        for name, text in STUBS.items():
            (self.clone / f"jepa_cluster/training/{name}.py").write_text(text)
        manifest = {
            "version": 1,
            "digest": "0" * 16,
            "images": 1000,
            "shards": [],
            "labels": ["class"],
            "classes": [],
            "report": {},
        }
        for split in ("train", "val"):
            (self.data / split).mkdir(parents=True)
            write_json(self.data / split / "manifest.json", manifest)

    def environment(self, **more: str) -> dict[str, str]:
        return {
            "JEPA_ROOT": str(self.root.path),
            "JEPA_CLUSTER": str(self.cluster.profile),
            "PYTHONPATH": str(self.clone),
            "JEPA_DATA": str(self.data),
            "COLUMNS": "160",
            **more,
        }

    def jepa(self, *words: str, check: bool = True, **more: str) -> str:
        """Run the console script from this login node's clone -> stdout."""
        command = (sys.executable, "-m", "jepa_cluster", *words)
        env = self.environment(**more)
        return self.cluster.run(*command, check=check, cwd=self.folder, env=env)

    def status(self, sweep: str, *words: str) -> Any:
        """The document of `jepa status`."""
        return json.loads(self.jepa("status", sweep, "--json", *words))

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
        plan = json.loads(self.root.sweep(sweep).plan.read_text())
        return [self.root.trial(t["name"]) for t in plan["trials"]]

    def arrays(self, sweep: str) -> list[dict[str, Any]]:
        """Records of what was handed to Slurm, oldest first."""
        files = self.root.sweep(sweep).arrays.glob("*.json")
        found = [json.loads(file.read_text()) for file in files]
        return sorted(found, key=lambda record: record["submitted"])

    def job(self, sweep: str, trial: TrialDir) -> str:
        """Slurm's id of the newest job that was given this trial: '12_3'."""
        records = [array for array in self.arrays(sweep) if trial.name in array["trials"]]
        job = records[-1]["job"]
        trials = records[-1]["trials"]
        if len(trials) == 1:
            return job
        return f"{job}_{trials.index(trial.name)}"

    def profile_without_scontrol(self) -> str:
        """A profile whose jobs find every program but scontrol -> its path."""
        folder = self.folder / "bin"
        folder.mkdir()
        for place in ("/usr/bin", "/bin"):
            for program in Path(place).iterdir():
                link = folder / program.name
                if program.name != "scontrol" and not link.is_symlink():
                    link.symlink_to(program)
        profile = self.folder / "no-scontrol.yaml"
        text = self.cluster.profile.read_text()
        text = text.replace("environment: {", f"environment: {{PATH: {folder}, ")
        profile.write_text(text)
        return str(profile)

    def script(self, sweep: str, job: str) -> str:
        """The batch script of a job that was submitted."""
        (record,) = [each for each in self.arrays(sweep) if each["job"] == job.partition("_")[0]]
        return self.root.sweep(sweep).script(record["name"]).read_text()

    def pending_reason(self, job: str) -> str:
        """Why Slurm does not start the job."""
        return self.cluster.run("squeue", "-h", "-o", "%r", "-j", job).strip()

    def scancel(self, *words: str) -> None:
        self.cluster.run("scancel", *words)

    def drain(self) -> None:
        """Let the two nodes start nothing more."""
        self.cluster.run("scontrol", "update", "nodename=n[1-2]", "state=drain", "reason=test")

    def undrain(self) -> None:
        self.cluster.run("scontrol", "update", "nodename=n[1-2]", "state=resume")

    def send_usr2(self, *jobs: str) -> None:
        """Send the signal that Slurm sends before the time limit."""
        self.cluster.run("scancel", "-s", "USR2", *jobs)

    def states(self, sweep: str) -> dict[str, str]:
        """`jepa status --json`: trial -> state."""
        return {trial["name"]: trial["state"] for trial in self.status(sweep)["trials"]}

    def release(self) -> None:
        """Let stub trials continue that wait at the step of `orders(hold=...)`, now and later."""
        (self.root.path / "go").touch()

    def ranks(self, node: str = "", job: str = "") -> list[int]:
        """Pids of trials' ranks, of all nodes and jobs or of one."""
        pids: list[int] = []
        for name in [node] if node else self.cluster.nodes:
            pids += self.cluster.members(name)
        ranks: list[int] = []
        for pid in pids:
            program, *words = read_proc(pid, "cmdline") or [b"srun"]
            is_rank = program != b"srun" and b"jepa_cluster.launch.worker.main" in words
            environment = read_proc(pid, "environ")
            of_job = not job or f"SLURM_JOB_ID={job}".encode() in environment
            if is_rank and of_job:
                ranks.append(pid)
        return ranks

    def wait(self, ready: Callable[[], object], what: str, seconds: float = PATIENCE) -> None:
        """Wait until `ready` returns true; else AssertionError with the evidence."""
        deadline = time.monotonic() + seconds
        while True:
            asked = time.monotonic()
            if ready():
                return
            now = time.monotonic()
            assert now < deadline, f"not within {seconds:g} s: {what}\n{self.evidence()}"
            # A question may be a command that costs a second of CPU time
            time.sleep(max(0.2, 2 * (now - asked)))

    def wait_step(
        self, trial: TrialDir, step: int, attempt: int = 1, seconds: float = PATIENCE
    ) -> None:
        """Wait until this attempt, or a later one, has logged this step."""

        def reached() -> bool:
            rows = spool.read(trial).rows
            return trial.newest_attempt() >= attempt and bool(rows) and rows[-1].step >= step

        self.wait(reached, f"{trial.name} logs step {step} in attempt {attempt}", seconds)

    def wait_done(self, trials: Iterable[TrialDir], seconds: float = PATIENCE) -> None:
        """Wait for DONE.json, and for the attempt's record, which is closed a moment later.

        A fault between the two leaves the record open.
        """
        trials = list(trials)
        self.wait(lambda: all(t.done.exists() for t in trials), "all trials are done", seconds)
        patience = time.monotonic() + 60
        while not all(causes(t)[-1] for t in trials) and time.monotonic() < patience:
            time.sleep(0.1)

    def submit_until_done(self, trial: TrialDir, sweep: Path) -> None:
        """Submit the sweep again, as cron would, whenever its only trial is interrupted."""

        def finished() -> bool:
            if self.states(sweep.stem)[trial.name] == "interrupted":
                self.submit(sweep)
            return trial.done.exists()

        self.wait(finished, "the trial is done")
        self.wait_done([trial])

    def assert_no_overlap(self) -> None:
        """No two attempts of one trial trained at the same time."""
        overlap = (self.root.path / "twice").exists()
        assert not overlap, "two attempts of one trial trained at the same time"

    def evidence(self) -> str:
        """Return the queue, the attempt records, and the ends of all logs, Slurm's too."""
        parts = [
            self.cluster.run("squeue", "-r", "-t", "all", check=False),
            self.cluster.run("sinfo", "-N", check=False),
        ]
        root = self.root.path
        files: list[Path] = []
        for trial in sorted(root.glob("trials/*")):
            files += sorted(trial.glob("attempts/*.json"))
            files += sorted(trial.glob("*.json"))
            files += sorted(trial.glob("logs/*/*"))
        files += sorted(root.glob("sweeps/*/jobs/**/*.[loe]*"))
        files += sorted((self.cluster.dir / "log").glob("[ns]*.log"))
        for file in files:
            end = file.read_text(errors="replace")[-1500:]
            if end:
                parts.append(f"--- {file}\n{end}")
        return "\n".join(parts)


def orders(login: LoginNode, seconds: float = 0.02, **what: object) -> None:
    """Write what stub trials do: seconds per step, and by seed what goes wrong.

    hold: the step at which they wait for `release`.

    A fault is made while its trial holds, so it comes at the same step on a fast machine and on a
    slow one.
    """
    login.root.path.mkdir(exist_ok=True)
    (login.root.path / "stub.json").write_text(json.dumps({"seconds": seconds, **what}))


def stub_sweep(
    login: LoginNode, name: str, resources: str = SMALL, seeds: int = 1, more: str = ""
) -> Path:
    """A sweep over seeds, of trials of 30 steps."""
    body = f"seeds: {list(range(seeds))}\nresources:\n  - {resources}\n{more}"
    return login.sweep(name, TINY, body)


def every_step_once(trial: TrialDir, steps: int = STEPS) -> bool:
    """The merged history holds each of 1..steps once, all settled; a probe of step 0 is allowed."""
    history = spool.read(trial)
    seen = [row.step for row in history.rows if row.step > 0]
    once = seen == list(range(1, steps + 1))
    return once and history.settled >= steps and not history.damaged


def causes(trial: TrialDir) -> list[str | None]:
    """How each attempt ended."""
    return [record.get("cause") for record in trial.attempts()]


def leaked() -> dict[str, str]:
    """The variables of a shell inside an allocation, which break a job that inherits them."""
    return {
        "SLURM_JOB_ID": "1",
        "SLURM_NTASKS": "7",
        "SLURM_NNODES": "7",
        "SLURM_PROCID": "5",
        "SLURM_CPU_BIND": "quiet",
        "SLURM_MEM_PER_CPU": "1",
        "SBATCH_PARTITION": "nowhere",
        "SBATCH_EXPORT": "NONE",
        "RANK": "3",
        "WORLD_SIZE": "9",
        "MASTER_ADDR": "192.0.2.1",
        "MASTER_PORT": "1",
        "JEPA_LAUNCH": "stale",
    }


def assert_ended(
    login: LoginNode, trial: TrialDir, expected: list[str | None], steps: int = STEPS
) -> None:
    """The attempts ended with these causes, and the history holds every step once."""
    assert causes(trial) == expected, login.evidence()
    assert every_step_once(trial, steps), login.evidence()

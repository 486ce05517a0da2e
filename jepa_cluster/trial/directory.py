"""The folders of trials and sweeps. This module and attempts.py alone spell their file names.

In: a root folder. Out: paths, and what the files alone say of a trial. It asks no scheduler,
keeps no state in memory and knows no torch. The contract, file by file, is docs/trial-directory.md.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from jepa_cluster import labels
from jepa_cluster.config import IDENTITY_VERSION, Runtime, TrialConfig, config_from_dict
from jepa_cluster.errors import TrialError
from jepa_cluster.records import (
    PLAN_DEFAULTS,
    PLANNED_DEFAULTS,
    ArrayRecord,
    AttemptRecord,
    PlannedTrial,
    SweepPlan,
)
from jepa_cluster.schema import setting_names
from jepa_cluster.trial import config_yaml, identity_v1
from jepa_cluster.trial.attempts import Attempts, numbers_in
from jepa_cluster.trial.files import (
    fsync_folder,
    names_in,
    new_folder,
    now_ms,
    read_json,
    revalidate_folder,
    to_json,
    write_atomic,
    write_json,
    write_new,
    write_once,
)

STEP_WIDTH = 8
_CHECKPOINT = re.compile(r"step-(\d+)")
_START = "start."  # begins the names of the records of starts without an attempt


def checkpoint_steps(names: Iterable[str]) -> list[int]:
    """Steps of the committed checkpoints among the names in a folder, ascending."""
    return numbers_in(names, _CHECKPOINT)


class Entry:
    """The path of an entry of a folder: a class attribute that is read on an instance."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, owner: Root | SweepDir | TrialDir, _: object = None) -> Path:
        return owner.path / self.name


@dataclass(frozen=True)
class Root:
    """$JEPA_ROOT: everything the tool knows lies below it.

    canaries: short trials that precede a resource class; nothing that counts trials counts them.
    local: the local launcher's queue. id_file: tells this root from others in MLflow.
    """

    path: Path
    trials = Entry("trials")
    canaries = Entry("canaries")
    code = Entry("code")
    local = Entry("local")
    id_file = Entry("root-id")
    submit_lock = Entry(".submit.lock")

    def id(self) -> str:
        """Return the id of this root, which stays when the folder is moved. Makes it once."""
        if not self.id_file.exists():
            write_once(self.id_file, f"{uuid.uuid4().hex[:8]}\n")
        return self.id_file.read_text().strip()

    def compiled(self, code: str) -> Path:
        """Folder of this user for what torch compiles from a code snapshot."""
        return self.path / "compiled" / str(os.getuid()) / code

    def sweep(self, name: str) -> SweepDir:
        return SweepDir(self.path / "sweeps" / name)

    def sweeps(self) -> list[str]:
        """Names of the submitted sweeps, sorted."""
        return sorted(plan.parent.name for plan in self.path.glob("sweeps/*/plan.json"))

    def canaries_of(self, sweep: str) -> list[TrialDir]:
        requests = self.canaries.glob(f"canary.{sweep}.*/canary.json")
        return [TrialDir(path.parent) for path in requests]

    def trial(self, name: str) -> TrialDir:
        folder = self.canaries if name.startswith("canary.") else self.trials
        return TrialDir(folder / name)

    def names_by_id(self) -> dict[str, str]:
        """Id -> name of every trial directory. The first sweep that has a trial names it."""
        names = [name for name in sorted(names_in(self.trials)) if not name.startswith(".")]
        return {name.rpartition("-")[2]: name for name in names}

    def trial_of(self, config: TrialConfig) -> TrialDir:
        """Return the directory of a config: the one that exists, else one by model and seed."""
        recipe = config.recipe
        words = [f"s{recipe.seed}"]
        new = labels.directory_name(recipe.model.name, words, config.id)
        return self.trial(self.names_by_id().get(config.id, new))


@dataclass(frozen=True)
class SweepDir:
    """The folder of one submitted sweep.

    predicted: trials that `jepa scaling next` proposed, with their predicted errors. calibration:
    learning rates that `jepa calibrate` found, or the copy that this sweep uses. throttle: the
    cap on GPUs in flight that `jepa throttle` stored. jobs: batch scripts and output of
    jobs. intents: arrays that are about to be submitted; the tasks read their trials there. An
    intent that has no record in arrays/ was interrupted by a crash.
    """

    path: Path
    sweep_file = Entry("sweep.yaml")
    plan = Entry("plan.json")
    predicted = Entry("predicted.json")
    calibration = Entry("calibration.json")
    throttle = Entry("throttle.json")
    throttle_lock = Entry(".balance.lock")
    jobs = Entry("jobs")
    arrays = Entry("arrays")
    intents = Entry("intents")

    @property
    def name(self) -> str:
        return self.path.name

    def intent(self, job_name: str) -> Path:
        return self.intents / f"{job_name}.json"

    def array(self, job_name: str) -> Path:
        return self.arrays / f"{job_name}.json"

    def script(self, job_name: str) -> Path:
        return self.jobs / f"{job_name}.sh"

    def read_plan(self) -> SweepPlan | None:
        """Return plan.json; None for a sweep that was not submitted.

        Keys that an earlier version did not write get their defaults.
        """
        plan = read_json(self.plan)
        if plan is None:
            return None
        trials: list[dict[str, Any]] = []
        for trial in plan.get("trials", []):
            trials.append({**PLANNED_DEFAULTS, **trial})
            if "label" not in trial:
                trials[-1]["label"] = labels.point_label(trial["point"], trial["seed"])
        return cast("SweepPlan", {**PLAN_DEFAULTS, **plan, "trials": trials})

    def planned(self) -> list[PlannedTrial]:
        """Return the trials of plan.json, and after them those that were edited out of the file."""
        plan = self.read_plan()
        return [*plan["trials"], *plan["dropped"]] if plan else []

    def read_array(self, job_name: str) -> ArrayRecord | None:
        """Return the record of an array; None for a job that is none of this sweep's."""
        return cast("ArrayRecord | None", read_json(self.array(job_name)))


@dataclass(frozen=True)
class TrialDir(Attempts):
    """One trial. Two `TrialDir` of one path are equal; making one touches no disk.

    canary: what the class of a canary is expected to cost; only a canary has this file.
    """

    config = Entry("config.yaml")
    identity = Entry("identity.json")
    point = Entry("point.json")
    checkpoints = Entry("checkpoints")
    stop = Entry("STOP")
    done = Entry("DONE.json")
    failed = Entry("FAILED.json")
    heartbeat = Entry("heartbeat")
    canary = Entry("canary.json")

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def root(self) -> Root:
        return Root(self.path.parent.parent)

    def metrics(self, number: int) -> Path:
        return self.path / "metrics" / f"{number:04d}.jsonl"

    def logs(self, number: int) -> Path:
        return self.path / "logs" / f"{number:04d}"

    def requeue_claim(self, launch: str, turn: int) -> Path:
        """The file that the rank creates which asks Slurm for a requeue of this launch."""
        return self.path / "logs" / f"requeue.{launch}.{turn}"

    def end_start(self, launch: str, end: Mapping[str, Any]) -> None:
        """Record why a start ended that opened no attempt. The first rank that knows decides."""
        path = self._start(launch)
        path.parent.mkdir(exist_ok=True)
        write_once(path, to_json({**end, "attempt": 0, "launch": launch}))

    def read_start(self, launch: str) -> dict[str, Any]:
        """Return the record of `end_start`, {} without one. Raises TrialError, OSError."""
        return read_json(self._start(launch)) or {}

    def amend_start(self, launch: str, changes: Mapping[str, Any]) -> None:
        """Change the record of `end_start`."""
        write_json(self._start(launch), {**self.read_start(launch), **changes})

    def ended_starts(self) -> list[AttemptRecord]:
        """Return the records of `end_start`. A torn one counts as missing. Raises OSError."""
        found: list[AttemptRecord] = []
        for name in names_in(self.path / "logs"):
            if name.startswith(_START):
                with contextlib.suppress(TrialError):
                    record = read_json(self.path / "logs" / name) or {"attempt": 0}
                    found.append(cast("AttemptRecord", record))
        return found

    def write_failed(self, cause: str, error: str, attempt: int) -> None:
        """Write FAILED.json: the trial is not repeated by itself. The first rank decides.

        attempt: 0 before the first one.
        """
        failure = {"cause": cause, "error": error, "attempt": attempt, "t": now_ms()}
        write_once(self.failed, to_json(failure))
        fsync_folder(self.path)

    def attempts_and_bad_starts(self) -> list[AttemptRecord]:
        """Return the attempts, and the starts that a bad node ended before one, oldest first."""
        records = self.attempts()
        for start in self.ended_starts():
            if start.get("cause") == "node":
                since = start.get("started", 0)
                later = [record for record in records if record.get("started", 0) > since]
                records.insert(len(records) - len(later), start)
        return records

    def _start(self, launch: str) -> Path:
        return self.path / "logs" / f"{_START}{launch}"

    # ---- nodes that have passed their test, before rank 0 opens the attempt

    def report_node(self, launch: str, node: int, ranks: int) -> None:
        """Report to rank 0 that a node with so many ranks has passed."""
        folder = self._reports(launch)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{node}.{ranks}").touch()

    def reported_ranks(self, launch: str) -> int:
        """Return the number of ranks on the nodes that have reported, also on NFS."""
        folder = self._reports(launch)
        folder.mkdir(parents=True, exist_ok=True)
        revalidate_folder(folder)
        return sum(int(name.rpartition(".")[2]) for name in names_in(folder) if name[0] != ".")

    def forget_reports(self) -> None:
        """Remove the reports of this launch, and those of earlier ones that opened no attempt."""
        for folder in (self.path / "logs").glob("nodes.*"):
            shutil.rmtree(folder, ignore_errors=True)

    def _reports(self, launch: str) -> Path:
        return self.path / "logs" / f"nodes.{launch}"

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:0{STEP_WIDTH}d}"

    def create(
        self,
        config: TrialConfig,
        points: Mapping[str, Any] | None = None,
        durable: bool = True,
    ) -> bool:
        """Freeze a config here. Of a trial that exists only the runtime is replaced.

        points: sweep -> its point, of a new trial. durable: sync each file; else the caller calls
        `sync_filesystem` before the trial starts. Returns whether it is new. Raises TrialError.
        """
        text = config_yaml.dump(config)
        if self.path.exists():
            if self._is_torn():
                write_atomic(self.config, text)
                write_json(self.identity, config.identity())
            elif read_json(self.identity) != config.identity():
                raise TrialError(
                    f"{self.name} holds another recipe than its name says",
                    where=str(self.identity),
                    hint="move the directory away; it was edited by hand or its hash collides",
                )
            elif self.config.read_text() != text:
                steps = {*config.runtime.milestones}
                with contextlib.suppress(TrialError):  # branches of other sweeps begin there
                    steps.update(self.read_config(older=True).runtime.milestones)
                runtime = replace(config.runtime, milestones=tuple(sorted(steps)))
                write_atomic(self.config, config_yaml.dump(replace(config, runtime=runtime)))
            return False
        files = {"config.yaml": text, "identity.json": to_json(config.identity())}
        if points:
            files["point.json"] = to_json(points)
        with new_folder(self.path, durable) as fresh:
            for name, content in files.items():
                write_new(fresh / name, content, durable)
            if durable:
                fsync_folder(fresh)
        return True

    def _is_torn(self) -> bool:
        """Whether a crash of the machine took the content of a trial that has not started."""
        with contextlib.suppress(TrialError, FileNotFoundError, UnicodeDecodeError):
            if read_json(self.identity) and self.config.read_text():
                return False
        return not (self.checkpoints.exists() or self.attempt_numbers())

    def read_config(self, older: bool = False) -> TrialConfig:
        """Return the frozen config. Raises TrialError if it is missing or not the identity's.

        Settings of the runtime that this version does not have are left out, as they change no
        number. older: accept a trial of an earlier identity version, for readers of results.
        """
        try:
            values = config_yaml.load(self.config.read_text())
        except FileNotFoundError as e:
            raise TrialError(
                f"no trial at {self.path}", where=str(self.config), hint="jepa status lists them"
            ) from e
        if values is None:
            what = "config.yaml is empty, torn or not plain YAML"
            raise TrialError(what, where=str(self.config), hint="submit the sweep again")
        identity = read_json(self.identity) or {}
        version = identity.get("identity_version")
        if version != IDENTITY_VERSION and not older:
            raise TrialError(
                f"{self.name} was frozen with identity version {version},"
                f" this code trains version {IDENTITY_VERSION}",
                where=str(self.identity),
                hint="submit the sweep again; results of older trials stay readable",
            )
        current = identity_v1.upgrade(values) if version == 1 else values
        runtime = current.get("runtime")
        if isinstance(runtime, dict):
            current["runtime"] = {k: v for k, v in runtime.items() if k in setting_names(Runtime)}
        config = config_from_dict(current, where=str(self.config))
        found = config.identity()
        if version == 1:
            values.pop("runtime", None)
            found = {"identity_version": 1, "recipe": values}
        if identity != found:
            raise TrialError(
                f"{self.name}: config.yaml was changed after it was frozen",
                where=str(self.config),
                hint="submit a new sweep point instead of editing a trial",
            )
        return config

    def add_point(self, sweep: str, values: Mapping[str, Any]) -> None:
        """Record which point of a sweep this is. Other sweeps' entries stay."""
        points: Any = {}
        with contextlib.suppress(TrialError):  # a torn file
            points = read_json(self.point) or {}
        if points.get(sweep) != dict(values):
            write_json(self.point, {**points, sweep: dict(values)})

    def succeeded(self) -> bool:
        """Whether the trial is done, or its newest attempt reached `runtime.stop_after`."""
        if self.done.exists():
            return True
        return any(
            last.get("cause") == "stopped" and last.get("exit") == 0
            for last in self.attempts()[-1:]
        )

    def committed(self) -> list[int]:
        """Steps with a committed checkpoint, oldest first. It may be damaged."""
        return checkpoint_steps(names_in(self.checkpoints))


def default_root() -> Root:
    """$JEPA_ROOT, or `jepa-root` in the current folder."""
    return Root(Path(os.environ.get("JEPA_ROOT", "jepa-root")).expanduser().absolute())

"""Cluster profiles and resource classes: where trials run, and in what shape.

In: a profile (slurm/clusters/*.yaml) and resolved trials. Out: `Profile`, and per trial the
`ResourceClass` (nodes x processes x minutes) whose array it joins. It asks no scheduler.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from jepa_cluster.errors import ConfigError, SweepFileError, suggest
from jepa_cluster.schema import build_dataclass
from jepa_cluster.sweep import yaml_source
from jepa_cluster.sweep.points import ResourceRequest
from jepa_cluster.sweep.resolve import Trial
from jepa_cluster.sweep.time_limit import TIME_FORMS, parse_minutes
from jepa_cluster.sweep.yaml_source import YamlSource
from jepa_cluster.trial.provenance import available_cores

CPU_TFLOPS = 0.05  # assumed peak of one core, single precision
# Options of sbatch -> the fields of the profile that set them
FIELDS = {
    "partition": "partition",
    "account": "account",
    "qos": "qos",
    "constraint": "constraint",
    "exclude": "exclude",
    "time": "time",
    "nodes": "nodes",
    "ntasks": "procs_per_node",
    "ntasks-per-node": "procs_per_node",
    "cpus-per-task": "cpus_per_proc",
    "mem": "mem_gb",
    "mem-per-cpu": "mem_gb",
    "mem-per-gpu": "mem_gb",
    "gpus": "gpus_per_node",
    "gpus-per-node": "gpus_per_node",
    "gpus-per-task": "gpus_per_node",
    "signal": "signal_seconds",
}
MANAGED = ("array", "chdir", "clusters", "dependency", "error", "job-name", "output")
GPU_GRES = re.compile(r"\bgpu(?::([A-Za-z][^:,]*))?(?::(\d+))?")  # type and number
POSITIVE = ("nodes", "procs_per_node", "cpus_per_proc", "slots", "signal_seconds")


@dataclass(frozen=True)
class Profile:
    """A cluster, or this machine. slurm/clusters/example.yaml explains each field.

    peak_tflops: of one process. start_seconds: from a job's start to its first step; None: assumed.
    slots: of the local queue, processes at a time. file: that the profile was read from.
    """

    kind: Literal["slurm", "local"]
    nodes: int = 1
    procs_per_node: int = 1
    time: str = "12h"
    peak_tflops: float = CPU_TFLOPS
    mfu: float = 0.35
    start_seconds: float | None = None
    runtime: Mapping[str, Any] = field(default_factory=dict[str, Any])
    environment: Mapping[str, Any] = field(default_factory=dict[str, Any])
    python: str | None = None
    slots: int = 1
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    exclude: str | None = None
    gpus_per_node: int = 0
    gpu_type: str | None = None
    cpus_per_proc: int = 1
    mem_gb: float | None = None
    signal_seconds: int = 120
    setup: tuple[str, ...] = ()
    sbatch: Mapping[str, Any] = field(default_factory=dict[str, Any])
    file: str = ""

    @property
    def minutes(self) -> int:
        """The time limit; 0 when it cannot be read."""
        return parse_minutes(self.time) or 0

    @property
    def unit(self) -> str:
        """Name of an hour of one process."""
        return "GPU-h" if self.gpus_per_node else "process-h"

    @property
    def default_request(self) -> ResourceRequest:
        """The resources of a trial whose sweep names none."""
        return ResourceRequest("", self.nodes, self.procs_per_node, self.minutes)


@dataclass(frozen=True, order=True)
class ResourceClass:
    """Trials of one class can share an array."""

    nodes: int
    procs_per_node: int
    minutes: int

    @property
    def world(self) -> int:
        return self.nodes * self.procs_per_node


def load_profile(path: Path | None = None) -> Profile:
    """Read a profile from a file, or a shipped one by its name.

    path: None for $JEPA_CLUSTER, else `local`. Raises SweepFileError with file, line and hint.
    """
    source = yaml_source.read(_find(path or Path(os.environ.get("JEPA_CLUSTER", "local"))))
    if "file" in source.values:
        raise source.error("'file' cannot be set", "file")
    values = {**source.values, "file": str(Path(source.file).absolute())}
    if type(values.get("time")) is int:  # minutes, as Slurm takes them
        values["time"] = str(values["time"])
    if values.get("kind") == "local":
        _fill_auto(values)
    try:
        profile = build_dataclass(Profile, values, "")
    except ConfigError as e:
        wrong = ""
        for key in source.values:
            if f"'{key}'" in e.what or e.what.startswith(key):
                wrong = key
        raise source.error(e.what, wrong, hint=e.hint) from e
    if profile.kind == "slurm" and profile.gpus_per_node:
        # A node without its GPUs must not train on the CPU.
        runtime = {"device": "cuda", **profile.runtime}
        profile = replace(profile, runtime=runtime)
    if not profile.minutes:
        raise source.error(f"time wants {TIME_FORMS}, got {profile.time!r}", "time")
    for key in POSITIVE:
        value = getattr(profile, key)
        if value < 1:
            raise source.error(f"{key} wants a positive number, got {value}", key)
    mfu, peak = profile.mfu, profile.peak_tflops
    if not 0 < mfu <= 1 or peak <= 0:
        what = f"mfu={mfu} must be inside (0, 1], peak_tflops={peak} positive"
        raise source.error(what, "mfu")
    _check_sbatch(profile, source)
    profile = _with_gres(profile, source)
    python = str(Path(profile.python).expanduser()) if profile.python else None
    return replace(profile, python=python)


def _check_sbatch(profile: Profile, source: YamlSource) -> None:
    """Refuse options that another field sets, and those that the submission itself sets."""
    for name, value in profile.sbatch.items():
        option = name.replace("_", "-")
        if option in MANAGED:
            raise source.error(f"sbatch: {name} cannot be set", f"sbatch.{name}")
        field_name = FIELDS.get(option)
        if field_name and value is not None and getattr(profile, field_name) is not None:
            what = f"sbatch: {name} would override `{field_name}`"
            raise source.error(what, f"sbatch.{name}", hint=f"set {field_name} instead")


def _with_gres(profile: Profile, source: YamlSource) -> Profile:
    """Take number and type of the GPUs from `sbatch: {gres: gpu:a100:2}`, where it names them."""
    found = GPU_GRES.search(str(profile.sbatch.get("gres") or ""))
    if not found:
        return profile
    gres_type, gpus = found[1], int(found[2] or 1)
    for name, value in (("gpus_per_node", gpus), ("gpu_type", gres_type)):
        if getattr(profile, name) not in (0, None, value):
            what = f"sbatch: gres says {value}, {name} says {getattr(profile, name)}"
            raise source.error(what, "sbatch.gres", hint=f"remove {name}")
    return replace(profile, gpus_per_node=gpus, gpu_type=gres_type or profile.gpu_type)


def _find(path: Path) -> Path:
    """Return the file of a profile. Raises SweepFileError with the nearest name."""
    path = path.expanduser()
    if path.is_file():
        return path
    folders = [*shipped_profiles()]
    for folder in folders:
        shipped = folder / f"{path.name}.yaml"
        if shipped.is_file():
            return shipped
    if path.suffix:
        folders.append(path.parent)
    known = {file.stem for folder in folders for file in folder.glob("*.yaml")}
    hint = suggest(path.stem, known)
    raise SweepFileError(f"no cluster profile '{path}'", where=str(Path.cwd()), hint=hint)


def shipped_profiles() -> tuple[Path, ...]:
    """Return the folders that may hold shipped profiles: of a clone, of an installed wheel."""
    package = Path(__file__).parents[2]
    return package.parent / "slurm" / "clusters", package / "clusters"


def _fill_auto(values: dict[str, Any]) -> None:
    """Replace `auto`, and what is missing, by what this machine has."""
    gpus = len(visible_gpus())
    slots = gpus or available_cores()
    found = {
        "slots": slots,
        "procs_per_node": 2,
        "peak_tflops": CPU_TFLOPS,
        "gpus_per_node": gpus,
    }
    if gpus:
        found |= {"procs_per_node": min(2, slots), "peak_tflops": 300.0}
    for key, value in found.items():
        if values.get(key, "auto") == "auto":
            values[key] = value


@functools.cache
def visible_gpus() -> tuple[str, ...]:
    """Return names for CUDA_VISIBLE_DEVICES; () without GPUs.

    nvidia-smi counts them, because the login node does not import torch.
    """
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return tuple(name for name in given.split(",") if name not in ("", "-1"))
    if not shutil.which("nvidia-smi"):
        return ()
    command = ["nvidia-smi", "-L"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    if done.returncode:
        return ()
    count = len(re.findall(r"^GPU ", done.stdout, re.MULTILINE))
    return tuple(map(str, range(count)))


def class_of(trial: Trial) -> ResourceClass:
    runtime = trial.config.runtime
    return ResourceClass(runtime.nodes, runtime.procs_per_node, trial.minutes)


def class_letters(classes: Iterable[ResourceClass]) -> dict[ResourceClass, str]:
    """Name the classes A, B, ..., Z, Z1, Z2, ... from the smallest on."""
    letters: dict[ResourceClass, str] = {}
    for number, cls in enumerate(sorted(set(classes))):
        letters[cls] = chr(ord("A") + number) if number < 26 else f"Z{number - 25}"
    return letters

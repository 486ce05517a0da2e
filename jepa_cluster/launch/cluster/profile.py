"""Where trials run, and in what shape: cluster profiles and resource classes.

In: a profile (slurm/clusters/*.yaml) and resolved trials. Out: `Profile`, and for each trial the `ResourceClass`
(nodes x processes x minutes) that it shares an array with. It asks no scheduler.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from jepa_cluster.errors import ConfigError, SweepFileError, suggest
from jepa_cluster.schema import build_dataclass
from jepa_cluster.sweep import sweep_file, yaml_source
from jepa_cluster.sweep.points import ResourceRequest
from jepa_cluster.sweep.resolve import Trial

CPU_TFLOPS = 0.05  # of one core, single precision, to start from


@dataclass(frozen=True)
class Profile:
    """A cluster, or this machine. Field by field: slurm/clusters/example.yaml."""

    kind: Literal["slurm", "local"]
    nodes: int = 1
    procs_per_node: int = 1
    time: str = "12h"
    peak_tflops: float = CPU_TFLOPS  # of one process
    mfu: float = 0.35
    start_seconds: float | None = None  # from a job's start to its first step; null: 60 on a cluster, 5 here
    runtime: Mapping[str, Any] = field(default_factory=dict[str, Any])
    environment: Mapping[str, Any] = field(default_factory=dict[str, Any])
    python: str | None = None
    slots: int = 1  # local: processes at a time
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    exclude: str | None = None
    gpus_per_node: int = 0
    cpus_per_proc: int = 1
    mem_gb: float | None = None
    signal_seconds: int = 120
    setup: tuple[str, ...] = ()
    sbatch: Mapping[str, Any] = field(default_factory=dict[str, Any])
    file: str = ""

    @property
    def minutes(self) -> int:
        return sweep_file.parse_minutes(self.time) or 0

    @property
    def unit(self) -> str:
        """What an hour of one process is called here."""
        return "GPU-h" if self.gpus_per_node else "process-h"

    @property
    def default_request(self) -> ResourceRequest:
        """What a trial gets when its sweep does not say."""
        return ResourceRequest("", self.nodes, self.procs_per_node, self.minutes)


@dataclass(frozen=True, order=True)
class ResourceClass:
    """Trials that can share an array."""

    nodes: int
    procs_per_node: int
    minutes: int

    @property
    def world(self) -> int:
        return self.nodes * self.procs_per_node


def load_profile(path: Path | None = None) -> Profile:
    """Read a profile; with None $JEPA_CLUSTER, else `local`. A bare name is looked up among the shipped ones.

    Raises SweepFileError with file, line and nearest name.
    """
    src = yaml_source.read(_find(path))
    values = dict(src.values)
    if "file" in values:
        raise src.error("'file' is not for you to set", "file")
    if values.get("kind") == "local":
        values = _this_machine(values)
    try:
        found = build_dataclass(Profile, {**values, "file": src.file}, "")
    except ConfigError as e:
        key = next((k for k in src.values if f"'{k}'" in e.what or e.what.startswith(k)), "")
        raise src.error(e.what, key, hint=e.hint) from e
    if not found.minutes:
        raise src.error(f"time wants 30m, 8h or 1d12h, got {found.time!r}", "time")
    for key in ("nodes", "procs_per_node", "cpus_per_proc", "slots", "signal_seconds"):
        if getattr(found, key) < 1:
            raise src.error(f"{key} wants a positive number, got {getattr(found, key)}", key)
    if not 0 < found.mfu <= 1 or found.peak_tflops <= 0:
        raise src.error(f"mfu={found.mfu} must be inside (0, 1], peak_tflops={found.peak_tflops} positive", "mfu")
    return found


def _find(path: Path | None) -> Path:
    path = path or Path(os.environ.get("JEPA_CLUSTER", "local"))
    if path.is_file():
        return path
    known = {p.stem: p for folder in reversed(shipped_profiles()) for p in folder.glob("*.yaml")}
    if path.name in known:
        return known[path.name]
    beside = {p.stem for p in path.parent.glob("*.yaml")} if path.suffix else set(known)
    raise SweepFileError(
        f"no cluster profile '{path}'", where=str(Path.cwd()), hint=suggest(path.stem, beside or known)
    )


def shipped_profiles() -> tuple[Path, ...]:
    """Folders where shipped profiles may lie: of a clone or snapshot, of an installed wheel."""
    package = Path(__file__).parents[2]
    return package.parent / "slurm" / "clusters", package / "clusters"


def _this_machine(values: dict[str, Any]) -> dict[str, Any]:
    """Replace `auto` by what is found here."""
    gpus = visible_gpus()
    slots = len(gpus) or os.cpu_count() or 1
    auto = {
        "slots": slots,
        "procs_per_node": min(2, slots) if gpus else 2,
        "peak_tflops": 300.0 if gpus else CPU_TFLOPS,
        "gpus_per_node": len(gpus),
    }
    return {**values, **{k: v for k, v in auto.items() if values.get(k, "auto") == "auto"}}


@functools.cache
def visible_gpus() -> tuple[str, ...]:
    """Names for CUDA_VISIBLE_DEVICES; empty without GPUs. Asks nvidia-smi, since torch is not to be imported."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return tuple(g for g in given.split(",") if g and g != "-1")
    if not shutil.which("nvidia-smi"):
        return ()
    done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("GPU ")] if done.returncode == 0 else []
    return tuple(str(i) for i in range(len(lines)))


def class_of(trial: Trial) -> ResourceClass:
    return ResourceClass(trial.config.runtime.nodes, trial.config.runtime.procs_per_node, trial.minutes)


def class_letters(classes: Iterable[ResourceClass]) -> dict[ResourceClass, str]:
    """A, B, ... from the smallest class on."""
    found = sorted(set(classes))
    return {c: chr(65 + i) if i < 26 else f"Z{i - 25}" for i, c in enumerate(found)}

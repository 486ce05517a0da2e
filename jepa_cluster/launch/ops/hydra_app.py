"""Hydra's own users: `python -m jepa_cluster -m hydra/launcher=slurm model=vit_s,vit_b seed=0,1`.

In: a config that Hydra composed, here or on a node. Out: the same trial directory as a sweep's, trained by the same
job, so it resumes after a requeue; the value that Hydra is given is the last probe. A failed trial is an exception for
Hydra and, since that would be pickled away and the Slurm job shown as completed, the exit code of this process too.
"""

from __future__ import annotations

import atexit
import os
import signal
import subprocess
import sys
from types import FrameType
from typing import Any, cast

import hydra
from omegaconf import DictConfig, OmegaConf

from jepa_cluster.errors import JepaError
from jepa_cluster.sweep import compose, resolve
from jepa_cluster.trial.directory import default_root
from jepa_cluster.trial.files import read_json


def task(composed: DictConfig) -> dict[str, float]:
    """One trial to its end -> its last probe values."""
    config = resolve.freeze(cast("dict[str, Any]", OmegaConf.to_container(composed, resolve=True)))
    trial = default_root().trial(config.name)
    trial.create(config)
    rank = subprocess.Popen([sys.executable, "-m", "jepa_cluster.launch.worker.main", str(trial.path)])

    def forward(number: int, frame: FrameType | None) -> None:
        rank.send_signal(number)

    for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT):  # instead of submitit's, which know no trial
        signal.signal(number, forward)
    code = rank.wait()
    if code:
        atexit.register(
            os._exit, code if code > 0 else 128 - code
        )  # once Hydra and submitit have said all they have to
        error = (read_json(trial.failed) or {}).get("error", f"exit code {code}")
        raise JepaError(f"{trial.name}: {error}", where=str(trial.path), hint="its logs are in logs/ there")
    return (read_json(trial.done) or {}).get("metrics", {})


def main() -> None:
    """Hydra's command line over conf/."""
    decorate = hydra.main(version_base="1.3", config_path=str(compose.conf_dir()), config_name="config")
    decorate(task)()

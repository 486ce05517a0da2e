"""Train a trial that Hydra composed.

    python -m jepa_cluster -m hydra/launcher=slurm model=vit_s,vit_b seed=0,1

In: a config that Hydra composed, on this machine or on a node. Out: the same trial directory as
that of a sweep, trained by the same worker, so it resumes after a requeue. Hydra gets the newest
probe values. A failed trial is an exception for Hydra, and the exit code of this process too,
because submitit pickles the exception away and Slurm would show the job as completed.
"""

from __future__ import annotations

import atexit
import os
import signal
import subprocess
import sys
import time
from types import FrameType
from typing import Any, cast

import hydra
import submitit
from omegaconf import DictConfig, OmegaConf

from jepa_cluster.errors import JepaError
from jepa_cluster.sweep import compose
from jepa_cluster.sweep.freeze import freeze
from jepa_cluster.trial.directory import default_root
from jepa_cluster.trial.files import read_json

KILLED_SECONDS = 5.0  # between the KILL of a rank and that of this process, at most


def task(composed: DictConfig) -> dict[str, float]:
    """Train one trial to its end, and return its newest probe values. Raises JepaError."""
    remove_torn_result()
    settings = OmegaConf.to_container(composed, resolve=True)
    config = freeze(cast("dict[str, Any]", settings))
    trial = default_root().trial_of(config)
    trial.create(config)
    command = [sys.executable, "-m", "jepa_cluster.launch.worker.main", str(trial.path)]
    rank = subprocess.Popen(command)

    def forward(number: int, frame: FrameType | None) -> None:
        rank.send_signal(number)

    # In place of submitit's handlers, which know no trial.
    for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, forward)
    code = rank.wait()
    if code == -signal.SIGKILL:  # Slurm is about to kill this process, which has no result
        time.sleep(KILLED_SECONDS)
    if code:
        # After the last output of Hydra and submitit.
        atexit.register(os._exit, code if code > 0 else 128 - code)
        error = (read_json(trial.failed) or {}).get("error", f"exit code {code}")
        raise JepaError(
            f"{trial.name}: {error}", where=str(trial.path), hint="its logs are in logs/ there"
        )
    return (read_json(trial.done) or {}).get("metrics", {})


def remove_torn_result() -> None:
    """Remove what submitit left when it was killed while it saved a result.

    It would refuse to save one for the job that runs again, and Hydra would wait without end.
    """
    if "SUBMITIT_FOLDER" in os.environ:
        result = submitit.JobEnvironment().paths.result_pickle
        result.with_name(f"{result.name}.save_tmp").unlink(missing_ok=True)


def main() -> None:
    """Run the command line of Hydra over conf/."""
    folder = str(compose.conf_dir())
    hydra.main(version_base="1.3", config_path=folder, config_name="config")(task)()

"""A stopped trial continues on another number of processes, as docs/howto/sweeps.md says."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.attempts import wait_for

from jepa_cluster.trial import spool
from jepa_cluster.trial.directory import Root, TrialDir

STEPS = 60
SWEEP = f"""
question: Does a trial have the same history on another number of processes?
base: [data=synthetic, model=vit_nano, optim.batch=16, optim.steps={STEPS}, optim.warmup_steps=4,
       probe.images=100, probe.test_images=64, runtime.device=cpu, runtime.workers=0,
       runtime.log_every=1, runtime.compile=false, runtime.threads=1]
grid: {{mask.targets: [2]}}
resources: [{{procs_per_node: 2, time: 1h}}]
"""


@pytest.fixture
def jepa(tmp_path: Path, tiny_data: Path) -> Callable[..., None]:
    """jepa(root, *words) runs a command in a folder with ask.yaml."""

    def run(root: Root, *words: str) -> None:
        command = [sys.executable, "-m", "jepa_cluster", *words, "--yes", "--root", str(root.path)]
        environment = {**os.environ, "JEPA_DATA": str(tiny_data)}
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr

    return run


def only_trial(root: Root) -> TrialDir:
    (name,) = root.names_by_id().values()
    return root.trial(name)


def losses(trial: TrialDir) -> dict[int, float]:
    return {row.step: row.values["loss"] for row in spool.read(trial).rows if "loss" in row.values}


@pytest.mark.slow
def test_a_stopped_trial_resumes_on_another_number_of_processes(
    jepa: Callable[..., None], tmp_path: Path
) -> None:
    """`jepa cancel`, another `procs_per_node` in the sweep file, `jepa resume`.

    Sums are rounded differently, and the difference grows with the steps.
    """
    sweep = tmp_path / "ask.yaml"
    sweep.write_text(SWEEP)
    whole = Root(tmp_path / "whole")
    jepa(whole, "submit", "ask.yaml")
    wait_for(only_trial(whole).done.exists)

    moved = Root(tmp_path / "moved")
    jepa(moved, "submit", "ask.yaml")
    trial = only_trial(moved)
    wait_for(lambda: len(losses(trial)) > 5)
    jepa(moved, "cancel", "ask")
    wait_for(lambda: trial.attempts()[-1].get("ended"))
    sweep.write_text(SWEEP.replace("procs_per_node: 2", "procs_per_node: 1"))
    jepa(moved, "resume", "ask.yaml")
    wait_for(trial.done.exists)

    assert [attempt["world"] for attempt in trial.attempts()] == [2, 1]
    expected, found = losses(only_trial(whole)), losses(trial)
    assert expected.keys() == found.keys() == set(range(1, STEPS + 1))
    for step, loss in expected.items():
        assert found[step] == pytest.approx(loss, rel=1e-3), step

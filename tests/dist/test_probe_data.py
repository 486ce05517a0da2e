"""Probes of sets without labels, and of fewer images than ranks."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from support import fake_trials, tiny_trial

from jepa_cluster.errors import ExitCode
from jepa_cluster.trial.directory import Root
from jepa_cluster.trial.files import read_json


def test_a_set_without_labels_is_trained_and_probed(
    launch: Callable, tiny_data: Path, tmp_path: Path
) -> None:
    """By RankMe and the loss on held-out images, which need no label."""
    data = tmp_path / "data"
    shutil.copytree(tiny_data, data)
    for split in ("train", "val"):
        fake_trials.remove_labels(data / split)
    config = tiny_trial.config(data, **{"optim.steps": 6, "probe.labels": []})
    trial = Root(tmp_path / "root").trial_of(config)
    trial.create(config)
    assert launch(trial).wait() == [ExitCode.DONE] * 2
    metrics = read_json(trial.done)["metrics"]
    assert metrics["probe/rankme"] > 1
    assert metrics["val/loss"] > 0
    assert not [name for name in metrics if name.endswith(("_error", "_top1"))]


def test_a_rank_without_images_takes_part_in_a_probe(launch: Callable, new_trial: Callable) -> None:
    trial = new_trial(**{"optim.steps": 6, "probe.test_images": 1})
    assert launch(trial).wait() == [ExitCode.DONE] * 2
    assert read_json(trial.done)["metrics"]["probe/class_top1"] in (0.0, 1.0)

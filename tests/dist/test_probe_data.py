"""Probes of sets without labels, of fewer images than ranks, and what ranks ask of the files."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from support import fake_trials, save_faults, tiny_trial
from support.nodes import Cluster
from support.save_faults import Strike

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


def test_one_rank_of_a_node_asks_once_for_the_sizes_of_the_shards(
    cluster: Cluster, tiny_config: Callable, fault: Strike
) -> None:
    """Of train, and of val at the first probe; later probes and other ranks ask for nothing."""
    trial = save_faults.new_trial(cluster.filesystem(), tiny_config, **{"runtime.probe_every": 3})
    asks = {
        (rank, count): fault("check", rank, "sleep", skip=count, times=1)
        for rank in range(4)
        for count in range(3)
    }
    assert cluster.start(trial, 4, list(asks.values())).wait() == [ExitCode.DONE] * 4
    asked = {key for key, ask in asks.items() if Path(ask.marker).exists()}
    assert asked == {(0, 0), (0, 1), (2, 0), (2, 1)}

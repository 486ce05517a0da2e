"""Probes of sets without labels, of fewer images than ranks, and what ranks ask of the files."""

from __future__ import annotations

import math
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from support import fake_trials, save_faults, tiny_trial
from support.attempts import wait_for_step
from support.nodes import Cluster
from support.save_faults import Strike

from jepa_cluster.errors import ExitCode
from jepa_cluster.trial import spool
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


def test_the_ends_of_a_trial_have_a_full_probe_and_every_error_a_gain(
    launch: Callable, new_trial: Callable
) -> None:
    """The gain is over the untrained encoder of this trial, also in an attempt that resumed."""
    trial = new_trial(**{"optim.steps": 30, "runtime.probe_every": 10})
    ranks = launch(trial)
    wait_for_step(trial, 12)
    ranks.kill(signal.SIGTERM)
    ranks.wait()
    assert launch(trial).wait() == [ExitCode.DONE] * 2
    rows = [row for row in spool.read(trial).settled_rows if "probe/rankme" in row.values]
    assert [row.step for row in rows] == [0, 10, 20, 30]
    first, _, between, last = (row.values for row in rows)
    for values in (first, last):
        for name in ("online/class_error", "mean_std_max/class_error", "class_1pct_error"):
            assert 0 <= values[f"probe/{name}"] <= 1
    assert "probe/online/class_error" not in between
    assert first["probe/online/class_error"] == first["probe/class_error"], "not yet trained"
    assert not [name for name in first if name.startswith("gain/")]
    for values in (between, last):
        for name, value in values.items():
            if name.startswith("gain/"):
                metric = name.removeprefix("gain/")
                assert value == first[metric] - values[metric]
        assert "gain/probe/class_error" in values
    momenta = [0.99 + 0.01 * step / 30 for step in range(30)]
    assert last["target_initial_share"] == pytest.approx(math.prod(momenta))
    assert first["target_initial_share"] == 1


def test_a_frozen_target_has_the_probe_of_the_untrained_encoder(
    launch: Callable, new_trial: Callable
) -> None:
    """The online encoder of the same trial has learned, which its own probe shows."""
    trial = new_trial(**{"optim.steps": 6, "objective": {"target": "frozen"}})
    assert launch(trial).wait() == [ExitCode.DONE] * 2
    first, last = (row.values for row in spool.read(trial).settled_rows if row.step in (0, 6))
    assert last["probe/rankme"] == first["probe/rankme"]
    assert last["probe/mean_std_max/class_error"] == first["probe/mean_std_max/class_error"]
    assert last["gain/probe/class_error"] == 0
    assert last["target_initial_share"] == 1


def test_pixels_can_be_predicted(
    launch: Callable,
    new_trial: Callable,
) -> None:
    trial = new_trial(**{"optim.steps": 6, "objective": {"target": "pixels"}})
    assert launch(trial).wait() == [ExitCode.DONE] * 2
    rows = spool.read(trial).settled_rows
    assert rows[-1].values["loss"] < rows[1].values["loss"]

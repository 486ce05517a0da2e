"""What a plan finds out about a data set before anything is queued."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import fake_trials
from support.submitted_sweep import SWEEP

from jepa_cluster import cli
from jepa_cluster.config import Data, Probe
from jepa_cluster.data import manifest
from jepa_cluster.errors import ConfigError, DataError
from jepa_cluster.sweep import data_set

NO_CLASS = Probe(labels=())


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Make two splits of 640 images with the label class."""
    return fake_trials.data_root(tmp_path / "data")


def test_digests_and_images_are_those_of_the_manifests(root: Path) -> None:
    found = data_set.read(root)
    data = data_set.with_digests(Data("x"), found)
    assert data.digest == found.train.digest
    assert data.val_digest == found.val.digest
    assert data.images == 640
    with pytest.raises(ConfigError, match=r"data.val_digest=ab is asked for, but the shards have"):
        data_set.with_digests(Data("x", val_digest="ab"), found)


def test_a_set_without_a_validation_split_is_refused_with_the_command_that_makes_one(
    root: Path,
) -> None:
    shutil.rmtree(root / "val")
    with pytest.raises(DataError, match="no validation split, and the probes of every trial") as e:
        data_set.read(root)
    assert e.value.where == str(root / "val")
    assert e.value.hint == f"jepa shards build <validation images> {root} --split val"


def test_a_flat_validation_folder_is_refused_as_one_without_shards(root: Path) -> None:
    shutil.rmtree(root / "val")
    (root / "val").mkdir()
    (root / "val" / "ILSVRC2012_val_00000001.JPEG").touch()
    with pytest.raises(DataError, match=r"no manifest.json, so no data set here") as e:
        data_set.read(root)
    assert e.value.where == str(root / "val")


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_label_that_a_split_does_not_have_is_named(root: Path, split: str) -> None:
    with pytest.raises(ConfigError, match=r"probe.labels has 'clas', but .* have class") as e:
        data_set.check_probe(Probe(labels=("clas",)), data_set.read(root))
    assert e.value.hint == "did you mean 'class'?"
    data_set.read.cache_clear()
    fake_trials.remove_labels(root / split)
    with pytest.raises(ConfigError, match=f"images in {root / split} have no label") as e:
        data_set.check_probe(Probe(), data_set.read(root))
    assert "probe.labels=[] trains without labels" in e.value.hint
    data_set.check_probe(NO_CLASS, data_set.read(root))


def test_plan_shows_the_data_and_what_is_probed(
    folder: Path, document: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    digest = manifest.read(folder / "data" / "train").digest
    expected = {
        "root": str(folder / "data"),
        "digest": digest,
        "train": 640,
        "val": 640,
        "labels": ["class"],
        "classes": 1,
        "probes": ["class"],
    }
    assert document("plan", "ask.yaml")["data"] == [expected]
    cli.main(["plan", "ask.yaml"])
    shown = " ".join(capsys.readouterr().out.split())
    assert (
        f"640 train + 640 val images, labels class (1 class), digest {digest}; probes: class"
        in shown
    )


def test_a_plan_whose_trials_would_fail_at_their_first_probe_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the line of the sweep file."""
    text = SWEEP.replace("model.depth=2]", "model.depth=2, 'probe.labels=[count]']")
    (folder / "ask.yaml").write_text(text)
    assert cli.main(["plan", "ask.yaml"]) == 78
    error = capsys.readouterr().err
    assert "probe.labels has 'count', but the images in" in error
    assert "where: ask.yaml:4" in error

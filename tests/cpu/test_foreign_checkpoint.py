"""A checkpoint, or weights, that another user made: reading it runs no code of it."""

import pickle
import struct
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import fake_trials

from jepa_cluster import cli
from jepa_cluster.errors import CheckpointError
from jepa_cluster.ijepa import weights
from jepa_cluster.training import checkpoint
from jepa_cluster.training.checkpoint_files import MANIFEST, Manifest
from jepa_cluster.trial.directory import TrialDir

SHARD = "shard-00000-of-00001.safetensors"
TENSORS = {"model.a": torch.arange(6.0).reshape(3, 2), "model.b": torch.tensor(1.0)}


class Evil:
    """Unpickling this creates a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


@pytest.fixture
def trial(tmp_path: Path) -> TrialDir:
    trial = TrialDir(tmp_path / "foreign")
    trial.create(fake_trials.config("vit_a", (0.1, 0.2), 0, 10))
    return trial


def write(trial: TrialDir, shard: bytes, **changes: Any) -> None:
    """Write a checkpoint as its maker wants it, with checksums that match."""
    folder = trial.checkpoint(10)
    folder.mkdir(parents=True)
    (folder / SHARD).write_bytes(shard)
    tensors = {name: ["F32", list(t.shape), False] for name, t in TENSORS.items()}
    files = {SHARD: [len(shard), zlib.crc32(shard)]}
    manifest = Manifest(10, "r", 1, 1, {}, None, files, {}, 1, tensors=tensors)
    (folder / MANIFEST).write_bytes(replace(manifest, **changes).to_bytes())


def plain_shard() -> bytes:
    return b"".join(map(bytes, checkpoint.shard_bytes(TENSORS)))


def test_a_sound_checkpoint_is_read(trial: TrialDir):
    write(trial, plain_shard())
    step, found = checkpoint.load_latest(trial)
    assert step == 10
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)


@pytest.mark.parametrize("suffix", ["", ".safetensors", ".pth"])
def test_pickles_are_not_unpickled(trial: TrialDir, tmp_path: Path, suffix: str):
    """Neither as a part of a checkpoint, nor beside it, nor as a file of weights."""
    mark = tmp_path / "ran"
    evil = pickle.dumps(Evil(mark))
    write(trial, evil)
    (trial.checkpoint(10) / ".metadata").write_bytes(evil)
    with pytest.raises(CheckpointError):
        checkpoint.load_latest(trial)
    file = tmp_path / f"weights{suffix}"
    file.write_bytes(evil)
    with pytest.raises(CheckpointError):
        weights.read(file)
    torch.save({"encoder": Evil(mark)}, file)
    with pytest.raises(CheckpointError):
        weights.read(file)
    assert not mark.exists()
    pickle.loads(evil)
    assert mark.exists(), "the pickle of this test does nothing"


def test_a_config_is_plain_yaml(trial: TrialDir, tmp_path: Path, capsys: pytest.CaptureFixture):
    mark = tmp_path / "ran"
    call = f"!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path [{mark}]]"
    trial.config.write_text(f"seed: {call}\n")
    write(trial, plain_shard())
    assert cli.main(["probe", str(trial.path)])
    assert "config.yaml is empty, torn or not plain YAML" in capsys.readouterr().err
    assert not mark.exists()


@pytest.mark.parametrize(
    "tensors",
    [
        {"model.c": ["F32", [1], False]},
        {"model.a": ["F99", [3, 2], False]},
        {"model.a": ["F32", [10**15, 2], False]},
        {"model.a": ["F32", [-3, 2], False]},
        {"model.a": ["F32", [300, 2], False]},
        {"model.a": [0]},
        {"model.a": None},
    ],
)
def test_a_manifest_that_promises_other_tensors_is_one_error(trial: TrialDir, tensors: Any):
    write(trial, plain_shard(), tensors=tensors)
    with pytest.raises(CheckpointError):
        checkpoint.load_latest(trial)


@pytest.mark.parametrize(
    "shard",
    [
        b"",
        struct.pack("<Q", 1 << 62) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 2) + b"{}",
        struct.pack("<Q", 1) + b"{",
    ],
)
def test_a_shard_with_another_header_is_one_error(trial: TrialDir, shard: bytes):
    write(trial, shard)
    with pytest.raises(CheckpointError):
        checkpoint.load_latest(trial)


def test_a_manifest_names_no_file_outside_its_folder(trial: TrialDir, tmp_path: Path):
    secret = tmp_path / "secret"
    secret.write_bytes(plain_shard())
    files = {"../../../secret": [secret.stat().st_size, zlib.crc32(secret.read_bytes())]}
    write(trial, b"", files=files)
    with pytest.raises(CheckpointError, match="outside its folder"):
        checkpoint.load_latest(trial)

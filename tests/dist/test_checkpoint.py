"""The format of a checkpoint: which ranks write it, and which ranks can read it."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
from support import sharded

from jepa_cluster.config import TrialConfig
from jepa_cluster.errors import CheckpointError
from jepa_cluster.training import checkpoint
from jepa_cluster.training.checkpoint_files import FORMAT, Manifest, read_manifest, row_range
from jepa_cluster.training.evaluate import load_target_encoder
from jepa_cluster.trial.directory import Root, TrialDir


@pytest.fixture
def new_trial_of(tmp_path: Path) -> Callable[[TrialConfig], TrialDir]:
    def make(config: TrialConfig) -> TrialDir:
        trial = Root(tmp_path).trial_of(config)
        trial.create(config)
        return trial

    return make


def test_any_number_of_ranks_reads_what_any_other_wrote(
    run_ranks: Callable, tiny_config: Callable, new_trial_of: Callable
) -> None:
    """Written by 4 ranks that share one copy; read by 1 to 4 ranks and by 2 replicas of 2 ranks.

    All read the same bits. The tiny model's widths are not divisible by 3, so row ranges of
    different lengths meet.
    """
    config = tiny_config(**{"runtime.procs_per_node": 4})
    trial = new_trial_of(config)
    for found in run_ranks(sharded.saved, 4, config, trial):
        assert found["error"] == ""
    expected = checkpoint.load_unsharded(trial.checkpoint(2))
    moments = [tensor for name, tensor in expected.items() if name.endswith("exp_avg")]
    assert any(tensor.any() for tensor in moments)
    for world, shard in ((1, None), (2, None), (3, None), (4, None), (4, 2)):
        reader = tiny_config(**{"runtime.procs_per_node": 4, "runtime.fsdp_shard_size": shard})
        for found in run_ranks(sharded.loaded, world, reader, trial):
            assert found.keys() == expected.keys()
            for name, tensor in expected.items():
                assert np.array_equal(found[name], tensor.numpy()), (name, world, shard)


def test_one_replica_copies_and_writes_and_the_others_do_nothing(
    run_ranks: Callable, tiny_config: Callable, new_trial_of: Callable
) -> None:
    """As 4 replicas, rank 0 copies the whole state once and writes one file; as 2, two ranks do."""
    whole = {}
    for shard, writers in ((1, 1), (2, 2)):
        overrides = {"runtime.procs_per_node": 4, "runtime.fsdp_shard_size": shard, "seed": shard}
        config = tiny_config(**overrides)
        trial = new_trial_of(config)
        whole[shard] = 0
        files = {"manifest.json"}
        for rank, found in enumerate(run_ranks(sharded.saved, 4, config, trial)):
            whole[shard] += found["staged"]
            if rank < writers:
                files.add(f"shard-{rank:05d}-of-{writers:05d}.safetensors")
                assert found["staged"] > 0
                assert found["error"] == ""
            else:
                assert found["staged"] == 0
                assert found["error"] is None
        assert {path.name for path in trial.checkpoint(2).iterdir()} == files
    assert whole[1] == whole[2], "one copy of the state, however many replicas there are"


def test_every_file_is_safetensors_and_the_manifest_gives_its_rows(
    run_ranks: Callable, tiny_config: Callable, new_trial_of: Callable
) -> None:
    config = tiny_config(**{"runtime.procs_per_node": 4})
    trial = new_trial_of(config)
    run_ranks(sharded.saved, 4, config, trial)
    folder = trial.checkpoint(2)
    manifest = read_manifest(folder)
    assert isinstance(manifest, Manifest)
    assert manifest.shards == 4
    assert manifest.format == FORMAT
    expected = checkpoint.load_unsharded(folder)
    for part, name in enumerate(sorted(manifest.files)):
        with safetensors.safe_open(folder / name, "pt") as file:
            for tensor in file.keys():  # noqa: SIM118
                dtype, shape, is_sharded = manifest.tensors[tensor]
                start, stop = row_range(shape[0], part, 4) if is_sharded else (0, None)
                rows = expected[tensor][start:stop] if shape else expected[tensor]
                assert dtype == "F32"
                assert list(expected[tensor].shape) == list(shape)
                assert torch.equal(file.get_tensor(tensor), rows), (name, tensor)


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ("unreadable", "FilesystemFault: Input/output error"),
        ("removed", "CheckpointGone: step-00000002 was removed"),
    ],
)
def test_a_rank_that_cannot_read_raises_on_every_rank(
    run_ranks: Callable, tiny_config: Callable, new_trial_of: Callable, fault: str, expected: str
) -> None:
    """No rank is left alone in the broadcast that follows."""
    config = tiny_config(**{"runtime.procs_per_node": 2})
    trial = new_trial_of(config)
    run_ranks(sharded.saved, 2, config, trial)
    for found in run_ranks(sharded.refused, 2, config, trial, fault):
        assert found.startswith(expected), found


def test_a_checkpoint_of_format_1_is_refused_without_unpickling_it(
    tiny_config: Callable, new_trial_of: Callable, tmp_path: Path
) -> None:
    """Its `.metadata` is a pickle, which may run any code.

    One message says what to do; no file is touched.
    """

    class Malicious:
        def __reduce__(self) -> tuple[Callable, tuple[str]]:
            return open, (str(tmp_path / "executed"), "w")  # type: ignore[return-value]

    config = tiny_config()
    trial = new_trial_of(config)
    folder = trial.checkpoint(2)
    folder.mkdir(parents=True)
    (folder / ".metadata").write_bytes(pickle.dumps(Malicious()))
    old = json.loads(Manifest(2, config.id, 1, 1, {}, None, {}, {}, 0, format=1).to_bytes())
    (folder / "manifest.json").write_text(json.dumps(old))
    message = f"this checkpoint has format 1, this version reads format {FORMAT}"
    with pytest.raises(CheckpointError, match=message) as e:
        load_target_encoder(trial, config, torch.device("cpu"))
    assert "move checkpoints/ away" in e.value.hint
    assert not (tmp_path / "executed").exists()
    assert trial.committed() == [2]


def test_saving_adds_one_socket_per_writing_rank_and_no_mesh(
    run_ranks: Callable, tiny_config: Callable, new_trial_of: Callable
) -> None:
    """Each writing rank opens one connection to the store, whose other end rank 0 holds."""
    config = tiny_config(**{"runtime.procs_per_node": 4})
    found = run_ranks(sharded.saved, 4, config, new_trial_of(config))
    first, *others = found
    assert first["sockets of saving"] <= 1 + 4
    for other in others:
        assert other["sockets of saving"] == 1
    print("sockets by rank:", [rank["sockets"] for rank in found])

"""A trial with `optim.transfer=mup` on two ranks: kills, probes, exported weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import timm
import torch
from support import sharded
from support.attempts import assert_same_bits, kill_and_resume

from jepa_cluster.ijepa import weights
from jepa_cluster.training import evaluate, trial_weights

BASE = {"encoder": 16, "encoder_head": 4, "predictor": 8, "predictor_head": 2}
MUP = {"model.init": "fan_in", "optim.transfer": "mup", "optim.base_width": BASE}


def test_a_killed_trial_has_the_same_bits_and_its_export_the_same_outputs(
    launch: Callable, new_trial: Callable, trained: Callable, tmp_path: Path
) -> None:
    """Five groups of parameters, sharded; with micro-batches. timm gets scaled queries."""
    settings = {"optim.steps": 30, "runtime.micro_batch": 4, **MUP}
    alone = trained(**settings)
    killed = new_trial("killed", **settings, **{"runtime.checkpoint_minutes": 0.004})
    kill_and_resume(launch, killed, 15)
    assert_same_bits(alone, killed)

    ours, _ = evaluate.load_target_encoder(alone, alone.read_config(), torch.device("cpu"))
    exported = weights.write(trial_weights.read(alone.path), "timm", tmp_path / "timm")
    theirs = timm.create_model(f"local-dir:{exported}", pretrained=True).eval()
    images = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        assert torch.allclose(ours(images), theirs.forward_features(images), atol=1e-5)
        for block in ours.blocks:
            assert block.attn.query_scale == 0.5
            block.attn.query_scale = 1.0
        assert not torch.allclose(ours(images), theirs.forward_features(images), atol=1e-5)


def test_two_ranks_and_one_train_alike(run_ranks: Callable, tiny_config: Callable) -> None:
    """The losses of sharded and of whole parameters agree."""
    two, _ = run_ranks(sharded.trained, 2, tiny_config(**MUP), 4)
    (one,) = run_ranks(sharded.trained, 1, tiny_config(**MUP), 4)
    assert max(map(abs, (a - b for a, b in zip(two[0], one[0], strict=True)))) < 1e-6

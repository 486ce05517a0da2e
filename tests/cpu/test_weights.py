"""Weights in and out: round trips through the published format, and through the real timm and transformers."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import timm
import torch
import transformers

from jepa_cluster import cli
from jepa_cluster.config import Data, Mask, Model, Optim, Predictor, Probe, Recipe
from jepa_cluster.errors import CheckpointError
from jepa_cluster.ijepa import masks, weights
from jepa_cluster.ijepa.objective import IJepa, init_weights

torch.set_num_threads(1)
OPTIM = Optim(8, 20, None, 4, None, 1e-3, 5e-3, 1e-6, 0.04, 0.4, "cosine", 0.9, 1.0)
RECIPE = Recipe(
    Model("tiny", 192, 2, 3, 4.0, 8, 32),
    Predictor(48, 2, 3),
    Mask("multiblock", 2, (0.15, 0.2), (0.75, 1.5), (0.85, 1.0)),
    Data("none"),
    OPTIM,
    Probe(),
)


@pytest.fixture(scope="module")
def model() -> IJepa:
    """Encoder and target differ, as in any checkpoint worth reading."""
    made = IJepa(RECIPE)
    init_weights(made, RECIPE)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in made.parameters():
            p += 0.05 * torch.randn(p.shape, generator=generator)
    return made


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def same(a: weights.Weights, b: weights.Weights) -> bool:
    return a.parts.keys() == b.parts.keys() and all(
        part.keys() == b.parts[name].keys() and all(torch.equal(v, b.parts[name][k]) for k, v in part.items())
        for name, part in a.parts.items()
    )


def test_a_published_checkpoint_is_read_strictly_and_gives_the_same_loss(model, images, tmp_path):
    """Their keys, their `module.` prefixes, extra entries; sizes inferred; loss and stats of a step bit for bit."""
    ours = weights.from_model(model, 3)
    path = weights.write(ours, "published", tmp_path / "IN1K-tiny.pth.tar")
    raw = torch.load(path, weights_only=True)
    assert set(raw) == {"encoder", "predictor", "target_encoder"}
    assert {"module.predictor_blocks.1.attn.qkv.weight", "module.mask_token"} <= set(raw["predictor"])
    torch.save({**raw, "opt": {"state": {}}, "scaler": None, "epoch": 300, "lr": 1e-6, "batch_size": 128}, path)
    found = weights.read(path)
    assert found.format == "published" and found.notes["epoch"] == 300 and same(found, ours)
    assert found.sizes == weights.Sizes(192, 2, 3, 768, 8, 4, 48, 2)
    other = IJepa(RECIPE)
    weights.load(other, found)
    index = np.arange(2)
    drawn = masks.sample(RECIPE.mask, 4, 0, np.zeros_like(index), index)
    tensors = masks.Masks(*(None if f is None else torch.from_numpy(f) for f in drawn))
    assert torch.equal(model(images, tensors)[0], other(images, tensors)[0])


def test_timm_loads_what_we_write_and_we_read_what_timm_writes(model, images, tmp_path):
    """`timm.create_model('local-dir:...')` builds the target encoder: same features; and its state dict comes back."""
    folder = weights.write(weights.from_model(model, 3), "timm", tmp_path / "timm")
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.no_grad():
        assert (theirs(images) - model.target(images).mean(1)).abs().max() < 1e-6
        assert (theirs(images) - model.encoder(images).mean(1)).abs().max() > 1e-2
    torch.save(theirs.state_dict(), tmp_path / "timm.pth")
    back = weights.read(tmp_path / "timm.pth")
    assert back.format == "timm" and same(
        back, dataclasses.replace(back, parts={"target": weights.from_model(model, 3).parts["target"]})
    )


def test_transformers_loads_what_we_write_and_we_read_what_it_writes(model, images, tmp_path):
    """`IJepaModel.from_pretrained` gives the target encoder's patches, nothing missing or left over; and back."""
    folder = weights.write(weights.from_model(model, 3), "transformers", tmp_path / "hf")
    theirs, report = transformers.IJepaModel.from_pretrained(folder, output_loading_info=True, add_pooling_layer=False)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    with torch.no_grad():
        got, want = theirs.eval()(images).last_hidden_state, model.target(images)
        assert (got - want).abs().max() < 1e-6 * want.abs().max()
    theirs.save_pretrained(tmp_path / "again")
    back = weights.read(tmp_path / "again")
    assert back.format == "transformers" and back.sizes.heads == 3
    assert all(torch.equal(v, model.target.state_dict()[k]) for k, v in back.parts["target"].items())


@pytest.mark.parametrize("harm", ["missing", "unknown", "shape", "truncated", "foreign"])
def test_nothing_is_ever_skipped(model, tmp_path, harm):
    """A key too few, too many, of another shape, half a file, another network: CheckpointError that names it."""
    path = weights.write(weights.from_model(model, 3), "published", tmp_path / "c.pth")
    raw = torch.load(path, weights_only=True)
    if harm == "missing":
        del raw["target_encoder"]["module.blocks.1.norm2.bias"]
    elif harm == "unknown":
        raw["encoder"]["module.cls_token"] = torch.zeros(1)
    elif harm == "shape":
        raw["predictor"]["module.mask_token"] = torch.zeros(1, 1, 7)
    elif harm == "foreign":
        raw = {"layer1.weight": torch.zeros(3)}
    torch.save(raw, path)
    if harm == "truncated":
        path.write_bytes(path.read_bytes()[:5000])
    words = {
        "missing": "blocks.1.norm2.bias",
        "unknown": "cls_token",
        "shape": "mask_token",
        "foreign": "no known format",
    }
    with pytest.raises(CheckpointError, match=words.get(harm, "cannot read")):
        weights.read(path)


def test_weights_of_other_sizes_do_not_load(model, tmp_path):
    """A model of another depth refuses, and says which key."""
    smaller = IJepa(dataclasses.replace(RECIPE, model=dataclasses.replace(RECIPE.model, depth=1)))
    with pytest.raises(CheckpointError, match="does not fit"):
        weights.load(smaller, weights.from_model(model, 3))


def test_the_verbs_inspect_and_export(model, tmp_path, capsys):
    """`jepa weights export` and `inspect`, end to end, for every format."""
    path = weights.write(weights.from_model(model, 3), "published", tmp_path / "c.pth")
    for kind in ("timm", "transformers", "published"):
        assert cli.main(["weights", "export", str(path), str(tmp_path / kind), "--to", kind]) == 0
        assert weights.read(tmp_path / kind).sizes.width == 192
    assert same(weights.read(tmp_path / "published"), weights.read(path))
    capsys.readouterr()
    assert cli.main(["weights", "inspect", str(path)]) == 0
    said = capsys.readouterr().out
    assert "width 192" in said and "predictor" in said and "target" in said
    assert cli.main(["weights", "inspect", str(tmp_path / "nowhere")]) != 0

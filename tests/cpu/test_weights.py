"""Weights in and out: round trips through the published format, timm and transformers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

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
from jepa_cluster.ijepa.weight_sizes import Sizes, infer_sizes
from jepa_cluster.training import trial_weights

torch.set_num_threads(1)
OPTIM = Optim(
    batch=8,
    steps=20,
    epochs=None,
    warmup_steps=4,
    warmup_epochs=None,
    start_lr=1e-3,
    lr=5e-3,
    final_lr=1e-6,
    weight_decay=0.04,
    final_weight_decay=0.4,
    decay_shape="cosine",
    momentum=0.9,
    final_momentum=1.0,
)
RECIPE = Recipe(
    Model(
        "tiny",
        width=192,
        depth=2,
        heads=3,
        mlp_ratio=4.0,
        patch=8,
        image=32,
    ),
    Predictor(48, 2, 3),
    Mask(
        "multiblock",
        targets=2,
        target_scale=(0.15, 0.2),
        target_aspect=(0.75, 1.5),
        context_scale=(0.85, 1.0),
    ),
    Data("none"),
    OPTIM,
    Probe(),
)


@pytest.fixture(scope="module")
def model() -> IJepa:
    """A model whose encoder and target differ, as in a checkpoint of a training."""
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


def weights_of(model: IJepa) -> weights.Weights:
    """The weights of a model of RECIPE."""
    parts = {}
    for name in ("encoder", "predictor", "target"):
        parts[name] = model.get_submodule(name).state_dict()
    return weights.Weights("checkpoint", parts, infer_sizes(parts, {"heads": 3}), {})


@pytest.fixture
def published(model: IJepa, tmp_path: Path) -> Path:
    """The model's weights in the published format."""
    return weights.write(weights_of(model), "published", tmp_path / "IN1K-tiny.pth.tar")


def assert_same_part(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert torch.equal(value, b[key]), key


def assert_same(a: weights.Weights, b: weights.Weights) -> None:
    assert a.parts.keys() == b.parts.keys()
    for name, part in a.parts.items():
        assert_same_part(part, b.parts[name])


def drawn_masks() -> masks.Masks:
    index = np.arange(2)
    arrays = masks.sample(RECIPE.mask, 4, 0, np.zeros_like(index), index)
    tensors = [None if array is None else torch.from_numpy(array) for array in arrays]
    return masks.Masks(*tensors)


def test_a_published_checkpoint_is_read_and_gives_the_same_loss(model, images, published):
    """`module.` prefixes and extra entries are read; sizes are inferred; the loss is equal."""
    raw = torch.load(published, weights_only=True)
    assert set(raw) == {"encoder", "predictor", "target_encoder"}
    assert "module.predictor_blocks.1.attn.qkv.weight" in raw["predictor"]
    assert "module.mask_token" in raw["predictor"]
    extra = {
        "opt": {"state": {}},
        "scaler": None,
        "epoch": 300,
        "lr": 1e-6,
        "batch_size": 128,
    }
    torch.save({**raw, **extra}, published)

    found = weights.read(published)
    assert found.format == "published"
    assert found.notes["epoch"] == 300
    assert_same(found, weights_of(model))
    assert found.sizes == weights.Sizes(
        192,
        2,
        3,
        768,
        8,
        4,
        48,
        2,
        192,
    )

    other = IJepa(RECIPE)
    for name, part in found.parts.items():
        other.get_submodule(name).load_state_dict(part)
    drawn = drawn_masks()
    loss, _ = model(images, drawn)
    other_loss, _ = other(images, drawn)
    assert torch.equal(loss, other_loss)


def test_timm_loads_what_we_write_and_we_read_what_timm_writes(model, images, tmp_path):
    """`timm.create_model('local-dir:...')` builds the target encoder: same features."""
    ours = weights_of(model)
    folder = weights.write(ours, "timm", tmp_path / "timm")
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.no_grad():
        features = theirs(images)
        assert (features - model.target(images).mean(1)).abs().max() < 1e-6
        assert (features - model.encoder(images).mean(1)).abs().max() > 1e-2
    torch.save(theirs.state_dict(), tmp_path / "timm.pth")
    back = weights.read(tmp_path / "timm.pth")
    assert back.format == "timm"
    assert back.parts.keys() == {"target"}
    assert_same_part(back.parts["target"], ours.parts["target"])


def test_transformers_loads_what_we_write_and_we_read_what_it_writes(model, images, tmp_path):
    """`IJepaModel.from_pretrained` gives the target encoder's patches, with no key left over."""
    folder = weights.write(weights_of(model), "transformers", tmp_path / "hf")
    theirs, report = transformers.IJepaModel.from_pretrained(
        folder, output_loading_info=True, add_pooling_layer=False
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    with torch.no_grad():
        got = theirs.eval()(images).last_hidden_state
        want = model.target(images)
        assert (got - want).abs().max() < 1e-6 * want.abs().max()
    theirs.save_pretrained(tmp_path / "again")
    back = weights.read(tmp_path / "again")
    assert back.format == "transformers"
    assert back.sizes.heads == 3
    state = model.target.state_dict()
    for key, value in back.parts["target"].items():
        assert torch.equal(value, state[key])


def remove_key(raw: dict) -> None:
    del raw["target_encoder"]["module.blocks.1.norm2.bias"]


def add_key(raw: dict) -> None:
    raw["encoder"]["module.cls_token"] = torch.zeros(1)


def change_shape(raw: dict) -> None:
    raw["predictor"]["module.mask_token"] = torch.zeros(1, 1, 7)


def replace_network(raw: dict) -> None:
    raw.clear()
    raw["layer1.weight"] = torch.zeros(3)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove_key, "blocks.1.norm2.bias"),
        (add_key, "cls_token"),
        (change_shape, "mask_token"),
        (replace_network, "no known format"),
    ],
)
def test_nothing_is_ever_skipped(published, damage, message):
    """A key too few or too many, another shape or network is a CheckpointError that names it."""
    raw = torch.load(published, weights_only=True)
    damage(raw)
    torch.save(raw, published)
    with pytest.raises(CheckpointError, match=message):
        weights.read(published)


def test_a_truncated_file_is_refused(published):
    """The start of a file is no checkpoint."""
    published.write_bytes(published.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="cannot read"):
        weights.read(published)


def test_sizes_of_a_trial_are_those_of_its_tensors(model):
    assert Sizes.of(RECIPE) == weights_of(model).sizes


@pytest.mark.parametrize("kind", ["timm", "transformers", "published"])
def test_layers_that_a_format_does_not_have_are_refused(tmp_path, kind):
    """A trial with SwiGLU can be inspected, and is not written as something else."""
    layers = {"mlp_layer": "SwiGLU"}
    recipe = replace(RECIPE, model=replace(RECIPE.model, timm=layers))
    parts = {"target": IJepa(recipe).target.state_dict()}
    found = weights.Weights("checkpoint", parts, Sizes.of(recipe), {}, layers)
    assert trial_weights.describe(found)["sizes"]["hidden"] == 768
    with pytest.raises(CheckpointError, match=f"{kind} has no place for model.timm=.*SwiGLU"):
        weights.write(found, kind, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_verbs_inspect_and_export(published, tmp_path, capsys):
    """`jepa weights export` and `inspect`, end to end, for every format."""
    for kind in ("timm", "transformers", "published"):
        target = tmp_path / kind
        assert cli.main(["weights", "export", str(published), str(target), "--to", kind]) == 0
        assert weights.read(target).sizes.width == 192
    assert_same(weights.read(tmp_path / "published"), weights.read(published))
    capsys.readouterr()
    assert cli.main(["weights", "inspect", str(published)]) == 0
    out = capsys.readouterr().out
    assert "width 192" in out
    assert "predictor" in out
    assert "target" in out
    assert cli.main(["weights", "inspect", str(tmp_path / "nowhere")]) != 0

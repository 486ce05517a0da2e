"""The model: parity with timm, shortcuts, padding, initialisation and the target encoder."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import timm
import torch
from support.without_shortcuts import WithoutShortcuts
from torch import Tensor

from jepa_cluster.config import Data, Mask, Model, Optim, Predictor, Probe, Recipe
from jepa_cluster.errors import ConfigError
from jepa_cluster.ijepa import cpu_linear, masks
from jepa_cluster.ijepa.objective import IJepa, features, init_weights, update_target

torch.set_num_threads(1)  # more threads make tensors this small slower
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
        width=48,
        depth=3,
        heads=3,
        mlp_ratio=4.0,
        patch=8,
        image=64,
    ),
    Predictor(24, 3, 3),
    Mask(
        "multiblock",
        targets=4,
        target_scale=(0.15, 0.2),
        target_aspect=(0.75, 1.5),
        context_scale=(0.85, 1.0),
    ),
    Data("none"),
    OPTIM,
    Probe(),
    seed=3,
)
TIMM_SHAPE = {
    "img_size": 64,
    "patch_size": 8,
    "embed_dim": 48,
    "depth": 3,
    "num_heads": 3,
    "num_classes": 0,
    "class_token": False,
    "global_pool": "avg",
    "fc_norm": False,
}
TIMM_OPTIONS = [
    {"reg_tokens": 3},
    {"mlp_layer": "SwiGLU"},
    {"norm_layer": "rmsnorm"},
    {"qk_norm": True},
    {"init_values": 0.1},
    {"attn_layer": "diff"},
]
MODES = ["multiblock", "reference", "packed", "rasterized", "block", "random"]


def change(section: str, **values) -> Recipe:
    """Return RECIPE with these values in one of its sections."""
    changed = dataclasses.replace(getattr(RECIPE, section), **values)
    return dataclasses.replace(RECIPE, **{section: changed})


def built(recipe: Recipe, kind: type[IJepa] = IJepa) -> IJepa:
    """Return a model whose target differs from its encoder and whose biases are not zero."""
    model = kind(recipe)
    init_weights(model, recipe)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model


def drawn(recipe: Recipe, count: int = 8) -> masks.Masks:
    """Return the masks of the first images of epoch 0 as tensors."""
    index = np.arange(count)
    epoch = np.zeros_like(index)
    arrays = masks.sample(
        recipe.mask,
        recipe.model.grid,
        0,
        epoch,
        index,
    )
    return as_tensors(arrays)


def as_tensors(arrays: masks.Masks) -> masks.Masks:
    tensors = [None if array is None else torch.from_numpy(array) for array in arrays]
    return masks.Masks(*tensors)


def images(count: int = 8, size: int = 64) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(
        count,
        3,
        size,
        size,
        generator=generator,
    )


def parameter_gradients(model: IJepa) -> dict[str, Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found[name] = parameter.grad.clone()
    return found


def gradients(model: IJepa, recipe: Recipe, drawn_masks: masks.Masks) -> dict[str, Tensor]:
    """Return the gradient of each parameter, and the loss under the key 'loss'."""
    model.zero_grad()
    loss, _ = model(images(), drawn_masks)
    loss.backward()
    return {"loss": loss.detach(), **parameter_gradients(model)}


def furthest(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Return the largest difference, relative to the largest value of each tensor in `b`."""
    assert a.keys() == b.keys()
    found = []
    for key, wanted in b.items():
        difference = (a[key] - wanted).abs().max()
        largest = wanted.abs().max().clamp_min(1e-12)
        found.append((difference / largest).item())
    return max(found)


# ---- against timm


def test_the_encoder_and_timm_load_each_other_strictly_and_agree():
    """Same keys both ways, same output to 1e-6 of its largest value in fp32."""
    ours = built(RECIPE).encoder
    theirs = timm.models.VisionTransformer(**TIMM_SHAPE)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    with torch.no_grad():
        got = ours(images())
        want = theirs.forward_features(images())
        assert (got - want).abs().max() < 1e-6 * want.abs().max()
        pooled = features(ours, images())
        assert (pooled - theirs(images())).abs().max() < 1e-6


@pytest.mark.parametrize("options", TIMM_OPTIONS, ids=str)
def test_a_timm_option_gives_the_output_of_timm(options):
    """Registers, SwiGLU, norms and attentions: the output of timm, for all rows and chosen ones."""
    recipe = change("model", timm=options)
    model = built(recipe).eval()
    resolved = dict(options)
    if "mlp_layer" in options:
        resolved["mlp_layer"] = getattr(timm.layers, options["mlp_layer"])
    theirs = timm.models.VisionTransformer(**TIMM_SHAPE, no_embed_class=True, **resolved)
    theirs.eval()
    theirs.load_state_dict(model.encoder.state_dict(), strict=True)
    registers = options.get("reg_tokens", 0)
    with torch.no_grad():
        got = model.encoder(images())
        want = theirs.forward_features(images())[:, registers:]
        assert (got - want).abs().max() < 2e-6
        rows = drawn(recipe).union
        some = model.encoder(images(), rows=rows)
        wanted_rows = want.gather(1, rows[..., None].expand(-1, -1, 48))
        assert (some - wanted_rows).abs().max() < 5e-6


def test_an_unknown_timm_option_is_refused_with_the_nearest_name():
    """A typo ends in a ConfigError, not in a traceback from timm."""
    model = dataclasses.replace(RECIPE.model, timm={"reg_token": 4})
    with pytest.raises(ConfigError, match="reg_token is no option") as caught:
        model.check()
    assert "reg_tokens" in str(caught.value)


def test_other_resolutions_resample_positions():
    """At twice the image size positions are interpolated: same shape of features, all finite."""
    encoder = built(RECIPE).encoder
    enlarged = torch.nn.functional.interpolate(images(), scale_factor=2, mode="nearest")
    with torch.no_grad():
        small = features(encoder, images())
        large = features(encoder, enlarged)
    assert small.shape == large.shape
    assert torch.isfinite(large).all()


def test_positions_are_sines_and_cosines_of_column_then_row():
    """Entry by entry, from the definition."""
    model = IJepa(RECIPE)
    init_weights(model, RECIPE)
    table = model.encoder.pos_embed[0]
    for row, column in (
        (0, 0),
        (2, 5),
        (7, 1),
    ):
        want = []
        for coordinate in (column, row):
            angles = [coordinate / 10000 ** (i / 12) for i in range(12)]
            want += map(math.sin, angles)
            want += map(math.cos, angles)
        assert table[row * 8 + column].tolist() == pytest.approx(want, abs=1e-6)


# ---- shortcuts


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("predictor", ["per_target", "joint"])
def test_the_shortcuts_change_no_output(mode, predictor):
    """Loss and gradients differ by at most 5e-6 (relative) from those without shortcuts."""
    targets = {"rasterized": 3, "random": 1}.get(mode, 4)
    recipe = dataclasses.replace(
        RECIPE,
        mask=dataclasses.replace(RECIPE.mask, mode=mode, targets=targets),
        predictor=dataclasses.replace(RECIPE.predictor, mode=predictor),
    )
    drawn_masks = drawn(recipe)
    got = gradients(built(recipe), recipe, drawn_masks)
    want = gradients(built(recipe, WithoutShortcuts), recipe, drawn_masks)
    assert furthest(got, want) < 5e-6


def test_onednn_products_change_no_output(monkeypatch):
    """With oneDNN on the CPU: relative difference of loss and gradients at most 5e-6."""
    model = built(RECIPE)
    drawn_masks = drawn(RECIPE)
    monkeypatch.setattr(cpu_linear, "MIN_PRODUCTS", 0)
    monkeypatch.setattr(cpu_linear, "enabled", True)
    with_onednn = gradients(model, RECIPE, drawn_masks)
    monkeypatch.setattr(cpu_linear, "enabled", False)
    without = gradients(model, RECIPE, drawn_masks)
    assert furthest(with_onednn, without) < 5e-6


def test_padding_reaches_no_real_token():
    """Whatever the padding of targets and context holds, loss and gradients stay the same."""
    for mode in ("multiblock", "packed"):
        recipe = change("mask", mode=mode)
        model = built(recipe)
        drawn_masks = drawn(recipe)
        generator = torch.Generator().manual_seed(2)

        def noise_in_padding(
            index: Tensor, lengths: Tensor | None, top: int = 64, generator=generator
        ) -> Tensor:
            if lengths is None:
                return index
            real = torch.arange(index.shape[-1]) < lengths[..., None]
            noise = torch.randint(0, top, index.shape, generator=generator)
            return torch.where(real, index, noise)

        union_size = drawn_masks.union.shape[1]
        targets = noise_in_padding(drawn_masks.targets, drawn_masks.target_len)
        slots = noise_in_padding(drawn_masks.slots, drawn_masks.target_len, top=union_size)
        context = noise_in_padding(drawn_masks.context, drawn_masks.context_len)
        other = drawn_masks._replace(context=context, targets=targets, slots=slots)
        assert (other.targets != drawn_masks.targets).any()
        got = gradients(model, recipe, other)
        want = gradients(model, recipe, drawn_masks)
        assert furthest(got, want) < 5e-6


def test_micro_batches_average_to_the_whole_batch():
    """Two halves give the gradients of the whole batch, targets of unequal size included."""
    model = built(RECIPE)
    drawn_masks = drawn(RECIPE)
    whole = gradients(model, RECIPE, drawn_masks)
    model.zero_grad()
    for half in (slice(0, 4), slice(4, 8)):
        part = masks.Masks(*(None if field is None else field[half] for field in drawn_masks))
        loss, _ = model(images()[half], part)
        (loss / 2).backward()
    del whole["loss"]
    assert furthest(whole, parameter_gradients(model)) < 5e-6


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked_shapes")
def test_a_compiled_block_gives_the_same_loss_and_gradients():
    """torch.compile of one block of each kind: no graph break, differences at most 5e-5."""
    model = built(RECIPE)
    drawn_masks = drawn(RECIPE)
    plain = gradients(model, RECIPE, drawn_masks)
    blocks = (
        model.encoder.blocks[0],
        model.predictor.blocks[0],
        model.predictor.blocks[-1],
        model.target.blocks[-1],
    )
    for block in blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    compiled = gradients(model, RECIPE, drawn_masks)
    assert furthest(compiled, plain) < 5e-5


# ---- initialisation


def test_initialisation_is_a_function_of_the_seed_and_leaves_nothing_out():
    """Same seed same bits, another seed others; every parameter is filled; target = encoder."""
    with torch.device("meta"):
        model = IJepa(RECIPE)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    init_weights(model, RECIPE)

    again = IJepa(RECIPE)
    init_weights(again, RECIPE)
    for (name, a), b in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name

    other = IJepa(RECIPE)
    init_weights(other, dataclasses.replace(RECIPE, seed=4))
    first_weight = model.encoder.blocks[0].attn.qkv.weight
    assert not torch.equal(first_weight, other.encoder.blocks[0].attn.qkv.weight)

    for a, b in zip(model.encoder.parameters(), model.target.parameters(), strict=True):
        assert torch.equal(a, b)
    assert sum(b.numel() for b in model.buffers()) == 0


def test_depth_rescaled_divides_what_writes_to_the_residual_stream():
    """Output projections of block i are divided by sqrt(2 i); nothing else differs."""
    reference = IJepa(RECIPE)
    rescaled = IJepa(RECIPE)
    init_weights(reference, RECIPE)
    init_weights(rescaled, change("model", init="depth_rescaled"))
    spread = reference.encoder.blocks[1].mlp.fc1.weight.std().item()
    assert spread == pytest.approx(0.02, rel=0.05)
    for (name, a), b in zip(reference.named_parameters(), rescaled.parameters(), strict=True):
        want = a
        if name.endswith(("attn.proj.weight", "mlp.fc2.weight")):
            block_number = int(name.split(".")[2]) + 1
            want = a / math.sqrt(2 * block_number)
        assert torch.allclose(b, want, rtol=1e-6, atol=0), name


def test_the_target_follows_and_takes_no_gradient():
    """target <- m target + (1 - m) encoder; it gets no gradient."""
    model = built(RECIPE)
    before = {name: p.clone() for name, p in model.target.named_parameters()}
    gradients(model, RECIPE, drawn(RECIPE))
    update_target(model, 0.75)
    for name, parameter in model.target.named_parameters():
        want = 0.75 * before[name] + 0.25 * model.encoder.get_parameter(name)
        assert torch.allclose(parameter, want, atol=1e-7)
        assert parameter.grad is None

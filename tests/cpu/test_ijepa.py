"""The model and the objective: parity with timm and with the paper's equations, shortcuts, initialisation."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import timm
import torch
from torch import Tensor

from jepa_cluster.config import Data, Mask, Model, Optim, Predictor, Probe, Recipe
from jepa_cluster.errors import ConfigError
from jepa_cluster.ijepa import cpu_linear, masks, schedules
from jepa_cluster.ijepa.flops import NO_SHORTCUTS, Shortcuts
from jepa_cluster.ijepa.objective import IJepa, features, init_weights, update_target
from jepa_cluster.ijepa.varlen_attention import VarlenAttention, flash_varlen
from jepa_cluster.ijepa.vit import Encoder, patchify

torch.set_num_threads(1)  # tensors this small only lose by sharing
OPTIM = Optim(8, 20, None, 4, None, 1e-3, 5e-3, 1e-6, 0.04, 0.4, "cosine", 0.9, 1.0)
RECIPE = Recipe(
    Model("tiny", 48, 3, 3, 4.0, 8, 64),
    Predictor(24, 3, 3),
    Mask("multiblock", 4, (0.15, 0.2), (0.75, 1.5), (0.85, 1.0)),
    Data("none"),
    OPTIM,
    Probe(),
    seed=3,
)
SHAPE = {"img_size": 64, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 0}
SHAPE |= {"class_token": False, "global_pool": "avg", "fc_norm": False}
OPTIONS = [{"reg_tokens": 3}, {"mlp_layer": "SwiGLU"}, {"norm_layer": "rmsnorm"}, {"qk_norm": True}]
OPTIONS += [{"init_values": 0.1}, {"attn_layer": "diff"}]
NONE = NO_SHORTCUTS
MODES = ["multiblock", "reference", "packed", "rasterized", "block", "random"]


def change(section: str, **values) -> Recipe:
    return dataclasses.replace(RECIPE, **{section: dataclasses.replace(getattr(RECIPE, section), **values)})


def built(recipe: Recipe, shortcuts: Shortcuts | None = None, varlen: VarlenAttention = flash_varlen) -> IJepa:
    model = IJepa(recipe, shortcuts, varlen)
    init_weights(model, recipe)
    with torch.no_grad():  # a target that is not the encoder, biases that are not zero
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model


def drawn(recipe: Recipe, count: int = 8) -> masks.Masks:
    index = np.arange(count)
    found = masks.sample(recipe.mask, recipe.model.grid, 0, np.zeros_like(index), index)
    return masks.Masks(*(None if f is None else torch.from_numpy(f) for f in found))


def images(count: int = 8, size: int = 64) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def gradients(model: IJepa, recipe: Recipe, seen: masks.Masks) -> dict[str, Tensor]:
    model.zero_grad()
    loss, _ = model(images(), seen)
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}}


def furthest(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(((a[k] - b[k]).abs().max() / b[k].abs().max().clamp_min(1e-12)).item() for k in a)


# ---- against timm


def test_the_encoder_and_timm_load_each_other_strictly_and_agree():
    """Same key set both ways, same output to 1e-6 of its largest value in fp32."""
    ours = built(RECIPE).encoder
    theirs = timm.models.VisionTransformer(**SHAPE)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    with torch.no_grad():
        got, want = ours(images()), theirs.forward_features(images())
        assert (got - want).abs().max() < 1e-6 * want.abs().max()
        assert (features(ours, images()) - theirs(images())).abs().max() < 1e-6


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_timm_option_is_one_line_of_conf(options):
    """Registers, SwiGLU, other norms and attentions: timm's own output, for all rows and for chosen ones."""
    recipe = change("model", timm=options)
    model = built(recipe).eval()
    named = {k: getattr(timm.layers, v) if k == "mlp_layer" else v for k, v in options.items()}
    theirs = timm.models.VisionTransformer(**SHAPE, no_embed_class=True, **named).eval()
    theirs.load_state_dict(model.encoder.state_dict(), strict=True)
    with torch.no_grad():
        got, want = model.encoder(images()), theirs.forward_features(images())[:, options.get("reg_tokens", 0) :]
        assert (got - want).abs().max() < 2e-6
        rows = drawn(recipe).union
        some = model.encoder(images(), rows=rows)
        assert (some - want.gather(1, rows[..., None].expand(-1, -1, 48))).abs().max() < 5e-6


def test_an_unknown_timm_option_is_refused_with_the_nearest_name():
    """A typo ends in a ConfigError, not in a traceback of timm's."""
    with pytest.raises(ConfigError, match="reg_token is no option") as caught:
        Encoder(dataclasses.replace(RECIPE.model, timm={"reg_token": 4}))
    assert "reg_tokens" in str(caught.value)


def test_other_resolutions_resample_positions():
    """A larger image keeps its model: twice the pixels, positions interpolated, features finite and near."""
    encoder = built(RECIPE).encoder
    with torch.no_grad():
        small = features(encoder, images())
        large = features(encoder, torch.nn.functional.interpolate(images(), scale_factor=2, mode="nearest"))
    assert small.shape == large.shape and torch.isfinite(large).all()


def test_positions_are_sines_and_cosines_of_column_then_row():
    """Entry by entry, from the definition."""
    model = IJepa(RECIPE)
    init_weights(model, RECIPE)
    table = model.encoder.pos_embed[0]
    for row, column in ((0, 0), (2, 5), (7, 1)):
        want = []
        for coordinate in (column, row):
            angles = [coordinate / 10000 ** (i / 12) for i in range(12)]
            want += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        assert table[row * 8 + column].tolist() == pytest.approx(want, abs=1e-6)


# ---- shortcuts


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("predictor", ["per_target", "joint"])
@pytest.mark.parametrize(
    "shortcut", ["shared_first_block", "predicted_rows_only", "targets_only_last_block", "gather_before_embed"]
)
def test_each_shortcut_changes_no_output(mode, predictor, shortcut):
    """Loss and every gradient with one shortcut on and all others off: relative difference at most 5e-6."""
    count = {"rasterized": 3, "random": 1}.get(mode, 4)
    recipe = change("mask", mode=mode, targets=count)
    recipe = dataclasses.replace(recipe, predictor=dataclasses.replace(recipe.predictor, mode=predictor))
    seen = drawn(recipe)
    one, none = built(recipe, NONE._replace(**{shortcut: True})), built(recipe, NONE)
    assert furthest(gradients(one, recipe, seen), gradients(none, recipe, seen)) < 5e-6


def test_onednn_products_change_no_output(monkeypatch):
    """The CPU's other matrix library: relative difference of loss and gradients at most 5e-6."""
    model, seen = built(RECIPE), drawn(RECIPE)
    monkeypatch.setattr(cpu_linear, "MIN_PRODUCTS", 0)
    monkeypatch.setattr(cpu_linear, "enabled", True)
    fast = gradients(model, RECIPE, seen)
    monkeypatch.setattr(cpu_linear, "enabled", False)
    assert furthest(fast, gradients(model, RECIPE, seen)) < 5e-6


def test_padding_reaches_no_real_token():
    """Whatever stands in the padding of targets and context, loss and gradients stay the same."""
    for mode in ("multiblock", "packed"):
        recipe = change("mask", mode=mode)
        model, seen = built(recipe), drawn(recipe)
        noise = torch.Generator().manual_seed(2)

        def scribbled(index: Tensor, lengths: Tensor | None, noise=noise, top: int = 64) -> Tensor:
            if lengths is None:
                return index
            real = torch.arange(index.shape[-1]) < lengths[..., None]
            return torch.where(real, index, torch.randint(0, top, index.shape, generator=noise))

        targets = scribbled(seen.targets, seen.target_len)
        slots = scribbled(seen.slots, seen.target_len, top=seen.union.shape[1])
        other = seen._replace(context=scribbled(seen.context, seen.context_len), targets=targets, slots=slots)
        assert (other.targets != seen.targets).any()
        assert furthest(gradients(model, recipe, other), gradients(model, recipe, seen)) < 5e-6


def test_micro_batches_average_to_the_whole_batch():
    """The loss is linear in images: two halves give the loss and gradients of the whole, unequal targets included."""
    model, seen = built(RECIPE), drawn(RECIPE)
    whole = gradients(model, RECIPE, seen)
    model.zero_grad()
    for half in (slice(0, 4), slice(4, 8)):
        part = masks.Masks(*(None if f is None else f[half] for f in seen))
        (model(images()[half], part)[0] / 2).backward()
    halves = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert furthest({k: v for k, v in whole.items() if k != "loss"}, halves) < 5e-6


# ---- initialisation


def test_initialisation_is_a_function_of_the_seed_and_leaves_nothing_out():
    """Same seed same bits, another seed others; every parameter of a NaN-filled model is filled; target = encoder."""
    with torch.device("meta"):
        model = IJepa(RECIPE)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    init_weights(model, RECIPE)
    again, other = IJepa(RECIPE), IJepa(RECIPE)
    init_weights(again, RECIPE)
    init_weights(other, dataclasses.replace(RECIPE, seed=4))
    for (name, a), b in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert not torch.equal(model.encoder.blocks[0].attn.qkv.weight, other.encoder.blocks[0].attn.qkv.weight)
    assert all(torch.equal(a, b) for a, b in zip(model.encoder.parameters(), model.target.parameters(), strict=True))
    assert sum(b.numel() for b in model.buffers()) == 0


def test_depth_rescaled_divides_what_writes_to_the_residual_stream():
    """Block i's two output projections are the released ones over sqrt(2 i); nothing else differs."""
    released, rescaled = IJepa(RECIPE), IJepa(RECIPE)
    init_weights(released, RECIPE)
    init_weights(rescaled, change("model", init="depth_rescaled"))
    assert released.encoder.blocks[1].mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.05)
    for (name, a), b in zip(released.named_parameters(), rescaled.parameters(), strict=True):
        parts = name.split(".")
        scaled = name.endswith(("attn.proj.weight", "mlp.fc2.weight"))
        want = a / math.sqrt(2 * (int(parts[2]) + 1)) if scaled else a
        assert torch.allclose(b, want, rtol=1e-6, atol=0), name


def test_the_target_follows_and_takes_no_gradient():
    """target <- m target + (1 - m) encoder, to the last float of the closed form, in one call or one by one; no
    gradient ever reaches it."""
    for shortcuts in (Shortcuts(), NONE):
        model = built(RECIPE, shortcuts)
        before = {n: p.clone() for n, p in model.target.named_parameters()}
        gradients(model, RECIPE, drawn(RECIPE))
        update_target(model, 0.75)
        for name, parameter in model.target.named_parameters():
            want = 0.75 * before[name] + 0.25 * model.encoder.get_parameter(name)
            assert torch.allclose(parameter, want, atol=1e-7) and parameter.grad is None


# ---- against the paper's equations, written once more with bare tensors


def block(x: Tensor, w: dict[str, Tensor], at: str, heads: int) -> Tensor:
    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return (
            centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]
        )

    def affine(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    if not at:
        return norm(x, "norm")
    d = x.shape[1]
    q, k, v = affine(norm(x, f"{at}.norm1"), f"{at}.attn.qkv").split(d, -1)
    out = []
    for h in range(heads):
        part = slice(h * d // heads, (h + 1) * d // heads)
        out.append((q[:, part] @ k[:, part].T / math.sqrt(d // heads)).softmax(-1) @ v[:, part])
    x = x + affine(torch.cat(out, -1), f"{at}.attn.proj")
    hidden = affine(norm(x, f"{at}.norm2"), f"{at}.mlp.fc1")
    hidden = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
    return x + affine(hidden, f"{at}.mlp.fc2")


def encode(image: Tensor, w: dict[str, Tensor], patches: list[int]) -> Tensor:
    tokens = []
    for p in patches:
        row, column = divmod(p, 8)
        pixels = image[:, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8].reshape(-1)
        flat = w["patch_embed.proj.weight"].reshape(48, -1)
        tokens.append(flat @ pixels + w["patch_embed.proj.bias"] + w["pos_embed"][0, p])
    x = torch.stack(tokens)
    for i in range(3):
        x = block(x, w, f"blocks.{i}", 3)
    return block(x, w, "", 0)


def paper_loss(
    pixels: Tensor, context: list[list[int]], targets: list[list[list[int]]], w: dict[str, dict[str, Tensor]]
) -> Tensor:
    """Image by image, target by target: predict, compare with the normalised target representation, average."""
    total = []
    for image, seen, goals in zip(pixels, context, targets, strict=True):
        with torch.no_grad():
            full = encode(image, w["target"], list(range(64)))
            full = (full - full.mean(-1, keepdim=True)) / (full.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        p = w["predictor"]
        known = encode(image, w["encoder"], seen) @ p["embed.weight"].T + p["embed.bias"] + p["pos_embed"][0, seen]
        wrong = []
        for goal in goals:
            x = torch.cat([known, p["mask_token"][0] + p["pos_embed"][0, goal]])
            for i in range(3):
                x = block(x, p, f"blocks.{i}", 3)
            guess = block(x, p, "", 0)[len(seen) :] @ p["proj.weight"].T + p["proj.bias"]
            gap = (guess - full[goal]).abs()
            wrong.append(torch.where(gap < 1, 0.5 * gap * gap, gap - 0.5).flatten())
        total.append(torch.cat(wrong).mean())
    return torch.stack(total).mean()


def test_loss_gradients_and_ten_steps_are_those_of_the_paper():
    """Forward, backward, AdamW, target update, against bare tensors: 1e-5 relative over eleven steps, mixed targets."""
    model = built(RECIPE)
    weights = {
        part: {
            n: p.detach().clone().requires_grad_(p.requires_grad) for n, p in getattr(model, part).named_parameters()
        }
        for part in ("encoder", "predictor", "target")
    }
    trained = [
        (f"{part}.{n}", p) for part in ("encoder", "predictor") for n, p in weights[part].items() if p.requires_grad
    ]
    moments = {n: (torch.zeros_like(p), torch.zeros_like(p)) for n, p in trained}
    mine = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in mine if p.dim() > 1], "decay": 1},
        {"params": [p for p in mine if p.dim() < 2], "decay": 0},
    ]
    adam = torch.optim.AdamW(groups, fused=True)
    for step in range(1, 12):
        index = np.arange(2) + 2 * step
        found = masks.sample(RECIPE.mask, 8, 0, np.zeros_like(index), index)
        seen = masks.Masks(*(None if f is None else torch.from_numpy(f) for f in found))
        targets = [
            [t[:n].tolist() for t, n in zip(ts, ns, strict=True)]
            for ts, ns in zip(found.targets, found.target_len, strict=True)
        ]
        pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(step))
        want = paper_loss(pixels, found.context.tolist(), targets, weights)
        slopes = torch.autograd.grad(want, [p for _, p in trained])
        loss, _ = model(pixels, seen)
        adam.zero_grad()
        loss.backward()
        assert loss.item() == pytest.approx(want.item(), rel=1e-5)
        for (name, _), slope in zip(trained, slopes, strict=True):
            assert (model.get_parameter(name).grad - slope).abs().max() <= 1e-5 * slope.abs().max() + 1e-9, (step, name)
        now = schedules.schedule_at(OPTIM, step)
        for group in adam.param_groups:
            group["lr"], group["weight_decay"] = now.lr, now.weight_decay * group["decay"]
        adam.step()
        update_target(model, now.momentum)
        with torch.no_grad():
            for (name, p), slope in zip(trained, slopes, strict=True):
                first, second = moments[name]
                first.mul_(0.9).add_(0.1 * slope)
                second.mul_(0.999).add_(0.001 * slope**2)
                p.mul_(1 - now.lr * (now.weight_decay if p.dim() > 1 else 0))
                p -= now.lr * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
            for name, slow in weights["target"].items():
                slow.copy_(now.momentum * slow + (1 - now.momentum) * weights["encoder"][name])


def test_the_l2_loss_is_the_mean_square():
    """objective.loss=l2 against its definition on the same predictions."""
    recipe = change("objective", loss="l2")
    model, seen = built(recipe), drawn(change("mask", mode="rasterized", targets=3))
    with torch.no_grad():
        goal, _ = model.encode_targets(patchify(images(), 8), seen)
        guess = model.predictor(model.encoder(images(), seen.context), seen.context, seen.targets)
        assert model(images(), seen)[0].item() == pytest.approx((guess - goal).square().mean().item(), rel=1e-6)


@pytest.mark.usefixtures("unchecked_shapes")
def test_a_compiled_block_gives_the_same_loss_and_gradients():
    """torch.compile of one block of each kind, as the trainer does: no graph break, differences at most 5e-5."""
    model, seen = built(RECIPE), drawn(RECIPE)
    plain = gradients(model, RECIPE, seen)
    for each in (
        model.encoder.blocks[0],
        model.predictor.blocks[0],
        model.predictor.blocks[-1],
        model.target.blocks[-1],
    ):
        each.compile(fullgraph=True, backend="aot_eager")
    assert furthest(gradients(model, RECIPE, seen), plain) < 5e-5

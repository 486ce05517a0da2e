"""On a GPU: torch's varlen attention, steps without host synchronisation, and CUDA graphs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from jepa_cluster.config import Data, Mask, Model, Optim, Predictor, Probe, Recipe
from jepa_cluster.ijepa import masks
from jepa_cluster.ijepa.flops import Shortcuts
from jepa_cluster.ijepa.objective import IJepa, init_weights, update_target
from jepa_cluster.schema import build_dataclass

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
PAPER_OPTIM = Path(__file__).parents[2] / "conf/optim/paper.yaml"
OPTIM = build_dataclass(Optim, yaml.safe_load(PAPER_OPTIM.read_text()), "optim")
RECIPE = Recipe(
    Model(
        "small",
        width=384,
        depth=3,
        heads=6,
        mlp_ratio=4.0,
        patch=16,
        image=224,
    ),
    Predictor(384, 3, 6),
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
)


def drawn_on_gpu(recipe: Recipe) -> masks.Masks:
    index = np.arange(16)
    epoch = np.zeros_like(index)
    arrays = masks.sample(recipe.mask, recipe.model.grid, 0, epoch, index)
    tensors = [None if array is None else torch.from_numpy(array).cuda() for array in arrays]
    return masks.Masks(*tensors)


def step_of(mode: str, shortcuts: Shortcuts) -> tuple[IJepa, Callable[[], Tensor]]:
    """Return a model on the GPU, and its forward and backward pass under autocast."""
    mask = dataclasses.replace(RECIPE.mask, mode=mode)
    recipe = dataclasses.replace(RECIPE, mask=mask)
    model = IJepa(recipe, shortcuts)
    init_weights(model, recipe)
    model.cuda()
    drawn = drawn_on_gpu(recipe)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(16, 3, 224, 224, generator=generator).cuda()

    def step() -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            loss, _ = model(images, drawn)
        loss.backward()
        return loss

    return model, step


def fused_adamw(model: IJepa, **options: bool) -> torch.optim.AdamW:
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, fused=True, **options)


def gradients(model: IJepa) -> dict[str, Tensor]:
    found = {}
    for name, p in model.named_parameters():
        if p.grad is not None:
            found[name] = p.grad
    return found


def varlen_calls(step: Callable[[], Tensor]) -> tuple[float, int]:
    """Return the loss of a step, and how often it called torch's varlen operator."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        loss = step()
    calls = 0
    for event in profile.key_averages():
        if event.key == "torch_attn::_varlen_attn":
            calls += event.count
    return loss.item(), calls


@pytest.mark.parametrize(("mode", "padded_blocks"), [("multiblock", 3), ("packed", 6)])
def test_flash_by_lengths_agrees_with_the_key_mask(mode, padded_blocks):
    """Loss and gradients in bf16 are as near as two bf16 kernels are, and the kernel is called."""
    varlen_model, step = step_of(mode, Shortcuts())
    varlen_loss, calls = varlen_calls(step)
    assert calls == padded_blocks
    masked_model, step = step_of(mode, Shortcuts(varlen=False))
    masked_loss, calls = varlen_calls(step)
    assert calls == 0

    assert varlen_loss == pytest.approx(masked_loss, rel=2e-3)
    masked = gradients(masked_model)
    for name, grad in gradients(varlen_model).items():
        if not name.endswith("qkv.bias"):  # a third of it, that of the keys, is rounding alone
            difference = (grad - masked[name]).norm()
            assert difference < 0.05 * masked[name].norm(), name


@pytest.mark.parametrize("mode", ["multiblock", "packed", "reference"])
def test_no_step_makes_the_host_wait(mode):
    """Forward, backward, AdamW and target update run with every synchronisation an error."""
    model, step = step_of(mode, Shortcuts())
    adam = fused_adamw(model)
    step()
    adam.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
        adam.step()
        adam.zero_grad()
        update_target(model, 0.99)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def weights_after_six_steps(graphed: bool) -> Tensor:
    """Train three eager steps, then three more: eager, or as replays of one CUDA graph."""
    model, forward_backward = step_of("multiblock", Shortcuts())
    adam = fused_adamw(model, capturable=True)

    def step() -> None:
        forward_backward()
        adam.step()
        adam.zero_grad()
        update_target(model, 0.99)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    run = step
    if graphed:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        run = graph.replay
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    return model.target.blocks[0].attn.qkv.weight.detach().clone()


def test_a_captured_step_is_the_step():
    """Three replays of one CUDA graph move the weights as three eager steps do."""
    eager = weights_after_six_steps(graphed=False)
    graphed = weights_after_six_steps(graphed=True)
    assert torch.allclose(eager, graphed, atol=1e-5)
    assert not torch.equal(graphed, torch.zeros_like(graphed))

"""On a GPU: torch's attention of variable length, a step that never makes the host wait, and that step as a graph."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from jepa_cluster.config import Data, Mask, Model, Optim, Predictor, Probe, Recipe
from jepa_cluster.ijepa import masks
from jepa_cluster.ijepa.flops import Shortcuts
from jepa_cluster.ijepa.objective import IJepa, init_weights, update_target
from jepa_cluster.schema import build_dataclass

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
OPTIM = build_dataclass(
    Optim, yaml.safe_load((Path(__file__).parents[2] / "conf/optim/paper.yaml").read_text()), "optim"
)
RECIPE = Recipe(
    Model("small", 384, 3, 6, 4.0, 16, 224),
    Predictor(384, 3, 6),
    Mask("multiblock", 4, (0.15, 0.2), (0.75, 1.5), (0.85, 1.0)),
    Data("none"),
    OPTIM,
    Probe(),
)


def step_of(mode: str, shortcuts: Shortcuts):
    """A model, images and masks on the GPU, and its forward and backward under autocast."""
    recipe = dataclasses.replace(RECIPE, mask=dataclasses.replace(RECIPE.mask, mode=mode))
    model = IJepa(recipe, shortcuts)
    init_weights(model, recipe)
    model.cuda()
    index = np.arange(16)
    drawn = masks.sample(recipe.mask, recipe.model.grid, 0, np.zeros_like(index), index)
    seen = masks.Masks(*(None if f is None else torch.from_numpy(f).cuda() for f in drawn))
    images = torch.randn(16, 3, 224, 224, generator=torch.Generator().manual_seed(0)).cuda()

    def step() -> torch.Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            loss, _ = model(images, seen)
        loss.backward()
        return loss

    return model, step


@pytest.mark.parametrize("mode", ["multiblock", "packed"])
def test_flash_by_lengths_agrees_with_the_key_mask(mode):
    """Loss and gradients in bf16, both ways: as near as two bf16 kernels are, and the kernel was really called."""
    found = []
    for shortcuts in (Shortcuts(), Shortcuts(varlen=False)):
        model, step = step_of(mode, shortcuts)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            loss = step()
        called = sum(e.count for e in profile.key_averages() if e.key == "torch_attn::_varlen_attn")
        assert called == (3 + 3 * (mode == "packed")) * shortcuts.varlen
        found.append((loss.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (a, left), (b, right) = found
    assert a == pytest.approx(b, rel=2e-3)
    for name, grad in left.items():
        if not name.endswith("qkv.bias"):  # the keys' third is rounding alone
            assert (grad - right[name]).norm() < 0.05 * right[name].norm(), name


@pytest.mark.parametrize("mode", ["multiblock", "packed", "reference"])
def test_no_step_makes_the_host_wait(mode):
    """Forward, backward, AdamW and the target's update with every synchronisation an error."""
    model, step = step_of(mode, Shortcuts())
    adam = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    step(), adam.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(), adam.step(), adam.zero_grad(), update_target(model, 0.99)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_captured_step_is_the_step():
    """Three replays of one CUDA graph move the weights as three eager steps do."""
    weights = []
    for graphed in (False, True):
        model, forward_backward = step_of("multiblock", Shortcuts())
        adam = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True, capturable=True)

        def step(model=model, adam=adam, forward_backward=forward_backward) -> None:
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
        if graphed:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
        for _ in range(3):
            graph.replay() if graphed else step()
        torch.cuda.synchronize()
        weights.append(model.target.blocks[0].attn.qkv.weight.detach().clone())
    assert torch.allclose(*weights, atol=1e-5)
    assert not torch.equal(weights[1], torch.zeros_like(weights[1]))

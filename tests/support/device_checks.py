"""What must hold on a device, as functions that need no pytest: `make gpu` runs them as they are.

Each takes the device, and a folder that it may fill. It raises AssertionError when something does
not hold. Those of CUDA_ONLY have no meaning on a CPU.
"""

from __future__ import annotations

import dataclasses
import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
import yaml
from PIL import Image
from torch import Tensor

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO / "benchmarks"))

from objective import captured  # noqa: E402

from jepa_cluster import schema  # noqa: E402
from jepa_cluster.config import (  # noqa: E402
    Data,
    Mask,
    Model,
    Optim,
    Predictor,
    Probe,
    Recipe,
    Runtime,
    TrialConfig,
)
from jepa_cluster.data import indexing, manifest, pipeline  # noqa: E402
from jepa_cluster.ijepa import masks, varlen_attention  # noqa: E402
from jepa_cluster.ijepa.objective import IJepa, init_weights, update_target  # noqa: E402

OPTIM = schema.build_dataclass(
    Optim, yaml.safe_load((REPO / "conf/optim/paper.yaml").read_text()), "optim"
)
RECIPE = Recipe(
    Model("small", width=384, depth=3, heads=6, mlp_ratio=4.0, patch=16, image=224),
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
BATCHES = {"cpu": 4, "cuda": 16}  # images of a step
# Relative differences of loss and gradients in fp32: TF32 products have ten bits.
FP32_TOLERANCE = {"cpu": 1e-4, "cuda": 5e-3}
# Factor by which the errors of two steps that round differently may differ
ROUNDING = 2.0
BF16_UNIT = 2.0**-8  # of one rounding to bf16
CHECK_SECONDS = 240.0  # that a check in a process of its own may take


def draw_masks(recipe: Recipe, device: str) -> masks.Masks:
    index = np.arange(BATCHES[device])
    epoch = np.zeros_like(index)
    arrays = masks.sample(recipe.mask, recipe.model.grid, 0, epoch, index)
    tensors = [None if array is None else torch.from_numpy(array).to(device) for array in arrays]
    return masks.Masks(*tensors)


def new_model(recipe: Recipe, device: str) -> IJepa:
    model = IJepa(recipe)
    init_weights(model, recipe)
    return model.to(device)


def random_images(device: str) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(BATCHES[device], 3, 224, 224, generator=generator).to(device)


def step_of(mode: str, device: str) -> tuple[IJepa, Callable[[], Tensor]]:
    """Return a model on the device, and its forward and backward pass under autocast."""
    recipe = replace(RECIPE, mask=replace(RECIPE.mask, mode=mode))
    model, drawn = new_model(recipe, device), draw_masks(recipe, device)
    images = random_images(device)

    def step() -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            loss, _ = model(images, drawn)
        loss.backward()
        return loss

    return model, step


def fused_adamw(model: IJepa, **options: bool) -> torch.optim.AdamW:
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, fused=True, **options)


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, p in model.named_parameters():
        if p.grad is not None:
            found[name] = p.grad
    return found


# ---- the step


def check_step_against_plain(device: str, folder: Path) -> str:
    """Loss and gradients of the trainer's FSDP2 step are those of the plain step.

    In bf16 and under autocast they are about as far from fp32 as those of the plain step in bf16.
    """
    command = [sys.executable, str(REPO / "tests/support/step_errors.py"), device]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, timeout=CHECK_SECONDS, check=True
    )
    by_step = json.loads(done.stdout.splitlines()[-1])
    rounding = by_step.pop("plain bf16")
    found: list[str] = []
    for precision, errors in by_step.items():
        for name, error in errors.items():
            limit = max(ROUNDING * rounding[name], BF16_UNIT)
            if precision == "fp32":
                limit = FP32_TOLERANCE[device]
            found.append(f"{precision} {name} {error:.1e} of {limit:.1e}")
            assert error < limit, found[-1]
    return "; ".join(found)


# ---- CUDA


def varlen_calls(step: Callable[[], Tensor]) -> tuple[float, int]:
    """Return the loss of a step, and how often it called torch's varlen operator."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        loss = step()
    calls = 0
    for event in profile.key_averages():
        if event.key == "torch_attn::_varlen_attn":
            calls += event.count
    return loss.item(), calls


def check_flash_by_lengths(device: str, folder: Path) -> str:
    """Loss and gradients agree with the key mask as two bf16 kernels do; the kernel is called."""
    for mode, padded_blocks in (("multiblock", 3), ("packed", 6)):
        varlen_model, step = step_of(mode, device)
        varlen_loss, calls = varlen_calls(step)
        assert calls == padded_blocks, f"{mode}: {calls} calls of the kernel"
        masked_model, step = step_of(mode, device)
        with mock.patch.object(varlen_attention, "supports_flash", lambda *_: False):
            masked_loss, calls = varlen_calls(step)
        assert calls == 0
        assert abs(varlen_loss - masked_loss) < 2e-3 * masked_loss, mode
        masked = gradients(masked_model)
        for name, grad in gradients(varlen_model).items():
            if not name.endswith("qkv.bias"):
                assert (grad - masked[name]).norm() < 0.05 * masked[name].norm(), (mode, name)
    return ""


def check_no_step_waits(device: str, folder: Path) -> str:
    """Forward, backward, AdamW and target update run with every synchronisation an error."""
    for mode in ("multiblock", "packed", "reference"):
        model, step = step_of(mode, device)
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
    return ""


def weights_after_six_steps(graphed: bool) -> Tensor:
    """Train three eager steps, then three more: eager, or as replays of one CUDA graph."""
    model, forward_backward = step_of("multiblock", "cuda")
    adam = fused_adamw(model, capturable=True)

    def step() -> None:
        forward_backward()
        adam.step()
        adam.zero_grad()
        update_target(model, 0.99)

    run: Callable[[], object] = step
    if graphed:
        run = captured(step)  # after three eager steps
    else:
        for _ in range(3):
            step()
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    return model.target.blocks[0].attn.qkv.weight.detach().clone()


def check_captured_step(device: str, folder: Path) -> str:
    """Three replays of one CUDA graph move the weights as three eager steps do."""
    eager = weights_after_six_steps(graphed=False)
    graphed = weights_after_six_steps(graphed=True)
    assert torch.allclose(eager, graphed, atol=1e-5)
    assert not torch.equal(graphed, torch.zeros_like(graphed))
    return ""


# ---- data


class ShardSet(NamedTuple):
    """A data root with shards in train/ and val/."""

    root: Path
    digest: str
    val_digest: str
    images: int


def write_shards(root: Path, images: int = 96, size: int = 80) -> ShardSet:
    """Write and index two small splits of four classes: smooth colours, a function of a number."""
    digests: list[str] = []
    for split, first in (("train", 0), ("val", images)):
        folder = root / split
        folder.mkdir(parents=True)
        with tarfile.open(folder / "shard-000000.tar", "w") as tar:
            for number in range(first, first + images):
                random = np.random.default_rng(number)
                pixels = random.integers(0, 255, (6, 8, 3), dtype=np.uint8)
                image = Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC)
                out = io.BytesIO()
                image.save(out, "JPEG", quality=85)
                add_member(tar, f"{number:06d}.jpg", out.getvalue())
                add_member(tar, f"{number:06d}.cls", str(number % 4).encode())
        indexing.index(folder, workers=1)
        digests.append(manifest.read(folder).digest)
    return ShardSet(root, digests[0], digests[1], images)


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def small_trial(shards: ShardSet, device: str, steps: int, **runtime: object) -> TrialConfig:
    """Return a config of a small encoder that trains, saves and probes on these shards."""
    recipe = dataclasses.replace(
        RECIPE,
        model=Model("small", width=64, depth=2, heads=2, mlp_ratio=4.0, patch=8, image=64),
        predictor=Predictor(32, 1, 2),
        mask=replace(RECIPE.mask, context_keep=20),
        data=Data(
            "small", digest=shards.digest, val_digest=shards.val_digest, images=shards.images
        ),
        optim=replace(
            OPTIM, batch=16, steps=steps, epochs=None, warmup_steps=2, warmup_epochs=None
        ),
        probe=Probe(images=64, test_images=64),
    )
    settings = {"workers": 1, "device": device, "log_every": 1, **runtime}
    return TrialConfig(recipe, Runtime(str(shards.root), **settings))


def check_pinned_batches(device: str, folder: Path) -> str:
    """Batches arrive in pinned memory, are copied without a wait, and free their buffer."""
    shards = write_shards(folder / "data")
    plain_config = small_trial(shards, "cpu", 10, workers=0)
    plain = list(islice(pipeline.stream(plain_config, 0, 1, 0), 12))
    torch.zeros(1).cuda()  # the workers are forked from a process that has used the device
    for workers in (0, 2):
        batches = pipeline.stream(small_trial(shards, "cuda", 10, workers=workers), 0, 1, 0)
        kept = list(islice(batches, 12))
        torch.cuda.set_sync_debug_mode("error")
        try:
            copies = [batch.images.to("cuda", non_blocking=True) for batch in kept]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for batch, copy, wanted in zip(kept, copies, plain, strict=True):
            assert batch.images.is_pinned()
            assert all(mask is None or mask.is_pinned() for mask in batch.masks)
            assert torch.equal(copy.cpu(), wanted.images)
            assert torch.equal(batch.masks.context, wanted.masks.context)
            assert torch.equal(batch.index, wanted.index)
        batches.close()
    batches = pipeline.stream(small_trial(shards, "cuda", 10, workers=1), 0, 1, 0)
    addresses = {next(batches).images.data_ptr() for _ in range(200)}
    batches.close()
    assert len(addresses) <= 16, f"{len(addresses)} pinned blocks"
    return ""


SELF_TEST = """
import sys
import torch.distributed as dist
from jepa_cluster.training import devices, self_test
device, file = sys.argv[1:]
self_test.check_collective(devices.choose_device(device, 0), 0, 1, dist.FileStore(file, 1))
self_test.main([device, "0", "1", f"{file} of main"])
"""


def check_self_test(device: str, folder: Path) -> str:
    """The test before an attempt passes, and so does its collective, of one rank."""
    command = [sys.executable, "-c", SELF_TEST, device, str(folder / "shared")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=REPO)
    assert done.returncode == 0, done.stderr
    return "passed"


CUDA_ONLY = (check_flash_by_lengths, check_no_step_waits, check_captured_step, check_pinned_batches)
CHECKS = (check_step_against_plain, check_self_test, *CUDA_ONLY)

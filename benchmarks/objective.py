"""The objective's step on one device, ours against the plain one, interleaved; no FSDP2.

    python benchmarks/objective.py                                  # this machine's defaults
    python benchmarks/objective.py --sizes vit_l vit_h --batch 128  # on a GPU, bf16
    python benchmarks/objective.py --sizes vit_l --all --cuda-graph # every variant
    python benchmarks/objective.py --reference PATH                 # also the I-JEPA authors' code

Needs torch, timm and this repository's files. PATH is a checkout of the authors' code. A step is
forward, backward, AdamW and the target's update. Every variant sees the same images and the same
`reference` masks, so that all have the same maths; `ours, multiblock masks` is the default masking
with its fixed shapes. Prints medians over rounds, the ratio of medians to the plain step (with
--reference: to theirs), TFLOP/s by the arithmetic of `ijepa.flops` (without shortcuts, for every
variant alike), MFU where the peak is known, and peak memory on CUDA. The last line is the same as
JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import yaml

REPO = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPO), str(REPO / "benchmarks")]

from plain import Plain  # noqa: E402

from jepa_cluster import config, schema  # noqa: E402
from jepa_cluster.ijepa import masks as m  # noqa: E402
from jepa_cluster.ijepa import varlen_attention  # noqa: E402
from jepa_cluster.ijepa.flops import step_flops  # noqa: E402
from jepa_cluster.ijepa.objective import IJepa, init_weights, update_target  # noqa: E402

PEAKS = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "B200": 2250e12,
    "L40S": 362e12,
}  # dense bf16, per second
MOMENTUM = 0.996


def main() -> None:
    args = arguments()
    device = torch.device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    print(
        f"{hardware(device)} · torch {torch.__version__} · {commit()} · "
        f"{args.precision}, batch {args.batch}"
    )
    results = [row for size in args.sizes for row in measure(size, args, device)]
    print(
        json.dumps(
            {
                "hardware": hardware(device),
                "torch": torch.__version__,
                "commit": commit(),
                "rows": results,
            }
        )
    )


def measure(size: str, args: argparse.Namespace, device: torch.device) -> list[dict]:
    recipe = load(size, args.batch)
    images = torch.randn(args.batch, 3, recipe.model.image, recipe.model.image, device=device)
    reference_masks, clean = (
        draw(recipe, mode, args.batch, device) for mode in ("reference", "multiblock")
    )
    steps: dict[str, tuple[Callable[[], torch.Tensor], m.Masks]] = {
        "plain": (plain(recipe, images, reference_masks, args), reference_masks)
    }
    if args.reference:
        steps["reference"] = reference(recipe, images, reference_masks, args), reference_masks
    steps["ours"] = ours(recipe, images, reference_masks, args), reference_masks
    if args.compile:
        steps["ours, compiled"] = (
            ours(recipe, images, reference_masks, args, compiled=True),
            reference_masks,
        )
    if args.cuda_graph and device.type == "cuda":
        steps["ours, one graph"] = (
            captured(ours(recipe, images, reference_masks, args, compiled=args.compile)),
            reference_masks,
        )
    if args.all or device.type == "cuda":
        steps["ours, multiblock masks"] = (
            ours(recipe, images, clean, args, compiled=args.compile),
            clean,
        )
        packed = draw(recipe, "packed", args.batch, device)
        steps["ours, packed masks"] = (
            ours(recipe, images, packed, args, compiled=args.compile),
            packed,
        )
    if args.all and device.type == "cuda":
        steps["ours, multiblock by key mask"] = (
            by_key_mask(ours(recipe, images, clean, args, compiled=args.compile)),
            clean,
        )
    seconds, memory = interleave(
        {k: v[0] for k, v in steps.items()}, args.rounds, device, CLOCKS[args.clock]
    )
    return [
        report(recipe, size, name, seconds, memory, masks, args, device)
        for name, (_, masks) in steps.items()
    ]


def report(recipe, size, name, seconds, memory, masks, args, device) -> dict:
    middle, peer = (
        statistics.median(seconds[name]),
        "reference" if "reference" in seconds else "plain",
    )
    flops = step_flops(recipe, *m.lengths(host(masks))).total * args.batch / middle
    peak = peak_flops(device)
    row = {
        "size": size,
        "variant": name,
        "ms": round(middle * 1e3, 2),
        "ratio": round(statistics.median(seconds[peer]) / middle, 3),
        "images_per_s": round(args.batch / middle, 1),
        "tflops": round(flops / 1e12, 3),
        "mfu": None if peak is None else round(flops / peak, 3),
        "peak_gib": memory.get(name),
        "spread": round((max(seconds[name]) - min(seconds[name])) / middle, 3),
    }
    print(
        f"  {size:7} {name:23} {row['ms']:9.1f} ms  {row['ratio']:5.2f}x  "
        f"{row['images_per_s']:8.1f} img/s  {row['tflops']:8.3f} TFLOP/s  "
        f"MFU {'-' if peak is None else format(row['mfu'], '.1%'):>6}  "
        f"{'' if row['peak_gib'] is None else str(row['peak_gib']) + ' GiB'}",
        flush=True,
    )
    return row


def peak_flops(device: torch.device) -> float | None:
    """The dense bf16 peak of a GPU; None for a CPU and for an unknown GPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name()
    return next((peak for known, peak in PEAKS.items() if known in name), None)


# ---- the variants: each is a function that takes one step and returns the loss


def ours(recipe, images, masks, args, compiled: bool = False):
    torch.manual_seed(0)
    model = IJepa(recipe)
    init_weights(model, recipe)
    model.to(images.device)
    if compiled:
        for part in (model.encoder, model.predictor, model.target):
            for block in part.blocks:
                block.compile()
    return stepper(
        lambda: model(images, masks)[0],
        model,
        lambda: update_target(model, MOMENTUM),
        images.device,
        args,
        fused=True,
    )


def by_key_mask(step):
    """The step without attention of variable length."""

    def run():
        with mock.patch.object(varlen_attention, "supports_flash", lambda *_: False):
            return step()

    return run


def plain(recipe, images, masks, args):
    torch.manual_seed(0)
    model = Plain(schema.to_dict(recipe.model), schema.to_dict(recipe.predictor)).to(images.device)
    forward = lambda: model(images, masks.context, masks.targets)  # noqa: E731
    return stepper(forward, model, lambda: model.follow(MOMENTUM), images.device, args, fused=False)


def reference(recipe, images, masks, args):
    model, distance = authors(args.reference, recipe)
    model.to(images.device)
    seen, asked = [masks.context], list(masks.targets.unbind(1))
    return stepper(
        lambda: distance(images, seen, asked),
        model,
        lambda: follow(model, MOMENTUM),
        images.device,
        args,
        fused=False,
    )


def authors(path: str, recipe: config.Recipe) -> tuple[torch.nn.Module, Callable]:
    """The authors' own modules and their loss, from a checkout at `path`; nothing of theirs is kept
    here.
    """
    sys.path.insert(0, str(Path(path).resolve()))
    from src.masks.utils import apply_masks
    from src.models import vision_transformer as theirs
    from src.utils.tensors import repeat_interleave_batch
    from torch.nn import functional as F

    width, p = recipe.model.width, recipe.predictor
    shape = {"patch_size": recipe.model.patch, "embed_dim": width, "depth": recipe.model.depth}
    shape |= {
        "num_heads": recipe.model.heads,
        "mlp_ratio": recipe.model.mlp_ratio,
        "img_size": [recipe.model.image],
    }
    shape |= {"qkv_bias": True, "norm_layer": lambda d: torch.nn.LayerNorm(d, eps=1e-6)}
    model = torch.nn.Module()
    model.encoder, model.target = (
        theirs.VisionTransformer(**shape),
        theirs.VisionTransformer(**shape),
    )
    model.target.load_state_dict(model.encoder.state_dict())
    model.target.requires_grad_(False)
    model.predictor = theirs.VisionTransformerPredictor(
        num_patches=recipe.model.grid**2,
        embed_dim=width,
        predictor_embed_dim=p.width,
        depth=p.depth,
        num_heads=p.heads,
        qkv_bias=True,
        norm_layer=shape["norm_layer"],
    )

    def loss(
        images: torch.Tensor, seen: list[torch.Tensor], asked: list[torch.Tensor]
    ) -> torch.Tensor:
        with torch.no_grad():
            goal = model.target(images)
            goal = apply_masks(F.layer_norm(goal, (goal.size(-1),)), asked)
            goal = repeat_interleave_batch(goal, len(images), repeat=1)
        return F.smooth_l1_loss(model.predictor(model.encoder(images, seen), seen, asked), goal)

    return model, loss


@torch.no_grad()
def follow(model: torch.nn.Module, momentum: float) -> None:
    """Their target's update, parameter by parameter."""
    for slow, fast in zip(model.target.parameters(), model.encoder.parameters(), strict=True):
        slow.data.mul_(momentum).add_((1.0 - momentum) * fast.detach().data)


def stepper(forward, model, follow, device, args, fused: bool):
    """forward, backward, AdamW (bias and norms without decay), target update."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": 0.04},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    graph = fused and args.cuda_graph
    optimizer = torch.optim.AdamW(groups, lr=1e-4, fused=fused or None, capturable=graph)
    low = args.precision == "bf16"

    def step() -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16) if low else contextlib.nullcontext():
            loss = forward()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        follow()
        return loss

    return step


def captured(step: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """The whole step, optimiser and target included, as one CUDA graph: shapes are fixed and
    nothing waits.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()

    def replay() -> torch.Tensor:
        graph.replay()
        return loss

    return replay


# ---- measuring


def interleave(steps, rounds: int, device: torch.device, clock: Callable[[], float]):
    """Rounds of one timed block of steps a variant, in turn; returns the seconds a step of every
    round, and the peak memory.
    """
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    memory, seconds = {}, {name: [] for name in steps}
    inner = 10 if device.type == "cuda" else 1
    for name, step in steps.items():  # warm up, compile, and see the peak
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        loss = [step() for _ in range(3 if device.type == "cuda" else 1)][-1]
        assert torch.isfinite(loss), f"{name}: loss {loss}"
        if device.type == "cuda":
            memory[name] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    for _ in range(rounds):
        for name, step in steps.items():
            wait()
            began = clock()
            for _ in range(inner):
                step()
            wait()
            seconds[name].append((clock() - began) / inner)
    return seconds, memory


def draw(recipe: config.Recipe, mode: str, batch: int, device: torch.device) -> m.Masks:
    law = "uniform" if mode == "reference" else "log"
    mask = config.Mask(
        mode,
        recipe.mask.targets,
        *(getattr(recipe.mask, k) for k in SHAPE),
        aspect_distribution=law,
        min_keep=10,
    )
    zero = np.zeros(batch, np.int64)
    masks = m.sample(mask, recipe.model.grid, 0, zero, np.arange(batch), zero, np.arange(batch))
    return m.Masks(*(None if f is None else torch.from_numpy(f).to(device) for f in masks))


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
SHAPE = ("target_scale", "target_aspect", "context_scale")


def host(masks: m.Masks) -> m.Masks:
    return m.Masks(*(None if f is None else f.cpu().numpy() for f in masks))


def load(size: str, batch: int) -> config.Recipe:
    """Read conf/ with YAML alone."""

    def read(path: str) -> dict:
        values = yaml.safe_load((REPO / "conf" / path).read_text())
        base = values.pop("defaults", [])
        bases = [name for name in base if isinstance(name, str)]
        return {**(read(f"{Path(path).parent}/{bases[0]}.yaml") if bases else {}), **values}

    values = {
        **read(f"model/{size}.yaml"),
        "mask": read("mask/reference.yaml"),
        "data": read("data/imagenet.yaml"),
    }
    values |= {
        "optim": {**read("optim/reference.yaml"), "batch": batch},
        "probe": read("probe/default.yaml"),
        "objective": read("objective/reference.yaml"),
        "seed": 0,
    }
    return schema.build_dataclass(config.Recipe, values, "")


def hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    names = (
        [
            x.split(":")[1].strip()
            for x in info.read_text().splitlines()
            if x.startswith("model name")
        ]
        if info.exists()
        else []
    )
    return f"{names[0] if names else platform.processor()} x{torch.get_num_threads()}"


def commit() -> str:
    found = subprocess.run(
        ["git", "-C", REPO, "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    )
    return found.stdout.strip() or "no commit"


def arguments() -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--device", default="cuda" if cuda else "cpu", help="cuda or cpu")
    p.add_argument(
        "--sizes", nargs="+", default=["vit_s", "vit_b", "vit_l", "vit_h"] if cuda else ["vit_s"]
    )
    p.add_argument("--batch", type=int, default=128 if cuda else 8, help="images a step")
    p.add_argument(
        "--rounds", type=int, default=10 if cuda else 5, help="timed turns of each variant"
    )
    p.add_argument("--threads", type=int, help="torch's CPU threads")
    p.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: CPU seconds, for a machine under load",
    )
    p.add_argument("--precision", choices=("bf16", "fp32"), default="bf16" if cuda else "fp32")
    p.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=cuda,
        help="also ours with compiled blocks",
    )
    p.add_argument(
        "--cuda-graph", action="store_true", help="also ours captured whole in one CUDA graph"
    )
    p.add_argument(
        "--all",
        action="store_true",
        help="also ours with multiblock and packed masks",
    )
    p.add_argument("--reference", help="checkout of the authors' code")
    return p.parse_args()


if __name__ == "__main__":
    main()

"""How far the trainer's own step is from the plain one: a program for device_checks.

    python tests/support/step_errors.py cpu

The model is built as in a job, with FSDP2. In each precision its loss and gradients are compared
with those of the plain model in fp32. The plain model in bf16 shows what rounding alone does.
Prints one line of JSON: whose -> relative errors of loss and gradients.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

REPO = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPO), str(REPO / "tests"), str(REPO / "benchmarks")]

from plain import Plain  # noqa: E402
from support.device_checks import (  # noqa: E402
    RECIPE,
    draw_masks,
    gradients,
    new_model,
    random_images,
)

from jepa_cluster import schema  # noqa: E402
from jepa_cluster.config import Runtime  # noqa: E402
from jepa_cluster.training import dist_env, distributed  # noqa: E402

PLAIN_NAMES = (  # part of a name in our model -> in the plain one
    ("patch_embed.proj", "embed"),
    ("pos_embed", "positions"),
    ("attn.", ""),
    ("mlp.fc1", "mlp.0"),
    ("mlp.fc2", "mlp.2"),
    ("blocks.", "layers."),
    ("predictor.embed", "predictor.enter"),
    ("predictor.proj", "predictor.leave"),
    ("mask_token", "token"),
)

Step = tuple[Tensor, dict[str, Tensor]]  # loss, gradients by the name in the plain model
PLAIN_RECIPE = replace(RECIPE, mask=replace(RECIPE.mask, mode="reference"))


def plain_name(name: str) -> str:
    for ours, theirs in PLAIN_NAMES:
        name = name.replace(ours, theirs)
    return name


def plain_step(device: str, dtype: torch.dtype) -> Step:
    """Make the step of the plain model with the weights of a fresh trial."""
    state: dict[str, Tensor] = {}
    for name, tensor in distributed.named_tensors(new_model(PLAIN_RECIPE, device)).items():
        state[plain_name(name)] = tensor
    model, predictor = PLAIN_RECIPE.model, PLAIN_RECIPE.predictor
    plain = Plain(schema.to_dict(model), schema.to_dict(predictor)).to(device)
    plain.load_state_dict(state)
    drawn = draw_masks(PLAIN_RECIPE, device)
    loss = plain.to(dtype)(random_images(device).to(dtype), drawn.context, drawn.targets)
    loss.backward()
    return loss, gradients(plain)


def trainer_step(device: str, precision: str, world: distributed.World) -> Step:
    """Make the step of the model that a job builds."""
    optim = replace(PLAIN_RECIPE.optim, precision=precision)
    recipe = replace(PLAIN_RECIPE, optim=optim)
    model = distributed.build_model(recipe, Runtime("", device=device), world)
    distributed.init_from_seed(model, recipe)
    loss, _ = model(random_images(device), draw_masks(recipe, device))
    loss.backward()
    found: dict[str, Tensor] = {}
    for name, grad in gradients(model).items():
        found[plain_name(name)] = grad.full_tensor() if isinstance(grad, DTensor) else grad
    return loss, found


def errors(found: Step, expected: Step) -> dict[str, float]:
    """Return the relative error of the loss, and of all gradients by their norm."""
    difference = total = 0.0
    assert found[1].keys() == expected[1].keys()
    for name, wanted in expected[1].items():
        difference += (found[1][name].float() - wanted).square().sum().item()
        total += wanted.square().sum().item()
    loss = abs(found[0].float() / expected[0] - 1).item()
    return {"loss": loss, "gradients": (difference / total) ** 0.5}


def main(device: str) -> None:
    env = dist_env.from_environment(os.environ)
    world = distributed.init(env, PLAIN_RECIPE, Runtime("", device=device))
    expected = plain_step(device, torch.float32)
    found = {"plain bf16": errors(plain_step(device, torch.bfloat16), expected)}
    for precision in ("fp32", "autocast", "bf16"):
        found[precision] = errors(trainer_step(device, precision, world), expected)
    print(json.dumps(found), flush=True)
    os._exit(0)  # nobody waits for the process group


if __name__ == "__main__":
    main(sys.argv[1])

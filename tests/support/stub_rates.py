"""A sweep over sizes whose error has a known best learning rate, without training."""

import functools
import math
from pathlib import Path

import numpy as np
import pytest
from support import fake_trials

from jepa_cluster import cli
from jepa_cluster.config import Recipe
from jepa_cluster.launch.cluster import profile
from jepa_cluster.launch.submit import documents, plan, submit
from jepa_cluster.trial.directory import Root, TrialDir

SWEEP = """
question: How does the stub scale?
base: [data=synthetic, runtime.data_root=DATA, optim=demo, optim.batch=8, optim.warmup_steps=5]
grid:
  model: [vit_nano, vit_micro, vit_mini]
  mask.target_scale: [[0.1, 0.2], [0.2, 0.3]]
  optim.steps: [80, 40]
seeds: [3]
"""
BEST = {"vit_nano": 8e-3, "vit_micro": 6e-3, "vit_mini": 4e-3, "vit_s": 2e-3}  # at 80 steps
NOISE = 0.02


def best_rate(model: str, steps: int) -> float:
    return BEST[model] * (80 / steps) ** 0.5


@functools.cache
def recipe_of(trial: TrialDir) -> Recipe:
    return trial.read_config().recipe


def values(
    trial: TrialDir, step: int, noise: float = NOISE, factor: float = 1.0
) -> dict[str, float]:
    """The metrics of a step; the error rises to both sides of `factor` times the best rate."""
    recipe = recipe_of(trial)
    optim = recipe.optim
    octaves = math.log2(optim.lr / factor / best_rate(recipe.model.name, optim.steps))
    rng = np.random.default_rng([step, recipe.seed, recipe.model.width, int(optim.lr * 1e7)])
    trained = 0.5 * math.exp(0.05 * octaves**2 - 0.1 * math.log(recipe.model.width / 32))
    error = (0.9 if step == 0 else trained) * math.exp(noise * rng.normal())
    flops = float(step * recipe.model.width**2 * 1e4)
    return {"loss": 0.1, "flops_total": flops, "probe/class_error": error}


def prepare(patch: pytest.MonkeyPatch, folder: Path) -> None:
    patch.chdir(folder)
    for name in ("JEPA_DATA", "JEPA_CLUSTER"):
        patch.delenv(name, raising=False)
    patch.setenv("JEPA_ROOT", str(folder / "root"))
    patch.setattr(fake_trials, "values", values)


def text_of(*changes: tuple[str, str]) -> str:
    """Return the sweep file with changes."""
    text = Path("sizes.yaml").read_text()
    for before, after in changes:
        assert before in text
        text = text.replace(before, after)
    return text


def finish(root: Root, path: str) -> plan.Plan:
    """Submit a sweep and train the trials that are new."""
    sweep = documents.find_sweep(root, path)
    made = plan.make_plan(sweep, profile.load_profile(), root)
    submit._write_sweep(made, "0" * 12)
    for name, planned in made.trials.items():
        trial = root.trial(name)
        if not trial.done.exists():
            trial.create(planned.config)
            fake_trials.run(trial, every=20, commit=40)
    return made


def calibrate(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(["calibrate", *arguments]) == 0
    return capsys.readouterr().out

"""A composed mapping becomes a frozen `TrialConfig`, with its derived values filled in."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

from jepa_cluster.config import Mask, Optim, TrialConfig, config_from_dict
from jepa_cluster.errors import ConfigError
from jepa_cluster.schema import ConfigDict
from jepa_cluster.sweep import data_set

# Two views of the whole image, whatever the preset of masks
VIEWS = Mask("views", 2, (1.0, 1.0), (1.0, 1.0), (1.0, 1.0))


def freeze(config: ConfigDict) -> TrialConfig:
    """Type and check a composed mapping, fill its derived values. Raises ConfigError, DataError."""
    runtime = config["runtime"]
    if isinstance(runtime.get("data_root"), str):
        root = Path(runtime["data_root"]).expanduser().absolute()
        runtime["data_root"] = str(root)
    given = config_from_dict(config)
    recipe = given.recipe
    found = data_set.read(Path(given.runtime.data_root))
    data_set.check_probe(recipe.probe, found)
    mask = VIEWS if recipe.objective.target == "views" else recipe.mask
    derived = dataclasses.replace(
        recipe,
        mask=_derive_mask(mask, recipe.model.grid),
        data=data_set.with_digests(recipe.data, found),
        optim=_with_steps(recipe.optim, found.train.images),
    )
    derived.check()
    return TrialConfig(derived, given.runtime)


def _with_steps(optim: Optim, images: int) -> Optim:
    """Turn epochs into the steps that see `epochs * images` images, rounded down."""

    def steps_of(epochs: float | None, least: int) -> int:
        return max(int((epochs or 0) * images / optim.batch), least)

    steps, warmup = optim.steps, optim.warmup_steps
    if steps is None:
        steps = steps_of(optim.epochs, 1)
    if warmup is None:
        warmup = steps_of(optim.warmup_epochs, 0)
    if warmup >= steps:
        what = f"optim.warmup_steps={warmup} does not end within {steps} steps"
        raise ConfigError(what, hint="set a smaller one, or train longer")
    horizon = round(steps * optim.schedule_stretch, 6)
    is_constant = optim.momentum == optim.final_momentum
    momentum_steps = None if horizon.is_integer() or is_constant else horizon
    if optim.momentum_steps not in (None, momentum_steps):
        derived = momentum_steps or "null"
        what = f"optim.momentum_steps={optim.momentum_steps} is derived, and would be {derived}"
        raise ConfigError(what, hint="leave it out")
    return dataclasses.replace(
        optim,
        steps=steps,
        epochs=None,
        warmup_steps=warmup,
        warmup_epochs=None,
        momentum_steps=momentum_steps,
    )


@functools.cache
def _derive_mask(mask: Mask, grid: int) -> Mask:
    from jepa_cluster.ijepa import masks

    return masks.derive(mask, grid)

"""Settings without an effect are refused; trials that exist go on as they were planned."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from support.sweep_texts import Resolve, resolved

from jepa_cluster.errors import ConfigError


def test_a_trial_of_a_rounded_horizon_goes_on_and_a_new_one_is_exact(data: Path) -> None:
    """The momentum of a new trial has the reference's horizon; constant ones need none."""
    text = (
        "question: Q\nbase: [data=synthetic, optim.batch=32, optim.steps=77, optim.warmup_steps=1,"
        " optim.epochs=null, optim.warmup_epochs=null, optim.schedule_stretch=1.25]\n"
    )
    (new,) = resolved(text, data)
    assert new.config.recipe.optim.momentum_steps == 96.25
    optim = dataclasses.replace(new.config.recipe.optim, momentum_steps=None)
    recipe = dataclasses.replace(new.config.recipe, optim=optim)
    earlier = dataclasses.replace(new.config, recipe=recipe)
    (again,) = resolved(text, data, {earlier.id: "its-directory"})
    assert (again.name, again.config) == ("its-directory", earlier)
    constant = text.replace("]", ", optim.final_momentum=0.996]")
    (trial,) = resolved(constant, data)
    assert trial.config.recipe.optim.momentum_steps is None


# ---- settings without an effect


@pytest.mark.parametrize(
    ("body", "base", "message"),
    [
        ("", ["data.order=global", "data.shuffle_block=7"], "data.order=global"),
        ("", ["mask=random", "mask.target_aspect=[1,2]"], "mask.mode=random"),
        ("", ["optim.divergence.spike=9"], "optim.divergence.enabled=false"),
        ("", ["optim.steps=77", "optim.epochs=9"], "optim.steps=77"),
        ("grid: {optim.cooldown_steps: [0, 9]}\n", [], "optim.schedule=cosine"),
    ],
)
def test_a_setting_without_an_effect_is_refused(
    do: Resolve, body: str, base: list[str], message: str
) -> None:
    """The error has its line, and what would give it an effect."""
    with pytest.raises(ConfigError, match=f"has no effect with {message}") as e:
        do(body, *base)
    assert "sweeps/x.yaml:" in e.value.where
    assert "leave" in e.value.hint


def test_a_setting_of_the_base_needs_an_effect_at_one_point_only(do: Resolve) -> None:
    trials = do("grid: {mask: [multiblock, random]}\n", "mask.context_scale=[0.8,1.0]")
    assert len(trials) == 2
    assert len(do("", "optim.steps=77", "optim.epochs=null")) == 1


def test_a_trial_that_exists_goes_on_with_a_setting_without_an_effect(data: Path) -> None:
    """A sweep that an earlier version accepted is resumed; new trials of it are refused."""
    text = "question: Q\nbase: [data=synthetic, optim.batch=32, optim.warmup_epochs=1]\n"
    inert = text.replace("]", ", data.shuffle_block=7, data.order=global]")
    (trial,) = resolved(text, data)
    planned = trial.config.recipe
    changed = dataclasses.replace(planned.data, shuffle_block=7, order="global")
    recipe = dataclasses.replace(planned, data=changed)
    existing = dataclasses.replace(trial.config, recipe=recipe).id
    with pytest.raises(ConfigError, match="has no effect"):
        resolved(inert, data)
    (again,) = resolved(inert, data, {existing: "its-directory"})
    assert again.name == "its-directory"


def test_a_new_point_may_be_added_beside_those_in_which_a_setting_has_an_effect(
    data: Path,
) -> None:
    """Trials that exist count, too."""
    text = (
        "question: Q\nbase: [data=synthetic, optim.batch=32, optim.warmup_epochs=1,"
        " mask.targets=1, 'mask.target_aspect=[0.5,2.0]']\ngrid: {mask.mode: [multiblock]}\n"
    )
    (trial,) = resolved(text, data)
    more = text.replace("[multiblock]", "[multiblock, random]")
    assert len(resolved(more, data, {trial.config.id: "its-directory"})) == 2

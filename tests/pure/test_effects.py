"""Settings without an effect are refused; trials that exist go on as they were planned."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from support.sweep_texts import Resolve, resolved

from jepa_cluster.errors import ConfigError
from jepa_cluster.launch.cluster import cost
from jepa_cluster.launch.scheduler.retry_policy import halve_micro_batch
from jepa_cluster.sweep.freeze import VIEWS


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


# ---- views have neither masks nor a predictor


def test_arms_of_an_objective_are_one_axis(do: Resolve) -> None:
    """Views have masks of their own, whatever the preset, and the others keep theirs."""
    arms = do("grid: {objective.target: [representation, views]}\n", "mask.target_scale=[0.1,0.2]")
    first, views = (trial.config.recipe for trial in arms)
    assert first.mask.mode == "multiblock"
    assert views.mask == VIEWS
    (other,) = do("grid: {objective.target: [views]}\n")
    assert other.config.id == arms[1].config.id
    assert cost.total_flops(views) > 0


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("mask.targets=2", "mask.targets has no effect with objective.target=views"),
        ("mask=packed", "mask has no effect with objective.target=views"),
        ("predictor.depth=2", "predictor.depth has no effect with objective.target=views"),
        ("objective.loss=l2", "objective.loss has no effect with objective.target=views"),
        ("runtime.micro_batch=8", "micro_batch=8: objective.target=views needs"),
        ("optim.transfer=mup", "optim.transfer=mup needs a predictor"),
    ],
)
def test_what_views_cannot_use_is_refused(do: Resolve, base: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as e:
        do("", "objective.target=views", base)
    assert e.value.hint or "needs" in e.value.what


def test_masks_of_views_are_for_views_only(do: Resolve) -> None:
    with pytest.raises(ConfigError, match=r"mask\.mode=views needs objective\.target=views"):
        do("", "mask.mode=views")


def test_a_full_gpu_does_not_halve_the_batch_of_views(do: Resolve) -> None:
    (trial,) = do("", "objective.target=views")
    full = {"attempt": 1, "cause": "gpu_oom", "error": "CUDA out of memory"}
    assert halve_micro_batch(trial.config, [full]) == trial.config

"""Parameters and FLOPs by arithmetic, against the published numbers."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml

from jepa_cluster.config import Data, Mask, Model, Optim, Predictor, Probe, Recipe
from jepa_cluster.ijepa.flops import parameters, step_flops
from jepa_cluster.schema import build_dataclass

CONF = Path(__file__).parents[2] / "conf"
OPTIM = build_dataclass(Optim, yaml.safe_load((CONF / "optim/paper.yaml").read_text()), "optim")


def recipe(size: str) -> Recipe:
    values = yaml.safe_load((CONF / f"model/{size}.yaml").read_text())
    mask = Mask("multiblock", 4, (0.15, 0.2), (0.75, 1.5), (0.85, 1.0))
    model, predictor = (
        build_dataclass(Model, values["model"], "model"),
        build_dataclass(Predictor, values["predictor"], "predictor"),
    )
    return Recipe(model, predictor, mask, Data("none"), OPTIM, Probe())


SIZES = {"vit_ti": 5.49, "vit_s": 21.59, "vit_b": 85.65, "vit_l": 303.10, "vit_h": 630.66, "vit_g": 1011.09}


@pytest.mark.parametrize(("size", "millions"), SIZES.items())
def test_every_size_has_the_published_number_of_parameters(size, millions):
    """Trainable parameters of the encoders at patch 16, in millions."""
    values = recipe(size)
    model = dataclasses.replace(values.model, patch=16)
    assert parameters(dataclasses.replace(values, model=model)).encoder / 1e6 == pytest.approx(millions, abs=0.006)


@pytest.mark.parametrize(("size", "millions"), [("vit_b", 11.24), ("vit_l", 22.08), ("vit_g", 29.48)])
def test_every_predictor_has_the_published_number_of_parameters(size, millions):
    """Predictors of the configurations whose size is known, in millions."""
    assert parameters(recipe(size)).predictor / 1e6 == pytest.approx(millions, abs=0.006)


@pytest.mark.parametrize(
    ("size", "giga"), [("vit_ti", 26.8), ("vit_s", 38.7), ("vit_b", 85.0), ("vit_l", 263.0), ("vit_h", 661.0)]
)
def test_a_step_costs_what_was_measured(size, giga):
    """GFLOP a step and image at the mean token counts of reference masks on 128 images a GPU."""
    values = recipe(size)
    share = values.model.grid**2 / 196
    found = step_flops(values, 51.7 * share, [33.9 * share] * 4)
    assert found.total / 1e9 == pytest.approx(giga, rel=0.02)
    assert 0 < found.encoder < found.total


def test_unequal_samples_are_averaged_exactly():
    """Attention is quadratic: two images of 40 and 60 tokens cost the mean of their costs, not that of 50 tokens."""
    values = recipe("vit_s")
    apart = [step_flops(values, n, [30, 30]).total for n in (40, 60)]
    assert step_flops(values, [40, 60], [[30, 30], [30, 30]]).total == pytest.approx(sum(apart) / 2, rel=1e-12)
    assert step_flops(values, 50, [30, 30]).total < sum(apart) / 2

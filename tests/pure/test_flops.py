"""Parameters and FLOPs by arithmetic, against the published numbers."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml

from jepa_cluster.config import Data, Mask, Model, Objective, Optim, Predictor, Probe, Recipe
from jepa_cluster.ijepa.flops import encoder_flops, parameters, step_flops
from jepa_cluster.schema import build_dataclass

CONF = Path(__file__).parents[2] / "conf"
OPTIM = build_dataclass(Optim, yaml.safe_load((CONF / "optim/paper.yaml").read_text()), "optim")


def recipe(size: str) -> Recipe:
    values = yaml.safe_load((CONF / f"model/{size}.yaml").read_text())
    mask = Mask("multiblock", 4, (0.15, 0.2), (0.75, 1.5), (0.85, 1.0))
    model = build_dataclass(Model, values["model"], "model")
    predictor = build_dataclass(Predictor, values["predictor"], "predictor")
    return Recipe(model, predictor, mask, Data("none"), OPTIM, Probe())


ENCODER_SIZES = {  # millions of trainable parameters
    "vit_ti": 5.49,
    "vit_s": 21.59,
    "vit_b": 85.65,
    "vit_l": 303.10,
    "vit_h": 630.66,
    "vit_g": 1011.09,
}
PREDICTOR_SIZES = {  # millions of trainable parameters
    "vit_b": 11.24,
    "vit_l": 22.08,
    "vit_g": 29.48,
}
STEP_COSTS = {  # GFLOP per step and image
    "vit_ti": 26.8,
    "vit_s": 38.7,
    "vit_b": 85.0,
    "vit_l": 263.0,
    "vit_h": 661.0,
}


@pytest.mark.parametrize(("size", "millions"), ENCODER_SIZES.items())
def test_every_size_has_the_published_number_of_parameters(size, millions):
    """The published encoders have patches of 16 pixels."""
    values = recipe(size)
    model = dataclasses.replace(values.model, patch=16)
    found = parameters(dataclasses.replace(values, model=model))
    assert found.encoder / 1e6 == pytest.approx(millions, abs=0.006)


@pytest.mark.parametrize(("size", "millions"), PREDICTOR_SIZES.items())
def test_every_predictor_has_the_published_number_of_parameters(size, millions):
    found = parameters(recipe(size))
    assert found.predictor / 1e6 == pytest.approx(millions, abs=0.006)


@pytest.mark.parametrize(("size", "giga"), STEP_COSTS.items())
def test_a_step_costs_what_was_measured(size, giga):
    """The mean token counts are those of reference masks on 128 images per GPU."""
    values = recipe(size)
    share = values.model.grid**2 / 196
    found = step_flops(values, 51.7 * share, [33.9 * share] * 4)
    assert found.total / 1e9 == pytest.approx(giga, rel=0.02)
    assert 0 < found.encoder < found.total


def test_unequal_samples_are_averaged_exactly():
    """Attention is quadratic, so images of 40 and 60 tokens cost more than two of 50."""
    values = recipe("vit_s")
    short = step_flops(values, 40, [30, 30]).total
    long = step_flops(values, 60, [30, 30]).total
    mean = (short + long) / 2
    both = step_flops(values, [40, 60], [[30, 30], [30, 30]]).total
    assert both == pytest.approx(mean, rel=1e-12)
    assert step_flops(values, 50, [30, 30]).total < mean


def test_pixels_need_no_pass_of_the_target_encoder():
    """And the predictor's last matrix has the width of a patch."""
    values = recipe("vit_s")
    pixels = dataclasses.replace(values, objective=Objective(target="pixels"))
    assert pixels.target_width == 3 * values.model.patch**2
    wider = pixels.target_width - values.model.width
    per_token = 3 * 2 * values.predictor.width * wider
    want = step_flops(values, 50, [30]).total - encoder_flops(values) + 30 * per_token
    assert step_flops(pixels, 50, [30]).total == pytest.approx(want)
    more = parameters(pixels).predictor - parameters(values).predictor
    assert more == wider * (values.predictor.width + 1)

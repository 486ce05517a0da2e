"""`optim.transfer=mup`: factors of parameters, the base width, and the coordinate check."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import fake_trials
from test_ijepa import RECIPE, change, drawn, images
from torch import nn

from jepa_cluster.config import Recipe, config_from_dict, config_to_dict
from jepa_cluster.config_widths import Widths
from jepa_cluster.errors import ConfigError
from jepa_cluster.ijepa import mup, vit
from jepa_cluster.ijepa.objective import IJepa, init_weights, update_target
from jepa_cluster.training import sharded_adamw

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import mup as study

FAN_IN = replace(RECIPE, model=replace(RECIPE.model, init="fan_in"))
OWN = Widths(encoder=48, encoder_head=16, predictor=24, predictor_head=8)


def with_mup(base: Widths, recipe: Recipe = FAN_IN) -> Recipe:
    return replace(recipe, optim=replace(recipe.optim, transfer="mup", base_width=base))


def trained(recipe: Recipe) -> dict[str, torch.Tensor]:
    """Return the weights after three steps."""
    model = IJepa(recipe)
    init_weights(model, recipe)
    adam = sharded_adamw.build_optimizer(model, recipe.optim)
    adam.found_inf = torch.zeros(())
    for _ in range(3):
        model(images(), drawn(recipe))[0].backward()
        sharded_adamw.set_lr_and_decay(adam, 1e-3, 0.1)
        adam.step()
        adam.zero_grad()
        update_target(model, 0.9)
    return model.state_dict()


def test_at_the_base_width_nothing_changes_and_above_it_something_does():
    """The same bits as with model.init=fan_in, from the first weights on."""
    plain = trained(FAN_IN)
    for base in (OWN, Widths(encoder=48)):
        found = trained(with_mup(base))
        assert all(torch.equal(found[name], plain[name]) for name in plain)
    for name in vars(OWN):
        base = replace(OWN, **{name: getattr(OWN, name) // 2})
        found = trained(with_mup(base))
        assert not all(torch.equal(found[key], plain[key]) for key in plain), name


def test_the_default_is_not_in_the_identity():
    config = fake_trials.config("vit_a", (0.1, 0.2), 0, 10)
    assert not {"transfer", "base_width"} & config.identity()["recipe"]["optim"].keys()


@pytest.mark.parametrize(
    ("target", "base", "embed", "proj"),
    [
        (
            "representation",
            Widths(encoder=12),
            (1 / 4, 1 / 2),
            (1, 1),
        ),
        (
            "representation",
            Widths(encoder=12, predictor=6),
            (1 / 4, 1),
            (1 / 4, 1),
        ),
        (
            "representation",
            Widths(encoder=48, predictor=6),
            (1, 1),
            (1 / 4, 1 / 2),
        ),
        (
            "frozen",
            Widths(encoder=12, predictor=12),
            (1 / 4, 0.5**0.5),
            (1 / 2, 1),
        ),
        (
            "pixels",
            Widths(encoder=12, predictor=6),
            (1 / 4, 1),
            (1 / 4, 1 / 2),
        ),
    ],
)
def test_factors_follow_from_what_grows(target, base, embed, proj):
    """(lr, std) of every matrix; all else keeps both. The deviation of the weights is that."""
    recipe = with_mup(base, replace(FAN_IN, objective=change("objective", target=target).objective))
    across = {"embed.weight": embed, "proj.weight": proj}
    model = IJepa(recipe)
    init_weights(model, recipe)
    parts = {"encoder": (model.encoder, {}), "predictor": (model.predictor, across)}
    for part_name, (part, special) in parts.items():
        found, inner = mup.factors(part, recipe), (1 / recipe.growth[part_name], 1)
        for name, parameter in part.named_parameters():
            wanted = (1, 1)
            if parameter.dim() == 2:
                wanted = special.get(name, inner)
                deviation = parameter.std().item() * parameter.shape[1] ** 0.5
                assert deviation == pytest.approx(wanted[1], rel=0.15), name
            assert found[parameter] == pytest.approx(wanted), name


def test_groups_have_their_rate_and_one_product_of_rate_and_decay():
    """A group's rate is that of the schedule times its factor."""
    recipe = with_mup(Widths(encoder=12, predictor=12))
    model = IJepa(recipe)
    adam = sharded_adamw.build_optimizer(model, recipe.optim)
    sharded_adamw.set_lr_and_decay(adam, 0.01, 0.1)
    rates = {p: group["lr"] for group in adam.param_groups for p in group["params"]}
    assert rates[model.encoder.blocks[0].mlp.fc2.weight] == pytest.approx(0.01 / 4)
    assert rates[model.predictor.blocks[0].mlp.fc2.weight] == pytest.approx(0.01 / 2)
    assert rates[model.encoder.patch_embed.proj.weight] == 0.01
    assert rates[model.encoder.norm.weight] == 0.01
    assert len(rates) == len(list(sharded_adamw.trainable_parameters(model)))
    for group in adam.param_groups:
        product = 0.001 if group["decay"] else 0
        assert group["lr"] * group["weight_decay"] == pytest.approx(product)


def test_a_parameter_without_a_rule_is_an_error():
    recipe = with_mup(Widths(encoder=12))
    model = IJepa(recipe)
    model.encoder.blocks[1].register_parameter("gate", nn.Parameter(torch.zeros(3)))
    with pytest.raises(ConfigError, match=r"no rule for blocks\.1\.gate"):
        mup.factors(model.encoder, recipe)
    model.recipe = FAN_IN
    mup.factors(model.encoder, FAN_IN)


@pytest.mark.parametrize(
    ("model", "base", "says"),
    [
        (
            {},
            {},
            "needs optim.base_width.encoder",
        ),
        (
            {},
            {"encoder": 64},
            "optim.base_width.encoder is above that of the model",
        ),
        (
            {},
            {"encoder": 32, "predictor_head": 17},
            "predictor_head is above",
        ),
        (
            {},
            {"encoder": 0},
            "optim.base_width.encoder=0 is not 1 or more",
        ),
        (
            {"init": "reference"},
            {"encoder": 32},
            "needs model.init=fan_in",
        ),
        (
            {"timm": {"attn_layer": "diff"}},
            {"encoder": 32},
            "model.timm.attn_layer",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused(tiny_config, model, base, says):
    config = tiny_config(**{"model.init": "fan_in"})
    values = config_to_dict(config)
    values["model"] |= model
    values["optim"] |= {"transfer": "mup", "base_width": base}
    with pytest.raises(ConfigError, match=says):
        config_from_dict(values)


def test_logits_are_divided_by_the_width_of_a_head():
    """At four times the base head, half of the usual logits; the predictor has its own base."""
    base = Widths(encoder=48, encoder_head=4, predictor_head=2)
    model = IJepa(with_mup(base))
    for part in (model.encoder, model.target, model.predictor):
        assert [block.attn.query_scale for block in part.blocks] == [0.5] * 3
    attention, plain = model.encoder.blocks[0].attn, vit.Attention(48, 3, qkv_bias=True)
    nn.init.normal_(attention.qkv.weight)
    plain.load_state_dict(attention.state_dict())
    with torch.no_grad():
        plain.qkv.weight[:48] *= 0.5
        plain.qkv.bias[:48] *= 0.5
    x = torch.randn(2, 5, 48)
    assert torch.allclose(attention(x), plain(x), atol=1e-6)
    assert torch.allclose(attention(x, rows=2), plain(x)[:, -2:], atol=1e-6)


def test_the_coordinate_check_is_flat_with_mup_and_not_without():
    """Exponents in the width, of the RMS of outputs at step 0 and of their changes, over seeds.

    Attention logits vary most between seeds. A predictor of fixed width is not asked for more than
    its input, because the context fades against the positions there as the encoder grows.
    """
    found = study.exponents(6, *study.CHECKED["mup, predictor grows"])
    for (name, step), exponent in found.items():
        assert abs(exponent) < (0.4 if "logits" in name else 0.25), (name, step, exponent)
    found = study.exponents(2, *study.CHECKED["mup, predictor 32"])
    assert all(abs(found["predictor.embed", step]) < 0.25 for step in study.STEPS)
    found = study.exponents(2, *study.CHECKED["none, predictor 32"])
    for (name, step), exponent in found.items():
        if step == 1 and name.startswith(("encoder.blocks", "predictor.embed")):
            assert exponent > 0.5, (name, exponent)

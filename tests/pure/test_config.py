"""The settings of a trial: types, errors, identity."""

import dataclasses
import typing
from typing import Any

import pytest
import yaml
from support import fake_trials

from jepa_cluster import config_ranges
from jepa_cluster.config import (
    SECTIONS,
    Recipe,
    TrialConfig,
    all_settings,
    config_from_dict,
    config_to_dict,
)
from jepa_cluster.errors import ConfigError

PLAIN = yaml.safe_load(fake_trials.PLAIN.replace("vit_x", "vit_t"))


def plain(**changes: object) -> dict[str, object]:
    """Return the settings of a small trial. `section__name=value` changes one of them."""
    values = yaml.safe_load(yaml.safe_dump(PLAIN))
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            values[section][name] = value
        else:
            values[section] = value
    return values


def test_a_config_is_the_same_after_writing_and_reading():
    """The object and its id survive YAML."""
    config = config_from_dict(plain())
    text = yaml.safe_dump(config_to_dict(config))
    again = config_from_dict(yaml.safe_load(text))
    assert again == config
    assert again.id == config.id


def test_the_recipe_alone_decides_the_identity():
    """Identity follows from the type of a section: there is no list of excluded names."""
    config = config_from_dict(plain())
    runtime = dataclasses.replace(config.runtime, nodes=2, workers=0)
    assert TrialConfig(config.recipe, runtime).id == config.id
    for key, value in (
        ("model__depth", 3),
        ("mask__targets", 3),
        ("optim__lr", 0.002),
        ("data__digest", "abd"),
        ("probe__images", 5),
        ("seed", 1),
        ("predictor__mode", "joint"),
    ):
        assert config_from_dict(plain(**{key: value})).id != config.id, key


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("model__widht", 64, "did you mean 'width'?"),
        ("maks", {}, "did you mean 'mask'?"),
        ("model__width", "64", "model.width wants an integer, got '64'"),
        ("optim__batch", True, "optim.batch wants an integer, got True"),
        ("optim__divergence", {"patience": 0}, "optim.divergence.patience=0 is not 1 or more"),
        ("optim__divergence", {"rankm": 2.0}, "did you mean 'rankme'?"),
        ("optim__watch", {"rollbacks": 3}, "unknown setting 'optim.watch'"),
        ("mask__target_scale", [0.2], "mask.target_scale wants [low, high], got [0.2]"),
        ("mask__target_scale", [0.3, 0.2], "mask.target_scale=[0.3, 0.2] is not an interval"),
        ("model__heads", 3, "model.heads=3 does not divide model.width=64"),
        ("model__image", 60, "the nearest is model.image=64"),
        ("runtime", {"data_root": "d", "procs_per_node": 3}, "the nearest batches are 6 and 9"),
        ("runtime", {"data_root": "d", "keep_checkpoints": 1}, "keep_checkpoints=1"),
        ("optim__steps", None, "neither optim.steps nor optim.epochs"),
        ("seed", -1, "seed=-1 is not 0 or more"),
        ("data__shuffle_block", 0, "data.shuffle_block=0 is not 1 or more"),
        ("data__max_corrupt", 1.5, "data.max_corrupt=1.5 is not 0 or more and at most 1"),
        ("runtime", {"data_root": "d", "workers": -1}, "runtime.workers=-1 is not 0 or more"),
    ],
)
def test_a_bad_value_is_one_error_with_a_hint(key: str, value: object, says: str):
    """The error names the setting, its value, and the line of the sweep file."""
    with pytest.raises(ConfigError) as e:
        config_from_dict(plain(**{key: value}), where="sweeps/x.yaml:3")
    assert says in str(e.value)
    assert "sweeps/x.yaml:3" in str(e.value)


def test_a_missing_section_is_named():
    """A section without values has no silent default."""
    values = plain()
    del values["optim"]
    with pytest.raises(ConfigError, match="'optim' is missing"):
        config_from_dict(values)


# Numbers that another check limits, or that may be anything.
WITHOUT_RANGE = {
    "model.width",
    "model.depth",
    "model.heads",
    "model.patch",
    "model.image",
    "predictor.width",
    "predictor.depth",
    "predictor.heads",
    "mask.target_scale",
    "mask.target_aspect",
    "mask.context_scale",
    "mask.context_keep",
    "mask.keep_quantile",
    "mask.target_patches",
    "optim.momentum_steps",
    "data.images",
    "data.crop_scale",
    "data.crop_aspect",
    "seed",
    "runtime.nodes",
    "runtime.procs_per_node",
    "runtime.micro_batch",
}


def test_every_number_among_the_settings_has_a_range():
    """A new setting gets one, or a reason to stand in the list above."""
    ranged = {*config_ranges.ABOVE, *config_ranges.FROM}
    assert not ranged & WITHOUT_RANGE
    numbers: set[str] = set()
    for name in all_settings():
        *sections, last = name.split(".")
        section: Any = Recipe
        for part in sections:
            section = SECTIONS.get(part) or typing.get_type_hints(section)[part]
        hint = str(typing.get_type_hints(section)[last])
        if "Literal" not in hint and any(kind in hint for kind in ("int", "float")):
            numbers.add(name)
    assert numbers == ranged | WITHOUT_RANGE


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("runtime__log_every", 0, "runtime.log_every=0 is not 1 or more"),
        ("optim__clip", 0, "optim.clip=0.0 is not above 0"),
        ("optim__betas", [0.9, 1.0], "optim.betas=1.0 is not 0 or more and at most 0.999999999"),
        ("optim__weight_decay", float("nan"), "optim.weight_decay wants a number, got nan"),
        ("optim__warmup_steps", -1, "optim.warmup_steps=-1 is not 0 or more"),
        ("optim__divergence", {"patience": 0}, "optim.divergence.patience=0 is not 1 or more"),
        ("data__std", [1.0, 0.0, 1.0], "data.std=0.0 is not above 0 and at most 10"),
        ("model__name", "../x", "model.name='../x' names folders"),
        ("model__timm", {"drop_path_rate": 0.1}, "would draw from a generator that is not saved"),
        ("model__timm", {"in_chans": 1}, "model.timm.in_chans is no option"),
        ("model__timm", {"qk_nrm": True}, "did you mean 'qk_norm'?"),
    ],
)
def test_a_number_outside_its_range_is_refused_before_a_node_sees_it(key, value, says):
    with pytest.raises(ConfigError) as caught:
        config_from_dict(plain(**{key: value}))
    assert says in str(caught.value)

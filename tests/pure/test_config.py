"""The settings of a trial: types, errors, identity."""

import dataclasses

import pytest
import yaml
from support import fake_trials

from jepa_cluster.config import TrialConfig, config_from_dict, config_to_dict
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
        ("optim__divergence", {"patience": 0}, "optim.divergence.patience=0 is not positive"),
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
        ("data__max_corrupt", 1.5, "data.max_corrupt=1.5 is not a share"),
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

"""The page of knobs: strict types, clear refusals, identity by type."""

import dataclasses

import pytest
import yaml
from support import fake_trials

from jepa_cluster.config import TrialConfig, config_from_dict, config_to_dict
from jepa_cluster.errors import ConfigError

PLAIN = yaml.safe_load(fake_trials.PLAIN.replace("vit_x", "vit_t"))


def plain(**changes: object) -> dict[str, object]:
    values = yaml.safe_load(yaml.safe_dump(PLAIN))
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            values[section][name] = value
        else:
            values[section] = value
    return values


def test_a_config_survives_the_way_to_disk_and_back():
    """Through YAML: the same object and the same id."""
    config = config_from_dict(plain())
    again = config_from_dict(yaml.safe_load(yaml.safe_dump(config_to_dict(config))))
    assert again == config and again.id == config.id


def test_runtime_does_not_change_the_identity_and_every_recipe_field_does():
    """Identity by type: no list of excluded names."""
    config = config_from_dict(plain())
    assert TrialConfig(config.recipe, dataclasses.replace(config.runtime, nodes=2, workers=0)).id == config.id
    for key, value in (("model__depth", 3), ("mask__targets", 3), ("optim__lr", 0.002), ("data__digest", "abd"),
                       ("probe__images", 5), ("seed", 1), ("predictor__mode", "joint")):  # fmt: skip
        assert config_from_dict(plain(**{key: value})).id != config.id, key


def test_the_directory_name_is_a_function_of_the_recipe():
    """Equal trials of two sweeps meet in one directory."""
    name = config_from_dict(plain()).name
    assert name.startswith("vit_t-ts.15-.2-s0-") and len(name.rsplit("-", 1)[1]) == 12


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
def test_a_bad_value_is_one_error_that_names_it_and_gives_a_hint(key: str, value: object, says: str):
    """What, which value, where, hint."""
    with pytest.raises(ConfigError) as e:
        config_from_dict(plain(**{key: value}), where="sweeps/x.yaml:3")
    assert says in str(e.value) and "sweeps/x.yaml:3" in str(e.value)


def test_a_missing_section_is_named():
    """No silent default for what was never said."""
    values = plain()
    del values["optim"]
    with pytest.raises(ConfigError, match="'optim' is missing"):
        config_from_dict(values)

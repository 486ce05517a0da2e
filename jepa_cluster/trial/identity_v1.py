"""Read the config of a trial that was frozen with identity version 1.

Such a trial can be shown, shipped to MLflow and exported. It is not trained any more.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

RENAMED = {  # setting of version 1 -> setting of today
    "mask.aspect_law": "mask.aspect_distribution",
    "mask.official_batch": "mask.reference_batch",
    "data.block": "data.shuffle_block",
    "data.window": "data.shuffle_window",
    "optim.stretch": "optim.schedule_stretch",
    "optim.loss": "objective.loss",
    "runtime.shard": "runtime.fsdp_shard_size",
    "runtime.stage": "runtime.staging_dir",
}
VALUES = {  # (setting, value of version 1) -> value of today
    ("mask.mode", "clean"): "multiblock",
    ("mask.mode", "official"): "reference",
    ("model.init", "released"): "reference",
}
REMOVED = ("optim.watch",)  # spike rollback


def upgrade(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sections with the names and values of today."""
    config: dict[str, Any] = copy.deepcopy(dict(values))
    for old, new in RENAMED.items():
        section, name = old.split(".")
        if name in config.get(section, {}):
            new_section, new_name = new.split(".")
            config.setdefault(new_section, {})[new_name] = config[section].pop(name)
    for (setting, old_value), new_value in VALUES.items():
        section, name = setting.split(".")
        if config.get(section, {}).get(name) == old_value:
            config[section][name] = new_value
    for setting in REMOVED:
        section, name = setting.split(".")
        config.get(section, {}).pop(name, None)
    return config

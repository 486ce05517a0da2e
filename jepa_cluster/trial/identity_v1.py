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
VALUES = {"clean": "multiblock", "official": "reference", "released": "reference"}


def upgrade(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sections with the names and values of today."""
    config: dict[str, Any] = copy.deepcopy(dict(values))
    config["objective"] = {}
    for old, new in RENAMED.items():
        section, name = old.split(".")
        new_section, new_name = new.split(".")
        if name in config.get(section, {}):
            config.setdefault(new_section, {})[new_name] = config[section].pop(name)
    for section, name in (("mask", "mode"), ("model", "init")):
        if name in config.get(section, {}):
            config[section][name] = VALUES.get(config[section][name], config[section][name])
    config.get("optim", {}).pop("watch", None)  # spike rollback
    return config

"""Read the config of a trial that was frozen with identity version 1.

Such a trial can be shown, shipped to MLflow and exported. It is not trained any more.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

RENAMED = {  # setting of version 1 -> setting of today, in the same section
    "aspect_law": "aspect_distribution",
    "official_batch": "reference_batch",
    "block": "shuffle_block",
    "window": "shuffle_window",
    "stretch": "schedule_stretch",
    "shard": "fsdp_shard_size",
    "stage": "staging_dir",
}
VALUES = {"clean": "multiblock", "official": "reference", "released": "reference"}


def upgrade(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sections with the names and values of today."""
    config: dict[str, Any] = {"objective": {}, **copy.deepcopy(dict(values))}
    for settings in config.values():
        if isinstance(settings, dict):
            for old in RENAMED.keys() & settings:
                settings[RENAMED[old]] = settings.pop(old)
    optim = config.get("optim", {})
    optim.pop("watch", None)  # spike rollback
    if "loss" in optim:
        config["objective"]["loss"] = optim.pop("loss")
    for section, name in (("mask", "mode"), ("model", "init")):
        settings = config.get(section, {})
        if settings.get(name) in VALUES:
            settings[name] = VALUES[settings[name]]
    return config

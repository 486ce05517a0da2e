"""A config as YAML, and back."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any, cast

import yaml

from jepa_cluster.config import TrialConfig, config_to_dict

# libyaml where it is installed: ten times faster
_Dumper: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def dump(config: TrialConfig) -> str:
    return dump_values(config_to_dict(config))


def dump_values(values: Mapping[str, Any]) -> str:
    return "".join(_dump_section(json.dumps({name: value})) for name, value in values.items())


@functools.lru_cache(maxsize=1000)
def _dump_section(section: str) -> str:
    """Return a section as YAML. Most trials of a sweep share most sections."""
    return yaml.dump(json.loads(section), Dumper=_Dumper, sort_keys=False)


def load(text: str) -> dict[str, Any] | None:
    """Return the settings; None for a text that is empty, torn or not plain YAML."""
    try:
        values: object = yaml.load(text, _Loader)
    except yaml.YAMLError:
        return None
    return cast("dict[str, Any]", values) if isinstance(values, dict) else None

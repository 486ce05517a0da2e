"""Compose `conf/` with Hydra and merge settings into the result.

In: the `conf/` folder, and overrides in Hydra's grammar or as (key, value). Out: a plain mapping
of sections, not yet typed. Hydra composes once per process and set of group choices (125 ms),
a Composer resolves interpolations once for each set, and values are merged without Hydra. Unknown
groups and settings are ConfigErrors with the nearest name.
"""

from __future__ import annotations

import copy
import functools
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jepa_cluster.config import all_settings
from jepa_cluster.errors import ConfigError, suggest
from jepa_cluster.labels import format_value
from jepa_cluster.schema import ConfigDict

if TYPE_CHECKING:
    from omegaconf import DictConfig


@dataclass(frozen=True)
class Override:
    """A group choice or a value. where: file and line, for errors."""

    key: str
    value: Any
    where: str


def conf_dir() -> Path:
    """Return the folder of Hydra's configuration files."""
    return shipped_folder("conf")


def shipped_sweeps() -> dict[str, Path]:
    """Return name -> file of the sweeps that a clone or an installed wheel has."""
    folder = shipped_folder("sweeps")
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def shipped_folder(name: str) -> Path:
    """Return a folder inside the package, as a wheel installs it, or beside it, as in a clone."""
    package = Path(__file__).parents[1]
    for folder in (package / name, package.parent / name):
        if any(folder.glob("*.yaml")):
            return folder
    what = f"the folder {name}/ is missing"
    raise ConfigError(what, where=str(package), hint="install jepa_cluster again")


def parse_override(text: str, where: str) -> Override:
    """Parse 'optim.lr=1e-3' in Hydra's grammar. A leading + is allowed, for free-form keys."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        parsed = OverridesParser.create().parse_override(text)
        if parsed.is_sweep_override() or parsed.is_delete() or parsed.package:
            what = f"'{text}' is no plain setting"
            raise ConfigError(what, where=where, hint="sweep it as an axis of grid")
        return Override(parsed.key_or_group, parsed.value(), where)
    except (HydraException, ValueError) as e:
        what = f"not a Hydra override: '{text}' ({str(e).splitlines()[0]})"
        raise ConfigError(what, where=where, hint="key=value") from e


class Composer:
    """Composes `conf/`.

    runtime: settings of the cluster profile, which overrides replace.
    """

    def __init__(self, conf: Path, runtime: Mapping[str, Any]) -> None:
        self.conf = conf
        self.runtime = runtime
        self.groups: dict[str, list[str]] = {}  # name of the group -> its choices
        for folder in conf.iterdir():
            choices = sorted(file.stem for file in folder.glob("*.yaml"))
            if choices:
                self.groups[folder.name] = choices
        files = sorted(conf.rglob("*.yaml"))
        self._changed = tuple(map(os.path.getmtime, files))
        self._resolved: dict[tuple[str, ...], str] = {}  # choices -> JSON; each trial has a copy

    def compose(self, overrides: Iterable[Override]) -> ConfigDict:
        """Return a fresh mapping: groups composed, then runtime and values merged in."""
        choices: list[str] = []
        values: list[Override] = []
        for key, value in self.runtime.items():
            values.append(Override(f"runtime.{key}", value, "the cluster profile"))
        for override in overrides:
            if override.key not in self.groups:
                values.append(override)
                continue
            group, choice = override.key, override.value
            known = self.groups[group]
            if choice not in known:
                what = f"no {group} is called {choice!r}"
                raise ConfigError(what, where=override.where, hint=suggest(str(choice), known))
            choices.append(f"{group}={choice}")
        config = json.loads(self._resolve(tuple(choices)))
        for override in values:
            _set_value(config, override)
        return config

    def _resolve(self, choices: tuple[str, ...]) -> str:
        """Compose groups, and resolve interpolations, those of environment variables too."""
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException

        if choices not in self._resolved:
            composed = _compose_groups(self.conf, choices, self._changed)
            try:
                config: Any = OmegaConf.to_container(composed, resolve=True)
            except OmegaConfBaseException as e:
                raise ConfigError(f"conf/ does not compose: {e}", where=str(self.conf)) from e
            config.pop("hydra", None)
            self._resolved[choices] = json.dumps(config)
        return self._resolved[choices]


@functools.cache
def _compose_groups(
    conf: Path,
    choices: tuple[str, ...],
    changed: tuple[float, ...],
) -> DictConfig:
    """Return the composed config. changed: times at which the files of `conf/` were changed."""
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    try:
        with initialize_config_dir(str(conf.absolute()), version_base="1.3"):
            return compose("config", list(choices))
    except (HydraException, OmegaConfBaseException) as e:
        raise ConfigError(f"conf/ does not compose: {e}", where=str(conf)) from e


def _set_value(config: ConfigDict, override: Override) -> None:
    """Replace the value of a setting. Only below model.timm, which is free-form, it may be new."""
    key = override.key
    *sections, last = key.split(".")
    section: Any = config
    for name in sections:
        section = section.get(name) if isinstance(section, dict) else None
    known = isinstance(section, dict) and (last in section or key.startswith("model.timm."))
    if not known:
        names = all_settings()
        if isinstance(section, dict) and sections:
            names = [".".join([*sections, name]) for name in section]
        what = f"unknown setting '{key}'"
        raise ConfigError(what, where=override.where, hint=suggest(key, names))
    if isinstance(section.get(last), dict) and not isinstance(override.value, dict):
        what = f"'{key}' is a section, not a setting; got {format_value(override.value)!r}"
        raise ConfigError(what, where=override.where)
    section[last] = copy.deepcopy(override.value)

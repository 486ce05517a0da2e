"""What argcomplete offers for arguments whose values the parser does not know.

In: the parsed arguments and the word that is being typed. Out: candidates; argcomplete keeps those
that begin with the word. Sweeps, axes and values come from the root, settings from conf/.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from typing import Any

from jepa_cluster.cli.root import root_of, sweep_name


def attach(action: argparse.Action, completer: Callable[..., Iterable[str]]) -> None:
    action.completer = completer  # pyright: ignore[reportAttributeAccessIssue]  read by argcomplete


def sweeps(parsed_args: argparse.Namespace, **_: Any) -> Iterable[str]:
    return root_of(parsed_args).sweeps()


def profiles(**_: Any) -> Iterable[str]:
    from jepa_cluster.launch.cluster.profile import shipped_profiles

    return [path.stem for folder in shipped_profiles() for path in folder.glob("*.yaml")]


def selections(prefix: str, parsed_args: argparse.Namespace, **_: Any) -> Iterable[str]:
    """Complete `state=`, an axis, or one of its values; '!' in front excludes."""
    from jepa_cluster.labels import format_value
    from jepa_cluster.trial.status import STATES

    if not parsed_args.sweep:
        return ()
    values: dict[str, set[str]] = {"state": set(STATES)}
    for trial in root_of(parsed_args).sweep(sweep_name(parsed_args)).planned():
        point = {**trial["point"], "seed": trial["seed"], "class": trial["class"]}
        for axis, value in point.items():
            values.setdefault(axis, set()).add(format_value(value))
    excluded = "!" if prefix.startswith("!") else ""
    axis, has_value, _value = prefix.removeprefix("!").partition("=")
    if not has_value:
        return [f"{excluded}{axis}=" for axis in values]
    return [f"{excluded}{axis}={value}" for value in values.get(axis, ())]


def overrides(prefix: str, **_: Any) -> Iterable[str]:
    """Complete a group or a setting, or one of a group's choices."""
    from jepa_cluster.config import all_settings
    from jepa_cluster.sweep.compose import conf_dir

    group, has_value, _value = prefix.partition("=")
    if has_value:
        return [f"{group}={path.stem}" for path in (conf_dir() / group).glob("*.yaml")]
    groups = [folder.name for folder in conf_dir().iterdir() if any(folder.glob("*.yaml"))]
    return [f"{name}=" for name in [*groups, *all_settings()]]

"""The options of sbatch for a trial, for the submission, `jepa plan` and `jepa doctor`.

In: a profile, a resource class and the nodes to exclude. Out: sbatch's long options. Pure.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from typing import Any

from jepa_cluster.launch.cluster.profile import Profile, ResourceClass


def sbatch_options(
    profile: Profile, cls: ResourceClass, bad_nodes: Iterable[str] = ()
) -> dict[str, Any]:
    """Return the options of a job for a trial of this class; True for one that takes no value.

    The profile's own `sbatch` options override the others.
    bad_nodes: excluded besides those of the profile.
    """
    excluded = [profile.exclude] if profile.exclude else []
    excluded += bad_nodes
    memory = f"{profile.mem_gb:g}GB" if profile.mem_gb else profile.mem_gb
    options: dict[str, Any] = {
        "partition": profile.partition,
        "account": profile.account,
        "qos": profile.qos,
        "constraint": profile.constraint,
        "exclude": ",".join(excluded) or None,
        "time": cls.minutes,
        "nodes": cls.nodes,
        "ntasks-per-node": cls.procs_per_node,
        "cpus-per-task": profile.cpus_per_proc,
        "gpus-per-node": min(cls.procs_per_node, profile.gpus_per_node) or None,
        "mem": memory,
        "signal": f"USR2@{profile.signal_seconds}",
        "requeue": True,
    }
    for name, value in profile.sbatch.items():
        options[name.replace("_", "-")] = value
    return {name: value for name, value in options.items() if value is not None}


def to_cli_options(options: Mapping[str, Any]) -> list[str]:
    """Return the options as words: {'time': 60, 'requeue': True} -> --time=60, --requeue."""
    words: list[str] = []
    for name, value in options.items():
        if value is True:
            words.append(f"--{name}")
        else:
            words.append(f"--{name}={value}")
    return words


def setup_lines(profile: Profile, **variables: str) -> list[str]:
    """Return the shell lines that run on a node before Python.

    variables: exported besides those of the profile.
    """
    exports = {**profile.environment, **variables}
    lines = [f"export {name}={shlex.quote(str(value))}" for name, value in exports.items()]
    return [*lines, *profile.setup]

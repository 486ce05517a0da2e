"""The options of sbatch for a trial, for the submission, `jepa plan` and `jepa doctor`.

In: a profile, a resource class and the nodes to exclude. Out: sbatch's long options. Pure.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from typing import Any

from jepa_cluster.launch.cluster.profile import GPU_GRES, Profile, ResourceClass

BLOCKED = '"${block[@]}"'  # what `block_signals` defines
SRUN_OPTIONS = ("cpus-per-task",)
SETUP_FAILED = "a command of setup failed"
# BASH_SOURCE names the batch script (nothing under `bash -c`), and before it a file that setup
# sources: what fails inside such a file is its own business.
SETUP_TRAP = f"""\
setup_depth=${{#BASH_SOURCE[@]}}
trap 'setup_status=$? setup_line=$LINENO setup_command=$BASH_COMMAND
if [ ${{#BASH_SOURCE[@]}} -le $setup_depth ]; then
  setup_text=$(sed -n "${{setup_line}}p" "${{BASH_SOURCE[0]}}" 2>/dev/null)
  echo "{SETUP_FAILED}: $setup_text ($setup_command)" >&2
  exit $setup_status
fi' ERR"""


def sbatch_options(
    profile: Profile, cls: ResourceClass, bad_nodes: Iterable[str] = ()
) -> dict[str, Any]:
    """Return the options of a job for a trial of this class; True for one that takes no value.

    An `sbatch` option of the profile that is null removes the option.
    bad_nodes: excluded besides those of the profile.
    """
    excluded = [profile.exclude] if profile.exclude else []
    excluded += bad_nodes
    memory: str | None = None
    if profile.mem_gb is not None:  # sbatch takes whole numbers only
        memory = f"{round(profile.mem_gb * 1024)}M"
    gpus = _gpus(profile, cls)
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
        "gpus-per-node": gpus,
        "mem": memory,
        "signal": f"USR2@{profile.signal_seconds}",
        "requeue": True,
    }
    for name, value in profile.sbatch.items():
        text = ",".join(map(str, value)) if isinstance(value, list) else value
        options[name.replace("_", "-")] = text
    gres = str(options.get("gres") or "")
    if GPU_GRES.search(gres):
        options |= {"gres": GPU_GRES.sub(f"gpu:{gpus}", gres), "gpus-per-node": None}
    # 0 is a value: `mem: 0` asks for all memory of a node.
    return {
        name: value for name, value in options.items() if value is not None and value is not False
    }


def _gpus(profile: Profile, cls: ResourceClass) -> str | None:
    """Return the GPUs of one node as Slurm takes them: '8', 'a100:8'; None without GPUs."""
    gpus = min(cls.procs_per_node, profile.gpus_per_node)
    if not gpus:
        return None
    return f"{profile.gpu_type}:{gpus}" if profile.gpu_type else str(gpus)


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

    A command of `setup` that fails ends the script with a message that names it, unless it is part
    of a condition, of a function or of a file that `setup` sources.

    variables: exported besides those of the profile.
    """
    exports = {**profile.environment, **variables}
    lines = [f"export {name}={shlex.quote(str(value))}" for name, value in exports.items()]
    if profile.setup:
        lines += [SETUP_TRAP, *profile.setup, "trap - ERR"]
    return lines


def srun_options(options: Mapping[str, Any]) -> list[str]:
    """Return the options that srun does not take over from sbatch since Slurm 22.05."""
    return to_cli_options({name: options[name] for name in SRUN_OPTIONS if name in options})


def block_signals(python: str) -> str:
    """Return shell lines that define `block`, which starts a program with USR2 and TERM blocked.

    So no signal is lost while Python starts. `env` of coreutils before 8.31 cannot block signals;
    then bash ignores them until a small Python has blocked them.
    """
    return f"""\
block=(env --block-signal=USR2,TERM)
{BLOCKED} true 2>/dev/null || block=(bash -c 'trap "" USR2 TERM; exec "$@"' bash {python} -ISc
'import os, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2, signal.SIGTERM])
os.execvp(sys.argv[1], sys.argv[1:])')"""

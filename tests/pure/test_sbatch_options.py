"""The sbatch options of a resource class. The batch scripts are in tests/golden."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from jepa_cluster.launch.cluster import profile as resources
from jepa_cluster.launch.cluster.profile import ResourceClass
from jepa_cluster.launch.cluster.sbatch_options import (
    BLOCKED,
    block_signals,
    sbatch_options,
    setup_lines,
    to_cli_options,
)

PROFILE = resources.load_profile(Path("example"))
CLASS = ResourceClass(2, 4, 90)


def test_the_options_come_from_the_profile_and_the_resource_class() -> None:
    """A setting that the profile does not have gives no option."""
    assert to_cli_options(sbatch_options(PROFILE, CLASS)) == [
        "--partition=gpu",
        "--time=90",
        "--nodes=2",
        "--ntasks-per-node=4",
        "--cpus-per-task=12",
        "--gpus-per-node=4",
        "--signal=USR2@120",
        "--requeue",
    ]


def test_bad_nodes_are_excluded_besides_those_of_the_profile() -> None:
    profile = replace(PROFILE, exclude="n[1-2]")
    assert sbatch_options(profile, CLASS)["exclude"] == "n[1-2]"
    assert sbatch_options(profile, CLASS, ["n7", "n9"])["exclude"] == "n[1-2],n7,n9"
    assert sbatch_options(PROFILE, CLASS, ["n7"])["exclude"] == "n7"


def test_no_gpus_are_requested_from_nodes_without_gpus() -> None:
    options = sbatch_options(replace(PROFILE, gpus_per_node=0, mem_gb=0), CLASS)
    assert "gpus-per-node" not in options


@pytest.mark.parametrize(("mem_gb", "mem"), [(0, "0M"), (480, "491520M"), (187.5, "192000M")])
def test_memory_is_given_in_whole_megabytes(mem_gb: float, mem: str) -> None:
    """0 requests all memory of a node."""
    assert sbatch_options(replace(PROFILE, mem_gb=mem_gb), CLASS)["mem"] == mem


@pytest.mark.parametrize(
    ("lines", "option"),
    [
        ("sbatch: {mem: 187G}", "--mem=187G"),
        ("sbatch: {mem: 0}", "--mem=0"),
        ("sbatch: {mem-per-gpu: 40G}", "--mem-per-gpu=40G"),
        ("sbatch: {mem_per_gpu: 40960}", "--mem-per-gpu=40960"),
        ("sbatch: {mem-per-cpu: 4000M}", "--mem-per-cpu=4000M"),
        ("mem_gb: 187.5", "--mem=192000M"),
    ],
)
def test_memory_may_have_any_form_that_slurm_takes(tmp_path: Path, lines: str, option: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(f"kind: slurm\n{lines}")
    words = to_cli_options(sbatch_options(resources.load_profile(file), CLASS))
    assert [word for word in words if "mem" in word] == [option]


def test_the_profile_may_add_options_of_its_own() -> None:
    """Names have hyphens or underscores. null removes an option, true makes a flag."""
    own = {"exclusive": True, "mail_type": ["FAIL", "END"], "time": None, "overcommit": False}
    options = sbatch_options(replace(PROFILE, sbatch={**own, "wckey": None}), CLASS)
    assert options["mail-type"] == "FAIL,END"
    assert not {"time", "overcommit", "wckey"} & options.keys()
    assert "--exclusive" in to_cli_options(options)


@pytest.mark.parametrize(
    ("lines", "option"),
    [
        ("gpus_per_node: 8", "--gpus-per-node=4"),
        ("gpus_per_node: 8\ngpu_type: a100", "--gpus-per-node=a100:4"),
        ("sbatch: {gres: 'gpu:a100:8'}", "--gres=gpu:a100:4"),
        ("sbatch: {gres: 'nvme:1,gpu:2'}", "--gres=nvme:1,gpu:2"),
    ],
)
def test_gpus_may_be_typed_and_are_as_many_as_a_trial_has_processes(
    tmp_path: Path, lines: str, option: str
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(f"kind: slurm\n{lines}")
    profile = resources.load_profile(file)
    words = to_cli_options(sbatch_options(profile, CLASS))
    assert [word for word in words if "gres" in word or "gpu" in word] == [option]
    assert profile.unit == "GPU-h"


OLD_ENV = """\
#!/bin/sh
case $1 in --*) echo "env: unrecognized option '$1'" >&2; exit 125;; esac
exec /usr/bin/env "$@"
"""
PENDING = """\
import os, signal
for number in (signal.SIGUSR2, signal.SIGTERM):
    os.kill(os.getpid(), number)
print(*sorted(signal.sigpending()))
"""


@pytest.mark.parametrize("coreutils", ["8.30", "8.31"])
def test_a_signal_while_python_starts_stays_pending(tmp_path: Path, coreutils: str) -> None:
    """`env` before coreutils 8.31 has no --block-signal."""
    path = os.environ["PATH"]
    if coreutils == "8.30":
        (tmp_path / "env").write_text(OLD_ENV)
        (tmp_path / "env").chmod(0o755)
        path = f"{tmp_path}:{path}"
    script = f"{block_signals(sys.executable)}\n{BLOCKED} {sys.executable} -c '{PENDING}'"
    done = subprocess.run(
        ["bash", "-c", script], env={"PATH": path}, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [str(int(signal.SIGUSR2)), str(int(signal.SIGTERM))]


def run_setup(folder: Path, *setup: str) -> subprocess.CompletedProcess[str]:
    script = folder / "job.sh"
    lines = [*setup_lines(replace(PROFILE, setup=setup)), "false", "echo started"]
    script.write_text("\n".join(lines))
    return subprocess.run(["bash", script], capture_output=True, text=True, check=False)


def test_a_line_of_setup_that_fails_ends_the_script_and_is_named(tmp_path: Path) -> None:
    """Else the trial would run with the module that another line should have replaced."""
    done = run_setup(
        tmp_path, "load() { test $1 = cuda; }", "load cuda", "load 'no such'", "load cuda"
    )
    assert done.returncode
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("a command of setup failed: load 'no such' (")
    done = run_setup(tmp_path, "[ -f /nowhere ] && echo found", "true")
    assert done.stdout == "started\n", "what comes after it may fail"


def test_commands_of_setup_may_fail_inside_what_succeeds(tmp_path: Path) -> None:
    """In a function, in a sourced file and in a condition; a block may have several lines."""
    script = tmp_path / "activate.sh"
    script.write_text("false\ntrue\n")
    done = run_setup(
        tmp_path, "f() { false; true; }", "f", f"source {script}", "if false", "then false", "fi"
    )
    assert done.stdout == "started\n"
    script.write_text("true\nfalse\n")
    done = run_setup(tmp_path, f"source {script}")
    assert done.returncode
    assert str(script) in done.stderr

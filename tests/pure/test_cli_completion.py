"""Completion of commands in a shell, by argcomplete."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

MAIN = "from jepa_cluster.cli import main; main()"
PRINT_HEAVY_MODULES = """
import os, sys
from jepa_cluster import cli

heavy = {"torch", "timm", "mlflow", "webdataset", "hydra", "submitit", "numpy", "rich"}
leave = os._exit

def print_and_leave(code):
    print(heavy & set(sys.modules), file=sys.stderr)
    leave(code)

os._exit = print_and_leave
cli.main()
"""


def completion_environment(line: str) -> dict[str, str]:
    """Return the variables with which the shell function of argcomplete asks for candidates."""
    asked = {
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_IFS": "\n",
        "_ARGCOMPLETE_COMP_WORDBREAKS": " \t\n\"'><=;|&(:",
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
    }
    return {**os.environ, **asked}


def complete(line: str) -> list[str]:
    """Return the candidates for the last word of a line. argcomplete writes to descriptor 8."""
    command = ["bash", "-c", '"$0" -c "$1" 8>&1 9>&2 1>&2', sys.executable, MAIN]
    environment = completion_environment(line)
    return subprocess.check_output(command, env=environment, text=True).split()


@pytest.mark.usefixtures("submitted")
@pytest.mark.parametrize(
    ("line", "candidates"),
    [
        ("jepa re", ["requeue", "resume", "retry", "repro", "report"]),
        ("jepa watch ", ["ask"]),
        ("jepa scaling a", ["ask"]),
        ("jepa watch --root root a", ["ask"]),
        ("jepa nodes ", []),
    ],
)
def test_all_candidates_of_a_line(line: str, candidates: list[str]) -> None:
    """They come from the parser and the root."""
    assert complete(line) == candidates


@pytest.mark.usefixtures("submitted")
@pytest.mark.parametrize(
    ("line", "candidate"),
    [
        ("jepa shards ", "build"),
        ("jepa shards build x --", "--shard-mb"),
        ("jepa submit x --c", "--canary"),
    ],
)
def test_a_candidate_of_a_line(line: str, candidate: str) -> None:
    assert candidate in complete(line)


@pytest.mark.usefixtures("submitted")
@pytest.mark.parametrize("line", ["jepa sta", "jepa why "])
def test_completion_imports_no_heavy_module(line: str) -> None:
    """The shell runs it at every press of Tab."""
    asked = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line))}
    redirected = '"$0" -c "$1" 8>/dev/null 9>/dev/null'
    done = subprocess.run(
        ["bash", "-c", redirected, sys.executable, PRINT_HEAVY_MODULES],
        env={**os.environ, **asked},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr.strip() == "set()"


@pytest.mark.usefixtures("submitted")
def test_the_shell_function_of_argcomplete_completes_in_bash(folder: Path) -> None:
    """bash has no terminal here; the script calls the function as readline does."""
    program = folder / "jepa"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m jepa_cluster "$@"\n')
    program.chmod(0o755)
    register = Path(sys.executable).with_name("register-python-argcomplete")
    line = "jepa watch a"
    script = f"""
PATH={folder}:$PATH
eval "$({register} jepa)"
COMP_LINE="{line}" COMP_POINT={len(line)} COMP_TYPE=9
_python_argcomplete jepa
echo "${{COMPREPLY[@]}}"
"""
    output = subprocess.check_output(["bash", "-c", script], text=True)
    assert output.split() == ["ask"]

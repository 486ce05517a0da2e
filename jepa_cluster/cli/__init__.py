"""The command line. Each module of this package adds the verbs of one noun.

`jepa --help` must be instant, so nothing heavier than argparse is imported here. A handler imports
what it needs when it runs, calls a lower package and prints the result. Each module has one public
function `add(verbs)`. A handler takes the parsed arguments and returns an exit code.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback
from typing import Any, NoReturn, TypeAlias

from jepa_cluster.errors import ExitCode, JepaError, printable, suggest

Verbs: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"  # pyright: ignore

# In the order of the help page.
MODULES = (
    "sweeps",
    "trials",
    "diagnose",
    "maintain",
    "results",
    "calibrate",
    "training",
    "shards",
    "model",
    "demo",
)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, with the closest choice."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        option = [*action.option_strings, action.dest][0]
        is_verb = isinstance(action, argparse._SubParsersAction)  # pyright: ignore
        problem = "no verb" if is_verb else f"{option} cannot be"
        self.error(f"{problem} '{value}': {suggest(str(value), action.choices)}")


def parser() -> argparse.ArgumentParser:
    top = Parser(prog="jepa", description="Run I-JEPA sweeps on Slurm and fit scaling curves.")
    verbs = top.add_subparsers(metavar="VERB", required=True)
    for name in MODULES:
        importlib.import_module(f"jepa_cluster.cli.{name}").add(verbs)
    return top


def main(argv: list[str] | None = None) -> int:
    top = parser()
    if "_ARGCOMPLETE" in os.environ:  # set by the shell: print the completions and exit
        import argcomplete

        argcomplete.autocomplete(top, always_complete_options=False)
    args = top.parse_args(argv)
    try:
        return int(args.run(args))
    except JepaError as e:
        print(f"jepa: {e}", file=sys.stderr)
        if os.environ.get("JEPA_TRACEBACK"):
            traceback.print_exc()
        return ExitCode.CONFIG
    except KeyboardInterrupt:
        print("jepa: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as e:
        if e.filename is None or os.environ.get("JEPA_TRACEBACK"):
            raise
        print(printable(f"jepa: cannot use {e.filename}: {e.strerror}"), file=sys.stderr)
        return ExitCode.CONFIG

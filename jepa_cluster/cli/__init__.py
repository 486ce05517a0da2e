"""The verbs. Each module of this package adds some; a handler imports what it needs when it runs.

`jepa --help` must feel instant, so nothing heavier than argparse is imported here (tests/pure/test_cli.py).
A verb module has one public function, `add(verbs)`; its handlers take the parsed arguments and return an exit code.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback
from typing import Any, NoReturn, TypeAlias

from jepa_cluster.errors import ExitCode, JepaError, suggest

Verbs: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"  # pyright: ignore[reportPrivateUsage]

VERBS = ("sweeps", "repair", "results", "training", "shards", "model", "demo")  # in the order of the help page


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, with the nearest of the choices instead of all of them."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")

    def _check_value(self, action: Any, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            verb = isinstance(action, argparse._SubParsersAction)  # pyright: ignore[reportPrivateUsage]
            what = "no verb" if verb else f"{[*action.option_strings, action.dest][0]} cannot be"
            self.error(f"{what} '{value}': {suggest(str(value), action.choices)}")


def parser() -> argparse.ArgumentParser:
    top = Parser(prog="jepa", description="I-JEPA sweeps on Slurm, read as scaling curves.")
    verbs = top.add_subparsers(metavar="VERB", required=True)
    for name in VERBS:
        importlib.import_module(f"jepa_cluster.cli.{name}").add(verbs)
    return top


def main(argv: list[str] | None = None) -> int:
    top = parser()
    if "_ARGCOMPLETE" in os.environ:  # the shell asks what may come next; answers and exits
        import argcomplete

        argcomplete.autocomplete(top, always_complete_options=False)
    arguments = top.parse_args(argv)
    try:
        return int(arguments.run(arguments) or 0)
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
        print(f"jepa: cannot use {e.filename}: {e.strerror}", file=sys.stderr)
        return ExitCode.CONFIG

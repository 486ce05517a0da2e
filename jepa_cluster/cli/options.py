"""What the verbs share: arguments, the choice of sweeps and trials, and output.

With --json, stdout holds only the document of the verb. All else is printed to stderr.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from jepa_cluster.cli import Verbs
from jepa_cluster.errors import ConfigError, LaunchError, TrialError, printable

if TYPE_CHECKING:
    from jepa_cluster.results.tables import SweepResults
    from jepa_cluster.sweep.select_trials import Row
    from jepa_cluster.trial.directory import Root, TrialDir

Args: TypeAlias = argparse.Namespace
SWEEP_HELP = "name of a submitted sweep, or its file"
TRIAL_HELP = "a trial directory, or the name of a submitted sweep"

# ---- arguments


def command(
    verbs: Verbs,
    handler: Callable[[Args], int],
    name: str = "",
    root: bool = True,
    document: bool = True,
) -> argparse.ArgumentParser:
    """Add the verb of a handler. Its help is the first paragraph of the handler's docstring.

    name: default that of the handler. root: whether it works below a root. document: whether it
    prints one.
    """
    text = " ".join((handler.__doc__ or "").partition("\n\n")[0].split()).removesuffix(".")
    text = text[:1].lower() + text[1:]
    parser = verbs.add_parser(name or handler.__name__, help=text, description=text)
    if root:
        text = (
            "folder of all sweeps and trials, or a file of `jepa archive` "
            "(default: $JEPA_ROOT, else ./jepa-root)"
        )
        parser.add_argument("--root", type=Path, help=text)
    if document:
        add_flag(parser, "--json", "print a JSON document instead of text")
    parser.set_defaults(run=handler)
    return parser


def add_flag(parser: argparse.ArgumentParser, name: str, help_text: str) -> None:
    """Add an option without a value."""
    parser.add_argument(name, action="store_true", help=help_text)


def integer(low: int, high: int) -> Callable[[str], int]:
    """Return the type of an argument that is an integer from `low` to `high`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not a whole number between {low} and {high}"
            )
        return value

    return parse


def between(low: int, high: int) -> Callable[[str], float]:
    """Return the type of an argument that is a number between two others."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = low
        if not low < value < high:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number between {low} and {high}")
        return value

    return parse


def new_sweep_file(name: str, out: str | Path | None) -> Path:
    """Return where to write a sweep file: `--out`, else in sweeps/, if it exists, or here."""
    folder = Path("sweeps") if Path("sweeps").is_dir() else Path()
    return Path(out or folder / f"{name}.yaml")


def add_yes_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--yes",
        "-y",
        action="store_true",
        help="do not ask for confirmation",
    )


def add_sweep_argument(
    parser: argparse.ArgumentParser, help_text: str = SWEEP_HELP, nargs: str | None = None
) -> None:
    """Add the sweep alone, for a verb that works on all of it."""
    action = parser.add_argument("sweep", nargs=nargs, help=help_text)
    complete_sweeps(action)


def complete_sweeps(action: argparse.Action) -> None:
    """Let argcomplete offer the names of the submitted sweeps."""

    def names(parsed_args: Args, **_: Any) -> list[str]:
        return root_of(parsed_args).sweeps()

    action.completer = names  # pyright: ignore[reportAttributeAccessIssue]  read by argcomplete


def add_cluster_argument(parser: argparse.ArgumentParser) -> None:
    help_text = (
        "cluster profile: a file or the name of an included one (default: $JEPA_CLUSTER or local)"
    )
    parser.add_argument("--cluster", type=Path, help=help_text)


def add_trials_arguments(
    parser: argparse.ArgumentParser, sweep_help: str = SWEEP_HELP, nargs: str | None = None
) -> None:
    """Add the sweep, and the words that select trials of it."""
    add_sweep_argument(parser, sweep_help, nargs)
    help_text = (
        "trials: model=vit_l state=failed, ts=.15-.2 s0, '!…', index, id prefix (default: all)"
    )
    # Without a default, argparse lists the argument among the required ones.
    parser.add_argument("selection", nargs="*", default=[], help=help_text)


# ---- sweeps and trials


def root_of(args: Args) -> Root:
    """Return the root of the arguments; an archive is unpacked first."""
    from jepa_cluster.trial.directory import Root, default_root

    if not args.root:
        return default_root()
    path = args.root.expanduser().absolute()
    if path.is_file():
        from jepa_cluster.results import archive

        return archive.unpack(path)
    return Root(path)


def sweep_name(args: Args) -> str:
    """Return the name of the sweep that the argument names, directly or by its file."""
    path = Path(args.sweep)
    return path.stem if path.suffix in (".yaml", ".yml") else str(args.sweep)


def select_rows(args: Args, single: str = "") -> list[Row]:
    """Return the selected rows of the sweep's status document.

    single: name of a verb that takes one trial only. Raises LaunchError, ConfigError.
    """
    from jepa_cluster.launch.submit import documents
    from jepa_cluster.sweep.select_trials import select

    name = sweep_name(args)
    rows = select(documents.status_document(root_of(args), name)["trials"], args.selection)
    if single and len(rows) > 1:
        example = f"jepa {single} {name} {rows[0]['index']}"
        raise LaunchError(
            f"{len(rows)} trials match, {single} takes one", hint=f"name it, e.g. {example}"
        )
    return rows


def load_results(root: Root, sweep: str, billed: bool = False) -> SweepResults:
    """Read the results of a sweep, after the ends that only Slurm knows are recorded.

    billed: costs by `sacct -D`, where it answers.
    """
    from jepa_cluster.launch.scheduler import billing
    from jepa_cluster.launch.submit.end_recorder import EndRecorder
    from jepa_cluster.results import tables

    EndRecorder(root).record([sweep])
    seconds = None
    if billed:
        seconds = billing.billed_seconds(root, [row["name"] for row in root.sweep(sweep).planned()])
        if seconds is None:
            text = "sacct does not answer here: cost by our own attempt records"
            print(text, file=sys.stderr)
    return tables.load(root, sweep, seconds)


def select_trials(args: Args) -> list[TrialDir]:
    """Return the trial directory that is named, or the selected trials of the sweep.

    Raises LaunchError, ConfigError, TrialError.
    """
    from jepa_cluster.trial.directory import TrialDir

    trial = TrialDir(Path(args.sweep).absolute())
    if trial.config.exists():
        if args.selection:
            what = f"nothing can be selected in one trial: {' '.join(args.selection)}"
            raise ConfigError(what, where=str(trial.path), hint="leave it out")
        return [trial]
    root = root_of(args)
    looks_like_path = trial.path.exists() or len(Path(args.sweep).parts) > 1
    if looks_like_path and sweep_name(args) not in root.sweeps():
        what = f"{args.sweep} is no trial directory"
        raise TrialError(what, where=str(trial.config), hint="jepa status --json names them")
    return [root.trial(row["name"]) for row in select_rows(args)]


# ---- output


def trial_line(row: Mapping[str, Any], width: int) -> str:
    """Return the label, state and step of a trial. width: of the longest label."""
    label = f"{row['index']:>3} {row['label']:<{width}}"
    return f"{label} {row['state']:<11} {row['step']}/{row['steps']}"


def info(args: Args, line: str) -> None:
    """Print a line that is not part of the document."""
    print(printable(line), file=sys.stderr if args.json else sys.stdout, flush=True)


def print_json(args: Args, document: object) -> bool:
    """Print the document if --json is given, and return whether it is."""
    if args.json:
        # JSON has neither NaN nor infinity: both become null.
        values = json.loads(json.dumps(document), parse_constant=lambda name: None)
        print(json.dumps(values, indent=1))
    return bool(args.json)


def finish(args: Args, document: object, text: str) -> int:
    """Print the document or the text. Returns exit code 0."""
    if not print_json(args, document):
        print(printable(text))
    return 0


def confirm(args: Args, question: str) -> bool:
    """Ask the user, unless --yes is given. Raises LaunchError without a terminal."""
    if args.yes:
        return True
    if not sys.stdin.isatty():
        raise LaunchError(f"not confirmed: {question}", hint="add --yes")
    print(
        printable(f"{question} [y/N] "),
        end="",
        file=sys.stderr if args.json else sys.stdout,
        flush=True,
    )
    return input().strip().lower() in ("y", "yes")

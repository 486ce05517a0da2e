"""What verbs share: how they are declared, how they point at sweeps and trials, and how they answer.

With --json a verb's document is all that stands on stdout; what else there is to say goes to stderr.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jepa_cluster.cli import Verbs, completers
from jepa_cluster.cli.completers import attach
from jepa_cluster.errors import ConfigError, LaunchError, TrialError

if TYPE_CHECKING:
    from jepa_cluster.trial.directory import Root, TrialDir

# ---- what may be said


def verb(verbs: Verbs, name: str, handler: Any, told: str, document: bool = True) -> argparse.ArgumentParser:
    """A verb that works below a root. document: it has one, and so --json."""
    p = verbs.add_parser(name, help=told, description=told.replace("%%", "%"))
    p.add_argument("--root", help="where everything lies (default $JEPA_ROOT, else ./jepa-root)")
    if document:
        ask_json(p)
    p.set_defaults(run=handler)
    return p


def ask_json(p: argparse.ArgumentParser) -> None:
    p.add_argument("--json", action="store_true", help="print the document instead of text")


def ask_sweep(p: argparse.ArgumentParser, told: str, optional: bool = False) -> None:
    attach(p.add_argument("sweep", nargs="?" if optional else None, help=told), completers.sweeps)


def ask_cluster(p: argparse.ArgumentParser) -> None:
    told = "cluster profile: a file, or the name of a shipped one (default $JEPA_CLUSTER, else local)"
    attach(p.add_argument("--cluster", help=told), completers.profiles)


def ask_selection(p: argparse.ArgumentParser) -> None:
    told = "which trials: model=vit_l state=failed, vit_s ts=.15-.2 s0, '!…', index, id prefix (default all)"
    action = p.add_argument("selection", nargs="*", default=[], help=told)  # without a default it counts as required
    attach(action, completers.selections)


# ---- what is meant


def root_of(a: argparse.Namespace) -> Root:
    from jepa_cluster.trial.directory import Root, default_root

    return Root(Path(a.root).absolute()) if a.root else default_root()


def name_of(a: argparse.Namespace) -> str:
    path = Path(a.sweep)
    return path.stem if path.suffix in (".yaml", ".yml") else str(a.sweep)


def selected(a: argparse.Namespace, document: Mapping[str, Any]) -> dict[str, Any]:
    """A document of a sweep with the selected trials only. Raises ConfigError when there is none."""
    from jepa_cluster.sweep.select_trials import select

    return {**document, "trials": select(document["trials"], a.selection)}


def rows_of(a: argparse.Namespace, alone: str = "") -> list[dict[str, Any]]:
    """The rows of the selected trials. alone: the verb that takes one only. Raises LaunchError, ConfigError."""
    from jepa_cluster.launch.submit import documents

    rows = selected(a, documents.status_document(root_of(a), name_of(a)))["trials"]
    if alone and len(rows) > 1:
        here = f"jepa {alone} {name_of(a)} {rows[0]['index']}"
        raise LaunchError(f"{len(rows)} trials match, {alone} takes one", hint=f"name it, e.g. {here}")
    return rows


def trials_of(a: argparse.Namespace, alone: str = "") -> list[TrialDir]:
    """The trial directory that is named, or the selected trials of the sweep. Raises TrialError too."""
    from jepa_cluster.trial.directory import TrialDir

    here = TrialDir(Path(a.sweep).absolute())
    if here.config.exists():
        if a.selection:
            words = " ".join(a.selection)
            raise ConfigError(
                f"nothing can be selected in one trial: {words}", where=str(here.path), hint="leave it out"
            )
        return [here]
    root = root_of(a)
    if name_of(a) not in root.sweeps() and (here.path.exists() or len(Path(a.sweep).parts) > 1):
        raise TrialError(
            f"{a.sweep} is no trial directory", where=str(here.config), hint="jepa status --json names them"
        )
    return [root.trial(row["name"]) for row in rows_of(a, alone)]


# ---- what is answered


def tell(a: argparse.Namespace, line: str) -> None:
    """Something said on the way, which is no part of the document."""
    print(line, file=sys.stderr if a.json else sys.stdout, flush=True)


def print_json(a: argparse.Namespace, document: Any) -> bool:
    if a.json:
        print(json.dumps(_finite(document), indent=1, allow_nan=False))
    return bool(a.json)


def _finite(value: Any) -> Any:
    """The value with null for what JSON cannot say: a number that is none."""
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}  # pyright: ignore[reportUnknownArgumentType]
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]  # pyright: ignore[reportUnknownVariableType]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def finish(a: argparse.Namespace, document: Any, text: str) -> int:
    if not print_json(a, document):
        print(text)
    return 0


def agreed(a: argparse.Namespace, question: str) -> bool:
    if a.yes:
        return True
    if not sys.stdin.isatty():
        raise LaunchError(f"not asked: {question}", hint="add --yes")
    print(f"{question} [y/N] ", end="", file=sys.stderr if a.json else sys.stdout, flush=True)
    return input().strip().lower() in ("y", "yes")

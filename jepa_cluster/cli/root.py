"""The root and the sweep that the arguments of a verb name."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jepa_cluster.trial.directory import Root


def root_of(args: argparse.Namespace) -> Root:
    from jepa_cluster.trial.directory import Root, default_root

    return Root(args.root.expanduser().absolute()) if args.root else default_root()


def sweep_name(args: argparse.Namespace) -> str:
    """Return the name of the sweep that the argument names, directly or by its file."""
    path = Path(args.sweep)
    return path.stem if path.suffix in (".yaml", ".yml") else str(args.sweep)

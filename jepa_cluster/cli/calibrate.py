"""The verb that finds learning rates: calibrate."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from jepa_cluster.cli import Verbs
from jepa_cluster.cli.options import (
    Args,
    add_cluster_argument,
    add_sweep_argument,
    command,
    finish,
    integer,
    load_results,
    root_of,
)
from jepa_cluster.cli.sweeps import SWEEP_OR_FILE
from jepa_cluster.errors import LaunchError, plural
from jepa_cluster.labels import LADDERS
from jepa_cluster.trial.files import write_atomic, write_json

if TYPE_CHECKING:
    from jepa_cluster.sweep.ladder import Cell
    from jepa_cluster.sweep.points import Point, Sweep
    from jepa_cluster.trial.directory import Root

RATES = 6
FACTOR = 2.0
SEEDS = 2
# Cells with a whole ladder are the shortest ones of the smallest sizes; the others get a bracket
SIZES = 3
HORIZONS = 2


def add(verbs: Verbs) -> None:
    parser = command(verbs, calibrate)
    add_sweep_argument(parser, SWEEP_OR_FILE)
    add_cluster_argument(parser)
    parser.add_argument(
        "--rates", type=integer(5, 40), default=RATES, help=f"rates of a ladder (default: {RATES})"
    )
    parser.add_argument(
        "--factor",
        type=float,
        default=FACTOR,
        help=f"between neighbouring rates (default: {FACTOR:g})",
    )
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        help=f"seeds (default: {SEEDS}, those of the sweep first, so that its trials are reused)",
    )
    parser.add_argument(
        "--sizes",
        type=integer(3, 100),
        default=SIZES,
        help="sizes that get whole ladders, the smallest ones; what is larger or longer gets three "
        f"rates around the law of these (default: {SIZES})",
    )
    parser.add_argument(
        "--horizons",
        type=integer(1, 100),
        default=HORIZONS,
        help=f"horizons of each of them, the shortest ones (default: {HORIZONS})",
    )
    parser.add_argument("--metric", help="error that chooses (default: that of the class probe)")
    parser.add_argument("--out", type=Path, help="sweep file (default: sweeps/<sweep>_lr.yaml)")


def calibrate(args: Args) -> int:
    """Find the best learning rate of each size and horizon of a sweep.

    The first call writes a sweep over rates. Later calls read its results, add the trials that are
    missing, and write the rates for `optim.lr: calibrated`.
    """
    from jepa_cluster.launch.cluster.profile import load_profile
    from jepa_cluster.launch.submit import documents
    from jepa_cluster.report import calibration
    from jepa_cluster.sweep import ladder, sweep_file
    from jepa_cluster.sweep.resolve import resolve

    root = root_of(args)
    source = ladder.without_rate(documents.find_sweep(root, args.sweep))
    profile = load_profile(args.cluster)
    cells = ladder.cells_of(resolve(source, profile.default_request, profile.runtime))
    name = f"{source.name}{LADDERS}"
    folder = Path("sweeps") if Path("sweeps").is_dir() else Path()
    path = args.out or folder / f"{name}.yaml"
    if path.stem != name:
        raise LaunchError(f"'{path}' is not called {name}.yaml", where="--out")
    if not root.sweep(name).read_plan():
        if path.exists():
            hint = f"jepa submit {path}; or remove it"
            raise LaunchError(f"{name} was not submitted yet", where=str(path), hint=hint)
        chosen = _smallest(cells, args.sizes, args.horizons)
        points = ladder.ladder_points(chosen, args.rates, args.factor)
        seeds = args.seeds or ladder.first_seeds(source, SEEDS)
        made = ladder.ladder_sweep(source, points, seeds)
        write_atomic(path, sweep_file.to_yaml(made))
        text = f"written: {path}, {_ladders(chosen, cells)}"
        return finish(args, {"file": str(path), "points": points}, f"{text}\n{_next(path, source)}")
    results = calibration.calibrate(load_results(root, name), args.metric)
    added = _add_points(root, name, path, calibration.missing_points(results, cells))
    lines = results.lines()
    if added:
        lines += [f"{plural(added, 'point')} added: {path}", _next(path, source)]
    file = root.sweep(name).calibration
    write_json(file, dict(results.document))
    lines += [
        f"written: {file}",
        f"in a sweep file: optim.lr=calibrated, calibration: {{sweep: {name}}}",
    ]
    return finish(args, {**results.document, "added": added, "file": str(file)}, "\n".join(lines))


def _smallest(cells: list[Cell], sizes: int, horizons: int) -> list[Cell]:
    """Return the shortest cells of the smallest sizes. cells: by size, then by horizon."""
    by_size: dict[float, list[Cell]] = {}
    for cell in cells:
        by_size.setdefault(cell.parameters, []).append(cell)
    chosen: list[Cell] = []
    for size in sorted(by_size)[:sizes]:
        steps = sorted({cell.steps for cell in by_size[size]})[:horizons]
        chosen += [cell for cell in by_size[size] if cell.steps in steps]
    return chosen


def _ladders(chosen: list[Cell], cells: list[Cell]) -> str:
    sizes = {cell.parameters for cell in chosen}
    text = f"a ladder of {plural(len(chosen), 'cell')} of {plural(len(sizes), 'size')}"
    if len(chosen) < len(cells):
        text += f"; {plural(len(cells) - len(chosen), 'more cell')} when their law is known"
    return text


def _next(path: Path, source: Sweep) -> str:
    return f"next: jepa submit {path}; when it is done: jepa calibrate {source.name}"


def _add_points(root: Root, name: str, path: Path, points: list[Point]) -> int:
    """Append points to the sweep file, but for those that it has; return their number."""
    from jepa_cluster.sweep import sweep_file

    made = replace(sweep_file.load(root.sweep(name).sweep_file), name=name)
    new = [point for point in points if point not in made.list]
    if new:
        write_atomic(path, sweep_file.to_yaml(replace(made, list=(*made.list, *new))))
    return len(new)

"""The verb that finds learning rates: calibrate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from jepa_cluster.cli import Verbs
from jepa_cluster.cli.options import (
    Args,
    add_cluster_argument,
    add_sweep_argument,
    between,
    command,
    finish,
    integer,
    load_results,
    new_sweep_file,
    root_of,
)
from jepa_cluster.cli.sweeps import SWEEP_OR_FILE
from jepa_cluster.errors import LaunchError, plural, suggest
from jepa_cluster.labels import LADDERS
from jepa_cluster.schema import to_dict
from jepa_cluster.trial.files import write_atomic

if TYPE_CHECKING:
    from collections.abc import Collection

    from jepa_cluster.config import Recipe
    from jepa_cluster.sweep.ladder import Cell
    from jepa_cluster.sweep.points import Point, Sweep
    from jepa_cluster.trial.directory import Root

# Options of the first call. Whole ladders are those of the shortest cells of the smallest sizes
RATES = 6
FACTOR = 2.0
SEEDS = 2
SIZES = 3
HORIZONS = 2
FIRST_CALL = ("rates", "factor", "seeds", "sizes", "horizons", "per")


def add(verbs: Verbs) -> None:
    parser = command(verbs, calibrate)
    add_sweep_argument(parser, SWEEP_OR_FILE)
    add_cluster_argument(parser)
    rates = f"rates of a ladder (default: {RATES})"
    parser.add_argument("--rates", type=integer(5, 40), help=rates)
    parser.add_argument(
        "--factor",
        type=between(1, 100),
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
        help="sizes that get whole ladders, the smallest ones; what is larger or longer gets three "
        f"rates around the law of these (default: {SIZES})",
    )
    parser.add_argument(
        "--horizons",
        type=integer(1, 100),
        help=f"horizons of each of them, the shortest ones (default: {HORIZONS})",
    )
    parser.add_argument(
        "--per",
        nargs="+",
        metavar="SETTING",
        help="settings whose levels each get ladders, such as mask.mode (default: one level)",
    )
    parser.add_argument("--metric", help="error that chooses (default: that of the class probe)")
    parser.add_argument("--out", type=Path, help="sweep file (default: sweeps/<sweep>_lr.yaml)")


def calibrate(args: Args) -> int:
    """Write a sweep over learning rates; later read the best rate of each size and horizon.

    Later calls also add the trials that are missing. `optim.lr: calibrated` uses the rates.
    """
    from jepa_cluster.launch.cluster.profile import load_profile
    from jepa_cluster.launch.submit import documents
    from jepa_cluster.sweep import ladder, sweep_file
    from jepa_cluster.sweep.resolve import resolve

    root = root_of(args)
    asked = documents.find_sweep(root, args.sweep)
    if asked.name.endswith(LADDERS):
        what = f"{asked.name} is a sweep over rates itself"
        raise LaunchError(what, hint=f"jepa calibrate {asked.name.removesuffix(LADDERS)}")
    name = f"{asked.name}{LADDERS}"
    path = new_sweep_file(name, args.out)
    if path.stem != name:
        raise LaunchError(f"'{path}' is not called {name}.yaml", where="--out")
    made = None
    if root.sweep(name).read_plan():
        given = [f"--{option}" for option in FIRST_CALL if getattr(args, option) is not None]
        if given:
            what = f"{name} is submitted, and {', '.join(given)} would not change it"
            raise LaunchError(what, hint=f"add points or seeds to {path}")
        made = sweep_file.load(path if path.exists() else root.sweep(name).sweep_file)
    per = made.ladder_per if made else args.per or ()
    axes = [axis for axis in asked.axes if axis != ladder.RATE]
    for setting in per:
        if setting not in axes:
            what = f"{setting} is not swept by {asked.name}, or is the rate itself"
            where = made.source.location("ladder_per") if made else "--per"
            raise LaunchError(what, where=where, hint=suggest(setting, axes))
    source = ladder.without_rate(asked, per)
    profile = load_profile(args.cluster)
    trials = resolve(source, profile.default_request, profile.runtime)
    _check_conditions(asked, [trial.config.recipe for trial in trials], per)
    cells = ladder.cells_of(trials, per)
    if made:
        return _read_ladders(args, root, made, path, cells)
    levels = [text for text in source.base if text.partition("=")[0] in asked.axes]
    return _write_ladders(args, source, path, cells, levels)


def _check_conditions(sweep: Sweep, recipes: list[Recipe], per: Collection[str]) -> None:
    """Raise LaunchError for cells that differ in a setting under which a calibration holds."""
    from jepa_cluster.sweep.calibrated import conditions_of

    first, *others = [conditions_of(recipe, per) for recipe in recipes]
    for name, value in first.items():
        for other in others:
            if other[name] != value:
                what = f"{sweep.name} has {name}={value} and {other[name]}, and each needs ladders"
                raise LaunchError(what, hint=f"--per with the axis that sets {name}")


def _write_ladders(
    args: Args, source: Sweep, path: Path, cells: list[Cell], levels: list[str]
) -> int:
    """Write the sweep over rates. levels: of the settings that are no part of a cell."""
    from jepa_cluster.sweep import ladder, sweep_file

    if path.exists():
        hint = f"jepa submit {path}; or write another one with --out FOLDER/{path.name}"
        raise LaunchError(f"{path.stem} was not submitted yet", where=str(path), hint=hint)
    if source.ladder_per and (args.sizes or args.horizons):
        what = "--per gives each size and horizon a ladder, because it fits no law"
        raise LaunchError(what, hint="leave out --sizes and --horizons")
    chosen = cells
    if not source.ladder_per:
        chosen = _smallest(cells, args.sizes or SIZES, args.horizons or HORIZONS)
    points = ladder.ladder_points(chosen, args.rates or RATES, args.factor or FACTOR)
    seeds = args.seeds or ladder.first_seeds(source, SEEDS)
    if len(set(seeds)) < len(seeds):
        raise LaunchError(f"--seeds lists one twice: {seeds}")
    write_atomic(path, sweep_file.to_yaml(ladder.ladder_sweep(source, points, seeds)))
    known = {cell.parameters for cell in chosen}
    written = f"a ladder of {plural(len(chosen), 'cell')} of {plural(len(known), 'size')}"
    if len(chosen) < len(cells):
        written += f"; {plural(len(cells) - len(chosen), 'more cell')} when their law is known"
    lines = [f"written: {path}, {written}"]
    if levels:
        lines += [f"first level of other settings: {', '.join(levels)}"]
        lines += ["to choose another level, edit base of this file before you submit it"]
    lines += [_next(args, path)]
    return finish(args, {"file": str(path), "points": points}, "\n".join(lines))


def _read_ladders(args: Args, root: Root, made: Sweep, path: Path, cells: list[Cell]) -> int:
    """Write the rates that are known, and add the trials that are missing.

    made: the sweep over rates, with points that may not be submitted yet.
    """
    from jepa_cluster.report import calibration

    name = made.name
    results = calibration.calibrate(load_results(root, name), made.ladder_per, args.metric)
    lines = results.lines()
    points = calibration.missing_points(results, cells, made)
    if points:
        _add_points(Path(made.source.file), path, points)
        lines += [f"{plural(len(points), 'point')} added: {path}"]
    file = root.sweep(name).calibration
    results.document.write(file)
    lines += [f"written: {file}"]
    if results.is_usable:
        lines += [f"in a sweep file: optim.lr=calibrated, calibration: {{sweep: {name}}}"]
    is_submitted = len(list(made.points())) <= len(root.sweep(name).planned())
    if points or not (is_submitted and results.is_over):
        lines += [_next(args, path)]
    document = {**to_dict(results.document), "added": points, "file": str(file)}
    return finish(args, document, "\n".join(lines))


def _add_points(before: Path, path: Path, points: list[Point]) -> None:
    """Write a sweep file with more points below `list`. The rest of its text stays."""
    head, found, tail = before.read_text().partition("\nlist:\n")
    if not found:
        what = "this sweep over rates has no list to which points could be added"
        raise LaunchError(what, where=str(before), hint="let `jepa calibrate` write the file")
    lines = [f"- {json.dumps(point)}\n" for point in points]
    write_atomic(path, f"{head}{found}{''.join(lines)}{tail}")


def _smallest(cells: list[Cell], sizes: int, horizons: int) -> list[Cell]:
    """Return the shortest cells of the smallest sizes. cells: by size, then by horizon."""
    steps_of: dict[float, set[int]] = {}
    chosen: list[Cell] = []
    for cell in cells:
        steps = steps_of.setdefault(cell.parameters, set())
        steps.add(cell.steps)
        if len(steps_of) <= sizes and len(steps) <= horizons:
            chosen.append(cell)
    return chosen


def _next(args: Args, path: Path) -> str:
    out = f" --out {path}" if args.out else ""
    return f"next: jepa submit {path}; when it is done: jepa calibrate {args.sweep}{out}"

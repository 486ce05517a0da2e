"""Claims of a sweep file: trials that are expected to have a lower error than others.

The margin that counts is part of the claim, so that it can be fixed before there are results.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import fields
from operator import attrgetter
from typing import Any

from jepa_cluster.config import Recipe
from jepa_cluster.errors import plural, suggest
from jepa_cluster.labels import ONLINE, SECOND_READOUT, format_value
from jepa_cluster.schema import build_dataclass, settings_of
from jepa_cluster.sweep.points import Claim, Point, Sweep
from jepa_cluster.sweep.yaml_source import YamlSource

MODEL = "model"
KEYS = list(map(attrgetter("name"), fields(Claim)))
SIDES = ("lower", "than")
READOUTS = ("", ONLINE, SECOND_READOUT)
EXAMPLE = (
    "- {claim: multi-block beats random, metric: probe/class_error, "
    "lower: {mask.mode: multiblock}, than: {mask.mode: random}, by: 0.02}"
)


def read(src: YamlSource) -> tuple[Claim, ...]:
    """Return the claims below `claims`. Raises SweepFileError."""
    values = src.values.get("claims") or []
    what = f"claims wants a list, got {values!r}"
    src.require(isinstance(values, list), what, "claims", EXAMPLE)
    claims: list[Claim] = []
    for i, value in enumerate(values):
        path = f"claims[{i}]"
        src.require(isinstance(value, dict), f"{path} is {value!r}, no mapping", path, EXAMPLE)
        src.reject_unknown_keys(value, KEYS, path)
        for key in KEYS:
            src.require(value.get(key) not in (None, "", {}), f"{path} has no {key}", path, EXAMPLE)
        with src.errors_at(path):
            claim = build_dataclass(Claim, value, path)
        what = f"{path}.by wants a number in [0, 1), got {claim.by!r}"
        src.require(0 <= claim.by < 1, what, f"{path}.by", "0.02")
        claims.append(claim)
    return tuple(claims)


def check(sweep: Sweep, trials: Sequence[tuple[Point, Recipe]]) -> None:
    """Each side has trials, none of them on both sides, and the metric is one that they measure.

    Raises SweepFileError.
    """
    require = sweep.source.require
    values = list(itertools.starmap(values_of, trials))
    for i, claim in enumerate(sweep.claims):
        path = f"claims[{i}]"
        metrics = _metrics(trials[0][1].probe.labels)
        what = f"{path}.metric is {claim.metric}, which no probe measures"
        require(claim.metric in metrics, what, f"{path}.metric", suggest(claim.metric, metrics))
        on_both = set(range(len(trials)))
        for side in SIDES:
            levels = getattr(claim, side)
            numbers = {n for n, found in enumerate(values) if is_of(levels, found)}
            on_both &= numbers
            what = f"{path}.{side}: no trial has {describe(levels)}"
            require(numbers, what, f"{path}.{side}", f"swept: {', '.join(sweep.axes)}")
        what = f"{path}: {plural(len(on_both), 'trial')} on both sides"
        require(not on_both, what, path, "name levels that differ")


def _metrics(labels: Sequence[str]) -> list[str]:
    """Return the errors that probes measure."""
    names = ["knn", *labels, *map("{}_1pct".format, labels)]
    return list(itertools.starmap("probe/{}{}_error".format, itertools.product(READOUTS, names)))


def values_of(point: Mapping[str, Any], recipe: Recipe) -> dict[str, Any]:
    """Return the settings of a trial, and the presets that its point names."""
    return {**dict(settings_of(recipe)), **point, MODEL: recipe.model.name}


def is_of(side: Mapping[str, Any], values: Mapping[str, Any]) -> bool:
    """Whether a trial has all levels of a side. values: of `values_of`."""
    return all(format_value(values.get(axis)) == format_value(side[axis]) for axis in side)


def describe(side: Mapping[str, Any]) -> str:
    return ", ".join(f"{axis}={format_value(level)}" for axis, level in side.items())

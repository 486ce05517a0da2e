"""Claims of a sweep file: trials that are expected to have a lower error than others.

The margin that counts is part of the claim, so that it is fixed before there are results.
"""

from __future__ import annotations

from typing import Any

from jepa_cluster.errors import suggest
from jepa_cluster.labels import format_value
from jepa_cluster.schema import build_dataclass
from jepa_cluster.sweep.points import Claim, Sweep
from jepa_cluster.sweep.yaml_source import YamlSource

EXAMPLE = (
    "claims: [{claim: ..., metric: probe/class_error, lower: {mask.mode: multiblock}, "
    "than: {mask.mode: random}, by: 0.02}]"
)


def read(src: YamlSource, values: list[Any]) -> tuple[Claim, ...]:
    """Return the claims below `claims`. Raises SweepFileError."""
    claims: list[Claim] = []
    for i, value in enumerate(values):
        path = f"claims[{i}]"
        src.require(isinstance(value, dict), f"claims wants mappings, got {value!r}", path, EXAMPLE)
        with src.errors_at(path):
            claim = build_dataclass(Claim, value, path)
        what = f"{path}.metric wants the error of a probe, got {claim.metric!r}"
        is_error = claim.metric.startswith("probe/") and claim.metric.endswith("_error")
        src.require(is_error, what, f"{path}.metric", "probe/class_error")
        what = f"{path}.by wants a number in [0, 1), got {claim.by!r}"
        src.require(0 <= claim.by < 1, what, f"{path}.by", "0.02")
        claims.append(claim)
    return tuple(claims)


def check(sweep: Sweep) -> None:
    """Each side of a claim names swept settings and levels that run. Raises SweepFileError."""
    for i, claim in enumerate(sweep.claims):
        for side in ("lower", "than"):
            for axis, level in getattr(claim, side).items():
                path = f"claims[{i}].{side}.{axis}"
                what = f"a claim names '{axis}', which is no swept setting"
                sweep.source.require(axis in sweep.axes, what, path, suggest(axis, sweep.axes))
                levels = list(map(format_value, sweep.values_of(axis)))
                if axis == "model":  # results have the name
                    levels += map(format_value, sweep.values_of("model.name"))
                what = f"a claim names {axis}={format_value(level)}, which does not run"
                sweep.source.require(format_value(level) in levels, what, path, ", ".join(levels))

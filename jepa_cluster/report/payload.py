"""Everything a page of a sweep shows, as one JSON document: `scaling.json`, on the parent run and inside the page.

In: a sweep from `results.tables`. Out: plain values. The browser draws; every fit, interval, frontier and mask it
draws was computed here, so that terminal, pages and MLflow tell the same numbers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jepa_cluster.config import Recipe
from jepa_cluster.ijepa import masks
from jepa_cluster.report import analysis, comparisons, power_law
from jepa_cluster.results import tables

COMPUTES = ("flops_total", "flops_encoder", "images_seen", "gpu_hours_alone")
POINTS = 40_000  # curve points in a document, shared by its trials
PICTURES = 4  # masks shown for a setting


def document(sweep: tables.Sweep, error: str | None = None) -> dict[str, Any]:
    """The whole document of a sweep. error: the metric shown first."""
    first = analysis.study(sweep, error)
    known = {k for r in first.finals for k in r if k.endswith("_error") and not k.startswith("initial/")}
    errors = [first.error, *sorted(known - {first.error})]
    return {
        "version": 1,
        "sweep": sweep.name,
        "read": sweep.read,
        "question": sweep.question,
        "expect": str(sweep.plan.get("expect") or ""),
        "axes": sweep.axes,
        "settings": first.settings,
        "error": first.error,
        "trials": [{**r, "setting": analysis.setting(r, first.settings)} for r in first.finals],
        "laws": {
            f"{y}|{x}": _findings(first if (y, x) == (first.error, first.compute) else analysis.study(sweep, y, x))
            for y in errors
            for x in COMPUTES
            if any(analysis.usable(r, y, x) for r in first.finals)
        },
        "predicted": sweep.predicted,
        "masks": mask_pictures(sweep, first.settings),
    }


def with_curves(sweep: tables.Sweep, doc: Mapping[str, Any]) -> dict[str, Any]:
    """The document and the curves themselves, thinned: for a page that stands alone."""
    keep = max(20, POINTS // max(len(sweep.curves), 1))
    wanted = {k.split("|")[0] for k in doc["laws"]} | {
        *COMPUTES,
        "loss",
        "val/loss",
        "val/reference_loss",
        "probe/rankme",
    }
    out: dict[str, Any] = {}
    for curve in sweep.curves:
        rows = curve.history.settled_rows
        rows = [r for r in rows if "loss" not in r.values or len(r.values) > 12] if len(rows) > 4 * keep else rows
        thin = rows[:: max(1, len(rows) // keep)]
        out[curve.name] = [{"step": r.step, **{k: v for k, v in r.values.items() if k in wanted}} for r in thin]
    return {**doc, "curves": out}


def dumps(doc: Mapping[str, Any]) -> str:
    """JSON a browser reads: numbers that are none become null."""

    def clean(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(k): clean(v) for k, v in value.items()}  # pyright: ignore[reportUnknownArgumentType]
        if isinstance(value, (list, tuple, np.ndarray)):
            return [clean(v) for v in value]  # pyright: ignore[reportUnknownVariableType]
        if isinstance(value, (float, np.floating)):
            return float(f"{float(value):.6g}") if math.isfinite(value) else None
        return value

    return json.dumps(clean(doc), separators=(",", ":"), allow_nan=False)


def _findings(s: analysis.Study) -> dict[str, Any]:
    fits = {"frontier": s.law, **(s.by_setting if len(s.by_setting) > 1 else {}), **s.by_size}
    return {
        "frontier": [r["trial"] for r in s.frontier],
        "summary": analysis.summary(s),
        "fits": [{"name": name, "text": str(law), **_drawn(law)} for name, law in fits.items()],
        **({} if isinstance(s.iso_flop, power_law.NotEnoughData) else _sizes(s.iso_flop)),
    }


def _drawn(law: power_law.PowerLawFit | power_law.NotEnoughData) -> dict[str, Any]:
    """The law and its band, a little beyond the data that `span` bounds; nothing of one that is in doubt."""
    if isinstance(law, power_law.NotEnoughData) or law.unreliable_because:
        return {}
    first, last = law.span
    c = np.unique(np.concatenate([np.geomspace(first / 1.5, first, 5), np.geomspace(first, last, 30),
                                  np.geomspace(last, last * 3, 8)]))  # fmt: skip
    low, high = law.band(c)
    return {"c": c, "e": law.predict(c), "low": low, "high": high, "span": law.span}


def _sizes(frontier: comparisons.Frontier) -> dict[str, Any]:
    """Parabolas, and how the best size grows where that is known."""
    out: dict[str, Any] = {"iso": [_iso(b) for b in frontier.budgets]}
    if isinstance(frontier.power, power_law.NotEnoughData):
        return out
    c = np.geomspace(frontier.budgets[0].compute, frontier.budgets[-1].compute, 20)
    return out | {"growth": {"c": c, "n": frontier.optimum(c), "text": f"N_opt ~ C^{frontier.power}"}}


def _iso(budget: comparisons.IsoFlop) -> dict[str, Any]:
    n = np.geomspace(budget.parameters.min() / 1.2, budget.parameters.max() * 1.2, 30)
    curve = np.polyval(budget.parabola, np.log10(n))
    return {"compute": budget.compute, "n": budget.parameters, "e": budget.errors, "optimum": budget.optimum,
            "curve_n": n, "curve_e": curve}  # fmt: skip


def mask_pictures(sweep: tables.Sweep, settings: Sequence[str]) -> dict[str, Any]:
    """By setting: the grid's side and, for a few samples, one letter a patch (c context, t target, . neither)."""
    out: dict[str, Any] = {}
    for curve in sweep.curves:
        key = analysis.setting(tables.identity(sweep, curve), settings)
        if key not in out and curve.recipe:
            out[key] = {"grid": curve.recipe.model.grid, "samples": letters(curve.recipe)}
    return out


def letters(recipe: Recipe) -> list[str]:
    """PICTURES strings of grid² letters, drawn with the recipe's own seed for the first images of epoch 0."""
    index = np.arange(PICTURES, dtype=np.int64)
    drawn = masks.sample(recipe.mask, recipe.model.grid, recipe.seed, index * 0, index, index * 0, index)
    cells = np.full((PICTURES, recipe.model.grid**2), ".")
    for i in range(PICTURES):  # padding repeats real patches, so it does no harm
        cells[i, np.asarray(drawn.context)[i].ravel()] = "c"
        cells[i, np.asarray(drawn.targets)[i].ravel()] = "t"
    return ["".join(row) for row in cells]

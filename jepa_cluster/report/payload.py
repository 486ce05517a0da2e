"""The JSON document of a sweep's page: `scaling.json`, on the parent run and inside the page.

In: `SweepResults`. Out: plain values. The browser draws. Every fit, interval, frontier and mask
that it draws was computed here, so that terminal, pages and MLflow show the same numbers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence, Set
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np

from jepa_cluster import labels
from jepa_cluster.config import Recipe
from jepa_cluster.ijepa import mask_preview
from jepa_cluster.report import analysis, answers, figure_numbers, findings, power_law
from jepa_cluster.report.analysis import Analysis
from jepa_cluster.report.answers import Answer
from jepa_cluster.report.comparisons import IsoFlopCurve, OptimalSize
from jepa_cluster.report.figure_numbers import HeatMap
from jepa_cluster.report.power_law import Fit, NotEnoughData
from jepa_cluster.report.size_law import SizeLaw
from jepa_cluster.results import tables
from jepa_cluster.results.effects import Effects, Levels
from jepa_cluster.results.mixed_model import Index
from jepa_cluster.results.tables import SweepResults
from jepa_cluster.trial.spool import History, Row

Payload = dict[str, Any]  # JSON: its keys are metrics, trials and settings

VERSION = 2  # of the document: a page reads no findings of another one
CURVE_METRICS = (
    *analysis.COMPUTES,
    "loss",
    "val/loss",
    "val/reference_loss",
    "probe/rankme",
)
MAX_CURVE_POINTS = 40_000  # in a document, shared by its trials
MIN_CURVE_POINTS = 20  # per trial
PROBED_ROW = 12  # values; a row with more holds results of a probe
MASK_SAMPLES = 4  # masks shown for a setting


def build(
    sweep: SweepResults,
    error: str | None = None,
) -> Payload:
    """Return the document of a sweep. error: the metric shown first."""
    first = analysis.analyse(sweep, error)
    return {
        "version": VERSION,
        "sweep": sweep.name,
        "read": sweep.read,
        "question": sweep.question,
        "expect": sweep.plan["expect"],
        "axes": sweep.axes,
        "unit": sweep.unit,
        "cost": sweep.cost,
        "words": axis_words(sweep),
        "fixed": tables.fixed_settings(sweep),
        "levels": _level_numbers(sweep),
        "error": first.error,
        "effects": _effects(first),
        **_of_effects(first),
        "trials": _trials(first),
        "laws": _laws(first),
        "predicted": sweep.predicted,
        "masks": mask_samples(sweep),
    }


def _trials(first: Analysis) -> list[Payload]:
    """Return the rows of the trials, with their index and resource class as `jepa status` has."""
    rows: list[Payload] = []
    for index, row in enumerate(first.trials):
        planned = first.sweep.plan["trials"][index]
        rows.append({**row, "index": index, "class": planned["class"]})
    return rows


def axis_words(sweep: SweepResults) -> Payload:
    """Return the label of each value, by axis and value."""
    words: Payload = {}
    for result in sweep.trials:
        for axis, value in result.point.items():
            text = labels.format_value(value)
            words.setdefault(axis, {})[text] = labels.axis_word(axis, text, result.point)
    return words


def _level_numbers(sweep: SweepResults) -> Payload:
    """Return the numbers of each value, by axis and value."""
    numbers: Payload = {}
    for axis, values in axis_words(sweep).items():
        numbers[axis] = {text: labels.numbers_of(text) for text in values}
    return numbers


def _laws(first: Analysis) -> Payload:
    """Return findings for each pair of an error and a compute metric that a trial has."""
    laws: Payload = {}
    for error in _errors(first):
        for compute in analysis.COMPUTES:
            found = replace(first, error=error, compute=compute)
            if found.finished or (error, compute) == (first.error, first.compute):
                laws[f"{error}|{compute}"] = _findings(found)
    return laws


def _errors(first: Analysis) -> list[str]:
    """Return the metric shown first, and the errors of the target encoder."""
    errors = [first.error]
    for error in analysis.shown_metrics(first.trials):
        if error != first.error and error.count("/") == 1:
            errors.append(error)  # noqa: PERF401
    return errors


def add_curves(
    sweep: SweepResults,
    document: Payload,
) -> Payload:
    """Return the document with thinned training curves, for a page without a server."""
    points = max(MIN_CURVE_POINTS, MAX_CURVE_POINTS // max(len(sweep.trials), 1))
    errors = [pair.split("|")[0] for pair in document["laws"]]
    metrics = {*errors, *CURVE_METRICS}
    curves: dict[str, list[Payload]] = {}
    for result in sweep.trials:
        rows = _thinned(result.history, points)
        curves[result.name] = [_curve_point(row, metrics) for row in rows]
    return {**document, "curves": curves}


def _curve_point(
    row: Row,
    metrics: Set[str],
) -> Payload:
    point: Payload = {"step": row.step}
    for key, value in row.values.items():
        if key in metrics or key.startswith(("loss/", "gain/")):
            point[key] = value
    return point


def _thinned(
    history: History,
    points: int,
) -> Sequence[Row]:
    """Return every n-th settled row; of very many, only those of probes."""
    rows = history.settled_rows
    if len(rows) > 4 * points:
        rows = [row for row in rows if "loss" not in row.values or len(row.values) > PROBED_ROW]
    return rows[:: max(1, len(rows) // points)]


def to_json(document: Payload) -> str:
    """Write JSON for a browser: six digits, null for nan and infinity."""
    exact = json.dumps(document, default=np.ndarray.tolist)
    values = json.loads(exact, parse_float=_six_digits, parse_constant=lambda name: None)
    return json.dumps(values, separators=(",", ":"))


def _six_digits(number: str) -> float:
    return labels.rounded(float(number))


# ---- findings


def _findings(s: Analysis) -> Payload:
    sentences = {"summary": findings.summary(s), "evidence": findings.evidence(s)}
    if not s.is_comparable:
        return {**sentences, "fits": []}
    fits = {"frontier": s.law}
    fits |= {**s.by_setting, **s.by_size}
    found: Payload = {
        "frontier": dict(zip("ce", s.frontier_line, strict=True)),
        "headline": findings.headline(s),
        **sentences,
        "fits": [_fit(name, law) for name, law in fits.items()],
    }
    if isinstance(s.iso_flop, OptimalSize):
        found["iso"] = list(map(_iso_flop_curve, s.iso_flop.budgets))
        found |= _growth(s.iso_flop)
    if isinstance(s.size_law, SizeLaw):
        found["size_law"] = _size_law(s.size_law)
    return found


def _effects(first: Analysis) -> Payload:
    """Return for each error what each setting does to it, axes of masks first."""
    found: Payload = {}
    for error, s, e in _compared(first):
        by_axis = {answer.axis: answer for answer in s.answers}
        axes = figure_numbers.ordered_axes(e)
        found[error] = [_axis_effect(e, axis, by_axis[axis.axis]) for axis in axes]
    return found


def _compared(first: Analysis) -> Iterator[tuple[str, Analysis, Effects]]:
    """Yield each error of which settings are compared."""
    for error in _errors(first):
        s = replace(first, error=error)
        if isinstance(s.effects, Effects) and s.effects.axes:
            yield error, s, s.effects


def _of_effects(first: Analysis) -> Payload:
    """Return for each error the importance of axes, heat maps, reach of whiskers, and notes."""
    importance: Payload = {}
    heat: Payload = {}
    for error, s, e in _compared(first):
        importance[error] = []
        for name, bar in figure_numbers.importance(e, s.answers).items():
            importance[error].append({"name": name, **asdict(bar)})
        heat[error] = list(map(partial(_heat_map, e), figure_numbers.heat_maps(e)))
    reach: Payload = {}
    notes: Payload = {}
    for error in _errors(first):
        e = replace(first, error=error).effects
        if isinstance(e, Effects):
            reach[error] = figure_numbers.seed_reach(e)
            notes[error] = [*answers.notes(e), *findings.expectations(replace(first, error=error))]
    return {"importance": importance, "heat": heat, "reach": reach, "notes": notes}


def _heat_map(
    e: Effects,
    found: HeatMap,
) -> Payload:
    return {**asdict(found), "model": None if found.size is None else _size(e, found.size)}


def _size(
    e: Effects,
    number: int,
) -> Payload:
    """Return the label of a size, and what its trials have."""
    parameters, name = e.sizes[number]
    return {"label": e.models[number], "name": name, "parameters": parameters}


def _axis_effect(
    e: Effects,
    axis: Levels,
    answer: Answer,
) -> Payload:
    """The error of each model at each level over the mean of its levels, and of each trial."""
    models: list[Payload] = []
    for number, best in enumerate(answer.best):
        order = figure_numbers.level_order(axis)
        ran = order[axis.has_trials[number][order]]
        draws = axis.of_model[:, number, ran]
        low, high = power_law.quantiles(draws)
        shown: Payload = {
            **_size(e, number),
            "levels": [axis.names[level] for level in ran],
            "x": None if axis.numbers is None else axis.numbers[ran],
            "fractions": _fractions(e, axis, number, ran),
            "value": np.exp(np.median(draws, 0)),
            "low": np.exp(low),
            "high": np.exp(high),
            "compute": np.exp(axis.log_compute[number, ran]),  # at equal steps, over their mean
            "best": best.text,
            "optimum": best.optimum and asdict(best.optimum),
        }
        models.append(shown)
    trials = dict(zip(tables.column(e.rows, "trial"), e.relative(axis), strict=True))
    return {
        "axis": axis.axis,
        "models": models,
        "relative": trials,
        "log": bool(axis.is_log),
        "at_equal": answer.at_equal,
        "moves_text": answers.moves(e, answer),
        "effect_text": answers.effect(answer),
        "moves": answer.moves,
        "shift": answer.shift and asdict(answer.shift),
        "effect": asdict(answer.effect),
    }


def _fractions(
    e: Effects,
    axis: Levels,
    number: int,
    ran: Index,
) -> Payload:
    """Return the mean of each realised fraction by level, where all trials have it."""
    mine = e.model_of_block[e.block_of_row] == number
    found: Payload = {}
    for metric in analysis.MASK_FRACTIONS:
        cells = tables.column(e.rows, metric)
        if axis.axis.startswith("mask.") and len(cells) == len(e.rows):
            total = np.bincount(axis.of_row[mine], np.array(cells, float)[mine])
            count = np.bincount(axis.of_row[mine])
            found[metric] = total[ran] / count[ran]
    return found


def _fit(
    name: str,
    law: Fit,
) -> Payload:
    """A law and its band, a little beyond its data; only the text where it is unreliable."""
    drawn: Payload = {"name": name, "text": str(law)}
    if isinstance(law, NotEnoughData):
        return drawn
    drawn["parameters"] = {key: asdict(interval) for key, interval in law.parameters.items()}
    if law.unreliable_because:
        return drawn
    first, last = law.span
    inside = np.geomspace(first, last, 30)
    before = np.geomspace(first / 1.5, first, 5)
    after = np.geomspace(last, last * 3, 8)
    c = np.unique(np.concatenate([before, inside, after]))
    low, high = law.band(c)
    return {
        **drawn,
        "c": c,
        "e": law.predict(c),
        "low": low,
        "high": high,
        "span": law.span,
    }


def _growth(sizes: OptimalSize) -> Payload:
    """How the best size grows with compute; nothing where that is unknown."""
    if isinstance(sizes.exponent, NotEnoughData):
        return {}
    c = np.geomspace(sizes.budgets[0].compute, sizes.budgets[-1].compute, 20)
    text = f"N_opt ~ C^{sizes.exponent}"
    return {"growth": {"c": c, "n": sizes.at(c), "text": text}}


def _size_law(law: SizeLaw) -> Payload:
    """How the best size grows with compute by E(N, D), with alpha and beta."""
    c = np.geomspace(*law.span, 20)
    exponents = {"exponent": law.exponent, **law.surface.exponents}
    numbers = {name: asdict(interval) for name, interval in exponents.items()}
    return {**numbers, "c": c, "n": law.at(c), "text": f"N_opt ~ C^{law.exponent} by E(N, D)"}


def _iso_flop_curve(curve: IsoFlopCurve) -> Payload:
    """A budget's trials and, where it bends upwards, its parabola."""
    n = np.geomspace(curve.parameters.min() / 1.2, curve.parameters.max() * 1.2, 30)
    if curve.parabola[0] <= 0:
        n = n[:0]
    return {
        "compute": curve.compute,
        "n": curve.parameters,
        "e": curve.errors,
        "optimum": curve.optimum,
        "curve_n": n,
        "curve_e": np.polyval(curve.parabola, np.log10(n)),
    }


# ---- masks


def mask_samples(sweep: SweepResults) -> Payload:
    """Return, by setting, the side of the grid and a few masks of one letter per patch."""
    samples: Payload = {}
    for result in sweep.trials:
        setting = labels.setting_label(result.point)
        if setting not in samples and result.recipe:
            grid = result.recipe.model.grid
            samples[setting] = {
                "grid": grid,
                "samples": mask_letters(result.recipe),
            }
    return samples


def mask_letters(recipe: Recipe) -> list[str]:
    """Return masks of the first images of epoch 0: c context, t target, . neither."""
    shown = mask_preview.preview(recipe.mask, recipe.model.grid, recipe.seed, MASK_SAMPLES)
    cells = np.select([shown.target_count > 0, shown.is_context], ["t", "c"], ".")
    return ["".join(sample.flatten()) for sample in cells]

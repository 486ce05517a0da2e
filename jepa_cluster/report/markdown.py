"""`jepa report`: a sweep's question and its answer as a Markdown page with figure and numbers.

In: an analysis and a folder. Out: `<sweep>.md`, `<sweep>.png` and `<sweep>.csv` there. The section
of conclusions is the user's to write. It is kept when the page is made again.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from jepa_cluster.report import analysis, figure, html
from jepa_cluster.report.analysis import Analysis
from jepa_cluster.results import tables
from jepa_cluster.results.tables import Rows, column
from jepa_cluster.trial.files import write_atomic

CONCLUSION = "## What we learned"
PROMPT = "*Nobody has written this down yet.*"
MAX_TRIAL_LINES = 24  # trials up to which each has its own line
MAX_ERROR_COLUMNS = 8  # sizes and horizons up to which each has its own column


def write(s: Analysis, folder: Path) -> Path:
    """Write the three files and return the page's path. The user's conclusions are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    name = s.sweep.name
    path = folder / f"{name}.md"
    figure.draw(s, folder / f"{name}.png")
    write_atomic(folder / f"{name}.csv", tables.to_csv(s.trials))
    write_atomic(path, render(s, read_conclusion(path)))
    return path


def read_conclusion(path: Path) -> str:
    """Return what the user wrote below CONCLUSION, else PROMPT."""
    if not path.exists():
        return PROMPT
    return path.read_text().partition(CONCLUSION)[2].strip() or PROMPT


def render(s: Analysis, conclusion: str) -> str:
    """Return the page."""
    sweep = s.sweep
    hours = sum(column(s.trials, "gpu_hours"))
    attempts = sum(column(s.trials, "attempts"))
    axes = ", ".join(f"`{axis}`" for axis in sweep.axes)
    parts = [
        f"# {sweep.question or sweep.name}",
        f"Expected: {sweep.plan.get('expect') or 'nothing was written down.'}",
        f"Sweep `{sweep.name}`, axes {axes}, code `{sweep.plan.get('code', '')}`; "
        f"{len(s.trials)} trials, {attempts} attempts, {hours:.3g} {sweep.unit}.",
        f"![error over compute, and by what the masks realised]({sweep.name}.png)",
        "## Findings",
        "\n".join(f"- {line}" for line in analysis.summary(s)),
    ]
    if len(s.groups) > 1:
        parts.append(f"## Settings ({s.error}: mean of the seeds, lowest to highest)")
        parts.append(_settings_table(s))
    if len(s.trials) <= MAX_TRIAL_LINES:
        parts.append(f"## Trials ({s.error}: `random` before, `trained` after training)")
        cells = [html.trial_cells(s, row) for row in s.trials]
        parts.append(table(html.trial_columns(s), cells))
    parts.append(f"All trials and numbers: [{sweep.name}.csv]({sweep.name}.csv).")
    parts += [CONCLUSION, conclusion]
    return "\n\n".join(parts) + "\n"


def _settings_table(s: Analysis) -> str:
    """Return one line per setting, best first.

    Columns: relative error, error by size and horizon, fractions that the masks realised.
    """
    blocks = sorted({(row["parameters"], row["model"], row["steps"]) for row in s.finished})
    if len(blocks) > MAX_ERROR_COLUMNS:
        blocks = []
    several_horizons = len({steps for _, _, steps in blocks}) > 1
    fractions = [metric for metric in analysis.MASK_FRACTIONS if column(s.finished, metric)]
    head = ["setting", "relative"]
    for _, model, steps in blocks:
        head.append(f"{model} {steps}" if several_horizons else str(model))
    head += [*fractions, "trials"]

    groups = analysis.group_by(figure.relative_errors(s), "setting")
    lines: list[list[str]] = []
    for name, rows in sorted(groups.items(), key=lambda item: _relative_error(item[1])):
        line = [name, f"{_relative_error(rows):.3f}"]
        for _, model, steps in blocks:
            block = [row for row in rows if (row["model"], row["steps"]) == (model, steps)]
            line.append(_mean_and_range(block, s.error))
        line += [f"{analysis.mean_of(rows, metric):.3f}" for metric in fractions]
        lines.append([*line, str(len(rows))])

    before: list[str] = []
    for _, model, _ in blocks:
        of_model = [row for row in s.trials if row["model"] == model]
        before.append(_mean_and_range(of_model, f"initial/{s.error}"))
    if any(cell != "–" for cell in before):
        empty = [""] * (len(fractions) + 1)
        lines.append(["*before training*", "", *before, *empty])
    return table(head, lines)


def _relative_error(rows: Rows) -> float:
    return analysis.mean_of(rows, figure.RELATIVE)


def _mean_and_range(rows: Rows, metric: str) -> str:
    """Return '0.412 (0.409–0.415)'; '–' without values."""
    values = column(rows, metric)
    if not values:
        return "–"
    mean = f"{np.mean(values):.3f}"
    if len(values) == 1:
        return mean
    return f"{mean} ({min(values):.3f}–{max(values):.3f})"


def table(head: list[str], lines: list[list[str]]) -> str:
    """Return a Markdown table."""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)

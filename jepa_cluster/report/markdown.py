"""`jepa report`: a sweep's question and its answer as a Markdown page with figure and numbers.

In: an analysis and a folder. Out: `<sweep>.md`, `<sweep>.png` and `<sweep>.csv` there. The section
of conclusions is the user's to write. It is kept when the page is made again.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path

import numpy as np

from jepa_cluster.labels import FITTED, format_number
from jepa_cluster.labels import markdown as escape
from jepa_cluster.report import analysis, figure, findings, html, points
from jepa_cluster.report.analysis import Analysis
from jepa_cluster.report.claims import repeat_command
from jepa_cluster.results import table_files, tables
from jepa_cluster.results.effects import Effects
from jepa_cluster.results.tables import Row, Rows, column
from jepa_cluster.trial.files import write_atomic

CONCLUSION = "## What we learned"
PROMPT = "*Nobody has written this down yet.*"
RELATIVE = "relative_error"
MAX_TRIAL_LINES = 24  # trials up to which each has its own line
MAX_ERROR_COLUMNS = 8  # sizes and horizons up to which each has its own column


def write(
    s: Analysis,
    folder: Path,
) -> Path:
    """Write the three files and return the page's path. The user's conclusions are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    name = s.sweep.name
    path = folder / f"{name}.md"
    figure.draw(s, folder / f"{name}.png")
    write_atomic(folder / f"{name}.csv", table_files.to_csv(s.trials))
    write_atomic(path, render(s, read_conclusion(path)))
    return path


def read_conclusion(path: Path) -> str:
    """Return what the user wrote below CONCLUSION, else PROMPT."""
    if not path.exists():
        return PROMPT
    return path.read_text().partition(CONCLUSION)[2].strip() or PROMPT


def render(
    s: Analysis,
    conclusion: str,
) -> str:
    """Return the page."""
    sweep = s.sweep
    cost = format_number(sweep.cost, FITTED)
    attempts = sum(column(s.trials, "attempts"))
    axes = ", ".join(f"`{axis}`" for axis in sweep.axes)
    parts = [
        f"# {escape(sweep.question or sweep.name)}",
        f"Expected: {escape(sweep.plan['expect'] or 'nothing was written down.')}",
        f"Sweep `{sweep.name}`, axes {axes}, code `{sweep.plan['code']}`; "
        f"{len(s.trials)} trials, {attempts} attempts, {cost} {sweep.unit} in all.",
        f"![error over compute, and effects of the settings]({sweep.name}.png)",
        "## Findings",
        "\n".join(f"- {escape(line)}" for line in findings.summary(s)),
    ]
    if sweep.plan["claims"]:
        parts.append("## Commands that repeat the trials of a claim")
        parts.append("\n".join(_commands(s)))
    if len(s.groups) > 1 and s.is_comparable:
        parts.append(f"## Settings ({s.error}: mean of the seeds, lowest to highest)")
        parts.append(_settings_table(s))
    if len(s.trials) <= MAX_TRIAL_LINES:
        parts.append(f"## Trials ({s.error}: `random` before, `trained` after training)")
        lines = [html.trial_cells(s, row) for row in s.trials]
        parts.append(table(lines[0], map(dict[str, str].values, lines)))
    parts.append(f"All trials and numbers: [{sweep.name}.csv]({sweep.name}.csv).")
    parts += [CONCLUSION, conclusion]
    return "\n\n".join(parts) + "\n"


def _commands(s: Analysis) -> list[str]:
    lines: list[str] = []
    for claim in s.sweep.plan["claims"]:
        command = repeat_command(s.sweep.name, claim)
        lines.append(f"- {escape(claim['claim'])}: `{command}`")
    return lines


def _settings_table(s: Analysis) -> str:
    """Return one line per setting, best first.

    Columns: relative error, error by size and horizon, fractions that the masks realised.
    """
    by_size = sorted(s.finished, key=lambda row: (*tables.size_of(row), row["steps"]))
    several_horizons = len(set(column(by_size, "steps"))) > 1
    size = ("size", "steps") if several_horizons else ("size",)
    blocks = list(points.group_by(by_size, *size))
    if len(blocks) > MAX_ERROR_COLUMNS:
        blocks = []
    fractions = [metric for metric in analysis.MASK_FRACTIONS if column(s.finished, metric)]
    groups = points.group_by(_relative_errors(s), "setting")

    def errors(
        rows: Rows,
        metric: str,
    ) -> list[str]:
        by_block = points.group_by(rows, *size)
        return [_mean_and_range(by_block.get(block, []), metric) for block in blocks]

    lines: list[list[str]] = []
    for name, rows in sorted(groups.items(), key=lambda item: _relative_error(item[1])):
        masks = [format_number(points.mean_of(rows, metric)) for metric in fractions]
        relative = format_number(_relative_error(rows))
        lines.append([name, relative, *errors(rows, s.error), *masks, str(len(rows))])
    initial = f"initial/{s.error}"
    if blocks and column(s.trials, initial):
        empty = [""] * len(fractions)
        lines.append(["*before training*", "", *errors(s.trials, initial), *empty, ""])
    return table(["setting", "relative", *blocks, *fractions, "trials"], lines)


def _relative_error(rows: Rows) -> float:
    return points.mean_of(rows, RELATIVE)


def _mean_and_range(
    rows: Rows,
    metric: str,
) -> str:
    """Return '0.4121 (0.4093–0.415)'; '–' without values."""
    values = column(rows, metric)
    if not values:
        return "–"
    mean = format_number(float(np.mean(values)))
    if len(values) == 1:
        return mean
    return f"{mean} ({format_number(min(values))}–{format_number(max(values))})"


def table(
    head: Collection[str],
    lines: Iterable[Iterable[str]],
) -> str:
    """Return a Markdown table."""
    text: list[str] = []
    for row in (head, ["---"] * len(head), *lines):
        cells = [cell.replace("|", r"\|") for cell in row]
        text.append(f"| {' | '.join(cells)} |")
    return "\n".join(text)


def _relative_errors(s: Analysis) -> list[Row]:
    """Return finished rows with a column RELATIVE.

    It is the error over that of the size and horizon at the mean of all settings, by the model of
    all trials: which settings are missing there does not matter.
    """
    rows: list[Row] = []
    if isinstance(s.effects, Effects):
        for row, relative in zip(s.effects.rows, s.effects.relative().tolist(), strict=True):
            rows.append({**row, RELATIVE: relative})
    return rows

"""`jepa report`: a sweep's question and its answer as a Markdown page with its figure and numbers.

In: a sweep and a folder. Out: `<sweep>.md`, `<sweep>.png` and `<sweep>.csv` there. What was learned
is a person's to write: that section is kept when the page is made again.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from jepa_cluster.report import analysis, figure, html
from jepa_cluster.results import tables
from jepa_cluster.trial.layout import write_atomic

LEARNED = "## What we learned"
MANY = 24  # trials up to which each has its own line
BLOCKS = 8  # sizes and horizons that have a column of their own
PROMPT = "*Nobody has written this down yet.*"


def write(sweep: tables.Sweep, s: analysis.Study, folder: Path) -> Path:
    """The three files -> the page's path. Written words below LEARNED survive."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{sweep.name}.md"
    figure.draw(s, folder / f"{sweep.name}.png")
    write_atomic(folder / f"{sweep.name}.csv", tables.to_csv(s.finals))
    write_atomic(path, text(s, learned(path)))
    return path


def learned(path: Path) -> str:
    """What a person wrote below the heading, or the invitation to."""
    kept = path.read_text().partition(LEARNED)[2].strip() if path.exists() else ""
    return kept or PROMPT


def text(s: analysis.Study, words: str) -> str:
    """The page. Axes without trials, fits without data: each says so in its own line."""
    sweep = s.sweep
    hours = sum(float(r["gpu_hours"]) for r in s.finals)
    attempts = sum(int(r["attempts"]) for r in s.finals)
    parts = [
        f"# {sweep.question or sweep.name}",
        f"Expected: {sweep.plan.get('expect') or 'nothing was written down.'}",
        f"Sweep `{sweep.name}`, axes {', '.join(f'`{a}`' for a in sweep.axes)}, code `{sweep.plan.get('code', '')}`; "
        f"{len(s.finals)} trials, {attempts} attempts, {hours:.3g} {sweep.unit}.",
        f"![error over compute, and by what the masks realised]({sweep.name}.png)",
        "## Findings",
        "\n".join(f"- {line}" for line in analysis.summary(s)),
    ]
    if len(analysis.group(s.finished, s.settings)) > 1:
        parts += [f"## Settings ({s.error}: mean of the seeds, lowest to highest)", markdown(*by_setting(s))]
    if len(s.finals) <= MANY:
        trials = markdown(html.columns(s), [html.cells(s, r) for r in s.finals])
        parts += [f"## Trials ({s.error}: `random` before, `trained` after training)", trials]
    parts += [f"All trials and numbers: [{sweep.name}.csv]({sweep.name}.csv).", LEARNED, words]
    return "\n\n".join(parts) + "\n"


def by_setting(s: analysis.Study) -> tuple[list[str], list[list[str]]]:
    """Heads and cells: a line a setting, best first; a column a size and horizon, then what the masks realised."""
    told = figure.relative(s)
    blocks = sorted({(r["parameters"], r["model"], r["steps"]) for r in s.finished})
    horizons = len({b[2] for b in blocks}) > 1
    shown = blocks if len(blocks) <= BLOCKS else []
    realised = [m for m in analysis.REALISED if any(m in r for r in s.finished)]
    head = ["setting", "relative", *(f"{m} {n}" if horizons else str(m) for _, m, n in shown), *realised, "trials"]
    groups = analysis.group(s.finished, s.settings)
    scores = {g: float(np.mean([told[r["trial"]] for r in rows])) for g, rows in groups.items()}
    lines: list[list[str]] = []
    for name in sorted(groups, key=lambda g: scores[g]):
        rows = groups[name]
        cells = [spread([r[s.error] for r in rows if (r["model"], r["steps"]) == (m, n)]) for _, m, n in shown]
        means = [f"{np.mean([r[m] for r in rows if m in r]):.3f}" for m in realised]
        lines.append([name, f"{scores[name]:.3f}", *cells, *means, str(len(rows))])
    before = f"initial/{s.error}"
    start = [spread([r[before] for r in s.finals if r["model"] == m and before in r]) for _, m, _ in shown]
    if any(cell != "–" for cell in start):
        lines.append(["*before training*", "", *start, *("" for _ in realised), ""])
    return head, lines


def spread(values: list[float]) -> str:
    """'0.412 (0.409–0.415)'."""
    if not values:
        return "–"
    return f"{np.mean(values):.3f}" + (f" ({min(values):.3f}–{max(values):.3f})" if len(values) > 1 else "")


def markdown(head: list[str], lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *lines))

"""`jepa report`: a sweep's question and its answer as a Markdown page with its figure and numbers.

In: a sweep and a folder (docs/results). Out: `<sweep>.md`, `<sweep>.png` and `<sweep>.csv` there. What was learned
is a person's to write: that section is kept when the page is made again.
"""

from __future__ import annotations

from pathlib import Path

from jepa_cluster.report import page, scaling
from jepa_cluster.tracking import curves
from jepa_cluster.trial.layout import write_atomic

LEARNED = "## What we learned"
PROMPT = "*Nobody has written this down yet.*"


def write(sweep: curves.Sweep, s: scaling.Study, folder: Path) -> Path:
    """The three files -> the page's path. Written words below LEARNED survive."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{sweep.name}.md"
    page.picture(s, folder / f"{sweep.name}.png")
    write_atomic(folder / f"{sweep.name}.csv", curves.to_csv(s.finals))
    write_atomic(path, text(s, learned(path)))
    return path


def learned(path: Path) -> str:
    """What a person wrote below the heading, or the invitation to."""
    kept = path.read_text().partition(LEARNED)[2].strip() if path.exists() else ""
    return kept or PROMPT


def text(s: scaling.Study, words: str) -> str:
    """The page. Axes without trials, fits without data: each says so in its own line."""
    sweep = s.sweep
    hours = sum(float(r["gpu_hours"]) for r in s.finals)
    attempts = sum(int(r["attempts"]) for r in s.finals)
    head = page.columns(s)
    table = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    table += ["| " + " | ".join(page.cells(s, r)) + " |" for r in s.finals]
    return "\n".join(
        [
            f"# {sweep.question or sweep.name}",
            "",
            f"Expected: {sweep.plan.get('expect') or 'nothing was written down.'}",
            "",
            f"Sweep `{sweep.name}`, axes {', '.join(f'`{a}`' for a in sweep.axes)}, "
            f"code `{sweep.plan.get('code', '')}`; "
            f"{len(s.finals)} trials, {attempts} attempts, {hours:.3g} process-hours.",
            "",
            f"![probe and loss against compute]({sweep.name}.png)",
            "",
            "## Findings",
            "",
            *(f"- {line}" for line in scaling.summary(s)),
            "",
            f"## Trials ({s.error}: `random` before, `trained` after training)",
            "",
            *table,
            "",
            f"All numbers: [{sweep.name}.csv]({sweep.name}.csv).",
            "",
            LEARNED,
            "",
            words,
            "",
        ]
    )

"""Plan and status for the terminal.

In: the plain documents that `--json` prints. Out: text; colours on a terminal only.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from jepa_cluster.errors import plural

Document = Mapping[str, Any]
COLOURS = {
    "running": "green", "done": "blue", "failed": "red", "unknown": "magenta", "stopped": "yellow",
    "interrupted": "yellow", "cooling": "cyan",
}  # fmt: skip
MANY = 200  # lines of a table, above which some are left out
CAUTION = "bold yellow"


def console() -> Console:
    """Plain, wide text into a pipe; rich on a terminal."""
    return Console() if sys.stdout.isatty() else Console(width=160, no_color=True, highlight=False)


def plan(d: Document) -> RenderableType:
    """The proposal: classes with their price, then one line of totals."""
    counts = ", ".join(f"{n} {what}" for what, n in d["actions"].items() if n)
    head = Text(f"{d['sweep']}   ", style="bold") + Text(f'"{d["question"]}"   ', style="italic") + Text("")
    table = _table("class", ">trials", "nodes×procs", ">limit", ">h/trial", f">{d['unit']}", "basis")
    for c in d["classes"]:
        table.add_row(
            f"{c['class']} {' '.join(c['models'])}",
            str(c["trials"]),
            f"{c['nodes']}×{c['procs_per_node']}",
            duration(c["minutes"] * 60),
            around(c["hours"], c["spread"]),
            around(c["gpu_hours"], c["gpu_spread"]),
            c["basis"],
        )
    arrays = plural(d["arrays"], "array")
    words = [total(d), arrays if d["kind"] == "slurm" else "local queue"]
    words += ["earliest start " + ", ".join(f"{c} {when(t)}" for c, t in d["starts"].items())] if d["starts"] else []
    head_, _, changed = d["code"].partition("+")
    words += [f"code {head_}" + (f" + {changed} changed file{'s' if changed != '1' else ''}" if changed else "")]
    words += [f"{len(d['trials'])}/{len(d['trials'])} configs valid"]
    lines: list[RenderableType] = [
        head + Text(f"{plural(len(d['trials']), 'trial')}: {counts}"),
        table,
        Text(" · ".join(words)),
    ]
    if d.get("problem"):
        lines.append(Text(f"! {d['problem']}: states marked unknown may have changed", style=CAUTION))
    if d.get("dropped"):
        lines.append(Text(f"! {len(d['dropped'])} active trials are no longer asked for: jepa cancel", style=CAUTION))
    return Group(*lines)


def total(d: Document) -> str:
    """Return the sum that the limit is compared with: spent, in progress, and to start."""
    every = d["gpu_hours"] + d["in_progress_cost"] + d["spent"]
    parts = {"to start": d["gpu_hours"], "in progress": d["in_progress_cost"], "spent": d["spent"]}
    split = ""
    if d["in_progress_cost"] or d["spent"]:
        split = ", ".join(f"{number(n)} {what}" for what, n in parts.items() if n)
    if not d["limit"]:
        return f"{number(every)} {d['unit']}" + (f" ({split})" if split else "")
    share = f"{every / d['limit']:.0%}" if every <= d["limit"] else "over the limit: submit will refuse"
    return f"{number(every)} of {number(d['limit'])} {d['unit']} ({share}{'; ' if split else ''}{split})"


def when(start: str) -> str:
    """Shorten Slurm's '2026-03-01T03:40:00': 'now', '~03:40', '~Mon 03:40', '~1 Mar'."""
    then = time.mktime(time.strptime(start, "%Y-%m-%dT%H:%M:%S"))
    ahead = (then - time.time()) / 3600
    form = "~%H:%M" if ahead < 12 else "~%a %H:%M" if ahead < 144 else "~%d %b"
    return "now" if ahead < 0.05 else time.strftime(form, time.localtime(then))


def points(d: Document) -> RenderableType:
    """Every trial of a plan with what would happen to it."""
    table = _table(">#", "trial", "class", "state", "action", ">h", "id", "branch of")
    for t in d["trials"]:
        table.add_row(
            str(t["index"]), t["label"], t["class"], state(t["state"]), t["action"], number(t["hours"]), t["id"],
            "" if t["trunk"] is None else f"#{t['trunk']} at step {t['begins']}",
        )  # fmt: skip
    return table


def status(d: Document, live: bool = False) -> RenderableType:
    """One line a trial, then counts and cost. Of very many trials, only those that are not simply waiting or done."""
    rows, quiet = list(d["trials"]), ("new", "queued", "done")
    shown = rows if len(rows) <= MANY else [t for t in rows if t["state"] not in quiet]
    table = _table(">#", "trial", "class", "state", "step", ">loss", ">probe error", ">attempts", "note")
    for t in shown[:MANY]:
        table.add_row(
            str(t["index"]),
            t["label"],
            t["class"],
            state(t["state"]),
            _progress(t, live),
            _value(t["loss"]),
            _value(t["probe"]),
            str(t["attempts"]),
            Text(" ".join(w for w in (t["job"], t["note"]) if w), overflow="ellipsis", no_wrap=True),
        )
    counts = " · ".join(f"{n} {s}" for s, n in d["counts"].items() if n)
    used = f"{number(d['gpu_hours'])} {d['unit']} used{' by sacct' if d['cost_by'] == 'sacct' else ''}"
    words = f"{counts} · {used}, about {number(d['remaining'])} to go"
    words += f" and {number(d['stopped_cost'])} in stopped trials" if d["stopped_cost"] else ""
    words += f", of {number(d['limit'])}" if d["limit"] else ""
    lines: list[RenderableType] = [Text(d["sweep"], style="bold"), table, Text(words)]
    lines += [canary(c) for c in d["canaries"]]
    if len(rows) > MANY:
        lines.append(
            Text(f"not listed: {plural(len(rows) - len(shown[:MANY]), 'trial')}; select some, e.g. state=queued")
        )
    if d.get("problem"):
        lines.append(Text(f"! {d['problem']}: trials marked unknown may have changed", style=CAUTION))
    return Group(*lines)


def canary(c: Document) -> Text:
    """One line: the state of a class's canary, and what it measured."""
    line = Text(f"canary {c['class']} ({c['about']}) ") + state(c["state"])
    if c["measured_hours"]:
        measured, planned = (duration(hours * 3600) for hours in (c["measured_hours"], c["hours"]))
        line += Text(f": {measured} per trial, planned were {planned}")
    elif c["state"] in ("running", "queued", "cooling"):
        line += Text(f" at step {c['step']} of {c['steps']}, {c['holds']} wait for it")
    elif c["holds"]:
        line += Text(f": {c['holds']} wait for it, see jepa why")
    return line


def overview(sweeps: Sequence[Document]) -> RenderableType:
    """One line a sweep."""
    table = _table("sweep", "question", ">trials", "states", ">used")
    for d in sweeps:
        counts = " · ".join(f"{n} {s}" for s, n in d["counts"].items() if n)
        used = f"{number(d['gpu_hours'])} {d['unit']}"
        table.add_row(d["sweep"], d["question"], str(len(d["trials"])), counts, used)
    return table


def why(d: Document) -> RenderableType:
    """One trial: cause, evidence, tries, last log lines, next command."""
    head = Text(f"{d['index']} {d['label']}  ".lstrip(), style="bold") + state(d["state"])
    facts = Table.grid(padding=(0, 2))
    for key in ("cause", "means", "evidence", "rule", "hint"):
        if d[key]:
            facts.add_row(f"  {key}", Text(str(d[key])))
    lines: list[RenderableType] = [head, facts]
    if d["tries"]:
        table = _table(">  attempt", "job", "host", ">steps", ">minutes", "ended")
        for t in d["tries"]:
            took = "" if t["minutes"] is None else number(t["minutes"])
            steps = f"{t['start_step'] or 0}–{'' if t['end_step'] is None else t['end_step']}"
            table.add_row(
                str(t["attempt"]), str(t["job"] or ""), str(t["host"] or ""), steps, took, str(t["cause"] or "open")
            )
        lines.append(table)
    lines += [Text(f"  | {line}", style="dim") for line in d["log"]]
    return Group(*lines, Text(""))


def alike(documents: Sequence[Document], sweep: str) -> list[Document]:
    """Merge trials with the same diagnosis into one document, in the place of the first of them."""
    groups: dict[tuple[str, ...], list[Document]] = {}
    for d in documents:
        groups.setdefault(tuple(str(d[key]) for key in ("state", "cause", "means", "evidence", "rule")), []).append(d)
    found: list[Document] = []
    for first, *more in groups.values():
        numbers = " ".join(str(d["index"]) for d in (first, *more))
        hint = first["hint"].replace(f"{sweep} {first['index']}", f"{sweep} {numbers}")
        merged = {"index": f"{1 + len(more)} trials:", "label": numbers, "hint": hint, "tries": []} if more else {}
        found.append({**first, **merged})
    return found


def checks(found: Sequence[Document]) -> RenderableType:
    """What the doctor saw."""
    table = _table("", "check", "found", "what to do")
    for c in found:
        mark = Text("ok", style="green") if c["ok"] else Text("NO", style="bold red")
        table.add_row(mark, c["what"], Text(c["found"]), Text(c["hint"]))
    return table


def nodes(ledger: Mapping[str, Document], bad: float) -> RenderableType:
    """What each node did to us."""
    table = _table("node", ">attempts", ">score", ">pulse", "faults", "")
    for host, n in ledger.items():
        faults = ", ".join(sorted({f["cause"] for f in n["faults"]}))
        pulse = f"{n['slow']:.2f}×" if n["slow"] else ""
        note = "left out by submit" if n["score"] >= bad else ""
        table.add_row(host, str(n["attempts"]), number(n["score"]), pulse, faults, note)
    return table


def changes(before: Document | None, now: Document) -> list[str]:
    """Return log lines: one for each trial whose state or tenth of its steps changed."""
    old = {t["name"]: t for t in before["trials"]} if before else {}
    lines: list[str] = []
    width = max((len(t["label"]) for t in now["trials"]), default=0)
    for t in now["trials"]:
        b = old.get(t["name"])
        if b is None or b["state"] != t["state"] or (_tenth(b) != _tenth(t)):
            loss = f"  loss {t['loss']:.4f}" if t["loss"] is not None else ""
            note = f"  {t['note']}" if t["note"] else ""
            head = f"{time.strftime('%H:%M:%S')}  {t['index']:>3} {t['label']:<{width}}"
            lines.append(f"{head} {t['state']:<11} {t['step']}/{t['steps']}{loss}{note}")
    return lines


def state(word: str) -> Text:
    return Text(word, style=COLOURS.get(word, ""))


def number(value: float) -> str:
    """Three figures: <0.001, 0.0042, 6.1, 7 603."""
    if value >= 1000:
        return f"{value:,.0f}".replace(",", " ")
    if 0 < value < 0.001:
        return "<0.001"
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def around(value: float, spread: float) -> str:
    """'1.2 ±0.3'; a bar finer than we print is not shown."""
    return f"{number(value)} ±{number(spread)}" if spread >= 0.001 else number(value)


def duration(seconds: float) -> str:
    """'45s', '12m', '8h', '1d12h'."""
    if seconds < 90:
        return f"{seconds:.0f}s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes}m"
    hours, rest = divmod(minutes, 60)
    if hours < 48:
        return f"{hours}h{rest:02d}" if rest else f"{hours}h"
    return f"{hours // 24}d{hours % 24}h" if hours % 24 else f"{hours // 24}d"


def _progress(t: Document, live: bool) -> RenderableType:
    text = f"{t['step']}/{t['steps']}"
    if not live:
        return text
    grid = Table.grid(padding=(0, 1))
    grid.add_row(ProgressBar(total=max(t["steps"], 1), completed=t["step"], width=16), text)
    return grid


def _tenth(t: Document) -> int:
    return 10 * t["step"] // max(t["steps"], 1)


def _value(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in columns:
        table.add_column(name.lstrip(">"), justify="right" if name.startswith(">") else "left", overflow="fold")
    return table

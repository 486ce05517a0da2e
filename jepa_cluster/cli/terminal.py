"""Tables for the terminal.

In: the documents that `--json` prints. Out: text, with colours on a terminal only. What users wrote
is printed as it is: neither rich's markup nor control sequences in it have an effect.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from jepa_cluster.cli.console import console, duration, size
from jepa_cluster.cli.options import trial_line
from jepa_cluster.cli.table import one_line_table, plain_table
from jepa_cluster.errors import plural
from jepa_cluster.labels import FITTED, format_number
from jepa_cluster.trial.provenance import mixed_code

Document = Mapping[str, Any]
COLOURS = {
    "running": "green",
    "done": "blue",
    "failed": "red",
    "unknown": "magenta",
    "stopped": "yellow",
    "interrupted": "yellow",
    "requeued": "cyan",
}
MAX_ROWS = 200
STATUS = (
    ">#", "trial", "class", "state", "step", ">loss", ">probe error", ">attempts", "note"
)  # fmt: skip
STATUS_OPTIONAL = ("class", ">attempts", ">loss")  # left out in a narrow terminal, in this order
WARNING = "bold yellow"
EXPLANATION = ("cause", "means", "evidence", "rule", "hint")


def show(text: RenderableType) -> None:
    console().print(text)


def live() -> Live:
    return Live(console=console(), auto_refresh=False)


# ---- plan


def plan(d: Document) -> RenderableType:
    """Return the resource classes with their cost, and the totals."""
    trials = len(d["trials"])
    head = Text.assemble(
        (f"{d['sweep']}   ", "bold"),
        (f'"{d["question"]}"   ', "italic"),
        f"{plural(trials, 'trial')}: {_counts(d['actions'], ', ')}",
    )
    cost = f">{d['unit']}"
    table = plain_table("class", ">trials", "nodes×procs", ">limit", ">h/trial", cost, "basis")
    for each in d["classes"]:
        table.add_row(
            f"{each['class']} {' '.join(each['models'])}",
            str(each["trials"]),
            f"{each['nodes']}×{each['procs_per_node']}",
            duration(each["minutes"] * 60),
            around(each["hours"], each["spread"]),
            around(each["gpu_hours"], each["gpu_spread"]),
            each["basis"],
        )
    facts = [total(d), plural(d["arrays"], "array") if d["kind"] == "slurm" else "local queue"]
    if d["starts"]:
        starts = [f"{name} {start_time(start)}" for name, start in d["starts"].items()]
        facts.append(f"earliest start {', '.join(starts)}")
    facts += [_code(d["code"]), f"{trials}/{trials} configs valid", _checkpoints(d)]
    lines: list[RenderableType] = [head, table, *map(_data, d["data"]), Text(" · ".join(facts))]
    return Group(*lines, *map(_warning, _plan_warnings(d)))


def _data(d: Document) -> Text:
    images = f"{d['train']:,} train + {d['val']:,} val images".replace(",", " ")
    labels = ", ".join(d["labels"]) or "none"
    if d["classes"]:
        labels += f" ({plural(d['classes'], 'class')})"
    probed = ", ".join(d["probes"]) or "without labels"
    text = f"data {d['root']}: {images}, labels {labels}, digest {d['digest']}; probes: {probed}"
    return Text(text)


def _checkpoints(d: Document) -> str:
    count = plural(sum(each["kept"] for each in d["classes"]), "checkpoint")
    largest, kept, free = (size(d[key]) for key in ("checkpoint_bytes", "kept_bytes", "free_bytes"))
    text = f"at most {count} kept, {kept}, of up to {largest} each; {free} free"
    if d["quota_bytes"] is not None:
        text += f", quota leaves {size(d['quota_bytes'])}"
    unmeasured = [each for each in d["classes"] if not each["save_seconds"]]
    if unmeasured and d["kind"] == "slurm":
        classes = ", ".join(each["class"] for each in unmeasured)
        text += f"; no save of class {classes} was measured, {unmeasured[0]['grace']}"
    return text


def _plan_warnings(d: Document) -> Iterator[str]:
    """Say what the user may want to change before a submit."""
    for each in d["classes"]:
        name = f"class {each['class']}"
        if each["save_seconds"] > each["grace_seconds"]:
            text = f"{name}: a save took {each['save_seconds']:g} s, {each['grace']}:"
            yield f"{text} unsaved work is lost; lower runtime.checkpoint_minutes"
        ranks = each["nodes"] * each["procs_per_node"]
        if each["lanes"] and each["lanes"] % ranks:
            blocks = plural(each["lanes"], "block")
            text = f"{name}: {ranks} ranks read {blocks} of images in turn, so share"
            yield f"{text} them: raise data.shuffle_window, lower data.shuffle_block"
    for data in d["data"]:
        if data["classes"] == 1 and "class" in data["probes"]:
            text = "there is one class, so its probe has nothing to learn: probe.labels=[]"
            yield f"data {data['root']}: {text}"
    if d["problem"]:
        yield f"{d['problem']}: states marked unknown may have changed"
    if d["dropped"]:
        yield f"{len(d['dropped'])} active trials are no longer in the sweep file: jepa cancel"


def total(d: Document) -> str:
    """Return the cost that is compared with the limit: spent, in progress and to start."""
    parts = {"to start": d["gpu_hours"], "in progress": d["in_progress_cost"], "spent": d["spent"]}
    cost = sum(parts.values())
    notes: list[str] = []
    text = number(cost)
    if d["limit"]:
        text += f" of {number(d['limit'])}"
        is_over = cost > d["limit"]
        share = f"{cost / d['limit']:.0%}"
        notes.append("over the limit: submit will refuse" if is_over else share)
    if cost > d["gpu_hours"]:
        notes += [f"{number(hours)} {name}" for name, hours in parts.items() if hours]
    text += f" {d['unit']}"
    if notes:
        text += f" ({'; '.join(notes)})"
    took, planned = d["finished"]["took"], d["finished"]["planned"]
    if took and planned:
        text += (
            f" · finished trials took {number(took)} {d['unit']}, planned were {number(planned)}"
        )
    return text


def _code(code: str) -> str:
    commit, _, changed = code.partition("+")
    if not changed:
        return f"code {commit}"
    return f"code {commit} + {plural(int(changed), 'changed file')}"


def start_time(start: str) -> str:
    """Shorten Slurm's '2026-03-01T03:40:00' to '03-01 03:40'; 'now' within three minutes."""
    soon = time.localtime(time.time() + 180)
    if start <= time.strftime("%Y-%m-%dT%H:%M:%S", soon):
        return "now"
    return start[5:16].replace("T", " ")


def plan_points(d: Document) -> RenderableType:
    """Return every trial of a plan and what submit would do with it."""
    table = plain_table(">#", "trial", "class", "state", "action", ">h", "id", "branch of")
    for t in d["trials"]:
        trunk = "" if t["trunk"] is None else f"#{t['trunk']} at step {t['begins']}"
        table.add_row(
            str(t["index"]),
            t["label"],
            t["class"],
            state(t["state"]),
            t["action"],
            number(t["hours"]),
            t["id"],
            trunk,
        )
    return table


# ---- status


def status(d: Document, most_rows: int = MAX_ROWS) -> RenderableType:
    """Return one line per trial, the counts and the cost.

    Of a sweep with more trials than `most_rows`, those that wait or are done are left out.
    """
    rows: list[Document] = list(d["trials"])
    shown = rows
    if len(rows) > most_rows:
        shown = [t for t in rows if t["state"] not in ("new", "queued", "done")][:most_rows]
    cells: list[list[str | Text]] = []
    for t in shown:
        row = [
            str(t["index"]),
            t["label"],
            t["class"],
            state(t["state"], t["held"]),
            f"{t['step']}/{t['steps']}",
            _metric(t["loss"]),
            _metric(t["probe"]),
            str(t["attempts"]),
            f"{t['job']} {t['note']}".strip(),
        ]
        cells.append(row)
    table = one_line_table(STATUS, cells, "trial", STATUS_OPTIONAL)
    lines: list[RenderableType] = [Text(d["sweep"], style="bold")]
    lines += [table] if cells else []
    lines.append(Text(_cost(d)))
    lines += map(canary, d["canaries"])
    if len(shown) < len(rows):
        hidden = plural(len(rows) - len(shown), "trial")
        listed = {t["index"] for t in shown}
        example = next(t["state"] for t in rows if t["index"] not in listed)
        lines.append(Text(f"not listed: {hidden}; select some, e.g. state={example}"))
    mixed = mixed_code(t["code"] for t in rows if t["state"] == "done")
    if mixed:
        lines.append(_warning(mixed))
    if d["problem"]:
        lines.append(_warning(f"{d['problem']}: trials marked unknown may have changed"))
    return Group(*lines)


def _cost(d: Document) -> str:
    text = f"{_counts(d['counts'])} · {number(d['gpu_hours'])} {d['unit']} used"
    if d["cost_by"] == "sacct":
        text += " by sacct"
    text += f", about {number(d['remaining'])} to go"
    if d["stopped_cost"]:
        text += f" and {number(d['stopped_cost'])} in stopped trials"
    if d["limit"]:
        text += f", of {number(d['limit'])}"
    return text


def canary(c: Document) -> Text:
    """Return one line: the state of the canary of a class, and what it measured."""
    line = Text(f"canary {c['class']} ({c['about']}) ") + state(c["state"])
    if c["measured_hours"]:
        measured = duration(c["measured_hours"] * 3600)
        planned = duration(c["hours"] * 3600)
        line += Text(f": {measured} per trial, planned were {planned}")
    elif c["state"] in ("running", "queued", "requeued"):
        line += Text(f" at step {c['step']} of {c['steps']}, {c['holds']} wait for it")
    elif c["holds"]:
        line += Text(f": {c['holds']} wait for it, see jepa why")
    return line


def overview(sweeps: Sequence[Document], root: Path) -> RenderableType:
    """Return one line per sweep."""
    if not sweeps:
        return f"no sweep was submitted in {root}"
    rows: list[list[str]] = []
    for d in sweeps:
        used = f"{number(d['gpu_hours'])} {d['unit']}"
        row = [d["sweep"], d["question"], str(len(d["trials"])), _counts(d["counts"]), used]
        rows.append(row)
    heads = ("sweep", "question", ">trials", "states", ">used")
    return one_line_table(heads, rows, "question", ("question",))


def changes(before: Document, now: Document) -> list[str]:
    """Return one line per trial whose state changed or that made another tenth of its steps."""
    old = {t["name"]: (t["state"], _tenth(t)) for t in before["trials"]}
    width = max((len(t["label"]) for t in now["trials"]), default=0)
    lines: list[str] = []
    for t in now["trials"]:
        if old.get(t["name"]) == (t["state"], _tenth(t)):
            continue
        line = f"{time.strftime('%H:%M:%S')}  {trial_line(t, width)}"
        if t["loss"] is not None:
            line += f"  loss {format_number(t['loss'])}"
        if t["note"]:
            line += f"  {t['note']}"
        lines.append(line)
    return lines


# ---- diagnosis


def why(d: Document) -> RenderableType:
    """Return one trial: its cause, evidence, attempts, last log lines and next command."""
    head = Text(f"{d['index']} {d['label']}  ", style="bold") + state(d["state"])
    explanation = Table.grid(padding=(0, 2))
    for key in EXPLANATION:
        if d[key]:
            explanation.add_row(f"  {key}", Text(str(d[key])))
    lines: list[RenderableType] = [head, explanation]
    if d["tries"]:
        lines.append(_attempts(d["tries"]))
    lines += [Text(f"  | {line}", style="dim") for line in d["log"]]
    return Group(*lines, Text(""))


def _attempts(attempts: Iterable[Document]) -> Table:
    table = plain_table(">  attempt", "job", "host", ">steps", ">minutes", "ended")
    for a in attempts:
        end = "" if a["end_step"] is None else a["end_step"]
        table.add_row(
            str(a["attempt"]),
            a["job"],
            a["host"],
            f"{a['start_step'] or 0}–{end}",
            "" if a["minutes"] is None else number(a["minutes"]),
            a["cause"] or "open",
        )
    return table


def merge_alike(documents: Iterable[Document], sweep: str) -> list[Document]:
    """Merge trials with the same diagnosis into one document, at the place of the first."""
    groups: dict[tuple[str, ...], list[Document]] = {}
    for d in documents:
        key = tuple(str(d[name]) for name in ("state", "cause", "means", "evidence", "rule"))
        groups.setdefault(key, []).append(d)
    merged: list[Document] = []
    for group in groups.values():
        first = group[0]
        if len(group) > 1:
            indices = " ".join(str(d["index"]) for d in group)
            command = first["hint"].replace(f"{sweep} {first['index']}", f"{sweep} {indices}")
            names = {"index": f"{len(group)} trials:", "label": indices}
            first = {**first, **names, "hint": command, "tries": []}
        merged.append(first)
    return merged


def checks(found: Iterable[Document]) -> RenderableType:
    """Return a table of the checks of `jepa doctor`."""
    table = plain_table("", "check", "found", "what to do")
    for check in found:
        mark = Text("ok", style="green") if check["ok"] else Text("NO", style="bold red")
        table.add_row(mark, check["what"], Text(check["found"]), Text(check["hint"]))
    return table


def nodes(failures: Mapping[str, Document], threshold: float) -> RenderableType:
    """Return a table of the failures of each node."""
    table = plain_table("node", ">attempts", ">score", ">slowdown", "failures", "")
    for host, node in failures.items():
        causes = {failure["cause"] for failure in node["faults"]}
        table.add_row(
            host,
            str(node["attempts"]),
            number(node["score"]),
            f"{node['slow']:.2f}×" if node["slow"] else "",
            ", ".join(sorted(causes)),
            "excluded at submit" if node["score"] >= threshold else "",
        )
    return table


# ---- cells


def state(name: str, held: bool = False) -> Text:
    if held:
        return Text(f"{name}, held", style="yellow")
    return Text(name, style=COLOURS.get(name, ""))


def number(value: float) -> str:
    """Format three digits: <0.001, 0.0042, 6.1, 7 603."""
    if value >= 1000:
        return f"{value:,.0f}".replace(",", " ")
    if 0 < value < 0.001:
        return "<0.001"
    return format_number(value, FITTED)


def around(value: float, spread: float) -> str:
    """Return '1.2 ±0.3', without a spread that is smaller than a printed digit."""
    if spread < 0.001:
        return number(value)
    return f"{number(value)} ±{number(spread)}"


def _tenth(t: Document) -> int:
    return 10 * t["step"] // max(t["steps"], 1)


def _metric(value: float | None) -> str:
    return "" if value is None else format_number(value)


def _counts(counts: Mapping[str, int], separator: str = " · ") -> str:
    return separator.join(f"{count} {name}" for name, count in counts.items() if count)


def _warning(text: str) -> Text:
    return Text(f"! {text}", style=WARNING)

"""Select trials by words: `model=vit_l state=failed`, `vit_s ts=.15-.2 s0`, `7`, `!s0`.

In: rows (mappings with name, id, index, state, class, label, seed, point) and words. Out: the
selected rows.

- `key=value`: key is an axis, its last part or its abbreviation in labels, or one of COLUMNS. The
  value may be a list (`state=failed,stopped`) or a pattern (`model=vit_*`).
- A word of a label, such as `vit_s` or `s0`, means the axis and value that it shows.
- A number is an index. Any other word is the beginning of an id, or a part of a name or label.
- `!word` removes what the word selects.

Words without `=` about the same axis widen the selection (`vit_s vit_l`, or `3 5`). All else
narrows it. Pure.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jepa_cluster.errors import ConfigError, suggest
from jepa_cluster.labels import ABBREVIATIONS, format_value, label_words
from jepa_cluster.trial.status import STATES

Row = Mapping[str, Any]
COLUMNS = ("state", "seed", "class", "id", "name", "action")


@dataclass(frozen=True)
class _Condition:
    """One word. about: the axis or column it restricts; '' for an index, id or part of a name."""

    about: str
    values: tuple[str, ...]

    def holds(self, row: Row) -> bool:
        if not self.about:
            return any(_is_called(row, value) for value in self.values)
        found = _cell(row, self.about)
        texts = (format_value(found), str(found))
        return any(fnmatch.filter(texts, value) for value in self.values)


def select(rows: Sequence[Row], words: Sequence[str]) -> list[Row]:
    """Return the selected rows. Raises ConfigError for an unknown key, and when no row matches."""
    words = " ".join(words).split()
    known = set(COLUMNS)
    for row in rows:
        known.update(row.get("point", {}))
    pairs: list[_Condition] = []
    removed: list[_Condition] = []
    alternatives: dict[str, list[_Condition]] = {}
    for word in words:
        condition = _parse(word.removeprefix("!"), rows, known)
        if word.startswith("!"):
            removed.append(condition)
        elif "=" in word:
            pairs.append(condition)
        else:
            alternatives.setdefault(condition.about, []).append(condition)
    selected = list(rows)
    for pair in pairs:
        selected = list(filter(pair.holds, selected))
    for group in alternatives.values():
        selected = [row for row in selected if _any_holds(group, row)]
    selected = [row for row in selected if not _any_holds(removed, row)]
    if words and rows and not selected:
        what = f"no trial matches {' '.join(words)}"
        raise ConfigError(what, hint=_suggest_value(rows, pairs))
    return selected


def _any_holds(conditions: Iterable[_Condition], row: Row) -> bool:
    return any(condition.holds(row) for condition in conditions)


def _parse(word: str, rows: Iterable[Row], known: Iterable[str]) -> _Condition:
    key, equals, value = word.partition("=")
    if equals:
        axis = _find_axis(key, known)
        return _Condition(axis, tuple(value.split(",")))
    axes: dict[str, str] = {}  # that show this word in a label -> the value as text
    for row in rows:
        point = row.get("point", {})
        shown = label_words(point, row.get("seed", 0))
        for axis, text in shown.items():
            if text == word:
                axes[axis] = format_value(_cell(row, axis))
    if len(axes) == 1:
        ((axis, text),) = axes.items()
        return _Condition(axis, (text,))
    return _Condition("", (word,))


def _find_axis(key: str, known: Iterable[str]) -> str:
    def is_meant(name: str) -> bool:
        return f".{name}".endswith(f".{key}") or ABBREVIATIONS.get(name) == key

    names = list(filter(is_meant, known))
    if not names:
        raise ConfigError(f"trials have no '{key}'", hint=suggest(key, known))
    return min(names, key=len)


def _cell(row: Row, about: str) -> Any:
    """Return a column or the value of an axis; None where the row has none."""
    if about in COLUMNS:
        return row.get(about)
    return row.get("point", {}).get(about)


def _is_called(row: Row, word: str) -> bool:
    if word.isdigit() and len(word) < 6:
        return str(row.get("index")) == word
    if str(row["id"]).startswith(word):
        return True
    return word in str(row["name"]) or word in str(row.get("label", ""))


def _suggest_value(rows: Iterable[Row], pairs: Iterable[_Condition]) -> str:
    """Return a hint for the first value that no trial has."""
    for pair in pairs:
        present = {format_value(_cell(row, pair.about)) for row in rows}
        possible = set(STATES) if pair.about == "state" else present
        for value in pair.values:
            if not fnmatch.filter(possible, value):
                return suggest(value, possible)
    return "jepa status lists them"

"""Select trials by words: `model=vit_l state=failed`, `vit_s ts=.15-.2 s0`, `7`, `!s0`.

In: rows (mappings with name, id, index, state, class, label, seed, point) and words. Out: the
selected rows.

- A word of a label, such as `vit_s` or `s0`, means the axis and value that it shows.
- `key=value`: key is an axis, its last part or its abbreviation in labels, or one of COLUMNS. The
  value may be a list (`state=failed,stopped`) or a pattern (`model=vit_*`). Numbers may be written
  as in the sweep file (`ts=0.15-0.20`, `lr=1.5e-3`).
- A number is an index. Any other word is the beginning of an id, or a part of a name or label.
- `!word` removes what the word selects.

Words without `=` about the same axis widen the selection (`vit_s vit_l`, or `3 5`). All else
narrows it. Pure.
"""

from __future__ import annotations

import fnmatch
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jepa_cluster.errors import ConfigError, suggest
from jepa_cluster.labels import ABBREVIATIONS, format_value, label_words
from jepa_cluster.trial.status import STATES

Row = Mapping[str, Any]
_NUMBER = re.compile(r"\d*\.\d+(e[+-]?\d+)?|\d+e[+-]?\d+", re.IGNORECASE)
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
        return any(value in texts or fnmatch.filter(texts, value) for value in self.values)


def select(rows: Sequence[Row], words: Sequence[str]) -> list[Row]:
    """Return the selected rows. Raises ConfigError for an unknown key, and when no row matches."""
    words = " ".join(words).split()
    known = set(COLUMNS)
    for row in rows:
        known.update(row["point"])
    shown = _shown_in_labels(rows)
    removed: list[_Condition] = []
    groups: dict[str, list[_Condition]] = {}  # a row must meet one condition of each
    for word in words:
        condition = _parse(word.removeprefix("!"), shown, known)
        if word.startswith("!"):
            removed.append(condition)
        else:
            group = word if "=" in word else condition.about
            groups.setdefault(group, []).append(condition)

    selected = list(rows)
    for group in groups.values():
        selected = [row for row in selected if any(word.holds(row) for word in group)]
    for condition in removed:
        selected = [row for row in selected if not condition.holds(row)]
    if words and rows and not selected:
        what = f"no trial matches {' '.join(words)}"
        raise ConfigError(what, hint=_suggest_value(rows, itertools.chain(*groups.values())))
    return selected


def _shown_in_labels(rows: Iterable[Row]) -> dict[str, dict[str, str]]:
    """Return, for each word of the rows' labels, the axes that show it and the value as text."""
    shown: dict[str, dict[str, str]] = {}
    for row in rows:
        words = label_words(row["point"], row["seed"])
        for axis, word in words.items():
            shown.setdefault(word, {})[axis] = format_value(_cell(row, axis))
    return shown


def _parse(
    word: str,
    shown: Mapping[str, Mapping[str, str]],
    known: Iterable[str],
) -> _Condition:
    axes = shown.get(word, {})
    if len(axes) == 1:
        ((axis, text),) = axes.items()
        return _Condition(axis, (text,))
    key, equals, value = word.partition("=")
    if not equals:
        return _Condition("", (word,))
    short = _NUMBER.sub(lambda number: format_value(float(number[0])), value)
    return _Condition(_find_axis(key, known), (*value.split(","), *short.split(",")))


def _find_axis(key: str, known: Iterable[str]) -> str:
    names: list[str] = []
    for name in known:
        is_last_part = f".{name}".endswith(f".{key}")
        if is_last_part or ABBREVIATIONS.get(name) == key:
            names.append(name)
    if not names:
        raise ConfigError(f"trials have no '{key}'", hint=suggest(key, known))
    return min(names, key=len)


def _cell(row: Row, about: str) -> Any:
    """Return a column or the value of an axis; None where the row has none."""
    if about in COLUMNS:
        return row.get(about)
    return row["point"].get(about)


def _is_called(row: Row, word: str) -> bool:
    if word.isdigit() and len(word) < 6:
        return str(row["index"]) == word
    is_part = word in row["name"] or word in row["label"]
    return is_part or row["id"].startswith(word)


def _suggest_value(rows: Iterable[Row], conditions: Iterable[_Condition]) -> str:
    """Return a hint for the first value that no trial has."""
    for condition in conditions:
        possible = {format_value(_cell(row, condition.about)) for row in rows}
        if condition.about == "state":
            possible = set(STATES)
        for value in condition.values:
            if condition.about and not fnmatch.filter(possible, value):
                return suggest(value, possible)
    return "jepa status lists them"

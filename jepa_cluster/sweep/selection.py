"""One grammar to point at trials, everywhere: `model=vit_l state=failed seed=0`, '!mask…', index, id prefix.

In: rows (plain mappings with name, id, index, state, class, label, seed, point) and words. Out: the rows meant.
`key=value` words narrow down together; `key` is an axis or its last part, or state, seed, class, id, name; a value
may be a list (`state=failed,stopped`) or a pattern (`model=vit_*`). A bare number is an index, any other bare
word the beginning of an id or a part of the name or label; bare words widen. `!word` takes away. Pure.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

from jepa_cluster.errors import ConfigError, suggest
from jepa_cluster.sweep.definition import label
from jepa_cluster.sweep.reconcile import STATES

Row = Mapping[str, Any]
FIXED = ("state", "seed", "class", "id", "name", "action")


def select(rows: Sequence[Row], words: Sequence[str]) -> list[Row]:
    """Raises ConfigError for an unknown key, and when words are given and nothing matches."""
    narrow = [w for w in words if "=" in w and not w.startswith("!")]
    widen = [w for w in words if "=" not in w and not w.startswith("!")]
    away = [w[1:] for w in words if w.startswith("!")]
    known = {*FIXED, *(k for r in rows for k in r.get("point", {}))}
    found = [
        r
        for r in rows
        if all(_matches(r, w, known) for w in narrow)
        and (not widen or any(_matches(r, w, known) for w in widen))
        and not any(_matches(r, w, known) for w in away)
    ]
    if words and rows and not found:
        raise ConfigError(f"no trial matches {' '.join(words)}", hint=_nearest(rows, narrow, known))
    return found


def _nearest(rows: Sequence[Row], narrow: Sequence[str], known: set[str]) -> str:
    """What the first value might mean that no trial has."""
    for key, _, value in (w.partition("=") for w in narrow):
        axis = _key(key, known)
        there = {label(r.get(axis) if axis in FIXED else r.get("point", {}).get(axis)) for r in rows}
        for word in value.split(","):
            if not fnmatch.filter(there, word) and not (axis == "state" and word in STATES):
                return suggest(word, STATES if axis == "state" else there)
    return "jepa status lists them"


def _matches(row: Row, word: str, known: set[str]) -> bool:
    key, given, value = word.partition("=")
    if not given:
        if word.isdigit() and len(word) < 6:
            return str(row.get("index")) == word
        return str(row["id"]).startswith(word) or word in str(row["name"]) or word in str(row.get("label", ""))
    axis = _key(key, known)
    found = row.get(axis) if axis in FIXED else row.get("point", {}).get(axis)
    return any(fnmatch.fnmatchcase(label(found), v) or str(found) == v for v in value.split(","))


def _key(key: str, known: set[str]) -> str:
    ends = [k for k in known if k == key or k.endswith(f".{key}")]
    if not ends:
        raise ConfigError(f"trials have no '{key}'", hint=suggest(key, known))
    return min(ends, key=len)

"""Labels of axis values and points: one format for names, tables and selections.

In: axis names and values as they are written in a sweep file. Out: ASCII words without spaces,
such as `vit_s ts=.15-.2 80k s0`, which `sweep.select_trials` accepts as a selection. Terminal,
tables, figures, pages, MLflow and the names of trial directories show this format. Pure.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from decimal import ROUND_HALF_UP, Context, Decimal
from typing import Any

ABBREVIATIONS = {
    "mask.target_scale": "ts",
    "mask.target_aspect": "ta",
    "mask.context_scale": "cs",
    "optim.weight_decay": "wd",
}
# Readouts of a probe, in the names of metrics
ONLINE = "online/"  # the mean of the online encoder's patches
SECOND_READOUT = "mean_std_max/"  # of the target encoder
STEPS = "optim.steps"  # shown without its name when it ends in k
SIZE_AXES = (  # they move a trial along the compute axis; the other axes are settings
    "model",
    STEPS,
    "optim.epochs",
    "optim.cooldown_steps",
)
DIRECTIONS = ("rises", "falls")  # of the best level, with the size of the model
TRENDS = (*DIRECTIONS, "stays")
LONGEST_NAME = 100  # of a directory, before its id; file systems allow 255 bytes
MEASURED, FITTED = 4, 3  # digits of measured values; of costs, budgets and fits
LADDERS = "_lr"  # ends the name of the sweep over the learning rates of another sweep
ALL = "all"  # the setting of a sweep without such axes

_NAME = re.compile(r"(?!(true|false|null)$)[A-Za-z][\w.-]*")  # a value that needs no axis name
_NOT_PLAIN = re.compile(r"[^\w.+-]", re.ASCII)
_NUMBER = re.compile(r"(-?\d*\.?\d+(?:e[-+]?\d+)?)(k?)")
_MARKDOWN = re.compile(r"[\\`*\[\]<>|$~&]|(?<!\w)[_#]|_(?!\w)")


def markdown(text: object) -> str:
    """Escape a text so that Markdown shows it as it is."""
    return _MARKDOWN.sub(r"\\\g<0>", str(text))


def format_value(value: object) -> str:
    """Format an axis value: [0.15, 0.2] -> '.15-.2', 80000 -> '80k', None -> 'null'."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        in_thousands = 1000 <= value < 10_000_000 and value % 100 == 0
        return f"{value / 1000:g}k" if in_thousands else str(value)
    if isinstance(value, float):
        text = f"{value:g}"
        return text.replace("0.", ".", 1) if abs(value) < 1 else text
    if isinstance(value, Mapping):
        return "+".join(f"{key}:{format_value(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return "-".join(map(format_value, value))
    return "_".join(str(value).split())


def rounded(value: float, digits: int = 6) -> float:
    """Round a number as scaling.json does, halves away from zero, as browsers do."""
    return float(Context(digits, ROUND_HALF_UP).create_decimal_from_float(value))


def format_number(value: float | None, digits: int = MEASURED) -> str:
    """Format a number: '0.2137', '12346', '1.204e+18'; '–' without one.

    It has this many digits, but below a million no digit before the point is rounded away. As
    formatNumber of the page does, from the six digits of scaling.json.
    """
    if value is None or not math.isfinite(value):
        return "–"
    six = rounded(value)
    if abs(six) < 1e6:
        digits = max(digits, len(str(int(abs(six)))))
    return f"{rounded(six, digits) + 0.0:g}"


def format_percent(fraction: float | None, sign: str = "") -> str:
    """Format a fraction with one decimal, '9.4'; '–' without one. sign: '+' to write it.

    From a million percent on as `format_number` does. As formatPercent and signed of the page do.
    """
    if fraction is None or not math.isfinite(100 * fraction):
        return "–"
    percent = 100 * fraction
    text = format_number(percent)
    if abs(percent) < 1e6:
        tenths = Decimal(percent).quantize(Decimal("0.1"), ROUND_HALF_UP)
        text = str(tenths + 0)  # no minus sign before a zero
    return text if text.startswith("-") else f"{sign}{text}"


def last_part(axis: str, axes: Iterable[str]) -> str:
    """Return an axis' name after its last dot, or all of it when another axis ends alike."""
    last = axis.rpartition(".")[2]
    alike = [other for other in axes if other.rpartition(".")[2] == last and other != axis]
    return axis if alike else last


def axis_name(axis: str, axes: Iterable[str]) -> str:
    """Return the name of an axis in labels, answers and heads of tables: 'ts', 'lr'."""
    return ABBREVIATIONS.get(axis) or last_part(axis, axes)


def axis_word(axis: str, text: str, axes: Iterable[str]) -> str:
    """Return 'ts=.15-.2', or only the value if it is a name or many steps.

    text: the value by `format_value`. axes: all axes of the point.
    """
    if _NAME.fullmatch(text) or (axis == STEPS and text.endswith("k")):
        return text
    return f"{axis_name(axis, axes)}={text}"


def label_words(point: Mapping[str, Any], seed: int) -> dict[str, str]:
    """Return axis -> word, with the seed as the last one."""
    words = {axis: axis_word(axis, format_value(value), point) for axis, value in point.items()}
    return {**words, "seed": f"s{seed}"}


def point_label(point: Mapping[str, Any], seed: int) -> str:
    """Return the label of a trial: 'vit_s ts=.15-.2 80k s0', in the order of the point."""
    return " ".join(label_words(point, seed).values())


def setting_label(point: Mapping[str, Any]) -> str:
    """Return the words of the axes that are neither size, horizon nor seed; ALL without any."""
    words = label_words(point, 0)
    for axis in ("seed", *SIZE_AXES):
        words.pop(axis, None)
    return " ".join(words.values()) or ALL


def directory_name(model: str, words: Iterable[str], trial_id: str) -> str:
    """Return 'vit_s-ts.15-.2-80k-s0-0123456789ab': the label in characters that no shell changes.

    words: those of the label without the model. A long label is cut; the id tells trials apart.
    """
    plain = "-".join([model, *words]).replace("=", "")
    return f"{_NOT_PLAIN.sub('_', plain)[:LONGEST_NAME]}-{trial_id}"


def number_of(text: str) -> float | None:
    """Return the number that `format_value` wrote; None for anything else."""
    number = _NUMBER.fullmatch(text)
    return sort_key(text)[0] if number else None


def ends_of(text: str) -> tuple[float, float] | None:
    """Return the ends of an interval that `format_value` wrote; None for anything else."""
    ends = [number_of(end) for end in text.split("-")]
    if len(ends) == 2 and ends[0] is not None and ends[1] is not None:
        return ends[0], ends[1]
    return None


def numbers_of(text: str) -> dict[str, float]:
    """Return the number of a value by `format_value`, or low, mid and high of an interval."""
    number, ends = number_of(text), ends_of(text)
    if number is not None:
        return {"value": number}
    return {"low": ends[0], "mid": (ends[0] + ends[1]) / 2, "high": ends[1]} if ends else {}


def level_numbers(texts: Iterable[str]) -> list[float]:
    """Return the levels of an axis as numbers, an interval by its middle.

    In: values by `format_value`. Out: nothing where one is a name, or where two are equal.
    """
    numbers: list[float] = []
    for text in texts:
        found = numbers_of(text)
        number = found.get("value", found.get("mid"))
        if number is None or number in numbers:
            return []
        numbers.append(number)
    return numbers


def sort_key(text: str) -> tuple[float, str]:
    """Sort values by the number that they begin with; a name counts as 0."""
    number = _NUMBER.match(text)
    if number is None:
        return 0.0, text
    return float(number[1]) * (1000 if number[2] else 1), text

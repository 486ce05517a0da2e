"""The console on which tables are printed: characters of a text have no effect on it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from jepa_cluster.errors import printable


class PlainConsole(Console):
    """A console that prints the characters of a text, and obeys none of them."""

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterator[Segment]:
        for segment in super().render(renderable, options):
            text = segment.text if segment.control else printable(segment.text)
            yield segment._replace(text=text)


def size(count: int) -> str:
    """Return a number of bytes for the user: '1.2 GB'."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def console() -> Console:
    """Return a console that prints plain text: into a pipe, of $COLUMNS or 160 columns."""
    plain: dict[str, Any] = {"markup": False, "emoji": False, "highlight": False}
    if sys.stdout.isatty():
        return PlainConsole(**plain)
    columns = os.environ.get("COLUMNS", "")
    width = int(columns) if columns.isdecimal() else 160
    return PlainConsole(**plain, width=width, no_color=True)


def duration(seconds: float) -> str:
    """Return '45s', '12m', '8h' or '8h30'."""
    if seconds < 90:
        return f"{seconds:.0f}s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes}m"
    hours, rest = divmod(minutes, 60)
    return f"{hours}h{rest:02d}" if rest else f"{hours}h"

"""Tables for the terminal whose rows are one line each.

In: columns of cells, and the width of the terminal. Out: a rich table. Where the terminal is
narrow, optional columns are left out, and long labels are cut in the middle, since both of their
ends tell trials apart.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from jepa_cluster.cli.console import console

Cell = str | Text
GAP = 2
SHORTEST = 12  # to which a label is cut
NOTE = "note"  # a column that is cut at its end
SHORT_NOTE = 20  # width that it keeps beside optional columns
LEAST_NOTE = 8  # width that it keeps beside a label that is cut


def plain_table(*columns: str) -> Table:
    """Return a table without lines. A column whose name begins with '>' is aligned to the right."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in columns:
        justify = "right" if name.startswith(">") else "left"
        table.add_column(name.removeprefix(">"), justify=justify, overflow="fold")
    return table


def one_line_table(
    heads: Sequence[str],
    rows: Sequence[Sequence[Cell]],
    label: str,
    optional: Sequence[str],
) -> Table:
    """Return a table for the console's width. heads: as for `plain_table`.

    label: the column that is cut in the middle. optional: columns to leave out, the first one
    first; the label only where less than SHORTEST would be left of it. Empty ones are left out, and
    NOTE has what is left.
    """
    room = console().width + GAP
    cells = zip(*rows, strict=True) if rows else [[]] * len(heads)
    shown = dict(zip(heads, map(list, cells), strict=True))
    for name in heads:
        if rows and not any(map(len, shown[name])):
            del shown[name]
    widths = dict(zip(shown, itertools.starmap(_width, shown.items()), strict=True))
    if NOTE in widths:
        widths[NOTE] = min(widths[NOTE], SHORT_NOTE)
    for name in optional:
        if name != label and name in shown and sum(widths.values()) > room:
            del shown[name], widths[name]
    room -= sum(widths.values())
    if NOTE in widths and room < 0:
        less = min(-room, max(0, widths[NOTE] - LEAST_NOTE - GAP))
        widths[NOTE] -= less
        room += less
    if label in shown and room < 0:
        room += widths[label] - GAP
        shown[label] = [cut(str(cell), max(room, SHORTEST)) for cell in shown[label]]
        if room < SHORTEST and label in optional:
            del shown[label]
        room = 0
    if NOTE in shown:
        longest = widths[NOTE] - GAP + room
        shown[NOTE] = [Text(str(cell)) for cell in shown[NOTE]]
        for cell in shown[NOTE]:
            cell.truncate(longest, overflow="ellipsis")
    table = plain_table(*shown)
    for column in table.columns:
        column.no_wrap, column.overflow = True, "ellipsis"
    for row in zip(*shown.values(), strict=True):
        table.add_row(*row)
    return table


def cut(text: str, width: int) -> str:
    """Return a text of at most `width` characters, without its middle."""
    if cell_len(text) <= width:
        return text
    tail = (width - 1) // 2
    return f"{text[: width - 1 - tail]}…{text[-tail:]}"


def _width(name: str, cells: Sequence[Cell]) -> int:
    """Return the width of a column and of the gap beside it."""
    return GAP + max(map(cell_len, map(str, (name.removeprefix(">"), *cells))))

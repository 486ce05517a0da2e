"""Tables for the terminal whose rows are one line each.

In: columns of cells, and the width of the terminal. Out: a rich table. Where the terminal is
narrow, optional columns are left out, and long labels are cut in the middle, since both of their
ends tell trials apart.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from jepa_cluster.cli.console import console

Cell = str | Text
Columns = Mapping[str, Sequence[Cell]]  # head -> cells
GAP = 2
SHORTEST = 12  # to which a label is cut


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
    first; the label only where less than SHORTEST would be left of it. Empty ones are left out.
    """
    width = console().width
    cells = zip(*rows, strict=True) if rows else [[]] * len(heads)
    shown = dict(zip(heads, map(list, cells), strict=True))
    for name in heads:
        if rows and not any(map(len, shown[name])):
            del shown[name]
    for name in optional:
        if name != label and name in shown and _total(shown) > width:
            del shown[name]
    room = width - _total(shown)
    if label in shown and room < 0:
        room += _width(label, shown[label])
        shown[label] = [cut(str(cell), max(room, SHORTEST)) for cell in shown[label]]
        if room < SHORTEST and label in optional:
            del shown[label]
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
    return max(map(cell_len, map(str, (name.removeprefix(">"), *cells))))


def _total(columns: Columns) -> int:
    return sum(itertools.starmap(_width, columns.items())) + GAP * (len(columns) - 1)

"""Report -> text table, within a width."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

from .record import Column, format_bytes, format_value

if TYPE_CHECKING:
    from .record import Report

_GAP = 2
_REASON = "reason"


def render(report: Report, width: int) -> str:
    """The report as plain text: table, footnotes, summary, notes. No colours, no line wider than `width`.

    Reasons move to numbered footnotes where the table would be too wide with them; after that names lose their middle.
    """
    parts = []
    if report.rows:
        parts.append(_table(report, width))
    if report.summary:
        label = max(cell_len(str(key)) for key in report.summary)
        lines = [f"{key!s:<{label}}  {_short(str(key), value)}" for key, value in report.summary.items()]
        indent = " " * (label + 2)
        folded = [textwrap.fill(line, width, subsequent_indent=indent, break_on_hyphens=False) for line in lines]
        parts.append("\n".join(folded))
    if report.notes:
        parts.append("\n".join(textwrap.fill(f"note: {note}", width, subsequent_indent="  ") for note in report.notes))
    return "\n\n".join(parts)


def _table(report: Report, width: int) -> str:
    columns = [column for column in report.columns if any(row.get(column.key) not in (None, "") for row in report.rows)]
    cells = [[_cell(row.get(column.key), column) for column in columns] for row in report.rows]
    footnotes: list[str] = []
    if _width(columns, cells) > width and any(column.key == _REASON for column in columns):
        at = next(index for index, column in enumerate(columns) if column.key == _REASON)
        for row in cells:
            if row[at] == "-":
                continue
            if row[at] not in footnotes:
                footnotes.append(row[at])
            row[at] = f"[{footnotes.index(row[at]) + 1}]"
    excess = _width(columns, cells) - width
    if excess > 0:
        room = max(12, max(cell_len(row[0]) for row in cells) - excess)
        for row, name in zip(cells, _names_that_differ([row[0] for row in cells], room), strict=True):
            row[0] = name
    table = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0), show_edge=False)
    for column in columns:
        table.add_column(column.title, justify="right" if column.is_number else "left", overflow="fold")
    for row in cells:
        table.add_row(*row)
    console = Console(file=io.StringIO(), width=width, color_system=None, force_terminal=False, legacy_windows=False)
    console.print(table, markup=False, highlight=False)
    output = console.file
    assert isinstance(output, io.StringIO)
    lines = [line.rstrip() for line in output.getvalue().rstrip("\n").split("\n")]
    lines += [
        textwrap.fill(f"[{number}] {text}", width, subsequent_indent="    ") for number, text in enumerate(footnotes, 1)
    ]
    return "\n".join(lines)


def _cell(value: object, column: Column) -> str:
    return format_value(None if value == "" else value, column.kind)


def _width(columns: Sequence[Column], cells: Sequence[Sequence[str]]) -> int:
    widest = [
        max(cell_len(column.title), *(cell_len(row[index]) for row in cells)) for index, column in enumerate(columns)
    ]
    return sum(widest) + _GAP * (len(widest) - 1) + 1


def shortened(name: str, room: int) -> str:
    """A dotted name that fits, if it can: its longest parts are cut first, then all but numbers and the last part go.

    >>> shortened("encoder.layer.11.attention.self.query", 28)
    'enc….l….11.att….self.query'
    >>> shortened("encoder.layer.11.attention.self.query", 15)
    '….11.….query'
    """
    parts = name.split(".")
    for least, kept in ((6, 3), (3, 1)):
        while cell_len(".".join(parts)) > room:
            longest = max(range(len(parts) - 1), key=lambda i: 0 if parts[i].isdigit() else len(parts[i]), default=0)
            if len(parts) == 1 or parts[longest].isdigit() or len(parts[longest]) < least:
                break
            parts[longest] = parts[longest].removesuffix("…")[:kept] + "…"
    if cell_len(".".join(parts)) > room:
        numbers = [part if part.isdigit() else "…" for part in parts[:-1]]
        parts = [part for i, part in enumerate(numbers) if part != "…" or i == 0 or numbers[i - 1] != "…"] + parts[-1:]
    return _without_middle(".".join(parts), room) if cell_len(".".join(parts)) > room else ".".join(parts)


def _names_that_differ(names: Sequence[str], room: int) -> list[str]:
    """Names in as little more room than `room` as keeps different ones different."""
    while True:
        found = [shortened(name, room) for name in names]
        if len(set(found)) == len(set(names)):
            return found
        room += 1


def _without_middle(text: str, room: int) -> str:
    tail = (room - 1) * 2 // 3
    return f"{text[: room - 1 - tail]}…{text[-tail:]}"


def _short(key: str, value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, float):
        return f"{value:.4g}"
    return format_bytes(value) if "bytes" in key else f"{value:,}"

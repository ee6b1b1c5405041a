"""Report: what a verb did, layer by layer. Every verb that looks at or changes a model returns one."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..errors import TwofourError

Kind = Literal["text", "count", "bytes", "share", "ratio", "us", "seconds", "error", "loss"]


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a report: the key in each row, the heading, and how its numbers are written.

    Kinds: text, count (integer), bytes, share (of 1, shown as %), ratio (shown as 1.23x), us (microseconds),
    seconds, error (shown with two digits, as in 1.2e-03).
    """

    key: str
    title: str
    kind: Kind = "text"

    @property
    def is_number(self) -> bool:
        """True for every kind but text."""
        return self.kind != "text"


@dataclass(frozen=True)
class Report:
    """A verb's answer: one row per layer, a summary, notes, and where it was made.

    Args:
        verb: "prune", "check", "compress", "explain", "measure", ...
        columns: what the rows hold, in order of appearance.
        rows: one mapping per layer; missing keys show as "-".
        summary: named results for the whole model.
        notes: sentences a reader must see, for instance why layers were skipped.
        environment: machine and versions (`twofour.report.environment()`).
    """

    verb: str
    columns: tuple[Column, ...]
    rows: tuple[Mapping[str, Any], ...]
    summary: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    environment: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.to_table()

    def __repr__(self) -> str:
        return f"<Report of {self.verb}: {len(self.rows)} rows; print it, or .to_json(), .to_html()>"

    def _repr_html_(self) -> str:
        from .html import table_html

        return table_html(self)

    def where(self, **wanted: Any) -> tuple[Mapping[str, Any], ...]:
        """The rows whose keys have all the given values, for instance `report.where(action="skipped")`."""
        return tuple(row for row in self.rows if all(row.get(key) == value for key, value in wanted.items()))

    def to_table(self, width: int = 100) -> str:
        """Plain text, at most `width` columns wide."""
        from .table import render

        return render(self, width)

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """JSON text of the whole record, also written to `path` if given. NaN and infinities become null."""
        record = {
            "verb": self.verb,
            "summary": dict(self.summary),
            "rows": [dict(row) for row in self.rows],
            "notes": list(self.notes),
            "environment": dict(self.environment),
        }
        text = json.dumps(_plain(record), indent=1, ensure_ascii=False, allow_nan=False)
        if path is not None:
            write_text(path, text + "\n")
        return text

    def to_html(self, path: str | os.PathLike[str] | None = None) -> str:
        """One self-contained HTML page, also written to `path` if given."""
        from .html import report_page

        text = report_page(self)
        if path is not None:
            write_text(path, text)
        return text


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes `text` to `path` by way of a temporary file, so that no half-written file is ever seen."""
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, target)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise TwofourError(f"cannot write {target}: {error.strerror or error}.") from error


def format_value(value: Any, kind: Kind) -> str:
    """How a value is shown to people: '-' for nothing, two to four digits for numbers."""
    if value is None:
        return "-"
    if kind == "text":
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if kind == "count":
        return f"{value:,}"
    if kind == "bytes":
        return format_bytes(value)
    if kind == "share":
        return f"{100 * value:.1f} %"
    if kind == "ratio":
        return f"{value:.2f}x"
    if kind == "us":
        return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"
    if kind == "seconds":
        return f"{value:.2f}"
    if kind == "loss":
        return f"{value:.3g}"
    return f"{value:.1e}" if value else "0"


def format_bytes(count: float) -> str:
    """1234567 -> '1.23 MB' (decimal units)."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 999.5 or unit == "GB":  # what rounds to 1000 takes the next unit
            return (
                f"{count:.0f} {unit}"
                if unit == "B"
                else f"{count:.3g} {unit}"
                if count < 100
                else f"{count:.0f} {unit}"
            )
        count /= 1000
    raise AssertionError("unreachable")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, str):
        return value
    if isinstance(value, (bytes, bytearray)):
        return value.decode("utf-8", "backslashreplace")
    if isinstance(value, Sequence):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int)):
        return value
    if callable(getattr(value, "tolist", None)):  # tensors, numpy's arrays and scalars
        plain = value.tolist()
        return str(plain) if type(plain) is type(value) else _plain(plain)
    return str(value)

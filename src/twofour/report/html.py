"""Report -> one self-contained HTML page: nothing fetched, for file://, paper and phones; no script but while it grows."""

from __future__ import annotations

import base64
import hashlib
import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal
from xml.etree import ElementTree

import jinja2
from markupsafe import Markup

from ..errors import FormatError, UnsupportedError
from . import plots
from .record import Column, Report, format_value
from .table import _short, shortened

Tone = Literal["plain", "good", "bad"]

_SVG = "http://www.w3.org/2000/svg"
_SVG_SHAPES = {"path", "rect", "circle", "ellipse", "line", "polyline", "polygon", "text", "tspan", "use"}
_SVG_FRAMES = {"svg", "g", "defs", "symbol", "marker", "mask", "pattern", "clipPath", "title", "desc"}
_SVG_PAINTS = {"linearGradient", "radialGradient", "stop"}
_SVG_TAGS = _SVG_SHAPES | _SVG_FRAMES | _SVG_PAINTS
_MOST_BARS = 48
_MOST_ROWS = 200
_LINE = 28
"""Letters of a cell that are not broken."""
_LABEL = 36
"""Letters of a name that fit beside a plot."""


@dataclass(frozen=True, slots=True)
class Paragraph:
    """A paragraph of plain text."""

    kind: ClassVar[str] = "paragraph"
    text: str


@dataclass(frozen=True, slots=True)
class Tile:
    """One number that matters: what it is, the number as it is shown, one line about it.

    Args:
        tone: "good" and "bad" set a colour and a word for readers who do not see it; "plain" neither.
    """

    label: str
    value: str
    detail: str = ""
    tone: Tone = "plain"


@dataclass(frozen=True, slots=True)
class Tiles:
    """Key numbers side by side."""

    kind: ClassVar[str] = "tiles"
    tiles: tuple[Tile, ...]


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of a report, or any rows with the same columns. Columns without a value in any row are left out.

    Args:
        caption: what the table shows; read aloud before it.
        signal: key of a ratio column whose numbers take the colour of a loss below 1x and of a gain above.
        even: ratios nearer to 1 than this take no colour.
    """

    kind: ClassVar[str] = "table"
    columns: tuple[Column, ...]
    rows: tuple[Mapping[str, Any], ...]
    caption: str
    signal: str = ""
    even: float = 1.0

    def tone(self, column: Column, row: Mapping[str, Any]) -> Tone:
        """The colour of a cell."""
        value = row.get(column.key)
        if column.key != self.signal or not isinstance(value, int | float):
            return "plain"
        shown = round(float(value), 2)
        return "plain" if shown == 1 else "good" if shown >= self.even else "bad" if shown <= 1 / self.even else "plain"

    def has_sentences(self, column: Column) -> bool:
        """True for a column of texts too long for one line each."""
        return not column.is_number and any(len(str(row.get(column.key) or "")) > _LINE for row in self.rows)

    @property
    def shown(self) -> tuple[Column, ...]:
        """The columns that hold something."""
        return tuple(
            column for column in self.columns if any(row.get(column.key) not in (None, "") for row in self.rows)
        )


@dataclass(frozen=True, slots=True)
class Plot:
    """An SVG picture with the words that stand for it where it cannot be seen.

    Args:
        svg: as `report.plots` makes it; elements that could run or fetch anything are refused (FormatError).
        alt: what the picture says.
        caption: shown below.
        wide: takes the whole width of the page; otherwise two plots that follow each other stand side by side.
        narrow: of a wide one, what small windows show instead.
    """

    kind: ClassVar[str] = "plot"
    svg: str
    alt: str
    caption: str = ""
    wide: bool = False
    narrow: str = ""


@dataclass(frozen=True, slots=True)
class Facts:
    """Names and what they are: a summary, an environment."""

    kind: ClassVar[str] = "facts"
    facts: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Notes:
    """Sentences that a reader must see."""

    kind: ClassVar[str] = "notes"
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Folded:
    """Blocks that open on a click (and on paper)."""

    kind: ClassVar[str] = "folded"
    title: str
    blocks: tuple[Block, ...]


Block = Paragraph | Tiles | Table | Plot | Facts | Notes | Folded


@dataclass(frozen=True, slots=True)
class Section:
    """A heading and what stands below it."""

    heading: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True, slots=True)
class Growing:
    """Of a page that its run writes again and again: how a browser sees that it goes on, and that it does not.

    Args:
        refresh: seconds after which a browser loads the page anew.
        silence: seconds without a new page after which this one says that its run seems to have been killed.
        written: when the page was made, in seconds since 1970.
    """

    refresh: int
    silence: float
    written: float = field(default_factory=time.time)

    @property
    def when(self) -> str:
        """`written` on the clock of the machine that writes."""
        return time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(self.written)).rstrip()


def page(
    title: str, subtitle: str, sections: Sequence[Section], *, footer: str = "", growing: Growing | None = None
) -> str:
    """One HTML document as text. All texts are escaped; styles and plots are inside; a policy forbids fetching.

    The one script that the policy allows is in growing pages: it compares the clock with the time when the page was made.

    Args:
        title: the heading and the name of the window.
        subtitle: one or two sentences below it.
        sections: the content, in order.
        footer: a line at the end, for instance when and where the numbers were made.
        growing: of a page that will be written anew; None: this is the last.
    Raises:
        FormatError: a plot that is not harmless SVG.
    """
    return _template("page.html").render(
        title=title, subtitle=subtitle, sections=sections, footer=footer, growing=growing
    )


def table_html(report: Report) -> str:
    """A report as a piece of HTML for notebooks: table, summary, notes. Takes the notebook's own colours."""
    table = Table(report.columns, report.rows, f"twofour {report.verb}")
    facts = Facts(report.summary) if report.summary else None
    return _template("fragment.html").render(table=table, facts=facts, notes=report.notes)


def report_page(report: Report, *, growing: Growing | None = None) -> str:
    """A report as a page: summary, notes, pictures (where altair is installed), rows, machine.

    Pictures are bars of the first ratio column, or the curves of a report whose rows are steps. Of very many steps the table
    has every n-th.

    Args:
        growing: of a report that still grows, see `page`.
    """
    sections = []
    overview: list[Block] = []
    if report.summary:
        overview.append(Facts(report.summary))
    if report.notes:
        overview.append(Notes(report.notes))
    if overview:
        sections.append(Section("Summary", tuple(overview)))
    layers: list[Block] = []
    picture = _ratio_plot(report) or _loss_plot(report)
    if picture is not None:
        layers.append(picture)
    curves = _curve_plots(report)
    if curves:
        sections.append(Section("Curves", tuple(curves)))
    if report.rows:
        layers.append(_row_table(report))
        sections.append(Section({"layer": "Layers", "step": "Steps"}.get(report.columns[0].key, "Rows"), tuple(layers)))
    if report.environment:
        sections.append(Section("Where this was made", (Facts(report.environment),)))
    version = report.environment.get("twofour")
    footer = f"Made by twofour {version}." if version else "Made by twofour."
    return page(f"twofour {report.verb}", _told(report), sections, footer=footer, growing=growing)


def safe_svg(svg: str, prefix: str, alt: str) -> str:
    """`svg` as an element of an HTML page: its ids begin with `prefix`, it is one image whose name is `alt`.

    Raises:
        FormatError: not well-formed, not SVG, or with elements or attributes that run or fetch something.
    """
    if "<!" in svg.replace("<!--", ""):
        raise FormatError("a plot must be plain SVG, without a document type or CDATA.")
    try:
        root = ElementTree.fromstring(svg)
    except ElementTree.ParseError as error:
        raise FormatError(f"a plot must be well-formed SVG: {error}.") from None
    if _local(root.tag) != "svg":
        raise FormatError(f"a plot must be an <svg> element, not <{_local(root.tag)}>.")
    for element in root.iter():
        tag = _local(element.tag) if isinstance(element.tag, str) else "?"
        if tag not in _SVG_TAGS:
            raise FormatError(f"a plot must not hold <{tag}>: only shapes and text.")
        element.tag = tag
        for key in list(element.attrib):
            name, value = _local(key), element.attrib.pop(key)
            if name.startswith("on") or _reaches_out(name, value):
                raise FormatError(f"a plot must not hold {name}={value[:60]!r}: it would run or fetch something.")
            if name.startswith("aria-") or name in ("role", "pointer-events", "class"):
                continue  # the picture is one image with one name; its parts have none
            if name == "id":
                value = prefix + value
            element.attrib[name] = (
                re.sub(r"url\(#", f"url(#{prefix}", re.sub(r"^#(?=.*)", f"#{prefix}", value))
                if (name == "href" or "url(#" in value)
                else value
            )
    root.attrib.pop("version", None)
    root.attrib.update({"role": "img", "aria-label": alt, "focusable": "false", "xmlns": _SVG})
    return ElementTree.tostring(root, encoding="unicode", short_empty_elements=True)


def _reaches_out(name: str, value: str) -> bool:
    if name in ("href", "src"):
        return not value.startswith("#")
    return bool(re.search(r"url\(\s*['\"]?(?!#)|javascript:|expression\(|@import", value, re.IGNORECASE))


def _local(tag: str) -> str:
    return tag.rsplit("}", 1)[-1]


def _ratio_plot(report: Report) -> Plot | None:
    ratio = next((column for column in report.columns if column.kind == "ratio"), None)
    name = next((column for column in report.columns if not column.is_number), None)
    if ratio is None or name is None or not plots.available():
        return None
    measured = [row for row in report.rows if isinstance(row.get(ratio.key), int | float)]
    if len(measured) < 2 or len({str(row.get(name.key)) for row in measured}) != len(measured):
        return None
    caption = f"{ratio.title}; the full line is 1x, the dashed one 2x."
    if len(measured) > _MOST_BARS:
        measured = sorted(measured, key=lambda row: float(row[ratio.key]))[:_MOST_BARS]
        caption = f"The {_MOST_BARS} lowest. {caption}"
    ratios = {str(row.get(name.key)): float(row[ratio.key]) for row in measured}
    labels, without = _labels(list(ratios))
    caption += without
    low, high = min(ratios, key=ratios.__getitem__), max(ratios, key=ratios.__getitem__)
    alt = f"{ratio.title} of {len(ratios)} rows: from {ratios[low]:.2f}x ({low}) to {ratios[high]:.2f}x ({high})."
    bars = dict(zip(labels, ratios.values(), strict=True))
    try:
        wide, narrow = (
            plots.ratio_bars(bars, x_title=ratio.title, width=width) for width in (plots.WIDE, plots.NARROW)
        )
        return Plot(wide, alt, caption, wide=True, narrow=narrow)
    except UnsupportedError:  # installed, but it cannot be imported
        return None


def _loss_plot(report: Report) -> Plot | None:
    """Bars of the loss columns, one colour for each, layers from top to bottom."""
    losses = [column for column in report.columns if column.kind == "loss"]
    measured = [row for row in report.rows if any(isinstance(row.get(column.key), float) for column in losses)]
    if not losses or not measured or report.columns[0].key != "layer" or not plots.available():
        return None
    caption = "How much the loss grows when one layer alone is pruned."
    if len(measured) > _MOST_BARS:
        ranked = sorted(measured, key=lambda row: -max(row.get(column.key) or 0.0 for column in losses))[:_MOST_BARS]
        measured = [row for row in measured if any(row is one for one in ranked)]
        caption = f"The {_MOST_BARS} layers that lose most. {caption}"
    labels, without = _labels([str(row["layer"]) for row in measured])
    caption += without
    values = {
        label: {column.title: max(0.0, float(row[column.key])) for column in losses if column.key in row}
        for label, row in zip(labels, measured, strict=True)
    }
    alt = f"Loss increase of {len(values)} layers."
    try:
        wide, narrow = (
            plots.grouped_bars(
                values,
                value_title="loss +",
                label=lambda value: f"{value:.2g}",
                colours=plots.LINE_PALETTE,
                horizontal=True,
                width=width,
            )
            for width in (plots.WIDE, plots.NARROW)
        )
        return Plot(wide, alt, caption, wide=True, narrow=narrow)
    except UnsupportedError:  # installed, but it cannot be imported
        return None


def _curve_plots(report: Report) -> list[Plot]:
    """All losses in one plot, every share and rate in one of its own, over the steps that are the rows."""
    if not report.rows or report.columns[0].key != "step" or not plots.available():
        return []
    losses = [column for column in report.columns if column.kind == "loss"]
    several = [losses, *([column] for column in report.columns if column.kind in ("share", "error"))]
    found = []
    for columns in several:
        lines = {
            column.title: [
                (float(row["step"]), float(row[column.key]))
                for row in report.rows
                if isinstance(row.get(column.key), int | float) and math.isfinite(row[column.key])
            ]
            for column in columns
        }
        lines = {name: points for name, points in lines.items() if points}
        if not lines:
            continue
        name = "loss" if columns is losses else columns[0].title
        last = ", ".join(f"{line} {format_value(points[-1][1], columns[0].kind)}" for line, points in lines.items())
        caption = f"{name[:1].upper()}{name[1:]}. The last: {last}."
        try:
            svg = plots.curves(lines, y_title=name, kind=columns[0].kind, end=float(report.rows[-1]["step"]))
        except UnsupportedError:  # installed, but it cannot be imported
            return []
        found.append(Plot(svg, f"{caption} Over {_count(len(report.rows), 'row')} of steps.", caption))
    return found


def _row_table(report: Report) -> Table:
    caption = f"twofour {report.verb}, row by row"
    rows = report.rows
    every = -(-len(rows) // _MOST_ROWS)
    if every > 1 and report.columns[0].key == "step":
        rows = (*rows[:-1:every], rows[-1])
        caption = f"twofour {report.verb}, one of {every} rows, and the last"
    return Table(report.columns, rows, caption)


def _labels(names: Sequence[str]) -> tuple[list[str], str]:
    """Dotted names short enough for an axis and still all different, and a sentence on what they leave out."""
    parts = [name.split(".") for name in names]
    shared = 0
    while len(names) > 1 and all(
        len(part) > shared + 1 and part[: shared + 1] == parts[0][: shared + 1] for part in parts
    ):
        shared += 1
    labels = [shortened(".".join(part[shared:]), _LABEL) for part in parts]
    if len(set(labels)) != len(set(names)):
        return list(names), ""
    return labels, f" Names begin with {'.'.join(parts[0][:shared])}." if shared else ""


def _told(report: Report) -> str:
    """How much the rows tell of what: '40 layers', '1,000 steps in 100 rows'."""
    key, count = report.columns[0].key if report.columns else "", len(report.rows)
    if key == "layer":
        return _count(len({row.get(key) for row in report.rows}), "layer")
    if key != "step" or not count:
        return _count(count, "row")
    done = report.summary.get("steps", report.rows[-1]["step"])  # the last may be in no row yet
    return _count(done, "step") if done == count else f"{_count(done, 'step')} in {_count(count, 'row')}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


@lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("twofour.report", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["shown"] = format_value
    environment.globals["short"] = lambda name, value: _short(str(name), value)
    script = (Path(__file__).parent / "templates" / "growing.js").read_text(encoding="utf-8")
    environment.globals["script"] = Markup(script)
    environment.globals["digest"] = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment.globals["count"] = _count
    environment.globals["svg"] = lambda text, prefix, alt: Markup(safe_svg(text, prefix, alt))
    return environment


def _template(name: str) -> jinja2.Template:
    return _environment().get_template(name)

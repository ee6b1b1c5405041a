"""Numbers -> SVG text. Vega-Lite by way of altair and vl-convert (extra `report`), without a browser or a network.

Every plot has a transparent ground and draws its axes and words in `currentColor`, so that it is legible on light and
dark pages; series take the colours of Okabe and Ito, moved to middle lightness, which colour-blind readers tell apart.
Words stay text: they can be searched, copied and read aloud.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import TwofourError, UnsupportedError
from .record import Kind, format_value, write_text

GREY, BLUE, VERMILION, GREEN, PURPLE, OCHRE = "#8a929c", "#3d8fc6", "#d8622a", "#1d9a78", "#b9749f", "#b98a12"
PALETTE = (GREY, BLUE, VERMILION)
"""Series of bars: the dense rivals first, the sparse one last."""
LINE_PALETTE = (VERMILION, BLUE, GREEN, PURPLE, OCHRE, GREY)
BYTE_BOUND = {"float32": 32 / 17, "bfloat16": 16 / 9, "float16": 16 / 9}
"""Dense bytes per 2:4 byte: what a kernel can gain where reading weights is all it does."""
COMPUTE_BOUND = 2.0
"""Half of the products: what a 2:4 kernel can gain where arithmetic is all it does."""

_INK = "currentColor"
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"
_POINTS, _DOTS = 300, 40
"""The most points of a curve, and the most that are marked each."""
NARROW, WIDE = 400, 830
"""Widths of plots, axis and words included: text stays readable on a phone, or fills the column of a page."""
_FEW_BARS = 16
"""So many are thick."""
_SIZE = 11.5
"""Of letters, in pixels."""
_AXIS, _KEY, _KEY_GAP, _LONGEST, _NUMBER = 60, 18, 26, 250, 44
"""Pixels of an axis of numbers, of the symbol of a key, between two of them, of the longest name and number of a bar."""
_THIN, _BROAD = frozenset("iljtfrI.,:;'|!()[]/ -"), frozenset("mwMW%@…")


def grouped_bars(
    values: Mapping[str, Mapping[str, float]],
    *,
    group_title: str = "",
    value_title: str = "",
    spread: Mapping[str, Mapping[str, tuple[float, float]]] | None = None,
    label: Callable[[float], str] = lambda value: f"{value:,.0f}",
    colours: Sequence[str] = PALETTE,
    horizontal: bool = False,
    width: int = NARROW,
) -> str:
    """SVG text: bars side by side, for instance sentences per second by batch size for two rivals and one sparse model.

    Args:
        values: {group: {series: value}}; order is kept; a value that is missing leaves a gap.
        group_title, value_title: what groups and values are, with the unit.
        spread: {group: {series: (low, high)}}, drawn as thin lines.
        label: how a value is written at its bar.
        colours: one for each series, in order.
        horizontal: groups from top to bottom instead of left to right.
        width: `NARROW` or `WIDE`.
    Raises:
        UnsupportedError: altair or vl-convert is not installed.
        TwofourError: there is nothing to draw.
    """
    alt = _altair()
    groups = list(values)
    series = list(dict.fromkeys(name for row in values.values() for name in row))
    rows: list[dict[str, Any]] = [
        {
            "group": group,
            "series": name,
            "value": value,
            "label": label(value),
            "low": (spread or {}).get(group, {}).get(name, (None, None))[0],
            "high": (spread or {}).get(group, {}).get(name, (None, None))[1],
        }
        for group, row in values.items()
        for name, value in row.items()
        if _finite(value)
    ]
    _require(rows)
    top = max([row["value"] for row in rows] + [row["high"] for row in rows if row["high"] is not None])
    room = width - (_extent(groups) + 12 if horizontal else _AXIS)
    band = (
        _names_axis(alt, groups) if horizontal else alt.Axis(labelAngle=0, ticks=False, labelLimit=150, labelPadding=6)
    )
    number = alt.Axis(tickCount=4, labelExpr="format(datum.value, ',.5~r')") if not horizontal else None
    sort = {"sort": groups, "title": group_title or None}
    scale = alt.Scale(domain=[0, top * (1.3 if horizontal else 1.08)], nice=False)
    offset_scale = alt.Scale(paddingInner=0.12)
    chart = alt.Chart(alt.Data(values=rows))
    legend = alt.Legend(orient="top", title=None, columns=_legend_columns(series, room), symbolType="square")
    colour = alt.Color(
        "series:N", sort=series, scale=alt.Scale(domain=series, range=list(colours)[: len(series)]), legend=legend
    )
    if horizontal:
        place: dict[str, Any] = {
            "y": alt.Y("group:N", axis=band, scale=alt.Scale(paddingInner=0.28, paddingOuter=0.1), **sort),
            "yOffset": alt.YOffset("series:N", sort=series, scale=offset_scale),
        }
        value = {"x": alt.X("value:Q", axis=number, scale=scale, title=value_title or None)}
        limits = {"x": alt.X("low:Q", axis=number, scale=scale), "x2": alt.X2("high:Q")}
        words = {"align": "left", "dx": 5}
    else:
        place = {
            "x": alt.X("group:N", axis=band, scale=alt.Scale(paddingInner=0.2, paddingOuter=0.08), **sort),
            "xOffset": alt.XOffset("series:N", sort=series, scale=offset_scale),
        }
        value = {"y": alt.Y("value:Q", axis=number, scale=scale, title=value_title or None)}
        limits = {"y": alt.Y("low:Q", axis=number, scale=scale), "y2": alt.Y2("high:Q")}
        words = {"baseline": "bottom", "dy": -4}
    layers = [chart.mark_bar(cornerRadiusEnd=2).encode(color=colour, **place, **value)]
    if any(row["low"] is not None for row in rows):
        bounded = chart.transform_filter("isValid(datum.low)")
        layers.append(bounded.mark_rule(color=_INK, opacity=0.55, strokeWidth=1.2).encode(**place, **limits))
    anchor = {"x": alt.X("edge:Q", scale=scale)} if horizontal else {"y": alt.Y("edge:Q", scale=scale)}
    layers.append(
        chart.transform_calculate(edge="max(datum.value, datum.high || 0)")
        .mark_text(color=_INK, fontSize=11, **words)
        .encode(text="label:N", **place, **anchor)
    )
    bar, gap = (26, 14) if len(rows) <= _FEW_BARS else (15, 8)
    return _svg(alt.layer(*layers), bar * len(rows) + gap * len(groups) if horizontal else 220, width)


def ratio_lines(
    lines: Mapping[str, Sequence[tuple[float, float]]],
    *,
    x_title: str = "tokens",
    y_title: str = "speed against dense",
    ideals: Mapping[str, float] | None = None,
) -> str:
    """SVG text: a ratio against tokens, one line for each layer shape; the axis of tokens is logarithmic (base 2).

    Draws what a 2:4 kernel can gain at best as dashed lines, 1x as a full line, and shades what lies below: slower than
    dense.

    Args:
        lines: {name: [(tokens, ratio), ...]}.
        ideals: {name: ratio} of the dashed lines; None draws `COMPUTE_BOUND`.
    Raises:
        UnsupportedError: altair or vl-convert is not installed.
        TwofourError: there is nothing to draw.
    """
    alt = _altair()
    if ideals is None:
        ideals = {"half the products": COMPUTE_BOUND}
    rows: list[dict[str, Any]] = [
        {"line": name, "x": x, "y": y} for name, points in lines.items() for x, y in points if _finite(x) and _finite(y)
    ]
    _require(rows)
    xs, ys = [row["x"] for row in rows], [row["y"] for row in rows]
    low = min(0.5, math.floor(min(ys) * 4) / 4)
    high = max(max(ideals.values(), default=1) + 0.25, max(ys) * 1.06)
    names = list(lines)
    ticks = [2**power for power in range(math.floor(math.log2(min(xs))), math.ceil(math.log2(max(xs))) + 1)]
    x = alt.X(
        "x:Q",
        title=x_title,
        scale=alt.Scale(type="log", base=2, domain=[min(xs), max(xs)]),
        axis=alt.Axis(values=ticks[:: 2 if len(ticks) > 8 else 1], grid=False, format=",d"),
    )
    scale = alt.Scale(domain=[low, high], nice=False, zero=False)
    y = alt.Y(
        "y:Q", title=y_title, scale=scale, axis=alt.Axis(tickCount=5, labelExpr="format(datum.value, '.2~f') + 'x'")
    )
    chart = alt.Chart(alt.Data(values=rows))
    slower = alt.Chart(alt.Data(values=[{"low": low, "high": 1, "text": "slower than dense", "x": min(xs)}]))
    highest = max(ideals.values(), default=0)
    bounds = alt.Chart(
        alt.Data(
            values=[
                {"y": bound, "x": max(xs), "text": f"{name}: {bound:.2f}x", "above": bound == highest}
                for name, bound in ideals.items()
            ]
        )
    )
    bound_words = {"color": _INK, "align": "right", "dx": -2, "fontSize": 11, "opacity": 0.85}
    key = alt.Legend(orient="top", title=None, columns=_legend_columns(names))
    colour = alt.Color(
        "line:N", sort=names, scale=alt.Scale(domain=names, range=_cycle(LINE_PALETTE, names)), legend=key
    )
    shapes = ["circle", "square", "triangle-up", "diamond", "cross", "triangle-down"]
    shape = alt.Shape("line:N", sort=names, scale=alt.Scale(domain=names, range=_cycle(shapes, names)), legend=key)
    layers = [
        slower.mark_rect(color=_INK, opacity=0.08).encode(y=alt.Y("low:Q", title=y_title, scale=scale), y2="high:Q"),
        slower.mark_rule(color=_INK, strokeWidth=1.2).encode(y="high:Q"),
        slower.mark_text(color=_INK, align="left", baseline="bottom", dx=6, dy=-6, fontSize=11, opacity=0.85).encode(
            x="x:Q", y="low:Q", text="text:N"
        ),
        bounds.mark_rule(color=_INK, strokeDash=[5, 4], opacity=0.75).encode(y="y:Q"),
        *(
            bounds.transform_filter(f"{'' if above else '!'}datum.above")
            .mark_text(baseline="bottom" if above else "top", dy=-3 if above else 4, **bound_words)
            .encode(x="x:Q", y="y:Q", text="text:N")
            for above in (True, False)
        ),
        chart.mark_line(strokeWidth=2.2, clip=True).encode(x=x, y=y, color=colour),
        chart.mark_point(filled=True, size=46, opacity=1).encode(x=x, y=y, color=colour, shape=shape),
    ]
    return _svg(alt.layer(*layers), 230)


def ratio_bars(
    ratios: Mapping[str, float | None],
    *,
    x_title: str = "speed against dense",
    ideal: float | None = COMPUTE_BOUND,
    label: Callable[[float], str] = lambda ratio: format_value(ratio, "ratio"),
    width: int = NARROW,
) -> str:
    """SVG text: one horizontal bar for each layer, with a full line at 1x and a dashed one at the ideal.

    Bars below 1x are grey: the layer is slower than dense. A layer without a number has a name and no bar.

    Args:
        ratios: {layer: ratio or None}, drawn from top to bottom in this order.
        ideal: where to draw the dashed line; None draws none.
        width: `NARROW` or `WIDE`.
    Raises:
        UnsupportedError: altair or vl-convert is not installed.
        TwofourError: there is nothing to draw.
    """
    alt = _altair()
    names = list(ratios)
    rows: list[dict[str, Any]] = [
        {"name": name, "ratio": ratio, "label": label(ratio), "side": "faster than dense" if ratio >= 1 else "slower"}
        if ratio is not None and _finite(ratio)
        else {"name": name, "ratio": None, "label": "-", "side": "slower"}
        for name, ratio in ratios.items()
    ]
    numbers = [row["ratio"] for row in rows if isinstance(row["ratio"], float | int)]
    _require(numbers)
    room = width - _extent(names) - 12
    high = max([*numbers, ideal or 1]) / (1 - max(_NUMBER, room / 6) / room)
    place = alt.Y(
        "name:N",
        sort=names,
        title=None,
        scale=alt.Scale(paddingInner=0.25),
        axis=_names_axis(alt, names),
    )
    length = alt.X(
        "ratio:Q",
        title=x_title,
        scale=alt.Scale(domain=[0, high], nice=False),
        axis=alt.Axis(tickCount=5, labelExpr="format(datum.value, '.2~f') + 'x'"),
    )
    chart = alt.Chart(alt.Data(values=rows))
    colour = alt.condition("datum.ratio >= 1", alt.value(VERMILION), alt.value(GREY))
    lines = [{"at": 1.0, "kind": "dense"}] + ([] if ideal is None else [{"at": ideal, "kind": "ideal"}])
    guides = alt.Chart(alt.Data(values=lines))
    layers = [
        chart.mark_bar(cornerRadiusEnd=2).encode(y=place, x=length, color=colour),
        guides.transform_filter("datum.kind == 'dense'").mark_rule(color=_INK, strokeWidth=1.2).encode(x="at:Q"),
        guides.transform_filter("datum.kind == 'ideal'")
        .mark_rule(color=_INK, strokeDash=[5, 4], opacity=0.75)
        .encode(x="at:Q"),
        # Numbers stand in a column of their own, where no line crosses them.
        chart.mark_text(color=_INK, align="right", fontSize=11)
        .transform_calculate(end=str(high))
        .encode(y=place, x=alt.X("end:Q", title=x_title), text="label:N"),
    ]
    return _svg(alt.layer(*layers), 18 * len(rows), width)


def curves(
    lines: Mapping[str, Sequence[tuple[float, float]]],
    *,
    x_title: str = "step",
    y_title: str = "",
    kind: Kind = "loss",
    end: float | None = None,
) -> str:
    """SVG text: numbers over the steps of something that goes on, one line each; what is not finite leaves no point.

    The axis is logarithmic where losses span more than a factor of 20. Of long lines every n-th point is drawn, and the last.

    Args:
        lines: {name: [(step, value), ...]}; a name alone has no key.
        kind: how values are written: "share" in percent, "error" with an exponent.
        end: where the axis of steps ends; None: at the last.
    Raises:
        UnsupportedError: altair or vl-convert is not installed.
        TwofourError: there is nothing to draw.
    """
    alt = _altair()
    rows: list[dict[str, Any]] = [
        {"line": name, "x": x, "y": y} for name, points in lines.items() for x, y in _thinned(points) if _finite(y)
    ]
    _require(rows)
    names = [name for name in lines if any(row["line"] == name for row in rows)]
    values = [row["y"] for row in rows]
    wide = kind == "loss" and min(values) > 0 and max(values) > 20 * min(values)
    written = {"share": ".3~p", "error": ".1~e"}.get(kind, ".3~g")
    scale = alt.Scale(type="log", nice=False) if wide else alt.Scale(zero=kind != "loss", nice=True)
    key = alt.Legend(orient="top", title=None, columns=_legend_columns(names)) if len(names) > 1 else None
    colour = alt.Color(
        "line:N", sort=names, scale=alt.Scale(domain=names, range=_cycle(LINE_PALETTE, names)), legend=key
    )
    steps = alt.Scale(domain=[0, max(row["x"] for row in rows) if end is None else end], nice=False)
    x = alt.X("x:Q", title=x_title, scale=steps, axis=alt.Axis(grid=False, tickCount=6, format=",d"))
    ticks = {"values": _decades(min(values), max(values))} if wide else {"tickCount": 5}
    y = alt.Y("y:Q", title=y_title or None, scale=scale, axis=alt.Axis(format=written, **ticks))
    chart = alt.Chart(alt.Data(values=rows))
    layers = [chart.mark_line(strokeWidth=1.8).encode(x=x, y=y, color=colour)]
    few = [name for name in names if sum(row["line"] == name for row in rows) <= _DOTS]
    if few:
        dots = chart.transform_filter(alt.FieldOneOfPredicate("line", few)).mark_point(filled=True, size=26, opacity=1)
        layers.append(dots.encode(x=x, y=y, color=colour))
    return _svg(alt.layer(*layers), 200)


def svg_file(path: str | os.PathLike[str], svg: str) -> Path:
    """Writes the text of a plot to `path` (by way of a temporary file) and returns the path."""
    write_text(path, svg if svg.endswith("\n") else svg + "\n")
    return Path(path)


def available() -> bool:
    """True where plots can be drawn: altair and vl-convert are installed."""
    from importlib.util import find_spec

    return find_spec("altair") is not None and find_spec("vl_convert") is not None


def require() -> None:
    """Nothing where plots can be drawn.

    Raises:
        UnsupportedError: altair or vl-convert is not installed; says how to get them.
    """
    _altair()


def _altair() -> Any:
    try:
        import altair
        import vl_convert  # noqa: F401
    except ImportError as error:
        raise UnsupportedError(
            f"plots need altair and vl-convert, and '{error.name}' is not installed.\n  pip install 'twofour[report]'"
        ) from None
    return altair


def _svg(chart: Any, height: int, width: int = NARROW) -> str:
    import vl_convert

    chart = (
        chart.properties(width=width, height=height, autosize={"type": "fit-x", "contains": "padding"})
        .configure(background="transparent", font=_FONT, padding=6)
        .configure_view(stroke=None)
        .configure_axis(
            labelColor=_INK,
            titleColor=_INK,
            tickColor=_INK,
            domainColor=_INK,
            gridColor=_INK,
            gridOpacity=0.13,
            tickOpacity=0.5,
            domainOpacity=0.5,
            labelFontSize=_SIZE,
            titleFontSize=_SIZE,
            titleFontWeight="normal",
            titlePadding=8,
        )
        .configure_legend(
            labelColor=_INK, labelFontSize=_SIZE, labelLimit=300, symbolSize=90, columnPadding=_KEY_GAP, offset=8
        )
    )
    svg: str = vl_convert.vegalite_to_svg(chart.to_dict())
    # Without a page around it the plot needs an ink of its own: the grey that is legible on white and on black.
    return re.sub(r"<svg ", '<svg color="#767676" ', svg, count=1)


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _decades(low: float, high: float) -> list[float]:
    """1, 2 and 5 of every power of ten between; 1 alone where there are many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    leading = (1, 2, 5) if len(powers) <= 4 else (1,)
    return [x for power in powers for digit in leading if low <= (x := digit * 10.0**power) <= high]


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    every = -(-len(points) // _POINTS) or 1
    return [*points[: len(points) - 1 : every], *points[-1:]]


def _cycle(items: Sequence[str], names: Sequence[str]) -> list[str]:
    return [items[index % len(items)] for index in range(len(names))]


def _legend_columns(names: Sequence[str], room: int = NARROW - _AXIS) -> int:
    """How many of a key stand side by side above a plot so wide: all, two or one."""
    widths = [_room(name) + _KEY for name in names]
    if sum(widths) + _KEY_GAP * (len(names) - 1) <= room:
        return len(names)
    return 2 if max(widths[::2]) + max(widths[1::2]) + _KEY_GAP <= room else 1


def _names_axis(alt: Any, names: Sequence[str]) -> Any:
    """Of names from top to bottom, with room for them in the font of the reader, which may be broader than the one here."""
    return alt.Axis(ticks=False, domain=False, labelLimit=_LONGEST, labelPadding=6, minExtent=_extent(names))


def _extent(names: Sequence[str]) -> int:
    return 6 + math.ceil(min(_LONGEST, max(map(_room, names))))


def _room(text: str) -> float:
    """Pixels of a text in a broad font (DejaVu Sans, Verdana), at least."""
    return _SIZE * sum(0.38 if letter in _THIN else 0.98 if letter in _BROAD else 0.62 for letter in text)


def _require(rows: Sequence[object]) -> None:
    if not rows:
        raise TwofourError("a plot needs at least one number, and none was given.")

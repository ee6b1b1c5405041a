"""Plots: well-formed SVG, words as text, honest lines, and a way out where altair is missing."""

from __future__ import annotations

import builtins
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from twofour.errors import TwofourError, UnsupportedError
from twofour.report import plots
from twofour.report.html import safe_svg

BARS = {
    "1": {"dense, torch": 100.0, "dense, oneDNN": 150.0, "2:4 sparse": 210.0},
    "64": {"dense, torch": 300.0, "2:4 sparse": 1910.0},
}
LINES = {"384x384": [(1, 1.2), (16, 0.7), (1024, 1.5)], "1536x384": [(1, 1.1), (1024, 1.6)]}
CURVES = {"loss": [(i, 3 - i / 20) for i in range(40)], "validation loss": [(0, 3.0), (39, math.nan), (40, 2.0)]}
RATIOS = {"0 query": 0.62, "0 key": 1.25, "0 <b>&": None}

draw = {
    "bars": lambda: plots.grouped_bars(
        BARS, spread={"64": {"2:4 sparse": (1800.0, 2000.0)}}, value_title="sentences/s"
    ),
    "horizontal bars": lambda: plots.grouped_bars(BARS, horizontal=True),
    "lines": lambda: plots.ratio_lines(LINES, ideals={"half the products": 2.0, "fewer bytes": 1.88}),
    "ratios": lambda: plots.ratio_bars(RATIOS),
    "curves": lambda: plots.curves(CURVES, y_title="loss <b>&", end=50),
    "shares": lambda: plots.curves({"density": [(1, 1.0), (9, 0.5)]}, kind="share"),
    "steep curves": lambda: plots.curves({"loss": [(i, 10.0**-i) for i in range(1, 4)]}),
}


@pytest.fixture
def _drawing() -> None:
    pytest.importorskip("altair", reason="needs altair (twofour[report])")
    pytest.importorskip("vl_convert", reason="needs vl-convert (twofour[report])")


def texts(svg: str) -> list[str]:
    return [
        "".join(element.itertext()) for element in ElementTree.fromstring(svg).iter() if element.tag.endswith("}text")
    ]


@pytest.mark.usefixtures("_drawing")
@pytest.mark.parametrize("name", draw)
def test_is_svg_for_any_ground(name: str) -> None:
    svg = draw[name]()
    root = ElementTree.fromstring(svg)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert root.attrib["color"] == "#767676"
    assert "currentColor" in svg
    assert not re.search(r'(fill|stroke)="(#000|black|#fff|white)', svg)
    assert float(root.attrib["width"]) <= 420
    assert set(re.findall(r"https?://[^\"']+", svg)) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert 'role="img"' in safe_svg(svg, "p-", "alt")


@pytest.mark.usefixtures("_drawing")
def test_bars_say_their_values() -> None:
    said = texts(draw["bars"]())
    for word in ("100", "150", "210", "300", "1,910", "dense, torch", "dense, oneDNN", "2:4 sparse", "sentences/s"):
        assert word in said


@pytest.mark.usefixtures("_drawing")
def test_lines_show_the_ideals_and_the_losses() -> None:
    said = texts(draw["lines"]())
    for word in (
        "half the products: 2.00x",
        "fewer bytes: 1.88x",
        "slower than dense",
        "384x384",
        "1536x384",
        "1x",
        "tokens",
    ):
        assert word in said
    assert "stroke-dasharray" in draw["lines"]()


@pytest.mark.usefixtures("_drawing")
def test_lines_draw_the_compute_bound_by_themselves() -> None:
    assert "half the products: 2.00x" in texts(plots.ratio_lines(LINES))


@pytest.mark.usefixtures("_drawing")
def test_bars_of_slower_layers_are_grey_and_missing_ones_named() -> None:
    svg = draw["ratios"]()
    said = texts(svg)
    assert {"0.62x", "1.25x", "-", "0 <b>&"} <= set(said)
    assert svg.count(f'fill="{plots.GREY}"') == 1
    assert svg.count(f'fill="{plots.VERMILION}"') == 1


@pytest.mark.usefixtures("_drawing")
@pytest.mark.parametrize(
    "nothing",
    [
        lambda: plots.grouped_bars({}),
        lambda: plots.grouped_bars({"a": {"b": math.nan}}),
        lambda: plots.ratio_lines({"a": []}),
        lambda: plots.ratio_bars({"a": None}),
    ],
)
def test_nothing_to_draw_is_an_error(nothing: Callable[[], str]) -> None:
    with pytest.raises(TwofourError, match="at least one number"):
        nothing()


@pytest.mark.usefixtures("_drawing")
def test_a_file_holds_the_text(tmp_path: Path) -> None:
    svg = draw["ratios"]()
    path = plots.svg_file(tmp_path / "ratios.svg", svg)
    assert path.read_text(encoding="utf-8") == svg + "\n"
    assert [entry.name for entry in tmp_path.iterdir()] == ["ratios.svg"]


def test_byte_bounds_are_those_of_the_format() -> None:
    assert plots.BYTE_BOUND["float32"] == 64 / 34  # 4 weights of 4 bytes -> 2 weights and 4 bits
    assert plots.BYTE_BOUND["bfloat16"] == pytest.approx(64 / 36)


@pytest.mark.parametrize("missing", ["altair", "vl_convert"])
def test_missing_extras_name_the_way_out(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def importing(name: str, *rest: Any, **named: Any) -> Any:
        if name.partition(".")[0] == missing:
            raise ModuleNotFoundError(f"No module named {name!r}", name=missing)
        return real(name, *rest, **named)

    pytest.importorskip("altair" if missing == "vl_convert" else "vl_convert", reason="needs the other one")
    monkeypatch.delitem(sys.modules, missing, raising=False)
    monkeypatch.setattr(builtins, "__import__", importing)
    with pytest.raises(UnsupportedError, match=rf"'{missing}' is not installed.\n  pip install 'twofour\[report\]'"):
        plots.ratio_bars({"a": 1.0})
    with pytest.raises(UnsupportedError, match="twofour\\[report\\]"):
        plots.require()


@pytest.mark.usefixtures("_drawing")
def test_curves_have_a_key_where_there_are_several_and_axes_of_their_kind() -> None:
    said = texts(draw["curves"]())
    assert {"loss", "validation loss", "step", "loss <b>&", "50"} <= set(said)
    said = texts(draw["shares"]())
    assert "density" not in said
    assert {"0%", "100%"} <= set(said)
    said = texts(draw["steep curves"]())
    assert {"0.1", "0.01", "0.001"} <= set(said)
    assert "0.05" in said
    few = texts(plots.curves({"rate": [(0, 0.0), (1, 2e-4)]}, kind="error"))
    assert "2e-4" in few or "2.0e-4" in few


@pytest.mark.usefixtures("_drawing")
def test_long_curves_are_thinned_and_keep_their_ends() -> None:
    points = [(float(i), float(i % 7 + 1)) for i in range(10_000)]
    found = plots._thinned(points)
    assert len(found) <= 301
    assert found[0] == points[0]
    assert found[-1] == points[-1]
    assert plots._thinned(points[:1]) == points[:1]
    assert plots._thinned([]) == []
    assert len(plots.curves({"loss": points})) < 30_000
    with pytest.raises(TwofourError, match="at least one number"):
        plots.curves({"loss": [(1, math.inf)]})

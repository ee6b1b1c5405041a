"""Pages: escaped, self-contained, well formed."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest

from twofour.errors import FormatError
from twofour.report import Column, Report
from twofour.report.html import (
    Facts,
    Folded,
    Growing,
    Notes,
    Paragraph,
    Plot,
    Section,
    Table,
    Tile,
    Tiles,
    page,
    report_page,
    safe_svg,
    table_html,
)
from twofour.report.live import LivePage

HOSTILE = "<script>alert('x')</script> & \"quoted\""
COLUMNS = (
    Column("layer", "layer"),
    Column("kernel", "kernel"),
    Column("speed", "against dense", "ratio"),
    Column("bytes", "size", "bytes"),
)
ROWS = (
    {"layer": "encoder.0", "kernel": HOSTILE, "speed": 1.5, "bytes": 1_234_567},
    {"layer": "encoder.1", "kernel": "dense", "speed": 0.5, "bytes": 10},
    {"layer": "encoder.2", "kernel": "dense"},
)
SVG = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 4 4"><rect id="r" width="4" height="4"/></svg>'
VOID = {"meta", "link", "br", "img", "hr", "input"}


class Reader(HTMLParser):
    """Checks that tags are balanced, and collects what a browser would fetch or run."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.outside: list[str] = []
        self.texts: list[str] = []
        self.ids: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            inside = (value or "").startswith(("#", "data:"))
            if name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster") and not inside:
                self.outside.append(f"<{tag} {name}={value}>")
            assert not name.startswith("on"), f"<{tag} {name}=...> would run something"

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def require_self_contained(text: str, scripts: int = 0) -> Reader:
    """Nothing in the page points outside or imports, and no more runs than the policy allows."""
    found = Reader(text)
    assert found.outside == []
    assert found.tags.count("script") == text.count("script-src 'sha256-") == scripts
    styles = "".join(re.findall(r"<style>(.*?)</style>", text, re.DOTALL))
    assert not re.search(r"@import|url\(", styles)
    addresses = set(re.findall(r"https?://[^\s\"'<>]+", text))
    assert addresses <= {"http://www.w3.org/2000/svg"}  # the name of a namespace; nothing asks for it
    return found


def everything() -> Iterator[Section]:
    table = Table(COLUMNS, ROWS, f"caption {HOSTILE}", signal="speed")
    yield Section(f"heading {HOSTILE}", (Paragraph(f"paragraph {HOSTILE}"), Notes((f"note {HOSTILE}",))))
    yield Section("tiles", (Tiles((Tile(HOSTILE, f"value {HOSTILE}", f"detail {HOSTILE}", "bad"),)),))
    yield Section("plots", (Plot(SVG, f"alt {HOSTILE}", f"shown {HOSTILE}"), Plot(SVG, "second"), table))
    yield Section("rest", (Facts({f"name {HOSTILE}": f"fact {HOSTILE}"}), Folded(f"more {HOSTILE}", (table,))))


def test_every_text_is_escaped() -> None:
    text = page(f"title {HOSTILE}", f"subtitle {HOSTILE}", list(everything()), footer=f"footer {HOSTILE}")
    found = require_self_contained(text)
    assert "<script" not in text
    places = "title subtitle heading paragraph note value detail caption shown name fact more footer"
    for place in places.split():
        assert f"{place} <script>alert('x')</script>" in found.text


def test_page_is_one_document_with_a_policy_and_headings() -> None:
    text = page("t", "", list(everything()))
    found = require_self_contained(text)
    assert text.lstrip().startswith("<!doctype html>")
    assert "default-src &#39;none&#39;" in text or "default-src 'none'" in text
    assert [found.tags.count(tag) for tag in ("h1", "h2", "main", "style")] == [1, 4, 1, 1]
    assert 'lang="en"' in text
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text


def test_tables_have_captions_and_scopes_and_formatted_numbers() -> None:
    text = page("t", "", [Section("s", (Table(COLUMNS, ROWS, "what it shows", signal="speed"),))])
    assert "<caption>what it shows</caption>" in text
    assert text.count('scope="col"') == 4
    assert text.count('scope="row"') == 3
    assert '<td class="number good">1.50x</td>' in text
    assert '<td class="number bad">0.50x</td>' in text
    assert '<td class="number plain">1.23 MB</td>' in text
    assert '<td class="number plain">-</td>' in text


def test_columns_without_values_are_left_out() -> None:
    table = Table((*COLUMNS, Column("nothing", "nothing")), ROWS, "c")
    assert [column.key for column in table.shown] == ["layer", "kernel", "speed", "bytes"]


def test_ratios_that_are_even_take_no_colour() -> None:
    column = COLUMNS[2]
    table = Table(COLUMNS, ROWS, "c", signal="speed", even=1.03)
    tones = [table.tone(column, {"speed": speed}) for speed in (1.03, 1.029, 1.0, 0.98, 0.97)]
    assert tones == ["good", "good", "plain", "plain", "bad"]
    assert table.tone(COLUMNS[3], {"bytes": 1}) == "plain"


def test_two_plots_of_one_page_do_not_share_ids() -> None:
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg"><defs><clipPath id="clip0"><rect width="1"/></clipPath></defs>'
        '<g clip-path="url(#clip0)"/><use href="#clip0"/></svg>'
    )
    text = page("t", "", [Section("s", (Plot(svg, "one"), Plot(svg, "two")))])
    ids = [name for name in Reader(text).ids if name.endswith("clip0")]
    assert len(set(ids)) == 2
    for name in ids:
        assert f'clip-path="url(#{name})"' in text
        assert f'href="#{name}"' in text


def test_a_plot_is_one_image_with_a_name() -> None:
    text = safe_svg(SVG, "p-", 'says "so" <b>')
    assert 'role="img"' in text
    assert 'aria-label="says &quot;so&quot; &lt;b&gt;"' in text


@pytest.mark.parametrize(
    ("svg", "fault"),
    [
        ("<svg><script>1</script></svg>", "<script>"),
        ("<svg><foreignObject/></svg>", "<foreignObject>"),
        ("<svg><image href='x.png'/></svg>", "<image>"),
        ("<svg><style>@import 'x'</style></svg>", "<style>"),
        ("<svg onload='x()'/>", "onload"),
        ("<svg><use href='https://example.org/a.svg#b'/></svg>", "href"),
        ("<svg><rect fill='url(https://example.org/a)'/></svg>", "fill"),
        ("<svg><rect style='background: URL( \"//example.org\")'/></svg>", "style"),
        ("<svg><rect fill='javascript:x'/></svg>", "fill"),
        ("<!DOCTYPE svg [<!ENTITY a 'b'>]><svg>&a;</svg>", "document type"),
        ("<svg>", "well-formed"),
        ("<html/>", "an <svg> element, not <html>"),
    ],
)
def test_a_plot_that_could_run_or_fetch_something_is_refused(svg: str, fault: str) -> None:
    with pytest.raises(FormatError, match=re.escape(fault)):
        page("t", "", [Section("s", (Plot(svg, "alt"),))])
    with pytest.raises(FormatError, match=re.escape(fault)):
        page("t", "", [Section("s", (Plot(SVG, "alt", wide=True, narrow=svg),))])


def test_small_windows_have_a_picture_of_their_own() -> None:
    text = page("t", "", [Section("s", (Plot(SVG, "said", wide=True, narrow=SVG),))])
    found = Reader(text)
    assert found.tags.count("svg") == 2
    assert len(found.ids) == len(set(found.ids)) == 4  # of the content, the section, and a shape of each
    assert "<svg" in text[text.index('<div class="large">') : text.index('<div class="small">')]


def report() -> Report:
    return Report("measure", COLUMNS, ROWS, {"total speed": 1.25, HOSTILE: HOSTILE}, (f"note {HOSTILE}",), {"cpu": "x"})


def test_a_report_makes_a_page(tmp_path: Path) -> None:
    target = tmp_path / "report.html"
    text = report().to_html(target)
    assert target.read_text(encoding="utf-8") == text
    found = require_self_contained(text)
    assert "<script" not in text
    for part in ("twofour measure", "total speed", "1.25", f"note {HOSTILE}", "encoder.2", "Where this was made"):
        assert part in found.text


def test_a_report_with_ratios_gets_a_plot() -> None:
    pytest.importorskip("altair", reason="needs altair (twofour[report])")
    pytest.importorskip("vl_convert", reason="needs vl-convert (twofour[report])")
    text = report_page(report())
    assert text.count("<figure") == 1
    assert "from 0.50x (encoder.1) to 1.50x (encoder.0)" in text


def test_layers_of_a_plot_can_be_told_apart() -> None:
    """Long names lose what all share, then letters inside; never what tells one from another."""
    pytest.importorskip("altair")
    pytest.importorskip("vl_convert")
    names = [
        f"model.encoder.layer.{i}.attention_of_the_whole_sequence.self_attention.{x}"
        for i in range(2)
        for x in ("query", "key", "value")
    ]
    columns = (Column("layer", "layer"), Column("loss", "loss +", "loss"))
    rows = tuple({"layer": name, "loss": 0.1 * i} for i, name in enumerate(names))
    text = report_page(Report("t", columns, rows, {}, (), {}))
    figure = text[text.index("<figure") : text.index("</figure>")]
    labels = {word for word in re.findall(r">([^<>]*)</text>", figure) if word.endswith(("query", "key", "value"))}
    assert len(labels) == 6
    assert {label[0] for label in labels} == {"0", "1"}
    assert all(len(label) <= 36 for label in labels)
    assert "Names begin with model.encoder.layer." in figure


def test_a_report_without_plots_is_a_page_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("twofour.report.plots.available", lambda: False)
    text = report_page(report())
    assert "<figure" not in text
    assert "1.50x" in text


def test_a_large_report_draws_its_lowest_ratios_only() -> None:
    pytest.importorskip("altair", reason="needs altair (twofour[report])")
    rows = tuple({"layer": f"layer.{index}", "speed": 1 + index / 100} for index in range(60))
    text = report_page(Report("measure", COLUMNS, rows))
    assert "The 48 lowest." in text
    assert "from 1.00x (layer.0) to 1.47x (layer.47)" in text


def run_of(steps: int) -> Report:
    columns = (
        Column("step", "step", "count"),
        Column("lr", "learning rate", "error"),
        Column("loss", "loss", "loss"),
        Column("validation_loss", f"validation {HOSTILE}", "loss"),
        Column("density", "density", "share"),
    )
    rows = [{"step": i, "lr": 1e-4 * i, "loss": 2 / i, "density": 0.5} for i in range(1, steps + 1)]
    return Report("finetune", columns, (*rows[:-1], {**rows[-1], "validation_loss": 0.25}))


def test_a_report_of_steps_gets_curves() -> None:
    pytest.importorskip("altair", reason="needs altair (twofour[report])")
    pytest.importorskip("vl_convert", reason="needs vl-convert (twofour[report])")
    text = report_page(run_of(10))
    found = require_self_contained(text)
    assert text.count("<figure") == 3
    assert "Loss. The last: loss 0.2, validation" in found.text
    assert "Density. The last: density 50.0 %." in found.text
    assert report_page(run_of(1)).count("<figure") == 3
    assert "Curves" not in report_page(report())


def test_a_table_of_many_steps_has_every_nth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("twofour.report.plots.available", lambda: False)
    text = report_page(run_of(1001))
    assert text.count("<tr>") <= 203
    assert "one of 6 rows, and the last" in text
    assert '<th scope="row" class="number">1,001</th>' in text
    assert "row by row" in report_page(run_of(200))


def test_a_heading_stands_above_its_numbers() -> None:
    text = table_html(run_of(3))
    assert '<th scope="col" class="number">step</th>' in text
    assert '<th scope="row" class="number">3</th>' in text
    assert '<th scope="row">encoder.0</th>' in table_html(report())


def test_a_page_says_how_much_it_tells_of_what() -> None:
    every_tenth = Report("finetune", run_of(1).columns, tuple({"step": 10 * i, "loss": 1.0} for i in range(1, 101)))
    batches = Report("measure", (Column("batch", "batch", "count"),), ({"batch": 1},))
    for told, words in (
        (report(), "3 layers"),
        (run_of(10), "10 steps"),
        (run_of(1), "1 step"),
        (every_tenth, "1,000 steps in 100 rows"),
        (replace(every_tenth, summary={"steps": 1005}), "1,005 steps in 100 rows"),
        (batches, "1 row"),
        (Report("finetune", run_of(1).columns, ()), "0 rows"),
    ):
        assert f'<p class="lead">{words}</p>' in report_page(told)


def test_a_page_of_a_report_that_grows_loads_itself_anew() -> None:
    text = report_page(report(), growing=Growing(5, silence=120, written=1_700_000_000.6))
    require_self_contained(text, scripts=1)
    assert text.count('<meta http-equiv="refresh" content="5">') == 1
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(1_700_000_000))
    assert re.search(
        rf"Still running when this page was written, {when}.*\. It loads itself anew every 5 seconds\.", text
    )
    assert 'data-from="1700000121" hidden>No news since' in text
    last = report_page(report())
    require_self_contained(last)
    assert "refresh" not in last
    assert "No news" not in last


def test_a_page_waits_for_news_as_long_as_they_took_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, waits = [0.0], []

    def made(_: Report, *, growing: Growing) -> str:
        waits.append(growing.silence)
        return ""

    monkeypatch.setattr("twofour.report.live.time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr("twofour.report.html.report_page", made)
    live = LivePage(tmp_path / "page.html")
    for seconds in (10, 50, 20):
        clock[0] += seconds
        live.show(report)
    assert waits == [120, 4 * 50, 4 * 50]
    LivePage(tmp_path / "page.html", every=600).show(report)
    assert waits[3:] == [4 * 600]


def test_an_empty_report_is_a_page() -> None:
    found = require_self_contained(Report("check", COLUMNS, ()).to_html())
    assert "twofour check" in found.text


def test_notebooks_get_a_fragment() -> None:
    text = table_html(report())
    Reader(text)
    assert "<script" not in text
    assert "<html" not in text
    assert "total speed" in text
    assert text == report()._repr_html_()


def test_columns_without_a_word_are_left_out() -> None:
    columns = (Column("layer", "layer"), Column("reason", "why"), Column("gain", "speed", "ratio"))
    text = report_page(Report("t", columns, ({"layer": "a", "reason": "", "gain": None},)))
    assert "<th" in text
    assert ">layer<" in text
    assert ">why<" not in text
    assert ">speed<" not in text

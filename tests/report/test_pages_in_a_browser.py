"""Reports as a browser lays them out: nothing is cut off where the window has room, nothing leaves its place."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from tests.browser import answer, ask, find

from twofour.report import Column, Report
from twofour.report.html import Growing, report_page
from twofour.report.live import LivePage
from twofour.report.plots import VERMILION

pytestmark = pytest.mark.browser

LAYERS = [
    f"encoder.layer.{i}.{part}"
    for i in range(3)
    for part in ("attention.self.query", "attention.output.dense", "intermediate.dense")
] + ["pooler.dense"]
WHY = "in_features 11007 is not a multiple of 4, so it has no 2:4 groups: leave it dense, or pad it before."


@pytest.fixture(scope="module")
def browser() -> str:
    return find()


def compressed(reason: str = "embedding") -> Report:
    """As wide as those of compress."""
    numbers = [Column(f"{name}_us", f"{name} µs", "us") for name in ("dense", "oneDNN", "sparse")]
    columns = (
        Column("layer", "layer"),
        Column("shape", "shape"),
        Column("tokens", "tokens"),
        *numbers,
        Column("kernel", "kernel"),
        Column("gain", "speed", "ratio"),
        Column("reason", "why"),
    )
    row = {column.key: 1385.0 for column in numbers} | {"shape": "1536x384", "tokens": "1, 128", "reason": reason}
    rows = [{"layer": name, **row, "kernel": "cpu avx512bf16", "gain": 1 + i / 4} for i, name in enumerate(LAYERS)]
    return Report("compress", columns, tuple(rows), {"layers compressed": "10 of 10"}, (), {"cpu": "x"})


def laid_out(browser: str, report: Report, folder: Path, width: int, script: str) -> Any:
    path = folder / "page.html"
    report.to_html(path)
    return ask(browser, path, width, script)


TABLE = """
const box = d.querySelector('.scroll'), table = box.querySelector('table').getBoundingClientRect();
const e = d.documentElement, page = d.querySelector('h2').getBoundingClientRect();
return {hidden: box.scrollWidth - box.clientWidth, left: table.left, right: table.right, page: [page.left, page.right],
        leaves: e.scrollWidth - e.clientWidth};
"""


@pytest.mark.parametrize("reason", ["embedding", WHY])
def test_a_wide_table_takes_the_width_of_the_window(browser: str, tmp_path: Path, reason: str) -> None:
    found = laid_out(browser, compressed(reason), tmp_path, 1280, TABLE)
    assert found["hidden"] == found["leaves"] == 0
    assert found["page"][1] < found["right"] <= 1280
    assert 0 <= found["left"] <= found["page"][0] + 0.5


def test_a_narrow_table_stays_in_its_column(browser: str, tmp_path: Path) -> None:
    columns = (Column("layer", "layer"), Column("density", "density", "share"))
    found = laid_out(browser, Report("check", columns, ({"layer": "a", "density": 0.5},)), tmp_path, 1280, TABLE)
    assert [found["left"], found["right"]] == pytest.approx(found["page"], abs=0.5)


def test_on_a_phone_a_wide_table_scrolls_and_the_page_does_not(browser: str, tmp_path: Path) -> None:
    found = laid_out(browser, compressed(WHY), tmp_path, 420, TABLE)
    assert found["hidden"] > 0
    assert found["leaves"] == 0
    assert found["left"] == pytest.approx(found["page"][0], abs=0.5)


def sensitive() -> Report:
    """Two losses of each layer."""
    losses = [Column(pattern, f"loss +, {pattern}", "loss") for pattern in ("2:4", "2:4x4")]
    rows = tuple({"layer": name, "2:4": 0.01 * i, "2:4x4": 0.02 * i} for i, name in enumerate(LAYERS))
    return Report("sensitivity", (Column("layer", "layer"), *losses), rows)


def trained() -> Report:
    """The terms of a loss, whose names are long."""
    names = ("loss", "blocks", "last_hidden_state", "validation loss")
    columns = (Column("step", "step", "count"), *(Column(name, name, "loss") for name in names))
    rows = tuple({"step": i, **dict.fromkeys(names, 1 / i)} for i in range(1, 11))
    return Report(
        "finetune", (*columns, Column("lr", "learning rate", "error")), tuple({**r, "lr": 1e-3} for r in rows)
    )


FIGURES = """
const seen = [...d.querySelectorAll('figure svg')].filter(svg => svg.getBoundingClientRect().width);
const page = d.querySelector('h2').getBoundingClientRect();
return seen.map(svg => {
  const box = svg.getBoundingClientRect(), words = [...svg.querySelectorAll('text')].map(t => t.getBoundingClientRect());
  return {left: Math.min(...words.map(w => w.left)) - box.left, right: box.right - Math.max(...words.map(w => w.right)),
          share: box.width / page.width, size: Math.min(...words.map(w => w.height))};
});
"""


@pytest.mark.parametrize("width", [420, 1280])
@pytest.mark.parametrize("report", [compressed, sensitive, trained])
def test_no_word_leaves_its_picture(browser: str, tmp_path: Path, report: Any, width: int) -> None:
    pytest.importorskip("altair", reason="needs altair (twofour[report])")
    pytest.importorskip("vl_convert", reason="needs vl-convert (twofour[report])")
    figures = laid_out(browser, report(), tmp_path, width, FIGURES)
    assert len(figures) == (2 if report is trained else 1)
    for figure in figures:
        assert figure["left"] >= 0
        assert figure["right"] >= -4  # half of the number at the end of an axis
        assert figure["size"] >= 9
        assert figure["share"] >= (0.4 if report is trained and width > 420 else 0.95)


@pytest.mark.parametrize("width", [420, 1280])
def test_no_bar_reaches_the_numbers(browser: str, tmp_path: Path, width: int) -> None:
    pytest.importorskip("altair", reason="needs altair (twofour[report])")
    pytest.importorskip("vl_convert", reason="needs vl-convert (twofour[report])")
    script = f"""
    const svg = [...d.querySelectorAll('figure svg')].find(svg => svg.getBoundingClientRect().width);
    const numbers = [...svg.querySelectorAll('text')].filter(t => /^\\d\\.\\d\\dx$/.test(t.textContent));
    return [Math.max(...[...svg.querySelectorAll('path[fill="{VERMILION}"]')].map(p => p.getBoundingClientRect().right)),
            Math.min(...numbers.map(t => t.getBoundingClientRect().left)), numbers.length];
    """
    bar, number, count = laid_out(browser, compressed(), tmp_path, width, script)
    assert count == len(LAYERS)
    assert bar < number


@pytest.mark.parametrize("age", [10, 1000])
def test_a_page_tells_when_its_run_seems_to_have_been_killed(browser: str, tmp_path: Path, age: int) -> None:
    path = tmp_path / "page.html"
    path.write_text(report_page(compressed(), growing=Growing(60, 120, time.time() - age)), encoding="utf-8")
    seen = ask(browser, path, 1280, "return ['news', 'silence'].map(id => d.getElementById(id).offsetHeight > 0);")
    assert seen == ([True, False] if age < 120 else [False, True])


@pytest.mark.parametrize("running", [True, False])
def test_a_page_loads_itself_anew_until_the_end(browser: str, tmp_path: Path, running: bool) -> None:
    LivePage(tmp_path / "page.html", every=2).show(lambda: Report("finetune", (), ()), running=running)
    frame = tmp_path / "frame.html"
    frame.write_text(
        "<iframe id=f src=page.html></iframe><p id=answer>0</p><script>let loads = 0;"
        " document.getElementById('f').onload = () => document.getElementById('answer').textContent = ++loads;</script>",
        encoding="utf-8",
    )
    loads = int(answer(browser, frame, seconds=9))
    assert loads >= 3 if running else loads == 1

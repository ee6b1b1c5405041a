"""Reports as a browser lays them out: nothing is cut off where the window has room, nothing leaves its place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.browser import ask, find

from twofour.report import Column, Report

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

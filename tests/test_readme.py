"""The README's Python runs, prints what the README says it prints, and its numbers come from a JSON."""

from __future__ import annotations

import contextlib
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from twofour.workflows.timing import Timing

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.compile(r"```python\n(.*?)```\n\n```text\n(.*?)```", re.DOTALL)


def shape_of(text: str) -> list[str]:
    """What does not change from machine to machine: words, with numbers and kernel names taken out."""
    text = re.sub(r"\b(cpu (avx512bf16|avx512|avx2|neonbf16|neon|baseline)|reference|dense \(torch\))", "KERNEL", text)
    text = re.sub(r"-?\d[\d,.]*(e[-+]\d+)?", "#", text)
    return [" ".join(line.split()) for line in text.strip().splitlines()]


def test_snippets_print_what_the_readme_shows(native: None, monkeypatch: pytest.MonkeyPatch) -> None:
    fixed = {
        "dense": 9.0,
        "onednn": 6.0,
        "packed": 6.0,
        "sparse": 3.0,
    }  # a busy machine must not change which columns there are

    def paired(rivals: dict[str, Callable[[], object]], **_: object) -> dict[str, Timing]:
        return {name: Timing(fixed[name], fixed[name], fixed[name], 1) for name in rivals}

    monkeypatch.setattr("twofour.workflows.comparison.paired", paired)
    found = BLOCKS.findall(README.read_text(encoding="utf-8"))
    assert found, "the README has no python block with a text block after it"
    names: dict[str, object] = {}
    for code, expected in found:
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            exec(compile(code, str(README), "exec"), names)
        assert shape_of(output.getvalue()) == shape_of(expected)


LINKS = re.findall(r"\]\((?!https?:)([^)#]+)\)|src=\"([^\"]+)\"", README.read_text(encoding="utf-8"))


@pytest.mark.parametrize("target", sorted(set(LINKS)))
def test_links_lead_somewhere(target: tuple[str, str]) -> None:
    path = target[0] or target[1]
    assert (README.parent / path).exists()


def test_headline_numbers_are_those_of_the_json() -> None:
    from benchmarks.headlines import headline_avx2, headlines

    readme = README.read_text(encoding="utf-8")
    shown = "benchmarks/results/epyc-zen5-2core"
    lines = headlines(README.parent / shown, shown)
    assert len(lines) == 3
    shown = "benchmarks/results/epyc-zen4-avx2-2core"
    lines.append(headline_avx2(README.parent / shown, shown))
    for line in lines:
        assert line in readme


def test_numbers_in_the_text_are_those_of_the_json() -> None:
    readme = " ".join(README.read_text(encoding="utf-8").split())
    folder = README.parent / "benchmarks/results/epyc-zen5-2core"
    steps = json.loads((folder / "step.json").read_text())["rows"]
    gain = {
        row["dtype"]: f"{row['times dense']:.2f}×"
        for row in steps
        if row["threads"] == 1 and row["step"] == "fst, a mask each step"
    }
    assert f"plain SGD: {gain['bfloat16']} torch's dense step in bfloat16, {gain['float32']} in float32" in readme
    rows = json.loads((folder / "linear.json").read_text())["rows"]
    ranges = []
    for pattern in ("2:4", "2:4x4"):
        case = ("square", "bf16", pattern, 1)
        many = [
            row["x_onednn"]
            for row in rows
            if (row["layer"], row["dtype"], row["pattern"], row["threads"]) == case and row["tokens"] >= 256
        ]
        ranges.append(f"{min(many):.2f} to {max(many):.2f}×")
    assert f"oneDNN with prepacked weights is {ranges[0]}, {ranges[1]} where four rows share a mask" in readme


def test_numbers_of_float8_are_those_of_the_json() -> None:
    rows = json.loads((README.parent / "benchmarks/results/epyc-zen5-2core/float8.json").read_text())["rows"]
    found = {(row["in_features"], row["tokens"]): row["x_onednn"] for row in rows}
    shown = f"8192×8192 at one token {found[8192, 1]:.1f}×, 4096×4096 at 256 tokens {found[4096, 256]:.1f}× oneDNN in bfloat16"
    assert shown in README.read_text(encoding="utf-8")


def test_the_plot_is_that_of_the_json(tmp_path: Path) -> None:
    pytest.importorskip("altair", reason="needs altair (twofour[report])")
    source = README.parent / "benchmarks/results/epyc-zen5-2core/linear.json"
    script = README.parent / "benchmarks/plot_linear.py"  # in a process of its own: plots are numbered
    subprocess.run([sys.executable, script, source, tmp_path / "speed.svg"], check=True)
    assert (tmp_path / "speed.svg").read_bytes() == (README.parent / "docs/speed.svg").read_bytes()

"""What the benchmarks claim must not come from rows that are not there, or from other code."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch


def test_a_bar_is_met_only_by_all_of_its_rows() -> None:
    from benchmarks.bars import verdict

    assert verdict([1.4, 1.3], 1.3, 2) == "met"
    assert verdict([1.4], 1.3, 2) == "not measured"
    assert verdict([1.2], 1.3, 2) == "MISSED"
    assert verdict([], 1.3, 2) == "not measured"
    assert verdict([float("nan")] * 2, 1.3, 2) != "met"


def test_the_gain_of_two_threads_is_paired_and_judged_by_rows_of_two(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], native: None
) -> None:
    from benchmarks import bars
    from benchmarks.kernels import bench_linear

    threads = torch.get_num_threads()
    rows = {number: bench_linear.measure(bench_linear.SMALLEST, "fp32", "2:4", 64, number, 3) for number in (1, 2)}
    assert torch.get_num_threads() == 2
    torch.set_num_threads(threads)
    assert rows[1].x_one_thread is None
    assert rows[2].x_one_thread is not None
    assert rows[2].x_one_thread > 0

    def judged(*gains: tuple[int, float]) -> str:
        square = {**asdict(rows[2]), "layer": "square", "tokens": 512}
        record = {"rows": [{**square, "threads": number, "x_one_thread": gain} for number, gain in gains]}
        (tmp_path / "linear.json").write_text(json.dumps(record), encoding="utf-8")
        bars.main(tmp_path / "linear.json")
        return next(
            line for line in capsys.readouterr().out.splitlines() if "two threads against one, square, fp32" in line
        )

    assert judged((2, 1.95), (4, 1.2)).startswith("met ")
    assert judged((2, 1.2), (4, 3.8)).startswith("MISSED")
    assert judged((4, 3.8)).startswith("not measured")


def test_rows_of_the_same_commit_are_kept_and_of_others_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, native: None
) -> None:
    from benchmarks.kernels import bench_linear

    path = tmp_path / "linear.json"
    layer = {"layer": "smallest", "tokens": 4}

    def open_at(commit: str, again: bool = False) -> bench_linear.Results:
        monkeypatch.setattr(bench_linear, "commit", lambda: commit)
        return bench_linear.Results(path, again)

    threads = torch.get_num_threads()
    row = bench_linear.measure(bench_linear.SMALLEST, "fp32", "2:4x4", 4, 1, 3)
    torch.set_num_threads(threads)
    open_at("a").add(row)
    assert open_at("a").has(**layer, pattern="2:4x4")
    assert not open_at("a").has(**layer, pattern="2:4")
    assert not open_at("a", again=True).has(**layer)
    assert not open_at("b").has(**layer)
    assert not open_at("a+").has(**layer)  # files that are not committed
    assert json.loads(path.read_text())["rows"][0]["x_onednn"] == row.x_onednn
    assert list(tmp_path.iterdir()) == [path]

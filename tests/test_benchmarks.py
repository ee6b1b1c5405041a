"""What the benchmarks claim must not come from rows that are not there, or from other code."""

from __future__ import annotations

import json
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

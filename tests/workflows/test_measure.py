"""measure, and the timing under it."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable

import pytest
import torch
from torch import nn

import twofour
from twofour import ModelError
from twofour.workflows.measure import model_bytes
from twofour.workflows.timing import paired

Build = Callable[[], nn.Sequential]


def test_measure_reports_speed_bytes_and_error(mlp: Build) -> None:
    dense = mlp()
    model = copy.deepcopy(dense)
    twofour.prune(model)
    twofour.compress(model, force=True)
    batches = [torch.randn(1, 64), torch.randn(20, 64)]
    report = twofour.measure(model, batches, against=dense, repeats=5)
    assert len(report.rows) == 2
    for row, x in zip(report.rows, batches, strict=True):
        assert row["speedup"] == pytest.approx(row["dense_us"] / row["sparse_us"])
        assert row["dense_low_us"] <= row["dense_us"] <= row["dense_high_us"]
        difference = (model(x) - dense(x)).detach().double().abs()
        assert row["largest_error"] == pytest.approx(float(difference.max()))
        assert row["mean_error"] == pytest.approx(float(difference.mean()))
    assert report.summary["dense bytes"] == sum(p.nbytes for p in dense.parameters())
    assert report.summary["bytes ratio"] < 0.6
    us = [sum(row[f"{which}_us"] for row in report.rows) for which in ("dense", "sparse")]
    assert [report.summary[f"{which} ms, all batches"] for which in ("dense", "sparse")] == [us[0] / 1e3, us[1] / 1e3]
    assert report.summary["speedup, all batches"] == us[0] / us[1]
    assert model.training


def test_without_against_the_same_weights_run_dense(mlp: Build) -> None:
    model = mlp()
    twofour.prune(model)
    twofour.compress(model, force=True)
    report = twofour.measure(model, torch.randn(4, 64), repeats=2)
    assert report.summary["largest error"] < 1e-5
    assert "pass against=" in report.notes[0]
    lone = twofour.measure(model[0], torch.randn(4, 64), repeats=2)
    assert lone.summary["largest error"] < 1e-5


def test_a_dense_model_is_told_apart(mlp: Build) -> None:
    report = twofour.measure(mlp(), torch.randn(2, 64), repeats=2)
    assert "no layer of the model is compressed" in report.notes[-1]


def test_rows_show_what_the_model_was_called_with(mlp: Build) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()

        def forward(self, scale: float, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
            return self.inner(x * scale)

    inputs = [(2.0, torch.randn(8, 64)), {"scale": 1.0, "x": torch.randn(2, 3, 64), "mask": torch.ones(2, 3)}]
    report = twofour.measure(Named(), inputs, repeats=1)
    assert [row["batch"] for row in report.rows] == ["8x64", "2x3x64"]
    assert [line.split()[0] for line in str(report).splitlines()[:3]] == ["batch", "8x64", "2x3x64"]


def test_the_model_to_compare_with_is_told_apart(mlp: Build) -> None:
    with pytest.raises(
        ModelError, match=r"^the model of against= fails on the inputs: RuntimeError: mat1 .* \[2, 64\] float32"
    ):
        twofour.measure(mlp(), torch.randn(2, 64), against=nn.Linear(32, 64))


def test_bad_requests(mlp: Build) -> None:
    model = mlp()
    with pytest.raises(ModelError, match="repeats=0: measure needs at least one run"):
        twofour.measure(model, torch.randn(1, 64), repeats=0)
    with pytest.raises(ModelError, match=r"different shapes: \[\[1, 64\]\] dense, \[\[1, 12\]\] sparse"):
        twofour.measure(model, torch.randn(1, 64), against=model[:4], repeats=1)

    class Silent(nn.Module):
        def forward(self, x: torch.Tensor) -> str:
            return "nothing"

    with pytest.raises(ModelError, match="returns no floating point tensor"):
        twofour.measure(Silent(), torch.randn(1, 64), repeats=1)


def test_shared_storage_is_counted_once() -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    model[1].weight = model[0].weight
    assert model_bytes(model) == 256


def test_paired_takes_turns_and_keeps_medians() -> None:
    calls: list[str] = []

    def slow() -> None:
        calls.append("slow")
        time.sleep(0.004)

    def fast() -> None:
        calls.append("fast")
        time.sleep(0.001)

    found = paired({"slow": slow, "fast": fast}, repeats=5)
    assert found["slow"].samples == 5
    assert found["slow"].median_us > 2 * found["fast"].median_us
    assert calls[-4:] == ["slow", "fast", "slow", "fast"]


def test_outputs_that_are_not_numbers_are_named(mlp: Build) -> None:
    model, dense = mlp(), mlp()
    with torch.no_grad():
        model[4].bias[0] = float("nan")
    report = twofour.measure(model, [torch.randn(2, 64)], against=dense, repeats=1)
    assert report.notes[0] == "outputs hold NaN or infinities, so that the error is NaN: batch 0 (sparse)"
    batches = [torch.ones(1, 64), torch.full((1, 64), float("nan"))]
    report = twofour.measure(mlp(), batches, against=dense, repeats=1)
    assert "batch 1 (dense and sparse)" in report.notes[0]
    assert math.isnan(report.summary["largest error"])
    assert math.isnan(report.summary["largest relative error"])


def test_a_training_step_is_timed_and_leaves_gradients_as_they_were(mlp: Build) -> None:
    model, dense = mlp(), mlp()
    twofour.prune(model)
    seen: list[bool] = []
    model.register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    first = next(model.parameters())
    first.grad = torch.full_like(first, 3.0)
    x = torch.randn(8, next(m.in_features for m in model.modules() if isinstance(m, nn.Linear)))
    report = twofour.measure(model, x, against=dense, backward=True, repeats=2, progress=False)
    assert report.summary["speedup, all batches"] > 0
    assert report.notes == ("times are of forward and backward",)
    assert any(seen)
    assert first.grad is not None
    assert (first.grad == 3.0).all()
    assert all(parameter.grad is None for parameter in list(model.parameters())[1:])
    assert all(parameter.grad is None for parameter in dense.parameters())
    model.requires_grad_(False)
    with pytest.raises(ModelError, match="no output has a gradient: no parameter of the model requires one"):
        twofour.measure(model, x, against=model, backward=True, repeats=2, progress=False)

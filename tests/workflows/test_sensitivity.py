"""sensitivity: the loss of pruning one layer alone, measured and not guessed; the model stays as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from tests.on_device import DEVICE
from torch import nn

import twofour
from twofour.report import plots
from twofour.solvers import Hessian, Recipe, solve

Build = Callable[[], nn.Sequential]


def test_losses_are_those_of_pruning_one_layer(mlp: Build) -> None:
    model = mlp().eval()
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(200, 64)
    report = twofour.sensitivity(model, x, ["2:4", "1:4"])
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    expected = model(x)
    seen = x
    for i, module in enumerate(model):
        if isinstance(module, nn.Linear):
            hessian = Hessian(module.in_features, DEVICE)
            hessian.add(seen)
            (row,) = report.where(layer=str(i))
            for pattern in ("2:4", "1:4"):
                other = copy.deepcopy(model)
                found = solve(module.weight.detach(), hessian, pattern, Recipe("sparsegpt"))
                other[i].weight.data.copy_(found.weight)
                loss = (other(x) - expected).square().sum() / expected.square().sum()
                assert row[f"loss {pattern}"] == pytest.approx(float(loss.detach()), rel=1e-4)
                assert row[f"error {pattern}"] == pytest.approx(found.error)
            assert row["loss 1:4"] > row["loss 2:4"] > 0
        seen = module(seen)
    assert set(report.summary["lose most as 2:4"].split(", ")) == {"0", "2", "4"}


def test_a_loss_of_ones_own_and_layers_that_fit_one_pattern_only() -> None:
    model = nn.Sequential(nn.Linear(16, 6), nn.Linear(6, 8))
    x = torch.randn(50, 16)
    calls: list[int] = []

    def evaluate(candidate: nn.Module) -> float:
        calls.append(1)
        return 3.0 + float(candidate(x).square().mean())

    report = twofour.sensitivity(model, x, ["2:4", "1:2"], evaluate=evaluate, method="wanda")
    rows = {row["layer"]: row for row in report.rows}
    assert "loss 2:4" in rows["0"]
    assert "loss 2:4" not in rows["1"]
    assert "loss 1:2" in rows["1"]
    assert len(calls) == 1 + 3
    with pytest.raises(twofour.ModelError, match="the loss of the dense model is nan"):
        twofour.sensitivity(model, x, evaluate=lambda _: float("nan"))
    with pytest.raises(twofour.PatternError, match="no options"):
        twofour.sensitivity(model, x, [])


def test_models_with_a_loss_use_it() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=4, n_positions=16)
    model = transformers.GPT2LMHeadModel(config).eval()
    ids = torch.randint(0, 50, (4, 9))
    report = twofour.sensitivity(model, {"input_ids": ids, "labels": ids}, include="*.c_fc")
    assert float(report.summary["loss of the dense model"]) == pytest.approx(
        model(ids, labels=ids).loss.item(), rel=1e-3
    )


def test_a_failure_leaves_the_weights_as_they_were() -> None:
    model = nn.Sequential(nn.Linear(16, 16))
    before = model[0].weight.clone()
    left = [1]

    def evaluate(_: nn.Module) -> float:
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("out of luck")
        return 1.0

    with pytest.raises(RuntimeError, match="out of luck"):
        twofour.sensitivity(model, torch.randn(9, 16), evaluate=evaluate)
    assert torch.equal(model[0].weight, before)


def test_the_page_draws_the_losses(mlp: Build) -> None:
    pytest.importorskip("altair")
    plots.require()  # where altair is, a plot that cannot be drawn is a fault
    page = twofour.sensitivity(mlp(), torch.randn(30, 64), ["2:4", "2:4x4"]).to_html()
    assert "<svg" in page
    assert "loss +, 2:4x4" in page

"""prune and check."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import twofour
from twofour import ModelError, PatternError, SparseLinear, UnsupportedError
from twofour.masks import magnitude, nm_mask

Build = Callable[[], nn.Sequential]


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "3:4", "4:8", "2:4x4", "2:4t", "1:4t", "1:2"])
def test_prune_keeps_the_best_and_check_agrees(mlp: Build, pattern: str) -> None:
    model, before = mlp(), mlp()
    report = twofour.prune(model, pattern)
    for index in (0, 2, 4):
        mask = nm_mask(magnitude(before[index].weight), pattern)
        assert torch.equal(model[index].weight, torch.where(mask, before[index].weight, 0))
    assert torch.equal(model[3].weight, before[3].weight)
    assert twofour.check(model, pattern).summary["holds"]
    assert all(0 < row["kept_magnitude"] < 1 for row in report.where(action="pruned"))


def test_prune_is_idempotent_and_says_so(mlp: Build) -> None:
    model = mlp()
    twofour.prune(model)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = twofour.prune(model)
    assert [row["action"] for row in report.rows] == ["already"] * 3
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    weights = sum(parameter.numel() for parameter in model.parameters())
    twofour.compress(model, force=True)
    again = twofour.prune(model)
    assert [row["reason"] for row in again.rows] == ["already compressed"] * 3
    assert again.summary["weights in the model"] == weights
    for module in model.modules():
        if isinstance(module, SparseLinear):
            module.requires_grad_values()
    assert twofour.prune(model).summary["weights in the model"] == weights


def test_dry_run_changes_nothing(mlp: Build) -> None:
    model, before = mlp(), mlp()
    report = twofour.prune(model, dry_run=True)
    assert report.notes == ("dry run: nothing was changed",)
    assert [row["action"] for row in report.rows] == ["pruned"] * 3
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))


def test_convolutions_group_along_input_channels() -> None:
    model = nn.Sequential(nn.Conv2d(8, 6, 3), nn.Conv1d(8, 4, 5), nn.Conv3d(4, 2, 2))
    twofour.prune(model)
    for layer in model:
        rows = layer.weight.movedim(1, -1).reshape(-1, 4)
        assert bool(((rows != 0).sum(1) == 2).all())
    assert twofour.check(model).summary["holds"]


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_other_dtypes_are_ranked_by_their_numbers(dtype: torch.dtype) -> None:
    layer = nn.Linear(16, 8, bias=False)
    layer.weight = nn.Parameter((torch.randn(8, 16) * 4).to(dtype), requires_grad=False)
    expected = nm_mask(layer.weight.float().abs(), "2:4")
    twofour.prune(nn.Sequential(layer))
    assert torch.equal(layer.weight.float() != 0, expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_cannot_be_ranked_are_refused_before_any_change(mlp: Build, bad: float) -> None:
    model, before = mlp(), mlp()
    with torch.no_grad():
        model[4].weight[3, 7] = bad
    with pytest.raises(
        ModelError, match=r"'4' has 1 weights that are NaN or infinite, the first at \[3, 7\].*Nothing was"
    ):
        twofour.prune(model)
    assert torch.equal(model[0].weight, before[0].weight)
    twofour.prune(model, exclude="4")


def test_shared_weight_is_pruned_once() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    report = twofour.prune(model)
    assert report.rows[1]["reason"] == "shares its weight with '0'"
    assert report.summary["weights in pruned layers"] == 64


def test_gradients_and_optimizers_keep_the_parameter(mlp: Build) -> None:
    model = mlp()
    weight = model[0].weight
    twofour.prune(model)
    assert model[0].weight is weight
    assert weight.requires_grad


def test_check_names_the_first_bad_place_and_carries_the_report(mlp: Build) -> None:
    model = mlp()
    twofour.prune(model)
    with torch.no_grad():
        model[2].weight[5, 8:12] = torch.tensor([1.0, 2.0, -3.0, 0.0])
    with pytest.raises(
        PatternError, match=r"'2' is not 2:4: 1 of 1536 groups.*first at \[5, 8\] holds \[1, 2, -3, 0\]"
    ) as caught:
        twofour.check(model)
    report = caught.value.report  # type: ignore[attr-defined]
    assert [row["action"] for row in report.rows] == ["holds", "broken", "holds"]
    assert twofour.check(model, exclude="2").summary["layers checked"] == 2


def test_check_counts_minus_zero_as_zero_and_nan_as_a_weight() -> None:
    model = nn.Sequential(nn.Linear(4, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, -0.0, 2.0, -0.0]]))
        assert twofour.check(model).summary["holds"]
        model[0].weight[0, 1] = float("nan")
    with pytest.raises(PatternError, match=r"holds \[1, nan, 2, -0\]"):
        twofour.check(model)


def test_check_of_a_compressed_model_looks_at_its_pattern(mlp: Build) -> None:
    model = mlp()
    twofour.prune(model, "1:4")
    twofour.compress(model, pattern="1:4", force=True)
    assert twofour.check(model, "1:4").summary["holds"]
    assert twofour.check(model, "2:4").summary["holds"]


def test_nothing_to_do_is_an_error() -> None:
    with pytest.raises(ModelError, match="nothing to prune: the model has no layer with a weight matrix"):
        twofour.prune(nn.Sequential(nn.ReLU()))
    with pytest.raises(
        ModelError, match=r"nothing to check: all 1 layers are skipped \(in_features 6 is not a multiple of 4\)"
    ):
        twofour.check(nn.Sequential(nn.Linear(6, 8)))


def test_wrong_arguments_are_named(mlp: Build) -> None:
    with pytest.raises(ModelError, match=r"3 in include= or exclude=: pass shell wildcards"):
        twofour.prune(mlp(), include=3)  # type: ignore[arg-type]
    with torch.inference_mode():
        model = mlp()
    with pytest.raises(ModelError, match=r"'0' was made under torch.inference_mode and cannot be changed in place"):
        twofour.prune(model)


def test_lazy_layers_are_left_with_a_reason() -> None:
    report = twofour.prune(nn.Sequential(nn.LazyLinear(64), nn.Linear(64, 64)))
    assert [row["action"] for row in report.rows] == ["skipped", "pruned"]
    assert report.rows[0]["reason"] == "lazy: run the model once before"


def test_unknown_method_and_pattern(mlp: Build) -> None:
    with pytest.raises(UnsupportedError, match=r"unknown method 'wandb': it is one of 'magnitude', 'wanda'"):
        twofour.prune(mlp(), method="wandb")
    with pytest.raises(PatternError, match=r"unknown pattern '2of4': write KEEP:GROUP"):
        twofour.prune(mlp(), "2of4")


def test_layers_compressed_as_another_pattern_are_checked_not_believed() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(12, 16))
    twofour.prune(model)
    twofour.compress(model, force=True)
    rows = twofour.prune(model, "1:4").rows
    assert [row["action"] for row in rows] == ["skipped", "skipped"]
    assert rows[0]["reason"] == ("compressed as 2:4: take it back to dense first (twofour.nn.swap.to_dense_modules)")
    assert [row["action"] for row in twofour.prune(model, "3:4").rows] == ["already", "already"]


def test_compressed_layers_of_a_wrong_shape_are_skipped_with_the_reason() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(12, 16))
    twofour.prune(model, "1:4")
    twofour.compress(model, pattern="1:4", force=True)
    rows = twofour.check(model, "4:8").rows
    assert [row["action"] for row in rows] == ["holds", "skipped"]
    assert rows[1]["reason"] == "in_features 12 is not a multiple of 8"
    assert twofour.prune(model, "4:8").rows[1]["reason"] == rows[1]["reason"]


def test_two_parameters_on_one_memory_are_pruned_once() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = nn.Parameter(model[0].weight.data)
    report = twofour.prune(model)
    assert report.rows[1]["reason"] == "shares its weight with '0'"
    assert report.summary["weights in pruned layers"] == 64

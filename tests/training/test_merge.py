"""Merging companions: zeros stay zero, nothing is lost of what was masked, what is lost of the rest is told, and refusals."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.on_device import DEVICE
from torch import Tensor, nn

import twofour
from twofour import CalibrationError, ModelError, PatternError, SparseLinear, UnsupportedError
from twofour.masks import check_pattern, nm_mask
from twofour.solvers import Hessian
from twofour.solvers.hessian import statistics
from twofour.training import AdaptedLinear, adapter_parameters, add_adapters, keep_masks, merge_adapters


def pruned(seed: int = 0, dtype: torch.dtype = torch.float32, pattern: str = "2:4") -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 4)).to(dtype)
    twofour.prune(model, pattern)
    return model


def wake(model: nn.Module) -> nn.Module:
    """B other than zero, as after training."""
    for module in model.modules():
        if isinstance(module, AdaptedLinear):
            nn.init.normal_(module.lora_b, std=0.25)
    return model


def weights(model: nn.Module) -> list[Tensor]:
    found = []
    for module in model.modules():
        if isinstance(module, SparseLinear):
            found.append(module.matrix.to_dense())
        elif isinstance(module, nn.Linear):
            found.append(module.weight.detach().clone())
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_masked_companions_merge_to_the_bit(dtype: torch.dtype) -> None:
    model = pruned(dtype=dtype)
    names = [(name, type(module)) for name, module in model.named_modules()]
    before = weights(model)
    add_adapters(model, rank=3, alpha=5)
    optimizer = torch.optim.AdamW(adapter_parameters(model), 0.05)
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.randn(32, 16).to(dtype)).float().square().mean().backward()
        optimizer.step()
    x = torch.randn(50, 16).to(dtype)
    expected = model(x)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        expected_autocast = model(x.float()) if dtype == torch.float32 else None
    report = merge_adapters(model)
    assert torch.equal(model(x), expected)
    if expected_autocast is not None:
        with torch.autocast(DEVICE.type, torch.bfloat16):
            assert torch.equal(model(x), expected_autocast)
    assert [(name, type(module)) for name, module in model.named_modules()] == names
    for weight, old in zip(weights(model), before, strict=True):
        assert torch.equal(weight == 0, old == 0)
        assert not torch.equal(weight, old)
    assert twofour.check(model).summary["holds"]
    assert {row["action"] for row in report.rows} == {"masked"}
    assert {row["reason"] for row in report.rows} == {"its companion was masked from the start"}
    assert all(row["lost"] == 0 and row["update"] > 0 for row in report.rows)
    assert report.summary["lost of the updates"] == "0.0 %"
    assert not report.notes
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8", "2:4t", "2:4x2", "2:4x4"])
@pytest.mark.parametrize("masked", [False, True])
def test_sums_of_integers_lie_where_the_weight_did(backend: str, pattern: str, masked: bool) -> None:
    if backend == "cpu" and not pattern.startswith("2:4"):
        return
    linear = nn.Linear(16, 24)
    weight = torch.randint(-4, 5, (24, 16)).float()
    weight[3] = 0
    linear.weight.data.copy_(weight * nm_mask(torch.rand(24, 16), pattern))
    dense = nn.Sequential(linear)
    sparse = nn.Sequential(SparseLinear.from_linear(linear, pattern, backend=backend))
    for model in (dense, sparse):
        (before,) = weights(model)
        parameter = model[0].weight if model is dense else None
        add_adapters(model, rank=2, alpha=4, masked=masked)
        a, b = torch.randint(-4, 5, (2, 16)).float(), torch.randint(1, 5, (24, 2)).float()
        model[0].lora_a.data.copy_(a)
        model[0].lora_b.data.copy_(b)
        update = 2 * b @ a
        (row,) = merge_adapters(model).rows
        (after,) = weights(model)
        assert torch.equal(after, (before + update) * (before != 0))
        assert check_pattern(after, pattern).holds
        assert row["update"] == pytest.approx(float(update.norm() / before.norm()))
        lost = 0.0 if masked else float((update * (before == 0)).norm() / update.norm())
        assert row["lost"] == pytest.approx(lost)
        if model is dense:
            assert model[0].weight is parameter
        else:
            assert (model[0].backend, str(model[0].pattern)) == (backend, pattern)
            x = torch.randint(-4, 5, (5, 16)).float()
            assert torch.equal(model(x), x @ after.T + linear.bias)


def test_weights_without_a_pattern_merge_exactly() -> None:
    model = nn.Sequential(nn.Linear(10, 12), nn.Linear(12, 8), nn.Linear(8, 8)).double()
    nn.init.zeros_(model[2].weight)
    model[0].weight.data[0, 0] = 0  # one of 120: by chance
    report = add_adapters(model, rank=2)
    assert report.summary["masked"] == 0
    wake(model)
    x = torch.randn(9, 10).double()
    expected = model(x)
    merged = merge_adapters(model)
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    assert [(row["action"], row["lost"], row["reason"]) for row in merged.rows] == [
        ("exact", 0, "no zeros to keep")
    ] * 3
    assert bool(model[0].weight[0, 0])
    assert bool(model[2].weight.any())


def test_zeros_of_any_pattern_stay_unless_another_is_asked_for() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 16), nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 6))
    twofour.prune(model, "4:8", include="0")
    twofour.prune(model, "2:4", include="1")
    model[2].weight.data[torch.rand(16, 16) < 0.3] = 0  # unstructured
    model[3].weight.data[:, :1] = 0
    add_adapters(model, rank=2, masked=False)
    wake(model)
    other = copy.deepcopy(model)
    before = weights(model)
    merge_adapters(model)
    assert all(torch.equal(new == 0, old == 0) for new, old in zip(weights(model), before, strict=True))
    report = merge_adapters(other, pattern="2:4")
    assert [row["action"] for row in report.rows] == ["exact", "masked", "exact", "exact"]
    assert report.rows[0]["reason"] == "does not hold 2:4"
    assert [bool((weight == 0).any()) for weight in weights(other)] == [False, True, False, False]
    with pytest.raises(PatternError, match="unknown pattern"):
        merge_adapters(model, pattern="x")


@pytest.mark.parametrize("compressed", [False, True])
def test_refit_gives_up_less_of_the_outputs(compressed: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 24))
    twofour.prune(model)
    if compressed:
        twofour.compress(model, force=True)
    add_adapters(model, rank=4, masked=False)
    wake(model)
    (before,) = weights(model)
    x = torch.randn(300, 32) @ (torch.randn(32, 32) * torch.logspace(0, -1.5, 32)[:, None])
    target = (before + model[0].update().detach()).double()
    wanted = x.double() @ target.T

    def error(weight: Tensor) -> float:
        return float((x.double() @ weight.double().T - wanted).square().sum() / wanted.square().sum())

    errors = {}
    for method in ("mask", "refit"):
        merged = copy.deepcopy(model)
        (row,) = merge_adapters(merged, method=method, calibration=[x[:128], (x[128:],)]).rows  # type: ignore[arg-type]
        (weight,) = weights(merged)
        errors[method] = row["error"]
        assert row["error"] == pytest.approx(error(weight), rel=1e-3)
        assert row["error_masked"] == pytest.approx(error(target * (before != 0)), rel=1e-3)
        assert row["action"] == {"mask": "masked", "refit": "refitted"}[method]
        assert torch.equal(weight == 0, before == 0)
        assert twofour.check(merged).summary["holds"]
    assert errors["refit"] < 0.5 * errors["mask"]
    # Nothing on the mask is better: the damped error has no gradient there.
    hessian = Hessian(32, DEVICE)
    hessian.add(x)
    pull = (target - weight.double()) @ statistics(hessian).matrix
    assert float(pull[before != 0].abs().max()) < 1e-2 * float(pull.abs().max())
    by_default = copy.deepcopy(model)
    report = merge_adapters(by_default, calibration=x)
    assert report.summary["method"] == "refit"
    assert "of the squared outputs (the mask alone: " in report.summary["mean output error"]
    assert "1 of 1 layers lost what their update had at zeros" in report.notes[0]


def test_padding_does_not_count_and_what_is_not_reached_is_masked() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return self.used(input=x)

    torch.manual_seed(0)
    model = Model()
    twofour.prune(model)
    add_adapters(model, rank=2, masked=False)
    wake(model)
    x, mask = torch.randn(8, 9, 16), torch.ones(8, 9)
    mask[:, 5:] = 0
    noisy = torch.where(mask[..., None] > 0, x, 1e3)
    other = copy.deepcopy(model)
    report = merge_adapters(model, calibration={"x": x[:, :5], "attention_mask": mask[:, :5]})
    merge_adapters(other, calibration={"x": noisy, "attention_mask": mask})
    assert torch.equal(model.used.weight, other.used.weight)
    assert [row["action"] for row in report.rows] == ["refitted", "masked"]
    assert report.rows[1]["reason"] == "no calibration input reaches it: masked, not refitted"


def test_large_models_are_looked_at_a_part_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from twofour.training.companions import moments

    model = pruned()
    add_adapters(model, rank=2, masked=False)
    wake(model)
    other, x = copy.deepcopy(model), torch.randn(64, 16)
    merge_adapters(model, calibration=x)
    monkeypatch.setattr(moments, "_BYTES_AT_ONCE", 1)
    calls: list[int] = []
    other.register_forward_pre_hook(lambda *_: calls.append(1))
    merge_adapters(other, calibration=x)
    assert len(calls) == 3
    assert all(torch.equal(one, two) for one, two in zip(weights(model), weights(other), strict=True))


def test_what_cannot_be_merged_is_told_and_nothing_has_changed() -> None:
    def refused(kind: type[Exception], match: str, change: Callable[[Any], object], **arguments: Any) -> None:
        model = pruned()
        add_adapters(model, rank=2, masked=False)
        wake(model)
        change(model)
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(kind, match=match):
            merge_adapters(model, **arguments)
        after = model.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(value.nan_to_num(7), before[name].nan_to_num(7)) for name, value in after.items())

    def spoil(value: float) -> Callable[[Any], object]:
        return lambda model: model[2].lora_b.data.fill_(value)

    def tie(model: Any) -> None:
        model.append(nn.Linear(16, 24))
        model[5].weight = model[0].base.weight

    def bilinear(model: Any) -> None:
        model[0].base = nn.Bilinear(2, 2, 2)

    x, nothing = torch.randn(8, 16), lambda model: None
    refused(UnsupportedError, "unknown method 'svd': it is one of 'mask', 'refit'", nothing, method="svd")
    refused(CalibrationError, "method='refit' sets weights by the outputs they give", nothing, method="refit")
    refused(CalibrationError, "calibration is empty", nothing, calibration=[])
    refused(CalibrationError, "the inputs of '0': 8 of 8 tokens hold NaN", nothing, calibration=x * float("nan"))
    refused(CalibrationError, "the inputs of '0': every input of the layer was zero", nothing, calibration=x * 0)
    refused(CalibrationError, "'0' was called with a NoneType", nothing, calibration=(None,))
    for value in (float("nan"), float("inf")):
        refused(ModelError, r"'2' has \d+ numbers that are NaN or infinite as float32 in the update", spoil(value))
        refused(ModelError, r"'2' has \d+ numbers .* in the update", spoil(value), calibration=x)
    quantize = {"force": True, "weights": "int8"}
    refused(
        UnsupportedError,
        r"'0' is int8, .*merge before compress\(weights='int8'\)",
        lambda model: twofour.compress(model, **quantize),  # type: ignore[arg-type]
    )
    refused(ModelError, r"the weight of '0' is shared with '5', which a merge would change too", tie)
    refused(UnsupportedError, "'0' holds a Bilinear now", bilinear)
    held = []
    refused(ModelError, "masks of this model are kept", lambda model: held.append(keep_masks(model)))
    with pytest.raises(ModelError, match=r"the model has no adapters: twofour.training.add_adapters\(model\)"):
        merge_adapters(pruned())
    with pytest.raises(ModelError, match="the model is an adapted layer itself"):
        merge_adapters(AdaptedLinear(nn.Linear(8, 8)))


def test_sums_out_of_range_and_weights_of_inference_mode_are_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 8)).half()
    add_adapters(model, rank=1)
    model[0].lora_a.data.fill_(300)
    model[0].lora_b.data.fill_(300)
    with pytest.raises(ModelError, match=r"'0' has 64 numbers .* as float16 in the sum of weight and update"):
        merge_adapters(model)
    with torch.inference_mode():
        made = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    made[0] = nn.Linear(8, 8)
    add_adapters(made, rank=1)
    wake(made[0])
    with pytest.raises(ModelError, match=r"'1' was made under torch.inference_mode and cannot be changed in place"):
        merge_adapters(made)


def test_models_merge_again_and_again() -> None:
    """As when tasks follow each other."""
    model = pruned(dtype=torch.float64)
    before = weights(model)
    for _ in range(3):
        add_adapters(model, rank=2)
        wake(model)
        x = torch.randn(5, 16).double()
        expected = model(x)
        merge_adapters(model)
        assert torch.equal(model(x), expected)
    assert all(torch.equal(new == 0, old == 0) for new, old in zip(weights(model), before, strict=True))

"""A training step on sparse kernels: outputs and gradients of dense layers, packed when need be, chosen by measurement."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests.on_device import DEVICE
from torch import Tensor, nn

import twofour
from twofour.errors import TwofourError
from twofour.kernels import cpu
from twofour.kernels.products import PRODUCTS, find_products
from twofour.kernels.registry import LinearSpec
from twofour.pattern import Pattern
from twofour.training import Phase, move_masks
from twofour.training.masks import products as module
from twofour.training.masks.moving import MovingMasks
from twofour.training.masks.products import StepTime

pytestmark = pytest.mark.usefixtures("native")
RULES = ("sr-ste", "fst", "s-ste")


def block(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 20)).to(dtype)


def pair(
    rule: Any, pattern: str, dtype: torch.dtype = torch.float32, **options: Any
) -> list[tuple[nn.Module, MovingMasks]]:
    """The same block on sparse kernels and on dense ones."""
    found = []
    for products in ("sparse", "dense"):
        model = block(dtype)
        found.append((model, move_masks(model, None, pattern, Phase(rule, **options), products=products)))  # type: ignore[arg-type]
    return found


def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often weights were packed and multiplied by."""
    counts = {"pack": 0, "linear": 0}
    for name, function in (("pack", cpu.pack_masked), ("linear", cpu.linear)):
        key = name

        def counting(*args: Any, _function: Any = function, _key: str = key, **named: Any) -> Any:
            counts[_key] += 1
            return _function(*args, **named)

        monkeypatch.setattr(cpu, function.__name__, counting)
    return counts


def backward(model: nn.Module, x: Tensor, seed: int = 1) -> tuple[Tensor, Tensor]:
    x = x.detach().clone().requires_grad_()
    y = model(x)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(seed)).to(y.dtype))
    assert x.grad is not None
    return y.detach(), x.grad


@pytest.mark.parametrize("pattern", ["2:4", "2:4t", "2:4x4"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_and_gradients_are_those_of_dense_layers(
    dtype: torch.dtype, rule: str, pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (model, _), (dense, _) = pair(rule, pattern, dtype)
    counts = counted(monkeypatch)
    for shape in ((7, 32), (2, 3, 5, 32), (32,), (1, 32)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)
        found, wanted = backward(model, x), backward(dense, x)
        bound = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 4e-2, "atol": 4e-2}
        for own, other in zip(found, wanted, strict=True):
            assert own.shape == other.shape
            assert torch.allclose(own, other, **bound)
        for own, other in zip(model.parameters(), dense.parameters(), strict=True):
            assert own.grad is not None
            assert other.grad is not None
            assert torch.allclose(own.grad, other.grad, **bound)
    assert counts["linear"] == 4 * 2 * (2 if pattern == "2:4t" else 1)
    assert counts["pack"] == 4 * 2


def test_integers_are_exact() -> None:
    (model, masks), _ = pair("fst", "2:4t")
    layer = model[0]
    assert isinstance(layer, nn.Linear)
    with torch.no_grad():
        layer.weight.copy_(torch.randint(-4, 5, layer.weight.shape).float())
        layer.bias.zero_()
    masks.refresh()
    kept = torch.where(masks.masks["0"], layer.weight.detach(), 0)
    x = torch.randint(-4, 5, (33, 32)).float().requires_grad_()
    grad = torch.randint(-4, 5, (33, 48)).float()
    y = layer(x)
    assert torch.equal(y, x.detach() @ kept.T)
    y.backward(grad)
    assert x.grad is not None
    assert torch.equal(x.grad, grad @ kept)
    assert torch.equal(layer.weight.grad, grad.T @ x.detach())
    assert torch.equal(layer.bias.grad, grad.sum(0))


def test_a_graph_that_is_kept_keeps_its_packed_weights() -> None:
    """Their memory is used again by later steps, and by other layers of the same shape."""
    (model, masks), _ = pair("fst", "2:4t")
    layer = model[0]
    assert isinstance(layer, nn.Linear)
    inputs = [torch.randn(9, 32, requires_grad=True) for _ in range(3)]
    wanted, outputs = [], []
    for scale, x in enumerate(inputs):
        with torch.no_grad():
            layer.weight.copy_(torch.randn_like(layer.weight) * (scale + 1))
        masks.refresh()
        outputs.append(layer(x))
        kept = torch.where(masks.masks["0"], layer.weight.detach(), 0)
        wanted.append(torch.ones(9, 48) @ kept)
    for _ in range(2):
        for x, y, grad in zip(inputs, outputs, wanted, strict=True):
            (found,) = torch.autograd.grad(y, x, torch.ones(9, 48), retain_graph=True)
            assert torch.allclose(found, grad, atol=1e-5)


@pytest.mark.parametrize("pattern", ["2:4", "2:4t"])
@pytest.mark.parametrize("rule", RULES)
def test_every_change_of_a_weight_is_seen(rule: str, pattern: str) -> None:
    (model, masks), (dense, others) = pair(rule, pattern)
    optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in (model, dense)]
    x = torch.randn(16, 32)
    for step in range(3):
        for m, optimizer in zip((model, dense), optimizers, strict=True):
            optimizer.zero_grad()
            for _ in range(3):  # accumulation
                backward(m, x, step)
            optimizer.step()
    for own, other in zip(model.parameters(), dense.parameters(), strict=True):
        assert torch.allclose(own, other, atol=1e-5)
    average = {name: torch.randn_like(weight) for name, weight in dense.state_dict().items()}
    for m, handle in ((model, masks), (dense, others)):
        for name, weight in m.named_parameters():
            weight.data.copy_(average[name])  # torch does not count this change
        handle.refresh()
        with torch.no_grad():
            m(x)
            for name, weight in m.named_parameters():
                weight.data.mul_(2.0)
                assert torch.equal(weight, 2 * average[name])
    with torch.no_grad():
        assert torch.allclose(model(x), dense(x), atol=1e-4)
    for m in (model, dense):
        m.load_state_dict(block().state_dict())
    assert torch.allclose(model(x), dense(x), atol=1e-5)


def test_a_weight_that_changes_before_the_backward_does_not_go_unnoticed() -> None:
    x = torch.randn(16, 32, requires_grad=True)
    (model, _), _ = pair("sr-ste", "2:4")
    y = model(x)
    with torch.no_grad():
        model[2].weight.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    (model, _), (dense, _) = pair("fst", "2:4t")  # its packed transpose is that of the forward pass
    (of_dense,) = torch.autograd.grad(dense(x).sum(), x)
    y = model(x)
    with torch.no_grad():
        model[2].weight.mul_(2.0)
    assert torch.allclose(torch.autograd.grad(y.sum(), x)[0], of_dense, atol=1e-5)


def test_dense_layers_are_not_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = block()
    masks = move_masks(model, None, "2:4t", "fst")
    x = torch.randn(16, 32)
    backward(model, x)
    for each in masks._moved:
        times = each.sparsity.products.times
        times.update({key: StepTime(16, 1.0, 2.0) for key in times})
    counts = counted(monkeypatch)
    backward(model, x)
    assert counts == {"pack": 0, "linear": 0}


@pytest.mark.parametrize("rule", RULES)
def test_autocast_computes_in_its_dtype(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (model, _), (dense, _) = pair(rule, "2:4t")
    counts = counted(monkeypatch)
    x = torch.randn(9, 32)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        found, wanted = model(x), dense(x)
    assert found.dtype == wanted.dtype == torch.bfloat16
    assert torch.allclose(found.float(), wanted.float(), rtol=2e-2, atol=2e-2)
    found.float().square().sum().backward()
    wanted.float().square().sum().backward()
    assert counts["linear"] == 3  # the input needs no gradient
    for own, other in zip(model.parameters(), dense.parameters(), strict=True):
        assert own.grad is not None
        assert own.grad.dtype == torch.float32
        assert torch.allclose(own.grad, other.grad, rtol=5e-2, atol=5e-2)  # type: ignore[arg-type]


def test_a_fixed_phase_and_mvue_run_on_them_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model = block()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    counts = counted(monkeypatch)
    with move_masks(model, optimizer, "2:4t", [Phase("s-ste", 2, mvue=True), Phase("fixed")], products="sparse"):
        for step in range(4):
            optimizer.zero_grad()
            backward(model, torch.randn(10, 32), step)
            optimizer.step()
    assert counts == {"pack": 8, "linear": 16}
    assert twofour.check(model, "2:4t").summary["holds"]


def test_what_is_dense_stays_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = counted(monkeypatch)
    (model, masks), _ = pair("fst", "2:4t")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(torch.ones(3, 32)), model(torch.ones(3, 32)), atol=1e-6)
    assert counts["linear"] == 2
    assert model(torch.ones(0, 32)).shape == (0, 20)
    half = block(torch.float16)
    of_half = move_masks(half, None, "2:4t", "fst", products="sparse")
    half(torch.ones(3, 32, dtype=torch.float16))
    reasons = [row["reason"] for row in of_half.report.rows if row["action"] == "moved"]
    assert reasons == ["cpu: float16 has no native kernel, only float32 and bfloat16"] * 2
    other = block()
    move_masks(other, None, "1:4", "sr-ste", products="sparse")
    other(torch.ones(3, 32))
    assert counts["linear"] == 2
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(torch.ones(3, 31))
    with pytest.raises(RuntimeError, match="same dtype|expected"):
        model(torch.ones(3, 32, dtype=torch.float64))
    masks.finish()
    assert counts["linear"] == 2


def test_auto_takes_what_was_measured_faster_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    model = block()
    masks = move_masks(model, None, "2:4t", "fst")
    x = torch.randn(64, 32)
    backward(model, x)
    rows = [row for row in masks.report.rows if row["action"] == "moved"]
    assert [row["tokens"] for row in rows] == [64, 64]
    assert all(row["products"] == ("sparse" if row["sparse_us"] < row["dense_us"] else "dense") for row in rows)
    assert "dense µs" in str(masks.report)
    assert " us " not in str(masks.report)
    counts = counted(monkeypatch)
    for pays in (True, False):
        for each in masks._moved:
            times = each.sparsity.products.times
            for key in times:
                times[key] = StepTime(64, 2.0, 1.0 if pays else 3.0)
        before = counts["linear"]
        backward(model, x)
        assert counts["linear"] - before == (4 if pays else 0)
    state = masks.state_dict()
    again = block()
    resumed = move_masks(again, None, "2:4t", "fst")
    resumed.load_state_dict(state)
    assert [each.sparsity.products.times for each in resumed._moved] == [
        each.sparsity.products.times for each in masks._moved
    ]


def test_auto_draws_no_random_numbers_and_obeys_determinism(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = counted(monkeypatch)
    model = block()
    move_masks(model, None, "2:4t", "fst")
    x = torch.randn(8, 32)
    before = torch.get_rng_state()
    torch.use_deterministic_algorithms(True)
    try:
        backward(model, x)
    finally:
        torch.use_deterministic_algorithms(False)
    assert counts["linear"] == 0
    backward(model, x)
    assert counts["linear"] > 0
    assert torch.equal(torch.get_rng_state(), before)


def test_inputs_keep_their_gradients_through_views_and_strides() -> None:
    (model, _), (dense, _) = pair("s-ste", "2:4t")
    x = torch.randn(32, 5, 4).transpose(0, 2)
    found, wanted = backward(model, x), backward(dense, x)
    assert torch.allclose(found[1], wanted[1], atol=1e-6)
    grads = []
    for m in (model, dense):
        y = m(x)
        y.sum().backward()  # an expanded gradient
        grads.append(m[0].weight.grad.clone())
    assert torch.allclose(grads[0], grads[1], atol=1e-5)
    leaf = torch.randn(3, 32, requires_grad=True)
    (first,) = torch.autograd.grad(model(leaf).square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_copies_have_their_own() -> None:
    (model, masks), _ = pair("s-ste", "2:4t")
    x = torch.randn(6, 32)
    model(x)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[0].weight.mul_(3.0)
    plain = copy.deepcopy(other)
    twofour.training.finish_copy(plain)
    assert torch.allclose(other(x), plain(x), atol=1e-5)
    masks.remove()


def test_the_table_says_why_not() -> None:
    spec = LinearSpec(8, 8, Pattern.parse("2:4"), torch.float64, torch.device("cpu"))
    row, rejected = find_products(spec)
    assert row is None
    assert rejected == (("cpu", "float64 has no native kernel, only float32 and bfloat16"),)
    assert PRODUCTS[0].label().startswith("cpu")
    with pytest.raises(TwofourError, match=r"products='fast': it is one of auto, sparse, dense"):
        move_masks(block(), products="fast")  # type: ignore[arg-type]


def test_nothing_is_measured_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = module.LayerProducts()
    weight, x = torch.randn(8, 16), torch.randn(3, 16)
    mask = torch.zeros(8, 16, dtype=torch.bool)
    mask.view(2, 4, 4, 4)[:, :2, :, :2] = mask.view(2, 4, 4, 4)[:, 2:, :, 2:] = True
    monkeypatch.setattr(module, "_is_captured", lambda device: True)

    def run() -> Tensor | None:
        return layer.linear(x, weight, None, Pattern.parse("2:4t"), lambda: (weight, mask), scale=1.0, estimate=False)

    assert run() is None
    assert layer.times == {}
    assert layer.why_dense == "a CUDA graph was captured before a step had been measured"
    monkeypatch.setattr(module, "_is_captured", lambda device: False)
    run()
    assert len(layer.times) == 1

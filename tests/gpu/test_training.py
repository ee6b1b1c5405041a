"""Training on a GPU: steps on our kernels give what steps on dense layers give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from twofour.kernels.cuda import table
from twofour.kernels.products import PRODUCTS
from twofour.training import Phase, keep_masks, move_masks
from twofour.training.masks import products


@pytest.fixture(autouse=True)
def ran(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of our kernels that ran; the table offers no other than ours, on an emulated GPU too."""
    row = next(row for row in PRODUCTS if row.backend == "cuda")
    monkeypatch.setattr(products, "find_products", lambda spec: (row, ()))
    names: list[str] = []
    launch = table.launch

    def noting(name: str, *rest: Any, **how: Any) -> None:
        names.append(name)
        launch(name, *rest, **how)

    monkeypatch.setattr(table, "launch", noting)
    return names


def block(dtype: torch.dtype, device: torch.device) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 20)).to(dtype).to(device)


def backward(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().clone().requires_grad_()
    y = model(x)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y))
    assert x.grad is not None
    return y.detach(), x.grad


@pytest.mark.parametrize("pattern", ["2:4", "2:4t"])
@pytest.mark.parametrize("rule", ["sr-ste", "fst", "s-ste"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_outputs_and_gradients_are_those_of_dense_layers(
    dtype: torch.dtype, rule: Any, pattern: str, device: torch.device, ran: list[str]
) -> None:
    models = []
    for way in ("sparse", "dense"):
        model = block(dtype, device)
        move_masks(model, None, pattern, Phase(rule), products=way)  # type: ignore[arg-type]
        models.append(model)
    for shape in ((7, 64), (2, 3, 5, 64), (200, 64)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(device, dtype)
        found, wanted = backward(models[0], x), backward(models[1], x)
        for own, other in zip(found, wanted, strict=True):
            assert own.shape == other.shape
            assert torch.allclose(own, other, rtol=4e-2, atol=4e-2)
        for mine, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
            assert mine.grad is not None
            assert theirs.grad is not None
            assert torch.allclose(mine.grad, theirs.grad, rtol=5e-2, atol=2e-1)
    packs = {"2:4": "compress_half", "2:4t": "keep_both_half"}
    assert packs[pattern] in ran
    assert any(name.startswith("decode_") for name in ran)
    assert any(name.startswith("gemm_") for name in ran)


def test_steps_learn_and_masks_stay_transposable(device: torch.device) -> None:
    model = block(torch.bfloat16, device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    masks = move_masks(model, optimizer, "2:4t", Phase("fst"), products="sparse")
    x = torch.randn(128, 64, generator=torch.Generator().manual_seed(3)).to(device, torch.bfloat16)
    y = torch.randn(128, 20, generator=torch.Generator().manual_seed(4)).to(device, torch.bfloat16)
    losses = []
    for _ in range(30):
        loss = (model(x) - y).float().square().mean()
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]
    for mask in masks.masks.values():
        for each in (mask, mask.T):
            assert bool((each.reshape(len(each), -1, 4).sum(-1) == 2).all())
    masks.finish()
    for layer in (model[0], model[2]):
        assert isinstance(layer, nn.Linear)
        assert float((layer.weight == 0).float().mean()) >= 0.5


def test_zeros_stay_through_steps(device: torch.device) -> None:
    model = block(torch.float32, device)
    with torch.no_grad():
        for layer in (model[0], model[2]):
            assert isinstance(layer, nn.Linear)
            layer.weight.view(len(layer.weight), -1, 4)[..., 1:3] = 0
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=device.type == "cuda")
    handle = keep_masks(model, optimizer)
    for _ in range(3):
        model(torch.randn(16, 64).to(device)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    for layer in (model[0], model[2]):
        assert isinstance(layer, nn.Linear)
        assert not layer.weight.view(len(layer.weight), -1, 4)[..., 1:3].any()
        assert layer.weight.view(len(layer.weight), -1, 4)[..., 0].all()
    handle.remove()

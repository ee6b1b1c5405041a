"""What an optimizer remembers of a model that trains compressed: kept values alone."""

from __future__ import annotations

import torch
from torch import nn

import twofour
from twofour.nn import SparseLinear
from twofour.training import keep_masks


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    return sum(
        value.nbytes
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    )


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.randn(16, 256, generator=torch.Generator().manual_seed(0))).square().mean().backward()
    optimizer.step()


def test_states_take_half_the_bytes_and_learn_the_same(native: None) -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256))
    twofour.prune(dense)
    compressed = nn.Sequential(*(SparseLinear.from_linear(m) if isinstance(m, nn.Linear) else m for m in dense))
    for layer in compressed:
        if isinstance(layer, SparseLinear):
            layer.bias = nn.Parameter(layer.bias.detach().clone())  # type: ignore[union-attr]
            layer.requires_grad_values()
    of_dense, of_compressed = (torch.optim.AdamW(m.parameters(), 1e-3) for m in (dense, compressed))
    with keep_masks(dense, of_dense):
        for _ in range(5):
            step(dense, of_dense)
            step(compressed, of_compressed)
    assert state_bytes(of_compressed) <= 0.51 * state_bytes(of_dense)
    for layer, plain in zip(compressed, dense, strict=True):
        if isinstance(layer, SparseLinear):
            assert torch.allclose(layer.matrix.to_dense(), plain.weight, atol=1e-5)

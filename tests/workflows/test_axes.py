"""Blocks of channels, and what each operator does to them: between two Linears, one operator at a time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tests.on_device import DEVICE
from torch import Tensor, nn
from torch.nn import functional

import twofour
from twofour.workflows.axes import AxisAlgebra, Blocks

# ---- blocks ---------------------------------------------------------------------------------------------------------


def test_blocks_are_cut_where_one_of_them_is() -> None:
    blocks = Blocks()
    a, b = blocks.new(12), blocks.new(12)
    blocks.unify(a, b)
    blocks.part(a, 3, 7)
    assert [blocks.size[root] for root in blocks.roots(b)] == [3, 4, 5]
    assert blocks.roots(a) == blocks.roots(b)


def test_joined_blocks_are_unified_piece_by_piece() -> None:
    blocks = Blocks()
    whole, x, y, z = blocks.new(12), blocks.new(5), blocks.new(3), blocks.new(4)
    blocks.unify(whole, blocks.join([x, y, z]))
    assert [blocks.size[root] for root in blocks.roots(whole)] == [5, 3, 4]
    other = blocks.new(12)
    blocks.part(other, 6, 12)
    blocks.unify(other, whole)
    assert [blocks.size[root] for root in blocks.roots(other)] == [5, 1, 2, 4]
    assert blocks.roots(x) + blocks.roots(y) + blocks.roots(z) == blocks.roots(other)


def test_a_block_beside_itself() -> None:
    blocks = Blocks()
    x, whole = blocks.new(4), blocks.new(8)
    blocks.unify(whole, blocks.join([x, x]))
    assert blocks.roots(whole) == blocks.roots(x) * 2
    # Shifted by one: every channel is the next one.
    row = blocks.new(6)
    blocks.unify(blocks.part(row, 0, 5), blocks.part(row, 1, 6))
    assert [blocks.size[root] for root in blocks.roots(row)] == [1] * 6
    assert len(set(blocks.roots(row))) == 1


@pytest.mark.parametrize("pinned_first", [False, True])
def test_pins_reach_exactly_what_they_are_unified_with(pinned_first: bool) -> None:
    blocks = Blocks()
    whole, left, right = blocks.new(8), blocks.new(4), blocks.new(4, "right")
    joined = blocks.join([left, right])
    blocks.unify(*((joined, whole) if pinned_first else (whole, joined)))
    assert blocks.reason(blocks.part(whole, 0, 4)) is None
    assert blocks.reason(blocks.part(whole, 4, 8)) == "right"
    blocks.pin(left, "left")
    blocks.pin(left, "later")
    assert blocks.reason(whole) == "left"
    assert blocks.is_pinned(whole)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((2, 12), (2, 3, 4)),
        ((2, 3, 4), (2, 12)),
        ((5, 2, 12), (5, 6, 4)),
        ((5, 6, 4), (5, 2, 12)),
        ((1, 2, 1, 12), (2, 3, 1, 4)),
        ((2, 3, 4), (6, 4)),
    ],
)
def test_a_view_and_back_is_the_same_channels(before: tuple[int, ...], after: tuple[int, ...]) -> None:
    algebra = AxisAlgebra()
    labels = algebra.new(before)
    back = algebra.reshape(algebra.reshape(labels, after, "cut"), before, "merged")
    assert back.shape == before
    first, last = labels.axes[-1].ids, back.axes[-1].ids
    assert algebra.blocks.reason(int(first)) is None
    assert {block for root in last.flat for block in algebra.blocks.roots(int(root))} == set(
        algebra.blocks.roots(int(first))
    )


def test_a_view_that_shuffles_pins() -> None:
    algebra = AxisAlgebra()
    labels = algebra.new((6, 10))
    algebra.reshape(labels, (4, 15), "shuffled")
    assert [algebra.blocks.reason(int(axis.ids)) for axis in labels.axes] == ["shuffled", "shuffled"]


# ---- operators ------------------------------------------------------------------------------------------------------


class Between(nn.Module):
    """[2, 5, 8] -> [2, 5, 16] -> function -> [..., 16] -> 8."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], width: int = 16) -> None:
        super().__init__()
        self.first, self.last, self.function = nn.Linear(8, 16), nn.Linear(width, 8), function
        self.vector = nn.Parameter(torch.rand(16) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self.first(x), self.vector))


def heads(x: Tensor) -> Tensor:
    return x.view(2, 5, 2, 8).transpose(1, 2)


def merged(x: Tensor) -> Tensor:
    return x.transpose(1, 2).reshape(2, 5, 16)


def attention(x: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(x, x, x, is_causal=True)


def grouped_attention(x: Tensor, v: Tensor) -> Tensor:
    """Four heads of queries, two of keys and values."""
    values, ones = x.view(2, 5, 2, 8).transpose(1, 2), torch.ones(2, 4, 5, 8)
    found = functional.scaled_dot_product_attention(ones, ones[:, :2], values, enable_gqa=True)
    return found.transpose(1, 2).reshape(2, 5, 32)


CARRY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": lambda x, v: x + v,
    "in place": lambda x, v: x.mul_(v).relu_(),
    "where": lambda x, v: torch.where(x > v, x, v),
    "masked_fill": lambda x, v: x.masked_fill(x > v, 0.5),
    "to and back": lambda x, v: x.double().float().contiguous().clone(),
    "softmax": lambda x, v: (x * v).softmax(-1),
    "layer_norm": lambda x, v: functional.layer_norm(x, (16,), v, v + 1),
    "rms_norm": lambda x, v: functional.rms_norm(x, (16,), v),
    "batch_norm": lambda x, v: functional.batch_norm(x.transpose(1, 2), v, v + 1, v, v).transpose(1, 2),
    "norm": lambda x, v: functional.normalize(x, dim=-1) * v,
    "mean, var": lambda x, v: (x - x.mean(-1, keepdim=True)) * x.var(-1, keepdim=True) * v,
    "sum of tokens": lambda x, v: x.sum(1) * v,
    "max of tokens": lambda x, v: x.amax(1) * v,
    "one token": lambda x, v: x[:, 2] * v,
    "tokens by index": lambda x, v: x[:, torch.tensor([3, 1, 1])] * v,
    "index_select": lambda x, v: x.index_select(1, torch.tensor([3, 1])) * v,
    "flip of tokens": lambda x, v: x.flip(1) * v,
    "cumsum of tokens": lambda x, v: x.cumsum(1) * v,
    "matmul": lambda x, v: (x * v) @ (x.transpose(-1, -2) @ x),
    "outer product": lambda x, v: x @ torch.outer(v, v),
    "einsum": lambda x, v: torch.einsum("bsd,btd,bte->bse", x * v, x, x),
    "baddbmm": lambda x, v: torch.baddbmm(x, torch.ones(2, 5, 5), x * v),
    "stack": lambda x, v: torch.stack([x, x * v], 2).sum(2),
    "expand": lambda x, v: x * v[None, None].expand(2, 5, -1),
    "repeat of tokens": lambda x, v: x.repeat(1, 2, 1) * v,
    "repeat_interleave": lambda x, v: x.repeat_interleave(2, 1) * v,
    "pad of tokens": lambda x, v: functional.pad(x, (0, 0, 1, 2)) * v,
    "chunk of tokens": lambda x, v: torch.cat(x.chunk(2, 1), 1) * v,
    "unbind": lambda x, v: x.unbind(1)[3] * v,
    "movedim": lambda x, v: x.movedim(-1, 0).movedim(0, -1).mT.mT * v,
    "squeeze": lambda x, v: x.unsqueeze(2).squeeze(2) * v,
    "merged tokens": lambda x, v: x.flatten(0, 1) * v,
    "zeros": lambda x, v: torch.zeros(16) + x + torch.ones_like(x),
    "full attention": lambda x, v: attention(x * v),
}
IN_BLOCKS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "heads": lambda x, v: merged(heads(x)),
    "attention": lambda x, v: merged(attention(heads(x))) * v,
    "attention of flat heads": lambda x, v: merged(attention(heads(x).reshape(4, 5, 8)).view(2, 2, 5, 8)),
    "bmm": lambda x, v: merged(torch.bmm(torch.ones(4, 5, 5), heads(x).reshape(4, 5, 8)).view(2, 2, 5, 8)),
    "one head": lambda x, v: torch.cat([heads(x)[:, 1], heads(x)[:, 0]], -1),
    "heads by slices": lambda x, v: torch.cat([heads(x)[:, 1:2], heads(x)[:, :1]], 1).transpose(1, 2).flatten(2),
    "split": lambda x, v: torch.cat([x[..., 8:], x[..., :8].tanh()], -1) * v,
    "gate": lambda x, v: torch.cat([x[..., :8] * x[..., 8:].sigmoid()] * 2, -1),
    "norm of heads": lambda x, v: merged(functional.layer_norm(heads(x), (8,), v[:8], v[8:])),
    "mean of heads": lambda x, v: torch.cat([heads(x).mean(1)] * 2, -1),
    "group_norm": lambda x, v: functional.group_norm(x.transpose(1, 2), 2, v, v).transpose(1, 2),
}
PINNED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sort": lambda x, v: x.sort(-1).values,
    "cumsum": lambda x, v: x.cumsum(-1),
    "flip": lambda x, v: x.flip(-1),
    "roll": lambda x, v: x.roll(1, -1),
    "every other": lambda x, v: x[..., ::2].repeat(1, 1, 2),
    "gather": lambda x, v: x.gather(-1, torch.arange(16).flip(0).expand(2, 5, 16)),
    "index": lambda x, v: x[..., torch.arange(15, -1, -1)],
    "arange": lambda x, v: x * torch.arange(16),
    "tril": lambda x, v: x @ torch.ones(16, 16).tril(),
    "mixed": lambda x, v: x.reshape(2, 8, 10).transpose(1, 2).reshape(2, 5, 16),
    "outer axis moved": lambda x, v: x.view(2, 5, 4, 4).transpose(2, 3).flatten(2),
    "heads over features": lambda x, v: (x.view(2, 5, 4, 4) * v.view(4, 4).T).flatten(2),
    "diagonal": lambda x, v: x * torch.outer(v, v).diagonal(),
    "fft": lambda x, v: torch.fft.rfft(x, n=31).abs(),
}


@pytest.mark.parametrize("name", CARRY)
def test_channels_are_carried_whole(name: str) -> None:
    model = Between(CARRY[name]).eval()
    report = twofour.permute(model, torch.randn(2, 5, 8), sweeps=40, include="last")
    assert [(row["action"], row["channels"], row["blocks"]) for row in report.rows] == [("permuted", 16, 1)]


@pytest.mark.parametrize("name", IN_BLOCKS)
def test_channels_are_carried_in_blocks(name: str) -> None:
    model = Between(IN_BLOCKS[name]).eval()
    report = twofour.permute(model, torch.randn(2, 5, 8), sweeps=40, include="last")
    assert {row["action"] for row in report.rows} == {"permuted"}
    assert {row["channels"] // row["blocks"] for row in report.rows} == {8}


@pytest.mark.parametrize("name", PINNED)
def test_channels_that_must_stay_are_named(name: str) -> None:
    model = Between(PINNED[name]).eval()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    report = twofour.permute(model, torch.randn(2, 5, 8), sweeps=40, include="last")
    assert {row["action"] for row in report.rows} == {"left"}
    assert all(row["reason"] for row in report.rows)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_grouped_queries_read_the_values_of_their_head() -> None:
    model = Between(grouped_attention, 32).eval()
    report = twofour.permute(model, torch.randn(2, 5, 8), sweeps=40, include="last")
    assert [(row["action"], row["channels"], row["blocks"]) for row in report.rows] == [("permuted", 16, 2)]


def test_channels_that_are_returned_too_stay() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            x = self.a(x)
            return {"hidden": x, "out": self.b(x)}

    report = twofour.permute(Both(), torch.randn(2, 8), sweeps=40, include="b")
    assert [row["reason"] for row in report.rows] == ["output of the model"]


@pytest.mark.parametrize("frozen", [False, True])
def test_inner_graphs_are_read(frozen: bool) -> None:
    """no_grad and autocast inside a forward become graphs inside the graph."""

    def inner(x: Tensor, v: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast(DEVICE.type, enabled=False):
            scale = (v * v).sqrt()
        return x * scale

    model = Between(inner).eval().requires_grad_(not frozen)
    report = twofour.permute(model, torch.randn(2, 5, 8), sweeps=40, include="last")
    assert [row["action"] for row in report.rows] == ["permuted"]

"""The functions that users call, on tensors of the CPU and an emulated GPU: what they give kernels, and what they refuse."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from tests.cuda import emulation
from tests.cuda.test_layout import matrix_of

from twofour import PatternError, ShapeError, SparseMatrix, UnsupportedError
from twofour.kernels.cuda import layout, packing, table
from twofour.masks import nm_mask


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that ran, on the memory that they were given."""
    names: list[str] = []

    def launch(name: str, grid: Sequence[int], device: torch.device, *arguments: int) -> None:
        names.append(name)
        emulation.launch(name, grid, table.KERNEL_TEXTS[name].threads, *arguments)

    monkeypatch.setattr(table, "launch", launch)
    monkeypatch.setattr(packing, "_on_gpu", lambda _: True)
    return names


def equal(packed: packing.PackedMatrix, dense: torch.Tensor, mask: torch.Tensor) -> bool:
    matrix = SparseMatrix.from_dense(dense.contiguous(), "2:4", mask=mask.contiguous())
    values, metadata = layout.pack(matrix.values, matrix.metadata, *dense.shape)
    same = torch.equal(packed.values.view(torch.uint8), values.view(torch.uint8))
    return same and torch.equal(packed.metadata, metadata) and packed.shape == tuple(dense.shape)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weights_are_pruned_packed_changed_and_expanded(dtype: torch.dtype, launched: list[str]) -> None:
    weight = torch.randn(72, 100).to(dtype)
    mask = torch.zeros(72, 100, dtype=torch.bool)
    own, turned = packing.prune_both(weight, mask)
    assert torch.equal(mask, nm_mask(weight.abs(), "2:4t"))
    assert equal(own, weight, mask)
    assert equal(turned, weight.T, mask.T)
    changed = weight * 2
    again = packing.PackedMatrix(packing.take(changed, own), own.metadata, own.shape)
    assert equal(again, changed, mask)
    assert torch.equal(packing.expand(again), torch.where(mask, changed, 0))
    one_way = packing.prune(weight)
    assert equal(one_way, weight, nm_mask(weight.abs(), "2:4"))
    assert equal(packing.compress(packing.expand(one_way)), weight, nm_mask(weight.abs(), "2:4"))
    name = "bf16" if dtype == torch.bfloat16 else "fp16"
    assert launched[:2] == [f"prune_both_{name}", "take_half"]


def test_views_are_read_where_they_lie_or_copied(launched: list[str]) -> None:
    whole = torch.randn(64, 132).bfloat16()
    for weight in (whole[:, 4:132], whole[:, 1:129], whole[:, :128].T.contiguous().T):
        mask = nm_mask(weight.abs(), "2:4t")
        own, turned = packing.prune_both(weight)
        assert equal(own, weight, mask)
        assert equal(turned, weight.T, mask.T)


def test_nothing_is_launched_for_nothing(launched: list[str]) -> None:
    for shape in ((0, 64), (16, 0)):
        empty = torch.empty(shape, dtype=torch.bfloat16)
        packed = packing.compress(empty)
        assert packed.values.numel() == packed.metadata.numel() == 0
        assert packing.expand(packed).shape == shape
        assert packing.prune_both(empty)[1].shape == shape[::-1]
    assert launched == []


def test_groups_that_keep_three_are_refused(launched: list[str]) -> None:
    dense = matrix_of((16, 64), torch.int8).to_dense()
    dense[3, 8:11] = 1
    with pytest.raises(PatternError, match=r"\[16, 64\] does not keep two of each four: prune it first"):
        packing.compress(dense)
    assert packing.compress(dense, check=False).shape == (16, 64)


def test_what_it_refuses(launched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(16, 64).bfloat16()
    with pytest.raises(ShapeError, match=r"\[16, 6\] is no matrix whose rows come in groups of 4"):
        packing.prune(weight[:, :6])
    with pytest.raises(ShapeError, match=r"\[6, 64\]: both axes come in groups of 4 where the mask is transposable"):
        packing.prune_both(weight[:6])
    with pytest.raises(UnsupportedError, match="float32 is not packed by a GPU kernel: bfloat16, float16 are"):
        packing.prune(weight.float())
    with pytest.raises(ShapeError, match=r"mask is \[16, 32\] torch.bool: a contiguous bool of \[16, 64\] takes it"):
        packing.prune_both(weight, torch.zeros(16, 32, dtype=torch.bool))
    packed = packing.prune(weight)
    with pytest.raises(ShapeError, match="they must agree"):
        packing.take(weight[:8], packed)
    with pytest.raises(ShapeError, match="they must agree"):
        packing.take(weight.half(), packed)
    monkeypatch.undo()
    with pytest.raises(UnsupportedError, match="the matrix is on cpu: GPU kernels need it on a GPU"):
        packing.prune(weight)

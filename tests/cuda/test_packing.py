"""The functions that users call, on tensors of the CPU and an emulated GPU: what they give kernels, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from tests.cuda.products import launched
from tests.cuda.test_layout import matrix_of
from tests.cuda.test_pack import weights

from twofour import PatternError, ShapeError, SparseMatrix, UnsupportedError
from twofour.kernels import reference
from twofour.kernels.cuda import layout, packing, products
from twofour.masks import nm_mask

__all__ = ["launched"]


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
    with pytest.raises(UnsupportedError, match="float32 is not packed by a GPU kernel: bfloat16, float16, .* are"):
        packing.prune(weight.float())
    with pytest.raises(ShapeError, match=r"mask is \[16, 32\] torch.bool: a contiguous bool of \[16, 64\] fits"):
        packing.prune_both(weight, torch.zeros(16, 32, dtype=torch.bool))
    packed = packing.prune(weight)
    with pytest.raises(ShapeError, match="they must agree"):
        packing.take(weight[:8], packed)
    with pytest.raises(ShapeError, match="they must agree"):
        packing.take(weight.half(), packed)
    monkeypatch.undo()
    with pytest.raises(UnsupportedError, match="the matrix is on cpu: GPU kernels need it on a GPU"):
        packing.prune(weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weights_are_packed_under_a_mask_that_is_given(dtype: torch.dtype, launched: list[str]) -> None:
    whole = torch.randn(72, 131).to(dtype)
    whole[3, 5] = float("nan")
    for weight in (whole[:, :128].contiguous(), whole[:, 3:]):
        mask = nm_mask(torch.rand(72, 128), "2:4t")
        before = weight.clone()
        own, turned = packing.keep_both(weight, mask)
        assert torch.equal(weight.view(torch.int16), before.view(torch.int16))
        masked, again = torch.where(mask, before, torch.zeros_like(before)), []
        for check in (True, False):
            weight.copy_(before)
            again.append(packing.keep_both(weight, mask, in_place=True, check=check))
            assert torch.equal(weight.contiguous().view(torch.int16), masked.view(torch.int16))
        for first, second in ((own, turned), *again):
            assert equal(first, before, mask)
            assert equal(second, before.T, mask.T)
    assert set(launched) == {"keep_both_half"}


def test_masks_that_do_not_keep_two_are_refused(launched: list[str]) -> None:
    weight = torch.randn(64, 64).bfloat16()
    rows_only = nm_mask(torch.rand(64, 64), "2:4")
    for mask in (rows_only, rows_only.T.contiguous(), torch.ones(64, 64, dtype=torch.bool)):
        with pytest.raises(PatternError, match="does not keep two of each four along both axes"):
            packing.keep_both(weight, mask)
        packing.keep_both(weight, mask, check=False)
    with pytest.raises(ShapeError, match=r"strides \(1, 64\): only one whose rows have no gaps"):
        packing.keep_both(weight.T, nm_mask(torch.rand(64, 64), "2:4t"), in_place=True)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8], ids=str)
def test_weights_of_8_bits_are_pruned(dtype: torch.dtype, launched: list[str]) -> None:
    weight = torch.randint(-128, 128, (40, 200), dtype=torch.int8).view(dtype)
    mask = nm_mask(weight.double().abs(), "2:4")
    assert equal(packing.prune(weight), weight, mask)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("columns", [4, 60, 68, 1092])
def test_weights_are_quantized_row_by_row(dtype: torch.dtype, columns: int, launched: list[str]) -> None:
    weight = (torch.randn(40, columns + 1) * 2.0 ** torch.randint(-20, 12, (40, 1))).to(dtype)[:, 1:]
    weight[1] = 0
    weight[2] = -0.0
    weight[3, ::3] = float("nan")
    weight[4, 1] = float("inf")
    weight[5] = 1e-7 if dtype == torch.float16 else 2.0**-120
    weight[6] = -1.0
    weight[7, 0] = -(2.0**-119)
    packed, scales = packing.quantize(weight)
    q, wanted = reference.quantize_rows_e4m3(weight)
    assert torch.equal(scales, wanted)
    mask = nm_mask(weight.float().abs(), "2:4")
    matrix = SparseMatrix.from_dense(q.contiguous(), "2:4", mask=mask)
    values, metadata = layout.unpack(packed.values, packed.metadata, 40, columns)
    assert torch.equal(metadata, matrix.metadata)
    nan = matrix.values.float().isnan()
    assert torch.equal(values.float().isnan(), nan)
    assert torch.equal(values.view(torch.uint8)[~nan], matrix.values.view(torch.uint8)[~nan])
    assert packing.quantize(weight[:0])[1].shape == (0,)


def test_the_8_bit_float_nearest_to_every_16_bit_one(launched: list[str]) -> None:
    """Every finite float16 of at most 448 beside 448, whose factor is 1."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    every = every[every.abs() <= 448]
    rows = torch.zeros(-(-len(every) // 32), 128, dtype=torch.float16)
    rows[:, 2::4] = torch.cat([every, every.new_zeros(-len(every) % 32)]).view(-1, 32)
    rows[:, 1::4] = 448
    packed, scales = packing.quantize(rows)
    assert scales.tolist() == [1.0] * len(rows)
    values, _ = layout.unpack(packed.values, packed.metadata, *rows.shape)
    found = values.view(torch.uint8)[:, 1::2].flatten()[: len(every)]
    kept = every != 0  # of zeros, the lower place is kept
    assert torch.equal(found[kept], every.to(torch.float8_e4m3fn).view(torch.uint8)[kept])


@pytest.mark.parametrize("kind", ["normal", "ties", "far apart", "beyond double", "edges", "any bits"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_masks_alone_are_the_best_transposable_ones(kind: str, dtype: torch.dtype, launched: list[str]) -> None:
    if dtype == torch.float32 and kind == "any bits":
        whole = torch.randint(-(2**31), 2**31, (72, 133), generator=torch.Generator().manual_seed(1)).int().view(dtype)
    elif dtype == torch.float32 and kind == "beyond double":  # exponents that 64 bits do not hold
        whole = torch.randn(72, 133) * 2.0 ** torch.randint(-40, 20, (72, 133))
    else:
        whole = weights((72, 133), torch.bfloat16 if dtype == torch.float32 else dtype, kind).to(dtype)
    for weight in (whole[:, :132], whole[:, 1:], whole[:64, :64].T.contiguous().T, whole[:0, :64]):
        assert torch.equal(packing.mask_both(weight), nm_mask(weight.double().abs(), "2:4t"))
    with pytest.raises(ShapeError, match="both axes come in groups of 4"):
        packing.mask_both(whole[:6, :64])
    assert len(launched) == 3


def test_a_layout_that_was_moved_or_cut_is_refused(launched: list[str]) -> None:
    packed = packing.prune(torch.randn(72, 200).bfloat16())
    x = torch.zeros(3, 200).bfloat16()
    launched.clear()
    flat = torch.zeros(packed.values.numel() + 1).bfloat16()
    for values, metadata in (
        (packed.values.to(memory_format=torch.channels_last), packed.metadata),
        (packed.values[:-1], packed.metadata),
        (packed.values, packed.metadata[:, :-1]),
        (packed.values, packed.metadata.long()),
        (packed.values, packed.metadata.transpose(0, 1).contiguous().transpose(0, 1)),
        (flat[1:].view(packed.values.shape), packed.metadata),
    ):
        moved = packing.PackedMatrix(values, metadata, (72, 200))
        with pytest.raises(ShapeError, match=r"a matrix of \[72, 200\] is packed as \[5, 8, 32, 8\] and \[5, 4, 32\]"):
            products.linear(x, moved)
        with pytest.raises(ShapeError, match="contiguous, at multiples of 16 bytes, on one device"):
            packing.expand(moved)
        with pytest.raises(ShapeError):
            packing.take(torch.zeros(72, 200).bfloat16(), moved)
    assert launched == []


def test_what_is_wrong_is_not_noted_where_nobody_looks(launched: list[str]) -> None:
    weight = torch.ones(64, 64).bfloat16()
    for packed in (
        *packing.keep_both(weight, torch.ones(64, 64, dtype=torch.bool), check=False),
        packing.compress(weight, check=False),
    ):
        assert packed.shape == (64, 64)
    assert launched == ["keep_both_half", "compress_half"]

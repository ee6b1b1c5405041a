"""Packing weights under a mask, both ways at once: the bytes of the plain way round."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor

from twofour import PatternError, ShapeError, SparseMatrix, UnsupportedError, native
from twofour.kernels import cpu
from twofour.masks import nm_mask

pytestmark = pytest.mark.usefixtures("native")
ISAS = native.LOADED.pack_masked_isas() if native.LOADED is not None else []
SHAPES = [
    (4, 4),
    (16, 16),
    (16, 48),
    (20, 36),
    (64, 32),
    (12, 16),
    (100, 52),
    (48, 100),
    (32, 64),
    (16, 80),
    (36, 144),
    (64, 252),
]


def plain(weight: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """By way of the canonical format."""
    matrix = SparseMatrix.from_dense(weight, "2:4", mask=mask)
    return cpu.pack(matrix.values, matrix.metadata, *weight.shape)


def weight_of(shape: tuple[int, int], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Any bits: NaN with payloads, infinities, subnormals, -0.0."""
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    info = torch.iinfo(bits)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(info.min, info.max, shape, generator=generator, dtype=bits).view(dtype)


def same_bits(one: Tensor, other: Tensor) -> bool:
    as_bits = torch.int32 if one.dtype == torch.float32 else torch.int16 if one.dtype == torch.bfloat16 else one.dtype
    return one.shape == other.shape and torch.equal(one.view(as_bits), other.view(as_bits))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_both_ways_give_the_bytes_of_the_canonical_way(shape: tuple[int, int], dtype: torch.dtype, isa: str) -> None:
    weight = weight_of(shape, dtype)
    mask = nm_mask(torch.rand(shape, generator=torch.Generator().manual_seed(1)), "2:4t")
    found, turned = cpu.pack_masked(weight, mask, both_ways=True, isa=isa)
    assert turned is not None
    for own, wanted in zip((*found, *turned), (*plain(weight, mask), *plain(weight.T, mask.T)), strict=True):
        assert same_bits(own, wanted)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 16), (17, 36), (33, 64), (50, 208)], ids=str)
def test_one_way_takes_any_number_of_rows_and_any_mask(shape: tuple[int, int], dtype: torch.dtype, isa: str) -> None:
    weight = weight_of(shape, dtype)
    mask = nm_mask(torch.rand(shape, generator=torch.Generator().manual_seed(2)), "2:4")
    found, turned = cpu.pack_masked(weight, mask, isa=isa)
    assert turned is None
    assert all(same_bits(own, wanted) for own, wanted in zip(found, plain(weight, mask), strict=True))


def test_strides_and_threads() -> None:
    weight = weight_of((64, 96), torch.bfloat16)
    mask = nm_mask(torch.rand(64, 48), "2:4t")
    wanted = cpu.pack_masked(weight[:, :48].contiguous(), mask, both_ways=True)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for view in (weight[:, :48], weight[:, :48].T.contiguous().T):
                found = cpu.pack_masked(view, mask, both_ways=True)
                assert same_bits(found[0][0], wanted[0][0])
                assert same_bits(found[1][1], wanted[1][1])  # type: ignore[index]
    finally:
        torch.set_num_threads(before)


def test_it_runs_as_a_layer_and_as_its_gradient() -> None:
    weight, x = torch.randint(-4, 5, (40, 64)).float(), torch.randint(-4, 5, (9, 64)).float()
    mask = nm_mask(weight.abs() + torch.rand(40, 64) / 2, "2:4t")
    kept = torch.where(mask, weight, 0)
    found, turned = cpu.pack_masked(weight, mask, both_ways=True)
    y = cpu.linear(x, *found, None, 40, 64)
    assert torch.equal(y, x @ kept.T)
    assert turned is not None
    assert torch.equal(cpu.linear(y, *turned, None, 64, 40), y @ kept)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("place", [(0, 0), (17, 30), (35, 2), (34, 47), (9, 77), (31, 143)], ids=str)
def test_masks_that_do_not_hold_are_refused_wherever_they_break(
    place: tuple[int, int], dtype: torch.dtype, isa: str
) -> None:
    weight = torch.ones(36, 144, dtype=dtype)
    sound = nm_mask(torch.rand(36, 144, generator=torch.Generator().manual_seed(0)), "2:4t")
    mask = sound.clone()
    mask[place] = ~mask[place]
    with pytest.raises(PatternError, match=r"\[36, 144\] weight does not keep two of each four: take nm_mask"):
        cpu.pack_masked(weight, mask, isa=isa)
    row, column = place
    group = slice(column // 4 * 4, column // 4 * 4 + 4)
    mask = sound.clone()
    mask[row, group] = ~mask[row, group]  # rows still hold, four columns do not
    cpu.pack_masked(weight, mask, isa=isa)
    with pytest.raises(PatternError, match=r"two of each four along both axes: take nm_mask\(scores, '2:4t'\)"):
        cpu.pack_masked(weight, mask, both_ways=True, isa=isa)


def test_memory_is_used_again_once_nobody_holds_it() -> None:
    memory = cpu.PackedMemory()
    mask = nm_mask(torch.rand(32, 64, generator=torch.Generator().manual_seed(3)), "2:4t")
    weights = [weight_of((32, 64), torch.float32, seed) for seed in range(3)]
    alone = [cpu.pack_masked(weight, mask, both_ways=True) for weight in weights]
    first = cpu.pack_masked(weights[0], mask, both_ways=True, memory=memory)
    second = cpu.pack_masked(weights[1], mask, both_ways=True, memory=memory)
    assert second[1] is not None
    places = [tensor.data_ptr() for tensor in second[0]]
    turned = second[1]
    del second
    third = cpu.pack_masked(weights[2], mask, both_ways=True, memory=memory)
    assert [tensor.data_ptr() for tensor in third[0]] == places  # of W; that of W.T is still held
    for found, wanted in zip((first[0], first[1], turned, *third), (*alone[0], alone[1][1], *alone[2]), strict=True):
        assert found is not None
        assert wanted is not None
        assert all(same_bits(own, other) for own, other in zip(found, wanted, strict=True))
    assert copy.deepcopy(memory) is memory
    assert isinstance(pickle.loads(pickle.dumps(memory)), cpu.PackedMemory)


def test_what_it_refuses() -> None:
    weight, mask = torch.ones(6, 8), torch.tensor([True, True, False, False] * 2).repeat(6, 1)
    with pytest.raises(ShapeError, match=r"weight is \[6, 8\] and mask \[6, 4\]: two matrices of one shape"):
        cpu.pack_masked(weight, mask[:, :4])
    with pytest.raises(ShapeError, match=r"\[6, 8\]: its groups of 4 along both axes must be whole"):
        cpu.pack_masked(weight, mask, both_ways=True)
    with pytest.raises(ShapeError, match=r"\[6, 6\]: its groups of 4 along in_features must be whole"):
        cpu.pack_masked(weight[:, :6], mask[:, :6])
    with pytest.raises(
        UnsupportedError, match=r"weight is torch.float16 on cpu, mask torch.bool on cpu: float32 or bfloat16"
    ):
        cpu.pack_masked(weight.half(), mask)
    with pytest.raises(UnsupportedError, match="not packed by an instruction set 'sse9'"):
        cpu.pack_masked(weight, mask, isa="sse9")

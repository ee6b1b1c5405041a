"""Soft thresholds: inside the best mask, continuous, and S-STE's map where that is defined."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from twofour import ShapeError, UnsupportedError, native
from twofour.masks import cpu, nm_mask, soft_threshold

PATTERNS = ("2:4", "1:4", "3:4", "4:8", "2:4x2", "2:4x4", "2:4t")


def by_leaving_out(block: Tensor) -> Tensor:
    """A 4x4 block of 2:4t: the best sum of all masks less the best without the place, by going through all of them."""
    pairs = list(itertools.combinations(range(4), 2))
    masks = [
        [[column in pair for column in range(4)] for pair in rows]
        for rows in itertools.product(pairs, repeat=4)
        if all(sum(column in pair for pair in rows) == 2 for column in range(4))
    ]
    assert len(masks) == 90
    sums = [(float(block.abs()[torch.tensor(mask)].sum()), mask) for mask in masks]
    found = torch.zeros_like(block)
    for row, column in itertools.product(range(4), repeat=2):
        without = max(total for total, mask in sums if not mask[row][column])
        gain = max(total for total, _ in sums) - without
        found[row, column] = min(gain, float(block[row, column].abs()))
    return found.copysign(block)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_it_lies_in_the_best_mask_and_nothing_grows(pattern: str) -> None:
    x = torch.randn(16, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = soft_threshold(x, pattern)
    assert not ((y != 0) & ~nm_mask(x.abs(), pattern)).any()
    assert (y.abs() <= x.abs()).all()
    assert (y * x >= 0).all()
    assert (y != 0).double().mean() > 0.9 * nm_mask(x.abs(), pattern).double().mean()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_it_is_continuous_where_the_mask_jumps(pattern: str) -> None:
    generator = torch.Generator().manual_seed(1)
    start, way = (torch.randn(8, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    steps = 300
    path = [soft_threshold(start + way * step / steps, pattern) for step in range(steps + 1)]
    jumps = [float((b - a).abs().max()) for a, b in itertools.pairwise(path)]
    masks = [nm_mask((start + way * step / steps).abs(), pattern) for step in range(0, steps + 1, 25)]
    assert any(not torch.equal(a, b) for a, b in itertools.pairwise(masks))
    # One place moves by at most the slope of the path; a value depends on at most all those of its block.
    assert max(jumps) <= 8 * float(way.abs().max()) / steps


def test_rows_lose_the_largest_dropped_magnitude() -> None:
    x = torch.tensor([[3.0, -4.0, 1.0, -2.0, 0.0, 0.0, 5.0, -0.0]])
    assert soft_threshold(x, "2:4").tolist() == [[1.0, -2.0, 0.0, 0.0, 0.0, 0.0, 5.0, 0.0]]


def test_shared_rows_shrink_by_what_their_column_gains() -> None:
    x = torch.tensor([[4.0, 2.0, 1.0, 0.0], [-4.0, 0.0, 1.0, 1.0]])
    # sums 8, 2, 2, 1: the columns 0 and 1 stay, and 1 is as good as 2.
    assert soft_threshold(x, "2:4x2").tolist() == [[3.0, 0.0, 0.0, 0.0], [-3.0, 0.0, 0.0, 0.0]]


def test_blocks_against_all_masks() -> None:
    x = torch.randn(8, 12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = soft_threshold(x, "2:4t")
    for row, column in itertools.product(range(0, 8, 4), range(0, 12, 4)):
        block = (slice(row, row + 4), slice(column, column + 4))
        assert torch.allclose(found[block], by_leaving_out(x[block]), rtol=0, atol=1e-14)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes_and_strides(pattern: str, dtype: torch.dtype) -> None:
    x = torch.randint(-9, 10, (16, 8), generator=torch.Generator().manual_seed(3)).to(dtype)
    whole = soft_threshold(x.double(), pattern)
    assert soft_threshold(x, pattern).dtype == dtype
    assert torch.allclose(soft_threshold(x, pattern).double(), whole, rtol=2 * torch.finfo(dtype).eps, atol=0)
    turned = x.T.contiguous().T
    assert torch.equal(soft_threshold(turned, pattern), soft_threshold(x, pattern))


def test_nan_is_seen_and_empty_is_empty() -> None:
    x = torch.tensor([[1.0, float("nan"), 2.0, 3.0, 4.0, 3.0, 2.0, 1.0]])
    found = soft_threshold(x, "2:4")
    assert found[0, :4].isnan().any()
    assert found[0, 4:].tolist() == [2.0, 1.0, 0.0, 0.0]
    assert soft_threshold(x.repeat(4, 1), "2:4t")[:, :4].isnan().any()
    assert soft_threshold(torch.ones(0, 8), "2:4t").shape == (0, 8)


def test_what_it_refuses() -> None:
    with pytest.raises(
        UnsupportedError, match=r"soft thresholds of 8:16t are not known: of transposable patterns 2:4t"
    ):
        soft_threshold(torch.ones(16, 16), "8:16t")
    with pytest.raises(ShapeError, match="not a multiple of 4"):
        soft_threshold(torch.ones(4, 6), "2:4")
    with pytest.raises(ShapeError, match="out_features to be a multiple of 4"):
        soft_threshold(torch.ones(6, 8), "2:4t")


NATIVE = native.LOADED
ISAS = NATIVE.masks_isas() if NATIVE is not None else []


@pytest.mark.of_cpu
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pattern", ["2:4", "2:4t"])
@pytest.mark.parametrize("shape", [(4, 4), (8, 36), (12, 132), (20, 64)], ids=str)
def test_cpp_is_torch(shape: tuple[int, int], pattern: str, dtype: torch.dtype, isa: str) -> None:
    turned = pattern == "2:4t"
    whole = torch.randint(-9, 10, shape, generator=torch.Generator().manual_seed(4)).to(dtype)
    wanted = soft_threshold(whole.double(), pattern, scale=2.0)
    assert torch.equal(cpu.soft_threshold(whole, 2.0, turned, isa=isa).double(), wanted)
    real = torch.randn(shape, generator=torch.Generator().manual_seed(5)).to(dtype)
    wanted = soft_threshold(real.double(), pattern, scale=1.3).float()
    assert torch.allclose(cpu.soft_threshold(real, 1.3, turned, isa=isa), wanted, rtol=3e-7, atol=0)


@pytest.mark.of_cpu
@pytest.mark.parametrize("isa", ISAS)
def test_cpp_with_numbers_that_are_none(isa: str) -> None:
    x = torch.randn(8, 40, generator=torch.Generator().manual_seed(6))
    x[1, 2], x[6, 33] = float("nan"), float("-inf")
    found = cpu.soft_threshold(x, 1.0, True, isa=isa)
    bad = torch.zeros(2, 10, dtype=torch.bool)
    bad[0, 0] = bad[1, 8] = True
    assert torch.equal(found.unflatten(0, (2, 4)).unflatten(2, (10, 4)).isnan().any(3).any(1), bad)
    assert torch.equal(cpu.soft_threshold(x[:, 4:], 1.0, True, isa=isa)[:4], found[:4, 4:])  # rows with gaps
    found = cpu.soft_threshold(x[:7], 1.0, False, isa=isa)
    assert found[1, :4].isnan().all()
    assert int(found.isnan().sum()) == 4
    assert found[6, 33] == float("-inf")
    assert torch.equal(found.nan_to_num(), soft_threshold(x[:7].double(), "2:4").float().nan_to_num())


def test_scales_and_the_map_of_s_ste_for_any_numbers() -> None:
    x = torch.randn(6, 40, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    x[0, :4] = torch.tensor([1.0, -1.0, 1.0, -1.0])
    x[1, :4] = 0.0
    mask = nm_mask(x.abs(), "2:4")
    dropped = torch.where(mask, 0.0, x.abs()).unflatten(1, (10, 4)).amax(2, keepdim=True).expand(6, 10, 4).flatten(1)
    wanted = 1.5 * torch.where(mask, x.sign() * (x.abs() - dropped), 0.0)
    assert torch.allclose(soft_threshold(x, "2:4", scale=1.5), wanted, rtol=1e-15, atol=1e-16)
    for pattern in ("2:4x2", "3:4", "2:4t"):
        two = soft_threshold(x[:4], pattern, scale=2.0)
        assert torch.allclose(two, 2 * soft_threshold(x[:4], pattern))

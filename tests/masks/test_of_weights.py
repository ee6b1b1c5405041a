"""Masks by magnitude in one pass: the bits of the scores' masks; and where two masks differ."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from twofour import native
from twofour.masks import cpu, magnitude, nm_mask
from twofour.masks.of_weights import differences, magnitude_mask

ISAS = native.LOADED.masks_isas() if native.LOADED is not None else []


def hostile(shape: tuple[int, int], dtype: torch.dtype, seed: int) -> Tensor:
    """Ties, zeros, wide ranges, subnormals, infinities and NaN, in different blocks."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator).to(dtype)
    x[:4] = torch.randint(-3, 4, (4, shape[1]), generator=generator).to(dtype)
    x[4:8] *= torch.exp2(torch.randint(-60, 60, (4, shape[1]), generator=generator).float()).to(dtype)
    x[8, 1], x[9, 6], x[10, 11], x[11, 13] = float("nan"), float("inf"), float("-inf"), -0.0
    x[12:16] *= torch.tensor(2.0**-126, dtype=dtype)
    x[16:20] = torch.tensor(torch.finfo(dtype).max, dtype=dtype)
    return x


@pytest.mark.of_cpu
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("columns", [16, 36, 64, 100, 128])
def test_transposable_masks_of_weights(columns: int, dtype: torch.dtype, isa: str) -> None:
    x = hostile((24, columns), dtype, columns)
    wanted = nm_mask(magnitude(x), "2:4t")
    assert torch.equal(cpu.transposable_2_4(x, magnitude=True, isa=isa), wanted)
    assert torch.equal(cpu.transposable_2_4(x.abs(), isa=isa), wanted)
    assert torch.equal(cpu.transposable_2_4(x, isa=isa), nm_mask(x.double(), "2:4t"))  # scores below zero
    wide = torch.cat([x, x], 1)[:, :columns]
    assert torch.equal(cpu.transposable_2_4(wide, magnitude=True, isa=isa), wanted)


@pytest.mark.of_cpu
@pytest.mark.parametrize("isa", ISAS)
def test_bfloat16_sums_at_the_edge_of_what_float_holds(isa: str) -> None:
    """Blocks whose masks differ by the smallest place beside the largest: floats would tie where doubles do not."""
    generator = torch.Generator().manual_seed(0)
    for power in range(6, 24):
        x = torch.randint(129, 256, (64, 64), generator=generator).to(torch.bfloat16)
        small = torch.rand(64, 64, generator=generator) < 0.5
        x = torch.where(small, x * 2.0**-power, x)
        assert torch.equal(cpu.transposable_2_4(x, magnitude=True, isa=isa), nm_mask(x.double(), "2:4t"))


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "2:4x4", "2:4t", "4:8", "4:8t"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_any_pattern_and_dtype(pattern: str, dtype: torch.dtype) -> None:
    x = torch.randn(16, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert torch.equal(magnitude_mask(x, pattern), nm_mask(magnitude(x), pattern))
    assert torch.equal(magnitude_mask(x.T.contiguous().T, pattern), nm_mask(magnitude(x), pattern))


@pytest.mark.parametrize("shape", [(0, 4), (3, 5), (64, 255), (255, 64), (300, 1111)])
def test_differences_are_counted(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(2)
    one, other = (torch.rand(shape, generator=generator) < 0.5 for _ in range(2))
    assert int(differences(one, other)) == int((one != other).sum())
    assert int(differences(one, ~one)) == one.numel()
    assert int(differences(one.T, other.T)) == int((one != other).sum())

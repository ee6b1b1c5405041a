"""Inputs that make faults visible: ties, zeros of both signs, NaN, infinities, subnormals, sizes around tile edges."""

from __future__ import annotations

import torch
from torch import Tensor

from ..pattern import Pattern


def hostile_values(dtype: torch.dtype, *, finite: bool = False) -> Tensor:
    """[n] of `dtype`: the values that go wrong, each with both signs.

    0, ±1 (twice, for ties), ±0.5, ±3, the smallest subnormal and normal, the largest number, and unless `finite` the
    infinities and two NaNs with different bits. Infinities become NaN in float8_e4m3fn, which has none. For integers:
    0, ±1, ±3 and both ends.
    """
    if not dtype.is_floating_point:
        ends = torch.iinfo(dtype)
        negative = [-1, -1, -3] if ends.min < 0 else []
        return torch.tensor([0, 1, 1, 3, ends.max, ends.min, *negative], dtype=dtype)
    limits = torch.finfo(dtype)
    magnitudes = [0.0, 1.0, 1.0, 0.5, 3.0, limits.smallest_normal * limits.eps, limits.smallest_normal, limits.max]
    if not finite:
        magnitudes += [float("inf"), float("nan")]
    wide = torch.tensor([[m, -m] for m in magnitudes], dtype=torch.float64).flatten()
    values = wide if dtype == torch.float64 else wide.to(torch.float32).to(dtype)
    if not finite and dtype.itemsize > 1:
        # float -> narrower float keeps no payload: write a second NaN by its bits.
        bits = values.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize])
        bits[-1] = bits[-2] | 1
    return values


def hostile_tensor(shape: tuple[int, ...], dtype: torch.dtype, *, finite: bool = False, seed: int = 0) -> Tensor:
    """`shape` of `dtype`, filled at random from `hostile_values`: about half negative, rich in ties."""
    values = hostile_values(dtype, finite=finite)
    return _pick(values, torch.randint(len(values), shape, generator=_generator(seed)))


def integer_tensor(shape: tuple[int, ...], dtype: torch.dtype, *, largest: int = 4, seed: int = 0) -> Tensor:
    """`shape` of `dtype`, whole numbers from -largest to largest, zeros included.

    With the default 4, sums of products are exact in float32 up to a million terms: compare with `torch.equal`, and any
    wrong index, tail, layout or sign shows.

    >>> integer_tensor((2, 4), torch.float16).abs().max() <= 4
    tensor(True)
    """
    return torch.randint(-largest, largest + 1, shape, generator=_generator(seed)).to(torch.float32).to(dtype)


def random_mask(shape: tuple[int, int], pattern: Pattern | str, *, full: bool = False, seed: int = 0) -> Tensor:
    """bool `shape`: at random 0 to `keep` True in each group, or exactly `keep` with `full`.

    Groups with fewer non-zeros than the pattern allows are where packers differ.
    """
    pattern = Pattern.parse(pattern)
    generator = _generator(seed)
    groups = (shape[0], shape[1] // pattern.group)
    order = torch.rand(*groups, pattern.group, generator=generator).argsort(-1)
    count = torch.full(groups, pattern.keep) if full else torch.randint(pattern.keep + 1, groups, generator=generator)
    return (order < count[..., None]).view(shape)


def sizes_around(*tiles: int, multiple: int = 1, smallest: int = 1) -> tuple[int, ...]:
    """Ascending sizes on, one step below and one step above each tile and twice each tile.

    Args:
        tiles: tile edges in elements.
        multiple: every size is a multiple of it; one step is `multiple`.
        smallest: nothing below it; the smallest legal size is always there.

    >>> sizes_around(16)
    (1, 15, 16, 17, 31, 32, 33)
    >>> sizes_around(32, multiple=4)
    (4, 28, 32, 36, 60, 64, 68)
    """
    first = -(-max(smallest, 1) // multiple) * multiple
    edges = [tile * times // multiple * multiple for tile in tiles for times in (1, 2)]
    near = {edge + step for edge in edges for step in (-multiple, 0, multiple)}
    return tuple(sorted({first} | {size for size in near if size >= first}))


def _pick(values: Tensor, index: Tensor) -> Tensor:
    """values[index] for any dtype, bits kept (float8 cannot be indexed everywhere)."""
    width = values.dtype.itemsize
    carrier = values.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[width])
    return carrier[index].view(values.dtype)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)

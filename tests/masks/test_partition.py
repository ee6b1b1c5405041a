"""shared_places: which rows can share a mask, read off the zeros."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from twofour.masks import check_pattern, nm_mask
from twofour.masks.partition import shared_places
from twofour.masks.rows import clustered_mask
from twofour.pattern import Pattern


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def shuffled(out_features: int, window: int, seed: int = 1) -> Tensor:
    """An order of the rows that leaves each in its window."""
    generator = torch.Generator().manual_seed(seed)
    windows = torch.arange(out_features).split(window)
    return torch.cat([part[torch.randperm(len(part), generator=generator)] for part in windows])


def assert_shares(places: Tensor | None, nonzero: Tensor, pattern: Pattern, mask: Tensor | None = None) -> None:
    """`places` holds all of `nonzero`, keeps the pattern, and each row occurs a multiple of `rows` times."""
    assert places is not None
    assert torch.equal(places | nonzero, places)
    assert int(places.unflatten(1, (-1, pattern.group)).sum(-1).max()) <= pattern.keep
    assert (torch.unique(places, dim=0, return_counts=True)[1] % pattern.rows == 0).all()
    if mask is not None:
        assert torch.equal(places, mask)


@pytest.mark.parametrize("text", ["2:4x4", "2:4x2", "4:8x4", "1:4x3", "3:7x2"])
@pytest.mark.parametrize("window", [4, 16, 64, 192])
def test_rows_that_share_are_found(text: str, window: int) -> None:
    pattern = Pattern.parse(text)
    mask = clustered_mask(random(192, 12 * pattern.group), pattern, shuffled(192, window))
    assert_shares(shared_places(mask, pattern), mask, pattern, mask)


@pytest.mark.parametrize("window", [64, 192])
def test_rows_with_extra_zeros_find_their_cluster(window: int) -> None:
    pattern = Pattern.parse("2:4x4")
    mask = clustered_mask(random(192, 256), pattern, shuffled(192, window))
    few = mask & (random(192, 256, seed=3) > 0.002)  # about a third of the rows
    assert_shares(shared_places(few, pattern), few, pattern)
    many = mask & (random(192, 256, seed=3) > 0.2)  # every row
    assert_shares(shared_places(many, pattern), many, pattern)
    empty = mask.clone()
    empty[shuffled(192, window)[::4]] = False  # three rows know the mask, the fourth fits anywhere
    assert_shares(shared_places(empty, pattern), empty, pattern)


def test_partners_in_the_window_come_first() -> None:
    pattern = Pattern.parse("2:4x4")
    one, other = nm_mask(random(2, 64), "2:4")
    nonzero = torch.stack([one] * 63 + [one & other] + [other] * 63 + [one & other])
    places = shared_places(nonzero, pattern)
    assert_shares(places, nonzero, pattern, torch.stack([one] * 64 + [other] * 64))


def test_neighbours_come_first() -> None:
    pattern = Pattern.parse("2:4x2")
    nonzero = torch.zeros(4, 4, dtype=torch.bool)
    nonzero[0, 0] = nonzero[1, 1] = nonzero[2, 0] = nonzero[3, 2] = True
    places = shared_places(nonzero, pattern)
    assert places is not None
    assert places.int().tolist() == [[1, 1, 0, 0]] * 2 + [[1, 0, 1, 0]] * 2


def test_what_does_not_share_is_told() -> None:
    pattern = Pattern.parse("2:4x4")
    assert shared_places(nm_mask(random(64, 64), "2:4"), pattern) is None
    assert shared_places(torch.ones(4, 4, dtype=torch.bool), pattern) is None
    assert shared_places(torch.zeros(6, 4, dtype=torch.bool), pattern) is None
    mask = clustered_mask(random(64, 64), pattern, shuffled(64, 64))
    lonely = mask.clone()
    lonely[7] = mask[7].view(-1, 4).flip(1).flatten()
    assert shared_places(lonely, pattern) is None
    assert shared_places(lonely & (random(64, 64, seed=4) > 0.05), pattern) is None


def test_a_check_finds_them() -> None:
    weight = random(128, 64) + 0.5
    mask = clustered_mask(weight, Pattern.parse("2:4x4"), shuffled(128, 64))
    found = check_pattern(weight * mask, "2:4x4")
    assert (found.holds, found.groups, found.nonzero) == (True, 128 * 16, 128 * 32)
    weight[5, 0] *= -1
    broken = weight * mask
    broken[3] = broken[3].view(-1, 4).flip(1).flatten()
    found = check_pattern(broken, "2:4x4")  # counts what neighbours break
    assert not found.holds
    assert found.first_index == (0, 0)

"""Transposable masks: two of four along both axes, and no better one exists."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from twofour.masks import cpu, nm_mask
from twofour.masks.transposable import best_of_90
from twofour.pattern import Pattern
from twofour.testing import hostile_tensor, integer_tensor, strategies

PAIRS = [pair for pair in itertools.product((1, 0), repeat=4) if sum(pair) == 2]
ALL_90 = [
    block
    for block in itertools.product(PAIRS, repeat=4)
    if all(sum(column) == 2 for column in zip(*block, strict=True))
]


def worth(block: tuple[tuple[int, ...], ...], scores: list[list[float]]) -> tuple[int, int, Fraction]:
    """What a mask keeps: fewest NaN first, then infinities, then the exact sum."""
    kept = [
        score for marks, row in zip(block, scores, strict=True) for mark, score in zip(marks, row, strict=True) if mark
    ]
    infinities = sum((score > 0) - (score < 0) for score in kept if math.isinf(score))
    return -sum(map(math.isnan, kept)), infinities, sum(map(Fraction, filter(math.isfinite, kept)), Fraction())


def obvious_mask(scores: Tensor) -> Tensor:
    """The first of the 90 masks, kept places first in row order, that is worth most."""
    mask = torch.zeros(scores.shape, dtype=torch.bool)
    for row, column in itertools.product(range(0, scores.shape[0], 4), range(0, scores.shape[1], 4)):
        block = scores[row : row + 4, column : column + 4].tolist()
        mask[row : row + 4, column : column + 4] = torch.tensor(
            max(ALL_90, key=lambda marks: worth(marks, block))
        ).bool()
    return mask


def greedy_mask(scores: Tensor) -> Tensor:
    """Best score first, wherever its row and column still have room; may keep fewer than 8."""
    mask = torch.zeros(4, 4, dtype=torch.bool)
    for place in scores.flatten().argsort(descending=True).tolist():
        row, column = divmod(place, 4)
        if mask[row].sum() < 2 and mask[:, column].sum() < 2:
            mask[row, column] = True
    return mask


@pytest.fixture(params=["torch", "cpu"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The specification, and what runs on a CPU."""
    if request.param == "cpu":
        request.getfixturevalue("native")
    else:
        monkeypatch.setattr(cpu, "runs", lambda scores: False)


def test_there_are_90_masks() -> None:
    assert len(ALL_90) == len(set(ALL_90)) == 90


@settings(deadline=None, max_examples=60)
@given(st.data(), st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
def test_equals_trying_all_90(data: st.DataObject, dtype: torch.dtype) -> None:
    shape = (4 * data.draw(st.integers(0, 2)), 4 * data.draw(st.integers(0, 2)))
    # Values whose sums are exact in float64, so that ties are ties; both infinities and NaN among them.
    values = torch.tensor([0.0, -0.0, 1, 1, -1, 2, 0.5, 3, 100, -100, math.inf, -math.inf, math.nan], dtype=dtype)
    count = shape[0] * shape[1]
    picks = torch.tensor(list(data.draw(st.binary(min_size=count, max_size=count))), dtype=torch.int64)
    scores = values[picks % len(values)].view(shape)
    assert torch.equal(nm_mask(scores, "2:4t"), obvious_mask(scores))
    assert torch.equal(best_of_90(scores), obvious_mask(scores))


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_both_axes_hold_whatever_the_scores(data: st.DataObject) -> None:
    rows = st.sampled_from([0, 4, 8])
    scores = data.draw(strategies.weights(Pattern(2, 4), rows=rows))
    mask = nm_mask(scores, "2:4t")
    for axis in (mask, mask.T):
        assert axis.unflatten(-1, (-1, 4)).sum(-1).unique().tolist() in ([], [2])
    assert torch.equal(nm_mask(mask.float(), "2:4t"), mask)


@pytest.mark.usefixtures("path")
def test_never_worse_and_mostly_better_than_greedy() -> None:
    scores = torch.randn(4, 4 * 300).abs()
    exact = nm_mask(scores, "2:4t")
    better = full = 0
    for start in range(0, scores.shape[1], 4):
        block = scores[:, start : start + 4]
        if int(greedy_mask(block).sum()) < 8:
            continue  # it stopped early, and cannot be completed
        full += 1
        greedy = float(block[greedy_mask(block)].double().sum())
        best = float(block[exact[:, start : start + 4]].double().sum())
        assert best >= greedy - 1e-9
        better += best > greedy + 1e-9
    assert full > 100
    assert better > full / 4


@pytest.mark.usefixtures("path")
def test_where_greedy_keeps_only_seven() -> None:
    scores = torch.tensor([[9.0, 8, 0, 0], [9, 0, 0, 8], [0, 9, 0, 8], [0, 0, 1, 0]])
    assert int(greedy_mask(scores).sum()) == 7
    assert int(nm_mask(scores, "2:4t").sum()) == 8


@pytest.mark.usefixtures("path")
def test_turning_the_scores_turns_the_worth() -> None:
    scores = hostile_tensor((16, 24), torch.float32, finite=True).clamp(-3, 3)
    upright, turned = nm_mask(scores, "2:4t"), nm_mask(scores.T, "2:4t").T
    assert scores[upright].double().sum() == scores[turned].double().sum()


def test_many_blocks_are_cut_into_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = torch.randn(32, 32)
    whole = nm_mask(scores, "2:4t")
    monkeypatch.setattr("twofour.masks.transposable._BLOCKS_AT_ONCE", 5)
    assert torch.equal(best_of_90(scores), whole)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("size", [2.0**1020, 1.0, 2.0**-100])
def test_numbers_of_any_size_decide_beside_nan_and_infinities(size: float) -> None:
    scores = integer_tensor((8, 80), torch.float64, largest=8) * size
    scores[::4, ::4] = math.inf
    scores[3::8, 1::8] = math.nan
    scores[1::8, 2::8] = -math.inf
    assert torch.equal(nm_mask(scores, "2:4t"), obvious_mask(scores))


@pytest.mark.usefixtures("path")
def test_where_sums_are_rounded_the_halves_are_compared_first() -> None:
    # The upper half is so large that both lower halves give the same sum; the better one is kept all the same.
    scores = torch.zeros(4, 4, dtype=torch.float64)
    scores[0, 0] = 2.0**100
    scores[2, 2] = scores[3, 3] = 1
    mask = nm_mask(scores, "2:4t")
    assert bool(mask[0, 0])
    assert bool(mask[2, 2])
    assert bool(mask[3, 3])


@pytest.mark.usefixtures("path")
def test_sums_of_float32_scores_are_compared_in_float64() -> None:
    # In float32 2**26 + 1 is 2**26, and the mask that comes first would win.
    scores = torch.zeros(4, 4)
    scores[0, 0] = 2.0**26
    scores[1, 3] = 1
    assert bool(nm_mask(scores, "2:4t")[1, 3])


def test_meta_scores_give_the_shape() -> None:
    mask = nm_mask(torch.empty(8, 12, device="meta"), "2:4t")
    assert (mask.device.type, mask.shape, mask.dtype) == ("meta", (8, 12), torch.bool)

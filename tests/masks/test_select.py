"""nm_mask: the best of each group, by one rule on every path."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from twofour import PatternError, ShapeError, UnsupportedError
from twofour.masks import magnitude, nm_mask, select
from twofour.pattern import Pattern
from twofour.testing import hostile_tensor, strategies

SCORE_DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]


def obvious_mask(scores: Tensor, pattern: Pattern) -> list[list[bool]]:
    """Sort each group: numbers before NaN, higher before lower, lower index before higher."""
    mask = []
    for row in scores.double().tolist():
        kept = [False] * len(row)
        for start in range(0, len(row), pattern.group):
            group = range(start, start + pattern.group)
            best = sorted(group, key=lambda i: (math.isnan(row[i]), 0.0 if math.isnan(row[i]) else -row[i], i))
            for i in best[: pattern.keep]:
                kept[i] = True
        mask.append(kept)
    return mask


def counts(mask: Tensor, pattern: Pattern) -> list[int]:
    return mask.unflatten(-1, (-1, pattern.group)).sum(-1).unique().tolist()


@settings(deadline=None, max_examples=200)
@given(st.data(), strategies.patterns(), st.sampled_from(SCORE_DTYPES))
def test_equals_sorting_each_group_with_ties_to_the_lower_index_and_nan_last(
    data: st.DataObject, pattern: Pattern, dtype: torch.dtype
) -> None:
    scores = data.draw(strategies.scores(pattern, dtype))
    mask = nm_mask(scores, pattern)
    assert mask.dtype == torch.bool
    assert mask.shape == scores.shape
    assert mask.tolist() == obvious_mask(scores, pattern)
    assert counts(mask, pattern) in ([], [pattern.keep])


@settings(deadline=None, max_examples=60)
@given(st.data(), strategies.patterns())
def test_all_ways_of_choosing_agree(data: st.DataObject, pattern: Pattern) -> None:
    scores = data.draw(strategies.scores(pattern))
    groups = scores.unflatten(-1, (-1, pattern.group))
    assert torch.equal(nm_mask(scores, pattern), select.best_of_groups(scores, pattern))
    assert torch.equal(select._by_comparing(groups, pattern.keep), select._by_sorting(groups, pattern.keep))


@settings(deadline=None, max_examples=60)
@given(st.data(), strategies.patterns())
def test_masking_twice_changes_nothing(data: st.DataObject, pattern: Pattern) -> None:
    weight = data.draw(strategies.weights(pattern, finite=True))
    mask = nm_mask(magnitude(weight), pattern)
    kept = torch.where(mask, weight, 0)
    again = nm_mask(magnitude(kept), pattern)
    assert torch.equal(torch.where(again, kept, 0), kept)
    assert torch.equal(nm_mask(mask.float(), pattern), mask)


@pytest.mark.parametrize("dtype", SCORE_DTYPES)
def test_all_equal_scores_keep_the_first(dtype: torch.dtype) -> None:
    for value in (1.0, 0.0, float("nan")):
        scores = torch.full((2, 64), value).to(dtype)
        for text in ("2:4", "1:4", "4:8", "16:32"):
            pattern = Pattern.parse(text)
            expected = torch.arange(64) % pattern.group < pattern.keep
            assert torch.equal(nm_mask(scores, text), expected.expand(2, -1))


def test_zero_and_minus_zero_tie_and_infinities_rank_at_the_ends() -> None:
    nan, inf = float("nan"), float("inf")
    assert nm_mask(torch.tensor([-0.0, 0.0, 0.0, -0.0]), "2:4").tolist() == [True, True, False, False]
    assert nm_mask(torch.tensor([-0.0, 0.0] * 8), "2:16").nonzero().flatten().tolist() == [0, 1]
    assert nm_mask(torch.tensor([nan, -inf, nan, nan]), "2:4").tolist() == [True, True, False, False]
    assert nm_mask(torch.tensor([nan, nan, -inf, inf]), "1:4").tolist() == [False, False, False, True]
    assert nm_mask(torch.tensor([nan, nan, nan, -inf]), "1:4").tolist() == [False, False, False, True]


def test_scores_are_ranked_as_they_are_and_magnitudes_by_size() -> None:
    weight = torch.tensor([-9.0, 1, 2, -8])
    assert nm_mask(weight, "2:4").tolist() == [False, True, True, False]
    assert nm_mask(magnitude(weight), "2:4").tolist() == [True, False, False, True]


@pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 3, 8), (0, 8), (3, 0), (2, 0, 8)])
def test_any_number_of_axes_and_none_of_the_elements(shape: tuple[int, ...]) -> None:
    scores = hostile_tensor(shape, torch.float32)
    mask = nm_mask(scores, "2:4")
    assert mask.shape == shape
    assert torch.equal(mask.reshape(-1, 8), nm_mask(scores.reshape(-1, 8), "2:4"))


@pytest.mark.parametrize("dim", [1, -3])
@pytest.mark.parametrize("text", ["2:4", "4:8", "3:16"])
def test_convolutions_have_their_groups_along_input_channels(dim: int, text: str) -> None:
    scores = hostile_tensor((3, 16, 2, 5), torch.float32)
    mask = nm_mask(scores, text, dim=dim)
    assert mask.shape == scores.shape
    for out, row, column in itertools.product(range(3), range(2), range(5)):
        assert torch.equal(mask[out, :, row, column], nm_mask(scores[out, :, row, column], text))


def test_strides_do_not_matter() -> None:
    scores = hostile_tensor((16, 24), torch.float32)
    plain = nm_mask(scores, "2:4")
    assert torch.equal(nm_mask(scores.T.contiguous().T, "2:4"), plain)
    assert torch.equal(nm_mask(scores.repeat_interleave(2, 1)[:, ::2], "2:4"), plain)
    assert torch.equal(nm_mask(scores.T, "2:4", dim=0).T, plain)
    assert torch.equal(nm_mask(scores.T.contiguous().T, "2:4x4"), nm_mask(scores, "2:4x4"))
    assert torch.equal(nm_mask(scores.T.contiguous().T, "2:4t"), nm_mask(scores, "2:4t"))


def test_scores_are_neither_changed_nor_needed_for_gradients() -> None:
    scores = torch.randn(4, 8, requires_grad=True)
    before = scores.detach().clone()
    assert not nm_mask(scores, "2:4").requires_grad
    assert torch.equal(scores.detach(), before)


def test_meta_scores_give_the_shape() -> None:
    mask = nm_mask(torch.empty(4, 8, device="meta"), "2:4")
    assert (mask.device.type, mask.shape, mask.dtype) == ("meta", (4, 8), torch.bool)


@settings(deadline=None, max_examples=60)
@given(st.data(), st.sampled_from(["2:4x4", "1:4x2", "4:8x3"]))
def test_shared_patterns_choose_by_the_exact_sum_of_the_rows(data: st.DataObject, text: str) -> None:
    pattern = Pattern.parse(text)
    rows = st.sampled_from([0, pattern.rows, 2 * pattern.rows])
    scores = data.draw(strategies.weights(pattern, torch.float16, finite=True, rows=rows))
    mask = nm_mask(scores, text)
    assert torch.equal(mask, select.best_of_groups(scores, pattern))
    assert counts(mask, pattern) in ([], [pattern.keep])
    for start in range(0, scores.shape[0], pattern.rows):
        block = scores[start : start + pattern.rows].tolist()
        sums = [sum(map(Fraction, column), Fraction()) for column in zip(*block, strict=True)]
        for group in range(0, len(sums), pattern.group):
            best = sorted(range(group, group + pattern.group), key=lambda i: (-sums[i], i))[: pattern.keep]
            for row in range(start, start + pattern.rows):
                assert mask[row, group : group + pattern.group].nonzero().flatten().tolist() == sorted(
                    i - group for i in best
                )


def test_shared_sums_do_not_overflow_half_precision() -> None:
    scores = torch.tensor([[50000.0, 50000, 60000, 60000]], dtype=torch.float16).repeat(4, 1)
    assert nm_mask(scores, "2:4x4")[0].tolist() == [False, False, True, True]


def test_a_nan_in_one_row_ranks_its_column_last_for_all_of_them() -> None:
    scores = torch.ones(4, 4)
    scores[2, 0] = float("nan")
    assert nm_mask(scores, "2:4x4").tolist() == [[False, True, True, False]] * 4


@pytest.mark.parametrize(
    ("shape", "text", "dim", "message"),
    [
        ((4, 6), "2:4", -1, r"scores are \[4, 6\]: axis -1 is not a multiple of 4, so it has no whole 2:4 groups"),
        ((6, 4), "2:4", 0, r"scores are \[6, 4\]: axis 0 is not a multiple of 4"),
        ((), "2:4", -1, r"scores are \[\]: axis -1"),
        ((6, 8), "2:4x4", -1, r"scores are \[6, 8\]: 2:4x4 needs out_features to be a multiple of 4"),
        ((6, 8), "2:4t", -1, r"scores are \[6, 8\]: 2:4t needs out_features to be a multiple of 4"),
        ((2, 4, 8), "2:4x4", -1, r"scores are \[2, 4, 8\] along axis -1: 2:4x4 needs a matrix"),
        ((8, 8), "2:4t", 0, r"scores are \[8, 8\] along axis 0: 2:4t needs a matrix, along its last"),
    ],
)
def test_shapes_that_do_not_fit(shape: tuple[int, ...], text: str, dim: int, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        nm_mask(torch.zeros(shape), text, dim=dim)


@pytest.mark.parametrize("dim", [2, -3])
def test_axes_that_do_not_exist(dim: int) -> None:
    with pytest.raises(ShapeError, match=rf"scores are \[4, 8\]: they have no axis {dim}"):
        nm_mask(torch.zeros(4, 8), "2:4", dim=dim)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.complex64])
def test_scores_that_cannot_be_ranked(dtype: torch.dtype) -> None:
    with pytest.raises(UnsupportedError, match=rf"scores are {dtype}: nm_mask ranks floating point scores"):
        nm_mask(torch.zeros(4, 8, dtype=dtype), "2:4")


def test_patterns_that_are_unknown() -> None:
    with pytest.raises(PatternError, match="unknown pattern '2/4'"):
        nm_mask(torch.zeros(4, 8), "2/4")

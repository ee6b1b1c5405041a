"""check_pattern: how many groups are broken, and where the first one is."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from twofour import PatternError, ShapeError, UnsupportedError
from twofour.format.pack import VALUE_DTYPES
from twofour.masks import check_pattern, magnitude, nm_mask
from twofour.pattern import Pattern
from twofour.testing import strategies


@settings(deadline=None, max_examples=120)
@given(st.data(), strategies.patterns(), strategies.dtypes())
def test_counts_equal_slow_obvious_code(data: st.DataObject, pattern: Pattern, dtype: torch.dtype) -> None:
    weight = data.draw(strategies.weights(pattern, dtype, max_groups=3))
    found = check_pattern(weight, pattern)
    broken = []
    for row, values in enumerate(weight.double().tolist()):
        for start in range(0, len(values), pattern.group):
            group = values[start : start + pattern.group]
            if sum(value != 0 for value in group) > pattern.keep:
                broken.append(((row, start), group))
    assert found.groups == weight.numel() // pattern.group
    assert (found.broken, found.holds) == (len(broken), not broken)
    assert found.nonzero == int((weight.double() != 0).sum())
    if broken:
        assert found.first_index == broken[0][0]
        assert repr(list(found.first_values or ())) == repr(broken[0][1])
    else:
        assert (found.first_index, found.first_values) == (None, None)


@settings(deadline=None, max_examples=40)
@given(st.data(), strategies.patterns("2:4", "1:4", "4:8", "3:7", "2:4t", "2:4x4", "16:32"))
def test_a_masked_weight_holds_its_pattern(data: st.DataObject, pattern: Pattern) -> None:
    weight = data.draw(strategies.weights(pattern, rows=st.sampled_from([0, 4, 8])))
    assert check_pattern(torch.where(nm_mask(magnitude(weight), pattern), weight, 0), pattern).holds


@pytest.mark.parametrize("dtype", [*VALUE_DTYPES, torch.float64, torch.int64, torch.bool])
def test_any_dtype_can_be_checked(dtype: torch.dtype) -> None:
    weight = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 1]]).to(dtype)
    found = check_pattern(weight, "2:4")
    assert (found.broken, found.first_index, found.first_values) == (1, (1, 0), (1.0, 0.0, 1.0, 1.0))


def test_minus_zero_is_zero_and_nan_is_not() -> None:
    assert check_pattern(torch.tensor([1.0, 1, -0.0, -0.0]), "2:4").holds
    assert not check_pattern(torch.tensor([1.0, 1, -0.0, float("nan")]), "2:4").holds


def test_convolutions_along_input_channels() -> None:
    weight = torch.zeros(2, 8, 3, 3)
    weight[1, 4:7, 2, 0] = torch.tensor([1.0, -2, 3])
    found = check_pattern(weight, "2:4", dim=1)
    assert (found.broken, found.groups, found.nonzero) == (1, 36, 3)
    assert found.first_index == (1, 4, 2, 0)
    assert found.first_values == (1, -2, 3, 0)
    assert found.describe() == "1 of 36 groups are not 2:4; the first at [1, 4, 2, 0] holds [1, -2, 3, 0]"
    assert check_pattern(weight, "2:4", dim=-3) == found


def test_the_verdict_of_a_weight_that_holds() -> None:
    assert check_pattern(torch.eye(8), "2:4").describe() == "holds 2:4 in 16 groups"


def test_shared_patterns_ask_of_the_union_of_the_rows() -> None:
    apart = torch.eye(4)
    assert check_pattern(apart, "2:4").holds
    found = check_pattern(apart, "2:4x4")
    assert (found.holds, found.first_index) == (False, (0, 0))
    assert check_pattern(torch.tensor([[0.0, 1, 0, 1]]).repeat(4, 1), "2:4x4").holds


def test_transposable_patterns_ask_of_both_axes() -> None:
    rows_only = torch.zeros(8, 8)
    rows_only[4:7, 5] = torch.tensor([1.0, 2, 3])
    assert check_pattern(rows_only, "2:4").holds
    found = check_pattern(rows_only, "2:4t")
    assert (found.broken, found.first_index, found.first_values) == (1, (4, 5), (1, 2, 3, 0))
    assert check_pattern(rows_only.T, "2:4t").broken == 1
    assert check_pattern(torch.eye(8), "2:4t").holds


@pytest.mark.parametrize("shape", [(0, 8), (4, 0), (0, 0), (0,)])
@pytest.mark.parametrize("text", ["2:4", "4:8"])
def test_empty_weights_hold_every_pattern(shape: tuple[int, ...], text: str) -> None:
    found = check_pattern(torch.empty(shape), text)
    assert (found.holds, found.groups) == (True, 0)


@pytest.mark.parametrize(
    ("shape", "text", "dim", "message"),
    [
        ((4, 6), "2:4", -1, r"weight is \[4, 6\]: it has no whole 2:4 groups along axis 1"),
        ((6, 8), "2:4t", -1, r"weight is \[6, 8\]: it has no whole 2:4t groups"),
        ((6, 8), "2:4x4", -1, r"weight is \[6, 8\]: it has no whole 2:4x4 groups"),
        ((4, 8), "2:4", 2, r"weight is \[4, 8\]: it has no axis 2"),
        ((4, 8), "2:4", -3, r"weight is \[4, 8\]: it has no axis -3"),
        ((), "2:4", -1, r"weight is \[\]: it has no axis -1"),
        ((4, 4, 8), "2:4t", -1, r"weight is \[4, 4, 8\], axis -1: 2:4t needs a matrix"),
        ((8, 8), "2:4x4", 0, r"weight is \[8, 8\], axis 0: 2:4x4 needs a matrix, along its last"),
    ],
)
def test_shapes_that_do_not_fit(shape: tuple[int, ...], text: str, dim: int, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        check_pattern(torch.zeros(shape), text, dim=dim)


def test_other_wrong_uses() -> None:
    with pytest.raises(UnsupportedError, match="weight is on the meta device"):
        check_pattern(torch.empty(4, 8, device="meta"), "2:4")
    with pytest.raises(PatternError, match="unknown pattern"):
        check_pattern(torch.zeros(4, 8), "4")

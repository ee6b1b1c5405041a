"""Magnitudes: compared as numbers, whatever the dtype."""

from __future__ import annotations

import pytest
import torch

from twofour.format.pack import VALUE_DTYPES
from twofour.masks import magnitude
from twofour.testing import assert_same_bits, hostile_tensor


@pytest.mark.parametrize("dtype", [torch.float64, *VALUE_DTYPES])
def test_magnitudes_are_exact_and_never_negative(dtype: torch.dtype) -> None:
    weight = hostile_tensor((8, 40), dtype)
    score = magnitude(weight)
    assert score.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = weight.double().abs().to(score.dtype)
    assert torch.equal(score.isnan(), expected.isnan())
    numbers = ~expected.isnan()
    assert_same_bits(score[numbers], expected[numbers])
    assert not bool(score[numbers].signbit().any())


def test_float8_is_ranked_by_value_not_by_byte() -> None:
    weight = torch.tensor([-448.0, 0.5, 1.0, -2.0]).to(torch.float8_e4m3fn)
    assert magnitude(weight).tolist() == [448, 0.5, 1, 2]


def test_the_smallest_int8_has_a_magnitude() -> None:
    assert magnitude(torch.tensor([-128, 127], dtype=torch.int8)).tolist() == [128, 127]


def test_the_score_is_cut_off_from_gradients_and_from_the_weight() -> None:
    weight = torch.nn.Parameter(torch.tensor([-1.0, 2]))
    score = magnitude(weight)
    assert not score.requires_grad
    score.zero_()
    assert weight.tolist() == [-1, 2]

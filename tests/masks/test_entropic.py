"""Entropic masks: valid whatever the scores, and close to the best."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from twofour import ShapeError
from twofour.masks import nm_mask
from twofour.masks.entropic import entropic_mask
from twofour.pattern import Pattern
from twofour.testing import strategies


@pytest.mark.parametrize("text", ["1:2t", "2:4t", "3:7t", "4:8t", "8:16t"])
@settings(deadline=None, max_examples=20)
@given(st.data())
def test_both_axes_hold_whatever_the_scores(text: str, data: st.DataObject) -> None:
    pattern = Pattern.parse(text)
    rows = st.sampled_from([0, pattern.group, 2 * pattern.group])
    scores = data.draw(strategies.weights(pattern, rows=rows, max_groups=2))
    mask = entropic_mask(scores, pattern, steps=10)
    for axis in (mask, mask.T):
        assert axis.unflatten(-1, (-1, pattern.group)).sum(-1).unique().tolist() in ([], [pattern.keep])


@pytest.mark.parametrize("text", ["2:4t", "4:8t", "2:8t", "8:16t"])
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_close_to_the_best_and_never_above(text: str, size: float) -> None:
    scores = torch.randn(64, 64).abs() * size
    best = scores[nm_mask(scores, text)].double().sum()
    found = scores[entropic_mask(scores, text)].double().sum()
    assert best * 0.995 < found <= best * (1 + 1e-14)
    rough = scores[entropic_mask(scores, text, steps=0)].double().sum()
    assert rough < found


def test_shapes_that_do_not_fit() -> None:
    with pytest.raises(ShapeError, match=r"scores are \[8, 12\]: 4:8t needs a matrix of whole blocks of 8 x 8"):
        entropic_mask(torch.zeros(8, 12), "4:8t")

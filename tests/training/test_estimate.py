"""Estimates of gradients: right on average, of less variance than others, and of the pattern."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from twofour import ShapeError, UnsupportedError
from twofour.training import mvue

DRAWS = 100_000
GROUPS = {
    "alike": [1.0, -1.1, 0.9, 1.05],
    "one is large": [9.0, -0.5, 0.3, 0.2],
    "two are large": [3.0, -2.9, 0.1, 0.2],
    "half": [2.0, 1.0, -0.5, 0.5],
    "a zero": [1.0, 0.0, -2.0, 0.7],
}


def drawn(group: list[float], seed: int = 0) -> Tensor:
    x = torch.tensor(group, dtype=torch.float64).repeat(DRAWS, 1)
    return mvue(x, generator=torch.Generator(x.device).manual_seed(seed))


@pytest.mark.parametrize("group", GROUPS.values(), ids=GROUPS)
def test_the_mean_is_the_tensor_within_three_standard_errors(group: list[float]) -> None:
    found = drawn(group)
    assert int((found != 0).sum(1).max()) <= 2
    error = found.std(0) / DRAWS**0.5
    assert ((found.mean(0) - torch.tensor(group)).abs() <= 3 * error + 1e-12).all()


@pytest.mark.parametrize("group", GROUPS.values(), ids=GROUPS)
def test_the_variance_is_below_that_of_other_estimates(group: list[float]) -> None:
    x = torch.tensor(group, dtype=torch.float64)
    variance = float((drawn(group) - x).square().sum(1).mean())
    uniform = float(x.square().sum())  # every place with chance 1/2: x^2 / p - x^2
    size, total = x.abs(), x.abs().sum()
    share = size / total
    odds = share / (total - size)
    two_draws = share + size * (odds.sum() - odds)
    published = float((size.square() / two_draws).nan_to_num().sum() - x.square().sum())
    assert variance < uniform
    assert variance <= 1.03 * published


def test_places_are_kept_with_the_chances_that_are_best() -> None:
    kept = (drawn([4.0, 3.0, 2.0, 1.0]) != 0).double().mean(0)
    assert torch.allclose(kept, torch.tensor([0.8, 0.6, 0.4, 0.2], dtype=torch.float64), atol=0.01)
    kept = (drawn([8.0, 3.0, 2.0, 1.0]) != 0).double().mean(0)
    assert torch.allclose(kept, torch.tensor([1.0, 1 / 2, 1 / 3, 1 / 6], dtype=torch.float64), atol=0.01)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_two_or_fewer_come_back_as_they_are(dtype: torch.dtype) -> None:
    x = torch.tensor([[0.0, 3.3, 0.0, -0.7], [0.0, 0.0, 1e-3, 0.0], [0.0, 0.0, 0.0, 0.0]], dtype=dtype)
    for seed in range(50):
        assert torch.equal(mvue(x, generator=torch.Generator(x.device).manual_seed(seed)), x)


def test_rounding_lets_no_third_place_in(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.rand(20_000, 4, generator=torch.Generator().manual_seed(0))
    x[:, 3] *= 1e-9
    monkeypatch.setattr(torch, "rand", lambda shape, **options: torch.zeros(shape, dtype=options["dtype"]))
    found = mvue(x)
    assert int((found != 0).sum(1).max()) == 2


def test_axes_seeds_and_extremes() -> None:
    x = torch.randn(8, 3, 5, generator=torch.Generator().manual_seed(0))
    one = mvue(x, dim=0, generator=torch.Generator(x.device).manual_seed(1))
    assert torch.equal(one, mvue(x, dim=-3, generator=torch.Generator(x.device).manual_seed(1)))
    assert int((one.unflatten(0, (2, 4)) != 0).sum(1).max()) == 2
    torch.manual_seed(3)
    again = mvue(x, dim=0)
    torch.manual_seed(3)
    assert torch.equal(mvue(x, dim=0), again)
    tiny = torch.full((100, 4), 1e-42)
    assert mvue(tiny).isfinite().all()
    assert mvue(torch.full((100, 4), 3e38)).isfinite().sum() <= 400  # 2 x is past the largest float32
    assert mvue(torch.ones(0, 4)).shape == (0, 4)
    bad = torch.tensor([[1.0, float("nan"), 2.0, 3.0], [1.0, float("inf"), 2.0, 3.0], [1.0, 2.0, 0.0, 0.0]])
    assert mvue(bad).isnan().tolist() == [[True] * 4, [True] * 4, [False] * 4]


def test_what_it_refuses() -> None:
    with pytest.raises(ShapeError, match=r"x is \[6\]: axis -1 is not a multiple of 4. Pad it"):
        mvue(torch.ones(6))
    with pytest.raises(UnsupportedError, match="x is torch.int64"):
        mvue(torch.ones(4, dtype=torch.int64))

"""The squared ReLUs of a model: switched, watched, and what a pattern takes from them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import twofour
from twofour import CalibrationError, ModelError, PatternError, ShapeError, UnsupportedError
from twofour.masks import check_pattern
from twofour.testing import integer_tensor
from twofour.training import (
    ActivationSparsity,
    SquaredReLU,
    activation_sparsity,
    observe_activations,
    sparsify_activations,
    squared_relu,
)


class Block(nn.Module):
    """A feed-forward block of a transformer."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(16, 32), act, nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.act(self.up(x)))  # type: ignore[no-any-return]


class Own(SquaredReLU):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Block(SquaredReLU()), Block(nn.GELU()), Block(SquaredReLU("1:4")))


def relu_squared() -> nn.Module:
    activations = pytest.importorskip("transformers.activations", reason="needs transformers")
    return activations.ACT2FN["relu2"]  # type: ignore[no-any-return]


def actions(report: Any) -> dict[str, tuple[str, str]]:
    return {row["layer"]: (row["action"], row["pattern"]) for row in report.rows}


def test_all_are_switched_at_once_and_back() -> None:
    net = model()
    report = sparsify_activations(net)
    assert actions(report) == {"0.act": ("set", "2:4"), "2.act": ("set", "2:4")}
    assert report.summary["activations"] == "2 of 2"
    assert "0.act" in str(report)
    report = sparsify_activations(net, None, exclude="2.*")
    assert actions(report) == {"0.act": ("set", "dense"), "2.act": ("left", "2:4")}
    assert report.rows[1]["reason"] == "excluded, or not included"
    report = sparsify_activations(net, "1:4", include=["0.act"])
    assert (str(net[0].act.pattern), str(net[2].act.pattern)) == ("1:4", "2:4")
    single = SquaredReLU()
    sparsify_activations(single)
    assert str(single.pattern) == "2:4"


def test_those_of_transformers_are_replaced() -> None:
    shared = relu_squared()
    net = nn.Sequential(Block(shared), Block(shared), Block(relu_squared()))
    seen: list[int] = []
    net[2].act.register_forward_hook(lambda *_: seen.append(1))
    x, before = torch.randn(3, 16), copy.deepcopy(net.state_dict())
    assert actions(sparsify_activations(net, None)) == {"0.act": ("left", "dense"), "2.act": ("left", "dense")}
    dense = net(x)
    report = sparsify_activations(net)
    assert actions(report) == {"0.act": ("replaced", "2:4"), "2.act": ("replaced", "2:4")}
    assert net[0].act is net[1].act
    assert isinstance(net[0].act, SquaredReLU)
    assert list(net.state_dict()) == list(before)
    assert not torch.equal(net(x), dense)
    assert check_pattern(net[0].act(net[0].up(x)), "2:4").holds
    sparsify_activations(net, None)
    torch.testing.assert_close(net(x), dense)
    assert len(seen) == 3
    with pytest.raises(ModelError, match=r"the model is a ReLUSquaredActivation itself, .* use SquaredReLU\('2:4'\)"):
        sparsify_activations(relu_squared())


def test_a_forward_of_its_own_is_left_alone() -> None:
    net = nn.Sequential(Own(), SquaredReLU(), SquaredReLU())
    net[1].forward = lambda x: x  # type: ignore[method-assign]
    assert actions(sparsify_activations(net)) == {"2": ("set", "2:4")}
    assert net[0].pattern is None
    assert net[1].pattern is None


def test_what_cannot_be_switched_is_told_before_anything_changes() -> None:
    net = model()
    with pytest.raises(
        ModelError, match=r"include='3\.\*' matches no squared ReLU\. They are called '0\.act', '2\.act'"
    ):
        sparsify_activations(net, include="3.*")
    with pytest.raises(ModelError, match="exclude='1.act' matches no squared ReLU"):
        sparsify_activations(net, exclude=["1.act"])
    with pytest.raises(PatternError, match="tokens would share masks"):
        sparsify_activations(net, "2:4t")
    with pytest.raises(
        ModelError, match=r"no module that computes a squared ReLU: .* call twofour.training.squared_relu"
    ):
        sparsify_activations(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    with pytest.raises(ModelError, match="a list is not a model"):
        sparsify_activations([])  # type: ignore[arg-type]
    assert net[0].act.pattern is None


def test_permuting_channels_leaves_the_groups_of_activations_alone() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 64), SquaredReLU("2:4"), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    x = torch.randn(5, 16)
    before = net(x)
    report = twofour.permute(net, (x,))
    assert report.summary["channels permuted"] == 32  # of the ReLU
    torch.testing.assert_close(net(x), before)


def test_statistics_are_those_of_plain_loops() -> None:
    y = squared_relu(integer_tensor((7, 5, 32), torch.float32, largest=9))
    found = activation_sparsity(y, "2:4")
    expected = ActivationSparsity()
    for group in y.reshape(-1, 4).tolist():
        dropped = sorted(group, reverse=True)[2:]
        expected += ActivationSparsity(
            numbers=4,
            nonzero=sum(value > 0 for value in group),
            dropped=sum(value > 0 for value in dropped),
            groups=1,
            crowded=int(sum(value > 0 for value in group) > 2),
            energy=sum(value**2 for value in group),
            lost=sum(value**2 for value in dropped),
        )
    assert found == expected
    assert found.share_zero == 1 - found.nonzero / found.numbers
    assert found.share_crowded == found.crowded / found.groups > 0.2
    assert found.share_dropped == found.dropped / found.nonzero > 0.1
    assert found.share_lost == found.lost / found.energy > 0.01
    kept = squared_relu(y.sqrt(), "2:4")
    assert found.lost == float(y.double().square().sum() - kept.double().square().sum())
    assert activation_sparsity(kept).lost == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_statistics_of_any_dtype_and_strides(dtype: torch.dtype) -> None:
    y = squared_relu(integer_tensor((16, 24), torch.float32))
    assert activation_sparsity(y.to(dtype)) == activation_sparsity(y)
    assert activation_sparsity(y.t().contiguous().t().to(dtype)) == activation_sparsity(y)
    for empty in (torch.zeros(0, 8), torch.zeros(3, 0)):
        assert activation_sparsity(empty) == ActivationSparsity()
    nothing = activation_sparsity(torch.zeros(3, 8, dtype=dtype))
    assert (nothing.share_zero, nothing.share_crowded, nothing.share_dropped, nothing.share_lost) == (1, 0, 0, 0)


def test_what_has_no_statistics_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"y is \[6\]: its last axis is not a multiple of 4"):
        activation_sparsity(torch.ones(6))
    with pytest.raises(UnsupportedError, match="y is torch.int64: activations are floating point"):
        activation_sparsity(torch.ones(4, dtype=torch.int64))
    with pytest.raises(PatternError, match="tokens would share masks"):
        activation_sparsity(torch.ones(4, 4), "2:4t")
    for value in ("nan", "inf"):
        with pytest.raises(CalibrationError, match="y holds NaN or infinities"):
            activation_sparsity(torch.full((4,), float(value)))


def test_watching_adds_up_and_changes_nothing() -> None:
    net = model()
    batches = [torch.randn(9, 16), torch.randn(2, 3, 16)]
    plain = [net(x) for x in batches]
    with observe_activations(net) as observer:
        assert all(torch.equal(net(x), y) for x, y in zip(batches, plain, strict=True))
    net(batches[0])  # no more
    expected = ActivationSparsity()
    for x in batches:
        expected += activation_sparsity(squared_relu(net[0].up(x)))
    assert observer.found["0.act"] == expected
    rows = {row["layer"]: row for row in observer.report.rows}
    assert set(rows) == {"0.act", "2.act"}
    assert rows["0.act"]["calls"] == 2
    assert rows["0.act"]["lost"] == expected.share_lost > 0
    assert rows["2.act"]["zeros"] < 0.7  # as if it were dense
    total = sum(observer.found.values(), ActivationSparsity())
    assert observer.report.summary["lost"] == total.share_lost
    assert "squared norm lost" in str(observer.report)
    assert not any(module._forward_hooks for module in net.modules())


def test_other_modules_are_watched_by_name() -> None:
    net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 6), nn.Identity(), nn.Flatten())
    with observe_activations(net, include=["1", "2"]) as observer:
        hidden = net[1](net[0](torch.randn(5, 16)))
        net[2](hidden)
        net[2](hidden)
    assert observer.found["1"] == activation_sparsity(hidden)
    row = observer.report.rows[1]
    assert row["reason"].startswith("2 of 2: y is [5, 6]: its last axis is not a multiple of 4")
    assert "zeros" not in row


def test_activations_of_transformers_are_watched_and_odd_calls_are_told() -> None:
    net = Block(relu_squared())
    with observe_activations(net) as observer:
        net(torch.randn(4, 16))
        net.act(input=torch.randn(4, 16))
        net.act(torch.full((4, 16), float("nan")))
    (row,) = observer.report.rows
    assert observer.found["act"].numbers == 4 * 32 + 4 * 16
    assert row["reason"].startswith("1 of 3: y holds NaN or infinities")


def test_what_cannot_be_watched_is_told() -> None:
    with (
        observe_activations(model()) as observer,
        pytest.raises(CalibrationError, match=r"none of the 2 activations ran"),
    ):
        observer.report  # noqa: B018
    with pytest.raises(ModelError, match="no module that computes a squared ReLU"):
        observe_activations(nn.Sequential(nn.ReLU()))
    with pytest.raises(ModelError, match="include='9' matches no module"):
        observe_activations(model(), include="9")
    with pytest.raises(ModelError, match="a list is not a model"):
        observe_activations([], include="9")  # type: ignore[arg-type]
    net = model()
    with pytest.raises(PatternError, match="tokens would share masks"):
        observe_activations(net, "2:4t")
    assert not any(module._forward_hooks for module in net.modules())

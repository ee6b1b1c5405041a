"""Squared ReLU, dense and 2:4: values, gradients, what is kept for them, models, statistics."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator

import pytest
import torch
from tests.on_device import DEVICE
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from twofour import PatternError, ShapeError, UnsupportedError
from twofour.masks import check_pattern, nm_mask
from twofour.testing import hostile_tensor
from twofour.training import (
    SquaredReLU,
    squared_relu,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PATTERNS = (None, "2:4", "1:4", "2:8", "16:32")


def plain(x: Tensor, pattern: str | None) -> Tensor:
    """The same in torch's own functions, with torch's own gradient."""
    root = x.relu()
    if pattern is not None:
        wide = root.detach() if root.dtype == torch.float64 else root.detach().float()
        root = torch.where(nm_mask(wide, pattern), root, 0)
    return root.square()


def gradient(function: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> Tensor:
    x = x.detach().clone().requires_grad_()
    return torch.autograd.grad(function(x), x, grad)[0]


def assert_equal(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def apart(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """float64, all numbers at least 0.05 from each other and from zero."""
    count = torch.Size(shape).numel()
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return ((order - count // 2).double() * 0.1 + 0.05).view(shape)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For many small steps, which on a busy machine wait for threads most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_values_are_those_of_torch_at_hostile_inputs(dtype: torch.dtype, pattern: str | None) -> None:
    for shape in ((33, 64), (64,), (3, 5, 32), (0, 64), (7, 0)):
        x = hostile_tensor(shape, dtype)
        y = squared_relu(x, pattern)
        assert_equal(y, plain(x, pattern))
        assert not bool(y.signbit().logical_and(y == 0).any())
        if pattern is not None:
            assert check_pattern(y, pattern).holds


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_make_no_difference_and_the_input_stays(dtype: torch.dtype) -> None:
    x = hostile_tensor((24, 24), dtype)
    for view in (x.t(), x[::2, 4:20], x[3, :8].expand(5, 8), x.view(2, 12, 24).movedim(0, 1), x.flip(0)[:, 1:17]):
        before = view.clone()
        assert_equal(squared_relu(view, "2:4"), plain(view.contiguous(), "2:4"))
        assert_equal(squared_relu(view), plain(view, None))
        assert_equal(view, before)


def test_ties_keep_the_lower_index_and_nan_ranks_lowest() -> None:
    nan, inf = float("nan"), float("inf")
    for given, expected in (
        ([2.0, 2.0, 2.0, 2.0], [4.0, 4.0, 0.0, 0.0]),
        ([-1.0, 3.0, 2.0, 2.0], [0.0, 9.0, 4.0, 0.0]),
        ([nan, 1.0, 2.0, 3.0], [0.0, 0.0, 4.0, 9.0]),
        ([nan, -1.0, -2.0, 3.0], [0.0, 0.0, 0.0, 9.0]),
        ([nan, nan, nan, 3.0], [nan, 0.0, 0.0, 9.0]),
        ([inf, -inf, 1.0, inf], [inf, 0.0, 0.0, inf]),
        ([-0.0, -0.0, -1.0, 0.0], [0.0, 0.0, 0.0, 0.0]),
        ([1e30, 2e30, 3e30, 1.0], [0.0, inf, inf, 0.0]),  # ranked before they overflow
    ):
        assert_equal(squared_relu(torch.tensor(given), "2:4"), torch.tensor(expected))


@pytest.mark.parametrize("pattern", [None, "2:4"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_have_the_bits_of_torch(dtype: torch.dtype, pattern: str | None) -> None:
    if dtype.itemsize == 2:  # every number there is
        x = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
        x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(1))]
    else:
        x = torch.randn(1 << 16, dtype=dtype) * torch.randn(1 << 16, dtype=dtype).exp2().pow(4)
    if dtype == torch.bfloat16:
        x = torch.where((x.abs() > 1.1e-19) & (x.abs() < 1.8e19), x, 1)
    x = torch.where(x.isfinite(), x, 0)
    grad = torch.randn(x.shape).to(dtype)
    found = gradient(lambda x: squared_relu(x, pattern), x, grad)
    assert_equal(found, gradient(lambda x: plain(x, pattern), x, grad))
    assert bool(found.any())


def test_a_gradient_without_normal_squares_is_near() -> None:
    x = torch.tensor([1e-30, 1e-20, 3e-20, 1e-19])
    found = gradient(squared_relu, x, torch.ones(4))
    assert bool(((found - 2 * x).abs() <= 2e-19).all())
    assert gradient(squared_relu, torch.tensor([1e20]), torch.ones(1)).tolist() == [float("inf")]


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinite_gradients_reach_kept_places_only(dtype: torch.dtype) -> None:
    x = torch.tensor([1.0, 2.0, -1.0, 3.0], dtype=dtype)
    for value in (float("inf"), float("nan")):
        grad = torch.full_like(x, value)
        found = gradient(lambda x: squared_relu(x, "2:4"), x, grad)
        assert_equal(found, torch.tensor([0.0, value, 0.0, value], dtype=dtype))


@pytest.mark.parametrize("pattern", [None, "2:4", "1:4"])
def test_gradients_of_any_order_and_direction(pattern: str | None) -> None:
    def function(x: Tensor) -> Tensor:
        return squared_relu(x, pattern)

    x = apart((3, 8)).requires_grad_()
    assert torch.autograd.gradcheck(
        function, x, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )
    assert torch.autograd.gradgradcheck(function, x, check_fwd_over_rev=True, check_batched_grad=True)
    third = torch.func.jacrev(torch.func.hessian(lambda x: function(x).sum()))(x.detach()[0])
    torch.testing.assert_close(third, torch.zeros_like(third), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_second_derivative_counts_kept_places(dtype: torch.dtype) -> None:
    x = torch.tensor([1.0, 2.0, -1.0, 3.0], dtype=dtype)
    hessian = torch.func.hessian(lambda x: squared_relu(x, "2:4").sum())(x)
    assert_equal(hessian, torch.tensor([0.0, 2.0, 0.0, 2.0], dtype=dtype).diag())


def test_anomaly_mode_finds_none_in_gradients_of_gradients() -> None:
    x = torch.tensor([1.0, 2.0, -1.0, 3.0], requires_grad=True)
    with torch.autograd.set_detect_anomaly(True):
        grad = torch.autograd.grad(squared_relu(x, "2:4").square().sum(), x, create_graph=True)[0]
        assert torch.autograd.grad(grad.sum(), x)[0].tolist() == [0.0, 48.0, 0.0, 108.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_tangents_pass_kept_places(dtype: torch.dtype) -> None:
    x = torch.tensor([1.0, 2.0, -1.0, 3.0], dtype=dtype)
    _, tangent = torch.func.jvp(lambda x: squared_relu(x, "2:4"), (x,), (torch.full_like(x, 0.5),))
    assert_equal(tangent, torch.tensor([0.0, 2.0, 0.0, 3.0], dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_vmap_goes_over_any_axis(dtype: torch.dtype) -> None:
    x = hostile_tensor((6, 5, 8), dtype, finite=True)

    def function(x: Tensor) -> Tensor:
        return squared_relu(x, "2:4")

    for dim in (0, 1):
        expected = torch.stack([function(part) for part in x.unbind(dim)], dim)
        assert_equal(torch.vmap(function, dim, dim)(x), expected)
    assert_equal(torch.vmap(torch.vmap(function))(x), function(x))
    assert_equal(torch.vmap(function, 2, 2)(x[:, :4]), function(x[:, :4].movedim(2, 0)).movedim(0, 2))
    loss = torch.vmap(torch.func.grad(lambda x: function(x).sum()))
    assert_equal(loss(x.clamp(-4, 4)), gradient(function, x.clamp(-4, 4), torch.ones_like(x)))


def test_nothing_is_kept_but_the_output() -> None:
    """Which the Linear after it keeps too."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.numel() >= 32 * 64:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    x, last = torch.randn(32, 64, requires_grad=True), nn.Linear(64, 8)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = squared_relu(x, "2:4")
        last(y).sum().backward()
    assert kept == {y.untyped_storage().data_ptr(): 32 * 64 * 4}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_compiled_in_one_graph(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), SquaredReLU(), nn.Linear(32, 4)).to(dtype)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(5, 16).to(dtype)
    outputs = []
    for pattern in (None, "2:4", None):
        model[1].pattern = pattern
        outputs.append(compiled(x).detach())
        for run in (compiled, model):
            model.zero_grad()
            run(x).float().square().sum().backward()
            grads = [parameter.grad.clone() for parameter in model.parameters()]
            if run is compiled:
                expected = grads
        for one, other in zip(grads, expected, strict=True):
            torch.testing.assert_close(one, other)
        torch.testing.assert_close(outputs[-1], model(x).detach())
    assert not torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


def test_exported() -> None:
    model = nn.Sequential(nn.Linear(16, 32), SquaredReLU("2:4"), nn.Linear(32, 4)).eval()
    x = torch.randn(5, 16)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("tokens", min=2)},))
    for tokens in (5, 9):
        x = torch.randn(tokens, 16)
        torch.testing.assert_close(program.module()(x), model(x))


def test_autocast_leaves_the_dtype() -> None:
    model = nn.Sequential(nn.Linear(16, 32), SquaredReLU("2:4"), nn.Linear(32, 4))
    seen: list[torch.dtype] = []
    model[1].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    with torch.autocast(DEVICE.type, torch.bfloat16):
        loss = model(torch.randn(5, 16)).float().square().sum()
        assert squared_relu(torch.ones(4), "2:4").dtype == torch.float32
    loss.backward()
    assert seen == [torch.bfloat16]
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


def test_recomputed_activations_train_alike() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), SquaredReLU("2:4"), nn.Linear(32, 4))
    x, grads = torch.randn(5, 16), []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=False)):
        model.zero_grad()
        run(x).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


def test_an_output_that_was_changed_is_told() -> None:
    y = squared_relu(torch.ones(4, requires_grad=True), "2:4")
    y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_what_has_no_groups_or_no_meaning_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"x is \[3, 6\]: its last axis is not a multiple of 4, .* pattern=None"):
        squared_relu(torch.ones(3, 6), "2:4")
    with pytest.raises(ShapeError, match=r"x is \[\]: its last axis is not"):
        squared_relu(torch.tensor(1.0), "2:4")
    assert squared_relu(torch.tensor(3.0)).item() == 9
    for pattern in ("2:4t", "2:4x4"):
        with pytest.raises(PatternError, match=rf"pattern {pattern} of activations: .* Use '2:4'"):
            squared_relu(torch.ones(4, 4), pattern)
        with pytest.raises(PatternError, match="tokens would share masks"):
            SquaredReLU(pattern)
    for dtype in (torch.int64, torch.float8_e4m3fn, torch.complex64):
        with pytest.raises(UnsupportedError, match=rf"x is {dtype}: squared_relu takes float32"):
            squared_relu(torch.ones(4).to(dtype))


def test_the_pattern_of_a_module_may_change_at_any_time() -> None:
    module = SquaredReLU()
    x = torch.tensor([1.0, 3.0, -5.0, 2.0])
    assert module(x).tolist() == [1.0, 9.0, 0.0, 4.0]
    module.pattern = "2:4"
    assert str(module.pattern) == "2:4"
    assert module(x).tolist() == [0.0, 9.0, 0.0, 4.0]
    with pytest.raises(PatternError, match="tokens would share masks"):
        module.pattern = "2:4t"
    with pytest.raises(PatternError, match="unknown pattern '2-4'"):
        module.pattern = "2-4"
    assert repr(module) == "SquaredReLU(pattern='2:4')"
    assert not module.state_dict()
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(module), torch.load(buffer, weights_only=False)):
        assert other(x).tolist() == [0.0, 9.0, 0.0, 4.0]
    module.pattern = None
    assert module(x).tolist() == [1.0, 9.0, 0.0, 4.0]
    assert repr(module) == "SquaredReLU(pattern=None)"


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.act, self.down = (
            nn.LayerNorm(48),
            nn.Linear(48, 192),
            SquaredReLU(),
            nn.Linear(192, 48),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.act(self.up(self.norm(x))))  # type: ignore[no-any-return]


@pytest.mark.usefixtures("one_thread")
def test_digits_are_learned_as_well_as_with_dense_activations() -> None:
    """Dense at first, 2:4 from a third on."""
    datasets = pytest.importorskip("sklearn.datasets", reason="needs scikit-learn")
    digits = datasets.load_digits()
    order = torch.randperm(len(digits.data), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(digits.data, dtype=torch.float32)[order] / 16, torch.tensor(digits.target)[order]

    def train(pattern: str | None) -> tuple[float, float]:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(64, 48), Block(), Block(), nn.LayerNorm(48), nn.Linear(48, 10))
        optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
        for step in range(120):
            if step == 40:
                for block in model[1:3]:
                    block.act.pattern = pattern
            batch = torch.randint(1400, (128,))
            optimizer.zero_grad()
            cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
        with torch.no_grad():
            outputs = model(x[1400:])
        return float((outputs.argmax(1) == y[1400:]).float().mean()), float(cross_entropy(outputs, y[1400:]))

    (dense, dense_loss), (sparse, sparse_loss) = train(None), train("2:4")
    assert dense > 0.95
    assert sparse > dense - 0.02
    assert dense_loss != sparse_loss < 1.3 * dense_loss + 0.01

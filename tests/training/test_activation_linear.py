"""The linear layer after a squared ReLU: on its kernel as in plain torch, and why not where it is not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tests.on_device import DEVICE
from torch import Tensor, nn
from torch.nn.functional import linear

from twofour import Pattern, PatternError, ShapeError, SparseMatrix, UnsupportedError, native
from twofour.kernels import cpu
from twofour.testing import assert_within_bound, hostile_tensor, integer_tensor
from twofour.training import squared_relu, squared_relu_linear, why_dense
from twofour.training.activations.linear import _Gather, _Pack, _Spread

SHAPES = ((1, 8, 1), (3, 16, 5), (16, 64, 33), (70, 40, 17), (33, 4096, 9))


def run(function: Callable[..., Tensor], *inputs: Tensor, grad: Tensor | None = None) -> tuple[Tensor, ...]:
    """The output, and the gradients of all inputs."""
    inputs = tuple(tensor.detach().clone().requires_grad_() for tensor in inputs)
    y = function(*inputs)
    return y.detach(), *torch.autograd.grad(y, inputs, torch.ones_like(y) if grad is None else grad)


def assert_same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def on_kernel(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return squared_relu_linear(x, weight, bias, backend="cpu")


def on_torch(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return linear(squared_relu(x, "2:4"), weight, bias)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_integers_are_exact(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    """Every partial sum is one, in float32; in bfloat16 products are compared with the same rounding at the end."""
    tokens, features, outputs = shape
    x = integer_tensor((tokens, features), dtype, largest=2, seed=1)
    weight, bias = integer_tensor((outputs, features), dtype, largest=1, seed=2), integer_tensor((outputs,), dtype)
    grad = integer_tensor((tokens, outputs), dtype, largest=1, seed=3)
    found = run(on_kernel, x, weight, bias, grad=grad)
    assert native.module().last_kernel().endswith(("/grad_input", "/grad_values"))
    exact = run(on_torch, x.double(), weight.double(), bias.double(), grad=grad.double())
    without_bias = run(on_kernel, x, weight, grad=grad)
    assert torch.equal(without_bias[0] + bias, found[0])
    for one, other, name in zip(found[1:], exact[1:], ("x", "weight", "bias"), strict=True):
        expected = other
        if name == "x" and dtype == torch.bfloat16:  # rounded before the slope, as in torch
            before = (grad.double() @ weight.double()).to(dtype)
            expected = before * 2 * squared_relu(x, "2:4").sqrt()
        assert torch.equal(one, expected.to(dtype)), name
    assert torch.equal(found[0], exact[0].to(dtype)) or dtype == torch.bfloat16


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_number_is_within_its_bound(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(45, 256).to(dtype), torch.randn(37, 256).to(dtype)
    grad = torch.randn(45, 37).to(dtype)
    y, of_x, of_weight = run(on_kernel, x, weight, grad=grad)
    activations = squared_relu(x, "2:4")
    assert_within_bound(y, activations, weight)
    assert_within_bound(of_weight, grad.t(), activations.t())
    slope = 2 * activations.double().sqrt()
    exact, size = grad.double() @ weight.double(), grad.double().abs() @ weight.double().abs()
    bound = 2 * torch.finfo(dtype).eps * exact.abs() + 38 * torch.finfo(torch.float32).eps * size
    assert bool(((of_x.double() - slope * exact).abs() <= slope * bound + 1e-30).all())


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 8), (24, 64), (33, 1 << 15), (1025, 256)])
def test_hostile_activations_are_packed_and_spread_bit_for_bit(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    x = hostile_tensor(shape, dtype).requires_grad_()
    values, metadata = _Pack.apply(x)
    activations = squared_relu(x, "2:4")
    assert_same(SparseMatrix(*cpu.unpack(values, metadata, *shape), Pattern(), shape).to_dense(), activations)
    spread = _Spread.apply(values, metadata, x.shape)
    assert_same(spread, activations)
    assert_same(_Gather.apply(spread, metadata), values)
    grad = hostile_tensor(shape, dtype, seed=1)
    assert_same(
        torch.autograd.grad(values, x, _Gather.apply(grad, metadata))[0],
        torch.autograd.grad(activations, x, grad)[0],
    )


@pytest.mark.usefixtures("native")
def test_what_is_dropped_meets_nothing() -> None:
    x = torch.tensor([[1.0, 3.0, -5.0, 2.0, 0.0, 0.0, 1.0, 1.0]])
    weight = torch.ones(2, 8)
    weight[:, 0] = float("inf")
    weight[:, 2] = float("nan")
    y, of_x, of_weight = run(on_kernel, x, weight, grad=torch.tensor([[1.0, float("inf")]]))
    assert y.tolist() == [[15.0, 15.0]]
    inf = float("inf")
    assert of_x.tolist() == [[0.0, inf, 0.0, inf, 0.0, 0.0, inf, inf]]
    assert of_weight[0].tolist() == [0.0, 9.0, 0.0, 4.0, 0.0, 0.0, 1.0, 1.0]


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_axes_and_strides(dtype: torch.dtype) -> None:
    whole = integer_tensor((6, 5, 48), dtype, largest=2)
    weight, bias = integer_tensor((48, 7), dtype, largest=1).t()[:, 8:40], integer_tensor((14,), dtype)[::2]
    for x in (
        whole[..., 8:40],
        whole[:, ::2, :32],
        whole.movedim(0, 1)[..., :32],
        whole[0, 0, 3:35],
        whole[:1, :, :32],
    ):
        y = on_kernel(x, weight, bias)
        assert y.is_contiguous()
        assert torch.equal(y, on_torch(x, weight, bias))
        expected = run(on_torch, x, weight, bias)
        for one, other in zip(run(on_kernel, x, weight, bias), expected, strict=True):
            assert one.shape == other.shape
            assert torch.equal(one, other)


@pytest.mark.usefixtures("native")
def test_gradients_of_gradients() -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(9, 16), torch.randn(6, 16), torch.randn(6)

    def penalty(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        y = function(*inputs)
        grads = torch.autograd.grad(y.pow(3).sum(), inputs[:2], create_graph=True)
        return sum((grad.square().sum() for grad in grads), torch.zeros(()))

    found = run(lambda *inputs: penalty(on_kernel, *inputs), x, weight, bias)
    expected = run(lambda *inputs: penalty(on_torch, *inputs), x, weight, bias)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-2 * float(other.abs().max()) * 1e-3)


@pytest.mark.usefixtures("native")
def test_frozen_inputs_need_no_gradient() -> None:
    x, weight = integer_tensor((8, 16), torch.float32), integer_tensor((4, 16), torch.float32)
    for free in (x, weight):
        free.requires_grad_()
        on_kernel(x, weight).sum().backward()
        expected = torch.autograd.grad(on_torch(x, weight).sum(), free)[0]
        assert torch.equal(free.grad, expected)  # type: ignore[arg-type]
        free.requires_grad_(False).grad = None
    with torch.inference_mode():
        assert torch.equal(on_kernel(x, weight), on_torch(x, weight))


@pytest.mark.usefixtures("native")
def test_packed_activations_are_all_that_is_kept() -> None:
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    x, weight = torch.randn(64, 128, requires_grad=True), torch.randn(8, 128, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = on_kernel(x, weight)
    assert kept.pop(weight.untyped_storage().data_ptr()) == weight.nbytes
    assert sum(kept.values()) == 64 * 128 * 4 * 17 // 32
    y.sum().backward()


@pytest.mark.of_cpu
def test_the_kernel_is_taken_where_it_pays() -> None:
    x, weight = torch.ones(256, 1024), torch.ones(256, 1024)
    expected = None if cpu.available() is None else cpu.available()
    assert why_dense(x, weight) == expected
    if expected is None:
        squared_relu_linear(x, weight)
        assert native.module().last_kernel().endswith(("/many", "/few"))


REASONS: list[tuple[str, Callable[[], str | None]]] = [
    ("for 2:4, not for dense activations", lambda: why_dense(torch.ones(8, 8), torch.ones(8, 8), None, None)),
    ("for 2:4, not for 1:4", lambda: why_dense(torch.ones(8, 8), torch.ones(8, 8), None, "1:4")),
    ("x is on meta", lambda: why_dense(torch.ones(8, 8, device="meta"), torch.ones(8, 8))),
    (
        "x is torch.float32, the weight torch.bfloat16",
        lambda: why_dense(torch.ones(8, 8), torch.ones(8, 8).bfloat16()),
    ),
    ("x is torch.float64", lambda: why_dense(torch.ones(8, 8).double(), torch.ones(8, 8).double())),
    ("12 features are not a multiple of 8", lambda: why_dense(torch.ones(8, 12), torch.ones(8, 12))),
    ("nothing to multiply", lambda: why_dense(torch.ones(0, 8), torch.ones(8, 8))),
    ("x has 64 numbers: below 262144", lambda: why_dense(torch.ones(8, 8), torch.ones(8, 8))),
    ("255 outputs: below 256", lambda: why_dense(torch.ones(256, 1024), torch.ones(255, 1024))),
]


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize(("text", "ask"), REASONS, ids=[text for text, _ in REASONS])
def test_why_not(text: str, ask: Callable[[], str | None]) -> None:
    assert text in (ask() or "")


@pytest.mark.usefixtures("native")
def test_watched_calls_are_dense() -> None:
    x, weight = torch.randn(256, 1024), torch.randn(256, 1024)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert "autocast" in (why_dense(x, weight) or "")
        assert squared_relu_linear(x, weight).dtype == torch.bfloat16
    seen: list[str | None] = []

    def function(x: Tensor) -> Tensor:
        seen.append(why_dense(x, weight))
        return squared_relu_linear(x, weight).sum()

    torch.func.grad(function)(x)
    torch.func.jvp(function, (x,), (x,))
    torch.vmap(function)(x[None])
    assert all("watches" in (reason or "") for reason in seen), seen
    compiled = torch.compile(squared_relu_linear, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, weight), squared_relu_linear(x, weight), rtol=1e-4, atol=1e-3)


def test_dense_shapes_work_as_in_torch() -> None:
    weight, bias = torch.randn(5, 12), torch.randn(5)
    for pattern in (None, "1:4", "2:4"):
        x = torch.randn(3, 12)
        assert torch.equal(
            squared_relu_linear(x, weight, bias, pattern), linear(squared_relu(x, pattern), weight, bias)
        )
    assert squared_relu_linear(torch.ones(0, 12), weight).shape == (0, 5)
    layer = nn.Linear(12, 5)
    squared_relu_linear(torch.ones(3, 12), layer.weight, layer.bias).sum().backward()
    assert layer.weight.grad is not None


def test_what_cannot_run_is_refused() -> None:
    x, weight = torch.ones(3, 12), torch.ones(5, 12)
    with pytest.raises(UnsupportedError, match="unknown backend 'gpu': squared_relu_linear has 'cpu' and 'dense'"):
        squared_relu_linear(x, weight, backend="gpu")
    with pytest.raises(UnsupportedError, match=r"backend 'cpu' cannot run this: .* backend=None takes what can"):
        squared_relu_linear(x, weight, backend="cpu")
    with pytest.raises(ShapeError, match=r"x is \[3, 12\] and weight \[5, 8\]: they must be"):
        squared_relu_linear(x, torch.ones(5, 8))
    with pytest.raises(ShapeError, match=r"x is \[3, 6\]: its last axis is not a multiple of 4"):
        squared_relu_linear(torch.ones(3, 6), torch.ones(5, 6))
    with pytest.raises(PatternError, match="tokens would share masks"):
        squared_relu_linear(x, weight, pattern="2:4t")

"""activation(x @ W.T + bias) + residual in one pass: every backend against float64, gradients against torch's own."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from twofour import SparseMatrix, UnsupportedError, kernels
from twofour.errors import ShapeError
from twofour.kernels import KERNELS, LinearSpec, cpu, onednn, ops
from twofour.kernels.epilogue import ACTIVATIONS
from twofour.testing import integer_tensor

DTYPES = [torch.float32, torch.bfloat16]
NAMES = list(ACTIVATIONS)


def function_error(dtype: torch.dtype, condition: Tensor | float = 1.0) -> Tensor | float:
    """What the native functions may err, relative, for y of this dtype."""
    return 8 * 2.0**-24 * condition + (2.0**-12.5 if dtype == torch.bfloat16 else 0)


def exact_activation(name: str, y: Tensor) -> Tensor:
    """In float64, by forms in which nothing cancels."""
    if name == "gelu":
        return y * (0.5 * torch.special.erfc(-y / 2**0.5))
    if name in ("silu", "gelu_tanh"):
        z = y if name == "silu" else tanh_argument(y)
        small = torch.exp(-z.abs())
        return y * (torch.where(z < 0, small, 1.0) / (1 + small))
    return torch.relu(y) if name == "relu" else y


def tanh_argument(y: Tensor) -> Tensor:
    return 2 * (2 / torch.pi) ** 0.5 * (y + 0.044715 * y**3)


def assert_finished(found: Tensor, name: str, before: Tensor, magnitude: Tensor, terms: int, residual: Tensor) -> None:
    """`found` = f(before) + residual: the error of the sums grows at most 1.13 times in f, then f's own, then rounding."""
    value = exact_activation(name, before)
    expected = value + residual.double()
    condition = 1 + tanh_argument(before).abs().clamp(max=110) if name == "gelu_tanh" else 1
    allowed = torch.finfo(found.dtype).eps / 2 * expected.abs() * 1.01 + 2.0**-24 * expected.abs() + 2.0**-126
    allowed = allowed + 1.13 * terms * 2.0**-24 * magnitude + function_error(found.dtype, condition) * value.abs()
    assert bool(((found.double() - expected).abs() <= allowed).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("name", ["none", "relu"])
@pytest.mark.parametrize("tokens", [0, 1, 5, 33, 130])
def test_relu_and_residual_are_exact_on_integers(
    backend: str, tokens: int, name: str, adds: bool, dtype: torch.dtype
) -> None:
    for out_features, in_features in ((1, 4), (17, 36), (70, 132)):
        matrix = SparseMatrix.from_dense(integer_tensor((out_features, in_features), dtype), prune=True)
        x, bias = integer_tensor((tokens, in_features), dtype, seed=1), integer_tensor((out_features,), dtype, seed=2)
        residual = integer_tensor((tokens, out_features + 3), dtype, seed=3)[:, 1:-2] if adds else None
        y = kernels.linear(x, matrix, bias, activation=name, residual=residual, backend=backend)
        expected = ACTIVATIONS[name](x.double() @ matrix.to_dense().double().T + bias.double())
        expected = expected.to(dtype).double() if backend == "onednn" else expected
        assert torch.equal(y, (expected if residual is None else expected + residual.double()).to(dtype))


@pytest.mark.of_cpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("family", ["few", "many"])
@pytest.mark.parametrize("isa", cpu.isas() if cpu.available() is None else [])
def test_native_functions_stay_within_the_bound(isa: str, family: cpu.Family, name: str, dtype: torch.dtype) -> None:
    matrix = SparseMatrix.from_dense(torch.randn(97, 128).to(dtype), prune=True)
    packed = KERNELS["cpu"].pack(matrix)
    x, bias, residual = torch.randn(37, 128).to(dtype), torch.randn(97), torch.randn(37, 97).to(dtype)
    found = cpu.linear(x, *packed, bias, 97, 128, isa=isa, kernel=family, activation=name, residual=residual)
    weight = matrix.to_dense().double()
    before = x.double() @ weight.T + bias.double()
    magnitude = x.double().abs() @ weight.abs().T + bias.double().abs()
    assert_finished(found, name, before, magnitude, 2 * 65, residual)


@pytest.mark.of_cpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES[1:])
@pytest.mark.parametrize("isa", cpu.isas() if cpu.available() is None else [])
def test_native_functions_of_any_number(isa: str, name: str, dtype: torch.dtype) -> None:
    """The bias alone reaches them: the range where they decay, powers of every size, NaN and the infinities."""
    special = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 3.4e38, -3.4e38, 12.75, -12.75, 87.0, -87.0])
    bits = torch.arange(0, 2**32, 2**19 + 1).to(torch.int32).view(torch.float32)
    bias = torch.cat([torch.linspace(-17, 17, 20001), torch.linspace(-112, 112, 5001), special, bits])
    matrix = SparseMatrix.from_dense(torch.zeros(len(bias), 4, dtype=dtype), prune=True)
    x, packed = torch.zeros(1, 4, dtype=dtype), KERNELS["cpu"].pack(matrix)
    found = cpu.linear(x, *packed, bias, *matrix.shape, isa=isa, activation=name)[0].double()
    y = bias.double()
    expected = exact_activation(name, y)
    condition = 1 + tanh_argument(y).abs().clamp(max=110) if name == "gelu_tanh" else 1
    unit = torch.finfo(dtype).eps / 2
    allowed = (unit * 1.001 + function_error(dtype, condition)) * expected.abs() + y.abs() * 2.0**-122
    allowed = allowed + unit * 2.0**-126 + 2.0**-149
    finite = expected.to(dtype).isfinite()
    assert bool(((found - expected).abs() <= allowed)[finite].all())
    assert torch.equal(found[~finite].isnan(), expected[~finite].isnan())
    for value in (torch.inf, -torch.inf, torch.nan):  # as torch has it in float64, where it takes no short cuts
        theirs = ACTIVATIONS[name](torch.tensor([value], dtype=torch.float64))
        ours = cpu.linear(x, *packed, torch.full_like(bias, value), *matrix.shape, isa=isa, activation=name)
        torch.testing.assert_close(ours.double(), theirs.expand_as(ours), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_backends_agree_with_torch(backend: str, name: str, dtype: torch.dtype) -> None:
    matrix = SparseMatrix.from_dense(torch.randn(24, 32).to(dtype), prune=True)
    x, bias, residual = torch.randn(2, 9, 32).to(dtype), torch.randn(24).to(dtype), torch.randn(2, 9, 24).to(dtype)
    y = kernels.linear(x, matrix, bias, activation=name, residual=residual.transpose(0, 1).contiguous().transpose(0, 1),
                       backend=backend)  # fmt: skip
    dense = matrix.to_dense().double()
    expected = ACTIVATIONS[name](x.double() @ dense.T + bias.double()) + residual.double()
    torch.testing.assert_close(y.double(), expected, atol=1e-5 if dtype == torch.float32 else 6e-2, rtol=1e-2)
    late = kernels.linear(x, matrix, bias.float(), activation=name, backend=backend)  # a bias of another dtype
    torch.testing.assert_close(
        late.double(), expected - residual.double(), atol=1e-5 if dtype == torch.float32 else 6e-2, rtol=1e-2
    )


@pytest.mark.parametrize("activation", NAMES)
@pytest.mark.parametrize("direct_call", [False, True])
def test_gradients_are_those_of_torch(trained_backend: str, activation: str, direct_call: bool) -> None:
    """By way of ops.linear, which keeps what precedes the activation, and by the operation, which computes it again."""
    matrix = SparseMatrix.from_dense(torch.randn(12, 8), prune=True)
    values, metadata = (tensor.clone() for tensor in KERNELS[trained_backend].pack(matrix))
    values.requires_grad_()
    x, bias, residual = (torch.randn(*shape, requires_grad=True) for shape in ((3, 5, 8), (12,), (3, 5, 12)))
    if direct_call:
        run = ops._LINEAR[trained_backend]
        y = run(x, values, metadata, bias, "2:4", 12, 8, activation, residual)
    else:
        y = ops.linear(trained_backend, x, (values, metadata), bias, "2:4", 12, 8, activation, residual)
    weight = matrix.to_dense().requires_grad_()
    twins = [copy.deepcopy(tensor.detach()).requires_grad_() for tensor in (x, bias, residual)]
    expected = ACTIVATIONS[activation](twins[0] @ weight.T + twins[1]) + twins[2]
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
    outer = torch.randn_like(y)
    y.backward(outer)
    expected.backward(outer)
    for ours, theirs in zip((x, bias, residual), twins, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-5)
    assert weight.grad is not None
    assert values.grad is not None
    spec = LinearSpec.of(matrix)
    kept = KERNELS[trained_backend].unpack((values.grad, metadata), spec).values
    assert torch.allclose(kept, weight.grad[matrix.mask()].view_as(kept), atol=1e-5)


def test_tangents_and_batches(backend: str) -> None:
    matrix = SparseMatrix.from_dense(torch.randn(12, 8), prune=True)
    x, tangent, residual = torch.randn(5, 8), torch.randn(5, 8), torch.randn(5, 12)
    dense = matrix.to_dense()
    with forward_ad.dual_level():
        y = kernels.linear(
            forward_ad.make_dual(x, tangent), matrix, activation="gelu", residual=residual, backend=backend
        )
        moved = forward_ad.unpack_dual(y).tangent
        dual = forward_ad.make_dual(x, tangent)
        expected = forward_ad.unpack_dual(ACTIVATIONS["gelu"](dual @ dense.T) + residual).tangent
    torch.testing.assert_close(moved, expected, atol=1e-5, rtol=1e-5)

    def of(x: Tensor, residual: Tensor) -> Tensor:
        return kernels.linear(x, matrix, activation="silu", residual=residual, backend=backend)

    whole = of(x, residual)
    for dims in ((0, 0), (0, None), (None, 0)):
        xs = x[:, None] if dims[0] == 0 else x[:1]
        residuals = residual[:, None] if dims[1] == 0 else residual[:1]
        ys = torch.func.vmap(of, dims)(xs, residuals).squeeze(1)
        rows = [of(x[i if dims[0] == 0 else 0], residual[i if dims[1] == 0 else 0]) for i in range(5)]
        torch.testing.assert_close(ys, torch.stack(rows), atol=1e-6, rtol=1e-6)
    assert whole.shape == (5, 12)


def test_traces_and_old_calls(backend: str) -> None:
    matrix = SparseMatrix.from_dense(torch.randn(12, 8), prune=True)
    operands = KERNELS[backend].pack(matrix)
    x, residual = torch.randn(5, 8), torch.randn(5, 12)
    run = ops._LINEAR[backend]
    old = run(x, *operands, None, "2:4", 12, 8)
    assert torch.equal(old, kernels.linear(x, matrix, backend=backend))
    arguments = (x, *operands, None, "2:4", 12, 8, "gelu", residual)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(run, arguments, test_utils=tests)

    class Layer(torch.nn.Module):
        def forward(self, x: Tensor, residual: Tensor) -> Tensor:
            return ops.linear(backend, x, operands, None, "2:4", 12, 8, "gelu", residual)

    if backend != "onednn":
        with torch.no_grad():
            program = torch.export.export(Layer(), (x, residual))
        assert "gelu" in str(program.graph)
        assert "aten.gelu" not in str(program.graph)
        assert torch.equal(program.module()(x, residual), Layer()(x, residual))


@pytest.mark.of_cpu
def test_what_does_not_fit_is_refused(backend: str) -> None:
    matrix = SparseMatrix.from_dense(torch.randn(12, 8), prune=True)
    x = torch.randn(5, 8)
    with pytest.raises(UnsupportedError, match="activation 'elu' is unknown: the kernels have none, relu, gelu"):
        kernels.linear(x, matrix, activation="elu", backend=backend)
    with pytest.raises(ShapeError, match=r"residual is \[12\]: it must be \[5, 12\], as y"):
        kernels.linear(x, matrix, residual=torch.zeros(12), backend=backend)
    with pytest.raises(UnsupportedError, match=r"residual is torch.bfloat16 on cpu, x torch.float32"):
        kernels.linear(x, matrix, residual=torch.zeros(5, 12).bfloat16(), backend=backend)


def test_onednn_runs_its_own_activations(require_onednn: Callable[[torch.dtype], None]) -> None:
    require_onednn(torch.float32)
    assert set(onednn._POINTWISE) == set(ACTIVATIONS) == set(cpu._ACTIVATIONS)

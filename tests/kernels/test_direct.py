"""Calls that skip torch's dispatcher: only where nothing listens to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from twofour import QuantizedSparseLinear, SparseLinear, SparseMatrix
from twofour.kernels import direct, linear, ops

pytestmark = pytest.mark.of_cpu


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, backend: str) -> list[str]:
    """Grows by one at each direct call."""
    made: list[str] = []
    original: Callable[..., torch.Tensor] = ops._DIRECT[backend]

    def counted(*arguments: Any) -> torch.Tensor:
        made.append(backend)
        return original(*arguments)

    monkeypatch.setitem(ops._DIRECT, backend, counted)
    return made


def layer(backend: str) -> SparseLinear:
    weight = torch.randint(-4, 5, (16, 32)).float()
    return SparseLinear(SparseMatrix.from_dense(weight, prune=True), torch.ones(16), backend=backend)


def inputs(tokens: int = 3) -> torch.Tensor:
    return torch.randint(-4, 5, (tokens, 32)).float()


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_inference_skips_the_dispatcher(backend: str, calls: list[str], guard: Callable[[], Any]) -> None:
    sparse, x = layer(backend), inputs()
    expected = x @ sparse.matrix.to_dense().T + 1
    with guard():
        assert torch.equal(sparse(x), expected)
        assert torch.equal(sparse(x.clone()), expected)
    assert len(calls) == 2
    assert torch.equal(sparse(x), expected)  # the bias wants a gradient
    assert len(calls) == 2
    sparse.bias.requires_grad_(False)
    assert torch.equal(sparse(x), expected)
    assert len(calls) == 3
    assert sparse(x.requires_grad_()).requires_grad
    assert len(calls) == 3


def test_whoever_listens_to_the_dispatcher_hears_the_operation(backend: str, calls: list[str]) -> None:
    heard: list[str] = []

    class Listener(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            heard.append(str(function))
            return function(*args, **(kwargs or {}))

    sparse, x = layer(backend), inputs()
    with torch.no_grad(), Listener():
        sparse(x)
    assert f"twofour.linear_{backend}.default" in heard
    with torch.no_grad(), torch.profiler.profile() as profile:
        sparse(x)
    assert f"twofour::linear_{backend}" in {event.key for event in profile.key_averages()}
    assert calls == []


def test_transforms_and_tracers_take_the_dispatcher(backend: str, calls: list[str]) -> None:
    sparse, x = layer(backend), inputs(6)
    with torch.no_grad():
        expected = getattr(torch.ops.twofour, f"linear_{backend}").default(
            x, sparse.values, sparse.metadata, sparse.bias, "2:4", 16, 32
        )
        assert torch.equal(torch.func.vmap(sparse)(x.view(2, 3, 32)).view(6, 16), expected)
        assert torch.equal(torch.func.functionalize(sparse)(x), expected)
        _, moved = torch.func.jvp(sparse, (x,), (x,))
        assert torch.equal(moved, expected - 1)
        with forward_ad.dual_level():
            assert forward_ad.unpack_dual(sparse(forward_ad.make_dual(x, x))).tangent is not None
        graph = torch.fx.experimental.proxy_tensor.make_fx(sparse)(x)
        assert f"linear_{backend}" in str(graph.graph)
    assert calls == []


@pytest.mark.parametrize("weights", ["int8", "float8"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_layers_with_scales_skip_the_dispatcher_too(
    backend: str, weights: str, native: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix = SparseMatrix.from_dense(torch.randn(16, 32), prune=True)
    sparse = QuantizedSparseLinear.from_matrix(matrix, torch.ones(16), backend=backend, weights=weights)
    calls: list[str] = []
    original = sparse.kind._direct[backend]

    def counted(*arguments: Any) -> torch.Tensor:
        calls.append(backend)
        return original(*arguments)

    monkeypatch.setitem(sparse.kind._direct, backend, counted)
    x = torch.randn(3, 32)
    expected = sparse(x)
    assert expected.requires_grad  # the bias wants one
    assert calls == []
    with torch.no_grad():
        assert torch.equal(sparse(x), expected)
        assert torch.equal(sparse(x[None]), expected[None])
        assert len(calls) == 2
        with torch.profiler.profile() as profile:
            sparse(x)
        assert f"twofour::linear_{weights}_{backend}" in {event.key for event in profile.key_averages()}
        assert f"linear_{weights}_{backend}" in str(torch.fx.experimental.proxy_tensor.make_fx(sparse)(x).graph)
        lazy = torch._neg_view(-sparse.scales)
        arguments = (backend, x, (sparse.values, sparse.metadata))
        y = sparse.kind.linear(*arguments, lazy, sparse.bias, "2:4", 16, 32)
        assert torch.equal(y, expected)
    assert sparse(x.requires_grad_()).requires_grad
    assert len(calls) == 2


plain = torch.ones(2)


def test_a_lazy_minus_sign_is_not_lost(backend: str) -> None:
    sparse, x = layer(backend), inputs()
    lazy = torch.complex(torch.zeros_like(x), x).conj().imag
    assert lazy.is_neg()
    assert not direct.applies(lazy, plain, None)
    with torch.no_grad():
        assert torch.equal(sparse(lazy), sparse(-x))


class Named(torch.Tensor):
    """Of a subclass that hears functions, not operations."""


def test_results_of_a_subclass_are_of_it(backend: str, calls: list[str]) -> None:
    sparse, x = layer(backend), inputs()
    with torch.no_grad():
        y = sparse(x.as_subclass(Named))
        assert type(y) is Named
        assert torch.equal(y.as_subclass(torch.Tensor), sparse(x))
    assert len(calls) == 1


def test_what_is_no_tensor_is_named(backend: str) -> None:
    sparse, x = layer(backend), inputs()
    for name, wrong in (("x", x.numpy()), ("bias", [1.0] * 16), ("residual", 1.0)):
        given = {"x": x, "bias": None, "residual": None, name: wrong}
        with pytest.raises(TypeError, match=f"x, bias and residual are tensors, not {type(wrong).__name__}\\."):
            linear(given["x"], sparse.matrix, given["bias"], residual=given["residual"], backend=backend)


def test_subclasses_are_not_plain() -> None:
    class Own(torch.Tensor):
        heard = 0

        @classmethod
        def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            raise AssertionError

    assert not direct.applies(torch.Tensor._make_subclass(Own, torch.ones(2)), plain, None)
    assert not direct.applies(torch.ones(2), plain, torch.Tensor._make_subclass(Own, torch.ones(2)))
    assert not direct.applies(torch.ones(2, device="meta"), plain, None)
    assert direct.applies(torch.ones(2), plain, None)
    assert not direct.applies(torch.ones(2), torch.Tensor._make_subclass(Own, torch.ones(2)), None)

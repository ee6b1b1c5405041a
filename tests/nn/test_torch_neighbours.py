"""SparseLinear among torch's transforms, hooks, copies and conversions."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from tests.on_device import DEVICE
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrize

import twofour
from twofour import QuantizedSparseLinear, SparseLinear, SparseMatrix, kernels
from twofour.nn.swap import replace_module, to_dense_modules, why_not_swappable


def layer(out_features: int = 48, in_features: int = 64, dtype: torch.dtype = torch.float32) -> SparseLinear:
    weight = torch.randn(out_features, in_features).to(dtype)
    return SparseLinear(SparseMatrix.from_dense(weight, prune=True), torch.randn(out_features).to(dtype))


def twins() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model[1].weight = model[0].weight
    twofour.prune(model)
    twofour.compress(model, force=True)
    return model


@pytest.mark.parametrize("strict", [True, False])
def test_exported_programs_keep_their_gradients(native: None, strict: bool) -> None:
    model = nn.Sequential(layer(), nn.ReLU())
    x = torch.randn(4, 64)
    exported = torch.export.export(model, (x,), strict=strict).module()
    x.requires_grad_()
    exported(x).sum().backward()
    expected = x.grad, [parameter.grad for parameter in exported.parameters()]
    x.grad = None
    model(x).sum().backward()
    assert torch.equal(expected[0], x.grad)
    assert torch.equal(expected[1][0], model[0].bias.grad)


def test_forward_mode_derivatives(backend: str) -> None:
    sparse = SparseLinear(layer().matrix, torch.randn(48), backend=backend)
    x, tangent = torch.randn(3, 64), torch.randn(3, 64)
    weight = sparse.matrix.to_dense()
    _, moved = torch.func.jvp(sparse, (x,), (tangent,))
    torch.testing.assert_close(moved, tangent @ weight.T)
    with forward_ad.dual_level():
        y = sparse(forward_ad.make_dual(x, tangent))
        torch.testing.assert_close(forward_ad.unpack_dual(y).tangent, tangent @ weight.T)


def test_vmap_is_one_more_axis(backend: str) -> None:
    sparse = SparseLinear(layer().matrix, torch.randn(48), backend=backend)
    x = torch.randn(5, 3, 64)
    torch.testing.assert_close(torch.func.vmap(sparse)(x), sparse(x))
    torch.testing.assert_close(torch.func.vmap(sparse, in_dims=2, out_dims=2)(x.movedim(0, 2)), sparse(x).movedim(0, 2))


def test_a_tracer_leaves_no_stand_ins_behind() -> None:
    matrix = layer().matrix

    class Functional(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return kernels.linear(x, matrix)

    x = torch.randn(2, 64)
    torch.export.export(Functional(), (x,), strict=False)
    assert type(kernels.linear(x, matrix)) is torch.Tensor


def test_packing_under_inference_mode_serves_training_too() -> None:
    matrix = layer().matrix
    x = torch.randn(2, 64)
    with torch.inference_mode():
        kernels.linear(x, matrix)
    kernels.linear(x.requires_grad_(), matrix).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_autocast_gives_linears_dtype(backend: str, weight_dtype: torch.dtype, x_dtype: torch.dtype) -> None:
    sparse = SparseLinear(layer(dtype=weight_dtype).matrix, backend=backend)
    dense = sparse.to_linear()
    x = torch.randn(3, 64).to(x_dtype)
    with torch.autocast(DEVICE.type, torch.bfloat16), torch.no_grad():
        assert sparse(x).dtype == dense(x).dtype
    with torch.autocast(DEVICE.type, torch.bfloat16), pytest.raises(twofour.UnsupportedError, match="x is torch.int64"):
        sparse(torch.zeros(3, 64, dtype=torch.int64))


def test_the_reference_keeps_its_precision_under_autocast() -> None:
    matrix = layer().matrix
    x = torch.randn(3, 64)
    expected = kernels.linear(x, matrix, backend="reference")
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert torch.equal(kernels.linear(x, matrix, backend="reference"), expected)


def test_a_forward_replaced_on_the_object_is_respected() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    original = model[0].forward
    model[0].forward = lambda x: 100 * original(x)  # type: ignore[method-assign]
    twofour.prune(model)
    assert why_not_swappable(model[0]) == "its forward was replaced on the object"
    x = torch.randn(1, 8)
    expected = model(x)
    with pytest.raises(twofour.ModelError, match="its forward was replaced on the object"):
        twofour.compress(model, force=True)
    assert torch.equal(model(x), expected)


def test_backward_hooks_fire_after_swapping() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    calls: list[int] = []
    model[0].register_full_backward_hook(lambda *_: calls.append(1))
    twofour.prune(model)
    replace_module(model, model[0], SparseLinear.from_linear(model[0]))
    model(torch.randn(2, 8, requires_grad=True)).sum().backward()
    assert calls == [1]


@pytest.mark.of_cpu
def test_assigning_a_state_takes_its_device_and_dtype() -> None:
    source = layer(dtype=torch.bfloat16)
    target = layer().to("meta")
    target.load_state_dict(source.state_dict(), assign=True)
    assert target.values.device.type == "cpu"
    assert torch.equal(target.matrix.to_dense(), source.matrix.to_dense())
    both = {**source.state_dict(), "weight": torch.zeros(48, 64)}
    with pytest.raises(RuntimeError, match='Unexpected key.* "weight"'):
        layer().load_state_dict(both)


@pytest.mark.of_cpu
def test_from_meta_to_empty_and_filled() -> None:
    source = layer()
    target = layer().to("meta").to_empty(device="cpu")
    target.load_state_dict(source.state_dict())
    x = torch.randn(2, 64)
    assert torch.equal(target(x), source(x))


def test_memory_formats_do_not_reach_the_kernels_layout(native: None) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), layer())
    x = torch.randn(2, 64)
    expected = model[1](x)
    model.to(memory_format=torch.channels_last)
    assert torch.equal(model[1](x), expected)
    model.state_dict()


def test_shared_weights_stay_shared() -> None:
    model = twins()
    assert model[0].values is model[1].values
    model.to(torch.bfloat16)
    assert model[0].values is model[1].values
    assert model[0].values.dtype == torch.bfloat16
    other = copy.deepcopy(model)
    assert other[0].values is other[1].values
    assert other[0].values is not model[0].values
    assert to_dense_modules(other) == 2
    assert other[0].weight is other[1].weight


def test_a_pickle_holds_the_canonical_matrix(native: None, monkeypatch: pytest.MonkeyPatch) -> None:
    sparse = layer()
    buffer = io.BytesIO()
    torch.save(sparse, buffer)
    buffer.seek(0)
    monkeypatch.setattr("twofour.kernels.cpu._UNAVAILABLE", "this machine has no native kernels")
    other = torch.load(buffer, weights_only=False)
    assert other.backend == "reference"
    x = torch.randn(2, 64)
    torch.testing.assert_close(other(x), sparse(x))


def test_a_backend_that_was_asked_for_is_explained(native: None) -> None:
    sparse = SparseLinear(layer().matrix, backend="reference")
    assert sparse.choice.reason == "cpu: backend='reference' was asked for"
    pinned = SparseLinear(layer().matrix, backend="cpu").half()
    assert pinned.backend == "reference"
    assert pinned.float().backend == "cpu"


@pytest.mark.parametrize("weights", ["float32", "int8", "float8"])
def test_a_bias_that_others_hold_in_their_way_is_found(weights: str, native: None) -> None:
    """As an attribute of a replica, computed by a parametrization, or a plain tensor."""

    def made() -> SparseLinear:
        torch.manual_seed(3)
        matrix = SparseMatrix.from_dense(torch.randn(16, 32), prune=True)
        if weights == "float32":
            return SparseLinear(matrix, torch.randn(16)).requires_grad_values()
        return QuantizedSparseLinear.from_matrix(matrix, torch.randn(16), weights=weights)

    x = torch.randn(3, 32)
    layer = made()
    expected = layer(x)
    replica = layer._replicate_for_data_parallel()
    replica.bias = layer.bias.detach().clone().requires_grad_()  # type: ignore[union-attr, assignment]
    if weights == "float32":
        replica.values = layer.values.detach().clone()
    assert torch.equal(replica(x), expected)

    class Doubled(nn.Module):
        def forward(self, bias: torch.Tensor) -> torch.Tensor:
            return 2 * bias

    layer = made()
    parametrize.register_parametrization(layer, "bias", Doubled())
    with torch.no_grad():
        wanted = made()
        wanted.bias.mul_(2)  # type: ignore[union-attr]
        assert torch.equal(layer(x), wanted(x))
    layer = made()
    bias = layer.bias.detach().clone()  # type: ignore[union-attr]
    del layer.bias
    layer.bias = bias  # type: ignore[assignment]
    assert torch.equal(layer(x), expected)

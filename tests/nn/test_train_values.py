"""SparseLinear with trained values: the same steps as dense training with masked gradients, and a whole module's manners."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import twofour
from twofour import SparseLinear

OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.3, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1),
}


def twins(trained_backend: str | None = None, bias: bool = True) -> tuple[nn.Sequential, nn.Sequential]:
    """A pruned dense model, and its compressed twin with trained values and a bias of its own."""
    torch.manual_seed(3)
    dense = nn.Sequential(nn.Linear(32, 52, bias=bias), nn.Tanh(), nn.Linear(52, 20, bias=bias))
    twofour.prune(dense)
    sparse = copy.deepcopy(dense)
    for index in (0, 2):
        sparse[index] = SparseLinear.from_linear(sparse[index], backend=trained_backend).requires_grad_values()
    return dense, sparse


def dense_weights(model: nn.Sequential) -> list[Tensor]:
    return [model[index].matrix.to_dense() for index in (0, 2)]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_step_is_that_of_masked_dense_training(trained_backend: str, name: str) -> None:
    dense, sparse = twins(trained_backend)
    masks = [model.weight != 0 for model in (dense[0], dense[2])]
    optimizers = [OPTIMIZERS[name](list(model.parameters())) for model in (dense, sparse)]
    x, target = torch.randn(64, 32), torch.randn(64, 20)
    losses = []
    for _ in range(25):
        step = []
        for model, optimizer in zip((dense, sparse), optimizers, strict=True):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x), target)
            loss.backward()
            if model is dense:
                for layer, mask in zip((dense[0], dense[2]), masks, strict=True):
                    layer.weight.grad *= mask
            optimizer.step()
            step.append(loss.item())
        assert step[0] == pytest.approx(step[1], rel=1e-4)
        losses.append(step[1])
        for layer, weight in zip((dense[0], dense[2]), dense_weights(sparse), strict=True):
            torch.testing.assert_close(weight, layer.weight.detach(), rtol=1e-4, atol=1e-5)
    assert losses[-1] < 0.8 * losses[0]
    for weight, mask in zip(dense_weights(sparse), masks, strict=True):
        assert bool((weight[~mask] == 0).all())


def test_bfloat16_trains(native: None) -> None:
    _, sparse = twins()
    sparse.bfloat16()
    assert isinstance(sparse[0].values, nn.Parameter)
    optimizer = torch.optim.SGD(sparse.parameters(), lr=1.0)
    x, target = torch.randn(64, 32).bfloat16(), torch.randn(64, 20).bfloat16()
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(sparse(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_values_are_constants_unless_asked(native: None) -> None:
    dense, _ = twins()
    layer = SparseLinear.from_linear(dense[0])
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    assert layer.requires_grad_values() is layer
    assert [name for name, _ in layer.named_parameters()] == ["bias", "values"]
    assert layer.weight.requires_grad
    assert layer.requires_grad_values() is layer  # twice is once
    layer(torch.randn(3, 32)).sum().backward()
    assert layer.values.grad.shape == layer.values.shape
    layer.requires_grad_values(False)
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    assert not layer.values.requires_grad


def test_state_dict_is_canonical_and_loads_into_the_same_parameter(trained_backend: str) -> None:
    _, sparse = twins(trained_backend)
    state = {name: tensor.clone() for name, tensor in sparse.state_dict().items()}
    assert sorted(state)[:3] == ["0.bias", "0.weight.metadata", "0.weight.values"]
    assert not any(tensor.requires_grad for tensor in sparse.state_dict().values())
    expected = dense_weights(sparse)
    parameters = list(sparse.parameters())
    with torch.no_grad():
        for parameter in parameters:
            parameter.mul_(3)
    sparse.load_state_dict(state)
    assert all(a is b for a, b in zip(sparse.parameters(), parameters, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(dense_weights(sparse), expected, strict=True))
    plain, _ = twins()
    constant = SparseLinear.from_linear(plain[0], backend=trained_backend)
    constant.load_state_dict({name[2:]: tensor for name, tensor in state.items() if name.startswith("0.")})
    assert torch.equal(constant.matrix.to_dense(), expected[0])


def test_copies_pickles_and_conversions_stay_trained(native: None) -> None:
    _, sparse = twins()
    x = torch.randn(5, 32)
    buffer = io.BytesIO()
    torch.save(sparse, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(sparse), torch.load(buffer, weights_only=False)):
        assert isinstance(other[0].values, nn.Parameter)
        assert other[0].values.requires_grad
        assert other[0].values is not sparse[0].values
        assert torch.equal(other(x), sparse(x))
    parameter = sparse[0].values
    expected = sparse[0].matrix.to_dense()
    sparse(x).sum().backward()
    sparse.to("cpu")
    assert sparse[0].values is parameter
    assert parameter.grad is not None
    sparse.to(torch.bfloat16)
    assert sparse[0].values is parameter
    assert parameter.dtype == torch.bfloat16
    assert parameter.grad is None
    assert torch.equal(sparse[0].matrix.to_dense(), expected.bfloat16())
    sparse.half()
    assert sparse[0].backend == "reference"
    sparse(x.half()).sum().backward()
    assert parameter.grad.shape == parameter.shape == (52, 16)
    sparse.float()
    assert sparse[0].backend == "cpu"
    assert torch.equal(sparse[0].matrix.to_dense(), expected.bfloat16().float())
    meta = copy.deepcopy(sparse).to("meta")
    assert meta[0].values.is_meta
    assert isinstance(meta[0].values, nn.Parameter)


def test_shared_weights_train_as_one(native: None) -> None:
    dense, _ = twins()
    one = SparseLinear.from_linear(dense[0]).requires_grad_values()
    model = nn.ModuleList([one, one.twin(None)])
    assert model[1].values is one.values
    assert len(list(model.parameters())) == 2
    x = torch.randn(5, 32)
    (model[0](x).sum() + model[1](x).sum()).backward()
    both = one.values.grad.clone()
    one.values.grad = None
    model[0](x).sum().backward()
    torch.testing.assert_close(both, 2 * one.values.grad)
    model.half()
    assert model[1].values is one.values
    assert model[0].backend == model[1].backend == "reference"
    torch.testing.assert_close(model[1](x.half()) + one.bias, model[0](x.half()), atol=2e-3, rtol=2e-3)
    model.float()
    torch.testing.assert_close(model[1](x) + one.bias, model[0](x))


def test_training_under_compile_gives_the_eager_gradients(native: None) -> None:
    _, sparse = twins()
    compiled = torch.compile(sparse, fullgraph=True)
    x = torch.randn(6, 32)
    compiled(x).square().sum().backward()
    found = [parameter.grad for parameter in sparse.parameters()]
    sparse.zero_grad()
    sparse(x).square().sum().backward()
    torch.testing.assert_close(found, [parameter.grad for parameter in sparse.parameters()])


def test_kernels_without_a_gradient_of_the_values_say_so(require_onednn: Callable[[torch.dtype], None]) -> None:
    require_onednn(torch.float32)
    layer = SparseLinear(twofour.SparseMatrix.from_dense(torch.eye(16)), backend="onednn")
    with pytest.raises(
        twofour.UnsupportedError, match=r"backend 'onednn' has no gradient of the values: SparseLinear\("
    ):
        layer.requires_grad_values()
    trained = SparseLinear(layer.matrix, layer.bias).requires_grad_values()
    trained(torch.ones(2, 16)).sum().backward()
    assert trained.values.grad is not None

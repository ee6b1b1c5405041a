"""Low-rank companions: what they compute, what is trained, what they live through, and what must be refused."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from tests.on_device import DEVICE
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import twofour
from twofour import CalibrationError, ModelError, QuantizedSparseLinear, SparseLinear, UnsupportedError
from twofour.solvers import Hessian
from twofour.solvers.hessian import statistics
from twofour.training import (
    AdaptedLinear,
    adapter_parameters,
    adapter_state_dict,
    add_adapters,
    keep_masks,
    load_adapter_state_dict,
    merge_adapters,
    remove_adapters,
)

BASES = ("dense", "compressed", "Conv1D")


def base_layer(kind: str, dtype: torch.dtype = torch.float32, integers: bool = False) -> nn.Module:
    """16 -> 24 that holds 2:4."""
    linear = nn.Linear(16, 24, dtype=dtype)
    if integers:
        linear.weight.data.copy_(torch.randint(-4, 5, (24, 16)))
        linear.bias.data.copy_(torch.randint(-4, 5, (24,)))
    twofour.prune(nn.Sequential(linear))
    if kind == "compressed":
        return SparseLinear.from_linear(linear)
    if kind == "Conv1D":
        conv = pytest.importorskip("transformers.pytorch_utils").Conv1D(24, 16).to(dtype)
        conv.weight.data.copy_(linear.weight.T)
        conv.bias.data.copy_(linear.bias)
        return conv
    return linear


def dense_matrix(base: Any) -> Tensor:
    """[24, 16]."""
    if isinstance(base, SparseLinear):
        return base.matrix.to_dense()
    return base.weight.detach() if isinstance(base, nn.Linear) else base.weight.detach().T


def pruned(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 3)
    ).to(dtype)
    twofour.prune(model)
    return model


def wake(model: nn.Module, seed: int = 0) -> nn.Module:
    """B other than zero, as after training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, AdaptedLinear):
                module.lora_b.copy_(torch.randn(module.lora_b.shape, generator=generator) / 4)
    return model


def loss_of(model: nn.Module, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(32, 16, generator=generator), torch.randint(0, 3, (32,), generator=generator)
    return nn.functional.cross_entropy(model(x.to(dtype)), y)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 4) -> list[float]:
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model, 0)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", BASES)
def test_sums_of_integers_are_exact(kind: str, masked: bool) -> None:
    base = base_layer(kind, integers=True)
    layer = AdaptedLinear(base, rank=2, alpha=4, masked=masked)
    assert (layer.in_features, layer.out_features, layer.rank, layer.scale) == (16, 24, 2, 2.0)
    with torch.no_grad():
        layer.lora_a.copy_(torch.randint(-4, 5, (2, 16)))
        layer.lora_b.copy_(torch.randint(-4, 5, (24, 2)))
    weight = dense_matrix(base) + 2 * layer.lora_b @ layer.lora_a
    if masked:
        weight = weight * (dense_matrix(base) != 0)
    x = torch.randint(-4, 5, (3, 5, 16)).float()
    expected = x @ weight.T + base.bias
    assert torch.equal(layer(x), expected)
    if kind != "Conv1D" or masked:  # it takes a view
        assert torch.equal(layer(x.transpose(0, 1)), expected.transpose(0, 1))
    assert torch.equal(layer(x[0, 0]), expected[0, 0])
    assert layer(x[:0]).shape == (0, 5, 24)
    if kind == "compressed":
        with pytest.raises(UnsupportedError, match="given the weight of a SparseLinear"):
            torch.relu(layer.weight)
    else:
        own = layer.weight if kind == "dense" else layer.weight.T
        assert torch.equal(own, weight)
        assert layer.weight.shape == base.weight.shape


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", BASES)
def test_nothing_changes_before_training(kind: str, dtype: torch.dtype, masked: bool) -> None:
    if kind == "compressed" and dtype == torch.float64:
        return
    base = base_layer(kind, dtype)
    x = torch.randn(7, 16).to(dtype)
    before = base(x)
    after = AdaptedLinear(base, rank=4, masked=masked)(x)
    assert after.dtype == before.dtype
    if kind == "compressed" and masked:  # the dense product in place of the kernel's
        torch.testing.assert_close(after, before, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
    else:
        assert torch.equal(after, before)


def test_int8_layers_have_companions_too() -> None:
    model = pruned()
    x = torch.randn(9, 16)
    twofour.compress(model, force=True, weights="int8")
    before = model(x)
    report = add_adapters(model, rank=2)
    assert torch.equal(model(x), before)
    assert report.summary["masked"] == 0
    assert report.rows[0]["reason"] == "not masked: weights of 8 bits do not merge, and it stays beside them"
    assert [type(module.base) for module in model if isinstance(module, AdaptedLinear)] == [QuantizedSparseLinear] * 3
    assert train(model, torch.optim.AdamW(adapter_parameters(model), 0.05), 8)[-1] < float(
        loss_of(pruned(), 0).detach()
    )
    with pytest.raises(UnsupportedError, match="masked=True adds to the weight itself, and this one is int8"):
        AdaptedLinear(model[0].base, rank=2, masked=True)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", ["dense", "Conv1D"])
def test_gradients_are_those_of_finite_differences(kind: str, masked: bool) -> None:
    layer = AdaptedLinear(base_layer(kind, torch.float64), rank=2, alpha=3, masked=masked)
    wake(nn.Sequential(layer))

    def run(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"lora_a": a, "lora_b": b}, (x,))

    x = torch.randn(3, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (x, layer.lora_a, layer.lora_b))


@pytest.mark.parametrize("masked", [False, True])
def test_gradients_beside_a_compressed_weight_are_those_beside_the_dense_one(
    trained_backend: str, masked: bool
) -> None:
    dense = AdaptedLinear(base_layer("dense"), rank=3, masked=masked)
    wake(nn.Sequential(dense))
    sparse = copy.deepcopy(dense)
    sparse.base = SparseLinear.from_linear(sparse.base, backend=trained_backend)
    grads = []
    for layer in (dense, sparse):
        x = torch.linspace(-1, 1, 80).view(5, 16).requires_grad_()
        layer(x).square().sum().backward()
        grads.append((x.grad, layer.lora_a.grad, layer.lora_b.grad, layer.base.bias.grad))
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("compressed", [False, True])
def test_only_adapters_are_trained(masked: bool, compressed: bool) -> None:
    model = pruned()
    if compressed:
        twofour.compress(model, force=True)
        model[0].requires_grad_values()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = add_adapters(model, rank=4, masked=masked)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.05, weight_decay=0.1)
    losses = train(model, optimizer, 10)
    assert losses[-1] < 0.8 * losses[0]
    assert {id(p) for p in optimizer.state} == {id(p) for p in adapter_parameters(model)}
    assert len(adapter_parameters(model)) == 6
    assert all(bool(p.any()) for p in adapter_parameters(model))
    assert report.summary["layers adapted"] == "3 of 3"
    assert report.summary["masked"] == (3 if masked else 0)
    trained = sum(p.numel() for p in adapter_parameters(model))
    assert report.summary["parameters of adapters"] == report.summary["parameters that are trained"] == trained
    assert remove_adapters(model) == 3
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in after.items())


def test_what_train_names_is_trained_as_before() -> None:
    model = pruned()
    model[2].bias.requires_grad_(False)
    add_adapters(model, rank=2, train=["*.bias", "3.*"])
    trained = {name for name, p in model.named_parameters() if p.requires_grad and "lora" not in name}
    assert trained == {"0.base.bias", "3.weight", "3.bias", "5.base.bias"}
    with pytest.raises(ModelError, match=r"train='\*.gamma' matches no parameter. They are called '0.weight'"):
        add_adapters(pruned(), train="*.gamma")


def test_a_second_call_adapts_other_layers_and_leaves_the_first_ones() -> None:
    model = pruned()
    add_adapters(model, rank=2, include="0")
    report = add_adapters(model, rank=4, exclude="5")
    rows = {row["layer"]: row for row in report.rows}
    assert rows["0.base"]["reason"] == "has a companion already"
    assert rows["0.lora_a"]["reason"] == "a companion itself"
    assert rows["2"]["rank"] == 4
    assert rows["5"]["reason"] == "excluded"
    assert all(p.requires_grad for p in adapter_parameters(model))
    with pytest.raises(ModelError, match=r"there is no layer to adapt: .*has a companion already"):
        add_adapters(model, include=["0.*", "2.*"])


def test_layers_that_cannot_have_a_companion_are_left_with_a_reason() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(8, 8)
            self.conv = nn.Conv1d(8, 8, 3)
            self.attention = nn.MultiheadAttention(8, 2)
            self.one, self.tied = nn.Linear(8, 8), nn.Linear(8, 8)
            self.tied.weight = self.one.weight
            self.odd = nn.Linear(7, 5)
            self.twice = self.again = nn.Linear(8, 8)
            self.lm_head = nn.Linear(8, 8)
            self.replaced = nn.Linear(8, 8)
            self.replaced.forward = lambda x: x  # type: ignore[method-assign]

    model = Model()
    rows = {row["layer"]: row for row in add_adapters(model, rank=2).rows}
    assert [name for name, row in rows.items() if row["action"] == "adapted"] == ["odd", "twice"]
    assert model.twice is model.again
    expected = {
        "embed": "embedding",
        "conv": "Conv1d: it is no nn.Linear, SparseLinear or Conv1D",
        "attention.in_proj_weight": "MultiheadAttention: it is no nn.Linear, SparseLinear or Conv1D",
        "attention.out_proj": "nn.MultiheadAttention 'attention' reads its weight without calling it",
        "one": "its weight is shared with 'tied', which a merge would change too",
        "tied": "its weight is shared with 'one', which a merge would change too",
        "lm_head": "output head (name it in include= to adapt it)",
        "replaced": "its forward was replaced on the object",
    }
    assert {name: rows[name]["reason"] for name in expected} == expected
    assert rows["odd"]["reason"] == "not masked: it has no zeros to keep, and merges exactly"
    assert remove_adapters(model) == 2
    assert model.twice is model.again
    assert add_adapters(model, include="lm_head").rows[-2]["action"] == "adapted"


def test_compressed_weights_that_are_shared_are_left() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16))
    model[1].weight = model[0].weight
    twofour.prune(model)
    twofour.compress(model, force=True)
    report = add_adapters(model, rank=2)
    assert [row["action"] for row in report.rows] == ["left", "left", "adapted"]
    assert report.rows[0]["reason"] == "its weight is shared with '1', which a merge would change too"


def test_code_that_reads_the_weight_reads_the_companion_too() -> None:
    """The fast path of nn.TransformerEncoderLayer calls none of its layers."""
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    add_adapters(model, rank=2, masked=False)
    wake(model)
    x = torch.randn(3, 5, 16)
    with torch.no_grad():
        fast = model(x)
    torch.testing.assert_close(model(x), fast)
    assert model.linear1.bias is model.linear1.base.bias
    remove_adapters(model)
    assert not torch.allclose(model(x), fast)


def test_fused_activations_stand_alone_again() -> None:
    model = pruned()
    twofour.compress(model, force=True)
    x = torch.randn(5, 16)
    twofour.fuse(model)
    before = model(x)
    report = add_adapters(model, rank=2, masked=False)
    assert "activations that were fused stand alone again" in report.notes[0]
    torch.testing.assert_close(model(x), before)
    assert isinstance(model[1], nn.GELU)
    assert all(row["action"] == "left" for row in twofour.fuse(model).rows)
    fused = pruned()
    twofour.compress(fused, force=True)
    twofour.fuse(fused)
    with pytest.raises(UnsupportedError, match="it applies gelu itself: call twofour.unfuse"):
        AdaptedLinear(fused[0])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("compressed", [False, True])
def test_copies_pickles_conversions_and_state_dicts(masked: bool, compressed: bool) -> None:
    model = pruned()
    if compressed:
        twofour.compress(model, force=True)
    add_adapters(model, rank=2, masked=masked, alpha=3)
    wake(model)
    x = torch.randn(9, 16)
    expected = model(x)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert torch.equal(other(x), expected)
        assert [p.requires_grad for p in other.parameters()] == [p.requires_grad for p in model.parameters()]
        wake(other, 1)
        assert not torch.equal(other(x), expected)
    assert torch.equal(model(x), expected)
    fresh = pruned(1)
    if compressed:
        twofour.compress(fresh, force=True)
    add_adapters(fresh, rank=2, masked=masked, alpha=3)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), expected)
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(half(x.bfloat16()).float(), expected, rtol=0.05, atol=0.05)
    loss = half(x.bfloat16()).float().square().sum()
    loss.backward()
    assert all(p.grad is not None for p in adapter_parameters(half))
    if not compressed:
        torch.testing.assert_close(copy.deepcopy(model).double()(x.double()).float(), expected)


def test_adapters_stay_float32_beside_bfloat16() -> None:
    model = pruned().to(torch.bfloat16)
    add_adapters(model, rank=2)
    assert {p.dtype for p in adapter_parameters(model)} == {torch.float32}
    assert model(torch.randn(2, 16).bfloat16()).dtype == torch.bfloat16
    other = pruned().to(torch.bfloat16)
    add_adapters(other, rank=2, dtype=torch.bfloat16)
    assert {p.dtype for p in adapter_parameters(other)} == {torch.bfloat16}
    mixed = pruned()
    twofour.compress(mixed, force=True, weights="bfloat16")  # float32 inputs, bfloat16 values
    before = mixed(torch.ones(2, 16))
    add_adapters(mixed, rank=2)
    after = mixed(torch.ones(2, 16))
    assert after.dtype == torch.float32
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("compressed", [False, True])
def test_autocast(masked: bool, compressed: bool) -> None:
    model = pruned()
    if compressed:
        twofour.compress(model, force=True)
    plain = copy.deepcopy(model)
    add_adapters(model, rank=2, masked=masked)
    x = torch.randn(9, 16)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert model(x).dtype == plain(x).dtype == torch.bfloat16
        torch.testing.assert_close(model(x), plain(x), rtol=0.05, atol=0.05)
        nn.functional.cross_entropy(model(x).float(), torch.zeros(9, dtype=torch.long)).backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in adapter_parameters(model))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool, masked: bool) -> None:
    grads = []
    for checkpointed in (False, True):
        model = pruned()
        add_adapters(model, rank=2, masked=masked)
        wake(model)
        x = torch.linspace(-1, 1, 80).view(5, 16).requires_grad_()
        y = checkpoint(model, x, use_reentrant=reentrant) if checkpointed else model(x)
        y.square().sum().backward()
        grads.append([x.grad, *(p.grad for p in adapter_parameters(model))])
    near = (
        0.0 if DEVICE.type == "cpu" else 1e-5
    )  # elsewhere gradients have threads of their own, which sum in another order
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=near, atol=near)


@pytest.mark.parametrize("masked", [False, True])
def test_compiled_models_give_equal_results_and_gradients(masked: bool) -> None:
    model = pruned()
    twofour.compress(model, force=True, include="0")
    add_adapters(model, rank=2, masked=masked)
    wake(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(9, 16)
    y = compiled(x)
    torch.testing.assert_close(y, model(x))
    y.square().sum().backward()
    found = [p.grad.clone() for p in adapter_parameters(model) if p.grad is not None]
    model.zero_grad()
    model(x).square().sum().backward()
    assert len(found) == 6
    for grad, parameter in zip(found, adapter_parameters(model), strict=True):
        torch.testing.assert_close(grad, parameter.grad)


def test_dropout_is_for_training_alone() -> None:
    model = pruned().eval()
    report = add_adapters(model, rank=2, dropout=0.5)
    assert report.summary["masked"] == 0
    assert not any(module.training for module in model.modules())
    wake(model)
    x = torch.randn(9, 16)
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))
    assert "dropout=0.5" in repr(model[0])


def test_hooks_see_what_the_adapted_layer_gives() -> None:
    model = pruned()
    seen: list[Tensor] = []
    handle = model[0].register_forward_hook(lambda module, args, output: seen.append(output))
    add_adapters(model, rank=2, masked=False)
    wake(model)
    x = torch.randn(2, 16)
    for _ in range(2):
        model(x)
    assert len(seen) == 2  # not once more for the base
    assert torch.equal(seen[0], model[0](x))
    assert not torch.equal(seen[0], model[0].base(x))
    seen.clear()
    model[0].base.register_forward_hook(lambda module, args, output: seen.append(output))
    remove_adapters(model)
    model(x)
    assert len(seen) == 2
    handle.remove()
    model(x)
    assert len(seen) == 3


def test_numbers_that_are_none_stay_in_their_token() -> None:
    for masked in (False, True):
        model = nn.Sequential(pruned()[0])
        add_adapters(model, rank=2, masked=masked)
        wake(model)
        x = torch.randn(3, 16)
        clean = model(x)
        x[1, 3] = float("nan")
        y = model(x)
        assert torch.equal(y[[0, 2]], clean[[0, 2]])
        assert not bool(torch.isfinite(y[1]).any())


def test_the_adapters_alone_are_saved_and_loaded() -> None:
    model = pruned()
    add_adapters(model, rank=2, alpha=5)
    wake(model)
    state = load(save(adapter_state_dict(model)))
    assert sorted(state)[:3] == ["0.lora_a", "0.lora_b", "0.lora_scale"]
    fresh = pruned()
    add_adapters(fresh, rank=2, alpha=5)
    parameters = adapter_parameters(fresh)
    load_adapter_state_dict(fresh, state)
    assert all(one is other for one, other in zip(parameters, adapter_parameters(fresh), strict=True))
    x = torch.randn(4, 16)
    assert torch.equal(fresh(x), model(x))
    alone = AdaptedLinear(nn.Linear(8, 8), rank=2)
    assert set(adapter_state_dict(alone)) == {"lora_a", "lora_b", "lora_scale"}
    load_adapter_state_dict(alone, adapter_state_dict(alone))


def test_adapters_of_others_are_refused_before_anything_is_loaded() -> None:
    model = pruned()
    add_adapters(model, rank=2, alpha=4)
    state = adapter_state_dict(wake(copy.deepcopy(model)))
    before = copy.deepcopy(model.state_dict())

    def refused(match: str, given: dict[str, Tensor], into: nn.Module = model) -> None:
        with pytest.raises(ModelError, match=match):
            load_adapter_state_dict(into, given)

    refused("the model has no adapters", state, pruned())
    fewer = pruned()
    add_adapters(fewer, rank=2, alpha=4, exclude="0")
    refused(r"adapters of other layers: '0.lora_a' is in the state only", state, fewer)
    refused(r"adapters of other layers: '0.lora_a' is in the model only", adapter_state_dict(fewer))
    other = pruned()
    add_adapters(other, rank=4, alpha=8)
    wanted = r"'0.lora_a' is of rank 2, the model's adapter of rank 4: add_adapters\(model, rank=2\)"
    refused(wanted, state, other)
    refused(r"'5.lora_b' is \[4, 2\], the model's \[3, 2\]", {**state, "5.lora_b": torch.zeros(4, 2)})
    louder = pruned()
    add_adapters(louder, rank=2)
    refused(r"'0' was trained with scale 2 and has 1 here: add_adapters with alpha=4", state, louder)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(ModelError, match="the model has no adapters"):
        adapter_state_dict(pruned())
    with pytest.raises(ModelError, match="the model has no adapters"):
        remove_adapters(pruned())


def test_what_cannot_be_added_is_told_and_nothing_has_changed() -> None:
    model = pruned()
    before = [(name, type(module)) for name, module in model.named_modules()]

    def refused(kind: type[Exception], match: str, **arguments: Any) -> None:
        with pytest.raises(kind, match=match):
            add_adapters(model, **arguments)

    for rank in (0, True, 2.0):
        refused(ModelError, r"rank=.*: a whole number of 1 or more", rank=rank)
    for alpha in (0, -1.0, float("inf"), float("nan")):
        refused(ModelError, r"alpha=.*: a positive number", alpha=alpha)
    for dropout in (-0.1, 1.0):
        refused(ModelError, r"dropout=.*: a share of the inputs", dropout=dropout)
    refused(ModelError, "masked=True adds the update to the weight", masked=True, dropout=0.1)
    refused(ModelError, "dense= begins with what pruning took", masked=True, dense=pruned())
    refused(ModelError, "calibration= says what dense= is to be near to", calibration=torch.randn(4, 16))
    refused(ModelError, "moments='half': 'full' or 'diagonal'", moments="half")
    refused(ModelError, "dtype=torch.int8: adapters are trained", dtype=torch.int8)
    refused(ModelError, r"include='7' matches no layer", include="7")
    refused(ModelError, r"dense= has no '0.weight'", dense={})
    refused(
        ModelError, r"'0.weight' of dense= is \[3, 16\], the layer \[24, 16\]", dense={"0.weight": torch.ones(3, 16)}
    )
    spoilt = {**pruned().state_dict(), "2.weight": torch.full((16, 24), float("nan"))}
    refused(ModelError, "'2.weight' of dense= has weights that are NaN or infinite", dense=spoilt)
    refused(CalibrationError, "calibration is empty", dense=pruned(), calibration=[])
    nan = torch.full((4, 16), float("nan"))
    refused(CalibrationError, "the inputs of '0': 4 of 4 tokens hold NaN", dense=pruned(), calibration=nan)
    refused(
        CalibrationError,
        "the inputs of '0': every input of the layer was zero",
        dense=pruned(),
        calibration=torch.zeros(4, 16),
    )
    masks = keep_masks(model)
    refused(ModelError, r"masks of this model are kept, .*add the adapters, and keep_masks again")
    masks.remove()
    with pytest.raises(ModelError, match=r"no layer to adapt: the model is this layer itself.*AdaptedLinear\(layer\)"):
        add_adapters(nn.Linear(8, 8))
    with pytest.raises(ModelError, match="no layer to adapt: the model has no layer with a weight matrix"):
        add_adapters(nn.ReLU())
    with pytest.raises(UnsupportedError, match="a Conv2d cannot be adapted: it is no nn.Linear"):
        AdaptedLinear(nn.Conv2d(4, 4, 1))
    assert [(name, type(module)) for name, module in model.named_modules()] == before
    assert all(p.requires_grad for p in model.parameters())


def test_trained_values_of_a_compressed_layer_need_an_unmasked_companion() -> None:
    model = pruned()
    twofour.compress(model, force=True)
    model[0].requires_grad_values()
    masked = copy.deepcopy(model)
    add_adapters(masked, rank=2, train="0.values")
    with pytest.raises(UnsupportedError, match="a masked companion reads the compressed values as constants"):
        masked(torch.randn(2, 16))
    add_adapters(model, rank=2, masked=False, train="0.values")
    loss_of(model, 0).backward()
    assert model[0].base.values.grad is not None


# --- from what pruning took


def test_companions_begin_with_the_best_that_their_rank_can_do() -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 3)).double()
    for compressed in (False, True):
        model = copy.deepcopy(dense).to(torch.float32 if compressed else torch.float64)
        twofour.prune(model)
        lost = dense[0].weight.detach() - model[0].weight.detach().double()
        if compressed:
            twofour.compress(model, force=True)
        report = add_adapters(model, 4, dense=dense, alpha=2)
        squares = torch.linalg.svdvals(lost).square()
        assert report.rows[0]["error"] == pytest.approx(float(squares[4:].sum() / squares.sum()), rel=1e-4)
        left = lost - model[0].update().detach().double()
        assert float(left.square().sum()) == pytest.approx(float(squares[4:].sum()), rel=1e-4)
        assert report.summary["masked"] == 0
        x = torch.randn(9, 16, dtype=model[0].lora_a.dtype)
        remove_adapters(model)
        add_adapters(model, 64, dense=dense.state_dict())  # more than there is
        torch.testing.assert_close(model(x).double(), dense(x.double()), rtol=1e-4, atol=1e-5)


def test_int8_layers_begin_with_what_rounding_took_too() -> None:
    dense = nn.Sequential(nn.Linear(16, 24))
    model = copy.deepcopy(dense)
    twofour.prune(model)
    twofour.compress(model, force=True, weights="int8")
    add_adapters(model, 16, dense=dense)
    x = torch.randn(9, 16)
    torch.testing.assert_close(model(x), dense(x), rtol=0.05, atol=0.02)


def test_with_calibration_outputs_come_nearest() -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(32, 48))
    model = copy.deepcopy(dense)
    twofour.prune(model)
    mixing = torch.randn(32, 32) * torch.logspace(0, -2, 32)[:, None]
    x = torch.randn(400, 32) @ mixing

    def error(adapted: nn.Module) -> float:
        with torch.no_grad():
            return float((adapted(x) - dense(x)).square().sum() / (dense(x) - dense[0].bias).square().sum())

    plain = copy.deepcopy(model)
    add_adapters(plain, 4, dense=dense)
    best = copy.deepcopy(model)
    (row,) = (row for row in add_adapters(best, 4, dense=dense, calibration=[x[:100], x[100:]]).rows)
    assert row["error_pruned"] == pytest.approx(error(model), rel=1e-3)
    assert row["error"] == pytest.approx(error(best), rel=1e-3)
    weighted = copy.deepcopy(model)
    add_adapters(weighted, 4, dense=dense, calibration=x, moments="diagonal")
    # SLiM's: a diagonal of mean magnitudes in place of the root of the second moments
    scale = x.abs().mean(0)
    scale = scale + scale.min()
    u, s, vt = torch.linalg.svd((dense[0].weight - model[0].weight).detach() * scale, full_matrices=False)
    slim = copy.deepcopy(plain)
    slim[0].lora_a.data.copy_(s[:4, None] * vt[:4] / scale)
    slim[0].lora_b.data.copy_(u[:, :4])
    assert error(best) < 0.9 * error(slim) < 0.9 * error(plain) < 0.9 * error(model)
    assert error(weighted) == pytest.approx(error(slim), rel=0.05)
    # No change of A and B makes the damped error smaller: its gradient is zero.
    hessian = Hessian(32, DEVICE)
    hessian.add(x)
    moments = statistics(hessian).matrix
    left = (dense[0].weight - model[0].weight).detach().double() - best[0].update().detach().double()
    for gradient in (
        left @ moments @ best[0].lora_a.detach().double().T,
        best[0].lora_b.detach().double().T @ left @ moments,
    ):
        assert float(gradient.abs().max()) < 1e-4 * float((left @ moments).abs().max())


# --- among the other verbs


@pytest.mark.parametrize("weights", [None, "bfloat16", "int8"])
def test_what_is_compressed_saved_and_loaded_beside_companions(weights: Any, tmp_path: Path, native: None) -> None:
    model = pruned()
    add_adapters(model, rank=2, masked=False)
    wake(model)
    x = torch.randn(9, 16)
    expected = model(x)
    report = twofour.compress(model, force=True, weights=weights)
    assert [row["layer"] for row in report.rows if row["action"] == "compressed"] == ["0.base", "2.base", "5.base"]
    assert all(isinstance(module.base, SparseLinear) for module in model if isinstance(module, AdaptedLinear))
    torch.testing.assert_close(model(x), expected, rtol=0.05, atol=1e-5 if weights is None else 0.05)
    assert twofour.check(model).summary["layers checked"] == 3
    twofour.save(model, tmp_path / "model.safetensors")
    fresh = pruned(1)
    add_adapters(fresh, rank=2, masked=False)
    twofour.load(fresh, tmp_path / "model.safetensors")
    assert torch.equal(fresh(x), model(x))
    with pytest.raises(ModelError, match="not in the model: '0.base.bias', "):
        twofour.load(pruned(), tmp_path / "model.safetensors")
    other = pruned()
    add_adapters(other, rank=4)
    with pytest.raises(ModelError, match=r"'0.lora_a' is \[2, 16\] in .* and \[4, 16\] in the model"):
        twofour.load(other, tmp_path / "model.safetensors")


def test_companions_live_through_pruning_explaining_measuring_and_permuting() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16))
    add_adapters(model, rank=2, masked=False)
    wake(model)
    x = torch.randn(200, 16)
    expected = model(x)
    twofour.permute(model, x[:4])
    torch.testing.assert_close(model(x), expected)
    twofour.prune(model, calibration=x)
    assert twofour.check(model).summary["holds"]
    assert [row["layer"] for row in twofour.explain(model).rows if "base" in row["layer"]] == ["0.base", "2.base"]
    merged = merge_adapters(model, calibration=x)
    assert twofour.check(model).summary["holds"]
    assert {row["action"] for row in merged.rows} == {"refitted"}


def test_a_masked_companion_of_a_weight_made_int8_says_so() -> None:
    model = pruned()
    add_adapters(model, rank=2)
    twofour.compress(model, force=True, weights="int8")
    with pytest.raises(UnsupportedError, match=r"the weight is int8, .*merge before compress\(weights='int8'\)"):
        model(torch.randn(2, 16))


def test_companions_in_the_last_share_of_a_sparse_training() -> None:
    """SLoPe: masks kept, weights and companions trained together, one optimizer all along."""
    model = pruned()
    zeros = [module.weight == 0 for module in model if isinstance(module, nn.Linear)]
    optimizer = torch.optim.AdamW(model.parameters(), 0.02)
    masks = keep_masks(model, optimizer)
    train(model, optimizer)
    masks.remove()
    add_adapters(model, rank=2, masked=False, train="*")
    optimizer.add_param_group({"params": adapter_parameters(model)})
    before = [p.detach().clone() for p in model.parameters()]
    keep_masks(model, optimizer)
    losses = train(model, optimizer)
    assert losses[-1] < losses[0]
    assert all(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    bases = [module.base for module in model if isinstance(module, AdaptedLinear)]
    assert all(not bool(base.weight[gone].any()) for base, gone in zip(bases, zeros, strict=True))
    assert twofour.check(model).summary["holds"]


def test_transformers_models() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=64, n_positions=16)
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).eval()
    twofour.prune(model)
    ids = torch.randint(0, 64, (2, 16))
    before = model(input_ids=ids).logits
    report = add_adapters(model, rank=2)
    assert report.summary["layers adapted"].startswith("8 of ")
    assert report.summary["masked"] == 8
    assert torch.equal(model(input_ids=ids).logits, before)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.01)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = model.train()(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    trained = model.eval()(input_ids=ids).logits
    merge_adapters(model)
    torch.testing.assert_close(model(input_ids=ids).logits, trained)
    assert twofour.check(model).summary["holds"]
    report = add_adapters(model, rank=2, masked=False)
    wake(model)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    merged = merge_adapters(model, calibration=inputs)
    assert all(0 < row["error"] < row["error_masked"] for row in merged.rows)

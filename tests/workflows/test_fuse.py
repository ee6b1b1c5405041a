"""fuse: what is proven is fused and computes the same; everything else stays, with its reason."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import twofour
from twofour import QuantizedSparseLinear, SparseLinear
from twofour.errors import ModelError, UnsupportedError
from twofour.nn.fused import FusedActivation
from twofour.nn.swap import to_dense_modules


def compressed(model: nn.Module, weights: Any = None) -> nn.Module:
    twofour.prune(model)
    twofour.compress(model, force=True, weights=weights)
    return model.eval()


def only_row(model: nn.Module) -> Any:
    (row,) = twofour.fuse(model).rows
    return row


@pytest.mark.parametrize(
    ("activation", "name"),
    [(nn.ReLU(), "relu"), (nn.GELU(), "gelu"), (nn.GELU(approximate="tanh"), "gelu_tanh"), (nn.SiLU(), "silu")],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights", [None, "int8", "float8"])
def test_activations_are_fused_and_taken_out_again(
    activation: nn.Module, name: str, dtype: torch.dtype, weights: str | None
) -> None:
    dense = nn.Sequential(nn.Linear(32, 24), copy.deepcopy(activation), nn.Linear(24, 8)).to(dtype)
    model = compressed(dense, weights)
    assert isinstance(model[0], QuantizedSparseLinear) == (weights is not None)
    x = torch.randn(5, 32).to(dtype)
    with torch.no_grad():
        before, state = model(x), {key: value.clone() for key, value in model.state_dict().items()}
        report = twofour.fuse(model)
        assert report.summary == {"layers fused": "1 of 2"}
        assert [row["action"] for row in report.rows] == ["fused", "left"]
        assert report.rows[0]["activation"] == name
        assert report.rows[1]["reason"] == "its output is what Sequential returns"
        assert isinstance(model[0], SparseLinear)
        assert model[0].activation == name
        assert f"activation={name}" in repr(model[0])
        assert isinstance(model[1], FusedActivation)
        tolerance = 1e-6 if dtype == torch.float32 else 2e-2
        tolerance = tolerance if weights != "int8" else 2e-2  # the second layer rounds its inputs
        torch.testing.assert_close(model(x), before, atol=tolerance, rtol=tolerance)
        assert model.state_dict().keys() == state.keys()
        fused = model(x)
        saved = io.BytesIO()
        torch.save(model, saved)
        saved.seek(0)
        for other in (copy.deepcopy(model), torch.load(saved, weights_only=False)):
            assert torch.equal(other(x), fused)
            assert twofour.unfuse(other) == 1
            assert torch.equal(other(x), before)
        assert torch.equal(model(x), fused)  # copies have their own layers
        if dtype == torch.float32 and weights is None:
            assert torch.equal(copy.deepcopy(model).bfloat16().float()[0].matrix.mask(), model[0].matrix.mask())
        assert twofour.fuse(model).rows[0]["reason"] == f"it applies {name} already"
        assert twofour.unfuse(model) == 1
        assert torch.equal(model(x), before)


@pytest.mark.parametrize("weights", [None, "int8", "float8"])
def test_gradients_of_a_fused_model(weights: str | None) -> None:
    model = compressed(nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 8)), weights)
    fused = copy.deepcopy(model)
    twofour.fuse(fused)
    x = torch.randn(4, 16)
    for one, other in zip(model(x), fused(x), strict=True):
        torch.testing.assert_close(one, other)
    model(x).square().sum().backward()
    fused(x).square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, fused.get_parameter(name).grad)


class Branch(nn.Module):
    def __init__(self, body: Callable[..., Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self.up = nn.Linear(16, 16)
        self.act: nn.Module = nn.GELU()
        for name, module in modules.items():
            self.add_module(name, module)
        self.body = body

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        return self.body(self, x, scale)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (lambda m, x, s: m.act(m.up(x)) + m.up(x), "calls it 2 times"),
        (lambda m, x, s: (h := m.up(x)) * torch.sigmoid(h), "its output is used 2 times"),
        (lambda m, x, s: functional.gelu(m.up(x)), "followed by gelu, not by a module"),
        (lambda m, x, s: m.act(m.up(x)) + m.act(x), "called more than once"),
        (lambda m, x, s: m.act(m.up(x)) if m.training else m.up(x), "depends on the mode"),
        (lambda m, x, s: m.act(m.up(x)) if s is None else m.up(x) * s, "depends on the mode or on optional"),
        (lambda m, x, s: m.act(m.up(x)) if x.sum() > 0 else x, "Branch.forward cannot be traced"),
        (lambda m, x, s: m.up(x), "its output is what Branch returns"),
    ],
)
def test_what_is_not_proven_stays(body: Callable[..., Tensor], reason: str) -> None:
    model = compressed(Branch(body))
    x = torch.randn(3, 16)
    with torch.no_grad():
        before = model(x)
        row = only_row(model)
        assert row["action"] == "left"
        assert reason in row["reason"]
        assert torch.equal(model(x), before)


def test_modules_that_others_see_stay() -> None:
    def fresh() -> nn.Sequential:
        model = compressed(nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Dropout()))
        assert isinstance(model, nn.Sequential)
        return model

    model = fresh()
    model[1].register_forward_hook(lambda *_: None)
    assert only_row(model)["reason"] == "the GELU after it has hooks"
    model = fresh()
    model[0].register_forward_hook(lambda *_: None)
    assert only_row(model)["reason"] == "it has hooks, or a forward of its own"
    model = fresh()
    model[2] = model[1]
    assert "more than once" in only_row(model)["reason"]
    model = fresh()
    assert only_row(nn.ModuleDict({"one": model, "act": model[1]}))["reason"].endswith("used in several places")
    assert only_row(nn.ModuleDict({"one": model, "up": model[0]}))["reason"] == "it is used in several places"
    model[1] = nn.Sigmoid()
    assert only_row(model)["reason"] == "it is followed by Sigmoid, which no kernel applies"
    model = fresh()
    model.forward = lambda x: x  # type: ignore[method-assign]
    assert only_row(model)["reason"] == "the forward of Sequential was replaced on the object"
    assert only_row(nn.ModuleList([fresh()[0]]))["reason"] == "ModuleList does not call it"
    assert only_row(fresh()[0])["reason"] == "the model is this layer itself"
    with pytest.raises(ModelError, match="the model has no SparseLinear"):
        twofour.fuse(nn.Linear(4, 4))


class Listed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(16, 16), nn.ReLU()])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_layers_in_lists_are_seen() -> None:
    assert only_row(compressed(Listed()))["action"] == "fused"


@pytest.mark.parametrize("weights", [None, "int8", "float8"])
def test_other_verbs_take_fused_activations_out(tmp_path: Path, weights: Any) -> None:
    def fresh() -> nn.Sequential:
        model = compressed(nn.Sequential(nn.Linear(16, 16), nn.GELU()), weights)
        assert isinstance(model, nn.Sequential)
        return model

    x = torch.randn(4, 16)
    model = fresh()
    with torch.no_grad():
        before = model(x)
        twofour.fuse(model)
        twofour.save(model, tmp_path / "fused.safetensors")
        with pytest.raises(UnsupportedError, match=r"applies 'gelu' itself: take that out first, with twofour.unfuse"):
            model[0].to_linear()
        other = fresh()
        twofour.fuse(other)
        twofour.load(other, tmp_path / "fused.safetensors")
        assert isinstance(other[1], nn.GELU)
        assert torch.equal(other(x), before)
        report = twofour.compress(model, force=True, dry_run=True)
        assert model[0].activation == "gelu"
        report = twofour.compress(model, force=True)
        assert "activations that were fused stand alone again: call twofour.fuse(model) after this" in report.notes
        assert torch.equal(model(x), before)
        twofour.fuse(model)
        assert to_dense_modules(model) == 1
        near = 2e-2 if weights == "int8" else 1e-5  # inputs are not rounded any more
        torch.testing.assert_close(model(x), before, atol=near, rtol=near)


def test_transformers_models() -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers (twofour[transformers])")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    ids = {"input_ids": torch.randint(0, 50, (2, 7))}
    for config, kind, inputs, name in (
        (transformers.BertConfig(vocab_size=50, **sizes), transformers.BertModel, ids, "gelu"),
        (
            transformers.BertConfig(vocab_size=50, hidden_act="gelu_new", **sizes),
            transformers.BertModel,
            ids,
            "gelu_tanh",
        ),
        (
            transformers.ViTConfig(image_size=16, patch_size=4, **sizes),
            transformers.ViTModel,
            {"pixel_values": torch.randn(2, 3, 16, 16)},
            "gelu",
        ),
    ):
        model = compressed(kind(config))
        with torch.no_grad():
            before = model(**inputs).last_hidden_state
            report = twofour.fuse(model)
            fused = report.where(action="fused")
            assert [row["activation"] for row in fused] == [name] * 2, report
            torch.testing.assert_close(model(**inputs).last_hidden_state, before, atol=1e-5, rtol=1e-5)
            assert twofour.unfuse(model) == 2
            assert torch.equal(model(**inputs).last_hidden_state, before)

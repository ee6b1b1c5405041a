"""QuantizedSparseLinear: int8 and float8 weights with a scale per row, as a module among torch's modules."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.on_device import DEVICE
from torch import Tensor, nn
from torch.autograd import forward_ad

import twofour
from twofour.errors import FormatError, ModelError, UnsupportedError
from twofour.format import SparseMatrix
from twofour.kernels import cpu, reference
from twofour.nn import WEIGHTS, QuantizedSparseLinear, quantize_rows
from twofour.nn.swap import to_dense_modules
from twofour.testing import assert_same_bits, assert_within_bound, random_mask

needs_native = pytest.mark.skipif(cpu.available() is not None, reason="no native kernels in this build")


def pruned_linear(out_features: int = 20, in_features: int = 24, *, bias: bool = True, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    linear = nn.Linear(in_features, out_features, bias=bias)
    with torch.no_grad():
        linear.weight.copy_(SparseMatrix.from_dense(linear.weight, "2:4", prune=True).to_dense())
    return linear


def specified(layer: QuantizedSparseLinear, x: Tensor) -> Tensor:
    matrix = layer.matrix
    run = reference.linear_int8 if matrix.dtype == torch.int8 else reference.linear_float8
    return run(x, matrix.values, matrix.metadata, layer.scales, layer.bias, matrix.pattern, matrix.in_features)


@pytest.mark.parametrize("weights", ["int8", "float8"])
def test_tangents_and_what_is_no_tensor_are_refused(weights: str) -> None:
    """Operations of a Library would drop tangents without a word."""
    matrix = SparseMatrix.from_dense(torch.randn(16, 32), prune=True)
    layer = QuantizedSparseLinear.from_matrix(matrix, torch.randn(16), weights=weights).requires_grad_(False)
    x = torch.randn(3, 32)
    with pytest.raises(UnsupportedError, match=f"{weights} weights have no forward-mode derivative"):
        torch.func.jvp(layer, (x,), (x,))
    with forward_ad.dual_level():
        assert torch.equal(layer(x), layer(x.clone()))
        with pytest.raises(UnsupportedError, match="no forward-mode derivative"):
            layer(forward_ad.make_dual(x, x))
    with pytest.raises(TypeError, match="x, bias and residual are tensors, not ndarray"):
        layer(x.cpu().numpy())


def test_rows_are_quantized_to_half_a_scale() -> None:
    linear = pruned_linear()
    layer = QuantizedSparseLinear.from_linear(linear)
    error = (layer.to_linear().weight - linear.weight).abs()
    assert (error <= layer.scales[:, None] * 0.5001).all()
    assert (layer.matrix.values.abs().amax(1) == 127).all()
    assert error.max() > 0


def test_rows_are_rounded_to_float8() -> None:
    linear = pruned_linear()
    layer = QuantizedSparseLinear.from_linear(linear, weights="float8")
    error = (layer.to_linear().weight - linear.weight).abs()
    assert (error <= torch.maximum(linear.weight.abs() / 16, layer.scales[:, None] * 2.0**-10) * 1.0001).all()
    assert (layer.matrix.values.float().abs().amax(1) == 448).all()
    assert layer.matrix.dtype == torch.float8_e4m3fn
    assert error.max() > 0
    with pytest.raises(UnsupportedError, match="weights='int4': they can be rounded to int8 or float8"):
        QuantizedSparseLinear.from_linear(linear, weights="int4")


def test_float8_takes_inputs_as_they_are() -> None:
    layer = QuantizedSparseLinear.from_linear(pruned_linear(), weights="float8")
    x = torch.randn(7, 24, dtype=torch.float64)
    weight = layer.matrix.to_dense().double() * layer.scales.double()[:, None]
    assert layer.bias is not None
    torch.testing.assert_close(layer(x), x @ weight.T + layer.bias.double(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_forward_is_the_reference(weights: str) -> None:
    layer = QuantizedSparseLinear.from_linear(pruned_linear(), weights=weights)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.randn(2, 5, 24).to(dtype)
        y = layer(x)
        assert y.dtype == dtype
        if weights == "int8":
            assert torch.equal(y, specified(layer, x))
        else:
            assert_within_bound(y, x, layer.to_linear().weight, layer.bias, absolute=1e-6)
    dense = layer.to_linear()
    x = torch.randn(50, 24)
    assert (layer(x) - dense(x)).norm() < (0.02 if weights == "int8" else 1e-6) * dense(x).norm()


@pytest.mark.of_cpu
@needs_native
@pytest.mark.parametrize("weights", WEIGHTS)
def test_backends_agree_and_say_which_runs(weights: str) -> None:
    native, plain = (
        QuantizedSparseLinear.from_linear(pruned_linear(), backend=b, weights=weights) for b in (None, "reference")
    )
    assert native.choice.kernel.label().startswith("cpu ")
    assert native.choice.kernel.label().endswith(weights)
    assert "asked for" in plain.choice.reason
    x = torch.randn(30, 24)
    torch.testing.assert_close(native(x), plain(x), rtol=0, atol=0.0 if weights == "int8" else 1e-6)
    assert "kernel=cpu" in repr(native)
    assert f"weights={weights}" in repr(native)
    table = twofour.explain(nn.Sequential(native), kernels=True).rows
    assert [row["kernel"] for row in table if row["chosen"]] == [native.choice.kernel.label()]


@pytest.mark.of_cpu
def test_other_patterns_run_on_the_reference() -> None:
    linear = nn.Linear(16, 8)
    matrix = SparseMatrix.from_dense(linear.weight, "4:8", prune=True)
    layer = QuantizedSparseLinear.from_matrix(matrix, linear.bias)
    assert layer.backend == "reference"
    assert "4:8" in layer.choice.reason
    assert torch.equal(layer(torch.ones(2, 16)), specified(layer, torch.ones(2, 16)))


@pytest.mark.parametrize("weights", WEIGHTS)
def test_conversions_keep_the_weight(weights: str) -> None:
    layer = QuantizedSparseLinear.from_linear(pruned_linear(), weights=weights)
    before, scales = layer.matrix, layer.scales.clone()
    layer.to(torch.bfloat16)
    assert layer.weight.dtype == torch.bfloat16
    assert layer.bias is not None
    assert layer.bias.dtype == torch.bfloat16
    assert layer.scales.dtype == torch.float32
    assert torch.equal(layer.scales, scales)
    assert_same_bits(layer.matrix.values, before.values)
    assert layer.to_linear().weight.dtype == torch.bfloat16
    with pytest.raises(UnsupportedError, match="cannot become"):
        layer.to(torch.float8_e4m3fn)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_copies_and_pickles(weights: str) -> None:
    layer = QuantizedSparseLinear.from_linear(pruned_linear(), weights=weights)
    x = torch.randn(3, 24)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(buffer, weights_only=False)):
        assert torch.equal(other(x), layer(x))
        assert other.scales.data_ptr() != layer.scales.data_ptr()


@pytest.mark.parametrize("weights", WEIGHTS)
def test_state_dict_is_canonical_and_comes_back(weights: str) -> None:
    layer = QuantizedSparseLinear.from_linear(pruned_linear(), weights=weights)
    state = layer.state_dict()
    assert sorted(state) == ["bias", "weight.metadata", "weight.scales", "weight.values"]
    assert state["weight.values"].shape == (20, 12)
    other = QuantizedSparseLinear.from_linear(pruned_linear(seed=1), weights=weights)
    x = torch.randn(3, 24)
    assert not torch.equal(other(x), layer(x))
    other.load_state_dict(state)
    assert torch.equal(other(x), layer(x))
    dense = pruned_linear(seed=2)
    other.load_state_dict(dense.state_dict())  # quantized on the way
    assert torch.equal(other(x), QuantizedSparseLinear.from_linear(dense, weights=weights)(x))
    with pytest.raises(RuntimeError, match="scales are"):
        other.load_state_dict({**state, "weight.scales": torch.ones(3)})
    with pytest.raises(RuntimeError, match=r"weight\.values"):
        other.load_state_dict({"bias": state["bias"]})


@pytest.mark.parametrize("weights", WEIGHTS)
def test_gradients_and_autocast(weights: str) -> None:
    layer = QuantizedSparseLinear.from_linear(pruned_linear(), weights=weights)
    x = torch.randn(3, 24, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.to_linear().weight.sum(0).expand(3, -1))
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


@pytest.mark.parametrize("weights", WEIGHTS)
def test_compiled_and_exported(weights: str) -> None:
    model = nn.Sequential(QuantizedSparseLinear.from_linear(pruned_linear(), weights=weights), nn.ReLU())
    x = torch.randn(3, 24)
    program = torch.export.export(model, (x,))
    assert torch.equal(program.module()(x), model(x))


def test_a_layer_takes_the_state_of_the_other_kind() -> None:
    int8, float8 = (QuantizedSparseLinear.from_linear(pruned_linear(seed=i), weights=w) for i, w in enumerate(WEIGHTS))
    x, state = torch.randn(3, 24), copy.deepcopy(int8.state_dict())
    wanted, other = int8(x), float8(x)
    int8.load_state_dict(float8.state_dict())
    float8.load_state_dict(state)
    assert (int8.kind.name, float8.kind.name) == ("float8", "int8")
    assert torch.equal(int8(x), other)
    assert torch.equal(float8(x), wanted)


def test_what_was_rounded_is_not_rounded_again() -> None:
    model = small_model()
    twofour.compress(model, force=True, weights="int8")
    before = copy.deepcopy(model.state_dict())
    report = twofour.compress(model, force=True, weights="float8")
    assert all("stays int8" in row["reason"] for row in report.rows)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("weights", WEIGHTS)
def test_rows_that_share_masks_in_any_order(weights: str) -> None:
    torch.manual_seed(0)
    mask = random_mask((16, 24), "2:4").repeat_interleave(4, 0)[torch.randperm(64)]
    matrix = SparseMatrix.from_dense(torch.randn(64, 24), "2:4x4", mask=mask)
    layer = QuantizedSparseLinear.from_matrix(matrix, torch.randn(64), weights=weights)
    x = torch.randn(40, 24)
    torch.testing.assert_close(layer(x), specified(layer, x), rtol=1e-5, atol=1e-5)
    layer.activation = "relu"
    twin = layer.twin(layer.bias)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), twin):
        assert_same_bits(other.matrix.values, layer.matrix.values)
        assert torch.equal(other(x), layer(x))


def test_what_cannot_be_is_refused() -> None:
    matrix = SparseMatrix.from_dense(pruned_linear().weight)
    with pytest.raises(UnsupportedError, match=r"takes an int8 or float8_e4m3fn SparseMatrix, not torch\.float32"):
        QuantizedSparseLinear(matrix, torch.ones(20))
    quantized, scales = quantize_rows(matrix)
    with pytest.raises(FormatError, match=r"must be float32 \[20\]"):
        QuantizedSparseLinear(quantized, scales[:3])
    with pytest.raises(UnsupportedError, match="unknown backend 'gpu'"):
        QuantizedSparseLinear(quantized, scales, backend="gpu")
    values = matrix.values.clone()
    values[3, 0] = float("nan")
    with pytest.raises(UnsupportedError, match="the first in row 3"):
        quantize_rows(SparseMatrix(values, matrix.metadata, matrix.pattern, matrix.shape))


def small_model() -> nn.Sequential:
    return nn.Sequential(pruned_linear(32, 24), nn.GELU(), pruned_linear(16, 32), nn.LayerNorm(16))


@pytest.mark.parametrize(("weights", "error", "rounding"), [("int8", 0.03, 0.01), ("float8", 0.06, 0.03)])
def test_compress_quantizes_and_reports(weights: Any, error: float, rounding: float) -> None:
    model = small_model()
    x = torch.randn(5, 24)
    expected = model(x)
    with pytest.raises(ModelError, match=r"weights='int4': it is 'int8', 'float8' or 'bfloat16'. Leave it out"):
        twofour.compress(model, weights="int4")  # type: ignore[arg-type]
    report = twofour.compress(model, force=True, weights=weights)
    assert [type(m) for m in model] == [QuantizedSparseLinear, nn.GELU, QuantizedSparseLinear, nn.LayerNorm]
    assert (model(x) - expected).norm() < error * expected.norm()
    for row in report.rows:
        assert 0 < row["weight_error"] < rounding
        assert row["bytes"] < row["dense_bytes"] / 4
    assert all(
        weights in row["kernel"] for row in twofour.explain(model).rows if row["kind"] == "QuantizedSparseLinear"
    )
    timed = twofour.compress(small_model(), tokens=4, weights=weights)
    assert all(row["sparse_us"] > 0 for row in timed.rows)


def test_compressed_layers_can_be_quantized_and_written_out() -> None:
    model = small_model()
    twofour.compress(model, force=True)
    twofour.compress(model, force=True, weights="int8")
    assert isinstance(model[0], QuantizedSparseLinear)
    values = model[0].to_linear().weight
    assert to_dense_modules(model) == 2
    assert torch.equal(model[0].weight, values)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_files_hold_scales(weights: Any, tmp_path: Path) -> None:
    model = small_model()
    x = torch.randn(5, 24)
    twofour.compress(model, force=True, weights=weights)
    twofour.save(model, tmp_path / "model.safetensors")
    for other in (small_model(), copy.deepcopy(model)):
        with torch.no_grad():
            other[3].weight.zero_()
        report = twofour.load(other, tmp_path / "model.safetensors")
        assert isinstance(other[0], QuantizedSparseLinear)
        assert torch.equal(other(x), model(x))
        assert all(weights in row["kernel"] for row in report.rows)
    twofour.save(other, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()

"""SparseLinear behaves as a Linear that holds its weight compressed."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from tests.on_device import DEVICE
from torch import nn
from torch.nn import functional

import twofour
from twofour import SparseLinear, SparseMatrix, UnsupportedError
from twofour.kernels import cpu
from twofour.masks.rows import clustered_mask
from twofour.nn.swap import replace_module, to_dense_modules
from twofour.pattern import Pattern


def sparse_and_dense(
    out_features: int = 48, in_features: int = 64, dtype: torch.dtype = torch.float32, backend: str | None = None
) -> tuple[SparseLinear, nn.Linear]:
    dense = nn.Linear(in_features, out_features, dtype=dtype)
    twofour.prune(nn.Sequential(dense))
    return SparseLinear.from_linear(dense, backend=backend), dense


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64,), (1, 64), (5, 64), (2, 3, 64), (0, 64), (2, 0, 64)])
def test_output_is_that_of_the_dense_layer(backend: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    sparse, dense = sparse_and_dense(dtype=dtype, backend=backend)
    assert sparse.backend == backend
    with torch.no_grad():
        for parameter in (dense.weight, dense.bias):
            parameter.copy_(torch.randint(-4, 5, parameter.shape))
        twofour.prune(nn.Sequential(dense))
        sparse = SparseLinear.from_linear(dense, backend=backend)
        x = torch.randint(-4, 5, shape).to(dtype)
        expected = functional.linear(x.double(), dense.weight.double(), dense.bias.double()).to(dtype)
        assert torch.equal(sparse(x), expected)


@pytest.mark.of_cpu
def test_half_precision_runs_on_the_reference_and_says_why() -> None:
    sparse, dense = sparse_and_dense(dtype=torch.float16)
    assert sparse.backend == "reference"
    assert "float16 has no native kernel" in sparse.choice.reason
    x = torch.randn(3, 64, dtype=torch.float16)
    torch.testing.assert_close(sparse(x), dense(x))


def scattered(out_features: int, window: int) -> SparseMatrix:
    """2:4x4 of integers whose rows share a mask anywhere in aligned windows."""
    generator = torch.Generator().manual_seed(3)
    windows = torch.arange(out_features).split(window)
    order = torch.cat([rows[torch.randperm(len(rows), generator=generator)] for rows in windows])
    mask = clustered_mask(torch.rand(out_features, 64, generator=generator), Pattern.parse("2:4x4"), order)
    weight = torch.randint(1, 5, (out_features, 64), generator=generator).float()
    return SparseMatrix.from_dense(weight, "2:4x4", mask=mask)


def test_rows_that_share_a_mask_anywhere_in_a_window(native: None) -> None:
    """The layout moves them together, and nobody sees it: outputs, gradients, copies, pickles, state, dtypes."""
    matrix = scattered(132, 64)
    layer = SparseLinear(matrix, torch.randint(-4, 5, (132,)).float())
    assert cpu.packed_sharing(layer.metadata, 132, 64) == 4
    assert layer.choice.reason == ""
    assert torch.equal(layer.matrix.values, matrix.values)
    assert torch.equal(layer.matrix.metadata, matrix.metadata)
    x = torch.randint(-4, 5, (37, 64)).float()
    expected = functional.linear(x, matrix.to_dense(), layer.bias)
    fresh = SparseLinear(scattered(132, 64), torch.zeros(132))
    fresh.load_state_dict(layer.state_dict())
    pickled = io.BytesIO()
    torch.save(layer, pickled)
    pickled.seek(0)
    others = [copy.deepcopy(layer), copy.copy(layer), torch.load(pickled, weights_only=False), fresh]
    others += [copy.deepcopy(layer).bfloat16().float(), layer.twin(layer.bias)]
    for other in (layer, *others):
        assert cpu.packed_sharing(other.metadata, 132, 64) == 4
        assert torch.equal(other(x), expected)
    program = torch.export.export(layer.eval(), (x,))
    assert torch.equal(program.module()(x), expected)
    layer.requires_grad_values()
    grad = torch.randint(-4, 5, (37, 132)).float()
    given = x.clone().requires_grad_()
    layer(given).backward(grad)
    assert torch.equal(given.grad, grad @ matrix.to_dense())
    found, _ = cpu.unpack(layer.values.grad, layer.metadata, 132, 64)
    assert torch.equal(found, (grad.T @ x)[matrix.mask()].view(found.shape))


def test_rows_that_share_across_windows_say_why_they_are_slower(native: None) -> None:
    layer = SparseLinear(scattered(256, 256))
    assert layer.choice.kernel.backend == "cpu"
    message = (
        "cpu as 2:4x4: not all rows that share a mask lie inside windows of 64 rows: a load of an activation serves 1"
    )
    assert message in layer.choice.reason
    assert message in str(twofour.explain(nn.Sequential(layer)).rows[0]["reason"])
    x = torch.randint(-4, 5, (37, 64)).float()
    assert torch.equal(layer(x), functional.linear(x, layer.matrix.to_dense()))


def test_gradients_reach_input_and_bias(native: None) -> None:
    sparse, dense = sparse_and_dense()
    x = torch.randn(7, 64, requires_grad=True)
    sparse(x).square().sum().backward()
    grad_x, grad_bias = x.grad, dense.bias.grad
    x.grad = dense.bias.grad = None
    dense(x).square().sum().backward()
    torch.testing.assert_close(grad_x, x.grad)
    torch.testing.assert_close(grad_bias, dense.bias.grad)


@pytest.mark.parametrize("tokens", [(), (3,), (2, 3)])
def test_integer_gradients_are_exact(backend: str, tokens: tuple[int, ...]) -> None:
    weight = torch.randint(-4, 5, (12, 8)).float()
    matrix = SparseMatrix.from_dense(weight, prune=True)
    sparse = SparseLinear(matrix, torch.zeros(12), backend=backend)
    x = torch.randint(-4, 5, (*tokens, 8)).float().requires_grad_()
    grad = torch.randint(-4, 5, (*tokens, 12)).float()
    sparse(x).backward(grad)
    assert torch.equal(x.grad, grad @ matrix.to_dense())
    assert torch.equal(sparse.bias.grad, grad.reshape(-1, 12).sum(0))


def test_training_under_compile_gives_the_eager_gradients(native: None) -> None:
    sparse, _ = sparse_and_dense()
    model = nn.Sequential(sparse, nn.ReLU())
    compiled = torch.compile(model, fullgraph=True)
    x = torch.randn(4, 64, requires_grad=True)
    compiled(x).sum().backward()
    compiled_grads = x.grad, sparse.bias.grad
    x.grad = sparse.bias.grad = None
    model(x).sum().backward()
    torch.testing.assert_close(compiled_grads, (x.grad, sparse.bias.grad))


@pytest.mark.parametrize("grad", [True, False])
def test_export_runs_the_same_kernel(native: None, grad: bool) -> None:
    sparse, _ = sparse_and_dense()
    model = nn.Sequential(sparse, nn.ReLU())
    x = torch.randn(4, 64)
    with torch.set_grad_enabled(grad):
        program = torch.export.export(model, (x,), dynamic_shapes={"input": {0: torch.export.Dim("tokens")}})
    assert "linear_cpu" in str(program.graph)
    longer = torch.randn(9, 64)
    assert torch.equal(program.module()(longer), model(longer))


def test_dynamic_token_counts_compile_once(native: None) -> None:
    sparse, _ = sparse_and_dense()
    compiled = torch.compile(sparse, fullgraph=True, dynamic=True)
    for tokens in (2, 5, 33):
        x = torch.randn(tokens, 64)
        assert torch.equal(compiled(x), sparse(x))


def test_state_dict_holds_the_canonical_format(native: None) -> None:
    sparse, _ = sparse_and_dense()
    state = sparse.state_dict()
    assert sorted(state) == ["bias", "weight.metadata", "weight.values"]
    assert torch.equal(state["weight.values"], sparse.matrix.values)
    other, _ = sparse_and_dense()
    assert not torch.equal(other.matrix.to_dense(), sparse.matrix.to_dense())
    other.load_state_dict(state)
    assert torch.equal(other.matrix.to_dense(), sparse.matrix.to_dense())


def test_state_dict_of_a_dense_layer_is_taken_if_it_holds_the_pattern() -> None:
    sparse, dense = sparse_and_dense()
    other, _ = sparse_and_dense()
    other.load_state_dict(dense.state_dict())
    assert torch.equal(other.matrix.to_dense(), sparse.matrix.to_dense())
    with pytest.raises(RuntimeError, match=r"weight is not 2:4: row 0, columns 0:4 hold"):
        other.load_state_dict(nn.Linear(64, 48).state_dict())
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "weight.values", "weight.metadata"'):
        other.load_state_dict({"bias": torch.zeros(48)})


def test_damaged_state_is_refused_and_changes_nothing() -> None:
    sparse, _ = sparse_and_dense()
    before = sparse.matrix.to_dense()
    state = {name: tensor.clone() for name, tensor in sparse.state_dict().items()}
    state["weight.metadata"].zero_()
    with pytest.raises(RuntimeError, match="indices that repeat or descend: row 0, group 0"):
        sparse.load_state_dict(state)
    assert torch.equal(sparse.matrix.to_dense(), before)


def test_conversion_and_copies_keep_the_numbers(native: None) -> None:
    sparse, dense = sparse_and_dense()
    x = torch.randn(3, 64)
    assert torch.equal(copy.deepcopy(sparse)(x), sparse(x))
    buffer = io.BytesIO()
    torch.save(sparse, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), sparse(x))
    converted = copy.deepcopy(sparse).to(torch.bfloat16)
    assert converted.backend == "cpu"
    assert torch.equal(converted.matrix.to_dense(), dense.weight.to(torch.bfloat16))
    assert converted.half().backend == "reference"
    assert torch.equal(sparse.to("cpu")(x), sparse(x))
    assert sparse.to("meta").values.is_meta


def test_autocast_computes_in_the_weights_dtype(native: None) -> None:
    sparse, dense = sparse_and_dense()
    x = torch.randn(3, 64)
    with torch.autocast(DEVICE.type, torch.bfloat16), torch.no_grad():
        y = sparse(x.bfloat16())
        assert y.dtype == dense(x).dtype == torch.bfloat16
        torch.testing.assert_close(y, dense(x), atol=0.05, rtol=0.05)


@pytest.mark.of_cpu
def test_weight_tells_shape_and_dtype_but_is_no_tensor() -> None:
    sparse, _ = sparse_and_dense(dtype=torch.bfloat16)
    assert tuple(sparse.weight.shape) == (48, 64)
    assert sparse.weight.dtype == torch.bfloat16
    assert sparse.weight.device == torch.device("cpu")
    assert (sparse.weight.ndim, sparse.weight.dim(), sparse.weight.numel()) == (2, 2, 48 * 64)
    assert (sparse.weight.size(), sparse.weight.size(-1)) == ((48, 64), 64)
    with pytest.raises(UnsupportedError, match=r"torch.linear was given the weight of a SparseLinear.*\n.*exclude="):
        functional.linear(torch.randn(1, 64), sparse.weight)


def test_encoder_layer_of_torch_leaves_its_fast_path() -> None:
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True).eval()
    twofour.prune(layer, include=["linear1", "linear2"])
    x = torch.randn(2, 5, 64)
    with torch.no_grad():
        expected = layer(x)
        twofour.compress(layer, force=True)
        assert isinstance(layer.linear1, SparseLinear)
        torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)


def test_memory_is_held_once(native: None) -> None:
    sparse, dense = sparse_and_dense(64, 64, torch.bfloat16)
    assert sparse.nbytes == dense.weight.nbytes * 36 // 64
    held = [x for x in (*vars(sparse).values(), *sparse.buffers(), *sparse.parameters()) if isinstance(x, torch.Tensor)]
    assert {id(x) for x in held} == {id(sparse.values), id(sparse.metadata), id(sparse.bias)}


def test_bad_inputs_are_named(native: None) -> None:
    sparse, _ = sparse_and_dense()
    with pytest.raises(twofour.ShapeError, match=r"x is \[2, 60\]: its last axis must be in_features 64"):
        sparse(torch.randn(2, 60))
    with pytest.raises(
        UnsupportedError, match=r"x is torch.float64 and the weight torch.float32: .*\. Pass x\.to\(torch\.float32\)\.$"
    ):
        sparse(torch.randn(2, 64, dtype=torch.float64))  # no matrix.to(torch.float64): it cannot be stored
    with pytest.raises(
        UnsupportedError, match=r"Pass x\.to\(torch\.float32\), or .* with matrix\.to\(torch\.float16\)\.$"
    ):
        sparse(torch.randn(2, 64, dtype=torch.float16))
    with pytest.raises(UnsupportedError, match=r"x is torch.int64: kernels take floating point"):
        sparse(torch.zeros(2, 64, dtype=torch.int64))
    matrix = SparseMatrix.from_dense(torch.ones(4, 8, dtype=torch.int8), prune=True)
    with pytest.raises(
        UnsupportedError, match="SparseLinear runs float32, float16 and bfloat16 weights, not torch.int8"
    ):
        SparseLinear(matrix)
    with pytest.raises(UnsupportedError, match=r"cannot become torch.float8_e5m2"):
        sparse.to(torch.float8_e5m2)


def test_what_is_no_matrix_is_named() -> None:
    with pytest.raises(UnsupportedError, match=r"SparseLinear takes a SparseMatrix, not a int"):
        SparseLinear(64, 64)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match=r"matrix is a Tensor: make one with SparseMatrix.from_dense"):
        twofour.kernels.linear(torch.ones(2, 4), torch.ones(4, 4))  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match=r"weight is a list: pass a torch.Tensor"):
        SparseMatrix.from_dense([[1.0]])  # type: ignore[arg-type]


def test_swap_keeps_hooks_mode_and_every_name() -> None:
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)}).eval()
    calls: list[int] = []
    shared.register_forward_hook(lambda *_: calls.append(1))
    twofour.prune(model)
    new = SparseLinear.from_linear(shared)
    assert replace_module(model, shared, new) == 2
    assert model["a"] is model["b"][0] is new
    assert not new.training
    new(torch.randn(1, 8))
    assert calls == [1]
    assert to_dense_modules(model) == 1
    assert isinstance(model["a"], nn.Linear)
    assert model["a"] is model["b"][0]


def test_weights_of_16_bits_among_float32_inputs(trained_backend: str) -> None:
    """x, y, gradients and the bias stay float32; the products see the rounded weight, and nothing else is rounded."""
    torch.manual_seed(5)
    linear = nn.Linear(64, 48)
    twofour.prune(linear)
    matrix = SparseMatrix.from_dense(linear.weight).to(torch.bfloat16)
    layer = SparseLinear(matrix, linear.bias, backend=trained_backend).requires_grad_values()
    dense = matrix.to_dense().float().requires_grad_()
    for tokens in (1, 5, 70):
        x = torch.randn(tokens, 64)
        ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        y = layer(ours)
        assert y.dtype == torch.float32
        expected = nn.functional.linear(theirs, dense, linear.bias)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        weight = torch.randn_like(y)
        layer.zero_grad()
        (y * weight).sum().backward()
        dense.grad = None
        (expected * weight).sum().backward()
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-5)
        found = twofour.kernels.KERNELS[layer.backend].unpack((layer.values.grad, layer.metadata), layer.spec)
        wanted = torch.where(matrix.mask(), dense.grad, 0)
        torch.testing.assert_close(found.to_dense().float(), wanted.bfloat16().float(), rtol=1e-2, atol=1e-2)
    compiled = torch.compile(layer, fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x))


def test_the_dense_row_takes_one_dtype(require_onednn: Callable[[torch.dtype], None]) -> None:
    require_onednn(torch.bfloat16)
    layer = SparseLinear(SparseMatrix.from_dense(torch.eye(16, dtype=torch.bfloat16)), backend="onednn")
    with pytest.raises(UnsupportedError, match="both must have one dtype"):
        layer(torch.ones(2, 16))

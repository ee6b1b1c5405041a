"""`kernels.linear` and SparseLinear on a GPU, by every kernel of the table that applies there."""

from __future__ import annotations

import copy
import io
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.gpu.support import pruned
from torch import nn

import twofour
from twofour import QuantizedSparseLinear, SparseMatrix, UnsupportedError, kernels
from twofour.kernels import KERNELS, LinearSpec, choose, ops
from twofour.kernels.cuda import resources
from twofour.nn import SparseLinear
from twofour.testing import assert_same_bits, assert_within_bound

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
Case = tuple[torch.Tensor, SparseMatrix, torch.Tensor]


def case(dtype: torch.dtype, tokens: int, shape: tuple[int, int], device: torch.device, *, whole: bool = False) -> Case:
    """x, matrix and bias."""
    generator = torch.Generator().manual_seed(tokens)
    matrix = SparseMatrix.from_dense(pruned(shape, dtype, whole=whole).to(device))
    x = torch.randn(tokens, shape[1], generator=generator)
    bias = torch.randn(shape[0], generator=generator)
    x, bias = (each.mul(2).round().clamp(-4, 4) if whole else each for each in (x, bias))
    return x.to(device, dtype), matrix, bias.to(device, dtype)


@pytest.fixture(params=list(KERNELS))
def backend(request: pytest.FixtureRequest, device: torch.device) -> str:
    """Each kernel of the table."""
    return str(request.param)


@pytest.fixture
def applies(backend: str, device: torch.device) -> Callable[..., None]:
    """Skips, with the table's reason, where it does not apply."""

    def check(dtype: torch.dtype, shape: tuple[int, int] = (256, 512)) -> None:
        matrix = SparseMatrix.from_dense(torch.zeros(shape, dtype=dtype, device=device))
        reason = KERNELS[backend].why_not(LinearSpec.of(matrix))
        if reason is not None:
            pytest.skip(f"{backend}: {reason}")

    return check


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_smallest_products_are_exact(
    dtype: torch.dtype, backend: str, applies: Callable[..., None], device: torch.device
) -> None:
    applies(dtype)
    for tokens in (1, 8, 33, 64, 65, 300):
        x, matrix, bias = case(dtype, tokens, (256, 512), device, whole=True)
        wanted = (x.double() @ matrix.to_dense().double().T + bias.double()).to(dtype)
        assert_same_bits(kernels.linear(x, matrix, bias, backend=backend), wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(256, 512), (320, 1152), (200, 136), (33, 20)], ids=str)
def test_real_numbers_stay_within_the_bound(
    dtype: torch.dtype, shape: tuple[int, int], backend: str, applies: Callable[..., None], device: torch.device
) -> None:
    applies(dtype, shape)
    for tokens in (1, 16, 50, 128, 500):
        x, matrix, bias = case(dtype, tokens, shape, device)
        assert_within_bound(kernels.linear(x, matrix, bias, backend=backend), x, matrix, bias)


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
def test_activations_and_residuals(
    activation: str, backend: str, applies: Callable[..., None], device: torch.device
) -> None:
    applies(torch.bfloat16)
    x, matrix, bias = case(torch.bfloat16, 40, (256, 512), device)
    residual = torch.randn(40, 256).to(device, torch.bfloat16)
    y = kernels.linear(x, matrix, bias, activation=activation, residual=residual, backend=backend)
    before = x.double() @ matrix.to_dense().double().T + bias.double()
    wanted = getattr(torch.nn.functional, activation)(before) + residual.double()
    torch.testing.assert_close(y.double(), wanted, rtol=2**-6, atol=2**-5)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_every_layout_gives_the_matrix_back(
    dtype: torch.dtype, backend: str, applies: Callable[..., None], device: torch.device
) -> None:
    applies(dtype)
    _, matrix, _ = case(dtype, 1, (256, 512), device)
    kernel, spec = KERNELS[backend], LinearSpec.of(matrix)
    operands = kernel.pack(matrix)
    for held in (operands, kernel.copy(operands, spec)):
        back = kernel.unpack(held, spec)
        assert_same_bits(back.to_dense(), matrix.to_dense())
    dense = ops.to_dense(backend, operands, "2:4", 256, 512)
    assert_same_bits(dense, matrix.to_dense())


def test_gradients(backend: str, applies: Callable[..., None], device: torch.device) -> None:
    applies(torch.bfloat16)
    x, matrix, bias = case(torch.bfloat16, 48, (256, 512), device, whole=True)
    x.requires_grad_()
    bias.requires_grad_()
    outer = torch.randint(-2, 3, (48, 256), generator=torch.Generator().manual_seed(0)).to(device, torch.bfloat16)
    kernels.linear(x, matrix, bias, backend=backend).backward(outer)
    assert x.grad is not None
    assert bias.grad is not None
    assert_same_bits(x.grad, (outer.double() @ matrix.to_dense().double()).bfloat16())
    assert_same_bits(bias.grad, outer.double().sum(0).bfloat16())


def test_kept_values_are_trained(backend: str, applies: Callable[..., None], device: torch.device) -> None:
    applies(torch.bfloat16)
    if backend not in ops.TRAINABLE:
        pytest.skip(f"{backend} has no gradient of the values")
    x, matrix, _ = case(torch.bfloat16, 48, (256, 512), device, whole=True)
    layer = SparseLinear(matrix, backend=backend).requires_grad_values()
    layer(x).float().sum().backward()
    assert layer.values.grad is not None
    held = (layer.values.grad, layer.metadata)
    found = KERNELS[backend].unpack(held, layer.spec).to_dense()
    wanted = torch.where(matrix.mask(), x.double().sum(0).expand(256, 512), 0.0)
    assert_same_bits(found, wanted.bfloat16())


def test_programs_are_compiled_whole(backend: str, applies: Callable[..., None], gpu: torch.device) -> None:
    applies(torch.bfloat16)
    if not any(map(shutil.which, ("cc", "gcc", "clang"))):
        pytest.skip("torch.compile needs a C compiler")
    x, matrix, bias = case(torch.bfloat16, 16, (256, 512), gpu, whole=True)
    wanted = kernels.linear(x, matrix, bias, backend=backend)
    layer = SparseLinear(matrix, bias, backend=backend)
    function = torch.compile(lambda x: kernels.linear(x, matrix, bias, backend=backend), fullgraph=True)
    module = torch.compile(layer, fullgraph=True)
    for _ in range(2):
        assert_same_bits(function(x), wanted)
        assert_same_bits(module(x).detach(), wanted)


def test_a_model_is_captured_in_a_graph(backend: str, applies: Callable[..., None], gpu: torch.device) -> None:
    applies(torch.bfloat16)
    if backend == "reference":
        pytest.skip("the reference waits for the GPU, to see whether all inputs are finite")
    x, matrix, bias = case(torch.bfloat16, 16, (256, 512), gpu, whole=True)
    layer = SparseLinear(matrix, bias, backend=backend)
    with torch.inference_mode():
        wanted = layer(x).clone()
        torch.cuda.synchronize(gpu)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                y = layer(x)
        except RuntimeError as error:
            if backend == "vendor":
                pytest.skip(f"{backend} cannot be captured: {str(error).splitlines()[0]}")
            raise
        y.zero_()
        graph.replay()
        assert_same_bits(y, wanted)


def test_compiled_models_keep_their_graphs(gpu: torch.device) -> None:
    """mode="reduce-overhead" raises where a kernel keeps memory of the graph's pool."""
    if not any(map(shutil.which, ("cc", "gcc", "clang"))):
        pytest.skip("torch.compile needs a C compiler")
    x, matrix, bias = case(torch.bfloat16, 16, (256, 4096), gpu, whole=True)  # blocks that share columns
    layer = SparseLinear(matrix, bias, backend="cuda").requires_grad_(False)
    resources._of_streams.clear()
    module = torch.compile(layer, mode="reduce-overhead", fullgraph=True)
    for _ in range(4):  # warm, captured, replayed
        torch.compiler.cudagraph_mark_step_begin()
        y = module(x).clone()
    assert_same_bits(y, layer(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layers_move_to_the_gpu_and_back(dtype: torch.dtype, gpu: torch.device) -> None:
    x, matrix, bias = case(dtype, 12, (256, 512), torch.device("cpu"), whole=True)
    layer = SparseLinear(matrix, bias)
    wanted = (x.double() @ matrix.to_dense().double().T + bias.double()).to(dtype)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    assert_same_bits(layer(x).detach(), wanted)
    layer.to(gpu)
    assert layer.values.device.type == layer.metadata.device.type == "cuda"
    assert layer.backend == choose(layer.spec).kernel.backend
    assert_same_bits(layer(x.to(gpu)).detach(), wanted)
    assert_same_bits(copy.deepcopy(layer)(x.to(gpu)).detach(), wanted)
    layer.to("cpu")
    assert_same_bits(layer(x).detach(), wanted)
    assert layer.backend == choose(layer.spec).kernel.backend
    for name, tensor in layer.state_dict().items():
        assert_same_bits(tensor, before[name])


def test_state_dicts_and_pickles_go_between_devices(gpu: torch.device) -> None:
    x, matrix, bias = case(torch.bfloat16, 12, (256, 512), gpu, whole=True)
    layer = SparseLinear(matrix, bias)
    wanted = layer(x).detach()
    other = SparseLinear(SparseMatrix.from_dense(torch.zeros(256, 512).bfloat16()), torch.zeros(256).bfloat16())
    other.load_state_dict(layer.state_dict())
    assert_same_bits(other(x.cpu()).detach(), wanted)
    again = SparseLinear(SparseMatrix.from_dense(torch.zeros(256, 512).bfloat16()), torch.zeros(256).bfloat16()).to(gpu)
    again.load_state_dict(other.state_dict())
    assert_same_bits(again(x).detach(), wanted)
    for name, tensor in again.state_dict().items():
        assert_same_bits(tensor, layer.state_dict()[name])
    stream = io.BytesIO()
    torch.save(layer, stream)
    stream.seek(0)
    loaded = torch.load(stream, weights_only=False, map_location=gpu)
    assert_same_bits(loaded(x).detach(), wanted)


@pytest.mark.parametrize("weights", ["int8", "float8"])
def test_layers_of_8_bits_are_compressed_and_move(weights: Any, gpu: torch.device) -> None:
    """On the CPU, on the GPU and on the CPU again: the same numbers, by kernels of the GPU there."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 128)).bfloat16()
    twofour.prune(model, "2:4")
    twofour.compress(model, force=True, weights=weights)
    x = torch.randn(300, 512).bfloat16()
    wanted = model(x).float()
    model.to(gpu)
    first = model[0]
    assert isinstance(first, QuantizedSparseLinear)
    assert first.backend == "cuda"
    for tokens in (1, 16, 64, 300):
        found = model(x[:tokens].to(gpu)).float().cpu()
        torch.testing.assert_close(found, wanted[:tokens], rtol=0.02, atol=0.02)
    with torch.inference_mode():
        static = x[:8].to(gpu)
        model(static)
        torch.cuda.synchronize(gpu)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = model(static)
        y.zero_()
        graph.replay()
        torch.testing.assert_close(y.float().cpu(), wanted[:8], rtol=0.02, atol=0.02)
    model.cpu()
    torch.testing.assert_close(model(x).float(), wanted, rtol=0, atol=0)
    report = twofour.compress(model.to(gpu), tokens=16)
    assert all(row["sparse_us"] > 0 for row in report.rows)


def test_devices_are_not_mixed(backend: str, applies: Callable[..., None], gpu: torch.device) -> None:
    applies(torch.bfloat16)
    x, matrix, bias = case(torch.bfloat16, 4, (256, 512), gpu)
    with pytest.raises(UnsupportedError, match=r"x is on cpu and the weight on cuda:\d: move one of them"):
        kernels.linear(x.cpu(), matrix, backend=backend)
    on_cpu = matrix.to("cpu")
    with pytest.raises(UnsupportedError, match=r"x is on cuda:\d and the weight on cpu: move one of them"):
        kernels.linear(x, on_cpu)
    for other in (bias.cpu(), bias.cpu().float()):
        with pytest.raises(UnsupportedError, match=r"x is on cuda:\d and the bias on cpu: move one of them"):
            kernels.linear(x, matrix, other, backend=backend)


def test_kernels_of_the_cpu_say_why_they_do_not_apply(gpu: torch.device) -> None:
    matrix = SparseMatrix.from_dense(torch.zeros(16, 64, device=gpu))
    for backend in ("cpu", "onednn"):
        with pytest.raises(UnsupportedError, match=r"the weight is on cuda:\d"):
            kernels.linear(torch.zeros(1, 64, device=gpu), matrix, backend=backend)


def test_inputs_at_dropped_places_never_reach_the_output(
    backend: str, applies: Callable[..., None], device: torch.device
) -> None:
    applies(torch.bfloat16, (64, 128))
    if KERNELS[backend].dense:
        pytest.skip(f"{backend} multiplies its zeros")
    weight = torch.zeros(64, 128, device=device)
    weight[:, 1::4], weight[:, 2::4] = 1, -1
    matrix = SparseMatrix.from_dense(weight.bfloat16())
    for tokens in (1, 100):
        x = torch.ones(tokens, 128, dtype=torch.bfloat16, device=device)
        x[:, 0::4], x[:, 3::4] = float("inf"), float("nan")
        y = kernels.linear(x, matrix, backend=backend)
        assert torch.equal(y, torch.zeros(tokens, 64, dtype=torch.bfloat16, device=device))


@pytest.mark.parametrize("leading", [(1,), (3,), (1, 1), (2, 3), (1, 70), ()], ids=str)
def test_calls_like_the_last_one_give_its_bits(leading: tuple[int, ...], gpu: torch.device) -> None:
    """The first is checked and plans, the others are started straight away, on results made without torch.empty."""
    _, matrix, bias = case(torch.bfloat16, 1, (256, 512), gpu)
    layer = SparseLinear(matrix, bias, backend="cuda")
    x = torch.randn(*leading, 512).to(gpu, torch.bfloat16)
    with torch.no_grad():
        once = layer(x)
        again = [layer(x.clone()) for _ in range(3)]
    with torch.inference_mode():
        inferred = layer(x)
    assert inferred.is_inference()
    assert not once.is_inference()
    assert once.shape == (*leading, 256)
    for y in (*again, inferred):
        assert y.device == gpu
        assert (y.shape, y.stride()) == (once.shape, once.stride())
        assert_same_bits(y, once)
    assert len({y.data_ptr() for y in (once, *again, inferred)}) == 5
    assert layer(x.clone().requires_grad_()).requires_grad

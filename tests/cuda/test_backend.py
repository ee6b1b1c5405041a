"""The row "cuda" of the table as layers see it, on an emulated GPU whose memory is the CPU's."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.cuda import emulation
from tests.cuda.products import packed_of
from torch import Tensor, nn

import twofour
from twofour import Pattern, QuantizedSparseLinear, ShapeError, SparseLinear, SparseMatrix, UnsupportedError, explain
from twofour.kernels import KERNELS, SCALED, LinearSpec, choose, linear, ops, products, registry
from twofour.kernels.cuda import arguments, backend, compiler, driver, packing, table
from twofour.kernels.cuda import products as products_of_gpu
from twofour.kernels.vendor import support, torch_operations
from twofour.masks import nm_mask
from twofour.testing import assert_same_bits
from twofour.workflows import timing
from twofour.workflows.comparison import Comparison, LayerTimes

DTYPES = (torch.bfloat16, torch.float16)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the kernels that ran. Tensors of the CPU are taken for a GPU's."""
    names: list[str] = []

    def launch(
        name: str, grid: Sequence[int], device: torch.device, *arguments: int, cluster: int = 1, early: bool = False
    ) -> None:
        names.append(name)
        emulation.launch(name, grid, table.KERNEL_TEXTS[name].threads, *arguments, cluster=cluster, early=early)

    monkeypatch.setattr(table, "launch", launch)
    for module in (packing, arguments):
        monkeypatch.setattr(module, "_on_gpu", lambda _: True)
    monkeypatch.setattr(backend, "why_not", lambda pattern, dtype, *_: None if dtype in (*DTYPES, *SCALED) else "no")
    on_cpu = torch.library.Library("twofour", "IMPL")
    for name, run in (
        ("linear_cuda", backend.linear),
        ("to_dense_cuda", backend.to_dense),
        ("linear_grad_input_cuda", backend.grad_input),
        ("linear_grad_values_cuda", backend.grad_values),
        ("linear_int8_cuda", backend.linear_int8),
        ("to_dense_int8_cuda", backend.to_dense),
        ("linear_float8_cuda", backend.linear_float8),
        ("to_dense_float8_cuda", backend.to_dense),
    ):
        on_cpu.impl(name, run, "CPU")
    yield names
    on_cpu._destroy()


def matrix(shape: tuple[int, int], dtype: torch.dtype) -> SparseMatrix:
    return SparseMatrix.from_dense(torch.randint(-4, 5, shape).to(dtype), prune=True)


def inputs(*shape: int) -> torch.Tensor:
    return torch.randint(-4, 5, shape).float()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 100), (2, 3, 100), (100,), (0, 100), (70, 100)], ids=str)
def test_outputs_are_those_of_the_reference(shape: tuple[int, ...], dtype: torch.dtype, gpu: list[str]) -> None:
    weight, x = matrix((40, 100), dtype), inputs(*shape).to(dtype)
    bias = torch.randint(-4, 5, (40,)).to(dtype)
    residual = torch.randint(-9, 10, (*shape[:-1], 40)).to(dtype)
    for activation, added in (("none", None), ("relu", residual), ("none", residual), ("relu", None)):
        found = linear(x, weight, bias, activation=activation, residual=added, backend="cuda")
        wanted = linear(x, weight, bias, activation=activation, residual=added, backend="reference")
        assert torch.equal(found, wanted)
    assert bool(gpu) == (0 not in shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_layer_keeps_its_matrix_bit_for_bit(dtype: torch.dtype, gpu: list[str]) -> None:
    dense = torch.randn(33, 132).to(dtype)
    dense[0, :4] = torch.tensor([-0.0, float("nan"), 0.0, float("inf")])
    held = SparseMatrix.from_dense(dense, prune=True)
    layer = SparseLinear(held, torch.randn(33).to(dtype), backend="cuda")
    assert layer.backend == "cuda"
    x = torch.randn(4, 132).to(dtype)
    once = layer(x)
    for other in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other.matrix.values.view(torch.int16), held.values.view(torch.int16))
        assert torch.equal(other.matrix.metadata, held.metadata)
        assert torch.equal(other(x).view(torch.int16), once.view(torch.int16))
    state = layer.state_dict()
    again = SparseLinear(matrix((33, 132), dtype), torch.zeros(33, dtype=dtype), backend="cuda")
    again.load_state_dict(state)
    assert torch.equal(again(x).view(torch.int16), once.view(torch.int16))
    assert torch.equal(layer.to_linear().weight.view(torch.int16), held.to_dense().view(torch.int16))
    assert layer.nbytes == layer.values.nbytes + layer.metadata.nbytes
    assert "cuda" in str(explain(nn.Sequential(layer)))


def test_what_lies_at_dropped_places_does_not_come_through(gpu: list[str]) -> None:
    held = SparseMatrix.from_dense(torch.tensor([[0, 1, 0, 2] * 16] * 16).bfloat16())
    x = torch.ones(3, 64).bfloat16()
    x[:, 0::4] = float("nan")
    x[:, 2::4] = float("inf")
    assert torch.equal(linear(x, held, backend="cuda"), torch.full((3, 16), 48.0).bfloat16())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_are_those_of_the_reference(dtype: torch.dtype, gpu: list[str]) -> None:
    held = matrix((24, 68), dtype)
    found = {}
    for name in ("cuda", "reference"):
        layer = SparseLinear(held, torch.ones(24).to(dtype), backend=name).requires_grad_values()
        torch.manual_seed(3)
        x = inputs(5, 68).to(dtype).requires_grad_()
        outer = inputs(5, 24).to(dtype)
        layer(x).backward(outer)
        assert layer.values.grad is not None
        spec = layer.spec
        values = KERNELS[name].unpack((layer.values.grad, layer.metadata), spec).values
        assert layer.bias is not None
        found[name] = (x.grad, values, layer.bias.grad)
    for mine, right in zip(found["cuda"], found["reference"], strict=True):
        assert torch.equal(mine, right)


def test_a_call_like_the_last_one_is_not_checked_again(gpu: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[str] = []
    require: Callable[..., None] = ops._require_input

    def noted(backend: str, *rest: Any) -> None:
        checked.append(backend)
        require(backend, *rest)

    monkeypatch.setattr(ops, "_require_input", noted)
    held, x = matrix((40, 128), torch.bfloat16), inputs(2, 3, 128).bfloat16()
    layer = SparseLinear(held, torch.ones(40).bfloat16(), backend="cuda")
    with torch.no_grad():
        first = layer(x)
        assert checked == ["cuda"]
        for _ in range(3):
            assert torch.equal(layer(x.clone()), first)
        assert checked == ["cuda"]
        with torch.profiler.profile():
            assert torch.equal(layer(x), first)
        assert checked == ["cuda"] * 2
        for wrong in (x.half(), x[..., :96]):
            with pytest.raises((ShapeError, UnsupportedError), match="x is "):
                layer(wrong)
        slower = SparseLinear(held, torch.ones(40).bfloat16(), backend="reference")
        gpu.clear()
        assert torch.equal(slower(x), first)
        assert gpu == []
    assert torch.equal(layer(x.requires_grad_()), first)
    assert checked == ["cuda"] * 4 + ["reference", "cuda"]


def test_what_was_multiplied_before_makes_nothing_right_that_is_wrong(gpu: list[str]) -> None:
    x = inputs(3, 64).bfloat16()
    for dtype, given in ((torch.float8_e4m3fn, x), (torch.int8, x.to(torch.int8))):
        packed, _ = packed_of((32, 64), dtype)
        residual = torch.zeros(3, 32, dtype=torch.bfloat16)
        products_of_gpu.linear(given, packed, residual=residual)
        operands = packed.values, packed.metadata
        with torch.no_grad(), pytest.raises(UnsupportedError, match="(x|residual) is "):
            ops.linear("cuda", given, operands, None, "2:4", 32, 64, residual=residual)


@pytest.mark.parametrize("activation", ["none", "relu"])
def test_a_bias_of_float32_is_added_before_anything_is_rounded(activation: str, gpu: list[str]) -> None:
    held, x = matrix((40, 100), torch.bfloat16), inputs(3, 100).bfloat16()
    bias, residual = torch.randn(40), torch.randn(3, 40).bfloat16()
    for added in (None, residual):
        found = linear(x, held, bias, activation=activation, residual=added, backend="cuda")
        assert torch.equal(found, linear(x, held, bias, activation=activation, residual=added, backend="reference"))


@pytest.mark.parametrize("of_bias", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_int8_layers_give_the_bits_of_the_reference(
    dtype: torch.dtype, of_bias: torch.dtype | None, gpu: list[str]
) -> None:
    scaled = SparseMatrix.from_dense(torch.randn(40, 100), prune=True)
    bias = None if of_bias is None else torch.randn(40).to(of_bias)
    mine, plain = (QuantizedSparseLinear.from_matrix(scaled, bias, backend=name) for name in ("cuda", "reference"))
    assert (mine.backend, plain.backend) == ("cuda", "reference")
    assert torch.equal(mine.matrix.values, plain.matrix.values)
    assert torch.equal(mine.matrix.metadata, plain.matrix.metadata)
    for tokens in (0, 3, 70):
        x = torch.randn(tokens, 2, 100).to(dtype)
        x[1:2, 0, 7] = float("nan")
        assert torch.equal(torch.nan_to_num(mine(x)), torch.nan_to_num(plain(x)))
        assert torch.equal(mine(x).isnan(), plain(x).isnan())
    x.nan_to_num_().requires_grad_()
    mine(x).sum().backward()
    assert x.grad is not None
    first, x.grad = x.grad, None
    plain(x).sum().backward()
    assert torch.allclose(first, x.grad)
    assert mine.choice.kernel.backend == "cuda" or mine.choice.rejected[-1][1] == "backend='cuda' was asked for"
    state = copy.deepcopy(mine).state_dict()
    plain.load_state_dict(state)
    assert torch.equal(torch.nan_to_num(mine(x)), torch.nan_to_num(plain(x)))


@pytest.mark.parametrize("of_bias", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_float8_layers_give_what_the_reference_gives(
    dtype: torch.dtype, of_bias: torch.dtype | None, gpu: list[str]
) -> None:
    """Whole numbers and scales that are powers of two: every sum is exact."""
    held = matrix((40, 100), torch.float8_e4m3fn)
    scales = 2.0 ** torch.randint(-3, 3, (40,)).float()
    bias = None if of_bias is None else torch.randn(40).to(of_bias)
    mine, plain = (QuantizedSparseLinear(held, scales, bias, backend=name) for name in ("cuda", "reference"))
    assert (mine.backend, plain.backend) == ("cuda", "reference")
    assert_same_bits(mine.matrix.values, held.values)
    for tokens in (0, 1, 70, 260):  # none, and by one, several and no reading of the bytes
        gpu.clear()
        x = inputs(tokens, 100).to(dtype)
        assert torch.equal(mine(x), plain(x))
        ran = {name.rsplit("_", 1)[0] for name in gpu}
        wanted = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype)
        if tokens and wanted is not None:
            assert ran == ({f"decode_e4m3_{wanted}"} if tokens < 260 else {f"gemm_{wanted}"})
    x = inputs(2, 3, 100).to(dtype).requires_grad_()
    mine(x).sum().backward()
    assert x.grad is not None
    first, x.grad = x.grad, None
    plain(x).sum().backward()
    assert torch.equal(first, x.grad)
    plain.load_state_dict(copy.deepcopy(mine).state_dict())
    assert torch.equal(mine(x), plain(x))


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("weights", ["int8", "float8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_layers_of_8_bits_apply_activations(dtype: torch.dtype, weights: str, activation: str, gpu: list[str]) -> None:
    scaled = SparseMatrix.from_dense(torch.randn(40, 128), prune=True)
    for of_bias in (torch.float32, dtype):
        bias = torch.randn(40).to(of_bias)
        mine, plain = (
            QuantizedSparseLinear.from_matrix(scaled, bias, backend=name, weights=weights)
            for name in ("cuda", "reference")
        )
        mine.activation = plain.activation = activation
        for tokens in (3, 70):
            x = torch.randn(tokens, 128).to(dtype)
            with torch.no_grad():
                found, wanted = mine(x), plain(x)
            if (weights, activation) == ("int8", "relu"):
                assert torch.equal(found, wanted)
            near = max(2 * torch.finfo(dtype).eps, 1e-5)
            torch.testing.assert_close(found, wanted, rtol=near, atol=4 * near)


def test_it_compiles_and_batches(gpu: list[str]) -> None:
    layer = SparseLinear(matrix((16, 64), torch.bfloat16), backend="cuda")
    x = inputs(3, 2, 64).bfloat16()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), layer(x))
    assert torch.equal(torch.vmap(layer)(x), layer(x))
    gpu.clear()
    x.requires_grad_()
    compiled(x).sum().backward()
    assert x.grad is not None
    assert "expand_half" in gpu


def test_inputs_that_do_not_fit(gpu: list[str]) -> None:
    held = matrix((16, 64), torch.bfloat16)
    for x, way in ((inputs(2, 64), r"x\.to\(torch\.bfloat16\)"), (inputs(2, 64).half(), r"x\.to\(torch\.bfloat16\)")):
        with pytest.raises(
            UnsupportedError, match=rf"both must have one dtype for backend 'cuda'\. Pass {way}, or convert"
        ):
            linear(x, held, backend="cuda")
    with pytest.raises(UnsupportedError, match=r"x is torch.int8: kernels take floating point inputs"):
        linear(inputs(2, 64).to(torch.int8), held, backend="cuda")
    x = inputs(2, 64).bfloat16()
    for wrong in (x[:, :60], x[0, 0]):
        with pytest.raises(ShapeError, match=r"x is \[.*\]: its last axis must be in_features 64"):
            linear(wrong, held, backend="cuda")
    for size in (15, 1):
        with pytest.raises(ShapeError, match=rf"bias is \[{size}\]: it must be \[16\], one for each output"):
            linear(x, held, torch.zeros(size).bfloat16(), backend="cuda")
    with pytest.raises(ShapeError, match=r"residual is \[16\]: it must be \[2, 16\], as y"):
        linear(x, held, residual=torch.zeros(16).bfloat16(), backend="cuda")
    with pytest.raises(
        UnsupportedError, match=r"residual is torch.float32 on cpu, x torch.bfloat16 on cpu: pass residual"
    ):
        linear(x, held, residual=torch.zeros(2, 16), backend="cuda")
    assert gpu == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_what_is_on_another_device_is_named(dtype: torch.dtype, gpu: list[str]) -> None:
    """Also a bias that is added outside of the kernel."""
    held, x = matrix((16, 64), torch.bfloat16), inputs(2, 64).bfloat16()
    bias = torch.zeros(16, dtype=dtype)
    with pytest.raises(UnsupportedError, match="x is on meta and the weight on cpu: move one of them"):
        linear(x.to("meta"), held, bias, backend="cuda")
    for activation in ("none", "relu"):
        with pytest.raises(UnsupportedError, match="x is on cpu and the bias on meta: move one of them"):
            linear(x, held, bias.to("meta"), activation=activation, backend="cuda")
    with pytest.raises(UnsupportedError, match="residual is torch.bfloat16 on meta, x .* on cpu: pass residual.to"):
        linear(x, held, bias, residual=torch.zeros(2, 16, device="meta").bfloat16(), backend="cuda")
    for kind in SCALED.values():
        scaled = matrix((16, 64), torch.bfloat16)
        layer = QuantizedSparseLinear.from_matrix(scaled, bias, backend="cuda", weights=kind.name)
        with pytest.raises(UnsupportedError, match="x is on meta and the weight on cpu: move one of them"):
            layer(x.to("meta"))
        layer.bias = nn.Parameter(bias.to("meta"))
        with pytest.raises(UnsupportedError, match="x is on cpu and the bias on meta: move one of them"):
            layer(x)
        layer.bias, values = None, layer.values
        layer.values = values.to("meta")
        with pytest.raises(UnsupportedError, match="x is on cpu and the weight on meta: move one of them"):
            layer(x)
        layer.values, layer.scales = values, layer.scales.to("meta")
        with pytest.raises(UnsupportedError, match="x is on cpu and the weight on meta: move one of them"):
            layer(x)
    assert gpu == []


@pytest.mark.parametrize("weights", [None, "int8", "float8"])
def test_layers_take_inputs_as_they_lie(weights: str | None, gpu: list[str]) -> None:
    """Strides, places in memory, axes, inference mode and gradients: what the reference gives."""
    held = matrix((20, 68), torch.bfloat16)
    mine, plain = (
        SparseLinear(held, backend=name)
        if weights is None
        else QuantizedSparseLinear.from_matrix(held, backend=name, weights=weights)
        for name in ("cuda", "reference")
    )
    whole = inputs(6, 5, 70).bfloat16()
    for x in (
        whole[..., 1:69],
        whole[::2, :, 2:],
        whole[..., :68].transpose(0, 1),
        whole[0, 0, 1:69],
        whole[:1, :, :68].expand(3, 5, 68),
        whole[:1, :1, :1].expand(2, 3, 68),
        whole[:0, :, :68],
        inputs(68, 7).bfloat16().T,
    ):
        wanted = plain(x)
        assert torch.allclose(mine(x), wanted, rtol=2**-7, atol=2**-7)
        with torch.inference_mode():
            assert torch.allclose(mine(x.clone()), wanted, rtol=2**-7, atol=2**-7)
            assert torch.allclose(mine(x), wanted, rtol=2**-7, atol=2**-7)
            inside = x.clone()
        assert torch.allclose(mine(inside), wanted, rtol=2**-7, atol=2**-7)
        given = x.detach().requires_grad_()
        found = mine(given)
        assert torch.allclose(found, wanted, rtol=2**-7, atol=2**-7)
        assert found.requires_grad
    assert gpu


def spec_of(**changes: object) -> LinearSpec:
    arguments = {
        "out_features": 64,
        "in_features": 64,
        "pattern": Pattern(),
        "dtype": torch.bfloat16,
        "device": torch.device("cuda:0"),
    }
    return LinearSpec(**{**arguments, **changes})  # type: ignore[arg-type]


def test_why_it_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    why_not = KERNELS["cuda"].why_not
    assert why_not(spec_of(device=torch.device("cpu"))) == "the weight is on cpu"
    assert why_not(spec_of(out_features=0)) == "the weight is empty"
    assert why_not(spec_of(pattern=Pattern(4, 8))) == "pattern 4:8 has no GPU kernel, only 2:4"
    assert why_not(spec_of(dtype=torch.float32)) == "float32 has no GPU kernel, only bfloat16 and float16"
    monkeypatch.setattr(driver, "why_not", lambda: "no NVIDIA driver")
    assert why_not(spec_of()) == "no NVIDIA driver"
    monkeypatch.setattr(driver, "why_not", lambda: None)
    monkeypatch.setattr(compiler, "why_not", lambda: "no NVRTC")
    assert why_not(spec_of()) == "no NVRTC"
    monkeypatch.setattr(compiler, "why_not", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert why_not(spec_of()) == "this build of torch has no CUDA"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert why_not(spec_of()) == "torch sees no GPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    monkeypatch.setattr(backend, "_capability", lambda _: (7, 5))
    assert why_not(spec_of()) == "Tesla T4 (7.5) has no sparse tensor cores: they begin at 8.0"
    monkeypatch.setattr(backend, "_capability", lambda _: (9, 0))
    monkeypatch.setattr(compiler, "why_not_for", lambda _: "NVRTC is too old")
    assert why_not(spec_of()) == "NVRTC is too old"
    monkeypatch.setattr(compiler, "why_not_for", lambda _: None)
    assert why_not(spec_of()) is None
    assert KERNELS["cuda"].label() == "cuda sm_90a"
    assert choose(spec_of()).kernel.backend == "cuda"


def test_weights_elsewhere_are_not_told_of_it() -> None:
    on_cpu = choose(spec_of(device=torch.device("cpu"), dtype=torch.float16))
    assert [name for name, _ in on_cpu.rejected] == ["cpu"]
    on_gpu = choose(spec_of())
    assert [name for name, _ in on_gpu.rejected] == ["cpu", "cuda", "vendor"]
    with pytest.raises(UnsupportedError, match=r"backend 'cuda' cannot run this layer: the weight is on cpu\."):
        choose(spec_of(device=torch.device("cpu")), "cuda")


def test_times_are_taken_when_gpus_are_done(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: device != 1)
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    timing.paired({"nothing": lambda: None}, repeats=2)
    assert waited == [0, 2] * 2 * 4


@pytest.mark.parametrize("both_ways", [True, False])
def test_a_step_of_training_packs_and_multiplies_both_ways(
    both_ways: bool, gpu: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    row = next(row for row in products.PRODUCTS if row.backend == "cuda")
    weight = torch.randint(-4, 5, (72, 136)).bfloat16()
    mask = nm_mask(torch.rand(72, 136), "2:4t")
    kept = torch.where(mask, weight, 0).float()
    own, turned = row.pack(weight, mask, both_ways, products.packed_memory())
    x, grad = inputs(3, 2, 136).bfloat16(), inputs(3, 2, 72).bfloat16()
    bias = torch.ones(72).bfloat16()
    assert torch.equal(row.linear(x, own, bias, 72, 136), (x.float() @ kept.T + 1).bfloat16())
    assert (turned is None) == (not both_ways)
    if turned is not None:
        assert torch.equal(row.linear(grad, turned, None, 136, 72), (grad.float() @ kept).bfloat16())


def test_the_table_for_training_has_it_for_weights_on_gpus() -> None:
    found, rejected = products.find_products(spec_of())
    assert found is None
    assert [name for name, _ in rejected] == ["cpu", "cuda"]
    found, rejected = products.find_products(spec_of(device=torch.device("cpu"), dtype=torch.float16))
    assert [name for name, _ in rejected] == ["cpu"]


@pytest.mark.parametrize("faster", ["cuda", "vendor"])
def test_compress_takes_the_faster_of_the_kernels_for_gpus(
    faster: str, gpu: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = KERNELS["reference"]
    rows = {
        "cuda": KERNELS["cuda"],
        "vendor": replace(reference, backend="vendor", label=lambda: "vendor 1.0", on_gpu=True, why_not=lambda _: None),
        "reference": reference,
        "onednn": KERNELS["onednn"],
    }
    for name in list(KERNELS):
        monkeypatch.delitem(KERNELS, name)
    for name, row in rows.items():
        monkeypatch.setitem(KERNELS, name, row)
    monkeypatch.setattr(registry, "told_of", lambda *_: True)

    def times(self: Comparison, sparse: SparseLinear, dense: nn.Linear | None, tokens: object) -> LayerTimes:
        return LayerTimes(3.0, None, 1.0 if sparse.backend == faster else 2.0)

    monkeypatch.setattr(Comparison, "times", times)
    model = nn.Sequential(nn.Linear(64, 32).bfloat16())
    twofour.prune(model, "2:4")
    report = twofour.compress(model, tokens=4)
    layer = model[0]
    assert isinstance(layer, SparseLinear)
    assert layer.backend == faster
    label = {"cuda": "cuda", "vendor": "vendor 1.0"}
    assert report.rows[0]["kernel"] == label[faster]
    assert report.rows[0]["sparse_us"] == 1.0
    reason = "cuda would take 2.00x the time" if faster == "vendor" else ""
    assert (report.rows[0]["reason"] or "") == reason
    assert explain(model).rows[0]["reason"] == reason


def test_masks_of_training_are_chosen_by_a_kernel(gpu: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(64, 96)
    for asked, dtype, ran in (
        ("2:4t", torch.float32, ["mask_both_fp32"]),
        ("2:4t", torch.bfloat16, ["mask_both_bf16"]),
        ("2:4t", torch.float64, []),
        ("2:4", torch.float32, []),
    ):
        gpu.clear()
        monkeypatch.setattr(backend, "unusable", lambda _: None)
        pattern, given = Pattern.parse(asked), weight.to(dtype)
        assert torch.equal(products.magnitude_mask(given, pattern), nm_mask(given.abs(), pattern))
        assert gpu == ran
        monkeypatch.setattr(backend, "unusable", lambda _: "no driver")
        assert torch.equal(products.magnitude_mask(given, pattern), nm_mask(given.abs(), pattern))
        assert gpu == ran


def test_a_tracer_asks_whether_a_gpu_can_be_used_and_does_not_look_how(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that calls `kernels.linear` asks in its middle, and no tracer follows into drivers and libraries."""
    device = torch.device("cuda")
    monkeypatch.setattr(backend, "_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: (9, 0))

    def asked(x: Tensor) -> Tensor:
        ours, theirs = backend.unusable(device), support.device_why_not(torch.bfloat16, device)
        return x if ours is None or theirs is None else x + len(ours) + len(theirs)

    x = torch.zeros(2)
    torch_operations.installed.cache_clear()
    assert torch.equal(torch.compile(asked, fullgraph=True, backend="eager")(x), asked(x))
    torch_operations.installed.cache_clear()

"""int8 linear layers: every instruction set and family gives the bits of the reference."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from tests.kernels.test_epilogue import NAMES, assert_finished, exact_activation
from torch import Tensor

from twofour.errors import ShapeError, UnsupportedError
from twofour.format import SparseMatrix
from twofour.kernels import cpu, int8, reference
from twofour.kernels.epilogue import ACTIVATIONS
from twofour.pattern import Pattern

if os.environ.get("TWOFOUR_NO_NATIVE"):
    pytest.skip("TWOFOUR_NO_NATIVE leaves the native kernels out", allow_module_level=True)

from twofour import _native

pytestmark = pytest.mark.of_cpu

DTYPES = (torch.float32, torch.bfloat16)
FAMILIES: tuple[cpu.Family, ...] = ("few", "many")
PATTERN = Pattern.parse("2:4")
VANISHES = 2.0**-98
"""Times |y|, as errors of one term of 2^-24: activations that are smaller than 2^-122 |y| may become 0."""

every_kernel = pytest.mark.parametrize(
    ("isa", "family", "dtype"),
    [(isa, family, dtype) for isa in int8.isas() for family in FAMILIES for dtype in DTYPES],
    ids=lambda value: str(value).removeprefix("torch."),
)


@dataclass(frozen=True)
class Weight:
    matrix: SparseMatrix
    scales: Tensor
    packed: tuple[Tensor, Tensor]

    @property
    def shape(self) -> tuple[int, int]:
        return self.matrix.shape


def make_weight(out_features: int, in_features: int, seed: int = 0) -> Weight:
    """All int8 values, -128 too, at random places."""
    generator = torch.Generator().manual_seed(seed + 1000 * out_features + in_features)
    groups = in_features // 4
    places = torch.rand((out_features, groups, 4), generator=generator).topk(2, -1).indices.sort(-1).values
    values = torch.randint(-128, 128, (out_features, groups * 2), generator=generator, dtype=torch.int8)
    nibbles = torch.nn.functional.pad(places[..., 0] | places[..., 1] << 2, (0, groups % 2))
    metadata = (nibbles[:, 0::2] | nibbles[:, 1::2] << 4).to(torch.uint8)
    matrix = SparseMatrix(values, metadata, PATTERN, (out_features, in_features))
    scales = torch.rand(out_features, generator=generator) / 64 + 1e-3
    return Weight(matrix, scales, int8.pack(values, metadata, out_features, in_features))


def run(x: Tensor, weight: Weight, bias: Tensor | None, isa: str, family: cpu.Family) -> Tensor:
    """`int8.linear_cpu`, having made sure that the kernel it was asked for is the one that ran."""
    y = int8.linear_cpu(x, *weight.packed, weight.scales, bias, *weight.shape, isa=isa, kernel=family)
    ran = "many" if family == "many" or x.shape[0] > 8 else "few"
    assert _native.last_kernel() == f"{isa}/int8-{ran}"
    return y


def specified(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    matrix = weight.matrix
    return reference.linear_int8(x, matrix.values, matrix.metadata, weight.scales, bias, PATTERN, matrix.in_features)


def same_bits(y: Tensor, expected: Tensor) -> bool:
    """Equal, NaN where NaN, and zeros of the same sign."""
    numbers = ~expected.isnan()
    carrier = torch.int32 if y.dtype == torch.float32 else torch.int16
    return torch.equal(y.isnan(), ~numbers) and torch.equal(y.view(carrier)[numbers], expected.view(carrier)[numbers])


@every_kernel
def test_bits_are_those_of_the_reference(isa: str, family: cpu.Family, dtype: torch.dtype) -> None:
    tokens = (1, 2, 3, 5, 6, 7, 8) if family == "few" else (1, 4, 5, 11, 12, 13, 16, 17, 25, 49)
    sizes = [(1, 4), (7, 8), (8, 12), (9, 20), (16, 32), (17, 60), (31, 516), (33, 512), (50, 1028), (65, 2052)]
    for number, (out_features, in_features) in enumerate(sizes):
        weight = make_weight(out_features, in_features)
        generator = torch.Generator().manual_seed(number)
        bias = torch.randn(out_features, generator=generator).to(DTYPES[number % 2]) if number % 3 else None
        for count in tokens:
            x = torch.randn(count, in_features + 4, generator=generator).to(dtype)[:, :in_features]  # strided rows
            assert same_bits(run(x, weight, bias, isa, family), specified(x, weight, bias)), (count, weight.shape)


@every_kernel
@pytest.mark.parametrize("name", NAMES[1:])
def test_activations_are_within_their_bound_and_relu_exact(
    name: str, isa: str, family: cpu.Family, dtype: torch.dtype
) -> None:
    for count, out_features, in_features in ((1, 17, 12), (5, 31, 60), (8, 16, 516), (37, 97, 128)):
        weight = make_weight(out_features, in_features)
        x, bias = torch.randn(count, in_features).to(dtype), torch.randn(out_features)
        found = int8.linear_cpu(
            x, *weight.packed, weight.scales, bias, *weight.shape, isa=isa, kernel=family, activation=name
        )
        before = specified(x.float(), weight, bias)  # exact, and not rounded to x's dtype
        if name == "relu":
            assert same_bits(found, before.relu().to(dtype))
        assert_finished(found, name, before.double(), before.double().abs() * VANISHES, 1, torch.zeros_like(before))


@every_kernel
@pytest.mark.parametrize("name", NAMES[1:])
def test_activations_of_any_number(name: str, isa: str, family: cpu.Family, dtype: torch.dtype) -> None:
    """The bias alone reaches them."""
    bits = torch.arange(0, 2**32, 2**21 + 1).to(torch.int32).view(torch.float32)
    bias = torch.cat([torch.linspace(-17, 17, 2001), bits[bits.isfinite()]])
    matrix = SparseMatrix.from_dense(torch.zeros(len(bias), 4, dtype=torch.int8), prune=True)
    packed = int8.pack(matrix.values, matrix.metadata, *matrix.shape)
    x, scales = torch.zeros(1, 4, dtype=dtype), torch.ones(len(bias))

    def run(bias: Tensor) -> Tensor:
        return int8.linear_cpu(x, *packed, scales, bias, *matrix.shape, isa=isa, kernel=family, activation=name)[0]

    finite = exact_activation(name, bias.double()).to(dtype).isfinite()
    zeros = torch.zeros_like(bias)[finite]
    before = bias.double()[finite]
    assert_finished(run(bias)[finite], name, before, before.abs() * VANISHES, 1, zeros)
    for value in (torch.inf, -torch.inf, torch.nan):
        theirs = ACTIVATIONS[name](torch.tensor([value], dtype=torch.float64))
        ours = run(torch.full_like(bias, value)).double()
        torch.testing.assert_close(ours, theirs.expand_as(ours), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("isa", int8.isas())
def test_several_panels_and_slabs(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """More tokens than a panel of quantized inputs holds, more than one slab; blocks of rows for three threads."""
    weight = make_weight(50, 68)
    x = torch.randn(1500, 68, generator=torch.Generator().manual_seed(0))
    assert same_bits(run(x, weight, None, isa, "many"), specified(x, weight, None))
    wide = make_weight(3, 1 << 18)
    x = torch.randn(101, 1 << 18, generator=torch.Generator().manual_seed(0))
    assert same_bits(run(x, wide, None, isa, "many"), specified(x, wide, None))


@every_kernel
def test_largest_sums_do_not_overflow(isa: str, family: cpu.Family, dtype: torch.dtype) -> None:
    shape = (17, 1 << 18)
    values = torch.full((17, shape[1] // 2), -128, dtype=torch.int8)
    metadata = torch.full((17, shape[1] // 8), 0x44, dtype=torch.uint8)
    matrix = SparseMatrix(values, metadata, PATTERN, shape)
    weight = Weight(matrix, torch.ones(17), int8.pack(values, metadata, *shape))
    x = torch.ones(2, shape[1], dtype=dtype) * torch.tensor([[1], [-1]])
    y = run(x.to(dtype), weight, None, isa, family)
    assert same_bits(y, specified(x.to(dtype), weight, None))
    assert (y.float().abs() > 1.6e7).all()


@every_kernel
def test_ties_go_to_even(isa: str, family: cpu.Family, dtype: torch.dtype) -> None:
    """x whose scale is 1 and whose fractions are halves; a weight that picks single inputs."""
    x = torch.tensor([[127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 3.5]], dtype=dtype)
    values, metadata = (
        torch.ones(4, 4, dtype=torch.int8),
        torch.tensor([[0x44], [0x99], [0xE9], [0xEE]]).to(torch.uint8),
    )
    values[0] = torch.tensor([0, 1, 0, 1])
    matrix = SparseMatrix(values, metadata, PATTERN, (4, 8))
    weight = Weight(matrix, torch.ones(4), int8.pack(values, metadata, 4, 8))
    y = run(x, weight, None, isa, family)
    assert same_bits(y, specified(x, weight, None))
    assert y.tolist() == [[-2, -2, 4, 6]]  # the inputs become 127 0 2 2 | 0 -2 -2 4


@every_kernel
def test_tokens_without_numbers(isa: str, family: cpu.Family, dtype: torch.dtype) -> None:
    """Zero, tiny, huge, subnormal, NaN and infinite tokens, the last two at dropped places too; others stay as they are."""
    weight, bias = make_weight(19, 36), torch.randn(19, generator=torch.Generator().manual_seed(0))
    x = torch.randn(8, 36, generator=torch.Generator().manual_seed(1)).to(dtype)
    x[0] = 0
    x[1] = 2.0**-120
    x[2] *= 1e38
    x[3], x[3, 7] = 2.0**-140, 2.0**-119
    for place in range(36):
        x[4], x[5], x[6] = 1, 2, 3
        x[4, place], x[5, place], x[6, place] = float("nan"), float("inf"), -float("inf")
        y = run(x, weight, bias, isa, family)
        assert same_bits(y, specified(x, weight, bias))
        assert y[4:7].isnan().all()
        assert not y[:4].isnan().any()
        assert torch.equal(y[0], bias.to(dtype))
        assert torch.equal(y[1], bias.to(dtype))


@every_kernel
def test_any_nibble_stays_inside_the_buffers(isa: str, family: cpu.Family, dtype: torch.dtype) -> None:
    metadata = torch.arange(256, dtype=torch.uint8).repeat(2).view(16, 32)
    packed = int8.pack(torch.ones(16, 128, dtype=torch.int8), metadata, 16, 256)
    x = torch.ones(5, 256, dtype=dtype)
    y = int8.linear_cpu(x, *packed, torch.ones(16), None, 16, 256, isa=isa, kernel=family)
    assert (y == 128).all()
    assert torch.equal(int8.unpack(*packed, 16, 256)[1], metadata)


class GuardedMemory:
    """A copy of a tensor that ends exactly where a page without any access begins."""

    def __init__(self, tensor: Tensor) -> None:
        page = mmap.PAGESIZE
        pages = -(-tensor.nbytes // page)
        self._map = mmap.mmap(-1, (pages + 1) * page)
        self._hold = (ctypes.c_char * len(self._map)).from_buffer(self._map)
        start = ctypes.addressof(self._hold)
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mprotect(ctypes.c_void_p(start + pages * page), ctypes.c_size_t(page), 0) != 0:
            raise OSError(ctypes.get_errno(), "mprotect")
        self.address = start + pages * page - tensor.nbytes
        self.bytes = (ctypes.c_uint8 * tensor.nbytes).from_address(self.address)
        ctypes.memmove(self.address, tensor.data_ptr(), tensor.nbytes)


@every_kernel
@pytest.mark.parametrize("shape", [(1, 1, 4), (3, 17, 12), (7, 15, 36), (29, 33, 100), (8, 16, 64)])
def test_nothing_outside_the_tensors_is_touched(
    isa: str, family: cpu.Family, dtype: torch.dtype, shape: tuple[int, int, int]
) -> None:
    """All operands end at a page without access; gaps between rows of y, and y's neighbours, stay as they were."""
    tokens, out_features, in_features = shape
    weight, gap = make_weight(out_features, in_features), 3
    generator = torch.Generator().manual_seed(2)
    x, bias = torch.randn(tokens, in_features, generator=generator).to(dtype), torch.randn(out_features)
    expected = torch.full((tokens, out_features + gap), -99.0, dtype=dtype)
    y = torch.full_like(expected, -99.0)
    expected[:, :out_features] = specified(x, weight, bias)
    places = [GuardedMemory(t) for t in (x, *weight.packed, weight.scales, bias)]
    last = GuardedMemory(torch.zeros(tokens, out_features, dtype=dtype))
    code, kernel = DTYPES.index(dtype), 1 + FAMILIES.index(family)
    for address, stride in ((last.address, out_features), (y.data_ptr(), out_features + gap)):
        _native.linear_int8(
            *(place.address for place in places), address, tokens, out_features, in_features, in_features, stride, code,
            2, kernel, isa,
        )  # fmt: skip
    assert same_bits(
        torch.frombuffer(last.bytes, dtype=dtype).view(tokens, -1), expected[:, :out_features].contiguous()
    )
    assert same_bits(y, expected)


@every_kernel
def test_unaligned_pointers(isa: str, family: cpu.Family, dtype: torch.dtype) -> None:
    weight = make_weight(33, 68)
    x, bias = torch.randn(7, 68).to(dtype), torch.randn(33)

    def moved(tensor: Tensor) -> Tensor:
        flat = torch.cat([torch.zeros(1, dtype=tensor.dtype), tensor.flatten()])
        return flat[1:].view(tensor.shape)

    odd = Weight(weight.matrix, moved(weight.scales), (moved(weight.packed[0]), moved(weight.packed[1])))
    assert same_bits(run(moved(x), odd, moved(bias), isa, family), specified(x, weight, bias))


@pytest.fixture
def set_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@every_kernel
@pytest.mark.usefixtures("set_threads")
def test_bits_do_not_depend_on_threads(isa: str, family: cpu.Family, dtype: torch.dtype) -> None:
    weight = make_weight(1100, 516)
    for tokens in (1, 6, 50, 130):
        x = torch.randn(tokens, 516, generator=torch.Generator().manual_seed(4)).to(dtype)
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(x, weight, None, isa, family))
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])


@every_kernel
def test_no_tokens(isa: str, family: cpu.Family, dtype: torch.dtype) -> None:
    weight = make_weight(17, 12)
    assert run(torch.zeros(0, 12, dtype=dtype), weight, None, isa, family).shape == (0, 17)


@pytest.mark.parametrize("shape", [(1, 4), (16, 8), (17, 12), (50, 100)])
def test_packing_comes_back_bit_for_bit(shape: tuple[int, int]) -> None:
    weight = make_weight(*shape)
    values, metadata = int8.unpack(*weight.packed, *shape)
    assert torch.equal(values, weight.matrix.values)
    assert torch.equal(metadata, weight.matrix.metadata)
    assert tuple(t.shape for t in weight.packed) == int8.packed_shapes(*shape)


def test_quantization_of_tokens() -> None:
    q, scales = reference.quantize_tokens(
        torch.tensor([[254.0, -254.0, 3.0, 1.0], [0, 0, 0, 0], [1, float("nan"), 0, 0]])
    )
    assert q.tolist() == [[127, -127, 2, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert scales[:2].tolist() == [2, 0]
    assert scales[2].isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_operations_of_both_backends_agree(dtype: torch.dtype) -> None:
    weight = make_weight(20, 24)
    x, bias = torch.randn(2, 3, 24).to(dtype), torch.randn(20).to(dtype)
    canonical = (weight.matrix.values, weight.matrix.metadata)
    native = int8.linear("cpu", x, weight.packed, weight.scales, bias, "2:4", 20, 24)
    plain = int8.linear("reference", x, canonical, weight.scales, bias, "2:4", 20, 24)
    assert native.dtype == dtype
    assert native.shape == (2, 3, 20)
    assert torch.equal(native, plain)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_go_straight_through(name: str) -> None:
    weight = make_weight(20, 24)
    x, bias = torch.randn(3, 24, requires_grad=True), torch.randn(20, requires_grad=True)
    canonical = (weight.matrix.values, weight.matrix.metadata)
    dense = weight.matrix.to_dense().float() * weight.scales[:, None]
    grad = torch.randn(3, 20)
    for backend, operands in (("cpu", weight.packed), ("reference", canonical)):
        before = int8.linear(backend, x, operands, weight.scales, bias, "2:4", 20, 24).detach().requires_grad_()  # type: ignore[arg-type]
        ACTIVATIONS[name](before).backward(grad)
        assert before.grad is not None
        operation = getattr(torch.ops.twofour, f"linear_int8_{backend}").default
        for run in (partial(int8.linear, backend, x, operands), partial(operation, x, *operands)):
            x.grad = bias.grad = None
            run(weight.scales, bias, "2:4", 20, 24, name).backward(grad)
            torch.testing.assert_close(x.grad, before.grad @ dense)
            torch.testing.assert_close(bias.grad, before.grad.sum(0))


def test_operation_passes_torchs_own_check() -> None:
    weight = make_weight(20, 24)
    arguments = (torch.randn(3, 24), *weight.packed, weight.scales, torch.randn(20), "2:4", 20, 24)
    torch.library.opcheck(torch.ops.twofour.linear_int8_cpu.default, arguments)
    inputs = (arguments[0].clone().requires_grad_(), *arguments[1:], "gelu")
    torch.library.opcheck(torch.ops.twofour.linear_int8_cpu.default, inputs)


def test_wrong_arguments_are_named() -> None:
    weight = make_weight(17, 12)
    with pytest.raises(ShapeError, match=r"x is \[3, 8\].*in_features 12"):
        int8.linear_cpu(torch.randn(3, 8), *weight.packed, weight.scales, None, 17, 12)
    with pytest.raises(ShapeError, match=r"scales is \[16\].*\[17\]"):
        int8.linear_cpu(torch.randn(3, 12), *weight.packed, weight.scales[:16], None, 17, 12)
    with pytest.raises(UnsupportedError, match="float16"):
        int8.linear_cpu(torch.randn(3, 12).half(), *weight.packed, weight.scales, None, 17, 12)
    with pytest.raises(UnsupportedError, match="no instruction set 'sse9'"):
        int8.linear_cpu(torch.randn(3, 12), *weight.packed, weight.scales, None, 17, 12, isa="sse9")
    with pytest.raises(ShapeError, match="packed values"):
        int8.linear_cpu(torch.randn(3, 12), weight.matrix.values, weight.packed[1], weight.scales, None, 17, 12)
    with pytest.raises(ShapeError, match="up to 262144"):
        int8.pack(weight.matrix.values, weight.matrix.metadata, 17, (1 << 18) + 4)


def test_isa_is_one_of_the_machine() -> None:
    assert int8.isa() in int8.isas()
    assert int8.isas()[0] == "baseline"

"""NVIDIA's kernels behind torch's operations, on a CPU model of them that multiplies from the compressed bytes."""

from __future__ import annotations

import random
import threading
import warnings
from typing import Any

import pytest
import torch
from tests.kernels.fake_nvidia import NEW, OLD, RENAMED, Barrier, FakeNvidia
from torch import Tensor
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

from twofour import ShapeError, SparseMatrix, UnsupportedError
from twofour.kernels import KERNELS, LinearSpec, epilogue, int8, reference, vendor
from twofour.kernels.cuda import backend
from twofour.kernels.vendor import packing, search, torch_operations
from twofour.nn.quantized import quantize_rows
from twofour.pattern import Pattern
from twofour.testing import assert_same_bits, hostile_tensor, hostile_values, integer_tensor, random_mask

pytestmark = pytest.mark.of_cpu

GPU = torch.device("cuda", 0)
HALVES = (torch.float16, torch.bfloat16)
BYTES = (torch.int8, torch.float8_e4m3fn)
SHAPES = [(16, 16), (32, 64), (1, 4), (5, 12), (33, 68), (64, 128), (31, 132)]
CASES = [
    (library, dtype)
    for library, dtypes in (("cuSPARSELt", HALVES + BYTES), ("CUTLASS", (*HALVES, torch.int8)))
    for dtype in dtypes
]


@pytest.fixture
def nvidia(monkeypatch: pytest.MonkeyPatch) -> FakeNvidia:
    fake = FakeNvidia()
    monkeypatch.setattr(torch_operations, "installed", fake.operations)
    search.clear()
    return fake


def use(nvidia: FakeNvidia, library: str) -> None:
    nvidia.cusparselt, nvidia.capability = (None, (8, 0)) if library == "CUTLASS" else (801, (9, 0))


def spec(
    dtype: torch.dtype = torch.bfloat16,
    shape: tuple[int, int] = (64, 64),
    pattern: str = "2:4",
    device: torch.device | str = GPU,
) -> LinearSpec:
    return LinearSpec(*shape, Pattern.parse(pattern), dtype, torch.device(device))


def hostile_matrix(shape: tuple[int, int], dtype: torch.dtype, pattern: str = "2:4") -> SparseMatrix:
    """-0.0, both NaNs and infinities at kept places, kept zeros, and groups that keep 0, 1 or 2."""
    weight = hostile_tensor(shape, dtype, seed=sum(shape))
    return SparseMatrix.from_dense(weight, pattern, mask=random_mask(shape, "2:4", seed=shape[1]))


def whole_matrix(shape: tuple[int, int], dtype: torch.dtype) -> SparseMatrix:
    """Small whole numbers, so that products are exact in any order; zeros among them."""
    return SparseMatrix.from_dense(integer_tensor(shape, dtype, seed=shape[0]), mask=random_mask(shape, "2:4", seed=1))


def assert_same_matrix(found: SparseMatrix, expected: SparseMatrix) -> None:
    assert (found.shape, found.pattern) == (expected.shape, expected.pattern)
    assert_same_bits(found.values, expected.values)
    assert_same_bits(found.metadata, expected.metadata)


def run(x: Tensor, matrix: SparseMatrix, bias: Tensor | None = None, **more: Any) -> Tensor:
    return vendor.linear(x, *vendor.pack(matrix), bias, matrix.pattern, *matrix.shape, **more)


def expected_of(x: Tensor, matrix: SparseMatrix, bias: Tensor | None = None) -> Tensor:
    y = x.double() @ matrix.to_dense().double().T
    return (y if bias is None else y + bias.double()).to(x.dtype)


# Why not


@pytest.mark.parametrize(
    ("asked", "facts", "reason"),
    [
        (spec(device="cpu"), {}, "the weight is on cpu"),
        (spec(device="meta"), {}, "the weight is on meta"),
        (spec(shape=(0, 64)), {}, "the weight is empty"),
        (spec(shape=(64, 0)), {}, "the weight is empty"),
        (spec(pattern="1:4"), {}, "pattern 1:4 has no kernel of NVIDIA's, only 2:4"),
        (spec(pattern="4:8"), {}, "pattern 4:8 has no kernel of NVIDIA's, only 2:4"),
        (
            spec(torch.float32),
            {},
            "float32 has no kernel of NVIDIA's for 2:4, only float16, bfloat16, int8, float8_e4m3fn",
        ),
        (
            spec(torch.float8_e5m2),
            {},
            "float8_e5m2 has no kernel of NVIDIA's for 2:4, only float16, bfloat16, int8, float8_e4m3fn",
        ),
        (spec(torch.int8), {}, "int8 weights take int8 inputs there, and a layer's have 16 bits or more"),
        (spec(), {"capability": (7, 5)}, "compute capability 7.5 has no sparse tensor cores: they came with 8.0"),
        (
            spec(),
            {"cusparselt": None},
            "cuSPARSELt: this build of torch has none, and CUTLASS: torch has it for compute capability 8.x, not 9.0",
        ),
        (
            spec(),
            {"cusparselt": 400},
            "cuSPARSELt: 0.4.0 is too old for bfloat16 on 9.0, 0.6.2 is the first, and CUTLASS: torch has it for"
            " compute capability 8.x, not 9.0",
        ),
        (
            spec(),
            {"cusparselt": 602, "capability": (10, 0)},
            "cuSPARSELt: 0.6.2 is too old for bfloat16 on 10.0, 0.7.0 is the first, and CUTLASS: torch has it for"
            " compute capability 8.x, not 10.0",
        ),
        (
            spec(),
            {"cusparselt": 701, "capability": (12, 1)},
            "cuSPARSELt: 0.7.1 is too old for bfloat16 on 12.1, 0.8.0 is the first, and CUTLASS: torch has it for"
            " compute capability 8.x, not 12.1",
        ),
        (
            spec(),
            {"cusparselt": None, "capability": (8, 6), "cutlass": "torch has none on Windows"},
            "cuSPARSELt: this build of torch has none, and CUTLASS: torch has none on Windows",
        ),
    ],
)
def test_it_says_why_not(nvidia: FakeNvidia, asked: LinearSpec, facts: dict[str, Any], reason: str) -> None:
    for name, fact in facts.items():
        setattr(nvidia, name, fact)
    assert vendor.why_not(asked) == reason


@pytest.mark.parametrize(
    ("dtype", "facts", "reason"),
    [
        (
            torch.float8_e4m3fn,
            {"capability": (8, 6)},
            "compute capability 8.6 has no tensor cores for float8_e4m3fn: they came with 8.9",
        ),
        (
            torch.float8_e4m3fn,
            {"capability": (8, 9), "cusparselt": 701},
            "cuSPARSELt: 0.7.1 is too old for float8_e4m3fn on 8.9, 0.8.0 is the first, and CUTLASS: torch has none for"
            " float8_e4m3fn",
        ),
        (torch.float8_e4m3fn, {"capability": (8, 9)}, None),
        (torch.float8_e4m3fn, {"capability": (9, 0), "cusparselt": 602}, None),
        (torch.int8, {"capability": (8, 0), "cusparselt": None}, None),
        (torch.int8, {}, None),
    ],
)
def test_weights_of_8_bits_with_inputs_of_their_dtype(
    nvidia: FakeNvidia, dtype: torch.dtype, facts: dict[str, Any], reason: str | None
) -> None:
    for name, fact in facts.items():
        setattr(nvidia, name, fact)
    assert vendor.why_not(spec(dtype), dtype) == reason


def test_what_it_runs(nvidia: FakeNvidia) -> None:
    for capability in ((8, 0), (8, 9), (9, 0), (10, 0), (12, 0), (12, 1), (13, 0)):
        nvidia.capability = capability
        for dtype in HALVES:
            for pattern in ("2:4", "2:4x4", "2:4t"):
                for shape in ((1, 4), (33, 68)):
                    assert vendor.why_not(spec(dtype, shape, pattern)) is None
    assert vendor.why_not(spec(torch.bfloat16), torch.float16) == (
        "bfloat16 weights take bfloat16 inputs there, not float16"
    )


FAULTS = (
    "cuSPARSELt: 0.8.0 faults in float16 on 9.0 (an illegal instruction, and the process has lost its GPU): use"
    " backend='cuda', bfloat16 or a torch built with a newer one, and CUTLASS: torch has it for compute capability 8.x,"
    " not 9.0"
)


def test_float16_never_reaches_the_version_that_faults(nvidia: FakeNvidia, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "missing", lambda: None)
    nvidia.cusparselt = 800
    assert vendor.why_not(spec(torch.float16)) == FAULTS
    assert KERNELS["vendor"].why_not(spec(torch.float16)) == FAULTS
    assert KERNELS["vendor"].why_not(spec(torch.bfloat16)) is None
    assert f"cuSPARSELt: {vendor.cusparselt_why_not(torch.float16, GPU)}, and" in FAULTS
    matrix = whole_matrix((32, 64), torch.float16)
    with pytest.raises(
        UnsupportedError, match=r"float16 cannot be packed for NVIDIA's kernels: cuSPARSELt: 0.8.0 faults"
    ):
        vendor.pack(matrix)
    assert nvidia.calls == []
    nvidia.cusparselt = 801
    operands = vendor.pack(matrix)
    nvidia.cusparselt = 800  # the model faults as the version does
    with pytest.raises(RuntimeError, match="illegal instruction"):
        vendor.linear(integer_tensor((8, 64), torch.float16), *operands, None, "2:4", 32, 64)
    with pytest.raises(RuntimeError, match="illegal instruction"):
        run(integer_tensor((8, 64), torch.bfloat16), whole_matrix((32, 64), torch.bfloat16))


@pytest.mark.parametrize("dtype", HALVES + BYTES, ids=str)
@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)], ids=str)
@pytest.mark.parametrize("version", [701, 800, 801, 900])
def test_no_other_combination_is_refused_for_the_fault(
    nvidia: FakeNvidia, version: int, capability: tuple[int, int], dtype: torch.dtype
) -> None:
    nvidia.cusparselt, nvidia.capability = version, capability
    reason = vendor.cusparselt_why_not(dtype, GPU)
    assert ("faults" in (reason or "")) == ((version, capability, dtype) == (800, (9, 0), torch.float16))


def test_float16_runs_where_it_does_not_fault(nvidia: FakeNvidia) -> None:
    nvidia.cusparselt, nvidia.capability = 800, (8, 0)
    assert vendor.why_not(spec(torch.float16)) is None
    matrix, x = whole_matrix((32, 64), torch.float16), integer_tensor((8, 64), torch.float16)
    assert torch.equal(run(x, matrix), expected_of(x, matrix))
    nvidia.cusparselt, nvidia.capability = 801, (9, 0)
    assert torch.equal(run(x, matrix), expected_of(x, matrix))


def test_rocm_is_not_tried(nvidia: FakeNvidia, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert vendor.why_not(spec()) == "torch is built for ROCm, whose hipSPARSELt was not tried"
    assert torch_operations._cutlass() == "torch is built for ROCm"


@pytest.mark.parametrize(
    ("number", "text"),
    [(602, "0.6.2"), (800, "0.8.0"), (801, "0.8.1"), (1000, "0.10.0")],
)
def test_the_label_has_the_version(nvidia: FakeNvidia, number: int, text: str) -> None:
    nvidia.cusparselt = number
    assert (vendor.label(), vendor.version()) == (f"cuSPARSELt {text}", text)


def test_the_label_without_cusparselt(nvidia: FakeNvidia) -> None:
    nvidia.cusparselt = None
    assert (vendor.label(), vendor.version()) == ("CUTLASS", None)
    nvidia.cusparselt = 400
    assert (vendor.label(), vendor.version()) == ("CUTLASS", "0.4.0")


def test_this_torch_has_the_operations() -> None:
    found = torch_operations.installed()
    assert {"bias", "out_dtype", "transpose_result", "alg_id"} <= found.sparse_mm_arguments
    if torch.version.cuda is None:
        assert found.cusparselt is None
        assert found.cutlass is not None
        assert found.search is None


# There and back


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("library", "dtype"), CASES, ids=str)
def test_there_and_back_bit_for_bit(
    nvidia: FakeNvidia, library: str, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    use(nvidia, library)
    matrix = hostile_matrix(shape, dtype)
    values, metadata = vendor.pack(matrix)
    assert packing.library_of(metadata) == library
    assert_same_matrix(vendor.unpack(values, metadata, matrix.pattern, *shape), matrix)
    assert_same_bits(vendor.to_dense(values, metadata, "2:4", *shape), matrix.to_dense())
    copied = vendor.copy(values, metadata)
    for twin, own in zip(copied, (values, metadata), strict=True):
        assert twin.data_ptr() != own.data_ptr()
        assert_same_bits(twin, own)
    before = matrix.values.clone()
    values.view(torch.uint8).fill_(0)
    assert_same_bits(
        matrix.values if library == "cuSPARSELt" else before, before
    )  # its buffer is no view of the matrix
    assert_same_matrix(vendor.unpack(*copied, matrix.pattern, *shape), SparseMatrix(before, *_rest(matrix)))


def _rest(matrix: SparseMatrix) -> tuple[Tensor, Pattern, tuple[int, int]]:
    return matrix.metadata, matrix.pattern, matrix.shape


@pytest.mark.parametrize("library", ["cuSPARSELt", "CUTLASS"])
@pytest.mark.parametrize("pattern", ["2:4x4", "2:4t"])
def test_patterns_that_are_2_4_too(nvidia: FakeNvidia, library: str, pattern: str) -> None:
    use(nvidia, library)
    matrix = SparseMatrix.from_dense(torch.randn(32, 36).half(), pattern, prune=True)
    assert_same_matrix(vendor.unpack(*vendor.pack(matrix), matrix.pattern, *matrix.shape), matrix)


@pytest.mark.parametrize("dtype", HALVES + BYTES, ids=str)
def test_every_place_is_kept_as_the_metadata_say(nvidia: FakeNvidia, dtype: torch.dtype) -> None:
    """All weights zero, of either sign: only metadata know what is kept, and the buffer's own must agree with ours."""
    zero = 0.0 if dtype == torch.int8 else -0.0
    shape = (32, 64)
    mask = random_mask(shape, "2:4", full=True)
    matrix = SparseMatrix.from_dense(torch.full(shape, zero).to(dtype), mask=mask)
    values, _ = vendor.pack(matrix)
    _, columns = nvidia.decompressed(values, shape[1])
    assert torch.equal(torch.zeros(shape, dtype=torch.bool).scatter(1, columns, True), mask)


@pytest.mark.parametrize("dtype", HALVES + BYTES, ids=str)
def test_the_compressor_never_sees_the_weight(nvidia: FakeNvidia, dtype: torch.dtype) -> None:
    vendor.pack(hostile_matrix((33, 68), dtype))
    (seen,) = nvidia.named("compress")
    markers = seen["dense"].float()
    assert bool(((markers.view(*markers.shape[:1], -1, 4) != 0).sum(-1) == 2).all())
    kept = markers[markers != 0]
    least = 0.0 if dtype == torch.int8 else torch.finfo(dtype).smallest_normal
    assert bool((kept >= least).all())
    assert bool(kept.isfinite().all())


@pytest.mark.parametrize("dtype", HALVES + BYTES, ids=str)
@pytest.mark.parametrize("shape", [(1024, 512), (96, 30720), (64, 61440), (128, 476)], ids=str)
def test_rows_of_markers_differ_and_are_no_shifts_of_each_other(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    markers = packing._bits(packing._markers(torch.empty(shape[0], shape[1] // 2, dtype=dtype)))
    assert len(markers.unique(dim=0)) == shape[0]
    assert len(markers[:, ::2].unique(dim=0)) == shape[0]
    for step in (1, 2, 4, 8, 16, 32):
        assert not torch.equal(markers[1:, step:], markers[:-1, :-step])
        assert not torch.equal(markers[:, step:], markers[:, :-step])


@pytest.mark.parametrize("dtype", HALVES + BYTES, ids=str)
@pytest.mark.parametrize(
    "order",
    [
        lambda values: values.flip(0),
        lambda values: values.flip(1),
        lambda values: values.view(2, -1, values.shape[1]).flip(0).reshape(values.shape),
        lambda values: values.view(values.shape[0], -1, 2).flip(-1).reshape(values.shape),
    ],
    ids=["rows", "columns", "halves", "pairs"],
)
def test_values_in_another_order_are_noticed_and_kept_twice(nvidia: FakeNvidia, dtype: torch.dtype, order: Any) -> None:
    nvidia.order = order
    matrix = hostile_matrix((33, 68), dtype)
    with pytest.warns(UserWarning, match="cuSPARSELt 0.8.1 does not hold the kept values row by row"):
        operands = vendor.pack(matrix)
    assert operands[1].ndim == 1
    assert_same_matrix(vendor.unpack(*operands, matrix.pattern, 33, 68), matrix)
    assert_same_matrix(vendor.unpack(*vendor.copy(*operands), matrix.pattern, 33, 68), matrix)
    if dtype.itemsize == 2:
        whole = whole_matrix((33, 68), dtype)
        x = integer_tensor((5, 68), dtype)
        with warnings.catch_warnings(action="ignore"):
            assert_same_bits(run(x, whole), expected_of(x, whole))


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 2), (2, 1), (3, 3), (4, 8), (5, 13)])
@pytest.mark.parametrize("dtype", [*HALVES, torch.int8], ids=str)
def test_cutlass_operands_are_those_of_torch(nvidia: FakeNvidia, dtype: torch.dtype, rows: int, columns: int) -> None:
    use(nvidia, "CUTLASS")
    multiple = packing.multiples("CUTLASS", dtype)
    shape = (rows * multiple.rows, columns * multiple.columns)
    weight = hostile_tensor(shape, dtype, finite=True)
    weight = torch.where(random_mask(shape, "2:4") & (weight != 0), weight, torch.zeros_like(weight))
    values, words = vendor.pack(SparseMatrix.from_dense(weight))
    expected_values, expected_words = sparse_semi_structured_from_dense_cutlass(weight)
    assert_same_bits(values, expected_values)
    assert_same_bits(words, expected_words)


def test_what_has_no_layout_is_refused(nvidia: FakeNvidia) -> None:
    with pytest.raises(UnsupportedError, match="a 1:4 matrix has no layout of NVIDIA's: it is for 2:4 only"):
        vendor.pack(SparseMatrix.from_dense(torch.zeros(16, 16).half(), "1:4"))
    with pytest.raises(
        UnsupportedError, match="float32 cannot be packed for NVIDIA's kernels: it has no kernel for 2:4"
    ):
        vendor.pack(SparseMatrix.from_dense(torch.zeros(16, 16)))
    nvidia.cusparselt = None
    with pytest.raises(
        UnsupportedError,
        match="float16 cannot be packed for NVIDIA's kernels: cuSPARSELt: this build of torch has none",
    ):
        vendor.pack(SparseMatrix.from_dense(torch.zeros(16, 16).half()))


# Products


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 33])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("library", ["cuSPARSELt", "CUTLASS"])
def test_products_are_those_of_the_dense_weight(
    nvidia: FakeNvidia, library: str, dtype: torch.dtype, tokens: int, shape: tuple[int, int]
) -> None:
    use(nvidia, library)
    matrix = whole_matrix(shape, dtype)
    x, bias = integer_tensor((tokens, shape[1]), dtype, seed=2), integer_tensor((shape[0],), dtype, seed=3)
    y = run(x, matrix, bias)
    assert y.is_contiguous()
    assert torch.equal(y, expected_of(x, matrix, bias))
    assert torch.equal(run(x, matrix), expected_of(x, matrix))


@pytest.mark.parametrize("library", ["cuSPARSELt", "CUTLASS"])
def test_dropped_places_are_not_read(nvidia: FakeNvidia, library: str) -> None:
    use(nvidia, library)
    matrix = whole_matrix((33, 68), torch.bfloat16)
    x = integer_tensor((4, 68), torch.bfloat16)
    hostile = x.clone()
    hostile[1, 3], hostile[2, 67] = torch.nan, torch.inf
    y, clean = run(hostile, matrix), expected_of(x, matrix)
    kept = matrix.mask()
    for token, column in ((1, 3), (2, 67)):
        assert torch.equal(y[token, ~kept[:, column]], clean[token, ~kept[:, column]])
        assert not bool(y[token, kept[:, column]].isfinite().any())
    assert torch.equal(y[[0, 3]], clean[[0, 3]])


@pytest.mark.parametrize("library", ["cuSPARSELt", "CUTLASS"])
def test_hostile_weights_reach_the_outputs_that_they_are_in(nvidia: FakeNvidia, library: str) -> None:
    use(nvidia, library)
    matrix = hostile_matrix((40, 64), torch.float16)
    y = run(torch.eye(64, dtype=torch.float16), matrix).T
    dense, kept = matrix.to_dense(), matrix.mask()
    bad = ~dense.isfinite()
    alone = kept & (bad.sum(1, keepdim=True) == 0)
    assert torch.equal(y[alone], dense[alone])
    assert torch.equal(y.isnan().any(1) | y.isinf().any(1), bad.any(1))


@pytest.mark.parametrize("library", ["cuSPARSELt", "CUTLASS"])
def test_inputs_of_every_shape_and_stride(nvidia: FakeNvidia, library: str) -> None:
    use(nvidia, library)
    matrix = whole_matrix((32, 64), torch.float16)
    operands = vendor.pack(matrix)
    wide = integer_tensor((2, 6, 4, 128), torch.float16)
    storage = integer_tensor((8 * 64 + 1,), torch.float16)
    for x in (
        wide[..., :64],
        wide[..., ::2],
        wide[..., :64].transpose(0, 2),
        wide[0, 0, 0, :64],
        wide[0, 0, :1, :64].expand(8, 64),
        integer_tensor((64, 8), torch.float16).T,
        storage[1:].view(8, 64),
        storage[:-1].view(8, 64),
    ):
        y = vendor.linear(x, *operands, None, "2:4", 32, 64)
        assert y.shape == (*x.shape[:-1], 32)
        assert y.is_contiguous()
        assert torch.equal(y, expected_of(x, matrix))


def test_misaligned_operands_are_moved(nvidia: FakeNvidia) -> None:
    matrix = whole_matrix((32, 64), torch.float16)
    values, metadata = vendor.pack(matrix)
    shifted = torch.empty(values.numel() + 1, dtype=values.dtype)[1:].view(values.shape).copy_(values)
    assert shifted.data_ptr() % 16
    bias = integer_tensor((33,), torch.float16)[1:]
    x = integer_tensor((8, 64), torch.float16)
    y = vendor.linear(x, shifted, metadata, bias, "2:4", 32, 64)
    assert torch.equal(y, expected_of(x, matrix, bias))
    assert nvidia.named("sparse_mm")[-1]["bias"].data_ptr() % 16 == 0


@pytest.mark.parametrize("library", ["cuSPARSELt", "CUTLASS"])
def test_no_tokens(nvidia: FakeNvidia, library: str) -> None:
    use(nvidia, library)
    matrix = whole_matrix((33, 68), torch.bfloat16)
    for shape in ((0, 68), (3, 0, 68), (0, 0, 68)):
        y = run(torch.empty(shape, dtype=torch.bfloat16), matrix, torch.zeros(33).bfloat16(), activation="gelu")
        assert (y.shape, y.dtype) == ((*shape[:-1], 33), torch.bfloat16)
    assert not nvidia.named("sparse_mm")
    assert not nvidia.named("cutlass_addmm")


def test_nothing_is_copied_that_fits(nvidia: FakeNvidia) -> None:
    matrix = whole_matrix((32, 64), torch.float16)
    values, metadata = vendor.pack(matrix)
    x, bias = integer_tensor((16, 64), torch.float16), integer_tensor((32,), torch.float16)
    vendor.linear(x, values, metadata, bias, "2:4", 32, 64)
    call = nvidia.named("sparse_mm")[-1]
    assert call["dense"].data_ptr() == x.data_ptr()
    assert call["compressed"].data_ptr() == values.data_ptr()
    assert call["bias"].data_ptr() == bias.data_ptr()
    assert call["transpose_result"] is True
    assert metadata.data_ptr() == matrix.metadata.data_ptr()


@pytest.mark.parametrize("library", ["cuSPARSELt", "CUTLASS"])
@pytest.mark.parametrize("activation", sorted(epilogue.ACTIVATIONS))
def test_activation_and_residual_follow(nvidia: FakeNvidia, library: str, activation: str) -> None:
    use(nvidia, library)
    matrix = whole_matrix((33, 68), torch.bfloat16)
    x, bias = integer_tensor((2, 3, 68), torch.bfloat16), integer_tensor((33,), torch.bfloat16)
    residual = torch.randn(2, 3, 33).bfloat16()
    y = run(x, matrix, bias, activation=activation, residual=residual)
    assert torch.equal(y, epilogue.finish(expected_of(x, matrix, bias), activation, residual))


@pytest.mark.parametrize("library", ["cuSPARSELt", "CUTLASS"])
def test_a_bias_of_another_dtype_is_added_in_float32(nvidia: FakeNvidia, library: str) -> None:
    use(nvidia, library)
    matrix = whole_matrix((33, 68), torch.bfloat16)
    x, bias = integer_tensor((5, 68), torch.bfloat16), torch.randn(33)
    residual = torch.randn(5, 33).bfloat16()
    y = run(x, matrix, bias, activation="silu", residual=residual)
    before = expected_of(x, matrix).float() + bias
    assert torch.equal(y, torch.nn.functional.silu(before).bfloat16() + residual)
    assert all(call["bias"] is None for call in nvidia.named("sparse_mm"))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("library", "dtype"), [case for case in CASES if case[1] in BYTES], ids=str)
def test_products_of_8_bits(nvidia: FakeNvidia, library: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    use(nvidia, library)
    weight = integer_tensor(shape, dtype) if dtype != torch.int8 else torch.randint(-128, 128, shape).to(dtype)
    matrix = SparseMatrix.from_dense(weight, mask=random_mask(shape, "2:4"))
    x = integer_tensor((2, 9, shape[1]), dtype)
    y = vendor.products(x, *vendor.pack(matrix), *shape)
    assert y.dtype == (torch.int32 if dtype == torch.int8 else torch.float32)
    assert torch.equal(y.double(), x.double() @ matrix.to_dense().double().T)
    assert vendor.products(x[:, :0], *vendor.pack(matrix), *shape).shape == (2, 0, shape[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("library", ["cuSPARSELt", "CUTLASS"])
def test_int8_layers_give_the_bits_of_the_reference(nvidia: FakeNvidia, library: str, dtype: torch.dtype) -> None:
    use(nvidia, library)
    weight = SparseMatrix.from_dense(torch.randn(33, 68), prune=True)
    matrix, scales = quantize_rows(weight)
    x = torch.randn(2, 5, 68).to(dtype)
    x[1, 2, 3] = float("nan")
    for bias in (None, torch.randn(33), torch.randn(33).to(dtype)):
        for activation in ("none", "gelu"):
            found = vendor.linear_int8(x, *vendor.pack(matrix), scales, bias, matrix.pattern, *matrix.shape, activation)
            wanted = reference.linear_int8(
                x, matrix.values, matrix.metadata, scales, bias, matrix.pattern, 68, activation
            )
            assert_same_bits(found, wanted)
    assert (
        int8.KERNELS["vendor"].why_not(spec(torch.int8, (33, (1 << 18) + 4)))
        == "in_features 262148 is not in 1 .. 262144"
    )
    assert int8.KERNELS["vendor"].why_not(spec(torch.int8, device="cpu")) == "the weight is on cpu"


def test_products_that_there_are_not(nvidia: FakeNvidia) -> None:
    matrix = whole_matrix((32, 64), torch.int8)
    operands = vendor.pack(matrix)
    x = integer_tensor((4, 64), torch.int8)
    assert vendor.products(x, *operands, 32, 64, torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(UnsupportedError, match="int8 products are not written as torch.float32 by cuSPARSELt"):
        vendor.products(x, *operands, 32, 64, torch.float32)
    with pytest.raises(UnsupportedError, match="x is torch.float16, the weight torch.int8: products"):
        vendor.products(x.half(), *operands, 32, 64)
    use(nvidia, "CUTLASS")
    with pytest.raises(UnsupportedError, match="int8 products are not written as torch.bfloat16 by CUTLASS"):
        vendor.products(x, *vendor.pack(matrix), 32, 64, torch.bfloat16)


def test_inputs_that_do_not_fit(nvidia: FakeNvidia) -> None:
    matrix = whole_matrix((32, 64), torch.float16)
    values, metadata = vendor.pack(matrix)
    x = torch.zeros(2, 64).half()
    with pytest.raises(UnsupportedError, match=r"x is torch.float32, the weight torch.float16: .*backend='reference'"):
        vendor.linear(x.float(), values, metadata, None, "2:4", 32, 64)
    with pytest.raises(ShapeError, match=r"x is \[2, 32\]: its last axis must be in_features 64"):
        vendor.linear(x[:, :32], values, metadata, None, "2:4", 32, 64)
    with pytest.raises(ShapeError, match=r"x is \[\]: its last axis must be in_features 64"):
        vendor.linear(torch.zeros(()).half(), values, metadata, None, "2:4", 32, 64)
    with pytest.raises(ShapeError, match=r"bias is \[31\]: it must be \[32\]"):
        vendor.linear(x, values, metadata, x[0, :31], "2:4", 32, 64)
    with pytest.raises(UnsupportedError, match="x is on meta, values on cpu: put them on one device"):
        vendor.linear(x.to("meta"), values, metadata, None, "2:4", 32, 64)
    with pytest.raises(UnsupportedError, match="x is on cpu, bias on meta: put them on one device"):
        vendor.linear(x, values, metadata, torch.zeros(32, device="meta").half(), "2:4", 32, 64)
    for wrong in ((32, 128), (64, 64), (48, 64)):
        with pytest.raises(ShapeError, match=rf"a weight of \[{wrong[0]}, {wrong[1]}\] needs what pack\(\) returned"):
            vendor.unpack(values, metadata, "2:4", *wrong)
        with pytest.raises(ShapeError, match=rf"a weight of \[{wrong[0]}, {wrong[1]}\] needs what pack\(\) returned"):
            vendor.linear(torch.zeros(2, wrong[1]).half(), values, metadata, None, "2:4", *wrong)
    with pytest.raises(ShapeError, match=r"needs what pack\(\) returned"):
        vendor.unpack(values, metadata.short(), "2:4", 32, 64)


# The search


def call_with(nvidia: FakeNvidia, tokens: int, matrix: SparseMatrix | None = None) -> dict[str, Any]:
    """The arguments of the product of so many tokens."""
    matrix = whole_matrix((32, 64), torch.float16) if matrix is None else matrix
    x = integer_tensor((tokens, matrix.in_features), matrix.dtype)
    assert torch.equal(run(x, matrix), expected_of(x, matrix))
    return {name: value for name, value in nvidia.named("sparse_mm")[-1].items() if name in NEW | RENAMED}


def test_each_shape_is_searched_once(nvidia: FakeNvidia) -> None:
    for tokens in (9, 16, 12, 33, 64, 16, 9):
        assert call_with(nvidia, tokens)["alg_id"] == 7
    assert [call["tokens"] for call in nvidia.named("search")] == [16, 40]
    call_with(nvidia, 16, whole_matrix((32, 64), torch.bfloat16))
    call_with(nvidia, 16, whole_matrix((48, 64), torch.float16))
    call_with(nvidia, 16, whole_matrix((32, 80), torch.float16))
    assert len(nvidia.named("search")) == 5
    matrix = whole_matrix((32, 64), torch.float16)
    run(integer_tensor((16, 64), torch.float16), matrix, torch.zeros(32).half())
    assert len(nvidia.named("search")) == 6
    packed = vendor.pack(whole_matrix((32, 64), torch.int8))
    for out_dtype in (None, torch.int32, torch.bfloat16):
        vendor.products(integer_tensor((16, 64), torch.int8), *packed, 32, 64, out_dtype)
    assert [call["out_dtype"] for call in nvidia.named("search")[6:]] == [torch.int32, torch.bfloat16]


@pytest.mark.parametrize(
    ("arguments", "found", "named"),
    [
        (NEW, (7, 1, -1, 40), {"alg_id": 7}),
        (NEW, (7, 4, 2, 40), {"alg_id": 7, "split_k": 4, "split_k_mode": 2}),
        (NEW, (7, -1, -1, 40), {"alg_id": 7, "split_k": -1}),
        (NEW, (0, 1, 5, 40), {}),
        (RENAMED, (7, 4, True, 40), {"alg_id": 7, "split_k": 4, "split_k_one_kernel": True}),
        (RENAMED, (7, 1, True, 40), {"alg_id": 7}),
        (OLD, (7, 1, -1, 40), {"alg_id": 7}),
        (OLD, (7, 4, 2, 40), {}),
        (OLD - {"alg_id"}, (7, 1, -1, 40), {}),
    ],
)
def test_torch_is_told_by_the_names_it_has(
    nvidia: FakeNvidia, arguments: frozenset[str], found: tuple[Any, ...], named: dict[str, Any]
) -> None:
    nvidia.arguments, nvidia.found = arguments, found
    call = call_with(nvidia, 16)
    assert {name: call[name] for name in call if "split" in name or name == "alg_id"} == named
    assert all(set(each) - {"compressed", "dense"} <= arguments for each in nvidia.named("sparse_mm"))


def test_an_older_torch_searches_by_its_operation(nvidia: FakeNvidia) -> None:
    nvidia.has_search = False
    assert call_with(nvidia, 16)["alg_id"] == 7
    assert len(nvidia.named("search_id")) == 1


def test_a_torch_without_a_search_runs_the_default(nvidia: FakeNvidia) -> None:
    nvidia.has_search = nvidia.has_search_id = False
    assert "alg_id" not in call_with(nvidia, 16)


@pytest.mark.parametrize("error", [RuntimeError, TypeError])
def test_a_search_that_fails_is_not_tried_again(nvidia: FakeNvidia, error: type[Exception]) -> None:
    def fail() -> None:
        nvidia.searching = 0
        raise error

    nvidia.during_search = fail
    for _ in range(2):
        assert "alg_id" not in call_with(nvidia, 16)
    assert len(nvidia.named("search")) == 1


def test_want_of_memory_is_no_reason_against_an_algorithm(nvidia: FakeNvidia) -> None:
    def fail() -> None:
        nvidia.searching = 0
        raise torch.OutOfMemoryError

    nvidia.during_search = fail
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError):
            call_with(nvidia, 16)
    nvidia.during_search = lambda: None
    assert call_with(nvidia, 16)["alg_id"] == 7


def test_an_algorithm_that_is_wrong_is_not_taken(nvidia: FakeNvidia) -> None:
    nvidia.wrong = frozenset({7})
    for tokens in (16, 40):
        assert "alg_id" not in call_with(nvidia, tokens)
    assert len(nvidia.named("search")) == 2


def test_weights_that_are_not_finite_do_not_discredit_an_algorithm(nvidia: FakeNvidia) -> None:
    run(torch.zeros(16, 64).half(), hostile_matrix((32, 64), torch.float16))
    assert nvidia.named("sparse_mm")[-1]["alg_id"] == 7


def test_an_algorithm_that_does_not_run_with_other_tokens_is_given_up(nvidia: FakeNvidia) -> None:
    assert call_with(nvidia, 16)["alg_id"] == 7
    nvidia.refused = lambda alg_id, tokens: alg_id == 7
    nvidia.calls.clear()
    for _ in range(2):
        assert "alg_id" not in call_with(nvidia, 16)
    assert sum("alg_id" in call for call in nvidia.named("sparse_mm")) == 1
    assert not nvidia.named("search")


def test_what_is_wrong_with_every_algorithm_is_raised(nvidia: FakeNvidia) -> None:
    assert call_with(nvidia, 16)["alg_id"] == 7
    nvidia.refused = lambda alg_id, tokens: True
    with pytest.raises(RuntimeError, match="cusparseLtMatmulPlanInit"):
        call_with(nvidia, 16)
    nvidia.refused = lambda alg_id, tokens: False
    assert call_with(nvidia, 16)["alg_id"] == 7  # it was not to blame


def test_nothing_is_searched_while_a_graph_is_captured(nvidia: FakeNvidia) -> None:
    call_with(nvidia, 16)
    nvidia.capturing = True
    assert call_with(nvidia, 16)["alg_id"] == 7
    assert "alg_id" not in call_with(nvidia, 40)
    assert len(nvidia.named("search")) == 1
    nvidia.capturing = False
    assert call_with(nvidia, 40)["alg_id"] == 7


def test_a_deterministic_torch_keeps_to_the_default(nvidia: FakeNvidia) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        assert "alg_id" not in call_with(nvidia, 16)
    finally:
        torch.use_deterministic_algorithms(False)
    assert not nvidia.named("search")


def test_threads_search_one_after_the_other_and_once(nvidia: FakeNvidia) -> None:
    nvidia.during_search = barrier = Barrier()
    matrix = whole_matrix((32, 64), torch.float16)
    operands = vendor.pack(matrix)
    results: list[Tensor] = []

    def work(tokens: int) -> None:
        x = integer_tensor((tokens, 64), torch.float16)
        y = vendor.linear(x, *operands, None, "2:4", 32, 64)
        results.append((y == expected_of(x, matrix)).all())

    sizes = [16, 16, 16, 40, 40, 9]
    random.Random(0).shuffle(sizes)
    threads = [threading.Thread(target=work, args=(tokens,)) for tokens in sizes]
    for thread in threads:
        thread.start()
    assert barrier.inside.wait(30)
    for thread in threads:  # while one searches, none of the others gets in
        thread.join(0.05)
    assert nvidia.searching == 1
    barrier.leave.set()
    for thread in threads:
        thread.join(30)
    assert len(results) == len(sizes)
    assert all(results)
    assert sorted(call["tokens"] for call in nvidia.named("search")) == [16, 40]


def test_a_binding_runs_on_the_device_of_its_operands() -> None:
    assert torch_operations._on_device(None) is None
    run_search = torch_operations._on_device(lambda *arguments: len(arguments))
    assert run_search is not None
    assert run_search(torch.zeros(1), 2, 3) == 3


def test_hostile_values_are_what_they_are_said_to_be() -> None:
    """The cases above rest on them."""
    for dtype in HALVES:
        values = hostile_values(dtype)
        assert bool(((values == 0) & values.signbit()).any())
        assert bool(values.isnan().any())
        assert bool(values.isinf().any())

"""NVIDIA's kernels themselves, where there is a GPU: all that the CPU model in tests/kernels/fake_nvidia.py takes on trust.

`python -m pytest tests/gpu/test_vendor.py` on a machine with a GPU of compute capability 8.0 or later.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from twofour import SparseMatrix
from twofour.kernels import LinearSpec, vendor
from twofour.kernels.vendor import packing, search, torch_operations
from twofour.testing import assert_same_bits, assert_within_bound, hostile_tensor, integer_tensor, random_mask

GPU = torch.device("cuda", 0)
HALVES = (torch.float16, torch.bfloat16)
BYTES = (torch.int8, torch.float8_e4m3fn)
SHAPES = [(16, 16), (1, 4), (33, 68), (128, 256), (512, 1024), (1000, 700), (4096, 4096)]

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("error:.*does not hold the kept values"),
]


@pytest.fixture(autouse=True, params=["cuSPARSELt", "CUTLASS"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Each library in turn, CUTLASS as if torch had no cuSPARSELt."""
    found = torch_operations.installed()
    if request.param == "CUTLASS":
        if found.capability(GPU)[0] != 8:
            pytest.skip("torch's CUTLASS is for compute capability 8.x")
        found = dataclasses.replace(found, cusparselt=None)
    monkeypatch.setattr(torch_operations, "installed", lambda: found)
    search.clear()
    yield request.param
    search.clear()


def on_gpu(weight: Tensor, mask: Tensor) -> SparseMatrix:
    """Packed for the kernels only if `why_not` has nothing against it, else the test is skipped with the reason."""
    matrix = SparseMatrix.from_dense(weight, mask=mask).to(GPU)
    reason = vendor.why_not(LinearSpec.of(matrix), matrix.dtype)
    if reason is not None:
        pytest.skip(reason)
    return matrix


def whole_matrix(shape: tuple[int, int], dtype: torch.dtype) -> SparseMatrix:
    return on_gpu(integer_tensor(shape, dtype, seed=shape[0]), random_mask(shape, "2:4", seed=1))


def expected_of(x: Tensor, matrix: SparseMatrix, bias: Tensor | None = None) -> Tensor:
    y = x.double() @ matrix.to_dense().double().T
    return (y if bias is None else y + bias.double()).to(x.dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", HALVES + BYTES, ids=str)
def test_there_and_back_bit_for_bit(library: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """A buffer that does not begin with the values warns, and a warning fails here."""
    matrix = on_gpu(hostile_tensor(shape, dtype), random_mask(shape, "2:4"))
    values, metadata = vendor.pack(matrix)
    assert packing.library_of(metadata) == library
    back = vendor.unpack(values, metadata, matrix.pattern, *shape)
    assert_same_bits(back.values, matrix.values)
    assert_same_bits(back.metadata, matrix.metadata)


@pytest.mark.parametrize("dtype", HALVES + BYTES, ids=str)
def test_markers_give_the_buffer_of_the_weight(library: str, dtype: torch.dtype) -> None:
    """Where every kept number is not zero, NVIDIA's compressor must make the same bytes of the weight itself."""
    if library == "CUTLASS":
        pytest.skip("has no compressor")
    shape = (512, 1024)
    matrix = on_gpu(torch.ones(shape).to(dtype), random_mask(shape, "2:4", full=True))
    values, _ = vendor.pack(matrix)
    size = shape[0] * shape[1] * dtype.itemsize // 2 + shape[0] * shape[1] // 8  # beyond may be anything
    direct = torch_operations.installed().compress(matrix.to_dense())
    assert_same_bits(values.view(torch.uint8).flatten()[:size], direct.view(torch.uint8).flatten()[:size])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 9, 64, 200])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_products_are_those_of_the_dense_weight(dtype: torch.dtype, tokens: int, shape: tuple[int, int]) -> None:
    matrix = whole_matrix(shape, dtype)
    operands = vendor.pack(matrix)
    x = integer_tensor((tokens, shape[1]), dtype, seed=2).to(GPU)
    bias = integer_tensor((shape[0],), dtype, seed=3).to(GPU)
    for _ in range(2):  # after the search, and with what it found
        y = vendor.linear(x, *operands, bias, "2:4", *shape)
        assert y.is_contiguous()
        assert torch.equal(y, expected_of(x, matrix, bias))
        assert torch.equal(vendor.linear(x, *operands, None, "2:4", *shape), expected_of(x, matrix))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_real_numbers_stay_within_the_bound_of_rounding(dtype: torch.dtype) -> None:
    shape = (768, 1024)
    matrix = on_gpu(torch.randn(shape).to(dtype), random_mask(shape, "2:4", full=True))
    x, bias = torch.randn(40, 1024).to(GPU, dtype), torch.randn(768).to(GPU, dtype)
    y = vendor.linear(x, *vendor.pack(matrix), bias, "2:4", *shape)
    assert_within_bound(y, x, matrix, bias)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_dropped_places_are_not_read(dtype: torch.dtype) -> None:
    matrix = whole_matrix((128, 256), dtype)
    x = integer_tensor((16, 256), dtype).to(GPU)
    hostile = x.clone()
    hostile[1, 3], hostile[2, 255] = torch.nan, torch.inf
    y, clean = vendor.linear(hostile, *vendor.pack(matrix), None, "2:4", 128, 256), expected_of(x, matrix)
    kept = matrix.mask()
    for token, column in ((1, 3), (2, 255)):
        assert torch.equal(y[token, ~kept[:, column]], clean[token, ~kept[:, column]])
        assert not bool(y[token, kept[:, column]].isfinite().any())


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_zeros_are_kept_where_the_metadata_say(dtype: torch.dtype) -> None:
    """All weights zero: an infinity shows which of them are multiplied."""
    matrix = on_gpu(torch.full((64, 64), -0.0, dtype=dtype), random_mask((64, 64), "2:4", full=True))
    x = torch.zeros(64, 64, dtype=dtype, device=GPU)
    x.fill_diagonal_(torch.inf)
    y = vendor.linear(x, *vendor.pack(matrix), None, "2:4", 64, 64)
    assert torch.equal(y.isnan().T, matrix.mask())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", BYTES, ids=str)
def test_products_of_8_bits(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    weight = integer_tensor(shape, dtype) if dtype != torch.int8 else torch.randint(-128, 128, shape).to(dtype)
    matrix = on_gpu(weight, random_mask(shape, "2:4"))
    x = integer_tensor((40, shape[1]), dtype).to(GPU)
    y = vendor.products(x, *vendor.pack(matrix), *shape)
    assert torch.equal(y.double(), x.double() @ matrix.to_dense().double().T)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_captured_graph_gives_the_same(dtype: torch.dtype) -> None:
    """Warm, so that the found algorithm is captured, and cold, so that the default is."""
    matrix = whole_matrix((256, 512), dtype)
    operands = vendor.pack(matrix)
    for warm in (True, False):
        search.clear()
        x = integer_tensor((32, 512), dtype, seed=5).to(GPU)
        if warm:
            vendor.linear(x, *operands, None, "2:4", 256, 512)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = vendor.linear(x, *operands, None, "2:4", 256, 512)
        x.copy_(integer_tensor((32, 512), dtype, seed=6))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, expected_of(x, matrix))


def test_a_search_finds_something(library: str) -> None:
    """Not the default for every shape: else the binding does not take our arguments, or every proof fails."""
    if library == "CUTLASS":
        pytest.skip("has no search")
    for tokens in (8, 64, 512, 4096):
        matrix = whole_matrix((4096, 4096), torch.bfloat16)
        x = torch.randn(tokens, 4096, device=GPU).bfloat16()
        vendor.linear(x, *vendor.pack(matrix), None, "2:4", 4096, 4096)
    print(vendor.label(), dict(search._found))
    assert any(found != search.Algorithm() for found in search._found.values())

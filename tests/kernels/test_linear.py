"""kernels.linear: every backend against float64, by exact integers and by the component-wise bound."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from twofour import SparseMatrix, UnsupportedError, kernels
from twofour.errors import ShapeError
from twofour.kernels import KERNELS, LinearSpec, choose
from twofour.masks import nm_mask
from twofour.pattern import Pattern
from twofour.testing import assert_within_bound

DTYPES = [torch.float32, torch.bfloat16]
pytestmark = pytest.mark.usefixtures("device")


def integer_case(
    tokens: int, out_features: int, in_features: int, dtype: torch.dtype
) -> tuple[torch.Tensor, SparseMatrix, torch.Tensor, torch.Tensor]:
    """x, matrix, bias and the exact y; every partial sum is exact in float32."""
    weight = torch.randint(-4, 5, (out_features, in_features)).to(dtype)
    matrix = SparseMatrix.from_dense(weight, prune=True)
    x = torch.randint(-4, 5, (tokens, in_features)).to(dtype)
    bias = torch.randint(-4, 5, (out_features,)).to(dtype)
    y = x.double() @ matrix.to_dense().double().T + bias.double()
    return x, matrix, bias, y.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@settings(deadline=None, max_examples=40)
@given(tokens=st.integers(0, 200), out_features=st.integers(1, 70), groups=st.integers(1, 40))
def test_integers_are_exact_at_any_size(
    backend: str, dtype: torch.dtype, tokens: int, out_features: int, groups: int
) -> None:
    x, matrix, bias, expected = integer_case(tokens, out_features, 4 * groups, dtype)
    assert torch.equal(kernels.linear(x, matrix, bias, backend=backend), expected)
    without_bias = (x.double() @ matrix.to_dense().double().T).to(dtype)
    assert torch.equal(kernels.linear(x, matrix, None, backend=backend), without_bias)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("tokens", [1, 3, 16, 129])
def test_real_inputs_stay_within_the_bound(backend: str, dtype: torch.dtype, tokens: int) -> None:
    if backend == "cpu" and dtype == torch.float16:
        matrix = SparseMatrix.from_dense(torch.randn(8, 8).to(dtype), prune=True)
        with pytest.raises(UnsupportedError, match="backend 'cpu' cannot run this layer: float16 has no native kernel"):
            kernels.linear(torch.randn(1, 8).to(dtype), matrix, backend=backend)
        return
    matrix = SparseMatrix.from_dense(torch.randn(97, 384).to(dtype), prune=True)
    x, bias = torch.randn(tokens, 384).to(dtype), torch.randn(97).to(dtype)
    y = kernels.linear(x, matrix, bias, backend=backend)
    assert_within_bound(y, x, matrix.to_dense(), bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_inputs_at_dropped_places_never_reach_the_output(
    backend: str, dtype: torch.dtype, tokens: int, bad: float
) -> None:
    weight = torch.zeros(20, 16)
    weight[:, 1::4], weight[:, 2::4] = 1, -1
    matrix = SparseMatrix.from_dense(weight.to(dtype))
    x = torch.ones(tokens, 16).to(dtype)
    x[:, 0::4] = bad
    if KERNELS[backend].dense:  # its zeros are multiplied: NaN, as from an nn.Linear
        assert bool(kernels.linear(x, matrix, backend=backend).isnan().all())
        return
    assert torch.equal(kernels.linear(x, matrix, backend=backend), torch.zeros(tokens, 20).to(dtype))
    x[:, 1] = bad
    assert not bool(torch.isfinite(kernels.linear(x, matrix, backend=backend)).any())


def test_any_strides_and_leading_axes(backend: str) -> None:
    x, matrix, bias, expected = integer_case(24, 33, 64, torch.float32)
    wide = torch.full((24, 200), float("nan"))
    wide[:, 3:67] = x
    for view in (wide[:, 3:67], x.T.contiguous().T, x[None].expand(1, 24, 64)[0]):
        assert torch.equal(kernels.linear(view, matrix, bias, backend=backend), expected)
    assert torch.equal(kernels.linear(x.view(2, 3, 4, 64), matrix, bias, backend=backend), expected.view(2, 3, 4, 33))
    assert torch.equal(kernels.linear(x[0], matrix, bias, backend=backend), expected[0])
    assert torch.equal(kernels.linear(x[:1].expand(24, 64), matrix, bias, backend=backend), expected[:1].expand(24, 33))


@pytest.mark.parametrize("pattern", ["1:4", "3:4", "4:8", "1:2", "16:32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn])
def test_the_reference_runs_every_pattern_and_dtype(pattern: str, dtype: torch.dtype) -> None:
    weight = torch.randint(-4, 5, (12, 64)).to(dtype)
    matrix = SparseMatrix.from_dense(weight, pattern, prune=True)
    x = torch.randint(-4, 5, (5, 64)).to(dtype if dtype.itemsize > 1 else torch.float32)
    expected = (x.double() @ matrix.to_dense().double().T).to(x.dtype)
    assert torch.equal(kernels.linear(x, matrix), expected)


def test_the_table_says_which_kernel_and_why(native: None) -> None:
    def chosen(pattern: str = "2:4", dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[str, str]:
        choice = choose(LinearSpec(8, 8, Pattern.parse(pattern), dtype, torch.device(device)))
        return choice.kernel.backend, choice.reason

    assert chosen() == ("cpu", "")
    assert chosen("2:4x4") == ("cpu", "")
    assert chosen("4:8") == ("reference", "cpu: pattern 4:8 has no native kernel, only 2:4")
    assert chosen(dtype=torch.float16) == ("reference", "cpu: float16 has no native kernel, only float32 and bfloat16")
    assert chosen(device="meta") == ("reference", "cpu: the weight is on meta")
    with pytest.raises(
        UnsupportedError, match="unknown backend 'gpu': the kernels are cpu, cuda, vendor, reference, onednn"
    ):
        choose(LinearSpec(8, 8, Pattern(), torch.float32, torch.device("cpu")), "gpu")


def test_without_native_kernels_the_reference_serves_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("twofour.kernels.cpu._UNAVAILABLE", "this build has no native kernels")
    choice = choose(LinearSpec(8, 8, Pattern(), torch.float32, torch.device("cpu")))
    assert choice.kernel.backend == "reference"
    assert choice.reason == "cpu: this build has no native kernels"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 4), (16, 64), (37, 20), (3, 132)])
def test_every_layout_gives_the_matrix_back(backend: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    weight = torch.randn(shape)
    weight[0, :4] = torch.tensor([float("nan"), -0.0, float("-inf"), 0.0])
    mask = nm_mask(weight.abs(), "2:4")
    matrix = SparseMatrix.from_dense(weight.to(dtype), mask=mask)
    kernel, spec = KERNELS[backend], LinearSpec.of(matrix)
    operands = kernel.pack(matrix)
    copied = kernel.copy(operands, spec)
    assert copied[0].data_ptr() != operands[0].data_ptr()
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    for layout in (operands, copied):
        back = kernel.unpack(layout, spec)
        assert torch.equal(back.values.view(bits), matrix.values.view(bits))
        assert torch.equal(back.metadata, matrix.metadata)


def test_functional_form_works_under_compile_before_and_after_packing(native: None) -> None:
    x, matrix, bias, expected = integer_case(6, 32, 64, torch.float32)
    function = torch.compile(lambda x: kernels.linear(x, matrix, bias), fullgraph=True)
    assert torch.equal(function(x), expected)
    assert torch.equal(function(x), expected)
    assert list(matrix.prepared) == ["cpu"]


def test_mistakes_are_named() -> None:
    x, matrix, _, _ = integer_case(6, 32, 64, torch.float32)
    with pytest.raises(ShapeError, match=r"x is \[6, 63\]: its last axis must be in_features 64"):
        kernels.linear(x[:, 1:], matrix)
    with pytest.raises(ShapeError, match=r"bias is \[31\]: it must be \[32\]"):
        kernels.linear(x, matrix, torch.zeros(31))
    with pytest.raises(UnsupportedError, match=r"Pass x.to\(torch.float32\), or convert the weight"):
        kernels.linear(x.half(), matrix)
    with pytest.raises(UnsupportedError, match=f"x is on meta and the weight on {matrix.device}: move one"):
        kernels.linear(x.to("meta"), matrix)


def _opcheck_case(dtype: torch.dtype) -> tuple[torch.Tensor, SparseMatrix, torch.Tensor]:
    x, matrix, bias, _ = integer_case(5, 20, 16, dtype)
    return x, matrix, bias


@pytest.mark.parametrize("dtype", DTYPES)
def test_operations_hold_torchs_own_checks(backend: str, dtype: torch.dtype) -> None:
    x, matrix, bias = _opcheck_case(dtype)
    operands = KERNELS[backend].pack(matrix)
    tests = ("test_schema", "test_faketensor")
    operation = getattr(torch.ops.twofour, f"linear_{backend}").default
    for some_bias in (bias, None):
        torch.library.opcheck(operation, (x, *operands, some_bias, "2:4", 20, 16), test_utils=tests)
    wanting = (x.clone().requires_grad_(), *operands, bias.clone().requires_grad_(), "2:4", 20, 16)
    torch.library.opcheck(operation, wanting)
    operation = getattr(torch.ops.twofour, f"to_dense_{backend}").default
    torch.library.opcheck(operation, (*operands, "2:4", 20, 16), test_utils=tests)
    if backend == "cpu":
        arguments = (matrix.values, matrix.metadata, 20, 16)
        torch.library.opcheck(torch.ops.twofour.pack_linear_cpu.default, arguments, test_utils=tests)
        scattered = (matrix.values, matrix.metadata[:1].expand(20, -1), 20, 16, 4, torch.arange(32, dtype=torch.uint8))
        torch.library.opcheck(torch.ops.twofour.pack_linear_cpu.default, scattered, test_utils=tests)

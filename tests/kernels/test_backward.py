"""The gradients of 2:4 linear layers: native kernels on every instruction set, operations, gradients of gradients."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from twofour import SparseMatrix, UnsupportedError, kernels
from twofour.errors import ShapeError
from twofour.kernels import KERNELS, cpu, cpu_grad, ops_grad, reference
from twofour.masks import nm_mask
from twofour.masks.rows import clustered_mask
from twofour.pattern import Pattern
from twofour.testing import assert_within_bound

pytestmark = pytest.mark.of_cpu

DTYPES = (torch.float32, torch.bfloat16)
ISAS = [] if os.environ.get("TWOFOUR_NO_NATIVE") else cpu.isas()
every_kernel = pytest.mark.parametrize(
    ("isa", "dtype"), [(isa, dtype) for isa in ISAS for dtype in DTYPES], ids=lambda v: str(v).removeprefix("torch.")
)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)

SIZES = (
    # tokens, out_features, in_features: around lanes, panels, tiles, chunks of rows, blocks of groups
    (0, 5, 8),
    (1, 1, 4),
    (2, 16, 12),
    (7, 17, 16),
    (15, 31, 20),
    (16, 33, 24),
    (17, 79, 28),
    (31, 80, 60),
    (33, 81, 64),
    (48, 160, 68),
    (63, 161, 100),
    (95, 240, 36),
    (96, 241, 132),
    (97, 257, 1028),
    (129, 100, 2052),
    (193, 320, 44),
    (736, 34, 16),
    (737, 18, 28),
    (1500, 33, 20),
    (3100, 3, 16),
)


def integers(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def problem(
    tokens: int, out_features: int, in_features: int, dtype: torch.dtype
) -> tuple[SparseMatrix, tuple[Tensor, Tensor], Tensor, Tensor]:
    """matrix, its packed form (itself without native kernels, which tests of the reference do without), grad and x."""
    weight = integers(out_features, in_features, dtype=dtype, seed=out_features + in_features)
    scores = torch.rand(out_features, in_features, generator=torch.Generator().manual_seed(5))
    matrix = SparseMatrix.from_dense(weight, mask=nm_mask(scores, "2:4"))
    packed = matrix.values, matrix.metadata
    if cpu.available() is None:
        packed = cpu.pack(matrix.values, matrix.metadata, out_features, in_features)
    grad = integers(tokens, out_features, dtype=dtype, seed=1)
    return matrix, packed, grad, integers(tokens, in_features, dtype=dtype, seed=2)


def expected_values(grad: Tensor, x: Tensor, matrix: SparseMatrix) -> Tensor:
    """Canonical gradient of the values, in float64."""
    return (grad.double().T @ x.double())[matrix.mask()].view(matrix.values.shape)


def run_input(grad: Tensor, packed: tuple[Tensor, Tensor], matrix: SparseMatrix, isa: str) -> Tensor:
    """`cpu_grad.grad_input`, having made sure that the kernel that was asked for is the one that ran."""
    from twofour import _native

    found = cpu_grad.grad_input(grad, *packed, *matrix.shape, isa=isa)
    assert _native.last_kernel() == f"{isa}/grad_input"
    return found


def run_values(grad: Tensor, x: Tensor, packed: tuple[Tensor, Tensor], matrix: SparseMatrix, isa: str) -> Tensor:
    """The canonical gradient of the values; what fills the last tile must be zero."""
    from twofour import _native

    found = cpu_grad.grad_values(grad, x, packed[1], *matrix.shape, isa=isa)
    assert _native.last_kernel() == f"{isa}/grad_values"
    canonical = cpu.unpack(found, packed[1], *matrix.shape)[0]
    sharing = cpu.row_order(matrix.metadata) if packed[1].ndim == 1 else (1, None)
    again = cpu.pack(canonical, matrix.metadata, *matrix.shape, *sharing)[0]
    carrier = torch.int32 if found.dtype == torch.float32 else torch.int16
    assert torch.equal(found.view(carrier), again.view(carrier))
    return canonical


@every_kernel
@pytest.mark.parametrize("rows", [2, 4])
@pytest.mark.parametrize("out_features", [60, 68, 132])
def test_rows_that_share_a_mask_anywhere_in_their_window(
    isa: str, dtype: torch.dtype, rows: int, out_features: int
) -> None:
    pattern = Pattern.parse(f"2:4x{rows}")
    generator = torch.Generator().manual_seed(6)
    windows = torch.arange(out_features).split(64)
    order = torch.cat([window[torch.randperm(len(window), generator=generator)] for window in windows])
    mask = clustered_mask(torch.rand(out_features, 68, generator=generator), pattern, order)
    weight = integers(out_features, 68, dtype=dtype, seed=7)
    matrix = SparseMatrix.from_dense(weight, mask=mask)
    shared, found = cpu.row_order(matrix.metadata)
    assert shared == rows
    packed = cpu.pack(matrix.values, matrix.metadata, *matrix.shape, shared, found)
    assert packed[1].ndim == 1
    grad, x = integers(33, out_features, dtype=dtype, seed=1), integers(33, 68, dtype=dtype, seed=2)
    dense = matrix.to_dense().double()
    assert torch.equal(run_input(grad, packed, matrix, isa), (grad.double() @ dense).to(dtype))
    strided = grad.T.contiguous().T
    assert torch.equal(run_input(strided, packed, matrix, isa), (grad.double() @ dense).to(dtype))
    assert torch.equal(run_values(grad, x, packed, matrix, isa), expected_values(grad, x, matrix).to(dtype))


@every_kernel
def test_integers_agree_exactly(isa: str, dtype: torch.dtype) -> None:
    for tokens, out_features, in_features in SIZES:
        matrix, packed, grad, x = problem(tokens, out_features, in_features, dtype)
        size = (tokens, out_features, in_features)
        expected = (grad.double() @ matrix.to_dense().double()).to(dtype)
        assert torch.equal(run_input(grad, packed, matrix, isa), expected), size
        assert torch.equal(run_values(grad, x, packed, matrix, isa), expected_values(grad, x, matrix).to(dtype)), size


@every_kernel
def test_real_inputs_stay_in_bound(isa: str, dtype: torch.dtype) -> None:
    for tokens, out_features, in_features in ((37, 130, 512), (900, 50, 36)):
        generator = torch.Generator().manual_seed(3)
        weight, grad, x = (
            torch.randn(shape, generator=generator).to(dtype)
            for shape in ((out_features, in_features), (tokens, out_features), (tokens, in_features))
        )
        matrix = SparseMatrix.from_dense(weight, prune=True)
        packed = cpu.pack(matrix.values, matrix.metadata, *matrix.shape)
        # vdpbf16ps flushes subnormal intermediates
        tiny = (tokens + out_features) * 2.0**-126
        assert_within_bound(run_input(grad, packed, matrix, isa), grad, matrix.to_dense().T, absolute=tiny)
        found = torch.zeros(matrix.shape, dtype=dtype)
        found[matrix.mask()] = run_values(grad, x, packed, matrix, isa).flatten()
        held = matrix.mask()
        for column in range(0, in_features, 7):  # each kept place against its own product
            rows = held[:, column]
            assert_within_bound(found[rows, column], x[:, column], grad.T[rows], absolute=tiny)


@every_kernel
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_dropped_places_take_no_part(isa: str, dtype: torch.dtype, bad: float) -> None:
    matrix, packed, grad, x = problem(40, 83, 64, dtype)
    held = matrix.mask()
    clean_input, clean_values = run_input(grad, packed, matrix, isa), run_values(grad, x, packed, matrix, isa)
    grad[:, 9], x[:, 21] = bad, bad
    found = run_input(grad, packed, matrix, isa)
    assert torch.equal(found[:, ~held[9]], clean_input[:, ~held[9]])
    assert not bool(found[:, held[9]].isfinite().any())
    found_values = run_values(grad, x, packed, matrix, isa)
    places = held.nonzero().view(83, 32, 2)
    reached = (places[..., 0] == 9) | (places[..., 1] == 21)
    assert torch.equal(found_values[~reached], clean_values[~reached])
    assert not bool(found_values[reached].isfinite().any())


@every_kernel
def test_any_nibble_stays_inside_the_buffers(isa: str, dtype: torch.dtype) -> None:
    metadata = torch.arange(256, dtype=torch.uint8).repeat(2).view(16, 32)
    packed = cpu.pack(torch.ones(16, 128, dtype=dtype), metadata, 16, 256)
    found = cpu_grad.grad_input(torch.ones(20, 16, dtype=dtype), *packed, 16, 256, isa=isa)
    assert torch.equal(found.sum(1), torch.full((20,), 2048, dtype=dtype))
    values = cpu_grad.grad_values(torch.ones(8, 16, dtype=dtype), torch.ones(8, 256, dtype=dtype), packed[1], 16, 256)
    assert (values == 8).all()


class GuardedMemory:
    """A copy of a tensor that ends exactly where a page without any access begins."""

    def __init__(self, tensor: Tensor) -> None:
        page, size = mmap.PAGESIZE, tensor.nbytes
        pages = -(-size // page)
        self._map = mmap.mmap(-1, (pages + 1) * page)
        self._hold = (ctypes.c_char * len(self._map)).from_buffer(self._map)
        start = ctypes.addressof(self._hold)
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mprotect(ctypes.c_void_p(start + pages * page), ctypes.c_size_t(page), 0) != 0:
            raise OSError(ctypes.get_errno(), "mprotect")
        self.address = start + pages * page - size
        self.bytes = (ctypes.c_uint8 * size).from_address(self.address)
        ctypes.memmove(self.address, tensor.data_ptr(), size)


@every_kernel
@pytest.mark.parametrize("shape", [(1, 1, 4), (3, 17, 12), (17, 15, 36), (97, 33, 100), (32, 16, 64), (1480, 5, 8)])
def test_nothing_outside_the_tensors_is_read_or_written(
    isa: str, dtype: torch.dtype, shape: tuple[int, int, int]
) -> None:
    from twofour import _native

    tokens, out_features, in_features = shape
    matrix, packed, grad, x = problem(*shape, dtype)
    code = DTYPES.index(dtype)
    sizes = (tokens, out_features, in_features, out_features, in_features, code, 2, isa)
    g, i, values, metadata = (GuardedMemory(t) for t in (grad, x, *packed))
    out = GuardedMemory(torch.empty_like(x))
    _native.grad_input(g.address, values.address, metadata.address, out.address, *sizes)
    expected = (grad.double() @ matrix.to_dense().double()).to(dtype)
    assert torch.equal(torch.frombuffer(out.bytes, dtype=dtype).view(tokens, in_features), expected)
    out = GuardedMemory(torch.empty_like(packed[0]))
    _native.grad_values(g.address, i.address, metadata.address, out.address, *sizes)
    found = torch.frombuffer(out.bytes, dtype=dtype).view(packed[0].shape)
    canonical = cpu.unpack(found, packed[1], out_features, in_features)[0]
    assert torch.equal(canonical, expected_values(grad, x, matrix).to(dtype))


@every_kernel
def test_unaligned_strided_inputs_and_guards_around_outputs(isa: str, dtype: torch.dtype) -> None:
    from twofour import _native

    tokens, out_features, in_features, gap, guard = 33, 31, 68, 3, -99.0
    matrix, packed, grad, x = problem(tokens, out_features, in_features, dtype)
    size, code = x.itemsize, DTYPES.index(dtype)

    def spread(tensor: Tensor, fill: float) -> Tensor:
        """Rows `gap` apart, one element off any alignment."""
        flat = torch.full((1 + tensor.shape[0] * (tensor.shape[1] + gap) + 64,), fill, dtype=dtype)
        rows = flat[1 : 1 + tensor.shape[0] * (tensor.shape[1] + gap)].view(tensor.shape[0], -1)
        rows[:, : tensor.shape[1]] = tensor
        return flat

    def shifted(tensor: Tensor) -> Tensor:
        return torch.cat([tensor.new_zeros(1), tensor.flatten()])

    wide_grad, wide_x = spread(grad, float("nan")), spread(x, float("nan"))
    values, metadata = shifted(packed[0]), shifted(packed[1])
    sizes = (tokens, out_features, in_features, out_features + gap, in_features + gap, code, 2, isa)
    found = spread(torch.full_like(x, 77), guard)
    inputs = (wide_grad.data_ptr() + size, values.data_ptr() + size, metadata.data_ptr() + 1)
    _native.grad_input(*inputs, found.data_ptr() + size, *sizes)
    assert torch.equal(found, spread((grad.double() @ matrix.to_dense().double()).to(dtype), guard))

    found = torch.full((1 + packed[0].numel() + 64,), guard, dtype=dtype)
    inputs = (wide_grad.data_ptr() + size, wide_x.data_ptr() + size, metadata.data_ptr() + 1)
    _native.grad_values(*inputs, found.data_ptr() + size, *sizes)
    inside = found[1 : 1 + packed[0].numel()].view(packed[0].shape)
    canonical = cpu.unpack(inside.clone(), packed[1], out_features, in_features)[0]
    assert torch.equal(canonical, expected_values(grad, x, matrix).to(dtype))
    assert found[0] == guard
    assert (found[1 + packed[0].numel() :] == guard).all()


@pytest.fixture
def set_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@every_kernel
@pytest.mark.usefixtures("set_threads")
def test_bits_do_not_depend_on_threads(isa: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(4)
    matrix = SparseMatrix.from_dense(torch.randn(300, 516, generator=generator).to(dtype), prune=True)
    packed = cpu.pack(matrix.values, matrix.metadata, *matrix.shape)
    for tokens in (1, 50, 800):
        grad = torch.randn(tokens, 300, generator=generator).to(dtype)
        x = torch.randn(tokens, 516, generator=generator).to(dtype)
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append((run_input(grad, packed, matrix, isa), run_values(grad, x, packed, matrix, isa)))
        assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@every_dtype
def test_other_strides_are_copied(native: None, dtype: torch.dtype) -> None:
    matrix, packed, grad, x = problem(24, 33, 64, dtype)
    by_columns, one = grad.T.contiguous().T, grad[:1].expand(24, 33)
    expected = cpu_grad.grad_input(grad, *packed, *matrix.shape)
    assert torch.equal(cpu_grad.grad_input(by_columns, *packed, *matrix.shape), expected)
    assert torch.equal(cpu_grad.grad_input(one, *packed, *matrix.shape), expected[:1].expand(24, 64))
    values = cpu_grad.grad_values(grad, x, packed[1], *matrix.shape)
    assert torch.equal(cpu_grad.grad_values(by_columns, x.T.contiguous().T, packed[1], *matrix.shape), values)


def test_wrong_arguments_are_named(native: None) -> None:
    matrix, packed, grad, x = problem(5, 20, 32, torch.float32)
    with pytest.raises(ShapeError, match=r"grad is \[5, 19\]: it must be \[tokens, 20\]"):
        cpu_grad.grad_input(grad[:, 1:], *packed, *matrix.shape)
    with pytest.raises(UnsupportedError, match=r"grad is torch.bfloat16 on cpu: .* one dtype \(torch.float32\)"):
        cpu_grad.grad_input(grad.bfloat16(), *packed, *matrix.shape)
    with pytest.raises(ShapeError, match=r"x is \[4, 32\] and grad \[5, 20\]: both must have the same tokens"):
        cpu_grad.grad_values(grad, x[1:], packed[1], *matrix.shape)
    with pytest.raises(UnsupportedError, match=r"x is torch.bfloat16"):
        cpu_grad.grad_values(grad, x.bfloat16(), packed[1], *matrix.shape)
    with pytest.raises(UnsupportedError, match="instruction set 'sse9' does not run here; this machine has: baseline"):
        cpu_grad.grad_input(grad, *packed, *matrix.shape, isa="sse9")


# ---- operations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8"])
def test_the_reference_is_the_dense_gradient(pattern: str) -> None:
    parsed = Pattern.parse(pattern)
    matrix = SparseMatrix.from_dense(torch.randint(-4, 5, (12, 32)).float(), pattern, prune=True)
    grad, x = torch.randint(-4, 5, (2, 3, 12)).float(), torch.randint(-4, 5, (2, 3, 32)).float()
    found = reference.linear_grad_input(grad, matrix.values, matrix.metadata, parsed, 32)
    assert torch.equal(found, grad @ matrix.to_dense())
    found = reference.linear_grad_values(grad, x, matrix.metadata, parsed, 32)
    expected = (grad.view(6, 12).T @ x.view(6, 32))[matrix.mask()].view(12, -1)
    assert torch.equal(found, expected)
    grad[0, 0, 3] = float("nan")
    found = reference.linear_grad_input(grad, matrix.values, matrix.metadata, parsed, 32)
    assert torch.equal(found[0, 0].isnan(), matrix.mask()[3])


@every_dtype
def test_operations_hold_torchs_own_checks(trained_backend: str, dtype: torch.dtype) -> None:
    matrix, _, grad, x = problem(5, 20, 16, dtype)
    values, metadata = KERNELS[trained_backend].pack(matrix)
    grad, x, values = (t.clone().requires_grad_() for t in (grad, x, values))
    shape = ("2:4", 20, 16)
    torch.library.opcheck(
        getattr(torch.ops.twofour, f"linear_{trained_backend}").default, (x, values, metadata, None, *shape)
    )
    torch.library.opcheck(ops_grad.GRAD_INPUT[trained_backend], (grad, values, metadata, *shape))
    torch.library.opcheck(ops_grad.GRAD_VALUES[trained_backend], (grad, x, metadata, *shape))


@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (0,)])
def test_gradients_of_all_operands_are_exact(trained_backend: str, leading: tuple[int, ...]) -> None:
    matrix, _, _, _ = problem(1, 12, 8, torch.float32)
    values, metadata = KERNELS[trained_backend].pack(matrix)
    x, grad = torch.randint(-4, 5, (*leading, 8)).float(), torch.randint(-4, 5, (*leading, 12)).float()
    x.requires_grad_()
    values.requires_grad_()
    y = kernels.ops.linear(trained_backend, x, (values, metadata), None, "2:4", 12, 8)
    found_x, found_values = torch.autograd.grad(y, (x, values), grad)
    assert torch.equal(found_x, grad @ matrix.to_dense())
    spec = kernels.LinearSpec.of(matrix)
    canonical = KERNELS[trained_backend].unpack((found_values, metadata), spec).values
    assert torch.equal(canonical, (grad.reshape(-1, 12).T @ x.detach().reshape(-1, 8))[matrix.mask()].view(12, 4))


def test_gradients_of_gradients(trained_backend: str) -> None:
    """Against the dense layer, whose weight is made of the values by an index."""
    matrix, _, _, x = problem(3, 8, 8, torch.float32)
    values, metadata = KERNELS[trained_backend].pack(matrix)
    values, x = values.requires_grad_(), x.requires_grad_()
    canonical = matrix.values.clone().requires_grad_()
    held = matrix.mask()
    dense = torch.zeros(8, 8).masked_scatter(held, canonical.flatten())

    def second(y: Tensor, parameter: Tensor) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(y.pow(3).sum(), (x, parameter), create_graph=True)
        return torch.autograd.grad(sum(g.pow(2).sum() for g in first), (x, parameter))

    ours = second(kernels.ops.linear(trained_backend, x, (values, metadata), None, "2:4", 8, 8), values)
    theirs = second(x @ dense.T, canonical)
    torch.testing.assert_close(ours[0], theirs[0])
    spec = kernels.LinearSpec.of(matrix)
    torch.testing.assert_close(KERNELS[trained_backend].unpack((ours[1], metadata), spec).values, theirs[1])


def test_tangents_of_values(trained_backend: str) -> None:
    matrix, _, _, x = problem(3, 8, 8, torch.float32)
    values, metadata = KERNELS[trained_backend].pack(matrix)
    tangent = torch.randn_like(values)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(values, tangent)
        y = kernels.ops.linear(trained_backend, x, (dual, metadata), None, "2:4", 8, 8)
        moved = torch.autograd.forward_ad.unpack_dual(y).tangent
    assert torch.equal(moved, kernels.ops.linear(trained_backend, x, (tangent, metadata), None, "2:4", 8, 8))


def test_batches_of_gradients(trained_backend: str) -> None:
    matrix, _, _, x = problem(6, 12, 8, torch.float32)
    values, metadata = KERNELS[trained_backend].pack(matrix)
    x, values = x.requires_grad_(), values.requires_grad_()
    y = kernels.ops.linear(trained_backend, x, (values, metadata), None, "2:4", 12, 8)
    grads = torch.randint(-4, 5, (5, 6, 12)).float()
    found = torch.autograd.grad(y, (x, values), grads, is_grads_batched=True, retain_graph=True)
    singly = [torch.autograd.grad(y, (x, values), grad, retain_graph=True) for grad in grads]
    for number in (0, 1):
        assert torch.equal(found[number], torch.stack([single[number] for single in singly]))


# ---- transposable patterns -----------------------------------------------------------------------------------------


@pytest.fixture
def turned(native: None) -> Iterator[dict[int, object]]:
    ops_grad._turned.clear()
    yield ops_grad._turned  # type: ignore[misc]
    ops_grad._turned.clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transposable_weights_run_transposed_and_stay_right(turned: dict[int, object], dtype: torch.dtype) -> None:
    from twofour import _native

    weight = torch.randint(-4, 5, (20, 32)).to(dtype)
    matrix = SparseMatrix.from_dense(weight, "2:4t", prune=True)
    grad = torch.randint(-4, 5, (7, 20)).to(dtype)
    x = torch.randint(-4, 5, (7, 32)).to(dtype).requires_grad_()

    def found() -> Tensor:
        return torch.autograd.grad(kernels.linear(x, matrix, backend="cpu"), x, grad)[0]

    assert torch.equal(found(), (grad.double() @ matrix.to_dense().double()).to(dtype))
    assert len(turned) == 1
    kept = next(iter(turned.values()))
    found()
    assert next(iter(turned.values())) is kept  # made once
    assert not _native.last_kernel().endswith("grad_input")

    matrix.prepared["cpu"][0].mul_(2)  # weights that change are not transposed again and again
    for _ in range(2):
        assert torch.equal(found(), (2 * grad.double() @ matrix.to_dense().double()).to(dtype))
        assert _native.last_kernel().endswith("grad_input")
    matrix.prepared["cpu"][0].div_(2)
    assert torch.equal(found(), (grad.double() @ matrix.to_dense().double()).to(dtype))


def test_transposed_copies_die_with_their_weights(turned: dict[int, object]) -> None:
    grad = torch.ones(3, 16).bfloat16()
    for seed in range(3):
        matrix = SparseMatrix.from_dense(integers(16, 16, dtype=torch.bfloat16, seed=seed), "2:4t", prune=True)
        operands = KERNELS["cpu"].pack(matrix)
        found = ops_grad.GRAD_INPUT["cpu"](grad, *operands, "2:4t", 16, 16)
        assert torch.equal(found, grad @ matrix.to_dense())
        del matrix, operands
    assert len(turned) == 1

"""The native CPU kernels, every instruction set and both families, against float64 in plain torch.

Rules for numbers: integers must agree exactly (every partial sum is exact, so any index, tail, layout or sign fault
shows); real inputs must stay inside a component-wise bound; bits must not depend on threads.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from twofour.errors import ShapeError, UnsupportedError
from twofour.kernels import cpu
from twofour.masks.rows import WINDOW_ROWS

if os.environ.get("TWOFOUR_NO_NATIVE"):
    pytest.skip("TWOFOUR_NO_NATIVE leaves the native kernels out", allow_module_level=True)

from twofour import _native

pytestmark = pytest.mark.of_cpu

ISAS = cpu.isas()
FAMILIES: tuple[cpu.Family, ...] = ("few", "many")
DTYPES = (torch.float32, torch.bfloat16)
UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}
"""Unit roundoff of the output."""

every_kernel = pytest.mark.parametrize(
    ("isa", "family", "dtype"),
    [(isa, family, dtype) for isa in ISAS for family in FAMILIES for dtype in DTYPES],
    ids=lambda value: str(value).removeprefix("torch."),
)


@dataclass(frozen=True)
class Weight:
    """A 2:4 matrix: dense float64, where it is kept, canonical and packed."""

    dense: Tensor
    kept: Tensor
    values: Tensor
    metadata: Tensor
    packed: tuple[Tensor, Tensor]

    @property
    def shape(self) -> tuple[int, int]:
        out_features, in_features = self.dense.shape
        return out_features, in_features


def make_weight(
    out_features: int, in_features: int, dtype: torch.dtype, *, integers: bool, seed: int = 0, shared: int = 1
) -> Weight:
    generator = torch.Generator().manual_seed(seed + 1000 * out_features + in_features)
    groups = in_features // 4
    shape = (out_features, groups, 4)
    dense = torch.randint(-4, 5, shape, generator=generator) if integers else torch.randn(shape, generator=generator)
    dense = dense.to(dtype)
    indices = torch.rand(shape, generator=generator)[::shared].topk(2, -1).indices.sort(-1).values
    indices = indices.repeat_interleave(shared, 0)[:out_features]
    values = dense.gather(-1, indices)
    kept = torch.zeros(shape, dtype=torch.bool).scatter_(-1, indices, True)
    nibbles = indices[..., 0] | indices[..., 1] << 2
    nibbles = torch.nn.functional.pad(nibbles, (0, groups % 2))
    metadata = (nibbles[:, 0::2] | nibbles[:, 1::2] << 4).to(torch.uint8)
    values = values.reshape(out_features, in_features // 2).contiguous()
    return Weight(
        torch.where(kept, dense, 0).double().view(out_features, in_features),
        kept.view(out_features, in_features),
        values,
        metadata,
        cpu.pack(values, metadata, out_features, in_features, shared),
    )


def run(x: Tensor, weight: Weight, bias: Tensor | None, isa: str, family: cpu.Family) -> Tensor:
    """`cpu.linear`, having made sure that the kernel it was asked for is the one that ran."""
    y = cpu.linear(x, *weight.packed, bias, *weight.shape, isa=isa, kernel=family)
    assert _native.last_kernel() == f"{isa}/{family}"
    return y


def integers(*shape: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


TOKENS = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 95, 96, 97, 193)
OUTS = (1, 15, 16, 17, 63, 511, 512, 513, 530)
INS = (4, 8, 12, 60, 64, 68, 96, 100, 388, 1028)


def paired_sizes() -> list[tuple[int, int]]:
    """Every out with every in somewhere, small with large so that the whole sweep stays cheap."""
    pairs = [(out, INS[(3 * i + j) % len(INS)]) for i, out in enumerate(OUTS) for j in (0, 4, 7)]
    assert {o for o, _ in pairs} == set(OUTS)
    assert {i for _, i in pairs} == set(INS)
    return pairs


@every_kernel
def test_integers_agree_exactly(isa: str, family: cpu.Family, dtype: torch.dtype) -> None:
    x_all = integers(max(TOKENS), max(INS), dtype=dtype)
    for number, (out_features, in_features) in enumerate(paired_sizes()):
        weight = make_weight(out_features, in_features, dtype, integers=True)
        bias = integers(out_features, dtype=dtype, seed=2) if number % 3 else None
        expected = x_all[:, :in_features].double() @ weight.dense.T + (0 if bias is None else bias.double())
        # All numbers of tokens where the layer is small, every third one where it is large.
        chosen = TOKENS if out_features * in_features < 40_000 else TOKENS[number % 3 :: 3]
        for tokens in chosen:
            y = run(x_all[:tokens, :in_features], weight, bias, isa, family)  # rows of x are strided
            assert torch.equal(y, expected[:tokens].to(dtype)), (tokens, out_features, in_features)


@every_kernel
@pytest.mark.parametrize("shared", [2, 4])
def test_shared_masks_agree_exactly(isa: str, family: cpu.Family, dtype: torch.dtype, shared: int) -> None:
    """Rows that share a mask store it once and read each activation once."""
    for out_features, in_features in ((shared, 4), (12, 8), (16, 12), (36, 68), (68, 100), (512, 388), (528, 1028)):
        weight = make_weight(out_features, in_features, dtype, integers=True, shared=shared)
        assert cpu.shared_rows(weight.metadata) % shared == 0
        assert weight.packed[1].shape[-1] == 8 // shared
        for tokens in (1, 3, 8, 9, 16, 33, 49, 97, 193)[out_features % 5 % 2 :: 2]:
            x = integers(tokens, in_features, dtype=dtype)
            x[:, in_features // 2] = float("nan")  # dropped by some rows and kept by others
            kept = torch.nan_to_num(x.double())
            expected = (kept @ weight.dense.T).to(dtype)
            expected[:, weight.kept[:, in_features // 2]] = float("nan")
            y = run(x, weight, None, isa, family)
            assert torch.equal(y.isnan(), expected.isnan()), (tokens, out_features, in_features)
            assert torch.equal(y.nan_to_num(), expected.nan_to_num()), (tokens, out_features, in_features)
        back = cpu.unpack(*weight.packed, out_features, in_features)
        assert torch.equal(back[0], weight.values)
        assert torch.equal(back[1], weight.metadata)


def scatter(weight: Weight, shared: int, seed: int = 0) -> tuple[Weight, Tensor]:
    """The same rows, each moved inside its window, packed in the order that is found; and where each row came from."""
    out_features, in_features = weight.shape
    generator = torch.Generator().manual_seed(seed)
    windows = torch.arange(out_features).split(WINDOW_ROWS)
    rows = torch.cat([window[torch.randperm(len(window), generator=generator)] for window in windows])
    metadata = weight.metadata[rows]
    found, order = cpu.row_order(metadata)
    assert found % shared == 0
    values = weight.values[rows]
    packed = cpu.pack(values, metadata, out_features, in_features, found, order)
    if order is not None:
        assert packed[1].ndim == 1
    return Weight(weight.dense[rows], weight.kept[rows], values, metadata, packed), rows


@every_kernel
@pytest.mark.parametrize("shared", [2, 4])
def test_scattered_masks_agree_exactly(isa: str, family: cpu.Family, dtype: torch.dtype, shared: int) -> None:
    """Rows that share a mask anywhere in their window: the outputs in their own order, with what follows the sums."""
    ordered = 0
    for number, (out_features, in_features) in enumerate(
        ((12, 8), (36, 60), (60, 68), (64, 100), (68, 12), (132, 260), (196, 64), (516, 388))
    ):
        weight, _ = scatter(make_weight(out_features, in_features, dtype, integers=True, shared=shared), shared)
        ordered += weight.packed[1].ndim == 1
        bias = integers(out_features, dtype=dtype, seed=2) if number % 2 else None
        for tokens in (1, 3, 8, 9, 16, 33, 49, 97, 193)[number % 2 :: 2]:
            x = integers(tokens, in_features, dtype=dtype)
            sums = x.double() @ weight.dense.T + (0 if bias is None else bias.double())
            assert torch.equal(run(x, weight, bias, isa, family), sums.to(dtype)), (tokens, out_features, in_features)
            residual = integers(tokens, out_features + 3, dtype=dtype, seed=3)[:, :out_features]
            y = cpu.linear(
                x, *weight.packed, bias, *weight.shape, isa=isa, kernel=family, activation="relu", residual=residual
            )
            assert torch.equal(y, (sums.relu() + residual.double()).to(dtype)), (tokens, out_features, in_features)
            x[:, in_features // 2] = float("nan")  # dropped by some rows and kept by others
            y = run(x, weight, bias, isa, family)
            assert torch.equal(y.isnan().all(0), weight.kept[:, in_features // 2])
            assert torch.equal(y.isnan().any(0), weight.kept[:, in_features // 2])
        back = cpu.unpack(*weight.packed, out_features, in_features)
        assert torch.equal(back[0], weight.values)
        assert torch.equal(back[1], weight.metadata)
    assert ordered >= 6


@every_kernel
def test_scattered_rows_have_the_bits_of_neighbours(isa: str, family: cpu.Family, dtype: torch.dtype) -> None:
    near = make_weight(396, 388, dtype, integers=False, shared=4)
    far, rows = scatter(near, 4)
    x = torch.randn(70, 388, generator=torch.Generator().manual_seed(4)).to(dtype)
    bias = torch.randn(396, generator=torch.Generator().manual_seed(5))
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert torch.equal(run(x, far, bias[rows], isa, family), run(x, near, bias, isa, family)[:, rows])
            finished = [
                cpu.linear(x, *w.packed, b, 396, 388, isa=isa, kernel=family, activation="gelu")
                for w, b in ((far, bias[rows]), (near, bias))
            ]
            assert torch.equal(finished[0], finished[1][:, rows])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("family", FAMILIES)
def test_scattered_bfloat16_weights_among_float32(isa: str, family: cpu.Family) -> None:
    weight, _ = scatter(make_weight(132, 100, torch.bfloat16, integers=True, shared=4), 4)
    x = integers(50, 100, dtype=torch.float32)
    assert torch.equal(run(x, weight, None, isa, family), (x.double() @ weight.dense.T).float())


def test_orders_are_those_of_the_masks() -> None:
    assert _native.window_rows() == WINDOW_ROWS
    near = make_weight(128, 64, torch.float32, integers=True, shared=4)
    assert cpu.row_order(near.metadata) == (4, None)
    far, _ = scatter(near, 4)
    shared, order = cpu.row_order(far.metadata)
    assert shared == 4
    assert order is not None
    windows = torch.arange(128) // WINDOW_ROWS * WINDOW_ROWS
    arranged = far.metadata[windows + order]
    assert torch.equal(arranged.view(32, 4, -1), arranged[::4, None].expand(32, 4, -1))
    pairs = near.metadata[
        torch.arange(128).view(32, 2, 2).transpose(0, 1).flatten()
    ]  # two in one window, two in the next
    assert cpu.row_order(pairs) == (2, None)
    crossing, order_of_pairs = cpu.row_order(near.metadata[torch.arange(128).view(32, 4).T.flatten()])  # 0, 4, 8, ..
    assert crossing == 2
    assert order_of_pairs is not None
    wide = make_weight(256, 64, torch.float32, integers=True, shared=4).metadata
    assert cpu.row_order(wide[torch.arange(256).view(64, 4).T.flatten()]) == (1, None)  # one in each window
    assert cpu.row_order(make_weight(64, 64, torch.float32, integers=True).metadata) == (1, None)
    with pytest.raises(
        ShapeError, match=r"shared=4: it must be 1, 2 or 4, and .* equal; here 1 are. Pass shared, order"
    ):
        cpu.pack(far.values, far.metadata, 128, 64, 4, order.flip(0))
    for wrong in (order[:64], order.int(), order.view(2, 64)):
        with pytest.raises(ShapeError, match=r"order is .* it must be torch.uint8 \[128\] on the CPU"):
            cpu.pack(far.values, far.metadata, 128, 64, 4, wrong)
    twice, outside = order.clone(), order.clone()
    twice[0] = twice[1]
    outside[0] = 64
    for wrong in (twice, outside):
        with pytest.raises(ShapeError, match="order does not name each row once, inside its window of 64"):
            cpu.pack(far.values, far.metadata, 128, 64, 4, wrong)


def test_masks_that_are_not_shared_are_not_packed_as_shared() -> None:
    weight = make_weight(16, 64, torch.float32, integers=True)
    assert cpu.shared_rows(weight.metadata) == 1
    with pytest.raises(ShapeError, match=r"shared=4: it must be 1, 2 or 4, and the masks .* equal; here 1 are"):
        cpu.pack(weight.values, weight.metadata, 16, 64, 4)
    assert cpu.shared_rows(make_weight(18, 64, torch.float32, integers=True, shared=2).metadata) == 2
    assert cpu.shared_rows(make_weight(16, 64, torch.float32, integers=True, shared=4).metadata[:15]) == 1


@every_kernel
def test_two_panels_and_two_blocks_of_rows(isa: str, family: cpu.Family, dtype: torch.dtype) -> None:
    weight = make_weight(1100, 260, dtype, integers=True)
    x = integers(200, 260, dtype=dtype)
    assert torch.equal(run(x, weight, None, isa, family), (x.double() @ weight.dense.T).to(dtype))


@every_kernel
@pytest.mark.parametrize("shape", [(37, 1, 512), (96, 50, 1028), (7, 130, 260)])
def test_real_inputs_stay_in_bound(
    isa: str, family: cpu.Family, dtype: torch.dtype, shape: tuple[int, int, int]
) -> None:
    tokens, out_features, in_features = shape
    weight = make_weight(out_features, in_features, dtype, integers=False)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(tokens, in_features, generator=generator).to(dtype)
    bias = torch.randn(out_features, generator=generator)
    y = run(x, weight, bias, isa, family).double()
    y64 = x.double() @ weight.dense.T + bias.double()
    # k = kept values plus the bias; one rounding for each product and each sum, hence 2 k. vdpbf16ps rounds the same
    # number of times and flushes subnormal intermediates: below 2**-126 for each.
    terms = in_features // 2 + 1
    magnitude = x.double().abs() @ weight.dense.abs().T + bias.double().abs()
    bound = UNIT[dtype] * y64.abs() * 1.01 + 2 * terms * 2.0**-24 * magnitude + terms * 2.0**-126
    assert ((y - y64).abs() <= bound).all()


@every_kernel
def test_dropped_positions_take_no_part(isa: str, family: cpu.Family, dtype: torch.dtype) -> None:
    """inf and NaN in x at a dropped position do not reach y; at a kept one they do."""
    out_features, in_features, tokens = 19, 64, 18
    for bad in (float("nan"), float("inf"), -float("inf")):
        weight = make_weight(out_features, in_features, dtype, integers=True, seed=5)
        x = integers(tokens, in_features, dtype=dtype)
        expected = (x.double() @ weight.dense.T).to(dtype)
        x[:, 9] = bad
        y = run(x, weight, None, isa, family)
        dropped = ~weight.kept[:, 9]
        assert dropped.any()
        assert not dropped.all()
        assert torch.equal(y[:, dropped], expected[:, dropped])
        reached = y[:, weight.kept[:, 9]]
        zero = weight.dense[weight.kept[:, 9], 9] == 0
        assert (reached[:, zero].isnan()).all()  # a kept zero is a factor like any other
        assert (~reached[:, ~zero].isfinite()).all()


@every_kernel
def test_bad_kept_values_stay_in_their_row(isa: str, family: cpu.Family, dtype: torch.dtype) -> None:
    weight = make_weight(33, 32, dtype, integers=True)
    values = weight.values.clone()
    values[3, 5], values[17, 0], values[32, 15] = float("nan"), float("inf"), -float("inf")
    damaged = Weight(weight.dense, weight.kept, values, weight.metadata, cpu.pack(values, weight.metadata, 33, 32))
    x = integers(21, 32, dtype=dtype).abs() + 1
    y = run(x, damaged, None, isa, family)
    expected = (x.double() @ weight.dense.T).to(dtype)
    clean = [row for row in range(33) if row not in (3, 17, 32)]
    assert torch.equal(y[:, clean], expected[:, clean])
    assert y[:, 3].isnan().all()
    assert (y[:, 17] == float("inf")).all()
    assert (y[:, 32] == -float("inf")).all()


@every_kernel
def test_rounding_is_to_nearest_even_and_keeps_subnormals(isa: str, family: cpu.Family, dtype: torch.dtype) -> None:
    """The bias alone reaches y: ties, carries into the exponent, the largest float, subnormals, both zeros."""
    bits = [0x3F808000, 0x3F818000, 0x3F808001, 0x3F7FFFFF, 0x7F7FFFFF, 0x00000001, 0x00018000, 0x807FFFFF, 0, 1 << 31]
    bias = torch.from_numpy(np.array(bits, dtype=np.uint32).view(np.float32).copy())
    out_features = len(bits)
    values = torch.zeros(out_features, 4, dtype=dtype)
    metadata = torch.full((out_features, 1), 0x44, dtype=torch.uint8)
    packed = cpu.pack(values, metadata, out_features, 8)
    y = cpu.linear(torch.zeros(2, 8, dtype=dtype), *packed, bias, out_features, 8, isa=isa, kernel=family)
    assert _native.last_kernel() == f"{isa}/{family}"
    expected = (bias + 0.0).to(dtype).expand(2, -1)  # 0 + -0 = +0
    carrier = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(y.view(carrier), expected.contiguous().view(carrier))


@every_kernel
def test_any_nibble_stays_inside_the_buffers(isa: str, family: cpu.Family, dtype: torch.dtype) -> None:
    """Damaged metadata gives some number, never a wild read: every byte value in every place."""
    metadata = torch.arange(256, dtype=torch.uint8).repeat(2).view(16, 32)
    values = torch.ones(16, 128, dtype=dtype)
    packed = cpu.pack(values, metadata, 16, 256)
    y = cpu.linear(torch.ones(20, 256, dtype=dtype), *packed, None, 16, 256, isa=isa, kernel=family)
    assert _native.last_kernel() == f"{isa}/{family}"
    assert (y == 128).all()


class GuardedMemory:
    """Bytes that end exactly where a page without any access begins."""

    def __init__(self, size: int) -> None:
        page = mmap.PAGESIZE
        pages = -(-size // page)
        self._map = mmap.mmap(-1, (pages + 1) * page)
        self._hold = (ctypes.c_char * len(self._map)).from_buffer(self._map)
        start = ctypes.addressof(self._hold)
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mprotect(ctypes.c_void_p(start + pages * page), ctypes.c_size_t(page), 0) != 0:
            raise OSError(ctypes.get_errno(), "mprotect")
        self.address = start + pages * page - size
        self.bytes = (ctypes.c_uint8 * size).from_address(self.address)

    def copy_of(self, tensor: Tensor) -> GuardedMemory:
        ctypes.memmove(self.address, tensor.data_ptr(), tensor.nbytes)
        return self


def guarded(tensor: Tensor) -> GuardedMemory:
    return GuardedMemory(tensor.nbytes).copy_of(tensor)


@every_kernel
@pytest.mark.parametrize("shape", [(1, 1, 4), (3, 17, 12), (17, 15, 36), (97, 33, 100), (8, 16, 64)])
def test_nothing_outside_the_tensors_is_read(
    isa: str, family: cpu.Family, dtype: torch.dtype, shape: tuple[int, int, int]
) -> None:
    """x, the packed weights, the bias and y each end at a page that must not be touched."""
    tokens, out_features, in_features = shape
    weight = make_weight(out_features, in_features, dtype, integers=True)
    x, bias = integers(tokens, in_features, dtype=dtype), integers(out_features, dtype=torch.float32)
    expected = (x.double() @ weight.dense.T + bias.double()).to(dtype)
    places = [guarded(t) for t in (x, *weight.packed, bias, torch.zeros_like(expected))]
    native_linear(places, tokens, weight, isa, family, dtype)
    y = torch.frombuffer(places[4].bytes, dtype=dtype).view(tokens, out_features)
    assert torch.equal(y, expected)


def native_linear(
    places: list[GuardedMemory], tokens: int, weight: Weight, isa: str, family: cpu.Family, dtype: torch.dtype
) -> None:
    x, values, metadata, bias, y = (place.address for place in places)
    out_features, in_features = weight.shape
    code, kernel = DTYPES.index(dtype), 1 + FAMILIES.index(family)
    strides = (in_features, out_features)
    _native.linear(x, values, metadata, bias, y, tokens, out_features, in_features, *strides, code, 2, kernel, isa)
    assert _native.last_kernel() == f"{isa}/{family}"


@every_kernel
@pytest.mark.parametrize("shape", [(1, 1, 4), (5, 17, 12), (33, 31, 68), (97, 50, 100)])
def test_unaligned_pointers_and_guards_around_y(
    isa: str, family: cpu.Family, dtype: torch.dtype, shape: tuple[int, int, int]
) -> None:
    """Everything one element off any alignment; gaps between rows of y, and what lies around it, stay as they were."""
    tokens, out_features, in_features = shape
    weight = make_weight(out_features, in_features, dtype, integers=True)
    size = torch.empty(0, dtype=dtype).itemsize
    gap = 3
    x = torch.full((tokens * (in_features + gap) + 1,), float("nan"), dtype=dtype)
    rows = x[1:].view(tokens, in_features + gap)
    rows[:, :in_features] = integers(tokens, in_features, dtype=dtype)
    bias = torch.full((out_features + 1,), float("nan"))
    bias[1:] = integers(out_features, dtype=torch.float32)
    values = torch.cat([torch.full((1,), float("nan"), dtype=dtype), weight.packed[0].flatten()])
    metadata = torch.cat([torch.zeros(1, dtype=torch.uint8), weight.packed[1].flatten()])
    guard = -99.0
    y = torch.full((1 + tokens * (out_features + gap) + 64,), guard, dtype=dtype)
    _native.linear(
        x.data_ptr() + size,
        values.data_ptr() + size,
        metadata.data_ptr() + 1,
        bias.data_ptr() + 4,
        y.data_ptr() + size,
        tokens,
        out_features,
        in_features,
        in_features + gap,
        out_features + gap,
        DTYPES.index(dtype),
        2,
        1 + FAMILIES.index(family),
        isa,
    )
    assert _native.last_kernel() == f"{isa}/{family}"
    expected = torch.full_like(y, guard)
    inside = expected[1 : 1 + tokens * (out_features + gap)].view(tokens, out_features + gap)
    product = rows[:, :in_features].double() @ weight.dense.T + bias[1:].double()
    inside[:, :out_features] = product.to(dtype)
    assert torch.equal(y, expected)


@pytest.fixture
def set_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@every_kernel
@pytest.mark.usefixtures("set_threads")
def test_bits_do_not_depend_on_threads(isa: str, family: cpu.Family, dtype: torch.dtype) -> None:
    weight = make_weight(1100, 516, dtype, integers=False)
    for tokens in (1, 6, 50, 130):
        x = torch.randn(tokens, 516, generator=torch.Generator().manual_seed(4)).to(dtype)
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(x, weight, None, isa, family))
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_several_python_threads_at_once(dtype: torch.dtype) -> None:
    problems = []
    for seed, tokens in enumerate((1, 3, 40, 120)):
        weight = make_weight(200 + seed, 256, dtype, integers=True)
        x = integers(tokens, 256, dtype=dtype, seed=seed)
        problems.append((x, weight, (x.double() @ weight.dense.T).to(dtype)))
    wrong: list[str] = []

    def work(number: int) -> None:
        x, weight, expected = problems[number % len(problems)]
        for repeat in range(30):
            family = FAMILIES[repeat % 2]
            y = cpu.linear(x, *weight.packed, None, *weight.shape, kernel=family)
            if not torch.equal(y, expected) or not _native.last_kernel().endswith(family):
                wrong.append(f"thread {number}, repeat {repeat}")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2 * len(problems))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_torch_threads_are_borrowed() -> None:
    """torch on Linux brings libgomp; a pool beside it would fight its spinning workers."""
    if sys.platform == "linux":
        assert _native.threads_source() == "libgomp"


def test_own_pool_without_torch() -> None:
    """Without torch there is no libgomp: the pool runs, wakes again for later jobs, and serves several callers."""
    program = """
import ctypes, importlib.util, threading
spec = importlib.util.spec_from_file_location("twofour._native", PATH)
native = importlib.util.module_from_spec(spec)
spec.loader.exec_module(native)
assert native.threads_source() == "pool", native.threads_source()
OUT, IN, TOKENS = 640, 512, 40
F = ctypes.c_float
values = (F * (OUT * IN // 2))(*([1.0] * (OUT * IN // 2)))
metadata = (ctypes.c_uint8 * (OUT * IN // 8))(*([0x44] * (OUT * IN // 8)))
packed_values, packed_metadata = (F * len(values))(), (ctypes.c_uint8 * len(metadata))()
at = ctypes.addressof
native.pack_linear(at(values), at(metadata), at(packed_values), at(packed_metadata), OUT, IN, 4)
x = (F * (TOKENS * IN))(*([0.5] * (TOKENS * IN)))
wrong = []
def work():
    for repeat in range(20):
        y = (F * (TOKENS * OUT))()
        native.linear(at(x), at(packed_values), at(packed_metadata), 0, at(y), TOKENS, OUT, IN, IN, OUT, 0, 3)
        if any(v != IN / 4 for v in y):
            wrong.append(repeat)
threads = [threading.Thread(target=work) for _ in range(3)]
for t in threads: t.start()
for t in threads: t.join()
assert not wrong, wrong
"""
    path = _native.__file__
    done = subprocess.run(
        [sys.executable, "-c", program.replace("PATH", repr(path))], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def packed_model(weight: Weight, dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray]:
    """The CPU layout, written down a second time in NumPy."""
    out_features, in_features = weight.shape
    tiles, groups = -(-out_features // 16), in_features // 4
    carrier = np.uint32 if dtype == torch.float32 else np.uint16
    bits = weight.values.view(torch.int32 if dtype == torch.float32 else torch.int16).numpy().view(carrier)
    rows = np.zeros((tiles * 16, groups, 2), carrier)
    rows[:out_features] = bits.reshape(out_features, groups, 2)
    values = rows.reshape(tiles, 16, groups, 2)
    values = values.transpose(0, 2, 3, 1) if dtype == torch.float32 else values.transpose(0, 2, 1, 3)
    meta = weight.metadata.numpy()
    nibbles = np.full((tiles * 16, groups), 0b0100, np.uint64)
    nibbles[:out_features] = np.stack([meta & 15, meta >> 4], -1).reshape(out_features, -1)[:, :groups]
    by_tile = nibbles.reshape(tiles, 16, groups).transpose(0, 2, 1)
    words = np.zeros((tiles, groups, 2), np.uint64)
    for row in range(16):
        words[..., row % 2] |= by_tile[..., row] << np.uint64(4 * (row // 2))
    return np.ascontiguousarray(values), words.astype("<u4").view(np.uint8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 4), (16, 8), (17, 12), (31, 100), (48, 256)])
def test_packing_is_the_layout_and_loses_nothing(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    weight = make_weight(*shape, dtype, integers=False)
    carrier = torch.int32 if dtype == torch.float32 else torch.int16
    # A signalling NaN, -0.0 and a subnormal must keep their bits.
    special = torch.tensor([0x7F800001, -(1 << 31), 1] if dtype == torch.float32 else [0x7F81, -(1 << 15), 1])
    flat = weight.values.view(carrier).flatten()
    flat[: min(3, flat.numel())] = special.to(carrier)[: flat.numel()]
    values = flat.view(weight.values.shape).view(dtype)
    weight = Weight(weight.dense, weight.kept, values, weight.metadata, cpu.pack(values, weight.metadata, *shape))
    expected_values, expected_metadata = packed_model(weight, dtype)
    packed_values, packed_metadata = weight.packed
    assert packed_values.shape == expected_values.shape
    assert np.array_equal(packed_values.view(carrier).numpy().view(expected_values.dtype), expected_values)
    assert np.array_equal(packed_metadata.numpy(), expected_metadata)
    assert cpu.packed_shapes(*shape, dtype) == (tuple(packed_values.shape), tuple(packed_metadata.shape))
    back_values, back_metadata = cpu.unpack(*weight.packed, *shape)
    assert torch.equal(back_values.view(carrier), values.view(carrier))
    assert torch.equal(back_metadata, weight.metadata)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_tokens_and_strided_x(dtype: torch.dtype) -> None:
    weight = make_weight(20, 32, dtype, integers=True)
    assert cpu.linear(torch.empty(0, 32, dtype=dtype), *weight.packed, None, 20, 32).shape == (0, 20)
    x = integers(32, 9, dtype=dtype).T
    assert torch.equal(cpu.linear(x, *weight.packed, None, 20, 32), (x.double() @ weight.dense.T).to(dtype))
    row = integers(1, 32, dtype=dtype).expand(4, 32)  # stride 0
    assert torch.equal(cpu.linear(row, *weight.packed, None, 20, 32), (row.double() @ weight.dense.T).to(dtype))
    bias = integers(20, dtype=torch.bfloat16)
    y = cpu.linear(row, *weight.packed, bias, 20, 32)
    assert torch.equal(y, (row.double() @ weight.dense.T + bias.double()).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_family_follows_the_number_of_tokens(dtype: torch.dtype) -> None:
    weight = make_weight(64, 64, dtype, integers=True)
    for tokens, family in ((1, "few"), (512, "many")):
        cpu.linear(integers(tokens, 64, dtype=dtype), *weight.packed, None, 64, 64)
        assert _native.last_kernel() == f"{cpu.isa()}/{family}"


def test_wrong_input_is_refused() -> None:
    weight = make_weight(20, 32, torch.float32, integers=True)
    x = torch.zeros(3, 32)
    with pytest.raises(ShapeError, match=r"x is \[3, 28\]: it must be \[tokens, 32\]"):
        cpu.linear(x[:, :28], *weight.packed, None, 20, 32)
    with pytest.raises(ShapeError, match=r"bias is \[19\]: it must be \[20\]"):
        cpu.linear(x, *weight.packed, torch.zeros(19), 20, 32)
    with pytest.raises(ShapeError, match=r"packed values are .* this weight needs \[3, 8, 2, 16\]"):
        cpu.linear(x, *weight.packed, None, 40, 32)
    with pytest.raises(ShapeError, match="multiple of 4"):
        cpu.pack(weight.values, weight.metadata, 20, 30)
    with pytest.raises(UnsupportedError, match="x is torch.bfloat16 .* and the weight torch.float32"):
        cpu.linear(x.bfloat16(), *weight.packed, None, 20, 32)
    with pytest.raises(UnsupportedError, match="values are torch.float16"):
        cpu.pack(weight.values.half(), weight.metadata, 20, 32)
    with pytest.raises(UnsupportedError, match="instruction set 'sse9' is unknown; this build has: baseline"):
        cpu.linear(x, *weight.packed, None, 20, 32, isa="sse9")


def test_large_results_ask_for_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(_native, "ask_for_huge_pages", lambda *buffer: asked.append(buffer))
    packed = cpu.pack(torch.ones(1024, 2), torch.full((1024, 1), 0x44, dtype=torch.uint8), 1024, 4)
    asked.clear()
    cpu.linear(torch.ones(1023, 4), *packed, None, 1024, 4)
    assert asked == []
    y = cpu.linear(torch.ones(1024, 4), *packed, None, 1024, 4)
    assert asked == [(y.data_ptr(), 4 << 20)]


def ask_isa(name: str) -> subprocess.CompletedProcess[str]:
    program = (
        "from twofour.kernels import cpu\n"
        "print(cpu.available())\n"
        "try:\n    print(cpu.isa())\n"
        "except Exception as error:\n    print(type(error).__name__, error)\n"
    )
    environment = {**os.environ, "TWOFOUR_ISA": name}
    return subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)


def test_environment_chooses_the_instruction_set() -> None:
    done = ask_isa("baseline")
    assert done.stdout.splitlines() == ["None", "baseline"], done.stderr


def test_environment_with_an_unknown_instruction_set_is_an_error() -> None:
    done = ask_isa("avx9")
    reason, error = done.stdout.splitlines()
    assert reason.startswith("TWOFOUR_ISA: instruction set 'avx9' is unknown; this build has: baseline")
    assert error == f"UnsupportedError {reason}"


def test_environment_with_an_instruction_set_of_other_machines_is_an_error() -> None:
    other = "avx2" if "neon" in ISAS else "neon"
    reason, error = ask_isa(other).stdout.splitlines()
    assert f"instruction set '{other}' does not run on this machine; it has: baseline" in reason
    assert error == f"UnsupportedError {reason}"

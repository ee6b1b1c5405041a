"""Pruning and packing on a GPU: the bits of the specification, for any weight, place in memory and stream."""

from __future__ import annotations

import pytest
import torch
from tests.cuda.test_pack import weights
from tests.gpu.support import assert_packed, bytes_held, mask_of, pruned

from twofour import DeviceError, PatternError, ShapeError, UnsupportedError
from twofour.kernels import reference
from twofour.kernels.cuda import layout, packing, tokens
from twofour.testing import assert_same_bits, hostile_tensor

HALVES = [torch.bfloat16, torch.float16]
KINDS = ["normal", "ties", "far apart", "beyond double", "edges", "any bits"]
SHAPES = [(64, 64), (4, 4), (68, 132), (128, 60), (1028, 2052)]
LARGE = (8192, 8192)


def assert_both(weight: torch.Tensor, *, mask: torch.Tensor | None = None) -> None:
    """`prune_both` of a weight where it lies."""
    chosen = torch.zeros(weight.shape, dtype=torch.bool, device=weight.device)
    own, turned = packing.prune_both(weight, chosen)
    wanted = mask_of(weight, "2:4t") if mask is None else mask
    assert_same_bits(chosen.to(torch.uint8), wanted.to(torch.uint8))
    assert_packed(own, weight, wanted)
    assert_packed(turned, weight.T, wanted.T)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_smallest_weights_are_pruned_packed_taken_and_expanded(dtype: torch.dtype, device: torch.device) -> None:
    weight = weights((68, 132), dtype, "normal").to(device)
    assert_both(weight)
    packed, mask = packing.prune(weight), mask_of(weight, "2:4")
    assert_packed(packed, weight, mask)
    assert_packed(
        packing.PackedMatrix(packing.take(weight * 2, packed), packed.metadata, packed.shape), weight * 2, mask
    )
    assert_same_bits(packing.expand(packed), torch.where(mask.to(device), weight, 0))
    assert_packed(packing.compress(packing.expand(packed)), weight, mask)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_weights(shape: tuple[int, int], dtype: torch.dtype, kind: str, device: torch.device) -> None:
    weight = weights(shape, dtype, kind).to(device)
    assert_both(weight)
    mask = mask_of(weight, "2:4")
    packed = packing.prune(weight)
    assert_packed(packed, weight, mask)
    assert_same_bits(packing.expand(packed), torch.where(mask.to(device), weight, 0))


@pytest.mark.parametrize("dtype", layout.DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 4), (40, 100), (130, 1028)], ids=str)
def test_what_keeps_two_of_four_is_packed_and_expanded(
    shape: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> None:
    """Hostile numbers at the places kept, zeros of both signs beside them."""
    dense = hostile_tensor(shape, dtype, seed=shape[0])
    mask = torch.zeros(shape, dtype=torch.bool)
    mask.view(shape[0], -1, 4)[..., 1::2] = True
    carrier = torch.int16 if dtype.itemsize == 2 else torch.int8
    bits = torch.where(mask, dense.view(carrier), 0)
    sign = torch.iinfo(carrier).min if dtype.is_floating_point else 0
    bits[:, ::4] = sign  # -0.0, which is a zero and does not take a place
    magnitude = bits & ~sign if dtype.is_floating_point else bits
    mask = _kept(magnitude != 0)
    packed = packing.compress(bits.view(dtype).to(device))
    assert_packed(packed, bits.view(dtype), mask)
    back = torch.where(mask, bits, 0).view(dtype)
    assert_same_bits(packing.expand(packed), back)
    assert_same_bits(packing.take(back.to(device), packed), packed.values)


def _kept(nonzero: torch.Tensor) -> torch.Tensor:
    """Places that are not zero, filled up to two of each group from the first on."""
    groups = nonzero.view(len(nonzero), -1, 4).int()
    order = (torch.arange(4) - 8 * groups).argsort(-1)[..., :2]
    mask = torch.zeros(groups.shape, dtype=torch.bool)
    return mask.scatter_(-1, order, True).view_as(nonzero)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_views_and_odd_places_in_memory(dtype: torch.dtype, device: torch.device) -> None:
    whole = weights((66, 136), dtype, "normal").to(device)
    flat = whole.flatten()
    for weight in (
        whole[:64, 4:132],
        whole[:64, 1:129],  # rows that begin at 2 bytes
        whole[2:, :128].T.contiguous().T,  # columns that lie together
        flat[3 : 3 + 64 * 128].view(64, 128),  # 6 bytes off
        whole[:64, :128].expand(64, 128),
        whole[0:1, :128].expand(64, 128),  # one row for all
        whole[::2, :128][:32],
    ):
        assert_both(weight)
        assert_packed(packing.prune(weight), weight, mask_of(weight, "2:4"))
    before = whole.clone()
    packing.prune_both(whole[:64, 4:132])
    assert_same_bits(whole, before)


def test_kernels_write_nothing_around_what_they_are_given(device: torch.device) -> None:
    guard = torch.full((4096,), 0x5A, dtype=torch.uint8, device=device)
    weight = weights((64, 36), torch.bfloat16, "normal").to(device)
    for first in (16, 17, 18):  # whatever the mask's address is a multiple of
        guard.fill_(0x5A)
        mask = guard[first : first + 64 * 36].view(torch.bool).view(64, 36)
        packing.prune_both(weight, mask)
        assert torch.equal(mask.cpu(), mask_of(weight, "2:4t"))
        packing.keep_both(weight, mask)
        assert bool((guard[:first] == 0x5A).all())
        assert bool((guard[first + 64 * 36 :] == 0x5A).all())


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_weights_under_a_mask_that_is_given(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    before = weights(shape, dtype, "edges")
    mask = mask_of(torch.rand(shape, generator=torch.Generator().manual_seed(1)), "2:4t")
    weight = before.to(device)
    for in_place, check in ((False, True), (True, True), (True, False)):
        weight.copy_(before)
        own, turned = packing.keep_both(weight, mask.to(device), in_place=in_place, check=check)
        assert_packed(own, before, mask)
        assert_packed(turned, before.T, mask.T)
        assert_same_bits(weight, torch.where(mask, before, torch.zeros_like(before)) if in_place else before)
    with pytest.raises(PatternError, match="does not keep two of each four along both axes"):
        packing.keep_both(weight, torch.ones(shape, dtype=torch.bool, device=device))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8], ids=str)
@pytest.mark.parametrize("shape", [(5, 4), (40, 100), (130, 1028)], ids=str)
def test_weights_of_8_bits_are_pruned(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(shape[1])
    weight = torch.randint(-128, 128, shape, dtype=torch.int8, generator=generator).view(dtype)
    assert_packed(packing.prune(weight.to(device)), weight, mask_of(weight.double(), "2:4"))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("shape", [(5, 4), (40, 100), (130, 1028)], ids=str)
def test_weights_are_quantized_row_by_row(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    weight = weights(shape, dtype, "normal")
    weight[1] = 0
    weight[2] *= 2.0**-12
    weight[3, 0] = -7.0
    packed, scales = packing.quantize(weight.to(device))
    q, wanted = reference.quantize_rows_e4m3(weight)
    assert_same_bits(scales, wanted)
    assert_packed(packed, q, mask_of(weight, "2:4"))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("columns", [1, 100, 4099])
def test_tokens_are_quantized_as_the_reference_does(columns: int, dtype: torch.dtype, device: torch.device) -> None:
    x = hostile_tensor((9, columns), dtype, seed=columns)
    x[0], x[1] = 0, 2.0**-120
    x[2] = torch.randn(columns).to(dtype)
    q, scales = tokens.quantize(x.to(device))
    wanted, wanted_scales = reference.quantize_tokens(x)
    assert_same_bits(q.contiguous(), wanted)
    assert_same_bits(scales, wanted_scales)


@pytest.mark.parametrize("kind", ["normal", "ties"])
def test_large_weights(kind: str, gpu: torch.device) -> None:
    weight = weights(LARGE, torch.bfloat16, kind).to(gpu)
    assert_both(weight)
    packed = packing.prune(weight)
    assert_packed(packed, weight, mask_of(weight, "2:4"))
    assert_packed(packing.compress(packing.expand(packed)), weight, mask_of(weight, "2:4"))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_large_weights_of_one_byte(dtype: torch.dtype, gpu: torch.device) -> None:
    dense = pruned(LARGE, dtype)
    mask = _kept(dense.float() != 0)
    packed = packing.compress(dense.to(gpu))
    assert_packed(packed, dense, mask)
    assert_same_bits(packing.expand(packed).view(torch.uint8), dense.view(torch.uint8))


def test_the_stream_of_the_caller_orders_the_kernels(gpu: torch.device) -> None:
    old, new = (weights((512, 512), torch.bfloat16, kind).to(gpu) for kind in ("ties", "normal"))
    packing.prune_both(old)
    torch.cuda.synchronize(gpu)
    weight, stream = old.clone(), torch.cuda.Stream(gpu)
    torch.cuda.synchronize(gpu)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(40_000_000)  # what runs on another stream would see the old weight
        weight.copy_(new)
        own, turned = packing.prune_both(weight)
        again = packing.expand(own)
    stream.synchronize()
    mask = mask_of(new, "2:4t")
    assert_packed(own, new, mask)
    assert_packed(turned, new.T, mask.T)
    assert_same_bits(again, torch.where(mask.to(gpu), new, 0))


def test_graphs_are_captured_and_replayed(gpu: torch.device) -> None:
    weight = weights((516, 260), torch.bfloat16, "normal").to(gpu)
    mask = torch.zeros(weight.shape, dtype=torch.bool, device=gpu)
    packing.compress(packing.expand(packing.prune(weight)), check=False)  # kernels are loaded before the capture
    packing.take(weight, packing.prune_both(weight, mask)[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        own, turned = packing.prune_both(weight, mask)
        taken = packing.take(weight, own)
        one_way = packing.prune(weight)
        again = packing.compress(packing.expand(one_way), check=False)
    for kind in ("ties", "edges", "far apart"):
        new = weights((516, 260), torch.bfloat16, kind).to(gpu)
        weight.copy_(new)
        graph.replay()
        torch.cuda.synchronize(gpu)
        wanted = mask_of(new, "2:4t")
        assert torch.equal(mask.cpu(), wanted)
        assert_packed(own, new, wanted)
        assert_packed(turned, new.T, wanted.T)
        assert_same_bits(taken, own.values)
        assert_packed(one_way, new, mask_of(new, "2:4"))
        dense = packing.expand(one_way)
        assert_packed(again, dense, _kept(dense.cpu() != 0))


def test_two_streams_at_once_do_not_disturb_each_other(gpu: torch.device) -> None:
    inputs = [weights((2048, 2048), torch.bfloat16, kind).to(gpu) for kind in ("normal", "ties")]
    wanted = [packing.prune_both(each) for each in inputs]
    torch.cuda.synchronize(gpu)
    streams = [torch.cuda.Stream(gpu) for _ in inputs]
    found: list[list[tuple[packing.PackedMatrix, packing.PackedMatrix]]] = [[], []]
    for _ in range(8):
        for place, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                found[place].append(packing.prune_both(inputs[place]))
    torch.cuda.synchronize(gpu)
    for place, (own, turned) in enumerate(wanted):
        for each, other in found[place]:
            assert_same_bits(each.values, own.values)
            assert_same_bits(each.metadata, own.metadata)
            assert_same_bits(other.values, turned.values)
            assert_same_bits(other.metadata, turned.metadata)


def test_out_of_memory_leaves_nothing_behind(gpu: torch.device) -> None:
    weight = weights((4096, 4096), torch.bfloat16, "normal").to(gpu)
    packing.prune_both(weight)
    before, total = bytes_held(gpu), torch.cuda.get_device_properties(gpu).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(gpu) + (24 << 20)) / total, gpu)
    try:
        with pytest.raises((torch.cuda.OutOfMemoryError, DeviceError)):
            packing.prune_both(weight)  # 2 x 19 MB: the first may fit
        assert bytes_held(gpu) == before  # the traceback held what was there already
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, gpu)
    assert_both(weight)


def test_what_it_refuses(device: torch.device) -> None:
    weight = weights((16, 64), torch.bfloat16, "normal").to(device)
    with pytest.raises(ShapeError, match=r"\[16, 6\] is no matrix whose rows come in groups of 4"):
        packing.prune(weight[:, :6])
    with pytest.raises(UnsupportedError, match="float32 is not packed by a GPU kernel"):
        packing.prune(weight.float())
    with pytest.raises(PatternError, match=r"\[16, 64\] does not keep two of each four: prune it first"):
        packing.compress(weight)
    packed = packing.prune(weight)
    with pytest.raises(ShapeError, match="they must agree"):
        packing.take(weight.half(), packed)


def test_devices_are_not_mixed(gpu: torch.device) -> None:
    weight = weights((16, 64), torch.bfloat16, "normal")
    with pytest.raises(UnsupportedError, match="the matrix is on cpu: GPU kernels need it on a GPU"):
        packing.prune(weight)
    with pytest.raises(UnsupportedError, match=r"weight is on cuda:\d, mask on cpu: put them on one"):
        packing.prune_both(weight.to(gpu), torch.zeros(16, 64, dtype=torch.bool))
    packed = packing.prune(weight.to(gpu))
    with pytest.raises((ShapeError, UnsupportedError), match="cpu"):
        packing.take(weight, packed)
    with pytest.raises(UnsupportedError, match="the matrix is on cpu: GPU kernels need it on a GPU"):
        packing.expand(packing.PackedMatrix(packed.values.cpu(), packed.metadata.cpu(), packed.shape))


def test_a_mask_that_is_refused_leaves_the_weight_as_it_was(device: torch.device) -> None:
    weight = weights((68, 132), torch.bfloat16, "normal").to(device)
    before, mask = weight.clone(), mask_of(weight, "2:4t").to(device)
    with pytest.raises(PatternError, match="does not keep two of each four along both axes"):
        packing.keep_both(weight, mask.logical_not() & mask, in_place=True)
    assert_same_bits(weight, before)
    packing.keep_both(weight, mask, in_place=True, check=False)
    assert_same_bits(weight, torch.where(mask, before, 0))

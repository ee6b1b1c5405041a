"""Few tokens on a GPU: exact in whole numbers for every number of tokens, within the bound of every output in others."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tests.gpu.support import bytes_held, decoded, pruned, specified
from torch import Tensor

from twofour import DeviceError, ShapeError, UnsupportedError
from twofour.kernels.cuda import arguments, decode, driver, packing, products, table
from twofour.testing import assert_same_bits, assert_within_bound

DTYPES = [torch.bfloat16, torch.float16, torch.int8]
LARGE = [(8192, 8192), (28672, 8192), (4096, 14336)]


def packed_of(dense: Tensor, device: torch.device) -> packing.PackedMatrix:
    """By the specification, so that a fault of the kernels that pack is not taken for one of this kernel."""
    found = specified(dense, _kept(dense))
    return packing.PackedMatrix(found.values.to(device), found.metadata.to(device), found.shape)


def _kept(dense: Tensor) -> Tensor:
    groups = (dense.float() != 0).view(len(dense), -1, 4).int()
    order = (torch.arange(4) - 8 * groups).argsort(-1)[..., :2]
    return torch.zeros(groups.shape, dtype=torch.bool).scatter_(-1, order, True).view(dense.shape)


def tokens_of(count: int, columns: int, dtype: torch.dtype, seed: int, *, whole: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if whole or not dtype.is_floating_point:
        high = 5 if whole else 128
        return torch.randint(-high + 1, high, (count, columns), generator=generator).to(dtype)
    return torch.randn(count, columns, generator=generator).to(dtype)


def out_of(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype.is_floating_point else torch.bfloat16


def assert_exact(shape: tuple[int, int], dtype: torch.dtype, counts: list[int], device: torch.device) -> None:
    """With bias, and for int8 with scales."""
    dense = pruned(shape, dtype, whole=True)
    packed, out = packed_of(dense, device), out_of(dtype)
    bias = (torch.arange(shape[0]) % 9 - 4).to(out)
    for count in counts:
        x = tokens_of(count, shape[1], dtype, count, whole=True)
        wanted = x.double() @ dense.double().T + bias.double()
        assert_same_bits(decoded(x.to(device), packed, bias.to(device)), wanted.to(out))
        of_rows = 2.0 ** (torch.arange(shape[0]) % 5 - 2)
        of_tokens = 2.0 ** (torch.arange(count) % 3 - 1)
        found = decoded(
            x.to(device),
            packed,
            row_scale=of_rows.float().to(device),
            token_scale=of_tokens.float().to(device),
        )
        wanted = x.double() @ dense.double().T * of_rows.double() * of_tokens.double()[:, None]
        assert torch.equal(found.cpu(), wanted.to(out))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_smallest_products_are_exact(dtype: torch.dtype, device: torch.device) -> None:
    assert_exact((40, 200), dtype, [1, 9], device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(300, 1160), (16, 64), (130, 60), (4096, 520)], ids=str)
def test_every_number_of_tokens_is_exact(shape: tuple[int, int], dtype: torch.dtype, gpu: torch.device) -> None:
    assert_exact(shape, dtype, [*range(1, 67), 100, 127, 128, 129, 200, 513], gpu)


@pytest.mark.parametrize("tokens", [1, 7, 16, 33, 64, 65, 150])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_real_numbers_stay_within_the_bound(dtype: torch.dtype, tokens: int, device: torch.device) -> None:
    dense, x = pruned((200, 1432), dtype), tokens_of(tokens, 1432, dtype, tokens)
    bias = torch.randn(200).to(out_of(dtype))
    y = decoded(x.to(device), packed_of(dense, device), bias.to(device))
    assert_within_bound(y, x, dense, bias)


def assert_scaled_exact(shape: tuple[int, int], dtype: torch.dtype, counts: list[int], device: torch.device) -> None:
    """An e4m3 weight with a scale for each row among inputs of 16 bits; where the GPU multiplies e4m3, such inputs too."""
    dense = pruned(shape, torch.float8_e4m3fn, whole=True)
    packed, scale = packed_of(dense, device), 2.0 ** (torch.arange(shape[0]) % 5 - 2)
    for count in counts:
        x = tokens_of(count, shape[1], dtype, count, whole=True)
        wanted = (x.double() @ dense.double().T * scale.double()).to(dtype)
        found = products.linear(x.to(device), packed, row_scale=scale.float().to(device))
        assert_same_bits(found, wanted)
        if table.why_not("decode_e4m3_8", device) is None:
            narrow = x.to(torch.float8_e4m3fn).to(device)
            found = products.linear(narrow, packed, row_scale=scale.float().to(device), out_dtype=dtype)
            assert_same_bits(found, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_e4m3_weights_are_exact(dtype: torch.dtype, device: torch.device) -> None:
    assert_scaled_exact((40, 200), dtype, [1, 33], device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(300, 1160), (16, 64), (130, 60), (4096, 520)], ids=str)
def test_e4m3_weights_are_exact_for_every_number_of_tokens(
    shape: tuple[int, int], dtype: torch.dtype, gpu: torch.device
) -> None:
    assert_scaled_exact(shape, dtype, [*range(1, 67), 100, 128, 200, 256, 257, 513], gpu)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_e4m3_is_the_number_that_it_is(dtype: torch.dtype, device: torch.device) -> None:
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    dense = torch.zeros(256, 4, dtype=torch.uint8)
    dense[:, 1] = every.view(torch.uint8)
    dense[:, 2] = 1  # 2^-9
    x = torch.tensor([0.0, 2.0, 0.0, float("nan")]).to(dtype).expand(9, 4)
    y = decoded(x.to(device), packed_of(dense.view(torch.float8_e4m3fn), device), out_dtype=torch.float32)
    assert torch.equal(y.cpu().isnan(), every.float().isnan().expand(9, -1))
    assert torch.equal(y.cpu().nan_to_num(), (2 * every.float()).nan_to_num().expand(9, -1))


@pytest.mark.parametrize("shape", LARGE, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_layers_stay_within_the_bound(dtype: torch.dtype, shape: tuple[int, int], gpu: torch.device) -> None:
    generator = torch.Generator(gpu).manual_seed(0)
    dense = torch.randn(shape, generator=generator, device=gpu) * (30 if dtype == torch.int8 else 1)
    weight = packing.expand(packing.prune(dense.bfloat16()))
    dense = weight.round().clamp(-127, 127).to(dtype) if dtype == torch.int8 else weight.to(dtype)
    packed, some = packing.compress(dense), torch.arange(0, shape[0], 61, device=gpu)
    for tokens in (1, 16, 64):
        x = tokens_of(tokens, shape[1], dtype, tokens).to(gpu)
        y = decoded(x, packed)
        assert_within_bound(y[:, some], x, dense[some])
        for _ in range(3):  # whichever block comes last
            assert_same_bits(decoded(x, packed), y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_places_that_are_dropped_are_never_looked_at(dtype: torch.dtype, device: torch.device) -> None:
    dense = torch.zeros(20, 64, dtype=dtype)
    dense[:, 1::4], dense[:, 2::4] = 1, -1
    x = torch.ones(9, 64, dtype=dtype)
    x[:, 0::4], x[:, 3::4] = float("inf"), float("nan")
    y = decoded(x.to(device), packed_of(dense, device))
    assert torch.equal(y.cpu(), torch.zeros(9, 20, dtype=dtype))
    x[:, 1] = float("nan")
    assert bool(decoded(x.to(device), packed_of(dense, device)).isnan().all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inputs_are_read_where_they_lie(dtype: torch.dtype, device: torch.device) -> None:
    dense = pruned((40, 120), dtype, whole=True)
    packed, whole = packed_of(dense, device), tokens_of(12, 260, dtype, 1, whole=True).to(device)
    for x in (whole[:, 16:136], whole[:, 1:121], whole[::2, :120], whole[:, :120].T.contiguous().T, whole[:1, 3:123]):
        wanted = (x.cpu().double() @ dense.double().T).to(out_of(dtype))
        assert_same_bits(decoded(x, packed), wanted)


def test_empty_sides(device: torch.device) -> None:
    packed = packed_of(pruned((40, 64), torch.bfloat16), device)
    assert decoded(torch.zeros(0, 64, dtype=torch.bfloat16, device=device), packed).shape == (0, 40)


def test_graphs_streams_and_another_stream_at_once(gpu: torch.device) -> None:
    shape = (1000, 8192)  # blocks that share columns count up in memory of their own
    dense = pruned(shape, torch.bfloat16, whole=True)
    packed = packed_of(dense, gpu)
    inputs = [tokens_of(16, shape[1], torch.bfloat16, seed, whole=True).to(gpu) for seed in range(4)]
    wanted = [(x.double() @ dense.to(gpu).double().T).bfloat16() for x in inputs]
    assert_same_bits(decoded(inputs[0], packed), wanted[0])
    x = inputs[0].clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = decoded(x, packed)
    for given, right in zip(inputs, wanted, strict=True):
        x.copy_(given)
        graph.replay()
        assert_same_bits(y, right)
    streams = [torch.cuda.Stream(gpu) for _ in inputs]
    torch.cuda.synchronize(gpu)
    found: list[list[Tensor]] = [[] for _ in inputs]
    for _ in range(10):
        for place, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                found[place].append(decoded(inputs[place], packed))
    torch.cuda.synchronize(gpu)
    for place, right in enumerate(wanted):
        for each in found[place]:
            assert_same_bits(each, right)


def hopper(gpu: torch.device) -> None:
    if not table.knows_clusters(gpu):
        pytest.skip("clusters and early starts are from capability 9.0 on")


@pytest.mark.parametrize("tokens", [1, 12, 33, 64])
@pytest.mark.parametrize("name", ["bf16", "int8", "e4m3_bf16"])
def test_clusters_and_early_starts_change_no_bit(name: str, tokens: int, gpu: torch.device) -> None:
    hopper(gpu)
    weight = {"bf16": torch.bfloat16, "int8": torch.int8, "e4m3_bf16": torch.float8_e4m3fn}[name]
    x = tokens_of(tokens, 8192, torch.int8 if name == "int8" else torch.bfloat16, tokens).to(gpu)
    packed = packed_of(pruned((1000, 8192), weight), gpu)
    scale = torch.linspace(0.001, 0.01, 1000, device=gpu)
    residual = tokens_of(tokens, 1000, torch.bfloat16, 1).to(gpu)
    call = arguments.check(x, packed, residual[0].clone(), scale, None, "silu", residual, None)
    assert min(table.most_clusters(decode.kernel_for(name, tokens), gpu)) > 0

    def again(slices: int, *, clusters: bool = True, early: bool = False) -> Tensor:
        call.y.fill_(float("nan"))
        return decode.multiplied(call, None, slices, clusters=clusters, early=early).clone()

    for slices in (1, *table.CLUSTERS):
        wanted = again(slices, clusters=False)
        assert bool(wanted.isfinite().all())
        for _ in range(3):
            assert_same_bits(again(slices), wanted)
            assert_same_bits(again(slices, clusters=False, early=True), wanted)
            assert_same_bits(again(slices, early=True), wanted)


@pytest.mark.parametrize("captured", [False, True], ids=["stream", "graph"])
@pytest.mark.parametrize(("slices", "clusters"), [(None, True), (4, True), (2, False)])
def test_early_starts_see_what_the_product_before_wrote(
    slices: int | None, clusters: bool, captured: bool, gpu: torch.device
) -> None:
    """A chain: y of each product is x of the next one and the residual of the one after it, and nothing stands between."""
    hopper(gpu)
    size, length = 2048, 12
    weights = [packed_of(pruned((size, size), torch.bfloat16, seed), gpu) for seed in range(length)]
    scale = torch.full((size,), size**-0.5, device=gpu)
    x = tokens_of(16, size, torch.bfloat16, 0).to(gpu)
    calls: list[arguments.Arguments] = []
    for weight in weights:
        given = calls[-1].y if calls else x
        residual = calls[-2].y if len(calls) > 1 else None
        calls.append(arguments.check(given, weight, None, scale, None, "none", residual, None))

    def chain(*, early: bool) -> None:
        for place, call in enumerate(calls):
            decode.multiplied(call, None, slices, clusters=clusters, early=early and place > 0)

    def spoil() -> None:
        for call in calls:
            call.y.fill_(float("nan"))
        torch.cuda.synchronize(gpu)

    spoil()
    chain(early=False)
    wanted = [call.y.clone() for call in calls]
    assert bool(wanted[-1].isfinite().all())
    graph = torch.cuda.CUDAGraph()
    if captured:
        with torch.cuda.graph(graph):
            chain(early=True)
    for _ in range(5):
        spoil()
        if captured:
            graph.replay()
        else:
            chain(early=True)
        for call, right in zip(calls, wanted, strict=True):
            assert_same_bits(call.y, right)


def test_kernels_are_loaded_while_a_graph_is_captured(gpu: torch.device) -> None:
    dense = pruned((1000, 8192), torch.float16, whole=True)
    packed, x = packed_of(dense, gpu), tokens_of(16, 8192, torch.float16, 1, whole=True).to(gpu)
    table._loaded.cache_clear()
    driver.driver()._kernels.clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = decoded(x, packed)
    graph.replay()
    assert_same_bits(y, (x.double() @ dense.to(gpu).double().T).half())


def test_a_thread_that_has_no_context_yet(gpu: torch.device) -> None:
    dense = pruned((1000, 8192), torch.bfloat16, whole=True)
    packed, x = packed_of(dense, gpu), tokens_of(16, 8192, torch.bfloat16, 1, whole=True).to(gpu)
    wanted = decoded(x, packed)
    with ThreadPoolExecutor(1) as other:
        assert_same_bits(other.submit(decoded, x, packed).result(), wanted)


def test_out_of_memory_leaves_nothing_behind(gpu: torch.device) -> None:
    dense = pruned((2048, 1024), torch.bfloat16, whole=True)
    packed, x = packed_of(dense, gpu), tokens_of(32768, 1024, torch.bfloat16, 0, whole=True).to(gpu)
    first = decoded(x[:64], packed)
    before, total = bytes_held(gpu), torch.cuda.get_device_properties(gpu).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(gpu) + (32 << 20)) / total, gpu)
    try:
        with pytest.raises((torch.cuda.OutOfMemoryError, DeviceError)):
            decoded(x, packed)  # 134 MB of outputs
        assert bytes_held(gpu) == before  # the traceback held what was there already
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, gpu)
    assert_same_bits(decoded(x[:64], packed), first)


def test_what_it_refuses(device: torch.device) -> None:
    packed = packed_of(pruned((40, 64), torch.bfloat16), device)
    with pytest.raises(UnsupportedError, match=r"x is torch.float16, the weight torch.bfloat16"):
        decoded(torch.zeros(1, 64, dtype=torch.float16, device=device), packed)
    x = torch.zeros(1, 64, dtype=torch.bfloat16, device=device)
    with pytest.raises(ShapeError, match=r"x is \[1, 60\]: a weight of \[40, 64\] takes"):
        decoded(x[:, :60], packed)
    with pytest.raises(ShapeError, match=r"bias is \[39\]"):
        decoded(x, packed, torch.zeros(39, dtype=torch.bfloat16, device=device))


def test_devices_are_not_mixed(gpu: torch.device) -> None:
    packed = packed_of(pruned((40, 64), torch.bfloat16), gpu)
    x = torch.zeros(1, 64, dtype=torch.bfloat16)
    with pytest.raises(UnsupportedError, match=r"x is on cpu, the weight on cuda:\d: put both on one GPU"):
        decoded(x, packed)
    with pytest.raises(UnsupportedError, match=r"x is on cuda:\d, bias on cpu: put them on one device"):
        decoded(x.to(gpu), packed, torch.zeros(40, dtype=torch.bfloat16))
    with pytest.raises(ShapeError, match=r"values .* on cuda:\d, metadata .* on cpu: .* on one device"):
        decoded(x.to(gpu), packing.PackedMatrix(packed.values, packed.metadata.cpu(), packed.shape))

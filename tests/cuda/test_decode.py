"""The kernels for few tokens, on an emulated GPU: exact in whole numbers, for every format, size and way to share columns."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from tests.cuda import model
from tests.cuda.emulation import Guarded, launch
from tests.cuda.products import E4M3, KINDS, Case, close, decoded, launched, name_of, numbers, packed_of, powers

from twofour import ShapeError, SparseMatrix, UnsupportedError
from twofour.kernels import epilogue
from twofour.kernels.cuda import arguments, compiler, decode, layout, resources, table
from twofour.kernels.cuda.decode import plan
from twofour.kernels.cuda.packing import PackedMatrix

__all__ = ["launched"]
PATTERN = SparseMatrix.from_dense(torch.zeros(1, 4)).pattern


def run(case: Case, slices: int = 1, *, cluster: bool = False, early: bool = False) -> torch.Tensor:
    """What the kernel gives, twice: counters are as they were.

    Args:
        cluster: slices are one, and have no other memory for their sums.
        early: it is started before it may read.
    """
    size = next(size for size in decode.TOKENS if size >= case.tokens)
    name = f"decode_{name_of(case.dtype, case.weight)}_{size}"
    of_block = table.KERNEL_TEXTS[name].rows
    blocks, chunks = -(-case.shape[0] // of_block), -(-case.shape[1] // 64)
    each = -(-chunks // slices)
    counters = Guarded(torch.zeros(blocks, dtype=torch.int32))
    partial = Guarded(torch.full((slices, blocks, size, of_block), 0x7FFFFFFF, dtype=torch.int32))
    grid = (blocks, -(-chunks // each))
    product = (*case.of_product(), each)
    shared = (None, None) if cluster else (partial, counters)
    for _ in range(2):
        launch(
            name,
            grid,
            256,
            *product,
            *shared,
            early,
            *case.of_epilogue(),
            cluster=grid[1] if cluster else 1,
            early=early,
        )
        assert not counters.tensor().any()
    return case.y.tensor()


@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 16, 31, 33, 64])
@pytest.mark.parametrize(("dtype", "weight"), KINDS, ids=str)
def test_whole_numbers_are_exact(dtype: torch.dtype, weight: torch.dtype, tokens: int) -> None:
    case = Case(dtype, tokens, (40, 200), weight=weight)
    assert torch.equal(run(case), case.wanted().to(case.out))


@pytest.mark.parametrize("shape", [(4, 4), (16, 64), (130, 60), (17, 1100), (84, 3000), (300, 576)], ids=str)
@pytest.mark.parametrize("tokens", [5, 34])
@pytest.mark.parametrize(("dtype", "weight"), KINDS, ids=str)
def test_any_shape(dtype: torch.dtype, weight: torch.dtype, tokens: int, shape: tuple[int, int]) -> None:
    case = Case(dtype, tokens, shape, bias=True, residual=True, weight=weight)
    assert torch.equal(run(case), case.wanted().to(case.out))


@pytest.mark.parametrize("slices", [2, 3, 5])
@pytest.mark.parametrize("tokens", [12, 32])
@pytest.mark.parametrize(("dtype", "weight"), KINDS, ids=str)
def test_blocks_that_share_columns_add_up(dtype: torch.dtype, weight: torch.dtype, tokens: int, slices: int) -> None:
    case = Case(dtype, tokens, (150, 1400), bias=True, scales=True, weight=weight)
    assert torch.equal(run(case, slices), case.wanted().to(case.out))


@pytest.mark.parametrize(("tokens", "slices"), [(5, 2), (12, 8), (32, 4), (50, 2)])
@pytest.mark.parametrize(("dtype", "weight"), KINDS, ids=str)
def test_blocks_of_a_cluster_read_each_others_sums(
    dtype: torch.dtype, weight: torch.dtype, tokens: int, slices: int
) -> None:
    """Each finishes some of the tokens; to the bit as blocks that are no cluster."""
    case = Case(dtype, tokens, (150, 1400), bias=True, scales=True, residual=True, activation="relu", weight=weight)
    y = run(case, slices, cluster=True)
    assert torch.equal(y, case.wanted().to(case.out))
    case.x = (case.x.float() / 7).to(dtype) if dtype.itemsize == 2 else case.x
    assert torch.equal(run(case, slices, cluster=True), run(case, slices))


@pytest.mark.parametrize(("dtype", "weight"), KINDS, ids=str)
def test_a_kernel_that_starts_early_reads_nothing_before_it_may(dtype: torch.dtype, weight: torch.dtype) -> None:
    """The emulated GPU ends a process whose kernel does. What is prefetched lies in the weight."""
    for tokens, shape, slices in ((3, (40, 200), 1), (20, (150, 1400), 2), (64, (17, 100), 1)):
        case = Case(dtype, tokens, shape, bias=True, scales=True, residual=True, weight=weight)
        for cluster in {False, slices > 1}:
            assert torch.equal(run(case, slices, cluster=cluster, early=True), case.wanted().to(case.out))


@pytest.mark.parametrize("activation", epilogue.ACTIVATIONS)
@pytest.mark.parametrize("out", arguments.ITEMS, ids=str)
@pytest.mark.parametrize(("dtype", "weight"), KINDS, ids=str)
def test_what_follows_the_sums(dtype: torch.dtype, weight: torch.dtype, out: torch.dtype, activation: str) -> None:
    case = Case(dtype, 6, (23, 8), out=out, bias=True, scales=True, activation=activation, residual=True, weight=weight)
    assert case.residual is not None
    assert close(run(case), case.wanted(), case.residual)


@pytest.mark.parametrize("activation", epilogue.ACTIVATIONS)
@pytest.mark.parametrize("out", arguments.ITEMS, ids=str)
def test_activations_of_any_number(out: torch.dtype, activation: str) -> None:
    """By way of the bias: NaN stays, -inf becomes -inf * 0, small results keep their digits."""
    infinity = float("inf")
    special = torch.tensor([0.0, infinity, -infinity, float("nan"), 1e-6, -1e-6, 40.0, -40.0])
    case = Case(torch.int8, 2, (136, 4), out=out, activation=activation)
    case.dense.zero_()
    case.packed.values.zero_()
    case.bias = torch.cat([special, torch.linspace(-9, 9, 128)]).to(out)
    assert close(run(case), case.wanted())


@pytest.mark.parametrize("tokens", decode.TOKENS)
@pytest.mark.parametrize("kind", ["bf16", "int8", "e4m3_bf16"])
@pytest.mark.parametrize(
    "shape", [(8192, 8192), (28672, 8192), (4096, 14336), (64, 64), (1024, 128), (128, 65536)], ids=str
)
def test_the_plan_covers_all_chunks_and_fills_the_gpu(shape: tuple[int, int], kind: str, tokens: int) -> None:
    name = f"decode_{kind}_{tokens}"
    found = plan(name, *shape, 132)
    chunks = -(-shape[1] // 64)
    assert found.slice * found.slices >= chunks > found.slice * (found.slices - 1)
    assert found.blocks == -(-shape[0] // table.KERNEL_TEXTS[name].rows)
    if shape[0] * shape[1] >= 1 << 26:
        rounds = found.blocks * found.slices / (132 * table.KERNEL_TEXTS[name].blocks)
        assert rounds > 0.7  # together they ask for as much as the last cache gives
        assert rounds <= 1 or rounds % 1 == 0 or rounds % 1 > 0.3  # no last round of a few blocks, for whom all wait


@pytest.mark.parametrize("kind", ["bf16", "fp16", "int8", "e4m3_bf16"])
def test_columns_are_shared_where_rows_alone_leave_processors_idle(kind: str) -> None:
    for tokens, shapes in ((8, ((8192, 8192), (28672, 8192), (14336, 4096))), (16, ((28672, 8192),))):
        for rows, columns in shapes:
            assert plan(f"decode_{kind}_{tokens}", rows, columns, 132).slices == 1
    for tokens in decode.TOKENS:
        for rows, columns in ((1024, 8192), (2048, 8192), (128, 65536)):
            found = plan(f"decode_{kind}_{tokens}", rows, columns, 132)
            assert found.slices > 1
            assert 0.08 < found.blocks * found.slices / 132 <= 1
        assert plan(f"decode_{kind}_{tokens}", 64, 64, 132).slices == 1  # a chunk has one reader


@pytest.mark.parametrize("kind", ["bf16", "int8", "e4m3_bf16"])
def test_columns_are_shared_in_clusters_where_the_gpu_holds_them(kind: str) -> None:
    of_hopper = (66, 32, 16)
    for tokens in decode.TOKENS:
        for shape in ((8192, 8192), (28672, 8192), (1024, 8192), (4096, 14336), (64, 64)):
            name = f"decode_{kind}_{tokens}"
            found = plan(name, *shape, 132, of_hopper)
            assert not plan(name, *shape, 132).cluster
            if found.cluster:
                assert found.slices in table.CLUSTERS
            assert plan(name, *shape, 132, (0, 0, 0)) == plan(name, *shape, 132)
    assert plan(f"decode_{kind}_32", 8192, 8192, 132, of_hopper).cluster
    # Few of them would take turns: slices then meet in memory.
    assert not plan(f"decode_{kind}_32", 8192, 8192, 132, (3, 1, 0)).cluster


def test_a_launch_in_clusters_needs_no_memory_for_sums(launched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    packed, dense = packed_of((36, 3000), torch.bfloat16)
    x = numbers((70, 3000), torch.bfloat16, 4)
    monkeypatch.setattr(resources, "processors", lambda _: 132)
    monkeypatch.setattr(table, "most_clusters", lambda *_: (66, 32, 16))
    monkeypatch.setattr(resources, "counters", lambda *_: pytest.fail("they count nothing"))
    call = arguments.check(x, packed, None, None, None, "none", None, torch.float32)
    wanted = x.float() @ dense.float().T
    for slices in (None, 2, 8):
        for early in (False, True):
            call.y.fill_(float("nan"))
            assert torch.equal(decode.multiplied(call, None, slices, early=early), wanted)
    assert len(launched) == 12


@pytest.mark.parametrize(("dtype", "weight"), KINDS, ids=str)
def test_more_tokens_than_a_launch_takes(
    dtype: torch.dtype, weight: torch.dtype, launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """65 tokens, columns shared by blocks, everything that can follow, each of its own row or token."""
    tokens, rows, columns = 65, 36, 3000
    monkeypatch.setattr(resources, "processors", lambda _: 132)
    assert all(plan(f"decode_{name_of(dtype, weight)}_{size}", rows, columns, 132).slices > 1 for size in (8, 64))
    packed, dense = packed_of((rows, columns), weight)
    x = numbers((tokens, columns), dtype, 4)
    out = torch.bfloat16 if dtype.itemsize == 1 else dtype
    bias, residual = numbers((rows,), out, 9), numbers((tokens, rows), out, 9)
    row_scale, token_scale = powers(rows, 1), powers(tokens, 2)
    y = decoded(x, packed, bias, row_scale=row_scale, token_scale=token_scale, activation="relu", residual=residual)
    sums = x.double() @ dense.double().T * row_scale.double() * token_scale.double()[:, None]
    assert torch.equal(y, ((sums + bias.double()).relu() + residual.double()).to(out))
    name = name_of(dtype, weight)
    assert launched == [f"decode_{name}_64", f"decode_{name}_8"]


@pytest.mark.parametrize("tokens", [1, 33])
@pytest.mark.parametrize("dtype", arguments.NAMES_OF_E4M3, ids=str)
def test_every_e4m3_is_multiplied_as_the_number_that_it_is(dtype: torch.dtype, tokens: int) -> None:
    """All 256 of them, each in every place of its group of a row of its own: subnormals, 448, NaN."""
    case = Case(dtype, tokens, (1024, 4), out=torch.float32, weight=E4M3)
    every, place = torch.arange(256, dtype=torch.uint8).view(E4M3), torch.arange(4)
    dense = torch.zeros(256, 4, 4, dtype=torch.uint8)
    dense[:, place, place] = every.view(torch.uint8)[:, None]
    mask = torch.eye(4, dtype=torch.bool) | torch.eye(4, dtype=torch.bool).roll(1, 1)
    matrix = SparseMatrix.from_dense(dense.view(E4M3).view(1024, 4), "2:4", mask=mask.repeat(256, 1))
    case.packed = PackedMatrix(*layout.pack(matrix.values, matrix.metadata, 1024, 4), (1024, 4))
    case.x = torch.tensor([1.0, -2.0, 0.5, 3.0]).to(dtype).repeat(tokens, 1)
    wanted = (every.double()[:, None] * case.x[0].double()).flatten().expand(tokens, -1)
    y = run(case).double()
    assert torch.equal(y.isnan(), wanted.isnan())
    assert torch.equal(y.nan_to_num(), wanted.nan_to_num())
    assert sorted(wanted.abs().unique().tolist())[:2] == [0, 2.0**-10]
    assert int(wanted.isnan().sum()) == 2 * 4 * tokens


def test_e4m3_inputs_are_for_gpus_that_multiply_them(launched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    device, name = torch.device("cuda", 0), "decode_e4m3_8"
    able = [each for each in compiler.ARCHITECTURES if table.KERNEL_TEXTS[name].runs_on(each)]
    assert able == ["sm_89", "sm_120a"]
    packed, dense = packed_of((20, 64), E4M3)
    x = numbers((3, 64), E4M3, 4)
    for architecture in compiler.ARCHITECTURES:
        monkeypatch.setattr(table, "_architecture", lambda _, found=architecture: found)
        assert (table.why_not(name, device) is None) == (architecture in able)
        assert table.why_not("decode_e4m3_bf16_8", device) is None
    why_not = table.why_not
    for architecture in ("sm_80", "sm_86", "sm_87", "sm_90a"):
        monkeypatch.setattr(table, "_architecture", lambda _, found=architecture: found)
        monkeypatch.setattr(table, "why_not", why_not)
        said = f"{architecture} does not multiply e4m3, only sm_89, sm_120, sm_121 do"
        with pytest.raises(UnsupportedError, match=f"decode_e4m3_8 is not for this GPU: {said}"):
            table._loaded(name, device)
        monkeypatch.setattr(table, "why_not", lambda kernel, _: why_not(kernel, device))
        with pytest.raises(UnsupportedError, match=f"x is torch.float8_e4m3fn, and {said}: give it as x.half"):
            decoded(x, packed)
    assert launched == []
    y = decoded(x.half(), packed, out_dtype=torch.float32)
    assert torch.equal(y, x.float() @ dense.float().T)


@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.bfloat16, 2.0**-110), (torch.bfloat16, 2.0**110), (torch.float16, 2.0**-24)]
)
def test_e4m3_weights_take_inputs_of_any_size(dtype: torch.dtype, size: float) -> None:
    """No power of two of theirs stands between: sums neither overflow nor lose digits before they are scaled."""
    case = Case(dtype, 3, (20, 128), out=torch.float32, scales=True, weight=E4M3)
    case.x = (case.x.double() * size).to(dtype)
    assert torch.equal(run(case), case.wanted().float())


def test_an_input_at_a_dropped_place_of_an_e4m3_weight_reaches_nothing() -> None:
    case = Case(torch.bfloat16, 9, (64, 320), weight=E4M3)
    kept = SparseMatrix(*layout.unpack(case.packed.values, case.packed.metadata, 64, 320), PATTERN, (64, 320)).mask()
    never = ~kept[3]
    case.x[2, never] = float("nan")
    case.x[4, never] = float("inf")
    y, wanted = run(case), case.wanted().bfloat16()
    assert torch.equal(y[[0, 1, 3]], wanted[[0, 1, 3]])
    assert bool(y[2, :3].isnan().all())
    case.x[2, never] = case.x[4, never] = 0
    assert torch.equal(y[:, 3], case.wanted().bfloat16()[:, 3])


def test_neighbours_swap_groups_so_that_16_bit_products_take_8_bit_fragments() -> None:
    """The order of groups that products.h draws, through a model of the hardware that knows nothing of twofour."""
    packed, dense = packed_of((16, 64), E4M3)
    values, words = packed.values[0, 0].double().numpy(), packed.metadata[0, 0].numpy().view(np.uint32)
    b = numbers((64, 8), torch.float32, 4).double().numpy()
    found = np.zeros((16, 8))
    order = [0, 1, 4, 5, 2, 3, 6, 7]  # groups of a step, by their places
    for step in range(2):
        a, metadata = np.zeros((32, 8)), np.zeros(32, np.uint32)
        for lane in range(32):
            q = lane % 4
            for place, group in ((0, order[q]), (1, order[q + 4])):
                for row in range(2):
                    holder = lane - q + group // 2
                    first = 4 * (2 * step + row) + 2 * (group % 2)
                    a[lane, 4 * place + 2 * row :][:2] = values[holder, first : first + 2]
            upper, lower = (words[lane - lane % 4 + 2 * (q // 2) + row].tobytes() for row in range(2))
            metadata[lane] = int.from_bytes(bytes(w[i] for w in (upper, lower) for i in (q % 2, q % 2 + 2)), "little")
        part = b[32 * step : 32 * step + 32].reshape(8, 4, 8)[order].reshape(32, 8)
        found += model.sparse_a(a, metadata, step, 16) @ part
    assert np.array_equal(found, dense.double().numpy() @ b)


def test_views_are_read_where_they_lie_or_copied(launched: list[str]) -> None:
    packed, dense = packed_of((20, 64), torch.float16)
    whole = numbers((6, 88), torch.float16, 4)
    residual = numbers((6, 40), torch.float16, 9)
    for x in (whole[:, :64], whole[:, 8:72], whole[:, 1:65], whole[::2, 16:80], whole[:, :64].T.contiguous().T):
        assert torch.equal(decoded(x, packed).double(), x.double() @ dense.double().T)
        for other in (residual[: len(x), 1:21], residual[: len(x), ::2], residual[:1, 3:23].expand(len(x), 20)):
            y = decoded(x, packed, residual=other, out_dtype=torch.float16)
            assert torch.equal(y.double(), x.double() @ dense.double().T + other.double())


def test_nothing_is_launched_for_nothing(launched: list[str]) -> None:
    packed, _ = packed_of((20, 64), torch.bfloat16)
    assert decoded(torch.zeros(0, 64, dtype=torch.bfloat16), packed).shape == (0, 20)
    nothing, _ = packed_of((20, 0), torch.bfloat16)
    x, bias = torch.zeros(3, 0, dtype=torch.bfloat16), numbers((20,), torch.bfloat16, 9)
    residual = numbers((3, 20), torch.bfloat16, 9)
    assert torch.equal(decoded(x, nothing), torch.zeros(3, 20, dtype=torch.bfloat16))
    y = decoded(x, nothing, bias, activation="relu", residual=residual)
    assert torch.equal(y, bias.relu() + residual)
    assert launched == []


def test_counters_are_made_once_and_stay_zeros(launched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    packed, _ = packed_of((300, 2200), torch.bfloat16)
    x = numbers((2, 2200), torch.bfloat16, 4)
    monkeypatch.setattr(resources, "_of_streams", {})
    monkeypatch.setattr(resources, "processors", lambda _: 132)
    first = decoded(x, packed)
    assert len(resources._of_streams) == 1
    kept = resources.counters(x.device, 3)
    assert kept is resources.counters(x.device, 1)
    assert len(resources.counters(x.device, len(kept) + 1)) > len(kept)
    assert torch.equal(decoded(x, packed), first)
    assert not kept.any()


def test_counters_belong_to_no_pool_of_the_thread_that_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[int] = []
    make = resources._zeros

    def zeros(count: int, device: torch.device) -> torch.Tensor:
        threads.append(threading.get_ident())
        return make(count, device)

    monkeypatch.setattr(resources, "_zeros", zeros)
    monkeypatch.setattr(resources, "_of_streams", {})
    assert not resources.counters(torch.device("cpu"), 5).any()
    assert len(threads) == 1
    assert threads[0] != threading.get_ident()


def test_what_it_refuses(launched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    packed, _ = packed_of((20, 64), torch.bfloat16)
    x = torch.zeros(3, 64, dtype=torch.bfloat16)
    known = "one of bfloat16, float16, int8, the same for both, or a weight of float8_e4m3fn"
    known += " and x of bfloat16, float16, float8_e4m3fn"
    with pytest.raises(UnsupportedError, match=f"x is torch.float16, the weight torch.bfloat16: {known}"):
        decoded(x.half(), packed)
    with pytest.raises(UnsupportedError, match=f"x is torch.float8_e4m3fn, the weight torch.bfloat16: {known}"):
        decoded(x.to(E4M3), packed)
    with pytest.raises(UnsupportedError, match=f"x is torch.int8, the weight torch.float8_e4m3fn: {known}"):
        decoded(x.to(torch.int8), packed_of((20, 64), torch.float8_e4m3fn)[0])
    with pytest.raises(UnsupportedError, match=f"x is torch.bfloat16, the weight torch.float8_e5m2: {known}"):
        decoded(x, packed_of((20, 64), torch.float8_e5m2)[0])
    for wrong in (x[0, 0], x[:, :32]):
        with pytest.raises(ShapeError, match=r"x is \[.*\]: a weight of \[20, 64\] takes \[\.\.\., 64\]"):
            decoded(wrong, packed)
    with pytest.raises(
        UnsupportedError, match="out_dtype is torch.int8: sums are rounded to bfloat16, float16, float32"
    ):
        decoded(x, packed, out_dtype=torch.int8)
    with pytest.raises(UnsupportedError, match="activation 'tanh' is unknown: the kernels have none, relu"):
        decoded(x, packed, activation="tanh")
    bias, scale = torch.zeros(20, dtype=torch.bfloat16), torch.ones(20)
    for wrong in (bias[:10], bias.float(), bias.repeat(2)[::2]):
        with pytest.raises(ShapeError, match=r"bias is .*: it must be \[20\] torch.bfloat16, contiguous"):
            decoded(x, packed, wrong)
    with pytest.raises(ShapeError, match=r"bias is .*: it must be \[20\] torch.float32, contiguous"):
        decoded(x, packed, bias, out_dtype=torch.float32)
    with pytest.raises(ShapeError, match=r"row_scale is .*: it must be \[20\] torch.float32, contiguous"):
        decoded(x, packed, row_scale=scale.double())
    with pytest.raises(ShapeError, match=r"token_scale is \[20\] .*: it must be \[3\] torch.float32, contiguous"):
        decoded(x, packed, token_scale=scale)
    for wrong in (torch.zeros(3, 19).bfloat16(), torch.zeros(3, 20)):
        with pytest.raises(ShapeError, match=r"residual is .*: it must be \[3, 20\] torch.bfloat16, as y"):
            decoded(x, packed, residual=wrong)
    elsewhere = torch.device("meta")
    for name, tensor in (("row_scale", scale), ("residual", torch.zeros(3, 20).bfloat16())):
        with pytest.raises(UnsupportedError, match=f"x is on cpu, {name} on meta: put them on one device"):
            decoded(x, packed, **{name: tensor.to(elsewhere)})  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match="x is on meta, the weight on cpu: put both on one GPU"):
        decoded(x.to(elsewhere), packed)
    monkeypatch.undo()
    with pytest.raises(UnsupportedError, match="x is on cpu, the weight on cpu: put both on one GPU"):
        decoded(x, packed)
    assert launched == []

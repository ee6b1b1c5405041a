"""Many tokens on a GPU: every tile, whole or in slices, exact in whole numbers; within the bound of every output in others."""

from __future__ import annotations

import pytest
import torch
from tests.gpu.support import pruned, tiled
from tests.gpu.test_decode import DTYPES, out_of, packed_of, tokens_of

from twofour.kernels.cuda import gemm, packing, resources
from twofour.kernels.cuda.tiles import STAGE_BYTES, TILES
from twofour.testing import assert_same_bits, assert_within_bound

SHAPES = [(300, 1160), (64, 4096), (2500, 456), (16, 64), (130, 60)]


@pytest.fixture(params=list(TILES))
def tile(request: pytest.FixtureRequest, device: torch.device) -> str:
    """Each tile that the device has room for, at any dtype."""
    name = str(request.param)
    if TILES[name].stages * TILES[name].stage_bytes(1) > resources.shared_bytes(device):
        pytest.skip("the device has less shared memory")
    return name


def share(monkeypatch: pytest.MonkeyPatch, tile: str, slices: int) -> None:
    """Has every product made of a tile, and of so many slices where its columns suffice."""

    def plan(
        rows: int, columns: int, tokens: int, itemsize: int, processors: int, shared_bytes: int, *_: object
    ) -> gemm.Plan:
        stages = -(-columns * itemsize // STAGE_BYTES)
        each = -(-stages // min(slices, stages))
        blocks = -(-rows // TILES[tile].rows) * -(-tokens // TILES[tile].tokens)
        return gemm.Plan(tile, blocks, -(-stages // each), each)

    monkeypatch.setattr(gemm, "plan", plan)


def assert_exact(shape: tuple[int, int], dtype: torch.dtype, counts: list[int], device: torch.device) -> None:
    """With all that follows the sums."""
    dense = pruned(shape, dtype, whole=True)
    packed, out = packed_of(dense, device), out_of(dtype)
    bias = (torch.arange(shape[0]) % 9 - 4).to(out)
    of_rows = 2.0 ** (torch.arange(shape[0]) % 5 - 2)
    for count in counts:
        x = tokens_of(count, shape[1], dtype, count, whole=True)
        residual = torch.randint(-9, 10, (count, shape[0]), generator=torch.Generator().manual_seed(count)).to(out)
        sums = (x.to(device).double() @ dense.to(device).double().T).cpu()
        y = tiled(
            x.to(device),
            packed,
            bias.to(device),
            row_scale=of_rows.to(device),
            activation="relu",
            residual=residual.to(device),
            out_dtype=out,
        )
        assert_same_bits(y, ((sums * of_rows.double() + bias.double()).relu() + residual.double()).to(out))
        assert_same_bits(tiled(x.to(device), packed, out_dtype=torch.float32), sums.float())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_smallest_products_are_exact(
    dtype: torch.dtype, tile: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    for slices in (1, 2):
        share(monkeypatch, tile, slices)
        assert_exact((40, 200), dtype, [66], device)


@pytest.mark.parametrize("slices", [1, 2, 7])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_tile_is_exact(
    dtype: torch.dtype, slices: int, tile: str, gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    share(monkeypatch, tile, slices)
    for shape in SHAPES:
        assert_exact(shape, dtype, [1, 63, 64, 65, 127, 128, 129, 200, 513], gpu)


@pytest.mark.parametrize("shape", [(8192, 8192), (4096, 14336), (1024, 8192)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_layers_stay_within_the_bound(dtype: torch.dtype, shape: tuple[int, int], gpu: torch.device) -> None:
    generator = torch.Generator(gpu).manual_seed(0)
    dense = torch.randn(shape, generator=generator, device=gpu) * (30 if dtype == torch.int8 else 1)
    weight = packing.expand(packing.prune(dense.bfloat16()))
    dense = weight.round().clamp(-127, 127).to(dtype) if dtype == torch.int8 else weight.to(dtype)
    packed, some = packing.compress(dense), torch.arange(0, shape[0], 61, device=gpu)
    for tokens in (65, 512, 4096):
        x = tokens_of(tokens, shape[1], dtype, tokens).to(gpu)
        y = tiled(x, packed)
        few = torch.arange(0, tokens, 29, device=gpu)
        assert_within_bound(y[few][:, some], x[few], dense[some])
        for _ in range(3):  # whichever block comes last
            assert_same_bits(tiled(x, packed), y)


def test_results_of_more_than_2_31_bytes(gpu: torch.device) -> None:
    tokens, shape = 70_000, (16_400, 64)
    dense = pruned(shape, torch.bfloat16, whole=True)
    x = tokens_of(tokens, shape[1], torch.bfloat16, 1, whole=True).to(gpu)
    y = tiled(x, packed_of(dense, gpu))
    some = torch.cat([torch.arange(40), torch.arange(65_000, 65_040), torch.arange(tokens - 40, tokens)]).to(gpu)
    assert_same_bits(y[some], (x[some].double() @ dense.to(gpu).double().T).bfloat16())

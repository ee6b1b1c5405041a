"""y = x @ W.T and what follows it, on a GPU for many tokens, by the kernels of csrc/cuda/gemm.cu."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor

from . import arguments, prepared, resources
from .tiles import STAGE_BYTES, TILES

_MOST_SLICES = 16
_PAIRS_OF_CLOCK = (
    4096  # of bytes, that a multiprocessor multiplies, zeros included: sm_80; others are alike to each other
)
_BYTES_OF_CLOCK = 40  # that it gets from the second cache
_CLOCKS_OF_BLOCK = 2000  # to begin, and to finish
_BYTES_OF_SUM = 4
_ALONE = 0.25  # of its time, that a block waits where a multiprocessor has room for more and none are there


@dataclass(frozen=True, slots=True)
class Plan:
    """How a launch shares the work: the tile of a block, tiles, slices of the columns, stages of a slice."""

    tile: str
    blocks: int
    slices: int
    slice: int


@lru_cache(maxsize=4096)
def plan(
    rows: int,
    columns: int,
    tokens: int,
    itemsize: int,
    processors: int,
    shared_bytes: int,
    tiles: tuple[str, ...] = tuple(TILES),
) -> Plan:
    """The tile and the slices that should take least time, by what a multiprocessor multiplies and reads in a clock.

    Args:
        processors, shared_bytes: of the GPU, and of shared memory for a block.
        tiles: those to choose from; one at least must fit.
    """
    stages = -(-columns * itemsize // STAGE_BYTES)
    best, least = None, float("inf")
    for name in tiles:
        tile = TILES[name]
        stage_bytes = tile.stage_bytes(itemsize)
        if tile.stages * stage_bytes > shared_bytes:
            continue
        blocks = -(-rows // tile.rows) * -(-tokens // tile.tokens)
        for wanted in range(1, min(_MOST_SLICES, stages) + 1):
            each = -(-stages // wanted)
            slices = -(-stages // each)
            together = -(-blocks * slices // processors)  # blocks of the busiest multiprocessor, one after the other
            pairs = tile.rows * tile.tokens * STAGE_BYTES
            clocks = each * max(pairs / _PAIRS_OF_CLOCK, stage_bytes / _BYTES_OF_CLOCK) + _CLOCKS_OF_BLOCK
            if slices > 1:  # each block writes its sums, the last one of a tile reads those of all
                clocks += tile.rows * tile.tokens * _BYTES_OF_SUM * (1 + slices) / _BYTES_OF_CLOCK
            clocks *= together + (_ALONE if together < tile.blocks else 0)
            if clocks < least:
                best, least = Plan(name, blocks, slices, each), clocks
    assert best is not None  # the first of TILES fits everywhere
    return best


def launches(call: arguments.Arguments, tiles: tuple[str, ...] = tuple(TILES)) -> list[prepared.Launch]:
    """For arguments that have something to multiply and no e4m3 weight; the weight is read about once for all tokens."""
    (rows, columns), tokens, device = call.packed.shape, call.x.shape[0], call.x.device
    processors, room = resources.processors(device), resources.shared_bytes(device)
    share = plan(rows, columns, tokens, call.x.itemsize, processors, room, tiles)
    tile = TILES[share.tile]
    sums = share.slices * share.blocks * tile.tokens * tile.rows if share.slices > 1 else 0
    name = f"gemm_{call.name}_{share.tile}"
    return [prepared.Launch(name, (share.blocks, share.slices), 0, tokens, share.slice, sums)]


def multiplied(call: arguments.Arguments, tiles: tuple[str, ...] = tuple(TILES)) -> Tensor:
    """y of arguments that have something to multiply.

    An e4m3 weight is widened to the dtype of x first, x to float16 where it is e4m3: memory that lasts as long as the call.
    """
    call = call.widened() if call.is_e4m3 else call
    return prepared.Product(call, launches(call, tiles)).run(call)

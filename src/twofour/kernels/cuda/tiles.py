"""The tiles that blocks of csrc/cuda/gemm.cu make of a product."""

from __future__ import annotations

from dataclasses import dataclass

STAGE_BYTES = 128
"""Of a token, that a block multiplies at a time."""


@dataclass(frozen=True, slots=True)
class Tile:
    """What a block makes of y: `Tile` of gemm.cu.

    Args:
        warp_tokens: of the tile of a warp, which has 64 rows.
        stages: in shared memory at once.
        blocks: that a multiprocessor holds where it has room for them.
    """

    rows: int
    tokens: int
    warp_tokens: int
    stages: int
    blocks: int

    @property
    def threads(self) -> int:
        return self.rows // 64 * (self.tokens // self.warp_tokens) * 32

    def stage_bytes(self, itemsize: int) -> int:
        """Values, metadata and x of a stage."""
        columns = STAGE_BYTES // itemsize
        return self.rows * (columns // 2 * itemsize + columns // 8) + self.tokens * STAGE_BYTES


TILES = {"128x64": Tile(128, 64, 32, 4, 3), "128x128": Tile(128, 128, 64, 3, 2), "256x128": Tile(256, 128, 64, 4, 1)}
"""The last one needs more shared memory than sm_86, sm_89 and sm_120 have. It reads least: W is packed, so tiles are tall."""

"""y = x @ W.T and what follows it, on a GPU for few tokens, by the kernels of csrc/cuda/decode.cu."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor

from . import arguments, layout, prepared, resources, table

MOST_TOKENS = 64
"""Of a launch; more take several."""
TOKENS = (8, 16, 32, 64)
# What follows is of each multiprocessor; assumed from measurements on an H200, where 32 KB are read in a microsecond.
_BYTES_OF_PROCESSOR = 44_000  # under way, that take for one alone all that the memory gives it among many
_TIMES_OF_CACHE = 1.25  # as many as of the memory come from the last cache, of W and x, where all ask for them
_TIMES_ALONE = 2  # likewise, where few do; a multiprocessor takes 64 bytes a clock, nearly four times as many
_BYTES_OF_ENDS = 60_000  # that could be read while a block begins and finishes
_BYTES_OF_SHARING = 48_000  # likewise, while blocks that share columns tell each other by way of the last cache
_BYTES_OF_CLUSTER = 16_000  # likewise, while those of a cluster do
_BYTES_OF_SUM = 4
_MOST_SLICES = 64


@dataclass(frozen=True, slots=True)
class Plan:
    """How a launch shares the work: blocks along rows, slices of the columns, chunks of a slice; are slices a cluster?"""

    blocks: int
    slices: int
    slice: int
    cluster: bool = False


@lru_cache(maxsize=4096)
def plan(kernel: str, rows: int, columns: int, processors: int, clusters: tuple[int, ...] = ()) -> Plan:
    """The slices that should take least time, if the memory is what all wait for.

    Blocks that fit on the GPU at once share what the memory gives. A last round of a few gets more for each of them, but
    not as much as all together do: no more than they have under way, and than a multiprocessor takes in, of W and x, from
    the last cache. How blocks begin and end takes each round as long.

    Args:
        kernel: its name.
        processors: of the GPU.
        clusters: as `table.most_clusters`.
    """
    text = table.KERNEL_TEXTS[kernel]
    blocks, chunks = -(-rows // text.rows), -(-columns // layout.COLUMNS)
    places = text.blocks * processors
    turn = text.across * text.rows * (layout.COLUMNS // 2 * text.itemsize + layout.COLUMNS // 8)  # bytes
    everything = turn + text.x_bytes
    turn_of_many = max(turn, everything / _TIMES_OF_CACHE)
    by_latency = _BYTES_OF_PROCESSOR / (text.blocks * text.ahead * turn)
    alone = min(1.0, max(by_latency, everything / _TIMES_ALONE / turn_of_many))  # of a full round's time
    sums = text.rows * text.tokens * _BYTES_OF_SUM
    best, least = None, float("inf")
    for wanted in range(1, min(_MOST_SLICES, chunks) + 1):
        each = -(-chunks // wanted)
        slices = -(-chunks // each)
        # Every block writes its sums, the last one of a tile reads those of all.
        ways = [(False, places, _BYTES_OF_SHARING + sums * (1 + slices) / _TIMES_OF_CACHE if slices > 1 else 0)]
        if at_once := _blocks_in_clusters(slices, clusters):
            ways.append((True, at_once, _BYTES_OF_CLUSTER))
        for cluster, at_once, sharing in ways:
            rounds, rest = divmod(blocks * slices, at_once)
            whole = rounds * max(at_once / places, alone) + (max(rest / places, alone) if rest else 0)
            read = -(-each // text.across) * turn_of_many * text.blocks * whole
            time = read + (_BYTES_OF_ENDS + sharing) * (rounds + (rest > 0))
            if time < least:
                best, least = Plan(blocks, slices, each, cluster), time
    assert best is not None  # there is a chunk
    return best


def _blocks_in_clusters(slices: int, clusters: tuple[int, ...]) -> int:
    """How many blocks run at once in clusters of so many; 0 where there are none."""
    return dict(zip(table.CLUSTERS, clusters, strict=False)).get(slices, 0) * slices


def kernel_for(name: str, tokens: int) -> str:
    """The kernel for so many tokens, MOST_TOKENS at most.

    Args:
        name: of the dtypes, as `Arguments.name`.
    """
    return f"decode_{name}_{next(size for size in TOKENS if size >= tokens)}"


def launches(
    call: arguments.Arguments,
    kernel: str | None = None,
    slices: int | None = None,
    *,
    clusters: bool = True,
    early: bool = False,
) -> list[prepared.Launch]:
    """For arguments that have something to multiply.

    Args:
        kernel: another one than that for the tokens, which must be no more than it takes; to compare them.
        slices: of the columns, other than the plan's; likewise.
        clusters: may blocks that share columns be one? Likewise.
        early: lets it begin while the kernel before it in the stream ends (programmatic dependent launch), where
            `table.knows_clusters`; likewise.
    """
    tokens, device, shape = call.x.shape[0], call.x.device, call.packed.shape
    found = []
    for first in range(0, tokens, MOST_TOKENS):
        count = min(tokens - first, MOST_TOKENS)
        chosen = kernel or kernel_for(call.name, count)
        text = table.KERNEL_TEXTS[chosen]
        at_once = table.most_clusters(chosen, device) if clusters else ()
        share = plan(chosen, *shape, resources.processors(device), at_once)
        if slices is not None:
            share = _shared(share.blocks, -(-shape[1] // layout.COLUMNS), slices, at_once)
        apart = share.slices > 1 and not share.cluster
        found.append(
            prepared.Launch(
                chosen,
                (share.blocks, share.slices),
                first,
                count,
                share.slice,
                share.slices * share.blocks * text.tokens * text.rows if apart else 0,
                (int(early),),
                share.slices if share.cluster else 1,
                early,
            )
        )
    return found


def _shared(blocks: int, chunks: int, slices: int, clusters: tuple[int, ...]) -> Plan:
    """With so many slices, or as many as there are chunks for."""
    each = -(-chunks // slices)
    slices = -(-chunks // each)
    return Plan(blocks, slices, each, _blocks_in_clusters(slices, clusters) > 0)


def multiplied(
    call: arguments.Arguments,
    kernel: str | None = None,
    slices: int | None = None,
    *,
    clusters: bool = True,
    early: bool = False,
) -> Tensor:
    """y of arguments that have something to multiply, by `launches` of the same arguments."""
    return prepared.Product(call, launches(call, kernel, slices, clusters=clusters, early=early)).run(call)

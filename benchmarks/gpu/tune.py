"""How kernels split their work, against other ways: what the numbers of kernels/cuda/table.py and the plans are chosen by.

    python benchmarks/gpu/tune.py --json build/gpu/tune.json

Few tokens: every split of SPLITS, other slices of the columns, which are clusters or not, and an early start; many: each
tile. All ways of a case take turns, on weights that come from memory; the way of the table is "twofour". A split that
spills registers is named, and not timed.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import typer
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.gpu import cases, record, timing
from benchmarks.gpu.machine import WITHOUT_GPU

from twofour.errors import UnsupportedError
from twofour.kernels.cuda import arguments, compiler, decode, gemm, packing, resources, table
from twofour.kernels.cuda.table import Split
from twofour.kernels.cuda.tiles import TILES

SHAPE = (8192, 8192)
SLICES = (1, 2, 4)
COPIES = 6
THREADS = 16
MANY_TOKENS = (128, 512, 4096)
SPLITS: dict[tuple[str, int], Sequence[Split]] = {
    ("bf16", 8): (
        Split(4, 1, 2, 4),
        Split(4, 1, 4, 4),
        Split(4, 2, 3, 4),
        Split(2, 1, 3, 4, 2),
        Split(2, 1, 2, 4, 2),
        Split(2, 1, 4, 4),
        Split(2, 1, 6, 6),
        Split(1, 1, 4, 4, 2),
        Split(1, 1, 6, 6, 2),
    ),
    ("bf16", 16): (Split(4, 1, 3, 4), Split(4, 1, 4, 4), Split(2, 1, 3, 4, 2)),
    ("bf16", 32): (Split(4, 1, 3, 2), Split(4, 2, 3, 4), Split(4, 1, 2, 2), Split(2, 1, 3, 2, 2), Split(2, 1, 4, 2)),
    ("bf16", 64): (Split(4, 2, 2, 2), Split(2, 4, 4, 4), Split(2, 2, 3, 2)),
    ("int8", 8): (Split(4, 1, 6, 6), Split(4, 1, 3, 6, 2), Split(2, 1, 4, 6, 2)),
    ("int8", 32): (Split(4, 1, 4, 4), Split(4, 1, 5, 4), Split(4, 4, 4, 4)),
    ("e4m3_bf16", 8): (Split(4, 1, 3, 4), Split(4, 1, 6, 6), Split(2, 1, 4, 4, 2), Split(2, 1, 8, 8)),
    ("e4m3_bf16", 16): (Split(4, 1, 4, 4), Split(4, 1, 3, 4), Split(2, 1, 4, 4, 2)),
    ("e4m3_bf16", 32): (Split(4, 1, 4, 2), Split(4, 2, 4, 4), Split(2, 2, 4, 4, 2), Split(2, 2, 8, 4)),
    ("e4m3_bf16", 64): (Split(4, 4, 2, 4), Split(2, 2, 4, 2)),
}
"""Of each kernel for few tokens, by its dtypes and tokens: others than that of the table."""
WEIGHTS = {"bf16": torch.bfloat16, "int8": torch.int8, "e4m3_bf16": torch.float8_e4m3fn}


def text_of(name: str, tokens: int, split: Split) -> table.KernelText:
    """The kernel of a split, under a name of its own."""
    parts = (split.row_tiles, split.down, split.ahead, split.slots, split.blocks)
    return table.decode_text(name, tokens, split, f"decode_{name}_{tokens}_" + "_".join(map(str, parts)))


@contextmanager
def also(texts: Sequence[table.KernelText]) -> Iterator[None]:
    """Kernels that the table has for a while."""
    try:
        table.KERNEL_TEXTS.update({text.name: text for text in texts})
        yield
    finally:
        for text in texts:
            del table.KERNEL_TEXTS[text.name]


def why_not(text: table.KernelText, architecture: str) -> str | None:
    """Why a kernel is not worth a trial: it does not compile, or spills registers. If it is, it lies in the cache then."""
    options = (*compiler.OPTIONS, *(f"-D{each}" for each in text.defines), "--ptxas-options=-v")
    source = (compiler.sources() / "cuda" / text.file).read_text(encoding="utf-8")
    try:
        _, said = compiler.compile_text(source, text.file, architecture, options)
    except UnsupportedError as error:
        return next((line for line in str(error).splitlines() if "error" in line), str(error))[:200]
    spills = {int(each) for each in re.findall(r"(\d+) bytes spill stores", said)} - {0}
    if spills:
        return f"it spills {max(spills)} bytes of registers"
    compiler.compiled(text.file, architecture, text.defines)  # into the cache, here where several are compiled at once
    return None


def packed_of(
    name: str, shape: tuple[int, int], device: torch.device
) -> tuple[list[packing.PackedMatrix], Tensor | None]:
    """Copies that exceed the caches, and scales of rows."""
    if name == "e4m3_bf16":
        packed, scales = cases.quantize(cases.normal(shape, torch.bfloat16, device))
    else:
        packed, scales = cases.prune(cases.normal(shape, WEIGHTS[name], device)), None
    copies = [packing.PackedMatrix(packed.values.clone(), packed.metadata.clone(), shape) for _ in range(COPIES - 1)]
    return [packed, *copies], scales


def checked(x: Tensor, packed: packing.PackedMatrix, scales: Tensor | None) -> arguments.Arguments:
    """The arguments of a product, which are checked once rather than at each call."""
    return arguments.check(x, packed, None, scales, None, "none", None, None)


def few(name: str, tokens: int, shape: tuple[int, int], device: torch.device, rounds: int) -> record.Row:
    """All splits of a kernel, each with the plan's slices, and that of the table with others."""
    packed, scales = packed_of(name, shape, device)
    x = cases.normal((tokens, shape[1]), torch.int8 if name == "int8" else torch.bfloat16, device, tokens)
    architecture, missing = architecture_of(device), dict[str, str]()
    texts = [text_of(name, tokens, split) for split in SPLITS.get((name, tokens), ())]
    if not cases.has_kernels(x):  # the script alone is checked
        calls = {"twofour": [partial(cases.few_tokens, x, each, scales) for each in packed]}
        return row_of(
            calls, right_of(calls, x, packed[0], scales), device, rounds, "few tokens", shape, name, tokens, missing
        )
    with ThreadPoolExecutor(THREADS) as pool:
        reasons = list(pool.map(partial(why_not, architecture=architecture), texts))
    missing |= {text.name: reason for text, reason in zip(texts, reasons, strict=True) if reason is not None}
    with also(texts):
        given = [checked(x, each, scales) for each in packed]
        ways: dict[str, Sequence[timing.Call]] = {"twofour": [partial(decode.multiplied, each) for each in given]}
        for slices in SLICES:
            ways[f"{slices} slices"] = [
                partial(decode.multiplied, each, None, slices, clusters=False) for each in given
            ]
            if slices > 1:
                ways |= cases.tried(
                    f"{slices} slices, cluster", partial(_in_clusters, given, name, tokens, slices), missing
                )
        ways |= cases.tried("early", lambda: [cases.few_tokens_early(x, each, scales) for each in packed], missing)
        for text in texts:
            if text.name not in missing:
                ways |= cases.tried(text.name, partial(_calls, given, text.name), missing)
        right = right_of(ways, x, packed[0], scales)
        return row_of(ways, right, device, rounds, "few tokens", shape, name, tokens, missing)


def right_of(
    ways: dict[str, Sequence[timing.Call]], x: Tensor, packed: packing.PackedMatrix, scales: Tensor | None
) -> dict[str, bool]:
    """Which ways give about the product; `tests/gpu` is exact."""
    wanted = x.float() @ cases.expand(packed).float().T
    wanted = wanted if scales is None else wanted * scales
    slack = 0.02 * float(wanted.abs().max())
    return {name: bool((_output(calls[0]) - wanted).abs().max() <= slack) for name, calls in ways.items()}


def _output(call: timing.Call) -> Tensor:
    y = call()
    assert isinstance(y, Tensor)
    return y.float()


def _in_clusters(given: Sequence[arguments.Arguments], name: str, tokens: int, slices: int) -> list[timing.Call]:
    clusters = table.most_clusters(decode.kernel_for(name, tokens), given[0].x.device)
    if dict(zip(table.CLUSTERS, clusters, strict=False)).get(slices, 0) == 0:
        raise cases.Missing("no clusters of so many blocks here")
    return [partial(decode.multiplied, each, None, slices) for each in given]


def _calls(given: Sequence[arguments.Arguments], kernel: str) -> list[timing.Call]:
    return [partial(decode.multiplied, each, kernel) for each in given]


def many(tokens: int, shape: tuple[int, int], device: torch.device, rounds: int) -> record.Row:
    """Each tile, and cuBLAS."""
    packed, _ = packed_of("bf16", shape, device)
    x = cases.normal((tokens, shape[1]), torch.bfloat16, device, tokens)
    missing: dict[str, str] = {}
    if not cases.has_kernels(x):
        calls = {"twofour": [partial(cases.few_tokens, x, packed[0])]}
        return row_of(
            calls, right_of(calls, x, packed[0], None), device, rounds, "many tokens", shape, "bf16", tokens, missing
        )
    given = checked(x, packed[0], None)
    ways: dict[str, Sequence[timing.Call]] = {"twofour": [partial(gemm.multiplied, given)]}
    for tile in TILES:
        ways |= cases.tried(tile, partial(_tile_calls, given, tile), missing)
    dense = packing.expand(packed[0])
    ways |= cases.tried("cuBLAS", lambda: [partial(torch.nn.functional.linear, x, dense)], missing)
    return row_of(
        ways, right_of(ways, x, packed[0], None), device, rounds, "many tokens", shape, "bf16", tokens, missing
    )


def _tile_calls(given: arguments.Arguments, tile: str) -> list[timing.Call]:
    if TILES[tile].stages * TILES[tile].stage_bytes(given.x.itemsize) > resources.shared_bytes(given.x.device):
        raise cases.Missing("a block has less shared memory here")
    return [partial(gemm.multiplied, given, (tile,))]


def row_of(
    ways: dict[str, Sequence[timing.Call]],
    right: dict[str, bool],
    device: torch.device,
    rounds: int,
    what: str,
    shape: tuple[int, int],
    dtype: str,
    tokens: int,
    missing: dict[str, str],
) -> record.Row:
    """All ways in turns."""
    return cases.measured(
        ways,
        device,
        rounds=rounds,
        calls=COPIES,
        bench="tune",
        what=what,
        out_features=shape[0],
        in_features=shape[1],
        dtype=dtype,
        tokens=tokens,
        missing=missing,
        right=right,
    )


def architecture_of(device: torch.device) -> str:
    """What kernels are compiled for."""
    return compiler.architecture_of(torch.cuda.get_device_capability(device)) if device.type == "cuda" else WITHOUT_GPU


def main(
    device: cases.Device = "cuda", json_path: cases.Json = None, rounds: int = 12, smallest: cases.Smallest = False
) -> None:
    """Measures every way."""
    chosen = cases.chosen_device(device)
    shape = (128, 128) if smallest else SHAPE
    todo: list[tuple[str, Callable[[], record.Row]]] = [
        (f"few tokens {name} {tokens}", partial(few, name, tokens, shape, chosen, rounds)) for name, tokens in SPLITS
    ]
    todo += [(f"many tokens {tokens}", partial(many, tokens, shape, chosen, rounds)) for tokens in MANY_TOKENS]
    if smallest:
        todo = [todo[0], todo[len(SPLITS)]]
    cases.measure_all("tune", json_path, todo)


if __name__ == "__main__":
    with torch.inference_mode():
        typer.run(main)

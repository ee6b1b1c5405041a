"""Pruning and packing on a GPU against torch's own: W and W.T at once, one way, what is 2:4 already.

    python benchmarks/gpu/bench_packing.py --json build/gpu/packing.json

Inputs are N(0, 1) and cold: each call takes the next of several. "copy" is torch's clone of the dense matrix, a measure of
what memory gives. What our kernels write is compared with `layout.pack`, bit for bit, in the same run.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import typer
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.gpu import cases, record, timing

from twofour.kernels import reference
from twofour.masks import nm_mask

SHAPES = ((8192, 8192), (4096, 4096), (4096, 14336))
ONE_WAY = {"prune": ("bf16", "fp8"), "compress": ("bf16", "int8", "fp8"), "take": ("bf16",), "expand": ("bf16",)}
TILES = {
    "torch tile": ("", False),
    "torch tile, CUTLASS": ("", True),
    "torch tile, magnitudes": ("largest_abs_values_greedy", False),
    "torch tile, magnitudes, CUTLASS": ("largest_abs_values_greedy", True),
}
"""Algorithm, and whether the layout is CUTLASS's, else cuSPARSELt's. The default ranks by signed value (find_ranking.py)."""


def bytes_of(rows: int, columns: int, itemsize: int) -> tuple[int, int]:
    """Of the dense matrix, and of its values and metadata."""
    dense = rows * columns * itemsize
    return dense, dense // 2 + rows * columns // 8


def both(shape: tuple[int, int], dtype: str, device: torch.device, rounds: int) -> record.Row:
    """W and W.T by a transposable mask: ours the best one, torch's greedy, by signed value or by magnitude."""
    weights, copies = _inputs(shape, dtype, device)
    missing: dict[str, str] = {}
    kernels = cases.tried("twofour", lambda: [partial(cases.prune_both, each) for each in weights], missing)
    for name, (algorithm, cutlass) in TILES.items():
        tile = torch._sparse_semi_structured_tile
        calls = partial(
            _each, weights, lambda w, a=algorithm, c=cutlass, t=tile: partial(t, w, algorithm=a, use_cutlass=c)
        )
        kernels |= cases.tried(name, calls, missing)
    kernels |= cases.tried("copy", lambda: [each.clone for each in weights], missing)
    right = {}
    if "twofour" in kernels:
        right["twofour"] = cases.same_packed(cases.prune_both(weights[0]), cases.specified_both(weights[0]))
    dense, packed = bytes_of(*shape, weights[0].itemsize)
    return _row("prune both", shape, dtype, kernels, device, rounds, dense + 2 * packed, missing, right, copies)


def kept_both(shape: tuple[int, int], dtype: str, device: torch.device, rounds: int) -> record.Row:
    """W and W.T under a mask that is given, as each step of training packs them; torch's way is a product and two packings."""
    weights, copies = _inputs(shape, dtype, device)
    missing: dict[str, str] = {}
    mask = nm_mask(weights[0].float().abs(), "2:4t")
    kernels = cases.tried("twofour", lambda: [partial(cases.keep_both, each, mask) for each in weights], missing)
    kernels |= cases.tried("torch masks alone", lambda: [partial(torch.mul, each, mask) for each in weights], missing)
    kernels |= cases.tried("copy", lambda: [each.clone for each in weights], missing)
    right = {}
    if "twofour" in kernels:
        right["twofour"] = cases.same_packed(cases.keep_both(weights[0], mask), cases.specified_both(weights[0]))
    dense, packed = bytes_of(*shape, weights[0].itemsize)
    nbytes = dense + mask.nbytes + 2 * packed
    return _row("keep both", shape, dtype, kernels, device, rounds, nbytes, missing, right, copies)


def masked_both(shape: tuple[int, int], dtype: str, device: torch.device, rounds: int) -> record.Row:
    """The best transposable mask alone; the same in plain torch beside it."""
    weights, copies = _inputs(shape, dtype, device)
    missing: dict[str, str] = {}
    kernels = cases.tried("twofour", lambda: [partial(cases.mask_both, each) for each in weights], missing)
    in_torch = [partial(nm_mask, weights[0].abs(), "2:4t")]
    kernels |= cases.tried("in torch", lambda: in_torch, missing) if weights[0].numel() <= 1 << 22 else {}
    kernels |= cases.tried("copy", lambda: [each.clone for each in weights], missing)
    right = {}
    if "twofour" in kernels:
        right["twofour"] = torch.equal(cases.mask_both(weights[0]), nm_mask(weights[0].abs(), "2:4t"))
    dense, _ = bytes_of(*shape, weights[0].itemsize)
    nbytes = dense + weights[0].numel()
    return _row("mask both", shape, dtype, kernels, device, rounds, nbytes, missing, right, copies)


def quantized(shape: tuple[int, int], dtype: str, device: torch.device, rounds: int) -> record.Row:
    """To e4m3 with a scale for each row, pruned and packed; torch's quantizing alone beside it."""
    weights, copies = _inputs(shape, dtype, device)
    missing: dict[str, str] = {}
    kernels = cases.tried("twofour", lambda: [partial(cases.quantize, each) for each in weights], missing)
    by_torch = [partial(reference.quantize_rows_e4m3, each) for each in weights]
    kernels |= cases.tried("torch quantizes alone", lambda: by_torch, missing)
    kernels |= cases.tried("copy", lambda: [each.clone for each in weights], missing)
    right = {}
    if "twofour" in kernels:
        own, wanted = cases.quantize(weights[0]), cases.specified_quantized(weights[0])
        right["twofour"] = cases.same_packed([own[0]], [wanted[0]]) and torch.equal(own[1], wanted[1])
    dense, _ = bytes_of(*shape, weights[0].itemsize)
    _, packed = bytes_of(*shape, 1)
    return _row("quantize", shape, dtype, kernels, device, rounds, dense + packed, missing, right, copies)


def one_way(what: str, shape: tuple[int, int], dtype: str, device: torch.device, rounds: int) -> record.Row:
    """ "prune", "compress", "take" or "expand"."""
    weights, copies = _inputs(shape, dtype, device)
    missing: dict[str, str] = {}
    dense, packed = bytes_of(*shape, weights[0].itemsize)
    wanted = cases.specified(weights[0])
    sparse = [cases.pruned(each) for each in weights] if what == "compress" else weights
    ours: dict[str, Callable[[Tensor], Any]] = {
        "prune": cases.prune,
        "compress": cases.compress,
        "take": partial(cases.take, packed=wanted),
    }
    right = {}
    if what == "expand":
        held = [cases.specified(each) for each in weights]
        kernels = cases.tried("twofour", lambda: [partial(cases.expand, each) for each in held], missing)
        if kernels:
            right["twofour"] = torch.equal(cases.expand(held[0]).float(), cases.pruned(weights[0]).float())
    else:
        kernels = cases.tried("twofour", lambda: [partial(ours[what], each) for each in sparse], missing)
        if kernels and what == "take":
            right["twofour"] = torch.equal(ours[what](sparse[0]).view(torch.uint8), wanted.values.view(torch.uint8))
        elif kernels:
            right["twofour"] = cases.same_packed([ours[what](sparse[0])], [wanted])
    if what == "compress":
        if "twofour" in kernels:
            checked = partial(cases.compress, check=True)
            kernels |= cases.tried("twofour, checked", lambda: [partial(checked, each) for each in sparse], missing)
        kernels |= cases.tried("cuSPARSELt", lambda: [partial(cases.cslt_compressed, each) for each in sparse], missing)
    kernels |= cases.tried("copy", lambda: [each.clone for each in sparse], missing)
    return _row(what, shape, dtype, kernels, device, rounds, dense + packed, missing, right, copies)


def _each(weights: Sequence[Tensor], make: Callable[[Tensor], timing.Call]) -> list[timing.Call]:
    return [make(each) for each in weights]


def _inputs(shape: tuple[int, int], dtype: str, device: torch.device) -> tuple[list[Tensor], int]:
    kind = torch.float32 if dtype == "fp32" else cases.DTYPES[dtype]
    copies = timing.copies_for(shape[0] * shape[1] * kind.itemsize, device)
    return [cases.normal(shape, kind, device, seed) for seed in range(copies)], copies


def _row(
    what: str,
    shape: tuple[int, int],
    dtype: str,
    kernels: dict[str, Sequence[timing.Call]],
    device: torch.device,
    rounds: int,
    nbytes: int,
    missing: dict[str, str],
    right: dict[str, bool],
    copies: int,
) -> record.Row:
    case = {"bench": "packing", "what": what, "out_features": shape[0], "in_features": shape[1], "dtype": dtype}
    return cases.measured(
        kernels, device, rounds=rounds, calls=2 * copies, nbytes=nbytes, **case, missing=missing, right=right
    )


def main(
    device: cases.Device = "cuda", json_path: cases.Json = None, rounds: int = 25, smallest: cases.Smallest = False
) -> None:
    """Measures packing."""
    chosen = cases.chosen_device(device)
    shapes: Sequence[tuple[int, int]] = SHAPES
    if smallest:
        shapes, rounds = [(64, 128)], 2
    todo: list[tuple[str, Callable[[], record.Row]]] = []
    for shape in shapes:
        for dtype in ("bf16", "fp16"):
            todo.append((f"prune both {shape} {dtype}", partial(both, shape, dtype, chosen, rounds)))
        todo.append((f"keep both {shape} bf16", partial(kept_both, shape, "bf16", chosen, rounds)))
        for dtype in ("fp32", "bf16"):
            todo.append((f"mask both {shape} {dtype}", partial(masked_both, shape, dtype, chosen, rounds)))
        todo.append((f"quantize {shape} bf16", partial(quantized, shape, "bf16", chosen, rounds)))
        for what, dtypes in ONE_WAY.items():
            for dtype in dtypes:
                todo.append((f"{what} {shape} {dtype}", partial(one_way, what, shape, dtype, chosen, rounds)))
    cases.measure_all("packing", json_path, todo)


if __name__ == "__main__":
    with torch.inference_mode():
        typer.run(main)

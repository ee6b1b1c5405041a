"""Speed, end to end and layer by layer: two dense rivals and the sparse model take turns in one process."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from ..nn import SparseLinear
from ..nn.onednn import OneDnnLinear
from ..workflows.timing import Timing, paired
from .model import encode, encoder_linears, short_name, token_count
from .noise import SHORTEST_S, Quiet

Row = dict[str, Any]

NAMES = {"torch": "dense, torch", "onednn": "dense, oneDNN", "sparse": "2:4 sparse"}
"""Keys of the rivals and what they are called on the page."""
DENSE = ("torch", "onednn")


def throughput(
    encoders: Mapping[str, Any], texts: Mapping[int, Sequence[str]], quiet: Quiet, *, repeats: int, budget_s: float
) -> list[Row]:
    """One row per batch size: sentences per second of each encoder (median, quartiles), tokenizing included.

    Every row of this file says in `disturbed` whether other programs were in the way.

    Args:
        encoders: by rival key; "onednn" may be missing.
        texts: {batch size: the texts that are encoded in such batches}.
        repeats: rounds at most; `budget_s` ends them earlier, but not before the fifth.
    """
    rows = []
    for batch, chosen in texts.items():
        work = {key: _encoding(encoder, chosen, batch) for key, encoder in encoders.items()}
        found, disturbed = quiet.measure(partial(paired, work, repeats=repeats, budget_s=budget_s))
        row: Row = {"batch": batch, "texts": len(chosen), "rounds": found["sparse"].samples, "disturbed": disturbed}
        for key, timing in found.items():
            row[key] = len(chosen) / timing.median_us * 1e6
            row[f"{key}_low"] = len(chosen) / timing.high_us * 1e6
            row[f"{key}_high"] = len(chosen) / timing.low_us * 1e6
        row.update(_ratios({key: 1 / row[key] for key in found}))
        row["tokens"] = token_count(encoders["torch"], chosen[:batch])
        rows.append(row)
    return rows


def layers(
    dense: Any,
    sparse: Mapping[str, SparseLinear],
    tokens: int,
    quiet: Quiet,
    *,
    repeats: int,
    with_onednn: bool,
) -> list[Row]:
    """One row per encoder Linear: microseconds of each rival at one number of tokens, and the kernel that ran.

    Args:
        dense: the dense encoder.
        sparse: the compressed layer of each name, also where the model keeps the dense one.
    """
    linears = encoder_linears(dense)
    return [
        {"layer": short_name(name), **_time(linears[name], layer, tokens, quiet, repeats, with_onednn)}
        for name, layer in sparse.items()
    ]


def sweep(
    dense: Any,
    sparse: Mapping[str, SparseLinear],
    tokens: Sequence[int],
    quiet: Quiet,
    *,
    repeats: int,
    with_onednn: bool,
) -> list[Row]:
    """One row per shape and number of tokens, measured on the first layer of each shape."""
    linears = encoder_linears(dense)
    first: dict[tuple[int, int], str] = {}
    for name, layer in sparse.items():
        first.setdefault((layer.out_features, layer.in_features), name)
    return [
        _time(linears[name], sparse[name], count, quiet, repeats, with_onednn)
        for name in first.values()
        for count in tokens
    ]


def _time(linear: nn.Module, sparse: SparseLinear, tokens: int, quiet: Quiet, repeats: int, with_onednn: bool) -> Row:
    assert isinstance(linear, nn.Linear)
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, sparse.in_features, generator=generator).to(sparse.values.dtype)
    rivals: dict[str, nn.Module] = {"torch": linear}
    if with_onednn:
        rivals["onednn"] = OneDnnLinear(linear)
    rivals["sparse"] = sparse
    work = {key: _running(module, x) for key, module in rivals.items()}
    with torch.inference_mode():
        found, disturbed = quiet.measure(partial(_long_enough, work, repeats))
    row: Row = {
        "shape": f"{sparse.out_features}x{sparse.in_features}",
        "kernel": sparse.choice.kernel.label(),
        "tokens": tokens,
        "disturbed": disturbed,
    }
    row.update({f"{key}_us": timing.median_us for key, timing in found.items()})
    row.update(_ratios({key: timing.median_us for key, timing in found.items()}))
    return row


def _long_enough(work: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, Timing]:
    """`paired`, for at least as long as it takes to see whether other programs are in the way."""
    start = time.perf_counter()
    found = paired(work, repeats=repeats, budget_s=0.4)
    spent = time.perf_counter() - start
    if spent < SHORTEST_S:
        found = paired(work, repeats=min(10 * repeats, round(repeats * SHORTEST_S / spent) + 1), budget_s=0.4)
    return found


def _ratios(times: Mapping[str, float]) -> Row:
    best = min((key for key in DENSE if key in times), key=times.__getitem__)
    return {
        "best_dense": NAMES[best],
        "against_torch": times["torch"] / times["sparse"],
        "against_best": times[best] / times["sparse"],
    }


def _encoding(encoder: Any, texts: Sequence[str], batch: int) -> Callable[[], object]:
    return lambda: encode(encoder, texts, batch)


def _running(module: nn.Module, x: torch.Tensor) -> Callable[[], object]:
    return lambda: module(x)

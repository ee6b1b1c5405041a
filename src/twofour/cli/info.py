"""twofour info"""

from __future__ import annotations

from typing import Annotated, Any

import torch
import typer

from ..kernels import KERNELS, LinearSpec, choices
from ..kernels.machine import describe, describe_gpu
from ..pattern import Pattern
from ..report import Column, Report, environment
from .options import Json, show

NAME = "info"


def run(
    json: Json = False,
    clear_cache: Annotated[
        bool, typer.Option("--clear-cache", help="Forget all timings that compress has kept, of every build.")
    ] = False,
) -> None:
    """Show the machine, the versions, which kernels can run here (or why not), and where timings are kept."""
    notes = [f"{choices.clear()} files of kept timings were removed"] if clear_cache else []
    rows = []
    for device in (torch.device("cpu"), torch.device("cuda")):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            rows += _rows(LinearSpec(64, 64, Pattern(), dtype, device))
    columns = (
        Column("on", "2:4 linear on"),
        Column("dtype", "dtype"),
        Column("kernel", "kernel"),
        Column("runs", "runs"),
        Column("reason", "why"),
    )
    store = choices.Store.open()
    machine: dict[str, Any] = {**environment(), **describe(), **describe_gpu()}
    machine["timings kept in"] = str(store.file) if store.file is not None else "nowhere (TWOFOUR_CACHE=off)"
    machine["timings kept"] = len(store.entries)
    show(Report("info", columns, tuple(rows), machine, (*notes, *store.notes), {}), json)


def _rows(spec: LinearSpec) -> list[dict[str, Any]]:
    """The kernels that are made for a device, and why those do not run that do not."""
    rows = []
    for kernel in KERNELS.values():
        if kernel.on_gpu != (spec.device.type == "cuda"):
            continue
        reason = kernel.why_not(spec)
        rows.append(
            {
                "on": "cpu" if spec.device.type == "cpu" else "GPU",
                "dtype": str(spec.dtype).removeprefix("torch."),
                "kernel": kernel.label() if reason is None else kernel.backend,
                "runs": "yes" if reason is None else "no",
                "reason": reason,
            }
        )
    return rows

"""twofour info"""

from __future__ import annotations

import torch

from ..kernels import KERNELS, LinearSpec
from ..kernels.machine import describe
from ..pattern import Pattern
from ..report import Column, Report, environment
from .options import Json, show

NAME = "info"


def run(json: Json = False) -> None:
    """Show the machine, the versions, and which kernels can run here, with the reason where one cannot."""
    rows = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        spec = LinearSpec(64, 64, Pattern(), dtype, torch.device("cpu"))
        for kernel in KERNELS.values():
            reason = kernel.why_not(spec)
            rows.append(
                {
                    "dtype": str(dtype).removeprefix("torch."),
                    "kernel": kernel.label() if reason is None else kernel.backend,
                    "runs": "yes" if reason is None else "no",
                    "reason": reason,
                }
            )
    columns = (
        Column("dtype", "2:4 linear"),
        Column("kernel", "kernel"),
        Column("runs", "runs"),
        Column("reason", "why"),
    )
    machine = {**environment(), **describe()}
    show(Report("info", columns, tuple(rows), machine, (), {}), json)

"""Two processes with half of the inputs each give the masks of one process with all; a failure in one ends both."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from twofour.solvers import Recipe

SCRIPT = """
import sys, torch, twofour
from torch import distributed, nn

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Sequential(nn.Linear(64, 64), nn.Tanh()), nn.Linear(64, 32))
generator = torch.Generator().manual_seed(1)
batches = [torch.randn(16, 32, generator=generator) for _ in range(6)]
folder, fail = sys.argv[1], sys.argv[2] == "fail"
if len(sys.argv) > 3:
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    batches = batches[rank::2]
else:
    rank = 0
if fail and rank == 1:
    batches[1][3, 3] = float("nan")
try:
    report = twofour.prune(model, calibration=batches, method=sys.argv[2] if not fail else "wanda")
except twofour.CalibrationError as error:
    print(f"rank {rank} says: {error}", flush=True)
    assert fail
else:
    assert not fail
    assert [row["tokens"] for row in report.rows] == [96] * 3, report
    torch.save([p.detach() for p in model.parameters()], f"{folder}/{rank}.pt")
finally:
    if distributed.is_initialized():
        distributed.destroy_process_group()  # a process that ends without it may abort while gloo's threads run
"""


def run(folder: Path, method: str, processes: int) -> str:
    script = folder / "script.py"
    script.write_text(SCRIPT)
    start = [sys.executable]
    tail = [str(script), str(folder), method]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        tail += ["together"]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # products on two threads round otherwise than on one
    found = subprocess.run([*start, *tail], capture_output=True, text=True, timeout=300, check=False, env=one_thread)
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout + found.stderr


@pytest.mark.parametrize("method", ["sparsegpt", "admm"])
def test_two_processes_give_the_masks_of_one(method: str, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    run(one, method, 1)
    run(two, method, 2)
    alone, first, second = (torch.load(path) for path in (one / "0.pt", two / "0.pt", two / "1.pt"))
    for a, b, c in zip(alone, first, second, strict=True):
        assert torch.equal(b, c)  # the same bits in both processes
        assert torch.equal(a != 0, b != 0)
        torch.testing.assert_close(a, b, atol=1e-3, rtol=0)
    assert Recipe(method).changes_weights


def test_a_failure_in_one_process_ends_both(tmp_path: Path) -> None:
    said = run(tmp_path, "fail", 2)
    assert "rank 1 says: the inputs of '0': 1 of 16 tokens hold NaN" in said
    assert "rank 0 says: process 1 failed: CalibrationError: the inputs of '0'" in said

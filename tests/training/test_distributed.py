"""Masks where one machine ends: sharded and copied models in two and three processes, against one process alone."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from tests.training import distributed_checks
from tests.training.processes import run

from twofour.training.masks.distributed import anywhere, full, layout, local, local_part, whole_of

MODULE = "tests.training.distributed_checks"
IN_BOTH = [
    "helpers",
    "as_alone",
    "momentum",
    "accumulation",
    "steps_in_backward",
    "states",
    "loading",
    "sharded_later",
    "between",
    "in_step",
    "out_of_step",
]
IN_TWO = [*IN_BOTH, "flat_pieces", "policies", "tensor_parallel", "other_layouts", "saves", "resumes"]
IN_THREE = [*IN_BOTH, "resumes"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def two(folder: Path) -> dict[str, str | None]:
    return run(MODULE, 2, IN_TWO, folder)


@pytest.fixture(scope="module")
def three(folder: Path, two: dict[str, str | None]) -> dict[str, str | None]:
    return run(MODULE, 3, IN_THREE, folder)


@pytest.mark.parametrize("check", IN_TWO)
def test_in_two_processes(check: str, two: dict[str, str | None]) -> None:
    if two[check] is not None:
        pytest.fail(f"{check}:\n{two[check]}")


@pytest.mark.parametrize("check", IN_THREE)
def test_in_three_processes(check: str, three: dict[str, str | None]) -> None:
    if three[check] is not None:
        pytest.fail(f"{check}:\n{three[check]}")


@pytest.mark.of_cpu
def test_one_process_resumes_what_two_have_saved(folder: Path, two: dict[str, str | None]) -> None:
    assert two["saves"] is None
    warnings.filterwarnings("ignore", "torch.distributed is .*single process")
    distributed_checks.resume(folder, distributed_checks.dense(seed=5))


SCRIPT = """
import os, torch, twofour
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard

distributed.init_process_group("gloo")
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 1))
twofour.prune(model)
fully_shard(model)
optimizer = torch.optim.AdamW(model.parameters(), 0.05)
masks = twofour.training.keep_masks(model, optimizer)
torch.manual_seed(distributed.get_rank())
for _ in range(3):
    optimizer.zero_grad()
    model(torch.randn(8, 16)).square().mean().backward()
    optimizer.step()
for name, mask in masks.masks.items():
    weight = model.get_parameter(f"{name}.weight").full_tensor()
    assert torch.equal(weight != 0, mask), name
print(f"{len(masks.masks)} masks held", flush=True)
distributed.destroy_process_group()
os._exit(0)  # the model keeps gloo's threads, one of which now and then asks a Python that is gone, and aborts
"""


def test_torchrun_starts_it(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    found = subprocess.run(start, capture_output=True, text=True, timeout=120, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
    assert found.stdout.count("3 masks held") == 2


def test_tensors_that_are_not_spread_are_themselves() -> None:
    tensor = torch.nn.Parameter(torch.ones(2, 3))
    assert local(tensor) is tensor
    assert torch.equal(full(tensor), tensor)
    assert not full(tensor).requires_grad
    mask = tensor.detach() > 0
    assert local_part(mask, tensor) is whole_of(mask, tensor) is mask
    assert anywhere(True, tensor)
    assert not anywhere(False, tensor)
    assert layout(tensor) is None


def test_importing_twofour_imports_nothing_of_it() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import twofour; found = set(sys.modules) - before;"
        "print([name for name in sorted(found) if name.startswith('torch.distributed')])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_failing_process_is_named_and_ends_the_others(folder: Path) -> None:
    found = run(MODULE, 2, ["fails", "helpers"], folder)
    assert found["fails"] is not None
    assert "process 1 of 2:" in found["fails"]
    assert "ZeroDivisionError" in found["fails"]
    assert found["helpers"] == "it did not run, for 'fails' failed before"

"""Moving masks in two and three processes: whole weights choose them, all have the same, and they are those of one alone."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
from tests.training import moving_distributed_checks
from tests.training.processes import run

MODULE = "tests.training.moving_distributed_checks"
IN_TWO = [name for name in moving_distributed_checks.CHECKS if name != "momentary"]
IN_THREE = ["momentary", "steps_in_backward", "numbers", "in_step", "loaded", "resumes"]


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
    for pattern, at in moving_distributed_checks.cases():
        moving_distributed_checks.resume(folder, moving_distributed_checks.dense(seed=5), pattern, at)

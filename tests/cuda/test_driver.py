"""What the driver is asked, by way of one that notes it; and what users are told where there is none."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from twofour import DeviceError, UnsupportedError
from twofour.kernels.cuda import driver, resources, table

HERE = Path(__file__).parent


def built(folder: Path, *flags: str) -> Path:
    compiler = os.environ.get("CC", "gcc")
    if shutil.which(compiler) is None:
        pytest.skip(f"the driver is imitated by way of {compiler}, which is not here")
    target = folder / "libcuda.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", *flags, str(HERE / "fake_driver.c"), "-o", str(target)], check=True)
    return target


@pytest.fixture
def fake(tmp_path: Path) -> tuple[driver.Driver, ctypes.CDLL]:
    path = built(tmp_path)
    library = ctypes.CDLL(str(path))
    library.fake_noted.restype = ctypes.POINTER(ctypes.c_uint64)
    return driver.Driver(str(path)), library


def test_a_kernel_is_loaded_once_and_launched_with_what_was_given(fake: tuple[driver.Driver, ctypes.CDLL]) -> None:
    own, library = fake
    kernel = own.kernel(b"\x7fELF", b"a", "name", shared_bytes=100_000)
    assert own.kernel(b"\x7fELF", b"a", "name") == kernel == 0x2000
    noted = library.fake_noted()
    assert noted[0] == 1
    assert (noted[1], noted[2], noted[3]) == (0x7F, 0x1000, 4)
    assert (noted[4], noted[5], noted[6]) == (8, 100_000, 100)
    assert own.kernel(b"\x7fELF", b"a", "name", shared_bytes=100_000, device=1) == kernel  # another GPU of the kind
    assert (noted[0], noted[6]) == (1, 101)
    own.kernel(b"\x7fELF", b"b", "name")
    assert noted[0] == 2
    for way in (own._start, own._launch):  # with and without the native module
        own._start = way
        own.launch(kernel, (7, 9), 256, (2**63, 5, -1), stream=0x3000, shared_bytes=100_000)
        assert list(noted[10:20]) == [0x2000, 7, 9, 1, 256, 1, 1, 100_000, 0x3000, 0]
        assert list(noted[20:23]) == [2**63, 5, 2**64 - 1]
        own.launch(kernel, (1,), 32, (0, 0, 0), stream=0)
        assert list(noted[10:23]) == [0x2000, 1, 1, 1, 32, 1, 1, 0, 0, 0, 0, 0, 0]
        assert noted[40] == 0


def test_clusters_and_early_starts_are_attributes_of_a_launch(fake: tuple[driver.Driver, ctypes.CDLL]) -> None:
    own, library = fake
    noted = library.fake_noted()
    for way in (own._start, own._launch):
        own._start = way
        own.launch(0x2000, (7, 4), 256, (1, 2, 3), 0x3000, shared_bytes=9, cluster=4)
        assert list(noted[40:45]) == [1, 1, 4, 1, 0]
        own.launch(0x2000, (7, 4), 256, (1, 2, 3), 0x3000, early=True)
        assert list(noted[40:45]) == [1, 0, 0, 0, 1]
        own.launch(0x2000, (7, 4), 256, (1, 2, 3), 0x3000, cluster=2, early=True)
        assert list(noted[40:45]) == [2, 1, 2, 1, 1]
        assert list(noted[10:20]) == [0x2000, 7, 4, 1, 256, 1, 1, 0, 0x3000, 0]


def test_a_gpu_says_how_many_clusters_it_holds(fake: tuple[driver.Driver, ctypes.CDLL]) -> None:
    own, library = fake
    noted = library.fake_noted()
    assert [own.most_clusters(0x2000, 256, 70_000, size) for size in table.CLUSTERS] == [66, 33, 16]
    assert list(noted[45:48]) == [0x2000, 256, 70_000]
    assert list(noted[40:44]) == [1, 1, 8, 1]
    for status in (1, 801, 912):  # it knows none, or none of that size
        library.fake_fail(b"cuOccupancyMaxActiveClusters", status)
        assert own.most_clusters(0x2000, 256, 70_000, 4) == 0
    library.fake_fail(b"cuOccupancyMaxActiveClusters", 2)
    with pytest.raises(DeviceError, match="asking for clusters failed: out of memory"):
        own.most_clusters(0x2000, 256, 70_000, 4)
    library.fake_fail(b"cuOccupancyMaxActiveClusters", 201)  # a thread without a context
    entered = noted[48]
    assert own.most_clusters(0x2000, 256, 70_000, 4, device=3) == 33
    assert noted[48] == entered + 1
    assert noted[7] == 0x4000 + 103
    assert table.most_clusters("decode_bf16_8", torch.device("cpu")) == ()


def test_what_the_driver_refuses_is_told_and_leaves_nothing_behind(fake: tuple[driver.Driver, ctypes.CDLL]) -> None:
    own, library = fake
    library.fake_fail(b"cuLibraryLoadData", 2)
    with pytest.raises(DeviceError, match=r"loading name failed: out of memory \(CUDA error 2\)\. Free memory, or"):
        own.kernel(b"\x7fELF", b"a", "name")
    noted = library.fake_noted()
    assert noted[30] == 0
    library.fake_fail(b"cuLibraryGetKernel", 2)
    with pytest.raises(DeviceError, match=r"finding name failed: out of memory \(CUDA error 2\)"):
        own.kernel(b"\x7fELF", b"a", "name")
    assert noted[30] == 0x1000  # unloaded
    loads = noted[0]
    library.fake_fail(b"cuLaunchKernelEx", 1)
    kernel = own.kernel(b"\x7fELF", b"a", "name")
    with pytest.raises(DeviceError, match=r"a launch failed: invalid argument \(CUDA error 1\)\.$"):
        own.launch(kernel, (1,), 32, (1, 2, 3), 0)
    library.fake_fail(b"", 0)
    own.launch(kernel, (1,), 32, (1, 2, 3), 0)
    assert noted[0] == loads + 1
    library.fake_fail(b"cuKernelSetAttribute", 1)
    with pytest.raises(DeviceError, match="giving name 100000 bytes of shared memory failed: invalid argument"):
        own.kernel(b"\x7fELF", b"a", "name", shared_bytes=100_000)
    library.fake_fail(b"", 0)
    assert own.kernel(b"\x7fELF", b"a", "name", shared_bytes=100_000) == kernel
    assert noted[0] == loads + 1


def test_kernels_are_loaded_while_graphs_are_captured(fake: tuple[driver.Driver, ctypes.CDLL]) -> None:
    own, library = fake
    noted = library.fake_noted()
    mode = ctypes.c_int(0)
    kernel = own.kernel(b"\x7fELF", b"a", "name")
    assert noted[9] == 2  # relaxed
    assert noted[8] == kernel + 1  # its code is on the GPU before it is launched
    library.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
    assert mode.value == 0  # as it was
    noted[8] = 0
    library.fake_fail(b"cuKernelGetFunction", 201)  # no context yet: the launch will do it
    assert own.kernel(b"\x7fELF", b"b", "name") == kernel
    assert noted[8] == 0
    library.fake_fail(b"cuLibraryLoadData", 2)
    with pytest.raises(DeviceError):
        own.kernel(b"\x7fELF", b"c", "name")
    mode.value = 0
    library.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
    assert mode.value == 0


@pytest.mark.parametrize("status", [200, 209, 222, 300])
def test_an_nvrtc_newer_than_the_driver_is_told(status: int, fake: tuple[driver.Driver, ctypes.CDLL]) -> None:
    own, library = fake
    library.fake_fail(b"cuLibraryLoadData", status)
    with pytest.raises(
        DeviceError, match=r"loading name failed: .* The driver knows CUDA 12\.4, NVRTC is .*: update the"
    ):
        own.kernel(b"\x7fELF", b"a", "name")


def test_a_thread_without_a_context_enters_that_of_the_device(fake: tuple[driver.Driver, ctypes.CDLL]) -> None:
    own, library = fake
    noted = library.fake_noted()
    for way, status in ((own._start, 201), (own._launch, 201), (own._launch, 400)):
        own._start = way
        library.fake_fail(b"cuLaunchKernelEx", status)
        own.launch(0x2000, (5,), 32, (1, 2, 3), 0, device=3)
        assert noted[7] == 0x4000 + 103
        assert noted[11] == 5
        noted[7] = 0
        own.launch(0x2000, (6,), 32, (1, 2, 3), 0, device=3)
        assert (noted[7], noted[11]) == (0, 6)


@pytest.mark.parametrize("current", [0, 1])
def test_a_launch_is_on_the_device_and_its_stream_whichever_is_current(
    current: int, fake: tuple[driver.Driver, ctypes.CDLL], monkeypatch: pytest.MonkeyPatch
) -> None:
    own, library = fake
    at = [current]

    @contextlib.contextmanager
    def entered(device: torch.device) -> Iterator[None]:
        assert device.index is not None
        before, at[0] = at[0], device.index
        yield
        at[0] = before

    monkeypatch.setattr(torch.cuda, "device", entered)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: at[0])
    monkeypatch.setattr(resources, "_GET_DEVICE", None)
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda number: SimpleNamespace(cuda_stream=0x100 * number + at[0])
    )
    monkeypatch.setattr(table, "_loaded", lambda name, device: 0x2000 + device.index)
    monkeypatch.setattr(driver, "driver", lambda: own)
    noted = library.fake_noted()
    for raw in (None, lambda number: 0x100 * number + at[0]):
        noted[10] = noted[11] = noted[18] = 0
        monkeypatch.setattr(resources, "_GET_STREAM", raw)
        table.launch("take_half", (3,), torch.device("cuda", 1), 1, 2, 3)
        assert (noted[10], noted[11], noted[18]) == (0x2001, 3, 0x101)  # kernel, blocks, stream: of device 1, entered
        assert at == [current]

    def loaded(name: str, device: torch.device) -> int:  # for the context that is current
        assert at == [device.index]
        return 0x2000

    monkeypatch.setattr(table, "_loaded", loaded)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    table.most_clusters.cache_clear()
    table.knows_clusters.cache_clear()
    assert table.most_clusters("decode_bf16_32", torch.device("cuda", 1)) == (66, 33, 16)
    assert at == [current]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    table.most_clusters.cache_clear()
    table.knows_clusters.cache_clear()
    assert table.most_clusters("decode_bf16_32", torch.device("cuda", 1)) == ()
    table.most_clusters.cache_clear()
    table.knows_clusters.cache_clear()


def test_no_driver_and_an_old_one_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"no NVIDIA driver: .*libnothing\.so"):
        driver.Driver("libnothing.so")
    old = built(tmp_path, "-DcuLibraryLoadData=cuModuleLoadData")
    with pytest.raises(
        UnsupportedError, match="the NVIDIA driver is older than CUDA 12: .*cuLibraryLoadData.*; update it"
    ):
        driver.Driver(str(old))

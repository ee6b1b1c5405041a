"""The CUDA driver by way of ctypes: load what NVRTC compiled, launch it. No CUDA library is linked or needed to import this.

The context is torch's, the primary one of the device.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial

from ... import native
from ...errors import DeviceError, UnsupportedError
from . import compiler

LIBRARY = "libcuda.so.1"
_OUT_OF_MEMORY = 2
_NO_CONTEXT = (201, 400)  # invalid context, or a kernel that is unknown to none
_NOT_FOR_THIS_DRIVER = (200, 209, 222, 300)  # invalid image, no binary, unsupported version, invalid source
_NO_CLUSTERS = (1, 801, 912)  # invalid value, not supported, invalid cluster size
_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED
_MOST_SHARED_BYTES = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_FREE_SHARED_BYTES = 48 << 10  # what a launch may ask for without that


class Driver:
    """A driver library.

    Args:
        path: what the system's loader knows it by.
    Raises:
        UnsupportedError: it is not there, or older than CUDA 12.
    """

    def __init__(self, path: str = LIBRARY) -> None:
        try:
            self._cuda = ctypes.CDLL(path)
        except OSError as error:
            raise UnsupportedError(f"no NVIDIA driver: {error}.") from None
        self._lock = threading.Lock()
        self._kernels: dict[tuple[bytes, str], int] = {}
        try:
            for name, types in _SIGNATURES.items():
                function = getattr(self._cuda, name)
                function.restype, function.argtypes = ctypes.c_int, types
        except AttributeError as error:
            raise UnsupportedError(f"the NVIDIA driver is older than CUDA 12: {error}; update it.") from None
        self._load_now = getattr(self._cuda, "cuFuncLoad", None)  # since 12.4
        launch = getattr(native.LOADED, "launch_cuda", None)
        function = ctypes.cast(self._cuda.cuLaunchKernelEx, ctypes.c_void_p).value
        self._start: Callable[..., int] = self._launch if launch is None else partial(launch, function)

    def kernel(self, cubin: bytes, digest: bytes, name: str, shared_bytes: int = 0, device: int = 0) -> int:
        """A handle of a kernel of a cubin, loaded once for all devices; also while a CUDA graph is being captured.

        Args:
            digest: tells cubins apart.
            shared_bytes: dynamic shared memory that a launch will ask for; each device is told anew.
            device: its number.
        """
        key = (digest, name)
        with self._lock, self.relaxed():
            if key not in self._kernels:
                library, kernel = ctypes.c_void_p(), ctypes.c_void_p()
                self._check(
                    self._cuda.cuLibraryLoadData(ctypes.byref(library), cubin, None, None, 0, None, None, 0),
                    f"loading {name}",
                )
                status = self._cuda.cuLibraryGetKernel(ctypes.byref(kernel), library, name.encode())
                if status != 0:
                    self._cuda.cuLibraryUnload(library)
                self._check(status, f"finding {name}")
                self._kernels[key] = kernel.value or 0
            found = self._kernels[key]
            if shared_bytes > _FREE_SHARED_BYTES:
                handle = self._device(device)
                self._check(
                    self._cuda.cuKernelSetAttribute(_MOST_SHARED_BYTES, shared_bytes, found, handle),
                    f"giving {name} {shared_bytes} bytes of shared memory",
                )
            self._place(found)
        return found

    @contextlib.contextmanager
    def relaxed(self) -> Iterator[None]:
        """Lets this thread load and allocate while a CUDA graph is captured, here or elsewhere: torch forbids both."""
        mode = ctypes.c_int(_RELAXED)
        self._cuda.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
        try:
            yield
        finally:
            self._cuda.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))

    def _place(self, kernel: int) -> None:
        """Brings the code to the GPU now rather than at its first launch, which a CUDA graph may be capturing.

        Where that fails, for want of a context for instance, the launch does it.
        """
        function = ctypes.c_void_p()
        if self._cuda.cuKernelGetFunction(ctypes.byref(function), kernel) == 0 and self._load_now is not None:
            self._load_now(function)

    def _device(self, number: int) -> int:
        handle = ctypes.c_int()
        self._check(self._cuda.cuDeviceGet(ctypes.byref(handle), number), f"asking for device {number}")
        return handle.value

    def _enter(self, device: int) -> None:
        """Makes torch's context current: in a thread that has only used memory torch had kept, none is."""
        context = ctypes.c_void_p()
        handle = self._device(device)
        self._check(self._cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), handle), "asking for the context")
        self._check(self._cuda.cuCtxSetCurrent(context), "entering the context")

    def launch(
        self,
        kernel: int,
        grid: Sequence[int],
        threads: int,
        arguments: Sequence[int],
        stream: int,
        shared_bytes: int = 0,
        device: int = 0,
        cluster: int = 1,
        early: bool = False,
    ) -> None:
        """Starts a kernel, all of whose arguments are integers or pointers of 8 bytes.

        Args:
            device: the number of the one that `stream` is of.
            cluster: blocks along the second side of the grid that run together and see each other's shared memory: a
                divisor of that side. From capability 9.0 on.
            early: lets it start before the kernel before it has ended. It must wait for that itself; likewise.

        Raises:
            DeviceError: the driver refuses; nothing was started.
        """
        x, y, z = (*grid, 1, 1)[:3]
        arguments = tuple(arguments)
        status = self._start(kernel, x, y, z, threads, shared_bytes, stream, arguments, cluster, early)
        if status == 0:
            return
        if status in _NO_CONTEXT:
            self._enter(device)
            status = self._start(kernel, x, y, z, threads, shared_bytes, stream, arguments, cluster, early)
        self._check(status, "a launch")

    def _launch(
        self,
        kernel: int,
        x: int,
        y: int,
        z: int,
        threads: int,
        shared_bytes: int,
        stream: int,
        arguments: Sequence[int],
        cluster: int,
        early: bool,
    ) -> int:
        """As the native module does it in a tenth of the time, where there is none."""
        count = len(arguments)
        words = (ctypes.c_uint64 * count)(*(argument & (2**64 - 1) for argument in arguments))
        first = ctypes.addressof(words)
        places = (ctypes.c_void_p * count)(*range(first, first + 8 * count, 8))
        how = _config((x, y, z), threads, shared_bytes, stream, cluster, early)
        status: int = self._cuda.cuLaunchKernelEx(ctypes.byref(how), kernel, places, None)
        return status

    def most_clusters(self, kernel: int, threads: int, shared_bytes: int, cluster: int, device: int = 0) -> int:
        """How many clusters of so many blocks the current GPU holds at once; 0 where it knows none, or none of that size.

        Raises:
            DeviceError: the driver cannot say.
        """
        count = ctypes.c_int()
        how = _config((1, cluster, 1), threads, shared_bytes, 0, cluster)
        ask = partial(self._cuda.cuOccupancyMaxActiveClusters, ctypes.byref(count), kernel, ctypes.byref(how))
        with self.relaxed():
            status: int = ask()
            if status in _NO_CONTEXT:
                self._enter(device)
                status = ask()
        if status in _NO_CLUSTERS:
            return 0
        self._check(status, "asking for clusters")
        return count.value

    def _check(self, status: int, what: str) -> None:
        if status == 0:
            return
        text = ctypes.c_char_p()
        self._cuda.cuGetErrorString(status, ctypes.byref(text))
        reason = text.value.decode(errors="replace") if text.value else "unknown"
        hint = " Free memory, or take less at a time." if status == _OUT_OF_MEMORY else ""
        if status in _NOT_FOR_THIS_DRIVER:
            version = ctypes.c_int()
            self._cuda.cuDriverGetVersion(ctypes.byref(version))
            known = f"CUDA {version.value // 1000}.{version.value % 1000 // 10}"
            hint = (
                f" The driver knows {known}, NVRTC is {compiler.version()}: update the driver, or install an NVRTC that is no"
                " newer (pip install 'twofour[cuda12]' or 'twofour[cuda13]')."
            )
        raise DeviceError(f"{what} failed: {reason} (CUDA error {status}).{hint}")


_POINTER, _INT, _UINT = ctypes.c_void_p, ctypes.c_int, ctypes.c_uint
_CLUSTER, _EARLY = 4, 6  # CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION, CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute."""

    _fields_ = (("id", _INT), ("padding", _INT), ("value", _UINT * 16))


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", _UINT * 3),
        ("block", _UINT * 3),
        ("shared_bytes", _UINT),
        ("stream", _POINTER),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", _UINT),
    )


def _config(
    grid: tuple[int, int, int], threads: int, shared_bytes: int, stream: int, cluster: int, early: bool = False
) -> _Config:
    attributes = (_Attribute * 2)()
    count = 0
    for key, value, wanted in ((_CLUSTER, (1, cluster, 1), cluster > 1), (_EARLY, (1,), early)):
        if wanted:
            attributes[count] = _Attribute(key, 0, (_UINT * 16)(*value))
            count += 1
    return _Config(grid, (threads, 1, 1), shared_bytes, stream, attributes, count)


_SIGNATURES = {
    "cuLibraryLoadData": [_POINTER, ctypes.c_char_p, _POINTER, _POINTER, _UINT, _POINTER, _POINTER, _UINT],
    "cuLibraryUnload": [_POINTER],
    "cuLibraryGetKernel": [_POINTER, _POINTER, ctypes.c_char_p],
    "cuKernelSetAttribute": [_INT, _INT, _POINTER, _INT],
    "cuKernelGetFunction": [_POINTER, _POINTER],
    "cuThreadExchangeStreamCaptureMode": [_POINTER],
    "cuDriverGetVersion": [_POINTER],
    "cuDeviceGet": [_POINTER, _INT],
    "cuDevicePrimaryCtxRetain": [_POINTER, _INT],
    "cuCtxSetCurrent": [_POINTER],
    "cuLaunchKernelEx": [_POINTER] * 4,
    "cuOccupancyMaxActiveClusters": [_POINTER] * 3,
    "cuGetErrorString": [_INT, _POINTER],
}


@cache
def driver() -> Driver:
    """The system's. Raises as `Driver`."""
    return Driver()


def why_not() -> str | None:
    """Why nothing can be launched here; None where a driver is."""
    try:
        driver()
    except UnsupportedError as error:
        return str(error).removesuffix(".")
    return None

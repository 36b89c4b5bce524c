"""What a session needs of the CUDA runtime, through ctypes: JetPack brings libcudart, but no Python binding of it.

Every call's return code is checked. What is allocated is given back when nothing refers to it any more; at the end of the
process the driver does that. Device 0 throughout. Signatures: CUDA Runtime API, unchanged from 11.4 to 13.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from targets.base import Array
from targets.errors import TargetError

SONAMES = ("libcudart.so.13", "libcudart.so.12", "libcudart.so.11.0", "libcudart.so")
TO_DEVICE, TO_HOST = 1, 2  # cudaMemcpyKind
MAJOR, MINOR = 75, 76  # cudaDevAttrComputeCapability*
SPIN, ALREADY_ACTIVE = 1, 708  # cudaDeviceScheduleSpin; cudaErrorSetOnActiveProcess of older runtimes
CAPTURE_THREAD_LOCAL = 1  # other threads of the process may go on using CUDA; what trtexec takes
PROPERTIES_BYTES = 1 << 14  # cudaDeviceProp is about 1 KiB and grows; it begins with the name, 256 bytes

Int, Size, Pointer, Unsigned = ctypes.c_int, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_ulonglong
Out = ctypes.POINTER(ctypes.c_void_p)
OutInt = ctypes.POINTER(ctypes.c_int)
FUNCTIONS: dict[str, tuple[type[object], ...]] = {
    "cudaMalloc": (Out, Size),
    "cudaFree": (Pointer,),
    "cudaHostAlloc": (Out, Size, ctypes.c_uint),
    "cudaFreeHost": (Pointer,),
    "cudaMemcpyAsync": (Pointer, Pointer, Size, Int, Pointer),
    "cudaStreamCreate": (Out,),
    "cudaStreamDestroy": (Pointer,),
    "cudaStreamSynchronize": (Pointer,),
    "cudaStreamBeginCapture": (Pointer, Int),
    "cudaStreamEndCapture": (Pointer, Out),
    "cudaEventCreate": (Out,),
    "cudaEventRecord": (Pointer, Pointer),
    "cudaEventElapsedTime": (ctypes.POINTER(ctypes.c_float), Pointer, Pointer),
    "cudaEventDestroy": (Pointer,),
    "cudaGraphInstantiateWithFlags": (Out, Pointer, Unsigned),
    "cudaGraphLaunch": (Pointer, Pointer),
    "cudaGraphDestroy": (Pointer,),
    "cudaGraphExecDestroy": (Pointer,),
    "cudaDeviceGetAttribute": (OutInt, Int, Int),
    "cudaGetDeviceProperties": (Pointer, Int),
    "cudaRuntimeGetVersion": (OutInt,),
    "cudaSetDeviceFlags": (ctypes.c_uint,),
}


class Handle:
    """A pointer that the runtime gave; `release` is called with it when this object goes."""

    def __init__(self, cuda: Cuda, address: int, release: str) -> None:
        self.address = address
        weakref.finalize(self, cuda.give_back, release, address).atexit = False


class PageLocked(Handle):
    """Host memory that the device copies from without a detour. Arrays on it keep it alive, whatever becomes of a session."""

    def __init__(self, cuda: Cuda, num_bytes: int) -> None:
        super().__init__(cuda, cuda.out("cudaHostAlloc", max(num_bytes, 1), 0), "cudaFreeHost")
        self.__array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (self.address, False),
            "version": 3,
        }


class Cuda:
    """The runtime API, one method a need; raises TargetError with the function's name and CUDA's own words."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        library.cudaGetErrorString.argtypes = [Int]
        library.cudaGetErrorString.restype = ctypes.c_char_p
        for name, arguments in FUNCTIONS.items():
            if not hasattr(library, name):
                raise TargetError(f"{library._name} has no {name}: it is older than CUDA 11.4. Install a newer one.")
            function = getattr(library, name)
            function.argtypes, function.restype = list(arguments), Int

    def call(self, name: str, *arguments: object) -> None:
        if code := getattr(self._library, name)(*arguments):
            said = self._library.cudaGetErrorString(code).decode(errors="replace")
            raise TargetError(f"{name} failed: {said} (CUDA error {code}). {_advice(name)}")

    def out(self, name: str, *arguments: object) -> int:
        """Call a function whose first argument receives a pointer; returns it."""
        pointer = ctypes.c_void_p()
        self.call(name, ctypes.byref(pointer), *arguments)
        return pointer.value or 0

    def give_back(self, name: str, address: int) -> None:
        """Without a check: nothing could be done about a failure here."""
        getattr(self._library, name)(address)

    def spin(self) -> None:
        """Wait for the device by polling. A context that exists already may keep its way."""
        if self._library.cudaSetDeviceFlags(SPIN) != ALREADY_ACTIVE:
            self.call("cudaSetDeviceFlags", SPIN)

    def device_buffer(self, num_bytes: int) -> Handle:
        return Handle(self, self.out("cudaMalloc", max(num_bytes, 1)), "cudaFree")

    def host_array(self, shape: tuple[int, ...], dtype: str) -> Array:
        """A zeroed page-locked array."""
        count = int(np.prod(shape, dtype=np.int64))
        flat = np.asarray(PageLocked(self, count * np.dtype(dtype).itemsize))
        flat[...] = 0
        return flat.view(dtype).reshape(shape)

    def stream(self) -> Handle:
        return Handle(self, self.out("cudaStreamCreate"), "cudaStreamDestroy")

    def to_device(self, target: Handle, source: Array, stream: Handle) -> None:
        self.call("cudaMemcpyAsync", target.address, source.ctypes.data, source.nbytes, TO_DEVICE, stream.address)

    def to_host(self, target: Array, source: Handle, stream: Handle) -> None:
        self.call("cudaMemcpyAsync", target.ctypes.data, source.address, target.nbytes, TO_HOST, stream.address)

    def synchronize(self, stream: Handle) -> None:
        self.call("cudaStreamSynchronize", stream.address)

    def event(self) -> Handle:
        return Handle(self, self.out("cudaEventCreate"), "cudaEventDestroy")

    def record(self, event: Handle, stream: Handle) -> None:
        self.call("cudaEventRecord", event.address, stream.address)

    def elapsed_us(self, begin: Handle, end: Handle) -> float:
        """Between two events that the device has reached; CUDA tells half microseconds."""
        milliseconds = ctypes.c_float()
        self.call("cudaEventElapsedTime", ctypes.byref(milliseconds), begin.address, end.address)
        return milliseconds.value * 1e3

    def capture(self, stream: Handle, work: Callable[[], None]) -> Handle:
        """What `work` enqueues on the stream, as an executable graph. The capture ends also where `work` fails."""
        self.call("cudaStreamBeginCapture", stream.address, CAPTURE_THREAD_LOCAL)
        try:
            work()
        except Exception:
            abandoned = ctypes.c_void_p()
            self._library.cudaStreamEndCapture(stream.address, ctypes.byref(abandoned))
            if abandoned.value:
                self.give_back("cudaGraphDestroy", abandoned.value)
            raise
        pointer = ctypes.c_void_p()
        self.call("cudaStreamEndCapture", stream.address, ctypes.byref(pointer))
        graph = Handle(self, pointer.value or 0, "cudaGraphDestroy")
        executable = self.out("cudaGraphInstantiateWithFlags", graph.address, 0)
        return Handle(self, executable, "cudaGraphExecDestroy")

    def launch(self, graph: Handle, stream: Handle) -> None:
        self.call("cudaGraphLaunch", graph.address, stream.address)

    def compute_capability(self) -> str:
        """SM of device 0 as NVIDIA writes it: 8.7 is Orin."""
        values = []
        for attribute in (MAJOR, MINOR):
            number = ctypes.c_int()
            self.call("cudaDeviceGetAttribute", ctypes.byref(number), attribute, 0)
            values.append(number.value)
        return f"{values[0]}.{values[1]}"

    def device_name(self) -> str:
        properties = ctypes.create_string_buffer(PROPERTIES_BYTES)
        self.call("cudaGetDeviceProperties", properties, 0)
        return properties.raw[:256].split(b"\0", 1)[0].decode(errors="replace")

    def version(self) -> str:
        """12060 -> 12.6."""
        number = ctypes.c_int()
        self.call("cudaRuntimeGetVersion", ctypes.byref(number))
        return f"{number.value // 1000}.{number.value % 1000 // 10}"


def open_cuda() -> Cuda:
    """The first libcudart that loads; raises TargetError where there is none."""
    library = next(filter(None, map(_loaded, candidates())), None)
    if library is None:
        raise TargetError(
            "libcudart, the CUDA runtime, is not found here. On a Jetson: sudo apt-get install nvidia-jetpack; "
            "elsewhere: pip install nvidia-cuda-runtime."
        )
    return Cuda(library)


def has_cuda() -> bool:
    """Whether a libcudart can be loaded; asks no device."""
    try:
        open_cuda()
    except TargetError:
        return False
    return True


def candidates() -> Iterator[str]:
    """Where libcudart may be: the loader's path, pip's wheels (nvidia/*/lib), and the toolkit's usual folder."""
    yield from SONAMES
    spec = find_spec("nvidia")
    for root in spec.submodule_search_locations or () if spec else ():
        yield from sorted(map(str, Path(root).glob("*/lib/libcudart.so*")), reverse=True)
    yield from sorted(map(str, Path("/usr/local/cuda/lib64").glob("libcudart.so*")))


def _loaded(name: str) -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(name)
    except OSError:
        return None


def _advice(name: str) -> str:
    if name in ("cudaMalloc", "cudaHostAlloc"):
        return "Close what else uses the memory, or take a smaller batch."
    if name.startswith(("cudaDevice", "cudaGetDevice")):
        return "Check with nvidia-smi (Jetson: tegrastats) that this user may use the GPU."
    return "Run again; if it stays, reboot the device and look at dmesg."

"""What the kernels run on: memory, launches and waiting, as a table of kernels (table.py) asks for them.

`Device` is the contract; `CupyDevice` is a GPU, tests/emulator has another that needs none.
"""

import ctypes
import math
import threading
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from fastunet.backends.cuda import compiler
from fastunet.memory import format_bytes


class Memory(Protocol):
    """Device memory, freed with the last reference to it."""

    @property
    def pointer(self) -> int: ...

    @property
    def bytes(self) -> int: ...


class Exchange(Protocol):
    """How a device shares memory and order with other libraries."""

    place: tuple[int, int]
    """Type and number of the device, as `__dlpack_device__` gives them."""

    @property
    def stream(self) -> int | None:
        """The stream on which the device works, as `__dlpack__` takes it."""

    def holds(self, pointer: int) -> bool:
        """Whether memory, known by its CUDA array interface, is this device's."""

    def wait_for(self, stream: int) -> None:
        """Let what the device does from now on happen after what that stream has been given."""

    def borrow(self, pointer: int, count_bytes: int, owner: Any) -> Memory:
        """Memory of `owner`, which is kept as long as this is."""

    def dlpack(self, memory: Memory, shape: tuple[int, ...], **options: Any) -> Any:
        """A DLPack capsule of contiguous float32 in the device's memory, in order with its stream."""


class Device(Protocol):
    """A machine for kernels; what is launched and copied happens in the order of the calls."""

    name: str
    architecture: str
    multiprocessors: int
    shared_memory: int
    """The most dynamic shared memory that a block may have, in bytes."""
    records: bool
    """Whether what is started only happens later, in a replay: then nothing can be read at once."""
    exchange: Exchange

    def describe(self) -> str:
        """What a person is told of it."""

    def allocate(self, count_bytes: int) -> Memory:
        """Memory of undefined contents, aligned to at least 256 bytes.

        Raises
        ------
        MemoryError
            If the device has no more.
        """

    def free_memory(self) -> int:
        """Bytes that can be allocated at present, more or less."""

    def upload(self, pointer: int, values: np.ndarray) -> None:
        """Copy contiguous values to the device and wait; while it captures, have every replay copy what then is there.

        Values that are captured must be a `host_array`.
        """

    def host_array(self, shape: tuple[int, ...], dtype: np.dtype | type) -> np.ndarray:
        """Memory of the host that the device can copy from and to while both work."""

    def read_back(self, pointer: int, values: np.ndarray) -> None:
        """Copy from the device to a `host_array`; does not wait."""

    def download(self, pointer: int, shape: tuple[int, ...], dtype: np.dtype | type) -> np.ndarray:
        """Wait and copy values from the device."""

    def zero(self, pointer: int, count_bytes: int) -> None: ...

    def kernel(self, file: str, name: str, defines: tuple[str, ...]) -> Any:
        """A kernel of a file of kernels/, compiled on first use."""

    def launch(
        self,
        kernel: Any,
        grid: tuple[int, int, int],
        block: int,
        shared_bytes: int,
        arguments: ctypes.Structure,
    ) -> None:
        """Start a kernel with one structure by value; does not wait."""

    def synchronize(self) -> None: ...

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """What starts all that `work` would have started; nothing of it happens now."""

    def mark(self) -> Callable[[], None]:
        """What waits until all that was started before now has happened."""


class CupyMemory:
    """`Memory` of CuPy's pool."""

    def __init__(self, block: Any, count_bytes: int) -> None:
        self._block = block
        self.pointer = int(block.ptr)
        self.bytes = count_bytes


class Borrowed:
    """`Memory` that somebody else owns."""

    def __init__(self, pointer: int, count_bytes: int) -> None:
        self.pointer = pointer
        self.bytes = count_bytes


class CupyExchange:
    """`Exchange` of a GPU through CuPy.

    Parameters
    ----------
    cupy : module
    device : cupy.cuda.Device
    stream : cupy.cuda.Stream
        On which everything of ours happens.
    index : int
    """

    def __init__(self, cupy: Any, device: Any, stream: Any, index: int) -> None:
        self._cupy = cupy
        self._device = device
        self._stream = stream
        self.place = (2, index)  # kDLCUDA

    @property
    def stream(self) -> int:
        return int(self._stream.ptr)

    def holds(self, pointer: int) -> bool:
        return bool(self._cupy.cuda.runtime.pointerGetAttributes(pointer).device == self.place[1])

    def wait_for(self, stream: int) -> None:
        with self._device:
            self._stream.wait_event(self._cupy.cuda.ExternalStream(stream).record())

    def borrow(self, pointer: int, count_bytes: int, owner: Any) -> Borrowed:
        memory = Borrowed(pointer, count_bytes)
        weakref.finalize(memory, self._give_back, owner).atexit = False
        return memory

    def _give_back(self, owner: Any) -> None:
        """Let what is done to the memory from now on, on CuPy's stream of this thread, wait for what reads it."""
        with self._device:
            if not self._stream.is_capturing():
                self._cupy.cuda.get_current_stream().wait_event(self._stream.record())

    def dlpack(self, memory: Memory, shape: tuple[int, ...], **options: Any) -> Any:
        cupy = self._cupy
        with self._device, self._stream:
            whole = cupy.cuda.UnownedMemory(memory.pointer, memory.bytes, memory, self.place[1])
            array = cupy.ndarray(shape, cupy.float32, cupy.cuda.MemoryPointer(whole, 0))
            return array.__dlpack__(**options)


class CupyDevice:
    """`Device` on an NVIDIA GPU through CuPy: its memory pool, and one stream of our own on which everything happens.

    May be used from several threads; their kernels follow one another.

    Parameters
    ----------
    index : int
        The N of cuda:N.

    Raises
    ------
    ValueError
        In one sentence what is missing: CuPy, NVRTC, a driver, a GPU, this GPU, or a GPU new enough.
    """

    def __init__(self, index: int) -> None:
        self._cupy = _import_cupy()
        capability = _check_gpu(self._cupy, index)
        self._device = self._cupy.cuda.Device(index)
        attributes = self._device.attributes
        self.name = f"cuda:{index}"
        self.multiprocessors = int(attributes["MultiProcessorCount"])
        self.shared_memory = int(attributes["MaxSharedMemoryPerBlockOptin"])
        try:
            self.architecture = compiler.architecture(capability)
        except ValueError as error:
            raise ValueError(f"GPU {index} cannot be used: {error}") from None
        with self._device:
            self._stream = self._cupy.cuda.Stream(non_blocking=True)
        self.exchange: Exchange = CupyExchange(self._cupy, self._device, self._stream, index)
        self.records = False
        self._kernels: dict[tuple[str, str, tuple[str, ...]], Any] = {}
        self._building = threading.Lock()

    def describe(self) -> str:
        properties = self._cupy.cuda.runtime.getDeviceProperties(self.exchange.place[1])
        return (
            f"{properties['name'].decode()}, compute capability {properties['major']}.{properties['minor']}, "
            f"{self.multiprocessors} multiprocessors, {format_bytes(properties['totalGlobalMem'])}"
        )

    def allocate(self, count_bytes: int) -> CupyMemory:
        with self._device, self._stream:
            try:
                return CupyMemory(self._cupy.cuda.alloc(count_bytes), count_bytes)
            except self._cupy.cuda.memory.OutOfMemoryError:
                free = self.free_memory()
        raise MemoryError(
            f"{format_bytes(count_bytes)} of memory were asked of {self.name} and {format_bytes(free)} are free; "
            "end what else runs on it, or do with less"
        )

    def free_memory(self) -> int:
        with self._device, self._stream:
            pool = self._cupy.get_default_memory_pool()
            return int(self._cupy.cuda.runtime.memGetInfo()[0]) + int(pool.free_bytes())

    def upload(self, pointer: int, values: np.ndarray) -> None:
        values = np.ascontiguousarray(values)
        runtime = self._cupy.cuda.runtime
        with self._device:
            runtime.memcpyAsync(
                pointer, values.ctypes.data, values.nbytes, runtime.memcpyHostToDevice, self._stream.ptr
            )
            if not self._stream.is_capturing():
                self._stream.synchronize()

    def host_array(self, shape: tuple[int, ...], dtype: np.dtype | type) -> np.ndarray:
        count = math.prod(shape)
        memory = self._cupy.cuda.alloc_pinned_memory(max(count, 1) * np.dtype(dtype).itemsize)
        return np.frombuffer(memory, dtype, count).reshape(shape)

    def read_back(self, pointer: int, values: np.ndarray) -> None:
        runtime = self._cupy.cuda.runtime
        with self._device:
            runtime.memcpyAsync(
                values.ctypes.data, pointer, values.nbytes, runtime.memcpyDeviceToHost, self._stream.ptr
            )

    def download(self, pointer: int, shape: tuple[int, ...], dtype: np.dtype | type) -> np.ndarray:
        values = np.empty(shape, dtype)
        runtime = self._cupy.cuda.runtime
        with self._device:
            runtime.memcpyAsync(
                values.ctypes.data, pointer, values.nbytes, runtime.memcpyDeviceToHost, self._stream.ptr
            )
            self._stream.synchronize()
        return values

    def zero(self, pointer: int, count_bytes: int) -> None:
        with self._device:
            self._cupy.cuda.runtime.memsetAsync(pointer, 0, count_bytes, self._stream.ptr)

    def kernel(self, file: str, name: str, defines: tuple[str, ...]) -> Any:
        key = file, name, defines
        with self._building:
            if key not in self._kernels:
                self._kernels[key] = self._load(*key)
            return self._kernels[key]

    def _load(self, file: str, name: str, defines: tuple[str, ...]) -> Any:
        driver = self._cupy.cuda.driver
        with self._device:
            module = self._cupy.cuda.function.Module()
            module.load(compiler.build(file, defines, self.architecture))
            function = module.get_function(name)
            # Without leave, a block has no more than 48 KiB.
            driver.funcSetAttribute(
                function.ptr, driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, self.shared_memory
            )
        return function

    def launch(
        self,
        kernel: Any,
        grid: tuple[int, int, int],
        block: int,
        shared_bytes: int,
        arguments: ctypes.Structure,
    ) -> None:
        # CuPy passes an ndarray of one element by value, whatever its size.
        packed = np.frombuffer(arguments, np.dtype((np.void, ctypes.sizeof(arguments))))
        with self._device:
            kernel(grid, (block, 1, 1), (packed,), shared_bytes, self._stream)

    def synchronize(self) -> None:
        with self._device:
            self._stream.synchronize()

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        with self._device:
            self._stream.begin_capture()
            try:
                work()
            finally:
                graph = self._stream.end_capture()

        def replay() -> None:
            with self._device:
                graph.launch(self._stream)

        return replay

    def mark(self) -> Callable[[], None]:
        with self._device:
            event = self._cupy.cuda.Event(disable_timing=True)
            event.record(self._stream)
        return event.synchronize


def _import_cupy() -> Any:
    """CuPy, once it and NVRTC are found to be here and of one kind."""
    try:
        import cupy
    except ImportError as error:
        raise ValueError(
            f"CuPy cannot be imported ({error}); "
            "pip install 'fastunet[cuda13]', or 'fastunet[cuda12]' for a driver older than 580"
        ) from None
    if cupy.cuda.runtime.is_hip:
        raise ValueError(
            "the CuPy that is installed is built for AMD GPUs; replace it: pip install 'fastunet[cuda13]'"
        )
    try:
        compiler.version()
    except (ImportError, RuntimeError) as error:
        major = cupy.cuda.runtime.runtimeGetVersion() // 1000
        told = " ".join(str(error).split())  # of several lines, from the binding's own search
        raise ValueError(f"NVRTC cannot be loaded ({told}); pip install 'fastunet[cuda{major}]'") from None
    return cupy


def _check_gpu(cupy: Any, index: int) -> tuple[int, int]:
    """The compute capability of a GPU that is really there."""
    runtime = cupy.cuda.runtime
    driver = runtime.driverGetVersion()
    if driver == 0:
        raise ValueError("no NVIDIA driver is installed; install one from https://www.nvidia.com/drivers")
    built = runtime.runtimeGetVersion()
    try:
        count = runtime.getDeviceCount()
    except runtime.CUDARuntimeError as error:
        if driver // 1000 < built // 1000:
            raise ValueError(
                f"the NVIDIA driver is for CUDA {_dotted(driver)} and CuPy for CUDA {_dotted(built)}; update the "
                "driver, or replace CuPy: pip uninstall cupy-cuda13x; pip install 'fastunet[cuda12]'"
            ) from None
        raise ValueError(f"the NVIDIA driver shows no GPU ({error}); check nvidia-smi") from None
    if index >= count:
        raise ValueError(f"there is no GPU {index}; this machine has {count}, counted from 0")
    capability = cupy.cuda.Device(index).compute_capability
    return int(capability[:-1]), int(capability[-1])


def _dotted(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"

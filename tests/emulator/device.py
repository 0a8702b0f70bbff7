"""A device made of this machine's own CPU: the kernels of kernels/ built by g++ and run under emulator.h."""

import ctypes
import functools
import hashlib
import math
import mmap
import os
import platform
import subprocess
import tempfile
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
KERNELS = HERE.parents[1] / "kernels"
POISON = 0xFF
SANITIZE = "FASTUNET_EMULATOR_SANITIZE" in os.environ  # kernels are built for AddressSanitizer; see below
MAP_FIXED = 0x10  # which mmap does not name
SHARED_KIBIBYTES = {
    "sm_80": 163,
    "sm_86": 99,
    "sm_87": 163,
    "sm_89": 99,
    "sm_90": 227,
    "sm_100": 227,
    "sm_120": 99,
}
FLAGS = (
    *("-std=c++17", "-g1", "-march=native", "-fPIC", "-fvisibility=hidden", "-fno-omit-frame-pointer"),
    "-ffp-contract=off",  # the same sums on every processor
    *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", f"-I{HERE}", f"-I{KERNELS}"),
)
# Every load and store calls machine.cpp, which follows shared memory; so does what C++ does not define (without the
# checks that cost most and find what faults anyway). AddressSanitizer excludes the former and has all of the latter.
CHECKS = {
    False: (
        *("-fsanitize=thread,undefined", "--param=tsan-instrument-func-entry-exit=0"),
        "-fno-sanitize=object-size,pointer-overflow,null",
    ),
    True: ("-fsanitize=address,undefined",),
}


class Launch(ctypes.Structure):
    """As in machine.h."""

    _fields_ = [
        ("grid", ctypes.c_int * 3),
        ("block", ctypes.c_int),
        ("shared_bytes", ctypes.c_int),
        ("shared_limit", ctypes.c_int),
        ("argument_bytes", ctypes.c_int),
        ("seed", ctypes.c_uint),
    ]


class Failure(ctypes.Structure):
    """As in machine.h."""

    _fields_ = [
        ("address", ctypes.c_ulonglong),
        ("instruction", ctypes.c_ulonglong),
        ("message", ctypes.c_char * 2000),
    ]


_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def _map(place: int | None, count_bytes: int, flags: int) -> int:
    """Return pages that nothing may touch."""
    start = _libc.mmap(place, count_bytes, 0, flags, -1, 0)
    if start is None or start == ctypes.c_void_p(-1).value:
        raise MemoryError(f"{count_bytes} bytes of emulated device memory cannot be had")
    return start


_running = threading.Lock()  # the emulated machine is one, and so are a process's signal handlers


def sanitizer_environment() -> dict[str, str]:
    """The environment in which a process can load kernels built for AddressSanitizer, and does."""
    library = subprocess.run(
        ["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    )
    return {
        "FASTUNET_EMULATOR_SANITIZE": "1",
        "LD_PRELOAD": library.stdout.strip(),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
    }


class Memory:
    """Device memory full of poison, between pages that fault: its last 16 bytes end where one begins.

    Under AddressSanitizer every byte beside it is forbidden. Its addresses are never given out again, so that whoever
    still uses them when it is freed faults.
    """

    def __init__(self, count_bytes: int) -> None:
        page = mmap.PAGESIZE
        self.bytes = count_bytes
        padded = max(math.ceil(count_bytes / 16) * 16, 16)
        inner = math.ceil(padded / page) * page
        start = _map(None, inner + 2 * page, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        _libc.mprotect(start + page, inner, mmap.PROT_READ | mmap.PROT_WRITE)
        ctypes.memset(start + page, POISON, inner)
        self.pages = range(start + page, start + page + inner)
        self.pointer = self.pages.stop - padded
        if SANITIZE:
            _libc["__asan_poison_memory_region"](ctypes.c_void_p(start), ctypes.c_size_t(inner + 2 * page))
            _libc["__asan_unpoison_memory_region"](
                ctypes.c_void_p(self.pointer), ctypes.c_size_t(count_bytes)
            )
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_FIXED
        weakref.finalize(self, _map, start + page, inner, flags).atexit = False

    def is_kept(self) -> bool:
        """Whether nothing was written to the pages beside the memory itself."""
        if SANITIZE:
            return True  # or the process would have ended
        before = ctypes.string_at(self.pages.start, self.pointer - self.pages.start)
        end = self.pointer + self.bytes
        behind = ctypes.string_at(end, self.pages.stop - end)
        return before.count(POISON) + behind.count(POISON) == len(before) + len(behind)


class Borrowed:
    """Memory of the host that another library owns; here it is the device's as well."""

    def __init__(self, pointer: int, count_bytes: int, owner: Any) -> None:
        self.pointer = pointer
        self.bytes = count_bytes
        self.pages = range(pointer, pointer + count_bytes)
        self.owner = owner

    def is_kept(self) -> bool:
        return True  # nobody knows what lies beside it


class EmulatorExchange:
    """The `Exchange` of an emulated device: its memory is the host's, so other libraries' arrays on the CPU are its."""

    place = (1, 0)
    stream = None

    def __init__(self, memories: "weakref.WeakValueDictionary[int, Memory | Borrowed]") -> None:
        self._memories = memories

    def holds(self, pointer: int) -> bool:
        return False

    def wait_for(self, stream: int) -> None:
        raise ValueError("an emulated device has no streams")

    def borrow(self, pointer: int, count_bytes: int, owner: Any) -> Borrowed:
        memory = Borrowed(pointer, count_bytes, owner)
        known = self._memories.get(pointer)
        if known is None or known.bytes < count_bytes:
            self._memories[pointer] = memory
        return memory

    def dlpack(self, memory: Any, shape: tuple[int, ...], **options: Any) -> Any:
        held = (ctypes.c_float * math.prod(shape)).from_address(memory.pointer)
        held.owner = memory
        return np.frombuffer(held, np.float32).reshape(shape).__dlpack__(**options)


@dataclass(frozen=True)
class Kernel:
    """A kernel of a built library."""

    name: str
    entry: Any
    library: Path


class EmulatorDevice:
    """The `Device` of fastunet.backends.cuda.device, without a GPU.

    Parameters
    ----------
    architecture
        Whose shared memory a block may have.
    kernels
        Folder of the kernels' sources.
    seed
        Of the order in which blocks, warps and lanes take turns.

    Attributes
    ----------
    memory
        Bytes it has; may be set.
    """

    def __init__(self, architecture: str = "sm_80", kernels: Path = KERNELS, seed: int = 0) -> None:
        self.name = "emulator"
        self.architecture = architecture
        self.multiprocessors = 4
        self.shared_memory = SHARED_KIBIBYTES[architecture.rstrip("af")] * 1024
        self.kernels = kernels
        self.seed = seed
        self.memory = 1 << 40
        self._memories: weakref.WeakValueDictionary[int, Memory | Borrowed] = weakref.WeakValueDictionary()
        self.exchange = EmulatorExchange(self._memories)
        self.records = False
        self._built: dict[tuple[str, str, tuple[str, ...]], Kernel] = {}
        self._captured: list[Callable[[], None]] | None = None

    def describe(self) -> str:
        return f"emulated {self.architecture}, {self.multiprocessors} multiprocessors"

    def allocate(self, count_bytes: int) -> Memory:
        if count_bytes > self.free_memory():
            raise MemoryError(f"{count_bytes} bytes are not left on the device")
        memory = Memory(count_bytes)
        self._memories[memory.pointer] = memory
        return memory

    def free_memory(self) -> int:
        return self.memory - sum(memory.bytes for memory in list(self._memories.values()))

    def upload(self, pointer: int, values: np.ndarray) -> None:
        values = np.ascontiguousarray(values)
        self._check(pointer, values.nbytes)
        self._do(lambda: ctypes.memmove(pointer, values.ctypes.data, values.nbytes))

    def host_array(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        return (
            np.full(math.prod(shape) * np.dtype(dtype).itemsize, POISON, np.uint8).view(dtype).reshape(shape)
        )

    def read_back(self, pointer: int, values: np.ndarray) -> None:
        self._check(pointer, values.nbytes)
        self._do(lambda: ctypes.memmove(values.ctypes.data, pointer, values.nbytes))

    def download(self, pointer: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        if self._captured is not None:
            raise RuntimeError("a download cannot be captured")
        values = np.empty(shape, dtype)
        self._check(pointer, values.nbytes)
        ctypes.memmove(values.ctypes.data, pointer, values.nbytes)
        return values

    def zero(self, pointer: int, count_bytes: int) -> None:
        self._check(pointer, count_bytes)
        self._do(lambda: ctypes.memset(pointer, 0, count_bytes))

    def kernel(self, file: str, name: str, defines: tuple[str, ...] = ()) -> Kernel:
        key = (file, name, defines)
        if key not in self._built:
            library = build(self.kernels / file, defines)
            entry = getattr(ctypes.CDLL(str(library)), f"emulate_{name}")
            entry.restype = ctypes.c_bool
            entry.argtypes = [ctypes.POINTER(Launch), ctypes.c_void_p, ctypes.POINTER(Failure)]
            self._built[key] = Kernel(name, entry, library)
        return self._built[key]

    def launch(
        self,
        kernel: Kernel,
        grid: tuple[int, int, int],
        block: int,
        shared_bytes: int,
        arguments: ctypes.Structure,
    ) -> None:
        launch = Launch(grid, block, shared_bytes, self.shared_memory, ctypes.sizeof(arguments), self.seed)
        by_value = type(arguments).from_buffer_copy(arguments)
        self._do(lambda: self._run(kernel, launch, by_value))

    def _run(self, kernel: Kernel, launch: Launch, arguments: ctypes.Structure) -> None:
        failure = Failure()
        with _running:
            done = kernel.entry(launch, ctypes.addressof(arguments), failure)
        if not done:
            message = failure.message.decode() + self._neighbour(failure.address)
            raise RuntimeError(message + _line(kernel.library, failure.instruction))
        for memory in list(self._memories.values()):
            if not memory.is_kept():
                raise RuntimeError(
                    f"{kernel.name}: wrote outside the {memory.bytes} bytes of memory at {memory.pointer:#x}"
                )

    def synchronize(self) -> None:
        """Nothing is asynchronous here."""

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        captured: list[Callable[[], None]] = []
        self._captured = captured
        try:
            work()
        finally:
            self._captured = None

        def replay() -> None:
            for step in captured:
                step()

        return replay

    def mark(self) -> Callable[[], None]:
        return self.synchronize

    def _do(self, step: Callable[[], Any]) -> None:
        if self._captured is None:
            step()
        else:
            self._captured.append(step)

    def _check(self, pointer: int, count_bytes: int) -> None:
        for start, memory in list(self._memories.items()):
            if start <= pointer and pointer + count_bytes <= start + memory.bytes:
                return
        raise RuntimeError(f"{count_bytes} bytes at {pointer:#x} are not in any memory of the device")

    def _neighbour(self, address: int) -> str:
        """What a faulting address lies beside."""
        for memory in list(self._memories.values()):
            page = mmap.PAGESIZE
            if memory.pages.stop <= address < memory.pages.stop + page:
                return (
                    f", {address - memory.pointer - memory.bytes} bytes behind {memory.bytes} bytes of memory"
                )
            if memory.pages.start - page <= address < memory.pages.start:
                return f", {memory.pointer - address} bytes before {memory.bytes} bytes of memory"
        return ""


def _line(library: Path, instruction: int) -> str:
    """Where in the kernel's source an instruction of its library comes from."""
    if instruction == 0:
        return ""
    command = ["addr2line", "-i", "-e", str(library), hex(instruction)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return f" ({', from '.join(line.rpartition('/')[2] for line in lines)})"


def build(source: Path, defines: tuple[str, ...]) -> Path:
    """Compile a kernel file with these defines, unless the same sources and flags were before; return the library.

    Many processes may build at once: each writes a name of its own and renames it when it is whole.
    """
    address = ("-fsanitize=address",) if SANITIZE else ()
    objects = [
        _compiled((HERE / name,), (*FLAGS, "-O3", *address, "-c"), ".o")
        for name in ("machine.cpp", "warp.cpp")
    ]
    flags = (*FLAGS, "-O2", "-DFASTUNET_EMULATOR", *defines, *CHECKS[SANITIZE], "-c", "-x", "c++")
    kernels = _compiled((source,), flags, ".o")
    return _compiled((kernels, *objects), ("-shared", *address), ".so")


def _compiled(inputs: tuple[Path, ...], flags: tuple[str, ...], suffix: str) -> Path:
    digest = hashlib.sha256(repr((_compiler(), flags)).encode())
    for file in [*inputs, *sorted(KERNELS.glob("*.cuh")), HERE / "machine.h", HERE / "emulator.h"]:
        digest.update(file.name.encode() + file.read_bytes())
    folder = Path(tempfile.gettempdir()) / f"fastunet-emulator-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to another user, whose code this would run")
    built = folder / f"{inputs[0].stem.partition('-')[0]}-{digest.hexdigest()[:24]}{suffix}"
    if not built.exists():
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            output = Path(temporary) / built.name
            command = ["g++", *flags, *map(str, inputs), "-o", str(output)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
            output.replace(built)
    return built


@functools.cache
def _compiler() -> str:
    """The compiler's version and what -march=native means here."""
    version = subprocess.run(["g++", "--version"], capture_output=True, text=True, check=True).stdout
    processor = Path("/proc/cpuinfo")
    flags = [line for line in processor.read_text().splitlines() if line.startswith(("flags", "Features"))]
    return version + platform.machine() + "".join(flags[:1])

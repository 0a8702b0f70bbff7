"""The compiler as a test: every kernel, in every form that the table of kernels asks for, on four generations of GPUs.

A training step and a prediction of several networks run on a device that only takes notes; what they would launch is
compiled by NVRTC. Nothing may spill or use local memory; registers and shared memory must let as many blocks onto a
multiprocessor as the kernel's source says, and are what tests/resources.json says for this version of NVRTC:
python tests/test_compile.py --write adds its own
"""

import ctypes
import functools
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastunet import Predictor, UNet, backends, input_size, ops
from fastunet.autograd import Tensor
from fastunet.backends.cuda import compiler
from fastunet.backends.cuda.exchange import View
from fastunet.backends.cuda.table import CudaBackend

TABLE = Path(__file__).with_name("resources.json")


@dataclass(frozen=True)
class Generation:
    """What a multiprocessor has, in KiB and threads, and how many there are.

    Registers go to warps in 256s; of shared memory the system takes 1 KiB for each block.
    """

    shared: int
    threads: int
    multiprocessors: int


GENERATIONS = {
    "sm_80": Generation(164, 2048, 108),
    "sm_86": Generation(100, 1536, 84),
    "sm_90a": Generation(228, 2048, 132),
    "sm_100": Generation(228, 2048, 148),
}
REGISTERS = 65536

# in_channels, num_classes, base_channels, depth, output side
NETWORKS = [(1, 2, 64, 4, 388), (3, 3, 32, 2, 388), (5, 20, 16, 1, 20)]


@dataclass
class Address:
    pointer: int
    bytes: int


@dataclass(frozen=True)
class Launch:
    file: str
    name: str
    defines: tuple[str, ...]
    threads: int
    shared_bytes: int


class NotingDevice:
    """A `Device` that computes nothing."""

    name = "noting"
    records = False
    exchange = None

    def __init__(self, architecture: str) -> None:
        self.architecture = architecture
        self.multiprocessors = GENERATIONS[architecture].multiprocessors
        self.shared_memory = (GENERATIONS[architecture].shared - 1) * 1024
        self.launches: set[Launch] = set()

    def allocate(self, count_bytes: int) -> Address:
        return Address(256, count_bytes)

    def upload(self, pointer: int, values: np.ndarray) -> None: ...

    def describe(self) -> str:
        return "noting"

    def free_memory(self) -> int:
        return 1 << 40

    def mark(self) -> Callable[[], None]:
        return self.synchronize

    def host_array(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        return np.zeros(shape, dtype)

    def read_back(self, pointer: int, values: np.ndarray) -> None:
        values[...] = [1, 1, 0]  # a loss: its sum, that of the weights, and how many labels are invalid

    def download(self, pointer: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        return np.zeros(shape, dtype)

    def zero(self, pointer: int, count_bytes: int) -> None: ...

    def kernel(self, file: str, name: str, defines: tuple[str, ...]) -> tuple[str, str, tuple[str, ...]]:
        return file, name, defines

    def launch(
        self,
        kernel: tuple[str, str, tuple[str, ...]],
        grid: tuple[int, int, int],
        block: int,
        shared_bytes: int,
        arguments: ctypes.Structure,
    ) -> None:
        assert min(grid) >= 1 and grid[0] < 2**31 and max(grid[1:]) < 2**16, (kernel, grid)
        assert shared_bytes <= self.shared_memory, (kernel, shared_bytes)
        self.launches.add(Launch(*kernel, block, shared_bytes))

    def synchronize(self) -> None: ...


@functools.cache
def launches(architecture: str) -> frozenset[Launch]:
    """What networks of several sizes launch on this generation, in both precisions."""
    device = NotingDevice(architecture)
    backends.register("noting", lambda precision: CudaBackend(device, precision))
    for precision in ("bf16", "fp32"):
        for in_channels, classes, base_channels, depth, side in NETWORKS:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(UNet, "_initialise", lambda self: None)
                model = UNet(in_channels, classes, base_channels, depth, device="noting", precision=precision)
            image = np.zeros((1, *(input_size(side, depth),) * 2, in_channels), np.float32)
            truth = np.zeros((1, side, side), int), np.ones((1, side, side), np.float32)
            model.loss(image, *truth).backward(0.5)
            model.parameters().backend.sgd_momentum(
                *[model.parameters().values_buffer] * 3, learning_rate=0.1, rate=0.9
            )
            logits = model(image)
            ops.softmax_cross_entropy(logits, *truth).backward()
            for kind in (np.uint8, np.uint16, np.float32):
                Predictor(model)(np.zeros((side, side, in_channels), kind))
            # What no U-Net asks for: a result that is added to, activations on the host, arrays of another library.
            x = Tensor.from_numpy(np.zeros((1, 4, 4, base_channels)), model.backend)
            y = ops.conv3x3(
                x, *(model.parameters()[f"encoder.0.conv2.{part}"] for part in ("weight", "bias")), True
            )
            ops.add(y, y).backward(y.numpy())
            for extent in (1, 2**16):
                model.backend.array(View(Address(256, 4), 256, (1, extent, extent, 1), (1, 1, 1, 1), "uint8"))
            Predictor(model)(View(Address(256, 4), 256, (side, side, in_channels), (1, 1, 1), "float64"))
    return frozenset(device.launches)


def variants() -> list[tuple[str, tuple[str, ...], str]]:
    """File, defines and architecture of everything to compile, the longest first."""
    wanted = {
        (launch.file, launch.defines, architecture)
        for architecture in GENERATIONS
        for launch in launches(architecture)
    }
    return sorted(wanted, key=lambda variant: (-len(compiler.sources()[variant[0]]), variant))


@pytest.fixture(scope="module")
def compiled() -> dict[tuple[str, tuple[str, ...], str], dict[str, compiler.Resources]]:
    """What every kernel of every variant needs."""
    return compile_all()


def compile_all() -> dict[tuple[str, tuple[str, ...], str], dict[str, compiler.Resources]]:
    wanted = variants()
    with ProcessPoolExecutor(max_workers=min(len(wanted), 8, backends.get_threads())) as pool:
        return dict(zip(wanted, pool.map(compiler.resources, *zip(*wanted, strict=True)), strict=True))


def intended_blocks() -> Iterator[tuple[str, str, int]]:
    """File, kernel and the blocks for which a multiprocessor should have room, from the sources."""
    for file, source in compiler.sources().items():
        for name, blocks in re.findall(r"^KERNEL\((\w+), \w+, \w+, (\d+)\)", source.decode(), re.MULTILINE):
            yield file, name, int(blocks)


def test_every_kernel_file_is_launched():
    launched = {(launch.file, launch.name) for launch in launches("sm_80")}
    assert launched == {(file, name) for file, name, _ in intended_blocks()}


def test_no_kernel_spills_or_uses_local_memory(compiled):
    found = {
        (variant, name): needs
        for variant, kernels in compiled.items()
        for name, needs in kernels.items()
        if needs.local or needs.spilled
    }
    assert not found


@pytest.mark.parametrize("architecture", GENERATIONS)
def test_as_many_blocks_as_intended_fit_on_a_multiprocessor(compiled, architecture):
    """But two at least where shared memory is small, and no more than the threads it may have."""
    generation = GENERATIONS[architecture]
    intended = {(file, name): blocks for file, name, blocks in intended_blocks()}
    found = {}
    for launch in launches(architecture):
        wanted = min(intended[launch.file, launch.name], generation.threads // launch.threads)
        needs = compiled[launch.file, launch.defines, architecture][launch.name]
        by_registers = REGISTERS // (-(-needs.registers * 32 // 256) * 256 * (launch.threads // 32))
        by_memory = generation.shared * 1024 // (launch.shared_bytes + needs.shared + 1024)
        if by_registers < wanted or by_memory < min(wanted, 2 if architecture == "sm_86" else wanted):
            found[launch] = by_registers, by_memory, wanted
    assert not found


def described(compiled: dict) -> dict[str, dict[str, list[int]]]:
    """What resources.json holds: [registers of a thread, largest shared memory of a block] of each kernel."""
    table: dict[str, dict[str, list[int]]] = {}
    for (file, defines, architecture), kernels in sorted(compiled.items()):
        for name, needs in sorted(kernels.items()):
            blocks = [
                launch.shared_bytes
                for launch in launches(architecture)
                if (launch.file, launch.name, launch.defines) == (file, name, defines)
            ]
            if blocks:
                row = table.setdefault(" ".join((name, *defines)), {})
                row[architecture] = [needs.registers, needs.shared + max(blocks)]
    return table


def test_registers_and_shared_memory_are_those_recorded(compiled):
    version = ".".join(map(str, compiler.version()))
    recorded = json.loads(TABLE.read_text())
    if version not in recorded:
        pytest.skip(f"resources.json is of NVRTC {', '.join(recorded)}, this is {version}")
    assert described(compiled) == recorded[version]


# ---- The cache ------------------------------------------------------------------------------------------------------

KERNEL = '#include "ptx.cuh"\nstruct A { int* p; };\nKERNEL(one, A, 32, 1) { *arguments.p = NUMBER; }\n'


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """A cache folder of its own, and one small kernel."""
    monkeypatch.setenv("FASTUNET_CACHE", str(tmp_path / "cache"))
    replace_source(monkeypatch, KERNEL)
    return tmp_path / "cache"


def replace_source(monkeypatch, text: str) -> None:
    header = compiler.sources()["ptx.cuh"]
    monkeypatch.setattr(compiler, "sources", lambda: {"one.cu": text.encode(), "ptx.cuh": header})


@pytest.fixture
def compilations(monkeypatch):
    """What is really compiled, as it is."""
    seen = []
    real = compiler._compile
    monkeypatch.setattr(compiler, "_compile", lambda *arguments: seen.append(arguments) or real(*arguments))
    return seen


def build(number: int = 1, architecture: str = "sm_80") -> bytes:
    return compiler.build("one.cu", (f"-DNUMBER={number}",), architecture)


def test_what_was_compiled_once_is_not_again_until_something_changes(monkeypatch, cache, compilations):
    first = build()
    assert first[:4] == b"\x7fELF"
    assert build() == first
    assert len(compilations) == 1
    assert build(number=2) != first
    assert build(architecture="sm_90a") != first
    assert len(compilations) == 3
    replace_source(monkeypatch, KERNEL.replace("= NUMBER", "= NUMBER + 1"))
    assert build() != first
    assert len(compilations) == 4
    monkeypatch.setattr(compiler, "version", lambda: (99, 9))
    build()
    assert len(compilations) == 5
    assert len(list(cache.iterdir())) == 5


@pytest.mark.parametrize(
    "damage",
    [lambda content: b"", lambda content: content[:-1], lambda content: content[:40] + b"\0" + content[41:]],
    ids=["empty", "cut short", "a byte changed"],
)
def test_a_damaged_entry_is_replaced(cache, compilations, damage):
    good = build()
    (entry,) = cache.iterdir()
    content = entry.read_bytes()
    assert damage(content) != content
    entry.write_bytes(damage(content))
    assert build() == good
    assert entry.read_bytes() == content
    assert len(compilations) == 2


def test_a_cache_folder_that_cannot_be_written_is_done_without(monkeypatch, cache):
    cache.write_text("a file where the folder should be")
    assert build()[:4] == b"\x7fELF"
    assert cache.read_text() == "a file where the folder should be"


def test_a_source_that_does_not_compile_is_said_with_the_compilers_words(monkeypatch, cache):
    replace_source(monkeypatch, KERNEL.replace("NUMBER", "UNKNOWN"))
    with pytest.raises(RuntimeError, match=r"kernels/one.cu does not compile with .*sm_80(.|\n)*UNKNOWN"):
        build()
    assert not cache.exists()


def test_many_processes_may_start_at_once(cache):
    code = (
        "from fastunet.backends.cuda import compiler; import hashlib; "
        "print(hashlib.sha256(compiler.build('sgd_momentum.cu', ('-DELEMENT_BITS=16',), 'sm_80')).hexdigest())"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(4)
    ]
    results = {process.communicate()[0] for process in processes}
    assert [process.returncode for process in processes] == [0] * 4
    assert len(results) == 1 and len(results.pop()) == 65
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize(
    "capability, name",
    [((8, 0), "sm_80"), ((8, 6), "sm_86"), ((8, 9), "sm_89"), ((9, 0), "sm_90a"), ((10, 0), "sm_100")],
)
def test_architecture_of_a_gpu(capability, name):
    assert compiler.architecture(capability) == name


def write_table() -> None:
    """Add what this version of NVRTC makes to resources.json, a kernel a line."""
    recorded = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    recorded[".".join(map(str, compiler.version()))] = described(compile_all())
    versions = []
    for version, kernels in sorted(recorded.items()):
        lines = [f"{json.dumps(kernel)}: {json.dumps(needs)}" for kernel, needs in sorted(kernels.items())]
        versions.append(f"{json.dumps(version)}: {{\n" + ",\n".join(lines) + "\n}")
    TABLE.write_text("{\n" + ",\n".join(versions) + "\n}\n")


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit(__doc__)
    write_table()

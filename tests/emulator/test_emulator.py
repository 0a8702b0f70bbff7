"""The emulator itself: every primitive against NumPy, and planted bugs, each of which it must catch."""

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from emulator.device import HERE, SANITIZE, EmulatorDevice, Memory, sanitizer_environment

PLANTED = HERE / "planted"
ELEMENTS = ("-DELEMENT_BITS=16",)


class Pointers(ctypes.Structure):
    """Arguments of the kernels in primitives.cu."""

    _fields_ = [
        ("input", ctypes.c_void_p),
        ("other", ctypes.c_void_p),
        ("output", ctypes.c_void_p),
        ("count", ctypes.c_int),
    ]


class BugPointers(ctypes.Structure):
    """Arguments of the kernels in bugs.cu."""

    _fields_ = [("input", ctypes.c_void_p), ("output", ctypes.c_void_p), ("count", ctypes.c_int)]


@pytest.fixture(scope="module")
def device() -> EmulatorDevice:
    return EmulatorDevice(kernels=PLANTED)


def uploaded(device: EmulatorDevice, values: np.ndarray) -> Memory:
    memory = device.allocate(values.nbytes)
    device.upload(memory.pointer, values)
    return memory


def run(
    device: EmulatorDevice,
    name: str,
    output: np.ndarray,
    x: np.ndarray,
    other: np.ndarray | None = None,
    *,
    count: int = 0,
    defines: tuple[str, ...] = (),
    grid: tuple[int, int, int] = (1, 1, 1),
    block: int = 64,
    shared_bytes: int = 0,
) -> np.ndarray:
    """Launch one of primitives.cu; `output` is what is there before."""
    memories = [uploaded(device, values) for values in (x, x if other is None else other, output)]
    kernel = device.kernel("primitives.cu", name, ELEMENTS + defines)
    arguments = Pointers(*(memory.pointer for memory in memories), count)
    device.launch(kernel, grid, block, shared_bytes, arguments)
    return device.download(memories[2].pointer, output.shape, output.dtype)


def bfloat16(values: np.ndarray) -> np.ndarray:
    """The bits of the nearest bfloat16, as PyTorch rounds."""
    return torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def test_bfloat16_rounds_to_nearest_even(device: EmulatorDevice, rng: np.random.Generator) -> None:
    bits = rng.integers(0, 2**32, 4000, dtype=np.uint32)
    ties = bits[:1000] & 0xFFFF0000 | 0x8000
    special = np.array(
        [0, 0x80000000, 0x7F800000, 0xFF800000, 0x7F7FFFFF, 0xFF7FFFFF, 1, 0x807FFFFF], np.uint32
    )
    x = np.concatenate([special, ties, bits]).view(np.float32)
    x = x[~np.isnan(x)]
    x = x[: len(x) // 2 * 2]
    packed = run(
        device, "pack", np.zeros(len(x) // 2, np.uint32), x, count=len(x) // 2, grid=(40, 1, 1), block=128
    )
    np.testing.assert_array_equal(packed.view(np.uint16), bfloat16(x))


def test_bfloat16_of_nan(device: EmulatorDevice) -> None:
    x = np.array([0x7F800001, 0xFFFFFFFF], np.uint32).view(np.float32)
    assert run(device, "pack", np.zeros(1, np.uint32), x, count=1)[0] == 0x7FFF7FFF


@pytest.mark.parametrize("a_transposed", [False, True])
@pytest.mark.parametrize("b_transposed", [False, True])
def test_matrix_product(
    device: EmulatorDevice, rng: np.random.Generator, a_transposed: bool, b_transposed: bool
) -> None:
    a, b, d = rng.normal(size=(3, 16, 16)).astype(np.float32)
    a, b = bfloat16(a), bfloat16(b)
    defines = (a_transposed * ("-DA_TRANSPOSED",)) + (b_transposed * ("-DB_TRANSPOSED",))
    result = run(
        device,
        "multiply",
        d,
        np.ascontiguousarray(a.T if a_transposed else a),
        np.ascontiguousarray(b if b_transposed else b.T),
        defines=defines,
        block=32,
        shared_bytes=1024,
    )
    exact = d + from_bfloat16(a).astype(float) @ from_bfloat16(b).astype(float)
    # 17 terms of up to about 16 in size, summed in float32: half a unit in the last place (2**-24) each.
    np.testing.assert_allclose(result, exact, rtol=0, atol=17 * 64 * 2.0**-24)


@pytest.mark.parametrize("count", [0, 1, 37, 64])
def test_copy_fills_with_zeros(device: EmulatorDevice, rng: np.random.Generator, count: int) -> None:
    x = rng.integers(1, 2**32, (max(count, 1), 4), dtype=np.uint32)  # no more: what is not valid is not read
    result = run(device, "copy", np.ones((64, 4), np.uint32), x, count=count, shared_bytes=1024)
    np.testing.assert_array_equal(result[:count], x[:count])
    assert not result[count:].any()


@pytest.mark.parametrize("width", [2, 8, 32])
def test_shuffles(device: EmulatorDevice, rng: np.random.Generator, width: int) -> None:
    x = rng.normal(size=64).astype(np.float32)
    by = int(rng.integers(0, width))
    result = run(device, "exchange", np.zeros((4, 64), np.float32), x, np.array([by], np.int32), count=width)
    lane, first = np.arange(64), np.arange(64) // width * width
    np.testing.assert_array_equal(result[0], x[first + by])
    np.testing.assert_array_equal(result[1], x[lane ^ by])
    np.testing.assert_array_equal(result[2], x[np.where(lane - by >= first, lane - by, lane)])
    np.testing.assert_array_equal(result[3], x[np.where(lane + by < first + width, lane + by, lane)])


@pytest.mark.parametrize("chance", [0.0, 0.1, 0.9, 1.0])
def test_votes(device: EmulatorDevice, rng: np.random.Generator, chance: float) -> None:
    x = (rng.random(64) < chance).astype(np.int32) * 7
    result = run(device, "vote", np.zeros((6, 64), np.uint32), x)
    for thread in range(64):
        lanes = np.arange(thread // 32 * 32 + thread % 2, thread // 32 * 32 + 32, 2)
        ballot = sum(1 << int(lane) % 32 for lane in lanes if x[lane])
        expected = [ballot, x[lanes].any(), x[lanes].all(), (x != 0).sum(), x.any(), x.all()]
        np.testing.assert_array_equal(result[:, thread], expected)


def test_barriers_without_the_threads_that_left(device: EmulatorDevice, rng: np.random.Generator) -> None:
    x = rng.integers(-1000, 1000, (5, 64), dtype=np.int32)
    result = run(device, "sum", np.zeros((5, 32), np.int32), x, grid=(5, 1, 1), shared_bytes=256)
    np.testing.assert_array_equal(result, np.tile(x.sum(1, keepdims=True), 32))


def test_integer_functions(device: EmulatorDevice, rng: np.random.Generator) -> None:
    a, b = rng.integers(0, 2**32, (2, 64), dtype=np.uint32)
    a[:3] = 0, 1, 2**31
    result = run(device, "integers", np.zeros((5, 64), np.uint32), a, b)
    np.testing.assert_array_equal(result[0], (a.astype(np.uint64) * b) >> np.uint64(32))
    np.testing.assert_array_equal(
        result[1].view(np.int32), (a.view(np.int32).astype(np.int64) * b.view(np.int32)) >> 32
    )
    np.testing.assert_array_equal(result[2], np.bitwise_count(a))
    np.testing.assert_array_equal(result[3], [32 - int(value).bit_length() for value in a])
    np.testing.assert_array_equal(result[4], [(int(value) & -int(value)).bit_length() for value in a])


@pytest.mark.parametrize("block", [1, 33, 1024])
def test_every_block_and_thread_runs_once(device: EmulatorDevice, block: int) -> None:
    result = run(
        device, "census", np.zeros(30, np.int32), np.zeros(1), grid=(2, 3, 5), block=block, shared_bytes=4
    )
    np.testing.assert_array_equal(result, block * (block - 1))


# ---- Planted bugs ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bug:
    """What the emulator says of a planted bug, and what its correct twin computes, where that is anything."""

    name: str
    error: str
    expected: Callable[[np.ndarray], np.ndarray] | None = None
    count: int = 64
    threads: int = 64


def _unchanged(x: np.ndarray) -> np.ndarray:
    return x


def _reversed(x: np.ndarray) -> np.ndarray:
    return x[::-1]


def _exchanged(x: np.ndarray) -> np.ndarray:
    return x[np.arange(64) ^ 31]


BUGS = [
    Bug("barrier", r"without a barrier was (written|read) by .*bugs\.cu", _reversed),
    Bug("warp_barrier", r"without a barrier was (written|read) by .*bugs\.cu", _unchanged),
    Bug("reuse", r"without a barrier was (written|read) by .*bugs\.cu", _reversed),
    Bug("wait", r"has not been waited for since cp_async_16 by thread \d+.*bugs\.cu", _reversed),
    Bug("wait_order", r"(without a barrier was written|has not been waited for).*bugs\.cu", _reversed),
    Bug("stage", r"(without a barrier was (read|written)|has not been waited for).*bugs\.cu", _reversed),
    Bug("halo", r"invalid read .* 0 bytes behind 256 bytes of memory.*bugs\.cu", lambda x: x + np.append(x[1:], x[-1])),
    Bug("store_outside", "wrote outside the 244 bytes of memory", lambda x: np.ones(61), count=61),
    Bug("divergent_barrier", r"divergent barrier|deadlock: .*__syncthreads \(bugs\.cu:\d+\)", _exchanged),
    Bug("divergent_warp", r"diverged warp: .*__shfl_xor_sync.*bugs\.cu:\d+", _exchanged),
    Bug("early_exit", r"deadlock: .*threads 32-62 in __shfl_xor_sync \(bugs\.cu:\d+\), thread 63 exited", _exchanged),
    Bug("shared_store", r"thread 63: writes byte 256 of 256 bytes of shared memory.*bugs\.cu"),
    Bug("shared_load", r"thread 0: reads byte -4 of 256 bytes of shared memory.*bugs\.cu"),
    Bug("shared_copy", r"cp_async_16 writes byte 256 of 256 bytes of shared memory.*bugs\.cu"),
    Bug("shared_matrix", r"ldmatrix_x4 of lane (15|31) reads byte 256 of 256 .*bugs\.cu", threads=32),
    Bug("misaligned_matrix", r"ldmatrix_x4 of lane \d+: byte \d+ of shared memory is not aligned to 16", threads=32),
    Bug("misaligned_copy", "thread 3: cp_async_16: byte 8 of shared memory is not aligned to 16"),
    Bug("misaligned_source", "thread 3: cp_async_16: global address 0x.* is not aligned to 16"),
    Bug("misaligned_load", r"misaligned access.*bugs\.cu", lambda x: np.full(64, x[3])),
    Bug("array_index", r"index outside its array.*bugs\.cu", lambda x: np.arange(64) % 4 + 1),
    Bug("overflow", r"signed overflow of \*.*bugs\.cu", lambda x: np.full(64, 256 * 64 * 512)),
    Bug("division", r"division by zero.*bugs\.cu", lambda x: np.arange(64)),
]  # fmt: skip


def launch_bug(
    device: EmulatorDevice, name: str, x: np.ndarray, count: int = 64, threads: int = 64, blocks: int = 1
) -> np.ndarray:
    source = uploaded(device, x)
    output = device.allocate(4 * (count if len(x) == 64 else len(x)))
    kernel = device.kernel("bugs.cu", name, ELEMENTS)
    shared_bytes = 256 if len(x) == 64 else 512
    device.launch(
        kernel, (blocks, 1, 1), threads, shared_bytes, BugPointers(source.pointer, output.pointer, count)
    )
    return device.download(output.pointer, (output.bytes // 4,), np.float32)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_planted_bug_is_caught(rng: np.random.Generator, bug: Bug, seed: int) -> None:
    if SANITIZE:
        pytest.skip("AddressSanitizer takes the place of the checks, and ends the process")
    device = EmulatorDevice(kernels=PLANTED, seed=seed)
    x = rng.normal(size=64).astype(np.float32)
    with pytest.raises(RuntimeError, match=bug.error):
        launch_bug(device, f"{bug.name}_planted", x, bug.count, bug.threads)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_correct_twin_passes(rng: np.random.Generator, bug: Bug, seed: int) -> None:
    device = EmulatorDevice(kernels=PLANTED, seed=seed)
    x = rng.normal(size=64).astype(np.float32)
    result = launch_bug(device, f"{bug.name}_correct", x, bug.count, bug.threads)
    if bug.expected is not None:
        np.testing.assert_array_equal(result, bug.expected(x).astype(np.float32))


def test_wrong_fragment_lane_gives_another_product(device: EmulatorDevice, rng: np.random.Generator) -> None:
    x = rng.integers(-8, 9, 256).astype(np.float32)  # exact in bfloat16, and their product in float32
    product = (x.reshape(16, 16) @ x.reshape(16, 16)).reshape(-1)
    np.testing.assert_array_equal(launch_bug(device, "fragment_correct", x, threads=32), product)
    assert (launch_bug(device, "fragment_planted", x, threads=32) != product).any()


def test_dependence_on_block_order_shows(device: EmulatorDevice) -> None:
    x = np.zeros(64, np.float32)
    in_order = np.arange(1, 65, dtype=np.float32)
    np.testing.assert_array_equal(launch_bug(device, "block_order_correct", x, blocks=64), in_order)
    assert np.isnan(launch_bug(device, "block_order_planted", x, blocks=64)).any()


@pytest.mark.parametrize("architecture, kibibytes", [("sm_80", 163), ("sm_86", 99), ("sm_90a", 227)])
def test_shared_memory_of_the_architecture(architecture: str, kibibytes: int) -> None:
    device = EmulatorDevice(architecture, kernels=PLANTED)
    kernel = device.kernel("bugs.cu", "block_order_correct", ELEMENTS)
    output = device.allocate(4)
    arguments = BugPointers(output.pointer, output.pointer, 1)
    device.launch(kernel, (1, 1, 1), 64, kibibytes * 1024, arguments)
    with pytest.raises(RuntimeError, match=f"a block of this architecture may have {kibibytes * 1024}"):
        device.launch(kernel, (1, 1, 1), 64, kibibytes * 1024 + 1, arguments)


@pytest.mark.parametrize(
    "grid, block, error",
    [
        ((1, 1, 1), 65, "65 threads .* launch bounds allow 1 to 64"),
        ((1, 1, 1), 0, "0 threads"),
        ((0, 1, 1), 64, "grid of 0 x 1 x 1"),
        ((1, 65536, 1), 64, "grid of 1 x 65536 x 1"),
    ],
)
def test_launch_that_no_device_takes(
    device: EmulatorDevice, grid: tuple[int, int, int], block: int, error: str
) -> None:
    kernel = device.kernel("bugs.cu", "block_order_correct", ELEMENTS)
    with pytest.raises(RuntimeError, match=error):
        device.launch(kernel, grid, block, 0, BugPointers(0, 0, 1))


def test_arguments_of_another_size_are_refused(device: EmulatorDevice) -> None:
    kernel = device.kernel("bugs.cu", "block_order_correct", ELEMENTS)
    with pytest.raises(RuntimeError, match="its arguments are 24 bytes, those given 32"):
        device.launch(kernel, (1, 1, 1), 64, 0, Pointers(0, 0, 0, 1))


def test_freed_memory_cannot_be_read(device: EmulatorDevice) -> None:
    if SANITIZE:
        pytest.skip("AddressSanitizer ends the process")
    output = device.allocate(256)
    freed = device.allocate(256).pointer
    with pytest.raises(RuntimeError, match=f"invalid read of memory at {freed + 12:#x}"):
        device.launch(
            device.kernel("bugs.cu", "misaligned_load_correct", ELEMENTS),
            *((1, 1, 1), 1, 0, BugPointers(freed, output.pointer, 1)),
        )


def test_transfers_stay_within_memory(device: EmulatorDevice, rng: np.random.Generator) -> None:
    memory = device.allocate(100)
    x = rng.normal(size=10)
    device.upload(memory.pointer + 20, x)
    np.testing.assert_array_equal(device.download(memory.pointer + 20, (10,), np.float64), x)
    device.zero(memory.pointer + 20, 40)
    np.testing.assert_array_equal(device.download(memory.pointer + 20, (10,), np.float64), [0] * 5 + [*x[5:]])
    assert (device.download(memory.pointer, (20,), np.uint8) == 0xFF).all()
    for transfer in (
        lambda: device.upload(memory.pointer + 21, x),
        lambda: device.download(memory.pointer - 1, (1,), np.uint8),
        lambda: device.zero(memory.pointer, 101),
    ):
        with pytest.raises(RuntimeError, match="not in any memory"):
            transfer()


def test_compiler_errors_are_shown(device: EmulatorDevice) -> None:
    with pytest.raises(RuntimeError, match="error: "):
        device.kernel("bugs.cu", "halo_correct", ("-DELEMENT_BITS=16", "-DTWINS=nothing"))


def test_processes_build_at_the_same_time(tmp_path) -> None:
    code = (
        "from emulator.device import EmulatorDevice, HERE\n"
        "EmulatorDevice(kernels=HERE / 'planted').kernel('primitives.cu', 'pack', ('-DELEMENT_BITS=16',))"
    )
    environment = os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": str(HERE.parent)}
    processes = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]


def run_sanitized(*command: str) -> subprocess.CompletedProcess[str]:
    """Run Python with AddressSanitizer and kernels that are built for it."""
    return subprocess.run(
        [sys.executable, *command],
        env=os.environ | sanitizer_environment() | {"PYTHONPATH": f"{HERE.parents[1]}:{HERE.parent}"},
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.skipif(SANITIZE, reason="it is what this test starts")
def test_kernels_under_address_sanitizer() -> None:
    done = run_sanitized("-m", "pytest", "-x", "-q", str(HERE))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.skipif(SANITIZE, reason="it starts what it tests")
@pytest.mark.parametrize(
    "bug, error",
    [
        ("array_pointer", "stack-buffer-overflow"),
        ("store_outside", "use-after-poison"),
        ("halo", "use-after-poison"),
    ],
)
def test_address_sanitizer_catches(bug: str, error: str) -> None:
    count = 61 if bug == "store_outside" else 64
    code = f"""
from emulator.test_emulator import *
launch_bug(EmulatorDevice(kernels=PLANTED), "{bug}_%s", np.zeros(64, np.float32), {count})
"""
    correct = run_sanitized("-c", code % "correct")
    assert correct.returncode == 0, correct.stderr
    planted = run_sanitized("-c", code % "planted")
    assert planted.returncode != 0 and error in planted.stderr

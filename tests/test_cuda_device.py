"""Which device a name means, and how a machine without it says so; CuPy is replaced where a GPU would be needed."""

import ctypes
import subprocess
import sys
import types

import pytest

from fastunet import backends
from fastunet.backends import cuda
from fastunet.backends.cuda import compiler
from fastunet.backends.cuda.device import CupyDevice


class Failure(RuntimeError):
    pass


def fake_cupy(
    driver=13020, built=13000, count: int | Exception = 2, capability="90", is_hip=False, **modules
) -> types.ModuleType:
    """What of CuPy is asked before the first allocation."""

    def device_count():
        if isinstance(count, Exception):
            raise count
        return count

    runtime = types.SimpleNamespace(
        is_hip=is_hip,
        driverGetVersion=lambda: driver,
        runtimeGetVersion=lambda: built,
        getDeviceCount=device_count,
        CUDARuntimeError=Failure,
        **modules,
    )

    current = []

    class Device:
        attributes = {"MultiProcessorCount": 132, "MaxSharedMemoryPerBlockOptin": 232448}  # noqa: RUF012
        compute_capability = capability

        def __init__(self, index):
            self.index = index

        def __enter__(self):
            current.append(self.index)
            return self

        def __exit__(self, *error):
            current.pop()

    module = types.ModuleType("cupy")
    module.current = current  # GPUs
    module.cuda = types.SimpleNamespace(
        runtime=runtime, Device=Device, Stream=lambda non_blocking: types.SimpleNamespace(ptr=7)
    )
    return module


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    """Devices are found once and for all; here each test finds its own."""
    monkeypatch.delenv("FASTUNET_DEVICE")
    caches = (backends._automatic_device, cuda._device, cuda._backend)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.fixture
def with_gpu(monkeypatch):
    """A machine on which nvidia-smi is found."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(backends.shutil, "which", lambda name: f"/usr/bin/{name}")


MISSING = {
    "no CuPy": (None, "CuPy cannot be imported .*pip install 'fastunet\\[cuda13\\]'"),
    "no driver": ({"driver": 0}, "no NVIDIA driver is installed; install one"),
    "driver too old": (
        {"driver": 12080, "count": Failure("insufficient")},
        r"driver is for CUDA 12\.8 and CuPy for CUDA 13\.0; .*fastunet\[cuda12\]",
    ),
    "no GPU": ({"count": Failure("cudaErrorNoDevice")}, "shows no GPU .*check nvidia-smi"),
    "no GPU 1": ({"count": 1}, "there is no GPU 1; this machine has 1"),
    "old GPU": ({"capability": "75"}, r"GPU 1 cannot be used: its compute capability is 7\.5 .* 8\.0"),
    "new GPU": ({"capability": "990"}, r"compute capability is 99\.0, unknown to NVRTC \d+\.\d+"),
    "AMD": ({"is_hip": True}, "built for AMD GPUs; replace it"),
}


@pytest.mark.parametrize("found", MISSING)
def test_what_is_missing_is_said_in_one_sentence(monkeypatch, found):
    settings, sentence = MISSING[found]
    monkeypatch.setitem(sys.modules, "cupy", None if settings is None else fake_cupy(**settings))
    with pytest.raises(ValueError, match=sentence) as error:
        backends.resolve_device("cuda:1")
    assert str(error.value).startswith("device 'cuda:1' was asked for, but ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("built, extra", [(12090, "cuda12"), (13000, "cuda13")])
def test_an_nvrtc_that_is_missing_is_named_with_the_extra_of_this_cupy(monkeypatch, built, extra):
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy(built=built))
    monkeypatch.setitem(sys.modules, "cuda.bindings.nvrtc", None)
    monkeypatch.delattr(sys.modules["cuda.bindings"], "nvrtc", raising=False)
    with pytest.raises(ValueError, match=rf"NVRTC cannot be loaded .*fastunet\[{extra}\]"):
        backends.resolve_device("cuda")


def test_what_the_search_for_nvrtc_says_in_lines_becomes_a_sentence(monkeypatch):
    def fails():
        raise RuntimeError("Failure finding it:\n No such file\n")

    monkeypatch.setitem(sys.modules, "cupy", fake_cupy())
    monkeypatch.setattr("fastunet.backends.cuda.compiler.version", fails)
    with pytest.raises(ValueError, match=r"NVRTC cannot be loaded \(Failure finding it: No such file\); pip"):
        backends.resolve_device("cuda")


def test_a_gpu_is_described(monkeypatch):
    properties = {"name": b"NVIDIA H200", "major": 9, "minor": 0, "totalGlobalMem": 140 << 30}
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy(getDeviceProperties=lambda index: properties))
    assert backends.describe("cuda:1") == (
        "cuda:1: NVIDIA H200, compute capability 9.0, 132 multiprocessors, 140 GiB"
    )


def test_what_auto_means_can_be_said(monkeypatch):
    monkeypatch.setenv("FASTUNET_DEVICE", "cpu")
    monkeypatch.setattr(backends, "_automatic_device", lambda: "cuda:0")
    assert backends.resolve_device("auto") == backends.resolve_device("cpu") == "cpu"
    monkeypatch.setenv("FASTUNET_DEVICE", "gpu")
    with pytest.raises(ValueError, match="'gpu' is unknown; expected auto, cpu"):
        backends.resolve_device("auto")


def test_names_of_devices(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy())
    assert backends.resolve_device("cpu") == "cpu"
    assert backends.resolve_device("cuda") == "cuda:0"
    assert backends.resolve_device("cuda:1") == "cuda:1"
    for unknown in ("cuda:", "cuda:-1", "cuda:x", "gpu", "CUDA"):
        with pytest.raises(ValueError, match="is unknown; expected auto, cpu, cuda or cuda:N"):
            backends.resolve_device(unknown)


def test_auto_takes_the_first_gpu(monkeypatch, with_gpu):
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy())
    assert backends.resolve_device("auto") == "cuda:0"


def test_auto_says_once_that_a_gpu_stays_idle(monkeypatch, with_gpu, capsys):
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert [backends.resolve_device("auto") for _ in range(3)] == ["cpu"] * 3
    notice = capsys.readouterr().err
    assert notice.count("\n") == 1
    assert "GPU is not used, but the CPU: CuPy cannot be imported" in notice


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_auto_is_silent_where_gpus_are_hidden(monkeypatch, with_gpu, capsys, hidden):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy())
    assert backends.resolve_device("auto") == "cpu"
    assert capsys.readouterr().err == ""


def test_precision():
    assert backends.resolve_precision("auto", "cpu") == backends.resolve_precision("fp32", "cuda:0") == "fp32"
    assert (
        backends.resolve_precision("auto", "cuda:0") == backends.resolve_precision("bf16", "cuda:1") == "bf16"
    )
    with pytest.raises(ValueError, match="the CPU computes in fp32"):
        backends.resolve_precision("bf16", "cpu")
    with pytest.raises(ValueError, match="precision 'tf32' is unknown"):
        backends.resolve_precision("tf32", "cuda:0")


def test_importing_fastunet_imports_nothing_of_cuda():
    code = "import sys, fastunet; print([m for m in ('cupy', 'cuda', 'numba.cuda', 'numba_cuda') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


class Arguments(ctypes.Structure):
    _fields_ = [("pointer", ctypes.c_void_p), ("count", ctypes.c_int), ("factor", ctypes.c_float)]


def test_a_kernel_is_built_once_and_gets_its_structure_by_value(monkeypatch):
    """The ndarray of one element is what CuPy passes by value; it must hold the structure's own bytes."""
    launches, limits, builds = [], [], []

    class Function:
        ptr = 5

        def __call__(self, grid, block, arguments, shared_bytes, stream):
            (packed,) = arguments
            launches.append((grid, block, packed.size, packed.tobytes(), shared_bytes, stream.ptr))

    class Module:
        def load(self, code):
            assert code == b"code of dropout.cu"

        def get_function(self, name):
            return Function()

    def build(file, defines, architecture):
        builds.append((file, defines, architecture))
        return f"code of {file}".encode()

    cupy = fake_cupy()
    cupy.cuda.function = types.SimpleNamespace(Module=Module)
    cupy.cuda.driver = types.SimpleNamespace(
        CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES=8, funcSetAttribute=lambda *call: limits.append(call)
    )
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(compiler, "build", build)
    device = CupyDevice(0)
    assert (device.name, device.architecture, device.multiprocessors) == ("cuda:0", "sm_90a", 132)

    arguments = Arguments(0x123456789ABC, -7, 0.5)
    for _ in range(2):
        kernel = device.kernel("dropout.cu", "dropout", ("-DELEMENT_BITS=16",))
        device.launch(kernel, (3, 4, 5), 256, 1024, arguments)
    assert builds == [("dropout.cu", ("-DELEMENT_BITS=16",), "sm_90a")]
    assert limits == [(5, 8, 232448)]
    assert launches == [((3, 4, 5), (256, 1, 1), 1, bytes(arguments), 1024, 7)] * 2


def test_memory_that_is_not_there_is_a_memory_error_in_one_sentence(monkeypatch):
    class OutOfMemoryError(MemoryError):
        pass

    def alloc(count_bytes):
        raise OutOfMemoryError

    class Stream(types.SimpleNamespace):
        def __enter__(self):
            return self

        def __exit__(self, *error):
            return None

    cupy = fake_cupy(memGetInfo=lambda: (3 << 30, 8 << 30))
    cupy.cuda.Stream = lambda non_blocking: Stream(ptr=7)
    cupy.cuda.alloc, cupy.cuda.memory = alloc, types.SimpleNamespace(OutOfMemoryError=OutOfMemoryError)
    cupy.get_default_memory_pool = lambda: types.SimpleNamespace(free_bytes=lambda: 1 << 30)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    device = CupyDevice(0)
    assert device.free_memory() == 4 << 30
    with pytest.raises(
        MemoryError, match=r"^5\.0 GiB of memory were asked of cuda:0 and 4\.0 GiB are free;"
    ) as error:
        device.allocate(5 << 30)
    assert type(error.value) is MemoryError


def test_what_is_captured_is_replayed_on_its_own_gpu(monkeypatch):
    cupy, log = fake_cupy(), []
    graph = types.SimpleNamespace(launch=lambda stream: log.append(("launch", stream.ptr, *cupy.current)))
    stream = types.SimpleNamespace(
        ptr=7,
        begin_capture=lambda: log.append(("begin", *cupy.current)),
        end_capture=lambda: log.append(("end", *cupy.current)) or graph,
    )
    cupy.cuda.Stream = lambda non_blocking: stream
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    replay = CupyDevice(1).capture(lambda: log.append("work"))
    assert log == [("begin", 1), "work", ("end", 1)]
    replay()
    assert log[3:] == [("launch", 7, 1)] and not cupy.current

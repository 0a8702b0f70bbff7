"""The Numba-CUDA kernels: under Numba's simulator, on the GPU where there is one, and through the compiler.

The simulator takes the place of `numba.cuda` when that is first imported, hence a process of its own.
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

FOLDER = Path(__file__).parent / "numba_kernels"
FILES = ["warp_cuda.py", "weight_map_cuda.py", "samples_cuda.py"]


@pytest.fixture(autouse=True)
def numba_cuda():
    assert importlib.util.find_spec("numba_cuda"), "numba-cuda is not installed: pip install '.[test]'"


def test_the_cpu_does_without():
    imports = "import sys, fastunet.data.samples; sys.exit('numba.cuda' in sys.modules)"
    subprocess.run([sys.executable, "-c", imports], check=True)


def test_want_of_it_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "numba_cuda", None)
    monkeypatch.delitem(sys.modules, "fastunet.data.launch_cuda", raising=False)
    with pytest.raises(ImportError, match=r"numba-cuda .*fastunet\[cuda13\]"):
        importlib.import_module("fastunet.data.launch_cuda")


def run_tests(file, simulator):
    environment = {**os.environ, "NUMBA_ENABLE_CUDASIM": str(int(simulator))}
    command = [sys.executable, "-m", "pytest", "-q", "--durations=3", str(FOLDER / file)]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert child.returncode == 0, child.stdout + child.stderr
    print(child.stdout)


@pytest.mark.parametrize("file", FILES)
def test_kernels_under_the_simulator(file):
    run_tests(file, simulator=True)


@pytest.mark.parametrize("file", FILES)
def test_kernels_on_the_gpu(file):
    from numba import cuda

    if not cuda.is_available():
        pytest.skip("no NVIDIA GPU")
    run_tests(file, simulator=False)


def kernels():
    """Every kernel and the types of its arguments, in the forms training and its preparation use."""
    from numba import types

    from fastunet.data import warp_cuda, weight_map_cuda

    def array(kind, dimensions):
        return types.Array(kind, dimensions, "C")

    float32, float64, int32, uint8 = types.float32, types.float64, types.int32, types.uint8
    plane, mask, ignored = array(float32, 2), array(uint8, 2), array(types.boolean, 2)
    columns = array(int32, 3)
    motion = types.UniTuple(float64, 12)
    for pixels in (float32, types.uint16):
        image = array(float32, 3)
        centre = types.UniTuple(float32, 2)
        settings = (types.boolean, centre, motion, motion, float32, float32, types.int64)
        out = (array(pixels, 3), mask, plane, array(int32, 1))
        yield warp_cuda._warp_pixel, (image, mask, plane, *settings, *out)
    yield weight_map_cuda._search_column, (array(types.uint16, 2), types.int64, columns)
    yield weight_map_cuda._measure, (columns, types.int64, float64, plane, plane)
    class_weights, border = array(float64, 1), types.UniTuple(float64, 6)
    given = (mask, ignored, class_weights, float64, border)
    yield weight_map_cuda._weigh, (columns, types.int64, array(types.uint16, 2), *given, plane)
    yield weight_map_cuda._count, (mask, ignored, array(types.int64, 1))
    yield weight_map_cuda._balance, (array(types.int64, 1), class_weights)


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0)])
def test_kernels_compile_without_local_memory(capability, monkeypatch):
    """NVVM and nvJitLink, as on a machine with a GPU: nothing spills, and no function is left uninlined."""
    import numba.cuda.dispatcher
    from cuda.bindings import nvjitlink
    from numba import cuda

    device = SimpleNamespace(compute_capability=capability)
    monkeypatch.setattr(numba.cuda.dispatcher, "get_current_device", lambda: device)
    for kernel, arguments in kernels():
        ptx = cuda.compile_ptx(kernel.py_func, arguments, cc=capability)[0].encode()
        assert not re.search(rb"\bcall\b", ptx)
        options = [f"-arch=sm_{capability[0]}{capability[1]}", "-verbose", "-Xptxas=-v"]
        link = nvjitlink.create(len(options), options)
        try:
            nvjitlink.add_data(link, nvjitlink.InputType.PTX, ptx, len(ptx), kernel.py_func.__name__)
            nvjitlink.complete(link)
            log = bytearray(nvjitlink.get_info_log_size(link))
            nvjitlink.get_info_log(link, log)
        finally:
            nvjitlink.destroy(link)
        found = re.findall(r"(\d+) bytes (stack frame|spill stores|spill loads)", log.decode())
        assert [number for number, _ in found] == ["0", "0", "0"], log.decode()
        registers = int(re.search(r"Used (\d+) registers", log.decode())[1])
        print(f"sm_{capability[0]}{capability[1]} {kernel.py_func.__name__}: {registers} registers")
        # Three blocks of 256 threads to a multiprocessor of 65536 registers.
        assert registers <= 80

"""The C++ engine as a whole: instruction sets, threads, imports, what was linked."""

import os
import platform
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import _fastunet as engine
import numpy as np
import pytest

from fastunet import UNet, backends, no_grad

PROGRAM = """
import sys, numpy as np, _fastunet
from fastunet import UNet, no_grad, ops
model = UNet(in_channels=2, base_channels=20, depth=2, seed=1)
x = np.random.default_rng(0).standard_normal((1, 60, 76, 2)).astype(np.float32)
logits = model(x)
ops.softmax_cross_entropy(logits, np.zeros(logits.shape[:3], int), np.ones(logits.shape[:3])).backward()
np.savez(sys.argv[1], logits=logits.numpy(), **model.gradients())
print(_fastunet.instruction_set())
"""


def run(tmp_path, name, **environment):
    path = tmp_path / f"{name}.npz"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(path)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    return done, path


@pytest.mark.parametrize("name", ["baseline", "avx2", "avx512"])
def test_instruction_sets_agree(tmp_path, name):
    done, path = run(tmp_path, name, FASTUNET_ISA=name)
    if done.returncode and "does not have" in done.stderr:
        pytest.skip(f"this machine lacks {name}")
    assert done.stdout.strip() == name
    reference_done, reference_path = run(tmp_path, "reference", FASTUNET_CONV="direct")
    assert reference_done.returncode == 0, reference_done.stderr
    found, reference = np.load(path), np.load(reference_path)
    for key in reference:
        scale = np.abs(reference[key]).max()
        # float32 in another order, and single pixels whose ReLU flips.
        assert np.abs(found[key] - reference[key]).max() <= 2e-3 * scale + 1e-8, key


@pytest.mark.slow
@pytest.mark.parametrize("name", ["baseline", "avx2"])
def test_every_operation_with_a_narrower_instruction_set(name):
    """The operations' own tests run with the widest set only."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", str(Path(__file__).with_name("test_ops.py"))],
        env={**os.environ, "FASTUNET_ISA": name},
        capture_output=True,
        text=True,
    )
    if "which this machine or build does not have" in done.stdout:
        pytest.skip(f"this machine lacks {name}")
    assert done.returncode == 0, done.stdout


def test_unknown_choices_are_refused(tmp_path):
    done, _ = run(tmp_path, "x", FASTUNET_ISA="sse9")
    assert done.returncode != 0 and "FASTUNET_ISA is 'sse9'" in done.stderr
    done, _ = run(tmp_path, "x", FASTUNET_CONV="fft")
    assert done.returncode != 0 and "FASTUNET_CONV is 'fft'" in done.stderr


def test_import_is_light():
    """Third-party modules are imported on first use."""
    program = "import sys, fastunet; print(*(m for m in sys.modules if m.partition('.')[0] in sys.argv[1:]))"
    heavy = ["numba", "scipy", "matplotlib", "torch", "tifffile", "tqdm", "numpy", "safetensors"]
    done = subprocess.run([sys.executable, "-c", program, *heavy], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_several_python_threads_share_the_engine(rng):
    model = UNet(base_channels=8, depth=2).eval()
    inputs = [rng.standard_normal((1, 60, 60, 1)).astype(np.float32) for _ in range(8)]
    with no_grad():
        expected = [model(x).numpy() for x in inputs]
    results = [None] * len(inputs)

    def work(i):
        with no_grad():
            results[i] = model(inputs[i]).numpy()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for found, wanted in zip(results, expected, strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_an_image_is_convolved_as_it_is_by_then(rng):
    """One of few channels stays pixels until somebody needs or changes it."""
    pixels = rng.standard_normal((1, 9, 8, 1)).astype(np.float32)
    weight, bias = rng.standard_normal(16 * 16 * 9).astype(np.float32), np.zeros(16, np.float32)

    def convolved(image):
        return engine.conv3x3_forward(image, None, weight, bias, 16, False, "auto").pixels()

    once = convolved(engine.Array.from_pixels(pixels))
    for change, factor in ((lambda x: engine.multiply(x, 3.0), 3), (lambda x: engine.add_centre(x, x), 2)):
        image = engine.Array.from_pixels(pixels)
        change(image)
        np.testing.assert_allclose(convolved(image), factor * once, atol=1e-5 * np.abs(once).max() * factor)


def test_thread_count():
    program = "from fastunet import backends; print(backends.get_threads())"
    environment = {name: value for name, value in os.environ.items() if name != "FASTUNET_THREADS"}
    told = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert int(told.stdout) == len(os.sched_getaffinity(0))
    before = backends.get_threads()
    try:
        backends.set_threads(5)
        assert backends.get_threads() == 5
    finally:
        backends.set_threads(before)
    with pytest.raises(ValueError, match="0 threads"):
        backends.set_threads(0)


def test_a_forked_child_computes():
    """The pool's threads stay with the parent; the child makes its own."""
    program = (
        "import os, numpy as np; from fastunet import UNet, no_grad\n"
        "m = UNet(base_channels=4, depth=1).eval(); x = np.ones((1, 64, 64, 1), np.float32)\n"
        "with no_grad(): a = m(x).numpy()\n"
        "pid = os.fork()\n"
        "with no_grad(): b = m(x).numpy()\n"
        "assert np.array_equal(a, b)\n"
        "if pid: assert os.waitpid(pid, 0)[1] == 0; print('both')\n"
        "else: os._exit(0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "both", done.stderr


def test_a_child_forked_during_an_operation_computes():
    """The engine is free in the child, though another thread of the parent was in the middle of an operation."""
    program = (
        "import os, signal, threading, numpy as np; from fastunet import UNet, no_grad\n"
        "m = UNet(base_channels=8, depth=1).eval(); x = np.ones((1, 124, 124, 1), np.float32)\n"
        "def compute():\n"
        "    with no_grad(): return m(x).numpy()\n"
        "a = compute(); done = False\n"
        "def keep_busy():\n"
        "    while not done: compute()\n"
        "busy = threading.Thread(target=keep_busy); busy.start()\n"
        "for _ in range(10):\n"
        "    pid = os.fork()\n"
        "    if pid == 0: signal.alarm(20); os._exit(not np.array_equal(a, compute()))\n"
        "    if os.waitpid(pid, 0)[1]: break\n"
        "else: print('all')\n"
        "done = True; busy.join()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "all", done.stderr


ROOT = Path(__file__).parents[1]
WIDER_SETS = re.findall(r"set\(FLAGS_(\w+) (.+)\)", (ROOT / "CMakeLists.txt").read_text())


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("g++") is None or shutil.which("nm") is None, reason="g++ and nm are not installed"
)
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64", "amd64"), reason="one instruction set only")
@pytest.mark.parametrize("isa, isa_flags", WIDER_SETS, ids=[name for name, _ in WIDER_SETS])
@pytest.mark.parametrize("source", sorted((ROOT / "csrc" / "cpu").glob("*.cpp")), ids=lambda p: p.stem)
def test_no_wide_instructions_can_leak_into_shared_code(tmp_path, source, isa, isa_flags):
    """A weak symbol of a kernel object could replace the same function of code that every machine runs."""
    if source.stem == "dispatch":
        pytest.skip("dispatch is compiled for every machine")
    flags = [
        "-std=c++17",
        "-O3",
        "-fPIC",
        "-fvisibility=hidden",
        "-fvisibility-inlines-hidden",
        f"-DFASTUNET_ISA={isa}",
        *isa_flags.split(),
    ]
    subprocess.run(["g++", *flags, "-c", str(source), "-o", str(tmp_path / "o")], check=True)
    symbols = subprocess.run(
        ["nm", "-C", tmp_path / "o"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert any(" T " in line or " D " in line or " R " in line for line in symbols)
    assert [line for line in symbols if line[17:18] in "WVu"] == []


def test_memory_where_addresses_are_limited():
    """The range of addresses for activations must not be what leaves none for everything else."""
    code = (
        "import resource, sys, numpy as np; limit = int(sys.argv[1])\n"
        "if limit: resource.setrlimit(resource.RLIMIT_AS, (limit, limit))\n"
        "from fastunet import Predictor, UNet\n"
        "model = UNet(base_channels=4, depth=2, device='cpu').eval()\n"
        "result = Predictor(model, tile=140)(np.random.default_rng(1).random((260, 300)))\n"
        "ballast = np.ones(1 << 27, np.uint8); print(result.sum(dtype=float))"
    )
    found = [
        subprocess.run([sys.executable, "-c", code, str(limit)], capture_output=True, text=True)
        for limit in (0, 4 << 30)
    ]
    assert [done.returncode for done in found] == [0, 0], found[1].stderr
    assert found[0].stdout == found[1].stdout != ""


def test_freed_memory_is_handed_out_again(rng):
    """All of it, whatever was asked for before: what a process may write to grows by the most in use at once."""
    program = (
        "import os, random, re, sys, _fastunet\n"
        "def mib(): return int(re.search(r'VmData:\\s+(\\d+)', open('/proc/self/status').read())[1]) / 1024\n"
        "def block(mib, rows=64): return _fastunet.Array(1, rows, round(mib * 2**14 / rows), 16)\n"
        "random.seed(int(sys.argv[1])); small = [block(0.1)]; before = mib()\n"
        "def check(most): assert mib() - before < most + 6, (mib() - before, most)\n"
        "small += [block(0.1) for _ in range(40)]; check(4); del small\n"
        "for size in (32, 40, 48): block(size); check(size)\n"
        "for number in (2, 5, 16, 3, 48, 1, 7):\n"
        "    blocks = [block(48 / number) for _ in range(number)]; random.shuffle(blocks)\n"
        "    while blocks: blocks.pop(); blocks and random.random() < 0.5 and blocks.append(block(0.3))\n"
        "    check(60)\n"
        "try: block(5 * os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**20, rows=65536)\n"
        "except MemoryError: block(48); check(60); print('all')\n"
    )
    seed = str(int(rng.integers(2**31)))
    done = subprocess.run([sys.executable, "-c", program, seed], capture_output=True, text=True)
    assert done.stdout.strip() == "all", done.stderr


def test_blocks_do_not_overlap(rng):
    backend, held = backends.load("cpu"), []
    for number in range(300):
        if held and rng.random() < 0.45:
            value, array = held.pop(int(rng.integers(len(held))))
            assert (backend.numpy(array) == value).all()
        else:
            shape = (1, int(rng.choice((16, 17, 60, 200))), 64, 16)
            held.append((number, backend.array(np.full(shape, number, np.float32))))
    assert all((backend.numpy(array) == value).all() for value, array in held)

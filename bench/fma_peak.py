"""The most float32 operations a second that this machine does on so many threads: fused multiply-adds in registers."""

import ctypes
import functools
import shutil
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# Ten independent sums hide the latency of two multipliers; all of it stays in registers.
SOURCE = """
#if defined(__AVX512F__)
enum { kLanes = 16 };
#elif defined(__AVX__)
enum { kLanes = 8 };
#else
enum { kLanes = 4 };
#endif
typedef float vec __attribute__((vector_size(kLanes * sizeof(float))));
enum { kSums = 10 };

double flops_of(long rounds) { return 2.0 * kLanes * kSums * rounds; }

#define UNROLL _Pragma("GCC unroll 16")

float multiply_add(long rounds) {
  vec sums[kSums], factor, term;
  for (int i = 0; i < kLanes; ++i) factor[i] = 0.5f + 0.01f * (rounds % 7), term[i] = 0.1f * i;
  UNROLL for (int i = 0; i < kSums; ++i) sums[i] = (float)i * term;
  for (long round = 0; round < rounds; ++round) {
    UNROLL for (int i = 0; i < kSums; ++i) sums[i] = sums[i] * factor + term;
  }
  vec total = {};
  UNROLL for (int i = 0; i < kSums; ++i) total += sums[i];
  return total[0] + total[1];
}
"""
ROUNDS = 2_000_000  # some 4 ms


@functools.cache
def flops_per_second(threads: int) -> float | None:
    """The best of ten tries; None where no compiler takes GNU C."""
    library = _library()
    if library is None:
        return None
    with ThreadPoolExecutor(threads) as pool:

        def seconds() -> float:
            began = time.perf_counter()
            list(pool.map(library.multiply_add, [ROUNDS] * threads))
            return time.perf_counter() - began

        return threads * library.flops_of(ROUNDS) / min(seconds() for _ in range(10))


def _library() -> ctypes.CDLL | None:
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "fma_peak.c"), Path(folder, "fma_peak.so")
        source.write_text(SOURCE)
        flags = ["-x", "c", "-O3", "-march=native", "-ffp-contract=fast", "-fPIC", "-shared"]
        if subprocess.run(
            [compiler, *flags, str(source), "-o", str(library)], capture_output=True
        ).returncode:
            return None
        loaded = ctypes.CDLL(str(library))
    loaded.flops_of.restype = ctypes.c_double
    loaded.flops_of.argtypes = loaded.multiply_add.argtypes = [ctypes.c_long]
    loaded.multiply_add.restype = ctypes.c_float
    return loaded

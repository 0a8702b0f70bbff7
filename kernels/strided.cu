// Between arrays of other libraries on the same device and ours: numbers of any type, with any strides.
//
//   copy   target[i][j][k][l] = source[i][j][k][l] for all indices below `extents`. Strides are in elements, of any
//   sign
//          and order: an NCHW image into a channels-last tensor, a weight from PyTorch's layout into the kernels'
//          packing and a gradient back. Types are those of fastunet/backends/cuda/strided.py, in its order; a number
//          travels as double, so that only the target's type rounds it. Targets are float, bfloat16 or int.
//
// Built with INDEX_BITS = 32 for fewer than 2**32 elements, else 64: four divisions of 64 bits an element would take
// most of its time. Grid: ceil(elements / 256) blocks of 256 threads, the last index fastest. Cost: each element read
// and written once, one side without coalescing where the orders differ. Tested against NumPy
// (tests/emulator/test_exchange.py).
#include "number.cuh"

#if INDEX_BITS == 32
using Index = unsigned;
#else
using Index = unsigned long long;
#endif

struct CopyArguments {
  const void* source;
  void* target;
  long long source_strides[4];
  long long target_strides[4];
  int extents[4];
  int source_type, target_type;
};

KERNEL(copy, CopyArguments, 256, 8) {
  Index rest = static_cast<Index>(blockIdx.x) * 256 + threadIdx.x;
  long long source = 0, target = 0;
  UNROLL
  for (int axis = 3; axis >= 0; --axis) {
    const Index extent = arguments.extents[axis], index = rest % extent;
    rest /= extent;
    source += static_cast<long long>(index) * arguments.source_strides[axis];
    target += static_cast<long long>(index) * arguments.target_strides[axis];
  }
  if (rest > 0) return;
  const double number = number_at(arguments.source, source, arguments.source_type);
  if (arguments.target_type == 0) {
    static_cast<float*>(arguments.target)[target] = static_cast<float>(number);
  } else if (arguments.target_type == 1) {
    store(static_cast<bfloat16*>(arguments.target) + target, static_cast<float>(number));
  } else {
    static_cast<int*>(arguments.target)[target] = static_cast<int>(number);
  }
}

// The end of every weight gradient: the sums that the splits of the pixels left in a workspace are added up, always in
// the same order, and then to the gradient buffer.
//
//   weight_gradient[i] += sum over s of workspace[s][i]             i < weights
//   bias_gradient[i]   += sum over s of workspace[s][weights + i]   i < biases
//
// float32, whatever the activations are; `weights` and `biases` are multiples of 4, buffers are aligned to 16 bytes.
// Grid: one block for 64 quadruples, ceil((weights + biases) / 256) blocks of 256 threads; 4096 bytes of shared memory.
// Four threads share the splits of a quadruple, so that many splits of a small weight still fill the chip.
//
// Cost: 4 (splits + 2) bytes a parameter, no FLOPs to speak of. Tested against NumPy in float64
// (tests/emulator/test_conv3x3_sm80.py).
#include "ptx.cuh"

struct ReduceArguments {
  float* weight_gradient;
  float* bias_gradient;
  const float* workspace;
  long long weights;
  int biases;
  int splits;
};

__device__ __forceinline__ void add(float4& sum, const float4& value) {
  sum.x += value.x, sum.y += value.y, sum.z += value.z, sum.w += value.w;
}

KERNEL(reduce, ReduceArguments, 256, 4) {
  SHARED_MEMORY(shared);
  constexpr int columns = 64, shares = 4;
  float4* const partial = reinterpret_cast<float4*>(shared);
  const int column = threadIdx.x % columns, share = threadIdx.x / columns;
  const long long quadruple = static_cast<long long>(blockIdx.x) * columns + column;
  const long long weights = arguments.weights / 4, quadruples = weights + arguments.biases / 4;
  float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  if (quadruple < quadruples) {
    const float4* const workspace = reinterpret_cast<const float4*>(arguments.workspace) + quadruple;
    for (int split = share; split < arguments.splits; split += shares) add(sum, workspace[split * quadruples]);
  }
  partial[threadIdx.x] = sum;
  __syncthreads();
  if (share != 0 || quadruple >= quadruples) return;
  float4* const gradient = quadruple < weights
                               ? reinterpret_cast<float4*>(arguments.weight_gradient) + quadruple
                               : reinterpret_cast<float4*>(arguments.bias_gradient) + (quadruple - weights);
  float4 total = *gradient;
  UNROLL
  for (int i = 0; i < shares; ++i) add(total, partial[i * columns + column]);
  *gradient = total;
}

#include "tensor.cuh"
struct Scale {
  const float* x;
  float* y;
  int count;
  float factor;
};
KERNEL(scale, Scale, 256, 1) {
  SHARED_MEMORY(buffer);
  float* row = reinterpret_cast<float*>(buffer);
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  row[threadIdx.x] = i < arguments.count ? arguments.x[i] : 0.0f;
  __syncthreads();
  if (i < arguments.count) arguments.y[i] = row[threadIdx.x ^ 1] * arguments.factor;
}

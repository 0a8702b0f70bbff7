// What a block needs of a weighted cross-entropy, sum of w * -log p(label) / sum of w: the sum of all weights before,
// its share of the loss after. Sums over pixels are in double precision and in a fixed order: the same at every run.
#pragma once

#include "tensor.cuh"

constexpr int kWeightParts = 128;

struct LossPart {
  double loss;
  long long invalid;  // pixels that have a weight but the label of no class
};

// Sum over a block of `threads` threads, a power of two; shared: that many doubles.
template <int threads>
__device__ __forceinline__ double sum_of_block(double value, double* shared) {
  const int thread = threadIdx.x;
  shared[thread] = value;
  for (int half = threads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (thread < half) shared[thread] += shared[thread + half];
  }
  __syncthreads();
  const double sum = shared[0];
  __syncthreads();
  return sum;
}

// The sum of the kWeightParts that weight_sums left.
template <int threads>
__device__ __forceinline__ double sum_of_weights(const double* parts, double* shared) {
  double sum = 0.0;
  for (int i = threadIdx.x; i < kWeightParts; i += threads) sum += parts[i];
  return sum_of_block<threads>(sum, shared);
}

template <int threads>
__device__ __forceinline__ void write_loss_part(LossPart* parts, double loss, int invalid, double* shared) {
  const double total = sum_of_block<threads>(loss, shared);
  const double count = sum_of_block<threads>(invalid, shared);
  if (threadIdx.x == 0) parts[blockIdx.x] = {total, static_cast<long long>(count)};
}

// The 1x1 convolution's way of sharing work: a pixel's PITCH stored channels lie on kLanes neighbouring lanes, eight on
// each (and eight more kLanes * 8 further, kChunks times), so that a warp reads whole pixels in 16-byte pieces, a sum
// over channels is a few shuffles, and a lane keeps the weight gradient of its own channels in registers.
//
// Built with PITCH, a multiple of 16. Weights, their gradients and biases are float32, [outputs padded to 16][PITCH].
// Blocks of kThreads threads go over the pixels in steps of the whole grid, two pixels a lane at a time.
#pragma once

#include "tensor.cuh"

constexpr int kThreads = 128;
constexpr int kGroups = PITCH / 8;
constexpr int kLanes = kGroups <= 2 ? 2 : kGroups <= 4 ? 4 : kGroups <= 8 ? 8 : kGroups <= 16 ? 16 : 32;
constexpr int kChunks = (kGroups + kLanes - 1) / kLanes;
constexpr int kPixels = 2;
constexpr int kPixelsOfABlock = kThreads / kLanes * kPixels;
// Outputs whose weight gradient a lane holds: 64 registers.
constexpr int kMostOutputs = 8 / kChunks;
static_assert(PITCH % 16 == 0 && PITCH <= 1024, "more channels do not fit into a warp's registers");

struct Channels {
  float values[kChunks][8];
};

// First of the eight channels of a chunk that are this lane's; from PITCH on it has none.
__device__ __forceinline__ int first_channel(int chunk) {
  return (chunk * kLanes + static_cast<int>(threadIdx.x) % kLanes) * 8;
}

// This thread's pixel, of those a block treats at a time.
__device__ __forceinline__ long long pixel_of(long long first, int which) {
  return first + which * (kThreads / kLanes) + threadIdx.x / kLanes;
}

// Zeros for a pixel that is none.
__device__ __forceinline__ Channels load_pixel(const element* data, long long pixel, bool valid) {
  Channels x = {};
  UNROLL
  for (int chunk = 0; chunk < kChunks; ++chunk) {
    const int channel = first_channel(chunk);
    if (valid && channel < PITCH) load8(x.values[chunk], data + pixel * PITCH + channel);
  }
  return x;
}

// The gradient of x, where x is the output of a ReLU masked by it.
__device__ __forceinline__ void store_gradient(element* data, long long pixel, Channels& gradient, const Channels& x,
                                               bool rectified) {
  UNROLL
  for (int chunk = 0; chunk < kChunks; ++chunk) {
    const int channel = first_channel(chunk);
    UNROLL
    for (int i = 0; i < 8; ++i) {
      if (rectified && !(x.values[chunk][i] > 0.0f)) gradient.values[chunk][i] = 0.0f;
    }
    if (channel < PITCH) store8(data + pixel * PITCH + channel, gradient.values[chunk]);
  }
}

// One row of the weight: this lane's inputs of one output.
__device__ __forceinline__ Channels load_weight(const float* row) {
  Channels weight = {};
  UNROLL
  for (int chunk = 0; chunk < kChunks; ++chunk) {
    if (first_channel(chunk) < PITCH) load8(weight.values[chunk], row + first_channel(chunk));
  }
  return weight;
}

// Sum over all channels, the same on each of the pixel's lanes.
__device__ __forceinline__ float product(const Channels& x, const Channels& weight) {
  float sum = 0.0f;
  UNROLL
  for (int chunk = 0; chunk < kChunks; ++chunk) {
    UNROLL
    for (int i = 0; i < 8; ++i) sum += x.values[chunk][i] * weight.values[chunk][i];
  }
  UNROLL
  for (int distance = kLanes / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, distance);
  return sum;
}

__device__ __forceinline__ void add_multiple(Channels& sum, float factor, const Channels& x) {
  UNROLL
  for (int chunk = 0; chunk < kChunks; ++chunk) {
    UNROLL
    for (int i = 0; i < 8; ++i) sum.values[chunk][i] += factor * x.values[chunk][i];
  }
}

// A block's share of the gradients of `outputs` neighbouring outputs: each lane sums over its pixels, write() over the
// block, always in the same order.
template <int outputs>
struct WeightGradient {
  Channels weight[outputs];
  float bias[outputs];

  __device__ __forceinline__ WeightGradient() {
    UNROLL
    for (int k = 0; k < outputs; ++k) weight[k] = Channels{}, bias[k] = 0.0f;
  }

  __device__ __forceinline__ void add(int output, float gradient, const Channels& x) {
    add_multiple(weight[output], gradient, x);
    bias[output] += gradient;
  }

  // Into rows `first` to `end` - 1 of this block's part of the workspace, [rows][PITCH] weights and then `rows`
  // biases; zeros into those beyond `outputs`. shared: outputs * (PITCH + 1) floats, free to write.
  __device__ __forceinline__ void write(float* workspace, int first, int end, int rows, float* shared) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    UNROLL
    for (int k = 0; k < outputs; ++k) {
      UNROLL
      for (int distance = kLanes; distance < 32; distance *= 2) {
        UNROLL
        for (int chunk = 0; chunk < kChunks; ++chunk) {
          UNROLL
          for (int i = 0; i < 8; ++i) {
            weight[k].values[chunk][i] += __shfl_xor_sync(0xFFFFFFFFu, weight[k].values[chunk][i], distance);
          }
        }
        bias[k] += __shfl_xor_sync(0xFFFFFFFFu, bias[k], distance);
      }
    }
    for (int turn = 0; turn < kThreads / 32; ++turn) {
      __syncthreads();
      if (warp != turn || lane >= kLanes) continue;
      UNROLL
      for (int k = 0; k < outputs; ++k) {
        UNROLL
        for (int chunk = 0; chunk < kChunks; ++chunk) {
          UNROLL
          for (int i = 0; i < 8; ++i) {
            const int channel = first_channel(chunk) + i;
            float* const sum = shared + k * PITCH + channel;
            if (channel < PITCH) *sum = (turn == 0 ? 0.0f : *sum) + weight[k].values[chunk][i];
          }
        }
        float* const sum = shared + outputs * PITCH + k;
        if (lane == 0) *sum = (turn == 0 ? 0.0f : *sum) + bias[k];
      }
    }
    __syncthreads();
    float* const part = workspace + static_cast<long long>(blockIdx.x) * rows * (PITCH + 1);
    for (int i = threadIdx.x; i < (end - first) * PITCH; i += kThreads) {
      part[first * PITCH + i] = i < outputs * PITCH ? shared[i] : 0.0f;
    }
    for (int k = threadIdx.x; k < end - first; k += kThreads) {
      part[rows * PITCH + first + k] = k < outputs ? shared[outputs * PITCH + k] : 0.0f;
    }
  }
};

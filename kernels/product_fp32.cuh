// The product of the float32 kernels: in registers of 128 threads, 128 pixels (8 rows of 16) by TILE_OUTPUTS (32 or 64)
// outputs, 16 channels a step from shared memory, by multiply-adds on float32 (no TF32).
//
// A thread holds 2 x 2 + 2 x 2 pixels (whole windows of a 2x2 pool) by 4 or 8 outputs. It reads four channels of a
// pixel at once, so pixels lie in shared memory as in the tensor, and four channels of an output, or four outputs of a
// channel: 16 reads for 256 multiply-adds. Rows 20 floats apart and the order of outputs below keep those reads free of
// bank conflicts.
#pragma once

#include "element.cuh"

constexpr int kThreads = 128, kPixels = 128;
constexpr int kChunk = 16;  // of a step
constexpr int kPitch = 20;  // floats from one row of 16 channels to the next
constexpr int kThreadPixels = 8, kThreadOutputs = TILE_OUTPUTS / 8;

// `values` where x, the output of a ReLU, is not zero, and zero where it is.
__device__ __forceinline__ float4 where_nonzero(const float* x, float4 values) {
  const float4 outputs = *reinterpret_cast<const float4*>(x);
  return make_float4(outputs.x == 0.0f ? 0.0f : values.x, outputs.y == 0.0f ? 0.0f : values.y,
                     outputs.z == 0.0f ? 0.0f : values.z, outputs.w == 0.0f ? 0.0f : values.w);
}

// Where this thread's pixels and outputs lie in the tile.
__device__ __forceinline__ int pixel_row(int p) { return threadIdx.x / 32 * 2 + p / 4; }
__device__ __forceinline__ int pixel_column(int p) { return threadIdx.x % 32 / 8 * 2 + p % 4 / 2 * 8 + p % 2; }
__device__ __forceinline__ int output(int j) { return j / 4 * 32 + threadIdx.x % 8 * 4 + j % 4; }

// The row of shared memory that an output's channels lie in, so that eight threads read eight rows in succession.
__device__ __forceinline__ int output_row(int output) { return output / 32 * 32 + output % 4 * 8 + output % 32 / 4; }

// Four channels of this thread's pixels; pixel (row, column) of the tile lies in row (row * width + column) of
// `pixels`.
template <int width>
__device__ __forceinline__ void load_pixels(float (&values)[kThreadPixels][4], const float* pixels, int channel) {
  UNROLL
  for (int p = 0; p < kThreadPixels; ++p) {
    const float4 four =
        *reinterpret_cast<const float4*>(pixels + (pixel_row(p) * width + pixel_column(p)) * kPitch + channel);
    values[p][0] = four.x, values[p][1] = four.y, values[p][2] = four.z, values[p][3] = four.w;
  }
}

// sums += pixels x weights over 16 channels; weights: [output_row(output)][channel].
template <int width>
__device__ __forceinline__ void multiply_by_rows(float (&sums)[kThreadPixels][kThreadOutputs], const float* pixels,
                                                 const float* weights) {
  for (int channel = 0; channel < kChunk; channel += 4) {
    float values[kThreadPixels][4];
    load_pixels<width>(values, pixels, channel);
    UNROLL
    for (int j = 0; j < kThreadOutputs; ++j) {
      const float4 weight = *reinterpret_cast<const float4*>(weights + output_row(output(j)) * kPitch + channel);
      UNROLL
      for (int p = 0; p < kThreadPixels; ++p) {
        sums[p][j] += values[p][0] * weight.x;
        sums[p][j] += values[p][1] * weight.y;
        sums[p][j] += values[p][2] * weight.z;
        sums[p][j] += values[p][3] * weight.w;
      }
    }
  }
}

// The same with weights transposed: [channel][output], TILE_OUTPUTS floats a row.
template <int width>
__device__ __forceinline__ void multiply_by_columns(float (&sums)[kThreadPixels][kThreadOutputs], const float* pixels,
                                                    const float* weights) {
  for (int channel = 0; channel < kChunk; channel += 4) {
    float values[kThreadPixels][4];
    load_pixels<width>(values, pixels, channel);
    UNROLL
    for (int k = 0; k < 4; ++k) {
      UNROLL
      for (int j = 0; j < kThreadOutputs; j += 4) {
        const float4 weight = *reinterpret_cast<const float4*>(weights + (channel + k) * TILE_OUTPUTS + output(j));
        UNROLL
        for (int p = 0; p < kThreadPixels; ++p) {
          sums[p][j] += values[p][k] * weight.x;
          sums[p][j + 1] += values[p][k] * weight.y;
          sums[p][j + 2] += values[p][k] * weight.z;
          sums[p][j + 3] += values[p][k] * weight.w;
        }
      }
    }
  }
}

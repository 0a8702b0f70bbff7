// The two inner loops everything heavy runs on, both a register tile of accumulators:
//   multiply       sums[pixel][output] += x[pixel][channel] * w[channel][output]    (forward, data gradient)
//   outer_product  sums[channel][output] += x[pixel][channel] * g[pixel][output]    (weight gradient)
// Every loop over the accumulators is unrolled in full, or the compiler would keep them in memory.
#pragma once

#include <utility>

#include "simd.h"

namespace fastunet {
namespace {

// Register tiles: AVX-512 has 32 registers: 14 pixels x 2 vectors + 2 weights + 1 broadcast; AVX2 16: 6 x 2;
// NEON 32 of 4 lanes: 6 x 4; baseline 16 of 4 lanes: 3 x 4. A tile covers kTileOutputs output channels.
constexpr int kTileVectors = kLanes == 16 ? 2 : kLanes == 8 ? 2 : 4;
constexpr int kTileOutputs = kTileVectors * kLanes;
constexpr int kTilePixels = kLanes == 16 ? 14 : kLanes == 8 ? 6 : kManyRegisters ? 6 : 3;
constexpr int kOuterChannels = kLanes == 16 ? 8 : kLanes == 8 ? 4 : kManyRegisters ? 4 : 2;

// Layers of 16 outputs, half a tile of AVX-512, use one vector and twice the pixels.
constexpr int kNarrowVectors = kVectors < kTileVectors ? kVectors : kTileVectors;
constexpr int kNarrowPixels = kTilePixels * kTileVectors / kNarrowVectors;

// Function pointers by the number of pixels in a register tile, 1 to MOST: KERNEL::run<pixels>.
template <class Kernel, int MOST>
struct ByPixels {
  decltype(&Kernel::template run<1>) entries[MOST];

  template <int... INDEX>
  constexpr explicit ByPixels(std::integer_sequence<int, INDEX...>) : entries{&Kernel::template run<INDEX + 1>...} {}
  constexpr ByPixels() : ByPixels(std::make_integer_sequence<int, MOST>()) {}
  auto operator[](int pixels) const { return entries[pixels - 1]; }
};

template <int PIXELS, int VECTORS>
INLINE void multiply(vec (&sums)[PIXELS][VECTORS], const float* x, ptrdiff_t pixel_stride, const float* weight,
                     ptrdiff_t channel_stride, int channels) {
#pragma GCC unroll 4
  for (int channel = 0; channel < channels; ++channel, weight += channel_stride) {
    vec w[VECTORS];
    UNROLL
    for (int v = 0; v < VECTORS; ++v) w[v] = load(weight + v * kLanes);
    UNROLL
    for (int pixel = 0; pixel < PIXELS; ++pixel) {
      const vec value = broadcast(x[pixel * pixel_stride + channel]);
      UNROLL
      for (int v = 0; v < VECTORS; ++v) sums[pixel][v] += value * w[v];
    }
  }
}

template <int CHANNELS, int VECTORS>
INLINE void outer_product(vec (&sums)[CHANNELS][VECTORS], const float* x, ptrdiff_t x_stride, const float* gradient,
                          ptrdiff_t gradient_stride, ptrdiff_t block_stride, int pixels) {
#pragma GCC unroll 4
  for (int pixel = 0; pixel < pixels; ++pixel, x += x_stride, gradient += gradient_stride) {
    vec g[VECTORS];
    UNROLL
    for (int v = 0; v < VECTORS; ++v) g[v] = load(gradient + v * kLanes / kBlock * block_stride + v * kLanes % kBlock);
    UNROLL
    for (int channel = 0; channel < CHANNELS; ++channel) {
      const vec value = broadcast(x[channel]);
      UNROLL
      for (int v = 0; v < VECTORS; ++v) sums[channel][v] += value * g[v];
    }
  }
}

}  // namespace
}  // namespace fastunet

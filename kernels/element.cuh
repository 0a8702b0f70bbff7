// What an activation is made of: bfloat16 or float32 (ELEMENT_BITS = 16 or 32, set when a kernel is built), and how
// eight channels move at once. Sums are float32 in either case.
#pragma once

#include "ptx.cuh"

struct bfloat16 {
  unsigned short bits;
};

#if ELEMENT_BITS == 16
using element = bfloat16;
#else
using element = float;
#endif

__device__ __forceinline__ float low_float(unsigned packed) { return __uint_as_float(packed << 16); }
__device__ __forceinline__ float high_float(unsigned packed) { return __uint_as_float(packed & 0xFFFF0000u); }

__device__ __forceinline__ float to_float(bfloat16 value) {
  return __uint_as_float(static_cast<unsigned>(value.bits) << 16);
}
__device__ __forceinline__ float to_float(float value) { return value; }

__device__ __forceinline__ void store(bfloat16* place, float value) {
  place->bits = static_cast<unsigned short>(pack_bfloat16(value, 0.0f));
}
__device__ __forceinline__ void store(float* place, float value) { *place = value; }

// Eight neighbouring channels, aligned to their size (16 bytes of bfloat16, 32 of float32).
__device__ __forceinline__ void load8(float (&values)[8], const bfloat16* place) {
  const uint4 packed = *reinterpret_cast<const uint4*>(place);
  const unsigned words[4] = {packed.x, packed.y, packed.z, packed.w};
  UNROLL
  for (int i = 0; i < 4; ++i) {
    values[2 * i] = low_float(words[i]);
    values[2 * i + 1] = high_float(words[i]);
  }
}
__device__ __forceinline__ void load8(float (&values)[8], const float* place) {
  UNROLL
  for (int i = 0; i < 2; ++i) {
    const float4 four = reinterpret_cast<const float4*>(place)[i];
    values[4 * i] = four.x, values[4 * i + 1] = four.y, values[4 * i + 2] = four.z, values[4 * i + 3] = four.w;
  }
}
__device__ __forceinline__ void store8(bfloat16* place, const float (&values)[8]) {
  *reinterpret_cast<uint4*>(place) =
      make_uint4(pack_bfloat16(values[0], values[1]), pack_bfloat16(values[2], values[3]),
                 pack_bfloat16(values[4], values[5]), pack_bfloat16(values[6], values[7]));
}
__device__ __forceinline__ void store8(float* place, const float (&values)[8]) {
  UNROLL
  for (int i = 0; i < 2; ++i) {
    reinterpret_cast<float4*>(place)[i] =
        make_float4(values[4 * i], values[4 * i + 1], values[4 * i + 2], values[4 * i + 3]);
  }
}

// The native vector of the instruction set a file is compiled for, by GCC/Clang vector extensions: + - * /
// and comparisons work lane by lane, a * b + c contracts to a fused multiply-add, scalar * vector broadcasts.
// Everything here and in the kernels has internal linkage: no AVX-512 instance can be linked in for another
// set.
#pragma once

#include "../thread_pool.h"
#include "kernels.h"

#define UNROLL _Pragma("GCC unroll 64")
#define INLINE inline __attribute__((always_inline))

namespace fastunet {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr bool kManyRegisters = true;
#elif defined(__AVX__)
constexpr int kLanes = 8;
constexpr bool kManyRegisters = false;
#elif defined(__aarch64__)
constexpr int kLanes = 4;
constexpr bool kManyRegisters = true;
#else
constexpr int kLanes = 4;
constexpr bool kManyRegisters = false;
#endif
constexpr int kVectors = kBlock / kLanes;  // vectors in a block of 16 channels

typedef float vec __attribute__((vector_size(kLanes * sizeof(float)), may_alias));
typedef float unaligned_vec __attribute__((vector_size(kLanes * sizeof(float)), may_alias, aligned(4)));

typedef int32_t int_vec __attribute__((vector_size(kLanes * sizeof(int32_t)), may_alias));
typedef uint8_t byte_vec __attribute__((vector_size(kLanes), may_alias, aligned(1)));

INLINE vec load(const float* p) { return *reinterpret_cast<const unaligned_vec*>(p); }
INLINE void store(float* p, vec v) { *reinterpret_cast<unaligned_vec*>(p) = v; }
INLINE vec broadcast(float x) { return x - vec{}; }
// A value that is no number stays so.
INLINE vec maximum(vec value, vec bound) { return bound > value ? bound : value; }

// Lanes of two vectors, counted through both.
INLINE vec shuffle(vec first, vec second, int_vec lanes) {
#if defined(__clang__)  // which lacks the builtin; lanes that it knows it makes an instruction of as well
  vec result{};
  UNROLL
  for (int lane = 0; lane < kLanes; ++lane)
    result[lane] = lanes[lane] < kLanes ? first[lanes[lane]] : second[lanes[lane] - kLanes];
  return result;
#else
  return __builtin_shuffle(first, second, lanes);
#endif
}

// The largest of four values and which it was: the first on ties, a value that is no number over any other, as PyTorch.
INLINE vec largest_of_four(vec best, vec second, vec third, vec fourth, int_vec& which) {
  const vec rivals[] = {second, third, fourth};
  which = int_vec{};
  UNROLL
  for (int rival = 0; rival < 3; ++rival) {
    const int_vec wins = (rivals[rival] > best) | (rivals[rival] != rivals[rival]);
    which = wins ? int_vec{} + (rival + 1) : which;
    best = wins ? rivals[rival] : best;
  }
  return best;
}

INLINE int smaller(int a, int b) { return a < b ? a : b; }
INLINE int larger(int a, int b) { return a > b ? a : b; }
INLINE int ceil_div(int a, int b) { return (a + b - 1) / b; }

// `count` things are taken in `runs` runs of equal length, give or take one: where a run begins.
INLINE int run_begin(int count, int run, int runs) { return static_cast<int>(int64_t{count} * run / runs); }

template <class Body>
static void parallel(int count, const Body& body) {
  parallel_for(
      count, [](void* context, int index, int thread) { (*static_cast<const Body*>(context))(index, thread); },
      const_cast<Body*>(&body));
}

// The view and block-within-it of block `block` of a concatenation.
INLINE const View& part_of(const Channels& channels, int& block) {
  const int first = channels.part[0].blocks();
  if (block < first) return channels.part[0];
  block -= first;
  return channels.part[1];
}

}  // namespace
}  // namespace fastunet

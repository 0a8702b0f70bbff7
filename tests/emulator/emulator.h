// CUDA C++ for an ordinary compiler: the language's words, its built-in functions and the functions of kernels/ptx.cuh,
// so that a kernel's own source runs on a CPU. Threads, barriers and memory are those of machine.h; here is only what
// each instruction computes.
#pragma once

#include <cfloat>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>

#include "machine.h"

// ---- The language ---------------------------------------------------------------------------------------------------

#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __align__(bytes) __attribute__((aligned(bytes)))

#define UNROLL
#define ROLLED
#define SHARED_MEMORY(name) unsigned char* const name = emulator::shared_memory()

// The kernel is an ordinary function of its arguments, run once for each thread; the host calls emulate_<name>.
#define KERNEL(name, Arguments, threads, blocks_per_multiprocessor)                                                \
  static void name(const Arguments& arguments);                                                                    \
  extern "C" __attribute__((visibility("default"))) bool emulate_##name(                                           \
      const emulator::Launch* launch, const void* arguments, emulator::Failure* failure) {                         \
    const auto thread = [](const void* pointer) { name(*static_cast<const Arguments*>(pointer)); };                \
    static_assert((threads) <= 1024 && (blocks_per_multiprocessor) >= 1, "no multiprocessor can hold this block"); \
    return emulator::launch({#name, thread, static_cast<int>(sizeof(Arguments)), threads}, *launch, arguments,     \
                            failure);                                                                              \
  }                                                                                                                \
  static void name(const Arguments& arguments)

// Where a call stands in the kernel's source: the last, never written, parameter of what waits or can fail.
#define CALLER emulator::at(__builtin_FILE(), __builtin_LINE())

struct uint3 {
  unsigned x, y, z;
};
using dim3 = uint3;
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

#define VECTOR_TYPES(scalar, name, bytes)                              \
  struct alignas(2 * bytes) name##2 { scalar x, y; };                  \
  struct alignas(4 * bytes) name##4 { scalar x, y, z, w; };            \
  inline name##2 make_##name##2(scalar x, scalar y) { return {x, y}; } \
  inline name##4 make_##name##4(scalar x, scalar y, scalar z, scalar w) { return {x, y, z, w}; }
VECTOR_TYPES(int, int, 4)
VECTOR_TYPES(unsigned, uint, 4)
VECTOR_TYPES(float, float, 4)
VECTOR_TYPES(short, short, 2)
VECTOR_TYPES(unsigned short, ushort, 2)
VECTOR_TYPES(unsigned char, uchar, 1)
#undef VECTOR_TYPES

// ---- Built-in functions ---------------------------------------------------------------------------------------------

namespace emulator {
template <typename To, typename From>
inline To same_bits(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  std::memcpy(&result, &value, sizeof result);
  return result;
}
}  // namespace emulator

inline float __uint_as_float(unsigned bits) { return emulator::same_bits<float>(bits); }
inline float __int_as_float(int bits) { return emulator::same_bits<float>(bits); }
inline unsigned __float_as_uint(float value) { return emulator::same_bits<unsigned>(value); }
inline int __float_as_int(float value) { return emulator::same_bits<int>(value); }

inline int __float2int_rn(float value) { return static_cast<int>(rintf(value)); }
inline int __float2int_rd(float value) { return static_cast<int>(floorf(value)); }
inline int __float2int_ru(float value) { return static_cast<int>(ceilf(value)); }
inline int __float2int_rz(float value) { return static_cast<int>(value); }
inline unsigned __float2uint_rn(float value) { return static_cast<unsigned>(rintf(value)); }
inline float __int2float_rn(int value) { return static_cast<float>(value); }
inline float __uint2float_rn(unsigned value) { return static_cast<float>(value); }

inline int min(int a, int b) { return b < a ? b : a; }
inline int max(int a, int b) { return a < b ? b : a; }
inline unsigned min(unsigned a, unsigned b) { return b < a ? b : a; }
inline unsigned max(unsigned a, unsigned b) { return a < b ? b : a; }
inline long long min(long long a, long long b) { return b < a ? b : a; }
inline long long max(long long a, long long b) { return a < b ? b : a; }
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }

inline int __mulhi(int a, int b) { return static_cast<int>(static_cast<long long>(a) * b >> 32); }
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<unsigned long long>(a) * b >> 32);
}
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  __extension__ using wide = unsigned __int128;
  return static_cast<unsigned long long>(static_cast<wide>(a) * b >> 64);
}
inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __clz(int value) { return value == 0 ? 32 : __builtin_clz(static_cast<unsigned>(value)); }
inline int __ffs(int value) { return __builtin_ffs(value); }

inline float rsqrtf(float value) { return 1.0f / sqrtf(value); }
inline float __expf(float value) { return expf(value); }
inline float __logf(float value) { return logf(value); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float value) { return 1.0f / value; }
inline float __fsqrt_rn(float value) { return sqrtf(value); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __saturatef(float value) { return fminf(fmaxf(value, 0.0f), 1.0f); }

template <typename T>
inline T __ldg(const T* place) {
  return *place;
}
template <typename T>
inline T __ldcs(const T* place) {
  return *place;
}
template <typename T>
inline void __stcs(T* place, T value) {
  *place = value;
}

// Of integers only: their sums do not depend on the order, those of floats do. Atomics do not race, whence the
// attribute.
#define ATOMIC          \
  template <typename T> \
  __attribute__((noinline, no_sanitize("thread")))
ATOMIC T atomicAdd(T* place, T value) {
  static_assert(T(1) / T(2) == T(0), "a sum of floats by atomics changes from run to run");
  const T before = *place;
  *place += value;
  return before;
}
ATOMIC T atomicMax(T* place, T value) {
  const T before = *place;
  *place = before < value ? value : before;
  return before;
}
#undef ATOMIC
inline void __threadfence() {}

// ---- Barriers, shuffles and votes -----------------------------------------------------------------------------------

inline void __syncthreads(emulator::Site site = CALLER) { emulator::barrier("__syncthreads", true, site); }
inline int __syncthreads_count(int predicate, emulator::Site site = CALLER) {
  return emulator::barrier("__syncthreads_count", predicate != 0, site);
}
inline int __syncthreads_or(int predicate, emulator::Site site = CALLER) {
  return emulator::barrier("__syncthreads_or", predicate != 0, site) != 0;
}
inline int __syncthreads_and(int predicate, emulator::Site site = CALLER) {
  return emulator::barrier("__syncthreads_and", predicate == 0, site) == 0;
}

namespace emulator {

inline int this_lane() { return static_cast<int>(threadIdx.x % 32u); }

template <typename T>
inline T shuffled(const char* name, unsigned mask, T value, int source, Site site) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  unsigned long long bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = shuffle(name, mask, bits, source, site);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace emulator

inline void __syncwarp(unsigned mask = 0xFFFFFFFFu, emulator::Site site = CALLER) {
  emulator::synchronize_warp(mask, site);
}

// A source beyond the `width` lanes around this one means this one, as on the device.
template <typename T>
inline T __shfl_sync(unsigned mask, T value, int source, int width = 32, emulator::Site site = CALLER) {
  const int first = emulator::this_lane() & -width;
  return emulator::shuffled("__shfl_sync", mask, value, first + (source & (width - 1)), site);
}
template <typename T>
inline T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, emulator::Site site = CALLER) {
  const int lane = emulator::this_lane(), last = lane | (width - 1), source = lane ^ bits;
  return emulator::shuffled("__shfl_xor_sync", mask, value, source <= last ? source : lane, site);
}
template <typename T>
inline T __shfl_down_sync(unsigned mask, T value, int delta, int width = 32, emulator::Site site = CALLER) {
  const int lane = emulator::this_lane(), last = lane | (width - 1), source = lane + delta;
  return emulator::shuffled("__shfl_down_sync", mask, value, source <= last ? source : lane, site);
}
template <typename T>
inline T __shfl_up_sync(unsigned mask, T value, int delta, int width = 32, emulator::Site site = CALLER) {
  const int lane = emulator::this_lane(), first = lane & -width, source = lane - delta;
  return emulator::shuffled("__shfl_up_sync", mask, value, source >= first ? source : lane, site);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, emulator::Site site = CALLER) {
  return emulator::vote("__ballot_sync", mask, predicate != 0, site);
}
inline int __any_sync(unsigned mask, int predicate, emulator::Site site = CALLER) {
  return emulator::vote("__any_sync", mask, predicate != 0, site) != 0;
}
inline int __all_sync(unsigned mask, int predicate, emulator::Site site = CALLER) {
  return emulator::vote("__all_sync", mask, predicate == 0, site) == 0;
}

// ---- kernels/ptx.cuh ------------------------------------------------------------------------------------------------

inline unsigned shared_address(const void* pointer, emulator::Site site = CALLER) {
  return emulator::shared_address(pointer, site);
}

inline void cp_async_16(unsigned shared, const void* global, bool valid, emulator::Site site = CALLER) {
  emulator::copy_16(shared, global, valid, site);
}
inline void cp_async_commit() { emulator::copy_commit(); }
template <int pending>
inline void cp_async_wait() {
  emulator::copy_wait(pending);
}

inline void ldmatrix_x4(unsigned (&matrix)[4], unsigned shared, emulator::Site site = CALLER) {
  emulator::load_matrices("ldmatrix_x4", matrix, shared, false, site);
}
inline void ldmatrix_x4_transposed(unsigned (&matrix)[4], unsigned shared, emulator::Site site = CALLER) {
  emulator::load_matrices("ldmatrix_x4_transposed", matrix, shared, true, site);
}
inline void mma_m16n8k16(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1,
                         emulator::Site site = CALLER) {
  emulator::multiply_matrices(d, a, b0, b1, site);
}
inline unsigned pack_bfloat16(float low, float high) {
  const auto rounded = [](float value) {
    const unsigned bits = __float_as_uint(value);
    return std::isnan(value) ? 0x7FFFu : (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
  };
  return rounded(high) << 16 | rounded(low);
}

#undef CALLER

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
#define CALLER \
  emulator::Site { __builtin_FILE(), __builtin_LINE() }

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

// Of integers only: their sums do not depend on the order, those of floats do.
template <typename T>
inline T atomicAdd(T* place, T value) {
  static_assert(T(1) / T(2) == T(0), "a sum of floats by atomics changes from run to run");
  const T before = *place;
  *place += value;
  return before;
}
template <typename T>
inline T atomicMax(T* place, T value) {
  const T before = *place;
  *place = before < value ? value : before;
  return before;
}
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

struct Shuffle {
  const unsigned long long given;
  const int source;
  unsigned long long received;
};

inline void perform_shuffle(void* const (&operands)[32], unsigned mask, Site site) {
  for (int lane = 0; lane < 32; ++lane) {
    if (mask >> lane & 1u) {
      Shuffle& shuffle = *static_cast<Shuffle*>(operands[lane]);
      if (!(mask >> shuffle.source & 1u)) {
        fail(site, "lane %d shuffles from lane %d, which takes no part in it", lane, shuffle.source);
      }
      shuffle.received = static_cast<const Shuffle*>(operands[shuffle.source])->given;
    }
  }
}

inline int this_lane() { return static_cast<int>(threadIdx.x % 32u); }

template <typename T>
inline T shuffled(const char* name, unsigned mask, T value, int source, Site site) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  unsigned long long given = 0;
  std::memcpy(&given, &value, sizeof value);
  Shuffle shuffle{given, source, 0};
  collective({name, perform_shuffle}, mask, &shuffle, site);
  T result;
  std::memcpy(&result, &shuffle.received, sizeof result);
  return result;
}

struct Vote {
  const bool given;
  unsigned ballot;
};

inline void perform_vote(void* const (&operands)[32], unsigned mask, Site) {
  unsigned ballot = 0;
  for (int lane = 0; lane < 32; ++lane) {
    if (mask >> lane & 1u && static_cast<const Vote*>(operands[lane])->given) ballot |= 1u << lane;
  }
  for (int lane = 0; lane < 32; ++lane) {
    if (mask >> lane & 1u) static_cast<Vote*>(operands[lane])->ballot = ballot;
  }
}

inline unsigned voted(const char* name, unsigned mask, bool predicate, Site site) {
  Vote vote{predicate, 0};
  collective({name, perform_vote}, mask, &vote, site);
  return vote.ballot;
}

inline void perform_nothing(void* const (&)[32], unsigned, Site) {}

}  // namespace emulator

inline void __syncwarp(unsigned mask = 0xFFFFFFFFu, emulator::Site site = CALLER) {
  emulator::collective({"__syncwarp", emulator::perform_nothing}, mask, nullptr, site);
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
  return emulator::voted("__ballot_sync", mask, predicate != 0, site);
}
inline int __any_sync(unsigned mask, int predicate, emulator::Site site = CALLER) {
  return emulator::voted("__any_sync", mask, predicate != 0, site) != 0;
}
inline int __all_sync(unsigned mask, int predicate, emulator::Site site = CALLER) {
  return emulator::voted("__all_sync", mask, predicate == 0, site) == 0;
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

namespace emulator {

struct MatrixLoad {
  const unsigned shared;
  unsigned (&matrix)[4];
};

template <bool transposed>
inline void perform_matrix_load(void* const (&operands)[32], unsigned, Site site) {
  for (int matrix = 0; matrix < 4; ++matrix) {
    unsigned short elements[8][8];
    for (int row = 0; row < 8; ++row) {
      const int lane = 8 * matrix + row;
      const unsigned shared = static_cast<const MatrixLoad*>(operands[lane])->shared;
      std::memcpy(elements[row], shared_read(shared, 16, lane, "ldmatrix", site), 16);
    }
    for (int lane = 0; lane < 32; ++lane) {
      const int i = lane / 4, j = 2 * (lane % 4);
      const unsigned low = transposed ? elements[j][i] : elements[i][j];
      const unsigned high = transposed ? elements[j + 1][i] : elements[i][j + 1];
      static_cast<MatrixLoad*>(operands[lane])->matrix[matrix] = high << 16 | low;
    }
  }
}

struct MatrixProduct {
  float (&d)[4];
  const unsigned (&a)[4];
  const unsigned b[2];
};

// Products of bfloat16 are exact in float32; only the order of the 16 sums is the emulator's own.
inline void perform_matrix_product(void* const (&operands)[32], unsigned, Site) {
  float a[16][16], b[16][8], d[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const MatrixProduct& operand = *static_cast<const MatrixProduct*>(operands[lane]);
    const int i = lane / 4, j = 2 * (lane % 4);
    for (int half = 0; half < 2; ++half) {
      for (int pair = 0; pair < 2; ++pair) {
        const auto element = [pair](unsigned packed) {
          return __uint_as_float(pair == 0 ? packed << 16 : packed & 0xFFFF0000u);
        };
        a[i][8 * half + j + pair] = element(operand.a[2 * half]);
        a[i + 8][8 * half + j + pair] = element(operand.a[2 * half + 1]);
        b[8 * half + j + pair][i] = element(operand.b[half]);
        d[i + 8 * half][j + pair] = operand.d[2 * half + pair];
      }
    }
  }
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < 16; ++k) {
      for (int column = 0; column < 8; ++column) d[row][column] += a[row][k] * b[k][column];
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    const MatrixProduct& operand = *static_cast<const MatrixProduct*>(operands[lane]);
    const int i = lane / 4, j = 2 * (lane % 4);
    for (int half = 0; half < 2; ++half) {
      for (int pair = 0; pair < 2; ++pair) operand.d[2 * half + pair] = d[i + 8 * half][j + pair];
    }
  }
}

inline unsigned rounded_bfloat16(float value) {
  const unsigned bits = __float_as_uint(value);
  if (value != value) return 0x7FFFu;
  return (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
}

}  // namespace emulator

inline void ldmatrix_x4(unsigned (&matrix)[4], unsigned shared, emulator::Site site = CALLER) {
  emulator::MatrixLoad load{shared, matrix};
  emulator::collective({"ldmatrix_x4", emulator::perform_matrix_load<false>}, 0xFFFFFFFFu, &load, site);
}
inline void ldmatrix_x4_transposed(unsigned (&matrix)[4], unsigned shared, emulator::Site site = CALLER) {
  emulator::MatrixLoad load{shared, matrix};
  emulator::collective({"ldmatrix_x4_transposed", emulator::perform_matrix_load<true>}, 0xFFFFFFFFu, &load, site);
}
inline void mma_m16n8k16(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1,
                         emulator::Site site = CALLER) {
  emulator::MatrixProduct product{d, a, {b0, b1}};
  emulator::collective({"mma_m16n8k16", emulator::perform_matrix_product}, 0xFFFFFFFFu, &product, site);
}
inline unsigned pack_bfloat16(float low, float high) {
  return emulator::rounded_bfloat16(high) << 16 | emulator::rounded_bfloat16(low);
}

#undef CALLER

// Every instruction of the machine that C++ cannot say, and nothing else: the only file with inline PTX, and the seam
// at which tests/emulator takes a GPU's place (it defines the same functions in emulator.h, for an ordinary compiler).
//
// Valid from sm_80 on. Shared memory is addressed by its 32-bit window address.
#pragma once

#ifdef FASTUNET_EMULATOR
#include "emulator.h"
#else

// The block's dynamic shared memory, aligned to 1024 bytes.
#define SHARED_MEMORY(name) extern __shared__ __align__(1024) unsigned char name[]

// A kernel takes one structure by value: the host packs it once, whatever the device.
#define KERNEL(name, Arguments, threads, blocks_per_multiprocessor)                \
  extern "C" __global__ void __launch_bounds__(threads, blocks_per_multiprocessor) \
      name(const __grid_constant__ Arguments arguments)

#define UNROLL _Pragma("unroll")
#define ROLLED _Pragma("unroll 1")  // a loop whose iterations share registers

__device__ __forceinline__ unsigned shared_address(const void* pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

// Asynchronous copy of 16 bytes to shared memory, both sides aligned to 16; zeros where not valid, and then the source
// is not read. It has landed once this thread has waited for its group; other threads see it after a barrier.
__device__ __forceinline__ void cp_async_16(unsigned shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(valid ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `pending` of this thread's groups have not landed.
template <int pending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// Four 8x8 matrices of 16-bit elements: lane 8 i + j gives the address of row j of matrix i (16 bytes, aligned); of
// each matrix lane l receives elements (l / 4, 2 (l % 4)) and the next, transposed (2 (l % 4), l / 4) and the row
// below.
__device__ __forceinline__ void ldmatrix_x4(unsigned (&matrix)[4], unsigned shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrix[0]), "=r"(matrix[1]), "=r"(matrix[2]), "=r"(matrix[3])
               : "r"(shared)
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_transposed(unsigned (&matrix)[4], unsigned shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrix[0]), "=r"(matrix[1]), "=r"(matrix[2]), "=r"(matrix[3])
               : "r"(shared)
               : "memory");
}

// d += a b, bfloat16 operands, float32 sums: a is 16 x 16 (four 8x8 matrices: rows 0-7 / 8-15 of columns 0-7, then of
// columns 8-15), b 16 x 8 (two: rows 0-7, rows 8-15, each as a lane holds it transposed: (2 (l % 4), l / 4) and the row
// below), d 16 x 8: lane l holds (l / 4, 2 (l % 4)), the next column, and both of row l / 4 + 8.
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two floats rounded to bfloat16 (to nearest, ties to even); `low` in the lower half.
__device__ __forceinline__ unsigned pack_bfloat16(float low, float high) {
  unsigned packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

#endif

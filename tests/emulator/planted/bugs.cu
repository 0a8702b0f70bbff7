// Bugs as they are made, each beside its correct twin: <name>_planted and <name>_correct are one source, in which only
// `planted` differs.
#include "element.cuh"

struct Pointers {
  const float* input;
  float* output;
  int count;
};

#define TWINS(body)                                                   \
  KERNEL(body##_correct, Pointers, 64, 1) { body<false>(arguments); } \
  KERNEL(body##_planted, Pointers, 64, 1) { body<true>(arguments); }

__device__ __forceinline__ int thread() { return static_cast<int>(threadIdx.x); }

// Threads reverse the block's values through shared memory, and do not wait for one another.
template <bool planted>
__device__ void barrier(const Pointers& arguments) {
  SHARED_MEMORY(shared);
  float* const values = reinterpret_cast<float*>(shared);
  values[thread()] = arguments.input[thread()];
  if (!planted) __syncthreads();
  arguments.output[thread()] = values[63 - thread()];
}
TWINS(barrier)

// The same within each warp.
template <bool planted>
__device__ void warp_barrier(const Pointers& arguments) {
  SHARED_MEMORY(shared);
  float* const values = reinterpret_cast<float*>(shared);
  values[thread()] = arguments.input[thread()];
  if (!planted) __syncwarp();
  arguments.output[thread() ^ 31] = values[thread() ^ 31];
}
TWINS(warp_barrier)

// A buffer is filled again while others still read what it held.
template <bool planted>
__device__ void reuse(const Pointers& arguments) {
  SHARED_MEMORY(shared);
  float* const values = reinterpret_cast<float*>(shared);
  float sum = 0.0f;
  for (int round = 0; round < 2; ++round) {
    if (!planted) __syncthreads();
    values[thread()] = arguments.input[thread()];
    __syncthreads();
    sum += values[63 - thread()];
  }
  arguments.output[thread()] = 0.5f * sum;
}
TWINS(reuse)

// What cp.async brings is read before it was waited for ...
template <bool planted>
__device__ void wait(const Pointers& arguments) {
  SHARED_MEMORY(shared);
  if (thread() < 16) cp_async_16(shared_address(shared) + 16 * thread(), arguments.input + 4 * thread(), true);
  cp_async_commit();
  cp_async_wait<planted ? 1 : 0>();
  __syncthreads();
  arguments.output[thread()] = reinterpret_cast<const float*>(shared)[63 - thread()];
}
TWINS(wait)

// ... or each thread waits for its own, but for the others' only before they had.
template <bool planted>
__device__ void wait_order(const Pointers& arguments) {
  SHARED_MEMORY(shared);
  if (thread() < 16) cp_async_16(shared_address(shared) + 16 * thread(), arguments.input + 4 * thread(), true);
  cp_async_commit();
  if (planted) __syncthreads();
  cp_async_wait<0>();
  if (!planted) __syncthreads();
  arguments.output[thread()] = reinterpret_cast<const float*>(shared)[63 - thread()];
}
TWINS(wait_order)

// cp.async fills a stage of which others still read.
template <bool planted>
__device__ void stage(const Pointers& arguments) {
  SHARED_MEMORY(shared);
  float value = 0.0f;
  for (int round = 0; round < 2; ++round) {
    if (!planted) __syncthreads();
    if (thread() < 16) cp_async_16(shared_address(shared) + 16 * thread(), arguments.input + 4 * thread(), true);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    value = reinterpret_cast<const float*>(shared)[63 - thread()];
  }
  arguments.output[thread()] = value;
}
TWINS(stage)

// A sum of neighbours whose halo is one wider than the input.
template <bool planted>
__device__ void halo(const Pointers& arguments) {
  const int last = arguments.count - (planted ? 0 : 1);
  const int next = thread() + 1 < last ? thread() + 1 : last;
  arguments.output[thread()] = arguments.input[thread()] + arguments.input[next];
}
TWINS(halo)

// The last thread's store is outside the output.
template <bool planted>
__device__ void store_outside(const Pointers& arguments) {
  if (thread() < arguments.count + (planted ? 1 : 0)) arguments.output[thread()] = 1.0f;
}
TWINS(store_outside)

// Loads the fragments of a 16 x 16 product, of which two of the four matrices are exchanged.
template <bool planted>
__device__ void fragment(const Pointers& arguments) {
  SHARED_MEMORY(shared);
  for (int i = thread(); i < 256; i += 32) store(reinterpret_cast<bfloat16*>(shared) + i, arguments.input[i]);
  __syncthreads();
  const int row = thread() % 8, second = thread() / 8 % 2, fourth = thread() / 16;
  unsigned a[4], b[4];
  ldmatrix_x4(a,
              shared_address(shared) + 32 * (8 * (planted ? fourth : second) + row) + 16 * (planted ? second : fourth));
  ldmatrix_x4_transposed(b, shared_address(shared) + 32 * (8 * second + row) + 16 * fourth);
  for (int half = 0; half < 2; ++half) {
    float d[4] = {};
    mma_m16n8k16(d, a, b[2 * half], b[2 * half + 1]);
    for (int i = 0; i < 4; ++i) {
      arguments.output[16 * (thread() / 4 + 8 * (i / 2)) + 8 * half + 2 * (thread() % 4) + i % 2] = d[i];
    }
  }
}
TWINS(fragment)

// Some threads come to a barrier that the others never see ...
template <bool planted>
__device__ void divergent_barrier(const Pointers& arguments) {
  if (!planted || thread() < 40) __syncthreads();
  arguments.output[thread()] = __shfl_xor_sync(0xFFFFFFFFu, arguments.input[thread()], 31);
  __syncthreads();
}
TWINS(divergent_barrier)

// ... or lanes of a warp to a shuffle.
template <bool planted>
__device__ void divergent_warp(const Pointers& arguments) {
  float value = arguments.input[thread()];
  if (planted && thread() % 2 != 0) {
    value = __shfl_xor_sync(0xFFFFFFFFu, value, 31);
  } else {
    value = __shfl_xor_sync(0xFFFFFFFFu, value, 31);
  }
  arguments.output[thread()] = value;
}
TWINS(divergent_warp)

// A lane leaves before the others shuffle with it.
template <bool planted>
__device__ void early_exit(const Pointers& arguments) {
  if (planted && thread() == 63) return;
  arguments.output[thread()] = __shfl_xor_sync(0xFFFFFFFFu, arguments.input[thread()], 31);
}
TWINS(early_exit)

// An index runs past the shared memory that was asked for: by a store, a load, cp.async and ldmatrix.
template <bool planted>
__device__ void shared_store(const Pointers& arguments) {
  SHARED_MEMORY(shared);
  float* const values = reinterpret_cast<float*>(shared);
  values[thread() + (planted ? 1 : 0)] = arguments.input[thread()];
}
TWINS(shared_store)

template <bool planted>
__device__ void shared_load(const Pointers& arguments) {
  SHARED_MEMORY(shared);
  arguments.output[thread()] = reinterpret_cast<const float*>(shared)[thread() - (planted ? 1 : 0)];
}
TWINS(shared_load)

template <bool planted>
__device__ void shared_copy(const Pointers& arguments) {
  SHARED_MEMORY(shared);
  const int piece = thread() % 16 + (planted ? 1 : 0);
  if (thread() < 16) cp_async_16(shared_address(shared) + 16 * piece, arguments.input, false);
  cp_async_wait<0>();
}
TWINS(shared_copy)

template <bool planted>
__device__ void shared_matrix(const Pointers&) {
  SHARED_MEMORY(shared);
  unsigned matrix[4];
  ldmatrix_x4(matrix, shared_address(shared) + 16 * (thread() % 16 + (planted ? 1 : 0)));
}
TWINS(shared_matrix)

// 16 bytes at an address that is a multiple of 8 only: by ldmatrix, by cp.async on either side, by a load.
template <bool planted>
__device__ void misaligned_matrix(const Pointers&) {
  SHARED_MEMORY(shared);
  unsigned matrix[4];
  ldmatrix_x4(matrix, shared_address(shared) + 16 * (thread() % 8) + (planted ? 8 : 0));
}
TWINS(misaligned_matrix)

template <bool planted>
__device__ void misaligned_copy(const Pointers& arguments) {
  SHARED_MEMORY(shared);
  if (thread() == 3) cp_async_16(shared_address(shared) + (planted ? 8 : 0), arguments.input, true);
}
TWINS(misaligned_copy)

template <bool planted>
__device__ void misaligned_source(const Pointers& arguments) {
  SHARED_MEMORY(shared);
  if (thread() == 3) cp_async_16(shared_address(shared), arguments.input + (planted ? 2 : 0), true);
}
TWINS(misaligned_source)

template <bool planted>
__device__ void misaligned_load(const Pointers& arguments) {
  const float4 four = *reinterpret_cast<const float4*>(arguments.input + (planted ? 2 : 0));
  arguments.output[thread()] = four.w;
}
TWINS(misaligned_load)

// Arithmetic that C++ does not define.
template <bool planted>
__device__ void array_index(const Pointers& arguments) {
  float values[4] = {1.0f, 2.0f, 3.0f, 4.0f};
  arguments.output[thread()] = values[thread() % (planted ? 5 : 4)];
}
TWINS(array_index)

template <bool planted>
__device__ void overflow(const Pointers& arguments) {
  const int large = (planted ? 65536 : 256) * arguments.count;  // 64
  arguments.output[thread()] = static_cast<float>(large * 512);
}
TWINS(overflow)

template <bool planted>
__device__ void division(const Pointers& arguments) {
  arguments.output[thread()] = static_cast<float>(thread() / (arguments.count - (planted ? 64 : 63)));
}
TWINS(division)

// Each block adds to what the block before it left, as if blocks ran in order.
template <bool planted>
__device__ void block_order(const Pointers& arguments) {
  const int block = static_cast<int>(blockIdx.x);
  const float before = planted && block > 0 ? arguments.output[block - 1] : static_cast<float>(block);
  if (thread() == 0) arguments.output[block] = before + 1.0f;
}
TWINS(block_order)

// A pointer runs past a thread's own array: only AddressSanitizer sees it.
template <bool planted>
__device__ void array_pointer(const Pointers& arguments) {
  float values[4] = {1.0f, 2.0f, 3.0f, 4.0f};
  const float* value = values;
  for (int i = 0; i < arguments.count % 5 - (planted ? 0 : 1); ++i) ++value;  // 64 % 5 = 4
  arguments.output[thread()] = *value;
}
TWINS(array_pointer)

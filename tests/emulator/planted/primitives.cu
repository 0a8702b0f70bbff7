// One kernel for each primitive of the emulator, plain enough to be compared with NumPy by eye.
#include "ptx.cuh"

struct Pointers {
  const void* input;
  const void* other;
  void* output;
  int count;
};

// output[i] = the pair input[2 i], input[2 i + 1] in bfloat16.
KERNEL(pack, Pointers, 128, 1) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  const float* const pairs = static_cast<const float*>(arguments.input);
  if (i < arguments.count) static_cast<unsigned*>(arguments.output)[i] = pack_bfloat16(pairs[2 * i], pairs[2 * i + 1]);
}

// output (16 x 16, float32) += A B, both 16 x 16 of bfloat16 and read by ldmatrix: A stored as it is or (A_TRANSPOSED)
// by columns, B stored by columns, as weights are, or (B_TRANSPOSED) as it is.
KERNEL(multiply, Pointers, 32, 1) {
  SHARED_MEMORY(shared);
  const unsigned a_place = shared_address(shared), b_place = a_place + 512;
  const int lane = static_cast<int>(threadIdx.x);
  cp_async_16(a_place + 16 * lane, static_cast<const uint4*>(arguments.input) + lane, true);
  cp_async_16(b_place + 16 * lane, static_cast<const uint4*>(arguments.other) + lane, true);
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();

  const int row = lane % 8, second = lane / 8 % 2, fourth = lane / 16;  // of four 8 x 8 matrices, their row
  unsigned a[4], b[4];
#ifdef A_TRANSPOSED
  ldmatrix_x4_transposed(a, a_place + 32 * (8 * fourth + row) + 16 * second);
#else
  ldmatrix_x4(a, a_place + 32 * (8 * second + row) + 16 * fourth);
#endif
#ifdef B_TRANSPOSED
  ldmatrix_x4_transposed(b, b_place + 32 * (8 * second + row) + 16 * fourth);
#else
  ldmatrix_x4(b, b_place + 32 * (8 * fourth + row) + 16 * second);
#endif
  float* const output = static_cast<float*>(arguments.output);
  for (int half = 0; half < 2; ++half) {
    float d[4];
    float* const places[2] = {output + 16 * (lane / 4) + 8 * half + 2 * (lane % 4),
                              output + 16 * (lane / 4 + 8) + 8 * half + 2 * (lane % 4)};
    for (int i = 0; i < 4; ++i) d[i] = places[i / 2][i % 2];
    mma_m16n8k16(d, a, b[2 * half], b[2 * half + 1]);
    for (int i = 0; i < 4; ++i) places[i / 2][i % 2] = d[i];
  }
}

// Copies `count` pieces of 16 bytes through shared memory, and for the other threads zeros, without a source.
KERNEL(copy, Pointers, 64, 1) {
  SHARED_MEMORY(shared);
  const int i = static_cast<int>(threadIdx.x);
  const bool valid = i < arguments.count;
  cp_async_16(shared_address(shared) + 16 * i, valid ? static_cast<const uint4*>(arguments.input) + i : nullptr, valid);
  cp_async_commit();
  cp_async_commit();  // an empty group
  cp_async_wait<1>();
  static_cast<uint4*>(arguments.output)[i] = reinterpret_cast<const uint4*>(shared)[i];
}

// output[0..3][thread] = the value of the input as each shuffle gives it, in groups of `count` lanes.
KERNEL(exchange, Pointers, 64, 1) {
  const int i = static_cast<int>(threadIdx.x), width = arguments.count;
  const float value = static_cast<const float*>(arguments.input)[i];
  const int by = static_cast<const int*>(arguments.other)[0];
  float* const output = static_cast<float*>(arguments.output) + i;
  output[0] = __shfl_sync(0xFFFFFFFFu, value, by, width);
  output[64] = __shfl_xor_sync(0xFFFFFFFFu, value, by, width);
  output[128] = __shfl_up_sync(0xFFFFFFFFu, value, static_cast<unsigned>(by), width);
  output[192] = __shfl_down_sync(0xFFFFFFFFu, value, static_cast<unsigned>(by), width);
}

// output[0..5][thread] = ballot, any, all of the warp's even or odd lanes; count, or, and of the block.
KERNEL(vote, Pointers, 64, 1) {
  const int i = static_cast<int>(threadIdx.x);
  const int value = static_cast<const int*>(arguments.input)[i];
  const unsigned mask = i % 2 == 0 ? 0x55555555u : 0xAAAAAAAAu;
  unsigned* const output = static_cast<unsigned*>(arguments.output) + i;
  output[0] = __ballot_sync(mask, value);
  output[64] = static_cast<unsigned>(__any_sync(mask, value));
  output[128] = static_cast<unsigned>(__all_sync(mask, value));
  output[192] = static_cast<unsigned>(__syncthreads_count(value));
  output[256] = static_cast<unsigned>(__syncthreads_or(value));
  output[320] = static_cast<unsigned>(__syncthreads_and(value));
}

// output[i] = the sum of input[0..63], by halves: a tree of barriers, then of a warp.
KERNEL(sum, Pointers, 64, 1) {
  SHARED_MEMORY(shared);
  int* const values = reinterpret_cast<int*>(shared);
  const int i = static_cast<int>(threadIdx.x);
  values[i] = static_cast<const int*>(arguments.input)[64 * blockIdx.x + i];
  __syncthreads();
  if (i >= 32) return;  // barriers no longer count these
  values[i] += values[i + 32];
  for (int half = 16; half > 0; half /= 2) {
    __syncwarp();
    const int other = values[i ^ half];
    __syncwarp();
    values[i] += other;
  }
  __syncthreads();
  static_cast<int*>(arguments.output)[32 * blockIdx.x + i] = values[(i + 1) % 32];
}

// output[i][0..4] = high halves of products of input[i] and other[i], and bits counted.
KERNEL(integers, Pointers, 64, 1) {
  const int i = static_cast<int>(threadIdx.x);
  const unsigned a = static_cast<const unsigned*>(arguments.input)[i];
  const unsigned b = static_cast<const unsigned*>(arguments.other)[i];
  unsigned* const output = static_cast<unsigned*>(arguments.output) + i;
  output[0] = __umulhi(a, b);
  output[64] = static_cast<unsigned>(__mulhi(static_cast<int>(a), static_cast<int>(b)));
  output[128] = static_cast<unsigned>(__popc(a));
  output[192] = static_cast<unsigned>(__clz(static_cast<int>(a)));
  output[256] = static_cast<unsigned>(__ffs(static_cast<int>(a)));
}

// output[block] = the sum of the block's thread numbers, once through shared and once through global memory.
KERNEL(census, Pointers, 1024, 1) {
  SHARED_MEMORY(shared);
  int* const sum = reinterpret_cast<int*>(shared);
  int* const output = static_cast<int*>(arguments.output);
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  if (threadIdx.x == 0) *sum = 0;
  __syncthreads();
  atomicAdd(sum, static_cast<int>(threadIdx.x));
  atomicAdd(output + block, static_cast<int>(threadIdx.x));
  __syncthreads();
  if (threadIdx.x == blockDim.x - 1) output[block] += *sum;
}

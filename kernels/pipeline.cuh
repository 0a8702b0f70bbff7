// Operands stream through shared memory: while one step is multiplied, the copies of the next stages - 1 are under way.
#pragma once

#include "ptx.cuh"

// copy(step) starts this thread's asynchronous copies of a step into buffer step % stages, multiply(step) reads what
// all threads copied. A barrier is needed before the buffers are used for anything else.
template <int stages, typename Copy, typename Multiply>
__device__ __forceinline__ void pipeline(int steps, Copy copy, Multiply multiply) {
  ROLLED
  for (int step = 0; step < stages - 1; ++step) {
    if (step < steps) copy(step);
    cp_async_commit();
  }
  for (int step = 0; step < steps; ++step) {
    cp_async_wait<stages - 2>();
    __syncthreads();  // the step's copies are visible to all, and all have read the buffer that is overwritten next
    if (step + stages - 1 < steps) copy(step + stages - 1);
    cp_async_commit();
    multiply(step);
  }
}

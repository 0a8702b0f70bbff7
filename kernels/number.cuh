// A number of an array of another library: of any type that is read, those of fastunet/backends/cuda/strided.py in its
// order, as double, which holds all of them but int64 beyond 2**53.
#pragma once

#include "element.cuh"

__device__ __forceinline__ double number_at(const void* data, long long place, int type) {
  switch (type) {
    case 0:
      return static_cast<const float*>(data)[place];
    case 1:
      return to_float(static_cast<const bfloat16*>(data)[place]);
    case 2:
      return static_cast<const int*>(data)[place];
    case 3:
      return static_cast<double>(static_cast<const long long*>(data)[place]);
    case 4:
      return static_cast<const unsigned char*>(data)[place];
    case 5:
      return static_cast<const unsigned short*>(data)[place];
    case 6:
      return static_cast<const short*>(data)[place];
    case 7:
      return static_cast<const signed char*>(data)[place];
    default:
      return static_cast<const double*>(data)[place];
  }
}

// Where the four pixels of an up-convolution's output lie that belong to a pixel of its input, pixels counted through
// rows and images.
#pragma once

#include "tensor.cuh"

template <typename T>
__device__ __forceinline__ T* first_of_four(const Tensor<T>& y, int pixel) {
  const int width = y.width / 2, row = pixel / width, column = pixel % width;
  return y.data + (static_cast<long long>(2 * row) * y.width + 2 * column) * y.pitch;
}

// From the first of the four to that of tap 2 ky + kx.
template <typename T>
__device__ __forceinline__ long long offset_of_tap(const Tensor<T>& y, int tap) {
  return (static_cast<long long>(tap / 2) * y.width + tap % 2) * y.pitch;
}

// A channels-last tensor in device memory, as every kernel is told of it.
#pragma once

#include "element.cuh"

// data[((image * height + row) * width + column) * pitch + channel]: `pitch` stored channels a pixel, of which
// `channels` mean something. Except for images (1 to 4 channels, pitch = channels) and logits (float32, pitch =
// channels), the pitch is `channels` rounded up to a multiple of 16 and the channels beyond are zero: every kernel
// keeps that so, and none has an edge case for it. `top` and `left` place a smaller tensor's origin in it: the crop of
// a skip connection.
template <typename T>
struct Tensor {
  T* data;
  int images, height, width, channels, pitch;
  int top, left;
  int reserved;

  __device__ __forceinline__ T* at(int image, int row, int column, int channel) const {
    return data + ((static_cast<long long>(image) * height + row + top) * width + column + left) * pitch + channel;
  }
};

// How a kernel that touches every element once walks over a tensor: a thread has eight neighbouring channels of a
// pixel.
//
// Grid, the same for all of them: (ceil(width * ceil(pitch / 8) / 256), min(height, 65535), min(images, 65535)) blocks
// of 256 threads, `pitch` the largest among the tensors. A row's threads follow its memory, so that a warp moves 512
// bytes of bfloat16 at once.
#pragma once

#include "tensor.cuh"

constexpr int kPointwiseThreads = 256;

// Calls function(image, row, column, channel) for this thread's groups of eight channels from `channel` on.
template <typename Function>
__device__ __forceinline__ void for_each_eight(int images, int height, int width, int pitch, Function function) {
  const int groups = (pitch + 7) / 8, place = blockIdx.x * kPointwiseThreads + threadIdx.x;
  if (place >= width * groups) return;
  for (int image = blockIdx.z; image < images; image += gridDim.z) {
    for (int row = blockIdx.y; row < height; row += gridDim.y) {
      function(image, row, place / groups, place % groups * 8);
    }
  }
}

// Eight channels of a pixel, of any pitch: those the tensor does not store read as zero and are not written.
template <typename T>
__device__ __forceinline__ void load_channels(float (&values)[8], const Tensor<T>& tensor, int image, int row,
                                              int column, int channel) {
  const T* const place = tensor.at(image, row, column, channel);
  if (tensor.pitch % 8 == 0 && channel < tensor.pitch) {
    load8(values, place);
    return;
  }
  UNROLL
  for (int i = 0; i < 8; ++i) values[i] = channel + i < tensor.pitch ? to_float(place[i]) : 0.0f;
}

template <typename T>
__device__ __forceinline__ void store_channels(const Tensor<T>& tensor, int image, int row, int column, int channel,
                                               const float (&values)[8]) {
  T* const place = tensor.at(image, row, column, channel);
  if (tensor.pitch % 8 == 0 && channel < tensor.pitch) {
    store8(place, values);
    return;
  }
  UNROLL
  for (int i = 0; i < 8; ++i) {
    if (channel + i < tensor.pitch) store(place + i, values[i]);
  }
}

// Adds the pixel that lies at (row, column) of a larger tensor, if one does: `placed` may be absent (data null), and
// its `top` and `left` are minus the place of its first pixel there.
template <typename T>
__device__ __forceinline__ void add_placed(float (&values)[8], const Tensor<T>& placed, int image, int row, int column,
                                           int channel) {
  const int own_row = row + placed.top, own_column = column + placed.left;
  if (placed.data == nullptr || own_row < 0 || own_row >= placed.height || own_column < 0 ||
      own_column >= placed.width) {
    return;
  }
  float added[8];
  load_channels(added, placed, image, row, column, channel);
  UNROLL
  for (int i = 0; i < 8; ++i) values[i] += added[i];
}

// The first layer, a rectangle at a time, for those that read it (kernels.h: FirstLayer).
//
// Cost: 18 * channels FLOPs a value; the image is read from L1.
#pragma once

#include "simd.h"

namespace fastunet {
namespace {

constexpr int kFirstLayerPixels = 8;  // enough sums to hide the latency of a multiplication

template <int PIXELS>
INLINE void first_layer_pixels(const FirstLayer& layer, const float* const* rows, int column, const float* weight,
                               int group, vec bias, float* target) {
  vec sums[PIXELS];
  UNROLL
  for (int p = 0; p < PIXELS; ++p) sums[p] = bias;
  for (int channel = 0; channel < layer.channels; ++channel) {
    UNROLL
    for (int tap = 0; tap < 9; ++tap) {
      const vec w = load(weight + (tap * kBlock + channel) * group);
      const float* const x = rows[tap / 3] + (column + tap % 3) * layer.channels + channel;
      UNROLL
      for (int p = 0; p < PIXELS; ++p) sums[p] += x[p * layer.channels] * w;
    }
  }
  UNROLL
  for (int p = 0; p < PIXELS; ++p) store(target + p * kBlock, layer.relu ? maximum(sums[p], vec{}) : sums[p]);
}

// Rows top to bottom and columns left to right of `blocks` blocks of outputs from first_block on, computed into
// `target`; `sizes` is the whole layer's. What is returned is a view of the whole layer of which only this is there.
View first_layer_part(const FirstLayer& layer, const View& sizes, int image, int top, int bottom, int left, int right,
                      int first_block, int blocks, float* target) {
  bottom = smaller(bottom, sizes.height);
  right = smaller(right, sizes.width);
  View part = sizes;
  part.row_stride = static_cast<ptrdiff_t>(right - left) * kBlock;
  part.block_stride = part.row_stride * (bottom - top);
  part.image_stride = 0;
  part.data = target - first_block * part.block_stride - top * part.row_stride - static_cast<ptrdiff_t>(left) * kBlock;
  const int group = group_width(sizes.channels);
  for (int block = first_block; block < first_block + blocks; ++block)
    for (int lane = 0; lane < kBlock; lane += kLanes) {
      const int output = block * kBlock + lane;
      const float* const weight =
          layer.weight + static_cast<ptrdiff_t>(output / group) * 9 * kBlock * group + output % group;
      const vec bias = load(layer.bias + output);
      for (int row = top; row < bottom; ++row) {
        const float* rows[3];
        for (int ky = 0; ky < 3; ++ky)
          rows[ky] =
              layer.pixels + (static_cast<ptrdiff_t>(image) * layer.height + row + ky) * layer.width * layer.channels;
        float* const y = part.at(0, block, row, 0) + lane;
        int column = left;
        for (; column + kFirstLayerPixels <= right; column += kFirstLayerPixels)
          first_layer_pixels<kFirstLayerPixels>(layer, rows, column, weight, group, bias, y + column * kBlock);
        for (; column < right; ++column)
          first_layer_pixels<1>(layer, rows, column, weight, group, bias, y + column * kBlock);
      }
    }
  return part;
}

// What first_layer_part needs for one block of the pixels of a patch of tiles, in floats.
template <int T>
ptrdiff_t first_layer_floats(int patch_rows, int patch_columns) {
  return static_cast<ptrdiff_t>(patch_rows * T + 2) * (patch_columns * T + 2) * kBlock;
}

}  // namespace
}  // namespace fastunet

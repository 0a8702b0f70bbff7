// The 4x4 output tiles of a layer, numbered through all images, and their transformation.
#pragma once

#include "winograd.h"

namespace fastunet {
namespace {

struct Tiling {
  int height, width, rows, columns, count;

  Tiling(int images, int height, int width)
      : height(height),
        width(width),
        rows(ceil_div(height, kTile)),
        columns(ceil_div(width, kTile)),
        count(images * rows * columns) {}

  void locate(int tile, int& image, int& row, int& column) const {
    column = tile % columns * kTile;
    row = tile / columns % rows * kTile;
    image = tile / columns / rows;
  }
};

// Transformed tiles lie as [frequency][block][tile][16]; frequencies are an odd number of cache lines apart,
// so that the 36 values of one tile do not compete for the same cache sets.
ptrdiff_t frequency_stride(int blocks, int tiles) { return (static_cast<ptrdiff_t>(blocks) * tiles | 1) * kBlock; }

// Transforms the FOOTPRINT x FOOTPRINT patches of `tiles` tiles from `first` on, for one block of channels of
// x. Pixels outside x count as zero.
template <int FOOTPRINT, Line LINE>
void transform_tiles(const View& x, int block, const Tiling& tiling, int first, int tiles, float* target,
                     ptrdiff_t stride) {
  alignas(64) float patch[FOOTPRINT * FOOTPRINT * kBlock];
  for (int tile = 0; tile < tiles; ++tile, target += kBlock) {
    int image, row, column;
    tiling.locate(first + tile, image, row, column);
    const float* source = x.at(image, block, row, column);
    ptrdiff_t row_stride = x.row_stride;
    if (row + FOOTPRINT > x.height || column + FOOTPRINT > x.width) {
      for (int r = 0; r < FOOTPRINT; ++r)
        for (int c = 0; c < FOOTPRINT; ++c)
          for (int i = 0; i < kBlock; ++i)
            patch[(r * FOOTPRINT + c) * kBlock + i] =
                row + r < x.height && column + c < x.width ? source[r * row_stride + c * kBlock + i] : 0.0f;
      source = patch;
      row_stride = FOOTPRINT * kBlock;
    }
    for (int v = 0; v < kVectors; ++v)
      transform<FOOTPRINT, kFootprint, LINE>(source + v * kLanes, row_stride, kBlock, [&](int r, int c, vec value) {
        store(target + (r * kFootprint + c) * stride + v * kLanes, value);
      });
  }
}

}  // namespace
}  // namespace fastunet

// The output tiles of a layer, cut into patches that one run of the three stages takes, and their transformation.
#pragma once

#include "first_layer.h"
#include "winograd.h"

namespace fastunet {
namespace {

// A rectangle of tiles of one image, numbered in reading order.
struct Patch {
  int image = 0, row = 0, column = 0, rows = 0, columns = 0;  // in tiles

  int count() const { return rows * columns; }
};

// All tiles of a layer in patches of about the same size.
struct Tiling {
  int images, rows, columns;      // in tiles
  int patch_rows, patch_columns;  // of the largest patch
  int patches_down = 1, patches_across = 1;

  // Patches of at most `most` tiles, as wide as `most_columns` allow: neighbours share a halo, and a register tile of
  // whole rows of a patch reads what lies together.
  Tiling(int tile, int images, int height, int width, int most, int most_columns)
      : images(images), rows(ceil_div(height, tile)), columns(ceil_div(width, tile)) {
    patches_across = ceil_div(columns, smaller(most_columns, most));
    patch_columns = ceil_div(columns, patches_across);
    patches_down = ceil_div(rows, larger(1, most / patch_columns));
    patch_rows = ceil_div(rows, patches_down);
  }

  int patches() const { return images * patches_down * patches_across; }
  int most_tiles() const { return patch_rows * patch_columns; }

  Patch operator[](int index) const {
    Patch patch;
    const int across = index % patches_across, down = index / patches_across % patches_down;
    patch.image = index / patches_across / patches_down;
    patch.row = run_begin(rows, down, patches_down);
    patch.rows = run_begin(rows, down + 1, patches_down) - patch.row;
    patch.column = run_begin(columns, across, patches_across);
    patch.columns = run_begin(columns, across + 1, patches_across) - patch.column;
    return patch;
  }
};

// Transformed values lie as 36 (of T = 4) planes of one frequency each, an odd number of cache lines apart: the values
// of one tile, all written at once, do not compete for the same cache sets.
INLINE ptrdiff_t plane_stride(ptrdiff_t floats) { return (floats / kBlock | 1) * kBlock; }

// The footprint x footprint pixels of a tile whose first is (row, column); zeros beyond the view.
template <int SIDE>
void copy_footprint(const View& x, int image, int block, int row, int column, float* target) {
  for (int r = 0; r < SIDE; ++r)
    for (int c = 0; c < SIDE; ++c, target += kBlock)
      if (row + r < x.height && column + c < x.width) {
        const float* const source = x.at(image, block, row + r, column + c);
        for (int i = 0; i < kBlock; ++i) target[i] = source[i];
      } else {
        for (int i = 0; i < kBlock; ++i) target[i] = 0.0f;
      }
}

// Transforms one block of channels of the tiles of a patch, SIDE x SIDE pixels each, into planes of [panel][block][tile
// of the panel][16]: panels of at most `panel` tiles are what a register tile multiplies, and lie as it reads them.
// With panel = all tiles it is [block][tile][16].
template <class W, int SIDE, Pair PAIR>
void transform_tiles(const View& x, int block, const Patch& patch, int panel, int blocks, int target_block,
                     float* target, ptrdiff_t stride) {
  alignas(64) float footprint[SIDE * SIDE * kBlock];
  const int tiles = patch.count(), panels = ceil_div(tiles, panel);
  int row = 0, column = 0;
  for (int p = 0; p < panels; ++p) {
    const int begin = run_begin(tiles, p, panels), count = run_begin(tiles, p + 1, panels) - begin;
    float* place =
        target + (static_cast<ptrdiff_t>(begin) * blocks + static_cast<ptrdiff_t>(target_block) * count) * kBlock;
    for (int tile = 0; tile < count; ++tile, place += kBlock) {
      const int y = (patch.row + row) * W::kTile, left = (patch.column + column) * W::kTile;
      const float* source = x.at(patch.image, block, y, left);
      ptrdiff_t row_stride = x.row_stride;
      if (y + SIDE > x.height || left + SIDE > x.width) {
        copy_footprint<SIDE>(x, patch.image, block, y, left, footprint);
        source = footprint;
        row_stride = SIDE * kBlock;
      }
      for (int v = 0; v < kBlock; v += kLanes) expand<W, SIDE, PAIR>(source + v, row_stride, kBlock, place + v, stride);
      if (++column == patch.columns) column = 0, ++row;
    }
  }
}

// The view of a patch's block of x, and the block's number in it: where x is a first layer, of the part of it that is
// computed into first_layer, which has first_layer_floats.
template <int T>
const View block_of(const Channels& x, const Patch& patch, int& block, float* first_layer) {
  if (x.first_layer == nullptr) return part_of(x, block);
  const int top = patch.row * T, left = patch.column * T;
  return first_layer_part(*x.first_layer, x.part[0], patch.image, top, top + patch.rows * T + 2, left,
                          left + patch.columns * T + 2, block, 1, first_layer);
}

// Asks for pixels in good time, a few at each call, while something else is multiplied: those that the next patch
// reads, or, WRITES, those that this one writes, which have to come from memory too.
template <bool WRITES>
class Ahead {
 public:
  Ahead(const Channels& x, int image, int top, int bottom, int left, int right, int first_block, int blocks)
      : x_(x), image_(image), block_(first_block) {
    const View& view = x.part[0];
    row_ = top_ = larger(0, top);
    column_ = left_ = larger(0, left);
    bottom_ = smaller(view.height, bottom);
    right_ = smaller(view.width, right);
    left_over_ = bottom_ > top_ && right_ > left_ ? (bottom_ - top_) * (right_ - left_) * blocks : 0;
  }

  int pixels() const { return left_over_; }

  INLINE void ask(int count) {
    for (count = smaller(count, left_over_), left_over_ -= count; count > 0;) {
      int block = block_;
      const View& view = part_of(x_, block);
      const float* const pixel = view.at(image_, block, row_, 0);
      const int end = smaller(right_, column_ + count);
      count -= end - column_;
      for (; column_ < end; ++column_) __builtin_prefetch(pixel + column_ * kBlock, WRITES ? 1 : 0, 2);
      if (column_ < right_) return;
      column_ = left_;
      if (++row_ < bottom_) continue;
      row_ = top_;
      ++block_;
    }
  }

 private:
  const Channels& x_;
  int image_, block_, top_, bottom_, left_, right_, row_, column_, left_over_;
};

// What a patch of tiles reads of all channels, with `halo` pixels beyond its tiles.
template <int T>
Ahead<false> ahead_of(const Channels& x, const Patch& patch, int halo) {
  return Ahead<false>(x, patch.image, patch.row * T, (patch.row + patch.rows) * T + halo, patch.column * T,
                      (patch.column + patch.columns) * T + halo, 0,
                      patch.count() > 0 && x.first_layer == nullptr ? x.blocks() : 0);
}

}  // namespace
}  // namespace fastunet

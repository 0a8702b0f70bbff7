// What becomes of the T x T values of a tile on their way to memory: bias, ReLU or mask, storing, pooling.
#pragma once

#include "winograd_tiles.h"

namespace fastunet {
namespace {

// For a group of outputs, all of one kind.
template <int T>
struct TileWriter {
  const Destination& to;
  int top, left, bottom, right;  // of the part of the values that is kept
  bool pools;

  explicit TileWriter(const Destination& to)
      : to(to),
        top((to.height - to.values.part[0].height) / 2),
        left((to.width - to.values.part[0].width) / 2),
        bottom(top + to.values.part[0].height),
        right(left + to.values.part[0].width),
        pools(to.pooled.data != nullptr) {}

  int outputs() const { return to.values.blocks() * kBlock; }

  // The pixels that a patch writes.
  Ahead<true> ahead(const Patch& patch, int first_block, int blocks) const {
    const int y = patch.row * T - top, x = patch.column * T - left;
    return Ahead<true>(to.values, patch.image, y, y + patch.rows * T, x, x + patch.columns * T, first_block, blocks);
  }

  // `channel` counts through all outputs; values[row][column] are those of kLanes channels from there on.
  // first_mask is in the place of to.mask[0].
  INLINE void write(int image, int row, int column, int channel, vec (&values)[T][T], const View& first_mask) const {
    int block = channel / kBlock;
    const int part = block < to.values.part[0].blocks() ? 0 : 1, lane = channel % kBlock;
    if (part == 1) block -= to.values.part[0].blocks();
    if (to.adds) add_present(image, row, column, block, lane, to.values.part[part], values);
    if (to.bias != nullptr) {
      const vec bias = load(to.bias + channel);
      UNROLL
      for (int r = 0; r < T; ++r) {
        UNROLL
        for (int c = 0; c < T; ++c) values[r][c] += bias;
      }
    }
    if (to.relu) {
      UNROLL
      for (int r = 0; r < T; ++r) {
        UNROLL
        for (int c = 0; c < T; ++c) values[r][c] = maximum(values[r][c], vec{});
      }
    }
    const View& y = to.values.part[part];
    const View& mask = part == 0 ? first_mask : to.mask[1];
    float* const target = y.at(image, block, row - top, column - left) + lane;
    if (row >= top && column >= left && row + T <= bottom && column + T <= right) {
      if (mask.data != nullptr) {
        const float* const positive = mask.at(image, block, row, column) + lane;
        UNROLL
        for (int r = 0; r < T; ++r) {
          UNROLL
          for (int c = 0; c < T; ++c)
            values[r][c] = load(positive + r * mask.row_stride + c * kBlock) > vec{} ? values[r][c] : vec{};
        }
      }
      UNROLL
      for (int r = 0; r < T; ++r) {
        UNROLL
        for (int c = 0; c < T; ++c) store(target + r * y.row_stride + c * kBlock, values[r][c]);
      }
    } else if (row + T > top && column + T > left && row < bottom && column < right) {
      write_part(image, row, column, block, lane, y, mask, values);
    }
    if (pools) pool(image, row, column, block, lane, values);
  }

  void add_present(int image, int row, int column, int block, int lane, const View& y, vec (&values)[T][T]) const {
    const float* const present = y.at(image, block, row, column) + lane;
    if (row + T <= y.height && column + T <= y.width) {
      UNROLL
      for (int r = 0; r < T; ++r) {
        UNROLL
        for (int c = 0; c < T; ++c) values[r][c] += load(present + r * y.row_stride + c * kBlock);
      }
    } else {
      for (int r = 0; r < T && row + r < y.height; ++r)
        for (int c = 0; c < T && column + c < y.width; ++c)
          values[r][c] += load(present + r * y.row_stride + c * kBlock);
    }
  }

  // A tile that reaches beyond what is kept.
  void write_part(int image, int row, int column, int block, int lane, const View& y, const View& mask,
                  const vec (&values)[T][T]) const {
    for (int r = larger(0, top - row); r < T && row + r < bottom; ++r)
      for (int c = larger(0, left - column); c < T && column + c < right; ++c) {
        vec value = values[r][c];
        if (mask.data != nullptr)
          value = load(mask.at(image, block, row + r, column + c) + lane) > vec{} ? value : vec{};
        store(y.at(image, block, row + r - top, column + c - left) + lane, value);
      }
  }

  // As maxpool2x2.cpp, of values that ReLU has seen: a largest of 0 lets no gradient through.
  void pool(int image, int row, int column, int block, int lane, const vec (&values)[T][T]) const {
    const View& p = to.pooled;
    UNROLL
    for (int r = 0; r < T; r += 2) {
      UNROLL
      for (int c = 0; c < T; c += 2) {
        const int y = (row + r) / 2, x = (column + c) / 2;
        if (y >= p.height || x >= p.width) continue;
        int_vec choice;
        const vec best =
            largest_of_four(values[r][c], values[r][c + 1], values[r + 1][c], values[r + 1][c + 1], choice);
        choice = best > vec{} ? choice : int_vec{} + kNoChoice;
        store(p.at(image, block, y, x) + lane, best);
        if (to.choice != nullptr)
          *reinterpret_cast<byte_vec*>(to.choice + choice_index(p, image, block, y, x) + lane) =
              __builtin_convertvector(choice, byte_vec);
      }
    }
  }
};

}  // namespace
}  // namespace fastunet

// Direct convolution with a K x K kernel over blocks of 16 channels, the exact path: 3x3 layers that Winograd
// does not take, their data gradients (on zero-bordered gradients, with transposed weights), the four taps of
// an up-convolution (1x1 into every other pixel), its data gradient (2x2, stride 2) and 1x1 layers are all
// this loop.
//
// Cost: 2 * in * out * K * K FLOPs a pixel; a register tile reads its weights from L2 and its pixels from L1.
#pragma once

#include "micro_kernels.h"

namespace fastunet {
namespace {

struct Convolution {
  Channels input;
  const float* weight = nullptr;  // [out / group][in / 16][taps][16][group]
  Channels output;
  int kernel = 3, stride = 1;
  int taps = 9, first_tap = 0;  // of the layout, and where this convolution's kernel begins in it
  const float* bias = nullptr;
  bool relu = false;
  View mask{};          // outputs only where this is above 0, where it has data
  int output_step = 1;  // pixels between neighbouring outputs in a row of `output`
};

template <int PIXELS, int VECTORS>
INLINE void convolve_segment(const Convolution& c, int group, int image, int row, int column, int output) {
  vec sums[PIXELS][VECTORS];
  UNROLL
  for (int v = 0; v < VECTORS; ++v) {
    const vec start = c.bias != nullptr ? load(c.bias + output + v * kLanes) : vec{};
    UNROLL
    for (int pixel = 0; pixel < PIXELS; ++pixel) sums[pixel][v] = start;
  }
  const ptrdiff_t tap_stride = static_cast<ptrdiff_t>(kBlock) * group;
  const float* weight =
      c.weight + (static_cast<ptrdiff_t>(output / group) * c.input.blocks() * c.taps + c.first_tap) * tap_stride +
      output % group;
  for (int part = 0; part < c.input.count; ++part) {
    const View& x = c.input.part[part];
    for (int block = 0; block < x.blocks(); ++block, weight += c.taps * tap_stride) {
      const int channels = smaller(kBlock, x.channels - block * kBlock);
      const float* corner = x.at(image, block, row * c.stride, column * c.stride);
      for (int ky = 0; ky < c.kernel; ++ky)
        for (int kx = 0; kx < c.kernel; ++kx)
          multiply(sums, corner + ky * x.row_stride + kx * kBlock, kBlock * c.stride,
                   weight + (ky * c.kernel + kx) * tap_stride, group, channels);
    }
  }
  UNROLL
  for (int v = 0; v < VECTORS; ++v) {
    int block = (output + v * kLanes) / kBlock;
    const View& y = part_of(c.output, block);
    float* out = y.at(image, block, row, column * c.output_step) + (output + v * kLanes) % kBlock;
    const float* const positive =
        c.mask.data != nullptr ? c.mask.at(image, block, row, column) + (output + v * kLanes) % kBlock : nullptr;
    UNROLL
    for (int pixel = 0; pixel < PIXELS; ++pixel) {
      vec value = c.relu ? maximum(sums[pixel][v], vec{}) : sums[pixel][v];
      if (positive != nullptr) value = load(positive + pixel * kBlock) > vec{} ? value : vec{};
      store(out + pixel * kBlock * c.output_step, value);
    }
  }
}

template <int VECTORS>
struct Segment {
  template <int PIXELS>
  static void run(const Convolution& c, int group, int image, int row, int column, int output) {
    convolve_segment<PIXELS, VECTORS>(c, group, image, row, column, output);
  }
};

constexpr int kRowsPerTask = 4;

// Convolutions of the same input to outputs of the same sizes, one after the other on each band of rows, which stays in
// a thread's L2.
void convolve(const Convolution* convolutions, int count) {
  static constexpr ByPixels<Segment<kTileVectors>, kTilePixels> wide_segments;
  static constexpr ByPixels<Segment<kNarrowVectors>, kNarrowPixels> narrow_segments;
  const Channels& output = convolutions->output;
  const int outputs = output.blocks() * kBlock, group = group_width(outputs);
  const int height = output.part[0].height, width = output.part[0].width;
  const bool narrow = group < kTileOutputs;
  const int tile_outputs = narrow ? kBlock : kTileOutputs;
  const int tiles = outputs / tile_outputs, bands = ceil_div(height, kRowsPerTask);
  const int pieces = ceil_div(width, narrow ? kNarrowPixels : kTilePixels);
  parallel(output.part[0].images * bands * tiles, [&](int task, int) {
    const int first_output = task % tiles * tile_outputs, band = task / tiles % bands, image = task / tiles / bands;
    const int end = smaller(height, (band + 1) * kRowsPerTask);
    for (int i = 0; i < count; ++i)
      for (int row = band * kRowsPerTask; row < end; ++row)
        for (int piece = 0; piece < pieces; ++piece) {  // of equal width, give or take a pixel
          const int begin = run_begin(width, piece, pieces), pixels = run_begin(width, piece + 1, pieces) - begin;
          const auto segment = narrow ? narrow_segments[pixels] : wide_segments[pixels];
          segment(convolutions[i], group, image, row, begin, first_output);
        }
  });
}

// The transpose of kLanes x kLanes values: in log2(kLanes) steps, of which each swaps the halves of larger squares.
INLINE void transpose_square(vec (&rows)[kLanes]) {
  UNROLL
  for (int step = 1; step < kLanes; step *= 2) {
    int_vec upper, lower;  // which of the lanes of a pair of rows, counted through both
    UNROLL
    for (int lane = 0; lane < kLanes; ++lane) {
      upper[lane] = (lane & step) != 0 ? kLanes + lane - step : lane;
      lower[lane] = (lane & step) != 0 ? kLanes + lane : lane + step;
    }
    UNROLL
    for (int row = 0; row < kLanes; ++row)
      if ((row & step) == 0) {
        const vec first = rows[row], second = rows[row + step];
        rows[row] = shuffle(first, second, upper);
        rows[row + step] = shuffle(first, second, lower);
      }
  }
}

// weight [out / G][in / 16][taps][16][G] -> transposed [in / G'][out / 16][taps][16][G'], taps reversed where
// `reverse`.
void transpose_weight(const float* weight, int inputs, int outputs, int taps, bool reverse, float* transposed) {
  const int group = group_width(outputs), transposed_group = group_width(inputs);
  const int in_blocks = inputs / kBlock, out_blocks = outputs / kBlock;
  parallel(in_blocks * out_blocks, [&](int task, int) {
    const int input = task / out_blocks * kBlock, output = task % out_blocks * kBlock;
    for (int tap = 0; tap < taps; ++tap) {
      const float* const source =
          weight +
          ((static_cast<ptrdiff_t>(output / group) * in_blocks + input / kBlock) * taps + tap) * kBlock * group +
          output % group;
      float* const target = transposed +
                            ((static_cast<ptrdiff_t>(input / transposed_group) * out_blocks + output / kBlock) * taps +
                             (reverse ? taps - 1 - tap : tap)) *
                                kBlock * transposed_group +
                            input % transposed_group;
      for (int i = 0; i < kBlock; i += kLanes)
        for (int o = 0; o < kBlock; o += kLanes) {
          vec rows[kLanes];
          UNROLL
          for (int lane = 0; lane < kLanes; ++lane) rows[lane] = load(source + (i + lane) * group + o);
          transpose_square(rows);
          UNROLL
          for (int lane = 0; lane < kLanes; ++lane) store(target + (o + lane) * transposed_group + i, rows[lane]);
        }
    }
  });
}

}  // namespace
}  // namespace fastunet

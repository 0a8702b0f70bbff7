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
  const float* weight = nullptr;  // [out / group][in][taps][group]
  Channels output;
  int kernel = 3, stride = 1;
  int taps = 9, first_tap = 0;  // of the layout, and where this convolution's kernel begins in it
  const float* bias = nullptr;
  bool relu = false;
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
  const ptrdiff_t channel_stride = static_cast<ptrdiff_t>(c.taps) * group;
  const float* weight = c.weight + static_cast<ptrdiff_t>(output / group) * group * c.taps * c.input.blocks() * kBlock +
                        static_cast<ptrdiff_t>(c.first_tap) * group + output % group;
  for (int part = 0; part < c.input.count; ++part) {
    const View& x = c.input.part[part];
    for (int block = 0; block < x.blocks(); ++block, weight += kBlock * channel_stride) {
      const int channels = smaller(kBlock, x.channels - block * kBlock);
      const float* corner = x.at(image, block, row * c.stride, column * c.stride);
      for (int ky = 0; ky < c.kernel; ++ky)
        for (int kx = 0; kx < c.kernel; ++kx)
          multiply(sums, corner + ky * x.row_stride + kx * kBlock, kBlock * c.stride,
                   weight + (ky * c.kernel + kx) * group, channel_stride, channels);
    }
  }
  UNROLL
  for (int v = 0; v < VECTORS; ++v) {
    int block = (output + v * kLanes) / kBlock;
    const View& y = part_of(c.output, block);
    float* out = y.at(image, block, row, column * c.output_step) + (output + v * kLanes) % kBlock;
    UNROLL
    for (int pixel = 0; pixel < PIXELS; ++pixel) {
      const vec value = c.relu ? maximum(sums[pixel][v], vec{}) : sums[pixel][v];
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

void convolve(const Convolution& c) {
  static constexpr ByPixels<Segment<kTileVectors>, kTilePixels> wide_segments;
  static constexpr ByPixels<Segment<kNarrowVectors>, kNarrowPixels> narrow_segments;
  const int outputs = c.output.blocks() * kBlock, group = group_width(outputs);
  const int height = c.output.part[0].height, width = c.output.part[0].width;
  const bool narrow = group < kTileOutputs;
  const int tile_outputs = narrow ? kBlock : kTileOutputs;
  const int tiles = outputs / tile_outputs, bands = ceil_div(height, kRowsPerTask);
  const int pieces = ceil_div(width, narrow ? kNarrowPixels : kTilePixels);
  parallel(c.output.part[0].images * bands * tiles, [&](int task, int) {
    const int output = task % tiles * tile_outputs, band = task / tiles % bands, image = task / tiles / bands;
    const int end = smaller(height, (band + 1) * kRowsPerTask);
    for (int row = band * kRowsPerTask; row < end; ++row)
      for (int piece = 0; piece < pieces; ++piece) {  // of equal width, give or take a pixel
        const int begin = run_begin(width, piece, pieces), pixels = run_begin(width, piece + 1, pieces) - begin;
        const auto segment = narrow ? narrow_segments[pixels] : wide_segments[pixels];
        segment(c, group, image, row, begin, output);
      }
  });
}

// weight [out / G][in][taps][G] -> transposed [in / G'][out][taps][G'], taps reversed where `reverse`.
void transpose_weight(const float* weight, int inputs, int outputs, int taps, bool reverse, float* transposed) {
  const int group = group_width(outputs), transposed_group = group_width(inputs);
  parallel(inputs / transposed_group * (outputs / kBlock), [&](int task, int) {
    const int input_group = task / (outputs / kBlock), output_block = task % (outputs / kBlock);
    for (int o = output_block * kBlock; o < (output_block + 1) * kBlock; ++o)
      for (int tap = 0; tap < taps; ++tap) {
        float* target =
            transposed + ((static_cast<ptrdiff_t>(input_group) * outputs + o) * taps + tap) * transposed_group;
        const float* source = weight +
                              ((static_cast<ptrdiff_t>(o / group) * inputs + input_group * transposed_group) * taps +
                               (reverse ? taps - 1 - tap : tap)) *
                                  group +
                              o % group;
        for (int i = 0; i < transposed_group; ++i) target[i] = source[static_cast<ptrdiff_t>(i) * taps * group];
      }
  });
}

}  // namespace
}  // namespace fastunet

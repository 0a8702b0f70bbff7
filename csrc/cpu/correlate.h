// Direct weight gradient: weight_gradient[in][tap][out] += sum over pixels x[pixel of the tap][in] *
// g[pixel][out]. One task owns an input block, an output tile and a row of taps and adds in a fixed order:
// the result does not depend on the number of threads.
//
// Cost: 2 * in * out * K * K FLOPs a pixel; bands of rows keep x and g in L2 over the taps of a task.
#pragma once

#include "micro_kernels.h"

namespace fastunet {
namespace {

struct Correlation {
  Channels input;
  View gradient;
  int kernel = 3;
  bool taps_move_input = true;  // a convolution; false: an up-convolution, whose taps move the gradient
  int gradient_stride = 1;
  float* weight_gradient = nullptr;  // [out / G][in / 16][kernel * kernel][16][G]

  int height() const { return gradient.height / gradient_stride; }  // of the pixels summed over
  int width() const { return gradient.width / gradient_stride; }
};

// Which pixels one call sums, for `CHANNELS` input channels from `channel` on and the tile of outputs from
// `output` on.
struct Band {
  int image, first_row, last_row, ky, kx, block, channel, output;
};

template <int CHANNELS, int VECTORS>
void correlate_band(const Correlation& c, const View& x, const Band& b, float* target, ptrdiff_t channel_stride) {
  vec sums[CHANNELS][VECTORS];
  UNROLL
  for (int i = 0; i < CHANNELS; ++i) {
    UNROLL
    for (int v = 0; v < VECTORS; ++v) sums[i][v] = vec{};
  }
  const int xy = c.taps_move_input ? b.ky : 0, xx = c.taps_move_input ? b.kx : 0;
  const int gy = b.ky - xy, gx = b.kx - xx;
  for (int row = b.first_row; row < b.last_row; ++row)
    outer_product(sums, x.at(b.image, b.block, row + xy, xx) + b.channel, kBlock,
                  c.gradient.at(b.image, b.output / kBlock, row * c.gradient_stride + gy, gx),
                  kBlock * c.gradient_stride, c.gradient.block_stride, c.width());
  UNROLL
  for (int i = 0; i < CHANNELS; ++i) {
    UNROLL
    for (int v = 0; v < VECTORS; ++v) {
      float* p = target + i * channel_stride + v * kLanes;
      store(p, load(p) + sums[i][v]);
    }
  }
}

// All channels of a block, in register tiles of kOuterChannels and, for what remains, fewer.
template <int VECTORS>
void correlate_block(const Correlation& c, const View& x, Band b, float* target, ptrdiff_t channel_stride) {
  const int channels = smaller(kBlock, x.channels - b.block * kBlock);
  while (b.channel < channels) {
    const int left = channels - b.channel;
    float* const p = target + b.channel * channel_stride;
    if (left >= kOuterChannels) {
      correlate_band<kOuterChannels, VECTORS>(c, x, b, p, channel_stride);
      b.channel += kOuterChannels;
    } else if (left >= 2) {
      correlate_band<2, VECTORS>(c, x, b, p, channel_stride);
      b.channel += 2;
    } else {
      correlate_band<1, VECTORS>(c, x, b, p, channel_stride);
      b.channel += 1;
    }
  }
}

constexpr int kRowsPerBand = 8;

void correlate(const Correlation& c) {
  const int outputs = c.gradient.blocks() * kBlock;
  const int group = group_width(outputs);
  const bool narrow = group < kTileOutputs;
  const int tile_outputs = narrow ? kBlock : kTileOutputs;
  const int tiles = outputs / tile_outputs, blocks = c.input.blocks(), taps = c.kernel * c.kernel;
  const ptrdiff_t tap_stride = static_cast<ptrdiff_t>(kBlock) * group;
  parallel(blocks * tiles * c.kernel, [&](int task, int) {
    Band b{};
    b.ky = task % c.kernel;
    b.output = task / c.kernel % tiles * tile_outputs;
    const int input_block = task / c.kernel / tiles;
    b.block = input_block;
    const View& x = part_of(c.input, b.block);
    float* const corner = c.weight_gradient + b.output % group +
                          (static_cast<ptrdiff_t>(b.output / group) * blocks + input_block) * taps * tap_stride;
    for (b.image = 0; b.image < c.gradient.images; ++b.image)
      for (b.first_row = 0; b.first_row < c.height(); b.first_row += kRowsPerBand) {
        b.last_row = smaller(c.height(), b.first_row + kRowsPerBand);
        for (b.kx = 0; b.kx < c.kernel; ++b.kx) {
          float* const target = corner + (b.ky * c.kernel + b.kx) * tap_stride;
          if (narrow) {
            correlate_block<kNarrowVectors>(c, x, b, target, group);
          } else {
            correlate_block<kTileVectors>(c, x, b, target, group);
          }
        }
      }
  });
}

}  // namespace
}  // namespace fastunet

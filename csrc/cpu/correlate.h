// Direct weight gradient: weight_gradient[in][tap][out] += sum over pixels x[pixel of the tap][in] *
// g[pixel][out]. Layers of few weights are cut into slots of rows, each with sums of its own that stay in a thread's L2
// while the pixels come by once; of the others a task owns an input block, an output tile and a row of taps. Either way
// all is added in an order that does not depend on the number of threads.
//
// Cost: 2 * in * out * K * K FLOPs a pixel; bands of rows keep x and g in L2 over the taps.
#pragma once

#include "../memory.h"
#include "micro_kernels.h"
#include "slots.h"

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

// The 9 taps of one input channel at once: enough sums to keep the multipliers busy where there are few channels.
template <int VECTORS>
void correlate_channel(const Correlation& c, const View& x, const Band& b, float* target, int group) {
  vec sums[9][VECTORS];
  UNROLL
  for (int tap = 0; tap < 9; ++tap) {
    UNROLL
    for (int v = 0; v < VECTORS; ++v) sums[tap][v] = vec{};
  }
  for (int row = b.first_row; row < b.last_row; ++row) {
    const float* const pixel = x.at(b.image, b.block, row, 0) + b.channel;
    const float* const g = c.gradient.at(b.image, b.output / kBlock, row, 0) + b.output % kBlock;
    for (int column = 0; column < c.width(); ++column) {
      vec gradient[VECTORS];
      UNROLL
      for (int v = 0; v < VECTORS; ++v)
        gradient[v] = load(g + column * kBlock + v * kLanes / kBlock * c.gradient.block_stride + v * kLanes % kBlock);
      UNROLL
      for (int tap = 0; tap < 9; ++tap) {
        const vec value = broadcast(pixel[tap / 3 * x.row_stride + (column + tap % 3) * kBlock]);
        UNROLL
        for (int v = 0; v < VECTORS; ++v) sums[tap][v] += value * gradient[v];
      }
    }
  }
  UNROLL
  for (int tap = 0; tap < 9; ++tap) {
    UNROLL
    for (int v = 0; v < VECTORS; ++v) {
      float* const p = target + tap * kBlock * group + v * kLanes;
      store(p, load(p) + sums[tap][v]);
    }
  }
}

constexpr int kFewChannels = 4;
constexpr int kTapVectors = kLanes == 16 ? 2 : 1;

// All channels of a block and the taps of a row of the kernel (of few channels, all taps): `target` is the block's.
template <int VECTORS>
void correlate_block(const Correlation& c, const View& x, Band b, float* target, int group) {
  const int channels = smaller(kBlock, x.channels - b.block * kBlock);
  float* const of_row = target + b.ky * c.kernel * kBlock * group;
  for (b.kx = 0; b.kx < c.kernel; ++b.kx)
    for (b.channel = 0; b.channel < channels;) {
      float* const p = of_row + (b.kx * kBlock + b.channel) * group;
      if (channels - b.channel >= kOuterChannels) {
        correlate_band<kOuterChannels, VECTORS>(c, x, b, p, group);
        b.channel += kOuterChannels;
      } else if (channels - b.channel >= 2) {
        correlate_band<2, VECTORS>(c, x, b, p, group);
        b.channel += 2;
      } else {
        correlate_band<1, VECTORS>(c, x, b, p, group);
        b.channel += 1;
      }
    }
}

constexpr int kRowsPerBand = 4, kMostRowSlots = 16;
constexpr size_t kSlotSumsLimit = size_t{600} << 10;

void correlate(const Correlation& c) {
  const int outputs = c.gradient.blocks() * kBlock, group = group_width(outputs);
  const bool narrow = group < kTileOutputs;
  const int tile_outputs = narrow ? kBlock : kTileOutputs;
  const int tiles = outputs / tile_outputs, blocks = c.input.blocks(), taps = c.kernel * c.kernel;
  const ptrdiff_t block_floats = static_cast<ptrdiff_t>(taps) * kBlock * group;
  const bool few = c.kernel == 3 && c.taps_move_input && c.gradient_stride == 1 && c.input.count == 1 &&
                   c.input.part[0].channels <= kFewChannels;
  // Where the sums of a block of inputs and a tile of outputs lie.
  const auto corner = [&](float* sums, int block, int output) {
    return sums + (static_cast<ptrdiff_t>(output / group) * blocks + block) * block_floats + output % group;
  };
  const auto sum = [&](Band b, int input_block, float* sums) {
    float* const target = corner(sums, input_block, b.output);
    b.block = input_block;
    const View& x = part_of(c.input, b.block);
    narrow ? correlate_block<kNarrowVectors>(c, x, b, target, group)
           : correlate_block<kTileVectors>(c, x, b, target, group);
  };

  const int bands = ceil_div(c.height(), kRowsPerBand), all_bands = c.gradient.images * bands;
  const auto band_of = [&](int index) {
    Band b{};
    b.image = index / bands;
    b.first_row = index % bands * kRowsPerBand;
    b.last_row = smaller(c.height(), b.first_row + kRowsPerBand);
    return b;
  };
  const ptrdiff_t weights = static_cast<ptrdiff_t>(outputs / group) * blocks * block_floats;
  if (few || weights * sizeof(float) <= kSlotSumsLimit) {
    const int slots = smaller(kMostRowSlots, all_bands);
    float* const slot_sums = scratch(kGradientTiles, slots * weights);
    parallel(slots, [&](int slot, int) {
      float* const sums = slot_sums + slot * weights;
      for (ptrdiff_t i = 0; i < weights; ++i) sums[i] = 0;
      for (int index = run_begin(all_bands, slot, slots); index < run_begin(all_bands, slot + 1, slots); ++index) {
        Band b = band_of(index);
        if (few) {
          for (b.output = 0; b.output < outputs; b.output += smaller(group, kTapVectors * kLanes))
            for (b.channel = 0; b.channel < c.input.part[0].channels; ++b.channel)
              group < kTapVectors* kLanes
                  ? correlate_channel<1>(c, c.input.part[0], b, corner(sums, 0, b.output) + b.channel * group, group)
                  : correlate_channel<kTapVectors>(c, c.input.part[0], b, corner(sums, 0, b.output) + b.channel * group,
                                                   group);
          continue;
        }
        for (b.output = 0; b.output < outputs; b.output += tile_outputs)
          for (int block = 0; block < blocks; ++block)
            for (b.ky = 0; b.ky < c.kernel; ++b.ky) sum(b, block, sums);
      }
    });
    add_slots(slot_sums, slots, weights, c.weight_gradient);
    return;
  }
  parallel(blocks * tiles * c.kernel, [&](int task, int) {
    for (int index = 0; index < all_bands; ++index) {
      Band b = band_of(index);
      b.ky = task % c.kernel;
      b.output = task / c.kernel % tiles * tile_outputs;
      sum(b, task / c.kernel / tiles, c.weight_gradient);
    }
  });
}

}  // namespace
}  // namespace fastunet

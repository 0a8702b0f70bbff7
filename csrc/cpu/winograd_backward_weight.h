// Winograd weight gradient: dg = G^T [ sum over tiles of (B^T d B) (A dY A^T) ] G, for each pair of a block of 16
// inputs and a group of outputs. Two schedules, both adding in an order that does not depend on the number of threads:
// - layers of few channels are cut into slots of tiles; the thread that takes a slot transforms a run of tiles at a
//   time into its L2 and adds all products to the slot's own sums, which are added up and transformed back at the end;
// - layers of many channels share the transformed tiles of a long run through L3, and a thread sums all of a pair at
//   once.
#pragma once

#include "../memory.h"
#include "micro_kernels.h"
#include "winograd_tiles.h"

namespace fastunet {
namespace {

// target[in][out] += sum over tiles of v[tile][in] * d[tile][out]
template <int CHANNELS, int VECTORS>
void multiply_transposed(const float* v, const float* d, ptrdiff_t d_block_stride, int tiles, float* target,
                         int group) {
  vec sums[CHANNELS][VECTORS];
  UNROLL
  for (int i = 0; i < CHANNELS; ++i) {
    UNROLL
    for (int o = 0; o < VECTORS; ++o) sums[i][o] = load(target + i * group + o * kLanes);
  }
  outer_product(sums, v, kBlock, d, kBlock, d_block_stride, tiles);
  UNROLL
  for (int i = 0; i < CHANNELS; ++i) {
    UNROLL
    for (int o = 0; o < VECTORS; ++o) store(target + i * group + o * kLanes, sums[i][o]);
  }
}

struct WinogradBackwardWeight {
  const Channels& input;
  const View& gradient;
  Tiling tiling;
  int group, in_blocks, out_blocks;

  int pairs() const { return out_blocks * kBlock / group * in_blocks; }
  ptrdiff_t pair_floats() const { return static_cast<ptrdiff_t>(kFrequencies) * kBlock * group; }

  // Block `block` of the inputs into v, or, counting on, of the gradient into d: `tiles` tiles from `first` on.
  void transform_block(int block, int first, int tiles, float* v, float* d) const {
    if (block < in_blocks) {
      float* const target = v + static_cast<ptrdiff_t>(block) * tiles * kBlock;
      const View& x = part_of(input, block);
      transform_tiles<kFootprint, transform_input_line>(x, block, tiling, first, tiles, target,
                                                        frequency_stride(in_blocks, tiles));
    } else {
      block -= in_blocks;
      float* const target = d + static_cast<ptrdiff_t>(block) * tiles * kBlock;
      transform_tiles<kTile, transform_gradient_line>(gradient, block, tiling, first, tiles, target,
                                                      frequency_stride(out_blocks, tiles));
    }
  }

  // sums [frequency][16 inputs][group] += the products of a run's v and d
  void add_products(int pair, const float* v, const float* d, int tiles, float* sums) const {
    const int index = pair / in_blocks, block = pair % in_blocks;
    const bool narrow = group < kTileOutputs;
    const int tile_outputs = narrow ? kBlock : kTileOutputs;
    const ptrdiff_t block_floats = static_cast<ptrdiff_t>(tiles) * kBlock;
    for (int frequency = 0; frequency < kFrequencies; ++frequency)
      for (int output = 0; output < group; output += tile_outputs) {
        const float* const x = v + frequency * frequency_stride(in_blocks, tiles) + block * block_floats;
        const float* const g =
            d + frequency * frequency_stride(out_blocks, tiles) + (index * group + output) / kBlock * block_floats;
        float* const target = sums + static_cast<ptrdiff_t>(frequency) * kBlock * group + output;
        for (int channel = 0; channel < kBlock; channel += kOuterChannels) {
          const auto multiply = narrow ? multiply_transposed<kOuterChannels, kNarrowVectors>
                                       : multiply_transposed<kOuterChannels, kTileVectors>;
          multiply(x + channel, g, block_floats, tiles, target + channel * group, group);
        }
      }
  }

  // weight_gradient += G^T sums G
  void add_transformed_back(int pair, const float* sums, float* weight_gradient) const {
    float* target = weight_gradient + static_cast<ptrdiff_t>(pair) * kBlock * 9 * group;
    const ptrdiff_t stride = static_cast<ptrdiff_t>(kBlock) * group;
    for (int channel = 0; channel < kBlock; ++channel, target += 9 * group)
      for (int output = 0; output < group; output += kLanes)
        transform<kFootprint, 3, transform_weight_gradient_line>(
            sums + channel * group + output, kFootprint * stride, stride, [&](int r, int c, vec value) {
              float* const p = target + (r * 3 + c) * group + output;
              store(p, load(p) + value);
            });
  }
};

constexpr int kMostSlots = 64, kFewestSlots = 4;
constexpr int kFewestSlotTiles = 24;                      // below, clearing and adding up the slots' sums would show
constexpr size_t kSlotsLimit = size_t{16} << 20;          // the sums of all slots together
constexpr size_t kPrivateRunLimit = size_t{600} << 10;    // V and D of a thread's run in its L2
constexpr size_t kGradientTilesLimit = size_t{12} << 20;  // V and D of a shared run in L3
constexpr int kFewestGradientTiles = 160;                 // of a shared run: below, transforming back would show

void winograd_backward_weight(const Channels& input, const View& gradient, float* weight_gradient) {
  const int in_blocks = input.blocks(), out_blocks = gradient.blocks(), blocks = in_blocks + out_blocks;
  const WinogradBackwardWeight conv{
      input,     gradient,  Tiling(gradient.images, gradient.height, gradient.width), group_width(gradient.channels),
      in_blocks, out_blocks};
  const int count = conv.tiling.count, pairs = conv.pairs();
  const ptrdiff_t pair_floats = conv.pair_floats(), slot_floats = pairs * pair_floats;
  const size_t tile_bytes = size_t{kFrequencies} * blocks * kBlock * sizeof(float);

  const int slots = smaller(smaller(kMostSlots, count / kFewestSlotTiles),
                            static_cast<int>(kSlotsLimit / (slot_floats * sizeof(float))));
  if (slots >= kFewestSlots) {
    const int limit = larger(8, static_cast<int>(kPrivateRunLimit / tile_bytes));
    const int runs = larger(slots, ceil_div(count, limit)), most = ceil_div(count, runs);
    const ptrdiff_t v_floats = kFrequencies * frequency_stride(in_blocks, most);
    const ptrdiff_t thread_floats = v_floats + kFrequencies * frequency_stride(out_blocks, most);
    float* const threads = scratch(kPerThread, thread_floats * thread_count());
    float* const slot_sums = scratch(kGradientTiles, slots * slot_floats);
    parallel(slots, [&](int slot, int thread) {
      float* const sums = slot_sums + slot * slot_floats;
      float* const v = threads + thread * thread_floats;
      float* const d = v + v_floats;
      for (ptrdiff_t i = 0; i < slot_floats; ++i) sums[i] = 0;
      for (int run = run_begin(runs, slot, slots); run < run_begin(runs, slot + 1, slots); ++run) {
        const int first = run_begin(count, run, runs), tiles = run_begin(count, run + 1, runs) - first;
        for (int block = 0; block < blocks; ++block) conv.transform_block(block, first, tiles, v, d);
        for (int pair = 0; pair < pairs; ++pair) conv.add_products(pair, v, d, tiles, sums + pair * pair_floats);
      }
    });
    constexpr int kChunk = 4096;
    parallel(ceil_div(static_cast<int>(slot_floats), kChunk), [&](int task, int) {
      const ptrdiff_t begin = static_cast<ptrdiff_t>(task) * kChunk;
      const ptrdiff_t end = begin + kChunk < slot_floats ? begin + kChunk : slot_floats;
      for (int slot = 1; slot < slots; ++slot)
        for (ptrdiff_t i = begin; i < end; ++i) slot_sums[i] += slot_sums[slot * slot_floats + i];
    });
    parallel(pairs,
             [&](int pair, int) { conv.add_transformed_back(pair, slot_sums + pair * pair_floats, weight_gradient); });
    return;
  }
  const int limit = larger(kFewestGradientTiles, static_cast<int>(kGradientTilesLimit / tile_bytes));
  const int runs = ceil_div(count, limit), most = ceil_div(count, runs);
  float* const v = scratch(kInputTiles, kFrequencies * frequency_stride(in_blocks, most));
  float* const d = scratch(kGradientTiles, kFrequencies * frequency_stride(out_blocks, most));
  float* const threads = scratch(kPerThread, pair_floats * thread_count());
  for (int run = 0; run < runs; ++run) {
    const int first = run_begin(count, run, runs), tiles = run_begin(count, run + 1, runs) - first;
    parallel(blocks, [&](int block, int) { conv.transform_block(block, first, tiles, v, d); });
    parallel(pairs, [&](int pair, int thread) {
      float* const sums = threads + thread * pair_floats;
      for (ptrdiff_t i = 0; i < pair_floats; ++i) sums[i] = 0;
      conv.add_products(pair, v, d, tiles, sums);
      conv.add_transformed_back(pair, sums, weight_gradient);
    });
  }
}

}  // namespace
}  // namespace fastunet

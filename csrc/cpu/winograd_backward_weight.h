// Winograd weight gradient: dg = G^T [ sum over tiles of (B^T d B) (A dY A^T) ] G. Two schedules, both adding in an
// order that does not depend on the number of threads:
// - layers of few channels are cut into slots of patches; the thread that takes a slot transforms a patch at a time and
//   adds all products to the slot's own sums, which are added up and transformed back at the end;
// - layers of many channels share the transformed tiles of a large patch through L3, and a task sums all of a chunk of
//   inputs and a group of outputs at once.
// The bias gradient is summed from the pixels as they are transformed.
#pragma once

#include "../memory.h"
#include "micro_kernels.h"
#include "slots.h"
#include "winograd_tiles.h"

namespace fastunet {
namespace {

// target[in][out] = or += sum over tiles of v[tile][in] * d[tile][out]
template <int CHANNELS, int VECTORS>
void multiply_transposed(const float* v, const float* d, ptrdiff_t d_block_stride, int tiles, float* target, int group,
                         bool add) {
  vec sums[CHANNELS][VECTORS];
  if (add) {
    UNROLL
    for (int i = 0; i < CHANNELS; ++i) {
      UNROLL
      for (int o = 0; o < VECTORS; ++o) sums[i][o] = load(target + i * group + o * kLanes);
    }
  } else {
    UNROLL
    for (int i = 0; i < CHANNELS; ++i) {
      UNROLL
      for (int o = 0; o < VECTORS; ++o) sums[i][o] = vec{};
    }
  }
  outer_product(sums, v, kBlock, d, kBlock, d_block_stride, tiles);
  UNROLL
  for (int i = 0; i < CHANNELS; ++i) {
    UNROLL
    for (int o = 0; o < VECTORS; ++o) store(target + i * group + o * kLanes, sums[i][o]);
  }
}

template <int T>
struct WinogradBackwardWeight {
  using W = Winograd<T>;
  const Channels& input;
  const View& gradient;
  int group, in_blocks, out_blocks;

  WinogradBackwardWeight(const Channels& input, const View& gradient)
      : input(input),
        gradient(gradient),
        group(group_width(gradient.channels)),
        in_blocks(input.blocks()),
        out_blocks(gradient.blocks()) {}

  int groups() const { return out_blocks * kBlock / group; }
  ptrdiff_t first_layer_floats_of(const Tiling& tiling) const {
    return input.first_layer != nullptr ? first_layer_floats<T>(tiling.patch_rows, tiling.patch_columns) : 0;
  }
  ptrdiff_t v_stride(int tiles) const { return plane_stride(static_cast<ptrdiff_t>(tiles) * in_blocks * kBlock); }
  ptrdiff_t d_stride(int tiles) const { return plane_stride(static_cast<ptrdiff_t>(tiles) * out_blocks * kBlock); }
  ptrdiff_t sums_stride(int blocks) const { return plane_stride(static_cast<ptrdiff_t>(blocks) * kBlock * group); }
  size_t tile_bytes() const { return size_t{W::kFrequencies} * (in_blocks + out_blocks) * kBlock * sizeof(float); }

  // Block `block` of the inputs into v, or, counting on, of the gradient into d, whose sum is added to bias_gradient.
  void transform_block(const Patch& patch, int block, float* v, float* d, float* bias_gradient,
                       float* first_layer) const {
    const int tiles = patch.count();
    if (block < in_blocks) {
      int of_part = block;
      const View& x = block_of<T>(input, patch, of_part, first_layer);
      transform_tiles<W, W::kFootprint, W::input_pair>(x, of_part, patch, tiles, in_blocks, block, v, v_stride(tiles));
    } else {
      block -= in_blocks;
      transform_tiles<W, T, W::gradient_pair>(gradient, block, patch, tiles, out_blocks, block, d, d_stride(tiles));
      add_pixels(patch, block, bias_gradient + block * kBlock);
    }
  }

  void add_pixels(const Patch& patch, int block, float* sum) const {
    vec sums[kVectors];
    UNROLL
    for (int v = 0; v < kVectors; ++v) sums[v] = load(sum + v * kLanes);
    const int bottom = smaller(gradient.height, (patch.row + patch.rows) * T);
    const int right = smaller(gradient.width, (patch.column + patch.columns) * T);
    for (int row = patch.row * T; row < bottom; ++row) {
      const float* g = gradient.at(patch.image, block, row, patch.column * T);
      for (int column = patch.column * T; column < right; ++column, g += kBlock) {
        UNROLL
        for (int v = 0; v < kVectors; ++v) sums[v] += load(g + v * kLanes);
      }
    }
    UNROLL
    for (int v = 0; v < kVectors; ++v) store(sum + v * kLanes, sums[v]);
  }

  // sums: planes of [`blocks` * 16 inputs][group] = or += the products of a patch's v and d
  template <class Between>
  void multiply_group(int index, int first_block, int blocks, const float* v, const float* d, int tiles, float* sums,
                      bool add, bool shared, const Between& between) const {
    const bool narrow = group < kTileOutputs;
    const int tile_outputs = narrow ? kBlock : kTileOutputs;
    const ptrdiff_t block_floats = static_cast<ptrdiff_t>(tiles) * kBlock;
    const auto multiply = narrow ? multiply_transposed<kOuterChannels, kNarrowVectors>
                                 : multiply_transposed<kOuterChannels, kTileVectors>;
    // Of a shared patch the next frequency is asked for while one is multiplied: what it reads lies together.
    const int calls = group / tile_outputs * ceil_div(blocks * kBlock, kOuterChannels);
    const int v_share = shared ? ceil_div(blocks * tiles, calls) : 0;
    const int d_share = shared ? ceil_div(group / kBlock * tiles, calls) : 0;
    for (int frequency = 0; frequency < W::kFrequencies; ++frequency) {
      const float* next_v = v + (frequency + 1) * v_stride(tiles) + first_block * block_floats;
      const float* next_d = d + (frequency + 1) * d_stride(tiles) + index * group / kBlock * block_floats;
      for (int output = 0; output < group; output += tile_outputs) {
        const float* const x = v + frequency * v_stride(tiles) + first_block * block_floats;
        const float* const g = d + frequency * d_stride(tiles) + (index * group + output) / kBlock * block_floats;
        float* const target = sums + frequency * sums_stride(blocks) + output;
        for (int channel = 0; channel < blocks * kBlock; channel += kOuterChannels) {
          between();
          for (int i = 0; i < v_share; ++i, next_v += kBlock) __builtin_prefetch(next_v, 0, 2);
          for (int i = 0; i < d_share; ++i, next_d += kBlock) __builtin_prefetch(next_d, 0, 2);
          multiply(x + channel / kBlock * block_floats + channel % kBlock, g, block_floats, tiles,
                   target + static_cast<ptrdiff_t>(channel) * group, group, add);
        }
      }
    }
  }

  // weight_gradient += G^T sums G
  void add_transformed_back(int index, int first_block, int blocks, const float* sums, float* weight_gradient) const {
    const int tap_stride = kBlock * group;
    float* target = weight_gradient + (static_cast<ptrdiff_t>(index) * in_blocks + first_block) * 9 * tap_stride;
    const ptrdiff_t stride = sums_stride(blocks);
    for (int block = 0; block < blocks; ++block, target += 9 * tap_stride, sums += tap_stride)
      for (int i = 0; i < tap_stride; i += kLanes) {
        vec values[3][3];
        contract<W, 3, W::weight_gradient_line>(sums + i, stride, values);
        UNROLL
        for (int tap = 0; tap < 9; ++tap) {
          float* const p = target + tap * tap_stride + i;
          store(p, load(p) + values[tap / 3][tap % 3]);
        }
      }
  }
};

constexpr int kMostSlots = 64, kFewestSlots = 6;
constexpr int kFewestSlotTiles = 250;                    // below, clearing and adding up the slots' sums would show
constexpr size_t kSlotsLimit = size_t{8} << 20;          // the sums of all slots together
constexpr size_t kPrivateRunLimit = size_t{1200} << 10;  // V and D of a thread's patch
constexpr size_t kGradientTilesLimit = size_t{8} << 20;  // V and D of a shared patch in L3
constexpr int kFewestGradientTiles = 160;                // of a shared patch: below, transforming back would show
constexpr int kChunkBlocks = 4;                          // of inputs: a chunk's sums stay in L2

template <int T>
void winograd_backward_weight(const Channels& input, const View& gradient, float* weight_gradient,
                              float* bias_gradient) {
  using W = Winograd<T>;
  const WinogradBackwardWeight<T> conv(input, gradient);
  const int in_blocks = conv.in_blocks, out_blocks = conv.out_blocks, blocks = in_blocks + out_blocks;
  const int groups = conv.groups(), outputs = out_blocks * kBlock;
  const ptrdiff_t group_floats = W::kFrequencies * conv.sums_stride(in_blocks), sums_floats = groups * group_floats;
  const int count = gradient.images * ceil_div(gradient.height, T) * ceil_div(gradient.width, T);

  const int slots = smaller(smaller(kMostSlots, count / kFewestSlotTiles),
                            static_cast<int>(kSlotsLimit / (sums_floats * sizeof(float))));
  if (slots >= kFewestSlots) {
    const int most = larger(8, static_cast<int>(kPrivateRunLimit / conv.tile_bytes()));
    const Tiling tiling(T, gradient.images, gradient.height, gradient.width, smaller(most, count / slots), kTilePixels);
    const ptrdiff_t v_floats = W::kFrequencies * conv.v_stride(tiling.most_tiles());
    const ptrdiff_t d_floats = W::kFrequencies * conv.d_stride(tiling.most_tiles());
    const ptrdiff_t thread_floats = v_floats + d_floats + conv.first_layer_floats_of(tiling);
    float* const threads = scratch(kPerThread, thread_floats * thread_count());
    const ptrdiff_t slot_floats = sums_floats + outputs;  // the bias gradient behind
    float* const slot_sums = scratch(kGradientTiles, slots * slot_floats);
    parallel(slots, [&](int slot, int thread) {
      float* const sums = slot_sums + slot * slot_floats;
      float* const v = threads + thread * thread_floats;
      float* const d = v + v_floats;
      for (int i = 0; i < outputs; ++i) sums[sums_floats + i] = 0;
      const int first = run_begin(tiling.patches(), slot, slots), last = run_begin(tiling.patches(), slot + 1, slots);
      if (first == last)
        for (ptrdiff_t i = 0; i < sums_floats; ++i) sums[i] = 0;
      for (int index = first; index < last; ++index) {
        const Patch patch = tiling[index];
        for (int block = 0; block < blocks; ++block)
          conv.transform_block(patch, block, v, d, sums + sums_floats, d + d_floats);
        const Patch next = index + 1 < last ? tiling[index + 1] : Patch{};
        const Channels of_gradient{{gradient}};
        auto reads = ahead_of<T>(input, next, 2), gradient_reads = ahead_of<T>(of_gradient, next, 0);
        const int calls = groups * W::kFrequencies * (in_blocks * kBlock / kOuterChannels);
        const int share = ceil_div(reads.pixels(), calls), gradient_share = ceil_div(gradient_reads.pixels(), calls);
        for (int g = 0; g < groups; ++g)
          conv.multiply_group(g, 0, in_blocks, v, d, patch.count(), sums + g * group_floats, index > first, false, [&] {
            reads.ask(share);
            gradient_reads.ask(gradient_share);
          });
      }
    });
    add_slots(slot_sums + slot_floats, slots - 1, slot_floats, slot_sums);
    parallel(groups, [&](int g, int) {
      conv.add_transformed_back(g, 0, in_blocks, slot_sums + g * group_floats, weight_gradient);
    });
    for (int i = 0; i < outputs; ++i) bias_gradient[i] += slot_sums[sums_floats + i];
    return;
  }
  const int most = larger(kFewestGradientTiles, static_cast<int>(kGradientTilesLimit / conv.tile_bytes()));
  const Tiling tiling(T, gradient.images, gradient.height, gradient.width, most, most);
  float* const v = scratch(kInputTiles, W::kFrequencies * conv.v_stride(tiling.most_tiles()));
  float* const d = scratch(kGradientTiles, W::kFrequencies * conv.d_stride(tiling.most_tiles()));
  const ptrdiff_t chunk_floats = W::kFrequencies * conv.sums_stride(kChunkBlocks);
  const ptrdiff_t thread_floats = chunk_floats + conv.first_layer_floats_of(tiling);
  float* const threads = scratch(kPerThread, thread_floats * thread_count());
  const int chunks = ceil_div(in_blocks, kChunkBlocks);
  for (int index = 0; index < tiling.patches(); ++index) {
    const Patch patch = tiling[index];
    parallel(blocks, [&](int block, int thread) {
      conv.transform_block(patch, block, v, d, bias_gradient, threads + thread * thread_floats + chunk_floats);
    });
    parallel(chunks * groups, [&](int task, int thread) {
      float* const sums = threads + thread * thread_floats;
      const int g = task % groups, first = task / groups * kChunkBlocks,
                of_chunk = smaller(kChunkBlocks, in_blocks - first);
      conv.multiply_group(g, first, of_chunk, v, d, patch.count(), sums, false, true, [] {});
      conv.add_transformed_back(g, first, of_chunk, sums, weight_gradient);
    });
  }
}

}  // namespace
}  // namespace fastunet

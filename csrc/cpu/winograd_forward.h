// Winograd convolution forward: V = B^T d B, then M = U V for each of the 36 frequencies, then Y = A^T M A. The data
// gradient is the same with other weights. Two schedules: shallow layers give each thread runs of tiles whose V and M
// stay in its L2 while all share the transformed weights; deep layers share V through L3, and each thread takes groups
// of outputs and transforms their weights as it goes.
#pragma once

#include "../memory.h"
#include "micro_kernels.h"
#include "winograd_tiles.h"

namespace fastunet {
namespace {

// U of `inputs` channels of one group of outputs: [in][9][group] -> [frequency][in][group], frequencies
// stride apart.
void transform_weights(const float* weight, int inputs, int group, float* transformed, ptrdiff_t stride) {
  for (int input = 0; input < inputs; ++input, weight += 9 * group, transformed += group)
    for (int output = 0; output < group; output += kLanes)
      transform<3, kFootprint, transform_weight_line>(weight + output, 3 * group, group, [&](int r, int c, vec value) {
        store(transformed + (r * kFootprint + c) * stride + output, value);
      });
}

template <int PIXELS, int VECTORS>
INLINE void multiply_tiles(const float* v, int blocks, ptrdiff_t block_stride, const float* u, int group, float* m) {
  vec sums[PIXELS][VECTORS];
  UNROLL
  for (int p = 0; p < PIXELS; ++p) {
    UNROLL
    for (int i = 0; i < VECTORS; ++i) sums[p][i] = vec{};
  }
  for (int block = 0; block < blocks; ++block, v += block_stride, u += kBlock * group)
    multiply(sums, v, kBlock, u, group, kBlock);
  UNROLL
  for (int p = 0; p < PIXELS; ++p) {
    UNROLL
    for (int i = 0; i < VECTORS; ++i) store(m + p * group + i * kLanes, sums[p][i]);
  }
}

template <int VECTORS>
struct MultiplyTiles {
  template <int PIXELS>
  static void run(const float* v, int blocks, ptrdiff_t block_stride, const float* u, int group, float* m) {
    multiply_tiles<PIXELS, VECTORS>(v, blocks, block_stride, u, group, m);
  }
};

struct WinogradForward {
  const Channels& input;
  const Channels& output;
  const float* bias;
  bool relu;
  Tiling tiling;
  int group, in_blocks;

  // M of one group of outputs for `tiles` tiles: [frequency][tile][group]
  void multiply_group(const float* v, ptrdiff_t v_stride, int tiles, const float* u, float* m) const {
    static constexpr ByPixels<MultiplyTiles<kTileVectors>, kTilePixels> wide_tiles;
    static constexpr ByPixels<MultiplyTiles<kNarrowVectors>, kNarrowPixels> narrow_tiles;
    const bool narrow = group < kTileOutputs;
    const int tile_outputs = narrow ? kBlock : kTileOutputs;
    const int pieces = ceil_div(tiles, narrow ? kNarrowPixels : kTilePixels);
    for (int frequency = 0; frequency < kFrequencies; ++frequency)
      for (int piece = 0; piece < pieces; ++piece) {
        const int begin = run_begin(tiles, piece, pieces), pixels = run_begin(tiles, piece + 1, pieces) - begin;
        const auto multiply = narrow ? narrow_tiles[pixels] : wide_tiles[pixels];
        for (int output_channel = 0; output_channel < group; output_channel += tile_outputs)
          multiply(v + frequency * v_stride + begin * kBlock, in_blocks, static_cast<ptrdiff_t>(tiles) * kBlock,
                   u + static_cast<ptrdiff_t>(frequency) * in_blocks * kBlock * group + output_channel, group,
                   m + frequency * m_stride(tiles) + static_cast<ptrdiff_t>(begin) * group + output_channel);
      }
  }

  ptrdiff_t m_stride(int tiles) const { return frequency_stride(group / kBlock, tiles); }

  void transform_inputs(int first, int tiles, int block, float* v, ptrdiff_t stride) const {
    float* target = v + static_cast<ptrdiff_t>(block) * tiles * kBlock;
    const View& x = part_of(input, block);
    transform_tiles<kFootprint, transform_input_line>(x, block, tiling, first, tiles, target, stride);
  }

  void transform_outputs(int first, int tiles, int group_index, const float* m) const {
    for (int channel = 0; channel < group; channel += kLanes) {
      const int output_channel = group_index * group + channel;
      int block = output_channel / kBlock;
      const View& y = part_of(output, block);
      const vec start = bias != nullptr ? load(bias + output_channel) : vec{};
      const vec floor = relu ? vec{} : broadcast(-__builtin_inff());
      const ptrdiff_t stride = m_stride(tiles);
      for (int tile = 0; tile < tiles; ++tile) {
        int image, row, column;
        tiling.locate(first + tile, image, row, column);
        float* const target = y.at(image, block, row, column) + channel % kBlock;
        const float* const source = m + static_cast<ptrdiff_t>(tile) * group + channel;
        const int rows = tiling.height - row, columns = tiling.width - column;
        if (rows >= kTile && columns >= kTile) {
          transform<kFootprint, kTile, transform_output_line>(
              source, kFootprint * stride, stride, [&](int r, int c, vec value) {
                store(target + r * y.row_stride + c * kBlock, maximum(value + start, floor));
              });
        } else {
          transform<kFootprint, kTile, transform_output_line>(
              source, kFootprint * stride, stride, [&](int r, int c, vec value) {
                if (r < rows && c < columns)
                  store(target + r * y.row_stride + c * kBlock, maximum(value + start, floor));
              });
        }
      }
    }
  }
};

constexpr size_t kSharedWeightsLimit = size_t{10} << 20;  // transformed weights that stay in L3 beside the tiles
constexpr size_t kPrivateTilesLimit = size_t{400} << 10;  // a thread's V in its L2
constexpr size_t kSharedTilesLimit = size_t{12} << 20;    // all threads' V in L3
constexpr int kPrivateTiles = 42;                         // three register tiles

void winograd_forward(const Channels& input, const float* weight, const float* bias, bool relu, const Channels& output,
                      int height, int width) {
  const int outputs = output.blocks() * kBlock, group = group_width(outputs), groups = outputs / group;
  const int in_blocks = input.blocks(), inputs = in_blocks * kBlock;
  const WinogradForward conv{input, output, bias, relu, Tiling(input.part[0].images, height, width), group, in_blocks};
  const int count = conv.tiling.count;
  const ptrdiff_t group_weights = static_cast<ptrdiff_t>(kFrequencies) * inputs * group;
  const size_t tile_bytes = size_t{kFrequencies} * inputs * sizeof(float);

  if (groups * group_weights * sizeof(float) <= kSharedWeightsLimit) {
    // Each thread takes a run of tiles through all three stages; V and M stay in its L2.
    float* const u = scratch(kWeights, groups * group_weights);
    parallel(groups * in_blocks, [&](int task, int) {
      const int index = task / in_blocks, block = task % in_blocks;
      const ptrdiff_t channel = static_cast<ptrdiff_t>(index) * inputs + block * kBlock;
      transform_weights(weight + channel * 9 * group, kBlock, group,
                        u + index * group_weights + static_cast<ptrdiff_t>(block) * kBlock * group,
                        static_cast<ptrdiff_t>(inputs) * group);
    });
    const int limit = smaller(kPrivateTiles, larger(kTilePixels, static_cast<int>(kPrivateTilesLimit / tile_bytes)));
    const int runs = ceil_div(count, limit), most = ceil_div(count, runs);
    const ptrdiff_t v_floats = kFrequencies * frequency_stride(in_blocks, most);
    const ptrdiff_t thread_floats = v_floats + kFrequencies * conv.m_stride(most);
    float* const threads = scratch(kPerThread, thread_floats * thread_count());
    parallel(runs, [&](int run, int thread) {
      float* const v = threads + thread * thread_floats;
      float* const m = v + v_floats;
      const int first = run_begin(count, run, runs);
      const int tiles = run_begin(count, run + 1, runs) - first;
      const ptrdiff_t stride = frequency_stride(in_blocks, tiles);
      for (int block = 0; block < in_blocks; ++block) conv.transform_inputs(first, tiles, block, v, stride);
      for (int index = 0; index < groups; ++index) {
        conv.multiply_group(v, stride, tiles, u + index * group_weights, m);
        conv.transform_outputs(first, tiles, index, m);
      }
    });
    return;
  }
  // Deep layers: the threads share the V of a run of tiles and each takes groups of outputs, transforming
  // their weights as it goes.
  const int limit = larger(4 * kTilePixels, static_cast<int>(kSharedTilesLimit / tile_bytes));
  const int runs = ceil_div(count, limit), most = ceil_div(count, runs);
  const ptrdiff_t thread_floats = group_weights + kFrequencies * conv.m_stride(most);
  float* const v = scratch(kInputTiles, kFrequencies * frequency_stride(in_blocks, most));
  float* const threads = scratch(kPerThread, thread_floats * thread_count());
  for (int run = 0; run < runs; ++run) {
    const int first = run_begin(count, run, runs);
    const int tiles = run_begin(count, run + 1, runs) - first;
    const ptrdiff_t stride = frequency_stride(in_blocks, tiles);
    parallel(in_blocks, [&](int block, int) { conv.transform_inputs(first, tiles, block, v, stride); });
    parallel(groups, [&](int index, int thread) {
      float* const u = threads + thread * thread_floats;
      float* const m = u + group_weights;
      transform_weights(weight + static_cast<ptrdiff_t>(index) * inputs * 9 * group, inputs, group, u,
                        static_cast<ptrdiff_t>(inputs) * group);
      conv.multiply_group(v, stride, tiles, u, m);
      conv.transform_outputs(first, tiles, index, m);
    });
  }
}

}  // namespace
}  // namespace fastunet

// Winograd convolution forward: V = B^T d B, then M = U V for each frequency, then Y = A^T M A. The data gradient is
// the same with other weights. Two schedules: where the transformed weights stay in L3, each thread takes patches of
// tiles whose V and M stay in its L2; deep layers share V through L3, and a thread takes groups of outputs and
// transforms their weights as it goes, a slab of inputs at a time, which stays in its L2.
#pragma once

#include <unistd.h>

#include "../memory.h"
#include "destination.h"
#include "micro_kernels.h"

namespace fastunet {
namespace {

// U of `blocks` blocks of inputs of one group of outputs: [block][K * K][16][group] -> planes of [block][16][group].
template <class W>
void transform_weights(const float* weight, int blocks, int group, float* transformed, ptrdiff_t stride) {
  constexpr int K = W::kKernel;
  const int tap_stride = kBlock * group;
  for (int block = 0; block < blocks; ++block, weight += K * K * tap_stride, transformed += tap_stride)
    for (int i = 0; i < tap_stride; i += kLanes)
      expand<W, K, W::weight_pair>(weight + i, K * tap_stride, tap_stride, transformed + i, stride);
}

// m[tile][output] = or += the sum over blocks of channels of v[block][tile][16] * u[channel][output]; `next` is the v
// of the call after, which is asked for.
template <int VECTORS>
struct MultiplyTiles {
  template <int TILES>
  static void run(const float* v, int blocks, const float* u, int group, float* m, bool add, const float* next) {
    vec sums[TILES][VECTORS];
    if (add) {
      UNROLL
      for (int t = 0; t < TILES; ++t) {
        UNROLL
        for (int i = 0; i < VECTORS; ++i) sums[t][i] = load(m + t * group + i * kLanes);
      }
    } else {
      UNROLL
      for (int t = 0; t < TILES; ++t) {
        UNROLL
        for (int i = 0; i < VECTORS; ++i) sums[t][i] = vec{};
      }
    }
    for (int block = 0; block < blocks; ++block, v += TILES * kBlock, next += TILES * kBlock, u += kBlock * group) {
      UNROLL
      for (int t = 0; t < TILES; ++t) __builtin_prefetch(next + t * kBlock);
      multiply(sums, v, kBlock, u, group, kBlock);
    }
    UNROLL
    for (int t = 0; t < TILES; ++t) {
      UNROLL
      for (int i = 0; i < VECTORS; ++i) store(m + t * group + i * kLanes, sums[t][i]);
    }
  }
};

// What WRITER does with each tile is its own.
template <int T, int K, class WRITER>
struct WinogradForward {
  using W = Winograd<T, K>;
  static constexpr int kTaps = K * K;
  const Channels& input;
  const float* weight;
  const WRITER writer;
  int outputs, group, in_blocks;

  WinogradForward(const Channels& input, const float* weight, const Destination& to)
      : input(input),
        weight(weight),
        writer(to),
        outputs(writer.outputs()),
        group(group_width(outputs)),
        in_blocks(input.blocks()) {}

  int inputs() const { return in_blocks * kBlock; }
  int groups() const { return outputs / group; }
  bool narrow() const { return group < kTileOutputs; }
  int panel() const { return narrow() ? kNarrowPixels : kTilePixels; }
  const float* group_weight(int index, int block) const {
    return weight + (static_cast<ptrdiff_t>(index) * inputs() + block * kBlock) * kTaps * group;
  }
  ptrdiff_t v_stride(int tiles) const { return plane_stride(static_cast<ptrdiff_t>(tiles) * inputs()); }
  ptrdiff_t m_stride(int tiles) const { return plane_stride(static_cast<ptrdiff_t>(tiles) * group); }
  ptrdiff_t u_stride(int blocks) const { return plane_stride(static_cast<ptrdiff_t>(blocks) * kBlock * group); }

  void transform_inputs(const Patch& patch, int block, float* v, float* first_layer) const {
    int of_part = block;
    const View& x = block_of<T>(input, patch, of_part, first_layer);
    transform_tiles<W, W::kFootprint, W::input_pair>(x, of_part, patch, panel(), in_blocks, block, v,
                                                     v_stride(patch.count()));
  }

  // Planes of [tile][group] for one group of outputs, of `blocks` blocks of inputs from first_block on.
  template <class Between>
  void multiply_group(const float* v, int tiles, int first_block, int blocks, const float* u, float* m,
                      const Between& between) const {
    static constexpr ByPixels<MultiplyTiles<kTileVectors>, kTilePixels> wide_tiles;
    static constexpr ByPixels<MultiplyTiles<kNarrowVectors>, kNarrowPixels> narrow_tiles;
    const int tile_outputs = narrow() ? kBlock : kTileOutputs, panels = ceil_div(tiles, panel());
    const auto v_of = [&](int frequency, int p) {
      const int begin = run_begin(tiles, p, panels), count = run_begin(tiles, p + 1, panels) - begin;
      return v + frequency * v_stride(tiles) + static_cast<ptrdiff_t>(begin) * inputs() +
             static_cast<ptrdiff_t>(first_block) * count * kBlock;
    };
    const float* x = v_of(0, 0);
    for (int frequency = 0; frequency < W::kFrequencies; ++frequency)
      for (int p = 0; p < panels; ++p) {
        const int begin = run_begin(tiles, p, panels), count = run_begin(tiles, p + 1, panels) - begin;
        const auto multiply = narrow() ? narrow_tiles[count] : wide_tiles[count];
        const float* const next = p + 1 < panels                    ? v_of(frequency, p + 1)
                                  : frequency + 1 < W::kFrequencies ? v_of(frequency + 1, 0)
                                                                    : x;
        between();
        for (int output = 0; output < group; output += tile_outputs)
          multiply(x, blocks, u + frequency * u_stride(blocks) + output, group,
                   m + frequency * m_stride(tiles) + static_cast<ptrdiff_t>(begin) * group + output, first_block > 0,
                   next);
        x = next;
      }
  }

  // What a patch reads; none where there is no patch.
  Ahead<false> reads_of(const Patch& patch) const { return ahead_of<T>(input, patch, K - 1); }

  Ahead<true> writes_of(const Patch& patch, int group_index) const {
    const int blocks = group / kBlock;
    return writer.ahead(patch, group_index * blocks, blocks);
  }

  // Floats that a thread needs to compute what it reads of a first layer.
  ptrdiff_t first_layer_floats_of(const Tiling& tiling) const {
    const bool needs = input.first_layer != nullptr || writer.to.mask_first_layer != nullptr;
    return needs ? first_layer_floats<T>(tiling.patch_rows, tiling.patch_columns) : 0;
  }

  void transform_outputs(const Patch& patch, int group_index, const float* m, float* first_layer) const {
    const ptrdiff_t stride = m_stride(patch.count());
    const FirstLayer* const mask = writer.to.mask_first_layer;
    View mask_block = writer.to.mask[0];
    for (int channel = 0; channel < group; channel += kLanes) {
      if (mask != nullptr && channel % kBlock == 0) {
        const int top = patch.row * T, left = patch.column * T;
        mask_block =
            first_layer_part(*mask, writer.to.values.part[0], patch.image, top, top + patch.rows * T, left,
                             left + patch.columns * T, (group_index * group + channel) / kBlock, 1, first_layer);
      }
      const float* source = m + channel;
      for (int row = 0; row < patch.rows; ++row)
        for (int column = 0; column < patch.columns; ++column, source += group) {
          vec values[T][T];
          contract<W, T, W::output_line>(source, stride, values);
          writer.write(patch.image, (patch.row + row) * T, (patch.column + column) * T, group_index * group + channel,
                       values, mask_block);
        }
    }
  }
};

constexpr size_t kPrivateTilesLimit = size_t{700} << 10;  // a thread's V and M in its L2
constexpr size_t kSharedTilesLimit = size_t{10} << 20;    // all threads' V in L3
constexpr size_t kSlabLimit = size_t{850} << 10;          // M and a slab of transformed weights in a thread's L2
constexpr int kPrivatePanels = 3;                         // more would gain nothing

// Transformed weights that stay in L3 beside the tiles: 0.6 of it, from 10 MB, where the system does not tell its size,
// to 20 MB, for a virtual machine may be told the size of somebody else's too.
size_t shared_weights_limit() {
  static const size_t limit = [] {
    long third_level = 0;
#if defined(_SC_LEVEL3_CACHE_SIZE)
    third_level = sysconf(_SC_LEVEL3_CACHE_SIZE);
#endif
    const size_t share = third_level > 0 ? static_cast<size_t>(third_level) / 10 * 6 : 0;
    const size_t least = size_t{10} << 20, most = size_t{20} << 20;
    return share < least ? least : share > most ? most : share;
  }();
  return limit;
}

// Each thread takes patches through all three stages; all read the same transformed weights.
template <int T, int K, class WRITER>
void winograd_private(const WinogradForward<T, K, WRITER>& conv) {
  using W = Winograd<T, K>;
  const int in_blocks = conv.in_blocks, group = conv.group, groups = conv.groups(), panel = conv.panel();
  const ptrdiff_t u_stride = conv.u_stride(in_blocks), group_floats = W::kFrequencies * u_stride;
  float* const u = scratch(kWeights, groups * group_floats);
  parallel(groups * in_blocks, [&](int task, int) {
    const int index = task / in_blocks, block = task % in_blocks;
    transform_weights<W>(conv.group_weight(index, block), 1, group,
                         u + index * group_floats + static_cast<ptrdiff_t>(block) * kBlock * group, u_stride);
  });
  const size_t tile_bytes = sizeof(float) * W::kFrequencies * (conv.inputs() + group);
  const int panels = larger(1, smaller(kPrivatePanels, static_cast<int>(kPrivateTilesLimit / tile_bytes / panel)));
  const Destination& to = conv.writer.to;
  const Tiling tiling(T, to.values.part[0].images, to.height, to.width, panels * panel, panel);
  const ptrdiff_t v_floats = W::kFrequencies * conv.v_stride(tiling.most_tiles());
  const ptrdiff_t m_floats = W::kFrequencies * conv.m_stride(tiling.most_tiles());
  const ptrdiff_t thread_floats = v_floats + m_floats + conv.first_layer_floats_of(tiling);
  float* const threads = scratch(kPerThread, thread_floats * thread_count());
  parallel(tiling.patches(), [&](int index, int thread) {
    float* const v = threads + thread * thread_floats;
    float* const m = v + v_floats;
    float* const first_layer = m + m_floats;
    const Patch patch = tiling[index];
    for (int block = 0; block < in_blocks; ++block) conv.transform_inputs(patch, block, v, first_layer);
    const int next = index + thread_count();
    auto reads = conv.reads_of(next < tiling.patches() ? tiling[next] : Patch{});
    const int calls = W::kFrequencies * ceil_div(patch.count(), panel);
    const int reads_share = ceil_div(reads.pixels(), groups * calls);
    for (int g = 0; g < groups; ++g) {
      auto writes = conv.writes_of(patch, g);
      const int writes_share = ceil_div(writes.pixels(), calls);
      conv.multiply_group(v, patch.count(), 0, in_blocks, u + g * group_floats, m, [&] {
        reads.ask(reads_share);
        writes.ask(writes_share);
      });
      conv.transform_outputs(patch, g, m, first_layer);
    }
  });
}

// The threads share the V of a patch, and each takes groups of outputs.
template <int T, int K, class WRITER>
void winograd_shared(const WinogradForward<T, K, WRITER>& conv) {
  using W = Winograd<T, K>;
  const int in_blocks = conv.in_blocks, group = conv.group, groups = conv.groups(), panel = conv.panel();
  const size_t tile_bytes = sizeof(float) * W::kFrequencies * conv.inputs();
  const Destination& to = conv.writer.to;
  const size_t half_slab = kSlabLimit / 2 / (W::kFrequencies * group * sizeof(float));  // tiles
  const int most =
      larger(4 * panel,
             static_cast<int>(kSharedTilesLimit / tile_bytes < half_slab ? kSharedTilesLimit / tile_bytes : half_slab));
  const Tiling tiling(T, to.values.part[0].images, to.height, to.width, most, most);
  const ptrdiff_t m_floats = W::kFrequencies * conv.m_stride(tiling.most_tiles());
  const size_t slab_block_bytes = W::kFrequencies * kBlock * group * sizeof(float);
  const int slab_blocks =
      smaller(in_blocks, larger(2, static_cast<int>((kSlabLimit - m_floats * sizeof(float)) / slab_block_bytes)));
  const ptrdiff_t u_floats = W::kFrequencies * conv.u_stride(slab_blocks);
  const ptrdiff_t thread_floats = u_floats + m_floats + conv.first_layer_floats_of(tiling);
  float* const v = scratch(kInputTiles, W::kFrequencies * conv.v_stride(tiling.most_tiles()));
  float* const threads = scratch(kPerThread, thread_floats * thread_count());
  for (int index = 0; index < tiling.patches(); ++index) {
    const Patch patch = tiling[index];
    parallel(in_blocks, [&](int block, int thread) {
      conv.transform_inputs(patch, block, v, threads + thread * thread_floats + u_floats + m_floats);
    });
    const int share = ceil_div(slab_blocks * conv.kTaps * group, W::kFrequencies * ceil_div(patch.count(), panel));
    parallel(groups, [&](int g, int thread) {
      float* const u = threads + thread * thread_floats;
      float* const m = u + u_floats;
      for (int block = 0; block < in_blocks; block += slab_blocks) {
        const int blocks = smaller(slab_blocks, in_blocks - block);
        transform_weights<W>(conv.group_weight(g, block), blocks, group, u, conv.u_stride(blocks));
        // The weights that this thread transforms next, most likely.
        const float* next = block + blocks < in_blocks    ? conv.group_weight(g, block + blocks)
                            : g + thread_count() < groups ? conv.group_weight(g + thread_count(), 0)
                                                          : conv.group_weight(g, block);
        conv.multiply_group(v, patch.count(), block, blocks, u, m, [&] {
          for (int i = 0; i < share; ++i, next += kBlock) __builtin_prefetch(next, 0, 2);
        });
      }
      conv.transform_outputs(patch, g, m, m + m_floats);
    });
  }
}

template <int T, int K = 3, class WRITER = TileWriter<T>>
void winograd_forward(const Channels& input, const float* weight, const Destination& to) {
  const WinogradForward<T, K, WRITER> conv(input, weight, to);
  const size_t weights = sizeof(float) * Winograd<T, K>::kFrequencies * conv.inputs() * conv.outputs;
  if (weights <= shared_weights_limit()) {
    winograd_private(conv);
  } else {
    winograd_shared(conv);
  }
}

}  // namespace
}  // namespace fastunet

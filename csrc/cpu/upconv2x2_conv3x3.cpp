// An up-convolution and the 3x3 convolution of [skip, its result] as one linear map (kernels.h: Composition), for a
// network that only predicts: the up-convolution's result, which has no ReLU, is never made. In units of the outputs'
// channels squared, a pixel of the output costs 4.25 multiplications as two layers (up-convolution 2, F(4x4, 3x3) on
// its result 2.25) and 2.88 by F(5x5, 2x2) on the input.
//
// Tested against torch.nn.functional.conv_transpose2d and conv2d in float64 (tests/test_ops.py).
#include "table.h"
#include "winograd_forward.h"

namespace fastunet {
namespace {

// Values of low-resolution tiles, channels phase by phase, to every other pixel of the output.
template <int T>
struct PhaseWriter {
  const Destination& to;
  int blocks;  // of a phase

  explicit PhaseWriter(const Destination& to) : to(to), blocks(to.values.part[0].blocks()) {}

  int outputs() const { return 4 * blocks * kBlock; }

  // The pixels around, which the other phases write too, are asked for with the first.
  Ahead<true> ahead(const Patch& patch, int first_block, int count) const {
    const int top = patch.row * T * 2, left = patch.column * T * 2;
    return Ahead<true>(to.values, patch.image, top, top + patch.rows * T * 2, left, left + patch.columns * T * 2,
                       first_block % blocks, first_block < blocks ? smaller(count, blocks - first_block) : 0);
  }

  INLINE void write(int image, int row, int column, int channel, vec (&values)[T][T], const View&) const {
    const View& y = to.values.part[0];
    const int phase = channel / kBlock / blocks, block = channel / kBlock % blocks;
    float* const target = y.at(image, block, 2 * row + phase / 2, 2 * column + phase % 2) + channel % kBlock;
    if (row + T <= to.height && column + T <= to.width) {
      UNROLL
      for (int r = 0; r < T; ++r) {
        UNROLL
        for (int c = 0; c < T; ++c) store(target + 2 * r * y.row_stride + 2 * c * kBlock, values[r][c]);
      }
    } else {
      for (int r = 0; r < T && row + r < to.height; ++r)
        for (int c = 0; c < T && column + c < to.width; ++c)
          store(target + 2 * r * y.row_stride + 2 * c * kBlock, values[r][c]);
    }
  }
};

// sums[i][o] += the products of up_weight's tap and weight's over the channels between.
template <int INPUTS>
INLINE void add_product(vec (&sums)[INPUTS][kVectors], const Composition& c, const float* up_weight, int up_tap,
                        int input, const float* weight, int tap, int output) {
  const int up_group = group_width(c.middle), group = group_width(c.outputs);
  const int up_blocks = c.inputs / kBlock, skip_blocks = c.skip / kBlock, blocks = skip_blocks + c.middle / kBlock;
  for (int between = 0; between < c.middle; between += kBlock) {
    const float* const x =
        up_weight +
        ((static_cast<ptrdiff_t>(between / up_group) * up_blocks + input / kBlock) * 4 + up_tap) * kBlock * up_group +
        input % kBlock * up_group + between % up_group;
    const float* const w =
        weight +
        ((static_cast<ptrdiff_t>(output / group) * blocks + skip_blocks + between / kBlock) * 9 + tap) * kBlock *
            group +
        output % group;
    multiply(sums, x, up_group, w, group, kBlock);
  }
}

}  // namespace

namespace FASTUNET_ISA {

void compose(const Composition& c, const float* up_weight, const float* up_bias, const float* weight, const float* bias,
             float* phases, float* skip_weight, float* composed_bias) {
  constexpr int kInputs = kOuterChannels;
  const int out_blocks = c.outputs / kBlock, in_blocks = c.inputs / kBlock;
  const int group = group_width(c.outputs), phase_group = group_width(4 * c.outputs);
  parallel(4 * out_blocks * in_blocks, [&](int task, int) {
    const int input_block = task % in_blocks, block = task / in_blocks % out_blocks,
              phase = task / in_blocks / out_blocks;
    const int channel = phase * c.outputs + block * kBlock;
    for (int tap = 0; tap < 4; ++tap) {
      float* const target =
          phases +
          ((static_cast<ptrdiff_t>(channel / phase_group) * in_blocks + input_block) * 4 + tap) * kBlock * phase_group +
          channel % phase_group;
      for (int i = 0; i < kBlock; i += kInputs) {
        vec sums[kInputs][kVectors] = {};
        // Row y of the kernel meets, from an output row of this phase, row (phase + y) % 2 of the 2x2 pixels that come
        // of the input's row (phase + y) / 2; columns likewise.
        for (int y = 0; y < 3; ++y)
          for (int x = 0; x < 3; ++x) {
            const int row = phase / 2 + y, column = phase % 2 + x;
            if (row / 2 != tap / 2 || column / 2 != tap % 2) continue;
            add_product<kInputs>(sums, c, up_weight, row % 2 * 2 + column % 2, input_block * kBlock + i, weight,
                                 y * 3 + x, block * kBlock);
          }
        UNROLL
        for (int k = 0; k < kInputs; ++k) {
          UNROLL
          for (int v = 0; v < kVectors; ++v) store(target + (i + k) * phase_group + v * kLanes, sums[k][v]);
        }
      }
    }
  });
  const ptrdiff_t tap_floats = static_cast<ptrdiff_t>(kBlock) * group, skip_floats = c.skip / kBlock * 9 * tap_floats;
  const ptrdiff_t group_floats = (c.skip + c.middle) / kBlock * 9 * tap_floats;
  parallel(c.outputs / group, [&](int index, int) {
    const float* source = weight + index * group_floats;
    for (ptrdiff_t i = 0; i < skip_floats; ++i) skip_weight[index * skip_floats + i] = source[i];
    source += skip_floats;
    for (int o = 0; o < group; ++o) {
      float sum = bias[index * group + o];
      for (int between = 0; between < c.middle; ++between)
        for (int tap = 0; tap < 9; ++tap)
          sum +=
              up_bias[between] *
              source[(static_cast<ptrdiff_t>(between / kBlock) * 9 + tap) * tap_floats + between % kBlock * group + o];
      composed_bias[index * group + o] = sum;
    }
  });
}

void composed_forward(const View& input, const View& skip, const float* phases, const float* skip_weight,
                      const float* bias, const View& output) {
  winograd_forward<5, 2, PhaseWriter<5>>(Channels{{input}}, phases,
                                         Destination(Channels{{output}}, input.height - 1, input.width - 1));
  Destination to(Channels{{output}}, output.height, output.width);
  to.adds = true;
  to.bias = bias;
  to.relu = true;
  winograd_forward<4>(Channels{{skip}}, skip_weight, to);
}

}  // namespace FASTUNET_ISA
}  // namespace fastunet

// Valid 3x3 convolution: forward with bias and ReLU, data gradient, weight gradient, each directly or by Winograd in
// tiles of 2, 4 or 6 outputs. One or two inputs: a concatenation is read in place and its gradient written in place.
//
// Cost: 18 * in * out FLOPs a pixel directly; by Winograd in tiles of 4, 4.5 * in * out and its transforms, which move
// 36/16 of the activations. Tested against torch.nn.functional.conv2d in float64 (tests/test_ops.py).
#include "convolve.h"
#include "correlate.h"
#include "table.h"
#include "winograd_backward_weight.h"
#include "winograd_forward.h"

namespace fastunet {
namespace {

// Directly; crop, mask and pooling are passes of their own.
void convolve_to(const Channels& input, const float* weight, const Destination& to) {
  const View& kept = to.values.part[0];
  const bool whole = kept.height == to.height && kept.width == to.width;
  Channels computed = to.values;
  if (!whole) {
    View& all = computed.part[0];
    all.height = to.height;
    all.width = to.width;
    all.row_stride = static_cast<ptrdiff_t>(to.width) * kBlock;
    all.block_stride = all.row_stride * to.height;
    all.image_stride = all.block_stride * all.blocks();
    all.data = scratch(kInputTiles, all.image_stride * all.images);
  }
  Convolution c{input, weight, computed};
  c.bias = to.bias;
  c.relu = to.relu;
  convolve(&c, 1);
  for (int part = 0; part < to.values.count; ++part)
    if (to.mask[part].data != nullptr) FASTUNET_ISA::mask(to.values.part[part], to.mask[part], to.values.part[part]);
  if (to.pooled.data != nullptr) FASTUNET_ISA::maxpool2x2_forward(computed.part[0], true, to.pooled, to.choice);
  if (!whole) {
    View centre = computed.part[0];
    centre.data = centre.at(0, 0, (to.height - kept.height) / 2, (to.width - kept.width) / 2);
    centre.height = kept.height;
    centre.width = kept.width;
    FASTUNET_ISA::mask(centre, View{}, kept);
  }
}

int channel_count(const Channels& c) { return c.part[0].channels + (c.count == 2 ? c.part[1].channels : 0); }

}  // namespace

namespace FASTUNET_ISA {

Algorithm conv3x3_algorithm(Algorithm wanted, int inputs, int outputs, int height, int width) {
  if (wanted != Algorithm::kAutomatic) return wanted;
  if (inputs < kBlock || outputs < kBlock) return Algorithm::kDirect;
  const auto multiplications = [&](int tile) {
    return int64_t{ceil_div(height, tile)} * ceil_div(width, tile) * (tile + 2) * (tile + 2);
  };
  const int64_t direct = int64_t{9} * height * width, by_two = multiplications(2), by_four = multiplications(4);
  if (by_four <= by_two && by_four < direct) return Algorithm::kWinograd4;
  return by_two < direct ? Algorithm::kWinograd2 : Algorithm::kDirect;
}

void conv3x3_forward(const Channels& input, const float* weight, const Destination& to, Algorithm algorithm) {
  switch (conv3x3_algorithm(algorithm, channel_count(input), channel_count(to.values), to.height, to.width)) {
    case Algorithm::kWinograd2:
      return winograd_forward<2>(input, weight, to);
    case Algorithm::kWinograd6:
      return winograd_forward<6>(input, weight, to);
    case Algorithm::kWinograd4:
      return winograd_forward<4>(input, weight, to);
    default:
      return convolve_to(input, weight, to);
  }
}

void first_layer_forward(const FirstLayer& layer, const View& output) {
  constexpr int kRows = 8;
  const int blocks = output.blocks(), bands = ceil_div(output.height, kRows);
  parallel(output.images * blocks * bands, [&](int task, int) {
    const int top = task % bands * kRows, block = task / bands % blocks, image = task / bands / blocks;
    first_layer_part(layer, output, image, top, top + kRows, 0, output.width, block, 1,
                     output.at(image, block, top, 0));
  });
}

void conv3x3_backward_data(const View& gradient, const float* weight, const Destination& to, Algorithm algorithm) {
  const int inputs = to.values.blocks() * kBlock, outputs = gradient.blocks() * kBlock;
  float* const transposed = scratch(kTransposed, static_cast<size_t>(inputs) * outputs * 9);
  transpose_weight(weight, inputs, outputs, 9, true, transposed);
  View bordered = gradient;  // from the border's first pixel
  bordered.data -= 2 * gradient.row_stride + 2 * kBlock;
  bordered.height += 4;
  bordered.width += 4;
  conv3x3_forward(Channels{{bordered}}, transposed, to, algorithm);
}

void conv3x3_backward_weight(const Channels& input, const View& gradient, float* weight_gradient, float* bias_gradient,
                             Algorithm algorithm) {
  switch (conv3x3_algorithm(algorithm, channel_count(input), gradient.channels, gradient.height, gradient.width)) {
    case Algorithm::kWinograd2:
      return winograd_backward_weight<2>(input, gradient, weight_gradient, bias_gradient);
    case Algorithm::kWinograd6:
      return winograd_backward_weight<6>(input, gradient, weight_gradient, bias_gradient);
    case Algorithm::kWinograd4:
      return winograd_backward_weight<4>(input, gradient, weight_gradient, bias_gradient);
    default:
      break;
  }
  Correlation c{input, gradient};
  c.weight_gradient = weight_gradient;
  correlate(c);
  add_pixels(gradient, bias_gradient);
}

}  // namespace FASTUNET_ISA
}  // namespace fastunet

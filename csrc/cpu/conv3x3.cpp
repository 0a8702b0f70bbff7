// Valid 3x3 convolution: forward with bias and ReLU, data gradient, weight gradient, each directly or by
// Winograd F(4x4, 3x3). One or two inputs: a concatenation is read in place and its gradient written in
// place.
//
// Cost: 18 * in * out FLOPs a pixel directly; by Winograd 4.5 * in * out and its transforms, which move 36/16 of the
// activations. Tested against torch.nn.functional.conv2d in float64 (tests/test_ops.py).
#include "convolve.h"
#include "correlate.h"
#include "table.h"
#include "winograd_backward_weight.h"
#include "winograd_forward.h"

namespace fastunet {
namespace {

// The choice, the same for the three directions: Winograd wherever there are channels to pay for its
// transforms and at least one whole tile.
bool use_winograd(Algorithm algorithm, int inputs, int outputs, int height, int width) {
  if (algorithm != Algorithm::kAutomatic) return algorithm == Algorithm::kWinograd;
  return inputs >= kBlock && outputs >= kBlock && height >= kTile && width >= kTile;
}

int channel_count(const Channels& c) { return c.part[0].channels + (c.count == 2 ? c.part[1].channels : 0); }

}  // namespace

namespace FASTUNET_ISA {

void conv3x3_forward(const Channels& input, const float* weight, const float* bias, bool relu, const View& output,
                     Algorithm algorithm) {
  const Channels target{{output}};
  if (use_winograd(algorithm, channel_count(input), output.channels, output.height, output.width)) {
    winograd_forward(input, weight, bias, relu, target, output.height, output.width);
  } else {
    Convolution c{input, weight, target};
    c.bias = bias;
    c.relu = relu;
    convolve(c);
  }
}

void conv3x3_backward_data(const View& gradient, const float* weight, const Channels& input_gradient,
                           Algorithm algorithm) {
  const int inputs = input_gradient.blocks() * kBlock, outputs = gradient.blocks() * kBlock;
  float* const transposed = scratch(kTransposed, static_cast<size_t>(inputs) * outputs * 9);
  transpose_weight(weight, inputs, outputs, 9, true, transposed);
  View bordered = gradient;  // from the border's first pixel
  bordered.data -= 2 * gradient.row_stride + 2 * kBlock;
  bordered.height += 4;
  bordered.width += 4;
  const Channels source{{bordered}};
  const int height = gradient.height + 2, width = gradient.width + 2;
  if (use_winograd(algorithm, gradient.channels, channel_count(input_gradient), height, width)) {
    winograd_forward(source, transposed, nullptr, false, input_gradient, height, width);
  } else {
    convolve(Convolution{source, transposed, input_gradient});
  }
}

void conv3x3_backward_weight(const Channels& input, const View& gradient, float* weight_gradient, Algorithm algorithm) {
  if (use_winograd(algorithm, channel_count(input), gradient.channels, gradient.height, gradient.width)) {
    winograd_backward_weight(input, gradient, weight_gradient);
  } else {
    Correlation c{input, gradient};
    c.weight_gradient = weight_gradient;
    correlate(c);
  }
}

}  // namespace FASTUNET_ISA
}  // namespace fastunet

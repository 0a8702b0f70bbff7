// The up-convolution (2x2, stride 2, transposed) and the 1x1 head, both on the direct convolution: each tap
// of an up-convolution is a 1x1 convolution into every other pixel of every other row, its data gradient a
// 2x2 convolution of stride 2.
//
// Cost: 8 * in * out FLOPs an input pixel (up-convolution), 2 * in * out (1x1). Tested against
// torch.nn.functional.conv_transpose2d and conv2d in float64 (tests/test_ops.py).
#include "../memory.h"
#include "convolve.h"
#include "correlate.h"
#include "table.h"

namespace fastunet {
namespace {

// Pixels of the same parity: row and column ky, kx of every 2x2 square (their columns stay two apart in
// memory).
View every_other_pixel(const View& view, int ky, int kx) {
  View pixels = view;
  pixels.data += ky * view.row_stride + kx * kBlock;
  pixels.row_stride *= 2;
  pixels.height /= 2;
  pixels.width /= 2;
  return pixels;
}

// A kernel as wide as its stride: each input pixel's gradient gathers the kernel x kernel pixels it went to.
void backward_data(const View& gradient, const float* weight, const View& input_gradient, const View& mask,
                   int kernel) {
  const int inputs = input_gradient.blocks() * kBlock, outputs = gradient.blocks() * kBlock, taps = kernel * kernel;
  float* const transposed = scratch(kTransposed, static_cast<size_t>(inputs) * outputs * taps);
  transpose_weight(weight, inputs, outputs, taps, false, transposed);
  Convolution c{Channels{{gradient}}, transposed, Channels{{input_gradient}}};
  c.kernel = c.stride = kernel;
  c.taps = taps;
  c.mask = mask;
  convolve(&c, 1);
}

void backward_weight(const View& input, const View& gradient, float* weight_gradient, int kernel) {
  Correlation c{Channels{{input}}, gradient};
  c.kernel = c.gradient_stride = kernel;
  c.taps_move_input = false;
  c.weight_gradient = weight_gradient;
  correlate(c);
}

}  // namespace

namespace FASTUNET_ISA {

void upconv2x2_forward(const View& input, const float* weight, const float* bias, const View& output) {
  Convolution taps[4];
  for (int tap = 0; tap < 4; ++tap) {
    Convolution& c = taps[tap];
    c.input = Channels{{input}};
    c.weight = weight;
    c.output = Channels{{every_other_pixel(output, tap / 2, tap % 2)}};
    c.kernel = 1;
    c.taps = 4;
    c.first_tap = tap;
    c.bias = bias;
    c.output_step = 2;
  }
  convolve(taps, 4);
}

void upconv2x2_backward_data(const View& gradient, const float* weight, const View& input_gradient, const View& mask) {
  backward_data(gradient, weight, input_gradient, mask, 2);
}

void upconv2x2_backward_weight(const View& input, const View& gradient, float* weight_gradient) {
  backward_weight(input, gradient, weight_gradient, 2);
}

void conv1x1_forward(const View& input, const float* weight, const float* bias, const View& output) {
  Convolution c{Channels{{input}}, weight, Channels{{output}}};
  c.kernel = c.taps = 1;
  c.bias = bias;
  convolve(&c, 1);
}

void conv1x1_backward_data(const View& gradient, const float* weight, const View& input_gradient, const View& mask) {
  backward_data(gradient, weight, input_gradient, mask, 1);
}

void conv1x1_backward_weight(const View& input, const View& gradient, float* weight_gradient) {
  backward_weight(input, gradient, weight_gradient, 1);
}

}  // namespace FASTUNET_ISA
}  // namespace fastunet

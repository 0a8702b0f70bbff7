// The table of CPU kernels and the shapes they take. The same sources are compiled once for each instruction
// set; dispatch.cpp chooses a table at run time.
//
// Activations lie in blocks of 16 channels, [image][channel / 16][row][column][16], channels padded with
// zeros to a multiple of 16. Weights of a K x K convolution lie as [out / G][in][K * K][G] with G = 32
// outputs side by side, or 16 where the padded outputs are no multiple of 32; `in` counts padded channels, of
// both inputs one after the other where the convolution reads two.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastunet {

constexpr int kBlock = 16;

inline int padded(int channels) { return (channels + kBlock - 1) / kBlock * kBlock; }
inline int group_width(int outputs) { return padded(outputs) % 32 == 0 ? 32 : 16; }

// A tensor seen through strides (in floats): a crop, or the inside of a padded buffer, is another View of the
// same data.
struct View {
  float* data = nullptr;
  int images = 0, height = 0, width = 0, channels = 0;
  ptrdiff_t image_stride = 0, block_stride = 0, row_stride = 0;

  int blocks() const { return (channels + kBlock - 1) / kBlock; }
  float* at(int image, int block, int row, int column) const {
    return data + image * image_stride + block * block_stride + row * row_stride +
           static_cast<ptrdiff_t>(column) * kBlock;
  }
};

// One or two tensors read (or written) as if their channels were concatenated. Where two, each has a multiple
// of 16 channels or is padded to one.
struct Channels {
  View part[2];
  int count = 1;

  int blocks() const { return part[0].blocks() + (count == 2 ? part[1].blocks() : 0); }
};

enum class Algorithm { kAutomatic, kDirect, kWinograd };

struct CrossEntropy {
  double loss_sum = 0, weight_sum = 0;  // of weight * -log p, of weight
  long invalid = 0;                     // pixels of a weight other than 0 whose label names no class
};

struct KernelTable {
  const char* name;

  // output = [relu](conv3x3(input, weight) + bias); output is 2 smaller than input. The parts of the input
  // have the output's height + 2 and width + 2 (crops are made by the caller).
  void (*conv3x3_forward)(const Channels& input, const float* weight, const float* bias, bool relu, const View& output,
                          Algorithm);
  // input_gradient = the transpose of conv3x3 on `gradient`, a view of the inside of a buffer with a border
  // of two zero pixels on every side. `weight` is the forward one.
  void (*conv3x3_backward_data)(const View& gradient, const float* weight, const Channels& input_gradient, Algorithm);
  // weight_gradient += the correlation of input and gradient, in the weight's layout.
  void (*conv3x3_backward_weight)(const Channels& input, const View& gradient, float* weight_gradient, Algorithm);

  // 2x2 stride-2 transposed convolution; output is twice the input.
  void (*upconv2x2_forward)(const View& input, const float* weight, const float* bias, const View& output);
  void (*upconv2x2_backward_data)(const View& gradient, const float* weight, const View& input_gradient);
  void (*upconv2x2_backward_weight)(const View& input, const View& gradient, float* weight_gradient);

  void (*conv1x1_forward)(const View& input, const float* weight, const float* bias, const View& output);
  void (*conv1x1_backward_data)(const View& gradient, const float* weight, const View& input_gradient);
  void (*conv1x1_backward_weight)(const View& input, const View& gradient, float* weight_gradient);

  // masked = gradient where output > 0 else 0 (output.data null: a plain copy; masked may be gradient
  // itself), and bias_gradient += its sum over images and pixels.
  void (*backward_epilogue)(const View& gradient, const View& output, const View& masked, float* bias_gradient);

  // output = the largest of each 2x2; choice = which (0..3 in reading order, the first on ties), a byte per
  // element.
  void (*maxpool2x2_forward)(const View& input, const View& output, uint8_t* choice);
  // input_gradient = gradient at the choice, 0 elsewhere, a last odd row or column included.
  void (*maxpool2x2_backward)(const View& gradient, const uint8_t* choice, const View& input_gradient);

  // Labels and weights are [image][row][column]; pixels of weight 0 are ignored whatever their label. Where
  // logit_gradient.data is not null it receives weight * (p - onehot) / sum of weights.
  CrossEntropy (*softmax_cross_entropy)(const View& logits, const int32_t* labels, const float* weights,
                                        const View& logit_gradient);
  void (*softmax)(const View& logits, const View& probabilities);

  // output = input * mask / (1 - rate) with the mask drawn from Philox4x32-10, key = seed, counter = (element
  // index / 4, draw), element index counted in (N, H, W, C) order of the logical tensor. Serves the backward
  // pass too.
  void (*dropout)(const View& input, const View& output, float rate, uint64_t seed, uint64_t draw);

  // momentum = rate * momentum + gradient; value -= learning_rate * momentum (torch.optim.SGD).
  void (*sgd_momentum)(float* value, const float* gradient, float* momentum, float learning_rate, float rate,
                       ptrdiff_t count);
  void (*add)(const View& source, const View& target);  // target += source
  void (*multiply)(const View& target, float factor);   // target *= factor
  void (*to_blocks)(const float* pixels,
                    const View& output);  // (N, H, W, C) contiguous -> blocks, padding zeroed
  void (*from_blocks)(const View& input, float* pixels);
};

const KernelTable& kernels();  // the widest instruction set this machine has, or what FASTUNET_ISA names

}  // namespace fastunet

// The table of CPU kernels and the shapes they take. The same sources are compiled once for each instruction
// set; dispatch.cpp chooses a table at run time.
//
// Activations lie in blocks of 16 channels, [image][channel / 16][row][column][16], channels padded with
// zeros to a multiple of 16. Weights of a K x K convolution lie as [out / G][in / 16][K * K][16][G] with G = 32
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

// A network's first layer: the 3x3 convolution of an image of few channels, with bias and ReLU. It is little work and
// much memory, so that whoever reads it computes what it reads.
struct FirstLayer {
  const float* pixels;  // (images, height, width, channels), contiguous
  int height, width, channels;
  const float *weight, *bias;
  bool relu;
};

// One or two tensors read (or written) as if their channels were concatenated. Where two, each has a multiple
// of 16 channels or is padded to one. Where `first_layer` is given, the one part has its sizes and no data.
struct Channels {
  View part[2];
  int count = 1;
  const FirstLayer* first_layer = nullptr;

  int blocks() const { return part[0].blocks() + (count == 2 ? part[1].blocks() : 0); }
};

// What a 3x3 convolution makes of the height x width values it computes.
struct Destination {
  Channels values;            // all of them, or only their centre
  int height = 0, width = 0;  // of what is computed
  bool adds = false;          // to the values that are there, which are whole, before all else
  const float* bias = nullptr;
  bool relu = false;
  View mask[2];  // of each part of `values`: kept where this is above 0, and 0 elsewhere; or none
  const FirstLayer* mask_first_layer = nullptr;  // in the place of mask[0]
  View pooled;                                   // where there is one, receives the 2x2 maxima of values after ReLU
  uint8_t* choice = nullptr;                     // and, where wanted, this as maxpool2x2_forward

  Destination(const Channels& values, int height, int width) : values(values), height(height), width(width) {}
};

// A 2x2 up-convolution whose result a 3x3 convolution reads behind the channels of a skip. There is nothing between the
// two, so that they are one linear map: each of the four phases of the output, its pixels of even or odd row and
// column, is a 2x2 convolution of the up-convolution's input, beside the 3x3 convolution of the skip.
struct Composition {
  int inputs, middle, skip, outputs;  // channels, padded: the up-convolution's of input and output, and so on

  ptrdiff_t phase_floats() const { return ptrdiff_t{4} * inputs * 4 * outputs; }
  ptrdiff_t skip_floats() const { return ptrdiff_t{9} * skip * outputs; }
  ptrdiff_t floats() const { return phase_floats() + skip_floats() + outputs; }
};

// Which of four pixels the maximum is, a byte for each element of the pooled view in its own order; kNoChoice where no
// gradient goes back, because the maximum is a 0 of ReLU.
constexpr uint8_t kNoChoice = 4;
inline ptrdiff_t choice_index(const View& pooled, int image, int block, int row, int column) {
  return (((static_cast<ptrdiff_t>(image) * pooled.blocks() + block) * pooled.height + row) * pooled.width + column) *
         kBlock;
}

// Winograd<T>: tiles of T x T outputs. kAutomatic chooses; kWinograd6 is never chosen, for it loses accuracy.
enum class Algorithm { kAutomatic, kDirect, kWinograd2, kWinograd4, kWinograd6 };

struct CrossEntropy {
  double loss_sum = 0, weight_sum = 0;  // of weight * -log p, of weight
  long invalid = 0;                     // pixels of a weight other than 0 whose label names no class
};

struct KernelTable {
  const char* name;

  // What kAutomatic comes to for a convolution with so many values to compute (forward and weight gradient: of the
  // output; data gradient: of the input, with inputs and outputs exchanged): the fewest multiplications; directly where
  // there are fewer than 16 channels on either side, which would not pay for transforms.
  Algorithm (*conv3x3_algorithm)(Algorithm, int inputs, int outputs, int height, int width);

  // What is computed is 2 smaller than the input, whose parts are equally large (crops are made by the caller). A first
  // layer is read, and is a mask, by Winograd only.
  void (*conv3x3_forward)(const Channels& input, const float* weight, const Destination&, Algorithm);
  void (*first_layer_forward)(const FirstLayer&, const View& output);  // whose rows lie one after the other
  // The transpose of conv3x3 on `gradient`, a view of the inside of a buffer with a border of two zero pixels on every
  // side. `weight` is the forward one.
  void (*conv3x3_backward_data)(const View& gradient, const float* weight, const Destination&, Algorithm);
  // weight_gradient += the correlation of input and gradient, in the weight's layout; bias_gradient += the gradient's
  // sum over images and pixels.
  void (*conv3x3_backward_weight)(const Channels& input, const View& gradient, float* weight_gradient,
                                  float* bias_gradient, Algorithm);

  // 2x2 stride-2 transposed convolution; output is twice the input.
  void (*upconv2x2_forward)(const View& input, const float* weight, const float* bias, const View& output);
  // The gradient of an input of which `mask`, where it has data, is above 0; 0 elsewhere.
  void (*upconv2x2_backward_data)(const View& gradient, const float* weight, const View& input_gradient,
                                  const View& mask);
  void (*upconv2x2_backward_weight)(const View& input, const View& gradient, float* weight_gradient);

  // The weights and the bias of the map: the phases' outputs one after the other as those of one 2x2 convolution, the
  // skip's weights alone.
  void (*compose)(const Composition&, const float* up_weight, const float* up_bias, const float* weight,
                  const float* bias, float* phases, float* skip_weight, float* composed_bias);
  // ReLU of it. The skip is twice as large as the input, and the output 2 smaller than the skip.
  void (*composed_forward)(const View& input, const View& skip, const float* phases, const float* skip_weight,
                           const float* bias, const View& output);

  void (*conv1x1_forward)(const View& input, const float* weight, const float* bias, const View& output);
  void (*conv1x1_backward_data)(const View& gradient, const float* weight, const View& input_gradient,
                                const View& mask);
  void (*conv1x1_backward_weight)(const View& input, const View& gradient, float* weight_gradient);

  // target = source where positive > 0 else 0 (positive.data null: a plain copy; target may be source itself).
  void (*mask)(const View& source, const View& positive, const View& target);
  void (*add_pixels)(const View& source, float* sum);  // sum[channel] += the sum over images and pixels

  // output = the largest of each 2x2; choice, where not null, = which (0..3 in reading order, the first on ties);
  // kNoChoice where `rectified` and the largest is not above 0.
  void (*maxpool2x2_forward)(const View& input, bool rectified, const View& output, uint8_t* choice);
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

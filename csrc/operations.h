// The operations of a network on arrays. Shapes are checked here, once, for every operation; the kernels below trust
// them. Each takes its turn on the engine. Weights, biases and their gradients are packed as cpu/kernels.h says.
#pragma once

#include <optional>
#include <string>
#include <tuple>
#include <utility>

#include "array.h"

namespace fastunet {

// Somebody else's numbers, one after the other.
template <class T>
struct Span {
  T* data;
  ptrdiff_t count;
};
using Floats = Span<const float>;
using MutableFloats = Span<float>;

// Which pixel won each 2x2, for the way back.
struct Choice {
  Array pooled;  // its shape
  std::shared_ptr<Block> bytes;
  bool rectified;

  Choice(const Array& pooled, bool rectified);
  uint8_t* data() const { return reinterpret_cast<uint8_t*>(bytes->data); }
};

// auto, direct, winograd2, winograd4 or winograd6.
Algorithm algorithm_named(const std::string& name);
const char* name_of(Algorithm algorithm);

// Of the concatenation [the skip's centre, x] where there is a skip.
Array conv3x3_forward(const Array& x, const std::optional<Array>& skip, Floats weight, Floats bias, int outputs,
                      bool relu, const std::string& algorithm);

// The convolution with ReLU, of which the centre of kept_height x kept_width is returned, its maxima, and the choice
// where it is wanted.
std::tuple<Array, Array, std::optional<Choice>> conv3x3_maxpool2x2_forward(const Array& x, Floats weight, Floats bias,
                                                                           int outputs, int kept_height, int kept_width,
                                                                           bool wants_choice,
                                                                           const std::string& algorithm);

// Adds to weight_gradient and bias_gradient; returns the gradients of x and of the skip's centre where
// wanted.
std::pair<std::optional<Array>, std::optional<Array>> conv3x3_backward(const Array& gradient, const Array& x,
                                                                       const std::optional<Array>& skip,
                                                                       const std::optional<Array>& relu_output,
                                                                       Floats weight, MutableFloats weight_gradient,
                                                                       MutableFloats bias_gradient, bool wants_input,
                                                                       const std::string& algorithm);

Array upconv2x2_forward(const Array& x, Floats weight, Floats bias, int outputs);
std::optional<Array> upconv2x2_backward(const Array& gradient, const Array& x, Floats weight,
                                        MutableFloats weight_gradient, MutableFloats bias_gradient, bool wants_input);

// An up-convolution and the convolution that reads it behind a skip, as one linear map (cpu/kernels.h).
struct Composed {
  Composition sizes;
  Block phases, skip_weight, bias;

  explicit Composed(const Composition& sizes);
};

// Whether it pays: with enough channels for Winograd, and not so many outputs that to compose them would cost more than
// some tiles gain. Only where the algorithm is auto.
bool composing_pays(const std::string& algorithm, int inputs, int middle, int skip, int outputs);
std::shared_ptr<Composed> compose(Floats up_weight, Floats up_bias, Floats weight, Floats bias, int inputs, int middle,
                                  int skip, int outputs);
// conv3x3_forward, with ReLU, of [the skip's centre, upconv2x2_forward of x].
Array composed_forward(const Array& x, const Array& skip, const Composed& composed, int outputs);

Array conv1x1_forward(const Array& x, Floats weight, Floats bias, int outputs);
std::optional<Array> conv1x1_backward(const Array& gradient, const Array& x, Floats weight,
                                      MutableFloats weight_gradient, MutableFloats bias_gradient, bool wants_input);

std::pair<Array, Choice> maxpool2x2_forward(const Array& x);
// The gradient of the pooling's input, to which that of its centre is added where there is one.
Array maxpool2x2_backward(const Array& gradient, const Choice& choice, int height, int width,
                          const std::optional<Array>& present);

std::pair<double, std::optional<Array>> softmax_cross_entropy(const Array& logits, Span<const int32_t> labels,
                                                              Floats weights, bool wants_gradient);
Array softmax(const Array& logits);

Array dropout(const Array& x, float rate, uint64_t seed, uint64_t draw);

void add_centre(Array& target, const Array& source);  // target += source, whose pixels are the centre of target's
void multiply(Array& target, float factor);
void sgd_momentum(MutableFloats value, Floats gradient, MutableFloats momentum, float learning_rate, float rate);

}  // namespace fastunet

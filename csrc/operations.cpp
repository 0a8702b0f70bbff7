#include "operations.h"

#include <stdexcept>

#include "thread_pool.h"

namespace fastunet {
namespace {

// Waits for its turn on the engine.
template <class Body>
auto run(const Body& body) {
  const Engine turn;
  return body();
}

constexpr int kGradientBorder = 2;  // what a 3x3 convolution's data gradient reads beyond its gradient

// For the gradient of x.
Array gradient_of(const Array& x) {
  Array gradient(x.view.images, x.view.height, x.view.width, x.view.channels, x.rectified ? kGradientBorder : 0);
  gradient.masked = x.rectified;
  return gradient;
}

View mask_of(const Array& x) { return x.rectified ? x.whole() : View{}; }

// The numbers, if there are as many as expected.
template <class T>
T* expect_count(Span<T> values, ptrdiff_t count, const std::string& what) {
  expect(values.count == count,
         what + " has " + std::to_string(values.count) + " packed values, " + std::to_string(count) + " were expected");
  return values.data;
}

bool same_shape(const View& a, const View& b) {
  return a.images == b.images && a.height == b.height && a.width == b.width && a.channels == b.channels;
}

// In the order of Algorithm.
constexpr const char* kAlgorithms[] = {"auto", "direct", "winograd2", "winograd4", "winograd6"};

bool uses_winograd(Algorithm algorithm, int inputs, int outputs, int height, int width) {
  return kernels().conv3x3_algorithm(algorithm, inputs, outputs, height, width) != Algorithm::kDirect;
}

// [the skip's centre, x] as one input; a first layer as it is, where it `may_be_pending`.
Channels concatenation(const Array& x, const std::optional<Array>& skip, bool may_be_pending) {
  Channels input;
  if (!skip) {
    input.first_layer = may_be_pending ? first_layer_of(x) : nullptr;
    input.part[0] = input.first_layer != nullptr ? x.view : x.whole();
    return input;
  }
  expect(skip->view.images == x.view.images && skip->height >= x.height && skip->width >= x.width,
         "the skip connection has shape " + skip->describe() + ", too small to be cropped to " + x.describe());
  input.count = 2;
  input.part[0] = skip->centre(x.view.height, x.view.width);
  input.part[1] = x.whole();
  return input;
}

ptrdiff_t weight_floats(int input_blocks, int outputs, int taps) {
  return static_cast<ptrdiff_t>(input_blocks) * kBlock * padded(outputs) * taps;
}

// What a convolution computes, but for where it goes.
struct Convolution3x3 {
  const Array& x;
  const std::optional<Array>& skip;
  const float *weight, *bias;
  int images, height, width, outputs;
  Algorithm algorithm;

  Convolution3x3(const Array& x, const std::optional<Array>& skip, Floats weight_values, Floats bias_values,
                 int outputs, const std::string& algorithm_name)
      : x(x), skip(skip), images(x.view.images), height(x.view.height - 2), width(x.view.width - 2), outputs(outputs) {
    expect(x.view.height >= 3 && x.view.width >= 3,
           "conv3x3 was given an input of shape " + x.describe() + "; it must be at least 3 x 3 pixels");
    algorithm = algorithm_named(algorithm_name);
    const int blocks = x.view.blocks() + (skip ? skip->view.blocks() : 0);
    weight = expect_count(weight_values, weight_floats(blocks, outputs, 9), "the weight of conv3x3");
    bias = expect_count(bias_values, padded(outputs), "the bias of conv3x3");
  }

  Channels input() const {
    return concatenation(x, skip, uses_winograd(algorithm, x.view.channels, outputs, height, width));
  }

  Destination to(const Array& output, bool relu) const {
    Destination destination(Channels{{output.view}}, height, width);
    destination.bias = bias;
    destination.relu = relu;
    return destination;
  }
};

}  // namespace

Algorithm algorithm_named(const std::string& name) {
  for (int i = 0; i < 5; ++i)
    if (name == kAlgorithms[i]) return static_cast<Algorithm>(i);
  throw std::invalid_argument("convolution algorithm '" + name +
                              "' is unknown; expected auto, direct, winograd2, winograd4 or winograd6");
}

const char* name_of(Algorithm algorithm) { return kAlgorithms[static_cast<int>(algorithm)]; }

// --------------------------------------------------------------------------------------------------
// convolution 3x3

Array conv3x3_forward(const Array& x, const std::optional<Array>& skip, Floats weight, Floats bias, int outputs,
                      bool relu, const std::string& algorithm) {
  const Convolution3x3 c(x, skip, weight, bias, outputs, algorithm);
  const auto image = std::dynamic_pointer_cast<PendingImage>(x.pending);
  if (!skip && image != nullptr && c.algorithm != Algorithm::kDirect) {
    const auto pending = std::make_shared<PendingLayer>(image, std::vector<float>(c.weight, c.weight + weight.count),
                                                        std::vector<float>(c.bias, c.bias + bias.count), relu, outputs);
    Array output(pending, c.images, c.height, c.width, outputs);
    output.rectified = relu;
    return output;
  }
  Array output(c.images, c.height, c.width, outputs);
  output.rectified = relu;
  const Channels input = c.input();
  run([&] { kernels().conv3x3_forward(input, c.weight, c.to(output, relu), c.algorithm); });
  return output;
}

Choice::Choice(const Array& pooled, bool rectified)
    : pooled(pooled), bytes(std::make_shared<Block>(pooled.block->floats / sizeof(float) + 1)), rectified(rectified) {
  this->pooled.block.reset();
}

std::tuple<Array, Array, std::optional<Choice>> conv3x3_maxpool2x2_forward(const Array& x, Floats weight, Floats bias,
                                                                           int outputs, int kept_height, int kept_width,
                                                                           bool wants_choice,
                                                                           const std::string& algorithm) {
  const std::optional<Array> no_skip;
  const Convolution3x3 c(x, no_skip, weight, bias, outputs, algorithm);
  expect(c.height >= 2 && c.width >= 2, "maxpool2x2 was given the convolution of an input of shape " + x.describe() +
                                            "; it must be at least 4 x 4 pixels");
  expect(kept_height >= 1 && kept_height <= c.height && kept_width >= 1 && kept_width <= c.width,
         "the centre to be kept, " + std::to_string(kept_height) + " x " + std::to_string(kept_width) +
             " pixels, is not within the convolution of an input of shape " + x.describe());
  Array kept(c.images, kept_height, kept_width, outputs), pooled(c.images, c.height / 2, c.width / 2, outputs);
  kept.height = c.height;
  kept.width = c.width;
  kept.rectified = true;
  std::optional<Choice> choice;
  if (wants_choice) choice.emplace(pooled, true);
  const Channels input = c.input();
  run([&] {
    Destination to = c.to(kept, true);
    to.pooled = pooled.view;
    to.choice = choice ? choice->data() : nullptr;
    kernels().conv3x3_forward(input, c.weight, to, c.algorithm);
  });
  return {kept, pooled, choice};
}

std::pair<std::optional<Array>, std::optional<Array>> conv3x3_backward(const Array& gradient, const Array& x,
                                                                       const std::optional<Array>& skip,
                                                                       const std::optional<Array>& relu_output,
                                                                       Floats weight, MutableFloats weight_gradient,
                                                                       MutableFloats bias_gradient, bool wants_input,
                                                                       const std::string& algorithm) {
  const View& g = gradient.whole();
  const bool masks = relu_output && !gradient.masked;
  expect(g.images == x.view.images && g.height == x.view.height - 2 && g.width == x.view.width - 2,
         "conv3x3's gradient has shape " + gradient.describe() + ", which does not fit its input " + x.describe());
  expect(!masks || (relu_output->height == g.height && relu_output->width == g.width &&
                    relu_output->view.images == g.images && relu_output->view.channels == g.channels),
         "conv3x3's gradient has shape " + gradient.describe() + ", which is not that of its output");
  const Algorithm chosen = algorithm_named(algorithm);
  const Channels input = concatenation(x, skip, uses_winograd(chosen, x.view.channels, g.channels, g.height, g.width));
  const ptrdiff_t floats = weight_floats(input.blocks(), g.channels, 9);
  const float* w = expect_count(weight, floats, "the weight of conv3x3");
  float* dw = expect_count(weight_gradient, floats, "the weight gradient of conv3x3");
  float* db = expect_count(bias_gradient, padded(g.channels), "the bias gradient of conv3x3");
  const View x_mask = input.first_layer != nullptr ? View{} : mask_of(x);
  const View output_mask = masks ? relu_output->whole() : View{};
  std::optional<Array> x_gradient, skip_gradient;
  run([&] {
    std::optional<Array> copy;  // where the gradient does not come as it is needed
    if (masks || gradient.border < kGradientBorder) {
      copy.emplace(g.images, g.height, g.width, g.channels, kGradientBorder);
      kernels().mask(g, output_mask, copy->view);
    }
    const View& ready = copy ? copy->view : g;
    kernels().conv3x3_backward_weight(input, ready, dw, db, chosen);
    if (!wants_input) return;
    x_gradient = gradient_of(x);
    Destination to(Channels{{x_gradient->view}}, x.view.height, x.view.width);
    to.mask[0] = x_mask;
    if (x.rectified) to.mask_first_layer = input.first_layer;
    if (skip) {
      skip_gradient.emplace(x.view.images, x.height, x.width, skip->view.channels);
      skip_gradient->masked = skip->rectified;
      to.values = Channels{{skip_gradient->view, x_gradient->view}, 2};
      to.mask[1] = to.mask[0];
      to.mask[0] = skip->rectified ? input.part[0] : View{};
    }
    kernels().conv3x3_backward_data(ready, w, to, chosen);
  });
  return {x_gradient, skip_gradient};
}

// --------------------------------------------------------------------------------------------------
// up-convolution, 1x1 head

namespace {

// Layers whose kernel is as wide as its stride, so that each input pixel goes to side x side outputs of its own.
Array spread_forward(const std::string& name, int side, decltype(KernelTable::upconv2x2_forward) kernel, const Array& x,
                     Floats weight, Floats bias, int outputs) {
  const View& v = x.whole();
  const float* w = expect_count(weight, weight_floats(v.blocks(), outputs, side * side), "the weight of " + name);
  const float* b = expect_count(bias, padded(outputs), "the bias of " + name);
  Array output(v.images, side * v.height, side * v.width, outputs);
  run([&] { kernel(v, w, b, output.view); });
  return output;
}

std::optional<Array> spread_backward(const std::string& name, int side,
                                     decltype(KernelTable::upconv2x2_backward_weight) backward_weight,
                                     decltype(KernelTable::upconv2x2_backward_data) backward_data,
                                     const Array& gradient, const Array& x, Floats weight,
                                     MutableFloats weight_gradient, MutableFloats bias_gradient, bool wants_input) {
  const View& g = gradient.whole();
  expect(g.images == x.view.images && g.height == side * x.view.height && g.width == side * x.view.width,
         name + "'s gradient has shape " + gradient.describe() + ", which does not fit its input " + x.describe());
  const ptrdiff_t floats = weight_floats(x.view.blocks(), g.channels, side * side);
  const float* w = expect_count(weight, floats, "the weight of " + name);
  float* dw = expect_count(weight_gradient, floats, "the weight gradient of " + name);
  float* db = expect_count(bias_gradient, padded(g.channels), "the bias gradient of " + name);
  std::optional<Array> x_gradient;
  if (wants_input) x_gradient = gradient_of(x);
  const View& v = x.whole();
  const View mask = mask_of(x);
  run([&] {
    kernels().add_pixels(g, db);
    backward_weight(v, g, dw);
    if (wants_input) backward_data(g, w, x_gradient->view, mask);
  });
  return x_gradient;
}

}  // namespace

Array upconv2x2_forward(const Array& x, Floats weight, Floats bias, int outputs) {
  return spread_forward("upconv2x2", 2, kernels().upconv2x2_forward, x, weight, bias, outputs);
}

std::optional<Array> upconv2x2_backward(const Array& gradient, const Array& x, Floats weight,
                                        MutableFloats weight_gradient, MutableFloats bias_gradient, bool wants_input) {
  return spread_backward("upconv2x2", 2, kernels().upconv2x2_backward_weight, kernels().upconv2x2_backward_data,
                         gradient, x, weight, weight_gradient, bias_gradient, wants_input);
}

Array conv1x1_forward(const Array& x, Floats weight, Floats bias, int outputs) {
  return spread_forward("conv1x1", 1, kernels().conv1x1_forward, x, weight, bias, outputs);
}

std::optional<Array> conv1x1_backward(const Array& gradient, const Array& x, Floats weight,
                                      MutableFloats weight_gradient, MutableFloats bias_gradient, bool wants_input) {
  return spread_backward("conv1x1", 1, kernels().conv1x1_backward_weight, kernels().conv1x1_backward_data, gradient, x,
                         weight, weight_gradient, bias_gradient, wants_input);
}

Composed::Composed(const Composition& sizes)
    : sizes(sizes), phases(sizes.phase_floats()), skip_weight(sizes.skip_floats()), bias(sizes.outputs) {}

bool composing_pays(const std::string& algorithm, int inputs, int middle, int skip, int outputs) {
  constexpr int kMostOutputs = 256;
  if (algorithm_named(algorithm) != Algorithm::kAutomatic || outputs > kMostOutputs) return false;
  for (const int channels : {inputs, middle, skip, outputs})
    if (channels < kBlock) return false;
  return true;
}

std::shared_ptr<Composed> compose(Floats up_weight, Floats up_bias, Floats weight, Floats bias, int inputs, int middle,
                                  int skip, int outputs) {
  const Composition sizes{padded(inputs), padded(middle), padded(skip), padded(outputs)};
  const float* u = expect_count(up_weight, weight_floats(sizes.inputs / kBlock, middle, 4), "the weight of upconv2x2");
  const float* ub = expect_count(up_bias, sizes.middle, "the bias of upconv2x2");
  const int blocks = (sizes.skip + sizes.middle) / kBlock;
  const float* w = expect_count(weight, weight_floats(blocks, outputs, 9), "the weight of conv3x3");
  const float* b = expect_count(bias, sizes.outputs, "the bias of conv3x3");
  auto composed = std::make_shared<Composed>(sizes);
  run([&] {
    kernels().compose(sizes, u, ub, w, b, composed->phases.data, composed->skip_weight.data, composed->bias.data);
  });
  return composed;
}

Array composed_forward(const Array& x, const Array& skip, const Composed& composed, int outputs) {
  const View& v = x.whole();
  const int height = 2 * v.height, width = 2 * v.width;
  const std::string given =
      "an input of shape " + x.describe() + " and a skip connection of shape " + skip.describe() + " were given to ";
  expect(v.height >= 2 && v.width >= 2 && skip.view.images == v.images && skip.height >= height && skip.width >= width,
         given + "layers composed; an input of at least 2 x 2 pixels and a skip at least twice as large are expected");
  expect(v.blocks() * kBlock == composed.sizes.inputs && skip.view.blocks() * kBlock == composed.sizes.skip &&
             padded(outputs) == composed.sizes.outputs,
         given + "layers composed for other channels");
  Array output(v.images, height - 2, width - 2, outputs);
  output.rectified = true;
  const View centre = skip.centre(height, width);
  run([&] {
    kernels().composed_forward(v, centre, composed.phases.data, composed.skip_weight.data, composed.bias.data,
                               output.view);
  });
  return output;
}

// --------------------------------------------------------------------------------------------------
// pooling, loss, dropout, sums, SGD

void add_centre(Array& target, const Array& source) {
  const View& s = source.whole();
  target.settle();
  expect(s.images == target.view.images && s.channels == target.view.channels && s.height <= target.view.height &&
             s.width <= target.view.width,
         "an array of shape " + source.describe() + " cannot be added to one of " + target.describe());
  target.masked = target.masked && source.masked;
  const View centre = target.centre(s.height, s.width);
  run([&] { kernels().add(s, centre); });
}

std::pair<Array, Choice> maxpool2x2_forward(const Array& x) {
  const View& v = x.whole();
  expect(v.height >= 2 && v.width >= 2,
         "maxpool2x2 was given an input of shape " + x.describe() + "; it must be at least 2 x 2 pixels");
  Array output(v.images, v.height / 2, v.width / 2, v.channels);
  const Choice choice(output, x.rectified);
  run([&] { kernels().maxpool2x2_forward(v, x.rectified, output.view, choice.data()); });
  return {output, choice};
}

Array maxpool2x2_backward(const Array& gradient, const Choice& choice, int height, int width,
                          const std::optional<Array>& present) {
  const View& g = gradient.whole();
  expect(g.height == height / 2 && g.width == width / 2 && same_shape(g, choice.pooled.view),
         "maxpool2x2's gradient has shape " + gradient.describe() + ", which does not fit its input");
  Array input_gradient(g.images, height, width, g.channels, choice.rectified ? kGradientBorder : 0);
  input_gradient.masked = choice.rectified;
  run([&] { kernels().maxpool2x2_backward(g, choice.data(), input_gradient.view); });
  if (present) add_centre(input_gradient, *present);
  return input_gradient;
}

std::pair<double, std::optional<Array>> softmax_cross_entropy(const Array& logits, Span<const int32_t> labels,
                                                              Floats weights, bool wants_gradient) {
  const View& v = logits.whole();
  const ptrdiff_t pixels = static_cast<ptrdiff_t>(v.images) * v.height * v.width;
  expect(labels.count == pixels && weights.count == pixels,
         "softmax_cross_entropy was given logits of shape " + logits.describe() + " with " +
             std::to_string(labels.count) + " labels and " + std::to_string(weights.count) +
             " weights; one of each is expected for every pixel");
  std::optional<Array> gradient;
  if (wants_gradient) gradient = like(logits);
  const CrossEntropy result = run([&] {
    return kernels().softmax_cross_entropy(v, labels.data, weights.data, gradient ? gradient->view : View{});
  });
  expect(result.invalid == 0, "softmax_cross_entropy was given " + std::to_string(result.invalid) +
                                  " pixels whose label is not in 0.." + std::to_string(v.channels - 1) +
                                  "; give them weight 0 or a label of a class");
  expect(result.weight_sum != 0,
         "softmax_cross_entropy was given weights that sum to zero: no pixel counts; draw another tile");
  return {result.loss_sum / result.weight_sum, gradient};
}

Array softmax(const Array& logits) {
  Array probabilities = like(logits);
  const View& v = logits.whole();
  run([&] { kernels().softmax(v, probabilities.view); });
  return probabilities;
}

Array dropout(const Array& x, float rate, uint64_t seed, uint64_t draw) {
  expect(rate >= 0 && rate < 1, "a dropout rate of " + std::to_string(rate) + " was given; 0 <= rate < 1 is expected");
  Array output(x.view.images, x.view.height, x.view.width, x.view.channels, x.border);
  output.rectified = x.rectified;
  output.masked = x.masked;
  const View& v = x.whole();
  run([&] { kernels().dropout(v, output.view, rate, seed, draw); });
  return output;
}

void multiply(Array& target, float factor) {
  target.settle();
  run([&] { kernels().multiply(target.view, factor); });
}

void sgd_momentum(MutableFloats value, Floats gradient, MutableFloats momentum, float learning_rate, float rate) {
  const float* g = expect_count(gradient, value.count, "the gradient");
  float* m = expect_count(momentum, value.count, "the momentum");
  run([&] { kernels().sgd_momentum(value.data, g, m, learning_rate, rate, value.count); });
}

}  // namespace fastunet

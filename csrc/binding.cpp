// The Python module _fastunet: arrays in the engine's layout and the operations on them. Shapes are checked
// here, once, for every operation; the kernels below trust them. The GIL is released while a kernel runs.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <memory>
#include <optional>
#include <string>

#include "cpu/kernels.h"
#include "memory.h"
#include "thread_pool.h"

namespace py = pybind11;
using namespace py::literals;

namespace fastunet {
namespace {

struct Block {
  float* data;
  size_t floats;
  explicit Block(size_t floats) : data(allocate(floats)), floats(floats) {}
  ~Block() { release(data, floats); }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;
};

struct Pending;

// A tensor of float32 in blocks of 16 channels, or the centre of one. Lanes beyond the last channel are zero.
struct Array {
  View view;
  std::shared_ptr<Pending> pending;  // what is only worked out when it is read; then there is no block
  int height, width;                 // of the tensor; where the view is smaller, only the tensor's centre was kept
  std::shared_ptr<Block> block;
  int border = 0;  // pixels around the view that are zero
  bool rectified =
      false;            // the output of a ReLU: a gradient of it is made `masked`, with the border that its way needs
  bool masked = false;  // a gradient that is 0 already where that ReLU lets nothing through

  Array(int images, int height, int width, int channels, int border = 0)
      : Array(nullptr, images, height, width, channels, border) {
    block = std::make_shared<Block>(static_cast<size_t>(view.image_stride) * images);
    view.data = block->data + border * view.row_stride + border * kBlock;
    if (border > 0) clear_border();
  }

  Array(std::shared_ptr<Pending> pending, int images, int height, int width, int channels, int border = 0)
      : pending(std::move(pending)), height(height), width(width), border(border) {
    if (images < 1 || height < 1 || width < 1 || channels < 1)
      throw std::invalid_argument("an array of shape (" + std::to_string(images) + ", " + std::to_string(height) +
                                  ", " + std::to_string(width) + ", " + std::to_string(channels) +
                                  ") was asked for; every axis must be at least 1");
    view.images = images;
    view.height = height;
    view.width = width;
    view.channels = channels;
    view.row_stride = static_cast<ptrdiff_t>(width + 2 * border) * kBlock;
    view.block_stride = view.row_stride * (height + 2 * border);
    view.image_stride = view.block_stride * view.blocks();
  }

  py::tuple shape() const { return py::make_tuple(view.images, height, width, view.channels); }

  std::string describe() const {
    return "(" + std::to_string(view.images) + ", " + std::to_string(height) + ", " + std::to_string(width) + ", " +
           std::to_string(view.channels) + ")";
  }

  Array centre(int rows, int columns) const {
    if (rows > view.height || columns > view.width)
      throw std::invalid_argument("of an array of shape " + describe() + " only the centre of " +
                                  std::to_string(view.height) + " x " + std::to_string(view.width) +
                                  " pixels was kept, and " + std::to_string(rows) + " x " + std::to_string(columns) +
                                  " were asked for");
    Array crop = *this;
    crop.pending = nullptr;
    crop.view = whole_or_kept();
    crop.view.data = crop.view.at(0, 0, (view.height - rows) / 2, (view.width - columns) / 2);
    crop.view.height = crop.height = rows;
    crop.view.width = crop.width = columns;
    if (rows != view.height || columns != view.width) crop.border = 0;
    return crop;
  }

  // All of it, or it throws.
  const View& whole() const {
    if (view.height != height || view.width != width) centre(height, width);
    return whole_or_kept();
  }

  const View& whole_or_kept() const;

  void clear_border() const {
    const size_t side = static_cast<size_t>(border) * kBlock * sizeof(float);
    const size_t line = static_cast<size_t>(view.row_stride) * sizeof(float);
    for (int image = 0; image < view.images; ++image)
      for (int channels = 0; channels < view.blocks(); ++channels)
        for (int row = -border; row < view.height + border; ++row) {
          float* const begin = view.at(image, channels, row, -border);
          if (row < 0 || row >= view.height) {
            std::memset(begin, 0, line);
          } else {
            std::memset(begin, 0, side);
            std::memset(view.at(image, channels, row, view.width), 0, side);
          }
        }
  }
};

// Values that may not be needed in blocks; kept once somebody did need them.
struct Pending {
  Array values;
  bool computed = false;

  explicit Pending(Array values) : values(std::move(values)) {}
  virtual ~Pending() = default;
  virtual void compute(const View& values) const = 0;
};

// An image of few channels, which padded to 16 would be many times as large.
struct PendingImage : Pending {
  std::vector<float> pixels;

  PendingImage(const float* pixels, int images, int height, int width, int channels)
      : Pending(Array(nullptr, images, height, width, channels)),
        pixels(pixels, pixels + static_cast<size_t>(images) * height * width * channels) {}
  void compute(const View& values) const override { kernels().to_blocks(pixels.data(), values); }
};

// See FirstLayer. It has weights of its own, for those given may change before it is read.
struct PendingLayer : Pending {
  std::shared_ptr<PendingImage> image;
  std::vector<float> weight, bias;
  FirstLayer layer;

  PendingLayer(std::shared_ptr<PendingImage> of, std::vector<float> weights, std::vector<float> biases, bool relu,
               int outputs)
      : Pending(Array(nullptr, of->values.view.images, of->values.height - 2, of->values.width - 2, outputs)),
        image(std::move(of)),
        weight(std::move(weights)),
        bias(std::move(biases)),
        layer{image->pixels.data(),
              image->values.height,
              image->values.width,
              image->values.view.channels,
              weight.data(),
              bias.data(),
              relu} {}
  void compute(const View& values) const override { kernels().first_layer_forward(layer, values); }
};

constexpr int kGradientBorder = 2;  // what a 3x3 convolution's data gradient reads beyond its gradient

// For the gradient of x.
Array gradient_of(const Array& x) {
  Array gradient(x.view.images, x.view.height, x.view.width, x.view.channels, x.rectified ? kGradientBorder : 0);
  gradient.masked = x.rectified;
  return gradient;
}

View mask_of(const Array& x) { return x.rectified ? x.whole() : View{}; }

using Floats = py::array_t<float, py::array::c_style>;
using Labels = py::array_t<int32_t, py::array::c_style | py::array::forcecast>;
using Weights = py::array_t<float, py::array::c_style | py::array::forcecast>;

// Runs a kernel: waits for its turn on the engine without holding the GIL.
template <class Body>
auto run(const Body& body) {
  py::gil_scoped_release unlocked;
  Engine turn;
  return body();
}

const View& Array::whole_or_kept() const {
  if (pending == nullptr) return view;
  run([&] {
    Pending& p = *pending;
    if (p.computed) return;
    const View& v = p.values.view;
    p.values = Array(v.images, v.height, v.width, v.channels);
    p.compute(p.values.view);
    p.computed = true;
  });
  return pending->values.view;
}

// A first layer that nobody has computed and that may stay so.
const FirstLayer* first_layer_of(const Array& x) {
  const auto* const pending = dynamic_cast<const PendingLayer*>(x.pending.get());
  return pending != nullptr && !pending->computed ? &pending->layer : nullptr;
}

void expect(bool holds, const std::string& sentence) {
  if (!holds) throw std::invalid_argument(sentence);
}

const float* expect_floats(const Floats& values, ptrdiff_t count, const char* what) {
  expect(values.size() == count, std::string(what) + " has " + std::to_string(values.size()) + " packed values, " +
                                     std::to_string(count) + " were expected");
  return values.data();
}

float* expect_mutable(Floats& values, ptrdiff_t count, const char* what) {
  expect_floats(values, count, what);
  return values.mutable_data();
}

bool same_shape(const View& a, const View& b) {
  return a.images == b.images && a.height == b.height && a.width == b.width && a.channels == b.channels;
}

// In the order of Algorithm.
constexpr const char* kAlgorithms[] = {"auto", "direct", "winograd2", "winograd4", "winograd6"};

Algorithm algorithm_named(const std::string& name) {
  for (int i = 0; i < 5; ++i)
    if (name == kAlgorithms[i]) return static_cast<Algorithm>(i);
  throw std::invalid_argument("convolution algorithm '" + name +
                              "' is unknown; expected auto, direct, winograd2, winograd4 or winograd6");
}

constexpr int kImageChannels = 4;  // of more, computing a first layer again would cost more than it saves

Array from_pixels(const Floats& pixels) {
  expect(pixels.ndim() == 4,
         "an array of " + std::to_string(pixels.ndim()) + " axes was given, (N, H, W, C) is expected");
  int shape[4];
  for (int axis = 0; axis < 4; ++axis) shape[axis] = static_cast<int>(pixels.shape(axis));
  const auto [images, height, width, channels] = shape;
  const float* source = pixels.data();
  if (channels <= kImageChannels)
    return Array(std::make_shared<PendingImage>(source, images, height, width, channels), images, height, width,
                 channels);
  Array result(images, height, width, channels);
  run([&] { kernels().to_blocks(source, result.view); });
  return result;
}

Floats to_pixels(const Array& array) {
  const View& v = array.whole();
  Floats pixels({v.images, v.height, v.width, v.channels});
  float* target = pixels.mutable_data();
  run([&] { kernels().from_blocks(v, target); });
  return pixels;
}

Array like(const Array& a) { return Array(a.view.images, a.view.height, a.view.width, a.view.channels); }

void clear(const Array& array) { std::memset(array.block->data, 0, array.block->floats * sizeof(float)); }

// --------------------------------------------------------------------------------------------------
// convolution 3x3

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
  input.part[0] = skip->centre(x.view.height, x.view.width).view;
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

  Convolution3x3(const Array& x, const std::optional<Array>& skip, const Floats& weight_values,
                 const Floats& bias_values, int outputs, const std::string& algorithm_name)
      : x(x), skip(skip), images(x.view.images), height(x.view.height - 2), width(x.view.width - 2), outputs(outputs) {
    expect(x.view.height >= 3 && x.view.width >= 3,
           "conv3x3 was given an input of shape " + x.describe() + "; it must be at least 3 x 3 pixels");
    algorithm = algorithm_named(algorithm_name);
    const int blocks = x.view.blocks() + (skip ? skip->view.blocks() : 0);
    weight = expect_floats(weight_values, weight_floats(blocks, outputs, 9), "the weight of conv3x3");
    bias = expect_floats(bias_values, padded(outputs), "the bias of conv3x3");
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

Array conv3x3_forward(const Array& x, const std::optional<Array>& skip, const Floats& weight, const Floats& bias,
                      int outputs, bool relu, const std::string& algorithm) {
  const Convolution3x3 c(x, skip, weight, bias, outputs, algorithm);
  const auto image = std::dynamic_pointer_cast<PendingImage>(x.pending);
  if (!skip && image != nullptr && c.algorithm != Algorithm::kDirect) {
    const auto pending =
        std::make_shared<PendingLayer>(image, std::vector<float>(c.weight, c.weight + weight.size()),
                                       std::vector<float>(c.bias, c.bias + bias.size()), relu, outputs);
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

// Which pixel won each 2x2, for the way back.
struct Choice {
  Array pooled;  // its shape
  std::shared_ptr<Block> bytes;
  bool rectified;

  Choice(const Array& pooled, bool rectified)
      : pooled(pooled), bytes(std::make_shared<Block>(pooled.block->floats / sizeof(float) + 1)), rectified(rectified) {
    this->pooled.block.reset();
  }
  uint8_t* data() const { return reinterpret_cast<uint8_t*>(bytes->data); }
};

// The convolution with ReLU, of which the centre of kept_height x kept_width is returned, its maxima, and the choice
// where it is wanted.
std::tuple<Array, Array, std::optional<Choice>> conv3x3_maxpool2x2_forward(const Array& x, const Floats& weight,
                                                                           const Floats& bias, int outputs,
                                                                           int kept_height, int kept_width,
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

// Adds to weight_gradient and bias_gradient; returns the gradients of x and of the skip's centre where
// wanted.
std::pair<std::optional<Array>, std::optional<Array>> conv3x3_backward(const Array& gradient, const Array& x,
                                                                       const std::optional<Array>& skip,
                                                                       const std::optional<Array>& relu_output,
                                                                       const Floats& weight, Floats& weight_gradient,
                                                                       Floats& bias_gradient, bool wants_input,
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
  const float* w = expect_floats(weight, floats, "the weight of conv3x3");
  float* dw = expect_mutable(weight_gradient, floats, "the weight gradient of conv3x3");
  float* db = expect_mutable(bias_gradient, padded(g.channels), "the bias gradient of conv3x3");
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

Array upconv2x2_forward(const Array& x, const Floats& weight, const Floats& bias, int outputs) {
  const View& v = x.whole();
  const float* w = expect_floats(weight, weight_floats(v.blocks(), outputs, 4), "the weight of upconv2x2");
  const float* b = expect_floats(bias, padded(outputs), "the bias of upconv2x2");
  Array output(v.images, 2 * v.height, 2 * v.width, outputs);
  run([&] { kernels().upconv2x2_forward(v, w, b, output.view); });
  return output;
}

std::optional<Array> upconv2x2_backward(const Array& gradient, const Array& x, const Floats& weight,
                                        Floats& weight_gradient, Floats& bias_gradient, bool wants_input) {
  const View& g = gradient.whole();
  expect(g.images == x.view.images && g.height == 2 * x.view.height && g.width == 2 * x.view.width,
         "upconv2x2's gradient has shape " + gradient.describe() + ", which does not fit its input " + x.describe());
  const ptrdiff_t floats = weight_floats(x.view.blocks(), g.channels, 4);
  const float* w = expect_floats(weight, floats, "the weight of upconv2x2");
  float* dw = expect_mutable(weight_gradient, floats, "the weight gradient of upconv2x2");
  float* db = expect_mutable(bias_gradient, padded(g.channels), "the bias gradient of upconv2x2");
  std::optional<Array> x_gradient;
  if (wants_input) x_gradient = gradient_of(x);
  const View& v = x.whole();
  const View mask = mask_of(x);
  run([&] {
    kernels().add_pixels(g, db);
    kernels().upconv2x2_backward_weight(v, g, dw);
    if (wants_input) kernels().upconv2x2_backward_data(g, w, x_gradient->view, mask);
  });
  return x_gradient;
}

Array conv1x1_forward(const Array& x, const Floats& weight, const Floats& bias, int outputs) {
  const View& v = x.whole();
  const float* w = expect_floats(weight, weight_floats(v.blocks(), outputs, 1), "the weight of conv1x1");
  const float* b = expect_floats(bias, padded(outputs), "the bias of conv1x1");
  Array output(v.images, v.height, v.width, outputs);
  run([&] { kernels().conv1x1_forward(v, w, b, output.view); });
  return output;
}

std::optional<Array> conv1x1_backward(const Array& gradient, const Array& x, const Floats& weight,
                                      Floats& weight_gradient, Floats& bias_gradient, bool wants_input) {
  const View& g = gradient.whole();
  expect(g.images == x.view.images && g.height == x.view.height && g.width == x.view.width,
         "conv1x1's gradient has shape " + gradient.describe() + ", which does not fit its input " + x.describe());
  const ptrdiff_t floats = weight_floats(x.view.blocks(), g.channels, 1);
  const float* w = expect_floats(weight, floats, "the weight of conv1x1");
  float* dw = expect_mutable(weight_gradient, floats, "the weight gradient of conv1x1");
  float* db = expect_mutable(bias_gradient, padded(g.channels), "the bias gradient of conv1x1");
  std::optional<Array> x_gradient;
  if (wants_input) x_gradient = gradient_of(x);
  const View& v = x.whole();
  const View mask = mask_of(x);
  run([&] {
    kernels().add_pixels(g, db);
    kernels().conv1x1_backward_weight(v, g, dw);
    if (wants_input) kernels().conv1x1_backward_data(g, w, x_gradient->view, mask);
  });
  return x_gradient;
}

// --------------------------------------------------------------------------------------------------
// pooling, loss, dropout, sums, SGD

// target += source, whose pixels are the centre of target's.
void add_centre(Array& target, const Array& source) {
  const View& s = source.whole();
  target.whole();
  expect(s.images == target.view.images && s.channels == target.view.channels && s.height <= target.view.height &&
             s.width <= target.view.width,
         "an array of shape " + source.describe() + " cannot be added to one of " + target.describe());
  target.masked = target.masked && source.masked;
  run([&] { kernels().add(s, target.centre(s.height, s.width).view); });
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

// The gradient of the pooling's input, to which that of its centre is added where there is one.
Array maxpool2x2_backward(const Array& gradient, const Choice& choice, int height, int width,
                          const std::optional<Array>& present) {
  const View& g = gradient.whole();
  expect(g.height == height / 2 && g.width == width / 2 && same_shape(g, choice.pooled.view),
         "maxpool2x2's gradient has shape " + gradient.describe() + ", which does not fit its input");
  Array input_gradient(g.images, height, width, g.channels, choice.rectified ? kGradientBorder : 0);
  input_gradient.masked = choice.rectified && (!present || present->masked);
  run([&] { kernels().maxpool2x2_backward(g, choice.data(), input_gradient.view); });
  if (present) add_centre(input_gradient, *present);
  return input_gradient;
}

std::pair<double, std::optional<Array>> softmax_cross_entropy(const Array& logits, const Labels& labels,
                                                              const Weights& weights, bool wants_gradient) {
  const View& v = logits.whole();
  const ptrdiff_t pixels = static_cast<ptrdiff_t>(v.images) * v.height * v.width;
  expect(labels.size() == pixels && weights.size() == pixels,
         "softmax_cross_entropy was given logits of shape " + logits.describe() + " with " +
             std::to_string(labels.size()) + " labels and " + std::to_string(weights.size()) +
             " weights; one of each is expected for every pixel");
  std::optional<Array> gradient;
  if (wants_gradient) gradient = like(logits);
  const int32_t* label = labels.data();
  const float* weight = weights.data();
  const CrossEntropy result =
      run([&] { return kernels().softmax_cross_entropy(v, label, weight, gradient ? gradient->view : View{}); });
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

void multiply(const Array& target, float factor) {
  const View& v = target.whole();
  run([&] { kernels().multiply(v, factor); });
}

void sgd_momentum(Floats& value, const Floats& gradient, Floats& momentum, float learning_rate, float rate) {
  float* v = value.mutable_data();
  const float* g = expect_floats(gradient, value.size(), "the gradient");
  float* m = expect_mutable(momentum, value.size(), "the momentum");
  const ptrdiff_t count = value.size();
  run([&] { kernels().sgd_momentum(v, g, m, learning_rate, rate, count); });
}

}  // namespace
}  // namespace fastunet

PYBIND11_MODULE(_fastunet, module) {
  using namespace fastunet;
  module.doc() = "fastunet's CPU engine";

  py::class_<Array>(module, "Array", "A float32 tensor in the engine's own layout.")
      .def(py::init([](int images, int height, int width, int channels) {
             Array array(images, height, width, channels);
             clear(array);
             array.masked = true;  // as a gradient, by whatever ReLU
             return array;
           }),
           "images"_a, "height"_a, "width"_a, "channels"_a, "Zeros.")
      .def_static("from_pixels", &from_pixels, "pixels"_a, "Copies a contiguous float32 (N, H, W, C).")
      .def("pixels", &to_pixels, "A copy as (N, H, W, C).")
      .def_property_readonly("shape", &Array::shape)
      .def_property_readonly("nbytes", [](const Array& a) { return a.block ? a.block->floats * sizeof(float) : 0; });

  py::class_<Choice>(module, "Choice", "Which pixel won each 2x2 of a pooling.")
      .def_property_readonly("nbytes", [](const Choice& c) { return c.bytes->floats * sizeof(float); });

  module.def(
      "conv3x3_algorithm",
      [](const std::string& wanted, int inputs, int outputs, int height, int width) {
        const auto found = kernels().conv3x3_algorithm(algorithm_named(wanted), inputs, outputs, height, width);
        return std::string(kAlgorithms[static_cast<int>(found)]);
      },
      "wanted"_a, "inputs"_a, "outputs"_a, "height"_a, "width"_a);
  module.def("conv3x3_forward", &conv3x3_forward, "x"_a, "skip"_a, "weight"_a, "bias"_a, "outputs"_a, "relu"_a,
             "algorithm"_a = "auto");
  module.def("conv3x3_maxpool2x2_forward", &conv3x3_maxpool2x2_forward, "x"_a, "weight"_a, "bias"_a, "outputs"_a,
             "kept_height"_a, "kept_width"_a, "wants_choice"_a, "algorithm"_a = "auto");
  module.def("conv3x3_backward", &conv3x3_backward, "gradient"_a, "x"_a, "skip"_a, "relu_output"_a, "weight"_a,
             "weight_gradient"_a.noconvert(), "bias_gradient"_a.noconvert(), "wants_input"_a, "algorithm"_a = "auto");
  module.def("upconv2x2_forward", &upconv2x2_forward, "x"_a, "weight"_a, "bias"_a, "outputs"_a);
  module.def("upconv2x2_backward", &upconv2x2_backward, "gradient"_a, "x"_a, "weight"_a,
             "weight_gradient"_a.noconvert(), "bias_gradient"_a.noconvert(), "wants_input"_a);
  module.def("conv1x1_forward", &conv1x1_forward, "x"_a, "weight"_a, "bias"_a, "outputs"_a);
  module.def("conv1x1_backward", &conv1x1_backward, "gradient"_a, "x"_a, "weight"_a, "weight_gradient"_a.noconvert(),
             "bias_gradient"_a.noconvert(), "wants_input"_a);
  module.def("maxpool2x2_forward", &maxpool2x2_forward, "x"_a);
  module.def("maxpool2x2_backward", &maxpool2x2_backward, "gradient"_a, "choice"_a, "height"_a, "width"_a,
             "present"_a = std::nullopt);
  module.def("softmax_cross_entropy", &softmax_cross_entropy, "logits"_a, "labels"_a, "weights"_a, "wants_gradient"_a);
  module.def("softmax", &softmax, "logits"_a);
  module.def("dropout", &dropout, "x"_a, "rate"_a, "seed"_a, "draw"_a);
  module.def("add_centre", &add_centre, "target"_a, "source"_a);
  module.def("multiply", &multiply, "target"_a, "factor"_a);
  module.def("sgd_momentum", &sgd_momentum, "value"_a.noconvert(), "gradient"_a, "momentum"_a.noconvert(),
             "learning_rate"_a, "rate"_a);

  module.def("group_width", &group_width, "outputs"_a);
  module.attr("BLOCK") = kBlock;
  module.def("instruction_set", [] { return std::string(kernels().name); });
  module.def("thread_count", [] { return run([] { return thread_count(); }); });
  module.def("set_thread_count", [](int count) { run([&] { set_thread_count(count); }); }, "count"_a);
  module.def("allocated_bytes", &allocated_bytes);
  module.def("peak_allocated_bytes", &peak_allocated_bytes);
  module.def("scratch_bytes", [] { return run([] { return scratch_bytes(); }); });
  module.def("reset_peak", &reset_peak);
  module.def("trim", [] { run([] { trim(); }); });
}

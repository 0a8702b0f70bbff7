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

// A tensor of float32 in blocks of 16 channels, or a crop of one. Lanes beyond the last channel are zero.
struct Array {
  View view;
  std::shared_ptr<Block> block;

  Array(int images, int height, int width, int channels, int border = 0) {
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
    block = std::make_shared<Block>(static_cast<size_t>(view.image_stride) * images);
    view.data = block->data + border * view.row_stride + border * kBlock;
  }

  py::tuple shape() const { return py::make_tuple(view.images, view.height, view.width, view.channels); }

  std::string describe() const {
    return "(" + std::to_string(view.images) + ", " + std::to_string(view.height) + ", " + std::to_string(view.width) +
           ", " + std::to_string(view.channels) + ")";
  }

  Array centre(int height, int width) const {
    Array crop = *this;
    crop.view.data = view.at(0, 0, (view.height - height) / 2, (view.width - width) / 2);
    crop.view.height = height;
    crop.view.width = width;
    return crop;
  }
};

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

Algorithm algorithm_named(const std::string& name) {
  if (name == "auto") return Algorithm::kAutomatic;
  if (name == "direct") return Algorithm::kDirect;
  if (name == "winograd") return Algorithm::kWinograd;
  throw std::invalid_argument("convolution algorithm '" + name + "' is unknown; expected auto, direct or winograd");
}

Array from_pixels(const Floats& pixels) {
  expect(pixels.ndim() == 4,
         "an array of " + std::to_string(pixels.ndim()) + " axes was given, (N, H, W, C) is expected");
  Array result(static_cast<int>(pixels.shape(0)), static_cast<int>(pixels.shape(1)), static_cast<int>(pixels.shape(2)),
               static_cast<int>(pixels.shape(3)));
  const float* source = pixels.data();
  run([&] { kernels().to_blocks(source, result.view); });
  return result;
}

Floats to_pixels(const Array& array) {
  const View& v = array.view;
  Floats pixels({v.images, v.height, v.width, v.channels});
  float* target = pixels.mutable_data();
  run([&] { kernels().from_blocks(v, target); });
  return pixels;
}

Array like(const Array& a) { return Array(a.view.images, a.view.height, a.view.width, a.view.channels); }

void clear(const Array& array) { std::memset(array.block->data, 0, array.block->floats * sizeof(float)); }

// Zeros the pixels within `border` of the view's edge, outside it.
void clear_border(const View& v, int border) {
  const size_t side = static_cast<size_t>(border) * kBlock * sizeof(float);
  const size_t line = static_cast<size_t>(v.row_stride) * sizeof(float);
  for (int image = 0; image < v.images; ++image)
    for (int block = 0; block < v.blocks(); ++block)
      for (int row = -border; row < v.height + border; ++row) {
        float* const begin = v.at(image, block, row, -border);
        if (row < 0 || row >= v.height) {
          std::memset(begin, 0, line);
        } else {
          std::memset(begin, 0, side);
          std::memset(v.at(image, block, row, v.width), 0, side);
        }
      }
}

// --------------------------------------------------------------------------------------------------
// convolution 3x3

// [the skip's centre, x] as one input.
Channels concatenation(const Array& x, const std::optional<Array>& skip) {
  Channels input;
  if (!skip) {
    input.part[0] = x.view;
    return input;
  }
  expect(skip->view.images == x.view.images && skip->view.height >= x.view.height && skip->view.width >= x.view.width,
         "the skip connection has shape " + skip->describe() + ", too small to be cropped to " + x.describe());
  input.count = 2;
  input.part[0] = skip->centre(x.view.height, x.view.width).view;
  input.part[1] = x.view;
  return input;
}

ptrdiff_t weight_floats(int input_blocks, int outputs, int taps) {
  return static_cast<ptrdiff_t>(input_blocks) * kBlock * padded(outputs) * taps;
}

Array conv3x3_forward(const Array& x, const std::optional<Array>& skip, const Floats& weight, const Floats& bias,
                      int outputs, bool relu, const std::string& algorithm) {
  expect(x.view.height >= 3 && x.view.width >= 3,
         "conv3x3 was given an input of shape " + x.describe() + "; it must be at least 3 x 3 pixels");
  const Channels input = concatenation(x, skip);
  const float* w = expect_floats(weight, weight_floats(input.blocks(), outputs, 9), "the weight of conv3x3");
  const float* b = expect_floats(bias, padded(outputs), "the bias of conv3x3");
  const Algorithm chosen = algorithm_named(algorithm);
  Array output(x.view.images, x.view.height - 2, x.view.width - 2, outputs);
  run([&] { kernels().conv3x3_forward(input, w, b, relu, output.view, chosen); });
  return output;
}

// Adds to weight_gradient and bias_gradient; returns the gradients of x and of the skip's centre where
// wanted.
std::pair<std::optional<Array>, std::optional<Array>> conv3x3_backward(const Array& gradient, const Array& x,
                                                                       const std::optional<Array>& skip,
                                                                       const std::optional<Array>& relu_output,
                                                                       const Floats& weight, Floats& weight_gradient,
                                                                       Floats& bias_gradient, bool wants_input,
                                                                       const std::string& algorithm) {
  const View& g = gradient.view;
  expect(g.images == x.view.images && g.height == x.view.height - 2 && g.width == x.view.width - 2,
         "conv3x3's gradient has shape " + gradient.describe() + ", which does not fit its input " + x.describe());
  expect(!relu_output || same_shape(relu_output->view, g),
         "conv3x3's gradient has shape " + gradient.describe() + ", which is not that of its output");
  const Channels input = concatenation(x, skip);
  const ptrdiff_t floats = weight_floats(input.blocks(), g.channels, 9);
  const float* w = expect_floats(weight, floats, "the weight of conv3x3");
  float* dw = expect_mutable(weight_gradient, floats, "the weight gradient of conv3x3");
  float* db = expect_mutable(bias_gradient, padded(g.channels), "the bias gradient of conv3x3");
  const Algorithm chosen = algorithm_named(algorithm);
  std::optional<Array> x_gradient, skip_gradient;
  Channels input_gradient;
  if (wants_input) {
    x_gradient = like(x);
    input_gradient.part[0] = x_gradient->view;
    if (skip) {
      skip_gradient.emplace(x.view.images, x.view.height, x.view.width, skip->view.channels);
      input_gradient.count = 2;
      input_gradient.part[0] = skip_gradient->view;
      input_gradient.part[1] = x_gradient->view;
    }
  }
  run([&] {
    Array masked(g.images, g.height, g.width, g.channels, 2);
    clear_border(masked.view, 2);
    kernels().backward_epilogue(g, relu_output ? relu_output->view : View{}, masked.view, db);
    kernels().conv3x3_backward_weight(input, masked.view, dw, chosen);
    if (wants_input) kernels().conv3x3_backward_data(masked.view, w, input_gradient, chosen);
  });
  return {x_gradient, skip_gradient};
}

// --------------------------------------------------------------------------------------------------
// up-convolution, 1x1 head

Array upconv2x2_forward(const Array& x, const Floats& weight, const Floats& bias, int outputs) {
  const View& v = x.view;
  const float* w = expect_floats(weight, weight_floats(v.blocks(), outputs, 4), "the weight of upconv2x2");
  const float* b = expect_floats(bias, padded(outputs), "the bias of upconv2x2");
  Array output(v.images, 2 * v.height, 2 * v.width, outputs);
  run([&] { kernels().upconv2x2_forward(v, w, b, output.view); });
  return output;
}

std::optional<Array> upconv2x2_backward(const Array& gradient, const Array& x, const Floats& weight,
                                        Floats& weight_gradient, Floats& bias_gradient, bool wants_input) {
  const View& g = gradient.view;
  expect(g.images == x.view.images && g.height == 2 * x.view.height && g.width == 2 * x.view.width,
         "upconv2x2's gradient has shape " + gradient.describe() + ", which does not fit its input " + x.describe());
  const ptrdiff_t floats = weight_floats(x.view.blocks(), g.channels, 4);
  const float* w = expect_floats(weight, floats, "the weight of upconv2x2");
  float* dw = expect_mutable(weight_gradient, floats, "the weight gradient of upconv2x2");
  float* db = expect_mutable(bias_gradient, padded(g.channels), "the bias gradient of upconv2x2");
  std::optional<Array> x_gradient;
  if (wants_input) x_gradient = like(x);
  run([&] {
    kernels().backward_epilogue(g, View{}, g, db);
    kernels().upconv2x2_backward_weight(x.view, g, dw);
    if (wants_input) kernels().upconv2x2_backward_data(g, w, x_gradient->view);
  });
  return x_gradient;
}

Array conv1x1_forward(const Array& x, const Floats& weight, const Floats& bias, int outputs) {
  const View& v = x.view;
  const float* w = expect_floats(weight, weight_floats(v.blocks(), outputs, 1), "the weight of conv1x1");
  const float* b = expect_floats(bias, padded(outputs), "the bias of conv1x1");
  Array output(v.images, v.height, v.width, outputs);
  run([&] { kernels().conv1x1_forward(v, w, b, output.view); });
  return output;
}

std::optional<Array> conv1x1_backward(const Array& gradient, const Array& x, const Floats& weight,
                                      Floats& weight_gradient, Floats& bias_gradient, bool wants_input) {
  const View& g = gradient.view;
  expect(g.images == x.view.images && g.height == x.view.height && g.width == x.view.width,
         "conv1x1's gradient has shape " + gradient.describe() + ", which does not fit its input " + x.describe());
  const ptrdiff_t floats = weight_floats(x.view.blocks(), g.channels, 1);
  const float* w = expect_floats(weight, floats, "the weight of conv1x1");
  float* dw = expect_mutable(weight_gradient, floats, "the weight gradient of conv1x1");
  float* db = expect_mutable(bias_gradient, padded(g.channels), "the bias gradient of conv1x1");
  std::optional<Array> x_gradient;
  if (wants_input) x_gradient = like(x);
  run([&] {
    kernels().backward_epilogue(g, View{}, g, db);
    kernels().conv1x1_backward_weight(x.view, g, dw);
    if (wants_input) kernels().conv1x1_backward_data(g, w, x_gradient->view);
  });
  return x_gradient;
}

// --------------------------------------------------------------------------------------------------
// pooling, loss, dropout, sums, SGD

using Choices = py::array_t<uint8_t, py::array::c_style>;

std::pair<Array, Choices> maxpool2x2_forward(const Array& x) {
  const View& v = x.view;
  expect(v.height >= 2 && v.width >= 2,
         "maxpool2x2 was given an input of shape " + x.describe() + "; it must be at least 2 x 2 pixels");
  Array output(v.images, v.height / 2, v.width / 2, v.channels);
  Choices choice(static_cast<py::ssize_t>(v.images) * v.blocks() * output.view.height * output.view.width * kBlock);
  uint8_t* target = choice.mutable_data();
  run([&] { kernels().maxpool2x2_forward(v, output.view, target); });
  return {output, choice};
}

Array maxpool2x2_backward(const Array& gradient, const Choices& choice, int height, int width) {
  const View& g = gradient.view;
  expect(g.height == height / 2 && g.width == width / 2 &&
             choice.size() == static_cast<py::ssize_t>(g.images) * g.blocks() * g.height * g.width * kBlock,
         "maxpool2x2's gradient has shape " + gradient.describe() + ", which does not fit its input");
  Array input_gradient(g.images, height, width, g.channels);
  const uint8_t* which = choice.data();
  run([&] { kernels().maxpool2x2_backward(g, which, input_gradient.view); });
  return input_gradient;
}

std::pair<double, std::optional<Array>> softmax_cross_entropy(const Array& logits, const Labels& labels,
                                                              const Weights& weights, bool wants_gradient) {
  const View& v = logits.view;
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
  run([&] { kernels().softmax(logits.view, probabilities.view); });
  return probabilities;
}

Array dropout(const Array& x, float rate, uint64_t seed, uint64_t draw) {
  expect(rate >= 0 && rate < 1, "a dropout rate of " + std::to_string(rate) + " was given; 0 <= rate < 1 is expected");
  Array output = like(x);
  run([&] { kernels().dropout(x.view, output.view, rate, seed, draw); });
  return output;
}

// target += source, whose pixels are the centre of target's.
void add_centre(const Array& target, const Array& source) {
  const View& s = source.view;
  expect(s.images == target.view.images && s.channels == target.view.channels && s.height <= target.view.height &&
             s.width <= target.view.width,
         "an array of shape " + source.describe() + " cannot be added to one of " + target.describe());
  run([&] { kernels().add(s, target.centre(s.height, s.width).view); });
}

void multiply(const Array& target, float factor) {
  run([&] { kernels().multiply(target.view, factor); });
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
             return array;
           }),
           "images"_a, "height"_a, "width"_a, "channels"_a, "Zeros.")
      .def_static("from_pixels", &from_pixels, "pixels"_a, "Copies a contiguous float32 (N, H, W, C).")
      .def("pixels", &to_pixels, "A copy as (N, H, W, C).")
      .def_property_readonly("shape", &Array::shape)
      .def_property_readonly("nbytes", [](const Array& a) { return a.block->floats * sizeof(float); });

  module.def("conv3x3_forward", &conv3x3_forward, "x"_a, "skip"_a, "weight"_a, "bias"_a, "outputs"_a, "relu"_a,
             "algorithm"_a = "auto");
  module.def("conv3x3_backward", &conv3x3_backward, "gradient"_a, "x"_a, "skip"_a, "relu_output"_a, "weight"_a,
             "weight_gradient"_a.noconvert(), "bias_gradient"_a.noconvert(), "wants_input"_a, "algorithm"_a = "auto");
  module.def("upconv2x2_forward", &upconv2x2_forward, "x"_a, "weight"_a, "bias"_a, "outputs"_a);
  module.def("upconv2x2_backward", &upconv2x2_backward, "gradient"_a, "x"_a, "weight"_a,
             "weight_gradient"_a.noconvert(), "bias_gradient"_a.noconvert(), "wants_input"_a);
  module.def("conv1x1_forward", &conv1x1_forward, "x"_a, "weight"_a, "bias"_a, "outputs"_a);
  module.def("conv1x1_backward", &conv1x1_backward, "gradient"_a, "x"_a, "weight"_a, "weight_gradient"_a.noconvert(),
             "bias_gradient"_a.noconvert(), "wants_input"_a);
  module.def("maxpool2x2_forward", &maxpool2x2_forward, "x"_a);
  module.def("maxpool2x2_backward", &maxpool2x2_backward, "gradient"_a, "choice"_a, "height"_a, "width"_a);
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

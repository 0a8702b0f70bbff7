// Runs the kernels of a machine that has no Python: requests come on standard input, one after the other, results go
// to standard output. A request is the kernel's name in 32 bytes and its arguments as the functions below read them;
// the results are arrays, ended by a count of -1. A number is 8 bytes; an array is a count and so many float32; a
// tensor is its shape (N, H, W, C) and its pixels. Results are poisoned before a kernel runs; all around every tensor
// lie values that are no numbers and must stay as they are, and lanes beyond the last channel must be zero.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <limits>
#include <map>
#include <string>
#include <vector>

#include "../../csrc/cpu/kernels.h"
#include "../../csrc/memory.h"
#include "../../csrc/thread_pool.h"

namespace fastunet {
namespace {

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "%s\n", what);
  std::exit(1);
}

void receive(void* target, size_t bytes) {
  if (std::fread(target, 1, bytes, stdin) != bytes) fail("a request ends within an argument");
}

int64_t number() {
  int64_t value;
  receive(&value, sizeof(value));
  return value;
}

int integer() { return static_cast<int>(number()); }

std::vector<float> floats() {
  std::vector<float> values(static_cast<size_t>(number()));
  receive(values.data(), values.size() * sizeof(float));
  return values;
}

void send(const std::vector<float>& values) {
  const int64_t count = static_cast<int64_t>(values.size());
  std::fwrite(&count, sizeof(count), 1, stdout);
  std::fwrite(values.data(), sizeof(float), values.size(), stdout);
}

constexpr int kMargin = 2;  // pixels on every side
constexpr float kPoison = std::numeric_limits<float>::quiet_NaN();

class Tensor {
 public:
  Tensor(int images, int height, int width, int channels, float around = kPoison, int sides = kMargin)
      : around_(around), sides_(sides) {
    view.images = images;
    view.height = height;
    view.width = width;
    view.channels = channels;
    view.row_stride = static_cast<ptrdiff_t>(width + 2 * sides) * kBlock;
    view.block_stride = view.row_stride * (height + 2 * kMargin);
    view.image_stride = view.block_stride * view.blocks();
    floats_ = static_cast<size_t>(view.image_stride) * images;
    memory_ = allocate(floats_);
    view.data = memory_ + kMargin * view.row_stride + sides * kBlock;
    for (size_t i = 0; i < floats_; ++i) memory_[i] = around;
    for_each_pixel([](float* pixel, bool inside) {
      for (int i = 0; inside && i < kBlock; ++i) pixel[i] = kPoison;
    });
  }
  explicit Tensor(const View& like, int sides = kMargin)
      : Tensor(like.images, like.height, like.width, like.channels, kPoison, sides) {}
  Tensor(const Tensor&) = delete;
  Tensor& operator=(const Tensor&) = delete;
  ~Tensor() {
    for_each_pixel([this](float* pixel, bool inside) {
      for (int i = 0; !inside && i < kBlock; ++i)
        if (std::memcmp(pixel + i, &around_, sizeof(float)) != 0) fail("a kernel wrote beyond a tensor");
    });
    release(memory_, floats_);
  }

  View centre(int height, int width) const {
    View crop = view;
    crop.data = view.at(0, 0, (view.height - height) / 2, (view.width - width) / 2);
    crop.height = height;
    crop.width = width;
    return crop;
  }

  View view;

 private:
  template <class Body>
  void for_each_pixel(const Body& body) {
    for (int image = 0; image < view.images; ++image)
      for (int block = 0; block < view.blocks(); ++block)
        for (int row = -kMargin; row < view.height + kMargin; ++row)
          for (int column = -sides_; column < view.width + sides_; ++column)
            body(view.at(image, block, row, column),
                 row >= 0 && row < view.height && column >= 0 && column < view.width);
  }

  float* memory_;
  size_t floats_;
  float around_;
  int sides_;
};

void send(const Tensor& tensor) {
  const View& v = tensor.view;
  for (int image = 0; v.channels % kBlock != 0 && image < v.images; ++image)
    for (int row = 0; row < v.height; ++row)
      for (int column = 0; column < v.width; ++column)
        for (int i = v.channels % kBlock; i < kBlock; ++i)
          if (v.at(image, v.blocks() - 1, row, column)[i] != 0) fail("a lane beyond the last channel is not zero");
  std::vector<float> pixels(static_cast<size_t>(v.images) * v.height * v.width * v.channels);
  kernels().from_blocks(v, pixels.data());
  send(pixels);
}

// Tensors of one request, which stay where they are.
using Tensors = std::deque<Tensor>;

const View& tensor(Tensors& tensors, float around = kPoison) {
  int shape[4];
  for (int& side : shape) side = integer();
  const View& view = tensors.emplace_back(shape[0], shape[1], shape[2], shape[3], around).view;
  kernels().to_blocks(floats().data(), view);
  return view;
}

// The input of a 3x3 convolution: so many tensors, the first cropped to the second; or, of 0, a first layer.
struct Input {
  Tensors tensors;
  std::vector<float> pixels, weight, bias;
  FirstLayer first_layer;
  Channels channels;

  Input() {
    channels.count = integer();
    if (channels.count == 0) {
      channels.count = 1;
      const int images = integer();
      first_layer.height = integer();
      first_layer.width = integer();
      first_layer.channels = integer();
      View& sizes = channels.part[0];
      sizes.images = images;
      sizes.height = first_layer.height - 2;
      sizes.width = first_layer.width - 2;
      sizes.channels = integer();
      first_layer.relu = integer() != 0;
      pixels = floats(), weight = floats(), bias = floats();
      first_layer.pixels = pixels.data();
      first_layer.weight = weight.data();
      first_layer.bias = bias.data();
      channels.first_layer = &first_layer;
      return;
    }
    for (int part = 0; part < channels.count; ++part) channels.part[part] = tensor(tensors);
    if (channels.count == 2) channels.part[0] = tensors[0].centre(channels.part[1].height, channels.part[1].width);
  }
};

Algorithm algorithm() { return static_cast<Algorithm>(integer()); }

void first_layer_forward() {
  const Input input;
  Tensor output(input.channels.part[0], 0);  // it writes row after row without a gap
  kernels().first_layer_forward(input.first_layer, output.view);
  send(output);
}

void conv3x3_forward() {
  const Algorithm way = algorithm();
  const int outputs = integer();
  const bool relu = integer() != 0;
  const int kept_height = integer(), kept_width = integer();
  const bool pools = integer() != 0;
  const Input input;
  const std::vector<float> weight = floats(), bias = floats();
  const View& x = input.channels.part[0];
  const int height = x.height - 2, width = x.width - 2;
  Tensor output(x.images, kept_height, kept_width, outputs), pooled(x.images, height / 2, width / 2, outputs);
  std::vector<uint8_t> choice(static_cast<size_t>(choice_index(pooled.view, x.images, 0, 0, 0)), 0xFF);
  Destination to(Channels{{output.view}}, height, width);
  to.bias = bias.data();
  to.relu = relu;
  if (pools) {
    to.pooled = pooled.view;
    to.choice = choice.data();
  }
  kernels().conv3x3_forward(input.channels, weight.data(), to, way);
  send(output);
  if (!pools) return;
  send(pooled);
  send(std::vector<float>(choice.begin(), choice.end()));
}

// The input's gradient, `masked`: where the input is above 0.
void conv3x3_backward_data() {
  const Algorithm way = algorithm();
  const bool masked = integer() != 0;
  const Input input;
  Tensors tensors;
  const View& gradient = tensor(tensors, 0.0f);
  const std::vector<float> weight = floats();
  Channels values;
  values.count = input.channels.count;
  for (int part = 0; part < values.count; ++part)
    values.part[part] = tensors.emplace_back(input.channels.part[part]).view;
  Destination to(values, values.part[0].height, values.part[0].width);
  if (masked && input.channels.first_layer != nullptr) {
    to.mask_first_layer = input.channels.first_layer;
  } else if (masked) {
    for (int part = 0; part < values.count; ++part) to.mask[part] = input.channels.part[part];
  }
  kernels().conv3x3_backward_data(gradient, weight.data(), to, way);
  for (int part = 0; part < values.count; ++part) send(tensors[1 + part]);
}

void conv3x3_backward_weight() {
  const Algorithm way = algorithm();
  const Input input;
  Tensors tensors;
  const View& gradient = tensor(tensors, 0.0f);
  std::vector<float> weight_gradient = floats(), bias_gradient = floats();
  kernels().conv3x3_backward_weight(input.channels, gradient, weight_gradient.data(), bias_gradient.data(), way);
  send(weight_gradient);
  send(bias_gradient);
}

// The up-convolution and the 1x1 layer.
void forward(decltype(KernelTable::conv1x1_forward) kernel, int scale) {
  const int outputs = integer();
  Tensors tensors;
  const View& x = tensor(tensors);
  const std::vector<float> weight = floats(), bias = floats();
  Tensor output(x.images, scale * x.height, scale * x.width, outputs);
  kernel(x, weight.data(), bias.data(), output.view);
  send(output);
}

void composed() {
  const int middle = integer(), outputs = integer();
  Tensors tensors;
  const View &x = tensor(tensors), &skip = tensor(tensors);
  const std::vector<float> up_weight = floats(), up_bias = floats(), weight = floats(), bias = floats();
  const Composition sizes{padded(x.channels), padded(middle), padded(skip.channels), padded(outputs)};
  std::vector<float> phases(static_cast<size_t>(sizes.phase_floats()), kPoison);
  std::vector<float> skip_weight(static_cast<size_t>(sizes.skip_floats()), kPoison);
  std::vector<float> composed_bias(static_cast<size_t>(sizes.outputs), kPoison);
  kernels().compose(sizes, up_weight.data(), up_bias.data(), weight.data(), bias.data(), phases.data(),
                    skip_weight.data(), composed_bias.data());
  Tensor output(x.images, 2 * x.height - 2, 2 * x.width - 2, outputs);
  const View centre = tensors[1].centre(2 * x.height, 2 * x.width);
  kernels().composed_forward(x, centre, phases.data(), skip_weight.data(), composed_bias.data(), output.view);
  send(output);
}

void backward_data(decltype(KernelTable::conv1x1_backward_data) kernel) {
  const bool masked = integer() != 0;
  Tensors tensors;
  const View &x = tensor(tensors), &gradient = tensor(tensors);
  const std::vector<float> weight = floats();
  Tensor input_gradient(x);
  kernel(gradient, weight.data(), input_gradient.view, masked ? x : View{});
  send(input_gradient);
}

void backward_weight(decltype(KernelTable::conv1x1_backward_weight) kernel) {
  Tensors tensors;
  const View &x = tensor(tensors), &gradient = tensor(tensors);
  std::vector<float> weight_gradient = floats();
  kernel(x, gradient, weight_gradient.data());
  send(weight_gradient);
}

void maxpool2x2() {
  const bool rectified = integer() != 0;
  Tensors tensors;
  const View &x = tensor(tensors), &gradient = tensor(tensors);
  Tensor output(gradient), input_gradient(x);
  std::vector<uint8_t> choice(static_cast<size_t>(choice_index(gradient, gradient.images, 0, 0, 0)), 0xFF);
  kernels().maxpool2x2_forward(x, rectified, output.view, choice.data());
  kernels().maxpool2x2_backward(gradient, choice.data(), input_gradient.view);
  send(output);
  send(input_gradient);
}

// The loss with its gradient and without.
void softmax_cross_entropy() {
  Tensors tensors;
  const View& logits = tensor(tensors);
  const std::vector<float> labels_given = floats(), weights = floats();
  const std::vector<int32_t> labels(labels_given.begin(), labels_given.end());
  Tensor gradient(logits);
  for (const View& wanted : {gradient.view, View{}}) {
    const CrossEntropy found = kernels().softmax_cross_entropy(logits, labels.data(), weights.data(), wanted);
    send({static_cast<float>(found.loss_sum / found.weight_sum), static_cast<float>(found.invalid)});
  }
  send(gradient);
}

void softmax() {
  Tensors tensors;
  const View& logits = tensor(tensors);
  Tensor probabilities(logits);
  kernels().softmax(logits, probabilities.view);
  send(probabilities);
}

void dropout() {
  const uint64_t seed = static_cast<uint64_t>(number()), draw = static_cast<uint64_t>(number());
  const float rate = floats().at(0);
  Tensors tensors;
  const View& x = tensor(tensors);
  Tensor output(x);
  kernels().dropout(x, output.view, rate, seed, draw);
  send(output);
}

void sgd_momentum() {
  const std::vector<float> rates = floats();
  std::vector<float> value = floats(), momentum = floats();
  const std::vector<float> gradient = floats();
  kernels().sgd_momentum(value.data(), gradient.data(), momentum.data(), rates.at(0), rates.at(1),
                         static_cast<ptrdiff_t>(value.size()));
  send(value);
  send(momentum);
}

// One tensor with another of its shape.
void elementwise() {
  const float factor = floats().at(0);
  Tensors tensors;
  const View &x = tensor(tensors), &y = tensor(tensors);
  std::vector<float> sums = floats();
  Tensor masked(x), copy(x);
  kernels().mask(x, y, masked.view);
  kernels().mask(x, View{}, copy.view);
  kernels().add_pixels(x, sums.data());
  send(masked);
  send(copy);
  send(sums);
  kernels().add(y, x);
  send(tensors[0]);
  kernels().multiply(y, factor);
  send(tensors[1]);
}

const std::map<std::string, void (*)()> requests = {
    {"first_layer_forward", first_layer_forward},
    {"conv3x3_forward", conv3x3_forward},
    {"conv3x3_backward_data", conv3x3_backward_data},
    {"conv3x3_backward_weight", conv3x3_backward_weight},
    {"upconv2x2_forward", [] { forward(kernels().upconv2x2_forward, 2); }},
    {"upconv2x2_backward_data", [] { backward_data(kernels().upconv2x2_backward_data); }},
    {"upconv2x2_backward_weight", [] { backward_weight(kernels().upconv2x2_backward_weight); }},
    {"composed", composed},
    {"conv1x1_forward", [] { forward(kernels().conv1x1_forward, 1); }},
    {"conv1x1_backward_data", [] { backward_data(kernels().conv1x1_backward_data); }},
    {"conv1x1_backward_weight", [] { backward_weight(kernels().conv1x1_backward_weight); }},
    {"maxpool2x2", maxpool2x2},
    {"softmax_cross_entropy", softmax_cross_entropy},
    {"softmax", softmax},
    {"dropout", dropout},
    {"sgd_momentum", sgd_momentum},
    {"elementwise", elementwise},
};

}  // namespace
}  // namespace fastunet

int main(int, char** arguments) {
  using namespace fastunet;
  const Engine turn;
  set_thread_count(std::atoi(arguments[1]));
  char name[33] = {};
  while (std::fread(name, 1, 32, stdin) == 32) {
    const auto request = requests.find(name);
    if (request == requests.end()) fail("there is no such kernel");
    request->second();
    const int64_t end = -1;
    std::fwrite(&end, sizeof(end), 1, stdout);
    std::fflush(stdout);
  }
}

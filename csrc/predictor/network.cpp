#include "network.h"

#include <cstring>

#include "geometry.h"
#include "image.h"

namespace fastunet {
namespace {

// A layer as the file has it.
struct Shape {
  std::string name;
  std::vector<int> inputs;  // channels of each tensor read
  int outputs, side;        // of the kernel
  bool up;                  // an up-convolution, whose weight is (in, out, 2, 2)

  int taps() const { return side * side; }
  int padded_inputs() const {
    int count = 0;
    for (int channels : inputs) count += padded(channels);
    return count;
  }
  size_t floats() const { return static_cast<size_t>(padded_inputs()) * padded(outputs) * taps() + padded(outputs); }
};

std::vector<Shape> shapes_of(const Model& model) {
  std::vector<Shape> shapes;
  const auto width = [&](int level) { return model.base_channels << level; };
  int below = model.in_channels;
  for (int level = 0; level <= model.depth; ++level) {
    const std::string name = level == model.depth ? "bottleneck" : "encoder." + std::to_string(level);
    shapes.push_back({name + ".conv1", {below}, width(level), 3, false});
    shapes.push_back({name + ".conv2", {width(level)}, width(level), 3, false});
    below = width(level);
  }
  for (int step = 0; step < model.depth; ++step) {
    const std::string name = "decoder." + std::to_string(step);
    const int channels = width(model.depth - 1 - step);
    shapes.push_back({name + ".upconv", {2 * channels}, channels, 2, true});
    shapes.push_back({name + ".conv1", {channels, channels}, channels, 3, false});
    shapes.push_back({name + ".conv2", {channels}, channels, 3, false});
  }
  shapes.push_back({"head", {width(0)}, model.num_classes, 1, false});
  return shapes;
}

// The file's tensors of a layer, of which `packed` becomes weight and bias.
void pack(const ModelFile& file, const Shape& shape, float* packed) {
  int inputs = 0;
  for (int channels : shape.inputs) inputs += channels;
  const int taps = shape.taps(), outputs = shape.outputs, group = group_width(outputs);
  const int input_blocks = shape.padded_inputs() / kBlock;
  std::vector<int64_t> sides{outputs, inputs, shape.side, shape.side};
  if (shape.up) std::swap(sides[0], sides[1]);
  const TensorInFile& weight = file.tensor(shape.name + ".weight", sides);
  const TensorInFile& bias = file.tensor(shape.name + ".bias", {outputs});
  int64_t input = 0, padded_input = 0;
  for (int channels : shape.inputs) {
    for (int channel = 0; channel < channels; ++channel)
      for (int64_t output = 0; output < outputs; ++output)
        for (int tap = 0; tap < taps; ++tap) {
          const int64_t i = input + channel, p = padded_input + channel;
          const int64_t from = (shape.up ? i * outputs + output : output * inputs + i) * taps + tap;
          const int64_t block = (output / group * input_blocks + p / kBlock) * taps + tap;
          packed[(block * kBlock + p % kBlock) * group + output % group] = load<float>(weight.data + 4 * from);
        }
    input += channels;
    padded_input += padded(channels);
  }
  std::memcpy(packed + shape.floats() - padded(outputs), bias.data, 4 * static_cast<size_t>(outputs));
}

size_t floats_of(const Model& model) {
  size_t floats = 0;
  for (const Shape& shape : shapes_of(model)) floats += shape.floats();
  return floats;
}

// Before anything of the declared size is allocated: the largest tensor must really be there.
const Model& checked(const ModelFile& file) {
  const int64_t channels = int64_t{file.model.base_channels} << file.model.depth;
  file.tensor("bottleneck.conv2.weight", {channels, channels, 3, 3});
  return file.model;
}

}  // namespace

Network::Network(const ModelFile& file)
    : channels_(file.model.in_channels), depth_(file.model.depth), weights_(floats_of(checked(file))) {
  const std::vector<Shape> shapes = shapes_of(file.model);
  file.expect_tensors(2 * shapes.size());
  std::memset(weights_.data, 0, weights_.floats * sizeof(float));
  float* packed = weights_.data;
  for (const Shape& shape : shapes) {
    pack(file, shape, packed);
    const ptrdiff_t bias = padded(shape.outputs), weight = static_cast<ptrdiff_t>(shape.floats()) - bias;
    layers_.push_back({{packed, weight}, {packed + weight, bias}, shape.outputs});
    packed += weight + bias;
  }
}

Array Network::operator()(std::vector<float> pixels, int height, int width) const {
  return softmax(logits(Array::from_pixels(std::move(pixels), 1, height, width, channels_)));
}

Array Network::logits(Array x) const {
  const int height = x.height - 2 * static_cast<int>(border(depth_));
  const int width = x.width - 2 * static_cast<int>(border(depth_));
  auto layer = layers_.begin();
  const auto convolve = [&](const std::optional<Array>& skip) {
    x = conv3x3_forward(x, skip, layer->weight, layer->bias, layer->outputs, true, kConvolution);
    ++layer;
  };
  std::vector<Array> skips;
  for (int level = 0; level < depth_; ++level) {
    convolve({});
    auto [skip, pooled, choice] = conv3x3_maxpool2x2_forward(
        x, layer->weight, layer->bias, layer->outputs, static_cast<int>(skip_size(height, level)),
        static_cast<int>(skip_size(width, level)), false, kConvolution);
    ++layer;
    x = std::move(pooled);
    skips.push_back(std::move(skip));
  }
  convolve({});
  convolve({});
  for (int step = 0; step < depth_; ++step) {
    std::optional<Array> skip = std::move(skips.back());
    skips.pop_back();
    const int channels = layer->outputs;
    if (composing_pays(kConvolution, x.view.channels, channels, channels, channels)) {
      x = composed_forward(x, *skip, composed(layer - layers_.begin()), channels);
      layer += 2;
    } else {
      x = upconv2x2_forward(x, layer->weight, layer->bias, channels);
      ++layer;
      convolve(skip);
    }
    skip.reset();  // nobody reads it again
    convolve({});
  }
  return conv1x1_forward(x, layer->weight, layer->bias, layer->outputs);
}

const Composed& Network::composed(size_t up) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::shared_ptr<Composed>& found = composed_[up];
  const Layer &first = layers_[up], &second = layers_[up + 1];
  const int channels = first.outputs;
  if (found == nullptr)
    found = compose(first.weight, first.bias, second.weight, second.bias, 2 * channels, channels, channels, channels);
  return *found;
}

}  // namespace fastunet

#include "array.h"

#include <cstring>
#include <stdexcept>
#include <utility>

#include "memory.h"
#include "thread_pool.h"

namespace fastunet {
namespace {

void clear_border(const View& view, int border) {
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

}  // namespace

Block::Block(size_t floats) : data(allocate(floats)), floats(floats) {}

Block::~Block() { release(data, floats); }

Array::Array(int images, int height, int width, int channels, int border)
    : Array(nullptr, images, height, width, channels, border) {
  block = std::make_shared<Block>(static_cast<size_t>(view.image_stride) * images);
  view.data = block->data + border * view.row_stride + border * kBlock;
  if (border > 0) clear_border(view, border);
}

Array::Array(std::shared_ptr<Pending> pending, int images, int height, int width, int channels, int border)
    : pending(std::move(pending)), height(height), width(width), border(border) {
  if (images < 1 || height < 1 || width < 1 || channels < 1)
    throw std::invalid_argument("an array of shape (" + std::to_string(images) + ", " + std::to_string(height) + ", " +
                                std::to_string(width) + ", " + std::to_string(channels) +
                                ") was asked for; every axis must be at least 1");
  view.images = images;
  view.height = height;
  view.width = width;
  view.channels = channels;
  view.row_stride = static_cast<ptrdiff_t>(width + 2 * border) * kBlock;
  view.block_stride = view.row_stride * (height + 2 * border);
  view.image_stride = view.block_stride * view.blocks();
}

Array Array::from_pixels(const float* pixels, int images, int height, int width, int channels) {
  if (channels <= kImageChannels) {
    const size_t count = static_cast<size_t>(images) * height * width * channels;
    return from_pixels(std::vector<float>(pixels, pixels + count), images, height, width, channels);
  }
  Array result(images, height, width, channels);
  const Engine turn;
  kernels().to_blocks(pixels, result.view);
  return result;
}

Array Array::from_pixels(std::vector<float> pixels, int images, int height, int width, int channels) {
  if (channels > kImageChannels) return from_pixels(pixels.data(), images, height, width, channels);
  const auto pending = std::make_shared<PendingImage>(std::move(pixels), images, height, width, channels);
  return Array(pending, images, height, width, channels);
}

void Array::to_pixels(float* pixels) const {
  const View& v = whole();
  const Engine turn;
  kernels().from_blocks(v, pixels);
}

void Array::clear() const { std::memset(block->data, 0, block->floats * sizeof(float)); }

std::string Array::describe() const {
  return "(" + std::to_string(view.images) + ", " + std::to_string(height) + ", " + std::to_string(width) + ", " +
         std::to_string(view.channels) + ")";
}

View Array::centre(int rows, int columns) const {
  if (rows > view.height || columns > view.width)
    throw std::invalid_argument("of an array of shape " + describe() + " only the centre of " +
                                std::to_string(view.height) + " x " + std::to_string(view.width) +
                                " pixels was kept, and " + std::to_string(rows) + " x " + std::to_string(columns) +
                                " were asked for");
  View crop = whole_or_kept();  // which begins where a centre of its size does
  crop.data =
      crop.at(0, 0, (height - rows) / 2 - (height - view.height) / 2, (width - columns) / 2 - (width - view.width) / 2);
  crop.height = rows;
  crop.width = columns;
  return crop;
}

const View& Array::whole() const {
  if (view.height != height || view.width != width) centre(height, width);
  return whole_or_kept();
}

void Array::settle() {
  const View values = whole();
  if (pending == nullptr) return;
  block = pending->values.block;
  view = values;
  pending = nullptr;
}

const View& Array::whole_or_kept() const {
  if (pending == nullptr) return view;
  const Engine turn;
  Pending& p = *pending;
  if (!p.computed) {
    const View& v = p.values.view;
    p.values = Array(v.images, v.height, v.width, v.channels);
    p.compute(p.values.view);
    p.computed = true;
  }
  return p.values.view;
}

void expect(bool holds, const std::string& sentence) {
  if (!holds) throw std::invalid_argument(sentence);
}

Array like(const Array& a) { return Array(a.view.images, a.view.height, a.view.width, a.view.channels); }

PendingImage::PendingImage(std::vector<float> pixels, int images, int height, int width, int channels)
    : Pending(Array(nullptr, images, height, width, channels)), pixels(std::move(pixels)) {}

void PendingImage::compute(const View& values) const { kernels().to_blocks(pixels.data(), values); }

PendingLayer::PendingLayer(std::shared_ptr<PendingImage> of, std::vector<float> weights, std::vector<float> biases,
                           bool relu, int outputs)
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

void PendingLayer::compute(const View& values) const { kernels().first_layer_forward(layer, values); }

const FirstLayer* first_layer_of(const Array& x) {
  const auto* const pending = dynamic_cast<const PendingLayer*>(x.pending.get());
  return pending != nullptr && !pending->computed ? &pending->layer : nullptr;
}

}  // namespace fastunet

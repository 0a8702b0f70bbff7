// What the operations work on: float32 tensors in the engine's layout (cpu/kernels.h), and those that are only worked
// out when they are read.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace fastunet {

struct Block {
  float* data;
  size_t floats;
  explicit Block(size_t floats);
  ~Block();
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

  Array(int images, int height, int width, int channels, int border = 0);
  Array(std::shared_ptr<Pending> pending, int images, int height, int width, int channels, int border = 0);

  // Contiguous (N, H, W, C); of a few channels they stay as they are, until somebody needs them in blocks.
  static Array from_pixels(const float* pixels, int images, int height, int width, int channels);
  static Array from_pixels(std::vector<float> pixels, int images, int height, int width, int channels);
  void to_pixels(float* pixels) const;  // a copy as (N, H, W, C)
  void clear() const;

  std::string describe() const;  // its shape

  View centre(int rows, int columns) const;  // or it throws, where less was kept
  const View& whole() const;                 // all of it, or it throws
  // Works out what is pending, for which it takes a turn on the engine.
  const View& whole_or_kept() const;
  void settle();  // nothing of it is pending any more, so that it can be written to; or it throws
};

Array like(const Array& a);

void expect(bool holds, const std::string& sentence);  // or throws std::invalid_argument

// Values that may not be needed in blocks; kept once somebody did need them.
struct Pending {
  Array values;
  std::atomic<bool> computed{false};  // set in a turn on the engine, looked at without one

  explicit Pending(Array values) : values(std::move(values)) {}
  virtual ~Pending() = default;
  virtual void compute(const View& values) const = 0;
};

// An image of few channels, which padded to 16 would be many times as large.
struct PendingImage : Pending {
  std::vector<float> pixels;

  PendingImage(std::vector<float> pixels, int images, int height, int width, int channels);
  void compute(const View& values) const override;
};

// See FirstLayer. It has weights of its own, for those given may change before it is read.
struct PendingLayer : Pending {
  std::shared_ptr<PendingImage> image;
  std::vector<float> weight, bias;
  FirstLayer layer;

  PendingLayer(std::shared_ptr<PendingImage> image, std::vector<float> weight, std::vector<float> bias, bool relu,
               int outputs);
  void compute(const View& values) const override;
};

constexpr int kImageChannels = 4;  // of more, computing a first layer again would cost more than it saves

// A first layer that nobody has computed and that may stay so.
const FirstLayer* first_layer_of(const Array& x);

}  // namespace fastunet

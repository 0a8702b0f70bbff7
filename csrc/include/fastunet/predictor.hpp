// fastunet in C++: class probabilities of images of any size by a trained U-Net, on the CPU.
//
//   const fastunet::Predictor predictor("model.safetensors");
//   const int classes = predictor.model().num_classes;
//   std::vector<float> probabilities(static_cast<std::size_t>(height) * width * classes);
//   predictor.predict(fastunet::Image(pixels, height, width),
//                     fastunet::Probabilities(probabilities.data(), height, width, classes));
//
// Images and results stay where they are, in the caller's memory, and may lie in any order. Any number of predictors
// may predict on any number of threads; the operations of the network take turns on the threads of the process.
//
// Mistakes of the caller are std::invalid_argument, files that are no model DataError; what() is one sentence.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__GNUC__)
#define FASTUNET_API __attribute__((visibility("default")))
#else
#define FASTUNET_API
#endif

namespace fastunet {

// A file that is missing, damaged, or no model.
class FASTUNET_API DataError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Even the smallest tiles would take more memory than allowed.
class FASTUNET_API MemoryError : public std::bad_alloc {
 public:
  explicit MemoryError(const std::string& sentence) : sentence_(sentence) {}
  const char* what() const noexcept override { return sentence_.what(); }

 private:
  std::runtime_error sentence_;  // its copies share one text and do not throw
};

// The progress callback asked for the end.
class FASTUNET_API Cancelled : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Somebody's pixels: `data` is the first channel of the upper left pixel; strides are bytes, of either sign, from a
// row, a pixel, a channel to the next.
template <class T>
struct Pixels {
  T* data;
  std::ptrdiff_t height, width, channels;
  std::ptrdiff_t row_stride, pixel_stride, channel_stride;

  // One pixel after the other, channels innermost.
  Pixels(T* data, std::ptrdiff_t height, std::ptrdiff_t width, std::ptrdiff_t channels = 1)
      : Pixels(data, height, width, channels, width * channels * static_cast<std::ptrdiff_t>(sizeof(T))) {}
  // So within a row.
  Pixels(T* data, std::ptrdiff_t height, std::ptrdiff_t width, std::ptrdiff_t channels, std::ptrdiff_t row_stride)
      : Pixels(data, height, width, channels, row_stride, channels * static_cast<std::ptrdiff_t>(sizeof(T)),
               sizeof(T)) {}
  Pixels(T* data, std::ptrdiff_t height, std::ptrdiff_t width, std::ptrdiff_t channels, std::ptrdiff_t row_stride,
         std::ptrdiff_t pixel_stride, std::ptrdiff_t channel_stride)
      : data(data),
        height(height),
        width(width),
        channels(channels),
        row_stride(row_stride),
        pixel_stride(pixel_stride),
        channel_stride(channel_stride) {}
};

enum class PixelType { uint8, uint16, float32 };

// An image to be read, of any of these types; constructed as Pixels are.
struct Image {
  PixelType type;
  Pixels<const std::uint8_t> pixels;  // of whatever type; strides are bytes anyhow

  template <class T>
  Image(const T* data, std::ptrdiff_t height, std::ptrdiff_t width, std::ptrdiff_t channels = 1)
      : Image(type_of(data), Pixels<const T>(data, height, width, channels)) {}

  template <class T>
  Image(const T* data, std::ptrdiff_t height, std::ptrdiff_t width, std::ptrdiff_t channels, std::ptrdiff_t row_stride)
      : Image(type_of(data), Pixels<const T>(data, height, width, channels, row_stride)) {}

  template <class T>
  Image(const T* data, std::ptrdiff_t height, std::ptrdiff_t width, std::ptrdiff_t channels, std::ptrdiff_t row_stride,
        std::ptrdiff_t pixel_stride, std::ptrdiff_t channel_stride)
      : Image(type_of(data), Pixels<const T>(data, height, width, channels, row_stride, pixel_stride, channel_stride)) {
  }

  template <class T>
  Image(PixelType type, const Pixels<T>& p)
      : type(type),
        pixels(reinterpret_cast<const std::uint8_t*>(p.data), p.height, p.width, p.channels, p.row_stride,
               p.pixel_stride, p.channel_stride) {}

 private:
  static PixelType type_of(const std::uint8_t*) { return PixelType::uint8; }
  static PixelType type_of(const std::uint16_t*) { return PixelType::uint16; }
  static PixelType type_of(const float*) { return PixelType::float32; }
};

using Probabilities = Pixels<float>;   // a channel for each class; their sum is 1
using Classes = Pixels<std::uint8_t>;  // one channel: the most probable class of a network of at most 256

struct Options {
  int tile = 0;              // the network's input size in pixels; 0: the one with the least work that fits into memory
  int rotations = 1;         // averaged: 1; 4: right angles; 8: and their mirror images; 7: k * 360/7 degrees
  std::uint64_t memory = 0;  // bytes a prediction may take; 0: 0.8 of what machine and container have left
};

struct Model {
  int in_channels, num_classes, base_channels, depth;
  std::vector<std::string> class_names;  // none where the file holds none
};

// How an image is predicted: the result does not depend on it.
struct Plan {
  std::ptrdiff_t tile_height, tile_width;            // of the network's input
  std::ptrdiff_t preferred_height, preferred_width;  // had memory been unlimited
  std::ptrdiff_t tiles;
  std::uint64_t memory;  // bytes beyond image, result and weights, of a prediction of probabilities
};

// Is told after every tile which part is done, up to 1; where it returns false, the prediction ends in Cancelled.
using Progress = std::function<bool(double part)>;

class FASTUNET_API Predictor {
 public:
  // Loads a model file as `fastunet train` or UNet.save writes it.
  explicit Predictor(const std::string& model_file, const Options& options = {});
  ~Predictor();
  Predictor(Predictor&&) noexcept;
  Predictor& operator=(Predictor&&) noexcept;

  const Model& model() const;

  // Of an image of this size, within the memory there is now.
  Plan plan(std::ptrdiff_t height, std::ptrdiff_t width) const;

  // Where it throws, what is in the result is undefined. Progress may throw too.
  void predict(const Image& image, const Probabilities& result, const Progress& progress = {}) const;
  void predict(const Image& image, const Classes& result, const Progress& progress = {}) const;

 private:
  struct State;
  std::unique_ptr<const State> state_;
};

// CPU threads that everything in this process computes with from now on; fewer where the system grants no more.
FASTUNET_API void set_threads(int count);
FASTUNET_API int threads();

}  // namespace fastunet

// Any arguments of the C API are a prediction or an error. Images and results lie in memory that is just as large as
// their shape and strides say, so that a byte too far is noticed.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <vector>

#include "fastunet/fastunet.h"

namespace {

// The input, taken number by number; zeros after its end.
class Input {
 public:
  Input(const uint8_t* data, size_t size) : data_(data), size_(size) {}

  template <class T>
  T take() {
    T value{};
    const size_t count = std::min(sizeof(T), size_);
    std::memcpy(&value, data_, count);
    data_ += count;
    size_ -= count;
    return value;
  }

  // Mostly a small one, from time to time any.
  ptrdiff_t number() {
    const int8_t small = take<int8_t>();
    return small == -128 ? take<ptrdiff_t>() : small == 127 ? take<int32_t>() : small;
  }

  void fill(std::vector<char>& bytes) {
    const size_t count = std::min(bytes.size(), size_);
    std::memcpy(bytes.data(), data_, count);
  }

 private:
  const uint8_t* data_;
  size_t size_;
};

// Memory for so many rows, pixels and channels at these strides; false where no test has so much.
struct Place {
  std::vector<char> bytes;
  ptrdiff_t first = 0;  // where the first pixel lies

  bool reserve(const ptrdiff_t (&counts)[3], const ptrdiff_t (&strides)[3], size_t element) {
    double low = 0, high = static_cast<double>(element);
    for (int axis = 0; axis < 3; ++axis) {
      const double reach = static_cast<double>(counts[axis] - 1) * static_cast<double>(strides[axis]);
      (reach < 0 ? low : high) += reach;
    }
    if (high - low > (1 << 20)) return false;
    bytes.resize(static_cast<size_t>(high - low));
    bytes.shrink_to_fit();
    first = static_cast<ptrdiff_t>(-low);
    return true;
  }
};

bool reaches_beyond_all_memory(const ptrdiff_t (&counts)[3], const ptrdiff_t (&strides)[3]) {
  double reach = 0;
  for (int axis = 0; axis < 3; ++axis)
    reach += static_cast<double>(counts[axis]) * std::abs(static_cast<double>(strides[axis]));
  return reach >= static_cast<double>(std::numeric_limits<ptrdiff_t>::max() / 2);
}

void expect(bool holds, const char* sentence) {
  if (holds) return;
  std::fprintf(stderr, "%s (last error: %s)\n", sentence, fastunet_error());
  std::abort();
}

int stop_after(void* user_data, double part) {
  expect(part > 0 && part <= 1, "progress is not within 0 and 1");
  return --*static_cast<int*>(user_data);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const char* const model = std::getenv("FUZZ_MODEL");
  expect(model != nullptr, "FUZZ_MODEL must name a model file of depth 1");
  static const bool one_thread = fastunet_set_threads(1) == FASTUNET_OK;  // results may overlap
  expect(one_thread, "the number of threads is refused");

  Input input(data, size);
  fastunet_options options = fastunet_default_options();
  constexpr int kRotations[] = {1, 4, 7, 8};
  const uint8_t which = input.take<uint8_t>();
  options.rotations = which < 0xF0 ? kRotations[which % 4] : input.take<int>();
  options.tile = static_cast<int>(input.number());
  const uint8_t memory = input.take<uint8_t>();
  options.memory = memory < 0xF0 ? uint64_t{1} << memory % 50 : input.take<uint64_t>();
  fastunet_predictor* predictor = nullptr;
  const fastunet_status loaded = fastunet_load(model, &options, &predictor);
  if (loaded != FASTUNET_OK) {
    expect(loaded == FASTUNET_INVALID_ARGUMENT && predictor == nullptr, "options were not refused as an argument");
    return 0;
  }

  fastunet_model about;
  expect(fastunet_describe(predictor, &about) == FASTUNET_OK, "no description");
  fastunet_image image{};
  image.type = static_cast<int>(input.take<uint8_t>() % 4);
  image.height = input.number();
  image.width = input.number();
  image.channels = input.take<uint8_t>() % 4 == 0 ? input.number() : about.in_channels;
  image.row_stride = input.number();
  image.pixel_stride = input.number();
  image.channel_stride = input.number();
  const bool classes = input.take<uint8_t>() % 2 == 1;
  fastunet_result result{nullptr, input.number(), input.number(), input.number()};
  int steps = input.take<int8_t>();

  // What is no image is to be refused before its memory is touched; what is one must have some.
  const ptrdiff_t shape[] = {image.height, image.width, image.channels};
  const ptrdiff_t strides[] = {image.row_stride, image.pixel_stride, image.channel_stride};
  const ptrdiff_t result_shape[] = {image.height, image.width, classes ? 1 : about.num_classes};
  const ptrdiff_t result_strides[] = {result.row_stride, result.pixel_stride, result.channel_stride};
  constexpr ptrdiff_t kLongestSide = 1 << 24;
  constexpr size_t kBytes[] = {1, 2, 4, 1};
  const bool refused = image.type > FASTUNET_FLOAT32 || image.channels != about.in_channels ||
                       std::min(image.height, image.width) < 1 || std::max(image.height, image.width) > kLongestSide ||
                       reaches_beyond_all_memory(shape, strides) ||
                       reaches_beyond_all_memory(result_shape, result_strides);
  Place source, target;
  char nothing = 0;
  image.data = &nothing;
  result.data = &nothing;
  if (!refused) {
    if (image.height * image.width > 300 || !source.reserve(shape, strides, kBytes[image.type]) ||
        !target.reserve(result_shape, result_strides, classes ? 1 : 4)) {
      fastunet_free(predictor);
      return 0;
    }
    input.fill(source.bytes);
    image.data = source.bytes.data() + source.first;
    result.data = target.bytes.data() + target.first;
  }
  const auto predict = classes ? fastunet_predict_classes : fastunet_predict_probabilities;
  const fastunet_status status = predict(predictor, &image, &result, steps > 0 ? stop_after : nullptr, &steps);
  fastunet_plan plan;
  const fastunet_status planned = fastunet_plan_image(predictor, image.height, image.width, &plan);
  fastunet_free(predictor);
  expect(status != FASTUNET_FAILED && status != FASTUNET_BAD_FILE, "a defect was reported");
  expect(planned == FASTUNET_OK || planned == FASTUNET_INVALID_ARGUMENT || planned == FASTUNET_OUT_OF_MEMORY,
         "planning failed otherwise than for size or memory");
  expect(!refused || status == FASTUNET_INVALID_ARGUMENT, "what is no image was not refused");
  if (status == FASTUNET_OK && classes) {
    expect(*static_cast<uint8_t*>(result.data) < about.num_classes, "a class that there is not was written");
  } else if (status == FASTUNET_OK && result.row_stride != 0 && result.row_stride % 4 == 0 &&
             result.pixel_stride != 0 && result.pixel_stride % 4 == 0 && result.channel_stride % 4 == 0) {
    float probability;
    std::memcpy(&probability, result.data, sizeof(probability));
    expect(!std::isnan(probability), "a probability is no number");
  }
  return 0;
}

#include "normalization.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "image.h"
#include "parallel.h"

namespace fastunet {
namespace {

struct Row {
  double low = std::numeric_limits<double>::infinity(), high = -low;  // of the finite ones
  double sum = 0;
  ptrdiff_t bad = 0;  // how many are not finite
};

template <class T>
Row sums(const Pixels<const uint8_t>& pixels, ptrdiff_t row, ptrdiff_t channel) {
  Row found;
  const uint8_t* at = address(pixels, row, 0, channel);
  for (ptrdiff_t column = 0; column < pixels.width; ++column, at += pixels.pixel_stride) {
    const double value = static_cast<double>(load<T>(at));
    if (!std::isfinite(value)) {
      ++found.bad;
      continue;
    }
    found.low = std::min(found.low, value);
    found.high = std::max(found.high, value);
    found.sum += value;
  }
  return found;
}

template <class T>
double squares(const Pixels<const uint8_t>& pixels, ptrdiff_t row, ptrdiff_t channel, double mean) {
  double sum = 0;
  const uint8_t* at = address(pixels, row, 0, channel);
  for (ptrdiff_t column = 0; column < pixels.width; ++column, at += pixels.pixel_stride) {
    const double difference = static_cast<double>(load<T>(at)) - mean;
    sum += difference * difference;
  }
  return sum;
}

template <class T>
Scale scale_of(const Pixels<const uint8_t>& pixels, ptrdiff_t channel, const Normalization& normalization) {
  std::vector<Row> rows(static_cast<size_t>(pixels.height));
  in_parallel(pixels.height, [&](int row) { rows[row] = sums<T>(pixels, row, channel); });
  Row all;
  for (const Row& row : rows) {
    all.low = std::min(all.low, row.low);
    all.high = std::max(all.high, row.high);
    all.sum += row.sum;
    all.bad += row.bad;
  }
  if (all.bad > 0)
    throw std::invalid_argument("channel " + std::to_string(channel) + " of the image holds " +
                                std::to_string(all.bad) + " NaN or infinite values; make them finite");
  if (normalization.rule == Normalization::kGiven) return normalization.scales[static_cast<size_t>(channel)];
  if (normalization.rule == Normalization::kNone) return {0, 1};
  // The mean of equal values may miss them by one rounding, and the deviation would then not be 0.
  if (all.low == all.high) return {all.low, 1};
  if (normalization.rule == Normalization::kMinmax) return {all.low, 1 / (all.high - all.low)};
  const double count = static_cast<double>(pixels.height) * static_cast<double>(pixels.width);
  const double mean = all.sum / count;
  in_parallel(pixels.height, [&](int row) { rows[row].sum = squares<T>(pixels, row, channel, mean); });
  double sum = 0;
  for (const Row& row : rows) sum += row.sum;
  return {mean, 1 / std::sqrt(sum / count)};
}

}  // namespace

bool Normalization::set_rule(const std::string& name) {
  constexpr const char* kNames[] = {"zscore", "minmax", "none"};  // in the order of Rule
  for (int i = 0; i < 3; ++i)
    if (name == kNames[i]) {
      rule = static_cast<Rule>(i);
      return true;
    }
  return false;
}

std::vector<Scale> scales_of(const Image& image, const Normalization& normalization) {
  std::vector<Scale> scales;
  with_type_of(image, [&](auto zero) {
    for (ptrdiff_t channel = 0; channel < image.pixels.channels; ++channel)
      scales.push_back(scale_of<decltype(zero)>(image.pixels, channel, normalization));
  });
  return scales;
}

}  // namespace fastunet

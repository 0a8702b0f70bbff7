#include "rotation.h"

#include <algorithm>
#include <cmath>

#include "parallel.h"

namespace fastunet {
namespace {

// Values of a line become the coefficients of its interpolating cubic B-spline (M. Unser et al., 1993), mirror ends.
void filter(double* line, ptrdiff_t size) {
  if (size == 1) return;
  const double pole = std::sqrt(3.0) - 2, gain = (1 - pole) * (1 - 1 / pole);
  for (ptrdiff_t i = 0; i < size; ++i) line[i] *= gain;
  const double last_power = std::pow(pole, static_cast<double>(size - 1));
  double power = pole;
  line[0] += last_power * line[size - 1];
  for (ptrdiff_t i = 1; i < size - 1 && power != 0; ++i, power *= pole)
    line[0] += power * (line[i] + last_power * line[size - 1 - i]);
  line[0] /= 1 - last_power * last_power;
  for (ptrdiff_t i = 1; i < size; ++i) line[i] += pole * line[i - 1];
  line[size - 1] = (pole * line[size - 2] + line[size - 1]) * pole / (pole * pole - 1);
  for (ptrdiff_t i = size - 2; i >= 0; --i) line[i] = pole * (line[i + 1] - line[i]);
}

// A position of a mirrored axis as one within it.
double folded(double position, ptrdiff_t size) {
  if (size == 1) return 0;
  const double last = static_cast<double>(size - 1), period = 2 * last;
  position -= period * std::floor(position / period);
  return position > last ? period - position : position;
}

// Four neighbours of a position on a mirrored axis, and their weights.
struct Taps {
  ptrdiff_t at[4];
  double weight[4];

  Taps(double position, ptrdiff_t size) {
    const bool inside = position >= 1 && position < static_cast<double>(size - 2);
    if (!inside) position = folded(position, size);
    const auto below = static_cast<ptrdiff_t>(position);
    const double y = position - static_cast<double>(below), z = 1 - y;
    for (int i = 0; i < 4; ++i) at[i] = inside ? below - 1 + i : mirrored(below - 1 + i, size);
    weight[0] = z * z * z / 6;
    weight[1] = (y * y * (y - 2) * 3 + 4) / 6;
    weight[2] = (z * z * (z - 2) * 3 + 4) / 6;
    weight[3] = 1 - weight[0] - weight[1] - weight[2];
  }
};

// Two neighbours of a position on an axis, held at its ends.
struct Neighbours {
  ptrdiff_t low, high;
  double fraction;

  Neighbours(double position, ptrdiff_t size) {
    position = std::min(std::max(position, 0.0), static_cast<double>(size - 1));
    low = static_cast<ptrdiff_t>(position);
    high = std::min(low + 1, size - 1);
    fraction = position - static_cast<double>(low);
  }
};

}  // namespace

Splines::Splines(const Image& image, const std::vector<Scale>& scales)
    : height(image.pixels.height),
      width(image.pixels.width),
      channels(image.pixels.channels),
      values_(static_cast<size_t>(height) * static_cast<size_t>(width) * static_cast<size_t>(channels)) {
  with_type_of(image, [&](auto zero) {
    for (ptrdiff_t c = 0; c < channels; ++c) {
      const Scale scale = scales[static_cast<size_t>(c)];
      float* const values = values_.data() + c * height * width;
      in_parallel(width, height, [&](int column, double* line) {
        for (ptrdiff_t row = 0; row < height; ++row)
          line[row] = scale(static_cast<double>(load<decltype(zero)>(address(image.pixels, row, column, c))));
        filter(line, height);
        for (ptrdiff_t row = 0; row < height; ++row) values[row * width + column] = static_cast<float>(line[row]);
      });
      in_parallel(height, width, [&](int row, double* line) {
        float* const begin = values + row * width;
        std::copy(begin, begin + width, line);
        filter(line, width);
        std::transform(line, line + width, begin, [](double value) { return static_cast<float>(value); });
      });
    }
  });
}

Rotation::Rotation(double degrees, ptrdiff_t height, ptrdiff_t width) {
  const double radians = degrees * (3.14159265358979323846 / 180);
  cosine_ = std::cos(radians);
  sine_ = std::sin(radians);
  const double c = std::abs(cosine_), s = std::abs(sine_);
  const double down = static_cast<double>(height - 1), right = static_cast<double>(width - 1);
  // Rounding must not add a row where the angle is right.
  view_height = static_cast<ptrdiff_t>(std::ceil(down * c + right * s - 1e-9)) + 1;
  view_width = static_cast<ptrdiff_t>(std::ceil(down * s + right * c - 1e-9)) + 1;
  const double middle_row = static_cast<double>(view_height - 1) / 2,
               middle_column = static_cast<double>(view_width - 1) / 2;
  row_offset_ = down / 2 - (cosine_ * middle_row + sine_ * middle_column);
  column_offset_ = right / 2 - (cosine_ * middle_column - sine_ * middle_row);
}

void Rotation::read(const Splines& image, ptrdiff_t top, ptrdiff_t left, int height, int width, float* pixels) const {
  in_parallel(height, [&](int row) {
    const double y = static_cast<double>(top + row);
    float* pixel = pixels + ptrdiff_t{row} * width * image.channels;
    for (ptrdiff_t column = 0; column < width; ++column) {
      const double x = static_cast<double>(left + column);
      const Taps rows(cosine_ * y + sine_ * x + row_offset_, image.height);
      const Taps columns(cosine_ * x - sine_ * y + column_offset_, image.width);
      for (ptrdiff_t c = 0; c < image.channels; ++c) {
        const float* const values = image.channel(c);
        double sum = 0;
        for (int i = 0; i < 4; ++i) {
          const float* const line = values + rows.at[i] * image.width;
          double across = 0;
          for (int j = 0; j < 4; ++j) across += columns.weight[j] * static_cast<double>(line[columns.at[j]]);
          sum += rows.weight[i] * across;
        }
        *pixel++ = static_cast<float>(sum);
      }
    }
  });
}

void Rotation::add(const float* prediction, const Probabilities& sum) const {
  // The transposed rotation, about the same middles.
  const double row_offset = -(cosine_ * row_offset_ - sine_ * column_offset_);
  const double column_offset = -(sine_ * row_offset_ + cosine_ * column_offset_);
  const ptrdiff_t classes = sum.channels;
  in_parallel(sum.height, [&](int row) {
    const double y = static_cast<double>(row);
    for (ptrdiff_t column = 0; column < sum.width; ++column) {
      const double x = static_cast<double>(column);
      const Neighbours rows(cosine_ * y - sine_ * x + row_offset, view_height);
      const Neighbours columns(sine_ * y + cosine_ * x + column_offset, view_width);
      const auto at = [&](ptrdiff_t r, ptrdiff_t c) { return prediction + (r * view_width + c) * classes; };
      const float *const upper_left = at(rows.low, columns.low), *const upper_right = at(rows.low, columns.high);
      const float *const lower_left = at(rows.high, columns.low), *const lower_right = at(rows.high, columns.high);
      const double down = rows.fraction, right = columns.fraction;
      for (ptrdiff_t k = 0; k < classes; ++k) {
        const double value = (1 - down) * ((1 - right) * upper_left[k] + right * upper_right[k]) +
                             down * ((1 - right) * lower_left[k] + right * lower_right[k]);
        float* const total = address(sum, row, column, k);
        store(total, load<float>(total) + static_cast<float>(value));
      }
    }
  });
}

}  // namespace fastunet

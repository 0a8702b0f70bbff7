// The image rotated about its middle, as fastunet/rotations.py: cubic splines keep the image sharp, linear
// interpolation keeps probabilities between 0 and 1 and their sum 1.
#pragma once

#include <vector>

#include "image.h"
#include "normalization.h"

namespace fastunet {

// Coefficients of the interpolating cubic B-splines of the normalised image, channel by channel, with mirror ends.
class Splines {
 public:
  Splines(const Image& image, const std::vector<Scale>& scales);

  ptrdiff_t height, width, channels;

  const float* channel(ptrdiff_t index) const { return values_.data() + index * height * width; }

 private:
  std::vector<float> values_;
};

// Counterclockwise, in a view that holds every pixel of an image of height x width.
class Rotation {
 public:
  Rotation(double degrees, ptrdiff_t height, ptrdiff_t width);

  ptrdiff_t view_height, view_width;

  // Part of the view of an image, (height, width, channels).
  void read(const Splines& image, ptrdiff_t top, ptrdiff_t left, int height, int width, float* pixels) const;
  // sum += the prediction of the view, (view_height, view_width, K), brought back onto the image.
  void add(const float* prediction, const Probabilities& sum) const;

 private:
  double cosine_, sine_;
  double row_offset_, column_offset_;  // of the view's first pixel in the image
};

}  // namespace fastunet

// Grey values on their way into the network: the rule a model records, as fastunet/normalization.py.
#pragma once

#include <string>
#include <vector>

#include "fastunet/predictor.hpp"

namespace fastunet {

struct Scale {
  double offset, scale;

  float operator()(double value) const { return static_cast<float>((value - offset) * scale); }
};

struct Normalization {
  enum Rule { kZscore, kMinmax, kNone, kGiven } rule = kGiven;
  std::vector<Scale> scales;  // of kGiven, one for each channel

  bool set_rule(const std::string& name);  // false where there is no such rule
};

// (x - offset) * scale for each channel of this image. Throws std::invalid_argument where a number is not finite.
std::vector<Scale> scales_of(const Image& image, const Normalization& normalization);

}  // namespace fastunet

// The U-Net's way forward on the CPU, as fastunet/unet.py goes it: the same operations on the same weights.
#pragma once

#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "../operations.h"
#include "model_file.h"

namespace fastunet {

constexpr const char* kConvolution = "auto";  // the algorithm

class Network {
 public:
  explicit Network(const ModelFile& file);

  // Probabilities of a normalised tile, (height, width, in_channels), of a valid size.
  Array operator()(std::vector<float> pixels, int height, int width) const;

 private:
  struct Layer {
    Floats weight, bias;
    int outputs;
  };

  Array logits(Array x) const;
  const Composed& composed(size_t up) const;  // of the up-convolution layers_[up] and the layer after it

  int channels_, depth_;
  std::vector<Layer> layers_;  // in the order of the network
  mutable std::mutex mutex_;   // of composed_
  mutable std::map<size_t, std::shared_ptr<Composed>> composed_;
  Block weights_;  // packed as cpu/kernels.h says
};

}  // namespace fastunet

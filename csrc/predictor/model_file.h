// A model file: safetensors, float32, PyTorch's layouts, as fastunet/unet.py writes it. Everything in it is checked
// before it is believed; what is wrong ends in DataError.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "fastunet/predictor.hpp"
#include "normalization.h"

namespace fastunet {

struct TensorInFile {
  std::vector<int64_t> shape;
  const char* data;  // float32, little-endian, at any address
  int64_t count;     // of numbers
};

// What a file of `size` bytes at `bytes` holds, which must outlive it; `name` is what errors call it.
class ModelFile {
 public:
  ModelFile(const char* bytes, size_t size, const std::string& name);

  Model model;
  Normalization normalization;

  // Throws unless there is a tensor of this name and shape, all of it finite.
  const TensorInFile& tensor(const std::string& name, const std::vector<int64_t>& shape) const;
  // Throws unless there are just so many.
  void expect_tensors(size_t count) const;

 private:
  [[noreturn]] void fail(const std::string& found) const;

  std::string name_;
  std::map<std::string, TensorInFile> tensors_;
};

// A file in memory, for reading.
class MappedFile {
 public:
  explicit MappedFile(const std::string& path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  const char* bytes() const { return bytes_; }
  size_t size() const { return size_; }

 private:
  const char* bytes_ = nullptr;
  size_t size_ = 0;
};

}  // namespace fastunet

// Any bytes are a model or end in DataError. The first byte says what the others are: a whole file, or the text of a
// header in front of as many bytes of data as the second and third byte say.
#include <cstring>
#include <string>

#include "predictor/network.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size < 3) return 0;
  std::string file(reinterpret_cast<const char*>(data) + 1, size - 1);
  if (data[0] % 2 == 1) {
    const size_t zeros = data[1] + 256 * data[2];
    const uint64_t length = size - 3;
    file.assign(reinterpret_cast<const char*>(&length), 8);
    file.append(reinterpret_cast<const char*>(data) + 3, length);
    file.append(zeros, '\0');
  }
  // In memory of its own, so that a byte too far is noticed.
  const std::unique_ptr<char[]> bytes(new char[file.size()]);
  std::memcpy(bytes.get(), file.data(), file.size());
  try {
    const fastunet::Network network(fastunet::ModelFile(bytes.get(), file.size(), "input"));
  } catch (const fastunet::DataError&) {
  }
  return 0;
}

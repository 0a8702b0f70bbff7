#include "model_file.h"

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstring>

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "json.h"

namespace fastunet {
namespace {

constexpr const char* kExpected = "; a fastunet model (.safetensors) is expected, train one with fastunet train";
constexpr size_t kLengthBytes = 8;            // of the header's length, before it
constexpr uint64_t kLongestHeader = 4 << 20;  // thousands of class names; no network has more than 70 tensors
constexpr const char* kTypes[] = {"BOOL", "U8",  "I8",  "F8_E5M2", "F8_E4M3", "I16", "U16", "F16",
                                  "BF16", "I32", "U32", "F32",     "F64",     "I64", "U64", "C64"};

// For a sentence: without control characters, and not endless.
std::string quoted(std::string text) {
  constexpr size_t kMost = 60;
  if (text.size() > kMost) text = text.substr(0, kMost) + "...";
  for (char& c : text)
    if (static_cast<unsigned char>(c) < 0x20 || static_cast<unsigned char>(c) >= 0x7F) c = '?';
  return "'" + text + "'";
}

std::string text_of(const std::vector<int64_t>& shape) {
  std::string text;
  for (int64_t side : shape) text += (text.empty() ? "" : ", ") + std::to_string(side);
  return "(" + text + ")";
}

uint64_t little_endian(const char* bytes) {
  uint64_t value = 0;
  for (int i = 7; i >= 0; --i) value = value << 8 | static_cast<unsigned char>(bytes[i]);
  return value;
}

// A whole number of at least 0, or -1.
int64_t whole(const json::Value& value) {
  return value.kind == json::Value::kInteger && value.number >= 0 ? static_cast<int64_t>(value.number) : -1;
}

bool all_finite(const TensorInFile& tensor) {
  // Exponents are all ones where a float32 is not finite.
  for (int64_t i = 0; i < tensor.count; ++i) {
    uint32_t bits;
    std::memcpy(&bits, tensor.data + 4 * i, 4);
    if ((bits & 0x7F800000u) == 0x7F800000u) return false;
  }
  return true;
}

}  // namespace

void ModelFile::fail(const std::string& found) const { throw DataError(name_ + ": " + found + kExpected); }

ModelFile::ModelFile(const char* bytes, size_t size, const std::string& name) : name_(name) {
  using json::Value;
  if (size < kLengthBytes) fail("it has " + std::to_string(size) + " bytes, too few for a header");
  const uint64_t length = little_endian(bytes);
  const char* const header = bytes + kLengthBytes;
  if (length > size - kLengthBytes || length > kLongestHeader)
    fail("its header is said to be " + std::to_string(length) + " bytes long, in a file of " + std::to_string(size));
  const char* const data = header + length;
  const uint64_t data_bytes = size - kLengthBytes - length;
  const auto parsed = [&](std::string_view text, const char* what) {
    try {
      return json::parse(text);
    } catch (const std::runtime_error& error) {
      fail(std::string(what) + " is no JSON (" + error.what() + ")");
    }
  };
  const Value root = parsed({header, static_cast<size_t>(length)}, "its header");
  if (root.kind != Value::kObject) fail("its header is no JSON object");

  struct Extent {
    uint64_t begin, end;
  };
  std::vector<Extent> extents;
  std::string format, version, config_text;
  for (const json::Member& member : root.members) {
    if (member.name == "__metadata__") {
      const auto text = [&](const char* key) {
        const Value* const found = member.value.find(key);
        return found != nullptr && found->kind == Value::kString ? found->text : std::string();
      };
      format = text("format");
      version = text("version");
      config_text = text("config");
      continue;
    }
    const std::string which = "its tensor " + quoted(member.name);
    const Value* const type = member.value.find("dtype");
    const Value* const shape = member.value.find("shape");
    const Value* const offsets = member.value.find("data_offsets");
    if (type == nullptr || type->kind != Value::kString || shape == nullptr || shape->kind != Value::kArray ||
        offsets == nullptr || offsets->kind != Value::kArray || offsets->items.size() != 2)
      fail(which + " lacks dtype, shape or data_offsets");
    if (type->text != "F32") {
      const bool known = std::find(std::begin(kTypes), std::end(kTypes), type->text) != std::end(kTypes);
      fail(which + (known ? " is of type " : " is of the unknown type ") + quoted(type->text) + ", not F32");
    }
    TensorInFile tensor{};
    tensor.count = 1;
    for (const Value& item : shape->items) {
      const int64_t side = whole(item);
      if (side < 1 || tensor.count > static_cast<int64_t>(data_bytes / 4) / side || tensor.shape.size() == 4)
        fail(which + " has a shape that is none, or larger than the file");
      tensor.count *= side;
      tensor.shape.push_back(side);
    }
    const int64_t begin = whole(offsets->items[0]), end = whole(offsets->items[1]);
    if (begin < 0 || end < begin || static_cast<uint64_t>(end) > data_bytes)
      fail(which + " lies outside the file of " + std::to_string(size) + " bytes");
    if (end - begin != 4 * tensor.count)
      fail(which + " takes " + std::to_string(end - begin) + " bytes, where its shape comes to " +
           std::to_string(4 * tensor.count));
    tensor.data = data + begin;
    extents.push_back({static_cast<uint64_t>(begin), static_cast<uint64_t>(end)});
    tensors_.emplace(member.name, std::move(tensor));
  }
  std::sort(extents.begin(), extents.end(), [](const Extent& a, const Extent& b) { return a.begin < b.begin; });
  uint64_t end = 0;
  for (const Extent& extent : extents) {
    if (extent.begin != end) fail("its tensors overlap or leave gaps at byte " + std::to_string(end) + " of its data");
    end = extent.end;
  }
  if (end != data_bytes)
    fail("its tensors take " + std::to_string(end) + " bytes, and " + std::to_string(data_bytes) + " are there");

  if (format != "fastunet" || version != "1")
    fail("its metadata say format " + quoted(format) + ", version " + quoted(version) + ", not 'fastunet' version '1'");
  const Value config = parsed(config_text, "its config");
  const auto entry = [&](const char* key) -> const Value& {
    const Value* const found = config.find(key);
    if (found == nullptr) fail(std::string("its config lacks ") + key);
    return *found;
  };
  const auto size_from = [&](const char* key, int least, int most) {
    const int64_t value = whole(entry(key));
    if (value < least || value > most)
      fail(std::string("the ") + key + " in its config is not a whole number from " + std::to_string(least) + " to " +
           std::to_string(most));
    return static_cast<int>(value);
  };
  model.in_channels = size_from("in_channels", 1, 4096);
  model.num_classes = size_from("num_classes", 2, 4096);
  model.base_channels = size_from("base_channels", 1, 4096);
  model.depth = size_from("depth", 1, 6);

  const Value& rule = entry("normalization");
  if (rule.kind == Value::kString) {
    if (!normalization.set_rule(rule.text)) fail("its normalization is " + quoted(rule.text) + ", which is unknown");
  } else {
    std::vector<Scale> scales;
    for (const Value& pair : rule.items) {
      const bool numbers = pair.items.size() == 2 &&
                           (pair.items[0].kind == Value::kInteger || pair.items[0].kind == Value::kReal) &&
                           (pair.items[1].kind == Value::kInteger || pair.items[1].kind == Value::kReal);
      if (!numbers) break;
      scales.push_back({pair.items[0].number, pair.items[1].number});
    }
    if (scales.size() != rule.items.size() || scales.size() != static_cast<size_t>(model.in_channels))
      fail("its normalization is neither a rule nor one [offset, scale] for each of " +
           std::to_string(model.in_channels) + " channels");
    normalization.scales = std::move(scales);
  }

  const Value& names = entry("class_names");
  for (const Value& item : names.items)
    if (item.kind == Value::kString) model.class_names.push_back(item.text);
  const bool named = names.kind == Value::kArray && model.class_names.size() == names.items.size() &&
                     names.items.size() == static_cast<size_t>(model.num_classes);
  if (names.kind != Value::kNull && !named)
    fail("its class_names are not " + std::to_string(model.num_classes) + " names");
}

const TensorInFile& ModelFile::tensor(const std::string& name, const std::vector<int64_t>& shape) const {
  const auto found = tensors_.find(name);
  if (found == tensors_.end()) fail("it lacks the tensor " + quoted(name) + " of the network in its config");
  const TensorInFile& tensor = found->second;
  if (tensor.shape != shape)
    fail("its tensor " + quoted(name) + " has shape " + text_of(tensor.shape) + ", and its config asks for " +
         text_of(shape));
  if (!all_finite(tensor))
    fail("its tensor " + quoted(name) + " holds weights that are not finite: it is damaged, or its training failed");
  return tensor;
}

void ModelFile::expect_tensors(size_t count) const {
  if (tensors_.size() != count)
    fail("it holds " + std::to_string(tensors_.size()) + " tensors, and the network in its config has " +
         std::to_string(count));
}

MappedFile::MappedFile(const std::string& path) {
  // Without O_NONBLOCK, to open a pipe would be to wait for somebody who writes to it.
  const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (file < 0) throw DataError(path + ": it cannot be opened (" + std::strerror(errno) + ")" + kExpected);
  struct stat status;
  void* mapped = nullptr;
  bool failed = fstat(file, &status) != 0 || !S_ISREG(status.st_mode);
  if (!failed && status.st_size > 0) {
    mapped = mmap(nullptr, static_cast<size_t>(status.st_size), PROT_READ, MAP_PRIVATE, file, 0);
    failed = mapped == MAP_FAILED;
  }
  close(file);
  if (failed) throw DataError(path + ": it cannot be read as a file" + kExpected);
  bytes_ = static_cast<const char*>(mapped);
  size_ = mapped == nullptr ? 0 : static_cast<size_t>(status.st_size);
}

MappedFile::~MappedFile() {
  if (bytes_ != nullptr) munmap(const_cast<char*>(bytes_), size_);
}

}  // namespace fastunet

// For compilers without libFuzzer: mutates the seeds blindly, by the same options. Without options, files are run once.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);
extern "C" void __sanitizer_set_death_callback(void (*callback)());

namespace {

using Bytes = std::vector<uint8_t>;
Bytes input;  // that is being run

void save_input() {
  std::ofstream("crash", std::ios::binary)
      .write(reinterpret_cast<const char*>(input.data()), static_cast<std::streamsize>(input.size()));
  std::fprintf(stderr, "the input is in ./crash\n");
}

void run() { LLVMFuzzerTestOneInput(input.data(), input.size()); }

class Mutator {
 public:
  explicit Mutator(unsigned seed) : random_(seed) {}

  void mutate(Bytes& bytes, const Bytes& other) {
    for (size_t count = 1 + below(4); count > 0; --count) {
      const size_t at = below(bytes.size() + 1);
      switch (below(6)) {
        case 0:
          change(bytes, at, static_cast<uint8_t>(below(256)));
          break;
        case 1:
          change(bytes, at, at < bytes.size() ? bytes[at] ^ (1u << below(8)) : 0);
          break;
        case 2:
          change(bytes, at, "0123456789-{}[]\",:\xFF\x80"[below(20)]);
          break;
        case 3:
          bytes.erase(bytes.begin() + at, bytes.begin() + std::min(bytes.size(), at + 1 + below(16)));
          break;
        case 4:
          insert(bytes, at, bytes);
          break;
        default:
          insert(bytes, at, other);
      }
    }
  }

  size_t below(size_t bound) { return bound == 0 ? 0 : random_() % bound; }

 private:
  static void change(Bytes& bytes, size_t at, unsigned value) {
    if (at < bytes.size()) bytes[at] = static_cast<uint8_t>(value);
  }

  void insert(Bytes& bytes, size_t at, const Bytes& from) {
    const size_t first = below(from.size()), last = std::min(from.size(), first + 1 + below(64));
    const Bytes part(from.begin() + first, from.begin() + last);
    bytes.insert(bytes.begin() + at, part.begin(), part.end());
  }

  std::mt19937_64 random_;
};

}  // namespace

int main(int count, char** arguments) {
  long runs = 0, seconds = 0;
  unsigned seed = std::random_device()();
  std::vector<Bytes> seeds;
  const auto read = [&](const std::filesystem::path& path) {
    std::ifstream file(path, std::ios::binary);
    seeds.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
  };
  for (int i = 1; i < count; ++i) {
    const std::string argument = arguments[i];
    const auto value = [&](const char* name) {
      const std::string start = std::string("-") + name + "=";
      return argument.rfind(start, 0) == 0 ? std::atol(argument.c_str() + start.size()) : -1;
    };
    if (value("runs") >= 0) {
      runs = value("runs");
    } else if (value("max_total_time") >= 0) {
      seconds = value("max_total_time");
    } else if (value("seed") >= 0) {
      seed = static_cast<unsigned>(value("seed"));
    } else if (std::filesystem::is_directory(argument)) {
      for (const auto& entry : std::filesystem::directory_iterator(argument)) read(entry.path());
    } else if (argument[0] != '-') {
      read(argument);
    }
  }
  std::fprintf(stderr, "%zu inputs, -seed=%u\n", seeds.size(), seed);
  __sanitizer_set_death_callback(save_input);
  for (const Bytes& bytes : seeds) {
    input = bytes;
    run();
  }
  Mutator mutator(seed);
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(seconds);
  long done = 0;
  for (; !seeds.empty() && (done < runs || std::chrono::steady_clock::now() < end); ++done) {
    input = seeds[mutator.below(seeds.size())];
    mutator.mutate(input, seeds[mutator.below(seeds.size())]);
    run();
  }
  std::fprintf(stderr, "Done %ld runs\n", done);
}

#include "memory.h"

#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include <cstdlib>
#include <iterator>
#include <map>
#include <mutex>
#include <new>

namespace fastunet {
namespace {

constexpr size_t kPage = 4096, kHugePage = size_t{2} << 20;
constexpr size_t kSmall = size_t{64} << 10;  // below, malloc does as well

size_t round_up(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

void ask_for_huge_pages([[maybe_unused]] void* block, [[maybe_unused]] size_t bytes) {
#if defined(MADV_HUGEPAGE)
  madvise(block, bytes, MADV_HUGEPAGE);
#endif
}

// Addresses of which memory is committed from the bottom up. A block takes the lowest free place that it fits into:
// what is long-lived sinks to the bottom, and the rest is one free place when it goes.
class Range {
 public:
  // As many addresses as there may ever be memory, of which none is taken yet; fewer where the system grants no more.
  // None where addresses are what a process is limited in: they would be gone for everything else.
  Range() {
    rlimit limit;
    if (getrlimit(RLIMIT_AS, &limit) != 0 || limit.rlim_cur != RLIM_INFINITY) return;
    const size_t physical = static_cast<size_t>(sysconf(_SC_PHYS_PAGES)) * static_cast<size_t>(sysconf(_SC_PAGESIZE));
    for (reserved_ = round_up(4 * physical, kHugePage); reserved_ >= kHugePage; reserved_ /= 2) {
      void* const range = mmap(nullptr, reserved_ + kHugePage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (range == MAP_FAILED) continue;
      base_ = reinterpret_cast<char*>(round_up(reinterpret_cast<size_t>(range), kHugePage));
      return;
    }
  }

  bool exists() const { return base_ != nullptr; }

  char* allocate(size_t bytes) {
    for (auto place = free_.begin(); place != free_.end(); ++place) {
      if (place->second < bytes) continue;
      char* const block = base_ + place->first;
      const size_t offset = place->first, left = place->second - bytes;
      free_.erase(place);
      if (left > 0) free_.emplace(offset + bytes, left);
      return block;
    }
    // Beyond what is committed, from the free place at its end on, if there is one.
    size_t offset = committed_;
    if (!free_.empty()) {
      const auto last = std::prev(free_.end());
      if (last->first + last->second == committed_) {
        offset = last->first;
        free_.erase(last);
      }
    }
    if (!commit(offset + bytes)) {
      if (offset < committed_) free_.emplace(offset, committed_ - offset);
      return nullptr;
    }
    if (offset + bytes < committed_) free_.emplace(offset + bytes, committed_ - offset - bytes);
    return base_ + offset;
  }

  void release(char* block, size_t bytes) {
    auto place = free_.emplace(block - base_, bytes).first;
    const auto next = std::next(place);
    if (next != free_.end() && place->first + place->second == next->first) {
      place->second += next->second;
      free_.erase(next);
    }
    if (place == free_.begin()) return;
    const auto before = std::prev(place);
    if (before->first + before->second == place->first) {
      before->second += place->second;
      free_.erase(place);
    }
  }

  void trim() {
    for (const auto& [offset, bytes] : free_) madvise(base_ + offset, bytes, MADV_DONTNEED);
  }

 private:
  bool commit(size_t bytes) {
    if (bytes <= committed_) return true;
    const size_t end = round_up(bytes, kHugePage);
    if (end > reserved_ || mprotect(base_ + committed_, end - committed_, PROT_READ | PROT_WRITE) != 0) return false;
    ask_for_huge_pages(base_ + committed_, end - committed_);
    committed_ = end;
    return true;
  }

  char* base_ = nullptr;
  size_t reserved_ = 0, committed_ = 0;
  std::map<size_t, size_t> free_;  // offset and size of every free place below committed_; no two touch
};

struct Store {
  std::mutex mutex;
  Range range;
  size_t used_bytes = 0, peak_bytes = 0;
};

Store& store() {
  static Store* instance = new Store;  // outlives every static destructor that may release a block
  return *instance;
}

size_t rounded(size_t floats) {
  const size_t bytes = floats * sizeof(float);
  return bytes == 0 ? 64 : round_up(bytes, bytes >= kSmall ? kPage : 64);
}

// With the store's mutex held.
float* take(Store& s, size_t bytes) {
  void* block = nullptr;
  if (bytes >= kSmall && s.range.exists()) {
    block = s.range.allocate(bytes);
  } else if (posix_memalign(&block, 64, bytes) != 0) {
    block = nullptr;
  }
  if (block == nullptr) throw std::bad_alloc();
  return static_cast<float*>(block);
}

void give_back(Store& s, float* block, size_t bytes) {
  if (block == nullptr) return;
  if (bytes >= kSmall && s.range.exists()) {
    s.range.release(reinterpret_cast<char*>(block), bytes);
  } else {
    std::free(block);
  }
}

struct Scratch {
  float* block = nullptr;
  size_t floats = 0;
};
Scratch slots[kSlots];

}  // namespace

float* allocate(size_t floats) {
  Store& s = store();
  const size_t bytes = rounded(floats);
  std::lock_guard<std::mutex> lock(s.mutex);
  float* const block = take(s, bytes);
  s.used_bytes += bytes;
  if (s.used_bytes > s.peak_bytes) s.peak_bytes = s.used_bytes;
  return block;
}

void release(float* block, size_t floats) {
  if (block == nullptr) return;
  Store& s = store();
  const size_t bytes = rounded(floats);
  std::lock_guard<std::mutex> lock(s.mutex);
  s.used_bytes -= bytes;
  give_back(s, block, bytes);
}

void trim() {
  Store& s = store();
  std::lock_guard<std::mutex> lock(s.mutex);
  for (Scratch& slot : slots) {
    std::free(slot.block);
    slot = Scratch{};
  }
  s.range.trim();
}

size_t allocated_bytes() {
  Store& s = store();
  std::lock_guard<std::mutex> lock(s.mutex);
  return s.used_bytes;
}

size_t peak_allocated_bytes() {
  Store& s = store();
  std::lock_guard<std::mutex> lock(s.mutex);
  return s.peak_bytes;
}

void reset_peak() {
  Store& s = store();
  std::lock_guard<std::mutex> lock(s.mutex);
  s.peak_bytes = s.used_bytes;
}

float* scratch(ScratchSlot slot, size_t floats) {
  Scratch& wanted = slots[slot];
  if (floats > wanted.floats) {
    // Beside the range: what is never given back would break up its free places.
    const size_t bytes = round_up(floats * sizeof(float), kPage);
    std::free(wanted.block);
    wanted = Scratch{};
    void* block = nullptr;
    if (posix_memalign(&block, bytes >= kHugePage ? kHugePage : kPage, bytes) != 0) throw std::bad_alloc();
    ask_for_huge_pages(block, bytes);
    wanted.block = static_cast<float*>(block);
    wanted.floats = floats;
  }
  return wanted.block;
}

size_t scratch_bytes() {
  size_t bytes = 0;
  for (const Scratch& slot : slots) bytes += slot.floats * sizeof(float);
  return bytes;
}

}  // namespace fastunet

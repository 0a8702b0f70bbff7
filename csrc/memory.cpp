#include "memory.h"

#include <cstdlib>
#include <iterator>
#include <map>
#include <mutex>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastunet {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;

struct Store {
  std::mutex mutex;
  std::map<size_t, std::vector<float*>> kept;
  size_t kept_bytes = 0, used_bytes = 0, peak_bytes = 0;
};

Store& store() {
  static Store* instance = new Store;  // outlives every static destructor that may release a block
  return *instance;
}

// Large blocks start on huge pages; their size is rounded to ordinary pages only, so that nothing is wasted.
size_t rounded(size_t floats) {
  const size_t bytes = floats * sizeof(float);
  const size_t unit = bytes >= kHugePage ? 4096 : 64;
  return bytes == 0 ? 64 : (bytes + unit - 1) / unit * unit;
}

float* from_system(size_t bytes) {
  const size_t alignment = bytes >= kHugePage ? kHugePage : 64;
  void* block = nullptr;
  if (posix_memalign(&block, alignment, bytes) != 0) return nullptr;
#if defined(__linux__)
  if (bytes >= kHugePage) madvise(block, bytes, MADV_HUGEPAGE);
#endif
  return static_cast<float*>(block);
}

void drop_kept(Store& s) {
  for (auto& [bytes, blocks] : s.kept)
    for (float* block : blocks) std::free(block);
  s.kept.clear();
  s.kept_bytes = 0;
}

// From the system. Kept blocks of sizes that no longer come make room, the largest first, so that those kept and in use
// together stay below 7/4 of the most ever in use; the system gets all of them back where it has nothing left.
float* from_system_or_throw(Store& s, size_t bytes) {
  const size_t most_used = s.used_bytes + bytes > s.peak_bytes ? s.used_bytes + bytes : s.peak_bytes;
  while (s.kept_bytes > 0 && s.kept_bytes + s.used_bytes + bytes > most_used / 4 * 7) {
    const auto largest = std::prev(s.kept.end());
    std::free(largest->second.back());
    s.kept_bytes -= largest->first;
    largest->second.pop_back();
    if (largest->second.empty()) s.kept.erase(largest);
  }
  float* block = from_system(bytes);
  if (block == nullptr) {
    drop_kept(s);
    block = from_system(bytes);
  }
  if (block == nullptr) throw std::bad_alloc();
  return block;
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
  float* block = nullptr;
  auto found = s.kept.find(bytes);
  if (found != s.kept.end()) {
    block = found->second.back();
    found->second.pop_back();
    s.kept_bytes -= bytes;
    if (found->second.empty()) s.kept.erase(found);
  } else {
    block = from_system_or_throw(s, bytes);
  }
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
  s.kept[bytes].push_back(block);
  s.kept_bytes += bytes;
}

void trim() {
  Store& s = store();
  std::lock_guard<std::mutex> lock(s.mutex);
  drop_kept(s);
  for (Scratch& slot : slots) {
    std::free(slot.block);
    slot = Scratch{};
  }
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
    std::free(wanted.block);
    wanted = Scratch{};
    Store& s = store();
    std::lock_guard<std::mutex> lock(s.mutex);
    wanted.block = from_system_or_throw(s, rounded(floats));
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

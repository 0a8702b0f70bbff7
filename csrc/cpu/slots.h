// Sums that several tasks make apart from each other, each in a slot of its own, always in the same order: however many
// threads there are, the result is the same.
#pragma once

#include "simd.h"

namespace fastunet {
namespace {

// sum += each of `count` slots of so many floats, one after the other in memory.
void add_slots(const float* slots, int count, ptrdiff_t floats, float* sum) {
  constexpr int kPiece = 4096;
  parallel(static_cast<int>((floats + kPiece - 1) / kPiece), [&](int task, int) {
    const ptrdiff_t begin = static_cast<ptrdiff_t>(task) * kPiece;
    const ptrdiff_t end = begin + kPiece < floats ? begin + kPiece : floats;
    for (int slot = 0; slot < count; ++slot)
      for (ptrdiff_t i = begin; i < end; ++i) sum[i] += slots[slot * floats + i];
  });
}

}  // namespace
}  // namespace fastunet

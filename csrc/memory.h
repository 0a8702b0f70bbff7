// Aligned memory for activations and scratch, from one range of addresses: freed memory is handed out again, whatever
// sizes are asked for next, so that steps of a training do not page-fault; trim() gives it back to the system.
#pragma once

#include <cstddef>

namespace fastunet {

float* allocate(size_t floats);  // 64-byte aligned, contents undefined; throws std::bad_alloc
void release(float* block, size_t floats);
void trim();               // returns what is free to the system
size_t allocated_bytes();  // handed out at this moment, but for scratch
size_t peak_allocated_bytes();
void reset_peak();

// Scratch of an operation, one slot a use, grown as needed and kept. Valid until the slot is asked for again;
// only while Engine is held.
enum ScratchSlot { kWeights, kTransposed, kInputTiles, kGradientTiles, kPerThread, kSlots };
float* scratch(ScratchSlot slot, size_t floats);
size_t scratch_bytes();  // only while Engine is held

}  // namespace fastunet

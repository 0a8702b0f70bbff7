// Aligned memory for activations and scratch. Freed blocks are kept and handed out again to requests of the
// same size, so that the steps of a training, which repeat each other's sizes, do not page-fault; trim()
// gives them back.
#pragma once

#include <cstddef>

namespace fastunet {

float* allocate(size_t floats);  // 64-byte aligned, contents undefined; throws std::bad_alloc
void release(float* block, size_t floats);
void trim();               // returns the kept blocks to the system
size_t allocated_bytes();  // handed out at this moment
size_t peak_allocated_bytes();
void reset_peak();

// Scratch of an operation, one slot a use, grown as needed and kept. Valid until the slot is asked for again;
// only while Engine is held.
enum ScratchSlot { kWeights, kTransposed, kInputTiles, kGradientTiles, kPerThread, kSlots };
float* scratch(ScratchSlot slot, size_t floats);
size_t scratch_bytes();  // only while Engine is held

}  // namespace fastunet

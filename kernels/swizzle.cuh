// Where a matrix of 16-byte pieces (eight bfloat16) lies in shared memory.
//
// ldmatrix reads one piece from each of eight rows that follow each other, cp.async writes the pieces of a row: with
// the pieces of row r exchanged by an exclusive or, both touch every bank once. Row 0 starts at a multiple of 128.
#pragma once

#include "ptx.cuh"

// Byte offset of a piece of a row of `pieces` pieces: 2, 4, 8 or a multiple of 8.
template <int pieces>
__device__ __forceinline__ int swizzled(int row, int piece) {
  constexpr int rows_in_a_line = pieces < 8 ? 8 / pieces : 1;  // a line is 128 bytes, every bank once
  constexpr int mask = pieces < 8 ? pieces - 1 : 7;
  return (row * pieces + (piece ^ (row / rows_in_a_line & mask))) * 16;
}

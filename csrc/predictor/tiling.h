// The plan of a prediction, as fastunet/tiling.py makes it: which tiles of an image the network sees, and what they
// cost. Tiles begin at multiples of 2**depth, so that all pool in the phase of the whole image; the result then does
// not depend on their size.
#pragma once

#include <vector>

#include "fastunet/predictor.hpp"

namespace fastunet {

// The pixels that a tile contributes. The network's input begins the border above and left of them.
struct Tile {
  ptrdiff_t top, left, bottom, right;
};

struct TilePlan {
  ptrdiff_t height, width;                      // of the image
  ptrdiff_t tile_height, tile_width;            // of the network's input
  ptrdiff_t preferred_height, preferred_width;  // had memory been unlimited
  double memory;                                // bytes: what the whole image takes, and one tile's activations
  std::vector<ptrdiff_t> rows, columns;         // where tiles begin, and where the last one ends

  ptrdiff_t tiles() const { return static_cast<ptrdiff_t>((rows.size() - 1) * (columns.size() - 1)); }
};

// `tile` is the network's input size, or 0: the size, not necessarily square, with which the network computes the
// fewest pixels altogether. `whole` are the bytes taken by the image whatever its tiles. Throws MemoryError if even the
// smallest tiles need more than `memory`.
TilePlan plan_tiles(ptrdiff_t height, ptrdiff_t width, const Model& network, int tile, double whole, double memory);

// Throws std::invalid_argument, naming the two nearest, unless tiles of this input size can predict at this depth.
void check_tile(int tile, int depth);

}  // namespace fastunet

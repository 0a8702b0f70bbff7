#include "tiling.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>

#include "../operations.h"
#include "geometry.h"
#include "network.h"

namespace fastunet {
namespace {

constexpr double kScratch = 32 << 20;  // the kernels' own buffers came to 2 to 31 MiB
// Resident memory came to 1.02 to 1.1 times the activations alive at once (free places between them).
constexpr double kElementBytes = 1.15 * 4;

struct Candidate {
  ptrdiff_t tile, count;
};

// Input size and number of tiles for an axis: each size the smallest for its number.
std::vector<Candidate> candidates(ptrdiff_t size, int depth, ptrdiff_t largest) {
  const ptrdiff_t step = ptrdiff_t{1} << depth;
  const ptrdiff_t beyond = input_size(step, depth) - 2 * border(depth) - step;
  std::vector<Candidate> found;
  for (ptrdiff_t count = 1;;) {
    // `count` tiles give count * stride + beyond pixels.
    const ptrdiff_t stride = size > beyond ? ceil_div(size - beyond, count * step) * step : 0;
    const ptrdiff_t tile = stride + beyond + 2 * border(depth);
    if (tile <= largest) found.push_back({tile, count});
    if (stride <= step) return found;
    count = ceil_div(size - beyond, stride - step);
  }
}

// Numbers that are alive at the worst moment of a forward pass: the walk of the forward pass, where a layer holds its
// input and its output, and skips are kept for the way up. The first layer of an image is computed as it is read;
// composed layers hold weights of their own and nothing between the two.
double activations(ptrdiff_t tile_height, ptrdiff_t tile_width, const Model& network) {
  double height = static_cast<double>(tile_height), width = static_cast<double>(tile_width);
  const auto numbers = [](double height, double width, int channels) { return height * width * padded(channels); };
  const ptrdiff_t lost = 2 * border(network.depth);
  double kept = 0, worst = 0;
  std::vector<double> skips;
  for (int level = 0; level <= network.depth; ++level) {
    const int channels = network.base_channels << level;
    const double source = numbers(height, width, level == 0 ? network.in_channels : channels / 2);
    double first = numbers(height - 2, width - 2, channels);
    const double second = numbers(height - 4, width - 4, channels);
    if (level == 0 && network.in_channels <= kImageChannels) {
      if (network.base_channels >= kBlock) first = 0;
      worst = std::max(worst, first);
    } else {
      worst = std::max(worst, kept + source + first);
    }
    height -= 4;
    width -= 4;
    if (level == network.depth) {
      worst = std::max(worst, kept + first + second);
    } else {
      height /= 2;
      width /= 2;
      skips.push_back(numbers(static_cast<double>(skip_size(tile_height - lost, level)),
                              static_cast<double>(skip_size(tile_width - lost, level)), channels));
      kept += skips.back();
      worst = std::max(worst, kept + first + numbers(height, width, channels));
    }
  }
  double second = 0, composed = 0;
  for (int level = network.depth - 1; level >= 0; --level) {
    const int channels = network.base_channels << level;
    const double below = numbers(height, width, 2 * channels);
    height *= 2;
    width *= 2;
    const double up = numbers(height, width, channels), first = numbers(height - 2, width - 2, channels);
    second = numbers(height - 4, width - 4, channels);
    if (composing_pays(kConvolution, 2 * channels, channels, channels, channels)) {
      composed += static_cast<double>(
          Composition{padded(2 * channels), padded(channels), padded(channels), padded(channels)}.floats());
      worst = std::max(worst, kept + below + first);
    } else {
      worst = std::max(worst, kept + std::max(below + up, up + first));
    }
    kept -= skips[static_cast<size_t>(level)];
    worst = std::max(worst, kept + first + second);
    height -= 4;
    width -= 4;
  }
  return std::max(worst, second + 2 * numbers(height, width, network.num_classes)) + composed;
}

std::string megabytes(double bytes) { return std::to_string(static_cast<long long>(bytes / (1 << 20))) + " MiB"; }

// Where the tiles of an axis begin, and where the last one ends.
std::vector<ptrdiff_t> edges(ptrdiff_t size, ptrdiff_t tile, int depth) {
  const ptrdiff_t step = ptrdiff_t{1} << depth, output = tile - 2 * border(depth), stride = output / step * step;
  std::vector<ptrdiff_t> found{0};
  while (found.back() + output < size) found.push_back(found.back() + stride);
  found.push_back(size);
  return found;
}

}  // namespace

TilePlan plan_tiles(ptrdiff_t height, ptrdiff_t width, const Model& network, int tile, double whole, double memory) {
  const ptrdiff_t largest = tile == 0 ? std::numeric_limits<ptrdiff_t>::max() : tile;
  const auto needed = [&](ptrdiff_t tall, ptrdiff_t wide) {
    return std::floor(whole + kElementBytes * activations(tall, wide, network) + kScratch);
  };
  struct Size {
    double pixels, bytes;
    ptrdiff_t height, width;
    bool operator<(const Size& other) const { return std::tie(pixels, bytes) < std::tie(other.pixels, other.bytes); }
  };
  constexpr double kNone = std::numeric_limits<double>::infinity();
  Size preferred{kNone, kNone, 0, 0}, fitting = preferred, least = preferred;
  const std::vector<Candidate> widths = candidates(width, network.depth, largest);
  for (const Candidate& tall : candidates(height, network.depth, largest))
    for (const Candidate& wide : widths) {
      const Size size{static_cast<double>(tall.tile * tall.count) * static_cast<double>(wide.tile * wide.count),
                      needed(tall.tile, wide.tile), tall.tile, wide.tile};
      preferred = std::min(preferred, size);
      if (size.bytes <= memory) fitting = std::min(fitting, size);
      if (size.bytes < least.bytes) least = size;
    }
  if (tile != 0) {
    preferred.height = std::min(largest, input_size(height, network.depth));
    preferred.width = std::min(largest, input_size(width, network.depth));
    preferred.bytes = needed(preferred.height, preferred.width);
  }
  const Size& best = preferred.bytes <= memory ? preferred : fitting;
  if (best.height == 0)
    throw MemoryError("predicting " + std::to_string(height) + "x" + std::to_string(width) + " pixels takes at least " +
                      megabytes(least.bytes) + " of memory and " + megabytes(memory) +
                      " are available; free memory, allow more, or predict parts of the image");
  return {height,
          width,
          best.height,
          best.width,
          preferred.height,
          preferred.width,
          best.bytes,
          edges(height, best.height, network.depth),
          edges(width, best.width, network.depth)};
}

void check_tile(int tile, int depth) {
  const ptrdiff_t step = ptrdiff_t{1} << depth, smallest = input_size(step, depth);
  ptrdiff_t above = input_size(std::max<ptrdiff_t>(1, ptrdiff_t{tile} + 1 - 2 * border(depth)), depth),
            below = above - step;
  std::string found = "tile + 4 must be a multiple of " + std::to_string(step);
  if (tile < smallest) {
    found = "its output would be less than " + std::to_string(step) + " pixels";
    below = smallest;
    above = smallest + step;
  } else if (is_valid_input(tile, depth)) {
    return;
  }
  throw std::invalid_argument("tile " + std::to_string(tile) + " cannot predict at depth " + std::to_string(depth) +
                              ": " + found + "; the nearest valid tiles are " + std::to_string(below) + " and " +
                              std::to_string(above));
}

}  // namespace fastunet

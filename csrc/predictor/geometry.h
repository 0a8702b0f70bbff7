// Sizes of the valid-convolution U-Net, as fastunet/geometry.py.
#pragma once

#include <cstddef>

namespace fastunet {

// Pixels lost on each side between input and output.
constexpr ptrdiff_t border(int depth) {
  ptrdiff_t lost = 2;
  for (int level = 0; level < depth; ++level) lost = 2 * lost + 4;
  return lost;
}

constexpr ptrdiff_t ceil_div(ptrdiff_t a, ptrdiff_t b) { return (a + b - 1) / b; }

// Side of the smallest valid input whose output covers m pixels.
constexpr ptrdiff_t input_size(ptrdiff_t m, int depth) {
  const ptrdiff_t step = ptrdiff_t{1} << depth;
  return ceil_div(m + 2 * border(depth) + 4, step) * step - 4;
}

constexpr bool is_valid_input(ptrdiff_t n, int depth) {
  return (n + 4) % (ptrdiff_t{1} << depth) == 0 && n > 2 * border(depth);
}

// Side of the centre of a level's skip that the way up to an output of m pixels reads.
constexpr ptrdiff_t skip_size(ptrdiff_t m, int level) {
  ptrdiff_t side = m + 4;
  for (int i = 0; i < level; ++i) side = side / 2 + 4;
  return side;
}

}  // namespace fastunet

// Winograd F(4x4, 3x3): a 4x4 tile of outputs from a 6x6 tile of inputs with 36 multiplications instead of
// 144, at the points 0, +-a, +-b, infinity with a = 1/sqrt(2), b = sqrt(2), which lose least accuracy in
// float32.
//
//   Y  = A^T [ (G g G^T) . (B^T d B) ] A          forward and data gradient
//   dg = G^T [ sum (B^T d B) . (A dY A^T) ] G     weight gradient
//
// (Lavin and Gray 2016, eq. 8, with other points.) This file holds the one-dimensional transforms and their
// two-dimensional use on vectors of channels; the schedules are in
// winograd_forward.h and winograd_backward_weight.h.
#pragma once

#include "simd.h"

namespace fastunet {
namespace {

constexpr int kTile = 4, kFootprint = 6, kFrequencies = 36;
constexpr float kA = 0.70710678118654752440f, kB = 1.41421356237309504880f;

// B^T d
INLINE void transform_input_line(const vec* d, vec* t) {
  t[0] = d[0] + (d[4] - 2.5f * d[2]);
  const vec even_a = d[4] - 2.0f * d[2], odd_a = kA * d[3] - kB * d[1];
  const vec even_b = d[4] - 0.5f * d[2], odd_b = kB * d[3] - kA * d[1];
  t[1] = even_a + odd_a;
  t[2] = even_a - odd_a;
  t[3] = even_b + odd_b;
  t[4] = even_b - odd_b;
  t[5] = d[1] + (d[5] - 2.5f * d[3]);
}

// A^T m
INLINE void transform_output_line(const vec* m, vec* y) {
  const vec sum_a = m[1] + m[2], difference_a = m[1] - m[2];
  const vec sum_b = m[3] + m[4], difference_b = m[3] - m[4];
  y[0] = m[0] + sum_a + sum_b;
  y[1] = kA * difference_a + kB * difference_b;
  y[2] = 0.5f * sum_a + 2.0f * sum_b;
  y[3] = m[5] + (0.5f * kA) * difference_a + (2.0f * kB) * difference_b;
}

// A dy
INLINE void transform_gradient_line(const vec* y, vec* t) {
  const vec even_a = y[0] + 0.5f * y[2], odd_a = kA * y[1] + (0.5f * kA) * y[3];
  const vec even_b = y[0] + 2.0f * y[2], odd_b = kB * y[1] + (2.0f * kB) * y[3];
  t[0] = y[0];
  t[1] = even_a + odd_a;
  t[2] = even_a - odd_a;
  t[3] = even_b + odd_b;
  t[4] = even_b - odd_b;
  t[5] = y[3];
}

// G g
INLINE void transform_weight_line(const vec* g, vec* t) {
  const vec even_a = (-2.0f / 3.0f) * g[0] + (-1.0f / 3.0f) * g[2], odd_a = (-2.0f / 3.0f * kA) * g[1];
  const vec even_b = (1.0f / 6.0f) * g[0] + (1.0f / 3.0f) * g[2], odd_b = (1.0f / 6.0f * kB) * g[1];
  t[0] = g[0];
  t[1] = even_a + odd_a;
  t[2] = even_a - odd_a;
  t[3] = even_b + odd_b;
  t[4] = even_b - odd_b;
  t[5] = g[2];
}

// G^T u
INLINE void transform_weight_gradient_line(const vec* u, vec* g) {
  const vec sum_a = u[1] + u[2], difference_a = u[1] - u[2];
  const vec sum_b = u[3] + u[4], difference_b = u[3] - u[4];
  g[0] = u[0] + (-2.0f / 3.0f) * sum_a + (1.0f / 6.0f) * sum_b;
  g[1] = (-2.0f / 3.0f * kA) * difference_a + (1.0f / 6.0f * kB) * difference_b;
  g[2] = u[5] + (-1.0f / 3.0f) * sum_a + (1.0f / 3.0f) * sum_b;
}

using Line = void (*)(const vec*, vec*);

// The two-dimensional transform of an IN x IN patch, whose elements lie row_stride and column_stride floats
// apart, into OUT x OUT values given one by one to sink(row, column, value): `LINE` on the columns, then on
// the rows.
template <int IN, int OUT, Line LINE, class Sink>
INLINE void transform(const float* source, ptrdiff_t row_stride, ptrdiff_t column_stride, const Sink& sink) {
  vec half[OUT][IN];
  UNROLL
  for (int column = 0; column < IN; ++column) {
    vec line[IN], result[OUT];
    UNROLL
    for (int row = 0; row < IN; ++row) line[row] = load(source + row * row_stride + column * column_stride);
    LINE(line, result);
    UNROLL
    for (int row = 0; row < OUT; ++row) half[row][column] = result[row];
  }
  UNROLL
  for (int row = 0; row < OUT; ++row) {
    vec result[OUT];
    LINE(half[row], result);
    UNROLL
    for (int column = 0; column < OUT; ++column) sink(row, column, result[column]);
  }
}

}  // namespace
}  // namespace fastunet

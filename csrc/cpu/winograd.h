// Winograd F(T x T, 3x3): a T x T tile of outputs from a (T+2) x (T+2) footprint of inputs with (T+2)^2 multiplications
// instead of 9 T^2, for T = 2, 4, 6.
//
//   Y  = A^T [ (G g G^T) . (B^T d B) ] A          forward and data gradient
//   dg = G^T [ sum (B^T d B) . (A dY A^T) ] G     weight gradient
//
// (Lavin and Gray 2016, eq. 8.) Interpolation at the points 0, +-p for T/2 values of p, and infinity: a point and its
// opposite share their even and odd parts, and all transforms are made of such pairs; pair 0 is (0, infinity). This
// file holds the one-dimensional transforms and their two-dimensional use on vectors of channels.
#pragma once

#include "simd.h"

namespace fastunet {
namespace {

// For T = 4 those that lose least accuracy in float32.
template <int T>
constexpr double kPoints[T / 2] = {};
template <>
constexpr double kPoints<2>[1] = {1};
template <>
constexpr double kPoints<4>[2] = {0.70710678118654752440, 1.41421356237309504880};
template <>
constexpr double kPoints<6>[3] = {1, 2, 0.5};

template <int T>
struct Winograd {
  static constexpr int kTile = T, kFootprint = T + 2, kFrequencies = kFootprint * kFootprint, kPairs = T / 2;

  // Where the two values of a pair lie in a transformed line.
  static constexpr int first_of(int pair) { return pair == 0 ? 0 : 2 * pair - 1; }
  static constexpr int second_of(int pair) { return pair == 0 ? kFootprint - 1 : 2 * pair; }

  struct Constants {
    float all[kPairs + 1];           // of prod (x^2 - p^2), by powers of x^2
    float others[kPairs][kPairs];    // of prod (x^2 - q^2) over the points q other than p
    float others_p[kPairs][kPairs];  // those times p
    float powers[kPairs][T];         // of p
    float weight[kPairs][3];         // G: powers of p over the product of its distances to the other points
    float weight_at_zero;
  };

  static constexpr Constants make_constants() {
    Constants c{};
    double all[kPairs + 1] = {1};
    for (int j = 0; j < kPairs; ++j) multiply_by_root(all, j, kPoints<T>[j]);
    for (int i = 0; i <= kPairs; ++i) c.all[i] = static_cast<float>(all[i]);
    c.weight_at_zero = static_cast<float>(1 / all[0]);
    for (int k = 0; k < kPairs; ++k) {
      const double p = kPoints<T>[k];
      double others[kPairs + 1] = {1};
      for (int j = 0, degree = 0; j < kPairs; ++j)
        if (j != k) multiply_by_root(others, degree++, kPoints<T>[j]);
      double distances = 2 * p * p, value = 0, power = 1;
      for (int i = 0; i < kPairs; ++i, power *= p * p) {
        c.others[k][i] = static_cast<float>(others[i]);
        c.others_p[k][i] = static_cast<float>(p * others[i]);
        value += others[i] * power;
      }
      distances *= value;
      power = 1;
      for (int i = 0; i < T || i < 3; ++i, power *= p) {
        if (i < T) c.powers[k][i] = static_cast<float>(power);
        if (i < 3) c.weight[k][i] = static_cast<float>(power / distances);
      }
    }
    return c;
  }

  // polynomial in x^2 of this degree *= x^2 - root^2
  static constexpr void multiply_by_root(double* polynomial, int degree, double root) {
    for (int i = degree; i >= 0; --i) {
      polynomial[i + 1] += polynomial[i];
      polynomial[i] *= -root * root;
    }
  }

  static constexpr Constants c = make_constants();

  // Two values of B^T d
  INLINE static void input_pair(int pair, const vec* d, vec& first, vec& second) {
    if (pair == 0) {
      first = d[T], second = d[T + 1];
      UNROLL
      for (int i = kPairs - 1; i >= 0; --i) {
        first += c.all[i] * d[2 * i];
        second += c.all[i] * d[2 * i + 1];
      }
    } else {
      vec even = d[T], odd = c.others_p[pair - 1][kPairs - 1] * d[T - 1];
      UNROLL
      for (int i = kPairs - 2; i >= 0; --i) {
        even += c.others[pair - 1][i] * d[2 * i + 2];
        odd += c.others_p[pair - 1][i] * d[2 * i + 1];
      }
      first = even + odd, second = even - odd;
    }
  }

  // Two values of A dy
  INLINE static void gradient_pair(int pair, const vec* y, vec& first, vec& second) {
    if (pair == 0) {
      first = y[0], second = y[T - 1];
    } else {
      vec even = y[0], odd = c.powers[pair - 1][1] * y[1];
      UNROLL
      for (int i = 2; i < T; i += 2) {
        even += c.powers[pair - 1][i] * y[i];
        odd += c.powers[pair - 1][i + 1] * y[i + 1];
      }
      first = even + odd, second = even - odd;
    }
  }

  // Two values of G g
  INLINE static void weight_pair(int pair, const vec* g, vec& first, vec& second) {
    if (pair == 0) {
      first = c.weight_at_zero * g[0], second = g[2];
    } else {
      const vec even = c.weight[pair - 1][0] * g[0] + c.weight[pair - 1][2] * g[2];
      const vec odd = c.weight[pair - 1][1] * g[1];
      first = even + odd, second = even - odd;
    }
  }

  // A^T m
  INLINE static void output_line(const vec* m, vec* y) {
    vec sums[kPairs], differences[kPairs];
    UNROLL
    for (int k = 0; k < kPairs; ++k) {
      sums[k] = m[2 * k + 1] + m[2 * k + 2];
      differences[k] = m[2 * k + 1] - m[2 * k + 2];
    }
    UNROLL
    for (int i = 0; i < T; ++i) {
      const vec* const parts = i % 2 == 0 ? sums : differences;
      vec value = i == 0       ? m[0] + parts[0]
                  : i == T - 1 ? m[T + 1] + c.powers[0][i] * parts[0]
                               : c.powers[0][i] * parts[0];
      UNROLL
      for (int k = 1; k < kPairs; ++k) value += c.powers[k][i] * parts[k];
      y[i] = value;
    }
  }

  // G^T u
  INLINE static void weight_gradient_line(const vec* u, vec* g) {
    g[0] = c.weight_at_zero * u[0];
    g[1] = vec{};
    g[2] = u[T + 1];
    UNROLL
    for (int k = 0; k < kPairs; ++k) {
      const vec sum = u[2 * k + 1] + u[2 * k + 2], difference = u[2 * k + 1] - u[2 * k + 2];
      g[0] += c.weight[k][0] * sum;
      g[1] += c.weight[k][1] * difference;
      g[2] += c.weight[k][2] * sum;
    }
  }
};

using Pair = void (*)(int pair, const vec*, vec&, vec&);
using Line = void (*)(const vec*, vec*);

// Keeps the compiler from working out every address of a transform beforehand, for which it has no registers.
template <class T>
INLINE T* as_it_comes(T* pointer) {
  asm("" : "+r"(pointer));
  return pointer;
}

// The two-dimensional transform of an IN x IN patch, whose elements lie row_stride and column_stride floats apart, into
// (T+2) x (T+2) values `stride` apart: on the columns, then on the rows. Pair by pair of rows, so that the registers
// suffice.
template <int T, int IN, Pair PAIR>
INLINE void expand(const float* source, ptrdiff_t row_stride, ptrdiff_t column_stride, float* target,
                   ptrdiff_t stride) {
  using W = Winograd<T>;
  UNROLL
  for (int rows = 0; rows <= W::kPairs; ++rows) {
    vec half[2][IN];
    UNROLL
    for (int column = 0; column < IN; ++column) {
      const float* const top = as_it_comes(source + column * column_stride);
      vec line[IN];
      UNROLL
      for (int row = 0; row < IN; ++row) line[row] = load(top + row * row_stride);
      PAIR(rows, line, half[0][column], half[1][column]);
    }
    UNROLL
    for (int of = 0; of < 2; ++of) {
      float* const line =
          as_it_comes(target + (of == 0 ? W::first_of(rows) : W::second_of(rows)) * W::kFootprint * stride);
      UNROLL
      for (int columns = 0; columns <= W::kPairs; ++columns) {
        vec first, second;
        PAIR(columns, half[of], first, second);
        store(line + W::first_of(columns) * stride, first);
        store(line + W::second_of(columns) * stride, second);
      }
    }
  }
}

// The way back: from (T+2) x (T+2) values, `stride` apart, to OUT x OUT.
template <int T, int OUT, Line LINE>
INLINE void contract(const float* source, ptrdiff_t stride, vec (&result)[OUT][OUT]) {
  constexpr int IN = Winograd<T>::kFootprint;
  vec half[OUT][IN];
  UNROLL
  for (int column = 0; column < IN; ++column) {
    const float* const top = as_it_comes(source + column * stride);
    vec line[IN], values[OUT];
    UNROLL
    for (int row = 0; row < IN; ++row) line[row] = load(top + row * IN * stride);
    LINE(line, values);
    UNROLL
    for (int row = 0; row < OUT; ++row) half[row][column] = values[row];
  }
  UNROLL
  for (int row = 0; row < OUT; ++row) LINE(half[row], result[row]);
}

}  // namespace
}  // namespace fastunet

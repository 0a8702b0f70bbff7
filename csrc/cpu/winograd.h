// Winograd F(T x T, K x K): a T x T tile of outputs from a footprint of (T+K-1) x (T+K-1) inputs, with as many
// multiplications instead of K^2 T^2. For K = 3 and T = 2, 4, 6, and for K = 2 and T = 5.
//
//   Y  = A^T [ (G g G^T) . (B^T d B) ] A          forward and data gradient
//   dg = G^T [ sum (B^T d B) . (A dY A^T) ] G     weight gradient
//
// (Lavin and Gray 2016, eq. 8.) Interpolation at the points 0, +-p for some values of p, and infinity: a point and its
// opposite share their even and odd parts, and all transforms are made of such pairs; pair 0 is (0, infinity). This
// file holds the one-dimensional transforms and their two-dimensional use on vectors of channels.
#pragma once

#include "simd.h"

namespace fastunet {
namespace {

// By their number; the two are those that lose least accuracy in float32.
template <int PAIRS>
constexpr double kPoints[PAIRS] = {};
template <>
constexpr double kPoints<1>[1] = {1};
template <>
constexpr double kPoints<2>[2] = {0.70710678118654752440, 1.41421356237309504880};
template <>
constexpr double kPoints<3>[3] = {1, 2, 0.5};

template <int T, int K = 3>
struct Winograd {
  static constexpr int kTile = T, kKernel = K, kFootprint = T + K - 1, kFrequencies = kFootprint * kFootprint;
  static constexpr int kPairs = kFootprint / 2 - 1;
  static_assert(kFootprint % 2 == 0 && (K == 2 || K == 3));

  // Where the two values of a pair lie in a transformed line.
  static constexpr int first_of(int pair) { return pair == 0 ? 0 : 2 * pair - 1; }
  static constexpr int second_of(int pair) { return pair == 0 ? kFootprint - 1 : 2 * pair; }

  struct Constants {
    float all[kPairs + 1];           // of prod (x^2 - p^2), by powers of x^2
    float others[kPairs][kPairs];    // of prod (x^2 - q^2) over the points q other than p
    float others_p[kPairs][kPairs];  // those times p
    float powers[kPairs][T];         // of p
    float weight[kPairs][K];         // G: powers of p over the product of its distances to the other points
    float weight_at_zero;
  };

  static constexpr Constants make_constants() {
    Constants c{};
    double all[kPairs + 1] = {1};
    for (int j = 0; j < kPairs; ++j) multiply_by_root(all, j, kPoints<kPairs>[j]);
    for (int i = 0; i <= kPairs; ++i) c.all[i] = static_cast<float>(all[i]);
    c.weight_at_zero = static_cast<float>(1 / all[0]);
    for (int k = 0; k < kPairs; ++k) {
      const double p = kPoints<kPairs>[k];
      double others[kPairs + 1] = {1};
      for (int j = 0, degree = 0; j < kPairs; ++j)
        if (j != k) multiply_by_root(others, degree++, kPoints<kPairs>[j]);
      double distances = 2 * p * p, value = 0, power = 1;
      for (int i = 0; i < kPairs; ++i, power *= p * p) {
        c.others[k][i] = static_cast<float>(others[i]);
        c.others_p[k][i] = static_cast<float>(p * others[i]);
        value += others[i] * power;
      }
      distances *= value;
      power = 1;
      for (int i = 0; i < T || i < K; ++i, power *= p) {
        if (i < T) c.powers[k][i] = static_cast<float>(power);
        if (i < K) c.weight[k][i] = static_cast<float>(power / distances);
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
      first = d[kFootprint - 2], second = d[kFootprint - 1];
      UNROLL
      for (int i = kPairs - 1; i >= 0; --i) {
        first += c.all[i] * d[2 * i];
        second += c.all[i] * d[2 * i + 1];
      }
    } else {
      vec even = d[kFootprint - 2], odd = c.others_p[pair - 1][kPairs - 1] * d[kFootprint - 3];
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
      first = c.weight_at_zero * g[0], second = g[K - 1];
    } else {
      vec even = c.weight[pair - 1][0] * g[0];
      if constexpr (K == 3) even += c.weight[pair - 1][2] * g[2];
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
                  : i == T - 1 ? m[kFootprint - 1] + c.powers[0][i] * parts[0]
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
// values for all frequencies of W, `stride` apart: on the columns, then on the rows. Pair by pair of rows, so that the
// registers suffice.
template <class W, int IN, Pair PAIR>
INLINE void expand(const float* source, ptrdiff_t row_stride, ptrdiff_t column_stride, float* target,
                   ptrdiff_t stride) {
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

// The way back: from values for all frequencies of W, `stride` apart, to OUT x OUT.
template <class W, int OUT, Line LINE>
INLINE void contract(const float* source, ptrdiff_t stride, vec (&result)[OUT][OUT]) {
  constexpr int IN = W::kFootprint;
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

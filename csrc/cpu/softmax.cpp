// Softmax, and softmax with weighted cross-entropy whose gradient is made in the same pass over the logits:
//   loss = sum of w * -log p(label) / sum of w,   d loss / d logit = w * (p - onehot) / sum of w
// Logits are shifted by their largest, so that any finite ones are safe. Rows are summed in double precision
// in a fixed order: the result does not depend on the number of threads. Tested against torch
// (tests/test_ops.py).
#include <math.h>

#include "../memory.h"
#include "simd.h"
#include "table.h"

namespace fastunet {
namespace {

// Where class k of a pixel lies, in blocks `stride` floats apart.
INLINE ptrdiff_t place(int k, ptrdiff_t stride) { return k / kBlock * stride + k % kBlock; }

// log(sum(exp)), in double: the label's logit is taken from it, and little may be left.
INLINE double log_of_sum(float largest, float sum) { return static_cast<double>(largest) + logf(sum); }

// Probabilities of one pixel's `classes` logits; returns log(sum(exp)).
INLINE double softmax_pixel(const float* logits, ptrdiff_t stride, int classes, float* p, ptrdiff_t p_stride) {
  float largest = logits[0];
  for (int k = 1; k < classes; ++k) {
    const float value = logits[place(k, stride)];
    largest = value > largest ? value : largest;
  }
  float sum = 0;
  for (int k = 0; k < classes; ++k) {
    const float e = expf(logits[place(k, stride)] - largest);
    p[place(k, p_stride)] = e;
    sum += e;
  }
  for (int k = 0; k < classes; ++k) p[place(k, p_stride)] /= sum;
  return log_of_sum(largest, sum);
}

void clear_padding(const View& view, int image, int row) {
  const int used = view.channels % kBlock;
  if (used == 0) return;
  float* pixel = view.at(image, view.blocks() - 1, row, 0);
  for (int column = 0; column < view.width; ++column, pixel += kBlock)
    for (int i = used; i < kBlock; ++i) pixel[i] = 0.0f;
}

}  // namespace

namespace FASTUNET_ISA {

void softmax(const View& logits, const View& probabilities) {
  parallel(logits.images * logits.height, [&](int task, int) {
    const int row = task % logits.height, image = task / logits.height;
    for (int column = 0; column < logits.width; ++column)
      softmax_pixel(logits.at(image, 0, row, column), logits.block_stride, logits.channels,
                    probabilities.at(image, 0, row, column), probabilities.block_stride);
    clear_padding(probabilities, image, row);
  });
}

CrossEntropy softmax_cross_entropy(const View& logits, const int32_t* labels, const float* weights,
                                   const View& logit_gradient) {
  const int rows = logits.images * logits.height, classes = logits.channels;
  CrossEntropy total;
  for (ptrdiff_t i = 0; i < static_cast<ptrdiff_t>(rows) * logits.width; ++i) total.weight_sum += weights[i];
  const float scale = static_cast<float>(1.0 / total.weight_sum);
  double* const row_sums = reinterpret_cast<double*>(scratch(kPerThread, 4 * static_cast<size_t>(rows)));
  long* const row_invalid = reinterpret_cast<long*>(row_sums + rows);
  parallel(rows, [&](int task, int) {
    const int row = task % logits.height, image = task / logits.height;
    const int32_t* label = labels + static_cast<ptrdiff_t>(task) * logits.width;
    const float* weight = weights + static_cast<ptrdiff_t>(task) * logits.width;
    const bool wanted = logit_gradient.data != nullptr;
    double sum = 0;
    long invalid = 0;
    for (int column = 0; column < logits.width; ++column) {
      const float* x = logits.at(image, 0, row, column);
      float* g = wanted ? logit_gradient.at(image, 0, row, column) : nullptr;
      const int k = label[column];
      const float w = weight[column];
      const bool valid = k >= 0 && k < classes;
      if (w == 0.0f || !valid) {
        invalid += w != 0.0f;
        for (int i = 0; wanted && i < classes; ++i) g[place(i, logit_gradient.block_stride)] = 0.0f;
        continue;
      }
      const float true_logit = x[place(k, logits.block_stride)];
      if (wanted) {
        const ptrdiff_t stride = logit_gradient.block_stride;
        sum += w * (softmax_pixel(x, logits.block_stride, classes, g, stride) - true_logit);
        g[place(k, stride)] -= 1.0f;
        for (int i = 0; i < classes; ++i) g[place(i, stride)] *= w * scale;
      } else {
        float largest = true_logit, total_exp = 0;
        for (int i = 0; i < classes; ++i) {
          const float value = x[place(i, logits.block_stride)];
          largest = value > largest ? value : largest;
        }
        for (int i = 0; i < classes; ++i) total_exp += expf(x[place(i, logits.block_stride)] - largest);
        sum += w * (log_of_sum(largest, total_exp) - true_logit);
      }
    }
    if (wanted) clear_padding(logit_gradient, image, row);
    row_sums[task] = sum;
    row_invalid[task] = invalid;
  });
  for (int row = 0; row < rows; ++row) {
    total.loss_sum += row_sums[row];
    total.invalid += row_invalid[row];
  }
  return total;
}

}  // namespace FASTUNET_ISA
}  // namespace fastunet

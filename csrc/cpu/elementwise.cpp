// The passes that touch every element once: ReLU mask, bias gradient, SGD with momentum, sums, layout
// changes. All bound by memory: cost is the bytes named at each. Tested in tests/test_ops.py and
// tests/test_optim.py.
#include "../memory.h"
#include "simd.h"
#include "table.h"

namespace fastunet {
namespace FASTUNET_ISA {

// Reads one or two values and writes one: 8 or 12 bytes an element.
void mask(const View& source, const View& positive, const View& target) {
  const int blocks = source.blocks();
  parallel(source.images * blocks * source.height, [&](int task, int) {
    const int row = task % source.height, block = task / source.height % blocks, image = task / source.height / blocks;
    const float* x = source.at(image, block, row, 0);
    float* y = target.at(image, block, row, 0);
    if (positive.data == nullptr) {
      for (int i = 0; i < source.width * kBlock; ++i) y[i] = x[i];
      return;
    }
    const float* p = positive.at(image, block, row, 0);
    for (int i = 0; i < source.width * kBlock; ++i) y[i] = p[i] > 0 ? x[i] : 0.0f;
  });
}

// 4 bytes an element. One task owns a block of channels and a slice of the rows, so that all is added in a fixed order.
void add_pixels(const View& source, float* sum) {
  constexpr int kSlices = 8;
  const int blocks = source.blocks();
  float* const partial = scratch(kPerThread, static_cast<size_t>(blocks) * kSlices * kBlock);
  parallel(blocks * kSlices, [&](int task, int) {
    const int block = task / kSlices, slice = task % kSlices;
    vec sums[kVectors];
    UNROLL
    for (int v = 0; v < kVectors; ++v) sums[v] = vec{};
    for (int image = 0; image < source.images; ++image)
      for (int row = run_begin(source.height, slice, kSlices), end = run_begin(source.height, slice + 1, kSlices);
           row < end; ++row) {
        const float* x = source.at(image, block, row, 0);
        for (int column = 0; column < source.width; ++column, x += kBlock) {
          UNROLL
          for (int v = 0; v < kVectors; ++v) sums[v] += load(x + v * kLanes);
        }
      }
    UNROLL
    for (int v = 0; v < kVectors; ++v) store(partial + task * kBlock + v * kLanes, sums[v]);
  });
  for (int task = 0; task < blocks * kSlices; ++task)
    for (int i = 0; i < kBlock; ++i) sum[task / kSlices * kBlock + i] += partial[task * kBlock + i];
}

// 20 bytes a parameter.
void sgd_momentum(float* value, const float* gradient, float* momentum, float learning_rate, float rate,
                  ptrdiff_t count) {
  constexpr ptrdiff_t kChunk = 1 << 16;
  parallel(static_cast<int>((count + kChunk - 1) / kChunk), [&](int task, int) {
    const ptrdiff_t end = (task + 1) * kChunk < count ? (task + 1) * kChunk : count;
    for (ptrdiff_t i = task * kChunk; i < end; ++i) {
      momentum[i] = rate * momentum[i] + gradient[i];
      value[i] -= learning_rate * momentum[i];
    }
  });
}

// 12 bytes an element.
void add(const View& source, const View& target) {
  const int blocks = target.blocks();
  parallel(target.images * blocks * target.height, [&](int task, int) {
    const int row = task % target.height, block = task / target.height % blocks, image = task / target.height / blocks;
    const float* x = source.at(image, block, row, 0);
    float* y = target.at(image, block, row, 0);
    for (int i = 0; i < target.width * kBlock; ++i) y[i] += x[i];
  });
}

// 8 bytes an element.
void multiply(const View& target, float factor) {
  const int blocks = target.blocks();
  parallel(target.images * blocks * target.height, [&](int task, int) {
    const int row = task % target.height, block = task / target.height % blocks, image = task / target.height / blocks;
    float* y = target.at(image, block, row, 0);
    for (int i = 0; i < target.width * kBlock; ++i) y[i] *= factor;
  });
}

// Reads 4 bytes a value and writes 4 a padded one; from_blocks the reverse.
void to_blocks(const float* pixels, const View& output) {
  parallel(output.images * output.height, [&](int task, int) {
    const int row = task % output.height, image = task / output.height;
    for (int block = 0; block < output.blocks(); ++block) {
      const int used = smaller(kBlock, output.channels - block * kBlock);
      const float* x = pixels + static_cast<ptrdiff_t>(task) * output.width * output.channels + block * kBlock;
      float* y = output.at(image, block, row, 0);
      for (int column = 0; column < output.width; ++column, x += output.channels, y += kBlock) {
        for (int i = 0; i < used; ++i) y[i] = x[i];
        for (int i = used; i < kBlock; ++i) y[i] = 0.0f;
      }
    }
  });
}

void from_blocks(const View& input, float* pixels) {
  parallel(input.images * input.height, [&](int task, int) {
    const int row = task % input.height, image = task / input.height;
    for (int block = 0; block < input.blocks(); ++block) {
      const int used = smaller(kBlock, input.channels - block * kBlock);
      const float* x = input.at(image, block, row, 0);
      float* y = pixels + static_cast<ptrdiff_t>(task) * input.width * input.channels + block * kBlock;
      for (int column = 0; column < input.width; ++column, x += kBlock, y += input.channels)
        for (int i = 0; i < used; ++i) y[i] = x[i];
    }
  });
}

}  // namespace FASTUNET_ISA
}  // namespace fastunet

// 2x2 max-pooling of stride 2, keeping which of the four pixels won (the first on ties, a value that is no number over
// any other, as PyTorch) for the backward pass: a byte per output element in the output's own order,
// [image][block][row][column][16].
//
// Cost: forward reads the input once and writes 5/16 of its bytes; backward the reverse. Tested against
// torch.nn.functional.max_pool2d (tests/test_ops.py).
#include "simd.h"
#include "table.h"

namespace fastunet {
namespace FASTUNET_ISA {

void maxpool2x2_forward(const View& input, bool rectified, const View& output, uint8_t* choice) {
  const int blocks = output.blocks();
  parallel(output.images * blocks * output.height, [&](int task, int) {
    const int row = task % output.height, block = task / output.height % blocks, image = task / output.height / blocks;
    const float* x = input.at(image, block, 2 * row, 0);
    float* y = output.at(image, block, row, 0);
    uint8_t* which = choice != nullptr ? choice + choice_index(output, image, block, row, 0) : nullptr;
    for (int column = 0; column < output.width; ++column, x += 2 * kBlock, y += kBlock) {
      const float* below = x + input.row_stride;
      for (int i = 0; i < kBlock; i += kLanes) {
        int_vec index;
        const vec best =
            largest_of_four(load(x + i), load(x + kBlock + i), load(below + i), load(below + kBlock + i), index);
        store(y + i, best);
        if (rectified) index = best > vec{} ? index : int_vec{} + kNoChoice;
        if (which != nullptr)
          *reinterpret_cast<byte_vec*>(which + column * kBlock + i) = __builtin_convertvector(index, byte_vec);
      }
    }
  });
}

void maxpool2x2_backward(const View& gradient, const uint8_t* choice, const View& input_gradient) {
  const int blocks = gradient.blocks(), rows = ceil_div(input_gradient.height, 2);
  parallel(gradient.images * blocks * rows, [&](int task, int) {
    const int row = task % rows, block = task / rows % blocks, image = task / rows / blocks;
    const int covered = row < gradient.height ? gradient.width : 0;
    for (int r = 0; r < 2 && 2 * row + r < input_gradient.height; ++r) {
      float* x = input_gradient.at(image, block, 2 * row + r, 0);
      const float* y = gradient.at(image, block, covered != 0 ? row : 0, 0);
      const uint8_t* which =
          choice + ((static_cast<ptrdiff_t>(image) * blocks + block) * gradient.height + row) * gradient.width * kBlock;
      for (int column = 0; column < covered; ++column, x += 2 * kBlock, y += kBlock, which += kBlock)
        for (int c = 0; c < 2; ++c)
          for (int i = 0; i < kBlock; i += kLanes) {
            const int_vec index = __builtin_convertvector(*reinterpret_cast<const byte_vec*>(which + i), int_vec);
            store(x + c * kBlock + i, index == 2 * r + c ? load(y + i) : vec{});
          }
      for (int i = 0; i < (input_gradient.width - 2 * covered) * kBlock; ++i) x[i] = 0.0f;
    }
  });
}

}  // namespace FASTUNET_ISA
}  // namespace fastunet

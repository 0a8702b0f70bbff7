// Dropout from a counter-based generator, so that an element is dropped or kept by its place in the tensor
// alone, whatever the device, the layout or the number of threads: Philox4x32-10 (Salmon et al. 2011), key =
// seed, counter = (element / 4, draw), the word element % 4; elements counted in (image, row, column,
// channel) order. An element is kept where its word is at least rate * 2**32. Tested against a NumPy Philox
// (tests/test_ops.py).
#include "simd.h"
#include "table.h"

namespace fastunet {
namespace {

INLINE void philox4x32(uint64_t counter, uint64_t draw, uint64_t seed, uint32_t (&word)[4]) {
  uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32);
  uint32_t c2 = static_cast<uint32_t>(draw), c3 = static_cast<uint32_t>(draw >> 32);
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c0, p1 = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  word[0] = c0;
  word[1] = c1;
  word[2] = c2;
  word[3] = c3;
}

}  // namespace

namespace FASTUNET_ISA {

void dropout(const View& input, const View& output, float rate, uint64_t seed, uint64_t draw) {
  const uint32_t threshold = static_cast<uint32_t>(static_cast<double>(rate) * 4294967296.0);
  const float scale = 1.0f / (1.0f - rate);
  const int blocks = input.blocks();
  parallel(input.images * blocks * input.height, [&](int task, int) {
    const int row = task % input.height, block = task / input.height % blocks, image = task / input.height / blocks;
    const float* x = input.at(image, block, row, 0);
    float* y = output.at(image, block, row, 0);
    const int used = smaller(kBlock, input.channels - block * kBlock);
    uint64_t element =
        ((static_cast<uint64_t>(image) * input.height + row) * input.width) * input.channels + block * kBlock;
    for (int column = 0; column < input.width; ++column, x += kBlock, y += kBlock, element += input.channels) {
      uint32_t word[4];
      for (int i = 0; i < used; ++i) {
        if (i == 0 || (element + i) % 4 == 0) philox4x32((element + i) / 4, draw, seed, word);
        y[i] = word[(element + i) % 4] >= threshold ? x[i] * scale : 0.0f;
      }
      for (int i = used; i < kBlock; ++i) y[i] = 0.0f;
    }
  });
}

}  // namespace FASTUNET_ISA
}  // namespace fastunet

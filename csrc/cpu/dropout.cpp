// Dropout from a counter-based generator, so that an element is dropped or kept by its place in the tensor
// alone, whatever the device, the layout or the number of threads: Philox4x32-10 (Salmon et al. 2011), key =
// seed, counter = (element / 4, draw), the word element % 4; elements counted in (image, row, column,
// channel) order. An element is kept where its word is at least rate * 2**32. Tested against a NumPy Philox
// (tests/test_ops.py).
#include "simd.h"
#include "table.h"

namespace fastunet {
namespace {

constexpr int kCounters = 16, kCounterLanes = kLanes / 2, kCounterVectors = kCounters / kCounterLanes;
typedef uint64_t counter_vec __attribute__((vector_size(kCounterLanes * sizeof(uint64_t)), may_alias));

typedef uint32_t word_vec __attribute__((vector_size(kLanes * sizeof(uint32_t)), may_alias, aligned(4)));

// words[4 * i + w] is word w of counter + i, for 4 pixels whose first counters are given: 4 counters each.
INLINE void philox4x32(const uint64_t (&counters)[4], uint64_t draw, uint64_t seed, uint32_t (&words)[4 * kCounters]) {
  constexpr uint64_t kWord = 0xFFFFFFFFu;
  alignas(64) uint64_t lanes[kCounters];
  for (int i = 0; i < kCounters; ++i) lanes[i] = counters[i / 4] + i % 4;
  for (int v = 0; v < kCounterVectors; ++v) {
    const counter_vec counter = *reinterpret_cast<const counter_vec*>(lanes + v * kCounterLanes);
    counter_vec c0 = counter & kWord, c1 = counter >> 32;
    counter_vec c2 = counter_vec{} + (draw & kWord), c3 = counter_vec{} + (draw >> 32);
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
      const counter_vec p0 = uint64_t{0xD2511F53u} * c0, p1 = uint64_t{0xCD9E8D57u} * c2;
      c0 = (p1 >> 32) ^ c1 ^ uint64_t{k0};
      c1 = p1 & kWord;
      c2 = (p0 >> 32) ^ c3 ^ uint64_t{k1};
      c3 = p0 & kWord;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    // Two words to a lane, then lane by lane.
    const counter_vec low = c0 | c1 << 32, high = c2 | c3 << 32;
    alignas(64) uint64_t pairs[2][kCounterLanes];
    *reinterpret_cast<counter_vec*>(pairs[0]) = low;
    *reinterpret_cast<counter_vec*>(pairs[1]) = high;
    for (int lane = 0; lane < kCounterLanes; ++lane) {
      uint32_t* const word = words + 4 * (v * kCounterLanes + lane);
      for (int pair = 0; pair < 2; ++pair) {
        word[2 * pair] = static_cast<uint32_t>(pairs[pair][lane]);
        word[2 * pair + 1] = static_cast<uint32_t>(pairs[pair][lane] >> 32);
      }
    }
  }
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
    // Four pixels at a time. The words of a pixel's first counter may belong to the element before it.
    for (int first = 0; first < input.width; first += 4) {
      const int pixels = smaller(4, input.width - first);
      uint64_t counters[4];
      for (int p = 0; p < 4; ++p) counters[p] = (element + static_cast<uint64_t>(p) * input.channels) / 4;
      uint32_t words[4 * kCounters];
      philox4x32(counters, draw, seed, words);
      for (int p = 0; p < pixels; ++p, x += kBlock, y += kBlock, element += input.channels) {
        const int skipped = static_cast<int>(element % 4);
        const uint32_t* const word = words + kBlock * p + skipped;
        const int at_once = smaller(used, kBlock - skipped);
        if (at_once == kBlock) {
          UNROLL
          for (int i = 0; i < kBlock; i += kLanes) {
            const word_vec drawn = *reinterpret_cast<const word_vec*>(word + i);
            store(y + i, drawn >= threshold ? load(x + i) * scale : vec{});
          }
          continue;
        }
        for (int i = 0; i < at_once; ++i) y[i] = word[i] >= threshold ? x[i] * scale : 0.0f;
        if (at_once < used) {  // the last few are of a fifth counter
          const uint64_t last[4] = {counters[p] + 4};
          uint32_t more[4 * kCounters];
          philox4x32(last, draw, seed, more);
          for (int i = at_once; i < used; ++i) y[i] = more[i - at_once] >= threshold ? x[i] * scale : 0.0f;
        }
        for (int i = used; i < kBlock; ++i) y[i] = 0.0f;
      }
    }
  });
}

}  // namespace FASTUNET_ISA
}  // namespace fastunet

// Dropout from a counter-based generator: Philox4x32-10 (Salmon et al. 2011), key = seed, counter = (element / 4,
// draw), the word element % 4; elements counted over the C channels that mean something, in (image, row, column,
// channel) order. So an element is dropped or kept by its place alone, whatever the device (csrc/cpu/dropout.cpp draws
// the same), and the way back draws again instead of reading a mask: the same kernel, of the gradient.
//
//   output = word >= rate * 2**32 ? input / (1 - rate) : 0
//
// input and output have the same shape and any pitch (padding stays zero), and may be one tensor. `steps`, if not null,
// points to a number that is added to `draw`: a captured graph draws anew in every replay. Grid: as pointwise.cuh says.
//
// Cost: 2 element reads and writes, and about 30 integer instructions, an element. Tested bit for bit against the CPU
// engine (tests/emulator/test_dropout.py).
#include "pointwise.cuh"

struct DropoutArguments {
  Tensor<const element> input;
  Tensor<element> output;
  const unsigned long long* steps;
  unsigned long long seed, draw;
  float rate;
};

__device__ __forceinline__ void philox4x32(unsigned* word, unsigned long long counter, unsigned long long draw,
                                           unsigned long long seed) {
  unsigned c0 = static_cast<unsigned>(counter), c1 = static_cast<unsigned>(counter >> 32);
  unsigned c2 = static_cast<unsigned>(draw), c3 = static_cast<unsigned>(draw >> 32);
  unsigned k0 = static_cast<unsigned>(seed), k1 = static_cast<unsigned>(seed >> 32);
  UNROLL
  for (int round = 0; round < 10; ++round) {
    const unsigned long long p0 = 0xD2511F53ull * c0, p1 = 0xCD9E8D57ull * c2;
    c0 = static_cast<unsigned>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<unsigned>(p1);
    c2 = static_cast<unsigned>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<unsigned>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  word[0] = c0, word[1] = c1, word[2] = c2, word[3] = c3;
}

KERNEL(dropout, DropoutArguments, 256, 4) {
  const Tensor<const element>& input = arguments.input;
  const unsigned threshold = static_cast<unsigned>(arguments.rate * 4294967296.0f);
  const float scale = 1.0f / (1.0f - arguments.rate);
  const unsigned long long draw = arguments.draw + (arguments.steps != nullptr ? *arguments.steps : 0);
  for_each_eight(input.images, input.height, input.width, input.pitch,
                 [&](int image, int row, int column, int channel) {
                   const unsigned long long pixel =
                       (static_cast<unsigned long long>(image) * input.height + row) * input.width + column;
                   const unsigned long long first = pixel * input.channels + channel;
                   const int offset = static_cast<int>(first % 4);
                   // Eight elements that do not begin a group of four touch a third one.
                   unsigned words[12] = {};
                   philox4x32(words, first / 4, draw, arguments.seed);
                   philox4x32(words + 4, first / 4 + 1, draw, arguments.seed);
                   if (offset != 0) philox4x32(words + 8, first / 4 + 2, draw, arguments.seed);
                   float values[8];
                   load_channels(values, input, image, row, column, channel);
                   UNROLL
                   for (int i = 0; i < 8; ++i) {
                     const unsigned word = offset == 0   ? words[i]
                                           : offset == 1 ? words[i + 1]
                                           : offset == 2 ? words[i + 2]
                                                         : words[i + 3];
                     values[i] = word >= threshold && channel + i < input.channels ? values[i] * scale : 0.0f;
                   }
                   store_channels(arguments.output, image, row, column, channel, values);
                 });
}

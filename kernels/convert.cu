// The passes over whole tensors that no other kernel takes along: what comes from and goes to the host, and the
// gradients of a network that is not a plain U-Net.
//
//   convert   target = source, each of either element (source: SOURCE_BITS = 16 or 32) and of any pitch; `top` and
//   `left`
//             of the source crop it
//   sum       total = one + other, each absent, of the total's size or its centre (pointwise.cuh, add_placed): the sum
//   of
//             two gradients, a centre among zeros, a copy. `total` may be `one` or `other`, where that has its size
//   mask      masked = gradient where the output of the ReLU is positive, else 0; may be `gradient` itself
//   scale     scaled = factor * source; may be `source` itself
//
// (N, H, W, C) of any pitch; the channels that the target stores beyond the source's are zero. Grid: as pointwise.cuh
// says. Cost, elements moved an element: 2, 2 to 3, 3, 2. Tested against NumPy (tests/emulator/test_convert.py).
#include "pointwise.cuh"

#if SOURCE_BITS == 16
using source_element = bfloat16;
#else
using source_element = float;
#endif

struct ConvertArguments {
  Tensor<const source_element> source;
  Tensor<element> target;
};

KERNEL(convert, ConvertArguments, 256, 4) {
  const Tensor<const source_element>& source = arguments.source;
  const Tensor<element>& target = arguments.target;
  for_each_eight(target.images, target.height, target.width, target.pitch,
                 [&](int image, int row, int column, int channel) {
                   float values[8];
                   load_channels(values, source, image, row, column, channel);
                   store_channels(target, image, row, column, channel, values);
                 });
}

struct SumArguments {
  Tensor<const element> one, other;
  Tensor<element> total;
};

KERNEL(sum, SumArguments, 256, 4) {
  const Tensor<element>& total = arguments.total;
  for_each_eight(total.images, total.height, total.width, total.pitch,
                 [&](int image, int row, int column, int channel) {
                   float values[8] = {};
                   add_placed(values, arguments.one, image, row, column, channel);
                   add_placed(values, arguments.other, image, row, column, channel);
                   store_channels(total, image, row, column, channel, values);
                 });
}

struct MaskArguments {
  Tensor<const element> gradient, output;
  Tensor<element> masked;
};

KERNEL(mask, MaskArguments, 256, 4) {
  const Tensor<element>& masked = arguments.masked;
  for_each_eight(masked.images, masked.height, masked.width, masked.pitch,
                 [&](int image, int row, int column, int channel) {
                   float values[8], output[8];
                   load_channels(values, arguments.gradient, image, row, column, channel);
                   load_channels(output, arguments.output, image, row, column, channel);
                   UNROLL
                   for (int i = 0; i < 8; ++i) values[i] = output[i] > 0.0f ? values[i] : 0.0f;
                   store_channels(masked, image, row, column, channel, values);
                 });
}

struct ScaleArguments {
  Tensor<const element> source;
  Tensor<element> scaled;
  float factor;
};

KERNEL(scale, ScaleArguments, 256, 4) {
  const Tensor<element>& scaled = arguments.scaled;
  for_each_eight(scaled.images, scaled.height, scaled.width, scaled.pitch,
                 [&](int image, int row, int column, int channel) {
                   float values[8];
                   load_channels(values, arguments.source, image, row, column, channel);
                   UNROLL
                   for (int i = 0; i < 8; ++i) values[i] *= arguments.factor;
                   store_channels(scaled, image, row, column, channel, values);
                 });
}

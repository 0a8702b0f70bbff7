// 2x2 max-pooling of stride 2, (N, H, W, C) -> (N, H / 2, W / 2, C), and the way back in one pass.
//
// Which pixel won is not stored: the way back finds it again in the input, of which the layer before keeps a copy in
// any case. The first of equal pixels in reading order wins, and a value that is no number over any other, as in
// PyTorch.
//
//   maxpool2x2_forward    pooled = largest of the four
//   maxpool2x2_backward   total = present + (gradient at the winner), zero where `rectified` and the input is not
//                         positive: x is then the output of a ReLU, and this its mask
//
// `present` is the gradient that has already come to the input from elsewhere, of the input's size or of its centre, or
// absent (pointwise.cuh, add_placed); an odd last row or column gets nothing else. `total` may be `present` itself.
// Tensors may have any pitch; in the padding, zeros give zeros. Sums are float32, rounded once.
//
// Grid: as pointwise.cuh says, of the pooled tensor forward; backward of ceil(H / 2) x ceil(W / 2) pixels.
// Cost, bytes an element of the input: forward 5/4 of an element; backward 9/4, and what `present` covers.
// Tested against PyTorch (tests/emulator/test_maxpool2x2.py).
#include "pointwise.cuh"

struct MaxpoolForwardArguments {
  Tensor<const element> x;
  Tensor<element> pooled;
};

KERNEL(maxpool2x2_forward, MaxpoolForwardArguments, 256, 4) {
  const Tensor<const element>& x = arguments.x;
  const Tensor<element>& pooled = arguments.pooled;
  for_each_eight(pooled.images, pooled.height, pooled.width, pooled.pitch,
                 [&](int image, int row, int column, int channel) {
                   float best[8], rival[3][8];
                   load_channels(best, x, image, 2 * row, 2 * column, channel);
                   UNROLL
                   for (int k = 1; k < 4; ++k) {
                     load_channels(rival[k - 1], x, image, 2 * row + k / 2, 2 * column + k % 2, channel);
                   }
                   UNROLL
                   for (int k = 0; k < 3; ++k) {
                     UNROLL
                     for (int i = 0; i < 8; ++i) {
                       if (rival[k][i] > best[i] || rival[k][i] != rival[k][i]) best[i] = rival[k][i];
                     }
                   }
                   store_channels(pooled, image, row, column, channel, best);
                 });
}

struct MaxpoolBackwardArguments {
  Tensor<const element> gradient;
  Tensor<const element> x;
  Tensor<const element> present;
  Tensor<element> total;
  int rectified;
};

KERNEL(maxpool2x2_backward, MaxpoolBackwardArguments, 256, 2) {
  const Tensor<const element>& x = arguments.x;
  const Tensor<const element>& gradient = arguments.gradient;
  const Tensor<element>& total = arguments.total;
  for_each_eight(total.images, (total.height + 1) / 2, (total.width + 1) / 2, total.pitch,
                 [&](int image, int row, int column, int channel) {
                   const bool pooled = row < gradient.height && column < gradient.width;
                   float values[4][8], incoming[8];
                   int winner[8];
                   UNROLL
                   for (int i = 0; i < 8; ++i) incoming[i] = 0.0f, winner[i] = 0;
                   if (pooled) load_channels(incoming, gradient, image, row, column, channel);
                   UNROLL
                   for (int k = 0; k < 4; ++k) {
                     const int y = 2 * row + k / 2, z = 2 * column + k % 2;
                     if (y < total.height && z < total.width) load_channels(values[k], x, image, y, z, channel);
                   }
                   if (pooled) {
                     UNROLL
                     for (int i = 0; i < 8; ++i) {
                       float best = values[0][i];
                       UNROLL
                       for (int k = 1; k < 4; ++k) {
                         if (values[k][i] > best || values[k][i] != values[k][i]) best = values[k][i], winner[i] = k;
                       }
                     }
                   }
                   UNROLL
                   for (int k = 0; k < 4; ++k) {
                     const int y = 2 * row + k / 2, z = 2 * column + k % 2;
                     if (y >= total.height || z >= total.width) continue;
                     float sum[8];
                     UNROLL
                     for (int i = 0; i < 8; ++i) sum[i] = winner[i] == k ? incoming[i] : 0.0f;
                     add_placed(sum, arguments.present, image, y, z, channel);
                     UNROLL
                     for (int i = 0; i < 8; ++i) {
                       if (arguments.rectified && !(values[k][i] > 0.0f)) sum[i] = 0.0f;
                     }
                     store_channels(total, image, y, z, channel, sum);
                   }
                 });
}

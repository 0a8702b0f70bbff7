// Between an image and the network: a tile's pixels out of the image, its probabilities into the prediction.
//
//   gather   tile[row][column][channel] = (pixel - offset) * scale, the pixel of an image (height, width, C) of uint8,
//            uint16 or float32 (IMAGE_BITS = 8, 16, 32) at (top + row, left + column); beyond its border the image is
//            mirrored as numpy's "reflect" does, folded again and again where the border exceeds it. `normalization`
//            holds offset and scale of each channel in double precision, and the arithmetic is double too: one value's
//            rounding, and the same as fastunet.normalization
//   stitch   prediction[top + row][left + column] += probabilities[row][column], the first rows x columns pixels of the
//            tile's (float32, pitch = K), in a prediction (height, width, K)
//
// Image and prediction may be seen turned by right angles or mirrored: from the pixel they are given it is row_step
// pixels to the next row's and column_step to the next column's, W and 1 where they are seen as they lie. The tile is
// one image of either element and any pitch; channels beyond the image's are zero.
//
// Grid: (ceil(elements of a row / 256), rows or fewer) blocks of 256 threads, a row of the tile having width * pitch
// elements, a stitched one columns * K. Cost: each pixel is read once and written once: 3 bytes from uint8 to
// bfloat16, 12 a probability. Tested against NumPy (tests/emulator/test_tile.py).
#include "tensor.cuh"

#if IMAGE_BITS == 8
using image_value = unsigned char;
#elif IMAGE_BITS == 16
using image_value = unsigned short;
#else
using image_value = float;
#endif

// The pixel that lies at `place` of a row of `size` pixels mirrored at both its ends, for ever.
__device__ __forceinline__ int mirrored(int place, int size) {
  if (size == 1) return 0;
  const int period = 2 * (size - 1), folded = (place % period + period) % period;
  return folded < size ? folded : period - folded;
}

struct GatherArguments {
  const image_value* image;
  const double* normalization;  // [channel][offset, scale]
  Tensor<element> tile;
  int height, width;
  int row_step, column_step;
  int top, left;
};

KERNEL(gather, GatherArguments, 256, 4) {
  const Tensor<element>& tile = arguments.tile;
  const int place = blockIdx.x * 256 + threadIdx.x;
  if (place >= tile.width * tile.pitch) return;
  const int column = place / tile.pitch, channel = place % tile.pitch;
  for (int row = blockIdx.y; row < tile.height; row += gridDim.y) {
    float value = 0.0f;
    if (channel < tile.channels) {
      const long long source_row = mirrored(arguments.top + row, arguments.height);
      const long long source_column = mirrored(arguments.left + column, arguments.width);
      const long long source = source_row * arguments.row_step + source_column * arguments.column_step;
      const double pixel = arguments.image[source * tile.channels + channel];
      const double offset = arguments.normalization[2 * channel], scale = arguments.normalization[2 * channel + 1];
      value = static_cast<float>((pixel - offset) * scale);
    }
    store(tile.at(0, row, column, channel), value);
  }
}

struct StitchArguments {
  Tensor<const float> probabilities;
  float* prediction;
  int row_step, column_step;
  int rows, columns;
  int top, left;
};

KERNEL(stitch, StitchArguments, 256, 4) {
  const int classes = arguments.probabilities.channels;
  const int place = blockIdx.x * 256 + threadIdx.x;
  if (place >= arguments.columns * classes) return;
  const long long column = arguments.left + place / classes;
  for (int row = blockIdx.y; row < arguments.rows; row += gridDim.y) {
    const long long target_row = arguments.top + row;
    const long long target = target_row * arguments.row_step + column * arguments.column_step;
    arguments.prediction[target * classes + place % classes] += arguments.probabilities.at(0, row, 0, 0)[place];
  }
}

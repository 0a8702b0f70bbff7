// An image of another library where it lies in device memory, (height, width, channels) of any type (number.cuh) with
// any strides: its grey values' statistics, and the image on a network's scale.
//
//   grey_parts   parts[channel][i] = of the i-th of `gridDim.x` stretches of the pixels in reading order: the sum of x
//                or, where `totals` is not null, of the squares of its distances from their mean; the least and the
//                largest x; the count of those that are not finite, which are in neither sum
//   grey_total   totals[channel] = of its `parts` parts
//   scaled       target[row][column][channel] = (x - offset) * scale, contiguous float32; `normalization` holds offset
//                and scale of each channel in double precision, and so is the arithmetic: as fastunet.normalization
//
// Sums are in double precision and in an order that depends on the image's size alone: the same at every run, exact
// for integers (below 2**53), and else as good as NumPy's, for no thread adds more than a few hundred numbers in a row
// (of images of up to 60 million pixels).
//
// Grids: grey_parts (any, channels), grey_total (channels), 8192 bytes of shared memory each; scaled (ceil(width *
// channels / 256), height or fewer). Blocks of 256 threads. Cost: each number read once; scaled writes 4 bytes.
// Tested against fastunet.normalization in NumPy (tests/emulator/test_image.py).
#include "number.cuh"

constexpr int kThreads = 256;
constexpr double kLargest = 1.7976931348623157e308;  // of all finite numbers

struct Grey {
  double sum, low, high;
  long long bad;
};

// Of all threads of the block, in a fixed order; the result is thread 0's.
__device__ __forceinline__ Grey total_of_block(const Grey& own, Grey* shared) {
  const int thread = threadIdx.x;
  shared[thread] = own;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (thread >= half) continue;
    Grey& mine = shared[thread];
    const Grey& other = shared[thread + half];
    mine = {mine.sum + other.sum, fmin(mine.low, other.low), fmax(mine.high, other.high), mine.bad + other.bad};
  }
  return shared[thread];
}

struct GreyPartsArguments {
  const void* image;
  const Grey* totals;
  Grey* parts;
  long long row_stride, column_stride, channel_stride;
  int height, width, type;
};

KERNEL(grey_parts, GreyPartsArguments, 256, 4) {
  SHARED_MEMORY(shared);
  const long long pixels = static_cast<long long>(arguments.height) * arguments.width;
  const long long stretch = (pixels + gridDim.x - 1) / gridDim.x, begin = blockIdx.x * stretch;
  const long long end = min(begin + stretch, pixels), channel = blockIdx.y * arguments.channel_stride;
  const bool squares = arguments.totals != nullptr;
  const double mean = squares ? arguments.totals[blockIdx.y].sum / static_cast<double>(pixels) : 0.0;
  // One division; from there a thread's next pixel is so many rows and columns further.
  const int width = arguments.width, rows = kThreads / width, columns = kThreads % width;
  long long row = (begin + threadIdx.x) / width, column = (begin + threadIdx.x) % width;
  Grey own = {0.0, kLargest, -kLargest, 0};
  for (long long pixel = begin + threadIdx.x; pixel < end; pixel += kThreads) {
    const long long place = row * arguments.row_stride + column * arguments.column_stride + channel;
    const double x = number_at(arguments.image, place, arguments.type);
    if (fabs(x) <= kLargest) {
      own.sum += squares ? (x - mean) * (x - mean) : x;
      own.low = fmin(own.low, x), own.high = fmax(own.high, x);
    } else {
      ++own.bad;
    }
    row += rows, column += columns;
    if (column >= width) column -= width, ++row;
  }
  const Grey total = total_of_block(own, reinterpret_cast<Grey*>(shared));
  if (threadIdx.x == 0) arguments.parts[static_cast<long long>(blockIdx.y) * gridDim.x + blockIdx.x] = total;
}

struct GreyTotalArguments {
  const Grey* parts;
  Grey* totals;
  int count;
};

KERNEL(grey_total, GreyTotalArguments, 256, 4) {
  SHARED_MEMORY(shared);
  const Grey* const parts = arguments.parts + static_cast<long long>(blockIdx.x) * arguments.count;
  Grey own = {0.0, kLargest, -kLargest, 0};
  for (int i = threadIdx.x; i < arguments.count; i += kThreads) {
    own = {own.sum + parts[i].sum, fmin(own.low, parts[i].low), fmax(own.high, parts[i].high), own.bad + parts[i].bad};
  }
  const Grey total = total_of_block(own, reinterpret_cast<Grey*>(shared));
  if (threadIdx.x == 0) arguments.totals[blockIdx.x] = total;
}

struct ScaledArguments {
  const void* image;
  const double* normalization;  // [channel][offset, scale]
  float* target;
  long long row_stride, column_stride, channel_stride;
  int height, width, channels, type;
};

KERNEL(scaled, ScaledArguments, 256, 4) {
  const int place = blockIdx.x * kThreads + threadIdx.x, elements = arguments.width * arguments.channels;
  if (place >= elements) return;
  const int channel = place % arguments.channels;
  const double offset = arguments.normalization[2 * channel], scale = arguments.normalization[2 * channel + 1];
  const long long first = place / arguments.channels * arguments.column_stride + channel * arguments.channel_stride;
  for (int row = blockIdx.y; row < arguments.height; row += gridDim.y) {
    const double x = number_at(arguments.image, row * arguments.row_stride + first, arguments.type);
    arguments.target[static_cast<long long>(row) * elements + place] = static_cast<float>((x - offset) * scale);
  }
}

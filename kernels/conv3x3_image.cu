// The first convolution of a network: valid 3x3 over an image of 1 to 4 channels, with bias and ReLU, and its weight
// and bias gradient. bfloat16 or float32 (ELEMENT_BITS); products and sums are float32.
//
//   conv3x3_image_forward:          y[n, i, j, o] = bias[o] + sum over (ky, kx, c) of x[n, i + ky, j + kx, c] w[ky, kx,
//   o, c],
//                                   then ReLU where `relu`
//   conv3x3_image_weight_gradient:  sums over the pixels of each split: workspace [split][packed weight, then bias],
//   which
//                                   kernels/reduce.cu adds up in a fixed order; zero in padding
//
// x may be packed (pitch = channels) or padded like any other tensor; y and its gradient have a pitch that is a
// multiple of 16, padding zero, and so it is written (tensor.cuh). Any number of images, sides and outputs. Weights:
// [tap = 3 ky + kx][out, padded][16], elements; the bias is float32.
//
// Memory-bound: forward writes and the gradient reads the tensor y once, 2 or 4 y.pitch bytes a pixel (41.6 MB for 570
// x 570 x 64 in bfloat16, 9.7 us of an H200), beside which the image is nothing; the splits write and reduce.cu reads
// 37 KB each. 18 channels y.pitch FLOPs a pixel, 9 a byte for one channel in bfloat16: half of what the float32 units
// have time for; of three or four channels it is these that are the limit, as tensor cores, fed 27 numbers with 5
// zeros, would not be.
//
// Geometry: fastunet/backends/cuda/conv3x3_image.py. Tested against PyTorch in float64
// (tests/emulator/test_conv3x3_image.py).
#include "tensor.cuh"

struct ForwardArguments {
  Tensor<const element> x;
  Tensor<element> y;
  const element* weight;
  const float* bias;
  int relu;
  int reserved;
};

constexpr int kForwardThreads = 256;
constexpr int kTileRows = 16, kTileColumns = 32, kTileOutputs = 64;
constexpr int kHaloColumns = kTileColumns + 2, kHaloPixels = (kTileRows + 2) * kHaloColumns;
constexpr int kRun = 8;  // pixels of a row that a thread computes together, of 8 outputs each

// Grid: (ceil(y.pitch / 64), ceil(width / 32), images ceil(height / 16)) of y.
KERNEL(conv3x3_image_forward, ForwardArguments, kForwardThreads, 2) {
  SHARED_MEMORY(shared);
  const Tensor<const element>& x = arguments.x;
  const Tensor<element>& y = arguments.y;
  const int tiles_down = (y.height + kTileRows - 1) / kTileRows;
  const int image = blockIdx.z / tiles_down, first_row = blockIdx.z % tiles_down * kTileRows;
  const int first_column = blockIdx.y * kTileColumns, first_output = blockIdx.x * kTileOutputs;

  float* const weights = reinterpret_cast<float*>(shared);      // [channel][tap][64]
  float* const halo = weights + x.channels * 9 * kTileOutputs;  // [channel][row][column]
  for (int i = threadIdx.x; i < 9 * kTileOutputs; i += kForwardThreads) {
    const int tap = i / kTileOutputs, output = first_output + i % kTileOutputs;
    for (int channel = 0; channel < x.channels; ++channel) {
      weights[channel * 9 * kTileOutputs + i] =
          output < y.pitch ? to_float(arguments.weight[(tap * y.pitch + output) * 16 + channel]) : 0.0f;
    }
  }
  for (int i = threadIdx.x; i < kHaloPixels; i += kForwardThreads) {
    const int row = first_row + i / kHaloColumns, column = first_column + i % kHaloColumns;
    const bool valid = row < x.height && column < x.width;
    for (int channel = 0; channel < x.channels; ++channel) {
      halo[channel * kHaloPixels + i] = valid ? to_float(*x.at(image, row, column, channel)) : 0.0f;
    }
  }
  __syncthreads();

  const int groups = min(kTileOutputs, y.pitch - first_output) / 8;  // of outputs, side by side in a warp
  for (int i = threadIdx.x; i < kTileRows * (kTileColumns / kRun) * groups; i += kForwardThreads) {
    const int output = i % groups * 8, run = i / groups;
    const int row = run / (kTileColumns / kRun), column = run % (kTileColumns / kRun) * kRun;
    float sums[kRun][8];
    UNROLL
    for (int o = 0; o < 8; ++o) {
      const float bias = arguments.bias[first_output + output + o];
      UNROLL
      for (int p = 0; p < kRun; ++p) sums[p][o] = bias;
    }
    for (int line = 0; line < x.channels * 3; ++line) {  // channel by channel, ky by ky
      const float* const pixels = halo + line / 3 * kHaloPixels + (row + line % 3) * kHaloColumns + column;
      float values[kRun + 2];
      UNROLL
      for (int p = 0; p < kRun + 2; ++p) values[p] = pixels[p];
      UNROLL
      for (int kx = 0; kx < 3; ++kx) {
        float weight[8];
        load8(weight, weights + (line * 3 + kx) * kTileOutputs + output);
        UNROLL
        for (int p = 0; p < kRun; ++p) {
          UNROLL
          for (int o = 0; o < 8; ++o) sums[p][o] += values[p + kx] * weight[o];
        }
      }
    }
    UNROLL
    for (int p = 0; p < kRun; ++p) {
      if (first_row + row >= y.height || first_column + column + p >= y.width) continue;
      if (arguments.relu) {  // of a value that is no number, no number
        UNROLL
        for (int o = 0; o < 8; ++o) sums[p][o] = sums[p][o] < 0.0f ? 0.0f : sums[p][o];
      }
      store8(y.at(image, first_row + row, first_column + column + p, first_output + output), sums[p]);
    }
  }
}

struct WeightGradientArguments {
  Tensor<const element> gradient;
  Tensor<const element> x;
  float* workspace;
};

constexpr int kGradientRun = 4;
// One block on a multiprocessor, all of whose registers hold sums and loads under way; whole for 2, 4, 6 or 8 groups.
constexpr int kGradientThreads = 384;

// A thread sums all nine taps and the bias of 8 outputs and one channel over runs of 4 pixels of a row, reading both
// tensors from device memory: the gradient once, for no other thread needs it. Grid: (ceil(gradient.pitch / 64),
// channels, splits); the threads of all splits take turns at the runs.
KERNEL(conv3x3_image_weight_gradient, WeightGradientArguments, kGradientThreads, 1) {
  SHARED_MEMORY(shared);
  const Tensor<const element>& gradient = arguments.gradient;
  const Tensor<const element>& x = arguments.x;
  const int first_output = blockIdx.x * kTileOutputs, channel = blockIdx.y;
  const int groups = min(kTileOutputs, gradient.pitch - first_output) / 8, sharers = kGradientThreads / groups;
  const int thread = threadIdx.x, output = thread % groups * 8, sharer = thread / groups;
  const int runs_across = (gradient.width + kGradientRun - 1) / kGradientRun,
            runs = gradient.images * gradient.height * runs_across;
  const int stride = gridDim.z * sharers;

  float sums[10][8] = {};  // the taps, then the bias
  for (int run = blockIdx.z * sharers + sharer; run < runs; run += stride) {
    const int image = run / runs_across / gradient.height, row = run / runs_across % gradient.height;
    const int column = run % runs_across * kGradientRun;
    const element* const pixels = x.at(image, row, column, channel);
    const element* const gradients = gradient.at(image, row, column, first_output + output);
    float window[3][3];  // [column % 3][ky]
    const auto load_column = [&](int p) {
      UNROLL
      for (int ky = 0; ky < 3; ++ky) {
        window[p % 3][ky] = column + p < x.width ? to_float(pixels[(ky * x.width + p) * x.pitch]) : 0.0f;
      }
    };
    load_column(0);
    load_column(1);
    UNROLL
    for (int p = 0; p < kGradientRun; ++p) {
      load_column(p + 2);
      float values[8] = {};
      if (column + p < gradient.width) load8(values, gradients + p * gradient.pitch);
      UNROLL
      for (int o = 0; o < 8; ++o) {
        UNROLL
        for (int tap = 0; tap < 9; ++tap) sums[tap][o] += values[o] * window[(p + tap % 3) % 3][tap / 3];
        sums[9][o] += values[o];
      }
    }
  }

  // The sharers' sums are added in order, a tap at a time; and the padding of the inputs, which no channel owns, is
  // written by the blocks of the first.
  const long long weights = 9LL * gradient.pitch * 16;
  float* const workspace = arguments.workspace + blockIdx.z * (weights + gradient.pitch);
  float* const partial = reinterpret_cast<float*>(shared);  // [sharer][output]
  UNROLL
  for (int tap = 0; tap < 10; ++tap) {
    store8(partial + thread * 8, sums[tap]);
    __syncthreads();
    if (thread < groups * 8) {
      float sum = 0.0f;
      for (int i = 0; i < sharers; ++i) sum += partial[i * groups * 8 + thread];
      const int o = first_output + thread;
      if (tap < 9) {
        float* const row = workspace + (tap * gradient.pitch + o) * 16;
        row[channel] = sum;
        for (int i = x.channels; channel == 0 && i < 16; ++i) row[i] = 0.0f;
      } else if (channel == 0) {
        workspace[weights + o] = sum;
      }
    }
    __syncthreads();
  }
}

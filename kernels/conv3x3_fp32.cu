// Valid 3x3 convolution in float32 (multiply-adds of the ordinary units, no TF32), in its three directions.
//
//   conv3x3_forward:          y[n, i, j, o] = bias[o] + sum over (ky, kx, c) of input[n, i + ky, j + kx, c] w[ky, kx,
//   o, c]
//                             input = [crop of skip, x] or x alone, read in place; then ReLU where `relu`; where
//                             `pooled` has data, pooled = 2x2 maximum of y, floor(height / 2) x floor(width / 2)
//   conv3x3_data_gradient:    dinput[n, i, j, c] = sum over (ky, kx, o) of dy[n, i - ky, j - kx, o] w[ky, kx, o, c]
//                             dinput = [skip_gradient, x_gradient] or x_gradient alone; 0 where an element of `x` or
//                             `skip` is 0, if that tensor (then the output of a ReLU) has data
//   conv3x3_weight_gradient:  sums over the pixels of each split: workspace [split][packed weight, then bias], which
//                             kernels/reduce.cu adds up in a fixed order
//
// Tensors are channels-last float32 of any number of images, sides and channels (tensor.cuh: the pitch a multiple of
// 16, padding zero, and so it is written). A skip's `top` and `left` are its crop. Weights, for the skip and then for
// x: [tap = 3 ky + kx][out, padded][in, padded].
//
// Defines: TILE_OUTPUTS = 64 or 32. Geometry: fastunet/backends/cuda/conv3x3_fp32.py.
//
// Cost: 18 in out FLOPs a pixel in each direction. A block of 8 x 16 x 64 keeps the tile of 16 channels with its border
// in shared memory for all nine taps and fetches 48 KB (11.5 of pixels, 36.9 of weights) for 2.4 MFLOP, 49 FLOP a byte
// of L2: 1.4 TB/s at the full 67 TFLOP/s of an H200.
//
// Tested against PyTorch in float64 (tests/emulator/test_conv3x3_fp32.py).
#include "pipeline.cuh"
#include "product_fp32.cuh"
#include "tensor.cuh"

// What is no number stays.
__device__ __forceinline__ float larger(float a, float b) { return a > b || a != a ? a : b; }

constexpr int kTileRows = 8, kTileColumns = 16;  // as product_fp32.cuh arranges 128 pixels
constexpr int kHaloRows = kTileRows + 2, kHaloColumns = kTileColumns + 2;
constexpr int kStages = 3;

// Forward and data gradient: two halos of 16 channels and three taps of weights, in floats.
constexpr int kHalo = kHaloRows * kHaloColumns * kPitch;
constexpr int kForwardWeights = TILE_OUTPUTS * kPitch, kGradientWeights = kChunk * TILE_OUTPUTS;

// 16 channels of the pixels from (first_row, first_column), zero outside of height x width.
__device__ __forceinline__ void copy_halo(float* halo, const Tensor<const float>& tensor, int image, int first_row,
                                          int first_column, int height, int width, int channel) {
  const unsigned place = shared_address(halo);
  for (int i = threadIdx.x; i < kHaloRows * kHaloColumns * 4; i += kThreads) {
    const int pixel = i / 4, row = first_row + pixel / kHaloColumns, column = first_column + pixel % kHaloColumns;
    const bool valid = row >= 0 && row < height && column >= 0 && column < width;
    cp_async_16(place + (pixel * kPitch + i % 4 * 4) * sizeof(float),
                tensor.at(image, row, column, channel + i % 4 * 4), valid);
  }
}

struct ForwardArguments {
  Tensor<const float> skip;  // without one: no data, pitch 0
  Tensor<const float> x;
  Tensor<float> y;
  Tensor<float> pooled;  // without one: no data
  const float* weight;
  const float* bias;
  int relu;
  int reserved;
};

// Grid: (ceil(y.pitch / TILE_OUTPUTS), ceil(width / 16), images ceil(height / 8)) of y.
KERNEL(conv3x3_forward, ForwardArguments, kThreads, 3) {
  SHARED_MEMORY(shared);
  float* halos = reinterpret_cast<float*>(shared);
  float* weights = halos + 2 * kHalo;
  const Tensor<float>& y = arguments.y;
  const int tiles_down = (y.height + kTileRows - 1) / kTileRows;
  const int image = blockIdx.z / tiles_down, first_row = blockIdx.z % tiles_down * kTileRows;
  const int first_column = blockIdx.y * kTileColumns, first_output = blockIdx.x * TILE_OUTPUTS;
  const int skip_chunks = arguments.skip.pitch / kChunk, chunks = skip_chunks + arguments.x.pitch / kChunk;

  const auto copy = [&](int step) {
    const int chunk = step / 9, tap = step % 9;
    const bool of_skip = chunk < skip_chunks;
    const Tensor<const float>& input = of_skip ? arguments.skip : arguments.x;
    const int channel = (of_skip ? chunk : chunk - skip_chunks) * kChunk;
    if (tap == 0) {
      copy_halo(halos + chunk % 2 * kHalo, input, image, first_row, first_column, y.height + 2, y.width + 2, channel);
    }
    const float* weight = arguments.weight + (of_skip ? 0 : 9LL * y.pitch * arguments.skip.pitch);
    const unsigned place = shared_address(weights + step % kStages * kForwardWeights);
    UNROLL
    for (int i = threadIdx.x; i < TILE_OUTPUTS * 4; i += kThreads) {
      const int output = first_output + i / 4;
      cp_async_16(place + (output_row(i / 4) * kPitch + i % 4 * 4) * sizeof(float),
                  weight + (static_cast<long long>(tap) * y.pitch + output) * input.pitch + channel + i % 4 * 4,
                  output < y.pitch);
    }
  };
  float sums[kThreadPixels][kThreadOutputs] = {};
  pipeline<kStages>(9 * chunks, copy, [&](int step) {
    const int chunk = step / 9, tap = step % 9;
    multiply_by_rows<kHaloColumns>(sums, halos + chunk % 2 * kHalo + (tap / 3 * kHaloColumns + tap % 3) * kPitch,
                                   weights + step % kStages * kForwardWeights);
  });

  UNROLL
  for (int j = 0; j < kThreadOutputs; j += 4) {
    const int channel = first_output + output(j);
    if (channel >= y.pitch) continue;
    const float4 bias = *reinterpret_cast<const float4*>(arguments.bias + channel);
    UNROLL
    for (int p = 0; p < kThreadPixels; ++p) {
      sums[p][j] += bias.x, sums[p][j + 1] += bias.y, sums[p][j + 2] += bias.z, sums[p][j + 3] += bias.w;
      if (arguments.relu) {  // of a value that is no number, no number
        UNROLL
        for (int i = j; i < j + 4; ++i) sums[p][i] = sums[p][i] < 0.0f ? 0.0f : sums[p][i];
      }
      const int row = first_row + pixel_row(p), column = first_column + pixel_column(p);
      if (row < y.height && column < y.width) {
        *reinterpret_cast<float4*>(y.at(image, row, column, channel)) =
            make_float4(sums[p][j], sums[p][j + 1], sums[p][j + 2], sums[p][j + 3]);
      }
    }
    if (arguments.pooled.data == nullptr) continue;
    UNROLL
    for (int p = 0; p < 4; p += 2) {
      float largest[4];
      UNROLL
      for (int i = 0; i < 4; ++i) {
        largest[i] = larger(larger(sums[p][j + i], sums[p + 1][j + i]), larger(sums[p + 4][j + i], sums[p + 5][j + i]));
      }
      const int row = (first_row + pixel_row(p)) / 2, column = (first_column + pixel_column(p)) / 2;
      if (row < arguments.pooled.height && column < arguments.pooled.width) {
        *reinterpret_cast<float4*>(arguments.pooled.at(image, row, column, channel)) =
            make_float4(largest[0], largest[1], largest[2], largest[3]);
      }
    }
  }
}

struct DataGradientArguments {
  Tensor<const float> gradient;
  Tensor<const float> skip;  // the values of a ReLU, or no data
  Tensor<const float> x;
  Tensor<float> skip_gradient;  // of the skip's crop; without one: no data, pitch 0
  Tensor<float> x_gradient;
  const float* weight;
};

// Grid: (ceil(skip_gradient.pitch / TILE_OUTPUTS) + ceil(x_gradient.pitch / TILE_OUTPUTS), ceil(width / 16),
// images ceil(height / 8)) of x.
KERNEL(conv3x3_data_gradient, DataGradientArguments, kThreads, 3) {
  SHARED_MEMORY(shared);
  float* halos = reinterpret_cast<float*>(shared);
  float* weights = halos + 2 * kHalo;
  const Tensor<const float>& gradient = arguments.gradient;
  const int skip_tiles = (arguments.skip_gradient.pitch + TILE_OUTPUTS - 1) / TILE_OUTPUTS;
  const bool of_skip = static_cast<int>(blockIdx.x) < skip_tiles;
  const Tensor<float>& result = of_skip ? arguments.skip_gradient : arguments.x_gradient;
  const Tensor<const float>& input = of_skip ? arguments.skip : arguments.x;
  const float* weight = arguments.weight + (of_skip ? 0 : 9LL * gradient.pitch * arguments.skip_gradient.pitch);
  const int height = gradient.height + 2, width = gradient.width + 2;
  const int tiles_down = (height + kTileRows - 1) / kTileRows;
  const int image = blockIdx.z / tiles_down, first_row = blockIdx.z % tiles_down * kTileRows;
  const int first_column = blockIdx.y * kTileColumns,
            first_channel = (blockIdx.x - (of_skip ? 0 : skip_tiles)) * TILE_OUTPUTS;

  const auto copy = [&](int step) {
    const int chunk = step / 9, tap = step % 9;
    if (tap == 0) {
      copy_halo(halos + chunk % 2 * kHalo, gradient, image, first_row - 2, first_column - 2, gradient.height,
                gradient.width, chunk * kChunk);
    }
    const unsigned place = shared_address(weights + step % kStages * kGradientWeights);
    UNROLL
    for (int i = threadIdx.x; i < kChunk * TILE_OUTPUTS / 4; i += kThreads) {
      const int output = i / (TILE_OUTPUTS / 4), channel = first_channel + i % (TILE_OUTPUTS / 4) * 4;
      cp_async_16(
          place + i * 4 * sizeof(float),
          weight + (static_cast<long long>(tap) * gradient.pitch + chunk * kChunk + output) * result.pitch + channel,
          channel < result.pitch);
    }
  };
  float sums[kThreadPixels][kThreadOutputs] = {};
  pipeline<kStages>(gradient.pitch / kChunk * 9, copy, [&](int step) {
    const int chunk = step / 9, tap = step % 9;
    multiply_by_columns<kHaloColumns>(sums,
                                      halos + chunk % 2 * kHalo + ((2 - tap / 3) * kHaloColumns + 2 - tap % 3) * kPitch,
                                      weights + step % kStages * kGradientWeights);
  });

  UNROLL
  for (int p = 0; p < kThreadPixels; ++p) {
    const int row = first_row + pixel_row(p), column = first_column + pixel_column(p);
    if (row >= height || column >= width) continue;
    UNROLL
    for (int j = 0; j < kThreadOutputs; j += 4) {
      const int channel = first_channel + output(j);
      if (channel >= result.pitch) continue;
      float4 values = make_float4(sums[p][j], sums[p][j + 1], sums[p][j + 2], sums[p][j + 3]);
      if (input.data != nullptr) values = where_nonzero(input.at(image, row, column, channel), values);
      *reinterpret_cast<float4*>(result.at(image, row, column, channel)) = values;
    }
  }
}

// Weight gradient: a block holds 32 outputs x 32 inputs of all nine taps, a thread 4 x 2 of them. Along a row of pixels
// it keeps the nine pixels under the taps in registers, so that a pixel costs one read of the gradient and three of the
// input for 72 multiply-adds.
constexpr int kSquare = 8, kSquareHalo = kSquare + 2;  // pixels of a step: 8 x 8 of the gradient
constexpr int kBlockChannels = 32;
constexpr int kStep = (kSquare * kSquare + kSquareHalo * kSquareHalo) * kBlockChannels;  // floats of a stage

struct WeightGradientArguments {
  Tensor<const float> gradient;
  Tensor<const float> skip;  // without one: no data, pitch 0
  Tensor<const float> x;
  float* workspace;
};

// Grid: (ceil(skip.pitch / 32) + ceil(x.pitch / 32), ceil(gradient.pitch / 32), splits); the splits take turns at the
// squares of pixels.
KERNEL(conv3x3_weight_gradient, WeightGradientArguments, kThreads, 3) {
  SHARED_MEMORY(shared);
  float* stages = reinterpret_cast<float*>(shared);
  const Tensor<const float>& gradient = arguments.gradient;
  const int skip_tiles = (arguments.skip.pitch + kBlockChannels - 1) / kBlockChannels;
  const bool of_skip = static_cast<int>(blockIdx.x) < skip_tiles;
  const Tensor<const float>& input = of_skip ? arguments.skip : arguments.x;
  const int first_channel = (blockIdx.x - (of_skip ? 0 : skip_tiles)) * kBlockChannels;
  const int first_output = blockIdx.y * kBlockChannels, split = blockIdx.z, splits = gridDim.z;
  const int squares_across = (gradient.width + kSquare - 1) / kSquare;
  const int squares = (gradient.height + kSquare - 1) / kSquare * squares_across;

  const auto copy = [&](int step) {
    const int square = split + step * splits;
    const int image = square / squares, first_row = square % squares / squares_across * kSquare;
    const int first_column = square % squares_across * kSquare;
    unsigned place = shared_address(stages + step % 2 * kStep);
    const auto copy_pixels = [&](const Tensor<const float>& tensor, int first, int side, int border) {
      for (int i = threadIdx.x; i < side * side * (kBlockChannels / 4); i += kThreads) {
        const int pixel = i / (kBlockChannels / 4), channel = first + i % (kBlockChannels / 4) * 4;
        const int row = first_row + pixel / side, column = first_column + pixel % side;
        cp_async_16(place + i * 4 * sizeof(float), tensor.at(image, row, column, channel),
                    row < gradient.height + border && column < gradient.width + border && channel < tensor.pitch);
      }
      place += side * side * kBlockChannels * sizeof(float);
    };
    copy_pixels(gradient, first_output, kSquare, 0);
    copy_pixels(input, first_channel, kSquareHalo, 2);
  };

  const int thread_output = threadIdx.x % 8 * 4, thread_channel = threadIdx.x / 8 * 2;
  float sums[9][4][2] = {};
  float bias_sum = 0.0f;
  pipeline<2>((gradient.images * squares - split + splits - 1) / splits, copy, [&](int step) {
    const float* gradients = stages + step % 2 * kStep;
    const float* inputs = gradients + kSquare * kSquare * kBlockChannels;
    if (blockIdx.x == 0) {
      for (int pixel = threadIdx.x / kBlockChannels; pixel < kSquare * kSquare; pixel += kThreads / kBlockChannels) {
        bias_sum += gradients[pixel * kBlockChannels + threadIdx.x % kBlockChannels];
      }
    }
    for (int row = 0; row < kSquare; ++row) {
      float2 window[3][3];
      const auto load_column = [&](float2(&column)[3], int x) {
        UNROLL
        for (int ky = 0; ky < 3; ++ky) {
          column[ky] = *reinterpret_cast<const float2*>(inputs + ((row + ky) * kSquareHalo + x) * kBlockChannels +
                                                        thread_channel);
        }
      };
      load_column(window[0], 0);
      load_column(window[1], 1);
      UNROLL
      for (int x = 0; x < kSquare; ++x) {
        load_column(window[(x + 2) % 3], x + 2);
        const float4 four =
            *reinterpret_cast<const float4*>(gradients + (row * kSquare + x) * kBlockChannels + thread_output);
        const float values[4] = {four.x, four.y, four.z, four.w};
        UNROLL
        for (int tap = 0; tap < 9; ++tap) {
          const float2 pixel = window[(x + tap % 3) % 3][tap / 3];
          UNROLL
          for (int i = 0; i < 4; ++i) {
            sums[tap][i][0] += values[i] * pixel.x;
            sums[tap][i][1] += values[i] * pixel.y;
          }
        }
      }
    }
  });

  const int outputs = gradient.pitch;
  const long long skip_weights = 9LL * outputs * arguments.skip.pitch;
  const long long weight_count = skip_weights + 9LL * outputs * arguments.x.pitch;
  float* const workspace = arguments.workspace + split * (weight_count + outputs);
  float* const weights = workspace + (of_skip ? 0 : skip_weights);
  const int channel = first_channel + thread_channel;
  UNROLL
  for (int tap = 0; tap < 9; ++tap) {
    UNROLL
    for (int i = 0; i < 4; ++i) {
      const int output = first_output + thread_output + i;
      if (output < outputs && channel < input.pitch) {
        *reinterpret_cast<float2*>(weights + (static_cast<long long>(tap) * outputs + output) * input.pitch + channel) =
            make_float2(sums[tap][i][0], sums[tap][i][1]);
      }
    }
  }
  if (blockIdx.x == 0) {
    __syncthreads();
    stages[threadIdx.x] = bias_sum;
    __syncthreads();
    const int output = first_output + threadIdx.x;
    if (threadIdx.x < kBlockChannels && output < outputs) {
      float sum = 0.0f;
      for (int i = threadIdx.x; i < kThreads; i += kBlockChannels) sum += stages[i];
      workspace[weight_count + output] = sum;
    }
  }
}

// 2x2 up-convolution of stride 2 in float32 (multiply-adds of the ordinary units, no TF32), in its three directions.
//
//   forward          y[n, 2 i + ky, 2 j + kx, o] = bias[o] + sum over c of x[n, i, j, c] w[ky, kx, o, c]
//   data gradient    dx[n, i, j, c] = sum over (ky, kx, o) of dy[n, 2 i + ky, 2 j + kx, o] w[ky, kx, o, c]; 0 where x
//   is 0,
//                    if x (then the output of a ReLU) has data
//   weight gradient  sums over the pixels of each split: workspace [split][packed weight, then bias], which
//                    kernels/reduce.cu adds up in a fixed order
//
// Tensors are channels-last float32 of any number of images, sides and channels (tensor.cuh: the pitch a multiple of
// 16, padding zero, and so it is written), whole, not cropped. Weights: [tap = 2 ky + kx][out, padded][in, padded].
//
// Each direction is a matrix product in which 16 outputs at their four positions are one side's 64 columns, so that a
// block meets every pixel of x and the four pixels of y above it once: 8 in out FLOPs a pixel of x.
//
// Geometry: fastunet/backends/cuda/upconv2x2.py. Tested against PyTorch in float64 (tests/emulator/test_upconv2x2.py).
#define TILE_OUTPUTS 64
#include "pipeline.cuh"
#include "product_fp32.cuh"
#include "upconv2x2.cuh"

constexpr int kStages = 3;
constexpr int kColumns = 64;      // 16 outputs at four positions: column = 16 tap + output
constexpr int kTileColumns = 16;  // of the 8 x 16 pixels that product_fp32.cuh thinks of; here 128 in succession

struct ForwardArguments {
  Tensor<const float> x;
  Tensor<float> y;
  const float* weight;
  const float* bias;
};

// Grid: ceil(pixels of x / 128) times y.pitch / 16 blocks, those of the same pixels side by side.
KERNEL(upconv2x2_forward, ForwardArguments, kThreads, 3) {
  SHARED_MEMORY(shared);
  constexpr int pixel_floats = kPixels * kPitch, stage_floats = pixel_floats + kColumns * kPitch;
  float* const stages = reinterpret_cast<float*>(shared);
  const Tensor<const float>& x = arguments.x;
  const Tensor<float>& y = arguments.y;
  const int pixels = x.images * x.height * x.width, tiles = y.pitch / 16;
  const int first_pixel = blockIdx.x / tiles * kPixels, first_output = blockIdx.x % tiles * 16;

  const auto copy = [&](int step) {
    const unsigned place = shared_address(stages + step % kStages * stage_floats);
    const int piece = threadIdx.x % 4 * 4, channel = step * kChunk + piece;
    UNROLL
    for (int row = threadIdx.x / 4; row < kPixels; row += kThreads / 4) {
      cp_async_16(place + (row * kPitch + piece) * 4,
                  x.data + static_cast<long long>(first_pixel + row) * x.pitch + channel, first_pixel + row < pixels);
    }
    UNROLL
    for (int row = threadIdx.x / 4; row < kColumns; row += kThreads / 4) {
      const long long weight_row = static_cast<long long>(row / 16) * y.pitch + first_output + row % 16;
      cp_async_16(place + (pixel_floats + output_row(row) * kPitch + piece) * 4,
                  arguments.weight + weight_row * x.pitch + channel, true);
    }
  };
  float sums[kThreadPixels][kThreadOutputs] = {};
  pipeline<kStages>(x.pitch / kChunk, copy, [&](int step) {
    const float* const values = stages + step % kStages * stage_floats;
    multiply_by_rows<kTileColumns>(sums, values, values + pixel_floats);
  });

  UNROLL
  for (int p = 0; p < kThreadPixels; ++p) {
    const int pixel = first_pixel + pixel_row(p) * kTileColumns + pixel_column(p);
    if (pixel >= pixels) continue;
    UNROLL
    for (int j = 0; j < kThreadOutputs; j += 4) {
      const int tap = output(j) / 16, channel = first_output + output(j) % 16;
      const float4 bias = *reinterpret_cast<const float4*>(arguments.bias + channel);
      *reinterpret_cast<float4*>(first_of_four(y, pixel) + offset_of_tap(y, tap) + channel) =
          make_float4(sums[p][j] + bias.x, sums[p][j + 1] + bias.y, sums[p][j + 2] + bias.z, sums[p][j + 3] + bias.w);
    }
  }
}

struct DataGradientArguments {
  Tensor<const float> gradient;
  Tensor<const float> x;  // the values of a ReLU, or no data
  Tensor<float> x_gradient;
  const float* weight;
};

// Grid: ceil(pixels of x / 128) times ceil(x_gradient.pitch / 64) blocks, those of the same pixels side by side.
KERNEL(upconv2x2_data_gradient, DataGradientArguments, kThreads, 3) {
  SHARED_MEMORY(shared);
  constexpr int pixel_floats = kPixels * kPitch, stage_floats = pixel_floats + kChunk * TILE_OUTPUTS;
  constexpr int rows = kPixels / (kThreads / 4);  // of a thread's copies
  float* const stages = reinterpret_cast<float*>(shared);
  const Tensor<const float>& gradient = arguments.gradient;
  const Tensor<float>& result = arguments.x_gradient;
  const int pixels = result.images * result.height * result.width;
  const int tiles = (result.pitch + TILE_OUTPUTS - 1) / TILE_OUTPUTS;
  const int first_pixel = blockIdx.x / tiles * kPixels, first_channel = blockIdx.x % tiles * TILE_OUTPUTS;

  const int piece = threadIdx.x % 4 * 4;
  const float* sources[rows];
  UNROLL
  for (int i = 0; i < rows; ++i) {
    const int pixel = first_pixel + i * (kThreads / 4) + threadIdx.x / 4;
    sources[i] = pixel < pixels ? first_of_four(gradient, pixel) + piece : nullptr;
  }
  const auto copy = [&](int step) {  // 16 outputs at one position
    const int tap = step % 4, first_output = step / 4 * kChunk;
    const unsigned place = shared_address(stages + step % kStages * stage_floats);
    const long long offset = offset_of_tap(gradient, tap) + first_output;
    UNROLL
    for (int i = 0; i < rows; ++i) {
      const int row = i * (kThreads / 4) + threadIdx.x / 4;
      const bool valid = sources[i] != nullptr;
      cp_async_16(place + (row * kPitch + piece) * 4, valid ? sources[i] + offset : gradient.data, valid);
    }
    UNROLL
    for (int i = threadIdx.x; i < kChunk * TILE_OUTPUTS / 4; i += kThreads) {
      const int output = first_output + i / (TILE_OUTPUTS / 4), channel = first_channel + i % (TILE_OUTPUTS / 4) * 4;
      cp_async_16(place + (pixel_floats + i * 4) * 4,
                  arguments.weight + (static_cast<long long>(tap) * gradient.pitch + output) * result.pitch + channel,
                  channel < result.pitch);
    }
  };
  float sums[kThreadPixels][kThreadOutputs] = {};
  pipeline<kStages>(gradient.pitch / kChunk * 4, copy, [&](int step) {
    const float* const values = stages + step % kStages * stage_floats;
    multiply_by_columns<kTileColumns>(sums, values, values + pixel_floats);
  });

  UNROLL
  for (int p = 0; p < kThreadPixels; ++p) {
    const int pixel = first_pixel + pixel_row(p) * kTileColumns + pixel_column(p);
    if (pixel >= pixels) continue;
    UNROLL
    for (int j = 0; j < kThreadOutputs; j += 4) {
      const int channel = first_channel + output(j);
      if (channel >= result.pitch) continue;
      const long long place = static_cast<long long>(pixel) * result.pitch + channel;
      float4 values = make_float4(sums[p][j], sums[p][j + 1], sums[p][j + 2], sums[p][j + 3]);
      if (arguments.x.data != nullptr) values = where_nonzero(arguments.x.data + place, values);
      *reinterpret_cast<float4*>(result.data + place) = values;
    }
  }
}

struct WeightGradientArguments {
  Tensor<const float> gradient;
  Tensor<const float> x;
  float* workspace;
};

// Grid: (ceil(x.pitch / 128), gradient.pitch / 16, splits). A block sums 64 columns by 128 inputs, a thread 8 x 8 of
// them, 16 pixels of x a step; the splits take turns at the steps.
KERNEL(upconv2x2_weight_gradient, WeightGradientArguments, kThreads, 3) {
  SHARED_MEMORY(shared);
  constexpr int step_pixels = 16, inputs = 128;
  constexpr int gradient_floats = step_pixels * kColumns, stage_floats = gradient_floats + step_pixels * inputs;
  float* const stages = reinterpret_cast<float*>(shared);
  const Tensor<const float>& gradient = arguments.gradient;
  const Tensor<const float>& x = arguments.x;
  const int pixels = x.images * x.height * x.width, steps = (pixels + step_pixels - 1) / step_pixels;
  const int first_input = blockIdx.x * inputs, first_output = blockIdx.y * 16, split = blockIdx.z, splits = gridDim.z;

  const auto copy = [&](int step) {
    const int first_pixel = (split + step * splits) * step_pixels;
    const unsigned place = shared_address(stages + step % kStages * stage_floats);
    UNROLL
    for (int i = threadIdx.x; i < gradient_floats / 4; i += kThreads) {
      const int pixel = first_pixel + i / (kColumns / 4), column = i % (kColumns / 4) * 4;
      cp_async_16(place + i * 16,
                  first_of_four(gradient, pixel) + offset_of_tap(gradient, column / 16) + first_output + column % 16,
                  pixel < pixels);
    }
    UNROLL
    for (int i = threadIdx.x; i < step_pixels * inputs / 4; i += kThreads) {
      const int pixel = first_pixel + i / (inputs / 4), input = first_input + i % (inputs / 4) * 4;
      cp_async_16(place + gradient_floats * 4 + i * 16, x.data + static_cast<long long>(pixel) * x.pitch + input,
                  pixel < pixels && input < x.pitch);
    }
  };
  const int thread_column = threadIdx.x % 8 * 4, thread_input = threadIdx.x / 8 * 4;  // and 32, 64 further
  float sums[8][8] = {};                                                              // [column][input]
  float bias_sum = 0.0f;
  pipeline<kStages>((steps - split + splits - 1) / splits, copy, [&](int step) {
    const float* const gradients = stages + step % kStages * stage_floats;
    const float* const values = gradients + gradient_floats;
    if (blockIdx.x == 0) {  // 16 outputs follow each other for every pixel and position
      UNROLL
      for (int i = threadIdx.x; i < gradient_floats; i += kThreads) bias_sum += gradients[i];
    }
    for (int pixel = 0; pixel < step_pixels; ++pixel) {
      float columns[8], inputs_of_thread[8];
      UNROLL
      for (int half = 0; half < 2; ++half) {
        const float4 g = *reinterpret_cast<const float4*>(gradients + pixel * kColumns + thread_column + half * 32);
        const float4 v = *reinterpret_cast<const float4*>(values + pixel * inputs + thread_input + half * 64);
        const int i = half * 4;
        columns[i] = g.x, columns[i + 1] = g.y, columns[i + 2] = g.z, columns[i + 3] = g.w;
        inputs_of_thread[i] = v.x, inputs_of_thread[i + 1] = v.y;
        inputs_of_thread[i + 2] = v.z, inputs_of_thread[i + 3] = v.w;
      }
      UNROLL
      for (int i = 0; i < 8; ++i) {
        UNROLL
        for (int j = 0; j < 8; ++j) sums[i][j] += columns[i] * inputs_of_thread[j];
      }
    }
  });

  const long long weights = 4LL * gradient.pitch * x.pitch;
  float* const workspace = arguments.workspace + split * (weights + gradient.pitch);
  UNROLL
  for (int i = 0; i < 8; ++i) {
    const int column = thread_column + i / 4 * 32 + i % 4;
    const long long row = static_cast<long long>(column / 16) * gradient.pitch + first_output + column % 16;
    UNROLL
    for (int j = 0; j < 8; j += 4) {
      const int input = first_input + thread_input + j / 4 * 64;
      if (input < x.pitch) {
        *reinterpret_cast<float4*>(workspace + row * x.pitch + input) =
            make_float4(sums[i][j], sums[i][j + 1], sums[i][j + 2], sums[i][j + 3]);
      }
    }
  }
  if (blockIdx.x != 0) return;
  __syncthreads();
  stages[threadIdx.x] = bias_sum;
  __syncthreads();
  if (threadIdx.x < 16) {
    float sum = 0.0f;
    for (int i = threadIdx.x; i < kThreads; i += 16) sum += stages[i];
    workspace[weights + first_output + threadIdx.x] = sum;
  }
}

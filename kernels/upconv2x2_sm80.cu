// 2x2 up-convolution of stride 2 in bfloat16 on tensor cores (mma.sync), compute capability 8.0 and up, in its three
// directions.
//
//   upconv2x2_forward:          y[n, 2 i + ky, 2 j + kx, o] = bias[o] + sum over c of x[n, i, j, c] w[ky, kx, o, c]
//   upconv2x2_data_gradient:    dx[n, i, j, c] = sum over (ky, kx, o) of dy[n, 2 i + ky, 2 j + kx, o] w[ky, kx, o, c];
//                               0 where x is 0, if x (then the output of a ReLU) has data
//   upconv2x2_weight_gradient:  sums over the pixels of each split: workspace [split][packed weight, then bias],
//   float32,
//                               which kernels/reduce.cu adds up in a fixed order
//
// Tensors are channels-last bfloat16 of any number of images, sides and channels (tensor.cuh: the pitch a multiple of
// 16, padding zero, and so it is written), whole, not cropped. Weights are bfloat16: [tap = 2 ky + kx][out, padded][in,
// padded]; the bias is float32. Sums are float32, rounded once.
//
// Each direction is a matrix product in which 16 outputs at their four positions are 64 columns (column = 16 tap +
// output), so that a block meets a pixel of x and the four pixels of y above it together, and no block straddles a
// position, whatever the channels. A block of four warps computes 128 pixels of x by 64 columns or inputs, 32 channels
// or 2 positions of 16 outputs a step; for the weight gradient 64 columns by 128 inputs, 32 pixels a step. Operands
// stream through a ring of four stages, 48 KB.
//
// Cost: 8 in out FLOPs a pixel of x. A step fetches 12 KB for 0.52 MFLOP, 43 FLOP a byte of L2; on a 572 tile a product
// of this size (28 x 28 x 1024 -> 512 to 224 x 224 x 128 -> 64) is bound by memory and launch, not by mma.
//
// Geometry: fastunet/backends/cuda/upconv2x2.py. Tested against PyTorch in float64 (tests/emulator/test_upconv2x2.py).
#include "pipeline.cuh"
#include "swizzle.cuh"
#include "upconv2x2.cuh"

constexpr int kThreads = 128;
constexpr int kStages = 4;
constexpr int kPixels = 128;  // of x, in succession
constexpr int kColumns = 64;  // 16 outputs at four positions
constexpr int kInputs = 64;   // of the data gradient
constexpr int kChunk = 32;    // of the sum, a step

// A warp's sums: 32 rows by 64 columns, [16 rows][8 columns][as mma holds them].
using Sums = float[2][8][4];

// sums += a b over 32 channels. a: rows of 32 channels or, transposed, 32 channels as rows of `a_pieces` pieces; b:
// columns likewise. The warp's part begins at a_row and b_row.
template <bool a_transposed, int a_pieces, bool b_transposed, int b_pieces>
__device__ __forceinline__ void multiply(Sums& sums, unsigned a, int a_row, unsigned b, int b_row) {
  const int lane = threadIdx.x % 32, matrix = lane / 8, line = lane % 8;
  UNROLL
  for (int k = 0; k < kChunk; k += 16) {
    unsigned rows[2][4];
    UNROLL
    for (int i = 0; i < 2; ++i) {
      if (a_transposed) {
        ldmatrix_x4_transposed(rows[i],
                               a + swizzled<a_pieces>(k + matrix / 2 * 8 + line, a_row / 8 + i * 2 + matrix % 2));
      } else {
        ldmatrix_x4(rows[i], a + swizzled<a_pieces>(a_row + i * 16 + matrix % 2 * 8 + line, k / 8 + matrix / 2));
      }
    }
    UNROLL
    for (int j = 0; j < 4; ++j) {
      unsigned columns[4];
      if (b_transposed) {
        ldmatrix_x4_transposed(columns,
                               b + swizzled<b_pieces>(k + matrix % 2 * 8 + line, b_row / 8 + j * 2 + matrix / 2));
      } else {
        ldmatrix_x4(columns, b + swizzled<b_pieces>(b_row + j * 16 + matrix / 2 * 8 + line, k / 8 + matrix % 2));
      }
      UNROLL
      for (int i = 0; i < 2; ++i) {
        mma_m16n8k16(sums[i][2 * j], rows[i], columns[0], columns[1]);
        mma_m16n8k16(sums[i][2 * j + 1], rows[i], columns[2], columns[3]);
      }
    }
  }
}

// Leaves a block's 128 x 64 sums, rounded, in shared memory as pieces [pixel][8], swizzled: what the threads store in
// whole pieces.
__device__ __forceinline__ void round_sums(const Sums& sums, unsigned char* shared) {
  const int lane = threadIdx.x % 32, first_pixel = threadIdx.x / 32 * 32;
  __syncthreads();
  UNROLL
  for (int i = 0; i < 4; ++i) {
    const int pixel = first_pixel + i * 8 + lane / 4;
    UNROLL
    for (int j = 0; j < 8; ++j) {
      const float* const pair = sums[i / 2][j] + i % 2 * 2;
      *reinterpret_cast<unsigned*>(shared + swizzled<8>(pixel, j) + lane % 4 * 4) = pack_bfloat16(pair[0], pair[1]);
    }
  }
  __syncthreads();
}

struct ForwardArguments {
  Tensor<const bfloat16> x;
  Tensor<bfloat16> y;
  const bfloat16* weight;
  const float* bias;
};

// Grid: ceil(pixels of x / 128) times y.pitch / 16 blocks, those of the same pixels side by side.
KERNEL(upconv2x2_forward, ForwardArguments, kThreads, 3) {
  SHARED_MEMORY(shared);
  constexpr int pieces = kChunk / 8, pixel_bytes = kPixels * kChunk * 2,
                stage_bytes = pixel_bytes + kColumns * kChunk * 2;
  const Tensor<const bfloat16>& x = arguments.x;
  const Tensor<bfloat16>& y = arguments.y;
  const int pixels = x.images * x.height * x.width, tiles = y.pitch / 16;
  const int first_pixel = blockIdx.x / tiles * kPixels, first_output = blockIdx.x % tiles * 16;
  const unsigned stages = shared_address(shared);

  const int piece = threadIdx.x % pieces, first_row = threadIdx.x / pieces;
  const auto copy = [&](int step) {
    const unsigned stage = stages + step % kStages * stage_bytes;
    const int channel = step * kChunk + piece * 8;
    UNROLL
    for (int row = first_row; row < kPixels; row += kThreads / pieces) {
      cp_async_16(stage + swizzled<pieces>(row, piece),
                  x.data + static_cast<long long>(first_pixel + row) * x.pitch + channel,
                  first_pixel + row < pixels && channel < x.pitch);
    }
    UNROLL
    for (int row = first_row; row < kColumns; row += kThreads / pieces) {
      const long long weight_row = static_cast<long long>(row / 16) * y.pitch + first_output + row % 16;
      cp_async_16(stage + pixel_bytes + swizzled<pieces>(row, piece), arguments.weight + weight_row * x.pitch + channel,
                  channel < x.pitch);
    }
  };
  Sums sums;
  UNROLL
  for (int j = 0; j < 8; ++j) {
    const float* const bias = arguments.bias + first_output + j % 2 * 8 + threadIdx.x % 4 * 2;
    UNROLL
    for (int i = 0; i < 2; ++i) sums[i][j][0] = sums[i][j][2] = bias[0], sums[i][j][1] = sums[i][j][3] = bias[1];
  }
  pipeline<kStages>((x.pitch + kChunk - 1) / kChunk, copy, [&](int step) {
    const unsigned stage = stages + step % kStages * stage_bytes;
    multiply<false, pieces, false, pieces>(sums, stage, threadIdx.x / 32 * 32, stage + pixel_bytes, 0);
  });

  round_sums(sums, shared);
  for (int i = threadIdx.x; i < kPixels * 8; i += kThreads) {
    const int pixel = first_pixel + i / 8, column = i % 8 * 8;
    if (pixel < pixels) {
      *reinterpret_cast<uint4*>(first_of_four(y, pixel) + offset_of_tap(y, column / 16) + first_output + column % 16) =
          *reinterpret_cast<const uint4*>(shared + swizzled<8>(i / 8, i % 8));
    }
  }
}

struct DataGradientArguments {
  Tensor<const bfloat16> gradient;
  Tensor<const bfloat16> x;  // the values of a ReLU, or no data
  Tensor<bfloat16> x_gradient;
  const bfloat16* weight;
};

// Grid: ceil(pixels of x / 128) times ceil(x_gradient.pitch / 64) blocks, those of the same pixels side by side.
KERNEL(upconv2x2_data_gradient, DataGradientArguments, kThreads, 3) {
  SHARED_MEMORY(shared);
  constexpr int pieces = kChunk / 8, pixel_bytes = kPixels * kChunk * 2,
                stage_bytes = pixel_bytes + kChunk * kInputs * 2;
  constexpr int rows = kPixels / (kThreads / pieces);  // of a thread's copies
  const Tensor<const bfloat16>& gradient = arguments.gradient;
  const Tensor<bfloat16>& result = arguments.x_gradient;
  const int pixels = result.images * result.height * result.width, tiles = (result.pitch + kInputs - 1) / kInputs;
  const int first_pixel = blockIdx.x / tiles * kPixels, first_input = blockIdx.x % tiles * kInputs;
  const unsigned stages = shared_address(shared);

  // Of a row of 32: positions kx = 0 and 1, 16 outputs each.
  const int piece = threadIdx.x % pieces, first_row = threadIdx.x / pieces;
  const bfloat16* sources[rows];
  UNROLL
  for (int i = 0; i < rows; ++i) {
    const int pixel = first_pixel + i * (kThreads / pieces) + first_row;
    sources[i] =
        pixel < pixels ? first_of_four(gradient, pixel) + offset_of_tap(gradient, piece / 2) + piece % 2 * 8 : nullptr;
  }
  const auto copy = [&](int step) {
    const int ky = step % 2, first_output = step / 2 * 16;
    const unsigned stage = stages + step % kStages * stage_bytes;
    const long long offset = offset_of_tap(gradient, 2 * ky) + first_output;
    UNROLL
    for (int i = 0; i < rows; ++i) {
      const bool valid = sources[i] != nullptr;
      cp_async_16(stage + swizzled<pieces>(i * (kThreads / pieces) + first_row, piece),
                  valid ? sources[i] + offset : gradient.data, valid);
    }
    UNROLL
    for (int i = threadIdx.x; i < kChunk * kInputs / 8; i += kThreads) {
      const int row = i / (kInputs / 8), input = first_input + i % (kInputs / 8) * 8;
      const long long weight_row = static_cast<long long>(2 * ky + row / 16) * gradient.pitch + first_output + row % 16;
      cp_async_16(stage + pixel_bytes + swizzled<kInputs / 8>(row, i % (kInputs / 8)),
                  arguments.weight + weight_row * result.pitch + input, input < result.pitch);
    }
  };
  Sums sums = {};
  pipeline<kStages>(gradient.pitch / 16 * 2, copy, [&](int step) {
    const unsigned stage = stages + step % kStages * stage_bytes;
    multiply<false, pieces, true, kInputs / 8>(sums, stage, threadIdx.x / 32 * 32, stage + pixel_bytes, 0);
  });

  round_sums(sums, shared);
  for (int i = threadIdx.x; i < kPixels * 8; i += kThreads) {
    const int pixel = first_pixel + i / 8, input = first_input + i % 8 * 8;
    if (pixel >= pixels || input >= result.pitch) continue;
    const long long place = static_cast<long long>(pixel) * result.pitch + input;
    float values[8];
    load8(values, reinterpret_cast<const bfloat16*>(shared + swizzled<8>(i / 8, i % 8)));
    if (arguments.x.data != nullptr) {
      float outputs[8];
      load8(outputs, arguments.x.data + place);
      UNROLL
      for (int k = 0; k < 8; ++k) values[k] = outputs[k] == 0.0f ? 0.0f : values[k];
    }
    store8(result.data + place, values);
  }
}

struct WeightGradientArguments {
  Tensor<const bfloat16> gradient;
  Tensor<const bfloat16> x;
  float* workspace;
};

// Grid: (ceil(x.pitch / 128), gradient.pitch / 16, splits); the splits take turns at the steps of 32 pixels.
KERNEL(upconv2x2_weight_gradient, WeightGradientArguments, kThreads, 3) {
  SHARED_MEMORY(shared);
  constexpr int inputs = 128, input_pieces = inputs / 8, column_pieces = kColumns / 8;
  constexpr int gradient_bytes = kChunk * kColumns * 2, stage_bytes = gradient_bytes + kChunk * inputs * 2;
  const Tensor<const bfloat16>& gradient = arguments.gradient;
  const Tensor<const bfloat16>& x = arguments.x;
  const int pixels = x.images * x.height * x.width, steps = (pixels + kChunk - 1) / kChunk;
  const int first_input = blockIdx.x * inputs, first_output = blockIdx.y * 16, split = blockIdx.z, splits = gridDim.z;
  const unsigned stages = shared_address(shared);

  const auto copy = [&](int step) {
    const int first_pixel = (split + step * splits) * kChunk;
    const unsigned stage = stages + step % kStages * stage_bytes;
    UNROLL
    for (int i = threadIdx.x; i < kChunk * column_pieces; i += kThreads) {
      const int row = i / column_pieces, piece = i % column_pieces;
      cp_async_16(stage + swizzled<column_pieces>(row, piece),
                  first_of_four(gradient, first_pixel + row) + offset_of_tap(gradient, piece / 2) + first_output +
                      piece % 2 * 8,
                  first_pixel + row < pixels);
    }
    UNROLL
    for (int i = threadIdx.x; i < kChunk * input_pieces; i += kThreads) {
      const int row = i / input_pieces, piece = i % input_pieces, input = first_input + piece * 8;
      cp_async_16(stage + gradient_bytes + swizzled<input_pieces>(row, piece),
                  x.data + static_cast<long long>(first_pixel + row) * x.pitch + input,
                  first_pixel + row < pixels && input < x.pitch);
    }
  };
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int warp_column = warp / 2 * 32, warp_input = warp % 2 * 64;
  Sums sums = {};
  float bias_sums[8] = {};  // of eight outputs at one position, over every 16th pixel
  pipeline<kStages>((steps - split + splits - 1) / splits, copy, [&](int step) {
    const int stage = step % kStages * stage_bytes;
    if (blockIdx.x == 0) {
      UNROLL
      for (int i = threadIdx.x; i < kChunk * column_pieces; i += kThreads) {
        float values[8];
        load8(values, reinterpret_cast<const bfloat16*>(shared + stage +
                                                        swizzled<column_pieces>(i / column_pieces, i % column_pieces)));
        UNROLL
        for (int k = 0; k < 8; ++k) bias_sums[k] += values[k];
      }
    }
    multiply<true, column_pieces, true, input_pieces>(sums, stages + stage, warp_column,
                                                      stages + stage + gradient_bytes, warp_input);
  });

  const long long weights = 4LL * gradient.pitch * x.pitch;
  float* const workspace = arguments.workspace + split * (weights + gradient.pitch);
  UNROLL
  for (int i = 0; i < 4; ++i) {
    const int column = warp_column + i * 8 + lane / 4;
    float* const row =
        workspace + (static_cast<long long>(column / 16) * gradient.pitch + first_output + column % 16) * x.pitch;
    UNROLL
    for (int j = 0; j < 8; ++j) {
      const int input = first_input + warp_input + j * 8 + lane % 4 * 2;
      const float* const pair = sums[i / 2][j] + i % 2 * 2;
      if (input < x.pitch) *reinterpret_cast<float2*>(row + input) = make_float2(pair[0], pair[1]);
    }
  }
  if (blockIdx.x != 0) return;
  float* const partial = reinterpret_cast<float*>(shared);  // [pixel % 16][position][output]
  __syncthreads();
  store8(partial + threadIdx.x * 8, bias_sums);
  __syncthreads();
  if (threadIdx.x < 16) {
    float sum = 0.0f;
    for (int i = threadIdx.x; i < kThreads * 8; i += 16) sum += partial[i];
    workspace[weights + first_output + threadIdx.x] = sum;
  }
}

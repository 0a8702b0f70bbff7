// Valid 3x3 convolution in bfloat16 on tensor cores (mma.sync), compute capability 8.0 and up: the forward pass and its
// data gradient, which is the same product with the taps reversed.
//
//   conv3x3_forward:        y[n, i, j, o] = bias[o] + sum over (ky, kx, c) of input[n, i + ky, j + kx, c] w[ky, kx, o,
//   c]
//                           input = [centre of skip, x] or x alone, read in place; then ReLU where `relu`; where
//                           `pooled` has data, pooled = 2x2 maximum of y, floor(height / 2) x floor(width / 2)
//   conv3x3_data_gradient:  dinput[n, i, j, c] = sum over (ky, kx, o) of dy[n, i - ky, j - kx, o] w[ky, kx, o, c]
//                           dinput = [skip_gradient, x_gradient] or x_gradient alone; 0 where an element of `x` or
//                           `skip` is 0, if that tensor (then the output of a ReLU) has data
//
// Tensors are channels-last bfloat16 of any number of images, sides and channels (tensor.cuh: the pitch a multiple of
// 16, padding zero, and so it is written). A skip's `top` and `left` are its crop. Weights are bfloat16, for the skip
// and then for x: [tap = 3 ky + kx][out, padded][in, padded]; the bias is float32. Sums are float32, rounded once.
//
// A block computes TILE_ROWS x 16 pixels of TILE_OUTPUTS channels. For 32 channels at a time the tile of the source
// with its border of two pixels lies in shared memory, twice, and serves all nine taps; the weights of the three taps
// of a column, dx, stream through a ring of STAGES buffers, so that both are on their way while the tensor cores work.
// A warp computes 8 x 8 pixels of 32 channels. Its operands of mma are eight pixels of row i and eight of row i + 4:
// six of them serve the three taps dy of all eight rows as ldmatrix left them in registers. Where a tile has work for
// four warps only, the other four take the second half of the 32 channels, and the two sums are added at the end.
//
// Defines: TILE_ROWS = 16 or 8, TILE_OUTPUTS = 64, 32 or 16 (8 rows: 64 only), STAGES = 2 to 4. Geometry:
// fastunet/backends/cuda/conv3x3_sm80.py.
//
// Cost: 18 in out FLOPs a pixel. A block of 16 x 16 x 64 fetches 57.6 KB (20.7 of pixels, 36.9 of weights) for 9.4
// MFLOP, 164 FLOP a byte of L2: 1.9 TB/s at the full 312 TFLOP/s of an A100, 3.0 at the 490 or so that mma.sync can
// reach on an H200 (its own wgmma: 790); 8 x 16 x 64 makes 97. Of shared memory's cycles a warp asks 12 ldmatrix of 4
// for 48 mma.sync of 2 (1.6 on Hopper): 0.50, 0.62 there. Two blocks share a multiprocessor: 128 registers a thread,
// so addresses are worked out again for each step, about two instructions for every mma.sync.
//
// Tested against PyTorch in float64 (tests/emulator/test_conv3x3_sm80.py).
#include "pipeline.cuh"
#include "swizzle.cuh"
#include "tensor.cuh"

struct ForwardArguments {
  Tensor<const bfloat16> skip;  // without one: no data, pitch 0
  Tensor<const bfloat16> x;
  Tensor<bfloat16> y;
  Tensor<bfloat16> pooled;  // without one: no data
  const bfloat16* weight;
  const float* bias;
  int relu;
  int reserved;
};

struct DataGradientArguments {
  Tensor<const bfloat16> gradient;
  Tensor<const bfloat16> skip;  // the values of a ReLU, or no data
  Tensor<const bfloat16> x;
  Tensor<bfloat16> skip_gradient;  // without one: no data, pitch 0
  Tensor<bfloat16> x_gradient;
  const bfloat16* weight;
};

constexpr int kThreads = 256;
constexpr int kTileColumns = 16;
constexpr int kTilePixels = TILE_ROWS * kTileColumns;
constexpr int kHaloColumns = kTileColumns + 2;
constexpr int kHaloPixels = (TILE_ROWS + 2) * kHaloColumns;
constexpr int kChunk = 32;  // channels of the source in shared memory at a time
constexpr int kChunkPieces = kChunk / 8;
constexpr int kOutputPieces = TILE_OUTPUTS / 8;

// The eight warps: over 8 x 8 pixels, over channels of the result and over the halves of a chunk.
constexpr int kWarpOutputs = TILE_OUTPUTS < 32 ? TILE_OUTPUTS : 32;
constexpr int kWarpsAcross = kTileColumns / 8;
constexpr int kWarpsOverPixels = TILE_ROWS / 8 * kWarpsAcross;
constexpr int kWarpsOverOutputs = TILE_OUTPUTS / kWarpOutputs;
constexpr int kWarpsOverChunk = kThreads / 32 / (kWarpsOverPixels * kWarpsOverOutputs);
static_assert(kWarpsOverChunk == 1 || kWarpsOverChunk == 2, "a tile has work for four or eight warps");

// Shared memory: two halos and the ring; after the last chunk the sums of half the warps and the result.
constexpr int kHaloRowBytes = kHaloColumns * kChunk * 2;
constexpr int kHaloBytes = (TILE_ROWS + 2) * kHaloRowBytes;
constexpr int kStageBytes = 3 * kChunk * TILE_OUTPUTS * 2;
constexpr int kSumBytes = (kWarpsOverChunk - 1) * kTilePixels * TILE_OUTPUTS * 4;

using Sums = float[4][kWarpOutputs / 8][4];  // [rows i and i + 4][8 channels][as mma holds them]

struct Warp {
  int row, column, output, half;  // of the block's tile; `half` of a chunk
  __device__ __forceinline__ Warp() {
    const unsigned warp = threadIdx.x / 32, over_outputs = warp / kWarpsOverPixels;
    row = warp % kWarpsOverPixels / kWarpsAcross * 8;
    column = warp % kWarpsAcross * 8;
    output = over_outputs % kWarpsOverOutputs * kWarpOutputs;
    half = over_outputs / kWarpsOverOutputs;
  }
};

// The pixels [row, row + TILE_ROWS + 2) x [column, column + 18) of 32 channels, zeros outside height x width.
__device__ __forceinline__ void load_halo(unsigned shared, const Tensor<const bfloat16>& source, int image, int row,
                                          int column, int height, int width, int channel) {
  const bfloat16* const origin = source.at(image, row, column, channel);
  ROLLED
  for (unsigned i = threadIdx.x; i < kHaloPixels * kChunkPieces; i += kThreads) {
    const unsigned pixel = i / kChunkPieces;
    const int piece = i % kChunkPieces, r = pixel / kHaloColumns, c = pixel % kHaloColumns;
    const bool valid = static_cast<unsigned>(row + r) < static_cast<unsigned>(height) &&
                       static_cast<unsigned>(column + c) < static_cast<unsigned>(width) &&
                       channel + piece * 8 < source.pitch;
    cp_async_16(shared + r * kHaloRowBytes + swizzled<kChunkPieces>(c, piece),
                origin + (r * source.width + c) * source.pitch + piece * 8, valid);
  }
}

// Of three taps, the rows [out, out + rows) x pieces from channel `in` of weights [outs][pitch], zeros beyond.
template <int rows, int pieces>
__device__ __forceinline__ void load_weights(unsigned shared, const bfloat16* weight, int first_tap, int tap_step,
                                             int out, int outs, int in, int pitch) {
  for (unsigned i = threadIdx.x; i < rows * pieces; i += kThreads) {
    const int row = i / pieces, piece = i % pieces, channel = in + piece * 8;
    const int first = (first_tap * outs + out + row) * pitch + channel;
    ROLLED
    for (int tap = 0; tap < 3; ++tap) {
      cp_async_16(shared + swizzled<pieces>(tap * rows + row, piece), weight + first + tap * tap_step * outs * pitch,
                  out + row < outs && channel < pitch);
    }
  }
}

// Adds the taps (0, dx), (1, dx), (2, dx) of a chunk. Where pieces lie depends on a pixel's column only and repeats
// every eight rows of weights, so that one address of each operand does for all but an exclusive or.
template <bool reversed>
__device__ __forceinline__ void multiply(Sums& sums, const Warp& warp, unsigned halo, unsigned weights, int dx) {
  const int lane = threadIdx.x % 32, matrix = lane / 8, line = lane % 8;
  const unsigned pixels =
      halo + (warp.row + matrix % 2 * 4) * kHaloRowBytes + swizzled<kChunkPieces>(warp.column + dx + line, matrix / 2);
  const unsigned matrices =
      weights + (reversed ? swizzled<kOutputPieces>(matrix % 2 * 8 + line, warp.output / 8 + matrix / 2)
                          : swizzled<kChunkPieces>(warp.output + matrix / 2 * 8 + line, matrix % 2));
  UNROLL
  for (int step = 0; step < 2 / kWarpsOverChunk; ++step) {
    const int k = step + warp.half;  // which 16 of the 32 channels
    unsigned a[6][4];                // rows i and i + 4
    UNROLL
    for (int i = 0; i < 6; ++i) ldmatrix_x4(a[i], (pixels ^ k * 32) + i * kHaloRowBytes);
    UNROLL
    for (int dy = 0; dy < 3; ++dy) {
      UNROLL
      for (int pair = 0; pair < kWarpOutputs / 16; ++pair) {
        unsigned b[4];  // two operands of 16 x 8
        if (reversed) {
          ldmatrix_x4_transposed(b, (matrices ^ pair * 32) + (dy * kChunk + k * 16) * TILE_OUTPUTS * 2);
        } else {
          ldmatrix_x4(b, (matrices ^ k * 32) + (dy * TILE_OUTPUTS + pair * 16) * kChunk * 2);
        }
        UNROLL
        for (int i = 0; i < 4; ++i) {
          mma_m16n8k16(sums[i][2 * pair], a[i + dy], b[0], b[1]);
          mma_m16n8k16(sums[i][2 * pair + 1], a[i + dy], b[2], b[3]);
        }
      }
    }
  }
}

// All chunks: `copy(step, halo, stage)` starts the copies of step = 3 chunk + dx, a halo with the first of a chunk.
template <bool reversed, typename Copy>
__device__ __forceinline__ void accumulate(Sums& sums, const Warp& warp, unsigned shared, int chunks, Copy copy) {
  const auto halo = [&](unsigned step) { return shared + step / 3 % 2 * kHaloBytes; };
  const auto stage = [&](unsigned step) { return shared + 2 * kHaloBytes + step % STAGES * kStageBytes; };
  pipeline<STAGES>(
      3 * chunks, [&](unsigned step) { copy(step, halo(step), stage(step)); },
      [&](unsigned step) { multiply<reversed>(sums, warp, halo(step), stage(step), step % 3); });
  __syncthreads();
}

// Leaves the block's result, rounded, in shared memory as pieces [pixel][TILE_OUTPUTS / 8], swizzled; returns where.
__device__ __forceinline__ unsigned char* round_sums(Sums& sums, const Warp& warp, unsigned char* shared, bool relu) {
  constexpr int count = sizeof(Sums) / sizeof(float);
  float* const first = &sums[0][0][0];
  if (kWarpsOverChunk == 2) {
    constexpr int half = kThreads / 2;
    float* const other = reinterpret_cast<float*>(shared) + threadIdx.x % half;
    if (warp.half == 1) {
      UNROLL
      for (int i = 0; i < count; ++i) other[i * half] = first[i];
    }
    __syncthreads();
    if (warp.half == 0) {
      UNROLL
      for (int i = 0; i < count; ++i) first[i] += other[i * half];
    }
  }
  unsigned char* const result = shared + kSumBytes;
  if (warp.half == 0) {
    const int lane = threadIdx.x % 32;
    if (relu) {  // of a value that is no number, no number
      UNROLL
      for (int i = 0; i < count; ++i) first[i] = first[i] < 0.0f ? 0.0f : first[i];
    }
    UNROLL
    for (int i = 0; i < 8; ++i) {
      const int pixel = (warp.row + i) * kTileColumns + warp.column + lane / 4;
      UNROLL
      for (int j = 0; j < kWarpOutputs / 8; ++j) {
        const float* const sum = sums[i % 4][j] + i / 4 * 2;
        *reinterpret_cast<unsigned*>(result + swizzled<kOutputPieces>(pixel, warp.output / 8 + j) + lane % 4 * 4) =
            pack_bfloat16(sum[0], sum[1]);
      }
    }
  }
  __syncthreads();
  return result;
}

__device__ __forceinline__ const bfloat16* piece_of(const unsigned char* result, int row, int column, int piece) {
  return reinterpret_cast<const bfloat16*>(result + swizzled<kOutputPieces>(row * kTileColumns + column, piece));
}

// Grid: (ceil(y.pitch / TILE_OUTPUTS), ceil(width / 16), images ceil(height / TILE_ROWS)) of y.
KERNEL(conv3x3_forward, ForwardArguments, kThreads, 2) {
  SHARED_MEMORY(shared);
  const Tensor<bfloat16>& y = arguments.y;
  const int tiles_down = (y.height + TILE_ROWS - 1) / TILE_ROWS;
  const int image = blockIdx.z / tiles_down, row = blockIdx.z % tiles_down * TILE_ROWS;
  const int column = blockIdx.y * kTileColumns, output = blockIdx.x * TILE_OUTPUTS;
  const Warp warp;

  Sums sums;
  UNROLL
  for (int j = 0; j < kWarpOutputs / 8; ++j) {
    const int channel = output + warp.output + j * 8 + threadIdx.x % 4 * 2;
    const bool biased = warp.half == 0 && channel < y.pitch;
    const float even = biased ? arguments.bias[channel] : 0.0f, odd = biased ? arguments.bias[channel + 1] : 0.0f;
    UNROLL
    for (int i = 0; i < 4; ++i) sums[i][j][0] = sums[i][j][2] = even, sums[i][j][1] = sums[i][j][3] = odd;
  }

  const int skip_chunks = (arguments.skip.pitch + kChunk - 1) / kChunk;
  const int chunks = skip_chunks + (arguments.x.pitch + kChunk - 1) / kChunk;
  const auto copy = [&](unsigned step, unsigned halo, unsigned stage) {
    const int chunk = step / 3;
    const bool of_skip = chunk < skip_chunks;
    const Tensor<const bfloat16>& input = of_skip ? arguments.skip : arguments.x;
    const bfloat16* const weight = arguments.weight + (of_skip ? 0 : 9LL * y.pitch * arguments.skip.pitch);
    const int channel = (chunk - (of_skip ? 0 : skip_chunks)) * kChunk;
    if (step % 3 == 0) load_halo(halo, input, image, row, column, y.height + 2, y.width + 2, channel);
    load_weights<TILE_OUTPUTS, kChunkPieces>(stage, weight, step % 3, 3, output, y.pitch, channel, input.pitch);
  };
  accumulate<false>(sums, warp, shared_address(shared), chunks, copy);

  const unsigned char* const result = round_sums(sums, warp, shared, arguments.relu);
  for (int i = threadIdx.x; i < kTilePixels * kOutputPieces; i += kThreads) {
    const int pixel = i / kOutputPieces, piece = i % kOutputPieces, channel = output + piece * 8;
    const int r = pixel / kTileColumns, c = pixel % kTileColumns;
    if (row + r < y.height && column + c < y.width && channel < y.pitch) {
      *reinterpret_cast<uint4*>(y.at(image, row + r, column + c, channel)) =
          *reinterpret_cast<const uint4*>(piece_of(result, r, c, piece));
    }
  }
  const Tensor<bfloat16>& pooled = arguments.pooled;
  if (!pooled.data) return;
  for (int i = threadIdx.x; i < kTilePixels / 4 * kOutputPieces; i += kThreads) {
    const int pixel = i / kOutputPieces, piece = i % kOutputPieces, channel = output + piece * 8;
    const int r = pixel / (kTileColumns / 2), c = pixel % (kTileColumns / 2);
    if (row / 2 + r < pooled.height && column / 2 + c < pooled.width && channel < pooled.pitch) {
      float largest[8];
      load8(largest, piece_of(result, 2 * r, 2 * c, piece));
      UNROLL
      for (int other = 1; other < 4; ++other) {
        float values[8];
        load8(values, piece_of(result, 2 * r + other / 2, 2 * c + other % 2, piece));
        UNROLL
        for (int k = 0; k < 8; ++k) {  // what is no number stays
          largest[k] = largest[k] > values[k] || largest[k] != largest[k] ? largest[k] : values[k];
        }
      }
      store8(pooled.at(image, row / 2 + r, column / 2 + c, channel), largest);
    }
  }
}

// Grid: (ceil(skip.pitch / TILE_OUTPUTS) + ceil(x.pitch / TILE_OUTPUTS), ceil(width / 16),
// images ceil(height / TILE_ROWS)) of x_gradient.
KERNEL(conv3x3_data_gradient, DataGradientArguments, kThreads, 2) {
  SHARED_MEMORY(shared);
  const Tensor<const bfloat16>& gradient = arguments.gradient;
  const int height = gradient.height + 2, width = gradient.width + 2;
  const int tiles_down = (height + TILE_ROWS - 1) / TILE_ROWS;
  const int image = blockIdx.z / tiles_down, row = blockIdx.z % tiles_down * TILE_ROWS;
  const int column = blockIdx.y * kTileColumns;
  const int skip_tiles = (arguments.skip_gradient.pitch + TILE_OUTPUTS - 1) / TILE_OUTPUTS;
  const bool of_skip = static_cast<int>(blockIdx.x) < skip_tiles;
  const int input = (blockIdx.x - (of_skip ? 0 : skip_tiles)) * TILE_OUTPUTS;
  const Tensor<bfloat16>& target = of_skip ? arguments.skip_gradient : arguments.x_gradient;
  const bfloat16* const weight =
      arguments.weight + (of_skip ? 0 : 9LL * gradient.pitch * arguments.skip_gradient.pitch);
  const Warp warp;

  Sums sums = {};
  const auto copy = [&](unsigned step, unsigned halo, unsigned stage) {
    const int channel = step / 3 * kChunk;
    if (step % 3 == 0) {
      load_halo(halo, gradient, image, row - 2, column - 2, gradient.height, gradient.width, channel);
    }
    load_weights<kChunk, kOutputPieces>(stage, weight, 8 - step % 3, -3, channel, gradient.pitch, input, target.pitch);
  };
  accumulate<true>(sums, warp, shared_address(shared), (gradient.pitch + kChunk - 1) / kChunk, copy);

  const unsigned char* const result = round_sums(sums, warp, shared, false);
  const Tensor<const bfloat16>& rectified = of_skip ? arguments.skip : arguments.x;
  for (int i = threadIdx.x; i < kTilePixels * kOutputPieces; i += kThreads) {
    const int pixel = i / kOutputPieces, piece = i % kOutputPieces, channel = input + piece * 8;
    const int r = pixel / kTileColumns, c = pixel % kTileColumns;
    if (row + r < height && column + c < width && channel < target.pitch) {
      float values[8];
      load8(values, piece_of(result, r, c, piece));
      if (rectified.data) {
        float outputs[8];
        load8(outputs, rectified.at(image, row + r, column + c, channel));
        UNROLL
        for (int k = 0; k < 8; ++k) values[k] = outputs[k] == 0.0f ? 0.0f : values[k];
      }
      store8(target.at(image, row + r, column + c, channel), values);
    }
  }
}

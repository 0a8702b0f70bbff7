// The weight and bias gradients of a valid 3x3 convolution in bfloat16 on tensor cores (mma.sync), compute capability
// 8.0 and up.
//
//   dw[ky, kx, o, c] = sum over (n, i, j) of dy[n, i, j, o] input[n, i + ky, j + kx, c]
//   dbias[o]         = sum over (n, i, j) of dy[n, i, j, o]
//
// input = [centre of skip, x] or x alone, as in conv3x3_sm80.cu: channels-last bfloat16 of any number of images, sides
// and channels, pitches multiples of 16 and padding zero, as it is in the gradient. Split s of the grid sums its share
// of the pixels in float32 and writes, in the packing of the weights, workspace[s] = [dw of the skip, dw of x, dbias],
// for kernels/reduce.cu to add up in a fixed order: the result does not change from run to run.
//
// A block computes TILE_OUTPUTS x TILE_INPUTS channels of all nine taps. 8 x 8 pixels of dy and the 10 x 10 of the
// input they meet go through a ring of four buffers, each element fetched once for nine taps. Pixels are the product's
// inner dimension and lie in rows, so both operands are read transposed. A warp computes 32 x 32 channels of the three
// taps (dy, dx) of one dx: the inner 16 pixels of mma are eight of row i and eight of row i + 4, so that what was
// loaded of the input for one tap serves the next as it lies in registers. The bias is one more column, of ones.
//
// Defines: TILE_OUTPUTS, TILE_INPUTS = 32 or 64. Geometry: fastunet/backends/cuda/conv3x3_sm80.py.
//
// Cost: 18 in out FLOPs a pixel. A block of 64 x 64 fetches 21.0 KB (8.2 of dy, 12.8 of the input) for 4.7 MFLOP, 225
// FLOP a byte of L2: 1.4 TB/s at the full 312 TFLOP/s of an A100, 2.2 at the 490 that mma.sync reaches on an H200. Of
// shared memory's cycles a warp asks 20 ldmatrix of 4 for 96 mma.sync of 2 (1.6 on Hopper): 0.42, 0.52 there. Each
// split writes 4 bytes a parameter. Registers hold one block of 64 x 64 (twelve warps) a multiprocessor.
//
// Tested against PyTorch in float64 (tests/emulator/test_conv3x3_sm80.py).
#include "pipeline.cuh"
#include "swizzle.cuh"
#include "tensor.cuh"

struct WeightGradientArguments {
  Tensor<const bfloat16> gradient;
  Tensor<const bfloat16> skip;  // without one: no data, pitch 0
  Tensor<const bfloat16> x;
  float* workspace;
};

constexpr int kWarpsOverOutputs = TILE_OUTPUTS / 32;
constexpr int kWarpsOverInputs = TILE_INPUTS / 32;
constexpr int kThreads = 3 * 32 * kWarpsOverOutputs * kWarpsOverInputs;
constexpr int kStages = 4;
constexpr int kSide = 8;  // of a step's pixels
constexpr int kHaloSide = kSide + 2;
constexpr int kOutputPieces = TILE_OUTPUTS / 8;
constexpr int kInputPieces = TILE_INPUTS / 8;
constexpr int kRowBytes = kSide * TILE_OUTPUTS * 2;
constexpr int kHaloRowBytes = kHaloSide * TILE_INPUTS * 2;
constexpr int kGradientBytes = kSide * kRowBytes;
constexpr int kStageBytes = kGradientBytes + kHaloSide * kHaloRowBytes;

// The pixels [row, row + side) x [column, column + side) of channels from `channel` on, zeros outside height x width.
template <int side, int pieces>
__device__ __forceinline__ void load_pixels(unsigned shared, const Tensor<const bfloat16>& source, int image, int row,
                                            int column, int height, int width, int channel) {
  const bfloat16* const origin = source.at(image, row, column, channel);
  ROLLED
  for (unsigned i = threadIdx.x; i < side * side * pieces; i += kThreads) {
    const unsigned pixel = i / pieces;
    const int piece = i % pieces, r = pixel / side, c = pixel % side;
    cp_async_16(shared + r * side * pieces * 16 + swizzled<pieces>(c, piece),
                origin + (r * source.width + c) * source.pitch + piece * 8,
                row + r < height && column + c < width && channel + piece * 8 < source.pitch);
  }
}

// Grid: (ceil(skip.pitch / TILE_INPUTS) + ceil(x.pitch / TILE_INPUTS), ceil(gradient.pitch / TILE_OUTPUTS), splits).
KERNEL(conv3x3_weight_gradient, WeightGradientArguments, kThreads, 1) {
  SHARED_MEMORY(shared);
  const Tensor<const bfloat16>& gradient = arguments.gradient;
  const int skip_tiles = (arguments.skip.pitch + TILE_INPUTS - 1) / TILE_INPUTS;
  const bool of_skip = static_cast<int>(blockIdx.x) < skip_tiles;
  const Tensor<const bfloat16>& source = of_skip ? arguments.skip : arguments.x;
  const int input = (blockIdx.x - (of_skip ? 0 : skip_tiles)) * TILE_INPUTS, output = blockIdx.y * TILE_OUTPUTS;

  const int lane = threadIdx.x % 32, matrix = lane / 8, line = lane % 8;
  const unsigned warp = threadIdx.x / 32;
  const int dx = warp % 3;
  const int warp_output = warp / 3 % kWarpsOverOutputs * 32, warp_input = warp / 3 / kWarpsOverOutputs * 32;
  const bool sums_bias = blockIdx.x == 0 && warp_input == 0 && dx == 0;

  const int tiles_across = (gradient.width + kSide - 1) / kSide;
  const int tiles_of_image = (gradient.height + kSide - 1) / kSide * tiles_across;
  const long long tiles = static_cast<long long>(gradient.images) * tiles_of_image;
  const int first = static_cast<int>(tiles * blockIdx.z / gridDim.z);
  const int end = static_cast<int>(tiles * (blockIdx.z + 1) / gridDim.z);
  const unsigned ring = shared_address(shared);

  const auto copy = [&](int step) {
    const int image = (first + step) / tiles_of_image, place = (first + step) % tiles_of_image;
    const int row = place / tiles_across * kSide, column = place % tiles_across * kSide;
    const unsigned stage = ring + step % kStages * kStageBytes;
    load_pixels<kSide, kOutputPieces>(stage, gradient, image, row, column, gradient.height, gradient.width, output);
    load_pixels<kHaloSide, kInputPieces>(stage + kGradientBytes, source, image, row, column, gradient.height + 2,
                                         gradient.width + 2, input);
  };

  float sums[3][2][4][4] = {};  // [dy][16 outputs][8 inputs][as mma holds them]
  float bias_sums[2][4] = {};   // [16 outputs], every column alike
  const auto multiply = [&](int step) {
    const unsigned stage = ring + step % kStages * kStageBytes;
    const unsigned outputs =
        stage + matrix / 2 * 4 * kRowBytes + swizzled<kOutputPieces>(line, warp_output / 8 + matrix % 2);
    const unsigned inputs = stage + kGradientBytes + matrix % 2 * 4 * kHaloRowBytes +
                            swizzled<kInputPieces>(dx + line, warp_input / 8 + matrix / 2);
    unsigned b[6][2][4];  // [rows i and i + 4 of the input][16 channels]: two operands of 16 x 8
    const auto load = [&](int i) {
      UNROLL
      for (int n = 0; n < 2; ++n) ldmatrix_x4_transposed(b[i][n], (inputs ^ n * 32) + i * kHaloRowBytes);
    };
    load(0);
    load(1);
    UNROLL
    for (int i = 0; i < 4; ++i) {
      load(i + 2);
      UNROLL
      for (int m = 0; m < 2; ++m) {
        unsigned a[4];  // rows i and i + 4 of the gradient, 16 channels
        ldmatrix_x4_transposed(a, (outputs ^ m * 32) + i * kRowBytes);
        UNROLL
        for (int dy = 0; dy < 3; ++dy) {
          UNROLL
          for (int n = 0; n < 4; ++n) {
            mma_m16n8k16(sums[dy][m][n], a, b[i + dy][n / 2][n % 2 * 2], b[i + dy][n / 2][n % 2 * 2 + 1]);
          }
        }
        constexpr unsigned ones = 0x3F803F80u;
        if (sums_bias) mma_m16n8k16(bias_sums[m], a, ones, ones);
      }
    }
  };
  pipeline<kStages>(end - first, copy, multiply);

  const long long weights = 9LL * gradient.pitch * (arguments.skip.pitch + arguments.x.pitch);
  float* const result = arguments.workspace + blockIdx.z * (weights + gradient.pitch);
  float* const weight = result + (of_skip ? 0 : 9LL * gradient.pitch * arguments.skip.pitch);
  UNROLL
  for (int m = 0; m < 2; ++m) {
    UNROLL
    for (int half = 0; half < 2; ++half) {
      const int out = output + warp_output + m * 16 + half * 8 + lane / 4;
      if (out >= gradient.pitch) continue;
      UNROLL
      for (int dy = 0; dy < 3; ++dy) {
        UNROLL
        for (int n = 0; n < 4; ++n) {
          const int in = input + warp_input + n * 8 + lane % 4 * 2;
          if (in >= source.pitch) continue;
          const float* const sum = sums[dy][m][n] + 2 * half;
          *reinterpret_cast<float2*>(weight +
                                     (static_cast<long long>(3 * dy + dx) * gradient.pitch + out) * source.pitch + in) =
              make_float2(sum[0], sum[1]);
        }
      }
      if (sums_bias && lane % 4 == 0) result[weights + out] = bias_sums[m][2 * half];
    }
  }
}
